"""The report: one folder with an index.html that opens anywhere, of what evaluate.py found.

Pictures first, then one number beside its chance, controls and ceiling, then everything else. Relative links only, no
server, nothing from elsewhere: the page can be moved, mailed and printed. What it looks like is in page/report.*.
"""

import datetime
import json
import shutil

import numpy as np

import utils
from disk.files import atomic_path, load_json
from disk.names import runs_of, scores_name
from evaluation import figures
from evaluation.brain_maps import maps_of
from evaluation.controls import DRAWN, PLAIN
from evaluation.curves import SHOWN
from evaluation.gallery import save_copies
from evaluation.metrics import LOWER_IS_BETTER, chance_of, is_rate, written
from evaluation.pages import portable, render
from evaluation.picture_sets import SEEN
from evaluation.published import AGREES_WITH_PEOPLE, NSD_IMAGES, PUBLISHED, PUBLISHED_BRAIN
from evaluation.published import METRICS as PROTOCOL
from nsd.captions import load_captions
from nsd.rows import open_betas
from sampling.folders import features_in, name_of
from training.bottleneck import numbers_left
from training.tracking import load_rows

MEAN, NEAREST, VAE = PLAIN  # labels of what no decoder draws
IN_STRIP = 10  # images
CAN_WAIT = (": drawn otherwise than ", "no longer compared")  # remarks that are not about these pictures
TITLES = {
    "pixcorr": "PixCorr", "ssim": "SSIM", "alexnet2_two_way": "Alex(2)", "alexnet5_two_way": "Alex(5)",
    "inception_two_way": "Incep", "clip_two_way": "CLIP", "effnet_distance": "Eff-B", "swav_distance": "SwAV",
    "clip_two_way_same_cluster": "CLIP, same cluster", "clip_two_way_gt_to_rec": "CLIP, seen to reconstructed",
    "clip_median_rank": "CLIP rank", "clip_top1": "CLIP top-1", "clip_top5": "CLIP top-5",
    "clip_similarity": "CLIP similarity",
}
# The one number, the first of these that was measured. CLIP's two-way rate: everyone publishes it, it asks for what is
# in a picture and not for its pixels (which blur pleases), and its chance is 50 % for any number of images. Where it is
# nearly all right it tells good from better no more: then how often the seen image comes first among all.
HEADLINES = ("clip_two_way", "alexnet5_two_way", "inception_two_way", "alexnet2_two_way", "pixcorr", "ssim")
SATURATED = 0.98
SCORES = ("clip_similarity", "clip_two_way", "pixcorr", "ssim")  # what images are ordered by, the first measured
ON_CARDS = ("clip_similarity", "clip_median_rank", "pixcorr", "ssim")
LOSSES = {"loss_mse": "squared error / variance", "loss_prior": "squared error of the prior",
          "loss_l1": "mean absolute error", "loss": "what is minimised"}  # the first that a run has: what judges it
SIGNALS = {"c": "c (what is in the picture)", "z": "z (where things are)", "g": "g (what they look like)"}
SPLITS = {"new_test": "test images that no training saw", "test": "test images (MindEye1's) that no training saw",
          "val": "validation images"}


