"""Compute the features of every stimulus that the brain is decoded into: c, z and g_2 ... g_12.

c    mean over the image's captions of the text encoder's last hidden state         (77, 768) for Stable Diffusion v1.4
z    VAE posterior mean of the stimulus, times the VAE's scaling factor             (4, 64, 64)
g_k  output of the MLP of block k/2 of CLIP's vision transformer, class token first (50, 768) for CLIP ViT-B/32

    python src/img2feat.py                                            # all of them, on the GPU where there is one
    python src/img2feat.py --feats g_2 g_12 --batch_size 256
    python src/img2feat.py --feats c z --sd_model path/to/stable-diffusion --overwrite

Reads nsd_stimuli.hdf5 (z, g), nsd_stim_info_merged.csv and nsd_captions.json (c). Writes
nsddata_stimuli/stimuli/nsd/{feat}_all.hdf5, key `data`: one flattened row per image, by 0-based 73k id, uncompressed
so that it can be memory-mapped; attributes: shape (of a row), model, source. A file that was made by the same model
from the same source is kept. On NSD in float16: c 8.6 GB, z 2.4 GB, each g 5.6 GB.
"""

import hashlib
import json
import shutil
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import h5py
import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

import data
import options
import utils
from models import ClipFeatures

FEATS = ["c", "z", "g_2", "g_4", "g_6", "g_8", "g_10", "g_12"]


def get_parser():
    parser = options.Parser(__doc__)
    options.add_paths(parser)
    parser.add_argument("--feats", nargs="+", type=options.feature, default=FEATS, metavar="FEAT",
                        help="c, z, g_2, g_4, ... (all)")
    parser.add_argument("--sd_model", default="CompVis/stable-diffusion-v1-4", metavar="NAME|DIR",
                        help="Stable Diffusion 1.x: its text encoder makes c, its VAE z")
    parser.add_argument("--clip_model", default="openai/clip-vit-base-patch32", metavar="NAME|DIR",
                        help="CLIP whose vision transformer makes g")
    parser.add_argument("--batch_size", type=options.whole, default=32, metavar="IMAGES")
    parser.add_argument("--num_workers", type=options.whole, default=2, metavar="PROCESSES",
                        help="processes that read and resize images")
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float16", help="as written to the files")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--overwrite", action="store_true", help="make files again that are there already")
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    paths, device = utils.Paths.from_args(args), utils.pick_device(args.device)
    feats = dict.fromkeys(args.feats)
    layers = [feat for feat in feats if feat.startswith("g_")]
    if "c" in feats:
        captions = data.load_captions(paths)
        made_by = identity("--sd_model", args.sd_model, "text_encoder", "tokenizer")
        with open_outputs(paths, ["c"], len(captions), made_by, caption_hash(captions), args) as outputs:
            if outputs:
                write_c(outputs["c"], captions, args, device)
    if "z" in feats:
        stimuli = data.open_stimuli(paths)
        made_by = identity("--sd_model", args.sd_model, "vae", "unet/config.json")
        with open_outputs(paths, ["z"], len(stimuli), made_by, stimulus_hash(stimuli), args) as outputs:
            if outputs:
                write_z(outputs["z"], stimuli, args, device)
    if layers:
        stimuli = data.open_stimuli(paths)
        made_by = identity("--clip_model", args.clip_model, ".")
        with open_outputs(paths, layers, len(stimuli), made_by, stimulus_hash(stimuli), args) as outputs:
            if outputs:
                write_g(outputs, stimuli, args, device)


# --- the features -------------------------------------------------------------------------------------------------


