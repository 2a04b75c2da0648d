"""The only file that knows the Natural Scenes Dataset: columns, HDF5 keys, shards, subjects, ids, ROI masks.

Letters: N images, V voxels, B batch. Image ids are 0-based 73k ids everywhere: the official files that count from 1 are
converted here (`check_against_expdesign`) and nowhere else.
"""

import io
import json
import mmap
import os
import tarfile
import zipfile
import zlib
from collections import defaultdict
from typing import NamedTuple

import h5py
import nibabel
import numpy as np
import pandas as pd
import scipy.io
import torch
import webdataset
from tqdm import tqdm

import utils

DOWNLOAD = "download it (bash scripts/download.sh)"  # what to do about a file that is not there
SUBJECTS = [f"subj{number:02d}" for number in range(1, 9)]
# columns of a shard's behav.npy (1, 17); the global trial is the row of the subject's betas
BEHAV_IMAGE_ID, BEHAV_SESSION, BEHAV_TRIAL, BEHAV_SHARED, BEHAV_COLUMNS = 0, 2, 5, 16, 17
PRF_LABELS = {"V1": (1, 2), "V2": (3, 4), "V3": (5, 6), "V4": (7,)}  # of prf-visualrois: ventral and dorsal halves
# feature files written by other programs are flat and do not say their shape: c, g and z of Stable Diffusion 1.x
KNOWN_FEATURE_SHAPES = {59136: (77, 768), 38400: (50, 768), 16384: (4, 64, 64)}


# --- rows of HDF5 data sets ---------------------------------------------------------------------------------------


