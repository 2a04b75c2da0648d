"""The mean and standard deviation that each value of z, predicted and true, has over training images."""

import numpy as np
import torch

from disk.checkpoints import load_checkpoint, save_checkpoint
from nsd.repeats import average_repeats
from nsd.rows import open_betas, open_feature
from nsd.trials import split_trials
from training.scoring import predict

N_TRAINING_IMAGES = 2000  # at most


def training_statistics(source):
    """Return (mean, deviation) of predictions on training images and of these images' true latents, all (4, h, w).

    source: a scoring.Source of z. They are kept in the run's folder, and made again when the checkpoint or the voxel
    encoder is another.
    """
    request, config = source.request, source.config
    made_from = {key: config[key] for key in ("checkpoint_sha256", "subj", "head", "num_sessions", "seed")}
    made_from |= {key: config.get(key) for key in ("adapt_epochs", "components", "stacked_with")}
    made_from["held_out"] = list(source.held_out)
    name = f"z_statistics_{request.subj}_{config['head']}_{request.num_sessions}sess.pth"
    file = request.paths.run(source.run) / name
    keys, hint = ("made_from", "predictions", "latents"), "score again"
    if file.exists() and (kept := load_checkpoint(file, "statistics", hint, keys))["made_from"] == made_from:
        return [tuple(part.numpy() for part in kept[key]) for key in ("predictions", "latents")]
    trials, _ = split_trials(request.paths, request.subj, *source.held_out)
    images = trials["image_id"].unique()
    rng = np.random.default_rng(request.seed)
    chosen = rng.choice(images, min(N_TRAINING_IMAGES, len(images)), replace=False)
    seen = average_repeats(open_betas(request.paths, request.subj), trials[trials["image_id"].isin(chosen)])
    predicted = predict(source, seen.betas, seen.image_ids, "statistics")["nsdgeneral"]
    latents = open_feature(request.paths, "z")[seen.image_ids].astype(np.float32)
    statistics = [(rows.mean(axis=0), rows.std(axis=0)) for rows in (predicted, latents)]
    as_tensors = [tuple(map(torch.from_numpy, pair)) for pair in statistics]
    save_checkpoint(file, {"made_from": made_from, "predictions": as_tensors[0], "latents": as_tensors[1]})
    return statistics
