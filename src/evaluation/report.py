"""The report: one folder with an index.html that opens anywhere, of what evaluate.py found.

Relative links only, no server, nothing from elsewhere: the page can be moved, mailed and printed. report.css and
report.js beside this file are written into it.
"""

import io
import json
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from disk.files import atomic_path, load_json
from disk.names import run_of, scores_name
from evaluation.decoded import features_of
from evaluation.metrics import LOWER_IS_BETTER, is_rate
from sampling.folders import name_of
from training.tracking import load_rows

THUMBNAIL = 256  # pixels: larger pictures are made smaller, as JPEG
NSD_IMAGES = 73000
TITLES = {
    "pixcorr": "PixCorr", "ssim": "SSIM", "alexnet2_two_way": "Alex(2)", "alexnet5_two_way": "Alex(5)",
    "inception_two_way": "Incep", "clip_two_way": "CLIP", "effnet_distance": "Eff-B", "swav_distance": "SwAV",
    "clip_two_way_same_cluster": "CLIP, same cluster", "clip_two_way_gt_to_rec": "CLIP, seen to reconstructed",
    "clip_median_rank": "CLIP rank", "clip_top1": "CLIP top-1", "clip_top5": "CLIP top-5",
}
PROTOCOL = list(TITLES)[:8]  # the columns of published tables
# mean of subjects 1, 2, 5, 7, 40 sessions, 982 to 1000 test images; two-way in %. Sources: tables of the MindEye2 paper
# (recomputed by its authors) and the Brain-IT project page.
PUBLISHED = {
    "Takagi & Nishimoto 2023": (.246, .410, 78.9, 85.6, 83.8, 82.1, .811, .504),
    "Brain-Diffuser 2023": (.273, .365, 94.4, 96.6, 91.3, 90.9, .728, .421),
    "MindEye1 2023": (.319, .360, 92.8, 96.9, 94.6, 93.3, .648, .377),
    "DREAM 2024": (.274, .328, 93.9, 96.7, 93.4, 94.1, .645, .418),
    "UMBRAE 2024": (.283, .341, 95.5, 97.0, 91.7, 93.5, .700, .393),
    "MindBridge 2024": (.151, .263, 87.7, 95.5, 92.4, 94.7, .712, .418),
    "NeuroPictor 2024": (.229, .375, 96.5, 98.4, 94.5, 93.3, .639, .350),
    "MindEye2 2024": (.322, .431, 96.1, 98.6, 95.4, 93.0, .619, .344),
    "MindTuner 2025": (.322, .421, 95.8, 98.8, 95.6, 93.8, .612, .340),
    "Brain-IT 2026": (.386, .486, 98.4, 99.5, 97.3, 96.4, .564, .320),
}


def write(folder, findings, config, paths):
    """Write the report of an evaluation's Findings into `folder`; config: what metrics_config.json holds."""
    name, per_image = name_of(findings.images.folder), findings.per_image
    recon_config = findings.images.config or {}
    shown_sets = [label for label in findings.sets if not label.startswith(("control", "ceiling"))]
    images = write_pictures(folder, findings.sets, shown_sets)
    n = len(images)
    for i, image in enumerate(images):
        image["metrics"] = {metric: None if np.isnan(values[i]) else round(float(values[i]), 4)
                            for metric, values in per_image.items()}
        image["metrics"]["id"] = image["id"]
    shown = [metric for metric in ("clip_two_way", "pixcorr", "ssim") if metric in per_image]
    for_script = {"images": images, "shown": shown, "titles": {metric: title_of(metric) for metric in per_image},
                  "lower_is_better": LOWER_IS_BETTER}
    page = [
        f"<h1>{escape(name)}</h1>",
        f"<p class=faint>{n} images, {config['n_samples']} sample{'s' * (config['n_samples'] > 1)} of each · protocol "
        f"{escape(config['protocol'])} · commit {escape(str(config['git_commit'])[:12])}</p>",
        "<nav aria-label=Sections><a href=#results>Results</a><a href=#gallery-section>Gallery</a>"
        + "<a href=#brain>Brain</a>" * bool(config["brain_correlation"])
        + "<a href=#training>Training</a><a href=#settings>Settings</a></nav>",
        results_section(findings, config["stimuli"]),
        gallery_section(shown, per_image),
        brain_section(findings.measured, config["brain_correlation"]),
        training_section(recon_config, paths),
        settings_section(config, recon_config, paths),
    ]
    here = Path(__file__).resolve().parent
    embedded = json.dumps(for_script).replace("</", "<\\/")  # no label can end the script
    text = (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'><link rel=icon href='data:,'>"
        f"<title>{escape(name)}</title><style>{(here / 'report.css').read_text()}</style></head><body>"
        + "\n".join(page)
        + f"<script type=application/json id=report-data>{embedded}</script>"
        + f"<script>{(here / 'report.js').read_text()}</script></body></html>\n")
    with atomic_path(folder / "index.html") as temporary:
        temporary.write_text(text)


