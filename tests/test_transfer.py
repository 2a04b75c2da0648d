"""disk/transfer.py against a local server that drops, pauses, lies about sizes and changes its files."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from email.utils import formatdate

import pytest

import utils
from disk import transfer
from web_servers import Site, serve

CONTENT = random.Random(0).randbytes(1_000_000)
BLOCK = 64_000
DATE = {"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
FOREIGN = {  # answers that are not about the file, whoever gives them
    "a busy server": (503, {}, ""),
    "a server that wants to be left alone": (503, {"Retry-After": "100"}, ""),
    "too many requests": (429, {}, ""),
    "a login page": (200, {"Content-Type": "text/html; charset=utf-8", **DATE}, "<html>please log in</html>"),
    "a login page of no type": (200, {"Content-Type": "application/octet-stream"}, "please log in"),
    "a file of another server": (200, DATE, "please log in"),
    "a part without ETag": (206, {"Content-Range": "bytes 0-5/6"}, "log in"),
    "a part of the right size without ETag": (206, {"Content-Range": f"bytes 0-5/{len(CONTENT)}"}, "log in"),
    "a redirection without end": (302, {"Location": "/login"}, ""),
    "a range that is refused": (416, {"Content-Range": "bytes */6"}, ""),
}


@pytest.fixture
def site():
    return Site({"/a/file.bin": CONTENT})


@pytest.fixture
def real_pauses():
    return transfer.Stop.wait


@pytest.fixture(autouse=True)
def pauses(site, real_pauses, monkeypatch):
    """Pauses take no time, but move the site's clock on; the list of them."""
    taken = []

    def wait(stop, seconds):
        taken.append(seconds)
        site.clock += seconds
        return stop.is_set()

    monkeypatch.setattr(transfer, "BLOCK", BLOCK)
    monkeypatch.setattr(transfer.Stop, "wait", wait)
    return taken


class When:
    """A bar that does something when so many bytes have come."""

    def __init__(self, n, action):
        self.left, self.action, self.lock = n, action, threading.Lock()

    def update(self, n):
        with self.lock:
            is_now = self.left > 0 >= self.left - n
            self.left -= n
        if is_now:
            self.action()


@pytest.fixture
def fetch(site, tmp_path):
    """Fetch the file; returns its path."""
    path = tmp_path / "here/file.bin"
    with serve(site) as url, transfer.connect() as client:
        def run(parts=4, bar=None):
            remote = transfer.probe(client, f"{url}/a/file.bin", "ask them", path)
            transfer.fetch(client, remote, path, "ask them", parts, bar)
            return path
        run.url, run.client, run.path = f"{url}/a/file.bin", client, path
        yield run


@pytest.fixture
def stop_at(site, fetch):
    """Fetch, and let the file be refused when so many bytes have come."""
    def run(n, parts=1):
        with pytest.raises(utils.UserError, match="is refused"):
            fetch(parts, When(n, lambda: site.status.update({"/a/file.bin": 403})))
        del site.status["/a/file.bin"]
    return run


def leftovers(fetch):
    return sorted(file.name for file in fetch.path.parent.iterdir() if file.name != "file.bin")


def sent(site):
    return site.sent["/a/file.bin"]


def test_a_file_comes_in_parallel_parts(site, fetch):
    assert fetch().read_bytes() == CONTENT and not leftovers(fetch)
    wanted = {f"bytes={start}-{min(start + BLOCK, len(CONTENT)) - 1}" for start in range(0, len(CONTENT), BLOCK)}
    assert set(site.bodies_of("/a/file.bin")) == wanted and sent(site) == len(CONTENT)


def test_a_server_without_ranges(site, fetch):
    site.has_ranges = False
    assert fetch().read_bytes() == CONTENT


def test_an_empty_file_and_one_of_a_block(site, fetch):
    for content in (CONTENT[:BLOCK], CONTENT[:1]):
        site.files["/a/file.bin"] = content
        assert fetch().read_bytes() == content
        fetch.path.unlink()


