"""Reproducing tables: what is trained and evaluated once, what is refused, and what the files hold."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, RobertaConfig

from empcause.cli import main
from empcause.cli.reproduce import SIZES as NAMED_SIZES
from empcause.cli.reproduce import TABLES as NAMED_TABLES
from empcause.cli.reproduce import prepare
from empcause.data import EMPATHETIC_DIALOGUES, load_annotations, load_dialogues, response_pairs, split_words
from empcause.data.dialogue import Dialogue
from empcause.errors import Interrupted, UserError
from empcause.evaluation.significance import Interval
from empcause.extractor import CauseExtractor, CauseExtractorConfig
from empcause.generator import GENERATORS
from empcause.metrics import distinct_n
from empcause.outputs import Record, seal, write_record
from empcause.reproduction import SIZES, TABLES, reproduce, running, write_scorecard
from empcause.reproduction.cases import Answer, Case, answer_cases, choose_cases, marked_parts, to_html, to_markdown
from empcause.reproduction.figures import Ratio, read_figures, variety
from empcause.reproduction.folder import code_digests
from empcause.reproduction.results import rank_without_system, read_results, write_results
from empcause.reproduction.scorecard import Reason, judge, score
from empcause.reproduction.tables import (
    CEILING,
    FIRST_WORDS,
    RANDOM_WORDS,
    SYSTEMS,
    effective_options,
    recipe_path,
    training_of,
)


class TestTables:
    def test_the_command_names_them(self):
        """The command names tables and sizes itself, because importing the package takes seconds."""
        assert tuple(TABLES) == NAMED_TABLES
        assert tuple(SIZES) == NAMED_SIZES

    def test_every_system_of_a_row_is_trained_somewhere(self):
        used = {row.system for table in TABLES.values() for row in table.rows.values() if row.system}
        assert used | {known.extractor for known in SYSTEMS.values() if known.extractor} == set(SYSTEMS)
        for table in TABLES.values():
            assert sum(row.ours for row in table.rows.values()) == 1
            for row in table.rows.values():
                assert table.printed(row).keys() <= set(table.columns)

    def test_printed_figures(self):
        assert TABLES["table6"].printed(TABLES["table6"].rows["supervised"]) == {
            "accuracy": 0.56,
            "top1_recall": 0.246,
            "top3_recall": 0.514,
            "top5_recall": 0.556,
        }
        printed = TABLES["table7"].printed(TABLES["table7"].rows["ecg"])
        assert printed["perplexity"] == 14.063
        assert printed["emotion_accuracy"] == 0.598
        assert "emotion_accuracy" not in TABLES["table7"].printed(TABLES["table7"].rows["gpt2"])
        assert "bits_per_byte" not in printed

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("system", SYSTEMS)
    def test_every_configuration_is_understood(self, system, size, tmp_path, tiny_encoder_dir, tiny_gpt2_dir):
        """Each recipe with the options of each size; a full one overrides nothing, so that it is what its recipe says."""
        training = training_of(system, size)
        tiny = {"{encoder}": tiny_encoder_dir, "{decoder}": tiny_gpt2_dir}
        words = [f"--{name}={tiny.get(value, value)}" for name, value in training.options.items()]
        words += ["--config", str(recipe_path(training.recipe)), f"--output_dir={tmp_path}"]
        prepare("train", SYSTEMS[system].stage, words)
        if size == "full":
            assert not training.options
            base = effective_options(training).get("model_name_or_path", "")
            assert SYSTEMS[system].own_words or "/" in base, "the paper's size, by its name on the hub"

    @pytest.mark.parametrize(
        "system", [name for name, known in SYSTEMS.items() if known.stage in ("extractor", "generator")]
    )
    def test_full_models_are_of_the_papers_size(self, system):
        """Each full model is built from the geometry that its recipe names, without weights."""
        geometries = {
            "FacebookAI/roberta-base": RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1),
            "openai-community/gpt2": GPT2Config(),
        }
        base = geometries[effective_options(SYSTEMS[system].full)["model_name_or_path"]]
        with torch.device("meta"):
            if SYSTEMS[system].stage == "extractor":
                config = CauseExtractorConfig(
                    encoder=base.to_dict(), id2label=dict(enumerate(EMPATHETIC_DIALOGUES.emotions))
                )
                model = CauseExtractor(config)
            else:
                config_class, model_class = GENERATORS["gpt2"]
                model = model_class(config_class(**{k: v for k, v in base.to_dict().items() if k != "model_type"}))
        assert 124e6 < model.num_parameters() < 125e6


class TestFigures:
    def test_variety_without_each_reply(self):
        replies = ["i am so sorry", "i am sorry to hear that", "", "so sorry", "i am so sorry"]
        for n in (1, 2, 3):
            found = variety(replies, n)
            assert found.value == distinct_n(replies, n)
            expected = [distinct_n(replies[:index] + replies[index + 1 :], n) for index in range(len(replies))]
            np.testing.assert_allclose(found.without, expected)

    def test_the_interval_of_distinct_holds_what_other_samples_give(self):
        """Replies are drawn from the same 400 again and again: about 95% of the intervals hold the mean over the draws."""
        random = np.random.default_rng(0)
        words = [f"w{index}" for index in range(300)]
        weights = 1 / np.arange(1, 301)
        weights /= weights.sum()
        found = [variety([" ".join(random.choice(words, 8, p=weights)) for _ in range(100)], 2) for _ in range(200)]
        mean = np.mean([each.value for each in found])
        inside = np.mean([each.interval().low <= mean <= each.interval().high for each in found])
        assert 0.9 < inside <= 1

    def test_ratios(self):
        perplexity = Ratio(np.array([3.0, 8.0, 5.0]), np.array([2.0, 5, 3]), np.exp)
        assert perplexity.value == pytest.approx(np.exp(1.6))
        assert perplexity.interval().value == pytest.approx(perplexity.value)
        better = Ratio(np.array([2.0, 7.0, 4.0]), perplexity.denominators, np.exp)
        difference = better.minus(perplexity)
        assert difference.interval.value == pytest.approx(np.exp(1.3) - np.exp(1.6))
        assert difference.p == 0.25  # three differences of one sign: 2 of 8 choices of the signs
        assert not better.fits(Ratio(better.numerators, np.array([2.0, 5, 4])))
        assert not better.fits(replace(perplexity, unit="other tokens, of which there are as many"))
        assert better.fits(perplexity)
        assert not better.fits(variety(["a"], 1))
        assert not variety(["a"], 1).fits(variety(["a", "b"], 1))

    def test_seeds_are_averaged_by_item(self, tmp_path):
        for seed, nll in enumerate(([2.0, 4.0], [4.0, 8.0])):
            (tmp_path / str(seed)).mkdir()
            items = {
                "scored": "",
                "ids": ["a", "b"],
                "nll": nll,
                "tokens": [1, 2],
                "bytes": [4, 6],
                "emotion_accuracy": [],
            }
            (tmp_path / str(seed) / "items.json").write_text(json.dumps(items))
            replies = [{"response": "yes yes"}, {"response": ["no", "yes"][seed]}]
            (tmp_path / str(seed) / "responses.json").write_text(json.dumps(replies))
        found = read_figures("generator", [tmp_path / "0", tmp_path / "1"])
        assert found["perplexity"].value == pytest.approx(np.exp(3))
        assert found["bits_per_byte"].value == pytest.approx(9 / np.log(2) / 10)
        assert found["distinct_1"].value == pytest.approx((2 / 3 + 1 / 3) / 2)
        assert "emotion_accuracy" not in found

    def test_rankings_without_a_system(self):
        annotations = load_annotations("test", "sample")
        first, ceiling = rank_without_system(FIRST_WORDS, annotations), rank_without_system(CEILING, annotations)
        chance = rank_without_system(RANDOM_WORDS, annotations)
        for column, figure in chance.items():
            assert 0 < figure.value < ceiling[column].value <= 1
            assert first[column].value != figure.value

    def test_chance_on_the_real_data(self, real_data):
        """The recalls with this project's stop words, with which all systems are ranked; another list gives other ones."""
        annotations = load_annotations("test", real_data)
        random, first, ceiling = (rank_without_system(key, annotations) for key in (RANDOM_WORDS, FIRST_WORDS, CEILING))
        for figures, expected in (
            (random, (0.146, 0.419, 0.618)),
            (first, (0.118, 0.471, 0.698)),
            (ceiling, (0.423, 0.871, 0.972)),
        ):
            found = [figures[f"top{cut}_recall"].value for cut in (1, 3, 5)]
            np.testing.assert_allclose(found, expected, atol=0.01)