# --- pictures ----------------------------------------------------------------------------------------------------


def write_pictures(folder, sets, labels):
    """Copies of the pictures to show, small; [{"id", "pictures": [[label, file], ...]}] for each image."""
    first = sets[labels[0]]
    images = [{"id": int(image_id), "pictures": []} for image_id in first.image_ids]
    for number, label in enumerate(labels):
        for k in range(sets[label].n_samples):
            title = label if k == 0 else f"sample {k + 1}"
            for i, image in enumerate(images):
                picture = Image.fromarray(sets[label].read(i, k))
                small = max(picture.size) <= THUMBNAIL
                file = folder / "pictures" / f"{number}_{image['id']:05d}_{k}.{'png' if small else 'jpg'}"
                picture.thumbnail((THUMBNAIL, THUMBNAIL))
                with atomic_path(file) as temporary:
                    picture.save(temporary, format="PNG" if small else "JPEG", **({} if small else {"quality": 88}))
                image["pictures"].append([title, f"pictures/{file.name}"])
    return images


# --- sections ----------------------------------------------------------------------------------------------------


def title_of(metric):
    return TITLES.get(metric, metric.replace("brain_correlation_", "brain r, ").replace("_", " "))


def cell(entry, percent=False):
    if entry is None or not entry.get("n"):
        return "<td>–</td>"
    scale, digits = (100, 1) if percent else (1, 3)
    interval = ""
    if entry["ci_low"] is not None:
        interval = f"<small>{scale * entry['ci_low']:.{digits}f} … {scale * entry['ci_high']:.{digits}f}</small>"
    return f"<td data-value={entry['value']:.6g}>{scale * entry['value']:.{digits}f}{interval}</td>"


def table(rows, metrics, first="", main=None):
    """rows: {label: {metric: entry}}."""
    head = "".join(f"<th scope=col>{escape(title_of(metric))}{' %' * is_rate(metric)}"
                   f"{' ↓' * (metric in LOWER_IS_BETTER)}</th>" for metric in metrics)
    body = "".join(
        f"<tr{' class=main' if label == main else ''}><td>{escape(label)}</td>"
        + "".join(cell(entries.get(metric), is_rate(metric)) for metric in metrics) + "</tr>"
        for label, entries in rows.items())
    return (f"<div class=scroll><table class=sortable><thead><tr><th scope=col>{escape(first)}</th>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table></div>")


