"""The UNet compiled, and trusted as far as it has been checked."""

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

AGREES = 0.999  # cosine of the compiled gradient with the plain one


class CompiledUNet:
    """Calls a UNet compiled by torch.compile; with gradient only if that was right at the first pass that takes one.

    On a CPU torch 2.13 compiles Stable Diffusion's UNet to one with a wrong gradient, without a word: so it is compared
    with the plain network's, once.
    """

    def __init__(self, unet, say=print):
        self.plain, self.fast, self.say = unet, torch.compile(unet), say
        self.trusted = None  # with gradient; None: not known yet

    def __call__(self, latents, t, encoder_hidden_states, **adapted):
        """As the UNet: latents (B, C, h, w), t (1,), context (B, T, D) -> an object with .sample (B, C, h, w)."""
        given = latents, t, encoder_hidden_states
        if isinstance(latents, FakeTensor):  # sampling.costs counts, and computes nothing
            return self.plain(*given, **adapted)
        if torch.is_grad_enabled() and self.trusted is None:
            fast, plain = (self._gradient(unet, *given, **adapted) for unet in (self.fast, self.plain))
            cosine = F.cosine_similarity(fast.flatten(), plain.flatten(), dim=0).item()
            self.trusted = cosine > AGREES
            self.say(f"--compile: cosine of the compiled gradient with the plain one {cosine:.4f}" +
                     ("" if self.trusted else "; passes with gradient are not compiled"))
        return (self.fast if self.trusted or not torch.is_grad_enabled() else self.plain)(*given, **adapted)

    @staticmethod
    def _gradient(unet, latents, t, context, **adapted):
        """d sum(noise * a fixed direction) / d latents, (B, C, h, w) in float32."""
        latents = latents.detach().requires_grad_()
        noise = unet(latents, t, context, **adapted).sample
        direction = torch.linspace(-1, 1, noise.numel(), device=noise.device).view_as(noise).to(noise)
        return torch.autograd.grad(noise, latents, direction)[0].float()
