"""`empcause chat`: a conversation in the terminal."""

import argparse
import sys

from empcause.cli.respond import add_model_options, generation_options, load_responder
from empcause.errors import UserError
from empcause.text import visible


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `empcause`."""
    parser = subparsers.add_parser(
        "chat",
        help="talk with the model in the terminal",
        description="Type a message and press Enter; /reset starts a new dialogue, /quit (or Ctrl-D) ends.",
    )
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Read messages until the end of the input, and answer each in the context of the dialogue so far.

    Raises:
        UserError: the standard input is closed, or a model or an option cannot be used.
    """
    from empcause.cli.terminal import console, print_reply

    if sys.stdin is None:
        raise UserError("chat reads from the standard input, which is closed; use `empcause respond`.")
    options = generation_options(namespace)
    responder = load_responder(namespace)
    console.print("Type a message and press Enter; /reset starts a new dialogue, /quit ends.", style="dim")
    turns: list[str] = []
    while True:
        try:
            message = console.input("[bold]you[/]       ").strip()
        except EOFError:
            return 0
        if message == "/quit":
            return 0
        if message == "/reset":
            turns = []
        elif message:
            try:
                reply = responder([*turns, message], **options)
            except UserError as error:
                console.print(visible(str(error)), style="red", markup=False)
                continue
            print_reply(reply)
            turns += [message, reply.response or "..."]
