"""Maps of the brain: each value against naive loops, autograd, NumPy or scikit-learn; files as nibabel reads them."""

import csv
import importlib.util
import sys
from types import SimpleNamespace

import h5py
import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import r2_score

import map_brain
import utils
from damages import both, renewed, text, volumes, without
from disk.names import Paths
from encoding import maps
from encoding.encoder import load_encoder
from evaluation import brain_maps, brain_pictures
from models import Decoder, RidgeDecoder
from nsd.regions import Space
from nsd.repeats import AveragedRows, TestSet, noise_ceiling
from nsd.rows import open_betas, open_stimuli
from nsd.trials import load_trials, split_trials
from tiny_brain import LABELS, V, write_brain, write_volumes
from training.scoring import open_source
from training.stacking import FeatureOf
from training.trained import Request, open_trained
from whole_world import DATA, assert_refused, mistakes

AFFINE = np.array([[1.8, 0, 0, -20], [0, 1.8, 0, -30], [0, 0, 1.8, -5], [0, 0, 0, 1.0]])
SHAPE = (5, 6, 7)


# --- volumes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["C", "F"])  # how the mask lies in memory must not matter: nibabel's is in F order
def test_a_map_lies_in_c_order_of_its_axes(order):
    inside = np.asarray(np.random.default_rng(0).random(SHAPE) < 0.3, order=order)
    values = np.arange(inside.sum(), dtype=np.float32) + 1
    volume = maps.to_volume(values, inside)
    number = 0
    for x in range(SHAPE[0]):
        for y in range(SHAPE[1]):
            for z in range(SHAPE[2]):  # runs fastest
                if inside[x, y, z]:
                    number += 1
                    assert volume[x, y, z] == number
                else:
                    assert np.isnan(volume[x, y, z])
    in_fortran_order = np.full(SHAPE, np.nan)
    in_fortran_order.T[inside.T] = values
    assert not np.array_equal(volume, in_fortran_order, equal_nan=True)
    np.testing.assert_array_equal(volume[inside], values)
    with pytest.raises(utils.UserError, match="a map of 3 voxels, the volume has"):
        maps.to_volume(np.zeros(3), inside)


# --- encoding -----------------------------------------------------------------------------------------------------


def test_correlation_of_every_voxel_and_of_every_draw():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 30, 4)).astype(np.float32) + 100
    b[:, 0] += a[:, 0]
    b[:, 3] = 5
    found = maps.correlation(a, b)
    np.testing.assert_allclose(found[:3], [np.corrcoef(a[:, v], b[:, v])[0, 1] for v in range(3)], atol=1e-5)
    assert found[3] == 0
    index = rng.integers(30, size=(2, 30))
    draws = np.stack([np.bincount(row, minlength=30) for row in index])
    found = maps.correlation(a, b, draws)
    for row, chosen in zip(found, index, strict=True):
        wanted = [np.corrcoef(a[chosen, v], b[chosen, v])[0, 1] for v in range(3)]
        np.testing.assert_allclose(row[:3], wanted, atol=1e-5)


def test_ceilings_of_draws_are_those_of_the_trials_that_were_drawn(paths):
    betas = open_betas(paths, "subj01")
    trials = load_trials(paths, "subj01", "train").iloc[1:]  # one image has two trials, the others three
    seen = AveragedRows(betas, trials)
    n = len(seen.image_ids)
    tested = np.array([3, 3, 2])
    one = maps.ceiling_draws(seen, tested, np.ones((1, n)), images_at_once=3)
    np.testing.assert_allclose(one[0], noise_ceiling(seen, tested), atol=1e-5)
    assert one.std() > 0.05
    draw = np.bincount(np.random.default_rng(1).integers(n, size=n), minlength=n)
    again = [rows.assign(image_id=1000 * copy + image) for image, times in zip(seen.image_ids, draw, strict=True)
             for copy in range(times) for rows in [trials[trials["image_id"] == image]]]
    drawn = AveragedRows(betas, pd.concat(again))
    np.testing.assert_allclose(maps.ceiling_draws(seen, tested, draw[None])[0], noise_ceiling(drawn, tested), atol=1e-5)
    assert maps.ceiling_draws(AveragedRows(betas, trials.drop_duplicates("image_id")), tested, np.ones((1, n))) is None


