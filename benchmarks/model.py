"""What the hardware allows, counted and divided by data-sheet rates: a model of the kernels' time, never a measurement.

    python benchmarks/model.py      writes benchmarks/results/gpu_model.csv and gpu_model.png

For every shape of `shapes.py`, backend, pass and GPU it counts what the kernels do, tile by tile as they are configured: products
on the matrix units, exponentials, other instructions, bytes of shared memory and of HBM. Each is divided by its rate, and the
largest time is the bound. If everything overlapped perfectly, that would be the kernel's time; if matrix units, exponentials and
other instructions took turns, their sum would. A kernel lies between the two if nothing else holds it up: latencies, launches,
bank conflicts and clocks below the data sheet's are not in the model.
"""

import csv
import re
import sys
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from functools import cache
from pathlib import Path

import torch

from empcause.benchmarks.shapes import CASES, Case
from empcause.kernels.configurations import block_d, configuration

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class GPU:
    """Rates of a data sheet.

    Attributes:
        arch: compute capability, as in sm_80.
        sms: streaming multiprocessors.
        clock: boost clock in GHz (that of the tensor rate, where the two differ).
        tensor: dense bf16 and fp16 products with fp32 sums, TFLOP/s.
        hbm: TB/s.
        lanes: fp32 instructions per clock and multiprocessor.
    """

    name: str
    arch: int
    sms: int
    clock: float
    tensor: float
    hbm: float
    lanes: int
    # Per clock and multiprocessor: exponentials, and bytes from shared memory.
    exponentials: int = 16
    shared: int = 128


# Sources are in docs/GPU.md.
GPUS = (
    GPU("A100 SXM 80 GB", 80, sms=108, clock=1.41, tensor=312.0, hbm=2.039, lanes=64),
    GPU("H100 SXM", 90, sms=132, clock=1.83, tensor=989.4, hbm=3.35, lanes=128),
    GPU("B200", 100, sms=148, clock=1.86, tensor=2250.0, hbm=8.0, lanes=128),
)


@dataclass(frozen=True)
class Tile:
    """How a kernel cuts its work.

    Attributes:
        queries, keys: rows and columns of a tile of logits.
        shared_rows: rows that share one reading of the other operand from shared memory.
        width: columns of query, key and value that are worked on: the head size, padded.
        slices: programs that share a block of keys, each with its own columns of grad_key and grad_value.
    """

    queries: int
    keys: int
    shared_rows: int
    width: int
    slices: int = 1


@cache
def _cuda_tilings() -> dict[tuple[bool, int], str]:
    """The part of tiling.h for fp32 or not and each padded head size."""
    parts = re.split(r"struct Tilings<(true|false), (\d+)> {", (ROOT / "csrc" / "cuda" / "tiling.h").read_text())[1:]
    return {(parts[i] == "true", int(parts[i + 1])): parts[i + 2] for i in range(0, len(parts), 3)}


