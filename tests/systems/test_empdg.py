"""EmpDG: its parts against figures worked out by hand, what it reads, and what it does as a system."""

import json

import numpy as np
import pytest
import torch

from empcause.data import LISTENER, SPEAKER, Dialogue, load_dialogues, response_pairs, split_words
from empcause.errors import UserError
from empcause.evaluation.causes import EvaluateCausesOptions, evaluate_causes
from empcause.evaluation.responses import EvaluateResponsesOptions, evaluate_responses
from empcause.metrics import rank_words
from empcause.systems import Answers, ReadsDialogues, ScoresWords, load_system
from empcause.systems.empdg import (
    SPECIAL_TOKENS,
    AdversarialEmpDG,
    AdversarialEmpDGConfig,
    Discriminator,
    EmpDG,
    EmpDGConfig,
    EmpDGSystem,
    Encoder,
    collate,
    copy_weights,
    gradient_penalty,
    mix_copies,
)
from empcause.systems.empdg.modeling import FeedForward, UnbiasedLayerNorm
from empcause.systems.vocabulary import train_word_tokenizer

UNK, PAD, EOS, SOS, USR, SYS, CLS, LAB = range(8)
SIZES = {"hidden_size": 16, "attention_size": 8, "filter_size": 6}
WORDS = ["dog", "happy", "lost", "sad", "scared", "storm", "proud", "friend", "angry"]


