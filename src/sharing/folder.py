"""The folder that trained decoders are shared in, an export: written whole, and believed only when it was checked.

    config.json                  what is inside, and the SHA-256 of the files below
    README.md                    the model card, for people: it may be edited
    runs/<run>.safetensors       tensors of a run's checkpoint, and of the adapter's
    features/<feat>.safetensors  mean (F,), basis (K, F) and variances (K,) of its components; errors (K + 1,) of the
                                 predicted coefficients on validation images; of z also the statistics that it is
                                 brought to (training.latent_statistics), each (4, h, w)

No file is a pickle, and none but those that config.json lists is read. docs/sharing.md says what config.json holds.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import options
from disk.checkpoints import RUN_KEYS, require_keys
from disk.files import file_hash, load_json, save_json, temporary_of
from disk.hub import require_model, snapshot
from models import adapter_feats
from nsd.components import Basis
from utils import UserError, refusal

FORMAT = "brain decoder 1"
TENSOR = "tensor"  # stands, with its name, where a state of JSON types had a tensor
OWN = {"config.json", "README.md", "runs", "features"}
HUB_FILES = ["config.json", "runs/*.safetensors", "features/*.safetensors"]
STATISTICS = ("predictions_mean", "predictions_std", "latents_mean", "latents_std")  # of z


@dataclass(frozen=True)
class Export:
    """An export that was checked: `folder`, and what its config.json says."""

    folder: Path
    config: dict

    def tensors(self, file):
        """Read one of its files, {name: tensor}."""
        try:
            return load_file(self.folder / file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.folder / file}: not a readable safetensors file ({error}); fetch the export "
                            "again") from None

    @property
    def adapter(self):
        """What config.json says of the adapter, None where there is none."""
        return self.config.get("adapter")

    @property
    def entries(self):
        """What config.json says of every run, the adapter among them."""
        return entries_of(self.config)

    def state(self, run):
        """Return what the checkpoint of a run held, or that of the adapter."""
        entry = self.entries[run]
        file, tensors = self.folder / entry["file"], self.tensors(entry["file"])
        state = put_together(entry["state"], tensors)
        if tensors:
            raise UserError(f"{file}: holds tensors that config.json does not name ({', '.join(tensors)[:100]}), "
                            "wanted those of the run alone; export it again")
        require_keys(state, file, RUN_KEYS, "export", "export it again")
        return state

    def feature(self, feat):
        """Return (Basis of a feature, or None; its other tensors, {name: array})."""
        entry = self.config["features"][feat]
        if entry["file"] is None:
            return None, {}
        found = {name: tensor.numpy() for name, tensor in self.tensors(entry["file"]).items()}
        if entry["components"] is None:
            return None, found
        try:
            known = {name: entry["components"][name] for name in ("shape", "total", "digest")}
            return Basis(feat, *(found.pop(name) for name in ("mean", "basis", "variances")), **known), found
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{self.folder / entry['file']}: not the components of {feat} ({error}); export them "
                            "again") from None


# --- writing --------------------------------------------------------------------------------------------------------


def check_place(folder, overwrite=False):
    """Raise UserError unless an export may be written to a folder: a new or empty one, or, to overwrite, an export."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, wanted a new folder; choose another")
    if folder.exists() and any(folder.iterdir()):
        others = sorted({path.name for path in folder.iterdir()} - OWN)
        if others or not is_export(folder):  # such as .git, which would be gone with the rest
            found = ", ".join(others[:4]) or "another config.json"
            raise UserError(f"{folder}: holds other things than an export ({found}), wanted a new folder; choose "
                            "another")
        if not overwrite:
            raise UserError(f"{folder}: holds an export already; --overwrite replaces it, or choose another folder")


def is_export(folder):
    """Say whether a folder holds an export, whole or not."""
    try:
        return load_json(folder / "config.json").get("format") == FORMAT
    except UserError:  # no such file, or no JSON
        return False


