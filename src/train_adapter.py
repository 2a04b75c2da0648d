"""Train an adapter: Stable Diffusion drawing from decoded g and z as well as from c, beside the guidance by g.

decoded g_k (B, T, D)    -> tokens of the text's width -> keys and values in each cross-attention of the frozen UNet
decoded z   (B, C, h, w) -> a small ControlNet -> added to what the UNet's way down hands over to its way up
Stable Diffusion's own loss on the images' true latents; the text is decoded c, for classifier-free guidance sometimes
the empty one. c, g and z are what a decoder of --subj would make of the images: the subject's responses say how far off
it is, so that any image can train it (sampling/adapter.py, docs/method.md).

    python src/train_adapter.py --subj 1                                   # train_logs/adapter_subj01/
    python src/train_adapter.py --subj 1 --feats g_10 g_12 --tag late      # of two layers alone

On a GPU about three hours (by count: 1.8 teraFLOP an image, five times 68,000). A batch of 8 takes 13 GB in float32
beyond the networks, half of it in bf16.

Reads betas, wds/*/train, {c,z,g_k}_all.hdf5's components and z_all.hdf5. best.pth is the epoch with the lowest loss on
validation images, the same as those of c, z and g; val/loss_plain is what the loss is without the adapter.
"""

import sys

import options
import utils
from nsd import sources


def get_parser():
    parser = options.Parser(__doc__)
    options.add_paths(parser)
    options.add_subject(parser)
    options.add_sessions(parser)
    options.add_compute(parser)
    options.add_precision(parser)
    options.add_tracking(parser)
    options.add_loop(parser, batch_size=8, num_epochs=5, max_lr=1e-4)
    parser.add_argument("--feats", type=options.vision_layer, nargs="+", default=options.VISION_LAYERS, metavar="g_K",
                        help="CLIP layers that condition, beside z")
    parser.add_argument("--sd_model", default=sources.SD_MODEL, metavar="NAME|DIR", help="any Stable Diffusion 1.x")
    return parser


def main(argv=None):
    from training.settings import Plan

    args = get_parser().parse_args(argv, writes=lambda given: [Plan.adapter_from_args(given).folder("adapter")])
    plan = Plan.adapter_from_args(args)
    from disk.hub import find_model
    from models import AdaptedUNet, FeatureAdapter
    from sampling.adapter import AdapterObjective, decodings_of, open_adapter_run
    from training.loop import fit

    opened = open_adapter_run(plan, args.feats)
    if opened is None:
        return
    run, components = opened
    model_dir = plan.paths.model(args.sd_model)
    find_model(model_dir, plan.paths, "--sd_model", sources.how_to_fetch(args.sd_model), "model_index.json")
    from sampling.pipeline import load_pipeline  # takes seconds

    pipe = load_pipeline(model_dir, run.team.device)
    layers = {int(feat.removeprefix("g_")): components[feat] for feat in args.feats}
    adapter = FeatureAdapter.of(pipe.unet, layers)
    objective = AdapterObjective(decodings_of(plan, components, run.team.device), pipe.scheduler.alphas_cumprod,
                                 pipe.empty_condition().clone(), pipe.latent_shape())
    fit(run, AdaptedUNet(pipe.unet, adapter), objective, plan.loop)


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
