"""What is trained and evaluated: one table behind `empcause train` and `empcause evaluate`."""

import argparse
import importlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """Training or evaluation of a stage. Its module is imported only when the task is run, because that takes seconds.

    Attributes:
        module: name of the module.
        options: name of the dataclass of options in the module; it has a field `output_dir`.
        function: name of the function in the module that takes the options, does the work and returns figures by name.
        description: what `--help` says about it.
        result: what `output_dir` holds afterwards.
    """

    module: str
    options: str
    function: str
    description: str
    result: str


@dataclass(frozen=True)
class Stage:
    """A model that is trained and evaluated.

    Attributes:
        title: what the model is called in help texts.
        purpose: what the model is for.
        recipe: the recipe with the published settings; the names of its variants begin like its own.
        train, evaluate: the two tasks; each field has the name of its command. A system to compare with has no evaluation of its
            own, because those of the two stages of the method take the folder of any system.
    """

    title: str
    purpose: str
    recipe: str
    train: Task
    evaluate: Task | None = None


STAGES = {
    "extractor": Stage(
        title="the emotion cause extractor (stage 1)",
        purpose="stage 1: which words caused the emotion",
        recipe="recipes/extractor.yaml",
        train=Task(
            module="empcause.training.extractor",
            options="ExtractorTrainingArguments",
            function="train_extractor",
            description="Stage 1: train the emotion cause extractor (Algorithm 1).",
            result="extractor",
        ),
        evaluate=Task(
            module="empcause.evaluation.causes",
            options="EvaluateCausesOptions",
            function="evaluate_causes",
            description="Emotion accuracy and cause recall on annotated situations (Tables 5 and 6 of the paper).",
            result="report",
        ),
    ),
    "generator": Stage(
        title="the conversation generator (stage 2)",
        purpose="stage 2: answers that attend to them",
        recipe="recipes/generator.yaml",
        train=Task(
            module="empcause.training.generator",
            options="GeneratorTrainingArguments",
            function="train_generator",
            description="Stage 2: train the empathetic conversation generator (Algorithm 2).",
            result="generator",
        ),
        evaluate=Task(
            module="empcause.evaluation.responses",
            options="EvaluateResponsesOptions",
            function="evaluate_responses",
            description="Perplexity, Distinct, BERTScore and emotion accuracy on dialogues (Table 7 of the paper).",
            result="report",
        ),
    ),
    "empdg": Stage(
        title="EmpDG, a system to compare with",
        purpose="a system to compare with: answers that copy emotion words",
        recipe="recipes/empdg.yaml",
        train=Task(
            module="empcause.training.empdg",
            options="EmpDGTrainingArguments",
            function="train_empdg",
            description="Train EmpDG (Li et al., 2020): its generator, alone or against its discriminators.",
            result="EmpDG",
        ),
    ),
    "gee": Stage(
        title="GEE, a system to compare with",
        purpose="a system to compare with: causes by Bayes' rule",
        recipe="recipes/gee.yaml",
        train=Task(
            module="empcause.training.gee",
            options="GEETrainingArguments",
            function="train_gee",
            description="Train GEE (Kim et al., 2021), a language model of the situations of each emotion.",
            result="GEE",
        ),
    ),
    "recec": Stage(
        title="RecEC, a system to compare with",
        purpose="a system to compare with: answers that attend to the turns of the cause",
        recipe="recipes/recec.yaml",
        train=Task(
            module="empcause.training.recec",
            options="RecECTrainingArguments",
            function="train_recec",
            description="Train RecEC (Gao et al., 2021): an emotion reasoner, and a generator over it.",
            result="RecEC",
        ),
    ),
}


def add_parser(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]",
    command: str,
    help: str,
    description: str,
    arguments_help: str,
) -> None:
    """Add a command to the parser of `empcause`, which runs its task for a stage.

    Args:
        subparsers: the subparsers of `empcause`.
        command: name of the command, which is the name of a field of `Stage`.
        help, description: what the help of `empcause` and that of the command say about it.
        arguments_help: what the command's help says about the arguments behind the stage.
    """
    parser = subparsers.add_parser(command, help=help, description=description)
    names = [name for name, stage in STAGES.items() if getattr(stage, command)]
    parser.add_argument("stage", choices=names, help=f"what to {command}")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help=arguments_help)
    parser.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Run the task, then print its figures and where the result is."""
    import torch

    from empcause.cli.memory import keep_freed_memory
    from empcause.cli.options import parse_options
    from empcause.cli.terminal import hide_file_progress, print_metrics

    hide_file_progress()
    if not torch.accelerator.is_available():
        keep_freed_memory()
    task: Task = getattr(STAGES[namespace.stage], namespace.command)
    module = importlib.import_module(task.module)
    options = parse_options(
        getattr(module, task.options),
        namespace.arguments,
        prog=f"empcause {namespace.command} {namespace.stage}",
        description=task.description,
    )
    print_metrics(getattr(module, task.function)(options), f"{task.result} in {options.output_dir}")
    return 0
