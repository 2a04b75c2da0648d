"""Simulated responses: what an encoding model predicts, and noise as it was measured. N stimuli, M trials, V voxels."""

import numpy as np

import utils
from nsd.rows import open_betas, open_stimuli, read_betas
from nsd.simulated import TRIALS
from nsd.trials import split_trials

MOST_TRIALS = 2000  # whose noise is drawn from: 130 MB on NSD


def residuals(encoder, paths, trials, most=MOST_TRIALS):
    """Measured minus predicted responses to trials, (M, V): all of a table's, or `most` of them, evenly spread."""
    trials = trials.iloc[utils.evenly(len(trials), most)]
    image_ids, image = np.unique(trials["image_id"], return_inverse=True)
    predicted = encoder.predict(open_stimuli(paths).batches(image_ids, 50))
    return read_betas(open_betas(paths, encoder.subj), trials["row"].to_numpy()) - predicted[image]


def noise_of(encoder, paths):
    """Return the noise to draw from, (M, V): what the encoding model misses in single training trials.

    Of a trial all voxels together, since they err together. On images that the model was fitted to it misses too
    little: all is scaled to its mean square on validation images, which are too few to say more.
    """
    train, val = (residuals(encoder, paths, trials) for trials in
                  split_trials(paths, encoder.subj, *encoder.held_out))
    return train * np.sqrt(np.square(val).mean() / np.square(train).mean())


def simulate(encoder, batches, noise, rng):
    """Yield responses to pictures, batch by batch (n, H, W, 3): TRIALS of each, one after the other, (n TRIALS, V).

    noise: of noise_of, of which each trial gets a row at random.
    """
    for pictures in batches:
        responses = np.repeat(encoder.predict([pictures]), TRIALS, axis=0)
        yield responses + noise[rng.integers(len(noise), size=len(responses))]
