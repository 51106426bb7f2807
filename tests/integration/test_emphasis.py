"""`emphasis` marks the tokens of chosen words, and nothing else, in texts and in chats."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import empcause
from empcause import Passage

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] | trim }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be kind to the user."},
    {"role": "user", "content": "  I miss Norway, dear Norway."},
    {"role": "assistant", "content": "What is Norway like?"},
    {"role": "user", "content": "Norway is cold."},
]


@pytest.fixture(scope="module")
def tokenizer(tiny_gpt2_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2_dir)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def pieces(tokenizer, causes, row=0):
    """Return the marked text of a row, one string per run of tokens with one value, and the values."""
    inputs, causes = causes
    runs: list[tuple[float, list[int]]] = []
    for token, value in zip(inputs["input_ids"][row].tolist(), causes[row].tolist(), strict=True):
        if runs and runs[-1][0] == value:
            runs[-1][1].append(token)
        else:
            runs.append((value, [token]))
    return [(tokenizer.decode(tokens).strip(), value) for value, tokens in runs if value]


class TestTexts:
    @pytest.mark.parametrize(
        ("text", "marks", "expected"),
        [
            ("We moved to Norway again.", {"Norway": 1.0}, [("Norway", 1.0)]),
            ("We moved to Norway again.", {"Norway": 1.0, "moved to": -0.5}, [("moved to", -0.5), ("Norway", 1.0)]),
            ("a cat, a dog, a cat", {"cat": 1}, [("cat", 1.0), ("cat", 1.0)]),
            ("a cat, a dog, a cat", {Passage("cat", occurrence=1): 1, Passage("cat", occurrence=0): 0.5}, None),
            ("cats concatenate a cat", {"cat": 1.0}, [("cat", 1.0)]),
            ("We moved to Norway again.", {(12, 18): -1.0}, [("Norway", -1.0)]),
            ("cafe\u0301 au lait", {"caf\u00e9": 1.0}, [("cafe\u0301", 1.0)]),
            ("我想念挪威的冬天", {"挪威": 1.0}, [("挪威", 1.0)]),
            ("don't!", {"!": 2.0}, [("!", 2.0)]),
        ],
    )
    def test_whole_words_are_marked(self, tokenizer, text, marks, expected):
        found = pieces(tokenizer, empcause.emphasis(tokenizer, text, marks))
        assert found == (expected or [("cat", 0.5), ("cat", 1.0)])

    @pytest.mark.parametrize(
        ("marks", "message"),
        [
            ({"Nor": 1.0}, "'Nor' does not occur as a whole word in 'We moved to Norway"),
            ({"norway": 1.0}, "'norway' does not occur"),
            ({"": 1.0}, "must not be empty"),
            ({" Norway": 1.0}, "begin or end with white space"),
            ({"Norway": float("nan")}, "must be a finite number, not nan"),
            ({"Norway": True}, "must be a finite number, not True"),
            ({(3, 3): 1.0}, "must lie within 0 and 25 and have a character"),
            ({(20, 30): 1.0}, "must lie within 0 and 25"),
            ({(2, 3): 1.0}, "only white space"),
            ({"to Norway": 1.0, "Norway": 0.5}, "'to Norway' and 'Norway' mark the same token with different values"),
            ({Passage("Norway", occurrence=1): 1.0}, "'Norway' occurrence 1 asks for an occurrence .* there are 1"),
            ({Passage("Norway", role="user"): 1.0}, "No message fits 'Norway' role 'user'"),
        ],
    )
    def test_what_cannot_be_marked_is_refused(self, tokenizer, marks, message):
        with pytest.raises(ValueError, match=message):
            empcause.emphasis(tokenizer, "We moved to Norway again.", marks)

    def test_the_same_value_twice_is_no_disagreement(self, tokenizer):
        marks = {"to Norway": 1.0, "Norway": 1.0}
        assert pieces(tokenizer, empcause.emphasis(tokenizer, "We moved to Norway.", marks)) == [("to Norway", 1.0)]

    def test_kinds_of_arguments(self, tokenizer):
        for texts in (3, [], [3], [[]], [["a"]], ["a", [{"role": "user", "content": "a"}]]):
            with pytest.raises(TypeError):
                empcause.emphasis(tokenizer, texts, {"a": 1.0})
        with pytest.raises(TypeError, match="sets return_tensors itself"):
            empcause.emphasis(tokenizer, "a", {"a": 1.0}, return_tensors="np")
        with pytest.raises(TypeError, match="go through no template"):
            empcause.emphasis(tokenizer, "a", {"a": 1.0}, template_options={"tools": []})
        with pytest.raises(TypeError, match=r"a span \(start, end\) or a Passage"):
            empcause.emphasis(tokenizer, "a", {3: 1.0})

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_and_truncation(self, tokenizer, side):
        tokenizer.padding_side = side
        texts = ["Norway", "We moved away from Norway a long, long time ago."]
        whole = empcause.emphasis(tokenizer, texts, {"Norway": 1.0})
        assert whole.causes.shape == whole.inputs["input_ids"].shape == whole.inputs["attention_mask"].shape
        assert [pieces(tokenizer, whole, row) for row in (0, 1)] == [[("Norway", 1.0)]] * 2
        assert not whole.causes[~whole.inputs["attention_mask"].bool()].any()
        with pytest.raises(ValueError, match="'ago' was truncated"):
            empcause.emphasis(tokenizer, texts[1], {"ago": 1.0}, truncation=True, max_length=20)
        kept = empcause.emphasis(tokenizer, texts[1], {"moved": 1.0}, truncation=True, max_length=20)
        assert kept.causes.shape == (1, 20)

    def test_marks_of_each_text(self, tokenizer):
        found = empcause.emphasis(tokenizer, ["a cat", "a dog"], [{"cat": 1.0}, {"dog": 2.0}])
        assert [pieces(tokenizer, found, row) for row in (0, 1)] == [[("cat", 1.0)], [("dog", 2.0)]]
        with pytest.raises(ValueError, match="1 mappings of marks for 2 texts"):
            empcause.emphasis(tokenizer, ["a cat", "a dog"], [{"cat": 1.0}])
        with pytest.raises(ValueError, match="'cat' does not occur as a whole word in 'a dog'"):
            empcause.emphasis(tokenizer, ["a cat", "a dog"], {"cat": 1.0})

    def test_special_tokens_of_the_tokenizer_are_not_marked(self, tiny_encoder_dir):
        tokenizer = AutoTokenizer.from_pretrained(tiny_encoder_dir)
        found = empcause.emphasis(tokenizer, "Norway", {"Norway": 1.0})
        assert found.causes[0, 0] == found.causes[0, -1] == 0
        assert found.causes[0, 1:-1].all()


class TestMessages:
    @pytest.mark.parametrize(
        ("mark", "number"),
        [
            ("Norway", 4),
            (Passage("Norway", role="user"), 3),
            (Passage("Norway", role="assistant"), 1),
            (Passage("Norway", turn=1), 2),
            (Passage("Norway", turn=-1), 1),
            (Passage("Norway", occurrence=-1), 1),
        ],
    )
    def test_where_words_may_stand(self, tokenizer, mark, number):
        found = empcause.emphasis(tokenizer, CHAT, {mark: 1.0})
        assert pieces(tokenizer, found) == [("Norway", 1.0)] * number

    def test_the_inputs_are_those_of_the_template(self, tokenizer):
        for generate in (True, False):
            options = {"add_generation_prompt": generate}
            inputs, causes = empcause.emphasis(tokenizer, CHAT, {"Norway": 1.0}, template_options=options)
            expected = tokenizer.apply_chat_template(CHAT, return_tensors="pt", return_dict=True, **options)
            assert torch.equal(inputs["input_ids"], expected["input_ids"])
            assert causes.shape == inputs["input_ids"].shape

    def test_what_the_template_adds_is_never_marked(self, tokenizer):
        """The word "user" stands in the content of the first message and in the template's text before others."""
        found = empcause.emphasis(tokenizer, CHAT, {"user": 1.0})
        assert pieces(tokenizer, found) == [("user", 1.0)]
        inputs, causes = found
        first = int(causes[0].nonzero()[0])
        assert tokenizer.decode(inputs["input_ids"][0, :first]).rstrip().endswith("Be kind to the")

    def test_spans_count_the_characters_of_their_message(self, tokenizer):
        """The template trims the spaces before the second message."""
        found = empcause.emphasis(tokenizer, CHAT, {Passage((9, 15), turn=1): 1.0})
        assert pieces(tokenizer, found) == [("Norway", 1.0)]
        found = empcause.emphasis(tokenizer, CHAT, {Passage((0, 3), turn=1): 1.0})  # two of its characters are trimmed
        assert pieces(tokenizer, found) == [("I", 1.0)]
        with pytest.raises(ValueError, match=r"may be in 4 messages; say in which"):
            empcause.emphasis(tokenizer, CHAT, {(9, 15): 1.0})

    def test_a_batch_of_chats(self, tokenizer):
        found = empcause.emphasis(tokenizer, [CHAT, CHAT[:2]], {Passage("Norway", turn=-1): 1.0})
        assert [len(pieces(tokenizer, found, row)) for row in (0, 1)] == [1, 2]

    def test_a_template_that_changes_contents_is_refused(self, tokenizer, monkeypatch):
        monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE.replace("| trim", "| upper"))
        with pytest.raises(ValueError, match="changes the content of message 0"):
            empcause.emphasis(tokenizer, CHAT, {"Norway": 1.0})
        monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m['role'] }}{% endfor %}")
        with pytest.raises(ValueError, match="or leaves it out"):
            empcause.emphasis(tokenizer, CHAT, {"Norway": 1.0})

    def test_messages_need_role_and_content(self, tokenizer):
        for message in (
            {"role": "user"},
            {"content": "a"},
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
        ):
            with pytest.raises(TypeError, match="needs role and content, both texts"):
                empcause.emphasis(tokenizer, [message], {"a": 1.0})


def test_it_steers(tokenizer, tiny_gpt2_dir):
    """More attention to a word changes the logits after it, and only those."""
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2_dir, attn_implementation="empcause").eval()
    inputs, causes = empcause.emphasis(tokenizer, "We moved to Norway again.", {"Norway": 1.0})
    first = int(causes[0].nonzero()[0])
    with torch.no_grad():
        plain = model(**inputs).logits
        with empcause.steer(model, causes):
            steered = model(**inputs).logits
    assert torch.equal(plain[:, :first], steered[:, :first])
    assert not torch.allclose(plain[:, first + 1 :], steered[:, first + 1 :], atol=1e-5)
