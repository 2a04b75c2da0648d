"""How metrics grow with what a decoder is given: numbers of the response (BrainBits, arXiv 2411.02783), sessions.

A curve is made of sets of pictures that were measured anyway: drawings through a bottleneck, and compared sets of runs
that learned from fewer sessions.
"""

from typing import NamedTuple

from evaluation.metrics import LOWER_IS_BETTER
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


def draw(curve, measured, floors):
    """A matplotlib figure of a Curve: a panel for each metric of SHOWN, with intervals.

    measured: {label: Measured}; floors: {what it is called: label} of sets drawn as level lines, such as a control.
    """
    from matplotlib.figure import Figure

    first = measured[next(iter(curve.given))].results
    metrics = [name for name in SHOWN if first.get(name, {}).get("n")]
    figure = Figure(figsize=(3.2 * len(metrics), 2.8), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        entries = [measured[label].results[name] for label in curve.given]
        values = [entry["value"] for entry in entries]
        spread = [[abs(entry["value"] - entry[end]) for entry in entries] for end in ("ci_low", "ci_high")]
        axis.errorbar(list(curve.given.values()), values, spread, marker="o", markersize=4, linewidth=1.2, capsize=2)
        for dashes, (called, label) in zip(("--", ":", "-."), floors.items(), strict=False):
            if name in measured[label].results:
                axis.axhline(measured[label].results[name]["value"], linestyle=dashes, color="#808890", linewidth=1,
                             label=called)
        axis.set_xscale("log")
        ticks = list(curve.given.values())
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set_xlabel(curve.title, fontsize=8)
        axis.set_ylabel(name + (" (lower is better)" if name in LOWER_IS_BETTER else ""), fontsize=8)
        if floors:
            axis.legend(frameon=False, fontsize=7)
    return figure