ANNOTATIONS = load_annotations("test", "sample")


class Commands:
    """Stands in the place of the commands: models and evaluations of a moment, and a list of what was run."""

    def __init__(self):
        self.ran = []
        self.stop = None
        self.stop_after = None  # number of evaluations

    def __call__(self, command, stage, words):
        options = dict(word.removeprefix("--").split("=", 1) for word in words if "=" in word)
        folder = Path(options["output_dir"])

        def train():
            folder.mkdir(parents=True, exist_ok=True)
            write_record(folder, Record(f"empcause train {stage}"))
            if self.stop == (command, stage):
                raise KeyboardInterrupt
            (folder / "config.json").write_text(json.dumps({"made": stage}))
            (folder / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b"{}      ")
            state = {"global_step": 5, "max_steps": 5 if folder.parent.name == "ece" else 9, "epoch": 2.0}
            (folder / "trainer_state.json").write_text(json.dumps(state))
            seal(folder, f"empcause train {stage}")

        def evaluate():
            folder.mkdir(parents=True, exist_ok=True)
            write_record(folder, Record(f"empcause evaluate {stage}", {"items.json": None, "metrics.json": None}))
            if self.stop == (command, stage):
                raise KeyboardInterrupt
            if [each[0] for each in self.ran].count("evaluate") == self.stop_after:
                raise KeyboardInterrupt
            random = np.random.default_rng(list(map(ord, str(folder))))
            recalls = {f"top{cut}_recall": random.random(len(ANNOTATIONS)).tolist() for cut in (1, 3, 5)}
            (folder / "items.json").write_text(json.dumps({"scored": "x"} | recalls))
            (folder / "metrics.json").write_text("{}")

        def run():
            self.ran.append((command, folder.parent.name, options.get("resume_from_checkpoint")))
            train() if command == "train" else evaluate()

        return f"empcause.training.{stage}" if command == "train" else "empcause.evaluation.causes", run


