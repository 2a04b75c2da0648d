"""From a run to scores: which network, whose voxel encoder, predictions of the test images.

For each feature a score script opens the run (`open_trained`, once for all features of a run) and what predicts the
feature (`open_source`), predicts and saves: `score`. A subject that the run does not know gets a voxel encoder of its
own, fitted to its training trials with everything else frozen (`adapt`).
"""

import hashlib
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

import options
import utils
from disk.checkpoints import load_checkpoint
from disk.files import archive_hash, file_hash, load_json
from disk.hints import how_to_train, runs_like
from disk.names import Paths, head_of, runs_of, scores_name
from disk.scores import save_scores
from models import build_model, freeze_trunk, load_trunk, restore
from nsd.clusters import clusters_digest
from nsd.components import Components, open_components, source_of
from nsd.lesions import digest_of, kept_voxels, make_lesion
from nsd.regions import roi_masks
from nsd.repeats import average_repeats, load_test_set
from nsd.rows import open_betas, open_feature, sample_hash
from nsd.synthetic import SPLIT, feature_of
from nsd.trials import split_trials
from training.bottleneck import fit_bottleneck, numbers_left
from training.loop import fit
from training.objectives import OBJECTIVES, ComponentObjective
from training.origins import CLUSTERS, changed, inputs_there
from training.runs import gather_component_run, gather_run
from training.settings import Loop, Plan, Wandb
from training.team import Team
from training.tracking import Dashboard, check_tracking

STACK_PRIOR = 20  # images whose vote the network has before a stack's weight is measured


@dataclass(frozen=True)
class Request:
    """Which scores are wanted: the flags of options.scoring_parser, and where everything lies."""

    paths: Paths
    subj: str
    run: str  # STAGE[:SUBJ], or ground_truth
    hidden_dim: int  # it, num_sessions and tag name the run
    num_sessions: int
    tag: str
    seed: int
    device: str
    checkpoint: str = "last"  # or best
    head: str | None = None  # own, adapt or a subject; None: as disk.names.head_of says
    adapt_epochs: int = options.COMPONENTS_DEFAULTS["num_epochs"]
    test_split: str = "new_test"
    repeats: str = "mean"
    control: str | None = None
    prior_steps: int = 1
    stack: bool = True  # with a ridge run, where there is one
    batch_size: int = 100  # images
    num_workers: int = 0
    overwrite: bool = False
    wandb: Wandb = Wandb()
    hold_out: str | None = None  # 'K/N', the cluster of images that the run never saw
    voxels: str | None = None  # a lesion: only these regions, or all without those
    without: str | None = None

    @classmethod
    def from_args(cls, args, **settled):
        """Read parsed flags, of a score script or of another that has some of them; raises UserError for a value out of
        range. settled: {name: value} that is not left to flags."""
        flags = vars(args)
        given = {field.name: flags[field.name] for field in fields(cls) if field.name in flags}
        if given.get("adapt_epochs", 0) is None:
            given["adapt_epochs"] = options.of_few_sessions(cls.adapt_epochs, args.num_sessions)
        given["wandb"] = Wandb.from_args(args) if "wandb_log" in flags else Wandb()
        request = cls(Paths.from_args(args), **given | settled)
        for name, least in (("batch_size", 1), ("prior_steps", 1), ("adapt_epochs", 1), ("num_workers", 0)):
            if getattr(request, name) < least:
                raise utils.UserError(f"--{name} {getattr(request, name)}: wanted at least {least}")
        if numbers_left(request.control) and (request.voxels or request.without):
            raise utils.UserError(f"--control {request.control} with --voxels or --without: the numbers that are left "
                                  "are made of all voxels; leave one of them out")
        return request

    def folder(self, feat):
        """Return where the scores of a feature go."""
        return self.paths.scores_of(self.flags, feat)

    @property
    def flags(self):
        """{name: value}, as disk.names takes them."""
        return vars(self)


