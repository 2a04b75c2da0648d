"""Drawing a set of pictures: which of them are missing, in what batches, each written as soon as its batch is done.

A job is a (row, sample): a row of the scores, and the number of a sample. Letters: N images, B jobs of a batch, and
those of sampling.pipeline.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch

import utils
from nsd import sources
from sampling import folders
from sampling.decoders import decoded_at_once, gradient_cosine
from sampling.guidance import speaking

COMPARED = 4  # pictures on which a cheaper decoder's gradient is compared with the full one's
WRITERS = 4  # threads that write pictures while the next ones are drawn


@dataclass(frozen=True)
class Settings:
    """How every picture of a set is drawn: the flags of recon.py that reach the sampler, by their names.

    The defaults are those of recon.py's flags with --guidance_rule posterior.
    """

    seed: int = 42
    batch_size: int | None = None  # pictures at once on a GPU; None: as many as fit
    precision: str = "fp32"
    resolution: int | None = None
    num_inference_steps: int = 14
    solver: str = "ddim"
    strength: float = 0.75
    cfg_scale: float = 7.5
    sag_scale: float = 0.0
    guidance_scale: float = 30.0
    guidance_strength: float = 0.8
    guidance_repeats: int = 1
    guidance_draws: int = 3
    guidance_rule: str = "posterior"
    guidance_grad: str = "xt"
    guidance_x0: str = "cond"
    guidance_decoder: str = sources.TAESD
    use_gnet: bool = False  # what the guided steps find is then kept beside each picture

    @classmethod
    def of(cls, flags):
        """The settings among the flags of recon.py (a dict)."""
        return cls(**{field.name: flags[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class Sampler:
    """A pipeline and all it draws from: what turns jobs into pictures."""

    pipe: Any  # sampling.pipeline.GuidedPipeline
    scores: dict  # {feat: (N, ...)}: c, and those that an adapter takes
    image_ids: np.ndarray  # (N,)
    guides: list  # each has term(rows), the guidance term of a batch
    decoder: Any  # latents -> image in [0, 1] that the terms see; None without guides
    settings: Settings
    device: torch.device
    starts: np.ndarray | None = None  # (N, C, h, w) latents to start paths from; None: from noise
    adapter: Any = None  # models.FeatureAdapter, which is attached to the pipeline's UNet

    def inputs_of(self, jobs):
        """The condition (B, T, D) of B jobs, where their paths start and what guides them: arguments of the pipeline.

        The latter two are dicts: the arguments of its `start`, and terms, grad, x0, decoder and looks.
        """
        rows, samples = (list(column) for column in zip(*jobs, strict=True))
        condition = torch.from_numpy(self.scores["c"][rows]).to(self.device)
        z = None if self.starts is None else torch.from_numpy(self.starts[rows]).to(self.device)
        wanted = self.settings
        start = dict(image_ids=self.image_ids[rows].tolist(), sample=samples, seed=wanted.seed, z=z,
                     strength=wanted.strength, resolution=wanted.resolution,
                     num_inference_steps=wanted.num_inference_steps)
        return condition, start, dict(terms=[guide.term(rows) for guide in self.guides], grad=wanted.guidance_grad,
                                      x0=wanted.guidance_x0, decoder=self.decoder, looks=self.looks_of(rows))

    @torch.no_grad()
    def looks_of(self, rows):
        """What the adapter makes of the decoded features of B rows (models.Looks); None without an adapter."""
        if self.adapter is None:
            return None
        return self.adapter({feat: torch.from_numpy(self.scores[feat][rows]).to(self.device)
                             for feat in self.adapter.feats})

    def check(self, job):
        """Raise UserError unless the scores and settings are such as the networks take."""
        condition, start, guidance = self.inputs_of([job])
        wanted = self.settings
        self.pipe.check(condition, start["z"], wanted.resolution, wanted.num_inference_steps, wanted.sag_scale)
        if self.adapter is not None and self.scores["z"].shape[1:] != self.latent_shape:
            raise utils.UserError(f"scores of z: rows of shape {self.scores['z'].shape[1:]}, the adapter draws latents "
                                  f"of {self.latent_shape}; leave --resolution out, or draw without --use_adapter")
        with torch.inference_mode():
            for term in guidance["terms"]:
                term(torch.zeros(1, 3, 8, 8, device=self.device))

    def draw(self, jobs):
        """Images (B, 3, H, W) in [0, 1] of B jobs, and what the guided steps found: [{name: list of at least B}]."""
        lacking = self.rows_at_once() - len(jobs) if self.device.type == "cpu" else 0
        condition, start, guidance = self.inputs_of(jobs + [jobs[-1]] * lacking)
        wanted, log = self.settings, []
        images = self.pipe(condition, **start, **guidance, solver=wanted.solver, cfg_scale=wanted.cfg_scale,
                           sag_scale=wanted.sag_scale, rule=wanted.guidance_rule, guidance_scale=wanted.guidance_scale,
                           guidance_strength=wanted.guidance_strength, guidance_repeats=wanted.guidance_repeats,
                           guidance_draws=wanted.guidance_draws,
                           decoded_at_once=self.decoded_at_once, log=log)
        return images[:len(jobs)], [{name: values.tolist() for name, values in step.items()} for step in log]

    @cached_property
    def latent_shape(self):
        """(C, h, w) of the pictures' latents."""
        z_shape = None if self.starts is None else self.starts.shape[1:]
        return self.pipe.latent_shape(self.settings.resolution, z_shape)

    @property
    def decoded_at_once(self):
        """Pictures that go through a decoder together; None: all of a batch, as a CPU does, which draws to the bit."""
        if self.device.type == "cpu":
            return None
        return decoded_at_once(self.settings.guidance_decoder, self.latent_shape)

    def rows_at_once(self):
        """Pictures per batch.

        On a CPU the last digits of a network's output depend on the number of rows that go through it together, not on
        which rows they are. So the number is always the same there, and `draw` pads the last batch.
        """
        from sampling.pipeline import rows_on_cpu  # loads diffusers, which a folder that is complete does without

        if self.device.type == "cpu":
            return rows_on_cpu(self.latent_shape)
        return self.settings.batch_size or self.largest_batch(torch.cuda.mem_get_info(self.device)[0])

    def costs(self, n):
        """The sampling.costs.Costs of a batch of n."""
        from sampling.costs import parts_of, total
        from sampling.pipeline import guided_steps

        condition, start, guidance = self.inputs_of([(0, 0)] * n)
        latents, timesteps = self.pipe.start(**start)
        guidance["noises"] = [latents] * self.settings.guidance_draws
        guided = guided_steps(self.settings.guidance_strength, len(timesteps)) if self.guides else 0
        return total(parts_of(self.pipe, condition, latents, guidance, self.decoded_at_once), len(timesteps), guided,
                     self.settings.guidance_repeats)

    def largest_batch(self, free):
        """How many pictures fit `free` bytes: counted, and said."""
        from sampling.costs import largest_batch, of_batch

        counted, step = cache(self.costs), self.decoded_at_once or 1  # a count takes seconds
        size = largest_batch(counted, free, step)
        costs = of_batch(counted, size, step)
        print(f"a picture takes {costs.flops / size / 1e12:.3g} teraFLOP; batches of {size} take "
              f"{utils.in_bytes(costs.bytes)} beyond the networks, of {utils.in_bytes(free)} free")
        return size

    def print_cosine(self, jobs):
        """Print how far the gradient through a cheaper decoder agrees with the full one's; one job at a time, which
        needs little memory."""
        name, cosines = self.settings.guidance_decoder, []
        if not self.guides or name == "full":
            return
        from sampling.pipeline import guided_steps

        try:
            for job in jobs:
                condition, start, guidance = self.inputs_of([job])
                latents, timesteps = self.pipe.start(**start)
                if len(timesteps):
                    n_guided = guided_steps(self.settings.guidance_strength, len(timesteps))
                    guidance["terms"] = speaking(guidance["terms"], 0, n_guided)
                    cosines.append(gradient_cosine(self.pipe, condition, (latents, timesteps), self.settings.cfg_scale,
                                                   **guidance))
        except torch.OutOfMemoryError:
            print("--guidance_decoder: its gradient is not compared, the full decoder does not fit the GPU")
        if cosines:
            print(f"--guidance_decoder {name}: cosine of its gradient with the full decoder's {np.mean(cosines):.3f} "
                  f"(first step, mean of {len(cosines)} pictures)")


