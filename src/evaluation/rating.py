"""Rating by people: blinded trials, which of two pictures is nearer to the seen one; their page and its answers.

A trial shows the seen picture, the reconstruction and another set's picture of the same image, in an order and on sides
that the seed draws. The page does not say which is which, nor does the file that it saves: a trial, the side chosen and
the page's hash. evaluate.py draws order and sides again and resolves the answers.
"""

import hashlib
from functools import partial
from typing import NamedTuple

import numpy as np

import utils
from disk.files import atomic_path, load_json
from evaluation.decoded import ratio
from evaluation.gallery import remove_others, save_copy
from evaluation.measuring import summarise
from evaluation.pages import render

MOST = 200  # trials of a page
SIDES = ("left", "right")
LARGEST = 512  # pixels


class Trials(NamedTuple):
    """The trials of a page, one after the other."""

    images: np.ndarray  # (T,) which image, by its number
    left: np.ndarray  # (T,) bool: the reconstruction stands on the left
    page: str  # hash of these and of all pictures

    @classmethod
    def draw(cls, seen, made, other, seed):
        """Of three PictureSets of the same images: in random order, the reconstruction half of the time on the left."""
        rng = np.random.default_rng(seed)
        images = rng.permutation(len(seen.image_ids))[:MOST]
        left = rng.permutation(len(images)) % 2 == 0
        parts = [seen.image_ids.tobytes(), images.tobytes(), left.tobytes(),
                 *(pictures.key().encode() for pictures in (seen, made, other))]
        return cls(images, left, hashlib.sha256(b"".join(parts)).hexdigest()[:16])


def write_page(folder, seen, made, other, seed, paths):
    """Write a rating page into `folder`: index.html and its pictures, first samples, all of one size and format."""
    trials = Trials.draw(seen, made, other, seed)
    side = min(LARGEST, *(max(pictures.read(0, 0).shape) for pictures in (seen, made, other)))
    names = []
    for t, (i, left) in enumerate(zip(trials.images, trials.left, strict=True)):
        shown = {"seen": seen, "left": made if left else other, "right": other if left else made}
        names.append({where: f"pictures/{t:03d}_{where}.webp" for where in shown})
        for where, pictures in shown.items():
            save_copy(pictures.read(i, 0), folder / names[-1][where], side)
    remove_others(folder, {name for trial in names for name in trial.values()})
    page = render("rating", paths, data={"page": trials.page, "trials": names})
    with atomic_path(folder / "index.html") as temporary:
        temporary.write_text(page)


def load_answers(files):
    """Read files that rating pages saved: [(file, page's hash, {trial: side})]. Raises UserError for what is none."""
    found = []
    for file in files:
        answers = load_json(file, "answers of a rating page", "save them from its page")
        page, trials = answers.get("page"), answers.get("trials")
        try:
            sides = {trial["trial"]: trial["side"] for trial in trials}
            whole = isinstance(page, str) and len(sides) == len(trials) > 0 and set(sides.values()) <= set(SIDES)
            whole = whole and all(type(trial) is int for trial in sides)
        except (TypeError, KeyError):
            whole = False
        if not whole:
            raise utils.UserError(f"--ratings {file}: wanted a page and its trials, each once, with side left or "
                                  "right; save the answers from the rating page again")
        if (page, sides) in [known[1:] for known in found]:
            raise utils.UserError(f"--ratings {file}: the same answers as in another file; give each person's once")
        found.append((file, page, sides))
    return found


def resolve(answers, seen, made, others, seed):
    """How often people chose the reconstruction, {label: entry of metrics.json, with "trials" and "raters"}.

    answers: of load_answers, a file for each person; others: {label: PictureSet} that pages may show beside the
    reconstructions. n counts images: where several people saw one, its answers are drawn together (bootstrap over
    images); one person's choices have the exact interval.
    """
    if not answers:
        return {}
    pages = {(trials := Trials.draw(seen, made, other, seed)).page: (label, trials) for label, other in others.items()}
    chosen, shown, raters = {}, {}, {}
    for file, page, sides in answers:
        if page not in pages:
            there = ", ".join(others) or "a compared set"
            raise utils.UserError(f"--ratings {file}: answers to page {page}, wanted that of {there} with these "
                                  "pictures; give --images, --compare and --seed as when it was written")
        label, trials = pages[page]
        if not 0 <= min(sides) <= max(sides) < len(trials.images):
            raise utils.UserError(f"--ratings {file}: trials {min(sides)}..{max(sides)}, wanted 0.."
                                  f"{len(trials.images) - 1}; save the answers from the rating page again")
        for counts in (chosen, shown):
            counts.setdefault(label, np.zeros(len(seen.image_ids)))
        raters[label] = raters.get(label, 0) + 1
        for trial, side in sides.items():
            shown[label][trials.images[trial]] += 1
            chosen[label][trials.images[trial]] += (side == "left") == trials.left[trial]
    return {label: share(chosen[label], shown[label], seed) | {"raters": raters[label]} for label in chosen}


def share(chosen, shown, seed):
    """The share of choices, as an entry of metrics.json; chosen, shown (N,): how often, of each image."""
    rated = shown > 0
    chosen, shown = chosen[rated], shown[rated]
    entry = summarise(partial(ratio, chosen, shown), len(shown), seed, chosen / shown)
    return entry | {"trials": int(shown.sum())}
