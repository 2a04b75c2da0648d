"""recon.py on random scores and random tiny models: which pictures it draws, where, and what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import options
import recon
import utils
from disk.files import load_csv, this_host
from disk.names import Paths, run_name
from disk.scores import save_scores
from features.components import create_file
from sampling import folders
from sampling.drawing import Sampler
from sampling.guidance import RULES
from sampling.pipeline import GuidedPipeline
from tiny_sd import LATENT, TOKENS, WIDTH, draw_at_once, hasten
from training.team import Team

REPO = Path(__file__).resolve().parent.parent
N = 5
K = 6  # components of a g_k
IDS = np.array([3, 10, 11, 500, 72_999])


@pytest.fixture
def models(tiny_models, monkeypatch):
    hasten(monkeypatch, at_once=N)
    return tiny_models


@pytest.fixture
def root(tmp_path):
    """A root with random scores of c, g_2, g_4 (and of z) for five test images."""
    rng = np.random.default_rng(0)
    for feat, shape in {"c": (TOKENS, WIDTH), "g_2": (5, 12), "g_4": (5, 12), "z": (4, LATENT, LATENT)}.items():
        save_scores(score_folder(tmp_path, feat), IDS, {"nsdgeneral": rng.standard_normal((N, *shape))}, {})
    return tmp_path


@pytest.fixture
def demo(tmp_path):
    """A root with random scores that fit the demo's models, and these models: large enough that rounding shows."""
    models = REPO / "demo/models/sd", REPO / "demo/models/clip"
    text, vision = (json.loads((folder / "config.json").read_text()) for folder in (models[0] / "unet", models[1]))
    patches = (vision["vision_config"]["image_size"] // vision["vision_config"]["patch_size"]) ** 2
    tokens = json.loads((models[0] / "tokenizer/tokenizer_config.json").read_text())["model_max_length"]
    rng = np.random.default_rng(0)
    for feat, shape in {"c": (tokens, text["cross_attention_dim"]),
                        "g_2": (patches + 1, vision["vision_config"]["hidden_size"])}.items():
        save_scores(score_folder(tmp_path, feat), IDS, {"nsdgeneral": rng.standard_normal((N, *shape))}, {})
    return tmp_path, models


GUIDED = ("--guidance_strength", 0.5, "--guidance_scale", 300)


def score_folder(root, feat, control=None):
    name = run_name("finetune", "subj01", feat, 1024) + (f"_{control}" if control else "")
    return Paths(root, root).scores("subj01", name, feat)


def run(root, models, *flags):
    """Run recon and return its exit status."""
    return utils.run_cli(recon.main, words(root, models, *flags))


def words(root, models, *flags):
    """The command line of a small run."""
    found = ["--root", root, "--sd_model", models[0], "--clip_model", models[1], "--guidance_decoder", "full",
             "--num_inference_steps", 4, "--feats", "g_2", "g_4", "--device", "cpu", "--batch_size", 2, "--z", "none",
             "--guidance_rule", "raw", *flags]  # random scores are no measurements: they have no errors
    return [str(word) for word in found]


def pictures(folder):
    return {file.name: np.asarray(Image.open(file)).astype(int) for file in sorted(folder.glob("*.png"))}


def files(folder):
    """{name: bytes} of everything in a folder, hidden files too."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def folder_of(root, scale="300000", strength="0.2", method="cp_4096_v1"):
    return root / "outputs_all/subj01" / method / scale / strength


def unguided_folder(root, method="cp_4096_v1"):
    return folder_of(root, "0", "0", method)


def test_writes_pictures_index_and_config(root, models):
    assert run(root, models, "--num_samples", 2) == 0
    folder = folder_of(root)
    found = pictures(folder)
    assert list(found) == [name for i in range(N) for name in (f"{i:05d}.png", f"{i:05d}_s1.png")]
    assert all(picture.shape == (2 * LATENT, 2 * LATENT, 3) for picture in found.values())
    index = load_csv(folder / "index.csv", "index", "")
    assert [(row["file"], int(row["row"]), int(row["image_id"]), int(row["sample"])) for row in index] == [
        (name, i // 2, IDS[i // 2], i % 2) for i, name in enumerate(found)]
    config = json.loads((folder / "config.json").read_text())
    assert config["guidance_scale"] == 300000 and config["feats"] == ["g_2", "g_4"] and config["precision"] == "fp32"
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_subset_draws_the_same_pictures_to_the_bit(root, models, monkeypatch, at_once):
    """Whatever the subset, its order, the batch size and the samples beside; at_once: pictures a CPU draws at once."""
    draw_at_once(monkeypatch, at_once)
    rows, context_of = [], GuidedPipeline.context_of
    monkeypatch.setattr(GuidedPipeline, "context_of", lambda self, c: rows.append(len(c)) or context_of(self, c))
    run(root, models, *GUIDED, "--outdir", root / "all", "--batch_size", 5, "--num_samples", 2)
    run(root, models, *GUIDED, "--outdir", root / "some", "--ids", 500, 10)
    run(root, models, *GUIDED, "--outdir", root / "first", "--limit", 2, "--batch_size", 1)
    assert set(rows) == {at_once}  # networks' last digits depend on how many rows go through them together
    everything = files(root / "all")
    for folder, names in (("some", ("00001.png", "00003.png")), ("first", ("00000.png", "00001.png"))):
        found = files(root / folder)
        assert [name for name in found if name.endswith("png")] == list(names)
        assert all(found[name] == everything[name] for name in names)


def test_two_processes_write_the_files_of_one(demo, one_launch):
    """A real launch, with the project's own configuration; each process has half of the threads."""
    root, models = demo
    flags = (*GUIDED, "--feats", "g_2", "--limit", 3, "--num_inference_steps", 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert run(root, models, *flags, "--outdir", root / "one") == 0
    finally:
        torch.set_num_threads(threads)
    environment = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}  # recon.py's own
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", REPO / "scripts/accelerate/ddp.yaml",
              "--num_processes", "2", REPO / "src/recon.py"]
    shared = [*launch, *words(root, models, *flags, "--outdir", root / "two")]
    one_thread = environment | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(shared, capture_output=True, text=True, check=False, env=one_thread)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("3 pictures wanted, 0 exist") == 1
    assert files(root / "one") == files(root / "two")


