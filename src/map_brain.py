"""Map a subject's brain: how well each voxel is predicted, what decoders read from it, how hard it pulls a picture.

betas, GNet, decoders -> a value of every voxel -> NIfTI in the space of nsdgeneral, pictures, a table of regions

    python src/map_brain.py --subj 1
    python src/map_brain.py --subj 1 --feats c z --run ridge --outdir outputs_all/subj01/maps_ridge
    python src/map_brain.py --subj 1 --feats none --gnet_run gnet_published

Reads betas, wds/*, stimuli, components, train_logs/<runs>, regions, and NSD's nsdgeneral volume. Writes to
outputs_all/subj01/maps/, replacing what is there:
    encoding_r, noise_ceiling, share_of_ceiling, pull, reads_<feat>, costs_<feat> .nii.gz   NaN outside of nsdgeneral
    voxels.csv    all of them, and where each voxel lies     regions.csv   region by region, with intervals
    slices_*.png, glass_*.png, surface_*.png                 where nilearn is there (requirements-maps.txt)
What each map is, and how to look at it: docs/maps.md. Without --gnet_run or --feats, what was not trained is left out.
"""

import sys

import options
import utils
from disk.names import Paths, run_name, runs_of


def get_parser():
    parser = options.Parser(__doc__)
    options.add_paths(parser)
    options.add_subject(parser)
    options.add_run(parser)
    parser.add_argument("--run", type=options.run, default="finetune", metavar="STAGE[:SUBJ]",
                        help=f"whose decoders: {options.listed(options.STAGES)}, as of score.sh")
    parser.add_argument("--feats", type=feature_or_none, nargs="+", metavar="FEAT",
                        help="features whose decoders are mapped; none: no decoder (those that were trained)")
    parser.add_argument("--gnet_run", type=options.tag, metavar="RUN",
                        help="the encoding model: a folder of train_logs (gnet_<subj>)")
    options.add_regions(parser)
    parser.add_argument("--outdir", metavar="DIR", help="write there instead")
    options.add_compute(parser)
    return parser


def feature_or_none(text):
    return None if text == "none" else options.feature(text)


def main(argv=None):
    args = get_parser().parse_args(argv, writes=lambda given: [folder_of(given, Paths.from_args(given))])
    if args.run == "ground_truth":
        raise utils.UserError(f"--run ground_truth: reads no voxel; give {options.listed(options.STAGES)}")
    from disk.files import archive_hash
    from encoding.encoder import load_encoder
    from evaluation import brain_maps
    from evaluation.brain_pictures import draw
    from nsd.lesions import voxel_statistics
    from nsd.regions import roi_masks, voxel_space
    from nsd.rows import open_betas
    from nsd.trials import split_trials

    paths = Paths.from_args(args)
    folder = folder_of(args, paths)
    space, masks = voxel_space(paths, args.subj), roi_masks(paths, args.subj)
    maps, lines, absent, made_from, statistics = {}, [], {}, {}, {}
    own = run_name("scratch", args.subj, "gnet", None)
    if args.gnet_run or (paths.run(own) / "best.pth").exists():
        encoder = load_encoder(paths, args.subj, args.gnet_run, args.seed, utils.pick_device(args.device))
        made_from["gnet"] = {"run": encoder.run, "checkpoint_hash": archive_hash(encoder.file)}
        maps, lines = brain_maps.encoding_maps(paths, encoder, masks, args.seed)
    else:
        absent["encoding_r, noise_ceiling, pull"] = f"{own} was not trained (STAGES=gnet bash scripts/train.sh)"
    for feat, source in decoders(args, paths, absent).items():
        held_out = source.trained.held_out
        if held_out not in statistics:
            betas, trials = open_betas(paths, args.subj), split_trials(paths, args.subj, *held_out)[0]
            statistics[held_out] = voxel_statistics(betas, trials)
        found = brain_maps.decoder_maps(source, masks, *statistics[held_out], args.seed)
        maps, lines = maps | found[0], lines + found[1]
        made_from[feat] = {name: source.config.get(name) for name in ("run", "checkpoint_hash", "stacked_with")}
    if not maps:
        raise utils.UserError("nothing to map: " + "; ".join(absent.values()))
    config = {"subj": args.subj, "made_from": made_from, "options": vars(args), "git_commit": utils.git_commit(),
              "absent": absent}
    brain_maps.write_maps(folder, maps, lines, masks, space, config)
    print(brain_maps.format_lines(lines, ["encoding_r", "noise_ceiling", "share_of_ceiling", "pull"], "region"))
    for word, title in (("reads", "reads"), ("costs", "R2 without it"), ("only", "R2 from it")):
        feats = [feat for feat in options.FEATURES if f"{word}_{feat}" in {line.map for line in lines}]
        print("\n" + brain_maps.format_lines(lines, [f"{word}_{feat}" for feat in feats], title) if feats else "")
    for what, why in absent.items():
        print(f"left out: {what}: {why}")
    for said in draw(folder, maps, space, paths, args.subj):
        print(said)
    print(f"maps           {folder}")


def folder_of(args, paths):
    return paths.find(args.outdir) if args.outdir else paths.maps(args.subj)


def decoders(args, paths, absent):
    """{feature: scoring.Source} of the decoders that are mapped; those that are not there go to `absent`, or are an
    error where --feats names them."""
    from disk.hints import how_to_train
    from training.scoring import open_source
    from training.trained import Request, open_trained

    request = Request.from_args(args, overwrite=True)
    found, trained = {}, None
    for feat in options.FEATURES if args.feats is None else filter(None, args.feats):
        names = runs_of(request.flags, feat)
        if args.feats is None and not any((paths.run(name) / "last.pth").exists() for name in names):
            mend = how_to_train(paths, request.flags, feat)
            absent[f"reads_{feat}, costs_{feat}"] = f"{names[0]} was not trained ({mend})"
            continue
        trained = open_trained(request, feat, trained)
        found[feat] = open_source(trained, feat)
    return found


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
