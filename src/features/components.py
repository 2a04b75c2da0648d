"""Principal components of a feature: fitted to images of no test set, then every image's coefficients.

nsd/components.py reads what is written here. Letters: n images that are fitted on, F numbers in a row, k components,
l directions that are followed to find them, b images of a block.
"""

import hashlib
from typing import NamedTuple

import h5py
import numpy as np
import scipy.linalg
import torch

import utils
from disk.files import atomic_path
from features.files import FeatureFile, check_room
from nsd.components import basis_in, maker_in, open_components, source_of
from nsd.rows import open_feature
from nsd.trials import shared_images
from training.team import ALONE

COMPONENTS = 1024
FITTED_IMAGES = 20_000  # at most
BLOCK = 512  # images that are read at once: 121 MB of c
EXACT_WIDTH = 2048  # rows of no more numbers are decomposed exactly
OVERSAMPLING, POWER_ITERATIONS = 64, 2  # Halko, Martinsson & Tropp 2011, algorithm 4.4


class Fit(NamedTuple):
    """Components that were fitted to n images."""

    mean: np.ndarray  # (F,) float32
    basis: np.ndarray  # (k, F) float32, orthonormal rows by descending variance
    variances: np.ndarray  # (k,) float32
    total: float  # mean squared distance of a row from the mean
    n_fitted: int

    @property
    def kept(self):
        """Share of the variance that the components keep."""
        return float(self.variances.sum(dtype=np.float64) / self.total) if self.total else 1.0


def fit_components(rows, ids, k=COMPONENTS, seed=42, device="cpu", max_images=FITTED_IMAGES, show=False):
    """Fit k principal components to the rows of some images; returns a Fit.

    rows: Rows by image id, flattened to F numbers; ids: images (at most max_images of them are used, drawn by the
    seed). Wide rows by randomized subspace iteration, which reads a block at a time and keeps about F * (k + 64) * 3
    numbers. There are no more components than min(k, F, n - 1), nor any whose variance is only rounding error. show: a
    progress bar. Raises UserError for fewer than two images, and for values that are not finite.
    """
    ids = np.sort(np.random.default_rng(seed).choice(ids, min(len(ids), max_images), replace=False))
    width = int(np.prod(rows.row_shape))
    if len(ids) < 2:
        raise utils.UserError(f"{rows.path}: {len(ids)} images that no test set holds are there, wanted at least 2 to "
                              "fit components to; write more of the feature")
    k, exact = min(k, width, len(ids) - 1), width <= EXACT_WIDTH
    n_passes = 2 if exact else POWER_ITERATIONS + 3
    with utils.progress(total=n_passes * len(ids), desc=f"{rows.path.stem}: components", unit="image", delay=2,
                        disable=not show) as bar:
        blocks = Blocks(rows, ids, torch.device(device), bar)
        variances, basis, total = (decompose if exact else follow)(blocks, k, seed)
    real = max(1, int((variances > 1e-7 * variances[0]).sum()))
    basis, variances = basis[:real], variances[:real].clamp(min=0)
    # a component's sign is arbitrary: its largest number is positive
    basis *= torch.take_along_dim(basis, basis.abs().argmax(1, keepdim=True), 1).sign()
    arrays = (tensor.float().cpu().numpy() for tensor in (blocks.mean, basis, variances))
    return Fit(*arrays, total, len(ids))


class Blocks:
    """The rows of some images, less their mean: iterates over (b, F) float32 on the device, read anew each time."""

    def __init__(self, rows, ids, device, bar):
        self.rows, self.ids, self.device, self.bar = rows, ids, device, bar
        self.width, self.mean = int(np.prod(rows.row_shape)), 0.0
        total = sum(block.sum(0, dtype=torch.float64) for block in self)
        self.mean = (total / len(ids)).float()

    def __len__(self):
        """Images."""
        return len(self.ids)

    def __iter__(self):
        for start in range(0, len(self.ids), BLOCK):
            ids = self.ids[start:start + BLOCK]
            yield read_block(self.rows, ids, self.device) - self.mean
            self.bar.update(len(ids))


