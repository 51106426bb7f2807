"""RecEC: its gates and losses on numbers worked out by hand, what the published code does otherwise, and the system."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from empcause.data import LISTENER, SPEAKER, Causes, Dialogue, load_dialogues, response_pairs, split_words
from empcause.data.sequences import IGNORED
from empcause.errors import UserError
from empcause.evaluation.causes import EvaluateCausesOptions, evaluate_causes
from empcause.evaluation.responses import EvaluateResponsesOptions, evaluate_responses
from empcause.systems import Answers, Reads, ReadsDialogues, Scores, ScoresWords, load_system
from empcause.systems.recec import (
    RecEC,
    RecECConfig,
    RecECGreedy,
    RecECReasoner,
    RecECSystem,
    answer_pairs,
    collate,
    encode_pair,
    pair_nll,
    published_perplexity,
    read_pairs,
    turn_causes,
)
from empcause.systems.recec.modeling import CauseAttention
from empcause.systems.vocabulary import train_word_tokenizer
from empcause.training.recec import SPECIAL_TOKENS

TINY = {"hidden_size": 16, "attention_size": 16, "ffn_size": 32, "num_layers": 1, "dropout": 0.0}


@pytest.fixture(scope="module")
def pairs():
    return response_pairs(load_dialogues("train", "sample"))[:32]


@pytest.fixture(scope="module")
def tokenizer(pairs):
    return train_word_tokenizer([turn for pair in pairs for turn in (*pair.turns, pair.response)], SPECIAL_TOKENS)


def make(tokenizer, **options):
    torch.manual_seed(0)
    return RecEC(RecECConfig(vocab_size=len(tokenizer), **(TINY | options))).eval()


def make_batch(model, tokenizer, pairs):
    encoded = [encode_pair(tokenizer, pair, model.config) for pair in pairs]
    return collate([each.item for each in encoded], tokenizer.pad_token_id)


class TestGates:
    """One query (1, 2) and the states (1, 0), (0, 1), (1, 1), with projections that change nothing."""

    MEMORY = torch.tensor([[[1.0, 0, 1, 0, 0], [0, 1, 0, 1, 0], [1, 1, 0, 0, 1]]])

    def attend(self, gate, causes, published=False):
        """The result, and the weights: what the states' last three numbers, of which each has one, add up to."""
        config = RecECConfig(hidden_size=10, attention_size=5, num_heads=1, dropout=0.0, gate=gate, published=published)
        attention = CauseAttention(config)
        memory = nn.functional.pad(self.MEMORY, (0, 5))
        hidden = nn.functional.pad(torch.tensor([[[1.0, 2.0]]]), (0, 8))
        with torch.no_grad():
            for each in (attention.query, attention.key, attention.value):
                each.weight.zero_()
            # Logits are scaled by the root of 5 features, of which 2 have a part in them.
            attention.query.weight[:2, :2] = torch.eye(2) * (5 / 2) ** 0.5
            attention.key.weight[:2, :2] = torch.eye(2)
            attention.value.weight[:5, :5] = torch.eye(5)
            attention.output.weight.copy_(torch.eye(10, 5))
            result = attention(hidden, memory, torch.tensor([causes]), torch.ones(1, 3, dtype=torch.bool))
        return result[0, 0, :2].tolist(), result[0, 0, 2:5].tolist()

    def test_without_effect(self):
        result, weights = self.attend("soft", [1.0, 1.0, 1.0])
        assert weights == pytest.approx([0.140029, 0.283995, 0.575975], abs=1e-6)
        assert result == pytest.approx([0.716005, 0.859971], abs=1e-6)
        for published in (False, True):
            assert self.attend("hard", [1.0, 1.0, 1.0], published)[0] == pytest.approx(result, abs=1e-6)

    def test_soft(self):
        result, weighted = self.attend("soft", [0.9, 0.1, 0.5])
        assert result == pytest.approx([0.530339, 0.262963], abs=1e-6)
        weights = [weight / p for weight, p in zip(weighted, [0.9, 0.1, 0.5], strict=True)]
        assert weights == pytest.approx([0.318669, 0.194256, 0.487075], abs=1e-6)
        assert self.attend("soft", [0.9, 0.1, 0.5], published=True)[0] == pytest.approx(result, abs=1e-6)

    def test_a_token_without_cause_keeps_its_weight(self):
        _, weighted = self.attend("soft", [1.0, 0.0, 1.0])
        assert weighted[1] == 0
        assert sum(weighted) == pytest.approx(1 - 1 / (1 + np.exp(2**-0.5) + np.exp(3 * 2**-0.5)), abs=1e-6)

    @pytest.mark.parametrize("published", [False, True])
    def test_hard(self, published):
        result, weights = self.attend("hard", [1.0, 0.0, 1.0], published)
        assert weights == pytest.approx([0.195570, 0, 0.804430], abs=1e-6)
        assert result == pytest.approx([1, 0.804430], abs=1e-6)

    def test_hard_without_any_cause(self):
        assert self.attend("hard", [0.0, 0.0, 0.0]) == ([0, 0], [0, 0, 0])
        result, weights = self.attend("hard", [0.0, 0.0, 0.0], published=True)
        assert weights == pytest.approx([1 / 3] * 3, abs=1e-6)
        assert result == pytest.approx([0.666667, 0.666667], abs=1e-6)

    def test_padding(self, tokenizer, pairs):
        """Padding has no effect, but as published where the hard gate leaves no token."""
        for gate, published in (("soft", False), ("hard", False), ("soft", True), ("hard", True)):
            model = make(tokenizer, gate=gate, published=published)
            causes = torch.zeros(1, 4)
            memory, hidden = torch.randn(1, 4, 16), torch.randn(1, 2, 16)
            attention = model.blocks[0].cause_attention.layer
            real = torch.tensor([[True, True, True, False]])
            changed = memory.clone()
            changed[:, 3] = 9
            with torch.no_grad():
                same = torch.equal(attention(hidden, memory, causes, real), attention(hidden, changed, causes, real))
            assert same == (not published or gate == "soft"), (gate, published)


