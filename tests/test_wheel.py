"""A wheel, away from the source tree: the compiled module and every data file are in it."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_wheel_works_from_another_folder(tmp_path):
    root = Path(__file__).parents[1]
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), str(root)], check=True)
    (wheel,) = tmp_path.glob("empcause-*.whl")
    target = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True)
    assert (target / "empcause" / "kernels").is_dir()
    # Without the site module the editable install of this environment is not on the path.
    packages = [str(target), *(path for path in sys.path if path.endswith("site-packages"))]
    code = (
        f"import sys; sys.path += {packages!r}; import empcause; assert {str(target)!r} in empcause.__file__; "
        "from empcause.data import load_dialogues; assert len(load_dialogues('train', 'sample')) >= 192; "
        "cpu = empcause.info()['cpu']; assert cpu.runs, cpu.reason; print('fine')"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("fine"), done.stderr
