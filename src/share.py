"""Share trained decoders: write those of a subject to a folder, fit for the Hugging Face hub; bring such a folder here.

export   the runs that the score scripts decode with, by the same flags, and the adapter, as safetensors and JSON; with
         the components of their features, their errors and R2 on validation images, hashes of all that they were made
         from, the metrics of pictures drawn from their scores, and a model card. None of NSD's data is inside.
import   from a folder or a hub id, checked file by file: runs for train_logs/, whose scores are the same to the bit.
         The features' components must be here, those that the runs were trained on.

    python src/share.py export my_decoders --subj 1
    python src/share.py export my_decoders --subj 1 --feats c        # the run of one feature
    python src/share.py import my_decoders                           # or import NAME/MODEL, from the hub
    python src/share.py import my_decoders --root ~/another_root

Without NSD's files: sharing.decoder.BrainDecoder.from_pretrained (docs/sharing.md).
"""

import argparse
import sys

import options
import utils
from disk.names import Paths


def get_parser():
    parser = options.Parser(__doc__)
    parser.usage = "%(prog)s export|import FOLDER [flags]      (below, defaults are in brackets)"
    parser.add_argument("action", nargs="?", choices=["export", "import"], metavar="export|import", help="what to do")
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="to write; or to read, also a hub id")
    options.add_paths(parser)
    options.add_subject(parser)
    options.add_run(parser)
    options.add_compute(parser)
    parser.add_argument("--run", type=options.run, default="finetune", metavar="STAGE[:SUBJ]",
                        help=f"export this run: {options.listed(options.STAGES)}, of --subj or of another subject")
    parser.add_argument("--feats", type=options.feature, nargs="+", metavar="FEATURE",
                        help="export the runs of these: c, z, g_2, ... (all that there are)")
    parser.add_argument("--stack", action=argparse.BooleanOptionalAction, default=True,
                        help="export the ridge runs, too, that score scripts average with")
    parser.add_argument("--adapter_run", type=options.tag, metavar="RUN",
                        help="export this adapter, too (adapter_<subj>, where it is there and its features are, too)")
    parser.add_argument("--overwrite", action=argparse.BooleanOptionalAction, default=False,
                        help="replace the export, or runs of the same names")
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv, complete=require_words, writes=lambda given: [
        Paths.from_args(given).find(given.folder) if given.action == "export" else Paths.from_args(given).run("")])
    paths = Paths.from_args(args)
    utils.reproducible_products()
    if args.action == "import":
        from sharing.imports import import_runs

        import_runs(paths, paths.model(args.folder), args.overwrite)
        return
    if args.run == "ground_truth":
        raise utils.UserError("--run ground_truth: true features have no run; give "
                              f"{options.listed(options.STAGES)}")
    from sharing.exports import export_runs
    from training.trained import Request

    export_runs(Request.from_args(args, overwrite=True), args.feats, paths.find(args.folder), args.overwrite,
                args.adapter_run)


def require_words(args):
    """Raise UserError unless both words were given; argparse would ask for them before it names a wrong flag."""
    if args.folder is None:
        raise utils.UserError(f"share.py: found {args.action or 'no word'}, wanted export or import, then a folder; "
                              "such as share.py export my_decoders --subj 1")


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
