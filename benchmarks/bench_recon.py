"""Is sampling as fast as its networks allow? This sampler, the published procedure rendered plainly, the floor.

    python benchmarks/bench_recon.py                                       # the demo's tiny models; about five minutes
    python benchmarks/bench_recon.py --sd_model random                               # SD 1.4's sizes, on a GPU

In one process, on the same networks, c, z, g and noise:
  a  sampling.pipeline.GuidedPipeline with recon.py's defaults, in batches
  b  the published procedure: 50 steps of DDIM, the first .2 of them guided by the raw rule; one image at a time, a
     second pass through the UNet for guidance, every intermediate latent decoded, the whole CLIP transformer run, the
     empty caption encoded for each image. Asked for the same settings, a draws the pictures of b (in float64: in
     float32 a guided path magnifies the last digits, in which a batch differs from a single image).
  c  the floor: only the network calls that a needs, in the same batches, on made-up inputs, nothing around them
Prints images/s, the ratios a/c and a/b, where the time of a goes, and on a GPU its peak memory for growing batches. a
and c take turns, so that another process on the machine slows both.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModel

import options
import recon
import utils
from models import ClipFeatures
from sampling.compiling import CompiledUNet
from sampling.decoders import decoded_at_once, guidance_decoder, load_guidance_decoder
from sampling.guidance import ClipFeatureLoss, raw_rule
from sampling.measurements import ClipMeasurements, Measurement
from sampling.pipeline import GuidedPipeline, guided_steps, load_pipeline, rows_on_cpu
from sampling.solvers import SOLVERS, timesteps_of
from training.team import pick_precision

DEMO = Path(__file__).resolve().parent.parent / "demo" / "models"
LAYERS = (2, 4, 6, 8, 10, 12)
COMPONENTS = 1024  # of a layer, at most, that measure
PUBLISHED = {"strength": 0.75, "guidance_strength": 0.2, "cfg_scale": 7.5}
GIVEN = ("num_inference_steps", "guidance_rule", "guidance_grad", "guidance_decoder", "solver")
SCALE = 100.0  # of the raw rule, of these features
PARTS = ("UNet", "UNet with gradient", "decoder with gradient", "CLIP with gradient", "last decoding", "empty caption")


def get_parser():
    parser = options.Parser(__doc__)
    parser.add_argument("--sd_model", default=str(DEMO / "sd"), metavar="NAME|DIR|random",
                        help="random: Stable Diffusion 1.4's and CLIP ViT-B/32's sizes with random weights")
    parser.add_argument("--clip_model", default=str(DEMO / "clip"), metavar="NAME|DIR")
    parser.add_argument("--images", type=options.whole, default=32, metavar="IMAGES", help="of a and c, each round")
    parser.add_argument("--reference_images", type=options.whole, default=4, metavar="IMAGES", help="of b, each round")
    parser.add_argument("--rounds", type=options.whole, default=2, metavar="N")
    parser.add_argument("--batch_size", type=options.whole, default=4, metavar="PICTURES", help="of a and c on a GPU")
    parser.add_argument("--published_steps", type=options.whole, default=50, metavar="STEPS", help="of b")
    for name in GIVEN:
        parser.add_argument(f"--{name}", metavar="X", help="of a (recon.py's default)")
    parser.add_argument("--compile", action="store_true", help="a with recon.py's --compile")
    options.add_compute(parser)
    options.add_precision(parser)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    utils.reproducible_products()
    device = utils.pick_device(args.device)
    precision = pick_precision(recon.drawing_precision(args), device)
    bench = Bench(args, device, precision)
    flags = bench.flags
    print(f"{device}, {precision}, {torch.get_num_threads()} threads; {args.images} images in batches of {bench.size}, "
          f"{flags.guidance_rule}, {flags.solver}, gradient {flags.guidance_grad} through {flags.guidance_decoder}, "
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
    for key, what in (("a", "this sampler"), ("b", "published procedure"), ("c", "floor: a's network calls alone")):
        print(f"  {key}  {what:32} {1 / per_image[key]:8.3f} images/s")
    print(f"a/c = {per_image['c'] / per_image['a']:.3f}   a/b = {per_image['b'] / per_image['a']:.2f}")
    parts["rest"] = seconds["a"] - sum(parts.values())
    print("time of a: " + ", ".join(f"{part} {100 * value / seconds['a']:.1f} %" for part, value in parts.items()))
    if device.type == "cuda":
        bench.print_memory()
    else:
        bench.to_double()
        difference = (bench.published(2) - bench.reference(2)).abs().max().item()
        print(f"with b's settings, largest difference between the pictures of a and b, in float64: "
              f"{255 * difference:.4f} of 255")


class Bench:
    """The networks and inputs that a, b and c share."""

    def __init__(self, args, device, precision):
        self.args, self.device = args, device
        given = [word for name in GIVEN if getattr(args, name) for word in (f"--{name}", getattr(args, name))]
        self.flags = flags = recon.with_defaults(recon.get_parser().parse_args(given))
        if args.sd_model == "random":
            pipe, clip = random_sd14(device, precision, args.compile)
        else:
            pipe = load_pipeline(args.sd_model, device, precision, compiled=args.compile)
            clip = CLIPVisionModel.from_pretrained(args.clip_model)
        pipe.set_progress_bar_config(disable=True)
        self.pipe, self.clip = pipe, ClipFeatures(clip, LAYERS).to(device, torch.float32)
        self.decoder = self.load_decoder(precision)
        shape = pipe.latent_shape()
        on_cpu = device.type == "cpu"
        self.size = rows_on_cpu(shape) if on_cpu else args.batch_size
        self.at_once = None if on_cpu else decoded_at_once(flags.guidance_decoder, shape)
        n = max(args.images, args.reference_images, self.size, 64)
        generator = torch.Generator().manual_seed(args.seed)
        width = pipe.unet.config.cross_attention_dim
        self.c = torch.randn(n, pipe.tokenizer.model_max_length, width, generator=generator).to(device)
        self.z = torch.randn(n, *shape, generator=generator).to(device)
        with torch.no_grad():
            image = pipe.decode(self.z[:1]).float()
            self.g = {k: feature + torch.randn(n, *feature.shape[1:], generator=generator).to(device)
                      for k, feature in self.clip(image).items()}
        self.measurements = ClipMeasurements(self.clip, {k: self.measured(rows, generator) for k, rows in
                                                         self.g.items()})
        self.side = image.shape[2:]
        self.steps = len(timesteps_of(pipe.scheduler, flags.num_inference_steps, flags.strength))
        self.guided = guided_steps(flags.guidance_strength, self.steps)

    def load_decoder(self, precision):
        """What a's losses see through."""
        name = self.flags.guidance_decoder
        if name in ("full", "half"):
            return guidance_decoder(name, self.pipe)
        if self.args.sd_model != "random":
            return load_guidance_decoder(name if Path(name).is_dir() else str(DEMO / "taesd"), self.pipe)
        tiny = AutoencoderTiny().requires_grad_(False).eval()  # its defaults are TAESD's sizes
        return guidance_decoder(name, self.pipe, tiny.to(self.device, precision, memory_format=torch.channels_last))

    @staticmethod
    def measured(rows, generator):
        """Rows (N, T, D) as a measurement by as many components as recon.py would have."""
        width = rows[0].numel()
        basis = torch.randn(min(COMPONENTS, width // 6), width, generator=generator).to(rows.device) / width**0.5
        return Measurement(rows[0].flatten(), basis, torch.ones(len(basis), device=rows.device),
                           (rows.flatten(1) - rows[0].flatten()) @ basis.T)

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
        """The published loss."""
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

    def terms(self, n):
        """What guides a."""
        return [self.measurements.term(list(range(n))) if self.flags.guidance_rule == "posterior" else
                self.term(slice(n), self.clip)]

    def ours(self, n):
        """recon.py's default, or what the flags say."""
        flags = self.flags
        return self.pipe(self.c[:n], list(range(n)), z=self.z[:n], strength=flags.strength, solver=flags.solver,
                         num_inference_steps=flags.num_inference_steps, cfg_scale=flags.cfg_scale, terms=self.terms(n),
                         rule=flags.guidance_rule, guidance_scale=SCALE if flags.guidance_rule == "raw" else
                         flags.guidance_scale, guidance_strength=flags.guidance_strength,
                         grad=flags.guidance_grad, decoder=self.decoder, decoded_at_once=self.at_once)

    def published(self, n):
        """This sampler with the settings of `reference`."""
        return self.pipe(self.c[:n], list(range(n)), z=self.z[:n], num_inference_steps=self.args.published_steps,
                         terms=[self.term(slice(n), self.clip)], guidance_scale=SCALE, **PUBLISHED)

    @torch.no_grad()
    def reference(self, n):
        """The published procedure as it is usually written, image by image."""
        pipe, images = self.pipe, []
        for i in range(n):
            cond = self.c[i:i + 1].to(pipe.unet.dtype)
            context = torch.cat([pipe.empty_condition(), cond])
            x, timesteps = pipe.start([i], z=self.z[i:i + 1], strength=PUBLISHED["strength"],
                                      num_inference_steps=self.args.published_steps)
            path = SOLVERS["ddim"](pipe.scheduler, timesteps)
            loss_of = self.term(slice(i, i + 1), self.whole_clip)
            for step, t in enumerate(timesteps):
                abar = pipe.scheduler.alphas_cumprod[t]
                eps_empty, eps_cond = pipe.predict_noise(x, t, context)
                eps = eps_empty + PUBLISHED["cfg_scale"] * (eps_cond - eps_empty)
                if step < guided_steps(PUBLISHED["guidance_strength"], len(timesteps)):
                    with torch.enable_grad():
                        leaf = x.detach().requires_grad_()
                        noise = pipe.unet(leaf.to(cond.dtype), t, encoder_hidden_states=cond).sample.to(leaf.dtype)
                        image = pipe.decode((leaf - (1 - abar).sqrt() * noise) / abar.sqrt())
                        gradient = torch.autograd.grad(loss_of(image).sum() * 4096, leaf)[0] / 4096
                    eps = raw_rule(eps, gradient, abar, SCALE)
                x = path.step(step, x, eps)
                picture = pipe.decode(x).float()
            images.append(picture)
        return torch.cat(images)

    def floor(self, n):
        """Seconds of each of PARTS: the calls of the networks that `ours` makes, one kind after the other."""
        pipe, seconds = self.pipe, dict.fromkeys(PARTS, 0.0)
        t = torch.full((1,), 500, device=self.device)
        with torch.no_grad():
            context = pipe.context_of(self.c[:n])
        x, image = self.z[:n].to(pipe.unet.dtype), torch.rand(n, 3, *self.side, device=self.device)

        def repeat(part, times, call):
            for _ in range(times):
                seconds[part] += self.timed(lambda n: call(), n)[0]

        def forward(latents, rows):
            with torch.no_grad():
                return pipe.run_unet(latents, t, encoder_hidden_states=rows).sample

        def with_gradient(network, values):
            with torch.enable_grad():
                leaf = values.detach().requires_grad_()
                out = network(leaf)
                torch.autograd.grad(out, leaf, [torch.ones_like(part) for part in out] if isinstance(out, list) else
                                    torch.ones_like(out))

        def in_turn(network, rows):
            for part in rows.split(self.at_once or n):
                with_gradient(network, part)

        scaled = x / pipe.vae.config.scaling_factor
        doubled = torch.cat([x, x])
        through_unet = self.flags.guidance_grad == "xt"
        with torch.no_grad():
            repeat("UNet", self.steps - self.guided * through_unet, lambda: forward(doubled, context))
            repeat("UNet", self.guided * through_unet, lambda: forward(x, context[:n]))
            repeat("last decoding", 1, lambda: [pipe.vae.decode(part) for part in scaled.split(self.at_once or n)])
            repeat("empty caption", 1, pipe.empty_condition)
        repeat("UNet with gradient", self.guided * through_unet, lambda: with_gradient(
            lambda leaf: pipe.run_unet(leaf, t, encoder_hidden_states=context[n:]).sample, x))
        repeat("decoder with gradient", self.guided, lambda: in_turn(self.decoder, x))
        repeat("CLIP with gradient", self.guided, lambda: in_turn(lambda leaf: list(self.clip(leaf).values()), image))
        return seconds

    def print_memory(self):
        """Peak memory of a for growing batches, on a GPU."""
        for size in (1, 2, 4, 8, 16, 32):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            try:
                seconds, _ = self.timed(self.ours, size)
            except torch.OutOfMemoryError:
                break
            print(f"  batch {size:3}: peak {torch.cuda.max_memory_reserved() / 1e9:.1f} GB, "
                  f"{size / seconds:.2f} images/s")


def random_sd14(device, precision, compiled=False):
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
    pipe = GuidedPipeline(tokenizer=tokenizer, scheduler=scheduler, **networks).to(device)
    for network in (pipe.unet, pipe.vae):
        network.to(memory_format=torch.channels_last)
    if compiled:
        pipe.run_unet = CompiledUNet(pipe.unet)
    return pipe, clip


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
