"""What every shipped kernel needs of a GPU, read from its machine code: registers, memory, matrix instructions. No GPU is needed.

    python -m empcause.benchmarks.resources                 compiles everything, rewrites benchmarks/results/resources.csv and .md
    python -m empcause.benchmarks.resources --check         compiles everything; exit code 1 if limits break or figures are worse
    python -m empcause.benchmarks.resources --check --dtypes bf16 fp32    without fp16, whose kernels differ little from bf16's
    python -m empcause.benchmarks.resources --check --fast  a part, in about half a minute

It needs the sources: an editable install.

Limits: no local memory (spills, stacks), matrix instructions in every kernel with products of 16-bit numbers, and registers and
shared memory that let the planned number of blocks share a multiprocessor. Figures are compared with the committed table if the
same compiler made it; another compiler's only have to keep the limits.
"""

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import astuple, dataclass, fields
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # read when kernels are imported: there would be nothing to compile

import triton
from tqdm import tqdm

from empcause.kernels import aot
from empcause.kernels.configurations import configuration

TABLE = Path(__file__).parent / "results" / "resources.csv"
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

MATRIX_INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA")
ASYNC_COPIES = ("LDGSTS", "UBLKCP", "UTMALDG")
LOCAL_ACCESSES = ("LDL", "STL")
WITH_PRODUCTS = ("forward", "decode", "backward_keys", "backward_queries")
WITHOUT_PRODUCTS = ("weights", "merge", "grad_cause")


@dataclass(frozen=True)
class Figures:
    """One compiled kernel.

    Attributes:
        backend: "triton" or "cuda".
        options: what it was compiled for, in words.
        arch: compute capability, as in sm_80.
        registers: per thread.
        local_bytes: per thread; what is spilled or indexed at run time.
        shared_bytes: per block, static and dynamic.
        threads: per block.
        planned_blocks, possible_blocks: on one multiprocessor; planned by the configuration, possible by the figures.
        matrix_instructions, async_copies: in the machine code, with the name of the former.
    """

    backend: str
    kernel: str
    dtype: str
    head_dim: int
    options: str
    arch: int
    registers: int
    local_bytes: int
    shared_bytes: int
    threads: int
    planned_blocks: int
    possible_blocks: int
    matrix_instructions: str
    async_copies: int
    compiler: str

    @property
    def key(self) -> tuple[str, ...]:
        return self.backend, self.kernel, self.dtype, str(self.head_dim), self.options, str(self.arch)

    def __str__(self) -> str:
        return f"{self.backend} {self.kernel} {self.dtype} {self.head_dim} {self.options or 'plain'} sm_{self.arch}"


# --- What a multiprocessor has (CUDA programming guide, technical specifications per compute capability).

REGISTERS, REGISTER_UNIT = 65536, 256
WARPS = {80: 64, 90: 64, 100: 64, 120: 48}
BLOCKS = {80: 32, 90: 32, 100: 32, 120: 24}
SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024, 120: 100 * 1024}
SHARED_RESERVED = 1024  # per block, by the system
TENSOR_COLUMNS = 512  # of tensor memory, sm_100


