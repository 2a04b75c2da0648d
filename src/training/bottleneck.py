"""Responses squeezed to a few numbers: how little of the brain pictures need (BrainBits, arXiv 2411.02783).

--control bottleneck5 decodes responses of which five numbers are left: those five linear combinations of the voxels
that tell most about the features. Where pictures are no better without the squeeze, the rest of the response added
nothing that the metric sees. Letters: N images, V voxels, K components, k numbers left.
"""

import re

import numpy as np
import torch

import options
import utils
from nsd.components import open_components
from nsd.repeats import average_repeats
from nsd.rows import open_betas
from nsd.trials import split_trials
from training.ridge import decompose, solve

FIRST = 128  # components of each feature that the k numbers are to tell about


def numbers_left(control):
    """The k of --control bottleneck<k>; None of any other control."""
    found = re.fullmatch(r"bottleneck(\d+)", control or "")
    return int(found[1]) if found else None


class Bottleneck:
    """Responses (N, V) -> the same, made of k numbers each: mean + numbers (N, k) @ decode (k, V)."""

    def __init__(self, responses, targets, k):
        """Fit to training responses (N, V) and what they are to tell, (N, K).

        Reduced-rank regression (Izenman 1975, J. Multivariate Anal. 5): of the fitted values of a ridge regression the
        first k principal axes. The response is rebuilt from the k numbers by least squares.
        """
        rows = torch.from_numpy(responses)
        weight = solve(decompose(rows), torch.from_numpy(targets))[0]  # (K, V)
        self.mean = rows.double().mean(0)
        centred = rows.double() - self.mean
        fitted = centred @ weight.T
        axes = torch.linalg.eigh(fitted.T @ fitted)[1][:, -k:]  # (K, k)
        self.encode = weight.T @ axes  # (V, k)
        self.decode = torch.linalg.lstsq(centred @ self.encode, centred).solution  # (k, V)

    def __call__(self, responses):
        rows = torch.from_numpy(np.ascontiguousarray(responses)).double()
        return (self.mean + (rows - self.mean) @ self.encode @ self.decode).float().numpy()


def fit_bottleneck(paths, subj, held_out, k):
    """Fit a Bottleneck to a subject's training images and all features that have components.

    held_out: arguments of split_trials. A feature counts by its shares of variance, so that none drowns the others.
    """
    trials = split_trials(paths, subj, *held_out)[0]
    images = average_repeats(open_betas(paths, subj), trials)
    known = [open_components(paths, feat) for feat in options.FEATURES if paths.components(feat).exists()]
    if not known:
        raise utils.UserError(f"--control bottleneck{k}: no feature has components, which say what the {k} numbers are "
                              "to tell about; write them (bash scripts/features.sh)")
    targets = [found.coefficients[images.image_ids][:, :FIRST] / found.total**0.5 for found in known]
    most = min(len(images.image_ids) - 1, images.betas.shape[1], sum(part.shape[1] for part in targets))
    if not 1 <= k <= most:
        raise utils.UserError(f"--control bottleneck{k}: wanted 1 to {most} numbers")
    return Bottleneck(images.betas, np.concatenate(targets, axis=1), k)
