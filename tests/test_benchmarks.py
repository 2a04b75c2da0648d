"""The benchmarks run, and the pictures of the fast sampler are those of the published procedure rendered plainly."""

import importlib
import re
import sys
import time
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import bootstrap

from nsd.checks import RUN_BYTES
from sampling.decoders import load_guidance_decoder
from sampling.pipeline import load_pipeline
from tiny_nsd import N_IMAGES
from tiny_sd import LATENT

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_allocator
import bench_busy
import bench_features
import bench_gnet
import bench_recon
import distil_decoder
import gnet_guidance
import gpu
import guidance_choice
import lesions
import recon
import sampler_costs
import stage_costs

ROOT = Path(__file__).resolve().parent.parent
SHORT = ["--images", "2", "--reference_images", "1", "--rounds", "1", "--num_inference_steps", "4", "--published_steps",
         "4", "--device", "cpu", "--guidance_decoder", "full"]


def test_bench_recon_prints_its_ratios_and_both_samplers_draw_the_same(capsys, monkeypatch):
    """The demo's models: one image at a time, a second pass for guidance and a whole CLIP against the batch."""
    monkeypatch.setattr("sampling.pipeline.CPU_BATCH", 2 * 16 * 16)
    ours, reference = (recorded(monkeypatch, bench_recon.Bench, name) for name in ("published", "reference"))
    bench_recon.main(SHORT)
    printed = capsys.readouterr().out
    assert "a/c = " in printed and "a/b = " in printed and "decoder with gradient" in printed
    assert "posterior, ddim, gradient xt through full, 3 steps of which 2 guided" in printed
    assert len(ours[-1]) == 2 and ours[-1].std() > 0.05
    torch.testing.assert_close(ours[-1], reference[-1], atol=1e-5, rtol=0)


def recorded(monkeypatch, kind, method):
    """A list that grows by what each call of kind.method returns."""
    results, real = [], getattr(kind, method)
    monkeypatch.setattr(kind, method, lambda *args: results.append(real(*args)) or results[-1])
    return results


def test_a_distilled_decoder_is_one_for_guidance(paths, tiny_models, tmp_path, capsys):
    """A few steps of distilling, on random latents: it loads and decodes to the image's size."""
    with h5py.File(paths.feature("z"), "w") as file:
        file["data"] = np.random.default_rng(0).standard_normal((N_IMAGES + 100, 4 * LATENT**2)).astype(np.float16)
        file["data"].attrs["shape"] = (4, LATENT, LATENT)
    folder = tmp_path / "taesd"
    distil_decoder.main(["--root", str(paths.root), "--sd_model", str(tiny_models[0]), "--out", str(folder),
                         "--steps", "3", "--batch_size", "2", "--width", "8", "--device", "cpu"])
    assert "dB PSNR on 100 other latents" in capsys.readouterr().out
    pipe = load_pipeline(tiny_models[0], torch.device("cpu"))
    image = load_guidance_decoder(str(folder), pipe)(torch.randn(2, 4, LATENT, LATENT))
    assert image.shape == (2, 3, 2 * LATENT, 2 * LATENT) and 0 <= image.min() and image.max() <= 1


def test_a_stage_is_timed_quiet_and_beside_a_busy_loop(tmp_path, monkeypatch, capsys):
    """In a world of links: what a stage writes is not the demo's."""
    demo = tmp_path / "demo"
    for file in ("settings.sh", "nsddata_stimuli/a.hdf5", "train_logs/run/last.pth", "scores_all/s.npy",
                 "outputs_all/subj01/cp_4096_v1/300/0.4/00000.png"):
        (demo / file).parent.mkdir(parents=True, exist_ok=True)
        (demo / file).write_text("")
    monkeypatch.setattr(bench_busy, "DEMO", demo)
    monkeypatch.setattr(bench_busy, "STAGES", {"stage": "echo + command; sleep .05; echo {n} {epochs}; sleep .05; "
                                                        "rm $ROOT/scores_all/s.npy; touch $ROOT/scores_all/s.npy"})
    monkeypatch.setattr(bench_busy, "print_starts", lambda: None)
    bench_busy.main(["--stages", "stage", "--rounds", "1"])
    name, quiet, busy, _, first, *_ = capsys.readouterr().out.splitlines()[-1].split()
    assert name == "stage" and 0.1 <= float(quiet) and 0.1 <= float(busy) and float(first) <= float(quiet)
    assert not (demo / "scores_all/s.npy").is_symlink()
    monkeypatch.setattr(bench_busy, "STAGES", {"stage": "echo why; exit 3"})
    with pytest.raises(SystemExit, match="(?s)failed.*why"):
        bench_busy.main(["--stages", "stage", "--rounds", "1"])