# --- a folder of pictures -------------------------------------------------------------------------------------------


def fill(folder, jobs, config, load_sampler, begin, team, overwrite=False):
    """Draw the pictures of `jobs` that `folder` does not have yet, shared among the team's processes.

    config: what the folder's config.json will say. load_sampler: () -> Sampler. begin: whether pictures are
    there already -> anything; the main process calls it before the first is drawn. overwrite: draw all of them, and
    delete what is there. Returns what `begin` did, None in the other processes.
    Nothing in the folder is touched before all networks are there and fit the scores. Raises UserError when the folder
    holds pictures of another config, and for pictures that are not finite.
    """
    folders.check_folder(folder, config, overwrite)
    team.wait()  # until every process has looked
    missing = [job for job in jobs if overwrite or not folders.is_whole(folder / folders.file_name(*job))]
    team.print(f"{folder}: {len(jobs)} pictures wanted, {len(jobs) - len(missing)} exist")
    mine = team.take(missing)
    sampler = load_sampler() if mine else None
    if mine:
        sampler.check(mine[0])
    team.wait()  # until every process has counted
    if team.is_main:
        folders.clear_folder(folder, config, overwrite)
    begun = begin(bool(folders.pictures_in(folder))) if team.is_main else None
    team.wait()
    if mine:
        draw(mine, sampler, folder, team.is_main)
    team.wait()
    return begun


