"""Exports of trained decoders: the same scores to the bit elsewhere, features and pictures without NSD, refusals."""

import errno
import filecmp
import json
import os
import pickle
import shutil
import sys
from dataclasses import fields

import h5py
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file, save_file

import recon
import score_c
import score_g
import score_z
import share
import sharing.folder
import train_c
import train_g
import train_z
import utils
from disk.checkpoints import load_checkpoint, save_checkpoint
from disk.files import archive_hash, file_hash, load_json
from disk.scores import load_scores
from features.components import write_components
from models import FeatureAdapter
from nsd.repeats import load_test_set
from sampling.drawing import Settings
from sharing.decoder import BrainDecoder
from sharing.folder import digest_of
from tiny_nsd import N_IMAGES, write_tiny_nsd
from tiny_runs import flags_of, paths_of
from tiny_sd import load_once
from whole_world import SHAPES, error_lines

V, HIDDEN = 30, 9  # voxels; numbers that features and responses are made of
FEATS = ("c", "z", "g_2")
SCORES = {"c": (score_c, []), "z": (score_z, []), "g_2": (score_g, ["--feat", "g_2"])}
FLAGS = ["--hidden_dim", 8, "--num_sessions", 3, "--device", "cpu"]
ADAPTER = "adapter_subj01"
RUN_C, RIDGE_C = "scratch_subj01_3sess_ext1_c_8_mlp", "ridge_subj01_3sess_ext1_c"


def run(script, paths, *words):
    """Exit status of a script, whether it parsed its flags or not."""
    try:
        return utils.run_cli(script.main, [*map(str, words), "--root", str(paths.root)])
    except SystemExit as stop:
        return stop.code


def export(paths, folder, *flags):
    return run(share, paths, "export", folder, "--run", "scratch", *FLAGS, *flags)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Paths of a world whose responses tell of the features, with runs and ridges of c, z and g_2, scored."""
    paths, shown = write_tiny_nsd(tmp_path_factory.mktemp("trained"))
    rng = np.random.default_rng(1)
    told = rng.standard_normal((N_IMAGES, HIDDEN))
    for feat in FEATS:
        shape = SHAPES[feat]
        with h5py.File(paths.feature(feat), "w") as file:
            file["data"] = (1 + told @ rng.standard_normal((HIDDEN, np.prod(shape)))).astype(np.float16)
            file["data"].attrs["shape"] = shape
        write_components(paths, feat)
    responses = told[shown["subj01"]] @ rng.standard_normal((HIDDEN, V)) / 3
    with h5py.File(paths.betas("subj01"), "w") as file:
        file["betas"] = (responses + 0.3 * rng.standard_normal(responses.shape)).astype(np.float32)
    for script, more in ((train_c, []), (train_z, []), (train_g, ["--feat", "g_2"])):
        for model in (["components", "--num_epochs", 30, "--max_lr", 0.01], ["ridge"]):
            assert utils.run_cli(script.main, flags_of(paths, "--model", *model, *more)) == 0
    for script, more in SCORES.values():
        assert run(script, paths, "--run", "scratch", *FLAGS, *more) == 0
    return paths


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "subj01"
    assert export(trained, folder) == 0
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    """An export of the test's own."""
    return shutil.copytree(exported, tmp_path / "export")


@pytest.fixture
def elsewhere(trained, tmp_path):
    """Another root, with the data and nothing that was trained."""
    shutil.copytree(trained.root, tmp_path / "root", ignore=shutil.ignore_patterns("train_logs", "scores_all"))
    return paths_of(tmp_path / "root")


@pytest.fixture(scope="module")
def tested(trained):
    return load_test_set(trained, "subj01")


