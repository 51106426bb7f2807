"""Derivatives of the operator are right, or refused by name, in every way that torch offers to compute them."""

import math

import pytest
import torch
from torch.autograd import forward_ad, functional
from torch.autograd.functional import hvp

from empcause.ops import biased_attention, biased_attention_varlen
from faults.kinds import Guard, fault

OPERATOR, REFERENCE = "empcause/ops/attention.py", "empcause/ops/reference.py"
FORMULAS, INTERNALS = "empcause/ops/registration.py", "empcause/ops/torch_internals.py"
PHILOX, BACKENDS = "empcause/ops/philox.py", ("cpu", "reference")


def tensors(dtype=torch.float32, samples=()):
    """Return query, key, value and cause: two sequences of 5 rows, which `attention` may pack as sequences of 4 and 6 rows."""
    generator = torch.Generator().manual_seed(0)
    shape = (*samples, 2, 2, 5, 8)
    heads = [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3)]
    return *heads, torch.rand((*samples, 2, 5), generator=generator, dtype=dtype)


def attention(packed, backend, **options):
    """Return the operator, packed or not, as a function of the four tensors that `tensors` makes."""
    if not packed:
        return lambda *inputs: biased_attention(*inputs, backend=backend, **options)
    sums = torch.tensor([0, 4, 10], dtype=torch.int32)
    bounds = {"cu_seqlens_q": sums, "cu_seqlens_k": sums, "max_seqlen_q": 6, "max_seqlen_k": 6}

    def call(query, key, value, cause):
        rows = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
        output = biased_attention_varlen(*rows, cause.flatten(), **bounds, backend=backend, **options)
        return output.unflatten(0, (2, 5)).transpose(1, 2)

    return call


def linear(call):
    """Return a loss that is linear in the output, so that its gradient at the output does not depend on the inputs."""
    weight = torch.linspace(-1, 1, 160).view(2, 2, 5, 8)
    return lambda *inputs: (call(*inputs) * weight.to(inputs[0].dtype)).sum()


def curved(call):
    return lambda *inputs: linear(call)(*inputs).sin() + call(*inputs).square().sum()


def gradients(loss, inputs):
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(loss(*leaves), leaves)


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def central_difference(function, inputs, tangents, step=1e-5):
    """Return the directional derivative of a function of fp64 tensors along the tangents, for each of its outputs."""
    ahead, behind = (
        function(*(x + sign * step * t for x, t in zip(inputs, tangents, strict=True))) for sign in (1, -1)
    )
    if isinstance(ahead, torch.Tensor):
        return (ahead - behind) / (2 * step)
    return tuple((a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True))


@fault(
    Guard(INTERNALS, "        with _single_level():\n", "        if True:\n"),
    Guard(OPERATOR, "transforms_active() or ", ""),
    cause="torch.func asks for gradients: grad, vjp, jacrev, also within torch.compile",
    place="biased_attention and biased_attention_varlen with kernels",
    promise="the gradients that backward() gives",
)
def test_gradients_within_torch_func():
    inputs, every = tensors(), (0, 1, 2, 3)
    for packed in (False, True):
        for options in ({}, {"dropout_p": 0.3, "seed": 7}):
            call = attention(packed, "cpu", **options)
            expected = gradients(curved(attention(packed, "reference", **options)), inputs)
            assert_close(torch.func.grad(curved(call), every)(*inputs), expected)
            output, backward = torch.func.vjp(call, *inputs)
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            assert_close(backward(output), torch.autograd.grad(call(*leaves), leaves, output))
        jacobian = torch.func.jacrev(call, every)(*inputs)
        assert_close(jacobian, functional.jacobian(call, inputs))
    torch._dynamo.reset()
    compiled = torch.compile(
        torch.func.grad(curved(attention(False, "cpu")), every), backend="aot_eager", fullgraph=True
    )
    assert_close(compiled(*inputs), gradients(curved(attention(False, "reference")), inputs))


@fault(
    Guard(OPERATOR, "transforms_active() or ", ""),
    cause="torch.vmap runs over samples, then gradients are asked for, of each sample or of their sum",
    place="biased_attention and biased_attention_varlen with kernels",
    promise="the gradients of a loop over the samples, dropout of each included",
)
def test_gradients_of_samples_with_vmap():
    inputs, every = tensors(samples=(3,)), (0, 1, 2, 3)
    for packed in (False, True):
        for options in ({}, {"dropout_p": 0.3, "seed": 7}):
            loss = curved(attention(packed, "cpu", **options))
            each = [
                gradients(curved(attention(packed, "reference", **options)), sample)
                for sample in zip(*inputs, strict=True)
            ]
            expected = tuple(torch.stack(grads) for grads in zip(*each, strict=True))
            assert_close(torch.vmap(torch.func.grad(loss, every))(*inputs), expected)
            assert_close(gradients(lambda *leaves, loss=loss: torch.vmap(loss)(*leaves).sum(), inputs), expected)
    query, key, value, causes = inputs
    loss = curved(attention(False, "cpu"))
    over_causes = torch.vmap(torch.func.grad(loss, 3), in_dims=(None, None, None, 0))(
        query[0], key[0], value[0], causes
    )
    for got, cause in zip(over_causes, causes, strict=True):
        assert_close(got, gradients(loss, (query[0], key[0], value[0], cause))[3])


