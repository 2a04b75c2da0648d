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
from models import BrainModel
from training.loop import fit
from training.objectives import BrainObjective
from training.ridge import fit_ridge
from training.runs import open_run


def get_parser():
    parser = options.training_parser(__doc__)
    parser.add_argument("--feat", type=options.vision_layer, nargs="+", default=options.VISION_LAYERS, metavar="g_K",
                        help="layers, one after another")
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    for feat in args.feat:
        run = open_run(args, feat)
        if run is None:
            continue
        if args.model == "ridge":
            fit_ridge(run)
            continue
        tokens, width = run.shapes["target"]
        model = BrainModel(run.n_voxels, args.hidden_dim, tokens, width, args.n_blocks, args.dropout, args.prior_depth)
        model.standardise(*run.target_statistics)
        fit(run, model, BrainObjective(args.clip_scale, args.prior_scale, args.mixup_pct))


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
