"""NSD-synthetic: its trials, responses and stimuli are what the files say, and its ids are nobody else's."""

import json

import h5py
import numpy as np
import pytest
import scipy.io
from PIL import Image

import evaluate
import img2feat
import recon
import score_c
import score_g
import score_z
import tiny_features
import tiny_nsd
import utils
from disk.scores import load_scores
from nsd.repeats import load_test_set, responses_to
from nsd.rows import open_stimuli
from nsd.synthetic import (
    FIRST_ID,
    SyntheticStimuli,
    feature_of,
    load_synthetic_trials,
    open_synthetic_betas,
    stimuli_of,
)
from tiny_synthetic import COMMON, OWN, SHOWN, VOLUME, write_betas, write_nifti, write_synthetic

DISTINCT = FIRST_ID + np.arange(COMMON + OWN)


def z_scored(volumes, mask):
    """One voxel after the other, in C order of (X, Y, Z)."""
    found = []
    for x in range(VOLUME[0]):
        for y in range(VOLUME[1]):
            for z in range(VOLUME[2]):
                if mask[x, y, z]:
                    percent = [volume[x, y, z] / 300 for volume in volumes]
                    found.append((np.array(percent) - np.mean(percent)) / np.std(percent))
    return np.array(found).T


def test_betas_are_the_masks_voxels_in_c_order_z_scored_over_the_session(paths):
    volumes, mask = write_synthetic(paths)
    betas = open_synthetic_betas(paths, "subj01")
    assert betas.shape == (len(SHOWN), tiny_nsd.N_VOXELS["subj01"])
    np.testing.assert_allclose(betas[np.arange(len(SHOWN))], z_scored(volumes, mask), atol=1e-5)
    (paths.synthetic_betas("subj01") / "betas_nsdsynthetic.hdf5").unlink()
    write_nifti(paths.synthetic_betas("subj01") / "betas_nsdsynthetic.nii.gz", volumes.transpose(1, 2, 3, 0))
    again = open_synthetic_betas(paths, "subj01")
    assert again.path.name.endswith(".nii.gz")
    np.testing.assert_array_equal(again[np.arange(len(SHOWN))], betas[np.arange(len(SHOWN))])


def test_a_voxel_without_signal_is_0(paths):
    volumes, mask = write_synthetic(paths)
    volumes[:, *np.argwhere(mask)[2]] = 7
    write_betas(paths, "subj01", volumes)
    assert not open_synthetic_betas(paths, "subj01")[np.arange(len(SHOWN))][:, 2].any()


def test_the_test_set_is_the_mean_over_as_many_repeats_as_there_are(paths):
    volumes, mask = write_synthetic(paths)
    betas = z_scored(volumes, mask)
    test = load_test_set(paths, "subj01", split="synthetic")
    np.testing.assert_array_equal(test.image_ids, DISTINCT)
    np.testing.assert_array_equal(test.n_repeats, np.bincount(SHOWN)[1:])
    for number, mean in enumerate(test.betas):
        np.testing.assert_allclose(mean, betas[SHOWN == number + 1].mean(axis=0), atol=1e-5)
    some = responses_to(paths, "subj01", DISTINCT[[1, 6]])
    np.testing.assert_array_equal(some.betas, test.betas[[1, 6]])
    single = load_test_set(paths, "subj01", split="synthetic", repeats="single")
    np.testing.assert_allclose(single.betas[7], betas[7], atol=1e-5)
    shuffled = load_test_set(paths, "subj01", "shuffle", 0, split="synthetic")
    assert np.abs(shuffled.betas - test.betas).max(axis=1).min() > 0.01


