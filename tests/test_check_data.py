"""check_data.py on a small NSD in which one thing at a time is broken, and on a layout of NSD's real sizes."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pandas as pd
import pytest
import scipy.io

import check_data
import tiny_nsd
import utils
from disk.names import Paths
from features.components import Fit, create_file, write_components
from nsd import sources
from nsd.checks import SAMPLE
from nsd.components import source_of
from nsd.regions import PRF_LABELS
from nsd.trials import load_trials, read_shard

MODELS = Path(__file__).resolve().parent.parent / "demo/models"
FEATS = {"c": (24, 64), "g_2": (17, 96)}


@pytest.fixture(scope="module")
def whole(small_nsd, tmp_path_factory):
    """A small NSD with two features, in which nothing is wrong."""
    root = tmp_path_factory.mktemp("whole")
    shutil.copytree(small_nsd.root, root, dirs_exist_ok=True)
    paths = Paths(root, root / "MindEyeV2/mindeyev2")
    for feat, shape in FEATS.items():
        write_feature(paths, feat, np.random.default_rng(0).standard_normal((240, *shape)).astype(np.float16))
        write_components(paths, feat, 8)
    return paths


@pytest.fixture
def paths(whole, tmp_path):
    shutil.copytree(whole.root, tmp_path / "root")
    return Paths(tmp_path / "root", tmp_path / "root/MindEyeV2/mindeyev2")


def write_feature(paths, feat, rows):
    with h5py.File(paths.feature(feat), "w") as file:
        file["data"] = rows.reshape(len(rows), -1)
        file["data"].attrs["shape"] = rows.shape[1:]


def examine(paths, capsys, *flags):
    """Exit status and lines of the table."""
    words = ["--root", str(paths.root), "--subj", "1", "3", "--feats", *FEATS, "--sd_model", str(MODELS / "sd"),
             "--clip_model", str(MODELS / "clip"), "--guidance_decoder", str(MODELS / "taesd"), "--eval_clip",
             str(MODELS / "clip"), *flags]
    capsys.readouterr()
    try:
        status = utils.run_cli(check_data.main, words)
    except SystemExit as stop:
        status = stop.code
    output = capsys.readouterr()
    assert "Traceback" not in output.err
    return status, output.out.splitlines()


def test_nothing_is_wrong(paths, capsys):
    for flags in ((), ("--deep",)):
        status, lines = examine(paths, capsys, *flags)
        assert status == 0 and not [line for line in lines if line.startswith("fail")], lines
    found = "\n".join(lines)
    assert "(195, 78) float32, all rows read" in found and "240 images" in found
    assert "37 test images, 3 seen 1x, 11 seen 2x, 23 seen 3x" in found  # subject 3, who missed sessions


def test_a_stage_asks_for_what_it_reads(paths, capsys):
    (paths.stimuli / "nsd_stimuli.hdf5").unlink()
    shutil.rmtree(paths.data_path / "wds/subj03")
    assert examine(paths, capsys, "--stages", "train", "score", "--subj", "1")[0] == 0
    assert examine(paths, capsys, "--stages", "train", "--subj", "1", "3")[0] == 1
    assert examine(paths, capsys, "--stages", "evaluate", "--subj", "1")[0] == 1
    assert examine(paths, capsys, "--stages", "recon")[0] == 0


@pytest.mark.parametrize(("settings", "words", "doubt"), [
    ({}, "contiguous", None), ({"chunks": (1, 64, 64, 3)}, "chunks of (1, 64, 64, 3), not compressed", None),
    ({"chunks": (1, 32, 33, 3), "compression": "gzip"}, "chunks of (1, 32, 33, 3), compressed (deflate)", None),
    ({"chunks": (30, 12, 64, 1)}, "not compressed", "lies in 18 chunks, 34 times its bytes"),
    ({"chunks": (240, 64, 64, 3), "compression": "lzf"}, "(lzf)", "lies in 1 chunks, 240 times its bytes")])
def test_how_the_stimuli_lie_on_the_disk(paths, capsys, settings, words, doubt):
    """Of 64 x 64 pixels. 30 rows of 6 x 3 chunks of 12 x 64 pixels: 30 * 72 / 64 times an image."""
    edit_hdf5(paths.stimuli / "nsd_stimuli.hdf5", lambda file: file.create_dataset(
        "new", data=np.ones((240, 64, 64, 3), np.uint8), **settings))
    edit_hdf5(paths.stimuli / "nsd_stimuli.hdf5", lambda file: (file.pop("imgBrick"), file.move("new", "imgBrick")))
    status, lines = examine(paths, capsys, "--stages", "evaluate", "--subj", "1")
    (line,) = [line for line in lines if " stimuli " in line and "imag" not in line.split()[1]]
    assert words in line and (doubt or "") in line and status == 0, line
    assert line.startswith("warn" if doubt else "ok")


def test_a_list_that_only_this_check_reads(paths, capsys):
    (paths.data_path / "COCO_73k_subj_indices.hdf5").unlink()
    status, lines = examine(paths, capsys, "--stages", "recon", "features")
    found = [line for line in lines if "design: subj" in line]
    assert status == 0 and len(found) == 2, lines
    assert all(line.startswith("warn") and "COCO_73k_subj_indices.hdf5 would confirm: not there" in line for line in
               found)
def test_who_fetched_nsd_synthetic_has_it_checked(paths, capsys):
    def line_of(*flags):
        status, lines = examine(paths, capsys, "--stages", "score", "--subj", "1", *flags)
        return status, [line for line in lines if "NSD-synthetic: subj01" in line], lines[-1]

    status, (line,), _ = line_of()
    assert status == 0
    assert line.endswith("26 trials, 78 voxels; 6 stimuli that all saw and 4 of its own, each shown 2 to 3 times")
    betas, design = paths.synthetic_betas("subj01") / "betas_nsdsynthetic.hdf5", paths.synthetic_design
    own = paths.synthetic / "nsdsynthetic_colorstimuli_subj01.hdf5"
    kept = {file: file.read_bytes() for file in (betas, design, own)}
    order = scipy.io.loadmat(design)["masterordering"]
    damages = {
        "25 trials, wanted 26": lambda: replace(betas, "betas", tiny_nsd.read_hdf5(betas, "betas")[:-1]),
        "9 is the last stimulus, wanted 7": lambda: replace(own, "imgBrick", tiny_nsd.read_hdf5(own, "imgBrick")[:2]),
        "wanted int16": lambda: replace(betas, "betas", tiny_nsd.read_hdf5(betas, "betas").astype(np.float32)),
        "not readable": lambda: scipy.io.savemat(design, {"masterordering": order - 1}),
        "all zeros": lambda: replace(own, "imgBrick", np.zeros_like(tiny_nsd.read_hdf5(own, "imgBrick"))),
    }
    for words, damage in damages.items():
        damage()
        status, (line,), mend = line_of()
        assert status == 1 and line.startswith("fail") and words in line, line
        assert "bash scripts/download.sh --what synthetic --subj 1" in mend and "rm " in mend
        for file, content in kept.items():
            file.write_bytes(content)
    shutil.rmtree(betas.parent)
    assert line_of()[1] == []


def test_an_empty_root_is_one_line(tmp_path, capsys):
    paths = Paths(tmp_path, tmp_path / "MindEyeV2/mindeyev2")
    (tmp_path / "nsddata").mkdir()
    assert examine(paths, capsys) == (1, [
        f"nothing is in {tmp_path} yet: ROOT={tmp_path} bash scripts/download.sh --subj 1 3"])
    assert len(examine(paths, capsys, "--stages", "recon")[1]) > 3  # which needs weights alone
    paths.data_path.mkdir(parents=True)
    (paths.data_path / "shared1000.npy").touch()
    assert len(examine(paths, capsys)[1]) > 20


def test_mindeye2_needs_no_components(paths, capsys):
    paths.components("c").unlink()
    status, lines = examine(paths, capsys, "--model", "mindeye2")
    (line,) = [line for line in lines if "components: c" in line]
    assert status == 0 and line.startswith("warn") and "--model components (the default) and ridge need it" in line
    status, lines = examine(paths, capsys)
    assert status == 1 and any(line.startswith("fail  components: c") and "mindeye2 does not" in line for line in lines)


def test_weights_in_the_older_format_are_weights(paths, capsys):
    for folder in ("sd", "clip"):
        shutil.copytree(MODELS / folder, paths.root / folder)
    for new, old in (("clip/model", "clip/pytorch_model"), ("sd/text_encoder/model", "sd/text_encoder/pytorch_model"),
                     ("sd/unet/diffusion_pytorch_model", "sd/unet/diffusion_pytorch_model")):
        (paths.root / f"{new}.safetensors").rename(paths.root / f"{old}.bin")
    flags = ("--stages", "recon", "--sd_model", str(paths.root / "sd"), "--clip_model", str(paths.root / "clip"))
    assert examine(paths, capsys, *flags)[0] == 0
    (paths.root / "clip/pytorch_model.bin").unlink()
    assert examine(paths, capsys, *flags)[0] == 1


def edit_hdf5(file, edit):
    with h5py.File(file, "r+") as opened:
        edit(opened)


def replace(file, key, array):
    def edit(opened):
        del opened[key]
        opened[key] = array
    edit_hdf5(file, edit)


def cut(file, n=100):
    with open(file, "r+b") as opened:
        opened.truncate(file.stat().st_size - n)


def shards(paths, split="train/1"):
    return paths.data_path / f"wds/subj01/{split}.tar"


def behaviour(paths, change, split="train/1"):
    """Write one of subject 1's shards again, its behav rows changed."""
    rows = read_shard(shards(paths, split))
    tiny_nsd.write_tar(shards(paths, split), change(rows))


