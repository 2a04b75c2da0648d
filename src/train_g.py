"""Train the encoder of g: from fMRI voxels to layers of the CLIP vision model, all of them together.

voxels (B, V) -> VoxelEncoder, one per subject -> (B, H) -> residual MLP
    -> coefficients of each layer's principal components (B, K), squared error; of CLIP ViT-B/32 g_k is (50, 768)
--model mindeye2 trains the published network instead, one for each layer.

    python src/train_g.py --subj 1 --feat g_2 --multi_subject             # pretrain on subjects 2-8
    python src/train_g.py --subj 1 --feat g_2 --multisubject_ckpt auto    # fine-tune on subject 1
    python src/train_g.py --subj 1 --feat g_2 g_4 g_6 g_8 g_10 g_12 --multisubject_ckpt auto

Reads betas, wds/*/train and g_k_components.hdf5 (mindeye2: g_k_all.hdf5); writes train_logs/<run>/.
"""

import sys

import options
import utils


def get_parser():
    parser = options.training_parser(__doc__)
    options.add_layers(parser)
    return parser


def main(argv=None):
    from training.settings import Plan, like_pretrained

    args = get_parser().parse_args(
        argv, complete=lambda given: like_pretrained(["g", given.feat[0]], given),
        writes=lambda given: [Plan.from_args(given).folder(feat) for feat in
                              (given.feat if given.model == "mindeye2" else ["g"])])
    from training.components import train_decoder
    from training.mindeye2 import train_tokens
    from training.objectives import BrainObjective
    from training.ridge import train_ridge

    plan = Plan.from_args(args)  # whose trials; --val_fraction of their images validate
    if args.model == "ridge":
        return train_ridge(plan, "g", args.feat)
    sizes = {"hidden_dim": args.hidden_dim, "n_blocks": args.n_blocks, "dropout": args.dropout}
    if args.model == "components":
        return train_decoder(plan, "g", args.feat, sizes, mixup_pct=args.mixup_pct)
    sizes["prior_depth"] = args.prior_depth
    for feat in args.feat:
        train_tokens(plan, feat, sizes, BrainObjective(args.clip_scale, args.prior_scale, args.mixup_pct))


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
