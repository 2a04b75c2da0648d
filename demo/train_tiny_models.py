"""Train the demo's models: a CLIP, a VAE and a Stable-Diffusion-shaped pipeline for 64 x 64 drawn scenes.

They stand where openai/clip-vit and CompVis/stable-diffusion-v1-4 stand on real data: same classes, same folder layout,
loaded by the same from_pretrained calls. The training scenes come from a seed that mini-NSD does not use.

    python demo/train_tiny_models.py                       # everything: about six hours on one CPU core
    python demo/train_tiny_models.py --stage unet --steps 40000
    python demo/train_tiny_models.py --stage card          # measure, and write demo/models/README.md

Stages gnet and adapter train the brain encoding model and the adapter of g and z, by the pipeline itself and on
mini-NSD, and stage taesd the small decoder of the VAE's latents, on its features: both must be there (demo.sh). Each
other stage continues from its last checkpoint in --workdir and exports to --outdir when it is done. --init FOLDER
starts from the weights of other such models wherever a tensor's name and shape agree.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer

import judge
from scenes import ATTRIBUTES, KINDS, NO_SECOND, caption, captions, describe, render, sample_scene, vocabulary

HERE = Path(__file__).resolve().parent
SIZE = 64  # image side, pixels
TOKENS = 24  # text length; the longest sentence has 21 words
N_CAPTIONS = 5  # captions of an image that are averaged into c
LEARNED_LAST = ("pattern", "pattern", "second", "second")  # so hard negatives differ in them three times as often
STAGES = ("vae", "decoder", "clip", "unet", "details", "judge", "gnet", "taesd", "adapter", "card")
TRAIN_SEED, HELD_OUT_SEED = 1_000_001, 1_000_002  # mini-NSD draws from other seeds


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--stage", default="all", choices=["all", *STAGES])
    parser.add_argument("--steps", type=int, help="optimizer steps of the stage (default: the stage's own)")
    parser.add_argument("--n_scenes", type=int, default=60_000, help="distinct training scenes")
    parser.add_argument("--workdir", type=Path, default=HERE / "tiny_work", help="caches and checkpoints")
    parser.add_argument("--outdir", type=Path, default=HERE / "models", help="where the finished models go")
    parser.add_argument("--init", type=Path, metavar="FOLDER", help="models to start from, laid out as --outdir is")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    args.workdir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    stages = dict(zip(STAGES, (train_vae, train_decoder, train_clip, train_unet, train_details, train_judge, train_gnet,
                               train_taesd, train_adapter, write_card), strict=True))
    for stage in STAGES if args.stage == "all" else (args.stage,):
        stages[stage](args)


# --- data ---------------------------------------------------------------------------------------------------------


def draw_scenes(args, n, seed):
    """`n` scenes; returns (list of Scene, (n, SIZE, SIZE, 3) uint8), the pictures kept in the workdir."""
    rng = np.random.default_rng(seed)
    return cached_renders(args, [sample_scene(rng) for _ in range(n)], f"scenes_{seed}_{n}")


def draw_groups(args, n, seed, size=4):
    """`n` scenes in groups that differ in one attribute, hard negatives of each other; returned as draw_scenes does."""
    rng, scenes = np.random.default_rng(seed), []
    while len(scenes) < n:
        name = rng.choice([*ATTRIBUTES, *LEARNED_LAST])
        base = sample_scene(rng, second_probability=1.0 if name == "second" else 0.5)
        scenes += [base, *(borrow(base, sample_scene(rng), name) for _ in range(size - 1))]
    return cached_renders(args, scenes, f"groups_{seed}_{n}")


def borrow(scene, other, name):
    """`scene` with the attribute `name` of `other`, drawn accordingly; a second object, which `other` may lack, gets
    kind and colour of its main one."""
    changed = varied(scene, name, other.main.kind if name == "second" else other.attributes[name])
    main = replace(changed.main, **{"place": {"x": other.main.x}, "size": {"size": other.main.size}}.get(name, {}))
    second = replace(changed.second, colour=other.main.colour) if name == "second" else changed.second
    return replace(changed, main=main, second=second, texture=other.texture)


def varied(scene, name, value):
    """`scene` with another value of an attribute, in words: what is drawn for place and size stays."""
    if name in ("kind", "colour", "pattern"):
        return replace(scene, main=replace(scene.main, **{name: value}))
    return replace(scene, **{name: replace(scene.second, kind=value) if name == "second" else value})


def cached_renders(args, scenes, name):
    path = args.workdir / f"{name}.npy"
    if not path.exists():
        pictures = np.stack([render(scene, SIZE) for scene in tqdm(scenes, desc="scenes", leave=False, mininterval=9)])
        np.save(path.with_suffix(".tmp.npy"), pictures)
        os.replace(path.with_suffix(".tmp.npy"), path)
    return scenes, np.load(path)


def start_from(model, folder, cls):
    """Copy the tensors that a model saved in `folder` shares with `model` by name and shape; None: copy nothing."""
    if folder is None:
        return
    ours, theirs = model.state_dict(), cls.from_pretrained(folder).state_dict()
    same = {key: value for key, value in theirs.items() if key in ours and ours[key].shape == value.shape}
    model.load_state_dict(ours | {key: value.float() for key, value in same.items()})
    print(f"{folder}: {len(same)} of {len(ours)} tensors copied")


def to_tensor(images):
    """(B, H, W, 3) uint8 array -> (B, 3, H, W) float in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255


