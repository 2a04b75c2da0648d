"""Compare reconstructions with the images the subject saw: metrics, intervals, controls, a report to open.

PNGs + index.csv of recon.py, stimuli -> protocol `mindeye2` -> a value per metric, report/index.html, a contact sheet

    python src/evaluate.py --subj 1 --guidance_scale 300000 --guidance_strength 0.2
    python src/evaluate.py --images outputs_all/subj01/cp_4096_v1/300000/0.2 --compare shuffled=DIR unguided=DIR
    python src/evaluate.py --subjects 1 2 5 7        # a row for each, and their mean
    python src/evaluate.py --images DIR --ground_truth     # the seen images against themselves: every metric's best

Reads index.csv and config.json of the images, nsd_stimuli.hdf5, retrieval.npy of the scores behind them and, for brain
correlation, betas and the GNet of --gnet_run. Beside the images it writes
    metrics.json           the values            metrics_per_image.csv   a row per image
    metrics.csv            every row of the table   metrics.tex          a line for a paper
    compared.json          each --compare and control: its values, and the difference, images paired
    report/index.html      all of it to look at  contact_sheet.png       seen and reconstructed
Values of several samples of one image are averaged first. Intervals: 95 %, bootstrap over images. What was extracted is
kept in outputs_all/.features, by content: run again, an evaluation continues.
"""

import argparse
import sys
from functools import partial
from typing import NamedTuple

import numpy as np

import options
import utils
from disk.files import atomic_path, file_hash, load_csv, load_npy, save_json, save_together, write_csv, write_json
from disk.names import Paths, images_name, scores_name
from disk.scores import load_scores
from encoding.encoder import Encoder, load_encoder
from evaluation import controls, metrics, report
from evaluation.gallery import contact_sheet
from evaluation.networks import FeatureStore, load_networks
from evaluation.picture_sets import PictureSet
from nsd import sources
from nsd.regions import roi_masks
from nsd.repeats import responses_to
from nsd.rows import open_feature, open_stimuli
from sampling.folders import in_batches, name_of, read_images, read_png
from training.tracking import Tracker, check_tracking

# what names the scores behind the images
RUN_FLAGS = ("subj", "hidden_dim", "num_sessions", "tag", "run", "head", "control", "test_split", "repeats")


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
    parser.add_argument("--eval_clip", default=sources.EVAL_CLIP, metavar="NAME|DIR",
                        help="the CLIP that judges; none leaves it out")
    parser.add_argument("--weights_dir", metavar="DIR",
                        help="where torch.hub keeps weights (checkpoints/*.pth) and SwAV's code, and a folder "
                             "clip-vit-large-patch14 may lie (torch's own, ~/.cache/torch/hub)")
    parser.add_argument("--retrieval_feat", type=options.feature, default="c", metavar="FEAT",
                        help="feature whose brain embeddings are retrieved")
    parser.add_argument("--compare", nargs="+", default=[], metavar="[LABEL=]DIR",
                        help="further reconstructions of the same images: measured, compared image by image, shown")
    parser.add_argument("--controls", action=argparse.BooleanOptionalAction, default=True,
                        help="measure null controls and ceilings too")
    parser.add_argument("--subjects", type=options.subject, nargs="+", metavar="S",
                        help="evaluate each of these, in the folders that the other flags name, and their mean")
    parser.add_argument("--sheet_images", type=options.whole, default=40, metavar="IMAGES", help="size of the sheet")
    parser.add_argument("--batch_size", type=options.whole, default=16, metavar="IMAGES")
    options.add_compute(parser)
    options.add_tracking(parser)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    check_tracking(args.wandb_log)
    for name in ("batch_size", "sheet_images"):
        if getattr(args, name) < 1:
            raise utils.UserError(f"--{name} {getattr(args, name)}: wanted at least 1")
    if not args.subjects:
        evaluate(args)
        return
    if args.images or args.outdir:
        raise utils.UserError("--subjects: their folders are named by the flags of recon.py; leave out --images, "
                              "--outdir")
    found = {}
    for subj in args.subjects:
        sessions = min(args.num_sessions, options.SESSIONS[subj])
        found[subj] = evaluate(argparse.Namespace(**{**vars(args), "subj": subj, "num_sessions": sessions}))
    write_subjects(found, Paths.from_args(args), args)


