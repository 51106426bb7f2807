"""`import empcause` loads neither torch nor transformers, yet both know its operators and models in either import order."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from empcause import biased_attention
from empcause.extractor import CauseExtractor, CauseExtractorConfig
from empcause.generator import GENERATORS


def run(program, *arguments):
    """Run a Python program in a process of its own, assert that it succeeds, and return what it printed."""
    command = [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folders(tiny_gpt2_dir, tiny_encoder_dir, tmp_path_factory):
    """Return the folders of a saved generator and a saved extractor."""
    generator, extractor = tmp_path_factory.mktemp("generator"), tmp_path_factory.mktemp("extractor")
    config, model = GENERATORS["gpt2"]
    model(config.from_pretrained(tiny_gpt2_dir)).save_pretrained(generator)
    AutoTokenizer.from_pretrained(tiny_gpt2_dir).save_pretrained(generator)
    CauseExtractor(CauseExtractorConfig(encoder=AutoConfig.from_pretrained(tiny_encoder_dir))).save_pretrained(
        extractor
    )
    return generator, extractor


LIGHT = """
import sys
import empcause
assert not {"torch", "transformers"} & set(sys.modules)
assert set(empcause.__all__) < set(dir(empcause))
assert empcause.__version__
try:
    empcause.nothing
except AttributeError as error:
    assert str(error) == "module 'empcause' has no attribute 'nothing'"
else:
    raise AssertionError
assert not {"torch", "transformers"} & set(sys.modules)
import torch
query = torch.randn(1, 2, 3, 4)
others = (None, 1.0, None, None, None, None, 0, 0, True, 1.0, 0.0, None, None, True)
assert torch.ops.empcause_cpu.attention(query, query, query, *others)
assert "transformers" not in sys.modules
assert empcause.info is empcause.ops.info
assert empcause.steer is empcause.integration.steer
assert not [finder for finder in sys.meta_path if type(finder).__module__ == "empcause.on_import"], "all is registered"
"""


def test_the_package_is_light_and_gives_its_functions_on_demand():
    run(LIGHT)


# By the names that a program imports from transformers: the statements that it then runs.
USES = {
    "AutoConfig": "assert AutoConfig.from_pretrained(sys.argv[1]).model_type == 'empathetic_gpt2'",
    "AutoModel": "assert type(AutoModel.from_pretrained(sys.argv[2])).__name__ == 'CauseExtractor'",
    "AutoModelForCausalLM": "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation='empcause'); "
    "assert type(model).__name__ == 'EmpatheticGPT2LMHeadModel'",
    "pipeline": "found = pipeline('text-generation', model=sys.argv[1])('My dog', max_new_tokens=2, do_sample=False); "
    "assert found[0]['generated_text'].startswith('My dog')",
    "AttentionInterface, AttentionMaskInterface": "assert AttentionInterface()['empcause'].__name__ == 'empcause_attention'; "
    "assert AttentionMaskInterface()['empcause'].__name__ == 'biased_attention_mask'",
    "LlamaConfig, LlamaForCausalLM": "sizes = dict.fromkeys(('hidden_size', 'intermediate_size', 'vocab_size'), 32); "
    "config = LlamaConfig(num_hidden_layers=1, num_attention_heads=2, **sizes); "
    "LlamaForCausalLM._from_config(config, attn_implementation='empcause')",
}


@pytest.mark.parametrize("names", USES)
def test_imported_before_transformers(names, folders):
    """Modules of transformers import each other; this package must not use one that is only partly initialised."""
    run(f"import sys, empcause; from transformers import {names}\n{USES[names]}", *folders)


@pytest.mark.parametrize("names", ["AutoConfig", "AutoModelForCausalLM", "LlamaConfig, LlamaForCausalLM"])
def test_imported_after_transformers(names, folders):
    run(f"import sys; from transformers import {names}; import empcause\n{USES[names]}", *folders)


AMONG_OTHERS = """
import sys
import empcause

class AsksAll:
    def find_spec(self, name, path=None, target=None):
        if not name.startswith("transformers"):
            return None
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        return next(filter(None, specs), None)

sys.meta_path.insert(0, AsksAll())
from transformers import GPT2Config, GPT2LMHeadModel
assert type(sys.modules["transformers.modeling_utils"].__spec__.loader).__module__ != "empcause.on_import"
sizes = {"n_embd": 32, "n_head": 2, "n_layer": 1, "vocab_size": 9}
GPT2LMHeadModel._from_config(GPT2Config(**sizes), attn_implementation="empcause")
"""


def test_beside_another_tool_that_has_every_finder_look():
    run(AMONG_OTHERS)


AT_ONCE = """
import threading
import empcause

def one():
    import transformers.utils.logging, transformers
    transformers.AutoConfig

def other():
    import torch
    torch.zeros(1)

failed = []
threading.excepthook = failed.append
threads = [threading.Thread(target=each) for each in (one, other)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failed, failed
import torch
torch.ops.empcause_cpu.attention
"""


def test_two_threads_import_torch_and_transformers_at_once():
    run(AT_ONCE)


def test_the_package_is_loaded_again():
    run(
        "import importlib, sys, empcause\n"
        "finders = list(sys.meta_path)\n"
        "importlib.reload(empcause)\n"
        "assert sys.meta_path == finders\n"
        "import empcause.integration, empcause.generator\n"
        "importlib.reload(empcause)\n"
        "assert not [finder for finder in sys.meta_path if finder is finders[0]]"
    )


class Biased(torch.nn.Module):
    def forward(self, query, cause):
        return biased_attention(query, query, query, cause)


def test_a_saved_program_finds_the_operators(tmp_path):
    inputs = torch.randn(1, 2, 5, 8), torch.rand(1, 5)
    torch.export.save(torch.export.export(Biased(), inputs), tmp_path / "program.pt2")
    torch.save((*inputs, Biased()(*inputs)), tmp_path / "tensors.pt")
    run(
        "import sys, empcause, torch\n"
        "query, cause, expected = torch.load(sys.argv[2])\n"
        "assert torch.equal(torch.export.load(sys.argv[1]).module()(query, cause), expected)",
        tmp_path / "program.pt2",
        tmp_path / "tensors.pt",
    )
