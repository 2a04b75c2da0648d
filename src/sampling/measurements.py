"""Decoded features as measurements of the picture, each with a known error: what the posterior rule is guided by.

A decoder's prediction y of a feature's component, whose values have variance p, is a posterior mean: it lies between
what the brain says and the mean over all images, and its error on validation images, of variance e, says how far. To
guide a picture towards y would draw every picture towards the mean one. What counts is the likelihood of the response
given the picture, what the posterior N(y, e) says beyond the prior N(0, p), per component:

    w = 1/e - 1/p      t = y (1/e) / w      -log p(response | q) = 1/2 sum_j w_j (q_j - t_j)^2 + a constant

with q the components of the picture's own feature: the quotient of two Gaussians (docs/method.md, "Guided sampling").
A component that is not decoded (e >= p) measures nothing. The e of one component is the mean over a few validation
images, and what is by chance too small would count too much; so e / p, which grows from component to component, is
fitted by isotonic regression. Letters: N images, B batch, b rows of it at once, F numbers in
a row of a feature, k components that measure.
"""

import numpy as np
import torch

import utils

LEAST_R2 = 0.05  # a component of which less is explained is left out: its t would be y times 20 and more
ROWS = 50  # read and projected at once


class Measurement:
    """What the decoded rows of one feature say of the pictures: a Gaussian per component.

    .mean (F,), .basis (k, F)   of the components that measure
    .weights (k,)               1 / variance of each; .targets (N, k)
    """

    def __init__(self, mean, basis, weights, targets):
        self.mean, self.basis, self.weights, self.targets = mean, basis, weights, targets

    @classmethod
    def of(cls, components, rows, errors, shrunk=True, device="cpu"):
        """components: nsd.components.Components; rows: (N, ...) predictions; errors: (K + 1,), the mean squared error
        of each of the first K coefficients on validation images, and the variance beyond them (training.stacking).
        shrunk: the rows are posterior means; false of true features, which are taken at their word.
        Where errors are as large as the variance no component measures: k = 0.
        """
        from sklearn.isotonic import IsotonicRegression  # takes a second

        p = components.variances[:len(errors) - 1].astype(np.float64)
        left = IsotonicRegression(y_min=0.01).fit_transform(np.arange(len(p)), errors[:-1] / p)
        e, r2 = p * left, 1 - left
        at = np.flatnonzero(r2 >= LEAST_R2)
        basis = components.basis[at]
        targets = np.concatenate([(np.reshape(rows[i:i + ROWS], (-1, len(components.mean))) - components.mean) @ basis.T
                                  for i in range(0, len(rows), ROWS)])
        if shrunk:
            targets = targets / r2[at].astype(np.float32)
        weights = 1 / e[at] - 1 / p[at]
        return cls(*(torch.from_numpy(np.asarray(array, np.float32)).to(device)
                     for array in (components.mean, basis, weights, targets)))

    def components_of(self, rows):
        """The components (B, k) of rows (B, ...)."""
        return (rows.flatten(1) - self.mean) @ self.basis.T

    def misfit(self, rows, at):
        """-log p of the responses at (B,), indices of the N, given pictures with these feature rows (B, ...): (B,)."""
        return 0.5 * (self.weights * (self.components_of(rows) - self.targets[at]).square()).sum(1)


class ClipMeasurements:
    """Guides by decoded CLIP layers, for all images: `term` gives a batch its misfit of the picture.

    The layers are decoded from one response, so that their errors are those of one measurement and not of as many: the
    mean of their misfits counts, not the sum. Layers that measure nothing are left out, and named.
    """

    def __init__(self, clip_features, measurements):
        """clip_features: models.ClipFeatures; measurements: {layer k: Measurement}. UserError where none measures."""
        self.clip_features = clip_features
        self.measurements = {k: found for k, found in measurements.items() if len(found.weights)}
        silent = ", ".join(f"g_{k}" for k in measurements if k not in self.measurements)
        if silent:
            explained = f"no component is explained by {LEAST_R2:.0%} on validation images"
            if not self.measurements:
                raise utils.UserError(f"scores of {silent}: {explained}, wanted some; train with more sessions, draw "
                                      "without them (--feats none), or use --guidance_rule raw")
            print(f"{silent}: {explained}, left out of guidance and selection", flush=True)

    def term(self, rows):
        """The guidance term of a batch: images (b, 3, H, W) in [0, 1], those at the slice `at` of it -> (b,) -log p.

        rows: list (B,) of the measurements' N.
        """
        def misfit(image, at=slice(None)):
            features = self.clip_features(image)
            for k, found in self.measurements.items():
                if features[k][0].numel() != len(found.mean):
                    raise utils.UserError(f"components of g_{k}: of {len(found.mean)} numbers, --clip_model makes "
                                          f"{features[k][0].numel()}; use the CLIP that the features come from")
            return torch.stack([found.misfit(features[k], rows[at]) for k, found in self.measurements.items()]).mean(0)
        return misfit
