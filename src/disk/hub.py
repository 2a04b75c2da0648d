"""Networks that others trained: a folder, or an id on the Hugging Face hub."""

import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from disk import transfer
from utils import UserError, progress

PATIENCE = 3  # seconds for a server to say that it is there
ANSWER = 60  # seconds for the hub to answer a question
NOBODY_BEHIND = (502, 503, 504)  # what a proxy answers that reaches nobody


def find_model(given, paths, flag, hint, file="config.json"):
    """Return the folder that a flag names (disk.names.Paths.find), or its hub id as it is.

    Raises UserError as `require_model`.
    """
    name = paths.model(given)
    require_model(name, flag, hint, file, f"from here and from {paths.root}")
    return name


def require_model(name, flag, hint, file="config.json", looked="from here"):
    """Check that a model is there: a folder, or a hub id.

    Raises UserError, at once, for what is neither a folder, nor in the hub's cache, nor to be had from the hub: its
    client would try for half a minute. file: one that every such model has. hint: where it can be had from, or "".
    """
    if Path(name).is_dir():
        return
    give = f"give {flag} the folder of such a model" + (f", or {hint}" if hint else "")
    if not _is_hub_id(name) or Path(name).is_file():
        raise UserError(f"{flag} {name}: no such folder (looked {looked}); {give}")
    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, file), str):
        return
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{flag} {name}: no such folder, and it could not be loaded from the hub's cache "
                        f"({constants.HF_HUB_CACHE}; HF_HUB_OFFLINE is set); {give}")
    if silent([constants.ENDPOINT]):
        raise UserError(f"{flag} {name}: no such folder, not in the hub's cache ({constants.HF_HUB_CACHE}), and "
                        f"{urlsplit(constants.ENDPOINT).hostname} does not answer; {give}")
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{flag} {name}: not in the hub's cache yet, fetched now", flush=True)
    if file == "config.json":  # of one network; the parts of a pipeline come by `snapshot`
        with suppress(OSError):  # from_pretrained says what is wrong
            fetch_network(name)


def fetch_network(name):
    """Fetch what from_pretrained reads of one network, of a repository on the hub, into the hub's cache.

    Its settings and its weights: pickles only where there is nothing else.
    """
    listed = {file: known for file, known in list_files(name).items() if "/" not in file}
    weights = ".safetensors" if any(file.endswith(".safetensors") for file in listed) else ".bin"
    wanted = [known for file, known in listed.items() if file.endswith((".json", ".txt", weights))]
    fetch_files(name, sorted(wanted, key=lambda known: known.name == "config.json"))  # last: it says that all is there


def snapshot(name, patterns, weights):
    """The folder in the hub's cache that has a repository's files of some patterns; what is lacking is fetched.

    A folder that has everything is taken without asking the hub, so that it is found without a network, too. patterns:
    the first is the name of a file. weights: {file: another that may stand in for it}; the latter are fetched only from
    a repository that lacks the former. Raises UserError, OSError and errors of the hub's client.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.utils import filter_repo_objects

    cached = try_to_load_from_cache(name, patterns[0])
    if isinstance(cached, str):
        folder = Path(cached).parent
        if all(any(folder.glob(pattern)) for pattern in patterns if pattern not in weights) and \
                all(any((folder / file).exists() for file in pair) for pair in weights.items()):
            return folder
    listed = list_files(name)
    others = [other for file, other in weights.items() if file not in listed]
    wanted = [listed[file] for file in filter_repo_objects(listed, allow_patterns=[*patterns, *others])]
    fetch_files(name, wanted)
    return cache_of(name) / "snapshots" / next(iter(listed.values())).commit


def fetch_files(name, files):
    """Fetch those of a model's HubFiles that the hub's cache does not have, under a bar called `name`."""
    wanted = [file for file in files if not file.in_cache().exists()]
    with connect() as client, progress(total=sum(file.size for file in wanted), desc=name, unit="B", unit_scale=True,
                                       leave=False) as bar:
        for file in wanted:
            fetch_to_cache(client, file, bar=bar)


# --- files on the hub ---------------------------------------------------------------------------------------------
# The hub's own client begins an interrupted file again from 0, so files come by disk/transfer.py, and it is asked for
# addresses, headers and lists, and to make its cache of what came.


class HubFile(NamedTuple):
    """A file of a repository on the hub, as it is listed there."""

    repository: str
    kind: str  # of repository: "model" or "dataset"
    commit: str
    name: str  # its path in the repository
    size: int  # bytes
    sha256: str | None  # of a large file
    git_name: str  # Git's name of the content; of a large file, that of a pointer to it

    @property
    def checksum(self):
        """As of transfer.differs."""
        return f"sha256:{self.sha256}" if self.sha256 else f"git:{self.git_name}"

    def in_cache(self):
        """Where the hub's cache has the file of a model, under its name."""
        return cache_of(self.repository) / "snapshots" / self.commit / self.name

    def blob(self):
        """Where the hub's cache has the content of that file."""
        return cache_of(self.repository) / "blobs" / (self.sha256 or self.git_name)


