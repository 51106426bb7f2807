"""Writing files whole or not at all, so that they survive a loss of power once they are written."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Replace a file: its old content stays under its name until the new content is complete and on the disk.

    Args:
        path: the file, in a folder that exists. A link of this name is replaced, not followed.

    Yields:
        A binary file beside it, opened for writing (`.name` is its path). It takes the place of `path` when the block
        ends, and is removed when the block raises.

    Raises:
        OSError: the new file cannot be written; what was under `path` is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8, replacing what was there (see `replacing`).

    Raises:
        OSError: it cannot be written; what was there is unchanged.
    """
    with replacing(path) as file:
        file.write(text.encode())


def sync(path: str | os.PathLike[str]) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk.

    Raises:
        OSError: they could not be brought to the disk.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