def write(folder, findings, config, paths):
    """Write the report of an evaluation's Findings into `folder`; config: what metrics_config.json holds."""
    drawn = findings.images.config or {}
    kinds = {label: kind_of(label, findings) for label in findings.measured}
    columns = columns_of(findings, kinds)
    files = save_copies(folder, [(findings.sets[column["set"]], column["sample"], column["large"])
                                 for column in columns])
    for column, names in zip(columns, files, strict=True):
        column["files"] = names
    score = next(metric for metric in (*SCORES, *findings.per_image) if metric in findings.per_image)
    unlike = [remark for remark in findings.remarks if any(words in remark for words in CAN_WAIT)]
    page = render(
        "report", paths, folder=name_of(findings.images.folder),
        # the first screen
        title=title_of_page(findings, drawn), lead=lead_of(findings, drawn),
        facts=facts_of(findings, config, drawn, paths), strip=strip_of(findings, columns, score),
        score=title_of(score), headline=headline_of(findings, kinds), ratings=ratings_of(findings),
        remarks=[remark for remark in findings.remarks if remark not in unlike],
        # results and the gallery
        panels=panels_of(findings, kinds), comparable=comparable(findings.n_stimuli),
        sorts=[(metric, title_of(metric)) for metric in dict.fromkeys((score, *findings.per_image))],
        data=data_of(findings, columns, paths),
        # what is read by some
        tables=tables_of(findings), published=published_table(findings, drawn), unlike=unlike,
        missing=missing_of(findings), note=findings.note, brain=brain_of(findings, kinds),
        maps=maps_in(folder, drawn, paths),
        histograms=histograms_of(findings, kinds), decoded=decoded_table(findings),
        growth=growth_of(findings, kinds),
        training=training_of(drawn, paths), blocks=settings_of(config, drawn, paths))
    with atomic_path(folder / "index.html") as temporary:
        temporary.write_text(page)


# --- words -------------------------------------------------------------------------------------------------------


def on_nsd(findings):
    """Whether these are images of NSD, so that published results may stand beside them."""
    return findings.n_stimuli == NSD_IMAGES


def title_of(metric):
    return TITLES.get(metric, metric.replace("brain_correlation_", "brain r, ").replace("_", " "))


def titled(metric):
    """The metric over a figure: its unit, its direction, and how far it agrees with people."""
    people = AGREES_WITH_PEOPLE.get(metric)
    return (title_of(metric) + " (%)" * is_rate(metric) + " (lower is better)" * (metric in LOWER_IS_BETTER)
            + " (1: as the seen image)" * (metric == "sharpness") + (f" · people: r {people:.2f}" if people else ""))


def number(value, metric):
    """A value of a metric as it is read: rates in percent."""
    if is_rate(metric):
        return f"{100 * value:.1f} %"
    return f"{value:.1f}" if "rank" in metric else f"{value:.3f}"


def subject_of(drawn):
    """Whose brain, in words."""
    return f"subject {int(drawn['subj'].removeprefix('subj'))}" if "subj" in drawn else "a subject"


def title_of_page(findings, drawn):
    if findings.label == SEEN:
        return "The seen pictures, measured against themselves"
    if drawn.get("run") == "ground_truth":
        return "Pictures drawn from true features: the ceiling"
    if k := numbers_left(drawn.get("control")):
        return f"What {subject_of(drawn)} saw, from {k} number{'s' * (k > 1)} of each response"
    if drawn.get("control"):
        return f"Null control ({drawn['control']}): pictures that owe the brain nothing"
    return f"What {subject_of(drawn)} saw, reconstructed from its brain responses"


def lead_of(findings, drawn):
    """What was done, in two sentences."""
    if findings.label == SEEN:
        return "Every metric's best value on these images: nothing was reconstructed."
    n = len(findings.images.image_ids)
    what = f"{n:,} {SPLITS.get(drawn.get('test_split'), 'images')}"
    if not drawn:
        return f"Reconstructions of {what}, compared with what was seen. How they were drawn is not recorded."
    decoded = {feat.partition("_")[0] for feat in features_in(drawn)}
    signals = [SIGNALS[signal] for signal in ("c", "z", "g") if signal in decoded]
    signals = " and ".join(filter(None, (", ".join(signals[:-1]), signals[-1])))
    if drawn.get("run") == "ground_truth":
        source = f"From the true {signals} of each"
    else:
        whose = {"shuffle": "responses to other pictures", "noise": "noise in place of responses",
                 "mean": "the mean response"}.get(drawn.get("control"), f"{subject_of(drawn)}'s responses")
        source = f"From {whose}, decoders predicted {signals} of each"
    guided = " The measured response guided the drawing, too." if drawn.get("use_gnet") else ""
    return f"{what}. {source}; a diffusion model drew the pictures from that alone.{guided}"


