"""Which guidance, in how many steps? The same validation images under many settings; a table.

    bash scripts/score.sh --test_split val ...          # or --ground_truth --test_split val for --run ground_truth
    python benchmarks/guidance_choice.py --root demo --sd_model demo/models/sd --clip_model demo/models/clip
    python benchmarks/guidance_choice.py --what steps ...       # of DDIM and DPM-Solver++
    python benchmarks/guidance_choice.py --what strengths_25 ...   # is the best strength the same in 25 steps? (12, 50)
    python benchmarks/guidance_choice.py --what adapter_strengths_25 ...   # and beside the adapter?
    python benchmarks/guidance_choice.py --what adapter ...     # g's adapter (train_adapter.py), and guidance beside it
    python benchmarks/guidance_choice.py --what repeats ...     # of guided steps, and other ways to spend the same
    python benchmarks/guidance_choice.py --what cfg ...         # classifier-free guidance beside that of g
    python benchmarks/guidance_choice.py --decoders demo/models/taesd ...
    python benchmarks/guidance_choice.py --what results --test_split new_test --num_samples 3 ...    # what was chosen

Validation images are training images that no training step saw, so nothing is chosen on test images. Every setting
draws --num_samples pictures of each from the same noise and c, z, g (kept in outputs_all/subj0X/choice/, reused when
run again). Prints and writes a markdown table (--table): each measure's mean, and in brackets the difference from the
first row where its 95 % interval leaves out 0: bootstrap over images, pairs kept together. Of a scan of strengths also
the one that the rule chooses (chosen_of). Of results: every difference from the row above, with its interval.
"""

import csv
import sys
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))

import numpy as np

import evaluate
import options
import recon
import utils
from disk.files import load_json
from disk.names import Paths
from evaluation.picture_sets import as_float
from judge import find_right
from sampling.folders import read_images, read_png
from scenes import ATTRIBUTES

UNGUIDED = {"guidance_scale": 0}
POSTERIOR = {"guidance_rule": "posterior", "guidance_scale": 30, "guidance_strength": 0.8}
RAW = {"guidance_rule": "raw", "guidance_scale": 1000, "guidance_strength": 0.4}
NORM = {"guidance_rule": "norm", "guidance_scale": 0.2, "guidance_strength": 1.0}


def at_strengths(*scales):
    """Unguided, then the posterior rule at each strength."""
    return [UNGUIDED, *({**POSTERIOR, "guidance_scale": scale} for scale in scales)]


RULES = [
    *at_strengths(3, 10, 14, 20, 30, 45, 100, 300),
    *({**POSTERIOR, "guidance_draws": draws} for draws in (0, 1)),
    {**POSTERIOR, "guidance_strength": 1.0},
    {**POSTERIOR, "guidance_grad": "x0"},
    *({**RAW, "guidance_scale": scale} for scale in (300, 1000, 3000)),
    NORM,
]
STEPS = [("ddim", 50), *((solver, steps) for steps in (25, 20, 16, 12, 10, 8) for solver in ("ddim", "dpm"))]
REPEATS = [UNGUIDED, *({**POSTERIOR, "guidance_repeats": n} for n in (1, 2, 3)),
           *({**POSTERIOR, "guidance_repeats": n, "num_inference_steps": steps}
             for n, steps in ((1, 24), (2, 12), (2, 10), (2, 8)))]
ADAPTER = [UNGUIDED, POSTERIOR, {"use_adapter": True, **UNGUIDED},
           *({"use_adapter": True, **POSTERIOR, "guidance_scale": scale} for scale in (3, 10, 20, 30, 45))]
ADDED = {"c + z": UNGUIDED, "+ guidance by g": POSTERIOR, "+ its adapter": {"use_adapter": True, **POSTERIOR},
         "+ the brain": {"use_adapter": True, "use_gnet": True, **POSTERIOR}}
RESULTS = [{"num_inference_steps": steps, "strength": start, **setting} for steps, start in ((12, 0.5), (14, 0.75))
           for setting in ADDED.values()]
