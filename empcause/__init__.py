"""Empathetic conversation generation enhanced by emotion cause."""

__version__ = "0.1.0"
