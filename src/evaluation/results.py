"""The results of an evaluation as files and as text."""

import shlex

import numpy as np

from disk.files import atomic_path, load_json, save_json, save_together, write_csv, write_json
from evaluation.metrics import LOWER_IS_BETTER, written
from evaluation.report import PROTOCOL, latex_row, title_of
from utils import UserError


def check_writable(folder):
    """Refuse a folder that cannot be written to before the work, not after it."""
    try:
        with atomic_path(folder / "writable") as temporary:
            temporary.touch()
        (folder / "writable").unlink()
    except UserError as error:
        raise UserError(f"{folder}: cannot be written to ({error.__cause__.strerror}); choose another --outdir"
                              ) from None


def no_longer_compared(outdir, labels):
    """Say which sets the report of an earlier evaluation compares and this one, of `labels`, will not, and how to keep
    them; None for none."""
    file = outdir / "compared.json"
    dropped = {label: found.get("folder", "DIR") for label, found in (load_json(file) if file.exists() else {}).items()
               if label not in labels and not label.startswith(("control:", "ceiling:", "bottleneck:", "lesion:"))}
    if not dropped:
        return None
    flags = " ".join(shlex.quote(f"{label}={folder}") for label, folder in dropped.items())
    return f"no longer compared, unlike in the report before: {', '.join(dropped)}; keep with --compare {flags}"


def write_results(outdir, findings, config, sheet, folders):
    """The files beside the images, all or none; config: what metrics_config.json holds, sheet: a PIL image; folders:
    {label: where it lies} of sets that were drawn."""
    rows = [{"image_id": image_id, **{name: float(values[i]) for name, values in findings.per_image.items()}}
            for i, image_id in enumerate(findings.images.image_ids)]
    compared = {label: {"results": findings.measured[label].results, "difference": found}
                | ({"folder": folders[label]} if label in folders else {})
                | ({"ratings": findings.ratings[label]} if label in findings.ratings else {})
                for label, found in findings.differences.items()}
    line = latex_row(config["options"]["method"], findings.results)
    save_together({
        outdir / "metrics.json": write_json(findings.results),
        outdir / "metrics_config.json": write_json(config),
        outdir / "metrics.tex": lambda path: path.write_text(line),
        outdir / "compared.json": write_json(compared),
        **({outdir / "parts.json": write_json(findings.parts)} if findings.parts else {}),
        outdir / "metrics.csv": write_csv(table_of(findings.measured)),
        outdir / "metrics_per_image.csv": write_csv(rows),
        outdir / "contact_sheet.png": lambda path: sheet.save(path, format="PNG", compress_level=3)})


def table_of(measured):
    """Every value of every set as a row."""
    kept = ("value", "ci_low", "ci_high", "n", "missing")
    return [{"set": label, "metric": name, **{key: entry.get(key) for key in kept}}
            for label, found in measured.items() for name, entry in found.results.items()]


def write_subjects(file, found):
    """Write and print a table with a column per subject and their mean; found: {subject: {metric: entry}}."""
    names = [name for name in next(iter(found.values())) if all(name in results for results in found.values())]
    names = [name for name in names if all(results[name]["n"] for results in found.values())]
    mean = {name: float(np.mean([results[name]["value"] for results in found.values()])) for name in names}
    save_json(file, {"subjects": found, "mean": mean})
    width = max(map(len, names))
    print(f"\n{'metric':<{width}}" + "".join(f"{subj:>9}" for subj in found) + f"{'mean':>9}")
    for name in names:
        print(f"{name:<{width}}" + "".join(f"{written(results[name]['value']):>9}" for results in found.values())
              + f"{written(mean[name]):>9}")
    print(f"subjects       {file}")


def format_findings(findings):
    """All that was found, as text for the terminal."""
    blocks = [format_table(findings.results)]
    if len(findings.measured) > 1:
        blocks.append(f"\n{format_sets(findings.measured)}\n")
    blocks += [format_parts(findings.parts), format_explained(findings.results, findings.explained)]
    if findings.note:
        blocks.append(f"brain_correlation: {findings.note}")
    blocks.append(format_absent(findings.absent))
    for label, entry in findings.ratings.items():
        blocks.append(f"rated nearer than {label}: {written(entry['value'])} ({written(entry['ci_low'])} .. "
                      f"{written(entry['ci_high'])}) of {entry['trials']} choices, {entry['n']} images; chance 0.5")
    return "\n".join(block.removesuffix("\n") for block in (*blocks, *findings.remarks) if block)


