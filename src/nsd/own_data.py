"""A folder of one's own data: its table of trials, its images and their captions, read and checked.

docs/own_data.md describes the folder. Responses are own_betas.py's, what becomes of it all is own_root.py's.
"""

import csv
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

import utils

COLUMNS = ("image", "subject", "session", "run", "trial", "is_test")
PAGE = "docs/own_data.md says what it holds"
IMAGE_TYPES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif"}
YES, NO = {"1", "true", "yes"}, {"0", "false", "no"}


@dataclass(frozen=True)
class Subject:
    """One subject's trials, in the order of its betas' rows."""

    name: str  # the user's
    number: str  # the project's, subj01 ...
    rows: np.ndarray  # (trials, 5) int: image id, session, run, trial, whether it is a test trial

    @property
    def image_ids(self):
        return self.rows[:, 0]

    @property
    def sessions(self):
        return self.rows[:, 1]

    @property
    def is_test(self):
        return self.rows[:, 4] == 1


@dataclass(frozen=True)
class OwnData:
    """What a folder holds."""

    folder: Path
    images: list  # names under images/, by image id
    subjects: list  # [Subject], by number
    captions: dict  # {image id: [caption, ...]}
    notes: list  # what the user may want to know of it, sentences

    @property
    def is_test(self):
        """(N,) bool by image id."""
        mask = np.zeros(len(self.images), bool)
        for subject in self.subjects:
            mask[subject.image_ids[subject.is_test]] = True
        return mask

    def identity(self):
        """Tell one state of the folder from another: a hash of names, sizes and times of its files."""
        places = {*self.folder.glob("*"), *self.folder.glob("*/*")}
        places |= {self.folder / "images" / name for name in self.images}
        known = [(str(file.relative_to(self.folder)), file.stat().st_size, file.stat().st_mtime_ns)
                 for file in sorted(places) if file.is_file()]
        return hashlib.sha256(repr(known).encode()).hexdigest()[:12]


def read_folder(folder):
    """Read the trials, images' names and captions of a folder; returns OwnData, or raises UserError."""
    if not folder.is_dir():
        raise utils.UserError(f"--data {folder}: no such folder; give the one that holds trials.csv and images/")
    images, notes = list_images(folder / "images")
    number_of = {name: image_id for image_id, name in enumerate(images)}
    subjects = read_trials(folder / "trials.csv", number_of)
    unseen = len(images) - len(np.unique(np.concatenate([subject.image_ids for subject in subjects])))
    notes += [f"{unseen} images are in no trial: they get features, and nothing else"] if unseen else []
    captions = read_captions(folder / "captions.csv", number_of)
    lacking = len(images) - len(captions)
    notes.append(f"captions: of {len(captions)} images" + (
        f"; {lacking} have none: img2feat.py --caption_model writes them" if lacking else ""))
    return OwnData(folder, images, subjects, captions, notes)


# --- images -------------------------------------------------------------------------------------------------------


def list_images(folder):
    """List the names of the pictures in a folder and below it, sorted: their order is that of image ids.

    Returns ([name], [note]). Hidden files and those of other types are no pictures.
    """
    utils.require(folder, "the pictures", PAGE)
    names, others = [], 0
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in (Path(place, name) for name in files if not name.startswith(".")):
            if file.suffix.lower() in IMAGE_TYPES:
                names.append(file.relative_to(folder).as_posix())
            else:
                others += 1
    if not names:
        raise utils.UserError(f"{folder}: no picture found, wanted files that end in {', '.join(sorted(IMAGE_TYPES))}")
    notes = [f"{others} files in images/ are left out: no pictures by their names"] if others else []
    return sorted(names), notes


def read_image(file, side):
    """Read a picture as a square, (side, side, 3) uint8, turned as the camera was held; the middle of one that is none.

    A square of that side is not resampled. Returns it and whether it was cut; raises UserError when it is not readable.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            if opened.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"):
                raise ValueError(f"its mode is {opened.mode}, wanted 8 bits a channel")
            picture = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise utils.UserError(f"{file}: not a readable picture ({str(error).splitlines()[0]}); save it again as PNG, "
                              "or leave out its trials") from None
    width, height = picture.size
    cut = min(width, height)
    left, top = (width - cut) // 2, (height - cut) // 2
    picture = picture.crop((left, top, left + cut, top + cut))
    if picture.size != (side, side):
        picture = picture.resize((side, side), Image.Resampling.LANCZOS)
    return np.asarray(picture), width != height


# --- tables -------------------------------------------------------------------------------------------------------


def read_table(file, columns, what):
    """Read a CSV file's lines, [(where, {column: text})], `where` naming file and line."""
    utils.require(file, what, PAGE)
    try:
        with open(file, newline="", encoding="utf-8-sig") as opened:
            reader = csv.reader(opened)
            header = [name.strip() for name in next(reader, [])]
            lacking = [name for name in columns if name not in header]
            if lacking:
                raise utils.UserError(f"{file}: columns {', '.join(header) or 'none'} found, wanted "
                                      f"{', '.join(columns)}: {lacking[0]} is missing; name them so in the first line, "
                                      "with commas between")
            twice = [name for name in columns if header.count(name) > 1]
            if twice:
                raise utils.UserError(f"{file}: column {twice[0]} is there {header.count(twice[0])} times, wanted once")
            lines = []
            for cells in reader:
                where = f"{file}: line {reader.line_num}"
                if not any(cell.strip() for cell in cells):
                    continue
                if len(cells) != len(header):
                    raise utils.UserError(f"{where}: {len(cells)} cells found, wanted {len(header)} as in the first "
                                          "line; quote a text that holds a comma")
                lines.append((where, dict(zip(header, (cell.strip() for cell in cells), strict=True))))
    except (UnicodeDecodeError, csv.Error) as error:
        raise utils.UserError(f"{file}: not a readable table ({error}); save it as CSV in UTF-8") from None
    if not lines:
        raise utils.UserError(f"{file}: no line under the first, wanted one for each of {what}")
    return lines


