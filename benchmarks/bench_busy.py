"""Is the pipeline quick to start, and at ease beside a busy neighbour?

Start: seconds of every script's --help, in a bare Python. Stages: each runs by its real command, with a small load of
the demo world (bash scripts/demo.sh makes it), on two cores: alone, and while an endless loop has one of them. Wanted:
at most 2 s, and at most twice the time.

    python benchmarks/bench_busy.py                        # about ten minutes
    python benchmarks/bench_busy.py --rounds 1 --images 8 --stages recon

Quiet and busy take turns, and the ratio is that of the shortest times, those least disturbed by others. The results go
to a folder that is deleted at the end; the demo's own are only read. Seconds to the first line are those to a command's
first word about its work (after the `+ command` of the shell scripts).
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
DEMO = REPO / "demo"
WANTED_START, WANTED_RATIO = 2.0, 2.0
CORES = sorted(os.sched_getaffinity(0))[:2] if hasattr(os, "sched_getaffinity") else []
# what each stage runs, after `source demo/settings.sh`, on {n} images or for {epochs} epochs
STAGES = {
    "train": "STAGES=finetune FEATS=c bash scripts/train.sh --num_epochs {epochs} --tag busy --overwrite",
    "score": "bash scripts/score.sh --overwrite",
    "recon": "bash scripts/recon.sh --limit {n} --overwrite",
    "evaluate": "rm -rf $ROOT/outputs_all/.features; bash scripts/evaluate.sh",
    "features": "FEATS='c g' bash scripts/features.sh --overwrite --components 0",  # last: the others need components
}
BUSY_LOOP = "while True: pass"


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="*", choices=list(STAGES), default=list(STAGES), metavar="STAGE",
                        help=f"{', '.join(STAGES)} (all, in this order)")
    parser.add_argument("--images", type=int, default=48, help="drawn and evaluated")
    parser.add_argument("--epochs", type=int, default=3, help="of the training")
    parser.add_argument("--rounds", type=int, default=2, help="each stage quiet and busy, in turns")
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    if not (DEMO / "outputs_all").is_dir():
        sys.exit("error: demo/outputs_all: no demo world; bash scripts/demo.sh makes it")
    print_starts()
    if not args.stages:
        return
    print(f"\n{'stage':<10}{'quiet':>8}{'busy':>8}{'ratio':>8}{'first line':>12}     (seconds; cores {CORES or 'all'})")
    with small_world() as root:
        for stage, command in STAGES.items():
            if stage in args.stages:
                print_stage(stage, command.format(n=args.images, epochs=args.epochs), root, args.rounds)


def print_starts():
    """The seconds of each script's --help, without any library."""
    print(f"{'--help of':<24}{'seconds':>8}")
    for script in sorted((REPO / "src").glob("*.py")):
        if "def get_parser" in script.read_text():
            seconds, _ = timed([sys.executable, "-E", "-s", "-S", str(script), "--help"], os.environ)
            print(f"{script.name:<24}{seconds:>8.2f}{'' if seconds <= WANTED_START else f'   wanted {WANTED_START:g}'}")


def print_stage(stage, command, root, rounds):
    """The seconds of one stage, quiet and busy, in turns."""
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith(("OMP_", "MKL_", "KMP_"))}  # the stage's own settings are what is measured
    environment |= {"PYTHON": sys.executable, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    words = ["bash", "-c", f"source {DEMO}/settings.sh; export ROOT={root}; cd {REPO}; {command}"]
    quiet, busy, first = [], [], []
    for _ in range(rounds):
        for times, neighbour in ((quiet, False), (busy, True)):
            with busy_loop() if neighbour else no_neighbour():
                seconds, until_first = timed(words, environment)
            times.append(seconds)
            if not neighbour:
                first.append(until_first)
    ratio = min(busy) / min(quiet)
    print(f"{stage:<10}{min(quiet):>8.1f}{min(busy):>8.1f}{ratio:>8.2f}{min(first):>12.1f}"
          f"{'' if ratio <= WANTED_RATIO else f'     wanted {WANTED_RATIO:g}'}", flush=True)


def timed(words, environment):
    """Run a command on CORES; returns its seconds, and those until its first line about its work."""
    start, first = time.perf_counter(), None
    process = subprocess.Popen(on_cores(CORES) + words, env=environment, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if first is None and line.strip() and not line.startswith("+ "):
            first = time.perf_counter() - start
    if process.wait() != 0:
        sys.exit(f"error: {words[-1]} failed:\n{''.join(lines[-5:])}")
    seconds = time.perf_counter() - start
    return seconds, first if first is not None else seconds


def on_cores(cores):
    """The words before a command that keep it on some cores; none where there is no taskset."""
    return ["taskset", "-c", ",".join(map(str, cores))] if cores and shutil.which("taskset") else []


@contextmanager
def busy_loop():
    """A neighbour that has one core for itself, as far as the system lets it."""
    process = subprocess.Popen([*on_cores(CORES[-1:]), sys.executable, "-S", "-c", BUSY_LOOP])
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def no_neighbour():
    yield


@contextmanager
def small_world():
    """Yield a root that reads the demo's data, runs and scores, and writes into folders of its own."""
    folder = Path(tempfile.mkdtemp(prefix="bench_busy_"))
    try:
        for name in ("nsddata", "MindEyeV2", "models"):
            (folder / name).symlink_to(DEMO / name)
        link_files(DEMO / "nsddata_stimuli", folder / "nsddata_stimuli")
        for name in ("train_logs", "scores_all"):
            link_files(DEMO / name, folder / name)
        copied = DEMO / "outputs_all/subj01/cp_4096_v1/300/0.4"
        shutil.copytree(copied, folder / copied.relative_to(DEMO), ignore=shutil.ignore_patterns("report", "seen"))
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def link_files(source, target):
    """The same folders, with links to the files: one that is replaced is replaced in `target` alone."""
    for file in source.rglob("*"):
        place = target / file.relative_to(source)
        if file.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(file)


if __name__ == "__main__":
    main()
