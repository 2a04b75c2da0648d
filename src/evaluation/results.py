"""The results of an evaluation as files and as text."""

import numpy as np

from disk.files import atomic_path, save_json, save_together, write_csv, write_json
from evaluation.metrics import LOWER_IS_BETTER
from evaluation.report import latex_row
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


def write_results(outdir, findings, config, sheet):
    """The files beside the images, all or none; config: what metrics_config.json holds, sheet: a PIL image."""
    rows = [{"image_id": image_id, **{name: float(values[i]) for name, values in findings.per_image.items()}}
            for i, image_id in enumerate(findings.images.image_ids)]
    compared = {label: {"results": findings.measured[label].results, "difference": found}
                for label, found in findings.differences.items()}
    line = latex_row(config["options"]["method"], findings.results)
    save_together({
        outdir / "metrics.json": write_json(findings.results),
        outdir / "metrics_config.json": write_json(config),
        outdir / "metrics.tex": lambda path: path.write_text(line),
        outdir / "compared.json": write_json(compared),
        outdir / "metrics.csv": write_csv(table_of(findings.measured)),
        outdir / "metrics_per_image.csv": write_csv(rows),
        outdir / "contact_sheet.png": lambda path: sheet.save(path, format="PNG")})


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
        print(f"{name:<{width}}" + "".join(f"{results[name]['value']:>9.3f}" for results in found.values())
              + f"{mean[name]:>9.3f}")
    print(f"subjects       {file}")


def format_table(results):
    """The metrics as aligned text; what is missing says why."""
    width = max(map(len, results)) + 2
    lines = [f"{'metric':<{width}}{'value':>8}   {'95 % interval':<18}{'n':>6}"]
    for name, entry in results.items():
        if "missing" in entry:
            lines.append(f"{name:<{width}} missing: {entry['missing']}")
            continue
        better = "  (lower is better)" if name in LOWER_IS_BETTER else ""
        gallery = f"  (of {entry['gallery']})" if "gallery" in entry else ""
        interval = "" if entry["ci_low"] is None else f"{entry['ci_low']:.3f} .. {entry['ci_high']:.3f}"
        lines.append(f"{name:<{width}}{entry['value']:>8.3f}   {interval:<18}{entry['n']:>6}{gallery}{better}")
    return "\n".join(lines)
