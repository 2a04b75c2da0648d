"""Guided diffusion: from c (and z) to an image, steered by the gradient of losses on the image being formed.

The sampler is deterministic DDIM with classifier-free guidance; DESIGN section 7 gives the equations. Letters:
B batch, C latent channels, h w latent size, H W image size, T tokens, D width. Notation as in the papers:
abar = alphas_cumprod[t], sigma = sqrt(1 - abar), eps = predicted noise, x0 = predicted clean latent (carries the VAE's
scaling factor).
"""

from contextlib import nullcontext

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTokenizer

import utils

RULES, GRADS, X0S = ("raw", "norm"), ("xt", "x0"), ("cond", "cfg")
MAX_SHIFT = 0.6  # the norm rule moves x0 by at most this many sigma (rms)
LAYER_WEIGHTS = {2: 1.5, 4: 1.2}  # NeuralDiffuser's emphasis on early CLIP layers; the others weigh 1
LOSS_SCALE = 2.0**12  # keeps small gradients above fp16's smallest number; a power of two, so exact elsewhere
SHORT_SEQUENCE = 1024  # latent pixels up to which plain attention on a CPU is the faster one and fits in memory


def load_pipeline(model, device, dtype=torch.float32):
    """Load any Stable Diffusion 1.x folder or hub id as a GuidedPipeline on `device`.

    Raises UserError when it can not be loaded.
    """
    try:
        pipe = GuidedPipeline.from_pretrained(model, dtype=dtype)
    except (OSError, ValueError) as error:
        raise utils.UserError(f"--sd_model {model}: could not be loaded ({str(error).splitlines()[0]}); "
                              "give a Stable Diffusion 1.x folder or hub id") from error
    if device.type == "cpu":  # convolutions on a CPU are faster with the channels innermost
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    return pipe.to(device)


class ClipFeatureLoss:
    """Guidance term (B, 3, H, W) image in [0, 1] -> (B,) loss: distance of its CLIP features to the decoded ones.

    NeuralDiffuser's loss: sum over layers of weight_l * MSE(features_l, target_l), where
    weight_l = (1 / ||target_l||) / sum_l(1 / ||target_l||) * LAYER_WEIGHTS; norms are of each sample by itself.
    """

    def __init__(self, clip_features, targets):
        """clip_features: models.ClipFeatures; targets: {layer k: (B, T, D)}, the decoded g_k of the batch."""
        self.clip_features, self.targets = clip_features, targets
        inverse_norms = torch.stack([1 / target.flatten(1).norm(dim=1) for target in targets.values()])  # (layers, B)
        emphasis = torch.tensor([LAYER_WEIGHTS.get(layer, 1.0) for layer in targets]).to(inverse_norms)
        self.weights = inverse_norms / inverse_norms.sum(0) * emphasis[:, None]  # (layers, B)

    def __call__(self, image):
        features = self.clip_features(image)
        loss = 0.0
        for weight, (layer, target) in zip(self.weights, self.targets.items(), strict=True):
            found, wanted = tuple(target.shape[1:]), tuple(features[layer].shape[1:])
            if found != wanted:
                raise utils.UserError(f"scores of g_{layer}: rows of shape {found}, --clip_model wants {wanted}; "
                                      "use the CLIP that the features come from")
            loss = loss + weight * (features[layer] - target).square().mean((1, 2))
        return loss


def raw_rule(eps, gradient, abar, scale):
    """NeuralDiffuser's: eps' = eps + sigma * scale * gradient (eq. 12: sigma, not its square)."""
    return eps + (1 - abar).sqrt() * scale * gradient