def evaluate(args):
    """Measure one folder and write all results beside it; returns {metric: entry}."""
    paths = Paths.from_args(args)
    images = read_images(images_folder(args, paths))
    outdir = images.folder / "ground_truth" if args.ground_truth else images.folder
    outdir = paths.root.joinpath(args.outdir) if args.outdir else outdir
    stimuli = open_stimuli(paths)
    check_ids(images, stimuli, paths)
    check_rows(images, paths)
    compared = {} if args.ground_truth else read_compared(args.compare, paths)
    for folder in (outdir, outdir / "report"):
        check_writable(folder)
    networks, missing = load_networks(args.eval_clip, utils.pick_device(args.device), args.weights_dir)
    if len(images.image_ids) == 1:
        missing |= dict.fromkeys((name for name in networks if name.endswith("_two_way")), "needs at least two images")

    seen = PictureSet("seen", images.image_ids, lambda i, k: stimuli[images.image_ids[[i]]][0])
    made = seen if args.ground_truth else PictureSet.of_folder("reconstructed", images)
    brain, no_brain = brain_of(images, args, paths)
    if brain is None:
        missing["brain_correlation"] = no_brain
    store = FeatureStore(paths.root / "outputs_all/.features", args.batch_size)
    scale = Scale(seen, networks, store, brain, args.seed)
    measured = {made.label: scale.measure(made)}
    results = measured[made.label].results
    found, reasons = retrieval(images, args, paths)
    results |= found | effective_ranks(images, args, paths)
    results |= {name: {"value": None, "ci_low": None, "ci_high": None, "n": 0, "missing": why}
                for name, why in (missing | reasons).items()}
    others, absent = other_sets(images, seen, compared, args, paths, store)
    measured |= {label: scale.measure(pictures) for label, pictures in others.items()}
    differences = {label: scale.differences(measured[made.label], other) for label, other in measured.items()
                   if label != made.label}

    sheet = draw_sheet(images, compared, stimuli, results, args)
    config = {"protocol": "mindeye2", "images": str(images.folder), "n_samples": made.n_samples,
              "git_commit": utils.git_commit(), "options": vars(args), "brain_correlation": scale.brain_note(images)}
    write_results(outdir, measured, differences, images, config, sheet)
    report.write(outdir / "report", name_of(images.folder), measured, differences, absent,
                 {"seen": seen, made.label: made, **others}, config, images.config or {}, paths)

    name = f"evaluate_{args.subj}_{name_of(images.folder)}".replace(" ", "_")
    tracker = Tracker(outdir, name, vars(args), args.wandb_log, args.wandb_project)
    tracker.log({f"eval/{name}": entry["value"] for name, entry in results.items() if entry["n"]}, step=0)
    tracker.log_table("eval/metrics", table_of(measured), step=0)
    tracker.log_images("eval/contact_sheet", [sheet], [str(images.folder)], step=0)
    tracker.finish()
    print(format_table(results))
    if config["brain_correlation"]:
        print(f"brain_correlation: {config['brain_correlation']}")
    for label, why in absent.items():
        print(f"{label}: not measured, {why}")
    print(f"metrics        {outdir / 'metrics.json'}\ncontact sheet  {outdir / 'contact_sheet.png'}\n"
          f"report         {outdir / 'report/index.html'}")
    return results


# --- which images ------------------------------------------------------------------------------------------------


def images_folder(args, paths):
    """--images, or the folder the flags name (recon.py's rules); without --guidance_scale the only one there is."""
    if args.images:
        return paths.root.joinpath(args.images)  # an absolute path stays as it is
    method = images_name(vars(args))
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


def check_rows(images, paths):
    """Refuse an index whose ids are not those of the scores that the pictures were drawn from, row by row."""
    run, why = run_behind(images)
    folder = None if why else paths.scores(run["subj"], scores_name(run, "c"), "c")
    if folder is None or not (folder / "image_ids.npy").exists():
        return
    ids = load_npy(folder / "image_ids.npy", "the scores' image ids", "score again")
    for line in load_csv(images.folder / "index.csv", "the list of reconstructions", "reconstruct again"):
        row = int(line.get("row", -1))
        if row >= len(ids) or (row >= 0 and ids[row] != int(line["image_id"])):
            found = ids[row] if row < len(ids) else "none"
            raise utils.UserError(f"{images.folder}/index.csv: row {row} is image id {line['image_id']}, in {folder} "
                                  f"it is {found}; these pictures were not drawn from these scores: reconstruct again")


