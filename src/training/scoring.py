"""From a run to scores: which network, whose voxel encoder, predictions of the test images.

A score script opens a source (`open_source`), predicts with it and saves (`save`). A subject that the run does not know
gets a voxel encoder of its own, fitted to its training trials with everything else frozen (`adapt`).
"""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

import options
import utils
from disk.checkpoints import load_checkpoint
from disk.files import file_hash, load_json
from disk.hints import how_to_train, runs_like
from disk.names import Paths, head_of, runs_of, scores_name
from disk.scores import save_scores
from models import build_model, load_trunk, restore
from nsd.components import open_components
from nsd.repeats import TestSet, average_repeats, load_test_set
from nsd.rows import open_betas, open_feature
from nsd.trials import split_trials
from training.loop import fit
from training.objectives import OBJECTIVES, ComponentObjective
from training.runs import gather_component_run, gather_run
from training.settings import Loop, Plan
from training.team import Team


@dataclass(frozen=True)
class Request:
    """Which scores are wanted: the flags of options.scoring_parser, and where everything lies."""

    paths: Paths
    subj: str
    run: str  # STAGE[:SUBJ], or ground_truth
    hidden_dim: int  # it, num_sessions and tag name the run
    num_sessions: int
    tag: str
    checkpoint: str  # last or best
    head: str | None  # own, adapt or a subject; None: as disk.names.head_of says
    adapt_epochs: int
    test_split: str
    repeats: str
    control: str | None
    prior_steps: int
    stack: bool  # with a ridge run, where there is one
    batch_size: int  # images
    seed: int
    device: str
    overwrite: bool

    @classmethod
    def from_args(cls, args):
        """Read parsed flags; raises UserError for a value out of range."""
        for name in ("batch_size", "prior_steps", "adapt_epochs"):
            if getattr(args, name) < 1:
                raise utils.UserError(f"--{name} {getattr(args, name)}: wanted at least 1")
        given = {field.name: getattr(args, field.name) for field in fields(cls) if field.name != "paths"}
        return cls(Paths.from_args(args), **given)

    def folder(self, feat):
        """Return where the scores of a feature go."""
        return self.paths.scores(self.subj, scores_name(self.flags, feat), feat)

    @property
    def flags(self):
        """{name: value}, as disk.names takes them."""
        return vars(self)


@dataclass(frozen=True)
class Source:
    """What predicts one feature, and where the predictions go."""

    request: Request
    run: str
    folder: Path  # of the scores
    config: dict  # beside the scores: where they come from
    model: torch.nn.Module
    subj: str  # whose voxel encoder is used
    test: TestSet
    held_out: tuple  # which of the subject's training images validated the run: arguments of split_trials


