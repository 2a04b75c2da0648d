"""recon.py on random scores and random tiny models: which pictures it draws, where, and what it refuses."""

import json

import numpy as np
import pytest
from PIL import Image

import recon
import utils
from tiny_sd import LATENT, TOKENS, WIDTH, write_tiny_clip, write_tiny_sd

N = 5
IDS = np.array([3, 10, 11, 500, 72_999])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_tiny_sd(tmp_path_factory.mktemp("sd")), write_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def root(tmp_path):
    """A root with random scores of c, g_2, g_4 (and of z) for five test images."""
    rng = np.random.default_rng(0)
    for feat, shape in {"c": (TOKENS, WIDTH), "g_2": (5, 12), "g_4": (5, 12), "z": (4, LATENT, LATENT)}.items():
        utils.save_scores(score_folder(tmp_path, feat), IDS, {"nsdgeneral": rng.standard_normal((N, *shape))}, {})
    return tmp_path


def score_folder(root, feat, control=None):
    name = utils.run_name("finetune", "subj01", feat, 1024) + (f"_{control}" if control else "")
    return utils.Paths(root, root).scores("subj01", name, feat)


def run(root, models, *flags):
    """Run recon and return its exit status."""
    words = ["--root", root, "--sd_model", models[0], "--clip_model", models[1], "--num_inference_steps", 4,
             "--feats", "g_2", "g_4", "--device", "cpu", "--batch_size", 2, "--z", "none", *flags]
    return utils.run_cli(recon.main, [str(word) for word in words])


def pictures(folder):
    return {file.name: np.asarray(Image.open(file)).astype(int) for file in sorted(folder.glob("*.png"))}


def folder_of(root, scale="300000", strength="0.2", method="cp_4096_v1"):
    return root / "outputs_all/subj01" / method / scale / strength


def unguided_folder(root, method="cp_4096_v1"):
    return folder_of(root, "0", "0", method)


def assert_same(some, others, tolerance=1):
    """Equal up to rounding; batches of another size add up in another order."""
    assert some.keys() == others.keys()
    assert all(np.abs(some[name] - others[name]).max() <= tolerance for name in some)