def tile(backend: str, kernel: str, case: Case, arch: int) -> Tile:
    """The tile of a kernel: "forward", "decode", "backward_keys" or "backward_queries"."""
    full = case.dtype == torch.float32
    if backend == "cuda":
        width = min(width for is_full, width in _cuda_tilings() if is_full == full and width >= case.dim)
        text = _cuda_tilings()[full, width]
        name = kernel.title().replace("_", "")
        found = re.search(rf"using {name} = Tiling<(\d+), (\d+), (\d+), \d+>", text)
        warps, row_tiles, columns = map(int, found.groups())
        rows = 16 * warps * row_tiles
        slices = int(re.search(r"kSlices = (\d+)", text).group(1)) if kernel == "backward_keys" else 1
        # A warp reads the other operand's tile for its own rows.
        shape = (columns, rows) if kernel == "backward_keys" else (rows, columns)
        return Tile(*shape, 16 * row_tiles, width, slices)
    chosen = configuration(kernel, case.dim, case.dtype, arch, case.dropout_p > 0)
    rows = chosen.block_n if kernel == "backward_keys" else chosen.block_m
    # mma is a warp's, wgmma a group's of four warps, tcgen05 a block's.
    units = {80: chosen.num_warps, 90: max(1, chosen.num_warps // 4), 100: 1}[arch]
    return Tile(chosen.block_m, chosen.block_n, max(16, rows // units), block_d(case.dim))


@dataclass
class Work:
    """What a kernel does, over all programs.

    Attributes:
        flops: multiplications and additions of the matrix products, padding and masked parts of tiles included.
        exponentials, instructions: exp2, and other fp32 or integer instructions per element.
        shared, hbm: bytes.
        programs: that could run side by side.
    """

    flops: float = 0.0
    exponentials: float = 0.0
    instructions: float = 0.0
    shared: float = 0.0
    hbm: float = 0.0
    programs: int = 0


# fp32 instructions per logit: a multiply-add, a select, maximum, difference, sum and half a conversion.
FORWARD_INSTRUCTIONS = 5.5
# A multiply-add, cap, select, times the weight, difference, product, gradient of the weight, two halves of a conversion.
KEYS_INSTRUCTIONS = 8.0
# A multiply-add, select, times the weight, difference, product and half a conversion.
QUERIES_INSTRUCTIONS = 5.5
# Ten rounds of Philox, two wide products and four exclusive ors each, for eight logits; comparison and select.
DROPOUT_INSTRUCTIONS = 10 * 6 / 8 + 2


def executed_tiles(queries: int, keys: int, cut: Tile) -> int:
    """Tiles of one head that hold at least one visible pair (causal, aligned at the last key)."""
    offset, tiles = keys - queries, 0
    for first in range(0, queries, cut.queries):
        last_key = min(keys, min(first + cut.queries, queries) + offset)
        tiles += -(-max(0, last_key) // cut.keys)
    return tiles


def _sequences(case: Case) -> list[int]:
    """Lengths that the kernels see: padding is work too, packed sequences have none."""
    return case.lengths if case.packed else [case.keys] * case.batch


def forward(case: Case, backend: str, arch: int) -> Work:
    """The forward pass. Decoding packs a group's heads into the rows of a tile and gives parts of the keys to many programs."""
    cut = tile(backend, "decode" if case.decoding else "forward", case, arch)
    size, work = case.dtype.itemsize, Work()
    heads = case.key_heads if case.decoding else case.heads
    for length in _sequences(case):
        queries = min(case.queries, length)
        tiles = executed_tiles(queries, length, cut) * heads
        logits = tiles * cut.queries * cut.keys
        work.flops += 4 * cut.width * logits
        work.exponentials += logits
        # Each tile also rescales the running output.
        work.instructions += (FORWARD_INSTRUCTIONS + cut.width / cut.keys + _dropout(case)) * logits
        work.shared += tiles * 2 * cut.keys * cut.width * size * (1 + cut.queries / cut.shared_rows)
        work.programs += tiles if case.decoding else heads * -(-queries // cut.queries)
        work.hbm += _bytes(case, queries, length, query_like=2, key_like=2, rows=1)
    return work


def backward(case: Case, backend: str, arch: int) -> Work:
    """The backward pass: delta, then `backward_keys`, then `backward_queries`. Both compute the logits, so that nothing is summed
    by atomics."""
    size, total = case.dtype.itemsize, Work()
    for kernel, instructions in (("backward_keys", KEYS_INSTRUCTIONS), ("backward_queries", QUERIES_INSTRUCTIONS)):
        cut = tile(backend, kernel, case, arch)
        kept, walked = (cut.keys, cut.queries) if kernel == "backward_keys" else (cut.queries, cut.keys)
        # query key and grad_output value, once per slice; then grad_value and grad_key, or grad_query.
        products = 2 * cut.slices + (2 if kernel == "backward_keys" else 1)
        programs = 0
        for length in _sequences(case):
            tiles = executed_tiles(length, length, cut) * case.heads
            logits = tiles * cut.queries * cut.keys
            total.flops += 2 * products * cut.width * logits
            total.exponentials += logits * cut.slices
            total.instructions += (instructions + _dropout(case)) * logits * cut.slices
            total.shared += tiles * walked * cut.width * size * (2 * cut.slices + products * kept / cut.shared_rows)
            programs += -(-length // kept) * (case.key_heads * cut.slices if kernel == "backward_keys" else case.heads)
        total.programs = min(total.programs or programs, programs)
    for length in _sequences(case):
        # delta reads two tensors like query, each kernel two like query and two like key; the results are written.
        total.hbm += _bytes(case, length, length, query_like=2 + 2 + 2 + 1, key_like=2 + 2 + 2, rows=5)
    return total


def _dropout(case: Case) -> float:
    return DROPOUT_INSTRUCTIONS if case.dropout_p else 0.0


def _bytes(case: Case, queries: int, keys: int, query_like: int, key_like: int, rows: int) -> float:
    """Each tensor once: what is read again comes from the L2 cache."""
    tensors = (query_like * case.heads * queries + key_like * case.key_heads * keys) * case.dim * case.dtype.itemsize
    return tensors + 4 * (rows * case.heads * queries + keys)


@dataclass(frozen=True)
class Estimate:
    """One line of the table: the work, microseconds of each resource, and what follows.

    Attributes:
        overlapped_us: the largest of them, that of the bound.
        serial_us: matrix units, exponentials and other instructions one after another, if that is longer.
        tflops: useful products per second if all overlaps; masked parts of tiles do not count, nor do those computed twice.
    """

    gpu: str
    backend: str
    case: str
    dtype: str
    direction: str
    executed_gflop: float
    exponentials: float
    hbm_bytes: float
    shared_bytes: float
    programs: int
    tensor_us: float
    exp2_us: float
    fp32_us: float
    shared_us: float
    hbm_us: float
    bound: str
    overlapped_us: float
    serial_us: float
    tflops: float


def estimate(case: Case, backend: str, direction: str, gpu: GPU) -> Estimate:
    """The model's answer for a case on a GPU; direction is "forward" or "backward"."""
    work = (forward if direction == "forward" else backward)(case, backend, gpu.arch)
    # Programs on fewer multiprocessors than there are leave the others idle.
    clocks = gpu.sms * min(1.0, work.programs / gpu.sms) * gpu.clock * 1e3  # per microsecond
    if case.dtype == torch.float32:  # products by fused multiply-adds, which no matrix unit does
        tensor = 0.0
        instructions = work.instructions + work.flops / 2
        shared = 0.0
    else:
        tensor = work.flops / (gpu.tensor * 1e6 * min(1.0, work.programs / gpu.sms))
        instructions, shared = work.instructions, work.shared
    times = {
        "tensor": tensor,
        "exp2": work.exponentials / (gpu.exponentials * clocks),
        "fp32": instructions / (gpu.lanes * clocks),
        "shared": shared / (gpu.shared * clocks),
        "hbm": work.hbm / (gpu.hbm * 1e6),
    }
    bound = max(times, key=times.__getitem__)
    useful = case.flops(direction)
    return Estimate(
        gpu.name,
        backend,
        case.name,
        str(case.dtype).removeprefix("torch."),
        direction,
        work.flops / 1e9,
        work.exponentials,
        work.hbm,
        work.shared if shared else 0.0,
        work.programs,
        *times.values(),
        bound,
        times[bound],
        max(times[bound], times["tensor"] + times["exp2"] + times["fp32"]),
        useful / times[bound] / 1e6,
    )


def published_case(length: int) -> Case:
    """The shapes of the published figures: 16k tokens, 32 heads of size 64."""
    return Case(f"published {16384 // length}x32x{length}x64", 16384 // length, 32, 32, length, length, 64)


@dataclass(frozen=True)
class Published:
    """Figures of others at head size 64, causal, fp16 or bf16, in TFLOP/s for sequences of 512, 1k, 2k, ... up to 16k tokens."""

    gpu: str
    direction: str
    name: str
    tflops: tuple[int | None, ...]


LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
# Read from the figures named in docs/GPU.md. FLOPs count as here: half of the square, backward two and a half times forward.
PUBLISHED = (
    Published("A100 SXM 80 GB", "forward+backward", "FlashAttention-2", (88, 119, 140, 156, 165, 171)),
    Published("A100 SXM 80 GB", "forward+backward", "PyTorch, not fused", (15, 16, 17, 18, 18, None)),
    Published("H100 SXM", "forward+backward", "FlashAttention-2", (141, 192, 232, 257, 273, 284)),
    Published("H100 SXM", "forward+backward", "PyTorch, not fused", (26, 29, 31, 32, 32, None)),
    Published("H100 SXM", "forward", "FlashAttention-2", (180, 229, 262, 284, 295, 299)),
    Published("H100 SXM", "forward", "Triton", (152, 291, 342, 363, 376, 363)),
    Published("H100 SXM", "forward", "cuDNN", (225, 288, 334, 363, 379, 388)),
    Published("H100 SXM", "forward", "FlashAttention-3", (197, 265, 371, 420, 460, 473)),
    Published("B200", "forward", "cuDNN (GB200 or GB300)", (None, 627, 826, 977, 1071, 1115)),
    Published("B200", "forward", "FlashAttention-4 (GB200 or GB300)", (None, 463, 706, 917, 1079, 1176)),
)


def tflops(case: Case, backend: str, direction: str, gpu: GPU) -> tuple[float, float]:
    """The model's TFLOP/s if nothing overlaps and if everything does; direction may also be "forward+backward"."""
    parts = [estimate(case, backend, part, gpu) for part in direction.split("+")]
    useful = sum(case.flops(part.direction) for part in parts) / 1e6
    return useful / sum(part.serial_us for part in parts), useful / sum(part.overlapped_us for part in parts)


def estimates() -> Iterator[Estimate]:
    """All lines of the table."""
    for gpu in GPUS:
        for case in (*CASES, *map(published_case, LENGTHS)):
            for backend in ("triton", "cuda"):
                for direction in ("forward",) if case.decoding else ("forward", "backward"):
                    yield estimate(case, backend, direction, gpu)


def write_csv(path: Path) -> None:
    """The table; figures to four digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Estimate))
        for line in estimates():
            writer.writerow(f"{value:.4g}" if isinstance(value, float) else value for value in astuple(line))


def plot(path: Path) -> None:
    """The model's range at the published shapes, with what others published."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys((entry.gpu, entry.direction) for entry in PUBLISHED))
    figure, grid = pyplot.subplots(1, len(panels), figsize=(4.0 * len(panels), 4.8), layout="constrained")
    place = range(len(LENGTHS))
    for axes, (name, direction) in zip(grid, panels, strict=True):
        gpu = next(gpu for gpu in GPUS if gpu.name == name)
        for backend, color in (("triton", "#DD8452"), ("cuda", "#4C72B0")):
            ranges = [tflops(published_case(length), backend, direction, gpu) for length in LENGTHS]
            low, high = zip(*ranges, strict=True)
            axes.fill_between(place, low, high, color=color, alpha=0.25, label=f"model of empcause {backend}")
        for entry, style in zip(
            (entry for entry in PUBLISHED if (entry.gpu, entry.direction) == (name, direction)), "os^D", strict=False
        ):
            known = [(spot, value) for spot, value in zip(place, entry.tflops, strict=True) if value is not None]
            axes.plot(
                *zip(*known, strict=True), marker=style, markersize=4, linewidth=1, color="0.25", label=entry.name
            )
        axes.set_xticks(place, ["512", "1k", "2k", "4k", "8k", "16k"])
        axes.set(title=f"{name}, {direction}", xlabel="tokens per sequence", ylim=(0, None))
        axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].set_ylabel("TFLOP/s, head size 64, causal")
    title = "Model from data-sheet rates (shaded: from nothing overlaps to everything does), and published figures of others"
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    write_csv(folder / "gpu_model.csv")
    plot(folder / "gpu_model.png")
