"""Feature files of img2feat.py: kept, refused, gone on with after an interrupt, a kill or a full disk."""

import errno
import os
import resource
import subprocess
import sys

import h5py
import numpy as np
import pytest

import img2feat
import models
import tiny_nsd
import tiny_sd
import utils
from features import extraction
from features.makers import TextFeatures
from nsd.components import open_components
from nsd.rows import open_feature
from tiny_features import FEATS, saw, stored, words, written


def stop_in_batch(monkeypatch, number, act):
    """Call `act` in CLIP's pass number `number`, before it computes."""
    calls, forward = [], models.ClipFeatures.forward

    def counted(self, image):
        calls.append(1)
        if len(calls) == number:
            act()
        return forward(self, image)

    monkeypatch.setattr(models.ClipFeatures, "forward", counted)


def interrupt():
    raise KeyboardInterrupt


def test_files_can_be_mapped_and_say_what_made_them(paths, extract):
    extract()
    for feat in FEATS:
        with h5py.File(paths.feature(feat), "r") as file:
            dataset = file["data"]
            assert dataset.ndim == 2 and len(dataset) == tiny_nsd.N_IMAGES
            assert dataset.chunks is None and dataset.id.get_offset() is not None
            assert dataset.attrs["model"].startswith("clip@" if feat.startswith("g") else "sd@")
            assert np.prod(dataset.attrs["shape"]) == dataset.shape[1]
    assert [file.name for file in paths.stimuli.glob(".*")] == []  # no temporary file is left


def test_files_that_are_there_are_kept(paths, extract, capsys):
    extract(feats=["c", "g_2"])
    before = paths.feature("c").stat().st_mtime_ns, paths.feature("g_2").stat().st_mtime_ns
    capsys.readouterr()
    extract(feats=["c", "g_2", "g_4"])  # g_4 is new
    printed = capsys.readouterr().out
    assert "c_all.hdf5: kept" in printed and "g_2_all.hdf5: kept" in printed and "g_4_all.hdf5: wrote 24" in printed
    assert before == (paths.feature("c").stat().st_mtime_ns, paths.feature("g_2").stat().st_mtime_ns)


def test_files_by_another_model_or_of_other_stimuli_are_refused(paths, extract, tmp_path, capsys):
    extract(feats=["g_2", "c"])
    other = tiny_sd.write_tiny_clip(tmp_path / "other/clip", blocks=3)  # a folder of the same name
    with pytest.raises(utils.UserError, match=r"g_2_all.hdf5: its model is clip@\w+, wanted clip@\w+; give"):
        extract(feats=["g_2"], clip=other)
    extract("--overwrite", feats=["g_2"], clip=other)

    captions = paths.stimuli / "annotations/nsd_captions.json"
    captions.write_text(captions.read_text().replace('"ab"', '"b a b"'))
    with pytest.raises(utils.UserError, match="c_all.hdf5: its source"):
        extract(feats=["c"])
    with h5py.File(paths.stimuli / "nsd_stimuli.hdf5", "r+") as file:
        file["imgBrick"][...] = 255 - file["imgBrick"][()]
    with pytest.raises(utils.UserError, match="g_2_all.hdf5: its source"):
        extract(feats=["g_2"], clip=other)
    with h5py.File(paths.feature("z"), "w") as file:  # not ours: kept from harm
        file["data"] = np.zeros((24, 3))
    with pytest.raises(utils.UserError, match="z_all.hdf5: its model is unknown"):
        extract(feats=["z"])
    paths.feature("z").write_bytes(b"\x89HDF")
    with pytest.raises(utils.UserError, match="z_all.hdf5: not readable"):
        extract(feats=["z"])


@pytest.mark.parametrize("chunks", [None, (1, 1, 1024)])
def test_a_file_of_neuraldiffuser_is_kept_and_read(paths, extract, capsys, chunks):
    """(N, 1, width) float32 of Stable Diffusion 1.x and ViT-B/32, whatever models are given; chunked or not.

    Its components are written beside it.
    """
    rng = np.random.default_rng(0)
    for feat, shape in (("g_2", (50, 768)), ("z", (4, 64, 64)), ("c", (77, 768))):
        array = rng.standard_normal((24, 1, np.prod(shape))).astype(np.float32)
        with h5py.File(paths.feature(feat), "w") as file:
            file.create_dataset("data", data=array, chunks=chunks)
        before = paths.feature(feat).read_bytes()
        extract(feats=[feat])
        kept = f"{feat}_all.hdf5: kept (24 of 24 rows are there, float32, made by another program)"
        assert kept in capsys.readouterr().out and paths.feature(feat).read_bytes() == before
        np.testing.assert_array_equal(open_feature(paths, feat)[[3, 1]], array[[3, 1]].reshape(2, *shape))
        components = open_components(paths, feat)
        assert components.k == 19 and components.shape == shape and components.kept == pytest.approx(1, abs=1e-4)
        fitted = next(i for i in range(24) if i not in tiny_nsd.SHARED)
        np.testing.assert_allclose(components.reconstruct(components.coefficients[[fitted]]).ravel(), array[fitted, 0],
                                   atol=1e-3)


