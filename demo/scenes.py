"""Draw the demo world's scenes and write their captions.

A scene is a setting, a main object (kind, colour, place, size, pattern), its light and, in half of the scenes, a second
object elsewhere. Attributes are drawn independently and uniformly; positions and sizes are continuous. As with COCO, a
picture has more in it than its captions say: they always name kind and setting, seldom the colour, hardly ever the
place, and never size, pattern or light. `Scene.attributes` is what demo/judge.py holds the reconstructions against.
"""

import re
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image, ImageDraw

SETTINGS = ("beach", "field", "snow", "city", "room", "forest", "sea", "desert")
KINDS = ("car", "house", "tree", "boat", "ball", "bird", "cat", "flower", "train", "balloon", "umbrella", "pizza")
COLOURS = {
    "red": (214, 34, 38), "orange": (250, 136, 16), "yellow": (252, 226, 50), "green": (34, 164, 60),
    "blue": (36, 82, 220), "purple": (136, 46, 176), "black": (24, 24, 28), "white": (248, 248, 248),
}
# ranges of continuous values, fractions of the side; gaps between them leave no scene in doubt
PLACES = {"left": (0.22, 0.34), "middle": (0.44, 0.56), "right": (0.66, 0.78)}  # horizontal centre
SIZES = {"small": (0.36, 0.41), "large": (0.52, 0.58)}
SECOND_SIZE = (0.24, 0.28)
PATTERNS = ("plain", "striped", "dotted")
LIGHTS = ("day", "dusk")
NO_SECOND = "none"
ATTRIBUTES = {"setting": SETTINGS, "kind": KINDS, "colour": tuple(COLOURS), "place": tuple(PLACES),
              "size": tuple(SIZES), "pattern": PATTERNS, "light": LIGHTS, "second": (*KINDS, NO_SECOND)}

# What a caption names beside kind and setting: whether anyone finds it worth saying (per scene), and then whether this
# annotator says it. So 30 % of captions name the colour, 10 % the place, and half a second object where there is one.
WORTH_SAYING = {"colour": 0.35, "place": 0.12, "second": 0.58}
SAID = 0.86

SETTING_PHRASES = {
    "beach": ("on a beach", "at the sandy beach"), "field": ("in a field", "in a grassy field"),
    "snow": ("in the snow", "on a snowy day"), "city": ("in a city", "on a city street"),
    "room": ("in a room", "inside a room"), "forest": ("in a forest", "among forest trees"),
    "sea": ("on the sea", "on the open sea"), "desert": ("in a desert", "in the dry desert"),
}
PLACE_PHRASES = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
LIGHT_PHRASES = {"day": "by day", "dusk": "at dusk"}
TEMPLATES = (
    "{thing} {place} {setting} {light} {second}",
    "{setting} {light} there is {thing} {place} {second}",
    "a picture of {thing} {second} {setting} {place} {light}",
    "{place} {setting} {thing} {second} {light}",
    "{thing} {second} seen {setting} {light} {place}",
)


@dataclass(frozen=True)
class Thing:
    """One drawn object; x, y, size are fractions of the image side."""

    kind: str
    colour: str
    pattern: str
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Scene:
    """Everything that determines a picture; `texture` seeds the setting's random details."""

    setting: str
    light: str
    place: str
    size: str
    main: Thing
    second: Thing | None
    texture: int

    @property
    def attributes(self):
        return {"setting": self.setting, "kind": self.main.kind, "colour": self.main.colour, "place": self.place,
                "size": self.size, "pattern": self.main.pattern, "light": self.light,
                "second": self.second.kind if self.second else NO_SECOND}


def sample_scene(rng, second_probability=0.5):
    """Draw a Scene from a numpy Generator."""

    def pick(values):
        return str(rng.choice(list(values)))

    place, size = pick(PLACES), pick(SIZES)
    main = Thing(pick(KINDS), pick(COLOURS), pick(PATTERNS), rng.uniform(*PLACES[place]), rng.uniform(0.44, 0.64),
                 rng.uniform(*SIZES[size]))
    second = None
    if rng.random() < second_probability:
        kind, colour, second_size = pick(KINDS), pick(COLOURS), rng.uniform(*SECOND_SIZE)
        apart = 0.38 * (main.size + second_size)
        while True:  # where the main object leaves room
            x, y = rng.uniform(0.14, 0.86), rng.uniform(0.14, 0.86)
            if max(abs(x - main.x), abs(y - main.y)) > apart:
                break
        second = Thing(kind, colour, "plain", x, y, second_size)
    return Scene(pick(SETTINGS), pick(LIGHTS), place, size, main, second, int(rng.integers(2**31)))


