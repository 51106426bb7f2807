"""EmpDG's training on the embedded sample: it learns, overfits, and resumes to the same weights."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from empcause.cli import main
from empcause.data import load_dialogues, response_pairs
from empcause.errors import Interrupted, UserError
from empcause.systems import load_system
from empcause.systems.empdg import measure_pairs
from empcause.training import empdg
from empcause.training.common import draw_samples
from empcause.training.empdg import EmpDGTrainingArguments, _pairs, noam, train_empdg

TINY = {"hidden_size": 24, "attention_size": 8, "filter_size": 12}


def arguments(folder, **options):
    defaults = {
        **TINY,
        "emotion_lexicon": str(Path(folder).parent / "words.txt"),
        "max_steps": 8,
        "warmup_steps": 4,
        "eval_steps": 4,
        "save_steps": 4,
        "eval_delay": 0,
        "max_train_samples": 48,
        "max_eval_samples": 12,
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 1,
        "dropout": 0.1,
    }
    return EmpDGTrainingArguments(output_dir=str(folder), data="sample", **(defaults | options))


@pytest.fixture(autouse=True)
def lexicon(tmp_path):
    """A lexicon beside the output folders, in place of vader, which is a package of its own."""
    path = tmp_path / "words.txt"
    path.write_text("happy\nsad\nlost\nafraid\nproud\nangry\ndog\nfriend\n")
    return path


def rates(folder):
    history = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    return [entry["learning_rate"] for entry in history if "loss" in entry]


def test_noam():
    """The published schedule, at the steps that were worked out by hand."""
    share, highest = noam(8000), EmpDGTrainingArguments.learning_rate
    expected = {1: 8.0687e-08, 4000: 3.2275e-04, 8000: 6.4550e-04, 20000: 4.0825e-04}
    for step, rate in expected.items():
        assert highest * share(step - 1) == pytest.approx(rate, rel=1e-4)


def test_it_learns_and_says_what_it_is(tmp_path, lexicon):
    folder = tmp_path / "empdg"
    metrics = train_empdg(arguments(folder, max_steps=12, eval_steps=6, save_steps=6))
    assert set(metrics) == {"perplexity", "nll_per_token", "accuracy"}
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    evaluated = [entry["eval_perplexity"] for entry in history if "eval_perplexity" in entry]
    assert metrics["perplexity"] == pytest.approx(min(evaluated))
    assert evaluated[1] < evaluated[0]
    highest = EmpDGTrainingArguments.learning_rate
    assert rates(folder)[:4] == pytest.approx([highest * share for share in (1 / 4, 2 / 4, 3 / 4, 1)])
    card = (folder / "README.md").read_text()
    assert "Trained from nothing (empdg," in card
    assert "a lexicon of 8 words" in card
    assert str(tmp_path) not in card
    system = load_system(folder)
    assert system.model.config.emotion_words == sorted(lexicon.read_text().split())
    pairs = response_pairs(load_dialogues("valid", "sample"))[:3]
    assert all(isinstance(answer, str) for answer in system.answer(pairs, 2, 5))


def test_a_resumed_run_ends_in_the_same_weights(tmp_path):
    train_empdg(arguments(tmp_path / "whole"))
    whole = load_file(tmp_path / "whole" / "checkpoint-8" / "model.safetensors")
    train_empdg(arguments(tmp_path / "parts", max_steps=4))
    train_empdg(arguments(tmp_path / "parts", resume_from_checkpoint="true"))
    parts = load_file(tmp_path / "parts" / "checkpoint-8" / "model.safetensors")
    assert all(torch.equal(weights, parts[name]) for name, weights in whole.items())
    (tmp_path / "words.txt").write_text("happy\nschool\nmother\nsick\n")
    with pytest.raises(UserError, match="was trained with another set of emotion words"):
        train_empdg(arguments(tmp_path / "parts", resume_from_checkpoint="true", max_steps=9))


def test_accumulated_batches_sum_as_one(tmp_path):
    """The loss is a sum over items, so that two batches of one step weigh as one batch of twice the size."""
    options = {"max_steps": 1, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    options |= {"optim": "sgd", "dropout": 0, "warmup_steps": 1, "learning_rate": 1e-4, "max_train_samples": 16}
    train_empdg(arguments(tmp_path / "one", per_device_train_batch_size=16, **options))
    train_empdg(arguments(tmp_path / "two", per_device_train_batch_size=8, gradient_accumulation_steps=2, **options))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, weights in one.items():
        torch.testing.assert_close(two[name], weights, atol=1e-6, rtol=1e-5)


def test_two_processes_train_as_one(tmp_path):
    """Twenty dialogues are five batches, which two processes cannot share evenly."""
    options = {
        "data": "sample",
        "emotion_lexicon": tmp_path / "words.txt",
        "max_train_samples": 20,
        "max_eval_samples": 2,
    }
    options |= TINY | {"optim": "sgd", "learning_rate": 1e-4, "lr_scheduler_type": "constant", "warmup_steps": 0}
    options |= {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "max_steps": 4}
    options |= {"per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = ["-m", "empcause", "train", "empdg", *words, "--output_dir", str(tmp_path / "two")]
    subprocess.run([*torchrun, *command], check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    words += ["--gradient_accumulation_steps", "2", "--output_dir", str(tmp_path / "one")]
    assert main(["train", "empdg", *words]) == 0
    two, one = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    for name, weights in one.items():
        torch.testing.assert_close(two[name], weights, atol=1e-6, rtol=1e-5)


def adversarial(folder, **options):
    """Options of a training of 4 steps of the generator, 4 of the discriminators and 2 rounds of both."""
    sizes = {"max_steps": 4, "discriminator_steps": 4, "joint_rounds": 2, "joint_eval_rounds": 1, "eval_steps": 2}
    sizes |= {"save_steps": 2, "max_train_samples": 12, "max_eval_samples": 4, "per_device_train_batch_size": 4}
    return arguments(folder, discriminators=True, **(sizes | options))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a whole training with discriminators, and its figures."""
    folder = tmp_path_factory.mktemp("adversarial")
    (folder / "words.txt").write_text("happy\nsad\nlost\nafraid\nproud\nangry\ndog\nfriend\n")
    return folder / "empdg", train_empdg(adversarial(folder / "empdg"))