def test_a_file_of_another_program_is_kept_when_its_rows_suit_the_models(paths, extract, capsys):
    def put(*shape):
        with h5py.File(paths.feature("g_2"), "w") as file:
            file["data"] = np.ones(shape, np.float32)

    put(24, 5, 12)  # the tiny CLIP's
    extract(feats=["g_2"])
    assert "made by another program" in capsys.readouterr().out
    wrong = {(24, 60): r"model is unknown \(rows of shape \(60,\)\)", (5, 1, 38400): "rows is 5, wanted 24"}
    for shape, message in wrong.items():
        put(*shape)
        with pytest.raises(utils.UserError, match=f"g_2_all.hdf5: its {message}"):
            extract(feats=["g_2"])


def test_a_file_of_ours_from_before_the_flags_is_whole(paths, extract, capsys):
    extract(feats=["g_2"])
    with h5py.File(paths.feature("g_2"), "r+") as file:
        del file["written"]
    before = paths.feature("g_2").read_bytes()
    extract(feats=["g_2"])
    assert "g_2_all.hdf5: kept (24 of 24" in capsys.readouterr().out and paths.feature("g_2").read_bytes() == before


def test_a_row_that_is_not_written_is_refused(nsd, extract):
    paths, shown = nsd
    extract("--subj", "1", feats=["g_2"])
    rows, seen = open_feature(paths, "g_2"), saw(shown, "subj01")
    unseen = next(i for i in range(24) if i not in seen)
    assert rows[seen].shape == (14, 5, 12)
    words = rf"g_2_all.hdf5: image id {unseen} is not written yet, 14 of 24 rows are there; continue with bash " \
            "scripts/features.sh --feats g_2$"
    for ids in ([seen[0], unseen], slice(None)):
        with pytest.raises(utils.UserError, match=words):
            rows[ids]
    extract(feats=["g_2"])
    assert len(open_feature(paths, "g_2")[:]) == 24


def test_a_file_that_is_not_finished_goes_on_in_its_own_type(nsd, extract):
    paths, _ = nsd
    extract("--subj", "1", "--dtype", "float32", feats=["g_2"])
    with pytest.raises(utils.UserError, match="g_2_all.hdf5: its type is float32, wanted float16"):
        extract(feats=["g_2"])
    extract("--dtype", "float32", feats=["g_2"])
    extract(feats=["g_2"])  # finished: kept, as it is


def test_an_interrupted_run_keeps_what_it_wrote_and_goes_on(paths, extract, monkeypatch, capsys):
    extract(feats=["g_2", "g_4"])
    whole = {feat: paths.feature(feat).read_bytes() for feat in ("g_2", "g_4")}
    with monkeypatch.context() as context:
        stop_in_batch(context, 3, interrupt)
        with pytest.raises(KeyboardInterrupt):
            extract("--overwrite", feats=["g_2", "g_4"])
    assert written(paths, "g_2") == written(paths, "g_4") == list(range(14)) and list(paths.stimuli.glob(".*")) == []
    batches = []
    stop_in_batch(monkeypatch, 1, lambda: batches.append(1))
    capsys.readouterr()
    extract(feats=["g_2", "g_4"])
    assert capsys.readouterr().out.count("wrote 10 rows, 24 of 24 are there") == 2
    assert {feat: paths.feature(feat).read_bytes() for feat in whole} == whole


def test_a_block_with_a_row_missing_is_computed_whole_and_written_where_it_lacks(paths, extract, monkeypatch):
    extract(feats=["g_2"])
    before = stored(paths, "g_2")
    with h5py.File(paths.feature("g_2"), "r+") as file:
        file["written"][9] = 0
        file["data"][8:10] = 7
    sizes, forward = [], models.ClipFeatures.forward
    monkeypatch.setattr(models.ClipFeatures, "forward",
                        lambda self, image: sizes.append(len(image)) or forward(self, image))
    extract(feats=["g_2"])
    assert sizes == [7] and (stored(paths, "g_2")[8] == 7).all() and written(paths, "g_2") == list(range(24))
    np.testing.assert_array_equal(np.delete(stored(paths, "g_2"), 8, 0), np.delete(before, 8, 0))