def describe(scene, said, rng):
    """An English sentence that names kind, setting and the attributes in `said`; its wording is drawn from `rng`.

    said: names of ATTRIBUTES; "second" where there is no second object says nothing.
    """
    thing = " ".join(["a", *(scene.attributes[name] for name in ("size", "pattern", "colour") if name in said),
                      scene.main.kind])
    second = ""
    if "second" in said and scene.second is not None:
        colour = f"{scene.second.colour} " if "colour" in said else ""
        second = f"and a {colour}{scene.second.kind}"
    text = str(rng.choice(TEMPLATES)).format(
        thing=thing, second=second, setting=str(rng.choice(SETTING_PHRASES[scene.setting])),
        place=PLACE_PHRASES[scene.place] if "place" in said else "",
        light=LIGHT_PHRASES[scene.light] if "light" in said else "")
    return re.sub(r"\ba (?=[aeiou])", "an ", " ".join(text.split()))


def captions(scene, rng, n=5):
    """`n` captions of a scene, as COCO has five of an image."""
    worth = [name for name, chance in WORTH_SAYING.items() if rng.random() < chance]
    return [describe(scene, [name for name in worth if rng.random() < SAID], rng) for _ in range(n)]


def caption(scene, rng):
    """One caption of a scene."""
    return captions(scene, rng, 1)[0]


def vocabulary():
    """All words that sentences can contain, sorted."""
    phrases = [*TEMPLATES, *PLACE_PHRASES.values(), *LIGHT_PHRASES.values(), "and"]
    phrases += [phrase for pair in SETTING_PHRASES.values() for phrase in pair]
    words = {word for line in phrases for word in line.split() if "{" not in word}
    return sorted(words | {"a", "an"} | set(KINDS) | set(COLOURS) | set(SIZES) | set(PATTERNS))


def render(scene, size=64, supersample=4):
    """Draw a scene; returns (size, size, 3) uint8 RGB."""
    side = size * supersample
    image = Image.new("RGB", (side, side))
    draw = ImageDraw.Draw(image)
    _SETTING_PAINTERS[scene.setting](draw, side, np.random.default_rng(scene.texture))
    for thing in (scene.second, scene.main):
        if thing is not None:
            image = _paint_thing(image, thing)
    picture = np.asarray(image.resize((size, size), Image.BOX))
    if scene.light == "dusk":
        picture = (picture * DUSK_GAIN + DUSK_GLOW).round().astype(np.uint8)
    return picture


DUSK_GAIN, DUSK_GLOW = np.array([0.66, 0.56, 0.64]), np.array([14, 4, 28])


# --- settings: painter(draw, side, rng), coordinates in fractions of the side ------------------------------------


def _jitter(rng, colour, amount=9):
    return tuple(min(max(c + int(rng.integers(-amount, amount + 1)), 0), 255) for c in colour)


def _rect(draw, side, box, fill):
    draw.rectangle([v * side for v in box], fill=fill)


def _beach(draw, side, rng):
    _rect(draw, side, (0, 0, 1, 1), _jitter(rng, (150, 206, 240)))
    horizon = rng.uniform(0.36, 0.42)
    _rect(draw, side, (0, horizon, 1, horizon + 0.16), _jitter(rng, (40, 150, 180)))
    _rect(draw, side, (0, horizon + 0.16, 1, 1), _jitter(rng, (236, 214, 160)))
    _rect(draw, side, (0, horizon + 0.15, 1, horizon + 0.18), (250, 250, 250))


def _field(draw, side, rng):
    _rect(draw, side, (0, 0, 1, 1), _jitter(rng, (140, 190, 245)))
    horizon = rng.uniform(0.4, 0.48)
    hill = rng.uniform(0.2, 0.8)
    draw.ellipse([(hill - 0.5) * side, (horizon - 0.14) * side, (hill + 0.5) * side, (horizon + 0.3) * side],
                 fill=_jitter(rng, (70, 140, 60)))
    _rect(draw, side, (0, horizon, 1, 1), _jitter(rng, (100, 180, 70)))


