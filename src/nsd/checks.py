"""Checks of the data: is it there and correct? Read with the functions that the stages use.

A look returns what it found as words; it raises UserError for a defect and Doubt for what can be tolerated.
"""

import math
import os
import re
import shutil
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

import options
import utils
from nsd import sources
from nsd.captions import load_captions
from nsd.components import open_components
from nsd.design import check_shared_images, check_trial_images, listed_images, load_design, load_stimulus_table
from nsd.own_root import load_own
from nsd.regions import roi_masks
from nsd.rows import open_betas, open_feature, open_stimuli
from nsd.synthetic import FIRST_ID, SyntheticStimuli, load_synthetic_trials, open_synthetic_betas
from nsd.trials import load_trials

SAMPLE = 16  # rows of a file that are looked at without --deep
MANY_CHUNKS = 16  # that one image lies in, or as many times its bytes that are read for it
# by --model: bytes at most of a run's pretraining and fine-tuning at --hidden_dim 1024 (benchmarks/stage_costs.py), and
# of the main memory that training takes (benchmarks/bench_train.py)
RUN_BYTES = {"components": 1.2e9, "mindeye2": 3e9, "ridge": 0.4e9}
MEMORY = {"components": 6e9, "mindeye2": 16e9, "ridge": 8e9}


class World:
    """The data under a root; what several looks need is read once."""

    def __init__(self, paths):
        self.paths, self._trials = paths, {}

    @cached_property
    def own(self):
        """What import_data.py says of data of the user's own; None of NSD's."""
        return load_own(self.paths)

    @property
    def subjects(self):
        """Whose data these are."""
        return list(self.own["subjects"]) if self.own else sources.SUBJECTS

    @cached_property
    def n_images(self):
        """Images in NSD's table of the stimuli."""
        return len(load_stimulus_table(self.paths))

    @property
    def is_nsd(self):
        """Whether this is the full data set, of which published numbers hold."""
        return self.n_images == sources.N_IMAGES and not self.own

    def trials(self, subj, split):
        """Table of a subject's trials (load_trials)."""
        if (subj, split) not in self._trials:
            self._trials[subj, split] = load_trials(self.paths, subj, split)
        return self._trials[subj, split]


class Finding(NamedTuple):
    """A line of the table."""

    status: str  # ok, warn or fail
    what: str
    found: str
    mend: str  # a command; "" where nothing needs repair


class Doubt(Exception):
    """A finding that can be tolerated."""


class Unfinished(utils.UserError):
    """An unfinished file of features or components, which the command that began it can continue."""


def examine(what, mend, look):
    """Look at one thing and return the Finding: a UserError is a defect, a Doubt a warning."""
    try:
        return Finding("ok", what, look(), "")
    except Doubt as doubt:
        return Finding("warn", what, str(doubt), mend)
    except Unfinished as defect:
        go_on = mend.rpartition("; ")[2].removesuffix(" --overwrite")  # without what would lose what is done
        return Finding("fail", what, str(defect), go_on)
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
        print("to repair what failed, run in this order:", *commands, sep="\n    ")
    return counts["fail"]


# --- the looks ----------------------------------------------------------------------------------------------------


def expect(file, what, found, wanted):
    """Raise UserError unless found == wanted."""
    if found != wanted:
        raise utils.UserError(f"{file}: {found} {what}, wanted {wanted}")


def look_at_import(world):
    """The import was not cut off, and all that it wrote is there."""
    if not world.own["finished"]:
        raise utils.UserError(f"{world.paths.own_data}: the import was cut off; import again")
    for name in world.own["files"]:
        utils.require(world.paths.root / name, "imported file", "import again")
    return "; ".join(f"{subj} is {known['name']}" for subj, known in world.own["subjects"].items())


def look_at_table(world):
    return f"{world.n_images} images"


def look_at_shared(world):
    """All lists of the shared images agree."""
    shared = check_shared_images(world.paths, own=bool(world.own))
    if world.own:
        return f"{len(shared)} images to test on, the same in both lists"
    if world.is_nsd:
        expect(world.paths.data_path / "shared1000.npy", "shared images", len(shared), 1000)
    return f"{len(shared)} shared images, the same in all three lists"


def look_at_design(world, subj):
    """NSD's and MindEye2's lists of a subject's trials agree; of imported data, the list and the shards."""
    paths = world.paths
    if not world.own:
        lists = [paths.data_path / name for name in sources.ONLY_CHECKED]
        if lacking := [file for file in lists if not file.exists()]:
            designed = len(load_design(paths, subj))
            raise Doubt(f"{designed} trials in nsd_expdesign.mat, which {lacking[0]} would confirm: not there; no "
                        "stage reads it")
        return f"{check_trial_images(paths, subj)} trials, the same images in both lists"
    listed, mask = listed_images(paths, subj), check_shared_images(paths, own=True)
    for split in ("train", "new_test"):
        trials = world.trials(subj, split)
        row, image_id = trials["row"].to_numpy(), trials["image_id"].to_numpy()
        folder = paths.data_path / "wds" / subj / split
        if row.max() >= len(listed) or not np.array_equal(listed[row], image_id):
            raise utils.UserError(f"{folder}: shows other images than COCO_73k_subj_indices.hdf5 says, wanted the same")
        if not (np.isin(image_id, mask) == (split == "new_test")).all():
            raise utils.UserError(f"{folder}: images to test on and others are mixed, wanted them as in shared1000.npy")
    return f"{len(listed)} trials, the same images in list and shards"


