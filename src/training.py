"""The one training loop, what a run is made of, and the way back from a run to scores.

A train script opens a run (`open_run`: which trials, which targets, which folder), builds its network and objective,
and hands the three to `fit`. A score script calls `score`.
"""

import argparse
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import options
import utils
from models import build_model, load_trunk


def get_parser(doc):
    """The flags that train_c.py and train_g.py share; defaults are MindEye2's."""
    parser = options.Parser(doc)
    options.add_paths(parser)
    options.add_subject(parser)
    options.add_run(parser)
    options.add_compute(parser)
    options.add_tracking(parser)
    stage = parser.add_argument_group("stage")
    stage.add_argument("--multi_subject", action=argparse.BooleanOptionalAction, default=False,
                       help="pretrain on all subjects but --subj")
    stage.add_argument("--multisubject_ckpt", metavar="RUN",
                       help="fine-tune from this pretraining run: a name, or `auto` for that of --subj and the feature")
    network = parser.add_argument_group("network")
    network.add_argument("--n_blocks", type=options.whole, default=4, metavar="N", help="mixer blocks of the backbone")
    network.add_argument("--dropout", type=float, default=0.15, metavar="P")
    network.add_argument("--prior_depth", type=options.whole, default=6, metavar="N", help="layers of the prior")
    optimum = parser.add_argument_group("optimisation")
    optimum.add_argument("--batch_size", type=options.whole, default=42, metavar="TRIALS", help="over all subjects")
    optimum.add_argument("--num_epochs", type=options.whole, default=30, metavar="N")
    optimum.add_argument("--max_lr", type=float, default=3e-4, metavar="LR", help="peak of the one-cycle schedule")
    optimum.add_argument("--clip_scale", type=float, default=1.0, metavar="W", help="weight of the contrast")
    optimum.add_argument("--prior_scale", type=float, default=30.0, metavar="W", help="weight of the prior's MSE")
    optimum.add_argument("--mixup_pct", type=float, default=0.33, metavar="FRACTION", help="of the epochs, with MixCo")
    optimum.add_argument("--val_fraction", type=float, default=0.05, metavar="FRACTION", help="of the training images")
    keeping = parser.add_argument_group("keeping")
    keeping.add_argument("--ckpt_every", type=options.whole, default=1, metavar="EPOCHS")
    keeping.add_argument("--resume", action=argparse.BooleanOptionalAction, default=False,
                         help="continue the run if its folder holds a checkpoint")
    keeping.add_argument("--overwrite", action=argparse.BooleanOptionalAction, default=False, help="start it again")
    keeping.add_argument("--num_workers", type=options.whole, default=2, metavar="N", help="data loader processes")
    return parser


# what may differ between a run and its continuation: how it is run, not what it computes
NOT_SCIENCE = {"root", "data_path", "device", "resume", "overwrite", "num_workers", "ckpt_every", "wandb_log",
               "wandb_project", "dry_run", "feat"}


@dataclass
class Run:
    """One training: where it is kept, what it reads, how it is configured."""

    name: str
    feat: str
    folder: object
    config: dict
    train: data.EpochBatches
    val: data.EpochBatches
    n_voxels: dict  # subject -> voxel count
    target_shape: tuple  # of one target row, e.g. (T, D)
    target_statistics: tuple  # mean (T, D) and standard deviation of the training images' targets
    pretrained: object  # checkpoint file of the pretraining run, or None
    args: argparse.Namespace