def test_the_judge_reads_through_gaussian_fields():
    torch.manual_seed(0)
    readout = gnet_guidance.GaussianReadout(2, 5).double()
    with torch.no_grad():
        readout.centre.copy_(torch.tensor([[0.5, -0.2], [-1.0, 0.3]]))
    maps = [torch.randn(1, 3, 4, 4).double(), torch.randn(1, 2, 2, 2).double()]
    found = readout(maps)
    for v in range(2):
        (x0, y0), size, pooled = readout.centre[v], readout.log_size[v].exp(), []
        for feature_map in maps:
            axis = torch.linspace(-1, 1, feature_map.shape[-1]).double()
            field = torch.stack([torch.stack([torch.exp(-((x - x0)**2 + (y - y0)**2) / (2 * size**2)) for x in axis])
                                 for y in axis])
            pooled.append((feature_map[0] * field / field.sum()).sum((1, 2)))
        torch.testing.assert_close(found[0, v], torch.cat(pooled) @ readout.weight[v] + readout.bias[v])


def test_the_best_of_n_is_chosen_by_the_guide():
    tables = [{"guide all": np.array([0.1, 0.5]), "pixcorr": np.array([1.0, 2.0])},
              {"guide all": np.array([0.3, 0.2]), "pixcorr": np.array([3.0, 4.0])}]
    best = gnet_guidance.best_of(tables)
    assert best["pixcorr"].tolist() == [3.0, 2.0]
    mean, low, high = gnet_guidance.difference(best, tables[0], "pixcorr")
    assert mean == 1.0 and low == 0.0 and high == 2.0


