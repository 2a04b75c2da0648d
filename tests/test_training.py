"""Training runs on a tiny data set: resume, refuse, pretrain, fine-tune, the linear baseline."""

import itertools
import json
import multiprocessing
import os
import random
import resource
import time

import h5py
import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeCV
from torch.utils.data import DataLoader

import train_c
import train_g
import train_z
from disk.checkpoints import load_checkpoint, save_checkpoint
from models import BrainModel, Decoder, build_model
from nsd.components import open_components
from nsd.rows import open_feature
from nsd.trials import load_trials, split_by_image
from tiny_nsd import N_VOXELS
from tiny_runs import FINETUNED, PRETRAINED, SCRATCH, checkpoint, copy_world, stopped_at, train
from training.loop import make_optimizer, parameter_groups
from training.objectives import BrainObjective, LatentObjective
from training.ridge import RIDGE_ALPHAS, decompose, solve
from training.runs import subjects_of, target_statistics
from training.settings import Loop, Plan
from training.tracking import Dashboard

TIMES = {"train/samples_per_s", "train/data_wait_pct"}


@pytest.fixture
def paths(pristine_world, tmp_path):
    return copy_world(pristine_world, tmp_path)


def records(paths, run=SCRATCH):
    """metrics.jsonl without what depends on the clock."""
    lines = (paths.run(run) / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def assert_equal_states(one, other):
    """Two checkpoints, to the bit."""
    assert one.keys() == other.keys()
    for key in one:
        if isinstance(one[key], dict):
            assert_equal_states(one[key], other[key])
        elif torch.is_tensor(one[key]):
            assert torch.equal(one[key], other[key]), key
        else:
            assert one[key] == other[key], key


# --- stopping and going on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("script", "objective", "run"), [
    (train_c, BrainObjective, SCRATCH), (train_z, LatentObjective, "scratch_subj01_3sess_ext1_z_8"),
])
@pytest.mark.parametrize("step", [4, 6])  # of four steps an epoch: between epochs, and in the middle of one
def test_a_run_stopped_and_resumed_equals_an_uninterrupted_one(paths, script, objective, run, step):
    flags = ("--num_epochs", 3, "--num_workers", 1)
    assert train(paths, *flags, script=script) == 0
    whole, best, logs = checkpoint(paths, run), checkpoint(paths, run, "best.pth"), records(paths, run)
    with stopped_at(step, objective):
        assert train(paths, *flags, "--overwrite", script=script) == 143
    stopped = checkpoint(paths, run)
    assert (stopped["epoch"], stopped["step"]) == divmod(step, 4)
    assert train(paths, *flags, "--resume", script=script) == 0
    assert_equal_states(checkpoint(paths, run), whole)
    assert_equal_states(checkpoint(paths, run, "best.pth"), best)
    assert records(paths, run) == logs


