"""The generator: its sequences, roles, causes, losses and answers."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline

from empcause.data import EMPATHETIC_DIALOGUES, Causes, Dialogue
from empcause.data.batching import TokenBatchSampler
from empcause.data.collation import pack_batch, packed_sizes, pad_batch
from empcause.data.sequences import encode_dialogue
from empcause.errors import UserError
from empcause.generator import (
    GENERATORS,
    CauseCache,
    Responder,
    add_separator,
    encode_for,
    generate_responses,
    load_generator,
    response_nll,
)

PAIR = Dialogue(("My dog died.", "I'm sorry.", "He was old."), (0, 1, 0), "Did you have him long?")


@pytest.fixture(params=["gpt2", "llama"])
def generator(request, tiny_gpt2_dir, tiny_llama_dir):
    folder = {"gpt2": tiny_gpt2_dir, "llama": tiny_llama_dir}[request.param]
    config_class, model_class = GENERATORS[request.param]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.sep_token = None
    config = config_class.from_pretrained(folder, gamma=1.0)
    model = model_class.from_pretrained(folder, config=config, attn_implementation="empcause").eval()
    add_separator(model, tokenizer)
    return model, tokenizer


def caused(dialogue, probability=0.9, word="dog"):
    """The dialogue with one word of it as the cause."""
    start = dialogue.text.index(word)
    causes = Causes(np.array([[start, start + len(word)]]), np.array([probability], np.float32))
    return replace(dialogue, causes=causes)


class TestSequence:
    def test_layout(self, generator):
        _, tokenizer = generator
        encoded = encode_dialogue(tokenizer, PAIR, 100)
        separator, end = tokenizer.sep_token_id, tokenizer.eos_token_id
        turns = [tokenizer(turn, add_special_tokens=False)["input_ids"] for turn in PAIR.turns]
        answer = [*tokenizer(PAIR.response, add_special_tokens=False)["input_ids"], end]
        expected = [token for turn in turns for token in [*turn, separator]]
        assert encoded.input_ids.tolist() == expected + answer
        assert encoded.labels.tolist() == [-100] * len(expected) + answer
        roles = [0] * len(turns[0]) + [1] + [1] * len(turns[1]) + [0] + [0] * len(turns[2]) + [1]
        assert encoded.token_type_ids.tolist() == roles + [1] * len(answer)

    def test_spans_refer_to_the_joined_text(self, generator):
        _, tokenizer = generator
        encoded = encode_dialogue(tokenizer, replace(PAIR, response=""), 100)
        pieces = "".join(PAIR.text[start:end] for start, end in encoded.spans)
        assert pieces.replace(" ", "") == PAIR.text.replace(" ", "")
        assert set(encoded.item) == {"input_ids", "token_type_ids"}, (
            "without response no label, without causes no cause"
        )

    def test_oldest_turns_are_dropped(self, generator):
        _, tokenizer = generator
        whole = encode_dialogue(tokenizer, PAIR, 100)
        shorter = encode_dialogue(tokenizer, PAIR, len(whole.input_ids) - 1)
        assert shorter.dropped_turns == 1
        assert len(shorter.input_ids) <= len(whole.input_ids) - 1
        assert PAIR.text[shorter.spans[0][0] :].startswith("I'm sorry")

    def test_one_turn_that_is_too_long_loses_its_beginning(self, generator):
        _, tokenizer = generator
        encoded = encode_dialogue(tokenizer, Dialogue(("one two three four five " * 20 + "end",), (0,), "Yes."), 30)
        assert len(encoded.input_ids) <= 30
        assert "end" in tokenizer.decode(encoded.input_ids)

    def test_empty_context_is_refused(self, generator):
        with pytest.raises(UserError, match="empty"):
            encode_dialogue(generator[1], Dialogue((" ",), (0,), "Yes."), 30)
        with pytest.raises(UserError, match="empty"):
            encode_dialogue(generator[1], Dialogue((), (), "Yes."), 30)


class TestCauses:
    def test_reach_exactly_the_overlapping_tokens(self, generator):
        model, tokenizer = generator
        encoded = encode_for(model, tokenizer, caused(PAIR), 100)
        values = encoded.cause_probs
        marked = "".join(PAIR.text[a:b] for (a, b), value in zip(encoded.spans, values, strict=True) if value)
        assert marked.strip() == "dog"
        assert values.max() == np.float32(0.9)
        assert not values[encoded.labels != -100].any(), "the response has no causes"
        assert not values[encoded.input_ids == tokenizer.sep_token_id].any()

    @pytest.mark.parametrize(("scope", "word", "kept"), [
        ("context", "sorry", True), ("speaker", "sorry", False), ("speaker", "dog", True),
        ("last", "dog", False), ("last", "old", True),
    ])  # fmt: skip
    def test_scopes(self, generator, scope, word, kept):
        model, tokenizer = generator
        model.config.cause_scope = scope
        assert encode_for(model, tokenizer, caused(PAIR, word=word), 100).cause_probs.any() == kept

    @pytest.mark.parametrize(("probability", "expected"), [(0.4, 0.0), (0.6, 1.0)])
    def test_threshold(self, generator, probability, expected):
        model, tokenizer = generator
        model.config.cause_threshold = 0.5
        assert encode_for(model, tokenizer, caused(PAIR, probability), 100).cause_probs.max() == expected

    def test_without_bias_none_are_read(self, generator):
        model, tokenizer = generator
        model.config.gamma = 0.0
        assert encode_for(model, tokenizer, caused(PAIR), 100).cause_probs is None

    def test_computed_once(self, small_extractor, tmp_path, monkeypatch):
        texts = ["My dog died.", "We won!", "My dog died."]
        cache = CauseCache(small_extractor, tmp_path)
        first = cache.get(texts)
        assert len(first) == 3
        again = CauseCache(small_extractor, tmp_path)
        monkeypatch.setattr("empcause.generator.causes.extract", lambda *_, **__: pytest.fail("extracted again"))
        for before, after in zip(first, again.get(texts), strict=True):
            assert np.array_equal(before.spans, after.spans)
            assert np.array_equal(before.probs, after.probs)

    def test_damaged_cache_is_made_again(self, small_extractor, tmp_path):
        cache = CauseCache(small_extractor, tmp_path)
        cache.get(["We won!"])
        cache.path.write_bytes(cache.path.read_bytes()[:50])
        assert len(CauseCache(small_extractor, tmp_path).get(["We won!"])) == 1


class TestModel:
    def test_new_rows_start_neutral(self, generator):
        model, tokenizer = generator
        assert not model.role_embedding.weight.any()
        embeddings = model.get_input_embeddings().weight
        torch.testing.assert_close(embeddings[tokenizer.sep_token_id], embeddings[: tokenizer.sep_token_id].mean(0))

    def test_roles_have_a_matrix_of_their_own(self, generator):
        model, _ = generator
        ids = torch.randint(5, 100, (2, 9))
        roles = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 0, 1]] * 2)
        plain = model(ids).logits
        torch.testing.assert_close(model(ids, token_type_ids=roles).logits, plain)
        with torch.no_grad():
            model.role_embedding.weight[1].normal_()
        changed = model(ids, token_type_ids=roles).logits
        torch.testing.assert_close(changed[:, :3], plain[:, :3])
        assert not torch.allclose(changed[:, 3:], plain[:, 3:], atol=1e-3)
        embeds = model.get_input_embeddings()(ids) + model.role_embedding(roles)
        torch.testing.assert_close(changed, model(inputs_embeds=embeds).logits)

    def test_gamma_zero_is_no_bias(self, generator):
        model, _ = generator
        ids, causes = torch.randint(5, 100, (2, 9)), torch.rand(2, 9)
        plain = model(ids).logits
        assert not torch.allclose(model(ids, cause_probs=causes).logits, plain, atol=1e-5)
        model.config.gamma = 0.0
        torch.testing.assert_close(model(ids, cause_probs=causes).logits, plain)

    def test_causes_need_the_implementation(self, generator):
        model, _ = generator
        model.set_attn_implementation("sdpa")
        with pytest.raises(ValueError, match="which would ignore it"):
            model(torch.randint(5, 100, (1, 4)), cause_probs=torch.rand(1, 4))

    def test_loss_is_the_mean_over_labels(self, generator):
        model, _ = generator
        ids = torch.randint(5, 100, (2, 9))
        labels = ids.clone()
        labels[:, :5] = -100
        output = model(ids, labels=labels)
        logits = model(ids).logits[:, 4:-1].flatten(0, 1)
        torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(logits, ids[:, 5:].flatten()))
        torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=16).loss, output.loss / 2)

    def test_save_and_load(self, generator, tmp_path):
        model, tokenizer = generator
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        loaded, _ = load_generator(tmp_path)
        ids, causes = torch.randint(5, 100, (1, 9)), torch.rand(1, 9)
        torch.testing.assert_close(loaded(ids, cause_probs=causes).logits, model(ids, cause_probs=causes).logits)
        assert loaded.config.gamma == 1.0


class TestContract:
    """What programs that know transformers' causal LMs expect of a model."""

    def test_labels_give_losses_of_tokens_in_place_of_logits(self, generator):
        model, _ = generator
        ids = torch.randint(5, 100, (2, 9))
        labels = ids.masked_fill(torch.rand(2, 9) < 0.4, -100)
        labels[:, 0] = ids[:, 0]
        output = model(ids, labels=labels, smoothing=0.1)
        assert output.logits is None
        logits = torch.nn.functional.pad(model(ids).logits[:, :-1], (0, 0, 1, 0)).transpose(1, 2)
        expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        expected[:, 0] = 0
        torch.testing.assert_close(output.token_losses, expected)
        number = (labels[:, 1:] != -100).sum()
        torch.testing.assert_close(model(ids, labels=labels).loss, expected.sum() / number)
        assert model.train()(ids, labels=labels).token_losses is None
        assert not model.eval()(ids, labels=labels.fill_(-100)).token_losses.any(), "nothing is labelled"

    def test_hidden_states_are_those_without_labels(self, generator):
        model, _ = generator
        ids = torch.randint(5, 100, (2, 9))
        plain = model(ids, output_hidden_states=True)
        labelled = model(ids, labels=ids, output_hidden_states=True)
        assert len(labelled.hidden_states) == model.config.num_hidden_layers + 1
        torch.testing.assert_close(labelled.hidden_states, plain.hidden_states)
        assert model(ids, labels=ids).hidden_states is None

    def test_the_cache_is_read_and_returned(self, generator):
        model, _ = generator
        ids, causes = torch.randint(5, 100, (2, 9)), torch.rand(2, 9)
        whole = model(ids, labels=ids, cause_probs=causes)
        first = model(ids[:, :4], labels=ids[:, :4], cause_probs=causes[:, :4], use_cache=True)
        assert first.past_key_values.get_seq_length() == 4
        rest = model(ids[:, 4:], labels=ids[:, 4:], cause_probs=causes, past_key_values=first.past_key_values)
        assert rest.past_key_values.get_seq_length() == 9
        torch.testing.assert_close(first.token_losses, whole.token_losses[:, :4])
        torch.testing.assert_close(rest.token_losses[:, 1:], whole.token_losses[:, 5:])
        assert model(ids, labels=ids, use_cache=False).past_key_values is None

    def test_tuples(self, generator):
        model, _ = generator
        ids = torch.randint(5, 100, (2, 9))
        options = {"use_cache": False, "output_hidden_states": True}
        for labels in (None, ids):
            tuples = model(ids, labels=labels, return_dict=False, **options)
            assert isinstance(tuples, tuple)
            torch.testing.assert_close(tuples, model(ids, labels=labels, **options).to_tuple())

    def test_the_trainer_evaluates_and_predicts(self, generator, tmp_path):
        model, tokenizer = generator
        other = Dialogue(("Hello you there.",), (0,), "Hi!")
        dialogues = [caused(PAIR), caused(PAIR), caused(other, word="Hello")]
        encoded = [encode_for(model, tokenizer, dialogue, 100) for dialogue in dialogues]
        items = [each.item for each in encoded]
        args = TrainingArguments(str(tmp_path), per_device_eval_batch_size=2, report_to="none", use_cpu=True)
        collate = functools.partial(pad_batch, pad_token_id=tokenizer.pad_token_id)
        trainer = Trainer(model, args, data_collator=collate, eval_dataset=items)
        nll, tokens = response_nll(model, tokenizer, encoded, batch_size=2)
        assert trainer.evaluate()["eval_loss"] > 0
        predictions = trainer.predict(items).predictions
        assert predictions.shape == (3, len(items[0]["input_ids"]))
        assert np.where(predictions == -100, 0, predictions).sum(1) == pytest.approx(nll, rel=1e-5)
        assert ((predictions > 0).sum(1) == tokens).all()

    def test_transformers_finds_and_runs_a_saved_one(self, generator, tmp_path):
        model, tokenizer = generator
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="empcause")
        assert type(loaded) is type(model)
        ids = torch.randint(5, 100, (1, 6))
        inputs = {"token_type_ids": torch.zeros_like(ids), "cause_probs": torch.rand(1, 6), "max_new_tokens": 4}
        assert torch.equal(loaded.generate(ids, **inputs), model.generate(ids, **inputs))
        written = pipeline("text-generation", model=str(tmp_path))("My dog", max_new_tokens=4, do_sample=False)
        assert written[0]["generated_text"].startswith("My dog")