def open_source(request, feat, **settings):
    """Load the run that the request means, with its voxel encoder, and the test set.

    settings: further facts of these scores for their config.json. Returns None when the folder holds exactly these
    scores already. Raises UserError for a missing or foreign run, and for voxel counts that do not agree.
    """
    paths, subj = request.paths, request.subj
    names, head = runs_of(request.flags, feat), head_of(request.flags)
    run = next((name for name in names if (paths.run(name) / f"{request.checkpoint}.pth").exists()), names[0])
    checkpoint = paths.run(run) / f"{request.checkpoint}.pth"
    there = "" if checkpoint.exists() else runs_like(paths, request.flags, feat)
    state = load_checkpoint(checkpoint, f"--run/--hidden_dim/--num_sessions/--tag: the run {run}",
                            (f"{there}: give the flags of one, or " if there else "")
                            + f"train it first ({how_to_train(request.flags, feat)})")
    if feat != state["config"]["feat"] and feat not in state["model_args"].get("components", {}):
        raise utils.UserError(f"{checkpoint}: was trained for {state['config']['feat']}, wanted {feat}; train {feat}")
    if head == "own" and subj not in state["n_voxels"]:
        raise utils.UserError(f"{checkpoint}: has voxel encoders of {', '.join(state['n_voxels'])}, wanted "
                              f"{subj}; fine-tune on {subj}, or use --head adapt")
    folder = request.folder(feat)
    config = {"run": run, "feat": feat, "subj": subj, "head": head, "num_sessions": request.num_sessions,
              "checkpoint": checkpoint.name, "checkpoint_sha256": file_hash(checkpoint),
              "test_split": request.test_split, "repeats": request.repeats, "control": request.control,
              "prior_steps": request.prior_steps, "seed": request.seed, **settings}
    if head == "adapt":
        config["adapt_epochs"] = request.adapt_epochs
    components, ridge = None, None
    if "components" in state["model_args"]:
        components = open_components(paths, feat)
        config["components"] = components.digest
        ridge = ridge_beside(request, feat, run)
        config["stacked_with"] = file_hash(ridge) if ridge else None
    if (folder / "config.json").exists() and not request.overwrite and same_scores(folder, config):
        print(f"{folder}: already scored with this checkpoint, kept")
        return None

    trained_seed = request.seed if head == "adapt" else state["config"]["seed"]
    held_out = (request.num_sessions, state["config"]["val_fraction"], trained_seed)
    test = load_test_set(paths, subj, request.control, request.seed, held_out, request.test_split, request.repeats)
    if head == "adapt":
        model, whose = adapt(request, feat, run, state, config["checkpoint_sha256"]), subj
    else:
        model, whose = restore(state, checkpoint), subj if head == "own" else head
        check_head(whose, subj, test.betas.shape[1], state["n_voxels"], checkpoint)
    if components is not None:
        model = FeatureOf(model, components)
        config["r2"] = validate(model, ridge, paths, subj, whose, held_out)
    model.eval().to(utils.pick_device(request.device))
    return Source(request, run, folder, config, model, whose, test, held_out)


def same_scores(folder, config):
    """Say whether a folder's scores were made from all that `config` says; R2, which follows from it, aside."""
    found = load_json(folder / "config.json")
    found.pop("r2", None)
    return found == config


class FeatureOf(torch.nn.Module):
    """One feature of a network of components, as rows of that feature.

    Stacked with a ridge, its coefficients are weight * the network's + (1 - weight) * the ridge's.
    """

    def __init__(self, network, components):
        """network: models.Decoder or RidgeDecoder; components: nsd.components.Components of the feature."""
        super().__init__()
        self.network, self.ridge, self.weight, self.components = network, None, 1.0, components
        self.errors = None  # on validation images: validate
        for name in ("mean", "basis"):
            self.register_buffer(name, torch.from_numpy(getattr(components, name)), persistent=False)

    def coefficients(self, voxels):
        """{subject: (b, V)} -> coefficients (B, K), and those for the contrast (B, K), of any length, or None."""
        feat, scale = self.components.feat, self.components.total ** 0.5
        found, contrast = self.network(voxels)
        rows = found[feat] * scale
        if self.ridge is not None:
            (voxels,) = voxels.values()
            rows = self.weight * rows + (1 - self.weight) * self.ridge({self.ridge.subject: voxels})[0][feat] * scale
        return rows, contrast.get(feat)

    @torch.no_grad()
    def predict(self, voxels, prior_steps=None, generators=None):
        """Scores (B, *shape): nsdgeneral, and retrieval, what retrieves best: the contrast's where there is one.

        A contrast says nothing of its prediction's length: it gets the one that true rows have on average.
        """
        coefficients, contrast = self.coefficients(voxels)
        retrieval = rows = self.rows_of(coefficients)
        if contrast is not None:
            retrieval = self.rows_of(torch.nn.functional.normalize(contrast) * self.components.total ** 0.5)
        return {"nsdgeneral": rows, "retrieval": retrieval}

    def rows_of(self, coefficients):
        """(B, K) -> (B, *shape), where the network is; nsd.components.Components.reconstruct does it on arrays."""
        return (self.mean + coefficients @ self.basis[:coefficients.shape[1]]).unflatten(1, self.components.shape)


