"""Fake CUDA tensors, without a GPU, go through dispatch, checks, shapes, compilation and transformers as real ones would.

A fake tensor has no values, so code that would wait for a GPU to read a value raises here. The autograd engine of a torch built
without CUDA refuses CUDA tensors, fake ones included. Therefore graphs are recorded but not run, and the backward operators are
called directly. Gradients are tested with values in tests/kernels and tests/csrc.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, StaticCache

import empcause
from empcause import biased_attention, biased_attention_varlen
from empcause.data.collation import PackedSizes
from empcause.generator import EmpatheticGPT2Config, EmpatheticGPT2LMHeadModel
from empcause.integration.steering import _GENERATION, _STEERINGS, _Generation, _Steering
from empcause.ops import backends, choice
from empcause.ops.backends import find
from empcause.ops.choice import choose_backend

pytestmark = pytest.mark.skipif(not empcause.info()["triton"].built, reason="triton is not installed")


@pytest.fixture(scope="module")
def device_guard(tmp_path_factory):
    if torch.version.cuda is not None:
        return
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("a torch without CUDA needs a C++ compiler here")
    torch_folder = Path(torch.__file__).parent
    library = tmp_path_factory.mktemp("fake_cuda") / "fake_cuda.so"
    options = ["-std=c++20", "-shared", "-fPIC", f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}", "-lc10"]
    source = Path(__file__).with_name("fake_cuda.cpp")
    subprocess.run([compiler, str(source), *options, "-o", str(library)], check=True)
    ctypes.CDLL(str(library))


@pytest.fixture
def fake_cuda(device_guard, monkeypatch):
    monkeypatch.setattr(_Steering, "check_values", lambda self: None)  # fake tensors have no values
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        yield


def arguments(dtype=torch.bfloat16, queries=7, keys=9):
    """Return query, key and value as views of a fused projection, and a cause."""
    fused = torch.randn(2, keys, (4 + 2 + 2) * 16, dtype=dtype, requires_grad=True)
    query, key, value = (part.unflatten(-1, (-1, 16)).transpose(1, 2) for part in fused.split([64, 32, 32], -1))
    return query[:, :, keys - queries :], key, value, torch.rand(2, keys, requires_grad=True)


def assert_like(got, expected):
    assert (got.shape, got.dtype, got.device) == (expected.shape, expected.dtype, expected.device)


def test_the_best_backend_on_cuda_is_triton(fake_cuda):
    cuda = torch.device("cuda")
    assert choose_backend(None, cuda, torch.bfloat16, 64) == "triton"
    assert choose_backend(None, cuda, torch.float64, 64) == "reference"
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run this: it takes tensors on the CPU, not on cuda"):
        choose_backend("cpu", cuda, torch.float32, 64)


def test_the_default_on_cuda_follows_the_table_alone(fake_cuda, monkeypatch):
    """By architecture, dtype and head size; and only where the CUDA kernels can run."""
    monkeypatch.setattr(backends, "CUDA_IS_NOT_SLOWER", frozenset({((9, 0), torch.bfloat16, 64)}))
    monkeypatch.setattr(backends, "gpu_default", backends.gpu_default.__wrapped__)
    monkeypatch.setattr(choice, "gpu_default", backends.gpu_default)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    cuda = torch.device("cuda")
    assert choose_backend(None, cuda, torch.bfloat16, 64) == "triton"  # the CUDA kernels are not built here
    why_not = backends._why_not
    monkeypatch.setattr(backends, "_why_not", lambda b, *rest: None if b.name == "cuda" else why_not(b, *rest))
    monkeypatch.setattr(choice, "find", lambda wanted, *rest: (wanted, None) if wanted else find(wanted, *rest))
    assert choose_backend(None, cuda, torch.bfloat16, 33) == "cuda"
    assert choose_backend(None, cuda, torch.bfloat16, 32) == "triton"
    assert choose_backend(None, cuda, torch.bfloat16, 65) == "triton"
    assert choose_backend(None, cuda, torch.float16, 64) == "triton"
    assert choose_backend("triton", cuda, torch.bfloat16, 64) == "triton"
    monkeypatch.setattr(backends, "why_not_loaded", lambda name: None)
    named = "bf16 with head sizes up to 64, where cuda is measured to be at least as fast as triton"
    assert backends._why_default("triton") == f"the default but for {named}"
    assert backends._why_default("cuda") == f"the default for {named}"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert choose_backend(None, cuda, torch.bfloat16, 64) == "triton"
    assert backends._why_default("triton").startswith("the default, as no measurement on such a GPU")
    assert backends._why_default("cuda").startswith("not the default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shapes_and_devices(fake_cuda, dtype):
    query, key, value, cause = arguments(dtype)
    output = biased_attention(
        query,
        key,
        value,
        cause,
        strength=torch.rand(4),
        key_mask=torch.ones(2, 9, dtype=torch.bool),
        dropout_p=0.1,
        query_offset=torch.zeros((), dtype=torch.int64),
    )
    assert_like(output, query)
    assert output.transpose(1, 2).is_contiguous()
    assert output.requires_grad
    lse = torch.empty(2, 4, 2 if dtype == torch.float32 else 1, 7)
    weights = torch.empty(2, 1, 9 + 1)  # and one flag
    saved = (output, query, key, value, output, torch.empty(0, dtype=torch.int16), lse, weights)
    grads = torch.ops.empcause_triton.attention_backward(
        *saved, cause, 0.5, None, None, None, None, 0, 0, True, 0.25, 0.0, None, None, True
    )
    for grad, tensor in zip(grads, (query, key, value, cause), strict=True):
        assert_like(grad, tensor)


def test_packed_shapes_and_devices(fake_cuda):
    query, key, value = (torch.randn(30, heads, 8) for heads in (4, 2, 2))
    cause, sums = torch.rand(30), torch.empty(4, dtype=torch.int32)
    output = biased_attention_varlen(
        query, key, value, cause, cu_seqlens_q=sums, cu_seqlens_k=sums, max_seqlen_q=20, max_seqlen_k=20, dropout_p=0.2
    )
    assert_like(output, query)
    statistics = (torch.empty(0, dtype=torch.int16), torch.empty(4, 2, 30), torch.empty(1, 1, 30 + 1))
    saved = (output, query, key, value, output, *statistics)
    grads = torch.ops.empcause_triton.attention_backward(
        *saved, cause, 0.5, None, None, sums, sums, 20, 20, True, 0.25, 0.0, None, None, True
    )
    for grad, tensor in zip(grads, (query, key, value, cause), strict=True):
        assert_like(grad, tensor)


class OnlyOn(TorchDispatchMode):
    """Refuses every operator with a tensor on another device than this one."""

    def __init__(self, device_type):
        super().__init__()
        self.device_type = device_type

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        results = operator(*arguments, **(options or {}))
        for tensor in tree_leaves((arguments, options, results)):
            assert not isinstance(tensor, torch.Tensor) or tensor.device.type == self.device_type, operator
        return results


def test_a_seed_that_is_not_given_is_drawn_on_the_device(device_guard):
    """So that nothing is copied to the GPU, and each replay of a CUDA graph has new bits."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            tensors = arguments()
        with OnlyOn("cuda"):
            biased_attention(*tensors, dropout_p=0.1)


