"""What every test shares: MKL adds up as recon.py lets it, and Ctrl-C ends what runs, here and in every process that a
test starts.

MKL reads the setting once. Without this, whether a process has it would depend on which test came first, and processes
that are compared to the bit would differ. A shell lets what it starts in the background ignore Ctrl-C, and tests that
press it would wait for ever.
"""

import multiprocessing
import shutil
import signal

import pytest

import shared
import utils
from disk.names import Paths
from shared import built_once

utils.reproducible_products()
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def one_launch():
    """The test launches processes: while it does, no other test may."""
    with shared.one_launch_at_a_time():
        yield


@pytest.fixture(scope="session")
def pristine_nsd(tmp_path_factory):
    """(Paths, {subject: image id of every trial}) of a tiny NSD (tiny_nsd), from which tests take copies."""
    import tiny_nsd

    return tiny_nsd.write_tiny_nsd(tmp_path_factory.mktemp("tiny_nsd"))


@pytest.fixture
def nsd(pristine_nsd, tmp_path):
    """A tiny NSD of the test's own in tmp_path, to be changed: (Paths, {subject: image id of every trial})."""
    pristine, shown = pristine_nsd
    shutil.copytree(pristine.root, tmp_path, dirs_exist_ok=True)
    return Paths(tmp_path, tmp_path / "MindEyeV2/mindeyev2"), {subj: ids.copy() for subj, ids in shown.items()}


@pytest.fixture
def paths(nsd):
    """The Paths of `nsd`."""
    return nsd[0]


@pytest.fixture(scope="session")
def pristine_world(tmp_path_factory):
    """Paths of a tiny NSD with features and components (tiny_runs), from which tests of trainings take copies."""
    import tiny_runs

    return tiny_runs.write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def small_nsd(tmp_path_factory):
    """Paths of the demo's small world, written once, to be read only; stages keep notes beside the data: copy it."""
    import make_mini_nsd

    def build(folder):
        make_mini_nsd.main(["--root", str(folder), "--size", "small"])

    root = built_once(tmp_path_factory, "small_nsd", build)
    return Paths(root, root / "MindEyeV2/mindeyev2")


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """Folders of a tiny random Stable Diffusion and a tiny random CLIP (tiny_sd), to be read only."""
    import tiny_sd

    def build(folder):
        tiny_sd.write_tiny_sd(folder / "sd")
        tiny_sd.write_tiny_clip(folder / "clip")

    folder = built_once(tmp_path_factory, "tiny_models", build)
    return folder / "sd", folder / "clip"


@pytest.fixture
def extract(paths, tiny_models):
    """Run img2feat.py on `paths` with the tiny models: extract(*flags, feats=..., sd=..., clip=...)."""
    import img2feat
    import tiny_features

    def run(*flags, feats=tiny_features.FEATS, sd=tiny_models[0], clip=tiny_models[1]):
        img2feat.main(tiny_features.words(paths, (sd, clip), feats, *flags))
    return run


@pytest.fixture(scope="session")
def world_to_break(tmp_path_factory, tiny_models):
    import whole_world

    original = built_once(tmp_path_factory, "whole_world", lambda folder: whole_world.build(folder, tiny_models))
    return whole_world.World(original, tmp_path_factory.mktemp("world") / "root", tiny_models)


@pytest.fixture
def whole_world(world_to_break):
    """A world that went through all scripts (whole_world.World); a test may do to it what it likes."""
    yield world_to_break
    world_to_break.restore()


def pytest_unconfigure():
    """The traceback of a failed test keeps its DataLoader's workers alive, who take SIGTERM as a training does, and
    Python would wait for them for good."""
    for process in multiprocessing.active_children():
        process.kill()
