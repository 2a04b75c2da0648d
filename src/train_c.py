"""Train the encoder of c: from fMRI voxels to the CLIP text embedding of the seen image's captions.

voxels (B, V) -> VoxelEncoder, one per subject -> (B, H) -> residual MLP
    -> coefficients of c's principal components (B, K), squared error; for Stable Diffusion v1.4 c is (77, 768)
    -> with --clip_scale a contrast: retrieval of the image's coefficients in the batch (SoftCLIP)
--model mindeye2 trains the published network instead: backbone, contrast and diffusion prior on whole tokens.

    python src/train_c.py --subj 1 --multi_subject                        # pretrain on subjects 2-8
    python src/train_c.py --subj 1 --multisubject_ckpt auto               # fine-tune on subject 1
    python src/train_c.py --subj 1 --multisubject_ckpt auto --num_sessions 1 --wandb_log
    python src/train_c.py --subj 1 --model ridge                          # the linear baseline

Reads betas, wds/*/train and c_components.hdf5 (mindeye2: c_all.hdf5); writes train_logs/<run>/.
"""

import sys
from functools import partial

import options
import utils


def get_parser():
    return options.training_parser(__doc__)


def main(argv=None):
    from training.settings import Plan, like_pretrained

    args = get_parser().parse_args(argv, complete=partial(like_pretrained, ["c"]),
                                   writes=lambda given: [Plan.from_args(given).folder("c")])
    from training.components import train_decoder
    from training.mindeye2 import train_tokens
    from training.objectives import BrainObjective
    from training.ridge import train_ridge

    plan = Plan.from_args(args)  # whose trials; --val_fraction of their images validate
    if args.model == "ridge":
        return train_ridge(plan, "c", ["c"])
    sizes = {"hidden_dim": args.hidden_dim, "n_blocks": args.n_blocks, "dropout": args.dropout}
    if args.model == "components":
        contrast = ["c"] if args.clip_scale else []  # what is regressed retrieves, too
        return train_decoder(plan, "c", ["c"], sizes, contrast, args.clip_scale, args.mixup_pct)
    sizes["prior_depth"] = args.prior_depth
    train_tokens(plan, "c", sizes, BrainObjective(args.clip_scale, args.prior_scale, args.mixup_pct))


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
