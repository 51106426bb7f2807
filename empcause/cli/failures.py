"""Sentences in place of tracebacks, for errors whose cause is the machine, a file or the network and not a mistake of ours."""

import errno
import os
import re

from empcause.errors import UserError
from empcause.outputs import TORCH_SAVE_FAILED
from empcause.text import one_line

_DISK_FULL = "the disk is full; what was saved before is kept. Make room, then run the same command again."
_RIGHTS = "choose a place that you may read and write, or change its rights."
# What would work, by error number.
_ADVICE = {
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: _RIGHTS,
    errno.EIO: "the disk or network drive failed; use another one, and check what was read or written last.",
    errno.EISDIR: "it is a folder, and a file is expected.",
    errno.ENOTDIR: "a part of this path is a file, and a folder is expected.",
    errno.EEXIST: "it is a file, and a folder is expected; name another folder.",
    errno.ENAMETOOLONG: "choose a shorter name.",
    errno.EMFILE: "raise the limit of open files (ulimit -n).",
}
# What lowers the need for memory, by command.
_SMALLER = {
    "train": "lower --per_device_train_batch_size (and raise --gradient_accumulation_steps), --per_device_eval_batch_size or "
    "--max_length",
    "evaluate": "lower --batch_size or --max_new_tokens",
    "respond": "lower --max_new_tokens or say less",
    "chat": "lower --max_new_tokens or begin anew",
    "bench": "choose other --suites",
}


def sentence(error: BaseException, command: str) -> str | None:
    """Say in one sentence what went wrong.

    Args:
        error: what a command raised.
        command: the command's name, on which the advice depends.

    Returns:
        The sentence; None for a mistake of ours, whose traceback is needed.
    """
    if isinstance(error, UserError):
        return str(error)
    text = one_line(error)
    if isinstance(error, MemoryError) or re.search("out of memory|Cannot allocate memory", text):
        return f"out of memory; {_SMALLER.get(command, 'use a machine that has more')}."
    code = _number(error, text)
    if code in (errno.ENOSPC, errno.EDQUOT):
        return _DISK_FULL
    if isinstance(error, OSError) and error.filename is not None and code is not None:
        path = os.fsdecode(error.filename) if not isinstance(error.filename, int) else "a file"
        return f"{path}: {os.strerror(code)}; {_ADVICE[code]}" if code in _ADVICE else f"{path}: {os.strerror(code)}."
    if isinstance(error, OSError) or code is not None:
        return f"{text}; {_ADVICE[code]}" if code in _ADVICE else text
    if isinstance(error, UnicodeError):
        return f"some text is not valid UTF-8 ({text}); write it in UTF-8."
    if isinstance(error, ImportError) and not (error.name or "").startswith("empcause"):
        return f"{text}; install what is missing, or choose an option that does not need it."
    return None


def _number(error: BaseException, text: str) -> int | None:
    """The system's error number; exceptions of libraries that read and write weights have it only in their text."""
    if isinstance(error, OSError):
        return error.errno
    if found := re.search(r"\(os error (\d+)\)", text):  # safetensors and tokenizers
        return int(found[1])
    if TORCH_SAVE_FAILED.search(text):
        return errno.ENOSPC
    return next((code for code in (errno.ENOSPC, errno.EDQUOT, *_ADVICE) if os.strerror(code) in text), None)