class TestLosses:
    def test_smoothed_words(self):
        """The figure that the published code calls perplexity is not one."""
        config = RecECConfig(**TINY, vocab_size=6, pad_token_id=1)
        model = RecEC(config).eval()
        with torch.no_grad():
            # Every state is (1, 0, ...) behind the last normalisation: the logits are the first column of the words.
            model.norm.weight.zero_()
            model.norm.bias.copy_(torch.eye(16)[0])
            model.encoder.words.weight.zero_()
            model.encoder.words.weight[3, 0] = 1
        labels, ids = torch.tensor([[3, 3]]), torch.tensor([[4, 5, 5]])
        output = model(ids, torch.ones_like(ids), labels=labels, smoothing=0.1)
        assert output.loss.item() == pytest.approx(1.143592, abs=1e-6)
        assert output.token_losses.tolist()[0] == pytest.approx([1.043592] * 2, abs=1e-6)
        assert model(ids, torch.ones_like(ids), labels=labels, num_items_in_batch=4).loss.item() == pytest.approx(
            1.043592 / 2, abs=1e-6
        )

    def test_published_perplexity(self, tokenizer, pairs):
        model = make(tokenizer)
        encoded = [encode_pair(tokenizer, pair, model.config) for pair in pairs[:4]]
        scores = np.array(pair_nll(model, tokenizer, encoded, 4)).sum(0)
        true = np.exp(scores[0] / scores[1])
        assert published_perplexity(model, tokenizer, encoded, 4, 0.0) == pytest.approx(true, rel=1e-5)
        batches = [np.array(pair_nll(model, tokenizer, [each], 1))[0] for each in encoded]
        mean_of_batches = np.exp(np.mean([nll / tokens for nll, tokens in batches]))
        assert published_perplexity(model, tokenizer, encoded, 1, 0.0) == pytest.approx(mean_of_batches, rel=1e-5)
        assert mean_of_batches != pytest.approx(true, rel=1e-5)
        assert published_perplexity(model, tokenizer, encoded, 4, 0.1) != pytest.approx(true, rel=1e-3)

    def test_smoothed_emotions_and_labels_that_do_not_count(self):
        model = RecECReasoner(RecECConfig(**TINY, vocab_size=9, id2label=dict(enumerate("abcd"))).reasoner_config())
        with torch.no_grad():
            for head in (model.emotion_head, model.cause_head):
                head.weight.zero_()
            model.emotion_head.bias.copy_(torch.tensor([2.0, 0, 0, 0]))
        ids = torch.tensor([[4, 5, 6], [4, 5, 0]])
        output = model(
            ids,
            (ids != 0).long(),
            emotion_labels=torch.tensor([0, 0]),
            cause_labels=torch.tensor([[IGNORED, 0, 1], [IGNORED, 1, IGNORED]]),
            smoothing=0.1,
        )
        assert output.emotion_loss.item() == pytest.approx(0.490753, abs=1e-6)
        assert output.cause_loss.item() == pytest.approx(np.log(2), abs=1e-6)
        assert output.loss.item() == pytest.approx(0.490753 + np.log(2), abs=1e-6)
        nothing = torch.full_like(ids, IGNORED)
        assert model(ids, ids.ne(0), torch.tensor([0, 0]), nothing).cause_loss.item() == 0
        with pytest.raises(ValueError, match="cause_labels are needed"):
            model(ids, ids.ne(0), torch.tensor([0, 0]))


