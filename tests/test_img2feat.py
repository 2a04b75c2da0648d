"""img2feat.py on tiny random models, against the same models asked one image and one caption at a time."""

import os
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from transformers import CLIPTextModel, CLIPVisionModel

import models
import tiny_nsd
import tiny_sd
import utils
from features import extraction
from features.makers import TextFeatures
from nsd.captions import load_captions
from nsd.components import open_components
from nsd.rows import open_feature
from tiny_features import FEATS, images, saw, stored, words, written
from training.team import Team


def interrupt(*inputs):
    raise KeyboardInterrupt


def test_c_is_the_mean_over_the_captions(paths, tiny_models, extract):
    extract("--dtype", "float32", feats=["c"])
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_models[0], safety_checker=None)
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

    monkeypatch.setattr(TextFeatures, "block_size", block)
    monkeypatch.setattr(CLIPTextModel, "forward", count)
    extract(feats=["c"])
    captions = load_captions(paths)
    distinct = [{text for texts in captions[i:i + block] for text in texts} for i in range(0, len(captions), block)]
    assert len(encoded) == sum(map(len, distinct)) and (block == 5 or len(encoded) == 6)


def test_z_is_the_scaled_posterior_mean_of_the_resized_stimulus(paths, tiny_models, extract):
    extract("--dtype", "float32", feats=["z"])
    vae = AutoencoderKL.from_pretrained(tiny_models[0] / "vae")
    processor = VaeImageProcessor(resample="lanczos")
    side = 2 * tiny_sd.LATENT  # 16 pixels, from stimuli of 10
    with torch.no_grad():
        for row, image in zip(stored(paths, "z"), images(paths), strict=True):
            pixels = processor.preprocess(Image.fromarray(image), side, side)  # diffusers' own resize, to [-1, 1]
            wanted = vae.encode(pixels).latent_dist.mean[0] * 0.5  # the tiny VAE's scaling factor
            np.testing.assert_allclose(row.reshape(wanted.shape), wanted, atol=1e-5)
    assert open_feature(paths, "z").row_shape == (4, tiny_sd.LATENT, tiny_sd.LATENT)


def test_g_is_what_leaves_the_mlp(paths, tiny_models, extract):
    extract("--dtype", "float32", feats=["g_4", "g_2"])
    vision = CLIPVisionModel.from_pretrained(tiny_models[1]).eval()
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


def test_two_processes_write_what_one_writes(paths, tiny_models, extract, one_launch, monkeypatch):
    """bash scripts/features.sh under a launcher. All of c is one block: one process has nothing to do there."""
    extract()
    files = [file(feat) for feat in FEATS for file in (paths.feature, paths.components)]
    whole = {file: file.read_bytes() for file in files}
    launch = f"{sys.executable} -m accelerate.commands.launch"  # accelerate launch, wherever it is installed
    config = f"--config_file {utils.REPOSITORY}/scripts/accelerate/ddp.yaml --num_processes 2"
    environment = {**os.environ, "LAUNCH": f"{launch} {config}", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    command = ["bash", utils.REPOSITORY / "scripts/features.sh", *words(paths, tiny_models, FEATS, "--overwrite")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("wrote 24 rows, 24 of 24 are there") == 4  # by one of them
    assert done.stdout.count(" of the variance (fitted on 20 images)") == 4
    assert {file: file.read_bytes() for file in files} == whole


@pytest.mark.parametrize("size", [2, 3])
def test_every_block_belongs_to_one_process(paths, extract, monkeypatch, size):
    """The processes one after the other, each with the blocks that are its own of those all counted together."""
    monkeypatch.setattr(TextFeatures, "block_size", 5)
    extract()
    whole, shares = {feat: stored(paths, feat) for feat in FEATS}, []
    write_blocks = extraction.write_blocks

    def one_after_the_other(maker, network, blocks, *others, **settings):
        parts = [Team("cpu", rank, size).take(blocks) for rank in range(size)]
        shares.append(parts)
        for part in parts:
            write_blocks(maker, network, part, *others, **settings)

    monkeypatch.setattr(extraction, "write_blocks", one_after_the_other)
    extract("--overwrite")
    for parts in shares:
        assert sorted(int(i) for part in parts for ids in part for i in ids) == list(range(24))
    assert len(shares) == 3 and all(np.array_equal(stored(paths, feat), whole[feat]) for feat in FEATS)


def test_components_follow_the_features(nsd, extract, capsys):
    """Of files that were there already, too; of more images later; anew when a feature is."""
    paths, shown = nsd
    extract("--components", "0", "--subj", "1")
    assert not list(paths.stimuli.glob("*_components.hdf5"))
    extract("--components", "6", "--subj", "1")
    printed = capsys.readouterr().out
    for feat in FEATS:
        found = open_components(paths, feat)
        assert found.there().tolist() == saw(shown, "subj01") and found.n_fitted == 10 and 1 <= found.k <= 6
        assert f"{feat}: {found.k} components keep {100 * found.kept:.1f} % of the variance (fitted on 10" in printed
    first = open_components(paths, "g_4")
    extract("--components", "6", feats=["g_4"])
    later = open_components(paths, "g_4")
    assert later.digest == first.digest and len(later.there()) == 24
    assert "added 10 images, 24 of 24 have coefficients; 6 components keep" in capsys.readouterr().out
    with pytest.raises(utils.UserError, match="g_4_components.hdf5: written with --components 6, wanted 1024"):
        extract(feats=["g_4"])
    extract("--overwrite", feats=["g_4"])
    assert open_components(paths, "g_4").n_fitted == 20


def test_an_overwritten_feature_takes_its_components_with_it(paths, extract, monkeypatch):
    """Whatever stops the run after that: components of rows that are no more would be trained on."""
    extract(feats=["g_2", "g_4"])
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(models.ClipFeatures, "forward", interrupt)
        extract("--overwrite", feats=["g_2"])
    assert [file.name for file in paths.stimuli.glob("*_components.hdf5")] == ["g_4_components.hdf5"]


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
