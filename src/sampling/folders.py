"""A folder of reconstructions: %05d.png (%05d = row of the image; further samples %05d_s1.png, ...), index.csv and the
config.json, their settings; beside a picture that the brain guided, the same name .jsonl: a line per
guided step. recon.py fills it, evaluate.py reads it.
"""

import argparse
import hashlib
import json
import re
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

import options
import utils
from disk.files import atomic_path, file_hash, load_csv, load_json, remove_leftovers, save_csv, save_json
from disk.names import LESIONS

FILE_NAME = re.compile(r"(\d{5,})(?:_s(\d+))?\.png")
# what config.json says that names of other folders are made of, and what says whether it may
NAMES = {"subj": options.subject, "run": options.run, "head": options.head, "hold_out": options.hold_out,
         "voxels": options.regions, "without": options.regions, "sd_model": str} | dict.fromkeys(
    ("method", "tag", "control", "test_split", "repeats", "gnet_run", "gnet_roi"), options.tag)
# of score_hashes, beside the features
OTHER_HASHES = ("image_ids", "start", "adapter", "gnet", "target", "measurements")
NUMBERS = ("hidden_dim", "num_sessions", "gnet_kappa")
KINDS = (".png", ".jpg", ".jpeg")  # of pictures that recon.py did not draw
END_OF_PNG = b"\0\0\0\0IEND\xaeB`\x82"  # the last chunk, the same in every PNG


def file_name(row, sample):
    return f"{row:05d}.png" if sample == 0 else f"{row:05d}_s{sample}.png"


def check_folder(folder, config, overwrite):
    """Raise UserError when `folder` holds pictures of another config and `overwrite` is off."""
    if overwrite:
        return
    if (folder / "config.json").exists():
        old, config = recorded(load_json(folder / "config.json")), recorded(config)
        changed = [key for key in config if key != "commit" and config[key] != old.get(key)]
        if changed and pictures_in(folder):
            changes = ", ".join(change(key, old.get(key), config[key]) for key in changed)
            raise utils.UserError(f"{folder}: has pictures of other settings ({changes}); --overwrite them, or choose "
                                  "another --method or --outdir")
    elif pictures := pictures_in(folder):
        raise utils.UserError(f"{folder}: {len(pictures)} pictures without their config.json; --overwrite them, or "
                              "choose another --method or --outdir")


def recorded(config):
    """A config.json with what it leaves out: settings whose flags there were not yet when the pictures were drawn."""
    usual = {"hold_out": None, **dict.fromkeys(LESIONS)}
    if "guidance_scale" in config:  # guided
        usual["guidance_repeats"] = 1
        if config.get("guidance_rule") != "posterior":  # whose steps are longer since there are draws
            usual["guidance_draws"] = 0
    if config.get("use_gnet"):
        usual["gnet_from"] = 0
    return usual | config


def features_in(config):
    """The features that pictures were drawn from, by their config.json."""
    known = [name for name in config.get("score_hashes") or {} if name not in OTHER_HASHES]
    return known or ["c", *config.get("feats", []), *(["z"] if config.get("z") == "scores" else [])]


def change(key, old, new):
    """Say how a setting differs; of the hashes of what pictures are drawn from only which."""
    if key != "score_hashes" or not isinstance(old, dict):
        return f"{key} {old} -> {new}"
    return "other scores than then: " + ", ".join(name for name in new if new[name] != old.get(name))


def clear_folder(folder, config, overwrite):
    """Make `folder` ready: without what `overwrite` replaces and what a kill left half-written, with its config.

    The config of a run that did not come to its first picture is replaced too.
    """
    if overwrite:
        drawn = pictures_in(folder)
        steps = [file.with_suffix(".jsonl") for file in drawn]
        for file in (*drawn, *steps, folder / "index.csv", folder / "config.json"):
            file.unlink(missing_ok=True)
    remove_leftovers(folder)
    if not pictures_in(folder):
        save_json(folder / "config.json", config)


def pictures_in(folder):
    return [file for file in folder.glob("*.png") if FILE_NAME.fullmatch(file.name)]


def is_whole(file):
    """Whether a picture exists and ends as a PNG does."""
    try:
        with open(file, "rb") as stream:
            stream.seek(-len(END_OF_PNG), 2)
            return stream.read() == END_OF_PNG
    except OSError:  # none, or shorter than that
        return False


def save_picture(folder, row, sample, picture):
    """Write one picture, (H, W, 3) uint8: whole or not at all."""
    with atomic_path(folder / file_name(row, sample)) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG")


def save_steps(folder, row, sample, steps):
    """Write what the guided steps of one picture found, [{name: value}], a line each: whole or not at all."""
    with atomic_path((folder / file_name(row, sample)).with_suffix(".jsonl")) as temporary:
        temporary.write_text("".join(json.dumps({"step": step, **found}) + "\n" for step, found in enumerate(steps)))


def write_index(folder, image_ids, seed):
    """List every picture of the folder, those of earlier runs too."""
    names = (FILE_NAME.fullmatch(file.name) for file in pictures_in(folder))
    found = sorted((int(name[1]), int(name[2] or 0)) for name in names)
    save_csv(folder / "index.csv", [
        {"row": row, "image_id": image_ids[row], "file": file_name(row, sample), "sample": sample, "seed": seed}
        for row, sample in found])


# --- reading -------------------------------------------------------------------------------------------------------


class ImageSet(NamedTuple):
    """The reconstructions of one folder: 73k ids (N,), ascending, each id's files, one per sample, and what config.json
    says of how they were drawn (None where there is none)."""

    folder: Path
    image_ids: np.ndarray
    files: list[list[Path]]
    config: dict | None


