"""download.py against local servers that stand in for NSD's bucket, COCO and the hub: an empty root becomes a world."""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from huggingface_hub import constants, scan_cache_dir, snapshot_download, try_to_load_from_cache

import check_data
import download
import img2feat
import utils
from disk import transfer
from disk.hub import require_model
from disk.names import Paths
from nsd import sources
from nsd.captions import load_captions, write_captions
from nsd.synthetic import load_synthetic_trials
from nsd.trials import load_trials
from sampling.pipeline import load_pipeline
from web_servers import COMMIT, Site, serve

REPO = Path(__file__).resolve().parent.parent
HUB = f"datasets/{sources.HUB_DATA}"


@pytest.fixture(scope="module")
def world(small_nsd, tmp_path_factory):
    """A small NSD as the servers have it."""
    root = tmp_path_factory.mktemp("servers")
    shutil.copytree(small_nsd.root, root, dirs_exist_ok=True)
    for s in range(3, 9):  # the tests download no other subject's volumes
        shutil.rmtree(root / f"nsddata/ppdata/subj{s:02d}")
    return Paths(root, root / "MindEyeV2/mindeyev2")


def coco_archive(paths):
    """COCO's zip: the captions in two parts, among those of other images."""
    texts = json.loads(paths.captions.read_text())
    annotations = [{"image_id": int(coco_id), "caption": text} for coco_id, captions in texts.items()
                   for text in captions]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for part, rows in (("train", annotations[:700]), ("val", annotations[700:])):
            rows = [*rows, {"image_id": 999_999, "caption": "an image that NSD did not show"}]
            archive.writestr(f"annotations/captions_{part}2017.json", json.dumps({"annotations": rows}))
        archive.writestr("../outside.txt", "not to be unpacked")
    return buffer.getvalue()


def files_under(folder):
    """{path: content}, without hidden files and folders: the hub's client keeps notes in .cache."""
    names = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return {name: file.read_bytes() for name, file in names.items() if not name.startswith(".") and "/." not in name}


def same(found, wanted):
    """Whether two folders are equal; says where they are not (and not with megabytes of bytes)."""
    differing = [name for name in {*found, *wanted} if found.get(name) != wanted.get(name)]
    assert not differing
    return True


@pytest.fixture
def site(world):
    bucket = {f"/{name}": content for name, content in files_under(world.root).items()
              if name.startswith(("nsddata/", "nsddata_betas/", "nsddata_stimuli/")) and "annotations" not in name}
    weights = {name: files_under(REPO / f"demo/models/{folder}") for name, folder in
               ((sources.SD_MODEL, "sd"), (sources.TAESD, "taesd"), (sources.CLIP_MODEL, "clip"),
                (sources.EVAL_CLIP, "clip"))}
    weights[sources.SD_MODEL]["unet/diffusion_pytorch_model.bin"] = b"the same weights once more"
    return Site({**bucket, f"/{sources.COCO_CAPTIONS}": coco_archive(world)},
                {HUB: {**files_under(world.data_path), "evals/all_images.pt": b"not needed"}, **weights})


@pytest.fixture
def ask(site, tmp_path, monkeypatch, capsys):
    """Run download.py, or another script, on an empty root; returns what it prints, or its one line of an error."""
    root, cache = tmp_path / "root", tmp_path / "cache"
    for folder in ("nsddata", "nsddata_stimuli", "MindEyeV2"):
        (root / folder).mkdir(parents=True)

    def script(*flags, wanted=0, main=download.main):
        capsys.readouterr()
        where = ("--nsd_url", script.url, "--coco_url", script.url) if main is download.main else ()
        try:
            status = utils.run_cli(main, ["--root", str(root), *where, *map(str, flags)])
        except SystemExit as stop:
            status = stop.code
        output = capsys.readouterr()
        assert status == wanted, output
        return output.out if wanted != 2 else output.err.strip().splitlines()[-1]

    with serve(site) as url:
        for name, value in {"ENDPOINT": url, "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(cache),
                            "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}"}.items():
            monkeypatch.setattr(constants, name, value)
        script.root, script.url = root, url
        yield script


