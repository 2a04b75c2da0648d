"""The losses against naive loops."""

import math

import pytest
import torch

from models import BrainModel
from training.contrast import mixco, mixco_nce, soft_clip_loss, soft_temperature
from training.objectives import BrainObjective, LatentObjective, latent_ssim


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def voxels():
    """Two subjects of different sizes; every trial's voxels carry its joint row and subject."""
    return {"subj02": torch.randn(40, 7, generator=generator(1)), "subj05": torch.randn(24, 3, generator=generator(2))}


def test_mixco_mixes_within_a_subject_and_points_into_the_joint_batch(voxels):
    originals = [(subject, row) for subject, x in voxels.items() for row in x]  # the joint batch
    mixed, perm, betas, select = mixco(voxels, generator())
    rows = [(subject, row) for subject, x in mixed.items() for row in x]
    assert perm.shape == betas.shape == select.shape == (64,)
    assert sorted(perm.tolist()) == list(range(64))
    for i, (subject, row) in enumerate(rows):
        partner_subject, partner = originals[perm[i]]
        assert partner_subject == subject
        torch.testing.assert_close(row, betas[i] * originals[i][1] + (1 - betas[i]) * partner)
    assert torch.all(betas[~select] == 1) and torch.all((betas >= 0) & (betas <= 1))


def test_mixco_draws_beta_015_for_half_of_the_trials():
    _, _, betas, select = mixco({"subj01": torch.zeros(40000, 1)}, generator())
    drawn = betas[select]
    assert abs(select.float().mean() - 0.5) < 0.01
    assert abs(drawn.mean() - 0.5) < 0.02
    assert abs(drawn.var() - 1 / (4 * (2 * 0.15 + 1))) < 0.01  # variance of Beta(a, a)


def test_mixco_is_reproducible(voxels):
    first, second = (mixco(voxels, generator(3)) for _ in range(2))
    assert all(torch.equal(first[0][s], second[0][s]) for s in voxels)
    assert all(torch.equal(a, b) for a, b in zip(first[1:], second[1:], strict=True))
    assert not torch.equal(first[1], mixco(voxels, generator(4))[1])


def naive_logits(preds, targets, temp):
    rows = [[float(torch.cosine_similarity(p.flatten(), t.flatten(), 0)) / temp for t in targets] for p in preds]
    return torch.tensor(rows)


def naive_cross_entropy(logits, labels):
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        top = max(row)
        norm = top + math.log(sum(math.exp(value - top) for value in row))
        total -= sum(weight * (value - norm) for value, weight in zip(row, label, strict=True))
    return total / len(logits)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_mixco_nce_against_naive(voxels, bidirectional):
    preds, targets = torch.randn(2, 64, 5, 3, generator=generator(5))
    _, perm, betas, select = mixco(voxels, generator())
    fixed = int((~select).nonzero()[0])
    select[fixed], betas[fixed] = True, 0.3
    other = int((perm == fixed).nonzero()[0])  # make `fixed` a trial that is mixed with itself
    perm[other], perm[fixed] = perm[fixed].clone(), fixed
    labels = torch.zeros(64, 64)
    for i in range(64):
        labels[i, i] += betas[i]
        labels[i, perm[i]] += 1 - betas[i]
    assert torch.allclose(labels.sum(1), torch.ones(64))
    logits = naive_logits(preds, targets, 0.1)
    expected = naive_cross_entropy(logits, labels)
    if bidirectional:
        expected = (expected + naive_cross_entropy(logits.T, labels.T)) / 2
    actual = mixco_nce(preds, targets, 0.1, perm, betas, select, bidirectional)
    assert math.isclose(float(actual), expected, rel_tol=1e-5)


