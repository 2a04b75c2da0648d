"""Train GNet, a brain encoding model: from the seen image to the responses of every voxel.

image (B, 3, 227, 227) -> AlexNet's first two convolutions -> trunk, shared by the subjects
    -> per voxel a field over each of two grids of features, a weight per feature: responses {subject: (B, V)}
Squared error weighted by clamp(r^2, .1, 1) per voxel, plus .1 times the readout's mean absolute weight.

    python src/train_gnet.py --subj 1                      # subject 1 alone: train_logs/gnet_subj01/
    python src/train_gnet.py --multi_subject               # one trunk for all subjects: train_logs/gnet_multisubject/
    python src/train_gnet.py --subj 1 --prefilter alexnet-owt-7be5be79.pth --pass_through 192

Reads betas, averaged over an image's repeats, wds/*/train and nsd_stimuli.hdf5. best.pth is the epoch with the best
median validation r over voxels (early stopping), on the validation images of c, z and g; it holds every voxel's r too.
"""

import argparse
import sys

import options
import utils

EPOCHS = 30  # of all sessions, by default


def get_parser():
    parser = options.Parser(__doc__)
    options.add_paths(parser)
    options.add_regions(parser)
    options.add_subject(parser)
    options.add_sessions(parser)
    options.add_compute(parser)
    options.add_precision(parser)
    options.add_tracking(parser)
    options.add_loop(parser, lambda name: f" ({EPOCHS}, more of few sessions)" if name == "num_epochs" else "",
                     batch_size=42, max_lr=1e-3)
    parser.add_argument("--multi_subject", action=argparse.BooleanOptionalAction, default=False,
                        help="one trunk for all subjects and all sessions, regardless of --subj and --num_sessions")
    parser.add_argument("--trunk_width", type=options.whole, default=64, metavar="CHANNELS",
                        help="channels of a block that voxels read")
    parser.add_argument("--pass_through", type=options.whole, default=64, metavar="CHANNELS",
                        help="further channels of a block, for the next one only (the published network: 192)")
    parser.add_argument("--prefilter", metavar="FILE",
                        help="torchvision's AlexNet weights: freezes the first two convolutions (trained without)")
    parser.add_argument("--field_lr", type=float, default=0.05, metavar="LR",
                        help="peak learning rate of the voxels' pooling fields, which --max_lr would leave out of "
                             "focus: a field is a softmax, and AdamW moves no number by more than its rate a step")
    parser.add_argument("--l1", type=float, default=0.1, metavar="W", help="weight of the readout's mean |weight|")
    parser.resolve = resolve_epochs
    return parser


def resolve_epochs(args):
    """Give --num_epochs, where it was not given, its default."""
    if args.num_epochs is None:
        args.num_epochs = EPOCHS if args.multi_subject else options.of_few_sessions(EPOCHS, args.num_sessions)


def main(argv=None):
    from training.settings import Plan

    args = get_parser().parse_args(argv, writes=lambda given: [Plan.gnet_from_args(given).folder("gnet")])
    from models import GNet, gnet_input, load_prefilter
    from nsd.regions import roi_masks
    from nsd.repeats import noise_ceiling
    from training.loop import fit
    from training.objectives import EncodingObjective
    from training.runs import open_encoding_run

    plan = Plan.gnet_from_args(args)  # whose responses; --val_fraction of their images validate
    prefilter = plan.paths.find(args.prefilter) if args.prefilter else None
    run = open_encoding_run(plan)
    if run is None:
        return
    model = GNet(run.n_voxels, args.trunk_width, args.pass_through, frozen_prefilter=prefilter is not None)
    if prefilter:
        load_prefilter(model, prefilter)
    model.paced = [(model.fields, args.field_lr)]
    rois = {subj: roi_masks(plan.paths, subj) for subj in run.n_voxels}
    ceilings = {subj: noise_ceiling(run.train.betas[subj], run.val.betas[subj].n_repeats) for subj in run.n_voxels}
    ceilings = {subj: ceiling for subj, ceiling in ceilings.items() if ceiling is not None}
    fit(run, model, EncodingObjective(gnet_input, rois, ceilings, args.l1), plan.loop)


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
