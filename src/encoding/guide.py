"""The pull of a measured response: how far a picture's predicted response agrees with it, and the loss that guides.

Letters: N images, B batch, b rows of it at once, V voxels of the subject, n of a region. Responses are z-scored betas.
docs/method.md, "GNet and guidance by the brain", has the equations.
"""

import numpy as np
import torch

import utils
from disk.files import load_npy
from encoding.encoder import AT_ONCE
from encoding.errors import ResponseErrors
from nsd.regions import roi_masks
from nsd.repeats import AveragedRows
from nsd.rows import open_betas, open_stimuli
from nsd.trials import split_trials

GOOD_R = 0.1  # validation r from which a voxel may guide
FEWEST_VOXELS = 20  # that a region must have, to guide
PREFLIGHT_R, PREFLIGHT_IMAGES = 0.1, 200  # median r on training images: below it the voxels are in another order
ALL = ("V1", "V2", "V3", "V4", "higher_vis")  # --gnet_roi all


# --- agreement ---------------------------------------------------------------------------------------------------


def weighted_correlation(a, b, weights):
    """Pearson correlation of the rows of a and b, (B, n), with weights (n,) >= 0; returns (B,)."""
    weights = weights / weights.sum()
    a, b = (rows - (weights * rows).sum(1, keepdim=True) for rows in (a, b))
    spread = (weights * a.square()).sum(1) * (weights * b.square()).sum(1)
    return (weights * a * b).sum(1) / spread.clamp_min(1e-24).sqrt()


def good_voxels(encoder, masks, roi):
    """{region: indices (n,) of its voxels with validation r > GOOD_R}; roi: a name of masks {name: (V,)}, or all.

    Raises UserError for an unknown region and for one with fewer than FEWEST_VOXELS such voxels.
    """
    names = [name for name in ALL if name in masks] if roi == "all" else [roi]
    unknown = [name for name in names if name not in masks]
    if unknown or not names:
        raise utils.UserError(f"--gnet_roi {roi}: no region of {encoder.subj}; wanted {', '.join(masks)} or all")
    found = {name: np.flatnonzero(masks[name] & (encoder.val_r > GOOD_R)) for name in names}
    for name, voxels in found.items():
        if len(voxels) < FEWEST_VOXELS:
            raise utils.UserError(
                f"--gnet_roi {roi}: {len(voxels)} of the {masks[name].sum()} voxels of {name} have a validation r over "
                f"{GOOD_R:g}, wanted at least {FEWEST_VOXELS}; choose another region, or a better --gnet_run "
                f"({encoder.run})")
    return found


def agreement(predicted, measured, places, weights):
    """Weighted correlation per region, {region: (B,)}: predicted and measured (B, n) hold the regions' voxels, side by
    side; places: {region: slice}, weights (n,)."""
    return {name: weighted_correlation(predicted[:, at], measured[:, at], weights[at]) for name, at in places.items()}


# --- guidance ----------------------------------------------------------------------------------------------------


