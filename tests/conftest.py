"""Fixtures shared by all tests: no network, the user's own copy of the data, tiny random models."""

import os

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: its kernels take CPU tensors then

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from empcause.extractor import CauseExtractor, CauseExtractorConfig
from empcause.generator import GENERATORS, add_separator

CORPUS = [
    "Evenings are long and lonely since my sister moved to another country.",
    "That sounds hard. Do you talk to them often?",
    "My dog passed away last week, and the house is silent now.",
    "I'm so sorry to hear that. How old was he?",
    "We won the regional final! I can't believe it.",
    "Congratulations! You must have trained for months.",
    "Somebody stole my bicycle from the yard while I was asleep.",
    "That would make me furious. Did you call the police?",
]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real EmpatheticDialogues and EmoCause; skips where the user has none."""
    folder = os.environ.get("EMPCAUSE_DATA_DIR")
    if not folder:
        pytest.skip("EMPCAUSE_DATA_DIR is not set: no copy of EmpatheticDialogues and EmoCause to test with")
    return Path(folder)


def _tokenizer(sentence_pair_markers: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    if sentence_pair_markers:
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        cls_token="<s>",
        sep_token="</s>",
        mask_token="<mask>",
        model_max_length=128,
    )


@pytest.fixture(scope="session")
def tiny_encoder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer RoBERTa with its tokenizer, saved as a pretrained folder."""
    folder = tmp_path_factory.mktemp("tiny_encoder")
    torch.manual_seed(0)
    tokenizer = _tokenizer(sentence_pair_markers=True)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=130,
        type_vocab_size=1,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    RobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer GPT-2 with its tokenizer, saved as a pretrained folder."""
    folder = tmp_path_factory.mktemp("tiny_gpt2")
    torch.manual_seed(0)
    tokenizer = _tokenizer(sentence_pair_markers=False)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=128, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=2
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with two query heads per key/value head, and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny_llama")
    torch.manual_seed(0)
    tokenizer = _tokenizer(sentence_pair_markers=False)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bart_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BART with two layers on either side, and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny_bart")
    torch.manual_seed(0)
    tokenizer = _tokenizer(sentence_pair_markers=True)
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=128,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    BartForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_extractor(tiny_encoder_dir, tmp_path_factory):
    """Folder of an extractor that has learned nothing."""
    folder = tmp_path_factory.mktemp("small") / "extractor"
    torch.manual_seed(0)
    encoder = AutoModel.from_pretrained(tiny_encoder_dir, add_pooling_layer=False)
    CauseExtractor(CauseExtractorConfig(encoder=encoder.config.to_dict()), encoder).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_encoder_dir).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_generator(tiny_gpt2_dir, tmp_path_factory):
    """Folder of a generator with bias that has learned nothing."""
    folder = tmp_path_factory.mktemp("small") / "generator"
    torch.manual_seed(0)
    config_class, model_class = GENERATORS["gpt2"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2_dir)
    tokenizer.sep_token = None
    model = model_class(config_class.from_pretrained(tiny_gpt2_dir))
    add_separator(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
