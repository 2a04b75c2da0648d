"""What does each stage cost at NSD's real sizes? Counts floating-point operations and bytes; nothing is computed.

    python benchmarks/stage_costs.py                    # hours at 60 teraFLOP/s, about what bf16 reaches on an A100
    python benchmarks/stage_costs.py --tflops 20 --mbytes 10
    python benchmarks/stage_costs.py --ridge_seconds    # also what the ridge takes on this CPU

Networks of Stable Diffusion 1.4's, CLIP's and this project's default sizes on PyTorch's meta device, under its own
FLOP counter; a multiplication and its addition are two. Trainings: forward and backward passes of the real networks and
objectives' outputs, each subject's trials with its own voxels, as many epochs as are the model's default. Hours are
these counts over --tflops, and bytes over --mbytes: estimates, that do not know of waiting for data, of kernels that
are bound by memory, of the optimizer, or of Python. Small batches and float32 (features) reach less than large ones in
bf16.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from torch.utils.flop_counter import FlopCounterMode

import options
import recon
import sampler_costs
import train_adapter
import utils
from bench_recon import LAYERS, random_sd14
from models import (
    AdaptedUNet,
    BrainModel,
    Decoder,
    FeatureAdapter,
    LatentModel,
    RidgeDecoder,
    freeze_trunk,
)
from nsd import sources
from training.objectives import draw_prior
from training.ridge import RIDGE_ALPHAS, decompose, solve

N_IMAGES, N_TEST, CAPTIONS = sources.N_IMAGES, 1000, 5
K, TRAINED_IMAGES = 1024, 8550  # components of a feature; images of subject 1 without those that validate
TRAINING_TRIALS = {subj: trials - test for subj, (trials, _, test, _) in sources.PUBLISHED.items()}
FEATURES = {"c": (77, 768), "z": (4, 64, 64)} | dict.fromkeys(options.VISION_LAYERS, (50, 768))
DEFAULTS = {"components": options.COMPONENTS_DEFAULTS, "mindeye2": options.MINDEYE2_DEFAULTS}


def get_parser():
    parser = options.Parser(__doc__)
    parser.add_argument("--tflops", type=float, default=60, metavar="TERAFLOPS", help="that the GPU reaches (60)")
    parser.add_argument("--mbytes", type=float, default=50, metavar="MB/S", help="that the network brings (50)")
    parser.add_argument("--ridge_seconds", action="store_true", help="time a part of the ridge, on the CPU: a minute")
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    table = Table(args.tflops)
    with torch.device("meta"):
        for name, flops in features():
            table.add(name, flops)
        for model in DEFAULTS:
            table.add(f"train {model}: all", sum(table.add(name, flops) for name, flops in training(model)))
        table.add("train ridge: subject 1, c, z and six g", sum(ridge_flops(n) for n in (1, 1, 6)))
        table.add(*adapting())
    for name, flops in drawing():
        table.add(name, flops)

    print(f"\n{'files':<58}{'GB':>9}{'hours':>8}")
    downloads = {"betas of eight subjects": sum(4 * n * v for n, v, *_ in sources.PUBLISHED.values()),
                 "stimuli": N_IMAGES * 425 * 425 * 3}
    for name, size in downloads.items():
        print(f"{'download ' + name:<58}{size / 1e9:>9.1f}{size / args.mbytes / 1e6 / 3600:>8.1f}")
    for feat, shape in {"c": FEATURES["c"], "z": FEATURES["z"], "g_k": FEATURES["g_2"]}.items():
        width = torch.Size(shape).numel()
        print(f"{f'feature {feat}, float16':<58}{2 * N_IMAGES * width / 1e9:>9.1f}")
        print(f"{f'components of {feat}':<58}{4 * K * (N_IMAGES + width) / 1e9:>9.1f}")
    for model in (*DEFAULTS, "ridge"):
        total = 0
        for stage, run, size in checkpoints(model):
            print(f"{f'last.pth and best.pth, {model}, {stage} {run}':<58}{size / 1e9:>9.2f}")
            total += size
        print(f"{f'checkpoints of {model}: all':<58}{total / 1e9:>9.1f}")
    if args.ridge_seconds:
        time_ridge()


class Table:
    """Lines of operations, printed as they are counted."""

    def __init__(self, tflops):
        self.tflops = tflops
        print(f"{'operations':<58}{'petaFLOP':>9}{'hours':>8}")

    def add(self, name, flops):
        """Print a line; returns flops."""
        print(f"{name:<58}{flops / 1e15:>9.2f}{flops / self.tflops / 1e12 / 3600:>8.2f}")
        return flops


def flops_of(call, backward=False):
    """Floating-point operations of call(); backward: of the backward pass from the sum of its outputs, too."""
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        found = call()
        if backward:
            sum(part.sum() for part in found).backward()
    return counter.get_total_flops()


def networks(model):
    """All runs for subject 1: (stage, run, network)."""
    voxels = {subj: n for subj, (_, n, *_) in sources.PUBLISHED.items()}
    own = {"subj01": voxels.pop("subj01")}
    runs = {"c": ["c"], "z": ["z"], "g": options.VISION_LAYERS}
    if model == "ridge":
        for run, feats in runs.items():
            yield "", run, RidgeDecoder(own, dict.fromkeys(feats, K))
        return
    for stage, n_voxels in (("pretrain", voxels), ("finetune", own)):
        if model == "components":
            wanted = DEFAULTS[model]
            for run, feats in runs.items():
                yield stage, run, Decoder(n_voxels, 1024, dict.fromkeys(feats, K), wanted["n_blocks"],
                                          contrast=[run] if run == "c" and wanted["clip_scale"] else [])
        else:
            for feat, shape in FEATURES.items():
                yield stage, feat, (LatentModel(n_voxels, 1024, shape, *FEATURES["g_12"]) if feat == "z" else
                                    BrainModel(n_voxels, 1024, *shape))


def checkpoints(model):
    """(stage, run, bytes of its finished checkpoints): weights in float32, of a ridge once."""
    with torch.device("meta"):
        for stage, run, net in networks(model):
            n_files = 1 if model == "ridge" else 2
            yield stage, run, 4 * n_files * sum(tensor.numel() for tensor in net.state_dict().values())


def features():
    """The bare forwards of img2feat.py; CLIP whole, of which g_2 ... g_12 need half."""
    pipe, clip = random_sd14(torch.device("meta"), torch.float32)
    ids = torch.zeros(1, 77, dtype=torch.long)
    yield "features c: 73,000 images of 5 captions", N_IMAGES * CAPTIONS * flops_of(lambda: pipe.text_encoder(ids))
    yield "features z: 73,000 images", N_IMAGES * flops_of(lambda: pipe.vae.encoder(torch.empty(1, 3, 512, 512)))
    yield "features g: 73,000 images", N_IMAGES / 2 * flops_of(lambda: clip(torch.empty(1, 3, 224, 224)))


def training(model):
    """Forward and backward passes of all epochs, run by run."""
    for stage, run, net in networks(model):
        defaults = DEFAULTS[model] | (options.PRETRAINING_DEFAULTS[model] if stage == "pretrain" else {})
        epochs = defaults["num_epochs"]
        if (model, stage) == ("components", "finetune"):
            freeze_trunk(net)
        subjects = net.model_args["n_voxels"]
        trials = {subj: TRAINING_TRIALS[subj] * (1 - options.VAL_FRACTION) for subj in subjects}
        flops = sum(n * flops_of(lambda net=net, subj=subj, run=run: outputs(net, subj, run), True)
                    for subj, n in trials.items())
        name = f"train {model}, {stage} {run}: {sum(trials.values()):,.0f} trials, {epochs} epochs"
        yield name, epochs * flops


def adapting():
    """Forward and backward passes of all epochs of an adapter, the frozen UNet's among them."""
    unet = random_sd14(torch.device("meta"), torch.float32)[0].unet
    net = AdaptedUNet(unet, FeatureAdapter.fitting(unet, LAYERS, FEATURES["g_2"]))
    n, epochs = (N_IMAGES - N_TEST) * (1 - options.VAL_FRACTION), train_adapter.get_parser().parse_args([]).num_epochs
    inputs = (torch.empty(1, *FEATURES["z"]), torch.zeros(1), torch.empty(1, *FEATURES["c"]),
              {feat: torch.empty(1, *FEATURES[feat]) for feat in ("z", *options.VISION_LAYERS)})
    return f"train adapter: {n:,.0f} images, {epochs} epochs", epochs * n * flops_of(lambda: [net(*inputs)], True)


