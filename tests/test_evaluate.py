"""evaluate.py and the demo's summary on a world of 24 images: files in, files out, and what is refused."""

import contextlib
import json
import os
import re
import shlex

import h5py
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

import evaluate
import summarise
import utils
from disk.files import file_hash, load_csv, save_csv, save_json
from disk.names import Paths, run_name
from disk.scores import save_scores
from evaluation import gallery, metrics, networks, results
from evaluation.networks import load_clip

IDS = [3, 4, 7, 11, 12, 20]  # the test images, ascending; their rows are 0..5
SIDE = 32


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny CLIP with random weights and a normalisation of its own, as a folder."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    config = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                              image_size=16, patch_size=4, projection_dim=24)
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    CLIPImageProcessor(image_mean=[0.3, 0.4, 0.5], image_std=[0.2, 0.3, 0.4]).save_pretrained(folder)
    return folder


@pytest.fixture
def root(tmp_path):
    """Stimuli, noisy reconstructions of IDS with their index and config, and scores of c."""
    rng = np.random.default_rng(0)
    paths = Paths(tmp_path, tmp_path)
    coarse = rng.integers(0, 256, (24, 4, 4, 3), np.uint8)
    stimuli = np.stack([np.asarray(Image.fromarray(x).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for x in coarse])
    paths.stimuli.mkdir(parents=True)
    with h5py.File(paths.stimuli / "nsd_stimuli.hdf5", "w") as file:
        file["imgBrick"] = stimuli
    noisy = (stimuli + rng.normal(0, 60, stimuli.shape)).clip(0, 255).astype(np.uint8)
    write_set(paths.images("subj01", "cp_4096_v1", 300000, 0.2), noisy[IDS])

    c = rng.normal(size=(24, 5, 6)).astype(np.float32)
    with h5py.File(paths.feature("c"), "w") as file:
        file.create_dataset("data", data=c.reshape(24, -1)).attrs["shape"] = (5, 6)
    scores = paths.scores("subj01", run_name("finetune", "subj01", "c", 1024), "c")
    brain = c[IDS].copy()
    brain[0] = c[IDS[1]]  # one miss
    save_scores(scores, IDS, {"retrieval": brain, "nsdgeneral": brain}, {})
    return tmp_path


def write_set(folder, pictures, samples=1):
    """Write pictures of IDS (row by row, sample by sample) as recon.py does."""
    folder.mkdir(parents=True)
    rows = [{"row": row, "image_id": IDS[row], "file": f"{row:05d}{f'_s{k}' if k else ''}.png", "sample": k, "seed": 42}
            for row in range(len(pictures) // samples) for k in range(samples)]
    for row, picture in zip(rows, pictures, strict=True):
        Image.fromarray(picture).save(folder / row["file"])
    save_csv(folder / "index.csv", rows)
    config = {"subj": "subj01", "hidden_dim": 1024, "num_sessions": 40, "tag": "", "run": "finetune", "head": None,
              "control": None, "test_split": "new_test", "repeats": "mean"}
    save_json(folder / "config.json", config)
    return folder


def images_of(root):
    return root / "outputs_all/subj01/cp_4096_v1/300000/0.2"


def stimuli_of(root):
    with h5py.File(root / "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5") as file:
        return file["imgBrick"][:]


def run(root, *words):
    evaluate.main(["--root", str(root), "--device", "cpu", *map(str, words)])


def metrics_in(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_values_are_those_of_the_pairs_matched_by_id(root, clip):
    run(root, "--subj", 1, "--eval_clip", clip)
    folder = images_of(root)
    found = metrics_in(folder)
    truths = stimuli_of(root)[IDS]
    made = np.stack([np.asarray(Image.open(folder / f"{row:05d}.png")) for row in range(len(IDS))])

    def at(pictures, side):
        x = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255
        return torch.nn.functional.interpolate(x, size=256, mode="bilinear") if side == 256 else \
            torch.nn.functional.interpolate(at(pictures, 256), size=side, mode="bilinear")

    flat = [at(x, 425).flatten(1).numpy() for x in (truths, made)]
    pixcorr = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(*flat, strict=True)])
    assert found["pixcorr"]["value"] == pytest.approx(pixcorr, abs=1e-5)

    model = CLIPVisionModelWithProjection.from_pretrained(clip)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.3, 0.4, 0.5], [0.2, 0.3, 0.4]))
    with torch.no_grad():
        reals, preds = (model((at(x, 16) - mean) / std).image_embeds.numpy() for x in (truths, made))
    np.testing.assert_allclose(load_clip(str(clip))(at(truths, 256)), reals, atol=1e-5)
    r = np.corrcoef(reals, preds)[:len(IDS), len(IDS):]
    two_way = (r < np.diag(r)).sum(axis=0).mean() / (len(IDS) - 1)
    assert found["clip_two_way"]["value"] == pytest.approx(two_way)
    rank = [1 + sum(r[j, i] > r[i, i] for j in range(len(IDS))) for i in range(len(IDS))]
    assert found["clip_median_rank"]["value"] == np.median(rank)
    assert found["clip_top1"]["value"] == pytest.approx(np.mean(np.array(rank) == 1))

    assert found["brain_to_c_top1"]["value"] == pytest.approx(5 / 6)
    assert found["brain_to_c_top1"]["gallery"] == 6
    for entry in found.values():
        if entry["ci_low"] is not None:
            assert entry["n"] == len(IDS) and entry["ci_low"] <= entry["value"] <= entry["ci_high"]
    rows = load_csv(folder / "metrics_per_image.csv", "", "")
    assert [int(row["image_id"]) for row in rows] == IDS
    assert np.mean([float(row["clip_two_way"]) for row in rows]) == pytest.approx(two_way)
    assert json.loads((folder / "metrics_config.json").read_text())["protocol"] == "mindeye2"
    assert Image.open(folder / "contact_sheet.png").width > 500