def test_processes_draw_different_pictures(root, models, monkeypatch):
    drawn = []
    monkeypatch.setattr("sampling.drawing.draw", lambda jobs, *rest: drawn.append(jobs))
    monkeypatch.setattr(Team, "wait", lambda self: None)
    monkeypatch.setattr(folders, "write_index", lambda *args: None)
    for rank in (1, 0, 2):
        monkeypatch.setattr(Team, "assemble", lambda *device, rank=rank: Team("cpu", rank, 3))
        assert run(root, models, "--num_samples", 2) == 0
    assert sorted(job for jobs in drawn for job in jobs) == [(row, sample) for row in range(N) for sample in range(2)]
    assert max(map(len, drawn)) - min(map(len, drawn)) <= 1


def test_a_killed_run_ends_as_an_uninterrupted_one(root, models):
    flags = ("--num_samples", 6, "--num_inference_steps", 6)
    program = ("import sys, sampling.pipeline, recon; sampling.pipeline.CPU_BATCH = int(sys.argv.pop()); "
               "recon.main(sys.argv[1:])")
    command = [sys.executable, "-c", program, *words(root, models, *flags, "--outdir", root / "killed"),
               str(N * LATENT**2)]  # as hastened here
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=REPO / "src")
    while not list((root / "killed").glob("*.png")) and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = len(list((root / "killed").glob("*.png")))
    assert 0 < done < 30
    cut = root / f"killed/.00000.png.{this_host()}.{process.pid}.tmp"
    cut.write_bytes(b"what a kill in the middle of a picture leaves")
    for name in ("killed", "whole"):
        assert run(root, models, *flags, "--outdir", root / name) == 0
    assert files(root / "killed") == files(root / "whole")