def check_ids(images, stimuli, paths):
    """Refuse image ids that the stimulus file does not have."""
    if images.image_ids[0] < 0 or images.image_ids[-1] >= stimuli.shape[0]:
        found = f"{images.image_ids[0]}..{images.image_ids[-1]}"
        raise utils.UserError(f"{images.folder}/index.csv: image_id {found}, wanted 0..{stimuli.shape[0] - 1} "
                              f"({paths.stimuli}); give the --root they were made with")


def check_writable(folder):
    """Refuse a folder that can not be written to before the work, not after it."""
    try:
        with atomic_path(folder / "writable") as temporary:
            temporary.touch()
        (folder / "writable").unlink()
    except utils.UserError as error:
        raise utils.UserError(f"{folder}: can not be written to ({error.__cause__.strerror}); choose another --outdir"
                              ) from None


def other_sets(images, seen, compared, args, paths, store):
    """{label: PictureSet} of what is measured beside the reconstructions, and {label: why it is not there}.

    Compared folders; null controls (shuffled, noise and mean responses) that recon.py drew with the same settings; and
    what needs no decoder at all (controls.py). Sets that lack some of the images are left out.
    """
    sets = {label: PictureSet.of_folder(label, folder) for label, folder in compared.items()}
    absent = {}
    if args.controls and not args.ground_truth:
        for label, changed in (("control: shuffled responses", {"control": "shuffle"}),
                               ("control: noise responses", {"control": "noise"}),
                               ("control: mean response", {"control": "mean"}),
                               ("ceiling: true features", {"run": "ground_truth"})):
            folder = folder_with(images, changed)
            if folder is None or not (folder / "index.csv").exists():
                flag = " ".join(f"--{key} {value}" for key, value in changed.items())
                absent[label] = f"score and draw it with the same flags and {flag}, or give it as --compare"
            elif folder != images.folder and folder not in [other.folder for other in compared.values()]:
                sets[label] = PictureSet.of_folder(label, read_images(folder))
        run, why = run_behind(images)
        made, reasons = controls.make(seen, run, why, args, paths, store)
        sets, absent = sets | made, absent | reasons
        absent["baseline: ridge"] = "score and draw it with --run ridge --method NAME, and give it as --compare"
    for label in list(sets):
        lacking = np.setdiff1d(images.image_ids, sets[label].image_ids)
        if lacking.size:
            absent[label] = f"it lacks {lacking.size} of the images (first: id {lacking[0]})"
            del sets[label]
        elif len(sets[label].image_ids) > len(images.image_ids):
            sets[label] = sets[label].of_ids(images.image_ids)
    return sets, absent


def folder_with(images, changed):
    """Where recon.py puts these reconstructions with some flags changed, {flag: value}; None where config.json does not
    say enough, or they lie elsewhere."""
    config = {"use_gnet": False, "gnet_roi": None, "gnet_kappa": 0, **(images.config or {})}
    if not {"method", *RUN_FLAGS} <= config.keys():
        return None
    name, new = (images_name(flags) for flags in (config, {**config, **changed}))
    parts = images.folder.parts  # .../<name>/<guidance_scale>/<guidance_strength>
    return images.folder.parents[2] / new / parts[-2] / parts[-1] if parts[-3] == name else None


# --- metrics -----------------------------------------------------------------------------------------------------


class Measured:
    """What was found of one set: results {metric: entry}, per_image {metric: (N,)}, tables {metric: (N, N) successes of
    query against rival}; the last two are means over samples."""

    def __init__(self, per_image, tables, seed):
        self.per_image, self.tables = per_image, tables
        self.results = {name: summarise(self.statistic(name), len(values), seed) for name, values in per_image.items()}

    def statistic(self, name):
        """The metric as a function of an index of images, for the bootstrap."""
        if name in self.tables:
            return metrics.pair_mean_of(self.tables[name])
        average = np.median if "median" in name else np.mean

        def statistic(index):
            values = self.per_image[name][index]
            values = values[~np.isnan(values)]  # an image without rivals in its cluster has no value there
            return average(values) if len(values) else np.nan

        return statistic


