"""Responses and regions of one's own data: arrays, HDF5, NIfTI, and what GLMsingle writes.

Letters: T trials, V voxels, X, Y, Z the axes of a volume.
"""

from contextlib import suppress
from pickle import Unpickler, UnpicklingError

import h5py
import numpy as np

import utils

GLMSINGLE = "TYPED_FITHRF_GLMDENOISE_RR"  # its last model; `betasmd` (X, Y, Z, T) or (V, T)
PAGE = "docs/own_data.md lists the forms"
AFFINE_TOLERANCE = 1e-3  # mm
# of a pickle, what makes arrays and plain values: nothing else in it is ever called
ARRAY_PARTS = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
               *((module, name) for module in ("numpy.core.multiarray", "numpy._core.multiarray")
                 for name in ("_reconstruct", "scalar")),
               *((module, "_frombuffer") for module in ("numpy.core.numeric", "numpy._core.numeric"))}


class Space:
    """Where a subject's voxels are, before its mask: shape (V,) or (X, Y, Z), affine (4, 4) or None."""

    def __init__(self, file, shape, affine=None):
        self.file, self.shape, self.affine = file, tuple(shape), affine

    def check(self, file, shape, affine):
        """Raise UserError unless a mask of that shape and affine is of the same space."""
        if tuple(shape) != self.shape:
            raise utils.UserError(f"{file}: shape {tuple(shape)} found, wanted {self.shape} as {self.file} has; give "
                                  "one of the same space")
        if affine is not None and self.affine is not None and \
                not np.allclose(affine, self.affine, rtol=0, atol=AFFINE_TOLERANCE):
            raise utils.UserError(f"{file}: affine {flat(affine)} found, wanted {flat(self.affine)} as "
                                  f"{self.file} has; resample it into that space")
        if affine is not None:
            self.affine = affine  # what GLMsingle writes has none: then all masks must agree


class Responses:
    """A subject's responses, (T, V) of those voxels that its mask keeps; read when they are asked for.

    .file, .shape; .regions {name: (V,) bool}
    """

    def __init__(self, file, array, columns=None):
        """array: (T, all voxels); columns: (V,) which of them, None for all."""
        self.file, self.array, self.columns, self.regions = file, array, columns, {}
        self.shape = (len(array), array.shape[1] if columns is None else len(columns))

    def __getitem__(self, rows):
        """rows: slice -> (n, V) float32; raises UserError for values that are no responses."""
        try:
            values = np.asarray(self.array[rows])
        except OSError as error:
            raise utils.UserError(f"{self.file}: not readable ({error}); write it again") from None
        with np.errstate(over="ignore"):
            values = (values if self.columns is None else values[:, self.columns]).astype(np.float32)
        finite = np.isfinite(values)
        if not finite.all():
            row, voxel = (int(places[0]) for places in np.nonzero(~finite))
            raise utils.UserError(f"{self.file}: {(~finite).any(0).sum()} voxels hold NaN or infinite values, first "
                                  f"voxel {voxel} in row {rows.start + row}, wanted numbers; leave them out by a mask "
                                  "(mask_<subject>)")
        if not values.any(1).all():
            row = rows.start + int(np.flatnonzero(~values.any(1))[0])
            raise utils.UserError(f"{self.file}: row {row} is all zeros, wanted a response; leave the trial out here "
                                  "and in trials.csv")
        return values


def open_betas(data):
    """Open the responses of all subjects of an OwnData: {number: Responses}; raises UserError for those of nobody."""
    names = {subject.name for subject in data.subjects}
    for prefix in ("betas_", "mask_", "regions_"):
        for file in sorted(data.folder.glob(f"{prefix}*")):
            name = file.name.removeprefix(prefix).partition(".")[0]
            if name not in names:
                raise utils.UserError(f"{file}: trials.csv has no trial of {name}, wanted files of "
                                      f"{', '.join(sorted(names))}; add the trials, or take the file away")
    return {subject.number: open_responses(data.folder, subject.name, len(subject.rows)) for subject in data.subjects}