def _snow(draw, side, rng):
    _rect(draw, side, (0, 0, 1, 1), _jitter(rng, (186, 200, 214)))
    horizon = rng.uniform(0.42, 0.5)
    for x in rng.uniform(0, 1, 4):
        points = [(x - 0.08, horizon), (x, horizon - 0.24), (x + 0.08, horizon)]
        draw.polygon([(a * side, b * side) for a, b in points], fill=(60, 96, 90))
    _rect(draw, side, (0, horizon, 1, 1), _jitter(rng, (240, 244, 250), 4))


def _city(draw, side, rng):
    _rect(draw, side, (0, 0, 1, 1), _jitter(rng, (200, 196, 200)))
    for i, x in enumerate(np.arange(0, 1, 0.2)):
        top = rng.uniform(0.08, 0.3)
        _rect(draw, side, (x, top, x + 0.19, 0.62), _jitter(rng, ((128, 112, 116), (100, 104, 124))[i % 2]))
        for wx in (x + 0.04, x + 0.11):
            for wy in np.arange(top + 0.05, 0.55, 0.12):
                _rect(draw, side, (wx, wy, wx + 0.04, wy + 0.05), (240, 226, 150))
    _rect(draw, side, (0, 0.62, 1, 1), _jitter(rng, (80, 80, 86)))
    for x in np.arange(rng.uniform(-0.2, 0), 1, 0.28):
        _rect(draw, side, (x, 0.88, x + 0.14, 0.92), (230, 230, 230))


def _room(draw, side, rng):
    _rect(draw, side, (0, 0, 1, 1), _jitter(rng, (222, 180, 172)))
    x = rng.uniform(0.08, 0.68)
    _rect(draw, side, (x, 0.06, x + 0.24, 0.32), (250, 250, 250))
    _rect(draw, side, (x + 0.02, 0.08, x + 0.22, 0.3), (150, 210, 240))
    _rect(draw, side, (0, 0.68, 1, 1), _jitter(rng, (150, 100, 66)))
    for y in (0.78, 0.9):
        _rect(draw, side, (0, y, 1, y + 0.012), (110, 70, 46))


def _forest(draw, side, rng):
    _rect(draw, side, (0, 0, 1, 1), _jitter(rng, (92, 132, 84)))
    for x in np.arange(rng.uniform(-0.08, 0.04), 1.05, 0.17):
        x = x + rng.uniform(-0.03, 0.03)
        _rect(draw, side, (x, 0, x + 0.06, 0.74), _jitter(rng, (84, 62, 44)))
        draw.ellipse([(x - 0.1) * side, -0.16 * side, (x + 0.16) * side, 0.2 * side], fill=_jitter(rng, (40, 92, 48)))
    _rect(draw, side, (0, 0.72, 1, 1), _jitter(rng, (64, 96, 44)))