def test_the_order_of_the_index_does_not_matter(root):
    folder = write_set(root / "perfect", stimuli_of(root)[IDS])
    rows = load_csv(folder / "index.csv", "", "")
    save_csv(folder / "index.csv", rows[::-1])
    run(root, "--images", "perfect", "--eval_clip", "none")
    assert metrics_in(folder)["pixcorr"]["value"] == pytest.approx(1)
    assert metrics_in(folder)["ssim"]["value"] == pytest.approx(1)
    assert [int(row["image_id"]) for row in load_csv(folder / "metrics_per_image.csv", "", "")] == IDS


def test_the_seen_images_reach_the_best_of_everything(root, clip):
    run(root, "--subj", 1, "--seen", "--eval_clip", clip)
    found = metrics_in(images_of(root) / "seen")
    for name in ("pixcorr", "ssim", "sharpness", "clip_two_way", "clip_two_way_gt_to_rec", "clip_top1",
                 "clip_median_rank"):
        assert found[name]["value"] == pytest.approx(1), name
    assert not (images_of(root) / "metrics.json").exists()


def test_samples_are_averaged(root):
    pictures, rng = stimuli_of(root)[IDS], np.random.default_rng(1)
    noise = rng.integers(0, 256, pictures.shape, np.uint8)
    run(root, "--images", write_set(root / "noise", noise), "--eval_clip", "none")
    both = np.stack([pictures, noise], axis=1).reshape(-1, SIDE, SIDE, 3)  # sample 0 is perfect, sample 1 noise
    run(root, "--images", write_set(root / "both", both, samples=2), "--eval_clip", "none")
    for name in ("pixcorr", "ssim"):
        expected = (1 + metrics_in(root / "noise")[name]["value"]) / 2
        assert metrics_in(root / "both")[name]["value"] == pytest.approx(expected)


def test_one_image_and_absent_scores_give_reasons_not_numbers(root, clip, capsys):
    folder = write_set(root / "one", stimuli_of(root)[IDS[:1]])
    (folder / "config.json").unlink()
    run(root, "--images", folder, "--eval_clip", clip)
    found = metrics_in(folder)
    assert found["clip_two_way"]["value"] is None and "two images" in found["clip_two_way"]["missing"]
    assert "config.json" in found["brain_to_c_top1"]["missing"]
    assert "missing, needs at least two images" in capsys.readouterr().out


