"""The published GNet's file: of the same structure, made here; converted, and refused where it is not what it says."""

import copy
import os

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import convert_gnet
import utils
from disk.checkpoints import load_checkpoint
from models import build_model
from published_gnet import N_VOXELS, published_gnet


@pytest.fixture
def published():
    return published_gnet()


def run(root, published, *flags):
    folder = root / "MindEyeV2/mindeyev2"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(published, folder / "gnet_multisubject.pt")
    return utils.run_cli(convert_gnet.main, ["--root", str(root), *flags])


def predicted_by_hand(published, images, number):
    """The published forward pass, from the published names."""
    enc, readout = published["best_params"]["enc"], published["best_params"]["fwrfs"][number]

    def stage(x, name, conv="conv1", padding=1):
        x = F.batch_norm(x, enc[f"{name}bn1.running_mean"], enc[f"{name}bn1.running_var"], enc[f"{name}bn1.weight"],
                         enc[f"{name}bn1.bias"])
        return F.conv2d(x, enc[f"{name}{conv}.weight"], enc[f"{name}{conv}.bias"], padding=padding).relu()

    x = F.conv2d(images - enc["mu"], enc["pre.conv1.0.weight"], enc["pre.conv1.0.bias"], stride=4, padding=2).relu()
    x = F.max_pool2d(x, 3, 2)
    x = F.conv2d(x, enc["pre.conv2.0.weight"], enc["pre.conv2.0.bias"], padding=2).relu()
    c3 = stage(x, "enc.", "conv3", 0)
    c4a = stage(c3, "enc.conv4a.")
    c4b = stage(c4a, "enc.conv4b.")
    c5a = stage(F.max_pool2d(c4b, 3, 2, 1), "enc.conv5a.")
    c5b = stage(c5a, "enc.conv5b.")
    c6a = stage(c5b, "enc.conv6a.")
    c6b = stage(c6a, "enc.conv6b.")
    pooled = []
    for maps, field in (([c3, c4a[:, :4], c4b[:, :4]], "rf0"), ([c5a[:, :4], c5b[:, :4], c6a[:, :4], c6b], "rf1")):
        maps = torch.cat(maps, 1).flatten(2)
        maps = (1 + maps.abs()).log() * maps.tanh()
        pooled.append(torch.einsum("vp,bfp->bvf", readout[field].flatten(1).softmax(1), maps))
    pooled = torch.cat(pooled, 2)
    pooled = (1 + pooled.abs()).log() * pooled.tanh()
    return torch.einsum("bvf,vf->bv", pooled, readout["w"]) + readout["b"]


def test_converted_predicts_what_the_published_network_does(tmp_path, published):
    assert run(tmp_path, published) == 0
    state = load_checkpoint(tmp_path / "train_logs/gnet_published/best.pth")
    assert state["n_voxels"] == {"subj01": 6, "subj05": 4}
    model = build_model(state["model_args"])
    model.load_state_dict(state["model"])
    images = torch.rand(2, 3, 227, 227)
    with torch.no_grad():
        for number in N_VOXELS:
            found = model.eval()(images, f"subj{number:02d}")
            torch.testing.assert_close(found, predicted_by_hand(published, images, number), atol=1e-4, rtol=1e-4)
    np.testing.assert_array_equal(state["val_r"]["subj05"], published["val_cc"][5])


class Program:
    """What a hostile pickle would carry."""

    def __reduce__(self):
        return os.mkdir, ("made_by_a_pickle",)


def spoil(published, how):
    published = copy.copy(published)
    fwrfs = published["best_params"]["fwrfs"]
    if how == "program":
        published["extra"] = Program()
    if how == "program in an array":
        published["extra"] = np.array([Program()], dtype=object)
    if how == "mask":
        published["voxel_mask"][5] = np.ones(20, bool)
    if how == "fewer values per voxel":
        fwrfs[1]["w"] = fwrfs[1]["w"][:, 1:]
    if how == "key":
        del published["val_cc"]
    if how == "mean":
        published["input_mean"] = published["input_mean"] + 0.1
    if how == "subject":
        fwrfs[9] = fwrfs[1]
    if how == "layer":
        del published["best_params"]["enc"]["enc.conv5b.conv1.weight"]
    return published


@pytest.mark.parametrize("how", ["program", "program in an array", "mask", "fewer values per voxel", "key", "mean",
                                 "subject", "layer"])
def test_what_is_not_the_published_network_is_refused(tmp_path, published, how, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path, spoil(published, how)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "gnet_multisubject.pt" in lines[0]
    assert not (tmp_path / "made_by_a_pickle").exists() and not (tmp_path / "train_logs").exists()


def test_betas_with_other_voxels_are_refused(tmp_path, published, capsys):
    (tmp_path / "MindEyeV2/mindeyev2").mkdir(parents=True)
    with h5py.File(tmp_path / "MindEyeV2/mindeyev2/betas_all_subj05_fp32_renorm.hdf5", "w") as file:
        file["betas"] = np.zeros((3, 5), np.float32)
    assert run(tmp_path, published) == 2
    assert "4 voxels of subj05" in capsys.readouterr().err


def test_a_missing_file_and_a_second_conversion_say_what_to_do(tmp_path, published, capsys):
    assert utils.run_cli(convert_gnet.main, ["--root", str(tmp_path)]) == 2
    assert "download it" in capsys.readouterr().err
    assert run(tmp_path, published) == 0 and run(tmp_path, published) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(tmp_path, published, "--overwrite") == 0