class Scale:
    """Measures sets of pictures against what was seen, with the same networks."""

    def __init__(self, seen, networks, store, brain, seed):
        """brain: Brain or None."""
        self.seen, self.networks, self.store, self.brain, self.seed = seen, networks, store, brain, seed
        self.reals = {name: store.features(name, network, seen) for name, network in networks.items()}

    def measure(self, pictures):
        """All metrics of a PictureSet of the same images, Measured."""
        per_image = [self.pixels(pictures, k) | self.brain_correlation(pictures, k) for k in range(pictures.n_samples)]
        per_image, tables = {name: np.mean([found[name] for found in per_image], axis=0) for name in per_image[0]}, {}
        for name, network in self.networks.items():
            preds = [self.store.features(name, network, pictures, k) for k in range(pictures.n_samples)]
            compare_features(name, self.reals[name], preds, per_image, tables)
        return Measured(per_image, tables, self.seed)

    def pixels(self, pictures, sample):
        """PixCorr and SSIM of every image, {metric: (N,)}."""
        def make(file):
            found, n = [], self.store.batch_size
            for start in range(0, len(self.seen.image_ids), n):
                index = range(start, min(start + n, len(self.seen.image_ids)))
                pair = self.seen.batch(index), pictures.batch(index, sample)
                found.append([metrics.pixcorr(*pair), metrics.ssim(*pair)])
            with open(file, "wb") as stream:
                np.save(stream, np.concatenate(found, axis=1))

        found = self.store.kept("pixels", self.seen.key() + pictures.key(sample), make)
        return {"pixcorr": np.array(found[0]), "ssim": np.array(found[1])}

    def brain_correlation(self, pictures, sample):
        """Correlation of the response predicted for a picture with the one measured to the seen image, across a
        region's voxels: {brain_correlation_<ROI>: (N,)}. Measured responses are averaged over an image's repeats; no
        noise ceiling divides (FIELD section 2)."""
        if self.brain is None:
            return {}
        encoder, responses, rois = self.brain

        def make(file):
            shown = (pictures.read(i, sample) for i in range(len(pictures.image_ids)))
            with open(file, "wb") as stream:
                np.save(stream, encoder.predict(in_batches(shown, 50), show=f"brain of {pictures.label}"))

        predicted = self.store.kept("voxels", file_hash(encoder.file) + encoder.subj + pictures.key(sample), make)
        return {f"brain_correlation_{roi}": metrics.paired_correlation(responses[:, mask], predicted[:, mask])
                for roi, mask in rois.items()}

    def differences(self, measured, other):
        """{metric: entry} of a set's values minus another one's, images paired."""
        n, found = len(self.seen.image_ids), {}
        for name in measured.per_image:
            if name in other.per_image:
                a, b = measured.statistic(name), other.statistic(name)
                low, high = metrics.paired_ci(a, b, n, seed=self.seed)
                value = float(a(np.arange(n)) - b(np.arange(n)))
                found[name] = {"value": value, "ci_low": low, "ci_high": high, "n": n}
        return found

    def brain_note(self, images):
        """What the reader of brain correlations must know; None without them."""
        if self.brain is None:
            return None
        note = f"predicted by {self.brain.encoder.run}, which was fitted to responses of the same subject"
        guided = (images.config or {}).get("gnet_run")
        return note + (f"; {guided} guided these pictures, so that its own r is what was optimised" if guided else "")


class Brain(NamedTuple):
    """What judges by a subject's responses."""

    encoder: Encoder
    responses: np.ndarray  # (N, V) measured to the seen images, averaged over repeats
    rois: dict  # name -> bool (V,)


def brain_of(images, args, paths):
    """The Brain of --gnet_run (the subject's own where there is one) or None, and why there is none."""
    subj = (images.config or {}).get("subj", args.subj)
    try:
        encoder = load_encoder(paths, subj, args.gnet_run, args.seed, utils.pick_device(args.device))
        responses = responses_to(paths, subj, images.image_ids).betas
        rois = {roi: mask for roi, mask in roi_masks(paths, subj).items() if mask.any()}
    except utils.UserError as error:
        if args.gnet_run:
            raise
        return None, str(error)
    return Brain(encoder, responses, rois), None


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
        clusters = metrics.clusters_of(real, round((len(real) / 2) ** 0.5))
        per_image["clip_two_way_same_cluster"] = metrics.within_clusters(tables[name], clusters)


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
    run, why = run_behind(images)
    if why:
        return {}, dict.fromkeys(names, why)
    feat, subj = args.retrieval_feat, run["subj"]
    folder = paths.scores(subj, scores_name(run, feat), feat)
    for file in (folder / "retrieval.npy", paths.feature(feat)):
        if not file.exists():
            return {}, dict.fromkeys(names, f"{file} not found")
    ids, brain = load_scores(folder, "retrieval")
    seen = open_feature(paths, feat)
    if brain[0].size != np.prod(seen.row_shape):
        raise utils.UserError(f"{folder}/retrieval.npy: rows of {brain.shape[1:]}, those of {paths.feature(feat)} are "
                              f"{seen.row_shape}; score again, or give --retrieval_feat another feature")
    found = {}
    for suffix, gallery in (("", min(metrics.GALLERY, len(ids))), ("_of_all", len(ids))):
        hits, drawn = metrics.retrieval_counts(brain, seen[ids], gallery, seed=args.seed)
        found |= {name + suffix: {**summarise(partial(ratio, hits[name], drawn), len(ids), args.seed),
                                  "gallery": gallery} for name in names}
    return found, {}