def results_section(findings, n_stimuli):
    """Tables of what was found, and of what others published; n_stimuli: images of the world it was found in."""
    main, found, per_image = findings.label, findings.results, findings.per_image
    here = [metric for metric in PROTOCOL if metric in per_image]
    beyond = [metric for metric in per_image if metric not in PROTOCOL and not metric.startswith("brain_correlation")]
    whole = [metric for metric in found if found[metric]["n"] and metric not in per_image]
    rows = {label: measured.results for label, measured in findings.measured.items()}
    published = {label: {metric: {"value": value / 100 if is_rate(metric) else value, "n": 1, "ci_low": None}
                         for metric, value in zip(PROTOCOL, values, strict=True)}
                 for label, values in PUBLISHED.items()}
    parts = ["<section id=results><h2>Results</h2>",
             "<p class=faint>95 % intervals: bootstrap over images; exact for rates that are 0 or 1 of every image. "
             "↓: lower is better. Two-way: chance is 50 %, and "
             "high values flatter: see the ranks. <em>Same cluster</em>: rivals are images of the same kind of scene "
             "(k-means of the seen images' CLIP features); knowing only the kind scores 50 % there.</p>",
             *(f"<p class=faint>{escape(remark)}.</p>" for remark in findings.remarks),
             table(rows, here, "set", main), "<h2>Beyond the protocol</h2>", table(rows, beyond, "set", main)]
    if whole:
        of = ", ".join(dict.fromkeys(found[metric]["of"] for metric in whole if "of" in found[metric]))
        galleries = [f"{title_of(metric)} among {found[metric]['gallery']}" for metric in whole
                     if "gallery" in found[metric]]
        note = f"Measured on the decoded features, {of}, drawn or not; " + "; ".join(galleries)
        parts += ["<h2>Retrieval and features</h2>", f"<p class=faint>{escape(note)}.</p>" if of else "",
                  table({main: found}, whole, "set", main)]
    if findings.differences:
        parts += ["<h2>Reconstructions minus the other sets, images paired</h2>",
                  table(findings.differences, here + beyond, "minus")]
    missing = {metric: entry["missing"] for metric, entry in found.items() if "missing" in entry}
    missing |= findings.absent
    if missing:
        parts += ["<h2>Not measured</h2><ul>", *(f"<li><strong>{escape(title_of(what))}</strong>: {escape(why)}</li>"
                                                 for what, why in missing.items()), "</ul>"]
    parts += ["<h2>Published on NSD</h2>",
              "<p class=faint>Mean of subjects 1, 2, 5 and 7, 40 sessions, protocol mindeye2. "
              f"{comparable(n_stimuli)}</p>",
              table(published, PROTOCOL, "method"), "</section>"]
    return "\n".join(parts)


def comparable(n):
    """Whether results on a world of n images may be compared with them."""
    if n == NSD_IMAGES:
        return ("MindEye2 scores 1,000 images of the new split; tables made with another scikit-image, another "
                "antialiasing or other weights differ.")
    return (f"<strong>Not comparable with the results above</strong>: those are of a world of {n} images, not of NSD's "
            f"{NSD_IMAGES:,}.")


def gallery_section(shown, per_image):
    choices = "".join(f"<option value={escape(metric)}>{escape(title_of(metric))}</option>"
                      for metric in (*shown, *(m for m in per_image if m not in shown)))
    tabs = "".join(f"<button type=button data-tab={name} aria-pressed={'true' if name == 'all' else 'false'}>"
                   f"{name.capitalize()}</button>" for name in ("all", "best", "worst", "random"))
    return (f"<section id=gallery-section><h2>Gallery</h2><div class=controls>{tabs}"
            f"<label>sort by <select id=sort><option value=id>id</option>{choices}</select></label>"
            "<label>ids <input id=filter inputmode=numeric placeholder='all'></label>"
            "<span class=faint id=count role=status></span></div><div id=gallery></div>"
            "<p><button type=button id=more hidden>Show more</button></p></section>")


def brain_section(measured, note):
    """Correlation with the measured response by region; note: what its reader must know, None: nothing was measured."""
    if not note:
        return ""
    from matplotlib.figure import Figure

    rois = [metric for metric in next(iter(measured.values())).per_image if metric.startswith("brain_correlation_")]
    labels = [label for label in measured if rois[0] in measured[label].results]
    figure = Figure(figsize=(max(6, 1.1 * len(rois) + 2), 3.4), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(labels)
    for i, label in enumerate(labels):
        entries = [measured[label].results[roi] for roi in rois]
        values = np.array([entry["value"] for entry in entries])
        spread = np.abs(np.array([[entry["ci_low"], entry["ci_high"]] for entry in entries]).T - values)
        axis.bar(np.arange(len(rois)) + (i - (len(labels) - 1) / 2) * width, values, width, yerr=spread, label=label,
                 error_kw={"elinewidth": 0.8, "ecolor": "#808890"})
    axis.set_xticks(range(len(rois)), [roi.removeprefix("brain_correlation_") for roi in rois])
    axis.set_ylabel("brain correlation, r")
    axis.legend(frameon=False, fontsize=7, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))  # above, off the bars
    rows = {label: measured[label].results for label in labels}
    return (f"<section id=brain><h2>Brain correlation</h2><p><strong>Not independent evidence:</strong> "
            f"{escape(note)}.</p><p class=faint>Pearson's r across a region's voxels of the "
            "response predicted for a picture with the one measured to the seen image, mean over images; not divided "
            "by a noise ceiling. MindEye2 (paper, table 3; NSD): nsdgeneral .373, V1 .364, V2 .352, V3 .342, V4 .327, "
            f"higher .368.</p><div class=plots>{svg_of(figure)}</div>{table(rows, rois, 'set', labels[0])}</section>")


