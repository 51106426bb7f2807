"""`empcause evaluate extractor|generator`: metrics with intervals, beside the published figures."""

import argparse


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `empcause`."""
    parser = subparsers.add_parser(
        "evaluate",
        help="measure a trained model; writes JSON, a Markdown table and figures",
        description="`empcause evaluate extractor --help` shows the options of one stage.",
    )
    parser.add_argument("stage", choices=["extractor", "generator"], help="which of the two models to evaluate")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="--model FOLDER, --option value")
    parser.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Evaluate and print the headline figures and where the report is."""
    import torch

    from empcause.cli.memory import keep_freed_memory
    from empcause.cli.options import parse_options
    from empcause.cli.terminal import hide_file_progress, print_metrics

    hide_file_progress()
    if not torch.accelerator.is_available():
        keep_freed_memory()
    prog = f"empcause evaluate {namespace.stage}"
    if namespace.stage == "extractor":
        from empcause.evaluation.causes import EvaluateCausesOptions, evaluate_causes

        description = "Emotion accuracy and cause recall on EmoCause (Tables 5 and 6)."
        extractor = parse_options(EvaluateCausesOptions, namespace.arguments, prog=prog, description=description)
        print_metrics(evaluate_causes(extractor), f"report in {extractor.output_dir}")
    else:
        from empcause.evaluation.responses import EvaluateResponsesOptions, evaluate_responses

        description = "Perplexity, Distinct, BERTScore and emotion accuracy on EmpatheticDialogues (Table 7)."
        generator = parse_options(EvaluateResponsesOptions, namespace.arguments, prog=prog, description=description)
        print_metrics(evaluate_responses(generator), f"report in {generator.output_dir}")
    return 0
