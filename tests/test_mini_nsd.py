"""mini-NSD: NSD's formats, ids that agree across files, determinism, and noise ceilings as wanted."""

import copy
import csv
import hashlib
import io
import itertools
import json
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import h5py
import nibabel
import numpy as np
import pytest
from scipy.io import loadmat

import make_mini_nsd
import scenes
import train_tiny_models
from disk.names import Paths
from make_mini_nsd import EXPLAINABLE, N_SUBJECTS, ROI_SHARES, WORLDS, subject_name
from nsd.repeats import load_test_set
from nsd.synthetic import SyntheticStimuli
from scenes import ATTRIBUTES, COLOURS, KINDS, PATTERNS, SIZES, captions, describe, render, sample_scene, vocabulary

WORLD = WORLDS["small"]
DATA, EXPERIMENT, STIMULI = "MindEyeV2/mindeyev2", "nsddata/experiments/nsd", "nsddata_stimuli/stimuli/nsd"


@pytest.fixture
def root(small_nsd):
    return small_nsd.root


def read_hdf5(path, key):
    with h5py.File(path) as file:
        return file[key][:]


def read_tar(path):
    """{sample key: {member: array}}."""
    samples = {}
    with tarfile.open(path) as shard:
        for info in shard:
            key, member, extension = info.name.split(".")
            assert extension == "npy" and info.mtime == 0
            array = np.load(io.BytesIO(shard.extractfile(info).read()))
            samples.setdefault(key, {})[member] = array
    return samples


def tables(root, s):
    """(train, test) behaviour of a subject, (trials, 17) each."""
    folder = root / DATA / "wds" / subject_name(s)
    shards = [folder / f"train/{i}.tar" for i in range(WORLD.sessions[s])]
    assert len(list((folder / "train").iterdir())) == len(shards)
    stacked = [np.concatenate([sample["behav"] for path in paths for sample in read_tar(path).values()])
               for paths in (shards, [folder / "new_test/0.tar"])]
    return stacked[0], stacked[1]