def weights_of(folder, part=""):
    found = load_file(Path(folder) / "model.safetensors")
    return {name.removeprefix(part): each for name, each in found.items() if name.startswith(part)}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(each, other[name]) for name, each in one.items())


def test_it_is_trained_against_discriminators(trained):
    folder, metrics = trained
    assert set(metrics) == {"perplexity", "nll_per_token", "accuracy"}
    system, first = load_system(folder), load_system(folder / "generator")
    assert system.note.startswith("with discriminators")
    assert first.note.startswith("without discriminators")
    alone, learned = weights_of(folder / "generator"), weights_of(folder)
    assert equal(alone, weights_of(folder / "discriminators", "generator.")), "it stays as it is in the second phase"
    assert not equal(alone, learned)
    part = "discriminators."
    before, after = (weights_of(folder / name, part) for name in ("discriminators", "checkpoint-12"))
    assert before.keys() == after.keys()
    assert not equal(before, after)
    history = json.loads((folder / "trainer_state.json").read_text())
    evaluated = [entry["eval_accuracy"] for entry in history["log_history"] if "eval_accuracy" in entry]
    assert len(evaluated) == 2
    assert metrics["accuracy"] == max(evaluated)
    # After 4 steps alone, the steps 5 to 9 and 10 to 14 of a schedule that is highest at step 4.
    highest = EmpDGTrainingArguments.learning_rate
    steps = [5, 5, 6, 7, 8, 9, 10, 10, 11, 12, 13, 14]
    assert rates(folder) == pytest.approx([highest * (4 / step) ** 0.5 for step in steps])
    card = (folder / "README.md").read_text()
    assert "trained together with its discriminators" in card
    assert "The terms of the lexicon apply" in card