def make_tokenizer():
    texts = [turn for dialogue in load_dialogues("train", "sample") for turn in dialogue.turns]
    return train_word_tokenizer(texts, SPECIAL_TOKENS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An EmpDG that has learned nothing."""
    torch.manual_seed(0)
    path, tokenizer = tmp_path_factory.mktemp("empdg"), make_tokenizer()
    EmpDG(EmpDGConfig(vocab_size=len(tokenizer), emotion_words=WORDS, **SIZES)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def system(folder):
    return load_system(folder)


@pytest.fixture(scope="module")
def pairs():
    return response_pairs(load_dialogues("test", "sample"))[:7]


class TestFigures:
    """The acceptance figures of the specification."""

    LOGITS = torch.tensor([[[1.0, 0, 0.5, -1]]])
    CROSS = torch.tensor([[[[0.2, 1, -0.5, 0]], [[0.6, 0.2, 0.1, 0]]]])
    MASK = torch.tensor([[True, True, True, False]])

    @pytest.mark.parametrize(
        ("softmax", "weights", "probs"),
        [
            ("once", (0.360983, 0.440905, 0.198112, 0), (0.331794, 0.122060, 0.368971, 0.044903, 0.132272)),
            ("twice", (0.275490, 0.298412, 0.234084, 0.192014), (0.331794, 0.179664, 0.354115, 0.044903, 0.089524)),
        ],
    )
    def test_pointer(self, softmax, weights, probs):
        """Four words and one outside of the vocabulary, gate 0.7, source 2, 4, 2 and padding; `twice` is as published."""
        found = copy_weights(self.CROSS, self.MASK, softmax)
        torch.testing.assert_close(found, torch.tensor([[weights]]), atol=1e-6, rtol=0)
        mixed = mix_copies(self.LOGITS, torch.tensor([[[0.7]]]), found, torch.tensor([[2, 4, 2, PAD]]), 1)
        torch.testing.assert_close(mixed.exp(), torch.tensor([[probs]]), atol=1e-6, rtol=0)

    def test_layer_norm(self):
        found = UnbiasedLayerNorm(4)(torch.tensor([1.0, 2, 3, 6])).detach()
        expected = torch.tensor([-0.925820, -0.462910, 0, 1.388730])
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)

    @pytest.mark.parametrize("vocab_size", [8, 11191])
    def test_number_of_parameters(self, vocab_size):
        with torch.device("meta"):
            model = EmpDG(EmpDGConfig(vocab_size=vocab_size))
        assert model.num_parameters() == 601 * vocab_size + 768_451

    @pytest.mark.parametrize("vocab_size", [8, 11191])
    def test_number_of_parameters_of_a_discriminator(self, vocab_size):
        with torch.device("meta"):
            model = Discriminator(EmpDGConfig(vocab_size=vocab_size))
        assert sum(weights.numel() for weights in model.parameters()) == 300 * vocab_size + 949_201

    def test_gradient_penalty(self):
        """A linear score with the slope (0.6, 0.8) at each of two steps; the published norm over time alone gives 0.002010."""
        slope = torch.tensor([0.6, 0.8], requires_grad=True)
        found = 0.1 * gradient_penalty(
            lambda states: (states @ slope).sum(1), torch.randn(5, 2, 2), torch.randn(5, 2, 2)
        )
        assert found.item() == pytest.approx(0.017157, abs=5e-7)
        norms = (slope * 2**0.5).detach()
        assert 0.1 * (norms - 1).square().mean().item() == pytest.approx(0.002010, abs=5e-7)
        found.backward()
        assert slope.grad.abs().min() > 0, "the penalty trains what the score depends on"

    @pytest.mark.parametrize(("std", "expected"), [(None, 300**-0.5), (0.01, 0.01)])
    def test_initial_words(self, std, expected):
        model = EmpDG(EmpDGConfig(vocab_size=2000, initial_std=std))
        assert model.words.weight.std().item() == pytest.approx(expected, rel=0.02)
        bound = (6 / (300 + 2000)) ** 0.5
        assert model.head.weight.abs().max().item() == pytest.approx(bound, rel=0.01), "Xavier's uniform rule"


def test_a_relu_ends_the_feed_forward_layers_as_published():
    torch.manual_seed(0)
    states = torch.randn(1, 5, 16)
    for last_relu in (False, True):
        found = FeedForward(EmpDGConfig(**SIZES, ffn_last_relu=last_relu), causal=True)(states)
        assert (found >= 0).all() == last_relu


def test_what_is_read():
    tokenizer = make_tokenizer()
    words = ["i", "the", "my", "you", "?"]
    known = dict(zip(words, tokenizer.convert_tokens_to_ids(words), strict=True))
    assert UNK not in known.values()
    size = len(tokenizer)
    dialogue = Dialogue(
        ("I zorked", "The sad blorp ?", "my sad zorked"),
        (SPEAKER, LISTENER, SPEAKER),
        response="You zorked the grumpf sad",
    )
    sad = tokenizer.convert_tokens_to_ids("sad")
    assert sad != UNK
    (found,) = Encoder(tokenizer, ["sad", "blorp", "i"])([dialogue])
    i, the, my, you, mark = known.values()
    assert found.input_ids.tolist() == [CLS, i, size, the, sad, size + 1, mark, my, sad, size]
    assert found.token_type_ids.tolist() == [CLS, USR, USR, SYS, SYS, SYS, SYS, USR, USR, USR]
    assert found.emotion_ids.tolist() == [LAB, sad, size + 1, sad], (
        "in order, repeated, no stop word, those unknown too"
    )
    assert found.labels.tolist() == [you, size, the, UNK, sad, EOS], "an unknown word of the context can be copied"
    assert found.unknown == ["zorked", "blorp"]
    assert [dialogue.text[start:end] for start, end in found.spans][found.emotion_places[1]] == "blorp"
    assert len(found) == 10 + 6

    batch = collate([found.item(3), Encoder(tokenizer, ())([Dialogue(("i",), (SPEAKER,), "i")])[0].item(4)], PAD)
    assert batch["input_ids"][1].tolist() == [CLS, i] + [PAD] * 8
    assert batch["attention_mask"].sum(1).tolist() == [10, 2]
    assert batch["emotion_ids"][1].tolist() == [LAB, PAD, PAD, PAD]
    assert batch["emotion_mask"].sum(1).tolist() == [4, 1]
    assert batch["labels"][1].tolist() == [i, EOS, -100, -100, -100, -100]
    assert batch["emotion_labels"].tolist() == [3, 4]
    assert batch["extra_words"] == 2


class TestDiscriminators:
    """Two items whose response the speaker answers, one whose response ends the dialogue."""

    @pytest.fixture
    def model(self):
        torch.manual_seed(0)
        return AdversarialEmpDG(AdversarialEmpDGConfig(vocab_size=20, **SIZES)).train()

    @pytest.fixture
    def batch(self):
        """Of the answers, the first has one emotion word, the second none; the word 20 is one outside of the vocabulary."""
        ids = [[CLS, 9, 20, 11], [CLS, 8, 9], [CLS, 10]]
        items = [
            {"input_ids": np.array(row), "token_type_ids": np.array(row[:1] + [USR] * (len(row) - 1)), "extra_words": 1}
            | {"emotion_ids": np.array([LAB, row[-1]]), "labels": np.array([8, 9, 10, EOS]), "emotion_labels": place}
            for place, row in enumerate(ids)
        ]
        return collate(items, PAD) | {
            "answered": torch.tensor([0, 1]),
            "positive_places": torch.tensor([[1, 3], [0, 3]]),
            "feedback": torch.tensor([[12, 13, EOS], [14, EOS, PAD]]),
            "feedback_places": torch.tensor([[0, 2], [1, -1]]),
            "negatives": torch.tensor([[15, 20, EOS], [16, EOS, PAD]]),
            "negative_places": torch.tensor([[1, 2], [1, -1]]),
        }

    @staticmethod
    def gradients(model, batch, **options):
        """Of the loss, for the generator and for the discriminators, as one vector each."""
        torch.manual_seed(1)
        model.zero_grad()
        model(**batch, **options).loss.backward()
        return [
            torch.cat([torch.zeros(1) if each.grad is None else each.grad.flatten() for each in part.parameters()])
            for part in (model.generator, model.discriminators)
        ]

    def test_the_generator_learns_from_the_scores_unless_they_are_a_constant(self, model, batch):
        """The gradient of the scores is what a weight of 1 adds to that of a weight of 0."""
        found = {
            (weight, straight): self.gradients(
                model, batch, generator_learns=True, adversarial_weight=weight, straight_through=straight
            )[0]
            for weight in (0.0, 1.0)
            for straight in (True, False)
        }
        assert torch.equal(found[1, False], found[0, False]), "exactly 0, as published"
        assert not torch.allclose(found[1, True], found[0, True], rtol=1e-3)

    def test_straight_through_changes_no_score(self, model, batch):
        one, other = (
            model(**batch, generator_learns=True, straight_through=straight).loss for straight in (True, False)
        )
        torch.testing.assert_close(one, other)
        assert one != model(**batch, generator_learns=True, adversarial_weight=0.0).loss

    def test_a_better_score_is_a_lower_loss_of_the_generator(self, model, batch):
        before = model(**batch, generator_learns=True).loss
        with torch.no_grad():
            for each in model.discriminators.values():
                each.head.bias += 1
        assert model(**batch, generator_learns=True).loss.item() == pytest.approx(before.item() - 2, abs=1e-3)

    def test_the_discriminators_learn(self, model, batch):
        """They learn to tell answers from responses, and the generator gets no gradient."""
        generator, _ = self.gradients(model, batch, generator_learns=False)
        assert (generator == 0).all()
        rate = torch.optim.Adam(model.discriminators.parameters(), 1e-2)
        losses = []
        for _ in range(20):
            model.zero_grad()
            loss = model(**batch, generator_learns=False).loss
            loss.backward()
            rate.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 1

    def test_both_discriminators_read_what_is_theirs(self, model, batch):
        """The emotional one sees the emotion words alone, of the answers, the responses and the next turns."""
        read = {"semantic": [], "emotional": []}
        for name, each in model.discriminators.items():
            each.embed = lambda ids, probs=None, name=name, right=each.embed: (
                read[name].append(ids.tolist()),
                right(ids, probs),
            )[1]
        model(**batch, generator_learns=False)
        assert read["semantic"] == [
            [[12, 13, EOS], [14, EOS, PAD]],
            [[15, 20, EOS, PAD], [16, EOS, PAD, PAD]],
            [[8, 9, 10, EOS], [8, 9, 10, EOS]],
        ]
        assert read["emotional"] == [
            [[12, EOS], [EOS, PAD]],
            [[20, EOS], [EOS, PAD]],
            [[9, EOS], [8, EOS]],
        ]

    def test_nobody_learns_from_items_without_a_next_turn(self, model, batch):
        names = ("positive_places", "feedback", "feedback_places", "negatives", "negative_places")
        empty = batch | {"answered": torch.tensor([], dtype=torch.int64)}
        empty |= {name: torch.zeros(0, 0, dtype=torch.int64) for name in names}
        assert all((each == 0).all() for each in self.gradients(model, empty, generator_learns=False))
        assert all(each.grad is None for each in model.discriminators.parameters()), "Adam leaves them alone"
        one, other = (
            self.gradients(model, empty, generator_learns=True, adversarial_weight=weight)[0] for weight in (0.0, 1.0)
        )
        assert torch.equal(one, other)

    def test_scores(self, model):
        """Scores outside of learning depend on their own text alone; a batch normalised by itself has one mean score."""
        one: Discriminator = model.discriminators["semantic"]
        states, about = torch.randn(2, 4, 5, 16), torch.randn(2, 4, 16)
        means = [one.score(*each, learning=True).mean() for each in zip(states, about, strict=True)]
        torch.testing.assert_close(*means)
        whole, part = one.score(states[0], about[0]), one.score(states[0, :1], about[0, :1])
        torch.testing.assert_close(whole[:1], part)
        assert whole.mean() != one.score(states[1], about[1]).mean()

    def test_the_last_state_is_that_of_the_last_real_word(self, model):
        one = model.discriminators["semantic"]
        ids = torch.tensor([[9, 10, EOS, PAD, PAD], [9, 10, 11, 12, EOS]])
        torch.testing.assert_close(one.remember(ids)[:1], one.remember(ids[:1, :3]))

    def test_answers_of_a_batch(self, model):
        """Three items are answered as three single ones; as published, all go on from the first one's words."""
        model.eval()
        generator = model.generator
        with torch.no_grad():  # so that each word depends on what was read
            for weights in generator.parameters():
                weights.normal_()
        ids = torch.tensor([[CLS, 9, 12], [CLS, 10, 13], [CLS, 11, 14]])
        mask = torch.ones_like(ids)
        context = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids.clamp(4, 6)}
        context |= {"emotion_ids": torch.tensor([[LAB, 8], [LAB, 15], [LAB, 16]]), "emotion_mask": mask[:, :2]}
        whole = generator.encode(**context)
        own = generator.answer_greedily(whole, 0, 6)
        first = generator.answer_greedily(whole, 0, 6, feed_first=True)
        single = [
            generator.answer_greedily(
                generator.encode(**{name: each[row : row + 1] for name, each in context.items()}), 0, 6
            )
            for row in range(3)
        ]
        for row, alone in enumerate(single):
            assert own[row, : alone.shape[1]].tolist() == alone[0].tolist()
        assert own[0].tolist() == first[0].tolist()
        assert own[1:].tolist() != first[1:].tolist()


