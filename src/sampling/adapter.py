"""The adapter: Stable Diffusion conditioned on decoded g and z, beside the text (models.FeatureAdapter).

Guidance by a gradient moves a picture to where CLIP finds in it what was decoded, which also finds changes that nobody
else sees. An adapter is trained to draw what images look like whose features were decoded so: the posterior, learnt.
A path that starts from decoded z keeps what is wrong with it, its blur; an adapter knows how far z can be trusted.
Its inputs in training are decodings as the subject's responses would give them (Decodings), of any images: none of
them has to have been seen by the subject. Letters: N images, B batch, K components, F numbers in a row of a feature.
"""

import numpy as np
import pandas as pd
import torch

import utils
from disk.checkpoints import load_checkpoint
from models import adapter_feats, restore
from nsd.batches import Epochs, read_targets
from nsd.components import CoefficientRows, open_components
from nsd.repeats import AveragedRows
from nsd.rows import open_betas, open_feature
from nsd.trials import shared_images, split_by_image
from training.ridge import decompose, left_out
from training.runs import Run, claim, split_of
from training.team import ALONE

LEAST_R2 = 0.05  # a component of which less is decoded counts as not decoded: its mean
MOST_VALIDATED = 500  # images
ERRS_LESS = 0.25  # of the images that train
EMPTY_SHARE = 0.1  # of the training's texts: classifier-free guidance needs the empty one