# One process imports what the script needs, then forks for each run: a run starts at once, and is killed as its own.
RUN_AND_KILL = """
import multiprocessing, random, sys, time
from pathlib import Path
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTokenizer
import img2feat, models, training.team
from features.extraction import FeatureFile
from features.makers import TextFeatures

def rows(file):
    return FeatureFile(file).written.sum() if file.exists() else 0

TextFeatures.block_size = 1
folder, words = Path(sys.argv[1]), sys.argv[2:]
for feat in ("c", "z", "g_2"):  # g_2 and g_4 are made together
    process = multiprocessing.get_context("fork").Process(target=img2feat.main, args=(words,))
    process.start()
    while process.is_alive() and not rows(folder / f"{feat}_all.hdf5"):
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.02))
    process.kill()
    process.join()
    print(f"killed after {rows(folder / (feat + '_all.hdf5'))}", flush=True)
"""


def test_a_run_killed_at_random_moments_and_run_again_equals_an_uninterrupted_one(paths, tiny_models, extract,
                                                                                  monkeypatch):
    """kill -9 of the script, one image in a batch, and one in a block of c."""
    monkeypatch.setattr(TextFeatures, "block_size", 1)
    extract("--batch_size", "1")
    whole = {feat: paths.feature(feat).read_bytes() for feat in FEATS}
    for feat in FEATS:
        paths.feature(feat).unlink()
    flags = words(paths, tiny_models, FEATS, "--batch_size", "1")
    done = subprocess.run([sys.executable, "-c", RUN_AND_KILL, paths.stimuli, *flags], capture_output=True, text=True,
                          check=False, env={**os.environ, "PYTHONPATH": str(utils.REPOSITORY / "src")})
    assert done.returncode == 0, done.stderr
    kept = [int(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("killed after ")]
    assert len(kept) == 3 and any(0 < n < tiny_nsd.N_IMAGES for n in kept), done.stdout
    extract("--batch_size", "1")
    assert {feat: paths.feature(feat).read_bytes() for feat in FEATS} == whole


def test_a_full_disk_is_one_line_and_keeps_what_is_written(paths, tiny_models, extract, monkeypatch, capsys):
    extract(feats=["g_2", "g_4"])
    whole, limits = {feat: paths.feature(feat).read_bytes() for feat in ("g_2", "g_4")}, (
        resource.getrlimit(resource.RLIMIT_FSIZE))
    with h5py.File(paths.feature("g_2"), "r") as file:
        middle = file["data"].id.get_offset() + 17 * 60 * 2 + 30  # in a row of the third batch

    blocks, write_block = [], extraction.write_block

    def fill_the_disk(*block):
        blocks.append(block)
        if len(blocks) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (middle, limits[1]))
        write_block(*block)

    with monkeypatch.context() as context:
        context.setattr(extraction, "write_block", fill_the_disk)
        command = words(paths, tiny_models, ["g_2", "g_4"], "--overwrite")
        try:
            assert utils.run_cli(img2feat.main, command) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "g_2_all.hdf5: could not be written (File too large); make room on the disk and run the same" in error
    assert written(paths, "g_2") == list(range(14))
    extract(feats=["g_2", "g_4"])
    assert {feat: paths.feature(feat).read_bytes() for feat in whole} == whole


@pytest.mark.parametrize("room", [10**6, 1000])
def test_a_disk_that_takes_parts_and_is_then_full(paths, tiny_models, extract, monkeypatch, capsys, room):
    """As a real one: some of the bytes go in, then none; but the flags, whose place is taken already, still do."""
    extract(feats=["g_2"])
    whole, left, pwrite = paths.feature("g_2").read_bytes(), room, os.pwrite
    with h5py.File(paths.feature("g_2"), "r") as file:
        flags_at = file["written"].id.get_offset()

    def filling(descriptor, content, offset):
        nonlocal left
        if offset >= flags_at:
            return pwrite(descriptor, content, offset)
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        n = pwrite(descriptor, content[:min(left, 77)], offset)
        left -= n
        return n

    with monkeypatch.context() as context:
        context.setattr(os, "pwrite", filling)
        status = utils.run_cli(img2feat.main, words(paths, tiny_models, ["g_2"], "--overwrite"))
    if room == 1000:  # less than the second batch needs
        assert status == 2 and "could not be written (No space left on device)" in capsys.readouterr().err
        assert written(paths, "g_2") == list(range(7))
        extract(feats=["g_2"])
    assert paths.feature("g_2").read_bytes() == whole


def test_not_enough_disk(paths, extract, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 100}))
    with pytest.raises(utils.UserError, match="c_all.hdf5: needs .* are free"):
        extract(feats=["c"])
    with pytest.raises(utils.UserError, match="g_2_all.hdf5, g_4_all.hdf5: needs"):  # together
        extract(feats=["g_2", "g_4"])
    assert not list(paths.stimuli.glob("*_all.hdf5"))