def with_column(column, value):
    def change(rows):
        rows[0, column] = value(rows[0, column]) if callable(value) else value
        return rows
    return change


def other_design(paths):
    file = paths.experiments / "nsd_expdesign.mat"
    design = scipy.io.loadmat(file)
    design["subjectim"][0, [0, 1]] = design["subjectim"][0, [1, 0]]
    scipy.io.savemat(file, {name: value for name, value in design.items() if not name.startswith("__")})


def fewer_captions(paths):
    captions = json.loads(paths.captions.read_text())
    captions.popitem()
    paths.captions.write_text(json.dumps(captions))


def other_shared(paths):
    file = paths.data_path / "shared1000.npy"
    np.save(file, np.roll(np.load(file), 1))


def volumes_in_other_order(paths):
    file, where = (paths.rois("subj01") / f"{name}.nii.gz" for name in ("prf-visualrois", "nsdgeneral"))
    volume, inside = nibabel.load(file), np.asarray(nibabel.load(where).dataobj) == 1
    labels = np.asarray(volume.dataobj).copy()
    labels[inside] = labels[inside][::-1]
    nibabel.save(nibabel.Nifti1Image(labels, volume.affine), file)


def nan_in(file, key, row):
    edit_hdf5(file, lambda opened: opened[key].__setitem__((row, 0), np.nan))


