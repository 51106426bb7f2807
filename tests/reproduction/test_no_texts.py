"""No text of EmpatheticDialogues, whose licence is not this project's, is in a tracked file."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from empcause.data import load_annotations, load_dialogues

ROOT = Path(__file__).parents[2]
LONGEST = 8  # words in a row that two texts may not share


# What anybody says: a run around one of these is nobody's text.
COMMON = ("sorry to hear that", "hear that i", "how long have you been waiting for this")


def runs(text: str) -> Iterator[str]:
    """All runs of that many words, in lower case and without punctuation, except those around a common phrase."""
    words = re.findall(r"[\w'’]+", text.lower())
    found = (" ".join(words[start : start + LONGEST]) for start in range(len(words) - LONGEST + 1))
    return (run for run in found if not any(phrase in run for phrase in COMMON))


def tracked() -> list[Path]:
    """The files that git tracks."""
    found = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("this is no clone of the repository: which files are tracked is not known")
    return [ROOT / name for name in found.stdout.split("\0") if name]


def test_no_tracked_file_holds_a_text_of_the_data(real_data):
    dialogues = [each for split in ("train", "valid", "test") for each in load_dialogues(split, real_data)]
    texts = [text for each in dialogues for text in (each.situation, *each.turns)]
    texts += [each.situation for split in ("valid", "test") for each in load_annotations(split, real_data)]
    known = {hash(run) for text in texts for run in runs(text)}
    assert len(known) > 500_000
    assert all(hash(run) in known for run in runs(texts[100])), "a text of the data would be found"
    found = []
    for path in tracked():
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="ignore")
            found += [f"{path.relative_to(ROOT)}: {run}" for run in runs(text) if hash(run) in known]
    assert not found, "\n".join(found)
