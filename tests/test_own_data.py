"""One's own data: imported, checked, decoded to pictures; what was exported comes back as it was; mistakes."""

import csv
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
)

import check_data
import img2feat
import import_data
import score_c
import stranger
import tiny_features
import train_c
import utils
from disk.names import Paths
from nsd.captions import load_captions
from nsd.components import open_components
from nsd.own_betas import open_responses
from nsd.regions import roi_masks
from nsd.repeats import load_test_set
from nsd.rows import open_betas, open_stimuli
from nsd.trials import list_subjects, load_trials
from shared import built_once
from test_end_to_end import words_of_calls

REPO = Path(__file__).resolve().parent.parent
SIDE = 32


def paths_of(root):
    return Paths(Path(root), Path(root) / "MindEyeV2/mindeyev2")


def run_import(data, root, *flags):
    return utils.run_cli(import_data.main, ["--data", str(data), "--root", str(root), "--image_size", str(SIDE),
                                            *map(str, flags)])


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The stranger's folder, to be read only."""
    return built_once(tmp_path_factory, "stranger", lambda folder: stranger.main(folder / "my_data")) / "my_data"


@pytest.fixture
def data(whole, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(whole, tmp_path / "my_data")
    return tmp_path / "my_data"


@pytest.fixture(scope="session")
def pristine(whole, tmp_path_factory):
    def build(folder):
        assert run_import(whole, folder / "root") == 0
    return paths_of(built_once(tmp_path_factory, "stranger_root", build) / "root")


@pytest.fixture
def paths(pristine, tmp_path):
    """A root of the stranger's data that a test may change."""
    shutil.copytree(pristine.root, tmp_path / "root")
    return paths_of(tmp_path / "root")


def table_of(data):
    with open(data / "trials.csv", newline="") as file:
        return list(csv.DictReader(file))


def write_table(data, lines, columns=None):
    with open(data / "trials.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns or list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def look(folder):
    """{path: bytes} of every file below a folder."""
    return {file.relative_to(folder): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


# --- from folder to pictures -----------------------------------------------------------------------------------------


def page_commands():
    """The bash commands and the import of the page's first section: (script, knobs, flags)."""
    section = (REPO / "docs/own_data.md").read_text().partition("## From folder to pictures")[2].partition("\n## ")[0]
    lines = [line.strip() for line in section.splitlines() if line.startswith("    ")]
    for line in lines:
        if found := re.fullmatch(r"((?:\w+=\S+ )*)bash scripts/(\w+)\.sh(.*)", line):
            yield found[2], dict(knob.split("=") for knob in found[1].split()), found[3].split()
        elif found := re.fullmatch(r"\.venv/bin/python src/import_data\.py (.*)", line):
            yield "import_data", {}, found[1].split()


def test_a_strangers_data_go_from_folder_to_pictures_by_the_pages_commands(data, tiny_models, tmp_path, monkeypatch,
                                                                           capsys):
    """Each with the flags that make it small, and tiny models in place of the real ones."""
    sd, clip = map(str, tiny_models)
    feats, size = "c z g_2", ["--hidden_dim", 16]
    small = {"train": [*size, "--n_blocks", 1, "--num_workers", 0, "--num_epochs", 4, "--batch_size", 60,
                       "--device", "cpu"],
             "features": ["--sd_model", sd, "--clip_model", clip, "--num_workers", 0, "--components", 20],
             "check_data": ["--sd_model", sd, "--clip_model", clip, "--eval_clip", clip, "--guidance_decoder", "full"],
             "score": size, "recon": [*size, "--sd_model", sd, "--clip_model", clip, "--feats", "g_2", "--limit", 2,
                                      "--guidance_decoder", "full", "--num_inference_steps", 2],
             "evaluate": [*size, "--eval_clip", "none", "--no-controls"], "import_data": ["--image_size", SIDE]}
    monkeypatch.chdir(tmp_path)
    root, done = tmp_path / "my_root", []
    for name, knobs, flags in page_commands():
        words = [*flags, *map(str, small[name])]
        made = [[str(REPO / "src/import_data.py"), *words]] if name == "import_data" else \
            words_of_calls(name, root, *words, FEATS=feats, **knobs)
        for file, *rest in made:
            script = __import__(Path(file).stem)
            assert utils.run_cli(script.main, rest) == 0, (name, capsys.readouterr().err)
        done.append(name)
    assert done == ["import_data", "import_data", "check_data", "features", "check_data", "train", "score", "recon",
                    "evaluate"]
    printed = capsys.readouterr().out
    assert "subj01 is anna: 240 trials of 4 sessions, 40 of them to test on; 300 voxels" in printed
    assert "fail" not in printed.replace("0 fail", "")
    (metrics,) = root.glob("outputs_all/subj01/*/*/*/metrics.json")
    assert {"pixcorr", "ssim"} <= json.loads(metrics.read_text()).keys()
    drawn = sorted(metrics.parent.glob("0*.png"))
    assert len(drawn) == 2 and Image.open(drawn[0]).size == (16, 16)
    ids = np.load(root / "scores_all/subj01/pretrained_subj01_4sess_ext1_c_16_mlp/image_ids.npy")
    assert ids.tolist() == list(range(0, 120, 6))  # the stranger's test images


def test_what_is_imported_is_what_the_folder_holds(whole, pristine):
    lines = table_of(whole)
    assert list_subjects(pristine) == ["subj01", "subj02"] and pristine.sessions("subj02") == 4
    assert json.loads(pristine.own_data.read_text())["subjects"]["subj02"]["name"] == "ben"
    for subj, name in (("subj01", "anna"), ("subj02", "ben")):
        own = [line for line in lines if line["subject"] == name]
        raw = np.load(whole / f"betas_{name}.npy").astype(np.float64)
        session, is_test = (np.array([int(line[key]) for line in own]) for key in ("session", "is_test"))
        for part in np.unique(session):  # an independent z-score, by the training trials of each session
            of_it, train = session == part, (session == part) & (is_test == 0)
            raw[of_it] = (raw[of_it] - raw[train].mean(0)) / raw[train].std(0)
        assert np.allclose(open_betas(pristine, subj)[:], raw, atol=1e-5)
        for split, flag in (("train", 0), ("new_test", 1)):
            trials = load_trials(pristine, subj, split)
            wanted = [(i, int(line["session"]), int(re.search(r"\d+", line["image"])[0])) for i, line in enumerate(own)
                      if int(line["is_test"]) == flag]
            assert list(zip(trials["row"], trials["session"], trials["image_id"], strict=True)) == wanted
        assert roi_masks(pristine, subj)["V4"].tolist() == (np.arange(300) // 100 == 1).tolist()
    with open(whole / "captions.csv", newline="") as file:
        assert load_captions(pristine) == [[line["caption"]] for line in csv.DictReader(file)]
    assert load_test_set(pristine, "subj01").n_repeats.tolist() == [2] * 20


# --- NSD's formats, exported and imported again ----------------------------------------------------------------------


def export(paths, folder):
    """Write a data set in NSD's formats as docs/own_data.md wants it."""
    (folder / "images").mkdir(parents=True)
    for image_id, picture in enumerate(open_stimuli(paths)[:]):
        Image.fromarray(picture).save(folder / f"images/{image_id:05d}.png")
    lines = []
    for subj in list_subjects(paths):
        trials = np.concatenate([load_trials(paths, subj, split).to_numpy() for split in ("train", "new_test")])
        for _, session, image_id, row, is_test in sorted(trials.tolist(), key=lambda trial: trial[3]):
            lines.append({"image": f"{image_id:05d}.png", "subject": subj, "session": session, "run": 1, "trial": row,
                          "is_test": int(is_test)})
        np.save(folder / f"betas_{subj}.npy", open_betas(paths, subj)[:])
        (folder / f"regions_{subj}").mkdir()
        for name, mask in roi_masks(paths, subj).items():
            if name != "nsd_general":
                np.save(folder / f"regions_{subj}/{name}.npy", mask)
    write_table(folder, lines)
    with open(folder / "captions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        writer.writerows((f"{image_id:05d}.png", text) for image_id, texts in enumerate(load_captions(paths))
                         for text in texts)


def test_the_small_world_exported_and_imported_again_gives_the_same_results(small_nsd, tmp_path, monkeypatch):
    monkeypatch.setattr("features.components.EXACT_WIDTH", 0)  # for the seconds
    models = REPO / "demo/models"
    shutil.copytree(small_nsd.root, tmp_path / "before")
    before, after = paths_of(tmp_path / "before"), paths_of(tmp_path / "after")
    export(before, tmp_path / "folder")
    assert run_import(tmp_path / "folder", after.root, "--no-zscore", "--image_size", 64) == 0
    assert list_subjects(after) == list_subjects(before)
    assert open_stimuli(after)[:].tobytes() == open_stimuli(before)[:].tobytes()
    assert load_captions(after) == load_captions(before)
    for subj in list_subjects(before):
        assert open_betas(after, subj)[:].tobytes() == open_betas(before, subj)[:].tobytes()
        for split in ("train", "new_test"):
            assert load_trials(after, subj, split).equals(load_trials(before, subj, split))
        old, new = (roi_masks(paths, subj) for paths in (before, after))
        assert old.keys() == new.keys() and all(np.array_equal(old[name], new[name]) for name in old)
    for paths in (before, after):
        root = ["--root", str(paths.root)]
        img2feat.main([*root, "--feats", "c", "g_2", "--sd_model", str(models / "sd"), "--clip_model",
                       str(models / "clip"), "--num_workers", "0", "--components", "40", "--device", "cpu"])
        run = ["--num_sessions", "5", "--seed", "3", "--device", "cpu"]
        assert utils.run_cli(train_c.main, [*root, *run, "--model", "ridge"]) == 0
        assert utils.run_cli(score_c.main, [*root, *run, "--run", "ridge"]) == 0
    for name in ("nsddata_stimuli/stimuli/nsd/c_components.hdf5", "nsddata_stimuli/stimuli/nsd/g_2_components.hdf5"):
        assert all(np.array_equal(*(tiny_read(paths.root / name, key) for paths in (before, after)))
                   for key in ("data", "basis"))
    scores = "scores_all/subj01/ridge_subj01_5sess_ext1_c/nsdgeneral.npy"
    old, new = (np.load(paths.root / scores) for paths in (before, after))
    assert len(old) and old.tobytes() == new.tobytes()


def tiny_read(file, key):
    with h5py.File(file, "r") as opened:
        return opened[key][()]


# --- forms of responses ------------------------------------------------------------------------------------------


SPACE, AFFINE = (4, 5, 3), np.diag([2.0, 2, 2, 1])


def form(folder, kind, rng):
    """Write responses of s, 6 trials, in one of the forms; returns what is to be read of it, (6, V) float32."""
    volume = rng.standard_normal((*SPACE, 6)).astype(np.float32)
    volume[0, 0, 0] = np.nan  # outside the brain
    mask = rng.random(SPACE) < 0.5
    mask[0, 0, 0] = False
    wanted = np.stack([volume[x, y, z] for x, y, z in np.ndindex(SPACE) if mask[x, y, z]]).T  # C order
    glmsingle = {"betasmd": volume, "R2": volume[..., 0], "pcregressors": [np.ones((3, 2)), np.ones((4, 2))],
                 "pcnum": 3, "noisepool": None, "pcvoxels": mask, "FRACvalue": np.float64(0.1)}
    if kind in ("nifti", "nifti_and_npy_mask"):
        nibabel.Nifti1Image(volume, AFFINE).to_filename(folder / "betas_s.nii.gz")
    elif kind == "glmsingle":
        np.save(folder / "betas_s.npy", glmsingle)
    elif kind == "glmsingle_folder":
        (folder / "betas_s").mkdir()
        np.save(folder / "betas_s/TYPED_FITHRF_GLMDENOISE_RR.npy", glmsingle)
        np.save(folder / "betas_s/TYPEA_ONOFF.npy", glmsingle)
    elif kind == "glmsingle_hdf5":
        (folder / "betas_s").mkdir()
        with h5py.File(folder / "betas_s/TYPED_FITHRF_GLMDENOISE_RR.hdf5", "w") as file:
            file["betasmd"], file["pcnum"] = volume, 3
    elif kind == "glmsingle_of_voxels":
        np.save(folder / "betas_s.npy", {"betasmd": wanted.T[:, None, None]})
        return wanted
    elif kind in ("hdf5", "hdf5_in_chunks"):
        with h5py.File(folder / "betas_s.h5", "w") as file:
            file.create_dataset("betas", data=wanted, chunks=(2, 3) if kind == "hdf5_in_chunks" else None)
        return wanted
    elif kind == "npy_of_doubles":
        np.save(folder / "betas_s.npy", wanted.astype(np.float64))
        return wanted
    elif kind == "npy_and_mask":
        np.save(folder / "betas_s.npy", volume.reshape(-1, 6).T)
        np.save(folder / "mask_s.npy", mask.ravel())
        return wanted
    if kind == "nifti_and_npy_mask":
        np.save(folder / "mask_s.npy", mask)
    else:
        nibabel.Nifti1Image(mask.astype(np.int16), AFFINE).to_filename(folder / "mask_s.nii.gz")
    return wanted


@pytest.mark.parametrize("kind", ["nifti", "nifti_and_npy_mask", "glmsingle", "glmsingle_folder", "glmsingle_hdf5",
                                  "glmsingle_of_voxels", "hdf5", "hdf5_in_chunks", "npy_of_doubles", "npy_and_mask"])
def test_responses_are_read_in_every_form(kind, tmp_path):
    wanted = form(tmp_path, kind, np.random.default_rng(0))
    responses = open_responses(tmp_path, "s", 6)
    assert responses.shape == wanted.shape
    assert np.array_equal(np.concatenate([responses[0:4], responses[4:6]]), wanted)
    assert responses[0:1].dtype == np.float32


def test_regions_are_cut_as_the_voxels_are(tmp_path):
    form(tmp_path, "nifti", np.random.default_rng(0))
    mask = nibabel.load(tmp_path / "mask_s.nii.gz").get_fdata() > 0
    region = np.random.default_rng(1).random(SPACE) < 0.4
    (tmp_path / "regions_s").mkdir()
    nibabel.Nifti1Image(region.astype(np.uint8), AFFINE).to_filename(tmp_path / "regions_s/V1.nii.gz")
    np.save(tmp_path / "regions_s/FFA.npy", region)
    regions = open_responses(tmp_path, "s", 6).regions
    wanted = [region[x, y, z] for x, y, z in np.ndindex(SPACE) if mask[x, y, z]]
    assert regions["V1"].tolist() == regions["FFA"].tolist() == wanted


class Evil:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_a_pickle_that_would_run_a_program_is_refused_and_does_not(data, tmp_path, capsys):
    for holder in (Evil(tmp_path / "ran"), {"betasmd": np.ones((300, 240)), "more": Evil(tmp_path / "ran")}):
        array = np.empty((), object)
        array[()] = holder
        np.save(data / "betas_anna.npy", array)
        assert run_import(data, tmp_path / "root") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "betas_anna.npy" in line and "posix.mkdir, wanted arrays and plain values only" in line, line
        assert not (tmp_path / "ran").exists() and not (tmp_path / "root").exists()
    assert pickle.loads(pickle.dumps(Evil(tmp_path / "ran"))) is None and (tmp_path / "ran").exists()  # it is evil


# --- mistakes ----------------------------------------------------------------------------------------------------


def change(line, **cells):
    """Damage: some cells of the n-th line of the table (from 0) become others."""
    def damage(data):
        lines = table_of(data)
        lines[line].update(cells)
        write_table(data, lines)
    return damage


def rewrite(file, old, new, count=1):
    """Damage: a text in a file becomes another."""
    def damage(data):
        text = (data / file).read_text()
        assert old in text
        (data / file).write_text(text.replace(old, new, count))
    return damage


def array(file, make):
    """Damage: make(array) in place of an array."""
    return lambda data: np.save(data / file, make(np.load(data / file)))


def drop_column(data):
    lines = [{key: cell for key, cell in line.items() if key != "is_test"} for line in table_of(data)]
    write_table(data, lines)


def in_both(data):
    """The second trial of the first image says otherwise."""
    lines = table_of(data)
    second = next(line for line in lines[1:] if line["image"] == lines[0]["image"])
    second["is_test"] = str(1 - int(second["is_test"]))
    write_table(data, lines)


def only(is_test):
    """Damage: of ben only trials of one kind are left."""
    return lambda data: write_table(data, [line for line in table_of(data) if line["subject"] == "anna"
                                           or line["is_test"] == is_test])


def sessions_of_tests(data):
    """The first session of anna shows test images alone: her others move to the second."""
    lines = table_of(data)
    own = [line for line in lines if line["subject"] == "anna"]
    test = [line for line in own if line["is_test"] == "1"]
    others = [line for line in lines if line["subject"] == "ben"]
    lines = test + [line for line in own if line["is_test"] == "0"] + others
    for number, line in enumerate(lines[:240]):
        line.update(session=1 if number < len(test) else 2, run=1, trial=number)
    write_table(data, lines)


def as_volume(shape=(5, 6, 10), affine=AFFINE, mask_shape=(5, 6, 10), mask_affine=AFFINE, mask=1, region=None):
    """Damage: anna's responses become a volume with a mask, and a region where one is given."""
    def damage(data):
        shutil.rmtree(data / "regions_anna")
        betas = np.load(data / "betas_anna.npy").T.reshape(*shape, -1)
        (data / "betas_anna.npy").unlink()
        nibabel.Nifti1Image(betas, affine).to_filename(data / "betas_anna.nii.gz")
        if mask is not None:
            nibabel.Nifti1Image(np.full(mask_shape, mask, np.uint8), mask_affine).to_filename(data / "mask_anna.nii.gz")
        if region is not None:
            (data / "regions_anna").mkdir()
            nibabel.Nifti1Image(*region).to_filename(data / "regions_anna/V1.nii.gz")
    return damage


def first(array, value):
    array = array.copy()
    array[7, 3] = value
    return array


def zeros(array):
    return np.where(np.arange(len(array))[:, None] == 9, 0, array)


def make(file, content):
    def damage(data):
        (data / file).parent.mkdir(exist_ok=True)
        (data / file).write_bytes(content)
    return damage


PICTURE = "images/drawing 005.png"
MISTAKES = {
    "no folder": (shutil.rmtree, ("--data", "no such folder", "give")),
    "no table": (lambda d: (d / "trials.csv").unlink(), ("trials.csv", "not found", "docs/own_data.md")),
    "no images": (lambda d: shutil.rmtree(d / "images"), ("images", "not found", "docs/own_data.md")),
    "no pictures": (lambda d: [file.unlink() for file in (d / "images").iterdir()], ("images", "no picture", ".png")),
    "a column missing": (drop_column, ("image, subject, session, run, trial found", "is_test is missing")),
    "a column twice": (rewrite("trials.csv", "run,", "session,"), ("trials.csv", "run is missing")),
    "semicolons": (rewrite("trials.csv", ",", ";", -1), ("trials.csv", "image;subject", "commas")),
    "a cell too many": (rewrite("trials.csv", ",anna,1,1,2,", ",anna,1,1,2,9,"), ("line 3", "7 cells", "wanted 6")),
    "not UTF-8": (make("trials.csv", "image,é\n".encode("latin-1")), ("trials.csv", "not a readable", "UTF-8")),
    "empty": (make("trials.csv", b""), ("trials.csv", "columns none found", "wanted image")),
    "no lines": (make("trials.csv", b"image,subject,session,run,trial,is_test\n"), ("trials.csv", "no line")),
    "session of words": (change(4, session="one"), ("line 6", "session 'one'", "whole number")),
    "trial is a fraction": (change(4, trial="1.5"), ("line 6", "trial '1.5'", "whole number")),
    "run is negative": (change(4, run="-1"), ("line 6", "run '-1'", "whole number")),
    "is_test is maybe": (change(4, is_test="maybe"), ("line 6", "is_test 'maybe'", "1 or 0")),
    "subject is a path": (change(0, subject="../x"), ("line 2", "subject '../x'", "letters")),
    "image unknown": (change(4, image="x.png"), ("line 6", "'x.png' not found in images/", "add it")),
    "image without ending": (change(4, image="drawing 001"), ("line 6", "not found", "ending")),
    "image leads out": (change(4, image="../trials.csv"), ("line 6", "'../trials.csv'", "no path inside images/")),
    "image is absolute": (change(4, image="/etc/passwd"), ("line 6", "'/etc/passwd'", "no path inside images/")),
    "image is absent": (lambda d: (d / PICTURE).unlink(), ("drawing 005.png", "not found in images/")),
    "image is no picture": (make(PICTURE, b"png"), ("drawing 005.png", "not a readable picture", "PNG")),
    "image is cut": (lambda d: make(PICTURE, (d / PICTURE).read_bytes()[:200])(d), ("005.png", "not a readable")),
    "a picture to test and to train on": (lambda d: shutil.copy2(d / "images/drawing 006.png", d / PICTURE), (
        "drawing 006.png", "same picture as drawing 005.png", "is_test")),
    "trial twice": (change(5, trial="5"), ("line 7", "anna has session 1, run 1, trial 5 twice", "once")),
    "trials out of order": (change(5, trial="2000"), ("line 8", "anna's session 1, run 1, trial 7 comes after",
                                                      "wanted the order of presentation")),
    "image to test and to train on": (in_both, ("has is_test", "in line 2", "would be trained on")),
    "no test image": (only("0"), ("ben has 0 test images", "wanted at least 1 and 3")),
    "no training image": (only("1"), ("ben has 20 test images (is_test 1) and 0 others",)),
    "betas missing": (lambda d: (d / "betas_ben.npy").unlink(), ("betas_ben", "not found", "wanted .npy")),
    "betas twice": (make("betas_ben.h5", b""), ("betas_ben.npy and betas_ben.h5", "wanted one")),
    "betas of nobody": (make("betas_eve.npy", b""), ("betas_eve.npy", "no trial of eve", "anna, ben")),
    "mask of nobody": (make("mask_eve.npy", b""), ("mask_eve.npy", "no trial of eve")),
    "betas cut": (lambda d: make("betas_ben.npy", (d / "betas_ben.npy").read_bytes()[:5000])(d),
                  ("betas_ben.npy", "not readable")),
    "betas are no file of arrays": (make("betas_ben.npy", b"hello"), ("betas_ben.npy", "not readable")),
    "too few trials": (array("betas_ben.npy", lambda a: a[:-1]), ("betas_ben.npy", "239 trials", "wanted 240")),
    "turned": (array("betas_ben.npy", np.transpose), ("betas_ben.npy", "300 trials", "transpose")),
    "betas of three axes": (array("betas_ben.npy", lambda a: a[:, :, None]), ("(240, 300, 1)", "(trials, voxels)")),
    "betas are words": (array("betas_ben.npy", lambda a: a.astype("<U4")), ("betas_ben.npy", "<U4", "wanted")),
    "NaN": (array("betas_ben.npy", lambda a: first(a, np.nan)), ("1 voxels", "voxel 3 in row 7", "mask")),
    "too large for float32": (array("betas_ben.npy", lambda a: first(a.astype(float), 1e300)), ("voxel 3 in row 7",)),
    "a row of zeros": (array("betas_ben.npy", zeros), ("betas_ben.npy", "row 9 is all zeros")),
    "pickle without betasmd": (lambda d: np.save(d / "betas_ben.npy", {"beta": np.ones(3)}), ("without `betasmd`",)),
    "hdf5 of other keys": (lambda d: ((d / "betas_ben.npy").unlink(), h5py.File(d / "betas_ben.h5", "w").create_dataset(
        "x", data=[1]).file.close()), ("betas_ben.h5", "x found", "wanted `betas`")),
    "not HDF5": (lambda d: ((d / "betas_ben.npy").unlink(), make("betas_ben.h5", b"x")(d)), ("not a readable HDF5",)),
    "volume without mask": (as_volume(mask=None), ("mask_anna.nii.gz not found", "(5, 6, 10)")),
    "mask of another shape": (as_volume(mask_shape=(5, 6, 9)), ("mask_anna.nii.gz", "(5, 6, 9)", "wanted (5, 6, 10)")),
    "mask of another affine": (as_volume(mask_affine=np.diag([2.0, 2, 2.1, 1])), ("mask_anna.nii.gz", "affine", "2.1",
                                                                                   "resample")),
    "mask is empty": (as_volume(mask=0), ("mask_anna.nii.gz", "no voxel")),
    "mask is no volume": (make("mask_ben.nii.gz", b"x"), ("mask_ben.nii.gz", "not a readable NIfTI")),
    "mask of a table of another length": (lambda d: np.save(d / "mask_ben.npy", np.ones(299)), ("(299,)", "(300,)")),
    "region of another shape": (as_volume(region=(np.ones((5, 6, 9), np.uint8), AFFINE)), ("V1.nii.gz", "(5, 6, 9)")),
    "region of another affine": (as_volume(region=(np.ones((5, 6, 10), np.uint8), np.eye(4))), ("V1.nii.gz: affine",)),
    "region is empty": (array("regions_ben/V4.npy", np.zeros_like), ("V4.npy", "no voxel")),
    "region of a wrong name": (lambda d: (d / "regions_ben/V4.npy").rename(d / "regions_ben/V 4.npy"),
                               ("V 4.npy", "rename")),
    "session of test trials": (sessions_of_tests, ("session 1 of anna has 0 training", "--no-zscore")),
    "captions of an unknown image": (rewrite("captions.csv", "drawing 003", "drawing 999"), ("captions.csv: line 5",
                                                                                             "not found")),
    "captions without a column": (rewrite("captions.csv", "caption", "text"), ("captions.csv", "caption is missing")),
    "caption is empty": (make("captions.csv", b"image,caption\ndrawing 003.png,\n"), ("line 2", "no caption of")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(mistake, data, tmp_path, capsys):
    damage, words = MISTAKES[mistake]
    damage(data)
    assert run_import(data, tmp_path / "root") == 2
    found = capsys.readouterr()
    (line,) = [part for part in found.err.splitlines() if not re.search(r"\d+%\|", part)]
    assert line.startswith("error: ") and all(word in line for word in words), line
    assert not (tmp_path / "root").exists()
    assert not list(data.parent.glob("**/*.tmp"))


def test_a_failed_import_leaves_what_was_there(paths, data, capsys):
    before = look(paths.root)
    make("images/drawing 005.png", b"png")(data)
    assert run_import(data, paths.root, "--overwrite") == 2
    np.save(data / "betas_anna.npy", first(np.load(data / "betas_anna.npy"), np.nan))
    Image.new("RGB", (4, 4)).save(data / "images/drawing 005.png")
    assert run_import(data, paths.root, "--overwrite") == 2
    assert look(paths.root) == before


def test_the_same_import_is_kept_and_another_is_refused(paths, whole, data, capsys):
    before = look(paths.root)
    assert run_import(whole, paths.root) == 0 and "imported before, kept" in capsys.readouterr().out
    for flags, words in ((["--no-zscore"], "zscore True, wanted False"),
                         (["--image_size", 40], "image_size 32, wanted 40")):
        assert run_import(whole, paths.root, *flags) == 2
        assert words in (line := capsys.readouterr().err) and "--overwrite" in line
    rewrite("captions.csv", "a circle", "one circle")(data)
    assert run_import(data, paths.root) == 2 and "the folder has changed since" in capsys.readouterr().err
    assert look(paths.root) == before


def test_a_root_with_other_data_is_never_written_to(nsd, whole, capsys):
    paths, before = nsd[0], look(nsd[0].root)
    for flags in ([], ["--overwrite"]):
        assert run_import(whole, paths.root, *flags) == 2
        assert "nsd_expdesign.mat, which no import wrote" in capsys.readouterr().err
    (paths.experiments / "nsd_expdesign.mat").unlink()
    assert run_import(whole, paths.root) == 2 and "which no import wrote" in capsys.readouterr().err
    before.pop(Path("nsddata/experiments/nsd/nsd_expdesign.mat"))
    assert look(paths.root) == before


def test_an_import_replaces_another_whole(paths, data, capsys):
    """Fewer sessions and subjects, another picture: what is not of it any more goes, features of old pictures too."""
    for feat in ("c", "z", "g_2"):
        paths.feature(feat).touch()
    write_table(data, [line for line in table_of(data) if line["subject"] == "anna" and int(line["session"]) < 3])
    np.save(data / "betas_anna.npy", np.load(data / "betas_anna.npy")[:120])
    for file in data.glob("*_ben*"):
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    assert run_import(data, paths.root, "--overwrite") == 0
    assert "others now" not in capsys.readouterr().out and paths.feature("z").exists()
    assert list_subjects(paths) == ["subj01"] and paths.sessions("subj01") == 2
    Image.new("RGB", (9, 5)).save(data / "images/drawing 005.png")
    assert run_import(data, paths.root, "--overwrite", "--data_path", paths.data_path) == 0
    printed = capsys.readouterr().out
    assert "1 images are not square" in printed and "the pictures are others now: 2 files" in printed
    assert [feat for feat in ("c", "z", "g_2") if paths.feature(feat).exists()] == ["c"]
    assert not open_stimuli(paths)[5:6].any()


def test_an_import_that_was_cut_off_is_found_and_finished(paths, whole, capsys):
    known = json.loads(paths.own_data.read_text())
    paths.own_data.write_text(json.dumps({**known, "finished": False}))
    paths.betas("subj02").unlink()
    status, lines = checked(paths, capsys)
    assert status == 1 and any("the import was cut off" in line for line in lines)
    assert run_import(whole, paths.root) == 0
    assert checked(paths, capsys)[0] == 0


def test_what_was_trained_on_is_not_tested_on_later(paths, data, capsys):
    lines = table_of(data)
    for line in lines:
        line["is_test"] = int(line["image"] == "drawing 005.png" or int(line["is_test"]))
    write_table(data, lines)
    for feat in ("c", "z"):
        paths.components(feat).touch()
    run = paths.run("multisubject_subj01_ext1_c_8_mlp") / "last.pth"
    run.parent.mkdir(parents=True)
    run.touch()
    before = look(paths.root)
    assert run_import(data, paths.root, "--overwrite") == 2
    line = capsys.readouterr().err
    assert "drawing 005.png and 0 others are to be tested on now" in line and "move train_logs/ away" in line
    assert look(paths.root) == before
    run.unlink()
    assert run_import(data, paths.root, "--overwrite") == 0
    assert not paths.components("c").exists() and not paths.components("z").exists()
    assert load_test_set(paths, "subj01").image_ids.tolist() == sorted({5, *range(0, 120, 6)})
    run.touch()
    assert run_import(data, paths.root, "--overwrite", "--no-zscore") == 0  # the same test images


def test_a_damaged_record_can_be_imported_over(paths, whole, pristine):
    paths.own_data.write_text("{}")
    assert run_import(whole, paths.root) == 2
    assert run_import(whole, paths.root, "--overwrite") == 0
    before, after = (look(found.root) for found in (pristine, paths))
    before, after = ({name for name in found if not name.name.startswith(".behaviour")} for found in (before, after))
    assert before == after and json.loads(paths.own_data.read_text())["finished"]


def test_a_record_cannot_make_an_import_remove_anything_else(paths, whole, tmp_path):
    run = paths.run("mine") / "last.pth"
    run.parent.mkdir(parents=True)
    kept = [run, tmp_path / "outside"]
    for file in kept:
        file.touch()
    known = json.loads(paths.own_data.read_text())
    known["files"] += [str(kept[1]), "../outside", "train_logs/mine/last.pth", "MindEyeV2/mindeyev2/../../../outside"]
    paths.own_data.write_text(json.dumps(known))
    assert run_import(whole, paths.root, "--overwrite") == 0
    assert all(file.exists() for file in kept)


def test_data_on_another_disk_are_replaced_through_the_link(paths, whole, tmp_path, pristine):
    shutil.move(paths.root / "nsddata_stimuli", tmp_path / "disk")
    (paths.root / "nsddata_stimuli").symlink_to(tmp_path / "disk")
    assert run_import(whole, paths.root, "--overwrite", "--no-zscore") == 0
    assert open_stimuli(paths)[:].tobytes() == open_stimuli(pristine)[:].tobytes()
    assert (paths.root / "nsddata_stimuli").is_symlink() and load_captions(paths)


def test_pictures_are_squared_turned_and_read_in_colour(tmp_path):
    from nsd.own_data import read_image

    half = np.zeros((20, 40, 3), np.uint8)
    half[:, 10:30] = 200  # the middle square
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.fromarray(half).save(tmp_path / "wide.png")
    Image.fromarray(half[:, :, 0]).save(tmp_path / "grey.png")
    top = np.zeros((16, 16, 3), np.uint8)
    top[:8] = 255
    Image.fromarray(top).save(tmp_path / "turned.png", exif=exif)
    for name in ("wide", "grey"):
        picture, was_cut = read_image(tmp_path / f"{name}.png", 20)
        assert was_cut and picture.shape == (20, 20, 3) and (picture == 200).all()
    picture, was_cut = read_image(tmp_path / "turned.png", 16)
    assert not was_cut and (picture[:, 8:] == 255).all() and not picture[:, :8].any()  # the top is at the right
    assert np.array_equal(read_image(tmp_path / "turned.png", 8)[0].shape, (8, 8, 3))


@pytest.mark.parametrize(("names", "numbers"), [
    (["sub-03", "sub-11"], {"sub-03": "subj03", "sub-11": "subj11"}),
    (["a1", "b1"], {"a1": "subj01", "b1": "subj02"}), (["ben", "anna"], {"anna": "subj01", "ben": "subj02"}),
    (["s100", "s2"], {"s100": "subj01", "s2": "subj02"}), (["CSI4", "CSI1"], {"CSI1": "subj01", "CSI4": "subj04"})])
def test_subjects_are_numbered(names, numbers):
    from nsd.own_data import numbers_of

    assert numbers_of(names) == numbers and list(numbers_of(names)) == list(numbers)


# --- check_data.py -----------------------------------------------------------------------------------------------


def checked(paths, capsys, *flags):
    """Exit status and lines of check_data.py for what is imported."""
    capsys.readouterr()
    try:
        status = utils.run_cli(check_data.main, [
            "--root", str(paths.root), "--eval_clip", str(REPO / "demo/models/clip"), "--stages",
            *(flags or ("evaluate", "gnet"))])
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().out.splitlines()


def shards_of_another_subject(paths):
    shutil.copy2(paths.data_path / "wds/subj02/train/0.tar", paths.data_path / "wds/subj01/train/0.tar")


def other_mask(paths):
    np.save(paths.data_path / "shared1000.npy", np.arange(120) % 6 == 1)


def fewer_voxels(paths):
    betas = tiny_read(paths.betas("subj01"), "betas")
    with h5py.File(paths.betas("subj01"), "w") as file:
        file["betas"] = betas[:, 1:]


@pytest.mark.parametrize(("damage", "words"), [
    (lambda paths: None, []), (shards_of_another_subject, ["fail  design: subj01", "COCO_73k_subj_indices"]),
    (other_mask, ["fail  design: shared images", "shared1000.npy"]),
    (fewer_voxels, ["fail  betas: subj01", "(240, 300)"]),
    (lambda paths: paths.betas("subj02").unlink(), ["fail  import", "betas_all_subj02"]),
    (lambda paths: paths.own_data.write_text("{}"), ["own_data.json", "missing", "import"])])
def test_imported_data_are_checked(paths, capsys, damage, words):
    damage(paths)
    if words and "own_data.json" in words:
        assert utils.run_cli(check_data.main, ["--root", str(paths.root)]) == 2
        line = capsys.readouterr().err
        assert all(word in line for word in words), line
        return
    status, lines = checked(paths, capsys)
    assert status == bool(words), lines
    if words:
        assert any(all(word in line for word in words) for line in lines), lines
        assert any(line.endswith("--image_size 32 --overwrite") for line in lines)
    else:
        assert not [line for line in lines if "download" in line or "NSD's volumes" in line]


# --- captions by a BLIP ------------------------------------------------------------------------------------------


def write_tiny_blip(folder, seed=0):
    """A BLIP of random weights, in the folder format of transformers: its sentences mean nothing, but are real."""
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *"abcdefgh"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), additional_special_tokens=["[DEC]"])
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BlipConfig(text_config={**sizes, "encoder_hidden_size": 16, "vocab_size": len(words), "bos_token_id": 5,
                                     "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0,
                                     "max_position_embeddings": 40},
                        vision_config={**sizes, "image_size": 32, "patch_size": 16}, projection_dim=8)
    torch.manual_seed(seed)
    blip = BlipForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in blip.named_parameters():  # so large that other pictures have other words
            if name.startswith("vision_model.embeddings") and ("class" in name or "position" in name):
                weight.zero_()
            elif weight.ndim > 1:
                of_patches = name.endswith("patch_embedding.weight") or "crossattention.output.dense" in name
                weight.normal_(std=1 if of_patches else 0.3)
        blip.text_decoder.cls.predictions.bias[:6] = -1e4  # words alone
    blip.save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def blips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blips")
    return write_tiny_blip(folder / "one"), write_tiny_blip(folder / "two", 1)


def caption(paths, tiny_models, blip, *flags):
    return utils.run_cli(img2feat.main, tiny_features.words(paths, tiny_models, ["c"], "--caption_model", str(blip),
                                                            "--components", "4", *flags))


def test_images_without_a_caption_get_one_by_a_blip(data, tmp_path, tiny_models, blips, capsys):
    paths = paths_of(tmp_path / "root")
    lines = (data / "captions.csv").read_text().splitlines()
    (data / "captions.csv").write_text("\n".join(lines[:91]) + "\n")
    assert run_import(data, paths.root) == 0
    assert "captions: of 90 images; 30 have none: img2feat.py --caption_model writes" in capsys.readouterr().out
    assert utils.run_cli(img2feat.main, tiny_features.words(paths, tiny_models, ["c"])) == 2
    assert "no caption for image 90 and 29 others" in (line := capsys.readouterr().err) and "--caption_model" in line

    assert caption(paths, tiny_models, blips[0]) == 0
    assert "90 of 120 images have some, 30 to write by one@" in capsys.readouterr().out
    texts, by = load_captions(paths), json.loads(paths.generated_captions.read_text())
    assert by["cocoIds"] == [str(image_id) for image_id in range(90, 120)] and by["model"].startswith("one@")
    assert [text for (text,) in texts[:90]] == [line.split(",")[1] for line in lines[1:91]]
    processor = BlipProcessor.from_pretrained(blips[0])  # the sentence of one picture, by the library's plain way
    blip = BlipForConditionalGeneration.from_pretrained(blips[0]).eval()
    picture = Image.fromarray(open_stimuli(paths)[97:98][0])
    words = blip.generate(**processor(images=picture, return_tensors="pt"), max_new_tokens=30, num_beams=3)
    assert texts[97] == [processor.decode(words[0], skip_special_tokens=True).strip()]
    assert len({text for (text,) in texts[90:]}) > 1
    assert len(tiny_features.written(paths, "c")) == 120

    before = paths.captions.read_bytes()
    assert caption(paths, tiny_models, blips[0]) == 0 and "0 to write" in capsys.readouterr().out
    assert caption(paths, tiny_models, blips[1]) == 2 and "captions are by one@" in capsys.readouterr().err
    assert paths.captions.read_bytes() == before
    assert caption(paths, tiny_models, blips[1], "--overwrite") == 0
    assert load_captions(paths)[:90] == texts[:90] and load_captions(paths)[90:] != texts[90:]
    assert run_import(data, paths.root, "--overwrite", "--no-zscore") == 0  # a new import: the BLIP writes again
    assert not paths.generated_captions.exists() and len(json.loads(paths.captions.read_text())) == 90


def test_without_any_caption_check_data_names_the_flag(data, tmp_path, capsys, tiny_models, blips):
    (data / "captions.csv").unlink()
    paths = paths_of(tmp_path / "root")
    assert run_import(data, paths.root) == 0
    status, lines = checked(paths, capsys, "features")
    assert status == 1 and any("--feats c --caption_model DIR" in line for line in lines)
    assert utils.run_cli(img2feat.main, tiny_features.words(paths, tiny_models, ["c"])) == 2
    assert "captions not found; import them" in capsys.readouterr().err
    assert utils.run_cli(img2feat.main, tiny_features.words(paths, tiny_models, ["z"], "--caption_model", "x")) == 2
    assert "add c to --feats" in capsys.readouterr().err
    for wrong, words in ((tmp_path, "could not be loaded"), ("nowhere/at/all", "no such folder")):
        assert caption(paths, tiny_models, wrong) == 2
        assert words in (line := capsys.readouterr().err.strip().splitlines()[-1]) and "--caption_model" in line
    assert not paths.captions.exists() and not paths.feature("c").exists()


# --- starting from other data --------------------------------------------------------------------------------------


SMALL = ["--hidden_dim", "16", "--n_blocks", "1", "--num_workers", "0", "--batch_size", "60", "--num_epochs", "2",
         "--device", "cpu"]


def features(paths, tiny_models, *flags):
    return utils.run_cli(img2feat.main, tiny_features.words(paths, tiny_models, ["c"], *flags))


def test_an_imported_subject_starts_from_a_run_of_other_data(nsd, paths, tiny_models, tmp_path, monkeypatch, capsys):
    """With the components of the other data; its own subj02 is not taken for the other's."""
    other = nsd[0]
    assert features(other, tiny_models) == 0
    assert utils.run_cli(train_c.main, ["--root", str(other.root), "--multi_subject", "--subj", "1", *SMALL]) == 0
    run = other.root / "train_logs/multisubject_subj01_ext1_c_16_mlp"
    finetune = ["--root", str(paths.root), "--subj", "2", *SMALL, "--multisubject_ckpt"]

    assert features(paths, tiny_models, "--components", "10") == 0  # components of its own: they mean something else
    assert utils.run_cli(train_c.main, [*finetune, str(run)]) == 2
    assert "the same numbers mean something else; take over" in (line := capsys.readouterr().err), line
    assert not list(paths.root.glob("train_logs/*/last.pth"))
    assert features(paths, tiny_models, "--components_from", str(other.root)) == 2
    assert "c_components.hdf5: has components" in (line := capsys.readouterr().err) and "delete it" in line

    paths.components("c").unlink()
    monkeypatch.chdir(tmp_path)
    assert features(paths, tiny_models, "--components_from", os.path.relpath(other.root)) == 0
    ours, theirs = open_components(paths, "c"), open_components(other, "c")
    assert np.array_equal(ours.basis, theirs.basis) and np.array_equal(ours.mean, theirs.mean)
    assert ours.digest.startswith(f"{theirs.digest}-") and ours.total == theirs.total
    rows = tiny_features.stored(paths, "c").astype(np.float64)
    assert np.allclose(ours.coefficients, (rows - theirs.mean) @ theirs.basis.T, atol=1e-3)
    assert features(paths, tiny_models, "--components_from", str(other.root)) == 0  # again: kept
    capsys.readouterr()

    assert utils.run_cli(train_c.main, [*finetune, os.path.relpath(run)]) == 0, capsys.readouterr().err
    assert "tensors copied from multisubject_subj01_ext1_c_16_mlp" in capsys.readouterr().out
    weights, pretrained = (torch.load(folder / "last.pth", weights_only=True) for folder in (
        paths.run("pretrained_subj02_4sess_ext1_c_16_mlp"), run))
    assert weights["n_voxels"] == {"subj02": 300} and pretrained["n_voxels"] == {"subj02": 5}
    assert utils.run_cli(score_c.main, ["--root", str(paths.root), "--subj", "2", "--hidden_dim", "16"]) == 0


def test_within_one_root_taken_over_components_serve_both_stages(nsd, paths, tiny_models, capsys):
    assert features(nsd[0], tiny_models) == 0
    assert features(paths, tiny_models, "--components_from", str(nsd[0].root)) == 0
    for flags in (["--multi_subject"], ["--multisubject_ckpt", "auto"]):
        assert utils.run_cli(train_c.main, ["--root", str(paths.root), *SMALL, *flags]) == 0, capsys.readouterr().err
    seen = paths.run("multisubject_subj01_ext1_c_16_mlp")  # of this root: subj02 is the one it has seen
    assert utils.run_cli(train_c.main, ["--root", str(paths.root), "--subj", "2", *SMALL, "--multisubject_ckpt",
                                        str(seen)]) == 2
    assert "has seen subj02" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "words"), [("nowhere", "no such folder"), (".", "is --root itself"),
                                              ("other", "components of c not found")])
def test_components_from_nowhere(paths, tiny_models, given, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    given = str(paths.root) if given == "." else given
    assert features(paths, tiny_models, "--components_from", given) == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1] and not paths.components("c").exists()


def test_components_of_another_network_are_refused(nsd, paths, tiny_models, tmp_path, capsys):
    shutil.copytree(tiny_models[0], tmp_path / "another sd")
    config = tmp_path / "another sd/text_encoder/config.json"
    config.write_text(config.read_text() + "\n")
    assert features(nsd[0], (tmp_path / "another sd", tiny_models[1])) == 0
    assert features(paths, tiny_models, "--components_from", str(nsd[0].root)) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "by another sd@" in line and "by sd@" in line and "by the same model" in line
    assert not paths.components("c").exists()
