"""Models by name: from the Hugging Face Hub while it answers, else from its cache, without waiting for it again and again."""

import os
from pathlib import Path
from threading import Thread

import requests
from huggingface_hub import constants

from empcause.errors import UserError
from empcause.text import one_line

# Seconds that the hub may take to answer; asked for a file, the library would wait six times ten and try twice.
PATIENCE = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or 4)
_OFFLINE_BY_CHOICE = constants.HF_HUB_OFFLINE


def reach_hub(name: str) -> None:
    """Before a model is loaded by name: if the hub does not answer, this process works offline, from the cache.

    Args:
        name: of the model, or its folder, which needs no network.
    """
    if Path(name).exists() or constants.HF_HUB_OFFLINE:
        return
    answered = []

    def ask() -> None:
        try:
            requests.head(constants.ENDPOINT, timeout=PATIENCE)
        except requests.RequestException:
            return
        answered.append(True)

    asking = Thread(target=ask, daemon=True)  # the system's search for an address knows no timeout
    asking.start()
    asking.join(PATIENCE)
    constants.HF_HUB_OFFLINE = not answered


def not_found(what: str, name: str, error: Exception) -> UserError:
    """The sentence for a model, tokenizer or encoder that could not be loaded by name or from a folder.

    Args:
        what: its kind.
        name: as the user gave it.
        error: what transformers said.
    """
    if Path(name).exists() or not constants.HF_HUB_OFFLINE:
        return UserError(f"There is no {what} {name!r}: {one_line(error)}")
    why, how = (
        f"{constants.ENDPOINT} does not answer within {PATIENCE:g} seconds",
        "set HF_HUB_ETAG_TIMEOUT to more of them",
    )
    if _OFFLINE_BY_CHOICE:
        why, how = "HF_HUB_OFFLINE is set", "unset it"
    return UserError(f"There is no {what} {name!r} in the cache, and {why}; give a folder, or {how}.")
