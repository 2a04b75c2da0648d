"""One's own data as a root of the project: the formats of docs/data.md, written whole or not at all.

Letters: N images, T trials, V voxels.
"""

import hashlib
import io
import json
import os
import shutil
import tarfile
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import pandas as pd

import utils
from disk.files import load_json, load_npy, remove_leftovers, save_json, temporary_of, write_npy
from nsd.design import expdesign_file
from nsd.own_data import read_image
from nsd.trials import BEHAV_COLUMNS, BEHAV_IMAGE_ID, BEHAV_SESSION, BEHAV_SHARED, BEHAV_TRIAL

BEHAV_SUBJECT, BEHAV_RUN = 1, 3
TRIAL_IN_TAR = 2048  # bytes of a trial's behaviour


def describe(data, betas, zscore):
    """Say what a folder holds, in lines. betas: {number: Responses}."""
    lines = [f"{len(data.images)} images, {data.is_test.sum()} of them to test on"]
    for subject in data.subjects:
        responses, n_test = betas[subject.number], int(subject.is_test.sum())
        regions = ", ".join(f"{name} {mask.sum()}" for name, mask in responses.regions.items())
        lines.append(f"{subject.number} is {subject.name}: {len(subject.rows)} trials of "
                     f"{len(np.unique(subject.sessions))} sessions, {n_test} of them to test on; {responses.shape[1]} "
                     f"voxels of {responses.file.name}" + (f"; regions {regions}" if regions else ""))
    lines.append("z-scored by session, with mean and deviation of its training trials" if zscore else
                 "not z-scored (--no-zscore): responses are taken as they are")
    return "\n".join([*lines, *data.notes])


# --- what is there already ----------------------------------------------------------------------------------------


def load_own(paths):
    """Read what import_data.py says of the data that it put into a root; None of NSD's, UserError of a damaged one."""
    if not paths.own_data.exists():
        return None
    hint = "import the data again (import_data.py --overwrite)"
    known = load_json(paths.own_data, "record of imported data", hint)
    lacking = [key for key in ("subjects", "files", "settings", "command", "finished") if key not in known]
    if lacking:
        raise utils.UserError(f"{paths.own_data}: {lacking[0]} is missing; {hint}")
    return known


def imported_before(paths, overwrite):
    """Return load_own's record; with overwrite, of a damaged one what is needed to replace the import."""
    try:
        return load_own(paths)
    except utils.UserError:
        if not overwrite:
            raise
        return {"files": [], "settings": {}, "finished": False}


def check_root(paths, data, settings, overwrite):
    """Say whether a root holds this very import; raises UserError where it holds what an import must not touch."""
    own = imported_before(paths, overwrite)
    if own is None:
        theirs = [expdesign_file(paths), paths.captions, *written_files(paths, data),
                  *sorted(paths.data_path.glob("betas_all_*")), *sorted(paths.data_path.glob("wds/*"))]
        found = next((file for file in theirs if file.exists()), None)
        if found is not None:
            raise utils.UserError(f"--root {paths.root}: holds {paths.as_recorded(found)}, which no import wrote, "
                                  "wanted a folder without such data: give another --root")
        return False
    late = tested_late(paths, own, data)
    run = next(paths.run("").glob("*/*.pth"), None)
    if late and run and (overwrite or not own["finished"]):
        raise utils.UserError(f"--root {paths.root}: {late[0]} and {len(late) - 1} others are to be tested on now, and "
                              f"{run.parent.name} may have been trained on them; move train_logs/ away, or give "
                              "another --root")
    if overwrite or not own["finished"]:
        return False
    if own["settings"] != settings:
        differing = [name for name in settings if own["settings"].get(name) != settings[name]]
        said = ["the folder has changed since" if name == "from" else
                f"{name} {own['settings'].get(name)}, wanted {settings[name]}" for name in differing]
        raise utils.UserError(f"--root {paths.root}: holds another import ({'; '.join(said)}); --overwrite replaces "
                              "it, or give another --root")
    return True


def tested_late(paths, own, data):
    """List the images to test on that the import before (load_own's record) had to train on: names."""
    mask, names = paths.data_path / "shared1000.npy", own.get("images", [])
    was_test = load_npy(mask, "images to test on", "import again") if mask.exists() else np.zeros(len(names), bool)
    trained = {name for name, test in zip(names, was_test, strict=False) if not test}
    return [name for name, test in zip(data.images, data.is_test, strict=True) if test and name in trained]


def written_files(paths, data):
    """List the files that an import writes, but the record itself, absolute."""
    files = [paths.stimuli / "nsd_stimuli.hdf5", paths.experiments / "nsd_stim_info_merged.csv",
             *(paths.data_path / name for name in ("shared1000.npy", "COCO_73k_subj_indices.hdf5",
                                                   "brain_region_masks.hdf5"))]
    files += [paths.captions] if data.captions else []
    for subject in data.subjects:
        shards = paths.data_path / "wds" / subject.number
        files += [paths.betas(subject.number), shards / "new_test/0.tar",
                  *(shards / f"train/{i}.tar" for i in range(len(training_sessions(subject))))]
    return files


