"""NSD-synthetic: one session of each subject, 284 stimuli of another kind (noise, gratings, words, hues).

Its stimuli have ids of their own, FIRST_ID + 0..283, which no 73k id reaches: who asks NSD's files for one of them, or
these for an image of NSD, gets an error, not another image. What is read here by an id of either kind is read from the
files that it belongs to. The last stimuli (64 of 284) were shown to one subject each.

Letters: N images, T trials, V voxels; X, Y, Z axes of a volume.
"""

from functools import cached_property

import h5py
import numpy as np

import utils
from nsd.regions import voxel_space
from nsd.rows import KNOWN_FEATURE_SHAPES, Rows, open_feature, open_stimuli

FIRST_ID = 1_000_000  # of stimulus 0
SPLIT = "synthetic"  # of --test_split
HINT = "download it (bash scripts/download.sh --what synthetic)"
AT_ONCE = 32  # trials whose volumes are in memory together
# The stimuli were made for a display whose light grows with the gray value; a usual one's grows with about its square.
SHOWN = np.sqrt(np.arange(256) / 255) * 255


def is_synthetic(image_ids):
    """Whether image ids (N,) are of NSD-synthetic; UserError where some are and some are not."""
    synthetic = np.asarray(image_ids) >= FIRST_ID
    if synthetic.any() and not synthetic.all():
        raise utils.UserError(f"image ids {np.min(image_ids)}..{np.max(image_ids)}: of NSD and of NSD-synthetic (from "
                              f"{FIRST_ID}), wanted those of one of them")
    return bool(synthetic.any())


# --- trials and responses -----------------------------------------------------------------------------------------


def load_synthetic_trials(paths, subj):
    """Read which stimulus each trial of the session showed: DataFrame [subject, session, image_id, row].

    nsdsynthetic_expdesign.mat counts stimuli from 1, and is the same for all subjects. Raises UserError for a file that
    is missing or not readable.
    """
    import pandas as pd
    import scipy.io

    file = utils.require(paths.synthetic_design, "the design of NSD-synthetic", HINT)
    try:
        order = scipy.io.loadmat(file, variable_names=["masterordering"])["masterordering"].ravel()
        shown = order.astype(np.int64) - 1
        if not len(shown) or (order != shown + 1).any() or shown.min() < 0:
            raise ValueError(f"masterordering is {order[:3]}..., wanted stimuli from 1")
    except Exception as error:  # scipy raises many types for damaged files
        raise utils.UserError(f"{file}: not readable ({error!r}); download it again") from None
    return pd.DataFrame({"subject": subj, "session": 1, "image_id": FIRST_ID + shown, "row": np.arange(len(shown))})


class SessionBetas:
    """The responses of one session, (T, V) float32, z-scored per voxel; stands in for the Rows of betas.

    They are read, all of them, when the first is asked for. A voxel without signal has 0.
    """

    def __init__(self, path, n_trials, voxels, read):
        """voxels: (V,) places on each axis of the volumes; read: () -> (T, V) of any scale."""
        self.path, self.shape, self._read = path, (n_trials, len(voxels[0])), read

    def __len__(self):
        return self.shape[0]

    @cached_property
    def responses(self):
        try:
            stored = self._read().astype(np.float64)
        except Exception as error:  # h5py, nibabel and gzip raise many types for damaged files
            raise _damaged(self.path, error) from None
        deviation = stored.std(axis=0)
        return ((stored - stored.mean(axis=0)) / np.where(deviation > 0, deviation, 1)).astype(np.float32)

    def __getitem__(self, rows):
        return self.responses[rows]

    def require(self, rows):
        """Raise UserError unless the session has all of these trials (n,)."""
        if len(rows) and np.max(rows) >= len(self):
            raise utils.UserError(f"{self.path}: {len(self)} trials, the design has a trial {np.max(rows)}; download "
                                  "both again")


def open_synthetic_betas(paths, subj):
    """Read a subject's responses to NSD-synthetic, SessionBetas: voxels are those of its betas, in their order.

    betas_nsdsynthetic.hdf5 (T, Z, Y, X) or, where there is none, .nii.gz (X, Y, Z, T), int16, is read in the voxels
    where nsdgeneral is 1, in C order of (X, Y, Z). It holds 300 times the percent signal change; the z-score over the
    session, which NSD's betas have too, needs no such unit. Raises UserError where a file is missing or damaged, or the
    voxels are not those of the betas.
    """
    decoded = voxel_space(paths, subj).inside
    voxels = np.nonzero(decoded)  # C order
    hdf5, nifti = (paths.synthetic_betas(subj) / f"betas_nsdsynthetic.{kind}" for kind in ("hdf5", "nii.gz"))
    if hdf5.exists() or not nifti.exists():
        file, opened = utils.require(hdf5, f"betas of NSD-synthetic of {subj}", HINT), _open_hdf5
    else:
        file, opened = nifti, _open_nifti
    try:
        dtype, n_trials, shape, read = opened(file, voxels)
        if dtype != np.int16 or shape != decoded.shape:
            raise OSError(f"{dtype} volumes of {shape}, wanted int16 of {decoded.shape}, as nsdgeneral.nii.gz is")
    except Exception as error:  # h5py, nibabel and gzip raise many types for damaged files
        raise _damaged(file, error) from None
    return SessionBetas(file, n_trials, voxels, read)


