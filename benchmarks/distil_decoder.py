"""Distil the decoder of a Stable Diffusion folder into a TAESD (AutoencoderTiny), for --guidance_decoder.

    python benchmarks/distil_decoder.py --root demo --sd_model demo/models/sd --out demo/tiny_work/taesd

Where TAESD's own weights cannot be downloaded, or the VAE is not Stable Diffusion's. Learns to decode z_all.hdf5's
latents of images that no subject sees in the test split, as the VAE does; half of them are mixtures of two images,
since what guidance decodes early on is blurred. Prints the error on latents that were not trained on.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from tqdm import tqdm

import options
import utils
from disk.names import Paths
from nsd.rows import open_feature
from nsd.trials import list_subjects, load_trials
from sampling.pipeline import load_pipeline


def get_parser():
    parser = options.Parser(__doc__)
    options.add_paths(parser)
    parser.add_argument("--sd_model", required=True, metavar="NAME|DIR", help="whose VAE is imitated")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the AutoencoderTiny goes")
    parser.add_argument("--width", type=options.whole, default=32, metavar="CHANNELS", help="TAESD has 64")
    parser.add_argument("--blocks", type=options.whole, default=3, metavar="N", help="per size but the last (TAESD: 3)")
    parser.add_argument("--steps", type=options.whole, default=2500, metavar="N")
    parser.add_argument("--batch_size", type=options.whole, default=32, metavar="IMAGES")
    parser.add_argument("--max_lr", type=float, default=2e-3, metavar="LR")
    options.add_compute(parser)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    paths, device = Paths.from_args(args), utils.pick_device(args.device)
    utils.seed_everything(args.seed)
    pipe = load_pipeline(args.sd_model, device)
    latents = open_feature(paths, "z")
    tested = {i for subj in list_subjects(paths) for i in load_trials(paths, subj, "new_test")["image_id"]}
    ids = np.random.default_rng(args.seed).permutation([i for i in range(len(latents)) if i not in tested])
    held_out, ids = ids[:100], ids[100:]

    levels = len(pipe.vae.config.block_out_channels)  # each but the first doubles the side
    tiny = AutoencoderTiny(
        encoder_block_out_channels=[args.width] * levels, decoder_block_out_channels=[args.width] * levels,
        num_encoder_blocks=[1] * levels, num_decoder_blocks=[*[args.blocks] * (levels - 1), 1],
        latent_channels=pipe.vae.config.latent_channels).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(tiny.decoder.parameters(), lr=args.max_lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.max_lr, total_steps=args.steps)
    bar = tqdm(range(args.steps), desc="distil", mininterval=5)
    for _ in bar:
        z = read(latents, np.random.choice(ids, args.batch_size), device)
        share = torch.rand(len(z), 1, 1, 1, device=device).where(torch.rand(len(z), 1, 1, 1, device=device) < 0.5, 1.0)
        loss = error(tiny, pipe, share * z + (1 - share) * z.roll(1, 0))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(mse=f"{loss.item():.4f}", refresh=False)
    with torch.no_grad():
        mse = error(tiny.eval(), pipe, read(latents, np.sort(held_out), device)).item()
    tiny.half().save_pretrained(args.out)
    print(f"{args.out}: differs from the VAE by {10 * np.log10(4 / mse):.1f} dB PSNR on {len(held_out)} other latents")


def read(latents, ids, device):
    return torch.from_numpy(latents[ids].astype(np.float32)).to(device)


def error(tiny, pipe, z):
    """Mean squared difference of the two decodings of latents (B, C, h, w), in [-1, 1]."""
    with torch.no_grad():
        wanted = pipe.decode(z) * 2 - 1
    return F.mse_loss(tiny.decode(z).sample, wanted)


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
