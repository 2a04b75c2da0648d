"""From a run to scores: which network, whose voxel encoder, predictions of the test images.

A score script opens a source (`open_source`), predicts with it and saves (`save`). A subject that the run does not know
gets a voxel encoder of its own, fitted to its training trials with everything else frozen (`adapt`).
"""

import argparse
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

import options
import utils
from disk.checkpoints import load_checkpoint
from disk.files import file_hash, load_json
from disk.names import Paths, head_of, run_of, scores_name
from disk.scores import save_scores
from models import build_model, load_trunk, restore
from nsd.repeats import TestSet, load_test_set
from nsd.rows import open_feature
from training.loop import fit
from training.objectives import OBJECTIVES
from training.runs import gather_run
from training.team import Team


@dataclass
class Source:
    """What predicts one feature, and where the predictions go."""

    args: argparse.Namespace
    paths: Paths
    run: str
    folder: object  # of the scores
    config: dict  # beside the scores: where they come from
    model: torch.nn.Module
    subj: str  # whose voxel encoder is used
    test: TestSet
    held_out: tuple  # which of --subj's training images validated the run: arguments of split_trials


def open_source(args, feat, **settings):
    """Load the run that --run names, with the voxel encoder of --head, and the test set.

    settings: further facts of these scores for their config.json. Returns None when the folder holds exactly these
    scores already. Raises UserError for a missing or foreign run, and for voxel counts that do not agree.
    """
    for name in ("batch_size", "prior_steps", "adapt_epochs"):
        if getattr(args, name) < 1:
            raise utils.UserError(f"--{name} {getattr(args, name)}: wanted at least 1")
    paths, flags = Paths.from_args(args), vars(args)
    run, head = run_of(flags, feat), head_of(flags)
    checkpoint = paths.run(run) / f"{args.checkpoint}.pth"
    state = load_checkpoint(checkpoint, f"--run/--hidden_dim/--num_sessions/--tag: the run {run}")
    if state["config"]["feat"] != feat:
        raise utils.UserError(f"{checkpoint}: was trained for {state['config']['feat']}, wanted {feat}; train {feat}")
    if head == "own" and args.subj not in state["n_voxels"]:
        raise utils.UserError(f"{checkpoint}: has voxel encoders of {', '.join(state['n_voxels'])}, wanted "
                              f"{args.subj}; fine-tune on {args.subj}, or use --head adapt")
    folder = paths.scores(args.subj, scores_name(flags, feat), feat)
    config = {"run": run, "feat": feat, "subj": args.subj, "head": head, "num_sessions": args.num_sessions,
              "checkpoint": checkpoint.name, "checkpoint_sha256": file_hash(checkpoint),
              "test_split": args.test_split, "repeats": args.repeats, "control": args.control,
              "prior_steps": args.prior_steps, "seed": args.seed, **settings}
    if head == "adapt":
        config["adapt_epochs"] = args.adapt_epochs
    if (folder / "config.json").exists() and not args.overwrite and load_json(folder / "config.json") == config:
        print(f"{folder}: scored before with this checkpoint, kept")
        return None

    trained_seed = args.seed if head == "adapt" else state["config"]["seed"]
    held_out = (args.num_sessions, state["config"]["val_fraction"], trained_seed)
    test = load_test_set(paths, args.subj, args.control, args.seed, held_out, args.test_split, args.repeats)
    if head == "adapt":
        model = adapt(args, paths, feat, run, state, config["checkpoint_sha256"])
        subj = args.subj
    else:
        model = restore(state, checkpoint)
        subj = args.subj if head == "own" else head
        if subj not in state["n_voxels"]:
            raise utils.UserError(f"--head {subj}: {checkpoint} has voxel encoders of {', '.join(state['n_voxels'])}; "
                                  "give one of them, or adapt")
        if state["n_voxels"][subj] != test.betas.shape[1]:
            raise utils.UserError(f"{checkpoint}: its voxel encoder of {subj} takes {state['n_voxels'][subj]} "
                                  f"voxels, the betas of {args.subj} have {test.betas.shape[1]}; use --head adapt, or "
                                  f"fine-tune on {args.subj}")
    model.eval().to(utils.pick_device(args.device))
    return Source(args, paths, run, folder, config, model, subj, test, held_out)