def test_retrieval_follows_the_images_config_not_the_flags(root):
    folder = images_of(root)
    config = json.loads((folder / "config.json").read_text())
    save_json(folder / "config.json", {**config, "control": "shuffle"})
    run(root, "--images", folder, "--eval_clip", "none")
    assert "_shuffle/nsdgeneral.npy not found" in metrics_in(folder)["brain_to_c_top1"]["missing"]


def test_scores_that_changed_since_the_drawing_are_not_retrieved_from(root, capsys):
    folder, (scores,) = images_of(root), (root / "scores_all").rglob("nsdgeneral.npy")
    config = json.loads((folder / "config.json").read_text())
    for scored, gone in ((file_hash(scores), False), ("another", True)):
        save_json(folder / "config.json", {**config, "score_hashes": {"c": scored}})
        run(root, "--images", folder, "--eval_clip", "none")
        entry = metrics_in(folder)["brain_to_c_top1"]
        assert (entry["value"] is None) == gone and ("not what these pictures were drawn from" in str(entry)) == gone
        assert ("effective_rank_c" in metrics_in(folder)) != gone


def test_folder_of_flags(root):
    args = evaluate.get_parser().parse_args(["--root", str(root)])
    paths = Paths.from_args(args)
    assert evaluate.images_folder(args, paths) == images_of(root)  # the only one there is
    write_set(images_of(root).parent.parent / "100/0.2", stimuli_of(root)[IDS])
    with pytest.raises(utils.UserError, match="2 sets of these names.*0.2 .--guidance_scale 100.*300000"):
        evaluate.images_folder(args, paths)
    for words, expected in (("--guidance_scale 3e5", "cp_4096_v1/300000/0.2"), ("--guidance_scale 0", "cp_4096_v1/0/0"),
                            ("--guidance_scale 9 --control noise --guidance_strength 1", "cp_4096_v1_noise/9/1")):
        args = evaluate.get_parser().parse_args(["--root", str(root), *words.split()])
        if not (paths.outputs_all / "subj01" / expected).exists():
            with pytest.raises(utils.UserError, match=f"{expected}: .* there are: .*--guidance_scale 100"):
                evaluate.images_folder(args, paths)
            write_set(paths.outputs_all / "subj01" / expected, stimuli_of(root)[IDS])
        assert evaluate.images_folder(args, paths) == paths.root / "outputs_all/subj01" / expected


@pytest.mark.parametrize("damage, words, message", [
    (lambda f: (f / "index.csv").unlink(), (), "index.csv"),
    (lambda f: (f / "index.csv").write_text("row,file\n0,00000.png\n"), (), "image_id"),
    (lambda f: (f / "index.csv").write_text((f / "index.csv").read_text().replace(",20,", ",99,")), (), "99"),
    (lambda f: (f / "00002.png").unlink(), (), "00002.png"),
    (lambda f: (f / "00002.png").write_bytes((f / "00002.png").read_bytes()[:300]), (), "00002.png"),
    (lambda f: (f / "index.csv").write_text("image_id,file\n3,00000.png\n4,00000.png\n"), (), "listed twice"),
    (lambda f: (f / "index.csv").write_text("image_id,file\nx,00000.png\n"), (), "image_id 'x'"),
    (lambda f: (f / "00009.png").write_bytes((f / "00000.png").read_bytes()), (), "does not list (first: 00009.png"),
    (lambda f: Image.new("RGB", (8, 9)).save(f / "00002.png"), (), "00002.png: 8 x 9 pixels, 00000.png has 32 x 32"),
    (lambda f: None, ("--outdir", "/proc/nowhere"), "/proc/nowhere: cannot be written"),
    (lambda f: None, ("--subjects", "1", "--images", "x"), "--subjects: their folders"),
    (lambda f: (f / "index.csv").write_text((f / "index.csv").read_text().replace(",3,", ",X,").replace(
        ",4,", ",3,").replace(",X,", ",4,")), (), "row 0 is image id 4, in"),
    (lambda f: None, ("--eval_clip", "no/such/clip"), "--eval_clip no/such/clip"),
    (lambda f: None, ("--images", "nowhere"), "--images nowhere: not found, neither in"),
    (lambda f: None, ("--compare", "x=nowhere"), "--compare x=nowhere: not found, neither in"),
    (lambda f: None, ("--compare", "x=/no/where"), "/no/where: not found; there are: outputs_all/subj01/cp_4096_v1/"),
    (lambda f: None, ("--cfg_scale", "3"), "cfg_scale 3; evaluate needs only the flags that name the folder: --me"),
    (lambda f: None, ("--sheet_images", "0"), "--sheet_images 0"),
])
def test_what_is_refused(root, capsys, damage, words, message):
    damage(images_of(root))
    argv = ["--root", str(root), "--images", str(images_of(root)), "--eval_clip", "none", *words]
    with contextlib.suppress(SystemExit):  # argparse's own refusals
        assert utils.run_cli(evaluate.main, argv) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and message in error[0]


