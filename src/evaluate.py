"""Compare reconstructions with the images the subject saw: metrics, intervals, controls and a report.

PNGs + index.csv of recon.py, stimuli -> protocol `mindeye2` -> a value per metric, report/index.html, a contact sheet

    python src/evaluate.py --subj 1 --guidance_scale 300000 --guidance_strength 0.2
    python src/evaluate.py --images outputs_all/subj01/cp_4096_v1/300000/0.2 --compare shuffled=DIR unguided=DIR
    python src/evaluate.py --subjects 1 2 5 7        # a row for each, and their mean
    python src/evaluate.py --images DIR --seen     # the seen images against themselves: every metric's best

Of recon.py's flags only those are needed that name the folder: --subj, --method, --guidance_scale, --guidance_strength,
--control, --voxels, --without, --test_split, --repeats, --hold_out, --run ground_truth, --use_adapter, --select,
--use_gnet with --gnet_roi and --gnet_kappa. What else was set is read from the folder's config.json; --images DIR
needs none of them.

Reads index.csv and config.json of the images, nsd_stimuli.hdf5, the scores behind them and, for brain
correlation, betas and the GNet of --gnet_run. Beside the images it writes
    metrics.json           the values            metrics_per_image.csv   a row per image
    metrics.csv            every row of the table   metrics.tex          a line for a paper
    parts.json             of NSD-synthetic, and of a cluster that was held out: the values of each part
    compared.json          each --compare and control: its values, and the difference, images paired
    report/index.html      all of it, to browse  contact_sheet.png       seen and reconstructed
    rating/index.html      with --rating_page: blinded trials for people, whose answers --ratings reads
Values of several samples of one image are averaged first. Intervals: 95 %, bootstrap over images; exact for rates that
are 0 or 1 of every image. The results before are replaced; --outdir keeps both. What was extracted is kept, by
content (outputs_all/.features, --cache_gb); an interrupted one continues. A folder or file is looked for from the
current folder, then from --root. Protocol, controls and how to read a report: docs/evaluation.md.
"""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor

import options
import utils
from disk.names import Paths, images_name
from nsd import sources

FEW = 20  # images
TABLE_IMAGES = 200  # rows of the table of images on W&B
NEEDED = "--method, --guidance_scale, --guidance_strength, --control, --run, --use_gnet, ..., or --images DIR"


class Parser(options.Parser):
    """A parser for those who come from recon.py with all its flags."""

    def error(self, message):
        more = f"; evaluate needs only the flags that name the folder: {NEEDED}"
        super().error(message + more * message.startswith("unrecognized"))