def test_a_cut_picture_is_drawn_again(root, models):
    run(root, models)
    before = files(folder_of(root))
    for name, length in (("00001.png", 100), ("00002.png", 0)):
        (folder_of(root) / name).write_bytes(before[name][:length])
    assert run(root, models) == 0
    assert files(folder_of(root)) == before
    assert all(folders.is_whole(file) for file in folder_of(root).glob("*.png"))


def test_memory_does_not_grow_with_the_number_of_test_images(root, models):
    def peak(n):
        rng = np.random.default_rng(0)
        for feat, shape in {"c": (TOKENS, WIDTH), "g_2": (5, 12), "g_4": (5, 12)}.items():
            rows = {"nsdgeneral": rng.standard_normal((n, *shape))}
            save_scores(score_folder(root, feat), np.arange(n), rows, {})
        tracemalloc.start()  # sees NumPy's arrays; PyTorch's are those of a batch
        assert run(root, models, "--limit", 2, "--num_inference_steps", 1, "--overwrite") == 0
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(10)  # imports and caches
    few, many = peak(3000), peak(9000)  # more of them are 5.6 MB more; a file is hashed by the MB
    assert many - few < 1e6


@pytest.mark.parametrize("flags", [("--sag_scale", 0.75), ("--guidance_decoder", "half"), ("--resolution", 24),
                                   ("--guidance_grad", "x0"), ("--guidance_x0", "cfg")])
def test_options_of_the_sampler_reach_it(root, models, flags, capsys):
    strong = ("--guidance_scale", 3000, "--limit", 1)
    run(root, models, *strong, "--outdir", root / "plain")
    assert run(root, models, *strong, *flags, "--outdir", root / "other") == 0
    assert ("cosine of its gradient with the full decoder's 0." in capsys.readouterr().out) == ("half" in flags)
    assert files(root / "plain")["00000.png"] != files(root / "other")["00000.png"]
    side = 24 if "--resolution" in flags else 2 * LATENT
    assert pictures(root / "other")["00000.png"].shape == (side, side, 3)


def test_true_features_have_their_own_scores_and_folder(root, models):
    for feat, shape in {"c": (TOKENS, WIDTH), "g_2": (5, 12), "g_4": (5, 12)}.items():
        folder = Paths(root, root).scores("subj01", f"ground_truth_subj01_{feat}_val", feat)
        save_scores(folder, IDS, {"nsdgeneral": np.ones((N, *shape))}, {})
    assert run(root, models, "--run", "ground_truth", "--test_split", "val", "--limit", 1) == 0
    assert pictures(folder_of(root, method="cp_4096_v1_ground_truth_val")) and not folder_of(root).exists()


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
    assert all(np.array_equal(picture, before[name]) for name, picture in pictures(folder).items())
    assert len(load_csv(folder / "index.csv", "index", "")) == N


def test_index_lists_pictures_of_earlier_runs(root, models):
    run(root, models, "--num_samples", 2, "--limit", 1)
    run(root, models, "--ids", 72_999)
    index = load_csv(folder_of(root) / "index.csv", "index", "")
    assert [row["file"] for row in index] == ["00000.png", "00000_s1.png", "00004.png"]
    assert [int(row["image_id"]) for row in index] == [3, 3, 72_999]


def test_other_settings_are_refused_unless_overwritten(root, models, capsys):
    run(root, models)
    assert run(root, models, "--seed", 1, "--cfg_scale", 3) == 2
    message = capsys.readouterr().err
    assert "cfg_scale 7.5 -> 3.0" in message and "seed 42 -> 1" in message and "--overwrite" in message
    assert run(root, models, "--seed", 1, "--limit", 2, "--overwrite") == 0
    assert list(pictures(folder_of(root))) == ["00000.png", "00001.png"]  # none of the old seed stays


