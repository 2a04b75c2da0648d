"""What does starting from decoded latents (z) do to the pictures? The same images with and without z, paired.

    python benchmarks/z_effect.py --root demo --clip demo/models/clip --with_z DIR

--with_z: a folder of reconstructions that recon.py made with --z scores, evaluated (the demo's is
outputs_all/subj01/cp_4096_v1/300/0.4). Draws the same images from pure noise (--z none, <method>_without_z) with the
settings in that folder's config.json, evaluates them, and prints for each metric both values and the difference with
its 95 % interval: bootstrap over images, pairs kept together.
"""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))

import numpy as np
import torch

import evaluate
import options
import recon
import utils
from disk.files import load_json
from disk.names import Paths
from evaluation.picture_sets import as_float
from judge import read_attributes
from sampling.folders import read_images, read_png

SETTINGS = ("hidden_dim", "num_sessions", "tag", "run", "head", "test_split", "repeats", "control", "precision",
            "sd_model", "clip_model", "num_inference_steps", "cfg_scale",
            "guidance_scale", "guidance_strength", "guidance_rule", "guidance_grad", "guidance_x0", "seed")


def get_parser():
    parser = options.Parser(__doc__)
    options.add_paths(parser)
    parser.add_argument("--clip", required=True, metavar="NAME|DIR", help="the CLIP that judges")
    parser.add_argument("--with_z", required=True, metavar="DIR", help="reconstructions from z, evaluated")
    parser.add_argument("--batch_size", type=options.whole, default=50, metavar="PICTURES")
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    with_z = Path(args.with_z).resolve()
    config = load_json(with_z / "config.json", "settings of the reconstructions", "make them with recon.py first")
    method = f"{config['method']}_without_z"
    flags = ["--root", args.root, "--subj", config["subj"], "--batch_size", str(args.batch_size), "--z", "none"]
    flags += ["--feats", *(config["feats"] or ["none"])]
    flags += [word for name in SETTINGS if config.get(name) is not None for word in (f"--{name}", str(config[name]))]
    recon.main([*flags, "--method", method])
    paths = Paths.from_args(args)
    unguided = {"guidance_scale": 0, "guidance_strength": 0}  # what its config.json then leaves out
    without_z = paths.images_of({**unguided, **config, "method": method, "use_gnet": False})
    evaluate.main(["--root", args.root, "--images", str(without_z), "--eval_clip", args.clip])

    attributes = paths.root / "demo_attributes.json"
    truths = load_json(attributes, kind=list) if attributes.exists() else None
    tables = [read_table(folder, truths, args.clip) for folder in (with_z, without_z)]
    if tables[0]["image_id"] != tables[1]["image_id"]:
        raise utils.UserError(f"{with_z}: other images than {without_z}; draw both with the same --limit and --ids")
    n = len(tables[0]["image_id"])
    draws = np.random.default_rng(0).integers(n, size=(10000, n))
    print(f"\n{n} images        with z  without z  difference   95 % interval")
    for name in tables[0]:
        if name == "image_id":
            continue
        a, b = (np.array(table[name], float) for table in tables)
        low, high = np.quantile((a - b)[draws].mean(axis=1), (0.025, 0.975))
        print(f"{name:<24}{a.mean():8.3f}{b.mean():10.3f}{(a - b).mean():+12.4f}   {low:+.4f} .. {high:+.4f}")


def read_table(folder, truths, clip):
    """metrics_per_image.csv as {column: list}; on the demo world also the share of an image's pictures in which each
    attribute is recognised."""
    file = utils.require(folder / "metrics_per_image.csv", "metrics per image", "run evaluate.py on this folder first")
    with open(file, newline="") as source:
        rows = list(csv.DictReader(source))
    table = {name: [row[name] for row in rows] for name in rows[0]}
    if truths is not None:
        images = read_images(folder)
        pictures = torch.cat([as_float(read_png(file)[None]) for files in images.files for file in files])
        for name, values in read_attributes(pictures, clip).items():
            seen = [truths[i][name] for i in images.image_ids for _ in images.files[0]]
            right = [value == true for value, true in zip(values, seen, strict=True)]
            table[f"right {name}"] = np.reshape(right, (len(images.files), -1)).mean(axis=1)
    return table


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
