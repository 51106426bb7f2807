"""Loading models by name: from the Hugging Face Hub if it answers, otherwise from its cache, waiting for it only once."""

import os
from pathlib import Path
from threading import Thread

import requests
from huggingface_hub import constants

from empcause.errors import UserError
from empcause.text import one_line

# Seconds that the hub may take to answer. The library itself would wait up to a minute for each file, and try twice.
PATIENCE = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or 4)
_OFFLINE_BY_CHOICE = constants.HF_HUB_OFFLINE


def reach_hub(name: str) -> None:
    """Ask the hub for an answer before a model is loaded by name; if none comes, this process works offline, from the cache.

    Args:
        name: name of the model, or its folder, which needs no network.
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

    asking = Thread(target=ask, daemon=True)  # name resolution by the system has no timeout of its own
    asking.start()
    asking.join(PATIENCE)
    constants.HF_HUB_OFFLINE = not answered


def not_found(what: str, name: str, error: Exception) -> UserError:
    """The error to raise for a model, tokenizer or encoder that could not be loaded by name or from a folder.

    Args:
        what: the kind ("tokenizer").
        name: the name or folder that the user gave.
        error: what the library raised.
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
