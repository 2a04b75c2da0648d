"""How metrics grow with what a decoder is given: numbers of the response (BrainBits, arXiv 2411.02783), sessions.

A curve is made of sets of pictures that were measured anyway: drawings through a bottleneck, and compared sets of runs
that learned from fewer sessions.
"""

from typing import NamedTuple

from training.bottleneck import numbers_left

SHOWN = ("pixcorr", "ssim", "clip_two_way", "effnet_distance")


class Curve(NamedTuple):
    """Sets of pictures in the order of what their decoder was given."""

    title: str
    given: dict  # label -> how much, ascending; the reconstructions are the last


def curves_of(images, others, label, n_voxels):
    """List the Curves that some measured sets make.

    images: ImageSet of the reconstructions, measured as `label`; others: {label: ImageSet} of the sets compared with
    it; n_voxels: of the whole response, or None.
    """
    own, found = images.config or {}, []
    configs = {name: other.config or {} for name, other in others.items()}
    squeezed = {name: k for name, config in configs.items() if (k := numbers_left(config.get("control")))}
    if squeezed and n_voxels:
        found.append(("Numbers left of the response", squeezed | {label: n_voxels}))
    sessions = {name: config["num_sessions"] for name, config in configs.items()
                if config.get("num_sessions", own.get("num_sessions")) != own.get("num_sessions")}
    if sessions and own.get("num_sessions"):
        found.append(("Sessions of the subject", sessions | {label: own["num_sessions"]}))
    return [Curve(title, dict(sorted(given.items(), key=lambda item: item[1]))) for title, given in found]
