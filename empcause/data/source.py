"""Where the data lies: the embedded sample, the user's copy in any usual packing, or a verified download."""

import gzip
import hashlib
import io
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import requests
from tqdm.auto import tqdm

from empcause.errors import UserError

SAMPLE = Path(__file__).parent / "sample"


@dataclass(frozen=True)
class Dataset:
    """An official dataset: its folder's name, the form of its files, and its archive's address and SHA-256."""

    name: str
    extension: str
    archive: str
    url: str
    sha256: str


EMPATHETIC_DIALOGUES = Dataset(
    "empatheticdialogues",
    "csv",
    "empatheticdialogues.tar.gz",
    "https://dl.fbaipublicfiles.com/parlai/empatheticdialogues/empatheticdialogues.tar.gz",
    "56f234d77b7dd1f005fd365bb17769cfe346c3c84295b69bc069c8ccb83be03d",
)
EMOCAUSE = Dataset(
    "emocause",
    "json",
    "emocause.zip",
    "https://drive.google.com/uc?id=1LR4B47Fna_l63G1X4DZtuttG-GrinnaY&export=download&confirm=t",
    "f490361039a98ae13a028ae3c7117ae94165fdbf771eb75d6026b63ec9d12a11",
)


def cache_dir() -> Path:
    """Folder of downloads and computed caches: `$EMPCAUSE_CACHE_DIR`, otherwise `~/.cache/empcause`."""
    return Path(os.environ.get("EMPCAUSE_CACHE_DIR") or Path.home() / ".cache" / "empcause")


def resolve_data(data: str | os.PathLike[str] | None) -> Path:
    """The folder (or archive) that `data` stands for.

    Args:
        data: "sample" for the embedded sample, a path, or None: `$EMPCAUSE_DATA_DIR`, otherwise what
            `empcause data download` fetched.

    Raises:
        UserError: nothing is there; the message says how to get it.
    """
    if data == "sample":
        return SAMPLE
    named = data or os.environ.get("EMPCAUSE_DATA_DIR")
    if named:
        path = Path(named).expanduser()
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


@contextmanager
def open_split(dataset: Dataset, split: str, data: str | os.PathLike[str] | None) -> Iterator[tuple[IO[str], str]]:
    """Open one split's file as UTF-8 text, whatever it is packed in.

    Looks for `NAME/SPLIT.EXT`, then `SPLIT.EXT`, each plain, `.gz` or `.xz`, then for the official archive.

    Args:
        dataset: `EMPATHETIC_DIALOGUES` or `EMOCAUSE`.
        split: "train", "valid" or "test".
        data: see `resolve_data`.

    Yields:
        The stream, and the file's name for messages.

    Raises:
        UserError: no such file, or a packed one that is cut short.
    """
    root, member = resolve_data(data), f"{split}.{dataset.extension}"
    for candidate in _candidates(root, dataset, member):
        if not candidate.is_file():
            continue
        try:
            binary, name = _open_binary(candidate, member)
            with binary, io.TextIOWrapper(binary, encoding="utf-8", newline="\n") as stream:
                yield stream, name
            return
        except (EOFError, lzma.LZMAError, gzip.BadGzipFile, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{candidate} is damaged or cut short: {error}; fetch it again.") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{candidate} is not UTF-8 text: {error}.") from error
    raise UserError(
        f"{root} has no {dataset.name}/{member} (plain, .gz or .xz) and no {dataset.archive}; "
        "see `empcause data download`."
    )


def _candidates(root: Path, dataset: Dataset, member: str) -> list[Path]:
    if root.is_file():
        return [root]
    plain = [folder / f"{member}{suffix}" for folder in (root / dataset.name, root) for suffix in ("", ".gz", ".xz")]
    return [*plain, root / dataset.archive, root / dataset.name / dataset.archive]


def _open_binary(path: Path, member: str) -> tuple[IO[bytes], str]:
    if path.name.endswith((".tar.gz", ".tgz", ".tar")):
        with tarfile.open(path) as archive:
            for info in archive:
                if Path(info.name).name == member and info.isfile():
                    content = archive.extractfile(info)
                    assert content is not None
                    return io.BytesIO(content.read()), f"{path}:{info.name}"
        raise UserError(f"{path} holds no {member}.")
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive_zip:
            for name in archive_zip.namelist():
                if Path(name).name == member and not name.startswith("__MACOSX"):
                    return io.BytesIO(archive_zip.read(name)), f"{path}:{name}"
        raise UserError(f"{path} holds no {member}.")
    if path.suffix == ".gz":
        return cast("IO[bytes]", gzip.open(path)), str(path)
    if path.suffix == ".xz":
        return lzma.open(path), str(path)
    return path.open("rb"), str(path)


def download(dataset: Dataset, folder: Path | None = None) -> Path:
    """Fetch a dataset's official archive, going on where an interrupted download stopped.

    Args:
        dataset: `EMPATHETIC_DIALOGUES` or `EMOCAUSE`.
        folder: where it goes; default is the cache that `resolve_data(None)` looks into.

    Returns:
        The archive's path; it appears under this name only complete and verified.

    Raises:
        UserError: no connection, a refusal of the server, or a wrong checksum (the file is then removed).
    """
    folder = folder or cache_dir() / "data"
    folder.mkdir(parents=True, exist_ok=True)
    target, partial = folder / dataset.archive, folder / f"{dataset.archive}.part"
    if target.exists() and _sha256(target) == dataset.sha256:
        return target
    try:
        _fetch(dataset.url, partial)
    except requests.RequestException as error:
        raise UserError(
            f"The download of {dataset.url} failed ({type(error).__name__}: {error}); "
            f"what arrived is kept, the same command goes on from there. A copy placed at {target} works as well."
        ) from error
    digest = _sha256(partial)
    if digest != dataset.sha256:
        partial.unlink()
        raise UserError(
            f"{dataset.url} gave a file with SHA-256 {digest}, expected {dataset.sha256}: it is damaged or was changed, "
            "and has been removed."
        )
    partial.replace(target)
    return target


def _fetch(url: str, partial: Path) -> None:
    start = partial.stat().st_size if partial.exists() else 0
    headers = {"Range": f"bytes={start}-"} if start else {}
    with requests.get(url, headers=headers, stream=True, timeout=30) as response:
        if response.status_code == requests.codes.requested_range_not_satisfiable:
            return  # it was complete already; the checksum decides
        response.raise_for_status()
        if response.status_code != requests.codes.partial_content:
            start = 0  # the server sends the whole file
        remaining = int(response.headers.get("Content-Length", 0))
        expected = start + remaining
        with (
            partial.open("ab" if start else "wb") as file,
            tqdm(total=expected or None, initial=start, unit="B", unit_scale=True, desc=partial.stem) as progress,
        ):
            for chunk in response.iter_content(1 << 16):
                file.write(chunk)
                progress.update(len(chunk))
    if remaining and partial.stat().st_size < expected:
        raise requests.ConnectionError(f"the connection ended after {partial.stat().st_size} of {expected} bytes")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
