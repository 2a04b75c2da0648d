"""Evaluation metrics, protocol `mindeye2` (docs/evaluation.md): pure functions of arrays, no files and no networks.

Letters: N images, D features, H W pixels. Images are float (N, 3, H, W) in [0, 1]; truths come before reconstructions.
A comparison that is only defined between images (identification, retrieval) is named query_to_gallery.
"""

import numpy as np
import torch
import torch.nn.functional as F

PIXEL_SIDE = 425  # side of NSD's stimuli, at which pixels are compared
LOWER_IS_BETTER = ("clip_median_rank", "effnet_distance", "swav_distance")  # as evaluate.py names them
GALLERY, DRAWS = 300, 30  # retrieval: images per gallery, galleries drawn
FLAT = 1e-6  # a difference of pixels that is rounding
TIE = 1e-9  # correlations as near as this are the same, but for rounding


def written(value, digits=3):
    """A number with so many digits behind the point; never -0.0."""
    return f"{round(float(value), digits) + 0.0:.{digits}f}"


def is_rate(metric):
    """Whether a metric is a share, of images or of comparisons."""
    return "two_way" in metric or "top1" in metric or "top5" in metric


def chance_of(metric, n):
    """What a metric is of pictures that have nothing to do with the n images; None where only a control can tell."""
    if "two_way" in metric:
        return 0.5
    return {"clip_median_rank": (n + 1) / 2, "clip_top1": 1 / n, "clip_top5": min(5 / n, 1)}.get(metric)


def resize(images, side):
    """Resize images (N, C, H, W) to `side` pixels: bilinear, no antialiasing, as every resize of the protocol."""
    if images.shape[-2:] == (side, side):
        return images
    return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False, antialias=False)


# --- pixels ------------------------------------------------------------------------------------------------------


def pixcorr(truths, images):
    """Pearson correlation of the pixels of each pair at 425 x 425; returns (N,) in [-1, 1].

    The mean over pairs is the metric (MindEye2). An image of one flat colour counts as uncorrelated: 0.
    """
    return paired_correlation(*(resize(x, PIXEL_SIDE).flatten(1).numpy() for x in (truths, images)))


def ssim(truths, images):
    """Structural similarity of each pair in gray at 425 x 425 (Wang et al. 2004); returns (N,) in [-1, 1]."""
    from skimage.color import rgb2gray
    from skimage.metrics import structural_similarity

    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    grays = (rgb2gray(resize(x, PIXEL_SIDE).numpy(), channel_axis=1) for x in (images, truths))
    return np.array([structural_similarity(image, truth, **settings) for image, truth in zip(*grays, strict=True)])


def sharpness(truths, images):
    """How sharp images are: rms difference of neighbouring gray pixels, over that of the seen image.

    (N,), at 425 x 425; NaN where the seen image is flat. PixCorr and SSIM prefer a blurred image to a sharp one whose
    details are not quite in their places: below 1, part of what they say is blur.
    """
    gray = torch.tensor([0.2125, 0.7154, 0.0721]).view(1, 3, 1, 1)  # scikit-image's rgb2gray
    seen, drawn = (resize((x * gray).sum(1, keepdim=True), PIXEL_SIDE) for x in (truths, images))  # (N, 1, 425, 425)
    seen, drawn = (sum(x.diff(dim=d).square().mean((1, 2, 3)) for d in (2, 3)).sqrt().numpy() for x in (seen, drawn))
    return np.divide(drawn, seen, out=np.full(len(seen), np.nan), where=seen > FLAT)


# --- features of a pair --------------------------------------------------------------------------------------------


def paired_correlation(reals, preds):
    """Pearson correlation of row i of `reals` with row i of `preds`, (N, D) both; returns (N,), 0 for constant rows."""
    sides = [_centred(x) for x in (reals, preds)]
    norm = np.prod([np.sqrt(np.einsum("nd,nd->n", x, x)) for x in sides], axis=0)
    return np.divide(np.einsum("nd,nd->n", *sides), norm, out=np.zeros(len(norm)), where=norm > 0)


