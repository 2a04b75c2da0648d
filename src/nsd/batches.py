"""Batches of trials to train on, drawn from (seed, epoch). Letters: B batch, V voxels of a subject."""

from collections import defaultdict

import numpy as np
import torch

import utils
from nsd.repeats import AveragedRows
from nsd.rows import read_betas


class Epochs(torch.utils.data.Dataset):
    """Epochs of equally many batches, and which of them it is. Item i is a whole batch, made by `batch(i)`."""

    def __init__(self, n_batches):
        self.n_batches = n_batches
        self._epoch = torch.tensor(0).share_memory_()  # seen by persistent DataLoader workers too

    def set_epoch(self, epoch):
        """Choose the epoch; call it before iterating."""
        self._epoch.fill_(epoch)

    @property
    def epoch(self):
        return self._epoch.item()

    def __len__(self):
        return self.n_batches

    def __getitem__(self, index):
        if not 0 <= index < self.n_batches:
            raise IndexError(index)
        return self.batch(index)


class EpochBatches(Epochs):
    """An epoch's batches: every trial once, no image twice in a batch, equal shares of the subjects.

    Item i is a whole batch, so use it with DataLoader(batch_size=None, shuffle=False):
        voxels     {subject: (b_s, V_s) float32}
        targets    {name: (B, *row_shape) float32}, subject by subject in the order of `voxels`
        image_ids  (B,) int64, likewise
        sizes      {subject: b_s}
    With `average`, a trial's row of voxels is the mean of its own response and some random others of the subject's
    to the same image: with m trials of the image, from 1 to m are averaged, each number equally often.
    When `size` processes train together, voxels and targets are only those of the joint batch's rows rank, rank + size,
    ...; image_ids and sizes are those of all.
    The subject with most trials gives batch_size // n_subjects to a batch (some batches get one less); those of a
    subject with fewer are spread evenly. Batches are drawn from (seed, epoch) alone, what is averaged in one from
    (seed, epoch, batch).
    """

    def __init__(self, tables, betas, targets, batch_size, seed, rank=0, size=1, average=False):
        """tables: {subject: table of trials}; betas: {subject: Rows}; targets: {name: Rows by image id}.

        AveragedRows may stand in for betas, CoefficientRows for a target. average: see above.

        Raises UserError for impossible batch sizes, and for images that a target does not have.
        """
        share = batch_size // len(tables)
        if share < 1:
            raise utils.UserError(f"--batch_size {batch_size}: fewer than the {len(tables)} subjects; raise it")
        for subj, table in tables.items():
            if table.empty:
                raise utils.UserError(f"{subj}: no trials to train on or to validate with; check --num_sessions, "
                                      "--val_fraction and the wds folder")
        if share * len(tables) < size:
            raise utils.UserError(f"--batch_size {batch_size}: fewer trials than the {size} processes; raise it")
        self.rank, self.size, self.average = rank, size, average
        self.betas, self.targets, self.seed = betas, targets, seed
        self.image_ids = {subj: table["image_id"].to_numpy() for subj, table in tables.items()}
        self.rows = {subj: table["row"].to_numpy() for subj, table in tables.items()}
        for ids in self.image_ids.values():
            for rows in targets.values():
                rows.require(ids)
        self.repeats = {subj: _repeats(ids) for subj, ids in self.image_ids.items()} if average else {}
        # enough for the shares, and one for each trial of the image that is repeated most often
        repeats = np.unique(np.concatenate(list(self.image_ids.values())), return_counts=True)[1].max()
        super().__init__(max(-(-max(map(len, tables.values())) // share), int(repeats)))
        self._planned, self._plan = None, None

    def plan(self):
        """Return this epoch's batches: {subject: list of n_batches index arrays into its trials}."""
        epoch = self.epoch
        if self._planned != epoch:
            rng = np.random.default_rng(utils.derive_seed(self.seed, epoch))
            used = defaultdict(set)  # image id -> the batches it is in, whoever saw it
            self._plan = {subj: _deal(ids, self.n_batches, used, rng) for subj, ids in self.image_ids.items()}
            self._planned = epoch
        return self._plan

    def batch(self, index):
        chosen = {subj: batches[index] for subj, batches in self.plan().items()}
        image_ids = np.concatenate([self.image_ids[subj][trials] for subj, trials in chosen.items()])
        parts = self._own_parts(chosen)
        drawn = self._draw(chosen, index)
        voxels = {subj: self._responses(subj, *(array[part] for array in drawn[subj]))
                  for subj, part in zip(chosen, parts, strict=True)}
        targets = {name: read_targets(rows, image_ids[self.rank::self.size]) for name, rows in self.targets.items()}
        return {
            "voxels": {subj: torch.from_numpy(array) for subj, array in voxels.items()},
            "targets": {name: torch.from_numpy(array) for name, array in targets.items()},
            "image_ids": torch.from_numpy(image_ids),
            "sizes": {subj: len(trials) for subj, trials in chosen.items()},
        }

    def _draw(self, chosen, index):
        """Draw the trials whose mean is a row of the joint batch: {subject: members (b_s, m), sizes (b_s,)}.

        Of a row of members, the first ones are averaged, as many as its size says; the trial itself is the first.
        """
        if not self.average:
            return {subj: (trials[:, None], np.ones(len(trials), np.int64)) for subj, trials in chosen.items()}
        rng, drawn = np.random.default_rng(utils.derive_seed(self.seed, self.epoch, index + 1)), {}
        for subj, trials in chosen.items():
            members = self.repeats[subj][trials]
            places = rng.random(members.shape)
            places[members == trials[:, None]] = -1
            places[members < 0] = 2
            members = np.take_along_axis(members, places.argsort(axis=1), axis=1)
            drawn[subj] = members, 1 + (rng.random(len(trials)) * (members >= 0).sum(1)).astype(np.int64)
        return drawn

    def _responses(self, subj, members, sizes):
        """Read the mean response of each row of members (see _draw), (b, V) float32."""
        trials = members[np.arange(members.shape[1]) < sizes[:, None]]
        responses = read_betas(self.betas[subj], self.rows[subj][trials])
        return responses if len(trials) == len(sizes) else AveragedRows.average(responses, sizes)

    def _own_parts(self, chosen):
        """Yield the slice of each subject's trials that is this process's (training.team says which rows are whose)."""
        offset = 0
        for trials in chosen.values():
            yield slice((self.rank - offset) % self.size, None, self.size)
            offset += len(trials)


def read_targets(target, image_ids):
    """Read the target's rows of images (n,) as float32; raises UserError when one is not a finite number."""
    stored = target[image_ids]
    rows = stored.astype(np.float32, copy=False)
    if stored.dtype.kind == "f":
        finite = np.isfinite(rows).all(axis=tuple(range(1, rows.ndim)))
        if not finite.all():
            raise utils.UserError(f"{target.path}: image id {np.asarray(image_ids)[~finite][0]} holds NaN or infinite "
                                  "values, wanted finite ones; delete the file and write it again (img2feat.py)")
    return rows


def _repeats(image_ids):
    """List the trials that show the same image, of each of n trials: (n, m), -1 where it has fewer than m."""
    _, image, counts = np.unique(image_ids, return_inverse=True, return_counts=True)
    order = np.argsort(image, kind="stable")
    place = np.empty(len(order), np.int64)  # of a trial among those of its image
    place[order] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    by_image = np.full((len(counts), counts.max()), -1)
    by_image[image, place] = np.arange(len(order))
    return by_image[image]


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
