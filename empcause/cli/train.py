"""`empcause train extractor|generator`: one stage of the method, from a recipe."""

import argparse


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `empcause`."""
    parser = subparsers.add_parser(
        "train",
        help="train the emotion cause extractor (stage 1) or the conversation generator (stage 2)",
        description="Options come from a YAML recipe (--config) and the command line, which wins. "
        "`empcause train extractor --help` shows those of a stage.",
    )
    parser.add_argument("stage", choices=["extractor", "generator"], help="which of the two models to train")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="--config RECIPE, --option value")
    parser.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Train and print where the model is and how good it is."""
    import torch

    from empcause.cli.memory import keep_freed_memory
    from empcause.cli.options import parse_options
    from empcause.cli.terminal import hide_file_progress, print_metrics

    hide_file_progress()
    if not torch.accelerator.is_available():
        keep_freed_memory()
    prog = f"empcause train {namespace.stage}"
    if namespace.stage == "extractor":
        from empcause.training.extractor import ExtractorTrainingArguments, train_extractor

        description = "Stage 1: train the emotion cause extractor (Algorithm 1)."
        extractor = parse_options(ExtractorTrainingArguments, namespace.arguments, prog=prog, description=description)
        print_metrics(train_extractor(extractor), f"extractor in {extractor.output_dir}")
    else:
        from empcause.training.generator import GeneratorTrainingArguments, train_generator

        description = "Stage 2: train the empathetic conversation generator (Algorithm 2)."
        generator = parse_options(GeneratorTrainingArguments, namespace.arguments, prog=prog, description=description)
        print_metrics(train_generator(generator), f"generator in {generator.output_dir}")
    return 0
