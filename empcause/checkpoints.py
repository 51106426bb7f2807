"""Loading pretrained folders with one clear sentence for whatever is wrong with them."""

import json
import os
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from empcause.errors import UserError

Model = TypeVar("Model", bound=PreTrainedModel)


def read_config(path: str | os.PathLike[str], what: str, how: str) -> dict[str, Any]:
    """The `config.json` of a model's folder.

    Args:
        path: the folder.
        what: the kind of model, for the message ("extractor").
        how: the command that makes one, for the message.

    Raises:
        UserError: no folder, or no readable `config.json` in it.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"There is no {what} at {folder}: the folder does not exist; `{how}` makes one.")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"There is no {what} at {folder}: the folder has no config.json; `{how}` makes one.") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{folder / 'config.json'} is damaged: {error}.") from error
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'} is damaged: it holds no JSON object.")
    return config


def check_weights(path: str | os.PathLike[str]) -> None:
    """Open every safetensors file of a folder, which verifies that it is complete.

    Raises:
        UserError: there is none, or one is cut short.
    """
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:
        raise UserError(f"{path} has no weights: no *.safetensors file in it.")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise UserError(f"{file} is damaged or cut short ({error}); use another checkpoint.") from error


def load_pretrained(
    model_class: type[Model], path: str | os.PathLike[str], what: str, how: str, model_type: str
) -> Model:
    """`model_class.from_pretrained(path)` after checks.

    Raises:
        UserError: the folder is missing, holds another kind of model, or is damaged.
    """
    found = read_config(path, what, how).get("model_type")
    if found != model_type:
        raise UserError(f"{path} holds a model of type {found!r}, not an {what} (type {model_type!r}).")
    check_weights(path)
    return model_class.from_pretrained(path)
