"""A plan of what to download, how large and where to; its files fetched, checked, and linked in from another disk.

What there is to have is listed in nsd/sources.py, how a big file comes over HTTP is in nsd/transfer.py.
"""

import fnmatch
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import utils
from disk.files import file_hash
from disk.hub import silent
from disk.names import Paths
from nsd import sources, transfer
from nsd.captions import write_captions

NSD_ADVICE = "sign NSD's data access form (https://naturalscenesdataset.org), check --nsd_url, or fetch it by hand"
COCO_ADVICE = "check --coco_url, or fetch it by hand (https://cocodataset.org)"


@dataclass(frozen=True)
class Servers:
    """Where NSD's bucket and COCO's server are, and what asks them."""

    client: object  # of transfer.connect()
    nsd_url: str
    coco_url: str
    parts: int  # connections at once, for a file of NSD's bucket


# --- the plan -----------------------------------------------------------------------------------------------------


class Item(NamedTuple):
    """A file, or a model's file, of the plan."""

    group: str  # of sources.GROUPS
    origin: str  # hub, nsd, coco, or a model's repository on the hub
    remote: object  # path in the hub's data set or in the model's repository, or a transfer.Remote
    path: Path  # where to
    size: int  # bytes
    checksum: str | None  # SHA-256, or an ETag that may be an MD5
    there: bool


def at_disk(folder):
    """Return the Paths of the same folders on another disk."""
    disk = Path(folder).expanduser().resolve()
    if not disk.is_dir():
        raise utils.UserError(f"--to {folder}: no such folder; make it first, or check that the disk is mounted")
    return Paths(disk, disk / "MindEyeV2/mindeyev2")


def make_plan(groups, subjects, paths, servers):
    """List the Items of some groups of files: what the servers say of each, and whether it is there."""
    wanted = [file for group in groups for file in sources.files_of(group, subjects)]
    plan = [*_plan_of_hub(wanted, paths), *_plan_of_servers(wanted, paths, servers)]
    return plan + [item for group in groups for item in _plan_of_weights(group)]


def silent_servers(groups, subjects, servers):
    """List the hosts among those that a plan asks which do not answer."""
    from huggingface_hub import constants

    origins = {file.origin for group in groups for file in sources.files_of(group, subjects)}
    origins |= {"hub" for group in groups if sources.weights_of(group)}
    urls = {"hub": constants.ENDPOINT, "nsd": servers.nsd_url, "coco": servers.coco_url}
    urls = {origin: url for origin, url in urls.items() if origin in origins}
    offline = [urls.pop("hub")] if constants.HF_HUB_OFFLINE and "hub" in urls else []
    return [urlsplit(url).hostname for url in offline + silent(urls.values())]


def known_plan(groups, subjects, paths):
    """List the Items of some groups of files as published, without asking any server (sources.known_files)."""
    from huggingface_hub import constants, try_to_load_from_cache

    for group in groups:
        for file in sources.files_of(group, subjects):
            for remote, size in sources.known_files(file).items():
                path = paths.data_path / remote if file.origin == "hub" else paths.root / file.local
                made = file.origin == "coco" or not size  # captions, from an archive; or a size that is not known
                yield Item(group, file.origin, remote, path, size, None,
                           path.is_file() if made else _is_about(path, size))
        repository, patterns = sources.weights_of(group) or (None, [])
        for name in patterns:
            size = sources.SIZES.get(name, sources.SIZES.get(f"{repository}/{name}"))
            if size:
                there = try_to_load_from_cache(repository, name)
                folder = Path(constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}", "snapshots/main")
                yield Item(group, repository, name, folder / name, size, None, isinstance(there, str))


def _plan_of_hub(wanted, paths):
    """Items of MindEye2's data set: sizes and checksums from the hub's list of its files."""
    wanted = [file for file in wanted if file.origin == "hub"]
    if not wanted:
        return
    from huggingface_hub import HfApi

    with _hub_errors(sources.HUB_DATA, "dataset"):
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
            yield Item(file.group, "hub", name, path, entry.size, checksum, _has_size(path, entry.size))


def _plan_of_servers(wanted, paths, servers):
    """Items of NSD's bucket and COCO's server, which are asked for sizes."""
    places = {"nsd": (servers.nsd_url, NSD_ADVICE), "coco": (servers.coco_url, COCO_ADVICE)}
    for file in wanted:
        if file.origin in places:
            url, advice = places[file.origin]
            path = paths.root / file.local
            if file.origin == "coco" and path.exists():  # made from the archive, which is not kept
                yield Item(file.group, file.origin, None, path, path.stat().st_size, None, True)
                continue
            remote = transfer.probe(servers.client, f"{url.rstrip('/')}/{file.remote}", advice)
            yield Item(file.group, file.origin, remote, path, remote.size, remote.etag,
                       file.origin != "coco" and _has_size(path, remote.size))


