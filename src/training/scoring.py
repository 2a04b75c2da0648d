"""From a run to scores: what predicts a feature, its predictions of the test images, and where they are saved.

For each feature a score script opens the run (trained.open_trained, once for all features of a run) and what predicts
the feature (`open_source`), predicts and saves: `score`.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import options
import utils
from disk.files import archive_hash, file_hash, load_json
from disk.names import scores_name
from disk.scores import save_scores
from nsd.components import open_components
from nsd.lesions import digest_of
from nsd.repeats import load_test_set
from nsd.synthetic import SPLIT, feature_of
from training.bottleneck import numbers_left
from training.stacking import FeatureOf, components_beside, errors_of_rows, r2_of_rows, validate
from training.tracking import Dashboard, check_tracking
from training.trained import Trained, open_trained


@dataclass(frozen=True)
class Source:
    """What predicts one feature, and where the predictions go."""

    trained: Trained
    folder: Path  # of the scores
    config: dict  # beside the scores: where they come from
    model: torch.nn.Module

    @property
    def request(self):
        return self.trained.request


def open_source(trained, feat, **settings):
    """Make a run ready to predict one of its features; returns a Source, None where its folder holds these scores.

    settings: further facts of these scores for their config.json. Raises UserError for voxel counts that do not agree.
    """
    request = trained.request
    folder = request.folder(feat)
    config = {"run": trained.run, "feat": feat, "subj": request.subj, "head": trained.head,
              "num_sessions": request.num_sessions, "checkpoint": trained.file.name, "checkpoint_hash": trained.hash,
              "betas": trained.betas, "test_split": request.test_split, "repeats": request.repeats,
              "control": request.control, "prior_steps": request.prior_steps, "seed": request.seed, **settings}
    if request.hold_out:
        config["hold_out"] = request.hold_out
    if request.test_split == SPLIT:
        config["synthetic_betas"] = trained.synthetic_betas
    if trained.head == "adapt":
        config["adapt_epochs"] = request.adapt_epochs
    if trained.kept is not None:
        config |= {"voxels": request.voxels, "without": request.without, "lesion": digest_of(trained.kept)}
    components, ridge = None, None
    if "components" in trained.state["model_args"]:
        components = open_components(request.paths, feat)
        config["components"] = components.digest
        ridge = trained.ridge_file(feat)
        config["stacked_with"] = archive_hash(ridge) if ridge else None
    else:
        known = components_beside(request.paths, feat)
        config["components"] = known and known.digest
    if (folder / "config.json").exists() and not request.overwrite and same_scores(folder, config):
        print(f"{folder}: already scored with this checkpoint, kept")
        return None
    if components is None:
        source = Source(trained, folder, config, trained.network)
        config["r2"] = {}
        if request.paths.feature(feat).exists():
            on_validation = predict(source, trained.validation, "validate")["nsdgeneral"]
            r2 = r2_of_rows(source.model, trained, feat, on_validation)
            config["r2"] = {"network": r2, "scored": r2}
            if known is not None:
                source.model.errors = errors_of_rows(known, on_validation, trained.validation.image_ids)
        return source
    model = FeatureOf(trained.network, components).to(trained.device)
    config["r2"] = validate(model, ridge and trained.ridge(ridge, feat), trained)
    return Source(trained, folder, config, model)


def same_scores(folder, config):
    """Say whether a folder's scores were made from all that `config` says; R2, which follows from it, aside."""
    found = load_json(folder / "config.json")
    found.pop("r2", None)
    return found == config


