"""Reproducing the tables of the paper: their systems are trained, evaluated and compared with the printed figures."""

from empcause.reproduction.running import reproduce
from empcause.reproduction.scorecard import write_scorecard
from empcause.reproduction.tables import SIZES, TABLES

__all__ = ["SIZES", "TABLES", "reproduce", "write_scorecard"]
