"""What decodes latents for the guidance losses."""

import torch
import torch.nn.functional as F

import utils

PIXELS_AT_ONCE = {"full": 4096}  # latent pixels that a GPU decodes at once with a graph: one picture of 64 x 64
PIXELS_OF_CHEAPER = 16384  # by another decoder


def load_guidance_decoder(name, pipe):
    """The decoder of --guidance_decoder, latents (B, C, h, w) -> image in [0, 1] that guidance losses see.

    name: 'full' is the pipeline's own; 'half' the same on latents averaged over 2 x 2, a fourth of the work; else a
    folder or hub id of an AutoencoderTiny (TAESD). Raises UserError when that cannot be loaded.
    """
    if name in ("full", "half"):
        return guidance_decoder(name, pipe)
    from diffusers import AutoencoderTiny
    from diffusers.utils import logging

    try:
        config = AutoencoderTiny.load_config(name)
        if config.get("_class_name") != "AutoencoderTiny":
            raise ValueError(f"it is an {config.get('_class_name')}")
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # its own config says something that it does not expect
        tiny = AutoencoderTiny.from_pretrained(name, torch_dtype=pipe.unet.dtype)
        logging.set_verbosity(verbosity)
    except (OSError, ValueError) as error:
        raise utils.UserError(f"--guidance_decoder {name}: could not be loaded ({str(error).splitlines()[0]}); give "
                              "full, half or the folder or hub id of an AutoencoderTiny") from error
    tiny.requires_grad_(False).eval().to(pipe._execution_device, memory_format=torch.channels_last)
    return guidance_decoder(name, pipe, tiny)


def guidance_decoder(name, pipe, tiny=None):
    """The decoder of a name, as load_guidance_decoder; tiny: the AutoencoderTiny, where it is one."""
    if name == "full":
        return pipe.decode
    if name == "half":
        return lambda latents: pipe.decode(F.avg_pool2d(latents, 2))
    return lambda latents: in_unit_range(tiny.decode(latents.to(tiny.dtype)).sample.to(latents.dtype))


def decoded_at_once(name, latent_shape):
    """How many pictures of latents (C, h, w) a GPU decodes together with a graph: as many as take 3 GB in half
    precision."""
    return max(1, PIXELS_AT_ONCE.get(name, PIXELS_OF_CHEAPER) // (latent_shape[1] * latent_shape[2]))


def gradient_cosine(pipe, condition, start, cfg_scale, terms, grad, x0, decoder, looks=None):
    """Cosine, a float, between the first step's guidance gradient through `decoder` and through the VAE's.

    condition: (B, T, D); start: what pipe.start returned for these rows, a step at least; the others as of a call of
    the pipeline. Mean over the rows.
    """
    latents, timesteps = start
    with torch.no_grad():
        context = pipe.context_of(condition)
        cheap, full = (pipe.guidance_gradient(latents, timesteps[0], context, cfg_scale, terms, grad, x0, decode,
                                              looks=looks)[2]
                       for decode in (decoder, pipe.decode))
    return F.cosine_similarity(cheap.flatten(1), full.flatten(1)).mean().item()


def in_unit_range(decoded):
    """A decoder's [-1, 1] to an image clamped to [0, 1].

    The clamp is straight-through: pixels outside keep their gradient, or they could never be pulled back.
    """
    image = (decoded + 1) / 2
    return image + (image.clamp(0, 1) - image).detach()
