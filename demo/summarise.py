"""Sum up a demo run: what the judge finds in each set of pictures, the metrics of evaluate.py, and a contact sheet.

    python demo/summarise.py --root demo --evaluated DIR --sets "c=DIR" "c+z=DIR" "shuffled=DIR" --seconds DIR

Reads the pictures of every set, the metrics.json and compared.json of the folder that was evaluated (with the others as
its --compare), the R2 of the scores behind it, demo_attributes.json and the stimuli; prints the table, writes
ROOT/summary.json and ROOT/contact_sheet.webp.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))  # the pipeline is used in place, not installed

import options
import utils
from disk.files import load_json, save_json
from disk.names import Paths, scores_name

METRICS = {"pixcorr": "PixCorr", "ssim": "SSIM", "clip_two_way": "CLIP two-way"}
CLIP_CHANCE = 0.5
HINT = "run the whole demo (bash scripts/demo.sh)"


def get_parser():
    parser = options.Parser(__doc__)
    options.add_paths(parser)
    parser.add_argument("--evaluated", required=True, metavar="DIR",
                        help="the pictures that evaluate.py compared with the others")
    parser.add_argument("--sets", nargs="+", required=True, metavar="LABEL=DIR",
                        help="all sets, in the order of the table; labels as evaluate's --compare")
    parser.add_argument("--seconds", metavar="DIR", help="folder with a file per stage: its seconds")
    parser.add_argument("--sheet_images", type=options.whole, default=20, metavar="IMAGES", help="size of the sheet")
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    import numpy as np

    import judge
    from evaluation.gallery import contact_sheet
    from evaluation.picture_sets import as_float, check_ids
    from nsd.rows import open_stimuli
    from sampling.folders import read_images, read_png

    paths = Paths.from_args(args)
    attributes = load_json(paths.root / "demo_attributes.json", "attributes of the scenes", HINT, list)
    stimuli = open_stimuli(paths)
    sets = {label: paths.find(folder) for label, _, folder in (word.partition("=") for word in args.sets)}
    metrics = read_metrics(paths.find(args.evaluated), sets)

    summary, rows = {}, {}
    for label, folder in sets.items():
        images = read_images(folder)
        check_ids(images, stimuli)
        ids = images.image_ids
        truths = [attributes[i] for i in ids]
        pictures = [read_png(files[0]) for files in images.files]
        rows.setdefault("seen", list(stimuli[ids]))
        rows[label] = pictures
        summary[label] = judge.judge_images(as_float(np.stack(pictures)), truths) | metrics[label]
    guessed = judge.chance(truths) | {"clip_two_way": CLIP_CHANCE}
    print(format_table(summary, guessed, len(ids)))
    summary["r2"] = read_r2(paths, read_images(paths.find(args.evaluated)).config)
    summary["seconds"] = read_seconds(Path(args.seconds)) if args.seconds else {}
    print(format_rest(summary))

    chosen = utils.evenly(len(ids), args.sheet_images)
    sheet = contact_sheet({label: [pictures[i] for i in chosen] for label, pictures in rows.items()},
                          [str(ids[i]) for i in chosen], "What a brain response holds, signal by signal",
                          f"{len(chosen)} of {len(ids)} test images, at even distances by id")
    sheet.save(paths.root / "contact_sheet.webp", quality=80)
    save_json(paths.root / "summary.json", summary)
    print(f"summary        {paths.root / 'summary.json'}\ncontact sheet  {paths.root / 'contact_sheet.webp'}")


def read_metrics(folder, sets):
    """{label: {metric: value}} of each set, from the evaluation in `folder`, which is one of them."""
    own = load_json(folder / "metrics.json", "metrics", "run src/evaluate.py on these images first")
    others = load_json(folder / "compared.json", "metrics of other sets", "give evaluate.py the others as --compare")
    found = {label: own if path.resolve() == folder.resolve() else others.get(label, {}).get("results", {})
             for label, path in sets.items()}
    for label, results in found.items():
        missing = [name for name in METRICS if results.get(name, {}).get("value") is None]
        if missing:
            raise utils.UserError(f"{folder}: no {', '.join(missing)} of {label!r}; run src/evaluate.py again with "
                                  "--eval_clip and this set as --compare")
    return {label: {name: results[name]["value"] for name in METRICS} for label, results in found.items()}


def read_r2(paths, config):
    """{feature: {"network", "ridge", "scored"}}: shares of variance explained, of the scores behind the pictures."""
    return {feat: load_json(paths.scores(config["subj"], scores_name(config, feat), feat) / "config.json")["r2"]
            for feat in ("c", "z", *config["feats"])}


def read_seconds(folder):
    """{stage: seconds}, in the order the stages ended."""
    files = sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime)
    return {file.name: float(file.read_text()) for file in files}


def format_table(summary, guessed, n_images):
    """A row per measure, a column per set of pictures, and chance."""
    measures = next(iter(summary.values()))
    titles = (*summary, "chance")
    width = max(map(len, titles)) + 2
    heading = f"{f'{n_images} test images':<18}" + "".join(f"{title:>{width}}" for title in titles)
    lines = ["", heading, "-" * len(heading)]
    for measure in measures:
        show = "{:.3f}".format if measure in ("pixcorr", "ssim") else "{:.0%}".format
        values = [show(rates[measure]) for rates in summary.values()]
        values.append(show(guessed[measure]) if measure in guessed else "")
        lines.append(f"{METRICS.get(measure, measure):<18}" + "".join(f"{value:>{width}}" for value in values))
    return "\n".join(lines)


def format_rest(summary):
    lines = ["", f"{'variance explained':<18}" + "".join(f"{feat:>8}" for feat in summary["r2"])]
    for name in ("ridge", "network", "scored"):
        values = [r2.get(name) for r2 in summary["r2"].values()]
        lines.append(f"{name:<18}" + "".join(f"{'' if value is None else f'{value:.2f}':>8}" for value in values))
    if summary["seconds"]:
        stages = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in summary["seconds"].items())
        lines += ["", f"seconds: {stages}; {sum(summary['seconds'].values()) / 60:.1f} minutes in all"]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
