"""Check that everything a plan needs is there and correct, and name the command that repairs each defect.

    python src/check_data.py                                      # all stages, all subjects: what pretraining needs
    python src/check_data.py --subj 1 --stages train score        # subject 1 alone
    python src/check_data.py --deep                               # also every value of every file (minutes to hours)

Reads what the stages read, with the same functions: what passes here will load there. Without --deep it takes seconds
(and, the first time, a minute for the shards, which are then kept unpacked): sizes, shapes, keys, ids and a sample of
rows. Files of NSD's full size are checked against its published numbers of trials and voxels, smaller worlds against
themselves, imported data (import_data.py) against what was imported. Prints a table; exit
status 1 when something needs repair.
"""

import shlex
import sys
from functools import partial
from pathlib import Path

import options
import utils
from disk.names import Paths
from nsd import sources

WEIGHTS = {"sd": "sd_model", "taesd": "guidance_decoder", "clip": "clip_model", "eval_clip": "eval_clip"}  # group: flag


def get_parser():
    parser = options.Parser(__doc__)
    options.add_paths(parser)
    options.add_regions(parser)
    parser.add_argument("--subj", "--subject", dest="subjects", nargs="+", type=options.subject,
                        metavar="1..99", help="whose data (all: NSD's eight, which pretraining needs, or those that "
                                              "import_data.py imported)")
    parser.add_argument("--stages", nargs="+", choices=list(sources.STAGES), default=list(sources.STAGES),
                        metavar="STAGE", help="stages to check for: " + ", ".join(sources.STAGES) + " (all)")
    parser.add_argument("--feats", nargs="+", type=options.feature, default=options.FEATURES,
                        metavar="FEAT", help="features to train on (c z g_2 ... g_12)")
    parser.add_argument("--model", choices=options.MODELS, default="components",
                        help="what will be trained; mindeye2 needs no components")
    parser.add_argument("--sd_model", default=sources.SD_MODEL, metavar="NAME|DIR")
    parser.add_argument("--guidance_decoder", default=sources.TAESD, metavar="full|half|NAME|DIR")
    parser.add_argument("--clip_model", default=sources.CLIP_MODEL, metavar="NAME|DIR")
    parser.add_argument("--eval_clip", default=sources.EVAL_CLIP, metavar="NAME|DIR")
    parser.add_argument("--deep", action="store_true", help="read every value: finds NaN and rows never written")
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    from nsd import checks

    world = checks.World(Paths.from_args(args))
    wrong = [subj for subj in args.subjects or () if subj not in world.subjects]
    if wrong:
        numbers = " ".join(str(int(subj[4:])) for subj in world.subjects)
        raise utils.UserError(f"--subj {int(wrong[0][4:])}: wanted {numbers}, whose data are in {world.paths.root}")
    args.subjects = args.subjects or world.subjects
    for flag in WEIGHTS.values():
        setattr(args, flag, world.paths.model(getattr(args, flag)))
    if not world.own and nothing_is_there(world.paths, args.subjects, args.stages):
        everyone = args.subjects == sources.SUBJECTS
        whose = "" if everyone else " --subj " + " ".join(str(int(subj[4:])) for subj in args.subjects)
        print(f"nothing is in {world.paths.root} yet: {root_of(world.paths)}bash scripts/download.sh{whose}")
        raise SystemExit(1)
    looks = utils.progress(list(everything_to_look_at(world, args)), desc="looking", leave=False, disable=None)
    findings = [checks.examine(what, mend, look) for what, mend, look in looks]
    if checks.report(findings):
        raise SystemExit(1)


def nothing_is_there(paths, subjects, stages):
    """Whether none of the files is there that these stages need of the data sets (weights lie elsewhere)."""
    groups = {group for stage in stages for group in sources.STAGES[stage]}
    files = [file for group in groups for file in sources.files_of(group, subjects)]
    places = [(paths.data_path if file.origin == "hub" else paths.root, file.local) for file in files]
    return bool(places) and not any(next(folder.glob(pattern), None) for folder, pattern in places)


