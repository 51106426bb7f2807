"""Both stages by two processes: the losses, weights, causes and checkpoints are those of one process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from empcause.data.batching import LengthBatchSampler
from empcause.errors import UserError
from empcause.generator import causes
from empcause.training import folder
from empcause.training.filling import FilledBatches, FilledDataset
from training.processes import STAGES, counted, train

SCRIPT = Path(__file__).with_name("processes.py")
DROPOUTS = ("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_probs_dropout_prob", "hidden_dropout_prob")
UNWATCHED = {
    "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "lr_scheduler_type": "constant",
    "early_stopping_patience": 0, "logging_steps": 1, "learning_rate": 1e-3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """As in the processes, where sums are to be rounded alike."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def silent(tiny_encoder_dir, tiny_gpt2_dir, tmp_path_factory):
    """Folders of the tiny encoder and the tiny GPT-2 without dropout, by stage."""
    folders = {}
    for stage, source in (("extractor", tiny_encoder_dir), ("generator", tiny_gpt2_dir)):
        folders[stage] = shutil.copytree(source, tmp_path_factory.mktemp("silent") / stage)
        config = json.loads((folders[stage] / "config.json").read_text())
        (folders[stage] / "config.json").write_text(json.dumps(config | dict.fromkeys(DROPOUTS, 0.0)))
    return folders


@pytest.fixture(scope="module")
def job(silent, small_extractor):
    """Makes a job of `processes.py`: a stage and its options."""

    def make(stage, output_dir, **options):
        given = UNWATCHED | {"model_name_or_path": str(silent[stage]), "output_dir": str(output_dir)}
        if stage == "generator":
            # 20 dialogues are 5 batches, which two processes cannot share evenly.
            given |= {"extractor": str(small_extractor), "max_train_samples": 20, "max_eval_samples": 6}
            given |= {"max_length": 96, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
        return stage, given | options

    return make


def run(place, jobs):
    """Do jobs in a folder by two processes, one after another."""
    (place / "jobs.json").write_text(json.dumps(jobs))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, str(SCRIPT), str(place)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "EMPCAUSE_CACHE_DIR": str(place / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]


def losses(trained):
    """All losses that a training logged, and their parts."""
    history = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    return [
        {name: value for name, value in entry.items() if name.endswith("loss")} for entry in history if "loss" in entry
    ]


def assert_same(together, alone):
    """Losses and weights of two trainings are the same within rounding."""
    ours, theirs = losses(together), losses(alone)
    assert len(ours) == len(theirs) > 1
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    weights = load_file(alone / "model.safetensors")
    found = load_file(together / "model.safetensors")
    assert found.keys() == weights.keys()
    for name, expected in weights.items():
        if name.endswith("key.bias"):
            continue  # softmax does not depend on it: its gradient is rounding, of which the optimiser makes whole steps
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=2e-5, msg=name)


