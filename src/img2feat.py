"""Compute the features of the stimuli that the brain is decoded into: c, z and g_2 ... g_12.

c    mean over the image's captions of the text encoder's last hidden state         (77, 768) for Stable Diffusion v1.4
z    VAE posterior mean of the stimulus, times the VAE's scaling factor             (4, 64, 64)
g_k  output of the MLP of block k/2 of CLIP's vision transformer, class token first (50, 768) for CLIP ViT-B/32

    python src/img2feat.py                                            # all of them, on the GPU where there is one
    python src/img2feat.py --subj 1 --feats g_2 g_12 --batch_size 256 # for the images that subject 1 saw; others later
    accelerate launch --config_file scripts/accelerate/ddp.yaml src/img2feat.py --feats c z    # GPUs share the images

Reads nsd_stimuli.hdf5 (z, g), nsd_stim_info_merged.csv and nsd_captions.json (c). Writes
nsddata_stimuli/stimuli/nsd/{feat}_all.hdf5: `data`, one flattened row per image, by 0-based 73k id, uncompressed so
that it can be memory-mapped (attributes: shape of a row, model, source), and `written`, which rows are there. The same
command adds those that are missing, after a kill too; a file of another model or another source is refused. On NSD in
float16: c 8.6 GB, z 2.4 GB, each g 5.6 GB.
"""

import hashlib
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import cached_property
from pathlib import Path

import h5py
import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

import options
import utils
from disk.files import atomic_path, file_hash
from disk.names import Paths
from models import ClipFeatures
from nsd import sources
from nsd.captions import load_captions
from nsd.rows import KNOWN_FEATURE_SHAPES, open_stimuli
from nsd.trials import load_trials
from training.team import Team

CAPTIONED_IMAGES = 256  # in a block of c: their captions' embeddings take 0.3 GB at Stable Diffusion's sizes
VAE_PIXELS = 2**19  # encoded at once: two images of 512 x 512, whose activations take 1.2 GB


def get_parser():
    parser = options.Parser(__doc__)
    options.add_paths(parser)
    parser.add_argument("--feats", nargs="+", type=options.feature, default=options.FEATURES, metavar="FEAT",
                        help="c, z, g_2, g_4, ... (all)")
    parser.add_argument("--subj", "--subject", dest="subj", nargs="+", type=options.subject, metavar="1..8",
                        help="only the images that these subjects saw (all images)")
    parser.add_argument("--sd_model", default=sources.SD_MODEL, metavar="NAME|DIR",
                        help="Stable Diffusion 1.x: its text encoder makes c, its VAE z")
    parser.add_argument("--clip_model", default=sources.CLIP_MODEL, metavar="NAME|DIR",
                        help="CLIP whose vision transformer makes g")
    parser.add_argument("--batch_size", type=options.whole, default=32, metavar="IMAGES", help="or, for c, captions")
    parser.add_argument("--num_workers", type=options.whole, default=2, metavar="PROCESSES",
                        help="processes that read and resize images")
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float16", help="as written to the files")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--overwrite", action="store_true", help="make files anew that are there already")
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    utils.reproducible_products()
    paths = Paths.from_args(args)
    team = Team.assemble(args.device, "fp32", timedelta(days=1))  # shares may take hours longer than others
    layers = [feat for feat in dict.fromkeys(args.feats) if feat.startswith("g_")]
    if "c" in args.feats:
        extract(TextFeatures(load_captions(paths), args, team.device), paths, args, team)
    if "z" in args.feats:
        extract(Latents(open_stimuli(paths), args, team.device), paths, args, team)
    if layers:
        extract(VisionFeatures(layers, open_stimuli(paths), args, team.device), paths, args, team)


# --- the features -------------------------------------------------------------------------------------------------
#
# A maker of features has
#   feats, model, source      names of the features; of what makes them; of what they are made from
#   block_size, len()         images that are computed together; images there are, N
#   read(ids)                 what is read of the images `ids` (b,), in another process
#   load(), row_shape(net)    the network, on the device; the shape of a row of what it gives
#   compute(net, item)        from what was read, {feat: (b, *row_shape) float32 on the device}


