"""A fault test that is skipped in CI shows nothing: there a skip is a failure."""

import os

import pytest
import torch


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
