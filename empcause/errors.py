"""Exceptions whose message is a sentence for the user."""

from signal import SIGINT


class UserError(ValueError):
    """Bad input whose message is one complete sentence: what was wrong and what was expected.

    The command line prints the message alone; from Python it is an ordinary `ValueError`.
    """


class Missing(UserError):
    """Data that are needed are not there."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or a request to end; the message says what was saved and how to continue.

    Attributes:
        signal: number of the signal, `SIGINT` or `SIGTERM`.
    """

    def __init__(self, message: str = "interrupted.", signal: int = SIGINT) -> None:
        super().__init__(message)
        self.signal = signal
