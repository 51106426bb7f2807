"""The command `empcause` (also `python -m empcause`)."""

from empcause.cli.main import main

__all__ = ["main"]
