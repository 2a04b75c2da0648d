"""What trainings minimise: the decoder of components; MindEye2's networks, of c and g, and of z; the encoding model.

An objective gets this process's rows of a joint batch (training.team), and joins those it needs all of.
Shapes: B joint batch (all subjects together), b one subject's part of it, V voxels, T tokens, D width, F = T * D."""

import torch
import torch.nn.functional as F

from training.contrast import contrast_loss, mix_rows, mixco, pct_correct, similarities
from training.team import ALONE


def draw_prior(target, generator=None):
    """Draw what one training step of the prior needs: time (B,) in [0, 1), noise (B, ...), drop (B, 2).

    Drawn apart from the network, for the joint batch, so that they do not depend on how many processes share it.
    """
    device = target.device if generator is None else generator.device
    draws = (torch.rand(len(target), generator=generator, device=device),
             torch.randn(target.shape, generator=generator, device=device),
             torch.rand(len(target), 2, generator=generator, device=device))
    return tuple(draw.to(target.device, non_blocking=True) for draw in draws)


def shown_voxels(batch, mixing, generator, team):
    """Return what the network sees, {subject: this process's rows (b, V)}, and how trials were mixed, or None.

    mixing: mix them, as `mixco` does: then each process needs the rows of all.
    """
    if not mixing:
        return batch["voxels"], None
    voxels, *mix = mixco(team.join_voxels(batch), generator)
    return team.take_voxels(voxels), mix


class ComponentObjective:
    """What a Decoder minimises: squared errors of its features' components, and a contrast (docs/method.md, Training).

    Of each feature the squared error over the feature's total variance, so that 1 - loss is the share of its variance
    that is explained. A feature with a contrast adds clip_scale times it, between the second head's prediction and the
    true coefficients. Responses are mixed (MixCo) for the first mixup_pct of the training.
    """

    judge = "loss_mse"

    def __init__(self, components, clip_scale=0.0, mixup_pct=0.0):
        """components: {feature: nsd.components.Components}, of which the network predicts the first K."""
        self.components = components
        self.clip_scale, self.mixup_pct = clip_scale, mixup_pct
        self.kept = {}  # of the last validation: "errors" {feature: (K + 1,)}

    def __call__(self, model, batch, progress, generator=None, team=ALONE):
        """Return (loss, logs) of one joint batch, as BrainObjective does.

        batch: {"voxels": {subject: (b, V)}, feature: coefficients (B, K), ...}.
        """
        n, mixing = len(batch["image_ids"]), model.training and progress < self.mixup_pct
        voxels, mix = shown_voxels(batch, mixing, generator, team)
        predicted, embedded = model(voxels)
        mse, clip, logs = 0.0, 0.0, {}
        for feat, own in predicted.items():
            rows, k = team.join(own.float(), n), own.shape[1]
            wanted = team.join(batch[feat][:, :k], n) / self.components[feat].total ** 0.5  # (B, K)
            target = mix_rows(wanted, *mix) if mix else wanted
            errors = (rows - target).square().mean(0)  # (K,)
            mse = mse + errors.sum()
            if not model.training:
                logs[feat, "errors"] = errors.detach()
            if feat in embedded:
                found = team.join(embedded[feat].float(), n)
                own_clip, logs_clip = contrast_loss(found, wanted, progress, self.mixup_pct, mix)
                clip, logs = clip + own_clip, logs | logs_clip
            elif len(predicted) == 1:
                similarity = similarities(rows.detach(), wanted)
                logs |= {"fwd_pct_correct": pct_correct(similarity), "bwd_pct_correct": pct_correct(similarity.T)}
        return mse + self.clip_scale * clip, {**logs, "loss_mse": mse.detach()}

    def summarise(self, means):
        """Turn validation's errors into r2_<feature>, and keep them in the features' own units.

        The last of the K + 1 errors is what the components that are not predicted leave.
        """
        scalars = {key: value for key, value in means.items() if not isinstance(key, tuple)}
        for key, errors in means.items():
            if isinstance(key, tuple):
                feat, known = key[0], self.components[key[0]]
                kept = torch.cat([errors.cpu().float() * known.total, torch.tensor([known.beyond(len(errors))])])
                self.kept.setdefault("errors", {})[feat] = kept
                scalars[f"r2_{feat}"] = 1 - kept.sum() / known.total
        return scalars


