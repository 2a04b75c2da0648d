"""Compare reconstructions with the images the subject saw: metrics, confidence intervals, contact sheet.

PNGs + index.csv of recon.py, stimuli -> protocol `mindeye2` -> a value per metric, a sheet of seen and reconstructed

    python src/evaluate.py --subj 1 --guidance_scale 300000 --guidance_strength 0.2
    python src/evaluate.py --images outputs_all/subj01/cp_4096_v1/300000/0.2 --compare shuffled=DIR unguided=DIR
    python src/evaluate.py --images DIR --ground_truth     # the seen images against themselves: every metric's best

Reads index.csv and config.json of the images, nsd_stimuli.hdf5, and retrieval.npy of the scores behind them.
Writes metrics.json, metrics_per_image.csv, metrics_config.json and contact_sheet.png beside the images.
Values of several samples of one image are averaged first. Intervals: 95 %, bootstrap over images.
"""

import argparse
import sys
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

import data
import metrics
import options
import utils
from brain import load_encoder
from eval_networks import load_networks
from gallery import contact_sheet
from pictures import as_float, in_batches, name_of, read_images, read_png

SIDE = 256  # protocol: both images of a pair are first brought to this side, in pixels
LOWER_IS_BETTER = ("clip_median_rank", "effnet_distance", "swav_distance")
# what names the scores behind the images
RUN_FLAGS = ("subj", "hidden_dim", "num_sessions", "tag", "run", "head", "control", "test_split")


def get_parser():
    parser = options.Parser(__doc__)
    options.add_paths(parser)
    options.add_subject(parser)
    options.add_run(parser)
    options.add_scored_run(parser)
    options.add_control(parser)
    options.add_guidance_folder(parser)
    options.add_gnet(parser)
    parser.add_argument("--images", metavar="DIR",
                        help="folder of reconstructions, from --root; instead of naming it by flags")
    parser.add_argument("--outdir", metavar="DIR", help="where the results go, from --root (beside the images)")
    parser.add_argument("--ground_truth", action=argparse.BooleanOptionalAction, default=False,
                        help="score the seen images themselves; results go to ground_truth/ beside the images")
    parser.add_argument("--eval_clip", default="openai/clip-vit-large-patch14", metavar="NAME|DIR",
                        help="the CLIP that judges; none leaves it out")
    parser.add_argument("--retrieval_feat", type=options.feature, default="c", metavar="FEAT",
                        help="feature whose brain embeddings are retrieved")
    parser.add_argument("--compare", nargs="+", default=[], metavar="[LABEL=]DIR", help="further rows of the sheet")
    parser.add_argument("--sheet_images", type=options.whole, default=40, metavar="IMAGES", help="size of the sheet")
    parser.add_argument("--batch_size", type=options.whole, default=16, metavar="IMAGES")
    options.add_compute(parser)
    options.add_tracking(parser)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    utils.check_tracking(args.wandb_log)
    paths = utils.Paths.from_args(args)
    for name in ("batch_size", "sheet_images"):
        if getattr(args, name) < 1:
            raise utils.UserError(f"--{name} {getattr(args, name)}: wanted at least 1")
    images = read_images(images_folder(args, paths))
    outdir = images.folder / "ground_truth" if args.ground_truth else images.folder
    outdir = paths.root.joinpath(args.outdir) if args.outdir else outdir
    compared = {} if args.ground_truth else read_compared(args.compare, paths)
    stimuli = data.open_stimuli(paths)
    check_ids(images, stimuli, paths)
    networks, missing = load_networks(args.eval_clip, utils.pick_device(args.device))

    per_image, tables = measure(images, stimuli, networks, args)
    if len(images.image_ids) == 1:
        missing |= dict.fromkeys((name for name in networks if name.endswith("_two_way")), "needs at least two images")
    results = {name: summarise(statistic_of(name, per_image, tables), len(images.image_ids), args.seed)
               for name in per_image}
    found, reasons = retrieval(images, args, paths)
    results |= found
    found, brain, no_brain = brain_correlation(images, stimuli, args, paths)
    per_image |= found
    results |= {name: summarise(statistic_of(name, found, {}), len(images.image_ids), args.seed) for name in found}
    reasons |= no_brain
    results |= {name: {"value": None, "ci_low": None, "ci_high": None, "n": 0, "missing": why}
                for name, why in (missing | reasons).items()}
    write_results(outdir, results, per_image, images, brain, args)
    sheet = draw_sheet(images, compared, stimuli, results, args)
    sheet.save(outdir / "contact_sheet.png")

    name = f"evaluate_{args.subj}_{name_of(images.folder)}".replace(" ", "_")
    tracker = utils.Tracker(outdir, name, vars(args), args.wandb_log, args.wandb_project)
    tracker.log({f"eval/{name}": entry["value"] for name, entry in results.items() if entry["n"]}, step=0)
    tracker.log_images("eval/contact_sheet", [sheet], [str(images.folder)], step=0)
    tracker.finish()
    print(format_table(results))
    if brain:
        print(f"brain_correlation: {brain['note']}")
    print(f"metrics        {outdir / 'metrics.json'}\ncontact sheet  {outdir / 'contact_sheet.png'}")


