"""The units of the two datasets: a dialogue, a response to predict, a situation with its annotated causes."""

from dataclasses import dataclass

from empcause.data.words import Word
from empcause.errors import UserError

# The 32 emotions of EmpatheticDialogues; an emotion's id is its place here.
EMOTIONS: tuple[str, ...] = tuple(
    "afraid angry annoyed anticipating anxious apprehensive ashamed caring confident content devastated disappointed "
    "disgusted embarrassed excited faithful furious grateful guilty hopeful impressed jealous joyful lonely nostalgic "
    "prepared proud sad sentimental surprised terrified trusting".split()
)
_IDS = {name: index for index, name in enumerate(EMOTIONS)}

# The splits of both datasets.
SPLITS = ("train", "valid", "test")


def emotion_id(name: str) -> int:
    """Index of an emotion in `EMOTIONS`.

    Raises:
        UserError: `name` is not one of the 32 emotions.
    """
    if name not in _IDS:
        raise UserError(f"Unknown emotion {name!r}; EmpatheticDialogues has these 32: {', '.join(EMOTIONS)}.")
    return _IDS[name]


@dataclass(frozen=True)
class CauseAnnotation:
    """One situation of EmoCause.

    Attributes:
        conv_id: the dialogue of EmpatheticDialogues that the situation belongs to.
        emotion: one of `EMOTIONS`.
        situation: the raw text.
        words: its words with their character spans, as EmoCause splits it.
        gold: indices into `words` of the words that caused the emotion, in the order of the annotation.
    """

    conv_id: str
    emotion: str
    situation: str
    words: tuple[Word, ...]
    gold: tuple[int, ...]