def ridge_beside(request, feat, run):
    """Find the checkpoint of the ridge to stack with: of the same subject, sessions and tag; None without one."""
    if not request.stack or request.run.partition(":")[0] == "ridge":
        return None
    names = runs_of({**request.flags, "run": "ridge"}, feat)
    files = [request.paths.run(name) / "last.pth" for name in names if name != run]
    return next((file for file in files if file.exists()), None)


def validate(model, ridge, paths, subj, whose, held_out):
    """Stack a FeatureOf with the ridge of a checkpoint, if there is one, and measure it on the validation images.

    The weight is the one with the least squared error there. Sets model.errors, (K + 1,): the mean squared error of
    each coefficient, and the variance beyond them. Returns R2 {"network", "ridge", "scored"}.
    """
    known = model.components
    val = average_repeats(open_betas(paths, subj), split_trials(paths, subj, *held_out)[1])
    voxels, truth = torch.from_numpy(val.betas), torch.from_numpy(known.coefficients[val.image_ids])  # (N, V), (N, K)

    def errors_of(found):
        errors = (found - truth[:, :found.shape[1]]).square().mean(0)
        return np.append(errors.numpy(), np.float32(known.beyond(len(errors))))

    with torch.no_grad():
        found = {"network": model.eval().coefficients({whose: voxels})[0]}
        if ridge is not None:
            model.ridge = restore(load_checkpoint(ridge), ridge).eval()
            model.weight = 0.0
            found["ridge"] = model.coefficients({whose: voxels})[0]
            towards = found["network"] - found["ridge"]
            weight = (towards * (truth[:, :towards.shape[1]] - found["ridge"])).sum() / towards.square().sum()
            model.weight = float(weight.clamp(0, 1))
        found["scored"] = model.coefficients({whose: voxels})[0]
    model.errors = errors_of(found["scored"])
    return {name: float(1 - errors_of(rows).sum() / known.total) for name, rows in found.items()}


def check_head(whose, subj, n_voxels, known, checkpoint):
    """Raise UserError unless a checkpoint's voxel encoder of `whose` reads the n_voxels of `subj`.

    known: {subject: voxels} of the checkpoint.
    """
    if whose not in known:
        raise utils.UserError(f"--head {whose}: {checkpoint} has voxel encoders of {', '.join(known)}; "
                              "give one of them, or adapt")
    if known[whose] != n_voxels:
        raise utils.UserError(f"{checkpoint}: its voxel encoder of {whose} takes {known[whose]} "
                              f"voxels, the betas of {subj} have {n_voxels}; use --head adapt, or "
                              f"fine-tune on {subj}")


def adapt(request, feat, run, state, checkpoint_hash):
    """Fit a new voxel encoder for the run's network to the subject's training trials; returns the network.

    The run's own objective and settings, adapt_epochs long; fitted again only when checkpoint or flags changed. What is
    kept is the voxel encoder alone, with the hash of the checkpoint whose network it belongs to.
    """
    kind, trained = state["model_args"]["kind"], state["config"]
    feats = list(state["model_args"].get("components", {}))
    if kind == "ridge":
        raise utils.UserError("--head adapt: a ridge has no shared network; fit one: --model ridge")
    name = f"{run}/head_{request.subj}_{request.num_sessions}sess"
    config = {"run": name, "feat": trained["feat"], "num_epochs": request.adapt_epochs,
              "num_sessions": request.num_sessions, "seed": request.seed, "checkpoint_sha256": checkpoint_hash}
    last = request.paths.run(name) / "last.pth"
    changed = last.exists() and load_checkpoint(last)["config"] != config
    if changed:
        last.unlink()
    loop = Loop(request.adapt_epochs, trained["max_lr"], trained["batch_size"], request.seed, request.device,
                weight_decay=trained.get("weight_decay", 0.01), resume=True, overwrite=changed)
    plan = Plan(request.paths, "adapt", request.subj, request.num_sessions, trained["val_fraction"],
                request.hidden_dim, request.tag, None, loop, config)
    team = Team.assemble(request.device)
    if kind == "components":
        fitted, components = gather_component_run(plan, config, team, [request.subj], feats)
        objective = ComponentObjective(components, trained["clip_scale"], trained["mixup_pct"])
    else:
        targets = {"target": feat} | ({"tokens": "g_12"} if kind == "latent" else {})
        fitted = gather_run(plan, config, team, [request.subj], targets)
        scales = ("clip_scale", "mixup_pct") + (("prior_scale",) if kind == "brain" else ())
        objective = OBJECTIVES[kind](**{key: trained[key] for key in scales})
    model = build_model({**state["model_args"], "n_voxels": fitted.n_voxels})
    load_trunk(model, state["model"])
    fitted.keeps = "voxelenc."
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key.startswith(fitted.keeps))
    fit(fitted, model, objective, loop)
    return model


