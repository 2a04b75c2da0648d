"""Reconstruct a subject's test images: decoded c (and z) draw them, decoded g_k steer the drawing.

Reads   scores_all/subj0X/<run of c>/nsdgeneral.npy            (N, T, D)   the diffusion's condition
        scores_all/subj0X/<run of z>/nsdgeneral.npy            (N, 4, h, w) where it starts (unless --z none)
        scores_all/subj0X/<run of g_k>/Linear-k/nsdgeneral.npy (N, T', D') guidance, one folder per layer of --feats
        each beside its image_ids.npy (N,): 0-based 73k ids, ascending, the same for all
Writes  outputs_all/subj0X/<method>/<guidance_scale>/<guidance_strength>/%05d.png (%05d = row of the image; further
        samples %05d_s1.png, ...), index.csv (row, image_id, file, sample, seed) and config.json

An interrupted run continues. The noise of an image depends on --seed, its id and the sample's number only, so a subset
(--limit, --ids) or another batch size draws the same pictures. A null control (--control) gets the folder
<method>_<control>; what is not guided lies in <method>/0/0.

--guidance_rule raw adds guidance_scale (default 300000) times the gradient, as NeuralDiffuser does. With norm,
guidance_scale is lambda (default 0.3): the share of the noise level by which a step moves its predicted image against
the gradient, at most 0.6; it needs no retuning when the loss or the model changes.

    python src/recon.py --subj 1
    python src/recon.py --subj 1 --limit 10 --num_samples 4 --guidance_rule norm --guidance_scale 0.2 --method norm
    python src/recon.py --subj 1 --feats none --control shuffle
"""

import re
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import options
import utils
from models import ClipFeatures
from sampler import GRADS, RULES, X0S, ClipFeatureLoss, load_pipeline

DEFAULT_SCALE = {"raw": 300000.0, "norm": 0.3}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FILE_NAME = re.compile(r"(\d{5,})(?:_s(\d+))?\.png")
# what may differ between two runs that fill one folder: it does not change any picture
FREE_OPTIONS = ("root", "data_path", "device", "batch_size", "limit", "ids", "num_samples", "outdir", "overwrite",
                "dry_run", "wandb_log", "wandb_project")


def get_parser():
    parser = options.Parser(__doc__)
    options.add_paths(parser)
    options.add_subject(parser)
    options.add_run(parser)
    options.add_scored_run(parser)
    options.add_control(parser)
    parser.add_argument("--feats", type=layer_or_none, nargs="*", default=options.VISION_LAYERS, metavar="g_K",
                        help="CLIP layers that guide; none = no guidance")
    parser.add_argument("--z", default="scores", metavar="scores|none|FILE",
                        help="latents to start from: z's scores, none (pure noise), or an .npy beside an image_ids.npy")

    which = parser.add_argument_group("which pictures")
    which.add_argument("--limit", type=options.whole, metavar="IMAGES", help="the first so many test images")
    which.add_argument("--ids", type=options.whole, nargs="+", metavar="ID", help="only these 0-based 73k ids")
    which.add_argument("--num_samples", type=options.whole, default=1, metavar="SAMPLES", help="pictures per image")
    which.add_argument("--outdir", metavar="DIR", help="write there instead")
    which.add_argument("--overwrite", action="store_true", help="delete the folder's pictures and start again")

    group = parser.add_argument_group("sampling")
    group.add_argument("--sd_model", default="CompVis/stable-diffusion-v1-4", metavar="NAME|DIR",
                       help="any Stable Diffusion 1.x")
    group.add_argument("--clip_model", default="openai/clip-vit-base-patch32", metavar="NAME|DIR",
                       help="the CLIP whose layers the g_k are")
    group.add_argument("--num_inference_steps", type=options.whole, default=50, metavar="STEPS", help="DDIM steps")
    group.add_argument("--cfg_scale", type=float, default=7.5, metavar="X", help="classifier-free guidance")
    group.add_argument("--strength", type=float, default=0.75, metavar="FRACTION",
                       help="with --z: the fraction of the steps that are run from there")
    options.add_guidance_folder(parser)
    group.add_argument("--guidance_rule", choices=RULES, default="raw", help="what a gradient does (see above)")
    group.add_argument("--guidance_grad", choices=GRADS, default="xt",
                       help="differentiate through the UNet (xt) or only through the decoder (x0, cheaper)")
    group.add_argument("--guidance_x0", choices=X0S, default="cond",
                       help="the prediction the losses see: conditional, or with classifier-free guidance")
    group.add_argument("--batch_size", type=options.whole, default=4, metavar="PICTURES")
    group.add_argument("--dtype", choices=["auto", *DTYPES], default="auto",
                       help="of the diffusion model; auto is fp32 on a CPU, else bf16 (fp16 where there is no bf16)")
    options.add_compute(parser)
    options.add_tracking(parser)
    return parser


