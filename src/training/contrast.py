"""MixCo and the contrastive losses.

Shapes: B batch (all subjects together), b one subject's part of it, V voxels, T tokens, D width."""

import math

import torch
import torch.nn.functional as F

MIXCO_BETA = 0.15  # mixing coefficients are Beta(.15, .15): most near 0 or 1
MIXCO_SHARE = 0.5  # of the samples are mixed
NCE_TEMPERATURE = 0.006
SOFT_TEMPERATURES = (0.004, 0.0075)  # first and last


def mixco(voxels, generator=None):
    """Mix trials with other trials of the same subject (MixCo, Kim et al. 2020, as MindEye uses it).

    voxels: {subject: (b, V)}; generator: None is the global one. Returns

    - mixed {subject: (b, V)}: beta_i x_i + (1 - beta_i) x_perm(i) where select_i, else x_i
    - perm (B,): the other trial's row in the joint batch, subjects one after the other in the dict's order
    - betas (B,): 1 where not selected
    - select (B,) bool

    Differs from MindEye2: perm is offset into the joint batch (there each subject's counts from 0).
    """
    mixed, perms, all_betas, selects = {}, [], [], []
    offset = 0
    for subject, x in voxels.items():
        perm, betas, select = (t.to(x.device, non_blocking=True) for t in draw_mix(len(x), x, generator))
        weight = betas[:, None].to(x.dtype)
        mixed[subject] = weight * x + (1 - weight) * x[perm]
        perms.append(perm + offset)
        all_betas.append(betas)
        selects.append(select)
        offset += len(x)
    return mixed, torch.cat(perms), torch.cat(all_betas), torch.cat(selects)


def draw_mix(n, like, generator):
    """Draw permutation, coefficients and selection (n,) on the generator's device (None: that of `like`)."""
    device = like.device if generator is None else generator.device
    perm = torch.randperm(n, generator=generator, device=device)
    # a Beta variate from two Gamma variates: torch.distributions takes no generator
    gamma = torch._standard_gamma(torch.full((2, n), MIXCO_BETA, device=device), generator=generator)
    select = torch.rand(n, generator=generator, device=device) <= MIXCO_SHARE
    return perm, torch.where(select, gamma[0] / gamma.sum(0), 1.0), select


def similarities(preds, targets):
    """Return cosine similarities (B, B): rows predictions, columns targets; preds, targets (B, ...) are flattened.

    In float32 even under autocast: divided by a temperature of .006, bfloat16's rounding would be one logit.
    """
    with torch.autocast(preds.device.type, enabled=False):
        preds = F.normalize(preds.flatten(1).float(), dim=-1)
        targets = F.normalize(targets.flatten(1).float(), dim=-1)
        return preds @ targets.T


def soft_cross_entropy(logits, probs):
    """Return the mean cross-entropy of rows of logits (B, B) with rows of label probabilities."""
    return -(logits.log_softmax(-1) * probs).sum(-1).mean()


def mixco_nce(preds, targets, temp, perm, betas, select, bidirectional=True):
    """Contrast mixed predictions with their two targets, weighted as they were mixed.

    preds, targets (B, ...); perm, betas, select as `mixco` returns them. Row i of the label matrix has beta_i at i
    and 1 - beta_i at perm(i). bidirectional: the mean of both directions, the other one with the matrix transposed
    (whose rows need not sum to 1; as in MindEye2).
    """
    logits = similarities(preds, targets) / temp
    betas = torch.where(select, betas, 1.0).to(logits.dtype)
    # differs from MindEye2: added, not assigned, so that a trial mixed with itself keeps a label of 1
    probs = torch.diag(betas).scatter_add(1, perm[:, None], (1 - betas)[:, None])  # (B, B)
    loss = soft_cross_entropy(logits, probs)
    if bidirectional:
        loss = (loss + soft_cross_entropy(logits.T, probs.T)) / 2
    return loss


def soft_clip_loss(preds, targets, temp):
    """Contrast predictions with targets (B, ...) as SoftCLIP does, in both directions.

    The labels are the softmax of the targets' similarities among themselves.
    """
    logits = similarities(preds, targets) / temp
    probs = (similarities(targets, targets) / temp).softmax(-1)
    return (soft_cross_entropy(logits, probs) + soft_cross_entropy(logits.T, probs)) / 2


def soft_temperature(progress, mixup_pct):
    """Return SoftCLIP's temperature: half a cosine from .004, when MixCo ends at mixup_pct, to .0075 at progress 1."""
    start, end = SOFT_TEMPERATURES
    part = min(max((progress - mixup_pct) / max(1 - mixup_pct, 1e-8), 0.0), 1.0)
    return end + (start - end) / 2 * (1 + math.cos(math.pi * part))


def pct_correct(similarity):
    """Return the share of rows whose most similar column is their own."""
    labels = torch.arange(len(similarity), device=similarity.device)
    return (similarity.argmax(1) == labels).float().mean()


def mix_rows(rows, perm, betas, select):
    """Mix the rows (B, ...) of a target as `mixco` mixed the voxels; unselected rows have beta 1."""
    weight = betas.view(-1, *[1] * (rows.ndim - 1)).to(rows.dtype)
    return weight * rows + (1 - weight) * rows[perm]


def contrast_loss(preds, target, progress, mixup_pct, mix=None):
    """Contrast as the phase of the training wants: MixCo-NCE where trials were mixed, else SoftCLIP.

    docs/method.md (Training) has the equations.

    preds, target (B, ...); mix: (perm, betas, select) of `mixco`, or None. Returns the loss and detached logs:
    loss_clip, fwd_pct_correct (query brain, gallery the batch's images) and bwd_pct_correct (the reverse).
    """
    if mix is not None:
        loss = mixco_nce(preds, target, NCE_TEMPERATURE, *mix)
    else:
        loss = soft_clip_loss(preds, target, soft_temperature(progress, mixup_pct))
    similarity = similarities(preds.detach(), target)
    return loss, {"loss_clip": loss.detach(), "fwd_pct_correct": pct_correct(similarity),
                  "bwd_pct_correct": pct_correct(similarity.T)}
