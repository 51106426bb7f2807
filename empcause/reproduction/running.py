"""`empcause reproduce TABLE`: trains what is missing, evaluates it, and writes the table after every row."""

import json
import os
import signal
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from empcause.checkpoints import check_model_weights
from empcause.data import load_annotations, load_dialogues, response_pairs
from empcause.data.origin import origin
from empcause.errors import Interrupted, UserError
from empcause.evaluation.items import SAVED, SavedItems
from empcause.files import write_text
from empcause.metrics.causes import rank_words
from empcause.outputs import read_record, working_in
from empcause.reproduction.folder import RunFolder, Subject, code_digests, data_digests
from empcause.reproduction.pretrained import TINY_MODELS, make_tiny_models
from empcause.reproduction.results import write_results
from empcause.reproduction.tables import (
    SIZES,
    SYSTEMS,
    TABLES,
    TINY_DECODER,
    TINY_ENCODER,
    Options,
    Table,
    effective_options,
    recipe_path,
    training_of,
)

# Makes the options of a command of its words, and gives a function that runs it: what `empcause COMMAND STAGE WORDS` does.
Prepare = Callable[[str, str, Sequence[str]], tuple[str, Callable[[], Mapping[str, Any]]]]

FIRST_SEED = 42
WRITTEN = ("models", "views", "evaluation", "pretrained", *TABLES, "scorecard", "cases")
_EVALUATED = {
    "extractor": ("metrics.json", "items.json"),
    "generator": ("metrics.json", "items.json", "responses.json"),
}


def run_folder(output_dir: Path, size: str) -> Path:
    """Folder of everything of one size."""
    return output_dir / size


@dataclass
class Run:
    """One reproduction: where it works, with which data, and how commands are run there.

    Attributes:
        size: name of the size.
        data: what `--data` is for all commands.
        folder: the run folder, whose lock the process holds.
        prepare: makes a command.
        say: tells the user what is done.
        digests: digest of every split of the data.
    """

    size: str
    data: str | None
    folder: RunFolder
    prepare: Prepare
    say: Callable[[str], None]
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """Path of the run folder."""
        return self.folder.path

    def words(self, options: Mapping[str, Any]) -> list[str]:
        """Options as words of a command, with the folders of tiny models in their places."""
        tiny = {TINY_ENCODER: self.path / "pretrained" / "encoder", TINY_DECODER: self.path / "pretrained" / "decoder"}
        values = {name: tiny.get(value, value) if isinstance(value, str) else value for name, value in options.items()}
        return [f"--{name}={value}" for name, value in values.items() if value is not None]


def train(run: Run, system: str, seed: int) -> Path:
    """Train a system unless that is done; an interrupted training is continued.

    Returns:
        Folder of the finished model.

    Raises:
        UserError: the folder holds a model that was made of something else, or the training fails.
        Interrupted: Ctrl-C or SIGTERM.
    """
    known, training = SYSTEMS[system], training_of(system, run.size)
    unit = f"models/{system}/seed-{seed}"
    folder = run.path / unit
    options = dict(training.options) | {"seed": seed, "data": run.data, "output_dir": str(folder)}
    needed = {}
    if known.extractor:
        options["extractor"] = str(train(run, known.extractor, seed))
        needed[known.extractor] = run.folder.made(f"models/{known.extractor}/seed-{seed}")["files"]
    begun = read_record(folder) is not None if folder.is_dir() else False
    words = ["--config", str(recipe_path(training.recipe)), *run.words(options)]
    words += ["--resume_from_checkpoint=true"] if begun else []
    module, work = run.prepare("train", known.stage, words)
    subject = _subject(run, system, effective_options(training), needed, module)
    if not run.folder.begin(unit, subject, redo=system):
        run.say(f"{'continues' if begun else 'starts'} to train {system}, seed {seed}")
        with _interrupted(f"while {system} was trained"):
            work()
        check_model_weights(folder)
        record = read_record(folder)
        assert record is not None
        run.folder.finish(unit, [name for name, made in record.files.items() if made and name != "README.md"])
    return folder


def _evaluations(table: Table, key: str, seed: int) -> dict[str, Options]:
    """The units that evaluate a row, by their names, each with the view that it is of; an empty one is the system itself."""
    views = table.rows[key].views or ({},)
    unit = f"evaluation/{table.task}/{key}/seed-{seed}"
    return {unit if len(views) == 1 else f"{unit}-view-{number}": view for number, view in enumerate(views, start=1)}


