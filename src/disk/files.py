"""Write files that are whole or absent; read them with one clear line where they are not what they should be."""

import csv
import hashlib
import json
import os
import socket
import zipfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from utils import UserError, refusal, require


@contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`; rename it into place on success, remove it on failure.

    Raises UserError when the disk refuses; `path` is then unchanged.
    """
    path = Path(path)
    temporary = temporary_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: could not be written: {refusal(error)}") from error


def temporary_of(path):
    """Return where a file is written until it is whole: beside it, named after this host and process."""
    return path.with_name(f".{path.name}.{this_host()}.{os.getpid()}.tmp")


def remove_leftovers(folder):
    """Remove the temporary files of atomic_path whose process, on this host, is gone: killed while it wrote."""
    for file in Path(folder).glob(f".*.{this_host()}.*.tmp"):
        try:
            os.kill(int(file.name.split(".")[-2]), 0)  # signal 0 only asks whether there is such a process
        except ProcessLookupError:
            file.unlink(missing_ok=True)
        except (ValueError, OSError):  # not one of ours, or another user's process
            pass


def this_host():
    """Return this machine's name, as it stands in the names of temporary files."""
    return socket.gethostname().replace(".", "-")


def save_together(files):
    """Write several files, {path: function of the path to write to}.

    Those that are there stay until the disk has taken all of the new ones, which then come into place one by one, the
    first of `files` last.
    """
    with ExitStack() as places:
        for path, write in files.items():
            write(places.enter_context(atomic_path(path)))


def write_json(value):
    """Return a function that writes a value to a path (for save_together)."""
    return lambda path: path.write_text(json.dumps(value, indent=1) + "\n")


def save_json(path, value):
    """Write a value of JSON types atomically."""
    save_together({path: write_json(value)})


def load_json(path, what="file", hint="run the stage that writes it", kind=dict):
    """Read a JSON file that holds an object (kind=dict) or a list; UserError if it is missing or is anything else."""
    try:
        value = json.loads(require(path, what, hint).read_text())
    except ValueError as error:  # no JSON, or no text
        raise UserError(f"{path}: not valid JSON ({error}); delete it and run the stage that writes it again") from None
    if not isinstance(value, kind):
        wanted = "an object" if kind is dict else "a list"
        raise UserError(f"{path}: holds a {type(value).__name__}, wanted {wanted}; delete it and {hint}")
    return value


def write_npy(array):
    """Return a function that writes an array to a path (for save_together)."""
    def write(path):
        with open(path, "wb") as file:
            np.save(file, array)
    return write


def load_npy(path, what, hint, mmap_mode=None):
    """Load an array (mmap_mode='r': as a map of the file), never a pickle; UserError if it is missing or damaged."""
    try:
        array = np.load(require(path, what, hint), allow_pickle=False, mmap_mode=mmap_mode)
        if not isinstance(array, np.ndarray):
            array.close()
            raise ValueError("it is an archive of arrays")
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a readable .npy file ({error}); delete it and {hint}") from None
    return array


def write_csv(rows):
    """Return a function that writes a list of equal-keyed dicts to a path (for save_together)."""
    def write(path):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return write


def save_csv(path, rows):
    """Write a list of equal-keyed dicts atomically, under a header."""
    save_together({path: write_csv(rows)})


def load_csv(path, what, hint):
    """Read a table as a list of dicts of str; UserError if it is missing or not text."""
    try:
        with open(require(path, what, hint), newline="") as file:
            return list(csv.DictReader(file))
    except (ValueError, csv.Error) as error:  # no text
        raise UserError(f"{path}: not a readable .csv file ({error}); delete it and {hint}") from None


def file_hash(path, algorithm="sha256", digits=12):
    """Return the first hex digits (None: all) of a file's hash, which say what made an artefact."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:digits]


def archive_hash(path, digits=12):
    """Return the first hex digits of a hash of what a checkpoint holds, in a millisecond: it is a zip archive, which
    lists the size and the checksum (CRC-32) of each tensor.

    Equal contents have equal hashes, whatever name the archive had when it was written. Of another file: file_hash.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [(member.filename.partition("/")[2], member.file_size, member.CRC) for member in
                       archive.infolist()]
    except zipfile.BadZipFile:
        return file_hash(path, digits=digits)
    return hashlib.sha256(repr(members).encode()).hexdigest()[:digits]