def possible_blocks(arch: int, registers: int, threads: int, shared_bytes: int, tensor_columns: int = 0) -> int:
    """Blocks that fit one multiprocessor at a time."""
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    limits = [
        BLOCKS[arch],
        WARPS[arch] // warps,
        REGISTERS // per_warp // warps,
        SHARED_BYTES[arch] // (shared_bytes + SHARED_RESERVED),
    ]
    if tensor_columns:
        limits.append(TENSOR_COLUMNS // tensor_columns)
    return min(limits)


# --- Reading machine code.


def tool(name: str) -> str:
    """A tool of the CUDA toolkit: the one that comes with triton."""
    return str(NVIDIA_TOOLS / name)


def run(*command: str) -> str:
    """Output of a command.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def resource_usage(text: str) -> dict[str, tuple[int, int, int]]:
    """Registers, local bytes and static shared bytes of each function, from `cuobjdump -res-usage`."""
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    return {name: (int(reg), int(stack) + int(local), int(shared)) for name, reg, stack, shared, local in found}


def instructions(text: str) -> dict[str, Counter[str]]:
    """Number of instructions of each name in each function, from `cuobjdump -sass`."""
    found: dict[str, Counter[str]] = {}
    for part in re.split(r"^\s*Function : ", text, flags=re.MULTILINE)[1:]:
        names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", part, flags=re.MULTILINE)
        found[part.split(maxsplit=1)[0]] = Counter(names)
    return found


def read_code(path: Path) -> dict[str, tuple[int, int, int, str, int]]:
    """Registers, local bytes, static shared bytes, matrix instructions and asynchronous copies of each function in a cubin."""
    usage, code = run(tool("cuobjdump"), "-res-usage", str(path)), run(tool("cuobjdump"), "-sass", str(path))
    counted, found = instructions(code), {}
    for name, (registers, local, shared) in resource_usage(usage).items():
        counts = counted[name]
        if not local and any(counts[access] for access in LOCAL_ACCESSES):
            raise RuntimeError(f"{name} accesses local memory, but none is reported: the report was read wrongly.")
        matrix = " ".join(f"{kind} {counts[kind]}" for kind in MATRIX_INSTRUCTIONS if counts[kind])
        found[name] = registers, local, shared, matrix, sum(counts[copy] for copy in ASYNC_COPIES)
    return found


# --- Triton.


@cache
def triton_compiler(arch: int) -> str:
    """Versions that decide the code: triton's and its assembler's."""
    return f"triton {triton.__version__}, ptxas {release('ptxas-blackwell' if arch >= 100 else 'ptxas')}"


def release(name: str) -> str:
    """Release of a tool of the CUDA toolkit."""
    found = re.search(r"release [\d.]+, V([\d.]+)", run(tool(name), "--version"))
    return found.group(1) if found else "unknown"


def triton_figures(variant: aot.Variant, arch: int) -> list[Figures]:
    """Compile a variant and read it."""
    kernel = aot.compiled(variant, arch)
    metadata = kernel.metadata
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        (registers, local, _, matrix, copies), *_ = read_code(Path(file.name)).values()
    threads = 32 * metadata.num_warps
    possible = possible_blocks(arch, registers, threads, metadata.shared, metadata.tmem_size or 0)
    planned = 1
    if variant.kernel not in WITHOUT_PRODUCTS:  # which have one configuration, without a plan
        dtype, dropout = aot.DTYPES[variant.dtype], "dropout" in variant.options
        planned = configuration(variant.kernel, variant.head_dim, dtype, arch, dropout).blocks_per_sm
    figures = Figures(
        backend="triton",
        kernel=variant.kernel,
        dtype=variant.dtype,
        head_dim=variant.head_dim,
        options=variant.options,
        arch=arch,
        registers=registers,
        local_bytes=local,
        shared_bytes=metadata.shared,
        threads=threads,
        planned_blocks=planned,
        possible_blocks=possible,
        matrix_instructions=matrix,
        async_copies=copies,
        compiler=triton_compiler(arch),
    )
    return [figures]


# --- CUDA.

SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"


@cache
def cuda_compiler() -> str:
    """The toolkit's version."""
    found = re.search(r"release [\d.]+, V([\d.]+)", run("nvcc", "--version"))
    return f"nvcc {found.group(1) if found else 'unknown'}"


def headers() -> str:
    """The declarations of all kernels."""
    return "\n".join(f'#include "{path}"' for path in sorted(SOURCES.glob("*.h")))


def launch_constants(kernels: list[str], folder: Path) -> list[tuple[int, int, int]]:
    """Threads, planned blocks and dynamic shared bytes of kernel types, printed by a program that knows them."""
    source = folder / "constants.cu"
    prints = "\n".join(f"  print<{kernel}>();" for kernel in kernels)
    source.write_text(
        f"""{headers()}
#include <cstdio>
template <class Kernel>
void print() {{
  unsigned shared = 0;
  if constexpr (requires {{ Kernel::kSharedBytes; }}) shared = Kernel::kSharedBytes;
  std::printf("%d %d %u\\n", Kernel::kThreads, Kernel::kMinBlocks, shared);
}}
int main() {{
{prints}
}}
"""
    )
    run("nvcc", "-std=c++20", "-o", str(folder / "constants"), str(source))
    lines = run(str(folder / "constants")).splitlines()
    return [tuple(map(int, line.split())) for line in lines]  # type: ignore[misc]


def cuda_figures(source: str, dtype: str, arch: int) -> list[Figures]:
    """Compile C++ for a dtype and read its kernels."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unit, cubin = folder / "kernels.cu", folder / "kernels.cubin"
        unit.write_text(source)
        flags = ("-std=c++20", "-O3", f"-arch=sm_{arch}", f"-DEMPCAUSE_DTYPE={dtype}")
        run("nvcc", *flags, "-cubin", "-o", str(cubin), str(unit))
        found = read_code(cubin)
        # void empcause::cuda::run<KERNEL>(KERNEL::Arguments)
        signatures = run("c++filt", *found).splitlines()
        kernels = [re.search(r"<(.*)>\(", signature).group(1).strip() for signature in signatures]  # type: ignore[union-attr]
        constants = launch_constants(kernels, folder)
    rows = []
    for kernel, code, (threads, planned, dynamic) in zip(kernels, found.values(), constants, strict=True):
        registers, local, static, matrix, copies = code
        # From sm_90 on, what the system reserves is counted where a kernel uses shared memory at all.
        shared = dynamic + max(0, static - (SHARED_RESERVED if arch >= 90 else 0))
        possible = possible_blocks(arch, registers, threads, shared)
        name, head_dim, options = kernel_of(kernel)
        figures = Figures(
            backend="cuda",
            kernel=name,
            dtype=dtype,
            head_dim=head_dim,
            options=options,
            arch=arch,
            registers=registers,
            local_bytes=local,
            shared_bytes=shared,
            threads=threads,
            # The plan is made for the shared memory of sm_80 and newer data center GPUs; with that of sm_120, a block must fit.
            planned_blocks=1 if arch == 120 else planned,
            possible_blocks=possible,
            matrix_instructions=matrix,
            async_copies=copies,
            compiler=cuda_compiler(),
        )
        rows.append(figures)
    return rows


def kernel_of(kernel: str) -> tuple[str, int, str]:
    """Kernel, head size and options by a kernel's C++ type, as in BackwardKeysKernel<T, 64, true>. The flag is for dropout; what
    knows no head size has 0."""
    name, _, parameters = kernel.removeprefix("empcause::cuda::").partition("<")
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", name.removesuffix("Kernel")).lower()
    numbers = re.findall(r"\b\d+\b", parameters)
    return name, int(numbers[0]) if numbers else 0, "dropout" if "true" in parameters else ""


# --- Judging.


def broken_limits(figures: Figures) -> Iterator[str]:
    """Limits that a kernel breaks, whatever compiled it."""
    if figures.local_bytes:
        yield f"{figures}: {figures.local_bytes} bytes of local memory per thread"
    if figures.dtype != "fp32" and figures.kernel in WITH_PRODUCTS and not figures.matrix_instructions:
        yield f"{figures}: no matrix instructions"
    if figures.possible_blocks < figures.planned_blocks:
        yield (
            f"{figures}: {figures.registers} registers and {figures.shared_bytes} bytes of shared memory allow "
            f"{figures.possible_blocks} of {figures.planned_blocks} planned blocks on a multiprocessor"
        )


def worse(figures: Figures, committed: Figures) -> Iterator[str]:
    """Figures that got worse since the table was committed."""
    for name in ("registers", "local_bytes", "shared_bytes"):
        if getattr(figures, name) > getattr(committed, name):
            yield f"{figures}: {name} rose from {getattr(committed, name)} to {getattr(figures, name)}"
    if figures.possible_blocks < committed.possible_blocks:
        yield f"{figures}: possible_blocks fell from {committed.possible_blocks} to {figures.possible_blocks}"
    if bool(committed.matrix_instructions) > bool(figures.matrix_instructions):
        yield f"{figures}: the matrix instructions are gone"


def read_table(path: Path) -> dict[tuple[str, ...], Figures]:
    """The committed table, by the rows' keys; empty if there is none yet."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        kinds: dict[str, Any] = {field.name: field.type for field in fields(Figures)}  # int or str
        rows = [Figures(**{name: kind(row[name]) for name, kind in kinds.items()}) for row in csv.DictReader(file)]
    return {row.key: row for row in rows}


def write_table(rows: list[Figures], path: Path) -> None:
    """One line per kernel."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Figures))
        writer.writerows(astuple(row) for row in rows)


def summary(rows: list[Figures]) -> str:
    """A table in Markdown of what trains GPT-2 in bf16, and decodes: registers, shared memory and blocks by architecture."""
    archs = sorted(SHARED_BYTES)
    lines = [
        "Registers per thread / KiB of shared memory per block / blocks that fit one multiprocessor; bf16, head size 64,",
        "with the options that take most registers. Written by `python -m empcause.benchmarks.resources`.",
        "",
        "| backend | kernel | " + " | ".join(f"sm_{arch}" for arch in archs) + " |",
        "|---|---|" + "---:|" * len(archs),
    ]
    chosen: dict[tuple[str, str], dict[int, Figures]] = {}
    for row in rows:
        if (row.dtype, row.head_dim) == ("bf16", 64) and row.kernel in WITH_PRODUCTS:
            found = chosen.setdefault((row.backend, row.kernel), {})
            found[row.arch] = max(found.get(row.arch, row), row, key=lambda figures: figures.registers)
    for (backend, kernel), found in sorted(chosen.items()):
        cells = (
            f"{row.registers} / {row.shared_bytes / 1024:.1f} / {row.possible_blocks}" if row else ""
            for row in map(found.get, archs)
        )
        lines.append(f"| {backend} | {kernel} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def judge(
    rows: list[Figures], committed: dict[tuple[str, ...], Figures], everything: bool
) -> tuple[list[str], list[str]]:
    """What is wrong, and what was not compared, with the reason.

    Args:
        rows: what was compiled.
        committed: the table.
        everything: all that is shipped was compiled, so that the table must not hold more.
    """
    wrong = [complaint for row in rows for complaint in broken_limits(row)]
    others: set[str] = set()
    for row in rows:
        if row.key not in committed:
            wrong.append(f"{row}: not in the table")
        elif row.compiler != committed[row.key].compiler:
            others.add(
                f"figures of {row.compiler} are not compared with the table, which is of {committed[row.key].compiler}"
            )
        else:
            wrong += worse(row, committed[row.key])
    compiled = {row.key for row in rows}
    backends = {row.backend for row in rows}
    if everything:
        wrong += [
            f"{row}: in the table, but not shipped"
            for key, row in committed.items()
            if key not in compiled and row.backend in backends
        ]
    return wrong, sorted(others)


# --- The whole.

Task = tuple[Callable[..., list[Figures]], tuple]


def perform(task: Task) -> list[Figures]:
    """Run a task, in a process of its own."""
    function, arguments = task
    return function(*arguments)


# What trains GPT-2 in bf16, and decodes.
FAST = {
    ("forward", "causal"),
    ("decode", "causal"),
    ("backward_keys", "causal cause_grad"),
    ("backward_queries", "causal"),
}
FAST_CUDA = (
    "ForwardKernel<BFloat16, 64, false>",
    "BackwardKeysKernel<BFloat16, 64, false>",
    "BackwardQueriesKernel<BFloat16, 64, false>",
)


def triton_tasks(fast: bool, dtypes: Collection[str]) -> Iterator[Task]:
    """All variants for all architectures, or the fast part."""
    for variant in aot.shipped():
        if variant.dtype not in dtypes:
            continue
        chosen = (variant.dtype, variant.head_dim) == ("bf16", 64) and (variant.kernel, variant.options) in FAST
        if chosen or not fast:
            yield from ((triton_figures, (variant, arch)) for arch in aot.ARCHITECTURES)


def cuda_tasks(fast: bool, dtypes: Collection[str]) -> Iterator[Task]:
    """All units for all architectures, or the fast part: a few kernels for sm_80."""
    if fast:
        for kernel in FAST_CUDA:
            kind = f"run<{kernel}>(const __grid_constant__ {kernel}::Arguments)"
            source = f"{headers()}\nnamespace empcause::cuda {{ template __global__ void {kind}; }}\n"
            yield cuda_figures, (source, "bf16", 80)
    else:
        # What knows no dtype computes in fp32.
        units = [("dispatch.cu", "fp32"), *(("kernels.cu", dtype) for dtype in dtypes)]
        for unit, dtype in units:
            yield from ((cuda_figures, (f'#include "{SOURCES / unit}"\n', dtype, arch)) for arch in SHARED_BYTES)


TASKS = {"cuda": cuda_tasks, "triton": triton_tasks}  # what takes longest first


def why_not(backend: str) -> str | None:
    """Why a backend cannot be compiled here."""
    needed = ("nvcc", "c++filt") if backend == "cuda" else ()
    missing = [name for name in needed if shutil.which(name) is None]
    return f"there is no {' and no '.join(missing)} to compile the {backend} kernels with" if missing else None


def compile_all(tasks: list[Task], processes: int = 2) -> list[Figures]:
    """Compile in several processes; the rows are in order, whichever were done first."""
    rows: list[Figures] = []
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        done = as_completed([pool.submit(perform, task) for task in tasks])
        for future in tqdm(done, total=len(tasks), desc="compiling", disable=None):
            rows += future.result()
    return sorted(rows, key=lambda row: (row.backend, row.kernel, row.dtype, row.head_dim, row.options, row.arch))


def main() -> int:
    """Compile, then write the table or check against it; the number of complaints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the table in place of writing it")
    parser.add_argument("--fast", action="store_true", help="a part only")
    parser.add_argument("--backend", choices=TASKS, help="one backend only")
    parser.add_argument("--dtypes", choices=aot.DTYPES, nargs="+", default=list(aot.DTYPES), help="these only")
    options = parser.parse_args()
    part = options.fast or len(set(options.dtypes)) < len(aot.DTYPES)
    if not options.check and (part or options.backend):
        parser.error("a part makes no table: --fast, --backend and --dtypes go with --check")
    backends = [options.backend] if options.backend else list(TASKS)
    for reason in filter(None, map(why_not, backends)):
        if not options.check:
            parser.error(reason)
        print(f"Left out: {reason}.")
    rows = compile_all(
        [task for name in backends if not why_not(name) for task in TASKS[name](options.fast, options.dtypes)]
    )
    if not options.check:
        write_table(rows, TABLE)
        TABLE.with_suffix(".md").write_text(summary(rows))
    wrong, skipped = judge(rows, read_table(TABLE), everything=not part)
    for line in (*skipped, *wrong):
        print(line)
    print(f"{len(rows)} kernels compiled, {len(wrong)} complaints")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main() > 0)