# --- which images ------------------------------------------------------------------------------------------------


def images_folder(args, paths):
    """--images, or the folder the flags name (recon.py's rules); without --guidance_scale the only one there is."""
    if args.images:
        return paths.root.joinpath(args.images)  # an absolute path stays as it is
    method = utils.images_name(vars(args))
    if args.guidance_scale is not None:
        return paths.images(args.subj, method, args.guidance_scale, args.guidance_strength)
    sets = paths.images(args.subj, method, 0, 0).parent.parent
    found = sorted(sets.glob(f"*/{args.guidance_strength:g}/index.csv"))
    if len(found) != 1:
        scales = ", ".join(path.parent.parent.name for path in found) or "none"
        raise utils.UserError(f"--guidance_scale: not given, and {sets} has reconstructions of: {scales} (strength "
                              f"{args.guidance_strength:g}); name one, or reconstruct first (bash scripts/recon.sh)")
    return found[0].parent


def read_compared(words, paths):
    """{label: ImageSet} of --compare."""
    compared = {}
    for word in words:
        label, _, folder = word.rpartition("=")
        folder = paths.root.joinpath(folder)
        compared[label or name_of(folder)] = read_images(folder)
    return compared


def check_ids(images, stimuli, paths):
    """Refuse image ids that the stimulus file does not have."""
    if images.image_ids[0] < 0 or images.image_ids[-1] >= stimuli.shape[0]:
        found = f"{images.image_ids[0]}..{images.image_ids[-1]}"
        raise utils.UserError(f"{images.folder}/index.csv: image_id {found}, wanted 0..{stimuli.shape[0] - 1} "
                              f"({paths.stimuli}); give the --root they were made with")


# --- metrics -----------------------------------------------------------------------------------------------------


def measure(images, stimuli, networks, args):
    """Compare every reconstruction with what was seen.

    Returns {metric: (N,) a value per image} and, for identification, {metric: (N, N) successes of query against rival};
    both are means over samples.
    """
    n, n_samples = len(images.image_ids), 1 if args.ground_truth else len(images.files[0])
    pixels = {"pixcorr": np.zeros((n_samples, n)), "ssim": np.zeros((n_samples, n))}
    reals, preds = {name: [] for name in networks}, {name: [[] for _ in range(n_samples)] for name in networks}
    with tqdm(total=n * n_samples, desc="evaluate", unit="image") as progress:
        for start in range(0, n, args.batch_size):
            rows = slice(start, min(start + args.batch_size, n))
            truths = metrics.resize(as_float(stimuli[images.image_ids[rows]]), SIDE)  # (B, 3, 256, 256)
            for name, network in networks.items():
                reals[name].append(network(truths))
            for k in range(n_samples):
                made = truths if args.ground_truth else read_samples(images, rows, k)
                pixels["pixcorr"][k, rows] = metrics.pixcorr(truths, made)
                pixels["ssim"][k, rows] = metrics.ssim(truths, made)
                for name, network in networks.items():
                    preds[name][k].append(network(made))
                progress.update(len(truths))
    per_image, tables = {name: values.mean(axis=0) for name, values in pixels.items()}, {}
    for name in networks:
        compare_features(name, torch.cat(reals[name]), [torch.cat(parts) for parts in preds[name]], per_image, tables)
    return per_image, tables


