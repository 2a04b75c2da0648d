"""Write mini-NSD: drawn scenes, and eight simulated brains looking at them, in the Natural Scenes Dataset's formats.

A tenth of NSD: 7,300 images of 64 x 64, 8 subjects, 1,000 images a subject of which 100 are shared by all, 3 repeats,
sessions of 75 trials; and each subject's session of NSD-synthetic, gratings and colours. The voxels respond through
encoding models that resemble their region (V1 oriented energy, V4 colour and curvature, higher visual object kind and
scene category) and are as noisy as NSD's: --check measures the noise ceilings from the repeats of the written betas.

    python demo/make_mini_nsd.py                      # the demo's world, into demo/
    python demo/make_mini_nsd.py --root DIR --size small      # 240 images, seconds: for the tests
    python demo/make_mini_nsd.py --check              # and its noise ceilings, and what a ridge reads out of subject 1
"""

import argparse
import copy
import gzip
import io
import json
import sys
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))  # for its bars; the formats are written by hand

import h5py
import nibabel
import numpy as np
import pandas as pd
from scipy import fft, ndimage, stats
from scipy.io import savemat

import synthetic
import utils
from scenes import ATTRIBUTES, COLOURS, KINDS, PATTERNS, SETTINGS, captions, render, sample_scene

WORLD_VERSION = 3  # raise it when the same seed gives other files
SYNTHETIC_STIMULI = "nsddata_stimuli/stimuli/nsdsynthetic"
SYNTHETIC_DESIGN = "nsddata/experiments/nsdsynthetic/nsdsynthetic_expdesign.mat"
MARKER = "mini_nsd.json"  # in the root, written last: the world is whole
IMAGE_SIZE = 64  # pixels, the tiny models' resolution
N_SUBJECTS, N_REPEATS, N_CAPTIONS = 8, 3, 5
NSD_VOXELS = (15724, 14278, 15226, 13153, 13039, 17907, 12682, 14386)
ROI_SHARES = {"V1": 0.086, "V2": 0.091, "V3": 0.076, "V4": 0.044, "higher_vis": 0.703}  # of nsdgeneral, rounded
EXPLAINABLE = {"V1": 0.18, "V2": 0.16, "V3": 0.13, "V4": 0.12, "higher_vis": 0.12}  # single trial, mean over voxels


VOLUME, VOXEL = (36, 46, 34), 4.0  # of the ROI volumes, in voxels and mm: a tenth of NSD's voxels in the same head
HEMISPHERE = (9, 21, 15)  # half axes, in voxels