def test_pictures_are_compared_at_one_sharpness():
    """Blurred pictures, made as sharp as others of their kind, have these ones' spectrum, and their own phases."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(0)
    others, pictures = (0.5 + 0.1 * rng.standard_normal((40, 16, 16, 3)).clip(-3, 3) for _ in range(2))
    blurred = gaussian_filter(pictures, (0, 0.6, 0.6, 0), mode="wrap")
    found = gnet_guidance.as_sharp_as(others, blurred)

    def power_of_rings(stack):
        rings = {}
        for spectrum in np.fft.fft2(stack, axes=(1, 2)).transpose(0, 3, 1, 2).reshape(-1, 16, 16):
            for y in range(16):
                for x in range(16):
                    distance = round(np.hypot(min(y, 16 - y), min(x, 16 - x)))
                    rings.setdefault(distance, []).append(abs(spectrum[y, x]) ** 2)
        return np.array([np.mean(rings[distance]) for distance in sorted(rings) if distance])

    wanted = power_of_rings(others)
    assert np.abs(power_of_rings(blurred) / wanted - 1).max() > 0.5
    np.testing.assert_allclose(power_of_rings(found), wanted, rtol=0.01)
    np.testing.assert_allclose(found.mean((1, 2)), blurred.mean((1, 2)), atol=1e-3)
    assert np.corrcoef(found.ravel(), pictures.ravel())[0, 1] > 0.9
    np.testing.assert_allclose(gnet_guidance.as_sharp_as(pictures, pictures), pictures.clip(0, 1), atol=1e-12)


def test_bench_gnet_prints_its_ratios(capsys):
    bench_gnet.main([*SHORT, "--voxels", "30", "--train_batch", "5"])
    printed = capsys.readouterr().out
    assert "pooled features computed again:" in printed and "a guided step: with GNet / CLIP alone = " in printed


@pytest.mark.parametrize("task", bench_allocator.TASKS)
def test_bench_allocator_measures_its_tasks(task):
    seconds, faults = bench_allocator.measure(task, repeats=1, kept=False)
    assert seconds > 0 and faults >= 0


def test_bench_features_prints_its_ratios(monkeypatch, capsys):
    """It calls itself for each feature; here in this process, where diffusers is there already."""
    def call(words, check):
        assert words[:2] == [sys.executable, bench_features.__file__] and check
        bench_features.main(words[2:])

    monkeypatch.setattr("bench_features.subprocess.run", call)
    bench_features.main(["--images", "6", "--single_images", "2", "--rounds", "1", "--batch_size", "3", "--num_workers",
                         "0", "--device", "cpu"])
    header, *table = [line for line in capsys.readouterr().out.splitlines()
                      if line.startswith(("  ", "c ", "z ", "g "))]
    assert header.split() == ["images/s", "/", "network", "/", "one", "memory"]
    assert [line.split()[0] for line in table] == ["c", "z", "g"]
    assert all(float(value) > 0 for line in table for value in line.split()[1:4])


def test_the_documents_say_what_stage_costs_counts():
    with torch.device("meta"):
        flops = sum(flops for _, flops in stage_costs.training("components"))
        of_ridge = sum(stage_costs.ridge_flops(n) for n in (1, 1, 6))
    size = {model: sum(size for *_, size in stage_costs.checkpoints(model)) for model in ("components", "ridge")}
    docs = {name: (ROOT / name).read_text() for name in ("README.md", "docs/method.md")}
    assert f"{size['components'] / 1e9:.1f} GB of checkpoints; {flops / 1e15:.1f} petaFLOP" in docs["README.md"]
    assert f"by count {of_ridge / 1e12:.0f} teraFLOP for all features of subject 1" in docs["docs/method.md"]
    assert size["components"] + size["ridge"] < 6e9


def test_the_documents_say_what_a_picture_costs():
    """recon.py's default at Stable Diffusion 1.4's sizes, counted."""
    bench, flags = sampler_costs.Bench(), recon.with_defaults(recon.get_parser().parse_args([]))
    decoder = sampler_costs.decoder_of(flags.guidance_decoder)
    found = bench.settings(flags.guidance_rule, flags.guidance_grad, decoder, flags.num_inference_steps, flags.strength)
    text = (ROOT / "benchmarks/README.md").read_text()
    assert f"| **{found['tflop']:.1f}** | " in text and f"**{found['peak']:.1f} GB ({found[16]})** |" in text
    assert found["tflop"] <= 35 and found["peak"] <= 12


def test_room_for_checkpoints_is_what_they_take():
    for model, known in RUN_BYTES.items():
        by_run = Counter()
        for _, run, size in stage_costs.checkpoints(model):
            by_run[run] += size
        assert 0.9 * known <= max(by_run.values()) <= known, (model, by_run)


def test_the_gain_of_guidance_is_paired_and_its_figure_is_drawn(tmp_path):
    """Against scipy's bootstrap of paired differences; images without a value (no second object) do not count."""
    rng = np.random.default_rng(0)
    plain = {name: rng.random(40) for name in guidance_choice.MEASURES}
    guided = {name: values + rng.normal(0.1, 0.2, 40) for name, values in plain.items()}
    mean, gain, low, high = guidance_choice.gain_of("pixcorr", guided, plain)
    difference = guided["pixcorr"] - plain["pixcorr"]
    wanted = bootstrap((difference,), np.mean, n_resamples=10000, method="percentile", rng=1).confidence_interval
    assert (mean, gain) == pytest.approx((guided["pixcorr"].mean(), difference.mean()))
    assert (low, high) == pytest.approx(tuple(wanted), abs=0.005)
    guided["second"][3] = plain["second"][3] = np.nan
    assert np.isfinite(guidance_choice.gain_of("second", guided, plain)).all()
    added = {name: values + 0.01 for name, values in guided.items()}
    lines = guidance_choice.as_gains(guidance_choice.RESULTS, 2 * [plain, guided, guided, added])
    row = next(line for line in lines if line.startswith("| PixCorr"))
    assert row.split(" | ")[1:] == [f"{plain['pixcorr'].mean():.3f}", f"{gain:+.3f} ({low:.3f} .. {high:.3f})",
                                    "+0.000 (0.000 .. 0.000)", "+0.010 (0.010 .. 0.010) |"]
    assert sum(line.startswith("| what no caption says") for line in lines) == 2  # of each path
    guidance_choice.plot({0: plain, 1: guided, 10: guided}, tmp_path / "figure.png")
    assert min(Image.open(tmp_path / "figure.png").size) > 400


