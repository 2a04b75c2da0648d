"""Guidance and judgement by a brain encoding model: formulas against numpy and loops, pictures, files, mistakes."""

import json
import shutil

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import multivariate_normal

import evaluate
import recon
import score_gnet
import utils
from disk.checkpoints import load_checkpoint, save_checkpoint
from disk.files import load_csv
from disk.names import Paths
from disk.scores import load_scores
from encoding.encoder import Encoder, load_encoder
from encoding.errors import SHRINKAGES, ResponseErrors
from encoding.guide import BrainLoss, BrainMeasurement, good_voxels, weighted_correlation
from evaluation.metrics import identified
from models import GNet
from nsd.repeats import load_test_set, responses_to
from nsd.rows import open_stimuli
from sampling.guidance import gradient_on, guidance_pull, speaking, views_of
from tiny_brain import RUN, V, write_brain, write_run
from tiny_nsd import SHARED
from tiny_sd import hasten

CPU = torch.device("cpu")


@pytest.fixture
def models(tiny_models, monkeypatch):
    hasten(monkeypatch, at_once=len(SHARED))
    return tiny_models


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_brain(tmp_path_factory.mktemp("world"))


@pytest.fixture
def encoder(world):
    return load_encoder(world, "subj01", None, 42, CPU)


def draw(paths, models, outdir, *flags):
    """Run recon.py on the four test images; returns its exit status."""
    words = ["--root", paths.root, "--sd_model", models[0], "--clip_model", models[1], "--num_sessions", 3, "--feats",
             "g_2", "g_4", "--num_inference_steps", 4, "--guidance_strength", 0.5, "--guidance_rule", "norm", "--z",
             "none", "--guidance_decoder", "full", "--device", "cpu", "--outdir", outdir, *flags]
    return utils.run_cli(recon.main, [str(word) for word in words])


def pictures_of(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.png"))}


def picture(file):
    return np.asarray(Image.open(file))


def steps_of(folder, row=0):
    return [json.loads(line) for line in (folder / f"{row:05d}.jsonl").read_text().splitlines()]


def error_of(capsys):
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return error


# --- the formulas -------------------------------------------------------------------------------------------------


def test_weighted_correlation_is_that_of_the_weighted_covariance():
    rng = np.random.default_rng(0)
    a, b, w = rng.standard_normal((3, 8)), rng.standard_normal((3, 8)), rng.random(8)
    a[2] = 1.5
    found = weighted_correlation(*(torch.from_numpy(x) for x in (a, b, w)))
    for row in range(2):
        covariance = np.cov(a[row], b[row], aweights=w)
        assert found[row].item() == pytest.approx(covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1]))
    assert abs(found[2]) < 1e-9  # a constant row


def small_term(alpha=0.3, enough=float("inf"), n=6, batch=2):
    """A BrainLoss of two regions in double precision, and what it was made of."""
    torch.manual_seed(0)
    gnet = GNet({"s": 9}, trunk_width=4, pass_through=4).eval().double()
    torch.nn.init.normal_(gnet.readouts["s"].weight)
    encoder = Encoder("run", "s", gnet, np.ones(9), (), None)
    voxels, places = torch.tensor([8, 1, 3, 0, 2, 5]), {"A": slice(0, 4), "B": slice(4, n)}
    weights, targets = torch.rand(n).double(), torch.randn(batch, n).double()
    return BrainLoss(encoder, voxels, places, weights, targets, kappa=1, alpha=alpha, enough=enough)


def test_the_loss_is_the_formula_region_by_region():
    term = small_term()
    image = torch.rand(2, 3, 16, 16).double()
    with torch.no_grad():
        predicted = term.encoder.model(image, "s")[:, term.voxels].numpy()
        found = term(image).numpy()
    targets, weights = term.targets.numpy(), term.weights.numpy()
    for row in range(2):
        losses = []
        for at in (slice(0, 4), slice(4, 6)):
            p, t, w = predicted[row, at], targets[row, at], weights[at]
            covariance = np.cov(p, t, aweights=w)
            r = covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])
            losses.append(0.3 * (1 - r) + 0.7 * np.average((p - t) ** 2, weights=w) / 2)
        assert found[row] == pytest.approx(np.mean(losses))


