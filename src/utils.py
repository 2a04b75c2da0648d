"""What every script needs: one-line errors, signals, exit statuses, seeds, devices.

At the top only the standard library is imported, here as in options.py, so that --help answers at once, from a Python
that has nothing else installed.
"""

import atexit
import ctypes
import errno
import functools
import gc
import logging
import os
import random
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
# refusals of a disk or its owner, for the user to fix wherever they happen
REFUSALS = NO_ROOM | {errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EIO,
                      errno.ENAMETOOLONG}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as glibc's malloc.h numbers them


# --- errors, signals, exit statuses ------------------------------------------------------------------------------


class UserError(Exception):
    """An error that the user can fix; its message is one line: flag or file, found, wanted, what to do."""


def require(path, what, hint):
    """Return `path` if it exists, else raise a UserError saying what it should have been and what to do."""
    if not Path(path).exists():
        raise UserError(f"{path}: {what} not found; {hint}")
    return Path(path)


class Interrupted(Exception):
    """A signal ended the work after everything was saved; its message says what to do."""

    def __init__(self, message, number):
        super().__init__(message)
        self.number = number


class StopSignals:
    """While active, SIGTERM and Ctrl-C set `received` to their number and work goes on until it can be saved.

    A second signal acts at once. Outside the main thread, where Python allows no handlers, it stays None.
    """

    def __enter__(self):
        self.received, self.previous = None, {}
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self.previous[number] = signal.signal(number, self._receive)
        except ValueError:
            pass
        return self

    def _receive(self, number, frame):
        self.received = number
        self._restore()

    def _restore(self):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def __exit__(self, *error):
        self._restore()


def run_cli(main, argv=None):
    """Run a script's main(); a UserError becomes one line on stderr and exit status 2.

    Returns the exit status; of what a signal stopped 128 + its number, as shells do.
    """
    quiet()
    # A thread of PyTorch's that waits would spin, and take its core from whoever works there: five times slower beside
    # another such program. Read when torch is loaded, which scripts do later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_freed_memory()
    spare_the_collector()
    status = _status_of(main, argv)
    _leave_processes(failed=status != 0)
    return status


def keep_freed_memory():
    """Keep freed memory for the next use, where the C library is glibc.

    By default it hands blocks of some MB back to the kernel, which zeroes them anew in every step: a tenth to a fifth
    of the time of networks on a CPU. Kept are blocks of up to 256 MB, 512 MB altogether.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for setting, size in ((M_MMAP_THRESHOLD, 256 << 20), (M_TRIM_THRESHOLD, 512 << 20)):
            mallopt(setting, size)


def spare_the_collector():
    """Have Python look for cycles of garbage less often, and no more when it ends.

    Importing diffusers makes 400,000 objects that stay: looked through again and again they cost .6 s of 5, and once
    more at the end 1.2 s.
    """
    gc.set_threshold(10_000)
    atexit.register(gc.freeze)


def _status_of(main, argv):
    try:
        try:
            main(argv)
        finally:
            sys.stdout.flush()
    except UserError as error:
        # from a DataLoader worker the message arrives wrapped in the worker's traceback; its last line is ours
        message = str(error).strip().splitlines()[-1].removeprefix("utils.UserError: ")
        print(f"error: {message}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        if not _reader_left():
            raise
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in REFUSALS or error.filename is None:
            raise
        print(f"error: {error.filename}: {refusal(error)}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if not name or any((REPOSITORY / "src" / file).exists() for file in (name, f"{name}.py")):
            raise  # ours
        print(f"error: {sys.executable} has no {name}; bash scripts/setup.sh installs what is needed, and makes "
              ".venv/bin/python", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"interrupted: {stop}", file=sys.stderr)
        return 128 + stop.number
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    return 0


def _reader_left():
    """Say whether what reads our lines has read enough (... | head), and spare it, and Python's end, the rest."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def refusal(error):
    """Say in a few words why a file operation was refused, and what to do."""
    what = error.strerror or str(error).splitlines()[0]  # NumPy says how much it has written, but not why no more
    if error.errno in NO_ROOM or error.errno is None:
        return f"{what}; make room on the disk, then run the same command again"
    return f"{what}; check that it is a file or folder you may use, or choose another folder"


