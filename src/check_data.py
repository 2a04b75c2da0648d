"""See whether everything a plan needs is there and right, and say for each defect which command mends it.

    python src/check_data.py                                      # all stages, all subjects: what pretraining needs
    python src/check_data.py --subj 1 --stages train score        # subject 1 alone
    python src/check_data.py --deep                               # also every value of every file (minutes to hours)

Reads what the stages read, by the same functions, so what passes here loads there. Without --deep it takes seconds
(and, the first time, a minute for the shards, which are then kept unpacked): sizes, shapes, keys, ids and a sample of
rows. Files of NSD's full size are held against its published numbers of trials and voxels, smaller worlds against
themselves. Prints a table; exit status 1 when something has to be mended.
"""

import os
import re
import shutil
import sys
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import options
import utils
from disk.names import Paths
from nsd import sources
from nsd.captions import load_captions
from nsd.design import check_shared_images, check_trial_images, load_stimulus_table
from nsd.regions import roi_masks
from nsd.rows import open_betas, open_feature, open_stimuli
from nsd.sources import SUBJECTS
from nsd.trials import load_trials

SAMPLE = 16  # rows of a file that are looked at without --deep
RUN_BYTES = 6e9  # pretraining and fine-tuning of one feature at --hidden_dim 1024 (benchmarks/stage_costs.py)
MEMORY = 16e9  # bytes of main memory that training c at its defaults takes (benchmarks/bench_train.py)


def get_parser():
    parser = options.Parser(__doc__)
    options.add_paths(parser)
    parser.add_argument("--subj", "--subject", dest="subjects", nargs="+", type=options.subject, default=SUBJECTS,
                        metavar="1..8", help="whose data (all eight, which pretraining needs)")
    parser.add_argument("--stages", nargs="+", choices=list(sources.STAGES), default=list(sources.STAGES),
                        metavar="STAGE", help="what is to be run: " + ", ".join(sources.STAGES) + " (all)")
    parser.add_argument("--feats", nargs="+", type=options.feature, default=options.FEATURES,
                        metavar="FEAT", help="features to train on (c z g_2 ... g_12)")
    parser.add_argument("--sd_model", default=sources.SD_MODEL, metavar="NAME|DIR")
    parser.add_argument("--clip_model", default=sources.CLIP_MODEL, metavar="NAME|DIR")
    parser.add_argument("--eval_clip", default=sources.EVAL_CLIP, metavar="NAME|DIR")
    parser.add_argument("--deep", action="store_true", help="read everything: no NaN, no rows that were never written")
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    world = World(Paths.from_args(args))
    looks = tqdm(list(checks(world, args)), desc="looking", leave=False, disable=None)
    findings = [examine(what, mend, look) for what, mend, look in looks]
    if report(findings):
        raise SystemExit(1)


class World:
    """The data under a root; what several looks need is read once."""

    def __init__(self, paths):
        self.paths, self._trials = paths, {}

    @cached_property
    def n_images(self):
        return len(load_stimulus_table(self.paths))

    @property
    def is_nsd(self):
        """Whether this is the full data set, of which published numbers hold."""
        return self.n_images == sources.N_IMAGES

    def trials(self, subj, split):
        """Table of a subject's trials (load_trials)."""
        if (subj, split) not in self._trials:
            self._trials[subj, split] = load_trials(self.paths, subj, split)
        return self._trials[subj, split]


class Finding(NamedTuple):
    status: str  # ok, warn or fail
    what: str
    found: str
    mend: str  # a command; "" where nothing is to be mended


class Doubt(Exception):
    """What a check finds that can be lived with."""


class Unfinished(utils.UserError):
    """A feature file that the command that began it will go on with."""


def examine(what, mend, look):
    """Run one check: look() -> what is there; a UserError is a defect, a Doubt a warning."""
    try:
        return Finding("ok", what, look(), "")
    except Doubt as doubt:
        return Finding("warn", what, str(doubt), mend)
    except Unfinished as defect:
        return Finding("fail", what, str(defect), mend.removesuffix(" --overwrite"))
    except (utils.UserError, OSError) as defect:
        return Finding("fail", what, str(defect), mend)


