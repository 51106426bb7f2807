"""Loading models from folders; whatever is wrong with a folder is said in one sentence."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from empcause.errors import UserError
from empcause.outputs import RECORD, verify
from empcause.text import one_line

Model = TypeVar("Model", bound=PreTrainedModel)

# Buffers that older versions of transformers saved and newer ones compute.
_FORMER_BUFFERS = ("position_ids", "attn.bias", "masked_bias", "inv_freq")


def read_config(path: str | os.PathLike[str], what: str, how: str) -> dict[str, Any]:
    """Read the `config.json` of a model's folder.

    Args:
        path: the folder.
        what: the kind of model that is expected, for the message ("extractor").
        how: the command that makes such a model, for the message.

    Raises:
        UserError: no folder, or no readable `config.json` in it.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"There is no {what} at {folder}: the folder does not exist; `{how}` makes one.")
    if not (folder / "config.json").exists():
        raise UserError(f"There is no {what} at {folder}: the folder has no config.json; `{how}` makes one.")
    return _read_object(folder / "config.json")


def _read_object(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: {one_line(error)}; use another copy.") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} is damaged: it holds no JSON object; use another copy.")
    return values


def check_model_weights(path: str | os.PathLike[str]) -> None:
    """Check that a folder has all weights of its model. Only safetensors files count, as reading others may run code.

    If the folder has a record of its files (`empcause.outputs`), they must be as they were saved, except the README.md, which
    people edit. Without a record, opening the weight files verifies that they are complete.

    Raises:
        UserError: there are no weights, or a file is missing, cut short or changed.
    """
    folder = Path(path)
    try:
        verify(folder, unless=["README.md"])
    except UserError as error:
        raise UserError(
            f"{str(error)[:-1]}; use another copy, or delete {folder / RECORD} if you changed it."
        ) from error
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged or cut short ({error}); use another copy.") from error


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder: the single file, or those that an index lists.

    Raises:
        UserError: there is neither, or the index is damaged.
    """
    if (folder / SAFE_WEIGHTS_NAME).exists():
        return [folder / SAFE_WEIGHTS_NAME]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no weights: no {SAFE_WEIGHTS_NAME} in it.") from error
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{index} is damaged: {error}.") from error
    return [folder / name for name in sorted(names)]


def load_pretrained(
    model_class: type[Model], path: str | os.PathLike[str], what: str, how: str, model_type: str
) -> Model:
    """Load a finished model from its folder.

    Args:
        model_class: the model's class.
        path: the folder.
        what: the kind of model that is expected, for the message ("extractor").
        how: the command that makes such a model, for the message.
        model_type: the type that the folder's configuration must name.

    Raises:
        UserError: the folder is missing, holds another kind of model, or is damaged (see `load_whole`).
    """
    found = read_config(path, what, how).get("model_type")
    if found != model_type:
        raise UserError(f"{path} holds a model of type {found!r}, not an {what} (type {model_type!r}).")
    check_model_weights(path)
    if (generation := Path(path) / "generation_config.json").exists():
        _read_object(generation)  # transformers passes over a damaged one
    return load_whole(model_class, path)


def load_own_tokenizer(
    model: PreTrainedModel, path: str | os.PathLike[str], needed: Sequence[str]
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that was saved with a finished model.

    Args:
        model: the model.
        path: its folder.
        needed: attributes with the special tokens that the model is used with, for example "pad_token".

    Raises:
        UserError: there is no tokenizer, it is damaged, or it belongs to another model.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        largest = max(tokenizer.get_vocab().values())
    except Exception as error:  # tokenizers raises no class of its own
        raise UserError(f"The tokenizer in {path} is missing or damaged: {one_line(error)}") from error
    lacks = next((name for name in needed if getattr(tokenizer, name) is None), None)
    if lacks or not tokenizer.is_fast or largest >= model.get_input_embeddings().num_embeddings:
        reason = f"it has no {lacks}" if lacks else "it has tokens that the model does not know"
        raise UserError(
            f"The tokenizer in {path} is not that of its model ({reason}); use the one that was saved with it."
        )
    return tokenizer


def load_whole(
    model_class: type[Model], path: str | os.PathLike[str], new: tuple[str, ...] | None = None, **options: Any
) -> Model:
    """Load a model with `model_class.from_pretrained(path)`, and check that every weight was in the file, fits and is finite.

    transformers itself leaves weights that are missing or do not fit at random values and goes on.

    Args:
        model_class: the model's class, or an `AutoModel`.
        path: a folder, or a name on the model hub.
        new: names of the model's modules that a pretrained base model lacks and that are initialised here; heads that only the
            base model has are ignored then. None: the file must have the weights of the whole model and no others.
        **options: options of `from_pretrained`.

    Raises:
        UserError: there is no such model, its configuration is damaged, or its weights are not those of the model.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what transformers would warn of is judged below
    try:
        model, found = model_class.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, use_safetensors=True, **options
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError, SafetensorError) as error:
        raise UserError(f"The model {path} cannot be loaded: {one_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    parts = {name for name, _ in model.named_children()} - set(new or ())
    judged = {
        "missing": [key for key in found["missing_keys"] if not key.startswith(new or "none of them")],
        "of another shape": [key for key, *_ in found["mismatched_keys"]],
        "unknown to the model": [
            key
            for key in found["unexpected_keys"]
            if new is None or key.removeprefix(f"{model.base_model_prefix}.").split(".")[0] in parts
            if not key.endswith(_FORMER_BUFFERS)
        ],
        "not finite": [name for name, value in model.state_dict().items() if not value.isfinite().all()],
    }
    for fault, keys in judged.items():
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise UserError(
                f"The weights in {path} cannot be used ({fault}: {min(keys)}{more}); use another checkpoint."
            )
    return model
