"""A fault test that is skipped in CI shows nothing: there a skip is a failure. Small models to do work with."""

import os

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from empcause.extractor import CauseExtractor, CauseExtractorConfig
from empcause.generator import GENERATORS, add_separator


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("CI"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, which CI does not accept: {call.excinfo.value}"
    return report


@pytest.fixture
def one_thread():
    """As a fork has, where sums are to be the same; and threads that wait for each other cost tiny models most of their time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def small_extractor(tiny_encoder_dir, tmp_path_factory):
    """Folder of an extractor that has learned nothing."""
    folder = tmp_path_factory.mktemp("small") / "extractor"
    torch.manual_seed(0)
    encoder = AutoModel.from_pretrained(tiny_encoder_dir, add_pooling_layer=False)
    CauseExtractor(CauseExtractorConfig(encoder=encoder.config.to_dict()), encoder).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_encoder_dir).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_generator(tiny_gpt2_dir, tmp_path_factory):
    """Folder of a generator with bias that has learned nothing."""
    folder = tmp_path_factory.mktemp("small") / "generator"
    torch.manual_seed(0)
    config_class, model_class = GENERATORS["gpt2"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2_dir)
    tokenizer.sep_token = None
    model = model_class(config_class.from_pretrained(tiny_gpt2_dir))
    add_separator(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