def outputs(net, subj, run):
    """What a training's objective sees of one trial."""
    voxels = {subj: torch.empty(1, net.model_args["n_voxels"][subj])}
    if isinstance(net, Decoder):
        return [rows for found in net(voxels) for rows in found.values()]
    if isinstance(net, LatentModel):
        return net(voxels)
    target = torch.empty(1, *FEATURES[run])
    return net(voxels, target, draw_prior(target))[1:]  # contrast and the prior's loss


def ridge_flops(n_feats, n=TRAINED_IMAGES, n_voxels=sources.PUBLISHED["subj01"][1]):
    """Operations of a run of n_feats features: a kernel, its eigenvectors (9 n^3), a solve for each feature."""
    decomposed = torch.empty(n, n_voxels), torch.empty(n_voxels), torch.empty(n, n), torch.empty(n)
    solved = flops_of(lambda: solve(decomposed, torch.empty(n, K)))
    return 2 * n**2 * n_voxels + 9 * n**3 + n_feats * solved


def time_ridge(share=4):
    """Time a ridge on a quarter of the images, all voxels and 64 components, and extrapolate the core-hours.

    Eigenvectors take the cube of the images, the rest their square; what a penalty takes is told from the rest of a
    solve by taking one and three of them.
    """
    n, n_voxels = TRAINED_IMAGES // share, sources.PUBLISHED["subj01"][1]
    responses, targets = torch.randn(n, n_voxels), torch.randn(n, 64)
    rows = responses.double()
    kernel = seconds(lambda: rows @ rows.T)
    eigenvectors = seconds(lambda: decompose(responses)) - kernel
    decomposed = decompose(responses)
    once, thrice = (seconds(lambda k=k: solve(decomposed, targets, RIDGE_ALPHAS[:k])) for k in (1, 3))
    solving = once + (len(RIDGE_ALPHAS) - 1) * (thrice - once) / 2
    decomposing = (kernel + eigenvectors * share) * share**2 / 3600
    solving *= K / 64 * share**2 / 3600
    print(f"\nridge of subject 1, core-hours on this CPU: kernel and eigenvectors {decomposing:.2f} (for c, z and g "
          f"each), a feature {solving:.2f}; in all {3 * decomposing + len(FEATURES) * solving:.1f}")


def seconds(call):
    """CPU time of call(), of all threads together."""
    started = time.process_time()
    call()
    return time.process_time() - started


def drawing():
    """recon.py without guidance, with its default, and with the published rule: sampler_costs.py's counts."""
    bench = sampler_costs.Bench()
    for what, rule in (("unguided", None), ("default", "posterior"), ("published", "raw")):
        flags = recon.with_defaults(recon.get_parser().parse_args(["--guidance_rule", rule or "posterior"]))
        decoder = sampler_costs.decoder_of(flags.guidance_decoder)
        found = bench.settings(rule or "none", flags.guidance_grad if rule else None, decoder,
                               flags.num_inference_steps, flags.strength)
        yield f"recon, {what}: 1,000 images, {flags.num_inference_steps} steps", N_TEST * 1e12 * found["tflop"]


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
