"""Ways to break a world (whole_world.World): each function makes a damage, a function of the world.

What is damaged is a new file, never the old one overwritten: a script that was refused may still hold that one open.
"""

import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import scipy.io
import torch

from disk import files
from disk.files import load_json, save_json
from disk.names import Paths
from nsd.trials import read_shard
from published_gnet import published_gnet
from tiny_brain import LABELS, write_volumes
from tiny_nsd import SHARED, write_tar
from whole_world import DATA, IMAGES, SHARDS


def whole(world):
    """Nothing is broken, or the flags are."""


def volumes(labels=LABELS, **how):
    """NSD's ROI volumes of subject 1 beside the masks; how: as write_volumes takes it."""
    return lambda world: write_volumes(Paths(world.root, world.root / DATA), "subj01", labels, **how)


def both(*damages):
    return lambda world: [damage(world) for damage in damages]


def renewed(path):
    """The path of a file, which is now a copy of itself."""
    copy = path.with_name("copy")
    shutil.copy2(path, copy)
    return copy.replace(path)


def without(name):
    def damage(world):
        path = world.root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return damage


def cut(name, keep):
    """Only the first bytes are left (all but the last, if negative)."""
    def damage(world):
        content = (world.root / name).read_bytes()
        renewed(world.root / name).write_bytes(content[:keep])
    return damage


def text(name, content):
    """Another content; bytes or str."""
    def damage(world):
        path = world.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return damage


def a_file_at(name):
    """A file where a folder should be: what cannot be written to, whoever runs the tests."""
    def damage(world):
        shutil.rmtree(world.root / name, ignore_errors=True)
        (world.root / name).write_text("not a folder")
    return damage


def a_folder_at(name):
    def damage(world):
        without(name)(world)
        (world.root / name).mkdir()
    return damage


def hdf5(name, change, key=None):
    """The data set replaced by change(array), under another key if one is given."""
    def damage(world):
        with h5py.File(renewed(world.root / name), "r+") as file:
            (old,) = file
            array, attributes = file[old][()], dict(file[old].attrs)
            del file[old]
            array = change(array)
            if array is None:
                file.create_group(key or old)
            else:
                file[key or old] = array
                file[key or old].attrs.update(attributes)
    return damage


def npy(name, change):
    def damage(world):
        array = change(np.load(world.root / name))
        np.save(renewed(world.root / name), array, allow_pickle=True)
    return damage


def put(array, index, value):
    """The array with one value replaced."""
    array = array.copy()
    array[index] = value
    return array


def js(name, **changes):
    """Some values of a JSON file replaced."""
    return lambda world: save_json(world.root / name, load_json(world.root / name) | changes)


def index(old, new):
    """A piece of index.csv replaced."""
    def damage(world):
        file = renewed(world.root / IMAGES / "index.csv")
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new, 1))
    return damage


def checkpoint(name, change):
    """A checkpoint after change(dict), which may return what to save instead."""
    def damage(world):
        state = torch.load(world.root / name, weights_only=True)
        changed = change(state)
        torch.save(state if changed is None else changed, renewed(world.root / name))
    return damage


class Program:
    """A pickle of this makes a folder where it is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def hostile_checkpoint(name):
    """A checkpoint that carries a program."""
    return lambda world: checkpoint(name, lambda state: {**state, "extra": Program(world.root / "executed")})(world)


def hostile_npy(name):
    """An array that carries a program."""
    return lambda world: np.save(renewed(world.root / name), np.array([Program(world.root / "executed")] * 4, object),
                                 allow_pickle=True)


def shard(name, change):
    """A shard of other trials: change(behav (trials, 17))."""
    def damage(world):
        trials = change(read_shard(world.root / SHARDS / name))
        write_tar(renewed(world.root / SHARDS / name), trials)
    return damage


def another_design(world):
    """The experiment's design says that other images were shown to subject 1."""
    file = renewed(world.root / "nsddata/experiments/nsd/nsd_expdesign.mat")
    design = scipy.io.loadmat(file)
    design["subjectim"][0] += 1
    scipy.io.savemat(file, {key: design[key] for key in ("masterordering", "subjectim")})


def full_disk(*names):
    """Files of these names (glob) find no room: the real error of the real device that is always full."""
    def damage(world):
        temporary_of = files.temporary_of

        def without_room(path):
            temporary = temporary_of(path)
            if any(path.match(name) for name in names):
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary.symlink_to("/dev/full")
            return temporary

        world.patch.setattr("disk.files.temporary_of", without_room)
    return damage


def denied(folder):
    """Nothing can be made in a folder."""
    def damage(world):
        mkdir = Path.mkdir

        def refuse(path, *args, **kwargs):
            if (world.root / folder) in [path, *path.parents] and not path.exists():
                raise PermissionError(13, "Permission denied", str(path))
            mkdir(path, *args, **kwargs)

        world.patch.setattr(Path, "mkdir", refuse)
    return damage


def of_published(change):
    """The published GNet's file, after change(dict)."""
    def damage(world):
        published = published_gnet()
        changed = change(published)
        torch.save(published if changed is None else changed, world.root / DATA / "gnet_multisubject.pt")
    return damage


def without_shape(name):
    """A feature that does not say its shape."""
    def damage(world):
        with h5py.File(renewed(world.root / name), "r+") as file:
            del file["data"].attrs["shape"]
    return damage


def masks(mask):
    """Another V1 of subject 1."""
    def damage(world):
        with h5py.File(renewed(world.root / DATA / "brain_region_masks.hdf5"), "r+") as file:
            del file["subj01/V1"]
            file["subj01/V1"] = mask
    return damage


def target(shape, dtype=np.float32, ids=SHARED):
    """A file t.npy of responses to reach."""
    def damage(world):
        np.save(world.root / "t.npy", np.zeros(shape, dtype))
        np.save(world.root / "image_ids.npy", ids)
    return damage


def sd_without_weights(world):
    """A Stable Diffusion folder whose UNet has no weights."""
    shutil.copytree(world.models[0], world.root / "sd")
    for file in (world.root / "sd/unet").glob("*.safetensors"):
        file.write_bytes(b"")
