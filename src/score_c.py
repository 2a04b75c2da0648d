"""Predict c, the CLIP text embedding, of the test images from fMRI.

repeat-averaged betas (N, V) -> the subject's fine-tuned encoder -> c (N, T, D), a row per test image, ascending 73k id

    python src/score_c.py --subj 1
    python src/score_c.py --subj 1 --num_sessions 1
    python src/score_c.py --subj 1 --control shuffle      # null control: responses of other images
    python src/score_c.py --subj 1 --without higher_vis   # lesion: these voxels say nothing; --voxels V1,V2: only these

Reads train_logs/<run>/last.pth, betas and wds/*/new_test; writes scores_all/subj01/<run>/.
"""

import sys
from functools import partial

import options
import utils
from disk.names import scores_folders


def get_parser():
    return options.scoring_parser(__doc__)


def main(argv=None):
    args = get_parser().parse_args(argv, writes=partial(scores_folders, ["c"]))
    from training.scoring import score
    from training.trained import Request

    score(Request.from_args(args), ["c"])


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