def test_sheet_shows_each_image_over_its_reconstruction():
    colours = [(200, 10 * i, 50) for i in range(5)]
    solid = [np.full((8, 8, 3), colour, np.uint8) for colour in colours]
    rows = {"seen": solid, "reconstructed": [255 - picture for picture in solid], "shuffled": [None, *solid[1:]]}
    sheet = np.asarray(gallery.contact_sheet(rows, list("abcde"), "title", columns=3)).reshape(-1, 3)
    shape = np.asarray(gallery.contact_sheet(rows, list("abcde"), "title", columns=3)).shape
    places = {}
    for i, colour in enumerate(colours):
        seen = np.flatnonzero((sheet == colour).all(1))
        made = np.flatnonzero((sheet == 255 - np.array(colour)).all(1))
        assert len(seen) == gallery.TILE**2 * (1 if i == 0 else 2) and len(made) == gallery.TILE**2
        places[i] = divmod(seen[0], shape[1])
        row, column = divmod(made[0], shape[1])
        assert column == places[i][1] and row - places[i][0] == gallery.TILE + gallery.GAP
    assert places[3][1] == places[0][1] and places[3][0] > places[0][0]  # the fourth starts the second band


def test_sheet_takes_images_at_even_distances_and_compared_sets_by_id(root, monkeypatch):
    seen = {}
    monkeypatch.setattr("evaluation.gallery.contact_sheet",
                        lambda rows, names, *_: seen.update(rows=rows, names=names) or Image.new("RGB", (1, 1)))
    other = write_set(root / "other", stimuli_of(root)[IDS[:5]])
    run(root, "--subj", 1, "--eval_clip", "none", "--sheet_images", 3, "--compare", f"perfect={other}")
    assert seen["names"] == ["3", "7", "20"] and list(seen["rows"])[:3] == ["seen images", "reconstructed", "perfect"]
    np.testing.assert_array_equal(seen["rows"]["perfect"][1], stimuli_of(root)[7])
    assert seen["rows"]["perfect"][2] is None


def test_controls_that_were_drawn_are_in_the_table_and_on_the_sheet(root, monkeypatch, capsys):
    shown, contact_sheet = {}, gallery.contact_sheet
    monkeypatch.setattr(gallery, "contact_sheet", lambda rows, *rest: shown.update(rows) or contact_sheet(rows, *rest))
    config = json.loads((images_of(root) / "config.json").read_text()) | {"method": "cp_4096_v1"}
    save_json(images_of(root) / "config.json", config)
    write_set(root / "outputs_all/subj01/cp_4096_v1_shuffle/300000/0.2", np.roll(stimuli_of(root)[IDS], 1, axis=0))
    run(root, "--images", images_of(root), "--eval_clip", "none")
    assert list(shown) == ["seen images", "reconstructed", "control: shuffled responses"]
    np.testing.assert_array_equal(shown["control: shuffled responses"][1], stimuli_of(root)[IDS[0]])
    out = capsys.readouterr().out
    rows = dict(re.findall(r"^(set|reconstructed|control: shuffled responses) {2,}(.*)$", out, re.MULTILINE))
    assert rows["set"].split() == ["PixCorr", "SSIM", "sharpness"]
    controlled = json.loads((images_of(root) / "compared.json").read_text())["control: shuffled responses"]["results"]
    for label, found in (("reconstructed", metrics_in(images_of(root))), ("control: shuffled responses", controlled)):
        assert rows[label].split() == [f"{found[name]['value']:.3f}" for name in ("pixcorr", "ssim", "sharpness")]