@dataclass(frozen=True)
class World:
    """The sizes of a world. `sessions` are those that each subject completed, of max(sessions) designed ones."""

    n_shared: int  # images that all subjects see
    n_own: int  # images that one subject alone sees
    sessions: tuple[int, ...]
    voxel_divisor: int  # NSD has this many times more voxels
    n_gratings: int  # stimuli of the synthetic session that all subjects see
    n_patches: int  # and that one subject alone sees

    @property
    def n_images(self):
        return self.n_shared + N_SUBJECTS * self.n_own

    @property
    def session_trials(self):
        return N_REPEATS * (self.n_shared + self.n_own) // max(self.sessions)

    @property
    def n_voxels(self):
        return [n // self.voxel_divisor for n in NSD_VOXELS]


WORLDS = {
    "full": World(n_shared=100, n_own=900, sessions=(40, 40, 32, 30, 40, 32, 40, 30), voxel_divisor=10,
                  n_gratings=54, n_patches=24),
    "small": World(n_shared=40, n_own=25, sessions=(5, 5, 4, 4, 5, 4, 5, 4), voxel_divisor=200,
                   n_gratings=6, n_patches=4),
}


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent, metavar="DIR",
                        help="folder that gets nsddata/, nsddata_stimuli/ and MindEyeV2/ (default: demo/)")
    parser.add_argument("--size", choices=list(WORLDS), default="full", help="(default: full)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="write again what is already there")
    parser.add_argument("--check", action="store_true",
                        help="also print the voxels' noise ceilings, and how well a ridge regression decodes the "
                             "attributes of subject 1's test images")
    return parser


def main(argv=None):
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.seed < 0:
        parser.error(f"--seed {args.seed}: wanted 0 or more")
    marker, identity = args.root / MARKER, {"version": WORLD_VERSION, "size": args.size, "seed": args.seed}
    found = json.loads(marker.read_text()) if marker.exists() else None
    whole = (args.root / SYNTHETIC_DESIGN).exists()  # a world from before there was this session: the rest stays as is
    if found == identity and whole and not args.overwrite:
        print(f"{args.root}: mini-NSD is already here; --overwrite writes it again")
    elif found not in (None, identity) and not args.overwrite:
        parser.error(f"--root {args.root}: holds mini-NSD {found}, wanted {identity}; add --overwrite or change --root")
    else:
        start = time.perf_counter()
        marker.unlink(missing_ok=True)
        with (ThreadPoolExecutor if args.size == "small" else ProcessPoolExecutor)() as pool:
            write_world(args.root, WORLDS[args.size], args.seed, pool)
        (args.root / "about.json").write_text(json.dumps({"data": "drawn scenes, simulated responses"}) + "\n")
        marker.write_text(json.dumps(identity) + "\n")
        print(f"{args.root}: mini-NSD written in {time.perf_counter() - start:.0f} s")
    if args.check:
        print_check(args.root)


def write_world(root, world, seed, pool):
    """Draw the images, simulate the eight subjects and write every file; pool: an Executor for what can be shared."""
    scenes, texts, images = draw_images(world.n_images, np.random.default_rng([seed, 0]), pool)
    design = make_design(world, np.random.default_rng([seed, 1]))
    write_stimuli(root, images, texts, scenes, design, np.random.default_rng([seed, 2]))
    write_design(root, world, design)

    early, colour = low_level(images, pool.map)
    strength = colour.std(axis=(0, 1))
    features = image_features(early, colour, strength, scenes)
    gratings = write_gratings(root, world, np.random.default_rng([seed, 4]))
    masks, shards = {}, []
    for s in utils.progress(range(N_SUBJECTS), desc="subjects"):
        rng = np.random.default_rng([seed, 3, s])
        image_ids = design.trial_images(s)
        cortex = draw_cortex(world.n_voxels[s], rng)
        write_volumes(root, s, cortex)
        masks[subject_name(s)] = rois = cortex.masks
        same, scale = copy.deepcopy(rng), Scale()  # what the session of synthetic stimuli is simulated with
        betas = simulate_betas(features, image_ids, rois, world.session_trials, rng, scale)
        write_betas(root, s, betas)
        behav = behaviour(s, image_ids, design.shared, world.session_trials, rng)
        shards.append(pool.submit(write_shards, root, s, behav, world.session_trials))
        rng = np.random.default_rng([seed, 4, 1 + s])
        write_synthetic(root, s, world, cortex, gratings, strength, same, scale, rng)
    write_masks(root, masks)
    for written in shards:
        written.result()


def subject_name(s):
    """Name of the 0-based subject `s`."""
    return f"subj{s + 1:02d}"


# --- images -------------------------------------------------------------------------------------------------------


def draw_images(n, rng, pool):
    """n scenes, their captions (n lists of N_CAPTIONS) and pictures (n, IMAGE_SIZE, IMAGE_SIZE, 3) uint8."""
    scenes = [sample_scene(rng) for _ in range(n)]
    texts = [captions(scene, rng, N_CAPTIONS) for scene in scenes]
    drawn = pool.map(partial(render, size=IMAGE_SIZE), scenes, chunksize=64)
    images = np.stack(list(utils.progress(drawn, total=n, desc="images")))
    return scenes, texts, images


# --- what the simulated regions see -------------------------------------------------------------------------------
# Letters: N images, C channels, V voxels; P = cells of a square grid over the image, row by row.

EARLY_GRID, COLOUR_GRID = 16, 8
WAVELENGTHS, N_ORIENTATIONS = (4, 8), 6  # pixels; orientations over half a turn
# horizontal positions and sizes at which the higher regions know what is there
POSITIONS, EXTENTS = np.linspace(0.1, 0.9, 5), np.array([0.26, 0.4, 0.55])
N_SEEN = len(POSITIONS) * len(EXTENTS)
# levels of the black-white, red-green and blue-yellow channels that colour-selective cells prefer, and their width
OPPONENT_LEVELS, OPPONENT_WIDTH = ((0.1, 0.5, 0.9), (-0.4, 0.1, 0.6), (-0.6, -0.1, 0.5)), 0.28


def low_level(images, map_each=map):
    """Energy and contrast (N, P, C), and colour and curvature (N, P', C'), of pictures (N, H, W, 3) uint8.

    map_each: what shares the batches out, such as an Executor's map.
    """
    batches = np.array_split(images, -(-len(images) // 256))
    pairs = list(utils.progress(map_each(_batch_features, batches), total=len(batches), desc="image features"))
    return tuple(np.concatenate(part) for part in zip(*pairs, strict=True))


def image_features(early, colour, strength, scenes):
    """Everything the voxels of all subjects are computed from.

    early, colour: of low_level; strength: of the channels of colour, which become equally strong. Returns {"early":
    (N, P, C) energy and contrast, "colour": (N, P, C) colour and curvature with the figure enhanced, "scene": (N, 8),
    and what object_features finds}.
    """
    colour /= strength
    colour *= 0.4 + figure_map(scenes)[:, :, None]
    scene = np.array([[scene.setting == name for name in SETTINGS] for scene in scenes], np.float32)
    return {"early": early, "colour": colour, "scene": scene, **object_features(scenes)}


def synthetic_features(pictures, patches, strength):
    """The same of the synthetic stimuli (N, H, W, 3) uint8, of which the last are `patches`.

    There is no setting and no object; only a patch stands out, in its hue.
    """
    early, colour = low_level(pictures)
    found = {"scene": np.zeros((len(pictures), len(SETTINGS)), np.float32)}
    first = len(pictures) - len(patches)
    figures = np.zeros(colour.shape[:2], np.float32)
    figures[first:] = figure_map(patches)
    for name, array in object_features(patches).items():
        found[name] = np.zeros((len(pictures), array.shape[1]), np.float32)
        found[name][first:] = array
    return {"early": early, "colour": colour / strength * (0.4 + figures[:, :, None]), **found}


def _batch_features(images):
    rgb = images.astype(np.float32) / 255
    luminance = 0.299 * rgb[..., 0] + 0.587 * rgb[..., 1] + 0.114 * rgb[..., 2]
    energy = oriented_energy(luminance)  # (B, 32, 32, wavelengths, orientations)
    contrast = np.sqrt(_pool(luminance**2, EARLY_GRID) - _pool(luminance, EARLY_GRID) ** 2 + 1e-6)
    early = np.concatenate([_flat(_pool(energy, EARLY_GRID)), _flat(contrast)], axis=2)
    colour = np.concatenate([_flat(_pool(colour_tuning(_pool(rgb, 32)), COLOUR_GRID)),
                             _flat(_pool(curvature(energy), COLOUR_GRID))], axis=2)
    return early, colour


def _pool(maps, grid):
    """Mean over square cells: (B, H, W, ...) -> (B, grid, grid, ...)."""
    cell = maps.shape[1] // grid
    return maps.reshape(len(maps), grid, cell, grid, cell, *maps.shape[3:]).mean(axis=(2, 4))


def _flat(maps):
    """(B, grid, grid, ...) -> (B, P, C)."""
    return maps.reshape(len(maps), maps.shape[1] * maps.shape[2], -1)


def oriented_energy(luminance):
    """Amplitude of quadrature Gabor pairs, sqrt(even^2 + odd^2): (B, 64, 64) -> (B, 32, 32, wavelengths, orientations).

    A Gabor is one Gaussian lobe in frequency, and its amplitude is the modulus of the inverse transform of that lobe.
    The modulus does not change when the lobe is moved to frequency zero, so half the resolution holds it.
    """
    side = luminance.shape[1]
    edge = np.minimum(1, np.minimum(np.arange(side) + 1, side - np.arange(side)) / 4)  # no edge where the FFT wraps
    window = np.outer(edge, edge).astype(np.float32)
    spectrum = fft.fft2((luminance - luminance.mean(axis=(1, 2), keepdims=True)) * window)
    offsets = fft.fftfreq(side // 2, 1 / (side // 2))
    amplitudes = []
    for wavelength in WAVELENGTHS:
        frequency = side / wavelength  # cycles per image
        for angle in np.arange(N_ORIENTATIONS) * np.pi / N_ORIENTATIONS:
            fy, fx = frequency * np.sin(angle), frequency * np.cos(angle)
            rows, columns = (offsets + round(fy)).astype(int), (offsets + round(fx)).astype(int)
            distance2 = (rows[:, None] - fy) ** 2 + (columns[None] - fx) ** 2
            lobe = np.exp(-distance2 / (2 * (0.4 * frequency) ** 2)).astype(np.float32)
            lobe[(rows[:, None] == 0) & (columns[None] == 0)] = 0  # no response to the mean
            patch = spectrum[:, (rows % side)[:, None], (columns % side)[None]]
            amplitudes.append(np.abs(fft.ifft2(patch * lobe)))
    return np.stack(amplitudes, axis=3).reshape(*amplitudes[0].shape, len(WAVELENGTHS), N_ORIENTATIONS)


def curvature(energy):
    """How much orientation changes within a neighbourhood, per wavelength: sum_o E_o - |sum_o E_o exp(2i angle_o)|."""
    local = ndimage.uniform_filter(energy, size=(0, 5, 5, 0, 0), mode="nearest")
    phases = np.exp(2j * np.pi * np.arange(N_ORIENTATIONS) / N_ORIENTATIONS).astype(np.complex64)
    return local.sum(axis=4) - np.abs((local * phases).sum(axis=4))


def colour_tuning(rgb):
    """Cells that prefer one place in opponent colour space: (B, H, W, 3) in [0, 1] -> (B, H, W, 27)."""
    red, green, blue = np.moveaxis(rgb, 3, 0)
    opponents = (red + green + blue) / 3, red - green, blue - (red + green) / 2
    black_white, red_green, blue_yellow = (
        np.exp(-((axis[..., None] - np.float32(levels)) ** 2) / (2 * OPPONENT_WIDTH**2))
        for axis, levels in zip(opponents, OPPONENT_LEVELS, strict=True))
    tuned = black_white[..., :, None, None] * red_green[..., None, :, None] * blue_yellow[..., None, None, :]
    return tuned.reshape(*rgb.shape[:3], -1)


def figure_map(scenes):
    """Figure-ground enhancement: a Gaussian over the main object, (N, P) on the colour grid."""
    centres = (np.arange(COLOUR_GRID) + 0.5) / COLOUR_GRID
    x, y, size = (np.array([getattr(scene.main, name) for scene in scenes])[:, None] for name in ("x", "y", "size"))
    row, column = (np.exp(-((centres - middle) ** 2) / (2 * (0.4 * size) ** 2)) for middle in (y, x))  # (N, grid)
    return (row[:, :, None] * column[:, None, :]).reshape(len(scenes), -1).astype(np.float32)


def object_features(scenes):
    """What is where: {"kind": (N, 12 * 15), "hue": (N, 8 * 15), "surface": (N, 3 * 15)}: values x positions x extents.

    An object counts at all of them, the less the farther away it is and the more its size differs.
    """
    values = {"kind": KINDS, "hue": tuple(COLOURS), "surface": PATTERNS}
    found = {name: np.zeros((len(scenes), len(names), N_SEEN), np.float32) for name, names in values.items()}
    for i, scene in enumerate(scenes):
        for thing in filter(None, (scene.main, scene.second)):
            there = np.exp(-((thing.x - POSITIONS) ** 2) / (2 * 0.15**2))
            alike = np.exp(-((thing.size - EXTENTS) ** 2) / (2 * 0.08**2))
            for name, value in (("kind", thing.kind), ("hue", thing.colour), ("surface", thing.pattern)):
                if value not in values[name]:
                    continue  # a patch of colour is no object
                found[name][i, values[name].index(value)] += np.outer(there, alike).ravel()
    return {name: array.reshape(len(scenes), -1) for name, array in found.items()}


# --- voxels -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cortex:
    """Where a subject's voxels lie, as NSD's volumes say it (X to the right, Y to the front, Z up)."""

    nsdgeneral: np.ndarray  # (X, Y, Z) int16: 1 in the voxels of the betas, 0 elsewhere in cortex, -1 outside
    visualrois: np.ndarray  # (X, Y, Z) int16: 1 to 7 = V1v, V1d, V2v, V2d, V3v, V3d, hV4; 0 and -1 as above

    @property
    def masks(self):
        """{roi: bool (voxels,)}: disjoint regions, and nsd_general, which is all. Voxels are in C order."""
        labels = self.visualrois[self.nsdgeneral == 1]
        early = {"V1": labels <= 2, "V2": (labels == 3) | (labels == 4), "V3": (labels == 5) | (labels == 6),
                 "V4": labels == 7}
        masks = {name: mask & (labels > 0) for name, mask in early.items()}
        return {"nsd_general": np.ones(len(labels), bool), **masks, "higher_vis": labels == 0}


def draw_cortex(n_voxels, rng):
    """Two shells, one per hemisphere; the voxels nearest to the occipital pole are the betas', V1 first. -> Cortex"""
    xyz = np.stack(np.meshgrid(*map(np.arange, VOLUME), indexing="ij"), axis=-1) - (np.array(VOLUME) - 1) / 2
    depth = np.minimum(*(np.linalg.norm((xyz - centre) / HEMISPHERE, axis=-1) for centre in ((-8, 0, 0), (8, 0, 0))))
    cortex = (depth > 0.72) & (depth < 1)
    pole = np.array([0, -VOLUME[1] / 2 + 3, -1]) + rng.normal(0, 0.5, 3)
    distance = np.where(cortex, np.linalg.norm((xyz - pole) * (1, 1, 0.9), axis=-1), np.inf).ravel()
    nearest = np.argsort(distance, kind="stable")[:n_voxels]
    shares = np.array(list(ROI_SHARES.values())) * rng.uniform(0.9, 1.1, len(ROI_SHARES))
    ends = np.round(np.cumsum(shares / shares.sum()) * n_voxels).astype(int)[:-1]
    nsdgeneral, labels = (np.where(cortex, 0, -1).astype(np.int16).ravel() for _ in range(2))
    nsdgeneral[nearest] = 1
    dorsal = (xyz[..., 2] > pole[2]).ravel()
    for k, region in enumerate(np.split(nearest, ends)[:-1]):
        labels[region] = 7 if k == 3 else 2 * k + 1 + dorsal[region]
    return Cortex(nsdgeneral.reshape(VOLUME), labels.reshape(VOLUME))


def receptive_fields(n, grid, smallest, largest, rng):
    """(P, n) Gaussian weights over the grid that sum to 1; sizes (standard deviations) are fractions of the side."""
    x, y = rng.uniform(0.02, 0.98, (2, n))
    sigma = rng.uniform(smallest, largest, n)
    centres = (np.arange(grid) + 0.5)[:, None] / grid
    row, column = (np.exp(-((centres - middle) ** 2) / (2 * sigma**2)) for middle in (y, x))  # (grid, n)
    weights = (row[:, None] * column[None]).reshape(grid**2, n)
    return weights / weights.sum(0)


def pooled_response(maps, fields, tuning):
    """sum_pc maps[i, p, c] fields[p, v] tuning[c, v]: (N, P, C), (P, V), (C, V) -> (N, V)."""
    pooled = np.matmul(maps.transpose(0, 2, 1).astype(np.float64), fields)  # (N, C, V)
    return (pooled * tuning).sum(1)


def early_response(features, n, smallest, largest, exponent, rng):
    """Energy and contrast in a receptive field, compressed (Kay et al. 2013): (N, n)."""
    n_channels = features["early"].shape[2]
    tuning = rng.gamma(0.5, size=(n_channels, n))  # not negative, a few channels dominate
    fields = receptive_fields(n, EARLY_GRID, smallest, largest, rng)
    return pooled_response(features["early"], fields, tuning) ** exponent


def v4_response(features, n, rng):
    """Colour and curvature in a receptive field; each voxel prefers some colours and is silenced by others: (N, n)."""
    n_channels = features["colour"].shape[2]
    tuning = rng.standard_normal((n_channels, n)) * rng.gamma(0.5, size=(n_channels, n))
    return pooled_response(features["colour"], receptive_fields(n, COLOUR_GRID, 0.1, 0.25, rng), tuning)


def higher_response(features, n, rng, scale):
    """A random mixture of tuning to scene category, object kind and, weakly, an object's colour and surface: (N, n).

    A voxel prefers objects at one horizontal position and of one size.
    """
    x, reach = rng.uniform(0, 1, n), rng.uniform(0.1, 0.4, n)
    size, tolerance = rng.uniform(0.2, 0.6, n), rng.uniform(0.08, 0.3, n)
    gain = (np.exp(-((POSITIONS[:, None, None] - x) ** 2) / (2 * reach**2))
            * np.exp(-((EXTENTS[:, None] - size) ** 2) / (2 * tolerance**2))).reshape(N_SEEN, n)
    parts = [features["scene"] @ rng.gamma(0.5, size=(len(SETTINGS), n))]
    for name, values in (("kind", KINDS), ("hue", COLOURS), ("surface", PATTERNS)):
        tuning = rng.gamma(0.5, size=(len(values), 1, n))  # a few favourites
        parts.append(features[name] @ (tuning * gain).reshape(-1, n))
    mixture = rng.dirichlet((0.8, 1.3, 0.7, 0.4), n).T  # of variance
    return sum(np.sqrt(share) * scale(part) for share, part in zip(mixture, parts, strict=True))


def standardise(array, axis=0):
    """Zero mean, unit variance; what does not vary becomes 0."""
    mean, deviation = moments(array, axis)
    return (array - mean) / deviation


def moments(array, axis=0):
    """The mean along an axis, and the standard deviation, 1 where there is none."""
    deviation = array.std(axis, keepdims=True)
    return array.mean(axis, keepdims=True), np.where(deviation > 1e-9, deviation, 1)


class Scale:
    """Standardises one array after the other; from `replay` on as it did the first, the second, ..."""

    def __init__(self):
        self.known, self.replayed = [], None

    def __call__(self, array):
        if self.replayed is None:
            self.known.append(moments(array))
        mean, deviation = self.known[-1] if self.replayed is None else next(self.replayed)
        return (array - mean) / deviation

    def replay(self):
        self.replayed = iter(self.known)
        return self


def noiseless_responses(features, rois, rng, scale):
    """Every voxel's response to N images, standardised by a Scale: (N, V). `features` as from image_features."""
    models = {
        "V1": lambda n: early_response(features, n, 0.03, 0.07, 1.0, rng),
        "V2": lambda n: early_response(features, n, 0.06, 0.12, 0.7, rng),
        "V3": lambda n: early_response(features, n, 0.09, 0.18, 0.5, rng),
        "V4": lambda n: v4_response(features, n, rng),
        "higher_vis": lambda n: higher_response(features, n, rng, scale),
    }
    responses = np.empty((len(features["scene"]), len(rois["nsd_general"])))
    for roi, model in models.items():
        responses[:, rois[roi]] = scale(model(int(rois[roi].sum())))
    # the last bits depend on the BLAS; without them the betas do not
    return np.round(responses, 6)


def explainable_variance(rois, rng):
    """Each voxel's share of single-trial variance that the image determines: (V,).

    Per region Beta(1, 1/mean - 1), from none to above 40 %, at evenly spaced quantiles: the mean is exact.
    """
    explained = np.empty(len(rois["nsd_general"]))
    for roi, mean in EXPLAINABLE.items():
        n = int(rois[roi].sum())
        explained[rois[roi]] = stats.beta.ppf((rng.permutation(n) + 0.5) / n, 1, 1 / mean - 1)
    return explained


def simulate_betas(features, image_ids, rois, session_trials, rng, scale):
    """Single-trial betas of one subject: (trials, V) float32, z-scored per session as NSD's `renorm` betas.

    image_ids: 0-based, one per trial; features: of all images; scale: a Scale.
    """
    seen, trial_image = np.unique(image_ids, return_inverse=True)
    signal = noiseless_responses({name: array[seen] for name, array in features.items()}, rois, rng, scale)
    explained = explainable_variance(rois, rng)
    return add_noise(signal[trial_image], explained, session_trials, rng)


def add_noise(signal, explained, session_trials, rng, n_shared=16):
    """Scale the signal (trials, V) to its explainable share of variance; add drift and noise; z-score per session.

    The noise is partly common to voxels, as in fMRI. The drift is a slope within and a gain between the sessions.
    """
    n_trials, n_voxels = signal.shape
    private = rng.standard_normal((n_trials, n_voxels), dtype=np.float32)
    loadings = rng.standard_normal((n_shared, n_voxels)) / np.sqrt(n_shared)
    shared = np.einsum("tk,kv->tv", rng.standard_normal((n_trials, n_shared)), loadings)
    sessions = n_trials // session_trials
    slope = rng.standard_normal((sessions, 1, n_voxels)) * np.linspace(-1, 1, session_trials)[:, None] * np.sqrt(3)
    noise = np.sqrt(0.8) * private + np.sqrt(0.17) * shared + np.sqrt(0.03) * slope.reshape(n_trials, n_voxels)
    gain = np.repeat(rng.normal(1, 0.1, (sessions, n_voxels)), session_trials, axis=0)
    betas = np.sqrt(explained) * gain * signal + np.sqrt(1 - explained) * noise
    betas = standardise(betas.reshape(sessions, session_trials, n_voxels), axis=1)
    return betas.reshape(n_trials, n_voxels).astype(np.float32)


# --- the session of synthetic stimuli -----------------------------------------------------------------------------


def write_gratings(root, world, rng):
    """The stimuli of the synthetic session that all subjects see, and its design, which is the same for all.

    Returns their pictures (n_gratings, H, W, 3), and which stimulus each trial shows (trials,), 0-based.
    """
    told = synthetic.screens(synthetic.gratings(world.n_gratings, IMAGE_SIZE))
    write_hdf5(_file(root, SYNTHETIC_STIMULI, "nsdsynthetic_stimuli.hdf5"), {"imgBrick": told})
    numbers = np.arange(world.n_gratings + world.n_patches)
    repeats = np.where(numbers < world.n_gratings, synthetic.GRATING_REPEATS, synthetic.PATCH_REPEATS)
    order = rng.permutation(np.repeat(numbers, repeats))
    write_mat(_file(root, SYNTHETIC_DESIGN), {"masterordering": (order + 1)[None].astype(np.uint16)})
    return synthetic.shown(told), order


def write_synthetic(root, s, world, cortex, common, strength, same, scale, rng):
    """A subject's own stimuli, and its responses to all of them, as volumes of 300 times the percent signal change.

    common: of write_gratings; same, scale: the random numbers and the Scale that its betas were simulated with, so that
    these are the same voxels.
    """
    (gratings, order), rois = common, cortex.masks
    patches, pictures = synthetic.patches(world.n_patches, IMAGE_SIZE, rng)
    told = synthetic.screens(pictures)
    write_hdf5(_file(root, SYNTHETIC_STIMULI, f"nsdsynthetic_colorstimuli_{subject_name(s)}.hdf5"), {"imgBrick": told})
    pictures = np.concatenate([gratings, synthetic.shown(told)])
    signal = noiseless_responses(synthetic_features(pictures, patches, strength), rois, same, scale.replay())
    z_scored = add_noise(signal[order], explainable_variance(rois, same), len(order), rng)
    percent = rng.uniform(-0.5, 1.5, z_scored.shape[1]) + z_scored * rng.uniform(0.4, 1.6, z_scored.shape[1])
    volumes = np.zeros((len(order), *VOLUME[::-1]), np.int16)  # as MATLAB writes HDF5: (trials, Z, Y, X)
    x, y, z = np.nonzero(cortex.nsdgeneral == 1)
    volumes[:, z, y, x] = np.round(300 * percent)
    folder = f"nsddata_betas/ppdata/{subject_name(s)}/func1pt8mm/nsdsyntheticbetas_fithrf_GLMdenoise_RR"
    with h5py.File(_file(root, folder, "betas_nsdsynthetic.hdf5"), "w") as file:
        file.create_dataset("betas", data=volumes, track_times=False, chunks=(16, *volumes.shape[1:]), compression=1)


# --- the experiment -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Design:
    """Who sees what when, 0-based (nsd_expdesign.mat is 1-based)."""

    ordering: np.ndarray  # (designed trials,): which of a subject's images; the same for all subjects
    subject_images: np.ndarray  # (8, images per subject) image ids; the first n_shared are the shared ones
    shared: np.ndarray  # (n_shared,) image ids, ascending
    n_trials: tuple[int, ...]  # that each subject completed

    def trial_images(self, s):
        """Image id of each trial that the 0-based subject `s` completed."""
        return self.subject_images[s, self.ordering[: self.n_trials[s]]]


def make_design(world, rng):
    """Images are dealt to the subjects at random, and repeats are spread as in NSD.

    A quarter of the images has its repeats close together, the others anywhere: so subjects who stop at 30 of 40
    sessions have seen about 92 % of their images, as NSD's have (9209 of 10000), not 98 %.
    """
    shuffled = rng.permutation(world.n_images)
    shared = np.sort(shuffled[: world.n_shared])
    own = shuffled[world.n_shared :].reshape(N_SUBJECTS, world.n_own)
    subject_images = np.concatenate([np.tile(shared, (N_SUBJECTS, 1)), own], axis=1)
    n = subject_images.shape[1]
    close = rng.random((n, 1)) < 0.26
    times = np.where(close, rng.random((n, 1)) + rng.normal(0, 0.005, (n, N_REPEATS)), rng.random((n, N_REPEATS)))
    ordering = np.repeat(np.arange(n), N_REPEATS)[np.argsort(times, axis=None, kind="stable")]
    return Design(ordering, subject_images, shared, tuple(k * world.session_trials for k in world.sessions))


def behaviour(s, image_ids, shared, session_trials, rng):
    """The 17 columns of NSD's behaviour per trial (docs/data.md), (trials, 17) float64, -1 = absent."""
    n = len(image_ids)
    row = np.arange(n)
    session, trial = row // session_trials, row % session_trials
    run, _ = run_and_slot(trial, session_trials)
    old = pd.Series(image_ids).duplicated().to_numpy()
    old_today = pd.DataFrame({"session": session, "image": image_ids}).duplicated().to_numpy()
    correct = rng.random(n) < 0.88
    says_old = old == correct
    seconds = trial * 4.0 + run * 40.0
    reaction = np.round(400 + rng.gamma(4, 120, n))
    days = session * 7 + seconds / 86400
    columns = (image_ids, s + 1, session + 1, run + 1, trial, row, days, old, correct, reaction, rng.random(n) < 0.03,
               old_today, old_today == says_old, ~says_old, says_old, 1 + says_old, np.isin(image_ids, shared))
    return np.stack([np.broadcast_to(column, n).astype(np.float64) for column in columns], axis=1)


def run_and_slot(trial, session_trials, n_runs=12):
    """0-based run of a session, and place in that run, of 0-based trials within a session."""
    run = trial * n_runs // session_trials
    return run, trial - -(-run * session_trials // n_runs)


# --- files --------------------------------------------------------------------------------------------------------


def _file(root, *parts):
    path = root.joinpath(*parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_hdf5(path, arrays):
    """Contiguous, uncompressed, and without the time of writing; a name with a slash makes a group."""
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, track_times=False)


def write_mat(path, contents):
    """A MATLAB file without the time of writing, which scipy's own header names."""
    buffer = io.BytesIO()
    savemat(buffer, contents)
    path.write_bytes(b"MATLAB 5.0 MAT-file, mini-NSD".ljust(116) + buffer.getvalue()[116:])


def write_stimuli(root, images, texts, scenes, design, rng):
    """Pictures, captions and the table of stimuli; and, for the demo's judge, what is truly in the pictures."""
    write_hdf5(_file(root, "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5"), {"imgBrick": images})
    coco_ids = np.sort(rng.choice(np.arange(1, 581930), len(images), replace=False))
    captions_file = _file(root, "nsddata_stimuli/stimuli/nsd/annotations/nsd_captions.json")
    captions_file.write_text(json.dumps(dict(zip(map(str, coco_ids), texts, strict=True))))
    attributes = json.dumps([scene.attributes for scene in scenes])
    _file(root, "demo_attributes.json").write_text(attributes)
    stimulus_table(coco_ids, design).to_csv(
        _file(root, "nsddata/experiments/nsd/nsd_stim_info_merged.csv"), lineterminator="\n")


def stimulus_table(coco_ids, design):
    """NSD's table of stimuli, one row per image; repeat columns hold 1-based *designed* trials, 0 = not shown."""
    n = len(coco_ids)
    table = {"cocoId": coco_ids, "cocoSplit": "train2017", "cropBox": "(0, 0, 0, 0)", "loss": 0.0,
             "nsdId": np.arange(n), "flagged": False, "BOLD5000": False,
             "shared1000": np.isin(np.arange(n), design.shared)}
    trials = np.argsort(design.ordering, kind="stable").reshape(-1, N_REPEATS)  # (images per subject, repeats), 0-based
    repeats = {}
    for s in range(N_SUBJECTS):
        shown = np.zeros((n, N_REPEATS), int)
        shown[design.subject_images[s]] = trials + 1
        table[f"subject{s + 1}"] = (shown[:, 0] > 0).astype(int)
        repeats |= {f"subject{s + 1}_rep{r}": shown[:, r] for r in range(N_REPEATS)}
    return pd.DataFrame(table | repeats)


def write_design(root, world, design):
    """nsd_expdesign.mat (1-based), and MindEye2's two short forms of it (0-based)."""
    n_sessions, trials = max(world.sessions), np.arange(world.session_trials)
    run, slot = run_and_slot(trials, world.session_trials)
    pattern = np.zeros((n_sessions, run.max() + 1, slot.max() + 2), np.uint8)  # each run ends with a blank trial
    pattern[:, run, slot] = 1
    contents = {"masterordering": (design.ordering + 1)[None].astype(np.uint16), "stimpattern": pattern,
                "subjectim": (design.subject_images + 1).astype(np.int32),
                "sharedix": (design.shared + 1)[None].astype(np.int32)}
    write_mat(_file(root, "nsddata/experiments/nsd/nsd_expdesign.mat"), contents)

    folder = "MindEyeV2/mindeyev2"
    write_hdf5(_file(root, folder, "COCO_73k_subj_indices.hdf5"),
               {subject_name(s): design.trial_images(s) for s in range(N_SUBJECTS)})
    np.save(_file(root, folder, "shared1000.npy"), np.isin(np.arange(world.n_images), design.shared))


def write_betas(root, s, betas):
    write_hdf5(_file(root, f"MindEyeV2/mindeyev2/betas_all_{subject_name(s)}_fp32_renorm.hdf5"), {"betas": betas})


def write_masks(root, masks):
    write_hdf5(_file(root, "MindEyeV2/mindeyev2/brain_region_masks.hdf5"),
               {f"{subject}/{roi}": mask for subject, rois in masks.items() for roi, mask in rois.items()})


def write_volumes(root, s, cortex):
    """NSD's ROI volumes; gzip's time stamp is 0, so that the same seed gives the same bytes."""
    affine = np.diag([VOXEL, VOXEL, VOXEL, 1])
    affine[:3, 3] = -VOXEL * (np.array(VOLUME) - 1) / 2
    for name, volume in (("nsdgeneral", cortex.nsdgeneral), ("prf-visualrois", cortex.visualrois)):
        file = _file(root, f"nsddata/ppdata/{subject_name(s)}/func1pt8mm/roi/{name}.nii.gz")
        file.write_bytes(gzip.compress(nibabel.Nifti1Image(volume, affine).to_bytes(), mtime=0))


def write_shards(root, s, behav, session_trials):
    """One tar per session of the trials with the subject's own images; test tars with the shared images' trials.

    new_test has all shared images, test (MindEye1's) 98 % of them, as it has 982 of NSD's 1000 (which ones: not found).
    behav: (trials, 17). `past_behav` and `future_behav` are the neighbouring trials, the nearest first, and
    `olds_behav` the earlier trials with the same image, the first one first (the order in MindEye2's files: not found).
    """
    n, width = behav.shape
    absent = np.full((15, width), -1.0)
    padded = np.concatenate([absent, behav, absent])  # row t of behav is row 15 + t here
    rows_of_image = {}

    def members(t):
        olds = np.full((N_REPEATS, width), -1.0)
        earlier = rows_of_image.setdefault(behav[t, 0], [])
        olds[: len(earlier)] = behav[earlier]
        earlier.append(t)
        return {"behav": behav[t : t + 1], "past_behav": padded[t : t + 15][::-1],
                "future_behav": padded[t + 16 : t + 31], "olds_behav": olds}

    folder = f"MindEyeV2/mindeyev2/wds/{subject_name(s)}"
    shared = np.unique(behav[behav[:, 16] == 1, 0])
    old_shared = shared[: int(0.982 * len(shared))]
    create = partial(tarfile.open, mode="w", format=tarfile.USTAR_FORMAT)  # the same bytes as tarfile's own, sooner
    with create(_file(root, folder, "new_test/0.tar")) as test, create(_file(root, folder, "test/0.tar")) as old_test:
        for session in range(n // session_trials):
            with create(_file(root, folder, f"train/{session}.tar")) as train:
                for t in range(session * session_trials, (session + 1) * session_trials):
                    shards = [test] if behav[t, 16] else [train]
                    if behav[t, 0] in old_shared:
                        shards.append(old_test)
                    for name, array in members(t).items():
                        info, content = tarfile.TarInfo(f"sample{t:09d}.{name}.npy"), _as_npy(array)
                        info.size = len(content)  # TarInfo's own modification time is 0
                        for shard in shards:
                            shard.addfile(info, io.BytesIO(content))


def _as_npy(array):
    """The bytes of an .npy file of an array."""
    return _npy_header(array.shape) + array.astype("<f8").tobytes()


@cache
def _npy_header(shape):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


# --- measurements -------------------------------------------------------------------------------------------------


def noise_ceiling(betas, image_ids):
    """Share of single-trial variance that the image explains, per voxel: (trials, V), (trials,) -> (V,).

    NSD's (Allen et al. 2022, methods): noise variance = variance over the repeats of an image (n - 1), averaged over
    images; signal variance = total - noise variance; ncsnr^2 = signal / noise; ceiling = ncsnr^2 / (ncsnr^2 + 1 / n)
    for means of n trials, here n = 1: signal / total. NSD sets negative signal variances to 0; here they stay, so
    that the mean over voxels is unbiased.
    """
    order = np.argsort(image_ids, kind="stable")
    _, start, count = np.unique(image_ids[order], return_index=True, return_counts=True)
    ordered = betas[order].astype(np.float64)
    sums, squares = np.add.reduceat(ordered, start), np.add.reduceat(ordered**2, start)
    repeated = count > 1
    n = count[repeated, None]
    # weighted by n - 1, because subjects who stopped early have two repeats of some images
    noise = (squares[repeated] - sums[repeated] ** 2 / n).sum(0) / (n - 1).sum()
    return 1 - noise / betas.var(0, dtype=np.float64)


def print_ceilings(ceilings):
    """Table of the wanted and the found explainable variance; ceilings: {roi: (voxels of all subjects,)}."""
    print("explainable variance of single trials, % (noise ceiling, n = 1), from the repeats; all subjects' voxels")
    print(f"{'region':<11}{'voxels':>7}{'wanted':>8}{'found':>8}{'5 %':>7}{'median':>8}{'95 %':>7}{'> 40 %':>8}")
    for roi, values in ceilings.items():
        low, median, high = 100 * np.percentile(values, (5, 50, 95))
        print(f"{roi:<11}{len(values):>7}{100 * EXPLAINABLE[roi]:>8.1f}{100 * values.mean():>8.1f}{low:>7.1f}"
              f"{median:>8.1f}{high:>7.1f}{100 * (values > 0.4).mean():>7.1f}%")


def ridge_accuracies(root, subject="subj01"):
    """{attribute: accuracy} of a ridge from single training trials to one-hot attributes, on repeat-averaged tests."""
    from sklearn.linear_model import RidgeCV

    folder = root / "MindEyeV2/mindeyev2"
    with h5py.File(folder / f"betas_all_{subject}_fp32_renorm.hdf5") as file:
        betas = file["betas"][:]
    with h5py.File(folder / "COCO_73k_subj_indices.hdf5") as file:
        image_ids = file[subject][:]
    attributes = json.loads((root / "demo_attributes.json").read_text())
    is_test = np.load(folder / "shared1000.npy")[image_ids]
    test_ids = np.unique(image_ids[is_test])
    test_betas = np.stack([betas[image_ids == image_id].mean(0) for image_id in test_ids])
    codes = {name: np.array([values.index(a[name]) for a in attributes]) for name, values in ATTRIBUTES.items()}
    targets = np.concatenate([np.eye(len(ATTRIBUTES[name]))[code] for name, code in codes.items()], axis=1)

    ridge = RidgeCV(alphas=np.logspace(2, 5, 7)).fit(betas[~is_test], targets[image_ids[~is_test]])
    ends = np.cumsum([len(values) for values in ATTRIBUTES.values()])
    scores = np.split(ridge.predict(test_betas), ends[:-1], axis=1)
    accuracies = {}
    for name, score in zip(ATTRIBUTES, scores, strict=True):
        counted = codes[name][test_ids] != (len(KINDS) if name == "second" else -1)
        accuracies[name] = float((score.argmax(1) == codes[name][test_ids])[counted].mean())
    return accuracies


def ceilings_of(root):
    """{roi: (voxels of all subjects,)}: noise_ceiling of the betas on disk."""
    folder, found = root / "MindEyeV2/mindeyev2", {roi: [] for roi in ROI_SHARES}
    for subject in map(subject_name, range(N_SUBJECTS)):
        with h5py.File(folder / f"betas_all_{subject}_fp32_renorm.hdf5") as file:
            betas = file["betas"][:]
        with h5py.File(folder / "COCO_73k_subj_indices.hdf5") as file:
            explained = noise_ceiling(betas, file[subject][:])
        with h5py.File(folder / "brain_region_masks.hdf5") as file:
            for roi, values in found.items():
                values.append(explained[file[subject][roi][:].astype(bool)])
    return {roi: np.concatenate(values) for roi, values in found.items()}


def print_check(root):
    print_ceilings(ceilings_of(root))
    accuracies = ridge_accuracies(root)
    print("ridge, subject 1, test images right: "
          + ", ".join(f"{name} {100 * value:.1f} %" for name, value in accuracies.items()))


if __name__ == "__main__":
    main()
