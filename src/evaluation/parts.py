"""Parts of a test set that a reader wants to see apart: kinds of stimuli, images of a cluster that was held out."""

import numpy as np

from evaluation.measuring import Measured
from nsd.clusters import in_cluster
from nsd.synthetic import FIRST_ID, is_synthetic


def parts_of(images, stimuli, paths):
    """Divide the images of an ImageSet: {name of a part: (N,) bool}; {} where nothing divides them.

    stimuli: those that they are of, as nsd.synthetic.stimuli_of opens them. NSD-synthetic: what all subjects saw, and
    the colours that one alone saw. Of a decoder without a cluster (--hold_out): its images, and the others.
    """
    held_out = (images.config or {}).get("hold_out")
    if is_synthetic(images.image_ids):
        common = images.image_ids < FIRST_ID + len(stimuli.rows.common)
        return {"stimuli that all saw": common, "the subject's own colours": ~common}
    if held_out:
        inside = in_cluster(paths, held_out, images.image_ids)
        return {f"cluster {held_out}, held out": inside, "other clusters": ~inside}
    return {}


def measure_parts(measured, parts, seed):
    """Return {part: {label: {metric: entry}}}: each set's values over the images of each part that has some.

    measured: {label: Measured}. What compares an image with others (two-way, ranks) compares it with all of them.
    """
    def inside(values, chosen):
        return {name: array[chosen] for name, array in values.items() if not np.isnan(array[chosen]).all()}

    return {part: {label: Measured(inside(found.per_image, chosen), {}, seed).results
                   for label, found in measured.items()} for part, chosen in parts.items() if chosen.any()}
