"""Draw the demo world's session of synthetic stimuli: gratings that all subjects see, and colours of each one's own.

As in NSD-synthetic, a screen is wider than the square that counts, and its gray values are made for a display whose
light is proportional to them: a usual display would show the same by 255 sqrt(v / 255).
"""

import itertools
from dataclasses import dataclass

import numpy as np

from scenes import COLOURS, PLACES, Thing

SCREEN = 122 / 64  # width by height, as 1360 by 714
GRAY = 128
ORIENTATIONS, WAVELENGTHS, CONTRASTS = 6, (4, 8, 16), (0.25, 0.5, 1.0)  # over half a turn; pixels; of gray
RADII = (0.2, 0.4)  # of a patch, fractions of the side
GRATING_REPEATS, PATCH_REPEATS = 3, 2


@dataclass(frozen=True)
class Patch:
    """A disc of one colour on gray; `main` says where, as of a Scene's object."""

    main: Thing
    second: None = None


def gratings(n, side):
    """n pictures of all that differ in orientation, wavelength and contrast, (n, side, side, 3) uint8."""
    wanted = list(itertools.product(WAVELENGTHS, range(ORIENTATIONS), CONTRASTS))
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    disc = np.clip((0.48 * side - np.hypot(x, y)) / 2, 0, 1)  # with a soft edge
    pictures = []
    for number in np.linspace(0, len(wanted) - 1, n).round().astype(int):
        wavelength, orientation, contrast = wanted[number]
        angle = orientation * np.pi / ORIENTATIONS
        wave = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / wavelength)
        pictures.append(GRAY + 127 * contrast * wave * disc)
    return np.stack([np.stack(pictures)] * 3, axis=-1).round().astype(np.uint8)


def patches(n, side, rng):
    """n colour patches, and their pictures (n, side, side, 3) uint8; every colour in turn."""
    found, pictures = [], []
    y, x = (np.mgrid[:side, :side] + 0.5) / side
    for colour in itertools.islice(itertools.cycle(COLOURS), n):
        place = PLACES[list(PLACES)[rng.integers(len(PLACES))]]
        thing = Thing("none", colour, "none", rng.uniform(*place), rng.uniform(0.4, 0.6), 2 * rng.uniform(*RADII))
        picture = np.full((side, side, 3), GRAY, np.uint8)
        picture[np.hypot(x - thing.x, y - thing.y) < thing.size / 2] = COLOURS[colour]
        found.append(Patch(thing))
        pictures.append(picture)
    return found, np.stack(pictures)


def screens(pictures):
    """What the display is told, so that it shows these pictures in the middle of gray: (N, H, W, 3) uint8."""
    side = pictures.shape[1]
    margin = (round(SCREEN * side) - side) // 2
    wide = np.pad(pictures, [(0, 0), (0, 0), (margin, margin), (0, 0)], constant_values=GRAY)
    return ((wide / 255) ** 2 * 255).round().astype(np.uint8)


def shown(told):
    """What a usual display makes of it in the square in the middle, (N, side, side, 3) uint8."""
    side, width = told.shape[1:3]
    square = told[:, :, (width - side) // 2:(width + side) // 2]
    return (np.sqrt(square / 255) * 255).round().astype(np.uint8)