def _damaged(file, error):
    reason = (str(error) or repr(error)).splitlines()[0]
    return utils.UserError(f"{file}: not readable as responses ({reason}); delete it and {HINT}")


def _open_hdf5(file, voxels):
    """(type, T, (X, Y, Z), () -> (T, V)) of volumes (T, Z, Y, X)."""
    x, y, z = voxels

    def read():
        with h5py.File(file, "r") as opened:
            betas = opened["betas"]
            return np.concatenate([betas[start:start + AT_ONCE][:, z, y, x]
                                   for start in range(0, len(betas), AT_ONCE)])

    with h5py.File(file, "r") as opened:
        n_trials, *shape = opened["betas"].shape
        return opened["betas"].dtype, n_trials, tuple(shape[::-1]), read


def _open_nifti(file, voxels):
    """The same of volumes (X, Y, Z, T)."""
    import nibabel

    stored = nibabel.load(file).dataobj
    return stored.dtype, stored.shape[3], tuple(stored.shape[:3]), lambda: stored.get_unscaled()[voxels].T


# --- stimuli and their features -----------------------------------------------------------------------------------


def _open_brick(file):
    return Rows(file, "imgBrick", "stimuli of NSD-synthetic", HINT).of("u", 3, "uint8 (N, H, W, 3)")


class SyntheticStimuli:
    """The stimuli that one subject saw, (N, side, side, 3) uint8 by their number from 0, as images of NSD look.

    Each is the square in the middle of the screen, in gray values of a usual display, resized to NSD's images.
    """

    def __init__(self, paths, subj):
        self.paths = paths
        self.common = _open_brick(paths.synthetic / "nsdsynthetic_stimuli.hdf5")
        self.own = _open_brick(paths.synthetic / f"nsdsynthetic_colorstimuli_{subj}.hdf5")
        self.path = self.own.path

    @cached_property
    def side(self):
        return open_stimuli(self.paths).shape[1]

    @property
    def shape(self):
        return len(self), self.side, self.side, 3

    def __len__(self):
        return len(self.common) + len(self.own)

    def __getitem__(self, numbers):
        """numbers: (n,) integers -> (n, side, side, 3)."""
        pictures = [self._show(int(number)) for number in numbers]
        return np.stack(pictures) if pictures else np.empty((0, *self.shape[1:]), np.uint8)

    def _show(self, number):
        from PIL import Image

        brick, place = (self.common, number) if number < len(self.common) else (self.own, number - len(self.common))
        screen = brick[[place]][0]
        side = min(screen.shape[:2])
        top, left = ((length - side) // 2 for length in screen.shape[:2])
        square = SHOWN[screen[top:top + side, left:left + side]].round().astype(np.uint8)
        if side == self.side:
            return square
        return np.asarray(Image.fromarray(square).resize((self.side, self.side), Image.Resampling.LANCZOS))


class ByImageId:
    """Rows that are numbered from 0, of stimuli or features, read by the ids of NSD-synthetic instead."""

    def __init__(self, rows):
        self.rows, self.path, self.shape, self.row_shape = rows, rows.path, rows.shape, rows.shape[1:]

    def __len__(self):
        return len(self.rows)

    def require(self, image_ids):
        """Raise UserError unless these are ids (n,) of such stimuli."""
        bad = [image_id for image_id in np.ravel(image_ids) if not 0 <= image_id - FIRST_ID < len(self)]
        if bad:
            raise utils.UserError(f"{self.path}: image id {bad[0]} wanted, found {FIRST_ID}.."
                                  f"{FIRST_ID + len(self) - 1}, the stimuli of NSD-synthetic; give the --root and "
                                  "--subj they were shown to")

    def __getitem__(self, image_ids):
        self.require(image_ids)
        return self.rows[np.asarray(image_ids) - FIRST_ID]


def stimuli_of(paths, subj, image_ids):
    """Open the stimuli that image ids (N,) are of: NSD's, or those of NSD-synthetic that the subject saw."""
    return ByImageId(SyntheticStimuli(paths, subj)) if is_synthetic(image_ids) else open_stimuli(paths)


def feature_file(paths, feat, subj, image_ids):
    """Return where a feature of the stimuli that image ids (N,) are of lies."""
    return paths.synthetic_feature(feat, subj) if is_synthetic(image_ids) else paths.feature(feat)


def feature_of(paths, feat, subj, image_ids):
    """Open a feature of the stimuli that image ids (N,) are of, by these ids; as open_feature."""
    if not is_synthetic(image_ids):
        return open_feature(paths, feat)
    if feat == "c":
        raise utils.UserError("true c of NSD-synthetic: there is none, since its stimuli have no captions; leave c out")
    hint = f"write it with bash scripts/features.sh --test_split {SPLIT} --feats {feat} --subj {int(subj[4:])}"
    file = paths.synthetic_feature(feat, subj)
    return ByImageId(Rows(file, "data", f"feature {feat} of NSD-synthetic", hint, KNOWN_FEATURE_SHAPES, hint))
