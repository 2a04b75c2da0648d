"""Responses that an encoding model predicts to stimuli the subject never saw: more for its decoders to train on.

encoding.simulation makes them, score_gnet.py --synthetic writes them, train_*.py --synthetic reads them.
(Not to be confused with NSD-synthetic, measured responses to stimuli of another kind: nsd.synthetic.)
Letters: N stimuli, V voxels.
"""

import h5py
import numpy as np
import pandas as pd

import utils
from disk.files import load_json
from nsd.rows import Rows, open_betas
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


def open_simulated(paths, subj, num_sessions):
    """Open the responses of a subject that a GNet of so many sessions simulated: Rows (trials, V) float32."""
    number, name = int(subj[4:]), f"{num_sessions}sess"
    again = (f"train an encoding model of these sessions (SUBJ={number} STAGES=gnet bash scripts/train.sh "
             f"--num_sessions {num_sessions} --tag {name}) and let it simulate (SUBJ={number} STAGES=gnet bash "
             f"scripts/score.sh --gnet_run gnet_{subj}_{name} --synthetic 1000)")
    return Rows(paths.simulated(subj, num_sessions) / FILE, "betas", f"--synthetic: responses simulated from "
                f"{num_sessions} session{'s' * (num_sessions != 1)} of {subj}", again).of(
                    "f", 1, "float (trials, voxels)")


class SimulatedTrials:
    """A subject's simulated trials, as score_gnet.py --synthetic wrote them.

    .rows    Rows (trials, V) of the file
    .table   [image_id, row], a line per trial
    """

    def __init__(self, paths, subj, num_sessions, val_fraction, seed):
        """num_sessions, val_fraction, seed: of the training in need of them; the encoding model must know no more.

        Raises UserError where there are none, or those of a model that trained on other images.
        """
        self.rows, folder = open_simulated(paths, subj, num_sessions), paths.simulated(subj, num_sessions)
        found = load_json(folder / "config.json", "what they were made from",
                          "simulate again (score_gnet.py --synthetic, --overwrite)")
        wanted = {"num_sessions": num_sessions, "val_fraction": val_fraction, "seed": seed}
        differing = [f"{name} {found.get(name)}, wanted {value}" for name, value in wanted.items()
                     if found.get(name) != value]
        if differing:
            raise utils.UserError(f"{folder}: simulated by {found.get('run')}, trained with {'; '.join(differing)}, so "
                                  "that it may know images which validate here; train it with the same flags, and "
                                  "simulate again with --overwrite")
        n_voxels = open_betas(paths, subj).shape[1]
        if self.rows.shape[1] != n_voxels:
            raise utils.UserError(f"{self.rows.path}: responses of {self.rows.shape[1]} voxels, the betas have "
                                  f"{n_voxels}; simulate again with a GNet of these (--overwrite)")
        with h5py.File(self.rows.path, "r") as file:
            image_ids = file["image_ids"][()]
        self.table = pd.DataFrame({"image_id": image_ids, "row": np.arange(len(image_ids))})
