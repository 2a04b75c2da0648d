"""img2feat.py on tiny random models, against the same models asked one image and one caption at a time."""

import h5py
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from transformers import CLIPTextModel, CLIPVisionModel

import data
import img2feat
import models
import tiny_nsd
import tiny_sd
import utils

FEATS = ["c", "z", "g_2", "g_4"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return tiny_sd.write_tiny_sd(folder / "sd"), tiny_sd.write_tiny_clip(folder / "clip")


@pytest.fixture
def paths(tmp_path):
    return tiny_nsd.write_tiny_nsd(tmp_path)[0]


@pytest.fixture
def extract(paths, folders):
    """Run the script with the tiny models."""
    def run(*flags, feats=FEATS, sd=folders[0], clip=folders[1]):
        img2feat.main(["--root", str(paths.root), "--sd_model", str(sd), "--clip_model", str(clip), "--batch_size", "7",
                       "--num_workers", "0", "--device", "cpu", "--feats", *feats, *flags])
    return run


def stored(paths, feat):
    with h5py.File(paths.feature(feat), "r") as file:
        return file["data"][()]


def images(paths):
    with h5py.File(paths.stimuli / "nsd_stimuli.hdf5", "r") as file:
        return file["imgBrick"][()]


def test_c_is_the_mean_over_the_captions(paths, folders, extract):
    extract("--dtype", "float32", feats=["c"])
    pipeline = StableDiffusionPipeline.from_pretrained(folders[0], safety_checker=None)
    with torch.no_grad():
        for row, texts in zip(stored(paths, "c"), data.load_captions(paths), strict=True):
            embeddings = [pipeline.encode_prompt(text, "cpu", 1, False)[0] for text in texts]
            wanted = torch.cat(embeddings).mean(0)
            np.testing.assert_allclose(row.reshape(wanted.shape), wanted, atol=1e-5)
    assert data.open_feature(paths, "c").row_shape == (tiny_sd.TOKENS, tiny_sd.WIDTH)


def test_a_caption_is_encoded_once(paths, extract, monkeypatch):
    encoded, forward = [], CLIPTextModel.forward

    def count(self, input_ids, **kwargs):
        encoded.extend(tuple(ids.tolist()) for ids in input_ids)
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(CLIPTextModel, "forward", count)
    extract(feats=["c"])
    distinct = {text for texts in data.load_captions(paths) for text in texts}
    assert len(encoded) == len(distinct) == 6


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
    assert data.open_feature(paths, "z").row_shape == (4, tiny_sd.LATENT, tiny_sd.LATENT)


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
    assert data.open_feature(paths, "g_4").row_shape == (5, 12)


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


def test_an_interrupted_run_leaves_the_old_file(paths, extract, monkeypatch):
    extract(feats=["g_2"])
    before = stored(paths, "g_2")
    calls, forward = [], models.ClipFeatures.forward

    def stop_in_the_third_batch(self, image):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(self, image)

    monkeypatch.setattr(models.ClipFeatures, "forward", stop_in_the_third_batch)
    with pytest.raises(KeyboardInterrupt):
        extract("--overwrite", feats=["g_2", "g_4"])
    np.testing.assert_array_equal(stored(paths, "g_2"), before)
    assert not paths.feature("g_4").exists() and list(paths.stimuli.glob(".*")) == []


def test_features_that_do_not_fit_the_type(paths, extract, monkeypatch):
    forward = models.ClipFeatures.forward
    monkeypatch.setattr(models.ClipFeatures, "forward",
                        lambda self, image: {k: features + 1e6 for k, features in forward(self, image).items()})
    with pytest.raises(utils.UserError, match="does not fit float16.*--dtype float32"):
        extract(feats=["g_2"])
    assert not paths.feature("g_2").exists()
    extract("--dtype", "float32", feats=["g_2"])


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
