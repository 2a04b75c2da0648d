"""Metrics of a run: metrics.jsonl in its folder, and W&B when asked (docs/wandb.md)."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import numpy as np

from disk.files import atomic_path
from utils import UserError

OFFLINE = ("offline", "dryrun")  # values of WANDB_MODE that keep runs on this disk
POINTS = 1000  # of a curve over a training's steps, at most: each costs half a millisecond
AT_ONCE = 20  # points whose scalars are fetched from the device together
THUMBNAIL = 128  # pixels: the longer side of a picture in a table
FOLDERS = ("train_logs", "scores_all", "outputs_all")  # what the lineage shows lies in one of these


def check_tracking(wandb_log):
    """Raise UserError, before any work, when --wandb_log cannot log in."""
    if wandb_log and os.environ.get("WANDB_MODE") not in (*OFFLINE, "disabled"):
        import wandb

        if not wandb.login(prompt=False, verify=False):
            raise UserError("--wandb_log: not logged in to W&B; run `wandb login`, or set WANDB_MODE=offline")


def load_rows(file):
    """Yield the rows of a metrics.jsonl, {"step": int, name: float}, up to one that a full disk or a kill cut off."""
    for line in file.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            return
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            return
        yield row


class Dashboard:
    """A run on W&B where one is asked for, else nothing; scripts never ask which.

    If W&B fails, even in the middle of a run, its plots are lost and not the run.
    """

    def __init__(self, folder, name, config, asked, resume=False):
        """asked: settings.Wandb; resume: go on with W&B's run of this name, where it has one."""
        check_tracking(asked.log)
        self.upload, self.wandb_run = asked.upload, None
        self.every = 1  # so many steps one is shown
        self.steps, self.fetched = [], Fetched([])  # scalars of the latest ones; of those before, on their way here
        if asked.log:
            import wandb

            Path(folder).mkdir(parents=True, exist_ok=True)
            try:
                self.wandb_run = wandb.init(project=asked.project, id=name, name=name, config=config, group=asked.group,
                                            job_type=asked.job_type, tags=asked.tags,
                                            resume="allow" if resume else None, dir=str(folder),
                                            settings=wandb.Settings(init_timeout=120, finish_timeout=300,
                                                                    silent=os.environ.get("WANDB_MODE") in OFFLINE))
            except wandb.Error as error:
                raise UserError(f"--wandb_log: W&B could not start ({str(error).splitlines()[0]}); run `wandb login "
                                "--relogin`, or set WANDB_MODE=offline") from None
        self._to_wandb(name_axes)

    def log(self, values):
        """Show scalars {key: value} that belong to no step."""
        self._to_wandb(lambda run: run.log(values))

    def log_step(self, metrics, step):
        """Show scalars of a training step, as step/...: numbers, or tensors (), which nothing waits for. Of a long
        training only some steps are shown."""
        if self.wandb_run is None or step % self.every:
            return
        self.steps.append({"step": step} | {f"step/{name}": value for name, value in metrics.items()})
        if len(self.steps) == AT_ONCE:
            self._send_steps()

    def log_epoch(self, metrics, epoch):
        """Show scalars of an epoch."""
        self._send_all_steps()
        self.log({"epoch": epoch, **metrics})

    def log_images(self, key, images, captions):
        """Show images, (H, W, 3) uint8 arrays or PIL's."""
        def send(run):
            import wandb

            run.log({key: [wandb.Image(image, caption=text) for image, text in zip(images, captions, strict=True)]})

        self._to_wandb(send)

    def log_table(self, key, rows):
        """Show a table of equal-keyed dicts, an iterable that is only read for W&B; pictures in it become small."""
        def send(run):
            import wandb

            cells = [{name: cell_of(value) for name, value in row.items()} for row in rows]
            run.log({key: wandb.Table(list(cells[0]), [list(row.values()) for row in cells])})

        self._to_wandb(send)

    def uses(self, kind, file, digest):
        """Show that this run reads a file: what `makes` has shown of it, or will.

        kind: checkpoint, scores, pictures or evaluation; digest: what tells its content from another one in its place,
        or a function of the file that finds that out.
        """
        # not use_artifact(), which refuses to work offline, and online waits; this is what it does beside that
        self._to_wandb(lambda run: run._log_artifact(reference_to(kind, file, digest), is_user_created=True,
                                                     use_after_commit=True))

    def makes(self, kind, file, digest, files=()):
        """Show that this run wrote a file; arguments as `uses` takes them. With --wandb_upload it is sent, too, or the
        `files` that it stands for."""
        def send(run):
            import wandb

            artifact = reference_to(kind, file, digest)
            run.log_artifact(artifact)
            if self.upload:  # as another artifact: whoever uses the first need not know whether it was sent
                content = wandb.Artifact(f"{artifact.name}-files", f"{kind}-files", metadata=artifact.metadata)
                for path in files or [file]:
                    content.add_file(str(path), policy="immutable")  # not copied first
                run.log_artifact(content)

        self._to_wandb(send)

    def finish(self):
        """Send what is left to W&B; where it is offline, print the command that sends the run's folder later."""
        self._send_all_steps()
        self._to_wandb(lambda run: run.finish())
        if self.wandb_run is not None and self.wandb_run.settings.mode in OFFLINE:
            command = [sys.executable, "-m", "wandb", "sync", self.wandb_run.settings.sync_dir]  # not on PATH, too
            print(f"W&B (offline); to send this run: {shlex.join(command)}")

    def _send_steps(self):
        """Log the steps that were fetched before, and fetch the scalars of those since."""
        before, self.fetched, self.steps = self.fetched, Fetched(self.steps), []
        for row in before.rows():
            self.log(row)

    def _send_all_steps(self):
        self._send_steps()
        self._send_steps()

    def _to_wandb(self, send):
        if self.wandb_run is None:
            return
        try:
            send(self.wandb_run)
        except Exception as error:  # W&B raises many types when its service or the network fails
            print(f"warning: W&B failed ({error}); continuing without it, only its plots are lost", file=sys.stderr)
            self.wandb_run = None


