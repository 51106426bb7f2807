"""Takes each guard of the fault tests away in turn; the test that claims to need it must fail, and pass where none is taken.

    make guards              all guards
    make guards K=steer      those of tests whose name contains "steer"

Files of the product are not changed: the processes under test import a replaced text (removal/sitecustomize.py). A guard in
C++ is taken out of a copy from which the extension module is built anew.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import pybind11
from tqdm import tqdm

from csrc.building import build
from faults.kinds import FOLDER, ROOT, Guard, Kind, kinds

building = Lock()


def replacement(guard: Guard, folder: Path) -> dict[str, str]:
    """The variables that make removal/sitecustomize.py take a guard away, its text written to a folder."""
    text = guard.removed()
    if guard.path.endswith(".py"):
        (folder / "without.py").write_text(text, encoding="utf-8")
        replaced, by = (ROOT / guard.path).resolve(), folder / "without.py"
    else:
        source = folder / "source"
        shutil.copytree(ROOT / "csrc", source / "csrc")
        shutil.copy(ROOT / "CMakeLists.txt", source)
        (source / guard.path).write_text(text, encoding="utf-8")
        with building:
            build("_C", folder / "build", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", source=source)
        replaced, by = Path("_C"), next((folder / "build").glob("_C*.so"))
    return {"EMPCAUSE_REPLACED_FILE": str(replaced), "EMPCAUSE_REPLACEMENT_FILE": str(by)}


def judge(kind: Kind, guard: Guard | None) -> str | None:
    """Run a test alone, without one of its guards or (None) with all; None if it fails or passes as it must, otherwise what
    happened instead."""
    with tempfile.TemporaryDirectory() as folder:
        variables = {} if guard is None else replacement(guard, Path(folder))
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(FOLDER / "removal"), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"{ROOT}/{kind.test}"]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False
        )
    if (done.returncode == 0) if guard is None else (done.returncode == 1 and " failed" in done.stdout):
        return None
    removed = "with all guards" if guard is None else f"without {guard.path}\n{guard.text}"
    what = "the test passes" if done.returncode == 0 else f"pytest ended with {done.returncode}"
    return f"{kind.test}: {removed}\n{what}\n{done.stdout[-1500:]}"


def main() -> int:
    """Judge all guards, or those of the tests that -k names; 1 if one goes unnoticed, or a test fails with all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", default="", metavar="TEXT", help="only tests whose name contains this text")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="tests at a time")
    options = parser.parse_args()
    pairs = [(kind, guard) for kind in kinds() for guard in (None, *kind.guards) if options.k in kind.test]
    if not pairs:
        print(f"No fault test has {options.k!r} in its name.")
        return 1
    wrong = 0
    with ThreadPoolExecutor(options.jobs) as pool, tqdm(total=len(pairs), unit="test") as bar:
        for verdict in pool.map(lambda pair: judge(*pair), pairs):
            bar.update()
            if verdict is not None:
                wrong += 1
                bar.write(verdict)
    guards = sum(guard is not None for _, guard in pairs)
    print(
        f"{guards} guards removed in turn, {len(pairs) - guards} tests run with all; {wrong} judged otherwise than they must."
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