class TestPublished:
    """What the published code does otherwise; each part on its own."""

    def test_sizes(self):
        """With the published vocabulary the models have the published numbers of weights, but for those that are never used."""
        model = RecEC(RecECConfig(vocab_size=38622, published=True))
        reasoner = model.encoder.reasoner.num_parameters()
        assert reasoner == 12_211_834
        assert model.num_parameters() - reasoner == 19_406_700 - 900
        assert (
            RecEC(RecECConfig(vocab_size=38622)).encoder.reasoner.num_parameters() - reasoner
            == 1200 * 600 + 1500 + 1200
        )

    def test_words_without_a_vector(self, tokenizer):
        corrected, published = (make(tokenizer, published=published).encoder.reasoner for published in (False, True))
        assert corrected.words.weight.std().item() == pytest.approx(1, rel=0.05)
        assert corrected.words.weight.mean().abs() < 0.05
        assert make(tokenizer).encoder.words.weight.std().item() == pytest.approx(16**-0.5, rel=0.05)
        assert 0 <= published.words.weight.min() < 0.01
        assert 0.99 < published.words.weight.max() < 1

    def test_given_vectors(self, tokenizer):
        ids, vectors = torch.tensor([7, 9]), torch.randn(2, 16)
        for published in (False, True):
            model = make(tokenizer, published=published)
            before = model.encoder.words.weight.detach().clone()
            for each in (model, model.encoder.reasoner):
                each.set_word_vectors(ids, vectors)
            assert torch.equal(model.encoder.reasoner.words.weight[ids], vectors)
            assert torch.equal(model.encoder.words.weight[ids], before[ids] if published else vectors)
            others = [token for token in range(len(before)) if token not in ids]
            assert torch.equal(model.encoder.words.weight[others], before[others])
        limit = (6 / (len(tokenizer) + 16)) ** 0.5
        assert 0.99 * limit < before.abs().max() <= limit

    def test_the_reasoner_knows_no_order(self, tokenizer, pairs):
        for published in (False, True):
            reasoner = make(tokenizer, published=published).encoder.reasoner
            ids = torch.arange(6, 12)[None]
            swapped = ids[:, [0, 1, 3, 2, 4, 5]]
            with torch.no_grad():
                one, other = (reasoner(each, torch.ones_like(each)).emotion_logits for each in (ids, swapped))
            assert torch.allclose(one, other, atol=1e-5) == published

    def test_the_reasoner_in_training(self, tokenizer, pairs):
        for published in (False, True):
            model = make(tokenizer, dropout=0.5, published=published).train()
            assert model.encoder.reasoner.training == published
            assert model.encoder.training
            batch = make_batch(model, tokenizer, pairs[:2])
            one, other = (model(**batch).encoder_outputs.emotion_logits for _ in range(2))
            assert torch.equal(one, other) == (not published)

    def test_the_hard_gate_draws(self, tokenizer, pairs):
        for published in (False, True):
            model = make(tokenizer, gate="hard", published=published)
            batch = make_batch(model, tokenizer, pairs[:8])
            draws = [model(**batch).encoder_outputs.causes for _ in range(4)]
            assert all(torch.equal(draws[0], each) for each in draws) == (not published)
            assert set(draws[0].unique().tolist()) <= {0, 1}
            model.train()
            draws = [model(**batch).encoder_outputs.causes for _ in range(4)]
            assert not all(torch.equal(draws[0], each) for each in draws)
            probs = model.encoder.reasoner(batch["input_ids"], batch["attention_mask"]).cause_logits.softmax(-1)[..., 1]
            mean = torch.stack([model.encoder(**_context(batch)).causes for _ in range(300)]).mean(0)
            assert (mean - probs).abs().max() < 0.15

    def test_special_tokens(self, tokenizer, pairs):
        for published in (False, True):
            ids = encode_pair(tokenizer, pairs[0], RecECConfig(published=published)).input_ids.tolist()
            specials = {ids[0], ids[-1]}
            expected = {tokenizer.unk_token_id} if published else {tokenizer.cls_token_id, tokenizer.sep_token_id}
            assert specials == expected


