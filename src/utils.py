"""Paths, run names, seeds, checkpoints and tracking: the plumbing every script shares."""

import csv
import errno
import gc
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import zipfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
CHECKPOINT_FORMAT = 2
# what a checkpoint of a run has beside its format, and a subject's scores of it need
RUN_KEYS = ("model", "model_args", "config", "n_voxels")
NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
# what a disk or its owner refuses: the user's to mend, wherever it happens
REFUSALS = NO_ROOM | {errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EIO,
                      errno.ENAMETOOLONG}


class UserError(Exception):
    """Something the user can mend; its message is one line: flag or file, found, wanted, what to do."""


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
    status = _status_of(main, argv)
    _leave_processes(failed=status != 0)
    return status


def _status_of(main, argv):
    try:
        main(argv)
    except UserError as error:
        # from a DataLoader worker the message arrives wrapped in the worker's traceback; its last line is ours
        message = str(error).strip().splitlines()[-1].removeprefix("utils.UserError: ")
        print(f"error: {message}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in REFUSALS or error.filename is None:
            raise
        print(f"error: {error.filename}: {_refusal(error)}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"interrupted: {stop}", file=sys.stderr)
        return 128 + stop.number
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    return 0


def _refusal(error):
    """What a refused file operation says, and what to do."""
    what = error.strerror or str(error).splitlines()[0]  # NumPy says how much it has written, but not why no more
    if error.errno in NO_ROOM or error.errno is None:
        return f"{what}; make room on the disk, then run the same command again"
    return f"{what}; check that it is a file or folder you may use, or choose another folder"


def _leave_processes(failed):
    """Destroy the process group, if a launcher made one, while Python is whole.

    A thread of gloo's that lets go of its last tensor while Python ends aborts the process. Gloo's end waits for
    nobody; NCCL's does, so that a process that failed, maybe alone, leaves NCCL to the exit.
    """
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized() and not (failed and dist.get_backend() != "gloo"):
        gc.collect()  # networks in cycles hold the group, and its threads end with its last holder
        dist.destroy_process_group()


# --- paths ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paths:
    """Every folder and file of the project, all hanging from one root (DESIGN section 3)."""

    root: Path
    data_path: Path

    @classmethod
    def from_args(cls, args):
        """From the parsed --root and --data_path; raises UserError when the root does not exist."""
        root = Path(args.root).expanduser().resolve()
        if not root.is_dir():
            raise UserError(f"--root {args.root}: no such folder; give the folder that holds nsddata/ and MindEyeV2/")
        data_path = Path(args.data_path).expanduser().resolve() if args.data_path else root / "MindEyeV2/mindeyev2"
        return cls(root, data_path)

    @property
    def stimuli(self):
        return self.root / "nsddata_stimuli/stimuli/nsd"

    @property
    def experiments(self):
        return self.root / "nsddata/experiments/nsd"

    @property
    def captions(self):
        return self.stimuli / "annotations/nsd_captions.json"

    def feature(self, feat):
        """HDF5 file of a feature ('c', 'z', 'g_2', ...): one row per 73k image."""
        return self.stimuli / f"{feat}_all.hdf5"

    def betas(self, subj):
        return self.data_path / f"betas_all_{subj}_fp32_renorm.hdf5"

    def rois(self, subj):
        """Folder of NSD's ROI volumes."""
        return self.root / "nsddata/ppdata" / subj / "func1pt8mm/roi"

    def run(self, name):
        return self.root / "train_logs" / name

    def scores(self, subj, name, feat):
        """Folder of one feature's scores; `name` is `scores_name`'s."""
        folder = self.root / "scores_all" / subj / name
        return folder / f"Linear-{feat[2:]}" if feat.startswith("g_") else folder

    def images(self, subj, method, guidance_scale, guidance_strength):
        """Folder of a set of reconstructions; what is not guided lies in 0/0."""
        if not guidance_scale * guidance_strength:
            guidance_scale = guidance_strength = 0
        return self.root / "outputs_all" / subj / method / f"{guidance_scale:g}" / f"{guidance_strength:g}"


def run_name(stage, subj, feat, hidden_dim, num_sessions=40, tag=""):
    """Name of a training run (DESIGN section 3).

    stage: 'pretrain' (all subjects but `subj`), 'finetune' (`subj` alone, from the pretrained run), 'scratch' or
    'ridge' (the linear baseline, which has no hidden_dim), or 'ground_truth' (no run, but the true features of the
    images that `subj` saw). feat: 'gnet' with 'scratch' is the encoding model of `subj`, with 'pretrain' the one that
    all subjects share. tag: the user's own, to keep variants apart.
    """
    if stage == "ground_truth":
        return f"ground_truth_{subj}_{feat}"
    if feat == "gnet":
        return "gnet_" + ("multisubject" if stage == "pretrain" else subj) + (f"_{tag}" if tag else "")
    prefix = {"pretrain": "multisubject", "finetune": "pretrained"}.get(stage, stage)
    sessions = "" if stage == "pretrain" else f"_{num_sessions}sess"
    width = "" if stage == "ridge" else f"_{hidden_dim}" + ("_mlp" if feat == "c" else "")
    return f"{prefix}_{subj}{sessions}_ext1_{feat}{width}" + (f"_{tag}" if tag else "")


def run_of(flags, feat):
    """Name of the run that the flags of a score script (a dict) mean: --run STAGE[:SUBJ] and what names it."""
    stage, _, subj = flags["run"].partition(":")
    return run_name(stage, subj or flags["subj"], feat, flags["hidden_dim"], flags["num_sessions"], flags["tag"])


def head_of(flags):
    """Whose voxel encoder reads --subj: 'own', 'adapt' (a new one) or the subject it is borrowed from.

    Without --head: own where the run has one, else adapt (DESIGN section 6). A pretraining run has everyone's but the
    subject's it is named after, any other run has only that one.
    """
    stage, _, subj = flags["run"].partition(":")
    has_own = ((subj or flags["subj"]) == flags["subj"]) != (stage == "pretrain")
    return flags["head"] or ("own" if has_own else "adapt")


def scores_name(flags, feat):
    """Name of a folder of scores: the run, then what sets these apart: an adapted or borrowed head, a null control."""
    head = head_of(flags)
    parts = [run_of(flags, feat)]
    parts += {"own": [], "adapt": [f"adapt{flags['num_sessions']}sess"]}.get(head, [f"head{head[-2:]}"])
    return "_".join([*parts, *_variant_of(flags)])


def images_name(flags):
    """Name of the reconstructions that the flags of recon.py (a dict) mean: --method, then what they are made of."""
    ceiling = ["ground_truth"] if flags["run"] == "ground_truth" else []
    brain = ["gnet", flags["gnet_roi"], f"{flags['gnet_kappa']:g}"] if flags["use_gnet"] else []
    return "_".join([flags["method"], *ceiling, *brain, *_variant_of(flags)])


def _variant_of(flags):
    """Parts of a name, each where it is not the default: the images, the trials of each, a null control."""
    parts = {"test_split": "new_test", "repeats": "mean", "control": None}
    return [flags[name] for name, default in parts.items() if flags[name] != default]


def require(path, what, hint):
    """Return `path` if it exists, else raise a UserError saying what it should have been and what to do."""
    if not Path(path).exists():
        raise UserError(f"{path}: {what} not found; {hint}")
    return Path(path)


# --- files that are whole or absent ------------------------------------------------------------------------------


@contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`; rename it into place on success, remove it on failure.

    Raises UserError when the disk refuses: `path` is then what it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{_this_host()}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: could not be written: {_refusal(error)}") from error


def remove_leftovers(folder):
    """Remove the temporary files of atomic_path whose process, on this host, is gone: killed while it wrote."""
    for file in Path(folder).glob(f".*.{_this_host()}.*.tmp"):
        try:
            os.kill(int(file.name.split(".")[-2]), 0)  # signal 0 only asks whether there is such a process
        except ProcessLookupError:
            file.unlink(missing_ok=True)
        except (ValueError, OSError):  # not one of ours, or another user's process
            pass


def _this_host():
    return socket.gethostname().replace(".", "-")


def save_together(files):
    """Write several files, {path: function of the path to write to}: until the disk has taken all of them, those that
    are there stay. They then come into place one by one, the first of `files` last."""
    with ExitStack() as places:
        for path, write in files.items():
            write(places.enter_context(atomic_path(path)))


def write_json(value):
    """A function that writes a value to a path."""
    return lambda path: path.write_text(json.dumps(value, indent=1) + "\n")


def save_json(path, value):
    save_together({path: write_json(value)})


def load_json(path, what="file", hint="run the stage that writes it", kind=dict):
    """Read a JSON file that holds an object (kind=dict) or a list."""
    try:
        value = json.loads(require(path, what, hint).read_text())
    except ValueError as error:  # no JSON, or no text
        raise UserError(f"{path}: not valid JSON ({error}); delete it and run the stage that writes it again") from None
    if not isinstance(value, kind):
        wanted = "an object" if kind is dict else "a list"
        raise UserError(f"{path}: holds a {type(value).__name__}, wanted {wanted}; delete it and {hint}")
    return value


def write_npy(array):
    """A function that writes an array to a path."""
    def write(path):
        with open(path, "wb") as file:
            np.save(file, array)
    return write


def load_npy(path, what, hint, mmap_mode=None):
    """Load an array without pickles, with mmap_mode='r' as a map of the file; UserError if missing or damaged."""
    try:
        array = np.load(require(path, what, hint), allow_pickle=False, mmap_mode=mmap_mode)
        if not isinstance(array, np.ndarray):
            array.close()
            raise ValueError("it is an archive of arrays")
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a readable .npy file ({error}); delete it and {hint}") from None
    return array


def write_csv(rows):
    """A function that writes a list of equal-keyed dicts to a path."""
    def write(path):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return write


def save_csv(path, rows):
    save_together({path: write_csv(rows)})


def load_csv(path, what, hint):
    try:
        with open(require(path, what, hint), newline="") as file:
            return list(csv.DictReader(file))
    except (ValueError, csv.Error) as error:  # no text
        raise UserError(f"{path}: not a readable .csv file ({error}); delete it and {hint}") from None


def file_hash(path, algorithm="sha256", digits=12):
    """First hex digits (None: all) of a file's hash: says which checkpoint made an artefact."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:digits]


def in_bytes(n):
    """'39.6 GB' of a number of bytes."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n < 1000 or unit == "TB":
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000


def git_commit():
    """The repository's commit, or None outside git."""
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:  # no git here
        return None


# --- scores ------------------------------------------------------------------------------------------------------


def save_scores(folder, image_ids, arrays, config):
    """Write `arrays` {file stem: (N, ...)} as float32 beside image_ids.npy and config.json (DESIGN section 3).

    Scores that are there already stay until the disk has taken all of the new ones.
    """
    files = {folder / "config.json": write_json(config),  # in place last: it says whose scores these are
             folder / "image_ids.npy": write_npy(np.asarray(image_ids, np.int64))}
    for stem, array in arrays.items():
        assert len(array) == len(image_ids), f"{stem}: {len(array)} rows for {len(image_ids)} ids"
        files[folder / f"{stem}.npy"] = write_npy(np.asarray(array, np.float32))
    save_together(files)


def load_scores(folder, stem="nsdgeneral"):
    """Read (image_ids (N,), scores (N, ...) mapped from the file, so that memory does not grow with N).

    Ids must be ascending and match the rows, values finite: UserError otherwise.
    """
    hint = "run the score stage (bash scripts/score.sh)"
    scores = load_npy(folder / f"{stem}.npy", "scores", hint, mmap_mode="r")
    ids = load_npy(folder / "image_ids.npy", "the scores' image ids", hint)
    if scores.ndim < 2 or scores.dtype.kind != "f" or not scores.size:
        raise UserError(f"{folder / stem}.npy: {scores.dtype} of shape {scores.shape}, wanted float (images, ...); "
                        f"{hint} with --overwrite")
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min(initial=0) < 0:
        raise UserError(f"{folder}/image_ids.npy: {ids.dtype} of shape {ids.shape} from {ids.min(initial=0)}, wanted "
                        f"0-based 73k ids (images,); {hint} with --overwrite")
    if len(ids) != len(scores) or np.any(np.diff(ids) <= 0):
        raise UserError(f"{folder}: {len(scores)} score rows for {len(ids)} ids (wanted: as many, ascending); {hint}")
    for row, values in enumerate(scores):
        if not np.isfinite(values).all():
            raise UserError(f"{folder / stem}.npy: NaN or infinite values in row {row} (image id {ids[row]}), wanted "
                            "finite scores; check the training (train_logs/<run>/metrics.jsonl), then score with "
                            "--overwrite")
    return ids, scores


# --- checkpoints -------------------------------------------------------------------------------------------------


def save_checkpoint(path, state):
    """Write a checkpoint (tensors and JSON types only) atomically: the old file stays whole until the new one is."""
    try:
        with atomic_path(path) as temporary:
            torch.save({"format": CHECKPOINT_FORMAT, **state}, temporary)
    except RuntimeError as error:  # torch's word for a disk that takes no more
        raise UserError(f"{path}: could not be written ({str(error).splitlines()[0]}); the previous checkpoint is "
                        "intact: make room on the disk, then run the same command again") from error


def load_checkpoint(path, what="checkpoint", hint="train it first (bash scripts/train.sh)", keys=RUN_KEYS):
    """Read a checkpoint with weights_only=True; missing, damaged or foreign files raise UserError, as do those that
    lack one of `keys`."""
    require(path, what, hint)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many types for damaged files
        first_line = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable {what} ({first_line}); delete it and {hint}") from None
    if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise UserError(f"{path}: {what} of format {found}, wanted {CHECKPOINT_FORMAT}; {hint}")
    lacking = [key for key in keys if key not in state]
    if lacking:
        raise UserError(f"{path}: {what} without {', '.join(lacking)}, wanted {', '.join(keys)}; delete it and {hint}")
    return state


# --- seeds and devices -------------------------------------------------------------------------------------------


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def derive_seed(*parts):
    """One 63-bit seed from several integers, e.g. (seed, epoch, rank) or (seed, image_id, sample)."""
    return int(np.random.SeedSequence([int(part) for part in parts]).generate_state(1, np.uint64)[0] >> 1)


def reproducible_products():
    """Let MKL (PyTorch's on x86) add up in an order that does not depend on the number of threads.

    MKL reads this at its first matrix product, so it is called before any. What the environment says goes first.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def pick_device(name="auto"):
    """torch.device for 'auto' (CUDA where there is one), 'cpu', 'cuda', 'cuda:1', ..."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: no CUDA device is visible; use --device cpu or check nvidia-smi")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: not a device ({str(error).splitlines()[0]}); wanted auto, cpu, cuda or "
                        "cuda:1") from None


# --- tracking ----------------------------------------------------------------------------------------------------


def check_tracking(wandb_log):
    """Raise UserError, before any work, when --wandb_log can not log in."""
    if wandb_log and os.environ.get("WANDB_MODE") not in ("offline", "disabled", "dryrun"):
        import wandb

        if not wandb.login(prompt=False, verify=False):
            raise UserError("--wandb_log: not logged in to W&B; run `wandb login`, or set WANDB_MODE=offline")


def load_rows(file):
    """The rows of a metrics.jsonl, {"step": int, name: float}; one that a full disk or a kill left half ends them."""
    for line in file.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            return
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            return
        yield row


class Tracker:
    """Metrics to metrics.jsonl in the run folder, and to W&B when asked; scripts never ask which.

    W&B that fails, in the middle of a run too, costs its plots and not the run.
    """

    def __init__(self, folder, name, config, wandb_log=False, wandb_project="neuraldiffuser", resume_after=None):
        """resume_after: keep the rows of metrics.jsonl up to that step; None starts the file anew."""
        check_tracking(wandb_log)
        self.file = Path(folder) / "metrics.jsonl"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.file) as temporary:
            temporary.write_text("".join(self._rows_until(resume_after)))
        self.wandb_run = None
        if wandb_log:
            import wandb

            try:
                self.wandb_run = wandb.init(project=wandb_project, id=name, name=name, config=config,
                                            resume="allow" if resume_after else None, dir=str(folder),
                                            settings=wandb.Settings(init_timeout=120, finish_timeout=300))
            except wandb.Error as error:
                raise UserError(f"--wandb_log: W&B could not start ({str(error).splitlines()[0]}); run `wandb login "
                                "--relogin`, or set WANDB_MODE=offline") from None

    def _rows_until(self, step):
        """The lines of metrics.jsonl up to a step."""
        if step is not None and self.file.exists():
            yield from (json.dumps(row) + "\n" for row in load_rows(self.file) if row["step"] <= step)

    def log(self, metrics, step):
        """Append one row of scalars."""
        try:
            with open(self.file, "a") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
        except OSError as error:
            raise UserError(f"{self.file}: could not be written ({error.strerror}); the last checkpoint is intact: "
                            "make room and use --resume") from None
        self._to_wandb(lambda run: run.log(metrics, step=step))

    def log_images(self, key, images, captions, step=None):
        """Images: list of (H, W, 3) uint8 arrays or PIL images; only W&B keeps them, the files are on disk anyway."""
        def send(run):
            import wandb

            pictures = [wandb.Image(image, caption=text) for image, text in zip(images, captions, strict=True)]
            run.log({key: pictures}, step=step)

        self._to_wandb(send)

    def log_table(self, key, rows, step=None):
        """A table of equal-keyed dicts, for W&B only."""
        def send(run):
            import wandb

            columns = list(rows[0])
            run.log({key: wandb.Table(columns, [[row[name] for name in columns] for row in rows])}, step=step)

        self._to_wandb(send)

    def finish(self):
        self._to_wandb(lambda run: run.finish())

    def _to_wandb(self, send):
        if self.wandb_run is None:
            return
        try:
            send(self.wandb_run)
        except Exception as error:  # whatever W&B raises when its service or the network dies
            print(f"warning: W&B stopped ({error}); going on without it, {self.file} has every value", file=sys.stderr)
            self.wandb_run = None
