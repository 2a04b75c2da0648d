"""What users and broken disks can do wrong, script by script: one line that says what to do, exit 2, nothing changed.

Every line of CASES breaks a copy of one small world, which was taken through training, scores, pictures and evaluation
once, runs a script on it and compares everything under its root with what was there before.
"""

import ast
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import scipy.io
import torch

import convert_gnet
import disk.files
import evaluate
import recon
import score_c
import score_g
import score_gnet
import score_z
import train_c
import train_g
import train_gnet
import train_z
import utils
from disk.files import load_json, save_json
from evaluation import networks
from nsd.trials import read_shard
from test_convert_gnet import published  # noqa: F401  a fixture
from tiny_brain import RUN as GNET
from tiny_brain import V, write_brain
from tiny_nsd import N_IMAGES, SHARED, write_tar
from tiny_sd import LATENT, TOKENS, WIDTH, write_tiny_clip, write_tiny_sd

REPO = Path(__file__).resolve().parent.parent
SHAPES = {"c": (TOKENS, WIDTH), "g_2": (5, 12), "g_12": (5, 12), "z": (4, LATENT, LATENT)}
LOOP = ["--num_workers", 0, "--val_fraction", 0.3, "--num_epochs", 1, "--num_sessions", 3, "--device", "cpu"]
NETWORK = [*LOOP, "--hidden_dim", 8, "--n_blocks", 1, "--prior_depth", 1, "--batch_size", 6]
SCORED = ["--hidden_dim", 8, "--num_sessions", 3, "--device", "cpu"]
SMALL_Z, SMALL_GNET = ["--decoder_channels", 32, 32, 32], ["--trunk_width", 4, "--pass_through", 4, "--batch_size", 4]
# what is given to every script before the flags of a case; --tag new: a training that has no folder yet
FLAGS = {
    train_c: [*NETWORK, "--tag", "new"],
    train_g: [*NETWORK, "--feat", "g_2", "--tag", "new"],
    train_z: [*NETWORK, *SMALL_Z, "--tag", "new"],
    train_gnet: [*LOOP, *SMALL_GNET, "--tag", "new"],
    score_c: [*SCORED, "--overwrite"],
    score_g: [*SCORED, "--feat", "g_2", "--overwrite"],
    score_z: [*SCORED, "--overwrite"],
    score_gnet: ["--device", "cpu", "--overwrite"],
    recon: [*SCORED, "--sd_model", "SD", "--clip_model", "CLIP", "--feats", "g_2", "--num_inference_steps", 2,
            "--guidance_scale", 300, "--guidance_strength", 0.5],
    evaluate: [*SCORED, "--eval_clip", "none", "--no-controls", "--guidance_scale", 300, "--guidance_strength", 0.5],
    convert_gnet: [],
}
GUIDED = ["--use_gnet", "--gnet_roi", "V1", "--method", "brain"]
NEW = ["--method", "new"]  # pictures that have no folder yet
DATA, STIMULI = "MindEyeV2/mindeyev2", "nsddata_stimuli/stimuli/nsd"
BETAS, SHARDS, STIMULUS_FILE = f"{DATA}/betas_all_subj01_fp32_renorm.hdf5", f"{DATA}/wds/subj01", "nsd_stimuli.hdf5"
RUN_C = "train_logs/pretrained_subj01_3sess_ext1_c_8_mlp"
RUN_Z = "train_logs/pretrained_subj01_3sess_ext1_z_8"
SCORES_C = "scores_all/subj01/pretrained_subj01_3sess_ext1_c_8_mlp"
SCORES_G = "scores_all/subj01/pretrained_subj01_3sess_ext1_g_2_8/Linear-2"
IMAGES = "outputs_all/subj01/cp_4096_v1/300/0.5"


