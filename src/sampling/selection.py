"""Choosing among several pictures of an image: the one that explains best what was measured."""

import shutil
from collections import defaultdict

import numpy as np
import torch

import utils
from disk.files import atomic_path, load_csv, save_csv
from sampling import folders
from sampling.inputs import as_float

AT_ONCE = 50  # pictures that are judged together


def select(drawn, folder, n_samples, misfit, by, config, overwrite=False):
    """Copy the best of the first `n_samples` pictures of each image from `drawn`, recon.py's folder, to `folder`.

    misfit: (rows (B,), images (B, 3, H, W) in [0, 1]) -> (B,), what the best has least of; by: its name. Images that do
    not have as many pictures yet are left out. index.csv says which picture of each it is, and the misfit of all of
    them. What `folder` holds is of `config` or may be overwritten: folders.check_folder, before anything is drawn.
    """
    candidates = defaultdict(list)
    for line in load_csv(drawn / "index.csv", "the list of pictures", "draw them (bash scripts/recon.sh)"):
        if int(line["sample"]) < n_samples:
            candidates[int(line["row"])].append(line)
    pictures = [line for lines in candidates.values() if len(lines) == n_samples for line in lines]  # n_samples of each
    misfits = measure(drawn, pictures, misfit).reshape(-1, n_samples)  # (images, n_samples)
    folders.clear_folder(folder, config, overwrite)
    index = []
    for i, (found, best) in enumerate(zip(misfits, misfits.argmin(1), strict=True)):
        line = pictures[i * n_samples + best]
        name = folders.file_name(int(line["row"]), 0)
        with atomic_path(folder / name) as temporary:
            shutil.copyfile(drawn / line["file"], temporary)
        index.append({**line, "file": name, "selected_by": by, "misfits": " ".join(f"{value:.6g}" for value in found)})
    save_csv(folder / "index.csv", index)
    print(f"{folder}: of {len(index)} images the best of {n_samples} pictures, by {by}; all of them are in {drawn}")


def measure(folder, pictures, misfit):
    """The misfit of every listed picture (lines of index.csv), (n,)."""
    found = []
    for start in utils.progress(range(0, len(pictures), AT_ONCE), desc="select"):
        lines = pictures[start:start + AT_ONCE]
        images = as_float(np.stack([folders.read_png(folder / line["file"]) for line in lines]))
        with torch.inference_mode():
            found.append(misfit([int(line["row"]) for line in lines], images).cpu())
    return torch.cat(found).numpy() if found else np.zeros(0)