def test_what_is_of_all_scored_images_says_so(root, capsys):
    """Two pictures are drawn, six images have scores. Without an encoding model the page has no section for it."""
    folder = write_set(root / "two", stimuli_of(root)[IDS[:2]])
    run(root, "--images", folder, "--eval_clip", "none")
    found = metrics_in(folder)
    assert found["pixcorr"]["n"] == 2 and "of" not in found["pixcorr"]
    assert found["brain_to_c_top1"]["n"] == 6 and found["brain_to_c_top1"]["of"] == "all 6 scored images"
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("brain_to_c_top1 "))
    assert line.endswith("6  (all 6 scored images, each among 6)")
    page = (folder / "report/index.html").read_text()
    assert "all 6 scored images, drawn or not" in page and "id=brain" not in page and "#brain" not in page


def test_summary_judges_each_set_against_its_scenes(root, monkeypatch, clip, capsys):
    save_json(root / "demo_attributes.json", [{"kind": i} for i in range(24)])
    stimuli = torch.from_numpy(stimuli_of(root)).permute(0, 3, 1, 2) / 255

    def judged(images, truths):  # right where the picture is exactly the scene's
        right = [bool((image == stimuli[t["kind"]]).all()) for image, t in zip(images, truths, strict=True)]
        return {"kind": np.mean(right)}

    monkeypatch.setattr("judge.judge_images", judged)
    monkeypatch.setattr("judge.chance", lambda truths: {"kind": 1 / 12})
    seen = stimuli_of(root)[IDS]
    folders = {"c": images_of(root), "true": write_set(root / "true", seen),
               "shuffled": write_set(root / "shuffled", np.roll(seen, 1, axis=0))}
    run(root, "--images", folders["true"], "--eval_clip", clip, "--compare",
        *(f"{label}={folders[label]}" for label in ("c", "shuffled")))
    (root / "seconds").mkdir()
    (root / "seconds/data").write_text("12\n")
    argv = ["--root", str(root), "--evaluated", str(folders["true"]), "--seconds", str(root / "seconds"), "--sets",
            *(f"{label}={folder}" for label, folder in folders.items())]
    monkeypatch.setattr(summarise, "read_r2", lambda *_: {"c": {"ridge": 0.5, "network": 0.6, "scored": 0.7}})
    summarise.main(argv)
    summary = json.loads((root / "summary.json").read_text())
    assert list(summary) == ["c", "true", "shuffled", "r2", "seconds"]
    assert list(summary["c"]) == ["kind", "pixcorr", "ssim", "clip_two_way"]
    assert [summary[label]["kind"] for label in folders] == [0, 1, 0]
    assert summary["true"]["pixcorr"] == pytest.approx(1) and summary["shuffled"]["pixcorr"] < 0.9
    compared = json.loads((folders["true"] / "compared.json").read_text())
    assert summary["c"]["ssim"] == compared["c"]["results"]["ssim"]["value"]
    assert summary["r2"]["c"]["ridge"] == 0.5 and summary["seconds"] == {"data": 12.0}
    assert "8%" in capsys.readouterr().out and (root / "contact_sheet.webp").exists()

    with pytest.raises(utils.UserError, match="no pixcorr, ssim, clip_two_way of 'other'"):
        summarise.main([*argv, f"other={folders['c']}"])


