"""Maps of the brain and what regions contribute: values of every voxel, tables of regions, files. docs/maps.md.

A map is {name: (V,)}; a line of the table says of one region and one map its value and an interval: the mean, and 95 %
by a bootstrap over images, or, where images are not what it varies with, median and quartiles of the region's voxels.
Letters: N images, V voxels, B bootstrap draws.
"""

import gzip
from typing import NamedTuple

import numpy as np

import utils
from disk.files import load_csv, load_json, save_together, write_csv, write_json
from encoding.guide import GOOD_R, PREFLIGHT_IMAGES, check_voxel_order
from encoding.maps import (
    ceiling_draws,
    correlation,
    pulls,
    reads,
    share_of_ceiling,
    to_volume,
    unexplained,
)
from evaluation.measuring import summarise
from evaluation.metrics import mean_of
from nsd.lesions import Lesion, kept_voxels
from nsd.repeats import AveragedRows, average_repeats, load_test_set, noise_ceiling
from nsd.rows import open_betas, open_stimuli
from nsd.trials import load_trials, split_trials

DRAWS = 500  # of a bootstrap, of all voxels at once
WHOLE = "nsd_general"
EARLY = ("V1", "V2", "V3")
# {what a map's name begins with: what it is, in the 79 letters that NIfTI has for it}; docs/maps.md
MEANING = {
    "encoding_r": "r of GNet's prediction with the response, over test images",
    "noise_ceiling": "highest r that any prediction can reach with these responses",
    "share_of_ceiling": "encoding r over noise ceiling",
    "pull": "how hard the voxel pulls a picture when the brain guides",
    "reads_": "the feature's standard deviations that the prediction moves with the voxel",
    "costs_": "R2 that is lost without the voxel's region, on validation images",
}
OVER_IMAGES, OVER_VOXELS = "95 %, images", "quartiles of voxels"


class Line(NamedTuple):
    """One region's value of one map."""

    region: str
    voxels: int
    map: str
    value: float
    low: float
    high: float
    interval: str


def regions_of(masks):
    """{region: (V,) bool} of the parts of a subject's visual cortex, the whole last."""
    parts = {name: mask for name, mask in masks.items() if mask.any() and not mask.all()}
    return {**parts, WHOLE: np.ones(len(next(iter(masks.values()))), bool)}


# --- encoding -----------------------------------------------------------------------------------------------------


def encoding_maps(paths, encoder, masks, seed=0):
    """How well GNet predicts each voxel of its subject's test images, and what its pull is: {map: (V,)}, [Line].

    Raises UserError where the network counts voxels in another order than the betas.
    """
    betas, stimuli, subj = open_betas(paths, encoder.subj), open_stimuli(paths), encoder.subj
    train, held_out = split_trials(paths, subj, *encoder.held_out)
    seen = average_repeats(betas, of_some_images(train))
    check_voxel_order(encoder, encoder.predict(stimuli.batches(seen.image_ids, 50)), seen.betas)

    test = load_test_set(paths, subj)
    predicted = encoder.predict(stimuli.batches(test.image_ids, 50), show=f"predict {encoder.run}")
    repeated = AveragedRows(betas, load_trials(paths, subj, "train"))
    maps = {"encoding_r": correlation(predicted, test.betas)}
    rng, regions = np.random.default_rng(seed), regions_of(masks)
    drawn = correlation(predicted, test.betas, draw(rng, len(test.image_ids)))
    rows = {"encoding_r": (by_region(maps["encoding_r"], regions), by_region(drawn, regions))}
    ceiling = noise_ceiling(repeated, test.n_repeats)
    if ceiling is not None:
        maps |= {"noise_ceiling": ceiling, "share_of_ceiling": share_of_ceiling(maps["encoding_r"], ceiling)}
        drawn = ceiling_draws(repeated, test.n_repeats, draw(rng, len(repeated.image_ids)))
        rows["noise_ceiling"] = by_region(ceiling, regions), by_region(drawn, regions)
        rows["share_of_ceiling"] = tuple(
            {name: r[name] / np.maximum(top[name], 1e-6) for name in regions}
            for r, top in zip(rows["encoding_r"], rows["noise_ceiling"], strict=True))
    lines = [Line(name, int(regions[name].sum()), of, float(value[name]),
                  *map(float, np.quantile(drawn[name], (0.025, 0.975))), OVER_IMAGES)
             for of, (value, drawn) in rows.items() for name in regions]

    val = average_repeats(betas, of_some_images(held_out))
    errors = np.square(encoder.predict(stimuli.batches(val.image_ids, 50)) - val.betas).mean(0)
    pull = pulls(encoder, stimuli[val.image_ids], np.roll(val.betas, 1, axis=0), errors, seed)
    maps["pull"] = np.where(encoder.val_r > GOOD_R, pull, 0)  # the others may not guide
    return maps, lines + voxel_lines({"pull": maps["pull"]}, regions)


def of_some_images(trials):
    """Those of a table of trials that show PREFLIGHT_IMAGES images at most, at even distances by id."""
    ids = np.unique(trials["image_id"])
    return trials[trials["image_id"].isin(ids[utils.evenly(len(ids), PREFLIGHT_IMAGES)])]


def draw(rng, n):
    """Draws of a bootstrap: how often each of n images counts, (DRAWS, n)."""
    return np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(DRAWS)])


def by_region(values, regions):
    """Mean over a region's voxels: values (..., V) -> {region: (...)}."""
    return {name: values[..., mask].mean(-1) for name, mask in regions.items()}


def voxel_lines(maps, regions):
    """Lines of maps whose values do not vary with the images that were drawn: median and quartiles of a region."""
    return [Line(name, int(mask.sum()), of, *map(float, np.quantile(values[mask], (0.5, 0.25, 0.75))), OVER_VOXELS)
            for of, values in maps.items() for name, mask in regions.items()]


