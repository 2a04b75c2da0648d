"""A trained brain encoding model (GNet): predicted responses to pictures. N images, V voxels, n of a region."""

from typing import NamedTuple

import numpy as np
import torch

import options
import utils
from disk.checkpoints import load_checkpoint
from disk.hints import encoders_there
from disk.names import run_name
from models import GNet, restore
from nsd.rows import open_betas

AT_ONCE = 16  # pictures that are predicted together: a CPU takes a third longer for batches of 50


class Encoder(NamedTuple):
    """A trained encoding model of one subject."""

    run: str
    subj: str
    model: GNet
    val_r: np.ndarray  # (V,) validation r of every voxel
    held_out: tuple  # which training images validated it: arguments of split_trials
    file: object

    def predict(self, pictures, batch_size=AT_ONCE, voxels=None, show=None):
        """Responses (N, V), or (N, n) of the index `voxels`, to pictures: (N, H, W, 3) uint8, or an iterable of such
        batches. show: title of the progress bar, None = no bar."""
        device = next(self.model.parameters()).device
        if isinstance(pictures, np.ndarray):
            pictures = [pictures[start:start + batch_size] for start in range(0, len(pictures), batch_size)]
        voxels = None if voxels is None else torch.as_tensor(voxels, device=device)
        found = []
        for batch in utils.progress(pictures, desc=show, unit="batch", disable=show is None):
            images = torch.from_numpy(np.array(batch)).to(device).permute(0, 3, 1, 2) / 255
            with torch.inference_mode():
                found.append(self.model(images, self.subj, voxels).cpu().numpy())
        return np.concatenate(found)


def encoder_file(paths, run):
    """The checkpoint of an encoding model; UserError when there is none."""
    file = paths.run(run) / "best.pth"
    there = "" if file.exists() else encoders_there(paths)
    hint = ("train one (STAGES=gnet bash scripts/train.sh), or convert the published one (src/convert_gnet.py) and "
            "give --gnet_run gnet_published")
    return utils.require(file, f"--gnet_run: the brain encoding model {run}", (f"{there}; or " if there else "") + hint)


def load_encoder(paths, subj, run, seed, device):
    """The encoding model that --gnet_run names (None: the subject's own) with subj's voxels, in eval mode, frozen.

    Raises UserError when there is none, when it is not of this subject or not of its betas.
    """
    run = run or run_name("scratch", subj, "gnet", None)
    file = encoder_file(paths, run)
    state = load_checkpoint(file)
    if state["model_args"]["kind"] != "gnet":
        raise utils.UserError(f"--gnet_run {run}: is a run of {state['config']['feat']}, wanted a GNet (gnet_...)")
    if subj not in state["n_voxels"]:
        raise utils.UserError(f"--gnet_run {run}: encodes {', '.join(state['n_voxels'])}, wanted {subj}; train it on "
                              f"{subj} (STAGES=gnet SUBJ={int(subj[-2:])} bash scripts/train.sh)")
    n_voxels = open_betas(paths, subj).shape[1]
    if state["n_voxels"][subj] != n_voxels:
        raise utils.UserError(f"--gnet_run {run}: predicts {state['n_voxels'][subj]} voxels of {subj}, its betas have "
                              f"{n_voxels}; use both of one data set, or train it on these")
    if "val_r" not in state:
        raise utils.UserError(f"{file}: does not hold its voxels' validation r; train it again with --overwrite")
    model = restore(state, file)
    config = state["config"]  # the published network's says nothing of a split: ours is as good as any then
    held_out = (config.get("num_sessions"), config.get("val_fraction", options.VAL_FRACTION), config.get("seed", seed))
    model = model.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)
    return Encoder(run, subj, model, state["val_r"][subj].numpy(), held_out, file)
