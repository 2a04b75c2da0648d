"""Compute the features of the stimuli that the brain is decoded into: c, z and g_2 ... g_12.

c    mean over the image's captions of the text encoder's last hidden state         (77, 768) for Stable Diffusion v1.4
z    VAE posterior mean of the stimulus, times the VAE's scaling factor             (4, 64, 64)
g_k  output of the MLP of block k/2 of CLIP's vision transformer, class token first (50, 768) for CLIP ViT-B/32

    python src/img2feat.py                                            # all of them, on the GPU where there is one
    python src/img2feat.py --subj 1 --feats g_2 g_12 --batch_size 256 # for the images that subject 1 saw; others later
    accelerate launch --config_file scripts/accelerate/ddp.yaml src/img2feat.py --feats c z    # GPUs share the images

Reads nsd_stimuli.hdf5 (z, g), nsd_stim_info_merged.csv and nsd_captions.json (c). Writes
nsddata_stimuli/stimuli/nsd/{feat}_all.hdf5: `data`, one flattened row per image, by 0-based 73k id, uncompressed so
that it can be memory-mapped (attributes: shape of a row, model, source), and `written`, which rows are there. The same
command adds those that are missing, after a kill too; a file of another model or another source is refused. On NSD in
float16: c 8.6 GB, z 2.4 GB, each g 5.6 GB.

Then {feat}_components.hdf5, which decoders are trained on: the feature's strongest principal components, fitted to at
most 20,000 images of no test set, and every image's coefficients, as float32 (c 0.5 GB, z 0.4 GB, each g 0.5 GB). A
feature file that was there already gets its components too.

Of data of your own (import_data.py), images without a caption get one by --caption_model.
"""

import sys
from datetime import timedelta
from functools import partial

import options
import utils
from disk.names import Paths
from nsd import sources


def get_parser():
    parser = options.Parser(__doc__)
    options.add_paths(parser)
    parser.add_argument("--feats", nargs="+", type=options.feature, default=options.FEATURES, metavar="FEAT",
                        help="c, z, g_2, g_4, ... (all)")
    parser.add_argument("--subj", "--subject", dest="subj", nargs="+", type=options.subject, metavar="1..99",
                        help="only the images that these subjects saw (all images)")
    parser.add_argument("--test_split", type=options.test_split, choices=["new_test", "synthetic"], default="new_test",
                        help="synthetic: z and g of NSD-synthetic's stimuli, as --subj (1) saw them, instead")
    parser.add_argument("--sd_model", default=sources.SD_MODEL, metavar="NAME|DIR",
                        help="Stable Diffusion 1.x: its text encoder makes c, its VAE z")
    parser.add_argument("--clip_model", default=sources.CLIP_MODEL, metavar="NAME|DIR",
                        help="CLIP whose vision transformer makes g")
    parser.add_argument("--caption_model", metavar="NAME|DIR",
                        help="a BLIP, such as Salesforce/blip-image-captioning-base, that writes a caption of each "
                             "image that has none, before c is made of them")
    parser.add_argument("--batch_size", type=options.whole, default=32, metavar="IMAGES", help="or, for c, captions")
    parser.add_argument("--num_workers", type=options.whole, default=2, metavar="PROCESSES",
                        help="processes that read and resize images")
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float16", help="as written to the files")
    parser.add_argument("--components", type=options.whole, default=1024, metavar="K",
                        help="principal components of each feature to write beside it; 0: none")
    parser.add_argument("--components_from", metavar="ROOT",
                        help="take over the components of another root in place of fitting them, so that what was "
                             "pretrained there can be fine-tuned here")
    parser.add_argument("--seed", type=options.seed, default=42, metavar="N",
                        help="draws the images that they are fitted to")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are already there")
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    utils.reproducible_products()
    from features.captioning import write_missing_captions
    from features.components import write_components
    from features.extraction import extract
    from features.makers import Latents, TextFeatures, VisionFeatures
    from nsd.captions import load_captions
    from nsd.rows import open_stimuli
    from training.team import Team

    paths = Paths.from_args(args)
    args.sd_model, args.clip_model = map(paths.model, (args.sd_model, args.clip_model))
    others = args.components_from and paths.other(args.components_from, "--components_from")
    if others and others.root == paths.root:
        raise utils.UserError(f"--components_from {args.components_from}: is --root itself; give another root")
    if args.caption_model and "c" not in args.feats:
        raise utils.UserError("--caption_model: writes captions, of which c is made; add c to --feats, or leave it out")
    team = Team.assemble(args.device, "fp32", timedelta(days=1))  # shares may take hours longer than others
    if args.test_split == "synthetic":
        return write_synthetic(args, paths, team)
    write = partial(extract, paths=paths, team=team, subjects=args.subj, dtype=args.dtype,
                    num_workers=args.num_workers, overwrite=args.overwrite)
    if args.caption_model:
        write_missing_captions(paths, paths.model(args.caption_model), args.batch_size, team, args.overwrite)
    if "c" in args.feats:
        write(TextFeatures(load_captions(paths), args.sd_model, args.batch_size, team.device))
    if "z" in args.feats:
        write(Latents(open_stimuli(paths), args.sd_model, args.batch_size, team.device))
    if layers := [feat for feat in dict.fromkeys(args.feats) if feat.startswith("g_")]:
        write(VisionFeatures(layers, open_stimuli(paths), args.clip_model, args.batch_size, team.device))
    for feat in dict.fromkeys(args.feats) if args.components else ():
        write_components(paths, feat, args.components, args.seed, team, args.overwrite, others)


def write_synthetic(args, paths, team):
    """Write the features of NSD-synthetic's stimuli, of which some were shown to one subject alone, to files of their
    own: z and g. c is of captions, and they have none; components are those of NSD's images."""
    from features.extraction import extract
    from features.makers import Latents, VisionFeatures
    from nsd.synthetic import SyntheticStimuli

    if "c" in args.feats:
        team.print("c: left out, the stimuli of NSD-synthetic have no captions")
    for subj in args.subj or ["subj01"]:
        stimuli = SyntheticStimuli(paths, subj)
        write = partial(extract, paths=paths, team=team, dtype=args.dtype, num_workers=args.num_workers,
                        overwrite=args.overwrite, file_of=partial(paths.synthetic_feature, subj=subj))
        if "z" in args.feats:
            write(Latents(stimuli, args.sd_model, args.batch_size, team.device))
        if layers := [feat for feat in dict.fromkeys(args.feats) if feat.startswith("g_")]:
            write(VisionFeatures(layers, stimuli, args.clip_model, args.batch_size, team.device))


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
