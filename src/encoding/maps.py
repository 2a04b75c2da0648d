"""What is known of every voxel: how well it is predicted, what reads it, how hard it pulls. docs/maps.md.

Letters: N images, V voxels, B bootstrap draws, K components, H hidden units, X Y Z axes of a volume.
"""

import numpy as np
import torch

import utils
from models import Decoder, RidgeDecoder
from nsd.rows import open_feature, read_betas
from training.scoring import predict
from training.stacking import FeatureOf

LEAST_CEILING = 0.1  # of a voxel whose share of the ceiling is told: below it is a quotient of noise
PULLED = 64  # random directions over all pictures, for a voxel's pull: its error is a seventh of it then


# --- volumes ------------------------------------------------------------------------------------------------------


def to_volume(values, inside):
    """Put values (V,) where their voxels lie, those of `inside` (X, Y, Z) bool in C order; float32, NaN elsewhere."""
    if len(values) != inside.sum():
        raise utils.UserError(f"a map of {len(values)} voxels, the volume has {inside.sum()}; use both of one data set")
    volume = np.full(inside.shape, np.nan, np.float32)
    volume[inside] = values  # a boolean index runs through its array in C order, however that lies in memory
    return volume


# --- how well GNet predicts ---------------------------------------------------------------------------------------


def correlation(predicted, measured, draws=None):
    """Correlate each voxel over the images, (N, V) and (N, V) -> (V,); 0 of a voxel that does not vary.

    draws (B, N): how often each image counts, one line for each draw of a bootstrap -> (B, V).
    """
    weights = np.ones((1, len(predicted))) if draws is None else np.asarray(draws, np.float64)
    weights = weights / weights.sum(1, keepdims=True)
    # an offset changes no correlation, and without it the differences of squares below lose digits
    a, b = (rows.astype(np.float64) - rows.mean(0, dtype=np.float64) for rows in (predicted, measured))
    mean_a, mean_b = weights @ a, weights @ b
    spread = (weights @ a**2 - mean_a**2).clip(0) * (weights @ b**2 - mean_b**2).clip(0)
    r = np.divide(weights @ (a * b) - mean_a * mean_b, np.sqrt(spread), out=np.zeros_like(spread), where=spread > 1e-20)
    return r[0] if draws is None else r


def ceiling_draws(responses, n_repeats, draws, images_at_once=500):
    """Noise ceilings (B, V) of each draw of a bootstrap, as nsd.repeats.noise_ceiling; None where it has none.

    responses: AveragedRows of N images, whose trials tell signal from noise; n_repeats: trials behind each mean
    response that is predicted; draws (B, N): how often each image counts.
    """
    counts, draws = responses.n_repeats, np.asarray(draws, np.float64)
    if counts.max() == 1:
        return None
    trials, squares, within = (np.zeros((len(draws), responses.shape[1])) for _ in range(3))
    for start in range(0, len(counts), images_at_once):
        at = slice(start, start + images_at_once)
        first, n = responses.first[start], counts[at]
        rows = read_betas(responses.betas, responses.rows[first:first + n.sum()]).astype(np.float64)
        sums, squared = (np.add.reduceat(part, np.cumsum(n) - n) for part in (rows, rows**2))
        trials += draws[:, at] @ sums
        squares += draws[:, at] @ squared
        within += draws[:, at] @ (squared - sums**2 / n[:, None])
    n_trials, n_images = (draws @ counts)[:, None], draws.sum(1)[:, None]
    noise = within / (n_trials - n_images)
    signal = ((squares - trials**2 / n_trials) / (n_trials - 1) - noise).clip(0)
    return np.sqrt(signal / np.maximum(signal + noise * np.mean(1 / n_repeats), 1e-12))


def share_of_ceiling(r, ceiling):
    """r (V,) over its noise ceiling (V,); NaN where the ceiling is below LEAST_CEILING."""
    return np.where(ceiling < LEAST_CEILING, np.nan, r / np.maximum(ceiling, LEAST_CEILING))


# --- what decoders read -------------------------------------------------------------------------------------------