def evaluate(run: Run, table: Table, key: str, seed: int) -> list[Path]:
    """Evaluate the system of a row unless that is done; an interrupted evaluation is continued.

    Returns:
        Folders of the evaluations, one for each view of the system.

    Raises:
        UserError: the folder holds an evaluation of something else, or the evaluation fails.
        Interrupted: Ctrl-C or SIGTERM.
    """
    trained = train(run, table.rows[key].system, seed)
    return [_evaluate(run, table, key, seed, trained, *each) for each in _evaluations(table, key, seed).items()]


def _evaluate(run: Run, table: Table, key: str, seed: int, trained: Path, unit: str, view: Options) -> Path:
    """Evaluate one view of a trained system; gives the folder of the evaluation."""
    system, folder = table.rows[key].system, run.path / unit
    chosen: dict[str, Any] = {}
    if table.task == "generator":
        chosen = {"max_samples": responses_of(run)} | dict(SIZES[run.size].responses)
    model = trained
    if view:
        model = run.path / "views" / key / folder.name
        model.mkdir(parents=True, exist_ok=True)
        values = dict(view) | {system: os.path.relpath(trained, model)}
        write_text(model / "config.json", json.dumps(values, indent=1) + "\n")
    needed = {system: run.folder.made(f"models/{system}/seed-{seed}")["files"]}
    options = chosen | {"model": str(model), "data": run.data, "output_dir": str(folder)}
    if table.task == "generator" and (extractor := SYSTEMS[system].extractor):
        options["extractor"] = str(run.path / f"models/{extractor}/seed-{seed}")
        needed[extractor] = run.folder.made(f"models/{extractor}/seed-{seed}")["files"]
    module, work = run.prepare("evaluate", table.task, run.words(options))
    if run.folder.begin(unit, _subject(run, system, dict(view) | chosen, needed, module), redo=system):
        return folder
    run.say(f"evaluates {key}, {folder.name.replace('-', ' ')}")
    with _interrupted(f"while {key} was evaluated"):
        work()
    run.folder.finish(unit, _EVALUATED[table.task])
    return folder


def responses_of(run: Run) -> int:
    """Number of responses in the test split: all are scored, in an order that is drawn by the seed of the evaluation."""
    return len(response_pairs(load_dialogues("test", run.data)))


def _subject(run: Run, system: str, options: Mapping[str, Any], needed: Mapping[str, str], module: str) -> Subject:
    """What a unit is made of (see `RunFolder`)."""
    return {
        "recipe": {"system": system} | dict(options),
        "data": dict(run.digests),
        "systems": dict(needed),
        "code": code_digests(module),
    }


@contextmanager
def _interrupted(when: str) -> Iterator[None]:
    """Say that the same command goes on after Ctrl-C or SIGTERM."""
    try:
        yield
    except KeyboardInterrupt as stop:
        number = getattr(stop, "signal", signal.SIGINT)
        raise Interrupted(f"interrupted {when}; the same command goes on from there.", number) from stop


def reproduce(
    name: str,
    size: str,
    *,
    prepare: Prepare,
    output_dir: Path,
    seeds: int = 1,
    data: str | None = None,
    rows: Collection[str] = (),
    redo: Collection[str] = (),
    accept_code: bool = False,
    command: str = "",
    say: Callable[[str], None] = print,
) -> Path:
    """Reproduce a table as far as it is not done yet.

    Args:
        name: name of the table.
        size: name of the size.
        prepare: makes a command of the package.
        output_dir: folder that holds a folder for each size.
        seeds: number of seeds, from 42 on.
        data: the data, for sizes that do not name theirs.
        rows: the rows that are made; empty: all. The table shows the others too, where they are finished.
        redo: systems whose models and evaluations are removed first.
        accept_code: go on with what other code made.
        command: the command as the user typed it, for the results.
        say: tells the user what is done.

    Returns:
        The folder with `results.json`, `table.md`, `table.tex` and `items.jsonl`.

    Raises:
        UserError: data or models are missing, or the run folder holds what was made of something else.
        Interrupted: Ctrl-C or SIGTERM; the same command goes on.
    """
    table, path = TABLES[name], run_folder(output_dir, size)
    if SIZES[size].data is not None and data not in (None, SIZES[size].data):
        raise UserError(f"--size {size} is measured on the embedded sample; leave out --data.")
    data = SIZES[size].data if data is None else data
    if unknown := [row for row in rows if row not in table.rows]:
        raise UserError(f"{name} has no row {unknown[0]!r}; its rows are {', '.join(table.rows)}.")
    if unknown := [system for system in redo if system not in SYSTEMS]:
        raise UserError(f"--redo: there is no system {unknown[0]!r}; expected one of {', '.join(SYSTEMS)}.")
    with working_in(path):
        run = Run(size, data, RunFolder(path, WRITTEN, accept_code), prepare, say, data_digests(data))
        for system in redo:
            run.folder.remove(system)
        if size == "smoke" and not all((path / "pretrained" / each / "config.json").exists() for each in TINY_MODELS):
            make_tiny_models(path / "pretrained")
        made: dict[str, dict[int, list[Path]]] = {key: {} for key, row in table.rows.items() if row.system}
        wanted = [(seed, key) for seed in range(FIRST_SEED, FIRST_SEED + seeds) for key in made]
        # What is finished comes first, so that no table has fewer rows than the one before it.
        finished = [
            (seed, key) for seed, key in wanted if all(map(run.folder.is_finished, _evaluations(table, key, seed)))
        ]
        for seed, key in finished:
            made[key][seed] = evaluate(run, table, key, seed)
        for seed, key in wanted:
            if seed not in made[key] and (not rows or key in rows):
                made[key][seed] = evaluate(run, table, key, seed)
                _write(run, name, made, command)
        return _write(run, name, made, command)