class TextFeatures:
    """c: mean caption embedding of every image. A caption that several images of a block share is encoded once."""

    block_size = CAPTIONED_IMAGES

    def __init__(self, captions, args, device):
        """captions: list by image id of lists of str."""
        self.feats, self.captions, self.args, self.device = ["c"], captions, args, device
        self.model = identity("--sd_model", args.sd_model, "text_encoder", "tokenizer")
        self.source = short_hash(json.dumps(captions).encode())

    def __len__(self):
        return len(self.captions)

    @cached_property
    def tokenizer(self):
        return load_part(CLIPTokenizer.from_pretrained, self.args, "tokenizer")

    def read(self, ids):
        """Tokens (n, T) of the distinct captions; the numbers of each image's, joined; how many each image has."""
        texts = [self.captions[image_id] for image_id in ids]
        number = {text: i for i, text in enumerate(dict.fromkeys(text for some in texts for text in some))}
        tokens = self.tokenizer(list(number), padding="max_length", truncation=True, return_tensors="pt",
                                max_length=self.tokenizer.model_max_length).input_ids
        return tokens, torch.tensor([number[text] for some in texts for text in some]), list(map(len, texts))

    def load(self):
        load = CLIPTextModel.from_pretrained
        return load_part(load, self.args, "text_encoder", dtype=torch.float32).eval().to(self.device)

    def row_shape(self, encoder):
        return self.tokenizer.model_max_length, encoder.config.hidden_size

    def compute(self, encoder, item):
        tokens, numbers, counts = item
        embeddings = torch.empty(len(tokens), *self.row_shape(encoder), device=self.device)  # (n, T, D)
        batches = tokens.to(self.device, non_blocking=True).split(self.args.batch_size)
        for part, batch in zip(embeddings.split(self.args.batch_size), batches, strict=True):
            part.copy_(encoder(batch).last_hidden_state)
        return {"c": torch.stack([embeddings[some].mean(0) for some in numbers.to(self.device).split(counts)])}


