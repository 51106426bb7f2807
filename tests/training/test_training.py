"""Both stages on the embedded sample: they learn, resume after a kill, and split over processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel, TrainingArguments

from empcause.cli import main
from empcause.data.batching import LengthBatchSampler, TokenBatchSampler
from empcause.errors import UserError
from empcause.outputs import claim
from empcause.training.common import Losses
from empcause.training.extractor import ExtractorTrainingArguments, cause_labels, split_annotations, train_extractor
from empcause.training.folder import find_checkpoint
from empcause.training.generator import GeneratorTrainingArguments, train_generator


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("EMPCAUSE_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))


def extractor_arguments(encoder, output_dir, **options):
    defaults = {"num_train_epochs": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 16, "seed": 1}
    return ExtractorTrainingArguments(
        output_dir=str(output_dir), data="sample", model_name_or_path=str(encoder), **(defaults | options)
    )


@pytest.fixture(scope="module")
def trained_extractor(tiny_encoder_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "extractor"
    metrics = train_extractor(extractor_arguments(tiny_encoder_dir, folder))
    return folder, metrics


def generator_arguments(model, extractor, output_dir, **options):
    defaults = {
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "max_train_samples": 96,
        "max_eval_samples": 24,
        "max_length": 96,
        "logging_steps": 1,
        "seed": 1,
    }
    return GeneratorTrainingArguments(
        output_dir=str(output_dir),
        data="sample",
        model_name_or_path=str(model),
        extractor=str(extractor),
        **(defaults | options),
    )


def losses(folder):
    history = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


class TestBatches:
    def test_every_item_once_phases_in_order_lengths_alike(self):
        lengths = np.random.default_rng(0).integers(5, 80, 103)
        sampler = LengthBatchSampler(lengths, 8, seed=3, phases=[range(20), range(20, 103)])
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert sorted(index for batch in batches for index in batch) == list(range(103))
        assert all(index < 20 for batch in batches[:3] for index in batch)
        assert all(index >= 20 for batch in batches[3:] for index in batch)
        spread = np.mean([np.ptp(lengths[batch]) for batch in batches])
        assert spread < 25

    def test_order_depends_on_seed_and_epoch_alone(self):
        first, second = (LengthBatchSampler([1] * 40, 4, seed=3) for _ in range(2))
        assert list(first) == list(second)
        second.set_epoch(1)
        assert list(first) != list(second)
        second.set_epoch(0)
        assert list(first) == list(second)


class TestBatchesOfTokens:
    LENGTHS = np.random.default_rng(0).integers(5, 80, 203)

    @pytest.mark.parametrize(
        "options", [{"batch_size": 8}, {"max_tokens": 700}], ids=lambda options: next(iter(options))
    )
    def test_every_item_once_and_nearly_the_same_tokens_in_every_epoch(self, options):
        sampler = TokenBatchSampler(self.LENGTHS, 3, **options)
        epochs = []
        for epoch in range(3):
            sampler.set_epoch(epoch)
            epochs.append(list(sampler))
            assert len(epochs[-1]) == len(sampler)
            assert sorted(index for batch in epochs[-1] for index in batch) == list(range(203))
            tokens = [int(self.LENGTHS[batch].sum()) for batch in epochs[-1]]
            assert sorted(tokens) == sorted(sampler.tokens)
            assert sorted(map(len, epochs[-1])) == sorted(sampler.items)
            assert np.ptp(tokens) < 80
        assert {frozenset(batch) for batch in epochs[0]} != {frozenset(batch) for batch in epochs[1]}
        again = TokenBatchSampler(self.LENGTHS, 3, **options)
        again.set_epoch(1)
        assert list(again) == epochs[1]
        assert list(TokenBatchSampler(self.LENGTHS, 4, **options)) != epochs[0]

    def test_as_many_items_as_are_allowed(self):
        sampler = TokenBatchSampler(self.LENGTHS, 3, batch_size=8)
        assert len(sampler) == 26
        assert set(sampler.items) <= {7, 8}
        full = TokenBatchSampler(self.LENGTHS, 3, batch_size=8, drop_last=True)
        assert {len(batch) for batch in full} == set(full.items) == {8}
        assert len(full) == (sampler.items == 8).sum()

    def test_as_many_tokens_as_are_allowed(self):
        sampler = TokenBatchSampler(self.LENGTHS, 3, max_tokens=700)
        assert sampler.tokens.max() <= 700
        assert len(sampler) <= self.LENGTHS.sum() / 700 + 2
        assert set(TokenBatchSampler([9] * 5, 3, max_tokens=9).items) == {1}
        with pytest.raises(ValueError, match="an item has 9 tokens, more than max_tokens = 8"):
            TokenBatchSampler([9], 3, max_tokens=8)


class TestExtractor:
    def test_a_finished_run(self, trained_extractor):
        folder, metrics = trained_extractor
        assert {"accuracy", "top1_recall", "top5_recall", "strict_top3_recall"} <= set(metrics)
        names = {path.name for path in folder.iterdir() if path.is_file()}
        assert {"model.safetensors", "config.json", "README.md", "metrics.json", "trainer_state.json"} <= names
        assert not {name for name in names if name.endswith((".bin", ".pt", ".pkl"))}, "no pickles"
        card = (folder / "README.md").read_text()
        assert "license: apache-2.0" in card
        assert "top5_recall" in card
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        assert any({"cause_loss", "aux_loss", "emotion_loss"} <= set(entry) for entry in history)

    @pytest.mark.parametrize(
        "options",
        [
            {"supervision": "supervised"},
            {"supervision": "unsupervised"},
            {"supervision": "emotion", "cause_from": "attention"},
            {"aux_weight": 0.0, "interleave": True},
            {"aux_form": "literal", "cause_reduction": "sum", "attention_pooling": "max", "automatic_label_start": 1},
        ],
        ids=lambda options: "-".join(map(str, options.values())),
    )
    def test_every_variant_trains(self, options, tiny_encoder_dir, tmp_path):
        unwatched = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
        unwatched |= {"lr_scheduler_type": "constant", "max_steps": 3, "logging_steps": 1}
        arguments = extractor_arguments(tiny_encoder_dir, tmp_path, **unwatched, **options)
        assert 0 <= train_extractor(arguments)["top5_recall"] <= 1
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["cause_from"] == options.get("cause_from", "head")
        history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
        has_cause_loss = any("cause_loss" in entry for entry in history)
        assert has_cause_loss == (options.get("supervision") != "emotion")

    def test_it_learns(self, tiny_encoder_dir, tmp_path):
        arguments = extractor_arguments(
            tiny_encoder_dir,
            tmp_path,
            supervision="supervised",
            num_train_epochs=12,
            learning_rate=3e-3,
            logging_steps=5,
        )
        train_extractor(arguments)
        history = losses(tmp_path)
        assert np.mean(history[-3:]) < 0.8 * np.mean(history[:3])

    def test_the_plateau_scheduler_watches_recall_upwards(self, tiny_encoder_dir, tmp_path):
        arguments = extractor_arguments(tiny_encoder_dir, tmp_path)
        assert arguments.lr_scheduler_kwargs == {"mode": "max", "factor": 0.5, "patience": 1}
        assert generator_arguments("gpt2", "x", tmp_path).lr_scheduler_kwargs["mode"] == "min"

    def test_cause_labels(self):
        offsets = np.array([[0, 0], [0, 2], [2, 5], [6, 9], [0, 0]])
        assert cause_labels(offsets, np.array([[3, 5]])).tolist() == [-100, 0, 1, 0, -100]

    def test_halves_of_the_validation_split(self, real_data, tiny_encoder_dir, tmp_path):
        for stratified in (False, True):
            arguments = ExtractorTrainingArguments(
                output_dir=str(tmp_path),
                data=str(real_data),
                model_name_or_path=str(tiny_encoder_dir),
                stratified_split=stratified,
            )
            first, second = split_annotations(arguments)
            assert len(first) + len(second) == 2247
            assert abs(len(first) - len(second)) < 40
            assert not {each.conv_id for each in first} & {each.conv_id for each in second}


class TestGenerator:
    @pytest.mark.parametrize("family", ["gpt2", "llama"])
    def test_a_finished_run(self, family, tiny_gpt2_dir, tiny_llama_dir, trained_extractor, tmp_path):
        model = {"gpt2": tiny_gpt2_dir, "llama": tiny_llama_dir}[family]
        metrics = train_generator(generator_arguments(model, trained_extractor[0], tmp_path, num_train_epochs=3))
        assert metrics["perplexity"] == pytest.approx(np.exp(metrics["nll_per_token"]))
        history = losses(tmp_path)
        assert history[-1] < history[0]
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["model_type"] == f"empathetic_{family}"
        assert config["gamma"] == 1.0

    def test_gamma_zero_needs_no_extractor(self, tiny_gpt2_dir, tmp_path):
        metrics = train_generator(generator_arguments(tiny_gpt2_dir, "nowhere", tmp_path, gamma=0.0, max_steps=2))
        assert metrics["perplexity"] > 1

    def test_bf16_and_from_nothing(self, tiny_gpt2_dir, trained_extractor, tmp_path):
        arguments = GeneratorTrainingArguments(
            output_dir=str(tmp_path),
            data="sample",
            model_name_or_path=None,
            model_type="gpt2",
            config_overrides="n_embd=32,n_layer=2,n_head=2,n_positions=96",
            tokenizer_name=str(tiny_gpt2_dir),
            extractor=str(trained_extractor[0]),
            max_steps=3,
            bf16=True,
            max_train_samples=48,
            max_eval_samples=8,
        )
        assert train_generator(arguments)["perplexity"] > 1


@pytest.fixture(scope="module")
def silent_gpt2_dir(tiny_gpt2_dir, tmp_path_factory):
    """The tiny GPT-2 without dropout."""
    folder = tmp_path_factory.mktemp("silent_gpt2")
    GPT2LMHeadModel.from_pretrained(tiny_gpt2_dir, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0).save_pretrained(
        folder
    )
    AutoTokenizer.from_pretrained(tiny_gpt2_dir).save_pretrained(folder)
    return folder


class TestPaddingFree:
    def test_a_step_is_that_of_padded_dialogues(self, silent_gpt2_dir, trained_extractor, tmp_path):
        """Sixteen dialogues are one step, however they are batched: loss and norm of the gradient are divided by its labels."""
        packed, budget = {"padding_free": True}, {"tokens_per_step": 2048}
        one, two = {"gradient_accumulation_steps": 1}, {"gradient_accumulation_steps": 2}
        steps = []
        for number, options in enumerate(
            [
                {"padding_free": False} | two,
                packed | two,
                packed | {"per_device_train_batch_size": 16} | one,
                budget | two,
                budget | one,
            ]
        ):
            folder = tmp_path / str(number)
            few = {"max_train_samples": 16, "max_eval_samples": 2, "num_train_epochs": 1}
            train_generator(generator_arguments(silent_gpt2_dir, trained_extractor[0], folder, **few, **options))
            history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
            (step,) = [entry for entry in history if "loss" in entry]
            steps.append([step["loss"], step["grad_norm"]])
        for step in steps[1:]:
            assert step == pytest.approx(steps[0], rel=2e-5)

    def test_compiled_training_has_the_same_losses(self, tiny_gpt2_dir, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.compiler.config, "recompile_limit", 1)
        torch._dynamo.reset()
        options = {"gamma": 0.0, "padding_free": True, "bf16": True, "max_steps": 3, "max_eval_samples": 2}
        train_generator(generator_arguments(tiny_gpt2_dir, "", tmp_path / "plain", **options))
        torch._dynamo.utils.counters.clear()
        options |= {"torch_compile_backend": "eager"}
        train_generator(generator_arguments(tiny_gpt2_dir, "", tmp_path / "compiled", **options))
        assert losses(tmp_path / "compiled") == losses(tmp_path / "plain")
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
        assert not torch._dynamo.utils.counters["graph_break"]
        assert torch.compiler.config.recompile_limit > 1

    def test_defaults_are_those_of_the_device(self, tiny_gpt2_dir, tmp_path, monkeypatch):
        def chosen(**options):
            args = generator_arguments(tiny_gpt2_dir, "nowhere", tmp_path, **options)
            return args.padding_free, args.bf16, args.torch_compile

        args = generator_arguments(tiny_gpt2_dir, "nowhere", tmp_path)
        assert args.optim == "adamw_torch_fused"
        assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (8, 2)
        assert chosen() == (False, False, False)
        assert chosen(tokens_per_step=512) == (True, False, False)
        assert chosen(padding_free=True, bf16=True, torch_compile=True) == (True, True, True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        has_bf16 = [True]
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16[0])
        monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: None)  # it would ask the GPU
        monkeypatch.setattr(TrainingArguments, "device", torch.device("cuda"))
        monkeypatch.setattr(TrainingArguments, "n_gpu", 1)
        monkeypatch.setattr(TrainingArguments, "world_size", 2)
        assert chosen() == (True, True, True)
        assert chosen(fp16=True) == (True, False, True)
        assert chosen(padding_free=False) == (False, True, False)
        assert chosen(bf16=False, torch_compile=False) == (True, False, False)
        assert chosen(neftune_noise_alpha=5.0) == (False, True, False), (
            "the noise would be smaller over packed dialogues"
        )
        assert chosen(use_cpu=True) == (False, False, False)
        has_bf16[0] = False
        assert chosen() == (True, False, True)
        args = generator_arguments(tiny_gpt2_dir, "nowhere", tmp_path, tokens_per_step=4096)
        assert args.tokens_per_batch == 1024, "two processes, two batches each"
        assert args.accelerator_config == {"non_blocking": True}

    def test_the_card_says_how_batches_were_made(self, tiny_gpt2_dir, tmp_path):
        options = {"gamma": 0.0, "tokens_per_step": 2048, "gradient_accumulation_steps": 1, "max_steps": 1}
        train_generator(generator_arguments(tiny_gpt2_dir, "", tmp_path, max_eval_samples=2, **options))
        card = (tmp_path / "README.md").read_text()
        assert "| tokens_per_step | 2048 |" in card
        assert "per_device_train_batch_size" not in card

    def test_a_loss_on_a_gpu_is_read_when_the_next_batch_is_queued(self, monkeypatch):
        happened = []

        class Event:
            def __init__(self, device):
                self.number = len([each for each in happened if each[0] == "copied"])

            def record(self):
                happened.append(("copied", self.number))

            def synchronize(self):
                happened.append(("waited", self.number))

        monkeypatch.setattr(torch, "Event", Event)
        on_gpu = Losses(torch.device("cuda"))
        found = [on_gpu.find_diverged(torch.tensor(loss), step) for step, loss in enumerate([1.0, float("nan"), 1.0])]
        assert found == [None, None, 1]
        assert happened == [("copied", 0), ("copied", 1), ("waited", 0), ("copied", 2), ("waited", 1)]
        assert Losses(torch.device("cpu")).find_diverged(torch.tensor(float("inf")), 4) == 4
        assert Losses(torch.device("cpu")).find_diverged(torch.tensor(1.0), 4) is None


def command(model, extractor, folder, *more):
    return [
        "train", "generator", "--data", "sample", "--model_name_or_path", str(model), "--extractor", str(extractor),
        "--output_dir", str(folder), "--max_train_samples", "96", "--max_eval_samples", "8", "--logging_steps", "1",
        "--seed", "1", "--learning_rate", "1e-3", "--save_strategy", "steps", "--save_steps", "2",
        "--eval_strategy", "steps", "--eval_steps", "2", "--save_total_limit", "20", *more,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "batches", [(), ("--padding_free", "true"), ("--tokens_per_step", "1600")], ids=["padded", "packed", "tokens"]
)
def test_killed_run_resumes_to_the_same_losses(batches, tiny_gpt2_dir, trained_extractor, tmp_path):
    """SIGKILL in the middle, dropout on, an incomplete checkpoint left behind: the losses are those of an unbroken run."""
    extractor = trained_extractor[0]
    options = ("--num_train_epochs", "2", *batches)
    assert main(command(tiny_gpt2_dir, extractor, tmp_path / "whole", *options)) == 0
    expected = losses(tmp_path / "whole")

    broken = tmp_path / "broken"
    process = subprocess.Popen(
        [sys.executable, "-m", "empcause", *command(tiny_gpt2_dir, extractor, broken, *options)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 600  # on a busy machine the imports alone take minutes
    while not (broken / "checkpoint-4" / "trainer_state.json").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (broken / "metrics.json").exists()
    cut = broken / "checkpoint-900"  # a checkpoint whose writing was interrupted
    claim(broken, cut.name)
    cut.mkdir()
    (cut / "trainer_state.json").write_text("{")

    assert main(command(tiny_gpt2_dir, extractor, broken, *options, "--resume_from_checkpoint", "true")) == 0
    assert losses(broken) == expected
    last = f"checkpoint-{len(expected) // 2 * 2}"
    whole, resumed = (
        torch.load(folder / last / "optimizer.pt", weights_only=True)["state"][0]["exp_avg"]
        for folder in (tmp_path / "whole", broken)
    )
    assert torch.equal(whole, resumed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "batches",
    [
        ("--per_device_train_batch_size", "4"),
        ("--per_device_train_batch_size", "4", "--padding_free", "true"),
        ("--tokens_per_step", "1600"),
    ],
    ids=["padded", "packed", "tokens"],
)
def test_two_processes_equal_twice_the_accumulation(batches, silent_gpt2_dir, trained_extractor, tmp_path):
    options = ("--num_train_epochs", "1", *batches)
    single = command(
        silent_gpt2_dir, trained_extractor[0], tmp_path / "one", *options, "--gradient_accumulation_steps", "2"
    )
    assert main(single) == 0
    double = command(
        silent_gpt2_dir, trained_extractor[0], tmp_path / "two", *options, "--gradient_accumulation_steps", "1"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29533"]
    done = subprocess.run(
        [*launcher, "-m", "empcause", *double, "--use_cpu", "true"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-4)


class TestMistakes:
    """Each ends in one clear sentence before any work is done."""

    def say(self, capsys, *arguments):
        assert main(["train", *arguments]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error

    def test_model_path(self, capsys, tmp_path):
        error = self.say(capsys, "extractor", "--data", "sample", "--model_name_or_path", str(tmp_path / "none"))
        assert "does not exist" in error

    def test_missing_extractor(self, capsys, tiny_gpt2_dir, tmp_path):
        error = self.say(
            capsys, "generator", "--data", "sample", "--model_name_or_path", str(tiny_gpt2_dir),
            "--extractor", str(tmp_path / "none"), "--output_dir", str(tmp_path),
        )  # fmt: skip
        assert "There is no extractor at" in error

    def test_family_without_generator(self, capsys, tiny_encoder_dir, tmp_path):
        error = self.say(
            capsys, "generator", "--data", "sample", "--model_name_or_path", str(tiny_encoder_dir), "--gamma", "0",
            "--output_dir", str(tmp_path),
        )  # fmt: skip
        assert "no generator over a model of type 'roberta'" in error

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--supervision", "none"], "supervision"),
            (["--automatic_top_k", "0"], "at least 1"),
            (["--model_name_or_path", ""], "model_type"),
            (["--config_overrides", "n_layer=2"], "leave model_name_or_path empty"),
        ],
    )
    def test_options(self, arguments, message, capsys):
        assert message in self.say(capsys, "extractor", "--data", "sample", *arguments)

    def test_negative_gamma(self, capsys):
        assert "gamma is -1" in self.say(capsys, "generator", "--gamma", "-1")

    def test_truncated_pretrained_weights(self, capsys, tiny_encoder_dir, tmp_path):
        import shutil

        shutil.copytree(tiny_encoder_dir, tmp_path / "cut")
        weights = tmp_path / "cut" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-50])
        options = [
            "--data",
            "sample",
            "--model_name_or_path",
            str(tmp_path / "cut"),
            "--output_dir",
            str(tmp_path / "run"),
        ]
        error = self.say(capsys, "extractor", *options)
        assert "damaged or cut short" in error

    def test_checkpoint_to_resume_from(self, tiny_encoder_dir, tmp_path):
        arguments = extractor_arguments(tiny_encoder_dir, tmp_path, resume_from_checkpoint=str(tmp_path / "none"))
        with pytest.raises(UserError, match="does not exist"):
            find_checkpoint(arguments)
        (tmp_path / "none").mkdir()
        with pytest.raises(UserError, match="cut short"):
            find_checkpoint(arguments)