class TestModel:
    @pytest.fixture
    def model(self, system):
        return system.model

    @pytest.fixture
    def batch(self, system, pairs):
        return collate([each.item(index) for index, each in enumerate(system.encode(pairs))], PAD)

    def test_probabilities_sum_to_one_and_losses_are_theirs(self, model, batch):
        output = model(**batch)
        probs, labels = output.logits.exp(), batch["labels"]
        torch.testing.assert_close(probs.sum(-1), torch.ones(probs.shape[:2]))
        assert probs.shape[-1] == model.config.vocab_size + batch["extra_words"]
        row, column = 2, 1
        assert output.token_losses[row, column] == -output.logits[row, column, labels[row, column]]
        assert (output.token_losses[labels == -100] == 0).all()
        emotion = torch.nn.functional.cross_entropy(output.emotion_logits, batch["emotion_labels"], reduction="sum")
        torch.testing.assert_close(output.loss, output.token_losses.sum() + emotion)
        assert model(**batch, smoothing=0.1).loss != output.loss

    def test_a_later_word_changes_nothing_before_it(self, model, batch):
        before = model(**batch).logits
        batch["labels"][:, 2] = EOS
        after = model(**batch).logits
        assert torch.equal(before[:, :3], after[:, :3])
        assert not torch.equal(before[:, 3], after[:, 3])

    def test_items_without_labels_do_not_count(self, model, batch):
        whole = model(**batch).loss
        batch["labels"][1:], batch["emotion_labels"][1:] = -100, -100
        alone = {name: value if isinstance(value, int) else value[:1] for name, value in batch.items()}
        torch.testing.assert_close(model(**batch).loss, model(**alone).loss)
        assert whole > model(**batch).loss

    def test_a_word_outside_of_the_vocabulary_learns_to_be_copied(self, model, system):
        """The loss falls with the weight of its place in the source, not with the probability of an unknown word."""
        (pair,) = system.encode([Dialogue(("zorked dog",), (SPEAKER,), "zorked")])
        batch = collate([pair.item()], PAD)
        copied = batch["labels"][0, 0].item()
        assert copied == model.config.vocab_size
        output = model(**batch)
        gradient = torch.autograd.grad(output.token_losses[0, 0], model.gate.bias)[0]
        assert gradient > 0, "a lower gate copies more"

    def test_it_decides_by_emotion(self, model, batch):
        """The decoder starts from the emotion's logits."""
        context = model.encode(**{name: batch[name] for name in (
            "input_ids", "attention_mask", "token_type_ids", "emotion_ids", "emotion_mask")})  # fmt: skip
        given = {"encoder_outputs": context, "extra_words": batch["extra_words"], "labels": batch["labels"]}
        before = model(**given).logits
        context.emotion_logits = context.emotion_logits + 1
        assert not torch.allclose(before, model(**given).logits)


