"""Responses that an encoding model predicts to stimuli the subject never saw: more for its decoders to train on.

encoding.simulation makes them, score_gnet.py --synthetic writes them, training.runs adds them to measured trials.
(Not to be confused with NSD-synthetic, measured responses to stimuli of another kind: nsd.synthetic.)
Letters: N stimuli, V voxels.
"""

import h5py
import numpy as np
import pandas as pd

import utils
from disk.files import load_json
from nsd.rows import Rows
from nsd.trials import load_trials, shared_images

TRIALS = 3  # of a stimulus, as NSD's subjects saw each
FILE = "responses.hdf5"


def stimuli_to_simulate(paths, subj, n_images):
    """List the ids of the stimuli that no test set holds and subj saw in no session, ascending.

    n_images: how many stimuli there are.
    """
    own = np.concatenate([load_trials(paths, subj, split)["image_id"] for split in ("train", "new_test")])
    return np.setdiff1d(np.arange(n_images), np.concatenate([own, shared_images(paths, n_images)]))


def write_simulated(file, image_ids, blocks, n_voxels):
    """Write simulated responses: `betas` (TRIALS N, V) float32 beside `image_ids` of every row.

    image_ids: (N,); blocks: their responses in this order, arrays of a few stimuli's trials, one after the other.
    """
    with h5py.File(file, "w") as opened:
        opened["image_ids"] = np.repeat(image_ids, TRIALS)
        betas, start = opened.create_dataset("betas", (TRIALS * len(image_ids), n_voxels), np.float32), 0
        for block in blocks:
            betas[start:start + len(block)] = block
            start += len(block)


class SimulatedTrials:
    """A subject's first N simulated stimuli, as score_gnet.py --synthetic wrote them.

    .rows    Rows (trials, V) of the file
    .table   [image_id, row], a line per trial
    """

    def __init__(self, paths, subj, n, num_sessions, val_fraction, seed):
        """n: stimuli. The others say what the training in need of them uses: the encoding model must know no more.

        Raises UserError where there are none, fewer than n, or those of a model that trained on other images.
        """
        folder = paths.simulated(subj, num_sessions)
        again = ("write it by an encoding model of these sessions (STAGES=gnet bash scripts/train.sh --num_sessions "
                 f"{num_sessions} --tag {num_sessions}sess; python src/score_gnet.py --subj {int(subj[4:])} --gnet_run "
                 f"gnet_{subj}_{num_sessions}sess --synthetic {n})")
        self.rows = Rows(folder / FILE, "betas", f"--synthetic: responses of {subj} simulated from {num_sessions} "
                         f"session{'s' * (num_sessions != 1)}", again).of("f", 1, "float (trials, voxels)")
        found = load_json(folder / "config.json", "what they were made from", again)
        wanted = {"num_sessions": num_sessions, "val_fraction": val_fraction, "seed": seed}
        differing = [f"{name} {found.get(name)}, wanted {value}" for name, value in wanted.items()
                     if found.get(name) != value]
        if differing:
            raise utils.UserError(f"{folder}: simulated by {found.get('run')}, trained with {'; '.join(differing)}, so "
                                  "that it may know images which validate here; train it with the same flags, and "
                                  "simulate again with --overwrite")
        n_there = len(self.rows) // TRIALS
        if n > n_there:
            raise utils.UserError(f"--synthetic {n}: {folder} holds {n_there} stimuli; give as many, or write more "
                                  "(score_gnet.py --synthetic, --overwrite)")
        with h5py.File(self.rows.path, "r") as file:
            image_ids = file["image_ids"][:TRIALS * n]
        self.table = pd.DataFrame({"image_id": image_ids, "row": np.arange(len(image_ids))})


class JoinedRows:
    """Measured responses of a subject and, behind them, simulated ones; stands in for Rows, (trials of both, V)."""

    def __init__(self, measured, simulated):
        """Rows of both; raises UserError where they are not of the same voxels."""
        if measured.shape[1] != simulated.shape[1]:
            raise utils.UserError(f"{simulated.path}: responses of {simulated.shape[1]} voxels, the betas have "
                                  f"{measured.shape[1]}; simulate again with a GNet of these (--overwrite)")
        self.measured, self.simulated, self.path = measured, simulated, measured.path
        self.shape = (len(measured) + len(simulated), measured.shape[1])

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        """rows: (n,) integers -> (n, V) float32."""
        rows = np.asarray(rows, np.int64)
        behind = rows >= len(self.measured)
        found = np.empty((len(rows), self.shape[1]), np.float32)
        found[~behind] = self.measured[rows[~behind]]
        found[behind] = self.simulated[rows[behind] - len(self.measured)]
        return found

    def join(self, trials, further):
        """Join tables of trials, of the measured rows and of the simulated ones, into one of these rows."""
        return pd.concat([trials, further.assign(row=further["row"] + len(self.measured))], ignore_index=True)
