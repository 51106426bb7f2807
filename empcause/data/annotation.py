"""A situation of which people have marked the words that caused the emotion."""

from dataclasses import dataclass

from empcause.data.words import Word


@dataclass(frozen=True)
class CauseAnnotation:
    """One annotated situation.

    Attributes:
        conv_id: the dialogue that the situation belongs to.
        emotion: its name in the data set.
        situation: the raw text.
        words: the words of the situation with their character spans, as the data set splits it.
        gold: indices into `words` of the words that caused the emotion, in the order of the annotation.
    """

    conv_id: str
    emotion: str
    situation: str
    words: tuple[Word, ...]
    gold: tuple[int, ...]
