"""GNet: the network against plain loops, its objective against numpy, and trainings of seconds."""

import json
from functools import partial

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

import train_gnet
import utils
from disk.checkpoints import load_checkpoint
from models import GNet, VoxelReadout, build_model, gnet_input, load_prefilter
from nsd.repeats import AveragedRows, noise_ceiling
from nsd.rows import open_betas, open_stimuli
from nsd.trials import load_trials
from tiny_nsd import N_VOXELS, write_tiny_nsd
from tiny_runs import stopped_at
from training.loop import make_optimizer
from training.objectives import EncodingObjective
from training.settings import Loop
from training.team import Team

FLAGS = ["--batch_size", "4", "--num_epochs", "2", "--num_sessions", "3", "--val_fraction", "0.3", "--trunk_width",
         "4", "--pass_through", "4", "--num_workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_tiny_nsd(tmp_path_factory.mktemp("world"))[0]


@pytest.fixture(scope="module")
def trained(world):
    """The world, with a run of subject 1."""
    assert train(world) == 0
    return world


def train(paths, *flags):
    return utils.run_cli(train_gnet.main, ["--root", str(paths.root), *FLAGS, *map(str, flags)])


@pytest.mark.parametrize("pass_through, shared", [(64, 1_034_944), (192, 3_027_520)])
def test_parameter_counts_are_the_published(pass_through, shared):
    gnet = GNet({"subj01": 3}, pass_through=pass_through)
    trunk = sum(p.numel() for name, p in gnet.named_parameters() if not name.startswith(("prefilter", "readouts")))
    assert trunk == shared
    assert sum(p.numel() for p in gnet.readouts.parameters()) == 3 * 1307


def test_a_field_finds_its_place_within_the_demos_steps():
    """At the pace of the other weights it stays blurred, and a voxel of V1 is taken for one that sees everything."""
    places, seen = (25, 9), 7
    maps = [torch.randn(64, 2, n, n, generator=torch.Generator().manual_seed(n)) for n in (5, 3)]
    measured = maps[0].flatten(2)[:, :1, seen]  # (64, 1): a voxel that sees one feature in one place
    mass = {}
    for rate in (0.05, 3e-3):
        torch.manual_seed(0)
        readout = VoxelReadout(1, (2, 2), places)
        readout.paced = [(list(readout.fields), rate)]
        optimizer, schedule = make_optimizer(readout, Loop(num_epochs=8, max_lr=3e-3, batch_size=64, seed=0), 27)
        for _ in range(8 * 27):
            (readout(maps) - measured).square().mean().backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        mass[rate] = readout.fields[0].detach().softmax(1)[0, seen]
    assert mass[0.05] > 0.9 and mass[3e-3] < 0.2


def test_maps_have_the_published_sizes_and_voxels_can_be_chosen():
    gnet = GNet({"subj01": 5, "subj02": 4}).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        maps = gnet.features(gnet_input(images))
        assert [tuple(feature_map.shape) for feature_map in maps] == [(2, 256, 25, 25), (2, 256, 13, 13)]
        everything = gnet(images, "subj01")
        torch.testing.assert_close(gnet(images, "subj01", torch.tensor([4, 1])), everything[:, [4, 1]])
        joint = gnet({"subj01": images, "subj02": images[:1]})
    torch.testing.assert_close(joint["subj01"], everything, atol=1e-5, rtol=1e-4)
    assert joint["subj02"].shape == (1, 4)


def test_readout_is_the_papers_formula(monkeypatch):
    """s(sum_p softmax(field)_p s(map_fp)) weighted, voxel by voxel and feature by feature; in chunks too."""
    torch.manual_seed(0)
    readout = VoxelReadout(5, features=(3, 2), places=(4, 6)).double()
    for parameter in readout.parameters():
        torch.nn.init.normal_(parameter)
    maps = [torch.randn(2, 3, 2, 2, dtype=torch.float64), torch.randn(2, 2, 2, 3, dtype=torch.float64)]

    def s(x):
        return np.log(1 + abs(x)) * np.tanh(x)

    wanted = np.zeros((2, 5))
    for image in range(2):
        for voxel in range(5):
            total, feature = readout.bias[voxel].item(), 0
            for field, feature_map in zip(readout.fields, maps, strict=True):
                weights = np.exp(field[voxel].detach().numpy())
                weights /= weights.sum()
                for channel in feature_map[image].numpy():
                    pooled = sum(w * s(x) for w, x in zip(weights, channel.ravel(), strict=True))
                    total += readout.weight[voxel, feature].item() * s(pooled)
                    feature += 1
            wanted[image, voxel] = total
    whole = readout(maps)
    np.testing.assert_allclose(whole.detach().numpy(), wanted)
    gradients = torch.autograd.grad(whole.square().sum(), list(readout.parameters()))
    monkeypatch.setattr(VoxelReadout, "CHUNK", 2)
    for kept in (VoxelReadout.KEPT, 0):  # all pooled features, or none, which are computed again
        monkeypatch.setattr(VoxelReadout, "KEPT", kept)
        chunked = readout(maps)
        torch.testing.assert_close(chunked, whole)
        torch.testing.assert_close(torch.autograd.grad(chunked.square().sum(), list(readout.parameters())), gradients)


def test_a_network_is_rebuilt_from_its_arguments():
    gnet = GNet({"subj02": 3}, 4, 8, frozen_prefilter=True)
    again = build_model(json.loads(json.dumps(gnet.model_args)))
    again.load_state_dict(gnet.state_dict())
    assert not any(p.requires_grad for p in again.prefilter.parameters())


def test_the_prefilter_is_alexnets(tmp_path):
    shapes = {"features.0.weight": (64, 3, 11, 11), "features.0.bias": (64,), "features.3.weight": (192, 64, 5, 5),
              "features.3.bias": (192,), "classifier.6.bias": (10,)}
    weights = {key: torch.randn(shape) for key, shape in shapes.items()}
    torch.save(weights, tmp_path / "alexnet.pth")
    gnet = GNet({"subj01": 1}, 4, 4)
    load_prefilter(gnet, tmp_path / "alexnet.pth")
    assert torch.equal(gnet.prefilter[3].weight, weights["features.3.weight"])
    for wrong in ({"features.0.weight": torch.zeros(1)}, {"x": object()}):  # another network; a pickle with a class
        torch.save(wrong, tmp_path / "wrong.pth")
        with pytest.raises(utils.UserError, match="--prefilter"):
            load_prefilter(gnet, tmp_path / "wrong.pth")


def test_averaged_rows_are_the_means_of_an_images_trials(world):
    betas, trials = open_betas(world, "subj01"), load_trials(world, "subj01", "train")
    rows = AveragedRows(betas, trials)
    means = [betas[group["row"].to_numpy()].mean(0) for _, group in trials.groupby("image_id")]
    assert rows.table["image_id"].tolist() == sorted(set(trials["image_id"]))
    picked = np.array([3, 0, 3])
    np.testing.assert_allclose(rows[picked], np.stack(means)[picked], rtol=1e-5, atol=1e-6)


def test_a_damaged_response_is_named_by_its_trial(tmp_path):
    paths, _ = write_tiny_nsd(tmp_path)
    trials = load_trials(paths, "subj01", "train")
    row = trials["row"].max()
    with h5py.File(paths.betas("subj01"), "r+") as file:
        file["betas"][row, 0] = np.nan
    with pytest.raises(utils.UserError, match=f"row {row} holds NaN"):
        AveragedRows(open_betas(paths, "subj01"), trials)[np.arange(10)]


def test_a_requeued_job_does_not_start_over(trained, monkeypatch):
    before = (trained.run("gnet_subj01") / "last.pth").stat().st_mtime_ns
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert train(trained, "--overwrite") == 0
    assert (trained.run("gnet_subj01") / "last.pth").stat().st_mtime_ns == before


def test_processes_add_up_to_the_gradient_of_one():
    """The size of the weights is penalised once, however many processes add their gradients."""
    batch = {"voxels": {"s": torch.randn(4, 2)}, "target": torch.zeros(4, 4, 4, 3)}
    objective, gradients = EncodingObjective(partial(gnet_input, side=8), l1=1.0), []
    model = Predictor(torch.zeros(4, 2)).eval()
    for is_main in (True, False):
        team = Team()
        team.is_main = is_main
        loss = objective(model, batch, 0, team=team)[0]
        gradients.append(torch.autograd.grad(loss, model.readouts["s"].weight)[0] if loss.requires_grad else None)
    torch.testing.assert_close(gradients[0], model.readouts["s"].weight.sign() / 4)
    assert gradients[1] is None


@pytest.mark.parametrize("training", [True, False])
def test_a_subject_without_an_image_adds_nothing(training):
    """But it stays in the graph: several processes wait for the gradients of all parameters."""
    model = GNet({"subj01": 3, "subj02": 2}, 4, 4).train(training)
    objective = EncodingObjective(gnet_input, l1=0.0, noise=0, shift=0)
    voxels, target = torch.randn(4, 3), 255 * torch.rand(4, 30, 30, 3)
    found = []
    for more in ({}, {"subj02": torch.zeros(0, 2)}):
        torch.manual_seed(0)
        found.append(objective(model, {"voxels": {"subj01": voxels, **more}, "target": target}, 0.0))
    (expected, logs), (loss, further) = found
    torch.testing.assert_close(loss, expected)
    assert logs.keys() == further.keys()
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.readouts["subj02"].parameters())