def _sea(draw, side, rng):
    _rect(draw, side, (0, 0, 1, 1), _jitter(rng, (206, 228, 240)))
    horizon = rng.uniform(0.26, 0.34)
    _rect(draw, side, (0, horizon, 1, 1), _jitter(rng, (24, 100, 170)))
    for y in np.arange(horizon + 0.08, 1, 0.13):
        for x in np.arange(rng.uniform(-0.2, 0), 1, 0.25):
            draw.arc([x * side, y * side, (x + 0.16) * side, (y + 0.07) * side], 180, 360,
                     fill=(170, 210, 236), width=max(1, side // 64))


def _desert(draw, side, rng):
    _rect(draw, side, (0, 0, 1, 1), _jitter(rng, (252, 190, 120)))
    x = rng.uniform(0.1, 0.9)
    draw.ellipse([(x - 0.1) * side, 0.05 * side, (x + 0.1) * side, 0.25 * side], fill=(255, 244, 190))
    for base, colour in ((0.42, (214, 140, 60)), (0.6, (196, 116, 44))):
        shift = rng.uniform(-0.3, 0.3)
        points = [(0, 1), (0, base), (0.3 + shift, base - 0.08), (0.7 + shift, base + 0.08), (1, base - 0.02), (1, 1)]
        draw.polygon([(a * side, b * side) for a, b in points], fill=_jitter(rng, colour))


_SETTING_PAINTERS = {"beach": _beach, "field": _field, "snow": _snow, "city": _city, "room": _room,
                     "forest": _forest, "sea": _sea, "desert": _desert}


# --- objects: drawn in a box of side 1 around (0, 0), y downwards ------------------------------------------------


UNPAINTED = (1, 255, 2)  # stands for the body's paint while a patterned thing is drawn; no painter uses it


def _paint_thing(image, thing):
    """The image with the thing drawn over it."""
    draw, side = ImageDraw.Draw(image), image.width
    scale, ox, oy = thing.size * side, thing.x * side, thing.y * side
    width = max(1, round(0.035 * scale))
    body = COLOURS[thing.colour] if thing.pattern == "plain" else UNPAINTED
    outline = (245, 245, 245) if thing.colour == "black" else (20, 20, 24)

    def at(points):
        return [(ox + x * scale, oy + y * scale) for x, y in points]

    def polygon(points, fill=body):
        points = at(points)
        draw.polygon(points, fill=fill)
        draw.line([*points, points[0], points[1]], fill=outline, width=width, joint="curve")

    def ellipse(x0, y0, x1, y1, fill=body):
        draw.ellipse([v for point in at([(x0, y0), (x1, y1)]) for v in point], fill=fill, outline=outline, width=width)

    def line(points, fill=outline, w=1.0):
        draw.line(at(points), fill=fill, width=max(1, round(w * width)), joint="curve")

    pen = {"polygon": polygon, "ellipse": ellipse, "line": line, "body": body,
           "rect": lambda x0, y0, x1, y1, fill=body: polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], fill),
           "arc": partial(_arc, draw, at, outline, width)}
    _THING_PAINTERS[thing.kind](**pen)
    if thing.pattern == "plain":
        return image
    pixels = np.array(image)
    red, green, blue = (pixels[..., i] == UNPAINTED[i] for i in range(3))
    unpainted = red & green & blue  # faster than all(2)
    y, x = np.nonzero(unpainted)
    shaded = _PATTERNS[thing.pattern]((x - ox) / scale, (y - oy) / scale)
    pixels[unpainted] = np.where(shaded[:, None], _second_shade(thing.colour), COLOURS[thing.colour])
    return Image.fromarray(pixels)


def _second_shade(colour):
    """The paint of stripes and dots: dark on light colours, light on dark ones."""
    paint = np.array(COLOURS[colour])
    other, share = ((30, 30, 60), 0.62) if colour in ("white", "yellow", "orange") else ((255, 255, 255), 0.66)
    return ((1 - share) * paint + share * np.array(other)).astype(np.uint8)


def _stripes(u, v):
    return ((u + v) / 0.36) % 1 < 0.45


def _dots(u, v):
    return (u % 0.25 - 0.125) ** 2 + (v % 0.25 - 0.125) ** 2 < 0.082**2


_PATTERNS = {"striped": _stripes, "dotted": _dots}


def _arc(draw, at, outline, width, x0, y0, x1, y1, start, end, fill=None):
    box = [v for point in at([(x0, y0), (x1, y1)]) for v in point]
    if fill is not None:
        draw.pieslice(box, start, end, fill=fill, outline=outline, width=width)
    else:
        draw.arc(box, start, end, fill=outline, width=2 * width)


GLASS, DARK, WOOD, GOLD = (190, 226, 244), (40, 40, 44), (112, 72, 40), (252, 206, 50)


def _car(polygon, ellipse, rect, **_):
    polygon([(-0.24, -0.06), (-0.14, -0.27), (0.16, -0.27), (0.28, -0.06)])
    polygon([(-0.15, -0.07), (-0.1, -0.21), (0.12, -0.21), (0.18, -0.07)], GLASS)
    rect(-0.5, -0.07, 0.5, 0.2)
    for x in (-0.28, 0.28):
        ellipse(x - 0.13, 0.08, x + 0.13, 0.34, DARK)


def _house(polygon, rect, **_):
    rect(-0.36, -0.08, 0.36, 0.45)
    polygon([(-0.48, -0.08), (0, -0.5), (0.48, -0.08)])
    rect(-0.09, 0.14, 0.09, 0.45, WOOD)
    rect(0.15, 0.04, 0.29, 0.18, GLASS)
    rect(-0.29, 0.04, -0.15, 0.18, GLASS)


def _tree(ellipse, rect, **_):
    rect(-0.08, 0.1, 0.08, 0.5, WOOD)
    for x, y in ((-0.2, 0.0), (0.2, 0.0), (0, -0.22)):
        ellipse(x - 0.25, y - 0.24, x + 0.25, y + 0.22)