def adapt(args, paths, feat, run, state, checkpoint_hash):
    """The run's network with a new voxel encoder for --subj, fitted to its training trials; kept beside the checkpoint.

    The run's own objective and settings, --adapt_epochs long; fitted again only when checkpoint or flags changed.
    """
    kind = state["model_args"]["kind"]
    if kind == "ridge":
        raise utils.UserError("--head adapt: a ridge has no shared network; fit one: --model ridge")
    name = f"{run}/head_{args.subj}_{args.num_sessions}sess"
    config = {"run": name, "feat": feat, "num_epochs": args.adapt_epochs, "num_sessions": args.num_sessions,
              "seed": args.seed, "checkpoint_sha256": checkpoint_hash}
    flags = {**state["config"], **vars(args), "num_epochs": args.adapt_epochs, "ckpt_every": 1, "resume": True,
             "compile": False, "num_workers": 0, "wandb_log": False, "wandb_project": None,
             "batch_size": state["config"]["batch_size"]}
    last = paths.run(name) / "last.pth"
    flags["overwrite"] = last.exists() and load_checkpoint(last)["config"] != config
    if flags["overwrite"]:
        last.unlink()
    train_args = argparse.Namespace(**flags)
    team = Team.assemble(args.device)
    further = {"tokens": "g_12"} if kind == "latent" else {}
    fitted = gather_run(train_args, paths, feat, name, config, team, [args.subj], args.num_sessions, None,
                                 further)
    model = build_model({**state["model_args"], "n_voxels": fitted.n_voxels})
    load_trunk(model, state["model"])
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key.startswith("voxelenc."))
    scales = ("clip_scale", "mixup_pct") + (("prior_scale",) if kind == "brain" else ())
    fit(fitted, model, OBJECTIVES[kind](**{key: state["config"][key] for key in scales}))
    return model


def predict(source, betas, image_ids, what):
    """Scores {file name: (N, ...) float32} for responses betas (N, V) to the images image_ids (N,)."""
    args, device = source.args, next(source.model.parameters()).device
    parts = []
    for start in tqdm(range(0, len(betas), args.batch_size), desc=f"{what} {source.run}", unit="batch"):
        rows = slice(start, start + args.batch_size)
        # noise from (seed, image id), so that the batch size does not matter
        seeds = [utils.derive_seed(args.seed, image_id) for image_id in image_ids[rows]]
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        voxels = torch.from_numpy(np.ascontiguousarray(betas[rows])).to(device)
        scores = source.model.predict({source.subj: voxels}, args.prior_steps, generators)
        parts.append({name: rows.cpu().numpy() for name, rows in scores.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def save(source, scores):
    save_scores(source.folder, source.test.image_ids, scores, source.config)
    repeats, n_images = np.unique(source.test.n_repeats, return_counts=True)
    counts = ", ".join(f"{n} of {k} trial{'s' if k > 1 else ''}" for k, n in zip(repeats, n_images, strict=True))
    print(f"{source.folder}: {len(source.test.image_ids)} images ({counts})")


def save_ground_truth(args, feat):
    """The true features of the test images as scores, (N, ...): what a perfect decoder would predict."""
    if args.control:
        raise utils.UserError(f"--control {args.control}: a null control of the brain's responses; with --ground_truth "
                              "there are none, leave one of them out")
    paths, flags = Paths.from_args(args), vars(args)
    held_out = (args.num_sessions, options.VAL_FRACTION, args.seed)
    image_ids = load_test_set(paths, args.subj, held_out=held_out, split=args.test_split).image_ids
    folder = paths.scores(args.subj, scores_name(flags, feat), feat)
    config = {"run": args.run, "feat": feat, "subj": args.subj, "test_split": args.test_split}
    save_scores(folder, image_ids, {"nsdgeneral": open_feature(paths, feat)[image_ids]}, config)
    print(f"{folder}: {len(image_ids)} images, true {feat}")


def score(args, feat):
    """Predict `feat` of the test images and save it: all there is to do for c and g."""
    if args.run == "ground_truth":
        return save_ground_truth(args, feat)
    source = open_source(args, feat)
    if source is not None:
        save(source, predict(source, source.test.betas, source.test.image_ids, "score"))