def get_parser():
    parser = Parser(__doc__)
    options.add_paths(parser)
    options.add_subject(parser)
    options.add_run(parser)
    options.add_scored_run(parser)
    options.add_control(parser)
    options.add_lesion(parser)
    options.add_guidance_folder(parser)
    options.add_gnet(parser)
    parser.add_argument("--images", metavar="DIR", help="folder of reconstructions; instead of naming it by flags")
    parser.add_argument("--outdir", metavar="DIR", help="where the results go (beside the images)")
    parser.add_argument("--seen", action=argparse.BooleanOptionalAction, default=False,
                        help="measure the seen images themselves; results go to seen/ beside the images")
    parser.add_argument("--eval_clip", default=sources.EVAL_CLIP, metavar="NAME|DIR",
                        help="the CLIP that judges; none: leave it out")
    parser.add_argument("--weights_dir", metavar="DIR",
                        help="torch.hub's folder, with weights (checkpoints/*.pth) and perhaps a folder "
                             "clip-vit-large-patch14 (torch's own, ~/.cache/torch/hub)")
    parser.add_argument("--retrieval_feat", type=options.feature, default="c", metavar="FEAT",
                        help="feature whose brain embeddings are retrieved")
    parser.add_argument("--compare", nargs="+", default=[], metavar="[LABEL=]DIR",
                        help="further reconstructions of the same images: measured, compared image by image, shown")
    parser.add_argument("--rating_page", metavar="LABEL",
                        help="write rating/index.html, too: blinded trials, whether the reconstruction or that set's "
                             "picture is nearer to the seen one")
    parser.add_argument("--ratings", nargs="+", default=[], metavar="FILE",
                        help="answers that people saved from a rating page, a file for each")
    parser.add_argument("--controls", action=argparse.BooleanOptionalAction, default=True,
                        help="measure null controls and ceilings too")
    parser.add_argument("--subjects", type=options.subject, nargs="+", metavar="S",
                        help="evaluate each of these, in the folders that the other flags name, and their mean")
    parser.add_argument("--cache_gb", type=float, default=20.0, metavar="GB",
                        help="extracted features to keep in outputs_all/.features, those used last; 0 empties it")
    parser.add_argument("--sheet_images", type=options.whole, default=40, metavar="IMAGES", help="size of the sheet")
    parser.add_argument("--batch_size", type=options.whole, default=16, metavar="IMAGES")
    options.add_compute(parser)
    options.add_tracking(parser)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    from evaluation.results import write_subjects
    from training.tracking import check_tracking

    check_tracking(args.wandb_log)
    for name in ("batch_size", "sheet_images"):
        if getattr(args, name) < 1:
            raise utils.UserError(f"--{name} {getattr(args, name)}: wanted at least 1")
    if args.cache_gb < 0:
        raise utils.UserError(f"--cache_gb {args.cache_gb:g}: wanted at least 0, which keeps nothing")
    paths = Paths.from_args(args)
    if not args.subjects:
        evaluate(args, paths)
        return
    if args.images or args.outdir:
        raise utils.UserError("--subjects: their folders are named by the flags of recon.py; leave out --images, "
                              "--outdir")
    found = {}
    for subj in args.subjects:
        known = paths.sessions(subj) or args.num_sessions
        sessions = known if args.num_sessions == paths.sessions(args.subj) else min(args.num_sessions, known)
        found[subj] = evaluate(argparse.Namespace(**{**vars(args), "subj": subj, "num_sessions": sessions}), paths)
    write_subjects(paths.root / "outputs_all" / f"{images_name(vars(args))}_subjects.json", found)


