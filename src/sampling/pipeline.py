"""Guided diffusion: from c (and z) to an image, steered by the gradient of losses on the image being formed.

The sampler is deterministic, with classifier-free guidance of scale w. Every step, from x_t to the next latents:

    eps    = eps_u + w (eps_c - eps_u)                        unconditional and conditional noise
    eps'   = rule(eps, d loss(image(x_t)) / dx_t)             in guided steps: one of guidance.RULES
    x_next = solver(x_t, eps')                                one of solvers.SOLVERS, DDIM or DPM-Solver++

Letters: B batch, b rows of it at once, C latent channels, h w latent size, H W image size, T tokens, D width. As in the
papers abar = alphas_cumprod[t], sigma = sqrt(1 - abar), eps = predicted noise, x0 = predicted clean latent (carries the
VAE's scaling factor). docs/method.md, "Guided sampling", says more.
"""

from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.errors import HTTPError
from transformers import CLIPTextModel, CLIPTokenizer

import utils
from disk.hub import snapshot
from nsd import sources
from options import GRADS, X0S
from sampling.compiling import CompiledUNet
from sampling.decoders import in_unit_range
from sampling.guidance import RULES, SPREAD, guidance_pull, speaking, views_of
from sampling.solvers import SOLVERS, timesteps_of

CPU_BATCH = 5120  # latent pixels that a CPU draws at once: 20 latents of 16 x 16, one of 64 x 64
SAG_TAPS = 9  # latent pixels over which self-attention guidance blurs
COMPONENTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")


def load_pipeline(model, device, dtype=torch.float32, offload=False, compiled=False):
    """Load any Stable Diffusion 1.x folder or hub id as a GuidedPipeline on `device`.

    offload: keep each network in main memory while it is not needed (diffusers' model offload). compiled: torch.compile
    the UNet, at its first pass (sampling.compiling). Raises UserError when the model cannot be loaded.
    """
    folder = Path(model)
    lacking = [name for name in COMPONENTS if not (folder / name).is_dir()] if folder.is_dir() else []
    if lacking:
        raise utils.UserError(f"--sd_model {model}: has no {', '.join(lacking)}; give a Stable Diffusion 1.x folder "
                              f"with {', '.join(COMPONENTS)}, or a hub id")
    diffusers_logging.disable_progress_bar()  # of loading: seconds at most
    try:
        if not folder.is_dir():
            folder = snapshot(model, sources.SD_FILES, sources.SD_WEIGHTS)
        pipe = GuidedPipeline.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError, HTTPError) as error:
        raise utils.UserError(f"--sd_model {model}: could not be loaded ({str(error).splitlines()[0]}); "
                              "give a Stable Diffusion 1.x folder or hub id") from error
    for network in (pipe.unet, pipe.vae):  # convolutions are faster with the channels innermost
        network.to(memory_format=torch.channels_last)
    if compiled:
        pipe.run_unet = CompiledUNet(pipe.unet)
    if offload:
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    return pipe.to(device)