@pytest.mark.parametrize("has_ranges", [True, False])
def test_dropped_connections(site, fetch, has_ranges):
    site.has_ranges, site.drop_after, site.drops = has_ranges, 20_000, 40 if has_ranges else 3
    assert fetch().read_bytes() == CONTENT
    assert site.drops == 0 and (not has_ranges or sent(site) == len(CONTENT))  # what came before a drop is kept


def test_a_connection_on_which_nothing_comes(site, fetch, pauses, monkeypatch):
    monkeypatch.setattr(fetch.client, "timeout", transfer.httpx.Timeout(5, read=0.05))
    monkeypatch.setattr(transfer, "PATIENCE", 10)
    remote = transfer.probe(fetch.client, fetch.url, "ask them")
    site.pause["/a/file.bin"] = 0.2
    with pytest.raises(utils.UserError, match="asked for 0 minutes; check the connection"):
        transfer.fetch(fetch.client, remote, fetch.path, "ask them", 1)
    assert pauses == [1, 2, 4]
    site.pause.clear()
    assert fetch().read_bytes() == CONTENT


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("parts", [1, 4])
def test_ten_minutes_of_foreign_answers(site, fetch, pauses, kind, parts):
    """In the middle of a file: nothing that is there is lost, nothing is fetched again but the last blocks."""
    def begin():
        site.instead, site.back_at = FOREIGN[kind], site.clock + 600

    assert fetch(parts, When(300_000, begin)).read_bytes() == CONTENT and not leftovers(fetch)
    assert sent(site) <= len(CONTENT) + parts * BLOCK
    assert site.clock >= 600 and max(pauses) == (100 if "Retry-After" in FOREIGN[kind][1] else 60)
    if parts == 1 and max(pauses) == 60:
        assert pauses[:8] == [1, 2, 4, 8, 16, 32, 60, 60]


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_answers_when_it_is_begun_again(site, fetch, stop_at, kind):
    stop_at(900_000)
    kept = {name: (fetch.path.parent / name).read_bytes() for name in leftovers(fetch)}
    site.instead = FOREIGN[kind]
    with pytest.raises(utils.UserError, match="asked for .* minutes"):  # they do not end
        fetch()
    assert {name: (fetch.path.parent / name).read_bytes() for name in leftovers(fetch)} == kept
    site.back_at = site.clock + 600
    assert fetch().read_bytes() == CONTENT
    assert sent(site) <= len(CONTENT) + BLOCK


@pytest.mark.parametrize("kind", [kind for kind in FOREIGN if "right size" not in kind])
def test_foreign_answers_replace_no_whole_file(site, fetch, kind):
    fetch()
    site.instead = FOREIGN[kind]
    with pytest.raises(utils.UserError, match="asked for .* minutes"):
        fetch()
    assert fetch.path.read_bytes() == CONTENT


def test_a_login_page_is_no_file_when_nothing_is_there(site, fetch):
    for kind in ("a login page", "a login page of no type"):
        site.instead, site.back_at = FOREIGN[kind], site.clock + 600
        assert fetch().read_bytes() == CONTENT
        fetch.path.unlink()


def test_what_a_server_asks_for_is_obeyed(site, fetch, pauses, monkeypatch):
    site.instead, site.back_at = (503, {"Retry-After": "600"}, ""), 600
    fetch()
    assert pauses == [600]
    monkeypatch.setattr(transfer.time, "time", lambda: 1_000_000)
    site.instead, site.back_at = (503, {"Retry-After": formatdate(1_000_100, usegmt=True)}, ""), site.clock + 50
    fetch()
    assert pauses[1:] == [100]
    site.instead, site.back_at = (503, {"Retry-After": "7200"}, ""), float("inf")
    with pytest.raises(utils.UserError, match="HTTP status 503, wants to be left alone for 7200 s"):
        fetch()
    assert len(pauses) == 2


