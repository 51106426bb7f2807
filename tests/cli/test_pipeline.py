"""The whole pipeline through the command line, on the embedded sample."""

import io
import json
import re

import pytest

from empcause.cli import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "run"
    assert main(["demo", "--output_dir", str(folder)]) == 0
    return folder


def test_demo_writes_a_report(demo):
    report = (demo / "report.md").read_text()
    assert "promises no quality" in report
    pictures = re.findall(r"\((\S+\.png)\)", report)
    assert len(pictures) == 4
    assert all((demo / picture).read_bytes()[:4] == b"\x89PNG" for picture in pictures)
    metrics = json.loads((demo / "metrics.json").read_text())
    assert 0 < metrics["extractor"]["top5_recall"] <= 1
    assert metrics["generator"]["perplexity"] > 1
    for stage in ("extractor", "generator"):
        assert "(paper)" not in (demo / "evaluation" / stage / "report.md").read_text(), (
            "the sample is not the paper's data"
        )


def models(demo):
    return ["--extractor", str(demo / "extractor"), "--generator", str(demo / "generator"), "--max_new_tokens", "8"]


def test_respond_names_emotion_causes_and_response(demo, capsys):
    assert main(["respond", "My sister moved to Norway and I feel so lonely.", *models(demo)]) == 0
    shown = capsys.readouterr().out
    for part in ("emotion", "causes", "response", "Norway"):
        assert part in shown
    assert re.search(r"^emotion   \w+ \(\d+%\)$", shown, re.M)


def test_chat_keeps_the_dialogue_until_reset(demo, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("My dog died.\nHe was old.\n/reset\nWe won!\n/quit\n"))
    assert main(["chat", *models(demo)]) == 0
    dialogues = re.findall(r"dialogue\s+(.*)", capsys.readouterr().out)
    assert dialogues[0].startswith("My dog died.")
    assert "He was old." in dialogues[1] or "My dog died." in dialogues[1]
    assert dialogues[2].startswith("We won!")


def test_evaluation_with_a_paired_difference(demo, capsys, tmp_path):
    arguments = ["--model", str(demo / "generator"), "--extractor", str(demo / "extractor"), "--data", "sample"]
    earlier = demo / "evaluation" / "generator"
    options = ["--compare", str(earlier), "--output_dir", str(tmp_path), "--max_generated", "4"]
    assert main(["evaluate", "generator", *arguments, *options]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["perplexity_difference"] == [0, 0, 0], "a model does not differ from itself"
    assert metrics["generated_responses"] == 4
    extractor = ["--model", str(demo / "extractor"), "--data", "sample", "--output_dir", str(tmp_path / "e")]
    assert main(["evaluate", "extractor", *extractor, "--compare", str(demo / "evaluation" / "extractor")]) == 0
    assert "paired" in (tmp_path / "e" / "report.md").read_text()
    capsys.readouterr()
    other_kind = ["--compare", str(earlier)]
    assert main(["evaluate", "extractor", *extractor, *other_kind]) == 2
    assert "scored other items" in capsys.readouterr().err
    assert main(["evaluate", "extractor", *extractor, "--compare", str(tmp_path / "none")]) == 2
    assert "--compare" in capsys.readouterr().err
