"""The networks that judge: nodes and sizes of the protocol with random weights, where torchvision imports."""

import shutil

import pytest
import torch

import utils
from evaluation import networks
from test_evaluate import clip  # noqa: F401  a fixture

NODES = {"alexnet2_two_way": (256, 192 * 31 * 31), "alexnet5_two_way": (256, 256 * 15 * 15),
         "inception_two_way": (342, 2048), "effnet_distance": (255, 1280), "swav_distance": (224, 2048)}


@pytest.fixture
def hub(tmp_path):
    """A folder as torch.hub's, with random weights under the published file names."""
    torchvision = pytest.importorskip("torchvision", exc_type=Exception, reason="torchvision does not import here")
    models = torchvision.models
    torch.manual_seed(0)
    for name, weights, more in (("alexnet", models.AlexNet_Weights.IMAGENET1K_V1, {}),
                                ("inception_v3", models.Inception_V3_Weights.DEFAULT, {"init_weights": False}),
                                ("efficientnet_b1", models.EfficientNet_B1_Weights.DEFAULT, {})):
        file = tmp_path / "checkpoints" / weights.url.rsplit("/", 1)[-1]
        file.parent.mkdir(exist_ok=True)
        torch.save(getattr(models, name)(**more).state_dict(), file)
    swav = {f"module.{key}": value for key, value in models.resnet50().state_dict().items() if key[:2] != "fc"}
    heads = {"module.projection_head.0.weight": torch.zeros(2, 2), "module.prototypes.weight": torch.zeros(2, 2)}
    torch.save(swav | heads, tmp_path / "checkpoints" / networks.SWAV_WEIGHTS.rsplit("/", 1)[-1])
    return tmp_path


def test_layers_and_sizes_are_the_protocols(hub, monkeypatch):
    from torchvision.models import _api, resnet50

    monkeypatch.setattr(torch.hub, "load", None)  # nobody's code is fetched
    monkeypatch.setattr(_api.WeightsEnum, "get_state_dict",  # the file name's hash is of the published weights
                        lambda self, *args, **kwargs: torch.load(
                            f"{torch.hub.get_dir()}/checkpoints/{self.url.rsplit('/', 1)[-1]}"))
    judges, missing = networks.load_networks("none", torch.device("cpu"), hub)
    assert {"clip_two_way"} == missing.keys()
    images = torch.rand(2, 3, 256, 256)
    for name, (side, width) in NODES.items():
        assert judges[name].side == side
        assert judges[name](images).shape == (2, width)
    alexnet = judges["alexnet2_two_way"].features
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        wanted = torch.load(hub / "checkpoints/alexnet-owt-7be5be79.pth")
        from torchvision.models import alexnet as build
        plain = build()
        plain.load_state_dict(wanted)
        torch.testing.assert_close(judges["alexnet2_two_way"](images),
                                   plain.eval().features[:5]((images - mean) / std).flatten(1))
    assert not any(p.requires_grad for p in alexnet.parameters())
    swav = resnet50()
    published = torch.load(hub / "checkpoints" / networks.SWAV_WEIGHTS.rsplit("/", 1)[-1])
    swav.load_state_dict({key[7:]: value for key, value in published.items()}, strict=False)  # as SwAV's own code does
    swav.fc = torch.nn.Identity()
    with torch.no_grad():
        wanted = swav.eval()((networks.metrics.resize(images, 224) - mean) / std)
    torch.testing.assert_close(judges["swav_distance"](images), wanted)


def test_a_clip_of_the_weights_folder_is_taken(clip, tmp_path):  # noqa: F811
    shutil.copytree(clip, tmp_path / "clip-vit-large-patch14")
    judges, _ = networks.load_networks("openai/clip-vit-large-patch14", torch.device("cpu"), tmp_path)
    assert judges["clip_two_way"](torch.rand(2, 3, 256, 256)).shape == (2, 24)
    with pytest.raises(utils.UserError, match="--weights_dir"):
        networks.load_networks("none", torch.device("cpu"), tmp_path / "nowhere")


def test_weights_without_a_published_checksum_stay_what_they_were(tmp_path):
    file = tmp_path / "weights.pth.tar"
    file.write_bytes(b"one")
    networks.check_unchanged(file)
    networks.check_unchanged(file)
    file.write_bytes(b"two")
    with pytest.raises(OSError, match="weights.pth.tar: SHA-256 .*when it was first used"):
        networks.check_unchanged(file)


def test_other_weights_are_other_features():
    one, other = (torch.nn.Linear(2, 2) for _ in range(2))
    assert networks.weights_hash(one) != networks.weights_hash(other)
    other.load_state_dict(one.state_dict())
    assert networks.weights_hash(one) == networks.weights_hash(other)
