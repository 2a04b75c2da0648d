"""Clusters of the images by what their captions say: what --hold_out leaves out of training.

A decoder that never saw a beach, and draws one, generalises; one that draws the nearest thing it has seen does not
(Shirakawa et al. 2024, arXiv 2405.10078). Letters: N images, n clusters.
"""

import hashlib

import h5py
import numpy as np

import utils
from disk.files import atomic_path
from nsd.components import open_components

FEAT = "c"  # CLIP's embedding of the captions
FIRST = 64  # components of it
SEED = 0


def in_cluster(paths, hold_out, image_ids, tested=None):
    """Whether images (m,) are in the cluster that --hold_out 'K/N' names, (m,) bool; tested: as in read_clusters."""
    k, n = map(int, hold_out.split("/"))
    found = read_clusters(paths, n, tested)[np.asarray(image_ids)]
    if not found.all():
        bad = np.asarray(image_ids)[found == 0][0]
        raise utils.UserError(f"{paths.clusters(n)}: image id {bad} is in no cluster, its {FEAT} was not there when "
                              "they were made; delete the file and train with --hold_out again")
    return found == k


def read_clusters(paths, n, tested=None):
    """Read each image's cluster, (N,) from 1, 0 where it has no components of c yet; where no file says so, make them.

    The file stays what it is when c is made again: trainings, scores and evaluations mean the same images by a cluster.
    tested: number of images -> ids of those that no cluster may be fitted to; None where nothing is to be made, and a
    missing file is a UserError.
    """
    file = paths.clusters(n)
    if not file.exists() and tested is not None:
        make_clusters(paths, n, tested)
    utils.require(file, f"{n} clusters of images", "train with --hold_out first")
    try:
        with h5py.File(file, "r") as opened:
            return opened["cluster"][()]
    except (OSError, KeyError) as error:
        raise utils.UserError(f"{file}: not readable ({error}); delete it and train with --hold_out again") from None


def make_clusters(paths, n, tested):
    """Fit k-means to the first components of c of all images that are not tested on; write every image's cluster."""
    from sklearn.cluster import KMeans

    known = open_components(paths, FEAT)
    there = known.there()
    rows = known.coefficients[there, :FIRST]
    fitted = ~np.isin(there, tested(len(known)))
    if fitted.sum() < n:
        raise utils.UserError(f"--hold_out K/{n}: {fitted.sum()} training images, wanted at least as many as clusters")
    means = KMeans(n, n_init=10, random_state=SEED).fit(rows[fitted])
    cluster = np.zeros(len(known), np.int64)
    cluster[there] = 1 + means.predict(rows)
    if paths.clusters(n).exists():  # a training beside this one was faster, and may have read it already
        return
    with atomic_path(paths.clusters(n)) as temporary, h5py.File(temporary, "w") as file:
        file["cluster"] = cluster
        file.attrs.update(seed=SEED, components=known.digest, n_fitted=int(fitted.sum()))


def clusters_digest(paths, hold_out):
    """Return a short hash of which image is in which cluster; hold_out: 'K/N'."""
    return hashlib.sha256(read_clusters(paths, int(hold_out.split("/")[1])).tobytes()).hexdigest()[:12]
