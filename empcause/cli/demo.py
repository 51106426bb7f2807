"""`empcause demo`: the whole pipeline once, on the embedded sample."""

import argparse
import os
import re
import signal
from pathlib import Path

from empcause.errors import Interrupted, UserError
from empcause.outputs import LOCK, Record, check_ours, read_record, working_in, write_record

PARTS = ("extractor", "generator", "evaluation/extractor", "evaluation/generator")
FILES = ("encoder-tokenizer", "decoder-tokenizer", "extractor", "generator", "evaluation", "metrics.json", "report.md")
MADE_BY = "empcause demo"
NOTE = "Tiny models on the embedded sample: this shows that everything works and promises no quality."


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `empcause`."""
    parser = subparsers.add_parser(
        "demo",
        help="train, evaluate and answer on the embedded sample, in minutes",
        description="Trains a tokenizer, an extractor and a generator from nothing on the embedded sample, evaluates "
        "both, answers three dialogues and writes a report. The models are tiny: this shows that everything works "
        "and promises no quality.",
    )
    parser.add_argument(
        "--output_dir", default="runs/demo", help="folder for models, evaluations and the report (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Run every part once and print the path of the report."""
    from empcause.evaluation.plots import load_pyplot

    load_pyplot()
    folder = Path(namespace.output_dir)
    with working_in(folder):
        write_record(folder, check_folder(folder))
        try:
            return run_in(folder)
        except KeyboardInterrupt as stop:
            number = getattr(stop, "signal", signal.SIGINT)
            raise Interrupted("interrupted; the same command begins the demo anew.", number) from stop


def check_folder(folder: Path) -> Record:
    """Check that nothing is overwritten but what an earlier demo made.

    Returns:
        The folder's record.

    Raises:
        UserError: the folder is not empty and not of a demo, or something else stands where the demo writes.
    """
    anything = re.compile(f"(?!{re.escape(LOCK)}$).*", re.DOTALL)
    check_ours(folder, MADE_BY, re.compile("|".join(FILES)) if read_record(folder) else anything)
    for path in (path for name in FILES for path in (folder / name).rglob("*")):
        if path.is_symlink():
            raise UserError(f"{path} is a link, which no demo made; choose another --output_dir.")
    for part in PARTS:
        if (folder / part).is_dir() and os.listdir(folder / part) and read_record(folder / part) is None:
            raise UserError(f"{folder / part} is not of an earlier demo; choose another --output_dir.")
    return Record(MADE_BY, dict.fromkeys(FILES))


def run_in(folder: Path) -> int:
    """Run every part once, in a folder that belongs to the demo."""
    from transformers import set_seed

    from empcause.cli.terminal import console, hide_file_progress, print_reply
    from empcause.data import load_annotations, load_dialogues, train_tokenizer
    from empcause.evaluation import write_report
    from empcause.evaluation.causes import EvaluateCausesOptions, evaluate_causes
    from empcause.evaluation.responses import EvaluateResponsesOptions, evaluate_responses
    from empcause.extractor import load_extractor
    from empcause.generator import Responder, load_generator
    from empcause.text import visible
    from empcause.training.extractor import ExtractorTrainingArguments, train_extractor
    from empcause.training.generator import GeneratorTrainingArguments, train_generator

    hide_file_progress()
    console.print(NOTE)

    console.rule("1/5 tokenizer")
    dialogues = load_dialogues("train", "sample")
    situations = [annotation.situation for annotation in load_annotations("train", "sample")]
    texts = situations + [turn for dialogue in dialogues for turn in dialogue.turns]
    train_tokenizer(texts, vocab_size=2000, output_dir=folder / "encoder-tokenizer", kind="encoder")
    train_tokenizer(texts, vocab_size=2000, output_dir=folder / "decoder-tokenizer", kind="decoder")

    console.rule("2/5 extractor (stage 1)")
    set_seed(0)
    train_extractor(
        ExtractorTrainingArguments(
            output_dir=str(folder / "extractor"),
            overwrite_output_dir=True,
            data="sample",
            model_name_or_path=None,
            model_type="roberta",
            config_overrides="hidden_size=128,num_hidden_layers=2,num_attention_heads=4,intermediate_size=256",
            tokenizer_name=str(folder / "encoder-tokenizer"),
            learning_rate=1e-3,
            per_device_train_batch_size=16,
            num_train_epochs=15,
        )
    )

    console.rule("3/5 generator (stage 2)")
    set_seed(0)
    train_generator(
        GeneratorTrainingArguments(
            output_dir=str(folder / "generator"),
            overwrite_output_dir=True,
            data="sample",
            extractor=str(folder / "extractor"),
            model_name_or_path=None,
            model_type="gpt2",
            config_overrides="n_embd=128,n_layer=3,n_head=4,n_positions=256",
            tokenizer_name=str(folder / "decoder-tokenizer"),
            learning_rate=1e-3,
            num_train_epochs=20,
        )
    )

    console.rule("4/5 evaluation")
    extractor_metrics = evaluate_causes(
        EvaluateCausesOptions(
            model=str(folder / "extractor"),
            data="sample",
            output_dir=str(folder / "evaluation" / "extractor"),
            overwrite_output_dir=True,
        )
    )
    generator_metrics = evaluate_responses(
        EvaluateResponsesOptions(
            model=str(folder / "generator"),
            extractor=str(folder / "extractor"),
            data="sample",
            output_dir=str(folder / "evaluation" / "generator"),
            overwrite_output_dir=True,
        )
    )

    console.rule("5/5 three dialogues")
    responder = Responder(*load_extractor(folder / "extractor"), *load_generator(folder / "generator"))
    for dialogue in load_dialogues("test", "sample")[:21:10]:
        print_reply(responder([dialogue.turns[0]], max_new_tokens=30))
        console.print()

    report = write_report(folder, extractor_metrics, generator_metrics, NOTE)
    console.print(visible(f"Report: {report}"), soft_wrap=True, markup=False)
    return 0