def test_the_user_is_told_once_in_a_while(site, fetch, capsys):
    site.instead, site.back_at = (503, {}, ""), 600
    fetch()
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"{fetch.url}: HTTP status 503; asked again in 4 s (Ctrl-C stops, the same command resumes)"


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("where", ["in a pause", "while nothing comes"])
def test_ctrl_c_ends_it_at_once(site, fetch, stop_at, real_pauses, monkeypatch, where, parts):
    """And what is there is kept, connections that are left behind touch it no more."""
    monkeypatch.setattr(transfer.Stop, "wait", real_pauses)
    monkeypatch.setattr(transfer, "PAUSE", 30)
    stop_at(500_000)
    remote = transfer.probe(fetch.client, fetch.url, "ask them")
    if where == "in a pause":
        monkeypatch.setattr(transfer, "LEAVING", 9)  # which it does not take
        site.busy["/a/file.bin"] = 8
    else:
        site.pause["/a/file.bin"] = 5
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    started = time.monotonic()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        transfer.fetch(fetch.client, remote, fetch.path, "ask them", parts)
    assert time.monotonic() - started < 3
    site.pause.clear()
    site.busy.clear()
    assert fetch().read_bytes() == CONTENT and not leftovers(fetch)
    assert sent(site) <= len(CONTENT) + 5 * BLOCK


def test_a_killed_fetch_goes_on(site, tmp_path):
    """SIGKILL in the middle: the blocks that were whole are kept."""
    target, program = tmp_path / "file.bin", """
import sys
from pathlib import Path
from disk import transfer
transfer.BLOCK = 64_000
with transfer.connect() as client:
    target = Path(sys.argv[2])
    remote = transfer.probe(client, sys.argv[1], "", target)
    transfer.fetch(client, remote, target, "", 2)
"""
    journal = tmp_path / ".file.bin.part.json"
    site.pause["/a/file.bin"] = 0.05
    with serve(site) as url:
        command = [sys.executable, "-c", program, f"{url}/a/file.bin", str(target)]
        environment = {**os.environ, "PYTHONPATH": str(utils.REPOSITORY / "src")}
        process = subprocess.Popen(command, env=environment)
        while sent(site) < 300_000:
            time.sleep(0.01)
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not target.exists() and journal.exists()
        site.pause.clear()
        subprocess.run(command, env=environment, check=True)
    assert target.read_bytes() == CONTENT
    assert sent(site) <= len(CONTENT) + 2 * BLOCK


@pytest.mark.parametrize("parts", [1, 4])
def test_what_was_fetched_is_not_fetched_again(site, fetch, stop_at, parts):
    stop_at(300_000, parts)
    assert not fetch.path.exists()
    assert fetch().read_bytes() == CONTENT and not leftovers(fetch)
    assert sent(site) <= len(CONTENT) + parts * BLOCK


@pytest.mark.parametrize("block", [10_000, 1_000_000, 77_777])
def test_a_journal_holds_whatever_a_block_is(site, fetch, stop_at, monkeypatch, block):
    stop_at(500_000)
    monkeypatch.setattr(transfer, "BLOCK", block)
    assert fetch().read_bytes() == CONTENT
    assert sent(site) <= len(CONTENT) + BLOCK


def test_a_journal_from_before_blocks_had_a_size(site, fetch, monkeypatch):
    monkeypatch.setattr(transfer, "OLD_BLOCK", 300_000)
    fetch.path.parent.mkdir()
    part, journal = (fetch.path.with_name(name) for name in (".file.bin.part", ".file.bin.part.json"))
    part.write_bytes(bytes(300_000) + CONTENT[300_000:600_000] + bytes(300_000) + CONTENT[900_000:])
    journal.write_text(json.dumps({"url": fetch.url, "size": len(CONTENT), "etag": site.etag(CONTENT),
                                   "blocks": [300_000, 900_000]}))
    assert fetch().read_bytes() == CONTENT
    assert sent(site) == 600_000


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"blocks": 3}', '{"ranges": [[1]], "size": 1, "etag": ""}'])
def test_a_journal_that_says_nothing_counts_for_nothing(site, fetch, stop_at, text):
    stop_at(500_000)
    fetch.path.with_name(".file.bin.part.json").write_text(text)
    assert fetch().read_bytes() == CONTENT