def evaluate(args, paths):
    """Measure one folder and write all results beside it; returns {metric: entry}."""
    from disk.hub import find_model
    from evaluation import controls, rating, report
    from evaluation.curves import curves_of
    from evaluation.decoded import check_rows, effective_ranks, retrieval, run_behind, variance_explained, voxels_of
    from evaluation.gallery import sheet_of
    from evaluation.measuring import Findings, Scale, brain_of, unmeasured
    from evaluation.networks import FeatureStore, load_networks
    from evaluation.parts import measure_parts, parts_of
    from evaluation.picture_sets import MADE, SEEN, PictureSet, check_ids, of_the_same_images, read_compared, unlike
    from evaluation.results import check_writable, format_findings, no_longer_compared, write_results
    from nsd.synthetic import stimuli_of
    from sampling.folders import features_in, name_of, read_images

    # which pictures, and which run's scores they were drawn from
    images = read_images(images_folder(args, paths))
    subj = (images.config or {}).get("subj", args.subj)
    stimuli = stimuli_of(paths, subj, images.image_ids)
    check_ids(images, stimuli)
    run, no_run = run_behind(images)
    check_rows(images, run, paths)
    compared = {} if args.seen else read_compared(args.compare, paths, taken=(SEEN, MADE, *controls.LABELS))
    outdir = images.folder / "seen" if args.seen else images.folder
    outdir = paths.find(args.outdir) if args.outdir else outdir
    eval_clip = args.eval_clip
    if eval_clip != "none" and args.weights_dir is None:
        hint = " or ".join(filter(None, (sources.how_to_fetch(eval_clip), "leave it out (--eval_clip none)")))
        eval_clip = find_model(eval_clip, paths, "--eval_clip", hint)
    for folder in (outdir, outdir / "report"):
        check_writable(folder)
    if args.rating_page and args.rating_page not in (*compared, *controls.LABELS):
        raise utils.UserError(f"--rating_page {args.rating_page}: wanted the label of a set: "
                              f"{', '.join((*compared, *controls.LABELS))}; --compare it")
    answers = rating.load_answers([paths.find(file) for file in args.ratings])
    remarks = [no_longer_compared(outdir, compared)]
    what = "the seen images" if args.seen else "pictures"
    print(f"{images.folder}: {what} of {len(images.image_ids)} images, compared with what was seen", flush=True)

    # who judges: networks, and the subject's own responses
    device = utils.pick_device(args.device)
    weights_dir = paths.find(args.weights_dir) if args.weights_dir else None
    networks, missing = load_networks(eval_clip, device, weights_dir)
    if len(images.image_ids) == 1:
        missing |= dict.fromkeys((name for name in networks if name.endswith("_two_way")), "needs at least two images")
    brain, no_brain = brain_of(paths, subj, images.image_ids, args.gnet_run, args.seed, device)
    if brain is None:
        missing["brain_correlation"] = no_brain

    # the reconstructions, and the features that they were drawn from
    seen = PictureSet.of_stimuli(SEEN, images.image_ids, stimuli)
    made = seen if args.seen else PictureSet.of_folder(MADE, images)
    store = FeatureStore(paths.root / "outputs_all/.features", args.batch_size)
    scale = Scale(seen, networks, store, brain, args.seed)
    with ThreadPoolExecutor(1) as beside:  # a VAE is loaded while networks look
        undecoded = beside.submit(controls.without_decoder, seen, run, no_run, paths, args.retrieval_feat, store,
                                  device) if args.controls and not args.seen else None
        measured = {made.label: scale.measure(made)}
    found, explained = measured[made.label].results, {}
    if not args.seen:
        entries, reasons = retrieval(run, no_run, paths, args.retrieval_feat, args.seed)
        tested, explained = variance_explained(run, paths, features_in(images.config or {}), args.seed)
        found |= tested | entries | effective_ranks(run, paths, args.retrieval_feat)
        missing |= reasons
    found |= unmeasured(missing)

    # what they are compared with: other folders, null controls, ceilings
    drawn, plain, absent = {}, {}, {}
    if undecoded:
        drawn, absent = controls.drawn(images, [other.folder for other in compared.values()])
        plain, reasons = undecoded.result()
        absent |= reasons
        if not any((other.config or {}).get("run") == "ridge" for other in compared.values()):
            absent["baseline: ridge"] = "score and draw it with --run ridge --method ridge, and --compare it"
    others = {label: PictureSet.of_folder(label, other) for label, other in (compared | drawn).items()} | plain
    whole, lacking = of_the_same_images(others, images.image_ids)
    if args.rating_page:
        if args.rating_page not in whole:
            why = (absent | lacking).get(args.rating_page, "these images are that set")
            raise utils.UserError(f"--rating_page {args.rating_page}: not there to be rated: {why}")
        rating.write_page(outdir / "rating", seen, made, whole[args.rating_page], args.seed, paths)
    ratings = rating.resolve(answers, seen, made, whole, args.seed)
    measured |= {label: scale.measure(pictures) for label, pictures in whole.items()}
    differences = {label: scale.differences(measured[made.label], measured[label]) for label in whole}

    curves = curves_of(images, {label: other for label, other in (compared | drawn).items() if label in whole},
                       made.label, voxels_of(run, paths))
    for label, other in compared.items():
        if label in whole and (how := unlike(images, other)):
            remarks.append(f"{label}: drawn otherwise than what is evaluated: {how}")
    if len(images.image_ids) < FEW:
        remarks.append(f"n = {len(images.image_ids)}: intervals and ranks of so few images say little")

    shown = {} if args.seen else {MADE: made, **others}
    sheet = sheet_of(name_of(images.folder), seen, shown, found, args.sheet_images)
    findings = Findings(
        images, {SEEN: seen, made.label: made, **whole}, measured, differences, absent | lacking,
        tuple(filter(None, remarks)), scale.kinds, ratings, explained, tuple(curves),
        parts=measure_parts(measured, parts_of(images, stimuli, paths), args.seed), n_stimuli=len(stimuli),
        note=brain.note((images.config or {}).get("gnet_run")) if brain else None)
    folders = {label: paths.as_recorded(other.folder) for label, other in (compared | drawn).items()}
    config = {"protocol": "mindeye2", "images": str(images.folder), "n_samples": findings.n_samples,
              "stimuli": findings.n_stimuli, "git_commit": utils.git_commit(), "options": vars(args),
              "brain_correlation": findings.note}
    write_results(outdir, findings, config, sheet, folders)
    report.write(outdir / "report", findings, config, paths)
    show(outdir, findings, sheet, folders, paths, args)
    print(format_findings(findings))
    if args.rating_page:
        print(f"rating page    {outdir / 'rating/index.html'}")
    print(f"metrics        {outdir / 'metrics.json'}\ncontact sheet  {outdir / 'contact_sheet.png'}\n"
          f"report         {outdir / 'report/index.html'}")
    kept = store.trim(args.cache_gb * 1e9)
    print(f"kept features  {store.folder}, {utils.in_bytes(kept)} of --cache_gb {args.cache_gb:g} (0 empties it)")
    return found