def facts_of(findings, config, drawn, paths):
    """What a reader asks first: [(name, text)]."""
    n_samples = findings.n_samples
    facts = {"Subject": subject_of(drawn).removeprefix("subject ") if "subj" in drawn else None,
             "Images": f"{len(findings.images.image_ids):,}, {n_samples} picture{'s' * (n_samples > 1)} of each",
             "Decoders": decoders_of(drawn),
             "Responses": {"mean": "mean of an image's repeats", "single": "one look at each image"}.get(
                 drawn.get("repeats")),
             "Voxels": n_voxels(drawn, paths),
             "Guidance": guidance_of(drawn),
             "Data": data_in(paths, findings.n_stimuli),
             "Evaluated": datetime.date.today().isoformat(),
             "Commit": commits_of(config, drawn)}
    return [(name, fact) for name, fact in facts.items() if fact is not None]


def decoders_of(drawn):
    """How the decoders were trained; None where it is not known."""
    if not {"run", "num_sessions"} <= drawn.keys():
        return None
    stage = drawn["run"].partition(":")[0]
    how = {"finetune": "pretrained on others, fine-tuned on", "scratch": "trained on",
           "synthetic": "trained on responses simulated from", "ridge": "a ridge of"}
    return f"{how.get(stage, stage + ',')} {drawn['num_sessions']} sessions"


def data_in(paths, n_stimuli):
    """What the data are: NSD, or what about.json in the root says of them ({"data": ...})."""
    if n_stimuli == NSD_IMAGES:
        return "NSD"
    about = paths.root / "about.json"
    what = load_json(about).get("data") if about.exists() else None
    return f"not NSD: {what or 'a set'} ({n_stimuli:,} images)"


def n_voxels(drawn, paths):
    """How many voxels were decoded from; None where the responses are not there."""
    try:
        return f"{open_betas(paths, drawn['subj']).shape[1]:,}" if "subj" in drawn else None
    except utils.UserError:
        return None


def guidance_of(drawn):
    """The rule and the strength; None where it is not known."""
    if "guidance_rule" not in drawn:
        return "none" if drawn else None
    return "{} rule, strength {:g}, in the first {:.0%} of the steps".format(
        drawn["guidance_rule"], drawn.get("guidance_scale") or 0, drawn.get("guidance_strength") or 0)


def commits_of(config, drawn):
    """Of the code that drew and of the code that measured."""
    drew, measured = (str(commit)[:8] if commit else None for commit in (drawn.get("commit"), config["git_commit"]))
    return measured if drew in (None, measured) else f"{drew} drew, {measured} measured"


# --- pictures ----------------------------------------------------------------------------------------------------


def kind_of(label, findings):
    """What a set is to its reader: 'main', 'compared', 'control' or 'ceiling', by its label or by how it was drawn."""
    config = findings.sets[label].config or {}
    if label == findings.label:
        return "main"
    if label.startswith("control:") or (config.get("control") and not numbers_left(config["control"])):
        return "control"
    return "ceiling" if label.startswith("ceiling:") or config.get("run") == "ground_truth" else "compared"


def columns_of(findings, kinds):
    """What the gallery shows of every image: the seen one, all samples of the reconstructions, the first of others."""
    columns = []
    for label, pictures in findings.sets.items():
        for k in range(pictures.n_samples if label == findings.label else 1):
            kind = "seen" if label == SEEN else kinds[label]
            columns.append({"label": f"sample {k + 1}" if k else label, "set": label, "sample": k, "kind": kind,
                            "shows": None if pictures.shows is None else pictures.shows.tolist(),
                            "large": k == 0 and kind in ("seen", "main"),
                            "on": label not in (MEAN, VAE)})
    return columns


def strip_of(findings, columns, score):
    """Images from the best to the worst at even ranks, none picked: [{"id", "files": (seen, reconstructed)}]."""
    values = np.nan_to_num(findings.per_image[score], nan=-np.inf) * (-1 if score in LOWER_IS_BETTER else 1)
    order = np.argsort(-values, kind="stable")
    large = [column["files"] for column in columns if column["large"]]
    chosen = order[utils.evenly(len(order), IN_STRIP)]
    return [{"id": findings.images.image_ids[i], "files": [files[i] for files in large]} for i in chosen]


