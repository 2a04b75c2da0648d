"""The run that scores are wanted of: which network, whose voxel encoder, which responses.

A Request is what the flags of a score script say; `open_trained` finds its run, once for all features of one. A subject
that the run does not know gets a voxel encoder of its own, fitted to its training trials with everything else frozen
(`adapt`).
"""

import hashlib
from dataclasses import dataclass, fields
from functools import cached_property

import options
import utils
from disk.checkpoints import load_checkpoint
from disk.files import archive_hash
from disk.hints import how_to_train, runs_like
from disk.names import Paths, head_of, runs_of
from models import build_model, freeze_trunk, load_trunk, restore
from nsd.clusters import clusters_digest
from nsd.lesions import kept_voxels, make_lesion
from nsd.regions import roi_masks
from nsd.repeats import average_repeats, load_test_set
from nsd.rows import open_betas, sample_hash
from nsd.trials import split_trials
from training.bottleneck import fit_bottleneck, numbers_left
from training.loop import fit
from training.objectives import OBJECTIVES, ComponentObjective
from training.origins import CLUSTERS, changed, inputs_there
from training.runs import gather_component_run, gather_run
from training.settings import Loop, Plan, Wandb
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
