"""Controls and ceilings of evaluate.py: each picture against numpy, loops and diffusers itself."""

import h5py
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from disk.names import scores_name
from disk.scores import save_scores
from evaluation import controls
from evaluation.networks import FeatureStore
from evaluation.picture_sets import PictureSet
from nsd.rows import Rows, open_stimuli
from nsd.trials import load_trials
from tiny_nsd import N_IMAGES, SHARED, SIDE, write_tiny_nsd
from tiny_sd import write_tiny_sd

RUN = {"subj": "subj01", "hidden_dim": 8, "num_sessions": 3, "tag": "", "run": "finetune", "head": None,
       "control": None, "test_split": "new_test", "repeats": "mean"}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The tiny data set with a feature c, and embeddings of the shared images that are features of training images."""
    paths, _ = write_tiny_nsd(tmp_path_factory.mktemp("world"))
    rng = np.random.default_rng(0)
    c = rng.standard_normal((N_IMAGES, 3, 4)).astype(np.float32)
    with h5py.File(paths.feature("c"), "w") as file:
        file.create_dataset("data", data=c.reshape(N_IMAGES, -1)).attrs["shape"] = (3, 4)
    return paths, c, write_tiny_sd(paths.root / "sd")


def store_of(paths):
    return FeatureStore(paths.root / "features", batch_size=4)


def seen_of(paths):
    return PictureSet.of_stimuli("seen", SHARED, open_stimuli(paths))


def test_each_control_is_what_its_name_says(world, monkeypatch):
    paths, c, sd = world
    train = np.unique(load_trials(paths, "subj01", "train")["image_id"])
    wanted = train[[2, 0, 5, 5]]
    folder = paths.scores("subj01", scores_name(RUN, "c"), "c")
    save_scores(folder, SHARED, {"retrieval": 7 * c[wanted] + 0.01, "nsdgeneral": c[wanted]}, {})
    monkeypatch.setattr(controls, "AT_ONCE", 3)
    run = {**RUN, "sd_model": str(sd)}
    sets, absent = controls.without_decoder(seen_of(paths), run, None, paths, "c", store_of(paths), CPU)
    assert not absent
    stimuli = open_stimuli(paths)
    for i, image_id in enumerate(wanted):
        np.testing.assert_array_equal(sets["control: nearest training image"].read(i, 0), stimuli[[image_id]][0])
    mean = np.mean([stimuli[[image_id]][0] for image_id in train], axis=0)
    np.testing.assert_array_equal(sets["control: mean image"].read(1, 0), np.round(mean).astype(np.uint8))
    with monkeypatch.context() as without:  # once made, no training image is read again
        without.setattr(Rows, "batches", None)
        without.setattr(controls, "AT_ONCE", None)
        again, _ = controls.without_decoder(seen_of(paths), run, None, paths, "c", store_of(paths), CPU)
        for label in list(controls.PLAIN)[:2]:
            np.testing.assert_array_equal(again[label].read(0, 0), sets[label].read(0, 0))

    vae = AutoencoderKL.from_pretrained(sd, subfolder="vae").eval()
    with torch.no_grad():
        image = torch.from_numpy(stimuli[[SHARED[2]]]).permute(0, 3, 1, 2) / 127.5 - 1
        image = torch.nn.functional.interpolate(image, size=(16, 16), mode="bilinear", antialias=True)
        made = vae(image, sample_posterior=False).sample[0]
    found = sets["ceiling: VAE round trip"].read(2, 0)
    assert SIDE != 16 == len(found)
    np.testing.assert_allclose(found, ((made + 1) * 127.5).clamp(0, 255).permute(1, 2, 0).numpy(), atol=0.51)


def test_what_can_not_be_had_says_why(world):
    paths, *_ = world
    why = "config.json not found"
    sets, absent = controls.without_decoder(seen_of(paths), None, why, paths, "c", store_of(paths), CPU)
    assert not sets and set(absent.values()) == {why} and len(absent) == 3
    run = {**RUN, "tag": "x", "sd_model": "nowhere/"}
    sets, absent = controls.without_decoder(seen_of(paths), run, None, paths, "c", store_of(paths), CPU)
    assert list(sets) == ["control: mean image"]
    assert "nsdgeneral.npy" in absent["control: nearest training image"]
    assert "nowhere/: its VAE could not be loaded" in absent["ceiling: VAE round trip"]