def data_of(findings, columns, paths):
    """What report.js shows: pictures, captions, kinds of scene and every value of every image."""
    ids = findings.images.image_ids
    return {
        "ids": ids.tolist(), "columns": columns, "captions": captions_of(ids, paths),
        "kinds": None if findings.kinds is None else findings.kinds.tolist(),
        "values": {label: {metric: [None if np.isnan(value) else float(f"{value:.4g}") for value in values]
                           for metric, values in measured.per_image.items()}
                   for label, measured in findings.measured.items()},
        "titles": {metric: title_of(metric) for metric in findings.per_image}, "lower_is_better": LOWER_IS_BETTER,
        "on_cards": [metric for metric in ON_CARDS if metric in findings.per_image]}


def captions_of(ids, paths):
    """The captions of images, a list for each; None where this world has none."""
    try:
        captions = load_captions(paths)
    except utils.UserError:
        return None
    return [captions[image_id] for image_id in ids] if max(ids) < len(captions) else None  # of NSD-synthetic: none


# --- the one number ----------------------------------------------------------------------------------------------


def headline_of(findings, kinds):
    """The one number, and as bars what it must be seen beside; None where nothing was measured."""
    found, n = findings.results, len(findings.images.image_ids)
    metric = next((name for name in HEADLINES if found.get(name, {}).get("n")), None)
    if metric is None:
        return None
    first = found.get("clip_top1", {}).get("value")
    if metric == "clip_two_way" and first is not None and first < SATURATED < found[metric]["value"]:
        metric = "clip_top1"
    entry, chance = found[metric], chance_of(metric, n)
    bars = [bar(findings.label, "main", "", entry["value"], metric)]
    for label in beside(kinds):
        if other := findings.measured[label].results.get(metric):
            bars.append(bar(label, kinds[label], words_of(label, findings), other["value"], metric))
    if chance is not None:
        bars.append(bar("chance", "chance", "guessing", chance, metric))
    if on_nsd(findings) and metric in PROTOCOL:
        values = {row.method: row.values[PROTOCOL.index(metric)] for row in PUBLISHED}
        best = max(values, key=values.get)
        bars.insert(1, bar(best, "published", "best published, mean of 4 subjects",
                           values[best] / (100 if is_rate(metric) else 1), metric))
    others = [f"{number(found[name]['value'], name)} ({number(found[name]['ci_low'], name)} to "
              f"{number(found[name]['ci_high'], name)}) {words}, chance {number(chance_of(name, n), name)}"
              for name, words in (("clip_two_way", "when it is two-way, as in every published table, which flatters"),
                                  ("clip_two_way_same_cluster", "two-way among pictures of the same kind of scene"),
                                  ("clip_top1", f"first among all {n:,}"))
              if found.get(name, {}).get("n") and metric in ("clip_two_way", "clip_top1") and name != metric]
    return {"value": number(entry["value"], metric), "title": title_of(metric), "n": f"{n:,}",
            "kind": "two_way" if "two_way" in metric else "first" if metric == "clip_top1" else "similarity",
            "low": number(entry["ci_low"], metric), "high": number(entry["ci_high"], metric),
            "bars": bars, "others": others,
            "no_control": findings.label != SEEN and "control" not in kinds.values()}


def beside(kinds):
    """Labels of the sets that the one number needs beside it: the ceiling, retrieval, a control that was drawn."""
    ceilings, controls = ([label for label in kinds if kinds[label] == kind] for kind in ("ceiling", "control"))
    ceilings.sort(key=lambda label: label == VAE)  # the decoder's own ceiling first
    retrieved = [label for label in controls if label == NEAREST]
    others = sorted((label for label in controls if label != NEAREST), key=lambda label: label == MEAN)
    return [*ceilings[:1], *retrieved, *others[:1]]


def words_of(label, findings):
    """What a control or a ceiling is, in a few words."""
    config = (findings.sets[label].config or {}) | DRAWN.get(label, {})
    if config.get("run") == "ground_truth":
        return "ceiling: drawn from the true features"
    drawn_from = {"shuffle": "responses to other pictures", "noise": "noise", "mean": "the mean response"}
    return {MEAN: "control: no brain at all", NEAREST: "control: looked up, not drawn",
            VAE: "ceiling: what the VAE alone loses"}.get(
        label, f"control: drawn from {drawn_from.get(config.get('control'), 'no right response')}")