# --- decoders -----------------------------------------------------------------------------------------------------


def decoder_maps(source, masks, mean, spread, seed=0):
    """What a feature's decoder reads, and what each region contributes to it: {map: (V,)}, [Line].

    source: scoring.Source of whole responses; mean, spread (V,): of responses to the training images. costs_<feat> is
    R2 without a lesion minus R2 with the region's voxels at their mean, on the images that the training held out, which
    are paired; only_<feat> is R2 from that region alone.
    """
    trained, feat, val = source.trained, source.config["feat"], source.trained.validation
    regions = regions_of(masks)
    maps = {f"reads_{feat}": reads(source.model, trained.whose, val.betas, spread)}
    lines = voxel_lines(maps, regions)
    whole, lesioned = unexplained(source, val), np.full(len(mean), np.nan)
    names = [name for name in regions if name != WHOLE]
    if set(EARLY) <= regions.keys():
        names.append(",".join(EARLY))
    for name in names:
        kept = kept_voxels(masks, source.request.subj, without=name)
        without, only = (unexplained(source, val._replace(betas=Lesion(part, mean)(val.betas))) for part in
                         (kept, ~kept))
        for of, values in ((f"costs_{feat}", without - whole), (f"only_{feat}", 1 - only)):
            lines.append(image_line(name, int((~kept).sum()), of, values, seed))
        if name in regions:
            lesioned[~kept] = (without - whole).mean()
    lines.append(image_line(WHOLE, len(mean), f"only_{feat}", 1 - whole, seed))
    return maps | {f"costs_{feat}": lesioned}, lines


def image_line(region, n_voxels, of, values, seed):
    """The line of a mean over images (N,)."""
    found = summarise(mean_of(values), len(values), seed)
    return Line(region, n_voxels, of, found["value"], found["ci_low"], found["ci_high"], OVER_IMAGES)


# --- files --------------------------------------------------------------------------------------------------------


def nifti(name, values, space):
    """A NIfTI image of a map (V,): of nsdgeneral's shape and affine, float32, NaN outside."""
    import nibabel

    image = nibabel.Nifti1Image(to_volume(values, space.inside), space.affine)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = next(what for begin, what in MEANING.items() if name.startswith(begin))
    known = values[np.isfinite(values)]
    image.header["cal_min"], image.header["cal_max"] = (known.min(), known.max()) if len(known) else (0, 0)
    return image


def write_nifti(image):
    """A function that writes an image to a path, gzipped, without the time of writing (for save_together)."""
    return lambda path: path.write_bytes(gzip.compress(image.to_bytes(), mtime=0))


def write_maps(folder, maps, lines, masks, space, config):
    """Write every map as NIfTI, all of them voxel by voxel, the table of regions, and where they come from."""
    places = np.argwhere(space.inside)  # in C order
    in_mm = places @ space.affine[:3, :3].T + space.affine[:3, 3]
    region = np.full(len(places), "", dtype=object)
    for name, mask in regions_of(masks).items():
        region[mask & (region == "")] = name if name != WHOLE else ""
    voxels = [{"voxel": v, **dict(zip("ijk", map(int, places[v]), strict=True)),
               **{axis: round(float(at), 3) for axis, at in zip("xyz", in_mm[v], strict=True)}, "region": region[v],
               **{name: f"{values[v]:.6g}" for name, values in maps.items()}} for v in range(len(places))]
    images = {folder / f"{name}.nii.gz": nifti(name, values, space) for name, values in maps.items()}
    save_together({folder / "config.json": write_json(config),  # in place last: it says what these are
                   **{file: write_nifti(image) for file, image in images.items()},
                   folder / "voxels.csv": write_csv(voxels),
                   folder / "regions.csv": write_csv([line._asdict() for line in lines])})
    for begin in MEANING:  # maps of an earlier run
        for file in folder.glob(f"{begin}*.nii.gz"):
            if file not in images:
                file.unlink()


def maps_of(paths, subj):
    """What map_brain.py left of a subject, for a report: ({name: file} of its pictures, [Line] of its regions, config).

    Nothing there: ({}, [], {}).
    """
    folder = paths.maps(subj)
    if not (folder / "config.json").exists():
        return {}, [], {}
    lines = [Line(row["region"], int(row["voxels"]), row["map"], float(row["value"]), float(row["low"]),
                  float(row["high"]), row["interval"])
             for row in load_csv(folder / "regions.csv", "the table of regions", "run bash scripts/maps.sh again")]
    return {file.stem: file for file in sorted(folder.glob("*.png"))}, lines, load_json(folder / "config.json")


def format_lines(lines, maps, title):
    """A table for the terminal: a row per region, a column per map: its value and, of four maps at most, its interval.
    """
    found = {(line.region, line.map): line for line in lines}
    regions = list(dict.fromkeys(line.region for line in lines))
    maps = [name for name in maps if any((region, name) in found for region in regions)]
    if not maps:
        return ""
    width = 24 if len(maps) <= 4 else 12
    rows = [f"{title:<14}{'voxels':>7}" + "".join(f"{name.partition('_')[2] if width < 24 else name:>{width}}"
                                                  for name in maps)]
    for region in regions:
        known = [found.get((region, name)) for name in maps]
        if any(known):
            spread = " ({0.low:.3f} .. {0.high:.3f})" if width == 24 else ""
            form = "{:.3f}" if spread else "{:.3g}"
            cells = ["" if line is None else form.format(line.value) + spread.format(line) for line in known]
            rows.append(f"{region:<14}{next(filter(None, known)).voxels:>7}"
                        + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(rows)