def read_block(rows, ids, device):
    """Read the rows of images (b,), flattened: (b, F) float32 on the device; UserError where one is not finite."""
    block = torch.from_numpy(rows[ids].reshape(len(ids), -1).astype(np.float32, copy=False))
    finite = block.isfinite().all(1).numpy()
    if not finite.all():
        raise utils.UserError(f"{rows.path}: image id {ids[~finite][0]} holds NaN or infinite values; write the "
                              "feature again (img2feat.py)")
    return block.to(device)


def decompose(blocks, k, seed):
    """Take the exact way: eigenvectors of the covariance (F, F). Returns as follow does."""
    covariance = sum((block.T @ block).double() for block in blocks).cpu().numpy() / len(blocks)
    width = len(covariance)
    values, vectors = scipy.linalg.eigh(covariance, subset_by_index=[width - k, width - 1])  # ascending
    values, vectors = (torch.from_numpy(np.ascontiguousarray(x)) for x in (values[::-1], vectors[:, ::-1].T))
    return values, vectors, float(covariance.trace())


def follow(blocks, k, seed):
    """Find the k strongest components by subspace iteration from l random directions.

    X <- orthonormal(A' A X), POWER_ITERATIONS + 1 times, with A (n, F) the centred rows; then the eigenvectors of
    X' A' A X (l, l) turn X into components. Returns variances (k,), basis (k, F), the total variance.
    """
    n, device = len(blocks), blocks.device
    n_directions = min(k + OVERSAMPLING, blocks.width, n)
    generator = torch.Generator().manual_seed(utils.derive_seed(seed))
    directions = torch.randn(blocks.width, n_directions, generator=generator).to(device)  # (F, l)
    for _ in range(POWER_ITERATIONS + 1):
        image = torch.zeros_like(directions)
        for block in blocks:
            image.addmm_(block.T, block @ directions)
        directions = torch.linalg.qr(image).Q
    projected, total = torch.zeros(n_directions, n_directions, dtype=torch.float64, device=device), 0.0
    for block in blocks:
        coefficients = (block @ directions).double()
        projected.addmm_(coefficients.T, coefficients)
        total += float(block.square().sum(dtype=torch.float64))
    values, vectors = torch.linalg.eigh(projected / n)
    basis = (directions @ vectors.flip(1)[:, :k].float()).T.contiguous()
    return values.flip(0)[:k], basis, total / n


# --- the file -----------------------------------------------------------------------------------------------------


def write_components(paths, feat, k=COMPONENTS, seed=42, team=ALONE, overwrite=False, others=None):
    """Write what the file of a feature's components lacks: the components, then the coefficients of every image.

    Components are fitted once, to the images whose rows are there, without those of any test set. Later calls add
    coefficients of images whose rows came later, or where an earlier call was killed. team: processes that share the
    coefficients. overwrite: fit again. others: Paths of another root, whose components are taken over in place of
    fitting any, so that what was trained on them there can be fine-tuned here. Raises UserError for a file of another
    feature file, k, seed or basis, and for others of another feature.
    """
    path, rows, source = paths.components(feat), open_feature(paths, feat), source_of(paths.feature(feat))
    there, is_new = rows.there(), overwrite or not path.exists()
    adopted = others and open_components(others, feat)
    if adopted is not None:
        check_adopted(adopted, rows, source, None if is_new else open_components(paths, feat))
    team.wait()  # until every process has looked
    if is_new and team.is_main:
        if adopted is None:
            ids = np.setdiff1d(there, shared_images(paths, len(rows)))
            fit, basis = fit_components(rows, ids, k, seed, team.device, show=True), None
            settings = {"source": source, "seed": seed, "wanted": k}
        else:
            fit, basis = Fit(adopted.mean, adopted.basis, adopted.variances, adopted.total, adopted.n_fitted), \
                basis_in(adopted.digest)
            settings = {"source": source, "seed": adopted.seed, "wanted": adopted.wanted}
        create_file(paths, feat, fit, len(rows), rows.row_shape, settings, basis)
    team.wait()
    components, file = open_components(paths, feat), FeatureFile(path)
    if not is_new and adopted is None:
        check_settings(components, k, seed)
    # blocks are cut from all images, as those of features are, so that a run that was killed gives the same bits
    blocks = np.split(there, range(BLOCK, len(there), BLOCK))
    blocks = [ids for ids in blocks if not file.written[ids].all()]
    missing = len(there) - file.written[there].sum()
    team.wait()  # until every process has counted
    write_coefficients(rows, components, file, team.take(blocks), team)
    team.wait()
    fitted = f"{components.k} components keep {100 * components.kept:.1f} % of the variance (fitted on " \
             f"{components.n_fitted:,} images" + (f" of {others.root})" if others else ")")
    found = f"{FeatureFile(path).written.sum()} of {len(rows)} have coefficients"
    if is_new:
        team.print(f"{feat}: {fitted}")
    else:
        team.print(f"{path}: {f'added {missing} images' if missing else 'kept'}, {found}; {fitted}")


