"""Fetch the data and weights: NSD's design, stimuli and regions, MindEye2's betas and shards, captions, networks.

    python src/download.py --dry_run                   # what would be fetched, how large it is and where to; without
                                                       # a network by the published sizes
    python src/download.py --subj 1 --to /big/disk     # subject 1 alone, to another disk, linked into the root
    python src/download.py --what betas trials --verify

Before: accept NSD's data access terms (https://naturalscenesdataset.org, the form linked there), and read the licences
of Stable Diffusion v1.4 (https://huggingface.co/CompVis/stable-diffusion-v1-4, CreativeML OpenRAIL-M) and COCO's
annotations (CC BY 4.0). The hub may ask for a login: `hf auth login`, or HF_TOKEN in the environment.

The same command resumes an interrupted download: complete files are kept, partial ones continued. Busy servers, and
answers that are not theirs (a network's login page), are asked again for half an hour. Sizes are checked always,
checksums of what was just fetched (all files: --verify) where one is published: SHA-256 by the hub, MD5 by NSD's bucket
for small files. Weights go to the hub's cache (HF_HOME), everything else under --root.
"""

import sys

import options
import utils
from disk.names import Paths
from nsd import sources


def get_parser():
    parser = options.Parser(__doc__, dry_run_stops=False)
    options.add_paths(parser)
    parser.add_argument("--subj", "--subject", dest="subjects", nargs="+", type=options.subject_of_nsd,
                        default=sources.SUBJECTS, metavar="1..8",
                        help="whose betas, shards and regions (all eight, for pretraining)")
    parser.add_argument("--what", nargs="+", choices=list(sources.GROUPS), default=sources.DEFAULT_GROUPS,
                        metavar="GROUP", help="; ".join(f"{name}: {what}" for name, what in sources.GROUPS.items())
                        + " (all but gnet, synthetic, imagery)")
    parser.add_argument("--to", metavar="DIR", help="another disk: files go there, in the same folders, and are linked "
                                                    "into --root")
    parser.add_argument("--verify", action="store_true", help="also check the checksums of files that are there; "
                                                              "those that differ are fetched again")
    parser.add_argument("--parts", type=options.whole, default=8, metavar="CONNECTIONS",
                        help="in parallel: parts of a large file, or small files")
    parser.add_argument("--nsd_url", default=sources.NSD_URL, metavar="URL", help="NSD's bucket, or a mirror of it")
    parser.add_argument("--coco_url", default=sources.COCO_URL, metavar="URL", help="COCO's server, or a mirror of it")
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    if args.parts < 1:
        raise utils.UserError(f"--parts {args.parts}: wanted at least 1")
    if args.to and args.data_path:
        raise utils.UserError("--to with --data_path: either names where the data set goes; give one of them")
    from disk import hub, transfer
    from nsd import downloads

    root = Paths.from_args(args)
    disk = downloads.at_disk(args.to) if args.to else root
    groups = [group for group in sources.GROUPS if group in args.what]
    with transfer.connect() as client, hub.connect() as hub_client:
        servers = downloads.Servers(client, hub_client, args.nsd_url, args.coco_url, args.parts)
        if args.dry_run and (silent := downloads.silent_servers(groups, args.subjects, servers)):
            print(f"no answer from {', '.join(silent)}: sizes as published, files under 10 MB not counted")
            downloads.show(list(downloads.known_plan(groups, args.subjects, disk)), groups)
            return
        plan = downloads.make_plan(groups, args.subjects, disk, servers)
        if args.verify:
            plan = downloads.without_damaged(plan)
        missing = downloads.show(plan, groups)
        if args.dry_run:
            return
        downloads.check_space(missing)
        downloads.fetch_all(missing, disk, servers)
    if args.to:
        downloads.link(disk, root, plan)
    print("everything is there; next: bash scripts/check_data.sh")


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