def test_compared_sets_are_measured_and_subtracted_image_by_image(root, clip):
    perfect = write_set(root / "perfect", stimuli_of(root)[IDS])
    fewer = write_set(root / "fewer", stimuli_of(root)[IDS[:4]])
    run(root, "--subj", 1, "--eval_clip", clip, "--compare", f"perfect={perfect}", f"fewer={fewer}")
    folder = images_of(root)
    run(root, "--images", perfect, "--eval_clip", clip)
    compared = json.loads((folder / "compared.json").read_text())
    assert compared["perfect"]["results"]["pixcorr"] == metrics_in(perfect)["pixcorr"]
    assert "fewer" not in compared
    each = [{row["image_id"]: float(row["pixcorr"]) for row in load_csv(f / "metrics_per_image.csv", "", "")}
            for f in (folder, perfect)]
    deltas = np.array([each[0][str(i)] - each[1][str(i)] for i in IDS])
    entry = compared["perfect"]["difference"]["pixcorr"]
    assert entry["value"] == pytest.approx(deltas.mean())
    draws = np.random.default_rng(42).integers(6, size=(1000, 6))  # as numpy's own generator draws, one by one
    assert entry["ci_low"] == pytest.approx(np.quantile(deltas[draws].mean(1), 0.025), abs=0.03)
    assert entry["ci_low"] < entry["value"] < entry["ci_high"] < 0
    rows = load_csv(folder / "metrics.csv", "", "")
    assert {row["set"] for row in rows} == {"reconstructed", "perfect"}
    assert (folder / "metrics.tex").read_text().count("&") == 15
    page = (folder / "report/index.html").read_text()
    assert "2 of the images are missing (first: id 12): draw them without --limit" in page


def test_a_report_that_is_replaced_says_what_it_no_longer_compares(root, capsys):
    other, words = write_set(root / "an other", stimuli_of(root)[IDS]), ("--subj", 1, "--eval_clip", "none")
    run(root, *words, "--compare", f"the best={other}")
    assert "no longer compared" not in capsys.readouterr().out
    run(root, *words)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("no longer compared"))
    assert line in (images_of(root) / "report/index.html").read_text().replace("&#39;", "'")
    run(root, *words, *shlex.split(line.partition("keep with ")[2]))  # as it says
    assert "the best" in json.loads((images_of(root) / "compared.json").read_text())
    assert "no longer compared" not in capsys.readouterr().out


def test_sets_that_were_drawn_otherwise_are_said_so(root, capsys):
    pictures = stimuli_of(root)[IDS]
    config = json.loads((images_of(root) / "config.json").read_text()) | {"method": "cp_4096_v1", "run": "ridge"}
    own = config | {"cfg_scale": 5.0, "feats": ["g_2"], "guidance_rule": "raw", "guidance_scale": 1.0}
    save_json(images_of(root) / "config.json", own)
    sets = {"same": own | {"commit": "x", "method": "b"}, "other": own | {"cfg_scale": 7.5, "guidance_rule": "norm"},
            "repeated": own | {"guidance_repeats": 2},
            "unguided": config | {"cfg_scale": 5.0, "feats": []}}
    for label, settings in sets.items():
        save_json(write_set(root / label, pictures) / "config.json", settings)
    save_json(write_set(root / "twice", pictures.repeat(2, 0), samples=2) / "config.json", own)
    shuffled = root / "outputs_all/subj01/cp_4096_v1_shuffle/300000/0.2"
    save_json(write_set(shuffled, pictures) / "config.json", own | {"control": "shuffle"})
    run(root, "--images", images_of(root), "--eval_clip", "none", "--compare", *(f"{s}={s}" for s in (*sets, "twice")))
    out, page = capsys.readouterr().out, (images_of(root) / "report/index.html").read_text()
    said = dict(re.findall("^(.*): drawn otherwise than what is evaluated: (.*)$", out, re.MULTILINE))
    assert said == {"other": "cfg_scale 7.5, not 5.0; guidance_rule norm, not raw", "unguided": "feats none, not g_2",
                    "repeated": "guidance_repeats 2, not 1",
                    "twice": "2 pictures of each image, not 1"}
    assert all(how in page for how in said.values())
    assert "baseline: ridge" not in out  # one of the sets is it


