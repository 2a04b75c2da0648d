"""Fetch big files over HTTP(S): in parallel parts, resumed after an interruption, complete or not at all.

Beside a file NAME that is being fetched lie .NAME.part, at its full size, and .NAME.part.json: which bytes of it are
here, of which version (size and ETag) of the file. No single answer makes these worthless: a login page of the network
that came instead of the file is not the file's new version.
"""

import fcntl
import hashlib
import json
import os
import queue
import re
import sys
import threading
import time
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import NamedTuple

import httpx

import utils
from disk.files import file_hash, save_json

BLOCK = 16 << 20  # bytes of one request: what a kill costs at most, per connection
OLD_BLOCK = 64 << 20  # of journals that list the first bytes of blocks
TIMEOUT = httpx.Timeout(30, read=60)  # seconds: to connect, and without a byte arriving
PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before the second try, doubled each time up to
PATIENCE = 30 * 60  # seconds of pauses in a row without a byte
SAID_FROM, SAID_EVERY = 4, 60  # seconds: pauses that are told to the user, and how often
LEAVING = 1  # second that connections have to end, when all are stopped
REFUSALS = {401: "is not allowed without a login", 403: "is refused", 404: "is not there"}


class Remote(NamedTuple):
    """What a server says of a file."""

    url: str
    size: int  # bytes
    etag: str | None
    has_ranges: bool  # whether it sends parts

    def is_whole(self, known):
        """Whether this says as much as what is known: a login page has no ETag, and does not come in parts."""
        return self.has_ranges >= known.has_ranges and (self.etag is not None or known.etag is None)


class Again(Exception):
    """An answer that may be another next time; `wait`: seconds that the server wants to be left alone."""

    def __init__(self, reason, wait=0.0):
        super().__init__(reason)
        self.wait = wait


class Refused(Exception):
    """An answer that will stay the same; its argument is the HTTP status."""


class Changed(Exception):
    """The file on the server is not the one whose parts are here; its argument is the Remote of the new one."""


class Stopped(Exception):
    """Another connection has failed, or the user wants no more."""


class Stop(threading.Event):
    """Ends all connections that have it, and their pauses, when it is set."""

    def __init__(self):
        super().__init__()
        self._lock, self._said = threading.Lock(), -float("inf")

    def pause(self, seconds, what, reason):
        """Wait, and say why, of all connections once in a while; raises Stopped as soon as it is set."""
        with self._lock:
            is_news = seconds >= SAID_FROM and time.monotonic() - self._said >= SAID_EVERY
            self._said = time.monotonic() if is_news else self._said
        if is_news:
            print(f"{what}: {reason}; asked again in {seconds:.0f} s (Ctrl-C stops, the same command resumes)",
                  file=sys.stderr, flush=True)
        if self.wait(seconds):
            raise Stopped


def connect(headers=None):
    """A client for fetch and probe; it follows redirects and takes proxies from the environment.

    headers: of every request. After a redirect to another host it sends no `Authorization`.
    """
    headers = {**(headers or {}), "Accept-Encoding": "identity"}
    return httpx.Client(timeout=TIMEOUT, follow_redirects=True, headers=headers)


# --- asking -------------------------------------------------------------------------------------------------------


def patiently(action, what, stop, progress=lambda: None):
    """Call `action` until it raises no Again, with growing pauses; any progress starts them anew.

    what: its name in messages. Raises UserError when PATIENCE is over, or a server wants to be left alone for longer.
    """
    waited, pause, before = 0.0, PAUSE, progress()
    while True:
        try:
            return action()
        except Again as again:
            if progress() != before:
                waited, pause, before = 0.0, PAUSE, progress()
            seconds = max(pause, again.wait)
            if waited + seconds > PATIENCE:
                after = f"wants to be left alone for {seconds:.0f} s" if again.wait > PATIENCE else \
                    f"asked for {waited / 60:.0f} minutes"
                raise utils.UserError(f"{what}: {again}, {after}; check the connection and run the same command "
                                      "again, it resumes where it stopped") from None
            stop.pause(seconds, what, again)
        waited, pause = waited + seconds, min(2 * pause, LONGEST_PAUSE)


