"""Ways to make things go wrong: other users, failing system calls, commands in processes of their own."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# As a user without rights: CI runs as root, whom no permission stops.
UNPRIVILEGED = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


@contextmanager
def unprivileged() -> Iterator[None]:
    """This process as such a user, which is quicker than a process of its own."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def failing(call: str, error: str, path: Path | str | None = None, when: str = "1+") -> tuple[str, ...]:
    """Prefix of a command whose system call fails, on one path or on any.

    Args:
        call: names of system calls, separated by commas ("write,pwrite64").
        error: as errno names it ("ENOSPC").
        path: a file or folder, where calls on it alone shall fail.
        when: which of these calls: "3" the third, "3+" from the third on.
    """
    where = () if path is None else ("-P", str(path))
    return ("strace", "-f", "-qq", "-o", os.devnull, *where, "-e", f"inject={call}:error={error}:when={when}")


def empcause(
    *arguments: str | Path, prefix: Sequence[str] = (), cwd: Path | None = None, timeout: float = 120, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run the console command in a process of its own, with these environment variables added."""
    command = [*prefix, sys.executable, "-m", "empcause", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=timeout, check=False
    )