def bar(label, kind, says, value, metric):
    """A line beside the one number; says: what it is."""
    return {"label": label.removeprefix("control: ").removeprefix("ceiling: "), "kind": kind, "says": says,
            "text": number(value, metric), "percent": round(100 * float(np.clip(value, 0, 1)), 1)}


def ratings_of(findings):
    """What people chose, a sentence for each set."""
    return [{"label": label, "share": f"{100 * found['value']:.1f} %",
             "interval": f"{100 * found['ci_low']:.1f} to {100 * found['ci_high']:.1f} %", **found}
            for label, found in findings.ratings.items()]


# --- figures and tables ------------------------------------------------------------------------------------------


def panels_of(findings, kinds):
    """A figure for each of the protocol's metrics and two more: all sets, chance, published values."""
    metrics = [metric for metric in (*PROTOCOL, "clip_two_way_same_cluster", "sharpness")
               if metric in findings.per_image]
    return [panel(findings, kinds, metric, [row.values[PROTOCOL.index(metric)] for row in PUBLISHED]
                  if metric in PROTOCOL and on_nsd(findings) else ()) for metric in metrics]


def panel(findings, kinds, metric, published):
    """One metric of all sets as a figure; published: as in the tables."""
    order = sorted(kinds, key=lambda label: ("main", "compared", "ceiling", "control").index(kinds[label]))
    rows = [(label, kinds[label], findings.measured[label].results[metric]) for label in order
            if findings.measured[label].results.get(metric, {}).get("n")]
    lower = metric in LOWER_IS_BETTER
    return figures.comparison(titled(metric), rows, chance_of(metric, len(findings.images.image_ids)), published, lower,
                              100 if is_rate(metric) else 1)


def table(title, rows, metrics, first, main=None, note=""):
    """What the template's table shows; rows: {label: {metric: entry}}, main: the label of the row that stands out."""
    columns = [title_of(metric) + " %" * is_rate(metric) + " ↓" * (metric in LOWER_IS_BETTER) for metric in metrics]
    body = [{"label": label, "main": label == main,
             "cells": [cell(entries.get(metric), is_rate(metric)) for metric in metrics]}
            for label, entries in rows.items()]
    return {"title": title, "first": first, "columns": columns, "rows": body, "note": note}


def cell(entry, percent):
    """A value with its interval, as text; None where there is none."""
    if entry is None or not entry.get("n"):
        return None
    scale, digits = (100, 1) if percent else (1, 3)
    text, *ends = (None if value is None else written(scale * value, digits)
                   for value in (entry["value"], entry["ci_low"], entry.get("ci_high")))
    return {"value": f"{entry['value']:.6g}", "text": text,
            "interval": None if ends[0] is None else " … ".join(ends)}


def tables_of(findings):
    """Tables of what was found."""
    main, found, per_image = findings.label, findings.results, findings.per_image
    here = [metric for metric in PROTOCOL if metric in per_image]
    beyond = [metric for metric in per_image if metric not in PROTOCOL and not metric.startswith("brain_correlation")]
    whole = [metric for metric in found if found[metric]["n"] and metric not in per_image]
    rows = {label: measured.results for label, measured in findings.measured.items()}
    tables = [table("The protocol's metrics", rows, here, "set", main)]
    for part, sets in findings.parts.items():
        n = next(iter(sets[main].values()))["n"]
        tables.append(table(f"Of {n} images alone: {part}", sets, here, "set", main,
                            "Two-way rates compare with all images."))
    if beyond:
        tables.append(table("Beyond the protocol", rows, beyond, "set", main))
    if whole:
        of = ", ".join(dict.fromkeys(found[metric]["of"] for metric in whole if "of" in found[metric]))
        galleries = [f"{title_of(metric)} among {found[metric]['gallery']}" for metric in whole
                     if "gallery" in found[metric]]
        note = f"Measured on the decoded features, {of}, drawn or not; " + "; ".join(galleries) + "." if of else ""
        tables.append(table("Retrieval and features", {main: found}, whole, "set", main, note))
    if findings.differences:
        tables.append(table("Reconstructions minus the other sets, images paired", findings.differences, here + beyond,
                            "minus"))
    return tables


