"""Which trial showed which image: shards of behaviour, sessions, training and validation images.

Image ids are 0-based 73k ids everywhere; the official files that count from 1 are converted in design.py alone.
"""

import io
import tarfile
import zipfile
from functools import partial

import numpy as np
import pandas as pd

import utils
from disk.files import atomic_path, load_npy
from nsd.clusters import in_cluster
from nsd.design import check_against_expdesign, expdesign_file
from nsd.sources import DOWNLOAD

# columns of a shard's behav.npy (1, 17); the global trial is the row of the subject's betas
BEHAV_IMAGE_ID, BEHAV_SESSION, BEHAV_TRIAL, BEHAV_SHARED, BEHAV_COLUMNS = 0, 2, 5, 16, 17


def list_subjects(paths):
    """List the subjects whose betas are there, ascending; raises UserError when there are none."""
    files = paths.data_path.glob(paths.betas("subj[0-9][0-9]").name)
    found = sorted(file.name.removeprefix("betas_all_")[:len("subj01")] for file in files)
    if not found:
        raise utils.UserError(f"{paths.data_path}: no betas_all_subj0X_fp32_renorm.hdf5 found; check --data_path")
    return found


def load_trials(paths, subj, split, num_sessions=None):
    """Read a subject's trials: DataFrame [subject, session, image_id, row, is_shared], one line per trial.

    split, a folder of shards: "train" (the first num_sessions, None = all), "new_test" (every trial of the shared
    images) or "test" (MindEye1's selection of them: 982 images). row is the trial's row in the subject's betas. Raises
    UserError for missing or truncated shards, for more sessions than there are, for shared images among the training's
    or others among the test's, and for image ids that nsd_expdesign.mat (where it exists) contradicts.
    """
    folder = paths.data_path / "wds" / subj / split
    shards = _session_shards(folder, subj, num_sessions) if split == "train" else [folder / "0.tar"]
    behav = np.concatenate(_read_shards(folder, shards, f"{subj} {split} trials"))  # (trials, 17)
    trials = pd.DataFrame({
        "subject": subj,
        "session": behav[:, BEHAV_SESSION].astype(np.int64),
        "image_id": behav[:, BEHAV_IMAGE_ID].astype(np.int64),
        "row": behav[:, BEHAV_TRIAL].astype(np.int64),
        "is_shared": behav[:, BEHAV_SHARED] == 1,
    })
    twice = trials["row"].duplicated()
    if twice.any():
        raise utils.UserError(f"{folder}: trial {trials['row'][twice].iloc[0]} is there twice; download it again")
    stray = trials[trials["is_shared"] == (split == "train")]
    if len(stray):
        found, wanted = ("a shared", "those of --subj alone") if split == "train" else ("not a shared", "shared ones")
        raise utils.UserError(f"{folder}: trial {stray['row'].iloc[0]} and {len(stray) - 1} others show {found} image "
                              f"(id {stray['image_id'].iloc[0]}), wanted {wanted}, or training images would be tested; "
                              "download it again")
    if expdesign_file(paths).exists():
        check_against_expdesign(paths, subj, trials)
    return trials


def _session_shards(folder, subj, num_sessions):
    """The first shards of {0, 1, ...}.tar, in numeric order."""
    hint = f"{DOWNLOAD}, or check --data_path and --subj"
    numbers = sorted(int(tar.stem) for tar in utils.require(folder, "shards", hint).glob("*.tar") if tar.stem.isdigit())
    if not numbers or numbers != list(range(len(numbers))):
        raise utils.UserError(f"{folder}: shards {numbers} found, wanted 0.tar, 1.tar, ... without a gap; {hint}")
    wanted = len(numbers) if num_sessions is None else num_sessions
    if not 1 <= wanted <= len(numbers):
        raise utils.UserError(f"--num_sessions {wanted}: {subj} has {len(numbers)} sessions in {folder}; "
                              f"give 1 to {len(numbers)}")
    return [folder / f"{number}.tar" for number in numbers[:wanted]]


