"""Fetch the data and weights: NSD's design, stimuli and regions, MindEye2's betas and shards, captions, networks.

    python src/download.py --dry_run                   # what would be fetched, how large, where to, what is there
    python src/download.py --subj 1 --to /big/disk     # subject 1 alone, to another disk, linked into the root
    python src/download.py --what betas trials --verify

Before: accept NSD's data access terms (https://naturalscenesdataset.org, the form linked there), and read the licences
of Stable Diffusion v1.4 (https://huggingface.co/CompVis/stable-diffusion-v1-4, CreativeML OpenRAIL-M) and COCO's
annotations (CC BY 4.0). The hub may ask for a login: `hf auth login`, or HF_TOKEN in the environment.

Whatever stops it, the same command goes on: files that are whole are kept, parts are continued. Sizes are compared
always, checksums of what was just fetched (all files: --verify) where one is published: SHA-256 by the hub, MD5 by
NSD's bucket for small files. Weights go to the hub's cache (HF_HOME), everything else under --root.
"""

import fnmatch
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import options
import utils
from disk.files import file_hash
from disk.names import Paths
from nsd import sources, transfer
from nsd.captions import write_captions
from nsd.sources import SUBJECTS

NSD_ADVICE = "sign NSD's data access form (https://naturalscenesdataset.org), check --nsd_url, or fetch it by hand"
COCO_ADVICE = "check --coco_url, or fetch it by hand (https://cocodataset.org)"


def get_parser():
    parser = options.Parser(__doc__, dry_run_stops=False)
    options.add_paths(parser)
    parser.add_argument("--subj", "--subject", dest="subjects", nargs="+", type=options.subject, default=SUBJECTS,
                        metavar="1..8", help="whose betas, shards and regions (all eight, for pretraining)")
    parser.add_argument("--what", nargs="+", choices=list(sources.GROUPS), default=sources.DEFAULT_GROUPS,
                        metavar="GROUP", help="; ".join(f"{name}: {what}" for name, what in sources.GROUPS.items())
                        + " (all but gnet)")
    parser.add_argument("--to", metavar="DIR", help="another disk: files go there, in the same folders, and are linked "
                                                    "into --root")
    parser.add_argument("--verify", action="store_true", help="compare the checksums of files that are there, too; "
                                                              "what differs is fetched again")
    parser.add_argument("--parts", type=options.whole, default=8, metavar="CONNECTIONS",
                        help="at once, for a file of NSD's bucket (8)")
    parser.add_argument("--nsd_url", default=sources.NSD_URL, metavar="URL", help="NSD's bucket, or a mirror of it")
    parser.add_argument("--coco_url", default=sources.COCO_URL, metavar="URL", help="COCO's server, or a mirror of it")
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    if args.parts < 1:
        raise utils.UserError(f"--parts {args.parts}: wanted at least 1")
    if args.to and args.data_path:
        raise utils.UserError("--to with --data_path: either names where the data set goes; give one of them")
    root = Paths.from_args(args)
    paths = at_disk(args.to) if args.to else root
    groups = [group for group in sources.GROUPS if group in args.what]
    wanted = [file for group in groups for file in sources.files_of(group, args.subjects)]
    with transfer.connect() as client:
        plan = [*plan_of_hub(wanted, paths), *plan_of_servers(wanted, paths, client, args)]
        plan += [item for group in groups for item in plan_of_weights(group)]
        if args.verify:
            plan = [item._replace(there=item.there and is_intact(item)) for item in plan]
        missing = show(plan, groups)
        if args.dry_run:
            return
        check_space(missing)
        for item in tqdm(missing, desc="files", unit="file", leave=False):
            fetch(item, paths, client, args)
    if args.to:
        link(paths, root, [item.path for item in plan if item.path.is_relative_to(paths.root)])
    print("all there; now: bash scripts/check_data.sh")


# --- what there is to fetch ---------------------------------------------------------------------------------------


class Item(NamedTuple):
    """A file, or a model's files, of the plan."""

    group: str  # of sources.GROUPS
    origin: str  # hub, nsd, coco, or a model's repository on the hub
    remote: object  # path in the hub's data set, transfer.Remote, or patterns of files
    path: Path  # where to
    size: int  # bytes
    checksum: str | None  # SHA-256, or an ETag that may be an MD5
    there: bool


