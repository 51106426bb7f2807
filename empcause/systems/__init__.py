"""Systems: everything that finds emotions and causes in texts, scores responses or answers dialogues and can be evaluated."""

from empcause.systems.loading import load_system
from empcause.systems.protocol import Answers, Encoded, Reading, Reads, ReadsDialogues, Scores, ScoresWords, System

__all__ = ["Answers", "Encoded", "Reading", "Reads", "ReadsDialogues", "Scores", "ScoresWords", "System", "load_system"]