def _context(batch):
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


class TestEncoding:
    DIALOGUE = Dialogue(("My cat is ill .", "Oh no !", "Yes"), (SPEAKER, LISTENER, SPEAKER), "Get well <SEP>")

    @pytest.fixture
    def words(self):
        return train_word_tokenizer([*self.DIALOGUE.turns, "get well"], SPECIAL_TOKENS, min_count=1)

    def test_causes_of_turns(self):
        assert turn_causes(self.DIALOGUE, "speaker") == [1, 0, 1]
        assert turn_causes(self.DIALOGUE, "last") == [0, 0, 1]
        assert turn_causes(self.DIALOGUE, "extractor") == [IGNORED] * 3

    def test_a_pair(self, words):
        encoded = encode_pair(words, self.DIALOGUE, RecECConfig())
        shown = words.convert_ids_to_tokens(encoded.input_ids.tolist())
        assert shown == "<CLS> my cat is ill . <SEP> oh no ! <SEP> yes <SEP>".split()
        assert encoded.cause_labels.tolist() == [IGNORED, *[1] * 6, *[0] * 4, 1, 1]
        text = self.DIALOGUE.text
        assert [text[start:end] for start, end in encoded.spans[1:6]] == ["My", "cat", "is", "ill", "."]
        assert text[slice(*encoded.spans[-2])] == "Yes"
        assert encoded.spans[[0, 6, 10, 12]].tolist() == [[0, 0]] * 4
        answer = words.convert_ids_to_tokens(encoded.labels.tolist())
        assert answer == ["get", "well", "<UNK>", "<UNK>", "<UNK>", "<EOS>"], "a turn cannot write a special token"

    def test_what_does_not_fit(self, words):
        encoded = encode_pair(words, self.DIALOGUE, RecECConfig(max_tokens=7))
        assert words.convert_ids_to_tokens(encoded.input_ids.tolist()) == "<CLS> oh no ! <SEP> yes <SEP>".split()
        assert (encoded.dropped_turns, encoded.cut_response) == (1, False)
        assert text_of(words, encode_pair(words, self.DIALOGUE, RecECConfig(max_tokens=3))) == "<CLS> yes <SEP>"
        long = replace(self.DIALOGUE, turns=("My cat is ill .",), roles=(SPEAKER,))
        encoded = encode_pair(words, long, RecECConfig(max_tokens=4))
        assert text_of(words, encoded) == "<CLS> ill . <SEP>"
        assert len(encoded.labels) == 4
        assert encoded.labels[-1] == words.eos_token_id
        assert encoded.cut_response
        with pytest.raises(UserError, match="A dialogue is empty"):
            encode_pair(words, Dialogue((), ()), RecECConfig())

    def test_causes_of_an_extractor(self, words):
        causes = Causes(np.array([[3, 6], [14, 15]]), np.array([0.7, 0.2], np.float32))
        config = RecECConfig(causes="extractor")
        encoded = encode_pair(words, replace(self.DIALOGUE, causes=causes), config)
        assert encoded.cause_probs.tolist() == pytest.approx([0, 0, 0.7, 0, 0, 0.2, *[0] * 7])
        assert set(encoded.cause_labels) == {IGNORED}
        assert encode_pair(words, self.DIALOGUE, config).cause_probs is None
        assert encode_pair(words, replace(self.DIALOGUE, causes=causes), RecECConfig()).cause_probs is None