def training_sessions(subject):
    """List the sessions that have training trials, ascending: a shard is written of each."""
    return np.unique(subject.sessions[~subject.is_test])


# --- writing ------------------------------------------------------------------------------------------------------


def write_root(paths, data, betas, settings, command):
    """Write OwnData and {number: Responses} as a root. What was imported before stays until all of it is written.

    settings: {"zscore", "image_size", ...}; command: the one that imports it again. Raises UserError for an image or a
    response that is not readable, and when the disk refuses.
    """
    before, files = imported_before(paths, overwrite=True), written_files(paths, data)
    needed = len(data.images) * settings["image_size"] ** 2 * 3 + sum(
        responses.shape[0] * (4 * responses.shape[1] + TRIAL_IN_TAR) for responses in betas.values())
    if needed > (free := shutil.disk_usage(paths.root).free):
        raise utils.UserError(f"{paths.root}: needs {utils.in_bytes(needed)}, {utils.in_bytes(free)} are free; make "
                              "room on the disk, or give another --root or a smaller --image_size")
    folders = {file.parent for file in files}
    new = [folder for file in files for folder in file.parents if not folder.exists()]
    staged = {file: temporary_of(file) for file in files}
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
        write_files(paths, data, betas, settings, staged)
        record = {"finished": False, "files": sorted({*(before["files"] if before else ()),
                                                      *map(paths.as_recorded, files)}),
                  "settings": settings, "command": command,
                  "subjects": {subject.number: {"name": subject.name, "trials": len(subject.rows),
                                                "voxels": betas[subject.number].shape[1],
                                                "sessions": np.unique(subject.sessions).tolist(),
                                                "betas": betas[subject.number].file.name} for subject in data.subjects},
                  "images": data.images}
        stale = stale_files(paths, before["files"], staged) if before else set()
        if before and tested_late(paths, before, data):  # components were fitted to them
            stale |= {*paths.stimuli.glob("*_components.hdf5")}
        save_json(paths.own_data, record)  # whoever finds it unfinished imports again
        for file, ready in staged.items():
            os.replace(ready, file)
        for file in stale:
            file.unlink(missing_ok=True)
        save_json(paths.own_data, {**record, "finished": True, "files": list(map(paths.as_recorded, files))})
    except OSError as error:
        place = error.filename or paths.root
        raise utils.UserError(f"{place}: could not be written: {utils.refusal(error)}") from error
    finally:
        for ready in staged.values():
            ready.unlink(missing_ok=True)
        for folder in sorted(set(new), reverse=True):  # of an import that failed, those that are empty
            with suppress(OSError):
                folder.rmdir()


def stale_files(paths, listed, staged):
    """List the files that an import leaves behind it: what the one before wrote (`listed`, as its record says) and this
    one does not, a model's captions, features of other pictures. Only files of the data: a record proves nothing."""
    places = (paths.stimuli, paths.experiments, paths.data_path)
    files = {Path(os.path.normpath(paths.root / name)) for name in listed}  # links stay: they may lead to another disk
    files = {file for file in files if any(file.is_relative_to(place) for place in places)}
    return (files | {paths.captions, paths.generated_captions} | features_of_others(paths, staged)) - staged.keys()


def features_of_others(paths, staged):
    """List the files of features and components that are made of pictures which an import replaces: whoever reads them
    compares a few pictures only (c is told by its captions)."""
    old, new = paths.stimuli / "nsd_stimuli.hdf5", staged[paths.stimuli / "nsd_stimuli.hdf5"]
    files = {*paths.stimuli.glob("[zg]*_all.hdf5"), *paths.stimuli.glob("[zg]*_components.hdf5")}
    if not files or not old.exists():
        return files
    with h5py.File(old) as before, h5py.File(new) as after:
        ours, theirs = after["imgBrick"], before["imgBrick"]
        if ours.shape == theirs.shape and all(np.array_equal(ours[i:i + 64], theirs[i:i + 64])
                                              for i in range(0, len(ours), 64)):
            return set()
    print(f"the pictures are others now: {len(files)} files of features of the old ones are removed")
    return files