def run(script, root, models, *flags):
    """Exit status of a script on a world, whether it parsed its flags or not."""
    words = [str(word) for word in ["--root", root, *FLAGS[script], *flags]]
    words = [word.replace("ROOT", str(root)) for word in words]
    words = [str(models[("SD", "CLIP").index(word)]) if word in ("SD", "CLIP") else word for word in words]
    try:
        return utils.run_cli(script.main, words)
    except SystemExit as stop:
        return stop.code


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return write_tiny_sd(tmp_path_factory.mktemp("sd")), write_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def whole_world(tmp_path_factory, models):
    """The root of a world with data, runs, scores, pictures and their evaluation."""
    root = tmp_path_factory.mktemp("world") / "root"
    root.mkdir()
    paths = write_brain(root)
    rng = np.random.default_rng(1)
    for feat, shape in SHAPES.items():
        with h5py.File(paths.feature(feat), "w") as file:
            file["data"] = rng.standard_normal((N_IMAGES, np.prod(shape))).astype(np.float16)
            file["data"].attrs["shape"] = shape
    for script in (train_c, train_g, train_z):
        assert run(script, root, models, "--tag", "", "--multi_subject") == 0
        assert run(script, root, models, "--tag", "", "--multisubject_ckpt", "auto") == 0
    for folder in (root / "train_logs").glob("multisubject*_z_*"):  # large, and read no more
        shutil.rmtree(folder)
    for script in (score_c, score_g, score_z, score_gnet, recon, evaluate):
        assert run(script, root, models) == 0
    return root


@pytest.fixture
def root(whole_world, tmp_path):
    """A copy of its own for one case. Not hard links: a file that is cut short would be cut in every copy."""
    return Path(shutil.copytree(whole_world, tmp_path / "root"))


def everything_in(root, original):
    """{path: content} of what lies under root, folders too, but the cache of the shards, which any reader renews.

    A copy's own place is no difference from the original.
    """
    return {path.relative_to(root): path.read_bytes().replace(bytes(root), bytes(original)) if path.is_file() else None
            for path in root.rglob("*") if path.name != ".behaviour.npz"}


def error_lines(printed):
    """Lines of stderr without progress bars."""
    lines = [re.sub(r"\x1b\[.", "", line).strip() for line in re.split(r"[\r\n]+", printed)]
    return [line for line in lines if line and not re.search(r"\d+%\||\d+(batch|step|tar|image|it)? \[\d", line)]


# --- ways to break a world: each makes a function of it -----------------------------------------------------------


def whole(world):
    """Nothing is broken, or the flags are."""


def both(*damages):
    return lambda world: [damage(world) for damage in damages]


def without(name):
    def damage(world):
        path = world.root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return damage


def cut(name, keep):
    """Only the first bytes are left (all but the last, if negative)."""
    return lambda world: (world.root / name).write_bytes((world.root / name).read_bytes()[:keep])


def text(name, content):
    """Another content; bytes or str."""
    def damage(world):
        (world.root / name).parent.mkdir(parents=True, exist_ok=True)
        (world.root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return damage


def a_file_at(name):
    """A file where a folder should be: what can not be written to, whoever runs the tests."""
    def damage(world):
        shutil.rmtree(world.root / name, ignore_errors=True)
        (world.root / name).write_text("not a folder")
    return damage


def a_folder_at(name):
    def damage(world):
        without(name)(world)
        (world.root / name).mkdir()
    return damage


def hdf5(name, change, key=None):
    """The data set replaced by change(array), under another key if one is given."""
    def damage(world):
        with h5py.File(world.root / name, "r+") as file:
            (old,) = file
            array, attributes = file[old][()], dict(file[old].attrs)
            del file[old]
            array = change(array)
            if array is None:
                file.create_group(key or old)
            else:
                file[key or old] = array
                file[key or old].attrs.update(attributes)
    return damage


def npy(name, change):
    def damage(world):
        array = change(np.load(world.root / name))
        np.save(world.root / name, array, allow_pickle=True)
    return damage


def put(array, index, value):
    """The array with one value replaced."""
    array = array.copy()
    array[index] = value
    return array


def js(name, **changes):
    """Some values of a JSON file replaced."""
    return lambda world: save_json(world.root / name, load_json(world.root / name) | changes)


def index(old, new):
    """A piece of index.csv replaced."""
    def damage(world):
        file = world.root / IMAGES / "index.csv"
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new, 1))
    return damage


def checkpoint(name, change):
    """A checkpoint after change(dict), which may return what to save instead."""
    def damage(world):
        state = torch.load(world.root / name, weights_only=True)
        changed = change(state)
        torch.save(state if changed is None else changed, world.root / name)
    return damage