def layer_or_none(text):
    return None if text in ("", "none") else options.vision_layer(text)


def main(argv=None):
    args = get_parser().parse_args(argv)
    utils.check_tracking(args.wandb_log)
    paths = utils.Paths.from_args(args)
    device = utils.pick_device(args.device)
    resolve(args, device)
    folder = output_folder(paths, args)

    scores, image_ids, hashes = read_scores(paths, args)
    rows = pick_rows(image_ids, args)
    prepare_folder(folder, config_of(args, hashes), args.overwrite)
    jobs = [(row, sample) for row in rows for sample in range(args.num_samples)]
    missing = [job for job in jobs if not (folder / file_name(*job)).exists()]
    print(f"{folder}: {len(jobs)} pictures wanted, {len(jobs) - len(missing)} exist")
    if missing:
        draw(missing, scores, image_ids, folder, device, args)
    write_index(folder, image_ids, args.seed)


def draw(jobs, scores, image_ids, folder, device, args):
    """Draw every (row, sample) of `jobs` and write it to `folder` as soon as its batch is done."""
    pipe = load_pipeline(args.sd_model, device, DTYPES[args.dtype])
    pipe.set_progress_bar_config(desc="steps", leave=False)
    layers = [int(feat.removeprefix("g_")) for feat in args.feats]
    clip_features = ClipFeatures.from_pretrained(args.clip_model, layers).to(device, torch.float32) if layers else None
    tracker = utils.Tracker(folder, f"recon_{args.subj}_{args.method}", vars(args), args.wandb_log, args.wandb_project)
    with tqdm(total=len(jobs), desc="pictures") as progress:
        for start in range(0, len(jobs), args.batch_size):
            batch = jobs[start:start + args.batch_size]
            rows, samples = (list(column) for column in zip(*batch, strict=True))
            at = {feat: torch.from_numpy(array[rows]).to(device) for feat, array in scores.items()}  # (B, ...) each
            terms = [ClipFeatureLoss(clip_features, {k: at[f"g_{k}"] for k in layers})] if layers else []
            images = pipe(
                at["c"], image_ids[rows].tolist(), samples, args.seed, z=at.get("z"), strength=args.strength,
                num_inference_steps=args.num_inference_steps, cfg_scale=args.cfg_scale, terms=terms,
                guidance_scale=args.guidance_scale, guidance_strength=args.guidance_strength,
                rule=args.guidance_rule, grad=args.guidance_grad, x0=args.guidance_x0)  # (B, 3, H, W)
            if not torch.isfinite(images).all():
                raise utils.UserError(f"--guidance_scale {args.guidance_scale:g}, --dtype {args.dtype}: the sampler "
                                      "diverged (NaN), wanted finite pictures; lower the scale or use --dtype fp32")
            pictures = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)
            for job, picture in zip(batch, pictures, strict=True):
                with utils.atomic_path(folder / file_name(*job)) as temporary:
                    Image.fromarray(picture).save(temporary, format="PNG")
            captions = [f"id {image_ids[row]}, sample {sample}" for row, sample in batch]
            tracker.log_images("recon/pictures", list(pictures), captions, step=start)
            progress.update(len(batch))
    tracker.finish()


