"""Models of transformers with attn_implementation="empcause" equal eager attention and the paper's formula."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.masking_utils import create_causal_mask

import empcause
from empcause.integration.masks import HIDDEN, biased_attention_mask, read_mask

SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
GPT2 = GPT2Config(vocab_size=120, n_embd=32, n_layer=3, n_head=4, n_positions=96, **SPECIAL)
LLAMA = LlamaConfig(
    vocab_size=120,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=96,
    **SPECIAL,
)


def make(config, implementation="empcause"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    model.generation_config.eos_token_id = None  # full-length generations compare better
    return model


@pytest.fixture(params=[GPT2, LLAMA], ids=["gpt2", "llama"])
def config(request):
    return request.param


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    ids = torch.randint(3, 120, (3, 11))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[1, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def left_padded(inputs):
    mask = torch.ones_like(inputs["attention_mask"])
    mask[0, :4] = 0
    mask[2, :1] = 0
    return inputs | {"attention_mask": mask}


def literal(model, inputs, cause_probs, gamma):
    """Return the model's output with the paper's formula: eager attention, its probabilities reweighted and renormalised."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    def formula(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        logits = query @ key.transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5) + attention_mask
        strength = gamma * (module.layer_idx + 1) / module.config.num_hidden_layers
        padded = torch.nn.functional.pad(cause_probs, (0, key.shape[2] - cause_probs.shape[1]))
        biased = logits.softmax(-1) * (1 + strength * padded[:, None, None])
        return (biased / biased.sum(-1, keepdim=True) @ value).transpose(1, 2), None

    AttentionInterface.register("literal_formula", formula)
    AttentionMaskInterface.register("literal_formula", eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("literal_formula")
    try:
        return model(**inputs)
    finally:
        model.set_attn_implementation(before)


def test_without_causes_logits_equal_eagers(config, inputs):
    model = make(config)
    ours = model(**inputs).logits
    model.set_attn_implementation("eager")
    eager = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours[real], eager[real], rtol=1e-5, atol=1e-5)


def test_packed_sequences_equal_rows_of_their_own(config):
    model = make(config)
    lengths = [7, 1, 11]
    rows = [torch.randint(3, 120, (1, length)) for length in lengths]
    causes = [torch.rand(1, length) for length in lengths]
    tokens = torch.cat(rows, 1)
    sums = torch.tensor([0, *lengths]).cumsum(0).int()
    packing = {"cu_seq_lens_q": sums, "cu_seq_lens_k": sums, "max_length_q": 11, "max_length_k": 11}
    with empcause.steer(model, torch.cat(causes, 1)):
        packed = model(
            tokens,
            attention_mask=torch.ones_like(tokens),
            position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
            use_cache=False,
            **packing,
        ).logits
    for row, cause, part in zip(rows, causes, packed.split(lengths, 1), strict=True):
        with empcause.steer(model, cause):
            torch.testing.assert_close(part, model(row).logits, rtol=1e-5, atol=1e-5)


def test_from_pretrained_takes_the_name(tiny_gpt2_dir, tiny_llama_dir):
    for folder in (tiny_gpt2_dir, tiny_llama_dir):
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="empcause")
        assert model.config._attn_implementation == "empcause"


def test_steering_is_the_papers_formula(config, inputs):
    model = make(config)
    cause = torch.rand(3, 11) * inputs["attention_mask"]
    expected = literal(model, inputs, cause, 0.8).logits
    with empcause.steer(model, cause, gamma=0.8):
        steered = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(steered[real], expected[real], rtol=1e-5, atol=1e-5)
    plain = model(**inputs).logits
    assert not torch.allclose(steered[real], plain[real], atol=1e-4)
    with empcause.steer(model, cause, gamma=0.0):
        torch.testing.assert_close(model(**inputs).logits[real], plain[real])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"do_sample": True, "top_p": 0.9},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=["greedy", "beams", "sampling", "static cache", "no cache"],
)
def test_generation_equals_eagers(config, left_padded, options):
    model = make(config)
    outputs = []
    for implementation in ("empcause", "eager"):
        model.set_attn_implementation(implementation)
        torch.manual_seed(3)
        outputs.append(model.generate(**left_padded, max_new_tokens=12, **options))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_steered_generation_equals_steering_without_cache(config, left_padded, options):
    """During decoding the causes stay with the prompt's keys while new keys are added, and every beam has them."""
    model = make(config)
    cause = torch.rand(3, 11) * 3
    with empcause.steer(model, cause, gamma=1.0):
        cached = model.generate(**left_padded, max_new_tokens=8, **options)
        options = {key: value for key, value in options.items() if key == "num_beams"}
        recomputed = model.generate(**left_padded, max_new_tokens=8, use_cache=False, **options)
    assert torch.equal(cached, recomputed)
    assert not torch.equal(cached, model.generate(**left_padded, max_new_tokens=8, **options))


