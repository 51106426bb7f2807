"""Data sets as objects: they hold everything that differs between data sets, so that the rest of the package works with any."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, NamedTuple, NoReturn, TypeVar

from empcause.data.annotation import CauseAnnotation
from empcause.data.dialogue import Dialogue
from empcause.data.source import Files, read_split
from empcause.errors import UserError

Item = TypeVar("Item", Dialogue, CauseAnnotation)

# A function that receives the place of a problem ("file:line") and what is wrong there.
Report = Callable[[str, str], None]


class Licence(NamedTuple):
    """A licence of data.

    Attributes:
        identifier: its name in the front matter of a model card, such as `cc-by-4.0`.
        terms: what it means for a model that is trained on the data, as a part of a sentence.
    """

    identifier: str
    terms: str


@dataclass(frozen=True, kw_only=True)
class Dataset(Files, Generic[Item]):
    """A data set of dialogues or of annotated situations.

    Attributes:
        title: its name in sentences.
        emotions: names of its emotions; an emotion's id is its index here.
        licence: what may be done with it.
        language: the language of its texts as an ISO 639 code ("en"); empty where it is not known.
        parse: turns the text of a split's file into items. It also gets the file's name, for messages, and a function to which
            it reports each malformed row or record, which it leaves out.
        count: gives the numbers of a split that `empcause data check` shows, by name.
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
        title, licence: given for data inside of this package alone, which are recognised by their place, not by their content.
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
    """The id of an emotion: its index among the names of all emotions.

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
    """Whether a string is text: it has no NUL and no half of a surrogate pair, which a byte that is not UTF-8 is decoded to."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in value
