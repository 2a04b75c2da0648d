"""The report: what its page says, that it needs nothing from elsewhere, and that it works in a browser."""

import html
import json
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

import browser
from disk.files import save_json
from disk.names import Paths, run_name
from evaluation import figures, gallery, pages, report
from evaluation.controls import PLAIN
from evaluation.curves import Curve
from evaluation.measuring import Findings, Measured
from evaluation.picture_sets import SEEN, PictureSet
from sampling.folders import ImageSet

IDS = [3, 20, 47]
OTHER = "<!--<script> $a_b$ {{ c }}"  # a label with which a page could break, or a figure
REGION = "brain_correlation_V1 onfocus=alert(1) x"
SHUFFLED = "my shuffled"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report of three images, a compared set and controls: (its folder, its Findings, its config, Paths)."""
    folder = tmp_path_factory.mktemp("report")
    paths = Paths(folder, folder)
    paths.stimuli.mkdir(parents=True)
    with h5py.File(paths.stimuli / "nsd_stimuli.hdf5", "w") as file:
        file["imgBrick"] = np.zeros((50, 4, 4, 3), np.uint8)
    paths.experiments.mkdir(parents=True)
    (paths.experiments / "nsd_stim_info_merged.csv").write_text(
        "nsdId,cocoId\n" + "".join(f"{i},{i + 100}\n" for i in range(50)))
    save_json(paths.captions, {str(i + 100): [f"a dog and thing {i}", "two <b>cats</b>" if i == 20 else "x"]
                               for i in range(50)})
    rng = np.random.default_rng(0)
    per_image = {"pixcorr": np.array([0.5, 0.9, 0.1]), "ssim": np.array([0.2, 0.3, np.nan]),
                 "clip_two_way": np.array([1.0, 0.5, 1.0]), "clip_similarity": np.array([0.3, 0.2, 0.8]),
                 "clip_median_rank": np.array([1.0, 3.0, 2.0]), REGION: np.array([0.1, 0.2, 0.3])}
    halves = {name: values / 2 for name, values in per_image.items()} | {"pixcorr": np.array([0.0, 0.8, 0.0812])}
    measured = {"reconstructed": Measured(per_image, {}, 0), OTHER: Measured(halves, {}, 0),
                SHUFFLED: Measured({"clip_two_way": np.array([0.5, 0.0, 1.0])}, {}, 0),
                PLAIN[1]: Measured({"pixcorr": np.zeros(3), "clip_two_way": np.array([1.0, 0.0, 1.0])}, {}, 0)}
    measured["reconstructed"].results["alexnet2_two_way"] = {"value": None, "ci_low": None, "ci_high": None, "n": 0,
                                                             "missing": "No module named 'torchvision'"}
    stack = rng.integers(0, 256, (3, 600, 600, 3), np.uint8)
    sets = {label: PictureSet(label, IDS, lambda i, k: stack[i]) for label in (SEEN, *measured)}
    sets[SHUFFLED].config = {"control": "shuffle"}
    sets[PLAIN[1]].shows = np.array([8, 9, 10])
    sets[PLAIN[1]].read = lambda i, k: stack[0]
    differences = {OTHER: {"pixcorr": {"value": 0.25, "ci_low": 0.05, "ci_high": 0.45, "n": 3}}}
    recon_config = {"run": "finetune", "subj": "subj01", "hidden_dim": 8, "num_sessions": 3, "tag": "",
                    "feats": ["g_2", "g_4"], "z": "none", "head": None, "control": None, "test_split": "new_test",
                    "repeats": "mean", "guidance_rule": "posterior",
                    "score_hashes": {"c": "abc123", "g_2": "2", "g_4": "4", "image_ids": "1"},
                    "guidance_scale": 30.0, "guidance_strength": 0.8, "sd_model": "/big disk/sd</script>",
                    "commit": "fedcba9876543210"}
    name = run_name("finetune", "subj01", "c", 8, 3)
    save_json(paths.scores("subj01", name, "c") / "config.json", {"checkpoint_sha256": "feedbeef",
                                                                  "r2": {"network": 0.6, "scored": 0.7}})
    with h5py.File(paths.betas("subj01"), "w") as file:
        file["betas"] = np.zeros((2, 1234), np.float32)
    for feat in ("c", "g"):
        run = paths.run(run_name("finetune", "subj01", feat, 8, 3))
        run.mkdir(parents=True)
        lines = (json.dumps({"step": step, "train/loss": 9, "train/loss_mse": 3 - step, "val/loss_mse": 2.5})
                 for step in (1, 2))
        (run / "metrics.jsonl").write_text("\n".join(lines))
    config = {"protocol": "mindeye2", "images": str(folder / "outputs_all/x"), "n_samples": 1,
              "git_commit": "0123456789abcdef",
              "options": {"method": "m", "root": str(folder), "weights_dir": "/w/hub"}}
    images = ImageSet(Path("a <set>"), np.array(IDS), [], recon_config)
    findings = Findings(images, sets, measured, differences, {"control: noise": f"{folder}/scores_all/x not found"},
                        ("n = 3: few", "x: drawn otherwise than what is evaluated: y"), np.array([0, 1, 0]),
                        {OTHER: {"value": 0.75, "ci_low": 0.5, "ci_high": 0.9, "n": 3, "trials": 4, "raters": 2}},
                        {"c": {"ridge": 0.4, "network": 0.6, "scored": 0.7}},
                        (Curve("Numbers left of the response", {OTHER: 5, "reconstructed": 1234}),),
                        {"the cluster": {"reconstructed": measured["reconstructed"].results}}, 50,
                        "predicted by gnet_subj01, fitted to the same subject")
    maps = paths.maps("subj01")
    save_json(maps / "config.json", {})
    Image.new("RGB", (8, 8)).save(maps / "glass_encoding.png")
    (maps / "regions.csv").write_text("region,voxels,map,value,low,high,interval\nV1,77,encoding_r,0.361,0.3,0.4,x\n")
    report.write(folder / "report", findings, config, paths)
    return folder / "report", findings, config, paths


@pytest.fixture(scope="module")
def page(written):
    return written[0]


def data_of(page):
    return json.loads(re.search(r'id="report-data">(.*?)</script>', (page / "index.html").read_text(), re.DOTALL)[1])


def test_the_page_says_what_was_found_and_what_was_not(page):
    text = (page / "index.html").read_text()
    seen = re.sub(r"\s+", " ", html.unescape(re.sub("<[^>]*>", " ", text)))
    for words in ("a <set>", "0.500", "No module named 'torchvision'", "scores_all/x not found", "Brain-IT 2026",
                  "Not independent evidence", "fitted to the same subject", "abc123", "feedbeef", "Not comparable",
                  "not NSD: a set (50 images)", "0.050 … 0.450", "these (NOT COMPARABLE)", "n = 3: few",
                  "What subject 1 saw", "3 test images that no training saw", "1,234",
                  "pretrained on others, fine-tuned on 3 sessions",
                  "posterior rule, strength 30, in the first 80% of the steps", "fedcba98 drew, 01234567 measured",
                  "75.0 % of 4 blinded choices by 2 people", "scored, validation images 0.700",
                  "Of 3 images alone: the cluster", "V1 (77 voxels) 0.361 0.300 … 0.400"):
        assert words in seen, words
    assert "CLIP (%) · people: r 0.44" in text and (page / "maps/glass_encoding.png").exists()
    assert "against numbers left of the response: 5: 41.7, 1234: 83.3" in text  # CLIP's two-way rate
    assert "losses of pretrained_subj01_3sess_ext1_g_8: in the end training 1, validation 2.5" in text


def test_the_first_screen_has_one_number_with_what_it_must_be_seen_beside(page):
    first = (page / "index.html").read_text().partition("<nav")[0]
    value = re.search(r'class="value">([^<]*)<', first)[1]
    bars = re.findall(r'<tr class="(\w+)"><th scope="row">([^<\n]*).*?<td>([^<]*)</td></tr>', first, re.DOTALL)
    assert value == "83.3 %" and [(kind, text) for kind, _, text in bars] == [
        ("main", "83.3 %"), ("control", "66.7 %"), ("control", "50.0 %"), ("chance", "50.0 %")]
    assert [label.strip() for _, label, _ in bars] == ["reconstructed", "nearest training image", SHUFFLED, "chance"]
    assert "drawn otherwise" not in first  # that can wait
    strip = re.findall(r'alt="reconstructed, image (\d+)"', first)
    assert strip == ["47", "3", "20"]  # from the best to the worst


def test_a_number_that_is_nearly_all_right_gives_way_to_a_harder_one(written, tmp_path):
    _, findings, config, paths = written
    save_json(paths.root / "about.json", {"data": "drawn scenes"})
    found = {"clip_two_way": np.array([1.0, 1.0, 0.97]), "clip_top1": np.array([1.0, 1.0, 0.0])}
    sets = {label: Measured(found, {}, 0) for label in findings.measured}
    report.write(tmp_path, findings._replace(measured=sets, differences={}, curves=(), parts={}), config, paths)
    (paths.root / "about.json").unlink()
    first = re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", (tmp_path / "index.html").read_text().partition("<nav")[0]))
    assert " 66.7 % of the reconstructions are closer to the picture that was seen than to any other of the 3" in first
    assert "By the same network: 99.0 % (97.0 % to 100.0 %) when it is two-way" in first
    assert "not NSD: drawn scenes (50 images)" in first


def test_on_nsd_itself_published_rows_are_beside_it(written, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "NSD_IMAGES", 50)
    report.write(tmp_path, *written[1:])
    text = (tmp_path / "index.html").read_text()
    assert "NOT COMPARABLE" not in text and "these, subject 1 alone" in text
    assert re.search(r'<tr class="published">.{,40}Brain-IT 2026.*?96.4 %', text, re.DOTALL)
    assert "Data</dt><dd>NSD</dd>" in text and ">published</text>" in text


def test_the_script_gets_every_value_of_every_set(page):
    data = data_of(page)
    assert data["ids"] == IDS and data["values"]["reconstructed"]["ssim"] == [0.2, 0.3, None]
    assert data["values"][OTHER]["pixcorr"] == [0.0, 0.8, 0.0812] and data["kinds"] == [0, 1, 0]
    assert data["captions"][1] == ["a dog and thing 20", "two <b>cats</b>"]
    assert [column["set"] for column in data["columns"]] == [SEEN, "reconstructed", OTHER, SHUFFLED, PLAIN[1]]
    assert data["columns"][-1]["shows"] == [8, 9, 10]
    for column in data["columns"]:
        for file in column["files"]:
            assert max(Image.open(page / file).size) == gallery.SIDES[0]
    assert len(set(data["columns"][-1]["files"])) == 1  # the same picture thrice is one file
    assert len(list((page / "pictures").iterdir())) == 13


def test_copies_get_smaller_where_there_are_many_and_leave_nothing_behind(tmp_path):
    found = [gallery.sides_of_copies(2 * n, m * n) for n, m in ((100, 10), (1000, 0), (1000, 9), (1000, 15), (9000, 3))]
    assert found == [(512, 512), (512, 512), (384, 256), (384, 192), (192, 192)]
    (tmp_path / "pictures").mkdir()
    for name in ("00003_7.webp", "0_00003_0.png", "mine.txt"):
        (tmp_path / "pictures" / name).touch()
    picture = np.random.default_rng(0).integers(0, 256, (20, 10, 3), np.uint8)
    (names,) = gallery.save_copies(tmp_path, [(PictureSet("a", [5], lambda i, k: picture), 0, True)])
    assert sorted(file.name for file in (tmp_path / "pictures").iterdir()) == ["00005_0.webp", "mine.txt"]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / names[0])), picture)  # small: as it is


def test_nothing_comes_from_elsewhere_and_no_path_is_absolute(page):
    """The page works without a network, from any folder, and says nothing of the disk it was made on."""
    text = (page / "index.html").read_text()
    links = re.findall(r"(?:src|href)=['\"]?([^'\" >]+)", text)
    assert links and all(link.startswith(("#", "data:", "pictures/", "maps/")) for link in links)
    assert "@import" not in text and not re.search(r"url\((?!#)", text) and "fetch(" not in text
    for private in (str(page.parent), "/w/hub", "/big"):
        assert private not in text, private
    assert "…/hub" in text


def test_paths_are_named_from_the_root_or_by_their_last_part():
    paths = Paths(Path("/data/me"), Path("/data/me"))
    for given, expected in (("/data/me/scores/x not found", "scores/x not found"),
                            ("at /data/me: none", "at ROOT: none"), ("/big disk/sd", "…/sd"),
                            ("/home/jo/w.pth, /opt/a/", "…/w.pth, …/a"), ("300000/0.2 and a/b", "300000/0.2 and a/b"),
                            ("/data/metoo/x", "…/x"), ("https://a.org/b", "https://a.org/b"), (3, 3),
                            ({"a": ["/x/y"], "b": None}, {"a": ["…/y"], "b": None})):
        assert pages.portable(given, paths) == expected


def test_figures_have_the_pages_colours(page):
    """What matplotlib draws is legible on dark and on paper, too: no colour of its own."""
    svgs = re.findall("<svg.*?</svg>", (page / "index.html").read_text(), re.DOTALL)
    assert len(svgs) == 3 + 3 + 1 + 6 + 2  # metrics, growth, regions, histograms, curves
    assert f">{OTHER}</text>" in html.unescape(svgs[0])  # and a label is no formula
    for svg in svgs:
        assert not re.search("#[0-9a-f]{3,6}[;\"']", svg) and "var(--ink)" in svg and ' id="text_' not in svg


def test_training_and_validation_share_a_scale():
    rows = [{"step": 1, "train/loss": 5, "val/loss": 4}, {"step": 2, "train/loss": 3, "val/loss": 3.5}]
    axes = [{"train/loss_mse": 0.5, "val/loss_mse": 0.25}, {}]  # the loss that judges, where there is one
    for more, unit, ends in zip(axes, ("squared error / variance", "what is minimised"), ("0.5", "3"), strict=True):
        figure = report.curve("c", "a_run", [row | more for row in rows])
        assert f">{unit}</text>" in figure and ">epoch</text>" in figure and f"training {ends}," in figure
        assert figure.count("<svg") == 1
    assert report.curve("c", "ridge", [{"step": 1, "val/loss_mse": 1}]) is None


def test_better_is_further_right(monkeypatch):
    """Also of distances; the intervals are drawn, and chance."""
    drawn = []
    monkeypatch.setattr(figures, "svg_of", lambda axis, *_: drawn.append(axis))
    entry = {"value": 0.6, "ci_low": 0.5, "ci_high": 0.7}
    for lower in (True, False):
        figures.comparison("t", [("a", "main", entry)], 0.5, [90, 95], lower, 100)
    assert [axis.xaxis_inverted() for axis in drawn] == [True, False]
    lines = [list(line.get_xdata()) for line in drawn[0].lines]
    assert lines == [[50, 70], [60], [90, 95], [50, 50]]


@pytest.mark.parametrize("config", [None, {"subj": "subj02", "control": "noise"}])
def test_a_report_of_the_seen_images_and_of_pictures_of_unknown_origin(tmp_path, written, config):
    _, findings, options, paths = written
    label = SEEN if config is None else "reconstructed"
    lonely = Findings(findings.images._replace(config=config), {SEEN: findings.sets[SEEN], label: findings.sets[label]},
                      {label: Measured({"pixcorr": np.ones(3)}, {}, 0)}, {}, {}, n_stimuli=50)
    report.write(tmp_path, lonely, options, paths)
    text = (tmp_path / "index.html").read_text()
    title = "The seen pictures, measured against themselves" if config is None else "Null control (noise)"
    assert title in text and 'class="value">1.000' in text and 'id="brain"' not in text
    assert ("No control was" in text) == (config is not None)


def test_a_latex_row_has_the_protocols_order():
    results = {"pixcorr": {"value": 0.3219, "n": 9}, "clip_two_way": {"value": 0.9301, "n": 9},
               "swav_distance": {"value": 0.3444, "n": 9}, "ssim": {"value": None, "n": 0}}
    header, row = report.latex_row("cp_4096", results).splitlines()
    assert row == r"cp\_4096 & .322 & -- & -- & -- & -- & 93.0\% & -- & .344 \\"
    assert header.count("&") == row.count(" & ") - 1 == 7


# Clicks and types, and writes down what the page then shows.
SCRIPT = """
const all = selector => [...document.querySelectorAll(selector)];
const ids = () => all("#gallery figcaption").map(caption => caption.textContent.match(/id (\\d+)/)[1]).join();
const set = (field, value) => {
  field.value = value;
  field.dispatchEvent(new Event(field === filter ? "input" : "change"));
};
const press = key => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const rows = () => [...all("#tables table")[0].tBodies[0].rows].map(row => row.cells[0].textContent[0]).join("");
found.random = ids();
set(sort, "id"); found.id = ids();
set(sort, "clip_similarity"); found.best = ids();
order.click(); found.worst = ids();
set(sort, "ssim"); found.missing_last = ids();
order.click();
set(sort, "clip_median_rank"); found.rank = ids();
set(sort, "pixcorr"); set(of, "minus " + SETS[1]); found.minus = ids();
found.of = [...of.options].length;
set(filter, "20, 3"); found.by_id = ids();
set(filter, "CATS dog"); found.by_word = ids();
set(filter, ""); set(kind, "0"); found.by_kind = ids();
set(kind, ""); set(sort, "id");
found.tiles = all("#gallery img").length;
all("#columns input")[0].click(); found.fewer_tiles = all("#gallery img").length;
all(".card button")[1].click();
const title = () => at("viewer-title").textContent;
found.open = [viewer.open, title(), viewer.querySelectorAll("img").length, at("viewer-captions").textContent];
press("ArrowRight"); found.right = title();
press("ArrowRight"); found.end = title();
press("ArrowLeft"); press("ArrowLeft"); found.left = title();
found.values = at("viewer-values").querySelectorAll("tbody tr").length;
viewer.close();
viewer.dispatchEvent(new Event("close"));  // which the browser sends too, but later
found.focus = document.activeElement.getAttribute("aria-label");
found.rows = rows();
const buttons = all("#tables table")[0].querySelectorAll("thead button");
buttons[1].click(); found.rows += " " + rows();
buttons[1].click(); found.rows += " " + rows();
found.width = document.querySelector(".strip img").naturalWidth;
found.labels = data.columns.map(column => column.label);
found.injected = all("[onfocus], b b, figcaption script, q b").length;
found.too_wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
"""


@browser.needs_browser
def test_the_gallery_works_in_a_browser(page, tmp_path):
    found = browser.found_by(SCRIPT, page / "index.html", tmp_path / "profile", "--window-size=500,900")
    assert sorted(found["random"].split(",")) == ["20", "3", "47"] and found["id"] == "3,20,47"
    assert (found["best"], found["worst"]) == ("47,3,20", "20,3,47")
    assert found["missing_last"] == "3,20,47" and found["rank"] == "3,47,20"
    assert found["minus"] == "3,20,47" and found["of"] == 3 + 2  # sets that have it, and ours minus two
    assert (found["by_id"], found["by_word"], found["by_kind"]) == ("3,20", "20", "3,47")
    assert (found["tiles"], found["fewer_tiles"]) == (15, 12)
    assert found["open"] == [True, "Image 20, kind of scene 2 (2 of 3)", 5, "a dog and thing 20two <b>cats</b>"]
    assert found["right"] == found["end"] == "Image 47, kind of scene 1 (3 of 3)"
    assert found["left"] == "Image 3, kind of scene 1 (1 of 3)" and found["values"] == 4
    assert found["focus"] == "enlarge image 3"
    assert found["rows"] == "r<mc r<cm c<rm"
    assert found["width"] == gallery.SIDES[0] and found["labels"][2] == OTHER
    assert found["injected"] == 0 and found["too_wide"] <= 0


@browser.needs_browser
def test_a_screenshot_shows_something_on_light_and_on_dark(page, tmp_path):
    shades = []
    for scheme in (1, 0):  # Blink's numbers of light and dark
        shot = tmp_path / f"{scheme}.png"
        browser.run(page / "index.html", tmp_path / "profile", f"--screenshot={shot}", "--window-size=500,1600",
                    f"--blink-settings=preferredColorScheme={scheme}")
        gray = np.asarray(Image.open(shot).convert("L"))
        assert gray.std() > 10
        shades.append(np.median(gray))
    assert shades[0] > 200 and shades[1] < 60
