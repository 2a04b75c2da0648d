"""img2feat.py on tiny random models, against the same models asked one image and one caption at a time."""

import errno
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from transformers import CLIPTextModel, CLIPVisionModel

import img2feat
import models
import tiny_nsd
import tiny_sd
import utils
from nsd.captions import load_captions
from nsd.rows import open_feature
from training.team import Team

FEATS = ["c", "z", "g_2", "g_4"]
REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return tiny_sd.write_tiny_sd(folder / "sd"), tiny_sd.write_tiny_clip(folder / "clip")


@pytest.fixture
def nsd(tmp_path):
    return tiny_nsd.write_tiny_nsd(tmp_path)


@pytest.fixture
def paths(nsd):
    return nsd[0]


@pytest.fixture
def extract(paths, folders):
    """Run the script with the tiny models."""
    def run(*flags, feats=FEATS, sd=folders[0], clip=folders[1]):
        img2feat.main(words(paths, (sd, clip), feats, *flags))
    return run


def words(paths, folders, feats, *flags):
    return ["--root", str(paths.root), "--sd_model", str(folders[0]), "--clip_model", str(folders[1]), "--batch_size",
            "7", "--num_workers", "0", "--device", "cpu", "--feats", *feats, *flags]


def stored(paths, feat):
    with h5py.File(paths.feature(feat), "r") as file:
        return file["data"][()]


def written(paths, feat):
    """Ids of the images whose rows are there."""
    with h5py.File(paths.feature(feat), "r") as file:
        return np.flatnonzero(file["written"][()]).tolist()


def saw(shown, *subjects):
    """Ids of the images that the subjects saw, ascending."""
    return sorted({int(image_id) for subj in subjects for image_id in shown[subj]})


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


def images(paths):
    with h5py.File(paths.stimuli / "nsd_stimuli.hdf5", "r") as file:
        return file["imgBrick"][()]


def test_c_is_the_mean_over_the_captions(paths, folders, extract):
    extract("--dtype", "float32", feats=["c"])
    pipeline = StableDiffusionPipeline.from_pretrained(folders[0], safety_checker=None)
    with torch.no_grad():
        for row, texts in zip(stored(paths, "c"), load_captions(paths), strict=True):
            embeddings = [pipeline.encode_prompt(text, "cpu", 1, False)[0] for text in texts]
            wanted = torch.cat(embeddings).mean(0)
            np.testing.assert_allclose(row.reshape(wanted.shape), wanted, atol=1e-5)
    assert open_feature(paths, "c").row_shape == (tiny_sd.TOKENS, tiny_sd.WIDTH)


@pytest.mark.parametrize("block", [256, 5])
def test_a_caption_is_encoded_once_in_a_block(paths, extract, monkeypatch, block):
    """Not once in all: what was encoded before a run was killed would change what comes after."""
    encoded, forward = [], CLIPTextModel.forward

    def count(self, input_ids, **kwargs):
        encoded.extend(tuple(ids.tolist()) for ids in input_ids)
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(img2feat.TextFeatures, "block_size", block)
    monkeypatch.setattr(CLIPTextModel, "forward", count)
    extract(feats=["c"])
    captions = load_captions(paths)
    distinct = [{text for texts in captions[i:i + block] for text in texts} for i in range(0, len(captions), block)]
    assert len(encoded) == sum(map(len, distinct)) and (block == 5 or len(encoded) == 6)


def test_z_is_the_scaled_posterior_mean_of_the_resized_stimulus(paths, folders, extract):
    extract("--dtype", "float32", feats=["z"])
    vae = AutoencoderKL.from_pretrained(folders[0] / "vae")
    processor = VaeImageProcessor(resample="lanczos")
    side = 2 * tiny_sd.LATENT  # 16 pixels, from stimuli of 10
    with torch.no_grad():
        for row, image in zip(stored(paths, "z"), images(paths), strict=True):
            pixels = processor.preprocess(Image.fromarray(image), side, side)  # diffusers' own resize, to [-1, 1]
            wanted = vae.encode(pixels).latent_dist.mean[0] * 0.5  # the tiny VAE's scaling factor
            np.testing.assert_allclose(row.reshape(wanted.shape), wanted, atol=1e-5)
    assert open_feature(paths, "z").row_shape == (4, tiny_sd.LATENT, tiny_sd.LATENT)


