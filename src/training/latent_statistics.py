"""The mean and standard deviation that each value of z, predicted and true, has over training images."""

import numpy as np
import torch

from disk.checkpoints import load_checkpoint, save_checkpoint
from nsd.repeats import average_repeats
from nsd.rows import open_betas, open_feature
from nsd.trials import split_trials
from training.scoring import predict

N_TRAINING_IMAGES = 2000  # at most


def training_statistics(source, on_validation):
    """Return (mean, deviation) of predictions on training images and of these images' true latents, all (4, h, w).

    A network's predictions vary more on what it was fitted to. So the deviations of the predictions are multiplied by
    one number, which gives them the total variance that those on the validation images have. source: a scoring.Source
    of z; on_validation: its predictions there from whole responses, (N, 4, h, w). The statistics are kept in the run's
    folder, and made again when the checkpoint or the voxel encoder is another.
    """
    trained, request, config = source.trained, source.request, source.config
    made_from = {key: config[key] for key in ("checkpoint_hash", "betas", "latents", "subj", "head", "num_sessions",
                                              "seed")}
    made_from |= {key: config.get(key) for key in ("adapt_epochs", "components", "stacked_with")}
    made_from["held_out"] = list(trained.held_out)
    name = f"z_statistics_{request.subj}_{config['head']}_{request.num_sessions}sess.pth"
    file = request.paths.run(trained.run) / name
    keys, hint = ("made_from", "predictions", "latents"), "score again"
    if file.exists() and (kept := load_checkpoint(file, "statistics", hint, keys))["made_from"] == made_from:
        return [tuple(part.numpy() for part in kept[key]) for key in ("predictions", "latents")]
    trials, _ = split_trials(request.paths, request.subj, *trained.held_out)
    images = trials["image_id"].unique()
    rng = np.random.default_rng(request.seed)
    chosen = rng.choice(images, min(N_TRAINING_IMAGES, len(images)), replace=False)
    seen = average_repeats(open_betas(request.paths, request.subj), trials[trials["image_id"].isin(chosen)])
    predicted = predict(source, seen, "statistics")["nsdgeneral"]
    latents = open_feature(request.paths, "z")[seen.image_ids].astype(np.float32)
    statistics = [(rows.mean(axis=0), rows.std(axis=0)) for rows in (predicted, latents)]
    if len(on_validation) > 1:
        mean, deviation = statistics[0]
        ratio = on_validation.var(axis=0, ddof=1).sum() / predicted.var(axis=0, ddof=1).sum()
        statistics[0] = mean, deviation * np.sqrt(ratio)
    as_tensors = [tuple(map(torch.from_numpy, pair)) for pair in statistics]
    save_checkpoint(file, {"made_from": made_from, "predictions": as_tensors[0], "latents": as_tensors[1]})
    return statistics


def restandardise(predicted, mean, std, wanted_mean, wanted_std):
    """Bring (N, ...) from one mean and standard deviation per value (...) to another."""
    return (predicted - mean) / (std + 1e-6) * wanted_std + wanted_mean