class BrainObjective:
    """What c and g minimise: clip_scale * contrast + prior_scale * prior (docs/method.md, Training).

    Trials are mixed for the first mixup_pct of the training. `judge` names the validation value that picks best.pth: it
    must mean the same in every epoch, so without a changing temperature.
    """

    judge = "loss_prior"

    def __init__(self, clip_scale=1.0, prior_scale=30.0, mixup_pct=0.33):
        self.clip_scale, self.prior_scale, self.mixup_pct = clip_scale, prior_scale, mixup_pct

    def __call__(self, model, batch, progress, generator=None, team=ALONE):
        """Return (loss, logs) of one joint batch; the model runs on this process's rows of it.

        batch: {"voxels": {subject: (b, V)}, "target": (B, T, D)}, this process's rows of both, in the same order,
        "image_ids" of all rows; progress: epoch / epochs.
        A model in eval mode is not given mixed trials. logs are detached scalars on the device: those of
        `contrast_loss` and loss_prior, both before scaling.
        """
        target = team.join(batch["target"], len(batch["image_ids"]))
        voxels, mix = shown_voxels(batch, model.training and progress < self.mixup_pct, generator, team)
        # differs from MindEye2: the prior's target is mixed as the voxels are; there it stays unmixed, so that a
        # quarter of the trials are mostly another image's
        prior_target = mix_rows(target, *mix) if mix else target
        draws = [team.take(draw) for draw in draw_prior(target, generator)]
        _, contrast, prior = model(voxels, team.take(prior_target), draws)
        contrast, prior = team.join(contrast.float(), len(target)), team.join(prior, len(target))  # (B, T, D), (B,)
        loss_clip, logs = contrast_loss(contrast, target, progress, self.mixup_pct, mix)
        loss_prior = prior.mean()
        logs["loss_prior"] = loss_prior.detach()
        return self.clip_scale * loss_clip + self.prior_scale * loss_prior, logs


class LatentObjective:
    """What z minimises: L1 on latents + clip_scale * contrast of an auxiliary map with CLIP's patch tokens.

    MindEye1's low-level branch; there the contrast is with another network's features, here with g_12.
    """

    judge = "loss_l1"

    def __init__(self, clip_scale=0.1, mixup_pct=0.33):
        self.clip_scale, self.mixup_pct = clip_scale, mixup_pct

    def __call__(self, model, batch, progress, generator=None, team=ALONE):
        """Return (loss, logs) of one joint batch, as BrainObjective does.

        batch: {"voxels": {subject: (b, V)}, "target": latents (B, C, h, w), "tokens": g_12 (B, 1 + P, D), ...}.
        Validation logs `ssim` of the latents too.
        """
        n = len(batch["image_ids"])
        target = team.join(batch["target"], n)
        # (B, P, D), without the class token, which has no place in the picture
        patches = team.join(batch["tokens"][:, 1:], n)
        voxels, mix = shown_voxels(batch, model.training and progress < self.mixup_pct, generator, team)
        latents, contrast = (team.join(rows.float(), n) for rows in model(voxels))
        loss_l1 = F.l1_loss(latents, mix_rows(target, *mix) if mix else target)
        loss_clip, logs = contrast_loss(contrast, patches, progress, self.mixup_pct, mix)
        logs["loss_l1"] = loss_l1.detach()
        if not model.training:
            logs["ssim"] = latent_ssim(latents.detach(), target)
        return loss_l1 + self.clip_scale * loss_clip, logs


def latent_ssim(latents, target):
    """Return the mean SSIM of latents (B, C, h, w) taken as images, whose range is six of the target's deviations."""
    from pytorch_msssim import ssim

    window = min(7, *(size - 1 + size % 2 for size in target.shape[-2:]))  # odd, and not wider than the latent
    with torch.autocast(target.device.type, enabled=False):  # it subtracts squares that are nearly equal
        return ssim(latents.float(), target.float(), data_range=float(6 * target.std()), win_size=window)


