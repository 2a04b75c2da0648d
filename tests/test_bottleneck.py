"""The response squeezed to k numbers, against scikit-learn's regressions; test_decoders.py scores through it."""

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score

from training.bottleneck import Bottleneck


def planted(n, seed=0):
    """Responses (n, 30) in which 3 faint directions tell of the targets (n, 12), and 2 loud ones of nothing."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(np.random.default_rng(99).standard_normal((30, 30)))[0]
    told = rng.standard_normal((n, 3)) * (3, 2, 1)
    loud = 30 * rng.standard_normal((n, 2))
    responses = told @ axes[:3] + loud @ axes[3:5] + 0.3 * rng.standard_normal((n, 30)) + 5
    targets = told @ np.random.default_rng(98).standard_normal((3, 12)) + 0.1 * rng.standard_normal((n, 12))
    return responses.astype(np.float32), targets.astype(np.float32)


def r2_through(squeeze, train, test):
    """What a linear regression reads from squeezed responses."""
    fitted = LinearRegression().fit(squeeze(train[0]), train[1])
    return r2_score(test[1], fitted.predict(squeeze(test[0])), multioutput="variance_weighted")


def test_k_numbers_are_left_and_the_rest_is_gone():
    responses, targets = planted(400)
    squeeze = Bottleneck(responses, targets, 2)
    squeezed = squeeze(responses)
    centred = squeezed - squeezed.mean(0)
    assert np.linalg.matrix_rank(centred, tol=1e-2) == 2
    unread = np.linalg.svd(squeeze.encode.numpy().T)[2][2:]  # directions that the numbers do not see
    moved = responses + (7 * np.random.default_rng(1).standard_normal((400, 28)) @ unread).astype(np.float32)
    np.testing.assert_allclose(squeeze(moved), squeezed, atol=1e-3)
    np.testing.assert_allclose(squeeze(squeezed), squeezed, atol=1e-3)  # what is squeezed stays as it is


def test_the_numbers_are_those_that_tell_most():
    train, test = planted(600), planted(300, seed=1)
    found = {k: r2_through(Bottleneck(*train, k), train, test) for k in (1, 2, 3)}
    everything = r2_through(lambda rows: rows, train, test)
    assert 0.3 < found[1] < found[2] < found[3] and found[3] == pytest.approx(everything, abs=0.01)
    loudest = PCA(3).fit(train[0])
    assert r2_through(loudest.transform, train, test) < found[2]  # of the responses' own first axes two are but loud
    # the best that one number can do, by the singular values of what a regression of all voxels fits
    fitted = LinearRegression().fit(*train).predict(train[0])
    values = np.linalg.svd(fitted - fitted.mean(0), compute_uv=False) ** 2
    total = np.square(train[1] - train[1].mean(0)).sum(dtype=np.float64)
    for k in (1, 2):
        assert r2_through(Bottleneck(*train, k), train, train) * total == pytest.approx(values[:k].sum(), rel=0.02)