@pytest.mark.parametrize(
    ("stage", "step", "how"),
    [("EmpDGTrainer", 4, "crash"), ("DiscriminatorTrainer", 3, "crash"), ("JointTrainer", 9, "signal")],
)
def test_any_phase_resumes_to_the_same_result(stage, step, how, trained, tmp_path, monkeypatch):
    """It ends at the generator's fourth step, the discriminators' third one, or in the middle of the second round."""
    whole, metrics = trained
    right, done = empdg.EmpDGTrainer.training_step, []

    def end(self, *args, **options):
        done.extend([1] * (type(self).__name__ == stage))
        if len(done) == step and type(self).__name__ == stage:
            if how == "crash":
                raise MemoryError
            os.kill(os.getpid(), signal.SIGTERM)
        return right(self, *args, **options)

    monkeypatch.setattr(empdg.EmpDGTrainer, "training_step", end)
    with pytest.raises(MemoryError if how == "crash" else Interrupted):
        train_empdg(adversarial(tmp_path / "empdg"))
    monkeypatch.setattr(empdg.EmpDGTrainer, "training_step", right)
    assert not (tmp_path / "empdg" / "model.safetensors").exists()
    assert (tmp_path / "empdg" / "generator" / "model.safetensors").exists() == (stage != "EmpDGTrainer")
    assert train_empdg(adversarial(tmp_path / "empdg", resume_from_checkpoint="true")) == metrics
    for name in ("generator", "discriminators", "checkpoint-12", "."):
        assert equal(weights_of(tmp_path / "empdg" / name), weights_of(whole / name))


def test_published_scores_teach_nothing(tmp_path):
    """With scores that are a constant, as published, the generator learns what it does where they have no weight."""
    last = {}
    choices = {"constant": {"adversarial": "constant"}, "none": {"adversarial_weight": 0.0}, "corrected": {}}
    for name, options in choices.items():
        train_empdg(adversarial(tmp_path / name, joint_rounds=1, dropout=0.0, **options))
        last[name] = weights_of(tmp_path / name / "checkpoint-6", "generator.")
    assert equal(last["constant"], last["none"])
    assert not equal(last["constant"], last["corrected"])


def test_published_answers_of_a_batch(trained, tmp_path):
    """As published, the discriminators see answers that go on from another item's words."""
    train_empdg(adversarial(tmp_path / "first", batched_decoding="first", joint_rounds=1))
    assert equal(weights_of(tmp_path / "first" / "generator"), weights_of(trained[0] / "generator"))
    assert not equal(weights_of(tmp_path / "first" / "discriminators"), weights_of(trained[0] / "discriminators"))


def test_numbers_of_responses_that_the_speaker_answers(real_data):
    pairs = {split: _pairs(load_dialogues(split, real_data), "all") for split in ("train", "valid", "test")}
    assert [len(each) for each in pairs.values()] == [40254, 5738, 5259]
    assert [sum(after != "" for _, after in each) for each in pairs.values()] == [24382, 3570, 3167]


@pytest.mark.slow
def test_it_overfits_32_responses(tmp_path):
    options = {"hidden_size": 128, "learning_rate": 2e-3, "warmup_steps": 100, "max_steps": 300, "dropout": 0}
    options |= {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "logging_steps": 50}
    options |= {"max_train_samples": 32, "label_smoothing_factor": 0, "seed": 5}
    train_empdg(arguments(tmp_path / "empdg", **options))
    system = load_system(tmp_path / "empdg")
    pairs = draw_samples(response_pairs(load_dialogues("train", "sample")), 32, 5)
    encoded = system.encode(pairs)
    scores, emotions = measure_pairs(system.model, encoded, 16)
    assert sum(nll for nll, _ in scores) / sum(tokens for _, tokens in scores) < 0.1
    assert [system.emotions[emotion] for emotion in emotions] == [pair.emotion for pair in pairs]
    answers = system.answer(pairs, 16, 60)
    learned = [system.words(each.labels.tolist(), each.unknown) for each in encoded]
    assert sum(answer == response for answer, response in zip(answers, learned, strict=True)) >= 30