def sample_of(n, deep):
    """List batches of row numbers to look at: all, or a few spread over the file."""
    rows = np.arange(n) if deep else np.unique(np.linspace(0, n - 1, SAMPLE).astype(np.int64))
    return np.array_split(rows, -(-len(rows) // 256))


def look_at_rows(rows, deep, numbers=None):
    """Raise UserError for a row (of `numbers`, or any) that is NaN or infinite, or all zeros: a hole in the file."""
    numbers = np.arange(len(rows)) if numbers is None else numbers
    for part in utils.progress(sample_of(len(numbers), deep), desc=rows.path.name, unit="batch", leave=False, delay=3):
        values = rows[numbers[part]].reshape(len(part), -1)
        if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
            bad = numbers[part][~np.isfinite(values).all(1)][0]
            raise utils.UserError(f"{rows.path}: row {bad} holds NaN or infinite values")
        if not values.any(1).all():
            raise utils.UserError(f"{rows.path}: row {numbers[part][~values.any(1)][0]} is all zeros, as in a hole")


def looked(deep):
    """Say how much was read."""
    return "all rows read" if deep else f"{SAMPLE} rows read"


def look_at_stimuli(world, deep):
    stimuli = open_stimuli(world.paths)
    expect(stimuli.path, "images", len(stimuli), world.n_images)
    if world.is_nsd:
        expect(stimuli.path, "pixels a side", stimuli.shape[1:3], (425, 425))
    look_at_rows(stimuli, deep)
    layout, n_chunks, cost = layout_of(stimuli.path, stimuli.key)
    found = f"{stimuli.shape} {stimuli.dtype}, {layout}, {looked(deep)}"
    if max(n_chunks, cost) > MANY_CHUNKS:
        raise Doubt(f"{found}; one image lies in {n_chunks} chunks, {cost:.0f} times its bytes are read for it: "
                    "features and GNet, which read single images, wait for the disk")
    return found


def layout_of(path, key):
    """Say how a data set of an HDF5 file lies on the disk: (words, chunks that a row touches, their size in rows)."""
    with h5py.File(path, "r") as file:
        dataset = file[key]
        if dataset.chunks is None:
            return "contiguous", 0, 1
        row, (n_rows, *chunk) = dataset.shape[1:], dataset.chunks
        n_chunks = math.prod(-(-size // part) for size, part in zip(row, chunk, strict=True))
        plist = dataset.id.get_create_plist()
        filters = [plist.get_filter(i)[3].decode(errors="replace") for i in range(plist.get_nfilters())]
        packed = f"compressed ({', '.join(filters)})" if filters else "not compressed"
        return f"chunks of {dataset.chunks}, {packed}", n_chunks, n_rows * n_chunks * math.prod(chunk) / math.prod(row)


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
        found = listed_images(world.paths, subj) if world.own else range(check_trial_images(world.paths, subj))
        expect(betas.path, "trials", len(betas), len(found))
    if world.own:
        known = world.own["subjects"][subj]
        expect(betas.path, "trials x voxels", betas.shape, (known["trials"], known["voxels"]))
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
        raise utils.UserError(f"{folder}: of the betas' trials 0..{n - 1}, {len(lacking)} are missing "
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
        raise utils.UserError(f"{folder}: has trials that new_test does not have, wanted a subset")
    if world.is_nsd:
        expect(folder, "trials", len(old), sources.PUBLISHED[subj][3])
    return f"{old['image_id'].nunique()} images, {len(old)} trials"


def look_at_synthetic(world, subj, deep):
    """A subject's session of NSD-synthetic fits its design, its stimuli and the voxels of its betas."""
    paths = world.paths
    trials, betas, stimuli = (load_synthetic_trials(paths, subj), open_synthetic_betas(paths, subj),
                              SyntheticStimuli(paths, subj))
    expect(betas.path, "trials", len(betas), len(trials))
    shown, n = trials["image_id"] - FIRST_ID, (len(stimuli.common), len(stimuli.own))
    expect(paths.synthetic_design, "is the last stimulus", shown.max(), len(stimuli) - 1)
    if world.is_nsd:
        expect(betas.path, "trials", len(betas), sources.OTHER_TRIALS["synthetic"])
        expect(stimuli.path, "stimuli", n, sources.SYNTHETIC_STIMULI)
    look_at_rows(stimuli.common, deep)
    look_at_rows(stimuli.own, deep)
    if deep:
        look_at_rows(betas, deep)
    repeats = shown.value_counts()
    return f"{len(trials)} trials, {betas.shape[1]} voxels; {n[0]} stimuli that all saw and {n[1]} of its own, each " \
           f"shown {repeats.min()} to {repeats.max()} times"


def look_at_masks(world, subj):
    paths = world.paths
    masks = roi_masks(paths, subj)
    empty = [name for name, mask in masks.items() if not mask.any()]
    if empty:
        raise utils.UserError(f"regions of {subj}: {', '.join(empty)} have no voxels")
    found = ", ".join(f"{name} {mask.sum()}" for name, mask in masks.items())
    if world.own:
        return found
    if not paths.roi_source and not (paths.rois(subj) / "nsdgeneral.nii.gz").exists():
        raise Doubt(f"{found}; not checked against NSD's volumes, {paths.rois(subj)} has none")
    if paths.roi_source:
        return f"{found}; from the {paths.roi_source} alone, as --roi_source says"
    return f"{found}; as in NSD's volumes" if (paths.data_path / "brain_region_masks.hdf5").exists() else \
        f"{found}; from NSD's volumes"


def look_at_feature(world, feat, subjects, deep):
    """Every image that the subjects saw has its row."""
    rows = open_feature(world.paths, feat)
    look_at_seen(world, rows, subjects, deep)
    return f"{rows.shape} {rows.dtype}, {looked(deep)}"


def look_at_components(world, feat, subjects, deep, model):
    """Every image that the subjects saw has its coefficients, and they are of the feature file that is there."""
    file = world.paths.components(feat)
    if not file.exists():
        lack = Doubt if model == "mindeye2" else utils.UserError
        raise lack(f"{file}: not found; --model components (the default) and ridge need it, mindeye2 does not")
    components = open_components(world.paths, feat)
    look_at_seen(world, components.rows, subjects, deep)
    return f"{components.k} keep {100 * components.kept:.1f} % of the variance, {looked(deep)}"


def look_at_seen(world, rows, subjects, deep):
    """Look at the rows of the images that the subjects saw."""
    expect(rows.path, "rows", len(rows), world.n_images)
    seen = [world.trials(subj, split)["image_id"] for subj in subjects for split in ("train", "new_test")]
    seen = np.unique(np.concatenate(seen))
    try:
        rows.require(seen)
    except utils.UserError as error:
        raise Unfinished(str(error)) from None
    look_at_rows(rows, deep, seen)


def look_at_weights(group, name):
    """The files that from_pretrained reads, each safetensors file of its full length."""
    from huggingface_hub import try_to_load_from_cache
    from safetensors import SafetensorError, safe_open

    is_folder = Path(name).is_dir()
    needed = {"sd": ["model_index.json", "tokenizer/tokenizer_config.json", "text_encoder/config.json",
                     "unet/config.json", "vae/config.json", *sources.SD_WEIGHTS],
              "taesd": sources.TAESD_FILES}.get(group, ["config.json", "model.safetensors"])
    for wanted in needed:
        older = re.sub(r"(pytorch_)?model\.safetensors$", "pytorch_model.bin", wanted)  # from before safetensors
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


def look_at_disk(world, feats, stages, model):
    """Room for the features that are not there and for the checkpoints of a full plan."""
    width, k = {"c": 59136, "z": 16384}, 1024  # of float16 numbers; components, in float32
    features = 0
    for feat in feats if "features" in stages and world.is_nsd else ():
        f = width.get(feat, 38400)
        features += 2 * sources.N_IMAGES * f if not world.paths.feature(feat).exists() else 0
        features += 4 * k * (sources.N_IMAGES + f) if not world.paths.components(feat).exists() else 0
    n_runs = len(feats if model == "mindeye2" else {feat[0] for feat in feats})  # else the layers of g share one
    runs = RUN_BYTES[model] * n_runs if "train" in stages and world.is_nsd else 0
    free = shutil.disk_usage(world.paths.root).free
    plan = f"{utils.in_bytes(free)} free; features to write {utils.in_bytes(features)}, checkpoints " \
           f"{utils.in_bytes(runs)} at most"
    if free < features:
        raise utils.UserError(f"{world.paths.root}: {plan}")
    if free < features + runs:
        raise Doubt(plan)
    return plan


def look_at_memory(model):
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if found < MEMORY[model]:
        raise Doubt(f"{utils.in_bytes(found)} of main memory; training on NSD at its defaults takes about "
                    f"{utils.in_bytes(MEMORY[model])}, a smaller --batch_size less")
    return f"{utils.in_bytes(found)} of main memory"


def look_at_gpu():
    import torch

    if not torch.cuda.is_available():
        raise Doubt("no GPU is visible: on a CPU, decoders of components are trained on NSD in hours, but features and "
                    "pictures take weeks (those of the demo world do not)")
    return "; ".join(f"{gpu.name}, {utils.in_bytes(gpu.total_memory)}" for gpu in
                     map(torch.cuda.get_device_properties, range(torch.cuda.device_count())))
