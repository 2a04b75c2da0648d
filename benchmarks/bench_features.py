"""Are features computed as fast as the networks allow, and with how little memory? c, z and g, written to real files.

    python benchmarks/bench_features.py                                      # the demo's tiny models, 64 x 64 stimuli
    python benchmarks/bench_features.py --sd_model random --images 16        # SD 1.4's and CLIP ViT-B/32's sizes, NSD's

Makes stimuli and captions of random content (no two captions the same), and measures write_blocks of features/, which
reads them from the file and writes rows to files. For each feature, in one process, taking turns:
  script    blocks as img2feat.py makes them
  network   its network alone, on tensors that are there, in the same batches; nothing is read, kept or written
  one       one image at a time through the same code: batches and blocks of 1
Prints images/s of the script, script / network (wanted >= .9), script / one (wanted >= 3), and the peak of anonymous
memory of the script beyond the network (wanted < 2 GB; its readers' memory is not counted). Loading is left out.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import h5py
import numpy as np
import torch
from diffusers import AutoencoderKL
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModel

import options
import utils
from bench_train import anonymous, peak_anonymous, reset_peak, synchronise
from disk.names import Paths
from features.extraction import write_blocks
from features.files import FeatureFile, create_file
from features.makers import VAE_PIXELS, Latents, TextFeatures, VisionFeatures
from nsd.captions import load_captions
from nsd.rows import open_stimuli
from training.team import Team

DEMO = Path(__file__).resolve().parent.parent / "demo" / "models"
GROUPS = {"c": ["c"], "z": ["z"], "g": ["g_2", "g_4", "g_6", "g_8", "g_10", "g_12"]}


def get_parser():
    parser = options.Parser(__doc__)
    parser.add_argument("--feats", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--sd_model", default=str(DEMO / "sd"), metavar="NAME|DIR|random",
                        help="random: Stable Diffusion 1.4's and CLIP ViT-B/32's sizes with random weights")
    parser.add_argument("--clip_model", default=str(DEMO / "clip"), metavar="NAME|DIR")
    parser.add_argument("--images", type=options.whole, default=1024, metavar="IMAGES", help="of script and network")
    parser.add_argument("--single_images", type=options.whole, metavar="IMAGES", help="of one (a quarter)")
    parser.add_argument("--rounds", type=options.whole, default=3, metavar="N")
    parser.add_argument("--batch_size", type=options.whole, default=32, metavar="IMAGES")
    parser.add_argument("--num_workers", type=options.whole, default=2, metavar="PROCESSES")
    parser.add_argument("--device", default="auto", metavar="NAME")
    parser.add_argument("--folder", metavar="DIR", help="where the files are made, and kept (a temporary folder)")
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        paths = Paths(Path(args.folder or temporary), Path(args.folder or temporary))
        if not args.folder:
            print(f"{utils.pick_device(args.device)}, {torch.get_num_threads()} threads, batches of {args.batch_size}\n"
                  f"{'':4}{'images/s':>10}{'/ network':>11}{'/ one':>8}{'memory':>10}", flush=True)
        if not (paths.stimuli / "nsd_stimuli.hdf5").exists():
            write_stimuli(paths, args.images, 425 if args.sd_model == "random" else 64)
        if args.sd_model == "random":
            args.sd_model, args.clip_model = write_random_models(paths.root / "models")
        if len(args.feats) == 1:
            return measure(args, paths, args.feats[0])
        words = sys.argv[1:] if argv is None else argv
        for feat in args.feats:  # a process each: memory is the process's
            subprocess.run([sys.executable, __file__, *words, "--folder", str(paths.root), "--feats", feat], check=True)


def write_stimuli(paths, n, side):
    rng = np.random.default_rng(0)
    for folder in (paths.stimuli / "annotations", paths.experiments):
        folder.mkdir(parents=True)
    with h5py.File(paths.stimuli / "nsd_stimuli.hdf5", "w") as file:
        images = file.create_dataset("imgBrick", (n, side, side, 3), np.uint8)
        for i in range(n):
            images[i] = rng.integers(0, 256, (side, side, 3), np.uint8)
    lines = [",cocoId,cocoSplit,cropBox,nsdId", *(f"{i},{i},train2017,\"(0, 0, 0, 0)\",{i}" for i in range(n))]
    (paths.experiments / "nsd_stim_info_merged.csv").write_text("\n".join(lines) + "\n")
    scene = "a photo of some red or green thing on the old street number"
    captions = {str(i): [f"{scene} {5 * i + k}" for k in range(5)] for i in range(n)}
    (paths.stimuli / "annotations/nsd_captions.json").write_text(json.dumps(captions))


def write_random_models(folder):
    """Folders of a Stable Diffusion (what features need of it) and a CLIP, of the real sizes."""
    sd, clip = folder / "sd", folder / "clip"
    if not clip.exists():
        torch.manual_seed(0)
        CLIPTokenizer.from_pretrained(DEMO / "sd/tokenizer", model_max_length=77).save_pretrained(sd / "tokenizer")
        text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        CLIPTextModel(text).save_pretrained(sd / "text_encoder")
        AutoencoderKL(block_out_channels=[128, 256, 512, 512], down_block_types=["DownEncoderBlock2D"] * 4,
                      up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, sample_size=512,
                      scaling_factor=0.18215).save_pretrained(sd / "vae")
        (sd / "unet").mkdir()
        (sd / "unet/config.json").write_text('{"sample_size": 64}')
        CLIPVisionModel(CLIPVisionConfig()).save_pretrained(clip)
    return str(sd), str(clip)


def measure(args, paths, group):
    """Print a line of figures about one group of features."""
    utils.reproducible_products()
    team = Team(utils.pick_device(args.device))
    sources = {"c": lambda: (TextFeatures, load_captions(paths), args.sd_model),
               "z": lambda: (Latents, open_stimuli(paths), args.sd_model),
               "g": lambda: (VisionFeatures, GROUPS["g"], open_stimuli(paths), args.clip_model)}
    kind, *source = sources[group]()
    maker, single = (kind(*source, batch_size, team.device) for batch_size in (args.batch_size, 1))
    single.block_size = 1
    network = maker.load()
    resident = anonymous()
    reset_peak()
    n_single = min(args.single_images or max(1, args.images // 4), len(maker))

    def write(maker, n):
        """Seconds in which the script makes the features of the first n images."""
        for feat in maker.feats:
            create_file(paths.feature(feat), len(maker), maker.row_shape(network), "float16", maker)
        files = {feat: FeatureFile(paths.feature(feat)) for feat in maker.feats}
        blocks = np.split(np.arange(n), range(maker.block_size, n, maker.block_size))
        start = time.perf_counter()
        write_blocks(maker, network, blocks, files, args.num_workers, team.device)
        return time.perf_counter() - start

    @torch.inference_mode()
    def forward(n):
        """Seconds of the network's calls alone for the first n images."""
        blocks = np.split(np.arange(n), range(maker.block_size, n, maker.block_size))
        seconds = 0.0
        for ids in tqdm(blocks, desc=f"{group}, network", unit="block", leave=False):
            item = maker.read(ids)
            if group == "c":
                batches, call = item[0].to(team.device).split(args.batch_size), network
            elif group == "z":
                batches = (maker.on_device(item) * 2 - 1).split(max(1, VAE_PIXELS // maker.side**2))
                call = network.encode
            else:
                batches, call = [maker.on_device(item)], network
            synchronise(team.device)
            start = time.perf_counter()
            for batch in batches:
                call(batch)
            synchronise(team.device)
            seconds += time.perf_counter() - start
        return seconds

    write(maker, args.images)  # before anything else that could leave memory behind; it warms up, too
    peak = peak_anonymous() - resident
    write(single, 1), forward(min(args.batch_size, len(maker)))
    seconds = {"script": 0.0, "network": 0.0, "one": 0.0}
    for _ in range(args.rounds):
        seconds["script"] += write(maker, args.images)
        seconds["network"] += forward(args.images)
        seconds["network"] += forward(args.images)  # A B B A: a machine that slows down slows both
        seconds["script"] += write(maker, args.images)
        seconds["one"] += write(single, n_single)
    per_image = {"script": seconds["script"] / 2 / args.images, "network": seconds["network"] / 2 / args.images,
                 "one": seconds["one"] / n_single}
    per_image = {what: value / args.rounds for what, value in per_image.items()}
    print(f"{group:4}{1 / per_image['script']:10.2f}{per_image['network'] / per_image['script']:11.3f}"
          f"{per_image['one'] / per_image['script']:8.2f}{peak / 1e9:7.2f} GB", flush=True)


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
