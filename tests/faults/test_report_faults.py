"""What cards and reports say is what the run was, and text from outside is shown in them, never executed."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from empcause.data import EMPATHETIC_DIALOGUES, load_annotations, load_dialogues, response_pairs
from empcause.data.loading import PAPERS
from empcause.data.origin import Origin, fingerprint, origin
from empcause.errors import UserError
from empcause.evaluation.causes import EvaluateCausesOptions, evaluate_causes
from empcause.evaluation.responses import EvaluateResponsesOptions, evaluate_responses
from empcause.evaluation.significance import mean_interval, perplexity_interval
from empcause.evaluation.tables import format_figure
from empcause.metrics import bits_per_byte, emotion_correct, nll_per_word, score_causes
from empcause.systems.loading import SYSTEMS
from empcause.training.card import model_card
from empcause.training.generator import GeneratorTrainingArguments
from faults.kinds import Guard, fault

SAMPLE = Origin("the sample embedded in empcause", "Apache-2.0", "apache-2.0", ("en",))
ITEMS = "empcause/evaluation/items.py"
HOSTILE = "\x1b[31mred\x1b[0m\n---\nlicense: mit\n---\n# <img src=x onerror=alert(1)> [link](http://x) `a|b` \u202e$x$"


def card(args, *, steps=10, planned=10, data=SAMPLE, abilities="It answers."):
    state = SimpleNamespace(global_step=steps, max_steps=planned, epoch=2.0, best_global_step=5)
    trainer = SimpleNamespace(args=args, state=state, model=SimpleNamespace(num_parameters=lambda: 1234567))
    return model_card(trainer, {"perplexity": 12.3456}, "A model", abilities, "20 of 200 responses", data)


@fault(
    Guard(
        "empcause/training/card.py",
        "    if base:\n",
        "    if base or args.model_type:\n",
    ),
    Guard("empcause/training/card.py", "    if state.global_step < state.max_steps:\n", "    if False:\n"),
    Guard("empcause/training/card.py", "Path(path).resolve().name if Path(path).exists() else path", "path"),
    Guard("empcause/training/card.py", "(*_SETTINGS, *own)", "_SETTINGS"),
    cause="a model made from nothing, or trained in part",
    place="the model card",
    promise="it says so: architecture and size, how many of the planned steps were done, every setting; no path of the machine",
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
    Guard("empcause/data/origin.py", "    if corpus.licence is not None:\n", "    if False:\n"),
    Guard(
        "empcause/data/origin.py",
        "if all(any(one in each.published for each in datasets) for one in prints)",
        "if (found := datasets)",
    ),
    Guard(
        "empcause/training/card.py",
        "    if origin.languages:\n",
        '    about["language"] = "en"\n    if origin.languages:\n',
    ),
    cause="training or evaluation on data of the user's own",
    place="model card, reports",
    promise="they are called own data of unknown licence and language, by the folder's name alone; the sample is the sample",
)
def test_own_data_are_not_the_papers(tmp_path):
    dialogues, annotations = load_dialogues("test", "sample"), load_annotations("test", "sample")
    assert origin("sample", dialogues, annotations) == SAMPLE
    folder = tmp_path / "our`chats"
    folder.mkdir()
    own = origin(folder, dialogues)
    assert own == (own.name, own.terms, "unknown", ())
    assert own.name == "the user's own data `` our`chats ``"
    text = card(GeneratorTrainingArguments(output_dir=str(tmp_path)), data=own)
    assert yaml.safe_load(text.split("---")[1]) == {"license": "unknown", "library_name": "empcause"}
    assert "EmpatheticDialogues" not in text
    sample = card(GeneratorTrainingArguments(output_dir=str(tmp_path)))
    assert yaml.safe_load(sample.split("---")[1])["language"] == ["en"]


def evaluate(extractor, generator, folder, **options):
    """Evaluate a generator on the sample, or as the options say; its report and figures."""
    defaults = {"data": "sample", "max_samples": 6, "max_new_tokens": 3}
    made = evaluate_responses(
        EvaluateResponsesOptions(
            model=str(generator), extractor=str(extractor), output_dir=str(folder), **(defaults | options)
        )
    )
    return (folder / "report.md").read_text(encoding="utf-8"), made


@fault(
    Guard(
        "empcause/evaluation/responses.py",
        "PUBLISHED_RESPONSES.get(results.data.name, {})",
        'PUBLISHED_RESPONSES["EmpatheticDialogues"]',
    ),
    Guard("empcause/evaluation/responses.py", 'if options.split == "test" and', "if"),
    Guard("empcause/evaluation/responses.py", " and len(responses) == results.whole:", ":"),
    Guard(
        "empcause/evaluation/responses.py",
        "(*values[:3], *(values[3:] if same_scale else (None, None, None)))",
        "values",
    ),
    cause="figures of a part of the data, of another split, of other data, or on another scale",
    place="empcause evaluate generator, its report",
    promise="the paper's rows stand only beside the whole test split of its data; else a sentence says what was measured",
)
def test_papers_rows_only_beside_the_papers_data(small_extractor, small_generator, tmp_path, monkeypatch):
    report, _ = evaluate(small_extractor, small_generator, tmp_path / "sample")
    everything = len(response_pairs(load_dialogues("test", "sample")))
    assert f"on 6 of {everything} responses of the sample embedded in empcause (split test), 6 generated" in report
    assert "(paper)" not in report
    assert "No published figures stand beside these" in report
    dialogues = load_dialogues("test", "sample")[:2]
    whole = sum(len(dialogue.turns) // 2 for dialogue in dialogues)
    monkeypatch.setattr("empcause.evaluation.responses.load_dialogues", lambda *_: dialogues)
    options = {"data": str(tmp_path), "max_samples": None}
    own, _ = evaluate(small_extractor, small_generator, tmp_path / "own", **options)
    assert "(paper)" not in own
    whole_data = replace(EMPATHETIC_DIALOGUES, published=frozenset({fingerprint(dialogues)}))
    monkeypatch.setattr("empcause.data.loading.PAPERS", replace(PAPERS, dialogues=whole_data))
    shown, figures = evaluate(small_extractor, small_generator, tmp_path / "whole", **options)
    assert figures["generated_responses"] == whole
    assert "| ECG (paper) | 14.063 | 0.025 | 0.109 | – | – | – |" in shown, (
        "BERTScore of another encoder is another scale"
    )
    for part in ({"split": "valid"}, {"max_generated": 1}, {"max_samples": 1}):
        shown, _ = evaluate(small_extractor, small_generator, tmp_path / str(part), **(options | part))
        assert "(paper)" not in shown


@fault(
    Guard("empcause/evaluation/report.py", 'if items["scored"] != scored:', "if False:"),
    cause="--compare with an evaluation of other items: another seed, subset, split or tokenizer, as many of them",
    place="empcause evaluate",
    promise="refused before the work; on the same items the paired difference of a model to itself is 0",
)
def test_compared_items_are_the_same_items(small_extractor, small_generator, tmp_path):
    evaluate(small_extractor, small_generator, tmp_path / "first", seed=0)
    _, same = evaluate(small_extractor, small_generator, tmp_path / "same", compare=str(tmp_path / "first"))
    assert same["perplexity_difference"] == [0, 0, 0]
    for other in ({"seed": 1}, {"split": "valid"}, {"max_samples": 5}):
        with pytest.raises(UserError, match="scored other items"):
            evaluate(small_extractor, small_generator, tmp_path / "other", compare=str(tmp_path / "first"), **other)
    assert not (tmp_path / "other").exists()


class Repeats:
    """A system that reads a file of its folder in a form of its own, and answers with it."""

    note = "a stranger"

    def __init__(self, folder, file):
        self.folders = {"model": Path(folder)}
        self.words = (self.folders["model"] / file).read_text()

    def check_room(self, max_new_tokens):
        pass

    def answer(self, dialogues, batch_size, max_new_tokens):
        return [self.words] * len(dialogues)


@pytest.mark.parametrize("file", ["words.bin", "chat_template.jinja", "parts/words"])
@fault(
    Guard(ITEMS, "        names += [", "        names += [] and ["),
    Guard(ITEMS, "        if folder.resolve() == output_dir.resolve():\n", "        if False:\n"),
    Guard(ITEMS, 'or made_by.startswith("empcause evaluate ")', ""),
    cause="any file of an evaluated model has changed, or the evaluation is to write into the model's own folder",
    place="empcause evaluate, once more",
    promise="the change is noticed and nothing is mixed; a model's folder is refused for results, a folder in it is not",
)
def test_an_evaluated_model_has_changed(small_extractor, tmp_path, monkeypatch, file):
    monkeypatch.setitem(SYSTEMS, "stranger", lambda folder, _: Repeats(folder, file))
    model = tmp_path / "model"
    (model / file).parent.mkdir(parents=True)
    (model / "config.json").write_text('{"model_type": "stranger"}')
    for place in (tmp_path / "beside", model / "evaluation"):
        (model / file).write_text("I see.")
        evaluate(small_extractor, model, place)
        evaluate(small_extractor, model, place)
        (model / "README.md").write_text("A model card is no part of the model.")
        evaluate(small_extractor, model, place)
        (model / file).write_text("I hear you.")
        with pytest.raises(UserError, match="another model"):
            evaluate(small_extractor, model, place)
        report, _ = evaluate(small_extractor, model, place, overwrite_output_dir=True)
        assert "I hear you." in report
    with pytest.raises(UserError, match=r"output_dir .*model is the folder of the model that is evaluated"):
        evaluate(small_extractor, model, model)
    assert not (model / "report.md").exists()


@fault(
    Guard(ITEMS, "    if not unknown:\n", "    if True:\n"),
    Guard("empcause/evaluation/responses.py", "        if no_accuracy is None:\n", "        if True:\n"),
    cause="the extractor knows other emotions than the data have",
    place="empcause evaluate",
    promise="it is said which model knows which emotions, and what would work; perplexity, which needs none, is measured",
)
def test_emotions_of_other_data(small_extractor, small_generator, tmp_path, caplog, monkeypatch):
    from empcause.systems.own import ExtractorSystem

    _, right = evaluate(small_extractor, small_generator, tmp_path / "right")
    others = tuple(f"mood {number}" for number in range(32))
    monkeypatch.setattr(ExtractorSystem, "emotions", others)
    why = rf"{small_extractor} knows other emotions \(mood 0, .*mood 31\) than the sample embedded .* are unknown to it \("
    options = {"model": str(small_extractor), "data": "sample", "output_dir": str(tmp_path / "extractor")}
    with pytest.raises(UserError, match=rf"{why}.*; evaluate it on data with its emotions"):
        evaluate_causes(EvaluateCausesOptions(**options))
    assert not (tmp_path / "extractor").exists()
    report, figures = evaluate(small_extractor, small_generator, tmp_path / "other")
    assert figures["perplexity"] == right["perplexity"]
    assert "emotion_accuracy" in right
    assert "emotion_accuracy" not in figures
    for said in (caplog.text, report):
        assert re.search(why.replace(r"\(", r"\\?\("), said)
        assert "needs an extractor that was trained on these data" in said


@fault(
    Guard("empcause/evaluation/significance.py", "    if number == 1:\n", "    if False:\n"),
    Guard("empcause/evaluation/significance.py", "if not np.isfinite(values).all():", "if False:"),
    Guard(
        "empcause/metrics/responses.py",
        "return float(np.sum(nll) / words) if words else None",
        "return float(np.sum(nll) / max(1, words))",
    ),
    Guard(
        "empcause/metrics/responses.py",
        "return float(np.sum(nll) / np.log(2) / size) if size else None",
        "return float(np.sum(nll) / np.log(2) / max(1, size))",
    ),
    Guard(
        "empcause/metrics/causes.py",
        "if not annotation.gold or not np.isfinite(probs).all():",
        "if not annotation.gold:",
    ),
    Guard("empcause/metrics/emotions.py", "        if not np.isfinite(probs).all():\n", "        if False:\n"),
    Guard("empcause/metrics/emotions.py", "if len(emotion_probs) != len(emotion_ids):", "if False:"),
    cause="a single item, no words, figures that are not numbers, lists of different lengths",
    place="metrics and intervals",
    promise="an undefined figure is a dash, that of a single item has no interval and says so; everything else is refused",
)
def test_figures_that_do_not_exist():
    alone = perplexity_interval([2.0], [4])
    assert alone == (pytest.approx(np.exp(0.5)), None, None)
    assert str(alone) == "1.649 (of one item: no interval)"
    assert format_figure(nll_per_word([3.0], ["…?!"[:0]])) == "–"
    assert format_figure(bits_per_byte([3.0], [""])) == "–"
    assert nll_per_word([3.0], ["one two"]) == 1.5
    with pytest.raises(ValueError, match="item 1 has a figure that is not a finite number"):
        mean_interval([1.0, np.nan, 2.0])
    with pytest.raises(ValueError, match="1 entries for 2 emotions"):
        emotion_correct([[0.2, 0.8]], [1, 1])
    with pytest.raises(ValueError, match="text 1 has a probability that is not a finite number"):
        emotion_correct([[0.2, 0.8], [np.nan, 0.1]], [1, 1])
    annotation = load_annotations("test", "sample")[0]
    with pytest.raises(ValueError, match="a probability that is not a finite number"):
        score_causes([annotation], [[np.nan] * len(annotation.words)])
    with pytest.raises(ValueError, match="no annotated word"):
        score_causes([replace(annotation, gold=())], [[0.5] * len(annotation.words)])


@fault(
    Guard("empcause/text.py", 'return _MARKDOWN.sub(r"\\\\\\g<0>", visible(text)).strip()', "return text.strip()"),
    Guard("empcause/text.py", '    text = visible(text)\n    ticks = "`" * (1 +', '    ticks = "`" * (0 *'),
    Guard("empcause/evaluation/responses.py", "markdown(response) or", "response or"),
    Guard("empcause/evaluation/responses.py", 'markdown(" / ".join(pair.turns))', '" / ".join(pair.turns)'),
    Guard("empcause/evaluation/responses.py", "(code(options.model), results", "(f'`{options.model}`', results"),
    cause="escape sequences, HTML, links, pipes, backticks and new lines in dialogues, answers and folders' names",
    place="report and model card in Markdown",
    promise="each is shown as it is written: one row per dialogue, no element but our own",
)
def test_markdown_shows_what_texts_hold(small_extractor, small_generator, tmp_path, monkeypatch):
    from markdown_it import MarkdownIt

    dialogue = replace(load_dialogues("test", "sample")[0], turns=(HOSTILE, "Fine."), roles=(0, 1))
    monkeypatch.setattr("empcause.evaluation.responses.load_dialogues", lambda *_: [dialogue])
    monkeypatch.setattr("empcause.systems.own.generate_responses", lambda *_, **__: [HOSTILE])
    model = tmp_path / "`<b>x</b>\x1b[1m"
    shutil.copytree(small_generator, model)
    report, _ = evaluate(small_extractor, model, tmp_path / "report")
    (tmp_path / "``\x1b`").mkdir()
    options = GeneratorTrainingArguments(output_dir=str(tmp_path), model_name_or_path=str(tmp_path / "``\x1b`"))
    for text in (report, card(options)):
        assert "\x1b" not in text
        assert "\u202e" not in text
    assert yaml.safe_load(card(options).split("---")[1])["license"] == "apache-2.0"
    html = MarkdownIt("commonmark").enable("table").render(report)
    assert html.count("<a ") == 0
    assert re.findall(r"<img src=.(\S+?).\s", html) == ["causes.png"]
    assert "<b>" not in html
    assert html.count("&lt;img src=x onerror=alert(1)&gt;") == 2, "in the context and in the answer"
    assert html.count(r"\x1b[31mred\x1b[0m\n---\nlicense: mit") == 2
    assert len(re.findall("<tr>", html.split("<table>")[-1])) == 2


@fault(
    Guard("empcause/training/common.py", '.replace("<", r"\\u003c")'),
    Guard("empcause/training/common.py", '.replace("](", r"]\\u0028")'),
    cause="HTML, links, pictures and escape sequences in the name of a folder",
    place="TensorBoard, which shows a training's options as Markdown",
    promise="they are shown as they are written; the options are the same once they are read",
)
def test_tensorboard_shows_names_as_they_are(tmp_path):
    from transformers.integrations import TensorBoardCallback

    options = GeneratorTrainingArguments(output_dir=str(tmp_path), data=f"{HOSTILE} ![p](http://x/y.png)")
    assert json.loads(options.to_json_string())["data"] == options.data
    state = SimpleNamespace(is_world_process_zero=True, is_hyper_param_search=False)
    callback = TensorBoardCallback()
    callback.on_train_begin(options, state, None)
    callback.on_train_end(options, state, None)
    events = b"".join(path.read_bytes() for path in tmp_path.rglob("events.*"))
    assert rb"\u003cimg src=x onerror=alert(1)>" in events
    for executed in (b"\x1b[31m", b"<img", b"](http", "\u202e".encode()):
        assert executed not in events
