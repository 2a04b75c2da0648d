"""Convert the published GNet, gnet_multisubject.pt of pscotti/mindeyev2, into a run of this repository.

    python src/convert_gnet.py
    python src/convert_gnet.py --file ~/downloads/gnet_multisubject.pt --overwrite

The file is a pickle, which could carry any program: it is read once, by an unpickler that makes tensors, arrays and
plain containers and refuses everything else. What it holds is checked against itself and, where they are there, against
the betas. Reads MindEyeV2/mindeyev2/gnet_multisubject.pt; writes train_logs/gnet_published/best.pth.
"""

import argparse
import sys

import options
import utils
from disk.names import Paths


def get_parser():
    parser = options.Parser(__doc__)
    options.add_paths(parser)
    parser.add_argument("--file", metavar="FILE", help="the published checkpoint (in --data_path)")
    parser.add_argument("--overwrite", action=argparse.BooleanOptionalAction, default=False)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)

    from disk.checkpoints import save_checkpoint
    from disk.files import file_hash
    from encoding.published import convert, read_published
    from nsd.rows import open_betas

    paths = Paths.from_args(args)
    file = paths.find(args.file) if args.file else paths.data_path / "gnet_multisubject.pt"
    target = paths.run("gnet_published") / "best.pth"
    if target.exists() and not args.overwrite:
        raise utils.UserError(f"{target}: already converted; --overwrite converts it again")
    published = read_published(file)
    model, val_r = convert(published, file)
    for subj, n in model.n_voxels.items():
        if paths.betas(subj).exists() and (found := open_betas(paths, subj).shape[1]) != n:
            raise utils.UserError(f"{file}: {n} voxels of {subj}, its betas in {paths.data_path} have {found}; use "
                                  "both of one data set")
    config = {"feat": "gnet", "run": "gnet_published", "source_sha256": file_hash(file)}
    save_checkpoint(target, {
        "model": model.state_dict(), "model_args": model.model_args, "config": config, "n_voxels": model.n_voxels,
        "subjects": list(model.n_voxels), "val_r": val_r})
    print(f"{target}: GNet of {', '.join(f'{subj} ({n} voxels)' for subj, n in model.n_voxels.items())}")


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