def read_samples(images, rows, k):
    """Sample k of the reconstructions in `rows`, (B, 3, 256, 256) float in [0, 1]."""
    return torch.cat([metrics.resize(as_float(read_png(files[k])[None]), SIDE) for files in images.files[rows]])


def compare_features(name, real, preds, per_image, tables):
    """Add the metrics of one network to `per_image` and `tables`; real (N, D), preds: (N, D) per sample."""
    if name.endswith("_distance"):
        per_image[name] = np.mean([metrics.correlation_distance(real, pred) for pred in preds], axis=0)
        return
    if len(real) == 1:
        return
    found = [metrics.identification(metrics.correlations(real, pred)) for pred in preds]
    for direction, suffix in (("rec_to_gt", ""), ("gt_to_rec", "_gt_to_rec")):  # the protocol's has the plain name
        tables[name + suffix] = np.mean([successes[direction] for successes in found], axis=0)
        per_image[name + suffix] = tables[name + suffix].sum(axis=1) / (len(real) - 1)
    if name == "clip_two_way":
        rank = np.array([metrics.ranks_of(successes["rec_to_gt"]) for successes in found])  # (samples, N)
        per_image["clip_median_rank"] = rank.mean(axis=0)
        per_image |= {"clip_top1": (rank <= 1).mean(axis=0), "clip_top5": (rank <= 5).mean(axis=0)}


def statistic_of(name, per_image, tables):
    """The metric as a function of an index of images, for the bootstrap."""
    if name in tables:
        return metrics.pair_mean_of(tables[name])
    average = np.median if "median" in name else np.mean
    return lambda index: average(per_image[name][index])


def summarise(statistic, n, seed):
    """A metric's entry of metrics.json."""
    low, high = metrics.bootstrap_ci(statistic, n, seed=seed)
    return {"value": float(statistic(np.arange(n))), "ci_low": low, "ci_high": high, "n": n}


def retrieval(images, args, paths):
    """Retrieve images by brain embeddings and the reverse, over all test images of the scores behind `images`.

    Returns the entries of metrics.json and {metric: why it is missing}.
    """
    names = ("brain_to_image_top1", "image_to_brain_top1")
    if args.ground_truth:
        return {}, {}
    run, why = run_behind(images, args)
    if why:
        return {}, dict.fromkeys(names, why)
    feat, subj = args.retrieval_feat, run["subj"]
    folder = paths.scores(subj, utils.scores_name(run, feat), feat)
    for file in (folder / "retrieval.npy", paths.feature(feat)):
        if not file.exists():
            return {}, dict.fromkeys(names, f"{file} not found")
    ids, brain = utils.load_scores(folder, "retrieval")
    seen = data.open_feature(paths, feat)
    if brain[0].size != np.prod(seen.row_shape):
        raise utils.UserError(f"{folder}/retrieval.npy: rows of {brain.shape[1:]}, those of {paths.feature(feat)} are "
                              f"{seen.row_shape}; score again, or give --retrieval_feat another feature")
    hits, drawn = metrics.retrieval_counts(brain, seen[ids], seed=args.seed)
    gallery = min(metrics.GALLERY, len(ids))
    return {name: {**summarise(partial(ratio, hits[name], drawn), len(ids), args.seed), "gallery": gallery}
            for name in names}, {}