@pytest.fixture
def one_thread():
    """Of torch; so a process can be forked, which has none of the threads that its parent's work was shared among."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_run_killed_at_random_moments_and_resumed_equals_an_uninterrupted_one(paths, one_thread):
    flags = ("--num_epochs", 60, "--ckpt_every", 2, "--resume")
    assert train(paths, *flags) == 0
    whole, logs = checkpoint(paths), records(paths)
    last = paths.run(SCRATCH) / "last.pth"
    seconds = last.stat().st_mtime - (paths.run(SCRATCH) / "config.json").stat().st_mtime  # of all epochs
    last.unlink()
    kills = 0
    for _ in range(3):
        before = last.stat().st_mtime_ns if last.exists() else None
        process = multiprocessing.get_context("fork").Process(target=train, args=(paths, *flags))
        process.start()
        while process.is_alive() and (not last.exists() or last.stat().st_mtime_ns == before):
            time.sleep(0.01)
        time.sleep(random.uniform(0, seconds / 10))
        kills += process.is_alive()
        process.kill()
        process.join()
    assert kills > 0
    unfinished = checkpoint(paths)["epoch"] < 60
    assert train(paths, *flags) == 0
    assert unfinished
    assert_equal_states(checkpoint(paths), whole)
    assert records(paths) == logs


def test_checkpoints_come_every_so_many_epochs_and_at_the_end(paths, monkeypatch):
    saved = []
    save = save_checkpoint
    monkeypatch.setattr("training.loop.save_checkpoint", lambda path, state: (saved.append((path.name, state["epoch"])),
                                                                       save(path, state)))
    assert train(paths, "--num_epochs", 5, "--ckpt_every", 2) == 0
    assert [epoch for name, epoch in saved if name == "last.pth"] == [2, 4, 5]
    values = [row["val/loss_prior"] for row in records(paths)]
    assert [e for name, e in saved if name == "best.pth"] == [
        i + 1 for i, value in enumerate(values) if value < min(values[:i], default=np.inf)]


@pytest.mark.parametrize("workers", [0, 1])
def test_long_epochs_are_saved_by_time_and_gone_on_with(paths, monkeypatch, workers):
    """After every step here; the training dies, unasked, in the middle of its second epoch."""
    flags, positions = ("--num_epochs", 3, "--num_workers", workers), []
    assert train(paths, *flags) == 0
    whole, logs = checkpoint(paths), records(paths)
    save, call, steps = save_checkpoint, BrainObjective.__call__, itertools.count(1)

    def noting(path, state):
        if path.name == "last.pth" and "step" in state:
            positions.append((state["epoch"], state["step"]))
        save(path, state)

    def dying(self, model, *args):
        if model.training and next(steps) == 7:
            raise ZeroDivisionError
        return call(self, model, *args)

    monkeypatch.setattr("training.loop.save_checkpoint", noting)
    monkeypatch.setattr(BrainObjective, "__call__", dying)
    with pytest.raises(ZeroDivisionError):
        train(paths, *flags, "--overwrite", "--ckpt_minutes", 1e-9)
    assert positions == [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2)]
    assert train(paths, *flags, "--resume") == 0  # how often it is saved may differ
    assert_equal_states(checkpoint(paths), whole)
    assert records(paths) == logs


def test_what_is_resumed_is_opened_once(paths, monkeypatch):
    with stopped_at(6):
        assert train(paths, "--num_epochs", 3) == 143
    opened = []
    monkeypatch.setattr("training.loop.load_checkpoint", lambda *args, **more: (opened.append(args[0].name),
                                                                                load_checkpoint(*args, **more))[1])
    assert train(paths, "--num_epochs", 3, "--resume") == 0
    assert opened == ["last.pth"]


def test_the_advice_after_nan_can_be_followed(paths, capsys, monkeypatch):
    call, steps = BrainObjective.__call__, itertools.count(1)

    def breaking(self, model, *args):
        loss, logs = call(self, model, *args)
        return loss * (float("nan") if model.training and next(steps) == 6 else 1), logs

    monkeypatch.setattr(BrainObjective, "__call__", breaking)
    assert train(paths, "--num_epochs", 3) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "NaN or infinite in epoch 2, at --max_lr 0.0003" in error
    assert checkpoint(paths)["epoch"] == 1 and not list(paths.run(SCRATCH).glob(".*.tmp"))
    advised = error.partition("start over with a lower one: ")[2].split()
    assert float(advised[1]) < 3e-4
    assert train(paths, "--num_epochs", 3, *advised) == 0 and checkpoint(paths)["epoch"] == 3


@pytest.mark.parametrize("minutes", [10, 1e-9])
def test_weights_that_are_not_finite_are_never_saved(paths, capsys, monkeypatch, minutes):
    """The last step's gradient makes them so: no loss has seen them yet."""
    monkeypatch.setattr(BrainObjective, "__call__", with_gradients_times(float("nan"), step=4))
    assert train(paths, "--num_epochs", 2, "--ckpt_minutes", minutes) == 2
    assert "NaN or infinite in epoch 1" in capsys.readouterr().err
    last = paths.run(SCRATCH) / "last.pth"
    assert last.exists() == (minutes < 1)
    if last.exists():
        assert checkpoint(paths)["step"] == 3