@torch.inference_mode()
def write_c(output, captions, args, device):
    """Mean caption embedding of every image. A caption that several images share is encoded once."""
    tokenizer = load_part(CLIPTokenizer, args, "tokenizer")
    encoder = load_part(CLIPTextModel, args, "text_encoder", dtype=torch.float32).eval().to(device)

    def encode(texts):  # -> (len(texts), T, D)
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length,
                           return_tensors="pt")
        return encoder(tokens.input_ids.to(device)).last_hidden_state.cpu()

    last_use = {text: image_id for image_id, texts in enumerate(captions) for text in texts}
    known = {}  # caption -> (T, D), kept until its last use: all of NSD's would fill 80 GB
    with tqdm(total=len(captions), desc="c", unit="image") as bar:
        for start in range(0, len(captions), args.batch_size):
            batch = captions[start:start + args.batch_size]
            new = list(dict.fromkeys(text for texts in batch for text in texts if text not in known))
            for first in range(0, len(new), args.batch_size):
                chunk = new[first:first + args.batch_size]
                known.update((text, row.clone()) for text, row in zip(chunk, encode(chunk), strict=True))
            output.append(torch.stack([torch.stack([known[text] for text in texts]).mean(0) for texts in batch]))
            known = {text: row for text, row in known.items() if last_use[text] >= start + len(batch)}
            bar.update(len(batch))


@torch.inference_mode()
def write_z(output, stimuli, args, device):
    """Scaled VAE latent of every image, at the size the diffusion model was trained for."""
    vae = load_part(AutoencoderKL, args, "vae", torch_dtype=torch.float32).eval().to(device)
    try:
        unet_config = UNet2DConditionModel.load_config(args.sd_model, subfolder="unet")
    except (OSError, ValueError) as error:
        raise unloadable("--sd_model", args.sd_model, "unet", error) from None
    vae_factor = 2 ** (len(vae.config.block_out_channels) - 1)  # pixels per latent cell
    size = unet_config["sample_size"] * vae_factor
    for images in read_images(stimuli, "z", args, device, size):
        latents = vae.encode(images * 2 - 1).latent_dist.mean  # the VAE takes [-1, 1]
        output.append(latents * vae.config.scaling_factor)


@torch.inference_mode()
def write_g(outputs, stimuli, args, device):
    """Features of all wanted CLIP layers, from one pass."""
    layers = [int(feat.removeprefix("g_")) for feat in outputs]
    clip = ClipFeatures.from_pretrained(args.clip_model, layers).float().to(device)
    for images in read_images(stimuli, " ".join(outputs), args, device):
        for layer, features in clip(images).items():
            outputs[f"g_{layer}"].append(features)


def load_part(part_class, args, part, **options_):
    """Load one part of the Stable Diffusion folder; raises UserError when it does not load."""
    try:
        return part_class.from_pretrained(args.sd_model, subfolder=part, **options_)
    except (OSError, ValueError) as error:
        raise unloadable("--sd_model", args.sd_model, part, error) from None


def unloadable(flag, name, part, error):
    reason = str(error).strip().splitlines()[0]
    return utils.UserError(f"{flag} {name}: {part} could not be loaded ({reason}); give a folder, or a name on the "
                           "Hugging Face hub (README: login)")


# --- reading images -----------------------------------------------------------------------------------------------


