"""What a training is made of: trials, targets, a folder, the processes that train. Letters: T tokens, D width."""

import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

import utils
from disk.checkpoints import RUN_KEYS, load_checkpoint
from disk.files import load_json
from nsd.batches import EpochBatches, read_targets
from nsd.clusters import clusters_digest, read_clusters
from nsd.components import CoefficientRows, open_components
from nsd.repeats import AveragedRows
from nsd.rows import open_betas, open_feature, open_stimuli
from nsd.simulated import SimulatedTrials
from nsd.trials import list_subjects, shared_images, split_trials
from training.origins import CLUSTERS, changed, inputs_there
from training.team import Team
from training.tracking import check_tracking, load_rows


@dataclass
class Run:
    """One training: where it is kept, what it reads, how it is configured, who trains."""

    name: str
    feat: str
    folder: Path
    config: dict  # all that decides the result
    team: Team
    tables: dict  # "train" and "val": {subject: trials}
    train: EpochBatches
    val: EpochBatches
    n_voxels: dict  # subject -> voxel count
    shapes: dict  # of one row of each target: {"target": (T, D)}
    pretrained: Path | None = None  # checkpoint of the pretraining run
    target_statistics: tuple = ()  # mean (T, D) and standard deviation of the training images' targets
    lines: dict = field(default_factory=dict)  # constants that W&B draws beside its metrics: ridge_r2
    keeps: str = ""  # what the names of the weights begin with that its checkpoints hold; the others are elsewhere

    @property
    def sizes(self):
        """Lines of the training and of the validation table, all subjects together."""
        return [sum(map(len, self.tables[part].values())) for part in ("train", "val")]

    def averaged(self, part, subj):
        """Read a subject's images (N,) of "train" or "val", and its mean responses to them (N, V) float32."""
        rows = getattr(self, part).betas[subj]
        if not isinstance(rows, AveragedRows):
            rows = AveragedRows(rows, self.tables[part][subj])
        return rows.image_ids, rows[np.arange(len(rows.image_ids))]

    def introduce(self):
        """Say what is trained on what."""
        n_train, n_val = self.sizes
        unit = "images" if self.feat in ("gnet", "adapter") else "trials"
        targets = ", ".join(f"{self.feat if name == 'target' else name} {shape}" for name, shape in self.shapes.items())
        self.say(f"{n_train} training and {n_val} validation {unit} of {', '.join(self.n_voxels)}; targets {targets}; "
                 f"{self.team}")

    def say(self, text, show=True):
        """Keep a line in the run's log.txt, and print it unless the progress bar shows the same."""
        if self.team.is_main:
            if show:
                print(f"{self.name}: {text}", flush=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            with suppress(OSError), open(self.folder / "log.txt", "a") as file:  # a full disk: metrics.jsonl reports it
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


# --- opening a run ------------------------------------------------------------------------------------------------


def open_run(plan, feat, **further):
    """Read what a run of c, z or g_k needs, before any work: trials, betas, targets, and the state of its folder.

    plan: a settings.Plan. further: names of other targets that a batch shall hold, as tokens="g_12". Returns a Run, or
    None when the folder already holds this run, finished. Validation images are plan.val_fraction of the distinct
    training images; the test trials are never opened here. Raises UserError for what is missing or contradicts.
    """
    subjects = subjects_of(plan)
    config, team = claim(plan, feat, subjects, features=(feat, *further.values()))
    if config is None:
        return None
    return gather_run(plan, config, team, subjects, {"target": feat, **further}, plan.pretrained_file(feat))


def open_component_run(plan, name, feats):
    """Read what a training of a Decoder needs, as open_run does: responses, and components of the features.

    name: of the run, a feature or g; feats: its features. Returns (Run, {feature: Components}), or None. A training
    response is the mean of a trial and of some others of its image, drawn anew in every epoch; validation images have
    the mean of all of theirs, as test images do.
    """
    subjects = subjects_of(plan)
    config, team = claim(plan, name, subjects, components=feats, feats=list(feats))
    if config is None:
        return None
    return gather_component_run(plan, config, team, subjects, feats, plan.pretrained_file(name))


def gather_component_run(plan, config, team, subjects, feats, pretrained=None):
    """Make the Run of open_component_run; returns it and {feature: Components}."""
    components = {feat: open_components(plan.paths, feat) for feat in feats}
    betas, tables = {"train": {}, "val": {}}, {"train": {}, "val": {}}
    for subj in subjects:
        rows = open_betas(plan.paths, subj)
        train, val = split_of(plan, subj)
        rows.require(train["row"].to_numpy())
        averaged = AveragedRows(rows, val)
        tables["val"][subj], betas["val"][subj] = averaged.table, averaged
        if plan.stage == "synthetic":
            simulated = SimulatedTrials(plan.paths, subj, plan.num_sessions, plan.val_fraction, plan.loop.seed)
            train, rows = simulated.table, simulated.rows
        tables["train"][subj], betas["train"][subj] = train, rows
    targets = {feat: CoefficientRows(known) for feat, known in components.items()}
    run = make_run(plan, config, team, tables, betas, targets, pretrained, average=True)
    run.lines = ridge_r2(plan, config["feat"], feats)
    return run, components


def ridge_r2(plan, name, feats):
    """Return {val/r2_<feat>_ridge: R2} of the ridge that a training of one subject is to be better than.

    It has the same subject, sessions, held-out cluster and validation images, and the same tag or else none; {} where
    there is none.
    name: of the run, a feature or g.
    """
    wanted = {"val_fraction": plan.val_fraction, "seed": plan.loop.seed}
    for tag in dict.fromkeys((plan.tag, "")) if plan.stage in ("finetune", "scratch") else ():
        folder = replace(plan, stage="ridge", tag=tag).folder(name)
        with suppress(utils.UserError, OSError):  # no line is better than no training
            config, rows = load_json(folder / "config.json"), list(load_rows(folder / "metrics.jsonl"))
            if (folder / "last.pth").exists() and rows and wanted.items() <= config.items():
                found = {feat: rows[-1].get(f"val/r2_{feat}") for feat in feats}
                return {f"val/r2_{feat}_ridge": r2 for feat, r2 in found.items() if r2 is not None}
    return {}


def split_of(plan, subj):
    """Read a subject's trials as a plan splits them: (train, val), tables of trials."""
    return split_trials(plan.paths, subj, plan.num_sessions, plan.val_fraction, plan.loop.seed, plan.hold_out)


def subjects_of(plan):
    """List whose trials a plan learns from: in pretraining all but its subject, or those asked for; else it alone."""
    if plan.stage != "pretrain":
        return [plan.subj]
    subjects = [subj for subj in list_subjects(plan.paths) if subj != plan.subj]
    if others := set(plan.pretrain_subjects) - set(subjects):
        raise utils.UserError(f"--pretrain_subjects {' '.join(sorted(others))}: wanted some of {', '.join(subjects)}, "
                              f"which have betas in {plan.paths.data_path} and are not --subj {plan.subj}")
    subjects = [subj for subj in subjects if subj in (plan.pretrain_subjects or subjects)]
    if not subjects:
        raise utils.UserError(f"{plan.paths.data_path}: no subject but {plan.subj} has betas; --multi_subject "
                              "needs others")
    return subjects


def open_encoding_run(plan):
    """Read what a training of GNet needs, as open_run does: responses averaged over an image's repeats, and stimuli.

    Pretraining is the joint training of all subjects.
    """
    subjects = list_subjects(plan.paths) if plan.stage == "pretrain" else [plan.subj]
    config, team = claim(plan, "gnet", subjects, stimuli=True)
    if config is None:
        return None
    tables, responses = {"train": {}, "val": {}}, {"train": {}, "val": {}}
    for subj in subjects:
        parts = split_of(plan, subj)
        for part, trials in zip(("train", "val"), parts, strict=True):
            rows = AveragedRows(open_betas(plan.paths, subj), trials)
            tables[part][subj], responses[part][subj] = rows.table, rows
    return make_run(plan, config, team, tables, responses, {"target": open_stimuli(plan.paths)})


def claim(plan, feat, subjects, components=(), features=(), stimuli=False, **further):
    """Return (config, team) of the run to be trained; (None, team) when its folder already holds it, finished.

    subjects, components, features, stimuli: what it reads, as training.origins takes it. further: what decides its
    result beside the plan and the feature.
    """
    check_tracking(plan.loop.wandb.log)
    name = plan.run_name(feat)
    config = plan.config | {"feat": feat, "run": name, **further, "made_from": inputs_there(
        plan.paths, subjects, components, features, stimuli, [plan.pretrained_path(feat)],
        (plan.subj, plan.num_sessions) if plan.stage == "synthetic" else None)}
    team = Team.assemble(plan.loop.device, plan.loop.precision)
    if plan.hold_out:
        read_clusters(plan.paths, int(plan.hold_out.split("/")[1]), partial(shared_images, plan.paths))
        config["made_from"][CLUSTERS] = clusters_digest(plan.paths, plan.hold_out)
        check_pretrained(plan, feat, config)
    if finished(plan.paths.run(name), config, plan.loop, team.print):
        untold = "; W&B was told nothing, a further run needs another --tag" if plan.loop.wandb.log else ""
        team.print(f"{name}: already finished, kept (--overwrite trains it again{untold})")
        return None, team
    return config, team


def check_pretrained(plan, feat, config):
    """Raise UserError where the run to fine-tune from may have seen the cluster of images that is held out."""
    checkpoint = plan.pretrained_path(feat)
    file = checkpoint and checkpoint.with_name("config.json")
    if not file or not file.exists():
        return
    found = load_json(file)
    if found.get("hold_out") != plan.hold_out:
        raise utils.UserError(f"--hold_out {plan.hold_out}: {file.parent.name} was pretrained with "
                              f"{found.get('hold_out') or 'nothing'} held out, and may have seen these images; give "
                              "--multisubject_ckpt a run with the same --hold_out, or auto")
    if others := changed(found["made_from"], {CLUSTERS: config["made_from"][CLUSTERS]}):
        raise utils.UserError(f"{file.parent}: was pretrained with others than are there now: {', '.join(others)}; "
                              "pretrain it again with --overwrite")


def finished(folder, config, loop, say=print):
    """Say whether `folder` holds this very run, complete. A different or unfinished one needs a flag.

    say: is told of a run that does not say what it was made from.
    """
    checkpoint = folder / "last.pth"
    if loop.overwrite or not checkpoint.exists():
        return False
    state = load_checkpoint(checkpoint, hint="use --overwrite", keys=(*RUN_KEYS, "epoch"))
    found = state["config"]
    differing = [f"{key} {found.get(key)} -> {config.get(key)}" for key in sorted(found.keys() | config.keys())
                 if key != "made_from" and found.get(key) != config.get(key)]
    if differing:
        raise utils.UserError(f"{folder}: holds a run with another configuration ({'; '.join(differing)}); "
                              "give the same flags, another --tag, or --overwrite to train it again")
    if "made_from" not in found:
        say(f"{folder.name}: is from before a run said what it was made from; whether its inputs have changed since is "
            "not known")
    elif others := changed(found["made_from"], config["made_from"]):
        raise utils.UserError(f"{folder}: was trained on others than are there now: {', '.join(others)}; --overwrite "
                              "to train it again, give another --tag, or put back what it was trained on")
    done = state["epoch"] >= loop.num_epochs
    if not done and not loop.resume:
        raise utils.UserError(f"{folder}: holds an unfinished run; --resume continues it, --overwrite starts over")
    return done


def gather_run(plan, config, team, subjects, targets, pretrained=None):
    """Make the Run of these subjects' single trials. targets: features by their name in a batch, {"target": "c"}."""
    seed = plan.loop.seed
    betas = {subj: open_betas(plan.paths, subj) for subj in subjects}
    targets = {name: open_feature(plan.paths, feat) for name, feat in targets.items()}
    tables = {"train": {}, "val": {}}
    for subj in subjects:
        tables["train"][subj], tables["val"][subj] = split_of(plan, subj)
        betas[subj].require(np.concatenate([tables[part][subj]["row"] for part in ("train", "val")]))
    run = make_run(plan, config, team, tables, {"train": betas, "val": betas}, targets, pretrained)
    run.target_statistics = target_statistics(targets["target"], tables["train"], seed)
    return run


def make_run(plan, config, team, tables, betas, targets, pretrained=None, average=False):
    """Make a Run of what was opened: tables and betas {"train", "val": {subject: ...}}, targets {name: Rows}.

    Seeds the random numbers, for the network that is made next.
    """
    loop, name = plan.loop, config["run"]
    loaders = [EpochBatches(tables[part], betas[part], targets, loop.batch_size, loop.seed, team.rank, team.size,
                            average=average and part == "train") for part in ("train", "val")]
    n_voxels = {subj: rows.shape[1] for subj, rows in betas["train"].items()}
    shapes = {key: rows.row_shape for key, rows in targets.items()}
    utils.seed_everything(utils.derive_seed(loop.seed, 0))
    return Run(name, config["feat"], plan.paths.run(name), config, team, tables, *loaders, n_voxels, shapes, pretrained)


# --- targets ------------------------------------------------------------------------------------------------------


def target_statistics(target, tables, seed, n=2000):
    """Return the mean (T, D) over training images' targets, at most `n`, and the standard deviation of what is left."""
    images = np.unique(np.concatenate([table["image_id"] for table in tables.values()]))
    chosen = np.random.default_rng(seed).choice(images, min(n, len(images)), replace=False)
    rows = read_targets(target, np.sort(chosen))
    mean = rows.mean(axis=0)
    return mean, (rows - mean).std()