def test_g_is_what_leaves_the_mlp(paths, folders, extract):
    extract("--dtype", "float32", feats=["g_4", "g_2"])
    vision = CLIPVisionModel.from_pretrained(folders[1]).eval()
    caught = {}
    for block, layer in enumerate(getattr(vision, "vision_model", vision).encoder.layers):
        layer.mlp.fc2.register_forward_hook(lambda m, i, output, k=2 * block + 2: caught.update({k: output[0]}))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    stimuli, g_2, g_4 = images(paths), stored(paths, "g_2"), stored(paths, "g_4")
    for image_id in range(tiny_nsd.N_IMAGES):
        pixels = ((torch.from_numpy(stimuli[image_id]) / 255 - mean) / std).permute(2, 0, 1)[None]
        with torch.no_grad():
            vision(torch.nn.functional.interpolate(pixels, (32, 32), mode="bilinear"))
        for k, rows in ((2, g_2), (4, g_4)):
            np.testing.assert_allclose(rows[image_id].reshape(5, 12), caught[k], atol=1e-5)
    assert open_feature(paths, "g_4").row_shape == (5, 12)


def test_all_g_from_one_pass(extract, monkeypatch):
    passes, forward = [], models.ClipFeatures.forward
    monkeypatch.setattr(models.ClipFeatures, "forward",
                        lambda self, image: passes.append(len(image)) or forward(self, image))
    extract(feats=["g_2", "g_4"])
    assert sum(passes) == tiny_nsd.N_IMAGES


def test_batches_workers_and_storage_do_not_change_the_features(paths, extract):
    extract("--dtype", "float32")
    first = {feat: stored(paths, feat) for feat in FEATS}
    extract("--dtype", "float32", "--overwrite", "--batch_size", "24", "--num_workers", "1")
    for feat in FEATS:
        np.testing.assert_allclose(stored(paths, feat), first[feat], atol=1e-5)
    extract("--overwrite")
    for feat in FEATS:
        assert stored(paths, feat).dtype == np.float16
        np.testing.assert_allclose(stored(paths, feat), first[feat], atol=1e-3, rtol=2e-3)


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


def test_a_run_killed_at_random_moments_and_run_again_equals_an_uninterrupted_one(paths, folders, monkeypatch):
    """kill -9 of the script, one image in a batch, and one in a block of c."""
    program = "import sys, img2feat; img2feat.TextFeatures.block_size = 1; sys.exit(img2feat.main())"
    command = [sys.executable, "-c", program, *words(paths, folders, FEATS, "--batch_size", "1")]
    environment = {**os.environ, "PYTHONPATH": str(REPO / "src")}
    quiet = {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "env": environment}
    subprocess.run(command, check=True, **quiet)
    whole = {feat: paths.feature(feat).read_bytes() for feat in FEATS}
    for feat in FEATS:
        paths.feature(feat).unlink()
    kills = 0
    for feat in FEATS[:3]:  # g_2 and g_4 are made together
        process = subprocess.Popen(command, **quiet)
        while process.poll() is None and (not paths.feature(feat).exists() or not written(paths, feat)):
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.02))
        process.kill()
        process.wait()
        kills += 0 < len(written(paths, feat)) < tiny_nsd.N_IMAGES
    assert kills > 0
    subprocess.run(command, check=True, **quiet)
    assert {feat: paths.feature(feat).read_bytes() for feat in FEATS} == whole