def test_the_shell_script_hands_on_its_flags_and_the_environment(ask, tmp_path):
    """download.sh, with the knobs a user has: the hub's address and cache, and ROOT."""
    knobs = {"ROOT": str(ask.root), "HF_ENDPOINT": ask.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    command = ["bash", REPO / "scripts/download.sh", "--nsd_url", ask.url, "--coco_url", ask.url, "--subj", "1", "2"]
    done = subprocess.run([*command, "--dry_run"], text=True, env={**os.environ, **knobs}, capture_output=True,
                          check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "to fetch" in done.stdout and f"{ask.root}/MindEyeV2/mindeyev2" in done.stdout
    assert not list(ask.root.rglob("*.*")) and "evals" not in done.stdout


def test_an_empty_disk_becomes_a_world(ask, world, site, monkeypatch):
    ask("--subj", 1, 2)
    hub = {name: content for name, content in files_under(world.data_path).items()
           if not any(f"subj0{other}" in name for other in range(3, 9))}
    assert same(files_under(ask.root / "MindEyeV2/mindeyev2"), hub)
    fetched, wanted = (files_under(root / "nsddata") | files_under(root / "nsddata_stimuli")
                       for root in (ask.root, world.root))
    wanted = {name: content for name, content in wanted.items() if "nsdsynthetic" not in name}  # nobody asked for it
    captions = [json.loads(files.pop("stimuli/nsd/annotations/nsd_captions.json")) for files in (fetched, wanted)]
    assert same(fetched, wanted) and captions[0] == captions[1]
    assert not list(ask.root.rglob("*.part*")) and not list(ask.root.rglob("*.zip"))

    # the doctor finds nothing lacking but what the features script will write
    words, asked = ("--subj", 1, 2, "--feats", "c"), len(site.asked)
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "bash scripts/features.sh" in ask(*words, main=check_data.main, wanted=1)
        ask("--feats", "c", "--num_workers", 0, main=img2feat.main)
        assert "0 fail" in ask(*words, main=check_data.main)
    assert len(site.asked) == asked  # the weights came from the cache

    site.asked.clear()
    assert "to fetch: 0 files, 0 B" in ask("--subj", 1, 2)
    assert not [path for method, path, asked in site.asked if "/resolve/" in path and method == "GET"]


def test_nsd_synthetic_is_fetched_when_it_is_asked_for(ask, world):
    ask("--subj", 1, "--what", "synthetic", "rois")
    there = Paths(ask.root, ask.root / "MindEyeV2/mindeyev2")
    of_others = re.compile(r"subj0[2-8]")
    for folder in ("nsddata/experiments/nsdsynthetic", "nsddata_stimuli/stimuli/nsdsynthetic", "nsddata_betas"):
        wanted = {name: content for name, content in files_under(world.root / folder).items()
                  if not of_others.search(name)}
        assert wanted and same(files_under(ask.root / folder), wanted)
    assert len(load_synthetic_trials(there, "subj01")) == 26


def test_another_disk_is_linked_into_the_root(ask, tmp_path):
    disk = tmp_path / "disk"
    assert "no such folder" in ask("--to", disk, wanted=2)
    disk.mkdir()
    (ask.root / "nsddata/experiments").mkdir()  # a folder that is there already: what it lacks is linked
    ask("--subj", 1, "--to", disk, "--what", "design", "captions", "betas", "trials", "masks")
    paths = Paths(ask.root, ask.root / "MindEyeV2/mindeyev2")
    assert load_trials(paths, "subj01", "train")["session"].nunique() == 5
    assert len(load_captions(paths)) == 240
    assert os.readlink(paths.data_path) == str(disk / "MindEyeV2/mindeyev2")
    assert os.readlink(ask.root / "nsddata/experiments/nsd") == str(disk / "nsddata/experiments/nsd")
    ask("--subj", 1, "--to", disk, "--what", "design", "captions", "betas", "trials", "masks")  # again: nothing changes

    (ask.root / "nsddata_stimuli/stimuli").unlink()
    (ask.root / "nsddata_stimuli/stimuli").write_text("mine")
    assert "already exists, wanted a link" in ask("--to", disk, "--what", "captions", wanted=2)
    assert (ask.root / "nsddata_stimuli/stimuli").read_text() == "mine"


def test_what_is_damaged_is_fetched_again(ask, world):
    what = ("--subj", 1, "--what", "betas", "design", "rois")
    ask(*what)
    betas = ask.root / "MindEyeV2/mindeyev2/betas_all_subj01_fp32_renorm.hdf5"
    table = ask.root / "nsddata/experiments/nsd/nsd_stim_info_merged.csv"
    content, text = betas.read_bytes(), table.read_bytes()
    betas.write_bytes(content[:-100])
    ask(*what)
    assert betas.read_bytes() == content
    betas.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # of the right size
    table.write_bytes(b"?" + text[1:])
    assert "to fetch: 0 files" in ask(*what)
    assert "to fetch: 2 files" in ask(*what, "--verify")
    assert betas.read_bytes() == content and table.read_bytes() == text


# --- interruptions ------------------------------------------------------------------------------------------------

BETAS, BLOCK = "betas_all_subj01_fp32_renorm.hdf5", 40_000
FOREIGN = {  # answers that are no server's of ours
    "busy": (503, {}, ""), "login page": (200, {"Content-Type": "text/html"}, "<html>please log in</html>"),
    "login data": (200, {"Content-Type": "application/json"}, '{"please": "log in"}'),
    "part without ETag": (206, {"Content-Range": "bytes 0-5/6"}, "log in"), "redirected": (302, {"Location": "/"}, "")}


@pytest.fixture
def pauses(site, monkeypatch):
    """Pauses take no time, but move the site's clock on; blocks are small. `.interrupt`: in the next one, Ctrl-C."""
    taken = SimpleNamespace(interrupt=False, longest=0)

    def wait(stop, seconds):
        site.clock, taken.longest = site.clock + seconds, max(taken.longest, seconds)
        if taken.interrupt:
            taken.interrupt = False
            raise KeyboardInterrupt
        return stop.is_set()

    monkeypatch.setattr(transfer.Stop, "wait", wait)
    monkeypatch.setattr(transfer, "BLOCK", BLOCK)
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
    return taken


@pytest.fixture
def sent_twice(site):
    """{file: bytes that were sent more than once}, of files that were sent whole."""
    def count():
        sizes = {name: len(content) for name, content in site.files.items()}
        sizes |= {f"{name}/{file}": len(content) for name, files in site.repositories.items()
                  for file, content in files.items()}
        return {name: n - sizes[name] for name, n in site.sent.items() if n != sizes[name]}
    return count


def test_a_dropped_connection_to_the_hub(ask, site, world, pauses, sent_twice):
    site.drop_after, site.drops = 2_000, 5
    ask("--subj", 1, "--what", "betas")
    assert (ask.root / "MindEyeV2/mindeyev2" / BETAS).read_bytes() == (world.data_path / BETAS).read_bytes()
    assert site.drops == 0 and not sent_twice()


@pytest.mark.parametrize(("kind", "begins"), [
    ("login page", 0), ("busy", 3), ("login data", 5), ("busy", 30), ("part without ETag", 30), ("redirected", 30)])
def test_ten_minutes_of_foreign_answers(ask, site, world, pauses, sent_twice, kind, begins):
    """Of all servers: before the plan, in it, and while files are fetched."""
    site.instead, site.instead_after, site.back_at = FOREIGN[kind], begins, 600
    ask("--subj", 1, "--what", "design", "captions", "betas", "taesd", "--parts", 2)
    assert len(site.asked) > begins + 20 and site.clock >= 600 and pauses.longest == 60
    found, wanted = files_under(ask.root / "MindEyeV2/mindeyev2"), files_under(world.data_path)
    assert same(found, {name: wanted[name] for name in wanted if name in found}) and BETAS in found
    assert isinstance(try_to_load_from_cache(sources.TAESD, "config.json"), str)
    assert all(n <= BLOCK for n in sent_twice().values()) and not list(ask.root.rglob(".*.part*"))


@pytest.mark.parametrize("kind", ["login page", "part without ETag"])
def test_foreign_answers_replace_nothing(ask, site, pauses, monkeypatch, kind):
    """Files that are there, and parts of others, outlast a network that never lets through."""
    monkeypatch.setattr(transfer, "PATIENCE", 200)
    what = ("--subj", 1, "--what", "stimuli", "betas")
    ask(*what)
    betas = ask.root / "MindEyeV2/mindeyev2" / BETAS
    betas.write_bytes(betas.read_bytes()[:-100])
    site.drop_after, pauses.interrupt = 2_000, True
    ask(*what, wanted=130)
    there = {file: file.read_bytes() for file in ask.root.rglob("*") if file.is_file()}
    assert sum(".part" in file.name for file in there) == 2 and len(there) == 4
    site.instead, site.instead_after, site.drop_after = FOREIGN[kind], len(site.asked), None
    for group in ("stimuli", "betas"):
        assert "check the connection" in ask("--subj", 1, "--what", group, wanted=2)
    assert {file: file.read_bytes() for file in ask.root.rglob("*") if file.is_file()} == there
    site.instead = None
    ask(*what)
    assert betas.read_bytes() == site.repositories[HUB][BETAS]


@pytest.mark.parametrize(("group", "block"), [("betas", 5_000), ("sd", 500_000)])
@pytest.mark.parametrize("parts", [1, 3])
def test_an_interrupted_file_of_the_hub_goes_on(ask, site, pauses, sent_twice, tmp_path, monkeypatch, group, block,
                                                parts):
    monkeypatch.setattr(transfer, "BLOCK", block)
    what = ("--subj", 1, "--what", group, "--parts", parts)
    for _ in range(3):
        site.drop_after, site.drops, pauses.interrupt = block - 1000, 1, parts == 1
        with monkeypatch.context() as context:
            if parts > 1:  # the pause is another thread's then
                context.setattr(transfer.Stop, "wait", lambda stop, seconds: signal.raise_signal(signal.SIGINT))
            ask(*what, wanted=130)
        assert list(tmp_path.rglob(".*.part"))
    ask(*what)
    assert all(n <= 3 * parts * block for n in sent_twice().values())
    assert parts > 1 or not sent_twice()
    assert not list(tmp_path.rglob("*.part*")) and not list(tmp_path.rglob("*.incomplete"))


def test_addresses_that_run_out_are_asked_for_anew(ask, site, world, pauses, sent_twice):
    site.run_out = 3
    ask("--subj", 1, "--what", "betas", "taesd")
    assert site.run_out == 0 and not sent_twice()


def test_the_token_is_for_the_hub_alone(ask, site, pauses, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    ask("--subj", 1, "--what", "design", "betas", "taesd")
    told = {path for path, token in site.tokens if token}
    assert {token for _, token in site.tokens} == {None, "Bearer hf_secret"} and site.clock == 0
    assert told and all(path.startswith("/api/") or "/resolve/" in path and "/signed" not in path for path in told)
    assert not [path for path, token in site.tokens if path.startswith("/api/") and not token]


@pytest.mark.parametrize("parts", [1, 4])
def test_small_files_come_many_at_once(ask, site, parts):
    for name in site.repositories[HUB]:
        site.pause[f"{HUB}/{name}"] = 0.1
    ask("--subj", 1, 2, "--what", "trials", "--parts", parts)
    assert site.most_at_once == parts


def test_a_file_that_changed_on_the_hub_starts_anew(ask, site, pauses):
    site.drop_after, pauses.interrupt = 2_000, True
    ask("--subj", 1, "--what", "betas", "--parts", 1, wanted=130)
    site.repositories[HUB][BETAS] = site.repositories[HUB][BETAS][::-1]
    site.drop_after = None
    ask("--subj", 1, "--what", "betas")
    assert (ask.root / "MindEyeV2/mindeyev2" / BETAS).read_bytes() == site.repositories[HUB][BETAS]


def test_what_does_not_have_its_checksum_is_not_kept(ask, site, monkeypatch):
    """As where a proxy alters files."""
    monkeypatch.setattr("web_servers._Handler.entry", staticmethod(lambda file, content: {
        "type": "file", "path": file, "size": len(content), "oid": "1" * 40,
        "lfs": {"oid": "2" * 64, "size": len(content), "pointerSize": 134}}))
    assert f"wanted {'2' * 64}" in ask("--subj", 1, "--what", "betas", wanted=2)
    assert not [file for file in ask.root.rglob("*") if file.is_file()]


def test_weights_lie_in_the_cache_as_the_hubs_client_puts_them(ask, site, tmp_path, monkeypatch):
    ask("--what", "clip", "taesd")
    own = tmp_path / "own"
    for model, patterns in ((sources.CLIP_MODEL, sources.CLIP_FILES), (sources.TAESD, sources.TAESD_FILES)):
        snapshot_download(model, allow_patterns=patterns, cache_dir=own)

    def tree(folder):
        files = [file for file in folder.rglob("*") if file.is_file() and not {"trees", ".locks"} & {*file.parts}]
        return {str(file.relative_to(folder)): (file.read_bytes(), file.is_symlink() and os.readlink(file))
                for file in files}

    assert same(tree(tmp_path / "cache"), tree(own))
    assert not scan_cache_dir(tmp_path / "cache").warnings
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert try_to_load_from_cache(sources.TAESD, "config.json").endswith(f"snapshots/{COMMIT}/config.json")


def test_damaged_weights_are_fetched_again(ask, site):
    ask("--what", "taesd")
    file = Path(try_to_load_from_cache(sources.TAESD, "diffusion_pytorch_model.safetensors"))
    file.resolve().write_bytes(b"?" * file.stat().st_size)
    assert "to fetch: 0 files" in ask("--what", "taesd")
    assert "to fetch: 1 files" in ask("--what", "taesd", "--verify")
    assert file.read_bytes() == site.repositories[sources.TAESD]["diffusion_pytorch_model.safetensors"]


def test_a_full_disk_keeps_what_came(ask, site, pauses, sent_twice, monkeypatch):
    real, taken = os.pwrite, []
    monkeypatch.setattr(transfer, "BLOCK", 10_000)

    def full(descriptor, content, at):
        taken.append(len(content))
        if sum(taken) > 30_000:
            raise OSError(28, "No space left on device")
        return real(descriptor, content, at)

    what = ("--subj", 1, "--what", "betas", "design", "--parts", 2)
    with monkeypatch.context() as disk:
        disk.setattr(os, "pwrite", full)
        assert "No space left on device" in ask(*what, wanted=2)
    ask(*what)
    assert all(n <= 2 * 10_000 for n in sent_twice().values())


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "status", "words"), [
    ("/api/datasets/pscotti/mindeyev2/revision/main", 401, ["datasets/pscotti/mindeyev2", "401", "hf auth login"]),
    ("/api/datasets/pscotti/mindeyev2/revision/main", 403, ["datasets/pscotti/mindeyev2", "403", "accept its terms"]),
    ("/api/datasets/pscotti/mindeyev2/revision/main", 404, ["datasets/pscotti/mindeyev2", "not there", "by hand"]),
    ("/nsddata/experiments/nsd/nsd_expdesign.mat", 403, ["nsd_expdesign.mat", "403", "form"]),
    ("/nsddata/experiments/nsd/nsd_expdesign.mat", 404, ["nsd_expdesign.mat", "404", "form"]),
    (f"/{sources.COCO_CAPTIONS}", 404, ["annotations_trainval2017.zip", "404", "--coco_url"]),
    ("/api/models/CompVis/stable-diffusion-v1-4/revision/main", 401, ["stable-diffusion-v1-4", "hf auth login"]),
])
def test_refusals_say_what_to_do(ask, site, path, status, words):
    site.status[path] = status
    line = ask("--subj", 1, "--what", "design", "captions", "sd", wanted=2)
    assert line.startswith("error: ") and all(word in line for word in words), line
    assert not list(ask.root.rglob("*.*"))


def test_what_the_hub_lost(ask, site):
    del site.repositories[HUB]["shared1000.npy"]
    line = ask("--subj", 1, "--what", "design", wanted=2)
    assert "shared1000.npy is not there any more" in line


def test_a_file_that_only_check_data_reads_may_be_lost(ask, site):
    del site.repositories[HUB]["COCO_73k_subj_indices.hdf5"]
    assert "COCO_73k_subj_indices.hdf5 is not there any more; the plan goes on" in ask("--subj", 1, "--what", "design")
    assert (ask.root / "MindEyeV2/mindeyev2/shared1000.npy").exists()


def test_names_from_the_hub_stay_inside(ask, site, tmp_path):
    site.repositories[HUB]["wds/subj01/train/../../../../../../evil.tar"] = b"evil"
    ask("--subj", 1, "--what", "trials")
    assert not list(tmp_path.rglob("evil*"))


def test_without_network(ask, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = ask("--what", "betas", wanted=2)
    assert "HF_HUB_OFFLINE" in line


@pytest.mark.parametrize("offline", [True, False])
def test_the_plan_without_network_is_of_published_sizes(ask, site, monkeypatch, offline):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    folder = ask.root / "MindEyeV2/mindeyev2"
    folder.mkdir()
    with open(folder / "betas_all_subj01_fp32_renorm.hdf5", "wb") as file:  # of NSD's size, but a hole; with a header
        file.truncate(30000 * 15724 * 4 + 2048)
    said, _, *rows, total = ask("--dry_run").splitlines()
    assert said == "no answer from 127.0.0.1: sizes as published, files under 10 MB not counted"
    rows = {row.split()[0]: row.split()[1:] for row in rows}
    assert list(rows) == sources.DEFAULT_GROUPS and rows["stimuli"][1:3] == ["39.6", "GB"]
    assert rows["betas"][:4] == ["8", "12.3", "GB", "1"] and rows["trials"][:3] == ["300", "3.0", "GB"]
    assert rows["sd"][1:3] == ["4.3", "GB"] and total == "to fetch: 335 files, 59.8 GB"
    assert rows["design"][:6] == ["4", "<", "40", "MB", "0", "<"]  # whose sizes are not known
    assert "to fetch: 42 files, 419.5 MB" in ask("--dry_run", "--subj", 1, "--what", "trials")
    assert {path for _, path, _ in site.asked} == {"/"}


@pytest.mark.parametrize("answers", [True, False])
def test_another_data_sets_files_are_not_the_published_ones(ask, answers):
    """As in the demo's world, whose files have NSD's names."""
    file = ask.root / "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"a small world's")
    flags = () if answers else ("--nsd_url", "http://127.0.0.1:9")
    *_, row, total, said = ask("--dry_run", "--what", "stimuli", *flags).splitlines()
    assert row.split()[4] == "0" and total.startswith("to fetch: 1 files")
    assert said == ("1 of them are there, but are not the published files (cut off, or of another data set), and would "
                    f"be replaced: {file}")


def test_a_proxy_that_never_answers_costs_seconds(ask, monkeypatch):
    """Three servers are asked behind it, at once."""
    monkeypatch.setattr("disk.hub.PATIENCE", 0.3)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as proxy:  # takes connections, says nothing
        for name in ("HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
            monkeypatch.delenv(name.lower(), raising=False)
        monkeypatch.setattr(constants, "ENDPOINT", "http://hub.test")
        started = time.monotonic()
        said = ask("--dry_run", "--nsd_url", "http://nsd.test", "--coco_url", "http://coco.test")
        assert time.monotonic() - started < 2
    assert said.startswith("no answer from hub.test, nsd.test, coco.test: sizes as published")


def test_the_plan_of_servers_that_answer_is_theirs(ask):
    assert "no answer" not in ask("--dry_run", "--what", "stimuli")
    assert "sizes as published" in ask("--dry_run", "--what", "stimuli", "--nsd_url", "http://127.0.0.1:9")


def test_a_full_disk_is_seen_before(ask, site, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    flags = ["--root", str(ask.root), "--nsd_url", ask.url, "--what", "stimuli"]
    assert utils.run_cli(download.main, flags) == 2
    assert "1.0 kB free, wanted" in capsys.readouterr().err
    assert not list(ask.root.rglob("*.*"))


@pytest.mark.parametrize(("flags", "words"), [
    (["--what", "everything"], "--what"), (["--subj", "9"], "'9' is not a subject"), (["--parts", "0"], "--parts 0"),
    (["--to", ".", "--data_path", "."], "--to with --data_path"), (["--root", "nowhere"], "no such folder")])
def test_bad_flags(flags, words, capsys):
    try:
        assert utils.run_cli(download.main, flags) == 2
    except SystemExit as stop:  # argparse's
        assert stop.code == 2
    assert words in capsys.readouterr().err


def test_captions_need_all_images(world, tmp_path):
    copy = Paths(tmp_path, tmp_path)
    shutil.copytree(world.experiments, copy.experiments)
    archive = tmp_path / "coco.zip"
    for content, words in ((b"no zip", "not COCO's captions"), (coco_archive(world)[:-30], "not COCO's captions")):
        archive.write_bytes(content)
        with pytest.raises(utils.UserError, match=words):
            write_captions(copy, archive)
    with zipfile.ZipFile(archive, "w") as parts:
        for part in ("train", "val"):
            parts.writestr(f"annotations/captions_{part}2017.json", json.dumps({"annotations": []}))
    with pytest.raises(utils.UserError, match="no caption of COCO image .* and 239 others"):
        write_captions(copy, archive)
    assert not copy.captions.exists()
    archive.write_bytes(coco_archive(world))
    write_captions(copy, archive)
    assert json.loads(copy.captions.read_text()) == json.loads(world.captions.read_text())


# --- loading what was fetched -------------------------------------------------------------------------------------


@pytest.fixture
def hub(site):
    """The hub, whose Stable Diffusion has parts that no picture needs, as the real one."""
    model = site.repositories[sources.SD_MODEL]
    index = json.loads(model["model_index.json"])
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
              "feature_extractor": ["transformers", "CLIPImageProcessor"]}
    model |= {"model_index.json": json.dumps(index).encode(), "safety_checker/config.json": b"{}",
              "safety_checker/model.safetensors": b"large", "feature_extractor/preprocessor_config.json": b"{}"}
    return model


def fetched(site):
    return {path.split("/resolve/")[1].split("/", 1)[1] for method, path, _ in site.asked if "/resolve/" in path}


def test_stable_diffusion_loads_from_the_hub_without_what_is_not_used(ask, site, hub):
    pipe = load_pipeline(sources.SD_MODEL, torch.device("cpu"))
    assert pipe.unet.config.in_channels == 4
    assert fetched(site) == {name for name in hub if name.split("/")[0] not in ("safety_checker", "feature_extractor")
                             and not name.endswith(".bin")}
    asked = len(site.asked)
    load_pipeline(sources.SD_MODEL, torch.device("cpu"))
    assert len(site.asked) == asked  # what is there is not asked for again


def test_stable_diffusion_that_is_interrupted_goes_on(ask, site, hub, pauses, sent_twice, tmp_path, monkeypatch):
    """Without download.py, too: recon.py fetches what is not there."""
    monkeypatch.setattr(transfer, "BLOCK", 300_000)
    site.drop_after, pauses.interrupt = 250_000, True
    with pytest.raises(KeyboardInterrupt):
        load_pipeline(sources.SD_MODEL, torch.device("cpu"))
    site.drop_after = None
    assert load_pipeline(sources.SD_MODEL, torch.device("cpu")).vae is not None
    assert all(n <= 8 * 300_000 for n in sent_twice().values()) and not list(tmp_path.rglob("*.part*"))


def test_one_network_that_is_interrupted_goes_on(ask, site, hub, pauses, sent_twice, tmp_path, monkeypatch):
    """CLIP, where recon.py, evaluate.py or img2feat.py find that it is not there."""
    clip = site.repositories[sources.CLIP_MODEL]
    clip["pytorch_model.bin"] = b"the same weights, as a pickle"
    monkeypatch.setattr(transfer, "BLOCK", 300_000)
    site.drop_after, pauses.interrupt = 250_000, True
    with pytest.raises(KeyboardInterrupt):
        require_model(sources.CLIP_MODEL, "--clip_model", "")
    site.drop_after = None
    require_model(sources.CLIP_MODEL, "--clip_model", "")
    assert "pytorch_model.bin" not in fetched(site) and not list(tmp_path.rglob("*.part*"))
    assert all(n <= 8 * 300_000 for n in sent_twice().values())
    (weights,) = (tmp_path / "cache").rglob("model.safetensors")
    assert weights.read_bytes() == clip["model.safetensors"]
    asked = len(site.asked)
    require_model(sources.CLIP_MODEL, "--clip_model", "")
    assert len(site.asked) == asked


def test_a_repository_of_pickles_alone_loads_too(ask, site, hub):
    """Older models have no safetensors; an interrupted download of the others is completed."""
    unet, _ = files_under(REPO / "demo/models/sd"), hub.pop("unet/diffusion_pytorch_model.safetensors")
    weights = safetensors.torch.load(unet["unet/diffusion_pytorch_model.safetensors"])
    torch.save(weights, buffer := io.BytesIO())
    hub["unet/diffusion_pytorch_model.bin"] = buffer.getvalue()
    pipe = load_pipeline(sources.SD_MODEL, torch.device("cpu"))
    assert torch.equal(pipe.unet.conv_in.bias, weights["conv_in.bias"].float())
    assert "vae/diffusion_pytorch_model.bin" not in fetched(site)


@pytest.mark.parametrize("tree", ["with", "without"])
def test_what_download_fetched_is_found_offline(ask, hub, tmp_path, monkeypatch, tree):
    """With and without the list of the repository's files that the hub's client keeps."""
    ask("--what", "sd")
    if tree == "with":
        snapshot_download(sources.SD_MODEL, allow_patterns=["model_index.json"])
    assert bool(list((tmp_path / "cache").rglob("trees"))) == (tree == "with")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert load_pipeline(sources.SD_MODEL, torch.device("cpu")).vae is not None
    (weights,) = (tmp_path / "cache").rglob("unet/*.safetensors")
    weights.unlink()  # of an interrupted download
    with pytest.raises(utils.UserError, match="--sd_model .* could not be loaded"):
        load_pipeline(sources.SD_MODEL, torch.device("cpu"))
