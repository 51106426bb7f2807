"""Stage 1: which words of a text caused the emotion."""

from empcause.extractor.configuration import CauseExtractorConfig
from empcause.extractor.encoding import encode_text
from empcause.extractor.inference import Extraction, extract, load_extractor, longest_input
from empcause.extractor.labels import automatic_labels
from empcause.extractor.modeling import CauseExtractor, CauseExtractorOutput

__all__ = [
    "CauseExtractor",
    "CauseExtractorConfig",
    "CauseExtractorOutput",
    "Extraction",
    "automatic_labels",
    "encode_text",
    "extract",
    "load_extractor",
    "longest_input",
]
