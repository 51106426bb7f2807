"""Trainings one after another, each by all processes that torchrun has started: `processes.py FOLDER`, which has `jobs.json`.

Each process writes to `texts-RANK.json` how many texts it extracted causes from, one number per call of `extract`.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

import torch

from empcause.extractor import CauseExtractorConfig, extract
from empcause.generator import causes
from empcause.training import extractor
from empcause.training.generator import GeneratorTrainingArguments, train_generator

STAGES = {
    "extractor": (extractor.ExtractorTrainingArguments, extractor.train_extractor),
    "generator": (GeneratorTrainingArguments, train_generator),
}


def counted(numbers):
    """`extract` in batches of four texts; the number of texts of each call is appended to `numbers`."""

    def run(*args, **options):
        found = extract(*args, batch_size=4, **options)
        numbers.append(len(found))
        return found

    return run


def train(stage, options):
    """Train a stage on the embedded sample; with one thread, so that sums are rounded alike, and no dropout in the heads."""
    arguments, function = STAGES[stage]
    torch.set_num_threads(1)
    extractor.CauseExtractorConfig = partial(CauseExtractorConfig, head_dropout=0.0)
    return function(arguments(data="sample", use_cpu=True, disable_tqdm=True, seed=1, **options))


def main(folder):
    numbers = []
    causes.extract = counted(numbers)
    for stage, options in json.loads((folder / "jobs.json").read_text()):
        train(stage, options)
    (folder / f"texts-{os.environ['RANK']}.json").write_text(json.dumps(numbers))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