class Program:
    """A pickle of this makes a folder where it is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def hostile_checkpoint(name):
    """A checkpoint that carries a program."""
    return lambda world: checkpoint(name, lambda state: {**state, "extra": Program(world.root / "executed")})(world)


def hostile_npy(name):
    """An array that carries a program."""
    return lambda world: np.save(world.root / name, np.array([Program(world.root / "executed")] * 4, object),
                                 allow_pickle=True)


def shard(name, change):
    """A shard of other trials: change(behav (trials, 17))."""
    def damage(world):
        write_tar(world.root / SHARDS / name, change(read_shard(world.root / SHARDS / name)))
    return damage


def another_design(world):
    """The experiment's design says that other images were shown to subject 1."""
    file = world.root / "nsddata/experiments/nsd/nsd_expdesign.mat"
    design = scipy.io.loadmat(file)
    design["subjectim"][0] += 1
    scipy.io.savemat(file, {key: design[key] for key in ("masterordering", "subjectim")})


def full_disk(*names):
    """Files of these names (glob) find no room: the real error of the real device that is always full."""
    def damage(world):
        temporary_of = disk.files._temporary_of

        def without_room(path):
            temporary = temporary_of(path)
            if any(path.match(name) for name in names):
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary.symlink_to("/dev/full")
            return temporary

        world.patch.setattr(disk.files, "_temporary_of", without_room)
    return damage


def denied(folder):
    """Nothing can be made in a folder."""
    def damage(world):
        mkdir = Path.mkdir

        def refuse(path, *args, **kwargs):
            if (world.root / folder) in [path, *path.parents] and not path.exists():
                raise PermissionError(13, "Permission denied", str(path))
            mkdir(path, *args, **kwargs)

        world.patch.setattr(Path, "mkdir", refuse)
    return damage


def of_published(change):
    """The published GNet's file, after change(dict)."""
    def damage(world):
        changed = change(world.published)
        torch.save(world.published if changed is None else changed, world.root / DATA / "gnet_multisubject.pt")
    return damage


def without_shape(name):
    """A feature that does not say its shape."""
    def damage(world):
        with h5py.File(world.root / name, "r+") as file:
            del file["data"].attrs["shape"]
    return damage


def masks(mask):
    """Another V1 of subject 1."""
    def damage(world):
        with h5py.File(world.root / DATA / "brain_region_masks.hdf5", "r+") as file:
            del file["subj01/V1"]
            file["subj01/V1"] = mask
    return damage


def target(shape, dtype=np.float32, ids=SHARED):
    """A file t.npy of responses to reach."""
    def damage(world):
        np.save(world.root / "t.npy", np.zeros(shape, dtype))
        np.save(world.root / "image_ids.npy", ids)
    return damage


def sd_without_weights(world):
    """A Stable Diffusion folder whose UNet has no weights."""
    shutil.copytree(world.models[0], world.root / "sd")
    for file in (world.root / "sd/unet").glob("*.safetensors"):
        file.write_bytes(b"")


# --- the cases ----------------------------------------------------------------------------------------------------