def resolve(args, device):
    """Replace what the flags leave open (None, auto, none) by what will be used; wrong values raise UserError."""
    args.feats = sorted({feat for feat in args.feats if feat}, key=lambda feat: int(feat.removeprefix("g_")))
    if args.guidance_scale is None:
        args.guidance_scale = DEFAULT_SCALE[args.guidance_rule]
    if not args.feats:
        args.guidance_scale = 0.0
    if not args.guidance_scale * args.guidance_strength:
        args.feats = []  # nothing is guided: read no g, load no CLIP
    for name in ("strength", "guidance_strength"):
        if not 0 <= getattr(args, name) <= 1:
            raise utils.UserError(f"--{name} {getattr(args, name):g}: wanted a fraction from 0 to 1")
    for name in ("batch_size", "limit", "num_samples", "num_inference_steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise utils.UserError(f"--{name} {getattr(args, name)}: wanted at least 1")
    if args.dtype == "auto":
        half = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        args.dtype = "fp32" if device.type == "cpu" else half


def output_folder(paths, args):
    if args.outdir:
        return Path(args.outdir).resolve()
    method = f"{args.method}_{args.control}" if args.control else args.method
    return paths.images(args.subj, method, args.guidance_scale, args.guidance_strength)


def read_scores(paths, args):
    """The decoded features, {feat: (N, ...)}, the ids (N,) they share, and a hash of each score file."""
    def folder_of(feat):
        return paths.scores(args.subj, utils.scores_name(vars(args), feat), feat)

    files = {feat: folder_of(feat) / "nsdgeneral.npy" for feat in ("c", *args.feats)}
    if args.z != "none":
        files["z"] = folder_of("z") / "nsdgeneral.npy" if args.z == "scores" else Path(args.z)
    scores, image_ids = {}, None
    for feat, file in files.items():
        if feat == "z" and not file.exists():
            raise utils.UserError(f"{file}: no decoded latents; score z (bash scripts/score.sh), or start from noise: "
                                  "--z none")
        ids, scores[feat] = utils.load_scores(file.parent, file.stem)
        image_ids = ids if image_ids is None else image_ids
        if not np.array_equal(ids, image_ids):
            raise utils.UserError(
                f"{file.parent}/image_ids.npy: {len(ids)} ids that are not the {len(image_ids)} of "
                f"{files['c'].parent}/image_ids.npy, wanted the same; score c and {feat} on the same test set again")
    hashes = {feat: utils.file_hash(file) for feat, file in files.items()}
    hashes["image_ids"] = utils.file_hash(files["c"].parent / "image_ids.npy")
    return scores, image_ids, hashes


def pick_rows(image_ids, args):
    """Rows that --ids and --limit ask for, ascending."""
    unknown = sorted(set(args.ids or []) - set(image_ids.tolist()))
    if unknown:
        raise utils.UserError(f"--ids {unknown[0]}: not a test image of {args.subj}; wanted 0-based 73k ids out of its "
                              f"{len(image_ids)}, {image_ids[0]}..{image_ids[-1]}")
    rows = np.flatnonzero(np.isin(image_ids, args.ids)) if args.ids else np.arange(len(image_ids))
    return rows[:args.limit].tolist()


def file_name(row, sample):
    return f"{row:05d}.png" if sample == 0 else f"{row:05d}_s{sample}.png"


def config_of(args, hashes):
    """Everything that decides what the pictures look like, and the commit for the record."""
    decisive = {name: value for name, value in vars(args).items() if name not in FREE_OPTIONS}
    if not args.feats:  # what is not guided does not depend on how it would have been
        decisive = {name: value for name, value in decisive.items() if not name.startswith("guidance_")}
    return {**decisive, "score_hashes": hashes, "commit": utils.git_commit()}


def prepare_folder(folder, config, overwrite):
    """Make `folder` ready for pictures of `config`; raises UserError when it holds others and `overwrite` is off."""
    pictures = [file for file in folder.glob("*.png") if FILE_NAME.fullmatch(file.name)]
    if overwrite:
        for file in (*pictures, folder / "index.csv", folder / "config.json"):
            file.unlink(missing_ok=True)
    elif (folder / "config.json").exists():
        old = utils.load_json(folder / "config.json")
        changed = [key for key in config if key != "commit" and config[key] != old.get(key)]
        if changed:
            changes = ", ".join(f"{key} {old.get(key)} -> {config[key]}" for key in changed)
            raise utils.UserError(f"{folder}: pictures of other settings ({changes}); --overwrite them, or choose "
                                  "another --method or --outdir")
        return
    elif pictures:
        raise utils.UserError(f"{folder}: {len(pictures)} pictures without their config.json; --overwrite them, or "
                              "choose another --method or --outdir")
    utils.save_json(folder / "config.json", config)


def write_index(folder, image_ids, seed):
    """List every picture of the folder, those of earlier runs too."""
    found = sorted((int(match[1]), int(match[2] or 0)) for file in folder.iterdir()
                   if (match := FILE_NAME.fullmatch(file.name)))
    utils.save_csv(folder / "index.csv", [
        {"row": row, "image_id": image_ids[row], "file": file_name(row, sample), "sample": sample, "seed": seed}
        for row, sample in found])


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
