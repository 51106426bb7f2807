"""EmpatheticDialogues, EmoCause and the embedded sample; alignment between tokenizers."""

from empcause.data.alignment import align_max
from empcause.data.dialogue import LISTENER, SPEAKER, Causes, Dialogue, live_dialogue, response_pairs
from empcause.data.loading import DataCheck, check_data, load_annotations, load_dialogues
from empcause.data.records import EMOTIONS, CauseAnnotation, emotion_id
from empcause.data.source import EMOCAUSE, EMPATHETIC_DIALOGUES, cache_dir, download
from empcause.data.tokenizer import train_tokenizer
from empcause.data.words import Word, is_content_word, locate_words, split_words

__all__ = [
    "EMOCAUSE",
    "EMOTIONS",
    "EMPATHETIC_DIALOGUES",
    "LISTENER",
    "SPEAKER",
    "CauseAnnotation",
    "Causes",
    "DataCheck",
    "Dialogue",
    "Word",
    "align_max",
    "cache_dir",
    "check_data",
    "download",
    "emotion_id",
    "is_content_word",
    "live_dialogue",
    "load_annotations",
    "load_dialogues",
    "locate_words",
    "response_pairs",
    "split_words",
    "train_tokenizer",
]
