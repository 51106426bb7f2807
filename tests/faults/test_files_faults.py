"""Files that are replaced while the disk fails or the power goes."""

import os
import subprocess
import sys

import pytest

from faults.injection import failing
from faults.kinds import Guard, fault

WRITE = "import sys; from empcause.files import write_text; write_text(sys.argv[1], 'new')"


def write(path, prefix):
    command = [*prefix, sys.executable, "-B", "-c", WRITE, str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(("call", "error"), [("write", "ENOSPC"), ("fsync", "EIO"), ("rename", "EDQUOT")])
@fault(
    Guard("empcause/files.py", "temporary.open(", 'path.open("wb") if path.exists() else temporary.open('),
    Guard("empcause/files.py", "temporary.unlink(missing_ok=True)", "pass"),
    Guard("empcause/files.py", "os.fsync(file.fileno())", "pass"),
    cause="the disk is full or fails",
    place="any file that is written anew: metrics, reports, caches, downloads",
    promise="an error; the old file is whole, and no half one lies beside it",
)
def test_old_file_outlives_a_failed_write(tmp_path, call, error):
    path = tmp_path / "metrics.json"
    path.write_text("old")
    done = write(path, failing(call, error))
    assert done.returncode == 1
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["metrics.json"]


@fault(
    Guard("empcause/files.py", "            file.flush()\n            os.fsync(file.fileno())\n", ""),
    Guard("empcause/files.py", "    sync(path.parent)", "    pass"),
    cause="the power goes",
    place="just after a file was written anew",
    promise="the new file is there: its content is on the disk before its name is, and then its name",
)
def test_new_file_is_on_the_disk(tmp_path):
    path, log = tmp_path / "metrics.json", tmp_path / "log"
    done = write(path, ("strace", "-y", "-o", str(log), "-e", "trace=write,fsync,rename"))
    assert done.returncode == 0, done.stderr
    lines = log.read_text().splitlines()
    calls = [line.partition("(")[0] for line in lines if str(tmp_path) in line]
    assert calls == ["write", "fsync", "rename", "fsync"]
    assert f"<{tmp_path}>" in lines[-2], "the last one is the folder's"
    assert path.read_text() == "new"
