"""Predict z, the VAE latent, of the test images from fMRI.

repeat-averaged betas (N, V) -> the subject's encoder -> z (N, 4, h, w), a row per test image, ascending 73k id

A regression's predictions vary less than the latents the diffusion was trained on. So each value is brought to
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

import options
import utils


def get_parser():
    parser = options.scoring_parser(__doc__)
    parser.add_argument("--transductive", action=argparse.BooleanOptionalAction, default=False,
                        help="standardise with the test predictions' own mean and deviation, as NeuralDiffuser does: "
                             "a prediction then depends on the other test images")
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    from training import scoring
    from training.latent_statistics import training_statistics

    request = scoring.Request.from_args(args)
    if args.run == "ground_truth":
        return scoring.save_ground_truth(request, "z")
    source = scoring.open_source(request, "z", transductive=args.transductive)
    if source is None:
        return
    predicted = scoring.predict(source, source.test.betas, source.test.image_ids, "score")["nsdgeneral"]
    of_predictions, of_latents = training_statistics(source)
    if args.transductive:
        of_predictions = predicted.mean(axis=0), predicted.std(axis=0)
    scoring.save(source, {"nsdgeneral": restandardise(predicted, *of_predictions, *of_latents)})


def restandardise(predicted, mean, std, wanted_mean, wanted_std):
    """Bring (N, ...) from one mean and standard deviation per value (...) to another."""
    return (predicted - mean) / (std + 1e-6) * wanted_std + wanted_mean


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
