"""The ledger of reproductions: docs/ledger.md is what its script writes, and a value that is off is said."""

import json
import sys
from pathlib import Path

import pytest

import utils
from disk.files import save_json
from evaluation.published import FURTHER, METRICS, NSD_IMAGES

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import ledger

(MINDEYE2,) = (row for row in FURTHER if row.subjects == "1")


def evaluated(folder, stimuli=NSD_IMAGES, **changed):
    """What evaluate.py leaves behind of pictures with the published values of MindEye2's subject 1."""
    values = dict(zip(METRICS, MINDEYE2.values, strict=True)) | changed
    save_json(folder / "metrics.json", {name: {"value": value / 100 if "two_way" in name else value, "n": 1000}
                                        for name, value in values.items()})
    save_json(folder / "metrics_config.json", {"git_commit": "0123456789abcdef", "stimuli": stimuli, "options": {}})
    save_json(folder / "config.json", {"subj": "subj01", "num_sessions": 40})
    return folder


def add(folder, docs, *words):
    return utils.run_cli(ledger.main, ["--add", str(folder), "--docs", str(docs), *words])


def test_the_page_is_what_the_script_writes(tmp_path):
    kept = ledger.DOCS / "ledger.json"
    found = json.loads(kept.read_text()) if kept.exists() else []
    assert (ledger.DOCS / "ledger.md").read_text() == ledger.page_of(found)


def test_an_evaluation_is_added_once_and_stands_beside_the_published_row(tmp_path):
    folder = evaluated(tmp_path / "pictures")
    for _ in range(2):
        assert add(folder, tmp_path, "--method", MINDEYE2.method, "--reproduces", "--by", "bash scripts/recon.sh") == 0
    (entry,) = json.loads((tmp_path / "ledger.json").read_text())
    assert entry["values"] == list(MINDEYE2.values) and entry["versions"]["torch"]
    page = (tmp_path / "ledger.md").read_text()
    (row,) = (line for line in page.splitlines() if "| commit 0123456789ab |" in line)
    assert MINDEYE2.source in row and ledger.NOBODY not in page and "`bash scripts/recon.sh`" in page


@pytest.mark.parametrize(("changed", "words", "said"), [
    ({"pixcorr": 0.380}, ("--method", MINDEYE2.method, "--reproduces"), "pixcorr: 0.38, published 0.374"),
    ({"clip_two_way": 94.4}, ("--method", MINDEYE2.method, "--reproduces"), "clip_two_way: 94.4, published 93.7"),
    ({"stimuli": 7300}, ("--method", MINDEYE2.method, "--reproduces"), "a world of 7300 stimuli, wanted NSD's 73000"),
    ({}, ("--method", "nobody's", "--reproduces"), "nothing was published of \"nobody's\""),
    ({}, (), "--add without --method"),
])
def test_what_is_not_as_published_is_said(tmp_path, capsys, changed, words, said):
    assert add(evaluated(tmp_path / "pictures", **changed), tmp_path, *words) == 2
    assert said in capsys.readouterr().err


def test_another_world_is_never_beside_the_published_rows(tmp_path):
    assert add(evaluated(tmp_path / "pictures", stimuli=7300), tmp_path, "--method", MINDEYE2.method) == 0
    page = (tmp_path / "ledger.md").read_text()
    assert "7300 stimuli: not comparable" in page and ledger.NOBODY in page and "| commit 0" not in page