def root_of(paths):
    """What stands in front of a command for this root."""
    return "" if paths.root == utils.REPOSITORY else f"ROOT={shlex.quote(str(paths.root))} "


def everything_to_look_at(world, args):
    """Yield (what, the command that repairs it, function that looks) in the order of the table."""
    from nsd import checks

    paths = world.paths
    groups = {group for stage in args.stages for group in sources.STAGES[stage]}
    root = root_of(paths)

    def download(group, *files, subj=None):
        """The command that fetches a group again; files of NSD's bucket have no checksum that --verify could use.

        Of imported data: the one that imports all of it again.
        """
        if world.own:
            return f"{world.own['command']} --overwrite"
        damaged = "".join(f"rm {file}; " for file in files if file.exists())
        who = f" --subj {int(subj[4:])}" if subj else ""
        return f"{damaged}{root}bash scripts/download.sh --what {group}{who}" + ("" if files else " --verify")

    table, design = (paths.experiments / name for name in ("nsd_stim_info_merged.csv", "nsd_expdesign.mat"))
    if world.own:
        yield "import", download("design"), partial(checks.look_at_import, world)
    if "design" in groups:
        yield "design: stimuli", download("design", table), partial(checks.look_at_table, world)
        yield "design: shared images", download("design", table, design), partial(checks.look_at_shared, world)
        for subj in args.subjects:
            yield f"design: {subj}", download("design", design), partial(checks.look_at_design, world, subj)
    if "stimuli" in groups:
        file = paths.stimuli / "nsd_stimuli.hdf5"
        yield "stimuli", download("stimuli", file), partial(checks.look_at_stimuli, world, args.deep)
    if "captions" in groups:
        mend = download("captions", paths.captions)
        if world.own and not paths.captions.exists():
            mend = f"python src/img2feat.py --root {shlex.quote(str(paths.root))} --feats c --caption_model DIR"
        yield "captions", mend, partial(checks.look_at_captions, paths)
    for subj in args.subjects:
        if "betas" in groups:
            yield f"betas: {subj}", download("betas", subj=subj), partial(checks.look_at_betas, world, subj, args.deep)
        if "trials" in groups:
            mend = download("trials", subj=subj)
            yield f"trials: {subj}", mend, partial(checks.look_at_trials, world, subj)
            if not world.own:
                yield f"old test trials: {subj}", mend, partial(checks.look_at_old_test, world, subj)
        if "score" in args.stages and paths.synthetic_betas(subj).exists():  # who fetched it wants it checked
            files = [paths.root / file.local for file in sources.files_of("synthetic", [subj])]
            mend = download("synthetic", *files, subj=subj)
            yield f"NSD-synthetic: {subj}", mend, partial(checks.look_at_synthetic, world, subj, args.deep)
        if "masks" in groups:
            yield f"regions: {subj}", download("masks rois", subj=subj), partial(checks.look_at_masks, world, subj)
    for group, flag in WEIGHTS.items():
        name = getattr(args, flag)
        if group in groups and name not in ("none", "full", "half"):
            mend = f"give --{flag} a folder written by save_pretrained" if Path(name).is_dir() else \
                f"bash scripts/download.sh --what {group}"
            yield f"weights: {group}", mend, partial(checks.look_at_weights, group, name)
    if "train" in args.stages:
        for feat in args.feats:
            again = f" --feats {feat} --overwrite" if paths.feature(feat).exists() else ""
            look = partial(checks.look_at_feature, world, feat, args.subjects, args.deep)
            yield f"feature: {feat}", f"{root}bash scripts/features.sh{again}", look
            file = paths.components(feat)
            mend = f"{root}bash scripts/features.sh" + (f" --feats {feat}" if again else "")
            look = partial(checks.look_at_components, world, feat, args.subjects, args.deep, args.model)
            yield f"components: {feat}", (f"rm {file}; " if file.exists() else "") + mend, look
    room = partial(checks.look_at_disk, world, args.feats, args.stages, args.model)
    yield "disk", "make room, or put ROOT on another disk", room
    yield "memory", "", partial(checks.look_at_memory, args.model)
    yield "GPU", "", checks.look_at_gpu


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
