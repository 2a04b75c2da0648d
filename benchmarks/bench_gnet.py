"""What does GNet cost: the memory of a training step at NSD's sizes, and the time that it adds to a guided step.

    python benchmarks/bench_gnet.py                                  # the demo's tiny Stable Diffusion, a CPU: minutes
    python benchmarks/bench_gnet.py --sd_model random --images 1 --rounds 1          # SD 1.4's sizes

Memory: peak of a training step (forward, backward, update) of --voxels voxels and --train_batch images, beyond what the
weights, gradients and moments take (models.VoxelReadout.KEPT); of fewer images also with all pooled features kept.
Time: the same pictures drawn under CLIP guidance alone and with GNet beside it, taking turns; all --voxels guide. Also
the part of a single guided step.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import numpy as np
import torch

import bench_recon
import options
import recon
import utils
from bench_train import anonymous, peak_anonymous, reset_peak
from encoding.encoder import Encoder
from encoding.errors import ResponseErrors
from encoding.guide import PREFLIGHT_IMAGES, BrainMeasurement
from models import GNet, VoxelReadout, gnet_input
from training.objectives import EncodingObjective
from training.team import pick_precision


def get_parser():
    parser = bench_recon.get_parser()
    parser.description = __doc__
    parser.add_argument("--voxels", type=options.whole, default=15724, metavar="N", help="subject 1's")
    parser.add_argument("--train_batch", type=options.whole, default=100, metavar="IMAGES")
    parser.add_argument("--pass_through", type=options.whole, default=64, metavar="CHANNELS", help="train_gnet.py's")
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    device = utils.pick_device(args.device)
    print_memory(args, device)
    print_time(args, device)


def print_memory(args, device):
    """Peak memory of a training step, in chunks and not."""
    model = GNet({"s": args.voxels}, pass_through=args.pass_through).to(device)
    objective = EncodingObjective(gnet_input)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

    def step(images):
        batch = {"voxels": {"s": torch.randn(images, args.voxels, device=device)},
                 "target": torch.randint(256, (images, 425, 425, 3), device=device, dtype=torch.uint8)}
        optimizer.zero_grad()
        objective(model, batch, 0.0)[0].backward()
        optimizer.step()

    print(f"GNet of {args.voxels} voxels: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; "
          "peak memory of a training step beyond weights, gradients and moments:")
    step(2)  # makes the moments
    kept = VoxelReadout.KEPT
    for VoxelReadout.KEPT, images in ((kept, args.train_batch), (sys.maxsize, args.train_batch // 5)):
        print(f"  {images:4} images, pooled features {'all kept' if VoxelReadout.KEPT > kept else 'computed again'}: "
              f"{peak_of(lambda n=images: step(n), device) / 1e9:6.2f} GB", flush=True)
    VoxelReadout.KEPT = kept


def peak_of(call, device):
    """Bytes that a call takes at most, beyond what is there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    before = anonymous()
    reset_peak()
    call()
    return peak_anonymous() - before


def print_time(args, device):
    """Seconds of whole pictures and of guided steps, CLIP alone and with GNet."""
    bench = BrainBench(args, device, pick_precision(recon.drawing_precision(args), device))
    kinds, seconds, n = ("CLIP alone", "with GNet"), {}, min(args.images, bench.size)
    bench.with_brain = False
    if args.rounds > 1:
        bench.ours(n)  # warm up
    for _ in range(args.rounds):
        for kind in kinds:
            bench.with_brain = kind != kinds[0]
            for what, call in (("a guided step", bench.guided_step), ("whole pictures", bench.ours)):
                seconds.setdefault((what, kind), []).append(bench.timed(call, n)[0])
                print(f"  {what}, {kind}: {seconds[what, kind][-1]:.2f} s for {n}", flush=True)
    for what in ("a guided step", "whole pictures"):
        alone, both = (np.sum(seconds[what, kind]) for kind in kinds)
        print(f"{what}: with GNet / CLIP alone = {both / alone:.3f}   ({bench.guided} of {bench.steps} steps guided)")


class BrainBench(bench_recon.Bench):
    """Pictures guided by CLIP features, and by GNet as well where `with_brain`."""

    def __init__(self, args, device, precision):
        super().__init__(args, device, precision)
        gnet = GNet({"s": args.voxels}, pass_through=args.pass_through).eval().requires_grad_(False).to(device)
        self.encoder, self.voxels = Encoder("random", "s", gnet, np.ones(args.voxels), (), None), args.voxels
        self.errors = ResponseErrors(*torch.randn(2, PREFLIGHT_IMAGES, args.voxels, device=device))

    def terms(self, n):
        terms = super().terms(n)
        if self.with_brain:
            targets = torch.randn(n, self.voxels, device=self.device)
            weights = torch.ones(self.voxels, device=self.device)
            index = torch.arange(self.voxels, device=self.device)
            terms.append(BrainMeasurement(self.encoder, index, {"all": slice(0, self.voxels)}, weights, targets,
                                          errors=self.errors, kappa=0.1))
        return terms

    @torch.no_grad()
    def guided_step(self, n):
        flags = self.flags
        latents, timesteps = self.pipe.start(list(range(n)), z=self.z[:n], strength=flags.strength,
                                             num_inference_steps=flags.num_inference_steps)
        return self.pipe.guidance_gradient(latents, timesteps[0], self.pipe.context_of(self.c[:n]), flags.cfg_scale,
                                           self.terms(n), flags.guidance_grad, decoder=self.decoder,
                                           decoded_at_once=self.at_once)


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
