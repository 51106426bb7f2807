"""`generate` with "empcause", steered or not: as few operators per token as with SDPA, and one graph with a static cache."""

from collections import Counter

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import Unsupported
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, CompileConfig, GPT2Config, LlamaConfig, StaticCache

import empcause

LAYERS, TOKENS = 3, 9
SPECIAL = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 2}
GPT2 = GPT2Config(vocab_size=60, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=96, **SPECIAL)
SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
}
LLAMA = LlamaConfig(**SIZES, **SPECIAL)


def make(config, implementation="empcause"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    for parameter in model.parameters():
        parameter.data *= 4  # far from uniform attention, so that causes change the answers
    return model


@pytest.fixture(params=[GPT2, LLAMA], ids=["gpt2", "llama"])
def config(request):
    return request.param


def prompts(padded):
    generator = torch.Generator().manual_seed(1)
    ids, causes = torch.randint(3, 60, (3, TOKENS), generator=generator), torch.rand(3, TOKENS, generator=generator) * 3
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask, "do_sample": False}, causes


class Operators(TorchDispatchMode):
    """Counts the operators that are dispatched."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function)] += 1
        return function(*args, **kwargs or {})


def operators_per_token(model, padded, static, steered):
    """Return the operators that generate dispatches for one more token, by name."""
    inputs, causes = prompts(padded)
    counts = []
    for number in (3, 4):
        cache = {"cache": StaticCache(config=model.config, max_cache_len=32)} if static else {}
        with Operators() as operators:
            if steered:
                with empcause.steer(model, causes):
                    model.generate(**inputs, **cache, max_new_tokens=number)
            else:
                model.generate(**inputs, **cache, max_new_tokens=number)
        counts.append(operators.counts)
    return counts[1] - counts[0]


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_operators_per_token(config, padded, static):
    sdpa = operators_per_token(make(config, "sdpa"), padded, static, steered=False)
    model = make(config)
    plain, steered = (operators_per_token(model, padded, static, steered) for steered in (False, True))
    assert sdpa.total() > 50
    assert plain.total() <= sdpa.total()
    assert steered.total() <= plain.total() + (0 if static else 1), "causes are made once per call, not by every layer"
    assert steered["empcause_cpu.attention.default"] == LAYERS


def test_causes_in_other_dtypes_are_converted_once(config):
    model = make(config)
    inputs, causes = prompts(padded=False)
    for dtype in (torch.float64, torch.bfloat16):
        with empcause.steer(model, causes.to(dtype)), Operators() as operators:
            model.generate(**inputs, max_new_tokens=3)
        with empcause.steer(model, causes), Operators() as expected:
            model.generate(**inputs, max_new_tokens=3)
        assert operators.counts == expected.counts


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_one_graph_for_all_steps(config, padded):
    """With a static cache the step is compiled once, without a graph break; its tokens are those of eager mode."""
    torch._dynamo.reset()
    model = make(config)
    inputs, causes = prompts(padded)
    graphs = []

    def record(graph, example_inputs):
        graphs.append(Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function"))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=record)
    compiling = CompileConfig(fullgraph=True, mode=None, backend=lambda graph, example: backend(graph, example))
    compiling._compile_all_devices = True  # otherwise generate compiles on accelerators alone
    options = {"cache_implementation": "static", "max_new_tokens": 64}
    with empcause.steer(model, causes):
        expected = model.generate(**inputs, **options)
        # torch checks custom operators in the first call of a graph, and this check takes no tensor of a class like the mask's.
        unchecked = torch._functorch.config.patch(check_custom_op_aliasing=False)
        with torch._dynamo.config.patch(error_on_recompile=True), unchecked:
            found = model.generate(**inputs, **options, compile_config=compiling)
    assert torch.equal(found, expected)
    assert len(graphs) == 1
    names = graphs[0]
    assert names["empcause_cpu.attention.default"] == LAYERS
    assert not [name for name in names if "scalar_dense" in name or "nonzero" in name or "device_put" in name]
    assert names["aten.constant_pad_nd.default"] == 0, "the causes are made outside"


def test_a_direct_call_in_one_graph_is_refused(config):
    """Which causes apply to a direct call depends on its thread and its cache, which a graph cannot look up."""
    torch._dynamo.reset()
    model = make(config)
    inputs, causes = prompts(padded=False)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad(), empcause.steer(model, causes):
        model(inputs["input_ids"])
        with pytest.raises(Unsupported, match="let generate compile its steps"):
            compiled(inputs["input_ids"])
