"""Training GEE over language models of both kinds: it learns, resumes to the same weights, and refuses what is no such model."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, BartForConditionalGeneration

from empcause.checkpoints import load_whole
from empcause.data import EMPATHETIC_DIALOGUES, load_dialogues, split_words
from empcause.errors import UserError
from empcause.systems import load_system
from empcause.training import gee
from empcause.training.gee import GEETrainingArguments, build_gee, train_gee

UNWATCHED = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}


@pytest.fixture
def few(monkeypatch):
    """Training and validation on 32 dialogues of the sample, one of each emotion."""
    by_emotion = {dialogue.emotion: dialogue for dialogue in load_dialogues("train", "sample")}
    dialogues = [by_emotion[emotion] for emotion in EMPATHETIC_DIALOGUES.emotions]
    monkeypatch.setattr(gee, "load_dialogues", lambda split, data: dialogues)
    return dialogues


def arguments(model, output_dir, **options):
    defaults = {"model_name_or_path": str(model), "learning_rate": 1e-3, "max_steps": 2, "logging_steps": 1, "seed": 1}
    defaults["disable_tqdm"] = True
    return GEETrainingArguments(output_dir=str(output_dir), data="sample", **(defaults | options))


@pytest.fixture(params=["causal", "seq2seq"])
def base(request, tiny_gpt2_dir, tiny_bart_dir):
    return {"causal": tiny_gpt2_dir, "seq2seq": tiny_bart_dir}[request.param]


def test_a_finished_run_and_a_resumed_one(base, few, tmp_path):
    options = {"max_steps": 4, "per_device_train_batch_size": 8, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 9, "gradient_accumulation_steps": 2}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    metrics = train_gee(arguments(base, whole, **options))
    assert metrics["perplexity"] == pytest.approx(np.exp(metrics["nll_per_token"]))
    history = json.loads((whole / "trainer_state.json").read_text())["log_history"]
    figures = [entry["eval_nll_per_token"] for entry in history if "eval_nll_per_token" in entry]
    assert figures[-1] < figures[0]
    assert metrics["nll_per_token"] == pytest.approx(min(figures), rel=1e-5), "the best model"
    config = json.loads((whole / "config.json").read_text())
    assert config["model_type"] == "empcause_gee"
    assert config["rule"] == "published"
    assert config["emotions"] == list(EMPATHETIC_DIALOGUES.emotions)
    assert "32 situations with their emotions and no causes" in (whole / "README.md").read_text()
    train_gee(arguments(base, resumed, **options, resume_from_checkpoint=str(whole / "checkpoint-2")))
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert first.keys() == second.keys()
    assert all((first[name] == second[name]).all() for name in first)


def test_the_loss_is_the_likelihood_per_token(base, few, tmp_path):
    """Of a step of two batches; without dropout and learning, so that the validation measures the same."""
    options = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "max_steps": 1}
    options["learning_rate"] = 0.0
    still = tmp_path / "still"
    model = load_whole(gee.language_model_class(AutoModel.from_pretrained(base).config), base)
    for name in ("dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"):
        if hasattr(model.config, name):
            setattr(model.config, name, 0.0)
    model.save_pretrained(still)
    AutoTokenizer.from_pretrained(base).save_pretrained(still)
    metrics = train_gee(arguments(still, tmp_path / "run", **options, **UNWATCHED))
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert history[0]["loss"] == pytest.approx(metrics["nll_per_token"], rel=1e-4)


@pytest.mark.slow
def test_it_learns_32_situations_by_heart(base, few, tmp_path):
    sizes = {
        "causal": {
            "model_type": "gpt2",
            "config_overrides": "n_embd=64,n_layer=2,n_head=4,n_positions=128,initializer_range=0.1,"
            "resid_pdrop=0,embd_pdrop=0,attn_pdrop=0",
        },
        "seq2seq": {
            "model_type": "bart",
            "config_overrides": "d_model=64,encoder_layers=2,decoder_layers=2,encoder_attention_heads=4,"
            "decoder_attention_heads=4,encoder_ffn_dim=128,decoder_ffn_dim=128,max_position_embeddings=128,init_std=0.1,dropout=0",
        },
    }["causal" if "gpt2" in base.name else "seq2seq"]
    options = {"model_name_or_path": None, "tokenizer_name": str(base), "max_steps": 200, "learning_rate": 5e-3}
    options["logging_steps"] = 50
    metrics = train_gee(arguments(base, tmp_path, **(options | sizes | UNWATCHED)))
    assert metrics["nll_per_token"] < 0.1
    texts = [dialogue.situation for dialogue in few]
    system = load_system(tmp_path)
    for rule in ("published", "exact"):
        system.model.config.rule = rule
        found = system.read(texts, [split_words(text) for text in texts], 64)
        assert [system.emotions[each.emotion_probs.argmax()] for each in found] == [each.emotion for each in few]


class TestWhatIsRefused:
    def test_a_model_that_sees_later_tokens(self, tiny_encoder_dir, tmp_path):
        """transformers loads an encoder as a causal language model, whose attention goes both ways."""
        options = {"model_name_or_path": None, "model_type": "roberta", "tokenizer_name": str(tiny_encoder_dir)}
        args = arguments("", tmp_path, **options)
        args.config_overrides = "hidden_size=32,num_hidden_layers=2,num_attention_heads=4,intermediate_size=64"
        with pytest.raises(UserError, match="'roberta' sees the tokens that it shall predict"):
            build_gee(args, EMPATHETIC_DIALOGUES.emotions)
        args.config_overrides += ",is_decoder=true"
        build_gee(args, EMPATHETIC_DIALOGUES.emotions)

    def test_a_model_that_writes_nothing(self, tiny_encoder_dir, tmp_path):
        options = {"model_name_or_path": None, "model_type": "vit", "tokenizer_name": str(tiny_encoder_dir)}
        args = arguments("", tmp_path, **options)
        with pytest.raises(UserError, match="'vit'"):
            build_gee(args, EMPATHETIC_DIALOGUES.emotions)

    def test_a_prompt_that_leaves_no_room(self, tiny_gpt2_dir, tmp_path):
        args = arguments(tiny_gpt2_dir, tmp_path, emotion_prompt="a situation " * 40 + "{emotion}")
        with pytest.raises(UserError, match="and the model reads 128; give a shorter one"):
            build_gee(args, EMPATHETIC_DIALOGUES.emotions)

    def test_a_tokenizer_of_another_model(self, tiny_gpt2_dir, tmp_path):
        tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2_dir)
        tokenizer.add_tokens(["one more"])
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        args = arguments(tiny_gpt2_dir, tmp_path, tokenizer_name=str(tmp_path / "tokenizer"))
        with pytest.raises(UserError, match="give the model's own"):
            build_gee(args, EMPATHETIC_DIALOGUES.emotions)

    def test_smoothed_labels(self, tiny_gpt2_dir, tmp_path):
        with pytest.raises(UserError, match="Bayes' rule needs likelihoods"):
            arguments(tiny_gpt2_dir, tmp_path, label_smoothing_factor=0.1)

    def test_situations_that_are_missing(self, tiny_gpt2_dir, few, tmp_path, monkeypatch):
        monkeypatch.setattr(gee, "load_dialogues", lambda split, data: [*few, replace(few[0], situation=" ")])
        with pytest.raises(UserError, match=r"1 of 33 dialogues .* have no situation"):
            train_gee(arguments(tiny_gpt2_dir, tmp_path))


def test_a_model_that_was_saved_without_its_head(tiny_bart_dir, tmp_path):
    """As facebook/bart-large was: the head is tied, and the bias of the logits is zero."""
    lm = BartForConditionalGeneration.from_pretrained(tiny_bart_dir)
    lm.model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_bart_dir).save_pretrained(tmp_path / "base")
    model, _ = build_gee(arguments(tmp_path / "base", tmp_path / "out"), EMPATHETIC_DIALOGUES.emotions)
    assert (model.lm.final_logits_bias == 0).all()
    assert (model.lm.lm_head.weight == lm.lm_head.weight).all()


def test_situations_fit_into_the_model(base, tmp_path):
    model, _ = build_gee(arguments(base, tmp_path), EMPATHETIC_DIALOGUES.emotions)
    assert model.config.max_length < 128
    shorter, _ = build_gee(arguments(base, tmp_path, max_length=9), EMPATHETIC_DIALOGUES.emotions)
    assert shorter.config.max_length == 9
