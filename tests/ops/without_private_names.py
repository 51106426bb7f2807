"""A program that runs the operator in processes from each of which one private name of torch is missing, then all of them.

A road is a way to run the operator, for example compiled or within vmap. The program prints JSON that maps the missing name (or
"all") and the road to the outcome: "right", or the message of the RuntimeError that refused it. Any other exception ends it.
"""

import importlib
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

SHIM = Path(__file__).parents[2] / "empcause/ops/torch_internals.py"
NAMES = re.findall(r'(?:_find|@_private)\("(torch\.[\w.]+)"', SHIM.read_text(encoding="utf-8"))


def remove(missing):
    """Import `torch_internals`, which must not be imported yet, as if torch did not have these names."""
    found = importlib.import_module

    class Without:
        def __init__(self, name):
            self.name, self.module = name, found(name)

        def __getattr__(self, attribute):
            if f"{self.name}.{attribute}" in missing:
                raise AttributeError(attribute)
            return getattr(self.module, attribute)

    importlib.import_module = lambda name: Without(name) if name.startswith("torch") else found(name)
    try:
        found("empcause.ops.torch_internals")
    finally:
        importlib.import_module = found


def inputs():
    """Return query, key, value and cause of 2 samples, which are the first dimension."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 2, 2, 5, 8, generator=generator) for _ in range(3)] + [
        torch.rand(2, 2, 5, generator=generator)
    ]


def attention(backend, **options):
    from empcause.ops import biased_attention

    return lambda *tensors: biased_attention(*tensors, strength=0.5, backend=backend, **options)


def loss(backend):
    return lambda *tensors: attention(backend)(*tensors).square().sum()


def gradients(function, tensors):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    return torch.autograd.grad(function(*leaves), leaves)


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


SAMPLES = inputs()
ONE = [tensor[0] for tensor in SAMPLES]
OPTIONS = (1.0, None, None, None, None, 0, 0, True, 0.3, 0.0, None, None, True)


def saved_program():
    """Call the raw operator by its name before anything has loaded it, as a saved program does."""
    query = torch.empty(2, 3, 5, 4, device="meta")
    assert torch.ops.empcause_cpu.attention(query, query, query, None, *OPTIONS)[0].shape == query.shape


def eager():
    assert_close(attention("cpu")(*ONE), attention("reference")(*ONE))
    assert_close(gradients(loss("cpu"), ONE), gradients(loss("reference"), ONE))


def compiled():
    torch._dynamo.reset()
    graph = torch.compile(loss("cpu"), backend="aot_eager", fullgraph=True)
    assert_close(gradients(graph, ONE), gradients(loss("reference"), ONE))


def compiled_reference():
    torch._dynamo.reset()
    graph = torch.compile(loss("reference"), backend="aot_eager", fullgraph=True)
    assert_close(graph(*ONE), loss("reference")(*ONE))
    refuses(lambda: graph(*ONE[:3], torch.full_like(ONE[3], -9)), "cause must be finite")


def func_grad():
    assert_close(torch.func.grad(loss("cpu"), (0, 1, 2, 3))(*ONE), gradients(loss("reference"), ONE))


def vmap():
    assert_close(torch.vmap(attention("cpu"))(*SAMPLES)[1], attention("reference")(*(x[1] for x in SAMPLES)))


def vmap_reference():
    assert_close(torch.vmap(attention("reference"))(*SAMPLES)[1], attention("reference")(*(x[1] for x in SAMPLES)))
    wrong = SAMPLES[3].clone()
    wrong[1, 1, 2] = -9
    refuses(lambda: torch.vmap(attention("reference"))(*SAMPLES[:3], wrong), "cause must be finite")


def refuses(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


def forward_mode():
    """The kernels refuse forward mode, in the operator and in the raw operator; the reference supports it."""
    with forward_ad.dual_level():
        for place in range(4):
            dual = list(ONE)
            dual[place] = forward_ad.make_dual(ONE[place], ONE[place])
            assert forward_ad.unpack_dual(attention("reference")(*dual)).tangent is not None
            refuses(lambda dual=dual: attention("cpu")(*dual), "not forward mode")
            refuses(lambda dual=dual: torch.ops.empcause_cpu.attention(*dual, *OPTIONS), "not forward mode")
        strength = forward_ad.make_dual(torch.ones(2), torch.ones(2))
        refuses(lambda: attention_with(strength), "not forward mode")
    refuses(lambda: torch.func.jvp(attention("cpu"), tuple(ONE), tuple(ONE)), "forward mode")


def attention_with(strength):
    from empcause.ops import biased_attention

    return biased_attention(*ONE, strength=strength, backend="cpu")


def second_derivatives():
    leaves = [tensor.detach().requires_grad_() for tensor in ONE]
    (grad,) = torch.autograd.grad(loss("cpu")(*leaves), leaves[:1], create_graph=True)
    refuses(grad.sum().backward, "not second derivatives")


def forbidden_cause():
    for backend in ("cpu", "reference"):
        refuses(lambda backend=backend: attention(backend)(*ONE[:3], torch.full_like(ONE[3], -9)), "cause")


def chosen_backend():
    from empcause.ops import use_backend

    leaves = [tensor.detach().requires_grad_() for tensor in ONE]
    with use_backend("reference"):
        output = checkpoint(attention(None), *leaves, use_reentrant=False)
        assert torch.equal(output, attention("reference")(*ONE))
    got = torch.autograd.grad(output.square().sum(), leaves)
    for gradient, expected in zip(got, gradients(loss("reference"), ONE), strict=True):
        assert torch.equal(gradient, expected)


ROADS = {
    road.__name__: road
    for road in (
        saved_program,
        eager,
        compiled,
        compiled_reference,
        func_grad,
        vmap,
        vmap_reference,
        forward_mode,
        second_derivatives,
        forbidden_cause,
        chosen_backend,
    )
}
COMPILED = {"compiled", "compiled_reference"}  # They take long and run only without all names.


def outcome(road):
    """Return "right", or the first line of the error that refuses the road."""
    try:
        road()
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return "right"


def main():
    """Run all roads in one process per missing name, and print the outcomes."""
    import torch._dynamo  # once, before the processes are forked
    import torch._functorch.aot_autograd

    outcomes = {}
    for name in [*NAMES, "all"]:
        ours, theirs = os.pipe()
        child = os.fork()
        if not child:
            try:
                torch.set_num_threads(1)
                remove(NAMES if name == "all" else [name])
                found = {road: outcome(ROADS[road]) for road in ROADS if name == "all" or road not in COMPILED}
                os.write(theirs, json.dumps(found).encode())
            except BaseException as error:
                sys.excepthook(type(error), error, error.__traceback__)
                os._exit(1)
            os._exit(0)
        os.close(theirs)
        with os.fdopen(ours) as reading:
            found = reading.read()
        if os.waitpid(child, 0)[1]:
            sys.exit(f"without {name}: see above")
        outcomes[name] = json.loads(found)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