def report(findings):
    """Print the table, and the commands in the order in which to run them; returns the number of failures."""
    width = max(len(finding.what) for finding in findings)
    for status, what, found, mend in findings:
        print(f"{status:<5} {what:<{width}}  {found}")
        if mend:
            print(f"{'':<5} {'':<{width}}  -> {mend}")
    counts = {status: sum(finding.status == status for finding in findings) for status in ("ok", "warn", "fail")}
    print(", ".join(f"{n} {status}" for status, n in counts.items()))
    commands = dict.fromkeys(finding.mend for finding in findings if finding.status == "fail" and finding.mend)
    if commands:
        print("to mend what failed, in this order:", *commands, sep="\n    ")
    return counts["fail"]


def checks(world, args):
    """Everything to look at: (what, the command that mends it, function that looks)."""
    paths = world.paths
    groups = {group for stage in args.stages for group in sources.STAGES[stage]}
    root = "" if paths.root == utils.REPOSITORY else f"ROOT={paths.root} "

    def download(group, *files, subj=None):
        """The command that fetches a group again; files of NSD's bucket have no checksum that --verify could use."""
        damaged = "".join(f"rm {file}; " for file in files if file.exists())
        who = f" --subj {int(subj[4:])}" if subj else ""
        return f"{damaged}{root}bash scripts/download.sh --what {group}{who}" + ("" if files else " --verify")

    table, design = (paths.experiments / name for name in ("nsd_stim_info_merged.csv", "nsd_expdesign.mat"))
    if "design" in groups:
        yield "design: stimuli", download("design", table), lambda: f"{world.n_images} images"
        yield "design: shared images", download("design", table, design), lambda: look_at_shared(world)
        for subj in args.subjects:
            yield f"design: {subj}", download("design", design), lambda subj=subj: look_at_design(paths, subj)
    if "stimuli" in groups:
        file = paths.stimuli / "nsd_stimuli.hdf5"
        yield "stimuli", download("stimuli", file), lambda: look_at_stimuli(world, args.deep)
    if "captions" in groups:
        yield "captions", download("captions", paths.captions), lambda: look_at_captions(paths)
    for subj in args.subjects:
        if "betas" in groups:
            yield (f"betas: {subj}", download("betas", subj=subj),
                   lambda subj=subj: look_at_betas(world, subj, args.deep))
        if "trials" in groups:
            yield f"trials: {subj}", download("trials", subj=subj), lambda subj=subj: look_at_trials(world, subj)
            yield (f"old test trials: {subj}", download("trials", subj=subj),
                   lambda subj=subj: look_at_old_test(world, subj))
        if "masks" in groups:
            yield f"regions: {subj}", download("masks rois", subj=subj), lambda subj=subj: look_at_masks(paths, subj)
    for group, flag in (("sd", "sd_model"), ("clip", "clip_model"), ("eval_clip", "eval_clip")):
        name = getattr(args, flag)
        if group in groups and name != "none":
            mend = f"give --{flag} a folder written by save_pretrained" if Path(name).is_dir() else \
                f"bash scripts/download.sh --what {group}"
            yield f"weights: {group}", mend, lambda group=group, name=name: look_at_weights(group, name)
    if "train" in args.stages:
        for feat in args.feats:
            again = f" --feats {feat} --overwrite" if paths.feature(feat).exists() else ""
            yield f"feature: {feat}", f"{root}bash scripts/features.sh{again}", lambda feat=feat: look_at_feature(
                world, feat, args)
    yield "disk", "make room, or put ROOT on another disk", lambda: look_at_disk(world, args)
    yield "memory", "", look_at_memory
    yield "GPU", "", look_at_gpu


# --- the looks ----------------------------------------------------------------------------------------------------


def expect(file, what, found, wanted):
    if found != wanted:
        raise utils.UserError(f"{file}: {found} {what}, wanted {wanted}")


def look_at_shared(world):
    shared = check_shared_images(world.paths)
    if world.is_nsd:
        expect(world.paths.data_path / "shared1000.npy", "shared images", len(shared), 1000)
    return f"{len(shared)} shared images, the same in all three lists"


def look_at_design(paths, subj):
    return f"{check_trial_images(paths, subj)} trials, the same images in both lists"


