"""The published GNet, gnet_multisubject.pt of pscotti/mindeyev2: a pickle, read without running what it may hold."""

import numpy as np
import torch

import utils
from models import GNet
from nsd.sources import SUBJECTS

KEYS = ("best_params", "input_mean", "voxel_mask", "val_cc")
# the names under which NumPy pickles an array, before and since its version 2
ARRAY_PARTS = [(getattr(np._core.multiarray, name), f"numpy.{core}.multiarray.{name}")
               for name in ("_reconstruct", "scalar") for core in ("core", "_core")]
ARRAY_PARTS += [np.ndarray, np.dtype, *{type(np.dtype(code)) for code in "?bBhHiIlLqQefdO"}]


def read_published(file):
    """The published dictionary; a pickle that would make anything but tensors and arrays raises UserError."""
    utils.require(file, "the published GNet", "download it (bash scripts/download.sh), or give --file")
    try:
        with torch.serialization.safe_globals(ARRAY_PARTS):
            published = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for damaged files and for what it refuses
        reason = str(error).splitlines()[0]
        raise utils.UserError(f"{file}: not read ({reason}); wanted tensors and arrays only: download it from "
                              "pscotti/mindeyev2 again") from None
    lacking = [key for key in KEYS if not isinstance(published, dict) or key not in published]
    if lacking:
        raise utils.UserError(f"{file}: has no {', '.join(lacking)}, wanted the published gnet_multisubject.pt: "
                              "download it from pscotti/mindeyev2 again")
    return published


def convert(published, file):
    """GNet with the published weights, and the validation r of every voxel, {subject: (V,)}; UserError unless it fits.

    Published names: enc.{mu, pre.conv1.0, pre.conv2.0, enc.conv3, enc.bn1, enc.conv4a.{conv1, bn1}, ...} and, for each
    subject 1..8, fwrfs.{rf0 (V, 25, 25), rf1 (V, 13, 13), w (V, 512), b (V,)}.
    """
    try:
        shared, readouts = published["best_params"]["enc"], published["best_params"]["fwrfs"]
        n_voxels = {SUBJECTS[int(number) - 1]: len(readout["b"]) for number, readout in readouts.items()}
        width, trunk_width = (len(shared[f"enc.{block}.conv1.bias"]) for block in ("conv4a", "conv6b"))
        state = {"input_mean": shared["mu"].reshape(1, 3, 1, 1)}
        for ours, theirs in (("prefilter.0", "pre.conv1.0"), ("prefilter.3", "pre.conv2.0")):
            state |= {f"{ours}.{part}": shared[f"{theirs}.{part}"] for part in ("weight", "bias")}
        for block in GNet.BLOCKS:
            conv, norm = f"enc.conv{block[1:]}.conv1", f"enc.conv{block[1:]}.bn1."
            if block == "c3":
                conv, norm = "enc.conv3", "enc.bn1."
            state |= {f"{block}.2.{part}": shared[f"{conv}.{part}"] for part in ("weight", "bias")}
            state |= {f"{block}.0.{key.removeprefix(norm)}": value for key, value in shared.items()
                      if key.startswith(norm)}
        for subj, readout in zip(n_voxels, readouts.values(), strict=True):
            state |= {f"readouts.{subj}.fields.{i}": readout[f"rf{i}"].flatten(1) for i in (0, 1)}
            state |= {f"readouts.{subj}.weight": readout["w"], f"readouts.{subj}.bias": readout["b"].flatten()}
        model = GNet(n_voxels, trunk_width, width - trunk_width, frozen_prefilter=True)
        model.load_state_dict(state)
        counts, val_r = {}, {}
        for subj, number in zip(n_voxels, readouts, strict=True):
            counts[subj] = int((np.asarray(published["voxel_mask"][number]) > 0).sum())
            val_r[subj] = torch.as_tensor(np.asarray(published["val_cc"][number]), dtype=torch.float32).flatten()
    except (KeyError, IndexError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise utils.UserError(f"{file}: not of the published structure ({type(error).__name__}: {reason}); download "
                              "it from pscotti/mindeyev2 again") from None
    for subj, n in n_voxels.items():
        if counts[subj] != n or len(val_r[subj]) != n:
            raise utils.UserError(f"{file}: {subj} has readouts of {n} voxels, a mask of {counts[subj]} and validation "
                                  f"r of {len(val_r[subj])}, wanted the same; download it from pscotti/mindeyev2 again")
    if not np.allclose(np.asarray(published["input_mean"]).ravel(), state["input_mean"].ravel().numpy()):
        raise utils.UserError(f"{file}: input_mean is not the network's own; download it from pscotti/mindeyev2 again")
    return model, val_r
