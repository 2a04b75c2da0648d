"""What does each stage cost at NSD's real sizes? Counts floating-point operations; nothing is computed.

    python benchmarks/stage_costs.py                    # hours at 60 teraFLOP/s, about what bf16 reaches on an A100
    python benchmarks/stage_costs.py --tflops 20 --mbytes 10

Networks of Stable Diffusion 1.4's, CLIP's and this project's default sizes on PyTorch's meta device, under its own
FLOP counter; a multiplication and its addition are two, a backward pass is twice its forward. Hours are these counts
over --tflops, and bytes over --mbytes: estimates, that do not know of waiting for data, of kernels that are bound by
memory, or of Python. Small batches and float32 (features) reach less than large ones in bf16.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from torch.utils.flop_counter import FlopCounterMode

import options
import utils
from bench_recon import random_sd14
from models import BrainModel, LatentModel
from nsd import sources

N_IMAGES, N_TEST, CAPTIONS, EPOCHS = sources.N_IMAGES, 1000, 5, 30
STEPS, GUIDED, PRIOR_STEPS = 37, 7, 20  # of 50 at strength .75; .2 of these
TRAINING_TRIALS = {subj: trials - test for subj, (trials, _, test, _) in sources.PUBLISHED.items()}
FEATURES = {"c": (77, 768), "z": (4, 64, 64), "g": (50, 768)}


def get_parser():
    parser = options.Parser(__doc__)
    parser.add_argument("--tflops", type=float, default=60, metavar="TERAFLOPS", help="that the GPU reaches (60)")
    parser.add_argument("--mbytes", type=float, default=50, metavar="MB/S", help="that the network brings (50)")
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    print(f"{'operations':<58}{'petaFLOP':>9}{'hours':>8}")
    with torch.device("meta"):
        for name, flops in (*features(), *training(), *drawing()):
            print(f"{name:<58}{flops / 1e15:>9.1f}{flops / args.tflops / 1e12 / 3600:>8.1f}")
    print(f"\n{'files':<58}{'GB':>9}{'hours':>8}")
    downloads = {"betas of eight subjects": sum(4 * n * v for n, v, *_ in sources.PUBLISHED.values()),
                 "stimuli": N_IMAGES * 425 * 425 * 3}
    for name, size in downloads.items():
        print(f"{'download ' + name:<58}{size / 1e9:>9.1f}{size / args.mbytes / 1e6 / 3600:>8.1f}")
    for feat, shape in FEATURES.items():
        print(f"{'feature ' + feat + ', float16':<58}{2 * N_IMAGES * torch.Size(shape).numel() / 1e9:>9.1f}")
    with torch.device("meta"):
        for stage, feat, net in networks():
            size = (12 + 4) * sum(p.numel() for p in net.parameters())  # of the two, last.pth has AdamW's moments
            print(f"{f'last.pth and best.pth, {stage} {feat}':<58}{size / 1e9:>9.1f}")


def flops_of(call):
    """Floating-point operations of call()."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


def networks():
    """c, g and z at their defaults: (stage, feature, network)."""
    voxels = {subj: n for subj, (_, n, *_) in sources.PUBLISHED.items()}
    for stage, n_voxels in (("finetune", {"subj01": voxels.pop("subj01")}), ("pretrain", voxels)):
        yield stage, "c", BrainModel(n_voxels, 1024, *FEATURES["c"])
        yield stage, "g", BrainModel(n_voxels, 1024, *FEATURES["g"])
        yield stage, "z", LatentModel(n_voxels, 1024, FEATURES["z"], *FEATURES["g"])


def features():
    """The bare forwards of img2feat.py; CLIP whole, of which g_2 ... g_12 need half."""
    pipe, clip = random_sd14(torch.device("meta"), torch.float32)
    ids = torch.zeros(1, 77, dtype=torch.long)
    yield "features c: 73,000 images of 5 captions", N_IMAGES * CAPTIONS * flops_of(lambda: pipe.text_encoder(ids))
    yield "features z: 73,000 images", N_IMAGES * flops_of(lambda: pipe.vae.encoder(torch.empty(1, 3, 512, 512)))
    yield "features g: 73,000 images", N_IMAGES / 2 * flops_of(lambda: clip(torch.empty(1, 3, 224, 224)))


def training():
    """Thirty epochs of forward and backward passes; scores of 1,000 images."""
    for stage, feat, net in networks():
        subj, n_voxels = next(iter(net.model_args["n_voxels"].items()))
        voxels = {subj: torch.empty(1, n_voxels)}
        forward = flops_of(lambda net=net, voxels=voxels: net(voxels))
        if feat != "z":
            tokens, time = torch.empty(1, *FEATURES[feat]), torch.zeros(1, dtype=torch.long)
            prior = flops_of(lambda net=net, tokens=tokens, time=time: net.prior.net(tokens, time, tokens))
            forward += prior
        trials = TRAINING_TRIALS["subj01"] if stage == "finetune" else sum(
            n for name, n in TRAINING_TRIALS.items() if name != "subj01")
        yield f"train {feat}, {stage}: {trials:,} trials, {EPOCHS} epochs", 3 * EPOCHS * trials * forward
        if stage == "finetune" and feat == "c":
            yield "score c: 1,000 images, 20 steps of the prior", N_TEST * (forward + PRIOR_STEPS * prior)


def drawing():
    """recon.py's defaults: two UNet passes a step; in a guided one a pass, the decoder and CLIP backward too."""
    pipe, clip = random_sd14(torch.device("meta"), torch.float32)
    latents, text, time = torch.empty(1, 4, 64, 64), torch.empty(1, 77, 768), torch.zeros(1)
    unet = flops_of(lambda: pipe.unet(latents, time, text))
    decode = flops_of(lambda: pipe.vae.decoder(latents))
    seen = flops_of(lambda: clip(torch.empty(1, 3, 224, 224))) / 2
    guided = 2 * unet + 3 * decode + 3 * seen  # beyond the step's own two passes: one of them backward
    plain = 2 * STEPS * unet + decode
    yield "recon: 1,000 images, unguided", N_TEST * plain
    yield f"recon: 1,000 images, {GUIDED} of {STEPS} steps guided", N_TEST * (plain + GUIDED * guided)


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