def test_static_cache_prefill_does_not_see_empty_slots(config):
    """A static cache has more keys than are filled: a causal mask aligned to its last key would show the prefill the future."""
    mask = biased_attention_mask(1, 4, 32, q_offset=0, attention_mask=torch.ones(1, 4, dtype=torch.bool))
    key_mask, offset, *_ = read_mask(mask)
    assert int(offset) == 0
    assert key_mask[0, :4].all()
    assert not key_mask[0, 4:].any()


def test_cache_position_reaches_the_kernel(config, left_padded):
    """A prompt that is read through a cache in two chunks has the logits of one pass."""
    model = make(config)
    ids, mask = left_padded["input_ids"], left_padded["attention_mask"]
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = model(input_ids=ids, attention_mask=mask, position_ids=position).logits
    cache = DynamicCache(config=model.config)
    for part in (slice(0, 6), slice(6, 11)):
        last = model(
            input_ids=ids[:, part],
            attention_mask=mask[:, : part.stop],
            position_ids=position[:, part],
            cache=cache,
            use_cache=True,
        ).logits
    torch.testing.assert_close(last, whole[:, 6:], rtol=1e-5, atol=1e-5)


def test_padding_mask_arrives(config, inputs):
    """Without a registered mask function transformers would pass None, and padding would be visible."""
    model = make(config)
    changed = dict(inputs, input_ids=inputs["input_ids"].clone())
    changed["input_ids"][0, :4] = 7
    changed["input_ids"][1, 8:] = 9
    real = inputs["attention_mask"].bool()
    assert torch.equal(model(**inputs).logits[real], model(**changed).logits[real])


def test_gradient_checkpointing_with_steering(config, inputs):
    """The recomputation in the backward pass must see the same causes."""
    cause = torch.rand(3, 11)
    grads = []
    for checkpointing in (False, True):
        model = make(config).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with empcause.steer(model, cause, gamma=1.0):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_bf16_autocast(config, inputs):
    """Under autocast rotary models pass query and key in fp32 while value is bf16."""
    model = make(config)
    exact = model(**inputs).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(rounded[real].float(), exact[real], rtol=0.1, atol=0.05)


