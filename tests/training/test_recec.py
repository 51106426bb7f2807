"""RecEC's training on the embedded sample: both stages learn, and resume after a crash to the same result."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from empcause.data import emotion_id, load_dialogues, response_pairs
from empcause.data.batching import PaddedBatchSampler
from empcause.errors import UserError
from empcause.systems.recec import answer_pairs, encode_pair, load_reasoner, load_recec, pair_nll, read_pairs
from empcause.systems.vocabulary import train_word_tokenizer
from empcause.training import recec
from empcause.training.recec import RecECTrainingArguments, load_training_data, train_recec

SIZES = {"hidden_size": 16, "attention_size": 16, "ffn_size": 32, "num_layers": 1}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("EMPCAUSE_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))


def arguments(output_dir, **options):
    defaults = SIZES | {
        "num_train_epochs": 2,
        "reasoner_epochs": 2,
        "learning_rate": 1e-2,
        "reasoner_learning_rate": 1e-2,
        "tokens_per_batch": 512,
        "reasoner_tokens_per_batch": 512,
        "max_train_samples": 48,
        "max_eval_samples": 16,
        "metric_for_best_model": "perplexity",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    return RecECTrainingArguments(output_dir=str(output_dir), data="sample", **(defaults | options))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "recec"
    return folder, train_recec(arguments(folder))


def history(folder):
    return json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]


def losses(folder):
    return [entry["loss"] for entry in history(folder) if "loss" in entry]


class TestBatches:
    LENGTHS = np.random.default_rng(0).integers(5, 80, 203)

    def test_every_item_once_and_never_more_tokens_than_allowed(self):
        sampler = PaddedBatchSampler(self.LENGTHS, 3, 500)
        epochs = []
        for epoch in range(3):
            sampler.set_epoch(epoch)
            epochs.append(list(sampler))
            assert len(epochs[-1]) == len(sampler)
            assert sorted(index for batch in epochs[-1] for index in batch) == list(range(203))
            sizes = [len(batch) * self.LENGTHS[batch].max() for batch in epochs[-1]]
            assert max(sizes) <= 500
            assert np.mean(sizes) > 430
        assert epochs[0] != epochs[1]
        again = PaddedBatchSampler(self.LENGTHS, 3, 500)
        again.set_epoch(1)
        assert list(again) == epochs[1]
        assert list(PaddedBatchSampler(self.LENGTHS, 4, 500)) != epochs[0]

    def test_an_item_that_is_too_long(self, tmp_path):
        assert len(PaddedBatchSampler([], 0, 9)) == 0
        with pytest.raises(ValueError, match="an item has 10 tokens, more than max_tokens = 9"):
            PaddedBatchSampler([10], 0, 9)
        with pytest.raises(UserError, match="a batch has 20 tokens, but a dialogue"):
            train_recec(arguments(tmp_path, reasoner_tokens_per_batch=20))


def test_a_finished_run(trained):
    folder, metrics = trained
    assert set(metrics) == {"perplexity", "nll_per_token", "accuracy"}
    for stage in (folder, folder / "reasoner"):
        names = {path.name for path in stage.iterdir() if path.is_file()}
        assert {"model.safetensors", "config.json", "README.md", "metrics.json", "trainer_state.json"} <= names
        assert not {name for name in names if name.endswith((".bin", ".pt", ".pkl"))}, "no pickles"
        assert len(losses(stage)) == 2 * len({entry["step"] for entry in history(stage) if entry["epoch"] <= 1})
    card = (folder / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "48 of 280 responses, validated on 16 of 91" in card
    assert "per_device_train_batch_size" not in card
    assert str(folder) not in card
    model, tokenizer = load_recec(folder)
    reasoner, own = load_reasoner(folder / "reasoner")
    assert model.emotions == reasoner.emotions
    assert tokenizer.get_vocab() == own.get_vocab()
    assert list(tokenizer.get_vocab().values())[:0] == []
    assert tokenizer.convert_ids_to_tokens(range(6)) == ["<PAD>", "<BOS>", "<EOS>", "<UNK>", "<CLS>", "<SEP>"]
    weights = model.encoder.reasoner.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in reasoner.state_dict().items()), "stage 1 is frozen"
    best = min(entry["eval_perplexity"] for entry in history(folder) if "eval_perplexity" in entry)
    assert metrics["perplexity"] == pytest.approx(best)
    assert model.generation_config.do_sample


@pytest.mark.parametrize(("stage", "step"), [("ReasonerTrainer", 5), ("GeneratorTrainer", 6)])
def test_a_crash_in_either_stage_resumes_to_the_same_result(stage, step, trained, tmp_path, monkeypatch):
    whole, metrics = trained
    kind, done = getattr(recec, stage), []
    right = kind.training_step

    def crash(self, *args, **options):
        done.append(1)
        if len(done) == step:
            raise MemoryError
        return right(self, *args, **options)

    steps = len(losses(whole / "reasoner" if stage == "ReasonerTrainer" else whole)) // 2
    assert steps < step < 2 * steps, "the crash is in the second epoch"
    monkeypatch.setattr(kind, "training_step", crash)
    with pytest.raises(MemoryError):
        train_recec(arguments(tmp_path))
    assert not (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "reasoner" / "model.safetensors").exists() == (stage == "GeneratorTrainer")
    with pytest.raises(UserError, match="has an earlier training; --resume_from_checkpoint true goes on with it"):
        train_recec(arguments(tmp_path))
    monkeypatch.setattr(kind, "training_step", right)
    assert train_recec(arguments(tmp_path, resume_from_checkpoint="true")) == metrics
    for place in (".", "reasoner"):
        assert losses(tmp_path / place) == losses(whole / place)
        one, other = (load_file(folder / place / "model.safetensors") for folder in (tmp_path, whole))
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_reasoner_for_several_generators(trained, tmp_path):
    reasoner = str(trained[0] / "reasoner")
    train_recec(arguments(tmp_path / "hard", reasoner=reasoner, gate="hard", decoding="greedy", num_train_epochs=1))
    assert not (tmp_path / "hard" / "reasoner").exists()
    model, _ = load_recec(tmp_path / "hard")
    assert model.config.gate == "hard"
    assert not model.generation_config.do_sample
    with pytest.raises(UserError, match="has causes speaker, this training last; give the same, or leave out reasoner"):
        train_recec(arguments(tmp_path / "other", reasoner=reasoner, causes="last"))
    with pytest.raises(UserError, match="holds a model of type 'recec', not an emotion reasoner"):
        train_recec(arguments(tmp_path / "another", reasoner=str(trained[0])))
    train_recec(arguments(tmp_path / "another", max_steps=1))
    options = {"reasoner": str(tmp_path / "another" / "reasoner"), "gate": "hard", "decoding": "greedy"}
    with pytest.raises(UserError, match="was trained with another reasoner"):
        train_recec(arguments(tmp_path / "hard", resume_from_checkpoint="true", **options))


def test_as_published(tmp_path, monkeypatch):
    """The vocabulary holds the words of all splits, models are chosen on the test split, and the last reasoner is used."""
    args = arguments(tmp_path, published=True, max_eval_samples=None)
    data, corrected = load_training_data(args), load_training_data(arguments(tmp_path))
    test = response_pairs(load_dialogues("test", "sample"))
    assert data.valid == test
    assert set(corrected.valid) <= set(response_pairs(load_dialogues("valid", "sample")))
    words = {
        split: {turn for each in load_dialogues(split, "sample") for turn in each.turns}
        for split in ("train", "valid", "test")
    }
    assert set(data.texts) == set.union(*words.values())
    assert set(corrected.texts) == words["train"]

    figures = iter([0.9, 0.1, 0.1])
    monkeypatch.setattr(recec.ReasonerTrainer, "measure", lambda self, model, dataset: {"accuracy": next(figures)})
    metrics = train_recec(args)
    assert metrics["published_perplexity"] > metrics["perplexity"]
    state = json.loads((tmp_path / "reasoner" / "trainer_state.json").read_text())
    last = tmp_path / "reasoner" / f"checkpoint-{state['global_step']}"
    assert state["best_global_step"] < state["global_step"]
    kept, used = (load_file(folder / "model.safetensors") for folder in (last, tmp_path / "reasoner"))
    assert all(torch.equal(kept[name], used[name]) for name in used)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["published"]
    assert "of the test split, on which models were chosen" in (tmp_path / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    once = {word for turns in words.values() for turn in turns for word in tokenizer.tokenize(turn)}
    assert tokenizer.unk_token not in once


def test_the_published_hard_gate_keeps_no_best_generator(tmp_path):
    assert not arguments(tmp_path, published=True, gate="hard").load_best_model_at_end
    assert arguments(tmp_path, published=True).load_best_model_at_end
    assert arguments(tmp_path, gate="hard").load_best_model_at_end


class Overlap:
    """Stands in for BERTScore: its F falls from call to call."""

    setting = "none"
    figures = (0.9, 0.5, 0.5)

    def __init__(self, model, layer):
        self.calls = 0

    def __call__(self, responses, references):
        assert len(responses) == len(references) == 16
        self.calls += 1
        return np.full((16, 3), self.figures[self.calls - 1])


def test_the_best_bertscore(tmp_path, monkeypatch):
    monkeypatch.setattr(recec, "BertScore", Overlap)
    metrics = train_recec(arguments(tmp_path, metric_for_best_model="bertscore_f"))
    assert metrics["bertscore_f"] == 0.5, "measured once more at the end"
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["best_metric"] == 0.9
    assert state["best_global_step"] < state["global_step"]


def test_causes_of_an_extractor(small_extractor, tmp_path):
    options = {"causes": "extractor", "extractor": str(small_extractor), "num_train_epochs": 1, "reasoner_epochs": 1}
    train_recec(arguments(tmp_path, **options))
    model, _ = load_recec(tmp_path)
    assert model.config.causes == "extractor"


def test_what_does_not_fit_is_said(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(recec.logger, "warning", said.append)
    args = arguments(tmp_path, max_length=12)
    pairs = load_training_data(args).train
    tokenizer = train_word_tokenizer(pairs[0].turns, recec.SPECIAL_TOKENS, min_count=1)
    encoded = recec.encode_pairs(tokenizer, pairs, recec.make_config(args, tokenizer, ("sad",)))
    assert max(len(each) for each in encoded) == 12
    dropped, cut = sum(each.dropped_turns for each in encoded), sum(each.cut_response for each in encoded)
    assert dropped
    assert said == [
        f"{dropped} oldest turns and the ends of {cut} responses of 48 dialogues did not fit into 12 tokens."
    ]


def test_given_word_vectors(trained, tmp_path):
    words = ["the", "you", "sorry"]
    lines = [f"{word} {' '.join([str(number)] * 16)}" for number, word in enumerate(words, 3)]
    (tmp_path / "vectors.txt").write_text("\n".join(lines))
    options = {"embeddings": str(tmp_path / "vectors.txt"), "learning_rate": 0.0, "reasoner_learning_rate": 0.0}
    train_recec(arguments(tmp_path / "recec", **options, num_train_epochs=1, reasoner_epochs=1))
    model, tokenizer = load_recec(tmp_path / "recec")
    for table in (model.encoder.words, model.encoder.reasoner.words):
        rows = table.weight[tokenizer.convert_tokens_to_ids(words)]
        assert rows.tolist() == [[number] * 16 for number in (3, 4, 5)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric_for_best_model": "bertscore_f", "bertscore_model": ""}, "needs bertscore_model; or give perplexity"),
        ({"metric_for_best_model": "accuracy"}, "expected one of bertscore_f, perplexity, nll_per_token"),
        ({"causes": "extractor", "extractor": ""}, "causes extractor needs the folder of an extractor"),
        ({"causes": "all"}, "causes is 'all'; expected one of speaker, last, extractor"),
        ({"gate": "medium"}, "gate is 'medium'; expected one of soft, hard"),
        ({"per_device_train_batch_size": 4}, "as many texts as tokens_per_batch allows"),
        ({"gradient_checkpointing": True}, "too small to need it"),
        ({"dropout": 1.5}, "dropout is 1.5"),
        ({"greater_is_better": True}, "a lower perplexity is better"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_options(options, message, tmp_path):
    with pytest.raises((UserError, ValueError), match=message):
        arguments(tmp_path, **options)


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(RecECTrainingArguments, "world_size", property(lambda self: 2))
    with pytest.raises(UserError, match="RecEC is trained in one process; start the command without torchrun"):
        arguments(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["soft", "hard"])
def test_it_learns_32_pairs_by_heart(gate, tmp_path):
    unwatched = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    sizes = {"hidden_size": 64, "attention_size": 64, "ffn_size": 128, "num_layers": 1, "dropout": 0.0}
    args = arguments(
        tmp_path,
        **(sizes | unwatched),
        gate=gate,
        decoding="greedy",
        max_train_samples=32,
        max_eval_samples=2,
        num_train_epochs=100,
        reasoner_epochs=40,
        tokens_per_batch=4096,
        reasoner_tokens_per_batch=4096,
        label_smoothing_factor=0.0,
        learning_rate=5e-3,
        reasoner_learning_rate=5e-3,
    )
    train_recec(args)
    model, tokenizer = load_recec(tmp_path)
    pairs = load_training_data(args).train
    encoded = [encode_pair(tokenizer, pair, model.config) for pair in pairs]
    nll, tokens = np.array(pair_nll(model, tokenizer, encoded, 32)).sum(0)
    assert nll / tokens < 0.1
    found = [probs.argmax() for probs, _ in read_pairs(model.encoder.reasoner, tokenizer, encoded, 32)]
    assert found == [emotion_id(pair.emotion, model.emotions) for pair in pairs]
    answers = answer_pairs(model, tokenizer, encoded, 32, 60)
    expected = [tokenizer.decode(each.labels, skip_special_tokens=True).strip() for each in encoded]
    assert sum(one == other for one, other in zip(answers, expected, strict=True)) >= 30