def test_a_control_that_was_drawn_otherwise_is_no_control(root, capsys):
    """Of more steps or another CFG scale, what it lacks would not be the brain's alone."""
    pictures = stimuli_of(root)[IDS]
    own = json.loads((images_of(root) / "config.json").read_text()) | {
        "method": "cp_4096_v1", "steps": 16, "cfg_scale": 5.0, "seed": 42}
    save_json(images_of(root) / "config.json", own)
    shuffled, label = root / "outputs_all/subj01/cp_4096_v1_shuffle/300000/0.2", "control: shuffled responses"
    save_json(write_set(shuffled, pictures) / "config.json", own | {"control": "shuffle"})
    words = "--images", images_of(root), "--eval_clip", "none"
    run(root, *words)
    assert label in json.loads((images_of(root) / "compared.json").read_text())
    for changed in ({"steps": 50}, {"cfg_scale": 7.5}, {"seed": 1}):
        save_json(shuffled / "config.json", own | {"control": "shuffle"} | changed)
        run(root, *words)
        (name, value), = changed.items()
        said = f"drawn otherwise than what is evaluated ({name} {value}, not {own[name]})"
        assert f"{label}: not measured, {said}" in capsys.readouterr().out
        assert label not in json.loads((images_of(root) / "compared.json").read_text())
        assert said in (images_of(root) / "report/index.html").read_text()


def test_few_images_are_said_so_and_what_is_missing_is_said_shortly(root, capsys):
    run(root, "--subj", 1, "--eval_clip", "none")
    lines = capsys.readouterr().out.splitlines()
    assert "n = 6: intervals and ranks of so few images say little" in lines
    assert "brain_correlation: missing, no encoding model of subj01 (STAGES=gnet bash scripts/train.sh)" in lines
    assert "n = 6:" in (images_of(root) / "report/index.html").read_text()
    config = json.loads((images_of(root) / "config.json").read_text()) | {"subj": "subj03", "method": "cp_4096_v1"}
    save_json(images_of(root) / "config.json", config)
    run(root, "--subj", 1, "--eval_clip", "none")
    lines = capsys.readouterr().out.splitlines()
    assert "brain_correlation: missing, no encoding model of subj03 (SUBJ=3 STAGES=gnet bash scripts/train.sh)" in lines
    assert "control: noise responses: not measured, score and draw it with --control noise" in lines


def test_one_reason_is_one_line():
    absent = {"control: a": "x not found", "control: b": "draw it", "ceiling: c": "x not found"}
    assert results.format_absent(absent).splitlines() == ["control: a, ceiling: c: not measured, x not found",
                                                          "control: b: not measured, draw it"]


def test_rates_of_right_and_wrong_images_have_the_exact_interval(root, clip):
    write_set(root / "perfect", stimuli_of(root)[IDS])
    run(root, "--images", "perfect", "--eval_clip", clip)
    found = metrics_in(root / "perfect")
    for name, right in (("clip_two_way", 6), ("clip_top1", 6), ("brain_to_c_top1", 5)):
        expected = scipy.stats.binomtest(right, 6).proportion_ci(method="exact")
        entry = found[name]
        assert entry["value"] == pytest.approx(right / 6), name
        assert (entry["ci_low"], entry["ci_high"]) == pytest.approx((expected.low, expected.high)), name
    for right, n in ((0, 4), (3, 9)):
        expected = scipy.stats.binomtest(right, n).proportion_ci(method="exact")
        assert metrics.exact_ci(np.arange(n) < right) == pytest.approx((expected.low, expected.high))


def test_all_images_are_a_gallery_only_where_there_are_more_than_it_holds(root, monkeypatch):
    run(root, "--subj", 1, "--eval_clip", "none")
    assert "brain_to_c_top1_of_all" not in metrics_in(images_of(root))
    monkeypatch.setattr(metrics, "GALLERY", 4)
    run(root, "--subj", 1, "--eval_clip", "none")
    found = metrics_in(images_of(root))
    assert (found["brain_to_c_top1"]["gallery"], found["brain_to_c_top1_of_all"]["gallery"]) == (4, 6)
    entry = found["brain_to_c_top1"]  # one image is missed in each gallery that has its rival: no share is 0 or 1 alone
    assert 0 < entry["ci_low"] < entry["value"] < entry["ci_high"] <= 1