def draw(jobs, sampler, folder, is_main=True):
    """Draw every (row, sample) of `jobs` and write it to `folder` as soon as its batch is done.

    Only the main process shows a bar and compares decoders. Raises UserError, at the end, for pictures that are
    not finite: these are not written, the others are.
    """
    diverged = []
    if is_main:
        sampler.print_cosine(jobs[:COMPARED])
    with ThreadPoolExecutor(WRITERS) as writers, utils.progress(total=len(jobs), desc="pictures", unit="picture",
                                                                disable=not is_main) as bar:
        written = []
        for batch, images, steps in batches(jobs, sampler):
            for done in written:  # of the batch before, while this one was drawn
                done.result()
            lost, written = save_batch(folder, batch, images, steps if sampler.settings.use_gnet else None,
                                       writers.submit)
            diverged += lost
            bar.update(len(batch))
        for done in written:
            done.result()
    if diverged:
        raise utils.UserError(
            f"--guidance_scale {sampler.settings.guidance_scale:g}, --precision {sampler.settings.precision}: the "
            f"sampler diverged (NaN) on {len(diverged)} of {len(jobs)} pictures (first: image id "
            f"{sampler.image_ids[diverged[0][0]]}), wanted finite ones; lower the scale or use --precision fp32")


def batches(jobs, sampler):
    """Draw the jobs, batch by batch: yields (jobs, images, what the guided steps found).

    A size that was counted and does not fit after all is halved; one that was asked for raises OutOfMemoryError.
    """
    start, size = 0, sampler.rows_at_once()
    while start < len(jobs):
        batch = jobs[start:start + size]
        try:
            images, steps = sampler.draw(batch)
        except torch.OutOfMemoryError:
            if sampler.settings.batch_size or size == 1:
                raise
            images = None
        if images is None:  # outside the handler, which holds on to the tensors of the attempt
            size = max(1, size // 2)
            torch.cuda.empty_cache()
            print(f"does not fit the GPU: on with batches of {size}")
            continue
        yield batch, images, steps
        start += len(batch)


def save_batch(folder, jobs, images, steps, submit):
    """Write the finite ones of the images (B, 3, H, W) of B jobs, and what the guided steps found, unless None.

    submit: of an executor, whose threads write meanwhile. Returns the jobs of those that are not finite, and the
    futures of the files.
    """
    finite = torch.isfinite(images).flatten(1).all(1).tolist()
    arrays = as_pixels(images)

    def write(i):
        if steps is not None:  # before the picture: one that is there has its steps beside it
            folders.save_steps(folder, *jobs[i], [{name: found[i] for name, found in step.items()} for step in steps])
        folders.save_picture(folder, *jobs[i], arrays[i])

    written = [submit(write, i) for i in np.flatnonzero(finite)]
    return [job for job, fine in zip(jobs, finite, strict=True) if not fine], written


def as_pixels(images):
    """Images (B, 3, H, W) in [0, 1] as they are written, (B, H, W, 3) uint8."""
    return (images.nan_to_num() * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


@contextmanager
def memory_advice(batch_size):
    """Turn a GPU that is too small for a batch into a UserError that says which flag to lower."""
    try:
        yield
    except torch.OutOfMemoryError:
        advice = (f"lower it (--batch_size {batch_size // 2})" if batch_size and batch_size > 1 else
                  "use a lower --precision, --guidance_grad x0 or --guidance_decoder half")
        raise utils.UserError(f"--batch_size {batch_size or 'auto'}: does not fit the GPU; {advice}") from None
