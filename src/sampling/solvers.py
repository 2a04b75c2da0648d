"""From noise to picture: which noise levels a path visits, and how a step gets from one to the next.

Notation as in sampling.pipeline: abar = alphas_cumprod[t], sigma = sqrt(1 - abar), eps = predicted noise, x0 =
predicted clean latent. Timesteps are plain integers and alphas_cumprod lies on the CPU: no step waits for a GPU.
"""

import torch
from diffusers import DPMSolverMultistepScheduler

LEVELS = 50  # of the published path: where one starts is told in these, whatever the number of steps


def timesteps_of(scheduler, num_inference_steps, strength=1.0):
    """The timesteps of a path, descending: int(num_inference_steps * strength) of them, evenly spaced.

    The first is the one at which a path of LEVELS steps starts with this strength (DDIM's "leading" spacing, as in
    Stable Diffusion and diffusers' image-to-image), the last the one at which it ends. So strength is a noise level,
    the same for any number of steps.
    """
    last = scheduler.config.steps_offset
    spacing = scheduler.config.num_train_timesteps // LEVELS
    first = last + spacing * max(int(LEVELS * strength) - 1, 0)
    return torch.linspace(first, last, int(num_inference_steps * strength)).round().int().tolist()


class Ddim:
    """DDIM with eta 0 (Song et al. 2021, equation 12): to the next level along the predicted noise."""

    def __init__(self, scheduler, timesteps):
        """scheduler: a diffusers one, for its noise levels; timesteps: descending integers."""
        self.abars = [scheduler.alphas_cumprod[t] for t in timesteps] + [scheduler.final_alpha_cumprod]

    def step(self, i, latents, eps):
        """The latents after step i, (B, C, h, w), from those before it and the noise in them."""
        abar, after = self.abars[i:i + 2]
        x0 = (latents - (1 - abar).sqrt() * eps) / abar.sqrt()
        return after.sqrt() * x0 + (1 - after).sqrt() * eps

    def back(self, i, latents, noise):
        """Latents before step i, of those after it and of fresh noise: the forward process (Ho et al. 2020, eq. 4)."""
        abar, after = self.abars[i:i + 2]
        return (abar / after).sqrt() * latents + (1 - abar / after).sqrt() * noise


class Dpm:
    """DPM-Solver++ (2M) (Lu et al. 2022, algorithm 2), diffusers': each step also uses the x0 of the step before.

    Of second order: what DDIM draws in many steps it comes near to in fewer. It ends at x0 itself.
    """

    def __init__(self, scheduler, timesteps):
        self.timesteps = timesteps
        self.scheduler = DPMSolverMultistepScheduler.from_config(
            scheduler.config, algorithm_type="dpmsolver++", solver_order=2, timestep_spacing="leading",
            use_karras_sigmas=False)
        self.scheduler.set_timesteps(timesteps=timesteps)
        self.scheduler.set_begin_index(0)  # or it looks for the step by its timestep, which waits for a GPU

    def step(self, i, latents, eps):
        return self.scheduler.step(eps, self.timesteps[i], latents).prev_sample


SOLVERS = {"ddim": Ddim, "dpm": Dpm}  # as options.SOLVERS names them