def _read_shards(folder, shards, what):
    """Read the behaviour of each shard, [(trials, 17)], and keep it in `folder`: unpacking takes a minute.

    What is kept holds good while the shard has the size and the time it had then. Where the folder cannot be written
    to, shards are unpacked every time.
    """
    kept = folder / ".behaviour.npz"
    known = {}
    try:
        with np.load(kept, allow_pickle=False) as file:
            known = dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        pass
    found, fresh = [], False
    for shard in utils.progress(shards, desc=f"{what}, read once", unit="tar", delay=2, leave=False):
        hint = f"{DOWNLOAD}, or check --data_path and --subj"
        stat = utils.require(shard, "shard", hint).stat()
        name = f"{shard.name} {stat.st_size} {stat.st_mtime_ns}"
        if name not in known:
            known[name], fresh = read_shard(shard), True
        found.append(known[name])
    if fresh:
        current = {name: behav for name, behav in known.items() if (folder / name.split()[0]).exists()}
        try:
            with atomic_path(kept) as temporary, open(temporary, "wb") as file:
                np.savez_compressed(file, **current)
        except utils.UserError:  # that it could not be written
            pass
    return found


def read_shard(path):
    """Unpack the behaviour of every trial in one tar, (trials, 17) float64."""
    import webdataset  # imports torch, which nothing else here needs

    hint = "delete it and download it again"
    try:
        if not _is_whole_tar(path):
            raise tarfile.ReadError("truncated: its end mark is missing")
        # every process reads every shard, whatever its rank: no splitting by node or worker
        samples = webdataset.WebDataset([str(path)], shardshuffle=False, nodesplitter=None, workersplitter=None,
                                        select_files=lambda name: name.endswith(".behav.npy"))
        behav = [np.load(io.BytesIO(sample["behav.npy"]), allow_pickle=False) for sample in samples]
        behav = np.stack(behav).reshape(len(behav), BEHAV_COLUMNS)
    except (tarfile.TarError, ValueError, OSError, EOFError) as error:
        raise utils.UserError(f"{path}: not a readable shard ({str(error).splitlines()[0]}); {hint}") from None
    known = behav[:, [BEHAV_IMAGE_ID, BEHAV_SESSION, BEHAV_TRIAL]]
    if not np.all(known >= 0):  # absent is written as -1; NaN fails as well
        raise utils.UserError(f"{path}: a trial without image id, session or trial number; {hint}")
    return behav


def _is_whole_tar(path):
    """Whether two blocks of zeros follow the last member: a tar cut between two members reads without an error."""
    with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        tar.getmembers()
        file.seek(tar.offset)
        return file.read(1024) == bytes(1024)


def shared_images(paths, n_images):
    """List the ids of the images that test sets are made of, ascending; nothing may be fitted on them.

    MindEye2's shared1000.npy; where it is missing, the images of every new_test shard that is there. n_images: how many
    images there are. Raises UserError when neither is there.
    """
    file = paths.data_path / "shared1000.npy"
    if file.exists():
        mask = load_npy(file, "mask of the shared images", DOWNLOAD)
        if mask.shape != (n_images,):
            raise utils.UserError(f"{file}: shape {mask.shape}, wanted ({n_images},), one for each image; "
                                  "check that both are of one data set")
        return np.flatnonzero(mask)
    tested = sorted(folder.parent.name for folder in paths.data_path.glob("wds/subj[0-9][0-9]/new_test"))
    if not tested:
        raise utils.UserError(f"{file}: mask of the shared images not found, nor test trials beside it, so that "
                              f"nobody knows what is tested on; {DOWNLOAD}, or check --data_path")
    return np.unique(np.concatenate([load_trials(paths, subj, "new_test")["image_id"] for subj in tested]))


# --- training and validation images -------------------------------------------------------------------------------


def split_trials(paths, subj, num_sessions, fraction, seed, hold_out=None):
    """Read a subject's trials and split them into those that train and those that validate; see split_by_image.

    hold_out: 'K/N', the cluster of images (nsd.clusters) that is in neither; clusters that are not there yet are made.
    """
    trials = load_trials(paths, subj, "train", num_sessions)
    if hold_out:
        trials = trials[~in_cluster(paths, hold_out, trials["image_id"], partial(shared_images, paths))]
        if trials.empty:
            raise utils.UserError(f"--hold_out {hold_out}: {subj} saw no other images; give more clusters")
    return split_by_image(trials, fraction, seed)


def split_by_image(trials, fraction, seed):
    """Split trials into (train, val) without a common image; about `fraction` of the images, at least one, in val.

    Whether an image is in val depends on (seed, image id) alone, so that no image that several subjects saw is
    trained on with one of them and validated on with another.
    """
    images = trials["image_id"].unique()
    draw = np.random.default_rng(seed).random(images.max() + 1)
    threshold = max(fraction, np.nextafter(draw[images].min(), 1))
    in_val = draw[trials["image_id"]] < threshold
    return trials[~in_val].reset_index(drop=True), trials[in_val].reset_index(drop=True)
