"""Compare reconstructions with the images the subject saw: metrics, intervals, controls and a report.

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
    report/index.html      all of it, to browse  contact_sheet.png       seen and reconstructed
Values of several samples of one image are averaged first. Intervals: 95 %, bootstrap over images. What was extracted is
kept in outputs_all/.features, by content; an interrupted one continues. Protocol, controls and how to read a
report: docs/evaluation.md.
"""

import argparse
import sys

import options
import utils
from disk.names import Paths, images_name
from nsd import sources


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
                        help="the CLIP that judges; none: leave it out")
    parser.add_argument("--weights_dir", metavar="DIR",
                        help="torch.hub's folder, with weights (checkpoints/*.pth), SwAV's code and perhaps a folder "
                             "clip-vit-large-patch14 (torch's own, ~/.cache/torch/hub)")
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
    from evaluation.results import write_subjects
    from training.tracking import check_tracking

    check_tracking(args.wandb_log)
    for name in ("batch_size", "sheet_images"):
        if getattr(args, name) < 1:
            raise utils.UserError(f"--{name} {getattr(args, name)}: wanted at least 1")
    paths = Paths.from_args(args)
    if not args.subjects:
        evaluate(args, paths)
        return
    if args.images or args.outdir:
        raise utils.UserError("--subjects: their folders are named by the flags of recon.py; leave out --images, "
                              "--outdir")
    found = {}
    for subj in args.subjects:
        sessions = min(args.num_sessions, options.SESSIONS[subj])
        found[subj] = evaluate(argparse.Namespace(**{**vars(args), "subj": subj, "num_sessions": sessions}), paths)
    write_subjects(paths.root / "outputs_all" / f"{images_name(vars(args))}_subjects.json", found)


def evaluate(args, paths):
    """Measure one folder and write all results beside it; returns {metric: entry}."""
    from evaluation import controls
    from evaluation.decoded import check_rows, effective_ranks, retrieval, run_behind
    from evaluation.gallery import sheet_of
    from evaluation.measuring import Findings, Scale, brain_of, unmeasured
    from evaluation.networks import FeatureStore, load_networks
    from evaluation.picture_sets import PictureSet, check_ids, of_the_same_images, read_compared
    from evaluation.results import check_writable
    from nsd.rows import open_stimuli
    from sampling.folders import read_images

    # which pictures, and which run's scores they were drawn from
    images = read_images(images_folder(args, paths))
    stimuli = open_stimuli(paths)
    check_ids(images, stimuli)
    run, no_run = run_behind(images)
    check_rows(images, run, paths)
    compared = {} if args.ground_truth else read_compared(args.compare, paths.root)
    outdir = images.folder / "ground_truth" if args.ground_truth else images.folder
    outdir = paths.root.joinpath(args.outdir) if args.outdir else outdir
    for folder in (outdir, outdir / "report"):
        check_writable(folder)

    # who judges: networks, and the subject's own responses
    device = utils.pick_device(args.device)
    networks, missing = load_networks(args.eval_clip, device, args.weights_dir)
    if len(images.image_ids) == 1:
        missing |= dict.fromkeys((name for name in networks if name.endswith("_two_way")), "needs at least two images")
    subj = (images.config or {}).get("subj", args.subj)
    brain, no_brain = brain_of(paths, subj, images.image_ids, args.gnet_run, args.seed, device)
    if brain is None:
        missing["brain_correlation"] = no_brain

    # the reconstructions, and the features that they were drawn from
    seen = PictureSet.of_stimuli("seen", images.image_ids, stimuli)
    made = seen if args.ground_truth else PictureSet.of_folder("reconstructed", images)
    store = FeatureStore(paths.root / "outputs_all/.features", args.batch_size)
    scale = Scale(seen, networks, store, brain, args.seed)
    measured = {made.label: scale.measure(made)}
    found = measured[made.label].results
    if not args.ground_truth:
        entries, reasons = retrieval(run, no_run, paths, args.retrieval_feat, args.seed)
        found |= entries | effective_ranks(run, paths, args.retrieval_feat)
        missing |= reasons
    found |= unmeasured(missing)

    # what they are compared with: other folders, null controls, ceilings
    others, absent = {label: PictureSet.of_folder(label, other) for label, other in compared.items()}, {}
    if args.controls and not args.ground_truth:
        drawn, absent = controls.drawn(images, [other.folder for other in compared.values()])
        plain, reasons = controls.without_decoder(seen, run, no_run, paths, args.retrieval_feat, store, device)
        others |= drawn | plain
        absent |= reasons
        absent["baseline: ridge"] = "score and draw it with --run ridge --method NAME, and give it as --compare"
    others, lacking = of_the_same_images(others, images.image_ids)
    measured |= {label: scale.measure(pictures) for label, pictures in others.items()}
    differences = {label: scale.differences(measured[made.label], measured[label]) for label in others}

    sheet = sheet_of(images, compared, stimuli, found, args.sheet_images, made=not args.ground_truth)
    note = brain.note((images.config or {}).get("gnet_run")) if brain else None
    write(outdir, Findings(images, {"seen": seen, made.label: made, **others}, measured, differences, absent | lacking),
          sheet, note, paths, args)
    return found


def write(outdir, findings, sheet, note, paths, args):
    """Everything that was found: to files, to the report, to W&B and to the terminal."""
    from evaluation import report
    from evaluation.results import format_table, table_of, write_results
    from sampling.folders import name_of
    from training.tracking import Tracker

    folder, results = findings.images.folder, findings.results
    config = {"protocol": "mindeye2", "images": str(folder), "n_samples": findings.n_samples,
              "git_commit": utils.git_commit(), "options": vars(args), "brain_correlation": note}
    write_results(outdir, findings, config, sheet)
    report.write(outdir / "report", findings, config, paths)

    name = f"evaluate_{args.subj}_{name_of(folder)}".replace(" ", "_")
    tracker = Tracker(outdir, name, vars(args), args.wandb_log, args.wandb_project)
    tracker.log({f"eval/{metric}": entry["value"] for metric, entry in results.items() if entry["n"]}, step=0)
    tracker.log_table("eval/metrics", table_of(findings.measured), step=0)
    tracker.log_images("eval/contact_sheet", [sheet], [str(folder)], step=0)
    tracker.finish()
    print(format_table(results))
    if note:
        print(f"brain_correlation: {note}")
    for label, why in findings.absent.items():
        print(f"{label}: not measured, {why}")
    print(f"metrics        {outdir / 'metrics.json'}\ncontact sheet  {outdir / 'contact_sheet.png'}\n"
          f"report         {outdir / 'report/index.html'}")


def images_folder(args, paths):
    """--images, or the folder the flags name (recon.py's rules); without --guidance_scale the only one there is."""
    if args.images:
        return paths.root.joinpath(args.images)  # an absolute path stays as it is
    if args.guidance_scale is not None:
        return paths.images_of(vars(args))
    sets = paths.images_of({**vars(args), "guidance_scale": 0}).parent.parent
    found = sorted(sets.glob(f"*/{args.guidance_strength:g}/index.csv"))
    if len(found) != 1:
        scales = ", ".join(path.parent.parent.name for path in found) or "none"
        raise utils.UserError(f"--guidance_scale: not given, and {sets} has reconstructions of: {scales} (strength "
                              f"{args.guidance_strength:g}); name one, or reconstruct first (bash scripts/recon.sh)")
    return found[0].parent


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
