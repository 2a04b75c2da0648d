"""Checkpoints, scores and pictures that are damaged, foreign or hostile: one line that says what to do, no change."""

import shutil

import numpy as np
import torch

import convert_gnet
import evaluate
import recon
import score_c
import score_gnet
import score_z
import train_c
import train_gnet
from damages import (
    Program,
    a_folder_at,
    both,
    checkpoint,
    cut,
    hostile_checkpoint,
    hostile_npy,
    index,
    js,
    npy,
    of_published,
    put,
    text,
    whole,
    without,
)
from tiny_brain import RUN as GNET
from tiny_nsd import SHARED
from whole_world import (
    DATA,
    IMAGES,
    NEW,
    RUN_C,
    RUN_Z,
    SCORES_C,
    SCORES_G,
    STIM,
    STIMULUS_FILE,
    assert_refused,
    mistakes,
)

CASES = [  # script, what is broken, how, flags, words of the line: flag or file, found, wanted or what to do
    # checkpoints
    (score_c, "no run", whole, ["--tag", "none"], ("--tag", "not found", "train it first")),
    (score_c, "checkpoint cut", cut(f"{RUN_C}/last.pth", 3000), [], ("last.pth", "not a readable", "train it")),
    (score_c, "checkpoint empty", cut(f"{RUN_C}/last.pth", 0), [], ("last.pth", "not a readable", "train it")),
    (score_c, "checkpoint with a program", hostile_checkpoint(f"{RUN_C}/last.pth"), [], ("last.pth", "not a readable")),
    (score_c, "checkpoint of another format", checkpoint(f"{RUN_C}/last.pth", lambda s: {"state_dict": s["model"]}),
     [], ("last.pth", "format None", "wanted 2", "train it")),
    (score_c, "a tensor for a checkpoint", checkpoint(f"{RUN_C}/last.pth", lambda s: torch.zeros(3)), [],
     ("last.pth", "format Tensor", "wanted 2")),
    (score_c, "checkpoint without its sizes", checkpoint(f"{RUN_C}/last.pth", lambda s: s.pop("model_args") and None),
     [], ("last.pth", "model_args", "train it")),
    (score_c, "checkpoint lacks weights", checkpoint(f"{RUN_C}/last.pth", lambda s: s["model"].popitem() and None),
     [], ("last.pth", "weights", "train it")),
    (score_c, "checkpoint of an unknown network", checkpoint(
        f"{RUN_C}/last.pth", lambda s: s["model_args"].update(kind="other")), [], ("last.pth", "other", "train it")),
    (score_c, "checkpoint of another feature", lambda w: shutil.copy(w.root / RUN_Z / "last.pth", w.root / RUN_C),
     [], ("last.pth", "trained for z", "wanted c")),
    (score_z, "statistics cut", cut(f"{RUN_Z}/z_statistics_subj01_own_3sess.pth", 900), [],
     ("z_statistics_subj01_own_3sess.pth", "delete it")),
    (train_c, "run to resume is cut", cut(f"{RUN_C}/last.pth", 900), ["--tag", "", "--multisubject_ckpt", "auto"],
     (f"{RUN_C}/last.pth", "not a readable", "--overwrite")),
    (train_c, "run to resume lacks its optimizer", checkpoint(
        f"{RUN_C}/last.pth", lambda s: s.update(epoch=0)),
     ["--tag", "", "--multisubject_ckpt", "auto", "--resume"], (f"{RUN_C}/last.pth", "without optimizer", "delete it")),
    (train_c, "pretrained run cut", cut("train_logs/multisubject_subj01_ext1_c_8_mlp/last.pth", 900),
     ["--multisubject_ckpt", "auto"], ("multisubject_subj01_ext1_c_8_mlp/last.pth", "not a readable")),
    (train_c, "no pretrained run", whole, ["--multisubject_ckpt", "elsewhere"], ("--multisubject_ckpt", "not found")),
    (train_c, "pretrained run of another feature", whole, ["--multisubject_ckpt", "multisubject_subj01_ext1_g_2_8"],
     ("--multisubject_ckpt", "of g_2", "wanted c")),
    (train_c, "finished run with other flags", whole, ["--tag", "", "--multisubject_ckpt", "auto", "--dropout", 0.5],
     ("dropout 0.15 -> 0.5", "--tag", "--overwrite")),
    (train_gnet, "prefilter missing", whole, ["--prefilter", "ROOT/alexnet.pth"], ("--prefilter", "not found", "give")),
    (train_gnet, "prefilter with a program", lambda w: torch.save(Program(w.root / "executed"), w.root / "alexnet.pth"),
     ["--prefilter", "alexnet.pth"], ("--prefilter", "alexnet.pth", "wanted features.0")),  # found under the root
    (train_gnet, "prefilter is a folder", whole, ["--prefilter", "ROOT"], ("--prefilter", "wanted features.0")),
    (score_gnet, "encoding model cut", cut(f"train_logs/{GNET}/best.pth", 5000), [], ("best.pth", "not a readable")),
    (score_gnet, "encoding model with a program", hostile_checkpoint(f"train_logs/{GNET}/best.pth"), [], ("best.pth",)),
    (score_gnet, "another encoding model", whole, ["--gnet_run", RUN_C.split("/")[1]], ("--gnet_run", "pretrained")),
    (score_gnet, "no encoding model", whole, ["--gnet_run", "gnet_none"], ("--gnet_run", "gnet_none", "train one")),
    # the published GNet
    (convert_gnet, "missing", whole, [], ("gnet_multisubject.pt", "not found", "download it")),
    (convert_gnet, "cut", both(of_published(lambda p: None), cut(f"{DATA}/gnet_multisubject.pt", 999)), [],
     ("gnet_multisubject.pt", "download it")),
    (convert_gnet, "with a program", lambda w: of_published(lambda p: {**p, "x": Program(w.root / "executed")})(w), [],
     ("gnet_multisubject.pt", "wanted tensors and arrays only")),
    (convert_gnet, "lacks a key", of_published(lambda p: p.pop("val_cc") is None), [], ("no best_params", "download")),
    (convert_gnet, "a folder", whole, ["--file", "ROOT"], ("root", "download it")),
    # scores, as those who write and read them
    (score_c, "config.json is not JSON", text(f"{SCORES_C}/config.json", "{"), ["--no-overwrite"],
     ("config.json", "JSON")),
    (score_c, "config.json is a list", text(f"{SCORES_C}/config.json", "[]"), ["--no-overwrite"],
     ("config.json", "list")),
    (score_gnet, "other responses", whole, ["--no-overwrite", "--ids", "1", "--outdir", f"scores_all/subj01/{GNET}"],
     ("other images", "--overwrite", "--outdir")),
    (recon, "scores missing", without(SCORES_C), [], ("nsdgeneral.npy", "not found", "scripts/score.sh")),
    (recon, "scores cut", cut(f"{SCORES_C}/nsdgeneral.npy", -8), [], ("nsdgeneral.npy", "not a readable", "score")),
    (recon, "scores with a program", hostile_npy(f"{SCORES_C}/nsdgeneral.npy"), [], ("nsdgeneral.npy", "score stage")),
    (recon, "ids with a program", hostile_npy(f"{SCORES_C}/image_ids.npy"), [], ("image_ids.npy", "score stage")),
    (recon, "scores of words", npy(f"{SCORES_C}/nsdgeneral.npy", lambda x: x.astype(str)), [], ("nsdgeneral", "<U")),
    (recon, "scores of one number", npy(f"{SCORES_C}/nsdgeneral.npy", lambda x: np.float32(1)), [], ("score stage",)),
    (recon, "scores of no image", both(*(npy(f"{SCORES_C}/{name}.npy", lambda x: x[:0])
                                         for name in ("nsdgeneral", "image_ids"))), [], (SCORES_C, "score stage")),
    (recon, "an archive for scores", lambda w: np.savez(open(w.root / SCORES_C / "nsdgeneral.npy", "wb"), x=[1]), [],
     ("nsdgeneral.npy", "score stage")),
    (recon, "ids not ascending", npy(f"{SCORES_C}/image_ids.npy", lambda x: x[::-1]), [], (SCORES_C, "ascending")),
    (recon, "ids doubled", npy(f"{SCORES_C}/image_ids.npy", lambda x: put(x, 1, x[0])), [], (SCORES_C, "ascending")),
    (recon, "ids of fractions", npy(f"{SCORES_C}/image_ids.npy", lambda x: x + 0.5), [], ("image_ids", "float64")),
    (recon, "ids negative", npy(f"{SCORES_C}/image_ids.npy", lambda x: x - 5), [], ("image_ids", "-2", "score stage")),
    (recon, "fewer scores than ids", npy(f"{SCORES_C}/nsdgeneral.npy", lambda x: x[:3]), [], ("3 score rows", "4 ids")),
    (recon, "scores NaN", npy(f"{SCORES_G}/nsdgeneral.npy", lambda x: put(x, 2, np.nan)), [],
     ("NaN", "row 2", "score")),
    (recon, "scores of other ids", npy(f"{SCORES_G}/image_ids.npy", lambda x: x + 1), [],
     ("image_ids.npy", "the same")),
    (recon, "c of another width", npy(f"{SCORES_C}/nsdgeneral.npy", lambda x: x[..., 1:]), NEW, ("15", "16", "use")),
    (recon, "g of another width", npy(f"{SCORES_G}/nsdgeneral.npy", lambda x: x[..., 1:]), NEW, ("11", "12", "use")),
    (recon, "z of another shape", lambda w: (np.save(w.root / "z.npy", np.zeros((4, 3, 8, 8), np.float32)), np.save(
        w.root / "image_ids.npy", SHARED)), ["--overwrite", "--z", "ROOT/z.npy"], ("--z", "(3, 8, 8)", "(4, h, w)")),
    # the folder of pictures, as recon and evaluate read it
    (recon, "config.json is not JSON", text(f"{IMAGES}/config.json", "{"), ["--limit", 1],
     ("config.json", "not valid")),
    (recon, "config.json is a list", text(f"{IMAGES}/config.json", "[1]"), [], ("config.json", "list", "object")),
    (recon, "config.json is no text", text(f"{IMAGES}/config.json", b"\xff\xfe\x00"), [], ("config.json", "not valid")),
    (recon, "config.json is a folder", a_folder_at(f"{IMAGES}/config.json"), [], ("config.json", "directory")),
    (recon, "other settings", whole, ["--seed", 1], ("seed 42 -> 1", "--overwrite")),
    (evaluate, "config.json is not JSON", text(f"{IMAGES}/config.json", "{"), [], ("config.json", "not valid JSON")),
    (evaluate, "config.json is a list", text(f"{IMAGES}/config.json", "[1]"), [], ("config.json", "list", "object")),
    (evaluate, "config.json leads elsewhere", js(f"{IMAGES}/config.json", tag="/../../../.."), [],
     ("config.json", "tag", "/../../../..")),
    (evaluate, "config.json of no subject", js(f"{IMAGES}/config.json", subj="../subj01"), [], ("config.json", "subj")),
    (evaluate, "config.json of a foreign run", js(f"{IMAGES}/config.json", run="../x"), [], ("config.json", "run")),
    (evaluate, "config.json of a foreign layer", js(f"{IMAGES}/config.json", feats=["../x"]), [], ("config", "feats")),
    (evaluate, "config.json of a number for layers", js(f"{IMAGES}/config.json", feats=3), [],
     ("config.json", "feats", "3")),
    (evaluate, "config.json of a word for a size", js(f"{IMAGES}/config.json", hidden_dim="../x"), [],
     ("config.json", "hidden_dim", "'../x'", "a number")),
    (evaluate, "index.csv missing", without(f"{IMAGES}/index.csv"), ["--images", IMAGES], ("index.csv", "recon.sh")),
    (evaluate, "index.csv leads outside", index("00001.png", "../../outside.png"), [],
     ("index.csv", "'../../outside.png'", "run recon again")),
    (evaluate, "index.csv leads to a root", index("00001.png", "/tmp/00001.png"), [],
     ("index.csv", "'/tmp/00001.png'")),
    (evaluate, "index.csv without columns", text(f"{IMAGES}/index.csv", "a,b\n1,2\n"), [], ("index.csv", "image_id")),
    (evaluate, "index.csv is binary", text(f"{IMAGES}/index.csv", b"\xff\x00\xfe"), [], ("index.csv", "recon")),
    (evaluate, "index.csv with a short line", index(",00001.png,0,42", ""), [], ("index.csv", "run recon again")),
    (evaluate, "index.csv of words", index("1,5,00001", "one,5,00001"), [], ("index.csv", "'one'", "recon")),
    (evaluate, "picture missing", without(f"{IMAGES}/00002.png"), [], ("00002.png", "not found", "run recon again")),
    (evaluate, "picture cut", cut(f"{IMAGES}/00002.png", 60), [], ("00002.png", "not a readable", "recon")),
    (evaluate, "picture is text", text(f"{IMAGES}/00002.png", "png"), [], ("00002.png", "not a readable", "recon")),
    (evaluate, "ids of no stimulus", index(",5,", ",500,"), [], ("index.csv", "500", "0..23")),
    (evaluate, "retrieval with a program", hostile_npy(f"{SCORES_C}/retrieval.npy"), [], ("retrieval.npy",)),
    (evaluate, "stimuli missing", without(STIM), [], (STIMULUS_FILE, "not found", "--root")),
    (evaluate, "images nowhere", whole, ["--images", "nowhere"], ("--images nowhere", "not found", IMAGES)),
    (evaluate, "compared nowhere", whole, ["--compare", "x=nowhere"], ("--compare x=nowhere", "not found", IMAGES)),
    (evaluate, "weights nowhere", whole, ["--weights_dir", "/nowhere"], ("--weights_dir", "/nowhere", "check")),
    (evaluate, "CLIP nowhere", whole, ["--eval_clip", "ROOT"], ("--eval_clip", "not a CLIP", "give")),
]


@mistakes(CASES)
def test_a_mistake_gives_one_line_and_changes_nothing(case, whole_world, monkeypatch, capsys):
    assert_refused(case, whole_world, monkeypatch, capsys)
