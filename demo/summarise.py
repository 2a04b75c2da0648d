"""Sum up a demo run: what the tiny CLIP recognises in the reconstructions, and the metrics of evaluate.py.

    python demo/summarise.py --root demo --clip demo/models/clip --real DIR --shuffled DIR --unguided DIR \\
        --seen DIR --seconds seconds.json

Reads index.csv and metrics.json of each folder (reconstructed and evaluated before), demo_attributes.json and the
stimuli; prints the table and writes ROOT/summary.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))  # the pipeline is used in place, not installed

import options
import utils
from disk.files import load_json, save_json
from disk.names import Paths
from scenes import ATTRIBUTES

METRICS = ("clip_two_way", "pixcorr", "ssim")
CHANCE = {**{name: 1 / len(values) for name, values in ATTRIBUTES.items()}, "clip_two_way": 0.5}
HINT = "run the whole demo (bash scripts/demo.sh)"


def get_parser():
    parser = options.Parser(__doc__)
    options.add_paths(parser)
    for name, what in (("real", "guided reconstructions"), ("shuffled", "reconstructions from trial-shuffled fMRI"),
                       ("unguided", "reconstructions without guidance")):
        parser.add_argument(f"--{name}", required=True, metavar="DIR", help=f"{what}, evaluated")
    parser.add_argument("--seen", required=True, metavar="DIR|FILE",
                        help="metrics.json of evaluate.py --seen, or its folder")
    parser.add_argument("--clip", required=True, metavar="DIR", help="the CLIP that judges")
    parser.add_argument("--seconds", metavar="DIR|FILE",
                        help="JSON {stage: seconds}, or a folder with a file of that name and number per stage")
    parser.add_argument("--summary", metavar="FILE", help="where the summary goes (ROOT/summary.json)")
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    import torch

    from evaluation.picture_sets import as_float, check_ids
    from nsd.rows import open_stimuli
    from sampling.folders import read_images, read_png

    paths = Paths.from_args(args)
    attributes = load_json(paths.root / "demo_attributes.json", "attributes of the scenes", HINT, list)
    utils.require(args.clip, "--clip: folder of the CLIP", HINT)
    stimuli = open_stimuli(paths)

    summary = {}
    for name in ("real", "shuffled", "unguided"):
        images = read_images(Path(getattr(args, name)))
        check_ids(images, stimuli)
        pictures = torch.cat([as_float(read_png(files[0])[None]) for files in images.files])  # (N, 3, H, W)
        summary[name] = judge(pictures, images.image_ids, attributes, args.clip) | read_metrics(images.folder)
    ids = read_images(Path(args.real)).image_ids
    summary["seen"] = judge(as_float(stimuli[ids]), ids, attributes, args.clip) | read_metrics(args.seen)
    summary["seconds"] = read_seconds(Path(args.seconds)) if args.seconds else {}

    file = Path(args.summary or paths.root / "summary.json")
    save_json(file, summary)
    print(format_summary(summary, len(ids)))
    print(f"summary        {file}\ncontact sheet  {Path(args.real) / 'contact_sheet.png'}")


def judge(pictures, image_ids, attributes, clip):
    """Accuracy of each attribute in (N, 3, H, W) pictures of the scenes image_ids (N,)."""
    from judge import judge_images  # here, not at the top: utils.quiet comes before transformers is loaded

    return judge_images(pictures, [attributes[i] for i in image_ids], clip)


def read_metrics(path):
    """The summary's metrics from a metrics.json or the folder that holds it."""
    path = Path(path)
    file = path / "metrics.json" if path.is_dir() else path
    found = load_json(file, "metrics", "run src/evaluate.py on these images first")
    missing = [name for name in METRICS if found.get(name, {}).get("value") is None]
    if missing:
        raise utils.UserError(f"{file}: no value of {', '.join(missing)}; run src/evaluate.py again with --eval_clip")
    return {name: found[name]["value"] for name in METRICS}


def read_seconds(path):
    """{stage: seconds}, in the order the stages ended where `path` is a folder."""
    if path.is_dir():
        files = sorted(path.iterdir(), key=lambda file: file.stat().st_mtime)
        return {file.name: float(file.read_text()) for file in files}
    return load_json(path, "seconds per stage", HINT)


def format_summary(summary, n_images):
    """The table: a row per measure, a column per set of images, and chance."""
    titles = {"seen": "seen images", "real": "from fMRI", "unguided": "unguided", "shuffled": "shuffled fMRI"}
    words = {"background": "right background", "object": "right object", "colour": "right colour",
             "place": "right place", "clip_two_way": "CLIP two-way", "pixcorr": "PixCorr", "ssim": "SSIM"}
    heading = f"{f'{n_images} test images':<18}" + "".join(f"{title:>15}" for title in (*titles.values(), "chance"))
    lines = ["", heading, "-" * len(heading)]
    for measure, word in words.items():
        show = "{:.3f}".format if measure in ("pixcorr", "ssim") else "{:.1%}".format
        chance = show(CHANCE[measure]) if measure in CHANCE else ""
        values = [show(summary[name][measure]) for name in titles]
        lines.append(f"{word:<18}" + "".join(f"{value:>15}" for value in (*values, chance)))
    if summary["seconds"]:
        stages = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in summary["seconds"].items())
        lines += ["", f"seconds: {stages}; {sum(summary['seconds'].values()) / 60:.1f} minutes in all"]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
