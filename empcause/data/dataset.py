"""What a data set is: all that differs from one to another, so that the rest of the package need not know which it has."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, NamedTuple, NoReturn, TypeVar

from empcause.data.annotation import CauseAnnotation
from empcause.data.dialogue import Dialogue
from empcause.data.source import Files, read_split
from empcause.errors import UserError

Item = TypeVar("Item", Dialogue, CauseAnnotation)

# Receives the place ("file:line") and what is wrong there.
Report = Callable[[str, str], None]


class Licence(NamedTuple):
    """A licence of data.

    Attributes:
        identifier: in a model card's front matter.
        terms: what it means for a model that is trained on the data, within a sentence.
    """

    identifier: str
    terms: str


@dataclass(frozen=True, kw_only=True)
class Dataset(Files, Generic[Item]):
    """A data set of dialogues or of annotated situations.

    Attributes:
        title: its name in sentences.
        emotions: names of its emotions; an emotion's id is its place here.
        licence: what may be done with it.
        language: of its texts, as an ISO 639 code ("en"); empty where it is not known.
        parse: makes the items of a split from a file's text and its name for messages; a malformed row or record goes to the
            report and is left out.
        count: numbers of a split by what they count, for `empcause data check`.
        published: `empcause.data.origin.fingerprint` of every split as it was published.
    """

    title: str
    emotions: tuple[str, ...]
    licence: Licence
    language: str = ""
    parse: Callable[[str, str, Report], list[Item]] = field(repr=False)
    count: Callable[[Sequence[Item]], dict[str, int]] = field(repr=False)
    published: frozenset[str] = field(default=frozenset(), repr=False)

    def load(self, split: str, place: Path, other: Files | None = None) -> list[Item]:
        """The items of a split.

        Args:
            split: one of `splits`.
            place: folder or archive of the files.
            other: the other data set of the same corpus, whose files are not taken for this one's.

        Raises:
            Missing: there is no such file.
            UserError: no such split, or a malformed row (named by file and line).
            OSError: the file cannot be read.
        """
        if split not in self.splits:
            raise UserError(f"Unknown split {split!r} of {self.title}; expected one of {', '.join(self.splits)}.")
        return self.parse(*read_split(self, split, place, other), refuse)


@dataclass(frozen=True)
class Corpus:
    """Data sets that belong together, with the same emotions: what both stages learn from and are measured on.

    Attributes:
        name: what `--data` calls it.
        dialogues: the dialogues.
        annotations: situations with annotated causes, where there are any.
        title, licence: of a corpus inside of this package, which is known by its place and not by what is in it.
    """

    name: str
    dialogues: Dataset[Dialogue]
    annotations: Dataset[CauseAnnotation] | None
    title: str = ""
    licence: Licence | None = None

    @property
    def emotions(self) -> tuple[str, ...]:
        """Names of its emotions."""
        return self.dialogues.emotions


def emotion_id(name: str, emotions: Sequence[str]) -> int:
    """An emotion's place among others.

    Raises:
        UserError: it is none of them.
    """
    if name not in emotions:
        raise UserError(f"Unknown emotion {name!r}; expected one of these {len(emotions)}: {', '.join(emotions)}.")
    return emotions.index(name)


def refuse(place: str, problem: str) -> NoReturn:
    """A report that stops at the first problem.

    Raises:
        UserError: always.
    """
    raise UserError(f"{place}: {problem}")


def is_text(value: str) -> bool:
    """False where there is a NUL, or half of a surrogate pair, as which a byte that is not UTF-8 is decoded too."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in value
