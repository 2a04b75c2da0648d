"""Is sampling as fast as its networks allow? This sampler, the published procedure rendered plainly, the floor.

    python benchmarks/bench_recon.py                                       # the demo's tiny models; about three minutes
    python benchmarks/bench_recon.py --sd_model random --precision bf16 --batch_size 4       # SD 1.4's sizes, on a GPU

In one process, on the same networks, c, z, g and noise:
  a  sampling.pipeline.GuidedPipeline, in batches
  b  the reference: one image at a time, a second pass through the UNet for guidance, every intermediate latent decoded,
     the whole CLIP transformer run, the empty caption encoded for each image. Its pictures are those of a (in float64:
     in float32 a guided path magnifies the last digits, in which a batch differs from a single image).
  c  the floor: only the network calls that a needs, in the same batches, on made-up inputs, nothing around them
Prints images/s, the ratios a/c and a/b, where the time of a goes, and on a GPU its peak memory and the largest batch
that --memory GB hold. a and c take turns, so that another process on the machine slows both.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModel

import options
import utils
from models import ClipFeatures
from sampling.guidance import ClipFeatureLoss, raw_rule
from sampling.pipeline import GuidedPipeline, guided_steps, load_pipeline, rows_on_cpu
from training.team import pick_precision

DEMO = Path(__file__).resolve().parent.parent / "demo" / "models"
LAYERS = (2, 4, 6, 8, 10, 12)
PARTS = ("UNet", "UNet with gradient", "decoder with gradient", "CLIP with gradient", "last decoding", "empty caption")


def get_parser():
    parser = options.Parser(__doc__)
    parser.add_argument("--sd_model", default=str(DEMO / "sd"), metavar="NAME|DIR|random",
                        help="random: Stable Diffusion 1.4's and CLIP ViT-B/32's sizes with random weights")
    parser.add_argument("--clip_model", default=str(DEMO / "clip"), metavar="NAME|DIR")
    parser.add_argument("--images", type=options.whole, default=32, metavar="IMAGES", help="of a and c, each round")
    parser.add_argument("--reference_images", type=options.whole, default=4, metavar="IMAGES", help="of b, each round")
    parser.add_argument("--rounds", type=options.whole, default=3, metavar="N")
    parser.add_argument("--batch_size", type=options.whole, metavar="PICTURES", help="(recon.py's)")
    parser.add_argument("--num_inference_steps", type=options.whole, default=50, metavar="STEPS")
    parser.add_argument("--strength", type=float, default=0.75, metavar="FRACTION")
    parser.add_argument("--guidance_strength", type=float, default=0.2, metavar="FRACTION")
    parser.add_argument("--guidance_scale", type=float, default=100.0, metavar="X")
    parser.add_argument("--memory", type=float, default=24, metavar="GB")
    options.add_compute(parser)
    options.add_precision(parser)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    utils.reproducible_products()
    device = utils.pick_device(args.device)
    precision = pick_precision(args.precision, device)
    bench = Bench(args, device, precision)
    print(f"{device}, {precision}, {torch.get_num_threads()} threads; {args.images} images in batches of {bench.size}, "
          f"{bench.steps} steps of which {bench.guided} guided", flush=True)
    bench.ours(bench.size), bench.floor(bench.size), bench.reference(1)  # warm up
    seconds, parts = {"a": 0.0, "b": 0.0, "c": 0.0}, dict.fromkeys(PARTS, 0.0)
    for _ in range(args.rounds):
        for start in range(0, args.images, bench.size):
            n = min(bench.size, args.images - start)
            seconds["a"] += bench.timed(bench.ours, n)[0]
            taken, found = bench.timed(bench.floor, n)
            seconds["c"] += taken
            parts = {part: parts[part] + found[part] for part in PARTS}
        seconds["b"] += bench.timed(bench.reference, args.reference_images)[0]
    per_image = {key: value / args.rounds / (args.reference_images if key == "b" else args.images)
                 for key, value in seconds.items()}
    for key, what in (("a", "this sampler"), ("b", "reference procedure"), ("c", "floor: its network calls alone")):
        print(f"  {key}  {what:32} {1 / per_image[key]:8.3f} images/s")
    print(f"a/c = {per_image['c'] / per_image['a']:.3f}   a/b = {per_image['b'] / per_image['a']:.2f}")
    parts["rest"] = seconds["a"] - sum(parts.values())
    print("time of a: " + ", ".join(f"{part} {100 * value / seconds['a']:.1f} %" for part, value in parts.items()))
    if device.type == "cuda":
        bench.print_memory()
    else:
        bench.to_double()
        difference = (bench.ours(2) - bench.reference(2)).abs().max().item()
        print(f"largest difference between the pictures of a and b, in float64: {255 * difference:.4f} of 255")


class Bench:
    """The networks and inputs that a, b and c share."""

    def __init__(self, args, device, precision):
        self.args, self.device = args, device
        if args.sd_model == "random":
            pipe, clip = random_sd14(device, precision)
        else:
            pipe = load_pipeline(args.sd_model, device, precision)
            clip = CLIPVisionModel.from_pretrained(args.clip_model)
        pipe.set_progress_bar_config(disable=True)
        self.pipe, self.clip = pipe, ClipFeatures(clip, LAYERS).to(device, torch.float32)
        shape = pipe.latent_shape()
        self.size = args.batch_size or (rows_on_cpu(shape) if device.type == "cpu" else 4)
        n = max(args.images, args.reference_images, 64)
        generator = torch.Generator().manual_seed(args.seed)
        width = pipe.unet.config.cross_attention_dim
        self.c = torch.randn(n, pipe.tokenizer.model_max_length, width, generator=generator).to(device)
        self.z = torch.randn(n, *shape, generator=generator).to(device)
        with torch.no_grad():
            image = pipe.decode(self.z[:1]).float()
            self.g = {k: feature + torch.randn(n, *feature.shape[1:], generator=generator).to(device)
                      for k, feature in self.clip(image).items()}
        self.side = image.shape[2:]
        self.steps = int(args.num_inference_steps * args.strength)
        self.guided = guided_steps(args.guidance_strength, self.steps)

    def to_double(self):
        """Go on in float64."""
        self.pipe.to(torch.float64)
        self.clip.double()
        self.c, self.z = self.c.double(), self.z.double()
        self.g = {k: target.double() for k, target in self.g.items()}

    def timed(self, what, n):
        """(seconds, result) of what(n)."""
        self.wait()
        start = time.perf_counter()
        result = what(n)
        self.wait()
        return time.perf_counter() - start, result

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def term(self, rows, features):
        return ClipFeatureLoss(features, {k: target[rows] for k, target in self.g.items()})

    def whole_clip(self, image):
        """What self.clip computes, through hooks on the whole transformer."""
        found, vision = {}, self.clip.vision
        hooks = [vision.encoder.layers[k // 2 - 1].mlp.fc2.register_forward_hook(
            lambda module, given, out, k=k: found.update({k: out})) for k in LAYERS]
        vision(pixel_values=self.clip.preprocess(image))
        for hook in hooks:
            hook.remove()
        return found

    def ours(self, n):
        args = self.args
        return self.pipe(self.c[:n], list(range(n)), z=self.z[:n], strength=args.strength,
                         terms=[self.term(slice(n), self.clip)], num_inference_steps=args.num_inference_steps,
                         guidance_scale=args.guidance_scale, guidance_strength=args.guidance_strength)

    @torch.no_grad()
    def reference(self, n):
        """The published procedure as it is usually written, image by image."""
        args, pipe, images = self.args, self.pipe, []
        for i in range(n):
            cond = self.c[i:i + 1].to(pipe.unet.dtype)
            context = torch.cat([pipe.empty_condition(), cond])
            x, timesteps = pipe.start([i], z=self.z[i:i + 1], strength=args.strength,
                                      num_inference_steps=args.num_inference_steps)
            loss_of = self.term(slice(i, i + 1), self.whole_clip)
            for step, t in enumerate(timesteps):
                abar = pipe.scheduler.alphas_cumprod[t]
                eps_empty, eps_cond = pipe.predict_noise(x, t, context)
                eps = eps_empty + 7.5 * (eps_cond - eps_empty)
                if step < self.guided:
                    with torch.enable_grad():
                        leaf = x.detach().requires_grad_()
                        noise = pipe.unet(leaf.to(cond.dtype), t, encoder_hidden_states=cond).sample.to(leaf.dtype)
                        image = pipe.decode((leaf - (1 - abar).sqrt() * noise) / abar.sqrt())
                        gradient = torch.autograd.grad(loss_of(image).sum() * 4096, leaf)[0] / 4096
                    eps = raw_rule(eps, gradient, abar, args.guidance_scale)
                x = pipe.scheduler.step(eps, t, x).prev_sample
                picture = pipe.decode(x).float()
            images.append(picture)
        return torch.cat(images)

    def floor(self, n):
        """Seconds of each of PARTS: the calls of the networks that `ours` makes, one kind after the other."""
        pipe, seconds = self.pipe, dict.fromkeys(PARTS, 0.0)
        t = pipe.scheduler.timesteps[0]
        with torch.no_grad():
            context = pipe.context_of(self.c[:n])
        x, image = self.z[:n].to(pipe.unet.dtype), torch.rand(n, 3, *self.side, device=self.device)

        def repeat(part, times, call):
            for _ in range(times):
                seconds[part] += self.timed(lambda n: call(), n)[0]

        def forward(latents, rows):
            with torch.no_grad():
                return pipe.unet(latents, t, encoder_hidden_states=rows).sample

        def with_gradient(network, values):
            leaf = values.detach().requires_grad_()
            out = network(leaf)
            torch.autograd.grad(out, leaf, [torch.ones_like(part) for part in out] if isinstance(out, list) else
                                torch.ones_like(out))

        scaled = x / pipe.vae.config.scaling_factor
        doubled = torch.cat([x, x])
        with torch.no_grad():
            repeat("UNet", self.steps - self.guided, lambda: forward(doubled, context))
            repeat("UNet", self.guided, lambda: forward(x, context[:n]))
            repeat("last decoding", 1, lambda: pipe.vae.decode(scaled).sample)
            repeat("empty caption", 1, pipe.empty_condition)
        repeat("UNet with gradient", self.guided, lambda: with_gradient(
            lambda leaf: pipe.unet(leaf, t, encoder_hidden_states=context[n:]).sample, x))
        repeat("decoder with gradient", self.guided, lambda: with_gradient(
            lambda leaf: pipe.vae.decode(leaf).sample, scaled))
        repeat("CLIP with gradient", self.guided, lambda: with_gradient(
            lambda leaf: list(self.clip(leaf).values()), image))
        return seconds

    def print_memory(self):
        """Peak memory of a for growing batches, and the largest that fits --memory."""
        fits = 0
        for size in (1, 2, 4, 8, 12, 16, 24, 32):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            try:
                self.ours(size)
            except torch.OutOfMemoryError:
                break
            peak = torch.cuda.max_memory_reserved() / 2**30
            print(f"  batch {size:3}: peak {peak:.1f} GB")
            if peak > self.args.memory:
                break
            fits = size
        print(f"largest of these batches that fits {self.args.memory:g} GB: {fits}")


def random_sd14(device, precision):
    """A GuidedPipeline and a CLIPVisionModel of SD 1.4's and CLIP ViT-B/32's sizes, with random weights."""
    torch.manual_seed(0)
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    tokenizer = CLIPTokenizer.from_pretrained(DEMO / "sd" / "tokenizer", model_max_length=77)  # only reads ""
    with torch.device(device):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        vae = AutoencoderKL(block_out_channels=[128, 256, 512, 512], down_block_types=["DownEncoderBlock2D"] * 4,
                            up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, sample_size=512,
                            scaling_factor=0.18215)
        networks = dict(unet=unet, vae=vae, text_encoder=CLIPTextModel(text))
        clip = CLIPVisionModel(CLIPVisionConfig())
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1)
    networks = {name: network.to(precision) for name, network in networks.items()}
    return GuidedPipeline(tokenizer=tokenizer, scheduler=scheduler, **networks).to(device), clip


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
