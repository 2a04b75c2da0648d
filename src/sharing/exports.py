"""From a root to an export: which runs, validated once more as score scripts do, and what is known of them."""

import json
from pathlib import Path

import torch

import options
import utils
from disk.checkpoints import load_checkpoint
from disk.files import archive_hash, file_hash, load_json
from disk.names import run_name, runs_of
from nsd.components import source_of
from nsd.trials import split_trials
from sampling.adapter import feats_of
from sharing.card import write_card
from sharing.folder import STATISTICS, check_place, take_apart, write_export
from training.latent_statistics import restandardise, training_statistics
from training.scoring import open_source, predict
from training.stacking import FeatureOf, components_beside, r2_of_rows
from training.trained import open_trained


def export_runs(request, feats, folder, overwrite=False, adapter_run=None):
    """Write the runs that a request means to a folder, with what decoding needs beside them; prints what it holds.

    request: a scoring.Request, of the subject's own responses; feats: features, or None for all that there are runs of;
    adapter_run: None for the subject's own, where it is there and of these features.
    Raises UserError for a run that is missing, unfinished or was trained on others than are there now.
    """
    check_place(folder, overwrite)
    runs, features, files, splits, trained = {}, {}, {}, {}, None
    for feat in feats or feats_there(request):
        trained = open_trained(request, feat, trained)
        if trained.head == "adapt":
            raise utils.UserError(f"--run {request.run}: {trained.run} has no voxel encoder of {request.subj} of its "
                                  "own; export a run that has (--run finetune), or --subj of one that it knows")
        splits[feat] = trained.held_out
        if splits[feat] != next(iter(splits.values())):
            first, found, wanted = next(iter(splits)), splits[feat], next(iter(splits.values()))
            raise utils.UserError(f"{trained.file}: held out the validation images of --val_fraction {found[1]} --seed "
                                  f"{found[2]}, the run of {first} those of --val_fraction {wanted[1]} --seed "
                                  f"{wanted[2]}; export them apart (--feats)")
        settings = {"latents": source_of(request.paths.feature("z"))} if feat == "z" else {}  # as score_z.py's
        source = open_source(trained, feat, **settings)
        features[feat], files_of_feature = describe(source, feat)
        if files_of_feature:
            features[feat]["file"] = f"features/{feat}.safetensors"
            files[features[feat]["file"]] = files_of_feature
        for name in filter(None, (trained.run, features[feat]["ridge"])):
            if name not in runs:
                runs[name], files[f"runs/{name}.safetensors"] = read_run(request.paths, name)
    adapter, files_of_adapter = read_adapter(request, adapter_run, features)
    if adapter:
        files[adapter["file"]] = files_of_adapter
    config = {"subj": request.subj, "n_voxels": trained.test.betas.shape[1],
              "flags": {name: request.flags[name] for name in ("run", "hidden_dim", "num_sessions", "tag", "hold_out")},
              "protocol": protocol_of(trained), "features": features, "runs": runs, "adapter": adapter,
              "evaluations": evaluations_of(request, features), "commit": utils.git_commit()}
    write_export(folder, config, files, write_card(config), overwrite)
    n_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    names = [*runs, *([adapter["run"]] if adapter else [])]
    print(f"{folder}: {', '.join(features)} of {request.subj} ({', '.join(names)}), {utils.in_bytes(n_bytes)}; "
          "read its README.md before you share it")


def feats_there(request):
    """List the features that there are runs of, by the flags of a request; the first of all where there is none."""
    found = []
    for feat in options.FEATURES:
        files = [request.paths.run(name) / "last.pth" for name in runs_of(request.flags, feat)]
        file = next((file for file in files if file.exists()), None)
        state = file and load_checkpoint(file)
        if state and (feat == state["config"]["feat"] or feat in state["model_args"].get("components", {})):
            found.append(feat)
    return found or options.FEATURES[:1]


def describe(source, feat):
    """Return what config.json says of a feature and what predicts it, and the tensors that are kept of it."""
    trained, model, tensors = source.trained, source.model, {}
    regression = isinstance(model, FeatureOf)
    known = model.components if regression else components_beside(source.request.paths, feat)
    if known is not None:
        tensors = {name: torch.from_numpy(getattr(known, name)) for name in ("mean", "basis", "variances")}
    if getattr(model, "errors", None) is not None:
        tensors["errors"] = torch.from_numpy(model.errors)
    if feat == "z":
        on_validation = predict(source, trained.validation, "validate")["nsdgeneral"]
        of_predictions, of_latents = training_statistics(source, on_validation)
        found = restandardise(on_validation, *of_predictions, *of_latents)
        source.config["r2"]["restandardised"] = r2_of_rows(model, trained, feat, found)
        tensors |= dict(zip(STATISTICS, map(torch.from_numpy, (*of_predictions, *of_latents)), strict=True))
    stacked = trained.ridge_file(feat) if regression else None
    facts = ("total", "kept", "n_fitted", "seed", "wanted", "source", "digest")
    return {"run": trained.run, "whose": trained.whose, "ridge": stacked and stacked.parent.name,
            "weight": float(model.weight) if regression else 1.0, "r2": source.config["r2"], "file": None,
            "components": known and {"shape": list(known.shape), **{name: getattr(known, name) for name in facts}},
            }, tensors