@pytest.fixture
def commands(monkeypatch):
    monkeypatch.setattr(running, "make_tiny_models", lambda folder: None)
    found = dict(enumerate([[None, [0.5] * len(each.words), None, None] for each in ANNOTATIONS]))
    monkeypatch.setattr(running.SavedItems, "part", lambda self, name: found)
    return Commands()


@pytest.fixture
def run(commands, tmp_path):
    def reproduce_table(name="table6", **options):
        commands.ran.clear()
        options = {
            "prepare": commands,
            "output_dir": tmp_path,
            "say": lambda text: None,
            "command": "a command",
        } | options
        return reproduce(name, "smoke", **options)

    return reproduce_table


class TestRuns:
    def test_what_is_done_is_not_done_again(self, run, commands):
        folder = run()
        assert [each[:2] for each in commands.ran[:2]] == [("train", "unsupervised"), ("evaluate", "unsupervised")]
        assert len(commands.ran) == 10
        first = (folder / "results.json").read_text()
        run()
        assert commands.ran == []
        assert (folder / "results.json").read_text() == first

    def test_further_seeds_come_after_all_rows(self, run, commands):
        run(rows=["ece"])
        folder = run(seeds=2)
        assert [each[1] for each in commands.ran if each[0] == "train"] == [
            *("unsupervised", "supervised", "supervised-published", "no-aux") * 2, "ece"
        ]  # fmt: skip
        results = read_results(folder / "results.json")
        assert results["rows"]["ece"]["seeds"] == [42, 43]
        assert len(results["rows"]["ece"]["by_seed"]["top1_recall"]) == 2
        assert "mean of 2 seeds" in (folder / "table.md").read_text()

    @pytest.mark.parametrize("stopped", [("train", "extractor"), ("evaluate", "extractor")])
    def test_an_interrupted_run_goes_on(self, run, commands, stopped):
        commands.stop = stopped
        with pytest.raises(
            Interrupted, match=r"interrupted while unsupervised was .*; the same command goes on from there"
        ):
            run()
        assert commands.ran[-1][0] == stopped[0]
        commands.stop = None
        run()
        assert commands.ran[0] == (stopped[0], "unsupervised", "true" if stopped[0] == "train" else None)
        assert len(commands.ran) == (10 if stopped[0] == "train" else 9)

    def test_a_table_of_some_rows(self, run, commands):
        folder = run(rows=["supervised"])
        table = (folder / "table.md").read_text()
        assert "| ECE, unsupervised, here | – | – | – | – | not made yet |" in table
        assert table.count("not made yet") == 4
        assert "| ECE, supervised, paper | 0.560 | 0.246 | 0.514 | 0.556 |" in table
        assert "minus the best baseline" not in table
        table = (run(rows=["ece"]) / "table.md").read_text()
        assert table.count("not made yet") == 3, "the row that was there already is shown too"
        assert table.count("minus the best baseline") == 1

    def test_views_of_one_trained_system_are_averaged(self, run, commands, tmp_path, monkeypatch):
        """Five random orders are one training and five evaluations; a run that stops between them goes on with the next."""
        with monkeypatch.context() as patch:
            patch.setattr(commands, "stop_after", 3)
            with pytest.raises(Interrupted):
                run("table5", rows=["empdg"])
        assert commands.ran == [("train", "empdg", None), *[("evaluate", "empdg", None)] * 3]
        table = run("table5", rows=["empdg"])
        assert commands.ran == [("evaluate", "empdg", None)] * 3
        views = [
            json.loads(path.read_text()) for path in sorted((tmp_path / "smoke/views/empdg").glob("*/config.json"))
        ]
        assert [view["ranking_seed"] for view in views] == [0, 1, 2, 3, 4]
        assert {view["empdg"] for view in views} == {"../../../models/empdg/seed-42"}
        folders = sorted((tmp_path / "smoke/evaluation/extractor/empdg").iterdir())
        assert [folder.name for folder in folders] == [f"seed-42-view-{number}" for number in range(1, 6)]
        found = [json.loads((folder / "items.json").read_text())["top1_recall"] for folder in folders]
        assert len(set(map(tuple, found))) == 5
        row = read_results(table / "results.json")["rows"]["empdg"]
        np.testing.assert_allclose(row["items"]["top1_recall"], np.mean(found, axis=0), atol=1e-5)
        assert (row["seeds"], row["views"], row["by_seed"]["top1_recall"]) == ([42], 5, [])
        text = (table / "table.md").read_text()
        assert "| EmpDG, emotion words at random, here (mean of 5 orders) |" in text
        assert "least and greatest of the seeds" not in text
        items = [json.loads(line) for line in (table / "items.jsonl").read_text().splitlines()]
        assert {(item["seed"], item["view"]) for item in items} == {(42, view) for view in range(1, 6)}
        text = (run("table5", rows=["empdg"], seeds=2) / "table.md").read_text()
        assert len(commands.ran) == 6
        assert "here (mean of 5 orders and 2 seeds) |" in text

    def test_differences_and_how_trainings_ended(self, run, commands):
        folder = run()
        rows = read_results(folder / "results.json")["rows"]
        columns = [
            rows[key]["differences"].get(column)
            for key in rows
            for column in ("top1_recall", "top3_recall", "top5_recall")
        ]
        assert sum(each is not None for each in columns) == 12, "every row but the best baseline of each column"
        others = {each["to"] for each in columns if each}
        assert others <= {"unsupervised", "supervised", "no-aux"}, (
            "neither ours nor one that was selected on the test split"
        )
        assert all(each["p"] <= each["p_holm"] <= 1 for each in columns if each)
        lines = (folder / "table.md").read_text().splitlines()
        (ours,) = (line for line in lines if line.startswith("| ECE, semi-supervised (ours), here"))
        assert ours.endswith("| stopped by budget |")
        (other,) = (line for line in lines if line.startswith("| ECE, without L\\_aux, here"))
        assert other.endswith("| converged |")
        latex = (folder / "table.tex").read_text()
        assert r"ECE, without L\_aux, paper & 0.580 & 0.208 & 0.523 & 0.709 &  \\" in latex

    def test_results_hold_no_texts(self, run):
        folder = run()
        results = (folder / "results.json").read_text()
        items = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
        assert len(items) == 5 * len(ANNOTATIONS)
        assert items[0]["situation"] == ANNOTATIONS[0].situation
        assert read_results(folder / "results.json")["ids"] == [each.conv_id for each in ANNOTATIONS]
        for annotation in ANNOTATIONS:
            assert annotation.situation[:20] not in results

    def test_what_does_not_fit_is_refused_by_name(self, run, commands, monkeypatch, tmp_path):
        run(rows=["ece"])
        other = SYSTEMS["ece"].smoke.options | {"learning_rate": 0.5}
        with monkeypatch.context() as patch:
            training = replace(training_of("ece", "smoke"), options=other)
            patch.setitem(running.SYSTEMS, "ece", replace(SYSTEMS["ece"], smoke=training))
            with pytest.raises(
                UserError,
                match=r"models/ece/seed-42 was made with learning_rate 0.001, and its recipe has 0.5 now",
            ):
                run(rows=["ece"])
        with monkeypatch.context() as patch:
            patch.setattr(running, "data_digests", lambda data: {"test of the dialogues": "another"})
            with pytest.raises(UserError, match=r"was made of other data \(the split .* is another one\)"):
                run(rows=["ece"])
        with monkeypatch.context() as patch:
            patch.setattr(running, "code_digests", lambda module: {"empcause/training/extractor.py": "another"})
            with pytest.raises(
                UserError, match=r"was made by other code \(empcause/.* has changed\); .* --accept_code goes on"
            ):
                run(rows=["ece"])
            run(rows=["ece"], accept_code=True)
        assert commands.ran == []
        weights = tmp_path / "smoke" / "models" / "ece" / "seed-42" / "config.json"
        weights.write_text("{}")
        with pytest.raises(UserError, match=r"config.json is not as it was saved; --redo ece makes it anew"):
            run(rows=["ece"])
        run(rows=["ece"], redo=["ece"])
        assert commands.ran == [("train", "ece", None), ("evaluate", "ece", None)]

    def test_an_evaluation_of_another_model_is_refused(self, run, commands, tmp_path):
        """A model that was trained anew has other weights than those that were evaluated."""
        run(rows=["ece"])
        folder = tmp_path / "smoke" / "models" / "ece" / "seed-42"
        record = tmp_path / "smoke" / "empcause.json"
        values = json.loads(record.read_text())
        values["about"]["units"]["models/ece/seed-42"]["finished"].pop("trainer_state.json")
        record.write_text(json.dumps(values))
        assert folder.is_dir()
        with pytest.raises(
            UserError, match=r"evaluation/extractor/ece/seed-42 was made with another system ece; --redo ece"
        ):
            run(rows=["ece"])

    def test_folders_of_others(self, run, tmp_path):
        (tmp_path / "smoke" / "models" / "ece" / "seed-42").mkdir(parents=True)
        with pytest.raises(UserError, match="has its own models, not of `empcause reproduce`"):
            run(rows=["ece"])
        shutil.rmtree(tmp_path / "smoke")
        run(rows=["unsupervised"])
        (tmp_path / "smoke" / "models" / "ece" / "seed-42").mkdir(parents=True)
        with pytest.raises(UserError, match=r"models/ece/seed-42 exists, and .* does not say how it was made"):
            run(rows=["ece"])

    def test_names_that_are_none(self, run):
        with pytest.raises(UserError, match="table6 has no row 'ecg'; its rows are unsupervised"):
            run(rows=["ecg"])
        with pytest.raises(UserError, match="--redo: there is no system 'nobody'"):
            run(redo=["nobody"])
        with pytest.raises(UserError, match=r"--redo ece: .* holds nothing of it"):
            run(redo=["ece"])
        with pytest.raises(UserError, match="--size smoke is measured on the embedded sample"):
            run(data="somewhere")

    def test_code_is_that_of_the_modules_in_between(self):
        code = code_digests("empcause.training.extractor")
        assert {"empcause/training/extractor.py", "empcause/training/common.py", "empcause/data/words.py"} <= set(code)
        assert "empcause/cli/main.py" not in code
        assert "empcause/reproduction/running.py" not in code