def test_wrong_devices_are_named(fake_cuda):
    query, key, value, cause = arguments()
    with pytest.raises(ValueError, match="cause must be floating on cuda:0"):
        biased_attention(query, key, value, cause.cpu())


def test_a_graph_holds_the_operator(fake_cuda):
    graph = make_fx(lambda *tensors: biased_attention(*tensors, strength=0.5, dropout_p=0.1, seed=3))(*arguments())
    called = [str(node.target) for node in graph.graph.nodes if "empcause" in str(node.target)]
    assert called == ["empcause_triton.attention.default"]


def test_compiles_into_one_graph(fake_cuda):
    torch._dynamo.reset()
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def run(query, key, value, cause, mask):
        return biased_attention(query, key, value, cause, key_mask=mask, strength=0.5)

    for length in (9, 12, 33):
        mask = torch.ones(2, length, dtype=torch.bool)
        assert run(*arguments(queries=length, keys=length), mask).device.type == "cuda"
    assert counter.frame_count <= 2


def test_the_generator_looks_at_no_value(fake_cuda):
    """On a GPU each look at a role would wait for all that was launched before."""
    config = EmpatheticGPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    ids = torch.zeros(2, 9, dtype=torch.int64)
    assert EmpatheticGPT2LMHeadModel(config)(ids, token_type_ids=ids).logits.device.type == "cuda"


