"""The rating page: blinded, answered in a browser, and resolved by evaluate.py."""

import json
import re

import h5py
import numpy as np
import pytest
import scipy.stats
from PIL import Image

import browser
import evaluate
from disk.files import save_csv, save_json
from disk.names import Paths
from evaluation import rating
from evaluation.picture_sets import PictureSet
from utils import UserError

IDS = [2, 5, 6, 9, 11, 12, 14]
SIDE = 24


@pytest.fixture(scope="module")
def sets():
    """What was seen, reconstructions, and another set with larger pictures."""
    stacks = np.random.default_rng(0).integers(0, 256, (2, len(IDS), SIDE, SIDE, 3), np.uint8)
    larger = np.random.default_rng(1).integers(0, 256, (len(IDS), 2 * SIDE, 2 * SIDE, 3), np.uint8)
    return [PictureSet(label, IDS, lambda i, k, stack=stack: stack[i])
            for label, stack in zip(("seen", "made", "the other"), (*stacks, larger), strict=True)]


def answered(sets, right, seed=42, page=None):
    """Answers of one person who chooses the reconstruction of the images in `right`, as the page saves them."""
    trials = rating.Trials.draw(*sets, seed)
    sides = [("left" if left else "right") if IDS[i] in right else ("right" if left else "left")
             for i, left in zip(trials.images, trials.left, strict=True)]
    return {"page": page or trials.page, "rater": "me", "trials": [{"trial": t, "side": side}
                                                                   for t, side in enumerate(sides)]}


def resolved(sets, folder, *found, seed=42):
    """rating.resolve of answers, by way of their files."""
    files = [folder / f"{k}.json" for k in range(len(found))]
    for file, answers in zip(files, found, strict=True):
        save_json(file, answers)
    return rating.resolve(rating.load_answers(files), *sets[:2], {"the other": sets[2]}, seed)


def test_order_and_sides_are_drawn_by_the_seed(sets):
    drawn = [rating.Trials.draw(*sets, seed) for seed in (1, 1, 2)]
    assert sorted(drawn[0].images) == list(range(len(IDS))) and drawn[0].left.sum() == 4
    assert drawn[0].page == drawn[1].page != drawn[2].page
    assert rating.Trials.draw(sets[0], sets[2], sets[1], 1).page != drawn[0].page
    many = PictureSet("many", np.arange(1001), lambda i, k: np.zeros((1, 1, 3), np.uint8))
    trials = rating.Trials.draw(many, many, many, 0)
    assert len(trials.images) == rating.MOST == len(set(trials.images)) and trials.left.mean() == 0.5
    assert abs(np.corrcoef(trials.left, trials.images)[0, 1]) < 0.2


def test_a_page_shows_both_alike_and_does_not_say_which_is_which(sets, tmp_path):
    rating.write_page(tmp_path, *sets, 42, Paths(tmp_path, tmp_path))
    text = (tmp_path / "index.html").read_text()
    assert "the other" not in text and "made" not in text.replace("made it", "")
    data = json.loads(re.search(r'id="rating-data">(.*?)</script>', text)[1])
    trials = rating.Trials.draw(*sets, 42)
    assert data["page"] == trials.page and len(data["trials"]) == len(IDS)
    for trial, i, left in zip(data["trials"], trials.images, trials.left, strict=True):
        pictures = {where: Image.open(tmp_path / file) for where, file in trial.items()}
        assert {picture.size for picture in pictures.values()} == {(SIDE, SIDE)}
        assert {picture.format for picture in pictures.values()} == {"WEBP"}
        np.testing.assert_array_equal(pictures["seen"], sets[0].read(i, 0))
        np.testing.assert_array_equal(pictures["left" if left else "right"], sets[1].read(i, 0))
    links = re.findall(r"(?:src|href)=\"([^\"]+)", text)
    assert all(link.startswith("data:") for link in links) and "fetch(" not in text


def test_one_persons_choices_have_the_exact_interval(sets, tmp_path):
    for right in (IDS, IDS[:5], []):
        entry = resolved(sets, tmp_path, answered(sets, right))["the other"]
        exact = scipy.stats.binomtest(len(right), len(IDS)).proportion_ci(method="exact")
        assert entry["value"] == pytest.approx(len(right) / len(IDS))
        assert (entry["ci_low"], entry["ci_high"]) == pytest.approx((exact.low, exact.high))
        assert (entry["n"], entry["trials"], entry["raters"]) == (7, 7, 1)


def test_several_peoples_are_drawn_by_image(sets, tmp_path):
    """An image on which they agree counts as one image, not as several choices."""
    some = answered(sets, IDS[:3])
    del some["trials"][4:]  # who stopped early
    found = resolved(sets, tmp_path, answered(sets, IDS[:5]), answered(sets, IDS[:3]), some)["the other"]
    images = [IDS[i] for i in rating.Trials.draw(*sets, 42).images]
    chosen = {i: [i in IDS[:5], i in IDS[:3]] + [i in IDS[:3]] * (i in images[:4]) for i in IDS}
    everyone = sum(chosen.values(), [])
    assert found["value"] == pytest.approx(np.mean(everyone)) and found["trials"] == len(everyone) == 18
    rng, means = np.random.default_rng(3), []
    for _ in range(4000):
        means.append(np.mean(sum((chosen[i] for i in rng.choice(IDS, len(IDS))), [])))
    assert (found["ci_low"], found["ci_high"]) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.04)
    assert (found["n"], found["raters"]) == (7, 3)