def test_stimuli_are_the_middle_of_the_screen_as_a_usual_display_shows_it(paths):
    write_synthetic(paths)
    stimuli = SyntheticStimuli(paths, "subj01")
    assert stimuli.shape == (COMMON + OWN, tiny_nsd.SIDE, tiny_nsd.SIDE, 3)
    for number, (name, row) in {0: ("stimuli", 0), 4: ("stimuli", 4), 6: ("colorstimuli_subj01", 1)}.items():
        screen = tiny_nsd.read_hdf5(paths.synthetic / f"nsdsynthetic_{name}.hdf5", "imgBrick")[row]
        square = np.uint8(np.round(255 * np.sqrt(screen[:, 2:8] / 255)))  # 6 x 6 of 6 x 10
        wanted = np.asarray(Image.fromarray(square).resize((tiny_nsd.SIDE,) * 2, Image.Resampling.LANCZOS))
        np.testing.assert_array_equal(stimuli[[number]][0], wanted)
    same_side = np.asarray(Image.fromarray(np.full((6, 6, 3), 77, np.uint8)))
    with h5py.File(paths.stimuli / "nsd_stimuli.hdf5", "w") as file:
        file["imgBrick"] = np.stack([same_side] * 2)
    np.testing.assert_array_equal(SyntheticStimuli(paths, "subj01")[[6]][0], square)


def test_an_id_of_one_is_no_id_of_the_other(paths):
    write_synthetic(paths)
    synthetic = stimuli_of(paths, "subj01", DISTINCT)
    assert len(synthetic) == COMMON + OWN and stimuli_of(paths, "subj01", np.array([3])).path.name == "nsd_stimuli.hdf5"
    with pytest.raises(utils.UserError, match="image id 3 wanted, found 1000000..1000007"):
        synthetic[np.array([3])]
    with pytest.raises(utils.UserError, match="row 1000003 wanted, rows 0..23 found"):
        open_stimuli(paths)[[FIRST_ID + 3]]
    with pytest.raises(utils.UserError, match="of NSD and of NSD-synthetic"):
        stimuli_of(paths, "subj01", np.array([3, FIRST_ID]))
    with pytest.raises(utils.UserError, match=f"image id {FIRST_ID + 8}: subj01 did not see it"):
        responses_to(paths, "subj01", np.array([FIRST_ID + 8]))


def test_what_is_missing_or_does_not_fit_is_one_line(paths):
    with pytest.raises(utils.UserError, match="nsdsynthetic_expdesign.mat.*--what synthetic"):
        load_synthetic_trials(paths, "subj01")
    with pytest.raises(utils.UserError, match="nsdgeneral.nii.gz.*--what rois"):
        open_synthetic_betas(paths, "subj01")
    volumes, mask = write_synthetic(paths)
    file = paths.synthetic_betas("subj01") / "betas_nsdsynthetic.hdf5"
    for damaged in (volumes.astype(np.float32), volumes[:, :, :3], volumes.transpose(0, 3, 2, 1)):
        write_betas(paths, "subj01", damaged)
        with pytest.raises(utils.UserError, match="betas_nsdsynthetic.hdf5: not readable.*wanted int16"):
            open_synthetic_betas(paths, "subj01")
    file.unlink()
    with pytest.raises(utils.UserError, match="betas of NSD-synthetic of subj01 not found"):
        open_synthetic_betas(paths, "subj01")
    write_betas(paths, "subj01", volumes[:-1])
    with pytest.raises(utils.UserError, match="19 trials, the design has a trial 19"):
        load_test_set(paths, "subj01", split="synthetic")
    mask[tuple(np.argwhere(mask)[0])] = False
    write_nifti(paths.rois("subj01") / "nsdgeneral.nii.gz", mask.astype(np.int16))
    with pytest.raises(utils.UserError, match="6 voxels, the betas of subj01 have 7"):
        open_synthetic_betas(paths, "subj01")
    for order in (SHOWN - 1, SHOWN + 0.5):
        scipy.io.savemat(paths.synthetic_design, {"masterordering": order})
        with pytest.raises(utils.UserError, match="masterordering is"):
            load_synthetic_trials(paths, "subj01")


def test_imagery_is_refused_by_every_script(capsys):
    for script in (score_c, recon, evaluate):
        with pytest.raises(SystemExit) as stop:
            script.main(["--test_split", "imagery"])
        assert stop.value.code == 2 and "is not known here, and is not guessed" in capsys.readouterr().err


