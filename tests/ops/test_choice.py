"""`use_backend` chooses the backend that runs. The tests recognise the backend by the bits of its results."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.checkpoint import CheckpointError, checkpoint

import empcause
from empcause import biased_attention, biased_attention_varlen, use_backend
from empcause.testing import Case

pytestmark = pytest.mark.skipif(not empcause.info()["cpu"].runs, reason="the CPU kernels are not built")

TENSORS, OPTIONS = Case(queries=40, keys=40, dim=24).make()


def call(*tensors, **options):
    return biased_attention(*tensors, strength=0.5, **options)


def varlen(backend=None):
    rows = (tensor.transpose(1, 2).flatten(0, 1) for tensor in TENSORS[:3])
    sums = torch.tensor([0, 30, 80], dtype=torch.int32)
    bounds = {"cu_seqlens_q": sums, "cu_seqlens_k": sums, "max_seqlen_q": 50, "max_seqlen_k": 50}
    return biased_attention_varlen(*rows, TENSORS[3].flatten(), **bounds, backend=backend)


def leaves():
    return [tensor.detach().requires_grad_() for tensor in TENSORS]


def gradients(output, inputs):
    for leaf in inputs:
        leaf.grad = None
    output.square().sum().backward()
    return torch.cat([leaf.grad.flatten() for leaf in inputs])


def explicit(backend):
    inputs = leaves()
    output = call(*inputs, backend=backend)
    return output.detach(), gradients(output, inputs)


BY_BITS = {backend: explicit(backend) for backend in ("cpu", "reference")} if empcause.info()["cpu"].runs else {}


def ran(result):
    """Return the name of the backend whose output, or whose concatenated gradients, equal `result` bit for bit."""
    names = [name for name, bits in BY_BITS.items() if any(torch.equal(result, other) for other in bits)]
    assert len(names) == 1, "no backend's bits, or those of both"
    return names[0]


def test_calls_that_name_no_backend():
    assert ran(call(*TENSORS)) == "cpu"
    expected = varlen("reference")
    assert not torch.equal(varlen(), expected)
    with use_backend("reference"):
        assert ran(call(*TENSORS)) == "reference"
        assert torch.equal(varlen(), expected)
        inputs = leaves()
        output = call(*inputs)
    assert ran(gradients(output, inputs)) == "reference", "the backward pass is that of the forward pass"
    assert ran(call(*TENSORS)) == "cpu"


def test_an_explicit_backend_wins():
    with use_backend("reference"):
        assert ran(call(*TENSORS, backend="cpu")) == "cpu"
    with use_backend("cpu"):
        assert ran(call(*TENSORS, backend="reference")) == "reference"


def test_nested_contexts_and_exceptions():
    with use_backend("reference"):
        with pytest.raises(ValueError, match="must be a dense tensor"), use_backend("cpu"):
            call(*TENSORS[:2], None)
        assert ran(call(*TENSORS)) == "reference"
        with use_backend("reference"), use_backend("cpu"):
            assert ran(call(*TENSORS)) == "cpu"
        assert ran(call(*TENSORS)) == "reference"
    assert ran(call(*TENSORS)) == "cpu"


def test_contexts_that_overlap_without_being_nested_are_refused():
    first, second = use_backend("reference"), use_backend("cpu")
    first.__enter__()
    second.__enter__()
    with pytest.raises(RuntimeError, match=r"use_backend\('reference'\) was left before use_backend\('cpu'\)"):
        first.__exit__(None, None, None)
    assert ran(call(*TENSORS)) == "cpu"
    second.__exit__(None, None, None)
    assert ran(call(*TENSORS)) == "cpu"
    doubles = [tensor.double() for tensor in TENSORS]
    assert call(*doubles).dtype == torch.float64, "no choice is left behind, which the CPU's kernels would be"


def test_what_cannot_run_is_refused():
    with pytest.raises(RuntimeError, match="Unknown backend 'gpu'; expected one of cpu, triton, cuda, reference"):
        use_backend("gpu").__enter__()
    with pytest.raises(RuntimeError, match=r"Unknown backend \['cpu'\]; expected one of"):
        use_backend(["cpu"]).__enter__()
    doubles = [tensor.double() for tensor in TENSORS]
    with (
        use_backend("cpu"),
        pytest.raises(RuntimeError, match="'cpu' cannot run this: it takes fp32, bf16, fp16, not"),
    ):
        call(*doubles)
    assert call(*doubles).dtype == torch.float64
    if not empcause.info()["cuda"].built:
        with pytest.raises(
            RuntimeError, match="backend 'cuda' cannot run: this installation has no CUDA library; build"
        ):
            use_backend("cuda").__enter__()
        assert ran(call(*TENSORS)) == "cpu"


def test_a_compiled_graph_is_not_used_under_another_choice():
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)

    def both():
        inputs = leaves()
        output = compiled(*inputs)
        names = ran(output), ran(gradients(output, inputs))
        assert names[0] == names[1]
        return names[0]

    for _ in range(2):
        assert both() == "cpu"
        with use_backend("reference"):
            assert both() == "reference"
            with use_backend("cpu"):
                assert both() == "cpu"


def test_a_context_within_compiled_code():
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(*tensors):
        first = call(*tensors)
        with use_backend("reference"):
            second = call(*tensors)
            third = call(*tensors, backend="cpu")
        return first, second, third, call(*tensors)

    for _ in range(2):
        assert [ran(output) for output in compiled(*TENSORS)] == ["cpu", "reference", "cpu", "cpu"]
        assert ran(call(*TENSORS)) == "cpu"
        with use_backend("reference"):
            assert [ran(output) for output in compiled(*TENSORS)] == ["reference", "reference", "cpu", "reference"]


@pytest.mark.parametrize("use_reentrant", [False, True])
class TestCheckpointing:
    def test_what_is_computed_again_is_on_the_same_backend(self, use_reentrant):
        """The backward pass begins after the choice has changed, in either direction."""
        inputs = leaves()
        with use_backend("reference"):
            output = checkpoint(call, *inputs, use_reentrant=use_reentrant)
        assert ran(output.detach()) == "reference"
        assert ran(gradients(output, inputs)) == "reference"
        output = checkpoint(call, *inputs, use_reentrant=use_reentrant)
        with use_backend("reference"):
            assert ran(gradients(output, inputs)) == "cpu"
        with use_backend("reference"):
            output = checkpoint(call, *inputs, use_reentrant=use_reentrant)
            with use_backend("cpu"):
                assert ran(gradients(output, inputs)) == "reference"
        output = checkpoint(call, *inputs, use_reentrant=use_reentrant)
        assert ran(gradients(output, inputs)) == "cpu"

    def test_a_context_within_the_checkpointed_function(self, use_reentrant):
        def within(*tensors):
            with use_backend("reference"):
                return call(*tensors)

        inputs, others = leaves(), leaves()
        output = checkpoint(within, *inputs, use_reentrant=use_reentrant)
        after = checkpoint(call, *others, use_reentrant=use_reentrant)
        (output.square().sum() + after.square().sum()).backward()
        assert ran(torch.cat([leaf.grad.flatten() for leaf in inputs])) == "reference"
        assert ran(torch.cat([leaf.grad.flatten() for leaf in others])) == "cpu"
        assert ran(call(*TENSORS)) == "cpu"

    def test_in_threads(self, use_reentrant):
        """The thread of the forward pass can recompute it; another thread is refused."""
        inputs = leaves()
        with ThreadPoolExecutor(1) as thread, ThreadPoolExecutor(1) as other:

            def forward():
                call(*TENSORS)
                return checkpoint(call, *inputs, use_reentrant=use_reentrant)

            with use_backend("reference"):
                output = thread.submit(forward).result()
            assert thread.submit(lambda: ran(gradients(output, inputs))).result() == "reference"
            with use_backend("reference"):
                output = thread.submit(forward).result()
            with pytest.raises(
                RuntimeError, match="computed again in a thread that does not know what use_backend had"
            ):
                other.submit(gradients, output, inputs).result()


def test_a_compiled_function_within_a_checkpointed_one():
    torch._dynamo.reset()
    compiled, inputs = torch.compile(call, backend="aot_eager", fullgraph=True), leaves()
    with use_backend("reference"):
        output = checkpoint(compiled, *inputs, use_reentrant=False)
        assert ran(gradients(output, inputs)) == "reference"
        output = checkpoint(compiled, *inputs, use_reentrant=False)
    with pytest.raises(CheckpointError):
        gradients(output, inputs)


def test_it_holds_in_every_thread():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: ran(call(*TENSORS))).result() == "cpu"
        with use_backend("reference"):
            assert pool.submit(lambda: ran(call(*TENSORS))).result() == "reference"
        assert pool.submit(lambda: ran(call(*TENSORS))).result() == "cpu"


def test_two_threads_cannot_choose_at_once():
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with use_backend("reference"):
            entered.set()
            leave.wait(60)

    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(hold)
        assert entered.wait(60)
        try:
            with pytest.raises(
                RuntimeError, match=r"another thread is within use_backend\('reference'\); pass backend='cpu'"
            ):
                use_backend("cpu").__enter__()
            assert ran(call(*TENSORS)) == "reference"
        finally:
            leave.set()
        held.result()
    with use_backend("reference"):
        assert ran(call(*TENSORS)) == "reference"
    assert ran(call(*TENSORS)) == "cpu"
