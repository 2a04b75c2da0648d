r"""Does guidance by the brain bring pictures nearer to what was seen, or only nearer to the network that guides?

    bash scripts/score.sh --test_split val ...; STAGES=gnet bash scripts/train.sh
    python benchmarks/gnet_guidance.py --root demo --hidden_dim 512 --sd_model demo/models/sd \
        --clip_model demo/models/clip

Validation images of c, g, z and GNet alike, the same noise in every setting. Each region guides with every kappa; the
pictures' predicted responses are compared with the measured ones, by the GNet that guided and by a judge: an encoding
model of another architecture (Judge, trained here, kept as the run gnet_subj0X_judge) that never guided. Further rows:
targets of other images, an untrained GNet, and the best of N pictures, chosen by the same GNet, without brain guidance
and with it, or by g. On the demo world also what the pictures show: attributes that captions name (setting, kind,
colour, place) and that they never name (size, pattern, light).
Prints and writes a markdown table (--table) and a figure beside it; pictures stay in outputs_all/subj0X/gnet_guidance/
and are reused. --test_split new_test shows what was chosen on validation images on the test images (folder
gnet_guidance_new_test).
"""

import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import encoding.guide
import evaluate
import options
import recon
import train_gnet
import utils
from disk.checkpoints import load_checkpoint, save_checkpoint
from disk.files import save_csv
from disk.names import Paths, run_name
from encoding.encoder import Encoder, load_encoder
from encoding.guide import ALL, good_voxels, weighted_correlation
from evaluation.metrics import pixcorr, resize, ssim
from evaluation.picture_sets import SIDE
from guidance_choice import read_table, truths_in, with_means
from models import GNet, gnet_input
from nsd.regions import roi_masks
from nsd.repeats import load_test_set, noise_ceiling, responses_to
from nsd.rows import open_stimuli
from sampling.folders import read_images, read_png
from sampling.inputs import as_float
from training.loop import fit
from training.objectives import EncodingObjective
from training.runs import open_encoding_run
from training.settings import Plan

ROIS = ("V1", "V4", "all")
KAPPAS = (0.03, 0.1, 0.3, 1.0)
DEFAULT = 0.1  # kappa
MEASURES = {"pixcorr": "PixCorr", "ssim": "SSIM", "clip_two_way": "CLIP two-way", "captioned": "captioned attributes",
            "uncaptioned": "uncaptioned attributes"}
BEST_OF = (2, 3, 4)
SHUFFLED, GUIDED_BEST = "other images' responses", f"kappa {DEFAULT:g}, best of"  # titles of rows
EVERY_STEP = f"kappa {DEFAULT:g} in every guided step"
JUDGE_SIDE = 64  # pixels


def get_parser():
    parser = options.Parser(__doc__)
    options.add_paths(parser)
    options.add_subject(parser)
    options.add_run(parser)
    for name in ("sd_model", "clip_model"):
        parser.add_argument(f"--{name}", required=True, metavar="NAME|DIR", help="as in recon.py")
    parser.add_argument("--guidance_decoder", default="full", metavar="full|half|DIR", help="as in recon.py")
    parser.add_argument("--gnet_run", type=options.tag, metavar="RUN", help="the GNet that guides (gnet_<subj>)")
    parser.add_argument("--num_inference_steps", type=options.whole, default=12, metavar="STEPS")
    parser.add_argument("--cfg_scale", type=float, default=5.0, metavar="X")
    parser.add_argument("--strength", type=float, default=0.6, metavar="FRACTION")
    parser.add_argument("--guidance_rule", choices=options.RULES, default="posterior")
    parser.add_argument("--guidance_scale", type=float, default=30.0, metavar="X")
    parser.add_argument("--guidance_strength", type=float, default=0.8, metavar="FRACTION")
    parser.add_argument("--use_adapter", action="store_true", help="as in recon.py, in every setting")
    parser.add_argument("--test_split", choices=["val", "new_test"], default="val", help="which images")
    parser.add_argument("--judge_epochs", type=options.whole, default=40, metavar="N")
    parser.add_argument("--only_judge", action="store_true", help="train the judge and stop")
    parser.add_argument("--table", metavar="FILE", help="where the markdown goes, the figure beside it (printed only)")
    options.add_compute(parser)
    return parser


# --- the judge ----------------------------------------------------------------------------------------------------