def test_a_share_of_no_ceiling_is_empty():
    found = maps.share_of_ceiling(np.array([0.2, 0.3, 0.0]), np.array([0.4, 0.05, 0.5]))
    assert found[0] == 0.5 and np.isnan(found[1]) and found[2] == 0


# --- decoders -----------------------------------------------------------------------------------------------------


def feature_of(kind, weight=1.0, n_voxels=6, k=5):
    """A decoder of random weights, a ridge, or both averaged."""
    torch.manual_seed(0)
    components = SimpleNamespace(feat="c", total=4.0, mean=np.zeros(9, np.float32), shape=(9,),
                                 basis=np.zeros((k, 9), np.float32))
    network, ridge = Decoder({"s": n_voxels}, 7, {"c": k}, n_blocks=1), RidgeDecoder({"s": n_voxels}, {"c": k})
    torch.nn.init.normal_(network.heads["c"].weight)
    model = FeatureOf(ridge if kind == "ridge" else network.eval(), components)
    if kind == "stack":
        model.ridge, model.weight = ridge, weight
    return model.eval()


def test_what_components_leave_counts_as_missed():
    model = feature_of("network")
    rng = np.random.default_rng(0)
    responses, true = rng.standard_normal((3, 6)).astype(np.float32), rng.standard_normal((9, 5)).astype(np.float32)
    model.components.coefficients, model.components.beyond = true, {5: 1.5}.get
    source = SimpleNamespace(model=model, trained=SimpleNamespace(device="cpu", whose="s"))
    found = maps.unexplained(source, TestSet(np.array([2, 7, 8]), responses, np.ones(3)))
    rows = model.coefficients({"s": torch.from_numpy(responses)})[0].detach().numpy()
    for i, image_id in enumerate((2, 7, 8)):
        assert found[i] == pytest.approx((sum((rows[i] - true[image_id]) ** 2) + 1.5) / 4, rel=1e-5)


@pytest.mark.parametrize(("kind", "weight"), [("network", 1.0), ("ridge", 1.0), ("stack", 0.3)])
def test_what_is_read_is_the_derivative_of_the_prediction(kind, weight):
    model = feature_of(kind, weight)
    rng = np.random.default_rng(0)
    responses, spread = rng.standard_normal((20, 6)).astype(np.float32), rng.random(6)
    found = maps.reads(model, "s", responses, spread, images_at_once=7)
    squared = np.zeros(6)
    for row in torch.from_numpy(responses):
        slope = torch.autograd.functional.jacobian(lambda x: model.coefficients({"s": x[None]})[0][0], row)  # (K, V)
        slope = slope / 2  # in standard deviations of the feature, the square root of its variance
        squared += slope.square().sum(0).numpy() / 20
    np.testing.assert_allclose(found, np.sqrt(squared) * spread, rtol=1e-4)


def test_the_pull_of_a_voxel_is_the_length_of_its_terms_gradient():
    """Of a small network, by autograd, voxel by voxel."""
    torch.manual_seed(1)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3 * 4 * 4, 3)

        def forward(self, images, subj):
            return torch.tanh(self.linear(images.flatten(1)))

    net, rng = Net(), np.random.default_rng(0)
    pictures = rng.integers(0, 256, (4, 4, 4, 3), dtype=np.uint8)
    measured, errors = rng.standard_normal((4, 3)).astype(np.float32), np.array([0.5, 1.0, 2.0])
    found = maps.pulls(SimpleNamespace(model=net, subj="s"), pictures, measured, errors, directions=5000, at_once=999)
    squared = np.zeros(3)
    for picture, response in zip(pictures, measured, strict=True):
        for v in range(3):
            image = torch.from_numpy(picture).permute(2, 0, 1)[None].float().div(255).requires_grad_()
            term = (net(image, "s")[0, v] - float(response[v])) ** 2 / 2 / errors[v]
            term.backward()
            squared[v] += image.grad.square().sum().item() / 4
    np.testing.assert_allclose(found, np.sqrt(squared), rtol=0.05)


