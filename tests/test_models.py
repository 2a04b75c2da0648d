"""The networks: naive references, sizes that do not divide, and a prior that learns a toy world in seconds."""

import itertools
import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import utils
from models import (
    BrainModel,
    BrainNetwork,
    DiffusionPrior,
    MapDecoder,
    PriorAttention,
    VoxelEncoder,
    build_model,
    cosine_schedule,
    load_trunk,
    rotary_table,
    rotate,
    spaced_timesteps,
)
from training.objectives import draw_prior


def tiny_model(n_voxels=None, **changes):
    sizes = {"hidden_dim": 8, "tokens": 3, "width": 6, "n_blocks": 2, "prior_depth": 2} | changes
    return BrainModel(n_voxels or {"subj01": 5, "subj02": 4}, **sizes)


def test_voxel_encoder_follows_the_batch_not_the_model():
    encoder = VoxelEncoder({"subj02": 4, "subj05": 6}, 8)
    batch = {"subj05": torch.randn(2, 6), "subj02": torch.randn(3, 4)}  # the other order
    hidden = encoder(batch)
    weights = {s: encoder.state_dict()[f"linears.{i}.weight"] for i, s in enumerate(["subj02", "subj05"])}
    biases = {s: encoder.state_dict()[f"linears.{i}.bias"] for i, s in enumerate(["subj02", "subj05"])}
    rows = [weights[s] @ row + biases[s] for s in ("subj05", "subj02") for row in batch[s]]
    torch.testing.assert_close(hidden, torch.stack(rows))
    with pytest.raises(KeyError, match="subj07.*subj02, subj05"):
        encoder({"subj07": torch.randn(1, 4)})


def test_backbone_blocks_reach_the_output():
    """Guards against MindEye2's mixer, whose output over one position is its input plus a constant."""
    network = BrainNetwork(hidden_dim=8, tokens=3, width=6, n_blocks=2, dropout=0.5).eval()
    x = torch.randn(4, 8)
    backbone, contrast = network(x)
    assert backbone.shape == contrast.shape == (4, 3, 6)
    network.blocks[0][4].weight.data.mul_(5)
    change = network(x)[0] - backbone
    assert (change - change[0]).abs().max() > 0.1  # not the same for every sample


def test_rotary_scores_depend_on_the_distance_only():
    table = rotary_table(length=9, dim=4)
    q, k = torch.randn(2, 1, 7)  # one query and one key, put at every position; three channels stay unturned
    scores = rotate(q.expand(9, 7), table) @ rotate(k.expand(9, 7), table).T
    for i in range(9):
        for j in range(9):
            expected = scores[i - j, 0] if i >= j else scores[0, j - i]
            torch.testing.assert_close(scores[i, j], expected)
    assert scores[3, 0] != pytest.approx(float(scores[0, 0]), abs=1e-4)


def test_prior_attention_against_naive():
    heads, d, length = 3, 4, 5
    attention = PriorAttention(width=6, heads=heads, dim_head=d)
    x, bias = torch.randn(2, length, 6), torch.randn(heads, length, length + 1)
    still = torch.stack([torch.ones(length, 1), torch.zeros(length, 1)])  # cos 1, sin 0: no rotation
    normed = F.layer_norm(x, (6,))
    out = torch.zeros(2, length, heads * d)
    for b in range(2):
        keys_values = torch.cat([attention.null_kv.flatten()[None], normed[b] @ attention.to_kv.weight.T])
        for h in range(heads):
            q = normed[b] @ attention.to_q.weight[h * d : (h + 1) * d].T
            for i in range(length):
                cosines = torch.stack([torch.cosine_similarity(q[i], key, 0) for key in keys_values[:, :d]])
                weights = (16 * cosines + bias[h, i]).softmax(0)
                out[b, i, h * d : (h + 1) * d] = weights @ keys_values[:, d:]
    torch.testing.assert_close(attention(x, bias, still), attention.to_out(out), atol=1e-5, rtol=1e-4)


