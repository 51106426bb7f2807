"""A wheel, away from the source tree: it has the compiled module and every data file, and all of its modules can be imported."""

import os
import site
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which a wheel of this tree was installed."""
    folder = tmp_path_factory.mktemp("wheel")
    pip, root = [sys.executable, "-m", "pip", "--quiet"], str(Path(__file__).parents[1])
    subprocess.run([*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", str(folder), root], check=True)
    (wheel,) = folder.glob("empcause-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


def run(installed, code, folder):
    """What a program prints that imports the package from the wheel, and all else from this environment."""
    # -S: without the site module, the editable install of this environment is not found.
    path = os.pathsep.join([str(installed), *site.getsitepackages()])
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_works_from_another_folder(installed, tmp_path):
    assert (installed / "empcause" / "kernels").is_dir()
    code = (
        "import empcause; print(empcause.__file__); "
        "from empcause.data import load_dialogues; assert len(load_dialogues('train', 'sample')) >= 192; "
        "cpu = empcause.info()['cpu']; assert cpu.runs, cpu.reason"
    )
    assert run(installed, code, tmp_path).strip() == str(installed / "empcause" / "__init__.py")


def test_every_module_of_the_wheel_can_be_imported(installed, tmp_path):
    for optional in ("triton", "matplotlib", "bert_score"):
        pytest.importorskip(optional)
    files = sorted((installed / "empcause").rglob("*.py"))
    # A __main__ is a command: imported, it would run.
    modules = [
        ".".join(path.relative_to(installed).with_suffix("").parts).removesuffix(".__init__")
        for path in files
        if path.name != "__main__.py"
    ]
    assert {"empcause.testing", "empcause.kernels.operators", "empcause.benchmarks.gpu"} <= {*modules}
    assert not [name for name in modules if name.split(".")[-1].startswith("test_")]
    code = f"import importlib\nfor name in {modules!r}: print(importlib.import_module(name).__file__)"
    assert run(installed, code, tmp_path).split("\n")[:-1] == [
        str(path) for path in files if path.name != "__main__.py"
    ]
