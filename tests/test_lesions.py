"""Lesions: which voxels are kept, and their names beside reconstructions; test_decoders.py scores through them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import recon
import utils
from disk.files import save_json
from disk.names import Paths, images_name
from evaluation import controls
from models import Decoder, RidgeDecoder
from nsd.lesions import Lesion, digest_of, kept_voxels, voxel_statistics
from nsd.repeats import AveragedRows, TestSet
from nsd.rows import open_betas
from nsd.trials import load_trials
from options import regions
from sampling.folders import ImageSet
from training.stacking import FeatureOf, validate

MASKS = {"V1": np.array([True, False, False, False]), "V2": np.array([False, True, False, False]),
         "all": np.ones(4, bool)}
DRAWN = {"subj": "subj01", "method": "mine", "hidden_dim": 8, "num_sessions": 3, "tag": "", "run": "finetune",
         "head": None, "control": None, "test_split": "new_test", "repeats": "mean"}


def test_regions_are_named_in_one_order():
    assert regions("V2, V1,V2") == "V1,V2" == regions("V1,V2")
    assert images_name({**DRAWN, "use_gnet": False, "voxels": regions("V2,V1")}) == "mine_only_V1+V2"


def test_kept_voxels():
    assert kept_voxels(MASKS, "subj01", voxels="V1,V2").tolist() == [True, True, False, False]
    assert kept_voxels(MASKS, "subj01", without="V1,V2").tolist() == [False, False, True, True]
    with pytest.raises(utils.UserError, match="--voxels V1,V9: no region V9 of subj01; wanted some of V1, V2, all"):
        kept_voxels(MASKS, "subj01", voxels="V1,V9")
    with pytest.raises(utils.UserError, match="--without all: leaves none of the 4 voxels"):
        kept_voxels(MASKS, "subj01", without="all")


def test_a_lesion_sets_voxels_to_their_mean():
    rows = np.arange(12.0).reshape(3, 4)
    lesion = Lesion(np.array([True, False, True, False]), np.array([9.0, 8, 7, 6]))
    assert lesion(rows).tolist() == [[0, 8, 2, 6], [4, 8, 6, 6], [8, 8, 10, 6]]
    assert digest_of(lesion.kept) != digest_of(~lesion.kept)


def test_statistics_are_of_images_not_of_trials(paths):
    betas, trials = open_betas(paths, "subj01"), load_trials(paths, "subj01", "train").iloc[2:]
    seen = AveragedRows(betas, trials)
    assert len(set(seen.n_repeats)) > 1
    rows = np.stack([np.mean(betas[group["row"].to_numpy()], axis=0) for _, group in trials.groupby("image_id")])
    mean, std = voxel_statistics(betas, trials, images_at_once=4)
    np.testing.assert_allclose(mean, rows.mean(0), atol=1e-6)
    np.testing.assert_allclose(std, rows.std(0), atol=1e-5)


def test_the_weight_of_the_ridge_is_that_of_whole_responses():
    """Of predictions of which the truth is six parts network and four parts ridge, where no voxel is lesioned.

    To the 30 images that say so come 20 that count for the network."""
    torch.manual_seed(0)
    network, ridge = Decoder({"s": 6}, 7, {"c": 5}).eval(), RidgeDecoder({"s": 6}, {"c": 5})
    torch.nn.init.normal_(network.heads["c"].weight)
    whole = np.random.default_rng(0).standard_normal((30, 6)).astype(np.float32)
    with torch.no_grad():
        parts = [model({"s": torch.from_numpy(whole)})[0]["c"].numpy() for model in (network, ridge)]
    known = SimpleNamespace(feat="c", total=1.0, coefficients=0.6 * parts[0] + 0.4 * parts[1], shape=(9,),
                            mean=np.zeros(9, np.float32), basis=np.zeros((5, 9), np.float32), beyond=lambda k: 0.0)
    seen = TestSet(np.arange(30), whole, np.ones(30))
    lesioned = seen._replace(betas=np.where(np.arange(6) < 4, whole, 0).astype(np.float32))
    trained = SimpleNamespace(validation=lesioned, whole_validation=seen, whose="s", device="cpu", kind="components")
    model = FeatureOf(network, known)
    found = validate(model, ridge, trained)
    assert model.weight == pytest.approx((30 * 0.6 + 20) / 50, abs=1e-4)
    error = np.square(model.coefficients({"s": torch.from_numpy(lesioned.betas)})[0].detach().numpy()
                      - known.coefficients).sum(1).mean()
    assert found["scored"] == pytest.approx(1 - error, abs=1e-5) and error > 0.01


@pytest.mark.parametrize("given", [{"voxels": "V1"}, {"without": "V1"}, {"control": "bottleneck2"}])
def test_the_brain_does_not_guide_from_more_than_is_decoded(given):
    flags = SimpleNamespace(**{"voxels": None, "without": None, "control": None} | given)
    ((name, value),) = given.items()
    with pytest.raises(utils.UserError, match=f"--{name} {value} with --use_gnet"):
        recon.brain_guide(flags, None, None, None, False)


def test_lesions_beside_reconstructions_are_found(tmp_path):
    paths = Paths(tmp_path, tmp_path)
    flags = {**DRAWN, "guidance_scale": 30.0, "guidance_strength": 0.8, "use_gnet": False}
    for changed in ({}, {"voxels": "V1,V2"}, {"without": "higher_vis"}, {"without": "V4", "guidance_scale": 5.0},
                    {"method": "mine_without_haste"}):  # another guidance; a method that is only called so
        save_json(paths.images_of(flags | changed) / "config.json", flags | changed)
    images = ImageSet(paths.images_of(flags), np.array([1]), [[]], flags)
    assert controls.lesions(images) == {"lesion: only V1, V2": {"voxels": "V1,V2"},
                                        "lesion: without higher_vis": {"without": "higher_vis"}}
    nowhere = images._replace(config=None)
    assert controls.lesions(nowhere) == {}


def test_bottlenecks_beside_reconstructions_are_found_the_narrowest_first(tmp_path):
    paths = Paths(tmp_path, tmp_path)
    flags = {**DRAWN, "guidance_scale": 30.0, "guidance_strength": 0.8, "use_gnet": False}
    for changed in ({}, {"control": "bottleneck20"}, {"control": "bottleneck1"}, {"control": "shuffle"},
                    {"control": "bottleneck5", "guidance_scale": 5.0}, {"control": "bottleneck7", "method": "other"}):
        save_json(paths.images_of(flags | changed) / "config.json", flags | changed)
    images = ImageSet(paths.images_of(flags), np.array([1]), [[]], flags)
    assert list(controls.bottlenecks(images).items()) == [("bottleneck: 1 number", {"control": "bottleneck1"}),
                                                          ("bottleneck: 20 numbers", {"control": "bottleneck20"})]
    assert controls.bottlenecks(images._replace(config=None)) == {}
