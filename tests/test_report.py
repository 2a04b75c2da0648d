"""The report: what its page says, that it needs nothing from elsewhere, and that it works in a browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from disk.files import save_json
from disk.names import Paths, run_name
from evaluation import report
from evaluation.measuring import Findings, Measured
from evaluation.picture_sets import PictureSet
from sampling.folders import ImageSet

IDS = [3, 20, 7000]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
BROWSER = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
           "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
           "--virtual-time-budget=4000"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report of three images, a compared set and a control; returns its folder."""
    folder = tmp_path_factory.mktemp("report")
    paths = Paths(folder, folder)
    rng = np.random.default_rng(0)
    per_image = {"pixcorr": np.array([0.5, 0.9, 0.1]), "ssim": np.array([0.2, 0.3, np.nan]),
                 "clip_median_rank": np.array([1.0, 3.0, 2.0]), "brain_correlation_V1": np.array([0.1, 0.2, 0.3])}
    measured = {"reconstructed": Measured(per_image, {}, 0),
                "other </script><b>": Measured({name: values / 2 for name, values in per_image.items()}, {}, 0),
                "control: mean image": Measured({"pixcorr": np.zeros(3)}, {}, 0)}
    measured["reconstructed"].results["alexnet2_two_way"] = {"value": None, "ci_low": None, "ci_high": None, "n": 0,
                                                             "missing": "No module named 'torchvision'"}
    stack = rng.integers(0, 256, (3, 300, 300, 3), np.uint8)
    sets = {label: PictureSet(label, IDS, lambda i, k: stack[i]) for label in ("seen", *measured)}
    differences = {"other </script><b>": {"pixcorr": {"value": 0.25, "ci_low": 0.05, "ci_high": 0.45, "n": 3}}}
    recon_config = {"run": "finetune", "subj": "subj01", "hidden_dim": 8, "num_sessions": 3, "tag": "",
                    "feats": ["g_2"], "z": "none", "head": None, "control": None, "test_split": "new_test",
                    "repeats": "mean", "score_hashes": {"c": "abc123", "ids": "1"}}
    name = run_name("finetune", "subj01", "c", 8, 3)
    save_json(paths.scores("subj01", name, "c") / "config.json", {"checkpoint_sha256": "feedbeef"})
    run = paths.run(run_name("finetune", "subj01", "c", 8, 3))
    run.mkdir(parents=True)
    lines = (json.dumps({"step": step, "train/loss": 3 - step, "val/loss": 2.5}) for step in (1, 2))
    (run / "metrics.jsonl").write_text("\n".join(lines))
    config = {"protocol": "mindeye2", "images": "x", "n_samples": 1, "git_commit": "0123456789abcdef",
              "stimuli": 50, "options": {"method": "m"},
              "brain_correlation": "predicted by gnet_subj01, fitted to the same subject"}
    images = ImageSet(Path("a <set>"), np.array(IDS), [], recon_config)
    report.write(folder / "report", Findings(images, sets, measured, differences, {"control: noise": "draw it"}),
                 config, paths)
    return folder / "report"


def test_the_page_says_what_was_found_and_what_was_not(page):
    text = (page / "index.html").read_text()
    for words in ("a &lt;set&gt;", "0.500", "No module named &#x27;torchvision&#x27;", "draw it", "Brain-IT 2026",
                  "Not independent evidence", "fitted to the same subject", "abc123", "feedbeef", "Not comparable",
                  "a world of 50 images", "0.050 … 0.450", "losses of pretrained_subj01_3sess_ext1_c_8_mlp"):
        assert words in text, words
    assert "</script><b>" not in text
    data = json.loads(re.search(r"id=report-data>(.*?)</script>", text, re.DOTALL)[1])
    assert [image["id"] for image in data["images"]] == IDS and data["images"][2]["metrics"]["ssim"] is None
    shown = [label for label, _ in data["images"][0]["pictures"]]
    assert shown == ["seen", "reconstructed", "other </script><b>"]  # controls are numbers, not pictures
    for image in data["images"]:
        for _, file in image["pictures"]:
            assert max(Image.open(page / file).size) == report.THUMBNAIL


def test_nothing_comes_from_elsewhere(page):
    """No address but relative ones: the page works without a network, from any folder."""
    text = (page / "index.html").read_text()
    links = re.findall(r"(?:src|href)=['\"]?([^'\" >]+)", text)
    assert links and all(link.startswith(("#", "data:")) for link in links)
    assert "@import" not in text and "url(http" not in text and "fetch(" not in text


def test_a_latex_row_has_the_protocols_order():
    results = {"pixcorr": {"value": 0.3219, "n": 9}, "clip_two_way": {"value": 0.9301, "n": 9},
               "swav_distance": {"value": 0.3444, "n": 9}, "ssim": {"value": None, "n": 0}}
    header, row = report.latex_row("cp_4096", results).splitlines()
    assert row == r"cp\_4096 & .322 & -- & -- & -- & -- & 93.0\% & -- & .344 \\"
    assert header.count("&") == row.count(" & ") - 1 == 7


# Clicks through the page and writes down what it then shows.
SCRIPT = """<script>
const ids = () => [...document.querySelectorAll("#gallery figcaption")].map(c => c.textContent.split(" ")[1]).join();
const first = () => [...document.querySelectorAll("#results table")][0];
const rows = () => [...first().tBodies[0].rows].map(r => r.cells[0].textContent[0]).join("");
const found = [ids()];
sort.value = "pixcorr"; sort.dispatchEvent(new Event("change")); found.push(ids());
document.querySelector("[data-tab=worst]").click(); found.push(ids());
document.querySelector("[data-tab=all]").click();
sort.value = "clip_median_rank"; sort.dispatchEvent(new Event("change")); found.push(ids());
filter.value = "20, 3"; filter.dispatchEvent(new Event("input")); found.push(ids());
found.push(rows());
first().querySelectorAll("thead button")[1].click(); found.push(rows());
first().querySelectorAll("thead button")[1].click(); found.push(rows());
found.push(document.querySelectorAll("figure img")[0].naturalWidth);
document.body.dataset.found = JSON.stringify(found);
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_sorting_and_filtering_work_in_a_browser(page, tmp_path):
    text = (page / "index.html").read_text()
    (page / "clicked.html").write_text(text.replace("</body>", SCRIPT + "</body>"))
    done = subprocess.run([CHROMIUM, *BROWSER, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
                           f"file://{page / 'clicked.html'}"], capture_output=True, text=True, timeout=120)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not console, console
    found = json.loads(re.search(r'data-found="([^"]*)"', done.stdout)[1].replace("&quot;", '"'))
    assert found[:5] == ["3,20,7000", "20,3,7000", "7000,3,20", "3,7000,20", "3,20"]
    assert found[5:8] == ["roc", "roc", "cor"]  # by PixCorr: down, then up
    shot = tmp_path / "shot.png"
    subprocess.run([CHROMIUM, *BROWSER, f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}",
                    "--window-size=400,1600", f"file://{page / 'index.html'}"], capture_output=True, timeout=120)
    assert np.asarray(Image.open(shot).convert("L")).std() > 10  # something is there