def predict(source, responses, what):
    """Return scores {file name: (N, ...) float32} for a TestSet."""
    request, trained, parts = source.request, source.trained, []
    starts = range(0, len(responses.betas), request.batch_size)
    for start in utils.progress(starts, desc=f"{what} {trained.run}", unit="batch"):
        rows = slice(start, start + request.batch_size)
        # noise from (seed, image id), so that the batch size does not matter
        seeds = [utils.derive_seed(request.seed, image_id) for image_id in responses.image_ids[rows]]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        voxels = torch.from_numpy(np.ascontiguousarray(responses.betas[rows])).to(trained.device)
        scores = source.model.predict({trained.whose: voxels}, request.prior_steps, generators)
        parts.append({name: rows.cpu().numpy() for name, rows in scores.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def save(source, scores):
    """Write scores {file name: (N, ...)} of the test images to the source's folder."""
    errors, test = getattr(source.model, "errors", None), source.trained.test
    save_scores(source.folder, test.image_ids, scores, source.config, {} if errors is None else {"errors": errors})
    repeats, n_images = np.unique(test.n_repeats, return_counts=True)
    counts = ", ".join(f"{n} of {k} trial{'s' if k > 1 else ''}" for k, n in zip(repeats, n_images, strict=True))
    head = source.config["head"]
    whose = {"own": f"{source.request.subj}'s own", "adapt": f"a new one for {source.request.subj}"}.get(head, head)
    print(f"{source.folder}: {len(test.image_ids)} images ({counts}), voxel encoder: {whose}")


def save_ground_truth(request, feat):
    """Write the true features of the test images, (N, ...), as scores: what a perfect decoder would predict."""
    if request.voxels or request.without:
        raise utils.UserError("--voxels, --without: lesions of the brain's responses; with --ground_truth there are "
                              "none, leave one of them out")
    if request.control:
        raise utils.UserError(f"--control {request.control}: a null control of the brain's responses; with "
                              "--ground_truth there are none, leave one of them out")
    held_out = (request.num_sessions, options.VAL_FRACTION, request.seed)
    paths, subj = request.paths, request.subj
    image_ids = load_test_set(paths, subj, held_out=held_out, split=request.test_split).image_ids
    true = feature_of(paths, feat, subj, image_ids)
    folder = request.folder(feat)
    config = {"run": request.run, "feat": feat, "subj": request.subj, "test_split": request.test_split}
    save_scores(folder, image_ids, {"nsdgeneral": true[image_ids]}, config)
    show(request, feat, config)
    print(f"{folder}: {len(image_ids)} images, true {feat}")


def show(request, feat, config, checkpoints=()):
    """Show W&B the scores of a feature that were written: R2 of `config`, and what they were made from.

    checkpoints: [(file, its archive_hash)].
    """
    asked = request.wandb.of("score", feat, request.run, request.control)
    board = Dashboard(request.folder(feat), f"score_{request.subj}_{scores_name(request.flags, feat)}", config, asked)
    board.log({f"score/r2_{feat}_{what}": value for what, value in config.get("r2", {}).items()})
    for file, digest in checkpoints:
        board.uses("checkpoint", file, digest)
    board.makes("scores", request.folder(feat) / "nsdgeneral.npy", file_hash)
    board.finish()


def score(request, feats, finish=None, **settings):
    """Predict features of the test images and save them; print how well the validation images are predicted.

    finish(source, predicted (N, ...)) -> what is saved for it, (N, ...). settings: as open_source takes them.
    """
    check_tracking(request.wandb.log)
    trained, r2 = None, {}
    for feat in feats:
        if request.run == "ground_truth":
            save_ground_truth(request, feat)
            continue
        trained = open_trained(request, feat, trained)
        source = open_source(trained, feat, **settings)
        if source is not None:
            scores = predict(source, trained.test, "score")
            if finish is not None:
                scores["nsdgeneral"] = finish(source, scores["nsdgeneral"])
            save(source, scores)
            stacked = trained.ridge_file(feat) if source.config.get("stacked_with") else None
            show(request, feat, source.config, [(trained.file, trained.hash)]
                 + ([(stacked, source.config["stacked_with"])] if stacked else []))
        r2[feat] = load_json(request.folder(feat) / "config.json").get("r2", {})
    print_r2(r2, request.control, request.voxels, request.without)


def print_r2(found, control=None, voxels=None, without=None):
    """Print R2 on validation images, {feature: {prediction: R2}}, as a table; control, voxels, without: of the scores.
    """
    columns = list(dict.fromkeys(name for values in found.values() for name in values))
    if not columns:
        return
    if not any({"network", "ridge"} <= values.keys() for values in found.values()):
        columns = [name for name in columns if name != "scored"]  # it is the one prediction that there is
    print(f"{'R2 on validation images':<26}" + "".join(f"{name:>16}" for name in columns))
    for feat, values in found.items():
        print(f"{feat:<26}" + "".join(f"{values[name]:>16.3f}" if name in values else f"{'-':>16}" for name in columns))
    if "restandardised" in columns:
        print("restandardised: z brought back to the latents' spread, for the start of the drawing")
    if control:
        print(f"(through --control {control})" if numbers_left(control) else
              f"(of the subject's own responses; --control {control} is applied to the test images)")
    if voxels or without:
        print(f"(from {voxels} alone)" if voxels else f"(without {without})")