def probe(client, url, advice, path=None, size=None, stop=None):
    """Ask a server for a file's size and ETag, in a Remote; UserError, ending in `advice`, when it will not say.

    path: where the file goes. Where it, or a part of it, is there already, an answer that contradicts that is asked for
    a second time, and not believed if it says less. size: bytes that the file is known to have, whatever is there.
    """
    known, last = _known(url, path, size), None

    def ask():
        nonlocal last
        found = _ask(client, url)
        if size not in (None, found.size):
            raise Again(f"it has {found.size} bytes, wanted {size}")
        if known is None or (found.size == known.size and known.etag in ("", found.etag)):
            return found
        is_confirmed, last = found == last and found.is_whole(known), found
        if not is_confirmed:
            raise Again(f"it has {found.size} bytes (ETag {found.etag}), unlike the {known.size} of {path}")
        return found

    with _in_one_line(url, advice):
        return patiently(ask, url, stop or Stop())


def _known(url, path, size):
    """What is known of a file from what is at its path, in a Remote whose ETag is "" if that is not known; or None."""
    if path is None:
        return None
    _, journal = _parts_of(path)
    kept = _read_journal(journal)
    if kept and kept["ranges"]:
        return Remote(url, kept["size"], kept["etag"], True)
    return Remote(url, path.stat().st_size, "", True) if size is None and path.is_file() else None


def _ask(client, url):
    with _answer(client, url, {"Range": "bytes=0-0"}) as answer:
        return _remote_of(url, answer)


@contextmanager
def _answer(client, url, headers):
    """The answer to a request, its body yet to be read; Again for whatever may go wrong on the way."""
    try:
        with client.stream("GET", url, headers=headers) as answer:
            yield answer
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise utils.UserError(f"{url}: is no address ({error}); check the URL") from None
    except httpx.HTTPError as error:
        raise Again(str(error) or type(error).__name__) from error


def _remote_of(url, answer):
    """What an answer says of the whole file; raises Refused, and Again for what is no answer about a file."""
    status, headers = answer.status_code, answer.headers
    if status not in (200, 206):
        # where it was redirected to an address that has run out, the first address gives another
        if status in REFUSALS and not answer.history:
            raise Refused(status)
        raise Again(f"HTTP status {status}", wanted_pause(headers))
    if headers.get("Content-Type", "").startswith("text/html"):
        raise Again("a web page came instead of the file, as from a network that wants a login")
    size = headers.get("Content-Range", "").rpartition("/")[2] if status == 206 else headers.get("Content-Length", "")
    if not size.isdecimal():
        raise Again("the server does not say how large the file is")
    # the hub's own ETag of a large file is with the answer that redirects to where the file lies
    linked = [step.headers["X-Linked-ETag"] for step in (*answer.history, answer) if "X-Linked-ETag" in step.headers]
    etag = linked[-1] if linked else headers.get("ETag")
    if status == 200 and etag is None and "Last-Modified" not in headers:
        raise Again("an answer came that is not a file's: without parts, ETag or date")
    return Remote(url, int(size), etag, status == 206)


def wanted_pause(headers):
    """Seconds that Retry-After asks for, as a number or as a date; 0 where it is not there."""
    wanted = headers.get("Retry-After", "")
    if wanted.isdecimal():
        return float(wanted)
    try:
        return max(0.0, parsedate_to_datetime(wanted).timestamp() - time.time())
    except ValueError:
        return 0.0


@contextmanager
def _in_one_line(url, advice):
    try:
        yield
    except Refused as refused:
        (status,) = refused.args
        raise utils.UserError(f"{url}: {REFUSALS[status]} (HTTP status {status}); {advice}") from None


# --- fetching -----------------------------------------------------------------------------------------------------