def correlation_distance(reals, preds):
    """1 - Pearson correlation of each pair of features (N, D); returns (N,), lower is better (EffNet-B, SwAV)."""
    return 1 - paired_correlation(reals, preds)


# --- identification ------------------------------------------------------------------------------------------------


def correlations(reals, preds, at_once=4096):
    """Pearson correlation of each true feature (rows) with each reconstructed one (columns); (N, D) both -> (N, N).

    Features are read `at_once` columns at a time, twice: a thousand images' of AlexNet are 1.5 GB in double precision.
    A row that is constant up to float32 rounding correlates 0, as in `paired_correlation`.
    """
    sides = [np.asarray(x).reshape(len(x), -1) for x in (reals, preds)]
    means = [x.mean(axis=1, dtype=np.float64, keepdims=True) for x in sides]
    dots = np.zeros((len(reals), len(preds)))
    squares, spread, size = ([np.zeros(len(x)) for x in sides] for _ in range(3))
    for start in range(0, sides[0].shape[1], at_once):
        centred = []
        for i, x in enumerate(sides):
            part = np.asarray(x[:, start:start + at_once], np.float64)
            centred.append(part - means[i])
            size[i] = np.maximum(size[i], np.abs(part).max(axis=1))
            spread[i] = np.maximum(spread[i], np.abs(centred[i]).max(axis=1))
            squares[i] += (centred[i] ** 2).sum(axis=1)
        dots += centred[0] @ centred[1].T
    weights = [np.where(wide > 1e-6 * large, 1 / np.sqrt(np.where(square > 0, square, 1)), 0)
               for wide, large, square in zip(spread, size, squares, strict=True)]
    return weights[0][:, None] * dots * weights[1]


def identified(predicted, measured):
    """Which images their responses tell from the others: bool (N,), true where of all N predictions that of the very
    image correlates best, across voxels, with the measured response.

    predicted, measured: (N, n). Identification of Kay et al. 2008, Nature 452:352.
    """
    return correlations(predicted, measured).argmax(axis=0) == np.arange(len(measured))


def identification(r, tie=0.0):
    """Say for every query and every wrong candidate whether the right candidate correlates better: 1, or 0.

    r: (N, N) from `correlations`; tie: what one counts, correlations within TIE of each other. 0 is the protocol's,
    and without TIE; with 0.5 a picture that says nothing is at chance. Returns {"rec_to_gt", "gt_to_rec"}, each (N, N)
    float: query i in row i, rival j in column j, the diagonal 0. "rec_to_gt" is the protocol's: a reconstruction is
    the query, true images the gallery.
    """
    def wins(queries):
        ahead = np.diag(r)[:, None] - queries
        won = (ahead > 0).astype(float) if not tie else np.where(np.abs(ahead) <= TIE, tie, ahead > 0)
        np.fill_diagonal(won, 0)
        return won

    return {"rec_to_gt": wins(r.T), "gt_to_rec": wins(r)}


def pair_mean(successes):
    """Mean of an (N, N) table over its N (N - 1) pairs of different images; the diagonal must be 0."""
    n = len(successes)
    return float(successes.sum() / (n * (n - 1)))


def two_way(reals, preds):
    """Two-way identification rate: how often the right one of two candidates correlates better with the query.

    reals, preds: features (N, D), N >= 2. Returns {"rec_to_gt", "gt_to_rec"} in [0, 1]. The first is the protocol's: a
    tie is a failure (as in MindEye2); in the second it counts half. Chance is 0.5.
    """
    r = correlations(reals, preds)
    return {"rec_to_gt": pair_mean(identification(r)["rec_to_gt"]),
            "gt_to_rec": pair_mean(identification(r, tie=0.5)["gt_to_rec"])}


