"""Every network of the pipeline.

Shapes: B batch, V voxels, H hidden, T tokens, D width, L sequence length of the prior (2T + 1); latents (C, h, w).

Every whole model has `model_args` (JSON, from which `build_model` makes it again). MindEye2's (BrainModel, LatentModel)
also have `predict(voxels, ...)`, which returns scores by file name: nsdgeneral (the feature) and, of c and g,
retrieval.
"""

import math
import pickle
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import utils

# --- image features (what g predicts and what guides the diffusion) -----------------------------------------------


class ClipFeatures(nn.Module):
    """Features of an image inside CLIP's vision transformer: g_k (docs/method.md, Features).

    Layer k counts the linear layers of the transformer's MLPs, two per block, so k = 2, 4, ... is the output of the
    second one (`mlp.fc2`) of block k/2, before it is added to the residual stream. Only the blocks that are needed
    run, and the result is differentiable with respect to the image.
    """

    # ImageNet's statistics, not CLIP's own: NeuralDiffuser's features are made with these
    MEAN = (0.485, 0.456, 0.406)
    STD = (0.229, 0.224, 0.225)

    def __init__(self, vision_model, layers=(2, 4, 6, 8, 10, 12)):
        """vision_model: transformers CLIPVisionModel, used as it is, but frozen and in eval mode.

        Raises UserError for a layer that is odd or that the model does not have.
        """
        super().__init__()
        # a CLIPVisionModelWithProjection (and an older CLIPVisionModel) holds its transformer one level down
        self.vision = getattr(vision_model, "vision_model", vision_model).eval().requires_grad_(False)
        self.layers = tuple(sorted(int(k) for k in layers))
        self.image_size = vision_model.config.image_size
        last = 2 * vision_model.config.num_hidden_layers
        for k in self.layers:
            if k % 2 or not 2 <= k <= last:
                raise utils.UserError(f"CLIP layer {k}: wanted an even number from 2 to {last}; choose other layers")
        self.register_buffer("mean", torch.tensor(self.MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.STD).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def from_pretrained(cls, name, layers=(2, 4, 6, 8, 10, 12)):
        """Load the vision model from a folder or the Hugging Face hub; a name that does not load raises UserError."""
        from transformers import CLIPVisionModel

        try:
            model = CLIPVisionModel.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise utils.UserError(f"--clip_model {name}: no CLIP vision model could be loaded ({reason}); give a "
                                  "folder or hub id") from None
        return cls(model, layers)

    def preprocess(self, image):
        """(B, 3, H, W) in [0, 1] -> (B, 3, image_size, image_size), ImageNet-normalised."""
        if image.shape[-2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            image = F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=False)
        return (image - self.mean) / self.std

    def forward(self, image):
        """(B, 3, H, W) float in [0, 1] -> {k: (B, T, D) float32}, T = patches + 1 with the class token first."""
        hidden = self.vision.pre_layrnorm(self.vision.embeddings(self.preprocess(image)))  # (B, T, D)
        features = {}
        for k in range(2, self.layers[-1] + 1, 2):
            block = self.vision.encoder.layers[k // 2 - 1]
            hidden = hidden + block.self_attn(block.layer_norm1(hidden), attention_mask=None)[0]
            feature = block.mlp(block.layer_norm2(hidden))
            hidden = hidden + feature
            if k in self.layers:
                features[k] = feature.float()
        return features


# --- from voxels to features (c and g) ----------------------------------------------------------------------------


class VoxelEncoder(nn.Module):
    """One linear map per subject from its voxels into the space all subjects share (MindEye2's ridge)."""

    def __init__(self, n_voxels, hidden_dim):
        """n_voxels: {subject: V}; the order of the dict is the order of `linears`."""
        super().__init__()
        self.n_voxels = dict(n_voxels)
        self.subjects = list(n_voxels)
        self.linears = nn.ModuleList(nn.Linear(v, hidden_dim) for v in n_voxels.values())

    def forward(self, voxels):
        """{subject: (b, V)} -> (B, H), the subjects' rows one after the other in the given order.

        Raises KeyError naming a subject that has no head.
        """
        return torch.cat([self.head(subject)(x) for subject, x in voxels.items()])

    def head(self, subject):
        if subject not in self.subjects:
            raise KeyError(f"{subject}: no voxel encoder; this model has {', '.join(self.subjects)}")
        return self.linears[self.subjects.index(subject)]


class BrainNetwork(nn.Module):
    """MindEye2's backbone: residual MLP blocks, then one linear map to all tokens and a projector.

    Two outputs, because two losses would pull one apart: backbone tokens condition the diffusion prior, contrast
    tokens are trained to retrieve the image.
    """

    def __init__(self, hidden_dim, tokens, width, n_blocks=4, dropout=0.15):
        super().__init__()
        self.shape = (tokens, width)
        # differs from MindEye2: its mixer keeps two residual streams, and mixes the latter over a sequence of length
        # one, whose layer norm is zero; what leaves that stream is the input plus a constant, so that its blocks
        # never reach the output. Here there is one residual stream, and no mixing over a single position.
        self.blocks = nn.ModuleList(mixer_block(hidden_dim, dropout) for _ in range(n_blocks))
        self.to_tokens = nn.Linear(hidden_dim, tokens * width)
        self.projector = projector(width)

    def forward(self, x):
        """(B, H) -> backbone (B, T, D), contrast (B, T, D)."""
        for block in self.blocks:
            x = x + block(x)
        backbone = self.to_tokens(x).unflatten(-1, self.shape)  # (B, H) -> (B, T, D)
        return backbone, self.projector(backbone)


def mixer_block(dim, dropout):
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(dim, dim)
    )


def projector(width):
    """Make three times layer norm, GELU, linear, which act on every token alone."""
    layers = [(nn.LayerNorm(width), nn.GELU(), nn.Linear(width, width)) for _ in range(3)]
    return nn.Sequential(*[module for group in layers for module in group])


# --- the diffusion prior ------------------------------------------------------------------------------------------


class PriorAttention(nn.Module):
    """Self-attention of the prior: cosine similarity, many query heads on one key/value head, one null key."""

    TEMPERATURE = 16.0  # logits are 16 * cosine + bias

    def __init__(self, width, heads, dim_head):
        super().__init__()
        self.heads, self.dim_head = heads, dim_head
        self.norm = nn.LayerNorm(width, bias=False)
        self.to_q = nn.Linear(width, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(width, 2 * dim_head, bias=False)
        self.null_kv = nn.Parameter(torch.randn(2, dim_head))  # something to attend to when nothing else matters
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, width, bias=False), nn.LayerNorm(width, bias=False))

    def forward(self, x, bias, rotary):
        """x (B, L, D), bias (heads, L, L + 1), rotary from `rotary_table` -> (B, L, D)."""
        x = self.norm(x)
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, L, d)
        k, v = self.to_kv(x).unsqueeze(1).chunk(2, dim=-1)  # (B, 1, L, d)
        q, k = rotate(q, rotary), rotate(k, rotary)
        null_k, null_v = self.null_kv.to(k.dtype).expand(len(x), 1, 2, -1).split(1, dim=2)  # (B, 1, 1, d)
        k, v = torch.cat([null_k, k], dim=2), torch.cat([null_v, v], dim=2)  # (B, 1, L + 1, d)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        # fused kernels in half precision want channels by the eight. 52 of them and 4 zeros have the same products
        q, k, v = (F.pad(t, (0, -self.dim_head % 8)) for t in (q, k, v))
        k, v = (t.expand(-1, self.heads, -1, -1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=self.TEMPERATURE)
        out = out[..., : self.dim_head]  # (B, heads, L, d)
        return self.to_out(out.transpose(1, 2).flatten(2))


class PriorFeedForward(nn.Module):
    """SwiGLU: gate and value four times as wide as the stream."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width, bias=False)
        self.expand = nn.Linear(width, 8 * width, bias=False)
        self.contract = nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        value, gate = self.expand(self.norm(x)).chunk(2, dim=-1)
        return self.contract(value * F.silu(gate))


def rotary_table(length, dim):
    """Return cos and sin (L, dim/2) of rotary positions: pair i at position p turns by p / 10000^(2i/dim)."""
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    angles = torch.arange(length)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x, rotary):
    """Turn the leading channels of x (..., L, d) by their position; the channels beyond the table stay."""
    cos, sin = rotary.to(x.dtype)
    first, second, rest = x.split([cos.shape[-1], cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], dim=-1)


def sinusoidal(t, dim):
    """Embed timesteps (B,) as (B, dim): sines, then cosines, of geometrically spaced frequencies (dim is even)."""
    half = dim // 2
    frequencies = 10000.0 ** (-torch.arange(half, device=t.device) / max(1, half - 1))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class PriorNetwork(nn.Module):
    """The prior's transformer: brain tokens, a time token and noisy tokens in, clean tokens out; not causal."""

    def __init__(self, tokens, width, depth=6, dim_head=52):
        super().__init__()
        self.tokens, self.width = tokens, width
        heads = max(1, width // dim_head)
        length = 2 * tokens + 1
        self.time_mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, 2 * width), nn.SiLU(),
            nn.Linear(2 * width, width),
        )
        self.null_brain = nn.Parameter(torch.randn(tokens, width))
        self.null_noisy = nn.Parameter(torch.randn(tokens, width))
        self.position = nn.Parameter(torch.randn(tokens, width) * width**-0.5)  # of the noisy tokens
        # differs from MindEye2: one bias per offset, shared by the layers. MindEye2's logarithmic buckets are those
        # of a causal model: every later token falls into the same one, though here tokens see both ways.
        self.offset_bias = nn.Parameter(torch.zeros(heads, 2 * length - 1))
        positions = torch.arange(length)
        self.register_buffer("offsets", positions[None, :] - positions[:, None] + length - 1, persistent=False)
        self.register_buffer("rotary", rotary_table(length, min(32, dim_head)), persistent=False)
        self.attentions = nn.ModuleList(PriorAttention(width, heads, dim_head) for _ in range(depth))
        self.feedforwards = nn.ModuleList(PriorFeedForward(width) for _ in range(depth))
        self.out = nn.Sequential(nn.LayerNorm(width, bias=False), nn.Linear(width, width, bias=False))

    def forward(self, noisy, t, brain, keep_brain=None, keep_noisy=None):
        """noisy (B, T, D) at timestep t (B,), brain (B, T, D) -> prediction of the clean tokens (B, T, D).

        keep_brain, keep_noisy: bool (B,); False replaces a sample's tokens by learned ones. None keeps all.
        """
        if keep_brain is not None:
            brain = torch.where(keep_brain[:, None, None], brain, self.null_brain.to(brain.dtype))
        if keep_noisy is not None:
            noisy = torch.where(keep_noisy[:, None, None], noisy, self.null_noisy.to(noisy.dtype))
        time = self.time_mlp(sinusoidal(t, self.width)).unsqueeze(1)  # (B, 1, D)
        x = torch.cat([brain, time.to(brain.dtype), (noisy + self.position).to(brain.dtype)], dim=1)  # (B, L, D)
        bias = F.pad(self.offset_bias[:, self.offsets], (1, 0))  # (heads, L, L + 1): none for the null key
        for attention, feedforward in zip(self.attentions, self.feedforwards, strict=True):
            x = x + attention(x, bias, self.rotary)
            x = x + feedforward(x)
        return self.out(x[:, -self.tokens :])


