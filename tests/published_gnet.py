"""The published GNet's file (gnet_multisubject.pt): one of the same structure, small and of random weights."""

import numpy as np
import torch

N_VOXELS = {1: 6, 5: 4}  # of these subjects


def block(channels_in, channels_out, name, conv="conv1"):
    return {f"{name}{conv}.weight": 0.1 * torch.randn(channels_out, channels_in, 3, 3),
            f"{name}{conv}.bias": torch.randn(channels_out), f"{name}bn1.weight": torch.rand(channels_in) + 0.5,
            f"{name}bn1.bias": torch.randn(channels_in), f"{name}bn1.running_mean": torch.randn(channels_in),
            f"{name}bn1.running_var": torch.rand(channels_in) + 0.5, f"{name}bn1.num_batches_tracked": torch.tensor(7)}


def published_gnet():
    """What torch.load returns of the file: trunk_width 4, pass_through 8."""
    torch.manual_seed(0)
    mean = torch.rand(1, 3, 1, 1)
    enc = {"mu": mean, "pre.conv1.0.weight": 0.1 * torch.randn(64, 3, 11, 11), "pre.conv1.0.bias": torch.randn(64),
           "pre.conv2.0.weight": 0.1 * torch.randn(192, 64, 5, 5), "pre.conv2.0.bias": torch.randn(192),
           **block(192, 128, "enc.", "conv3"), **block(128, 12, "enc.conv4a.")}
    for name in ("conv4b", "conv5a", "conv5b", "conv6a"):
        enc |= block(12, 12, f"enc.{name}.")
    enc |= block(12, 4, "enc.conv6b.")
    fwrfs = {number: {"rf0": torch.randn(n, 25, 25), "rf1": torch.randn(n, 13, 13), "w": torch.randn(n, 152),
                      "b": torch.randn(n)} for number, n in N_VOXELS.items()}
    masks = {number: np.arange(20) < n for number, n in N_VOXELS.items()}
    return {"best_params": {"enc": enc, "fwrfs": fwrfs}, "input_mean": mean.numpy(), "voxel_mask": masks,
            "voxel_roi": {number: np.zeros(n, int) for number, n in N_VOXELS.items()},
            "voxel_index": {number: np.arange(n) for number, n in N_VOXELS.items()},
            "brain_nii_shape": {number: np.array([2, 2, 5]) for number in N_VOXELS},
            "val_cc": {number: np.linspace(0, 1, n, dtype=np.float32) for number, n in N_VOXELS.items()}}