def test_answers_that_do_not_fit_are_refused(sets, tmp_path):
    fine = answered(sets, IDS)
    wrong = {"answers to page 123, wanted that of the other": [answered(sets, IDS, page="123")],
             "the same answers": [fine, fine | {"rater": "another"}],
             r"trials 7..7, wanted 0..6": [fine | {"trials": [{"trial": 7, "side": "left"}]}],
             "wanted a page and its trials": [fine | {"trials": [{"trial": 1, "side": "up"}]}],
             "each once": [fine | {"trials": 2 * [{"trial": 1, "side": "left"}]}],
             "left or right": [{"page": fine["page"]}], "save the answers": [fine | {"trials": []}]}
    for message, found in wrong.items():
        with pytest.raises(UserError, match=message):
            resolved(sets, tmp_path, *found)
    with pytest.raises(UserError, match="answers to page"):
        resolved(sets, tmp_path, fine, seed=1)


# Answers with clicks and keys, goes back once, and notes what would be saved.
SCRIPT = """
const press = key => document.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
found.start = [at("save").disabled, at("seen").getAttribute("src")];
at("left").click(); press("ArrowRight"); press("ArrowRight"); press("Backspace");
found.count = at("count").textContent;
for (let k = 0; k < 10; k++) press("ArrowLeft");
at("rater").value = " Jo D/oe ";
found.done = !at("done").hidden && at("trial").hidden;
found.answers = answers();
HTMLAnchorElement.prototype.click = function () { found.file = this.download; found.link = this.href.slice(0, 5); };
at("save").click();
found.kept = JSON.parse(localStorage.getItem(KEPT)).length;
"""


@browser.needs_browser
def test_people_answer_in_a_browser(sets, tmp_path):
    rating.write_page(tmp_path / "page", *sets, 42, Paths(tmp_path, tmp_path))
    found = browser.found_by(SCRIPT, tmp_path / "page/index.html", tmp_path / "profile")
    page = rating.Trials.draw(*sets, 42).page
    assert found["start"] == [True, "pictures/000_seen.webp"] and found["count"] == "2 of 7 answered"
    assert found["done"] and found["kept"] == 7
    assert found["answers"] == {"page": page, "rater": "Jo D/oe", "trials": [
        {"trial": t, "side": "right" if t == 1 else "left"} for t in range(7)]}
    assert (found["file"], found["link"]) == (f"ratings_{page}_Jo_D_oe.json", "blob:")
    assert resolved(sets, tmp_path, found["answers"])["the other"]["trials"] == 7


def test_evaluate_writes_the_page_and_reads_its_answers(sets, tmp_path, capsys):
    paths = Paths(tmp_path, tmp_path)
    paths.stimuli.mkdir(parents=True)
    seen, made, other = ([pictures.read(i, 0) for i in range(len(IDS))] for pictures in sets)
    with h5py.File(paths.stimuli / "nsd_stimuli.hdf5", "w") as file:
        file["imgBrick"] = np.zeros((20, SIDE, SIDE, 3), np.uint8)
        file["imgBrick"][IDS] = np.stack(seen)
    for name, pictures in (("made", made), ("other", other)):
        (tmp_path / name).mkdir()
        rows = [{"row": row, "image_id": IDS[row], "file": f"{row:05d}.png"} for row in range(len(IDS))]
        save_csv(tmp_path / name / "index.csv", rows)
        for row, picture in zip(rows, pictures, strict=True):
            Image.fromarray(picture).save(tmp_path / name / row["file"])
    words = ["--root", str(tmp_path), "--device", "cpu", "--eval_clip", "none", "--images", "made", "--compare",
             "theirs=other"]
    for label, message in (("unknown", "wanted the label of a set: theirs"), ("control: mean image", "not there")):
        with pytest.raises(UserError, match=message):
            evaluate.main([*words, "--rating_page", label])
    evaluate.main([*words, "--rating_page", "theirs"])
    assert f"rating page    {tmp_path}/made/rating/index.html" in capsys.readouterr().out
    answers = answered(sets, IDS[1:])
    assert f"Page {answers['page']}." in (tmp_path / "made/rating/index.html").read_text()
    save_json(tmp_path / "jo.json", answers)
    evaluate.main([*words, "--ratings", str(tmp_path / "jo.json")])
    entry = json.loads((tmp_path / "made/compared.json").read_text())["theirs"]["ratings"]
    assert entry["value"] == pytest.approx(6 / 7) and entry["raters"] == 1
    assert "rated nearer than theirs: 0.857 (" in capsys.readouterr().out
    text = re.sub(r"\s+", " ", (tmp_path / "made/report/index.html").read_text())
    assert "<b>85.7 %</b> of 7 blinded choices by 1 person" in text
