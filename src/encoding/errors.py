"""How far predicted responses are off: a Gaussian over the voxels, known from predictions of true images.

Voxels err together, for scans have noise that voxels share, and what an encoding model misses in a picture it misses in
many voxels. Counted as independent, their errors would make one piece of evidence of many. Letters: N training images,
M validation images, n voxels, k directions, B batch.
"""

import numpy as np
import torch

SHRINKAGES = np.linspace(0.05, 1, 20)


class ResponseErrors:
    """Errors of n voxels: their variances, and how they go together.

    Errors in units of their standard deviation have the covariance S = (1 - s) C + s I. The variances are those on
    validation images. C is the correlation on training images, which are many, though fitted; s is the shrinkage
    under which the errors on validation images are likeliest (s = 1: independent voxels).

    .shrinkage   s
    """

    def __init__(self, train, val):
        """Predicted minus measured responses to training images, (N, n), and to validation images, (M, n)."""
        self.deviations = val.square().mean(0).sqrt()
        scaled = train / train.square().mean(0).sqrt()
        _, singular, self.directions = torch.linalg.svd(scaled / len(scaled) ** 0.5, full_matrices=False)  # (k, n)
        variances = singular.square()  # (k,), of C; 0 in all other directions
        scaled = val / self.deviations
        along = (scaled @ self.directions.T).square().mean(0)  # (k,)
        across, n_across = scaled.square().sum(1).mean() - along.sum(), val.shape[1] - len(along)

        def log_likelihood(s):
            spread = (1 - s) * variances + s
            return -0.5 * float((along / spread + spread.log()).sum() + across / s + n_across * np.log(s))

        self.shrinkage = s = float(max(SHRINKAGES, key=log_likelihood))
        self.excess = 1 / s - 1 / ((1 - s) * variances + s)  # (k,): what counts less along a direction than across

    def misfit(self, errors):
        """-log p of errors (B, n), but for a constant: (B,)."""
        scaled = errors / self.deviations
        along = scaled @ self.directions.T  # (B, k)
        return 0.5 * (scaled.square().sum(1) / self.shrinkage - (self.excess * along.square()).sum(1))