def write_export(folder, config, files, card, overwrite=False):
    """Write an export, all of it or nothing.

    config: what config.json says, but for the files' hashes; files: {name: {name: tensor}}; card: the text of
    README.md. Raises UserError for a folder that is in use, or a disk that refuses.
    """
    check_place(folder, overwrite)
    temporary = temporary_of(folder)
    try:
        hashes = {}
        for name, tensors in files.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary / name, {"format": "pt"})
            hashes[name] = file_hash(temporary / name, digits=None)
        config = {"format": FORMAT, **config, "files": hashes}
        save_json(temporary / "config.json", {**config, "digest": digest_of(config)})
        (temporary / "README.md").write_text(card)
        for name in files:  # safetensors writes them for their owner alone
            (temporary / name).chmod(stat.S_IMODE((temporary / "README.md").stat().st_mode))
        put_in_place(temporary, folder)
    except (SafetensorError, OSError) as error:
        reason = refusal(error) if isinstance(error, OSError) else f"{error}; make room on the disk"
        raise UserError(f"{folder}: could not be written: {reason}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_in_place(temporary, folder):
    """Rename a folder to where another may be, which is then gone; where that fails it is back."""
    before = temporary.with_name(f"{temporary.name}.before")
    if folder.exists():
        os.replace(folder, before)
    try:
        os.replace(temporary, folder)
    except OSError:
        if before.exists():
            os.replace(before, folder)
        raise
    shutil.rmtree(before, ignore_errors=True)


def digest_of(config):
    """Return the SHA-256 of what config.json says, its own line aside."""
    config = {key: value for key, value in config.items() if key != "digest"}
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def take_apart(state, tensors, name=""):
    """Return a state of tensors and JSON types without its tensors, which go to {name: tensor}."""
    if isinstance(state, torch.Tensor):
        tensors[name] = state
        return {TENSOR: name}
    if isinstance(state, dict):
        return {key: take_apart(value, tensors, f"{name}/{key}" if name else key) for key, value in state.items()}
    return state


def put_together(state, tensors):
    """Undo take_apart; takes what it uses out of `tensors`, and raises UserError for one that is not there."""
    if isinstance(state, dict) and list(state) == [TENSOR]:
        if str(state[TENSOR]) not in tensors:
            raise UserError(f"config.json of the export: names the tensor {state[TENSOR]}, which no file of that run "
                            "has; export it again")
        return tensors.pop(state[TENSOR])
    if isinstance(state, dict):
        return {key: put_together(value, tensors) for key, value in state.items()}
    return state


# --- reading --------------------------------------------------------------------------------------------------------


def open_export(name, flag="FOLDER"):
    """Find an export and check all of it; returns an Export. Nothing is unpacked or run.

    name: a folder, or an id on the Hugging Face hub; flag: what the user named it by. Raises UserError for what is
    neither; for a folder that is no export; for a file that is missing, lies elsewhere or is a link; and for one whose
    hash is another.
    """
    folder, within = find_folder(str(name), flag)
    config_file = regular_file(folder, "config.json", within)
    if config_file is None:
        raise UserError(f"{flag} {name}: is no export, it has no config.json; give a folder that share.py export wrote")
    config = load_json(config_file, "export", "fetch the export again")
    if config.get("format") != FORMAT:
        raise UserError(f"{config_file}: of format {config.get('format')!r}, wanted {FORMAT!r}; give a folder that "
                        "share.py export wrote")
    if config.get("digest") != digest_of(config):
        raise UserError(f"{config_file}: its hash does not match what it says, it was changed or cut; fetch the export "
                        "again")
    try:
        check_config(config)
    except (KeyError, TypeError, ValueError, AttributeError, argparse.ArgumentTypeError) as error:
        raise UserError(f"{config_file}: not what an export says ({type(error).__name__}: {error}); export it "
                        "again") from None
    for file, wanted in config["files"].items():
        path = regular_file(folder, file, within)
        if path is None:
            raise UserError(f"{folder / file}: missing, config.json lists it; fetch the export again")
        if file_hash(path, digits=None) != wanted:
            raise UserError(f"{path}: its hash does not match the one in config.json, it was changed or cut; fetch the "
                            "export again")
    return Export(folder, config)


def find_folder(name, flag):
    """Return (folder of an export, where its files may lie): of the hub's cache, which is made of links, all of it."""
    if Path(name).is_dir():
        return Path(name), None
    require_model(name, flag, "the id of an export on the hub")
    from huggingface_hub.errors import HTTPError

    try:
        folder = snapshot(name, HUB_FILES, {})
    except (OSError, ValueError, HTTPError) as error:
        raise UserError(f"{flag} {name}: could not be fetched ({str(error).splitlines()[0]}); give the folder or hub "
                        "id of an export") from None
    return folder, folder.parent.parent.resolve()


def regular_file(folder, name, within=None):
    """Return the path of a file of an export, None where there is none.

    Raises UserError for a name that leads elsewhere, and for a link; but one that leads into the folder `within`.
    """
    path = folder / safe(folder, name)
    links = [part for part in (path, *path.parents) if part != folder and part.is_relative_to(folder)
             and part.is_symlink()]
    if links and not (within and path.resolve().is_relative_to(within)):
        raise UserError(f"{links[0]}: is a link, wanted a file or folder of the export itself; fetch the export again")
    return path if path.is_file() else None


def safe(folder, name):
    """Return the name of a file in an export; UserError for one that could lead out of it."""
    parts = PurePosixPath(name).parts
    if not re.fullmatch(r"[\w.=-]+(/[\w.=-]+)*", name) or any(part.startswith(".") for part in parts):
        raise UserError(f"{folder / 'config.json'}: names the file {name!r}, which could lead out of the export; "
                        "wanted a name such as runs/NAME.safetensors; do not use this export")
    return name


def entries_of(config):
    """What config.json says of every run, {run: entry}, the adapter among them."""
    adapter = config.get("adapter")
    return config["runs"] | ({adapter["run"]: adapter} if adapter is not None else {})


def check_config(config):
    """Raise an error of Python's unless config.json has what readers use."""
    def require(found, wanted):
        if not found:
            raise ValueError(f"wanted {wanted}")

    files = config["files"]
    unsafe = [file for file in files if not file.endswith(".safetensors")]
    require(not unsafe, f"safetensors files alone, found {unsafe[:1]}")
    subj, flags = config["subj"], config["flags"]
    require(re.fullmatch(r"subj(0[1-9]|[1-9]\d)", subj), "a subject")
    require(isinstance(config["n_voxels"], int), "a number of voxels")
    require(isinstance(config["protocol"]["betas"], str), "a hash of the responses")
    require(options.run(flags["run"]) != "ground_truth" and options.tag(flags["tag"]) == flags["tag"], "a run's flags")
    held_out = flags.get("hold_out")
    require(held_out is None or options.hold_out(held_out) == held_out, "a cluster that was held out")
    require(isinstance(flags["hidden_dim"], int), "a width")
    require(isinstance(flags["num_sessions"], int), "a number of sessions")
    require(config["runs"] and config["features"], "a run and a feature")
    adapter = config.get("adapter")
    if adapter is not None:
        known = adapter["state"]["model_args"]
        require(known["kind"] == "adapter" and adapter["run"] not in config["runs"], "an adapter")
        require(set(adapter_feats(known["layers"])) <= config["features"].keys(), "the features of the adapter")
    for run, entry in entries_of(config).items():
        require(re.fullmatch(r"\w[\w.=-]*", run), f"names of runs, found {run!r}")
        require(entry["file"] in files, f"a file of the run {run}")
        require(entry["commit"] is None or isinstance(entry["commit"], str), f"a commit of {run}")
        state = entry["state"]
        require(state["config"]["run"] == run and isinstance(state["model_args"], dict), f"the state of {run}")
        require(all(isinstance(n, int) for n in state["n_voxels"].values()), f"voxel counts of {run}")
    for feat, entry in config["features"].items():
        require(options.feature(feat) == feat and entry["run"] in config["runs"], f"a run of {feat}")
        require(entry["ridge"] is None or entry["ridge"] in config["runs"], f"a ridge of {feat}")
        require(entry["file"] is None or entry["file"] in files, f"a file of {feat}")
        known = config["runs"][entry["run"]]["state"]
        require(isinstance(entry["weight"], float) and known["n_voxels"][entry["whose"]] == config["n_voxels"],
                f"a weight and a voxel encoder of {feat}")
        if "components" in known["model_args"]:
            require(feat in known["model_args"]["components"] and isinstance(entry["components"]["digest"], str),
                    f"components of {feat}")