def at_disk(folder):
    """The same folders on another disk."""
    disk = Path(folder).expanduser().resolve()
    if not disk.is_dir():
        raise utils.UserError(f"--to {folder}: no such folder; make it first, or check that the disk is mounted")
    return Paths(disk, disk / "MindEyeV2/mindeyev2")


def plan_of_hub(wanted, paths):
    """Items of MindEye2's data set: sizes and checksums from the hub's list of its files."""
    wanted = [file for file in wanted if file.origin == "hub"]
    if not wanted:
        return
    from huggingface_hub import HfApi

    with hub_errors(sources.HUB_DATA, "dataset"):
        tree = HfApi().list_repo_tree(sources.HUB_DATA, repo_type="dataset", recursive=True)
        listed = {entry.path: entry for entry in tree if hasattr(entry, "size") and ".." not in entry.path.split("/")}
    for file in wanted:
        names = fnmatch.filter(listed, file.remote)
        if not names:
            raise utils.UserError(f"https://huggingface.co/datasets/{sources.HUB_DATA}: {file.remote} is not there any "
                                  f"more; leave {file.group} out of --what, or put it into {paths.data_path} by hand")
        for name in names:
            entry, path = listed[name], paths.data_path / name
            checksum = entry.lfs.sha256 if entry.lfs else None
            yield Item(file.group, "hub", name, path, entry.size, checksum, has_size(path, entry.size))


def plan_of_servers(wanted, paths, client, args):
    """Items of NSD's bucket and COCO's server, which are asked for sizes."""
    servers = {"nsd": (args.nsd_url, NSD_ADVICE), "coco": (args.coco_url, COCO_ADVICE)}
    for file in wanted:
        if file.origin in servers:
            url, advice = servers[file.origin]
            path = paths.root / file.local
            if file.origin == "coco" and path.exists():  # made from the archive, which is not kept
                yield Item(file.group, file.origin, None, path, path.stat().st_size, None, True)
                continue
            remote = transfer.probe(client, f"{url.rstrip('/')}/{file.remote}", advice)
            yield Item(file.group, file.origin, remote, path, remote.size, remote.etag,
                       file.origin != "coco" and has_size(path, remote.size))


def plan_of_weights(group):
    """The files of a model that from_pretrained reads, in the hub's cache."""
    if (weights := sources.weights_of(group)) is None:
        return
    from huggingface_hub import snapshot_download

    repository, patterns = weights
    with hub_errors(repository, "model"):
        files = snapshot_download(repository, allow_patterns=patterns, dry_run=True)
    if any(file.filename.endswith(".safetensors") for file in files):  # the same weights twice otherwise
        files = [file for file in files if not file.filename.endswith(".bin")]
    for file in files:
        yield Item(group, repository, file.filename, Path(file.local_path), file.file_size or 0, None, file.is_cached)


def has_size(path, size):
    return path.is_file() and path.stat().st_size == size


def is_intact(item):
    """Whether a file has its published checksum; True where there is none to compare."""
    if item.origin == "hub" and item.checksum:
        return file_hash(item.path, digits=None) == item.checksum
    if item.origin == "nsd":
        return transfer.md5_of(item.path, item.checksum) in (None, item.checksum.strip('"'))
    return True


def show(plan, groups):
    """Print the plan by group; returns the items to fetch."""
    print(f"{'what':<11}{'files':>6}{'size':>11}{'there':>7}{'to fetch':>11}  where to")
    for group in groups:
        items = [item for item in plan if item.group == group]
        there = [item for item in items if item.there]
        size, kept = sum(item.size for item in items), sum(item.size for item in there)
        folder = os.path.commonpath([item.path.parent for item in items]) if items else "-"
        print(f"{group:<11}{len(items):>6}{utils.in_bytes(size):>11}{len(there):>7}{utils.in_bytes(size - kept):>11}"
              f"  {folder}")
    missing = [item for item in plan if not item.there]
    print(f"to fetch: {len(missing)} files, {utils.in_bytes(sum(item.size for item in missing))}")
    return missing


