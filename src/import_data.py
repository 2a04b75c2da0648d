"""Import your own fMRI data: a folder of images, trials and responses becomes a root that every script takes.

DATA/trials.csv              a line per trial: image, subject, session, run, trial, is_test
DATA/images/                 the pictures
DATA/betas_<subject>.npy     responses (trials, voxels); or .h5, or .nii.gz beside a mask, or what GLMsingle writes
DATA/captions.csv            image, caption (optional)
DATA/regions_<subject>/      a mask of each region of interest (optional)

    python src/import_data.py --data my_data --root my_root --dry_run    # look at all but values and pictures alone
    python src/import_data.py --data my_data --root my_root
    python src/import_data.py --data my_data --root my_root --no-zscore  # responses that are z-scored already

All formats, and how public data sets map to them: docs/own_data.md. Writes the formats of docs/data.md under --root,
and own_data.json, which says who is subj01, subj02, ...: all of it or nothing. What is there already, of the same
folder and flags, is kept.
"""

import argparse
import shlex
import sys
from contextlib import suppress
from pathlib import Path

import options
import utils
from disk.names import Paths


def get_parser():
    parser = options.Parser(__doc__, dry_run_stops=False)
    options.add_paths(parser)
    parser.add_argument("--data", metavar="DIR", help="the folder to import (needed)")
    parser.add_argument("--image_size", type=options.whole, default=425, metavar="PIXELS",
                        help="side of the squares that images are stored as; of an image that is none, its middle")
    parser.add_argument("--zscore", action=argparse.BooleanOptionalAction, default=True,
                        help="of each session and voxel, subtract the mean of the training trials and divide by their "
                             "standard deviation")
    parser.add_argument("--overwrite", action="store_true", help="replace what was imported into --root before")
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    from nsd.own_betas import open_betas
    from nsd.own_data import read_folder
    from nsd.own_root import check_root, describe, write_root

    if not args.data:
        raise utils.UserError("--data: not given; wanted the folder to import, as docs/own_data.md describes it")
    if not 8 <= args.image_size <= 4096:
        raise utils.UserError(f"--image_size {args.image_size}: wanted 8 to 4096 pixels")
    root = Path(args.root).expanduser()
    data = read_folder(Path(args.data).expanduser().resolve())
    betas = open_betas(data)
    settings = {"image_size": args.image_size, "zscore": args.zscore, "from": data.identity()}
    if root.exists() and check_root(Paths.from_args(args), data, settings, args.overwrite):
        print(f"{root}: imported before, kept (--overwrite writes it again)")
        return
    print(describe(data, betas, args.zscore))
    if args.dry_run:
        return
    flags = ["--data", str(data.folder), "--root", str(root.resolve()), "--image_size", str(args.image_size)]
    flags += ["--data_path", str(Path(args.data_path).expanduser().resolve())] if args.data_path else []
    flags += [] if args.zscore else ["--no-zscore"]
    root.mkdir(parents=True, exist_ok=True)
    try:
        write_root(Paths.from_args(args), data, betas, settings, shlex.join(["python", "src/import_data.py", *flags]))
    finally:
        with suppress(OSError):
            root.rmdir()  # where nothing could be written, it is empty
    print(f"{root}: imported; next: ROOT={shlex.quote(str(root))} bash scripts/features.sh")


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