def test_the_vocabulary_stands_beside_the_perplexity(tmp_path):
    """A system that knows few words predicts the unknown word often, and that is easy."""
    made = {}
    for key, words in (
        ("recec", {"vocab_size": 11193, "unknown": [1, 2]}),
        ("gpt2", {"vocab_size": None, "unknown": []}),
    ):
        folder = tmp_path / key
        folder.mkdir()
        items = {"scored": key, "ids": ["a", "b"], "nll": [20.0, 30.0], "tokens": [10, 14], "bytes": [40, 50]} | words
        (folder / "items.json").write_text(json.dumps(items))
        (folder / "responses.json").write_text("[]")
        made[key] = {42: [folder]}
    about = {"size": "smoke", "command": "c", "data": {"name": "n"}, "evaluation": {}, "systems": {}}
    write_results(tmp_path, "table7", about, made, [])
    table = (tmp_path / "table.md").read_text()
    assert table.count("% unknown") == 1
    (line,) = (line for line in table.splitlines() if line.startswith("| RecEC, here"))
    assert line.split(" | ")[1].endswith("(vocabulary of 11,193, 12.5% unknown words)")
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert rows["recec"]["vocabulary"] == {"size": 11193, "unknown_share": 0.125}
    assert rows["gpt2"]["vocabulary"] is None


