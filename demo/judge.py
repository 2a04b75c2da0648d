"""Judge pictures of the demo world: which value of each attribute (scenes.ATTRIBUTES) do they show?

A small convolutional network, trained on renders by train_tiny_models.py --stage judge. It has seen pictures that went
through the tiny VAE, too, and none of mini-NSD. It takes no part in the pipeline.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from scenes import ATTRIBUTES, NO_SECOND

SIDE = 64  # pixels
WEIGHTS = Path(__file__).resolve().parent / "models" / "judge.safetensors"


class Judge(nn.Module):
    """Residual convolutions from 64 x 64 to 8 x 8, then one linear readout per attribute.

    Letters: B pictures, A attributes.
    """

    def __init__(self, widths=(32, 64, 96, 128), squeezed=16):
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))
        self.blocks = nn.ModuleList(Block(width) for width in widths[1:])
        self.squeeze = nn.Conv2d(widths[-1], squeezed, 1)
        self.hidden = nn.Linear(squeezed * (SIDE // 8) ** 2, 256)
        self.readouts = nn.ModuleDict({name: nn.Linear(256, len(values)) for name, values in ATTRIBUTES.items()})

    def forward(self, pictures):
        """(B, 3, 64, 64) in [0, 1] -> list of A logits, (B, values of the attribute)."""
        x = F.silu(self.stem(pictures * 2 - 1))
        for down, block in zip(self.down, self.blocks, strict=True):
            x = block(F.silu(down(x)))  # (B, 64, 32, 32), (B, 96, 16, 16), (B, 128, 8, 8)
        x = F.silu(self.hidden(F.silu(self.squeeze(x)).flatten(1)))  # (B, 256)
        return [readout(x) for readout in self.readouts.values()]


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x):
        y = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(F.silu(norm(y)))
        return x + y


def encode_attributes(attributes):
    """N dicts {attribute: value} -> (N, A) indices into ATTRIBUTES."""
    return torch.tensor([[values.index(found[name]) for name, values in ATTRIBUTES.items()] for found in attributes])


def judge_images(images, truths, weights=WEIGHTS):
    """Share of images in which the judge finds the true value of each attribute.

    images: (N, 3, H, W) float in [0, 1]; truths: N dicts as Scene.attributes. Returns {attribute: rate in [0, 1]}.
    Only scenes that have a second object count for "second".
    """
    return {name: float(np.nanmean(right)) for name, right in find_right(images, truths, weights).items()}


def find_right(images, truths, weights=WEIGHTS):
    """{attribute: (N,)}: 1 where the judge finds the true value, 0 where another, NaN where there is no second object.

    Arguments as of judge_images.
    """
    found = read_attributes(images, weights)
    return {name: np.array([np.nan if (name, truth[name]) == ("second", NO_SECOND) else float(value == truth[name])
                            for value, truth in zip(found[name], truths, strict=True)]) for name in ATTRIBUTES}


def chance(truths):
    """{attribute: rate of a picture of another scene drawn at random}; `truths` as in judge_images."""
    rates = {}
    for name in ATTRIBUTES:
        drawn = [truth[name] for truth in truths]
        counted = [value for value in drawn if (name, value) != ("second", NO_SECOND)]
        rates[name] = sum(drawn.count(value) for value in counted) / len(counted) / len(drawn)
    return rates


@torch.inference_mode()
def read_attributes(images, weights=WEIGHTS):
    """{attribute: list of N values}: the most likely ones in each of the (N, 3, H, W) images."""
    net = load(weights)
    if images.shape[-1] != SIDE:
        images = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", antialias=True)
    batches = [net(batch) for batch in images.split(100)]
    return {name: [values[k] for batch in batches for k in batch[a].argmax(1)]
            for a, (name, values) in enumerate(ATTRIBUTES.items())}


def load(weights=WEIGHTS):
    net = Judge()
    net.load_state_dict({key: value.float() for key, value in load_file(weights).items()})
    return net.eval()


def save(net, file):
    save_file({key: value.half().contiguous() for key, value in net.state_dict().items()}, file)