class Predictor(torch.nn.Module):
    """Predicts fixed responses, in the order it is asked."""

    def __init__(self, responses):
        super().__init__()
        self.responses = responses
        self.readouts = torch.nn.ModuleDict({"s": torch.nn.Linear(2, 2)})

    def forward(self, images):
        return {"s": self.responses[:len(images["s"])]}


def test_loss_and_validation_r_against_numpy():
    rng = np.random.default_rng(0)
    predicted, measured = rng.standard_normal((2, 9, 3)).astype(np.float32)
    measured[:, 0] += 2 * predicted[:, 0]
    rois = {"s": {"V1": np.array([True, True, False])}}
    ceilings = {"s": np.array([0.5, 0.8, 0.9], np.float32)}
    objective = EncodingObjective(partial(gnet_input, side=8), rois, ceilings, l1=0.1)
    sums, n = {}, 0
    for rows in (slice(0, 5), slice(5, 9)):  # r over both batches, not the mean of theirs
        model = Predictor(torch.from_numpy(predicted[rows])).eval()
        p, m = predicted[rows], measured[rows]
        batch = {"voxels": {"s": torch.from_numpy(m)}, "target": torch.zeros(len(m), 4, 4, 3)}
        loss, logs = objective(model, batch, 0)
        r = np.array([np.corrcoef(p[:, v], m[:, v])[0, 1] for v in range(3)])
        wanted = (((p - m) ** 2).mean(0) * np.clip(r**2, 0.1, 1)).mean()
        wanted += 0.1 * model.readouts["s"].weight.abs().mean().item()
        np.testing.assert_allclose(loss.item(), wanted, rtol=1e-5)
        for key, value in logs.items():
            sums[key] = sums.get(key, 0) + value * len(p)
        n += len(p)
    found = objective.summarise({key: value / n for key, value in sums.items()})
    r = np.array([np.corrcoef(predicted[:, v], measured[:, v])[0, 1] for v in range(3)])
    np.testing.assert_allclose(float(found["r"]), np.median(r), rtol=1e-6)
    np.testing.assert_allclose(float(found["r_V1"]), np.sort(r[:2])[0], rtol=1e-6)  # torch's median is the lower one
    np.testing.assert_allclose(float(found["loss_r"]), 1 - np.median(r), rtol=1e-6)
    np.testing.assert_allclose(float(found["r_norm"]), np.median(r) / 0.8, rtol=1e-6)
    np.testing.assert_allclose(float(found["r_norm_V1"]), np.sort(r[:2])[0] / 0.5, rtol=1e-6)
    np.testing.assert_allclose(objective.kept["val_r"]["s"], r, rtol=1e-5)


