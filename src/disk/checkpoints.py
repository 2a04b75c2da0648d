"""Checkpoints: tensors and JSON types in one file, written whole, read without running what a pickle may hold."""

import sys

import torch

from disk.files import atomic_path
from utils import UserError, require

CHECKPOINT_FORMAT = 2
RUN_KEYS = ("model", "model_args", "config", "n_voxels")  # what scoring needs of a run's checkpoint


def save_checkpoint(path, state):
    """Write a checkpoint (tensors and JSON types only) atomically: the old file stays until the new one is whole."""
    with atomic_path(path) as temporary:
        write_checkpoint(state, path)(temporary)


def write_checkpoint(state, path):
    """Return a function that writes a checkpoint to a path (for save_together); `path`: where it will lie at last."""
    def write(temporary):
        try:
            torch.save({"format": CHECKPOINT_FORMAT, **in_one_form(state)}, temporary)
        except RuntimeError as error:  # torch's word for a disk that takes no more
            kept = "the previous one is intact; " if path.exists() else ""
            raise UserError(f"{path}: could not be written ({str(error).splitlines()[0]}); {kept}make room on the "
                            "disk, then run the same command again (a training with --resume)") from error
    return write


def in_one_form(value):
    """Return a copy of a state whose file depends on nothing but what it holds: archive_hash then says the same of it.

    A file also tells apart kinds of dict, and equal words that are two objects in memory.
    """
    if isinstance(value, dict):
        return {in_one_form(key): in_one_form(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(in_one_form, value))
    return sys.intern(value) if type(value) is str else value


def load_checkpoint(path, what="checkpoint", hint="train it first (bash scripts/train.sh)", keys=RUN_KEYS):
    """Read a checkpoint with weights_only=True, its tensors mapped from the file; returns the dict that was saved.

    what, hint: words for the UserError that a missing, damaged or foreign file raises, or one that lacks any of `keys`.
    """
    require(path, what, hint)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many types for damaged files
        first_line = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable {what} ({first_line}); delete it and {hint}") from None
    if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise UserError(f"{path}: {what} of format {found}, wanted {CHECKPOINT_FORMAT}; {hint}")
    require_keys(state, path, keys, what, hint)
    return state


def require_keys(state, path, keys, what="checkpoint", hint="train it again"):
    """Raise UserError, as load_checkpoint does, unless the checkpoint `state` has all of `keys`."""
    lacking = [key for key in keys if key not in state]
    if lacking:
        raise UserError(f"{path}: {what} without {', '.join(lacking)}, wanted {', '.join(keys)}; delete it and {hint}")