def test_its_gradient_is_the_slope_of_the_loss():
    term = small_term()
    image = torch.rand(2, 3, 16, 16).double().requires_grad_()
    gradient = torch.autograd.grad(term(image).sum(), image)[0]
    direction = torch.randn(image.shape, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        up, down = (term(image + step * direction).sum() for step in (1e-8, -1e-8))
    assert (gradient * direction).sum().item() == pytest.approx(((up - down) / 2e-8).item(), rel=1e-4)
    assert gradient.flatten(1).norm(dim=1).min() > 0


def test_as_a_measurement_it_is_the_log_likelihood_of_errors_that_go_together():
    made_of, generator = small_term(), torch.Generator().manual_seed(0)
    mixed = torch.randn(6, 6, generator=generator).double()
    train, val = (torch.randn(n, 6, generator=generator).double() @ mixed for n in (30, 20))
    errors = ResponseErrors(train, val)
    term = BrainMeasurement(made_of.encoder, made_of.voxels, made_of.places, made_of.weights, made_of.targets, errors,
                            kappa=0.1)
    image = torch.rand(3, 3, 16, 16).double()[:2]
    found = term(image)
    off = made_of.encoder.model(image, "s")[:, made_of.voxels].detach().numpy() - made_of.targets.numpy()
    logs = error_density(train, val, errors.shrinkage).logpdf(np.concatenate([off, np.zeros((1, 6))]))
    np.testing.assert_allclose(found.detach().numpy(), logs[2] - logs[:2])
    assert set(term.facts) == {"r_A", "r_B"} and not term.relative


def error_density(train, val, s):
    """The Gaussian that ResponseErrors describes, by scipy."""
    train, deviations = train.numpy() / np.sqrt((train.numpy()**2).mean(0)), np.sqrt((val.numpy()**2).mean(0))
    together = (1 - s) * train.T @ train / len(train) + s * np.eye(train.shape[1])
    return multivariate_normal(np.zeros(len(together)), together * np.outer(deviations, deviations))


@pytest.mark.parametrize("n_train, n_val, shared", [(30, 20, 1.0), (4, 9, 1.0), (40, 400, 0.0)])
def test_validation_images_say_how_far_errors_go_together(n_train, n_val, shared):
    """With fewer training images than voxels, too; errors that are independent are found to be so."""
    generator = torch.Generator().manual_seed(1)
    both = torch.randn(2, 6, generator=generator).double()

    def draw(n):
        return (shared * torch.randn(n, 2, generator=generator).double() @ both
                + torch.randn(n, 6, generator=generator).double())

    train, val = draw(n_train), draw(n_val)
    likelihoods = [error_density(train, val, s).logpdf(val.numpy()).mean() for s in SHRINKAGES]
    assert ResponseErrors(train, val).shrinkage == pytest.approx(SHRINKAGES[np.argmax(likelihoods)])
    assert (ResponseErrors(train, val).shrinkage > 0.9) == (shared == 0)


def test_a_sample_that_agrees_enough_is_left_alone_from_then_on():
    term = small_term(alpha=1.0)
    image = torch.rand(2, 3, 16, 16).double()
    term(image)
    mean_r = torch.stack([term.facts["r_A"], term.facts["r_B"]]).mean(0)
    term.enough = mean_r.mean().item()  # one of the two has reached it
    better = mean_r.argmax().item()
    loss, gradient = gradient_on(image, [term])
    assert loss[better] == 0 and gradient[better].abs().max() == 0
    assert loss[1 - better] > 0 and gradient[1 - better].abs().max() > 0
    term.enough = float("inf")
    assert term(image)[better] == 0 and term.facts["stopped"].tolist() == [better == 0, better == 1]


class Slope:
    """A loss whose gradient is known: (B, 3, H, W) -> its inner product with `direction`."""

    def __init__(self, direction, **more):
        self.direction, self.facts = direction, {}
        self.__dict__.update(more)

    def __call__(self, image, rows):
        return (image * self.direction).flatten(1).sum(1)


def test_the_brain_pulls_kappa_times_as_hard_as_the_others():
    image = torch.rand(3, 3, 4, 4)
    a, b, brains = (torch.randn(3, 3, 4, 4) for _ in range(3))
    brains[2] = 0  # has stopped
    found, facts = guidance_pull(image, [Slope(a), Slope(brains, relative=True, kappa=0.7), Slope(b)])
    g = a + b
    for row in range(2):
        wanted = g[row] + 0.7 * g[row].norm() / brains[row].norm() * brains[row]
        torch.testing.assert_close(found[row], wanted)
        cosine = (g[row] * brains[row]).sum() / g[row].norm() / brains[row].norm()
        torch.testing.assert_close(facts["cosine"][row], cosine)
        torch.testing.assert_close(facts["norm_clip"][row], g[row].norm())
    assert torch.equal(found[2], g[2])
    alone, _ = guidance_pull(image, [Slope(brains, relative=True, kappa=0.7)])
    torch.testing.assert_close(alone, brains)  # as it is
    measured, _ = guidance_pull(image, [Slope(a), Slope(brains, relative=False, kappa=0.7)])
    torch.testing.assert_close(measured, a + 0.7 * brains)  # in one unit


def test_the_brain_looks_at_the_prediction_and_the_others_around_it():
    clean, noises = torch.rand(2, 4, 3, 3), list(torch.randn(2, 2, 4, 3, 3))
    clip, brain = Slope(None), Slope(None, relative=False, kappa=0.1)
    assert views_of(clean, [clip, brain], []) == [(clean, [clip, brain], 1)]
    assert views_of(clean, [brain], noises) == [(clean, [brain], 1)]
    relative = Slope(None, relative=True, kappa=0.1)
    assert [terms for _, terms, _ in views_of(clean, [clip, relative], noises)] == 2 * [[clip, relative]]
    *around, last = views_of(clean, [clip, brain], noises)
    assert last == (clean, [brain], 1)
    for (latents, terms, share), noise in zip(around, noises, strict=True):
        assert torch.equal(latents, clean + noise) and (terms, share) == ([clip], 0.5)


@pytest.mark.parametrize("waits, n_guided, first", [(0, 5, 0), (0.5, 5, 3), (0.5, 8, 4), (0.5, 1, 0), (1, 8, 7)])
def test_the_brain_waits_for_the_later_steps_unless_it_is_alone(waits, n_guided, first):
    clip, brain = Slope(None), Slope(None, kappa=0.1, waits=waits)
    for step in range(n_guided):
        assert speaking([clip, brain], step, n_guided) == ([clip, brain] if step >= first else [clip])
        assert speaking([brain], step, n_guided) == [brain]


def test_good_voxels_are_those_of_the_region_that_validation_trusts(encoder):
    masks = {"V1": np.arange(V) < 30, "V4": np.arange(V) >= 30, "nsd_general": np.ones(V, bool)}
    bad = encoder._replace(val_r=np.where(np.arange(V) % 6 == 0, 0.05, 0.5))
    found = good_voxels(bad, masks, "all")
    assert list(found) == ["V1", "V4"]
    np.testing.assert_array_equal(found["V1"], [v for v in range(30) if v % 6])
    assert len(good_voxels(bad, masks, "nsd_general")["nsd_general"]) == 50


# --- pictures -----------------------------------------------------------------------------------------------------


def test_kappa_0_draws_the_pictures_of_clip_alone_to_the_bit(world, models, tmp_path):
    assert draw(world, models, tmp_path / "clip") == 0
    assert draw(world, models, tmp_path / "k0", "--use_gnet", "--gnet_roi", "V1", "--gnet_kappa", 0) == 0
    assert draw(world, models, tmp_path / "k2", "--use_gnet", "--gnet_roi", "V1", "--gnet_kappa", 2) == 0
    clip, k0, k2 = (pictures_of(tmp_path / name) for name in ("clip", "k0", "k2"))
    assert len(clip) == 4 and clip == k0 and clip.keys() == k2.keys() and clip != k2
    assert not list((tmp_path / "clip").glob("0*.jsonl"))


def test_every_guided_step_is_logged(world, models, tmp_path):
    assert draw(world, models, tmp_path / "a", "--use_gnet", "--gnet_roi", "V1") == 0
    steps = steps_of(tmp_path / "a", row=3)
    assert [step["step"] for step in steps] == [0, 1]  # half of four
    assert steps[0].keys() == {"step", "loss_clip", "norm_clip", "loss_brain", "norm_brain", "r_V1", "stopped",
                               "cosine"}
    assert len({step["r_V1"] for row in range(4) for step in steps_of(tmp_path / "a", row)}) == 8
    assert draw(world, models, tmp_path / "a", "--use_gnet", "--gnet_roi", "V2", "--overwrite", "--limit", 1) == 0
    assert "r_V2" in steps_of(tmp_path / "a")[0] and not (tmp_path / "a/00003.jsonl").exists()
    late = ["--use_gnet", "--gnet_roi", "V1", "--gnet_from", 0.5]
    assert draw(world, models, tmp_path / "a", *late, "--overwrite", "--limit", 1) == 0
    assert [step.keys() for step in steps_of(tmp_path / "a")] == [{"step", "loss_clip", "norm_clip"}, steps[1].keys()]


def test_the_brain_alone_raises_its_own_agreement(world, models, tmp_path):
    """Without CLIP the gradient stands alone: r of the pictures it guides rises above that of unguided ones."""
    flags = ["--feats", "none", "--guidance_strength", 1, "--num_inference_steps", 8, "--guidance_scale", 0.6]
    assert draw(world, models, tmp_path / "none", *flags) == 0
    assert draw(world, models, tmp_path / "brain", *flags, "--use_gnet", "--gnet_roi", "V1") == 0
    encoder = load_encoder(world, "subj01", None, 42, CPU)
    target = torch.from_numpy(responses_to(world, "subj01", SHARED).betas[:, :25])
    r = {}
    for name in ("none", "brain"):
        stack = np.stack([picture(tmp_path / name / f"{row:05d}.png") for row in range(4)])
        predicted = torch.from_numpy(encoder.predict(stack)[:, :25])
        r[name] = weighted_correlation(predicted, target, torch.from_numpy(encoder.val_r[:25] ** 2))
    assert (r["brain"] - r["none"]).mean() > 0.05


@pytest.mark.parametrize("rule", [[], ["--guidance_rule", "posterior", "--guidance_scale", 3, "--feats", "none"]])
def test_a_subset_draws_the_same_pictures_and_logs(world, models, tmp_path, rule):
    flags = ["--use_gnet", "--gnet_roi", "V1", *rule]
    assert draw(world, models, tmp_path / "all", *flags) == 0
    assert draw(world, models, tmp_path / "two", *flags, "--ids", SHARED[1], SHARED[3]) == 0
    for row in (1, 3):
        for kind in ("png", "jsonl"):
            name = f"{row:05d}.{kind}"
            assert (tmp_path / "all" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_target_file_is_matched_by_id(world, models, tmp_path):
    flags = ["--use_gnet", "--gnet_roi", "V1"]
    assert draw(world, models, tmp_path / "own", *flags) == 0
    target = responses_to(world, "subj01", SHARED).betas
    order = [2, 0, 3, 1]
    np.save(tmp_path / "target.npy", target[order].astype(np.float64))
    np.save(tmp_path / "image_ids.npy", np.array(SHARED)[order])
    assert draw(world, models, tmp_path / "file", *flags, "--target_fmri_npy", tmp_path / "target.npy") == 0
    assert pictures_of(tmp_path / "own") == pictures_of(tmp_path / "file")
    np.save(tmp_path / "image_ids.npy", np.array(SHARED))
    assert draw(world, models, tmp_path / "other", *flags, "--target_fmri_npy", tmp_path / "target.npy") == 0
    assert pictures_of(tmp_path / "own") != pictures_of(tmp_path / "other")


def test_other_targets_are_other_pictures_to_the_folder(world, models, tmp_path, capsys):
    flags = ["--use_gnet", "--gnet_roi", "V1", "--limit", 1]
    assert draw(world, models, tmp_path / "a", *flags) == 0
    assert draw(world, models, tmp_path / "a", *flags, "--gnet_kappa", 2) == 2
    assert "gnet_kappa 0.1 -> 2.0" in error_of(capsys)


def test_responses_to_images_follow_their_control(world):
    plain = responses_to(world, "subj01", SHARED)
    reference = load_test_set(world, "subj01")
    np.testing.assert_array_equal(plain.betas, reference.betas)
    shuffled = responses_to(world, "subj01", SHARED, control="shuffle", seed=42)
    np.testing.assert_array_equal(shuffled.betas, load_test_set(world, "subj01", "shuffle", 42).betas)
    held_out = load_test_set(world, "subj01", held_out=(3, 0.3, 42), split="val")
    some = responses_to(world, "subj01", held_out.image_ids[1:], 3)
    np.testing.assert_array_equal(some.betas, held_out.betas[1:])


@pytest.mark.parametrize("flags, message", [
    (["--gnet_roi", "V9"], "--gnet_roi V9: no region of subj01; wanted"),
    (["--gnet_roi", "V3"], "--gnet_roi V3: 3 of the 3 voxels of V3 have a validation r over 0.1, wanted at least 20"),
    (["--gnet_run", "gnet_nobody"], "gnet_nobody/best.pth: --gnet_run: the brain encoding model gnet_nobody not found"),
    (["--gnet_kappa", "-1"], "--gnet_kappa -1"),
    (["--gnet_kappa", "nan"], "--gnet_kappa nan"),
    (["--gnet_from", "1.5"], "--gnet_from 1.5"),
    (["--gnet_alpha", "2"], "--gnet_alpha 2"),
    (["--guidance_scale", "0"], "--use_gnet with --guidance_scale 0"),
    (["--feats", "none", "--gnet_kappa", "0"], "--gnet_kappa 0 with --feats none"),
    (["--target_fmri_npy", "nowhere.npy"], "nowhere.npy: --target_fmri_npy not found"),
])
def test_mistakes_give_one_line_and_exit_2(world, models, tmp_path, flags, message, capsys):
    assert draw(world, models, tmp_path / "out", "--use_gnet", "--gnet_roi", "V1", *flags) == 2
    assert message in error_of(capsys)
    assert not list((tmp_path / "out").glob("*.png"))


@pytest.mark.parametrize("damage, message", [
    (lambda rows, ids: (rows[:, :-1], ids), "59 voxels, wanted the 60 of the betas"),
    (lambda rows, ids: (np.where(ids[:, None] == SHARED[2], np.nan, rows), ids), f"the row of image id {SHARED[2]}"),
    (lambda rows, ids: (rows[:3], ids[:3]), f"no row for image id {SHARED[3]}"),
    (lambda rows, ids: (rows, ids[:3]), "wanted (n, voxels) for n"),
    (lambda rows, ids: (rows, ids * 0), "for 1 different ids"),
    (lambda rows, ids: (rows[0], ids), "wanted (n, voxels)"),
])
def test_a_wrong_target_is_one_line(world, models, tmp_path, damage, message, capsys):
    rows, ids = damage(np.zeros((4, V)), np.array(SHARED))
    np.save(tmp_path / "target.npy", rows)
    np.save(tmp_path / "image_ids.npy", ids)
    assert draw(world, models, tmp_path / "out", "--use_gnet", "--gnet_roi", "V1", "--target_fmri_npy",
                tmp_path / "target.npy") == 2
    assert message in error_of(capsys)


def test_networks_of_others_are_refused(world, models, tmp_path, capsys):
    gnet = GNet({"subj01": V}, trunk_width=4, pass_through=4)
    for run, n_voxels, message in (("gnet_subj02", {"subj02": V}, "encodes subj02, wanted subj01"),
                                   ("gnet_few", {"subj01": 59}, "predicts 59 voxels of subj01, its betas have 60")):
        write_run(world, GNet(n_voxels, trunk_width=4, pass_through=4), run)
        assert draw(world, models, tmp_path / "out", "--use_gnet", "--gnet_roi", "V1", "--gnet_run", run) == 2
        assert message in error_of(capsys)
    state = load_checkpoint(world.run(RUN) / "best.pth")
    save_checkpoint(world.run("gnet_old") / "best.pth", {k: v for k, v in state.items() if k != "val_r"})
    assert draw(world, models, tmp_path / "out", "--use_gnet", "--gnet_roi", "V1", "--gnet_run", "gnet_old") == 2
    assert "does not hold its voxels' validation r" in error_of(capsys)
    write_run(world, gnet, "gnet_noise", val_r=torch.full((V,), 0.05))
    assert draw(world, models, tmp_path / "out", "--use_gnet", "--gnet_roi", "V1", "--gnet_run", "gnet_noise") == 2
    assert "0 of the 25 voxels of V1" in error_of(capsys)


def test_voxels_in_another_order_are_refused_before_anything_is_drawn(world, models, tmp_path, capsys):
    shutil.copytree(world.root, tmp_path / "moved")
    moved = Paths(tmp_path / "moved", tmp_path / "moved/MindEyeV2/mindeyev2")
    with h5py.File(moved.betas("subj01"), "r+") as file:
        file["betas"][:] = file["betas"][:][:, np.random.default_rng(0).permutation(V)]
    assert draw(moved, models, tmp_path / "out", "--use_gnet", "--gnet_roi", "V1") == 2
    assert "the betas' voxels are in another order" in error_of(capsys)
    assert not list((tmp_path / "out").glob("*.png"))


# --- predictions and judgement --------------------------------------------------------------------------------------


def test_identification_is_the_share_of_best_correlations():
    rng = np.random.default_rng(0)
    predicted = rng.standard_normal((12, 5))
    measured = 0.5 * predicted + rng.standard_normal((12, 5)) + rng.standard_normal((12, 1))
    found = identified(predicted, measured)
    wanted = [np.argmax([np.corrcoef(p, m)[0, 1] for p in predicted]) == i for i, m in enumerate(measured)]
    assert found.tolist() == wanted and 0 < found.sum() < 12


def test_score_gnet_predicts_stimuli_and_folders(world, encoder, tmp_path, capsys):
    root = ["--root", str(world.root), "--device", "cpu"]
    score_gnet.main([*root, "--batch_size", "3"])
    ids, voxels = load_scores(world.root / "scores_all/subj01" / RUN, "voxels")
    np.testing.assert_array_equal(ids, SHARED)
    stimuli = open_stimuli(world)
    images = torch.from_numpy(stimuli[SHARED]).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        wanted = encoder.model(images, "subj01").numpy()
    np.testing.assert_allclose(voxels, wanted, rtol=1e-4, atol=1e-5)
    assert f"of {len(SHARED)} measured responses {len(SHARED)} correlate best" in capsys.readouterr().out
    score_gnet.main(root)
    assert "already predicted" in capsys.readouterr().out

    score_gnet.main([*root, "--ids", "3", "4-6", "--outdir", str(tmp_path / "range")])
    ids, voxels = load_scores(tmp_path / "range", "voxels")
    assert ids.tolist() == [3, 4, 5, 6]
    np.testing.assert_allclose(voxels[0], wanted[0], rtol=1e-4, atol=1e-5)

    (tmp_path / "mine").mkdir()
    for name, image_id in (("b.png", SHARED[0]), ("a.png", SHARED[1])):
        Image.fromarray(stimuli[[image_id]][0]).save(tmp_path / "mine" / name)
    Image.fromarray(np.zeros((30, 20, 3), np.uint8)).save(tmp_path / "mine/c.png")  # of another size
    score_gnet.main([*root, "--images", str(tmp_path / "mine"), "--outdir", str(tmp_path / "of_mine")])
    ids, voxels = load_scores(tmp_path / "of_mine", "voxels")
    assert ids.tolist() == [0, 1, 2]
    np.testing.assert_allclose(voxels[:2], wanted[[1, 0]], rtol=1e-4, atol=1e-5)
    rows = load_csv(tmp_path / "of_mine/images.csv", "", "")
    assert [row["file"].split("/")[-1] for row in rows] == ["a.png", "b.png", "c.png"]
    (tmp_path / "mine/c.png").write_bytes((tmp_path / "mine/a.png").read_bytes())  # drawn again since
    with pytest.raises(utils.UserError, match="holds responses to other images"):
        score_gnet.main([*root, "--images", str(tmp_path / "mine"), "--outdir", str(tmp_path / "of_mine")])


@pytest.mark.parametrize("flags, message", [
    (["--ids", "24"], "--ids 24: wanted 0..23"), (["--images", "nowhere"], "the folder of pictures not found"),
    (["--images", "train_logs"], "no pictures"), (["--batch_size", "0"], "--batch_size 0"),
    (["--subj", "2"], "gnet_subj02"), (["--ids", "3", "--outdir", "scores_all/subj01/kept"], "--overwrite them"),
])
def test_mistakes_of_score_gnet_are_one_line(world, flags, message, capsys):
    assert utils.run_cli(score_gnet.main, ["--root", str(world.root), "--outdir", "scores_all/subj01/kept"]) == 0
    capsys.readouterr()
    assert utils.run_cli(score_gnet.main, ["--root", str(world.root), "--device", "cpu", *flags]) == 2
    assert message in error_of(capsys)


def test_brain_correlation_is_pearsons_r_across_a_regions_voxels(world, encoder, models, tmp_path, capsys):
    folder = tmp_path / "a"
    assert draw(world, models, folder, "--num_samples", 2, "--use_gnet", "--gnet_roi", "V1") == 0
    words = ["--root", str(world.root), "--num_sessions", "3", "--images", str(folder), "--eval_clip", "none",
             "--device", "cpu"]
    evaluate.main(words)
    results = json.loads((folder / "metrics.json").read_text())
    measured = load_test_set(world, "subj01").betas
    found = []
    for row in range(4):
        for name in (f"{row:05d}.png", f"{row:05d}_s1.png"):
            predicted = encoder.predict(picture(folder / name)[None])[0]
            found.append(np.corrcoef(predicted[:25], measured[row, :25])[0, 1])
    assert results["brain_correlation_V1"]["value"] == pytest.approx(np.mean(found), abs=1e-5)
    assert {"brain_correlation_V2", "brain_correlation_nsd_general"} <= results.keys()
    assert "gnet_subj01 guided these pictures" in capsys.readouterr().out
    evaluate.main([*words, "--seen"])
    best = json.loads((folder / "seen/metrics.json").read_text())
    assert best["brain_correlation_V1"]["value"] > 0.8 > results["brain_correlation_V1"]["value"]
