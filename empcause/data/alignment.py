"""Values that belong to pieces of a text, carried over to other pieces of the same text through its characters."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def align_max(source_spans: ArrayLike, source_values: ArrayLike, target_spans: ArrayLike) -> NDArray[np.float32]:
    """Give every target span the largest value among the source spans that overlap it.

    This is how causes found with one tokenizer reach the tokens of another.

    Args:
        source_spans: `[n, 2]` character spans `(start, end)`, in any order; empty spans overlap nothing.
        source_values: `[n]` non-negative values.
        target_spans: `[m, 2]` character spans of the same text.

    Returns:
        `[m]` float32; 0 where nothing overlaps.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    sources = np.asarray(source_spans, np.int64).reshape(-1, 2)
    targets = np.asarray(target_spans, np.int64).reshape(-1, 2)
    values = np.asarray(source_values, np.float32)
    if values.shape != (len(sources),):
        raise ValueError(f"source_values must have shape [{len(sources)}], one per span, not {list(values.shape)}.")
    if not len(sources) or not len(targets):
        return np.zeros(len(targets), np.float32)
    start = np.maximum(sources[:, None, 0], targets[None, :, 0])
    end = np.minimum(sources[:, None, 1], targets[None, :, 1])
    return np.where(start < end, values[:, None], np.float32(0)).max(axis=0)