def text_of(tokenizer, encoded):
    return " ".join(tokenizer.convert_ids_to_tokens(encoded.input_ids.tolist()))


class TestModel:
    def test_what_follows_does_not_count(self, tokenizer, pairs):
        model = make(tokenizer)
        batch = make_batch(model, tokenizer, pairs[:3])
        ids = torch.randint(6, 20, (3, 5))
        changed = ids.clone()
        changed[:, 3:] = 7
        with torch.no_grad():
            one, other = (model(**_context(batch), decoder_input_ids=each).logits for each in (ids, changed))
        assert torch.allclose(one[:, :3], other[:, :3], atol=1e-6)
        assert not torch.allclose(one[:, 3:], other[:, 3:], atol=1e-3)

    @pytest.mark.parametrize("gate", ["soft", "hard"])
    def test_items_do_not_depend_on_their_batch(self, gate, tokenizer, pairs):
        model = make(tokenizer, gate=gate)
        encoded = [encode_pair(tokenizer, pair, model.config) for pair in pairs[:6]]
        together, alone = (np.array(pair_nll(model, tokenizer, encoded, size)) for size in (6, 1))
        np.testing.assert_allclose(together, alone, rtol=1e-5)
        assert together[:, 1].tolist() == [len(each.labels) for each in encoded]
        model.answer_greedily()
        answers = [answer_pairs(model, tokenizer, encoded, size, 6) for size in (6, 1)]
        assert answers[0] == answers[1]

    def test_the_reasoner_gets_no_gradient(self, tokenizer, pairs):
        for options in ({}, {"gate": "hard"}, {"published": True}):
            model = make(tokenizer, **options).train()
            assert not any(value.requires_grad for value in model.encoder.reasoner.parameters())
            model.requires_grad_(True)  # as after `from_pretrained`
            model(**make_batch(model, tokenizer, pairs[:4])).loss.backward()
            parts = {name: value.grad is not None for name, value in model.named_parameters()}
            assert {name for name, has in parts.items() if not has} == {
                name for name in parts if name.startswith("encoder.reasoner.")
            }

    def test_the_emotion_and_the_causes_matter(self, tokenizer, pairs):
        model = make(tokenizer, causes="extractor")
        batch = make_batch(model, tokenizer, pairs[:2])
        probs = torch.rand(batch["input_ids"].shape)
        first = model(**batch, cause_probs=probs).loss
        assert not torch.isclose(first, model(**batch, cause_probs=probs / 2).loss)
        with pytest.raises(ValueError, match="cause_probs are needed"):
            model(**batch)
        with torch.no_grad():
            model.encoder.emotions.weight.neg_()
        assert not torch.isclose(first, model(**batch, cause_probs=probs).loss)

    def test_refusals(self):
        with pytest.raises(UserError, match="hidden_size is 15; positions need an even number"):
            RecECConfig(hidden_size=15)
        with pytest.raises(UserError, match="attention_size is 16; expected a multiple of num_heads"):
            RecECConfig(attention_size=16, num_heads=3)
        with pytest.raises(UserError, match="gate is 'medium'"):
            RecECConfig(gate="medium")
        with pytest.raises(UserError, match="each once"):
            RecECConfig(id2label={1: "sad"})
        model = RecEC(RecECConfig(**TINY, vocab_size=9))
        ids = torch.tensor([[4, 5]])
        with pytest.raises(ValueError, match="decoder_input_ids or labels"):
            model(ids, torch.ones_like(ids))
        with pytest.raises(ValueError, match="attention_mask and one of"):
            model(ids)


