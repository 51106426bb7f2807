"""Data sets (EmpatheticDialogues, EmoCause, the embedded sample), dialogues and their words, alignment between tokenizers."""

from empcause.data.alignment import align_max
from empcause.data.annotation import CauseAnnotation
from empcause.data.dataset import Corpus, Dataset, Licence, emotion_id
from empcause.data.dialogue import LISTENER, SPEAKER, Causes, Dialogue, live_dialogue, response_pairs
from empcause.data.emocause import EMOCAUSE
from empcause.data.empathetic_dialogues import EMPATHETIC_DIALOGUES
from empcause.data.loading import DATASETS, DataCheck, check_data, find_corpus, load_annotations, load_dialogues
from empcause.data.source import cache_dir, download
from empcause.data.tokenizer import train_tokenizer
from empcause.data.words import Word, is_content_word, locate_words, split_words

__all__ = [
    "DATASETS",
    "EMOCAUSE",
    "EMPATHETIC_DIALOGUES",
    "LISTENER",
    "SPEAKER",
    "CauseAnnotation",
    "Causes",
    "Corpus",
    "DataCheck",
    "Dataset",
    "Dialogue",
    "Licence",
    "Word",
    "align_max",
    "cache_dir",
    "check_data",
    "download",
    "emotion_id",
    "find_corpus",
    "is_content_word",
    "live_dialogue",
    "load_annotations",
    "load_dialogues",
    "locate_words",
    "response_pairs",
    "split_words",
    "train_tokenizer",
]