def build_tokenizer(folder):
    """Write and load a CLIP tokenizer in which every caption word is one token."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = alphabet + [letter + "</w>" for letter in alphabet]
    merges = []
    for word in vocabulary():  # a merge added later has lower priority, so it cannot break a word that is whole
        pieces = [*word[:-1], word[-1] + "</w>"]
        for pair in merges:
            pieces = _merge(pieces, pair)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = _merge(pieces, merges[-1])
    tokens += list(dict.fromkeys(a + b for a, b in merges))
    special = ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens + special)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n")
    tokenizer = CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"),
                              model_max_length=TOKENS, pad_token="<|endoftext|>")
    for word in vocabulary():
        assert len(tokenizer(word).input_ids) == 3, f"{word} is not one token: {tokenizer.tokenize(word)}"
    return tokenizer


def _merge(pieces, pair):
    """Join every occurrence of the adjacent `pair` in a list of word pieces."""
    joined = []
    for piece in pieces:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def tokenize(tokenizer, texts):
    return tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt").input_ids


# --- the loop shared by the three trainings -----------------------------------------------------------------------


def optimise(name, model, loss_of_step, args, steps, lr, ema_decay=None):
    """AdamW, warm-up and cosine decay, bf16 autocast, resumable; returns the (EMA) state dict.

    loss_of_step(step, generator) -> scalar loss.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2, betas=(0.9, 0.99))
    path, start = args.workdir / f"{name}.pt", 0
    ema = {k: v.clone() for k, v in model.state_dict().items()} if ema_decay else None
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start, ema = saved["step"], saved["ema"]
    mean_loss, last_save = None, time.time()
    progress = tqdm(range(start, steps), desc=name, initial=start, total=steps, mininterval=20)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 300) * (0.5 + 0.5 * math.cos(math.pi * step / steps)) + 1e-6
        # the CPU's fused attention is several times slower backwards than plain matrix products on so few tokens
        with sdpa_kernel(SDPBackend.MATH):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of_step(step, torch.Generator().manual_seed(args.seed * 10**9 + step))
            optimizer.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if ema is not None:
            decay = min(ema_decay, (step + 1) / (step + 10))
            for key, value in model.state_dict().items():
                ema[key].lerp_(value, 1 - decay) if value.is_floating_point() else ema[key].copy_(value)
        mean_loss = loss.item() if mean_loss is None else 0.99 * mean_loss + 0.01 * loss.item()
        progress.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
        if step + 1 == steps or time.time() - last_save > 120:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1, "ema": ema}
            torch.save(state, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
            last_save = time.time()
    return ema or model.state_dict()


# --- CLIP ---------------------------------------------------------------------------------------------------------


def train_clip(args):
    """A 12-block vision tower and a 4-block text tower, until the UNet can start on the latter."""
    tokenizer = build_tokenizer(args.outdir / "clip")
    eos = tokenizer.eos_token_id
    config = CLIPConfig(
        projection_dim=64,
        vision_config=dict(hidden_size=96, intermediate_size=384, num_hidden_layers=12, num_attention_heads=6,
                           image_size=SIZE, patch_size=16, projection_dim=64),
        text_config=dict(hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
                         vocab_size=len(tokenizer), max_position_embeddings=TOKENS, bos_token_id=eos - 1,
                         eos_token_id=eos, pad_token_id=eos, projection_dim=64),
    )
    model = CLIPModel(config)
    start_from(model, args.init and args.init / "clip", CLIPModel)
    contrast(args, "clip", model, tokenizer, args.steps or 3000)


def train_details(args):
    """The CLIP goes on until it tells patterns and second objects; the UNet keeps the text tower that it learned with.
    """
    folder = args.outdir / "clip"
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    contrast(args, "details", model, CLIPTokenizer.from_pretrained(folder), args.steps or 6000)


def contrast(args, stage, model, tokenizer, steps):
    """Train a CLIPModel on pictures and sentences (Radford et al. 2021) and export it."""
    processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=SIZE)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (processor.image_mean, processor.image_std))
    scenes, images = draw_groups(args, args.n_scenes, TRAIN_SEED)
    values = np.array([[ATTRIBUTES[name].index(value) for name, value in scene.attributes.items()] for scene in scenes])
    optional = [name for name in ATTRIBUTES if name not in ("setting", "kind")]

    def loss_of_step(step, generator):
        rng = np.random.default_rng((args.seed, step))
        groups = rng.choice(len(scenes) // 4, 64, replace=False)
        rows = (4 * groups[:, None] + np.arange(4)).ravel()
        # As on the web, sentences are rich or poor: each names every attribute with a probability of its own.
        named = rng.random((len(rows), len(optional))) < rng.choice([0.4, 0.9, 1.0], (len(rows), 1))
        texts = [describe(scenes[row], [name for name, yes in zip(optional, names, strict=True) if yes], rng)
                 for row, names in zip(rows, named, strict=True)]
        pixels = (to_tensor(images[rows]) - mean) / std
        out = model(input_ids=tokenize(tokenizer, texts), pixel_values=pixels)
        # A sentence is true of every picture that has what it names; the targets are uniform over those.
        said = np.concatenate([np.ones((len(rows), 2), bool), named], axis=1)
        said[:, -1] &= values[rows, -1] < len(KINDS)  # no sentence says that there is no second object
        order = [list(ATTRIBUTES).index(name) for name in ("setting", "kind", *optional)]
        code = values[rows][:, order]
        true_of = torch.from_numpy(((code[:, None] == code[None]) | ~said[:, None]).all(2)).float()  # (texts, pictures)
        logits = out.logits_per_text.float()
        return (F.cross_entropy(logits, true_of / true_of.sum(1, keepdim=True))
                + F.cross_entropy(logits.T, (true_of / true_of.sum(0)).T)) / 2

    model.load_state_dict(optimise(stage, model, loss_of_step, args, steps, 1e-3))
    for part in (tokenizer, processor, model.half()):
        part.save_pretrained(args.outdir / "clip")


# --- VAE ----------------------------------------------------------------------------------------------------------


def train_vae(args):
    """Autoencoder 64 x 64 x 3 -> 16 x 16 x 4 (L1 + MSE + a weak KL); its scaling_factor makes latents unit variance."""
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[24, 48, 64], layers_per_block=1, norm_num_groups=8, sample_size=SIZE,
        mid_block_add_attention=False,
    ).to(memory_format=torch.channels_last)
    start_from(vae, args.init and args.init / "sd" / "vae", AutoencoderKL)
    _, images = draw_scenes(args, args.n_scenes, TRAIN_SEED)

    def loss_of_step(step, generator):
        rows = torch.randint(len(images), (16,), generator=generator).numpy()
        image = to_tensor(images[rows]).mul(2).sub(1).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(image).latent_dist
        error = vae.decode(posterior.sample(generator)).sample.float() - image
        return error.abs().mean() + error.square().mean() + 1e-3 * posterior.kl().mean() / posterior.mean[0].numel()

    vae.load_state_dict(optimise("vae", vae, loss_of_step, args, args.steps or 2160, 1.5e-3, ema_decay=0.995))
    latents = encode(vae, images[:2000])
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    vae.half().save_pretrained(args.outdir / "sd" / "vae")


