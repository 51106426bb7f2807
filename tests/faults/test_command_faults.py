"""What the commands do with wrong input, a wrong machine or a silent network: one sentence, never a traceback; and no noise."""

import errno
import io
import json
import logging
import os
import shutil
import warnings
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread

import pytest
import torch
from huggingface_hub import constants
from safetensors import SafetensorError

from empcause import hub
from empcause.cli import main
from empcause.cli.failures import sentence
from empcause.cli.options import parse_options
from empcause.errors import UserError
from empcause.extractor import load_extractor
from empcause.generator import Reply, Responder, load_generator
from empcause.ops.backends import BACKENDS
from empcause.text import visible
from empcause.training.generator import GeneratorTrainingArguments
from faults.kinds import Guard, fault

HOSTILE = "\x1b[31mred\x1b[0m [bold]not[/bold] \u202egnp\u2066 \u200b\x9b1m \x07\r\n\tend"
SHOWN = r"\x1b[31mred\x1b[0m [bold]not[/bold] \u202egnp\u2066 \u200b\x9b1m \x07\r\n\tend"


def said(capsys, *arguments):
    """The sentence with which a command refuses to work."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("empcause: error: ")
    assert error.count("\n") == 1
    return error.removeprefix("empcause: error: ").strip()


@pytest.fixture(scope="module")
def models(small_extractor, small_generator):
    return ["--extractor", str(small_extractor), "--generator", str(small_generator)]


@pytest.fixture(scope="module")
def responder(small_extractor, small_generator):
    return Responder(*load_extractor(small_extractor), *load_generator(small_generator))


@fault(
    Guard(
        "empcause/cli/failures.py",
        "    if isinstance(error, OSError) and error.filename is not None and code",
        "    if code",
    ),
    Guard(
        "empcause/cli/failures.py",
        "    if isinstance(error, OSError) or code is not None:\n",
        "    if code is not None:\n",
    ),
    Guard("empcause/cli/failures.py", "        return int(found[1])\n", "        return None\n"),
    Guard("empcause/cli/failures.py", "if TORCH_SAVE_FAILED.search(text):", "if False:"),
    Guard("empcause/cli/failures.py", "if isinstance(error, UnicodeError):", "if False:"),
    Guard(
        "empcause/cli/failures.py",
        'if isinstance(error, ImportError) and not (error.name or "").startswith("empcause"):',
        "if False:",
    ),
    cause="any error of the system, also in the words of torch and safetensors; text that is not UTF-8; a missing package",
    place="any command",
    promise="one sentence with the path and what would work; a mistake of ours keeps its traceback",
)
def test_errors_of_the_system_are_sentences(tmp_path):
    missing = tmp_path / "missing"
    found = {}
    for code in (errno.EACCES, errno.EIO, errno.EISDIR, errno.EROFS, errno.ENAMETOOLONG, errno.ENOENT):
        found[code] = sentence(OSError(code, os.strerror(code), str(missing)), "train")
        assert found[code].startswith(f"{missing}: {os.strerror(code)}")
    assert "change its rights" in found[errno.EACCES]
    assert "disk or network drive failed" in found[errno.EIO]
    full = "the disk is full; what was saved before is kept"
    with pytest.raises(RuntimeError) as torchs:
        torch.save(torch.zeros(10**6), "/dev/full")
    rust = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    for error in (torchs.value, rust, OSError(errno.ENOSPC, "x"), OSError(errno.EDQUOT, "x", "y")):
        assert sentence(error, "train").startswith(full)
    rust = SafetensorError('I/O error: Permission denied (os error 13) at path "/models/.tmp1"')
    assert sentence(rust, "train") == f"{rust}; choose a place that you may read and write, or change its rights."
    offline = OSError("We couldn't connect to 'https://huggingface.co'\nto load the files.")
    assert sentence(offline, "train") == "We couldn't connect to 'https://huggingface.co' to load the files."
    with pytest.raises(UnicodeError) as undecodable:
        b"\xff".decode()
    assert "is not valid UTF-8" in sentence(undecodable.value, "train")
    assert "install what is missing" in sentence(ModuleNotFoundError("No module named 'wandb'", name="wandb"), "train")
    for ours in (
        ZeroDivisionError(),
        KeyError("x"),
        ImportError("x", name="empcause.x"),
        RuntimeError("shape mismatch"),
    ):
        assert sentence(ours, "train") is None


@fault(
    Guard("empcause/cli/failures.py", "    if isinstance(error, MemoryError) or re.search(", "    if re.search("),
    Guard("empcause/cli/failures.py", "|Cannot allocate memory", ""),
    Guard("empcause/cli/failures.py", '"out of memory|', '"'),
    cause="the memory of the machine or of the GPU is not enough",
    place="any command",
    promise="one sentence that names the options to lower, by command",
)
def test_out_of_memory_says_what_to_lower():
    with pytest.raises(RuntimeError) as torchs:
        torch.empty(10**16)
    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    for error in (torchs.value, gpu, MemoryError()):
        assert sentence(error, "train").startswith("out of memory; lower --per_device_train_batch_size")
        assert sentence(error, "evaluate") == "out of memory; lower --batch_size or --max_new_tokens."


@fault(
    Guard("empcause/cli/main.py", "            stream.reconfigure(errors=errors)\n", "            pass\n"),
    Guard("empcause/cli/main.py", "    except BrokenPipeError:\n", "    except ZeroDivisionError:\n"),
    Guard("empcause/cli/terminal.py", "        raise BrokenPipeError\n", "        raise SystemExit(1)\n"),
    Guard("empcause/cli/main.py", "        _flush()\n        return code\n", "        return code\n"),
    cause="a terminal that can show ASCII only; a reader that stops reading, as `head` does",
    place="what commands print",
    promise="characters that the terminal cannot show become escapes; the command ends silently, with exit code 0",
)
def test_output_that_cannot_be_written(monkeypatch, models, capsys):
    written = io.BytesIO()
    terminal = io.TextIOWrapper(written, encoding="ascii")
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", terminal)
        assert main(["respond", "I miss Zoë’s café.", "--max_new_tokens", "1", *models]) == 0
    assert rb"I miss Zo\xeb\u2019s caf\xe9." in written.getvalue()
    for arguments in (["info"], ["respond", "I miss my dog.", "--max_new_tokens", "1", *models]):
        reading, writing = os.pipe()
        os.close(reading)
        with monkeypatch.context() as patch, open(writing, "w") as pipe:
            patch.setattr("sys.stdout", pipe)
            assert main(arguments) == 0
    assert "Broken" not in capsys.readouterr().err


@fault(
    Guard("empcause/cli/respond.py", "number(float, POSITIVE)", "float"),
    Guard("empcause/cli/respond.py", "number(float, Range(0, 1, without_low=True))", "float"),
    Guard("empcause/cli/respond.py", "number(int, COUNT)", "int"),
    Guard("empcause/cli/respond.py", "number(int, SEED)", "int"),
    Guard("empcause/cli/respond.py", "    if given:\n", "    if False:\n"),
    Guard("empcause/cli/main.py", 'if word.startswith("--") and name in seen:', "if False:"),
    cause="impossible options: temperature 0, a nucleus of 2, no token, an invalid seed; sampling options without sampling; "
    "an option twice",
    place="empcause respond, empcause chat",
    promise="refused by name, with what would work, before a model is loaded",
)
def test_impossible_ways_to_answer(capsys):
    for options, message in (
        (["--do_sample", "--temperature", "0"], "--temperature: 0 is not a number above 0"),
        (["--do_sample", "--temperature", "nan"], "--temperature: nan is not a number above 0"),
        (["--do_sample", "--top_p", "2"], "--top_p: 2 is not a number above 0 and at most 1"),
        (["--do_sample", "--top_p", "0"], "--top_p: 0 is not a number above 0 and at most 1"),
        (["--max_new_tokens", "0"], "--max_new_tokens: 0 is not a whole number of at least 1"),
        (["--max_new_tokens", "1e3"], "--max_new_tokens: invalid int value: '1e3'"),
        (["--seed", "-1"], "--seed: -1 is not a whole number"),
        (["--seed", str(2**32)], "--seed: 4294967296 is not a whole number"),
        (["--temperature", "0.5"], "--temperature has no effect on greedy decoding; add --do_sample"),
        (["--seed", "1", "--seed=2"], "--seed is given twice"),
    ):
        assert message in said(capsys, "respond", "I miss my dog.", "--extractor", "nowhere", *options)
    assert "has no effect" in said(capsys, "chat", "--extractor", "nowhere", "--top_p", "0.5")


@fault(
    Guard(
        "empcause/generator/inference.py",
        'if any("\\ud800" <= character <= "\\udfff" for character in turn):',
        "if False:",
    ),
    Guard("empcause/generator/inference.py", "if not turns or not all(turn.strip() for turn in turns):", "if False:"),
    Guard(
        "empcause/cli/chat.py",
        "            except UserError as error:\n",
        "            except ZeroDivisionError as error:\n",
    ),
    Guard("empcause/cli/chat.py", "    if sys.stdin is None:\n", "    if False:\n"),
    cause="a turn that is empty or holds bytes that are not UTF-8; standard input that is closed",
    place="empcause respond, empcause chat",
    promise="one sentence; the chat goes on with the next message, and the dialogue before it is kept",
)
def test_turns_that_cannot_be_read(models, responder, capsys, monkeypatch):
    assert "A turn is empty" in said(capsys, "respond", " \t", *models)
    assert r"not valid UTF-8 text: I miss \udcff" in said(capsys, "respond", "I miss \udcff", *models)
    with pytest.raises(UserError, match="A turn is empty"):
        responder(["I miss my dog.", " "])
    typed = io.TextIOWrapper(io.BytesIO(b"My dog died.\nHe was \xff old.\nReally old.\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", typed)
    assert main(["chat", "--max_new_tokens", "1", *models]) == 0
    shown = capsys.readouterr().out
    assert r"not valid UTF-8 text: He was \udcff old." in shown
    dialogues = [line.removeprefix("dialogue  ") for line in shown.splitlines() if line.startswith("dialogue")]
    assert len(dialogues) == 2
    assert dialogues[1].startswith("My dog died. ")
    assert dialogues[1].endswith("Really old.")
    monkeypatch.setattr("sys.stdin", None)
    assert "the standard input, which is closed" in said(capsys, "chat", *models)


@fault(
    Guard("empcause/generator/inference.py", "if sum(counts[first:]) <= room and _tokens", "if _tokens"),
    Guard(
        "empcause/generator/inference.py",
        "sum(counts[first:]) <= room and _tokens(self.extractor_tokenizer, dialogue.text, limit) <= limit",
        "sum(counts[first:]) <= room",
    ),
    Guard("empcause/generator/inference.py", "if not 1 <= max_new_tokens <= longest // 2:", "if False:"),
    Guard("empcause/cli/terminal.py", "    if reply.unread_turns:\n", "    if False:\n"),
    cause="a dialogue, a message of 100,000 characters or an answer that is longer than the models read and write",
    place="empcause respond, empcause chat",
    promise="both models leave out the same oldest turns, and this is said; what does not fit at all is refused",
)
def test_dialogues_that_are_too_long(models, responder, capsys, monkeypatch):
    turns = [f"Day {number}: my dog was ill and I was so worried about him." for number in range(9)]
    reply = responder(turns, max_new_tokens=4)
    kept = turns[reply.unread_turns :]
    assert 0 < len(kept) < len(turns)
    assert reply == Reply(**(vars(responder(kept, max_new_tokens=4)) | {"unread_turns": len(turns) - len(kept)}))
    short = turns[responder(turns, max_new_tokens=64).unread_turns :]
    assert sum(len(responder.tokenizer(turn)["input_ids"]) + 1 for turn in short) <= 64, "half is left for the answer"
    monkeypatch.setattr(responder.extractor_tokenizer, "model_max_length", 64)
    assert responder(turns, max_new_tokens=4).causes[-1][1] > 0, "the extractor reads the last turn to its end"
    monkeypatch.undo()
    assert main(["respond", *turns, "--max_new_tokens", "4", *models]) == 0
    assert f"The {reply.unread_turns} oldest turns did not fit" in " ".join(capsys.readouterr().out.split())
    assert "too long for these models" in said(capsys, "respond", "so sad " * 15000, *models)
    assert "expected 1 to 64" in said(capsys, "respond", "Hello", "--max_new_tokens", 10**9, *models)
    longest = responder(["I miss my dog."], max_new_tokens=64, min_new_tokens=64).response
    assert len(responder.tokenizer(longest)["input_ids"]) >= 32


@fault(
    Guard(
        "empcause/text.py",
        'return _HIDDEN.sub(lambda match: match.group().encode("unicode_escape").decode(), text)',
        "return text",
    ),
    Guard(
        "empcause/cli/terminal.py",
        "text.append(visible(reply.text[word.start : word.end]), style)",
        "text.append(reply.text[word.start : word.end], style)",
    ),
    Guard(
        "empcause/cli/terminal.py",
        "text.append(visible(reply.text[end : word.start]))",
        "text.append(reply.text[end : word.start])",
    ),
    Guard("empcause/cli/terminal.py", "Text(visible(reply.response)", "Text(reply.response"),
    Guard("empcause/cli/terminal.py", "console.print(Text(visible(caption))", "console.print(caption"),
    Guard("empcause/cli/main.py", "{visible(message)}", "{message}"),
    cause="escape sequences, directions of writing, invisible characters, new lines and rich's markup in a message, an answer or "
    "the name of a file",
    place="the terminal",
    promise="they are shown as escapes or as they are written, never executed",
)
def test_control_characters_are_shown(models, capsys, monkeypatch, tmp_path):
    from empcause.cli.terminal import console, print_metrics

    monkeypatch.setattr(console, "_width", 400)
    monkeypatch.setattr("empcause.generator.inference.generate_responses", lambda *_, **__: [HOSTILE])
    assert main(["respond", f"I saw a {HOSTILE}", *models]) == 0
    shown = capsys.readouterr().out
    assert f"dialogue  I saw a {SHOWN}\n" in shown
    assert f"response  {SHOWN}\n" in shown
    assert "[ (" in shown, "a bracket among the causes is no markup"
    assert not any(character in shown for character in "\x1b\u202e\u200b\x9b\x07\r\t")
    print_metrics({"loss": 1.0}, f"model in {HOSTILE}")
    assert SHOWN in capsys.readouterr().out
    folder = tmp_path / "\x1b[2J\nempcause: all is well"
    assert r"\x1b[2J\nempcause: all is well" in said(capsys, "respond", "Hello", "--extractor", folder)
    assert r"\x1b[2J" in said(capsys, "respond", "Hello", "--\x1b[2J")
    family = "👨‍👩‍👧"
    assert visible(f"{family} na\u00efve 日本") == f"{family} na\u00efve 日本", "what is seen is left as it is"


@fault(
    Guard(
        "empcause/checkpoints.py",
        "    except (ValueError, RecursionError) as error:\n",
        "    except ZeroDivisionError as error:\n",
    ),
    Guard(
        "empcause/checkpoints.py",
        "    except Exception as error:  # tokenizers",
        "    except ZeroDivisionError as error:  # tokenizers",
    ),
    Guard(
        "empcause/checkpoints.py", "        _read_object(generation)  # transformers", "        pass  # transformers"
    ),
    Guard("empcause/checkpoints.py", "or largest >= model.get_input_embeddings().num_embeddings:", "or False:"),
    Guard("empcause/checkpoints.py", "    if lacks or not", "    if not"),
    cause="a damaged config.json, tokenizer.json, tokenizer_config.json or generation_config.json; another model's tokenizer",
    place="a model's folder",
    promise="one sentence that names the file or the tokenizer; no model answers with another tokenizer than its own",
)
def test_damaged_files_beside_the_weights(small_generator, tmp_path):
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    whole = {name: (small_generator / name).read_bytes() for name in names}
    folder = tmp_path / "model"
    shutil.copytree(small_generator, folder)

    def refused(name, content, message):
        (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_generator(folder)
        (folder / name).write_bytes(whole[name])

    for name in names:
        message = "tokenizer in .* is missing or damaged" if name.startswith("tokenizer") else f"{name} is damaged"
        for content in (b"", whole[name][: len(whole[name]) // 2], b"[]", b"\xff\xfe", b"[" * 100_000):
            refused(name, content, message)
    larger = json.loads(whole["tokenizer.json"])
    larger["model"]["vocab"]["zebra"] = 999
    refused("tokenizer.json", json.dumps(larger).encode(), "tokens that the model does not know")
    refused("tokenizer_config.json", b"{}", "not that of its model")
    assert load_generator(folder)[0].config.gamma == 1


@fault(
    Guard("empcause/generator/inference.py", "    if found not in known:\n", "    if False:\n"),
    Guard("empcause/systems/loading.py", "    if found not in SYSTEMS:\n", "    if False:\n"),
    Guard("empcause/checkpoints.py", "    if found != model_type:\n", "    if False:\n"),
    cause="a model of another kind: an extractor for a generator, a generator for an extractor, a plain model for either",
    place="empcause respond, chat, evaluate",
    promise="one sentence that names the folder, what it holds and what is expected",
)
def test_models_of_another_kind(small_extractor, small_generator, tiny_gpt2_dir, capsys):
    swapped = said(capsys, "respond", "Hello", "--extractor", small_generator, "--generator", small_extractor)
    assert swapped == (
        f"{small_generator} holds a model of type 'empathetic_gpt2', not an extractor (type 'empcause_extractor')."
    )
    twice = said(capsys, "respond", "Hello", "--extractor", small_extractor, "--generator", small_extractor)
    assert f"{small_extractor} holds a model of type 'empcause_extractor', not a generator" in twice
    for stage, folder, kind in (("extractor", tiny_gpt2_dir, "gpt2"), ("generator", tiny_gpt2_dir, "gpt2")):
        options = ["--data", "sample", "--model", folder]
        if stage == "generator":
            options += ["--extractor", small_extractor]
        assert f"{folder} holds a model of type '{kind}', not a" in said(capsys, "evaluate", stage, *options)


@fault(
    Guard(
        "empcause/evaluation/responses.py",
        "        check_values(self, dict.fromkeys(names, COUNT)",
        "        (dict.fromkeys(names, COUNT)",
    ),
    Guard("empcause/evaluation/causes.py", '        check_values(self, {"batch_size": COUNT})\n', "        pass\n"),
    Guard(
        "empcause/evaluation/responses.py",
        "if self.bertscore_layer is not None and not self.bertscore_model:",
        "if False:",
    ),
    Guard("empcause/evaluation/responses.py", "        system.check_room(options.max_new_tokens)\n", "        pass\n"),
    cause="impossible options: no samples, -1 per batch, a layer without an encoder, an answer longer than the model can write",
    place="empcause evaluate",
    promise="refused by name before anything is scored or written",
)
def test_impossible_evaluations(small_extractor, small_generator, tmp_path, capsys):
    generator = [
        "evaluate",
        "generator",
        "--model",
        small_generator,
        "--extractor",
        small_extractor,
        "--data",
        "sample",
    ]
    generator += ["--output_dir", tmp_path / "out"]
    for options, message in (
        (["--max_samples", "0"], "max_samples is 0; expected a whole number of at least 1"),
        (["--max_samples", "-1"], "max_samples is -1; expected a whole number of at least 1"),
        (["--max_generated", "0"], "max_generated is 0; expected a whole number of at least 1"),
        (["--batch_size", "0"], "batch_size is 0; expected a whole number of at least 1"),
        (["--seed", "-1"], "seed is -1; expected a whole number of at least 0"),
        (["--bertscore_layer", "3"], "bertscore_layer is a layer of bertscore_model; give that too"),
        (["--split", "train"], "argument --split: invalid choice: 'train'"),
        (["--max_new_tokens", "65"], "max_new_tokens is 65; expected 1 to 64"),
    ):
        assert message in said(capsys, *generator, *options)
    extractor = [
        "evaluate",
        "extractor",
        "--model",
        small_extractor,
        "--data",
        "sample",
        "--output_dir",
        tmp_path / "out",
    ]
    assert "batch_size is -1; expected" in said(capsys, *extractor, "--batch_size", "-1")
    assert not (tmp_path / "out").exists()


@fault(
    Guard("empcause/cli/options.py", "        if key in seen:\n", "        if False:\n"),
    Guard("empcause/cli/options.py", "        elif key in optional:\n", "        elif False:\n"),
    Guard(
        "empcause/cli/options.py",
        '            raise UserError(f"The recipe {path}: {key} has no value; give one, or leave the line out.")\n',
        "            pass\n",
    ),
    Guard("empcause/cli/options.py", "        if len(content) > _LONGEST_RECIPE:\n", "        if False:\n"),
    Guard("empcause/cli/options.py", "(yaml.YAMLError, UnicodeDecodeError, RecursionError)", "yaml.YAMLError"),
    Guard(
        "empcause/cli/options.py",
        "            if not all(isinstance(item, yaml.ScalarNode) for item in node.value):\n",
        "            if False:\n",
    ),
    Guard(
        "empcause/cli/options.py",
        'words.append(f"--{key}={node.value}")',
        'words.append(f"--{key}={yaml.safe_load(node.value)}")',
    ),
    cause="a recipe with a key twice, no value, `no` for a word or lists of lists; one that is huge, binary or a folder",
    place="--config",
    promise="values count as they are written, and null is None; everything else is refused with the name of file and key",
)
def test_recipes_that_are_none(tmp_path):
    def read(content, *arguments):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(content)
        arguments = ["--config", str(path), "--output_dir", str(tmp_path), *arguments]
        return parse_options(Recipe, arguments, prog="empcause train test", description="")

    options = read(b"save_strategy: no\nextractor: on\n")
    assert (options.save_strategy, options.extractor) == ("no", "on")
    assert read(b"save_total_limit: null\n").save_total_limit is None
    assert read(b"\xef\xbb\xbfseed: 7\n", "--learning_rate", "1e-3").seed == 7
    for content, message in (
        (b"seed: 1\nseed: 2\n", "the key 'seed' twice"),
        (b"seed:\n", "seed has no value"),
        (b"report_to: [[none]]\n", "a list of plain values"),
        (b"# " + b"x" * 2**20, "more than 1,048,576 bytes"),
        (b"seed: \xff\n", "not valid YAML"),
        (b"[" * 5000, "not valid YAML"),
        (b"- seed\n", "must be a list of `key: value` lines"),
        (b"{[1]: 2}\n", "unknown key"),
    ):
        with pytest.raises(UserError, match=message):
            read(content)
    with pytest.raises(UserError, match="Is a directory"):
        parse_options(Recipe, ["--config", str(tmp_path)], prog="", description="")


@fault(
    Guard("empcause/cli/main.py", "            _check_instruction_set()\n", "            pass\n"),
    Guard(
        "empcause/ops/backends.py", "    except RuntimeError as error:\n", "    except ZeroDivisionError as error:\n"
    ),
    Guard(
        "empcause/ops/backends.py",
        "return False, visible(str(error))",
        "return False, str(error)",
    ),
    cause="EMPCAUSE_CPU_ISA names an instruction set that is unknown or that this processor does not have",
    place="any command",
    promise="one sentence that names those that run here; empcause info shows it beside the other backends",
)
def test_unknown_instruction_set(monkeypatch, capsys):
    def build_info():
        raise RuntimeError("EMPCAUSE_CPU_ISA is \x1bmmx; this processor runs avx2, baseline")

    monkeypatch.setenv("EMPCAUSE_CPU_ISA", "mmx")
    monkeypatch.setattr("empcause._C.build_info", build_info)
    message = r"EMPCAUSE_CPU_ISA is \x1bmmx; this processor runs avx2, baseline"
    assert said(capsys, "respond", "Hello", "--extractor", "nowhere") == f"{message}."
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert message in shown
    assert all(name in shown for name in BACKENDS)


@dataclass
class Recipe:
    output_dir: str = field(default="runs")
    save_strategy: str = field(default="epoch")
    extractor: str | None = field(default="runs/extractor")
    save_total_limit: int | None = field(default=2)
    report_to: list[str] = field(default_factory=list)
    learning_rate: float = field(default=1.0)
    seed: int = field(default=0)


class SilentHub:
    """A model hub that takes connections and never answers, counting them; or one that answers late."""

    def __init__(self, delay: float | None) -> None:
        hub, self.asked, self.closed = self, 0, Event()

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.asked += 1
                if hub.asked == 1:  # who asks again has been told nothing, and is answered at once
                    hub.closed.wait(delay)
                self.send_response(404)
                self.end_headers()

            do_GET = do_HEAD

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.closed.set()
        self.server.shutdown()
        self.server.server_close()


@fault(
    Guard("empcause/hub.py", "    constants.HF_HUB_OFFLINE = not answered\n", ""),
    Guard("empcause/hub.py", "    asking.join(PATIENCE)\n", "    asking.join(0)\n"),
    Guard("empcause/hub.py", "    if Path(name).exists() or not constants.HF_HUB_OFFLINE:\n", "    if True:\n"),
    cause="a model is named, and there is no network, or one that never answers",
    place="empcause train, evaluate --bertscore_model",
    promise="the hub is asked once, for seconds; then the cache is used, or one sentence says why not; a slow hub still works",
)
def test_a_hub_that_does_not_answer(monkeypatch, tmp_path, tiny_gpt2_dir):
    from empcause.training.common import load_tokenizer

    cached = tmp_path / "hub" / "models--some--model"
    shutil.copytree(tiny_gpt2_dir, cached / "snapshots" / "1234")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1234")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    monkeypatch.setattr(hub, "_OFFLINE_BY_CHOICE", False)
    for delay, patience in ((None, 0.5), (0.3, 60)):
        server = SilentHub(delay)
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "PATIENCE", patience)
        arguments = GeneratorTrainingArguments(output_dir=str(tmp_path), model_name_or_path="nobody/nothing")
        if delay is None:
            with pytest.raises(
                UserError, match=r"'nobody/nothing' in the cache, and .* does not answer within 0.5 seconds"
            ):
                load_tokenizer(arguments)
            assert server.asked == 1
            arguments.model_name_or_path = "some/model"
            assert len(load_tokenizer(arguments)) > 256, "from the cache"
        else:
            hub.reach_hub("nobody/nothing")
            assert constants.HF_HUB_OFFLINE is False
        server.close()


@fault(
    Guard(
        "empcause/generator/modeling.py",
        '            "position_ids": position_ids,\n',
        '            "position_ids": position_ids,\n            "past_key_values": None,\n',
    ),
    Guard(
        "empcause/evaluation/plots.py",
        'warnings.filterwarnings("ignore", "Glyph',
        'warnings.filterwarnings("default", "Glyph',
    ),
    Guard("empcause/training/extractor.py", '("pad_token_id", "bos_token_id", "eos_token_id")', "()"),
    cause="a normal run: both stages trained, evaluated, asked",
    place="standard error and Python's warnings",
    promise="there is progress and output of our own, and no warning",
)
def test_a_normal_run_warns_of_nothing(tiny_encoder_dir, tiny_gpt2_dir, tmp_path, capfd, monkeypatch):
    logged = []
    listener = logging.Handler(logging.WARNING)
    monkeypatch.setattr(listener, "emit", logged.append)
    # transformers' own handler writes where standard error was when it was imported, and may not pass records on to the root.
    for logger in (logging.getLogger(), logging.getLogger("transformers")):
        monkeypatch.setattr(logger, "handlers", [*logger.handlers, listener])
    monkeypatch.setenv("EMPCAUSE_CACHE_DIR", str(tmp_path / "cache"))
    extractor, generator = tmp_path / "extractor", tmp_path / "generator"
    train = [
        "--data",
        "sample",
        "--max_steps",
        "2",
        "--eval_steps",
        "2",
        "--save_steps",
        "2",
        "--eval_strategy",
        "steps",
    ]
    train += ["--save_strategy", "steps"]
    tuned = [
        "--model_name_or_path",
        tiny_gpt2_dir,
        "--max_train_samples",
        "16",
        "--max_eval_samples",
        "4",
        "--max_length",
        "64",
    ]
    encoder_sizes = (
        "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32,max_position_embeddings=130"
    )
    encoder = ["--model_name_or_path", "", "--tokenizer_name", tiny_encoder_dir, "--model_type", "roberta"]
    both = ["--extractor", extractor, "--generator", generator]
    model = ["--data", "sample", "--model"]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        for command in (
            ["train", "extractor", *train, *encoder, "--config_overrides", encoder_sizes, "--output_dir", extractor],
            [
                "train",
                "generator",
                *train,
                *tuned,
                "--extractor",
                extractor,
                "--output_dir",
                generator,
            ],
            ["evaluate", "extractor", *model, extractor, "--output_dir", tmp_path / "e"],
            [
                "evaluate",
                "generator",
                *model,
                generator,
                "--extractor",
                extractor,
                "--max_samples",
                4,
                "--output_dir",
                tmp_path / "g",
            ],
            ["respond", "My dog 🐕 costs $5 and $6 🦖.", *both],
        ):
            assert main([str(word) for word in command]) == 0
        from empcause.data import split_words
        from empcause.evaluation.plots import plot_causes

        text = "My dog 🐕 costs $5 and $6 🦖."
        plot_causes(text, split_words(text), [0.5] * len(split_words(text)), "$a$ 🐕", tmp_path / "causes.png")
    ours = [str(each.message) for each in warned if not issubclass(each.category, DeprecationWarning | ResourceWarning)]
    assert ours == []
    assert [record.getMessage() for record in logged if not record.name.startswith("empcause")] == []
    assert "arning" not in capfd.readouterr().err