def reads(model, whose, responses, spread, images_at_once=16):
    """Say how far a feature's prediction moves when one voxel alone moves by its spread; (V,).

    model: what predicts the feature (scoring.Source.model); whose: the voxel encoder's subject; responses (N, V):
    where it is asked; spread (V,): each voxel's standard deviation over images. In standard deviations of the feature:
    the norm over components of the prediction's derivative, root mean square over the responses. Of a network that
    decodes whole rows it is the norm of its voxel encoder's weights times the spread, in no unit.
    """
    if not isinstance(model, FeatureOf):
        return model.voxelenc.head(whose).weight.norm(dim=0).detach().cpu().numpy() * spread
    feat, network = model.components.feat, model.network
    linear = network if isinstance(network, RidgeDecoder) else model.ridge
    ridge = linear.heads[feat].weight.detach().double() if linear is not None else None  # (K, V)
    if isinstance(network, RidgeDecoder):
        return ridge.norm(dim=0).cpu().numpy() * spread
    assert isinstance(network, Decoder)
    first = network.voxelenc.head(whose)
    weight = first.weight.detach().double()  # (H, V)
    with torch.no_grad():
        hidden = network.voxelenc({whose: torch.from_numpy(responses).to(weight.device)})  # (N, H)
    of_one = torch.func.vmap(torch.func.jacrev(lambda x: network.decode(x[None])[0][feat][0]))
    squared, mean = 0.0, 0.0  # of the derivatives after the voxel encoder: (H, H), (K, H)
    for part in hidden.split(images_at_once):
        after = of_one(part).detach().double()  # (n, K, H)
        squared = squared + torch.einsum("nkh,nkj->hj", after, after) / len(hidden)
        mean = mean + after.sum(0) / len(hidden)
    found = model.weight**2 * (weight * (squared @ weight)).sum(0)
    if ridge is not None:  # the stack's derivative is the average of both
        found += 2 * model.weight * (1 - model.weight) * (weight * (mean.T @ ridge)).sum(0)
        found += (1 - model.weight) ** 2 * ridge.square().sum(0)
    return found.clamp_min(0).sqrt().cpu().numpy() * spread


def unexplained(source, responses):
    """Share of a feature's variance by which each prediction misses, (N,): their mean is 1 - R2.

    source: scoring.Source; responses: a TestSet of images whose features are known.
    """
    model, trained, ids = source.model, source.trained, responses.image_ids
    if isinstance(model, FeatureOf):
        known = model.components
        with torch.no_grad():
            voxels = torch.from_numpy(np.ascontiguousarray(responses.betas)).to(trained.device)
            found = model.coefficients({trained.whose: voxels})[0].cpu().numpy()
        missed = np.square(found - known.coefficients[ids][:, :found.shape[1]], dtype=np.float64).sum(1)
        return (missed + known.beyond(found.shape[1])) / known.total
    true = open_feature(source.request.paths, source.config["feat"])[ids].astype(np.float32).reshape(len(ids), -1)
    rows = predict(source, responses, "validate")["nsdgeneral"].reshape(true.shape)
    return np.square(rows - true, dtype=np.float64).sum(1) / float(true.var(0, dtype=np.float64).sum())


# --- what pulls a picture -----------------------------------------------------------------------------------------


def pulls(encoder, pictures, measured, errors, seed=0, directions=None, at_once=16):
    """Say how hard each voxel pulls a picture under the posterior rule at kappa 1, (V,).

    A voxel's term is (predicted - measured)^2 / 2 errors, as if it were alone (encoding.errors); its pull is the length
    of the term's gradient with respect to the picture, root mean square over pictures. A gradient's length is the root
    mean square of its products with random directions (Hutchinson 1990), and forward differentiation gives those of all
    voxels at once.
    pictures: (N, H, W, 3) uint8; measured (N, V): the responses that each is pulled towards; errors (V,): mean squared
    ones of true pictures; directions: of each picture (None: PULLED of all together).
    """
    device = next(encoder.model.parameters()).device
    generator, found, n = torch.Generator().manual_seed(seed), 0.0, len(pictures)
    directions = directions or -(-PULLED // n)
    for start in utils.progress(range(0, n * directions, at_once), desc="pull of every voxel", unit="batch", delay=2):
        rows = np.arange(start, min(start + at_once, n * directions)) % n
        images = torch.from_numpy(np.array(pictures[rows])).to(device).permute(0, 3, 1, 2) / 255
        direction = torch.randn(images.shape, generator=generator).to(device)
        with torch.no_grad():
            predicted, moved = torch.func.jvp(lambda x: encoder.model(x, encoder.subj), (images,), (direction,))
        misses = predicted - torch.from_numpy(measured[rows]).to(device)
        found = found + (misses * moved).double().square().sum(0)
    return (found / (n * directions)).sqrt().cpu().numpy() / errors