class Judge(nn.Module):
    """An encoding model that shares nothing with GNet but the data.

    Residual convolutions with group normalisation on 64 x 64 pixels; each voxel looks through a Gaussian receptive
    field (centre, width) at maps of 16 x 16 and 8 x 8, and weighs their features linearly.
    """

    def __init__(self, n_voxels, width=32):
        super().__init__()
        self.n_voxels, self.width = dict(n_voxels), width
        self.start = nn.Conv2d(3, width, 5, padding=2, stride=2)
        self.fine = nn.Sequential(Residual(width), Residual(width))
        self.down = nn.Conv2d(width, 2 * width, 3, padding=1, stride=2)
        self.coarse = nn.Sequential(Residual(2 * width), Residual(2 * width))
        self.readouts = nn.ModuleDict({subj: GaussianReadout(n, 3 * width) for subj, n in n_voxels.items()})

    @property
    def model_args(self):
        return {"kind": "judge", "n_voxels": self.n_voxels, "width": self.width}

    def forward(self, images, subject=None, voxels=None):
        """As models.GNet.forward."""
        if subject is None:
            return {subj: self(part, subj) for subj, part in images.items()}
        fine = self.fine(self.start(gnet_input(images, JUDGE_SIDE) - 0.5))  # (B, width, 32, 32)
        coarse = self.coarse(self.down(fine))  # (B, 2 width, 16, 16)
        maps = [F.avg_pool2d(F.gelu(maps), 2) for maps in (fine, coarse)]  # to 16 and 8
        responses = self.readouts[subject]([F.dropout2d(feature_map, 0.2, self.training) for feature_map in maps])
        return responses if voxels is None else responses[:, voxels]


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.GroupNorm(8, width), nn.GELU(), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, maps):
        return maps + self.layers(maps)


class GaussianReadout(nn.Module):
    """Maps [(B, F, h, w), ...] -> (B, V)."""

    def __init__(self, n_voxels, features):
        super().__init__()
        self.centre = nn.Parameter(0.3 * torch.randn(n_voxels, 2))  # in half pictures from the middle
        self.log_size = nn.Parameter(torch.full((n_voxels,), -1.0))
        self.weight = nn.Parameter(0.01 * torch.randn(n_voxels, features))
        self.bias = nn.Parameter(torch.zeros(n_voxels))

    def forward(self, maps):
        pooled = []
        for feature_map in maps:
            axis = torch.linspace(-1, 1, feature_map.shape[-1], device=feature_map.device)
            x, y = (torch.exp(-((axis - at[:, None]) ** 2) / (2 * self.log_size.exp()[:, None] ** 2))
                    for at in self.centre.unbind(1))  # (V, w), (V, h)
            field = (y[:, :, None] * x[:, None, :]).flatten(1)  # (V, h w)
            pooled.append(feature_map.flatten(2) @ (field / field.sum(1, keepdim=True)).T)  # (B, F, V)
        return (torch.cat(pooled, 1) * self.weight.T).sum(1) + self.bias


def train_judge(args, paths):
    """The judge as an Encoder; trained unless it is there, on the training images of --gnet_run."""
    flags = ["--root", args.root, "--subj", args.subj, "--tag", "judge", "--num_epochs", args.judge_epochs,
             "--batch_size", 32, "--max_lr", 2e-3, "--seed", args.seed, "--num_workers", 0, "--resume"]
    train_args = train_gnet.get_parser().parse_args([str(flag) for flag in flags])
    plan = Plan.gnet_from_args(train_args)
    run = open_encoding_run(plan)
    file = paths.run(run_name("scratch", args.subj, "gnet", None, tag="judge")) / "best.pth"
    if run is not None:
        utils.seed_everything(args.seed + 1)  # other starting weights, too
        rois = {args.subj: roi_masks(paths, args.subj)}
        ceilings = {args.subj: noise_ceiling(run.train.betas[args.subj], run.val.betas[args.subj].n_repeats)}
        objective = EncodingObjective(partial(gnet_input, side=JUDGE_SIDE), rois, ceilings, shift=1)
        fit(run, Judge(run.n_voxels), objective, plan.loop)
    state = load_checkpoint(file)
    judge = Judge(state["n_voxels"])
    judge.load_state_dict(state["model"])
    device = utils.pick_device(args.device)
    return Encoder("judge", args.subj, judge.eval().requires_grad_(False).to(device),
                         state["val_r"][args.subj].numpy(), (), file)


# --- pictures -----------------------------------------------------------------------------------------------------


