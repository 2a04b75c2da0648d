"""What every test shares: MKL adds up as recon.py lets it, here and in every process that a test starts.

MKL reads the setting once. Without this, whether a process has it would depend on which test came first, and processes
that are compared to the bit would differ.
"""

import fcntl
import multiprocessing
import tempfile
from pathlib import Path

import pytest

import utils

utils.reproducible_products()


@pytest.fixture
def one_launch():
    """Launched groups of processes meet on one port: of the tests that launch, one runs at a time (pytest -n)."""
    with open(Path(tempfile.gettempdir()) / "one_launch.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def pytest_unconfigure():
    """The traceback of a failed test keeps its DataLoader's workers alive, who take SIGTERM as a training does, and
    Python would wait for them for good."""
    for process in multiprocessing.active_children():
        process.kill()