BAD_BETAS = [  # what is broken, words of the line
    ("missing", without(BETAS), ("betas_all_subj01", "not found", "--subj")),
    ("truncated", cut(BETAS, -40), ("betas_all_subj01", "not readable", "download it")),
    ("wrong key", hdf5(BETAS, np.copy, "responses"), ("betas_all_subj01", "`betas`", "download it")),
    ("a group", hdf5(BETAS, lambda x: None), ("betas_all_subj01", "`betas`", "download it")),
    ("1-D", hdf5(BETAS, np.ravel), ("betas_all_subj01", "(2520,)", "(trials, voxels)")),
    ("int", hdf5(BETAS, lambda x: x.astype(np.int16)), ("betas_all_subj01", "int16", "float")),
    ("strings", hdf5(BETAS, lambda x: x.astype("S8")), ("betas_all_subj01", "|S8", "float")),
    ("fewer rows", hdf5(BETAS, lambda x: x[:30]), ("betas_all_subj01", "rows 0..29", "download it")),
    ("NaN", hdf5(BETAS, lambda x: np.full_like(x, np.nan)), ("betas_all_subj01", "NaN", "download")),
    ("not HDF5", text(BETAS, "betas"), ("betas_all_subj01", "not readable", "download it")),
]
C, Z, STIM = (f"{STIMULI}/{name}" for name in ("c_all.hdf5", "z_all.hdf5", STIMULUS_FILE))
CASES = [  # script, what is broken, how, flags, words of the line: flag or file, found, wanted or what to do
    *((train_c, f"betas {name}", how, [], words) for name, how, words in BAD_BETAS),
    *((score_c, f"betas {name}", how, [], words) for name, how, words in BAD_BETAS),
    *((train_gnet, f"betas {name}", how, [], words) for name, how, words in BAD_BETAS[3:9]),
    # shards
    (train_c, "shard truncated", cut(f"{SHARDS}/train/1.tar", 2000), [],
     ("train/1.tar", "unexpected end", "download it")),
    (train_c, "shard missing in the middle", without(f"{SHARDS}/train/1.tar"), [], ("[0, 2]", "without a gap")),
    (train_c, "shard empty", cut(f"{SHARDS}/train/0.tar", 0), [], ("train/0.tar", "download it")),
    (train_c, "shard without trials", shard("train/0.tar", lambda x: x[:0]), [], ("train/0.tar", "download it")),
    (train_c, "trial twice", shard("train/0.tar", lambda x: x[[0, 0]]), [], ("trial", "there twice", "download it")),
    (train_c, "shared image trains", shard("train/0.tar", lambda x: put(x, (0, 16), 1)), [], ("a shared image", "wds")),
    (train_c, "image id past the features", shard("train/0.tar", lambda x: put(x, (0, 0), 99)), [], ("99",)),
    (train_c, "no shards", without(f"{SHARDS}/train"), [], ("wds/subj01/train", "not found", "--data_path")),
    (score_c, "no test shard", without(f"{SHARDS}/new_test/0.tar"), [], ("new_test/0.tar", "not found", "--subj")),
    (score_c, "no old test split", whole, ["--test_split", "test"], ("test/0.tar", "not found", "download it")),
    (score_gnet, "test shard cut", cut(f"{SHARDS}/new_test/0.tar", 700), [], ("new_test/0.tar", "download it")),
    # features
    (train_c, "feature missing", without(C), [], ("c_all.hdf5", "not found", "img2feat.py --feats c")),
    (train_c, "feature truncated", cut(C, -8), [], ("c_all.hdf5", "not readable", "img2feat.py")),
    (train_c, "feature of another key", hdf5(C, np.copy, "features"), [], ("c_all.hdf5", "`data`", "img2feat.py")),
    (train_c, "feature of another width", hdf5(C, lambda x: x[:, 1:]), [], ("c_all.hdf5", "111", "img2feat.py")),
    (train_c, "feature flat", both(hdf5(C, np.copy), without_shape(C)), [],
     ("c_all.hdf5", "(24, 112)", "(N, T, D)")),
    (train_c, "feature of ints", hdf5(C, lambda x: x.astype(int)), [], ("c_all.hdf5", "int64", "float")),
    (train_c, "feature of too few rows", hdf5(C, lambda x: x[:9]), [], ("c_all.hdf5", "rows 0..8", "img2feat.py")),
    (train_c, "feature NaN", hdf5(C, lambda x: x * np.nan), [], ("c_all.hdf5", "NaN", "img2feat.py")),
    (train_c, "ridge, feature NaN", hdf5(C, lambda x: x * np.nan), ["--model", "ridge"], ("c_all.hdf5", "NaN")),
    (train_g, "feature missing", whole, ["--feat", "g_6"], ("g_6_all.hdf5", "not found", "img2feat.py --feats g_6")),
    (train_z, "tokens missing", without(f"{STIMULI}/g_12_all.hdf5"), [], ("g_12_all.hdf5", "not found", "img2feat")),
    (train_z, "latents NaN", hdf5(Z, lambda x: put(x, slice(None), np.inf)), [], ("z_all.hdf5", "NaN", "img2feat.py")),
    (train_z, "latents are tokens", both(hdf5(Z, lambda x: x.reshape(N_IMAGES, 16, 16)), without_shape(Z)),
     [], ("z_all.hdf5", "(24, 16, 16)", "(N, 4, h, w)")),
    (train_gnet, "stimuli missing", without(STIM), [], (STIMULUS_FILE, "not found", "--root")),
    (train_gnet, "stimuli of floats", hdf5(STIM, lambda x: x / 255), [], (STIMULUS_FILE, "float64", "uint8")),
    (train_gnet, "stimuli grey", hdf5(STIM, lambda x: x[..., 0]), [], (STIMULUS_FILE, "(N, H, W, 3)")),
    (score_z, "feature of too few rows", both(hdf5(Z, lambda x: x[:9]), without(
        f"{RUN_Z}/z_statistics_subj01_own_3sess.pth")), [], ("z_all.hdf5", "rows 0..8")),
    (score_c, "true feature missing", without(C), ["--ground_truth"], ("c_all.hdf5", "not found", "img2feat.py")),
    # what the experiment says
    (train_c, "expdesign contradicts", another_design, [], ("nsd_expdesign.mat", "shows image", "check that both")),
    (train_c, "expdesign cut", cut("nsddata/experiments/nsd/nsd_expdesign.mat", 300), [], ("nsd_expdesign.mat",)),
    (train_gnet, "masks missing", without(f"{DATA}/brain_region_masks.hdf5"), [], ("brain_region_masks", "not found")),
    (train_gnet, "masks of other voxels", masks(np.ones(V + 1, bool)), [], (f"({V + 1},)", f"{V} voxels", "check")),
    (train_gnet, "masks of words", masks(np.array([b"x"] * V)), [], ("brain_region_masks.hdf5", "V1", "download")),
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
        f"{RUN_C}/last.pth", lambda s: (s.update(epoch=0), s.pop("optimizer")) and None),
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
     ["--prefilter", "ROOT/alexnet.pth"], ("--prefilter", "alexnet.pth", "wanted features.0")),
    (train_gnet, "prefilter is a folder", whole, ["--prefilter", "ROOT"], ("--prefilter", "wanted features.0")),
    (score_gnet, "encoding model cut", cut(f"train_logs/{GNET}/best.pth", 5000), [], ("best.pth", "not a readable")),
    (score_gnet, "encoding model with a program", hostile_checkpoint(f"train_logs/{GNET}/best.pth"), [], ("best.pth",)),
    (score_gnet, "another encoding model", whole, ["--gnet_run", RUN_C.split("/")[1]], ("--gnet_run", "pretrained")),
    (score_gnet, "no encoding model", whole, ["--gnet_run", "gnet_none"], ("--gnet_run", "gnet_none", "train one")),
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
    (evaluate, "images nowhere", whole, ["--images", "nowhere"], ("nowhere/index.csv", "not found", "recon.sh")),
    (evaluate, "compared nowhere", whole, ["--compare", "x=nowhere"], ("nowhere/index.csv", "not found", "recon.sh")),
    (evaluate, "weights nowhere", whole, ["--weights_dir", "/nowhere"], ("--weights_dir", "/nowhere", "check")),
    (evaluate, "CLIP nowhere", whole, ["--eval_clip", "ROOT"], ("--eval_clip", "not a CLIP", "give")),
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
    (evaluate, "disk full at the features", both(without("outputs_all/.features"), full_disk("pixels*.npy")),
     [], ("pixels", "No space left", "make room")),
    (convert_gnet, "disk full", both(without(BETAS), of_published(lambda p: None), full_disk("best.pth")),
     [], ("best.pth", "could not be written", "make room")),
    # the published GNet
    (convert_gnet, "missing", whole, [], ("gnet_multisubject.pt", "not found", "download it")),
    (convert_gnet, "cut", both(of_published(lambda p: None), cut(f"{DATA}/gnet_multisubject.pt", 999)), [],
     ("gnet_multisubject.pt", "download it")),
    (convert_gnet, "with a program", lambda w: of_published(lambda p: {**p, "x": Program(w.root / "executed")})(w), [],
     ("gnet_multisubject.pt", "wanted tensors and arrays only")),
    (convert_gnet, "lacks a key", of_published(lambda p: p.pop("val_cc") is None), [], ("no best_params", "download")),
    (convert_gnet, "a folder", whole, ["--file", "ROOT"], ("root", "download it")),
    # flags out of range
    (train_c, "--batch_size 0", whole, ["--batch_size", 0], ("--batch_size 0", "at least 1")),
    (train_c, "--batch_size -3", whole, ["--batch_size", -3], ("--batch_size -3", "at least 1")),
    (train_c, "--num_epochs 0", whole, ["--num_epochs", 0], ("--num_epochs 0", "at least 1")),
    (train_c, "--max_lr nan", whole, ["--max_lr", "nan"], ("--max_lr nan", "wanted")),
    (train_c, "--max_lr -1", whole, ["--max_lr", -1], ("--max_lr -1", "wanted")),
    (train_c, "--max_lr inf", whole, ["--max_lr", "inf"], ("--max_lr inf", "wanted")),
    (train_c, "--clip_scale nan", whole, ["--clip_scale", "nan"], ("--clip_scale nan", "wanted")),
    (train_c, "--prior_scale -1", whole, ["--prior_scale", -1], ("--prior_scale -1", "wanted")),
    (train_c, "--val_fraction 1.5", whole, ["--val_fraction", 1.5], ("--val_fraction 1.5", "from 0 to 1")),
    (train_c, "--mixup_pct nan", whole, ["--mixup_pct", "nan"], ("--mixup_pct nan", "from 0 to 1")),
    (train_c, "--val_fraction 1", whole, ["--val_fraction", 1], ("--val_fraction", "no trials to train on")),
    (train_c, "--num_sessions 0", whole, ["--num_sessions", 0], ("--num_sessions 0", "1 to 3")),
    (train_c, "--num_sessions 99", whole, ["--num_sessions", 99], ("--num_sessions 99", "1 to 3")),
    (train_c, "--seed -1", whole, ["--seed", -1], ("--seed", "'-1'", "from 0")),
    (train_c, "--seed 1.5", whole, ["--seed", 1.5], ("--seed", "'1.5'", "whole number")),
    (train_c, "--num_workers -1", whole, ["--num_workers", -1], ("--num_workers -1", "0 or more")),
    (train_c, "--device cuda", whole, ["--device", "cuda"], ("--device cuda", "no CUDA device", "--device cpu")),
    (train_z, "--decoder_channels 30", whole, ["--decoder_channels", 30, 32, 32], ("--decoder_channels", "of 32")),
    (train_gnet, "--l1 inf", whole, ["--l1", "inf"], ("--l1 inf", "wanted")),
    (train_gnet, "--trunk_width 0", whole, ["--trunk_width", 0], ("--trunk_width 0", "at least 1")),
    (score_c, "--batch_size 0", whole, ["--batch_size", 0], ("--batch_size 0", "at least 1")),
    (score_c, "--prior_steps 0", whole, ["--prior_steps", 0], ("--prior_steps 0", "at least 1")),
    (score_c, "--prior_steps 1000", whole, ["--prior_steps", 1000], ("--prior_steps 1000", "at most")),
    (score_c, "--num_sessions 0", whole, ["--num_sessions", 0, "--run", "pretrain"], ("--num_sessions 0",)),
    (score_c, "--head of an unknown subject", whole, ["--head", 9], ("--head", "'9'", "1..8")),
    (score_c, "--head without an encoder", whole, ["--head", 5], ("--head subj05", "subj01", "adapt")),
    (score_g, "--feat g_3", whole, ["--feat", "g_3"], ("--feat", "'g_3'", "g_2")),
    (score_gnet, "--batch_size -1", whole, ["--batch_size", -1], ("--batch_size -1", "at least 1")),
    (score_gnet, "--ids out of range", whole, ["--ids", "0-99"], ("--ids 99", "0..23")),
    (score_gnet, "--ids not numbers", whole, ["--ids", "a-b"], ("--ids", "'a-b'", "0-99")),
    (score_gnet, "--ids huge", whole, ["--ids", "0-99999999999999"], ("--ids", "0..23")),
    (score_gnet, "--images a file", whole, ["--images", BETAS], ("--images", "folder")),
    (score_gnet, "--images empty", lambda w: (w.root / "none").mkdir(), ["--images", "none"],
     ("--images", "no picture")),
    (score_gnet, "--images not pictures", text("mine/a.png", "png"), ["--images", "mine"], ("a.png", "not a readable")),
    (recon, "--guidance_scale nan", whole, ["--guidance_scale", "nan"], ("--guidance_scale nan", "from 0")),
    (recon, "--guidance_scale inf", whole, ["--guidance_scale", "inf"], ("--guidance_scale inf", "from 0")),
    (recon, "--guidance_strength 1.5", whole, ["--guidance_strength", 1.5], ("--guidance_strength 1.5", "from 0 to 1")),
    (recon, "--strength nan", whole, ["--strength", "nan"], ("--strength nan", "from 0 to 1")),
    (recon, "--num_samples 0", whole, ["--num_samples", 0], ("--num_samples 0", "at least 1")),
    (recon, "--batch_size -2", whole, ["--batch_size", -2], ("--batch_size -2", "at least 1")),
    (recon, "--resolution 0", whole, ["--resolution", 0, "--overwrite"], ("--resolution 0", "wanted")),
    (recon, "--ids out of range", whole, ["--ids", 4], ("--ids 4", "not a test image", "3..20")),
    (recon, "--ids not numbers", whole, ["--ids", "four"], ("--ids", "'four'")),
    (recon, "--method leads elsewhere", whole, ["--method", "../../x"], ("--method", "'../../x'", "file name")),
    (recon, "--sd_model without weights", lambda w: (w.root / "sd").mkdir(), ["--sd_model", "ROOT/sd", "--overwrite"],
     ("--sd_model", "has no vae", "give")),
    (recon, "--sd_model empty weights", sd_without_weights, ["--sd_model", "ROOT/sd", "--overwrite"],
     ("--sd_model", "could not be loaded", "give")),
    (recon, "--clip_model without weights", lambda w: (w.root / "clip").mkdir(),
     ["--clip_model", "ROOT/clip", "--overwrite"], ("--clip_model", "no CLIP vision model", "give")),
    (recon, "--device cuda", whole, ["--device", "cuda"], ("--device cuda", "no CUDA device", "--device cpu")),
    (evaluate, "--batch_size 0", whole, ["--batch_size", 0], ("--batch_size 0", "at least 1")),
    (evaluate, "--guidance_scale nan", whole, ["--guidance_scale", "nan"], ("nan", "not found")),
    (evaluate, "--retrieval_feat x", whole, ["--retrieval_feat", "x"], ("--retrieval_feat", "'x'", "wanted c, z")),
    # combinations
    (train_c, "two stages", whole, ["--multi_subject", "--multisubject_ckpt", "auto"], ("--multi_subject and", "two")),
    (train_c, "ridge has no pretraining", whole, ["--model", "ridge", "--multi_subject"], ("--model ridge", "leave")),
    (train_c, "subject without data", whole, ["--subj", 7], ("betas of subj07", "not found", "--subj")),
    (score_c, "truth of a control", whole, ["--ground_truth", "--control", "mean"],
     ("--control mean", "--ground_truth")),
    (score_c, "own head of a pretraining", whole, ["--run", "pretrain", "--head", "own"], ("subj02", "wanted subj01")),
    (score_gnet, "ids and images", whole, ["--ids", 1, "--images", "x"], ("--images", "--ids")),
    (recon, "--use_gnet without a run", without(f"train_logs/{GNET}"), GUIDED,
     ("--gnet_run", "not found", "train one")),
    (recon, "--use_gnet, nothing guides", whole, [*GUIDED, "--guidance_scale", 0], ("--use_gnet", "nothing", "give")),
    (recon, "--gnet_roi unknown", whole, [*GUIDED, "--gnet_roi", "V9"], ("--gnet_roi V9", "wanted V1")),
    (recon, "--gnet_roi too small", whole, [*GUIDED, "--gnet_roi", "V3"], ("--gnet_roi V3", "at least 20")),
    (recon, "--gnet_kappa nan", whole, [*GUIDED, "--gnet_kappa", "nan"], ("--gnet_kappa nan", "from 0")),
    (recon, "--gnet_alpha 2", whole, [*GUIDED, "--gnet_alpha", 2], ("--gnet_alpha 2", "from 0 to 1")),
    (recon, "target missing", whole, [*GUIDED, "--target_fmri_npy", "ROOT/x.npy"], ("--target_fmri_npy", "not found")),
    (recon, "target of another width", target((4, V - 1)), [*GUIDED, "--target_fmri_npy", "ROOT/t.npy"],
     ("--target_fmri_npy", f"{V - 1} voxels", f"the {V} of")),
    (recon, "target of other ids", target((4, V), ids=[0, 1, 2, 3]), [*GUIDED, "--target_fmri_npy", "ROOT/t.npy"],
     ("--target_fmri_npy", "no row for image id", "give a row")),
    (recon, "target of words", target((4, V), "<U3"), [*GUIDED, "--target_fmri_npy", "ROOT/t.npy"],
     ("--target_fmri_npy", "<U3", "give responses")),
    (evaluate, "--subjects of one folder", whole, ["--subjects", 1, "--images", IMAGES], ("--subjects", "leave out")),
    # whatever the script
    *((script, "unknown flag", whole, ["--nonsense", 1], ("--nonsense", "--help")) for script in FLAGS),
    (train_c, "abbreviated flag", whole, ["--batch", 3], ("--batch", "--help")),
    (recon, "abbreviated flag", whole, ["--guidance_sc", 3], ("--guidance_sc", "--help")),
    (evaluate, "a word too many", whole, ["x"], ("x", "--help")),
    *((script, "--root nowhere", whole, ["--root", "/nowhere"], ("--root /nowhere", "no such folder", "give"))
      for script in FLAGS),
    *((script, "--data_path a file", whole, ["--data_path", f"ROOT/{C}"], ("c_all.hdf5", "not found"))
      for script in (train_c, train_g, train_z, train_gnet, score_c, score_g, score_z, score_gnet, convert_gnet)),
]
# scripts that had work to do before the disk was full leave what they had done: these names, new or longer
BEGUN = {
    "train_c-disk full": ("config.json", "log.txt", "metrics.jsonl"),
    "train_c-disk full at the start": ("log.txt",),
    "train_c-betas NaN": ("config.json", "log.txt", "metrics.jsonl"),  # found where they are read, in the first epoch
    "recon-disk full": ("config.json", "metrics.jsonl"),
}


