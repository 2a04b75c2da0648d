"""How far do gradients and pictures in half precision agree with those in float32? The demo's trained models.

    python benchmarks/bench_precision.py

The guidance gradient in the first step and half-way (cosine, wanted .999), and the pictures (PSNR, wanted 40 dB), of
recon.py's default. Pictures of a guided path differ by more than its gradients: each step builds on the one before.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import torch.nn.functional as F

import bench_recon
import utils
from training.team import pick_precision


def get_parser():
    parser = bench_recon.get_parser()
    parser.description = __doc__
    parser.set_defaults(images=16)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    device = utils.pick_device(args.device)
    gradients, pictures = draw(args, device, "fp32")
    for precision in ("bf16", "fp16"):
        found, images = draw(args, device, precision)
        cosines = [F.cosine_similarity(a.flatten(1), b.flatten(1)).mean().item()
                   for a, b in zip(found, gradients, strict=True)]
        psnr = -10 * (images - pictures).square().mean((1, 2, 3)).clamp_min(1e-12).log10().mean().item()
        print(f"{precision}: cosine of the gradient with float32's {cosines[0]:.4f} in the first step, "
              f"{cosines[1]:.4f} half-way; pictures {psnr:.1f} dB")


@torch.no_grad()
def draw(args, device, precision):
    """The gradients of two steps on the same latents, and pictures (N, 3, H, W)."""
    bench, n = bench_recon.Bench(args, device, pick_precision(precision, device)), args.images
    flags, pipe = bench.flags, bench.pipe
    latents, timesteps = pipe.start(list(range(n)), z=bench.z[:n], strength=flags.strength,
                                    num_inference_steps=flags.num_inference_steps)
    context = pipe.context_of(bench.c[:n])
    looked_at = timesteps[0], timesteps[len(timesteps) // 2]
    gradients = [pipe.guidance_gradient(latents, t, context, flags.cfg_scale, bench.terms(n), flags.guidance_grad,
                                        decoder=bench.decoder)[2] for t in looked_at]
    return gradients, bench.ours(n)


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