def format_table(results):
    """The metrics as aligned text, and a line for each reason why some are missing."""
    width = max(map(len, results)) + 2
    lines = [f"{'metric':<{width}}{'value':>8}   {'95 % interval':<18}{'n':>6}"]
    missing = {}
    for name, entry in results.items():
        if "missing" in entry:
            missing.setdefault(entry["missing"], []).append(name)
            continue
        better = "  (lower is better)" if name in LOWER_IS_BETTER else ""
        interval = "" if entry["ci_low"] is None else f"{written(entry['ci_low'])} .. {written(entry['ci_high'])}"
        lines.append(f"{name:<{width}}{written(entry['value']):>8}   {interval:<18}{entry['n']:>6}"
                     f"{whose(entry)}{better}")
    return "\n".join(lines + [f"{', '.join(names)}: missing, {why}" for why, names in missing.items()])


def format_explained(results, explained):
    """R2 of each feature, on validation images beside a ridge's, as aligned text; '' where nothing is known.

    explained: {feature: {prediction: R2}}.
    """
    columns = [name for name in ("ridge", "network", "scored") if any(name in found for found in explained.values())]
    if not columns:
        return ""
    lines = [f"{'R2':<26}" + "".join(f"{name:>10}" for name in columns) + f"{'test':>10}"]
    for feat, found in explained.items():
        values = [found.get(name) for name in columns] + [results.get(f"r2_{feat}", {}).get("value")]
        lines.append(f"{feat:<26}" + "".join(f"{'-' if value is None else written(value):>10}" for value in values))
    lines.append("(of validation images; test: of the scored images, as the pictures were drawn from them)")
    return "\n".join(lines) + "\n"


def format_absent(absent):
    """A line for each reason why some sets were not measured, {label: why}."""
    labels = {}
    for label, why in absent.items():
        labels.setdefault(why, []).append(label)
    return "".join(f"{', '.join(names)}: not measured, {why}\n" for why, names in labels.items())


def whose(entry):
    """Say of which images a value is, and among how many they are sought, where these are not the drawn ones."""
    among = f", each among {entry['gallery']}" if "gallery" in entry else ""
    return f"  ({entry['of']}{among})" if "of" in entry else ""


def format_sets(measured):
    """The protocol's metrics, rank and sharpness of all sets that were measured {label: Measured}, as aligned text."""
    sets = {label: found.results for label, found in measured.items()}
    return aligned("set", sets, (*PROTOCOL, "clip_median_rank", "sharpness"))


def format_parts(parts):
    """The protocol's metrics of every set in every part (parts.measure_parts), as aligned text; '' without parts."""
    tables = []
    for part, sets in parts.items():
        n = next(iter(next(iter(sets.values())).values()))["n"]
        tables.append(aligned(f"{part}, {n} image{'s' * (n > 1)}", sets, PROTOCOL) + "\n\n")
    return "".join(tables)


def aligned(corner, sets, metrics):
    """A table of sets {label: {metric: entry}}, a row each, of those metrics that any of them has, as aligned text."""
    metrics = [metric for metric in metrics if any(results.get(metric, {}).get("n") for results in sets.values())]
    titles = [title_of(metric) + " (low)" * (metric in LOWER_IS_BETTER) for metric in metrics]
    width = max(map(len, (corner, *sets))) + 2
    lines = [f"{corner:<{width}}" + "".join(f"{title:>{len(title) + 3}}" for title in titles)]
    for label, results in sets.items():
        values = [results.get(metric) for metric in metrics]
        cells = [written(entry["value"]) if entry and entry["n"] else "-" for entry in values]
        lines.append(f"{label:<{width}}" + "".join(f"{cell:>{len(title) + 3}}" for cell, title in
                                                   zip(cells, titles, strict=True)))
    return "\n".join(lines)