def _plan_of_weights(group):
    """The files of a model that from_pretrained reads, in the hub's cache."""
    if (weights := sources.weights_of(group)) is None:
        return
    from huggingface_hub import snapshot_download

    repository, patterns = weights
    with _hub_errors(repository, "model"):
        files = snapshot_download(repository, allow_patterns=patterns, dry_run=True)
    if any(file.filename.endswith(".safetensors") for file in files):  # the same weights twice otherwise
        files = [file for file in files if not file.filename.endswith(".bin")]
    for file in files:
        yield Item(group, repository, file.filename, Path(file.local_path), file.file_size or 0, None, file.is_cached)


def without_damaged(plan):
    """Return the plan, with files whose checksum is not the published one marked as missing."""
    return [item._replace(there=item.there and _is_intact(item)) for item in plan]


def _has_size(path, size):
    return path.is_file() and path.stat().st_size == size


def _is_about(path, size):
    """Whether a file is there, of about that size: published numbers leave out headers, and shards differ by trials."""
    return path.is_file() and abs(path.stat().st_size - size) < size / 3


def _is_intact(item):
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
        size, rest = in_bytes(items), in_bytes([item for item in items if not item.there])
        folder = os.path.commonpath([item.path.parent for item in items]) if items else "-"
        print(f"{group:<11}{len(items):>6}{size:>11}{len(there):>7}{rest:>11}  {folder}")
    missing = [item for item in plan if not item.there]
    print(f"to fetch: {len(missing)} files, {in_bytes(missing)}")
    if others := [item.path for item in missing if item.path.is_file()]:
        print(f"{len(others)} of them are there, but are not the published files (cut off, or of another data set), "
              f"and would be replaced: {others[0]}{', ...' if len(others) > 1 else ''}")
    return missing


def in_bytes(items):
    """Write the size of some Items; of files of which only an upper bound is known (size 0), that bound."""
    size = sum(item.size for item in items)
    return f"< {10 * len(items)} MB" if items and not size else utils.in_bytes(size)


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


def fetch_all(missing, paths, servers):
    """Fetch each item to its place, complete or not at all."""
    for item in utils.progress(missing, desc="files", unit="file", leave=False):
        if item.origin == "hub":
            _fetch_from_hub(item, paths)
        elif item.origin == "nsd":
            _fetch_from_server(item, item.path, NSD_ADVICE, servers)
        elif item.origin == "coco":
            archive = item.path.with_name(Path(sources.COCO_CAPTIONS).name)
            if not _has_size(archive, item.size):
                _fetch_from_server(item, archive, COCO_ADVICE, servers)
            write_captions(paths, archive)
            archive.unlink()
        else:
            from huggingface_hub import hf_hub_download

            with _hub_errors(item.origin, "model"):
                hf_hub_download(item.origin, item.remote)


def _fetch_from_server(item, path, advice, servers):
    with utils.progress(total=item.size, desc=path.name, unit="B", unit_scale=True, leave=False) as bar:
        transfer.fetch(servers.client, item.remote, path, advice, servers.parts, bar)


def _fetch_from_hub(item, paths):
    """A file of MindEye2's data set; the hub's client resumes after a drop and checks sizes, we check the checksum."""
    from huggingface_hub import hf_hub_download

    damaged = item.path.exists()  # and yet to be fetched: the client keeps its own partial files elsewhere
    with _hub_errors(sources.HUB_DATA, "dataset"):
        hf_hub_download(sources.HUB_DATA, item.remote, repo_type="dataset", local_dir=paths.data_path,
                        force_download=damaged)
    if not (_has_size(item.path, item.size) and _is_intact(item)):
        item.path.unlink()
        raise utils.UserError(f"{item.path}: it does not have its published size and SHA-256; it was removed, "
                              "run the same command again")


@contextmanager
def _hub_errors(repository, kind):
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
                    "it resumes where it stopped")
        raise utils.UserError(f"{page}: {what}") from None


# --- another disk -------------------------------------------------------------------------------------------------


def link(disk, root, plan):
    """Link the plan's files on another disk into the root: the highest folder that is not there yet, else the file."""
    for item in plan:
        if not item.path.is_relative_to(disk.root):
            continue  # weights, in the hub's cache
        parts = item.path.relative_to(disk.root).parts
        for depth in range(1, len(parts) + 1):
            place, target = root.root.joinpath(*parts[:depth]), disk.root.joinpath(*parts[:depth])
            if place.resolve() == target:
                break
            if not place.exists() and not place.is_symlink():
                place.symlink_to(target)
                print(f"{place} -> {target}")
                break
            if depth == len(parts) or not place.is_dir():
                raise utils.UserError(f"{place}: already exists, wanted a link to {target}; move it away, then run "
                                      "the same command again")