def check_settings(components, k, seed):
    """Raise UserError unless components that are there were fitted with these settings."""
    for name, found, wanted in (("components", components.wanted, k), ("seed", components.seed, seed)):
        if found != wanted:
            raise utils.UserError(f"{components.path}: written with --{name} {found}, wanted {wanted}; give --{name} "
                                  f"{found}, or delete the file to fit it again")


def check_adopted(adopted, rows, source, there):
    """Raise UserError unless components of another root can be taken over for these rows, which say `source` of
    themselves, and unless those that are there already (Components or None) have that basis."""
    models = [maker_in(adopted.source), maker_in(source)]
    if adopted.shape != rows.row_shape or None not in models and models[0] != models[1]:
        raise utils.UserError(f"--components_from: {adopted.path} is of rows {adopted.shape} by "
                              f"{models[0] or 'another program'}, {rows.path} has {rows.row_shape} by {models[1]}; "
                              "make both by the same model")
    if there is not None and basis_in(there.digest) != basis_in(adopted.digest):
        raise utils.UserError(f"{there.path}: has components {there.digest}, wanted {basis_in(adopted.digest)} of "
                              f"{adopted.path} (--components_from); delete it; what was trained on it is then to be "
                              "trained again")


def create_file(paths, feat, fit, n_images, shape, settings, basis=None):
    """Make a file of components, without any image's coefficients. basis: what its digest begins with where they were
    taken over (nsd.components.basis_in)."""
    path, k = paths.components(feat), len(fit.basis)
    check_room(path.parent, [path.name], (n_images * k + fit.basis.size) * 4)
    known = {"shape": shape, "total": fit.total, "kept": fit.kept, "n_fitted": fit.n_fitted, **settings}
    parts = {"mean": fit.mean, "basis": fit.basis, "variances": fit.variances}
    digest = hashlib.sha256(repr(known).encode())
    for array in parts.values():
        digest.update(np.ascontiguousarray(array))
    try:
        with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
            for name, array in parts.items():
                file[name] = array
            rows = file.create_dataset("data", (n_images, k), np.float32)
            rows[0] = 0  # with its first row HDF5 gives the data set its place
            file["written"] = np.zeros(n_images, np.uint8)
            file.attrs.update(known, digest=(f"{basis}-" if basis else "") + digest.hexdigest()[:12])
    except OSError as error:
        raise utils.UserError(f"{path}: could not be created ({error}); make room on the disk") from None


def write_coefficients(rows, components, file, blocks, team):
    """Write the coefficients of `blocks`, a list of (b,) image ids, to a FeatureFile."""
    if not blocks:
        return
    mean, basis = (torch.from_numpy(array).to(team.device) for array in (components.mean, components.basis))
    with utils.progress(total=sum(map(len, blocks)), desc=f"{components.feat}: coefficients", unit="image", delay=2,
                        disable=not team.is_main) as bar:
        for ids in blocks:
            file.write(ids, ((read_block(rows, ids, team.device) - mean) @ basis.T).cpu())
            bar.update(len(ids))