def main(argv=None):
    args = get_parser().parse_args(argv)
    paths = Paths.from_args(args)
    judge = train_judge(args, paths)
    if args.only_judge:
        return
    guide = load_encoder(paths, args.subj, args.gnet_run, args.seed, utils.pick_device(args.device))
    draw = partial(draw_setting, args, paths, guide)

    settings = {"CLIP alone": draw("clip", num_samples=max(BEST_OF))}
    settings["kappa 0"] = draw("all_0", gnet_roi="all", gnet_kappa=0)
    for roi in ROIS:
        for kappa in KAPPAS:
            num_samples = max(BEST_OF) if (roi, kappa) == ("all", DEFAULT) else 1
            settings[roi, kappa] = draw(f"{roi}_{kappa:g}", gnet_roi=roi, gnet_kappa=kappa, num_samples=num_samples)
    settings[EVERY_STEP] = draw("every_step", gnet_roi="all", gnet_kappa=DEFAULT, gnet_from=0)
    settings[SHUFFLED] = draw("shuffled", gnet_roi="all", target_fmri_npy=shuffled_target(paths, args))
    settings["untrained GNet"] = draw("untrained", gnet_roi="all", gnet_run=untrained(paths, guide))
    settings[f"best of {max(BEST_OF)} by g"] = draw("best_by_g", num_samples=max(BEST_OF), extra=["--select", "g"])
    same = all(a.read_bytes() == b.read_bytes() for a, b in zip(
        pictures_of(settings["CLIP alone"]), pictures_of(settings["kappa 0"]), strict=True))

    measure = partial(measure_set, args, paths, guide, judge)
    tables = {name: measure(folder) for name, folder in settings.items()}
    for title, key in (("best of", "CLIP alone"), (GUIDED_BEST, ("all", DEFAULT))):
        candidates = [measure(settings[key], sample=k) for k in range(max(BEST_OF))]
        tables |= {f"{title} {n}": best_of(candidates[:n]) for n in BEST_OF}
    sharp = measure_as_sharp(paths, settings["all", DEFAULT], settings["kappa 0"])
    seconds = {name: time_of(args, paths, guide, name) for name in ("clip", "all")}
    lines = report(tables, settings, same, sharp, seconds, guide, judge, paths, args)
    print("\n".join(lines))
    if args.table:
        Path(args.table).write_text("\n".join(lines) + "\n")
        draw_figure(tables, Path(args.table).with_suffix(".png"))


def draw_setting(args, paths, guide, name, root=None, extra=(), **gnet):
    """Draw the images under one setting; returns their folder."""
    given = ["root", "subj", "hidden_dim", "num_sessions", "sd_model", "clip_model", "num_inference_steps", "cfg_scale",
             "strength", "guidance_rule", "guidance_scale", "guidance_strength", "guidance_decoder", "test_split"]
    given += ["tag"] * bool(args.tag)
    words = [word for flag in given for word in (f"--{flag}", str(getattr(args, flag)))]
    words += ["--use_adapter"] * args.use_adapter
    num_samples = gnet.pop("num_samples", 1)
    if gnet:
        gnet = {"gnet_run": guide.run, **gnet}
        words += ["--use_gnet", *(word for flag, value in gnet.items() for word in (f"--{flag}", str(value)))]
    folder = Path(root or folder_of(args, paths)) / name
    preflight = encoding.guide.PREFLIGHT_R
    if gnet.get("gnet_run") != guide.run:
        encoding.guide.PREFLIGHT_R = -2  # the untrained network would rightly be refused
    try:
        recon.main([*words, "--num_samples", str(num_samples), "--outdir", str(folder), *extra])
    finally:
        encoding.guide.PREFLIGHT_R = preflight
    return folder


def folder_of(args, paths):
    """Where the pictures of all settings lie."""
    return paths.outputs_all / args.subj / ("gnet_guidance" if args.test_split == "val" else "gnet_guidance_new_test")


def shuffled_target(paths, args):
    """A file of measured responses in which every image has another one's."""
    folder = folder_of(args, paths) / "shuffled_target"
    folder.mkdir(parents=True, exist_ok=True)
    held_out = (args.num_sessions, options.VAL_FRACTION, args.seed)
    test = load_test_set(paths, args.subj, held_out=held_out, split=args.test_split)
    np.save(folder / "target.npy", np.roll(test.betas, 7, axis=0))
    np.save(folder / "image_ids.npy", test.image_ids)
    return folder / "target.npy"