def test_noise_ceilings_are_those_of_the_simulation(tmp_path):
    """Signal and noise of known size: r of the true signal with the means, which is what no prediction can exceed."""
    paths, _ = write_tiny_nsd(tmp_path)
    rng, n_images, n_voxels = np.random.default_rng(0), 4000, 5
    image_ids = np.repeat(np.arange(n_images), rng.integers(1, 4, n_images))
    signal = np.sqrt([0, 0.1, 0.3, 0.6, 0.9]) * rng.standard_normal((n_images, n_voxels))
    noise = np.sqrt([1, 0.9, 0.7, 0.4, 0.1]) * rng.standard_normal((len(image_ids), n_voxels))
    with h5py.File(paths.betas("subj01"), "w") as file:
        file["betas"] = (signal[image_ids] + noise).astype(np.float32)
    rows = AveragedRows(open_betas(paths, "subj01"),
                             pd.DataFrame({"image_id": image_ids, "row": np.arange(len(image_ids))}))
    found = noise_ceiling(rows, rows.n_repeats)
    means = rows[np.arange(n_images)]
    wanted = [np.corrcoef(signal[:, v], means[:, v])[0, 1] for v in range(1, n_voxels)]
    np.testing.assert_allclose(found[1:], wanted, atol=0.02)
    assert found[0] < 0.15
    once = AveragedRows(rows.betas, pd.DataFrame({"image_id": np.arange(9), "row": np.arange(9)}))
    assert noise_ceiling(once, once.n_repeats) is None  # nothing was shown twice