def test_two_processes_write_what_one_writes(paths, folders, extract, one_launch, monkeypatch):
    """bash scripts/features.sh under a launcher. All of c is one block: one process has nothing to do there."""
    extract()
    whole = {feat: paths.feature(feat).read_bytes() for feat in FEATS}
    launch = f"accelerate launch --config_file {REPO}/scripts/accelerate/ddp.yaml --num_processes 2"
    environment = {**os.environ, "LAUNCH": launch, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    done = subprocess.run(["bash", str(REPO / "scripts/features.sh"), *words(paths, folders, FEATS, "--overwrite")],
                          capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("wrote 24 rows, 24 of 24 are there") == 4  # by one of them
    assert {feat: paths.feature(feat).read_bytes() for feat in FEATS} == whole


@pytest.mark.parametrize("size", [2, 3])
def test_every_block_belongs_to_one_process(paths, extract, monkeypatch, size):
    """The processes one after the other, each with the blocks that are its own of those all counted together."""
    monkeypatch.setattr(img2feat.TextFeatures, "block_size", 5)
    extract()
    whole, shares, write_blocks = {feat: stored(paths, feat) for feat in FEATS}, [], img2feat.write_blocks

    def one_after_the_other(maker, network, blocks, files, args, team):
        parts = [Team("cpu", rank, size).take(team.blocks) for rank in range(size)]
        shares.append(parts)
        for part in parts:
            write_blocks(maker, network, part, files, args, team)

    class Whole(Team):
        def take(self, blocks):
            self.blocks = blocks
            return blocks

    monkeypatch.setattr(img2feat, "write_blocks", one_after_the_other)
    monkeypatch.setattr(img2feat.Team, "assemble", lambda *args: Whole())
    extract("--overwrite")
    for parts in shares:
        assert sorted(int(i) for part in parts for ids in part for i in ids) == list(range(24))
    assert len(shares) == 3 and all(np.array_equal(stored(paths, feat), whole[feat]) for feat in FEATS)


def test_the_images_a_subject_saw_then_the_others(nsd, extract, monkeypatch, capsys):
    paths, shown = nsd
    extract(feats=["c", "g_2"])
    every = {feat: stored(paths, feat) for feat in ("c", "g_2")}
    capsys.readouterr()
    extract("--overwrite", "--subj", "1", feats=["c", "g_2"])
    assert written(paths, "c") == written(paths, "g_2") == saw(shown, "subj01")
    assert capsys.readouterr().out.count("wrote 14 rows, 14 of 24 are there") == 2
    first = stored(paths, "g_2")
    extract("--subject", "subj01", feats=["g_2"])
    assert "g_2_all.hdf5: kept (14 of 24 rows are there, float16" in capsys.readouterr().out
    extract("--subj", "1", "2", feats=["g_2"])
    assert written(paths, "g_2") == saw(shown, "subj01", "subj02") == list(range(24))
    np.testing.assert_array_equal(stored(paths, "g_2")[saw(shown, "subj01")], first[saw(shown, "subj01")])
    extract(feats=["c"])
    assert written(paths, "c") == list(range(24))
    for feat in every:
        np.testing.assert_allclose(stored(paths, feat), every[feat], atol=1e-3, rtol=2e-3)


def test_a_row_that_is_not_written_is_refused(nsd, extract):
    paths, shown = nsd
    extract("--subj", "1", feats=["g_2"])
    rows, seen = open_feature(paths, "g_2"), saw(shown, "subj01")
    unseen = next(i for i in range(24) if i not in seen)
    assert rows[seen].shape == (14, 5, 12)
    words = rf"g_2_all.hdf5: image id {unseen} is not written yet, 14 of 24 rows are there; go on with bash " \
            "scripts/features.sh --feats g_2$"
    for ids in ([seen[0], unseen], slice(None)):
        with pytest.raises(utils.UserError, match=words):
            rows[ids]
    extract(feats=["g_2"])
    assert len(open_feature(paths, "g_2")[:]) == 24


@pytest.mark.parametrize("chunks", [None, (1, 1, 64)])
def test_a_file_of_neuraldiffuser_is_kept_and_read(paths, extract, capsys, chunks):
    """(N, 1, width) float32 of Stable Diffusion 1.x and ViT-B/32, whatever models are given; chunked or not."""
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


def test_a_file_of_another_program_is_kept_when_its_rows_suit_the_models(paths, extract, capsys):
    def put(*shape):
        with h5py.File(paths.feature("g_2"), "w") as file:
            file["data"] = np.ones(shape, np.float32)

    put(24, 5, 12)  # the tiny CLIP's
    extract(feats=["g_2"])
    assert "made by another program" in capsys.readouterr().out
    wrong = {(24, 60): r"model is unknown \(rows of shape \(60,\)\)", (5, 1, 38400): "rows is 5, wanted 24"}
    for shape, words in wrong.items():
        put(*shape)
        with pytest.raises(utils.UserError, match=f"g_2_all.hdf5: its {words}"):
            extract(feats=["g_2"])


def test_a_file_of_ours_from_before_the_flags_is_whole(paths, extract, capsys):
    extract(feats=["g_2"])
    with h5py.File(paths.feature("g_2"), "r+") as file:
        del file["written"]
    before = paths.feature("g_2").read_bytes()
    extract(feats=["g_2"])
    assert "g_2_all.hdf5: kept (24 of 24" in capsys.readouterr().out and paths.feature("g_2").read_bytes() == before


def test_a_full_disk_is_one_line_and_keeps_what_is_written(paths, folders, extract, monkeypatch, capsys):
    extract(feats=["g_2", "g_4"])
    whole, limits = {feat: paths.feature(feat).read_bytes() for feat in ("g_2", "g_4")}, (
        resource.getrlimit(resource.RLIMIT_FSIZE))
    with h5py.File(paths.feature("g_2"), "r") as file:
        middle = file["data"].id.get_offset() + 17 * 60 * 2 + 30  # in a row of the third batch

    blocks, write_block = [], img2feat.write_block

    def fill_the_disk(*block):
        blocks.append(block)
        if len(blocks) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (middle, limits[1]))
        write_block(*block)

    with monkeypatch.context() as context:
        context.setattr(img2feat, "write_block", fill_the_disk)
        command = words(paths, folders, ["g_2", "g_4"], "--overwrite")
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
def test_a_disk_that_takes_parts_and_is_then_full(paths, folders, extract, monkeypatch, capsys, room):
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
        context.setattr(img2feat.os, "pwrite", filling)
        status = utils.run_cli(img2feat.main, words(paths, folders, ["g_2"], "--overwrite"))
    if room == 1000:  # less than the second batch needs
        assert status == 2 and "could not be written (No space left on device)" in capsys.readouterr().err
        assert written(paths, "g_2") == list(range(7))
        extract(feats=["g_2"])
    assert paths.feature("g_2").read_bytes() == whole


def test_a_file_that_is_not_finished_goes_on_in_its_own_type(nsd, extract):
    paths, _ = nsd
    extract("--subj", "1", "--dtype", "float32", feats=["g_2"])
    with pytest.raises(utils.UserError, match="g_2_all.hdf5: its type is float32, wanted float16"):
        extract(feats=["g_2"])
    extract("--dtype", "float32", feats=["g_2"])
    extract(feats=["g_2"])  # finished: kept, as it is


def test_trials_of_another_data_set(paths, extract):
    with h5py.File(paths.stimuli / "nsd_stimuli.hdf5", "r+") as file:
        few = file["imgBrick"][:4]
        del file["imgBrick"]
        file["imgBrick"] = few
    with pytest.raises(utils.UserError, match="/wds: a trial shows image .*, but there are 4"):
        extract("--subj", "1", feats=["g_2"])


def test_features_that_do_not_fit_the_type(paths, extract, monkeypatch):
    forward = models.ClipFeatures.forward
    monkeypatch.setattr(models.ClipFeatures, "forward",
                        lambda self, image: {k: features + 1e6 for k, features in forward(self, image).items()})
    with pytest.raises(utils.UserError, match="image 0 does not fit float16.*--dtype float32 --overwrite"):
        extract(feats=["g_2"])
    assert written(paths, "g_2") == []
    extract("--dtype", "float32", "--overwrite", feats=["g_2"])
    assert written(paths, "g_2") == list(range(24))


def test_what_the_user_can_get_wrong_is_one_line(paths, extract, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(utils.UserError, match="--sd_model .*empty: text_encoder not found"):
        extract(feats=["c"], sd=empty)
    (empty / "vae").mkdir()
    (empty / "unet").mkdir()
    (empty / "unet/config.json").write_text("{}")
    with pytest.raises(utils.UserError, match="--sd_model .*empty: vae could not be loaded"):
        extract(feats=["z"], sd=empty)
    with pytest.raises(utils.UserError, match="--clip_model"):
        extract(feats=["g_2"], clip=empty)
    with pytest.raises(utils.UserError, match="layer 12"):
        extract(feats=["g_12"])
    for wrong in ("x", "g_3", "g_0"):
        with pytest.raises(SystemExit) as stop:
            extract(feats=[wrong])
        assert stop.value.code == 2
    (paths.stimuli / "nsd_stimuli.hdf5").unlink()
    with pytest.raises(utils.UserError, match="nsd_stimuli.hdf5: stimuli not found"):
        extract(feats=["z"])
    extract(feats=["c"])  # needs no stimuli


def test_not_enough_disk(paths, extract, monkeypatch):
    monkeypatch.setattr(img2feat.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 100}))
    with pytest.raises(utils.UserError, match="c_all.hdf5: needs .* are free"):
        extract(feats=["c"])
    with pytest.raises(utils.UserError, match="g_2_all.hdf5, g_4_all.hdf5: needs"):  # together
        extract(feats=["g_2", "g_4"])
    assert not list(paths.stimuli.glob("*_all.hdf5"))