# --- a whole map --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def brain(tmp_path_factory):
    """A brain of which GNet predicts V1 well and the rest badly, its volumes, and its maps."""
    paths = write_brain(tmp_path_factory.mktemp("brain"))
    write_volumes(paths, "subj01", LABELS, SHAPE, AFFINE)
    rng = np.random.default_rng(5)
    with h5py.File(paths.betas("subj01"), "r+") as file:
        betas = file["betas"][()]
        betas[:, 25:] += 6 * rng.standard_normal(betas[:, 25:].shape)  # all but V1
        file["betas"][...] = betas
    assert run(paths, "--feats", "none") == 0
    return paths


def run(paths, *flags):
    words = ["--root", paths.root, "--data_path", paths.data_path, "--device", "cpu", "--num_sessions", 3,
             "--hidden_dim", 8, *flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(brain_maps, "DRAWS", 50)
        patch.setattr(maps, "PULLED", 4)
        return utils.run_cli(map_brain.main, list(map(str, words)))


def test_the_best_predicted_voxels_lie_where_v1_is(brain):
    """In the volume's own labels, by nibabel alone; put there in Fortran's order they would not."""
    image = nibabel.load(brain.maps("subj01") / "encoding_r.nii.gz")
    labels = nibabel.load(brain.rois("subj01") / "prf-visualrois.nii.gz").get_fdata()
    general = nibabel.load(brain.rois("subj01") / "nsdgeneral.nii.gz")
    assert image.shape == general.shape == SHAPE and image.get_data_dtype() == np.float32
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-6)
    assert image.header.get_xyzt_units()[0] == "mm"
    r, inside = image.get_fdata(), general.get_fdata() == 1
    np.testing.assert_array_equal(np.isfinite(r), inside)
    v1, others = np.isin(labels, (1, 2)), inside & ~np.isin(labels, (1, 2))
    assert r[v1].mean() > r[others].mean() + 0.2
    wrong = np.full(SHAPE, np.nan)
    wrong.T[inside.T] = r[inside]
    assert abs(wrong[v1].mean() - wrong[others].mean()) < 0.15 < r[v1].mean() - r[others].mean()


def test_tables_say_what_the_volumes_say(brain):
    files, lines, config = brain_maps.maps_of(brain, "subj01")
    assert config["made_from"]["gnet"]["run"] == "gnet_subj01" and "git_commit" in config
    found = {(line.region, line.map): line for line in lines}
    inside = nibabel.load(brain.rois("subj01") / "nsdgeneral.nii.gz").get_fdata() == 1
    for name in ("encoding_r", "noise_ceiling", "pull"):
        values = nibabel.load(brain.maps("subj01") / f"{name}.nii.gz").get_fdata()[inside]
        line, middle = found["V2", name], np.median if name == "pull" else np.mean
        assert line.voxels == 22 and line.value == pytest.approx(middle(values[25:47]), abs=1e-6)
        assert line.low <= line.value <= line.high
        assert found["nsd_general", name].value == pytest.approx(middle(values), abs=1e-6)
    assert found["V1", "encoding_r"].interval == "95 %, images"
    assert found["V1", "pull"].interval == "quartiles of voxels"
    share = found["V1", "share_of_ceiling"].value
    assert share == pytest.approx(found["V1", "encoding_r"].value / found["V1", "noise_ceiling"].value)
    with open(brain.maps("subj01") / "voxels.csv") as file:
        rows = list(csv.DictReader(file))
    places = np.argwhere(inside)
    assert [[int(row[axis]) for axis in "ijk"] for row in rows] == places.tolist() and len(rows) == V
    at = nibabel.affines.apply_affine(AFFINE, places[7])
    assert [float(rows[7][axis]) for axis in "xyz"] == pytest.approx(at.tolist(), abs=1e-3)
    assert [row["region"] for row in rows] == ["V1"] * 25 + ["V2"] * 22 + ["V3"] * 3 + [""] * 10
    pictures = {"slices_encoding", "glass_encoding", "slices_pull", "glass_pull"}
    assert set(files) == (pictures if importlib.util.find_spec("nilearn") else set())
    assert brain_maps.maps_of(brain, "subj02") == ({}, [], {})