def test_attention_heads_are_padded_for_fused_kernels(monkeypatch):
    """52 channels go in as 56; outputs and gradients are those of 52, and so are the weights of a checkpoint."""
    torch.manual_seed(0)
    attention = PriorAttention(width=64, heads=3, dim_head=52)
    assert [tuple(p.shape) for p in (attention.to_q.weight, attention.to_kv.weight, attention.null_kv)] == [
        (156, 64), (104, 64), (2, 52)]
    x, bias = torch.randn(2, 7, 64, requires_grad=True), torch.randn(3, 7, 8, requires_grad=True)
    wanted, sizes, fused = [x, bias, *attention.parameters()], [], F.scaled_dot_product_attention

    def attend(q, k, v, **options):
        sizes.append([t.shape[-1] for t in (q, k, v)])
        return fused(q, k, v, **options)

    def attend_unpadded(q, k, v, **options):
        return F.pad(attend(*(t[..., :52] for t in (q, k, v)), **options), (0, 4))

    found = []
    for call in (attend, attend_unpadded):
        monkeypatch.setattr(F, "scaled_dot_product_attention", call)
        out = attention(x, bias, rotary_table(7, 32))
        found.append([out, *torch.autograd.grad(out.pow(3).sum(), wanted)])
    assert sizes == [[56] * 3, [52] * 3]
    for padded, plain in zip(*found, strict=True):
        torch.testing.assert_close(padded, plain, rtol=1e-6, atol=1e-6 * plain.abs().max().item())


def test_prior_sees_both_ways():
    """Every clean token depends on every brain token and every noisy token, and on the time."""
    net = DiffusionPrior(tokens=3, width=8, depth=1).net
    noisy, brain, t = torch.randn(1, 3, 8), torch.randn(1, 3, 8), torch.tensor([50])
    for x in (noisy, brain):
        x.requires_grad_()
        for token in range(3):
            (gradient,) = torch.autograd.grad(net(noisy, t, brain)[0, token].pow(3).sum(), x)
            assert torch.all(gradient.abs().sum(-1) > 0)
    assert not torch.allclose(net(noisy, t, brain), net(noisy, t + 30, brain), atol=1e-4)


def test_prior_drops_conditions_per_sample():
    net = DiffusionPrior(tokens=3, width=8, depth=1).net
    noisy, brain, other = torch.randn(3, 2, 3, 8)
    t, keep = torch.tensor([10, 10]), torch.tensor([True, False])
    kept, dropped = (net(noisy, t, brain, keep) - net(noisy, t, other, keep)).abs().amax(dim=(1, 2))
    assert kept > 1e-3 and dropped == 0
    kept, dropped = (net(noisy, t, brain, None, keep) - net(other, t, brain, None, keep)).abs().amax(dim=(1, 2))
    assert kept > 1e-3 and dropped == 0