def digests(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def test_full_world_is_a_tenth_of_nsd():
    full = WORLDS["full"]
    assert full.n_images == 7300 and full.n_shared == 100 and full.session_trials == 75
    assert full.n_voxels == [1572, 1427, 1522, 1315, 1303, 1790, 1268, 1438]
    design = make_mini_nsd.make_design(full, np.random.default_rng(0))
    distinct = [len(np.unique(design.trial_images(s))) for s in range(N_SUBJECTS)]
    assert np.allclose(distinct, [1000, 1000, 941, 921, 1000, 941, 1000, 921], atol=15)  # NSD's, a tenth


@pytest.mark.parametrize("s", range(N_SUBJECTS))
def test_betas_are_contiguous_and_zscored_per_session(root, s):
    path = root / DATA / f"betas_all_{subject_name(s)}_fp32_renorm.hdf5"
    n_trials = WORLD.sessions[s] * WORLD.session_trials
    with h5py.File(path) as file:
        betas = file["betas"]
        assert betas.dtype == np.float32 and betas.shape == (n_trials, WORLD.n_voxels[s])
        assert betas.chunks is None and betas.compression is None
        assert betas.id.get_offset() + betas.size * 4 <= path.stat().st_size
        sessions = betas[:].reshape(WORLD.sessions[s], WORLD.session_trials, -1)
    assert np.allclose(sessions.mean(1), 0, atol=1e-5) and np.allclose(sessions.std(1), 1, atol=1e-5)


def test_masks_are_disjoint_and_cover_everything(root):
    for s, n in enumerate(WORLD.n_voxels):
        masks = {name: read_hdf5(root / DATA / "brain_region_masks.hdf5", f"{subject_name(s)}/{name}")
                 for name in ("nsd_general", *ROI_SHARES)}
        assert all(mask.dtype == bool and mask.shape == (n,) and mask.any() for mask in masks.values())
        assert masks.pop("nsd_general").all()
        assert (sum(mask.astype(int) for mask in masks.values()) == 1).all()


def test_tars_have_the_fields_of_nsd(root):
    samples = read_tar(root / DATA / "wds/subj01/train/0.tar")
    shapes = {"behav": (1, 17), "past_behav": (15, 17), "future_behav": (15, 17), "olds_behav": (3, 17)}
    for key, sample in samples.items():
        assert len(key) == len("sample") + 9 and key.startswith("sample")
        assert {name: array.shape for name, array in sample.items()} == shapes
        assert all(array.dtype == np.float64 for array in sample.values())
    everything, test = (np.concatenate(tables(root, 0)), tables(root, 0)[1])
    by_row = everything[np.argsort(everything[:, 5])]
    assert len(test) == 3 * WORLD.n_shared
    for sample in samples.values():
        row = int(sample["behav"][0, 5])
        olds = [line for line in by_row[:row] if line[0] == sample["behav"][0, 0]]
        assert np.array_equal(sample["olds_behav"][: len(olds)], np.reshape(olds, (-1, 17)))
        assert (sample["olds_behav"][len(olds) :] == -1).all() and sample["behav"][0, 7] == bool(olds)
        for k in range(15):
            past = by_row[row - 1 - k] if row - 1 - k >= 0 else -1
            assert (sample["past_behav"][k] == past).all()
            assert (sample["future_behav"][k] == by_row[row + 1 + k]).all()


def test_the_shards_can_be_read_with_webdataset(root):
    webdataset = pytest.importorskip("webdataset")
    path = root / DATA / "wds/subj02/new_test/0.tar"
    dataset = webdataset.WebDataset(str(path), shardshuffle=False).decode().to_tuple("behav.npy")
    rows = [int(behav[0, 5]) for (behav,) in dataset]
    assert rows == sorted(rows) and len(rows) == 3 * WORLD.n_shared


def test_ids_agree_across_all_files(root):
    """0-based in csv, index file and tars; 1-based in the .mat and in the csv's repeat columns."""
    mat = loadmat(root / EXPERIMENT / "nsd_expdesign.mat")
    ordering, subjectim = mat["masterordering"], mat["subjectim"]
    n_images = WORLD.n_shared + WORLD.n_own
    assert ordering.shape == (1, 3 * n_images) and subjectim.shape == (N_SUBJECTS, n_images)
    assert (np.bincount(ordering[0])[1:] == 3).all() and ordering.min() == 1
    assert np.array_equal(np.unique(subjectim), np.arange(1, WORLD.n_images + 1))
    assert mat["stimpattern"].sum() == 3 * n_images
    assert (mat["stimpattern"].sum(axis=(1, 2)) == WORLD.session_trials).all()

    shared = np.load(root / DATA / "shared1000.npy")
    assert shared.dtype == bool and shared.shape == (WORLD.n_images,)
    assert np.array_equal(mat["sharedix"][0] - 1, np.flatnonzero(shared))
    assert all(np.array_equal(row[: WORLD.n_shared], mat["sharedix"][0]) for row in subjectim)
    with open(root / EXPERIMENT / "nsd_stim_info_merged.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [int(line["nsdId"]) for line in table] == [int(line[""]) for line in table] == list(range(WORLD.n_images))
    assert [line["shared1000"] == "True" for line in table] == shared.tolist()

    for s in range(N_SUBJECTS):
        indices = read_hdf5(root / DATA / "COCO_73k_subj_indices.hdf5", subject_name(s))
        n_trials = WORLD.sessions[s] * WORLD.session_trials
        assert indices.shape == (n_trials,)
        assert np.array_equal(indices, [subjectim[s, ordering[0, t] - 1] - 1 for t in range(n_trials)])
        train, test = tables(root, s)
        behav = np.concatenate([train, test])
        row = behav[:, 5].astype(int)
        assert np.array_equal(np.sort(row), np.arange(n_trials))
        assert np.array_equal(behav[:, 0], indices[row])
        assert np.array_equal(row, (behav[:, 2] - 1) * WORLD.session_trials + behav[:, 4])
        assert (behav[:, 1] == s + 1).all() and np.array_equal(behav[:, 16], shared[indices[row]])
        assert (train[:, 16] == 0).all() and (test[:, 16] == 1).all()
        for image_id in (0, int(indices[0]), int(indices[-1])):
            line = table[image_id]
            repeats = sorted(int(line[f"subject{s + 1}_rep{r}"]) for r in range(3))
            shown = [t + 1 for t, k in enumerate(ordering[0]) if subjectim[s, k - 1] == image_id + 1]
            assert repeats == (shown or [0, 0, 0]) and int(line[f"subject{s + 1}"]) == bool(shown)


def test_pictures_captions_and_attributes_belong_together(root):
    images = read_hdf5(root / STIMULI / "nsd_stimuli.hdf5", "imgBrick")
    assert images.shape == (WORLD.n_images, 64, 64, 3) and images.dtype == np.uint8
    rng = np.random.default_rng([0, 0])
    drawn = [sample_scene(rng) for _ in range(WORLD.n_images)]
    captions = json.loads((root / STIMULI / "annotations/nsd_captions.json").read_text())
    attributes = json.loads((root / "demo_attributes.json").read_text())
    with open(root / EXPERIMENT / "nsd_stim_info_merged.csv", newline="") as file:
        coco_ids = {int(line["nsdId"]): line["cocoId"] for line in csv.DictReader(file)}
    for image_id in range(0, WORLD.n_images, 30):
        assert np.array_equal(images[image_id], render(drawn[image_id], 64))
        assert attributes[image_id] == drawn[image_id].attributes and set(attributes[image_id]) == set(ATTRIBUTES)
        texts = captions[coco_ids[image_id]]
        assert len(texts) == 5 and all(attributes[image_id]["kind"] in text for text in texts)
    assert len(captions) == len(attributes) == WORLD.n_images


def test_captions_leave_most_of_the_picture_unsaid():
    """Kind and setting always, the colour in 30 %, the place in 10, half of the second objects, nothing else."""
    rng, said = np.random.default_rng(0), {"colour": [], "place": [], "second": []}
    unsaid = {*SIZES, *PATTERNS, "dusk"}
    for _ in range(600):
        scene = sample_scene(rng)
        for text in captions(scene, rng):
            words = set(text.split())
            assert scene.main.kind in words and any(phrase in text for phrase in scenes.SETTING_PHRASES[scene.setting])
            assert not words & unsaid and words <= set(vocabulary())
            said["colour"].append(scene.main.colour in words)
            said["place"].append(scenes.PLACE_PHRASES[scene.place] in text)
            if scene.second and scene.second.kind != scene.main.kind:
                said["second"].append(scene.second.kind in words)
                assert not words & (set(KINDS) - {scene.main.kind, scene.second.kind})
            if scene.second is None:
                assert not words & (set(COLOURS) - {scene.main.colour})
    assert np.mean(said["colour"]) == pytest.approx(0.3, abs=0.06)
    assert np.mean(said["place"]) == pytest.approx(0.1, abs=0.04)
    assert np.mean(said["second"]) == pytest.approx(0.5, abs=0.08)


def test_a_full_description_names_every_attribute():
    rng = np.random.default_rng(0)
    for _ in range(100):
        scene = sample_scene(rng)
        text = describe(scene, ATTRIBUTES, rng)
        assert " ".join([scene.size, scene.main.pattern, scene.main.colour, scene.main.kind]) in text
        assert scenes.LIGHT_PHRASES[scene.light] in text and scenes.PLACE_PHRASES[scene.place] in text
        assert scene.second is None or text.count(scene.second.kind) >= 1 + (scene.second.kind == scene.main.kind)


def test_what_a_scene_says_is_what_is_drawn():
    """Change one attribute and the picture changes where it should: everywhere with the light, else at the object."""
    rng = np.random.default_rng(3)
    scene = replace(sample_scene(rng), light="day", second=None)
    picture = render(scene).astype(int)
    dusk = render(replace(scene, light="dusk")).astype(int)
    assert dusk.mean() < 0.8 * picture.mean() and (dusk != picture).any(2).mean() > 0.95
    for name, values in (("pattern", PATTERNS), ("colour", COLOURS), ("kind", KINDS)):
        drawn = [render(replace(scene, main=replace(scene.main, **{name: value}))).astype(int) for value in values]
        for a, b in itertools.combinations(drawn, 2):
            changed = (a != b).any(2)
            y, x = np.nonzero(changed)
            assert 0.01 < changed.mean() < 0.4
            assert np.abs(x / 64 - scene.main.x).max() < 0.6 * scene.main.size + 0.03
            assert np.abs(y / 64 - scene.main.y).max() < 0.6 * scene.main.size + 0.03


def test_volumes_hold_the_regions_of_the_masks(root):
    for s, n in enumerate(WORLD.n_voxels):
        folder = root / "nsddata/ppdata" / subject_name(s) / "func1pt8mm/roi"
        general, labels = (np.asarray(nibabel.load(folder / f"{name}.nii.gz").dataobj)
                           for name in ("nsdgeneral", "prf-visualrois"))
        assert general.shape == labels.shape and (general == 1).sum() == n and set(np.unique(general)) == {-1, 0, 1}
        inside = labels[general == 1]
        for name, values in (("V1", (1, 2)), ("V2", (3, 4)), ("V3", (5, 6)), ("V4", (7,)), ("higher_vis", (0,))):
            mask = read_hdf5(root / DATA / "brain_region_masks.hdf5", f"{subject_name(s)}/{name}")
            assert np.array_equal(mask, np.isin(inside, values))


def test_the_synthetic_session_is_in_nsds_formats(root):
    paths = Paths(root, root / DATA)
    design = loadmat(paths.synthetic_design)["masterordering"]
    n = WORLD.n_gratings + WORLD.n_patches
    assert design.shape == (1, 26) and design.min() == 1
    assert np.bincount(design[0])[1:].tolist() == [3] * WORLD.n_gratings + [2] * WORLD.n_patches
    common = read_hdf5(paths.synthetic / "nsdsynthetic_stimuli.hdf5", "imgBrick")
    assert common.shape == (WORLD.n_gratings, 64, 122, 3) and common.dtype == np.uint8
    own = [read_hdf5(paths.synthetic / f"nsdsynthetic_colorstimuli_{subject_name(s)}.hdf5", "imgBrick")
           for s in range(N_SUBJECTS)]
    assert all(stimuli.shape == (WORLD.n_patches, 64, 122, 3) for stimuli in own) and not np.array_equal(*own[:2])
    assert not np.array_equal(design[0], np.sort(design[0]))
    stimuli = SyntheticStimuli(paths, "subj01")
    gratings = stimuli[np.arange(WORLD.n_gratings)]
    assert (np.abs(gratings[:, 0, 0].astype(int) - 128) < 2).all()  # gray where nothing is, on a usual display
    patch = stimuli[[WORLD.n_gratings]][0].astype(int)
    assert (np.abs(patch - COLOURS["red"]).max(axis=2) < 4).mean() > 0.05
    for s, n_voxels in enumerate(WORLD.n_voxels):
        file = paths.synthetic_betas(subject_name(s)) / "betas_nsdsynthetic.hdf5"
        volumes = read_hdf5(file, "betas")
        assert volumes.shape == (26, 34, 46, 36) and volumes.dtype == np.int16
        assert np.count_nonzero(volumes.std(axis=0)) == n_voxels
    test = load_test_set(paths, "subj08", split="synthetic")
    assert test.betas.shape == (n, WORLD.n_voxels[7]) and np.isfinite(test.betas).all()


def test_the_same_voxels_see_the_synthetic_stimuli():
    """What replays the random numbers and the scale of a simulation gives the responses that were simulated."""
    rng, images = np.random.default_rng(0), np.random.default_rng(1)
    with ThreadPoolExecutor() as pool:
        scenes_, _, pictures = make_mini_nsd.draw_images(12, images, pool)
    early, colour = make_mini_nsd.low_level(pictures)
    features = make_mini_nsd.image_features(early, colour, colour.std(axis=(0, 1)), scenes_)
    rois, scale = make_mini_nsd.draw_cortex(60, rng).masks, make_mini_nsd.Scale()
    same = copy.deepcopy(rng)
    first = make_mini_nsd.noiseless_responses(features, rois, rng, scale)
    some = {name: array[[5, 2]] for name, array in features.items()}
    again = make_mini_nsd.noiseless_responses(some, rois, same, scale.replay())
    np.testing.assert_allclose(again, first[[5, 2]], atol=2e-6)
    explained = (make_mini_nsd.explainable_variance(rois, generator) for generator in (rng, same))
    np.testing.assert_array_equal(*explained)


def test_a_world_from_before_the_synthetic_session_gets_it(root, tmp_path):
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "nsddata_betas")
    shutil.rmtree(tmp_path / "nsddata/experiments/nsdsynthetic")
    make_mini_nsd.main(["--root", str(tmp_path), "--size", "small"])
    assert digests(tmp_path) == digests(root)


def test_another_seed_gives_another_world(root, tmp_path):
    make_mini_nsd.main(["--root", str(tmp_path), "--size", "small", "--seed", "1"])
    assert digests(tmp_path)[f"{STIMULI}/nsd_stimuli.hdf5"] != digests(root)[f"{STIMULI}/nsd_stimuli.hdf5"]


def test_a_world_that_is_there_is_kept_and_the_same_seed_gives_the_same_bytes(root, tmp_path, capsys):
    arguments = ["--root", str(tmp_path), "--size", "small"]
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    attributes = tmp_path / "demo_attributes.json"
    attributes.write_text("touched")
    make_mini_nsd.main(arguments)
    assert attributes.read_text() == "touched" and "already here" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        make_mini_nsd.main([*arguments, "--seed", "5"])
    assert stop.value.code == 2 and "--overwrite" in capsys.readouterr().err
    make_mini_nsd.main([*arguments, "--overwrite"])
    assert digests(tmp_path) == digests(root)


def test_noise_ceiling_equals_a_naive_loop():
    rng = np.random.default_rng(0)
    image_ids = rng.permutation(np.repeat(np.arange(20), rng.integers(1, 4, 20)))
    betas = rng.standard_normal((len(image_ids), 3)).astype(np.float32) + image_ids[:, None] / 10
    for v, found in enumerate(make_mini_nsd.noise_ceiling(betas, image_ids)):
        groups = [betas[image_ids == i, v].astype(float) for i in range(20)]
        squares = sum(((group - group.mean()) ** 2).sum() for group in groups)
        noise = squares / sum(len(group) - 1 for group in groups)
        assert found == pytest.approx(1 - noise / betas[:, v].astype(float).var(), abs=1e-6)


def test_betas_explain_as_much_as_nsds():
    """Enough trials that the estimate is sharp: the wanted mean per region, and a wide spread over its voxels."""
    rng = np.random.default_rng(0)
    n_images, n_voxels = 1000, 900
    image_ids = rng.permutation(np.repeat(np.arange(n_images), 3))
    rois = make_mini_nsd.draw_cortex(n_voxels, rng).masks
    explained = make_mini_nsd.explainable_variance(rois, rng)
    signal = rng.standard_normal((n_images, n_voxels))[image_ids]
    found = make_mini_nsd.noise_ceiling(make_mini_nsd.add_noise(signal, explained, 75, rng), image_ids)
    assert np.corrcoef(found, explained)[0, 1] > 0.97
    for roi, wanted in EXPLAINABLE.items():
        assert found[rois[roi]].mean() == pytest.approx(wanted, abs=0.015)
        assert np.percentile(found[rois[roi]], 10) < 0.04 and found[rois[roi]].max() > 0.35


def test_small_worlds_ceilings_are_near(root):
    found = {roi: [] for roi in EXPLAINABLE}
    for s in range(N_SUBJECTS):
        betas = read_hdf5(root / DATA / f"betas_all_{subject_name(s)}_fp32_renorm.hdf5", "betas")
        ids = read_hdf5(root / DATA / "COCO_73k_subj_indices.hdf5", subject_name(s))
        explained = make_mini_nsd.noise_ceiling(betas, ids)
        for roi in found:
            found[roi].append(explained[read_hdf5(root / DATA / "brain_region_masks.hdf5", f"{subject_name(s)}/{roi}")])
    for roi, wanted in EXPLAINABLE.items():
        assert np.concatenate(found[roi]).mean() == pytest.approx(wanted, abs=0.05)


def test_energy_finds_orientation_and_wavelength():
    x, y = np.meshgrid(np.arange(64), np.arange(64))
    for k in range(make_mini_nsd.N_ORIENTATIONS):
        angle = k * np.pi / make_mini_nsd.N_ORIENTATIONS
        for w, wavelength in enumerate(make_mini_nsd.WAVELENGTHS):
            for phase in (0, 1):
                grating = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / wavelength + phase)
                energy = make_mini_nsd.oriented_energy(grating[None].astype(np.float32))[0, 8:24, 8:24].mean((0, 1))
                assert np.unravel_index(energy.argmax(), energy.shape) == (w, k)


