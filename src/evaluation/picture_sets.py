"""Sets of pictures as the metrics read them, wherever they come from."""

import hashlib
from pathlib import Path

import numpy as np
import torch

import utils
from disk.hints import listed
from evaluation.metrics import resize
from nsd.synthetic import is_synthetic
from sampling.folders import name_of, read_images, read_png, recorded
from sampling.inputs import as_float

SEEN, MADE = "seen images", "reconstructed"  # labels of the images themselves, and of what is evaluated
SIDE = 256  # pixels: of both pictures of a pair, before any metric


class PictureSet:
    """Pictures of images, wherever they come from, as evaluate.py reads them: one or more samples of each image.

    label: its name in tables; image_ids (N,): whose they are.
    """

    def __init__(self, label, image_ids, read, n_samples=1, config=None, shows=None):
        """read: (number of the image, sample) -> (H, W, 3) uint8; config: how they were drawn; shows (N,): ids of the
        stimuli that stand in their place, where these are stimuli."""
        self.label, self.image_ids, self.read, self.n_samples = label, np.asarray(image_ids), read, n_samples
        self.config, self.shows = config, shows
        self._keys = {}

    @classmethod
    def of_stimuli(cls, label, image_ids, stimuli):
        """The seen images themselves; stimuli: Rows, by image id."""
        image_ids = np.asarray(image_ids)
        return cls(label, image_ids, lambda i, k: stimuli[image_ids[[i]]][0])

    @classmethod
    def of_folder(cls, label, images):
        """The pictures of an ImageSet."""
        return cls(label, images.image_ids, lambda i, k: read_png(images.files[i][k]), len(images.files[0]),
                   images.config)

    def of_ids(self, image_ids):
        """The same pictures of fewer images."""
        at = np.searchsorted(self.image_ids, image_ids)
        shows = None if self.shows is None else self.shows[at]
        return PictureSet(self.label, image_ids, lambda i, k: self.read(at[i], k), self.n_samples, self.config, shows)

    def batch(self, index, sample=0):
        """(B, 3, SIDE, SIDE) in [0, 1]: the protocol first brings both pictures of a pair to this side."""
        return torch.cat([resize(as_float(self.read(i, sample)[None]), SIDE) for i in index])

    def key(self, sample=0):
        """Hash of the sample's pixels, in order."""
        if sample not in self._keys:
            digest = hashlib.sha256()
            for i in range(len(self.image_ids)):
                picture = self.read(i, sample)
                digest.update(str(picture.shape).encode() + picture.tobytes())
            self._keys[sample] = digest.hexdigest()
        return self._keys[sample]


def check_ids(images, stimuli):
    """Refuse image ids of an ImageSet that the stimulus file does not have; stimuli: Rows, or nsd.synthetic's."""
    if is_synthetic(images.image_ids):
        stimuli.require(images.image_ids)
    elif images.image_ids[0] < 0 or images.image_ids[-1] >= len(stimuli):
        found = f"{images.image_ids[0]}..{images.image_ids[-1]}"
        raise utils.UserError(f"{images.folder}/index.csv: image_id {found}, wanted 0..{len(stimuli) - 1} "
                              f"({stimuli.path.parent}); give the --root they were made with")


def find_set(paths, said, given):
    """Return the folder of pictures `given` by what was `said`, a flag and its value; UserError, which names those that
    are there, for none."""
    folder = paths.find(given)
    if folder.exists():
        return folder
    where = "" if Path(given).expanduser().is_absolute() else f", neither in {Path.cwd()} nor in {paths.root}"
    there = listed([(paths.as_recorded(index.parent), []) for index in paths.outputs_all.glob("subj*/*/*/*/index.csv")])
    raise utils.UserError(f"{said}: not found{where}; " + (f"{there}: give one of them, or " if there else "")
                          + "reconstruct first (bash scripts/recon.sh)")


def read_compared(words, paths, taken=()):
    """{label: ImageSet} of --compare: [LABEL=]DIR; without a label it is named by its folder.

    Raises UserError for a label given twice, and for one of `taken`.
    """
    folders = {}
    for word in words:
        label, _, given = word.rpartition("=")
        folder = find_set(paths, f"--compare {word}", given)
        label = label or name_of(folder)
        if label in taken:
            raise utils.UserError(f"--compare {word}: {label!r} is the label of a set that is measured anyway; give "
                                  "another, LABEL=DIR")
        if label in folders:
            raise utils.UserError(f"--compare {word}: {label!r} is the label of {folders[label]}, too; give each its "
                                  "own, LABEL=DIR")
        folders[label] = folder
    return {label: read_images(folder) for label, folder in folders.items()}


def unlike(images, other, meant=()):
    """Say how another ImageSet was drawn otherwise than `images`; '' for the same way, as far as it is known.

    meant: settings that make it what it is. Settings that only one of them has (of guidance, where there was none) are
    left out.
    """
    one, two = (recorded(drawn.config or {}) for drawn in (images, other))
    free = {"method", "score_hashes", "commit", "device", "compile", *meant}
    said = [f"{name} {shown(two[name])}, not {shown(one[name])}" for name in one
            if name in two and name not in free and two[name] != one[name]]
    samples = [len(drawn.files[0]) for drawn in (other, images)]
    if samples[0] != samples[1]:
        said.append("{} picture{} of each image, not {}".format(samples[0], "s" * (samples[0] > 1), samples[1]))
    return "; ".join(said)


def shown(value):
    """Write a setting as its flag takes it."""
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def of_the_same_images(sets, image_ids):
    """Those of {label: PictureSet} that have all of image_ids (N,), of these images alone; and {label: why not} of the
    others."""
    whole, lacking = {}, {}
    for label, pictures in sets.items():
        missing = np.setdiff1d(image_ids, pictures.image_ids)
        if missing.size:
            lacking[label] = (f"{missing.size} of the images are missing (first: id {missing[0]}): draw them without "
                              "--limit")
        else:
            whole[label] = pictures.of_ids(image_ids) if len(pictures.image_ids) > len(image_ids) else pictures
    return whole, lacking