def _leave_processes(failed):
    """Destroy the process group, if a launcher made one, while Python is whole.

    A thread of gloo's that lets go of its last tensor while Python ends aborts the process. Gloo's end waits for
    nobody; NCCL's does, so that a process that failed, maybe alone, leaves NCCL to the exit.
    """
    if "torch" not in sys.modules:
        return
    dist = sys.modules["torch"].distributed
    if dist.is_available() and dist.is_initialized() and not (failed and dist.get_backend() != "gloo"):
        gc.collect()  # networks in cycles hold the group, and its threads end with its last holder
        dist.destroy_process_group()


# --- seeds and devices -------------------------------------------------------------------------------------------


def seed_everything(seed):
    """Seed the global generators of Python, NumPy and PyTorch."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # the same, but for the stack, which the other writes down for every kind of GPU that is not there
        torch.default_generator.manual_seed(seed)


def derive_seed(*parts):
    """Make one 63-bit seed of several integers, e.g. (seed, epoch, rank) or (seed, image_id, sample)."""
    import numpy as np

    return int(np.random.SeedSequence([int(part) for part in parts]).generate_state(1, np.uint64)[0] >> 1)


def reproducible_products():
    """Let MKL (PyTorch's on x86) add up in an order that does not depend on the number of threads.

    MKL reads the setting at its first matrix product, so call this before any. The environment's own setting wins.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def pick_device(name="auto"):
    """Return the torch.device of 'auto' (CUDA where there is one), 'cpu', 'cuda', 'cuda:1', ..."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: no CUDA device is visible; use --device cpu or check nvidia-smi")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: not a device ({str(error).splitlines()[0]}); wanted auto, cpu, cuda or "
                        "cuda:1") from None


# --- the terminal ------------------------------------------------------------------------------------------------

# what libraries read when they are loaded; the environment's own settings win
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
# {logger: messages of it that ask nothing of the user}; every other message of a library stays
NOISE = {
    "transformers.modeling_utils": r"LOAD REPORT(?!.*(MISSING|MISMATCH|CONVERSION))",  # weights that nobody asked for
    "DeepSpeed": r"Setting accelerator to CPU",
    "transformers.utils.import_utils": r"requires torchvision \(not installed\); falling back",
}
LOG_INTERVAL = 60  # seconds between two lines of a bar in a log file


def quiet():
    """Leave out what libraries say that no user can act on; called before they are loaded.

    Known messages are left out one by one. Warnings that are not known, weights that a file lacks and errors stay.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    for name in NOISE:
        logging.getLogger(name).addFilter(_worth_saying)


def _worth_saying(record):
    return not re.search(NOISE[record.name], record.getMessage(), re.DOTALL)


def progress(iterable=None, **settings):
    """Return tqdm(iterable, **settings): a bar on a terminal; in a log file a line a minute, none in the first."""
    from tqdm import tqdm

    return (tqdm if sys.stderr.isatty() else _lines())(iterable, **settings)


@functools.cache
def _lines():
    """Return the bar of a log file, a class."""
    from tqdm import tqdm

    class Lines(tqdm):
        def __init__(self, iterable=None, **settings):
            super().__init__(iterable, **{**settings, "mininterval": LOG_INTERVAL, "delay": LOG_INTERVAL,
                                          "miniters": 1, "ncols": 0})  # 0: the numbers alone

        def display(self, *message):
            self.fp.write(f"{self}\n")
            self.fp.flush()

        def set_postfix(self, *values, refresh=True, **named):
            super().set_postfix(*values, refresh=False, **named)  # shown with the next line

        def close(self):
            if getattr(self, "disable", True):
                return
            if self.last_print_t >= self.start_t + self.delay and self.last_print_n < self.n:
                self.display()
            self.disable = True
            self._decr_instances(self)

    return Lines


# --- messages and records ----------------------------------------------------------------------------------------


def evenly(n, at_most):
    """Choose at most so many of n things, at even distances from the first to the last: their numbers, ascending."""
    import numpy as np

    return np.unique(np.linspace(0, n - 1, min(n, at_most)).round().astype(int))


def in_bytes(n):
    """Write a number of bytes as '39.6 GB'."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n < 1000 or unit == "TB":
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000


def git_commit():
    """Return the repository's commit, or None outside git."""
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:  # no git here
        return None
