"""Systems: everything that finds emotions and causes in texts, scores responses or answers dialogues and can be evaluated."""

from empcause.systems.loading import load_system
from empcause.systems.protocol import Answers, Encoded, Reading, Reads, ReadsDialogues, Scores, System

__all__ = ["Answers", "Encoded", "Reading", "Reads", "ReadsDialogues", "Scores", "System", "load_system"]
