"""From a network of components to rows of a feature: stacked with a ridge, and measured on validation images."""

import numpy as np
import torch

from nsd.components import Components, source_of
from nsd.rows import open_feature

STACK_PRIOR = 20  # images whose vote the network has before a stack's weight is measured


class FeatureOf(torch.nn.Module):
    """One feature of a network of components, as rows of that feature.

    Stacked with a ridge, its coefficients are weight * the network's + (1 - weight) * the ridge's.
    """

    def __init__(self, network, components):
        """network: models.Decoder or RidgeDecoder; components: nsd.components.Components of the feature."""
        super().__init__()
        self.network, self.ridge, self.weight, self.components = network, None, 1.0, components
        self.errors = None  # on validation images: validate
        for name in ("mean", "basis"):
            self.register_buffer(name, torch.from_numpy(getattr(components, name)), persistent=False)

    def coefficients(self, voxels):
        """{subject: (b, V)} -> coefficients (B, K), and those for the contrast (B, K), of any length, or None."""
        feat, scale = self.components.feat, self.components.total ** 0.5
        found, contrast = self.network(voxels)
        rows = found[feat] * scale
        if self.ridge is not None:
            (voxels,) = voxels.values()
            rows = self.weight * rows + (1 - self.weight) * self.ridge({self.ridge.subject: voxels})[0][feat] * scale
        return rows, contrast.get(feat)

    @torch.no_grad()
    def predict(self, voxels, prior_steps=None, generators=None):
        """Scores (B, *shape): nsdgeneral, and, where there is a contrast, retrieval, the contrast's prediction.

        That says nothing of its length: it gets the one that true rows have on average.
        """
        coefficients, contrast = self.coefficients(voxels)
        scores = {"nsdgeneral": self.rows_of(coefficients)}
        if contrast is not None:
            contrast = torch.nn.functional.normalize(contrast) * self.components.total ** 0.5
            scores["retrieval"] = self.rows_of(contrast)
        return scores

    def rows_of(self, coefficients):
        """(B, K) -> (B, *shape), where the network is; nsd.components.Components.reconstruct does it on arrays."""
        return (self.mean + coefficients @ self.basis[:coefficients.shape[1]]).unflatten(1, self.components.shape)


def validate(model, ridge, trained):
    """Stack a FeatureOf with a ridge's network, if there is one, and measure it on the validation images.

    The weight is the one with the least squared error there, for whole responses: a lesion or a bottleneck changes what
    the same predictor reads. A few images hardly tell it: STACK_PRIOR further ones count, as if they had found the
    network alone best. Sets model.errors, (K + 1,): the mean squared error of each coefficient, and the variance beyond
    them. Returns R2 {"network", "ridge", "scored"}.
    """
    known, val = model.components, trained.validation
    voxels, whole = ({trained.whose: torch.from_numpy(part.betas).to(trained.device)}  # (N, V)
                     for part in (val, trained.whole_validation))
    truth = torch.from_numpy(known.coefficients[val.image_ids])  # (N, K)

    def errors_of(found):
        errors = (found - truth[:, :found.shape[1]]).square().mean(0)
        return np.append(errors.numpy(), np.float32(known.beyond(len(errors))))

    with torch.no_grad():
        found = {"ridge" if trained.kind == "ridge" else "network": model.coefficients(voxels)[0].cpu()}
        if ridge is not None:
            by_network = model.coefficients(whole)[0].cpu()
            model.ridge, model.weight = ridge, 0.0
            found["ridge"], by_ridge = (model.coefficients(part)[0].cpu() for part in (voxels, whole))
            towards = by_network - by_ridge
            weight = (towards * (truth[:, :towards.shape[1]] - by_ridge)).sum() / towards.square().sum()
            n = len(truth)
            model.weight = float((n * weight.clamp(0, 1) + STACK_PRIOR) / (n + STACK_PRIOR))
        found["scored"] = model.coefficients(voxels)[0].cpu()
    model.errors = errors_of(found["scored"])
    return {name: float(1 - errors_of(rows).sum() / known.total) for name, rows in found.items()}


def r2_of_rows(model, trained, feat, predicted):
    """Return the share of variance that predictions (N, ...) of the validation images explain.

    model: what predicts, of the run `trained`. The variance is that of the feature's components, or, of networks that
    predict none, that of these images.
    """
    image_ids = trained.validation.image_ids
    true = open_feature(trained.request.paths, feat)[image_ids].astype(np.float32)
    true = true.reshape(len(image_ids), -1)
    error = float(np.square(predicted.reshape(true.shape) - true).sum(1).mean())
    total = model.components.total if isinstance(model, FeatureOf) else float(true.var(0).sum())
    return 1 - error / total


def components_beside(paths, feat):
    """Return the Components of the feature file that is there, or None: who decodes whole rows can do without."""
    if not (paths.components(feat).exists() and paths.feature(feat).exists()):
        return None
    found = Components(paths.components(feat), feat)
    return found if found.source == source_of(paths.feature(feat)) else None


def errors_of_rows(components, predicted, image_ids):
    """Return the mean squared error of each coefficient of rows (N, ...) predicted for these images, and the variance
    beyond them, (K + 1,)."""
    errors = np.square(components.project(predicted) - components.coefficients[image_ids]).mean(0)
    return np.append(errors, np.float32(components.beyond(components.k)))