class Trained:
    """The run that a request means for some features: its checkpoint, and what is read once for all of them."""

    def __init__(self, request, run, file, state):
        """file, state: its checkpoint, where it lies and what it holds."""
        self.request, self.run, self.file, self.state = request, run, file, state
        self.kind, self.head = state["model_args"]["kind"], head_of(request.flags)
        self.device = utils.pick_device(request.device)
        self.whose = request.subj if self.head in ("own", "adapt") else self.head  # voxel encoder
        seed = request.seed if self.head == "adapt" else state["config"]["seed"]
        # which of the subject's training images validated the run: arguments of split_trials
        self.held_out = (request.num_sessions, state["config"]["val_fraction"], seed)
        self.held_out += (request.hold_out,) if request.hold_out else ()
        self._states, self._ridges = {}, {}  # by their checkpoints

    @cached_property
    def hash(self):
        return archive_hash(self.file)

    @cached_property
    def betas(self):
        """Identity of the subject's responses."""
        return sample_hash(open_betas(self.request.paths, self.request.subj))

    @cached_property
    def synthetic_betas(self):
        """Identity of the subject's responses to NSD-synthetic, and of the stimuli that each is to."""
        return hashlib.sha256(self.test.image_ids.tobytes() + self.test.betas.tobytes()).hexdigest()[:12]

    @cached_property
    def test(self):
        """The TestSet that is scored."""
        wanted = self.request
        null = None if numbers_left(wanted.control) else wanted.control
        return self._changed(load_test_set(wanted.paths, wanted.subj, null, wanted.seed, self.held_out,
                                           wanted.test_split, wanted.repeats))

    @cached_property
    def whole_validation(self):
        """The TestSet of the images that the training held out."""
        paths, subj = self.request.paths, self.request.subj
        return average_repeats(open_betas(paths, subj), split_trials(paths, subj, *self.held_out)[1])

    @cached_property
    def validation(self):
        """The same, squeezed or lesioned like those that are scored: the errors that are measured on it say how far the
        scores can be trusted."""
        return self._changed(self.whole_validation)

    def _changed(self, responses):
        """A TestSet through the bottleneck that --control asks for, or the lesion of --voxels or --without."""
        change = self._bottleneck or self._lesion
        return responses if change is None else responses._replace(betas=change(responses.betas))

    @cached_property
    def _bottleneck(self):
        wanted = self.request
        k = numbers_left(wanted.control)
        return fit_bottleneck(wanted.paths, wanted.subj, self.held_out, k) if k else None

    @cached_property
    def kept(self):
        """The voxels (V,) that a lesion keeps, bool; None where no lesion is asked for."""
        wanted = self.request
        if not (wanted.voxels or wanted.without):
            return None
        return kept_voxels(roi_masks(wanted.paths, wanted.subj), wanted.subj, wanted.voxels, wanted.without)

    @cached_property
    def _lesion(self):
        wanted = self.request
        return None if self.kept is None else make_lesion(wanted.paths, wanted.subj, self.held_out, self.kept)

    @cached_property
    def network(self):
        """The network, with the voxel encoder of `whose`, on the device."""
        n_voxels, subj = self.test.betas.shape[1], self.request.subj  # read first: so damaged responses are named
        check_inputs(self.state, self.file, inputs_there(self.request.paths, {subj} & self.state["n_voxels"].keys()))
        if self.head == "adapt":
            network = adapt(self.request, self.state["config"]["feat"], self.run, self.state, self.hash)
        else:
            check_head(self.whose, subj, n_voxels, self.state["n_voxels"], self.file)
            network = restore(self.state, self.file)
        return network.eval().to(self.device)

    def ridge_file(self, feat):
        """Return the checkpoint of the ridge to stack a feature with: of the same subject, sessions and tag, or None.
        """
        if not self.request.stack or self.kind == "ridge":
            return None
        names = runs_of({**self.request.flags, "run": "ridge"}, feat)
        files = [file for name in names if (file := self.request.paths.run(name) / "last.pth").exists()]
        return next((file for file in files if feat in self._ridge_state(file)["model_args"]["components"]), None)

    def ridge(self, file, feat):
        """Return the network of a ridge's checkpoint, on the device.

        Raises UserError where it was fitted to other inputs, or to images that the network was validated on: to those
        it would seem better than it is, and get all the weight.
        """
        state = self._ridge_state(file)
        splits = (state["config"]["val_fraction"], state["config"]["seed"]), self.held_out[1:3]  # of the same sessions
        if splits[0] != splits[1]:
            found, wanted = ("--val_fraction {} --seed {}".format(*split) for split in splits)
            raise utils.UserError(f"{file}: held out the validation images of {found}, the network those of {wanted}; "
                                  f"fit it again with {wanted} --overwrite, or leave it out (--no-stack)")
        check_inputs(state, file, inputs_there(self.request.paths, [self.request.subj], [feat]),
                     "fit it again with --overwrite, or leave it out (--no-stack)")
        if file not in self._ridges:
            self._ridges[file] = restore(state, file).eval().to(self.device)
        return self._ridges[file]

    def _ridge_state(self, file):
        if file not in self._states:
            self._states[file] = load_checkpoint(file)
        return self._states[file]


