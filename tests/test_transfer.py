"""nsd/transfer.py against a local server that drops, pauses, lies about sizes and changes its files."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

import utils
from nsd import transfer
from web_servers import Site, serve

CONTENT = random.Random(0).randbytes(1_000_000)
BLOCK = 64_000


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(transfer, "BLOCK", BLOCK)
    monkeypatch.setattr(transfer, "PAUSE", 0.001)


@pytest.fixture
def site():
    return Site({"/a/file.bin": CONTENT})


@pytest.fixture
def fetch(site, tmp_path):
    """Fetch the file; returns its path."""
    with serve(site) as url, transfer.connect() as client:
        def run(parts=4):
            remote = transfer.probe(client, f"{url}/a/file.bin", "ask them")
            transfer.fetch(client, remote, tmp_path / "here/file.bin", "ask them", parts)
            return tmp_path / "here/file.bin"
        yield run


def leftovers(tmp_path):
    return [file for file in (tmp_path / "here").iterdir() if file.name != "file.bin"]


def test_a_file_comes_in_parallel_parts(site, fetch, tmp_path):
    assert fetch().read_bytes() == CONTENT and not leftovers(tmp_path)
    wanted = {f"bytes={start}-{min(start + BLOCK, len(CONTENT)) - 1}" for start in range(0, len(CONTENT), BLOCK)}
    assert set(site.bodies_of("/a/file.bin")) == wanted


def test_a_server_without_ranges(site, fetch):
    site.has_ranges = False
    assert fetch().read_bytes() == CONTENT


def test_an_empty_file_and_one_of_a_block(site, fetch):
    for content in (CONTENT[:BLOCK], CONTENT[:1]):
        site.files["/a/file.bin"] = content
        assert fetch().read_bytes() == content


@pytest.mark.parametrize("has_ranges", [True, False])
def test_dropped_connections(site, fetch, has_ranges):
    site.has_ranges, site.drop_after, site.drops = has_ranges, 20_000, 40 if has_ranges else 3
    assert fetch().read_bytes() == CONTENT
    assert site.drops == 0


def test_a_busy_server_and_a_silent_one(site, fetch, monkeypatch):
    monkeypatch.setattr(transfer, "TIMEOUT", transfer.httpx.Timeout(5, read=0.2))
    site.busy["/a/file.bin"] = 3
    assert fetch().read_bytes() == CONTENT


def test_a_connection_on_which_nothing_comes(site, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "TIMEOUT", transfer.httpx.Timeout(5, read=0.1))
    monkeypatch.setattr(transfer, "TRIES", 2)
    site.pause["/a/file.bin"] = 0.5
    with serve(site) as url, transfer.connect() as client:
        remote = transfer.probe(client, f"{url}/a/file.bin", "ask them")
        with pytest.raises(utils.UserError, match="after 2 tries; check the connection"):
            transfer.fetch(client, remote, tmp_path / "file.bin", "ask them")
        site.pause.clear()
        transfer.fetch(client, remote, tmp_path / "file.bin", "ask them")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_what_was_fetched_is_not_fetched_again(site, fetch, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "TRIES", 1)
    site.drop_after, site.drops = 20_000, 1
    with pytest.raises(utils.UserError, match="resumes where it stopped"):
        fetch(parts=1)
    assert not (tmp_path / "here/file.bin").exists()
    site.asked.clear()
    site.drop_after = None
    site.status["/a/file.bin"] = 403
    with pytest.raises(utils.UserError, match=r"is refused \(HTTP status 403\); ask them"):
        fetch()
    del site.status["/a/file.bin"]
    assert fetch().read_bytes() == CONTENT and not leftovers(tmp_path)


def test_a_killed_fetch_goes_on(site, tmp_path):
    """SIGKILL in the middle: the blocks that were whole are kept."""
    target, program = tmp_path / "file.bin", """
import sys
from pathlib import Path
from nsd import transfer
transfer.BLOCK = 64_000
with transfer.connect() as client:
    remote = transfer.probe(client, sys.argv[1], "")
    transfer.fetch(client, remote, Path(sys.argv[2]), "", 1)
