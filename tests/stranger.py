"""A stranger's data set, written by one who knows docs/own_data.md and nothing else of this project.

    python tests/stranger.py FOLDER
"""

import csv
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SUBJECTS = ["anna", "ben"]
N_IMAGES, N_TEST, N_VOXELS = 120, 20, 300
REPEATS, SESSIONS, RUNS = 2, 4, 3
WORDS = {"circle": "a circle", "square": "a square"}
COLOURS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (50, 70, 200), "grey": (120, 120, 120)}


def draw(rng, side=96):
    """One picture, what it shows as a sentence, and as numbers."""
    shape, colour = rng.choice(list(WORDS)), rng.choice(list(COLOURS))
    x, y, size = rng.uniform(0.25, 0.75, 2).tolist() + [rng.uniform(0.1, 0.25)]
    picture = Image.new("RGB", (side, side), (235, 230, 220))
    box = [side * (x - size), side * (y - size), side * (x + size), side * (y + size)]
    getattr(ImageDraw.Draw(picture), {"circle": "ellipse", "square": "rectangle"}[shape])(box, fill=COLOURS[colour])
    number = np.array([x, y, size, shape == "circle", *(np.array(COLOURS[colour]) / 255)])
    return picture, f"{WORDS[shape]} in {colour}", number


def main(folder, seed=0):
    folder = Path(folder)
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    names, seen = [], []
    with open(folder / "captions.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption"])
        for i in range(N_IMAGES):
            picture, caption, number = draw(rng)
            name = f"drawing {i:03d}.png"
            picture.save(folder / "images" / name)
            names.append(name)
            seen.append(number)
            table.writerow([name, caption])
    seen = np.array(seen)
    seen = (seen - seen.mean(0)) / seen.std(0)
    is_test = np.arange(N_IMAGES) % (N_IMAGES // N_TEST) == 0
    with open(folder / "trials.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "subject", "session", "run", "trial", "is_test"])
        for subject in SUBJECTS:
            order = rng.permutation(np.repeat(np.arange(N_IMAGES), REPEATS))
            per_run = len(order) // (SESSIONS * RUNS)
            for t, i in enumerate(order):
                run, trial = t // per_run, t % per_run
                table.writerow([names[i], subject, run // RUNS + 1, run % RUNS + 1, trial + 1, int(is_test[i])])
            weights = rng.standard_normal((seen.shape[1], N_VOXELS))
            noise = rng.standard_normal((len(order), N_VOXELS))
            betas = seen[order] @ weights / np.sqrt(seen.shape[1]) + noise
            np.save(folder / f"betas_{subject}.npy", (3 * betas + 20).astype(np.float32))
            regions = folder / f"regions_{subject}"
            regions.mkdir()
            for n, region in enumerate(["V1", "V4", "higher_vis"]):
                np.save(regions / f"{region}.npy", np.arange(N_VOXELS) // 100 == n)


if __name__ == "__main__":
    main(sys.argv[1])
