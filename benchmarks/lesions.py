"""What does each region of interest contribute to c, z and g, and to pictures? On the demo world, whose judge knows.

    source demo/settings.sh; bash scripts/recon.sh                            # when the demo has run: whole responses
    python benchmarks/lesions.py --table benchmarks/lesions.md

Scores and draws each lesion (what is there is kept), then judges the pictures of the 100 test images: which attributes
of the scene they show, and how well their pixels agree. Differences from whole responses are paired by image, with 95 %
bootstrap intervals. Writes --table, and a contact sheet beside it.
"""

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))

import numpy as np
import torch

import judge
import options
import utils
from disk.files import load_json
from disk.names import Paths, images_name, scores_name
from evaluation.gallery import contact_sheet
from evaluation.measuring import summarise
from evaluation.metrics import mean_of, pixcorr
from evaluation.picture_sets import as_float
from nsd.rows import open_stimuli
from sampling.folders import read_images, read_png

LESIONS = [{flag: regions} for flag in ("without", "voxels") for regions in ("V1,V2,V3", "V4", "higher_vis")]
SHOWN = ("kind", "setting", "place", "size", "colour", "pattern", "light")


def get_parser():
    parser = options.Parser(__doc__)
    options.add_paths(parser)
    options.add_subject(parser)
    parser.add_argument("--images", default="outputs_all/subj01/cp_4096_v1/30/0.8", metavar="DIR",
                        help="the reconstructions, of whole responses")
    parser.add_argument("--table", metavar="FILE", help="write the tables there, as Markdown")
    parser.add_argument("--sheet_images", type=options.whole, default=10, metavar="IMAGES", help="size of the sheet")
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    paths = Paths.from_args(args)
    run_lesions(args)
    whole = read_images(paths.find(args.images))
    truths = load_json(paths.root / "demo_attributes.json", "attributes of the scenes", "run the demo", list)
    seen = open_stimuli(paths)[whole.image_ids]
    folders = {"whole responses": whole.folder, **{name_of(lesion): folder_of(whole, lesion) for lesion in LESIONS},
               "shuffled responses": folder_of(whole, {"control": "shuffle"})}
    found, rows = {}, {"seen images": list(seen)}
    for name, folder in folders.items():
        drawn = read_images(folder)
        assert np.array_equal(drawn.image_ids, whole.image_ids), f"{folder}: of other images"
        rows[name] = [read_png(files[0]) for files in drawn.files]
        found[name] = measure(np.stack(rows[name]), seen, [truths[i] for i in whole.image_ids])
    lines = [*heading(len(seen)), *table_of_pictures(found), *table_of_r2(paths, whole.config)]
    print("\n".join(lines))
    if args.table:
        Path(args.table).write_text("\n".join(lines) + "\n")
        chosen = utils.evenly(len(seen), args.sheet_images)
        sheet = contact_sheet({name: [pictures[i] for i in chosen] for name, pictures in rows.items()},
                              [str(whole.image_ids[i]) for i in chosen], "What each region contributes",
                              f"{len(chosen)} of {len(seen)} test images, at even distances by id")
        sheet.save(Path(args.table).with_suffix(".webp"), quality=80)


def run_lesions(args):
    """Score and draw every lesion, by the scripts."""
    environment = {**os.environ, "ROOT": str(args.root), "SUBJ": str(int(args.subj[-2:]))}
    for lesion in LESIONS:
        ((flag, regions),) = lesion.items()
        for script in ("score", "recon"):
            command = ["bash", str(utils.REPOSITORY / f"scripts/{script}.sh"), f"--{flag}", regions]
            subprocess.run(command, env=environment, check=True)


def name_of(lesion):
    ((flag, regions),) = lesion.items()
    return ("only " if flag == "voxels" else "without ") + regions.replace(",", ", ")


def folder_of(whole, changed):
    """Where the pictures of a lesion lie, beside the reconstructions."""
    return whole.folder.parents[2] / images_name({"use_gnet": False, **whole.config, **changed}) / Path(
        *whole.folder.parts[-2:])


def measure(pictures, seen, truths):
    """{measure: (N,)} of pictures (N, H, W, 3): what the judge finds of each attribute, and PixCorr."""
    made, wanted = (as_float(images) for images in (pictures, seen))
    if made.shape != wanted.shape:
        made = torch.nn.functional.interpolate(made, size=wanted.shape[-2:], mode="bilinear")
    right = judge.find_right(made, truths)
    return {**{name: right[name] for name in SHOWN}, "PixCorr": np.asarray(pixcorr(made, wanted))}


def heading(n_images):
    return ["# Lesions (demo world)", "",
            "`source demo/settings.sh; python benchmarks/lesions.py --table benchmarks/lesions.md`: subject 1, "
            f"{n_images} test images, the default decoders and guidance. *Without* a region its voxels have their mean "
            "response to the training images; *only* a region, all others have theirs. ![sheet](lesions.webp)", ""]


def table_of_pictures(found):
    """Share of pictures that show the true value; under it, how much less than with whole responses."""
    whole = next(iter(found.values()))
    lines = ["## Pictures", "", "Share of the pictures that show what was seen, and the change from whole responses in "
             "points (95 % intervals, images paired); of PixCorr its mean.", "",
             "| | " + " | ".join(whole) + " |", "|---" * (len(whole) + 1) + "|"]
    for name, values in found.items():
        cells = []
        for measure, of_images in values.items():
            unit, form = (1, "{:.3f}") if measure == "PixCorr" else (100, "{:.0f}")
            cell = form.format(unit * np.nanmean(of_images))
            if values is not whole:
                entry = summarise(mean_of(of_images - whole[measure]), len(of_images), 0)
                signed = form.replace(":", ":+")
                cell += " ({}: {} .. {})".format(*(signed.format(unit * entry[key]) for key in
                                                   ("value", "ci_low", "ci_high")))
            cells.append(cell)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def table_of_r2(paths, config):
    """R2 of the scores on validation images; with intervals, region by region: scripts/maps.sh."""
    feats = ["c", "z", *config["feats"]]
    lines = ["## Decoded features", "", "R2 on validation images. With intervals, and region by region: "
             "`bash scripts/maps.sh`.", "", "| | " + " | ".join(feats) + " |", "|---" * (len(feats) + 1) + "|"]
    for name, changed in {"whole responses": {}, **{name_of(lesion): lesion for lesion in LESIONS}}.items():
        folders = [paths.scores(config["subj"], scores_name({**config, **changed}, feat), feat) for feat in feats]
        r2 = [load_json(folder / "config.json")["r2"]["scored"] for folder in folders]
        lines.append(f"| {name} | " + " | ".join(f"{value:.2f}" for value in r2) + " |")
    return lines


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