class ImageFeatures:
    """What z and g share: images are read, and resized, by other processes."""

    side = None  # pixels to resize to; None keeps the stimuli's own

    def __init__(self, feats, stimuli, args, device):
        self.feats, self.stimuli, self.args, self.device = feats, stimuli, args, device
        self.block_size = args.batch_size
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

    def __init__(self, stimuli, args, device):
        super().__init__(["z"], stimuli, args, device)
        self.model = identity("--sd_model", args.sd_model, "vae", "unet/config.json")

    @cached_property
    def side(self):
        vae = load_part(AutoencoderKL.load_config, self.args, "vae")
        unet = load_part(UNet2DConditionModel.load_config, self.args, "unet")
        return unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)  # pixels: cells times pixels per cell

    def load(self):
        load = AutoencoderKL.from_pretrained
        return load_part(load, self.args, "vae", torch_dtype=torch.float32).eval().to(self.device)

    def row_shape(self, vae):
        cells = self.side // 2 ** (len(vae.config.block_out_channels) - 1)
        return vae.config.latent_channels, cells, cells

    def compute(self, vae, item):
        parts = (self.on_device(item) * 2 - 1).split(max(1, VAE_PIXELS // self.side**2))  # the VAE takes [-1, 1]
        return {"z": torch.cat([vae.encode(part).latent_dist.mean for part in parts]) * vae.config.scaling_factor}


class VisionFeatures(ImageFeatures):
    """g_k of all wanted layers of CLIP's vision transformer, from one pass."""

    def __init__(self, feats, stimuli, args, device):
        super().__init__(feats, stimuli, args, device)
        self.model = identity("--clip_model", args.clip_model, ".")

    def load(self):
        layers = [int(feat.removeprefix("g_")) for feat in self.feats]
        return ClipFeatures.from_pretrained(self.args.clip_model, layers).float().to(self.device)

    def row_shape(self, clip):
        return clip.vision.embeddings.num_positions, clip.vision.embeddings.embed_dim

    def compute(self, clip, item):
        return {f"g_{layer}": features for layer, features in clip(self.on_device(item)).items()}


def load_part(load, args, part, **options_):
    """Load one part of the Stable Diffusion folder; raises UserError when it does not load."""
    try:
        return load(args.sd_model, subfolder=part, **options_)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise utils.UserError(f"--sd_model {args.sd_model}: {part} could not be loaded ({reason}); give a folder, or a "
                              "name on the Hugging Face hub (README: login)") from None


def identity(flag, name, *parts):
    """What to record as the maker: a hub model's name, or a folder's with a hash, since it may be trained again."""
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
    return hashlib.sha256(content).hexdigest()[:12]


# --- what is missing, block by block ------------------------------------------------------------------------------


def extract(maker, paths, args, team):
    """Write what the files of maker's features lack of the wanted images, shared among the team's processes."""
    n_images, wanted = len(maker), wanted_images(paths, args.subj, len(maker))
    there = {feat: None if args.overwrite else rows_there(paths.feature(feat), maker, wanted, args, team)
             for feat in maker.feats}
    maker.feats = [feat for feat in maker.feats if there[feat] is None or not there[feat][wanted].all()]
    if not maker.feats:
        return
    missing = {feat: len(wanted) - (0 if there[feat] is None else there[feat][wanted].sum()) for feat in maker.feats}
    network = maker.load()
    row_shape = maker.row_shape(network)
    check_disk(paths, list(missing), sum(missing.values()) * np.prod(row_shape) * np.dtype(args.dtype).itemsize)
    team.wait()  # until everybody has looked
    for feat in missing:
        if there[feat] is None and team.is_main:
            create_file(paths.feature(feat), n_images, row_shape, args.dtype, maker)
    team.wait()
    files = {feat: FeatureFile(paths.feature(feat)) for feat in missing}
    # Blocks are cut from the wanted images, not from the missing ones, and computed whole: in its last digits a feature
    # depends on the batch it is computed in. So a run that was killed and continued gives what another would have.
    blocks = np.split(wanted, range(maker.block_size, len(wanted), maker.block_size))
    blocks = [ids for ids in blocks if not all(file.written[ids].all() for file in files.values())]
    team.wait()  # until everybody has counted
    write_blocks(maker, network, team.take(blocks), files, args, team)
    team.wait()
    for feat, file in files.items():
        team.print(f"{file.path}: wrote {missing[feat]} rows, {FeatureFile(file.path).written.sum()} of {n_images} are "
                   f"there, {args.dtype}, by {maker.model}")


def wanted_images(paths, subjects, n_images):
    """Ascending ids of the images that the subjects saw, in training or test; of all images without subjects."""
    if not subjects:
        return np.arange(n_images)
    seen = [load_trials(paths, subj, split)["image_id"] for subj in subjects for split in ("train", "new_test")]
    ids = np.unique(np.concatenate(seen))
    if ids[-1] >= n_images:
        raise utils.UserError(f"{paths.data_path / 'wds'}: a trial shows image {ids[-1]} (from 0), but there are "
                              f"{n_images}; check that both are of one data set")
    return ids


def rows_there(path, maker, wanted, args, team):
    """Which rows a feature file has, (N,) bool; None when there is no file. Says so when all wanted ones are there.

    Raises UserError for a file that is not maker's, which only --overwrite replaces. One that another program wrote,
    such as NeuralDiffuser, (N, 1, width) float32, is the user's own: kept if its rows have a shape that is right.
    """
    if not path.exists():
        return None
    try:
        with h5py.File(path, "r") as file:
            rows = file["data"]
            n_rows, *shape, dtype, attributes = *rows.shape, rows.dtype, dict(rows.attrs)
            written = file["written"][()] == 1 if "written" in file else np.ones(n_rows, bool)
    except (OSError, KeyError) as error:
        raise utils.UserError(f"{path}: not readable ({error}); give --overwrite to make it again") from None
    found = {"rows": n_rows, "model": f"unknown (rows of shape {tuple(shape)})", "source": "unknown", **attributes}
    expected = {"rows": len(maker), "model": maker.model, "source": maker.source}
    by = f"by {maker.model}"
    if "model" not in attributes and (np.prod(shape) in KNOWN_FEATURE_SHAPES
                                      or tuple(shape) == maker.row_shape(maker.load())):
        expected, by = {"rows": len(maker)}, "made by another program"
    whole = n_rows == len(maker) and written[wanted].all()
    if not whole:
        found["type"], expected["type"] = dtype.name, args.dtype
    for name, value in expected.items():
        if found[name] != value:
            raise utils.UserError(f"{path}: its {name} is {found[name]}, wanted {value}; give --overwrite to make it "
                                  "again, or leave it out of --feats")
    if whole:
        team.print(f"{path}: kept ({written.sum()} of {n_rows} rows are there, {dtype}, {by})")
    return written


def check_disk(paths, feats, needed):
    """Raise UserError when `needed` bytes for the files of `feats` are not free."""
    paths.stimuli.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(paths.stimuli).free
    if needed > free:
        raise utils.UserError(f"{paths.stimuli}: {', '.join(paths.feature(feat).name for feat in feats)}: needs "
                              f"{utils.in_bytes(needed)}, {utils.in_bytes(free)} are free; make room on the disk or "
                              "give fewer --feats")


@torch.inference_mode()
def write_blocks(maker, network, blocks, files, args, team):
    """Compute the features of `blocks`, a list of (b,) image ids, and write them to `files` {feat: FeatureFile}.

    Other processes read ahead; a thread writes a block while the next one is computed.
    """
    loader = DataLoader(blocks, batch_size=None, collate_fn=maker.read, num_workers=args.num_workers,
                        pin_memory=team.device.type == "cuda")
    bar = tqdm(total=sum(map(len, blocks)), desc=" ".join(files), unit="image", disable=not team.is_main)
    with bar, ThreadPoolExecutor(1) as thread:
        writing = None
        for ids, item in zip(blocks, loader, strict=True):
            rows = {feat: features.flatten(1).to(files[feat].dtype)
                    for feat, features in maker.compute(network, item).items()}
            # a GPU has only been told what to do: the copy is queued behind it, and waited for by the thread
            rows = {feat: part.to("cpu", non_blocking=True) for feat, part in rows.items()}
            copied = torch.cuda.current_stream(team.device).record_event() if team.device.type == "cuda" else None
            if writing is not None:
                writing.result()  # so that no more than one block waits for a slow disk
            writing = thread.submit(write_block, files, ids, rows, copied)
            bar.update(len(ids))
        if writing is not None:
            writing.result()


def write_block(files, ids, rows, copied):
    if copied is not None:
        copied.synchronize()
    for feat, part in rows.items():
        files[feat].write(ids, part)


# --- feature files ------------------------------------------------------------------------------------------------


def create_file(path, n_rows, row_shape, dtype, maker):
    """Make a feature file of its final size, without any row; what is not written takes no space on most disks."""
    try:
        with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
            # contiguous and uncompressed, so that readers can map it into memory
            rows = file.create_dataset("data", (n_rows, int(np.prod(row_shape))), dtype)
            rows[0] = 0  # with its first row HDF5 gives the data set its place
            rows.attrs.update(shape=row_shape, model=maker.model, source=maker.source)
            file["written"] = np.zeros(n_rows, np.uint8)
    except OSError as error:
        raise utils.UserError(f"{path}: could not be made ({error}); make room on the disk") from None


class FeatureFile:
    """A file of create_file whose rows are written in place, in any order, by several processes.

    .written: (N,) bool, the rows that were there when it was opened, or that this process has written.
    """

    def __init__(self, path):
        self.path = path
        with h5py.File(path, "r") as file:
            rows, written = file["data"], file["written"]
            self.dtype, self.row_bytes = getattr(torch, rows.dtype.name), rows.shape[1] * rows.dtype.itemsize
            self.rows_at, self.written_at = rows.id.get_offset(), written.id.get_offset()
            self.written = written[()] == 1

    def write(self, ids, rows):
        """Write rows (b, width), of the images `ids` (b,) ascending, then that they are there; skip those that were."""
        bad = ids[~rows.isfinite().all(1).numpy()]
        if bad.size:
            raise utils.UserError(f"{self.path}: image {bad[0]} does not fit {rows.numpy().dtype}; check the model, or "
                                  "write it with --dtype float32 --overwrite")
        new = np.flatnonzero(~self.written[ids])
        runs = np.split(new, np.flatnonzero(np.diff(ids[new]) > 1) + 1) if len(new) else []  # of consecutive ids
        try:
            with open(self.path, "r+b", buffering=0) as file:
                for run in runs:
                    self._put(file, rows[run].numpy().tobytes(), self.rows_at + int(ids[run[0]]) * self.row_bytes)
                for run in runs:
                    self._put(file, bytes([1]) * len(run), self.written_at + int(ids[run[0]]))
        except OSError as error:
            raise utils.UserError(f"{self.path}: could not be written ({error.strerror}); make room on the disk and "
                                  "run the same command again") from None
        self.written[ids] = True

    @staticmethod
    def _put(file, content, offset):
        """Not through a memory map: a full disk would end the process, not raise."""
        while content:
            n = os.pwrite(file.fileno(), content, offset)  # a part only, when the disk is almost full
            content, offset = content[n:], offset + n


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
