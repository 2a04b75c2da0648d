"""The benchmarks run, and the pictures of the fast sampler are those of the published procedure rendered plainly."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_recon

SHORT = ["--images", "2", "--reference_images", "2", "--rounds", "1", "--num_inference_steps", "8",
         "--guidance_strength", "0.5", "--batch_size", "2", "--device", "cpu"]


def test_fast_and_slow_sampler_draw_the_same():
    """The demo's models: one image at a time, a second pass for guidance and a whole CLIP against the batch."""
    bench = bench_recon.Bench(bench_recon.get_parser().parse_args(SHORT), torch.device("cpu"), torch.float32)
    bench.to_double()
    ours, reference = bench.ours(2), bench.reference(2)
    assert bench.guided == 3 and ours.std() > 0.05
    torch.testing.assert_close(ours, reference, atol=1e-5, rtol=0)


def test_bench_recon_prints_its_ratios(capsys):
    bench_recon.main(SHORT)
    printed = capsys.readouterr().out
    assert "a/c = " in printed and "a/b = " in printed and "decoder with gradient" in printed