class ImageBatches(Epochs):
    """An epoch's batches of images, each once, drawn from (seed, epoch); stands in for nsd.batches.EpochBatches."""

    def __init__(self, image_ids, targets, batch_size, seed, rank=0, size=1):
        """image_ids (N,); targets: {name: Rows by image id}; rank, size: of the processes that share a batch."""
        for rows in targets.values():
            rows.require(image_ids)
        self.image_ids, self.targets, self.seed, self.rank, self.size = image_ids, targets, seed, rank, size
        super().__init__(-(-len(image_ids) // batch_size))
        if not len(image_ids) or len(image_ids) // self.n_batches < size:  # of an epoch's smallest batch
            raise utils.UserError(f"--batch_size {batch_size}, {len(image_ids)} images: fewer in a batch than the "
                                  f"{size} processes, or none; raise it, or --val_fraction, or use fewer processes")

    def batch(self, index):
        order = np.random.default_rng(utils.derive_seed(self.seed, self.epoch)).permutation(self.image_ids)
        image_ids = np.array_split(order, self.n_batches)[index]
        targets = {name: torch.from_numpy(read_targets(rows, image_ids[self.rank::self.size]))
                   for name, rows in self.targets.items()}
        return {"voxels": {}, "targets": targets, "image_ids": torch.from_numpy(image_ids), "sizes": {}}


class Decodings:
    """What a subject's decoder would make of images, as far as that is known: their features, shrunk, with its errors.

    For every component a ridge predicts each training image from its responses, having seen all others (left_out). To
    the true values belongs the slope of these predictions, and what they differ by from it: the differences of one
    image, over all components of all features at once. So features that are decoded from one response err together.
    """

    def __init__(self, components, responses, image_ids, device):
        """components: {feature: Components}; responses (N, V): the mean ones to image_ids (N,)."""
        decomposed = decompose(torch.from_numpy(responses).to(device))
        self.bases, self.means, self.shapes = {}, {}, {}
        self.slopes, self.errors = {}, {}  # {feature: (K,)}, {feature: (N, K)}: 0 of components that are not decoded
        for feat, known in components.items():
            true = torch.from_numpy(known.coefficients[image_ids]).to(device).double()
            found = left_out(decomposed, true)
            spread = (true - true.mean(0)).square().mean(0)
            is_decoded = 1 - (found - true).square().mean(0) / spread >= LEAST_R2
            slopes = is_decoded * ((true - true.mean(0)) * found).mean(0) / spread
            self.slopes[feat], self.errors[feat] = slopes.float(), (is_decoded * found - slopes * true).float()
            self.bases[feat] = torch.from_numpy(known.basis).to(device)
            self.means[feat], self.shapes[feat] = torch.from_numpy(known.mean).to(device), known.shape
        self.n, self.device = len(image_ids), device

    def draw(self, coefficients, errors_of, shares):
        """{feature: decoded rows (B, *shape)} of true coefficients {feature: (B, K)}, with the errors of the training
        images at errors_of (B,); shares (B,): of the way from true features, 0, to such decodings, 1."""
        rows = {}
        for feat, basis in self.bases.items():
            true = coefficients[feat]
            off = (self.slopes[feat] - 1) * true + self.errors[feat][errors_of]
            rows[feat] = (self.means[feat] + (true + shares[:, None] * off) @ basis).unflatten(1, self.shapes[feat])
        return rows


class AdapterObjective:
    """What an adapter minimises: Stable Diffusion's loss, given decoded c, g and z.

    A squared error of the noise weighs 1/sqrt(SNR), half way from the plain loss to that of x0, where it would weigh
    1/SNR: so all noise levels count alike, while the plain loss hardly knows those where least of the picture is seen,
    and most is to be learnt. A quarter of the images that train have smaller errors than the subject's decoder makes,
    down to none: so true features, too, draw what they say.
    """

    judge = "loss"

    def __init__(self, decodings, alphas_cumprod, empty, z_shape):
        """alphas_cumprod (steps,): of the diffusion; empty (1, T, D): the empty text; z_shape: (C, h, w)."""
        self.decodings, self.abar, self.empty, self.z_shape = decodings, alphas_cumprod, empty, z_shape

    def __call__(self, model, batch, progress, generator, team=ALONE):
        """Return (loss, logs) of a joint batch: {"latents": (B, C, h, w), feature: coefficients (B, K), ...}, this
        process's rows.

        loss_plain: what the loss would be without the adapter, on validation images alone.
        """
        n = len(batch["image_ids"])
        latents = batch["latents"].view(-1, *self.z_shape)

        def drawn(draw, *size):  # for the joint batch, so that nothing depends on how many processes share it
            return team.take(draw(*size, generator=generator, device=generator.device)).to(latents.device)

        errors_of = (drawn(torch.rand, n) * self.decodings.n).long()
        t = (drawn(torch.rand, n) * len(self.abar)).long()
        noise, unsaid = drawn(torch.randn, n, *self.z_shape), drawn(torch.rand, n) < EMPTY_SHARE
        shares = (drawn(torch.rand, n) / ERRS_LESS).clamp(max=1) if model.training else torch.ones_like(t)
        rows = self.decodings.draw({feat: batch[feat] for feat in self.decodings.bases}, errors_of, shares)
        text = torch.where(unsaid.view(-1, 1, 1), self.empty, rows.pop("c"))

        abar = self.abar.to(latents.device)[t].view(-1, 1, 1, 1)
        noisy, snr = abar.sqrt() * latents + (1 - abar).sqrt() * noise, (abar / (1 - abar)).flatten()

        def loss_of(predicted):
            errors = (predicted.float() - noise).square().mean((1, 2, 3)) / snr.sqrt()
            return team.join(errors, n).mean()

        loss, logs = loss_of(model(noisy, t, text, rows)), {}
        if not model.training:
            logs["loss_plain"] = loss_of(model(noisy, t, text, None))
        return loss, logs


def open_adapter_run(plan, layers):
    """Read what a training of an adapter needs: latents and components of the images, responses of the subject.

    plan: settings.Plan; layers: names of the g_k. Returns (Run, {feature: Components}), or None where the run's folder
    holds it already, finished. Trained on all images with features but the tested ones; those validate that a run of
    c, z and g would validate on.
    """
    feats = ["c", "z", *layers]
    config, team = claim(plan, "adapter", [plan.subj], components=feats, features=("z",), feats=list(layers))
    if config is None:
        return None
    components, latents = {feat: open_components(plan.paths, feat) for feat in feats}, open_feature(plan.paths, "z")
    there = components["c"].there()
    images = pd.DataFrame({"image_id": there[~np.isin(there, shared_images(plan.paths, len(latents)))]})
    seed = plan.loop.seed
    train, val = (part["image_id"].to_numpy() for part in split_by_image(images, plan.val_fraction, seed))
    val = val[utils.evenly(len(val), MOST_VALIDATED)]
    targets = {feat: CoefficientRows(known) for feat, known in components.items()} | {"latents": latents}
    utils.seed_everything(utils.derive_seed(seed, 0))
    loaders = [ImageBatches(ids, targets, plan.loop.batch_size, seed, team.rank, team.size) for ids in (train, val)]
    tables = {"train": {plan.subj: train}, "val": {plan.subj: val}}
    shapes = {name: rows.row_shape for name, rows in targets.items()}
    n_voxels = {plan.subj: open_betas(plan.paths, plan.subj).shape[1]}
    run = Run(config["run"], "adapter", plan.paths.run(config["run"]), config, team, tables, *loaders, n_voxels, shapes,
              keeps="adapter.")
    return run, components


def decodings_of(plan, components, device):
    """The Decodings of a plan's subject, by its training images."""
    train, _ = split_of(plan, plan.subj)
    seen = AveragedRows(open_betas(plan.paths, plan.subj), train)
    return Decodings(components, seen[np.arange(len(seen.image_ids))], seen.image_ids, device)


# --- drawing ----------------------------------------------------------------------------------------------------------


def feats_of(file, run):
    """Names of the features that the adapter in a checkpoint takes; UserError, naming the run, for none."""
    found = load_checkpoint(file)["model_args"]
    if found["kind"] != "adapter":
        raise utils.UserError(f"--adapter_run {run}: holds no adapter but a {found['kind']}, wanted a run of "
                              "train_adapter.py (adapter_...)")
    return adapter_feats(found["layers"])


def check_scores(adapter, scores, run):
    """Raise UserError unless the scores {feature: (N, ...)} are of the shapes that an adapter takes."""
    for feat in adapter.feats[1:]:
        if scores[feat].shape[1:] != adapter.shape:
            raise utils.UserError(f"scores of {feat}: rows of shape {scores[feat].shape[1:]}, the adapter {run} takes "
                                  f"{adapter.shape}; use the CLIP that it was trained with, or train it again")


def load_adapter(file, unet, device):
    """The adapter of a checkpoint, attached to `unet`; UserError where it is not of such a UNet."""
    state = load_checkpoint(file)
    adapter = restore_adapter(state, file)
    attach(adapter, unet, device, file, state["config"].get("sd_model"))
    return adapter


def restore_adapter(state, file):
    """The adapter of a run's checkpoint `state`, frozen and in eval mode; UserError unless its weights fit."""
    weights = {key.removeprefix("adapter."): value for key, value in state["model"].items()}
    return restore({**state, "model": weights}, file).requires_grad_(False).eval()


def attach(adapter, unet, device, name, sd_model):
    """Let `unet` attend to the tokens of an adapter, which goes to `device`; UserError where it is not of such a UNet.

    name, sd_model: what the message says of the adapter, and of the model that it was trained with.
    """
    try:
        adapter.attach(unet)
    except ValueError as error:
        raise utils.UserError(f"{name}: {error}; give the --sd_model that it was trained with ({sd_model})") from None
    adapter.to(device)
    adapter.attentions.to(unet.dtype)
