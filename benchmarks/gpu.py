"""Everything about the GPU backends that needs a GPU, in one command and less than eight minutes.

    python -m empcause.benchmarks.gpu FOLDER

Builds the CUDA backend if it is missing and its sources are there, checks both backends on the device, times attention beside its
peers and whole training steps of the generator beside stock GPT-2, and writes `gpu.csv`, `gpu_attention.png` and
`gpu_training_step.png` to the folder. What is wrong is not timed; what was not reached in the time is printed. The exit code is 1
if anything was wrong.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend

import empcause
from empcause.benchmarks import correctness, training_steps
from empcause.benchmarks.comparison import time_case
from empcause.benchmarks.figures import OURS, Row, write_csv
from empcause.benchmarks.gate import first_sentence
from empcause.benchmarks.gpu_report import machine, plot_all
from empcause.benchmarks.peers import Peer, peers
from empcause.benchmarks.shapes import CASES, Case
from empcause.benchmarks.timing import ROUNDS_SECONDS, Budget, Stopwatch, Timing
from empcause.benchmarks.training_steps import Texts
from empcause.ops.backends import load_cuda

# Seconds after the start at which each section ends; the report takes a few more.
BUILT, CHECKED, TIMED, TRAINED = 140.0, 165.0, 290.0, 455.0
# What a case of attention, and a training step (not compiled, compiled), need at least: checks, compiling, some rounds.
CASE_SECONDS, STEP_SECONDS = 8.0, (6.0, 60.0)
ROOT = Path(__file__).resolve().parents[1]  # of the sources, where this is an editable install
BUILD = ROOT / "build" / "cuda"

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "mem-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}

TEXTS = [
    Texts("16 texts of 64 to 256 tokens, padded", 16, 256),
    Texts("16 texts of 64 to 256 tokens, packed", 16, 256, packed=True),
    Texts("8 texts of 256 to 1,024 tokens, padded", 8, 1024),
    Texts("8 texts of 256 to 1,024 tokens, packed", 8, 1024, packed=True),
]


def start_build() -> subprocess.Popen[bytes] | None:
    """Build the CUDA backend for this GPU alone, in the background; None if it is there or cannot be built."""
    if empcause.info()["cuda"].runs:
        return None
    if not (ROOT / "CMakeLists.txt").exists():
        print("The CUDA backend is not built: its sources are not here, since the package was installed from a wheel.")
        return None
    major, minor = torch.cuda.get_device_capability()
    options = ["-DEMPCAUSE_CUDA=ON", "-DEMPCAUSE_BUILD_MODULE=OFF", f"-DCMAKE_CUDA_ARCHITECTURES={major}{minor}"]
    options.append(f"-DPython_EXECUTABLE={sys.executable}")
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}") or "cmake"
    configure = [cmake, "-S", str(ROOT), "-B", str(BUILD), "-DCMAKE_BUILD_TYPE=Release", *options]
    build = [cmake, "--build", str(BUILD), "--target", "empcause_cuda", "--parallel"]
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "build.log").open("w") as log:
        try:
            subprocess.run(configure, stdout=log, stderr=subprocess.STDOUT, check=True)
            return subprocess.Popen(build, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"The CUDA backend cannot be built here ({error}; {log.name}).")
            return None


def finish_build(build: subprocess.Popen[bytes] | None, budget: Budget) -> None:
    """Wait for the build and load what it made."""
    if build is None:
        return
    try:
        code = build.wait(timeout=max(1.0, budget.left()))
    except subprocess.TimeoutExpired:
        os.killpg(build.pid, signal.SIGTERM)  # the compilers too
        budget.skipped.append("building the CUDA backend: a second run goes on where this one stopped")
        return
    if code:
        print(f"The CUDA backend does not build: see {BUILD / 'build.log'}.")
    else:
        load_cuda(next(BUILD.rglob("libempcause_cuda.so")))


def check(backend: str, device: str, budget: Budget) -> int:
    """Run the correctness matrix on a backend and return how many cases are wrong."""
    cases = list(correctness.matrix())
    wrong = done = 0
    for case in cases:
        if budget.left() < 0:
            break
        try:
            verdict = correctness.judge(case, backend, device)
        except Exception as error:  # a compiler's too: the other cases are looked at all the same
            verdict = first_sentence(error)
        done += 1
        if verdict is not None:
            wrong += 1
            print(f"   {backend} is wrong: {verdict}, {case}", flush=True)
    if done < len(cases):
        budget.skipped.append(f"{len(cases) - done} of {len(cases)} cases of the matrix on {backend}")
    print(f"   {backend}: {done - wrong} of {done} cases right", flush=True)
    return wrong


def time_attention(
    cases: list[Case], candidates: list[Peer], device: str, stopwatch: Stopwatch, budget: Budget
) -> Iterator[Row]:
    """Time cases until the section's time is over; each has an equal share of what is left."""
    for index, case in enumerate(cases):
        if budget.allows(f"attention {case.name}, {case.dtype}", CASE_SECONDS):
            yield from time_case(case, candidates, device, stopwatch, budget.left() / (len(cases) - index))


