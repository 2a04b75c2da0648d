"""Networks that others trained: a folder, or an id on the Hugging Face hub."""

import os
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

from utils import UserError

PATIENCE = 5  # seconds for the hub to answer


def find_model(given, paths, flag, hint, file="config.json"):
    """Return the folder that a flag names (disk.names.Paths.find), or its hub id as it is.

    Raises UserError, at once, for what is neither a folder, nor in the hub's cache, nor to be had from the hub: its
    client would try for half a minute. file: one that every such model has. hint: where it can be had from.
    """
    folder = paths.find(given)
    if folder.is_dir():
        return str(folder)
    give = f"give {flag} the folder of such a model" + (f", or {hint}" if hint else "")
    if folder.is_file() or not _is_hub_id(given):
        raise UserError(f"{flag} {given}: no such folder (looked from here and from {paths.root}); {give}")
    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(given, file), str):
        return given
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{flag} {given}: no such folder, and it could not be loaded from the hub's cache "
                        f"({constants.HF_HUB_CACHE}; HF_HUB_OFFLINE is set); {give}")
    if not answers(constants.ENDPOINT):
        raise UserError(f"{flag} {given}: no such folder, not in the hub's cache ({constants.HF_HUB_CACHE}), and "
                        f"{urlsplit(constants.ENDPOINT).hostname} does not answer; {give}")
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{flag} {given}: not in the hub's cache yet, fetched now", flush=True)
    return given


def _is_hub_id(given):
    """Say whether a name could be one on the hub, NAME or OWNER/NAME."""
    return given.count("/") <= 1 and not given.startswith((".", "~", "/")) and not given.endswith("/") and bool(given)


def answers(url):
    """Say whether a server takes connections; behind a proxy its name need not be known here: then yes."""
    address = urlsplit(url)
    if {"http", "https", "all"} & getproxies().keys():
        return True
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname, port), PATIENCE).close()
    except OSError:
        return False
    return True
