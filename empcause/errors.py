"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """Bad input whose message is one complete sentence: what was wrong and what was expected.

    The command line prints the message alone; from Python it is an ordinary `ValueError`.
    """