def fetch(client, remote, path, advice, parts=8, bar=None, checksum=None, stop=None):
    """Fetch a file to `path`, continuing what an earlier call began. bar: utils.progress, counting bytes.

    parts: connections at once. checksum: as of `differs`; None: the ETag, if it is an MD5. A file that changes on the
    server is begun anew. Raises UserError, ending in `advice`, when the server refuses, fails for long, or the download
    does not have its checksum; Stopped when another thread has set `stop`.
    """
    bar = utils.progress(disable=True) if bar is None else bar
    path.parent.mkdir(parents=True, exist_ok=True)
    part, journal_file = _parts_of(path)
    while True:
        with _alone(part, path) as file:
            if file is None:  # another process has fetched it meanwhile
                bar.update(remote.size)
                return
            try:
                journal = Journal(journal_file, remote, file)
                with _in_one_line(remote.url, advice):
                    _fill(client, remote, file, journal, parts, bar, stop)
            except Changed as changed:
                bar.update(-journal.n_bytes())
                (remote,) = changed.args
                part.unlink()
                journal_file.unlink()
                continue
            except OSError as error:
                raise utils.UserError(f"{part}: could not be written ({error.strerror}); make room, or give another "
                                      "--to, and run the same command again, it resumes where it stopped") from None
            if wrong := differs(part, checksum or md5_in(remote.etag)):
                part.unlink()
                journal_file.unlink()
                raise utils.UserError(f"{remote.url}: the file has {wrong}; run the same command again")
            os.replace(part, path)
            journal_file.unlink()
            return


def remaining(path, size):
    """Bytes of a file of `size` that are yet to be fetched to `path`, of those that take room on its disk."""
    part, _ = _parts_of(path)
    return size - (part.stat().st_blocks * 512 if part.exists() else 0)


def _parts_of(path):
    """Where a file lies while it is fetched, and the journal of it."""
    part = path.with_name(f".{path.name}.part")
    return part, part.with_name(part.name + ".json")


@contextmanager
def _alone(part, path):
    """Open the partial file, for this process alone; None if another has completed it while this one waited."""
    is_there = is_done = False
    while not (is_there or is_done):
        with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:  # a disk without locks
                pass
            is_there, is_done = _is_file(file, part), _is_file(file, path)
            if is_there or is_done:
                yield None if is_done else file


def _is_file(file, path):
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


class Journal:
    """Which bytes of a partial file are on the disk, of which version of it; written by one process."""

    def __init__(self, path, remote, file):
        """file: the partial file, open; where it is of another version, nothing of it counts."""
        self.path, self._file, self._lock, self._is_open = path, file, threading.Lock(), True
        self._version = {"url": remote.url, "size": remote.size, "etag": remote.etag}
        kept = _read_journal(path)
        is_ours = kept and os.fstat(file.fileno()).st_size == remote.size and \
            (kept["size"], kept["etag"]) == (remote.size, remote.etag) and \
            (remote.etag is not None or kept["url"] == remote.url)
        self._ranges = kept["ranges"] if is_ours else []
        if not is_ours:
            self._save()
            os.ftruncate(file.fileno(), 0)
            os.ftruncate(file.fileno(), remote.size)

    def add(self, start, end):
        """Note that bytes start..end are written."""
        with self._lock:
            if start == end or not self._is_open:
                return
            os.fsync(self._file.fileno())  # so that the journal is never ahead of the disk
            self._ranges = _merged([*self._ranges, [start, end]])
            self._save()

    def close(self):
        """Let connections that were left behind write no more."""
        with self._lock:
            self._is_open = False

    def lacking(self):
        """List what is not there, [[start, end], ...], in pieces of BLOCK."""
        ends = [0, *(end for _, end in self._ranges)]
        starts = [*(start for start, _ in self._ranges), self._version["size"]]
        return [[at, min(at + BLOCK, stop)] for start, stop in zip(ends, starts, strict=True)
                for at in range(start, stop, BLOCK)]

    def n_bytes(self):
        """How much is there."""
        return sum(end - start for start, end in self._ranges)

    def _save(self):
        save_json(self.path, {**self._version, "ranges": self._ranges})


def _read_journal(path):
    """The journal at a path, {url, size, etag, ranges}; None where there is none that can be read."""
    try:
        kept = json.loads(path.read_text())
        if "blocks" in kept:
            kept["ranges"] = [[start, min(start + OLD_BLOCK, kept["size"])] for start in kept.pop("blocks")]
        kept["ranges"] = _merged([int(start), int(end)] for start, end in kept["ranges"])
        return kept if kept.keys() >= {"url", "size", "etag"} else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _merged(ranges):
    """Ranges [start, end] in ascending order, those that touch made one."""
    merged = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(end, merged[-1][1])
        else:
            merged.append([start, end])
    return merged


