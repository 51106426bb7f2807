"""`empcause respond "..."`: emotion, causes and response for one dialogue."""

import argparse
from typing import TYPE_CHECKING, Any

from empcause.cli.numbers import number
from empcause.errors import UserError
from empcause.ranges import COUNT, POSITIVE, SEED, Range

if TYPE_CHECKING:
    from empcause.generator import Responder


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `empcause`."""
    parser = subparsers.add_parser(
        "respond",
        help="answer one message, and show the emotion and its causes",
        description="Prints the emotion with its probability, the cause words, and the response.",
    )
    parser.add_argument(
        "turns", nargs="+", metavar="TURN", help="what the speaker said; several turns alternate speaker and listener"
    )
    add_model_options(parser)
    parser.set_defaults(run=run)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `respond` and `chat` share: the two models, and how to decode."""
    parser.add_argument("--extractor", default="runs/extractor", help="folder of the extractor (default: %(default)s)")
    parser.add_argument("--generator", default="runs/generator", help="folder of the generator (default: %(default)s)")
    parser.add_argument(
        "--max_new_tokens",
        type=number(int, COUNT),
        default=40,
        help="longest response in tokens (default: %(default)s)",
    )
    parser.add_argument("--do_sample", action="store_true", help="sample from the nucleus instead of decoding greedily")
    parser.add_argument(
        "--top_p",
        type=number(float, Range(0, 1, without_low=True)),
        help="with --do_sample: probability of the nucleus (default: 0.9)",
    )
    parser.add_argument(
        "--temperature", type=number(float, POSITIVE), help="with --do_sample: temperature (default: 0.7)"
    )
    parser.add_argument("--seed", type=number(int, SEED), default=0, help="seed of the sampling (default: %(default)s)")


def load_responder(namespace: argparse.Namespace) -> "Responder":
    """Load both models, and seed the random generators.

    Raises:
        UserError: a folder does not exist or does not hold such a model.
    """
    from transformers import set_seed

    from empcause.cli.terminal import hide_file_progress
    from empcause.extractor import load_extractor
    from empcause.generator import Responder, load_generator

    hide_file_progress()
    set_seed(namespace.seed)
    return Responder(*load_extractor(namespace.extractor), *load_generator(namespace.generator))


def generation_options(namespace: argparse.Namespace) -> dict[str, Any]:
    """Make the keyword arguments for `generate`.

    Raises:
        UserError: an option of sampling is given without --do_sample.
    """
    options: dict[str, Any] = {"max_new_tokens": namespace.max_new_tokens}
    sampling = {"top_p": namespace.top_p, "temperature": namespace.temperature}
    given = {name: value for name, value in sampling.items() if value is not None}
    if namespace.do_sample:
        return options | {"do_sample": True, "top_p": 0.9, "temperature": 0.7} | given
    if given:
        raise UserError(f"--{next(iter(given))} has no effect on greedy decoding; add --do_sample.")
    return options


def run(namespace: argparse.Namespace) -> int:
    """Answer once."""
    from empcause.cli.terminal import print_reply
    from empcause.generator.inference import check_turns

    check_turns(namespace.turns)
    options = generation_options(namespace)
    print_reply(load_responder(namespace)(namespace.turns, **options))
    return 0