def cosine_schedule(timesteps):
    """Return abar (timesteps,), the share of x0 in the variance of x_t (Nichol & Dhariwal 2021, eq. 17)."""
    angles = (torch.arange(timesteps + 1, dtype=torch.float64) / timesteps + 0.008) / 1.008 * math.pi / 2
    abar = angles.cos().square()
    betas = (1 - abar[1:] / abar[:-1]).clamp(max=0.999)  # or at the last timestep nothing would be left of x0
    return (1 - betas).cumprod(0).float()


def spaced_timesteps(timesteps, steps):
    """Return `steps` of the timesteps 0 ... timesteps - 1, evenly spaced, from the last one down."""
    return [round(timesteps * i / steps) - 1 for i in range(steps, 0, -1)]


class DiffusionPrior(nn.Module):
    """Draws clean image tokens given brain tokens: MindEye2's prior, DALL-E 2's without the text.

    Trained to predict x0 from x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise on a cosine schedule of `timesteps`.
    """

    def __init__(self, tokens, width, depth=6, dim_head=52, timesteps=100, cond_drop_prob=0.2):
        super().__init__()
        self.net = PriorNetwork(tokens, width, depth, dim_head)
        self.cond_drop_prob = cond_drop_prob
        # differs from MindEye2: targets are standardised, so that the noise (variance one) and the loss see what tells
        # images apart and not what all images share, which in CLIP's layers is most of the variance
        self.register_buffer("target_mean", torch.zeros(tokens, width))
        self.register_buffer("target_std", torch.ones(()))
        self.register_buffer("abar", cosine_schedule(timesteps), persistent=False)

    def loss(self, brain, target, draws):
        """Return each sample's mean squared error of x0, standardised, (B,), and the prediction in the target's units.

        brain, target: (B, T, D); draws: time (B,) in [0, 1), noise (B, T, D), drop (B, 2), as objectives.draw_prior
        makes them.
        In training mode brain tokens and noisy tokens are each replaced by learned ones with cond_drop_prob.
        """
        time, noise, drop = draws
        x0 = (target - self.target_mean) / self.target_std
        t = (time * len(self.abar)).long()
        abar = self.abar[t, None, None]  # (B, 1, 1)
        noisy = abar.sqrt() * x0 + (1 - abar).sqrt() * noise.to(x0.dtype)
        keep_brain = keep_noisy = None
        if self.training:
            keep_brain, keep_noisy = (drop >= self.cond_drop_prob).unbind(1)
        prediction = self.net(noisy, t, brain, keep_brain, keep_noisy)
        error = (prediction.float() - x0.float()).square().flatten(1).mean(1)
        return error, prediction * self.target_std + self.target_mean

    @torch.no_grad()
    def mean(self, brain):
        """Return the mean of all clean tokens (B, T, D) that brain tokens (B, T, D) allow.

        It is the network's answer without noisy tokens, which it lacks in a fifth of its training: there it is a
        regression. One step of `sample`, from noise alone, would give that mean if the network ignored the noise.
        """
        noisy = self.net.null_noisy.expand_as(brain)
        last = torch.full((len(brain),), len(self.abar) - 1, device=brain.device)
        return self.net(noisy, last, brain) * self.target_std + self.target_mean

    @torch.no_grad()
    def sample(self, brain, steps=20, generators=None):
        """Draw tokens (B, T, D) for brain tokens (B, T, D) with `steps` DDIM steps.

        A sample lies about the mean as the true tokens do, and so has twice its squared error.

        differs from MindEye2: eta 0, from the last of the training's timesteps; there eta 1, from t = 94 of 100.

        generators: one per sample, on the CPU, which makes a sample independent of its batch; None draws from torch's.
        """
        most = len(self.abar)
        if steps > most:
            raise utils.UserError(f"--prior_steps {steps}: wanted at most the {most} that the prior was trained with")
        draws = (torch.randn(brain.shape[1:], generator=generator) for generator in generators or [None] * len(brain))
        x = torch.stack([*draws]).to(brain)
        times = spaced_timesteps(most, steps)
        for t, abar, after in zip(times, self.abar[times], [*self.abar[times[1:]], torch.ones(())], strict=True):
            x0 = self.net(x, torch.full((len(x),), t, device=x.device), brain).to(x.dtype)
            noise = (x - abar.sqrt() * x0) / (1 - abar).sqrt()
            x = after.sqrt() * x0 + (1 - after).sqrt() * noise
        return x * self.target_std + self.target_mean

    def standardise(self, mean, std):
        """Set the statistics of the training targets: mean (T, D), and one std of what is left after it."""
        self.target_mean.copy_(torch.as_tensor(mean))
        self.target_std.copy_(torch.as_tensor(std))


