"""Predict z, the VAE latent, of the test images from fMRI.

repeat-averaged betas (N, V) -> the subject's encoder -> z (N, 4, h, w), a row per test image, ascending 73k id

A regression's predictions vary less than latents do, and the diffusion is used to latents. So each value is brought to
the mean and standard deviation it has over training images: z = (predicted - m_p) / s_p * s_z + m_z, where m_p, s_p are
those of the predictions on training images and m_z, s_z those of their true latents. No test statistic is used.

    python src/score_z.py --subj 1
    python src/score_z.py --subj 1 --control shuffle      # null control: responses of other images
    python src/score_z.py --subj 1 --transductive         # NeuralDiffuser's: m_p, s_p of the test predictions

Reads train_logs/<run>/last.pth, betas, wds/*/train and wds/*/new_test, z_all.hdf5; writes scores_all/subj01/<run>/, and
the statistics beside the checkpoint.
"""

import argparse
import sys

import numpy as np
import torch

import options
import utils
from disk.checkpoints import load_checkpoint, save_checkpoint
from nsd.repeats import average_repeats
from nsd.rows import open_betas, open_feature
from nsd.trials import split_trials
from training import scoring

N_TRAINING_IMAGES = 2000  # at most, for the statistics


def get_parser():
    parser = options.scoring_parser(__doc__)
    parser.add_argument("--transductive", action=argparse.BooleanOptionalAction, default=False,
                        help="standardise with the test predictions' own mean and deviation, as NeuralDiffuser does: "
                             "what is predicted for an image then depends on the other test images")
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    if args.run == "ground_truth":
        return scoring.save_ground_truth(args, "z")
    source = scoring.open_source(args, "z", transductive=args.transductive)
    if source is None:
        return
    predicted = scoring.predict(source, source.test.betas, source.test.image_ids, "score")["nsdgeneral"]
    of_predictions, of_latents = training_statistics(source)
    if args.transductive:
        of_predictions = predicted.mean(axis=0), predicted.std(axis=0)
    z = restandardise(predicted, *of_predictions, *of_latents)
    scoring.save(source, {"nsdgeneral": z})


def restandardise(predicted, mean, std, wanted_mean, wanted_std):
    """Bring (N, ...) from one mean and standard deviation per value (...) to another."""
    return (predicted - mean) / (std + 1e-6) * wanted_std + wanted_mean


def training_statistics(source):
    """Mean and deviation of predictions on training images, and of these images' latents; all (4, h, w).

    Kept in the run's folder, and made again when the checkpoint or the voxel encoder is another.
    """
    args, config = source.args, source.config
    made_from = {key: config[key] for key in ("checkpoint_sha256", "subj", "head", "num_sessions", "seed")}
    made_from |= {"adapt_epochs": config.get("adapt_epochs"), "held_out": list(source.held_out)}
    file = source.paths.run(source.run) / f"z_statistics_{args.subj}_{config['head']}_{args.num_sessions}sess.pth"
    keys, hint = ("made_from", "predictions", "latents"), "score again"
    if file.exists() and (kept := load_checkpoint(file, "statistics", hint, keys))["made_from"] == made_from:
        return [tuple(part.numpy() for part in kept[key]) for key in ("predictions", "latents")]
    trials, _ = split_trials(source.paths, args.subj, *source.held_out)
    images = trials["image_id"].unique()
    chosen = np.random.default_rng(args.seed).choice(images, min(N_TRAINING_IMAGES, len(images)), replace=False)
    seen = average_repeats(open_betas(source.paths, args.subj), trials[trials["image_id"].isin(chosen)])
    predicted = scoring.predict(source, seen.betas, seen.image_ids, "statistics")["nsdgeneral"]
    latents = open_feature(source.paths, "z")[seen.image_ids].astype(np.float32)
    statistics = [(rows.mean(axis=0), rows.std(axis=0)) for rows in (predicted, latents)]
    as_tensors = [tuple(map(torch.from_numpy, pair)) for pair in statistics]
    save_checkpoint(file, {"made_from": made_from, "predictions": as_tensors[0], "latents": as_tensors[1]})
    return statistics


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