def test_a_root_that_moved_has_the_same_pictures(root, models, tmp_path_factory, capsys):
    """Models under the root are recorded from there."""
    for model in models:
        shutil.copytree(model, root / "models" / model.name)
    moved = tmp_path_factory.mktemp("elsewhere") / "root"
    inside = [Path("models", model.name) for model in models]
    assert run(root, inside, "--limit", 1, *GUIDED) == 0
    root.rename(moved)
    capsys.readouterr()
    assert run(moved, inside, "--limit", 1, *GUIDED) == 0
    assert "1 pictures wanted, 1 exist" in capsys.readouterr().out


def test_new_scores_are_other_settings(root, models, capsys):
    run(root, models, "--limit", 1)
    rng = np.random.default_rng(9)
    save_scores(score_folder(root, "g_4"), IDS, {"nsdgeneral": rng.standard_normal((N, 5, 12))}, {})
    assert run(root, models, "--limit", 2) == 2
    assert "(other scores than then: g_4); --overwrite" in capsys.readouterr().err


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
        save_scores(folder, IDS, {"nsdgeneral": rng.standard_normal((N, *shape))}, {})
    assert run(root, models, "--control", "shuffle", "--limit", 1) == 0
    assert pictures(folder_of(root, method="cp_4096_v1_shuffle")) and not folder_of(root).exists()


def test_z_starts_the_drawing(root, models):
    file = score_folder(root, "z") / "nsdgeneral.npy"
    flags = ("--feats", "none", "--limit", 2, "--strength", 0.5)
    run(root, models, *flags, "--method", "scores", "--z", "scores")
    run(root, models, *flags, "--method", "file", "--z", file)
    run(root, models, *flags, "--method", "pure")
    scores, from_file, pure = (pictures(unguided_folder(root, m)) for m in ("scores", "file", "pure"))
    assert all(np.array_equal(picture, from_file[name]) for name, picture in scores.items())
    assert scores and any(np.abs(scores[name] - pure[name]).max() > 1 for name in pure)
    config = folders.read_images(unguided_folder(root, "file")).config  # evaluate.py takes them
    assert folders.features_in(config) == ["c"] and "start" in config["score_hashes"]


def test_scores_of_other_ids_are_refused(root, models, capsys):
    folder = score_folder(root, "g_4")
    np.save(folder / "image_ids.npy", IDS + [0, 0, 1, 0, 0])
    assert run(root, models) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert str(folder / "image_ids.npy") in message and str(score_folder(root, "c") / "image_ids.npy") in message


@pytest.mark.parametrize("feat, row", [("c", 0), ("g_4", 4)])
def test_scores_that_are_not_finite_are_refused(root, models, feat, row, capsys):
    file = score_folder(root, feat) / "nsdgeneral.npy"
    array = np.load(file)
    array[row, 1, 2] = np.nan
    np.save(file, array)
    assert run(root, models) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and str(file) in message and f"row {row} (image id {IDS[row]})" in message
    assert not folder_of(root).exists()


