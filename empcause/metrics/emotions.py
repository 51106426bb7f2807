"""Emotion accuracy: how often the most probable emotion is the annotated one."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def emotion_correct(emotion_probs: Sequence[ArrayLike], emotion_ids: Sequence[int]) -> NDArray[np.float64]:
    """Tell for which texts the most probable emotion is the annotated one.

    Args:
        emotion_probs: for each text `[E]` probabilities.
        emotion_ids: `[n]` ids of the annotated emotions.

    Returns:
        `[n]` float64, 1 where it is and 0 elsewhere; the mean is the accuracy.

    Raises:
        ValueError: the numbers of texts differ, a probability is not finite, or there is none for the right emotion.
    """
    if len(emotion_probs) != len(emotion_ids):
        raise ValueError(f"emotion_probs has {len(emotion_probs)} entries for {len(emotion_ids)} emotions.")
    for index, probs in enumerate(emotion_probs):
        if not np.isfinite(probs).all():
            raise ValueError(f"the emotion of text {index} has a probability that is not a finite number.")
        if not 0 <= emotion_ids[index] < len(np.atleast_1d(probs)):
            raise ValueError(
                f"the emotion {emotion_ids[index]} of text {index} is none of {len(np.atleast_1d(probs))}."
            )
    predicted = np.array([np.argmax(probs) for probs in emotion_probs], np.int64)
    return (predicted == np.asarray(emotion_ids)).astype(np.float64)
