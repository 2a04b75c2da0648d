"""Metrics of a run: metrics.jsonl in its folder, and W&B when asked."""

import json
import os
import shlex
import sys
from pathlib import Path

from disk.files import atomic_path
from utils import UserError

OFFLINE = ("offline", "dryrun")  # values of WANDB_MODE that keep runs on this disk


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


class Tracker:
    """Metrics to metrics.jsonl in the run folder, and to W&B when asked; scripts never ask which.

    If W&B fails, even in the middle of a run, its plots are lost and not the run.
    """

    def __init__(self, folder, name, config, wandb_log=False, wandb_project="neuraldiffuser", resume_after=None):
        """resume_after: keep the rows of metrics.jsonl up to that step; None: start the file over."""
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
                                            settings=wandb.Settings(init_timeout=120, finish_timeout=300,
                                                                    silent=os.environ.get("WANDB_MODE") in OFFLINE))
            except wandb.Error as error:
                raise UserError(f"--wandb_log: W&B could not start ({str(error).splitlines()[0]}); run `wandb login "
                                "--relogin`, or set WANDB_MODE=offline") from None

    def _rows_until(self, step):
        """Yield the lines of metrics.jsonl up to a step."""
        if step is not None and self.file.exists():
            yield from (json.dumps(row) + "\n" for row in load_rows(self.file) if row["step"] <= step)

    def log(self, metrics, step):
        """Append one row of scalars."""
        try:
            with open(self.file, "a") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
        except OSError as error:
            kept = "the last checkpoint is intact: " if (self.file.parent / "last.pth").exists() else ""
            raise UserError(f"{self.file}: could not be written ({error.strerror}); {kept}make room, then run the same "
                            "command again with --resume") from None
        self._to_wandb(lambda run: run.log(metrics, step=step))

    def log_images(self, key, images, captions, step=None):
        """Show images, (H, W, 3) uint8 arrays or PIL's; only W&B keeps them, the files are on disk anyway."""
        def send(run):
            import wandb

            pictures = [wandb.Image(image, caption=text) for image, text in zip(images, captions, strict=True)]
            run.log({key: pictures}, step=step)

        self._to_wandb(send)

    def log_table(self, key, rows, step=None):
        """Show a table of equal-keyed dicts, for W&B only."""
        def send(run):
            import wandb

            columns = list(rows[0])
            run.log({key: wandb.Table(columns, [[row[name] for name in columns] for row in rows])}, step=step)

        self._to_wandb(send)

    def finish(self):
        """Send what is left to W&B; where it is offline, print the command that sends the run's folder later."""
        self._to_wandb(lambda run: run.finish())
        if self.wandb_run is not None and self.wandb_run.settings.mode in OFFLINE:
            command = [sys.executable, "-m", "wandb", "sync", self.wandb_run.settings.sync_dir]  # not on PATH, too
            print(f"W&B (offline); to send this run: {shlex.join(command)}")

    def _to_wandb(self, send):
        if self.wandb_run is None:
            return
        try:
            send(self.wandb_run)
        except Exception as error:  # W&B raises many types when its service or the network fails
            print(f"warning: W&B failed ({error}); continuing without it, {self.file} has every value", file=sys.stderr)
            self.wandb_run = None