# --- from voxels to latents (z) -----------------------------------------------------------------------------------


class MapResidual(nn.Module):
    """Group norm, SiLU and a 3 x 3 convolution, twice, added to the input (through a 1 x 1 where the widths differ)."""

    def __init__(self, channels_in, channels_out):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, channels_in, eps=1e-6)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(32, channels_out, eps=1e-6)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.conv_shortcut = None if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x):
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        if self.conv_shortcut is not None:
            # the attention leaves maps channels-last in memory, whose gradients DistributedDataParallel would copy
            x = self.conv_shortcut(x.contiguous() if self.training else x)
        return x + hidden


class MapAttention(nn.Module):
    """Self-attention of one head over the places of a map."""

    def __init__(self, channels):
        super().__init__()
        self.group_norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        """(B, C, h, w) -> (B, C, h, w)."""
        places = self.group_norm(x.flatten(2)).transpose(1, 2)  # (B, h w, C)
        q, k, v = (layer(places).unsqueeze(1) for layer in (self.to_q, self.to_k, self.to_v))  # (B, 1, h w, C)
        out = self.to_out[0](F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return out.transpose(1, 2).unflatten(2, x.shape[2:]) + x


class MapDecoder(nn.Module):
    """The decoder of Stable Diffusion's VAE, smaller: a map (B, channels_in, h, w) -> (B, channels_out, 4 h, 4 w).

    Layer for layer, and by the names of its weights, diffusers' `Decoder` with three levels of two blocks; that one can
    not be imported without all of diffusers and transformers.
    """

    def __init__(self, channels_in, channels_out, widths):
        """widths: of the three levels, the last (largest) first, multiples of 32."""
        super().__init__()
        deepest = widths[-1]
        self.conv_in = nn.Conv2d(channels_in, deepest, 3, padding=1)
        first, attention, second = MapResidual(deepest, deepest), MapAttention(deepest), MapResidual(deepest, deepest)
        self.up_blocks = nn.ModuleList()
        self.mid_block = nn.ModuleDict({"attentions": nn.ModuleList([attention]),
                                        "resnets": nn.ModuleList([first, second])})
        before = deepest
        for level, width in enumerate(reversed(widths)):
            block = nn.ModuleDict({"resnets": nn.ModuleList([MapResidual(before, width), MapResidual(width, width)])})
            if level < len(widths) - 1:
                block["upsamplers"] = nn.ModuleList([nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, padding=1)})])
            self.up_blocks.append(block)
            before = width
        self.conv_norm_out = nn.GroupNorm(32, before, eps=1e-6)
        self.conv_out = nn.Conv2d(before, channels_out, 3, padding=1)

    def forward(self, x):
        first, second = self.mid_block["resnets"]
        x = second(self.mid_block["attentions"][0](first(self.conv_in(x))))
        for block in self.up_blocks:
            for resnet in block["resnets"]:
                x = resnet(x)
            if "upsamplers" in block:
                x = x.contiguous() if len(x) >= 64 else x  # channels-last, PyTorch enlarges no large batch
                x = block["upsamplers"][0]["conv"](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class LatentDecoder(nn.Module):
    """MindEye1's low-level branch: residual MLP, a small map, and the decoder of a VAE that enlarges it four times.

    differs from MindEye1: the map is also contrasted with CLIP's patch tokens (there with another network's features).
    """

    CHANNELS = 64  # of the map

    def __init__(self, hidden_dim, latent_shape, tokens, width, n_blocks=4, dropout=0.15, channels=(64, 128, 256)):
        """latent_shape (C, h, w); tokens, width: of the CLIP layer, 1 + grid * grid tokens; channels: of the VAE
        decoder, last level first, multiples of 32.

        Raises UserError for a latent whose sides are not divisible by four.
        """
        super().__init__()
        latent_channels, height, side = latent_shape
        if height % 4 or side % 4:
            raise utils.UserError(f"feature z: latents of {height} x {side}, wanted sides divisible by 4; extract z "
                                  "from images with sides divisible by 32")
        self.map_shape = (self.CHANNELS, height // 4, side // 4)
        self.grid = round((tokens - 1) ** 0.5)
        self.blocks = nn.ModuleList(mixer_block(hidden_dim, dropout) for _ in range(n_blocks))
        self.to_map = nn.Linear(hidden_dim, self.CHANNELS * (height // 4) * (side // 4))
        self.norm = nn.GroupNorm(1, self.CHANNELS)
        self.upsample = MapDecoder(self.CHANNELS, latent_channels, channels)
        self.to_tokens = nn.Sequential(
            nn.Conv2d(self.CHANNELS, width, 1), nn.GroupNorm(1, width), nn.GELU(), nn.Conv2d(width, width, 1)
        )

    def forward(self, x):
        """(B, H) -> latents (B, C, h, w), contrast tokens (B, grid * grid, D)."""
        for block in self.blocks:
            x = x + block(x)
        small = self.norm(self.to_map(x).unflatten(-1, self.map_shape))  # (B, 64, h/4, w/4)
        tokens = self.to_tokens(F.adaptive_avg_pool2d(small, self.grid))  # (B, D, grid, grid)
        return self.upsample(small), tokens.flatten(2).transpose(1, 2)


# --- from images to voxels ----------------------------------------------------------------------------------------


def gnet_input(images, side=227):
    """Bring images (B, 3, H, W) in [0, 1] to GNet's side: antialiased bilinear, differentiable."""
    if images.shape[-2:] == (side, side):
        return images
    return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False, antialias=True)


def signed_log(x):
    """Apply GNet's nonlinearity s(x) = log(1 + |x|) tanh(x), used before and after pooling."""
    return torch.log1p(x.abs()) * torch.tanh(x)


def gnet_block(channels_in, channels_out, padding=1):
    block = nn.Sequential(nn.BatchNorm2d(channels_in, momentum=0.25), nn.Dropout2d(0.5),
                          nn.Conv2d(channels_in, channels_out, 3, padding=padding), nn.ReLU())
    nn.init.xavier_normal_(block[2].weight, gain=2**0.5)
    nn.init.zeros_(block[2].bias)
    return block


class VoxelReadout(nn.Module):
    """One subject's voxels: each pools the feature maps with a field of its own and weighs the features (FWRF).

    1307 parameters a voxel: fields of 25 x 25 and 13 x 13 (softmax over places), 512 weights, a bias.
    """

    CHUNK = 512  # voxels at a time: (B, features, CHUNK) floats, which a CPU's cache nearly holds
    CACHED = 256  # the same without a gradient
    KEPT = 1 << 24  # pooled features, floats, that a gradient may keep; of more it computes them again

    def __init__(self, n_voxels, features=(256, 256), places=(625, 169)):
        super().__init__()
        self.fields = nn.ParameterList(torch.zeros(n_voxels, n) for n in places)
        self.weight = nn.Parameter(0.01 * torch.randn(n_voxels, sum(features)))
        self.bias = nn.Parameter(torch.zeros(n_voxels))

    def forward(self, maps, voxels=None):
        """maps: [(B, F1, 25, 25), (B, F2, 13, 13)]; voxels: indices (n,) of those wanted, None = all. -> (B, n)."""
        maps = [signed_log(feature_map.flatten(2)) for feature_map in maps]  # (B, F, P)
        size = self.CHUNK if torch.is_grad_enabled() else self.CACHED
        if voxels is None:  # slices, which copy nothing
            chunks = [slice(start, start + size) for start in range(0, len(self.bias), size)]
        else:
            chunks = voxels.split(size)
        n = len(self.bias if voxels is None else voxels)
        read = self._read
        if torch.is_grad_enabled() and len(maps[0]) * self.weight.shape[1] * n > self.KEPT:
            read = partial(checkpoint, self._read, use_reentrant=False)
        return torch.cat([read(chunk, *maps) for chunk in chunks], dim=1)

    def _read(self, voxels, *maps):
        fields = [field[voxels].softmax(1) for field in self.fields]  # (n, P)
        pooled = [feature_map @ field.T for feature_map, field in zip(maps, fields, strict=True)]
        pooled = signed_log(torch.cat(pooled, dim=1))  # (B, F, n)
        return (pooled * self.weight[voxels].T).sum(1) + self.bias[voxels]


class GNet(nn.Module):
    """A brain encoding model: images -> voxels (St-Yves et al. 2023, Nat. Commun. 14:3329).

    AlexNet's first two convolutions (`prefilter`), a trunk that all subjects share, a VoxelReadout for each. Trunk:
    1,034,944 parameters with pass_through 64, 3,027,520 with 192 (the published checkpoint).
    """

    SIDE = 227  # pixels
    BLOCKS = ("c3", "c4a", "c4b", "c5a", "c5b", "c6a", "c6b")

    def __init__(self, n_voxels, trunk_width=64, pass_through=64, frozen_prefilter=False):
        """n_voxels: {subject: V}. frozen_prefilter: the prefilter keeps the weights that it is given."""
        super().__init__()
        self.n_voxels, self.trunk_width, self.pass_through = dict(n_voxels), trunk_width, pass_through
        self.frozen_prefilter = frozen_prefilter
        self.register_buffer("input_mean", torch.full((1, 3, 1, 1), 0.5))
        self.prefilter = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2),
            nn.Conv2d(64, 192, 5, padding=2), nn.ReLU())
        self.prefilter.requires_grad_(not frozen_prefilter)
        gabor_filters_(self.prefilter[0])
        width = trunk_width + pass_through
        self.c3 = gnet_block(192, 128, padding=0)
        self.c4a, self.c4b = gnet_block(128, width), gnet_block(width, width)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.c5a, self.c5b = gnet_block(width, width), gnet_block(width, width)
        self.c6a, self.c6b = gnet_block(width, width), gnet_block(width, trunk_width)
        features = (128 + 2 * trunk_width, 4 * trunk_width)
        self.readouts = nn.ModuleDict({subj: VoxelReadout(v, features) for subj, v in n_voxels.items()})

    @property
    def model_args(self):
        return {"kind": "gnet", "n_voxels": self.n_voxels, "trunk_width": self.trunk_width,
                "pass_through": self.pass_through, "frozen_prefilter": self.frozen_prefilter}

    @property
    def fields(self):
        """The parameters of all voxels' pooling fields."""
        return [field for readout in self.readouts.values() for field in readout.fields]

    def features(self, images):
        """(B, 3, 227, 227) in [0, 1] -> maps (B, 128 + 2 tw, 25, 25) and (B, 4 tw, 13, 13)."""
        tw = self.trunk_width
        c3 = self.c3(self.prefilter(images - self.input_mean))  # (B, 128, 25, 25)
        c4a = self.c4a(c3)
        c4b = self.c4b(c4a)
        c5a = self.c5a(self.pool(c4b))  # (B, tw + pt, 13, 13)
        c5b = self.c5b(c5a)
        c6a = self.c6a(c5b)
        c6b = self.c6b(c6a)
        return [torch.cat([c3, c4a[:, :tw], c4b[:, :tw]], 1),
                torch.cat([c5a[:, :tw], c5b[:, :tw], c6a[:, :tw], c6b], 1)]

    def forward(self, images, subject=None, voxels=None):
        """Predict z-scored responses to images in [0, 1] of any size.

        images: (B, 3, H, W), with a subject: its V voxels, or those of the index `voxels` (n,): (B, n). Or
        {subject: (b, 3, H, W)}: {subject: (b, V)}, with one pass of the trunk over all rows.
        """
        if subject is not None:
            return self.readouts[subject](self.features(gnet_input(images, self.SIDE)), voxels)
        sizes = [len(part) for part in images.values()]
        maps = self.features(torch.cat([gnet_input(part, self.SIDE) for part in images.values()]))
        parts = zip(*(feature_map.split(sizes) for feature_map in maps), strict=True)
        return {subj: self.readouts[subj](list(part)) for subj, part in zip(images, parts, strict=True)}


@torch.no_grad()
def gabor_filters_(conv):
    """Fill a first convolution (n, 3, k, k) with Gabor filters, what such layers learn: a start without AlexNet.

    Gray ones of 8 orientations, 2 wavelengths and 2 phases, then coloured blobs and edges at random.
    """
    n, _, k, _ = conv.weight.shape
    y, x = torch.meshgrid(*[torch.arange(k) - (k - 1) / 2] * 2, indexing="ij")
    envelope = torch.exp(-(x**2 + y**2) / (2 * (k / 4.5) ** 2))
    generator = torch.Generator().manual_seed(0)
    for i in range(n):
        angle = torch.tensor(math.pi * (i % 8) / 8)
        wavelength, phase = k * (0.6, 1.2)[i // 8 % 2], -math.pi / 2 * (i // 16 % 2)
        colour = torch.ones(3) if i < n // 2 else torch.randn(3, generator=generator)
        carrier = torch.cos(2 * math.pi * (x * angle.cos() + y * angle.sin()) / wavelength + phase)
        if i >= 3 * n // 4:
            carrier = torch.ones_like(x)  # blobs
        kernel = colour[:, None, None] * envelope * carrier
        conv.weight[i] = kernel / kernel.norm()
    conv.bias.zero_()


def load_prefilter(gnet, file):
    """Copy the first two convolutions of AlexNet (torchvision's state dict) into `gnet`; UserError if it has none."""
    try:
        weights = torch.load(utils.require(file, "--prefilter: AlexNet's weights", "give torchvision's alexnet .pth"),
                             map_location="cpu", weights_only=True)
        for ours, theirs in ((0, "features.0"), (3, "features.3")):
            gnet.prefilter[ours].load_state_dict({key: weights[f"{theirs}.{key}"] for key in ("weight", "bias")})
    except (KeyError, TypeError, RuntimeError, OSError, pickle.UnpicklingError, EOFError) as error:
        raise utils.UserError(f"--prefilter {file}: not AlexNet's weights ({str(error).splitlines()[0]}), wanted "
                              "features.0 and features.3 of torchvision's alexnet") from None


# --- the whole models ---------------------------------------------------------------------------------------------


class BrainModel(nn.Module):
    """Voxel encoder, backbone and prior of one feature (c or a g_k)."""

    def __init__(
        self, n_voxels, hidden_dim, tokens, width, n_blocks=4, dropout=0.15, prior_depth=6
    ):
        super().__init__()
        self.sizes = {
            "hidden_dim": hidden_dim, "tokens": tokens, "width": width, "n_blocks": n_blocks, "dropout": dropout,
            "prior_depth": prior_depth,
        }
        self.voxelenc = VoxelEncoder(n_voxels, hidden_dim)
        self.backbone = BrainNetwork(hidden_dim, tokens, width, n_blocks, dropout)
        self.prior = DiffusionPrior(tokens, width, prior_depth)

    @property
    def model_args(self):
        return {"kind": "brain", "n_voxels": self.voxelenc.n_voxels, **self.sizes}

    def standardise(self, mean, std):
        self.prior.standardise(mean, std)

    def forward(self, voxels, target=None, draws=None):
        """{subject: (b, V)} -> backbone (B, T, D), contrast (B, T, D).

        With a target (B, T, D) also the prior's loss of each sample (B,), as a third value: inside forward, so that a
        distributed wrapper sees every parameter that gets a gradient.
        """
        backbone, contrast = self.backbone(self.voxelenc(voxels))
        if target is None:
            return backbone, contrast
        return backbone, contrast, self.prior.loss(backbone, target, draws)[0]

    @torch.no_grad()
    def predict(self, voxels, prior_steps=1, generators=None):
        """Scores (B, T, D): nsdgeneral, the prior's mean (with more steps a sample), and retrieval, the contrast."""
        backbone, contrast = self(voxels)
        if prior_steps == 1:  # differs from MindEye2: the default; there a sample in 20 steps
            predicted = self.prior.mean(backbone)
        else:
            predicted = self.prior.sample(backbone, prior_steps, generators)
        return {"nsdgeneral": predicted, "retrieval": contrast}


class LatentModel(nn.Module):
    """Voxel encoder and latent decoder (z)."""

    def __init__(
        self, n_voxels, hidden_dim, latent_shape, tokens, width, n_blocks=4, dropout=0.15, channels=(64, 128, 256)
    ):
        super().__init__()
        self.sizes = {
            "hidden_dim": hidden_dim, "latent_shape": list(latent_shape), "tokens": tokens, "width": width,
            "n_blocks": n_blocks, "dropout": dropout, "channels": list(channels),
        }
        self.voxelenc = VoxelEncoder(n_voxels, hidden_dim)
        self.decoder = LatentDecoder(hidden_dim, latent_shape, tokens, width, n_blocks, dropout, channels)
        # the network predicts how an image differs from the mean one
        self.register_buffer("target_mean", torch.zeros(*latent_shape))
        self.register_buffer("target_std", torch.ones(()))

    @property
    def model_args(self):
        return {"kind": "latent", "n_voxels": self.voxelenc.n_voxels, **self.sizes}

    def standardise(self, mean, std):
        """Set the statistics of the training targets: mean (C, h, w), and one std of what is left after it."""
        self.target_mean.copy_(torch.as_tensor(mean))
        self.target_std.copy_(torch.as_tensor(std))

    def forward(self, voxels):
        """{subject: (b, V)} -> latents (B, C, h, w), contrast tokens (B, P, D)."""
        latents, tokens = self.decoder(self.voxelenc(voxels))
        return latents * self.target_std + self.target_mean, tokens

    @torch.no_grad()
    def predict(self, voxels, prior_steps=1, generators=None):
        """Scores (B, C, h, w): nsdgeneral, latents that carry the VAE's scaling factor. There is nothing to draw."""
        return {"nsdgeneral": self(voxels)[0]}


class Decoder(nn.Module):
    """Voxels -> components of one or several features, by regression: one voxel encoder and one trunk serve them all.

    Predictions are estimates of least squared error, in units of each feature's standard deviation: the coefficients
    (K,) of its principal components over the square root of its total variance.
    """

    def __init__(self, n_voxels, hidden_dim, components, n_blocks=2, dropout=0.3, contrast=()):
        """n_voxels: {subject: V}; components: {feature: K}; n_blocks: 0 leaves a linear map through hidden_dim units.

        contrast: features that have a second head, whose prediction retrieves the image.
        """
        super().__init__()
        self.sizes = {"hidden_dim": hidden_dim, "components": dict(components), "n_blocks": n_blocks,
                      "dropout": dropout, "contrast": list(contrast)}
        self.voxelenc = VoxelEncoder(n_voxels, hidden_dim)
        self.blocks = nn.ModuleList(mixer_block(hidden_dim, dropout) for _ in range(n_blocks))
        self.out = nn.Sequential(nn.LayerNorm(hidden_dim), nn.Dropout(dropout)) if n_blocks else nn.Identity()
        self.heads = nn.ModuleDict({feat: nn.Linear(hidden_dim, k) for feat, k in components.items()})
        self.contrast = nn.ModuleDict({feat: nn.Linear(hidden_dim, components[feat]) for feat in contrast})
        for head in self.heads.values():  # it starts from the mean image, whose error is the variance
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    @property
    def model_args(self):
        return {"kind": "components", "n_voxels": self.voxelenc.n_voxels, **self.sizes}

    def forward(self, voxels):
        """{subject: (b, V)} -> coefficients {feature: (B, K)} and those for the contrast, {feature: (B, K)}."""
        return self.decode(self.voxelenc(voxels))

    def decode(self, x):
        """What follows the voxel encoder: (B, H) -> as forward."""
        for block in self.blocks:
            x = x + block(x)
        x = self.out(x)
        return ({feat: head(x) for feat, head in self.heads.items()},
                {feat: head(x) for feat, head in self.contrast.items()})


class RidgeDecoder(nn.Module):
    """The linear baseline of the Decoder: one ridge regression per component (training/ridge.py), of one subject."""

    def __init__(self, n_voxels, components):
        """n_voxels: {subject: V}, one subject; components: {feature: K}."""
        super().__init__()
        self.n_voxels, self.components = dict(n_voxels), dict(components)
        ((self.subject, voxels),) = n_voxels.items()
        self.heads = nn.ModuleDict({feat: nn.Linear(voxels, k) for feat, k in components.items()})

    @property
    def model_args(self):
        return {"kind": "ridge", "n_voxels": self.n_voxels, "components": self.components}

    def forward(self, voxels):
        """{subject: (B, V)} -> coefficients {feature: (B, K)}, as Decoder's; nothing for a contrast."""
        return {feat: head(voxels[self.subject]) for feat, head in self.heads.items()}, {}


# --- what conditions Stable Diffusion on decoded g ------------------------------------------------------------------


class AdapterAttention(nn.Module):
    """A processor of a UNet's cross-attention: what it finds in the text, plus what it finds in further tokens.

    Both are asked the same (the queries are the UNet's own); keys, values and the way back are this one's
    (Ye et al. 2023, arXiv 2308.06721, IP-Adapter, with a way back of its own, which starts at zero: nothing is added).
    Letters: B rows, b the last of them, N queries, C channels, T tokens, D their width.
    """

    def __init__(self, plain, channels, width):
        """plain: the processor that was there; channels: C of the attention; width: D of the further tokens."""
        super().__init__()
        self.plain = plain
        self.to_k, self.to_v = (nn.Linear(width, channels, bias=False) for _ in range(2))
        self.to_out = nn.Linear(channels, channels)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None,
                 ip_hidden_states=None):
        """As diffusers calls it; ip_hidden_states: the tokens (b, T, D) of the last b rows; None adds nothing."""
        found = self.plain(attn, hidden_states, encoder_hidden_states, attention_mask, temb)  # (B, N, C)
        if ip_hidden_states is None:
            return found
        asking = hidden_states[-len(ip_hidden_states):]  # (b, N, C)
        query, key, value = (rows.unflatten(2, (attn.heads, -1)).transpose(1, 2) for rows in
                             (attn.to_q(asking), self.to_k(ip_hidden_states), self.to_v(ip_hidden_states)))
        seen = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return torch.cat([found[:-len(asking)], found[-len(asking):] + self.to_out(seen)])


def cross_attentions(unet):
    """{name of its processor in unet.attn_processors: channels} of each attention to the text."""
    return {name: unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
            for name in unet.attn_processors if name.endswith("attn2.processor")}


def skips_of(unet):
    """[[halvings of the latents' size, channels]] of all that a UNet's way down hands over; the middle's last."""
    skips, halvings = [[0, unet.conv_in.out_channels]], 0
    for block in unet.down_blocks:
        width = block.resnets[-1].out_channels
        skips += [[halvings, width]] * len(block.resnets)
        if block.downsamplers:
            halvings += 1
            skips.append([halvings, width])
    return [*skips, [halvings, width]]


class LayoutNetwork(nn.Module):
    """Makes a decoded latent into what is added to all that a UNet's way down hands over to its way up.

    A small ControlNet (Zhang et al. 2023, ICCV): its ways out start at zero (nothing is added), but it is no copy of
    the UNet. It sees decoded z beside the noisy latents and their time, to weigh one by the other.
    """

    def __init__(self, channels, skips, hidden=64):
        """channels: of latents; skips: as skips_of lists them; hidden: channels in between."""
        super().__init__()
        self.skips = skips
        levels = range(1 + max(level for level, _ in self.skips))
        self.time = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.SiLU())
        self.start = nn.Conv2d(2 * channels, hidden, 3, padding=1)
        self.scales = nn.ModuleList(nn.Linear(4 * hidden, 2 * hidden) for _ in levels)
        self.convs = nn.ModuleList(nn.ModuleList(nn.Conv2d(hidden, hidden, 3, padding=1) for _ in range(2))
                                   for _ in levels)
        self.outs = nn.ModuleList(nn.Conv2d(hidden, width, 1) for _, width in self.skips)
        for out in self.outs:
            nn.init.zeros_(out.weight)
            nn.init.zeros_(out.bias)

    def forward(self, z, latents, t):
        """Decoded z and latents at times t (B,) or (1,), both (B, C, h, w) -> [(B, channels, h', w')], one per skip."""
        time = self.time(sinusoidal(t, self.start.out_channels))
        seen, at = self.start(torch.cat([z, latents], 1)), []
        for level, (scales, (first, second)) in enumerate(zip(self.scales, self.convs, strict=True)):
            seen = F.avg_pool2d(seen, 2, ceil_mode=True) if level else seen
            scale, shift = scales(time)[:, :, None, None].chunk(2, 1)
            seen = seen + second(F.silu(first(F.silu(seen)) * (1 + scale) + shift))
            at.append(seen)
        return [out(at[level]) for out, (level, _) in zip(self.outs, self.skips, strict=True)]