def _write(run: Run, name: str, made: Mapping[str, Mapping[int, Sequence[Path]]], command: str) -> Path:
    """Write the table of what is there."""
    made = {key: by_seed for key, by_seed in made.items() if by_seed}
    table, folder = TABLES[name], run.path / name
    folder.mkdir(exist_ok=True)
    annotations = load_annotations("test", run.data) if table.task == "extractor" else []
    tested = annotations or load_dialogues("test", run.data)
    systems = {}
    for key, by_seed in made.items():
        system = table.rows[key].system
        training = training_of(system, run.size)
        systems[key] = {
            "system": system,
            "recipe": training.recipe,
            "options": dict(training.options),
            "models": {
                str(seed): run.folder.made(f"models/{system}/seed-{seed}")
                | {"training": length_of_training(run.path / f"models/{system}/seed-{seed}")}
                for seed in by_seed
            },
        }
    about = {
        "table": name,
        "size": run.size,
        "command": command,
        "data": {"name": origin(run.data, tested).name} | run.digests,
        "evaluation": dict(SIZES[run.size].responses) if table.task == "generator" else {},
        "systems": systems,
    }
    write_results(folder, name, about, made, annotations)
    _write_items(folder / "items.jsonl", table, made, annotations)
    return folder


def length_of_training(model: Path) -> dict[str, Any]:
    """How long a finished model was trained, and whether early stopping ended that ("converged") or its planned end ("stopped by
    budget")."""
    state = json.loads((model / "trainer_state.json").read_text(encoding="utf-8"))
    steps, planned = state["global_step"], state["max_steps"]
    ended = "converged" if steps < planned else "stopped by budget"
    return {"steps": steps, "planned_steps": planned, "epochs": round(state["epoch"] or 0, 3), "ended": ended}


def _write_items(
    path: Path, table: Table, made: Mapping[str, Mapping[int, Sequence[Path]]], annotations: Sequence[Any]
) -> None:
    """Write every tested text with what each system made of it, one JSON object per line. These are texts of the data set."""
    with path.open("w", encoding="utf-8") as file:
        for key, by_seed in made.items():
            for seed, folders in by_seed.items():
                for view, folder in enumerate(folders, start=1):
                    for item in _items(table, folder, annotations):
                        about = {"row": key, "seed": seed, "view": view}
                        file.write(json.dumps(about | item, ensure_ascii=False) + "\n")


def _items(table: Table, folder: Path, annotations: Sequence[Any]) -> Iterator[dict[str, Any]]:
    scores = json.loads((folder / "items.json").read_text(encoding="utf-8"))
    if table.task == "generator":
        replies = json.loads((folder / "responses.json").read_text(encoding="utf-8"))
        for index, (name, reply) in enumerate(zip(scores["ids"], replies, strict=False)):
            item_scores = {each: scores[each][index] for each in ("nll", "tokens") if scores[each]}
            yield {"id": name} | reply | item_scores
        return
    found = SavedItems(folder / SAVED).part("extracting causes")
    for index, annotation in enumerate(annotations):
        words = [word.text for word in annotation.words]
        probs = found[index][1]
        yield {
            "id": annotation.conv_id,
            "emotion": annotation.emotion,
            "situation": annotation.situation,
            "gold": [words[each] for each in annotation.gold],
            "ranked": [] if probs is None else [words[each] for each in rank_words(words, probs)[:5]],
        } | {name: scores[name][index] for name in table.columns if name in scores}
