"""The first hour of somebody new: mistakes get the one line that mends them, and the terminal shows our lines alone."""

import io
import itertools
import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import huggingface_hub
import numpy as np
import pytest
from PIL import Image

import evaluate
import img2feat
import recon
import score_gnet
import utils
from disk import hints
from disk.files import save_csv, save_json
from disk.names import Paths, images_name, run_name, scores_name
from disk.scores import save_scores
from options import SESSIONS
from tiny_nsd import N_IMAGES, SHARED
from tiny_sd import LATENT, TOKENS, WIDTH

REPO = Path(__file__).resolve().parent.parent
SIZES = {"hidden_dim": 8, "num_sessions": 3, "tag": "", "run": "finetune", "head": None, "control": None,
         "test_split": "new_test", "repeats": "mean", "subj": "subj01"}
SHAPES = {"c": (TOKENS, WIDTH), "g_2": (5, 12), "z": (4, LATENT, LATENT)}
FLAGS = ["--hidden_dim", "8", "--num_sessions", "3"]
DRAW = ["--guidance_rule", "raw", "--guidance_decoder", "full", *FLAGS, "--feats", "g_2", "--z", "none", "--sd_model",
        "SD", "--clip_model", "CLIP"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A root with scores of c and g_2 and a set of pictures, none of which the defaults name; to be read only."""
    root = tmp_path_factory.mktemp("first_hour")
    paths = Paths(root, root)
    for flags, feat in ((SIZES, "c"), (SIZES, "g_2"), ({**SIZES, "control": "shuffle"}, "c")):
        folder = paths.scores("subj01", scores_name(flags, feat), feat)
        save_scores(folder, SHARED, {"nsdgeneral": np.ones((4, *SHAPES[feat]))}, {})
    for folder in (paths.images("subj01", "cp_4096_v1", 300, 0.5), root / "a/mine", root / "b/mine"):
        folder.mkdir(parents=True)
        rows = [{"row": row, "image_id": image_id, "file": f"{row:05d}.png", "sample": 0, "seed": 42}
                for row, image_id in enumerate(SHARED)]
        for row in rows:
            Image.new("RGB", (8, 8)).save(folder / row["file"])
        save_csv(folder / "index.csv", rows)
        save_json(folder / "config.json", SIZES)
    paths.stimuli.mkdir(parents=True)
    with h5py.File(paths.stimuli / "nsd_stimuli.hdf5", "w") as file:
        file["imgBrick"] = np.zeros((N_IMAGES, 8, 8, 3), np.uint8)
    paths.run("gnet_subj01").mkdir(parents=True)
    (paths.run("gnet_subj01") / "best.pth").touch()
    return root


C = "pretrained_subj01_3sess_ext1_c_8_mlp"
SET, OURS = "cp_4096_v1/300/0.5", ["--images", "a/mine"]
HUB = "nobody/no-such-model"
MISTAKES = [  # what went wrong, script, its flags, words of the line: what there is, what mends it
    ("no flag of the training given", recon, ["--z", "none"], f"{C} (--num_sessions 3 --hidden_dim 8)"),
    ("another width", recon, [*DRAW, "--hidden_dim", "9"], "scores of c not found; there are", f"{C} (--hidden_dim 8)"),
    ("other sessions", recon, [*DRAW, "--num_sessions", "2"], f"{C} (--num_sessions 3)"),
    ("another subject", recon, [*DRAW, "--subj", "2"], f"subj01/{C} (--subj 1)"),
    ("another stage", recon, [*DRAW, "--run", "pretrain"], f"{C} (--run finetune)"),
    ("another run's subject", recon, [*DRAW, "--run", "finetune:2"], f"{C} (--run finetune)"),
    ("a tag too many", recon, [*DRAW, "--tag", "new"], f"{C} (without --tag)"),
    ("another head", recon, [*DRAW, "--head", "adapt"], f"{C} (--head own)"),
    ("a control not scored", recon, [*DRAW, "--control", "noise"], f"{C} (without --control)", "(--control shuffle)"),
    ("the ceiling not scored", recon, [*DRAW, "--run", "ground_truth"], "or score c (SUBJ=1 FEATS=c bash "
     "scripts/score.sh --run ground_truth --num_sessions 3)"),
    ("scratch not trained", recon, [*DRAW, "--run", "scratch", "--tag", "a", "--control", "mean"],
     "or train it first (SUBJ=1 STAGES=scratch FEATS=c bash scripts/train.sh --hidden_dim 8 --num_sessions 3 --tag a), "
     "then score c (SUBJ=1 FEATS=c bash scripts/score.sh --run scratch --hidden_dim 8 --num_sessions 3 --tag a "
     "--control mean)"),
    ("another's run not trained", recon, [*DRAW, "--subj", "3", "--run", "pretrain:1", "--head", "adapt"],
     "train it first (SUBJ=1 STAGES=pretrain FEATS=c bash scripts/train.sh --hidden_dim 8), then score c (SUBJ=3 "
     "FEATS=c bash scripts/score.sh --run pretrain:1 --hidden_dim 8 --num_sessions 3 --head adapt)"),
    ("a layer not scored", recon, [*DRAW, "--feats", "g_2", "g_4"], "scores of g_4", "leave it out of --feats"),
    ("z not scored", recon, [*DRAW, "--z", "scores"], "scores of z not found", "bash scripts/score.sh", "--z none"),
    ("a folder mistyped", recon, [*DRAW, "--sd_model", "models/sd/"], "--sd_model models/sd/: no such folder", "give"),
    ("no network", recon, [*DRAW, "--sd_model", HUB], f"--sd_model {HUB}: no such folder, not in the hub's cache",
     "does not answer", "give --sd_model the folder"),
    ("CLIP not fetched", recon, [*DRAW, "--clip_model", "openai/clip-vit-base-patch32"], "--what clip)"),
    ("a layer's CLIP mistyped", img2feat, ["--feats", "g_2", "--clip_model", HUB], f"--clip_model {HUB}: no such",
     "does not answer"),
    ("z's model mistyped", img2feat, ["--feats", "z", "--sd_model", HUB], f"--sd_model {HUB}: no such folder"),
    ("another encoding model", recon, [*DRAW, "--use_gnet", "--gnet_run", "gnet_subj02"],
     "there are: gnet_subj01 (--gnet_run gnet_subj01); or train one"),
    ("responses nowhere", recon, [*DRAW, "--use_gnet", "--gnet_run", "gnet_subj01", "--target_fmri_npy", "x.npy"],
     "x.npy: --target_fmri_npy not found", "give"),
    ("another strength", evaluate, ["--guidance_strength", "0.2"], "not found",
     f"{SET} (--guidance_scale 300 --guidance_strength 0.5)"),
    ("another scale", evaluate, ["--guidance_scale", "9", "--guidance_strength", "0.5"],
     f"{SET} (--guidance_scale 300)"),
    ("another method", evaluate, ["--guidance_scale", "300", "--guidance_strength", "0.5", "--method", "mine"],
     f"{SET} (--method cp_4096_v1)", "bash scripts/recon.sh"),
    ("pictures nowhere", evaluate, ["--images", "c/mine"], "--images c/mine: not found", "bash scripts/recon.sh"),
    ("the judge not fetched", evaluate, OURS, "--eval_clip openai/clip-vit-large-patch14", "--what eval_clip)",
     "or leave it out (--eval_clip none)"),
    ("a label that is taken", evaluate, [*OURS, "--compare", "reconstructed=b/mine"], "'reconstructed'", "LABEL=DIR"),
    ("a control's label", evaluate, [*OURS, "--compare", "control: mean image=b/mine"], "measured anyway", "LABEL=DIR"),
    ("two folders of one name", evaluate, [*OURS, "--compare", "a/mine", "b/mine"], "a/mine, too", "LABEL=DIR"),
    ("the old name", evaluate, [*OURS, "--ground_truth"], "--ground_truth", "--help lists the flags"),
    ("no such encoding model", score_gnet, ["--gnet_run", "gnet"], "(--gnet_run gnet_subj01); or train one"),
]


@pytest.mark.parametrize(("script", "flags", "words"), [
    pytest.param(script, flags, words, id=f"{script.__name__}: {what}") for what, script, flags, *words in MISTAKES])
def test_a_mistake_gets_the_line_that_mends_it(world, tiny_models, monkeypatch, capsys, script, flags, words):
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *names: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody answers
    monkeypatch.setenv("NO_PROXY", "*")
    models = dict(zip(("SD", "CLIP"), map(str, tiny_models), strict=True))
    before = sorted(world.rglob("*"))
    try:
        status = utils.run_cli(script.main, ["--root", str(world), *(models.get(flag, flag) for flag in flags)])
    except SystemExit as stop:
        status = stop.code
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2 and line.startswith("error: ")
    assert all(word in line for word in words), line
    assert sorted(world.rglob("*")) == before


def test_what_is_in_the_hubs_cache_needs_no_network(monkeypatch, tmp_path):
    from disk.hub import find_model

    paths = Paths(tmp_path, tmp_path)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: f"/cache/{name}/{file}")
    assert find_model(HUB, paths, "--sd_model", "") == HUB


def test_lines_that_nobody_reads_any_more_end_a_command_quietly():
    """As with `... --dry_run | head -1`: no traceback; what is left in the buffer at the end included."""
    for program in ("print('x' * 10**6)", "print('x')", "sys.exit(print('x'))"):
        command = f"import sys, utils\ndef main(argv):\n {program}\nsys.stdin.readline()\nsys.exit(utils.run_cli(main))"
        process = subprocess.Popen([sys.executable, "-c", command], cwd=REPO / "src", text=True, stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.close()
        process.stdin.write("go\n")
        process.stdin.close()
        assert (process.stderr.read(), process.wait()) == ("", 141), program
        process.stderr.close()


# --- names and flags ----------------------------------------------------------------------------------------------


def test_every_name_leads_back_to_the_flags_that_made_it(tmp_path):
    paths = Paths(tmp_path, tmp_path)
    choices = {"run": ("finetune", "pretrain", "scratch", "ridge", "finetune:subj02", "pretrain:subj05"),
               "tag": ("", "v2", "lr=1e-3_a"), "head": (None, "adapt", "subj07"), "control": (None, "shuffle"),
               "test_split": ("new_test", "val"), "repeats": ("mean", "single"),
               "lesion": ({}, {"voxels": "V1,V2"}, {"without": "higher_vis"})}
    for values in itertools.product(*choices.values()):
        flags = {**SIZES, **dict(zip(choices, values, strict=True))}
        flags |= flags.pop("lesion")
        for feat in ("c", "g_12", "z"):
            pattern = f"(?:{hints.RUN}|{hints.CEILING}){hints.HEAD}{hints.VARIANT}".replace("{feat}", feat)
            name = re.fullmatch(pattern, scores_name(flags, feat))
            found = {"subj": "subj01", **hints.run_flags(name, "subj01"), "head": hints.head_in(name),
                     **hints.variant_in(name)}
            assert hints.differences(paths, flags, found) == [], (scores_name(flags, feat), found)
            assert hints.differences(paths, {**flags, "tag": "else"}, found) == [
                f"--tag {flags['tag']}" if flags["tag"] else "without --tag"]


def test_runs_are_named_with_the_flags_that_lead_there(tmp_path):
    paths = Paths(tmp_path, tmp_path)
    assert hints.runs_like(paths, SIZES, "c") == ""
    for arguments in (("finetune", "subj01", "c", 8, 3), ("pretrain", "subj01", "c", 8), ("pretrain", "subj01", "g", 8),
                      ("finetune", "subj01", "g_2", 384, 3), ("finetune", "subj03", "c", 8, SESSIONS["subj03"])):
        folder = paths.run(run_name(*arguments))
        folder.mkdir(parents=True)
        (folder / "last.pth").touch()
    assert hints.runs_like(paths, {**SIZES, "hidden_dim": 1024}, "c") == (
        "there are: pretrained_subj01_3sess_ext1_c_8_mlp (--hidden_dim 8), "
        "multisubject_subj01_ext1_c_8_mlp (--run pretrain --hidden_dim 8), "
        "pretrained_subj03_32sess_ext1_c_8_mlp (--run finetune:3 --num_sessions 32 --hidden_dim 8)")
    assert hints.runs_like(paths, SIZES, "g_2") == (
        "there are: multisubject_subj01_ext1_g_8 (--run pretrain), "
        "pretrained_subj01_3sess_ext1_g_2_384 (--hidden_dim 384)")
    assert hints.runs_like(paths, SIZES, "g_4") == "there are: multisubject_subj01_ext1_g_8 (--run pretrain)"


def test_a_run_that_is_trained_is_only_scored(tmp_path):
    paths, flags = Paths(tmp_path, tmp_path), {**SIZES, "run": "pretrain", "test_split": "val", "repeats": "single"}
    folder = paths.run("multisubject_subj01_ext1_g_8")
    folder.mkdir(parents=True)
    (folder / "last.pth").touch()
    assert hints.how_to_score(paths, flags, "g_2") == (
        "score g_2 (SUBJ=1 FEATS=g_2 bash scripts/score.sh --run pretrain --hidden_dim 8 --num_sessions 3 "
        "--test_split val --repeats single)")
    assert hints.how_to_score(paths, {**flags, "without": "V1,V2"}, "g_2").endswith("--repeats single --without V1,V2)")
    assert hints.how_to_score(paths, flags, "z").startswith("train it first (SUBJ=1 STAGES=pretrain FEATS=z ")


def test_eight_choices_are_all_listed():
    found = [(f"run{i}", [f"--tag {i}"]) for i in range(8)]
    assert "run7 (--tag 7)" in hints.listed(found) and "more" not in hints.listed(found)
    assert hints.listed([*found, ("run8", [])]).endswith(", 1 more")


@pytest.mark.parametrize("changed", [
    {}, {"run": "ground_truth"}, {"run": "ground_truth", "use_adapter": True},
    {"control": "mean", "repeats": "single"}, {"voxels": "V1,V2", "test_split": "val"},
    {"use_gnet": True, "gnet_roi": "higher_vis", "gnet_kappa": 0.5, "test_split": "val"}])
def test_pictures_lead_back_to_the_flags_that_drew_them(tmp_path, changed):
    paths = Paths(tmp_path, tmp_path)
    drawn = {**SIZES, "method": "my_gnet_set", "use_gnet": False, "gnet_roi": "all", "gnet_kappa": 1.0,
             "guidance_scale": 0.3, "guidance_strength": 0.2, **changed}
    folder = paths.images_of(drawn)
    folder.mkdir(parents=True)
    (folder / "index.csv").touch()
    assert hints.pictures_like(paths, drawn) == f"there are: {images_name(drawn)}/0.3/0.2"


def test_pictures_of_an_adapter_are_named_by_its_flag(tmp_path):
    paths = Paths(tmp_path, tmp_path)
    drawn = {**SIZES, "method": "mine", "use_gnet": False, "gnet_roi": "all", "gnet_kappa": 1.0, "guidance_scale": 0.3,
             "guidance_strength": 0.2, "use_adapter": True}
    folder = paths.images_of(drawn)
    folder.mkdir(parents=True)
    (folder / "index.csv").touch()
    assert hints.pictures_like(paths, {**drawn, "use_adapter": False}).endswith("(--use_adapter)")


def test_paths_are_looked_for_from_here_then_from_the_root(tmp_path, monkeypatch):
    (tmp_path / "root/both").mkdir(parents=True)
    (tmp_path / "here/both").mkdir(parents=True)
    (tmp_path / "root/there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = Paths(tmp_path / "root", tmp_path)
    assert paths.find("both") == tmp_path / "here/both" and paths.find("there") == tmp_path / "root/there"
    assert paths.find("new") == tmp_path / "root/new" and paths.find("~/here") == tmp_path / "here"
    assert paths.find(tmp_path / "x") == tmp_path / "x"
    assert paths.model("there") == str(tmp_path / "root/there") and paths.model("CompVis/x") == "CompVis/x"


# --- the terminal -------------------------------------------------------------------------------------------------

OUR_LINES = [
    r"ROOT/\S+: .+", r"pictures +ROOT/\S+", r"metrics +ROOT/\S+", r"contact sheet +ROOT/\S+", r"report +ROOT/\S+",
    r"metric +value .*", r"[a-z0-9_]+ +-?[\d.]+ .*", r"[\w, ]+: missing, .*", r"set +PixCorr .*",
    r"(reconstructed|control: [a-z ]+|ceiling: [\w ]+?)(  +(-|-?[\d.]+))+",
    r"(control|ceiling|baseline): .*: not measured, .*", r"n = \d+: intervals and ranks .*",
    r"kept features +ROOT/\S+, [\d.]+ [kM]?B of --cache_gb 20 .*",
    r"evaluate with  bash scripts/evaluate.sh --images ROOT/\S+ .*",
    r"--guidance_decoder .*: cosine of its gradient with the full decoder's 0.\d+ .*",
    r"evaluate with  bash scripts/evaluate.sh  # of the reconstructions: .*",
]


def test_score_recon_and_evaluate_say_nothing_but_our_lines(pristine_nsd, tmp_path):
    """In a process of their own, with networks in the formats that others published."""
    root, models = tmp_path / "root", REPO / "demo/models"
    shutil.copytree(pristine_nsd[0].root, root)
    paths = Paths(root, root / "MindEyeV2/mindeyev2")
    text, vision = (json.loads((models / file).read_text()) for file in ("sd/unet/config.json", "clip/config.json"))
    tokens = json.loads((models / "sd/tokenizer/tokenizer_config.json").read_text())["model_max_length"]
    patches = (vision["vision_config"]["image_size"] // vision["vision_config"]["patch_size"]) ** 2
    for feat, shape in {"c": (tokens, text["cross_attention_dim"]),
                        "g_2": (patches + 1, vision["vision_config"]["hidden_size"])}.items():
        with h5py.File(paths.feature(feat), "w") as file:
            file["data"] = np.random.default_rng(0).standard_normal((N_IMAGES, np.prod(shape))).astype(np.float16)
            file["data"].attrs["shape"] = shape
    drawn = ["--run", "ground_truth", "--guidance_scale", "300"]
    runs = [("score_c", ["--ground_truth"]), ("score_g", ["--ground_truth", "--feat", "g_2"]),
            ("recon", [*drawn, "--guidance_rule", "raw", "--feats", "g_2", "--z", "none", "--sd_model", models / "sd",
                       "--clip_model", models / "clip", "--guidance_decoder", models / "taesd",
                       "--num_inference_steps", 2, "--limit", 2]),
            ("evaluate", [*drawn, "--eval_clip", models / "clip"])]
    runs = [(script, [str(word) for word in ("--root", root, "--num_sessions", 3, *words)]) for script, words in runs]
    program = "\n".join(["import evaluate, recon, score_c, score_g, utils", *(
        f"assert utils.run_cli({script}.main, {words}) == 0" for script, words in runs)])
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO / "src", capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == ""
    lines = [line for line in done.stdout.replace(str(root), "ROOT").splitlines() if line]
    foreign = [line for line in lines if not any(re.fullmatch(ours, line) for ours in OUR_LINES)]
    assert not foreign, "\n".join(foreign)
    folder = "ROOT/outputs_all/subj01/cp_4096_v1_ground_truth/300/0.2"
    at = lines.index(f"pictures       {folder}")
    assert lines[at + 1].startswith("evaluate with  bash scripts/evaluate.sh  # of the reconstructions")


def test_weights_that_a_file_lacks_are_not_kept_quiet():
    """What transformers calls unexpected is what nobody asked for; what is missing would be random numbers."""
    utils.quiet()
    utils.quiet()
    stream = io.StringIO()
    logger, handler = logging.getLogger("transformers.modeling_utils"), logging.StreamHandler(stream)
    logger.addHandler(handler)
    for message in ("CLIP LOAD REPORT from: x\nlogit_scale | UNEXPECTED |",
                    "x LOAD REPORT\na | UNEXPECTED\nb | MISSING", "something else"):
        logger.warning(message)
    logger.removeHandler(handler)
    assert stream.getvalue() == "x LOAD REPORT\na | UNEXPECTED\nb | MISSING\nsomething else\n"
    assert len(logger.filters) == 1


def test_a_bar_is_a_line_a_minute_in_a_log(monkeypatch, capsys):
    clock = itertools.count()
    with utils.progress(total=300, desc="work", unit="step") as bar:
        bar.start_t = bar.last_print_t = 0
        monkeypatch.setattr(bar, "_time", lambda: next(clock))  # a second goes by from question to question
        for step in range(150):
            bar.update()
            bar.set_postfix(loss=step)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 4 and all(re.match(r"work: +\d+% \d+/300 \[", line) for line in lines), lines
    assert "150/300" in lines[-1]
    assert list(utils.progress(range(3), desc="short")) == [0, 1, 2] and capsys.readouterr().err == ""
