"""Pictures of maps: slices and glass brains by nilearn, and the inflated surface where NSD's transforms are there.

nilearn is optional (requirements-maps.txt). Letters: V voxels, n vertices of a hemisphere.
"""

import numpy as np

import utils
from disk.files import atomic_path
from encoding.maps import to_volume
from nsd.sources import DOWNLOAD

SLICES = 8
FSAVERAGE5 = 10242  # vertices of a hemisphere: the first ones of fsaverage's, which divides it further
HEMISPHERES = {"lh": "left", "rh": "right"}
DEPTH = "layerB2"  # NSD's surface half way through the cortex
SHOWN = 1e-6  # what nilearn takes for nothing: a map's values at or below 0 get the lowest colour instead
NOWHERE = 9999  # of NSD's transforms: a vertex outside of the volume
KINDS = ("slices", "glass", "surface")
# maps that share a picture, a row each: {name: (what their names begin with, largest value; None: each map's own)}
PICTURES = {
    "encoding": (("encoding_r", "noise_ceiling", "share_of_ceiling"), 1),
    "pull": (("pull",), None),
    "reads": (("reads_",), None),
    "costs": (("costs_",), None),
}


def draw(folder, maps, space, paths, subj):
    """Draw maps {name: (V,)} into a folder, in place of the pictures that are there; returns lines of what was left
    out, and why."""
    for kind in KINDS:
        for name in PICTURES:
            (folder / f"{kind}_{name}.png").unlink(missing_ok=True)
    try:
        from nilearn import plotting  # noqa: F401 - takes seconds, and may not be there
    except ModuleNotFoundError as error:
        if error.name != "nilearn":
            raise
        return ["left out: pictures (nilearn is not installed: bash scripts/setup.sh requirements-maps.txt); volumes "
                "and tables are there"]
    surfaces, why = read_transforms(paths, subj, space.inside.shape)
    for name, (begins, largest) in PICTURES.items():
        chosen = {key: values for key, values in maps.items() if key.startswith(begins)}
        if not chosen:
            continue
        limits = {key: {"cmap": "inferno", "vmin": 0, "vmax": largest or max(np.nanquantile(values, 0.99), 2 * SHOWN)}
                  for key, values in chosen.items()}
        title = f"{subj}: {name}"
        save(draw_slices(chosen, space, title, limits), folder / f"slices_{name}.png")
        save(draw_glass(chosen, space, title, limits), folder / f"glass_{name}.png")
        if surfaces:
            on_surface = {key: {side: on_fsaverage5(to_volume(values, space.inside), *found)
                                for side, found in surfaces.items()} for key, values in chosen.items()}
            save(draw_surface(on_surface, title, limits), folder / f"surface_{name}.png")
    return [] if surfaces else [f"left out: surface ({why})"]


def save(figure, file):
    """Write a matplotlib figure as PNG, whole or not at all."""
    with atomic_path(file) as temporary:
        figure.savefig(temporary, format="png", dpi=110, facecolor="white")


