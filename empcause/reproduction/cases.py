"""`empcause cases`: what every trained system finds in a few dialogues and answers, side by side (Table 10 of the paper)."""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from empcause.data import Dialogue, Word, load_dialogues, response_pairs, split_words
from empcause.errors import UserError
from empcause.files import write_text
from empcause.metrics.causes import rank_words
from empcause.outputs import working_in
from empcause.reproduction.folder import RunFolder
from empcause.reproduction.running import FIRST_SEED, WRITTEN, run_folder
from empcause.reproduction.tables import SIZES, SYSTEMS, TABLES
from empcause.systems import Answers, Reads, ReadsDialogues, load_system
from empcause.text import markdown, visible

# The two dialogues of Table 10, by their identifiers in the test split, with the words in which the paper's copy differs.
PAPER_CASES = {"hit:2814_conv:5628": {}, "hit:658_conv:1316": {"11 girls": "6 girls"}}
# Number of words that are marked in a text: those that a system ranks highest, whatever their scores are.
MARKED = 3


@dataclass(frozen=True)
class Answer:
    """What one system makes of a dialogue; what it does not do is None.

    Attributes:
        system: what the system is called.
        emotion: the most probable emotion.
        probability: its probability.
        causes: indices of the marked words, the first of them first.
        reply: the answer.
    """

    system: str
    emotion: str | None = None
    probability: float | None = None
    causes: tuple[int, ...] | None = None
    reply: str | None = None


@dataclass(frozen=True)
class Case:
    """A dialogue and what the systems make of it.

    Attributes:
        dialogue: the dialogue, with its annotated emotion and the reference as its response.
        words: the words of its text.
        printed: whether it is one of the paper's two cases.
        answers: one per system.
    """

    dialogue: Dialogue
    words: tuple[Word, ...]
    printed: bool
    answers: tuple[Answer, ...] = ()


def choose_cases(data: str | None, number: int, seed: int) -> list[Case]:
    """The paper's two inputs, where the data have them, and dialogues of the test split that the seed draws.

    Args:
        data: the data.
        number: number of dialogues that are drawn.
        seed: seed of the draw.
    """
    pairs = response_pairs(load_dialogues("test", data))
    chosen = []
    for name, differing in PAPER_CASES.items():
        for pair in (each for each in pairs if each.conv_id == name and len(each.turns) == 1):
            (turn,) = pair.turns
            for ours, theirs in differing.items():
                turn = turn.replace(ours, theirs)
            chosen.append((replace(pair, turns=(turn,)), True))
    drawn = np.random.default_rng(seed).permutation(len(pairs))[:number]
    chosen += [(pairs[index], False) for index in drawn]
    return [Case(pair, tuple(split_words(pair.text)), printed) for pair, printed in chosen]


def answer_cases(
    cases: Sequence[Case], folder: Path, extractor: Path | None, title: str, max_new_tokens: int
) -> list[Answer]:
    """Let a system read and answer dialogues.

    Args:
        cases: the dialogues.
        folder: the system's folder.
        extractor: the folder of the extractor that it needs, if any.
        title: what the system is called.
        max_new_tokens: longest answer in tokens.

    Returns:
        One answer per case.
    """
    system = load_system(folder, extractor or "")
    dialogues = [case.dialogue for case in cases]
    answers = [Answer(title) for _ in cases]
    if isinstance(system, Reads):
        words = [case.words for case in cases]
        if isinstance(system, ReadsDialogues):
            found = system.read_dialogues(dialogues, words, len(cases))
        else:
            found = system.read([each.text for each in dialogues], words, len(cases))
        dialogues = [replace(each, causes=reading.causes) for each, reading in zip(dialogues, found, strict=True)]
        for index, (case, reading) in enumerate(zip(cases, found, strict=True)):
            if reading.emotion_probs is not None:
                best = int(np.argmax(reading.emotion_probs))
                answers[index] = replace(
                    answers[index], emotion=system.emotions[best], probability=float(reading.emotion_probs[best])
                )
            if reading.word_probs is not None:
                ranking = rank_words([word.text for word in case.words], reading.word_probs)
                answers[index] = replace(answers[index], causes=tuple(ranking[:MARKED]))
    if isinstance(system, Answers):
        system.check_room(max_new_tokens)
        replies = system.answer(dialogues, len(cases), max_new_tokens)
        answers = [replace(each, reply=reply) for each, reply in zip(answers, replies, strict=True)]
    return answers


def write_cases(
    size: str,
    *,
    output_dir: Path,
    data: str | None = None,
    number: int = 8,
    seed: int = 0,
    max_new_tokens: int = 40,
) -> tuple[Path, list[Case]]:
    """Write `cases/cases.md`, `cases.html` and `cases.json` of all systems that a run folder holds.

    Args:
        size: name of the size.
        output_dir: the folder that `empcause reproduce` wrote into.
        data: the data of the dialogues; default: those of the size.
        number: number of dialogues beside the paper's two.
        seed: seed of their draw.
        max_new_tokens: longest answer in tokens.

    Returns:
        The folder with the files, and the cases.

    Raises:
        UserError: no system is trained there, or a model is damaged.
    """
    path = run_folder(output_dir, size)
    if not path.is_dir():
        raise UserError(f"There is no {path}; `empcause reproduce table7 --size {size}` trains the systems.")
    with working_in(path):
        run = RunFolder(path, WRITTEN, accept_code=True)
        trained = {
            system: path / unit for system in SYSTEMS if run.is_finished(unit := f"models/{system}/seed-{FIRST_SEED}")
        }
        if not trained:
            raise UserError(f"No system is trained in {path}; `empcause reproduce table7 --size {size}` trains them.")
        cases = choose_cases(SIZES[size].data if data is None else data, number, seed)
        answers = []
        for system, folder in trained.items():
            needed = SYSTEMS[system].extractor
            answers.append(
                answer_cases(cases, folder, trained[needed] if needed else None, _title(system), max_new_tokens)
            )
        cases = [replace(case, answers=tuple(each[index] for each in answers)) for index, case in enumerate(cases)]
        folder = path / "cases"
        folder.mkdir(exist_ok=True)
        write_text(folder / "cases.json", json.dumps([_values(case) for case in cases], indent=1, ensure_ascii=False))
        write_text(folder / "cases.md", to_markdown(cases))
        write_text(folder / "cases.html", to_html(cases))
    return folder, cases