def image_id_of(where, name, number_of):
    """Return the id of a picture that a table names; raises UserError for a name that leads elsewhere or nowhere."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or re.match("[A-Za-z]:", name):
        raise utils.UserError(f"{where}: image {name!r} is no path inside images/, wanted one such as cat.png or "
                              "animals/cat.png; put the picture there")
    if str(path) not in number_of:
        raise utils.UserError(f"{where}: image {name!r} not found in images/ ({len(number_of)} pictures), wanted the "
                              "name of one, its ending included; add it, or leave the line out")
    return number_of[str(path)]


def whole_number(where, line, column):
    text = line[column]
    if not (text.isascii() and text.isdecimal()) or int(text) > 10**6:
        raise utils.UserError(f"{where}: {column} {text!r} found, wanted a whole number from 0")
    return int(text)


def read_trials(file, number_of):
    """Read trials.csv: [Subject], by number. number_of: {name of an image: its id}."""
    trials, first_use = {}, {}
    for where, line in read_table(file, COLUMNS, "the trials"):
        name, is_test = line["subject"], line["is_test"].lower()
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            raise utils.UserError(f"{where}: subject {name!r} found, wanted letters, digits, - and _, as in "
                                  "betas_<subject>.npy")
        if is_test not in YES | NO:
            raise utils.UserError(f"{where}: is_test {line['is_test']!r} found, wanted 1 or 0")
        image_id, is_test = image_id_of(where, line["image"], number_of), is_test in YES
        place = tuple(whole_number(where, line, column) for column in ("session", "run", "trial"))
        as_test, elsewhere = first_use.setdefault(image_id, (is_test, where))
        if as_test != is_test:
            raise utils.UserError(f"{where}: image {line['image']!r} has is_test {int(is_test)}, but {int(as_test)} in "
                                  f"{elsewhere.rpartition(': ')[2]}; wanted the same in all trials of all subjects, or "
                                  "test images would be trained on")
        own = trials.setdefault(name, [])
        check_order(where, name, place, own)
        own.append((image_id, *place, int(is_test)))
    subjects = [Subject(name, number, np.array(trials[name])) for name, number in numbers_of(list(trials)).items()]
    for subject in subjects:
        check_split(file, subject)
    return subjects


def check_order(where, name, place, before):
    """Raise UserError unless a trial at `place` (session, run, trial) comes after those before."""
    if not before or place > before[-1][1:4]:
        return
    said = "session {}, run {}, trial {}".format(*place)
    if any(place == row[1:4] for row in before):
        raise utils.UserError(f"{where}: {name} has {said} twice, wanted each trial once; number them within their run")
    raise utils.UserError(f"{where}: {name}'s {said} comes after session {before[-1][1]}, run {before[-1][2]}, trial "
                          f"{before[-1][3]}, wanted the order of presentation, which is that of the rows of its betas")


def check_split(file, subject):
    """Raise UserError unless a subject has test images, and two images at least to train and validate on."""
    ids, is_test = subject.image_ids, subject.is_test
    counts = [len(np.unique(ids[part])) for part in (is_test, ~is_test)]
    if counts[0] < 1 or counts[1] < 3:
        raise utils.UserError(f"{file}: {subject.name} has {counts[0]} test images (is_test 1) and {counts[1]} others, "
                              "wanted at least 1 and 3; mark the images to test on, or leave the subject out")


def numbers_of(names):
    """Number subjects, {name: 'subj01'}, in the order of the numbers: as their names end, where they end in numbers
    1..99 that differ, else from 1 in the order of their names."""
    ends = {name: int(found[0]) for name in names if (found := re.search(r"\d{1,9}$", name))}
    if len(ends) < len(names) or len(set(ends.values())) < len(names) or not all(1 <= n <= 99 for n in ends.values()):
        ends = {name: n for n, name in enumerate(sorted(names), 1)}
    if len(names) > 99:
        raise utils.UserError(f"trials.csv: {len(names)} subjects found, wanted at most 99; import them in parts")
    return {name: f"subj{n:02d}" for name, n in sorted(ends.items(), key=lambda item: item[1])}


def read_captions(file, number_of):
    """Read captions.csv, where it is there: {image id: [caption, ...]}."""
    captions = {}
    if not file.exists():
        return captions
    for where, line in read_table(file, ("image", "caption"), "the captions"):
        if not line["caption"]:
            raise utils.UserError(f"{where}: no caption of {line['image']!r} found, wanted a sentence; leave the line "
                                  "out, and --caption_model of img2feat.py can write one")
        captions.setdefault(image_id_of(where, line["image"], number_of), []).append(line["caption"])
    return captions