def open_responses(folder, name, n_trials):
    """Open the responses of a subject, whose trials.csv has n_trials; returns Responses, or raises UserError.

    betas_<name>: .npy (T, V); .h5 or .hdf5 with `betas` (T, V); .nii.gz or .nii (X, Y, Z, T). GLMsingle's own file of
    either type, or its output as a folder of that name, is read as it is. mask_<name>: .npy, .nii.gz or .nii, (V,) or
    (X, Y, Z), not 0 where a voxel is kept; volumes need one. Voxels are in C order.
    """
    file = one_of(folder, f"betas_{name}", (".npy", ".h5", ".hdf5", ".nii.gz", ".nii", ""))
    if file is None:
        raise utils.UserError(f"{folder}: betas_{name} not found, wanted .npy, .h5, .nii.gz or a folder of "
                              f"GLMsingle's; {PAGE}")
    if file.is_dir():
        found = one_of(file, GLMSINGLE, (".npy", ".hdf5"))
        file = utils.require(found or file / f"{GLMSINGLE}.npy", "GLMsingle's output", PAGE)
    array, space, trials_first = READERS[suffix_of(file)](file)
    if array.dtype.kind not in "fiu":
        raise utils.UserError(f"{file}: {array.dtype} found, wanted numbers (trials, voxels)")
    mask_file = one_of(folder, f"mask_{name}", (".npy", ".nii.gz", ".nii"))
    mask = read_mask(mask_file, space) if mask_file else None
    if mask is None and len(space.shape) > 1:
        raise utils.UserError(f"{folder}: mask_{name}.nii.gz not found, wanted one: the betas are volumes "
                              f"{space.shape}; give the voxels to decode from, not 0 in it")
    n_found = array.shape[0 if trials_first else -1]
    if n_found != n_trials:
        turned = " (they look like (voxels, trials): transpose them)" if n_trials in array.shape else ""
        raise utils.UserError(f"{file}: {n_found} trials found in shape {array.shape}, wanted {n_trials}, a row for "
                              f"each line of {name} in trials.csv{turned}")
    if trials_first:
        responses = Responses(file, array, None if mask is None else np.flatnonzero(mask))
    else:
        responses = Responses(file, (array[:][mask] if mask is not None else array[:].reshape(-1, n_trials)).T)
    responses.regions = read_regions(folder / f"regions_{name}", space, mask)
    return responses


def one_of(folder, stem, endings):
    """Return the file folder/stem+ending that is there, None for none; raises UserError for two."""
    found = [folder / f"{stem}{ending}" for ending in endings if (folder / f"{stem}{ending}").exists()]
    if len(found) > 1:
        raise utils.UserError(f"{folder}: {found[0].name} and {found[1].name} found, wanted one; take the other away")
    return found[0] if found else None


def suffix_of(file):
    return ".nii" if file.name.endswith((".nii", ".nii.gz")) else ".h5" if file.suffix == ".hdf5" else file.suffix


def flat(affine):
    return np.asarray(affine)[:3].round(3).tolist()


# --- betas: (array, Space, whether trials are its first axis) --------------------------------------------------------


def read_npy(file):
    """(T, V), or the dictionary that GLMsingle saves."""
    try:
        with open(file, "rb") as opened:
            version = np.lib.format.read_magic(opened)
            read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else \
                np.lib.format.read_array_header_2_0
            is_pickle = read_header(opened)[2].hasobject
            found = ArraysOnly(opened).load() if is_pickle else None
        array = None if is_pickle else np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError, UnpicklingError, AttributeError, TypeError, IndexError, KeyError,
            ImportError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise utils.UserError(f"{file}: not readable ({reason}); wanted an array, or GLMsingle's dictionary of "
                              "arrays") from None
    if is_pickle:
        found = found.item() if isinstance(found, np.ndarray) and found.shape == () else found
        array = found.get("betasmd") if isinstance(found, dict) else None
        if not isinstance(array, np.ndarray):
            raise utils.UserError(f"{file}: a pickle without `betasmd`, wanted GLMsingle's {GLMSINGLE}.npy or an array "
                                  "(trials, voxels)")
        return of_glmsingle(file, array)
    return of_table(file, array)


class ArraysOnly(Unpickler):
    """Reads arrays and plain values. A pickle can name any function to be called: every other is refused."""

    def find_class(self, module, name):
        if (module, name) not in ARRAY_PARTS:
            raise UnpicklingError(f"it holds {module}.{name}, wanted arrays and plain values only")
        return super().find_class(module, name)


