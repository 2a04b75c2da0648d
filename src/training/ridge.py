"""The linear baseline: one ridge regression per value of a feature.

Letters: N images, V voxels, F values of a feature."""

import numpy as np
import torch

import utils
from disk.checkpoints import save_checkpoint
from models import RidgeModel
from nsd.repeats import average_repeats
from training.contrast import pct_correct, similarities
from training.loop import start_records
from training.runs import check_finite, open_run

RIDGE_ALPHAS = np.logspace(-1, 7, 17)  # each target picks its own; betas are z-scored, so these suit any subject
RIDGE_COLUMNS = 2048  # targets solved at once: bounds the memory


def train_ridge(plan, feat):
    """Fit one ridge regression per value of a feature; leave last.pth, metrics.jsonl and config.json behind.

    Repeat-averaged responses (N, V) -> targets (N, F), each with the penalty that its leave-one-out error prefers
    (scikit-learn's RidgeCV). Validation images are left out, and scored: explained variance and retrieval. Nothing is
    done where the folder holds this run already.
    """
    run = open_run(plan, feat)
    if run is None:
        return
    from sklearn.linear_model import RidgeCV

    if run.team.size > 1:
        raise utils.UserError("--model ridge: runs in one process, found LAUNCH with several; leave LAUNCH empty")
    (subj,) = run.n_voxels
    betas, target = run.train.betas[subj], run.train.targets["target"]
    train, val = (average_repeats(betas, run.tables[part][subj]) for part in ("train", "val"))
    model = RidgeModel(run.n_voxels, run.shapes["target"])
    rows = target[train.image_ids].reshape(len(train.image_ids), -1)  # (N, F) as stored
    check_finite(target, rows)
    run.introduce()
    for start in utils.progress(range(0, rows.shape[1], RIDGE_COLUMNS), desc=run.name, unit="block", delay=2):
        columns = slice(start, start + RIDGE_COLUMNS)
        solved = RidgeCV(RIDGE_ALPHAS, alpha_per_target=True).fit(train.betas, rows[:, columns].astype(np.float32))
        model.linear.weight.data[columns] = torch.as_tensor(solved.coef_)
        model.linear.bias.data[columns] = torch.as_tensor(solved.intercept_)
    tracker = start_records(run, plan.loop)
    truth = torch.from_numpy(target[val.image_ids].astype(np.float32))
    predicted = model.predict({subj: torch.from_numpy(val.betas)})["nsdgeneral"]
    similarity = similarities(predicted, truth)
    mean = torch.as_tensor(run.target_statistics[0])
    error, spread = (predicted - truth).square().sum(), (truth - mean).square().sum()
    tracker.log({"val/r2": float(1 - error / spread), "val/fwd_pct_correct": float(pct_correct(similarity)),
                 "val/bwd_pct_correct": float(pct_correct(similarity.T))}, step=1)
    tracker.finish()
    save_checkpoint(run.folder / "last.pth", {
        "model": model.state_dict(), "model_args": model.model_args, "epoch": plan.loop.num_epochs,
        "config": run.config, "subjects": [subj], "n_voxels": run.n_voxels})