class TestSystem:
    def test_what_it_can_do(self, system, folder):
        assert all(isinstance(system, kind) for kind in (ReadsDialogues, ScoresWords, Answers))
        assert system.folders == {"model": folder}
        assert "emotion words in random order (seed 0)" in system.note
        (target,) = system.targets([Dialogue(("A xylophone.",), (SPEAKER,), response="The xylophone or quux?")])
        assert target.count(system.unknown_id) == target[:-1].count(system.tokenizer.unk_token_id)
        assert target[1] >= system.vocab_size, "an unknown word of the context is copied, and so it is none"
        assert target[3] == system.unknown_id
        assert len(system.emotions) == 32
        system.check_room(10_000)

    def test_a_batch_gives_what_its_items_give_alone(self, system, pairs):
        encoded = system.encode(pairs)
        together = np.array(system.score(encoded, len(pairs)))
        alone = np.array([system.score([each], 1)[0] for each in encoded])
        np.testing.assert_allclose(together, alone, rtol=1e-5)
        answers = system.answer(pairs, len(pairs), 12)
        assert answers == [system.answer([pair], 1, 12)[0] for pair in pairs]
        texts = [pair.text for pair in pairs]
        words = [split_words(text) for text in texts]
        for one, other in zip(system.read(texts, words, 7), system.read(texts, words, 2), strict=True):
            np.testing.assert_allclose(one.emotion_probs, other.emotion_probs, rtol=1e-4)
            np.testing.assert_array_equal(one.word_probs, other.word_probs)

    def test_a_dialogue_is_read_by_its_turns(self, system, pairs):
        """Roles of turns reach the emotion, which is that of the scored and answered context."""
        pair = next(pair for pair in pairs if len(pair.turns) > 1)
        words = split_words(pair.text)
        (turns,) = system.read_dialogues([pair], [words], 1)
        (joined,) = system.read([pair.text], [words], 1)
        batch = collate([system.encode([pair])[0].item()], PAD)
        expected = system.model(**batch).emotion_logits.softmax(-1)[0].detach().numpy()
        np.testing.assert_allclose(turns.emotion_probs, expected, rtol=1e-5)
        assert not np.allclose(joined.emotion_probs, expected, rtol=1e-5)
        np.testing.assert_array_equal(turns.word_probs, joined.word_probs)

    def test_answers_are_the_most_probable_words(self, system, pairs):
        """Written word by word by `forward`, as a check of what `generate` hands on."""
        (encoded,) = system.encode([pairs[0]])
        batch = collate([encoded.item()], PAD)
        said = [SOS]
        while len(said) <= 6 and said[-1] != EOS:
            batch["decoder_input_ids"] = torch.tensor([said])
            batch["labels"] = None
            said.append(system.model(**batch).logits[0, -1].argmax().item())
        assert system.answer([pairs[0]], 1, 6)[0] == system.words(said[1:], encoded.unknown)

    def test_scored_tokens(self, system, pairs):
        targets = system.targets(pairs)
        assert targets == [each.labels.tolist() for each in system.encode(pairs)]
        assert [tokens for _, tokens in system.score(system.encode(pairs), 4)] == [len(each) for each in targets]

    def test_an_answer_ends_and_shows_copied_words(self, system):
        size = len(system.tokenizer)
        the = system.tokenizer.convert_tokens_to_ids("the")
        assert system.words([the, size + 1, UNK, the, EOS, the], ["zorked", "blorp"]) == "the blorp the"