@dataclass
class Looks:
    """Decoded g and z of B pictures as an adapter gives them to a UNet."""

    tokens: torch.Tensor  # (B, T, D), which cross-attentions attend to (AdapterAttention)
    z: torch.Tensor  # (B, C, h, w)
    layout: LayoutNetwork

    def beside(self, latents, t, dtype):
        """What a UNet of a dtype takes besides, a dict, for latents (n, C, h, w) at times t (1,) or (B,).

        The pictures are the last B of the n rows; nothing is added to the others.
        """
        others = len(latents) - len(self.z)
        *skips, middle = (F.pad(part, (0, 0) * 3 + (others, 0)).to(dtype)
                          for part in self.layout(self.z, latents[others:].to(self.z.dtype), t))
        return {"cross_attention_kwargs": {"ip_hidden_states": self.tokens.to(dtype)},
                "down_block_additional_residuals": skips, "mid_block_additional_residual": middle}


def adapter_feats(layers):
    """Names of the features that an adapter of g_k takes; layers: [k, ...]."""
    return ["z", *(f"g_{int(k)}" for k in layers)]


class FeatureAdapter(nn.Module):
    """Lets a Stable Diffusion UNet draw from decoded CLIP layers and a decoded latent, beside the text.

    Every token of every layer becomes one that the UNet attends to: T tokens of width D in, L * T of the text's width
    out. The latent goes through a LayoutNetwork.
    """

    def __init__(self, layers, tokens, width, text_width, attentions, z_channels, skips, hidden=256):
        """layers: [k, ...] of g_k, L of them; tokens: T; width: D; text_width: of the UNet's text; attentions: as
        cross_attentions lists them; z_channels, skips: of the LayoutNetwork; hidden: of the networks in between."""
        super().__init__()
        self.layers, self.shape, self.text_width, self.hidden = list(layers), (tokens, width), text_width, hidden
        self.channels, self.z_channels = dict(attentions), z_channels
        self.layout = LayoutNetwork(z_channels, skips)
        self.register_buffer("mean", torch.zeros(len(layers), tokens, width))
        self.register_buffer("scale", torch.ones(len(layers), 1, 1))
        self.networks = nn.ModuleList(nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, text_width))
                                      for _ in layers)
        self.place = nn.Parameter(0.5 * torch.randn(len(layers), tokens, text_width))
        self.norm = nn.LayerNorm(text_width)
        self.attentions = nn.ModuleList(AdapterAttention(None, channels, text_width)
                                        for channels in self.channels.values())

    @classmethod
    def fitting(cls, unet, layers, shape):
        """An adapter of a UNet for layers [k, ...] of a shape (T, D)."""
        return cls(layers, *shape, unet.config.cross_attention_dim, cross_attentions(unet), unet.config.in_channels,
                   skips_of(unet))

    @classmethod
    def of(cls, unet, layers):
        """An adapter of a UNet, which draws as before until it is trained; layers: {k: nsd.components.Components}."""
        adapter = cls.fitting(unet, layers, next(iter(layers.values())).shape)
        for i, known in enumerate(layers.values()):
            adapter.mean[i] = torch.from_numpy(known.mean).view(known.shape)
            adapter.scale[i] = float(known.variances.sum() / len(known.mean)) ** 0.5
        return adapter

    @property
    def model_args(self):
        return {"kind": "adapter", "layers": self.layers, "tokens": self.shape[0], "width": self.shape[1],
                "text_width": self.text_width, "attentions": self.channels, "z_channels": self.z_channels,
                "skips": self.layout.skips, "hidden": self.hidden}

    @property
    def feats(self):
        """Names of the features that it takes."""
        return adapter_feats(self.layers)

    def attach(self, unet):
        """Let the cross-attentions of `unet` take the tokens (AdapterAttention); ValueError where it has others, or
        other skips."""
        processors = dict(unet.attn_processors)
        if cross_attentions(unet) != self.channels:
            raise ValueError("the UNet has other cross-attentions than the adapter")
        if skips_of(unet) != self.layout.skips:
            raise ValueError("the UNet has other skips than the adapter")
        for name, attention in zip(self.channels, self.attentions, strict=True):
            plain = processors[name]
            attention.plain = plain.plain if isinstance(plain, AdapterAttention) else plain  # of an earlier adapter
            processors[name] = attention
        unet.set_attn_processor(processors)

    def forward(self, features):
        """{"z": (B, C, h, w), g_k: (B, T, D), ...} -> Looks, with tokens (B, L * T, text_width)."""
        rows = [(features[f"g_{k}"] - self.mean[i]) / self.scale[i] for i, k in enumerate(self.layers)]
        tokens = torch.stack([network(part) for network, part in zip(self.networks, rows, strict=True)], 1) + self.place
        return Looks(self.norm(tokens.flatten(1, 2)), features["z"], self.layout)