def norm_rule(eps, gradient, abar, scale):
    """Shift x0 by `scale` sigma (rms, at most MAX_SHIFT) against the gradient, whatever the gradient's size.

    delta = -min(scale, MAX_SHIFT) * sigma * gradient / rms(gradient); eps' = eps - sqrt(abar) / sigma * delta is the
    noise whose x0 is x0 + delta. As it moves the prediction and not the sample, its effect does not grow with the
    number of steps.
    """
    sigma = (1 - abar).sqrt()
    rms = gradient.square().mean((1, 2, 3), keepdim=True).sqrt()
    direction = gradient / rms.clamp_min(torch.finfo(gradient.dtype).tiny)  # a zero gradient stays zero
    delta = -min(scale, MAX_SHIFT) * sigma * direction
    return eps - abar.sqrt() / sigma * delta


class GuidedPipeline(DiffusionPipeline):
    """Stable Diffusion 1.x that draws images from decoded features.

    Loads from any SD 1.x folder; whatever sampler and safety checker the folder names, this one samples with DDIM and
    checks nothing. All networks are frozen and in eval mode.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"

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

    @torch.no_grad()
    def __call__(
        self,
        condition,
        image_ids,
        sample=0,
        seed=0,
        z=None,
        strength=0.75,
        num_inference_steps=50,
        cfg_scale=7.5,
        terms=(),
        guidance_scale=300000.0,
        guidance_strength=0.2,
        rule="raw",
        grad="xt",
        x0="cond",
    ):
        """Draw one image per row of `condition`.

        condition: (B, T, D) decoded text embedding c. image_ids: (B,) 0-based 73k ids. sample: number of the sample,
        one for all rows or (B,). The noise of a row depends on (seed, its id, its sample) and nothing else.
        z: (B, C, h, w) latents with the scaling factor, drawn over from level `strength`; None starts from pure noise.
        terms: guidance losses, each (B, 3, H, W) image in [0, 1] -> (B,); none, or a zero guidance_scale or
        guidance_strength, leaves plain Stable Diffusion. guidance_strength: fraction of the steps, from the first,
        that are guided. rule: 'raw' or 'norm', what a gradient does (raw_rule, norm_rule). grad: 'xt' differentiates
        through the UNet, 'x0' through the decoder only. x0: the prediction that the losses see, 'cond' (the
        conditional one) or 'cfg' (the one the sampler follows).

        Returns (B, 3, H, W) float32 in [0, 1]. Raises UserError when c or z is not of this model's shape.
        """
        _check_choices(rule=(rule, RULES), grad=(grad, GRADS), x0=(x0, X0S))
        self._check_shapes(condition, z)
        device = self._execution_device
        context = torch.cat([self.empty_condition().expand_as(condition), condition.to(device, self.unet.dtype)])
        timesteps = self._timesteps(num_inference_steps, strength if z is not None else 1.0)
        latents = self.start_noise(image_ids, sample, seed, None if z is None else z.shape[1:]).to(device)
        if z is not None:  # noised to the very level that the first step assumes
            z = z.to(latents)
            latents = self.scheduler.add_noise(z, latents, timesteps[:1]) if len(timesteps) else z
        n_guided = round(guidance_strength * len(timesteps)) if terms and guidance_scale else 0
        apply_rule = raw_rule if rule == "raw" else norm_rule
        for step, t in enumerate(self.progress_bar(timesteps)):
            if step < n_guided:
                eps, gradient = self.guidance_gradient(latents, t, context, cfg_scale, terms, grad, x0)
                eps = apply_rule(eps, gradient, self.scheduler.alphas_cumprod[t], guidance_scale)
            else:
                eps_empty, eps_cond = self.predict_noise(latents, t, context)
                eps = eps_empty + cfg_scale * (eps_cond - eps_empty)
            latents = self.scheduler.step(eps, t, latents, eta=0.0).prev_sample
        return self.decode(latents).float()

    def empty_condition(self):
        """Text embedding of the empty caption, (1, T, D): the unconditional half of classifier-free guidance."""
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer("", padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return self.text_encoder(tokens.input_ids.to(self._execution_device))[0].to(self.unet.dtype)

    def start_noise(self, image_ids, sample=0, seed=0, shape=None):
        """(B, C, h, w) standard normal, drawn on the CPU row by row from (seed, image id, sample).

        shape: (C, h, w); None takes the UNet's own.
        """
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = shape or (self.unet.config.in_channels, height, width)
        samples = [sample] * len(image_ids) if isinstance(sample, int) else sample
        seeds = [utils.derive_seed(seed, *row) for row in zip(image_ids, samples, strict=True)]
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])

    def predict_noise(self, latents, t, context):
        """The unconditional and the conditional noise, (B, C, h, w) each, from one pass over the doubled batch.

        context: (2B, T, D), the empty captions first.
        """
        doubled = torch.cat([latents, latents]).to(self.unet.dtype)
        return self.unet(doubled, t, encoder_hidden_states=context).sample.to(latents.dtype).chunk(2)

    def guidance_gradient(self, latents, t, context, cfg_scale, terms, grad="xt", x0="cond"):
        """The sampler's noise (classifier-free guidance included) and the gradient of the terms' sum wrt latents.

        Both (B, C, h, w), from the same UNet pass. With grad='x0' the noise counts as a constant, so that the
        gradient is that wrt x0 times dx0/dx_t = 1/sqrt(abar): both kinds are in the same unit.
        """
        abar = self.scheduler.alphas_cumprod[t]
        with torch.enable_grad(), self._attention_for_gradients(latents):
            latents = latents.detach().requires_grad_()
            with torch.set_grad_enabled(grad == "xt"):
                eps_empty, eps_cond = self.predict_noise(latents, t, context)
                eps = eps_empty + cfg_scale * (eps_cond - eps_empty)
            clean = (latents - (1 - abar).sqrt() * (eps_cond if x0 == "cond" else eps)) / abar.sqrt()
            image = self.decode(clean)
            loss = sum(term(image).sum() for term in terms)
            gradient = torch.autograd.grad(loss * LOSS_SCALE, latents)[0] / LOSS_SCALE
        return eps.detach(), gradient

    def decode(self, latents):
        """Latents with the scaling factor -> (B, 3, H, W) image in [0, 1].

        The clamp is straight-through: pixels outside [0, 1] keep their gradient, or they could never be pulled back.
        """
        scaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        image = (self.vae.decode(scaled).sample.to(latents.dtype) + 1) / 2
        return image + (image.clamp(0, 1) - image).detach()

    def _timesteps(self, num_inference_steps, strength):
        """The last `strength` of the scheduler's timesteps, on the CPU: indexing by them must not wait for a GPU."""
        self.scheduler.set_timesteps(num_inference_steps)
        n_steps = min(int(num_inference_steps * strength), num_inference_steps)
        return self.scheduler.timesteps[num_inference_steps - n_steps:]

    def _attention_for_gradients(self, latents):
        """Plain matrix products on a CPU with few tokens: there the fused attention is slower backwards in bf16 (a
        guided step on a 16 x 16 latent took 1.3 times as long), and no faster in fp32."""
        if latents.device.type == "cpu" and latents[0, 0].numel() <= SHORT_SEQUENCE:
            return sdpa_kernel(SDPBackend.MATH)
        return nullcontext()

    def _check_shapes(self, condition, z):
        found = tuple(condition.shape[1:])
        wanted = (self.tokenizer.model_max_length, self.unet.config.cross_attention_dim)
        if found != wanted:
            raise utils.UserError(f"scores of c: rows of shape {found}, --sd_model wants {wanted}; "
                                  "use the model whose text encoder made the features")
        if z is not None and (z.ndim != 4 or z.shape[1] != self.unet.config.in_channels):
            raise utils.UserError(f"--z: rows of shape {tuple(z.shape[1:])}, --sd_model wants "
                                  f"({self.unet.config.in_channels}, h, w)")


def _check_choices(**choices):
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name}={value!r}; wanted one of {allowed}")
