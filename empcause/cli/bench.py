"""`empcause bench`: attention on this GPU or CPU beside the other ways to it, and the models that attend with it."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from empcause.cli.numbers import number
from empcause.errors import UserError
from empcause.outputs import working_in
from empcause.ranges import NOT_NEGATIVE, POSITIVE, SHARE, Range

EPILOG = """\
Peers are checked against fp64 before they are timed. Compare ratios within a run: the machine's speed cancels there.

  empcause bench                                              on a GPU everything, on a CPU GPT-2's attention at all lengths
  empcause bench --output results                             a table, written as figures come, and plots
  empcause bench --output results --resume                    goes on where that run was stopped
  empcause bench --suites decoding dropout --dtypes fp32
  empcause bench --device cpu --suites all                    the CPU of a machine with a GPU
  empcause bench --compare old/cpu.csv new/cpu.csv            exit code 1 where a ratio fell

Suites on both: lengths, shapes, dropout, decoding, dialogues (attention by shape), overhead (the host's time of tiny calls),
memory, long (1k to 128k tokens). On a GPU also steps (training steps) and generation.
"""
# In the order of the results on a CPU; on a GPU the most important come first.
CPU_SUITES = ("lengths", "shapes", "dropout", "decoding", "dialogues", "overhead", "memory", "long")
GPU_SUITES = (*CPU_SUITES, "steps", "generation")
CPU_DTYPES, GPU_DTYPES = ("fp32", "bf16"), ("bf16", "fp16", "fp32")


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `empcause`."""
    parser = subparsers.add_parser(
        "bench",
        help="time attention on this machine beside its peers",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where torch sees a GPU")
    parser.add_argument("--suites", nargs="+", choices=(*GPU_SUITES, "all"), help="default: all on a GPU, else lengths")
    parser.add_argument(
        "--dtypes", nargs="+", choices=GPU_DTYPES, help="default: bf16, fp16 and fp32 on a GPU, else fp32 and bf16"
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        metavar="NAME",
        help="beside this package; all by default, on a CPU all but FlexAttention",
    )
    parser.add_argument("--threads", type=number(int, Range(1, 4096)), help="of torch on the CPU")
    parser.add_argument("--seconds", type=number(float, NOT_NEGATIVE), default=1.5, help="for each direction of a case")
    parser.add_argument(
        "--minutes",
        type=number(float, POSITIVE),
        default=float("inf"),
        help="on a GPU: nothing new is begun after these",
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write a CSV and plots there")
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument(
        "--overwrite_output_dir", action="store_true", help="replace the results of an earlier run in --output"
    )
    kept.add_argument("--resume", action="store_true", help="go on with the run whose results are in --output")
    parser.add_argument("--compare", type=Path, nargs=2, metavar="CSV", help="two earlier results; nothing is timed")
    parser.add_argument(
        "--tolerance", type=number(float, SHARE), default=0.15, help="of --compare, as a share of the ratio"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure, or compare two results; 1 if a ratio fell or a GPU's backend is wrong."""
    import torch

    if options.compare:
        from empcause.benchmarks.figures import compare

        old, new = options.compare
        fallen = compare(old, new, options.tolerance)
        print("\n".join(fallen) or "No case fell behind its peers.")
        return int(bool(fallen))
    if options.resume and options.output is None:
        raise UserError("--resume goes on with the run in --output; name that folder.")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    on_gpu = torch.cuda.is_available() if options.device is None else options.device == "cuda"
    return _on_gpu(options) if on_gpu else _on_cpu(options)


def _on_gpu(options: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available():
        raise UserError("There is no CUDA device that torch can use here, so nothing was checked or timed.")
    from empcause.benchmarks import gpu

    suites = gpu.SUITES if not options.suites or "all" in options.suites else options.suites
    with _results_of(options, gpu.FILES):
        rows = gpu.bench(
            suites,
            options.dtypes or GPU_DTYPES,
            options.peers,
            options.output,
            options.seconds,
            options.resume,
            options.minutes,
        )
    return int(gpu.count_wrong(rows) > 0)


def _on_cpu(options: argparse.Namespace) -> int:
    from empcause.cli.memory import keep_freed_memory
    from empcause.ops import info

    if not info()["cpu"].runs:
        raise UserError(f"The CPU backend does not run here: {info()['cpu'].reason}.")
    suites = CPU_SUITES if "all" in (options.suites or ()) else options.suites or ("lengths",)
    for kind, chosen, known in (("suite", suites, CPU_SUITES), ("dtype", options.dtypes or (), CPU_DTYPES)):
        for name in chosen:
            if name not in known:
                raise UserError(f"The {kind} {name} is measured on a GPU alone; on a CPU there are {', '.join(known)}.")
    from empcause.benchmarks import cpu

    keep_freed_memory()  # or whose results meet fresh pages is a matter of luck
    with _results_of(options, cpu.FILES):
        cpu.bench(suites, options.dtypes or CPU_DTYPES, options.peers, options.output, options.seconds, options.resume)
    return 0


@contextmanager
def _results_of(options: argparse.Namespace, files: Sequence[str]) -> Iterator[None]:
    """Keep the folder of the results, if there is one, from other processes and from being overwritten by mistake."""
    if options.output is None:
        yield
        return
    with working_in(options.output):
        overwrite = options.overwrite_output_dir or options.resume
        _keep_earlier_results([options.output / name for name in files], overwrite)
        yield


def _keep_earlier_results(paths: Sequence[Path], overwrite: bool) -> None:
    for path in paths:
        if path.is_symlink():
            raise UserError(f"{path} is a link, which is not written through; choose another --output.")
        if path.exists() and not overwrite:
            raise UserError(
                f"{path} is there already; choose another --output, go on with that run with --resume, or replace it with"
                " --overwrite_output_dir."
            )