def open_run(args, feat):
    """Read what a run needs, before any work: trials, betas, targets, and the state of its folder.

    feat: 'c' or 'g_k'. Returns a Run, or None when the folder already holds this run, finished.
    Validation images are `--val_fraction` of the distinct training images; the test trials are never opened here.
    """
    paths = utils.Paths.from_args(args)
    stage = "pretrain" if args.multi_subject else "finetune" if args.multisubject_ckpt else "scratch"
    if args.multi_subject and args.multisubject_ckpt:
        raise utils.UserError("--multi_subject and --multisubject_ckpt: pretraining and fine-tuning are two runs; "
                              "give one of the two")
    name = utils.run_name(stage, args.subj, feat, args.hidden_dim, args.num_sessions)
    config = {key: value for key, value in vars(args).items() if key not in NOT_SCIENCE}
    config |= {"feat": feat, "stage": stage, "run": name}
    if finished(paths.run(name), config, args):
        print(f"{name}: finished before, kept (--overwrite trains it again)")
        return None

    pretrained = None
    if stage == "finetune":
        auto = args.multisubject_ckpt == "auto"
        source = utils.run_name("pretrain", args.subj, feat, args.hidden_dim) if auto else args.multisubject_ckpt
        pretrained = utils.require(paths.run(source) / "last.pth", "--multisubject_ckpt: the pretrained run",
                                   "pretrain first (bash scripts/train.sh runs both stages)")

    # Pretraining uses every session of the other subjects; --num_sessions counts those of --subj.
    subjects = [s for s in data.subjects(paths) if s != args.subj] if args.multi_subject else [args.subj]
    if not subjects:
        raise utils.UserError(f"{paths.data_path}: no subject but {args.subj} has betas; --multi_subject needs others")
    betas = {subj: data.open_betas(paths, subj) for subj in subjects}
    target = data.open_feature(paths, feat)
    train, val = {}, {}
    for subj in subjects:
        trials = data.load_trials(paths, subj, "train", None if args.multi_subject else args.num_sessions)
        train[subj], val[subj] = data.split_by_image(trials, args.val_fraction, args.seed)
    loaders = [data.EpochBatches(tables, betas, {"target": target}, args.batch_size, args.seed)
               for tables in (train, val)]
    n_voxels = {subj: betas[subj].shape[1] for subj in subjects}
    print(f"{name}: {sum(map(len, train.values()))} training and {sum(map(len, val.values()))} validation trials of "
          f"{', '.join(subjects)}; target {feat} {target.row_shape}")
    utils.seed_everything(utils.derive_seed(args.seed, 0))  # the script draws its network's weights next
    statistics = target_statistics(target, train, args.seed)
    return Run(name, feat, paths.run(name), config, *loaders, n_voxels, target.row_shape, statistics, pretrained, args)


def target_statistics(target, tables, seed, n=2000):
    """Mean over (at most `n`) training images' targets, and the standard deviation of what is left: (T, D), scalar."""
    images = np.unique(np.concatenate([table["image_id"] for table in tables.values()]))
    chosen = np.random.default_rng(seed).choice(images, min(n, len(images)), replace=False)
    rows = target[np.sort(chosen)].astype(np.float32)
    mean = rows.mean(axis=0)
    return mean, (rows - mean).std()


def finished(folder, config, args):
    """Whether `folder` holds this very run, complete. A different or an unfinished one needs the user's word."""
    checkpoint = folder / "last.pth"
    if args.overwrite or not checkpoint.exists():
        return False
    state = utils.load_checkpoint(checkpoint, hint="use --overwrite")
    found = state["config"]
    differing = [f"{key} {found.get(key)} -> {config.get(key)}" for key in sorted(found.keys() | config.keys())
                 if found.get(key) != config.get(key)]
    if differing:
        raise utils.UserError(f"{folder}: holds a run with another configuration ({'; '.join(differing)}); "
                              "give the same flags, or --overwrite to train it again")
    done = state["epoch"] >= args.num_epochs
    if not done and not args.resume:
        raise utils.UserError(f"{folder}: holds an unfinished run; --resume continues it, --overwrite starts again")
    return done


