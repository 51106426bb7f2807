"""The extractor's attention row, labels, losses, and what it reads out of a text."""

import copy

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    MPNetConfig,
    RobertaConfig,
)

from empcause.data import EMPATHETIC_DIALOGUES, split_words
from empcause.data.collation import pad_batch
from empcause.errors import UserError
from empcause.extractor import (
    CauseExtractor,
    CauseExtractorConfig,
    automatic_labels,
    encode_text,
    extract,
    load_extractor,
)
from empcause.extractor.losses import aux_loss, cause_loss

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 90}
FAMILIES = {
    "bert": BertConfig(**SMALL),
    "roberta": RobertaConfig(**SMALL, max_position_embeddings=40),
    "electra": ElectraConfig(**SMALL, embedding_size=16),
    "mpnet": MPNetConfig(**SMALL, max_position_embeddings=40),
    "distilbert": DistilBertConfig(vocab_size=90, dim=32, n_layers=2, n_heads=4, hidden_dim=48),
}


@pytest.fixture
def extractor(tiny_encoder_dir):
    torch.manual_seed(0)
    encoder = AutoModel.from_pretrained(tiny_encoder_dir, add_pooling_layer=False)
    model = CauseExtractor(CauseExtractorConfig(encoder=encoder.config.to_dict()), encoder).eval()
    return model, AutoTokenizer.from_pretrained(tiny_encoder_dir)


def test_emotions_are_those_of_the_configuration():
    config = CauseExtractorConfig(encoder=FAMILIES["bert"].to_dict(), id2label={"1": "glum", "0": "glad"})
    model = CauseExtractor(config)
    assert model.emotions == ("glad", "glum")
    assert model.emotion_head.out_features == 2
    assert config.label2id == {"glad": 0, "glum": 1}
    for wrong in ({0: "glad", 2: "glum"}, {0: "glad", 1: "glad"}):
        with pytest.raises(UserError, match="expected the names of emotions by the ids"):
            CauseExtractorConfig(encoder=FAMILIES["bert"].to_dict(), id2label=wrong)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_attention_row_equals_the_encoders_own(family, pooling):
    torch.manual_seed(0)
    config = CauseExtractorConfig(encoder=FAMILIES[family].to_dict(), attention_pooling=pooling)
    model = CauseExtractor(config).eval()
    model.encoder.set_attn_implementation("eager")
    ids = torch.randint(5, 90, (3, 12))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    got = model(ids, mask).cls_attention
    full = model.encoder(input_ids=ids, attention_mask=mask, output_attentions=True).attentions[-1][:, :, 0]
    expected = full.mean(1) if pooling == "mean" else full.amax(1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert not got[1, 7:].any()


def test_encoder_without_plain_attention_is_refused():
    config = DebertaV2Config(**SMALL, pos_att_type=["c2p"], relative_attention=True)
    with pytest.raises(UserError, match="Cannot read the attention of a DebertaV2Model"):
        CauseExtractor(CauseExtractorConfig(encoder=config.to_dict()))


def test_automatic_labels_choose_whole_words():
    #          <s>  word 0: two pieces  stop  word 2  word 3  </s>  pad
    attention = torch.tensor([[0.9, 0.1, 0.5, 0.8, 0.3, 0.4, 0.7, 0.6]])
    word_ids = torch.tensor([[-1, 0, 0, -1, 2, 3, -1, -1]])
    real = torch.tensor([[False, True, True, True, True, True, False, False]])
    assert automatic_labels(attention, word_ids, real, 2).tolist() == [[-100, 1, 1, 0, 0, 1, -100, -100]]
    assert automatic_labels(attention, word_ids, real, 9).tolist() == [[-100, 1, 1, 0, 1, 1, -100, -100]]
    nothing = torch.full_like(word_ids, -1)
    assert automatic_labels(attention, nothing, real, 3).tolist() == [[-100, 0, 0, 0, 0, 0, -100, -100]]


def test_automatic_labels_handle_rows_of_different_content():
    attention = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.9, 0.0]])
    word_ids = torch.tensor([[0, 1, 2], [-1, 0, -1]])
    real = torch.ones(2, 3, dtype=torch.bool)
    assert automatic_labels(attention, word_ids, real, 2).tolist() == [[1, 0, 1], [0, 1, 0]]


def test_losses_by_hand():
    logits = torch.log(torch.tensor([[[0.2, 0.8], [0.6, 0.4], [0.5, 0.5]]]))
    labels = torch.tensor([[1, 0, -100]])
    by_hand = -(np.log(0.8) + np.log(0.6))
    assert float(cause_loss(logits, labels, "sum")) == pytest.approx(by_hand)
    assert float(cause_loss(logits, labels, "mean")) == pytest.approx(by_hand / 2)
    assert float(cause_loss(logits, torch.full((1, 3), -100), "mean")) == 0.0
    attention = torch.tensor([[0.6, 0.1, 0.3]])
    real = torch.tensor([[False, True, True]])
    inner = 0.25 * 0.4 + 0.75 * 0.5
    probs = logits.softmax(-1)[..., 1]
    assert float(aux_loss(attention, probs, real, "literal")) == pytest.approx(inner)
    assert float(aux_loss(attention, probs, real, "complement")) == pytest.approx(1 - inner)


