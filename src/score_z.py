"""Predict z, the VAE latent, of the test images from fMRI.

repeat-averaged betas (N, V) -> the subject's encoder -> z (N, 4, h, w), a row per test image, ascending 73k id

A regression's predictions vary less than the latents the diffusion was trained on. So each value is brought to
the mean and standard deviation it has over training images: z = (predicted - m_p) / s_p * s_z + m_z, where m_p, s_p are
those of the predictions on training images and m_z, s_z those of their true latents. Since predictions vary more on
images that were fitted, all s_p are multiplied by one number: with it their variances add up to those of the
predictions on the validation images. No test statistic is used. R2 is printed before and after it (restandardised).

    python src/score_z.py --subj 1
    python src/score_z.py --subj 1 --control shuffle      # null control: responses of other images
    python src/score_z.py --subj 1 --transductive         # NeuralDiffuser's: m_p, s_p of the test predictions

Reads train_logs/<run>/last.pth, betas, wds/*/train and wds/*/new_test, z_all.hdf5; writes scores_all/subj01/<run>/, and
the statistics beside the checkpoint.
"""

import argparse
import sys
from functools import partial

import options
import utils
from disk.names import scores_folders


def get_parser():
    parser = options.scoring_parser(__doc__)
    parser.add_argument("--transductive", action=argparse.BooleanOptionalAction, default=False,
                        help="standardise with the test predictions' own mean and deviation, as NeuralDiffuser does: "
                             "a prediction then depends on the other test images")
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv, writes=partial(scores_folders, ["z"]))
    from nsd.components import source_of
    from training.scoring import score
    from training.trained import Request

    request = Request.from_args(args)
    latents = request.paths.feature("z")
    score(request, ["z"], partial(finish, args.transductive), transductive=args.transductive,
          latents=source_of(latents) if latents.exists() else None)


def finish(transductive, source, predicted):
    """Bring predictions of z (N, 4, h, w) to the latents' statistics."""
    from training.latent_statistics import restandardise, training_statistics
    from training.scoring import predict
    from training.stacking import r2_of_rows

    trained = source.trained
    on_validation = on_whole = predict(source, trained.validation, "validate")["nsdgeneral"]
    if trained.validation is not trained.whole_validation:  # the statistics are the decoder's: of whole responses
        on_whole = predict(source, trained.whole_validation, "validate")["nsdgeneral"]
    of_predictions, of_latents = training_statistics(source, on_whole)
    if transductive:
        of_predictions = predicted.mean(axis=0), predicted.std(axis=0)
    restandardised = restandardise(on_validation, *of_predictions, *of_latents)
    source.config["r2"]["restandardised"] = r2_of_rows(source.model, trained, "z", restandardised)
    return restandardise(predicted, *of_predictions, *of_latents)


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
