"""GEE: Bayes' rule on cases worked out by hand, and over tiny language models of both kinds."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from empcause.data import split_words
from empcause.errors import UserError
from empcause.evaluation.causes import EvaluateCausesOptions, evaluate_causes
from empcause.metrics import rank_words
from empcause.systems import Reads, load_system
from empcause.systems.gee import (
    GEE,
    GEEConfig,
    GEESystem,
    Situation,
    _word_values,
    encode_prompt,
    encode_situation,
    exact_odds,
    label_nll,
    language_model_class,
    log_evidence,
    make_item,
    published_odds,
)

TEXTS = ["My dog passed away last week, and the house is silent now.", "We won the final!"]
FEW = ("sad", "joyful", "afraid", "proud", "lonely")


def logs(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def ranks(values):
    return (values.argsort(descending=True).argsort() + 1).tolist()


class TestRules:
    """Probabilities of three words under two and four emotions, whose posteriors were computed by hand."""

    TWO = logs((0.4, 0.3, 0.2), (0.4, 0.05, 0.1))
    FOUR = logs((0.40, 0.30, 0.20), (0.35, 0.20, 0.25), (0.40, 0.05, 0.10), (0.30, 0.02, 0.20))
    JOINT = logs((0.38, 0.30, 0.24))[0]

    @pytest.mark.parametrize(
        ("rule", "evidence", "of_words"),
        [
            ("published", (-1.936381, -2.764683), (0.695996, 0.932142, 0.820752)),
            ("exact", (-4.422849, -6.907755), (0.923077, 0.986301, 0.960000)),
        ],
    )
    def test_two_emotions(self, rule, evidence, of_words):
        found = log_evidence(self.TWO, rule)
        assert found.tolist() == pytest.approx(evidence, abs=1e-6)
        posterior = found.softmax(0)[0].item()
        assert posterior == pytest.approx({"published": 0.695996, "exact": 0.923077}[rule], abs=1e-6)
        odds = exact_odds(self.TWO, found, top=1)
        assert odds.sigmoid().tolist() == pytest.approx(of_words, abs=1e-6)
        assert ranks(odds) == [3, 1, 2]

    def test_the_published_rule(self):
        evidence = log_evidence(self.FOUR, "published")
        assert evidence.tolist() == pytest.approx((-2.629528, -2.734812, -3.457830, -3.628106), abs=1e-6)
        odds = published_odds(self.FOUR, self.JOINT, evidence)
        assert odds.sigmoid().tolist() == pytest.approx((0.716820, 0.951258, 0.795318), abs=1e-6)
        assert ranks(odds) == [3, 1, 2]
        shares = odds.sigmoid().log().softmax(0)
        assert shares.tolist() == pytest.approx((0.290988, 0.386157, 0.322854), abs=1e-6)

    def test_what_the_published_rule_takes_otherwise(self):
        """It flattens the prior, weighs a prompt of two emotions, and leaves out the emotions in the middle."""
        flat, sharp = log_evidence(self.FOUR, "published").softmax(0), log_evidence(self.FOUR, "exact").softmax(0)
        assert flat.max() < 0.4 < 0.5 < sharp.max()
        assert flat.argmax() == sharp.argmax() == 0
        five = torch.cat([self.FOUR, logs((0.38, 0.1, 0.1))])
        evidence = log_evidence(five, "published")
        assert evidence.argsort(descending=True).tolist() == [0, 1, 4, 2, 3]
        changed = five.clone()
        changed[4] += torch.tensor([0.1, -0.1, 0.0])  # of the emotion in the middle; the evidence stays
        assert torch.equal(published_odds(five, self.JOINT, evidence), published_odds(changed, self.JOINT, evidence))
        assert not torch.equal(exact_odds(five, evidence), exact_odds(changed, evidence))
        assert not torch.equal(
            published_odds(five, self.JOINT, evidence), published_odds(five, self.JOINT + 0.1, evidence)
        )

    def test_probabilities_that_are_one_in_float32_keep_their_order(self):
        log_probs = logs((0.9, 0.8, 0.7), (0.9, 0.8, 0.7), (1e-20, 1e-30, 1e-25), (1e-20, 1e-30, 1e-25))
        odds = exact_odds(log_probs, log_evidence(log_probs, "published"))
        assert odds.sigmoid().float().tolist() == [1, 1, 1]
        text = "dogs won finals"
        words = split_words(text)
        situation = Situation(
            np.arange(3), np.ones(3, bool), np.array([(word.start, word.end) for word in words]), False
        )
        values = _word_values(odds, situation, words)
        assert rank_words(text.split(), values) == [1, 2, 0]
        assert values[1] == 1


def test_a_piece_that_spells_a_stop_word_counts_for_its_word():
    """Stop words are filtered by word; "is" within "island" is none."""
    text = "is island"
    situation = Situation(np.arange(4), np.array([1, 1, 1, 0], bool), np.array([(0, 2), (3, 5), (5, 9), (0, 0)]), False)
    words = split_words(text)
    values = _word_values(torch.tensor([2.0, 3.0, 1.0], dtype=torch.float64), situation, words)
    assert values.tolist() == pytest.approx([math.exp(-1), 1])
    assert rank_words(["is", "island"], values) == [1]


@pytest.fixture(scope="module", params=["causal", "seq2seq"])
def base(request, tiny_gpt2_dir, tiny_bart_dir):
    return {"causal": tiny_gpt2_dir, "seq2seq": tiny_bart_dir}[request.param]


def make(base, folder, **options):
    """Save a GEE that has learned nothing."""
    lm = language_model_class(AutoConfig.from_pretrained(base)).from_pretrained(base)
    torch.manual_seed(1)
    with torch.no_grad():
        for weights in lm.parameters():
            weights += 0.3 * torch.randn_like(weights)  # so that emotions and words differ
    GEE(GEEConfig(lm=lm.config.to_dict(), **options), lm).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gee(base, tmp_path_factory):
    """Folder of a GEE of five emotions that has learned nothing."""
    return make(base, tmp_path_factory.mktemp("gee") / "model", emotions=FEW)


class TestConfiguration:
    def test_prompts(self):
        assert GEEConfig().prompt("sad") == "A situation in which somebody feels sad:"
        assert GEEConfig().prompt("sad", "lonely") == "A situation in which somebody feels sad and lonely:"
        published = GEEConfig(emotion_prompt="__{emotion}__")
        assert published.prompt("sad") == "__sad__"
        assert published.prompt("sad", "lonely") == "__sad__ __lonely__"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"emotion_prompt": "A situation:"}, "expected a text with {emotion} in it"),
            ({"emotions": ("sad", "joyful", "afraid")}, "expected at least 4"),
            ({"emotions": (*FEW, "sad")}, "each of them once"),
            ({"rule": "bayes"}, "rule"),
            ({"max_length": 0}, "max_length"),
            ({"lm": {"model_type": "nothing"}}, "lm: "),
        ],
    )
    def test_values_that_mean_nothing(self, options, message):
        with pytest.raises(Exception, match=message):
            GEEConfig(**options)


class TestEncoding:
    def test_a_situation(self, gee, base):
        system = GEESystem(gee)
        config, tokenizer = system.model.config, system.tokenizer
        text = "My dog </s> died."
        situation = encode_situation(config, tokenizer, text)
        pieces = [text[start:end] for start, end in situation.spans[situation.is_piece]]
        assert "".join(pieces).replace(" ", "") == text.replace(" ", "")
        assert situation.ids[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in situation.ids[situation.is_piece], "the text's </s> is spelled out"
        seq2seq = config.lm.is_encoder_decoder
        assert situation.is_piece.tolist() == [not seq2seq] + [True] * (len(situation.ids) - 2) + [False]
        assert not situation.cut
        item = make_item(config, encode_prompt(config, tokenizer, "sad"), situation)
        if seq2seq:
            assert tokenizer.decode(item["input_ids"]) == f"<s>{config.prompt('sad')}</s>"
            assert item["labels"].tolist() == situation.ids.tolist()
        else:
            assert tokenizer.decode(item["input_ids"][: -len(situation.ids)]) == config.prompt("sad")
            assert (
                tokenizer.decode(item["input_ids"]).replace(" ", "").startswith(config.prompt("sad").replace(" ", ""))
            )
            assert item["labels"][-len(situation.ids) :].tolist() == situation.ids.tolist()

    def test_a_long_situation_is_cut(self, base, tmp_path):
        system = GEESystem(make(base, tmp_path / "short", emotions=FEW, max_length=5))
        situation = encode_situation(system.model.config, system.tokenizer, TEXTS[0])
        assert situation.cut
        assert situation.is_piece.sum() == 5
        assert system.tokenizer.eos_token_id not in situation.ids[1:]
        (reading,) = system.read(TEXTS[:1], [split_words(TEXTS[0])], 4)
        assert reading.word_probs[-1] == 0
        assert reading.word_probs[0] > 0


def by_hand(system, text, prompt):
    """Log-probabilities of all tokens of a text, and which are pieces, by one plain call of the language model."""
    lm, tokenizer = system.model.lm, system.tokenizer
    with torch.inference_mode():
        if lm.config.is_encoder_decoder:
            source, target = tokenizer(prompt)["input_ids"], tokenizer(text)["input_ids"]
            before = [lm.config.decoder_start_token_id, *target[:-1]]
            logits = lm(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([before])).logits[0]
        else:
            source, target = tokenizer(prompt)["input_ids"], [*tokenizer(f" {text}")["input_ids"], 2]
            logits = lm(input_ids=torch.tensor([source + target])).logits[0, len(source) - 1 : -1]
    found = logits.double().log_softmax(-1)[range(len(target)), target]
    return found, torch.tensor([token not in (0, 2) for token in target])


class TestReading:
    def test_labels_have_the_likelihood_of_the_language_model(self, gee):
        system = GEESystem(gee)
        config, tokenizer = system.model.config, system.tokenizer
        rows = [(text, emotion) for text in TEXTS for emotion in FEW[:3]]
        items = [
            make_item(config, encode_prompt(config, tokenizer, emotion), encode_situation(config, tokenizer, text))
            for text, emotion in rows
        ]
        for (text, emotion), nll in zip(rows, label_nll(system.model, tokenizer, items, 4), strict=True):
            expected, _ = by_hand(system, text, config.prompt(emotion))
            assert -nll == pytest.approx(expected.numpy(), abs=1e-4)

    @pytest.mark.parametrize("rule", ["published", "exact"])
    @pytest.mark.parametrize("count_ends", [True, False])
    def test_a_reading_is_that_of_the_rule(self, gee, rule, count_ends):
        system = load_system(gee)
        system.model.config.rule, system.model.config.count_ends = rule, count_ends
        words = [split_words(text) for text in TEXTS]
        readings = system.read(TEXTS, words, 3)
        for text, split, reading in zip(TEXTS, words, readings, strict=True):
            rows = [by_hand(system, text, system.model.config.prompt(emotion)) for emotion in FEW]
            every, is_piece = torch.stack([row for row, _ in rows]), rows[0][1]
            pieces = every[:, is_piece]
            evidence = log_evidence(pieces, rule)
            assert reading.emotion_probs == pytest.approx(
                log_evidence(every if count_ends else pieces, rule).softmax(0).numpy(), abs=1e-4
            )
            if rule == "published":
                first, second = evidence.argsort(descending=True)[:2].tolist()
                joint, _ = by_hand(system, text, system.model.config.prompt(FEW[first], FEW[second]))
                odds = published_odds(pieces, joint[is_piece], evidence)
            else:
                odds = exact_odds(pieces, evidence)
            situation = encode_situation(system.model.config, system.tokenizer, text)
            assert reading.word_probs == pytest.approx(_word_values(odds, situation, split), rel=1e-3)
            assert reading.word_probs.max() == 1
            assert reading.word_probs.min() > 0

    def test_the_rules_find_other_causes(self, gee):
        system = load_system(gee)
        words = [split_words(text) for text in TEXTS]
        published = system.read(TEXTS, words, 8)[0].word_probs
        system.model.config.rule = "exact"
        assert not np.allclose(published, system.read(TEXTS, words, 8)[0].word_probs, rtol=0.01)

    def test_an_empty_text_is_read(self, gee):
        (reading,) = load_system(gee).read([""], [[]], 4)
        assert reading.emotion_probs.sum() == pytest.approx(1)
        assert len(reading.word_probs) == 0

    def test_a_model_that_diverged(self, gee):
        system = load_system(gee)
        with torch.no_grad():
            system.model.get_input_embeddings().weight.fill_(float("nan"))
        with pytest.raises(UserError, match="The probabilities of a GEE are not numbers"):
            system.read(TEXTS[:1], [split_words(TEXTS[0])], 4)


def test_it_is_a_system_that_reads(gee):
    system = load_system(gee)
    assert isinstance(system, Reads)
    assert isinstance(system, GEESystem)
    assert system.emotions == FEW
    assert system.note == "causes by Bayes' rule (published)"
    assert system.model.lm.config._attn_implementation == "sdpa"


def test_an_evaluation_on_the_sample(tiny_bart_dir, tmp_path):
    folder = make(tiny_bart_dir, tmp_path / "model")
    options = EvaluateCausesOptions(model=str(folder), data="sample", output_dir=str(tmp_path / "evaluation"))
    figures = evaluate_causes(options)
    assert 0 < figures["top5_recall"] <= 1
    assert 0 <= figures["accuracy"] <= 1
    report = (tmp_path / "evaluation" / "report.md").read_text()
    assert "causes by Bayes' rule (published) on" in report


def test_other_folders_hold_no_gee(tiny_gpt2_dir, tmp_path):
    with pytest.raises(UserError, match="holds a model of type 'gpt2', not an emotion estimator"):
        GEESystem(tiny_gpt2_dir)
    with pytest.raises(UserError, match="`empcause train gee` makes one"):
        GEESystem(tmp_path)
