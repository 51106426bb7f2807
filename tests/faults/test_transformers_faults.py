"""Models of transformers either run correctly with attn_implementation="empcause" or are refused."""

from copy import deepcopy

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DataCollatorWithFlattening,
    DeepseekV3ForCausalLM,
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaAttention

import empcause
from empcause.errors import UserError
from empcause.integration import check_model, classes, empcause_attention
from empcause.integration.checking import small_config
from faults.kinds import Guard, fault

ATTENTION = "empcause/integration/attention.py"
MASKS = "empcause/integration/masks.py"
CLASSES = "empcause/integration/classes.py"
CHECKING = "empcause/integration/checking.py"

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 2,
}
LLAMA = LlamaConfig(**SIZES)


def make(cls, config, implementation="empcause"):
    """A random model whose attention is far from uniform."""
    torch.manual_seed(0)
    model = cls._from_config(deepcopy(config), attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.15)
    return model


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 99, (2, 10), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def left_padded(tokens):
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def assert_close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


class Attention(LlamaAttention):
    """A user's own attention class that is correct: it only inherits from transformers' class."""


class Changed(LlamaAttention):
    """Attention that passes on half of each cause."""

    def forward(self, hidden_states, cause_probs=None, **kwargs):
        return super().forward(hidden_states, cause_probs=None if cause_probs is None else cause_probs / 2, **kwargs)


class Leaking(LlamaAttention):
    """Attention that adds the last token's state to every output."""

    def forward(self, hidden_states, **kwargs):
        output, weights = super().forward(hidden_states, **kwargs)
        return output + hidden_states[:, -1:], weights