def drawn(number, longest=24):
    """Dialogues of random tokens with roles and causes, each with a response."""
    random = np.random.default_rng(0)
    items = []
    for length in random.integers(2, longest + 1, number):
        ids, answer = random.integers(5, 100, length), np.arange(length) >= random.integers(1, length)
        causes = np.where(answer, 0, random.random(length)).astype(np.float32)
        labels = np.where(answer, ids, -100)
        items.append(
            {"input_ids": ids, "token_type_ids": answer.astype(np.int64), "labels": labels, "cause_probs": causes}
        )
    return items


def packed_batches(items):
    """The items of each batch of eight with the batch that packs them, and the sizes to which batches are padded."""
    lengths = [len(item["input_ids"]) for item in items]
    sampler = TokenBatchSampler(lengths, 0, batch_size=8)
    sizes = packed_sizes(sampler.tokens, sampler.items, max(lengths))
    batches = [[items[index] for index in batch] for batch in sampler]
    return [(batch, pack_batch(batch, 1, sizes)) for batch in batches], sizes


class TestPacked:
    @pytest.mark.parametrize("attention", ["empcause", "eager"])
    def test_losses_and_gradients_are_those_of_padded_dialogues(self, generator, attention):
        model, _ = generator
        model.set_attn_implementation(attention)
        torch.nn.init.normal_(model.role_embedding.weight)
        batches, sizes = packed_batches(drawn(40))
        assert len(sizes.tokens) == 1
        for items, packed in batches:
            padded = pad_batch(items, 1)
            if attention == "eager":  # it finds the sequences in position_ids, and knows no causes
                del padded["cause_probs"], packed["cause_probs"]
            for options in ({}, {"num_items_in_batch": torch.tensor(50), "smoothing": 0.1}):
                results = []
                for batch in (padded, packed):
                    model.zero_grad()
                    output = model(**batch, **options)
                    output.loss.backward()
                    gradients = {name: weights.grad.clone() for name, weights in model.named_parameters()}
                    counted = batch.get("shift_labels", batch["labels"]) != -100
                    counted[:, 0] &= "shift_labels" in batch
                    results.append((output.loss, gradients, output.token_losses[counted]))
                    assert not output.token_losses[~counted].any()
                    assert output.logits is None
                (loss, expected, losses), (packed_loss, got, packed_losses) = results
                torch.testing.assert_close(packed_loss, loss, rtol=1e-6, atol=0)
                torch.testing.assert_close(packed_losses, losses, rtol=1e-5, atol=1e-6)
                for name, gradient in expected.items():
                    close = {"rtol": 0, "atol": 3e-6 * float(gradient.abs().max())}
                    torch.testing.assert_close(got[name], gradient, **close, msg=lambda m, n=name: f"{n}: {m}")

    def test_attention_drops_what_it_drops_in_padded_dialogues(self, generator, monkeypatch):
        model, _ = generator
        draw = torch.randint
        monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: draw(*args, **kwargs).fill_(7))
        model.config.attn_pdrop = model.config.attention_dropout = 0.5
        for module in model.modules():
            for name in ("attn_dropout", "attention_dropout"):
                if hasattr(module, name):
                    setattr(module, name, torch.nn.Dropout(0.5) if name == "attn_dropout" else 0.5)
            if type(module) is torch.nn.Dropout and module.p != 0.5:
                module.p = 0.0
        model.train()
        items, packed = packed_batches(drawn(8))[0][0]
        dropped = model(**pad_batch(items, 1)).loss
        torch.testing.assert_close(model(**packed).loss, dropped)
        assert not torch.allclose(model.eval()(**packed).loss, dropped)

    def test_without_labels_the_logits_are_those_of_each_dialogue(self, generator):
        model, _ = generator
        items, packed = packed_batches(drawn(8))[0][0]
        names = ("labels", "shift_labels", "logits_to_keep")
        logits = model(**{name: value for name, value in packed.items() if name not in names}).logits
        assert logits.shape[1] == packed["input_ids"].shape[1]
        for item, start in zip(items, packed["cu_seq_lens_q"].tolist(), strict=False):
            alone = {name: torch.from_numpy(value)[None] for name, value in item.items() if name != "labels"}
            expected = model(**alone).logits
            torch.testing.assert_close(logits[:, start : start + expected.shape[1]], expected, rtol=1e-4, atol=1e-5)

    def test_kept_positions_and_their_labels_must_agree(self, generator):
        model, _ = generator
        ids = torch.arange(5, 14)[None]
        kept, following = torch.tensor([3, 6]), torch.tensor([[9, 12]])
        expected = model(ids, labels=ids).token_losses[:, [4, 7]]
        torch.testing.assert_close(model(ids, logits_to_keep=kept, shift_labels=following).token_losses, expected)
        shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
        torch.testing.assert_close(model(ids, shift_labels=shifted).loss, model(ids, labels=ids).loss)
        with pytest.raises(
            ValueError, match=r"shift_labels has shape \[1, 2\]; expected \[1, 3\], one per position of"
        ):
            model(ids, logits_to_keep=3, shift_labels=following)
        with pytest.raises(ValueError, match="shift_labels has 4000; expected 0 to"):
            model(ids, logits_to_keep=kept, shift_labels=following.fill_(4000))

    def test_one_graph_for_each_size(self, generator):
        """20 batches in one graph each, without a break, and no shape that depends on values, backwards neither."""
        model, _ = generator
        torch._dynamo.reset()
        graphs = []

        def record(graph, example_inputs):
            graphs.append(graph)
            return make_boxed_func(graph.forward)

        backend = aot_autograd(fw_compiler=record, bw_compiler=record)
        compiled = torch.compile(model.train(), backend=backend, fullgraph=True, dynamic=False)
        model.config.use_cache = False
        batches, sizes = packed_batches(drawn(160))
        shapes = set()
        for _, packed in batches:
            shapes.add((packed["labels"].numel(), packed["shift_labels"].numel()))
            compiled(**packed, num_items_in_batch=torch.tensor(50)).loss.backward()
        assert len(batches) == 20
        assert 1 < len(shapes) <= len(sizes.tokens) * len(sizes.labels)
        assert len(graphs) == 2 * len(shapes), "one forwards, one backwards"
        nodes = [node for graph in graphs for node in graph.graph.nodes]
        called = {str(node.target) for node in nodes}
        assert "empcause_cpu.attention_backward.default" in called
        assert not [
            name for name in called if any(word in name for word in ("nonzero", "scalar_dense", ".item", "masked_s"))
        ]
        shapes = [node.meta["val"].shape for node in nodes if isinstance(node.meta.get("val"), torch.Tensor)]
        assert len(shapes) > 100
        assert all(type(size) is int for shape in shapes for size in shape), "a shape depends on values"