def test_total_loss_is_equation_9(extractor):
    model, tokenizer = extractor
    items = []
    for text, label in (("my dog died last week", 1), ("we won!", 0)):
        encoded = encode_text(tokenizer, text, split_words(text), 64)
        labels = np.where(encoded["special_tokens_mask"] == 1, -100, label)
        items.append(encoded | {"emotion_labels": 3, "cause_labels": labels, "automatic": False})
    output = model(**pad_batch(items, tokenizer.pad_token_id))
    parts = output.emotion_loss / 3 + output.cause_loss + output.aux_loss
    torch.testing.assert_close(output.loss, parts)
    output.loss.backward()
    last = model.encoder.encoder.layer[-1].attention.self
    assert last.query.weight.grad.abs().sum() > 0, "the auxiliary loss reaches the attention"


def test_unlabelled_texts_train_the_emotion_alone(extractor):
    model, tokenizer = extractor
    encoded = encode_text(tokenizer, "we won!", split_words("we won!"), 64)
    labels = np.full(len(encoded["input_ids"]), -100)
    batch = pad_batch([encoded | {"emotion_labels": 3, "cause_labels": labels, "automatic": False}], 1)
    output = model(**batch)
    assert output.cause_loss is None
    torch.testing.assert_close(output.loss, output.emotion_loss / 3)
    batch["automatic"] = torch.tensor([True])
    assert model(**batch).cause_loss is not None


def test_labels_need_what_they_are_made_from(extractor):
    model, _ = extractor
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="special_tokens_mask is needed"):
        model(ids, ids, emotion_labels=torch.tensor([1]))
    with pytest.raises(ValueError, match="word_ids are needed"):
        model(ids, ids, torch.zeros_like(ids), emotion_labels=torch.tensor([1]), automatic=torch.tensor([True]))


def test_encoding_maps_pieces_to_words(extractor):
    _, tokenizer = extractor
    text = "The  dog's 😀 gone"
    encoded = encode_text(tokenizer, text, split_words(text), 64)
    words = split_words(text)
    for (start, end), index, content in zip(
        encoded["offsets"].tolist(), encoded["word_index"].tolist(), encoded["word_ids"].tolist(), strict=True
    ):
        if start == end:
            assert index == -1
        elif index >= 0:
            assert max(start, words[index].start) < min(end, words[index].end)
        assert content in (-1, index)
    chosen = {words[index].text for index in encoded["word_ids"] if index >= 0}
    assert chosen == {"dog", "gone"}


def test_extraction(extractor):
    model, tokenizer = extractor
    texts = ["My dog passed away last week.", "", "We won the regional final! " * 4, "I feel so lonely 😀"]
    found = extract(model, tokenizer, texts, batch_size=2)
    assert [each.text for each in found] == texts
    for each in found:
        assert each.emotion_probs.shape == (len(EMPATHETIC_DIALOGUES.emotions),)
        assert float(each.emotion_probs.sum()) == pytest.approx(1, abs=1e-5)
        assert each.word_probs.shape == (len(each.words),)
        assert len(each.causes.spans) == len(each.causes.probs)
        for word, probability in zip(each.words, each.word_probs, strict=True):
            pieces = [
                p for (a, b), p in zip(*each.causes, strict=True)
                if max(a, word.start) < min(b, word.end)
            ]  # fmt: skip
            assert probability == max(pieces, default=0)
    alone = extract(model, tokenizer, [texts[0]])[0]
    np.testing.assert_allclose(alone.word_probs, found[0].word_probs, atol=1e-5)
    with pytest.raises(ValueError, match="one list per text"):
        extract(model, tokenizer, texts, words=[[]])


def test_causes_from_attention(extractor):
    model, tokenizer = extractor
    model.config.cause_from = "attention"
    found = extract(model, tokenizer, ["My dog passed away last week."])[0]
    assert float(found.causes.probs.max()) == pytest.approx(1.0)


def test_save_and_load(extractor, tmp_path):
    model, tokenizer = extractor
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin")), "safetensors alone"
    loaded, loaded_tokenizer = load_extractor(tmp_path)
    text = ["Somebody stole my bicycle."]
    before, after = extract(model, tokenizer, text)[0], extract(loaded, loaded_tokenizer, text)[0]
    assert np.array_equal(before.word_probs, after.word_probs)
    assert loaded.config.id2label[3] == EMPATHETIC_DIALOGUES.emotions[3]


def test_a_tokenizer_without_first_and_end_token(extractor, tmp_path):
    """BERT's has a class token, a separator and padding alone."""
    model, tokenizer = copy.deepcopy(extractor)
    tokenizer.bos_token = tokenizer.eos_token = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    _, loaded = load_extractor(tmp_path)
    assert loaded.eos_token is None
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="it has no pad_token"):
        load_extractor(tmp_path)


def test_folders_that_cannot_be_loaded(extractor, tmp_path, tiny_gpt2_dir):
    with pytest.raises(UserError, match="the folder does not exist"):
        load_extractor(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no config\.json"):
        load_extractor(tmp_path)
    with pytest.raises(UserError, match="type 'gpt2', not an extractor"):
        load_extractor(tiny_gpt2_dir)
    model, tokenizer = extractor
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged or cut short"):
        load_extractor(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match="no weights"):
        load_extractor(tmp_path)