def train_decoder(args):
    """The decoder alone, which leaves the latents as they are: absolute errors of pixels and of their differences.

    So the UNet can be trained meanwhile.
    """
    vae = AutoencoderKL.from_pretrained(args.outdir / "sd" / "vae", torch_dtype=torch.float32)
    vae.to(memory_format=torch.channels_last)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    _, images = draw_scenes(args, args.n_scenes, TRAIN_SEED)

    def loss_of_step(step, generator):
        rows = torch.randint(len(images), (16,), generator=generator).numpy()
        image = to_tensor(images[rows]).mul(2).sub(1).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            latent = vae.encode(image).latent_dist.mean
        error = vae.decode(latent).sample.float() - image
        return error.abs().mean() + error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()

    vae.load_state_dict(optimise("decoder", vae, loss_of_step, args, args.steps or 3000, 1e-3, ema_decay=0.995))
    vae.half().save_pretrained(args.outdir / "sd" / "vae")


@torch.no_grad()
def encode(vae, images):
    """(N, H, W, 3) uint8 -> (N, 4, h, w) float posterior means, without the scaling factor."""
    out = []
    for start in tqdm(range(0, len(images), 64), desc="encode", leave=False):
        with torch.autocast("cpu", torch.bfloat16):
            out.append(vae.encode(to_tensor(images[start:start + 64]) * 2 - 1).latent_dist.mean.half())
    return torch.cat(out).float()