def test_ridge_reads_a_world(root):
    accuracies = make_mini_nsd.ridge_accuracies(root)
    assert set(accuracies) == set(ATTRIBUTES)
    assert accuracies["setting"] > 1.5 / len(ATTRIBUTES["setting"])  # 78 voxels, 25 images: above chance


def test_hard_negatives_differ_in_one_attribute(tmp_path):
    args = SimpleNamespace(workdir=tmp_path)
    groups, pictures = train_tiny_models.draw_groups(args, 160, seed=5)
    assert pictures.shape == (160, 64, 64, 3)
    seen = set()
    for start in range(0, 160, 4):
        facts = [scene.attributes for scene in groups[start:start + 4]]
        differ = {name for name in ATTRIBUTES if len({fact[name] for fact in facts}) > 1}
        assert len(differ) <= 1  # none, where all drew the same
        assert differ != {"second"} or all(fact["second"] in KINDS for fact in facts)
        seen |= differ
    assert {"pattern", "second"} < seen


def test_the_clip_goes_on_and_the_unet_keeps_its_text_tower(tmp_path):
    for name in ("clip", "sd"):
        shutil.copytree(train_tiny_models.HERE / "models" / name, tmp_path / "models" / name)
    files = [tmp_path / "models" / name / "model.safetensors" for name in ("clip", "sd/text_encoder")]
    before = [file.read_bytes() for file in files]
    flags = ["--workdir", str(tmp_path / "work"), "--outdir", str(tmp_path / "models"), "--threads", "1"]
    (tmp_path / "work").mkdir()
    kept = SimpleNamespace(workdir=tmp_path / "work", outdir=tmp_path / "models")
    tower = train_tiny_models.text_tower(kept)[0].state_dict()
    train_tiny_models.main(["--stage", "details", "--steps", "1", "--n_scenes", "256", *flags])
    clip, text = (file.read_bytes() for file in files)
    assert clip != before[0] and text == before[1]
    again = train_tiny_models.text_tower(kept)[0].state_dict()
    assert all(again[name].equal(weights) for name, weights in tower.items())
    scene = sample_scene(np.random.default_rng(0), second_probability=1)
    told = train_tiny_models.told_by_clip(tmp_path / "models/clip", [scene], [render(scene)])
    assert told.keys() == ATTRIBUTES.keys() and set(told.values()) <= {0.0, 1.0} and told["setting"] == 1