def untrained(paths, guide):
    """A run with the guide's architecture and voxels, and random weights; its name."""
    run = f"{guide.run}_untrained"
    if not (paths.run(run) / "best.pth").exists():
        state = load_checkpoint(guide.file)
        torch.manual_seed(1)
        sizes = {key: value for key, value in state["model_args"].items() if key != "kind"}
        kept = {key: state[key] for key in ("model_args", "n_voxels", "config", "val_r")}
        save_checkpoint(paths.run(run) / "best.pth", {**kept, "model": GNet(**sizes).state_dict()})
    return run


def pictures_of(folder, sample=0):
    return [files[sample] for files in read_images(folder).files]


def time_of(args, paths, guide, name):
    """Seconds for 16 pictures, drawn anew: with CLIP alone, or with all regions guiding too."""
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        gnet = {} if name == "clip" else {"gnet_roi": "all", "gnet_kappa": DEFAULT}
        load, started = recon.load_sampler, []

        def load_sampler(*rest):  # what is loaded and checked once is not the time of a picture
            loaded = load(*rest)
            started.append(time.perf_counter())
            return loaded

        recon.load_sampler = load_sampler
        try:
            draw_setting(args, paths, guide, name, folder, ["--limit", "16"], **gnet)
        finally:
            recon.load_sampler = load
        return time.perf_counter() - started[0]


# --- measures -----------------------------------------------------------------------------------------------------


def measure_set(args, paths, guide, judge, folder, sample=0):
    """{measure: (N,)} of one sample of each picture: r of both encoders in every region, and MEASURES."""
    file = folder / f"measures_{sample}.npz"
    pictures = pictures_of(folder, sample)
    if file.exists() and file.stat().st_mtime > max(picture.stat().st_mtime for picture in pictures):
        return dict(np.load(file))
    ids = read_images(folder).image_ids
    measured = torch.from_numpy(responses_to(paths, args.subj, ids, args.num_sessions).betas)
    stack = np.stack([read_png(picture) for picture in pictures])
    masks, found = roi_masks(paths, args.subj), {}
    for title, encoder in (("guide", guide), ("judge", judge)):
        predicted = torch.from_numpy(encoder.predict(stack))
        for roi, voxels in good_voxels(encoder, masks, "all").items():
            weights = torch.from_numpy(encoder.val_r[voxels] ** 2)
            found[f"{title} {roi}"] = weighted_correlation(predicted[:, voxels], measured[:, voxels],
                                                                 weights).numpy()
        found[f"{title} all"] = np.mean([values for name, values in found.items() if name.startswith(title)], axis=0)
    if sample == 0 and not any(p.name.endswith("_s1.png") for p in folder.glob("*.png")):
        outdir = folder
    else:  # the protocol takes the mean of samples; here it is one of them
        outdir = one_sample(folder, sample, ids)
    evaluate.main(["--root", args.root, "--images", str(outdir), "--eval_clip", args.clip_model, "--no-controls"])
    table = with_means(read_table(outdir, truths_in(paths)))
    found |= {name: np.array(table[name], float) for name in MEASURES if name in table}
    np.savez(file, **found)
    return found


def one_sample(folder, sample, ids):
    """A folder of links to one sample of each picture."""
    target = folder / f"sample_{sample}"
    target.mkdir(exist_ok=True)
    rows = []
    for row, (image_id, picture) in enumerate(zip(ids, pictures_of(folder, sample), strict=True)):
        link = target / f"{row:05d}.png"
        link.unlink(missing_ok=True)
        link.symlink_to(picture.resolve())
        rows.append({"row": row, "image_id": image_id, "file": link.name, "sample": 0, "seed": 0})
    save_csv(target / "index.csv", rows)
    return target


def best_of(candidates):
    """Of each image the candidate with which the guiding GNet agrees most; {measure: (N,)}."""
    chosen = np.argmax([table["guide all"] for table in candidates], axis=0)
    return {name: np.choose(chosen, [table[name] for table in candidates]) for name in candidates[0]}


