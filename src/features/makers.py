"""What makes the features of the stimuli: Stable Diffusion's text encoder (c) and VAE (z), CLIP's vision model (g).

A maker of features has
  feats, model, source      names of the features; of what makes them; of what they are made from
  block_size, len()         images that are computed together; images there are, N
  read(ids)                 what is read of the images `ids` (b,), in another process
  load(), row_shape(net)    the network, on the device; the shape of a row of what it gives
  compute(net, item)        from what was read, {feat: (b, *row_shape) float32 on the device}

Letters: N images, b images of a block, n captions of a block, T tokens, D width of a token, H, W pixels.
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import utils
from disk.files import file_hash
from disk.hub import require_model
from nsd.sources import how_to_fetch

CAPTIONED_IMAGES = 256  # in a block of c: their captions' embeddings take 0.3 GB at Stable Diffusion's sizes
VAE_PIXELS = 2**19  # encoded at once: two images of 512 x 512, whose activations take 1.2 GB


class TextFeatures:
    """c: mean caption embedding of every image. A caption that several images of a block share is encoded once."""

    block_size = CAPTIONED_IMAGES

    def __init__(self, captions, sd_model, batch_size, device):
        """captions: list by image id of lists of str; batch_size: of captions."""
        self.feats, self.captions, self.sd_model = ["c"], captions, sd_model
        self.batch_size, self.device = batch_size, device
        self.model = identity("--sd_model", sd_model, "text_encoder", "tokenizer")
        self.source = short_hash(json.dumps(captions).encode())

    def __len__(self):
        return len(self.captions)

    @cached_property
    def tokenizer(self):
        from transformers import CLIPTokenizer

        return load_part(CLIPTokenizer.from_pretrained, self.sd_model, "tokenizer")

    def read(self, ids):
        """Tokens (n, T) of the distinct captions; the numbers of each image's, joined; how many each image has."""
        texts = [self.captions[image_id] for image_id in ids]
        number = {text: i for i, text in enumerate(dict.fromkeys(text for some in texts for text in some))}
        tokens = self.tokenizer(list(number), padding="max_length", truncation=True, return_tensors="pt",
                                max_length=self.tokenizer.model_max_length).input_ids
        return tokens, torch.tensor([number[text] for some in texts for text in some]), list(map(len, texts))

    def load(self):
        from transformers import CLIPTextModel

        encoder = load_part(CLIPTextModel.from_pretrained, self.sd_model, "text_encoder", dtype=torch.float32)
        return encoder.eval().to(self.device)

    def row_shape(self, encoder):
        return self.tokenizer.model_max_length, encoder.config.hidden_size

    def compute(self, encoder, item):
        tokens, numbers, counts = item
        embeddings = torch.empty(len(tokens), *self.row_shape(encoder), device=self.device)  # (n, T, D)
        batches = tokens.to(self.device, non_blocking=True).split(self.batch_size)
        for part, batch in zip(embeddings.split(self.batch_size), batches, strict=True):
            part.copy_(encoder(batch).last_hidden_state)
        return {"c": torch.stack([embeddings[some].mean(0) for some in numbers.to(self.device).split(counts)])}


class ImageFeatures:
    """What z and g share: images are read, and resized, by other processes."""

    side = None  # pixels to resize to; None keeps the stimuli's own

    def __init__(self, feats, stimuli, batch_size, device):
        """stimuli: Rows (N, H, W, 3) uint8; batch_size: of images."""
        self.feats, self.stimuli, self.block_size, self.device = feats, stimuli, batch_size, device
        # 16 images spread over the file are enough to tell one set of stimuli from another
        self.source = short_hash(stimuli[np.linspace(0, len(stimuli) - 1, 16).astype(np.int64)].tobytes())

    def __len__(self):
        return len(self.stimuli)

    def read(self, ids):
        """(b, 3, H, W) uint8."""
        images = self.stimuli[ids]  # (b, H, W, 3)
        if self.side is not None and images.shape[1:3] != (self.side, self.side):
            images = np.stack([np.asarray(Image.fromarray(image).resize((self.side,) * 2, Image.Resampling.LANCZOS))
                               for image in images])
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    def on_device(self, item):
        """(b, 3, H, W) float32 in [0, 1]."""
        return item.to(self.device, non_blocking=True).float().div_(255)


