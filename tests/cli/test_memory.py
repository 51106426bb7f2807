"""Freed memory is kept, unless the user chose otherwise."""

import os
import subprocess
import sys

import pytest

# Whether memory is kept, and the page faults of taking, filling and freeing 64 MiB: the median of 15 times, as the heap
# first grows to where an aligned block also fits beside what else was taken.
PROGRAM = """
import resource, statistics, sys, torch
from empcause.cli.memory import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else False
counts = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
for _ in range(15):
    torch.ones(2**24)
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(kept, statistics.median(after - before for before, after in zip(counts, counts[1:])))
"""


def measure(choice: str, **variables: str) -> tuple[bool, int]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, choice], env=environment | variables, capture_output=True, text=True, check=True
    )
    kept, faults = process.stdout.split()
    return kept == "True", int(faults)


def test_freed_memory_is_taken_again_without_page_faults():
    kept, few = measure("keep")
    if not kept:
        pytest.skip("mallopt is not there: the C library is not glibc")
    _, many = measure("as it is")
    if many < 1000:
        pytest.skip(f"pages are not handed out one by one here: {many} faults for 64 MiB")
    assert few < many / 10


def test_the_users_own_choice_counts():
    assert measure("keep", MALLOC_MMAP_THRESHOLD_="1000000")[0] is False
