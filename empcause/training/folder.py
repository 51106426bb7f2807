"""The output folder of a training: its checkpoints, whole or not, and the finished model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.trainer_utils import get_last_checkpoint

from empcause.checkpoints import check_weights
from empcause.errors import UserError

if TYPE_CHECKING:
    from empcause.training.common import StageTrainer, StageTrainingArguments


def find_checkpoint(args: "StageTrainingArguments") -> str | None:
    """What to resume from: `--resume_from_checkpoint true` (the newest whole one in output_dir), a folder, or None.

    A checkpoint whose writing was interrupted is passed over; its folder is renamed to `interrupted-...`.

    Raises:
        UserError: the named checkpoint is missing or damaged.
    """
    wanted = args.resume_from_checkpoint
    if not wanted or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() != "true":
        if not Path(wanted).is_dir():
            raise UserError(f"resume_from_checkpoint: the folder {wanted} does not exist.")
        check_weights(wanted)
        return str(wanted)
    folder = Path(args.output_dir)
    while folder.is_dir() and (newest := get_last_checkpoint(str(folder))) is not None:
        try:
            if not (Path(newest) / "trainer_state.json").exists():
                raise UserError("its writing was interrupted")
            json.loads((Path(newest) / "trainer_state.json").read_text())
            check_weights(newest)
            return newest
        except (UserError, json.JSONDecodeError):
            Path(newest).rename(Path(newest).with_name("interrupted-" + Path(newest).name))
    return None


def save_finished(trainer: "StageTrainer", metrics: Mapping[str, float], card: str) -> None:
    """Write the finished model, its tokenizer, training history, `metrics.json` and model card to the output folder.

    Args:
        trainer: after `train`; holds the best model.
        metrics: figures of the final evaluation.
        card: text of the model card, in Markdown.
    """
    folder = Path(trainer.args.output_dir)
    trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder)
    trainer.processing_class.save_pretrained(folder)
    trainer.state.save_to_json(str(folder / "trainer_state.json"))
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")