def test_mixco_nce_without_mixing_is_cross_entropy():
    preds, targets = torch.randn(2, 8, 6, generator=generator(6))
    none = torch.zeros(8, dtype=torch.bool)
    actual = mixco_nce(preds, targets, 0.05, torch.arange(8).flip(0), torch.full((8,), 0.5), none, False)
    logits = naive_logits(preds, targets, 0.05)
    torch.testing.assert_close(actual, torch.nn.functional.cross_entropy(logits, torch.arange(8)))


def test_soft_clip_against_naive():
    preds, targets = torch.randn(2, 9, 4, 2, generator=generator(7))
    logits = naive_logits(preds, targets, 0.2)
    labels = naive_logits(targets, targets, 0.2).softmax(1)
    expected = (naive_cross_entropy(logits, labels) + naive_cross_entropy(logits.T, labels)) / 2
    assert math.isclose(float(soft_clip_loss(preds, targets, 0.2)), expected, rel_tol=1e-5)


def test_contrast_is_float32_under_autocast():
    preds, targets = torch.randn(2, 8, 30, generator=generator(8))
    expected = soft_clip_loss(preds, targets, 0.004)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(soft_clip_loss(preds, targets, 0.004), expected)


def test_soft_temperature():
    assert soft_temperature(0.33, 0.33) == soft_temperature(0.0, 0.33) == pytest.approx(0.004)
    assert soft_temperature(1.0, 0.33) == pytest.approx(0.0075)
    assert soft_temperature(0.665, 0.33) == pytest.approx((0.004 + 0.0075) / 2)  # the middle of half a cosine
    assert soft_temperature(1.0, 1.0) == pytest.approx(0.004)  # MixCo to the end


class Stub(torch.nn.Module):
    """Stands for BrainModel: contrast tokens are the voxels themselves, and what it was given is kept."""

    def forward(self, voxels, target, draws):
        self.voxels, self.target = voxels, target
        contrast = torch.cat(list(voxels.values())).view(target.shape)
        return contrast, contrast, torch.full((len(target),), 2.0)


def test_pct_correct_names_the_query():
    """Brain 1 and image 1 point aside: every brain finds image 0 first, but image 1 prefers its own brain."""
    brain = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, -1.0]])
    image = torch.tensor([[0.9, 0.3], [0.0, 1.0], [1.0, -0.1]])
    batch = {"voxels": {"subj01": brain}, "target": image[:, None], "image_ids": range(3)}
    _, logs = BrainObjective()(Stub().eval(), batch, 0.5)
    similarity = brain @ torch.nn.functional.normalize(image).T
    brain_to_image = sum(max(range(3), key=lambda j: similarity[i, j]) == i for i in range(3)) / 3
    image_to_brain = sum(max(range(3), key=lambda i: similarity[i, j]) == j for j in range(3)) / 3
    assert brain_to_image != image_to_brain
    assert float(logs["fwd_pct_correct"]) == pytest.approx(brain_to_image)
    assert float(logs["bwd_pct_correct"]) == pytest.approx(image_to_brain)


def test_objective_mixes_then_softens():
    """The same trials in three situations: early in training, late in training, and in validation."""
    x, target = torch.randn(16, 6, generator=generator(1)), torch.randn(16, 3, 2, generator=generator(2))
    batch = {"voxels": {"subj01": x[:10], "subj02": x[10:]}, "target": target, "image_ids": range(16)}
    objective, model = BrainObjective(clip_scale=0.5, prior_scale=30.0, mixup_pct=0.33), Stub()

    mixed, perm, betas, select = mixco(batch["voxels"], generator(9))
    loss, logs = objective(model.train(), batch, 0.32, generator(9))
    contrast = torch.cat(list(mixed.values()))
    expected = mixco_nce(contrast, target, 0.006, perm, betas, select)
    torch.testing.assert_close(logs["loss_clip"], expected)
    torch.testing.assert_close(loss, 0.5 * expected + 30 * 2.0)
    for i in range(16):  # the prior's target is mixed like the voxels
        torch.testing.assert_close(model.target[i], betas[i] * target[i] + (1 - betas[i]) * target[perm[i]])

    for training, progress in [(True, 0.6), (False, 0.1), (False, 0.6)]:
        _, logs = objective(model.train(training), batch, progress, generator(9))
        expected = soft_clip_loss(x, target, soft_temperature(progress, 0.33))
        torch.testing.assert_close(logs["loss_clip"], expected)
        assert torch.equal(torch.cat(list(model.voxels.values())), x) and torch.equal(model.target, target)
    assert set(logs) == {"loss_clip", "loss_prior", "fwd_pct_correct", "bwd_pct_correct"}