def test_published_choices(tmp_path):
    """The published responses are those that a turn of each of the two follows; its vocabulary has the words of all splits."""
    dialogues = load_dialogues("train", "sample")
    chosen, everything = _pairs(dialogues, "empdg"), response_pairs(dialogues)
    turns = {dialogue.conv_id: dialogue.turns for dialogue in dialogues}
    assert [pair for pair, _ in chosen] == [
        pair for pair in everything if len(pair.turns) + 2 < len(turns[pair.conv_id])
    ]
    assert all(after == turns[pair.conv_id][len(pair.turns) + 1] for pair, after in chosen), "the speaker's next turn"
    train_empdg(arguments(tmp_path / "train", max_steps=1))
    train_empdg(arguments(tmp_path / "all", max_steps=1, vocabulary="everything"))
    few, many = (load_system(tmp_path / name).tokenizer for name in ("train", "all"))
    test_words = {word for each in load_dialogues("test", "sample") for word in many.tokenize(each.turns[0])}
    assert test_words <= set(many.get_vocab())
    assert not test_words <= set(few.get_vocab())


def test_numbers_of_the_published_choice(real_data):
    counts = [len(_pairs(load_dialogues(split, real_data), "empdg")) for split in ("train", "valid", "test")]
    assert counts == [20723, 2969, 2712]


def test_word_vectors(tmp_path):
    (tmp_path / "vectors.txt").write_text("the " + " ".join(["2"] * 24) + "\n")
    options = {"learning_rate": 0.0, "max_steps": 1, "embeddings": str(tmp_path / "vectors.txt")}
    train_empdg(arguments(tmp_path / "empdg", **options))
    system = load_system(tmp_path / "empdg")
    assert (system.model.words.weight[system.tokenizer.convert_tokens_to_ids("the")] == 2).all()
    with pytest.raises(UserError, match="has 24 numbers; expected 12"):
        train_empdg(arguments(tmp_path / "other", **options, hidden_size=12))


def test_command(tmp_path, lexicon, capsys):
    words = ["train", "empdg", "--data", "sample", "--output_dir", str(tmp_path / "empdg"), "--max_steps", "1"]
    words += ["--hidden_size", "8", "--attention_size", "4", "--filter_size", "4"]
    recipe = str(Path(__file__).parents[2] / "recipes" / "empdg-published.yaml")
    assert main([*words, "--config", recipe, "--emotion_lexicon", str(lexicon)]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert main([*words, "--overwrite_output_dir", "true", "--emotion_lexicon", str(tmp_path / "nowhere")]) == 2
    assert "The lexicon" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_checkpointing": True}, "EmpDG has one layer"),
        ({"lr_scheduler_kwargs": {"timescale": 3}}, "takes no lr_scheduler_kwargs here"),
        ({"pairs": "some"}, "pairs is 'some'; expected one of all, empdg"),
        ({"dropout": 1.5}, "dropout is 1.5"),
        ({"joint_rounds": 7}, "joint_rounds has no effect without discriminators"),
        ({"adversarial": "constant"}, "adversarial has no effect without discriminators"),
        (
            {"discriminators": True, "adversarial": "no"},
            "adversarial is 'no'; expected one of straight_through, constant",
        ),
        ({"discriminators": True, "warmup_steps": 0}, "give lr_scheduler_type inverse_sqrt and warmup_steps"),
        (
            {"discriminators": True, "lr_scheduler_type": "linear"},
            "give lr_scheduler_type inverse_sqrt and warmup_steps",
        ),
        ({"discriminators": True, "bf16": True}, "leave out bf16 and fp16"),
        ({"discriminators": True, "gradient_accumulation_steps": 2}, "leave out gradient_accumulation_steps"),
        ({"discriminators": True, "resume_from_checkpoint": "checkpoint-2"}, "give resume_from_checkpoint true"),
    ],
)
def test_options_that_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        arguments(tmp_path / "empdg", **options)
