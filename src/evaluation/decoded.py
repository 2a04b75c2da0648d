"""What pictures were drawn from: the run and the scores behind a folder of reconstructions, and the metrics of those.

`run` here is a dict of the flags that name the run and its scores, as recon.py left them in the pictures' config.json.
"""

from functools import partial

import numpy as np

import utils
from disk.files import file_hash, load_csv, load_json, load_npy
from disk.names import LESIONS, images_name, scores_name
from disk.scores import load_scores, retrieval_stem
from evaluation import metrics
from evaluation.measuring import summarise
from nsd.components import open_components
from nsd.rows import open_betas
from nsd.synthetic import feature_file, feature_of, is_synthetic

AT_ONCE = 100  # images whose features are read together
# what names the scores behind the images
RUN_FLAGS = ("subj", "hidden_dim", "num_sessions", "tag", "run", "head", "control", "test_split", "repeats")


def run_behind(images):
    """The flags that name the scores the images were made from, as recon.py left them; or None and why not."""
    config = images.config
    if config is None:
        return None, f"{images.folder}/config.json, which says whose images these are, not found"
    lacking = [flag for flag in RUN_FLAGS if flag not in config]
    if lacking:
        return None, f"{images.folder}/config.json does not say {', '.join(lacking)}"
    return {flag: config[flag] for flag in RUN_FLAGS} | {name: config.get(name) for name in
                                                         (*LESIONS, "sd_model", "score_hashes", "hold_out")}, None


def voxels_of(run, paths):
    """Number of voxels of the responses that were decoded; None where they are not there."""
    if run is None or not paths.betas(run["subj"]).exists():
        return None
    return open_betas(paths, run["subj"]).shape[1]


def scored_since(run, paths, feat):
    """Say that the scores of a feature are no longer those that the pictures were drawn from; None where they are, or
    where it is not known."""
    file = paths.scores(run["subj"], scores_name(run, feat), feat) / "nsdgeneral.npy"
    known = (run.get("score_hashes") or {}).get(feat)
    if known is None or not file.exists() or file_hash(file) == known:
        return None
    return f"{file} is not what these pictures were drawn from: reconstruct again with --overwrite"


def check_rows(images, run, paths):
    """Refuse an index whose ids are not those of the scores that the pictures were drawn from, row by row.

    run: None where it is not known which scores those are.
    """
    folder = None if run is None else paths.scores(run["subj"], scores_name(run, "c"), "c")
    if folder is None or not (folder / "image_ids.npy").exists():
        return
    ids = load_npy(folder / "image_ids.npy", "the scores' image ids", "score again")
    for line in load_csv(images.folder / "index.csv", "the list of reconstructions", "reconstruct again"):
        row = int(line.get("row", -1))
        if row >= len(ids) or (row >= 0 and ids[row] != int(line["image_id"])):
            found = ids[row] if row < len(ids) else "none"
            raise utils.UserError(f"{images.folder}/index.csv: row {row} is image id {line['image_id']}, in {folder} "
                                  f"it is {found}; these pictures were not drawn from these scores: reconstruct again")


def folder_with(images, changed):
    """Where recon.py puts these reconstructions with some flags changed, {flag: value}; None where config.json does not
    say enough, or they lie elsewhere."""
    config = {"use_gnet": False, "gnet_roi": None, "gnet_kappa": 0, **(images.config or {})}
    if not {"method", *RUN_FLAGS} <= config.keys():
        return None
    name, new = (images_name(flags) for flags in (config, {**config, **changed}))
    parts = images.folder.parts  # .../<name>/<guidance_scale>/<guidance_strength>
    return images.folder.parents[2] / new / parts[-2] / parts[-1] if parts[-3] == name else None