def fit(run, model, objective):
    """Train `model` on `run`, one epoch after the other, and leave last.pth, metrics.jsonl and config.json behind.

    objective(model, batch, progress) -> (scalar loss, {name: scalar tensor}); `batch` holds "voxels" {subject: (b, V)},
    "target" (B, ...) and "image_ids" (B,) on the device, progress = epoch / epochs in [0, 1).
    Every epoch starts from the seed (seed, epoch), so a resumed run repeats an uninterrupted one.
    """
    args = run.args
    device = utils.pick_device(args.device)
    if run.pretrained is not None:
        copied = load_trunk(model, utils.load_checkpoint(run.pretrained)["model"])
        print(f"{run.name}: {len(copied)} tensors copied from {run.pretrained.parent.name} "
              f"({', '.join(sorted({key.split('.')[0] for key in copied}))}); the voxel encoder starts anew")
    model.to(device)
    optimizer = torch.optim.AdamW(weight_decay_groups(model), lr=args.max_lr, fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.max_lr, total_steps=max(1, args.num_epochs * len(run.train)),
        pct_start=min(0.5, 2 / args.num_epochs))
    start = 0
    if args.resume and (run.folder / "last.pth").exists():
        state = utils.load_checkpoint(run.folder / "last.pth")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start = state["epoch"]
        print(f"{run.name}: resumed after epoch {start}")
    utils.save_json(run.folder / "config.json", run.config | {"git_commit": utils.git_commit()})
    tracker = utils.Tracker(run.folder, run.name, run.config, args.wandb_log, args.wandb_project)

    bar = tqdm(range(start, args.num_epochs), desc=run.name, initial=start, total=args.num_epochs, unit="epoch",
               disable=None if sys.stderr.isatty() else False, mininterval=2)
    for epoch in bar:
        utils.seed_everything(utils.derive_seed(args.seed, epoch, 1))
        progress = epoch / args.num_epochs
        logs = run_epoch(model, objective, run.train, epoch, progress, device, args.num_workers, optimizer, schedule)
        logs |= run_epoch(model, objective, run.val, 0, progress, device, args.num_workers)
        tracker.log(logs, step=epoch + 1)
        bar.set_postfix(loss=f"{logs['train/loss']:.3f}", val=f"{logs['val/loss']:.3f}")
        if (epoch + 1) % args.ckpt_every == 0 or epoch + 1 == args.num_epochs:
            utils.save_checkpoint(run.folder / "last.pth", {
                "model": model.state_dict(), "model_args": model.model_args, "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(), "epoch": epoch + 1, "step": (epoch + 1) * len(run.train),
                "config": run.config, "subjects": list(run.n_voxels), "n_voxels": run.n_voxels})
    tracker.finish()


def run_epoch(model, objective, batches, epoch, progress, device, num_workers, optimizer=None, schedule=None):
    """One pass over `batches`: training with an optimizer, validation without. Returns logs, averaged over trials."""
    training, prefix = optimizer is not None, "train" if optimizer is not None else "val"
    model.train(training)
    batches.set_epoch(epoch)
    loader = DataLoader(batches, batch_size=None, num_workers=num_workers if training else 0,
                        pin_memory=device.type == "cuda")
    sums, n_trials, waited, started = {}, 0, 0.0, time.perf_counter()
    before = started
    with torch.set_grad_enabled(training), attention(device):
        for batch in loader:
            waited += time.perf_counter() - before
            batch = {"voxels": {subj: move(v, device) for subj, v in batch["voxels"].items()},
                     "target": move(batch["targets"]["target"], device), "image_ids": batch["image_ids"]}
            with autocast(device):
                loss, logs = objective(model, batch, progress)
            if training:
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
            n = len(batch["target"])
            for key, value in {"loss": loss.detach(), **logs}.items():
                sums[key] = sums.get(key, 0) + value * n
            n_trials += n
            before = time.perf_counter()
    means = {f"{prefix}/{key}": float(value) / n_trials for key, value in sums.items()}
    if training:
        # a NaN anywhere in the epoch survives in the sum, so the GPU need not be asked at every step
        if not means["train/loss"] == means["train/loss"]:
            raise utils.UserError(f"the loss became NaN in epoch {epoch + 1}; the last checkpoint is intact: "
                                  "lower --max_lr and use --resume, or look for NaN in the targets")
        seconds = time.perf_counter() - started
        means |= {"train/lr": schedule.get_last_lr()[0], "train/samples_per_s": n_trials / seconds,
                  "train/data_wait_pct": 100 * waited / seconds}
    return means