def check(tmp_path, monkeypatch, job, cases):
    """Train each case by two processes, and by one with twice the accumulation; return how many texts each extracted."""
    cases = {name: (stage, options) for name, stage, options in cases}
    run(tmp_path, [job(stage, tmp_path / name, **options) for name, (stage, options) in cases.items()])
    monkeypatch.setenv("EMPCAUSE_CACHE_DIR", str(tmp_path / "cache-alone"))
    numbers = []
    monkeypatch.setattr(causes, "extract", counted(numbers))
    for name, (stage, options) in cases.items():
        twice = {"gradient_accumulation_steps": 2 * options.get("gradient_accumulation_steps", 1)}
        train(*job(stage, tmp_path / f"{name}-alone", **(options | twice)))
        assert_same(tmp_path / name, tmp_path / f"{name}-alone")
    return numbers, [json.loads((tmp_path / f"texts-{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_equal_twice_the_accumulation(tmp_path, monkeypatch, job):
    """The last step of an epoch is not full; causes are extracted once, and are the same bytes."""
    cases = [
        ("extractor", "extractor", {"supervision": "supervised", "num_train_epochs": 2}),
        ("packed", "generator", {"padding_free": True, "num_train_epochs": 2}),
    ]
    (alone,), (first, second) = check(tmp_path, monkeypatch, job, cases)
    assert alone == sum(first) + sum(second)
    assert abs(sum(first) - sum(second)) <= 4, "they share the texts evenly"
    (ours,), (theirs,) = (list((tmp_path / name / "causes").glob("*.npz")) for name in ("cache", "cache-alone"))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
def test_every_kind_of_batch(tmp_path, monkeypatch, job):
    cases = [
        ("mixed", "extractor", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 48}),
        ("sum", "extractor", {"supervision": "supervised", "cause_reduction": "sum", "interleave": True}),
        ("padded", "generator", {"padding_free": False, "label_smoothing_factor": 0.1}),
        ("tokens", "generator", {"padding_free": True, "tokens_per_step": 768, "per_device_train_batch_size": 8}),
    ]
    check(tmp_path, monkeypatch, job, cases)


@pytest.mark.slow
def test_checkpoints(tmp_path, monkeypatch, job, tiny_gpt2_dir):
    """With dropout, two processes resume to the same weights; one process is refused."""
    saved = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2, "model_name_or_path": str(tiny_gpt2_dir)}
    saved |= {"save_total_limit": 20}
    resumed = saved | {"resume_from_checkpoint": str(tmp_path / "whole" / "checkpoint-4")}
    run(
        tmp_path,
        [
            job("generator", tmp_path / "whole", **saved),
            job("generator", tmp_path / "resumed", **resumed),
        ],
    )
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")
    whole, found = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(found[name], weights) for name, weights in whole.items())
    with pytest.raises(UserError, match="was trained with number of processes 2, this run has 1; give the same value"):
        train(*job("generator", tmp_path / "one", **resumed))
    states = [
        torch.load(tmp_path / "whole" / "checkpoint-2" / f"rng_state_{rank}.pth", weights_only=False)
        for rank in range(2)
    ]
    assert not torch.equal(states[0]["cpu"], states[1]["cpu"]), "processes drop out different elements"


class TestSeparateDisks:
    """Nodes that do not share output_dir are noticed, and never train from different checkpoints."""

    def test_processes_that_find_different_checkpoints(self, job, tmp_path, monkeypatch):
        stage, given = job("generator", tmp_path, resume_from_checkpoint="true")
        monkeypatch.setattr(folder, "gather_object", lambda found: [*found, "checkpoint-2"])
        with pytest.raises(UserError, match="find different checkpoints to go on from; give a folder on a file system"):
            folder.find_checkpoint(STAGES[stage][0](**given))

    def test_random_states_on_another_disk(self, tmp_path):
        (tmp_path / "rng_state_0.pth").touch()
        trainer = SimpleNamespace(args=SimpleNamespace(world_size=2, save_only_model=False, output_dir="runs/x"))
        with pytest.raises(UserError, match="runs/x is not the same folder on all nodes; give a folder"):
            folder.CheckpointedTrainer._check_shared(trainer, tmp_path)
        (tmp_path / "rng_state_1.pth").touch()
        folder.CheckpointedTrainer._check_shared(trainer, tmp_path)


class TestFilling:
    @pytest.mark.parametrize(("number", "processes"), [(5, 1), (5, 2), (6, 2), (1, 4), (9, 4)])
    def test_each_process_has_as_many_batches(self, number, processes):
        sampler = LengthBatchSampler([3] * number * 2, 2, seed=1)
        batches = list(FilledBatches(sampler, processes))
        assert len(batches) == len(FilledBatches(sampler, processes)) == -(-number // processes) * processes
        assert batches[:number] == list(sampler)
        assert all(index < 0 for batch in batches[number:] for index in batch)

    def test_fillers_have_no_labels(self):
        items = [
            {"input_ids": np.array([3, 4]), "labels": np.array([3, 4])},
            {"input_ids": np.array([3, 4]), "cause_labels": np.array([0, 1]), "emotion_labels": 7, "automatic": True},
        ]
        filled = FilledDataset(items)
        assert filled[1] is items[1]
        assert filled[~0]["labels"].tolist() == [-100, -100]
        blank = filled[~1]
        assert (blank["cause_labels"].tolist(), int(blank["emotion_labels"])) == ([-100, -100], -100)
        assert blank["automatic"] is False
        assert blank["input_ids"] is items[1]["input_ids"]