def check_space(missing):
    """Raise UserError when a disk does not have the room for what goes there."""
    needed = {}
    for item in missing:
        folder = next(parent for parent in item.path.parents if parent.is_dir())
        part = item.path.with_name(f".{item.path.name}.part")
        disk = needed.setdefault(os.stat(folder).st_dev, [folder, 0])
        disk[1] += item.size - (part.stat().st_blocks * 512 if part.exists() else 0)
    for folder, size in needed.values():
        free = shutil.disk_usage(folder).free
        if size > free:
            raise utils.UserError(f"{folder}: {utils.in_bytes(free)} free, wanted {utils.in_bytes(size)}; make room, "
                                  "give another disk (--to; weights: HF_HOME), fewer --subj or fewer --what")


# --- fetching -----------------------------------------------------------------------------------------------------


def fetch(item, paths, client, args):
    """Bring one item to its place, whole."""
    if item.origin == "hub":
        fetch_from_hub(item, paths)
    elif item.origin in ("nsd", "coco"):
        archive = item.path if item.origin == "nsd" else item.path.with_name(Path(sources.COCO_CAPTIONS).name)
        advice = {"nsd": NSD_ADVICE, "coco": COCO_ADVICE}[item.origin]
        if item.origin == "nsd" or not has_size(archive, item.size):
            with tqdm(total=item.size, desc=archive.name, unit="B", unit_scale=True, leave=False) as bar:
                transfer.fetch(client, item.remote, archive, advice, args.parts, bar)
        if item.origin == "coco":
            write_captions(paths, archive)
            archive.unlink()
    else:
        from huggingface_hub import hf_hub_download

        with hub_errors(item.origin, "model"):
            hf_hub_download(item.origin, item.remote)


def fetch_from_hub(item, paths):
    """A file of MindEye2's data set; the hub's client goes on after a drop and compares sizes, we the checksum."""
    from huggingface_hub import hf_hub_download

    damaged = item.path.exists()  # and yet to be fetched: what the client has begun itself lies elsewhere
    with hub_errors(sources.HUB_DATA, "dataset"):
        hf_hub_download(sources.HUB_DATA, item.remote, repo_type="dataset", local_dir=paths.data_path,
                        force_download=damaged)
    if not (has_size(item.path, item.size) and is_intact(item)):
        item.path.unlink()
        raise utils.UserError(f"{item.path}: what came does not have its published size and SHA-256; it was removed, "
                              "run the same command again")


@contextmanager
def hub_errors(repository, kind):
    """Turn what the hub's client raises into one line; kind: of repository, "dataset" or "model"."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repository}"
    try:
        yield
    except (errors.HTTPError, errors.EntryNotFoundError, OSError) as error:
        source = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
        status = getattr(source, "status_code", None)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, errors.GatedRepoError) or status == 403:
            what = (f"access is not granted (HTTP status {status}); open that page, accept its terms, and log in with "
                    "the same account: hf auth login, or HF_TOKEN in the environment")
        elif status == 401:
            what = ("not allowed without a login, or not with this one (HTTP status 401); hf auth login, or HF_TOKEN "
                    "in the environment")
        elif status == 404:
            what = f"not there ({reason}); it may have moved: look at that page, and fetch the files by hand"
        else:
            what = (f"{reason}; check the connection, HF_ENDPOINT and HF_HUB_OFFLINE, and run the same command again, "
                    "it goes on where it was")
        raise utils.UserError(f"{page}: {what}") from None


# --- another disk -------------------------------------------------------------------------------------------------


def link(disk, root, files):
    """Link what lies on another disk into the root: the highest folder that is not there yet, else the file itself."""
    for file in files:
        parts = file.relative_to(disk.root).parts
        for depth in range(1, len(parts) + 1):
            place, target = root.root.joinpath(*parts[:depth]), disk.root.joinpath(*parts[:depth])
            if place.resolve() == target:
                break
            if not place.exists() and not place.is_symlink():
                place.symlink_to(target)
                print(f"{place} -> {target}")
                break
            if depth == len(parts) or not place.is_dir():
                raise utils.UserError(f"{place}: is there already, wanted a link to {target}; move it away, then run "
                                      "the same command again")


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
