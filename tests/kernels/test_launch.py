"""Launches that spare Triton's launcher use a compiled kernel only for what it was compiled for."""

import os
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.compiler import CompiledKernel  # noqa: E402

from empcause.kernels import launch  # noqa: E402

CPU = torch.device("cpu")
ROWS = torch.zeros(64)
ARGUMENTS = {"query": ROWS, "mask": None, "row_stride": 64, "scale": 0.5, "total_keys": 7, "threshold": 0, "BLOCK": 64}
ARGUMENTS |= {"CAUSAL": True}


class Compiled(CompiledKernel):
    """Stands for a compiled kernel, and notes its own launches."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *arguments: self.launches.append((grid, arguments))


class Kernel:
    """Stands for what `triton.jit` returns: Triton's launcher makes a compiled kernel, here for every launch."""

    def __init__(self):
        self.compiled, self.pre_run_hooks = [], []

    @staticmethod
    def fn(query, mask, row_stride, scale, total_keys, threshold, BLOCK, CAUSAL):
        """Has the parameters of a kernel."""

    def __getitem__(self, grid):
        def compile_and_launch(*arguments, **options):
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return compile_and_launch


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launch, "_compiled", {})
    return Kernel()


def run(kernel, programs=3, options=None, device=CPU, **changes):
    arguments = tuple((ARGUMENTS | changes).values())
    launch.launch(kernel, programs, arguments, options or {"num_warps": 4}, device)
    return arguments


def test_a_compiled_kernel_is_launched_again_with_its_grid_and_all_arguments(kernel):
    run(kernel)
    arguments = run(kernel, 5, query=torch.ones(16), row_stride=128, scale=0.25, total_keys=1, threshold=16)
    (compiled,) = kernel.compiled
    assert compiled.launches == [((5, 1, 1), arguments)]


@pytest.mark.parametrize(
    "change",
    [
        {"query": ROWS.half()},
        {"query": ROWS[1:]},
        {"query": None},
        {"mask": ROWS},
        {"row_stride": 1},
        {"row_stride": 65},
        {"row_stride": None},
        {"BLOCK": 128},
        {"BLOCK": None},
        {"CAUSAL": False},
        {"options": {"num_warps": 8}},
        {"options": {"num_warps": 4, "num_stages": 2}},
        {"device": torch.device("cuda", 1)},
    ],
    ids=lambda change: ", ".join(change),
)
def test_what_decides_about_the_code_leads_to_another_compiled_kernel(change, kernel):
    for _ in range(2):
        run(kernel)
        run(kernel, **change)
    first, second = kernel.compiled
    assert [len(first.launches), len(second.launches)] == [1, 1]


def test_a_stride_of_1_is_no_other_stride(kernel):
    for stride in (65, 1, 65, 1):
        run(kernel, row_stride=stride)
    assert [len(compiled.launches) for compiled in kernel.compiled] == [1, 1]


@pytest.mark.parametrize("knob", ["runtime.debug", "compilation.instrumentation_mode"])
def test_knobs_of_triton_lead_to_another_compiled_kernel(knob, kernel, monkeypatch):
    run(kernel)
    group, name = knob.split(".")
    monkeypatch.setattr(getattr(triton.knobs, group), name, True if name == "debug" else "iota")
    run(kernel)
    run(kernel)
    assert [len(compiled.launches) for compiled in kernel.compiled] == [0, 1]


@pytest.mark.parametrize("change", [{"total_keys": 2**31}, {"row_stride": 2**31}, {"scale": "0.5"}], ids=str)
def test_what_is_rare_is_left_to_triton(change, kernel):
    run(kernel)
    for _ in range(2):
        run(kernel, **change)
    assert len(kernel.compiled) == 3


def test_hooks_are_left_to_triton(kernel, monkeypatch):
    run(kernel)
    with monkeypatch.context() as patched:
        patched.setattr(triton.knobs.runtime, "add_stages_inspection_hook", lambda *_: ("", ""))
        run(kernel)
    kernel.pre_run_hooks.append(print)
    run(kernel)
    kernel.pre_run_hooks.clear()
    monkeypatch.setattr(launch, "KNOWN", False)
    run(kernel)
    assert len(kernel.compiled) == 4
    assert not any(compiled.launches for compiled in kernel.compiled)


def test_the_installed_triton_has_every_name():
    assert launch.KNOWN


def test_launches_of_triton_s_interpreter_are_not_kept(kernel, monkeypatch):
    monkeypatch.setattr(Kernel, "__getitem__", lambda self, grid: lambda *_, **__: None)
    run(kernel)
    assert not launch._compiled


CODE = """
import itertools
import torch
import triton
from empcause.kernels import aot, launch
from triton.runtime.driver import driver

# Triton is kept from compiling by a hook that takes the key of what it would compile.
found = []
triton.knobs.runtime.jit_cache_hook = lambda **given: found.append(given["key"]) or True
CPU = torch.device("cpu")

def tensors(argument):
    whole = torch.zeros(32, dtype=argument.dtype)
    return [whole, whole[1:], whole.double(), None]

changed = 0
for words in ("causal cause_grad", "causal packed", "unweighted causal", "causal dropout"):
    recorded = aot._launches(aot.Variant("forward", "bf16", 64, words), 90)
    driver.set_active(aot._Absent(90))
    for name, recorded_launch in recorded.items():
        kernel, options = recorded_launch.kernel, recorded_launch.options
        names = kernel.arg_names
        assert [kernel.arg_names[place] for place in kernel.constexprs] == [name for name in names if name.isupper()]
        base = [tensors(a)[0] if isinstance(a, torch.Tensor) else a for a in recorded_launch.arguments]
        ours_to_triton = {}
        for place, argument in enumerate(base):
            if isinstance(argument, torch.Tensor):
                others = tensors(argument)
            elif isinstance(argument, bool) or argument is None:
                others = [argument]
            elif isinstance(argument, int):
                others = [argument, 1, 2, 16, 48, 49, 2**31 - 1, 2**31, 2**40]
            else:
                others = [argument, argument * 2]
            for other in others:
                arguments = (*base[:place], other, *base[place + 1:])
                key = launch.compilation_key(kernel, arguments, options, CPU)
                kernel.warmup(*arguments, grid=(1,), **options)
                theirs = found.pop()
                if key is not None:
                    assert ours_to_triton.setdefault(key, theirs) == theirs, (name, names[place], other)
                changed += 1
        assert len(set(ours_to_triton.values())) > 5
print(changed, "launches have the key of Triton")
"""


def test_equal_keys_are_equal_for_triton():
    """For every argument of every kernel: where Triton would compile anew, the key is another one, or None."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "launches have the key of Triton" in done.stdout