def test_jitter_shifts_and_does_not_mirror():
    image = torch.zeros(1, 3, 21, 21)
    image[..., 10, 10], image[..., 10, 12] = 1, 0.5  # what is left stays left
    objective = EncodingObjective(gnet_input, noise=0)
    moved = objective.jitter(image.repeat(200, 1, 1, 1), torch.Generator().manual_seed(0), 200)
    bright = (moved[:, 0] == 1).nonzero()
    assert len(bright) == 200 and all(moved[i, 0, y, x + 2] == 0.5 for i, y, x in bright.tolist())
    assert {(y, x) for _, y, x in bright.tolist()} <= {(y, x) for y in range(6, 15) for x in range(6, 15)}
    assert len({x for *_, x in bright.tolist()}) == 9


@pytest.mark.parametrize("joint", [False, True])
def test_training_keeps_a_run_with_r_of_every_roi(trained, joint):
    world, flags = trained, ["--multi_subject"] if joint else []
    assert train(world, *flags) == 0  # of subject 1: finished before, kept
    folder = world.run("gnet_multisubject" if joint else "gnet_subj01")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert {"train/loss", "val/loss", "val/loss_r", "val/r", "val/r_V1", "val/r_norm_V1"} <= rows[-1].keys()
    best = load_checkpoint(folder / "best.pth")
    assert best["best"] == min(row["val/loss_r"] for row in rows)
    median = torch.cat(list(best["val_r"].values())).median().item()
    assert 1 - median == pytest.approx(best["best"], abs=1e-6)
    assert best["n_voxels"] == (N_VOXELS if joint else {"subj01": N_VOXELS["subj01"]})
    build_model(best["model_args"]).load_state_dict(best["model"])
    if joint:
        assert train(world, *flags, "--subj", 2, "--num_sessions", 2) == 0  # the same network, whoever trains it


def test_a_stopped_and_resumed_training_equals_an_uninterrupted_one(trained):
    with stopped_at(2, EncodingObjective):
        assert train(trained, "--tag", "stopped") == 128 + 15
    assert train(trained, "--tag", "stopped", "--resume") == 0
    whole, stopped = (load_checkpoint(trained.run(run) / "last.pth") for run in ("gnet_subj01", "gnet_subj01_stopped"))
    for key, value in whole["model"].items():
        assert torch.equal(value, stopped["model"][key]), key


def test_the_trunk_learns_responses(tmp_path):
    """Responses that follow the images' brightness are fitted."""
    paths, _ = write_tiny_nsd(tmp_path)
    stimuli, trials = open_stimuli(paths), load_trials(paths, "subj01", "train")
    with h5py.File(paths.stimuli / "nsd_stimuli.hdf5", "r+") as file:
        level = np.linspace(0, 255, len(stimuli)).astype(np.uint8)
        file["imgBrick"][...] = np.random.default_rng(0).permutation(level)[:, None, None, None]
        brightness = file["imgBrick"][:, 0, 0, 0] / 127.5 - 1
    with h5py.File(paths.betas("subj01"), "r+") as file:
        rows = trials["row"].to_numpy()
        file["betas"][np.sort(rows)] = np.repeat(brightness[trials["image_id"].to_numpy()[np.argsort(rows)]][:, None],
                                                 N_VOXELS["subj01"], 1)
    assert train(paths, "--num_epochs", 10, "--max_lr", 3e-3) == 0
    rows = [json.loads(line) for line in (paths.run("gnet_subj01") / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["train/loss_mse"] < 0.3 * rows[0]["train/loss_mse"]
    assert max(row["val/r"] for row in rows) > 0.8


@pytest.mark.parametrize("flags, message", [
    (["--prefilter", "nothing.pth"], "--prefilter"), (["--batch_size", "0"], "--batch_size"),
    (["--num_sessions", "9"], "--num_sessions"), (["--subj", "3"], "wds/subj03"), (["--trunk_width", "0"], "--trunk"),
    (["--pass_through", "-1"], "--pass_through"), (["--l1", "-1"], "--l1"),
    (["--field_lr", "0"], "--field_lr"),
])
def test_mistakes_give_one_line_and_exit_2(world, flags, message, capsys):
    assert train(world, "--tag", "wrong", *flags) == 2
    found = capsys.readouterr().err.strip().splitlines()
    assert message in found[-1] and "Traceback" not in "".join(found)