@fault(
    Guard(
        PHILOX,
        "(seed & _MASK, (seed >> 32) & _MASK)",
        "(int(seed) & _MASK, int(seed) >> 32 & _MASK)",
    ),
    Guard(INTERNALS, "        while _is_wrapped(tensor):\n", "        while False:\n"),
    Guard(FORMULAS, "torch.library.register_vmap(name, _vmap(name, operator), lib=library)", "pass"),
    cause="samples of torch.vmap differ in what is no input of a gradient: seed, mask, offset, strength",
    place="biased_attention on every backend",
    promise="what a loop over the samples gives, without a warning of torch; a forbidden cause in one sample is refused",
)
def test_options_of_samples_with_vmap(capfd):
    query, key, value, cause = tensors()
    generator = torch.Generator().manual_seed(1)
    each = {
        "seed": torch.tensor([3, 4, 2**40]),
        "query_offset": torch.tensor([0, 1, -2]),
        "key_mask": torch.rand(3, 2, 5, generator=generator) > 0.4,
        "strength": torch.rand(3, 2, generator=generator),
    }
    for backend in BACKENDS:
        for name, values in each.items():

            def call(query, option, backend=backend, name=name):
                options = {name: option} | ({"dropout_p": 0.4} if name == "seed" else {})
                return biased_attention(query, key, value, cause, backend=backend, **options)

            queries = torch.stack([query, 2 * query, -query])
            expected = torch.stack([call(*sample) for sample in zip(queries, values, strict=True)])
            assert torch.equal(torch.vmap(call)(queries, values), expected), name
        causes = torch.stack([cause, cause])
        causes[1, 1, 2] = -3.0
        with pytest.raises(RuntimeError, match="cause"):
            torch.vmap(lambda cause, backend=backend: biased_attention(query, key, value, cause, backend=backend))(
                causes
            )
    assert "performance drop" not in capfd.readouterr().err


@fault(
    Guard(FORMULAS, "recorded or forward_mode_active():", "recorded:"),
    Guard(OPERATOR, " or forward_mode_active():\n        operator", ":\n        operator"),
    cause="derivatives are asked for in forward mode: jvp, jacfwd, hessian, linearize, dual tensors",
    place="biased_attention and biased_attention_varlen on every backend",
    promise="kernels refuse and name the reference, which has them right; no tangent is lost",
)
def test_forward_mode():
    inputs = tensors(torch.float64)
    tangents = tuple(torch.randn_like(tensor) for tensor in inputs)
    singles = [tensor.float() for tensor in inputs]

    def dual(call, inputs, tangents):
        with forward_ad.dual_level():
            output = call(*map(forward_ad.make_dual, inputs, tangents))
            return forward_ad.unpack_dual(output).tangent

    def jvp(call, inputs, tangents):
        return torch.func.jvp(call, inputs, tangents)[1]

    for packed in (False, True):
        expected = central_difference(attention(packed, "reference"), inputs, tangents)
        for road in (jvp, dual):
            got = road(attention(packed, "reference"), inputs, tangents)
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)
            with pytest.raises(RuntimeError, match=r'not forward mode .*backend="reference"'):
                road(attention(packed, "cpu"), tuple(singles), tuple(tangent.float() for tangent in tangents))
        loss = linear(attention(packed, "cpu"))
        for road in (
            torch.func.jacfwd(loss),
            torch.func.hessian(loss),
            lambda *x, loss=loss: torch.func.linearize(loss, *x),
        ):
            with pytest.raises(RuntimeError, match='backend="reference"'):
                road(*singles)


