"""Tiny models with random weights, which stand in the place of pretrained ones in a smoke run."""

from pathlib import Path

from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaModel, set_seed

from empcause.data import load_annotations, load_dialogues, train_tokenizer

TINY_MODELS = ("encoder", "decoder")


def make_tiny_models(folder: Path) -> None:
    """Make an encoder and a decoder of two layers, with tokenizers of the embedded sample; the same ones every time.

    Args:
        folder: where the folders `encoder` and `decoder` are made.
    """
    texts = [turn for dialogue in load_dialogues("train", "sample") for turn in dialogue.turns]
    texts += [annotation.situation for annotation in load_annotations("train", "sample")]
    set_seed(0)
    tokenizer = train_tokenizer(texts, vocab_size=1000, output_dir=folder / "encoder", kind="encoder")
    tokenizer.model_max_length = 256  # bert-score reads it
    tokenizer.save_pretrained(folder / "encoder")
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    encoder = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=258,
        type_vocab_size=1,
        **ids,
    )
    RobertaModel(encoder, add_pooling_layer=False).save_pretrained(folder / "encoder")
    tokenizer = train_tokenizer(texts, vocab_size=1000, output_dir=folder / "decoder", kind="decoder")
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    decoder = GPT2Config(vocab_size=len(tokenizer), n_positions=256, n_embd=64, n_layer=2, n_head=4, **ids)
    GPT2LMHeadModel(decoder).save_pretrained(folder / "decoder")
