"""Measuring sets of pictures against what was seen: every metric of every image, intervals, differences.

A metric's entry, as metrics.json holds it: {"value", "ci_low", "ci_high", "n"}, and "missing", why there is no value.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch

import utils
from disk.files import file_hash
from disk.names import run_name
from encoding.encoder import Encoder, load_encoder
from evaluation import metrics
from nsd.regions import roi_masks
from nsd.repeats import responses_to
from sampling.folders import ImageSet, in_batches

BATCH = 16  # pictures that GNet sees at once: 50 take a CPU a third longer each


class Measured:
    """What was found of one set: results {metric: entry}, per_image {metric: (N,)}, tables {metric: (N, N) successes of
    query against rival}; the last two are means over samples."""

    def __init__(self, per_image, tables, seed):
        self.per_image, self.tables = per_image, tables
        self.results = {
            name: summarise(self.statistic(name), len(values), seed, values if metrics.is_rate(name) else None)
            for name, values in per_image.items()}

    def statistic(self, name):
        """The metric as a function of an index (..., N) of images, for the bootstrap."""
        if name in self.tables:
            return metrics.pair_mean_of(self.tables[name])
        return (metrics.median_of if "median" in name else metrics.mean_of)(self.per_image[name])


class Findings(NamedTuple):
    """What an evaluation found, of one folder of reconstructions and of what they were compared with."""

    images: ImageSet
    sets: dict  # label -> PictureSet: the seen images, then those of `measured`
    measured: dict  # label -> Measured, the reconstructions first
    differences: dict  # label -> {metric: entry}, reconstructions minus that set, images paired
    absent: dict  # label -> why that set was not measured
    remarks: tuple = ()  # what a reader must know, a line each
    kinds: np.ndarray | None = None  # (N,) number of each image's kind of scene
    ratings: dict = {}  # label -> entry: how often people chose the reconstruction over that set's picture
    explained: dict = {}  # feature -> {"ridge", "network", "scored"}: R2 on validation images
    curves: tuple = ()  # curves.Curve, of sets that grow with what their decoder was given
    parts: dict = {}  # parts.measure_parts: of some of the images
    n_stimuli: int | None = None  # of the world that the images are of
    note: str | None = None  # what a reader of brain correlations must know; None: there are none

    @property
    def label(self):
        """Of the reconstructions."""
        return next(iter(self.measured))

    @property
    def results(self):
        """{metric: entry} of the reconstructions."""
        return self.measured[self.label].results

    @property
    def per_image(self):
        """{metric: (N,)} of the reconstructions."""
        return self.measured[self.label].per_image

    @property
    def n_samples(self):
        return self.sets[self.label].n_samples


class Scale:
    """Measures sets of pictures against what was seen, with the same networks."""

    def __init__(self, seen, networks, store, brain, seed):
        """brain: Brain or None."""
        self.seen, self.networks, self.store, self.brain, self.seed = seen, networks, store, brain, seed
        self.reals = {name: store.features(name, network, seen) for name, network in networks.items()}
        self.kinds = kinds_of(self.reals["clip_two_way"]) if "clip_two_way" in networks else None

    def measure(self, pictures):
        """All metrics of a PictureSet of the same images, Measured."""
        samples = range(pictures.n_samples)
        with ThreadPoolExecutor(1) as beside:  # pixels are compared while networks look
            pixels = [beside.submit(self.pixels, pictures, k) for k in samples]
            brain = [self.brain_correlation(pictures, k) for k in samples]
            preds = {name: [self.store.features(name, network, pictures, k) for k in samples]
                     for name, network in self.networks.items()}
        per_image = [pixels[k].result() | brain[k] for k in samples]
        per_image, tables = {name: np.mean([found[name] for found in per_image], axis=0) for name in per_image[0]}, {}
        for name in self.networks:
            compare_features(name, self.reals[name], preds[name], self.kinds, per_image, tables)
        return Measured(per_image, tables, self.seed)

    def pixels(self, pictures, sample):
        """PixCorr, SSIM and sharpness of every image, {metric: (N,)}."""
        def measure(i):  # one by one: a batch is no faster, and the system zeroes its memory each time
            pair = [metrics.resize(x, metrics.PIXEL_SIDE) for x in (self.seen.batch([i]), pictures.batch([i], sample))]
            return metrics.pixcorr(*pair), metrics.ssim(*pair), metrics.sharpness(*pair)

        def make(file):
            with one_core_each(), ThreadPoolExecutor(os.cpu_count()) as threads:
                found = list(threads.map(measure, range(len(self.seen.image_ids))))
            with open(file, "wb") as stream:
                np.save(stream, np.concatenate(found, axis=1))

        found = self.store.kept("pixels_sharpness", self.seen.key() + pictures.key(sample), make)
        return dict(zip(("pixcorr", "ssim", "sharpness"), np.array(found), strict=True))

    def brain_correlation(self, pictures, sample):
        """Correlation of the response predicted for a picture with the one measured to the seen image, across a
        region's voxels: {brain_correlation_<ROI>: (N,)}. Measured responses are averaged over an image's repeats; no
        noise ceiling divides (docs/evaluation.md, Protocol)."""
        if self.brain is None:
            return {}
        encoder, responses, rois = self.brain

        def make(file):
            shown = (pictures.read(i, sample) for i in range(len(pictures.image_ids)))
            with open(file, "wb") as stream:
                np.save(stream, encoder.predict(in_batches(shown, BATCH), show=f"brain of {pictures.label}"))

        predicted = self.store.kept("voxels", file_hash(encoder.file) + encoder.subj + pictures.key(sample), make)
        return {f"brain_correlation_{roi}": metrics.paired_correlation(responses[:, mask], predicted[:, mask])
                for roi, mask in rois.items()}

    def differences(self, measured, other):
        """{metric: entry} of a set's values minus another one's, images paired."""
        n, found = len(self.seen.image_ids), {}
        for name in measured.per_image:
            if name in other.per_image:
                a, b = measured.statistic(name), other.statistic(name)
                gains = measured.per_image[name] - other.per_image[name]
                if metrics.is_rate(name) and gains[0] in (-1, 0, 1) and (gains == gains[0]).all():
                    low, high = metrics.exact_difference_ci(gains)
                else:
                    low, high = metrics.paired_ci(a, b, n, seed=self.seed)
                value = float(a(np.arange(n)) - b(np.arange(n)))
                found[name] = {"value": value, "ci_low": low, "ci_high": high, "n": n}
        return found


@contextmanager
def one_core_each():
    """In threads that are started meanwhile PyTorch computes on one core, as scikit-image's SSIM does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Brain(NamedTuple):
    """What judges by a subject's responses."""

    encoder: Encoder
    responses: np.ndarray  # (N, V) measured to the seen images, averaged over repeats
    rois: dict  # name -> bool (V,)

    def note(self, guided_by):
        """What the reader of brain correlations must know; guided_by: the GNet that guided the pictures, or None."""
        note = f"predicted by {self.encoder.run}, which was fitted to responses of the same subject"
        more = f"; {guided_by} guided these pictures, so that its own r is what was optimised"
        return note + (more if guided_by else "")