class Rows:
    """Lazily read rows of one HDF5 data set that is too big to load.

    A contiguous, uncompressed data set is memory-mapped at its offset in the file; any other is read through h5py.
    Opened again in every process, so it can be handed to DataLoader workers.

    .shape      (N, *row_shape)
    .row_shape  the data set's attribute `shape` where there is one, else known_shapes[width] for flat rows of that
                width, else the data set's own shape; an axis of 1 as in (73000, 1, 38400) is dropped
    .dtype      as stored

    Where the file has a data set `written` (N,), only rows whose flag is not 0 are there (img2feat.py).
    """

    def __init__(self, path, key, what, hint, known_shapes=None, go_on=None):
        """what, hint: words for the UserError when the file is missing, truncated or not as wanted.

        go_on: for a row that is not written yet.
        """
        self.path, self.key = utils.require(path, what, hint), key
        self._hint, self._go_on = f"delete it and {hint}", go_on
        try:
            with h5py.File(path, "r") as file:
                self._describe(file[key], known_shapes or {})
                written = file["written"][()] != 0 if "written" in file else None
        except (OSError, KeyError, RuntimeError) as error:
            reason = str(error).strip("'\"")
            raise utils.UserError(f"{path}: `{key}` is not readable ({reason}); {self._hint}") from None
        self._written = None if written is None or written.all() else written  # None: every row is there
        self._source, self._opened_by = None, None

    def _describe(self, dataset, known_shapes):
        if not isinstance(dataset, h5py.Dataset):
            raise OSError("it is a group")
        self.dtype = dataset.dtype
        self._stored_shape = dataset.shape
        own_shape = dataset.shape[1:]
        if len(own_shape) == 2 and own_shape[0] == 1:
            own_shape = own_shape[1:]
        default = known_shapes.get(own_shape[0], own_shape) if len(own_shape) == 1 else own_shape
        self.row_shape = tuple(int(size) for size in dataset.attrs.get("shape", default))
        self.shape = (dataset.shape[0], *self.row_shape)
        if 0 in dataset.shape or np.prod(self.row_shape) != np.prod(own_shape):
            raise OSError(f"shape {dataset.shape}, attribute `shape` {self.row_shape}")

        plist = dataset.id.get_create_plist()
        contiguous = plist.get_layout() == h5py.h5d.CONTIGUOUS and plist.get_external_count() == 0
        self._offset = dataset.id.get_offset() if contiguous else None  # None too when nothing was ever written
        if contiguous and self._offset is None:
            raise OSError("it was created but never written")
        if contiguous:
            found, wanted = os.path.getsize(self.path), self._offset + dataset.size * dataset.dtype.itemsize
            if found < wanted:
                raise OSError(f"truncated: {found} bytes, wanted {wanted}")

    def __len__(self):
        return self.shape[0]

    def __getstate__(self):
        return {**self.__dict__, "_source": None, "_opened_by": None}

    def _open(self):
        if self._opened_by != os.getpid():  # an h5py handle must not be shared with a forked worker
            if self._offset is not None:
                self._source = np.memmap(self.path, self.dtype, "r", self._offset, self._stored_shape)
                # rows are drawn at random: reading ahead of a row is work for nothing (ten times that of the row)
                self._source._mmap.madvise(mmap.MADV_RANDOM)
            else:
                self._source = h5py.File(self.path, "r")[self.key]
            self._opened_by = os.getpid()
        return self._source

    def __getitem__(self, ids):
        """ids: slice or 1-D integers in any order, repeats allowed -> (len(ids), *row_shape) as stored."""
        ids = np.arange(len(self))[ids] if isinstance(ids, slice) else np.asarray(ids, np.int64)
        self.require(ids)
        source = self._open()
        if self._offset is not None:
            rows = np.asarray(source[ids])
        else:  # h5py takes ascending ids without repeats only
            unique, inverse = np.unique(ids, return_inverse=True)
            rows = source[unique][inverse]
        return rows.reshape(len(ids), *self.row_shape)

    def require(self, ids):
        """Raise UserError unless the file has all of these rows (n,)."""
        if len(ids) and (ids.min() < 0 or ids.max() >= len(self)):
            bad = ids.min() if ids.min() < 0 else ids.max()
            raise utils.UserError(f"{self.path}: row {bad} wanted, rows 0..{len(self) - 1} found; {self._hint}")
        if self._written is not None and not self._written[ids].all():
            first = ids[~self._written[ids]][0]
            raise utils.UserError(f"{self.path}: image id {first} is not written yet, {self._written.sum()} of "
                                  f"{len(self)} rows are there; {self._go_on}")

    def of(self, kind, n_axes, wanted):
        """These Rows, if they are of a kind of number (NumPy's letter) and have that many axes: else UserError."""
        if self.dtype.kind != kind or len(self.row_shape) != n_axes:
            raise utils.UserError(f"{self.path}: `{self.key}` is {self.dtype} of shape {self.shape}, wanted {wanted}; "
                                  f"{self._hint}")
        return self

    def batches(self, ids, size):
        """The rows of `ids` (n,), at most `size` at a time."""
        return (self[part] for part in np.array_split(ids, -(-len(ids) // size)))


def open_betas(paths, subj):
    """Rows of a subject's single-trial responses: (trials, V) float32, z-scored by session."""
    hint = f"{DOWNLOAD}, or check --data_path and --subj"
    return Rows(paths.betas(subj), "betas", f"betas of {subj}", hint).of("f", 1, "float (trials, voxels)")


def open_feature(paths, feat):
    """Rows of a feature of the stimuli, by image id: c (T, D), z (4, h, w), g_k (T, D)."""
    hint = f"write it with python src/img2feat.py --feats {feat}"
    go_on = f"go on with bash scripts/features.sh --feats {feat}"
    rows = Rows(paths.feature(feat), "data", f"feature {feat}", hint, KNOWN_FEATURE_SHAPES, go_on)
    return rows.of("f", 3, "float (N, 4, h, w)") if feat == "z" else rows.of("f", 2, "float (N, T, D)")


def open_stimuli(paths):
    """Rows of the stimuli, by image id: (N, H, W, 3) uint8."""
    hint = f"{DOWNLOAD}, or check --root"
    return Rows(paths.stimuli / "nsd_stimuli.hdf5", "imgBrick", "stimuli", hint).of("u", 3, "uint8 (N, H, W, 3)")


def read_betas(betas, rows):
    """Betas of some trials, (len(rows), V) float32; raises UserError when one is not a finite number."""
    voxels = betas[rows].astype(np.float32, copy=False)
    finite = np.isfinite(voxels).all(axis=1)
    if not finite.all():
        row = np.asarray(rows)[~finite][0]
        raise utils.UserError(f"{betas.path}: row {row} holds NaN or infinite betas; download or write the file again")
    return voxels


class AveragedRows:
    """Responses to images, (N, V): row i is the plain mean of the trials of image i, read when it is asked for.

    Stands in for the Rows of single-trial betas. image_ids (N,) ascend; `table` is the trials' of load_trials with a
    line per image [image_id, row], row being the number here.
    """

    def __init__(self, betas, trials):
        """betas: Rows of one subject; trials: a table of its trials."""
        trials = trials.sort_values(["image_id", "row"])
        self.image_ids, self.first, self.n_repeats = np.unique(trials["image_id"].to_numpy(), return_index=True,
                                                               return_counts=True)
        self.betas, self.path, self.rows = betas, betas.path, trials["row"].to_numpy()
        betas.require(self.rows)
        self.shape = (len(self.image_ids), betas.shape[1])
        self.table = pd.DataFrame({"image_id": self.image_ids, "row": np.arange(len(self.image_ids))})

    def __getitem__(self, images):
        """images: (n,) integers -> (n, V) float32."""
        counts = self.n_repeats[images]
        trials = np.concatenate([np.arange(first, first + n) for first, n in
                                 zip(self.first[images], counts, strict=True)])
        return self.average(read_betas(self.betas, self.rows[trials]), counts)

    @staticmethod
    def average(responses, counts):
        """Means of consecutive groups of counts (n,) rows: (sum of counts, V) -> (n, V)."""
        return np.add.reduceat(responses, np.cumsum(counts) - counts, axis=0) / counts[:, None].astype(np.float32)


def noise_ceiling(responses, n_repeats, images_at_once=500):
    """Highest r that a prediction can reach with mean responses to images of n_repeats (N,) trials each; (V,), or None.

    responses: AveragedRows, from whose repeats signal and noise are told apart (Allen et al. 2022, NSD): the noise
    variance is that of trials of one image, the signal's what is left of all trials' variance, not below 0;
    r = sqrt(signal / (signal + noise * mean(1 / n_repeats))). None when no image was shown twice.
    """
    n_trials, n_images = int(responses.n_repeats.sum()), len(responses.n_repeats)
    if n_trials == n_images:
        return None
    trials, squares, within = (np.zeros(responses.shape[1]) for _ in range(3))
    for start in range(0, n_images, images_at_once):
        counts = responses.n_repeats[start:start + images_at_once]
        first = responses.first[start]
        rows = read_betas(responses.betas, responses.rows[first:first + counts.sum()]).astype(np.float64)
        trials += rows.sum(0)
        squares += (rows**2).sum(0)
        within += ((rows - np.repeat(responses.average(rows, counts), counts, axis=0)) ** 2).sum(0)
    noise = within / (n_trials - n_images)
    total = (squares - trials**2 / n_trials) / (n_trials - 1)
    signal = (total - noise).clip(0)
    return np.sqrt(signal / np.maximum(signal + noise * np.mean(1 / n_repeats), 1e-12)).astype(np.float32)


# --- what subjects saw --------------------------------------------------------------------------------------------


def subjects(paths):
    """Names of the subjects whose betas are there, ascending; none raises UserError."""
    found = [subj for subj in SUBJECTS if paths.betas(subj).exists()]
    if not found:
        raise utils.UserError(f"{paths.data_path}: no betas_all_subj0X_fp32_renorm.hdf5 found; check --data_path")
    return found


def load_trials(paths, subj, split, num_sessions=None):
    """Table of a subject's trials: DataFrame [subject, session, image_id, row, is_shared], one line per trial.

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
    if _expdesign_file(paths).exists():
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
    """Behaviour of each shard, [(trials, 17)]; kept in `folder` for the next start, since unpacking takes a minute.

    What is kept counts as long as the shard has the size and the time it had then. A folder that can not be written to
    is read again every time.
    """
    kept = folder / ".behaviour.npz"
    known = {}
    try:
        with np.load(kept, allow_pickle=False) as file:
            known = dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        pass
    found, fresh = [], False
    for shard in tqdm(shards, desc=f"{what}, read once", unit="tar", delay=2, leave=False):
        hint = f"{DOWNLOAD}, or check --data_path and --subj"
        stat = utils.require(shard, "shard", hint).stat()
        name = f"{shard.name} {stat.st_size} {stat.st_mtime_ns}"
        if name not in known:
            known[name], fresh = _read_shard(shard), True
        found.append(known[name])
    if fresh:
        current = {name: behav for name, behav in known.items() if (folder / name.split()[0]).exists()}
        try:
            with utils.atomic_path(kept) as temporary, open(temporary, "wb") as file:
                np.savez_compressed(file, **current)
        except utils.UserError:  # that it could not be written
            pass
    return found


def _read_shard(path):
    """Behaviour of every trial in one tar, (trials, 17) float64."""
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


def _expdesign_file(paths):
    return paths.experiments / "nsd_expdesign.mat"


def _read_expdesign(paths, take):
    """take(what nsd_expdesign.mat holds, {name: array}); UserError where that fails."""
    file = utils.require(_expdesign_file(paths), "the experiment's design", DOWNLOAD)
    try:
        return take(scipy.io.loadmat(file, variable_names=["masterordering", "subjectim", "sharedix"]))
    except Exception as error:  # scipy raises many types for damaged files
        raise utils.UserError(f"{file}: not readable ({error!r}); download it again") from None


def load_design(paths, subj):
    """Image id of every designed trial of a subject, (trials,), from nsd_expdesign.mat.

    The file counts from 1: trial t (row of the betas) of subject s showed subjectim[s, masterordering[t] - 1] - 1.
    """
    def images_of_trials(design):
        order = design["masterordering"].ravel().astype(np.int64) - 1
        return design["subjectim"][SUBJECTS.index(subj)].astype(np.int64)[order] - 1

    return _read_expdesign(paths, images_of_trials)


def check_against_expdesign(paths, subj, trials):
    """Compare the trials' image ids with the experiment's design; raises UserError when one differs."""
    file, shown = _expdesign_file(paths), load_design(paths, subj)
    row, image_id = trials["row"].to_numpy(), trials["image_id"].to_numpy()
    if row.max() >= len(shown):
        raise utils.UserError(f"{file}: {len(shown)} trials, but the shards of {subj} have a trial {row.max()}; "
                              "check that both are of one data set")
    differs = shown[row] != image_id
    if differs.any():
        first = np.flatnonzero(differs)[0]
        shards = paths.data_path / "wds" / subj
        raise utils.UserError(f"{shards}: trial {row[first]} shows image {image_id[first]} (from 0), but {file} "
                              f"says {shown[row[first]]}; {differs.sum()} of {len(row)} trials differ; "
                              "check that both are of one subject and one data set")


def check_shared_images(paths):
    """Ids of the images that all subjects were to see; raises UserError unless all files that list them agree.

    They are: nsd_expdesign.mat (from 1), the table of the stimuli, and MindEye2's shared1000.npy.
    """
    shared = _read_expdesign(paths, lambda design: np.sort(design["sharedix"].ravel().astype(np.int64) - 1))
    mask_file = paths.data_path / "shared1000.npy"
    others = {"nsd_stim_info_merged.csv": load_stimulus_table(paths, ("nsdId", "shared1000"))["shared1000"].to_numpy(),
              mask_file: utils.load_npy(mask_file, "mask of the shared images", DOWNLOAD)}
    for name, mask in others.items():
        if not np.array_equal(np.flatnonzero(mask), shared):
            raise utils.UserError(f"{name}: {np.count_nonzero(mask)} shared images, of which nsd_expdesign.mat lists "
                                  f"{np.isin(np.flatnonzero(mask), shared).sum()} of its {len(shared)}, wanted the "
                                  "same; download both again")
    return shared


def check_trial_images(paths, subj):
    """Number of trials in COCO_73k_subj_indices.hdf5; raises UserError where it contradicts nsd_expdesign.mat."""
    file = utils.require(paths.data_path / "COCO_73k_subj_indices.hdf5", "image ids of trials",
                         DOWNLOAD)
    try:
        with h5py.File(file, "r") as listed:
            image_ids = listed[subj][()].astype(np.int64)
    except (OSError, KeyError) as error:
        raise utils.UserError(f"{file}: `{subj}` is not readable ({error}); download it again") from None
    trials = pd.DataFrame({"row": np.arange(len(image_ids)), "image_id": image_ids})
    check_against_expdesign(paths, subj, trials)
    return len(image_ids)


def load_stimulus_table(paths, columns=("nsdId", "cocoId")):
    """NSD's table of the stimuli, one row per image, in the order of image ids: DataFrame of the wanted columns."""
    file = paths.experiments / "nsd_stim_info_merged.csv"
    utils.require(file, "table of the stimuli", f"{DOWNLOAD}, or check --root")
    try:
        table = pd.read_csv(file, usecols=list(columns)).sort_values("nsdId", ignore_index=True)
    except ValueError as error:
        raise utils.UserError(f"{file}: columns {', '.join(columns)} wanted ({error}); download it again") from None
    if not np.array_equal(table["nsdId"], np.arange(len(table))):
        raise utils.UserError(f"{file}: nsdId is not 0..{len(table) - 1}, each once; download it again")
    return table


def write_captions(paths, archive):
    """Make nsd_captions.json, {cocoId: [caption, ...]}, of COCO's annotations_trainval2017.zip.

    NSD's images are from both of COCO's parts. Raises UserError when an image has no caption there.
    """
    wanted = {int(coco_id): [] for coco_id in load_stimulus_table(paths)["cocoId"]}
    try:
        with zipfile.ZipFile(archive) as parts:
            for part in ("train", "val"):
                with parts.open(f"annotations/captions_{part}2017.json") as file:
                    for annotation in json.load(file)["annotations"]:
                        if annotation["image_id"] in wanted:
                            wanted[annotation["image_id"]].append(annotation["caption"].strip())
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, zlib.error) as error:
        raise utils.UserError(f"{archive}: not COCO's captions ({error}); delete it and download it again") from None
    missing = [coco_id for coco_id, texts in wanted.items() if not texts]
    if missing:
        raise utils.UserError(f"{archive}: no caption of COCO image {missing[0]} and {len(missing) - 1} others; check "
                              "nsd_stim_info_merged.csv, or delete the archive and download it again")
    utils.save_json(paths.captions, {str(coco_id): texts for coco_id, texts in wanted.items()})


def load_captions(paths):
    """Captions of every image: list by image id of lists of str (about 5 each)."""
    table, caption_file = load_stimulus_table(paths), paths.captions
    by_coco_id = utils.load_json(caption_file, "captions", "download them (bash scripts/download.sh)")
    captions = [by_coco_id.get(str(coco_id)) for coco_id in table["cocoId"]]
    missing = [image_id for image_id, texts in enumerate(captions) if not texts]
    if missing:
        raise utils.UserError(f"{caption_file}: no caption for image {missing[0]} and {len(missing) - 1} others "
                              "(cocoId as in nsd_stim_info_merged.csv); write or download it again")
    return captions


def roi_masks(paths, subj):
    """Regions of interest of a subject: dict name -> bool (V,) over the voxels of its betas.

    From MindEye2's brain_region_masks.hdf5, or from NSD's own volumes where that is not there. Where both are, they
    must agree: UserError otherwise, since then the betas' voxels are in another order than one of them.
    """
    file = paths.data_path / "brain_region_masks.hdf5"
    volumes = paths.rois(subj) / "nsdgeneral.nii.gz"
    if not file.exists() and volumes.exists():
        return _masks_of_volumes(paths, subj)
    utils.require(file, "ROI masks", f"{DOWNLOAD}, check --data_path, or put NSD's {volumes.name} and "
                  f"prf-visualrois.nii.gz into {volumes.parent}")
    try:
        with h5py.File(file, "r") as regions:
            masks = {name: mask[()] for name, mask in regions[subj].items()}
        if words := [name for name, mask in masks.items() if mask.dtype.kind not in "biuf"]:
            raise OSError(f"{words[0]} is of {masks[words[0]].dtype}, wanted 0 and 1")
        masks = {name: mask.astype(bool) for name, mask in masks.items()}
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise utils.UserError(f"{file}: masks of {subj} are not readable ({error}); download it again") from None
    n_voxels = open_betas(paths, subj).shape[1]
    for name, mask in masks.items():
        if mask.shape != (n_voxels,):
            raise utils.UserError(f"{file}: mask {name} of {subj} has shape {mask.shape}, its betas {n_voxels} voxels; "
                                  "check that both are of one data set")
    if volumes.exists():
        others = _masks_of_volumes(paths, subj)
        for name in PRF_LABELS:
            if name in masks and not np.array_equal(masks[name], others[name]):
                raise utils.UserError(
                    f"{file}: {name} of {subj} has {masks[name].sum()} voxels, of which {volumes.parent} says so of "
                    f"{(masks[name] & others[name]).sum()} (its own {name} has {others[name].sum()}), wanted the same; "
                    "check that both are of one data set")
    return masks


def _masks_of_volumes(paths, subj):
    """The masks from NSD's nsdgeneral and prf-visualrois volumes, (X, Y, Z); voxels in C order, as the betas are."""
    folder = paths.rois(subj)
    volumes = {}
    for name in ("nsdgeneral", "prf-visualrois"):
        file = utils.require(folder / f"{name}.nii.gz", "ROI volume", DOWNLOAD)
        try:
            volumes[name] = np.asarray(nibabel.load(file).dataobj)
        except Exception as error:  # nibabel and gzip raise many types for damaged files
            raise utils.UserError(f"{file}: not a readable NIfTI volume ({error}); download it again") from None
    general, labels = volumes.values()
    if general.shape != labels.shape:
        raise utils.UserError(f"{folder}: nsdgeneral is of {general.shape}, prf-visualrois of {labels.shape}, wanted "
                              "the same; download both again")
    inside = general.ravel() == 1  # C order; -1 is outside
    n_voxels = open_betas(paths, subj).shape[1]
    if inside.sum() != n_voxels:
        raise utils.UserError(f"{folder}/nsdgeneral.nii.gz: {inside.sum()} voxels, the betas of {subj} have "
                              f"{n_voxels}; check that both are of one subject and one data set")
    label = labels.ravel()[inside]
    masks = {name: np.isin(label, values) for name, values in PRF_LABELS.items()}
    early = np.any(list(masks.values()), axis=0)
    return {"nsd_general": np.ones(n_voxels, bool), **masks, "higher_vis": ~early}


# --- training -----------------------------------------------------------------------------------------------------


def split_trials(paths, subj, num_sessions, fraction, seed):
    """A subject's trials that train and those that validate, (train, val); see split_by_image."""
    return split_by_image(load_trials(paths, subj, "train", num_sessions), fraction, seed)


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


class EpochBatches(torch.utils.data.Dataset):
    """An epoch's batches: every trial once, no image twice in a batch, equal shares of the subjects.

    Item i is a whole batch, so use it with DataLoader(batch_size=None, shuffle=False):
        voxels     {subject: (b_s, V_s) float32}
        targets    {name: (B, *row_shape) float32}, subject by subject in the order of `voxels`
        image_ids  (B,) int64, likewise
        sizes      {subject: b_s}
    When `size` processes train together, voxels and targets are only those of the joint batch's rows rank, rank + size,
    ...; image_ids and sizes are those of all.
    The subject with most trials gives batch_size // n_subjects to a batch (some batches get one less); those of a
    subject with fewer are spread evenly. Batches are drawn from (seed, epoch) alone.
    """

    def __init__(self, tables, betas, targets, batch_size, seed, rank=0, size=1):
        """tables: {subject: trials}, betas: {subject: Rows}, targets: {name: Rows by image id}."""
        share = batch_size // len(tables)
        if share < 1:
            raise utils.UserError(f"--batch_size {batch_size}: fewer than the {len(tables)} subjects; raise it")
        for subj, table in tables.items():
            if table.empty:
                raise utils.UserError(f"{subj}: no trials to train on or to validate with; check --num_sessions, "
                                      "--val_fraction and the wds folder")
        if share * len(tables) < size:
            raise utils.UserError(f"--batch_size {batch_size}: fewer trials than the {size} processes; raise it")
        self.rank, self.size = rank, size
        self.betas, self.targets, self.seed = betas, targets, seed
        self.image_ids = {subj: table["image_id"].to_numpy() for subj, table in tables.items()}
        self.rows = {subj: table["row"].to_numpy() for subj, table in tables.items()}
        for ids in self.image_ids.values():
            for rows in targets.values():
                rows.require(ids)
        # an image that is repeated more often than that needs a batch for each of its trials
        repeats = np.unique(np.concatenate(list(self.image_ids.values())), return_counts=True)[1].max()
        self.n_batches = max(-(-max(map(len, tables.values())) // share), int(repeats))
        self._epoch = torch.tensor(0).share_memory_()  # seen by persistent DataLoader workers too
        self._planned, self._plan = None, None

    def set_epoch(self, epoch):
        """Choose the epoch; call it before iterating."""
        self._epoch.fill_(epoch)

    def __len__(self):
        return self.n_batches

    def plan(self):
        """This epoch's batches: {subject: list of n_batches index arrays into its trials}."""
        epoch = self._epoch.item()
        if self._planned != epoch:
            rng = np.random.default_rng(utils.derive_seed(self.seed, epoch))
            used = defaultdict(set)  # image id -> the batches it is in, whoever saw it
            self._plan = {subj: _deal(ids, self.n_batches, used, rng) for subj, ids in self.image_ids.items()}
            self._planned = epoch
        return self._plan

    def __getitem__(self, index):
        if not 0 <= index < self.n_batches:
            raise IndexError(index)
        chosen = {subj: batches[index] for subj, batches in self.plan().items()}
        image_ids = np.concatenate([self.image_ids[subj][trials] for subj, trials in chosen.items()])
        parts = self._own_parts(chosen)
        mine = {subj: trials[part] for (subj, trials), part in zip(chosen.items(), parts, strict=True)}
        voxels = {subj: read_betas(self.betas[subj], self.rows[subj][trials]) for subj, trials in mine.items()}
        own_ids = image_ids[self.rank::self.size]
        targets = {name: rows[own_ids].astype(np.float32, copy=False) for name, rows in self.targets.items()}
        return {
            "voxels": {subj: torch.from_numpy(array) for subj, array in voxels.items()},
            "targets": {name: torch.from_numpy(array) for name, array in targets.items()},
            "image_ids": torch.from_numpy(image_ids),
            "sizes": {subj: len(trials) for subj, trials in chosen.items()},
        }

    def _own_parts(self, chosen):
        """The slice of each subject's trials that is this process's (distributed.Team says which rows are whose)."""
        offset = 0
        for trials in chosen.values():
            yield slice((self.rank - offset) % self.size, None, self.size)
            offset += len(trials)


def _deal(image_ids, n_batches, used, rng):
    """Deal trials into batches at random: sizes differ by at most one, no image comes twice into a batch.

    Image after image, each trial takes the next of the open places. These are a random order of all batches, renewed
    when it runs out, so places are filled evenly; a place in a batch that has the image already is left for later.
    image_ids (n,); used: image id -> set of batches, updated. Returns n_batches index arrays into image_ids.
    """
    _, image = np.unique(image_ids, return_inverse=True)
    order = np.argsort(rng.permutation(image.max() + 1)[image], kind="stable")  # images shuffled, their trials adjacent
    batch_of = np.empty(len(image_ids), np.int64)
    places = []
    for trial in order.tolist():
        taken = used[int(image_ids[trial])]
        if taken.issuperset(places):
            places = rng.permutation(n_batches).tolist() + places
        last_free = next(k for k in reversed(range(len(places))) if places[k] not in taken)
        batch_of[trial] = places.pop(last_free)
        taken.add(int(batch_of[trial]))
    by_batch = np.argsort(batch_of, kind="stable")
    return np.split(by_batch, np.cumsum(np.bincount(batch_of, minlength=n_batches))[:-1])


# --- testing ------------------------------------------------------------------------------------------------------


class TestSet(NamedTuple):
    """Images and a subject's responses to them, averaged over repeats."""

    __test__ = False  # not a pytest class

    image_ids: np.ndarray  # (N,) int64, ascending
    betas: np.ndarray  # (N, V) float32, plain mean over the repeats that exist
    n_repeats: np.ndarray  # (N,) int64


def load_test_set(paths, subj, control=None, seed=0, held_out=None, split="new_test", repeats="mean"):
    """Read a subject's test set: the shared images, or the validation images that a training held out.

    split: "new_test" or "test" (see load_trials), or "val", of which held_out says what it is: (num_sessions,
    val_fraction, seed) of that training, as in split_trials. repeats: "mean" of an image's trials, or "single", the
    first of them. control makes a null control of the same size and repeats (same images and ids):

    "shuffle": every response is one to another image, trials permuted; "noise": normal noise with each voxel's mean and
    standard deviation over the test trials; "mean": the mean response for every image.
    """
    trials = split_trials(paths, subj, *held_out)[1] if split == "val" else load_trials(paths, subj, split)
    return average_repeats(open_betas(paths, subj), trials, control, seed, repeats)


def responses_to(paths, subj, image_ids, num_sessions=None, control=None, seed=0, repeats="mean"):
    """TestSet of exactly these images (N,): test images, or training images of the first num_sessions.

    control, seed, repeats: as load_test_set. Raises UserError for an image that the subject did not see.
    """
    trials = load_trials(paths, subj, "new_test")
    if not np.isin(image_ids, trials["image_id"]).all():
        trials = load_trials(paths, subj, "train", num_sessions)
    trials = trials[trials["image_id"].isin(image_ids)]
    unseen = np.setdiff1d(image_ids, trials["image_id"])
    if unseen.size:
        raise utils.UserError(f"image id {unseen[0]}: {subj} did not see it and {unseen.size - 1} others, all as test "
                              "images or all as training images; check --subj")
    return average_repeats(open_betas(paths, subj), trials, control, seed, repeats)


def average_repeats(betas, trials, control=None, seed=0, repeats="mean"):
    """Average the responses (Rows `betas`) to each image of a table of trials; returns a TestSet.

    control, repeats: as load_test_set.
    """
    if repeats == "single":
        trials = trials.sort_values("row").drop_duplicates("image_id")
    by_image = AveragedRows(betas, trials)
    responses = read_betas(betas, by_image.rows)  # (trials, V), grouped by image
    if control is not None:
        owner = np.repeat(np.arange(len(by_image.image_ids)), by_image.n_repeats)
        responses = _null_responses(responses, owner, control, np.random.default_rng(seed))
    return TestSet(by_image.image_ids, by_image.average(responses, by_image.n_repeats), by_image.n_repeats)


def _null_responses(betas, owner, control, rng):
    """Replace single-trial betas (trials, V) by a null control's; owner (trials,) numbers the images."""
    mean = betas.mean(axis=0, dtype=np.float64).astype(np.float32)
    if control == "mean":
        return np.broadcast_to(mean, betas.shape)
    if control == "noise":
        std = betas.std(axis=0, dtype=np.float64).astype(np.float32)
        return rng.standard_normal(betas.shape, dtype=np.float32) * std + mean
    if control == "shuffle":
        return betas[_move_to_other_images(owner, rng)]
    raise ValueError(f"control {control!r}")


def _move_to_other_images(owner, rng):
    """A random permutation of trials in which no trial stays with its image; owner (trials,) numbers the images."""
    if 2 * np.bincount(owner).max() > len(owner):
        raise utils.UserError("--control shuffle: one image has more than half of the test trials; use another control")
    permutation = rng.permutation(len(owner))
    while (stuck := np.flatnonzero(owner[permutation] == owner)).size:
        for trial in stuck:
            other = rng.integers(len(owner))
            permutation[[trial, other]] = permutation[[other, trial]]
    return permutation