def folder_without(paths, part):
    shutil.copytree(MODELS / "sd", paths.root / "sd")
    cut(paths.root / "sd" / part)


BETAS = "bash scripts/download.sh --what betas --subj 1 --verify"
TRIALS = "bash scripts/download.sh --what trials --subj 1 --verify"
DEFECTS = {  # what is broken: (how, words of the line that names it, words of the command that repairs it, flags)
    "betas are cut": (lambda p: cut(p.betas("subj01")), ["betas: subj01", "betas_all_subj01"], BETAS),
    "betas are missing": (lambda p: p.betas("subj01").unlink(), ["betas: subj01", "not found"], BETAS),
    "betas under another key": (lambda p: edit_hdf5(p.betas("subj01"), lambda f: f.move("betas", "data")),
                                ["betas: subj01", "`betas`"], BETAS),
    "betas of another type": (lambda p: replace(p.betas("subj01"), "betas", np.ones((195, 78))),
                              ["betas: subj01", "float64", "wanted float32"], BETAS),
    "betas with fewer trials": (lambda p: replace(p.betas("subj01"), "betas", np.ones((190, 78), np.float32)),
                                ["betas: subj01", "190 trials", "wanted 195"], BETAS),
    "NaN in the betas": (lambda p: nan_in(p.betas("subj01"), "betas", 101), ["row 101", "NaN"], BETAS, "--deep"),
    "a hole in the betas": (lambda p: edit_hdf5(p.betas("subj01"), lambda f: f["betas"].__setitem__(101, 0)),
                            ["row 101", "all zeros"], BETAS, "--deep"),
    "a shard is cut": (lambda p: cut(shards(p), 1024), ["train/1.tar", "truncated"], TRIALS),
    "a shard is missing": (lambda p: shards(p).unlink(), ["trials: subj01", "without a gap"], TRIALS),
    "the last shard is missing": (lambda p: shards(p, "train/4").unlink(), ["trials: subj01", "are missing"], TRIALS),
    "a test image among the training's": (
        lambda p: behaviour(p, with_column(16, 1)), ["trials: subj01", "show a shared image"], TRIALS),
    "a trial shows another image": (lambda p: behaviour(p, with_column(0, lambda i: i + 1)),
                                    ["trials: subj01", "expdesign"], TRIALS),
    "a trial in two shards": (lambda p: shutil.copy(shards(p, "train/0"), shards(p, "train/2")),
                              ["trials: subj01", "twice"], TRIALS),
    "a member that is no array": (lambda p: spoil_member(shards(p)), ["train/1.tar", "not a readable shard"], TRIALS),
    "old test trials that are not the new one's": (
        lambda p: shutil.copy(shards(p, "new_test/0"), shards(p, "test/0")) and behaviour(
            p, lambda rows: rows[:-1], "new_test/0"), ["old test trials: subj01", "new_test does not have"], TRIALS),
    "another subject's design": (other_design, ["design: subj01", "expdesign"], "nsd_expdesign.mat; "),
    "the design is cut": (lambda p: cut(p.experiments / "nsd_expdesign.mat", 3000), ["nsd_expdesign.mat: not readable"],
                          "rm "),
    "other shared images": (other_shared, ["shared1000.npy", "of which"], "download.sh --what design"),
    "a table without a row": (lambda p: drop_row(p), ["nsdId is not"], "nsd_stim_info_merged.csv; "),
    "an image without caption": (fewer_captions, ["no caption for image"], "download.sh --what captions"),
    "stimuli under another key": (
        lambda p: edit_hdf5(p.stimuli / "nsd_stimuli.hdf5", lambda f: f.move("imgBrick", "images")),
        ["stimuli", "`imgBrick`"], "nsd_stimuli.hdf5; "),
    "stimuli are cut": (lambda p: cut(p.stimuli / "nsd_stimuli.hdf5"), ["nsd_stimuli.hdf5", "not readable"],
                        "download.sh --what stimuli"),
    "masks of other voxels": (
        lambda p: replace(p.data_path / "brain_region_masks.hdf5", "subj01/V1", np.ones(77, bool)),
        ["regions: subj01", "V1", "(77,)"], "download.sh --what masks rois --subj 1"),
    "volumes in another order": (volumes_in_other_order, ["regions: subj01", "wanted the same"], "--what masks rois"),
    "a feature of fewer images": (lambda p: write_feature(p, "c", np.ones((239, 24, 64), np.float16)),
                                  ["feature: c", "239 rows, wanted 240"], "features.sh --feats c --overwrite"),
    "NaN in a feature": (lambda p: nan_in(p.feature("g_2"), "data", 0), ["feature: g_2", "row 0", "NaN"],
                         "features.sh --feats g_2 --overwrite", "--deep"),
    "a feature that is unfinished": (
        lambda p: edit_hdf5(p.feature("c"), lambda f: f.create_dataset("written", data=np.arange(240) > 0)),
        ["feature: c", "239 of 240 rows"], "features.sh --feats c"),
    "components that are missing": (lambda p: p.components("c").unlink(), ["components: c", "not found"],
                                    "-> ROOT bash scripts/features.sh --feats c"),
    "components of another feature file": (
        lambda p: write_feature(p, "c", np.ones((240, 24, 64), np.float16)),
        ["components: c", "made from a feature file of rows"], "c_components.hdf5; ROOT bash scripts/features.sh"),
    "components that are unfinished": (
        lambda p: edit_hdf5(p.components("c"), lambda f: f["written"].write_direct(np.arange(240, dtype=np.uint8) % 2)),
        ["components: c", "120 of 240 rows"], "-> ROOT bash scripts/features.sh --feats c"),
    "NaN in coefficients": (lambda p: nan_in(p.components("g_2"), "data", 0), ["components: g_2", "row 0", "NaN"],
                            "g_2_components.hdf5; ROOT bash scripts/features.sh --feats g_2", "--deep"),
    "a feature that is missing": (lambda p: p.feature("g_2").unlink(), ["feature: g_2", "not found"],
                                  "bash scripts/features.sh"),
    "weights are cut": (lambda p: folder_without(p, "vae/diffusion_pytorch_model.safetensors"),
                        ["weights: sd", "vae/diffusion_pytorch_model.safetensors", "not readable"], "--sd_model",
                        "--sd_model", "ROOT/sd"),
    "weights that are not in the cache": (lambda p: None, ["weights: clip", "no/such", "not found in the cache"],
                                          "bash scripts/download.sh --what clip", "--clip_model", "no/such"),
}


