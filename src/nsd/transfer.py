"""Fetch big files over HTTP(S): in parallel parts, resumed after an interruption, complete or not at all.

Beside a file NAME that is being fetched lie .NAME.part, at its full size, and .NAME.part.json: which blocks it has, of
which version (size and ETag) of which URL.
"""

import json
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple

import httpx

import utils
from disk.files import file_hash, save_json

BLOCK = 64 << 20  # bytes: what a kill costs at most, per connection
TIMEOUT = httpx.Timeout(30, read=60)  # seconds: to connect, and without a byte arriving
TRIES, PAUSE = 6, 1.0  # in a row without a byte; seconds before the second, doubled each time
GONE = {401: "is not allowed without a login", 403: "is refused", 404: "is not there", 416: "is shorter than before"}


class Remote(NamedTuple):
    """What a server says of a file."""

    url: str
    size: int  # bytes
    etag: str | None
    has_ranges: bool  # whether it sends parts


class Changed(Exception):
    """The file on the server is not the one whose parts are here."""


class Stopped(Exception):
    """Another connection of the same file has failed."""


def connect():
    """A client for fetch and probe; it follows redirects and takes proxies from the environment."""
    return httpx.Client(timeout=TIMEOUT, follow_redirects=True, headers={"Accept-Encoding": "identity"})


def probe(client, url, advice):
    """Ask a server for a file's size; UserError, ending in `advice`, when it will not say."""
    def ask():
        with client.stream("GET", url, headers={"Range": "bytes=0-0"}) as answer:
            if answer.status_code not in (200, 206):
                answer.raise_for_status()
            in_parts = answer.status_code == 206
            size = answer.headers["Content-Range"].rpartition("/")[2] if in_parts else answer.headers["Content-Length"]
            return Remote(url, int(size), answer.headers.get("ETag"), in_parts)

    try:
        return _patiently(ask)
    except (KeyError, ValueError):
        raise utils.UserError(f"{url}: the server does not report its size; {advice}") from None
    except httpx.HTTPError as error:
        raise _one_line(url, error, advice) from None


def fetch(client, remote, path, advice, parts=8, bar=None):
    """Fetch a file to `path`, continuing what an earlier call began. bar: utils.progress, counting bytes.

    Raises UserError, ending in `advice`, when the server refuses, keeps failing, or the download does not have its size
    or MD5 (which an ETag of 32 hexadecimal digits is, as S3 gives for what was uploaded in one piece).
    """
    bar = utils.progress(disable=True) if bar is None else bar
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    journal = part.with_name(part.name + ".json")
    try:
        _fill(client, remote, part, journal, parts, bar)
    except Changed:
        part.unlink(missing_ok=True)
        journal.unlink(missing_ok=True)
        raise utils.UserError(f"{remote.url}: changed on the server while it was fetched; run the same command again, "
                              "it starts over") from None
    except httpx.HTTPError as error:
        raise _one_line(remote.url, error, advice) from None
    except OSError as error:
        raise utils.UserError(f"{part}: could not be written ({error.strerror}); make room, or give another --to, and "
                              "run the same command again, it resumes where it stopped") from None
    found, wanted = md5_of(part, remote.etag), (remote.etag or "").strip('"')
    if found not in (None, wanted):
        part.unlink()
        journal.unlink()
        raise utils.UserError(f"{remote.url}: the file has MD5 {found}, wanted {wanted}; run the same command again")
    os.replace(part, path)
    journal.unlink()


def _fill(client, remote, part, journal, parts, bar):
    """Fetch the blocks that are missing."""
    version = {"url": remote.url, "size": remote.size, "etag": remote.etag}
    done = _blocks_of(journal, version) if remote.has_ranges and part.exists() else set()
    starts = range(0, remote.size, BLOCK) if remote.has_ranges else [0] * (remote.size > 0)
    ends = {start: min(start + BLOCK, remote.size) if remote.has_ranges else remote.size for start in starts}
    save_json(journal, {**version, "blocks": sorted(done)})
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.ftruncate(descriptor, remote.size)
        bar.update(sum(ends[start] - start for start in done))

        stop = threading.Event()
        with ThreadPoolExecutor(parts if remote.has_ranges else 1) as threads:
            try:
                blocks = {threads.submit(_fetch_range, client, remote, descriptor, start, ends[start], bar, stop): start
                          for start in starts if start not in done}
                for block in as_completed(blocks):
                    block.result()
                    os.fsync(descriptor)  # so that the journal is never ahead of the disk
                    done.add(blocks[block])
                    save_json(journal, {**version, "blocks": sorted(done)})
            finally:
                stop.set()
                threads.shutdown(cancel_futures=True)
    finally:
        os.close(descriptor)


def _blocks_of(journal, version):
    """First bytes of the blocks that are here, if they are of that version."""
    try:
        kept = json.loads(journal.read_text())
        return set(kept.pop("blocks")) if {key: kept.get(key) for key in version} == version else set()
    except (OSError, ValueError, KeyError, AttributeError):
        return set()


def _fetch_range(client, remote, descriptor, start, end, bar, stop):
    """Bytes start..end of a file, written at their place; resumed after a drop, until another connection fails."""
    at = start

    def go_on():
        nonlocal at
        ranges = {"Range": f"bytes={at}-{end - 1}"} if remote.has_ranges else {}
        if not remote.has_ranges:
            bar.update(start - at)
            at = start  # this server can only start over
        with client.stream("GET", remote.url, headers=ranges) as answer:
            if answer.status_code not in (200, 206):
                answer.raise_for_status()
            _check_version(answer, remote, at)
            for content in answer.iter_raw():  # as it comes: gathered pieces would be lost in a drop
                if stop.is_set():
                    raise Stopped
                if at + len(content) > end:
                    raise Changed
                os.pwrite(descriptor, content, at)
                at += len(content)
                bar.update(len(content))
        if at < end:
            raise httpx.ReadError(f"the connection ended at byte {at} of {end}")

    _patiently(go_on, lambda: at)


def _check_version(answer, remote, at):
    """Whether an answer is a part of the file that was probed, from byte `at`."""
    if answer.headers.get("ETag") != remote.etag:
        raise Changed
    if remote.has_ranges:
        unit, _, size = answer.headers.get("Content-Range", "").rpartition("/")
        if answer.status_code != 206 or size != str(remote.size) or not unit.startswith(f"bytes {at}-"):
            raise Changed
    elif answer.headers.get("Content-Length") != str(remote.size):
        raise Changed


def _patiently(action, progress=lambda: None):
    """Retry after a drop, a timeout or a busy server; any progress resets the count."""
    tries, before = 0, progress()
    while True:
        try:
            return action()
        except httpx.HTTPError as error:
            final = isinstance(error, httpx.HTTPStatusError) and error.response.status_code in GONE
            tries, before = (tries if progress() == before else 0) + 1, progress()
            if final or tries >= TRIES:
                raise
            time.sleep(PAUSE * 2 ** (tries - 1))


def _one_line(url, error, advice):
    if isinstance(error, httpx.HTTPStatusError):
        status = error.response.status_code
        return utils.UserError(f"{url}: {GONE.get(status, 'failed')} (HTTP status {status}); {advice}")
    return utils.UserError(f"{url}: {str(error) or type(error).__name__} after {TRIES} tries; check the connection and "
                           "run the same command again, it resumes where it stopped")


def md5_of(path, etag):
    """MD5 of a file whose ETag is one; None of any other."""
    if not re.fullmatch(r'"[0-9a-f]{32}"', etag or ""):
        return None
    return file_hash(path, "md5", None)