def test_losses_of_twenty_steps_equal_the_literal_formula(config):
    torch.manual_seed(2)
    ids, cause = torch.randint(3, 12, (20, 4, 16)), torch.rand(20, 4, 16)
    histories = []
    for use_kernel in (True, False):
        model = make(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for step in range(20):
            batch = {"input_ids": ids[step], "attention_mask": torch.ones_like(ids[step])}
            if use_kernel:
                with empcause.steer(model, cause[step], gamma=1.0):
                    logits = model(**batch).logits
            else:
                logits = literal(model, batch, cause[step], 1.0).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[step][:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        histories.append(losses)
    assert histories[0] == pytest.approx(histories[1], rel=2e-4)
    assert histories[0][-1] < histories[0][0] - 0.5, "it learned something"


class TestRefusals:
    def test_steering_another_implementation(self, config):
        with (
            pytest.raises(ValueError, match="would ignore the causes"),
            empcause.steer(make(config, "sdpa"), torch.rand(1, 3)),
        ):
            pass

    @pytest.mark.parametrize(
        ("cause", "gamma", "message"),
        [
            (torch.rand(5), 1.0, r"\[batch, tokens\]"),
            (torch.ones(1, 5, dtype=torch.long), 1.0, "floating"),
            (torch.full((1, 5), float("nan")), 1.0, "finite"),
            (torch.full((1, 5), -2.0), 1.0, ">= 0"),
            (torch.rand(1, 5), float("inf"), "gamma must be a finite number"),
        ],
    )
    def test_bad_causes(self, config, cause, gamma, message):
        with pytest.raises(ValueError, match=message), empcause.steer(make(config), cause, gamma=gamma):
            pass

    def test_steering_ends(self, config, inputs):
        model = make(config)
        before = model(**inputs).logits
        with pytest.raises(ZeroDivisionError), empcause.steer(model, torch.rand(3, 11)):
            raise ZeroDivisionError
        assert torch.equal(model(**inputs).logits, before)

    def test_packed_sequences_in_several_rows(self):
        model = make(LLAMA)
        sums = torch.tensor([0, 4, 8], dtype=torch.int32)
        tokens = torch.randint(3, 120, (2, 8))
        with pytest.raises(ValueError, match="the batch has 2 rows"):
            model(tokens, attention_mask=torch.ones_like(tokens), cu_seq_lens_q=sums, cu_seq_lens_k=sums)

    def test_sliding_window(self):
        config = MistralConfig(
            vocab_size=60,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=4,
        )
        model = MistralForCausalLM._from_config(config, attn_implementation="empcause")
        with pytest.raises(ValueError, match="window"):
            model(torch.randint(3, 60, (1, 8)))

    def test_arbitrary_four_dimensional_mask(self, config, inputs):
        model = make(config)
        with pytest.raises(ValueError, match="4-D masks"):
            model(inputs["input_ids"], attention_mask=torch.ones(3, 1, 11, 11, dtype=torch.bool))

    @pytest.mark.parametrize("name", ["softcap", "s_aux", "sliding_window"])
    def test_features_by_name(self, name):
        model = make(LLAMA)
        attention = model.model.layers[0].self_attn
        states = torch.randn(1, 4, 5, 8)
        with pytest.raises(ValueError, match=name):
            empcause.integration.empcause_attention(attention, states, states, states, None, **{name: 4})


def test_mask_of_hidden_keys():
    padding = torch.tensor([[False, True, True], [True, True, True]])
    mask = biased_attention_mask(2, 3, 3, attention_mask=padding)
    assert mask.shape == (2, 1, 1, 3)
    assert mask[0, 0, 0].tolist() == [HIDDEN, 1, 2]
    assert biased_attention_mask(2, 3, 3).shape == (2, 1, 1, 0), "nothing is hidden"


def test_mask_comes_through_transformers(config):
    model = make(config)
    embeds = torch.zeros(2, 5, 32)
    mask = create_causal_mask(config=model.config, inputs_embeds=embeds, attention_mask=torch.ones(2, 5), cache=None)
    assert mask.dtype == torch.int64
    assert mask.shape == (2, 1, 1, 5)


def test_strided_views_are_read_in_place():
    """Query, key and value may be views of one fused projection; the result is [B, Q, H, D] without weights."""
    fused = torch.randn(2, 7, 3 * 32)
    views = [part.unflatten(-1, (4, 8)).transpose(1, 2) for part in fused.split(32, -1)]
    model = make(GPT2)
    output, weights = empcause.integration.empcause_attention(model.transformer.h[0].attn, *views, None)
    assert output.shape == (2, 7, 4, 8)
    assert output.is_contiguous()
    assert weights is None


def test_folder_kernels_is_not_taken_for_a_package():
    """transformers looks for a package `kernels`; the folder of this name must not be taken for it in the repository's root."""
    root = Path(__file__).parents[2]
    code = (
        "from transformers.utils import is_kernels_available as a; before = a(); import empcause; print(before, a()); "
        "import importlib.util as u; s = u.find_spec('kernels'); print(s is None or s.origin is None)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    first, second = done.stdout.split("\n")[:2]
    assert first in ("False False", "True True")
    if first == "False False":
        assert second == "True"


def test_trainer_trains_with_the_implementation(tmp_path):
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": torch.randint(3, 120, (12,))} for _ in range(8)]
    rows = [row | {"labels": row["input_ids"]} for row in rows]
    losses = []
    for implementation in ("empcause", "eager"):
        torch.manual_seed(0)
        model = LlamaForCausalLM._from_config(LLAMA, attn_implementation=implementation)
        args = TrainingArguments(str(tmp_path), max_steps=4, report_to="none", use_cpu=True, seed=1, save_strategy="no")
        losses.append(Trainer(model, args, train_dataset=rows).train().training_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
