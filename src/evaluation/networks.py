"""The networks that judge reconstructions (protocol `mindeye2`, docs/evaluation.md).

CLIP comes with transformers. The others need torchvision (requirements-eval.txt) and their published weights; where
they cannot be had, `load_networks` says which metric is missing and why. FeatureStore keeps what they found.
"""

import hashlib
import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import utils
from disk.files import atomic_path, file_hash, load_npy, remove_leftovers
from evaluation import metrics

SWAV_WEIGHTS = "https://dl.fbaipublicfiles.com/deepcluster/swav_800ep_pretrain.pth.tar"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Network(NamedTuple):
    """A judge: `features` maps (B, 3, side, side) images, normalised by mean and std, to (B, ...)."""

    features: torch.nn.Module
    side: int
    mean: tuple = IMAGENET_MEAN
    std: tuple = IMAGENET_STD
    key: str = ""  # hash of the weights

    @torch.inference_mode()
    def __call__(self, images):
        """Features (B, D), on the CPU, of (B, 3, H, W) images in [0, 1]."""
        device = next(self.features.parameters()).device
        images = metrics.resize(images.to(device), self.side)
        mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return self.features((images - mean) / std).flatten(1).float().cpu()


class ImageEmbedding(torch.nn.Module):
    """A CLIP's image embedding."""

    def __init__(self, clip):
        super().__init__()
        self.clip = clip

    def forward(self, images):
        return self.clip(pixel_values=images).image_embeds


class Layer(torch.nn.Module):
    """The output of one named layer of a torchvision model."""

    def __init__(self, model, layer):
        super().__init__()
        from torchvision.models.feature_extraction import create_feature_extractor

        self.extractor = create_feature_extractor(model.eval(), {layer: "features"})

    def forward(self, images):
        return self.extractor(images)["features"]


def load_networks(eval_clip, device, weights_dir=None):
    """Return {metric: Network} and {metric: why it is missing}; raises UserError for a CLIP that cannot be loaded.

    Files of weights are read without running what a pickle may hold. weights_dir: torch.hub's folder; a CLIP lying
    there under the last part of its name is preferred.
    """
    os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")  # torchvision does not ask for it
    if weights_dir is not None:
        folder = utils.require(weights_dir, "--weights_dir: the folder of the judges' weights", "check its name")
        torch.hub.set_dir(str(folder))
        if (folder / eval_clip.rsplit("/", 1)[-1] / "config.json").exists() and eval_clip != "none":
            eval_clip = str(folder / eval_clip.rsplit("/", 1)[-1])
    loaders = {
        "alexnet2_two_way": partial(load_alexnet, "features.4"),
        "alexnet5_two_way": partial(load_alexnet, "features.11"),
        "inception_two_way": load_inception,
        "clip_two_way": partial(load_clip, eval_clip),
        "effnet_distance": load_effnet,
        "swav_distance": load_swav,
    }
    networks, missing = {}, {}
    for metric, load in utils.progress(loaders.items(), desc="load networks", unit="network"):
        try:
            network = load()
        except ModuleNotFoundError as error:
            missing[metric] = f"{error.name} is not installed (bash scripts/setup.sh requirements-eval.txt)"
        except (ImportError, OSError, RuntimeError) as error:  # not installed, does not import, or weights out of reach
            missing[metric] = str(error).strip().splitlines()[0]
        else:
            network.features.eval().requires_grad_(False).to(device)
            networks[metric] = network._replace(key=weights_hash(network.features))
    return networks, missing