def test_a_picture_is_pulled_towards_the_response_to_another_image(brain, monkeypatch):
    """And a voxel that may not guide does not pull."""
    given = []
    monkeypatch.setattr(brain_maps, "DRAWS", 2)
    monkeypatch.setattr(brain_maps, "pulls", lambda *args: given.extend(args) or np.ones(V))
    encoder = load_encoder(brain, "subj01", None, 42, torch.device("cpu"))
    masks = {"V1": np.arange(V) < 25, "nsd_general": np.ones(V, bool)}
    found, _ = brain_maps.encoding_maps(brain, encoder._replace(val_r=np.where(np.arange(V) < 5, 0.05, 0.5)), masks)
    assert found["pull"].tolist() == [0] * 5 + [1] * (V - 5)
    _, pictures, measured, errors, _ = given
    trials = split_trials(brain, "subj01", *encoder.held_out)[1]
    ids, stimuli, betas = np.unique(trials["image_id"]), open_stimuli(brain), open_betas(brain, "subj01")
    responses = [betas[rows["row"].to_numpy()].mean(0) for _, rows in trials.groupby("image_id")]
    np.testing.assert_array_equal(pictures, [stimuli[[image_id]][0] for image_id in ids])
    for i, row in enumerate(measured):
        assert not np.allclose(row, responses[i]) and any(np.allclose(row, other, atol=1e-5) for other in responses)
    missed = encoder.predict(pictures) - responses  # of true pictures
    np.testing.assert_allclose(errors, np.square(missed).mean(0), rtol=1e-4)


def test_what_is_missing_is_left_out_in_a_line_each(brain, tmp_path, monkeypatch, capsys):
    """Without nilearn the pictures, without a training its maps; volumes are those that were written before."""
    monkeypatch.setitem(sys.modules, "nilearn", None)
    assert run(brain, "--outdir", tmp_path / "maps") == 0
    printed = capsys.readouterr()
    assert "left out: reads_c, costs_c: pretrained_subj01_3sess_ext1_c_8_mlp was not trained" in printed.out
    assert "STAGES=\"pretrain finetune\" FEATS=z bash scripts/train.sh" in printed.out
    (line,) = [line for line in printed.out.splitlines() if line.startswith("left out: pictures")]
    assert "bash scripts/setup.sh requirements-maps.txt" in line and not printed.err
    assert (tmp_path / "maps/encoding_r.nii.gz").read_bytes() == (
        brain.maps("subj01") / "encoding_r.nii.gz").read_bytes()
    assert not list((tmp_path / "maps").glob("*.png"))


# --- what regions contribute --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    """A brain with a decoder of c and of whole rows of c."""
    import train_c
    from tiny_runs import flags_of, write_world

    paths = write_world(tmp_path_factory.mktemp("decoders"))
    write_volumes(paths, "subj01", [1, 2, 3, 3, 0, 0, 0], SHAPE)
    for words in (["--model", "components"], ["--model", "ridge"], ["--tag", "rows"]):
        assert utils.run_cli(train_c.main, flags_of(paths, "--num_epochs", 3, "--max_lr", 1e-2, *words)) == 0
    return paths


