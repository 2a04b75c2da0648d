"""What steers the drawing: losses on the picture being formed, and what a step does with their gradient.

Letters: B batch, b rows of it at once, N images, H W image size, T tokens, D width; abar = alphas_cumprod[t],
sigma = sqrt(1 - abar), eps = predicted noise, x0 = predicted clean latent. docs/method.md, "Guided sampling", derives
the rules.
"""

import torch
import torch.nn.functional as F

import utils
from options import MAX_SHIFT

SPREAD = 0.6  # of sigma: how far noised predictions lie around the prediction (--guidance_draws)
STEEPEST = 1.2  # sigma (rms): the longest step of the posterior rule
LAYER_WEIGHTS = {2: 1.5, 4: 1.2}  # NeuralDiffuser's emphasis on early CLIP layers; the others weigh 1


class ClipFeatureLoss:
    """Guidance term: how far the CLIP features of images (b, 3, H, W) in [0, 1] are from the decoded ones, (b,).

    NeuralDiffuser's loss: sum over layers of weight_l * MSE(features_l, target_l), where
    weight_l = (1 / ||target_l||) / sum_l(1 / ||target_l||) * LAYER_WEIGHTS; norms are of each sample by itself.
    """

    def __init__(self, clip_features, targets):
        """clip_features: models.ClipFeatures; targets: {layer k: (B, T, D)}, the decoded g_k of the batch."""
        self.clip_features, self.targets = clip_features, targets
        norms = torch.stack([target.flatten(1).norm(dim=1) for target in targets.values()])  # (layers, B)
        inverse_norms = 1 / norms.clamp_min(torch.finfo(norms.dtype).eps)
        emphasis = torch.tensor([LAYER_WEIGHTS.get(layer, 1.0) for layer in targets]).to(inverse_norms)
        self.weights = inverse_norms / inverse_norms.sum(0) * emphasis[:, None]  # (layers, B)

    def __call__(self, image, rows=slice(None)):
        """rows: which of the batch the images are of, a slice."""
        features = self.clip_features(image)
        loss = 0.0
        for weight, (layer, target) in zip(self.weights, self.targets.items(), strict=True):
            found, wanted = tuple(target.shape[1:]), tuple(features[layer].shape[1:])
            if found != wanted:
                raise utils.UserError(f"scores of g_{layer}: rows of shape {found}, --clip_model wants {wanted}; "
                                      "use the CLIP that the features come from")
            loss = loss + weight[rows] * (features[layer] - target[rows]).square().mean((1, 2))
        return loss


class ClipGuide:
    """What guidance by CLIP needs, for all images: `term` gives a batch its ClipFeatureLoss."""

    def __init__(self, clip_features, targets):
        """clip_features: models.ClipFeatures, on the device to compute on; targets: {layer k: (N, T, D)} arrays."""
        self.clip_features, self.targets = clip_features, targets

    def term(self, rows):
        """The ClipFeatureLoss of a batch: rows (B,) of the targets."""
        device = self.clip_features.mean.device
        return ClipFeatureLoss(self.clip_features, {layer: torch.from_numpy(array[rows]).to(device)
                                                    for layer, array in self.targets.items()})


def speaking(terms, step, n_guided):
    """Those of the terms that have their say in a guided step, counted from 0.

    One that `waits` has it after that fraction of the steps, in the last at the latest. Alone, it waits for nobody.
    """
    return [term for term in terms if step >= min(getattr(term, "waits", 0) * n_guided, n_guided - 1)] or terms