def figure_of(n_rows, width, height, title):
    """A figure with a row for each map."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 0.5 + n_rows * height))
    figure.suptitle(title, fontsize=13, x=0.01, ha="left")
    top = 1 - 0.45 / figure.get_figheight()
    return figure, [(0.11, top * (n_rows - 1 - row) / n_rows, 0.88, top / n_rows) for row in range(n_rows)]


def shown(values, space):
    """A map (V,) as an image for nilearn, which shows what is above SHOWN: known values at least as much, else 0."""
    import nibabel

    volume = to_volume(values, space.inside)
    return nibabel.Nifti1Image(np.where(np.isfinite(volume), np.maximum(volume, 2 * SHOWN), 0), space.affine)


def draw_slices(maps, space, title, limits):
    """A row of horizontal slices for each map, within the outline of the volume's cortex; z in mm of its own space.

    limits: {name: {"cmap", "vmin", "vmax"}}, the colours of each map.
    """
    import nibabel
    from nilearn import plotting

    places = np.argwhere(space.inside)
    heights = nibabel.affines.apply_affine(space.affine, places)[:, 2]
    cuts = np.unique(np.quantile(heights, np.linspace(0.04, 0.96, SLICES), method="nearest"))
    around = [slice(max(first - margin, 0), last + margin) for first, last, margin in
              zip(places.min(0), places.max(0), (3, 6, 3), strict=True)]
    cortex = nibabel.Nifti1Image(space.cortex.astype(np.float32), space.affine).slicer[tuple(around)]
    figure, boxes = figure_of(len(maps), 13, 1.6, title)
    for (name, values), box in zip(maps.items(), boxes, strict=True):
        image = shown(values, space).slicer[tuple(around)]
        slices = plotting.plot_stat_map(image, bg_img=None, display_mode="z", cut_coords=cuts, threshold=SHOWN,
                                        symmetric_cbar=False, annotate=False, draw_cross=False, black_bg=False,
                                        figure=figure, axes=box, **limits[name])
        slices.annotate(size=8)
        slices.add_contours(cortex, levels=[0.5], colors="darkgrey", linewidths=0.6)
        figure.text(0.01, box[1] + box[3] / 2, name.replace("_", " "), fontsize=10, va="center")
    return figure


def draw_glass(maps, space, title, limits):
    """A row of glass brains for each map, its colours as of draw_slices: the largest value along each line of sight.

    nilearn's outline is that of MNI's brain, and the volume lies in the subject's own space: it shows where front and
    left are, and no more.
    """
    from nilearn import plotting

    figure, boxes = figure_of(len(maps), 11, 2.4, f"{title} (outline: MNI's brain, not this one's)")
    for (name, values), box in zip(maps.items(), boxes, strict=True):
        plotting.plot_glass_brain(shown(values, space), display_mode="lyrz", threshold=SHOWN, plot_abs=False,
                                  symmetric_cbar=False, colorbar=True, figure=figure, axes=box, **limits[name])
        figure.text(0.01, box[1] + box[3] / 2, name.replace("_", " "), fontsize=10, va="center")
    return figure


# --- surface ------------------------------------------------------------------------------------------------------


def read_transforms(paths, subj, shape):
    """Read how a subject's volume comes to fsaverage: ({"lh": (places (n, 3), nearest (m,)), "rh": ...}, None), or
    (None, why not).

    places: of each vertex of the subject's own surface, half way through the cortex, its indices in the volume, from 0;
    NaN outside. nearest: of each vertex of fsaverage the subject's vertex, from 0. NSD's files count from 1 (nsdcode
    reads the same ones). Raises UserError for files that are not such.
    """
    import nibabel

    found = {}
    for side in HEMISPHERES:
        read = []
        for name in (f"{side}.func1pt8-to-{DEPTH}.mgz", f"{side}.white-to-fsaverage.mgz"):
            file = paths.transforms(subj) / name
            if not file.exists():
                return None, f"{file} not found: NSD's transforms, nsddata/ppdata/{subj}/transforms"
            try:
                array = np.asarray(nibabel.load(file).dataobj, np.float64)
            except Exception as error:  # nibabel and gzip raise many types for damaged files
                raise utils.UserError(f"{file}: not a readable transform ({error}); {DOWNLOAD}") from None
            read.append(array.reshape(len(array), -1))
        places, nearest = read
        if places.shape[1] != 3 or nearest.shape[1] != 1 or len(nearest) < FSAVERAGE5 or \
                not (1 <= nearest.min() and nearest.max() <= len(places)):
            raise utils.UserError(f"{paths.transforms(subj)}: {side} has places of {places.shape} and {nearest.shape} "
                                  f"vertices of fsaverage, wanted (n, 3) and (163842, 1) that count to n; {DOWNLOAD}")
        places = np.where((places == NOWHERE).any(1, keepdims=True), np.nan, places - 1)
        if np.nanmax(places, axis=0, initial=0).max() > 2 * max(shape):
            raise utils.UserError(f"{paths.transforms(subj)}: {side} leads out of a volume of {shape}; use both of one "
                                  "subject")
        found[side] = places, nearest[:, 0].astype(np.int64) - 1
    return found, None


def on_fsaverage5(volume, places, nearest):
    """The value of the nearest voxel at each vertex of fsaverage5: (X, Y, Z) -> (10242,), NaN where there is none."""
    index = np.nan_to_num(places, nan=-1).round().astype(np.int64)
    inside = ((index >= 0) & (index < volume.shape)).all(1) & np.isfinite(places).all(1)
    values = np.full(len(places), np.nan, np.float32)
    values[inside] = volume[tuple(index[inside].T)]
    return values[nearest[:FSAVERAGE5]]


def draw_surface(maps, title, limits):
    """A row of inflated hemispheres for each map {name: {"lh": (n,), "rh": (n,)}}: from behind, inside and below."""
    from nilearn import datasets, plotting

    mesh = datasets.fetch_surf_fsaverage("fsaverage5")  # comes with the package
    views = [(side, view) for side in HEMISPHERES for view in ("posterior", "medial", "ventral")]
    figure, boxes = figure_of(len(maps), 13, 2.1, f"{title}, on fsaverage5")
    for (name, values), (left, bottom, width, height) in zip(maps.items(), boxes, strict=True):
        for column, (side, view) in enumerate(views):
            axes = figure.add_axes((left + column * width / len(views), bottom, width / len(views), height),
                                   projection="3d")
            plotting.plot_surf_stat_map(
                mesh[f"infl_{HEMISPHERES[side]}"], values[side], hemi=HEMISPHERES[side], view=view, **limits[name],
                bg_map=mesh[f"sulc_{HEMISPHERES[side]}"], bg_on_data=False, threshold=None,
                colorbar=(side, view) == views[-1], cbar_tick_format="%.2g", axes=axes, figure=figure)
        figure.text(0.01, bottom + height / 2, name.replace("_", " "), fontsize=10, va="center")
    return figure