def show(outdir, findings, sheet, folders, paths, args):
    """Show W&B what was found: values with their intervals, tables, pictures, and what all of it was made from."""
    from disk.files import file_hash
    from evaluation.results import table_of
    from sampling.folders import name_of, set_hash
    from training.settings import Wandb
    from training.tracking import Dashboard

    folder = findings.images.folder
    name = f"evaluate_{args.subj}_{name_of(folder)}".replace(" ", "_")
    asked = Wandb.from_args(args).of("evaluate", name_of(folder).partition(" ")[0])
    board = Dashboard(outdir, name, vars(args), asked)
    board.log(shown_values(findings.results))
    board.log_table("eval/metrics", table_of(findings.measured))
    board.log_table("eval/images", rows_of_images(findings))
    board.log_images("eval/contact_sheet", [sheet], [str(folder)])
    for pictures in (folder, *map(paths.find, folders.values())):
        board.uses("pictures", pictures / "index.csv", lambda index: set_hash(index.parent))
    board.makes("evaluation", outdir / "metrics.json", file_hash)
    board.finish()


def shown_values(results):
    """{key: value} that W&B shows of {metric: entry}: each value, and the ends of its interval."""
    parts = {"value": "", "ci_low": "_low", "ci_high": "_high"}
    return {f"eval/{metric}{end}": entry[part] for metric, entry in results.items() if entry["n"]
            for part, end in parts.items() if entry[part] is not None}


def rows_of_images(findings):
    """Yield a row for each image, at most TABLE_IMAGES, evenly chosen: its id, every set's picture, its metrics."""
    ids = findings.images.image_ids
    for i in utils.evenly(len(ids), TABLE_IMAGES):
        yield ({"image_id": int(ids[i])} | {label: pictures.read(i, 0) for label, pictures in findings.sets.items()}
               | {name: float(values[i]) for name, values in findings.per_image.items()})


def images_folder(args, paths):
    """--images, or the folder the flags name (recon.py's rules); of what they leave open, the only one there is."""
    if args.images:
        from evaluation.picture_sets import find_set

        return find_set(paths, f"--images {args.images}", args.images)
    method = paths.images(args.subj, images_name(vars(args)), 0, 0).parent.parent
    names = ["*" if value is None else f"{value:g}" for value in (args.guidance_scale, args.guidance_strength)]
    folder = method / ("0/0" if "0" in names else "/".join(names))
    found = sorted(file.parent for file in method.glob(f"{folder.relative_to(method)}/index.csv"))
    found = [drawn for drawn in found if drawn != method / "0/0"] or found  # the guided ones are meant
    if len(found) == 1:
        return found[0]
    from disk.hints import pictures_like

    there = pictures_like(paths, vars(args))
    what = f"{folder}: {len(found)} sets of these names, wanted one" if found else (
        f"{folder}: reconstructions (index.csv) not found")
    raise utils.UserError(f"{what}; " + (f"{there}: give the flags of one, or " if there else "")
                          + "reconstruct first (bash scripts/recon.sh)")


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
