"""One small world taken through training, scores, pictures and evaluation, for tests that break it.

It is built once, and each process has a copy. What a test damages is put back after it, file by file.
"""

import os
import re
import shutil
import stat
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import convert_gnet
import evaluate
import map_brain
import recon
import score_c
import score_g
import score_gnet
import score_z
import train_adapter
import train_c
import train_g
import train_gnet
import train_z
import utils
from tiny_brain import write_brain
from tiny_runs import write_features
from tiny_sd import LATENT, TOKENS, WIDTH

SHAPES = {"c": (TOKENS, WIDTH), "g_2": (5, 12), "g_12": (5, 12), "z": (4, LATENT, LATENT)}
LOOP = ["--num_workers", 0, "--val_fraction", 0.3, "--num_epochs", 1, "--num_sessions", 3, "--device", "cpu"]
NETWORK = [*LOOP, "--model", "mindeye2", "--hidden_dim", 8, "--n_blocks", 1, "--prior_depth", 1, "--batch_size", 6]
SCORED = ["--hidden_dim", 8, "--num_sessions", 3, "--device", "cpu"]
SMALL_Z, SMALL_GNET = ["--decoder_channels", 32, 32, 32], ["--trunk_width", 4, "--pass_through", 4, "--batch_size", 4]
# what is given to every script before the flags of a case; --tag new: a training that has no folder yet
FLAGS = {
    train_c: [*NETWORK, "--tag", "new"],
    train_g: [*NETWORK, "--feat", "g_2", "--tag", "new"],
    train_z: [*NETWORK, *SMALL_Z, "--tag", "new"],
    train_gnet: [*LOOP, *SMALL_GNET, "--tag", "new"],
    train_adapter: [*LOOP, "--feats", "g_2", "--sd_model", "SD", "--batch_size", 4, "--tag", "new"],
    score_c: [*SCORED, "--overwrite"],
    score_g: [*SCORED, "--feat", "g_2", "--overwrite"],
    score_z: [*SCORED, "--overwrite"],
    score_gnet: ["--device", "cpu", "--overwrite"],
    recon: [*SCORED, "--sd_model", "SD", "--clip_model", "CLIP", "--feats", "g_2", "--guidance_decoder", "full",
            "--num_inference_steps", 2, "--guidance_rule", "raw", "--guidance_scale", 300, "--guidance_strength", 0.5],
    evaluate: [*SCORED, "--eval_clip", "none", "--no-controls", "--guidance_scale", 300, "--guidance_strength", 0.5],
    convert_gnet: [],
    map_brain: [*SCORED, "--feats", "c"],
}
NEW = ["--method", "new"]  # pictures that have no folder yet
DATA, STIMULI, STIMULUS_FILE = "MindEyeV2/mindeyev2", "nsddata_stimuli/stimuli/nsd", "nsd_stimuli.hdf5"
C, Z, STIM = (f"{STIMULI}/{name}" for name in ("c_all.hdf5", "z_all.hdf5", STIMULUS_FILE))
BETAS, SHARDS = f"{DATA}/betas_all_subj01_fp32_renorm.hdf5", f"{DATA}/wds/subj01"
RUN_C = "train_logs/pretrained_subj01_3sess_ext1_c_8_mlp"
RUN_Z = "train_logs/pretrained_subj01_3sess_ext1_z_8"
SCORES_C = "scores_all/subj01/pretrained_subj01_3sess_ext1_c_8_mlp"
SCORES_G = "scores_all/subj01/pretrained_subj01_3sess_ext1_g_2_8/Linear-2"
IMAGES = "outputs_all/subj01/cp_4096_v1/300/0.5"
# scripts that had work to do before the disk was full leave what they had done: these names, new or longer
BEGUN = {
    "train_c-disk full": ("config.json", "log.txt", "metrics.jsonl"),
    "train_c-disk full at the start": ("log.txt",),
    "train_c-betas NaN": ("config.json", "log.txt", "metrics.jsonl"),  # found where they are read, in the first epoch
    "recon-disk full": ("config.json", "00001.png", "00002.png", "00003.png"),  # by other threads
}


def build(root, models):
    """Take a small world through the whole pipeline."""
    paths = write_brain(root)
    write_features(paths, SHAPES)
    for script in (train_c, train_g, train_z):
        assert run(script, root, models, "--tag", "", "--multi_subject") == 0
        assert run(script, root, models, "--tag", "", "--multisubject_ckpt", "auto") == 0
    for folder in (root / "train_logs").glob("multisubject*_z_*"):  # large, and read no more
        shutil.rmtree(folder)
    for script in (score_c, score_g, score_z, score_gnet, recon, evaluate):
        assert run(script, root, models) == 0