def ranks_of(successes):
    """Rank, 1 = best, of the right candidate among all N, (N,), and whether it is among the first k: {k: (N,)}.

    successes: a table of `identification` where a tie counts half. Of candidates that tie the right one has the mean
    rank, and comes among the first k as often as if they were put in order by lot.
    """
    n = len(successes)
    tied = (successes == 0.5).sum(axis=1)
    better = (successes == 0).sum(axis=1) - 1  # the diagonal is no rival
    return n - successes.sum(axis=1), {k: ((k - better) / (tied + 1)).clip(0, 1) for k in (1, 5)}


def ranks(reals, preds):
    """Rank of the true image among all N for each reconstruction: {"median_rank", "top1", "top5"}.

    Two-way rates flatter: 95 % among 1000 images is a mean rank near 50. Chance: (N + 1) / 2, 1 / N, 5 / N.
    """
    rank, first = ranks_of(identification(correlations(reals, preds), tie=0.5)["rec_to_gt"])
    return {"median_rank": float(np.median(rank)), "top1": float(first[1].mean()), "top5": float(first[5].mean())}


def clusters_of(features, k, seed=0):
    """Number of the cluster (N,) of each image by its features (N, D): scikit-learn's k-means on unit vectors."""
    from sklearn.cluster import KMeans

    return KMeans(min(k, len(features)), n_init=10, random_state=seed).fit_predict(_unit(features))


def within_clusters(successes, clusters):
    """Two-way identification of each image among rivals of its own cluster only; (N,), NaN where it is alone.

    successes: a table (N, N) of `identification`, where a tie counts half; clusters (N,). A decoder that knows the kind
    of scene and no more (Shirakawa et al. 2024, arXiv 2405.10078: spurious reconstruction) is at chance, 0.5, here.
    """
    rivals = np.equal.outer(clusters, clusters) & ~np.eye(len(clusters), dtype=bool)
    count = rivals.sum(axis=1)
    won = (np.asarray(successes, float) * rivals).sum(axis=1)
    return np.divide(won, count, out=np.full(len(count), np.nan), where=count > 0)


def effective_rank(features):
    """Effective number of dimensions of features (N, ...) about their mean: exp of the entropy of the singular values'
    shares (Roy & Vetterli 2007, EUSIPCO); from 1 to min(N - 1, D)."""
    rows = np.asarray(features, np.float64).reshape(len(features), -1)
    rows = rows - rows.mean(axis=0)
    values = np.sqrt(np.linalg.eigvalsh(rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows).clip(0))
    shares = values[values > 1e-9 * values.max()] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


# --- retrieval -----------------------------------------------------------------------------------------------------


def retrieval_counts(brain, image, gallery=GALLERY, draws=DRAWS, seed=0):
    """Count per image how often it was drawn into a gallery, and how often it was then retrieved first.

    brain, image: embeddings (N, ...) of the same images, flattened and L2-normalised here; a gallery holds
    min(gallery, N) images, so N <= gallery needs a single draw. Returns {name: hits (N,)}, drawn (N,).
    """
    similarity = _unit(brain) @ _unit(image).T  # (N, N), rows brain, columns image
    n, rng = len(similarity), np.random.default_rng(seed)
    hits, drawn = {"brain_to_image_top1": np.zeros(n), "image_to_brain_top1": np.zeros(n)}, np.zeros(n)
    for _ in range(draws if n > gallery else 1):
        chosen = np.sort(rng.choice(n, size=min(gallery, n), replace=False))
        block, own = similarity[np.ix_(chosen, chosen)], np.arange(len(chosen))
        hits["brain_to_image_top1"][chosen] += block.argmax(axis=1) == own
        hits["image_to_brain_top1"][chosen] += block.argmax(axis=0) == own
        drawn[chosen] += 1
    return hits, drawn


def retrieval(brain, image, gallery=GALLERY, draws=DRAWS, seed=0):
    """Top-1 retrieval rate among `gallery` images, mean of `draws` galleries (MindEye2).

    brain, image: embeddings (N, ...). Returns {"brain_to_image_top1", "image_to_brain_top1"} in [0, 1]; chance is
    1 / min(gallery, N). Named query_to_gallery: other code calls the same two forward and backward, either way round.
    """
    hits, drawn = retrieval_counts(brain, image, gallery, draws, seed)
    return {name: float(hit.sum() / drawn.sum()) for name, hit in hits.items()}