def weights_hash(module):
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class FeatureStore:
    """Features of sets of pictures, kept in files: an interrupted evaluation, run again, extracts the rest.

    A file is named by the metric, the network's weights and the pictures' pixels (PictureSet.key), so that a picture
    that changed is not taken for the old one. Features are mapped from it: a batch of them is in memory, not all.
    """

    def __init__(self, folder, batch_size):
        remove_leftovers(folder)
        self.folder, self.batch_size = folder, batch_size

    def features(self, name, network, pictures, sample=0):
        """Features (N, D) float32 of one sample of a PictureSet."""
        n = len(pictures.image_ids)

        def extract(temporary):
            rows = None
            starts = range(0, n, self.batch_size)
            for start in utils.progress(starts, desc=f"{name} of {pictures.label}", unit="batch", delay=2):
                index = range(start, min(start + self.batch_size, n))
                found = network(pictures.batch(index, sample)).numpy()
                if rows is None:
                    rows = np.lib.format.open_memmap(temporary, "w+", np.float32, (n, found.shape[1]))
                rows[index.start:index.stop] = found
            rows.flush()

        return self.kept(f"{name}_{network.side}", network.key + pictures.key(sample), extract)

    def kept(self, name, key, make):
        """The array that make(file) once wrote for this key."""
        file = self.folder / f"{name}_{hashlib.sha256(key.encode()).hexdigest()[:24]}.npy"
        if not file.exists():
            with atomic_path(file) as temporary:
                make(temporary)
        file.touch()  # by its time `trim` knows what was used last
        return load_npy(file, "kept features", "evaluate again", mmap_mode="r")


    def trim(self, limit):
        """Remove what was not used for longest until no more than `limit` bytes are kept; returns how many are."""
        files = sorted(self.folder.glob("*.npy"), key=lambda file: file.stat().st_mtime)
        sizes = [file.stat().st_size for file in files]
        kept = sum(sizes)
        for file, size in zip(files, sizes, strict=True):
            if kept <= limit:
                break
            file.unlink(missing_ok=True)
            kept -= size
        return kept


def load_clip(name):
    """The image embedding of a CLIP, a folder or hub id, with the normalisation of its own image processor."""
    if name == "none":
        raise ImportError("left out (--eval_clip none)")
    from transformers import CLIPVisionModelWithProjection, ImageProcessingMixin

    try:
        clip = CLIPVisionModelWithProjection.from_pretrained(name, dtype=torch.float32)
        processor, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise utils.UserError(f"--eval_clip {name}: not a CLIP that can be loaded ({reason}); give a folder or hub id "
                              "of a CLIP with its image processor, or none") from None
    return Network(ImageEmbedding(clip), clip.config.image_size, processor["image_mean"], processor["image_std"])


def load_alexnet(layer):
    from torchvision.models import AlexNet_Weights, alexnet

    return Network(Layer(alexnet(weights=AlexNet_Weights.IMAGENET1K_V1), layer), side=256)


def load_inception():
    from torchvision.models import Inception_V3_Weights, inception_v3

    return Network(Layer(inception_v3(weights=Inception_V3_Weights.DEFAULT), "avgpool"), side=342)


def load_effnet():
    from torchvision.models import EfficientNet_B1_Weights, efficientnet_b1

    return Network(Layer(efficientnet_b1(weights=EfficientNet_B1_Weights.DEFAULT), "avgpool"), side=255)


def load_swav():
    """SwAV's ResNet-50 (Caron et al. 2020, arXiv 2006.09882): torchvision's, with the weights its authors published."""
    from torchvision.models import resnet50

    state = torch.hub.load_state_dict_from_url(SWAV_WEIGHTS, map_location="cpu", progress=False, weights_only=True)
    check_unchanged(os.path.join(torch.hub.get_dir(), "checkpoints", SWAV_WEIGHTS.rsplit("/", 1)[-1]))
    state = {name.removeprefix("module."): value for name, value in state.items()}
    heads = ("projection_head.", "prototypes.")  # of its training; what is judged by comes before them
    model = resnet50()
    model.fc = torch.nn.Identity()
    model.load_state_dict({name: value for name, value in state.items() if not name.startswith(heads)})
    return Network(Layer(model, "avgpool"), side=224)


def check_unchanged(file):
    """Refuse a file that is not what it was when it was first used; OSError, which says so.

    SwAV's authors publish no checksum. So the one of the file that came first is written beside it.
    """
    known, found = f"{file}.sha256", file_hash(file, digits=None)
    if not os.path.exists(known):
        with atomic_path(Path(known)) as temporary:
            temporary.write_text(found)
    wanted = Path(known).read_text().strip()
    if found != wanted:
        raise OSError(f"{file}: SHA-256 {found[:12]}, was {wanted[:12]} when it was first used: delete both and let it "
                      "be fetched again")