def read_run(paths, name, checkpoint="last.pth"):
    """Return what config.json says of a run and its tensors, {name: tensor}; UserError for an unfinished one."""
    file, tensors = paths.run(name) / checkpoint, {}
    last, state = file.with_name("last.pth"), load_checkpoint(file)
    latest = load_checkpoint(last) if last != file and last.exists() else state
    if "optimizer" in latest:
        raise utils.UserError(f"{last}: is unfinished, epoch {latest['epoch']} was its last; go on with its training "
                              "(--resume), then export it")
    state = take_apart({key: value for key, value in state.items() if key != "format"}, tensors)
    if json.loads(json.dumps(state)) != state:
        raise utils.UserError(f"{file}: holds more than tensors and JSON types; train it again with --overwrite")
    beside = file.parent / "config.json"
    commit = load_json(beside).get("git_commit") if beside.exists() else None
    return {"file": f"runs/{name}.safetensors", "checkpoint_hash": archive_hash(file), "commit": commit,
            "state": state}, tensors


def read_adapter(request, run, feats):
    """Return what config.json says of the adapter and its tensors; (None, {}) where there is none of these features.

    run: None for the subject's own, which may be missing. UserError for one that was named and cannot be exported.
    """
    name = run or run_name("scratch", request.subj, "adapter", None)
    file = request.paths.run(name) / "best.pth"
    if run is None and (request.hold_out or not file.exists()):
        return None, {}
    if request.hold_out:
        raise utils.UserError(f"--adapter_run {name} with --hold_out {request.hold_out}: the adapter was trained on "
                              "the images that were held out; leave one of them out")
    utils.require(file, f"--adapter_run: the adapter {name}",
                  "train it (STAGES=adapter bash scripts/train.sh), or leave the flag out")
    missing = [feat for feat in feats_of(file, name) if feat not in feats]
    if missing and run is None:
        return None, {}
    if missing:
        raise utils.UserError(f"--adapter_run {name}: takes {', '.join(missing)}, which is not exported; export it, "
                              "too (--feats), or leave the adapter out")
    entry, tensors = read_run(request.paths, name, "best.pth")
    return {"run": name, **entry}, tensors


def protocol_of(trained):
    """Say which images trained, validated and tested the runs: counts and what the split follows from."""
    request, (num_sessions, fraction, seed, *_) = trained.request, trained.held_out
    train, val = split_trials(request.paths, request.subj, *trained.held_out)
    return {"num_sessions": num_sessions, "val_fraction": fraction, "seed": seed, "hold_out": request.hold_out,
            "train_trials": len(train),
            "train_images": train["image_id"].nunique(), "val_images": val["image_id"].nunique(),
            "test_images": len(trained.test.image_ids), "betas": trained.betas}


def evaluations_of(request, features):
    """Find evaluated pictures that were drawn from the very scores of these runs: {their folder: what is known}.

    Scores count where their config.json names the checkpoint that is exported, pictures where theirs holds the hash of
    these scores.
    """
    hashes, found = {}, {}
    for feat in features:
        folder = request.folder(feat)
        if (folder / "config.json").exists() and (folder / "nsdgeneral.npy").exists():
            made_by = load_json(folder / "config.json").get("checkpoint_hash")
            if made_by == archive_hash(request.paths.run(features[feat]["run"]) / "last.pth"):
                hashes[feat] = file_hash(folder / "nsdgeneral.npy")
    for file in sorted((request.paths.outputs_all / request.subj).glob("*/*/*/metrics.json")):
        pictures = load_json(file.parent / "config.json") if (file.parent / "config.json").exists() else {}
        drawn_from = {feat: value for feat, value in pictures.get("score_hashes", {}).items()
                      if feat in options.FEATURES}
        if not drawn_from or any(hashes.get(feat) != value for feat, value in drawn_from.items()):
            continue
        numbers = {name: {key: entry.get(key) for key in ("value", "ci_low", "ci_high", "n")}
                   for name, entry in load_json(file).items() if "missing" not in entry}
        found[str(file.parent.relative_to(request.paths.outputs_all))] = {
            "metrics": numbers, "sd_model": without_folders(pictures.get("sd_model")), "features": list(drawn_from),
            "guidance_rule": pictures.get("guidance_rule"), "steps": pictures.get("num_inference_steps")}
    return found


def without_folders(model):
    """Return the name of a model, of an absolute path its last part: what lies where here is nobody's concern."""
    return Path(model).name if model and Path(model).is_absolute() else model
