"""`empcause respond "..."`: emotion, causes and response for one dialogue."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from empcause.generator import Responder


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `empcause`."""
    parser = subparsers.add_parser(
        "respond",
        help="answer one message, naming the emotion and its causes",
        description="Prints the emotion with its probability, the cause words, and the response.",
    )
    parser.add_argument(
        "turns", nargs="+", metavar="TURN", help="what the speaker said; several turns alternate speaker and listener"
    )
    add_model_options(parser)
    parser.set_defaults(run=run)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Options shared by `respond` and `chat`: the two models and how to decode."""
    parser.add_argument("--extractor", default="runs/extractor", help="folder of the extractor (default: %(default)s)")
    parser.add_argument("--generator", default="runs/generator", help="folder of the generator (default: %(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=40, help="longest response (default: %(default)s)")
    parser.add_argument("--do_sample", action="store_true", help="nucleus sampling instead of greedy decoding")
    parser.add_argument("--top_p", type=float, default=0.9, help="nucleus size when sampling (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.7, help="when sampling (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: %(default)s)")


def load_responder(namespace: argparse.Namespace) -> "Responder":
    """Both models, loaded; the random generator seeded.

    Raises:
        UserError: a folder that does not exist or does not hold such a model.
    """
    from transformers import set_seed

    from empcause.cli.terminal import hide_file_progress
    from empcause.extractor import load_extractor
    from empcause.generator import Responder, load_generator

    hide_file_progress()
    set_seed(namespace.seed)
    return Responder(*load_extractor(namespace.extractor), *load_generator(namespace.generator))


def generation_options(namespace: argparse.Namespace) -> dict[str, int | float | bool]:
    """Keyword arguments for `generate`."""
    options: dict[str, int | float | bool] = {"max_new_tokens": namespace.max_new_tokens}
    if namespace.do_sample:
        options |= {"do_sample": True, "top_p": namespace.top_p, "temperature": namespace.temperature}
    return options


def run(namespace: argparse.Namespace) -> int:
    """Answer once."""
    from empcause.cli.terminal import print_reply
    from empcause.errors import UserError

    if any(not turn.strip() for turn in namespace.turns):
        raise UserError('A turn is empty; write what the speaker said, for example "I miss my dog.".')
    responder = load_responder(namespace)
    print_reply(responder(namespace.turns, **generation_options(namespace)))
    return 0
