"""From an export to runs of another root, which score scripts take as their own."""

import torch

import utils
from disk.checkpoints import CHECKPOINT_FORMAT, load_checkpoint, write_checkpoint
from disk.files import save_together, write_json
from disk.hints import how_to_score
from models import restore
from nsd.components import open_components
from nsd.rows import open_betas, sample_hash
from sampling.adapter import restore_adapter
from sharing.folder import open_export, take_apart


def import_runs(paths, name, overwrite=False):
    """Check an export and write its runs to train_logs/, all of them or none; prints what came.

    name: a folder or hub id. The root must have the components that the runs were trained on; where it has the
    subject's responses, these must be the same, too. A run that is there already is kept where it is the same. Raises
    UserError for what does not fit, or is there and another (without overwrite).
    """
    export = open_export(name)
    entries = export.entries
    states = {run: export.state(run) for run in entries}
    for run, state in states.items():  # all weights are there, and fit
        (restore_adapter if is_adapter(state) else restore)(state, export.folder / entries[run]["file"])
    check_root(paths, export)
    files, kept = {}, []
    for run, state in states.items():
        file = paths.run(run) / checkpoint_of(state)
        if file.exists() and not overwrite:
            if not same(load_checkpoint(file), state):
                raise utils.UserError(f"{paths.run(run)}: is another run of the same name; --overwrite replaces it, or "
                                      "move it away")
            kept.append(run)
            continue
        commit = entries[run]["commit"]
        files[file] = write_checkpoint(state, file)
        files[file.parent / "config.json"] = write_json(state["config"] | ({"git_commit": commit} if commit else {}))
    save_together(files)
    for run in states.keys() - kept:  # of another run, which was overwritten
        for name in {"last.pth", "best.pth", "metrics.jsonl"} - {checkpoint_of(states[run])}:
            (paths.run(run) / name).unlink(missing_ok=True)
    for run in states:
        print(f"{paths.run(run)}: {'is there already, kept' if run in kept else 'imported'}")
    flags = {"head": None, "test_split": "new_test", "repeats": "mean", "control": None, **export.config["flags"],
             "subj": export.config["subj"]}
    print(f"next: {how_to_score(paths, flags, next(iter(export.config['features'])))}")


def is_adapter(state):
    """Say whether a run's state is that of an adapter."""
    return state["model_args"]["kind"] == "adapter"


def checkpoint_of(state):
    """The name of the checkpoint that is used of a run: its best epoch of an adapter, its last of a decoder."""
    return "best.pth" if is_adapter(state) else "last.pth"


def check_root(paths, export):
    """Raise UserError unless a root has what an export's runs were trained on: components, and responses if any."""
    config, subj = export.config, export.config["subj"]
    if paths.betas(subj).exists():
        betas = open_betas(paths, subj)
        if betas.shape[1] != config["n_voxels"]:
            raise utils.UserError(f"{betas.path}: {betas.shape[1]} voxels, the export's decoders of {subj} take "
                                  f"{config['n_voxels']}; import it where the responses it was trained on are")
        if sample_hash(betas) != config["protocol"]["betas"]:
            raise utils.UserError(f"{betas.path}: other responses than the export's decoders of {subj} were trained "
                                  "on; import it where those are")
    for feat, entry in config["features"].items():
        if not regresses(config, entry):
            continue
        found = open_components(paths, feat).digest
        if found != entry["components"]["digest"]:
            raise utils.UserError(f"{paths.components(feat)}: components {found}, the export's decoder of {feat} was "
                                  f"trained on {entry['components']['digest']}; import it where those are, or decode "
                                  "with the export's own (BrainDecoder)")


def regresses(config, entry):
    """Say whether the run of a feature's entry predicts components."""
    return "components" in config["runs"][entry["run"]]["state"]["model_args"]


def same(found, wanted):
    """Say whether two states hold the same, to the bit."""
    parts = {}, {}
    states = [take_apart(state, tensors) for state, tensors in zip(({**found}, {"format": CHECKPOINT_FORMAT, **wanted}),
                                                                   parts, strict=True)]
    return states[0] == states[1] and all(torch.equal(tensor, parts[1][name]) for name, tensor in parts[0].items())