def training_section(recon_config, paths):
    """Losses of the runs behind the pictures, where their metrics.jsonl are there."""
    plots = []
    if {"run", "subj", "hidden_dim", "num_sessions", "tag"} <= recon_config.keys():
        for feat in features_of(recon_config):
            name = run_of(recon_config, feat)
            file = paths.run(name) / "metrics.jsonl"
            if file.exists():
                plots.append(curve(feat, name, list(load_rows(file))))
    if not plots:
        return "<section id=training><h2>Training</h2><p class=faint>The runs have no metrics.jsonl.</p></section>"
    return f"<section id=training><h2>Training</h2><div class=plots>{''.join(plots)}</div></section>"


def curve(feat, name, rows):
    """Losses of one run; rows: those of its metrics.jsonl."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4, 2.4), layout="constrained")
    axis = figure.subplots()
    for key, style in (("train/loss", "-"), ("val/loss", "--")):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axis.plot(*zip(*points, strict=True), style, marker="." if len(points) < 3 else None,
                      label=key.split("/")[0])
    axis.set_title(feat, fontsize=9)
    axis.set_xlabel("epoch", fontsize=8)
    axis.legend(frameon=False, fontsize=7)
    return f"<figure><div role=img aria-label='losses of {escape(name)}'>{svg_of(figure)}</div></figure>"


def svg_of(figure):
    """A figure as inline SVG that is legible on light and on dark."""
    figure.patch.set_alpha(0)
    for axis in figure.axes:
        axis.patch.set_alpha(0)
        axis.spines[["top", "right"]].set_visible(False)
        for spine in axis.spines.values():
            spine.set_color("#808890")
        axis.tick_params(colors="#808890", labelsize=8)
        legend = axis.legend_.get_texts() if axis.legend_ else ()
        for text in (axis.title, axis.xaxis.label, axis.yaxis.label, *legend):
            text.set_color("#808890")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg"):]


def settings_section(config, recon_config, paths):
    """Everything that led here: settings of this evaluation, of the drawing, of the scores with their checkpoints."""
    blocks = {"of this evaluation": config, "of the reconstructions, with hashes of the scores": recon_config}
    if {"run", "subj", "head", "control", "test_split", "repeats"} <= recon_config.keys():
        for feat in recon_config.get("score_hashes", {}):
            if feat in ("c", "z") or feat.startswith("g_"):
                file = paths.scores(recon_config["subj"], scores_name(recon_config, feat), feat) / "config.json"
                if file.exists():
                    blocks[f"of the scores of {feat}, with the checkpoint's hash"] = load_json(file)
    return "<section id=settings><h2>Settings</h2>" + "".join(
        f"<details><summary>{title}</summary><pre>{escape(json.dumps(block, indent=1, default=str))}</pre></details>"
        for title, block in blocks.items()) + "</section>"


# --- for a paper -------------------------------------------------------------------------------------------------


def latex_row(method, results):
    """The protocol's metrics as a line of a LaTeX table: PixCorr & SSIM & Alex(2) & ... (-- where missing)."""
    cells = []
    for metric in PROTOCOL:
        entry = results.get(metric)
        if entry is None or not entry["n"]:
            cells.append("--")
        elif is_rate(metric):
            cells.append(f"{100 * entry['value']:.1f}\\%")
        else:
            cells.append(f"{entry['value']:.3f}".replace("0.", ".", 1))
    header = "% " + " & ".join(TITLES[metric] for metric in PROTOCOL)
    return header + "\n" + method.replace("_", r"\_") + " & " + " & ".join(cells) + " \\\\\n"
