"""Pictures of results: the contact sheet of seen and reconstructed images, and the copies that pages show."""

import hashlib
import re

from PIL import Image, ImageDraw, ImageFont

import utils
from disk.files import atomic_path
from evaluation.metrics import written
from evaluation.picture_sets import MADE, SEEN

TILE, GAP, MARGIN = 136, 8, 28  # pixels
BAND_GAP, CAPTION, LABEL_WIDTH = 22, 22, 138
INK, FAINT, PAPER, SEEN_BACKGROUND = "#1c1e21", "#6b7178", "#ffffff", "#e3e9f2"
# copies on pages: the largest sides with which all of them take about so many bytes
SIDES, ALL_COPIES, BYTES_PER_PIXEL = (512, 384, 256, 192), 140e6, 0.15  # a photograph as WebP of quality 80
LOSSLESS = 128  # pixels: smaller pictures are kept as they are
COPY_NAME = re.compile(r"\d+(_[a-z0-9]+)*\.(webp|png|jpg)")


def sheet_of(title, seen, sets, results, at_most):
    """The contact sheet of an evaluation; of a set larger than `at_most`, images at even distances: none is picked.

    seen: PictureSet of the seen images; sets: {label: PictureSet} to show under them, the reconstructions with all
    their samples, others by their first samples, where they have them; results: {metric: entry}.
    """
    n = len(seen.image_ids)
    chosen = utils.evenly(n, at_most)
    ids = seen.image_ids[chosen]
    rows = {SEEN: [seen.read(i, 0) for i in chosen]}
    for label, pictures in sets.items():
        for k in range(pictures.n_samples if label == MADE else 1):
            at = {image_id: i for i, image_id in enumerate(pictures.image_ids)}
            rows[f"sample {k + 1}" if k else label] = [pictures.read(at[i], k) if i in at else None for i in ids]
    which = f"all {n} images" if len(ids) == n else f"{len(ids)} of {n} images, at even distances by id"
    shown = [f"{name} {written(results[metric]['value'])}" for metric, name in
             (("clip_two_way", "CLIP two-way"), ("pixcorr", "PixCorr"), ("ssim", "SSIM"))
             if results.get(metric, {}).get("n")]
    return contact_sheet(rows, [f"{i}" for i in ids], title, "   ·   ".join([which, *shown]))


def sides_of_copies(n_large, n_small):
    """The sides, in pixels, that copies may have on a page: of those shown large, and of those shown small."""
    pairs = [(large, small) for small in SIDES for large in SIDES if large >= small]
    fitting = (pair for pair in pairs if (n_large * pair[0]**2 + n_small * pair[1]**2) * BYTES_PER_PIXEL <= ALL_COPIES)
    return next(fitting, pairs[-1])


def save_copy(picture, file, side):
    """Save a picture, (H, W, 3) uint8, as WebP that is at most `side` pixels wide and high."""
    picture = Image.fromarray(picture)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    how = {"lossless": True} if max(picture.size) <= LOSSLESS else {"quality": 80}
    with atomic_path(file) as temporary:
        picture.save(temporary, format="WEBP", method=2, **how)


def save_copies(folder, columns):
    """Copies of pictures for a page, in its folder pictures/; what an earlier page left there goes.

    columns: [(PictureSet, sample, whether it is shown large)]. Returns for each a list of names from `folder`, one for
    each image it has; a picture that is the same for several images is saved once.
    """
    n_large, n_small = (sum(len(pictures.image_ids) for pictures, _, large in columns if large == wanted)
                        for wanted in (True, False))
    sides = dict(zip((True, False), sides_of_copies(n_large, n_small), strict=True))
    found, known = [], {}
    for number, (pictures, sample, large) in enumerate(columns):
        names = []
        for i, image_id in enumerate(pictures.image_ids):
            picture = pictures.read(i, sample)
            key = number, hashlib.sha256(picture.tobytes()).digest()
            if key not in known:
                known[key] = f"pictures/{image_id:05d}_{number}.webp"
                save_copy(picture, folder / known[key], sides[large])
            names.append(known[key])
        found.append(names)
    remove_others(folder, set(known.values()))
    return found


def remove_others(folder, names):
    """Remove the copies in a page's folder pictures/ that are not among `names`."""
    for file in (folder / "pictures").glob("*"):
        if COPY_NAME.fullmatch(file.name) and f"pictures/{file.name}" not in names:
            file.unlink()


def contact_sheet(rows, names, title, subtitle="", columns=10):
    """Draw images in bands of `columns`: under each other in a column, one image of every row.

    rows: {label: list of N (H, W, 3) uint8 arrays; None leaves the place empty}, the first row being the images seen;
    names: N texts, written under the columns. Returns a PIL image.
    """
    assert all(len(pictures) == len(names) for pictures in rows.values())
    columns = max(1, min(columns, len(names)))
    n_bands = -(-len(names) // columns)
    band_height = len(rows) * (TILE + GAP) + CAPTION
    top = MARGIN + 66
    width = MARGIN + LABEL_WIDTH + columns * (TILE + GAP) - GAP + MARGIN
    width = max(width, 2 * MARGIN + int(max(_font(26).getlength(title), _font(15).getlength(subtitle))))
    sheet = Image.new("RGB", (width, top + n_bands * (band_height + BAND_GAP) - BAND_GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 6), title, INK, _font(26))
    draw.text((MARGIN, MARGIN + 30), subtitle, FAINT, _font(15))
    for band in range(n_bands):
        chosen = range(band * columns, min((band + 1) * columns, len(names)))
        _draw_band(sheet, draw, top + band * (band_height + BAND_GAP), rows, names, chosen)
    return sheet


def _draw_band(sheet, draw, top, rows, names, chosen):
    """One band of the sheet: every row's images number `chosen`, row labels on the left, names below."""
    left = MARGIN + LABEL_WIDTH
    right = left + len(chosen) * (TILE + GAP) - GAP
    box = MARGIN - 10, top - GAP // 2, right + GAP // 2, top + TILE + GAP // 2 - 1
    draw.rounded_rectangle(box, 6, SEEN_BACKGROUND)
    for row, (label, pictures) in enumerate(rows.items()):
        y = top + row * (TILE + GAP)
        text = "\n".join(_wrapped(label, LABEL_WIDTH - 14))
        draw.multiline_text((left - 14, y + TILE / 2), text, INK, _font(18), anchor="rm", align="right")
        for column, i in enumerate(chosen):
            _draw_tile(sheet, draw, left + column * (TILE + GAP), y, pictures[i])
    for column, i in enumerate(chosen):
        x = left + column * (TILE + GAP) + TILE / 2
        draw.text((x, top + len(rows) * (TILE + GAP) + 2), names[i], FAINT, _font(14), anchor="ma")


def _draw_tile(sheet, draw, x, y, picture):
    if picture is None:
        draw.rectangle((x, y, x + TILE - 1, y + TILE - 1), outline=SEEN_BACKGROUND)
        return
    sheet.paste(Image.fromarray(picture).resize((TILE, TILE), Image.Resampling.LANCZOS), (x, y))


def _wrapped(text, width):
    """Break a label into lines of at most `width` pixels, at its spaces and underscores."""
    lines = [""]
    for word in text.replace("_", "_ ").split(" "):
        longer = lines[-1] + word if lines[-1].endswith("_") else f"{lines[-1]} {word}".strip()
        if lines[-1] and _font(18).getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _font(size):
    return ImageFont.load_default(size)