@fault(
    Guard(OPERATOR, "nullcontext() if torch.is_grad_enabled() else below_autograd()", "below_autograd()"),
    Guard(
        FORMULAS,
        "_register_derivatives(library, attention_backward, backward, None, once)",
        "pass",
    ),
    Guard(FORMULAS, "torch.enable_grad(), forward_mode_enabled(), ", ""),
    cause="second derivatives are asked for of a loss that is linear in the output: hvp, a gradient penalty, grad of grad",
    place="biased_attention and biased_attention_varlen on every backend",
    promise="kernels refuse and name the reference, which has them right; create_graph alone does no harm",
)
def test_second_derivatives():
    inputs = tensors(torch.float64)
    tangents = tuple(torch.randn_like(tensor) for tensor in inputs)
    singles = tuple(tensor.float() for tensor in inputs)

    def penalty(loss, inputs):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        (grad,) = torch.autograd.grad(loss(*leaves), leaves[:1], create_graph=True)
        assert torch.equal(grad, gradients(loss, inputs)[0])
        return torch.autograd.grad(grad.square().sum(), leaves)

    def grad_of_grad(loss, inputs):
        return torch.func.grad(lambda *x: torch.func.grad(loss)(*x).square().sum(), (0, 1, 2, 3))(*inputs)

    refused = pytest.raises(RuntimeError, match=r'not second derivatives; .*backend="reference"')
    for packed in (False, True):
        truth, kernels = linear(attention(packed, "reference")), linear(attention(packed, "cpu"))
        expected = central_difference(lambda *x, loss=truth: gradients(loss, x), inputs, tangents)
        got = hvp(truth, inputs, tangents)[1]
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(penalty(truth, inputs), grad_of_grad(truth, inputs))
        with refused:
            hvp(kernels, singles, tuple(tangent.float() for tangent in tangents))
        with refused:
            penalty(kernels, singles)
        with refused:
            grad_of_grad(kernels, singles)


@fault(
    Guard(OPERATOR, "    if strength.requires_grad and torch.is_grad_enabled():\n", "    if False:\n"),
    Guard(FORMULAS, "    if ctx.needs_input_grad[5]:\n", "    if False:\n"),
    cause="strength is learned: a tensor that requires a gradient",
    place="biased_attention on every backend, and the raw operators",
    promise="kernels refuse it, as they have no gradient of it, and name the reference, which has the right one",
)
def test_gradient_of_strength():
    query, key, value, cause = tensors(torch.float64)
    strength = torch.tensor([0.3, 0.8], dtype=torch.float64)

    def loss(strength):
        return biased_attention(query, key, value, cause, strength=strength, backend="reference").square().sum()

    (got,) = gradients(loss, (strength,))
    for head, tangent in enumerate(torch.eye(2, dtype=torch.float64)):
        torch.testing.assert_close(got[head], central_difference(loss, (strength,), (tangent,)), rtol=1e-6, atol=1e-8)
    inputs, learned = tensors(), strength.float().requires_grad_()
    with pytest.raises(ValueError, match="strength gets a gradient on backend="):
        biased_attention(*inputs, strength=learned, backend="cpu")
    with pytest.raises(RuntimeError, match="head_strength gets no gradient"):
        torch.ops.empcause_cpu.attention(
            *inputs, 1.0, learned, None, None, None, 0, 0, True, 0.3, 0.0, None, None, True
        )
    assert_close(
        biased_attention(*inputs, strength=learned.detach(), backend="cpu"),
        biased_attention(*inputs, strength=learned, backend="reference").detach(),
    )


@fault(
    Guard(REFERENCE, "    alive = total != 0  #", "    alive = total > 0  #"),
    Guard(
        REFERENCE,
        "torch.where(exponent > log_total + LARGEST_EXPONENT, log_total + LARGEST_EXPONENT, exponent)",
        "exponent.clamp(max=LARGEST_EXPONENT)",
    ),
    Guard(REFERENCE, "        x = torch.where(present[:, :, 0, :, None], x, 0.0)\n"),
    cause="NaN or infinity in a query, key, value or gradient of the output",
    place="biased_attention on every backend",
    promise="reference and kernels show it in the same outputs and gradients; what stands in masked keys changes none",
)
def test_values_that_are_not_finite():
    inputs, options = tensors(), {"strength": 0.5, "causal": False, "key_mask": torch.arange(5).ne(2).expand(2, 5)}
    grad_output = torch.linspace(-1, 1, 160).view(2, 2, 5, 8)

    def run(backend, place, index, bad):
        changed = [tensor.clone() for tensor in (*inputs, grad_output)]
        changed[place][0, 0, index, 1] = bad
        leaves = [tensor.requires_grad_() for tensor in changed[:4]]
        output = biased_attention(*leaves, **options, backend=backend)
        return output.detach(), *torch.autograd.grad(output, leaves, changed[4])

    clean = {backend: run(backend, 1, 3, inputs[1][0, 0, 3, 1]) for backend in BACKENDS}
    for bad in (math.nan, math.inf, -math.inf):
        for place in (0, 1, 2, 4):
            results = {backend: run(backend, place, 3, bad) for backend in BACKENDS}
            for reference, kernel in zip(results["reference"], results["cpu"], strict=True):
                assert torch.equal(reference.isfinite(), kernel.isfinite()), (place, bad)
            shown = [not result.isfinite().all() for result in results["cpu"]]
            assert shown == ([False] if place == 4 else [True]) + (
                [True] * 4 if place != 2 else [True, True, False, True]
            ), place
        for place in (1, 2):
            for backend in BACKENDS:
                for got, expected in zip(run(backend, place, 2, bad), clean[backend], strict=True):
                    assert torch.equal(got, expected), (backend, place, bad)