def _title(system: str) -> str:
    """What the tables call a system."""
    rows = (row for table in reversed(TABLES.values()) for row in table.rows.values() if row.system == system)
    return next(rows).title


def _values(case: Case) -> dict[str, Any]:
    dialogue = case.dialogue
    return {
        "id": f"{dialogue.conv_id}:{len(dialogue.turns)}",
        "printed_in_the_paper": case.printed,
        "emotion": dialogue.emotion,
        "turns": dialogue.turns,
        "reference": dialogue.response,
        "answers": [
            {
                "system": each.system,
                "emotion": each.emotion,
                "probability": each.probability,
                "causes": None if each.causes is None else [case.words[index].text for index in each.causes],
                "reply": each.reply,
            }
            for each in case.answers
        ],
    }


def marked_parts(case: Case, answer: Answer) -> list[tuple[str, int]]:
    """The dialogue's text in parts, each with the rank of the marked word that it is (from 1), or 0."""
    ranks = {index: rank for rank, index in enumerate(answer.causes or (), start=1)}
    parts, end, text = [], 0, case.dialogue.text
    for index, word in enumerate(case.words):
        if index in ranks:
            parts += [(text[end : word.start], 0), (text[word.start : word.end], ranks[index])]
            end = word.end
    return [(part, rank) for part, rank in [*parts, (text[end:], 0)] if part]


def describe(case: Case, number: int) -> str:
    """The heading of a case."""
    where = "printed in the paper" if case.printed else "drawn by the seed"
    return f"Case {number}, {case.dialogue.emotion} ({where})"


def emotion_of(answer: Answer) -> str:
    """The emotion that a system finds, with its probability."""
    return "–" if answer.emotion is None else f"{answer.emotion} ({answer.probability:.0%})"


def to_markdown(cases: Sequence[Case]) -> str:
    """The cases in Markdown: causes are bold, the first of them underlined too."""
    parts = ["# Cases", f"The {MARKED} words that a system ranks highest as causes are bold."]
    for number, case in enumerate(cases, start=1):
        rows = []
        for answer in case.answers:
            text = "".join(_marked(part, rank) for part, rank in marked_parts(case, answer))
            causes = "–" if answer.causes is None else text
            reply = "–" if answer.reply is None else markdown(answer.reply) or "(empty)"
            rows.append(f"| {markdown(answer.system)} | {markdown(emotion_of(answer))} | {causes} | {reply} |")
        turns = " / ".join(case.dialogue.turns)
        parts += [
            f"## {markdown(describe(case, number))}",
            f"{markdown(turns)}",
            "\n".join(["| system | emotion | causes | answer |", "|---|---|---|---|", *rows]),
            f"Reference: {markdown(case.dialogue.response)}",
        ]
    return "\n\n".join(parts) + "\n"


def _marked(part: str, rank: int) -> str:
    """A part of a text in Markdown, whose outer spaces stay because words are joined by them."""
    if rank:
        return f"**{markdown(part)}**"
    inner = markdown(part)
    before, after = part[: len(part) - len(part.lstrip())], part[len(part.rstrip()) :]
    return f"{' ' if before else ''}{inner}{' ' if after and inner else ''}"


def to_html(cases: Sequence[Case]) -> str:
    """The cases as one HTML page that needs no other file; the first cause is marked most strongly."""
    style = (
        "body{font-family:sans-serif;max-width:70em;margin:auto}table{border-collapse:collapse}"
        "td,th{border:1px solid #ccc;padding:.3em .6em;text-align:left;vertical-align:top}"
        "mark{background:#fff3b0}mark.first{background:#ffc93c;font-weight:bold}"
    )
    body = ["<h1>Cases</h1>"]
    for number, case in enumerate(cases, start=1):
        body += [f"<h2>{_text(describe(case, number))}</h2>", f"<p>{_text(' / '.join(case.dialogue.turns))}</p>"]
        body.append("<table><tr><th>system</th><th>emotion</th><th>causes</th><th>answer</th></tr>")
        for answer in case.answers:
            marked = "".join(
                f"<mark{' class=first' if rank == 1 else ''}>{_text(part)}</mark>" if rank else _text(part)
                for part, rank in marked_parts(case, answer)
            )
            cells = [
                _text(answer.system),
                _text(emotion_of(answer)),
                "–" if answer.causes is None else marked,
                "–" if answer.reply is None else _text(answer.reply) or "(empty)",
            ]
            body.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        body.append(f"</table><p>Reference: {_text(case.dialogue.response)}</p>")
    page = "\n".join(body)
    return f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Cases</title><style>{style}</style>\n{page}\n</html>\n'


def _text(text: str) -> str:
    return html.escape(visible(text))
