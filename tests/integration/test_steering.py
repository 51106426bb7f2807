"""`steer` gives the right results in generation, training and models of several parts. Its faults are in tests/faults."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    Trainer,
    TrainingArguments,
)

import empcause
from empcause.generator import EmpatheticGPT2Config, EmpatheticGPT2LMHeadModel

SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
GPT2 = GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64, **SPECIAL)
LLAMA = LlamaConfig(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    **SPECIAL,
)


def make(config, auto=AutoModelForCausalLM, implementation="empcause"):
    torch.manual_seed(0)
    model = auto.from_config(config, attn_implementation=implementation).eval()
    for parameter in model.parameters():
        parameter.data *= 4  # far from uniform attention, so that causes change the answers
    return model


@pytest.fixture(params=[GPT2, LLAMA], ids=["gpt2", "llama"])
def model(request):
    model = make(request.param)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def ids():
    return torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def causes():
    return torch.rand(3, 9, generator=torch.Generator().manual_seed(2)) * 5 - 0.9


def test_embeddings_in_place_of_ids(model, ids, causes):
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad(), empcause.steer(model, causes):
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(ids).logits)
        answers = model.generate(inputs_embeds=embeds, max_new_tokens=6)
        assert torch.equal(answers, model.generate(ids, max_new_tokens=6)[:, 9:])


def test_padding_on_the_left_shifts_nothing(model, ids, causes):
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with empcause.steer(model, causes):
        together = model.generate(ids, attention_mask=mask, max_new_tokens=6)
    with empcause.steer(model, causes[:1, 4:]):
        alone = model.generate(ids[:1, 4:], max_new_tokens=6)
    assert torch.equal(together[:1, 4:], alone)


def test_two_models_at_once(ids, causes):
    models = [make(GPT2), make(LLAMA)]
    expected = []
    for model in models:
        with empcause.steer(model, causes):
            expected.append(model(ids).logits)
    with empcause.steer(models[0], causes), empcause.steer(models[1], causes):
        for model, logits in zip(models, expected, strict=True):
            torch.testing.assert_close(model(ids).logits, logits)


def test_gradients_reach_the_causes_also_after_the_context(model, ids, causes):
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        leaf = causes.clone().requires_grad_()
        with empcause.steer(model, leaf):
            loss = model(ids, labels=ids).loss
        loss.backward()
        grads.append(leaf.grad)
    assert grads[0][:, :-1].abs().min() > 0, "every token but the last takes part in a prediction"
    torch.testing.assert_close(*grads)


def test_training(tmp_path, ids, causes):
    rows = [{"input_ids": row, "labels": row} for row in ids]
    losses = []
    for steered in (causes[:1], causes[:1] * 0):
        model = make(LLAMA)
        options = {
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "seed": 1,
            "save_strategy": "no",
            "report_to": "none",
        }
        with empcause.steer(model, steered):
            args = TrainingArguments(str(tmp_path), use_cpu=True, **options)
            losses.append(Trainer(model, args, train_dataset=rows).train().training_loss)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_a_model_with_a_vision_tower(ids, causes):
    """The layers that count are those of the text model, and the tokens of the image have causes as other tokens do."""
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    model = make(
        LlavaConfig(vision_config=vision, text_config=LLAMA, image_token_index=59, image_seq_length=4),
        AutoModelForImageTextToText,
        {"text_config": "empcause"},  # the vision tower has not been checked
    )
    ids[ids == 59] = 58
    ids[:, 1:5] = 59
    image = {"pixel_values": torch.randn(3, 3, 8, 8)}
    with torch.no_grad(), empcause.steer(model, causes):
        found = model(ids, **image).logits
        answers = model.generate(ids, max_new_tokens=2, min_new_tokens=2, num_beams=2, **image)
    assert answers.shape == (3, 11)
    text = model.model.language_model
    embeds = text.get_input_embeddings()(ids)
    with torch.no_grad():
        embeds[:, 1:5] = torch.stack(list(model.model.get_image_features(**image).pooler_output))
        expected = model.lm_head(text(inputs_embeds=embeds, cause_probs=causes).last_hidden_state)
    torch.testing.assert_close(found, expected)


def test_an_encoder_that_sees_both_sides(ids, causes):
    config = BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
    model = BertModel._from_config(config, attn_implementation="empcause").eval()
    with empcause.steer(model, causes):
        found = model(ids).last_hidden_state
    torch.testing.assert_close(found, model(ids, cause_probs=causes).last_hidden_state)


def test_a_generator_is_steered_with_the_strength_asked_for(ids, causes):
    config = EmpatheticGPT2Config(**GPT2.to_dict() | {"architectures": None}, gamma=0.3)
    model = EmpatheticGPT2LMHeadModel._from_config(config, attn_implementation="empcause").eval()
    for parameter in model.parameters():
        parameter.data *= 4
    options = {"max_new_tokens": 6, "eos_token_id": None, "num_beams": 2}
    with empcause.steer(model, causes, gamma=0.9):
        answers = model.generate(ids, **options)
        with pytest.raises(ValueError, match="given by the call already"):
            model.generate(ids, cause_probs=causes, **options)
    assert torch.equal(answers, model.generate(ids, cause_probs=causes * 3, **options))