def with_gradients_times(factor, step):
    """BrainObjective's __call__, whose gradients are multiplied in training step number `step` (from 1)."""
    call, steps = BrainObjective.__call__, itertools.count(1)

    def wrapped(self, model, *args):
        loss, logs = call(self, model, *args)
        if model.training and next(steps) == step:
            loss.register_hook(lambda gradient: gradient * factor)
        return loss, logs

    return wrapped


def test_the_schedule_waits_where_fp16_leaves_a_step_out(paths, monkeypatch):
    """As it does of the first steps, until it knows the size of gradients, and of one whose gradient is infinite."""
    flags = ("--num_epochs", 6, "--precision", "fp16")
    monkeypatch.setattr(BrainObjective, "__call__", with_gradients_times(float("inf"), step=16))
    with stopped_at(18):
        assert train(paths, *flags) == 143
    state = checkpoint(paths)
    taken = state["optimizer"]["step"]
    assert 0 < taken < 17 and state["schedule"]["clock"]["last_epoch"] == taken
    assert state["schedule"]["groups"][0]["lr"] == pytest.approx(one_cycle(24, taken, pct_start=1 / 3))
    assert train(paths, *flags, "--resume") == 0


def one_cycle(steps, step, pct_start, max_lr=3e-4):
    """PyTorch's learning rate after so many steps of its one-cycle schedule."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=max_lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr, total_steps=steps, pct_start=pct_start)
    for _ in range(step):
        optimizer.step()
        schedule.step()
    return schedule.get_last_lr()[0]


def test_validation_reads_with_workers(paths, monkeypatch):
    """As training does."""
    made = []

    class Loader(DataLoader):
        def __init__(self, batches, **settings):
            made.append((len(batches), settings["num_workers"]))
            super().__init__(batches, **settings)

    monkeypatch.setattr("training.loop.DataLoader", Loader)
    assert train(paths, "--num_epochs", 1, "--num_workers", 2) == 0
    assert made == [(4, 2), (3, 2)]  # training's batches, validation's


def test_the_log_tells_what_happened(paths):
    with stopped_at(6):
        assert train(paths, "--num_epochs", 3) == 143
    assert train(paths, "--num_epochs", 3, "--resume") == 0
    log = (paths.run(SCRATCH) / "log.txt").read_text()
    assert log.count("24 training and 6 validation trials of subj01") == 2  # the run was opened twice
    for words in ("epoch 1 of 3: loss", "resumed after epoch 1, step 2", "epoch 3 of 3: loss"):
        assert log.count(words) == 1


@pytest.mark.parametrize("step", [2, 6])  # of four steps an epoch
def test_wandb_goes_on_with_a_run_that_was_stopped_in_any_epoch(paths, monkeypatch, step):
    asked, begin = [], Dashboard.__init__
    monkeypatch.setattr(Dashboard, "__init__", lambda self, *args, resume=False: asked.append(resume) or
                        begin(self, *args, resume=resume))
    with stopped_at(step):
        assert train(paths, "--num_epochs", 3) == 143
    assert train(paths, "--num_epochs", 3, "--resume") == 0
    assert asked == [False, True]


def test_best_is_the_epoch_of_the_lowest_validation_loss(paths):
    assert train(paths, "--num_epochs", 6, "--max_lr", 0.03) == 0
    best, values = checkpoint(paths, file="best.pth"), [row["val/loss_prior"] for row in records(paths)]
    assert best["epoch"] == 1 + int(np.argmin(values)) and best["best"] == min(values)


def test_a_full_disk_does_not_speak_of_checkpoints_that_are_not_there(paths, capsys, monkeypatch):
    for file, function, error in (("best.pth", "disk.checkpoints.torch.save", RuntimeError("file write failed")),
                                  ("metrics.jsonl", "training.tracking.open", OSError(28, "No space"))):
        with monkeypatch.context() as patch:
            patch.setattr(function, raising(error), raising=False)
            assert train(paths, "--num_epochs", 1, "--overwrite") == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"{file}: could not be written" in line and "intact" not in line and "make room" in line


def raising(error):
    def call(*args, **more):
        raise error

    return call


@pytest.mark.parametrize(("limit", "file"), [(1000, "metrics.jsonl"), (5000, "last.pth")])
def test_a_full_disk_leaves_the_old_checkpoint(paths, capsys, monkeypatch, limit, file):
    call, limits = BrainObjective.__call__, resource.getrlimit(resource.RLIMIT_FSIZE)
    steps = iter(range(1, 10**6))

    def fill_the_disk(self, model, *args):
        if model.training and next(steps) == 9:  # in the third epoch
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        return call(self, model, *args)

    monkeypatch.setattr(BrainObjective, "__call__", fill_the_disk)
    monkeypatch.setattr(BrainObjective, "judge", "fwd_pct_correct")  # no best.pth in that epoch
    try:
        assert train(paths, "--num_epochs", 4) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{file}: could not be written" in error and "intact" in error
    assert checkpoint(paths)["epoch"] == 2
    assert not [file for file in paths.run(SCRATCH).iterdir() if file.name.endswith(".tmp")]
    assert train(paths, "--num_epochs", 4, "--resume") == 0
    assert [row["step"] for row in records(paths)] == [1, 2, 3, 4]


def test_overwrite_starts_anew_even_when_told_to_resume(paths, monkeypatch, capsys):
    """train.sh always says --resume; a job that SLURM queued again goes on with what it had begun."""
    with stopped_at(6):
        assert train(paths, "--num_epochs", 3) == 143
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert train(paths, "--num_epochs", 3, "--resume", "--overwrite") == 0
    assert "resumed after epoch 1, step 2" in capsys.readouterr().out
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    assert train(paths, "--num_epochs", 1, "--n_blocks", 2, "--resume", "--overwrite") == 0
    assert checkpoint(paths)["epoch"] == 1 and len(records(paths)) == 1


def test_other_betas_are_refused_on_resume(paths, capsys):
    with stopped_at(2):
        assert train(paths, "--multi_subject", "--num_epochs", 1) == 143
    with h5py.File(paths.betas("subj02"), "r+") as file:
        betas = file["betas"][:, :3]
        del file["betas"]
        file["betas"] = betas
    assert train(paths, "--multi_subject", "--num_epochs", 1, "--resume") == 2
    assert "others than are there now: betas of subj02;" in capsys.readouterr().err


def test_an_unfinished_run_needs_the_users_word_and_a_finished_one_is_kept(paths, capsys):
    assert train(paths, "--num_epochs", 1) == 0
    assert train(paths, "--num_epochs", 1) == 0 and "already finished" in capsys.readouterr().out
    assert train(paths, "--num_epochs", 1, "--max_lr", 1e-2) == 2
    assert "max_lr 0.0003 -> 0.01" in capsys.readouterr().err
    assert train(paths, "--num_epochs", 1, "--max_lr", 1e-2, "--tag", "fast") == 0  # beside it
    assert checkpoint(paths, SCRATCH + "_fast")["config"]["max_lr"] == 1e-2
    with stopped_at(2):
        assert train(paths, "--num_epochs", 1, "--overwrite") == 143
    capsys.readouterr()
    assert train(paths, "--num_epochs", 1) == 2 and "--resume" in capsys.readouterr().err
    assert train(paths, "--num_epochs", 1, "--resume", "--max_lr", 1e-2) == 2
    assert "another configuration" in capsys.readouterr().err


# --- stages -------------------------------------------------------------------------------------------------------


def test_finetuning_starts_from_the_pretrained_trunk_and_a_new_head(paths, capsys):
    assert train(paths, "--multi_subject", "--num_epochs", 1) == 0
    assert set(checkpoint(paths, PRETRAINED)["n_voxels"]) == {"subj02"}
    # a step of size zero leaves the weights where fine-tuning began
    assert train(paths, "--multisubject_ckpt", "auto", "--num_epochs", 1, "--max_lr", 1e-30) == 0
    assert "starts from scratch" in capsys.readouterr().out
    before, after = checkpoint(paths, PRETRAINED)["model"], checkpoint(paths, FINETUNED)["model"]
    trunk = [key for key in after if not key.startswith("voxelenc.")]
    assert trunk and all(torch.allclose(before[key], after[key]) for key in trunk)
    assert after["voxelenc.linears.0.weight"].shape == (8, N_VOXELS["subj01"])


def test_few_sessions_are_the_first_ones(paths, monkeypatch):
    opened = []
    monkeypatch.setattr("training.mindeye2.fit", lambda run, *rest: opened.append(run))
    assert train(paths, "--num_epochs", 1, "--num_sessions", 1) == 0
    tables = opened[0].tables
    assert {session for part in tables.values() for session in part["subj01"]["session"]} == {1}


def test_pretraining_is_the_same_run_for_any_number_of_sessions(paths, capsys):
    """train.sh gives --num_sessions to both stages."""
    assert train(paths, "--multi_subject", "--num_epochs", 1) == 0
    assert train(paths, "--multi_subject", "--num_epochs", 1, "--num_sessions", 1) == 0
    assert "already finished" in capsys.readouterr().out


def test_pretraining_on_some_subjects(paths, monkeypatch):
    """train.sh gives --pretrain_subjects to both stages: to fine-tuning it says nothing."""
    others = ["subj02", "subj03", "subj05"]
    monkeypatch.setattr("training.runs.list_subjects", lambda paths: ["subj01", *others])
    for given, wanted in (([], others), (["5", "2"], ["subj02", "subj05"]), (["subj03"], ["subj03"])):
        flags = ["--root", str(paths.root), *(["--pretrain_subjects", *given] if given else [])]
        plan = Plan.from_args(train_c.get_parser().parse_args([*flags, "--multi_subject"]))
        assert subjects_of(plan) == wanted and ("pretrain_subjects" in plan.config) == bool(given)
        plan = Plan.from_args(train_c.get_parser().parse_args([*flags, "--multisubject_ckpt", "auto"]))
        assert subjects_of(plan) == ["subj01"] and "pretrain_subjects" not in plan.config


def test_auto_prefers_the_pretraining_of_the_same_tag(paths, capsys):
    assert train(paths, "--multi_subject", "--num_epochs", 1) == 0
    assert train(paths, "--multisubject_ckpt", "auto", "--num_epochs", 1, "--tag", "a") == 0
    assert f"copied from {PRETRAINED} (all but the voxel encoder, which starts from scratch)" in capsys.readouterr().out
    assert train(paths, "--multi_subject", "--num_epochs", 1, "--tag", "a") == 0
    assert train(paths, "--multisubject_ckpt", "auto", "--num_epochs", 1, "--tag", "a", "--overwrite") == 0
    assert f"copied from {PRETRAINED}_a " in capsys.readouterr().out


def test_an_unfinished_pretraining_is_refused(paths, capsys):
    with stopped_at(2):
        assert train(paths, "--multi_subject", "--num_epochs", 3) == 143
    assert train(paths, "--multisubject_ckpt", "auto", "--num_epochs", 1) == 2
    assert "0 of 3 epochs are done" in capsys.readouterr().err


@pytest.mark.parametrize(("script", "loss", "max_lr"), [
    (train_c, "train/loss_prior", 1e-2), (train_z, "train/loss_l1", 3e-3),
])
def test_the_loss_falls(paths, script, loss, max_lr):
    plainly = ["--clip_scale", 0, "--mixup_pct", 0, "--dropout", 0]
    assert train(paths, "--num_epochs", 12, "--max_lr", max_lr, *plainly, script=script) == 0
    feat = "z_8" if script is train_z else "c_8_mlp"
    rows = records(paths, f"scratch_subj01_3sess_ext1_{feat}")
    assert rows[-1][loss] < 0.8 * rows[0][loss]


def test_several_layers_train_in_one_process(paths, capsys):
    assert train(paths, "--feat", "g_2", "g_2", "--num_epochs", 1, script=train_g) == 0
    assert "already finished" in capsys.readouterr().out
    assert train(paths, "--feat", "g_4", "--num_epochs", 1, script=train_g) == 2
    assert "g_4_all.hdf5" in capsys.readouterr().err


def test_target_statistics_are_those_of_the_training_images(paths):
    target = open_feature(paths, "c")
    trials = load_trials(paths, "subj01", "train")
    mean, std = target_statistics(target, {"subj01": trials}, seed=0)
    with h5py.File(paths.feature("c")) as file:
        rows = file["data"][np.unique(trials["image_id"])].astype(np.float64).reshape(-1, 3, 6)
    np.testing.assert_allclose(mean, rows.mean(axis=0), rtol=1e-4)
    assert std == pytest.approx(np.sqrt(((rows - rows.mean(axis=0)) ** 2).mean()), rel=1e-4)


def test_no_weight_decay_on_biases_and_norms():
    model = BrainModel({"subj01": 5}, 8, 3, 6, prior_depth=1)
    decayed, free = parameter_groups(model, 1e-2)
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    expected = {name for name, p in model.named_parameters() if "bias" in name or p.ndim == 1}
    assert {names[id(p)] for p in free["params"]} == expected and "prior.net.offset_bias" in expected
    assert (decayed["weight_decay"], free["weight_decay"]) == (1e-2, 0.0)


def test_a_model_may_pace_some_of_its_parameters():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    model.paced = [([model[1].weight], 0.5)]
    groups = parameter_groups(model, 1e-2)
    assert [[p.shape for p in group["params"]] for group in groups] == [[(4, 3)], [(4,), (2,)], [(2, 4)]]
    assert groups[-1]["weight_decay"] == 0
    optimizer, schedule = make_optimizer(model, Loop(num_epochs=4, max_lr=1e-2, batch_size=1, seed=0), 5)
    rates = []
    for _ in range(20):
        rates.append(schedule.get_last_lr())
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(np.max(rates, axis=0), [1e-2, 1e-2, 0.5])
    np.testing.assert_allclose([r[2] for r in rates], [50 * r[0] for r in rates])  # one course, another height


def test_the_optimizer_is_adamw():
    """Fused, as it runs here, against PyTorch's plain loop over the parameters."""
    loop, networks = Loop(num_epochs=2, max_lr=1e-2, batch_size=1, seed=0), []
    for fused in (True, False):
        torch.manual_seed(0)
        model = Decoder({"subj01": 50, "subj02": 40}, 16, {"c": 7})
        optimizer, schedule = make_optimizer(model, loop, steps_per_epoch=20)
        if not fused:
            optimizer = torch.optim.AdamW(parameter_groups(model, loop.weight_decay), lr=1e-2, foreach=False)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=40, pct_start=0.5)
        for _ in range(40):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
            schedule.step()
        networks.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*networks, rtol=1e-6, atol=1e-6)


