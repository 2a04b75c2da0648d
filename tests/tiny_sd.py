"""Random-weights models of a few kilobytes in the real folder formats, for the tests of sampling."""

import functools
import json

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModel

from sampling.pipeline import load_pipeline

TOKENS, WIDTH, LATENT = 7, 16, 8  # text tokens, their width, latent side (the image is 16 x 16)
load_once = functools.cache(load_pipeline)


def hasten(monkeypatch, at_once):
    """For tests that call recon.py's main: networks are read from disk once, and a CPU draws `at_once` pictures, as
    many as the test has, where of these tiny ones it would take 64."""
    monkeypatch.setattr("sampling.pipeline.load_pipeline", load_once)
    draw_at_once(monkeypatch, at_once)


def draw_at_once(monkeypatch, pictures):
    monkeypatch.setattr("sampling.pipeline.CPU_BATCH", pictures * LATENT**2)


def write_tiny_sd(folder):
    """A Stable Diffusion folder with SD 1.4's own scheduler settings (PNDM); returns the folder."""
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=[8, 16], down_block_types=["DownEncoderBlock2D"] * 2,
                        up_block_types=["UpDecoderBlock2D"] * 2, layers_per_block=1, norm_num_groups=4,
                        sample_size=2 * LATENT, scaling_factor=0.5)
    unet = UNet2DConditionModel(
        sample_size=LATENT, block_out_channels=[8, 16], layers_per_block=1, norm_num_groups=4,
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"], up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
        cross_attention_dim=WIDTH, attention_head_dim=4)
    tokenizer = _tokenizer(folder)
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=TOKENS, eos_token_id=tokenizer.eos_token_id))
    scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
                              set_alpha_to_one=False, steps_offset=1)
    StableDiffusionPipeline(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
                            safety_checker=None, feature_extractor=None,
                            requires_safety_checker=False).save_pretrained(folder)
    return folder


def write_tiny_clip(folder, blocks=2):
    """A CLIP vision model: 32 x 32 images, 5 tokens of width 12."""
    torch.manual_seed(1)
    CLIPVisionModel(CLIPVisionConfig(hidden_size=12, intermediate_size=24, num_hidden_layers=blocks,
                                     num_attention_heads=2, image_size=32, patch_size=16)).save_pretrained(folder)
    return folder


def _tokenizer(folder):
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [*"ab", "a</w>", "b</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate([*tokens, "ab</w>"])}))
    return CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"),
                         model_max_length=TOKENS, pad_token="<|endoftext|>")