class EncodingObjective:
    """What a brain encoding model (GNet) minimises: squared errors of responses, and the size of its readout weights.

    Per voxel the squared error is weighted by clamp(r^2, .1, 1), r being this batch's correlation: voxels that can be
    predicted count more. Images are shifted by up to `shift` pixels and get a little noise; they are
    not mirrored, since the visual field is not. Validation correlates over all of its images.
    """

    judge = "loss_r"  # 1 - median validation r over voxels: its best epoch is where training stops early

    def __init__(self, resize, rois=None, ceilings=None, l1=0.1, shift=4, noise=0.02):
        """resize: the network's, images (B, 3, H, W) -> (B, 3, side, side), to shift them at its side; rois: {subject:
        {name: bool (V,)}}, of which validation logs r; ceilings: {subject: (V,)}, the r that noise leaves possible."""
        self.resize, self.l1, self.shift, self.noise = resize, l1, shift, noise
        self.rois, self.ceilings = rois or {}, ceilings or {}
        self.kept = {}  # of the last validation, for best.pth: "val_r" {subject: (V,)}

    def __call__(self, model, batch, progress, generator=None, team=ALONE):
        """Return (loss, logs) of one joint batch, as BrainObjective does.

        batch: {"voxels": {subject: responses (b, V)}, "target": what was seen, (B, H, W, 3) from 0 to 255}.
        """
        measured = team.join_voxels(batch)
        n = sum(map(len, measured.values()))
        images = self.resize(batch["target"].permute(0, 3, 1, 2) / 255)  # this process's, (., 3, side, side)
        if model.training:
            images = self.jitter(images, generator, n, team)
        parts = images.split([len(rows) for rows in batch["voxels"].values()])
        predicted, offset = {}, 0
        for subj, rows in model(dict(zip(measured, parts, strict=True))).items():
            predicted[subj] = team.join(rows.float(), len(measured[subj]), offset)
            offset += len(measured[subj])
        errors, nothing, logs = [], 0.0, {}
        for subj, rows in predicted.items():
            if not len(rows):  # no image of this subject's; its readout stays a part of the loss, as DDP wants it
                nothing = nothing + rows.sum()
                continue
            error = (rows - measured[subj]).square().mean(0)  # (V,)
            weight = correlation(rows.detach(), measured[subj]).square().clamp(0.1, 1)
            errors.append((weight * error).mean())
            if not model.training:
                logs |= moments(subj, rows.detach(), measured[subj], n)
        readouts = [p.abs().mean() for name, p in model.named_parameters() if name.endswith("weight")
                    and "readouts" in name]
        loss, size = torch.stack(errors).mean() + nothing, torch.stack(readouts).mean()
        logs["loss_mse"] = loss.detach()
        # gradients are summed over processes, and this term has no rows: it counts in one process only
        return loss + self.l1 * (size if team.is_main else size.detach()), logs

    def jitter(self, images, generator, n, team=ALONE):
        """Move images, this process's of n (., 3, side, side), each by up to `shift` pixels, its border repeated, with
        noise."""
        device = images.device if generator is None else generator.device
        by = team.take(torch.randint(2 * self.shift + 1, (n, 2), generator=generator, device=device)).tolist()
        noise = team.take(torch.randn(n, *images.shape[1:], generator=generator, device=device)).to(images)
        padded, side = F.pad(images, [self.shift] * 4, mode="replicate"), images.shape[-1]
        moved = [image[:, y:y + side, x:x + side] for image, (y, x) in zip(padded, by, strict=True)]
        return (torch.stack(moved) if moved else images) + self.noise * noise

    def summarise(self, means):
        """Turn validation's moments into r, the median over voxels: of all (loss_r = 1 - r), of each ROI (r_<ROI>).

        r_norm, r_norm_<ROI>: that median as a share of the median ceiling, where the ceilings are known. (The median
        of ratios would hang on the voxels that hardly respond, whose ceilings are near 0.)
        """
        sums, found, scalars = {key: value for key, value in means.items() if isinstance(key, tuple)}, {}, {}
        for subj in dict.fromkeys(key[0] for key in sums):
            r = correlation_of({name: sums[subj, name] for name in MOMENTS}).cpu()
            self.kept.setdefault("val_r", {})[subj] = r.float()
            masks = {f"_{roi}": torch.as_tensor(mask) for roi, mask in self.rois.get(subj, {}).items()}
            for suffix, mask in {"": slice(None), **masks}.items():
                correlations, ceilings = found.setdefault(suffix, ([], []))
                correlations.append(r[mask])
                if subj in self.ceilings:
                    ceilings.append(torch.as_tensor(self.ceilings[subj])[mask])
        for suffix, (correlations, ceilings) in found.items():
            scalars[f"r{suffix}"] = torch.cat(correlations).median()
            if ceilings:
                scalars[f"r_norm{suffix}"] = scalars[f"r{suffix}"] / torch.cat(ceilings).median()
        if scalars:
            scalars["loss_r"] = 1 - scalars["r"]
        return {key: value for key, value in means.items() if not isinstance(key, tuple)} | scalars


MOMENTS = ("n", "p", "m", "pp", "mm", "pm")  # sums over images of predicted and measured responses, and products


def moments(subj, predicted, measured, of):
    """Add up the rows of (b, V) responses: {(subject, name of MOMENTS): (V,)}, divided by `of` images."""
    p, m = predicted.double(), measured.double()
    sums = (p.new_tensor(len(p)), p.sum(0), m.sum(0), (p * p).sum(0), (m * m).sum(0), (p * m).sum(0))
    return {(subj, name): value / of for name, value in zip(MOMENTS, sums, strict=True)}


def correlation_of(sums):
    """Return the Pearson correlation (V,) of which {name of MOMENTS: (V,)} are the sums."""
    n, p, m = sums["n"], sums["p"] / sums["n"], sums["m"] / sums["n"]
    deviations = (sums["pp"] / n - p.square()).clamp_min(0) * (sums["mm"] / n - m.square()).clamp_min(0)
    return (sums["pm"] / n - p * m) / deviations.sqrt().clamp_min(1e-12)


def correlation(a, b):
    """Return the Pearson correlation (V,) of the columns of (B, V); 0 where one does not vary."""
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)).clamp_min(1e-12)


OBJECTIVES = {"brain": BrainObjective, "latent": LatentObjective}  # by the kind of network (models.build_model)
