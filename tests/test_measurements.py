"""Decoded features as measurements, and the rule that follows them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

import utils
from sampling.guidance import STEEPEST, posterior_rule
from sampling.measurements import ClipMeasurements, Measurement
from sampling.pipeline import loss_scale


def components_of(p, width=12, seed=0):
    """Stands in for nsd.components.Components: variances p, random axes and mean."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((width, width)))[0][:len(p)].astype(np.float32)
    return SimpleNamespace(feat="g_2", mean=rng.standard_normal(width).astype(np.float32), basis=basis, k=len(p),
                           variances=np.asarray(p, np.float32))


def test_a_measurement_is_the_likelihood_of_the_response():
    """Components q of variance p, a response r = q + noise of variance s. From the posterior mean and its errors, which
    is what a regression has, follows what scipy says of r given q, but for a constant."""
    p, s = np.array([9.0, 4.0, 2.0, 1.0]), np.array([0.9, 0.8, 1.0, 0.9])  # e / p grows, as isotonic regression wants
    known, rng = components_of(p), np.random.default_rng(1)
    r, q = rng.standard_normal((5, 4)) * 2, rng.standard_normal((5, 4)) * 2
    rows = known.mean + (r * p / (p + s)) @ known.basis
    found = Measurement.of(known, rows.reshape(5, 3, 4), np.append(p * s / (p + s), 0.3))
    pictures = torch.from_numpy(known.mean + q @ known.basis).float()
    misfits = found.misfit(pictures.view(5, 3, 4), [2] * 5).numpy()
    wanted = [-multivariate_normal(row, np.diag(s)).logpdf(r[2]) for row in q]
    np.testing.assert_allclose(misfits - misfits[0], wanted - wanted[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.targets, r, rtol=1e-4, atol=1e-5)
    at_its_word = Measurement.of(known, rows, np.append(p * s / (p + s), 0.3), shrunk=False)
    np.testing.assert_allclose(at_its_word.targets, r * p / (p + s), rtol=1e-4, atol=1e-5)


def test_what_is_not_decoded_does_not_measure():
    p = np.array([4.0, 3.0, 2.0, 1.0])
    found = Measurement.of(components_of(p), np.zeros((2, 12)), [1.0, 1.5, 1.95, 1.3, 0.1])
    assert len(found.weights) == 2 and found.basis.shape == (2, 12)
    by_chance = Measurement.of(components_of(p), np.zeros((2, 12)), [1.0, 3.3, 1.1, 1.1, 0.1])  # 1.1 and .55: one step
    np.testing.assert_allclose(1 / by_chance.weights[1] + 0, 1 / (1 / (3 * 0.825) - 1 / 3), rtol=1e-5)


def test_layers_that_measure_nothing_are_left_out(capsys):
    p = np.array([4.0, 3.0, 2.0, 1.0])
    silent = Measurement.of(components_of(p), np.zeros((2, 12)), p.tolist() + [0])
    some = Measurement.of(components_of(p), np.zeros((2, 12)), [1.0, 1.5, 1.95, 1.3, 0.1])
    assert list(ClipMeasurements(None, {2: silent, 4: some}).measurements) == [4]
    assert "g_2: no component is explained by 5%" in capsys.readouterr().out
    with pytest.raises(utils.UserError, match="g_2, g_4: no component is explained"):
        ClipMeasurements(None, {2: silent, 4: silent})


def test_layers_count_as_one_measurement():
    known = components_of([4.0, 3.0, 2.0])
    measured = {k: Measurement.of(known, np.random.default_rng(k).standard_normal((3, 12)), [1, 1, 1, 0])
                for k in (2, 4)}
    features = {k: torch.randn(2, 3, 4) for k in measured}
    term = ClipMeasurements(lambda image: features, measured).term([2, 0])
    alone = [measured[k].misfit(features[k], [2, 0]) for k in measured]
    torch.testing.assert_close(term(None), (alone[0] + alone[1]) / 2)
    with pytest.raises(utils.UserError, match="of 12 numbers, --clip_model makes 8"):
        ClipMeasurements(lambda image: {2: torch.randn(2, 2, 4)}, {2: measured[2]}).term([0, 1])(None)


def test_posterior_rule_follows_the_gradient_of_x0_and_no_further_than_it_knows():
    generator = torch.Generator().manual_seed(0)
    x, eps, gradient = (torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=generator) for _ in range(3))
    abar = torch.tensor(0.3, dtype=torch.float64)
    sigma = (1 - abar).sqrt()

    def shift(scale):
        return ((x - sigma * posterior_rule(eps, gradient, abar, scale)) - (x - sigma * eps)) / abar.sqrt()

    # the gradient on x_t is that on x0 over sqrt(abar)
    torch.testing.assert_close(shift(1e-3), -1e-3 * sigma**2 * gradient * abar.sqrt())
    torch.testing.assert_close(shift(1e3).square().mean((1, 2, 3)).sqrt(), (STEEPEST * sigma).expand(2))
    assert torch.equal(posterior_rule(eps, 0 * gradient, abar, 30.0), eps)


def test_small_and_large_gradients_fit_half_precision():
    pull = torch.randn(4, 3, 8, 8) * torch.tensor([1e-12, 1.0, 1e6, 0.0]).view(4, 1, 1, 1)
    scale = loss_scale(pull)
    largest = (pull * scale).abs().amax((1, 2, 3))
    assert ((0.25 <= largest[:3]) & (largest[:3] < 0.5)).all() and largest[3] == 0
    assert torch.equal(pull * scale / scale, pull)  # a power of two rounds nothing
