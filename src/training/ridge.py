"""The linear baseline: one ridge regression per component of a feature, all from one decomposition of the responses.

Letters: N images, V voxels, K components."""

import numpy as np
import torch

import utils
from disk.checkpoints import save_checkpoint
from models import RidgeDecoder
from training.loop import conclude, start_records
from training.objectives import ComponentObjective
from training.runs import open_component_run

RIDGE_ALPHAS = np.logspace(-1, 7, 17)  # each component picks its own; betas are z-scored, so these suit any subject


def train_ridge(plan, name, feats):
    """Fit a ridge regression to every component of the features; leave last.pth, metrics.jsonl and config.json behind.

    plan: settings.Plan; name: of the run, a feature or g. Responses averaged over an image's trials (N, V) ->
    coefficients (N, K). Validation images are left out, and give each component's error. Nothing is done where the
    folder holds this run already.
    """
    opened = open_component_run(plan, name, feats)
    if opened is None:
        return
    run, components = opened
    if run.team.size > 1:
        raise utils.UserError("--model ridge: runs in one process, found LAUNCH with several; leave LAUNCH empty")
    run.introduce()
    (subj,) = run.n_voxels
    image_ids, responses = run.averaged("train", subj)
    decomposed = decompose(torch.from_numpy(responses).to(run.team.device))
    model = RidgeDecoder(run.n_voxels, {feat: known.k for feat, known in components.items()})
    for feat, head in model.heads.items():
        wanted = torch.from_numpy(run.train.targets[feat][image_ids]).to(run.team.device)
        weight, bias, _ = solve(decomposed, wanted / components[feat].total ** 0.5)
        head.weight.data, head.bias.data = weight.float().cpu(), bias.float().cpu()

    image_ids, responses = run.averaged("val", subj)
    batch = {"voxels": {subj: torch.from_numpy(responses)}, "image_ids": torch.from_numpy(image_ids),
             **{feat: torch.from_numpy(rows[image_ids]) for feat, rows in run.val.targets.items()}}
    objective = ComponentObjective(components)
    with torch.no_grad():
        logs = objective.summarise(objective(model.eval(), batch, 0.0)[1])
    tracker = start_records(run, plan.loop)
    tracker.log_epoch({f"val/{key}": float(value) for key, value in logs.items()}, 1)
    save_checkpoint(run.folder / "last.pth", {
        "model": model.state_dict(), "model_args": model.model_args, "epoch": plan.loop.num_epochs,
        "config": run.config, "subjects": [subj], "n_voxels": run.n_voxels, **objective.kept})
    conclude(run, objective, tracker)


def decompose(responses):
    """Decompose responses (N, V): (rows centred (N, V), their mean (V,), eigenvectors, eigenvalues of rows rows^T)."""
    rows = responses.double()
    mean = rows.mean(0)
    rows = rows - mean
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    return rows, mean, vectors, values.clamp_min(0)


def solve(decomposed, targets, alphas=RIDGE_ALPHAS):
    """Solve a ridge regression for every column of targets (N, K), each with its own penalty.

    The penalty is the one of `alphas` with the smallest leave-one-out error. The intercept is not penalised. Returns
    weight (K, V), bias (K,), and the penalties (K,), float64.
    """
    rows, mean, *_ = decomposed
    duals, _, chosen = best_of(decomposed, targets, alphas)
    weight = duals.T @ rows
    return weight, targets.double().mean(0) - weight @ mean, chosen


def left_out(decomposed, targets, alphas=RIDGE_ALPHAS):
    """Predict each row of targets (N, K) by the ridge (`solve`) of all the others, (N, K) float64."""
    return targets.double() - best_of(decomposed, targets, alphas)[1]


def best_of(decomposed, targets, alphas):
    """Return, of each column's best penalty, the dual coefficients (N, K), leave-one-out errors (N, K) and it (K,).

    The errors have a closed form: with G = rows rows^T + alpha and dual coefficients c = G^-1 y, a row's error when it
    is left out is c_i / (G^-1)_ii (Rifkin & Lippert 2007, MIT-CSAIL-TR-2007-025).
    """
    rows, _, vectors, values = decomposed
    targets = targets.double()
    turned = vectors.T @ (targets - targets.mean(0))  # (N, K)
    least = torch.full_like(targets[0], float("inf"))
    duals, errors, chosen = torch.zeros_like(targets), torch.zeros_like(targets), torch.zeros_like(least)
    for alpha in alphas:
        inverse = 1 / (values + alpha)
        dual = vectors @ (inverse[:, None] * turned)
        # a constant is an eigenvector of the centred kernel, of value 0: without it the intercept is free
        diagonal = vectors.square() @ inverse - 1 / (alpha * len(rows))
        error = dual / diagonal[:, None]
        squared = error.square().mean(0)  # (K,)
        better = squared < least
        least, chosen = torch.where(better, squared, least), torch.where(better, alpha, chosen)
        duals, errors = torch.where(better, dual, duals), torch.where(better, error, errors)
    return duals, errors, chosen
