"""Train the encoders of g: from fMRI voxels to layers of the CLIP vision model, one encoder per layer.

voxels (B, V) -> VoxelEncoder, one per subject -> (B, H) -> mixer backbone -> tokens (B, T, D)
    -> contrast: retrieval of the image's g_k in the batch (MixCo-NCE, then SoftCLIP)
    -> diffusion prior: g_k itself, (B, T, D); for CLIP ViT-B/32 T = 50, D = 768

    python src/train_g.py --subj 1 --feat g_2 --multi_subject             # pretrain on subjects 2-8
    python src/train_g.py --subj 1 --feat g_2 --multisubject_ckpt auto    # fine-tune on subject 1
    python src/train_g.py --subj 1 --feat g_2 g_4 g_6 g_8 g_10 g_12 --multisubject_ckpt auto

Reads betas, wds/*/train and g_k_all.hdf5; writes train_logs/<run>/, one run per layer.
"""

import sys

import options
import utils


def get_parser():
    parser = options.training_parser(__doc__)
    options.add_layers(parser)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    from training.mindeye2 import train_tokens
    from training.objectives import BrainObjective
    from training.ridge import train_ridge
    from training.settings import Plan

    plan = Plan.from_args(args)  # whose trials; --val_fraction of their images validate
    for feat in args.feat:
        if args.model == "ridge":
            train_ridge(plan, feat)
            continue
        sizes = {"hidden_dim": args.hidden_dim, "n_blocks": args.n_blocks, "dropout": args.dropout,
                 "prior_depth": args.prior_depth}
        train_tokens(plan, feat, sizes, BrainObjective(args.clip_scale, args.prior_scale, args.mixup_pct))


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