class TestRanking:
    TEXT = "The storm came and my dog got lost, the friend cried"

    def rank(self, folder, tmp_path, **ranking):
        tmp_path.mkdir(exist_ok=True)
        config = {"model_type": "empdg_ranking", "empdg": str(folder)} | ranking
        (tmp_path / "config.json").write_text(json.dumps(config))
        system = load_system(tmp_path)
        words = split_words(self.TEXT)
        (reading,) = system.read([self.TEXT], [words], 1)
        return [words[index].text for index in rank_words([word.text for word in words], reading.word_probs)], system

    def test_emotion_words_alone_are_predicted(self, folder, tmp_path):
        ordered, system = self.rank(folder, tmp_path, ranking="order")
        assert ordered == ["storm", "dog", "lost", "friend"]
        assert "in the order of the text" in system.note
        assert system.folders == {"model": tmp_path, "empdg": folder}
        drawn = [self.rank(folder, tmp_path, ranking_seed=seed)[0] for seed in range(6)]
        assert all(sorted(each) == sorted(ordered) for each in drawn)
        assert len(set(map(tuple, drawn))) > 1
        assert drawn[3] == self.rank(folder, tmp_path, ranking_seed=3)[0]

    def test_filled_with_other_content_words(self, folder, tmp_path):
        found, system = self.rank(folder, tmp_path, ranking="order", fill=True)
        assert found[:4] == ["storm", "dog", "lost", "friend"]
        assert sorted(found[4:]) == ["came", "cried"]
        assert "then other content words in random order" in system.note

    def test_by_attention(self, folder, tmp_path):
        found, system = self.rank(folder, tmp_path, ranking="attention")
        (encoded,) = system.encode([Dialogue((self.TEXT,), (SPEAKER,))])
        batch = collate([encoded.item()], PAD)
        encoder = system.model.emotion_encoder
        _, first = encoder(system.model._embed(batch["emotion_ids"]), batch["emotion_mask"].bool())
        assert first.sum().item() == pytest.approx(1)
        order = first[0, 1:].argsort(descending=True).tolist()
        assert found == [["storm", "dog", "lost", "friend"][place] for place in order]
        assert found != ["storm", "dog", "lost", "friend"], "the test would not notice"

    def test_all_content_words_by_attention(self, folder, tmp_path):
        found, system = self.rank(folder, tmp_path, ranking="context")
        assert sorted(found) == ["came", "cried", "dog", "friend", "lost", "storm"]
        (encoded,) = system.encode([Dialogue((self.TEXT,), (SPEAKER,))])
        batch = collate([encoded.item()], PAD)
        embedded = system.model._embed(batch["input_ids"]) + system.model._embed(batch["token_type_ids"])
        _, first = system.model.context_encoder(embedded, batch["attention_mask"].bool())
        words = [word.text for word in split_words(self.TEXT)]
        ranked = [words[place] for place in first[0, 1:].argsort(descending=True).tolist()]
        assert found == [word for word in ranked if word in found]
        assert "its causes are content words by the attention to them" in system.note
        with pytest.raises(UserError, match="leave out fill"):
            self.rank(folder, tmp_path, ranking="context", fill=True)

    def test_words_of_another_split(self, system):
        """The benchmark's own words need not be those of the vocabulary."""
        words = split_words("lost-and-found")
        joined = [words[0]._replace(text="lost-and-found", end=words[-1].end)]
        (reading,) = system.read(["lost-and-found"], [joined], 1)
        assert reading.word_probs[0] >= 1
        (reading,) = system.read([""], [[]], 1)
        assert reading.word_probs.shape == (0,)

    @pytest.mark.parametrize(
        ("entries", "message"),
        [
            ({"rank": "order"}, "has an entry rank; expected empdg and any of ranking, fill, ranking_seed"),
            ({"ranking": "best"}, "ranking"),
            ({"fill": "yes"}, "fill is 'yes'; expected true or false"),
            ({"ranking_seed": -1}, "ranking_seed is -1"),
            ({"empdg": "nowhere"}, "There is no EmpDG model at"),
        ],
    )
    def test_folders_that_are_no_ranking(self, folder, tmp_path, entries, message):
        with pytest.raises(UserError, match=message):
            self.rank(folder, tmp_path, **entries)