class BrainLoss:
    """Guidance term: how far the responses predicted to images (b, 3, H, W) in [0, 1] are from their targets, (b,).

    Mean over regions of alpha (1 - r_w) + (1 - alpha) MSE_w / 2, r_w being Pearson's r across voxels and MSE_w the
    squared error, both weighted by the voxels' squared validation r. A sample whose mean r_w has once reached `enough`
    has no loss from then on: beyond it guidance would fit the target's noise.

    .kappa   how hard it pulls, relative to the other terms (sampling.guidance.guidance_pull)
    .waits   fraction of the guided steps that it leaves to the others (sampling.guidance.speaking)
    .facts   of the last call: {"r_<region>": (b,), "stopped": (b,) bool}
    """

    relative = True  # its unit is its own

    def __init__(self, encoder, voxels, places, weights, targets, kappa, alpha=1.0, enough=float("inf"),
                 waits=0.0):
        """voxels (n,): the regions', side by side as places {region: slice} say; weights (n,); targets (B, n)."""
        self.encoder, self.voxels, self.places, self.weights = encoder, voxels, places, weights
        self.targets, self.kappa, self.alpha, self.enough, self.waits = targets, kappa, alpha, enough, waits
        self.stopped = torch.zeros(len(targets), dtype=torch.bool, device=targets.device)
        self.facts = {}

    def __call__(self, image, rows=slice(None)):
        """rows: which of the batch the images are of, a slice."""
        targets = self.targets[rows]
        predicted = self.encoder.model(image.to(targets), self.encoder.subj, self.voxels)  # (b, n)
        r = agreement(predicted, targets, self.places, self.weights)
        losses = []
        for name, at in self.places.items():
            error = (predicted[:, at] - targets[:, at]).square()
            mse = (error * self.weights[at]).sum(1) / self.weights[at].sum()
            losses.append(self.alpha * (1 - r[name]) + (1 - self.alpha) * mse / 2)
        mean_r = torch.stack(list(r.values())).mean(0).detach()
        stopped = self.stopped[rows] = self.stopped[rows] | (mean_r >= self.enough)
        self.facts = {**{f"r_{name}": value.detach() for name, value in r.items()}, "stopped": stopped}
        return torch.stack(losses).mean(0) * ~stopped


class BrainMeasurement:
    """Guidance term: -log p of the measured responses given the images (b, 3, H, W) in [0, 1] that they are to, (b,).

    Over the voxels of all regions together, with the errors that predictions of true images have (encoding.errors).

    .kappa   times which it counts
    .waits   as of BrainLoss
    .facts   of the last call: {"r_<region>": (b,)}, weighted as of BrainLoss
    """

    relative = False  # its unit is that of other measurements

    def __init__(self, encoder, voxels, places, weights, targets, errors, kappa, waits=0.0):
        """As BrainLoss; errors: ResponseErrors of the n voxels."""
        self.encoder, self.voxels, self.places, self.weights = encoder, voxels, places, weights
        self.targets, self.errors, self.kappa, self.waits = targets, errors, kappa, waits
        self.facts = {}

    def __call__(self, image, rows=slice(None)):
        """rows: which of the batch the images are of, a slice."""
        targets = self.targets[rows]
        predicted = self.encoder.model(image.to(targets), self.encoder.subj, self.voxels)  # (b, n)
        r = agreement(predicted.detach(), targets, self.places, self.weights)
        self.facts = {f"r_{name}": value for name, value in r.items()}
        return self.errors.misfit(predicted - targets)


class BrainGuide:
    """What guidance by the brain needs, for all pictures of a recon: made once, `term` gives a batch its BrainLoss, or
    its BrainMeasurement.

    Checks, before anything is drawn, that the encoding model and the betas count voxels in the same order: the median r
    of its predictions over training images must exceed PREFLIGHT_R. Measures how well predictions of true images agree
    with responses, on validation images: there guidance stops.
    """

    def __init__(self, encoder, paths, targets, roi, kappa, alpha=1.0, waits=0.0, posterior=False, say=print):
        """targets: (N, V) responses; posterior: terms are measurements, and alpha does not matter.

        Raises UserError for regions that cannot guide and for a wrong voxel order.
        """
        regions = good_voxels(encoder, roi_masks(paths, encoder.subj), roi)
        voxels, ends = np.concatenate(list(regions.values())), np.cumsum([len(index) for index in regions.values()])
        self.encoder, self.targets, self.kappa, self.alpha, self.waits = encoder, targets, kappa, alpha, waits
        self.device = next(encoder.model.parameters()).device
        self.voxels = torch.from_numpy(voxels).to(self.device)
        self.places = {name: slice(int(end) - len(index), int(end))
                       for (name, index), end in zip(regions.items(), ends, strict=True)}
        self.weights = torch.from_numpy(encoder.val_r[voxels] ** 2).to(self.device)

        train, val = self.read_true_images(paths)
        check_voxel_order(encoder, *(responses.cpu() for responses in train))
        found = agreement(*val, self.places, self.weights)
        self.enough = float(torch.stack(list(found.values())).mean())
        self.errors = ResponseErrors(train[0] - train[1], val[0] - val[1]) if posterior else None
        for name, index in regions.items():
            say(f"{name}: {len(index)} voxels guide; {encoder.run} predicts their response to a true image with "
                f"r = {found[name].mean():.3f}, mean of {len(val[0])} validation images")

    def read_true_images(self, paths):
        """Predicted and measured responses (N, n) to training and to validation images, PREFLIGHT_IMAGES at most."""
        betas, stimuli = open_betas(paths, self.encoder.subj), open_stimuli(paths)
        for trials in split_trials(paths, self.encoder.subj, *self.encoder.held_out):
            seen = AveragedRows(betas, trials)
            chosen = utils.evenly(len(seen.image_ids), PREFLIGHT_IMAGES)
            predicted = self.encoder.predict(stimuli.batches(seen.image_ids[chosen], AT_ONCE), voxels=self.voxels)
            predicted = torch.from_numpy(predicted).to(self.device)
            yield predicted, torch.from_numpy(seen[chosen]).to(self.device)[:, self.voxels]

    def term(self, rows):
        """The term of a batch: rows (B,) of the targets."""
        targets = torch.from_numpy(self.targets[rows]).to(self.device)[:, self.voxels]
        if self.errors is not None:
            return BrainMeasurement(self.encoder, self.voxels, self.places, self.weights, targets, self.errors,
                                    self.kappa, self.waits)
        return BrainLoss(self.encoder, self.voxels, self.places, self.weights, targets, self.kappa, self.alpha,
                         self.enough, self.waits)