class StimulusBatches(Dataset):
    """Item i: a batch of stimuli, (b, 3, H, W) uint8, in order of image id."""

    def __init__(self, stimuli, batch_size, size=None):
        """size: resize to (size, size) with LANCZOS; None keeps the stimuli's own."""
        self.stimuli, self.batch_size, self.size = stimuli, batch_size, size

    def __len__(self):
        return -(-len(self.stimuli) // self.batch_size)

    def __getitem__(self, index):
        images = self.stimuli[slice(index * self.batch_size, (index + 1) * self.batch_size)]  # (b, H, W, 3)
        if self.size is not None and images.shape[1:3] != (self.size, self.size):
            images = np.stack([self._resize(image) for image in images])
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    def _resize(self, image):
        return np.asarray(Image.fromarray(image).resize((self.size, self.size), Image.Resampling.LANCZOS))


def read_images(stimuli, title, args, device, size=None):
    """Yield batches (b, 3, H, W) float32 in [0, 1] on the device, read and resized by other processes."""
    batches = StimulusBatches(stimuli, args.batch_size, size)
    pinned = device.type == "cuda"
    loader = DataLoader(batches, batch_size=None, num_workers=args.num_workers, pin_memory=pinned)
    with tqdm(total=len(stimuli), desc=title, unit="image") as bar:
        for images in loader:
            yield images.to(device, non_blocking=True).float() / 255
            bar.update(len(images))


# --- writing features ---------------------------------------------------------------------------------------------


class FeatureFile:
    """A feature file that is being written, a batch of rows after the other."""

    def __init__(self, file, path, n_rows, dtype):
        self.file, self.path, self.n_rows, self.dtype = file, path, n_rows, np.dtype(dtype)
        self.dataset, self.filled = None, 0

    def append(self, features):
        """features: (b, *row_shape) tensor."""
        with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is refused here
            rows = features.flatten(1).cpu().numpy().astype(self.dtype)  # (b, width)
        if not np.isfinite(rows).all():
            raise utils.UserError(f"{self.path}: a feature of images {self.filled}.. does not fit {self.dtype}; check "
                                  "the model, or write it with --dtype float32")
        if self.dataset is None:
            self._create(tuple(features.shape[1:]), rows.shape[1])
        try:
            self.dataset[self.filled:self.filled + len(rows)] = rows
        except OSError as error:
            raise utils.UserError(f"{self.path}: could not be written ({error}); make room on the disk") from None
        self.filled += len(rows)

    def _create(self, row_shape, width):
        wanted, free = self.n_rows * width * self.dtype.itemsize, shutil.disk_usage(self.path.parent).free
        if wanted > free:
            raise utils.UserError(f"{self.path}: needs {wanted / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; make room "
                                  "on the disk or give fewer --feats")
        # contiguous and uncompressed, so that readers can map it into memory
        self.dataset = self.file.create_dataset("data", (self.n_rows, width), self.dtype)
        self.dataset.attrs["shape"] = row_shape


@contextmanager
def open_outputs(paths, feats, n_rows, model, source, args):
    """Yield {feat: FeatureFile} for those of `feats` that are not there yet; the files appear whole, on success."""
    wanted = {"model": model, "source": source}
    missing = [feat for feat in feats if args.overwrite or not is_kept(paths.feature(feat), n_rows, wanted)]
    with ExitStack() as stack:
        outputs = {}
        for feat in missing:
            path = paths.feature(feat)
            file = stack.enter_context(h5py.File(stack.enter_context(utils.atomic_path(path)), "w"))
            outputs[feat] = FeatureFile(file, path, n_rows, args.dtype)
        yield outputs
        for output in outputs.values():
            assert output.filled == n_rows, f"{output.path}: {output.filled} of {n_rows} rows written"
            output.dataset.attrs.update(wanted)
    for feat in missing:
        print(f"{paths.feature(feat)}: wrote {n_rows} rows, {args.dtype}, by {model}")


def is_kept(path, n_rows, wanted):
    """Whether a feature file is there with as many rows and the wanted attributes (then say so).

    Raises UserError for one that is there but differs: it may be the user's own, so only --overwrite replaces it.
    """
    if not path.exists():
        return False
    try:
        with h5py.File(path, "r") as file:
            dataset = file["data"]
            found = {"rows": len(dataset), **{name: dataset.attrs.get(name, "unknown") for name in wanted}}
            dtype = dataset.dtype
    except (OSError, KeyError) as error:
        raise utils.UserError(f"{path}: not readable ({error}); give --overwrite to make it again") from None
    for name, value in {"rows": n_rows, **wanted}.items():
        if found[name] != value:
            raise utils.UserError(f"{path}: its {name} is {found[name]}, wanted {value}; give --overwrite to make it "
                                  "again, or leave it out of --feats")
    print(f"{path}: kept ({n_rows} rows, {dtype}, by {wanted['model']})")
    return True


def identity(flag, name, *parts):
    """What to record as the maker: a hub model's name, or a folder's with a hash, since it may be trained again."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    files = []
    for part in parts:
        path = utils.require(folder / part, f"{flag} {name}: {part}", "give a folder written by save_pretrained")
        files += [path] if path.is_file() else sorted(path.rglob("*"))
    digests = [utils.file_hash(file) for file in files if file.suffix in (".json", ".txt", ".safetensors", ".bin")]
    return f"{folder.resolve().name}@{short_hash(''.join(digests).encode())}"


def caption_hash(captions):
    return short_hash(json.dumps(captions).encode())


def stimulus_hash(stimuli):
    """Of 16 images spread over the file: enough to tell one set of stimuli from another."""
    return short_hash(stimuli[np.linspace(0, len(stimuli) - 1, 16).astype(np.int64)].tobytes())


def short_hash(content):
    return hashlib.sha256(content).hexdigest()[:12]


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