# --- UNet ---------------------------------------------------------------------------------------------------------


def unet_data(args, tokenizer, text_encoder, vae):
    """Scaled latents (N, 4, h, w) and caption embeddings (N, N_CAPTIONS, T, D), float16, cached in the workdir."""
    path = args.workdir / "unet_data.pt"
    if not path.exists():
        scenes, images = draw_scenes(args, args.n_scenes, TRAIN_SEED)
        latents = (encode(vae, images) * vae.config.scaling_factor).half()
        rng, embeddings = np.random.default_rng(args.seed), []
        with torch.no_grad():
            for start in tqdm(range(0, len(scenes), 100), desc="captions", leave=False):
                texts = [t for scene in scenes[start:start + 100] for t in captions(scene, rng, N_CAPTIONS)]
                hidden = text_encoder(tokenize(tokenizer, texts)).last_hidden_state
                embeddings.append(hidden.half().unflatten(0, (-1, N_CAPTIONS)))
        torch.save({"latents": latents, "embeddings": torch.cat(embeddings)}, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
    return torch.load(path, weights_only=True, mmap=True).values()


def text_tower(args):
    """CLIP's text tower and tokenizer as the UNet first found them, kept in the workdir: the CLIP goes on, and the UNet
    stays with what it learned."""
    folder = args.workdir / "text_tower"
    if not folder.exists():
        clip, unfinished = args.outdir / "clip", args.workdir / "text_tower.tmp"
        for part in (CLIPTextModel.from_pretrained(clip, dtype=torch.float32), CLIPTokenizer.from_pretrained(clip)):
            part.save_pretrained(unfinished)
        os.replace(unfinished, folder)
    return CLIPTextModel.from_pretrained(folder, dtype=torch.float32).eval(), CLIPTokenizer.from_pretrained(folder)


def train_unet(args):
    """Noise prediction (Ho et al. 2020) conditioned on single captions and on means over several.

    As c is a mean over an image's captions and will be decoded with error, the UNet sees both means and a little noise
    on the condition. The loss is weighted by min-SNR (Hang et al. 2023, gamma 5).
    """
    sd = args.outdir / "sd"
    text_encoder, tokenizer = text_tower(args)
    vae = AutoencoderKL.from_pretrained(sd / "vae", torch_dtype=torch.float32).eval()
    latents, embeddings = unet_data(args, tokenizer, text_encoder, vae)
    with torch.no_grad():
        empty = text_encoder(tokenize(tokenizer, [""])).last_hidden_state
    # beta_end above Stable Diffusion's 0.012: on a 16 x 16 latent its last step still shows the picture's mean colour
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.02, beta_schedule="scaled_linear", clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1)
    unet = UNet2DConditionModel(
        sample_size=latents.shape[-1], block_out_channels=[64, 96, 112], layers_per_block=1, norm_num_groups=16,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        cross_attention_dim=embeddings.shape[-1], attention_head_dim=4,
    ).to(memory_format=torch.channels_last)
    start_from(unet, args.init and args.init / "sd" / "unet", UNet2DConditionModel)
    print(f"UNet: {sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M parameters")
    abar = scheduler.alphas_cumprod

    def loss_of_step(step, generator):
        batch = 64
        rows = torch.randint(len(latents), (batch,), generator=generator)
        x0 = latents[rows].float()
        count = torch.tensor([1, N_CAPTIONS])[torch.randint(2, (batch,), generator=generator)]  # captions averaged
        weight = (torch.arange(N_CAPTIONS) < count[:, None]).float() / count[:, None]
        condition = torch.einsum("bk,bktd->btd", weight, embeddings[rows].float())
        level = 0.3 * torch.rand(batch, 1, 1, generator=generator)
        condition = condition + level * torch.randn(condition.shape, generator=generator)
        dropped = torch.rand(batch, 1, 1, generator=generator) < 0.1
        condition = torch.where(dropped, empty, condition)
        t = torch.randint(len(abar), (batch,), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        prediction = unet(scheduler.add_noise(x0, noise, t), t, condition).sample.float()
        snr = abar[t] / (1 - abar[t])
        return (((prediction - noise) ** 2).mean((1, 2, 3)) * (5 / snr).clamp(max=1)).mean()

    unet.load_state_dict(optimise("unet", unet, loss_of_step, args, args.steps or 6000, 8e-4, ema_decay=0.999))
    StableDiffusionPipeline(
        vae=vae.half(), text_encoder=text_encoder.half(), tokenizer=tokenizer, unet=unet.half(), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(sd)


# --- the judge ----------------------------------------------------------------------------------------------------


def train_judge(args):
    """demo/judge.py's network, on renders and on renders that went through the VAE, all a little noisy."""
    vae = AutoencoderKL.from_pretrained(args.outdir / "sd" / "vae", torch_dtype=torch.float32).eval()
    scenes, images = draw_scenes(args, args.n_scenes, TRAIN_SEED)
    decoded = cached_round_trips(args, vae, images)
    truths = judge.encode_attributes([scene.attributes for scene in scenes])  # (N, attributes)
    net = judge.Judge().to(memory_format=torch.channels_last)
    print(f"judge: {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters")

    def loss_of_step(step, generator):
        rows = torch.randint(len(images), (128,), generator=generator).numpy()
        picture = torch.cat([to_tensor(images[rows[:48]]), to_tensor(decoded[rows[48:]])])
        noise = torch.randn(picture.shape, generator=generator)
        level = 0.06 * torch.rand(len(picture), 1, 1, 1, generator=generator)
        picture = (picture + level * noise).clamp(0, 1).contiguous(memory_format=torch.channels_last)
        logits = net(picture)
        return sum(F.cross_entropy(part.float(), truths[rows, k]) for k, part in enumerate(logits))

    net.load_state_dict(optimise("judge", net, loss_of_step, args, args.steps or 3500, 2e-3, ema_decay=0.995))
    judge.save(net.eval(), args.outdir / "judge.safetensors")


def cached_round_trips(args, vae, images):
    """(N, H, W, 3) uint8: what the VAE makes of the pictures."""
    path = args.workdir / f"decoded_{len(images)}.npy"
    if not path.exists():
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            parts = []
            for start in tqdm(range(0, len(images), 100), desc="round trips", leave=False, mininterval=9):
                latents = vae.encode(to_tensor(images[start:start + 100]) * 2 - 1).latent_dist.mean
                pictures = vae.decode(latents).sample.float().add(1).mul(127.5).round().clamp(0, 255)
                parts.append(pictures.byte().permute(0, 2, 3, 1).numpy())
        np.save(path, np.concatenate(parts))
    return np.load(path)


# --- the brain encoding model -------------------------------------------------------------------------------------


def train_gnet(args):
    """GNet with one trunk for all subjects, of whom the first one's voxels are kept, in half precision: a folder of
    train_logs, as a download would be."""
    subj = "subj01"
    train = "STAGES=gnet bash scripts/train.sh --multi_subject --num_epochs 12 --precision bf16"
    subprocess.run(["bash", "-c", f"source demo/settings.sh && {train}"], cwd=HERE.parent, check=True)
    state = torch.load(HERE / "train_logs" / "gnet_multisubject" / "best.pth", weights_only=True)
    state["model"] = {key: value for key, value in state["model"].items()
                      if key.startswith(f"readouts.{subj}.") or not key.startswith("readouts.")}
    state["n_voxels"] = state["model_args"]["n_voxels"] = {subj: state["n_voxels"][subj]}
    state |= {"subjects": [subj], "val_r": {subj: state["val_r"][subj]}}
    export(state, args.outdir / f"gnet_{subj}")


def train_adapter(args):
    """The adapter of subject 1's decoded g and z, a folder of train_logs, too."""
    subprocess.run(["bash", "-c", "source demo/settings.sh && STAGES=adapter bash scripts/train.sh --precision bf16"],
                   cwd=HERE.parent, check=True)
    run = "adapter_subj01"
    export(torch.load(HERE / "train_logs" / run / "best.pth", weights_only=True), args.outdir / run)


def export(state, folder):
    """Keep a run's checkpoint in half precision."""
    state["model"] = {key: value.half() if value.is_floating_point() else value
                      for key, value in state["model"].items()}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "best.pth")


def train_taesd(args):
    """A TAESD of the VAE's decoder, as Stable Diffusion has one; its encoder, which nothing uses, is not trained."""
    subprocess.run([sys.executable, "benchmarks/distil_decoder.py", "--root", HERE, "--sd_model", args.outdir / "sd",
                    "--out", args.outdir / "taesd", "--width", "24", "--blocks", "2"], cwd=HERE.parent, check=True)


# --- the model card -----------------------------------------------------------------------------------------------


@torch.no_grad()
def told_by_clip(folder, scenes, images):
    """Return how often CLIP finds the sentence that is true of a picture among all that name another value of an
    attribute, {attribute: share}."""
    model, tokenizer = CLIPModel.from_pretrained(folder, dtype=torch.float32), CLIPTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessor.from_pretrained(folder)
    right = {name: [] for name in ATTRIBUTES}
    for scene, image in zip(tqdm(scenes, desc="sentences", leave=False), images, strict=True):
        pixels = processor(images=image, return_tensors="pt").pixel_values
        for name, true in scene.attributes.items():
            if true == NO_SECOND:
                continue
            values = [value for value in ATTRIBUTES[name] if value != NO_SECOND]
            texts = [describe(varied(scene, name, value), ATTRIBUTES, np.random.default_rng(0)) for value in values]
            logits = model(input_ids=tokenize(tokenizer, texts), pixel_values=pixels).logits_per_image[0]
            right[name].append(values[logits.argmax()] == true)
    return {name: float(np.mean(hits)) for name, hits in right.items()}


@torch.no_grad()
def write_card(args, n=400, n_judged=4000):
    """Measure the exported models on held-out scenes and write the numbers into the models' README.md.

    n_judged: scenes on which the judge is measured, half of which have a second object; of the first n the rest is.
    """
    scenes, images = draw_scenes(args, n_judged, HELD_OUT_SEED)
    rng = np.random.default_rng(HELD_OUT_SEED)
    pipe = StableDiffusionPipeline.from_pretrained(args.outdir / "sd", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(desc="text to image", leave=False)
    truths, weights = [scene.attributes for scene in scenes], args.outdir / "judge.safetensors"
    truth = to_tensor(images)
    latents = [pipe.vae.encode(part * 2 - 1).latent_dist.mean for part in truth.split(50)]
    decoded = torch.cat([pipe.vae.decode(part).sample.add(1).div(2).clamp(0, 1) for part in latents])
    psnr = -10 * torch.log10(((decoded - truth) ** 2).mean((1, 2, 3))).mean().item()
    rows = [judge.judge_images(pictures, truths, weights) for pictures in (truth, decoded)]
    scenes, images, truth, truths = scenes[:n], images[:n], truth[:n], truths[:n]
    prompts = [caption(scene, rng) for scene in scenes]
    samples = np.concatenate([
        pipe(prompts[i:i + 50], height=SIZE, width=SIZE, num_inference_steps=25, guidance_scale=5,
             generator=torch.Generator().manual_seed(i), output_type="np").images for i in range(0, n, 50)])
    rows += [judge.judge_images(torch.from_numpy(samples).permute(0, 3, 1, 2).float(), truths, weights),
             judge.chance(truths), told_by_clip(args.outdir / "clip", scenes, images)]
    size = sum(f.stat().st_size for f in args.outdir.rglob("*") if f.is_file()) / 1e6
    lines = [
        "# The demo's tiny models", "",
        "Made by `python demo/train_tiny_models.py` (scenes that are not in mini-NSD; see its docstring), measured by",
        f"`python demo/train_tiny_models.py --stage card` on {n} held-out scenes, the judge on {n_judged:,}.", "",
        f"- VAE reconstruction PSNR: {psnr:.1f} dB (wanted: 27)",
        f"- size of this folder: {size:.1f} MB (fp16)", "",
        "| found by the judge | renders | after the VAE | samples of captions | another scene | told by the CLIP |",
        "|---|---|---|---|---|---|",
        *(f"| {name} | " + " | ".join(f"{rates[name]:.1%}" for rates in rows) + " |" for name in ATTRIBUTES),
        "", "Captions always name setting and kind, seldom colour, place and second object, and nothing else.",
        "Told by the CLIP: it finds the true sentence among those that differ in the attribute alone.", "",
        "`sd/`: the Stable-Diffusion-shaped pipeline (VAE 64x64x3 -> 16x16x4, UNet, text encoder, DDIM).",
        f"`clip/`: vision tower (12 blocks, 17 tokens x 96) and text tower (4 blocks, {TOKENS} tokens x 64), which",
        "went on learning after `sd/` had taken over the text tower.",
        "`judge.safetensors`: the network of `demo/judge.py`.",
        "`gnet_subj01/`: GNet of subject 1 of the default world (one trunk for all eight subjects).",
        "`taesd/`: a small decoder of the VAE's latents, for guidance.",
        "`adapter_subj01/`: what lets the UNet draw from g and z as decoded from subject 1 of the default world.",
    ]
    (args.outdir / "README.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    grid = np.concatenate([truth.permute(0, 2, 3, 1).numpy()[:32], samples[:32]])
    grid = grid.reshape(4, 16, SIZE, SIZE, 3).transpose(0, 2, 1, 3, 4).reshape(4 * SIZE, 16 * SIZE, 3)
    Image.fromarray((grid * 255).round().astype(np.uint8)).save(args.workdir / "samples.png")


if __name__ == "__main__":
    main()