def check_voxel_order(encoder, predicted, measured):
    """Raise UserError unless responses predicted for training images, (N, n), follow the measured ones.

    r is that of each voxel, over the images.
    """
    by_voxel = (torch.as_tensor(responses, dtype=torch.float64).T for responses in (predicted, measured))  # (n, N)
    r = np.median(weighted_correlation(*by_voxel, torch.ones(len(predicted), dtype=torch.float64)).numpy())
    if not r > PREFLIGHT_R:
        raise utils.UserError(
            f"--gnet_run {encoder.run}: on {len(predicted)} training images of {encoder.subj} its median r with the "
            f"betas is {r:.3f}, wanted more than {PREFLIGHT_R:g}; the betas' voxels are in another order than the "
            "network's: use both of one data set")


def read_target(file, image_ids, n_voxels):
    """The target responses (N, V) float32 to these images, by id, from an .npy (n, V) beside its image_ids.npy (n,)."""
    hint = "give responses (n, voxels) beside an image_ids.npy (n,) (score_gnet.py writes such)"
    rows = load_npy(file, "--target_fmri_npy", hint, mmap_mode="r")
    ids = load_npy(file.parent / "image_ids.npy", "--target_fmri_npy: the ids of its rows", hint)
    kinds = rows.dtype.kind == "f" and ids.dtype.kind in "iu"
    if not kinds or rows.ndim != 2 or ids.shape != rows.shape[:1] or len(np.unique(ids)) != len(ids):
        raise utils.UserError(f"--target_fmri_npy {file}: {rows.dtype} of shape {rows.shape} for {len(np.unique(ids))} "
                              f"different ids ({ids.dtype}), wanted (n, voxels) for n, in float; {hint}")
    if rows.shape[1] != n_voxels:
        raise utils.UserError(f"--target_fmri_npy {file}: {rows.shape[1]} voxels, wanted the {n_voxels} of the betas; "
                              "give responses of this subject")
    row_of = {int(image_id): row for row, image_id in enumerate(ids)}
    missing = [image_id for image_id in image_ids if int(image_id) not in row_of]
    if missing:
        raise utils.UserError(f"--target_fmri_npy {file}: no row for image id {missing[0]} and {len(missing) - 1} "
                              "others; give a row for every image that is drawn")
    targets = rows[[row_of[int(image_id)] for image_id in image_ids]].astype(np.float32)
    bad = ~np.isfinite(targets).all(1)
    if bad.any():
        raise utils.UserError(f"--target_fmri_npy {file}: NaN or infinite values in the row of image id "
                              f"{np.asarray(image_ids)[bad][0]}; wanted finite responses")
    return targets