def run(script, root, models, *flags):
    """Exit status of a script on a world, whether it parsed its flags or not."""
    words = [str(word).replace("ROOT", str(root)) for word in ("--root", root, *FLAGS[script], *flags)]
    words = [str(models[("SD", "CLIP").index(word)]) if word in ("SD", "CLIP") else word for word in words]
    try:
        return utils.run_cli(script.main, words)
    except SystemExit as stop:
        return stop.code


class World:
    """A copy of the whole world at `original`, for scripts to run in and tests to break."""

    def __init__(self, original, root, models):
        self.original, self.root, self.models = original, root, models
        shutil.copytree(original, root)
        self.whole, self.put_back = self.stamps(), set()

    def run(self, script, *flags):
        return run(script, self.root, self.models, *flags)

    def stamps(self):
        """{path: which file it is and when it last changed (no program can set that back); of a folder None}."""
        found = {}
        for folder, folders, files in os.walk(self.root):
            for path in (Path(folder, name) for name in (*folders, *files)):
                status = path.lstat()
                found[path.relative_to(self.root)] = None if stat.S_ISDIR(status.st_mode) else (
                    status.st_ino, status.st_size, status.st_ctime_ns)
        return found

    def look(self):
        """Stamps, and the content of each file that is not as it was when all was whole.

        What was put back a moment ago is read, too: the clock of a file system ticks a few hundred times a second.
        """
        stamps = self.stamps()
        return stamps, {path: content_of(self.root / path) for path, stamp in stamps.items()
                        if stamp and (path in self.put_back or stamp != self.whole.get(path))}

    def differences(self, before, after):
        """Paths of what is there in one look but not in the other, or has another content.

        The cache of the shards is left out: any reader renews it. That a file names this world's own folder where it
        named the original's is no difference.
        """
        def content(path, look):
            stamps, contents = look
            if stamps.get(path) is None:
                return "a folder" if path in stamps else "nothing"
            found = contents[path] if path in contents else content_of(self.original / path)
            return found.replace(os.fsencode(self.root), os.fsencode(self.original))

        known = {path for path in before[0].keys() & after[0].keys()
                 if before[0][path] == after[0][path] and path not in before[1]}
        return [path for path in (before[0].keys() | after[0].keys()) - known
                if path.name != ".behaviour.npz" and content(path, before) != content(path, after)]

    def restore(self):
        """Put back what is not as it was."""
        now = self.stamps()
        for path in sorted(now, reverse=True):  # what lies in a folder before the folder
            if path not in self.whole or now[path] != self.whole[path]:
                (self.root / path).rmdir() if now[path] is None else (self.root / path).unlink()
        lost = [path for path in sorted(self.whole) if path not in now or now[path] != self.whole[path]]
        for path in lost:
            if self.whole[path] is None:
                (self.root / path).mkdir()
            else:
                shutil.copy2(self.original / path, self.root / path)
        if lost:
            self.whole, self.put_back = self.stamps(), set(lost)


def content_of(path):
    """Bytes of a file; of a link, where it leads."""
    return os.fsencode(path.readlink()) if path.is_symlink() else path.read_bytes()


class Case(NamedTuple):
    script: Any
    broken: str  # what is
    damage: Any  # function of the world
    flags: list
    words: tuple  # of the one line: the flag or the file, what was found, what is wanted or what to do

    def __str__(self):
        return f"{self.script.__name__}-{self.broken}"


def mistakes(cases):
    """A test for each case."""
    return pytest.mark.parametrize("case", [pytest.param(Case(*case), id=str(Case(*case))) for case in cases])


def assert_refused(case, world, monkeypatch, capsys):
    """Break a world as a case says, run its script: one line that says what to do, exit 2, and nothing changed."""
    world.patch = monkeypatch
    case.damage(world)
    before = world.look()
    status = world.run(case.script, *case.flags)
    found = capsys.readouterr()
    lines = error_lines(found.err)
    assert status == 2, found.err[-3000:]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert "Traceback" not in found.out + found.err, found
    lacking = [word for word in case.words if word not in lines[0]]
    assert not lacking, f"{lacking} not in {lines[0]}"
    monkeypatch.undo()
    after = world.look()
    allowed = BEGUN.get(str(case), ())
    changed = [str(path) for path in world.differences(before, after)
               if path in before[0] or after[0][path] is not None and path.name not in allowed]  # folders may be new
    assert not changed, changed


def error_lines(printed):
    """Lines of stderr without progress bars."""
    lines = [re.sub(r"\x1b\[.", "", line).strip() for line in re.split(r"[\r\n]+", printed)]
    return [line for line in lines if line and not re.search(r"\d+%\||\d+(batch|step|tar|image|it)? \[\d", line)]
