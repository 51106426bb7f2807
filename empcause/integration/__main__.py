"""`python -m empcause.integration [CLASS ...]`: check transformers' causal language models and write the table of those that run.

Without arguments all of them, each in a process of its own with limits of time and memory; otherwise the named ones are
checked anew and the rest of the table stays.
"""

import json
import multiprocessing
import resource
import sys
import warnings
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from empcause.integration.checking import find_fault, one_line, small_config
from empcause.integration.classes import TABLE, collecting, name_of

SECONDS, BYTES = 120, 8 << 30
PARTS = ("runs", "refused", "unchecked")


def judge(model_type: str, model: str) -> tuple[str, dict[str, Any]]:
    """A model's part of the table and its entry there: the classes that run, or the reason why none does."""
    config_class = CONFIG_MAPPING[model_type]
    config = name_of(config_class)
    try:
        with collecting() as classes:
            reason = find_fault(getattr(transformers, model), small_config(config_class()))
    except Exception as error:
        return "unchecked", {"configs": [config], "reason": one_line(error.__cause__ or error)}
    if reason is not None:
        return "refused", {"configs": [config], "reason": reason}
    names = {name_of(cls) for cls in classes} | {config}
    configs = {name for name in names if ".configuration_" in name}
    return "runs", {"configs": sorted(configs), "attention": sorted(names - configs)}


def _limited(model_type: str, model: str, results: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    torch.set_num_threads(1)
    results.put(judge(model_type, model))


def main(chosen: list[str]) -> None:
    """Write the table.

    Args:
        chosen: names of models to check anew; none stands for all.

    Raises:
        SystemExit: a name is unknown, or the rest of the table was made with another version of transformers.
    """
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    warnings.simplefilter("ignore")
    table: dict[str, Any] = {part: {} for part in PARTS}
    if chosen:
        table = json.loads(TABLE.read_text(encoding="utf-8"))
        if table["transformers"] != transformers.__version__:
            sys.exit(
                f"The table was made with transformers {table['transformers']}, and {transformers.__version__} is installed: "
                "name no classes, so that all are checked anew; nothing was written."
            )
    table["transformers"] = transformers.__version__
    fork = multiprocessing.get_context("fork")
    if unknown := set(chosen) - set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        sys.exit(f"transformers has no causal language model named {', '.join(sorted(unknown))}; nothing was written.")
    models = [
        (kind, model) for kind, model in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if not chosen or model in chosen
    ]
    for part in PARTS:
        for _, model in models:
            table[part].pop(model, None)
    for model_type, model in tqdm(models, unit="class"):
        results = fork.SimpleQueue()
        process = fork.Process(target=_limited, args=(model_type, model, results))
        process.start()
        process.join(SECONDS)
        process.kill()
        config = name_of(CONFIG_MAPPING[model_type])
        part, entry = "unchecked", {"configs": [config], "reason": "its process did not end"}
        if not results.empty():
            part, entry = results.get()
        known = table[part].setdefault(model, entry)  # several configurations may share a class
        known |= {name: sorted({*known[name], *entry[name]}) for name in ("configs", "attention") if name in entry}
    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print({part: len(table[part]) for part in PARTS})


if __name__ == "__main__":
    main(sys.argv[1:])