@pytest.mark.parametrize(("name", "script", "damage", "flags", "words"), [
    pytest.param(f"{script.__name__}-{broken}", script, *rest, id=f"{script.__name__}-{broken}")
    for script, broken, *rest in CASES])
def test_a_mistake_gives_one_line_and_changes_nothing(name, script, damage, flags, words, root, whole_world, models,
                                                      published, monkeypatch, capsys):  # noqa: F811
    damage(SimpleNamespace(root=root, patch=monkeypatch, published=published, models=models))
    before = everything_in(root, whole_world)
    status = run(script, root, models, *flags)
    found = capsys.readouterr()
    lines = error_lines(found.err)
    assert status == 2, found.err[-3000:]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert "Traceback" not in found.out + found.err
    lacking = [word for word in words if word not in lines[0]]
    assert not lacking, f"{lacking} not in {lines[0]}"
    monkeypatch.undo()
    after = everything_in(root, whole_world)
    for path in list(after):
        if path not in before and (after[path] is None or path.name in BEGUN.get(name, ())):
            del after[path]  # an empty folder, or what was begun
    changed = [str(path) for path in before.keys() | after.keys() if before.get(path, 0) != after.get(path, 0)]
    assert not changed, changed


# --- programs in files, secrets ------------------------------------------------------------------------------------


