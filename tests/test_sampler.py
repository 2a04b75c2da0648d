"""The guided sampler against diffusers' own pipelines, finite differences and a loop written from the equations."""

from functools import partial

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from diffusers.pipelines.deprecated.stable_diffusion_sag import StableDiffusionSAGPipeline
from scipy.ndimage import gaussian_filter
from transformers import CLIPVisionModel

import utils
from models import ClipFeatures
from sampling.compiling import CompiledUNet
from sampling.decoders import gradient_cosine, load_guidance_decoder
from sampling.guidance import MAX_SHIFT, ClipFeatureLoss, norm_rule
from sampling.pipeline import gaussian_blur, load_pipeline
from sampling.solvers import LEVELS, SOLVERS, timesteps_of
from tiny_sd import LATENT, TOKENS, WIDTH, write_tiny_clip

IDS, SEED, STEPS = [7, 70_000, 12], 5, 8


@pytest.fixture(scope="module")
def folder(tiny_models):
    return tiny_models[0]


@pytest.fixture(scope="module")
def pipe(folder):
    pipe = load_pipeline(folder, torch.device("cpu"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def double_pipe(pipe):
    """The same networks in float64, where finite differences are exact to many digits."""
    yield pipe.to(torch.float64)
    pipe.to(torch.float32)


@pytest.fixture
def condition():
    return torch.randn(len(IDS), TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def z():
    return torch.randn(len(IDS), 4, LATENT, LATENT, generator=torch.Generator().manual_seed(1))


def redness(image, rows=None):
    """A guidance term whose gradient differs from pixel to pixel."""
    ramp = torch.linspace(-1, 1, image[0].numel(), dtype=image.dtype).view(image.shape[1:])
    return (image * ramp).square().mean((1, 2, 3)) + image[:, 0].mean((1, 2))


def slope_of_brightness(image, rows=None):
    """A linear term: straight-through clamping does not change its gradient, so finite differences apply."""
    return (image * torch.linspace(-1, 1, image[0].numel(), dtype=image.dtype).view(image.shape[1:])).mean((1, 2, 3))


def diffusers_pipeline(kind, folder):
    pipe = kind.from_pretrained(folder, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def counted(monkeypatch, network, method):
    """A list that grows by the batch size at each call of network.method."""
    calls, real = [], getattr(network, method)
    monkeypatch.setattr(network, method, lambda x, *rest, **named: calls.append(len(x)) or real(x, *rest, **named))
    return calls


# --- without guidance -------------------------------------------------------------------------------------------


def test_unguided_is_stable_diffusion_with_ddim(pipe, folder, condition):
    ours = pipe(condition, IDS, seed=SEED, num_inference_steps=LEVELS)
    reference = diffusers_pipeline(StableDiffusionPipeline, folder)
    theirs = reference(prompt_embeds=condition, negative_prompt=[""] * len(IDS), latents=pipe.start_noise(IDS, 0, SEED),
                       num_inference_steps=LEVELS, guidance_scale=7.5, eta=0.0, output_type="pt").images
    assert ours.shape == (len(IDS), 3, 2 * LATENT, 2 * LATENT) and ours.std() > 0.05
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("strength", [0.75, 0.3, 1.0])
def test_with_z_is_image_to_image(pipe, folder, condition, z, strength):
    """Start timestep and noise level of the same scheduler entry, as diffusers has it."""
    ours = pipe(condition, IDS, seed=SEED, z=z, strength=strength, num_inference_steps=LEVELS)
    reference = diffusers_pipeline(StableDiffusionImg2ImgPipeline, folder)
    generators = [torch.Generator().manual_seed(utils.derive_seed(SEED, image_id, 0)) for image_id in IDS]
    theirs = reference(prompt_embeds=condition, negative_prompt=[""] * len(IDS), image=z, strength=strength,
                       generator=generators, num_inference_steps=LEVELS, guidance_scale=7.5, output_type="pt").images
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("sag_scale", [0.75, 3.0])
def test_sag_is_diffusers(pipe, folder, condition, sag_scale):
    settings = dict(num_inference_steps=LEVELS, output_type="pt", prompt_embeds=condition)
    reference = diffusers_pipeline(StableDiffusionSAGPipeline, folder)
    theirs = reference(negative_prompt=[""] * len(IDS), latents=pipe.start_noise(IDS, 0, SEED), guidance_scale=7.5,
                       sag_scale=sag_scale, **settings).images
    ours = pipe(condition, IDS, seed=SEED, num_inference_steps=LEVELS, sag_scale=sag_scale)
    plain = pipe(condition, IDS, seed=SEED, num_inference_steps=LEVELS)
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)
    assert (ours - plain).abs().max() > 1e-2
    assert torch.equal(pipe(condition, IDS, seed=SEED, num_inference_steps=LEVELS), plain)  # nothing is left behind


@pytest.mark.parametrize("grad, x0", [("xt", "cond"), ("xt", "cfg"), ("x0", "cond")])
def test_sag_beside_guidance_sees_the_unconditional_rows(pipe, condition, grad, x0):
    """However the rows went through the UNet: with a gradient too small to matter, SAG alone remains."""
    settings = dict(seed=SEED, num_inference_steps=STEPS, sag_scale=2.0)
    faint = pipe(condition, IDS, terms=[redness], guidance_scale=1e-9, guidance_strength=1.0, grad=grad, x0=x0,
                 **settings)
    torch.testing.assert_close(faint, pipe(condition, IDS, **settings), atol=2e-4, rtol=0)


def test_blur_is_gaussian(z):
    expected = np.stack([[gaussian_filter(channel, 1.0, radius=4, mode="mirror") for channel in row]
                         for row in z.numpy()])
    torch.testing.assert_close(gaussian_blur(z), torch.from_numpy(expected))


def test_a_step_is_the_schedulers(pipe, z):
    """To the bit, with the published number of steps."""
    pipe.scheduler.set_timesteps(LEVELS)
    timesteps = timesteps_of(pipe.scheduler, LEVELS)
    assert timesteps == pipe.scheduler.timesteps.tolist()
    path, eps = SOLVERS["ddim"](pipe.scheduler, timesteps), torch.randn_like(z)
    for i, t in enumerate(timesteps):
        expected = pipe.scheduler.step(eps, t, z, eta=0.0)
        assert torch.equal(path.step(i, z, eps), expected.prev_sample)
        torch.testing.assert_close(pipe.predict_x0(z, eps, t), expected.pred_original_sample)


@pytest.mark.parametrize("steps", [8, 20])
def test_dpm_is_diffusers(pipe, folder, condition, steps):
    reference = diffusers_pipeline(StableDiffusionPipeline, folder)
    reference.scheduler = DPMSolverMultistepScheduler.from_config(reference.scheduler.config)
    theirs = reference(prompt_embeds=condition, negative_prompt=[""] * len(IDS), latents=pipe.start_noise(IDS, 0, SEED),
                       timesteps=timesteps_of(pipe.scheduler, steps), guidance_scale=7.5, output_type="pt").images
    ours = pipe(condition, IDS, seed=SEED, num_inference_steps=steps, solver="dpm")
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_solvers_converge_to_one_picture(double_pipe, condition):
    """The second-order one faster: its 25 steps are nearer to the end of the path than DDIM's 50."""
    settings = dict(seed=SEED, cfg_scale=3.0)
    end = double_pipe(condition, IDS, num_inference_steps=200, solver="dpm", **settings)
    fast, slow = (double_pipe(condition, IDS, num_inference_steps=steps, solver=solver, **settings)
                  for solver, steps in (("dpm", 25), ("ddim", 50)))
    assert (fast - end).abs().mean() < 0.8 * (slow - end).abs().mean() and (slow - end).abs().mean() < 0.02


@pytest.mark.parametrize("strength, first", [(1.0, 981), (0.75, 721), (0.6, 581), (0.02, 1), (0.01, 1)])
def test_a_path_starts_at_one_level_whatever_the_steps(pipe, strength, first):
    for steps in (10, 16, 20, 50, 100, 200):
        timesteps = timesteps_of(pipe.scheduler, steps, strength)
        assert len(timesteps) == int(steps * strength)
        if timesteps:
            assert timesteps[0] == first and (timesteps[-1] == 1 or len(timesteps) == 1)
            assert (np.diff(timesteps) <= 0).all() and np.ptp(np.diff(timesteps)) <= 1 if len(timesteps) > 1 else True


def test_resolution_is_the_side_of_the_image(pipe, condition, z):
    assert pipe(condition, IDS, num_inference_steps=1, resolution=20).shape[2:] == (20, 20)
    assert torch.equal(pipe(condition, IDS, z=z, num_inference_steps=2, resolution=2 * LATENT),
                       pipe(condition, IDS, z=z, num_inference_steps=2))
    for wrong, why in ((19, "multiple of 2.*such as 18"), (1, "such as 2"), (20, "z is of")):
        with pytest.raises(utils.UserError, match=f"--resolution {wrong}.*{why}"):
            pipe(condition, IDS, z=z, resolution=wrong)


def test_model_offload_draws_the_same_and_keeps_the_vae_beside_the_unet(folder, condition):
    """The hooks of diffusers, with the CPU in the GPU's part: a guided step must not send the UNet away."""
    settings = dict(num_inference_steps=4, terms=[redness], guidance_strength=0.5, guidance_scale=10.0)
    plain, offloaded = (load_pipeline(folder, torch.device("cpu"), offload=offload) for offload in (False, True))
    assert torch.equal(plain(condition, IDS, **settings), offloaded(condition, IDS, **settings))
    hooks = {name: network._hf_hook for name, network in offloaded.components.items() if hasattr(network, "_hf_hook")}
    assert set(hooks) == {"text_encoder", "unet", "vae"}
    assert hooks["unet"].prev_module_hook.model is offloaded.text_encoder and hooks["vae"].prev_module_hook is None


def test_strength_zero_decodes_z(pipe, condition, z):
    ours = pipe(condition, IDS, z=z, strength=0.0, num_inference_steps=STEPS)
    with torch.no_grad():
        decoded = pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample
    torch.testing.assert_close(ours, ((decoded + 1) / 2).clamp(0, 1))


def test_networks_are_frozen_and_in_eval_mode(pipe):
    for network in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_noise_depends_on_seed_id_and_sample_only(pipe):
    noise = pipe.start_noise(IDS, 0, SEED)
    assert torch.equal(pipe.start_noise(IDS[::-1], 0, SEED).flip(0), noise)
    assert torch.equal(pipe.start_noise(IDS, [0, 1, 2], SEED)[0], noise[0])
    others = [pipe.start_noise(IDS, 1, SEED), pipe.start_noise(IDS, 0, SEED + 1), noise.roll(1, 0)]
    assert all(not torch.allclose(noise[i], other[i]) for other in others for i in range(len(IDS)))


# --- guidance ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule, scale, again", [("raw", 300.0, {}),
                                                ("norm", 0.3, {"guidance_repeats": 2, "guidance_draws": 1})])
def test_result_does_not_depend_on_the_batch(pipe, condition, rule, scale, again):
    settings = dict(seed=SEED, num_inference_steps=STEPS, terms=[redness], guidance_scale=scale, rule=rule,
                    guidance_strength=0.5, **again)
    together = pipe(condition, IDS, **settings)
    for i in range(len(IDS)):
        alone = pipe(condition[i:i + 1], IDS[i:i + 1], **settings)
        torch.testing.assert_close(alone[0], together[i], atol=2e-4, rtol=0)


@pytest.mark.parametrize("decoder", ["full", "half"])
def test_rows_decoded_in_turn_are_those_decoded_together(double_pipe, condition, z, decoder):
    """The gradient, what was found, and the pictures; each term sees which rows it is given."""
    pipe, condition, z = double_pipe, condition.double(), z.double()
    target, steps = torch.rand(len(IDS), 3, 2 * LATENT, 2 * LATENT, dtype=torch.float64), [[], []]
    target = target if decoder == "full" else target[..., ::2, ::2]

    def term(image, rows):
        return (image - target[rows]).square().mean((1, 2, 3))

    settings = dict(num_inference_steps=4, terms=[term], guidance_scale=100.0, guidance_strength=0.5, z=z,
                    guidance_draws=2 * (decoder == "full"),
                    decoder=load_guidance_decoder(decoder, pipe))
    together, in_turn = (pipe(condition, IDS, decoded_at_once=at_once, log=steps[i], **settings)
                         for i, at_once in enumerate((None, 2)))
    torch.testing.assert_close(in_turn, together, atol=1e-6, rtol=0)
    for one, other in zip(*steps, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("x0", ["cond", "cfg"])
@pytest.mark.parametrize("grad", ["xt", "x0"])
def test_gradient_agrees_with_finite_differences(double_pipe, condition, z, grad, x0):
    pipe, x, condition = double_pipe, z.double(), condition.double()
    context = torch.cat([pipe.empty_condition().expand_as(condition), condition])
    t, w = 401, 3.0
    abar = pipe.scheduler.alphas_cumprod[401].double()

    def noises(x):
        doubled = torch.cat([x, x])
        eps_empty, eps_cond = pipe.unet(doubled, t, encoder_hidden_states=context).sample.chunk(2)
        return eps_cond, eps_empty + w * (eps_cond - eps_empty)

    with torch.no_grad():
        constant = noises(x)

        def loss(x):
            eps_cond, eps = noises(x) if grad == "xt" else constant
            clean = (x - (1 - abar).sqrt() * (eps_cond if x0 == "cond" else eps)) / abar.sqrt()
            return slope_of_brightness((pipe.vae.decode(clean / pipe.vae.config.scaling_factor).sample + 1) / 2)

        eps_empty, eps_cond, gradient = pipe.guidance_gradient(x, t, context, w, [slope_of_brightness], grad, x0)
        torch.testing.assert_close(eps_cond, constant[0])
        torch.testing.assert_close(eps_empty + w * (eps_cond - eps_empty), constant[1])
        for seed in range(3):
            direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(seed))
            h = 1e-4
            slope = (loss(x + h * direction) - loss(x - h * direction)) / (2 * h)
            torch.testing.assert_close((gradient * direction).sum((1, 2, 3)), slope, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("grad, repeats, draws", [("xt", 1, 0), ("x0", 1, 0), ("xt", 3, 0), ("xt", 2, 2)])
def test_raw_rule_is_the_papers_loop(double_pipe, condition, grad, repeats, draws):
    """DDIM with eps' = eps + sigma * scale * gradient, sample by sample, written from the equations; with time travel
    each guided step again from where the forward process leads back to, with draws the mean gradient around x0."""
    pipe, scale, w, strength = double_pipe, 1000.0, 5.0, 0.5
    settings = dict(seed=SEED, num_inference_steps=STEPS, cfg_scale=w, guidance_strength=strength, grad=grad,
                    guidance_repeats=repeats, guidance_draws=draws)
    ours = pipe(condition, IDS, terms=[redness], guidance_scale=scale, **settings)
    assert (ours - pipe(condition, IDS, **settings)).abs().max() > 0.1  # there is something to compare
    abars = pipe.scheduler.alphas_cumprod
    levels = [round(981 - 980 * step / (STEPS - 1)) for step in range(STEPS)]
    empty = pipe.empty_condition()
    for i, image_id in enumerate(IDS):
        generator = torch.Generator().manual_seed(utils.derive_seed(SEED, image_id, 0))
        x = torch.randn(1, 4, LATENT, LATENT, generator=generator)
        steps = [(step, k) for step in range(STEPS) for k in range(repeats if step < strength * STEPS else 1)]
        for step, again in steps:
            t = levels[step]
            abar, abar_next = abars[t], abars[levels[step + 1]] if step < STEPS - 1 else abars[0]
            sigma = (1 - abar) ** 0.5
            if again:
                generator.manual_seed(utils.derive_seed(utils.derive_seed(SEED, step, again), image_id, 0))
                fresh = torch.randn(1, 4, LATENT, LATENT, generator=generator)
                x = (abar / abar_next) ** 0.5 * x + (1 - abar / abar_next) ** 0.5 * fresh
            x = x.detach().requires_grad_()
            eps_u = pipe.unet(x.double(), t, encoder_hidden_states=empty).sample
            eps_c = pipe.unet(x.double(), t, encoder_hidden_states=condition[i:i + 1].double()).sample
            eps = eps_u + w * (eps_c - eps_u)
            if step < strength * STEPS:
                seen = (x - sigma * (eps_c if grad == "xt" else eps_c.detach())) / abar**0.5
                gradient = 0
                for k in range(max(draws, 1)):
                    if draws:
                        visit = utils.derive_seed(SEED, step, again, 1 + k)
                        generator.manual_seed(utils.derive_seed(visit, image_id, 0))
                    away = 0.6 * sigma * torch.randn(1, 4, LATENT, LATENT, generator=generator) if draws else 0
                    image = (pipe.vae.decode((seen + away).double() / pipe.vae.config.scaling_factor).sample + 1) / 2
                    pixels = image.detach().clamp(0, 1).requires_grad_()  # the clamp is straight-through
                    pull = torch.autograd.grad(redness(pixels).sum(), pixels)[0]
                    gradient = gradient + torch.autograd.grad(image, x, pull, retain_graph=True)[0] / max(draws, 1)
                eps = eps + sigma * scale * gradient
            clean = (x - sigma * eps) / abar**0.5
            x = abar_next**0.5 * clean + (1 - abar_next) ** 0.5 * eps
        decoded = pipe.vae.decode(x.detach().double() / pipe.vae.config.scaling_factor).sample
        torch.testing.assert_close(ours[i], ((decoded[0] + 1) / 2).clamp(0, 1).float(), atol=5e-4, rtol=0)


def test_clamp_passes_gradient_of_pixels_outside(pipe, z, monkeypatch):
    last = pipe.vae.decoder.conv_out
    monkeypatch.setattr(last.weight, "data", 5 * last.weight.data)
    latents = z.requires_grad_()
    image = pipe.decode(latents)
    outside = (image == 0) | (image == 1)
    assert outside.float().mean() > 0.05 and image.min() >= 0 and image.max() <= 1
    gradient = torch.autograd.grad((image * outside).sum(), latents)[0]
    unclamped = (pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample + 1) / 2
    expected = torch.autograd.grad((unclamped * outside).sum(), latents)[0]
    assert expected.abs().max() > 0
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("settings", [dict(guidance_scale=0.0), dict(guidance_strength=0.0), dict(terms=())])
def test_no_guidance_costs_nothing(pipe, condition, settings, monkeypatch):
    decodes, passes = counted(monkeypatch, pipe.vae, "decode"), counted(monkeypatch, pipe.unet, "forward")
    monkeypatch.setattr(torch.autograd, "grad", lambda *a: pytest.fail("a gradient was computed"))
    guided = pipe(condition, IDS, seed=SEED, num_inference_steps=STEPS, **{"terms": [redness], **settings})
    assert (len(decodes), len(passes)) == (1, STEPS)
    assert torch.equal(guided, pipe(condition, IDS, seed=SEED, num_inference_steps=STEPS))


@pytest.mark.parametrize("grad, x0, halves", [("xt", "cond", True), ("xt", "cfg", False), ("x0", "cond", False)])
def test_one_pass_serves_both_guidances(pipe, condition, monkeypatch, grad, x0, halves):
    """Every row goes through the UNet once a step; in halves where only one of them needs a graph."""
    decodes, passes = counted(monkeypatch, pipe.vae, "decode"), counted(monkeypatch, pipe.unet, "forward")
    pipe(condition, IDS, num_inference_steps=10, terms=[redness, redness], guidance_strength=0.3, guidance_scale=1.0,
         grad=grad, x0=x0)
    guided = [len(IDS)] * 6 if halves else [2 * len(IDS)] * 3
    assert passes == guided + [2 * len(IDS)] * 7 and len(decodes) == 3 + 1


def test_norm_rule_shifts_x0_by_a_share_of_sigma():
    generator = torch.Generator().manual_seed(0)
    x, eps, gradient = (torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=generator) for _ in range(3))
    abar = torch.tensor(0.3, dtype=torch.float64)
    sigma = (1 - abar).sqrt()
    for scale, share in ((0.2, 0.2), (5.0, MAX_SHIFT)):
        for size in (1e-6, 1.0, torch.tensor([1e3, 1e-3], dtype=torch.float64).view(2, 1, 1, 1)):
            steered = norm_rule(eps, size * gradient, abar, scale)
            shift = ((x - sigma * steered) - (x - sigma * eps)) / abar.sqrt()  # of x0
            torch.testing.assert_close(shift.square().mean((1, 2, 3)).sqrt(), (share * sigma).expand(2))
            cosine = torch.cosine_similarity(shift.flatten(1), -gradient.flatten(1))
            torch.testing.assert_close(cosine, torch.ones(2, dtype=torch.float64))
    assert torch.equal(norm_rule(eps, torch.zeros_like(eps), abar, 0.3), eps)


@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_norm_rule_does_not_depend_on_the_number_of_steps(double_pipe, condition, strength):
    """15 and 45 steps lower the loss alike: within 15 %, where three times the steps would make it several times."""
    pipe = double_pipe

    def effect(steps):
        settings = dict(seed=SEED, num_inference_steps=steps, cfg_scale=1.0)
        guided = pipe(condition, IDS, terms=[redness], guidance_scale=0.3, guidance_strength=strength, rule="norm",
                      **settings)
        return (redness(pipe(condition, IDS, **settings)) - redness(guided)).mean().item()

    few, many = effect(15), effect(45)
    assert few > 0 and many == pytest.approx(few, rel=0.15)


def test_cheaper_decoders_steer_alike(pipe, condition, tmp_path):
    half = load_guidance_decoder("half", pipe)
    settings = dict(seed=SEED, num_inference_steps=STEPS)
    start, terms = pipe.start(IDS, 0, SEED), [lambda image, rows=None: image[:, 0].mean((1, 2))]
    halved = torch.nn.functional.interpolate(start[0], scale_factor=0.5, mode="area")
    torch.testing.assert_close(half(start[0]), pipe.decode(halved))
    same, alike = (gradient_cosine(pipe, condition, start, 7.5, terms, "xt", "cond", decoder)
                   for decoder in (pipe.decode, half))
    assert same == pytest.approx(1) and 0.5 < alike < 1
    guided = [pipe(condition, IDS, terms=terms, guidance_scale=300.0, guidance_strength=1.0, decoder=decoder,
                   **settings) for decoder in (half, pipe.decode)]
    plain = pipe(condition, IDS, **settings)
    assert all((terms[0](image) < terms[0](plain)).all() for image in guided) and not torch.equal(*guided)

    torch.manual_seed(3)
    tiny = AutoencoderTiny(encoder_block_out_channels=[8, 8], decoder_block_out_channels=[8, 8],
                           num_encoder_blocks=[1, 1], num_decoder_blocks=[1, 1])
    tiny.save_pretrained(tmp_path)
    decoded = load_guidance_decoder(str(tmp_path), pipe)(start[0])
    expected = (tiny.eval().decode(start[0]).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decoded, expected)
    with pytest.raises(utils.UserError, match="--guidance_decoder .*nothing"):
        load_guidance_decoder(f"{tmp_path}/nothing/", pipe)


@pytest.mark.parametrize("rule, scale", [("raw", 100.0), ("norm", 0.2)])
def test_guidance_lowers_its_loss(pipe, condition, rule, scale):
    settings = dict(seed=SEED, num_inference_steps=STEPS, cfg_scale=1.0)
    guided = pipe(condition, IDS, terms=[redness], guidance_scale=scale, guidance_strength=1.0, rule=rule, **settings)
    assert (redness(guided) < redness(pipe(condition, IDS, **settings))).all()


@pytest.mark.parametrize("rule, scale, grad", [("raw", 100.0, "xt"), ("raw", 100.0, "x0"), ("norm", 0.2, "xt")])
def test_guided_loss_falls_along_the_path(pipe, condition, rule, scale, grad):
    """What the losses see is better at every step than on the path of a gradient too small to matter, ever more so."""
    def losses(scale):
        seen = []

        def term(image, rows):
            seen.append(redness(image.detach()).mean().item())
            return redness(image)

        pipe(condition, IDS, seed=SEED, num_inference_steps=STEPS, terms=[term], guidance_scale=scale, rule=rule,
             grad=grad, guidance_strength=1.0)
        return np.array(seen)

    gain = losses(1e-9) - losses(scale)
    assert len(gain) == STEPS and gain[0] == 0 and (gain[1:] > 0).all() and gain[-1] > gain[1]


def compiled_by(backend, folder, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    compiled = load_pipeline(folder, torch.device("cpu"), compiled=True)
    compiled.set_progress_bar_config(disable=True)
    return compiled


GUIDED = dict(num_inference_steps=2, terms=[redness], guidance_strength=0.5, guidance_scale=100.0)


def test_compiled_draws_the_same(pipe, folder, condition, monkeypatch, capsys):
    """By the backend that traces and splits as the default one does, but writes no C++, which takes a minute."""
    compiled = compiled_by("aot_eager", folder, monkeypatch)
    found, expected = (p(condition, IDS, **GUIDED) for p in (compiled, pipe))
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    assert compiled.run_unet.trusted and "plain one 1.0000" in capsys.readouterr().out


def test_a_wrong_compiled_gradient_is_not_used(pipe, folder, condition, monkeypatch, capsys):
    compiled = load_pipeline(folder, torch.device("cpu"))
    compiled.set_progress_bar_config(disable=True)
    monkeypatch.setattr(torch, "compile", lambda unet: Twisted(unet))
    compiled.run_unet = CompiledUNet(compiled.unet)
    found, expected = (p(condition, IDS, **GUIDED) for p in (compiled, pipe))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert compiled.run_unet.trusted is False
    assert "passes with gradient are not compiled" in capsys.readouterr().out


class Twisted(torch.nn.Module):
    """A UNet that is right, and whose gradient is not."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, latents, t, context):
        out = self.unet(latents, t, context)
        out.sample = out.sample + latents - latents.detach() + 3 * (latents.flip(3) - latents.flip(3).detach())
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_networks_sample_and_guide(pipe, folder, condition, dtype):
    half = load_pipeline(folder, torch.device("cpu"), dtype)
    half.set_progress_bar_config(disable=True)
    settings = dict(num_inference_steps=4, terms=[redness], guidance_strength=0.5, guidance_scale=10.0)
    image = half(condition, IDS, **settings)
    assert image.dtype == torch.float32 and torch.isfinite(image).all()
    with torch.no_grad():
        terms = [lambda image, rows: 1e-5 * redness(image)]
        found, exact = (p.guidance_gradient(*starting(p, condition), 7.5, terms)[2]
                        for p in (half, pipe))
    assert (torch.cosine_similarity(found.flatten(1), exact.flatten(1)) > 0.99).all()
    torch.testing.assert_close(found.norm(), exact.norm(), rtol=0.03, atol=0)


def starting(pipe, condition):
    """Latents, timestep and context of the first step."""
    latents, timesteps = pipe.start(IDS, num_inference_steps=STEPS)
    return latents, timesteps[0], pipe.context_of(condition)


# --- the CLIP term ----------------------------------------------------------------------------------------------


def test_clip_loss_is_the_papers_formula(tmp_path):
    clip = ClipFeatures(CLIPVisionModel.from_pretrained(write_tiny_clip(tmp_path, blocks=3)), layers=(2, 4, 6))
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, 16, 16, generator=generator)
    targets = {k: k * torch.randn(2, 5, 12, generator=generator) for k in (2, 4, 6)}
    loss = ClipFeatureLoss(clip, targets)(image)
    for i in range(2):
        features = {k: value[0].numpy() for k, value in clip(image[i:i + 1]).items()}
        inverse = {k: 1 / np.sqrt((targets[k][i].numpy() ** 2).sum()) for k in targets}
        emphasis = {2: 1.5, 4: 1.2, 6: 1.0}
        expected = sum(inverse[k] / sum(inverse.values()) * emphasis[k] *
                       ((features[k] - targets[k][i].numpy()) ** 2).mean() for k in targets)
        assert loss[i].item() == pytest.approx(expected, rel=1e-5)


# --- what users can get wrong -----------------------------------------------------------------------------------


def test_wrong_shapes_and_models_are_user_errors(pipe, condition, z, tmp_path):
    with pytest.raises(utils.UserError, match="scores of c"):
        pipe(condition[:, :-1], IDS)
    with pytest.raises(utils.UserError, match="--z"):
        pipe(condition, IDS, z=z[:, :3])
    with pytest.raises(utils.UserError, match="--sd_model"):
        load_pipeline(f"{tmp_path}/nothing/", torch.device("cpu"))
    with pytest.raises(utils.UserError, match="--sd_model.*has no vae, text_encoder"):
        load_pipeline(tmp_path, torch.device("cpu"))
    clip = ClipFeatures(CLIPVisionModel.from_pretrained(write_tiny_clip(tmp_path)), layers=(2,))
    with pytest.raises(utils.UserError, match="g_2.*--clip_model"):
        ClipFeatureLoss(clip, {2: torch.ones(3, 4, 12)})(torch.rand(3, 3, 16, 16))
