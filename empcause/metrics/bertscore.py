"""BERTScore (Zhang and others, 2020): how similar responses and references are in the space of an encoder."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from empcause.errors import UserError
from empcause.hub import not_found, reach_hub
from empcause.text import one_line


class BertScore:
    """Computes BERTScore with bert-score. Figures of `roberta-large` are rescaled with the library's baseline, as the published
    ones are; other encoders have no baseline, and their figures are raw.

    Args:
        model: the encoder, by name or folder.
        layer: the encoder's layer; None is the one that the library recommends.

    Attributes:
        setting: the library's hash of model, layer and versions, and the scale.
        rescaled: whether figures are rescaled with the baseline.

    Raises:
        UserError: bert-score is not installed, or there is no such encoder or layer.
    """

    def __init__(self, model: str, layer: int | None) -> None:
        try:
            from bert_score import BERTScorer
        except ImportError as error:
            raise UserError("BERTScore needs bert-score: pip install 'empcause[evaluation]'.") from error
        self.rescaled = rescale = model == "roberta-large"
        if layer is None and not rescale:
            raise UserError("--bertscore_layer is needed with an encoder other than roberta-large.")
        reach_hub(model)
        try:
            self._scorer = BERTScorer(
                model_type=model, num_layers=layer, lang="en" if rescale else None, rescale_with_baseline=rescale
            )
        except OSError as error:
            raise not_found("encoder", model, error) from error
        except (ValueError, LookupError, AssertionError) as error:
            raise UserError(f"--bertscore_model {model} cannot be used: {one_line(error)}") from error
        scale = "rescaled with the baseline" if rescale else "raw, no baseline for this encoder"
        self.setting = f"{self._scorer.hash.replace(model, Path(model).name)}, {scale}"

    def __call__(self, responses: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
        """Compute precision, recall and F of each response: `[n, 3]` float64. An empty response scores 0."""
        values = np.zeros((len(responses), 3))
        filled = [index for index, response in enumerate(responses) if response.strip()]
        if filled:
            scores = self._scorer.score([responses[index] for index in filled], [references[index] for index in filled])
            values[filled] = np.stack([score.numpy() for score in scores], axis=1)
        return values