@pytest.mark.parametrize("words", [[], ["--run", "ridge"], ["--tag", "rows"]])
def test_what_a_region_costs_is_r2_by_scikit_learn(decoders, words, monkeypatch):
    args = map_brain.get_parser().parse_args(["--root", str(decoders.root), "--device", "cpu", "--hidden_dim", "8",
                                              "--num_sessions", "3", "--run", "scratch", *words])
    request = Request.from_args(args, overwrite=True)
    source = open_source(open_trained(request, "c"), "c")
    masks = {"V1": np.arange(7) < 2, "V2": np.arange(7) // 2 == 1, "nsd_general": np.ones(7, bool)}
    trained = source.trained
    val, kept = trained.validation, np.arange(7) >= 2
    seen = AveragedRows(open_betas(decoders, "subj01"), split_trials(decoders, "subj01", *trained.held_out)[0])
    rows = np.array([seen[np.array([i])][0] for i in range(len(seen.image_ids))])
    mean, spread = rows.mean(0), rows.std(0)
    found, lines = brain_maps.decoder_maps(source, masks, mean, spread)
    lesioned = np.array([[x if keep else m for x, keep, m in zip(row, kept, mean, strict=True)] for row in val.betas])
    errors = []
    for responses in (val.betas, lesioned.astype(np.float32)):
        with torch.no_grad():
            rows = source.model.predict({trained.whose: torch.from_numpy(responses)}, 1, None)["nsdgeneral"].numpy()
        with h5py.File(decoders.feature("c")) as file:
            true = np.stack([file["data"][i] for i in val.image_ids]).astype(np.float64)
        errors.append(r2_score(true, rows.reshape(true.shape), multioutput="variance_weighted"))
    of_images = np.square(true - true.mean(0)).sum(1).mean()
    total = source.model.components.total if isinstance(source.model, FeatureOf) else of_images
    line = {(line.region, line.map): line for line in lines}["V1", "costs_c"]
    # scikit-learn's variance is that of these images; ours that of the images that the components were fitted on
    assert line.value == pytest.approx((errors[0] - errors[1]) * of_images / total, abs=1e-3)
    assert abs(line.value) > 1e-3 and line.low <= line.value <= line.high and line.voxels == 2
    np.testing.assert_allclose(found["costs_c"][:2], line.value)
    assert np.isnan(found["costs_c"][4:]).all() and np.isfinite(found["reads_c"]).all()
    (whole,) = (line.value for line in lines if line[0::2][:2] == ("nsd_general", "only_c"))
    assert whole == pytest.approx(source.config["r2"]["scored"], abs=1e-4)


# --- surface ------------------------------------------------------------------------------------------------------


def write_transforms(paths, places, nearest):
    folder = paths.transforms("subj01")
    folder.mkdir(parents=True, exist_ok=True)
    for side in ("lh", "rh"):
        for name, array in ((f"{side}.func1pt8-to-layerB2", places.reshape(-1, 1, 1, places.shape[-1])),
                            (f"{side}.white-to-fsaverage", nearest.reshape(-1, 1, 1))):
            nibabel.save(nibabel.MGHImage(array.astype(np.float32), np.eye(4)), folder / f"{name}.mgz")


def test_the_surface_shows_the_nearest_voxel(tmp_path):
    """As a loop over vertices finds it; the files count from 1, and 9999 is nowhere."""
    paths, rng = Paths(tmp_path, tmp_path), np.random.default_rng(0)
    assert brain_pictures.read_transforms(paths, "subj01", SHAPE)[0] is None
    volume = rng.random(SHAPE).astype(np.float32)
    places = rng.uniform(0.6, np.array(SHAPE) + 0.4, (300, 3))
    places[:9] = 9999
    places[9:20] += SHAPE  # outside of the volume
    nearest = rng.integers(1, 301, 10242 + 50)
    write_transforms(paths, places, nearest)
    found, why = brain_pictures.read_transforms(paths, "subj01", SHAPE)
    assert why is None and set(found) == {"lh", "rh"}
    values = brain_pictures.on_fsaverage5(volume, *found["lh"])
    assert values.shape == (10242,)
    for vertex in range(0, 10242, 7):
        x, y, z = (round(float(np.float32(at))) - 1 for at in places[nearest[vertex] - 1])
        inside = 0 <= x < SHAPE[0] and 0 <= y < SHAPE[1] and 0 <= z < SHAPE[2]
        assert values[vertex] == volume[x, y, z] if inside else np.isnan(values[vertex]), vertex
    write_transforms(paths, places, nearest + 300)
    with pytest.raises(utils.UserError, match="lh has places of .300, 3. and"):
        brain_pictures.read_transforms(paths, "subj01", SHAPE)


def test_pictures_are_drawn_of_what_there_is(tmp_path):
    """A bright spot of a dark map is seen at its side of the slices, and the surface where there are transforms."""
    pytest.importorskip("nilearn")
    from PIL import Image

    inside = np.zeros((12, 14, 10), bool)
    inside[2:10, 2:8, 4:7] = True
    space = Space(inside, inside, np.diag([4.0, 4, 4, 1]) + [[0, 0, 0, -22], [0, 0, 0, -60], [0, 0, 0, -18], [0] * 4])
    volume = np.zeros(inside.shape)
    volume[8:10] = 1  # right: x grows to the right
    paths, rng = Paths(tmp_path, tmp_path), np.random.default_rng(0)
    write_transforms(paths, rng.uniform(3, 8, (300, 3)), rng.integers(1, 301, 10242))
    found = {"encoding_r": volume[inside]}
    assert brain_pictures.draw(tmp_path, found, space, paths, "subj01") == []
    assert {file.name for file in tmp_path.glob("*.png")} == {
        "slices_encoding.png", "glass_encoding.png", "surface_encoding.png"}
    picture = np.asarray(Image.open(tmp_path / "slices_encoding.png").convert("RGB")).astype(int)
    bright = (picture[..., 0] > 240) & (picture[..., 1] > 240) & (picture[..., 2] < 200)  # inferno's last colour
    dark = picture.sum(2) < 60
    height = picture.shape[0]
    columns = slice(int(0.12 * picture.shape[1]), int(0.9 * picture.shape[1]))  # without names and colour bar
    rows = slice(int(0.3 * height), int(0.8 * height))
    spots = bright[rows, columns].any(0).nonzero()[0]
    assert spots.size and dark[rows, columns].any()
    first = spots[:np.flatnonzero(np.diff(spots) > 1)[0] + 1] if (np.diff(spots) > 1).any() else spots
    left = dark[rows, columns].any(0).nonzero()[0].min()
    assert first.mean() > left + 2 * len(first)  # the bright quarter is the right end of its slice


# --- bad input ----------------------------------------------------------------------------------------------------


ROI = "nsddata/ppdata/subj01/func1pt8mm/roi"


def another_affine(world):
    file = world.root / ROI / "prf-visualrois.nii.gz"
    image = nibabel.load(file)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), np.diag([2.0, 2, 2, 1])), file)