def time_steps(
    texts: list[Texts], backends: list[str], sizes: dict[str, Any], device: str, stopwatch: Stopwatch, budget: Budget
) -> Iterator[Row]:
    """Check the generator's loss on each backend, then time training steps: not compiled, then compiled for the first batches."""
    verdicts: dict[tuple[str | None, bool], str | None] = {}
    for batch, compiled in [*((batch, False) for batch in texts), *((batch, True) for batch in texts[:2])]:
        for variant in training_steps.variants(backends, compiled):
            direction = "compiled step" if compiled else "step"
            if not budget.allows(f"{direction}, {batch.name}, {variant.name}", STEP_SECONDS[compiled]):
                continue
            identity = ("training step", batch.name, direction, variant.name, variant.backend is not None)
            key = variant.backend, batch.packed
            try:
                if variant.backend is not None and key not in verdicts:
                    smallest = next(other for other in texts if other.packed == batch.packed)
                    verdicts[key] = training_steps.judge(variant, smallest, sizes, device)
                verdict = verdicts.get(key)
                row = _time_step(variant, batch, sizes, device, stopwatch) if verdict is None else (None, None)
                yield Row(*identity, verdict or "ok", timing=row[0], peak_mib=row[1])
            except Exception as error:  # models refuse in many ways
                yield Row(*identity, f"does not run: {first_sentence(error)}")


def _time_step(
    variant: training_steps.Variant, batch: Texts, sizes: dict[str, Any], device: str, stopwatch: Stopwatch
) -> tuple[Timing, float | None]:
    torch.compiler.reset()
    with empcause.use_backend(variant.backend or "reference"):
        if stopwatch.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        model = training_steps.build(variant, sizes, device)
        tensors = training_steps.make_batch(batch, sizes["vocab_size"], device)
        step = training_steps.make_step(model, variant, tensors)
        timing = stopwatch.interleave({variant.name: step}, ROUNDS_SECONDS)[variant.name]
    return timing, torch.cuda.max_memory_allocated() / 2**20 if stopwatch.on_gpu else None


def report(rows: list[Row], facts: dict[str, str], folder: Path) -> None:
    """Write the results, and print ours and what was not timed."""
    write_csv(rows, facts, folder / "gpu.csv")
    plot_all(rows, facts, folder)
    for row in rows:
        if row.timing is None:
            print(f"   not timed: {row.case}, {row.peer}: {row.status}")
        elif OURS in row.peer:
            print(f"   {row.case}, {row.direction}, {row.peer}: {row.timing.median:.3f} ms")
    print(f"Results are in {folder}; {', '.join(f'{name} {value}' for name, value in facts.items())}")


def main(folder: Path) -> int:
    """Check, time and report what this machine's GPU does, and return how much was wrong."""
    if not torch.cuda.is_available():
        print("There is no CUDA device that torch can use here, so nothing was built, checked or timed.")
        return 0
    device, budget, stopwatch = "cuda", Budget(), Stopwatch("cuda")
    wrong, backends, rows = 0, [], []
    budget.begin("correctness of triton, while cuda is built", BUILT)
    build = start_build()
    for name in ("triton", "cuda"):
        if name == "cuda":
            finish_build(build, budget)
            budget.begin("correctness of cuda", CHECKED)
        if empcause.info()[name].runs:
            backends.append(name)
            wrong += check(name, device, budget)
    print(empcause.info())
    try:
        budget.begin("attention", TIMED)
        for row in time_attention(CASES, peers(backends, KERNELS), device, stopwatch, budget):
            rows.append(row)
        budget.begin("training steps", TRAINED)
        for row in time_steps(TEXTS, backends, training_steps.GPT2, device, stopwatch, budget):
            rows.append(row)
    finally:
        report(rows, machine(device), folder)
        for what in budget.skipped:
            print(f"   not reached: {what}")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the results, which are replaced there")
    sys.exit(main(parser.parse_args().folder) > 0)