class TestScorecard:
    def test_verdicts(self):
        assert judge("top1_recall", 0.2, Interval(0.21, 0.19, 0.23)) == "reproduced"
        assert judge("top1_recall", 0.2, Interval(0.25, 0.23, 0.27)) == "better"
        assert judge("top1_recall", 0.2, Interval(0.15, 0.13, 0.17)) == "worse"
        assert judge("perplexity", 14.0, Interval(13.0, 12.5, 13.5)) == "better"
        assert judge("perplexity", 14.0, Interval(15.0, 14.5, 15.5)) == "worse"

    def test_every_printed_number_has_a_line(self, run, tmp_path, capsys):
        run()
        path = write_scorecard(tmp_path, "smoke")
        text = path.read_text()
        printed = sum(len(table.printed(row)) for table in TABLES.values() for row in table.rows.values())
        assert f"{printed} numbers: " in text
        verdicts = json.loads((path.parent / "scorecard.json").read_text())["verdicts"]
        assert len(verdicts) == printed
        made = [each for each in verdicts if each["table"] == "table6" and each["column"] != "accuracy"]
        assert {each["verdict"] for each in made} == {"not comparable"}
        assert made[0]["reasons"] == [Reason.DATA, Reason.PRETRAINED], "this row converged"
        assert made[-1]["reasons"] == [Reason.DATA, Reason.PRETRAINED, Reason.BUDGET]
        assert all(
            "the figure alone: " in line for line in text.splitlines() if line.startswith("| 6 |") and "recall" in line
        )
        assert {each["verdict"] for each in verdicts if each["table"] != "table6"} == {"not measured"}
        assert main(["reproduce", "scorecard", "--output_dir", str(tmp_path)]) == 0
        assert f"{printed} numbers" in capsys.readouterr().out

    def test_comparable_figures_are_judged(self, run, tmp_path):
        folder = run()
        results = read_results(folder / "results.json")
        results |= {"size": "full", "data": {"name": "EmoCause"}}
        verdicts = [each for each in score({"table6": results}) if each.table == "table6" and each.measured is not None]
        assert {each.verdict for each in verdicts} <= {"reproduced", "better", "worse"}
        assert len(verdicts) == 15

    def test_results_that_were_changed(self, run, tmp_path, capsys):
        folder = run()
        path = folder / "results.json"
        path.write_text(path.read_text().replace("0.5", "0.9", 1))
        assert main(["reproduce", "scorecard", "--output_dir", str(tmp_path)]) == 2
        assert "was changed after it was written: its hash does not fit" in capsys.readouterr().err
        path.write_text("[]")
        with pytest.raises(UserError, match=r"is no results.json of `empcause reproduce`, or it is damaged"):
            read_results(path)
        with pytest.raises(UserError, match="There are no results at"):
            read_results(tmp_path / "nowhere")
        with pytest.raises(
            UserError, match=r"There is no table in .*; `empcause reproduce table5 --size small` makes one"
        ):
            write_scorecard(tmp_path, "small")