# --- uncertainty ---------------------------------------------------------------------------------------------------


def bootstrap_ci(statistic, n, draws=1000, level=0.95, seed=0):
    """Percentile bootstrap over images: (low, high) of a statistic under drawing images with replacement.

    statistic: index (draws, n) -> (draws,), for instance lambda index: values[index].mean(-1).
    """
    index = np.random.default_rng(seed).integers(n, size=(draws, n))
    low, high = np.nanquantile(statistic(index), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def exact_ci(outcomes, level=0.95):
    """Clopper & Pearson's interval (1934) of a proportion, (low, high); outcomes (N,): 0 or 1 of every image.

    It holds for few images, too, and where all are right or all wrong: a bootstrap finds no spread there.
    """
    from scipy.stats import beta

    n, right, tail = len(outcomes), int(np.sum(outcomes)), (1 - level) / 2
    low = beta.ppf(tail, right, n - right + 1) if right else 0.0
    high = beta.ppf(1 - tail, right + 1, n - right) if right < n else 1.0
    return float(low), float(high)


def exact_difference_ci(gains, level=0.95):
    """Interval, (low, high), of a paired difference of two rates where it is -1, 0 or 1, and the same, of all images.

    gains (N,): one outcome minus the other of each image. From Clopper and Pearson's bound of what none of N shows.
    """
    n, gain = len(gains), float(gains[0])
    unseen = exact_ci(np.zeros(n), level)[1]
    if gain == 0:
        return -unseen, unseen
    low, high = sorted((gain, gain * (1 - 2 * unseen)))  # either rate may be wrong by as much
    return max(low, -1.0), min(high, 1.0)


def paired_ci(statistic_a, statistic_b, n, draws=1000, level=0.95, seed=0):
    """Percentile bootstrap of statistic_a - statistic_b over images, the same images drawn for both: (low, high)."""
    return bootstrap_ci(lambda index: statistic_a(index) - statistic_b(index), n, draws, level, seed)


def mean_of(values):
    """The mean of drawn images' values (N,), as a statistic for `bootstrap_ci`; NaN: an image without a value."""
    known, values = ~np.isnan(values), np.nan_to_num(values)

    def statistic(index):
        n = known[index].sum(-1)
        return np.where(n, values[index].sum(-1) / np.maximum(n, 1), np.nan)

    return statistic


def median_of(values):
    """As mean_of, the median; every image has a value."""
    return lambda index: np.median(values[index], axis=-1)


def pair_mean_of(successes):
    """The `pair_mean` of drawn images, as a statistic for `bootstrap_ci`: an image is never its own rival."""
    successes, n = np.asarray(successes, float), len(successes)

    def statistic(index):
        drawn = np.stack([np.bincount(row, minlength=n) for row in index.reshape(-1, n)])  # how often, (draws, N)
        pairs = index.shape[-1] ** 2 - (drawn**2).sum(1)
        found = np.where(pairs, (drawn @ successes * drawn).sum(1) / np.maximum(pairs, 1), np.nan)
        return found.reshape(index.shape[:-1])

    return statistic


def _centred(x):
    """Rows (N, D) with zero mean, in float64; a row that is constant up to float32 rounding becomes 0."""
    x = np.array(x, np.float64).reshape(len(x), -1)
    size = _largest(x)
    x -= x.mean(axis=1, keepdims=True)
    x[_largest(x) <= 1e-6 * size] = 0
    return x


def _largest(x):
    """Largest absolute value of each row (N, D)."""
    return np.maximum(x.max(axis=1), -x.min(axis=1))


def _unit(x):
    """Rows (N, ...) flattened to unit norm; a zero row stays 0."""
    x = np.asarray(x).reshape(len(x), -1)
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(norm > 0, norm, 1)
