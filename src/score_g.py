"""Predict g, layers of the CLIP vision model, of the test images from fMRI.

repeat-averaged betas (N, V) -> the subject's fine-tuned encoder -> g_k (N, T, D), one row per test image, ascending id

    python src/score_g.py --subj 1 --feat g_2
    python src/score_g.py --subj 1 --feat g_2 g_4 g_6 g_8 g_10 g_12
    python src/score_g.py --subj 1 --control shuffle      # null control: responses of other images
    python src/score_g.py --subj 1 --without higher_vis   # lesion: these voxels say nothing; --voxels V1,V2: only these

Reads train_logs/<run>/last.pth, betas and wds/*/new_test; writes scores_all/subj01/<run>/Linear-k/.
"""

import sys

import options
import utils
from disk.names import scores_folders


def get_parser():
    parser = options.scoring_parser(__doc__)
    options.add_layers(parser)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv, writes=lambda given: scores_folders(given.feat, given))
    from training.scoring import score
    from training.trained import Request

    score(Request.from_args(args), args.feat)


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