def move(array, device):
    return torch.as_tensor(array).to(device, non_blocking=True)


def attention(device):
    """On a CPU, plain matrix products: its fused attention is several times slower backwards on short sequences."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def autocast(device):
    """bf16 on a GPU that has it, fp32 elsewhere."""
    enabled = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def weight_decay_groups(model, weight_decay=1e-2):
    """AdamW parameter groups: no decay on biases and normalisation gains (all parameters of one dimension)."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    free = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


# --- from a run to scores ----------------------------------------------------------------------------------------


def get_score_parser(doc):
    """The flags that score_c.py and score_g.py share."""
    parser = options.Parser(doc)
    options.add_paths(parser)
    options.add_subject(parser)
    options.add_run(parser)
    options.add_compute(parser)
    options.add_control(parser)
    parser.add_argument("--prior_steps", type=options.whole, default=20, metavar="N",
                        help="DDIM steps of the prior: 20 draws a sample, 1 predicts the mean")
    parser.add_argument("--batch_size", type=options.whole, default=100, metavar="IMAGES")
    parser.add_argument("--overwrite", action=argparse.BooleanOptionalAction, default=False)
    return parser


@torch.no_grad()
def score(args, feat):
    """Predict `feat` of the test images of --subj with its fine-tuned run, and save the scores.

    Writes nsdgeneral.npy (N, T, D), the prior's sample, and retrieval.npy (N, T, D), the contrastive tokens.
    """
    paths = utils.Paths.from_args(args)
    device = utils.pick_device(args.device)
    name = utils.run_name("finetune", args.subj, feat, args.hidden_dim, args.num_sessions)
    checkpoint = paths.run(name) / "last.pth"
    state = utils.load_checkpoint(checkpoint, f"--hidden_dim/--num_sessions: the run {name}")
    if state["config"]["feat"] != feat:
        raise utils.UserError(f"{checkpoint}: was trained for {state['config']['feat']}, wanted {feat}; train {feat}")
    config = {"run": name, "feat": feat, "subj": args.subj, "checkpoint_sha256": utils.file_hash(checkpoint),
              "control": args.control, "prior_steps": args.prior_steps, "seed": args.seed}
    folder = paths.scores(args.subj, name, feat, args.control)
    if (folder / "config.json").exists() and not args.overwrite and utils.load_json(folder / "config.json") == config:
        print(f"{folder}: scored before with this checkpoint, kept")
        return
    test = data.load_test_set(paths, args.subj, args.control, args.seed)
    if state["n_voxels"].get(args.subj) != test.betas.shape[1]:
        raise utils.UserError(f"{checkpoint}: has heads for {state['n_voxels']} voxels, the betas of {args.subj} have "
                              f"{test.betas.shape[1]}; fine-tune on {args.subj} first")
    model = build_model(state["model_args"])
    model.load_state_dict(state["model"])
    model.eval().to(device)
    predictions, tokens = [], []
    starts = range(0, len(test.betas), args.batch_size)
    for start in tqdm(starts, desc=f"score {name}", unit="batch"):
        voxels = torch.from_numpy(test.betas[start:start + args.batch_size]).to(device)
        backbone, contrast = model({args.subj: voxels})
        # noise from (seed, image id), so that the batch size does not matter
        seeds = [utils.derive_seed(args.seed, image_id) for image_id in test.image_ids[start:start + args.batch_size]]
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        predictions.append(model.prior.sample(backbone, args.prior_steps, generators).cpu())
        tokens.append(contrast.cpu())
    arrays = {"nsdgeneral": torch.cat(predictions).numpy(), "retrieval": torch.cat(tokens).numpy()}
    utils.save_scores(folder, test.image_ids, arrays, config)
    print(f"{folder}: {len(test.image_ids)} images")
