"""The metrics against numpy, scipy and scikit-image called pair by pair, and against naive loops."""

import itertools

import numpy as np
import pytest
import scipy
import torch
from PIL import Image
from scipy.spatial.distance import correlation
from scipy.stats import binomtest, bootstrap, pearsonr, rankdata
from skimage.color import rgb2gray
from skimage.metrics import structural_similarity

from evaluation import metrics


@pytest.fixture
def pairs():
    """Six true images and noisy reconstructions, (6, 3, 48, 48) in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    truths = torch.nn.functional.interpolate(torch.rand(6, 3, 6, 6, generator=generator), size=48, mode="bicubic")
    truths = truths.clamp(0, 1)
    return truths, (truths + 0.2 * torch.randn(truths.shape, generator=generator)).clamp(0, 1)


@pytest.fixture
def features():
    rng = np.random.default_rng(1)
    reals = rng.normal(size=(9, 5))
    return reals, reals + 1.2 * rng.normal(size=(9, 5))


def enlarged(image):
    """(3, H, W) -> (425, 425, 3) by PIL's bilinear, which equals the protocol's when enlarging."""
    planes = [Image.fromarray(plane.numpy()).resize((425, 425), Image.Resampling.BILINEAR) for plane in image]
    return np.stack(planes, axis=2)


def test_pixcorr_is_pearson_of_the_enlarged_pixels(pairs):
    expected = [pearsonr(enlarged(a).ravel(), enlarged(b).ravel())[0] for a, b in zip(*pairs, strict=True)]
    np.testing.assert_allclose(metrics.pixcorr(*pairs), expected, atol=1e-5)
    assert 0.5 < np.mean(expected) < 0.99


def test_ssim_is_scikit_images_on_gray(pairs):
    expected = [structural_similarity(rgb2gray(enlarged(b)), rgb2gray(enlarged(a)), gaussian_weights=True, sigma=1.5,
                                      use_sample_covariance=False, data_range=1.0) for a, b in zip(*pairs, strict=True)]
    np.testing.assert_allclose(metrics.ssim(*pairs), expected, atol=1e-4)


def test_sharpness_is_a_naive_ratio_of_gradients(pairs):
    truths = pairs[0].clone()
    images = torch.stack([torch.from_numpy(scipy.ndimage.gaussian_filter(x.numpy(), (0, 1, 1))) for x in pairs[1]])

    def steps(image):
        gray = rgb2gray(enlarged(image))
        return np.sqrt(np.mean((gray[1:] - gray[:-1]) ** 2) + np.mean((gray[:, 1:] - gray[:, :-1]) ** 2))

    found = metrics.sharpness(truths, images)
    np.testing.assert_allclose(found, [steps(b) / steps(a) for a, b in zip(truths, images, strict=True)], rtol=1e-4)
    assert (metrics.sharpness(truths, pairs[1]) > found).all()
    np.testing.assert_allclose(metrics.sharpness(truths, truths), 1)
    truths[1] = 0.4
    assert np.isnan(metrics.sharpness(truths, images)).tolist() == [False, True] + 4 * [False]


def test_resize_shrinks_without_antialiasing():
    stripes = torch.zeros(1, 1, 1, 16)
    stripes[..., ::4] = 1  # at a quarter of the width, bilinear looks at pixels 1 and 2 of each four: no stripe left
    assert metrics.resize(stripes.expand(1, 3, 16, 16), 4).max() == 0


def test_a_flat_image_is_uncorrelated_not_nan(pairs):
    truths, images = pairs[0], pairs[1].clone()
    images[2] = 0.3
    values = metrics.pixcorr(truths, images)
    assert values[2] == 0 and np.isfinite(values).all()


def test_correlation_distance_is_scipys(features):
    expected = [correlation(a, b) for a, b in zip(*features, strict=True)]
    np.testing.assert_allclose(metrics.correlation_distance(*features), expected)


def test_two_way_is_the_protocols_formula_and_a_naive_loop(features):
    reals, preds = features
    n = len(reals)
    r = np.corrcoef(reals, preds)[:n, n:]  # the protocol's own code
    success = r < np.diag(r)
    found = metrics.two_way(reals, preds)
    assert list(found) == ["rec_to_gt", "gt_to_rec"]
    assert found["rec_to_gt"] == pytest.approx(success.sum(axis=0).mean() / (n - 1))
    for name, query, gallery in (("rec_to_gt", preds, reals), ("gt_to_rec", reals, preds)):
        wins = [pearsonr(query[i], gallery[i])[0] > pearsonr(query[i], gallery[j])[0]
                for i in range(n) for j in range(n) if i != j]
        assert found[name] == pytest.approx(np.mean(wins))
    assert found["rec_to_gt"] != found["gt_to_rec"]  # else the test could not tell one from the other


def test_two_way_of_perfect_random_and_identical_sets():
    rng = np.random.default_rng(2)
    reals = rng.normal(size=(200, 30))
    assert metrics.two_way(reals, reals) == {"rec_to_gt": 1.0, "gt_to_rec": 1.0}
    assert metrics.two_way(reals, rng.normal(size=(200, 30)))["rec_to_gt"] == pytest.approx(0.5, abs=0.05)
    same = np.repeat(rng.normal(size=(1, 30)), 200, axis=0)  # every reconstruction the same: exactly chance
    assert metrics.two_way(reals, same)["rec_to_gt"] == pytest.approx(0.5)


def test_ranks_are_positions_in_the_sorted_candidates(features):
    reals, preds = features
    rank = []
    for i, pred in enumerate(preds):
        order = sorted(range(len(reals)), key=lambda j: -pearsonr(pred, reals[j])[0])
        rank.append(order.index(i) + 1)
    found = metrics.ranks(reals, preds)
    assert found == {"median_rank": np.median(rank), "top1": np.mean(np.array(rank) == 1),
                     "top5": np.mean(np.array(rank) <= 5)}
    assert 0 < found["top1"] < 1


def test_what_says_nothing_is_at_chance_where_the_protocol_does_not_say_otherwise():
    """One picture for every image, as the mean image is: a tie with all rivals."""
    rng = np.random.default_rng(7)
    reals, same = rng.normal(size=(50, 30)), np.repeat(rng.normal(size=(1, 30)), 50, axis=0)
    assert metrics.two_way(reals, same)["gt_to_rec"] == 0.5
    nothing = np.zeros((50, 30))
    assert metrics.two_way(reals, nothing) == {"rec_to_gt": 0.0, "gt_to_rec": 0.5}  # the protocol's own: a failure
    assert metrics.ranks(reals, nothing) == {"median_rank": 25.5, "top1": pytest.approx(1 / 50),
                                             "top5": pytest.approx(5 / 50)}


def test_ranks_with_ties_are_scipys_and_those_of_every_order():
    r = np.random.default_rng(8).integers(0, 3, size=(6, 6)).astype(float)
    rank, first = metrics.ranks_of(metrics.identification(r, tie=0.5)["rec_to_gt"])
    for i in range(6):
        candidates = r[:, i]  # of reconstruction i
        assert rank[i] == rankdata(-candidates)[i]
        places = [sorted(order, key=lambda j: -candidates[j]).index(i) for order in itertools.permutations(range(6))]
        for k in (1, 5):
            assert first[k][i] == pytest.approx(np.mean(np.array(places) < k))
    assert len(set(rank)) > 2 and not np.isin(first[1], (0, 1)).all()


def test_retrieval_is_named_by_query_and_gallery():
    # brain 0 is nearest to image 0 and so is brain 1; image 1 is nearest to brain 1: directions differ
    image = np.array([[1.0, 0.0], [0.0, 1.0]])
    brain = np.array([[1.0, 0.0], [0.8, 0.6]])
    assert metrics.retrieval(brain, image) == {"brain_to_image_top1": 0.5, "image_to_brain_top1": 1.0}


def test_retrieval_draws_galleries(features):
    rng = np.random.default_rng(3)
    image = rng.normal(size=(60, 2, 4))
    brain = 3 * (image + 0.8 * rng.normal(size=image.shape))  # the length of an embedding must not matter
    unit = [x.reshape(60, -1) / np.linalg.norm(x.reshape(60, -1), axis=1, keepdims=True) for x in (brain, image)]
    rates = []
    for _ in range(3000):
        chosen = rng.choice(60, 20, replace=False)
        similarity = unit[0][chosen] @ unit[1][chosen].T
        rates.append((similarity.argmax(1) == np.arange(20)).mean())
    found = metrics.retrieval(brain, image, gallery=20, draws=300)
    assert found["brain_to_image_top1"] == pytest.approx(np.mean(rates), abs=0.02)
    assert found == metrics.retrieval(brain, image, gallery=20, draws=300)
    hits, drawn = metrics.retrieval_counts(brain, image, gallery=20, draws=7)
    assert drawn.sum() == 7 * 20 and all((hit <= drawn).all() for hit in hits.values())


def test_bootstrap_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(4).normal(size=400)
    low, high = metrics.bootstrap_ci(metrics.mean_of(values), 400, draws=5000)
    error = values.std() / np.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.008)


def test_bootstrap_is_scipys_and_knows_images_without_a_value():
    values = np.random.default_rng(5).exponential(size=60)
    for ours, theirs in ((metrics.mean_of, np.mean), (metrics.median_of, np.median)):
        wanted = bootstrap((values,), theirs, n_resamples=20000, method="percentile", rng=1).confidence_interval
        assert metrics.bootstrap_ci(ours(values), 60, draws=20000) == pytest.approx(tuple(wanted), abs=0.05)
    values[::7] = np.nan
    index = np.random.default_rng(6).integers(60, size=(2, 3, 60))
    np.testing.assert_allclose(metrics.mean_of(values)(index), np.nanmean(values[index], axis=-1))
    assert np.isnan(metrics.mean_of(values)(np.array([0, 7])))


def test_a_difference_without_spread_has_an_exact_interval():
    """All right beside all wrong: a bootstrap would be certain of 100 images as of 5."""
    n = 20
    alike, apart = (metrics.exact_difference_ci(np.full(n, gain)) for gain in (0, 1))
    bound = binomtest(0, n).proportion_ci(0.95).high
    assert alike == pytest.approx((-bound, bound))
    assert apart == pytest.approx((1 - 2 * bound, 1)) and metrics.exact_difference_ci(-np.ones(n))[0] == -1
    rng = np.random.default_rng(0)  # it holds: two rates of .97 of the same images, drawn again and again
    covered = total = 0
    for _ in range(2000):
        gain = (rng.random(n) < 0.97).astype(float) - (rng.random(n) < 0.97)
        if (gain == gain[0]).all():
            low, high = metrics.exact_difference_ci(gain)
            covered, total = covered + (low <= 0 <= high), total + 1
    assert total > 300 and covered / total > 0.95


def test_numbers_are_written_without_a_signed_zero():
    assert [metrics.written(value, 1) for value in (-0.04, 0.04, -0.06, 1)] == ["0.0", "0.0", "-0.1", "1.0"]


def test_bootstrap_of_pairs_never_sets_an_image_against_itself(features):
    table = metrics.identification(metrics.correlations(*features))["rec_to_gt"]
    statistic = metrics.pair_mean_of(table)
    assert statistic(np.arange(9)) == pytest.approx(metrics.pair_mean(table))
    index = np.array([0, 0, 1, 3, 3, 3, 4, 7, 8])
    naive = [table[i, j] for a, i in enumerate(index) for b, j in enumerate(index) if i != j]
    assert statistic(index) == pytest.approx(np.mean(naive))
    assert statistic(np.stack([index, index[::-1]])) == pytest.approx([np.mean(naive)] * 2)
    assert metrics.bootstrap_ci(metrics.pair_mean_of(~np.eye(9, dtype=bool)), 9) == (1.0, 1.0)


def test_within_clusters_compares_with_rivals_of_the_same_cluster_only():
    rng = np.random.default_rng(0)
    reals, preds = rng.standard_normal((2, 7, 5))
    clusters = np.array([0, 0, 1, 1, 1, 0, 2])
    r = metrics.correlations(reals, preds)
    found = metrics.within_clusters(metrics.identification(r)["rec_to_gt"], clusters)
    for i in range(7):
        rivals = [j for j in range(7) if j != i and clusters[j] == clusters[i]]
        wanted = np.mean([r[i, i] > r[j, i] for j in rivals]) if rivals else np.nan
        np.testing.assert_equal(found[i], wanted)
    everything = metrics.within_clusters(metrics.identification(r)["rec_to_gt"], np.zeros(7))
    assert everything.mean() == pytest.approx(metrics.two_way(reals, preds)["rec_to_gt"])


def test_what_knows_only_the_cluster_is_at_chance_within_it():
    """Identification among all is far above chance, among the own kind of scene it is not."""
    rng = np.random.default_rng(0)
    kind = rng.integers(8, size=400)
    centres = 5 * rng.standard_normal((8, 40))
    reals = centres[kind] + rng.standard_normal((400, 40))
    preds = centres[kind] + rng.standard_normal((400, 40))
    clusters = metrics.clusters_of(reals, 8)
    assert all(len(set(clusters[kind == k])) == 1 for k in range(8))
    successes = metrics.identification(metrics.correlations(reals, preds))["rec_to_gt"]
    assert metrics.pair_mean(successes) > 0.9
    assert abs(np.nanmean(metrics.within_clusters(successes, clusters)) - 0.5) < 0.03


@pytest.mark.parametrize("shape", [(30, 6), (6, 30)])
def test_effective_rank_is_the_entropy_of_the_singular_values(shape):
    rows = np.random.default_rng(0).standard_normal(shape) * np.geomspace(1, 100, shape[1])
    values = scipy.linalg.svdvals(rows - rows.mean(axis=0))
    shares = values[values > 1e-9 * values.max()] / values.sum()
    assert metrics.effective_rank(rows) == pytest.approx(np.exp(scipy.stats.entropy(shares)), rel=1e-6)
    line = np.outer(np.arange(10.0), np.ones(4))
    assert metrics.effective_rank(line) == pytest.approx(1)


def test_pixcorr_and_ssim_have_their_golden_values():
    """Three pairs that any version of the libraries must score alike (an old scikit-image reads SSIM's columns as
    channels, another antialiasing blurs before it compares)."""
    y, x = torch.meshgrid(torch.arange(64) / 63, torch.arange(64) / 63, indexing="ij")
    waves = torch.stack([0.5 + 0.5 * torch.sin(k * x) for k in (9, 20, 40)])
    truths = torch.stack([torch.stack([x, y, (x + y) / 2]), waves,
                          torch.stack([(x > 0.5) * 1.0, (y > 0.3) * 0.8, (x > y) * 0.6])])
    made = torch.stack([truths[0].flip(-1), 0.8 * truths[1] + 0.1 * y, truths[2].roll(3, -1)])
    truths, made = metrics.resize(truths, 256), metrics.resize(made, 256)
    np.testing.assert_allclose(metrics.pixcorr(truths, made), GOLDEN["pixcorr"], atol=2e-5)
    np.testing.assert_allclose(metrics.ssim(truths, made), GOLDEN["ssim"], atol=2e-5)


GOLDEN = {"pixcorr": (-0.000000, 0.994419, 0.887888), "ssim": (0.920255, 0.975130, 0.928413)}