def test_no_file_is_read_that_may_run_a_program():
    """Every call that reads a pickle, or may, is told not to run what it holds."""
    found = []
    for file in [file for folder in ("src", "demo", "benchmarks") for file in (REPO / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            if (name == "torch.load" and given.get("weights_only") != "True"
                    or name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False"
                    or name.split(".")[0] in ("pickle", "dill", "joblib", "marshal", "shelve")
                    or name in ("yaml.load", "yaml.unsafe_load", "eval", "exec") or name.endswith("read_pickle")
                    or given.get("trust_remote_code", "False") != "False"):
                found.append(f"{file.relative_to(REPO)}:{node.lineno}: {ast.unparse(node)}")
    assert not found, found


def test_weights_of_judges_run_no_program(tmp_path, monkeypatch):
    """torchvision and the hub's code load what lies in the hub's folder; here a file that carries a program."""
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    (tmp_path / "checkpoints").mkdir()
    torch.save({"weight": Program(tmp_path / "executed")}, tmp_path / "checkpoints/alexnet.pth")
    networks.load_networks("none", torch.device("cpu"), tmp_path)
    with pytest.raises(pickle.UnpicklingError):
        torch.hub.load_state_dict_from_url("https://nowhere/alexnet.pth")
    assert not (tmp_path / "executed").exists()


def test_secrets_of_the_environment_reach_no_file(root, models, monkeypatch):
    secrets = {"HF_TOKEN": "hf_" + "thisisasecret" * 3, "WANDB_API_KEY": "5ec7e7" * 7}
    for name, value in {**secrets, "WANDB_MODE": "offline"}.items():
        monkeypatch.setenv(name, value)
    # a process of its own: W&B's service, once started, would see the environment of no other test
    words = ["--root", root, *FLAGS[train_c], "--wandb_log"]
    subprocess.run([sys.executable, REPO / "src/train_c.py", *map(str, words)], check=True, capture_output=True)
    for script, flags in ((score_c, []), (recon, [*NEW, "--limit", 2]), (evaluate, NEW)):
        assert run(script, root, models, *flags) == 0
    assert list(root.rglob("*.wandb"))  # is looked through as well
    for path, content in everything_in(root, root).items():
        leaked = [name for name, value in secrets.items() if content and value.encode() in content]
        assert not leaked, f"{path} holds {leaked}"
