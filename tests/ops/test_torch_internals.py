"""The private names of torch that the package uses still have their meaning, and their absence never gives wrong results."""

import ast
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import empcause
from empcause.integration.masks import biased_attention_mask
from empcause.ops import torch_internals
from ops.without_private_names import COMPILED, NAMES, ROADS

ROOT = Path(__file__).parents[2]
SHIM = ROOT / "empcause/ops/torch_internals.py"


class TestMeaning:
    """These tests fail if torch gives a private name another meaning, `test_the_installed_torch_has_it` if it is gone."""

    @pytest.mark.parametrize("name", NAMES)
    def test_the_installed_torch_has_it(self, name):
        assert name not in torch_internals.missing, f"torch {torch.__version__} has no fit {name}"

    def test_below_autograd(self):
        x = torch.ones(2, requires_grad=True)
        assert (2 * x).requires_grad
        with torch_internals.below_autograd():
            assert torch.is_grad_enabled()
            assert not (2 * x).requires_grad
        assert (2 * x).requires_grad

    def test_transforms_active(self):
        seen = []

        def look(x):
            seen.append(torch_internals.transforms_active())
            return x.sum()

        x = torch.ones(2)
        look(x)
        with forward_ad.dual_level():
            look(forward_ad.make_dual(x, x))
        assert seen == [False, False]
        torch.func.grad(look)(x)
        torch.vmap(look)(x)
        torch.func.jvp(look, (x,), (x,))
        assert seen[2:] == [True, True, True]

    @pytest.mark.parametrize("known", [True, False], ids=["private", "documented"])
    def test_forward_mode_active(self, known, monkeypatch):
        monkeypatch.setattr(torch_internals, "_has_level", known)
        x, seen = torch.ones(2), []

        def look(x):
            seen.append(torch_internals.forward_mode_active())
            return x.sum()

        look(x)
        torch.func.grad(look)(x)
        torch.func.jvp(look, (x,), (x,))
        torch.func.jvp(torch.vmap(look), (x,), (x,))
        with forward_ad.dual_level():
            look(x)
        look(x)
        assert seen == [False, False, True, True, True, False]

    def test_at_one_level(self):
        """An operator with its own backward formula works within (nested) `torch.func` transforms, where `apply` fails."""
        library = torch.library.Library("empcause_canary", "DEF")
        library.define("square(Tensor x) -> Tensor")
        library.impl("square", lambda x: x * x, "CompositeExplicitAutograd")
        square = torch.ops.empcause_canary.square.default

        class Square(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                with torch.enable_grad(), torch_internals.forward_mode_enabled(), torch_internals.below_autograd():
                    output = square(x)
                ctx.save_for_backward(x)
                return output

            @staticmethod
            def backward(ctx, grad):
                return 2 * ctx.saved_tensors[0] * grad

        formulas = {"forward": Square.forward, "backward": Square.backward}
        chosen = [torch_internals.at_one_level("Square", formulas)]
        library.impl("square", lambda x: chosen[0](x), "Autograd")
        x = torch.tensor(3.0)
        assert torch.func.grad(square)(x) == 6
        assert torch.func.grad(torch.func.grad(square))(x) == 2
        assert torch.vmap(torch.func.grad(square))(torch.stack([x, 2 * x])).tolist() == [6, 12]
        with pytest.raises(RuntimeError, match=r"jvp"):
            torch.func.jvp(square, (x,), (x,))
        chosen[0] = Square.apply
        with pytest.raises(RuntimeError):
            torch.func.grad(square)(x)

    def test_forward_mode_enabled(self):
        x = torch.ones(2)

        def tangent():
            return forward_ad.unpack_dual(2 * forward_ad.make_dual(x, x)).tangent

        with forward_ad.dual_level(), forward_ad._set_fwd_grad_enabled(False):
            assert tangent() is None
            with torch_internals.forward_mode_enabled():
                assert tangent().tolist() == [2, 2]
            assert tangent() is None

    def test_without_wrapper(self):
        operator, x = torch.ops.aten.add.Tensor, torch.ones(2)
        assert torch_internals.without_wrapper(operator) is not operator
        assert torch.equal(torch_internals.without_wrapper(operator)(x, x), 2 * x)

    def test_all_samples(self):
        x, seen = torch.arange(6.0).view(3, 2), []

        def look(sample):
            seen.append(torch_internals.all_samples(sample))
            return sample.sum()

        assert torch_internals.all_samples(x) is x
        torch.vmap(look)(x)
        torch.vmap(torch.func.grad(look))(x)
        assert len(seen) == 2
        assert all(torch.equal(samples, x) for samples in seen)

    def test_dispatch_modes_active(self):
        assert not torch_internals.dispatch_modes_active()
        for mode in (FakeTensorMode(), TorchDispatchMode()):
            with mode:
                assert torch_internals.dispatch_modes_active()
        assert not torch_internals.dispatch_modes_active()

    def test_assert_async(self):
        assert torch_internals.assert_async(torch.tensor(True), "message") is None
        with pytest.raises(RuntimeError, match=r"^message"):
            torch_internals.assert_async(torch.tensor(False), "message")

        def call(x):
            torch_internals.assert_async((x > 0).all(), "message")
            return 2 * x

        torch._dynamo.reset()
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        assert compiled(torch.ones(2)).tolist() == [2, 2]
        with pytest.raises(RuntimeError, match="message"):
            compiled(torch.zeros(2))

    def test_nodes_and_their_numbers(self):
        seen = []

        class Identity(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, grad):
                seen.append((torch_internals.current_node(), torch_internals.current_node().name()))
                return grad

        leaf = torch.ones((), requires_grad=True)
        before = torch_internals.next_node_number()
        output = Identity.apply(leaf)
        assert torch_internals.node_number(output.grad_fn) == before
        assert torch_internals.next_node_number() == before + 1
        assert torch_internals.current_node() is None
        output.backward()
        assert seen[0][1] == "IdentityBackward"
        assert torch_internals.node_number(seen[0][0]) == before
        assert torch_internals.current_node() is None
        numbers = []
        thread = threading.Thread(target=lambda: numbers.append(torch_internals.next_node_number()))
        thread.start()
        thread.join()
        assert numbers == [0], "each thread counts its own nodes"

    def test_load_on_first_use(self):
        calls, reasons = [], ["there is no file", None]

        def load():
            calls.append(True)
            return reasons[min(len(calls), 2) - 1]

        torch_internals.load_on_first_use("empcause_canary_of_loading", ["f"], load)
        namespace = torch.ops.empcause_canary_of_loading
        with pytest.raises(AttributeError):
            namespace.g  # noqa: B018
        assert not calls
        with pytest.raises(
            AttributeError, match=r"empcause_canary_of_loading has no operators here: there is no file\."
        ):
            namespace.f  # noqa: B018
        library = torch.library.Library("empcause_canary_of_loading", "DEF")
        library.define("f(Tensor x) -> Tensor")
        library.impl("f", torch.neg, "CPU")
        assert namespace.f(torch.ones(1)).item() == -1
        made = len(calls)
        assert namespace.f(torch.ones(1)).item() == -1
        assert len(calls) == made, "an operator that was found is not asked for again"
        assert str(namespace.f.default) == "empcause_canary_of_loading.f.default"
        assert namespace.f.default.__module__ == torch.ops.aten.add.Tensor.__module__.replace(
            "aten", "empcause_canary_of_loading"
        )

    def test_is_fake(self):
        with FakeTensorMode():
            assert torch_internals.is_fake(torch.ones(1))
        assert not torch_internals.is_fake(torch.ones(1))


@pytest.fixture(scope="module")
def outcomes():
    """Return, by private name and by road, the outcome in a process without this name (see without_private_names.py)."""
    command = [sys.executable, str(Path(__file__).with_name("without_private_names.py"))]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# By absent name, the roads that are refused with a pattern of the message; all other roads must give the right numbers.
IN_FUNC = {"func_grad": "functorch transforms"}
IN_VMAP = {"vmap_reference": "data-dependent"}
IN_CHECKPOINT = {"chosen_backend": "pass backend='reference' to the calls"}
REFUSED = {
    "torch._C._AutoDispatchBelowAutograd": IN_FUNC,
    "torch._functorch.autograd_function.enable_single_level_autograd_function": IN_FUNC,
    "torch.autograd.forward_ad._set_fwd_grad_enabled": IN_FUNC,
    "torch.autograd.function._SingleLevelFunction": IN_FUNC,
    "torch._C._functorch.is_functorch_wrapped_tensor": IN_VMAP,
    "torch._C._functorch.get_unwrapped": IN_VMAP,
    "torch._C._current_autograd_node": IN_CHECKPOINT,
    "torch._C._autograd._get_sequence_nr": IN_CHECKPOINT,
    "torch._C._FunctionBase": IN_CHECKPOINT,
    "all": {"compiled_reference": "data-dependent|Failed to trace", **IN_FUNC, **IN_VMAP, **IN_CHECKPOINT},
}


@pytest.mark.parametrize("name", [*NAMES, "all"])
@pytest.mark.skipif(not empcause.info()["cpu"].runs, reason="the CPU kernels are not built")
def test_without_it(outcomes, name):
    refused = {road: found for road, found in outcomes[name].items() if found != "right"}
    assert refused.keys() == REFUSED.get(name, {}).keys()
    for road, found in refused.items():
        assert re.search(REFUSED[name][road], found)
    assert outcomes[name].keys() >= ROADS.keys() - COMPILED


def test_fake_tensors_are_refused_where_they_cannot_be_told(monkeypatch):
    monkeypatch.setattr(torch_internals, "_fake", None)
    with FakeTensorMode(), pytest.raises(RuntimeError, match="KeyMask"):
        biased_attention_mask(1, 4, 4, attention_mask=torch.ones(1, 4, dtype=torch.bool))


# Private names that belong to transformers, argparse, threading or triton, not to torch.
OTHERS = frozenset(
    "_attn_implementation _from_config _global_mapping _init_weights _save_checkpoint _init_training_state _load_best_model "
    "_load_from_checkpoint _optionals _group_actions _DummyThread _active _SubParsersAction".split()
)


def private_names(source):
    """Yield line and text of every private name of torch in a module's source, and of attributes that may be torch's."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("torch.")]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and node.attr not in OTHERS:
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            names = [] if own else [f"{ast.unparse(node.value).split('.')[0]}.{node.attr}"]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = re.findall(r"\btorch(?:\.\w+)+", node.value)
        for name in names:
            if any(part.startswith("_") and not part.startswith("__") for part in name.split(".")[1:]):
                yield f"line {node.lineno}: {name}"


def test_private_names_are_used_in_one_module_alone():
    found = {}
    for folder in ("empcause", "kernels", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            if path != SHIM and (names := list(private_names(path.read_text(encoding="utf-8")))):
                found[str(path)] = names
    assert not found
    assert set(NAMES) <= {line.split(": ")[1] for line in private_names(SHIM.read_text(encoding="utf-8"))}, (
        "what looks finds"
    )


@pytest.mark.parametrize(
    "source",
    [
        "from torch._ops import OpOverload",
        "from torch.autograd.forward_ad import _current_level",
        "import torch._dynamo",
        "def f():\n    return torch._C._len_torch_dispatch_stack()",
        "from torch.autograd import forward_ad as f\nf._current_level",
        "call = overload._op",
        "getattr(sys.modules, 'torch._dynamo')",
    ],
)
def test_a_private_name_elsewhere_is_found(source):
    assert list(private_names(source))


def test_the_tested_versions_are_those_that_are_installed_for_the_tests():
    (version,) = re.findall(r"^TORCH_SPEC \?= torch==(\d+\.\d+)\.\d+$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert (version,) == torch_internals.TESTED_TORCH
    workflow = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    assert not re.search(r"torch[=<>~]=", workflow), "the workflow installs the Makefile's torch"


def test_info_says_whether_torch_is_tested():
    info = empcause.info()
    assert info.torch_is_tested == any(torch.__version__.startswith(f"{known}.") for known in info.tested_torch)
    (known,) = info.tested_torch
    tested = empcause.ops.Info("1", f"{known}.1+cpu", info.tested_torch, ())
    assert str(tested) == f"empcause 1, torch {known}.1+cpu (tested with {known})"
    other = empcause.ops.Info("1", f"{known}0.0", info.tested_torch, ())
    assert str(other) == f"empcause 1, torch {known}0.0 (tested with {known}, not with this one)"
    with pytest.raises(KeyError):
        info["gpu"]