def test_the_rule_takes_the_weakest_of_the_best_strengths_that_cost_nothing():
    plain = {name: np.random.default_rng(0).random(40) for name in guidance_choice.MEASURES}
    tables = {0: plain}
    for scale, gain in ((3, 0.05), (10, 0.095), (30, 0.1), (100, 0.3)):  # 10 and 30 differ by half a point
        tables[scale] = {name: values + gain for name, values in plain.items()}
    tables[100]["ssim"] = plain["ssim"] - 0.001
    assert guidance_choice.chosen_of(tables) == 10
    tables[100]["ssim"] = plain["ssim"] - 0.1 * np.resize([1, -1], 40)  # lower and higher: not measurably lower
    assert guidance_choice.chosen_of(tables) == 100


def test_what_a_lesion_costs_is_paired():
    """Against scipy's bootstrap of paired differences."""
    rng = np.random.default_rng(0)
    whole = {"kind": (rng.random(80) < 0.8).astype(float), "PixCorr": rng.random(80)}
    lesioned = {"kind": whole["kind"] * (rng.random(80) < 0.5), "PixCorr": whole["PixCorr"] - rng.random(80) / 4}
    *_, first, second, _ = lesions.table_of_pictures({"whole responses": whole, "without V1": lesioned})
    assert first == f"| whole responses | {100 * whole['kind'].mean():.0f} | {whole['PixCorr'].mean():.3f} |"
    difference = lesioned["PixCorr"] - whole["PixCorr"]
    wanted = bootstrap((difference,), np.mean, n_resamples=10000, method="percentile", rng=1).confidence_interval
    mean, change, low, high = map(float, re.findall(r"[+-]?\d\.\d{3}", second))
    assert (mean, change) == pytest.approx((lesioned["PixCorr"].mean(), difference.mean()), abs=6e-4)
    assert (low, high) == pytest.approx(tuple(wanted), abs=0.005)
    assert f"({100 * (lesioned['kind'] - whole['kind']).mean():+.0f}: " in second
    assert lesions.name_of({"voxels": "V1,V2"}) == "only V1, V2"


@pytest.mark.parametrize("tiny", [True, False])
def test_gpu_sh_gives_flags_that_its_benchmarks_have(tiny):
    for script, flags in [call for calls in gpu.stages(tiny).values() for call in calls if call[0] != "demo"]:
        importlib.import_module(script.removesuffix(".py")).get_parser().parse_args([*flags, "--device", "cpu"])


def test_gpu_sh_writes_its_page_stage_by_stage(tmp_path, monkeypatch, capsys):
    """At tiny sizes, in this process, the two benchmarks that no other test runs."""
    def call(script, flags, seconds):
        capsys.readouterr()
        few = ["--feats", "c"] if script == "bench_train.py" else ["--images", "1"]
        importlib.import_module(script.removesuffix(".py")).main([*flags, *few])
        return capsys.readouterr().out

    monkeypatch.setattr(gpu, "call", call)
    page = tmp_path / "page.md"
    gpu.main(["--tiny", "--device", "cpu", "--out", str(page), "--only", "agreement", "train"])
    text = page.read_text()
    assert "## agreement: `bench_precision.py" in text and "fp16: cosine of the gradient" in text
    assert "## train: `bench_train.py" in text and "waiting for data" in text


def test_gpu_sh_ends_in_time(tmp_path):
    """What is running is stopped, the rest is not begun, and the page says so."""
    page = tmp_path / "page.md"
    before = time.monotonic()
    found = gpu.call("bench_recon.py", ["--device", "cpu"], 0.5)
    assert "stopped: no time left" in found and time.monotonic() - before < 10
    gpu.main(["--minutes", "0", "--device", "cpu", "--out", str(page)])
    assert page.read_text().count("not run: no time left") == sum(map(len, gpu.stages(False).values()))