class Latents(ImageFeatures):
    """z: scaled VAE latent of every image, at the size the diffusion model was trained for."""

    def __init__(self, stimuli, sd_model, batch_size, device):
        super().__init__(["z"], stimuli, batch_size, device)
        self.sd_model = sd_model
        self.model = identity("--sd_model", sd_model, "vae", "unet/config.json")

    @cached_property
    def side(self):
        from diffusers import AutoencoderKL, UNet2DConditionModel

        vae = load_part(AutoencoderKL.load_config, self.sd_model, "vae")
        unet = load_part(UNet2DConditionModel.load_config, self.sd_model, "unet")
        return unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)  # pixels: cells times pixels per cell

    def load(self):
        from diffusers import AutoencoderKL

        vae = load_part(AutoencoderKL.from_pretrained, self.sd_model, "vae", torch_dtype=torch.float32)
        return vae.eval().to(self.device, memory_format=torch.channels_last)  # in which convolutions are faster

    def row_shape(self, vae):
        cells = self.side // 2 ** (len(vae.config.block_out_channels) - 1)
        return vae.config.latent_channels, cells, cells

    def compute(self, vae, item):
        parts = (self.on_device(item) * 2 - 1).split(max(1, VAE_PIXELS // self.side**2))  # the VAE takes [-1, 1]
        return {"z": torch.cat([vae.encode(part).latent_dist.mean for part in parts]) * vae.config.scaling_factor}


class VisionFeatures(ImageFeatures):
    """g_k of all wanted layers of CLIP's vision transformer, from one pass."""

    def __init__(self, feats, stimuli, clip_model, batch_size, device):
        super().__init__(feats, stimuli, batch_size, device)
        self.clip_model = clip_model
        self.model = identity("--clip_model", clip_model, ".")

    def load(self):
        from models import ClipFeatures

        require_model(self.clip_model, "--clip_model", how_to_fetch(self.clip_model))
        layers = [int(feat.removeprefix("g_")) for feat in self.feats]
        return ClipFeatures.from_pretrained(self.clip_model, layers).float().to(self.device)

    def row_shape(self, clip):
        return clip.vision.embeddings.num_positions, clip.vision.embeddings.embed_dim

    def compute(self, clip, item):
        return {f"g_{layer}": features for layer, features in clip(self.on_device(item)).items()}


# --- models that are given by a folder or a name -------------------------------------------------------------------


def load_part(load, sd_model, part, **settings):
    """Load one part of a Stable Diffusion folder or repository; raises UserError when it does not load."""
    require_model(sd_model, "--sd_model", how_to_fetch(sd_model), "model_index.json")
    try:
        return load(sd_model, subfolder=part, **settings)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise utils.UserError(f"--sd_model {sd_model}: {part} could not be loaded ({reason}); give a folder, or a name "
                              "on the Hugging Face hub (README: login)") from None


def identity(flag, name, *parts):
    """Return what to record as the maker: a hub model's name, or a folder's with a hash, since it may be retrained."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    files = []
    for part in parts:
        path = utils.require(folder / part, f"{flag} {name}: {part}", "give a folder written by save_pretrained")
        files += [path] if path.is_file() else sorted(path.rglob("*"))
    digests = [file_hash(file) for file in files if file.suffix in (".json", ".txt", ".safetensors", ".bin")]
    return f"{folder.resolve().name}@{short_hash(''.join(digests).encode())}"


def short_hash(content):
    """Return 12 hex digits that tell one content from another."""
    return hashlib.sha256(content).hexdigest()[:12]