def write_files(paths, data, betas, settings, staged):
    """Write every file to the place that stands for it: staged {file: place}."""
    side, n_cut, is_test, first = settings["image_size"], 0, data.is_test, {}
    with h5py.File(staged[paths.stimuli / "nsd_stimuli.hdf5"], "w") as file:
        rows = file.create_dataset("imgBrick", (len(data.images), side, side, 3), np.uint8)
        for image_id, name in enumerate(utils.progress(data.images, desc="images", unit="image", delay=2)):
            picture, was_cut = read_image(data.folder / "images" / name, side)
            twin = first.setdefault(hashlib.sha256(picture).digest(), image_id)
            if is_test[twin] != is_test[image_id]:
                raise utils.UserError(f"{data.folder / 'images' / name}: the same picture as {data.images[twin]}, of "
                                      "which one is to be tested on and one is not: it would be trained on; give both "
                                      "the same is_test, or leave one out")
            rows[image_id], n_cut = picture, n_cut + was_cut
    if n_cut:
        print(f"{n_cut} images are not square: the middle of each is taken")
    table = pd.DataFrame({"cocoId": range(len(data.images)), "nsdId": range(len(data.images)),
                          "shared1000": data.is_test, "file": data.images})
    table.to_csv(staged[paths.experiments / "nsd_stim_info_merged.csv"], lineterminator="\n")
    write_npy(data.is_test)(staged[paths.data_path / "shared1000.npy"])
    if data.captions:
        captions = {str(image_id): texts for image_id, texts in sorted(data.captions.items())}
        staged[paths.captions].write_text(json.dumps(captions, indent=1) + "\n")
    with h5py.File(staged[paths.data_path / "COCO_73k_subj_indices.hdf5"], "w") as file:
        for subject in data.subjects:
            file[subject.number] = subject.image_ids
    with h5py.File(staged[paths.data_path / "brain_region_masks.hdf5"], "w") as file:
        for number, responses in betas.items():
            for name, mask in {**responses.regions, "nsd_general": np.ones(responses.shape[1], bool)}.items():
                file[f"{number}/{name}"] = mask
    for subject in data.subjects:
        write_betas(staged[paths.betas(subject.number)], subject, betas[subject.number], settings["zscore"])
        write_shards(paths.data_path / "wds" / subject.number, subject, staged)


def write_betas(place, subject, responses, zscore):
    """Write `betas` (T, V) float32, contiguous, z-scored by session or as they are."""
    ends = np.append(np.flatnonzero(np.diff(subject.sessions)) + 1, len(subject.rows))
    with h5py.File(place, "w") as file:
        rows, start, still = file.create_dataset("betas", responses.shape, np.float32), 0, 0
        for end in utils.progress(ends.tolist(), desc=f"betas: {subject.name}", unit="session", delay=2):
            part = slice(start, end)
            values = responses[part]
            if zscore:
                values, constant = standardise(values, ~subject.is_test[part], subject.sessions[start], subject.name,
                                               responses.file)
                still += constant
            rows[part], start = values, end
    if still:
        print(f"{subject.name}: {still} times a voxel does not vary over a session's training trials: there it is 0")


def standardise(values, train, session, name, file):
    """Return a session's responses (T, V), z-scored by its training trials `train` (T,) bool, and how many voxels do
    not vary among these: they become 0. Test trials must not decide how they are scaled."""
    if train.sum() < 2:
        raise utils.UserError(f"{file}: session {session} of {name} has {train.sum()} training "
                              "trials, wanted at least 2 to z-score by; z-score it yourself, and give --no-zscore")
    mean, std = values[train].mean(0, np.float64), values[train].std(0, np.float64)
    varies = std > 1e-6 * np.maximum(np.abs(mean), 1e-30)
    scaled = np.where(varies, (values - mean) / np.where(varies, std, 1), 0)
    return scaled.astype(np.float32), int((~varies).sum())


def write_shards(folder, subject, staged):
    """Write the trials' behaviour: a tar of each session's training trials, and one of all test trials."""
    behav = np.full((len(subject.rows), BEHAV_COLUMNS), -1.0)
    behav[:, BEHAV_IMAGE_ID], behav[:, BEHAV_SUBJECT] = subject.image_ids, int(subject.number[4:])
    behav[:, BEHAV_SESSION], behav[:, BEHAV_RUN] = subject.sessions, subject.rows[:, 2]
    behav[:, BEHAV_TRIAL], behav[:, BEHAV_SHARED] = np.arange(len(behav)), subject.is_test
    write_tar(staged[folder / "new_test/0.tar"], behav[subject.is_test])
    for number, session in enumerate(training_sessions(subject)):
        write_tar(staged[folder / f"train/{number}.tar"], behav[~subject.is_test & (subject.sessions == session)])


def write_tar(place, behav):
    """Write a shard as MindEye2's, of behav.npy alone; the same trials give the same bytes."""
    with tarfile.open(place, "w", format=tarfile.USTAR_FORMAT) as tar:
        for row in behav:
            buffer = io.BytesIO()
            np.save(buffer, row[None])
            member = tarfile.TarInfo(f"sample{int(row[BEHAV_TRIAL]):09d}.behav.npy")
            member.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(member, buffer)