@pytest.fixture(scope="module")
def models(tiny_models, tmp_path_factory):
    """A folder of tiny models by the names that the demo's have."""
    folder = tmp_path_factory.mktemp("models")
    for name, model in zip(("sd", "clip"), tiny_models, strict=True):
        shutil.copytree(model, folder / name)
    AutoencoderTiny(encoder_block_out_channels=[8, 8], decoder_block_out_channels=[8, 8], num_encoder_blocks=[1, 1],
                    num_decoder_blocks=[1, 1]).save_pretrained(folder / "taesd")
    return folder


def scores_folder(paths, feat):
    names = {"c": RUN_C, "z": "scratch_subj01_3sess_ext1_z_8", "g_2": "scratch_subj01_3sess_ext1_g_2_8/Linear-2"}
    return paths.root / "scores_all/subj01" / names[feat]


def tree(folder):
    """{path: content, None of folders} below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in sorted(folder.rglob("*")) if path.name != ".behaviour.npz"}


def refused(capsys, *words):
    """The one line that was said last."""
    found = capsys.readouterr()
    (line,) = error_lines(found.err)
    assert line.startswith("error: ") and "Traceback" not in found.out + found.err
    assert not [word for word in words if word not in line], line


# --- the same scores elsewhere ------------------------------------------------------------------------------------


def test_an_import_gives_the_same_scores_to_the_bit(trained, exported, elsewhere, capsys):
    assert run(share, elsewhere, "import", exported) == 0
    assert "FEATS=c bash scripts/score.sh --run scratch --hidden_dim 8 --num_sessions 3" in capsys.readouterr().out
    for name in os.listdir(trained.root / "train_logs"):  # to whoever asks for its hash it is the same checkpoint
        assert archive_hash(elsewhere.run(name) / "last.pth") == archive_hash(trained.run(name) / "last.pth")
        assert filecmp.cmp(elsewhere.run(name) / "config.json", trained.run(name) / "config.json", shallow=False)
    for feat, (script, more) in SCORES.items():
        assert run(script, elsewhere, "--run", "scratch", *FLAGS, *more) == 0
        theirs, ours = scores_folder(trained, feat), scores_folder(elsewhere, feat)
        files = [file.name for file in theirs.iterdir()]
        assert {"nsdgeneral.npy", "errors.npy", "image_ids.npy", "config.json"} <= set(files)
        assert filecmp.cmpfiles(theirs, ours, files, shallow=False) == (files, [], [])


def test_a_run_that_is_there_is_kept_where_it_is_the_same(folder, elsewhere, capsys):
    assert run(share, elsewhere, "import", folder) == 0
    last = elsewhere.run(RUN_C) / "last.pth"
    before = last.stat().st_mtime_ns
    assert run(share, elsewhere, "import", folder) == 0
    assert f"{RUN_C}: is there already, kept" in capsys.readouterr().out and last.stat().st_mtime_ns == before
    state = load_checkpoint(last)
    key = next(iter(state["model"]))
    changed = {**state["model"], key: state["model"][key] + 1e-6}
    del state["format"]
    save_checkpoint(last, {**state, "model": changed})
    shutil.rmtree(elsewhere.run(RIDGE_C))
    before = tree(elsewhere.root)
    assert run(share, elsewhere, "import", folder) == 2
    refused(capsys, RUN_C, "another run of the same name", "--overwrite")
    assert tree(elsewhere.root) == before  # not the ridge either
    shutil.copy(last, last.with_name("best.pth"))
    assert run(share, elsewhere, "import", folder, "--overwrite") == 0
    assert not last.with_name("best.pth").exists()  # it was the other run's
    assert torch.equal(load_checkpoint(last)["model"][key], state["model"][key])


def test_one_feature_alone_and_without_its_ridge(trained, tmp_path):
    assert export(trained, tmp_path / "one", "--feats", "c", "--no-stack") == 0
    config = load_json(tmp_path / "one/config.json")
    assert list(config["features"]) == ["c"] and list(config["runs"]) == [RUN_C]
    assert config["features"]["c"]["ridge"] is None and config["features"]["c"]["weight"] == 1
    assert sorted(config["files"]) == ["features/c.safetensors", f"runs/{RUN_C}.safetensors"]


# --- what is inside -----------------------------------------------------------------------------------------------


def test_nothing_inside_is_a_pickle_or_data(trained, exported, monkeypatch):
    files = [path for path in exported.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json", ".md"}
    forbidden = [rows[:8].tobytes() for rows in load_test_set(trained, "subj01").betas]
    for feat in FEATS:
        with h5py.File(trained.components(feat)) as file:
            forbidden += [row.tobytes() for row in file["data"][()]]  # coefficients of an image
        with h5py.File(trained.feature(feat)) as file:
            forbidden += [row.astype(kind).tobytes() for row in file["data"][()] for kind in (np.float16, np.float32)]
    for path in files:
        content = path.read_bytes()
        assert not any(row in content for row in forbidden), path

    def never(*args, **kwargs):
        raise AssertionError("a pickle is read")
    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, never)
    BrainDecoder.from_pretrained(exported)


def test_the_card_says_how_good_and_from_what(trained, exported):
    card, config = (exported / "README.md").read_text(), load_json(exported / "config.json")
    assert card.startswith("---\nlicense: other\n") and card.count("\n---\n") == 1
    made_from = load_json(trained.run(RUN_C) / "config.json")["made_from"]
    for what, value in made_from.items():
        assert f"| {what} | {value}" in card
    r2 = load_json(scores_folder(trained, "c") / "config.json")["r2"]
    weight = config["features"]["c"]["weight"]
    assert f"| c | {r2['network']:.3f} | {r2['ridge']:.3f} | {r2['scored']:.3f} |  | {weight:.2f} |" in card
    assert 0 < weight < 1 and "there is none inside: no responses" in card and "No pictures" in card
    assert "8 images (24 trials). Validation: 2 images" in card and "the 4 shared images" in card


def test_metrics_of_pictures_drawn_from_these_scores_are_told(trained, tmp_path):
    drawn = trained.outputs_all / "subj01/mine/30/0.8"
    drawn.mkdir(parents=True)
    hashes = {feat: file_hash(scores_folder(trained, feat) / "nsdgeneral.npy") for feat in FEATS}
    entry = {"value": 0.625, "ci_low": 0.5, "ci_high": 0.75, "n": 4}
    (drawn / "metrics.json").write_text(json.dumps({"ssim": entry, "inception_two_way": {"missing": "no network"}}))
    try:
        for hashes_there, told in ((hashes, True), ({**hashes, "z": "another"}, False)):
            config = {"score_hashes": hashes_there | {"image_ids": "x"}, "sd_model": "/home/jane/sd"}
            (drawn / "config.json").write_text(json.dumps(config))
            assert export(trained, tmp_path / str(told)) == 0
            card = (tmp_path / str(told) / "README.md").read_text()
            assert ("| ssim | 0.625 | 0.5 .. 0.75 | 4 |" in card) is told and "inception" not in card
            assert "jane" not in card + (tmp_path / str(told) / "config.json").read_text()
    finally:
        shutil.rmtree(trained.outputs_all)


# --- without NSD --------------------------------------------------------------------------------------------------


def test_a_stranger_decodes_as_the_scores_say(trained, exported, tested, monkeypatch):
    wanted = {feat: load_scores(scores_folder(trained, feat))[1] for feat in FEATS}

    def never(*args, **kwargs):
        raise AssertionError("a file of NSD's is opened")
    monkeypatch.setattr(h5py, "File", never)
    decoder = BrainDecoder.from_pretrained(exported)
    assert (decoder.subj, decoder.n_voxels, decoder.feats) == ("subj01", V, list(FEATS))
    found = decoder.decode(tested.betas)
    for feat in FEATS:
        assert found[feat].dtype == np.float32
        np.testing.assert_array_equal(found[feat], wanted[feat])
    one = decoder.decode(tested.betas[2:3], ["c"])
    assert list(one) == ["c"]
    np.testing.assert_allclose(one["c"][0], wanted["c"][2], atol=1e-4)


def test_published_networks_are_shared_too(trained, tmp_path, tested):
    """--model mindeye2 predicts whole rows."""
    flags = ["--tag", "m", "--feats", "c"]
    assert utils.run_cli(train_c.main, flags_of(trained, "--num_epochs", 1, "--tag", "m")) == 0
    try:
        assert run(score_c, trained, "--run", "scratch", *FLAGS, "--tag", "m") == 0
        assert export(trained, tmp_path / "m", *flags) == 0
        wanted = load_scores(trained.root / f"scores_all/subj01/{RUN_C}_m")[1]
        found = BrainDecoder.from_pretrained(tmp_path / "m").decode(tested.betas)
        np.testing.assert_array_equal(found["c"], wanted)
    finally:
        shutil.rmtree(trained.run(f"{RUN_C}_m"))


def test_pictures_are_those_of_recon(trained, exported, tested, models, monkeypatch, capsys):
    monkeypatch.setattr("sampling.pipeline.load_pipeline", load_once)
    settings = {"num_inference_steps": 3, "guidance_decoder": "full", "seed": 7}
    flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
    assert run(recon, trained, "--run", "scratch", *FLAGS, "--sd_model", models / "sd", "--clip_model", models / "clip",
               "--feats", "g_2", *flags) == 0
    try:
        drawn = sorted(trained.outputs_all.rglob("*.png"))
        wanted = np.stack([np.array(Image.open(file)) for file in drawn])
    finally:
        shutil.rmtree(trained.outputs_all)
    decoder, pipe = BrainDecoder.from_pretrained(exported), load_once(str(models / "sd"), torch.device("cpu"))
    draw = {"image_ids": tested.image_ids, "clip_model": str(models / "clip"), **settings}
    found = decoder.draw(tested.betas, pipe, **draw)
    np.testing.assert_array_equal(found, wanted)
    assert len(found) == 4 and found.dtype == np.uint8
    unguided = decoder.draw(tested.betas, pipe, **{**draw, "clip_model": None})
    assert not np.array_equal(unguided, found)
    with pytest.raises(utils.UserError):
        decoder.draw(tested.betas, pipe, **{**draw, "clip_model": "nowhere/"})


@pytest.fixture
def adapted(trained, models, tmp_path):
    """Paths of a root that has an adapter of g_2, too, with weights drawn at random."""
    shutil.copytree(trained.root, tmp_path / "adapted")
    paths, unet = paths_of(tmp_path / "adapted"), load_once(str(models / "sd"), torch.device("cpu")).unet
    torch.manual_seed(0)
    adapter = FeatureAdapter.fitting(unet, [2], SHAPES["g_2"])
    for out in [*(attention.to_out for attention in adapter.attentions), *adapter.layout.outs]:
        torch.nn.init.normal_(out.weight, std=0.1)
    save_checkpoint(paths.run(ADAPTER) / "best.pth", {
        "model": {f"adapter.{name}": tensor for name, tensor in adapter.state_dict().items()}, "n_voxels": {},
        "model_args": adapter.model_args, "config": {"run": ADAPTER, "feat": "adapter", "sd_model": "models/sd"}})
    return paths


def test_an_adapter_is_shared_and_draws_what_recon_draws(adapted, elsewhere, tested, models, tmp_path, monkeypatch,
                                                         capsys):
    monkeypatch.setattr("sampling.pipeline.load_pipeline", load_once)
    settings = {"num_inference_steps": 3, "guidance_decoder": "full", "seed": 7}
    flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
    assert run(recon, adapted, "--run", "scratch", *FLAGS, "--sd_model", models / "sd", "--clip_model", models / "clip",
               "--feats", "g_2", "--use_adapter", *flags) == 0
    wanted = np.stack([np.array(Image.open(file)) for file in sorted(adapted.outputs_all.rglob("*.png"))])
    assert export(adapted, tmp_path / "e") == 0
    assert ADAPTER in (tmp_path / "e/README.md").read_text()

    decoder, pipe = BrainDecoder.from_pretrained(tmp_path / "e"), load_once(str(models / "sd"), torch.device("cpu"))
    draw = {"image_ids": tested.image_ids, "clip_model": str(models / "clip"), **settings}
    for use_adapter, same in ((True, True), (False, False), (True, True)):  # attached twice, it counts once
        assert np.array_equal(decoder.draw(tested.betas, pipe, **draw, use_adapter=use_adapter), wanted) == same

    for what in ("imported", "is there already, kept"):
        capsys.readouterr()
        assert run(share, elsewhere, "import", tmp_path / "e") == 0
        assert f"{elsewhere.run(ADAPTER)}: {what}" in capsys.readouterr().out
    assert archive_hash(elsewhere.run(ADAPTER) / "best.pth") == archive_hash(adapted.run(ADAPTER) / "best.pth")


def test_which_adapter_is_shared(adapted, exported, tested, models, tmp_path, capsys):
    assert export(adapted, tmp_path / "c", "--feats", "c") == 0  # the adapter takes g_2
    assert load_json(tmp_path / "c/config.json")["adapter"] is None and ADAPTER not in os.listdir(tmp_path / "c/runs")
    for flags, words in ((["--feats", "c", "--adapter_run", ADAPTER], ["g_2", "--feats"]),
                         (["--adapter_run", "adapter_subj09"], ["adapter_subj09", "STAGES=adapter"]),
                         (["--adapter_run", RUN_C], [RUN_C, "train_adapter.py"])):
        assert export(adapted, tmp_path / "d", *flags) == 2
        refused(capsys, *words)
    with pytest.raises(utils.UserError, match="no adapter"):
        pipe = load_once(str(models / "sd"), torch.device("cpu"))
        BrainDecoder.from_pretrained(exported).draw(tested.betas, pipe, clip_model=None, use_adapter=True)


def test_settings_are_the_flags_of_recon():
    args = recon.with_defaults(recon.get_parser().parse_args([]))
    wanted = {field.name: getattr(args, field.name) for field in fields(Settings) if field.name != "precision"}
    assert {name: getattr(Settings(), name) for name in wanted} == wanted


@pytest.mark.parametrize("responses, words", [
    (np.zeros((2, V + 1)), rf"shape \(2, {V + 1}\).*take \(N, {V}\) voxels"), (np.zeros(V), rf"shape \({V},\)"),
    (np.zeros((0, V)), "shape"), (np.full((1, V), np.nan), "NaN")])
def test_responses_of_another_kind_are_refused(exported, responses, words):
    with pytest.raises(utils.UserError):
        BrainDecoder.from_pretrained(exported).decode(responses)


def test_the_notebook_runs(trained, models, tmp_path, monkeypatch, capsys):
    root = shutil.copytree(trained.root, tmp_path / "world")
    shutil.copytree(models, root / "models")
    monkeypatch.setenv("ROOT", str(root))
    monkeypatch.setenv("SCORE_FLAGS", "--run scratch --hidden_dim 8 --num_sessions 3 --device cpu")
    monkeypatch.chdir(utils.REPOSITORY / "docs")
    monkeypatch.setattr(sys, "path", list(sys.path))
    notebook, names = load_json(utils.REPOSITORY / "docs/share.ipynb"), {}
    assert notebook["nbformat"] == 4
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert names["sheet"].size == (640, 320) and names["pictures"].shape == (4, 16, 16, 3)
    shapes = {feat: rows.shape for feat, rows in names["features"].items()}
    assert shapes == {feat: (4, *SHAPES[feat]) for feat in FEATS}
    assert f"{RUN_C}: is there already, kept" in capsys.readouterr().out


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, words", [
    (["--tag", "none"], (f"{RUN_C}_none", "not found", "there are:", "train it first")),
    (["--feats", "g_4"], ("g_4", "wanted g_4")),
    (["--feats", "g_3"], ("--feats", "'g_3'")),
    (["--run", "ground_truth"], ("--run ground_truth", "no run")),
    (["--subj", 2], ("subj02", "not found")),
])
def test_what_cannot_be_exported(trained, tmp_path, capsys, flags, words):
    assert export(trained, tmp_path / "new", *flags) == 2
    refused(capsys, *words)
    assert not any(tmp_path.iterdir())


def test_an_export_needs_components_and_a_finished_run(trained, tmp_path, capsys):
    paths = paths_of(shutil.copytree(trained.root, tmp_path / "root"))
    paths.components("c").rename(tmp_path / "away")
    assert export(paths, tmp_path / "new") == 2
    refused(capsys, "c_components.hdf5", "not found", "features.sh")
    (tmp_path / "away").rename(paths.components("c"))
    state = load_checkpoint(paths.run(RUN_C) / "last.pth")
    save_checkpoint(paths.run(RUN_C) / "last.pth", {**state, "optimizer": {}})
    assert export(paths, tmp_path / "new") == 2
    refused(capsys, RUN_C, "unfinished", "--resume")
    save_checkpoint(paths.run(RUN_C) / "last.pth", {**state, "config": {**state["config"], "seed": 43}})
    assert export(paths, tmp_path / "new", "--no-stack") == 2
    refused(capsys, "validation images", "--seed 42", "--seed 43", "--feats")
    assert not (tmp_path / "new").exists()


def test_a_folder_in_use_is_no_place_for_an_export(trained, folder, tmp_path, capsys):
    assert export(trained, folder) == 2
    refused(capsys, "holds an export already", "--overwrite")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years")
    for flags in ([], ["--overwrite"]):
        assert export(trained, tmp_path / "mine", *flags) == 2
        refused(capsys, "holds other things than an export")
    assert (tmp_path / "mine/thesis.txt").read_text() == "years"
    (folder / ".git").mkdir()
    assert export(trained, folder, "--overwrite") == 2
    refused(capsys, "holds other things than an export (.git)")
    (folder / ".git").rmdir()
    (folder / "README.md").write_text("edited")
    assert export(trained, folder, "--overwrite", "--feats", "c") == 0
    assert list(load_json(folder / "config.json")["features"]) == ["c"]
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "features", "runs"]


def test_a_full_disk_leaves_nothing_of_an_export(trained, folder, tmp_path, monkeypatch, capsys):
    written, before = [], tree(tmp_path)

    def full(tensors, path, *more):
        written.append(path)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save_file(tensors, path, *more)
    monkeypatch.setattr(sharing.folder, "save_file", full)
    assert export(trained, folder, "--overwrite") == 2
    refused(capsys, str(folder), "No space left", "make room")
    assert tree(tmp_path) == before


def test_an_export_that_cannot_be_replaced_stays(trained, folder, tmp_path, monkeypatch, capsys):
    before, replace = tree(tmp_path), os.replace

    def refusing(source, target):
        if target == folder and str(source).endswith(".tmp"):
            raise PermissionError(errno.EACCES, "Permission denied", str(target))
        replace(source, target)
    monkeypatch.setattr(os, "replace", refusing)
    assert export(trained, folder, "--overwrite", "--feats", "c") == 2
    refused(capsys, str(folder), "Permission denied")
    assert tree(tmp_path) == before


def test_a_full_disk_leaves_nothing_of_an_import(exported, elsewhere, monkeypatch, capsys):
    save, written = torch.save, []

    def full(state, path):
        written.append(path)
        if len(written) == 3:
            raise RuntimeError("PytorchStreamWriter failed writing file: file write failed")
        save(state, path)
    monkeypatch.setattr(torch, "save", full)
    assert run(share, elsewhere, "import", exported) == 2
    refused(capsys, "could not be written", "make room")
    assert not [path for path in (elsewhere.root / "train_logs").rglob("*") if path.is_file()]


def edit(change):
    """A damage: config.json says something else, with a digest that fits."""
    def damage(folder):
        config = load_json(folder / "config.json")
        change(config)
        (folder / "config.json").write_text(json.dumps({**config, "digest": digest_of(config)}))
    return damage


def named(name):
    """A damage: config.json lists the file of the run of c by another name."""
    def change(config):
        config["files"][name] = config["files"].pop(f"runs/{RUN_C}.safetensors")
        config["runs"][RUN_C]["file"] = name
    return edit(change)


def run_named(name):
    def change(config):
        config["runs"][name] = config["runs"].pop(RUN_C)
        config["runs"][name]["state"]["config"]["run"] = config["features"]["c"]["run"] = name
    return edit(change)


def linked(name):
    """A damage: a link to a copy that lies outside."""
    def damage(folder):
        path = folder / name
        path.rename(folder.parent / "outside")
        path.symlink_to(folder.parent / "outside")
    return damage


def other_tensors(change):
    """A damage: the file of the run of c holds other tensors, and its hash is right."""
    def damage(folder):
        file = folder / f"runs/{RUN_C}.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, file)
        edit(lambda config: config["files"].update({f"runs/{RUN_C}.safetensors": file_hash(file, digits=None)}))(folder)
    return damage


def rewritten(name, change):
    def damage(folder):
        (folder / name).write_bytes(change((folder / name).read_bytes()))
    return damage


WEIGHT = "model/heads.c.weight"
BAD = {
    "no folder": (shutil.rmtree, ("no such folder",)),
    "empty": (lambda folder: [shutil.rmtree(folder), folder.mkdir()], ("is no export", "share.py export")),
    "another config.json": (rewritten("config.json", lambda _: b'{"model_type": "gpt2"}'), ("format None", "wanted")),
    "config.json no JSON": (rewritten("config.json", lambda text: text[:99]), ("config.json", "not valid JSON")),
    "config.json edited": (rewritten("config.json", lambda text: text.replace(b'"weight": 0.', b'"weight": 1.')),
                           ("config.json", "hash does not match")),
    "weights edited": (rewritten(f"runs/{RUN_C}.safetensors", lambda text: text[:-4] + b"bits"),
                       (RUN_C, "hash does not match", "fetch the export again")),
    "weights cut": (rewritten("features/c.safetensors", lambda text: text[:-4]), ("c.safetensors", "does not match")),
    "file missing": (lambda folder: (folder / "features/z.safetensors").unlink(), ("z.safetensors", "missing")),
    "name leads out": (named("../x.safetensors"), ("'../x.safetensors'", "lead out")),
    "name leads out later": (named("runs/../../x.safetensors"), ("runs/../../x", "lead out")),
    "name absolute": (named("/tmp/x.safetensors"), ("'/tmp/x.safetensors'", "lead out")),
    "name with a backslash": (named("runs\\x.safetensors"), ("lead out",)),
    "a pickle": (named("runs/last.pth"), ("safetensors files alone", "last.pth")),
    "run leads out": (run_named("../../x"), ("names of runs", "'../../x'")),
    "run absolute": (run_named("/tmp/x"), ("names of runs", "'/tmp/x'")),
    "file is a link": (linked("features/c.safetensors"), ("c.safetensors", "is a link")),
    "folder is a link": (linked("runs"), ("runs", "is a link")),
    "config.json is a link": (linked("config.json"), ("config.json", "is a link")),
    "tensor missing": (other_tensors(lambda tensors: tensors.pop(WEIGHT)), (WEIGHT, "no file of that run has")),
    "tensor too many": (other_tensors(lambda tensors: tensors.update(x=torch.ones(2))), ("does not name (x)",)),
    "tensor of another shape": (other_tensors(lambda tensors: tensors.update({WEIGHT: torch.ones(2, 8)})),
                                ("weights do not fit", "heads.c.weight")),
    "no safetensors": (lambda folder: [rewritten(f"runs/{RUN_C}.safetensors", lambda _: b"PK")(folder), edit(
        lambda config: config["files"].update({f"runs/{RUN_C}.safetensors": file_hash(
            folder / f"runs/{RUN_C}.safetensors", digits=None)}))(folder)], ("not a readable safetensors",)),
    "config.json lacks a key": (edit(lambda config: config.pop("features")), ("not what an export says", "features")),
    "config.json of other types": (edit(lambda config: config.update(runs=[])), ("not what an export says",)),
    "unknown subject": (edit(lambda config: config.update(subj="subj00")), ("wanted a subject",)),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_export_is_refused_and_nothing_is_written(folder, elsewhere, capsys, case):
    damage, words = BAD[case]
    damage(folder)
    before = tree(elsewhere.root)
    assert run(share, elsewhere, "import", folder) == 2
    refused(capsys, *words)
    assert tree(elsewhere.root) == before
    with pytest.raises(utils.UserError):
        BrainDecoder.from_pretrained(folder)


def other_components(paths):
    paths.components("c").unlink()
    write_components(paths, "c", k=5)


def other_betas(paths, change):
    with h5py.File(paths.betas("subj01"), "r+") as file:
        rows = file["betas"][()]
        del file["betas"]
        file["betas"] = change(rows)


@pytest.mark.parametrize("damage, words", [
    (lambda paths: paths.components("c").unlink(), ("c_components.hdf5", "not found", "features.sh")),
    (other_components, ("c_components.hdf5", "was trained on", "BrainDecoder")),
    (lambda paths: other_betas(paths, lambda rows: rows[:, 1:]), ("29 voxels", "take 30")),
    (lambda paths: other_betas(paths, lambda rows: rows + 1), ("other responses",)),
])
def test_a_root_of_other_data_is_refused(exported, elsewhere, capsys, damage, words):
    damage(elsewhere)
    before = tree(elsewhere.root)
    assert run(share, elsewhere, "import", exported) == 2
    refused(capsys, *words)
    assert tree(elsewhere.root) == before


# --- from the hub -------------------------------------------------------------------------------------------------


@pytest.fixture
def cached(exported, tmp_path, monkeypatch):
    """The export as the hub's client keeps it, links to blobs; returns the folder of its snapshot."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    home, revision = tmp_path / "models--lab--subj01", 40 * "0"
    for path in exported.rglob("*"):
        if path.is_file():
            blob, link = home / "blobs" / file_hash(path), home / "snapshots" / revision / path.relative_to(exported)
            blob.parent.mkdir(parents=True, exist_ok=True)
            link.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, blob)
            link.symlink_to(os.path.relpath(blob, link.parent))
    (home / "refs").mkdir()
    (home / "refs/main").write_text(revision)
    return home / "snapshots" / revision


def test_an_export_comes_from_the_hub(cached, elsewhere, tested, exported, tmp_path, capsys):
    found = BrainDecoder.from_pretrained("lab/subj01").decode(tested.betas, ["g_2"])["g_2"]
    np.testing.assert_array_equal(found, BrainDecoder.from_pretrained(exported).decode(tested.betas)["g_2"])
    assert run(share, elsewhere, "import", "lab/subj01") == 0
    assert (elsewhere.run(RUN_C) / "last.pth").exists()
    file = cached / "features/c.safetensors"
    shutil.copy(file, tmp_path / "outside")
    file.unlink()
    file.symlink_to(tmp_path / "outside")
    capsys.readouterr()
    assert run(share, elsewhere, "import", "lab/subj01") == 2
    refused(capsys, "c.safetensors", "is a link")
    assert run(share, elsewhere, "import", "lab/nothing") == 2
    refused(capsys, "FOLDER lab/nothing", "no such folder")