def predict(source, betas, image_ids, what):
    """Return scores {file name: (N, ...) float32} for responses betas (N, V) to the images image_ids (N,)."""
    request, device = source.request, next(source.model.parameters()).device
    parts = []
    for start in utils.progress(range(0, len(betas), request.batch_size), desc=f"{what} {source.run}", unit="batch"):
        rows = slice(start, start + request.batch_size)
        # noise from (seed, image id), so that the batch size does not matter
        seeds = [utils.derive_seed(request.seed, image_id) for image_id in image_ids[rows]]
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        voxels = torch.from_numpy(np.ascontiguousarray(betas[rows])).to(device)
        scores = source.model.predict({source.subj: voxels}, request.prior_steps, generators)
        parts.append({name: rows.cpu().numpy() for name, rows in scores.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def save(source, scores):
    """Write scores {file name: (N, ...)} of the test images to the source's folder."""
    errors = getattr(source.model, "errors", None)
    save_scores(source.folder, source.test.image_ids, scores, source.config,
                {} if errors is None else {"errors": errors})
    repeats, n_images = np.unique(source.test.n_repeats, return_counts=True)
    counts = ", ".join(f"{n} of {k} trial{'s' if k > 1 else ''}" for k, n in zip(repeats, n_images, strict=True))
    head = source.config["head"]
    whose = {"own": f"{source.request.subj}'s own", "adapt": f"a new one for {source.request.subj}"}.get(head, head)
    print(f"{source.folder}: {len(source.test.image_ids)} images ({counts}), voxel encoder: {whose}")
    if "r2" in source.config:
        r2 = ", ".join(f"{name} {value:.3f}" for name, value in source.config["r2"].items())
        print(f"{source.config['feat']}: R2 on validation images: {r2}")


def save_ground_truth(request, feat):
    """Write the true features of the test images, (N, ...), as scores: what a perfect decoder would predict."""
    if request.control:
        raise utils.UserError(f"--control {request.control}: a null control of the brain's responses; with "
                              "--ground_truth there are none, leave one of them out")
    held_out = (request.num_sessions, options.VAL_FRACTION, request.seed)
    image_ids = load_test_set(request.paths, request.subj, held_out=held_out, split=request.test_split).image_ids
    folder = request.folder(feat)
    config = {"run": request.run, "feat": feat, "subj": request.subj, "test_split": request.test_split}
    save_scores(folder, image_ids, {"nsdgeneral": open_feature(request.paths, feat)[image_ids]}, config)
    print(f"{folder}: {len(image_ids)} images, true {feat}")


def score(request, feat):
    """Predict `feat` of the test images and save it: all there is to do for c and g."""
    if request.run == "ground_truth":
        return save_ground_truth(request, feat)
    source = open_source(request, feat)
    if source is not None:
        save(source, predict(source, source.test.betas, source.test.image_ids, "score"))