def retrieval(run, no_run, paths, feat, seed):
    """Retrieve true features by the brain's, and the reverse, over all test images of these scores.

    Returns the entries of metrics.json, named query_to_gallery (brain_to_c_top1), and {metric: why it is missing};
    no_run: why `run` is None. Galleries of metrics.GALLERY images, and, where there are more, (`_of_all`) of all. "of"
    says whose the n queries are: more than the drawn images.
    """
    names = {f"brain_to_{feat}_top1": "brain_to_image_top1", f"{feat}_to_brain_top1": "image_to_brain_top1"}
    if run is None:
        return {}, dict.fromkeys(names, no_run)
    folder = paths.scores(run["subj"], scores_name(run, feat), feat)
    if changed := scored_since(run, paths, feat):
        return {}, dict.fromkeys(names, changed)
    stem = retrieval_stem(folder)
    if not (folder / f"{stem}.npy").exists():
        return {}, dict.fromkeys(names, f"{folder / stem}.npy not found")
    ids, brain = load_scores(folder, stem)
    seen, lacking = true_feature(run, paths, feat, ids)
    if seen is None:
        return {}, dict.fromkeys(names, lacking)
    if brain[0].size != np.prod(seen.row_shape):
        raise utils.UserError(f"{folder}/{stem}.npy: rows of {brain.shape[1:]}, those of {seen.path} are "
                              f"{seen.row_shape}; score again, or give --retrieval_feat another feature")
    found, galleries = {}, {"": min(metrics.GALLERY, len(ids))}
    if len(ids) > metrics.GALLERY:
        galleries["_of_all"] = len(ids)
    for suffix, gallery in galleries.items():
        hits, drawn = metrics.retrieval_counts(brain, seen[ids], gallery, seed=seed)
        for name, counted in names.items():
            shares = np.divide(hits[counted], drawn, out=np.full(len(ids), np.nan), where=drawn > 0)
            found[name + suffix] = {**summarise(partial(ratio, hits[counted], drawn), len(ids), seed, shares),
                                    "of": scored(ids), "gallery": gallery}
    return found, {}


def variance_explained(run, paths, feats, seed):
    """Share of each feature's variance that the scores behind the pictures explain, over all test images of these.

    Returns {"r2_<feat>": entry} on the test images, about the mean of the images that components were fitted on, else
    of the test images; and {feat: {"ridge", "network", "scored"}}, on validation images, as scoring left them.
    """
    tested, validated = {}, {}
    for feat in feats if run is not None else ():
        folder = paths.scores(run["subj"], scores_name(run, feat), feat)
        if not (folder / "nsdgeneral.npy").exists() or scored_since(run, paths, feat):
            continue
        validated[feat] = load_json(folder / "config.json").get("r2", {})
        ids, predicted = load_scores(folder)
        true, _ = true_feature(run, paths, feat, ids)
        if true is None:
            continue
        known = paths.components(feat).exists()
        mean = open_components(paths, feat).mean if known else np.mean(true[ids], axis=0, dtype=np.float64).ravel()
        missed, total = (np.zeros(len(ids)) for _ in range(2))
        for start in range(0, len(ids), AT_ONCE):
            rows = slice(start, start + AT_ONCE)
            truths = true[ids[rows]].reshape(-1, mean.size).astype(np.float32)
            missed[rows] = np.square(predicted[rows].reshape(truths.shape) - truths).sum(axis=1, dtype=np.float64)
            total[rows] = np.square(truths - mean).sum(axis=1, dtype=np.float64)
        tested[f"r2_{feat}"] = {**summarise(partial(explained, missed, total), len(ids), seed), "of": scored(ids)}
    return tested, validated


def explained(missed, total, index):
    """R2 of drawn images, index (..., n), from each image's squared error and squared distance from the mean."""
    return 1 - missed[index].sum(-1) / total[index].sum(-1)


def effective_ranks(run, paths, feat):
    """How many dimensions the predicted features behind the images use, beside the true ones': {metric: entry}.

    {} where there are no such scores.
    """
    if run is None:
        return {}
    folder = paths.scores(run["subj"], scores_name(run, feat), feat)
    if not (folder / "nsdgeneral.npy").exists() or scored_since(run, paths, feat):
        return {}
    ids, predicted = load_scores(folder)
    true, _ = true_feature(run, paths, feat, ids)
    if true is None:
        return {}
    true = true[ids]
    ranks = {suffix: metrics.effective_rank(rows) for suffix, rows in (("", predicted), ("_true", true))}
    return {f"effective_rank_{feat}{suffix}": {"value": rank, "ci_low": None, "ci_high": None, "n": len(ids),
                                               "of": scored(ids)} for suffix, rank in ranks.items()}


def true_feature(run, paths, feat, ids):
    """Open what the scored images (N,) truly have of a feature, by their ids; (None, why) where it is not there."""
    file = feature_file(paths, feat, run["subj"], ids)
    if file.exists():
        return feature_of(paths, feat, run["subj"], ids), None
    return None, "the stimuli have no captions" if is_synthetic(ids) and feat == "c" else f"{file} not found"


def scored(ids):
    """Whose values those of decoded features are: drawn or not."""
    return f"all {len(ids)} scored images"


def ratio(hits, drawn, index):
    """Hits over draws of drawn images, as a statistic for `bootstrap_ci`."""
    return hits[index].sum(axis=-1) / drawn[index].sum(axis=-1)