def test_features_are_those_of_the_synthetic_stimuli(paths, tiny_models, capsys):
    write_synthetic(paths)
    words = tiny_features.words(paths, tiny_models, ["c", "z", "g_2"], "--test_split", "synthetic", "--subj", "1")
    img2feat.main(words)
    assert "c: left out, the stimuli of NSD-synthetic have no captions" in capsys.readouterr().out
    assert not list(paths.stimuli.glob("*_all.hdf5")) and not list(paths.synthetic.glob("c_*"))
    # the same pictures as stimuli of NSD give the same features
    with h5py.File(paths.stimuli / "nsd_stimuli.hdf5", "r+") as file:
        file["imgBrick"][:COMMON + OWN] = SyntheticStimuli(paths, "subj01")[np.arange(COMMON + OWN)]
    img2feat.main(tiny_features.words(paths, tiny_models, ["z", "g_2"], "--components", "0"))
    for feat in ("z", "g_2"):
        found = feature_of(paths, feat, "subj01", DISTINCT)[DISTINCT[[5, 1]]]
        wanted = tiny_features.stored(paths, feat)[[5, 1]].reshape(found.shape)
        np.testing.assert_allclose(found, wanted, atol=2e-3)
    with pytest.raises(utils.UserError, match="features.sh --test_split synthetic --feats g_4 --subj 1"):
        feature_of(paths, "g_4", "subj01", DISTINCT)
    with pytest.raises(utils.UserError, match="have no captions"):
        feature_of(paths, "c", "subj01", DISTINCT)


def test_from_responses_to_a_table_of_its_own(whole_world, tiny_models, capsys):
    paths = tiny_nsd.Paths(whole_world.root, whole_world.root / "MindEyeV2/mindeyev2")
    write_synthetic(paths)
    img2feat.main(tiny_features.words(paths, tiny_models, ["z", "g_2"], "--test_split", "synthetic"))
    for script in (score_c, score_g, score_z, recon, evaluate):
        assert whole_world.run(script, "--test_split", "synthetic") == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    scores = whole_world.root / "scores_all/subj01/pretrained_subj01_3sess_ext1_c_8_mlp_synthetic"
    assert load_scores(scores)[0].tolist() == DISTINCT.tolist()
    assert json.loads((scores / "config.json").read_text())["test_split"] == "synthetic"
    pictures = whole_world.root / "outputs_all/subj01/cp_4096_v1_synthetic/300/0.5"
    found = json.loads((pictures / "metrics.json").read_text())
    assert found["pixcorr"]["n"] == COMMON + OWN and found["r2_z"]["n"] == COMMON + OWN and "r2_c" not in found
    assert found["brain_to_c_top1"]["missing"] == "the stimuli have no captions"
    assert json.loads((pictures / "metrics_config.json").read_text())["stimuli"] == COMMON + OWN
    parts = json.loads((pictures / "parts.json").read_text())
    n = {part: sets["reconstructed"]["pixcorr"]["n"] for part, sets in parts.items()}
    assert n == {"stimuli that all saw": COMMON, "the subject's own colours": OWN}
    mean = sum(sets["reconstructed"]["pixcorr"]["value"] * n[part] for part, sets in parts.items()) / (COMMON + OWN)
    assert mean == pytest.approx(found["pixcorr"]["value"]) and "the subject's own colours, 3 images" in printed
    # the truth is what was seen: compared with itself it is perfect
    assert whole_world.run(evaluate, "--test_split", "synthetic", "--seen") == 0
    assert json.loads((pictures / "seen/metrics.json").read_text())["pixcorr"]["value"] == pytest.approx(1)
    # responses that are others now are decoded again
    capsys.readouterr()
    score = ["--root", str(whole_world.root), "--hidden_dim", "8", "--num_sessions", "3", "--device", "cpu",
             "--test_split", "synthetic"]
    score_c.main(score)
    assert "kept" in capsys.readouterr().out
    write_synthetic(paths, seed=1)
    score_c.main(score)
    assert "kept" not in capsys.readouterr().out
    with pytest.raises(utils.UserError, match="have no captions"):
        score_c.main([*score, "--ground_truth"])