def brain_of(paths, subj, image_ids, gnet_run, seed, device):
    """The Brain that judges pictures of image_ids (N,), or None, and why there is none.

    gnet_run: a folder of train_logs, which must then be there (UserError); None takes the subject's own if it can.
    """
    if not gnet_run and not (paths.run(run_name("scratch", subj, "gnet", None)) / "best.pth").exists():
        whose = "" if subj == "subj01" else f"SUBJ={int(subj[-2:])} "
        return None, f"no encoding model of {subj} ({whose}STAGES=gnet bash scripts/train.sh)"
    try:
        encoder = load_encoder(paths, subj, gnet_run, seed, device)
        responses = responses_to(paths, subj, image_ids).betas
        rois = {roi: mask for roi, mask in roi_masks(paths, subj).items() if mask.any()}
    except utils.UserError as error:
        if gnet_run:
            raise
        return None, str(error)
    return Brain(encoder, responses, rois), None


def compare_features(name, real, preds, kinds, per_image, tables):
    """Add the metrics of one network to `per_image` and `tables`; real (N, D), preds: (N, D) per sample, kinds (N,)."""
    if name.endswith("_distance"):
        per_image[name] = np.mean([metrics.correlation_distance(real, pred) for pred in preds], axis=0)
        return
    if len(real) == 1:
        return
    found = [metrics.correlations(real, pred) for pred in preds]
    strict = [metrics.identification(r)["rec_to_gt"] for r in found]  # the protocol's, with the plain name
    halved = [metrics.identification(r, tie=0.5) for r in found]
    tables[name] = np.mean(strict, axis=0)
    tables[f"{name}_gt_to_rec"] = np.mean([successes["gt_to_rec"] for successes in halved], axis=0)
    for table in (name, f"{name}_gt_to_rec"):
        per_image[table] = tables[table].sum(axis=1) / (len(real) - 1)
    if name == "clip_two_way":
        ranks, first = zip(*(metrics.ranks_of(successes["rec_to_gt"]) for successes in halved), strict=True)
        per_image["clip_median_rank"] = np.mean(ranks, axis=0)
        per_image |= {f"clip_top{k}": np.mean([shares[k] for shares in first], axis=0) for k in (1, 5)}
        per_image["clip_similarity"] = np.mean([metrics.paired_correlation(real, pred) for pred in preds], axis=0)
        fair = np.mean([successes["rec_to_gt"] for successes in halved], axis=0)
        per_image["clip_two_way_same_cluster"] = metrics.within_clusters(fair, kinds)


def kinds_of(real):
    """Number of the kind of scene (N,) that each image is of, by CLIP's features (N, D)."""
    return metrics.clusters_of(real, max(1, round((len(real) / 2) ** 0.5)))


def summarise(statistic, n, seed, shares=None):
    """A metric's entry of metrics.json. shares (N,): of a rate, each image's; where all are 0 or 1 the interval is the
    exact one."""
    known = np.array([]) if shares is None else shares[~np.isnan(shares)]
    if len(known) and np.isin(known, (0, 1)).all():
        low, high = metrics.exact_ci(known)
    else:
        low, high = metrics.bootstrap_ci(statistic, n, seed=seed)
    return {"value": float(statistic(np.arange(n))), "ci_low": low, "ci_high": high, "n": n}


def unmeasured(reasons):
    """Entries of metrics.json for what has no value: {metric: why} -> {metric: entry}."""
    return {name: {"value": None, "ci_low": None, "ci_high": None, "n": 0, "missing": why}
            for name, why in reasons.items()}