def test_two_who_fetch_the_same_file(site, fetch):
    """One waits, and finds it there."""
    site.pause["/a/file.bin"] = 0.02
    both = [threading.Thread(target=fetch, args=(1,)) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert fetch.path.read_bytes() == CONTENT and not leftovers(fetch) and sent(site) == len(CONTENT)


@pytest.mark.parametrize(("new", "has_etags"), [
    (CONTENT[::-1] + b"more", True), (CONTENT[:-500], True), (CONTENT[::-1], True), (CONTENT[::-1] + b"more", False)])
def test_a_file_that_changed_since_starts_anew(site, fetch, stop_at, has_etags, new):
    site.has_etags = has_etags
    stop_at(500_000)
    site.files["/a/file.bin"] = new
    assert fetch().read_bytes() == new and not leftovers(fetch)


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("new", [CONTENT[::-1] + b"more", CONTENT[:400_000], CONTENT[::-1]])
def test_a_file_that_changes_meanwhile_starts_anew(site, fetch, new, parts):
    assert fetch(parts, When(500_000, lambda: site.files.update({"/a/file.bin": new}))).read_bytes() == new
    assert not leftovers(fetch)


def test_a_wrong_size_is_refused(site, fetch):
    site.claimed_size["/a/file.bin"] = len(CONTENT) + 10
    with pytest.raises(utils.UserError, match="after|asked for"):
        fetch()
    assert not fetch.path.exists()


def test_wrong_bytes_do_not_have_the_md5(site, fetch):
    etag = site.etag(CONTENT)
    site.etag = lambda content: etag
    site.files["/a/file.bin"] = CONTENT[:-1] + b"?"
    with pytest.raises(utils.UserError, match=f"has MD5 .* wanted {etag[1:-1]}"):
        fetch()
    assert not leftovers(fetch) and not fetch.path.exists()


def test_an_etag_that_is_no_md5_is_not_taken_for_one(site, fetch):
    site.etag = lambda content: '"0123456789abcdef0123456789abcdef-77"'
    assert fetch().read_bytes() == CONTENT


@pytest.mark.parametrize(("checksum", "fits"), [
    ("md5:b1946ac92492d2347c6235b4d2611184", True), ("git:ce013625030ba8dba906f756967f9e9ca394464a", True),
    ("sha256:5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03", True), (None, True),
    ("git:e69de29bb2d1d6434b8b29ae775ad8c2e48c5391", False)])
def test_checksums(tmp_path, checksum, fits):
    """Of `hello` and a line feed, as md5sum, sha256sum and git hash-object print them."""
    (tmp_path / "file").write_bytes(b"hello\n")
    assert (transfer.differs(tmp_path / "file", checksum) is None) == fits


@pytest.mark.parametrize(("status", "words"), [(401, "without a login"), (403, "refused"), (404, "not there")])
def test_refusals_are_one_line_at_once(site, fetch, status, words):
    site.status["/a/file.bin"] = status
    with pytest.raises(utils.UserError, match=rf"file.bin: .*{words}.*\(HTTP status {status}\); ask them"):
        fetch()
    assert len(site.asked) == 1


def test_no_server_and_no_address(tmp_path, pauses):
    with serve(Site()) as url, transfer.connect() as client:
        pass
    with transfer.connect() as client:
        with pytest.raises(utils.UserError, match="asked for .* minutes; check the connection"):
            transfer.probe(client, f"{url}/a/file.bin", "ask them")
        assert 25 * 60 < sum(pauses) <= transfer.PATIENCE == 30 * 60
        with pytest.raises(utils.UserError, match="is no address"):
            transfer.probe(client, "naturalscenesdataset.org/a", "ask them")


@pytest.mark.parametrize("parts", [1, 4])
def test_a_full_disk_keeps_what_came(site, fetch, monkeypatch, parts):
    real, written = os.pwrite, []

    def full(descriptor, content, at):
        if sum(written) > 300_000:
            raise OSError(28, "No space left on device")
        written.append(len(content))
        return real(descriptor, content, at)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(utils.UserError, match=r"\.part: could not be written \(No space left on device\)"):
        fetch(parts)
    monkeypatch.setattr(os, "pwrite", real)
    assert fetch().read_bytes() == CONTENT
    assert sent(site) <= len(CONTENT) + parts * BLOCK


def test_a_disk_that_takes_less_than_it_is_given(site, fetch, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, content, at: real(descriptor, content[:1000], at))
    assert fetch().read_bytes() == CONTENT
