"""Files of data sets: the embedded sample, the user's copy in any usual packing, or a verified download."""

import gzip
import hashlib
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import requests
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from empcause.errors import Missing, UserError
from empcause.files import sync

SAMPLE = Path(__file__).parent / "sample"

# Seconds without an answer, or without a byte of it, after which a download is given up.
_TIMEOUT = 30

# How a single file may be packed.
_SUFFIXES = ("", ".gz", ".xz")

# What the readers of packed files raise if a file is not whole; zipfile raises RuntimeError for an encrypted one.
_DAMAGED = (
    EOFError,
    lzma.LZMAError,
    gzip.BadGzipFile,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    RuntimeError,
)


@dataclass(frozen=True, kw_only=True)
class Files:
    """The files of a data set, one per split.

    Attributes:
        name: name of the folder that they are in.
        splits: names of the files without the extension.
        extension: extension of the files, without the dot.
        archive, url, sha256: name, address and checksum of the official archive.
    """

    name: str
    splits: tuple[str, ...]
    extension: str
    archive: str
    url: str
    sha256: str


def cache_dir() -> Path:
    """Folder of downloads and computed caches: `$EMPCAUSE_CACHE_DIR`, otherwise `~/.cache/empcause`."""
    return Path(os.environ.get("EMPCAUSE_CACHE_DIR") or Path.home() / ".cache" / "empcause")


def resolve_data(data: str | os.PathLike[str] | None) -> Path:
    """The folder (or archive) that `data` stands for.

    Args:
        data: a path, or None: `$EMPCAUSE_DATA_DIR`, otherwise what `empcause data download` fetched.

    Raises:
        UserError: there is no such path; the message says how to get the data.
    """
    if data == "":
        raise UserError("--data is empty; give a folder, or leave the option out.")
    named = data or os.environ.get("EMPCAUSE_DATA_DIR")
    if named:
        path = Path(os.path.expanduser(named))
        if not path.exists():
            origin = "--data" if data else "EMPCAUSE_DATA_DIR"
            raise UserError(f"The data folder {path} (from {origin}) does not exist.")
        return path
    path = cache_dir() / "data"
    if not path.exists():
        raise UserError(
            "There is no data: give --data FOLDER, set EMPCAUSE_DATA_DIR, run `empcause data download`, "
            "or use the embedded sample with --data sample."
        )
    return path


def read_split(dataset: Files, split: str, root: Path, other: Files | None = None) -> tuple[str, str]:
    """Read one split's file, whatever it is packed in.

    Looks for `NAME/SPLIT.EXT` and `SPLIT.EXT` in the folder, each plain, `.gz` or `.xz`, then for the official archive. If the
    folder has the name of the other data set, `NAME` is looked for beside it as well. If the other data set has files of the
    same name, `SPLIT.EXT` is this data set's only in a folder called `NAME`.

    Args:
        dataset: the data set's files.
        split: one of its splits.
        root: folder or archive, as `resolve_data` finds it.
        other: the other data set of the same corpus.

    Returns:
        The text without a byte order mark, and the file's name for messages. Bytes that are not UTF-8 stand in the text as
        lone surrogates, so that whoever reads it can name their line.

    Raises:
        Missing: there is no such file.
        UserError: the file may belong to either data set, or it is packed and damaged or cut short.
        OSError: it cannot be read.
    """
    member = f"{split}.{dataset.extension}"
    if root.is_file() and not _is_archive(root):
        files = ", ".join(f"{each}.{dataset.extension}" for each in dataset.splits)
        raise UserError(
            f"{root} is one file, but {dataset.name} has {len(dataset.splits)} splits: give the folder of {files} (plain, .gz or "
            ".xz), or an official archive."
        )
    ambiguous = other is not None and other.extension == dataset.extension and split in other.splits
    for candidate in [root] if root.is_file() else _candidates(root, dataset, member, other, ambiguous):
        try:
            content, name = _read(candidate, member, dataset if ambiguous else None)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            if candidate.is_symlink():
                raise UserError(f"{candidate} is a link to {os.readlink(candidate)}, which is no file.") from error
        except _DAMAGED as error:
            raise UserError(f"{candidate} is damaged, cut short or encrypted: {error}; fetch it again.") from error
        else:
            return content.decode("utf-8-sig", "surrogateescape"), name
    if other is not None and ambiguous and _name(root) != other.name:
        for suffix in _SUFFIXES:
            if (file := root / f"{member}{suffix}").exists():
                raise UserError(
                    f"{file} may be a file of {dataset.name} or of {other.name}; put it into a folder "
                    f"{dataset.name} or {other.name}."
                )
    raise Missing(
        f"{root} has no {dataset.name}/{member} (plain, .gz or .xz) and no {dataset.archive}; "
        "see `empcause data download`."
    )


def _candidates(root: Path, dataset: Files, member: str, other: Files | None, ambiguous: bool) -> list[Path]:
    """Where a split's file may be, the likeliest place first (see `read_split`)."""
    folders = [root / dataset.name]
    if not ambiguous or _name(root) == dataset.name:
        folders.append(root)
    if other is not None and _name(root) == other.name != dataset.name:
        folders.append(Path(os.path.abspath(root)).parent / dataset.name)
    plain = [folder / f"{member}{suffix}" for folder in folders for suffix in _SUFFIXES]
    return [*plain, *(folder / dataset.archive for folder in dict.fromkeys((root, *folders)))]