@pytest.mark.parametrize("batch_size, hint", [(8, "lower it (--batch_size 4)"), (1, "--guidance_decoder half")])
def test_a_batch_that_does_not_fit_says_what_to_lower(root, models, batch_size, hint, monkeypatch, capsys):
    def decode(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(GuidedPipeline, "decode", decode)
    assert run(root, models, "--batch_size", batch_size) == 2
    message = error_of(capsys)
    assert f"--batch_size {batch_size}: does not fit" in message and hint in message
    monkeypatch.undo()
    assert run(root, models, "--precision", "bf16", "--limit", 1) == 0  # nothing was drawn that could differ


def test_a_cheaper_decoder_is_not_compared_where_the_full_one_does_not_fit(root, models, monkeypatch, capsys):
    def no_room(*args, **seen):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr("sampling.drawing.gradient_cosine", no_room)
    assert run(root, models, "--guidance_decoder", "half", "--limit", 1) == 0
    assert "is not compared" in capsys.readouterr().out and len(pictures(folder_of(root))) == 1


def test_what_never_came_to_a_picture_does_not_bind(root, models):
    assert run(root, models, "--resolution", 17) == 2
    assert run(root, models, "--limit", 1) == 0


def test_a_diverged_picture_does_not_keep_the_others_back(root, models, monkeypatch, capsys):
    draw = Sampler.draw

    def one_diverges(self, jobs):
        images, steps = draw(self, jobs)
        images[2] = float("nan")
        return images, steps

    monkeypatch.setattr(Sampler, "draw", one_diverges)
    assert run(root, models) == 2
    assert "diverged (NaN) on 1 of 5 pictures (first: image id 11)" in error_of(capsys)
    assert list(pictures(folder_of(root))) == ["00000.png", "00001.png", "00003.png", "00004.png"]


def test_a_full_disk_is_one_line(root, models, monkeypatch, capsys):
    def save(*args):
        raise OSError(28, "No space left on device", "00000.png")

    monkeypatch.setattr(folders, "save_picture", save)
    assert run(root, models) == 2
    assert "No space left on device" in error_of(capsys)


def error_of(capsys):
    """The one error line of a run."""
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return error


def test_a_model_without_a_component_is_refused(root, models, tmp_path, capsys):
    (tmp_path / "half_a_model").mkdir()
    for part in ("tokenizer", "text_encoder", "scheduler", "vae", "model_index.json"):
        (tmp_path / "half_a_model" / part).symlink_to(models[0] / part)
    assert run(root, (tmp_path / "half_a_model", models[1])) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and "has no unet" in error[0]


@pytest.mark.parametrize("flags, message", [
    (("--resolution", 17), "--resolution 17: wanted a multiple of 2"),
    (("--offload",), "--offload: there is no GPU"),
    (("--compile", "--sag_scale", 1), "--compile: cannot watch"),
    (("--num_samples", 0), "--num_samples 0"),
    (("--feats", "g_2", "g_6"), "Linear-6/nsdgeneral.npy: scores of g_6 not found"),
    (("--sag_scale", -1), "--sag_scale -1"),
    (("--sag_scale", 1, "--resolution", 8), "--sag_scale 1: blurs over 9"),
    (("--guidance_rule", "norm", "--guidance_scale", 2), "wanted at most 0.6"),
    (("--num_inference_steps", 1000), "--num_inference_steps 1000: the model knows 999"),
    (("--guidance_decoder", "MODEL/vae"), "it is an AutoencoderKL"),
    (("--device", "tpu9"), "--device tpu9: not a device"),
    (("--z", "somewhere"), "--z somewhere: wanted scores, none, or an .npy"),
    (("--outdir", "/proc/nowhere"), "/proc/nowhere"),
    (("--ids", 4), "--ids 4"),
    (("--limit", 0), "--limit 0"),
    (("--guidance_strength", 1.5), "--guidance_strength 1.5"),
    (("--sd_model", "nowhere_to_be_found/"), "--sd_model nowhere_to_be_found/"),
    (("--subj", 2), "scores of c not found; there are: subj01/pretrained_subj01_40sess_ext1_c_1024_mlp (--subj 1)"),
    (("--z", "missing.npy"), "missing.npy: --z: latents not found"),
    (("--run", "scratch"), "scratch_subj01_40sess_ext1_c_1024_mlp"),
    (("--root", "nowhere"), "--root nowhere"),
])
def test_mistakes_give_one_line_and_exit_2(root, models, flags, message, capsys):
    assert run(root, models, *(str(flag).replace("MODEL", str(models[0])) for flag in flags)) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and message in error[0]


@pytest.mark.parametrize("flags", [("--feats", "g_3"), ("--feats", "c"), ("--subj", "100"), ("--guidance", "1"),
                                   ("--seed", "-1"), ("--limit", "inf")])
def test_flags_that_do_not_parse_exit_2(root, models, flags):
    with pytest.raises(SystemExit) as stop:
        run(root, models, *flags)
    assert stop.value.code == 2


# --- measurements, and the choice among pictures ----------------------------------------------------------------------


@pytest.fixture
def measured(root):
    """The root, its g with components and errors, as score_g.py leaves them."""
    paths, rng = Paths(root, root), np.random.default_rng(0)
    paths.stimuli.mkdir(parents=True)
    for feat in ("g_2", "g_4"):
        fit = SimpleNamespace(basis=np.linalg.qr(rng.standard_normal((60, 60)))[0][:K].astype(np.float32),
                              mean=np.zeros(60, np.float32), variances=np.arange(K, 0, -1).astype(np.float32),
                              total=30.0, kept=0.7, n_fitted=9)
        create_file(paths, feat, fit, 8, (5, 12), {"seed": 1, "wanted": K, "source": "x"})
        scores = {"nsdgeneral": rng.standard_normal((N, 5, 12))}
        save_scores(score_folder(root, feat), IDS, scores, {}, {"errors": np.full(K + 1, 0.5)})
    return root


def measure(root, models, *flags):
    """Run recon with the posterior rule and its defaults; returns its exit status."""
    return run(root, models, "--guidance_rule", "posterior", *flags)


def chosen(folder):
    return load_csv(folder / "index.csv", "index", "")


def test_every_rule_has_its_defaults():
    assert set(recon.DEFAULTS) == set(options.RULES) == set(RULES)
    assert recon.get_parser().parse_args([]).guidance_rule == "posterior"


@pytest.mark.parametrize("rule, status", [("posterior", 2), ("norm", 0)])
def test_a_folder_from_before_there_were_draws(measured, models, tmp_path, rule, status):
    """The posterior rule has had other steps then; norm draws what it did."""
    flags = ("--guidance_rule", rule, "--guidance_draws", 0, "--limit", 1, "--outdir", tmp_path / "pictures")
    assert run(measured, models, *flags) == 0
    file = tmp_path / "pictures/config.json"
    config = json.loads(file.read_text())
    config.pop("guidance_draws", None)
    file.write_text(json.dumps(config))
    assert run(measured, models, *flags) == status


@pytest.mark.parametrize("rule, flag", [("posterior", "--guidance_repeats"), ("norm", "--guidance_draws")])
def test_a_usual_setting_differs_from_one_that_was_not(measured, models, tmp_path, capsys, rule, flag):
    flags = ("--guidance_rule", rule, "--limit", 1, "--outdir", tmp_path / "pictures")
    assert run(measured, models, *flags, flag, 2) == 0
    assert run(measured, models, *flags) == 2 and f"{flag[2:]} 2 ->" in capsys.readouterr().err


def test_the_posterior_rule_lowers_the_misfit(measured, models):
    assert measure(measured, models) == 0 and measure(measured, models, "--guidance_scale", 0) == 0
    folder = measured / "outputs_all/subj01/cp_4096_v1"
    config = json.loads((folder / "30/0.8/config.json").read_text())
    assert config["guidance_rule"] == "posterior" and "measurements" in config["score_hashes"]
    args = recon.get_parser().parse_args(["--root", str(measured), "--sd_model", str(models[0]), "--clip_model",
                                          str(models[1]), "--feats", "g_2", "g_4"])
    paths = Paths.from_args(args)
    recon.resolve(args, paths)
    scores = {feat: np.load(score_folder(measured, feat) / "nsdgeneral.npy") for feat in args.feats}
    guide = recon.clip_measurements(args, paths, scores, torch.device("cpu"))

    def misfit(name):
        images = np.stack([folders.read_png(file) for file in sorted((folder / name).glob("*.png"))])
        with torch.inference_mode():
            return guide.term(list(range(N)))(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)

    assert (misfit("30/0.8") < misfit("0/0")).all()


def test_a_subset_is_the_same_to_the_bit(measured, models, tmp_path):
    assert measure(measured, models) == 0 and measure(measured, models, "--ids", 10, "--outdir", tmp_path / "one") == 0
    all_of = measured / "outputs_all/subj01/cp_4096_v1/30/0.8"
    assert (tmp_path / "one/00001.png").read_bytes() == (all_of / "00001.png").read_bytes()


def test_no_strength_diverges(measured, models):
    """From pure noise, in every step: what is not finite would be refused."""
    assert measure(measured, models, "--guidance_scale", 1e9, "--guidance_strength", 1) == 0


def test_new_errors_are_other_settings(measured, models, capsys):
    assert measure(measured, models, "--limit", 1) == 0
    np.save(score_folder(measured, "g_2") / "errors.npy", np.full(K + 1, 0.6, np.float32))
    assert measure(measured, models, "--limit", 1) == 2
    assert "other scores than then: measurements" in capsys.readouterr().err


def test_scores_without_errors_are_refused(measured, models, capsys):
    (score_folder(measured, "g_4") / "errors.npy").unlink()
    assert measure(measured, models, "--limit", 1) == 2
    assert "errors of g_4 on validation images not found" in (line := capsys.readouterr().err)
    assert "--guidance_rule raw" in line and not (measured / "outputs_all").exists()
    assert measure(measured, models, "--limit", 1, "--guidance_rule", "raw", "--guidance_scale", 300) == 0


def test_errors_of_other_components_are_refused(measured, models, capsys):
    np.save(score_folder(measured, "g_4") / "errors.npy", np.full(K + 9, 0.5, np.float32))
    assert measure(measured, models, "--limit", 1) == 2
    assert "errors of other components" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [(), ("--guidance_scale", 0)])