def spoil_member(shard):
    with tarfile.open(shard) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar.getmembers()]
    with tarfile.open(shard, "w") as tar:
        for member, content in members:
            tar.addfile(member, io.BytesIO(b"?" * len(content)))


def drop_row(paths):
    file = paths.experiments / "nsd_stim_info_merged.csv"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:7] + lines[8:]))


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_found_and_mended_by_a_command(paths, capsys, defect):
    break_it, words, command, *flags = DEFECTS[defect]
    command = command.replace("ROOT", f"ROOT={paths.root}")
    break_it(paths)
    status, lines = examine(paths, capsys, *(flag.replace("ROOT", str(paths.root)) for flag in flags))
    failed = [number for number, line in enumerate(lines) if line.startswith("fail")]
    named = [number for number in failed if all(word in lines[number] for word in words)]
    assert status == 1 and named, "\n".join(lines)
    assert ("--overwrite" in command) == ("--overwrite" in lines[named[0] + 1])  # which loses what is there
    assert command in lines[named[0] + 1] and lines[named[0] + 1].strip().startswith("-> "), lines[named[0] + 1]
    assert lines.index("to repair what failed, run in this order:") > named[0]


# --- NSD's real sizes ----------------------------------------------------------------------------------------------


def sparse_hdf5(path, key, shape, dtype, rows):
    """A contiguous data set of its real size on disk, of which only some rows are written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        space, stored = h5py.h5s.create_simple(shape), h5py.h5t.py_create(np.dtype(dtype))
        dataset = h5py.Dataset(h5py.h5d.create(file.id, key.encode(), stored, space, plist))
        for row in rows:
            dataset[row, :1] = 1


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Subject 4 of NSD, whose two missing sessions' trials exist in the design only; files sparse, of real sizes."""
    root = tmp_path_factory.mktemp("real")
    paths, rng = Paths(root, root / "MindEyeV2/mindeyev2"), np.random.default_rng(0)
    n, n_voxels, n_test, _ = sources.PUBLISHED["subj04"]
    shared = np.sort(rng.choice(73000, 1000, replace=False))
    ordering = np.concatenate([rng.permutation(10000) for _ in range(3)]) + 1
    subjectim = np.zeros((8, 10000), np.int32)
    own = np.setdiff1d(np.arange(73000), shared)[:9000]
    subjectim[3] = np.concatenate([shared, own]) + 1
    shown = subjectim[3][ordering - 1] - 1
    # the published number of test trials, 2188: let as many of the first 22500 show a shared image
    is_test = np.flatnonzero(np.isin(shown[:n], shared))
    others = np.flatnonzero(~np.isin(shown[:n], shared))
    for trial in is_test[n_test:]:
        ordering[trial] = ordering[others[trial % len(others)]]
    for trial in others[:max(0, n_test - len(is_test))]:
        ordering[trial] = ordering[is_test[trial % len(is_test)]]
    shown = subjectim[3][ordering - 1] - 1
    paths.experiments.mkdir(parents=True)
    scipy.io.savemat(paths.experiments / "nsd_expdesign.mat", {
        "masterordering": ordering, "subjectim": subjectim, "sharedix": shared + 1})
    pd.DataFrame({"cocoId": np.arange(73000) + 7, "nsdId": np.arange(73000), "shared1000":
                  np.isin(np.arange(73000), shared)}).to_csv(paths.experiments / "nsd_stim_info_merged.csv")
    paths.captions.parent.mkdir(parents=True)
    paths.captions.write_text(json.dumps({str(i + 7): ["a", "b"] for i in range(73000)}))

    samples = {size: np.unique(np.linspace(0, size - 1, SAMPLE).astype(int)) for size in (n, 73000)}
    sparse_hdf5(paths.betas("subj04"), "betas", (n, n_voxels), np.float32, samples[n])
    sparse_hdf5(paths.stimuli / "nsd_stimuli.hdf5", "imgBrick", (73000, 425, 425, 3), np.uint8, samples[73000])
    seen = np.unique(shown[:n])
    looked_at = seen[np.unique(np.linspace(0, len(seen) - 1, SAMPLE).astype(int))]
    for feat, width in (("c", 59136), ("g_2", 38400)):
        sparse_hdf5(paths.feature(feat), "data", (73000, width), np.float16, looked_at)
        fit = Fit(np.zeros(width), np.zeros((4, width), np.float32), np.ones(4), 5.0, 20000)
        settings = {"source": source_of(paths.feature(feat)), "seed": 0, "wanted": 4}
        create_file(paths, feat, fit, 73000, (width // 768, 768), settings)
        with h5py.File(paths.components(feat), "r+") as file:
            file["data"][...] = file["written"][...] = 1
    np.save(paths.data_path / "shared1000.npy", np.isin(np.arange(73000), shared))
    with h5py.File(paths.data_path / "COCO_73k_subj_indices.hdf5", "w") as file:
        file["subj04"] = shown[:n]
    masks = np.array_split(rng.permutation(n_voxels), 5)
    with h5py.File(paths.data_path / "brain_region_masks.hdf5", "w") as file:
        for name, voxels in zip((*PRF_LABELS, "higher_vis"), masks, strict=True):
            file[f"subj04/{name}"] = np.isin(np.arange(n_voxels), voxels)

    behav = np.full((n, 17), -1.0)
    behav[:, 0], behav[:, 1], behav[:, 5] = shown[:n], 4, np.arange(n)
    behav[:, 2], behav[:, 16] = 1 + np.arange(n) // 750, np.isin(shown[:n], shared)
    shards = {f"train/{k}": behav[(behav[:, 16] == 0) & (behav[:, 2] == k + 1)] for k in range(30)}
    shards |= {"new_test/0": behav[behav[:, 16] == 1], "test/0": behav[behav[:, 16] == 1][:1985]}
    keep_unpacked(paths, shards)
    return paths


def keep_unpacked(paths, shards):
    """Leave subject 4's shards {name: behav (trials, 17)} as load_trials does when it has unpacked them."""
    folder = paths.data_path / "wds/subj04"
    for name in shards:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.tar").write_bytes(b"unpacked already")
    with pytest.MonkeyPatch.context() as context:
        context.setattr("nsd.trials.read_shard", lambda path: shards[str(path.relative_to(folder))[:-4]])
        for split in ("train", "new_test", "test"):
            load_trials(paths, "subj04", split)


def test_files_of_the_real_sizes(real, capsys):
    assert (real.stimuli / "nsd_stimuli.hdf5").stat().st_size > 39.5e9
    assert os.stat(real.stimuli / "nsd_stimuli.hdf5").st_blocks * 512 < 1e9
    status, lines = examine(real, capsys, "--subj", "4")
    assert status == 0, "\n".join(lines)
    found = "\n".join(lines)
    for words in ("(22500, 13153) float32", "(73000, 425, 425, 3) uint8", "(73000, 77, 768) float16",
                  "4 keep 80.0 % of the variance", "146000 captions of 73000 images", "30 sessions", "1985 trials",
                  "checkpoints 2.4 GB"):
        assert words in found, words


def test_published_numbers_are_known(real, capsys, tmp_path):
    """Betas of another subject have other voxels, a data set cut short other sessions."""
    copy = tmp_path / "MindEyeV2/mindeyev2"
    shutil.copytree(real.data_path, copy, ignore=shutil.ignore_patterns("betas*"))
    for folder in ("nsddata", "nsddata_stimuli"):
        (tmp_path / folder).symlink_to(real.root / folder)
    paths = Paths(tmp_path, copy)
    sparse_hdf5(paths.betas("subj04"), "betas", (30000, 15724), np.float32, [])
    (copy / "wds/subj04/train/29.tar").unlink()
    status, lines = examine(paths, capsys, "--subj", "4", "--stages", "score")
    assert status == 1
    assert any("(30000, 15724) trials x voxels, wanted (22500, 13153)" in line for line in lines)
    assert any(line.startswith("fail  trials: subj04") for line in lines)


def test_missing_features_of_nsd_need_room(real, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1e9}))
    status, lines = examine(real, capsys, "--subj", "4", "--feats", "z")
    assert status == 1
    assert any(line.startswith("fail  disk") and "features to write 2.8 GB" in line for line in lines), lines