class Additive(LlamaAttention):
    """Attention that does not call the attention function but adds the mask to the logits itself."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        states = [
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        ]
        query, key, value = (part.repeat_interleave(4 // part.shape[1], 1) for part in states)
        logits = query @ key.transpose(-1, -2) * self.scaling
        if attention_mask is not None:
            logits = logits + attention_mask
        return self.o_proj((logits.softmax(-1) @ value).transpose(1, 2).flatten(2)), None


def llama_with(attention):
    """Return a Llama class whose layers use this attention class."""

    class Model(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            for index, layer in enumerate(self.model.layers):
                layer.self_attn = attention(config, index)
            self.post_init()

    return Model


@fault(
    Guard(CLASSES, "            require(self.config, derived=True)\n", "            pass\n"),
    cause="a model that chooses its attention class by the implementation's name (Falcon)",
    place='loading with attn_implementation="empcause"',
    promise="one sentence before anything is built, instead of a KeyError; eager attention still runs",
)
def test_attention_classes_chosen_by_name(tokens):
    config = FalconConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    with pytest.raises(
        UserError, match=r'^attn_implementation="empcause" does not run FalconForCausalLM: it .*"sdpa"\.$'
    ):
        make(FalconForCausalLM, config)
    assert make(FalconForCausalLM, config, "eager")(tokens).logits.isfinite().all()


@fault(
    Guard(MASKS, "        require(config, derived=True)\n", "        pass\n"),
    cause="a model with attention code of its own (Bloom) is switched over after it was loaded",
    place="the forward pass",
    promise="refused by the class's name; with eager attention later tokens change no earlier logits",
)
def test_attention_code_of_its_own(tokens, left_padded):
    model = make(BloomForCausalLM, BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4), "eager")
    changed = tokens.clone()
    changed[:, -1] += 1
    assert_close(model(changed).logits[:, :-1], model(tokens).logits[:, :-1])
    model.config._attn_implementation = "empcause"
    for inputs in ({"input_ids": tokens}, left_padded):
        with pytest.raises(UserError, match="does not run BloomForCausalLM"):
            model(**inputs)


@fault(
    Guard(MASKS, "if isinstance(result, Tensor) and result.dtype != torch.int64:", "if False:"),
    Guard(MASKS, "return _marked(torch.empty(batch_size, 1, 1, 0, dtype=torch.int64, device=device))", "return None"),
    cause="attention code of its own inside a model whose configuration has been checked",
    place="the forward pass, with padding and without",
    promise="refused: our mask is never added to logits, and the absence of padding is not the absence of a mask",
)
def test_our_mask_read_by_other_code(tokens, left_padded):
    model = make(llama_with(Additive), LLAMA)
    for inputs in (left_padded, {"input_ids": tokens}):
        with pytest.raises(UserError, match="code of its own and cannot read its mask"):
            model(**inputs)


@fault(
    Guard(ATTENTION, "    require(module)\n", ""),
    Guard(CHECKING, "    admit(classes)\n"),
    cause="a user's own attention module, of a class that has not been checked",
    place="the forward pass, then check_model",
    promise="refused with the call that checks it; after that call it runs, with eager attention's logits",
)
def test_a_class_of_ones_own_is_checked_and_admitted(tokens, left_padded, monkeypatch):
    monkeypatch.setattr(classes, "_admitted", set(classes._admitted))
    cls = llama_with(Attention)
    model = make(cls, LLAMA)
    with pytest.raises(UserError, match=r"checked with models of Attention: .* empcause\.check_model\(model\)"):
        model(tokens)
    check_model(model)
    real = left_padded["attention_mask"].bool()
    assert_close(model(**left_padded).logits[real], make(cls, LLAMA, "eager")(**left_padded).logits[real])


@fault(
    Guard(CHECKING, "if (fault := _differ(later[:, :-1], plain[:, :-1])) is not None:", "if (fault := None):"),
    cause="a model of a user's own whose later tokens change earlier logits",
    place="check_model",
    promise="it says so and admits nothing",
)
def test_a_leaking_class_is_not_admitted(tokens, monkeypatch):
    monkeypatch.setattr(classes, "_admitted", set(classes._admitted))
    cls = llama_with(Leaking)
    with pytest.raises(UserError, match="lets later tokens change the logits of earlier ones"):
        check_model(cls)
    with pytest.raises(UserError, match="has not been checked with models of Leaking"):
        make(cls, LLAMA)(tokens)


@fault(
    Guard(CHECKING, "if (fault := _differ(steered, expected)) is not None:", "if (fault := None):"),
    cause="a model that hands causes to every layer, but changed",
    place="check_model",
    promise="it says so and admits nothing; transformers' own Llama passes the same check",
)
def test_a_class_that_changes_causes_is_not_admitted(monkeypatch):
    monkeypatch.setattr(classes, "_admitted", set(classes._admitted))
    with pytest.raises(UserError, match="does not do what causes ask for"):
        check_model(llama_with(Changed))
    assert Changed not in classes._admitted
    check_model(LlamaForCausalLM)


@fault(
    Guard(ATTENTION, "if given is not None and name not in _HARMLESS", "if False and name not in _HARMLESS"),
    cause="a model asks its attention for something unknown (sparse indices, sinks, soft-capped logits, weights)",
    place="the attention function",
    promise="refused by the argument's name; None and what transformers hands to everybody change nothing",
)
@pytest.mark.parametrize(
    "asked",
    [
        {"indices": torch.zeros(2, 5, 3, dtype=torch.long)},
        {"s_aux": torch.zeros(4)},
        {"softcap": 30.0},
        {"output_attentions": True},
        {"head_mask": torch.ones(4)},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_unknown_arguments(asked):
    module = make(LlamaForCausalLM, LLAMA).model.layers[0].self_attn
    states = torch.randn(2, 4, 5, 8)
    name = next(iter(asked))
    with pytest.raises(UserError, match=rf"\b{name}\b"):
        empcause_attention(module, states, states, states, None, **asked)
    harmless = {name: None, "use_cache": True, "position_ids": torch.arange(5)[None], "output_attentions": False}
    output, _ = empcause_attention(module, states, states, states, None, **harmless | {name: None})
    expected = torch.nn.functional.scaled_dot_product_attention(states, states, states, is_causal=True)
    assert_close(output, expected.transpose(1, 2))


@fault(
    Guard(ATTENTION, '    if any(name.endswith("attentions") for name in collected or ()):', "    if False:"),
    cause="attention weights are asked of a model whose attention is not told so (output_attentions, GPT-2)",
    place="the forward pass and generate",
    promise="refused by the argument's name, where transformers would hand out an empty tuple; hidden states are those of eager",
)
def test_weights_that_are_never_formed(tokens):
    config = GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=99, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model = GPT2LMHeadModel._from_config(config, attn_implementation="empcause").eval()
    asked = {"output_attentions": True, "return_dict_in_generate": True, "max_new_tokens": 2}
    for call in (lambda: model(tokens, output_attentions=True), lambda: model.generate(tokens, **asked)):
        with pytest.raises(UserError, match=r"\(output_attentions\)"):
            call()
    got = model(tokens, output_hidden_states=True).hidden_states
    model.set_attn_implementation("eager")
    for ours, theirs in zip(got, model(tokens, output_hidden_states=True).hidden_states, strict=True):
        assert_close(ours, theirs)


@fault(
    Guard(MASKS, "    if not isinstance(mask, KeyMask):", "    if False:"),
    cause="a mask of the user's own: integers per key, as ours are, or a square one",
    place="the forward pass",
    promise="refused, never read as ours; the same mask in two dimensions gives eager attention's logits",
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32], ids=str)
def test_masks_that_are_not_ours(dtype, left_padded):
    model, mask = make(LlamaForCausalLM, LLAMA), left_padded["attention_mask"]
    with pytest.raises(UserError, match="4-D masks"):
        model(left_padded["input_ids"], attention_mask=mask[:, None, None].to(dtype))
    real = mask.bool()
    expected = make(LlamaForCausalLM, LLAMA, "eager")(**left_padded).logits
    assert_close(model(**left_padded).logits[real], expected[real])


@fault(
    Guard(ATTENTION, "    if key.shape[-1] != value.shape[-1]:", "    if False:"),
    cause="keys and values of different head sizes (multi-head latent attention)",
    place="loading, and the attention function",
    promise="a sentence that names the implementation, both sizes and what runs",
)
def test_values_of_another_head_size():
    module = make(LlamaForCausalLM, LLAMA).model.layers[0].self_attn
    states = torch.randn(1, 4, 5, 24)
    with pytest.raises(UserError, match=r'^attn_implementation="empcause" needs .* are 24 and 16 \("eager" and "sdpa"'):
        empcause_attention(module, states, states, states[..., :16], None)
    with pytest.raises(
        UserError, match="does not run DeepseekV3ForCausalLM: it needs keys and values of one head size"
    ):
        make(DeepseekV3ForCausalLM, small_config(DeepseekV3ForCausalLM.config_class()))


@fault(
    Guard(ATTENTION, "        cu_seq_lens_q = cu_seq_lens_k = visible.cu_seqlens\n", "        cu_seq_lens_q = None\n"),
    cause="packed dialogues as DataCollatorWithFlattening makes them, known by position_ids alone",
    place="forward and backward pass, one row or several",
    promise="no dialogue attends to another: logits and gradients are those of each dialogue alone",
)
@pytest.mark.parametrize("options", [{}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True}], ids=str)
def test_packed_dialogues(options, tokens):
    lengths = [4, 1, 5]
    dialogues = [{"input_ids": part.tolist()} for part in tokens[0].split(lengths)]
    batch = DataCollatorWithFlattening(return_tensors="pt", **options)(dialogues)
    del batch["labels"]
    model = make(LlamaForCausalLM, LLAMA)
    packed = model(**batch, use_cache=False).logits
    alone = torch.cat([model(torch.tensor([row["input_ids"]])).logits for row in dialogues], 1)
    assert_close(packed, alone)
    weights = torch.randn(packed.shape, generator=torch.Generator().manual_seed(2))
    gradients = [torch.autograd.grad((logits * weights).sum(), list(model.parameters())) for logits in (packed, alone)]
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    position_ids = torch.stack([torch.cat([torch.arange(length) for length in order]) for order in (lengths, [2, 8])])
    rows = model(tokens, position_ids=position_ids, use_cache=False).logits
    assert_close(rows[:1], alone)
    assert_close(rows[1:, 2:], model(tokens[1:, 2:]).logits)


@fault(
    Guard(ATTENTION, "        and find_packed_sequence_indices(position_ids) is not None\n", "        and False\n"),
    Guard(ATTENTION, '    if kwargs.get("seq_idx") is not None:', "    if False:"),
    cause="packed dialogues where transformers does not look for them: with a cache, or as seq_idx alone",
    place="the forward pass",
    promise="refused with what works, instead of dialogues that attend to one another",
)
def test_packed_dialogues_that_would_go_unnoticed(tokens):
    model = make(LlamaForCausalLM, LLAMA)
    row, restarting = tokens[:1], torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    with pytest.raises(UserError, match="use_cache=False"):
        model(row, position_ids=restarting, use_cache=True)
    with pytest.raises(UserError, match="seq_idx alone"):
        model(row, seq_idx=(restarting.diff(prepend=restarting[:, :1]) < 0).cumsum(1), use_cache=False)
    assert_close(model(row, position_ids=restarting, use_cache=False).logits[:, 4:], model(row[:, 4:]).logits)


@fault(
    Guard(MASKS, "if keys > limit]", "if True]"),
    Guard(MASKS, "        first = torch.where(seen, first, HIDDEN)\n", "        pass\n"),
    Guard(MASKS, "        if exceeded and (q_length > 1 or packing is not None):", "        if False:"),
    cause="a sliding window",
    place="the forward pass, and generation beyond the window",
    promise="one as long as the keys is none; steps of generation go beyond it as eager attention does; a longer pass is refused",
)
def test_sliding_windows(left_padded, tokens):
    config = MistralConfig(**SIZES, sliding_window=10)
    ours, eager = make(MistralForCausalLM, config), make(MistralForCausalLM, config, "eager")
    real = left_padded["attention_mask"].bool()
    assert_close(ours(**left_padded).logits[real], eager(**left_padded).logits[real])
    # The default cache drops old keys, DynamicCache() keeps them.
    for cache in (lambda: {}, lambda: {"cache": DynamicCache()}):
        options = {"max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True, "do_sample": False}
        made, expected = (model.generate(**left_padded, **options, **cache()) for model in (ours, eager))
        assert_close(torch.stack(made.logits), torch.stack(expected.logits))
    with pytest.raises(UserError, match="a sliding window of 10 tokens over 20 keys"):
        ours(tokens.reshape(1, 20))


@fault(
    Guard(ATTENTION, "    if attention_mask is None and causal and rows != keys:", "    if False:"),
    cause="fewer queries than keys and no mask",
    place="the attention function, called by code that makes no masks",
    promise="refused, for which keys a query may see is not known; one query sees all",
)
def test_no_mask_for_fewer_queries():
    module = make(Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=8)).model.layers[0].self_attn
    query, states = torch.randn(1, 4, 3, 8), torch.randn(1, 4, 5, 8)
    with pytest.raises(UserError, match="no mask for 3 queries and 5 keys"):
        empcause_attention(module, query, states, states, None)
    output, _ = empcause_attention(module, query[:, :, :1], states, states, None)
    expected = torch.nn.functional.scaled_dot_product_attention(query[:, :, :1], states, states)
    assert_close(output, expected.transpose(1, 2))
    assert empcause.integration.layer_strength(module, 1.0) == 0.5