def cache_of(repository):
    """The folder of a model in the hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}")


def connect():
    """A client of disk/transfer.py for the hub, with the user's token."""
    from huggingface_hub.utils import build_hf_headers

    return transfer.connect(build_hf_headers())


def list_files(repository, kind="model"):
    """List the files of a repository's newest version, {name: HubFile}; kind: "model" or "dataset".

    Raises errors of the hub's client where it refuses or may not ask, UserError where nothing comes for long.
    """
    from huggingface_hub import HfApi

    def ask():
        commit = HfApi().repo_info(repository, repo_type=kind, revision="main", timeout=ANSWER).sha
        tree = HfApi().list_repo_tree(repository, repo_type=kind, revision=commit, recursive=True)
        files = [entry for entry in tree if hasattr(entry, "size") and ".." not in entry.path.split("/")]
        if not (commit and files):
            raise LookupError
        return {file.path: HubFile(repository, kind, commit, file.path, file.size, file.lfs and file.lfs.sha256,
                                   file.blob_id) for file in files}

    return _patiently(ask, page_of(repository, kind), transfer.Stop())


def page_of(repository, kind):
    """The page of a repository."""
    return f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repository}"


def fetch(client, file, path, parts=8, bar=None, stop=None):
    """Fetch a HubFile to `path`: resumed, of the listed size and checksum, or UserError (transfer.fetch)."""
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(file.repository, file.name, repo_type=file.kind, revision=file.commit)
    advice = f"hf auth login (or HF_TOKEN), and accept the terms on {page_of(file.repository, file.kind)}"
    remote = transfer.probe(client, url, advice, path, file.size, stop)
    transfer.fetch(client, remote, path, advice, parts, bar, file.checksum, stop)


def fetch_to_cache(client, file, parts=8, bar=None, stop=None):
    """Fetch a HubFile of a model to where from_pretrained finds it: the hub's cache."""
    from huggingface_hub import hf_hub_download

    blob, stop = file.blob(), stop or transfer.Stop()
    if not blob.is_file() or transfer.differs(blob, file.checksum):
        fetch(client, file, blob, parts, bar, stop)
    # finds the content, gives it its name and notes which version is the newest
    _patiently(lambda: hf_hub_download(file.repository, file.name), page_of(file.repository, file.kind), stop)


def _patiently(ask, what, stop):
    """Call `ask`, which uses the hub's client, again as transfer.patiently does; refusals are raised as they are."""
    from huggingface_hub import errors

    def once():
        try:
            return ask()
        except errors.OfflineModeIsEnabled:
            raise
        except errors.HfHubHTTPError as error:
            if error.response.status_code in transfer.REFUSALS:
                raise
            reason = f"HTTP status {error.response.status_code}"
            raise transfer.Again(reason, transfer.wanted_pause(error.response.headers)) from error
        except (errors.HTTPError, errors.LocalEntryNotFoundError) as error:
            raise transfer.Again((str(error).strip() or type(error).__name__).splitlines()[0]) from error
        except (ValueError, LookupError, TypeError) as error:  # a login page, which the client took for an answer
            raise transfer.Again("an answer came that is not the hub's") from error

    return transfer.patiently(once, what, stop)


# --- names --------------------------------------------------------------------------------------------------------


def _is_hub_id(name):
    """Say whether a name could be one on the hub, NAME or OWNER/NAME."""
    return name.count("/") <= 1 and not name.startswith((".", "~", "/")) and not name.endswith("/") and bool(name)


def silent(urls):
    """List those of some servers that do not answer within PATIENCE, all asked at once, through a proxy if one is set.

    Threads of our own: a name server that does not answer either keeps its caller waiting for longer.
    """
    import httpx

    def ask(url):
        try:
            if httpx.head(url, timeout=PATIENCE).status_code not in NOBODY_BEHIND:
                answered.add(url)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, ImportError, OSError):  # some of a proxy that is unfit
            pass

    answered, until = set(), time.monotonic() + PATIENCE
    threads = [threading.Thread(target=ask, args=(url,), daemon=True) for url in urls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0, until - time.monotonic()))
    return [url for url in urls if url not in answered]
