"""Train the encoder of z: from fMRI voxels to the VAE latent of the seen image, the layout the diffusion starts from.

voxels (B, V) -> VoxelEncoder, one per subject -> (B, H) -> residual MLP
    -> coefficients of z's principal components (B, K), squared error; for Stable Diffusion v1.4 z is (4, 64, 64)
--model mindeye2 trains MindEye1's low-level branch instead: a map, upsampled by a VAE decoder, L1 on latents, and a
contrast of the map with the image's CLIP patch tokens (layer g_12).

    python src/train_z.py --subj 1 --multi_subject                        # pretrain on subjects 2-8
    python src/train_z.py --subj 1 --multisubject_ckpt auto               # fine-tune on subject 1
    python src/train_z.py --subj 1 --model ridge                          # the linear baseline

Reads betas, wds/*/train and z_components.hdf5 (mindeye2: z_all.hdf5 and g_12_all.hdf5); writes train_logs/<run>/.
"""

import sys
from functools import partial

import options
import utils


def get_parser():
    # the contrast of mindeye2 stands beside an L1 loss of about one
    parser = options.training_parser(__doc__, components={"dropout": 0.5},
                                     mindeye2={"clip_scale": 0.1, "decoder_channels": [64, 128, 256]})
    parser.add_argument("--decoder_channels", type=options.whole, nargs=3, metavar="N",
                        help="widths of mindeye2's VAE decoder, last level first; multiples of 32 (64 128 256)")
    return parser


def main(argv=None):
    from training.settings import Plan, like_pretrained

    args = get_parser().parse_args(argv, complete=partial(like_pretrained, ["z"]),
                                   writes=lambda given: [Plan.from_args(given).folder("z")])
    if any(width < 32 or width % 32 for width in args.decoder_channels or ()):
        raise utils.UserError(f"--decoder_channels {args.decoder_channels}: wanted multiples of 32")
    from models import LatentModel
    from training.components import train_decoder
    from training.loop import fit
    from training.objectives import LatentObjective
    from training.ridge import train_ridge
    from training.runs import open_run

    plan = Plan.from_args(args)  # whose trials; --val_fraction of their images validate
    if args.model == "ridge":
        return train_ridge(plan, "z", ["z"])
    if args.model == "components":
        sizes = {"hidden_dim": args.hidden_dim, "n_blocks": args.n_blocks, "dropout": args.dropout}
        return train_decoder(plan, "z", ["z"], sizes, mixup_pct=args.mixup_pct)
    run = open_run(plan, "z", tokens="g_12")
    if run is None:
        return
    model = LatentModel(run.n_voxels, args.hidden_dim, run.shapes["target"], *run.shapes["tokens"], args.n_blocks,
                        args.dropout, args.decoder_channels)
    model.standardise(*run.target_statistics)
    fit(run, model, LatentObjective(args.clip_scale, args.mixup_pct), plan.loop)


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
