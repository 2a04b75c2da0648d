"""What several tests read and one builds: once, also where pytest-xdist's workers share the tests."""

import fcntl
import os
import shutil


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