def _fill(client, remote, file, journal, parts, bar, stop):
    """Fetch the bytes that are missing."""
    bar.update(journal.n_bytes())
    if remote.has_ranges:
        pieces = journal.lacking()
    else:
        pieces = [[0, remote.size]] if journal.lacking() else []

    def fetch_range(piece, stop):
        _fetch_range(client, remote, file, *piece, journal, bar, stop)

    try:
        in_threads(fetch_range, pieces, parts, stop)
    finally:
        journal.close()


def _fetch_range(client, remote, file, start, end, journal, bar, stop):
    """Bytes start..end of a file, written at their place; resumed after a drop, until another connection fails."""
    at, is_doubtful = start, False

    def go_on():
        nonlocal at, is_doubtful
        if is_doubtful:  # a full answer decides whether the file is another now
            found = _ask(client, remote.url)
            if found != remote:
                is_new = found.has_ranges and found.is_whole(remote)
                raise Changed(found) if is_new else Again(f"another file came, of {found.size} bytes")
            is_doubtful = False
        headers = {"Range": f"bytes={at}-{end - 1}"} if remote.has_ranges else {}
        if not remote.has_ranges:
            bar.update(start - at)
            at = start  # this server can only start over
        with _answer(client, remote.url, headers) as answer:
            is_doubtful = answer.status_code == 416  # the file is shorter now, says whoever answers
            is_part = answer.headers.get("Content-Range", "").startswith(f"bytes {at}-") or not remote.has_ranges
            if _remote_of(remote.url, answer) != remote or not is_part:
                is_doubtful = True
                raise Again("another file came, or another part of it")
            for content in answer.iter_raw():  # as it comes: gathered pieces would be lost in a drop
                if stop.is_set():
                    raise Stopped
                if at + len(content) > end:
                    is_doubtful = True
                    raise Again("more came than was asked for")
                write_at(file, content, at)
                at += len(content)
                bar.update(len(content))
        if at < end:
            raise Again(f"the connection ended at byte {at} of {end}")

    try:
        patiently(go_on, remote.url, stop, lambda: at)
    finally:
        journal.add(start, at)


def write_at(file, content, at):
    """Write all of `content` into a file from byte `at` on."""
    view = memoryview(content)
    while view:
        n = os.pwrite(file.fileno(), view, at)
        view, at = view[n:], at + n


def in_threads(work, tasks, n, stop=None):
    """Call work(task, stop) for each of a list of tasks, n at a time; the first error stops all and is raised.

    An interruption ends it at once: a thread that hears nothing from its server for a minute is left behind. stop: of
    the thread that calls this, for work that it does itself (n = 1).
    """
    if min(n, len(tasks)) <= 1:
        stop = stop or Stop()
        for task in tasks:
            work(task, stop)
        return
    stop, waiting, done = Stop(), queue.SimpleQueue(), queue.SimpleQueue()
    for task in tasks:
        waiting.put(task)

    def run():
        try:
            while not stop.is_set():
                work(waiting.get_nowait(), stop)
                done.put(None)
        except queue.Empty:
            pass
        except BaseException as error:
            done.put(error)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(min(n, len(tasks)))]
    try:
        for thread in threads:
            thread.start()
        for _ in tasks:
            if error := done.get():
                raise error
    except BaseException:
        stop.set()
        until = time.monotonic() + LEAVING
        for thread in threads:
            if thread.ident is not None:  # one that was interrupted before its start is not waited for
                thread.join(max(0, until - time.monotonic()))
        raise


# --- checksums ----------------------------------------------------------------------------------------------------


def md5_in(etag):
    """The checksum of `differs` in an ETag of 32 hexadecimal digits, an MD5: S3's of what was uploaded in one piece."""
    return "md5:" + etag.strip('"') if re.fullmatch(r'"[0-9a-f]{32}"', etag or "") else None


def differs(path, checksum):
    """Say which checksum a file has, and which was wanted; None if it has it, or there is none to compare.

    checksum: 'md5:', 'sha256:' or 'git:' (Git's name of the content) and hexadecimal digits; or None.
    """
    if checksum is None:
        return None
    kind, _, wanted = checksum.partition(":")
    if kind == "git":
        content = path.read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    else:
        found = file_hash(path, kind, None)
    return None if found == wanted else f"{'SHA-256' if kind == 'sha256' else kind.upper()} {found}, wanted {wanted}"