# --- the linear baseline ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("script", "name", "feats"), [(train_c, "c", ["c"]), (train_g, "g", ["g_2", "g_12"])])
def test_ridge_is_scikit_learns(paths, script, name, feats):
    more = ["--feat", *feats] if script is train_g else []
    assert train(paths, "--model", "ridge", *more, script=script) == 0
    state = checkpoint(paths, f"ridge_subj01_3sess_ext1_{name}")
    trials = split_by_image(load_trials(paths, "subj01", "train", 3), 0.2, 42)[0]
    images = sorted(set(trials["image_id"]))
    with h5py.File(paths.betas("subj01")) as betas:
        voxels = np.stack([betas["betas"][()][trials["row"][trials["image_id"] == i]].mean(axis=0) for i in images])
    model = build_model(state["model_args"])
    model.load_state_dict(state["model"])
    new = np.random.default_rng(0).standard_normal((3, N_VOXELS["subj01"])).astype(np.float32)
    found = model({"subj01": torch.from_numpy(new)})[0]
    for feat in feats:
        known = open_components(paths, feat)
        wanted = known.coefficients[images].astype(np.float64)
        expected = RidgeCV(RIDGE_ALPHAS, alpha_per_target=True).fit(voxels, wanted).predict(new)
        np.testing.assert_allclose(found[feat].detach() * known.total ** 0.5, expected, rtol=1e-3, atol=1e-3)
        assert f"val/r2_{feat}" in records(paths, state["config"]["run"])[0]
        assert state["errors"][feat].shape == (known.k + 1,)
    assert train(paths, "--model", "ridge", *more, script=script) == 0  # kept