CFG = [{**guidance, "cfg_scale": w} for w in (5, 7.5, 3, 2, 1.5, 1) for guidance in (UNGUIDED, POSTERIOR)]
SETS = {"rules": RULES, "repeats": REPEATS, "cfg": CFG, "adapter": ADAPTER, "results": RESULTS} | {
    name: [{**guidance, "solver": solver, "num_inference_steps": steps} for solver, steps in STEPS]
    for name, guidance in (("steps", POSTERIOR), ("unguided_steps", UNGUIDED))} | {
    f"{beside}strengths_{steps}": [{**adapter, **setting, "num_inference_steps": steps}
                                   for setting in at_strengths(14, 20, 30, 45, 100)]
    for steps in (12, 25, 50) for beside, adapter in (("", {}), ("adapter_", {"use_adapter": True}))}
KNOBS = {"use_adapter": "adapter", "cfg_scale": "CFG", "solver": "solver", "num_inference_steps": "steps",
         "guidance_repeats": "repeats", "guidance_draws": "draws"}
NUMBERS = {"pixcorr": "PixCorr", "ssim": "SSIM", "sharpness": "sharpness",
           "brain_correlation_nsd_general": "r under GNet"}  # all others are rates
CAPTIONED = {"captioned": ("setting", "kind", "colour", "place"), "uncaptioned": ("size", "pattern", "light")}
# the setting is always right, the second object hardly ever
ATTRIBUTES_OPEN = (*CAPTIONED["captioned"][1:], *CAPTIONED["uncaptioned"])
MEASURES = {**{name: name for name in ATTRIBUTES}, "clip_two_way": "CLIP two-way", **NUMBERS}


def get_parser():
    parser = options.Parser(__doc__)
    options.add_paths(parser)
    options.add_subject(parser)
    options.add_run(parser)
    parser.add_argument("--run", type=options.run, default="finetune", metavar="STAGE[:SUBJ]",
                        help="whose scores, as in recon.py")
    for name in ("sd_model", "clip_model", "guidance_decoder"):
        parser.add_argument(f"--{name}", required=True, metavar="NAME|DIR", help="as in recon.py")
    parser.add_argument("--test_split", choices=["val", "new_test"], default="val", help="whose images, as in recon.py")
    parser.add_argument("--num_samples", type=options.whole, default=4, metavar="SAMPLES")
    parser.add_argument("--num_inference_steps", type=options.whole, default=14, metavar="STEPS")
    parser.add_argument("--cfg_scale", type=float, default=5.0, metavar="X")
    parser.add_argument("--strength", type=float, default=0.6, metavar="FRACTION")
    parser.add_argument("--batch_size", type=options.whole, default=4, metavar="PICTURES")
    parser.add_argument("--what", choices=SETS, default="rules", help="which settings")
    parser.add_argument("--decoders", nargs="+", metavar="half|DIR",
                        help="compare these --guidance_decoders with the full one")
    parser.add_argument("--table", metavar="FILE", help="where the markdown goes (printed only)")
    parser.add_argument("--figure", metavar="FILE", help="a plot of each measure against the posterior rule's strength")
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    paths = Paths.from_args(args)
    given = [name for name in ("root", "subj", "hidden_dim", "num_sessions", "tag", "run", "sd_model", "clip_model",
                               "guidance_decoder", "num_samples", "num_inference_steps", "cfg_scale", "strength",
                               "batch_size")
             if getattr(args, name) != ""]
    same = [word for name in given for word in (f"--{name}", str(getattr(args, name)))]
    choice = "choice" if args.test_split == "val" else f"choice_{args.test_split}"
    truths = truths_in(paths)
    settings, tables = SETS[args.what], []
    if args.decoders:
        settings = [{**POSTERIOR, "guidance_decoder": name} for name in ("full", *args.decoders)] + [UNGUIDED]
    for setting in settings:
        name = ",".join(f"{key.removeprefix('guidance_')}={str(value).replace('/', '_')}"
                        for key, value in setting.items())
        folder = paths.root / "outputs_all" / args.subj / choice / args.run.replace(":", "_") / name
        changed = [word for key, value in setting.items() for word in (f"--{key}", str(value)) if word != "True"]
        recon.main([*same, *changed, "--test_split", args.test_split, "--outdir", str(folder)])
        metrics = folder / "metrics_per_image.csv"
        if not metrics.exists() or metrics.stat().st_mtime < (folder / "index.csv").stat().st_mtime:
            evaluate.main(["--root", args.root, "--images", str(folder), "--eval_clip", args.clip_model,
                           "--no-controls"])
        tables.append(read_table(folder, truths))
    n, which = len(tables[0]["image_id"]), {"val": "validation", "new_test": "test"}[args.test_split]
    fixed = {"num_inference_steps": f"{args.num_inference_steps} steps, ", "cfg_scale": f"CFG {args.cfg_scale:g}, "}
    fixed = "".join(text for name, text in fixed.items() if not all(name in setting for setting in settings))
    lines = [f"Written by `guidance_choice.py --what {args.what} --run {args.run}`: {n} {which} images of {args.subj},"]
    if args.what == "results":
        lines += [f"{args.num_samples} pictures of each, CFG {args.cfg_scale:g}. Each column adds to the one before:",
                  "its difference from that, and the 95 % interval.", *as_gains(settings, tables)]
    else:
        lines += [f"{args.num_samples} pictures of each, {fixed}z from {args.strength:g}. In brackets:",
                  "the difference from the first row, where its 95 % interval leaves out 0.", "",
                  as_markdown(settings, tables, args.guidance_decoder)]
    scales = [setting["guidance_scale"] for setting in settings]
    end = next((i for i, scale in enumerate(scales) if scale in scales[:i]), None)  # of the scan, which comes first
    scan = dict(zip(scales[:end], tables[:end], strict=True))
    if len(scan) > 2 and truths is not None:
        lines += ["", f"The rule of guidance_choice.md chooses {chosen_of(scan):g}."]
    text = "\n".join(lines)
    if args.figure:
        plot(scan, args.figure)
    if args.table:
        Path(args.table).write_text(text + "\n")
    print(text)


