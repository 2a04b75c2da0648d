"""The adapter: attention to decoded g, what it adds of decoded z, decodings as a subject's responses give them, its
training, drawing with it."""

import shutil

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from sklearn.linear_model import Ridge
from sklearn.model_selection import LeaveOneOut, cross_val_predict

import recon
import train_adapter
import utils
from disk.checkpoints import load_checkpoint
from disk.files import load_json
from disk.scores import save_scores
from models import AdapterAttention, FeatureAdapter
from nsd.components import CoefficientRows, open_components
from nsd.rows import open_feature
from nsd.trials import load_trials, shared_images, split_trials
from sampling.adapter import AdapterObjective, Decodings, ImageBatches, load_adapter
from sampling.folders import features_in
from sampling.pipeline import load_pipeline
from test_recon import folder_of, pictures, score_folder, words
from tiny_nsd import N_IMAGES, SHARED, write_tiny_nsd
from tiny_runs import write_features
from tiny_sd import LATENT, TOKENS, WIDTH, hasten
from training.ridge import decompose, left_out
from training.team import Team
from training.tracking import load_rows

SHAPES = {"c": (TOKENS, WIDTH), "z": (4, LATENT, LATENT), "g_2": (5, 12), "g_4": (5, 12)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The tiny data set with features that fit the tiny Stable Diffusion; returns Paths."""
    paths, _ = write_tiny_nsd(tmp_path_factory.mktemp("adapter"))
    write_features(paths, SHAPES)
    return paths


def train(paths, models, *flags):
    given = ["--root", paths.root, "--subj", 1, "--num_sessions", 3, "--val_fraction", 0.2, "--feats", "g_2", "g_4",
             "--sd_model", models[0], "--batch_size", 4, "--num_epochs", 1, "--num_workers", 0,
             "--device", "cpu", *flags]
    return utils.run_cli(train_adapter.main, [str(word) for word in given])


@pytest.fixture(scope="module")
def trained(world, tiny_models):
    assert train(world, tiny_models, "--max_lr", 0.05, "--num_epochs", 2) == 0
    return world


@pytest.fixture
def unet(tiny_models):
    return load_pipeline(tiny_models[0], torch.device("cpu")).unet


def adapter_of(unet, started=True):
    torch.manual_seed(0)
    adapter = FeatureAdapter.fitting(unet, [2, 4], (5, 12))
    if started:
        for out in [*(attention.to_out for attention in adapter.attentions), *adapter.layout.outs]:
            torch.nn.init.normal_(out.weight)
    return adapter.requires_grad_(False)


def decoded(n=2):
    """Features of n rows as an adapter of two layers takes them."""
    return {"z": torch.randn(n, 4, LATENT, LATENT), **{feat: torch.randn(n, 5, 12) for feat in ("g_2", "g_4")}}


# --- attention ----------------------------------------------------------------------------------------------------


def test_attends_as_ip_adapter_does(unet):
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    channels, hidden = attention.to_q.in_features, torch.randn(3, 7, attention.to_q.in_features)
    text, tokens = torch.randn(3, TOKENS, WIDTH), torch.randn(3, 10, WIDTH)
    theirs = IPAdapterAttnProcessor2_0(channels, WIDTH, num_tokens=(10,))
    ours = AdapterAttention(AttnProcessor2_0(), channels, WIDTH)
    ours.to_k.weight.data, ours.to_v.weight.data = theirs.to_k_ip[0].weight, theirs.to_v_ip[0].weight
    ours.to_out.weight.data = attention.to_out[0].weight  # theirs has one way back for both
    with torch.no_grad():
        wanted = theirs(attention, hidden, (text, [tokens]))
        found = ours(attention, hidden, text, ip_hidden_states=tokens)
        torch.testing.assert_close(found, wanted)
        some = ours(attention, hidden, text, ip_hidden_states=tokens[1:])  # of the last two rows
        torch.testing.assert_close(some[1:], wanted[1:])
        torch.testing.assert_close(some[:1], AttnProcessor2_0()(attention, hidden[:1], text[:1]))


def test_an_untrained_adapter_changes_no_bit(unet):
    latents, text = torch.randn(2, 4, LATENT, LATENT), torch.randn(2, TOKENS, WIDTH)
    with torch.no_grad():
        before = unet(latents, 500, text).sample
        adapter = adapter_of(unet, started=False)
        adapter.attach(unet)
        looks = adapter(decoded())
        assert looks.tokens.shape == (2, 10, WIDTH)
        for beside in ({}, looks.beside(latents, torch.tensor([500]), torch.float32)):
            assert torch.equal(unet(latents, 500, text, **beside).sample, before)


@pytest.mark.parametrize("size", [LATENT, LATENT + 2, LATENT + 1])
def test_the_layout_is_of_the_shapes_that_the_unet_hands_over(unet, size):
    handed = []
    for block in unet.down_blocks:
        block.register_forward_hook(lambda block, given, made: handed.extend(made[1]))
    for layer in (unet.conv_in, unet.mid_block):
        layer.register_forward_hook(lambda layer, given, made: handed.append(made))
    latents = torch.randn(2, 4, size, size)
    with torch.no_grad():
        unet(latents, 500, torch.randn(2, TOKENS, WIDTH))
        added = adapter_of(unet).layout(latents, latents, torch.tensor([500]))
    assert [part.shape for part in added] == [part.shape for part in handed]


def test_the_layout_depends_on_z_on_the_latents_and_on_their_time(unet):
    layout, rows = adapter_of(unet).layout, torch.randn(3, 4, LATENT, LATENT)
    with torch.no_grad():
        first = layout(rows, rows, torch.tensor([500]))[0]
        torch.testing.assert_close(layout(rows, rows, torch.tensor([500] * 3))[0], first)
        for z, latents, t in ((rows.flip(0), rows, 500), (rows, rows.flip(0), 500), (rows, rows, 20)):
            assert not torch.allclose(layout(z, latents, torch.tensor([t]))[0], first)
        torch.testing.assert_close(layout(rows[1:2], rows[1:2], torch.tensor([500]))[0], first[1:2])


def test_only_the_conditional_half_attends(tiny_models):
    pipe = load_pipeline(tiny_models[0], torch.device("cpu"))
    adapter = adapter_of(pipe.unet)
    adapter.attach(pipe.unet)
    latents, context = torch.randn(2, 4, LATENT, LATENT), pipe.context_of(torch.randn(2, TOKENS, WIDTH))
    with torch.no_grad():
        looks = adapter(decoded())
        plain, adapted = pipe.predict_noise(latents, 500, context), pipe.predict_noise(latents, 500, context, looks)
    torch.testing.assert_close(adapted[0], plain[0])
    assert (adapted[1] - plain[1]).abs().max() > 0.01
    term = lambda image, rows=slice(None): image.mean((1, 2, 3))  # noqa: E731
    in_turn = pipe.guidance_gradient(latents, 500, context, 5.0, [term], looks=looks)
    for found, wanted in zip(in_turn, adapted, strict=False):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


# --- decodings ----------------------------------------------------------------------------------------------------


def test_left_out_predictions_are_those_of_the_ridge_without_the_row():
    rng = np.random.default_rng(0)
    responses, targets = rng.standard_normal((15, 8)), rng.standard_normal((15, 3))
    found = left_out(decompose(torch.from_numpy(responses)), torch.from_numpy(targets), alphas=[3.0])
    wanted = cross_val_predict(Ridge(3.0), responses, targets, cv=LeaveOneOut())
    np.testing.assert_allclose(found, wanted, atol=1e-10)


def test_decodings_err_as_the_ridge_does_on_images_it_has_not_seen(world):
    components = {feat: open_components(world, feat) for feat in ("c", "g_2")}
    rng, n = np.random.default_rng(0), N_IMAGES
    signal = np.concatenate([known.coefficients[:, :3] for known in components.values()], 1)  # read by every voxel
    signal = signal / signal.std(0)
    responses = (signal @ rng.standard_normal((6, 40)) + 0.5 * rng.standard_normal((n, 40))).astype(np.float32)
    decodings = Decodings(components, responses, np.arange(n), torch.device("cpu"))
    for feat, known in components.items():
        true = torch.from_numpy(known.coefficients)
        by_ridge = left_out(decompose(torch.from_numpy(responses)), true)
        r2 = 1 - (by_ridge - true).square().mean(0) / true.var(0, unbiased=False)
        wanted = torch.where(r2 >= 0.05, by_ridge, 0)
        assert {0, 1, 2} <= set(np.flatnonzero(r2 >= 0.05)) and (r2 < 0.05).any()

        def drawn(errors_of, share, feat=feat, known=known):
            rows = decodings.draw({name: torch.from_numpy(part.coefficients) for name, part in components.items()},
                                  errors_of, torch.full((n,), share))[feat]
            assert rows.shape == (n, *known.shape)
            return known.project(rows.numpy())

        # an image with its own errors is what the ridge made of it, and without errors what it is
        own = torch.arange(n)
        for share, coefficients in ((1.0, wanted), (0.0, true), (0.5, (wanted + true) / 2)):
            np.testing.assert_allclose(drawn(own, share), coefficients, atol=1e-2)
        assert not np.allclose(drawn(torch.from_numpy(rng.permutation(n)), 1.0), wanted, atol=1e-2)


# --- training -----------------------------------------------------------------------------------------------------


def test_the_loss_counts_an_error_of_x0_by_the_root_of_snr(world):
    components = {feat: open_components(world, feat) for feat in ("c", "z", "g_2")}
    decodings = Decodings(components, components["c"].coefficients, np.arange(N_IMAGES), torch.device("cpu"))
    abar, true = torch.linspace(0.99, 0.01, 10), open_feature(world, "z")[:4]
    seen = []

    class Silent(torch.nn.Module):
        def forward(self, noisy, t, text, features):
            seen.append((noisy, abar[t].view(-1, 1, 1, 1)))
            assert list(features) == ["z", "g_2"]
            return torch.zeros_like(noisy)

    objective = AdapterObjective(decodings, abar, torch.zeros(1, TOKENS, WIDTH), (4, LATENT, LATENT))
    batch = {feat: torch.from_numpy(known.coefficients[:4]) for feat, known in components.items()}
    loss, logs = objective(Silent(), {"image_ids": torch.arange(4), "latents": torch.from_numpy(true), **batch}, 0.0,
                           torch.Generator().manual_seed(3))
    noisy, at = seen[0]
    x0 = noisy / at.sqrt()  # as no noise at all says
    torch.testing.assert_close(loss, ((x0 - torch.from_numpy(true)).square() * (at / (1 - at)).sqrt()).mean())
    assert logs == {}


def test_trains_and_keeps_the_adapter_alone(trained):
    folder = trained.run("adapter_subj01")
    state = load_checkpoint(folder / "best.pth")
    assert state["model_args"]["kind"] == "adapter" and state["model_args"]["layers"] == [2, 4]
    assert all(key.startswith("adapter.") for key in state["model"])
    rows = list(load_rows(folder / "metrics.jsonl"))
    assert {"train/loss", "val/loss", "val/loss_plain"} <= rows[-1].keys()
    assert rows[-1]["val/loss"] != rows[-1]["val/loss_plain"]


def test_trains_on_no_image_that_is_tested_or_validates(world, tiny_models, monkeypatch):
    seen = {}

    def watch(run, model, objective, loop):
        seen.update({part: {int(i) for k in range(len(batches)) for i in batches[k]["image_ids"]}
                     for part, batches in (("train", run.train), ("val", run.val))})

    monkeypatch.setattr("training.loop.fit", watch)
    assert train(world, tiny_models, "--tag", "watched") == 0
    tested = set(shared_images(world, N_IMAGES).tolist())
    _, validates = split_trials(world, "subj01", 3, 0.2, 42)
    assert not (seen["train"] | seen["val"]) & tested and not seen["train"] & seen["val"]
    assert not seen["train"] & set(validates["image_id"])
    own = set(load_trials(world, "subj01", "train", 3)["image_id"])
    assert seen["train"] - own, "images that the subject never saw train, too"


def test_resumed_is_uninterrupted(trained, tiny_models, monkeypatch):
    flags = ("--max_lr", 0.05, "--num_epochs", 2, "--tag", "again", "--resume")
    monkeypatch.setattr("training.loop.Alarm.rings", lambda alarm: stop())
    calls = []

    def stop():
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return False

    assert train(trained, tiny_models, *flags) != 0
    monkeypatch.undo()
    assert train(trained, tiny_models, *flags) == 0
    whole, parts = (load_checkpoint(trained.run(name) / "last.pth")["model"] for name in
                    ("adapter_subj01", "adapter_subj01_again"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_processes_share_a_batch_and_draw_what_one_draws(world, monkeypatch):
    components = {feat: open_components(world, feat) for feat in ("c", "g_2")}
    responses = np.concatenate([known.coefficients for known in components.values()], 1)
    decodings = Decodings(components, responses, np.arange(N_IMAGES), torch.device("cpu"))
    objective = AdapterObjective(decodings, torch.linspace(0.99, 0.01, 10), torch.zeros(1, TOKENS, WIDTH),
                                 (4, LATENT, LATENT))
    targets = {feat: CoefficientRows(known) for feat, known in components.items()}
    targets["latents"] = open_feature(world, "z")

    def errors_of(rank, size):
        found = []
        monkeypatch.setattr(Team, "join", lambda team, rows, n: found.append(rows) or rows)
        item = ImageBatches(np.arange(10), targets, 5, 1, rank, size)[0]
        objective(Reads(), {"image_ids": item["image_ids"], **item["targets"]}, 0.0, torch.Generator().manual_seed(3),
                  Team("cpu", rank, size))
        return found[0]

    whole = errors_of(0, 1)
    assert len(whole) == 5
    for rank in range(2):
        torch.testing.assert_close(errors_of(rank, 2), whole[rank::2])


class Reads(torch.nn.Module):
    """Noise that depends on all that a UNet and its adapter get."""

    def forward(self, noisy, t, text, features):
        read = t + text.mean((1, 2)) + sum(rows.mean((1, 2)) for rows in features.values())
        return noisy * read.view(-1, 1, 1, 1)


# --- drawing ------------------------------------------------------------------------------------------------------


@pytest.fixture
def scored(trained, tmp_path, monkeypatch):
    """A root with random scores of the test images, and the trained adapter; returns it."""
    hasten(monkeypatch, at_once=2)
    rng = np.random.default_rng(0)
    for feat in SHAPES:
        rows = rng.standard_normal((3, *SHAPES[feat]))
        save_scores(score_folder(tmp_path, feat), SHARED[:3], {"nsdgeneral": rows}, {})
    (tmp_path / "train_logs").symlink_to(trained.root / "train_logs")
    return tmp_path


def draw(root, models, *flags):
    return utils.run_cli(recon.main, words(root, models, "--use_adapter", *flags))


def test_draws_other_pictures_whatever_the_batch_and_subset(scored, tiny_models):
    assert draw(scored, tiny_models, "--guidance_scale", 0) == 0
    folder = folder_of(scored, "0", "0", "cp_4096_v1_adapter")
    whole = pictures(folder)
    assert utils.run_cli(recon.main, words(scored, tiny_models, "--guidance_scale", 0)) == 0
    plain = pictures(folder_of(scored, "0", "0"))
    assert whole.keys() == plain.keys() and any((whole[name] != plain[name]).any() for name in whole)
    assert draw(scored, tiny_models, "--guidance_scale", 0, "--ids", SHARED[1], "--outdir", scored / "one") == 0
    for name, picture in pictures(scored / "one").items():
        assert (picture == whole[name]).all()
    assert draw(scored, tiny_models, "--guidance_scale", 300, "--guidance_strength", 0.5) == 0  # and guided by g


def test_decoded_z_conditions_wherever_paths_start(scored, tiny_models):
    def drawn(name, *flags):
        assert draw(scored, tiny_models, "--guidance_scale", 0, "--outdir", scored / name, *flags) == 0
        return pictures(scored / name)

    noise, file = drawn("noise", "--z", "none"), scored / "elsewhere"
    assert {"c", "z"} < set(features_in(load_json(scored / "noise/config.json")))  # and layers of g, unguided
    save_scores(file, SHARED[:3], {"nsdgeneral": np.zeros((3, *SHAPES["z"]))}, {})
    given, usual = drawn("given", "--z", file / "nsdgeneral.npy"), drawn("usual", "--z", "scores")
    save_scores(score_folder(scored, "z"), SHARED[:3], {"nsdgeneral": np.ones((3, *SHAPES["z"]))}, {})
    for before, name, *flags in ((noise, "noise2", "--z", "none"), (given, "given2", "--z", file / "nsdgeneral.npy")):
        after = drawn(name, *flags)
        assert all((after[picture] != before[picture]).any() for picture in before)
    assert any((noise[picture] != usual[picture]).any() for picture in noise)


def test_what_it_refuses(scored, tiny_models, capsys):
    assert draw(scored, tiny_models, "--adapter_run", "adapter_subj07") == 2
    assert "STAGES=adapter SUBJ=1 bash scripts/train.sh" in capsys.readouterr().err
    assert draw(scored, tiny_models, "--hold_out", "1/3") == 2
    assert "--hold_out 1/3 with --use_adapter" in capsys.readouterr().err
    save_scores(score_folder(scored, "g_4"), SHARED[:3], {"nsdgeneral": np.zeros((3, 4, 12))}, {})
    assert draw(scored, tiny_models, "--guidance_scale", 0) == 2
    assert "scores of g_4: rows of shape (4, 12), the adapter adapter_subj01 takes (5, 12)" in capsys.readouterr().err
    save_scores(score_folder(scored, "g_4"), SHARED[:3], {"nsdgeneral": np.zeros((3, *SHAPES["g_4"]))}, {})
    save_scores(score_folder(scored, "z"), SHARED[:3], {"nsdgeneral": np.zeros((3, 4, LATENT, LATENT + 2))}, {})
    assert draw(scored, tiny_models, "--guidance_scale", 0, "--z", "none") == 2
    assert f"scores of z: rows of shape (4, {LATENT}, {LATENT + 2}), the adapter draws" in capsys.readouterr().err
    shutil.rmtree(score_folder(scored, "z"))
    assert draw(scored, tiny_models, "--guidance_scale", 0, "--z", "none") == 2
    assert "or draw without --use_adapter" in capsys.readouterr().err
    assert not list(scored.glob("outputs_all/**/*.png"))


def test_refuses_an_adapter_of_another_unet(trained, unet):
    file = trained.run("adapter_subj01") / "best.pth"
    unet.down_blocks[0].downsamplers = None
    with pytest.raises(utils.UserError, match="other skips"):
        load_adapter(file, unet, torch.device("cpu"))
    del unet.up_blocks[-1]
    with pytest.raises(utils.UserError, match="other cross-attentions"):
        load_adapter(file, unet, torch.device("cpu"))