class TestCases:
    def test_the_marked_text_is_the_text(self):
        text = "My *dog* <b>died</b>, and  the house is silent."
        dialogue = Dialogue((text,), (0,), response="I'm sorry.", emotion="sad")
        words = tuple(split_words(text))
        index = {word.text: number for number, word in enumerate(words)}
        answer = Answer("one", "sad", 0.5, (index["died"], index["dog"]), "Oh | no")
        case = Case(dialogue, words, True, (answer, Answer("other")))
        parts = marked_parts(case, answer)
        assert "".join(part for part, _ in parts) == text
        assert [(part, rank) for part, rank in parts if rank] == [("dog", 2), ("died", 1)]
        shown = to_markdown([case])
        assert r"My \***dog**\* \<b\>**died**\</b\>, and  the house is silent." in shown
        assert r"| Oh \| no |" in shown
        assert "| other | – | – | – |" in shown
        page = to_html([case])
        assert "&lt;b&gt;<mark class=first>died</mark>&lt;/b&gt;" in page
        assert "<b>" not in page

    def test_nothing_is_chosen_by_hand(self):
        cases = choose_cases("sample", 8, seed=0)
        assert [case.dialogue for case in cases] == [case.dialogue for case in choose_cases("sample", 8, seed=0)]
        assert [case.dialogue for case in cases] != [case.dialogue for case in choose_cases("sample", 8, seed=1)]
        pairs = response_pairs(load_dialogues("test", "sample"))
        assert len(cases) == 8
        assert all(case.dialogue in pairs and not case.printed for case in cases)

    def test_the_papers_inputs(self, real_data):
        first, second = choose_cases(str(real_data), 8, seed=0)[:2]
        assert first.printed
        assert second.printed
        assert (first.dialogue.emotion, second.dialogue.emotion) == ("disgusted", "joyful")
        assert "restaurant" in first.dialogue.text
        assert "6 girls" in second.dialogue.text

    def test_systems_answer_what_they_can(self, small_extractor, small_generator):
        cases = choose_cases("sample", 2, seed=0)
        read = answer_cases(cases, small_extractor, None, "reads", 8)
        both = answer_cases(cases, small_generator, small_extractor, "answers", 8)
        for one, other in zip(read, both, strict=True):
            assert one.reply is None
            assert isinstance(other.reply, str)
            assert (one.emotion, one.causes) == (other.emotion, other.causes)
            assert len(one.causes) == 3

    def test_without_systems(self, tmp_path, capsys):
        assert main(["cases", "--output_dir", str(tmp_path)]) == 2
        assert "`empcause reproduce table7 --size smoke` trains the systems" in capsys.readouterr().err