class TestAnswers:
    def test_nll_equals_the_loss(self, generator):
        model, tokenizer = generator
        other = Dialogue(("Hello you there.",), (0,), "Hi!")
        pairs = [caused(pair, word=pair.turns[0][:5]) for pair in (PAIR, other)]
        encoded = [encode_for(model, tokenizer, pair, 100) for pair in pairs]
        nll, tokens = response_nll(model, tokenizer, encoded, batch_size=2)
        for each, total, number in zip(encoded, nll, tokens, strict=True):
            batch = pad_batch([each.item], tokenizer.pad_token_id)
            assert float(model(**batch).loss) == pytest.approx(total / number, rel=1e-4)
            assert number == (each.labels != -100).sum()
        unanswered = encode_for(model, tokenizer, replace(PAIR, response=""), 100)
        with pytest.raises(ValueError, match="has no response"):
            response_nll(model, tokenizer, [*encoded, unanswered])

    def test_batching_and_padding_change_nothing(self, generator):
        model, tokenizer = generator
        dialogues = [
            caused(each) for each in (PAIR, Dialogue(("Hi dog.",), (0,), "?"), Dialogue(PAIR.turns[:1], (0,), "?"))
        ]
        together = generate_responses(model, tokenizer, dialogues, batch_size=3, max_new_tokens=8)
        alone = [generate_responses(model, tokenizer, [each], max_new_tokens=8)[0] for each in dialogues]
        assert together == alone

    def test_generated_tokens_continue_the_listeners_role(self, generator, monkeypatch):
        model, tokenizer = generator
        seen = []
        original = type(model).forward

        @functools.wraps(original)
        def spy(self, *args, **kwargs):
            seen.append((kwargs["token_type_ids"][0].tolist(), kwargs["cause_probs"].shape[1]))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(type(model), "forward", spy)
        generate_responses(model, tokenizer, [caused(PAIR)], max_new_tokens=3, min_new_tokens=3)
        prompt = len(seen[0][0])
        assert seen[0][0][-1] == 1
        assert [roles for roles, _ in seen[1:]] == [[1], [1]]
        assert {number for _, number in seen} == {prompt}, "causes stay at the prompt's length"

    @pytest.mark.parametrize("options", [{"num_beams": 2}, {"do_sample": True, "top_p": 0.8}], ids=str)
    def test_other_decodings(self, generator, options):
        model, tokenizer = generator
        torch.manual_seed(0)
        answers = generate_responses(model, tokenizer, [caused(PAIR)] * 2, max_new_tokens=5, **options)
        assert len(answers) == 2

    def test_responder(self, generator, small_extractor):
        from empcause.extractor import load_extractor

        responder = Responder(*load_extractor(small_extractor), *generator)
        reply = responder(["My dog died.", "I'm sorry.", " He was old. "], max_new_tokens=5)
        assert reply.emotion in EMPATHETIC_DIALOGUES.emotions
        assert 0 < reply.probability <= 1
        assert [word.text for word, _ in reply.causes][:3] == ["My", "dog", "died"]
        assert all(reply.text[word.start : word.end] == word.text for word, _ in reply.causes)
        with pytest.raises(UserError, match="empty"):
            responder(["Hello", " "])


def test_folders_that_are_not_generators(tiny_encoder_dir, tmp_path):
    with pytest.raises(UserError, match="not a generator"):
        load_generator(tiny_encoder_dir)
    with pytest.raises(UserError, match="does not exist"):
        load_generator(tmp_path / "nowhere")
