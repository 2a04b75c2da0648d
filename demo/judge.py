"""Judge pictures of the demo world: which background, object, colour and place does the tiny CLIP see in them?

Zero-shot classification (Radford et al. 2021, section 3.1): CLIP gives every prompt "a {colour} {object} {place}
{background}" a probability, and that of an attribute value is the sum over the prompts that carry it.
"""

import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from scenes import ATTRIBUTES, PLACE_PHRASES

PROMPTS = ("a {colour} {object} {place} {background}", "a picture of a {colour} {object} {background} {place}")
PREPOSITIONS = {"beach": "on a", "field": "in a", "snow": "in the", "city": "in a", "room": "in a", "night": "at",
                "sea": "on the", "desert": "in a"}
_LOADED = {}


def judge_images(images, truths, clip_folder):
    """Share of images in which the true attribute value is the one CLIP finds most likely.

    images: (N, 3, H, W) float in [0, 1]; truths: N dicts {background, object, colour, place}; clip_folder: a CLIPModel
    with its tokenizer and image processor. Returns {attribute: accuracy in [0, 1]}.
    """
    found = read_attributes(images, clip_folder)
    return {name: sum(found[name][i] == truth[name] for i, truth in enumerate(truths)) / len(truths)
            for name in ATTRIBUTES}


@torch.no_grad()
def read_attributes(images, clip_folder):
    """{attribute: list of N values}, the most likely value of each attribute in each of the (N, 3, H, W) images."""
    model, mean, std, prompts = _load(str(Path(clip_folder).resolve()))
    size = model.config.vision_config.image_size
    if images.shape[-1] != size:
        images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
    features = [model.get_image_features(pixel_values=(batch - mean) / std).pooler_output
                for batch in images.split(100)]
    features = F.normalize(torch.cat(features), dim=-1)
    logits = model.logit_scale.exp() * features @ prompts.T  # (N, prompts)
    probabilities = logits.softmax(1).unflatten(1, [len(values) for values in ATTRIBUTES.values()])
    found = {}
    for axis, (name, values) in enumerate(ATTRIBUTES.items(), start=1):
        others = [k for k in range(1, probabilities.ndim) if k != axis]
        found[name] = [values[k] for k in probabilities.sum(others).argmax(1)]
    return found


@torch.no_grad()
def _load(folder):
    """The model, its pixel statistics, and the prompts' embeddings (prompts, D); kept for the next call."""
    if folder in _LOADED:
        return _LOADED[folder]
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessor.from_pretrained(folder)
    combinations = list(itertools.product(*ATTRIBUTES.values()))
    embeddings = torch.zeros(len(combinations), model.config.projection_dim)
    for template in PROMPTS:
        texts = [
            template.format(background=f"{PREPOSITIONS[b]} {b}", object=o, colour=c, place=PLACE_PHRASES[p])
            for b, o, c, p in combinations
        ]
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        embeddings += F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (processor.image_mean, processor.image_std))
    _LOADED[folder] = model, mean, std, F.normalize(embeddings, dim=-1)
    return _LOADED[folder]
