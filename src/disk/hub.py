"""Networks that others trained: a folder, or an id on the Hugging Face hub."""

import os
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

from utils import UserError

PATIENCE = 3  # seconds for a server to answer
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


def snapshot(name, patterns, weights):
    """The folder in the hub's cache that has a repository's files of some patterns; what is lacking is fetched.

    A folder that has everything is taken without asking the hub, so that it is found without a network, too. patterns:
    the first is the name of a file. weights: {file: another that may stand in for it}; the latter are fetched only from
    a repository that lacks the former. Raises OSError and errors of the hub's client.
    """
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    def lacking_weights(folder):
        return [file for pair in weights.items() if not any((folder / file).exists() for file in pair) for file in pair]

    cached = try_to_load_from_cache(name, patterns[0])
    if isinstance(cached, str):
        folder = Path(cached).parent
        if all(any(folder.glob(pattern)) for pattern in patterns if pattern not in weights) and \
                not lacking_weights(folder):
            return folder
    folder = Path(snapshot_download(name, allow_patterns=patterns))
    lacking = lacking_weights(folder)
    return Path(snapshot_download(name, allow_patterns=[*patterns, *lacking])) if lacking else folder


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
