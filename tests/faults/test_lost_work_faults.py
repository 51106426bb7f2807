"""Output folders: nothing of the user's is lost, and long work that was cut short goes on."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from empcause.benchmarks import cpu
from empcause.benchmarks.shapes import Case
from empcause.cli import demo, main
from empcause.errors import UserError
from empcause.evaluation import causes as cause_evaluation
from empcause.evaluation import responses as response_evaluation
from empcause.evaluation.responses import EvaluateResponsesOptions, evaluate_responses
from empcause.extractor import CauseExtractor, CauseExtractorConfig, extract, load_extractor
from empcause.generator import GENERATORS, CauseCache, causes
from empcause.generator.modeling import add_separator
from empcause.outputs import LOCK, RECORD, Record, seal, write_record
from empcause.systems import own
from faults.kinds import ROOT, Guard, fault
from faults.small_training import At, arguments, in_a_process, start, train, weights

OUTPUTS = "empcause/outputs.py"
FOLDER = "empcause/training/folder.py"
ITEMS = "empcause/evaluation/items.py"
DEMO = "empcause/cli/demo.py"
BENCH = "empcause/cli/bench.py"


@pytest.fixture(autouse=True)
def signals():
    """As in a terminal; where the tests run in the background, Ctrl-C is ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def content(folder):
    """Every file and link of a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.name != LOCK)
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in paths
        if path.is_symlink() or path.is_file()
    }


def refuse(*arguments, capsys):
    """What the command says when it refuses, in one line."""
    assert main([*map(str, arguments)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


@fault(
    Guard(DEMO, " if read_record(folder) else anything)", ")"),
    Guard(OUTPUTS, "        if not (folder / RECORD).exists():", "        if False:"),
    cause="the folder holds a thesis, or is the current one",
    place="empcause demo --output_dir FOLDER",
    promise="it is refused; nothing in it is touched",
)
def test_demo_into_a_folder_that_is_not_its_own(tmp_path, capsys, monkeypatch):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("of mine")
    monkeypatch.setattr(demo, "run_in", lambda folder: pytest.fail("the demo began"))
    before = content(tmp_path)
    assert "thesis.tex" in refuse("demo", "--output_dir", tmp_path / "thesis", capsys=capsys)
    assert "is a file" in refuse("demo", "--output_dir", tmp_path / "file", capsys=capsys)
    monkeypatch.chdir(tmp_path / "thesis")
    assert "thesis.tex" in refuse("demo", "--output_dir", ".", capsys=capsys)
    assert content(tmp_path) == before
    assert not list(tmp_path.rglob(LOCK))


@fault(
    Guard(DEMO, "        if path.is_symlink():", "        if False:"),
    Guard(DEMO, "and read_record(folder / part) is None:", "and False:"),
    cause="what an earlier demo made, half of it, with files and links of the user's in between",
    place="empcause demo --output_dir FOLDER",
    promise="the demo can be repeated and leaves the user's files; where one is in its way, it is refused before it begins",
)
def test_demo_is_repeated(tmp_path, capsys, monkeypatch):
    began = []
    monkeypatch.setattr(demo, "run_in", lambda folder: began.append(folder) or 0)
    folder = tmp_path / "demo"
    assert main(["demo", "--output_dir", str(folder)]) == 0
    (folder / "encoder-tokenizer").mkdir()
    (folder / "encoder-tokenizer" / "tokenizer.json").write_text("{")
    (folder / "notes.txt").write_text("of mine")
    before = content(folder)
    assert main(["demo", "--output_dir", str(folder)]) == 0
    assert content(folder) == before
    (tmp_path / "thesis.tex").write_text("years of work")
    (folder / "encoder-tokenizer" / "tokenizer_config.json").symlink_to(tmp_path / "thesis.tex")
    assert "is a link" in refuse("demo", "--output_dir", folder, capsys=capsys)
    (folder / "encoder-tokenizer" / "tokenizer_config.json").unlink()
    (folder / "extractor").mkdir()
    (folder / "extractor" / "model.safetensors").write_text("of mine")
    assert "not of an earlier demo" in refuse("demo", "--output_dir", folder, capsys=capsys)
    assert len(began) == 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The output folder of a training."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(arguments(folder, max_steps=2))
    return folder


@fault(
    Guard(FOLDER, "    elif found and not (", "    elif False and not ("),
    Guard(OUTPUTS, "    if path.is_symlink() or ", "    if "),
    Guard(OUTPUTS, "or path.parent.resolve() != (folder.resolve() / name).parent", ""),
    cause="an earlier training is in the output folder, with files and links of the user's",
    place="empcause train",
    promise="refused without --resume_from_checkpoint or --overwrite_output_dir, which removes only what the training wrote",
)
def test_train_where_an_earlier_training_is(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    mine = {
        "notes.txt": b"of mine",
        "checkpoint-2/notes.txt": b"of mine",
        "checkpoint-best/model.safetensors": b"of mine",
    }
    (folder / "checkpoint-best").mkdir()
    for name, text in mine.items():
        (folder / name).write_bytes(text)
    before = content(folder)
    with pytest.raises(
        UserError, match=r"an earlier training; --resume_from_checkpoint true .* --overwrite_output_dir true"
    ):
        train(arguments(folder))
    assert content(folder) == before
    elsewhere = tmp_path / "elsewhere"
    (folder / "checkpoint-4").symlink_to(elsewhere)
    shutil.copytree(trained / "checkpoint-2", elsewhere)
    record = Record(
        "empcause train generator", dict.fromkeys(["checkpoint-2", "checkpoint-4", "linked", "linked/optimizer.pt"])
    )
    write_record(folder, record)
    (folder / "linked").symlink_to(elsewhere)
    for path in (*folder.glob("*.json"), *folder.glob("*.safetensors"), folder / "README.md"):
        if path.name != RECORD:
            path.unlink()
    before = content(elsewhere)
    with pytest.raises(UserError, match="its own checkpoint-4"):
        train(arguments(folder, overwrite_output_dir=True))
    (folder / "checkpoint-4").rename(folder / "link")
    train(arguments(folder, overwrite_output_dir=True, max_steps=1, save_strategy="no", load_best_model_at_end=False))
    assert content(elsewhere) == before
    assert mine.items() <= content(folder).items()
    assert sorted(os.listdir(folder / "checkpoint-2")) == ["notes.txt"]
    assert (folder / "model.safetensors").exists()


@pytest.mark.parametrize(
    "damage", [{"files": {"../thesis.tex": None}}, {"files": {"/": None}}, {"files": ["x"]}, [], "made_by"]
)
@fault(
    Guard(OUTPUTS, " and not name.is_absolute() and ", " and "),
    Guard(OUTPUTS, ' ".." not in name.parts', " True"),
    Guard(
        OUTPUTS,
        "    except (ValueError, TypeError, AttributeError) as error:",
        "    except ZeroDivisionError as error:",
    ),
    cause="a damaged or hostile empcause.json, which lists files outside of its folder, or is none",
    place="empcause train --overwrite_output_dir",
    promise="it is refused; nothing is removed",
)
def test_hostile_record(trained, tmp_path, damage):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    (tmp_path / "thesis.tex").write_text("years of work")
    record = {"made_by": "empcause train generator"} | damage if isinstance(damage, dict) else damage
    (folder / RECORD).write_text(json.dumps(record))
    before = content(tmp_path)
    with pytest.raises(UserError, match=rf"{RECORD} is damaged"):
        train(arguments(folder, overwrite_output_dir=True, max_steps=1))
    assert content(tmp_path) == before


@pytest.mark.parametrize("stage", ["extractor", "generator"])
@fault(
    Guard("empcause/training/extractor.py", '@in_output_folder("empcause train extractor")\n', ""),
    Guard("empcause/training/generator.py", '@in_output_folder("empcause train generator")\n', ""),
    Guard(OUTPUTS, "    if record.made_by != made_by:", "    if False:"),
    Guard(OUTPUTS, "        if name not in record.files or (", "        if False or ("),
    cause="the output folder holds another command's results, or a model from elsewhere",
    place="empcause train, with --overwrite_output_dir",
    promise="it is refused; nothing is touched",
)
def test_train_where_something_else_is(tmp_path, capsys, monkeypatch, stage):
    for module in ("extractor", "generator"):
        monkeypatch.setattr(f"empcause.training.{module}.load_dialogues", lambda *_: pytest.fail("the training began"))
        monkeypatch.setattr(f"empcause.training.{module}.find_checkpoint", lambda *_: pytest.fail("the training began"))
    command = [
        "train",
        stage,
        "--data",
        "sample",
        "--model_name_or_path",
        "",
        "--model_type",
        "gpt2",
        "--tokenizer_name",
        "x",
    ]
    command += ["--overwrite_output_dir", "true", "--output_dir"]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_text("of mine")
    (tmp_path / "evaluation").mkdir()
    write_record(tmp_path / "evaluation", Record("empcause evaluate generator"))
    before = content(tmp_path)
    assert "its own model.safetensors" in refuse(*command, tmp_path / "model", capsys=capsys)
    assert "what `empcause evaluate generator` made" in refuse(*command, tmp_path / "evaluation", capsys=capsys)
    assert content(tmp_path) == before


@fault(
    Guard(FOLDER, "    if wanted and args.overwrite_output_dir:", "    if False:"),
    Guard(FOLDER, ".is_relative_to(folder.resolve()):", ".is_relative_to(folder.resolve() / made_by):"),
    cause="--overwrite_output_dir would remove what the training itself needs: its checkpoint, or its base model",
    place="empcause train",
    promise="it is refused; nothing is touched",
)
def test_overwriting_what_is_needed(trained):
    before = content(trained)
    with pytest.raises(UserError, match="give one of them"):
        train(arguments(trained, overwrite_output_dir=True, resume_from_checkpoint="true"))
    with pytest.raises(UserError, match="model_name_or_path is in output_dir"):
        train(arguments(trained, overwrite_output_dir=True, model_name_or_path=str(trained / "checkpoint-2")))
    assert content(trained) == before


@fault(
    Guard(OUTPUTS, 'raise UserError(f"output_dir {folder} cannot be written: {error.strerror}.") from error', "raise"),
    Guard(
        OUTPUTS, "    except (FileExistsError, NotADirectoryError) as error:", "    except ZeroDivisionError as error:"
    ),
    cause="the output folder may not be written, or is a file, or lies below one",
    place="empcause train, evaluate, demo",
    promise="one sentence, before anything is read or computed",
)
def test_output_folder_is_none(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=rf"is not a folder: {tmp_path}/file is a file\."):
            train(arguments(path))
    shared = Path(tempfile.mkdtemp())
    os.chmod(shared, 0o555)

    def run():
        if os.geteuid() == 0:
            os.setuid(65534)  # root may write anywhere
        for path in (shared, shared / "run"):
            with pytest.raises(UserError, match=f"output_dir {path} cannot be written: Permission denied"):
                train(arguments(path))

    assert in_a_process(run) == 0
    assert not os.listdir(shared)
    shared.rmdir()


@fault(
    Guard(OUTPUTS, "        lock.acquire()\n", ""),
    cause="two trainings in one folder; later the first is killed",
    place="empcause train",
    promise="the second is refused as long as the first lives, and goes on with its checkpoint after",
)
def test_two_trainings_in_one_folder(trained, tmp_path):
    folder = tmp_path / "run"

    def wait():
        (tmp_path / "waits").touch()
        time.sleep(600)

    other = start(lambda: train(arguments(folder, max_steps=4), At(3, wait)))
    try:
        while not (tmp_path / "waits").exists():
            assert os.waitpid(other, os.WNOHANG) == (0, 0), "it ended"
            time.sleep(0.01)
        with pytest.raises(UserError, match="Another process works in"):
            train(arguments(folder, max_steps=4, resume_from_checkpoint="true"))
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
    train(arguments(folder, max_steps=4, resume_from_checkpoint="true"))
    assert weights(folder / "checkpoint-2") == weights(trained / "checkpoint-2")


@pytest.fixture(scope="module")
def models(tiny_encoder_dir, tiny_gpt2_dir, tmp_path_factory):
    """Folder with an extractor and a generator, both random, with records of their files."""
    folder = tmp_path_factory.mktemp("models")
    encoder = AutoConfig.from_pretrained(tiny_encoder_dir)
    CauseExtractor(CauseExtractorConfig(encoder=encoder.to_dict())).save_pretrained(folder / "extractor")
    AutoTokenizer.from_pretrained(tiny_encoder_dir).save_pretrained(folder / "extractor")
    config_class, model_class = GENERATORS["gpt2"]
    values = AutoConfig.from_pretrained(tiny_gpt2_dir).to_dict()
    del values["model_type"]
    model = model_class(config_class(**values, gamma=1.0))
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2_dir)
    add_separator(model, tokenizer)
    model.save_pretrained(folder / "generator")
    tokenizer.save_pretrained(folder / "generator")
    for name in ("extractor", "generator"):
        seal(folder / name, f"empcause train {name}")
    return folder


def flip(path):
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


@fault(
    Guard("empcause/checkpoints.py", 'verify(folder, unless=["README.md"])', "pass"),
    cause="a byte of a finished model's weights or tokenizer has flipped",
    place="whatever loads it: evaluate, respond, chat, train generator",
    promise="the file is named and nothing is answered; an edited model card, and folders without our record, are loaded",
)
def test_finished_model_is_damaged(models, tmp_path):
    folder = tmp_path / "extractor"
    for name in ("model.safetensors", "tokenizer.json"):
        shutil.copytree(models / "extractor", folder)
        (folder / "README.md").write_text("My model.")
        load_extractor(folder)
        flip(folder / name)
        with pytest.raises(UserError, match=f"{name} is not as it was saved"):
            load_extractor(folder)
        shutil.rmtree(folder)
    shutil.copytree(models / "extractor", folder)
    (folder / RECORD).unlink()
    load_extractor(folder)


def evaluation(models, folder, **options):
    return EvaluateResponsesOptions(
        model=str(models / "generator"),
        extractor=str(models / "extractor"),
        data="sample",
        output_dir=str(folder),
        **({"max_samples": 12, "max_generated": 8, "max_new_tokens": 4, "batch_size": 4} | options),
    )


@pytest.fixture
def batches(monkeypatch):
    """What is computed: the size of each batch that is scored or answered; at one of them, something can happen."""
    done = []
    done_at = {}
    for name in ("response_nll", "generate_responses"):

        def counted(function, *args, **options):
            done.append(len(args[2]))
            done_at.get(len(done), lambda: None)()
            return function(*args, **options)

        monkeypatch.setattr(own, name, partial(counted, getattr(own, name)))
    done_at["batches"] = done
    return done_at


@pytest.fixture(scope="module")
def evaluated(models, tmp_path_factory):
    """An evaluation that nothing disturbed: its figures, and its folder."""
    folder = tmp_path_factory.mktemp("evaluated") / "generator"
    return evaluate_responses(evaluation(models, folder)), folder


@fault(
    Guard(ITEMS, "            if any(index not in saved for index in batch):", "            if True:"),
    Guard(ITEMS, 'file.write(_checksum(text) + b" " + text + b"\\n")', "pass"),
    cause="killed half way",
    place="empcause evaluate",
    promise="the same command computes what is missing, and no more; the figures are those of an undisturbed evaluation",
)
def test_killed_evaluation_goes_on(models, evaluated, batches, tmp_path):
    batches[4] = lambda: os.kill(os.getpid(), signal.SIGKILL)
    assert in_a_process(lambda: evaluate_responses(evaluation(models, tmp_path))) == -signal.SIGKILL
    del batches[4]
    metrics = evaluate_responses(evaluation(models, tmp_path))
    assert batches["batches"] == [4, 4], "three batches were scored before, none of two answered"
    assert metrics == evaluated[0]
    for name in ("items.json", "responses.json", "metrics.json"):
        assert (tmp_path / name).read_bytes() == (evaluated[1] / name).read_bytes()


@fault(
    Guard(ITEMS, " or found != _checksum(text):", ":"),
    Guard(ITEMS, "            os.truncate(path, whole)", "            pass"),
    cause="a digit has flipped in what an evaluation had saved, or its last line was cut short by a loss of power",
    place="empcause evaluate",
    promise="what follows is computed again, once, to the same figures",
)
def test_saved_results_are_damaged(models, evaluated, batches, tmp_path):
    saved = evaluated[1] / "saved-items.jsonl"
    lines = saved.read_bytes().splitlines(keepends=True)
    scores = next(number for number, line in enumerate(lines) if b'"scoring"' in line)
    for damaged in (
        [*lines[:scores], lines[scores].replace(b"[[", b"[[1", 1), *lines[scores + 1 :]],
        [*lines[: scores + 2], lines[scores + 2][:-9]],
    ):
        shutil.copytree(evaluated[1], tmp_path / "e", dirs_exist_ok=True)
        (tmp_path / "e" / saved.name).write_bytes(b"".join(damaged))
        assert evaluate_responses(evaluation(models, tmp_path / "e")) == evaluated[0]
        computed = len(batches["batches"])
        assert computed
        assert evaluate_responses(evaluation(models, tmp_path / "e")) == evaluated[0]
        assert len(batches["batches"]) == computed, "all was saved"
        batches["batches"].clear()


@fault(
    Guard(ITEMS, "        if about and about != subject and not overwrite:", "        if False:"),
    Guard(ITEMS, "        if overwrite:\n            remove_made(folder)\n", ""),
    cause="the output folder holds the evaluation of another model, or of other data",
    place="empcause evaluate",
    promise="it is refused and kept; with --overwrite_output_dir its results are not mixed with the new ones",
)
def test_evaluation_of_something_else(models, evaluated, tmp_path):
    folder = tmp_path / "evaluation"
    shutil.copytree(evaluated[1], folder)
    (folder / "notes.txt").write_text("of mine")
    before = content(folder)
    with pytest.raises(UserError, match="another data"):
        evaluate_responses(evaluation(models, folder, max_samples=11))
    other = tmp_path / "models"
    shutil.copytree(models, other)
    config = (other / "generator" / "config.json").read_text()
    (other / "generator" / "config.json").write_text(config.replace('"gamma": 1.0', '"gamma": 50.0'))
    seal(other / "generator", "empcause train generator")
    with pytest.raises(UserError, match="another model"):
        evaluate_responses(evaluation(other, folder))
    assert content(folder) == before
    metrics = evaluate_responses(evaluation(other, folder, overwrite_output_dir=True))
    assert metrics["perplexity"] != evaluated[0]["perplexity"]
    assert metrics == evaluate_responses(evaluation(other, tmp_path / "new"))
    assert (folder / "notes.txt").read_text() == "of mine"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@fault(
    Guard(ITEMS, "        except KeyboardInterrupt as stop:", "        except GeneratorExit as stop:"),
    Guard(
        "empcause/cli/main.py",
        "            signal.signal(signal.SIGTERM, _end)",
        "            signal.signal(signal.SIGTERM, signal.SIG_IGN)",
    ),
    cause="Ctrl-C, or a request to end (SIGTERM)",
    place="empcause evaluate, half way",
    promise="one sentence says how much is saved; the same command goes on to the same figures",
)
def test_interrupted_evaluation(models, evaluated, batches, tmp_path, capsys, number, code):
    batches[3] = lambda: os.kill(os.getpid(), number)
    options = evaluation(models, tmp_path)
    command = [
        "evaluate",
        "generator",
        "--max_samples",
        "12",
        "--max_generated",
        "8",
        "--max_new_tokens",
        "4",
        "--data",
        "sample",
    ]
    command += [
        "--batch_size",
        "4",
        "--model",
        options.model,
        "--extractor",
        options.extractor,
        "--output_dir",
        str(tmp_path),
    ]
    assert main(command) == code
    said = capsys.readouterr().err.splitlines()[-1]
    assert (
        said
        == f"empcause: error: interrupted; 20 results are saved in {tmp_path}, and the same command goes on from there."
    )
    del batches[3]
    assert evaluate_responses(options) == evaluated[0]


@fault(
    Guard(ITEMS, "            if (reason := why_not_written(error)) is None:", "            if True:"),
    cause="the disk is full",
    place="empcause evaluate",
    promise="one sentence says how much is saved; the same command goes on to the same figures",
)
def test_evaluation_on_a_full_disk(models, evaluated, batches, tmp_path):
    def fill():
        size = (tmp_path / "saved-items.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, resource.RLIM_INFINITY))

    def run():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        with pytest.raises(UserError, match=r"The evaluation stopped \(File too large\); 20 results are saved"):
            evaluate_responses(evaluation(models, tmp_path))

    batches[3] = fill
    assert in_a_process(run) == 0
    del batches[3]
    assert evaluate_responses(evaluation(models, tmp_path)) == evaluated[0]
    assert batches["batches"] == [4, 4, 4]


@fault(
    Guard("empcause/evaluation/causes.py", "    load_pyplot()\n", ""),
    Guard("empcause/evaluation/responses.py", "    load_pyplot()\n", ""),
    Guard(DEMO, "    load_pyplot()\n", ""),
    Guard(
        "empcause/metrics/bertscore.py",
        "            from bert_score import BERTScorer\n",
        "            BERTScorer = None\n",
    ),
    cause="matplotlib or bert-score is not installed",
    place="empcause evaluate, empcause demo",
    promise="one sentence says what to install, before the work and not after it",
)
def test_missing_libraries(models, tmp_path, capsys, monkeypatch):
    def begin(*_):
        pytest.fail("the work began")

    for module in (cause_evaluation, response_evaluation):
        monkeypatch.setattr(module, "read_items", begin)
    monkeypatch.setattr(demo, "run_in", begin)
    monkeypatch.setitem(sys.modules, "bert_score", None)
    command = [
        "evaluate",
        "generator",
        "--data",
        "sample",
        "--bertscore_model",
        "roberta-large",
        "--extractor",
        models / "extractor",
    ]
    assert "needs bert-score" in refuse(*command, capsys=capsys)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for command in (["evaluate", "extractor"], ["evaluate", "generator"], ["demo"]):
        assert "need matplotlib" in refuse(*command, "--output_dir", tmp_path / "out", capsys=capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["torch", "transformers"])
@fault(
    Guard("empcause/cli/main.py", "    except KeyboardInterrupt as stop:\n", "    except GeneratorExit as stop:\n"),
    cause="Ctrl-C in the seconds in which torch and transformers are imported",
    place="any command",
    promise="one sentence, no traceback",
)
def test_interrupted_imports(name, tmp_path):
    (tmp_path / f"{name}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from empcause.cli import main; sys.exit(main(['respond', 'Hello']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 130
    assert done.stderr == "empcause: error: interrupted.\n"


@fault(
    Guard("empcause/generator/causes.py", "self._save()", "start + SAVED_AT_A_TIME < len(missing) or self._save()"),
    cause="killed half way through the causes of all texts, before a training begins",
    place="empcause train generator",
    promise="the next run computes the rest, and all causes are those of a run that nothing disturbed, bit for bit",
)
@pytest.mark.usefixtures("one_thread")
def test_killed_while_causes_are_extracted(models, tmp_path, monkeypatch):
    texts = [f"I lost {number} of my {'old ' * number}friends." for number in range(12)]
    monkeypatch.setattr(causes, "SAVED_AT_A_TIME", 4)
    read = []

    def counted(model, tokenizer, part, **options):
        read.append(len(part))
        if sum(read) == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return extract(model, tokenizer, part, **options)

    monkeypatch.setattr(causes, "extract", counted)
    deadly = 12
    assert in_a_process(lambda: CauseCache(models / "extractor", tmp_path / "a").get(texts)) == -signal.SIGKILL
    deadly = None
    found = CauseCache(models / "extractor", tmp_path / "a").get(texts)
    assert read == [4]
    for one, other in zip(found, CauseCache(models / "extractor", tmp_path / "b").get(texts), strict=True):
        assert one.spans.tolist() == other.spans.tolist()
        assert one.probs.tolist() == other.probs.tolist()


@fault(
    Guard(BENCH, "        if path.exists() and not overwrite:", "        if False:"),
    Guard(BENCH, "        if path.is_symlink():", "        if False:"),
    cause="the results of an earlier run, or a link of that name, are in the folder",
    place="empcause bench --output FOLDER",
    promise="refused before anything is timed; --overwrite_output_dir replaces the table and the plots, and nothing else",
)
def test_results_of_an_earlier_benchmark(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cpu, "SUITES", {"lengths": [Case("GPT-2 2x2x16x8", 2, 2, 2, 16, 16, 8)]})
    monkeypatch.setattr(cpu, "Limits", partial(cpu.Limits, rounds=1000, bytes_read=2**16, repeats=2))
    bench = ("bench", "--seconds", "0", "--dtypes", "fp32", "--output", tmp_path)
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "cpu.csv").write_text("a night's figures")
    before = content(tmp_path)
    assert "--overwrite_output_dir" in refuse(*bench, capsys=capsys)
    assert content(tmp_path) == before
    assert main([*map(str, bench), "--overwrite_output_dir"]) == 0
    written = {*cpu.FILES} - {"cpu_long_context.png"}  # drawn where that was measured
    assert sorted(content(tmp_path)) == sorted((*written, "notes"))
    (tmp_path / "cpu.csv").unlink()
    (tmp_path / "cpu.csv").symlink_to("notes")
    assert "is a link" in refuse(*bench, "--overwrite_output_dir", capsys=capsys)
    assert (tmp_path / "notes").read_text() == "mine"