def _name(folder: Path) -> str:
    """The folder's own name, also where the path to it is `.`."""
    return os.path.basename(os.path.abspath(folder))


def _is_archive(path: Path) -> bool:
    return path.name.endswith((".tar.gz", ".tgz", ".tar", ".zip"))


def _read(path: Path, member: str, owner: Files | None) -> tuple[bytes, str]:
    """Unpack a file, or the one file of an archive that is called `member`; gives its content and its name for messages.

    With an `owner`, only its own archive is known to hold its files alone; in another one, they lie in a folder of its name.
    """
    if not _is_archive(path):
        openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
        with openers.get(path.suffix, open)(path, "rb") as file:
            return file.read(), str(path)
    inside = owner.name if owner is not None and path.name != owner.archive else None

    def is_wanted(name: str) -> bool:
        place = PurePosixPath(name)
        return place.name == member and (inside is None or inside in place.parts[:-1])

    found: dict[str, bytes] = {}
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as packed:
            for name in packed.namelist():
                if is_wanted(name):
                    found[name] = packed.read(name)
    else:
        with tarfile.open(path) as archive:
            for info in archive:
                if is_wanted(info.name) and (content := archive.extractfile(info)) is not None:
                    found[info.name] = content.read()
            # The checksum of what was unpacked stands at the file's end.
            while archive.fileobj is not None and archive.fileobj.read(1 << 20):
                pass
    if len(found) != 1:
        wanted = f"{inside}/{member}" if inside else member
        problem = f"{path} must hold one {wanted}; it holds {len(found)}: {', '.join(found) or 'none'}."
        raise UserError(problem) if found else Missing(problem)
    [(name, data)] = found.items()
    return data, f"{path}:{name}"


def download(dataset: Files, folder: Path | None = None) -> Path:
    """Download a data set's official archive, continuing where an interrupted download stopped.

    What arrives is kept in the file ARCHIVE.part beside it until it is complete and verified. If several processes download
    the same archive at once, one does the work and the others wait for it.

    Args:
        dataset: the data set's files.
        folder: where the archive goes; default is the cache that `resolve_data(None)` looks into.

    Returns:
        The archive's path; it appears under this name only complete and verified.

    Raises:
        UserError: there is no connection, the answer is not the archive, or its checksum is wrong; what had arrived before is
            kept.
        OSError: the folder or the file cannot be written.
    """
    folder = folder or cache_dir() / "data"
    target, partial = folder / dataset.archive, folder / f"{dataset.archive}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(target):
            if not target.exists() or _sha256(target) != dataset.sha256:
                _fetch(dataset, partial)
                sync(partial)
                partial.replace(target)
                sync(folder)
    except requests.RequestException as error:
        raise UserError(
            f"The download of {dataset.url} failed ({type(error).__name__}: {error}); "
            f"what arrived is kept, the same command goes on from there. A copy placed at {target} works as well."
        ) from error
    return target


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Let one process at a time work on a file; the others say that they wait."""
    lock = FileLock(f"{target}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        tqdm.write(f"Another process is fetching {target}; waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch(dataset: Files, partial: Path) -> None:
    """Complete `partial` and verify it; a wrong answer does not destroy what had arrived before."""
    start = partial.stat().st_size if partial.exists() else 0
    # Without `identity` a server may compress its answer, and ranges would count compressed bytes.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with requests.get(dataset.url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
        complete = start and response.status_code == requests.codes.requested_range_not_satisfiable
        if not complete:
            _receive(response, partial, start)
    digest = _sha256(partial)
    if digest == dataset.sha256:
        return
    if complete or not start:
        partial.unlink()
        kept = "it has been removed"
    else:
        os.truncate(partial, start)
        kept = f"{partial} is as it was before; if this happens again, remove that file to start from the beginning"
    raise UserError(
        f"{dataset.url} gave a file with SHA-256 {digest}, expected {dataset.sha256}: it is damaged or was changed; {kept}."
    )


def _receive(response: requests.Response, partial: Path, start: int) -> None:
    """Write an answer behind the `start` bytes that the file has already; if the server sends these again, they must be equal."""
    response.raise_for_status()
    kind = response.headers.get("Content-Type", "")
    if "html" in kind:
        raise requests.RequestException(f"{response.url} answered with {kind}, perhaps the login page of a network")
    place = 0
    if response.status_code == requests.codes.partial_content:
        place = start
        if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise requests.RequestException(f"{response.url} answered with another part than the one asked for")
    length = response.headers.get("Content-Length", "")
    total = place + int(length) if length.isdecimal() else None
    with (
        partial.open("r+b" if start else "w+b") as file,
        tqdm(total=total, initial=place, unit="B", unit_scale=True, desc=partial.stem) as progress,
    ):
        file.seek(place)
        for chunk in response.iter_content(1 << 16):
            known = file.read(min(len(chunk), max(start - place, 0)))
            if not chunk.startswith(known):
                raise requests.RequestException(f"{response.url} answered with something else than what {partial} has")
            file.write(chunk[len(known) :])
            place += len(chunk)
            progress.update(len(chunk))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