def effective_ranks(images, args, paths):
    """How many dimensions the predicted features behind the images use, beside the true ones': {metric: entry}."""
    run, why = run_behind(images)
    feat = args.retrieval_feat
    if args.ground_truth or why or not paths.feature(feat).exists():
        return {}
    folder = paths.scores(run["subj"], scores_name(run, feat), feat)
    if not (folder / "nsdgeneral.npy").exists():
        return {}
    ids, predicted = load_scores(folder)
    true = open_feature(paths, feat)[ids]
    return {f"effective_rank_{feat}{suffix}": {"value": metrics.effective_rank(rows), "ci_low": None, "ci_high": None,
                                               "n": len(ids)} for suffix, rows in (("", predicted), ("_true", true))}


def ratio(hits, drawn, index):
    return hits[index].sum() / drawn[index].sum()


def run_behind(images):
    """The flags that name the scores the images were made from, as recon.py left them; or None and why not."""
    config = images.config
    if config is None:
        return None, f"{images.folder}/config.json, which says whose images these are, not found"
    lacking = [flag for flag in RUN_FLAGS if flag not in config]
    if lacking:
        return None, f"{images.folder}/config.json does not say {', '.join(lacking)}"
    return {flag: config[flag] for flag in RUN_FLAGS} | {"sd_model": config.get("sd_model")}, None


# --- results -----------------------------------------------------------------------------------------------------


def write_results(outdir, measured, differences, images, config, sheet):
    """The files beside the images, all or none; the first set of `measured` is the reconstructions."""
    main = next(iter(measured.values()))
    rows = [{"image_id": image_id, **{name: float(values[i]) for name, values in main.per_image.items()}}
            for i, image_id in enumerate(images.image_ids)]
    compared = {label: {"results": measured[label].results, "difference": found}
                for label, found in differences.items()}
    line = report.latex_row(config["options"]["method"], main.results)
    save_together({
        outdir / "metrics.json": write_json(main.results),
        outdir / "metrics_config.json": write_json(config),
        outdir / "metrics.tex": lambda path: path.write_text(line),
        outdir / "compared.json": write_json(compared),
        outdir / "metrics.csv": write_csv(table_of(measured)),
        outdir / "metrics_per_image.csv": write_csv(rows),
        outdir / "contact_sheet.png": lambda path: sheet.save(path, format="PNG")})


def table_of(measured):
    """Every value of every set as a row."""
    kept = ("value", "ci_low", "ci_high", "n", "missing")
    return [{"set": label, "metric": name, **{key: entry.get(key) for key in kept}}
            for label, found in measured.items() for name, entry in found.results.items()]


def write_subjects(found, paths, args):
    """A table with a row per subject and their mean; kept as outputs_all/<method>_subjects.json."""
    names = [name for name in next(iter(found.values())) if all(name in results for results in found.values())]
    names = [name for name in names if all(results[name]["n"] for results in found.values())]
    mean = {name: float(np.mean([results[name]["value"] for results in found.values()])) for name in names}
    file = paths.root / "outputs_all" / f"{images_name(vars(args))}_subjects.json"
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
        better = "  (lower is better)" if name in metrics.LOWER_IS_BETTER else ""
        gallery = f"  (of {entry['gallery']})" if "gallery" in entry else ""
        interval = "" if entry["ci_low"] is None else f"{entry['ci_low']:.3f} .. {entry['ci_high']:.3f}"
        lines.append(f"{name:<{width}}{entry['value']:>8.3f}   {interval:<18}{entry['n']:>6}{gallery}{better}")
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