def test_the_cosine_schedule():
    """abar_t = cos^2((t/T + .008) / 1.008 * pi/2), relative to t = 0 (Nichol & Dhariwal, eq. 17); diffusers', too."""
    from diffusers import DDIMScheduler

    found = cosine_schedule(100)
    for i in (0, 20, 50, 90):
        at = [math.cos((t / 100 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (0, i + 1)]
        assert float(found[i]) == pytest.approx(at[1] / at[0], rel=1e-4)
    torch.testing.assert_close(found, DDIMScheduler(100, beta_schedule="squaredcos_cap_v2").alphas_cumprod)


def test_steps_are_spread_over_the_schedule():
    assert spaced_timesteps(100, 20) == list(range(99, 0, -5))
    assert spaced_timesteps(100, 7) == [99, 85, 70, 56, 42, 28, 13]
    for steps in range(1, 101):
        times = spaced_timesteps(100, steps)
        assert len(times) == steps and times[0] == 99 and times[-1] >= 0
        assert all(100 / steps - 1 <= before - after <= 100 / steps + 1 for before, after in itertools.pairwise(times))


class Oracle(torch.nn.Module):
    """Stands for the prior's network: knows the clean tokens, and keeps the noisy ones it was shown."""

    def __init__(self, clean):
        super().__init__()
        self.clean, self.seen = clean, []

    def forward(self, noisy, t, brain, keep_brain=None, keep_noisy=None):
        self.seen.append((noisy, t, keep_brain, keep_noisy))
        return self.clean


def test_prior_loss_noises_the_standardised_target():
    prior = DiffusionPrior(tokens=4, width=6, depth=1)
    mean = 3 * torch.randn(4, 6)
    prior.standardise(mean, 0.5)
    standard = torch.randn(4000, 4, 6)
    target = mean + 0.5 * standard
    prior.net = Oracle(standard + 0.1)
    draws = draw_prior(target, torch.Generator().manual_seed(0))
    loss, prediction = prior.loss(torch.zeros_like(target), target, draws)
    assert loss.shape == (4000,)
    torch.testing.assert_close(loss, torch.full_like(loss, 0.01), rtol=1e-3, atol=1e-6)  # in the standardised space
    torch.testing.assert_close(prediction, target + 0.05)
    noisy, t, keep_brain, keep_noisy = prior.net.seen[0]
    assert t.min() == 0 and t.max() == 99
    abar = cosine_schedule(100)[t][:, None, None]
    noise = (noisy - abar.sqrt() * standard) / (1 - abar).sqrt()
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    for keep in (keep_brain, keep_noisy):
        assert abs(keep.float().mean() - 0.8) < 0.03
    assert not torch.equal(keep_brain, keep_noisy)
    prior.eval().loss(torch.zeros_like(target), target, draws)
    assert prior.net.seen[1][2:] == (None, None)


@pytest.mark.parametrize("steps", [1, 3, 7, 20, 30, 60, 99])
def test_prior_sample_follows_ddim(steps):
    """Against DDIM written out, step by step: every noise level is the one of the timestep that comes next."""
    prior = DiffusionPrior(tokens=2, width=16, depth=1).eval()
    mean, brain = torch.randn(2, 16), torch.randn(3, 2, 16)
    prior.standardise(mean, 0.25)
    actual = prior.sample(brain, steps, [torch.Generator().manual_seed(row) for row in range(3)])
    share_after = [1.0, *cosine_schedule(100).tolist()]  # of x0, after 0 ... 100 steps of noising
    x = torch.stack([torch.randn(2, 16, generator=torch.Generator().manual_seed(row)) for row in range(3)])
    left = [round(100 * i / steps) for i in range(steps, -1, -1)]  # of those, before each step: 100, ..., 0
    with torch.no_grad():
        for before, after in itertools.pairwise(left):
            share, next_share = share_after[before], share_after[after]
            x0 = prior.net(x, torch.full((3,), before - 1), brain)
            noise = (x - share**0.5 * x0) / (1 - share) ** 0.5
            x = next_share**0.5 * x0 + (1 - next_share) ** 0.5 * noise
    torch.testing.assert_close(actual, x / 4.0 + mean, atol=1e-4, rtol=1e-4)


def test_steps_that_divide_the_schedule_are_those_of_diffusers():
    from diffusers import DDIMScheduler

    prior = DiffusionPrior(tokens=2, width=4, depth=1).eval()
    scheduler = DDIMScheduler(100, beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample=False,
                              timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    brain, x = torch.randn(1, 2, 4), torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(prior.net(x, t[None], brain), t, x).prev_sample
    torch.testing.assert_close(prior.sample(brain, 20, [torch.Generator().manual_seed(0)]), x, atol=1e-5, rtol=1e-4)


def test_the_mean_is_what_training_without_noisy_tokens_regresses():
    """The prediction that training's loss sees for a sample whose noisy tokens are dropped; no noise is drawn."""
    prior = DiffusionPrior(tokens=3, width=8, depth=2)
    prior.standardise(torch.randn(3, 8), 0.5)
    brain, target = torch.randn(2, 2, 3, 8)
    draws = torch.tensor([0.999, 0.999]), torch.randn(2, 3, 8), torch.tensor([[1.0, 0.1], [1.0, 0.1]])
    _, prediction = prior.loss(brain, target, draws)  # at the last timestep, with the brain, without noisy tokens
    torch.testing.assert_close(prior.mean(brain), prediction.detach())


@pytest.mark.parametrize(("steps", "called"), [(1, "mean"), (2, "sample")])
def test_a_model_predicts_the_mean_unless_it_is_asked_for_steps(monkeypatch, steps, called):
    model, voxels, calls = tiny_model().eval(), {"subj01": torch.randn(2, 5)}, []
    for name in ("mean", "sample"):
        monkeypatch.setattr(model.prior, name, lambda brain, *rest, name=name: calls.append((name, *rest)))
    model.predict(voxels, steps)
    model.predict(voxels)
    assert calls == [(called, steps, None)[:1 if steps == 1 else 3], ("mean",)]


def test_prior_sample_is_independent_of_the_batch():
    prior = DiffusionPrior(tokens=3, width=8, depth=2).eval()
    brain = torch.randn(4, 3, 8)

    def draw(rows):
        return prior.sample(brain[rows], 5, [torch.Generator().manual_seed(row) for row in rows])

    torch.testing.assert_close(draw([2, 0]), draw([0, 1, 2, 3])[[2, 0]], atol=1e-5, rtol=1e-4)


class GaussianWorld(torch.nn.Module):
    """Stands for a prior's network that knows its world: x0 = brain + spread * noise, of which it answers the mean.

    E[x0 | x_t, brain] = brain + s^2 sqrt(abar) / (s^2 abar + 1 - abar) * (x_t - sqrt(abar) brain), with s the spread.
    """

    def __init__(self, spread):
        super().__init__()
        self.spread = spread

    def forward(self, noisy, t, brain):
        abar = cosine_schedule(100)[t][:, None, None]
        gain = self.spread**2 * abar.sqrt() / (self.spread**2 * abar + 1 - abar)
        return brain + gain * (noisy - abar.sqrt() * brain)


@pytest.mark.parametrize(("steps", "spread"), [(20, 0.53), (60, 0.57)])
def test_a_sample_has_the_spread_of_its_world_and_twice_the_error_of_the_mean(steps, spread):
    """The brain knows .4 of a variance of one. The mean explains that; a sample that spreads like the rest, -.2."""
    torch.manual_seed(0)
    prior = DiffusionPrior(tokens=4, width=8, depth=1)
    prior.net = GaussianWorld(0.6**0.5)
    brain = 0.4**0.5 * torch.randn(2000, 4, 8)
    truth = brain + 0.6**0.5 * torch.randn(2000, 4, 8)
    drawn = prior.sample(brain, steps)
    assert (drawn - brain).square().mean() == pytest.approx(spread, abs=0.01)  # of .6: the fewer steps, the less
    assert 1 - (drawn - truth).square().mean() == pytest.approx(0.4 - spread, abs=0.02)


def test_prior_recovers_a_toy_world():
    """Six brain states, each with two equally likely targets, clean + side and clean - side.

    The best regression answers clean, with error mean(side^2); a prior comes nearer to one of the two, each about as
    often. Trained for seconds, so the bounds are loose; a longer training brings the error to a tenth.
    """
    torch.manual_seed(0)
    prior = DiffusionPrior(tokens=2, width=16, depth=2, cond_drop_prob=0.0)
    states, clean = torch.randn(2, 6, 2, 16)
    side = torch.randn(2, 16)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=350)
    for _ in range(350):
        state = torch.randint(6, (64,))
        sign = torch.randint(2, (64, 1, 1)) * 2.0 - 1
        target = clean[state] + sign * side
        loss, _ = prior.loss(states[state], target, draw_prior(target))
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        schedule.step()
    state = torch.randint(6, (200,))
    drawn = prior.eval().sample(states[state], steps=20)
    errors = torch.stack([(drawn - clean[state] - sign * side).square().mean(dim=(1, 2)) for sign in (1, -1)])
    assert errors.amin(0).mean() < 0.4 * side.square().mean()
    assert 0.3 < (errors[0] < errors[1]).float().mean() < 0.7


@pytest.mark.parametrize("widths", [(32, 64, 96), (32, 32, 32)])
def test_the_decoder_of_maps_is_that_of_diffusers_vae(widths):
    """The same weights by name, the same from one seed, the same picture and gradient from a map."""
    from diffusers.models.autoencoders.vae import Decoder

    torch.manual_seed(0)
    theirs = Decoder(64, 4, ("UpDecoderBlock2D",) * 3, widths, layers_per_block=1)
    torch.manual_seed(0)
    ours = MapDecoder(64, 4, widths)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in theirs.state_dict().items())
    x = torch.randn(3, 64, 2, 2, requires_grad=True)
    found, expected = ours(x), theirs(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)))