def missing_of(findings):
    """What was not measured: {why: [what]}."""
    missing = {metric: entry["missing"] for metric, entry in findings.results.items() if "missing" in entry}
    reasons = {}
    for what, why in (missing | findings.absent).items():
        reasons.setdefault(why, []).append(title_of(what))
    return reasons


def published_table(findings, drawn):
    """Published rows, and above them these reconstructions, marked as what they are."""
    rows = {row.method: {metric: {"value": value / 100 if is_rate(metric) else value, "n": 1, "ci_low": None}
                         for metric, value in zip(PROTOCOL, row.values, strict=True)} for row in PUBLISHED}
    ours = f"these, {subject_of(drawn)} alone" if on_nsd(findings) else "these (NOT COMPARABLE)"
    return table("Published on NSD", {ours: findings.results, **rows}, PROTOCOL, "method", ours)


def comparable(n):
    """Whether results on a world of n images may be compared with published ones; ("", caveat) or (no, why)."""
    if n == NSD_IMAGES:
        return ("", "MindEye2 scores 1,000 images of the new split; tables made with another scikit-image, another "
                    "antialiasing or other weights differ.")
    return ("Not comparable with the results above", f": those are of a world of {n:,} images, not of NSD's "
            f"{NSD_IMAGES:,}.")


def brain_of(findings, kinds):
    """Correlation with the measured response by region: figures and their table; None where it was not measured."""
    rois = [metric for metric in findings.per_image if metric.startswith("brain_correlation_")]
    if not rois:
        return None
    published = {roi: PUBLISHED_BRAIN.get(roi.removeprefix("brain_correlation_")) for roi in rois}
    rows = {label: measured.results for label, measured in findings.measured.items() if rois[0] in measured.results}
    return {"panels": [panel(findings, kinds, roi, [published[roi]] if published[roi] and on_nsd(findings)
                             else ()) for roi in rois],
            "table": table("Brain correlation by region", rows, rois, "set", findings.label)}


def maps_in(folder, drawn, paths):
    """What map_brain.py found of the subject: copies of its pictures and its table of regions; None for nothing."""
    pictures, lines, made_by = maps_of(paths, drawn["subj"]) if "subj" in drawn else ({}, [], {})
    if not lines:
        return None
    files = {}
    for name, file in pictures.items():
        with atomic_path(folder / "maps" / file.name) as temporary:
            shutil.copyfile(file, temporary)
        files[name.replace("_", " ")] = f"maps/{file.name}"
    maps = [name for name in dict.fromkeys(line.map for line in lines) if not name.startswith("reads")]
    cells = {(line.region, line.map): cell({"value": line.value, "n": 1, "ci_low": line.low, "ci_high": line.high},
                                           False) for line in lines}
    rows = [{"label": f"{region} ({voxels:,} voxels)", "main": False,
             "cells": [cells.get((region, name)) for name in maps]}
            for region, voxels in dict.fromkeys((line.region, line.voxels) for line in lines)]
    note = ("Encoding r, noise ceiling: of GNet, mean over voxels. Costs: share of a feature's variance that is lost "
            "on validation images without the region; only: what it explains alone. 95 % intervals over images.")
    return {"pictures": files, "table": {"title": "Region by region", "first": "region", "rows": rows, "note": note,
                                         "columns": [name.replace("_", " ") for name in maps]}}


def histograms_of(findings, kinds):
    """A histogram for each metric, with that of the first control that has it."""
    plots = []
    for metric, values in findings.per_image.items():
        if np.isnan(values).all():
            continue
        control = next((label for label, kind in kinds.items()
                        if kind == "control" and metric in findings.measured[label].per_image), None)
        others = None if control is None else findings.measured[control].per_image[metric]
        plots.append(figures.histogram(title_of(metric) + " (%)" * is_rate(metric), values, others, control,
                                       100 if is_rate(metric) else 1))
    return plots