def test_a_tagger_belongs_to_what_the_results_depend_on(folder, tmp_path, monkeypatch):
    system = load_system(folder)
    system.model.config.adjectives = str(tmp_path / "tagger")
    system.model.save_pretrained(tmp_path / "tagged")
    system.tokenizer.save_pretrained(tmp_path / "tagged")
    with pytest.raises(UserError, match=r"spa[cC]y"):
        load_system(tmp_path / "tagged")
    tagged = []
    monkeypatch.setattr(
        "empcause.systems.empdg.system.load_tagger",
        lambda path: tagged.append(path) or (lambda words: [word == "old" for word in words]),
    )
    tagging = load_system(tmp_path / "tagged")
    assert tagged == [str(tmp_path / "tagger")]
    assert tagging.folders == {"model": tmp_path / "tagged", "adjectives": tmp_path / "tagger"}
    dialogue = Dialogue(("an old dog",), (SPEAKER,))
    assert [len(each.encode([dialogue])[0].emotion_places) for each in (system, tagging)] == [1, 2]


def test_evaluations_take_it(folder, tmp_path):
    options = {"model": str(folder), "data": "sample"}
    figures = evaluate_causes(EvaluateCausesOptions(**options, output_dir=str(tmp_path / "causes")))
    assert {"accuracy", "top5_recall"} <= set(figures)
    options |= {"max_samples": 6, "max_generated": 2, "max_new_tokens": 5}
    figures = evaluate_responses(EvaluateResponsesOptions(**options, output_dir=str(tmp_path / "responses")))
    assert {"perplexity", "bits_per_byte", "distinct_1", "emotion_accuracy"} <= set(figures)


@pytest.mark.parametrize(
    "values",
    [{"hidden_size": 15}, {"attention_size": 9}, {"dropout": 2.0}, {"copy_softmax": "never"}, {"ranking": "best"}],
)
def test_configurations_that_are_none(values):
    with pytest.raises((UserError, ValueError), match=next(iter(values))):
        EmpDGConfig(**(SIZES | values))


def test_a_folder_that_holds_something_else(small_generator):
    with pytest.raises(UserError, match="not an EmpDG model"):
        EmpDGSystem(small_generator)
