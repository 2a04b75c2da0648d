"""What does a picture cost at Stable Diffusion 1.4's sizes, and how many fit a card? Counted, nothing is computed.

    python benchmarks/sampler_costs.py                     # every rule, gradient, decoder and number of steps

By src/sampling/costs.py, which recon.py --batch_size auto counts with, in half precision: teraFLOP of a picture, a
multiplication and its addition being two; gigabytes of networks, the measurements' bases and the smallest batch (1,
with half and TAESD 4); and the largest batch for cards of 8, 16, 24 and 80 GB. Attention is that of PyTorch's fused
kernels. raw and norm guide the first .2 of the steps, posterior .8; x2: each of them twice. The last line is recon.py's
default, on a card of 16 GB: its peak is that of its batch.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from diffusers import AutoencoderTiny

import options
import recon
import utils
from bench_recon import COMPONENTS, LAYERS, random_sd14
from models import ClipFeatures
from sampling.costs import largest_batch, of_batch, parts_of, total
from sampling.decoders import decoded_at_once, guidance_decoder
from sampling.measurements import ClipMeasurements, Measurement
from sampling.pipeline import guided_steps
from sampling.solvers import timesteps_of

CARDS = (8, 16, 24, 80)  # GB
CONTEXT = 0.6  # GB that CUDA itself takes
STEPS = (50, 25, 20, 16, 14)
DECODERS = ("full", "half", "taesd")
F = 50 * 768  # numbers of a layer of CLIP
GB = 1e9


def get_parser():
    return options.Parser(__doc__)


def main(argv=None):
    get_parser().parse_args(argv)
    count = Bench()
    print(f"{'rule':12}{'gradient':>9}{'decoder':>9}{'steps':>7}{'teraFLOP':>10}{'GB':>6}" +
          "".join(f"{f'{card} GB':>7}" for card in CARDS))
    rows = [("none", None, "full", 1), ("posterior", "xt", "taesd", 2)]
    rows += [(rule, grad, name, 1) for rule in ("posterior", "raw") for grad in options.GRADS for name in DECODERS]
    for rule, grad, name, repeats in rows:
        for steps in STEPS:
            found = count.settings(rule, grad, name, steps, 0.75, repeats)
            shown = f"{rule} x{repeats}" if repeats > 1 else rule
            print(f"{shown:12}{grad or '':>9}{name:>9}{steps:>7}{found['tflop']:>10.1f}{found['gb']:>6.1f}" +
                  "".join(f"{found[card] or '-':>7}" for card in CARDS), flush=True)
    flags = recon.with_defaults(recon.get_parser().parse_args([]))
    default = count.settings(flags.guidance_rule, flags.guidance_grad, decoder_of(flags.guidance_decoder),
                             flags.num_inference_steps, flags.strength)
    print(json.dumps({"tflop": round(default["tflop"], 1), "peak_gb": round(default["peak"], 1), "batch": default[16]}))


def decoder_of(given):
    """The one of DECODERS that a --guidance_decoder is."""
    return given if given in DECODERS else "taesd"


class Bench:
    """Networks of the real sizes, without values."""

    def __init__(self):
        with torch.device("meta"):
            pipe, clip = random_sd14(torch.device("meta"), torch.float16)
            clip.set_attn_implementation("sdpa")
            self.tiny = AutoencoderTiny().half().requires_grad_(False)  # its defaults are TAESD's sizes
            self.pipe, self.clip = pipe, ClipFeatures(clip, LAYERS).to("meta")
            self.measurements = ClipMeasurements(self.clip, {k: Measurement(
                torch.zeros(F), torch.zeros(COMPONENTS, F), torch.zeros(COMPONENTS), torch.zeros(1, COMPONENTS))
                for k in LAYERS})
        networks = [pipe.unet, pipe.vae, pipe.text_encoder, self.clip, self.tiny]
        kept = [*(p for network in networks for p in network.parameters()),
                *(found.basis for found in self.measurements.measurements.values())]
        self.weights = sum(tensor.numel() * tensor.element_size() for tensor in kept)
        self.unguided, self.guided = {}, {}

    def parts(self, grad, name, n, draws):
        """costs.parts_of a batch of n."""
        at_once = decoded_at_once(name, (4, 64, 64))
        with torch.device("meta"):
            given = torch.zeros(n, 77, 768), torch.zeros(n, 4, 64, 64)
            if (n, at_once) not in self.unguided:
                self.unguided[n, at_once] = parts_of(self.pipe, *given, dict(terms=[]), at_once)
            if grad and (grad, name, n, draws) not in self.guided:
                decoder = guidance_decoder(name, self.pipe, self.tiny)
                guidance = dict(terms=[self.measurements.term([0] * n)], grad=grad, x0="cond", decoder=decoder,
                                noises=[given[1]] * draws)
                self.guided[grad, name, n, draws] = parts_of(self.pipe, *given, guidance, at_once, ["guided"])
        return self.unguided[n, at_once] | (self.guided[grad, name, n, draws] if grad else {})

    def settings(self, rule, grad, name, steps, strength, repeats=1):
        """{"tflop", "gb", card: batch}; batch 0 does not fit."""
        at_once = decoded_at_once(name, (4, 64, 64))
        n_steps = len(timesteps_of(self.pipe.scheduler, steps, strength))
        defaults = recon.DEFAULTS[rule] if grad else {"guidance_strength": 0, "guidance_draws": 0}
        n_guided, draws = guided_steps(defaults["guidance_strength"], n_steps), defaults["guidance_draws"]

        def costs(n):
            return total(self.parts(grad, name, n, draws), n_steps, n_guided, repeats)

        found = {"tflop": costs(at_once).flops / at_once / 1e12, "gb": (self.weights + costs(at_once).bytes) / GB}
        for card in CARDS:
            free = (card - CONTEXT) * GB - self.weights
            found[card] = largest_batch(costs, free, at_once) if costs(at_once).bytes < at_once * free else 0
        found["peak"] = (self.weights + of_batch(costs, found[16], at_once).bytes) / GB
        return found


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
