"""What drawing costs, counted on fake tensors, against PyTorch's own counter and sums by hand; and what it never does:
make a loop wait for the device."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionModel

from models import ClipFeatures
from sampling.costs import Costs, Counter, count, largest_batch, of_batch, parts_of, total
from sampling.decoders import decoded_at_once
from sampling.guidance import ClipFeatureLoss
from sampling.pipeline import load_pipeline
from sampling.solvers import SOLVERS
from tiny_sd import LATENT, TOKENS, WIDTH

B = 3


@pytest.fixture(scope="module")
def pipe(tiny_models):
    pipe = load_pipeline(tiny_models[0], torch.device("cpu"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def clip(tiny_models):
    return ClipFeatures(CLIPVisionModel.from_pretrained(tiny_models[1]), layers=(2, 4))


def clip_term(clip, device="cpu"):
    return ClipFeatureLoss(clip, {k: torch.ones(B, 5, 12, device=device) for k in (2, 4)})


def test_operations_are_those_of_pytorchs_counter(pipe):
    latents, context = torch.zeros(B, 4, LATENT, LATENT), torch.zeros(2 * B, TOKENS, WIDTH)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pipe.predict_noise(latents, 500, context)
        pipe.decode(latents)

    def drawn():
        with torch.no_grad():
            pipe.predict_noise(latents, 500, context)
            pipe.decode(latents)

    found, wanted = count(drawn).flops, counter.get_total_flops()
    assert wanted < found < 1.2 * wanted  # PyTorch's leaves out a CPU's attention


def test_attention_counts_two_products():
    q, k = torch.zeros(2, 4, 10, 8), torch.zeros(2, 4, 6, 8)
    found = count(lambda: nn.functional.scaled_dot_product_attention(q, k, k))
    assert found.flops == 2 * (2 * 2 * 4 * 10 * 6 * 8)


def test_bytes_are_of_what_lives_at_the_same_time():
    x = torch.zeros(1000)  # there before: not counted
    with Counter() as counter:
        a = x + 1  # 4 kB
        b = a * a  # 8 kB
        del a
        c = (b + 1).view(10, 100)  # 8 kB: views take nothing
        assert (counter.now, counter.peak) == (8000, 8000)
        del b, c
        assert counter.now == 0
    x = x.requires_grad_()
    assert count(lambda: x.exp().sin().sum()).bytes == 8004  # what the backward pass needs is kept


def test_nothing_is_computed(pipe, clip):
    """Networks, and what guides, stay as they were; values do not matter."""
    before = pipe.unet.conv_in.weight.clone()
    latents = torch.full((B, 4, LATENT, LATENT), float("nan"))
    guidance = dict(terms=[clip_term(clip)], grad="xt", x0="cond", decoder=None)
    parts = parts_of(pipe, torch.zeros(B, TOKENS, WIDTH), latents, guidance)
    assert torch.equal(pipe.unet.conv_in.weight, before)
    plain, guided, longer = (total(parts, *steps) for steps in ((4, 0), (4, 2), (8, 2)))
    assert 0 < plain.flops < guided.flops < longer.flops and 0 < plain.bytes < guided.bytes == longer.bytes
    assert longer.flops - guided.flops == 4 * parts["plain"].flops


def test_rows_in_turn_take_less_memory_and_the_same_work(pipe, clip):
    guidance = dict(terms=[clip_term(clip)], grad="x0", x0="cond", decoder=None)
    together, in_turn = (parts_of(pipe, torch.zeros(B, TOKENS, WIDTH), torch.zeros(B, 4, LATENT, LATENT), guidance,
                                  at_once)["guided"] for at_once in (None, 1))
    assert in_turn.flops == together.flops and in_turn.bytes < 0.6 * together.bytes


@pytest.mark.parametrize("free, wanted", [(100, 1), (2000, 10), (1e9, 16)])
def test_the_largest_batch_fits(free, wanted):
    """Fixed 200 bytes, and 120 for each picture; 70 % of the free ones may be taken."""
    assert largest_batch(lambda n: Costs(0, 200 + 120 * n), free, 2) == wanted
    assert of_batch(lambda n: Costs(7 * n, 200 + 120 * n), wanted, 2) == Costs(7 * wanted, 200 + 120 * wanted)


def test_a_gpu_decodes_few_large_pictures_at_once():
    assert [decoded_at_once(name, (4, 64, 64)) for name in ("full", "half", "some/taesd")] == [1, 4, 4]
    assert decoded_at_once("full", (4, 128, 128)) == 1 and decoded_at_once("full", (4, 16, 16)) == 16


class Crossings(TorchDispatchMode):
    """Counts copies from the CPU to another device."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        copied = func._overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_, torch.ops.aten.to)
        if copied and torch.is_tensor(out):
            sources = [tensor for tensor in args if torch.is_tensor(tensor)]
            self.n += out.device.type != "cpu" and any(tensor.device.type == "cpu" for tensor in sources)
        return out


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("rule", ["posterior", "raw", "norm"])
def test_no_step_waits_for_the_device(tiny_models, solver, rule):
    """On the meta device, as a GPU without values: reading one raises, and no step copies anything there."""
    pipe = load_pipeline(tiny_models[0], torch.device("meta"))
    pipe.set_progress_bar_config(disable=True)
    clip = ClipFeatures(CLIPVisionModel.from_pretrained(tiny_models[1]), layers=(2, 4)).to("meta")
    crossings = []
    for steps in (8, 20):
        with Crossings() as found:
            image = pipe(torch.zeros(B, TOKENS, WIDTH, device="meta"), list(range(B)), num_inference_steps=steps,
                         terms=[clip_term(clip, "meta")], rule=rule, guidance_strength=0.5, solver=solver,
                         guidance_repeats=1 + (solver == "ddim"), decoded_at_once=2, log=[],
                         guidance_draws=2 * (rule == "posterior"),
                         z=torch.zeros(B, 4, LATENT, LATENT, device="meta"))
        crossings.append(found.n)
    assert image.shape == (B, 3, 2 * LATENT, 2 * LATENT) and image.is_meta
    assert crossings[0] == crossings[1] > 0
