"""A tiny world whose brain is a GNet of random weights plus noise: the encoding model guides, and knows it well."""

import h5py
import nibabel
import numpy as np
import torch

from disk.checkpoints import save_checkpoint
from disk.names import run_name
from disk.scores import save_scores
from models import GNet
from nsd.rows import open_stimuli
from nsd.trials import load_trials
from tiny_nsd import SHARED, write_tiny_nsd
from tiny_sd import TOKENS, WIDTH

V = 60  # voxels of subj01: 25 of V1, 22 of V2, 3 of V3, 10 of no region
LABELS = [1] * 12 + [2] * 13 + [3] * 22 + [5] * 3 + [0] * 10  # of prf-visualrois, voxel by voxel
RUN = "gnet_subj01"


def write_brain(root, noise=0.5):
    """The tiny data set with responses of a random GNet to its images, that GNet as a run, scores of c, g_2, g_4."""
    paths, _ = write_tiny_nsd(root)
    torch.manual_seed(3)
    gnet = GNet({"subj01": V}, trunk_width=4, pass_through=4).eval()
    stimuli = open_stimuli(paths)
    with torch.no_grad():
        images = torch.from_numpy(stimuli[:]).permute(0, 3, 1, 2) / 255
        torch.nn.init.normal_(gnet.readouts["subj01"].weight)
        mean, std = (f(gnet(images, "subj01"), 0) for f in (torch.mean, torch.std))
        gnet.readouts["subj01"].weight /= std[:, None]
        gnet.readouts["subj01"].bias.copy_(-mean / std)
        responses = gnet(images, "subj01").numpy()
    trials = np.concatenate([load_trials(paths, "subj01", split) for split in ("train", "new_test")])
    rng = np.random.default_rng(1)
    betas = np.zeros((len(trials), V), np.float32)
    for _, _, image_id, row, _ in trials:
        betas[row] = responses[image_id] + noise * rng.standard_normal(V)
    with h5py.File(paths.betas("subj01"), "w") as file:
        file["betas"] = betas
    with h5py.File(paths.data_path / "brain_region_masks.hdf5", "w") as file:
        for name, first, last in (("V1", 0, 25), ("V2", 25, 47), ("V3", 47, 50), ("nsd_general", 0, V)):
            file[f"subj01/{name}"] = (np.arange(V) >= first) & (np.arange(V) < last)
    write_run(paths, gnet)
    scores = {"c": (TOKENS, WIDTH), "g_2": (5, 12), "g_4": (5, 12)}
    for feat, shape in scores.items():
        folder = paths.scores("subj01", run_name("finetune", "subj01", feat, 1024, 3), feat)
        save_scores(folder, SHARED, {"nsdgeneral": rng.standard_normal((len(SHARED), *shape))}, {})
    return paths


def write_volumes(paths, subj, labels_inside, shape=(3, 4, 5), affine=None, transposed=False, seed=0):
    """NSD's two ROI volumes: voxels at random places inside, labels_inside in C order of (X, Y, Z)."""
    inside = np.zeros(np.prod(shape), bool)
    inside[np.random.default_rng(seed).choice(inside.size, len(labels_inside), replace=False)] = True
    general, labels = np.where(inside, 1, -1).astype(np.int16), np.full(inside.size, -1, np.int16)
    labels[inside] = labels_inside
    paths.rois(subj).mkdir(parents=True, exist_ok=True)
    for name, volume in (("nsdgeneral", general), ("prf-visualrois", labels)):
        volume = volume.reshape(shape).T.copy() if transposed else volume.reshape(shape)
        image = nibabel.Nifti1Image(volume, np.eye(4) if affine is None else affine)
        nibabel.save(image, paths.rois(subj) / f"{name}.nii.gz")


def write_run(paths, gnet, run=RUN, val_r=None):
    """A GNet as train_gnet.py leaves it."""
    val_r = torch.linspace(0.3, 0.9, V) if val_r is None else val_r
    save_checkpoint(paths.run(run) / "best.pth", {
        "model": gnet.state_dict(), "model_args": gnet.model_args, "n_voxels": gnet.n_voxels,
        "val_r": {"subj01": val_r}, "config": {
            "feat": "gnet", "subj": "subj01", "num_sessions": 3, "val_fraction": 0.3, "seed": 42}})