"""
    part = tmp_path / ".file.bin.part.json"
    site.pause["/a/file.bin"] = 0.05
    with serve(site) as url:
        command = [sys.executable, "-c", program, f"{url}/a/file.bin", str(target)]
        environment = {**os.environ, "PYTHONPATH": str(utils.REPOSITORY / "src")}
        process = subprocess.Popen(command, env=environment)
        while not (part.exists() and part.read_text().count("000") > 3):
            time.sleep(0.01)
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not target.exists()
        site.pause.clear()
        site.asked.clear()
        subprocess.run(command, env=environment, check=True)
    assert target.read_bytes() == CONTENT
    again = site.bodies_of("/a/file.bin")
    assert 0 < len(again) < len(CONTENT) // BLOCK and "bytes=0-63999" not in again


@pytest.mark.parametrize("has_etags", [True, False])
def test_a_file_that_changed_since_starts_anew(site, fetch, monkeypatch, has_etags):
    site.has_etags = has_etags
    monkeypatch.setattr(transfer, "TRIES", 1)
    site.drop_after, site.drops = 20_000, 1
    with pytest.raises(utils.UserError):
        fetch(parts=1)
    site.files["/a/file.bin"] = CONTENT[::-1] + b"more"
    site.drop_after = None
    assert fetch().read_bytes() == CONTENT[::-1] + b"more"


def test_a_file_that_changes_meanwhile_is_refused(site, tmp_path):
    with serve(site) as url, transfer.connect() as client:
        remote = transfer.probe(client, f"{url}/a/file.bin", "ask them")
        site.files["/a/file.bin"] = CONTENT[::-1]
        with pytest.raises(utils.UserError, match="changed on the server"):
            transfer.fetch(client, remote, tmp_path / "file.bin", "ask them")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_size_is_refused(site, fetch, tmp_path):
    site.claimed_size["/a/file.bin"] = len(CONTENT) + 10
    with pytest.raises(utils.UserError, match="shorter than before|changed|after"):
        fetch()
    assert not (tmp_path / "here/file.bin").exists()


def test_wrong_bytes_do_not_have_the_md5(site, tmp_path):
    with serve(site) as url, transfer.connect() as client:
        remote = transfer.probe(client, f"{url}/a/file.bin", "ask them")
        site.etag = lambda content: remote.etag
        site.files["/a/file.bin"] = CONTENT[:-1] + b"?"
        with pytest.raises(utils.UserError, match="has MD5 .* wanted"):
            transfer.fetch(client, remote, tmp_path / "file.bin", "ask them")
        site.etag_prefix = "2-"
    assert list(tmp_path.iterdir()) == []


def test_an_etag_that_is_no_md5_is_not_taken_for_one(site, fetch):
    site.etag = lambda content: '"0123456789abcdef0123456789abcdef-77"'
    assert fetch().read_bytes() == CONTENT


@pytest.mark.parametrize(("status", "words"), [(401, "without a login"), (403, "refused"), (404, "not there")])
def test_refusals_are_one_line_at_once(site, fetch, status, words):
    site.status["/a/file.bin"] = status
    with pytest.raises(utils.UserError, match=rf"file.bin: .*{words}.*\(HTTP status {status}\); ask them"):
        fetch()
    assert len(site.asked) == 1


def test_no_server(tmp_path):
    with serve(Site()) as url, transfer.connect() as client:
        pass
    with transfer.connect() as client, pytest.raises(utils.UserError, match="check the connection"):
        transfer.probe(client, f"{url}/a/file.bin", "ask them")


def test_a_full_disk_keeps_what_came(site, fetch, tmp_path, monkeypatch):
    real, written = os.pwrite, []

    def full(descriptor, content, at):
        if sum(written) > 300_000:
            raise OSError(28, "No space left on device")
        written.append(len(content))
        return real(descriptor, content, at)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(utils.UserError, match=r"\.part: could not be written \(No space left on device\)"):
        fetch()
    monkeypatch.setattr(os, "pwrite", real)
    site.asked.clear()
    assert fetch().read_bytes() == CONTENT
    assert len(site.bodies_of("/a/file.bin")) < len(CONTENT) // BLOCK