def as_sharp_as(others, pictures):
    """Pictures (N, H, W, 3) in [0, 1] with the mean power spectrum of others (M, H, W, 3): every ring of spatial
    frequencies, a cycle per picture wide, is scaled; the mean stays.

    PixCorr and SSIM prefer a blurred picture to one whose details are not at their places. At one sharpness they
    compare the rest.
    """
    height, width = pictures.shape[1:3]
    ring = np.hypot(*np.meshgrid(np.fft.fftfreq(height) * height, np.fft.fftfreq(width) * width, indexing="ij"))
    ring = ring.round().astype(int)
    count = np.bincount(ring.ravel())
    spectra = [np.fft.fft2(stack, axes=(1, 2)) for stack in (pictures, others)]
    has, wanted = (np.bincount(ring.ravel(), (np.abs(spectrum) ** 2).mean((0, 3)).ravel()) / count
                   for spectrum in spectra)
    factor = np.sqrt(wanted / np.maximum(has, np.finfo(float).tiny))
    factor[0] = 1
    return np.fft.ifft2(spectra[0] * factor[ring][:, :, None], axes=(1, 2)).real.clip(0, 1)


def measure_as_sharp(paths, folder, like):
    """{"pixcorr", "ssim": (N,)} of the first sample of each picture in a folder, as sharp as those in another are."""
    pictures, others = (np.stack([read_png(picture) for picture in pictures_of(where)]) / 255
                        for where in (folder, like))
    sharp = torch.from_numpy(as_sharp_as(others, pictures)).permute(0, 3, 1, 2).float()
    seen = as_float(open_stimuli(paths)[read_images(folder).image_ids])
    pair = [resize(images, SIDE) for images in (seen, sharp)]  # as evaluate.py compares them
    return {"pixcorr": pixcorr(*pair), "ssim": ssim(*pair)}


def difference(table, base, name, draws=10000):
    """Mean difference of two settings in a measure, images paired, and its 95 % interval."""
    delta = table[name] - base[name]
    index = np.random.default_rng(0).integers(len(delta), size=(draws, len(delta)))
    return delta.mean(), *np.quantile(delta[index].mean(axis=1), (0.025, 0.975))


