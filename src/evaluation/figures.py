"""Figures of the report, as inline SVG: one small axis each, so that a phone shows them one below the other.

Their colours are the page's own (report.css), so that they are legible on light, on dark and on paper.
"""

import io
import re

import numpy as np
from markupsafe import Markup, escape

# colours that stand in for the page's, which matplotlib does not take
INK, FAINT, LINE, MAIN = "#010203", "#040506", "#070809", "#0a0b0c"
PAGE_COLOURS = {INK: "var(--ink)", FAINT: "var(--faint)", LINE: "var(--line)", MAIN: "var(--accent)"}
MARKS = {"main": ("o", MAIN, MAIN), "compared": ("o", INK, INK), "control": ("o", FAINT, "none"),
         "ceiling": ("D", FAINT, "none")}  # of each kind of set: marker, edge, face
LONGEST = 26  # letters of a label


def new_axis(width, height):
    """A figure of one axis, inches; not pyplot's, which would keep it."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained").subplots()


def comparison(title, rows, chance, published, lower_is_better, scale=1):
    """One metric of every set, and of published tables; better is further right.

    rows: [(label, kind of MARKS, entry)]; chance: a value or None; published: values, () for none; scale: of what is
    shown, 100 for percent.
    """
    height = len(rows) + bool(published)
    axis = new_axis(4.0, 0.62 + 0.21 * height)
    for y, (_, kind, entry) in enumerate(rows):
        marker, edge, face = MARKS[kind]
        if entry["ci_low"] is not None:
            axis.plot([scale * entry["ci_low"], scale * entry["ci_high"]], [y, y], color=edge, linewidth=1.4)
        axis.plot(scale * entry["value"], y, marker, markersize=6, markeredgecolor=edge, markerfacecolor=face)
    labels = [shortened(label) for label, *_ in rows]
    if published:
        axis.plot(published, np.full(len(published), len(rows)), "|", color=INK, markersize=9)
        labels.append("published")
    if chance is not None:
        axis.axvline(scale * chance, color=FAINT, linestyle=":", linewidth=1.2)
    axis.set_yticks(range(height), labels)
    axis.set_ylim(height - 0.4, -0.6)
    axis.margins(x=0.06)
    if lower_is_better:
        axis.invert_xaxis()
    axis.grid(axis="x", color=LINE, linewidth=0.6)
    axis.set_axisbelow(True)
    said = ", ".join(f"{label} {scale * entry['value']:.3g}" for label, _, entry in rows)
    return svg_of(axis, title, f"{title}: {said}")


def histogram(title, values, others, label, scale=1):
    """How many images have which value; values (N,), NaN for none; others (N,) of a control, `label`, or None."""
    shown = [scale * x[~np.isnan(x)] for x in (values, others) if x is not None]
    axis = new_axis(2.9, 1.75)
    everything = np.concatenate(shown)
    low, high = everything.min(), everything.max()
    edges = np.linspace(low, high, 21) if high > low else np.array([low - 0.5, low + 0.5])
    axis.hist(shown[0], edges, color=MAIN)
    said = f"{title}: {len(shown[0])} images, median {np.median(shown[0]):.3g}"
    if others is not None:
        axis.hist(shown[1], edges, histtype="step", color=INK, linewidth=1.1)
        said += f"; {label}: median {np.median(shown[1]):.3g}"
    axis.set_ylabel("images")
    return svg_of(axis, title, said)


def curves(title, run, unit, lines):
    """Train and validation losses of a run on one scale; unit: what is plotted; lines: {name: [(epoch, value)]}."""
    axis = new_axis(3.4, 2.4)
    for (name, points), (style, colour) in zip(lines.items(), (("-", MAIN), ("--", INK)), strict=False):
        axis.plot(*zip(*points, strict=True), style, color=colour, marker="." if len(points) < 3 else None, label=name)
    axis.set_ylim(bottom=0)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("epoch")
    axis.set_ylabel(unit)
    axis.legend(frameon=False, fontsize=8)
    ends = ", ".join(f"{name} {points[-1][1]:.3g}" for name, points in lines.items())
    return svg_of(axis, title, f"losses of {run}: in the end {ends}")


def growth(title, unit, points, floors, scale=1):
    """A metric against what a decoder was given, on a log scale.

    points: [(how much, entry)], ascending; floors: {label: entry} of sets drawn as level lines, such as a control;
    scale: of what is shown, 100 for percent.
    """
    axis = new_axis(3.2, 2.3)
    given, entries = zip(*points, strict=True)
    values = [scale * entry["value"] for entry in entries]
    spread = [[scale * abs(entry["value"] - entry[end]) for entry in entries] for end in ("ci_low", "ci_high")]
    axis.errorbar(given, values, spread, color=MAIN, marker="o", markersize=4, linewidth=1.2, capsize=2)
    for (label, entry), dashes in zip(floors.items(), (":", "--"), strict=False):
        axis.axhline(scale * entry["value"], linestyle=dashes, color=FAINT, linewidth=1.2, label=shortened(label))
    axis.set_xscale("log")
    axis.set_xticks(given, [f"{x:g}" for x in given])
    axis.minorticks_off()
    axis.set_xlabel(unit)
    if floors:
        axis.legend(frameon=False, fontsize=7)
    said = ", ".join(f"{x:g}: {value:.3g}" for x, value in zip(given, values, strict=True))
    return svg_of(axis, title, f"{title} against {unit}: {said}")


def shortened(label):
    """A set's label as it fits beside an axis; which sets are controls, their marks say."""
    label = re.sub("^(control|ceiling): ", "", label)
    return label if len(label) <= LONGEST else label[:LONGEST - 1] + "…"


def svg_of(axis, title, says):
    """An axis as inline SVG under its title; says: what a screen reader reads instead. Returns Markup."""
    from matplotlib import rc_context

    axis.set_title(title, fontsize=10, loc="left", color=INK)
    axis.tick_params(colors=FAINT, labelsize=8, labelcolor=INK, length=3)
    for text in (axis.xaxis.label, axis.yaxis.label, *(axis.legend_.get_texts() if axis.legend_ else ())):
        text.set(color=INK, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    for spine in axis.spines.values():
        spine.set_color(LINE)
    axis.patch.set_alpha(0)
    axis.figure.patch.set_alpha(0)
    for text in axis.figure.findobj(lambda part: hasattr(part, "set_parse_math")):
        text.set_parse_math(False)  # a label may have dollars
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        axis.figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg[svg.index("<svg"):])  # every figure has the same ones
    for stand_in, colour in PAGE_COLOURS.items():
        svg = svg.replace(stand_in, colour)
    return Markup('<figure class="plot" role="img" aria-label="{}">{}</figure>').format(escape(says), Markup(svg))