def another_shape(world):
    file = world.root / ROI / "prf-visualrois.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.eye(4)), file)


def short_mask(world):
    with h5py.File(renewed(world.root / DATA / "brain_region_masks.hdf5"), "r+") as file:
        mask = file["subj01/V1"][()]
        del file["subj01/V1"]
        file["subj01/V1"] = mask[:-1]


CASES = [
    (map_brain, "no volume", lambda world: None, [], ("nsdgeneral.nii.gz", "ROI volume not found", "download")),
    (map_brain, "a damaged volume", both(volumes(), text(f"{ROI}/nsdgeneral.nii.gz", "no volume")), [],
     ("nsdgeneral.nii.gz", "not a readable NIfTI", "download it again")),
    (map_brain, "a volume of other voxels", volumes(LABELS[:-1]), [], ("59 voxels", f"the betas of subj01 have {V}")),
    (map_brain, "volumes of two affines", both(volumes(), another_affine), [], ("different affines", "wanted the")),
    (map_brain, "volumes of two shapes", both(volumes(), another_shape), [], ("prf-visualrois of (2, 2, 2)", "same")),
    (map_brain, "masks of another shape", both(volumes(), short_mask), [],
     ("mask V1 of subj01 has shape (59,)", f"its betas {V} voxels")),
    (map_brain, "volumes in another order", volumes(transposed=True), [], ("V1 of subj01 has 25 voxels", "of which")),
    (map_brain, "components gone", both(volumes(), without("nsddata_stimuli/stimuli/nsd/c_all.hdf5")), [],
     ("c_all.hdf5", "not found")),
]


@mistakes(CASES)
def test_a_mistake_gives_one_line_and_changes_nothing(case, whole_world, monkeypatch, capsys):
    assert_refused(case, whole_world, monkeypatch, capsys)