def test_the_best_of_several_is_kept(measured, models, flags):
    """Chosen anew by a loop over the pictures; repeated, it stays."""
    assert measure(measured, models, *flags, "--num_samples", 3, "--select", "g", "--limit", 2) == 0
    name = "0/0" if flags else "30/0.8"
    folder, drawn = (measured / "outputs_all/subj01" / method / name
                     for method in ("cp_4096_v1_select_g", "cp_4096_v1"))
    lines, all_of = chosen(folder), chosen(drawn)
    assert len(lines) == 2 and len(all_of) == 6 and sorted(pictures(folder)) == ["00000.png", "00001.png"]
    for row, line in enumerate(lines):
        misfits = [float(value) for value in line["misfits"].split()]
        best = int(np.argmin(misfits))
        assert line["selected_by"] == "g" and int(line["sample"]) == best and len(set(misfits)) == 3
        assert (folder / f"{row:05d}.png").read_bytes() == (drawn / folders.file_name(row, best)).read_bytes()
    assert measure(measured, models, *flags, "--num_samples", 3, "--select", "g", "--limit", 1) == 0
    assert chosen(folder) == lines  # what is there stays
    assert len(folders.read_images(folder).image_ids) == 2


def test_another_number_of_samples_is_another_selection(measured, models, capsys):
    given = ("--select", "g", "--limit", 1, "--guidance_scale", 0)
    assert measure(measured, models, *given, "--num_samples", 2) == 0
    assert measure(measured, models, *given, "--num_samples", 3) == 2
    assert "num_samples 2 -> 3" in capsys.readouterr().err
    assert not list(measured.glob("outputs_all/**/*_s2.png"))  # nothing is drawn first
    assert measure(measured, models, *given, "--num_samples", 3, "--overwrite") == 0


@pytest.mark.parametrize(("flags", "message"), [
    (("--select", "g"), "nothing to choose from"),
    (("--select", "g", "--num_samples", 2, "--feats", "none"), "no g to select by"),
    (("--select", "g", "--num_samples", 2, "--guidance_scale", 0, "--clip_model", "nowhere/x"),
     "--clip_model nowhere/x"),
    (("--select", "gnet", "--num_samples", 2), "the brain encoding model gnet_subj01 not found")])
def test_a_selection_that_cannot_be_is_one_line(measured, models, capsys, flags, message):
    assert measure(measured, models, *flags) == 2
    assert message in capsys.readouterr().err and not (measured / "outputs_all").exists()