@pytest.mark.parametrize("n_images", [12, 60])  # fewer than voxels, and more
def test_every_penalty_of_a_ridge_is_the_one_that_scikit_learn_chooses(n_images):
    rng = np.random.default_rng(n_images)
    voxels = rng.standard_normal((n_images, 30)) + 3
    targets = voxels @ rng.standard_normal((30, 4)) * [0, 0.1, 1, 10] + 5 * rng.standard_normal((n_images, 4)) - 2
    weight, bias, alphas = solve(decompose(torch.from_numpy(voxels)), torch.from_numpy(targets))
    expected = RidgeCV(RIDGE_ALPHAS, alpha_per_target=True).fit(voxels, targets)
    np.testing.assert_allclose(alphas, expected.alpha_)
    np.testing.assert_allclose(weight, expected.coef_, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(bias, expected.intercept_, rtol=1e-6, atol=1e-9)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "words"), [
    (["--multi_subject", "--multisubject_ckpt", "auto"], "two runs"),
    (["--multisubject_ckpt", "nothing_here"], "nothing_here"),
    (["--num_sessions", 9], "--num_sessions 9: subj01 has 3 sessions"),
    (["--batch_size", 0], "--batch_size 0"),
    (["--num_epochs", 0], "--num_epochs 0"),
    (["--ckpt_every", 0], "--ckpt_every 0"),
    (["--ckpt_minutes", 0], "--ckpt_minutes 0"),
    (["--max_lr", -1], "--max_lr -1"),
    (["--dropout", 2], "--dropout 2"),
    (["--num_workers", -1], "--num_workers -1"),
    (["--val_fraction", 1], "no trials to train on"),
    (["--model", "ridge", "--multi_subject"], "--model ridge"),
])
def test_bad_input(paths, capsys, flags, words):
    assert train(paths, *([] if "--num_epochs" in flags else ["--num_epochs", 1]), *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error:") and words in error


def test_a_pretrained_run_of_another_feature_is_refused(paths, capsys):
    assert train(paths, "--multi_subject", "--num_epochs", 1, "--feat", "g_2", script=train_g) == 0
    assert train(paths, "--multisubject_ckpt", "multisubject_subj01_ext1_g_2_8", "--num_epochs", 1) == 2
    assert "is of g_2, wanted c" in capsys.readouterr().err


def test_a_pretrained_run_that_saw_the_subject_is_refused(paths, capsys):
    assert train(paths, "--multi_subject", "--subj", 2, "--num_epochs", 1) == 0
    assert train(paths, "--multisubject_ckpt", "multisubject_subj02_ext1_c_8_mlp", "--num_epochs", 1) == 2
    assert "has seen subj01" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_nan_in_the_betas_names_its_row(paths, capfd, workers):
    row = int(load_trials(paths, "subj01", "train")["row"].iloc[3])
    with h5py.File(paths.betas("subj01"), "r+") as file:
        file["betas"][row, 2] = np.nan
    assert train(paths, "--num_epochs", 1, "--num_workers", workers) == 2
    assert f"row {row} holds NaN" in capfd.readouterr().err.strip().splitlines()[-1]


def test_a_damaged_checkpoint_is_named(paths, capsys):
    assert train(paths, "--num_epochs", 1) == 0
    last = paths.run(SCRATCH) / "last.pth"
    last.write_bytes(last.read_bytes()[:1000])
    assert train(paths, "--num_epochs", 1, "--resume") == 2
    assert "last.pth: not a readable checkpoint" in capsys.readouterr().err.strip().splitlines()[-1]


def test_nan_in_the_targets_stops_the_run(paths, capsys):
    with h5py.File(paths.feature("c"), "r+") as file:
        file["data"][:, 0] = np.nan
    assert train(paths, "--num_epochs", 1) == 2
    assert "NaN" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (paths.run(SCRATCH) / "last.pth").exists()


def test_training_can_start_anywhere(paths, monkeypatch):
    monkeypatch.chdir(os.sep)
    assert train(paths, "--num_epochs", 1) == 0
