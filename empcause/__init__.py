"""Empathetic conversation generation enhanced by emotion cause.

Importing the package registers the attention implementation "empcause" with transformers.
"""

__version__ = "0.1.0"

from empcause.integration import steer
from empcause.ops import biased_attention, biased_attention_varlen, info

__all__ = ["__version__", "biased_attention", "biased_attention_varlen", "info", "steer"]