class AdaptedUNet(nn.Module):
    """A frozen UNet and its adapter, which alone is trained and saved."""

    def __init__(self, unet, adapter):
        super().__init__()
        self.unet, self.adapter = unet.requires_grad_(False), adapter
        adapter.attach(unet)

    @property
    def model_args(self):
        return self.adapter.model_args

    def forward(self, latents, t, text, features):
        """Noise (B, C, h, w) of latents at times t (B,), given text (B, T, D) and decoded features of the adapter's,
        or None."""
        beside = {} if features is None else self.adapter(features).beside(latents, t, latents.dtype)
        return self.unet(latents, t, encoder_hidden_states=text, **beside).sample


MODELS = {"components": Decoder, "ridge": RidgeDecoder, "brain": BrainModel, "latent": LatentModel, "gnet": GNet,
          "adapter": FeatureAdapter}


def build_model(model_args):
    """Rebuild the network of a checkpoint from its `model_args`; weights are random until loaded."""
    sizes = dict(model_args)
    return MODELS[sizes.pop("kind")](**sizes)


def restore(state, file, model=None):
    """Rebuild the network of a run's checkpoint `state`; UserError, naming the file, unless all of its weights fit.

    model: to put them into; None makes one.
    """
    try:
        model = build_model(state["model_args"]) if model is None else model
        model.load_state_dict(state["model"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise utils.UserError(f"{file}: its weights do not fit any network here ({type(error).__name__}: "
                              f"{reason}); delete it, or train it again with --overwrite") from None
    return model


def load_trunk(model, state_dict, voxel_encoders=False):
    """Copy all weights but the voxel encoders' (`voxelenc.*`), or with them, into `model`; return the keys, sorted.

    Raises UserError, before anything is copied, unless both have the same keys of the same shapes.
    """
    wanted, found = (
        {key: value for key, value in state.items() if voxel_encoders or not key.startswith("voxelenc.")}
        for state in (model.state_dict(), state_dict)
    )
    wrong = sorted(wanted.keys() ^ found.keys())
    wrong += [key for key in wanted if key in found and wanted[key].shape != found[key].shape]
    if wrong:
        raise utils.UserError(
            f"--multisubject_ckpt: {len(wrong)} weights are missing, unknown or of another shape "
            f"({', '.join(wrong[:4])}, ...); give a run of the same feature with the same --hidden_dim"
        )
    model.load_state_dict(found, strict=False)
    return sorted(found)


def freeze_trunk(model):
    """Let a training change the voxel encoders of `model` alone."""
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key.startswith("voxelenc."))