def test_variance_explained_is_scikit_learns_and_beside_it_the_ridges(root, capsys):
    """A feature without components: about the test images' own mean, over all numbers."""
    (scores,) = (root / "scores_all").rglob("nsdgeneral.npy")
    with h5py.File(root / "nsddata_stimuli/stimuli/nsd/c_all.hdf5") as file:
        true = file["data"][:][IDS]
    predicted = np.load(scores).reshape(true.shape) * 0.7
    save_scores(scores.parent, IDS, {"nsdgeneral": predicted}, {"r2": {"ridge": 0.25, "network": 0.5, "scored": 0.55}})
    run(root, "--subj", 1, "--eval_clip", "none")
    entry = metrics_in(images_of(root))["r2_c"]
    wanted = sklearn.metrics.r2_score(true, predicted, multioutput="variance_weighted")
    assert entry["value"] == pytest.approx(wanted) and entry["ci_low"] < wanted < entry["ci_high"]
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("c  "))
    assert line.split() == ["c", "0.250", "0.500", "0.550", f"{wanted:.3f}"]


def test_an_evaluation_keeps_what_it_extracted(root, clip, monkeypatch):
    """Run again it asks no network anything; a picture that changed is seen anew."""
    calls, network = [], networks.Network.__call__
    monkeypatch.setattr(networks.Network, "__call__",
                        lambda self, images: calls.append(len(images)) or network(self, images))
    words = ["--subj", 1, "--eval_clip", clip, "--batch_size", 4]
    run(root, *words)
    assert calls == [4, 2, 4, 2]  # seen, reconstructed
    first = metrics_in(images_of(root))
    run(root, *words)
    assert len(calls) == 4 and metrics_in(images_of(root)) == first
    Image.fromarray(stimuli_of(root)[IDS[0]]).save(images_of(root) / "00000.png")
    run(root, *words)
    assert calls[4:] == [4, 2] and metrics_in(images_of(root))["pixcorr"]["value"] > first["pixcorr"]["value"]


def test_kept_features_have_a_limit_and_are_emptied_when_asked(root, clip, capsys):
    words, folder = ["--subj", 1, "--eval_clip", clip], root / "outputs_all/.features"
    run(root, *words)
    kept = {file: file.stat().st_size for file in folder.glob("*.npy")}
    assert f"{utils.in_bytes(sum(kept.values()))} of --cache_gb 20 (0 empties it)" in capsys.readouterr().out
    oldest = max(kept, key=kept.get)
    os.utime(oldest, (0, 0))
    store = networks.FeatureStore(folder, 4)
    assert store.trim(sum(kept.values()) - 1) == sum(kept.values()) - kept[oldest]
    assert set(folder.glob("*.npy")) == kept.keys() - {oldest}
    first = metrics_in(images_of(root))
    run(root, *words, "--cache_gb", 0)
    assert not list(folder.glob("*.npy")) and metrics_in(images_of(root))["clip_two_way"] == first["clip_two_way"]
    assert utils.run_cli(evaluate.main, ["--root", str(root), "--cache_gb", "-1"]) == 2


def test_features_read_in_parts_correlate_as_at_once():
    rng = np.random.default_rng(0)
    reals, preds = rng.standard_normal((2, 11, 40)).astype(np.float32)
    preds[3] = 0.7
    whole = np.corrcoef(reals, preds + 1e-9 * rng.standard_normal((11, 40)))[:11, 11:]
    found = metrics.correlations(reals, preds, at_once=7)
    np.testing.assert_allclose(np.delete(found, 3, 1), np.delete(whole, 3, 1), atol=1e-6)
    assert not found[:, 3].any()  # a constant row correlates with nothing


def test_subjects_have_a_row_each_and_a_mean(root, capsys):
    paths = Paths(root, root)
    for subj, noise in (("subj01", 0), ("subj02", 90)):
        folder = paths.images(subj, "cp_4096_v1", 100, 0.2)
        pictures = stimuli_of(root)[IDS].astype(float) + np.random.default_rng(0).normal(0, noise, (6, SIDE, SIDE, 3))
        write_set(folder, pictures.clip(0, 255).astype(np.uint8))
    run(root, "--subjects", 1, 2, "--guidance_scale", 100, "--eval_clip", "none")
    found = json.loads((root / "outputs_all/cp_4096_v1_subjects.json").read_text())
    one, two = (found["subjects"][subj]["pixcorr"]["value"] for subj in ("subj01", "subj02"))
    assert one == pytest.approx(1) and two < 0.9
    assert found["mean"]["pixcorr"] == pytest.approx((one + two) / 2)
    assert "subj01" in capsys.readouterr().out