@pytest.mark.parametrize("progress", [0.0, 0.5])
def test_objective_reaches_every_parameter(progress):
    """Of the real model, both phases, under bfloat16 autocast too; the batch itself stays as it was."""
    torch.manual_seed(0)
    model = BrainModel({"subj01": 5, "subj02": 4}, hidden_dim=8, tokens=3, width=6, prior_depth=2)
    voxels = {"subj01": torch.randn(12, 5), "subj02": torch.randn(12, 4)}
    batch = {"voxels": {s: x.clone() for s, x in voxels.items()}, "target": torch.randn(24, 3, 6),
             "image_ids": range(24)}
    for dtype in (torch.float32, torch.bfloat16):
        model.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype == torch.bfloat16):
            loss, logs = BrainObjective()(model, batch, progress)
        loss.backward()
        assert loss.dtype == torch.float32 and torch.isfinite(loss)
        without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert without == []
        assert not any(value.requires_grad for value in logs.values())
    assert all(torch.equal(batch["voxels"][s], x) for s, x in voxels.items())


class LatentStub(torch.nn.Module):
    """Stands for LatentModel: latents and contrast tokens are the voxels themselves."""

    def forward(self, voxels):
        x = torch.cat(list(voxels.values()))
        return x.view(-1, 4, 8, 8), x.view(-1, 16, 16)


def test_latent_objective_is_l1_on_mixed_latents_and_a_contrast_of_patches():
    x, target = torch.randn(2, 12, 256, generator=generator(1))
    tokens = torch.randn(12, 17, 16, generator=generator(2))
    batch = {"voxels": {"subj01": x[:8], "subj02": x[8:]}, "target": target.view(12, 4, 8, 8), "tokens": tokens,
             "image_ids": range(12)}
    objective, model = LatentObjective(clip_scale=0.5, mixup_pct=0.33), LatentStub()

    mixed, perm, betas, select = mixco(batch["voxels"], generator(9))
    mixed = torch.cat(list(mixed.values()))
    expected_l1 = sum(float((mixed[i] - betas[i] * target[i] - (1 - betas[i]) * target[perm[i]]).abs().mean())
                      for i in range(12)) / 12
    contrast = mixco_nce(mixed, tokens[:, 1:], 0.006, perm, betas, select)  # no class token
    loss, logs = objective(model.train(), batch, 0.1, generator(9))
    assert float(logs["loss_l1"]) == pytest.approx(expected_l1, rel=1e-5)
    torch.testing.assert_close(loss, expected_l1 + 0.5 * contrast)
    assert "ssim" not in logs

    loss, logs = objective(model.eval(), batch, 0.1, generator(9))
    assert float(logs["loss_l1"]) == pytest.approx(float((x - target).abs().mean()), rel=1e-5)
    soft = soft_clip_loss(x, tokens[:, 1:], soft_temperature(0.1, 0.33))
    torch.testing.assert_close(logs["loss_clip"], soft)
    assert -0.2 < float(logs["ssim"]) < 0.2  # unrelated noise


def test_ssim_of_latents_is_one_for_equal_ones_and_falls_with_noise():
    target, noise = torch.randn(2, 3, 4, 8, 8, generator=generator(3))
    values = [float(latent_ssim(target + scale * noise, target)) for scale in (0, 0.3, 1)]
    assert values[0] == pytest.approx(1) and values[0] > values[1] > values[2]
