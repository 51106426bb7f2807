"""The committed table of classes that run with attn_implementation="empcause", and the check that makes it."""

import json
import warnings

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import empcause
from empcause.errors import UserError
from empcause.integration import classes
from empcause.integration.__main__ import judge, main
from empcause.integration.classes import TABLE

FAMILIES = "apertus biogpt gemma gpt2 gpt_neox granite llama mistral mixtral olmo2 opt phi3 qwen2 qwen3 smollm3".split()
CLASSES = json.loads(TABLE.read_text(encoding="utf-8"))


def part_of(model):
    return next((part for part in ("runs", "refused", "unchecked") if model in CLASSES[part]), None)


def test_every_class_of_the_mapping_is_in_the_table():
    """The table is complete for its version of transformers; new classes of a newer one are refused until they are checked."""
    known = set(CLASSES["runs"]) | set(CLASSES["refused"]) | set(CLASSES["unchecked"])
    if CLASSES["transformers"] == transformers.__version__:
        assert known == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    assert len(CLASSES["runs"]) > 90
    refused = {name for entry in CLASSES["refused"].values() for name in entry["configs"]}
    assert not refused & {name for entry in CLASSES["runs"].values() for name in entry["configs"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_run(family):
    model = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    part, found = judge(family, model)
    assert part == "runs"
    assert all(set(names) <= set(CLASSES["runs"][model][kind]) for kind, names in found.items())


@pytest.mark.parametrize("family", ["bloom", "gemma2", "gpt_oss", "stablelm"])
def test_families_that_are_refused(family):
    model = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    assert judge(family, model)[0] == part_of(model) == "refused"


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)[::6])
def test_the_table_is_what_the_check_makes(family):
    """This runs the check on a sixth of the classes; `python -m empcause.integration` makes the whole table."""
    model = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    if part_of(model) != "unchecked":
        assert judge(family, model)[0] == part_of(model)


def test_what_the_check_takes():
    with pytest.raises(UserError, match="takes a causal language model of transformers or its class, not BertModel"):
        empcause.check_model(BertModel)


def test_encoder_decoders_are_not_sent_to_a_check_that_does_not_take_them():
    with pytest.raises(UserError, match='the check takes only causal LMs; load it with "eager" or "sdpa"'):
        T5ForConditionalGeneration._from_config(T5Config(), attn_implementation="empcause")


def test_encoders_of_listed_configurations():
    """Encoders use the same modules without a causal mask and give eager attention's states where there is no padding."""
    config = BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    tokens, mask = torch.randint(3, 99, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    states = []
    for implementation in ("empcause", "eager"):
        torch.manual_seed(0)
        model = BertModel._from_config(config, attn_implementation=implementation).eval()
        states.append(model(tokens, attention_mask=mask).last_hidden_state[mask.bool()])
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)


def test_encoder_and_decoder_of_a_listed_configuration():
    config = BartConfig(
        vocab_size=99,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
    )
    tokens, mask = torch.randint(3, 99, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    logits = []
    for implementation in ("empcause", "eager"):
        torch.manual_seed(0)
        model = BartForConditionalGeneration._from_config(config, attn_implementation=implementation).eval()
        logits.append(model(tokens, attention_mask=mask, decoder_input_ids=tokens[:, :5]).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [GPT2Config, LlamaConfig], ids=["gpt2", "llama"])
def test_nothing_deprecated_is_used(config):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
    model = AutoModelForCausalLM.from_config(config(**sizes), attn_implementation="empcause")
    tokens = torch.randint(3, 99, (1, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with empcause.steer(model, torch.rand(1, 6)):
            model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=3, pad_token_id=1)
            model(tokens, labels=tokens).loss.backward()


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_compiled_models(padded, monkeypatch):
    monkeypatch.setattr(classes, "_admitted", set())  # as in a process whose first call is compiled
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 99}
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(
        LlamaConfig(num_hidden_layers=2, **sizes), attn_implementation="empcause"
    ).eval()
    tokens, mask = torch.randint(3, 99, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    inputs = {"input_ids": tokens, "use_cache": False} | ({"attention_mask": mask} if padded else {})
    # Without a mask and a cache there is one graph break, to see whether position_ids hold packed sequences.
    compiled = torch.compile(model, backend="eager", fullgraph=padded)(**inputs).logits
    torch.testing.assert_close(compiled[mask.bool()], model(**inputs).logits[mask.bool()])


def test_names_that_are_no_causal_models_write_nothing():
    before = classes.TABLE.read_bytes()
    with pytest.raises(SystemExit, match="no causal language model named BertModel, NoSuchClass; nothing was written"):
        main(["GPT2LMHeadModel", "NoSuchClass", "BertModel"])
    assert classes.TABLE.read_bytes() == before


def test_a_part_of_the_table_is_not_checked_with_another_version(monkeypatch):
    before = classes.TABLE.read_bytes()
    monkeypatch.setattr(transformers, "__version__", "5.99.0")
    with pytest.raises(
        SystemExit, match=r"made with transformers 5\.[\d.]+, and 5\.99\.0 is installed: .*nothing was written"
    ):
        main(["GPT2LMHeadModel"])
    assert classes.TABLE.read_bytes() == before
