"""What the tests share, also where pytest-xdist divides them: worlds that are built once, the launcher's port."""

import fcntl
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path


def built_once(tmp_path_factory, name, build):
    """The folder `name` of this run of the tests, which build(folder) has filled: once, the first who asks for it.

    build finds the folder empty; where it raises, the next who asks builds it again.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # of all workers
    folder, done = base / name, base / f"{name} is built"
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            build(folder)
            done.touch()
    return folder


@contextmanager
def one_launch_at_a_time():
    """Launched groups of processes meet on one port: of the tests that launch, one runs at a time."""
    with open(Path(tempfile.gettempdir()) / "one_launch.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