def open_trained(request, feat, known=None):
    """Open the run that a request means for a feature; returns a Trained: `known`, where it is that one's.

    Raises UserError for a missing or foreign run, and for one that was trained on other inputs than are there now.
    """
    paths, subj = request.paths, request.subj
    names = runs_of(request.flags, feat)
    run = next((name for name in names if (paths.run(name) / f"{request.checkpoint}.pth").exists()), names[0])
    checkpoint = paths.run(run) / f"{request.checkpoint}.pth"
    if known is not None and known.file == checkpoint:
        state = known.state
    else:
        there = "" if checkpoint.exists() else runs_like(paths, request.flags, feat)
        state = load_checkpoint(checkpoint, f"--run/--hidden_dim/--num_sessions/--tag: the run {run}",
                                (f"{there}: give the flags of one, or " if there else "")
                                + f"train it first ({how_to_train(paths, request.flags, feat)})")
        known = Trained(request, run, checkpoint, state)
    if feat != state["config"]["feat"] and feat not in state["model_args"].get("components", {}):
        raise utils.UserError(f"{checkpoint}: was trained for {state['config']['feat']}, wanted {feat}; train {feat}")
    if known.head == "own" and subj not in state["n_voxels"]:
        raise utils.UserError(f"{checkpoint}: has voxel encoders of {', '.join(state['n_voxels'])}, wanted "
                              f"{subj}; fine-tune on {subj}, or use --head adapt")
    if "components" in state["model_args"]:
        check_inputs(state, checkpoint, inputs_there(paths, components=[feat]))
    if request.hold_out:
        check_inputs(state, checkpoint, {CLUSTERS: clusters_digest(paths, request.hold_out)})
    return known


def check_inputs(state, file, there, mend="train it again with --overwrite, or put those back"):
    """Raise UserError where a run's checkpoint says that it was trained on other inputs than those that are there now
    (origins.inputs_there); mend: what to do then."""
    recorded = state["config"].get("made_from", {})
    if recorded and (others := changed(recorded, there)):
        raise utils.UserError(f"{file}: was trained on others than are there now: {', '.join(others)}; {mend}")


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
            r2 = r2_of_rows(source, on_validation)
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
        """Scores (B, *shape): nsdgeneral, and, where there is a contrast, retrieval, the contrast's prediction.

        That says nothing of its length: it gets the one that true rows have on average.
        """
        coefficients, contrast = self.coefficients(voxels)
        scores = {"nsdgeneral": self.rows_of(coefficients)}
        if contrast is not None:
            contrast = torch.nn.functional.normalize(contrast) * self.components.total ** 0.5
            scores["retrieval"] = self.rows_of(contrast)
        return scores

    def rows_of(self, coefficients):
        """(B, K) -> (B, *shape), where the network is; nsd.components.Components.reconstruct does it on arrays."""
        return (self.mean + coefficients @ self.basis[:coefficients.shape[1]]).unflatten(1, self.components.shape)