class Tracker(Dashboard):
    """The dashboard of a training, whose epochs are kept in metrics.jsonl in its folder too."""

    def __init__(self, folder, name, config, asked, epoch=0, resumed=False, n_steps=0, lines=None):
        """asked: settings.Wandb. epoch: keep the rows of metrics.jsonl up to it; resumed: go on with W&B's run, too.
        n_steps: of the whole training. lines: constants {key: value} that W&B draws beside an epoch's values."""
        super().__init__(folder, name, config, asked, resume=resumed)
        self.every, self.lines = max(1, -(-n_steps // POINTS)), lines or {}
        self.file = Path(folder) / "metrics.jsonl"
        with atomic_path(self.file) as temporary:
            temporary.write_text("".join(self._rows_until(epoch)))

    def _rows_until(self, epoch):
        """Yield the lines of metrics.jsonl up to an epoch."""
        if self.file.exists():
            yield from (json.dumps(row) + "\n" for row in load_rows(self.file) if row["step"] <= epoch)

    def log_epoch(self, metrics, epoch):
        """Append one row of scalars; its "step" is the epoch."""
        try:
            with open(self.file, "a") as file:
                file.write(json.dumps({"step": epoch, **metrics}) + "\n")
        except OSError as error:
            kept = "the last checkpoint is intact: " if (self.file.parent / "last.pth").exists() else ""
            raise UserError(f"{self.file}: could not be written ({error.strerror}); {kept}make room, then run the same "
                            "command again with --resume") from None
        super().log_epoch(metrics | self.lines, epoch)


class Fetched:
    """Scalars of some steps, on their way to main memory: nothing waits for a GPU until they are read."""

    def __init__(self, steps):
        """steps: [{name: number, or tensor ()}]."""
        self.steps, self.values, self.arrived = steps, None, None
        scalars = [value.float() for step in steps for value in step.values() if not isinstance(value, int | float)]
        if scalars:
            import torch  # takes seconds, which those who show no steps do without

            self.values = torch.stack(scalars).to("cpu", non_blocking=True)
            if scalars[0].is_cuda:
                self.arrived = torch.cuda.Event()
                self.arrived.record()

    def rows(self):
        """Return the steps with numbers for tensors."""
        if self.arrived is not None:
            self.arrived.synchronize()
        values = iter([] if self.values is None else self.values.tolist())
        return [{name: value if isinstance(value, int | float) else next(values) for name, value in step.items()}
                for step in self.steps]


def name_axes(run):
    """Tell W&B what is plotted against what."""
    for keys, axis in (("step/*", "step"), ("train/*", "epoch"), ("val/*", "epoch")):
        run.define_metric(keys, step_metric=axis)


def reference_to(kind, file, digest):
    """Make the artifact that stands for a file: where it lies, and its hash. W&B takes those that have the same name,
    place and hash for one."""
    import wandb

    digest = digest(file) if callable(digest) else digest
    artifact = wandb.Artifact(artifact_name(file), kind, metadata={"hash": digest, "file": str(file)})
    # the hash is part of the entry's name, since W&B looks at nothing else of a file that it is not to read
    artifact.add_reference(Path(file).resolve().as_uri(), name=f"{digest}/{file.name}", checksum=False)
    return artifact


def artifact_name(file):
    """train_logs/<run>/last.pth -> <run>-last.pth; of a file that lies in none of FOLDERS its last three parts."""
    parts = Path(file).parts
    start = max((i + 1 for i, part in enumerate(parts) if part in FOLDERS), default=-3)
    return re.sub(r"[^\w.-]", "_", "-".join(parts[start:]), flags=re.ASCII)[-128:]  # what W&B takes


def cell_of(value):
    """Make what a table of W&B's shows of a value: of an (H, W, 3) uint8 array a small picture."""
    if not isinstance(value, np.ndarray):
        return value
    import wandb
    from PIL import Image

    picture = Image.fromarray(value)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return wandb.Image(picture, file_type="jpg")