def sample_of(n, deep):
    """Batches of row numbers to look at: all, or a few spread over the file."""
    rows = np.arange(n) if deep else np.unique(np.linspace(0, n - 1, SAMPLE).astype(np.int64))
    return np.array_split(rows, -(-len(rows) // 256))


def look_at_rows(rows, deep, numbers=None):
    """Raise UserError for rows (of these numbers) that are NaN or infinite, or all zero: a hole in the file."""
    numbers = np.arange(len(rows)) if numbers is None else numbers
    for part in tqdm(sample_of(len(numbers), deep), desc=rows.path.name, unit="batch", leave=False, delay=3):
        values = rows[numbers[part]].reshape(len(part), -1)
        if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
            bad = numbers[part][~np.isfinite(values).all(1)][0]
            raise utils.UserError(f"{rows.path}: row {bad} holds NaN or infinite values")
        if not values.any(1).all():
            raise utils.UserError(f"{rows.path}: row {numbers[part][~values.any(1)][0]} is all zeros, as in a hole")


def looked(deep):
    return "all rows read" if deep else f"{SAMPLE} rows read"


def look_at_stimuli(world, deep):
    stimuli = open_stimuli(world.paths)
    expect(stimuli.path, "images", len(stimuli), world.n_images)
    if world.is_nsd:
        expect(stimuli.path, "pixels a side", stimuli.shape[1:3], (425, 425))
    look_at_rows(stimuli, deep)
    return f"{stimuli.shape} {stimuli.dtype}, {looked(deep)}"


def look_at_captions(paths):
    captions = load_captions(paths)
    return f"{sum(map(len, captions))} captions of {len(captions)} images"


def look_at_betas(world, subj, deep):
    betas = open_betas(world.paths, subj)
    if betas.dtype != np.float32:
        raise utils.UserError(f"{betas.path}: {betas.dtype}, wanted float32 as MindEye2's are")
    if world.is_nsd:
        expect(betas.path, "trials x voxels", betas.shape, sources.PUBLISHED[subj][:2])
    else:
        expect(betas.path, "trials", len(betas), check_trial_images(world.paths, subj))
    look_at_rows(betas, deep)
    return f"{betas.shape} {betas.dtype}, {looked(deep)}"


def look_at_trials(world, subj):
    """Training and test trials together are all of the subject's, each once, of its images."""
    folder = world.paths.data_path / "wds" / subj
    train, test = (world.trials(subj, split) for split in ("train", "new_test"))
    rows = np.sort(np.concatenate([train["row"], test["row"]]))
    n = len(open_betas(world.paths, subj))
    if not np.array_equal(rows, np.arange(n)):
        lacking, beyond = np.setdiff1d(np.arange(n), rows), rows[rows >= n]
        twice = rows[1:][np.diff(rows) == 0]
        raise utils.UserError(f"{folder}: of the betas' trials 0..{n - 1}, {len(lacking)} are lacking "
                              f"{lacking[:1].tolist()}, {len(twice)} are in two shards {twice[:1].tolist()}, "
                              f"{len(beyond)} do not exist {beyond[:1].tolist()}, wanted each once")
    sessions = train["session"].nunique()
    if world.is_nsd:
        expect(folder / "train", "sessions", sessions, options.SESSIONS[subj])
        expect(folder / "new_test", "trials", len(test), sources.PUBLISHED[subj][2])
    ids = np.concatenate([train["image_id"], test["image_id"]])
    if ids.max() >= world.n_images:
        raise utils.UserError(f"{folder}: image id {ids.max()}, wanted 0..{world.n_images - 1}")
    repeats = enumerate(np.bincount(np.bincount(test["image_id"])))
    repeats = ", ".join(f"{n} seen {k}x" for k, n in repeats if k and n)
    return f"{len(train)} training trials of {sessions} sessions; {test['image_id'].nunique()} test images, {repeats}"


def look_at_old_test(world, subj):
    folder = world.paths.data_path / "wds" / subj / "test"
    if not folder.exists():
        raise Doubt(f"{folder}: not there; only --test_split test reads it")
    old, new = (world.trials(subj, split) for split in ("test", "new_test"))
    if not np.isin(old["row"], new["row"]).all():
        raise utils.UserError(f"{folder}: trials that new_test does not have, wanted a part of them")
    if world.is_nsd:
        expect(folder, "trials", len(old), sources.PUBLISHED[subj][3])
    return f"{old['image_id'].nunique()} images, {len(old)} trials"


def look_at_masks(paths, subj):
    masks = roi_masks(paths, subj)
    empty = [name for name, mask in masks.items() if not mask.any()]
    if empty:
        raise utils.UserError(f"regions of {subj}: {', '.join(empty)} have no voxel")
    found = ", ".join(f"{name} {mask.sum()}" for name, mask in masks.items())
    if not (paths.rois(subj) / "nsdgeneral.nii.gz").exists():
        raise Doubt(f"{found}; not checked against NSD's volumes, {paths.rois(subj)} has none")
    return f"{found}; as in NSD's volumes" if (paths.data_path / "brain_region_masks.hdf5").exists() else \
        f"{found}; from NSD's volumes"


def look_at_feature(world, feat, args):
    rows = open_feature(world.paths, feat)
    expect(rows.path, "rows", len(rows), world.n_images)
    seen = [world.trials(subj, split)["image_id"] for subj in args.subjects for split in ("train", "new_test")]
    seen = np.unique(np.concatenate(seen))
    try:
        rows.require(seen)
    except utils.UserError as error:  # it would be a loss to make the file again
        raise Unfinished(str(error)) from None
    look_at_rows(rows, args.deep, seen)
    return f"{rows.shape} {rows.dtype}, {looked(args.deep)}"


def look_at_weights(group, name):
    """The files that from_pretrained reads, each safetensors file of its full length."""
    from huggingface_hub import try_to_load_from_cache
    from safetensors import SafetensorError, safe_open

    is_folder = Path(name).is_dir()
    needed = ["config.json", "model.safetensors"] if group != "sd" else [
        "model_index.json", "tokenizer/tokenizer_config.json", "text_encoder/config.json",
        "text_encoder/model.safetensors", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    for wanted in needed:
        older = re.sub(r"(pytorch_)?model\.safetensors$", "pytorch_model.bin", wanted)  # weights of before
        found = [Path(name) / file if is_folder else try_to_load_from_cache(name, file) for file in (wanted, older)]
        file = next((Path(file) for file in found if isinstance(file, str | Path) and Path(file).exists()), None)
        if file is None:
            raise utils.UserError(f"{name}: {wanted} not found{'' if is_folder else ' in the cache of the hub'}")
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, "pt"):
                    pass
            except SafetensorError as error:
                raise utils.UserError(f"{file}: not readable ({error})") from None
    return f"{name}: {len(needed)} files"


def look_at_disk(world, args):
    """Room for the features that are not there and the checkpoints of a full plan."""
    width = {"c": 59136, "z": 16384}
    features = sum(2 * sources.N_IMAGES * width.get(feat, 38400) for feat in args.feats
                   if not world.paths.feature(feat).exists()) if "features" in args.stages and world.is_nsd else 0
    runs = RUN_BYTES * len(args.feats) if "train" in args.stages and world.is_nsd else 0
    free = shutil.disk_usage(world.paths.root).free
    plan = f"{utils.in_bytes(free)} free; features to write {utils.in_bytes(features)}, checkpoints " \
           f"{utils.in_bytes(runs)} at most"
    if free < features:
        raise utils.UserError(f"{world.paths.root}: {plan}")
    if free < features + runs:
        raise Doubt(plan)
    return plan


def look_at_memory():
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if found < MEMORY:
        raise Doubt(f"{utils.in_bytes(found)} of main memory; training on NSD at its defaults takes about "
                    f"{utils.in_bytes(MEMORY)}, a smaller --batch_size less")
    return f"{utils.in_bytes(found)} of main memory"


def look_at_gpu():
    if not torch.cuda.is_available():
        raise Doubt("none is visible: on a CPU, training on NSD takes weeks (the demo world does not)")
    return "; ".join(f"{gpu.name}, {utils.in_bytes(gpu.total_memory)}" for gpu in
                     map(torch.cuda.get_device_properties, range(torch.cuda.device_count())))


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
