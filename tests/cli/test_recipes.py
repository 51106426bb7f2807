"""Every recipe is understood, and says what it is for."""

import importlib
from pathlib import Path

import pytest

from empcause.cli.options import parse_options
from empcause.cli.stages import STAGES
from empcause.training.extractor import ExtractorTrainingArguments
from empcause.training.generator import GeneratorTrainingArguments

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_parses(path, tmp_path):
    (task,) = (each.train for each in STAGES.values() if path.stem.startswith(Path(each.recipe).stem))
    kind = getattr(importlib.import_module(task.module), task.options)
    arguments = ["--config", str(path), "--output_dir", str(tmp_path)]
    options = parse_options(kind, arguments, prog="empcause train", description="")
    assert options.output_dir == str(tmp_path)
    assert path.read_text().startswith("# ")


def test_the_papers_settings():
    folder = RECIPES[0].parent
    extractor = parse_options(
        ExtractorTrainingArguments, ["--config", str(folder / "extractor.yaml")], prog="", description=""
    )
    generator = parse_options(
        GeneratorTrainingArguments, ["--config", str(folder / "generator.yaml")], prog="", description=""
    )
    for options, batch, accumulation in ((extractor, 64, 1), (generator, 8, 2)):
        assert options.learning_rate == 2e-5
        assert options.max_grad_norm == 1.0
        assert options.early_stopping_patience == 5
        assert options.lr_scheduler_type == "reduce_lr_on_plateau"
        assert (options.per_device_train_batch_size, options.gradient_accumulation_steps) == (batch, accumulation)
    defaults = ExtractorTrainingArguments(), GeneratorTrainingArguments()
    for default, recipe in zip(defaults, (extractor, generator), strict=True):
        assert default.learning_rate == recipe.learning_rate
        assert default.per_device_train_batch_size == recipe.per_device_train_batch_size
