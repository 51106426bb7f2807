"""How often the most probable emotion is the right one."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def emotion_correct(emotion_probs: Sequence[ArrayLike], emotion_ids: Sequence[int]) -> NDArray[np.float64]:
    """1 where the most probable emotion is the right one, else 0: `[n]`; its mean is the accuracy.

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
