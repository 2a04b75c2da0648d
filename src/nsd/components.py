"""Principal components of a feature, and every image's coefficients: what is decoded in place of whole rows.

features/components.py writes them. Letters: N images, F numbers in a row of the feature, k components, n images asked
for.
"""

from functools import cached_property

import h5py
import numpy as np

import utils
from nsd.rows import Rows, sample_hash


class Basis:
    """What makes rows of a feature of coefficients, and back: all of its Components but the images' own.

    .feat, .shape, .mean, .basis, .variances, .total, .digest, .k   as those of Components
    """

    def __init__(self, feat, mean, basis, variances, shape, total, digest):
        """Raises ValueError where the parts are of different sizes."""
        self.feat, self.mean, self.basis, self.variances = feat, mean, basis, variances
        self.shape, self.total, self.digest = tuple(shape), total, digest
        self.k = len(variances)
        if mean.shape != (np.prod(self.shape),) or basis.shape != (self.k, len(mean)):
            raise ValueError(f"components of {feat}: its parts are of different sizes")

    def beyond(self, k):
        """Return the variance that the first k components leave, float: the least error of rows made of them."""
        return max(self.total - float(self.variances[:k].sum()), 0.0)

    def reconstruct(self, coefficients):
        """Make rows (n, *shape) float32 of coefficients: (n, k), or (n, fewer), those of the first components."""
        coefficients = np.asarray(coefficients, np.float32)
        rows = coefficients @ self.basis[:coefficients.shape[1]]
        rows += self.mean
        return rows.reshape(len(rows), *self.shape)

    def project(self, rows):
        """Return the coefficients (n, k) float32 of rows (n, *shape)."""
        centred = np.asarray(rows).reshape(len(rows), -1).astype(np.float32)
        centred -= self.mean
        return centred @ self.basis.T


class Components(Basis):
    """A feature's components: row = mean + coefficients @ basis, as far as k components go.

    .feat, .path   name of the feature; the file
    .shape         of a row of the feature, such as (77, 768); F is its product
    .mean          (F,) float32, over the images that the components were fitted on
    .basis         (k, F) float32, orthonormal rows, by descending variance
    .variances     (k,) float32, of each coefficient over these images
    .total         float: mean squared distance of their rows from the mean, so that variances / total are shares
    .kept          float: share of it that the k components keep; .n_fitted: how many images these are
    .k             number of components
    .source        what the feature file said of itself
    .digest        short hash that tells one file of components from another (basis_in: what it says of the basis)
    .coefficients  (N, k) float32, by image id, read whole when first asked for (0.3 GB on NSD)
    .rows          the same on disk, as Rows
    """

    def __init__(self, path, feat):
        """Raises UserError when the file is missing or not readable."""
        again = f"write them with bash scripts/features.sh --feats {feat}"
        self.path, self.feat = path, feat
        self.rows = Rows(path, "data", f"components of {feat}", again,
                         go_on=f"continue with bash scripts/features.sh --feats {feat}")
        try:
            with h5py.File(path, "r") as file:
                self.mean, self.variances = file["mean"][()], file["variances"][()]
                self.k, width = file["basis"].shape
                known = dict(file.attrs)
                self.shape = tuple(int(size) for size in known["shape"])
                self.total, self.kept = float(known["total"]), float(known["kept"])
                self.n_fitted, self.seed, self.wanted = (int(known[name]) for name in ("n_fitted", "seed", "wanted"))
                self.source, self.digest = str(known["source"]), str(known["digest"])
            if not self.k == len(self.variances) == self.rows.shape[1] or \
                    not width == len(self.mean) == np.prod(self.shape):
                raise OSError("its parts are of different sizes")
        except (OSError, KeyError) as error:
            reason = str(error).strip("'\"")
            raise utils.UserError(f"{path}: not readable as components ({reason}); delete it and {again}") from None

    def __len__(self):
        return len(self.rows)

    @cached_property
    def basis(self):
        return self._read("basis")

    @cached_property
    def coefficients(self):
        return self._read("data")

    def _read(self, name):
        with h5py.File(self.path, "r") as file:
            return file[name][()]

    def require(self, ids):
        """Raise UserError unless the coefficients of all these images (n,) are there."""
        self.rows.require(np.asarray(ids, np.int64))

    def there(self):
        """List the images whose coefficients are there, (n,) ids, ascending."""
        return self.rows.there()


class CoefficientRows:
    """Coefficients as a target of batches (nsd.batches); stands in for the Rows of a feature.

    .shape (N, k), .row_shape (k,), .dtype, .path
    """

    def __init__(self, components, k=None):
        """components: Components; k: the first k of them alone (None: all)."""
        self.components, self.path = components, components.path
        self.array = components.coefficients[:, :k]
        self.shape, self.row_shape, self.dtype = self.array.shape, self.array.shape[1:], self.array.dtype

    def __len__(self):
        return len(self.array)

    def __getitem__(self, ids):
        """ids: slice or (n,) integers in any order -> (n, k) float32, a copy."""
        ids = np.arange(len(self))[ids] if isinstance(ids, slice) else np.asarray(ids, np.int64)
        self.require(ids)
        return self.array[ids]

    def require(self, ids):
        """Raise UserError unless the coefficients of all these images (n,) are there."""
        self.components.require(ids)


def open_components(paths, feat):
    """Open the components of a feature; returns Components.

    Raises UserError when the file is missing, not readable, or made from another feature file than the one beside it.
    """
    components = Components(paths.components(feat), feat)
    if paths.feature(feat).exists():
        check_source(components, source_of(paths.feature(feat)))
    return components


def check_source(components, source):
    """Raise UserError unless the components were made from the feature file that says this of itself (source_of)."""
    if components.source != source:
        raise utils.UserError(f"{components.path}: made from a feature file of {components.source}, but the one beside "
                              f"it is of {source}; delete it and write it again with bash scripts/features.sh --feats "
                              f"{components.feat}")


def basis_in(digest):
    """Return what tells one basis from another: the part of a digest that components keep when another root takes them
    over (write_components' `others`). Coefficients of two files with the same mean the same."""
    return digest.partition("-")[0]


def maker_in(source):
    """Return the model that a source (source_of) names; None of a feature file that does not say what made it."""
    model = source.rpartition(" ")[0]
    return None if model == "rows" else model


def source_of(file):
    """Say what a feature file was made by, and from; of another program's, which does not say, hash 16 of its rows."""
    try:
        with h5py.File(file, "r") as opened:
            rows = opened["data"]
            if "model" in rows.attrs:
                return f"{rows.attrs['model']} {rows.attrs['source']}"
            return f"rows {sample_hash(rows)}"
    except (OSError, KeyError) as error:
        raise utils.UserError(f"{file}: not readable ({error}); write it again with img2feat.py --overwrite") from None