def test_writes_pictures_index_and_config(root, models):
    assert run(root, models, "--num_samples", 2) == 0
    folder = folder_of(root)
    found = pictures(folder)
    assert list(found) == [name for i in range(N) for name in (f"{i:05d}.png", f"{i:05d}_s1.png")]
    assert all(picture.shape == (2 * LATENT, 2 * LATENT, 3) for picture in found.values())
    index = utils.load_csv(folder / "index.csv", "index", "")
    assert [(row["file"], int(row["row"]), int(row["image_id"]), int(row["sample"])) for row in index] == [
        (name, i // 2, IDS[i // 2], i % 2) for i, name in enumerate(found)]
    config = json.loads((folder / "config.json").read_text())
    assert config["guidance_scale"] == 300000 and config["feats"] == ["g_2", "g_4"] and config["precision"] == "fp32"
    assert not list(folder.glob(".*"))


def test_a_subset_draws_the_same_pictures(root, models):
    gentle = ("--guidance_rule", "norm", "--guidance_strength", 0.5)
    run(root, models, *gentle, "--outdir", root / "all", "--batch_size", 5)
    run(root, models, *gentle, "--outdir", root / "some", "--ids", 500, 10)
    run(root, models, *gentle, "--outdir", root / "first", "--limit", 2, "--batch_size", 1)
    everything = pictures(root / "all")
    assert_same(pictures(root / "some"), {name: everything[name] for name in ("00001.png", "00003.png")})
    assert_same(pictures(root / "first"), {name: everything[name] for name in ("00000.png", "00001.png")})


def test_guidance_and_condition_change_the_picture(root, models):
    run(root, models)
    run(root, models, "--guidance_rule", "norm")
    run(root, models, "--feats", "none")
    guided, normed = (pictures(folder_of(root, scale)) for scale in ("300000", "0.3"))
    plain = pictures(unguided_folder(root))
    assert len(guided) == len(normed) == len(plain) == N
    for some, others in ((guided, plain), (normed, plain), (guided, normed)):
        assert all(np.abs(some[name] - others[name]).max() > 1 for name in plain)


@pytest.mark.parametrize("flags", [("--feats", "none"), ("--feats", ""), ("--guidance_scale", 0),
                                   ("--guidance_strength", 0)])
def test_without_guidance_no_g_and_no_clip_are_needed(root, models, flags):
    (score_folder(root, "g_2") / "nsdgeneral.npy").unlink()
    assert run(root, (models[0], "no_clip_here"), *flags, "--limit", 1) == 0
    assert list(pictures(unguided_folder(root))) == ["00000.png"]


def test_an_unguided_set_does_not_depend_on_guidance_flags(root, models):
    assert run(root, models, "--guidance_scale", 0, "--limit", 1) == 0
    assert run(root, models, "--guidance_scale", 0, "--guidance_rule", "norm", "--guidance_strength", 0.5) == 0
    assert len(pictures(unguided_folder(root))) == N


def test_interrupted_run_continues(root, models, capsys):
    run(root, models)
    folder = folder_of(root)
    before = pictures(folder)
    (folder / "00003.png").unlink()
    (folder / "index.csv").unlink()
    kept = (folder / "00000.png").stat().st_mtime_ns
    assert run(root, models) == 0
    assert "5 pictures wanted, 4 exist" in capsys.readouterr().out
    assert (folder / "00000.png").stat().st_mtime_ns == kept
    assert_same(pictures(folder), before)
    assert len(utils.load_csv(folder / "index.csv", "index", "")) == N


def test_index_lists_pictures_of_earlier_runs(root, models):
    run(root, models, "--num_samples", 2, "--limit", 1)
    run(root, models, "--ids", 72_999)
    index = utils.load_csv(folder_of(root) / "index.csv", "index", "")
    assert [row["file"] for row in index] == ["00000.png", "00000_s1.png", "00004.png"]
    assert [int(row["image_id"]) for row in index] == [3, 3, 72_999]


def test_other_settings_are_refused_unless_overwritten(root, models, capsys):
    run(root, models)
    assert run(root, models, "--seed", 1, "--cfg_scale", 3) == 2
    message = capsys.readouterr().err
    assert "cfg_scale 7.5 -> 3.0" in message and "seed 42 -> 1" in message and "--overwrite" in message
    assert run(root, models, "--seed", 1, "--limit", 2, "--overwrite") == 0
    assert list(pictures(folder_of(root))) == ["00000.png", "00001.png"]  # none of the old seed stays


def test_new_scores_are_other_settings(root, models, capsys):
    run(root, models, "--limit", 1)
    rng = np.random.default_rng(9)
    utils.save_scores(score_folder(root, "g_4"), IDS, {"nsdgeneral": rng.standard_normal((N, 5, 12))}, {})
    assert run(root, models, "--limit", 2) == 2
    assert "score_hashes" in capsys.readouterr().err


def test_pictures_of_unknown_settings_are_refused(root, models, capsys):
    run(root, models, "--limit", 1)
    (folder_of(root) / "config.json").unlink()
    assert run(root, models) == 2
    assert "without their config.json" in capsys.readouterr().err


def test_control_has_its_own_scores_and_folder(root, models, capsys):
    assert run(root, models, "--control", "shuffle") == 2
    assert "_shuffle" in capsys.readouterr().err
    rng = np.random.default_rng(1)
    for feat, shape in {"c": (TOKENS, WIDTH), "g_2": (5, 12), "g_4": (5, 12)}.items():
        folder = score_folder(root, feat, "shuffle")
        utils.save_scores(folder, IDS, {"nsdgeneral": rng.standard_normal((N, *shape))}, {})
    assert run(root, models, "--control", "shuffle", "--limit", 1) == 0
    assert pictures(folder_of(root, method="cp_4096_v1_shuffle")) and not folder_of(root).exists()


def test_z_starts_the_drawing(root, models):
    file = score_folder(root, "z") / "nsdgeneral.npy"
    flags = ("--feats", "none", "--limit", 2, "--strength", 0.5)
    run(root, models, *flags, "--method", "scores", "--z", "scores")
    run(root, models, *flags, "--method", "file", "--z", file)
    run(root, models, *flags, "--method", "pure")
    scores, from_file, pure = (pictures(unguided_folder(root, m)) for m in ("scores", "file", "pure"))
    assert_same(scores, from_file, tolerance=0)
    assert scores and any(np.abs(scores[name] - pure[name]).max() > 1 for name in pure)


def test_scores_of_other_ids_are_refused(root, models, capsys):
    folder = score_folder(root, "g_4")
    np.save(folder / "image_ids.npy", IDS + [0, 0, 1, 0, 0])
    assert run(root, models) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert str(folder / "image_ids.npy") in message and str(score_folder(root, "c") / "image_ids.npy") in message


@pytest.mark.parametrize("flags, message", [
    (("--ids", 4), "--ids 4"),
    (("--limit", 0), "--limit 0"),
    (("--guidance_strength", 1.5), "--guidance_strength 1.5"),
    (("--sd_model", "nowhere_to_be_found/"), "--sd_model nowhere_to_be_found/"),
    (("--subj", 2), "scores not found"),
    (("--z", "missing.npy"), "missing.npy: no decoded latents"),
    (("--run", "scratch"), "scratch_subj01_40sess_ext1_c_1024_mlp"),
    (("--root", "nowhere"), "--root nowhere"),
])
def test_mistakes_give_one_line_and_exit_2(root, models, flags, message, capsys):
    assert run(root, models, *flags) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and message in error[0]


@pytest.mark.parametrize("flags", [("--feats", "g_3"), ("--feats", "c"), ("--subj", "9"), ("--guidance", "1")])
def test_flags_that_do_not_parse_exit_2(root, models, flags):
    with pytest.raises(SystemExit) as stop:
        run(root, models, *flags)
    assert stop.value.code == 2
