"""A plan of what to download, how large and where to; its files fetched, checked, and linked in from another disk.

What there is to have is listed in nsd/sources.py, how a big file comes over HTTP is in disk/transfer.py.
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
from disk import hub, transfer
from disk.names import Paths
from nsd import sources
from nsd.captions import write_captions

NSD_ADVICE = "sign NSD's data access form (https://naturalscenesdataset.org), check --nsd_url, or fetch it by hand"
COCO_ADVICE = "check --coco_url, or fetch it by hand (https://cocodataset.org)"


@dataclass(frozen=True)
class Servers:
    """Where NSD's bucket and COCO's server are, and what asks them and the hub."""

    client: object  # of transfer.connect()
    hub_client: object  # of hub.connect()
    nsd_url: str
    coco_url: str
    parts: int  # connections at once


# --- the plan -----------------------------------------------------------------------------------------------------


class Item(NamedTuple):
    """A file, or a model's file, of the plan."""

    group: str  # of sources.GROUPS
    origin: str  # hub, nsd, coco, or a model's repository on the hub
    remote: object  # a hub.HubFile or a transfer.Remote; of a plan without network, a path
    path: Path  # where to
    size: int  # bytes
    checksum: str | None  # as of transfer.differs
    there: bool

    @property
    def place(self):
        """The file that is fetched: of captions an archive, of weights what the cache then gives its name."""
        if self.origin == "coco":
            return self.path.with_name(Path(sources.COCO_CAPTIONS).name)
        return self.path if self.origin in ("hub", "nsd") else self.remote.blob()


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
    return [urlsplit(url).hostname for url in offline + hub.silent(urls.values())]


def known_plan(groups, subjects, paths):
    """List the Items of some groups of files as published, without asking any server (sources.known_files)."""
    from huggingface_hub import try_to_load_from_cache

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
                path = hub.cache_of(repository) / "snapshots/main" / name
                yield Item(group, repository, name, path, size, None, isinstance(there, str))


def _plan_of_hub(wanted, paths):
    """Items of MindEye2's data set: sizes and checksums from the hub's list of its files."""
    wanted = [file for file in wanted if file.origin == "hub"]
    if not wanted:
        return
    with _hub_errors(sources.HUB_DATA, "dataset"):
        listed = hub.list_files(sources.HUB_DATA, "dataset")
    for file in wanted:
        names = fnmatch.filter(listed, file.remote)
        lacking = f"{hub.page_of(sources.HUB_DATA, 'dataset')}: {file.remote} is not there any more"
        if not names and file.remote in sources.ONLY_CHECKED:
            print(f"{lacking}; the plan goes on without it: no stage reads it, check_data.py compares it with others")
        elif not names:
            raise utils.UserError(f"{lacking}; leave {file.group} out of --what, or put it into {paths.data_path} by "
                                  "hand")
        for name in names:
            found, path = listed[name], paths.data_path / name
            yield Item(file.group, "hub", found, path, found.size, found.checksum, _has_size(path, found.size))


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
            item = Item(file.group, file.origin, None, path, 0, None, there=False)
            remote = transfer.probe(servers.client, f"{url.rstrip('/')}/{file.remote}", advice, item.place)
            yield item._replace(remote=remote, size=remote.size, checksum=transfer.md5_in(remote.etag),
                                there=_has_size(path, remote.size))


def _plan_of_weights(group):
    """The files of a model that from_pretrained reads, in the hub's cache."""
    if (weights := sources.weights_of(group)) is None:
        return
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.utils import filter_repo_objects

    repository, patterns = weights
    with _hub_errors(repository, "model"):
        listed = hub.list_files(repository)
    names = list(filter_repo_objects(listed, allow_patterns=patterns))
    if any(name.endswith(".safetensors") for name in names):  # the same weights twice otherwise
        names = [name for name in names if not name.endswith(".bin")]
    for file in map(listed.get, names):
        path, found = file.in_cache(), try_to_load_from_cache(repository, file.name)
        yield Item(group, repository, file, path, file.size, file.checksum, found == str(path))


def without_damaged(plan):
    """Return the plan, with files whose checksum is not the published one marked as missing."""
    return [item._replace(there=item.there and not transfer.differs(item.path, item.checksum)) for item in plan]


def _has_size(path, size):
    return path.is_file() and path.stat().st_size == size


def _is_about(path, size):
    """Whether a file is there, of about that size: published numbers leave out headers, and shards differ by trials."""
    return path.is_file() and abs(path.stat().st_size - size) < size / 3


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
        folder = next(parent for parent in item.place.parents if parent.is_dir())
        disk = needed.setdefault(os.stat(folder).st_dev, [folder, 0])
        disk[1] += transfer.remaining(item.place, item.size)
    for folder, size in needed.values():
        free = shutil.disk_usage(folder).free
        if size > free:
            raise utils.UserError(f"{folder}: {utils.in_bytes(free)} free, wanted {utils.in_bytes(size)}; make room, "
                                  "give another disk (--to; weights: HF_HOME), fewer --subj or fewer --what")


# --- fetching -----------------------------------------------------------------------------------------------------


def fetch_all(missing, paths, servers):
    """Fetch each item to its place, complete or not at all: small ones many at once, then large ones in parts."""
    small, large = [], []
    for item in missing:
        (small if item.size <= transfer.BLOCK and item.origin != "coco" else large).append(item)
    with utils.progress(total=sum(item.size for item in missing), desc=f"{len(missing)} files", unit="B",
                        unit_scale=True, leave=False) as bar:
        transfer.in_threads(lambda item, stop: _fetch(item, paths, servers, 1, bar, stop), small, servers.parts)
        for item in large:
            _fetch(item, paths, servers, servers.parts, bar)


def _fetch(item, paths, servers, parts, bar, stop=None):
    """Fetch an item over so many connections."""
    if item.origin == "hub":
        hub.fetch(servers.hub_client, item.remote, item.path, parts, bar, stop)
    elif item.origin == "nsd":
        transfer.fetch(servers.client, item.remote, item.path, NSD_ADVICE, parts, bar, stop=stop)
    elif item.origin == "coco":
        if not _has_size(item.place, item.size):
            transfer.fetch(servers.client, item.remote, item.place, COCO_ADVICE, parts, bar, stop=stop)
        write_captions(paths, item.place)
        item.place.unlink()
    else:
        with _hub_errors(item.origin, "model"):
            hub.fetch_to_cache(servers.hub_client, item.remote, parts, bar, stop)


@contextmanager
def _hub_errors(repository, kind):
    """Turn what the hub's client raises into one line; kind: of repository, "dataset" or "model"."""
    from huggingface_hub import errors

    page = hub.page_of(repository, kind)
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
