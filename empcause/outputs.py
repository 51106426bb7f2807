"""Output folders: which files empcause wrote there, whether these are unchanged, and which process works there."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock, Timeout

from empcause.errors import UserError
from empcause.files import sync, write_text

RECORD = "empcause.json"
LOCK = ".empcause.lock"
# What the record of a training's checkpoint names as its maker.
CHECKPOINT = "checkpoint"

# Messages of torch.save when a file cannot be written.
TORCH_SAVE_FAILED = re.compile("PytorchStreamWriter failed|unexpected pos .* vs|iostream error")

# Names of the files of a checkpoint, for one whose saving was cut short, so that no record lists its files.
_CHECKPOINT_FILES = re.compile(
    r".*\.(safetensors|json|pt|pth|bin|jinja|model|distcp|metadata|tmp)|merges\.txt|vocab\.txt"
)


@dataclass(frozen=True)
class Record:
    """The content of a folder's `empcause.json`: which command writes there, and which files.

    Attributes:
        made_by: the command that writes there.
        files: SHA-256 by path relative to the folder, for files that were saved whole; None for folders and for files that are
            not verified.
        about: what else the command remembers there.
    """

    made_by: str
    files: dict[str, str | None] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


def read_record(folder: str | os.PathLike[str]) -> Record | None:
    """Read the record of a folder; None if it has none.

    Raises:
        UserError: the record is damaged or cannot be read.
    """
    path = Path(folder) / RECORD
    try:
        record = Record(**json.loads(path.read_text(encoding="utf-8")))
        names = [PurePosixPath(name) for name, _ in record.files.items()]
        if not all(name.parts and not name.is_absolute() and ".." not in name.parts for name in names):
            raise ValueError("it names files outside of its folder")
        return record
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error}.") from error


def write_record(folder: str | os.PathLike[str], record: Record) -> None:
    """Write a folder's record, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    write_text(Path(folder) / RECORD, json.dumps(asdict(record), indent=1) + "\n")


def check_ours(
    folder: str | os.PathLike[str], made_by: str, written: re.Pattern[str], brought: Collection[str] = ()
) -> Record:
    """Check that a command overwrites nothing but what it wrote itself.

    Args:
        folder: the folder in which the command writes.
        made_by: the command.
        written: pattern of the names that it writes there.
        brought: names that the user brought there, and that count as the command's own.

    Returns:
        The folder's record, to which the brought names are added; a new record if there is none.

    Raises:
        UserError: the folder holds what another command made, or a file of such a name is not the command's own, or a link.
    """
    record = read_record(folder) or Record(made_by)
    if record.made_by != made_by:
        raise UserError(f"output_dir {folder} holds what `{record.made_by}` made; choose another folder.")
    record = Record(made_by, record.files | dict.fromkeys(brought), record.about)
    for name in sorted(filter(written.fullmatch, os.listdir(folder))):
        if name not in record.files or ((Path(folder) / name).is_symlink() and name not in brought):
            raise UserError(f"output_dir {folder} has its own {name}, not of `{made_by}`; choose another folder.")
    return record


def claim(folder: str | os.PathLike[str], *names: str) -> None:
    """Record names before anything is written under them, so that they are known as ours however the process ends.

    Names of files that no longer exist are removed from the record.

    Args:
        folder: the folder.
        *names: paths relative to it.
    """
    record = read_record(folder) or Record("empcause")
    files = {name: digest for name, digest in record.files.items() if os.path.lexists(Path(folder) / name)}
    write_record(folder, Record(record.made_by, files | dict.fromkeys(names), record.about))


def seal(folder: str | os.PathLike[str], made_by: str, about: Mapping[str, Any] | None = None) -> None:
    """Bring all files of a folder to the disk, and then record their checksums: from then on it counts as whole."""
    folder = Path(folder)
    paths = sorted(path for path in folder.rglob("*") if path.name != RECORD)
    for path in paths:
        sync(path)
    files: dict[str, str | None] = {
        path.relative_to(folder).as_posix(): checksum(path) for path in paths if path.is_file()
    }
    write_record(folder, Record(made_by, files, dict(about or {})))
    sync(folder.parent)


def checksum(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: str | os.PathLike[str], unless: Collection[str] = ()) -> Record | None:
    """Compare files with the checksums that were recorded when they were saved.

    Args:
        folder: the folder with the files and their record.
        unless: names of files that may have changed.

    Returns:
        The record; None if the folder has none, so that nothing was compared.

    Raises:
        UserError: a file is missing, cannot be read, or has changed.
    """
    folder = Path(folder)
    record = read_record(folder)
    for name, expected in record.files.items() if record else ():
        if expected is None or name in unless:
            continue
        try:
            found = checksum(folder / name)
        except FileNotFoundError as error:
            raise UserError(f"{folder / name} is missing.") from error
        except OSError as error:
            raise UserError(f"{folder / name} cannot be read: {error.strerror}.") from error
        if found != expected:
            raise UserError(f"{folder / name} is not as it was saved.")
    return record


def remove_made(folder: str | os.PathLike[str]) -> None:
    """Remove the files that the folder's record lists, and the record. No link is followed, and everything else stays.

    A folder without a readable record is treated as a checkpoint whose saving was cut short.
    """
    folder = Path(folder)
    try:
        record = read_record(folder)
    except UserError:
        record = None
    if record is None:
        names = [path.name for path in folder.iterdir() if _CHECKPOINT_FILES.fullmatch(path.name)]
    else:
        names = list(record.files)
    for name in names:
        _remove(folder, name)
    (folder / RECORD).unlink(missing_ok=True)


def _remove(folder: Path, name: str) -> None:
    path = folder / name
    if path.is_symlink() or path.parent.resolve() != (folder.resolve() / name).parent:
        return  # a link stands where we wrote a file or folder: it is not ours
    if path.is_dir():
        remove_made(path)
    else:
        path.unlink(missing_ok=True)
    for parent in (path, *path.parents):
        if parent == folder:
            break
        with suppress(OSError):  # as long as something is in it
            parent.rmdir()


@contextmanager
def working_in(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Make a folder if necessary, and keep all other processes from working in it until the block or the process ends.

    Raises:
        UserError: another process works there, or the folder cannot be made or written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0)
        lock.acquire()
        for leftover in folder.glob(f".{RECORD}.*.tmp"):  # of a process that was killed
            leftover.unlink()
    except Timeout as error:
        raise UserError(
            f"Another process works in {folder}; wait until it has ended, or choose another output_dir."
        ) from error
    except (FileExistsError, NotADirectoryError) as error:
        file = next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), folder)
        raise UserError(f"output_dir {folder} is not a folder: {file} is a file.") from error
    except OSError as error:
        raise UserError(f"output_dir {folder} cannot be written: {error.strerror}.") from error
    try:
        yield
    finally:
        if not (folder / RECORD).exists():  # the folder is not ours, and stays as it was
            with suppress(OSError):
                (folder / LOCK).unlink()
        lock.release()


def why_not_written(error: BaseException) -> str | None:
    """The system's reason why a file could not be written, if an error says so; otherwise None.

    Libraries that write weights wrap the system's error in their own, so its text is searched too; torch.save loses even that.
    """
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
        if getattr(error, "errno", None) == code or os.strerror(code) in str(error):
            return os.strerror(code)
    if TORCH_SAVE_FAILED.search(str(error)):
        return "the disk is full or fails"
    return None