def as_markdown(settings, tables, decoder):
    """A row per setting, a column per measure and for what the settings name; tables: {measure: a value per image},
    unguided first; decoder: that of settings that name none."""
    shown = [name for name in MEASURES if all(name in table for table in tables)]
    rows = []
    for setting, table in zip(settings, tables, strict=True):
        cells = {"rule": setting.get("guidance_rule", "none"), "scale": f"{setting['guidance_scale']:g}"}
        if "guidance_rule" in setting:
            cells |= {"window": f"{setting['guidance_strength']:g}", "gradient": setting.get("guidance_grad", "xt"),
                      "x0": setting.get("guidance_x0", "cond"),
                      "decoder": Path(setting.get("guidance_decoder", decoder)).name}
        cells |= {column: "yes" if setting[name] is True else str(setting[name])
                  for name, column in KNOBS.items() if name in setting}
        for name in shown:
            mean, gain, low, high = gain_of(name, table, tables[0])
            percent = name not in NUMBERS
            cell = f"{100 * mean:.1f}" if percent else f"{mean:.3f}"
            if low > 0 or high < 0:
                cell += f" ({100 * gain:+.1f})" if percent else f" ({gain:+.3f})"
            cells[MEASURES[name]] = cell
        rows.append(cells)
    order = ["rule", "scale", "window", "gradient", "x0", "decoder", *KNOBS.values(), *MEASURES.values()]
    columns = [name for name in order if any(name in cells for cells in rows)]
    lines = [columns, ["---"] * len(columns), *([cells.get(name, "") for name in columns] for cells in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_gains(settings, tables):
    """Lines of a table for every path: a row per measure, a column for all that ADDED adds; as as_markdown."""
    lines = []
    for first in range(0, len(settings), len(ADDED)):
        path, block = settings[first], [with_means(table) for table in tables[first:first + len(ADDED)]]
        titles = {**MEASURES, "uncaptioned": f"what no caption says: {', '.join(CAPTIONED['uncaptioned'])}",
                  "captioned": f"what captions can say: {', '.join(CAPTIONED['captioned'])}"}
        shown = {name: title for name, title in titles.items() if all(name in table for table in block)}
        lines += ["", f"| {path['num_inference_steps']} steps, z from {path['strength']:g} | {' | '.join(ADDED)} |",
                  "| --- " * (1 + len(ADDED)) + "|"]
        for name, title in shown.items():
            factor, digits = (1, 3) if name in NUMBERS else (100, 1)
            cells = [f"{factor * gain_of(name, block[0], block[0])[0]:.{digits}f}"]
            for before, table in pairwise(block):
                _, gain, low, high = (factor * number for number in gain_of(name, table, before))
                cells.append(f"{gain:+.{digits}f} ({low:.{digits}f} .. {high:.{digits}f})")
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def with_means(table):
    """A table as of read_table, with the means of attributes that captions can say, and never say (CAPTIONED)."""
    return table | {name: np.mean([table[part] for part in parts], axis=0) for name, parts in CAPTIONED.items()
                    if parts[0] in table}


def gain_of(name, table, plain):
    """A measure's mean, and its mean difference from `plain` with a 95 % interval: bootstrap over images, paired."""
    values, before = (np.array(t[name], float) for t in (table, plain))
    draws = np.random.default_rng(0).integers(len(values), size=(10000, len(values)))
    low, high = np.quantile(np.nanmean((values - before)[draws], axis=1), (0.025, 0.975))
    return np.nanmean(values), np.nanmean(values - before), low, high


def chosen_of(tables):
    """The strength with the highest mean over ATTRIBUTES_OPEN of those under which no measure is measurably lower than
    unguided; of strengths that differ by less than a point, the weakest. tables: {scale: table}, 0 one of them."""
    means = {scale: np.mean([table[name] for name in ATTRIBUTES_OPEN]) for scale, table in tables.items()
             if all(gain_of(name, table, tables[0])[3] >= 0 for name in MEASURES if name in table)}
    return min(scale for scale, mean in means.items() if mean > max(means.values()) - 0.01)


def plot(tables, file):
    """Each measure's difference from unguided against the strength, with its interval; tables: {scale: table}, 0 one of
    them."""
    from matplotlib.figure import Figure

    scales = sorted(scale for scale in tables if scale)
    shown = [name for name in MEASURES if name != "setting" and all(name in table for table in tables.values())]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(2, -(-len(shown) // 2), sharex=True).flat
    for axes in panels[len(shown):]:
        axes.set_axis_off()
    for axes, name in zip(panels, shown, strict=False):
        _, gains, lows, highs = np.array([gain_of(name, tables[scale], tables[0]) for scale in scales]).T
        factor = 1 if name in NUMBERS else 100
        axes.fill_between(scales, factor * lows, factor * highs, alpha=0.2, linewidth=0)
        axes.plot(scales, factor * gains, marker="o", markersize=3)
        axes.axhline(0, color="gray", linewidth=0.8)
        axes.set(xscale="log", title=f"{MEASURES[name]}{' (points)' if factor == 100 else ''}")
    figure.supxlabel("strength of g (--guidance_scale)")
    figure.supylabel("difference from unguided")
    figure.savefig(file, dpi=100)


def truths_in(paths):
    """What each image of the demo world shows; None of another world."""
    file = paths.root / "demo_attributes.json"
    return load_json(file, kind=list) if file.exists() else None


def read_table(folder, truths):
    """metrics_per_image.csv as {column: list}; on the demo world also the share of an image's pictures in which the
    judge finds each attribute (NaN: it has no second object)."""
    file = utils.require(folder / "metrics_per_image.csv", "metrics per image", "run evaluate.py on this folder first")
    with open(file, newline="") as source:
        rows = list(csv.DictReader(source))
    table = {name: [row[name] for row in rows] for name in rows[0]}
    if truths is not None:
        images = read_images(folder)
        pictures = np.stack([read_png(file) for files in images.files for file in files])
        seen = [truths[i] for i in images.image_ids for _ in images.files[0]]
        for name, right in find_right(as_float(pictures), seen).items():
            table[name] = right.reshape(len(images.files), -1).mean(axis=1)
    return table


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