def validate(model, ridge, trained):
    """Stack a FeatureOf with a ridge's network, if there is one, and measure it on the validation images.

    The weight is the one with the least squared error there, for whole responses: a lesion or a bottleneck changes what
    the same predictor reads. A few images hardly tell it: STACK_PRIOR further ones count, as if they had found the
    network alone best. Sets model.errors, (K + 1,): the mean squared error of each coefficient, and the variance beyond
    them. Returns R2 {"network", "ridge", "scored"}.
    """
    known, val = model.components, trained.validation
    voxels, whole = ({trained.whose: torch.from_numpy(part.betas).to(trained.device)}  # (N, V)
                     for part in (val, trained.whole_validation))
    truth = torch.from_numpy(known.coefficients[val.image_ids])  # (N, K)

    def errors_of(found):
        errors = (found - truth[:, :found.shape[1]]).square().mean(0)
        return np.append(errors.numpy(), np.float32(known.beyond(len(errors))))

    with torch.no_grad():
        found = {"ridge" if trained.kind == "ridge" else "network": model.coefficients(voxels)[0].cpu()}
        if ridge is not None:
            by_network = model.coefficients(whole)[0].cpu()
            model.ridge, model.weight = ridge, 0.0
            found["ridge"], by_ridge = (model.coefficients(part)[0].cpu() for part in (voxels, whole))
            towards = by_network - by_ridge
            weight = (towards * (truth[:, :towards.shape[1]] - by_ridge)).sum() / towards.square().sum()
            n = len(truth)
            model.weight = float((n * weight.clamp(0, 1) + STACK_PRIOR) / (n + STACK_PRIOR))
        found["scored"] = model.coefficients(voxels)[0].cpu()
    model.errors = errors_of(found["scored"])
    return {name: float(1 - errors_of(rows).sum() / known.total) for name, rows in found.items()}


def r2_of_rows(source, predicted):
    """Return the share of variance that predictions (N, ...) of the validation images explain.

    The variance is that of the feature's components, or, of networks that predict none, that of these images.
    """
    image_ids = source.trained.validation.image_ids
    true = open_feature(source.request.paths, source.config["feat"])[image_ids].astype(np.float32)
    true = true.reshape(len(image_ids), -1)
    error = float(np.square(predicted.reshape(true.shape) - true).sum(1).mean())
    total = source.model.components.total if isinstance(source.model, FeatureOf) else float(true.var(0).sum())
    return 1 - error / total


def components_beside(paths, feat):
    """Return the Components of the feature file that is there, or None: who decodes whole rows can do without."""
    if not (paths.components(feat).exists() and paths.feature(feat).exists()):
        return None
    found = Components(paths.components(feat), feat)
    return found if found.source == source_of(paths.feature(feat)) else None


def errors_of_rows(components, predicted, image_ids):
    """Return the mean squared error of each coefficient of rows (N, ...) predicted for these images, and the variance
    beyond them, (K + 1,)."""
    errors = np.square(components.project(predicted) - components.coefficients[image_ids]).mean(0)
    return np.append(errors, np.float32(components.beyond(components.k)))


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

    The run's own objective, and its settings in fine-tuning, adapt_epochs long; fitted again only when checkpoint or
    flags changed. What is kept is the voxel encoder alone, with the hash of the checkpoint whose network it belongs to.
    """
    kind, trained = state["model_args"]["kind"], state["config"]
    feats = list(state["model_args"].get("components", {}))
    if kind == "ridge":
        raise utils.UserError("--head adapt: a ridge has no shared network; fit one: --model ridge")
    name = f"{run}/head_{request.subj}_{request.num_sessions}sess"
    max_lr, batch_size = trained["max_lr"], trained["batch_size"]
    if kind == "components":
        max_lr, batch_size = options.FROZEN_MAX_LR, options.COMPONENTS_DEFAULTS["batch_size"]
    config = {"run": name, "feat": trained["feat"], "num_epochs": request.adapt_epochs, "max_lr": max_lr,
              "num_sessions": request.num_sessions, "seed": request.seed, "checkpoint_hash": checkpoint_hash,
              "made_from": inputs_there(request.paths, [request.subj], feats)}
    last = request.paths.run(name) / "last.pth"
    changed = last.exists() and load_checkpoint(last)["config"] != config
    if changed:
        last.unlink()
    loop = Loop(request.adapt_epochs, max_lr, batch_size, request.seed, request.device,
                weight_decay=trained.get("weight_decay", 0.01), num_workers=request.num_workers, resume=True,
                overwrite=changed)
    plan = Plan(request.paths, "adapt", request.subj, request.num_sessions, trained["val_fraction"],
                request.hidden_dim, request.tag, None, loop, config, request.hold_out)
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
    freeze_trunk(model)
    fitted.keeps = "voxelenc."
    fit(fitted, model, objective, loop)
    return model


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