def test_a_packed_training_step_is_one_graph_on_the_gpu(device_guard):
    """No tensor of the host, no value that is looked at, and one graph per size over 20 batches."""
    torch._dynamo.reset()
    graphs = []

    def record(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    config = EmpatheticGPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=1, n_head=4, use_cache=False)
    sizes = PackedSizes(tokens=(128, 192), labels=(64, 128), sequences=11, longest=30)
    shapes = set()
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = EmpatheticGPT2LMHeadModel._from_config(config, attn_implementation="empcause").train()
        compiled = torch.compile(model, backend=record, fullgraph=True, dynamic=False)
        for batch in range(20):
            tokens, labels = sizes.tokens[batch % 2], sizes.labels[batch % 3 > 0]
            shapes.add((tokens, labels))
            row = torch.zeros(1, tokens, dtype=torch.int64, device="cuda")
            sums = torch.zeros(sizes.sequences + 1, dtype=torch.int32, device="cuda")
            output = compiled(
                row,
                token_type_ids=row,
                cause_probs=torch.rand(1, tokens, device="cuda"),
                labels=row,
                position_ids=row,
                cu_seq_lens_q=sums,
                cu_seq_lens_k=sums,
                max_length_q=sizes.longest,
                max_length_k=sizes.longest,
                logits_to_keep=row[0, :labels],
                shift_labels=row[:, :labels],
                num_items_in_batch=torch.tensor(50.0, device="cuda"),
            )
            assert output.loss.device.type == "cuda"
    assert len(graphs) == len(shapes) == 4
    for graph in graphs:
        assert "empcause_triton.attention.default" in {str(node.target) for node in graph.graph.nodes}
        for node in graph.graph.nodes:
            value = node.meta.get("example_value")
            if isinstance(value, torch.Tensor):
                assert value.device.type == "cuda", (
                    f"{node} ({node.target}) is on the host; it goes to {list(node.users)}"
                )
                assert all(type(size) is int for size in value.shape), f"the shape of {node} depends on values"


def gpt2():
    config = GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel._from_config(config, attn_implementation="empcause")


def llama():
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation="empcause")


@pytest.mark.parametrize("make_model", [gpt2, llama])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_transformers_loss(fake_cuda, make_model, checkpointing):
    model = make_model().train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = torch.zeros(2, 12, dtype=torch.int64)
    with empcause.steer(model, torch.rand(2, 12)):
        loss = model(tokens, attention_mask=torch.ones_like(tokens), labels=tokens).loss
    assert loss.device.type == "cuda"
    assert loss.requires_grad


@pytest.mark.parametrize("make_model", [gpt2, llama])
def test_transformers_decoding_step(fake_cuda, make_model):
    model = make_model().eval()
    prompt = torch.zeros(2, 5, dtype=torch.int64)
    with torch.no_grad(), empcause.steer(model, torch.rand(2, 5)):
        first = model(prompt, attention_mask=torch.ones_like(prompt), use_cache=True)
        mask = torch.ones(2, 6, dtype=torch.int64)
        second = model(prompt[:, :1], attention_mask=mask, past_key_values=first.past_key_values, use_cache=True)
    assert second.logits.shape == (2, 1, 50)
    assert second.logits.device.type == "cuda"


class CopiesBetweenDevices(TorchDispatchMode):
    """Records the operators that take and return tensors on more than one device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        if len({tensor.device for tensor in tensors}) > 1:
            self.found.append(str(function))
        return result


@pytest.mark.parametrize("make_model", [gpt2, llama])
def test_steps_of_generate_wait_for_nothing(fake_cuda, make_model):
    """A decoding step of `generate` inside `steer` with a static cache reads no value and copies nothing between devices.

    `generate` itself cannot run on fake tensors, because it reads values to know when to stop: the steps are made here as it
    makes them.
    """
    model = make_model().eval()
    options = {"cache": StaticCache(config=model.config, max_cache_len=16), "use_cache": True}
    prompt = torch.zeros(2, 5, dtype=torch.int64)
    causes = []
    with torch.no_grad(), empcause.steer(model, torch.rand(2, 5)):
        (steering,) = _STEERINGS.get()
        steering.called = True
        generation = _GENERATION.set(_Generation(steering))
        model._expand_inputs_for_generation(expand_size=1, input_ids=prompt)
        model(**model.prepare_inputs_for_generation(prompt, attention_mask=torch.ones_like(prompt), **options))
        with CopiesBetweenDevices() as copies:
            for length in (6, 7, 8):
                tokens = torch.zeros(2, length, dtype=torch.int64)
                inputs = model.prepare_inputs_for_generation(
                    tokens, next_sequence_length=1, attention_mask=torch.ones_like(tokens), **options
                )
                assert model(**inputs).logits.shape == (2, 1, 50)
                causes.append(inputs["cause_probs"])
        _GENERATION.reset(generation)
    assert copies.found == []
    assert causes[0].shape == (2, 16)
    assert causes[0] is causes[1] is causes[2], "the causes are made once for all steps"