# --- where it came from --------------------------------------------------------------------------------------------


def scores_behind(drawn, paths):
    """{feature: config.json of its scores}, of those behind the pictures that are there."""
    found = {}
    if {"run", "subj", "head", "control", "test_split", "repeats"} <= drawn.keys():
        for feat in features_in(drawn):
            file = paths.scores(drawn["subj"], scores_name(drawn, feat), feat) / "config.json"
            if file.exists():
                found[feat] = load_json(file)
    return found


def decoded_table(findings):
    """Share of each feature's variance that was decoded, beside a ridge's; None where it is not recorded."""
    found = findings.explained
    steps = [step for step in ("ridge", "network", "scored") if any(step in r2 for r2 in found.values())]
    if not steps:
        return None
    rows = {f"{step}, validation images": {feat: {"value": r2[step], "n": 1, "ci_low": None}
                                           for feat, r2 in found.items() if step in r2} for step in steps}
    rows["as drawn from, test images"] = {feat: findings.results[f"r2_{feat}"] for feat in found
                                          if f"r2_{feat}" in findings.results}
    note = ("1: all of it, 0: no better than the mean. Scored: the network, averaged with the ridge where there is "
            "one. z is then brought back to its spread, for the start of the drawing, which lowers its share.")
    return {"title": "Variance explained of the features", "first": "decoder", "columns": list(found), "note": note,
            "rows": [{"label": label, "main": label.startswith("scored"),
                      "cells": [cell(entries.get(feat), False) for feat in found]} for label, entries in rows.items()]}


def growth_of(findings, kinds):
    """[(title, figures)] of sets that grow with what their decoder was given: findings.curves."""
    floors = {}
    for kind in ("control", "ceiling"):
        label = next((label for label in beside(kinds) if kinds[label] == kind and label != NEAREST), None)
        if label is not None:
            floors[label] = findings.measured[label].results
    return [(curve.title, [
        figures.growth(titled(metric), curve.title.lower(),
                       [(given, findings.measured[label].results[metric]) for label, given in curve.given.items()],
                       {label: found[metric] for label, found in floors.items() if found.get(metric, {}).get("n")},
                       100 if is_rate(metric) else 1)
        for metric in SHOWN if findings.results.get(metric, {}).get("n")]) for curve in findings.curves]


def training_of(drawn, paths):
    """Curves of the runs behind the pictures, where their metrics.jsonl are there."""
    if not {"run", "subj", "hidden_dim", "num_sessions", "tag"} <= drawn.keys():
        return []
    runs = {name: title for feat in features_in(drawn)  # all layers of g may be one run
            for name, title in zip(runs_of(drawn, feat), (feat.partition("_")[0], feat), strict=False)}
    files = {name: paths.run(name) / "metrics.jsonl" for name in runs}
    plots = [curve(runs[name], name, list(load_rows(file))) for name, file in files.items() if file.exists()]
    return [plot for plot in plots if plot is not None]


def curve(title, name, rows):
    """The loss that judges a run, in training and validation; rows: of its metrics.jsonl. None where it has none."""
    for loss, unit in LOSSES.items():
        lines = {said: [(row["step"], row[f"{part}/{loss}"]) for row in rows if f"{part}/{loss}" in row]
                 for part, said in (("train", "training"), ("val", "validation"))}
        if all(lines.values()):
            return figures.curves(title, name, unit, lines)
    return None


def settings_of(config, drawn, paths):
    """Everything that led here, as JSON: of this evaluation, of the drawing, of the scores with their checkpoints."""
    blocks = {"of this evaluation": config, "of the reconstructions, with hashes of the scores": drawn}
    blocks |= {f"of the scores of {feat}, with the checkpoint's hash": block
               for feat, block in scores_behind(drawn, paths).items()}
    return {title: json.dumps(portable(block, paths), indent=1, ensure_ascii=False, default=str)
            for title, block in blocks.items()}


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