def guidance_pull(image, terms, rows=slice(None)):
    """Combine the terms: the gradient of their losses wrt images (b, 3, H, W), `rows` of a batch; and what was found.

    Terms are added up. Of one that has a `kappa` (encoding.guide) kappa times its gradient is added; one in another
    unit than the others (`relative`) is first brought to their size, sample by sample: d = g + kappa * ||g|| / ||g_b||
    * g_b, where g is the gradient of the others and g_b its own, which alone stays as it is.
    Found is {name: (b,)}: loss_clip and norm_clip of the others, loss_brain, norm_brain and its `facts` of one with a
    kappa, and the cosine of the two gradients.
    """
    others, pulling = [], []
    for term in terms:
        (pulling if hasattr(term, "kappa") else others).append(term)
    found, pull = {}, None
    if others:
        loss, pull = gradient_on(image, others, rows)
        found |= {"loss_clip": loss, "norm_clip": pull.flatten(1).norm(dim=1)}
    for term in pulling:
        loss, own = gradient_on(image, [term], rows)
        norm = own.flatten(1).norm(dim=1)
        found |= {"loss_brain": loss, "norm_brain": norm, **term.facts}
        if pull is not None:
            found["cosine"] = F.cosine_similarity(pull.flatten(1), own.flatten(1))
        if not term.relative:
            own = term.kappa * own
        elif pull is not None:
            ratio = torch.where(norm > 0, found["norm_clip"] / norm, 0)  # a sample that has stopped has no gradient
            own = term.kappa * ratio.view(-1, 1, 1, 1) * own
        pull = own if pull is None else pull + own
    return pull, found


def views_of(clean, terms, noises):
    """What the terms look at: [(latents (b, C, h, w), terms that look at them, what their gradient counts)].

    Without noises all of them look at the clean latents. With them measured features look at each of clean + noise,
    and the mean of their gradients counts: what x_t leaves open is a cloud around the prediction, and a gradient at
    one point of it finds changes that please CLIP and show nothing (Song et al. 2023, ICML, Loss-Guided Diffusion).
    The brain, which costs more, looks at the prediction, unless its pull is relative to theirs.
    """
    brain = [term for term in terms if hasattr(term, "kappa") and not term.relative]
    others = [term for term in terms if term not in brain]
    if not others or not noises:
        return [(clean, terms, 1)]
    return [(clean + noise, others, 1 / len(noises)) for noise in noises] + [(clean, brain, 1)] * bool(brain)


def gradient_on(image, terms, rows=slice(None)):
    """Losses of the terms' sum, (b,), and their gradient wrt the images (b, 3, H, W), `rows` of a batch."""
    with torch.enable_grad():
        seen = image.detach().requires_grad_()
        loss = sum(term(seen, rows) for term in terms)
        return loss.detach(), torch.autograd.grad(loss.sum(), seen)[0]


def raw_rule(eps, gradient, abar, scale):
    """NeuralDiffuser's: eps' = eps + sigma * scale * gradient."""
    return eps + (1 - abar).sqrt() * scale * gradient


def norm_rule(eps, gradient, abar, scale):
    """Shift x0 by `scale` sigma (rms, at most MAX_SHIFT) against the gradient, whatever the gradient's size.

    delta = -min(scale, MAX_SHIFT) * sigma * gradient / rms(gradient). As it moves the prediction and not the sample,
    its effect does not grow with the number of steps.
    """
    direction = gradient / rms(gradient).clamp_min(torch.finfo(gradient.dtype).tiny)  # a zero gradient stays zero
    return shifted(eps, -min(scale, MAX_SHIFT) * (1 - abar).sqrt() * direction, abar)


def posterior_rule(eps, gradient, abar, scale):
    """Shift x0 towards the posterior of terms that are -log likelihoods: delta = -scale * sigma^2 * d(-log p)/dx0.

    sigma^2 is what x0 is still open to, of latents of variance 1. The gradient is that wrt x_t, which is wrt x0 times
    1 / sqrt(abar). The step is cut to STEEPEST sigma (rms): where the likelihood is steeper than that, it is curved
    within the step, and what lies further on is not known from here.
    """
    sigma = (1 - abar).sqrt()
    delta = -scale * sigma.square() * abar.sqrt() * gradient
    most = STEEPEST * sigma
    return shifted(eps, delta * (most / rms(delta).clamp_min(torch.finfo(delta.dtype).tiny)).clamp(max=1), abar)


def shifted(eps, delta, abar):
    """The noise whose x0 is that of eps plus delta: eps' = eps - sqrt(abar) / sigma * delta."""
    return eps - abar.sqrt() / (1 - abar).sqrt() * delta


def rms(rows):
    """Root mean square of each row of (B, ...), (B, 1, ...)."""
    return rows.square().mean(tuple(range(1, rows.ndim)), keepdim=True).sqrt()


RULES = {"raw": raw_rule, "norm": norm_rule, "posterior": posterior_rule}  # as options.RULES names them