class GuidedPipeline(DiffusionPipeline):
    """Stable Diffusion 1.x that draws images from decoded features.

    Loads from any SD 1.x folder; whatever sampler and safety checker the folder names, this one has its own solvers and
    checks nothing. All networks are frozen and in eval mode.
    """

    model_cpu_offload_seq = "text_encoder->unet"  # the VAE is not in the line: guidance needs it beside the UNet

    def __init__(self, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer,
                 unet: UNet2DConditionModel, scheduler: DDIMScheduler):
        super().__init__()
        for network in (vae, text_encoder, unet):
            network.requires_grad_(False).eval()
        scheduler = DDIMScheduler.from_config(scheduler.config, clip_sample=False)  # latents are not in [-1, 1]
        if scheduler.config.prediction_type != "epsilon":
            raise utils.UserError(f"--sd_model: predicts {scheduler.config.prediction_type}, wanted epsilon; "
                                  "give a Stable Diffusion 1.x model")
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self.run_unet = unet

    @torch.no_grad()
    def __call__(
        self,
        condition,
        image_ids,
        sample=0,
        seed=0,
        z=None,
        strength=0.75,
        resolution=None,
        num_inference_steps=50,
        solver="ddim",
        cfg_scale=7.5,
        sag_scale=0.0,
        terms=(),
        guidance_scale=300000.0,
        guidance_strength=0.2,
        guidance_repeats=1,
        guidance_draws=0,
        rule="raw",
        grad="xt",
        x0="cond",
        decoder=None,
        decoded_at_once=None,
        log=None,
        looks=None,
    ):
        """Draw one image per row of `condition`.

        condition: (B, T, D) decoded text embedding c. image_ids: (B,) 0-based 73k ids. sample: number of the sample,
        one for all rows or (B,). The noise of a row depends on (seed, its id, its sample) and nothing else.
        z: (B, C, h, w) latents with the scaling factor, drawn over from level `strength`; None starts from pure noise.
        resolution: side of the image in pixels; None is z's, or the model's own. solver: a name of solvers.SOLVERS.
        sag_scale: self-attention guidance (blurred_noise), 0 = off. terms: guidance losses, each called with images
        (b, 3, H, W) in [0, 1] and the slice of the batch that they are of, -> (b,); none, or a zero guidance_scale or
        guidance_strength, leaves plain Stable Diffusion. guidance_strength: fraction of the steps, from the first,
        that are guided. guidance_repeats: how often each of them is taken (`visits`), with solver 'ddim' alone.
        guidance_draws: at how many noised versions of the prediction the losses look (`pull_on`), 0 = at itself.
        rule: a name of guidance.RULES, what a gradient does. grad: 'xt' differentiates through the UNet, 'x0' through
        the decoder only. x0: the prediction that the losses see, 'cond' (the conditional one) or 'cfg' (the one the
        sampler follows). decoder: of what the losses see, (b, C, h, w) latents -> image in [0, 1]; None is the VAE's.
        decoded_at_once: rows of the batch that go through a decoder
        together, which is where memory goes; None is all. log: a list that gets what a guided step found
        (guidance_pull). looks: what an adapter makes of decoded g and z (models.Looks), for the conditional half.

        Returns (B, 3, H, W) float32 in [0, 1]. Raises UserError when c, z or the resolution does not fit the model.
        """
        _check_choices(solver=(solver, SOLVERS), rule=(rule, RULES), grad=(grad, GRADS), x0=(x0, X0S))
        if guidance_repeats > 1 and solver != "ddim":
            raise ValueError(f"guidance_repeats={guidance_repeats} with solver={solver!r}: only ddim can go back")
        self.check(condition, z, resolution, num_inference_steps, sag_scale)
        context = self.context_of(condition)
        latents, timesteps = self.start(image_ids, sample, seed, z, strength, resolution, num_inference_steps)
        path = SOLVERS[solver](self.scheduler, timesteps)
        n_guided = guided_steps(guidance_strength, len(timesteps)) if terms and guidance_scale else 0
        steps = visits(len(timesteps), n_guided, guidance_repeats)

        def noises_of(names):  # one copy: in the loop each would wait for it
            noises = [self.start_noise(image_ids, sample, utils.derive_seed(seed, *name), latents.shape[1:])
                      for name in names]
            return iter(torch.stack(noises).to(latents) if noises else ())

        fresh = noises_of([visit for visit in steps if visit[1]])
        around = noises_of([(*visit, 1 + k) for visit in steps if visit[0] < n_guided for k in range(guidance_draws)])
        with self._watched_attention(sag_scale) as tokens:
            for step, repeat in self.progress_bar(steps):
                t = timesteps[step]
                if repeat:
                    latents = path.back(step, latents, next(fresh))
                if step < n_guided:
                    eps_empty, eps_cond, gradient = self.guidance_gradient(
                        latents, t, context, cfg_scale, speaking(terms, step, n_guided), grad, x0, decoder,
                        [next(around) for _ in range(guidance_draws)], decoded_at_once, log, looks)
                else:
                    eps_empty, eps_cond = self.predict_noise(latents, t, context, looks)
                eps = eps_empty + cfg_scale * (eps_cond - eps_empty)
                if sag_scale:
                    blurred = self.blurred_noise(latents, eps_empty, t, context[:len(latents)], tokens[-1])
                    eps = eps + sag_scale * (eps_empty - blurred)
                if step < n_guided:
                    eps = RULES[rule](eps, gradient, self.scheduler.alphas_cumprod[t], guidance_scale)
                latents = path.step(step, latents, eps)
        image = torch.cat([self.decode(rows).float() for rows in latents.split(decoded_at_once or len(latents))])
        self.maybe_free_model_hooks()
        return image

    def progress_bar(self, iterable=None, total=None):
        """The bar of one batch's steps, as set_progress_bar_config says: ours (utils.progress)."""
        return utils.progress(iterable, total=total, **getattr(self, "_progress_bar_config", {}))

    # --- where the path starts -----------------------------------------------------------------------------------

    def context_of(self, condition):
        """What the UNet is conditioned on, (2B, T, D): the empty caption for each row, then `condition`."""
        return torch.cat([self.empty_condition().expand_as(condition),
                          condition.to(self._execution_device, self.unet.dtype)])

    def empty_condition(self):
        """Text embedding of the empty caption, (1, T, D): the unconditional half of classifier-free guidance."""
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer("", padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return self.text_encoder(tokens.input_ids.to(self._execution_device))[0].to(self.unet.dtype)

    def start(self, image_ids, sample=0, seed=0, z=None, strength=0.75, resolution=None, num_inference_steps=50):
        """The first latents, (B, C, h, w), and the timesteps to run from them, a list of integers."""
        shape = self.latent_shape(resolution, None if z is None else z.shape[1:])
        precision = torch.promote_types(torch.float32, self.unet.dtype)  # latents are never rounded to half
        noise = self.start_noise(image_ids, sample, seed, shape).to(self._execution_device, precision)
        if z is None:
            return noise, timesteps_of(self.scheduler, num_inference_steps)
        timesteps, z = timesteps_of(self.scheduler, num_inference_steps, strength), z.to(noise)
        if not timesteps:
            return z, timesteps
        abar = self.scheduler.alphas_cumprod[timesteps[0]]  # the level that the first step assumes
        return abar.sqrt() * z + (1 - abar).sqrt() * noise, timesteps

    def latent_shape(self, resolution=None, z_shape=None):
        """(C, h, w) of an image of `resolution` pixels; None: of z, if there is one, or the UNet's own size.

        Raises UserError when the resolution is no multiple of the VAE's factor, or not that of z.
        """
        side, channels = self.unet.config.sample_size, self.unet.config.in_channels
        height, width = (side, side) if isinstance(side, int) else side
        if resolution is not None:
            factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
            if resolution < factor or resolution % factor:
                raise utils.UserError(f"--resolution {resolution}: wanted a multiple of {factor}, the factor of "
                                      f"--sd_model's VAE, such as {max(resolution // factor, 1) * factor}")
            height = width = resolution // factor
            if z_shape is not None and tuple(z_shape) != (channels, height, width):
                raise utils.UserError(f"--resolution {resolution}: z is of {tuple(z_shape)}, wanted "
                                      f"{(channels, height, width)}; leave --resolution out, or use --z none")
        return (channels, height, width) if z_shape is None else tuple(z_shape)

    def start_noise(self, image_ids, sample=0, seed=0, shape=None):
        """(B, C, h, w) standard normal, drawn on the CPU row by row from (seed, image id, sample).

        shape: (C, h, w); None takes the UNet's own.
        """
        shape = shape or self.latent_shape()
        samples = [sample] * len(image_ids) if isinstance(sample, int) else sample
        seeds = [utils.derive_seed(seed, *row) for row in zip(image_ids, samples, strict=True)]
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])

    # --- one step -------------------------------------------------------------------------------------------------

    def predict_noise(self, latents, t, context, looks=None):
        """The unconditional and the conditional noise, (B, C, h, w) each, from one pass over the doubled batch."""
        return self._unet(torch.cat([latents, latents]), t, context, looks).chunk(2)

    def predict_x0(self, latents, eps, t):
        """The clean latents that noise `eps` means, (B, C, h, w)."""
        abar = self.scheduler.alphas_cumprod[t]
        return (latents - (1 - abar).sqrt() * eps) / abar.sqrt()

    def guidance_gradient(self, latents, t, context, cfg_scale, terms, grad="xt", x0="cond", decoder=None, noises=(),
                          decoded_at_once=None, log=None, looks=None):
        """The unconditional and conditional noise, and the gradient of the terms wrt latents; (B, C, h, w) each.

        Arguments as of a call; noises: standard normal, (B, C, h, w) each (pull_on); log as of guidance_pull. Every row
        goes through the UNet once for both of its noises. Only what the losses see keeps a graph: with grad='xt' and
        x0='cond' that is half of the rows. With grad='x0' the noise counts as a constant, so that the gradient is that
        wrt x0 times dx0/dx_t = 1/sqrt(abar): both kinds are in the same unit.
        """
        with torch.enable_grad():
            latents = latents.detach().requires_grad_()
            if grad == "xt" and x0 == "cond":
                empty, cond = context.chunk(2)
                eps_cond = self._unet(latents, t, cond, looks)
                with torch.no_grad():
                    eps_empty = self._unet(latents, t, empty)
            else:
                with torch.set_grad_enabled(grad == "xt"):
                    eps_empty, eps_cond = self.predict_noise(latents, t, context, looks)
            seen = eps_cond if x0 == "cond" else eps_empty + cfg_scale * (eps_cond - eps_empty)
            clean = self.predict_x0(latents, seen, t)
            spread = SPREAD * (1 - self.scheduler.alphas_cumprod[t]).sqrt()
            pull, scale = self.pull_on(clean.detach(), terms, decoder or self.decode,
                                       [spread * noise for noise in noises], decoded_at_once, log)
            gradient = torch.autograd.grad(clean, latents, pull)[0] / scale
        return eps_empty.detach(), eps_cond.detach(), gradient

    def pull_on(self, clean, terms, decoder, noises=(), at_once=None, log=None):
        """The gradient of the terms wrt clean latents, (B, C, h, w), times `scale` (B, 1, 1, 1), which comes with it.

        noises: (B, C, h, w) each; the mean over clean + noise is what measured features pull by (guidance.views_of).
        `at_once` rows after the other, each with a graph of its own: so memory does not grow with the batch. Terms that
        look at one image meet there (guidance_pull): one pass back through the decoder serves them all.
        """
        pulls, found = [], []
        for start in range(0, len(clean), at_once or len(clean)):
            rows = slice(start, start + (at_once or len(clean)))
            parts, facts = [], []
            for latents, looking, share in views_of(clean[rows], terms, [noise[rows] for noise in noises]):
                latents = latents.requires_grad_()
                image = decoder(latents)
                pull, seen = guidance_pull(image, looking, rows)
                scale = loss_scale(pull)
                parts.append(share * torch.autograd.grad(image, latents, pull * scale)[0] / scale)
                facts.append(seen)
            if 0 < len(noises) < len(parts):  # the last is the brain's, which looked at another image than the others
                facts.append({"cosine": F.cosine_similarity(sum(parts[:-1]).flatten(1), parts[-1].flatten(1))})
            pulls.append(sum(parts))
            found.append(averaged(facts))
        if log is not None:
            log.append({name: torch.cat([facts[name] for facts in found]) for name in found[0]})
        pulls = torch.cat(pulls)
        scale = loss_scale(pulls)
        return pulls * scale, scale

    def blurred_noise(self, latents, eps_empty, t, empty, tokens):
        """Self-attention guidance (Hong et al. 2023, ICCV): the noise when what the UNet attends to is blurred.

        The clean latents that eps_empty means are blurred where the UNet's middle attends more than on average, noised
        with eps_empty again and given to the UNet. tokens: (>= B, T, D), what the attention got in the pass that made
        eps_empty, the unconditional rows first. empty: (B, T', D'), the empty caption. Returns (B, C, h, w).
        """
        abar = self.scheduler.alphas_cumprod[t]
        clean = self.predict_x0(latents, eps_empty, t)
        mask = self._attended(tokens[:len(latents)], clean.shape[2:]).to(clean.dtype)  # (B, 1, h, w)
        blurred = mask * gaussian_blur(clean) + (1 - mask) * clean
        return self._unet(abar.sqrt() * blurred + (1 - abar).sqrt() * eps_empty, t, empty)

    def decode(self, latents):
        """Latents with the scaling factor -> (B, 3, H, W) image in [0, 1], pixels outside keeping their gradient."""
        scaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        return in_unit_range(self.vae.decode(scaled).sample.to(latents.dtype))

    def _unet(self, latents, t, context, looks=None):
        """The noise in latents (n, C, h, w) by context (n, T, D); looks (models.Looks): of the last B of the n rows."""
        t = torch.full((1,), t, device=latents.device)  # filled there: a copy from here would wait for the GPU
        beside = {} if looks is None else looks.beside(latents, t, self.unet.dtype)
        noise = self.run_unet(latents.to(self.unet.dtype), t, encoder_hidden_states=context, **beside).sample
        return noise.to(latents.dtype)

    # --- self-attention of the UNet's middle ----------------------------------------------------------------------

    @property
    def _middle_attention(self):
        return self.unet.mid_block.attentions[0].transformer_blocks[0].attn1

    @contextmanager
    def _watched_attention(self, wanted):
        """A list whose last item is what the middle attention last got, (B or 2B, T, D), where that is wanted."""
        tokens = []

        def keep(module, args, kwargs):
            tokens[:] = [(args[0] if args else kwargs["hidden_states"]).detach()]

        hook = self._middle_attention.register_forward_pre_hook(keep, with_kwargs=True) if wanted else None
        try:
            yield tokens
        finally:
            if hook is not None:
                hook.remove()

    def _attended(self, tokens, size):
        """Mask (B, 1, h, w) of 0 and 1, 1 where the tokens (B, T, D) get more than the average attention."""
        attention = self._middle_attention
        query, key = (attention.head_to_batch_dim(project(tokens)) for project in (attention.to_q, attention.to_k))
        weights = attention.get_attention_scores(query, key).unflatten(0, (-1, attention.heads))  # (B, heads, T, T)
        received = weights.mean(1).sum(1)  # (B, T), 1 on average
        halvings = sum(block.downsamplers is not None for block in self.unet.down_blocks)
        height, width = (-(-side // 2**halvings) for side in size)
        return F.interpolate((received > 1).to(tokens.dtype).view(-1, 1, height, width), size)

    def check(self, condition, z=None, resolution=None, num_inference_steps=50, sag_scale=0.0):
        """Raise UserError for what does not fit the model: arguments as in a call."""
        found, tokens = tuple(condition.shape[1:]), self.tokenizer.model_max_length
        if tokens > 10**6:  # what transformers says of a tokenizer that does not say
            raise utils.UserError("--sd_model: its tokenizer does not say how many tokens a caption has; download the "
                                  "tokenizer folder again")
        wanted = (tokens, self.unet.config.cross_attention_dim)
        if found != wanted:
            raise utils.UserError(f"scores of c: rows of shape {found}, --sd_model wants {wanted}; "
                                  "use the model whose text encoder made the features")
        if z is not None and (z.ndim != 4 or z.shape[1] != self.unet.config.in_channels):
            raise utils.UserError(f"--z: rows of shape {tuple(z.shape[1:])}, --sd_model wants "
                                  f"({self.unet.config.in_channels}, h, w)")
        most = self.scheduler.config.num_train_timesteps - self.scheduler.config.steps_offset
        if num_inference_steps > most:
            raise utils.UserError(f"--num_inference_steps {num_inference_steps}: the model knows {most}; lower it")
        side = self.latent_shape(resolution, None if z is None else z.shape[1:])[1:]
        if sag_scale and min(side) <= SAG_TAPS // 2:
            raise utils.UserError(f"--sag_scale {sag_scale:g}: blurs over {SAG_TAPS} latent pixels, the latents are "
                                  f"{tuple(side)}; raise --resolution, or leave it out")


def guided_steps(guidance_strength, n_steps):
    """How many of the steps, from the first, --guidance_strength means: at least one where it is not 0."""
    return min(n_steps, max(1, round(guidance_strength * n_steps))) if guidance_strength else 0


def visits(n_steps, n_guided, repeats):
    """The (step, repeat) of a path: guided steps `repeats` times, the others once.

    Time travel (Yu et al. 2023, FreeDoM; Bansal et al. 2023): a step is small beside what the likelihood asks for, and
    noised back to where it began the picture can go on in the same direction, and the UNet mend what does not fit.
    """
    return [(step, repeat) for step in range(n_steps) for repeat in range(repeats if step < n_guided else 1)]


def averaged(facts):
    """The mean of each value, {name: (b,)}, over those of the dicts that have it."""
    found = {name: [seen[name] for seen in facts if name in seen] for name in dict.fromkeys(sum(map(list, facts), []))}
    return {name: torch.stack(values).mean(0) if len(values) > 1 else values[0] for name, values in found.items()}


def loss_scale(pull):
    """What brings each row's largest value of (B, ...) to 1/4 to 1/2, (B, 1, ...), so that half precision takes it.

    Losses differ by many orders of magnitude. A power of two, so that nothing else is rounded.
    """
    largest = pull.abs().amax(tuple(range(1, pull.ndim)), keepdim=True)
    return torch.exp2(-2 - torch.floor(torch.log2(largest.clamp_min(torch.finfo(pull.dtype).tiny))).clamp(-100, 100))


def rows_on_cpu(latent_shape):
    """Pictures of latents (C, h, w) that a CPU draws at once."""
    return max(1, CPU_BATCH // (latent_shape[1] * latent_shape[2]))


def gaussian_blur(latents, taps=SAG_TAPS, sigma=1.0):
    """(B, C, h, w) smoothed over h and w, reflected at the border; taps and sigma in latent pixels, SAG's."""
    offsets = torch.arange(taps, dtype=latents.dtype, device=latents.device) - taps // 2
    weights = torch.exp(-0.5 * (offsets / sigma).square())
    weights = weights / weights.sum()
    channels = latents.shape[1]
    kernel = torch.outer(weights, weights).expand(channels, 1, taps, taps)
    return F.conv2d(F.pad(latents, [taps // 2] * 4, mode="reflect"), kernel, groups=channels)


def _check_choices(**choices):
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name}={value!r}; wanted one of {tuple(allowed)}")