def _boat(polygon, line, **_):
    line([(0, 0.2), (0, -0.5)], WOOD, 2)
    polygon([(0.04, -0.46), (0.04, 0.08), (0.4, 0.08)], (250, 250, 250))
    polygon([(-0.04, -0.36), (-0.04, 0.08), (-0.3, 0.08)], (250, 250, 250))
    polygon([(-0.5, 0.14), (0.5, 0.14), (0.32, 0.44), (-0.32, 0.44)])


def _ball(ellipse, line, **_):
    ellipse(-0.38, -0.38, 0.38, 0.38)
    for shift in (-0.13, 0.13):
        line([(shift - 0.2 * (1 - (2 * t) ** 2) * np.sign(-shift) * 0.4, t * 0.68) for t in np.linspace(-0.5, 0.5, 9)],
             (230, 230, 230), 1.8)


def _bird(polygon, ellipse, body, **_):
    polygon([(-0.28, 0.04), (-0.52, -0.1), (-0.5, 0.16)])
    ellipse(-0.36, -0.16, 0.28, 0.24)
    ellipse(0.12, -0.34, 0.42, -0.04)
    polygon([(0.4, -0.24), (0.56, -0.17), (0.4, -0.12)], GOLD)
    polygon([(-0.14, 0.02), (0.1, 0.02), (-0.22, -0.46)])
    ellipse(0.26, -0.25, 0.33, -0.18, (250, 250, 250))


def _cat(polygon, ellipse, arc, **_):
    arc(0.1, -0.1, 0.5, 0.46, 270, 90)
    ellipse(-0.26, -0.06, 0.26, 0.5)
    polygon([(-0.26, -0.2), (-0.26, -0.5), (-0.02, -0.36)])
    polygon([(0.26, -0.2), (0.26, -0.5), (0.02, -0.36)])
    ellipse(-0.28, -0.42, 0.28, 0.06)
    for x in (-0.11, 0.11):
        ellipse(x - 0.06, -0.26, x + 0.06, -0.12, (180, 230, 120))


def _flower(ellipse, line, **_):
    line([(0, 0), (0, 0.5)], (40, 120, 40), 3)
    ellipse(0.02, 0.28, 0.24, 0.4, (60, 160, 60))
    for angle in np.arange(6) * np.pi / 3:
        x, y = 0.23 * np.cos(angle), -0.16 + 0.23 * np.sin(angle)
        ellipse(x - 0.15, y - 0.15, x + 0.15, y + 0.15)
    ellipse(-0.12, -0.28, 0.12, -0.04, GOLD)


def _train(ellipse, rect, **_):
    rect(0.28, -0.42, 0.4, -0.1, DARK)
    rect(-0.14, -0.18, 0.5, 0.2)
    rect(-0.5, -0.44, -0.1, 0.2)
    rect(-0.42, -0.34, -0.18, -0.12, GLASS)
    for x in (-0.34, 0.0, 0.34):
        ellipse(x - 0.12, 0.12, x + 0.12, 0.36, DARK)


def _balloon(polygon, ellipse, line, **_):
    line([(0, 0.2), (0.06, 0.34), (-0.04, 0.5)], w=1.6)
    polygon([(-0.07, 0.26), (0, 0.14), (0.07, 0.26)])
    ellipse(-0.28, -0.5, 0.28, 0.18)
    ellipse(-0.16, -0.38, -0.06, -0.2, (250, 250, 250))


def _umbrella(polygon, arc, line, body, **_):
    line([(0, 0), (0, 0.38)], w=2)
    arc(-0.16, 0.26, 0, 0.5, 0, 180)
    arc(-0.5, -0.46, 0.5, 0.46, 180, 360, fill=body)
    for x in (-0.166, 0.166):
        line([(x, 0), (0, -0.46)])


def _pizza(polygon, ellipse, **_):
    polygon([(-0.44, -0.38), (0.44, -0.38), (0, 0.5)])
    polygon([(-0.5, -0.5), (0.5, -0.5), (0.46, -0.34), (-0.46, -0.34)], (206, 150, 80))
    for x, y in ((-0.16, -0.18), (0.16, -0.16), (0.0, 0.1)):
        ellipse(x - 0.08, y - 0.08, x + 0.08, y + 0.08, (170, 40, 30))


_THING_PAINTERS = {"car": _car, "house": _house, "tree": _tree, "boat": _boat, "ball": _ball, "bird": _bird,
                   "cat": _cat, "flower": _flower, "train": _train, "balloon": _balloon, "umbrella": _umbrella,
                   "pizza": _pizza}