def read_images(folder):
    """Read the index.csv of a folder of reconstructions; samples that not every image has are left out.

    Raises UserError unless the folder holds what the index lists, of one size, each picture once, and nothing else.
    """
    index = folder / "index.csv"
    rows = load_csv(index, "the list of reconstructions", "reconstruct first (bash scripts/recon.sh)")
    if not rows or not {"image_id", "file"} <= rows[0].keys():
        raise utils.UserError(f"{index}: no rows with image_id and file; run recon again, which writes it")
    files = {}
    for row in rows:
        try:
            samples = files.setdefault(int(row["image_id"]), [])
            int(row.get("row", 0))
        except (ValueError, TypeError):
            raise utils.UserError(f"{index}: image_id {row['image_id']!r} of row {row.get('row')!r}, wanted a 0-based "
                                  "73k id of a number; run recon again, which writes it") from None
        if not FILE_NAME.fullmatch(str(row["file"])):  # a path could lead anywhere
            raise utils.UserError(f"{index}: file {row['file']!r}, wanted a name such as 00000.png, of a picture beside"
                                  " it; run recon again, which writes it")
        samples.append(folder / row["file"])
    check_files(folder, [file for samples in files.values() for file in samples])
    ids, n_samples = sorted(files), min(map(len, files.values()))
    if n_samples < max(map(len, files.values())):
        print(f"{folder}: some images have more samples than others; the first {n_samples} of each are compared")
    config = None
    if (folder / "config.json").exists():
        config = load_json(folder / "config.json")
        check_names(folder / "config.json", config)
    return ImageSet(folder, np.array(ids, np.int64), [files[i][:n_samples] for i in ids], config)


def list_pictures(folder):
    """Ids (N,) and files of any folder of pictures: a recon's by its index.csv, the first sample of each id; else by
    name, numbered from 0. Raises UserError when there are none."""
    if (folder / "index.csv").exists():
        images = read_images(folder)
        return images.image_ids, [samples[0] for samples in images.files]
    if not folder.is_dir():
        raise utils.UserError(f"--images {folder}: the folder of pictures not found; check its name")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in KINDS)
    if not files:
        raise utils.UserError(f"--images {folder}: no pictures; wanted {', '.join(KINDS)} files in it")
    return np.arange(len(files)), files


def pictures_hash(files):
    """Return a short hash of the contents of picture files, in their order."""
    return hashlib.sha256("".join(map(file_hash, files)).encode()).hexdigest()[:12]


def set_hash(folder):
    """Return a short hash of what a folder says of its pictures: index.csv, and config.json if there is one."""
    return pictures_hash([file for file in (folder / "index.csv", folder / "config.json") if file.exists()])


def check_names(file, config):
    """Raise UserError for a value of config.json that recon.py would not have taken: paths are made of them."""
    found = [(name, kind, config[name]) for name, kind in NAMES.items() if config.get(name) is not None]
    for name in ("feats", "score_hashes"):
        feats = config.get(name) or []
        feats = feats if isinstance(feats, (list, dict)) else [feats]
        found += [(name, options.feature, feat) for feat in feats if feat not in OTHER_HASHES]
    for name, kind, value in found:
        try:
            fine = isinstance(value, str) and kind(value) is not None
        except argparse.ArgumentTypeError:
            fine = False
        if not fine:
            raise utils.UserError(f"{file}: {name} {value!r}, wanted what recon.py takes as --{name}; run recon again, "
                                  "which writes it")
    for name in NUMBERS:
        if not isinstance(config.get(name, 0), (int, float)):
            raise utils.UserError(f"{file}: {name} {config[name]!r}, wanted a number; run recon again, which writes it")


def check_files(folder, files):
    """Raise UserError for a picture that is listed twice, not there, not listed, or of another size than the others."""
    twice = [file for file, n in Counter(files).items() if n > 1]
    if twice:
        raise utils.UserError(f"{folder}/index.csv: {twice[0].name} is listed twice; run recon again, which writes it")
    unlisted = set(pictures_in(folder)) - set(files)
    if unlisted:
        raise utils.UserError(f"{folder}: {len(unlisted)} pictures that index.csv does not list (first: "
                              f"{min(unlisted).name}); let recon finish, or move them elsewhere")
    first = None
    for file in files:
        with open_picture(file) as picture:
            first = first or (file, picture.size)
            if picture.size != first[1]:
                raise utils.UserError(f"{file}: {picture.size[0]} x {picture.size[1]} pixels, {first[0].name} has "
                                      f"{first[1][0]} x {first[1][1]}; draw all at one --resolution")


@contextmanager
def open_picture(file):
    """A picture, opened by PIL; missing and damaged files raise UserError."""
    try:
        with Image.open(utils.require(file, "a reconstruction of index.csv", "run recon again")) as picture:
            yield picture
    except OSError as error:  # PIL's error for what is no image, or a part of one
        raise utils.UserError(f"{file}: not a readable picture ({error}); delete it and run recon again") from None


def name_of(folder):
    """Name a set by its folder: '.../cp_4096_v1/300000/0.2' -> 'cp_4096_v1 300000 0.2', '.../mine' -> 'mine'."""
    parts = list(folder.parts)
    first = len(parts) - 1
    while first > 0 and parts[first].replace(".", "", 1).isdigit():
        first -= 1
    return " ".join(parts[first:])


def read_png(file):
    """One picture as (H, W, 3) uint8; missing and damaged files raise UserError."""
    with open_picture(file) as picture:
        return np.asarray(picture.convert("RGB"))


def in_batches(arrays, size):
    """Stack (H, W, 3) pictures into (b, H, W, 3), at most `size` of one shape at a time."""
    batch = []
    for array in arrays:
        if batch and (len(batch) == size or array.shape != batch[0].shape):
            yield np.stack(batch)
            batch = []
        batch.append(array)
    yield np.stack(batch)