def brain_correlation(images, stimuli, args, paths):
    """Correlate the response predicted for a picture with the one measured to the seen image, across a region's voxels.

    GNet of --gnet_run predicts; measured responses are averaged over an image's repeats; no noise ceiling divides
    (FIELD section 2). Returns {brain_correlation_<ROI>: (N,)}, means over samples, what predicted (None if nothing
    did), and {metric: why it is missing}.
    """
    subj = args.subj
    if (images.folder / "config.json").exists():
        subj = utils.load_json(images.folder / "config.json").get("subj", subj)
    run = args.gnet_run or utils.run_name("scratch", subj, "gnet", None)
    if args.gnet_run is None and not (paths.run(run) / "best.pth").exists():
        return {}, None, {"brain_correlation": f"{paths.run(run)}/best.pth not found (STAGES=gnet scripts/train.sh)"}
    encoder = load_encoder(paths, subj, run, args.seed, utils.pick_device(args.device))
    measured = data.responses_to(paths, subj, images.image_ids).betas  # (N, V)
    if args.ground_truth:
        parts = np.array_split(images.image_ids, -(-len(images.image_ids) // 50))
        predicted = [encoder.predict((stimuli[part] for part in parts), show="brain")]
    else:
        predicted = [encoder.predict(in_batches((read_png(files[k]) for files in images.files), 50), show="brain")
                     for k in range(len(images.files[0]))]
    found = {f"brain_correlation_{roi}": np.mean([metrics.paired_correlation(measured[:, mask], responses[:, mask])
                                                  for responses in predicted], axis=0)
             for roi, mask in data.roi_masks(paths, subj).items() if mask.any()}
    guided = guided_by(images)
    note = f"predicted by {run}, which was fitted to responses of the same subject" + (
        f"; {guided} guided these pictures, so that its own r is what was optimised" if guided else "")
    return found, {"gnet_run": run, "checkpoint_sha256": utils.file_hash(encoder.file), "note": note}, {}


def guided_by(images):
    """The encoding model that guided these pictures, or None."""
    config = images.folder / "config.json"
    return utils.load_json(config).get("gnet_run") if config.exists() else None


def ratio(hits, drawn, index):
    return hits[index].sum() / drawn[index].sum()


def run_behind(images, args):
    """The flags that name the scores the images were made from, as recon.py left them; or None and why not."""
    if not (images.folder / "config.json").exists():
        return None, f"{images.folder}/config.json, which says whose images these are, not found"
    config = utils.load_json(images.folder / "config.json")
    lacking = [flag for flag in RUN_FLAGS if flag not in config]
    if lacking:
        return None, f"{images.folder}/config.json does not say {', '.join(lacking)}"
    return {flag: config[flag] for flag in RUN_FLAGS}, None


# --- results -----------------------------------------------------------------------------------------------------


def write_results(outdir, results, per_image, images, brain, args):
    rows = [{"image_id": image_id, **{name: float(values[i]) for name, values in per_image.items()}}
            for i, image_id in enumerate(images.image_ids)]
    config = {"protocol": "mindeye2", "images": str(images.folder), "n_samples": len(images.files[0]),
              "git_commit": utils.git_commit(), "options": vars(args), "brain_correlation": brain}
    utils.save_csv(outdir / "metrics_per_image.csv", rows)
    utils.save_json(outdir / "metrics_config.json", config)
    utils.save_json(outdir / "metrics.json", results)


def format_table(results):
    """The metrics as aligned text; what is missing says why."""
    lines = [f"{'metric':<24}{'value':>8}   {'95 % interval':<18}{'n':>6}"]
    for name, entry in results.items():
        if "missing" in entry:
            lines.append(f"{name:<24} missing: {entry['missing']}")
            continue
        better = "  (lower is better)" if name in LOWER_IS_BETTER else ""
        gallery = f"  (of {entry['gallery']})" if "gallery" in entry else ""
        interval = f"{entry['ci_low']:.3f} .. {entry['ci_high']:.3f}"
        lines.append(f"{name:<24}{entry['value']:>8.3f}   {interval:<18}{entry['n']:>6}{gallery}{better}")
    return "\n".join(lines)


def draw_sheet(images, compared, stimuli, results, args):
    """The contact sheet; of a set larger than the sheet, images at even distances: none is picked."""
    n = len(images.image_ids)
    chosen = np.unique(np.linspace(0, n - 1, min(n, args.sheet_images)).round().astype(int))
    ids = images.image_ids[chosen]
    rows = {"seen": list(stimuli[ids])}
    if not args.ground_truth:
        for k in range(len(images.files[0])):
            label = f"sample {k + 1}" if k else "reconstructed"
            rows[label] = [read_png(images.files[i][k]) for i in chosen]
    for label, other in compared.items():
        first_samples = {image_id: files[0] for image_id, files in zip(other.image_ids, other.files, strict=True)}
        rows[label] = [read_png(first_samples[i]) if i in first_samples else None for i in ids]
    which = f"all {n} images" if len(ids) == n else f"{len(ids)} of {n} images, at even distances by id"
    shown = [f"{title} {results[name]['value']:.3f}" for name, title in
             (("clip_two_way", "CLIP two-way"), ("pixcorr", "PixCorr"), ("ssim", "SSIM"))
             if results.get(name, {}).get("n")]
    return contact_sheet(rows, [f"{i}" for i in ids], name_of(images.folder), "   ·   ".join([which, *shown]))


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
