"""Folders and disks that refuse: one line that says what to do, and what was there is still there."""

import convert_gnet
import evaluate
import recon
import score_c
import score_gnet
import score_z
import train_c
from damages import (
    a_file_at,
    both,
    denied,
    full_disk,
    of_published,
    text,
    without,
)
from tiny_brain import RUN as GNET
from whole_world import BETAS, NEW, assert_refused, mistakes

CASES = [  # script, what is broken, how, flags, words of the line: flag or file, found, wanted or what to do
    # folders and disks that refuse
    (train_c, "train_logs is a file", a_file_at("train_logs"), [], ("train_logs", "Not a directory")),
    (train_c, "train_logs is read-only", denied("train_logs"), [], ("train_logs", "Permission denied")),
    (train_c, "disk full", full_disk("last.pth", "best.pth"), [], ("best.pth", "could not be written", "make room")),
    (train_c, "disk full at the start", full_disk("config.json"), [], ("config.json", "No space left", "make room")),
    (score_c, "scores_all is a file", a_file_at("scores_all"), [], ("scores_all", "Not a directory", "choose another")),
    (score_c, "scores_all is read-only", both(without("scores_all"), denied("scores_all")), [],
     ("scores_all", "Permission denied")),
    (score_c, "disk full", full_disk("nsdgeneral.npy"), [], ("nsdgeneral.npy", "No space left", "make room")),
    (score_c, "disk full at the end", full_disk("config.json"), [], ("config.json", "No space left", "make room")),
    (score_z, "disk full", full_disk("z_statistics*.pth"), ["--num_sessions", 3, "--seed", 1],
     ("z_statistics", "room")),
    (score_gnet, "disk full", full_disk("voxels.npy"), [], ("voxels.npy", "No space left", "make room")),
    (recon, "outputs_all is a file", a_file_at("outputs_all"), [], ("outputs_all", "Not a directory")),
    (recon, "outputs_all is read-only", denied("outputs_all"), NEW, ("outputs_all", "Permission denied")),
    (recon, "disk full", full_disk("00000.png"), NEW, ("00000.png", "No space left", "make room")),
    (recon, "disk full at the list", full_disk("index.csv"), [], ("index.csv", "No space left", "make room")),
    (recon, "outdir is a file", text("mine", ""), ["--outdir", "ROOT/mine"], ("mine", "File exists", "choose another")),
    (evaluate, "outdir is a file", text("mine", ""), ["--outdir", "mine"], ("mine", "--outdir")),
    (evaluate, "disk full", full_disk("metrics.json"), [], ("metrics.json", "No space left", "make room")),
    (evaluate, "disk full at the report", full_disk("index.html"), [], ("index.html", "No space left", "make room")),
    (evaluate, "disk full at the sheet", full_disk("contact_sheet.png"), [], ("contact_sheet", "No space left")),
    (evaluate, "disk full at the features",
     both(without("outputs_all/.features"), without(f"train_logs/{GNET}"), full_disk("pixels*.npy")),
     [], ("pixels", "No space left", "make room")),
    (evaluate, "disk full at all features", both(without("outputs_all/.features"), full_disk("*.npy")),
     [], ("voxels", "No space left", "make room")),
    (convert_gnet, "disk full", both(without(BETAS), of_published(lambda p: None), full_disk("best.pth")),
     [], ("best.pth", "could not be written", "make room")),
]


@mistakes(CASES)
def test_a_mistake_gives_one_line_and_changes_nothing(case, whole_world, monkeypatch, capsys):
    assert_refused(case, whole_world, monkeypatch, capsys)