def report(tables, settings, same, sharp, seconds, guide, judge, paths, args):
    """Markdown: what held, then the table of all settings."""
    base, default = tables["kappa 0"], tables["all", DEFAULT]
    masks, n = roi_masks(paths, args.subj), len(base["pixcorr"])
    kind = "validation" if args.test_split == "val" else "test"

    def shown(table, name, against=base):
        mean, low, high = difference(table, against, name)
        return f"{mean:+.3f} ({low:+.3f} .. {high:+.3f})"

    def gain(table, title):
        return difference(table, base, f"{title} all")[0]

    regions = [name for name in ALL if name in masks]
    quality = ", ".join(f"{roi} {np.median(guide.val_r[masks[roi]]):.2f} / {np.median(judge.val_r[masks[roi]]):.2f}"
                        for roi in regions)
    ratio = seconds["all"] / seconds["clip"]
    lines = [
        f"Written by `gnet_guidance.py`: {n} {kind} images of {args.subj}, one picture each, "
        f"{args.num_inference_steps} steps, z from {args.strength:g},",
        f"`--guidance_rule {args.guidance_rule} --guidance_scale {args.guidance_scale:g} --guidance_strength "
        f"{args.guidance_strength:g}{' --use_adapter' if args.use_adapter else ''}`. r: weighted correlation across a "
        "region's voxels with the",
        "measured response; `all`: the mean of V1, V2, V3, V4 and higher. In brackets: 95 % interval over images, "
        "differences paired, against kappa 0.",
        f"Median validation r of voxels, GNet / judge: {quality}.", "",
        "| question | found |", "|---|---|",
        f"| kappa 0 draws the very files of CLIP alone | {'yes' if same else 'NO'} |",
        "| r of the guiding GNet, `all` guides, kappa " + ", ".join(f"{k:g}" for k in KAPPAS) + " | "
        + ", ".join(shown(tables["all", k], "guide all") for k in KAPPAS) + " |",
        "| r of the judge | " + ", ".join(shown(tables["all", k], "judge all") for k in KAPPAS) + " |",
        "| share of the gain that the judge sees | " + ", ".join(
            f"{100 * gain(tables['all', k], 'judge') / gain(tables['all', k], 'guide'):.0f} %" for k in KAPPAS) + " |",
        f"| guided by other images' responses: r with the true one, GNet; judge | "
        f"{shown(tables[SHUFFLED], 'guide all')}; {shown(tables[SHUFFLED], 'judge all')} |",
        f"| guided by an untrained GNet: r of the trained one; judge | {shown(tables['untrained GNet'], 'guide all')}; "
        f"{shown(tables['untrained GNet'], 'judge all')} |"]
    for roi, other in (("V1", "V4"), ("V4", "V1")):
        for title in ("guide", "judge"):
            table = tables[roi, DEFAULT]
            gap = {"x": table[f"{title} {roi}"] - base[f"{title} {roi}"]
                   - table[f"{title} {other}"] + base[f"{title} {other}"]}
            lines.append(f"| {roi} guides, kappa {DEFAULT:g}, {title}: r in {roi}; in {other}; the difference | "
                         f"{shown(table, f'{title} {roi}')}; {shown(table, f'{title} {other}')}; "
                         f"{shown(gap, 'x', {'x': 0 * gap['x']})} |")
    measures = {name: title for name, title in MEASURES.items() if name in base}
    changes = [(name, default, title) for name, title in measures.items()]
    changes += [(name, sharp, f"{measures[name]}, made as sharp as CLIP alone's,") for name in sharp]
    for name, table, title in changes:
        relative = [100 * value / base[name].mean() for value in difference(table, base, name)]
        lines.append(f"| {title} at the default (`all`, kappa {DEFAULT:g}), % of CLIP alone's | {relative[0]:+.2f} "
                     f"({relative[1]:+.2f} .. {relative[2]:+.2f}) |")
    compared = ["guide all", "judge all", *(name for name in measures if name != "clip_two_way")]
    said = "; ".join(["r of GNet", "judge", *(measures[name] for name in compared[2:])])
    lines.append(f"| {EVERY_STEP} minus in the later ones: {said} | "
                 + "; ".join(shown(tables[EVERY_STEP], name, default) for name in compared) + " |")
    lines.append(f"| seconds for 16 pictures, CLIP alone; with GNet; ratio (this small Stable Diffusion, CPU) | "
                 f"{seconds['clip']:.1f}; {seconds['all']:.1f}; {ratio:.2f} |")
    for k in (*BEST_OF, f"{max(BEST_OF)} by g"):
        lines.append(f"| kappa {DEFAULT:g} minus best of {k}: {said} | "
                     + "; ".join(shown(default, name, tables[f"best of {k}"]) for name in compared) + " |")
    most = max(BEST_OF)
    for title, against in ((f"kappa {DEFAULT:g}", default), (f"best of {most}", tables[f"best of {most}"])):
        lines.append(f"| {GUIDED_BEST} {most} minus {title}: {said} | "
                     + "; ".join(shown(tables[f"{GUIDED_BEST} {most}"], name, against) for name in compared) + " |")
    columns = [f"{title} {roi}" for title in ("guide", "judge") for roi in (*regions, "all")] + list(measures)
    if args.table:
        lines += ["", f"![change with kappa]({Path(args.table).stem}.png)"]
    lines += ["", "| guides | kappa | " + " | ".join(MEASURES.get(name, name) for name in columns) + " |",
              "|---" * (len(columns) + 2) + "|"]
    for key, table in tables.items():
        guides, kappa = key if isinstance(key, tuple) else (key, "")
        cells = [f"{table[name].mean():.3f}" for name in columns]
        lines.append(f"| {guides} | {kappa} | " + " | ".join(cells) + " |")
    return lines


def draw_figure(tables, file):
    """Change with kappa of r under the guide and the judge, region by region, and of PixCorr."""
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot

    base = tables["kappa 0"]
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for roi, colour in zip(ROIS, ("#1b6ca8", "#e9a23b", "#222222"), strict=True):
        for axis, name, title in ((axes[0], f"guide {roi}", "r under the GNet that guides"),
                                  (axes[1], f"judge {roi}", "r under the judge, which never guided"),
                                  (axes[2], "pixcorr", "PixCorr")):
            found = np.array([(0, 0, 0), *(difference(tables[roi, kappa], base, name) for kappa in KAPPAS)])
            axis.plot((0, *KAPPAS), found[:, 0], "o-", color=colour, label=roi, markersize=3)
            axis.fill_between((0, *KAPPAS), found[:, 1], found[:, 2], color=colour, alpha=0.08)
            axis.set(title=title, xlabel="kappa")
            axis.set_xscale("symlog", linthresh=KAPPAS[0])
            axis.set_xticks((0, *KAPPAS), [f"{k:g}" for k in (0, *KAPPAS)])
    for axis in axes:
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("change from CLIP alone,\nin the region that guides")
    axes[0].legend(title="guides", frameon=False)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