@pytest.fixture
def folder(tokenizer, tmp_path):
    """Folder of a system that has learned nothing."""

    def save(**options):
        make(tokenizer, **options).save_pretrained(tmp_path / "recec")
        tokenizer.save_pretrained(tmp_path / "recec")
        return tmp_path / "recec"

    return save


class TestSystem:
    def test_what_it_can_do(self, folder, pairs):
        system = load_system(folder())
        assert isinstance(system, Reads)
        assert isinstance(system, Scores)
        assert isinstance(system, Answers)
        assert system.note == "RecEC with the soft gate and causes from the speaker's turns"
        texts = [pair.text for pair in pairs[:3]]
        words = [split_words(text) for text in texts]
        for reading, of_text in zip(system.read(texts, words, 2), words, strict=True):
            assert reading.emotion_probs.sum() == pytest.approx(1, abs=1e-5)
            assert reading.word_probs.shape == (len(of_text),)
            assert (reading.word_probs > 0).all()
            assert reading.causes is None
        encoded = system.encode(pairs[:3])
        scores = system.score(encoded, 2)
        assert [tokens for _, tokens in scores] == [len(target) for target in system.targets(pairs[:3])]
        assert all(nll > 0 for nll, _ in scores)

    def test_unknown_words_are_told(self, folder):
        system = load_system(folder())
        assert isinstance(system, ScoresWords)
        assert system.vocab_size == len(system.tokenizer)
        (target,) = system.targets([Dialogue(("A xylophone.",), (SPEAKER,), response="xylophone quux")])
        assert target == [system.unknown_id, system.unknown_id, system.tokenizer.eos_token_id]

    def test_turns_matter(self, folder, pairs):
        """Of a dialogue the reasoner reads what it was trained on, with the separators of its turns."""
        system = load_system(folder())
        assert isinstance(system, ReadsDialogues)
        long = [pair for pair in pairs if len(pair.turns) > 1][:2]
        words = [split_words(pair.text) for pair in long]
        dialogues, texts = system.read_dialogues(long, words, 2), system.read([pair.text for pair in long], words, 2)
        for dialogue, text, pair in zip(dialogues, texts, long, strict=True):
            encoded = encode_pair(system.tokenizer, pair, system.model.config)
            ((expected, _),) = read_pairs(system.model.encoder.reasoner, system.tokenizer, [encoded], 1)
            assert dialogue.emotion_probs == pytest.approx(expected, abs=1e-6)
            assert not np.allclose(dialogue.emotion_probs, text.emotion_probs, atol=1e-6)
            assert dialogue.word_probs.shape == text.word_probs.shape

    def test_sampling_and_greedy_answers(self, folder, pairs):
        path = folder()
        sampling, greedy = load_system(path), RecECSystem(path, greedy=True)
        state = torch.random.get_rng_state()
        answers = sampling.answer(pairs, 8, 9)
        assert torch.equal(torch.random.get_rng_state(), state)
        torch.manual_seed(5)
        assert sampling.answer(pairs, 8, 9) == answers
        assert greedy.answer(pairs, 8, 9) != answers
        assert all(len(answer.split()) <= 9 for answer in answers)
        assert sampling.decoding == "by sampling (top-k 3, temperature 0.6, seed 1024)"
        assert greedy.decoding == "greedily"

    def test_a_folder_that_answers_greedily(self, folder, pairs, tmp_path):
        """The same model as its own folder's in all but the replies."""
        path, view = folder(), tmp_path / "view"
        view.mkdir()
        (view / "config.json").write_text(json.dumps({"model_type": "recec_greedy", "recec": "../recec"}))
        system = load_system(view)
        assert isinstance(system, RecECGreedy)
        assert system.folders == {"model": view, "recec": view / "../recec"}
        assert system.decoding == "greedily"
        assert system.answer(pairs, 8, 9) == RecECSystem(path, greedy=True).answer(pairs, 8, 9)
        own = load_system(path)
        assert system.answer(pairs, 8, 9) != own.answer(pairs, 8, 9)
        assert system.score(system.encode(pairs), 8) == own.score(own.encode(pairs), 8)
        (view / "config.json").write_text(json.dumps({"model_type": "recec_greedy", "recec": "../recec", "beams": 2}))
        with pytest.raises(UserError, match="has the entries model_type, recec, beams; expected model_type and recec"):
            load_system(view)
        (view / "config.json").write_text(json.dumps({"model_type": "recec_greedy", "recec": "nowhere"}))
        with pytest.raises(UserError, match="There is no RecEC at"):
            load_system(view)

    def test_greedy_is_kept_in_the_folder(self, tokenizer, tmp_path, pairs):
        model = make(tokenizer)
        model.answer_greedily()
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        assert not load_system(tmp_path).model.generation_config.do_sample

    def test_causes_of_an_extractor(self, folder, small_extractor, pairs):
        path = folder(causes="extractor")
        with pytest.raises(UserError, match="whose causes come from an extractor; give the extractor's folder"):
            load_system(path)
        system = load_system(path, small_extractor)
        assert list(system.folders) == ["model", "extractor"]
        texts = [pair.text for pair in pairs[:2]]
        readings = system.read(texts, [split_words(text) for text in texts], 2)
        own = system.extractor.read(texts, [split_words(text) for text in texts], 2)
        assert [each.word_probs.tolist() for each in readings] == [each.word_probs.tolist() for each in own]
        assert not np.allclose(readings[0].emotion_probs, own[0].emotion_probs)
        with_causes = [replace(pair, causes=each.causes) for pair, each in zip(pairs, readings, strict=False)]
        assert all(nll > 0 for nll, _ in system.score(system.encode(with_causes), 2))
        assert len(system.answer(with_causes, 2, 3)) == 2

    def test_evaluations_on_the_sample(self, folder, tmp_path):
        path = folder(gate="hard")
        options = EvaluateCausesOptions(model=str(path), data="sample", output_dir=str(tmp_path / "causes"))
        figures = evaluate_causes(options)
        assert 0 <= figures["accuracy"] <= 1
        assert 0 < figures["top5_recall"] <= 1
        options = EvaluateResponsesOptions(
            model=str(path), data="sample", output_dir=str(tmp_path / "responses"), max_samples=6, max_new_tokens=5
        )
        figures = evaluate_responses(options)
        assert figures["perplexity"] > 1
        assert 0 <= figures["emotion_accuracy"] <= 1
        report = (tmp_path / "responses" / "report.md").read_text()
        assert "RecEC with the hard gate" in report
        assert "6 generated by sampling (top-k 3" in report

    def test_damaged_and_foreign_folders(self, folder, small_generator):
        path = folder()
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"gate": "medium"}))
        with pytest.raises(UserError, match="gate"):
            load_system(path)
        (path / "config.json").write_text(json.dumps(config | {"published": True}))
        with pytest.raises(UserError, match="cannot be used"):
            load_system(path)