def test_training_and_scoring_load_no_library_that_they_do_not_use():
    program = """
import sys
import torch
import training.latent_statistics, training.mindeye2, training.ridge, training.scoring
from models import BrainModel, LatentModel
prior = BrainModel({"subj01": 3}, 8, 5, 4, prior_depth=1)
for steps in (1, 2):
    prior.eval().predict({"subj01": torch.zeros(1, 3)}, steps, [torch.Generator()])
LatentModel({"subj01": 3}, 8, (4, 8, 8), 5, 4, channels=(32, 32, 32))
seldom = ("diffusers", "transformers", "sklearn", "wandb", "accelerate", "deepspeed", "pytorch_msssim")
print([name for name in seldom if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=utils.REPOSITORY / "src", capture_output=True, text=True,
                          check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("tokens", "width"), [(17, 64), (20, 96), (1, 30), (5, 768)])
def test_sizes_that_do_not_divide(tokens, width):
    model = tiny_model(tokens=tokens, width=width, prior_depth=1)
    assert len(model.prior.net.offset_bias) == max(1, width // 52)
    voxels = {"subj02": torch.randn(2, 4), "subj01": torch.randn(1, 5)}
    target = torch.randn(3, tokens, width)
    backbone, contrast, loss = model(voxels, target, draw_prior(target))
    assert backbone.shape == contrast.shape == (3, tokens, width) and loss.shape == (3,)
    assert model.prior.sample(backbone, steps=2).shape == (3, tokens, width)


def test_forward_with_and_without_target():
    model = tiny_model().eval()
    voxels, target = {"subj01": torch.randn(2, 5)}, torch.randn(2, 3, 6)
    backbone, contrast = model(voxels)
    draws = draw_prior(target)
    with_target = model(voxels, target, draws)
    assert torch.equal(with_target[0], backbone) and torch.equal(with_target[1], contrast)
    assert torch.equal(with_target[2], model.prior.loss(backbone, target, draws)[0])


def test_rebuilt_from_model_args():
    model = tiny_model(dropout=0.3)
    rebuilt = build_model(json.loads(json.dumps(model.model_args)))
    assert rebuilt.model_args == model.model_args
    assert rebuilt.backbone.blocks[0][3].p == 0.3
    rebuilt.load_state_dict(model.state_dict())
    voxels = {"subj01": torch.randn(2, 5)}
    assert torch.equal(rebuilt.eval()(voxels)[1], model.eval()(voxels)[1])


def test_load_trunk_copies_all_but_the_voxel_encoders():
    source, model = tiny_model({"subj02": 4, "subj03": 9}), tiny_model({"subj01": 5})
    head = {key: value.clone() for key, value in model.voxelenc.state_dict().items()}
    copied = load_trunk(model, source.state_dict())
    assert set(copied) == {key for key in model.state_dict() if not key.startswith("voxelenc.")}
    assert all(torch.equal(model.state_dict()[key], source.state_dict()[key]) for key in copied)
    assert all(torch.equal(model.voxelenc.state_dict()[key], value) for key, value in head.items())


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape"])
def test_load_trunk_is_strict(damage):
    model = tiny_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = tiny_model().state_dict()
    key = "prior.net.position"
    if damage == "missing":
        del state[key]
    elif damage == "unknown":
        key = "blurry.weight"
        state[key] = torch.zeros(1)
    else:
        state[key] = torch.zeros(2, 6)
    with pytest.raises(utils.UserError, match=key):
        load_trunk(model, state)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