def read_hdf5(file):
    """`betas` (T, V), or GLMsingle's `betasmd`."""
    opened = None
    with suppress(OSError):
        opened = h5py.File(file, "r")
    if opened is None:
        raise utils.UserError(f"{file}: not a readable HDF5 file, wanted `betas` (trials, voxels); write it again")
    for key, read in (("betas", of_table), ("betasmd", of_glmsingle)):
        if isinstance(opened.get(key), h5py.Dataset):
            return read(file, opened[key])
    raise utils.UserError(f"{file}: {', '.join(opened) or 'nothing'} found, wanted `betas` (trials, voxels), or "
                          "`betasmd` as GLMsingle writes it")


def read_nifti_betas(file):
    """(X, Y, Z, T)."""
    array, affine = read_nifti(file)
    if array.ndim != 4:
        raise utils.UserError(f"{file}: shape {array.shape} found, wanted (X, Y, Z, trials)")
    return array, Space(file, array.shape[:3], affine), False


def of_table(file, array):
    if len(array.shape) != 2 or 0 in array.shape:
        raise utils.UserError(f"{file}: shape {array.shape} found, wanted (trials, voxels)")
    return array, Space(file, array.shape[1:]), True


def of_glmsingle(file, array):
    """betasmd of voxels (V, T), which GLMsingle may write as (V, 1, 1, T), or of a volume."""
    if len(array.shape) not in (2, 4) or 0 in array.shape:
        raise utils.UserError(f"{file}: `betasmd` of shape {array.shape} found, wanted (X, Y, Z, trials) or (voxels, "
                              "trials)")
    is_volume = len(array.shape) == 4 and array.shape[1:3] != (1, 1)
    array = array if is_volume else array[:].reshape(array.shape[0], array.shape[-1])
    return array, Space(file, array.shape[:-1]), False


READERS = {".npy": read_npy, ".h5": read_hdf5, ".nii": read_nifti_betas}


# --- masks --------------------------------------------------------------------------------------------------------


def read_nifti(file):
    """Return the values of a volume as float32, and its affine (4, 4)."""
    import nibabel

    try:
        image = nibabel.load(file)
        return image.get_fdata(dtype=np.float32, caching="unchanged"), image.affine
    except Exception as error:  # nibabel and gzip raise many types for damaged files
        raise utils.UserError(f"{file}: not a readable NIfTI volume ({str(error).splitlines()[0]}); write it again") \
            from None


def read_mask(file, space):
    """Read which voxels of a space a file marks, bool of its shape; raises UserError where it is of another."""
    if suffix_of(file) == ".nii":
        values, affine = read_nifti(file)
    else:
        try:
            values, affine = np.load(file, allow_pickle=False), None
        except (ValueError, OSError, EOFError) as error:
            raise utils.UserError(f"{file}: not a readable array ({str(error).splitlines()[0]}); write it again") \
                from None
    values = values.reshape(values.shape[:3]) if values.ndim == 4 and values.shape[3] == 1 else values
    space.check(file, values.shape, affine)
    if values.dtype.kind not in "biuf" or not np.isfinite(values).all():
        raise utils.UserError(f"{file}: {values.dtype} that is not all numbers found, wanted 0 and 1")
    if not values.any():
        raise utils.UserError(f"{file}: no voxel found, wanted some that are not 0")
    return values != 0


def read_regions(folder, space, mask):
    """Read the regions of a subject, masks of the same space: {name: (V,) bool over the voxels that are kept}."""
    regions = {}
    for file in sorted(folder.glob("*")) if folder.exists() else ():
        name = file.name.partition(".")[0]
        if file.name.startswith("."):
            continue
        if suffix_of(file) not in (".npy", ".nii") or not (name.isascii() and name.isalnum() or name == "higher_vis"):
            raise utils.UserError(f"{file}: wanted NAME.nii.gz or NAME.npy with a name of letters and digits, such as "
                                  "V1, or higher_vis; rename it")
        if name in regions:
            raise utils.UserError(f"{file}: a second file of region {name}, wanted one; take the other away")
        inside = read_mask(file, space)
        regions[name] = inside[mask] if mask is not None else inside.reshape(-1)
        if not regions[name].any():
            raise utils.UserError(f"{file}: none of its {inside.sum()} voxels is in the mask, wanted some; "
                                  "take it away")
    return regions
