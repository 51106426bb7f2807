"""What cards and reports say is what the run was, and text from outside is shown in them, never executed."""

from types import SimpleNamespace

import yaml
from kinds import Guard, fault

from empcause.data import load_annotations, load_dialogues
from empcause.data.origin import Origin, origin
from empcause.training.card import model_card
from empcause.training.generator import GeneratorTrainingArguments

SAMPLE = Origin("the sample embedded in empcause", "Apache-2.0", "apache-2.0", False)
HOSTILE = "\x1b[31mred\x1b[0m\n---\nlicense: mit\n---\n# <img src=x onerror=alert(1)> [link](http://x) `a|b` \u202e$x$"


def card(args, *, steps=10, planned=10, data=SAMPLE, abilities="It answers."):
    state = SimpleNamespace(global_step=steps, max_steps=planned, epoch=2.0, best_global_step=5)
    trainer = SimpleNamespace(args=args, state=state, model=SimpleNamespace(num_parameters=lambda: 1234567))
    return model_card(trainer, {"perplexity": 12.3456}, "A model", abilities, "20 of 200 responses", data)


@fault(
    Guard(
        "empcause/training/card.py",
        "    if args.model_name_or_path:\n",
        "    if args.model_name_or_path or args.model_type:\n",
    ),
    Guard("empcause/training/card.py", "    if state.global_step < state.max_steps:\n", "    if False:\n"),
    Guard("empcause/training/card.py", "Path(path).resolve().name if Path(path).exists() else path", "path"),
    Guard("empcause/training/card.py", "(*_SETTINGS, *own)", "_SETTINGS"),
    cause="a model made from nothing, or trained in part",
    place="the model card",
    promise="says so: the architecture and its size, the steps done of those planned, every setting; no path of the machine",
)
def test_card_says_what_the_run_was(tmp_path):
    options = {
        "output_dir": str(tmp_path),
        "tokenizer_name": "gpt2",
        "extractor": str(tmp_path),
        "max_train_samples": 20,
    }
    nothing = card(GeneratorTrainingArguments(model_name_or_path="", model_type="gpt2", **options), steps=7)
    assert "Trained from nothing (gpt2, 1,234,567 parameters)" in nothing
    assert "7 optimiser steps (2 epochs) of 10 planned" in nothing
    assert "the weights are those of step 5" in nothing
    assert "| max_train_samples | 20 |" in nothing
    assert "| perplexity | 12.35 |" in nothing
    assert str(tmp_path) not in nothing
    (tmp_path / "mine").mkdir()
    tuned = card(GeneratorTrainingArguments(model_name_or_path=str(tmp_path / "mine"), **options))
    assert "Fine-tuned from `mine`, whose licence applies as well," in tuned
    assert "planned" not in tuned
    assert str(tmp_path) not in tuned


@fault(
    Guard("empcause/data/origin.py", "    if path == SAMPLE:\n", "    if False:\n"),
    Guard(
        "empcause/data/origin.py",
        "if all(_fingerprint(split) in _PAPERS for split in splits)",
        "if splits",
    ),
    cause="training or evaluation on data of the user's own",
    place="model card, reports",
    promise="they are called own data of unknown licence, by the folder's name alone; the sample is called the sample",
)
def test_own_data_are_not_the_papers(tmp_path):
    dialogues, annotations = load_dialogues("test", "sample"), load_annotations("test", "sample")
    assert origin("sample", dialogues, annotations) == SAMPLE
    folder = tmp_path / "our`chats"
    folder.mkdir()
    own = origin(folder, dialogues)
    assert own == (own.name, own.terms, "unknown", False)
    assert own.name == "the user's own data `` our`chats ``"
    text = card(GeneratorTrainingArguments(output_dir=str(tmp_path)), data=own)
    assert yaml.safe_load(text.split("---")[1]) == {"license": "unknown", "library_name": "empcause", "language": "en"}
    assert "EmpatheticDialogues" not in text
