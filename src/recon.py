"""Reconstruct a subject's test images: decoded c (and z) draw them, decoded g_k steer the drawing.

Reads   scores_all/subj0X/<run of c>/nsdgeneral.npy            (N, T, D)   the diffusion's condition
        scores_all/subj0X/<run of z>/nsdgeneral.npy            (N, 4, h, w) where it starts (unless --z none)
        scores_all/subj0X/<run of g_k>/Linear-k/nsdgeneral.npy (N, T', D') guidance, one folder per layer of --feats
        each beside its image_ids.npy (N,): 0-based 73k ids, ascending, the same for all
Writes  outputs_all/subj0X/<method>/<guidance_scale>/<guidance_strength>/%05d.png (%05d = row of the image; further
        samples %05d_s1.png, ...), index.csv (row, image_id, file, sample, seed) and config.json; with --use_gnet
        %05d.jsonl beside a picture: a line per guided step of losses, r per region, gradient norms, their cosine

An interrupted run continues. The noise of an image depends on --seed, its id and the sample's number only, so a subset
(--limit, --ids), another batch size or number of processes draws the same pictures; on a CPU, to the bit. A null
control (--control) gets the folder <method>_<control>, true features (--run ground_truth) <method>_ground_truth,
validation images (--test_split val) <method>_val, single trials (--repeats single) <method>_single; what is not guided
lies in <method>/0/0.

--guidance_rule raw adds guidance_scale (default 300000) times the gradient, as NeuralDiffuser does. With norm,
guidance_scale is lambda (default 0.3): the share of the noise level by which a step moves its predicted image against
the gradient, at most 0.6; it needs no retuning when the loss or the model changes.

--use_gnet lets the measured response guide as well: a brain encoding model (train_gnet.py) predicts the response to the
picture being formed, and the picture is moved towards the subject's own response to that image, or towards any response
(--target_fmri_npy). These pictures get the folder <method>_gnet_<roi>_<kappa>.

    python src/recon.py --subj 1
    python src/recon.py --subj 1 --limit 10 --num_samples 4 --guidance_rule norm --guidance_scale 0.2 --method norm
    python src/recon.py --subj 1 --feats none --control shuffle
    python src/recon.py --subj 1 --use_gnet --gnet_roi V1 --gnet_kappa 1
    python src/recon.py --subj 1 --use_gnet --feats none --guidance_rule norm    # the brain alone
    accelerate launch --num_processes 4 src/recon.py --subj 1      # four GPUs share the test images
"""

import argparse
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import options
import utils
from disk.files import file_hash
from disk.names import Paths, run_name, scores_name
from disk.scores import load_scores
from encoding.encoder import encoder_file, load_encoder
from encoding.guide import BrainGuide, read_target
from models import ClipFeatures
from nsd import sources
from nsd.repeats import responses_to
from sampling import folders
from sampling.decoders import gradient_cosine, load_guidance_decoder
from sampling.guidance import GRADS, MAX_SHIFT, RULES, X0S, ClipFeatureLoss
from sampling.pipeline import CPU_BATCH, load_pipeline, rows_on_cpu
from training.team import Team
from training.tracking import Tracker, check_tracking

DEFAULT_SCALE = {"raw": 300000.0, "norm": 0.3}
# what may differ between two runs that fill one folder: it does not change any picture (but on a GPU the last digits)
FREE_OPTIONS = ("root", "data_path", "batch_size", "limit", "ids", "num_samples", "outdir", "overwrite",
                "offload", "dry_run", "wandb_log", "wandb_project")
GNET_OPTIONS = ("use_gnet", "gnet_roi", "gnet_kappa", "gnet_alpha", "gnet_run", "target_fmri_npy")


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
    group.add_argument("--sd_model", default=sources.SD_MODEL, metavar="NAME|DIR",
                       help="any Stable Diffusion 1.x")
    group.add_argument("--clip_model", default=sources.CLIP_MODEL, metavar="NAME|DIR",
                       help="the CLIP whose layers the g_k are")
    group.add_argument("--resolution", type=options.whole, metavar="PIXELS",
                       help="side of the picture (the model's own)")
    group.add_argument("--num_inference_steps", type=options.whole, default=50, metavar="STEPS", help="DDIM steps")
    group.add_argument("--cfg_scale", type=float, default=7.5, metavar="X", help="classifier-free guidance")
    group.add_argument("--strength", type=float, default=0.75, metavar="FRACTION",
                       help="with --z: the fraction of the steps that are run from there")
    group.add_argument("--sag_scale", type=float, default=0.0, metavar="X",
                       help="self-attention guidance; NeuralDiffuser's code runs 0.75 (default: off)")
    options.add_guidance_folder(parser)
    group.add_argument("--guidance_rule", choices=RULES, default="raw", help="what a gradient does (see above)")
    group.add_argument("--guidance_grad", choices=GRADS, default="xt",
                       help="differentiate through the UNet (xt) or only through the decoder (x0, cheaper)")
    group.add_argument("--guidance_x0", choices=X0S, default="cond",
                       help="the prediction the losses see: conditional, or with classifier-free guidance")
    group.add_argument("--guidance_decoder", default="full", metavar="full|half|DIR",
                       help="what decodes for the losses: the model's own VAE, the same at half the resolution, or an "
                            "AutoencoderTiny (TAESD); cheaper ones print how far their gradient agrees")
    brain = parser.add_argument_group("guidance by the brain")
    options.add_gnet(brain)
    brain.add_argument("--gnet_alpha", type=float, default=1.0, metavar="FRACTION",
                       help="share of the loss that is 1 - r across voxels, the rest being the squared error")
    brain.add_argument("--target_fmri_npy", metavar="FILE",
                       help="responses (n, voxels) to reach, beside an image_ids.npy (default: the subject's own, "
                            "averaged over repeats, under the same --control)")
    options.add_precision(parser)
    group.add_argument("--batch_size", type=options.whole, default=4, metavar="PICTURES",
                       help=f"drawn at once on a GPU (a CPU takes {CPU_BATCH} latent pixels at once, always)")
    group.add_argument("--offload", action=argparse.BooleanOptionalAction, default=False,
                       help="keep networks in main memory between batches, and the text encoder after its one pass; a "
                            "guided step needs UNet and VAE together")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                       help="torch.compile the UNet where no gradient is taken: slower start, faster steps")
    options.add_compute(parser)
    options.add_tracking(parser)
    return parser


def layer_or_none(text):
    return None if text in ("", "none") else options.vision_layer(text)


def main(argv=None):
    args = get_parser().parse_args(argv)
    check_tracking(args.wandb_log)
    utils.reproducible_products()
    paths = Paths.from_args(args)
    team = Team.assemble(args.device, args.precision, timedelta(days=1))  # shares may take hours longer than others
    resolve(args, team)
    folder = Path(args.outdir).resolve() if args.outdir else paths.images_of(vars(args))

    scores, image_ids, hashes = read_scores(paths, args)
    rows = pick_rows(image_ids, args)
    config = config_of(args, hashes)
    folders.check_folder(folder, config, args.overwrite)
    team.wait()  # until everybody has looked
    try:
        fill(folder, rows, scores, image_ids, config, team, args)
    except torch.OutOfMemoryError:
        raise utils.UserError(out_of_memory(args)) from None


def fill(folder, rows, scores, image_ids, config, team, args):
    """Draw what `folder` lacks of the pictures of `rows`, shared among the team's processes.

    Nothing in the folder is touched before all networks are there and fit the scores.
    """
    jobs = [(row, sample) for row in rows for sample in range(args.num_samples)]
    missing = [job for job in jobs if args.overwrite or not folders.is_whole(folder / folders.file_name(*job))]
    team.print(f"{folder}: {len(jobs)} pictures wanted, {len(jobs) - len(missing)} exist")
    mine = team.take(missing)
    networks = load_networks(image_ids, team, args) if mine else None
    if mine:
        check_shapes(mine[0], scores, image_ids, networks, team, args)
    team.wait()  # until everybody has counted
    if team.is_main:
        folders.clear_folder(folder, config, args.overwrite)
    team.wait()
    draw(mine, scores, image_ids, folder, networks, team, args)
    team.wait()
    if team.is_main:
        folders.write_index(folder, image_ids, args.seed)


def check_shapes(job, scores, image_ids, networks, team, args):
    """Raise UserError unless scores and --resolution are such as the networks take."""
    condition, begin, seen = inputs_of([job], scores, image_ids, networks, team, args)
    networks[0].check(condition, begin["z"], args.resolution, args.num_inference_steps, args.sag_scale)
    with torch.inference_mode():
        for term in seen["terms"]:
            term(torch.zeros(1, 3, 8, 8, device=team.device))


def draw(jobs, scores, image_ids, folder, networks, team, args):
    """Draw every (row, sample) of `jobs` and write it to `folder` as soon as its batch is done.

    W&B shows what the first process draws. Raises UserError, at the end, for pictures that are not finite.
    """
    if not jobs:
        return
    diverged = []
    size = rows_at_once(networks[0], scores, team.device, args)
    begun = len(folders.pictures_in(folder)) or None
    name = f"recon_{args.subj}_{folders.name_of(folder)}".replace(" ", "_")
    tracker = (Tracker(folder, name, vars(args), args.wandb_log, args.wandb_project, resume_after=begun)
               if team.is_main else None)
    for start in tqdm(range(0, len(jobs), size), desc=f"batches of {size}", disable=not team.is_main):
        batch = jobs[start:start + size]
        filled = batch + [batch[-1]] * (size - len(batch)) if team.device.type == "cpu" else batch
        if start == 0 and team.is_main and (args.feats or args.use_gnet) and args.guidance_decoder != "full":
            print_cosine(batch[:8], scores, image_ids, networks, team, args)
        images, steps = draw_batch(filled, scores, image_ids, networks, team, args)
        images = images[:len(batch)]
        finite = torch.isfinite(images).flatten(1).all(1).tolist()
        diverged += [image_ids[row] for (row, _), fine in zip(batch, finite, strict=True) if not fine]
        arrays = (images.nan_to_num() * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)
        drawn = [pair for pair, fine in zip(zip(batch, arrays, strict=True), finite, strict=True) if fine]
        if args.use_gnet:
            for i in np.flatnonzero(finite):
                folders.save_steps(folder, *batch[i], [{key: found[i] for key, found in step.items()}
                                                        for step in steps])
        for job, array in drawn:
            folders.save_picture(folder, *job, array)
        if tracker is not None:
            captions = [f"id {image_ids[row]}, sample {sample}" for (row, sample), _ in drawn]
            tracker.log_images("recon/pictures", [array for _, array in drawn], captions)
    if tracker is not None:
        tracker.finish()
    if diverged:
        raise utils.UserError(f"--guidance_scale {args.guidance_scale:g}, --precision {args.precision}: the sampler "
                              f"diverged (NaN) on {len(diverged)} of {len(jobs)} pictures (first: image id "
                              f"{diverged[0]}), wanted finite ones; lower the scale or use --precision fp32")


def load_networks(image_ids, team, args):
    """The pipeline; for guidance the decoder that the losses see, the CLIP features and the brain (None without)."""
    guide = brain_guide(image_ids, team, args) if args.use_gnet else None  # first: it checks what the user gave
    pipe = load_pipeline(args.sd_model, team.device, team.precision, args.offload, args.compile)
    pipe.set_progress_bar_config(desc="steps", leave=False, disable=not team.is_main)
    decoder, clip_features = None, None
    if args.feats or args.use_gnet:
        decoder = load_guidance_decoder(args.guidance_decoder, pipe)
    if args.feats:
        clip_features = ClipFeatures.from_pretrained(args.clip_model, layers_of(args))
        clip_features.to(team.device, torch.float32)
    return pipe, decoder, clip_features, guide


def brain_guide(image_ids, team, args):
    """What pulls the pictures of these images (N,) towards responses of --subj, or of --target_fmri_npy."""
    paths = Paths.from_args(args)
    encoder = load_encoder(paths, args.subj, args.gnet_run, args.seed, team.device)
    if args.target_fmri_npy:
        targets = read_target(Path(args.target_fmri_npy), image_ids, len(encoder.val_r))
    else:
        targets = responses_to(paths, args.subj, image_ids, args.num_sessions, args.control, args.seed,
                                    args.repeats).betas
    return BrainGuide(encoder, paths, targets, args.gnet_roi, args.gnet_kappa, args.gnet_alpha, team.print)


def draw_batch(jobs, scores, image_ids, networks, team, args):
    """Images (B, 3, H, W) in [0, 1] of B jobs, and what the guided steps found: [{name: list of B}]."""
    pipe, log = networks[0], []
    condition, begin, seen = inputs_of(jobs, scores, image_ids, networks, team, args)
    images = pipe(condition, **begin, cfg_scale=args.cfg_scale, sag_scale=args.sag_scale, **seen,
                  rule=args.guidance_rule, guidance_scale=args.guidance_scale,
                  guidance_strength=args.guidance_strength, log=log)
    return images, [{name: values.tolist() for name, values in step.items()} for step in log]


def inputs_of(jobs, scores, image_ids, networks, team, args):
    """The condition (B, T, D) of B jobs, where their paths start and what the losses see: arguments of the sampler."""
    _, decoder, clip_features, guide = networks
    rows, samples = (list(column) for column in zip(*jobs, strict=True))
    at = {feat: torch.from_numpy(array[rows]).to(team.device) for feat, array in scores.items()}  # (B, ...) each
    begin = dict(image_ids=image_ids[rows].tolist(), sample=samples, seed=args.seed, z=at.get("z"),
                 strength=args.strength, resolution=args.resolution, num_inference_steps=args.num_inference_steps)
    terms = [ClipFeatureLoss(clip_features, {k: at[f"g_{k}"] for k in layers_of(args)})] if args.feats else []
    terms += [guide.term(rows)] if guide else []
    return at["c"], begin, dict(terms=terms, grad=args.guidance_grad, x0=args.guidance_x0, decoder=decoder)


def print_cosine(jobs, scores, image_ids, networks, team, args):
    """Print how far the gradient through --guidance_decoder agrees with the full one, job by job to need no memory."""
    pipe, cosines = networks[0], []
    try:
        for job in jobs:
            condition, begin, seen = inputs_of([job], scores, image_ids, networks, team, args)
            latents, timesteps = pipe.start(**begin)
            if len(timesteps):
                cosines.append(gradient_cosine(pipe, condition, (latents, timesteps), args.cfg_scale, **seen))
    except torch.OutOfMemoryError:
        print("--guidance_decoder: its gradient is not compared, the full decoder does not fit the GPU")
    if cosines:
        print(f"--guidance_decoder {args.guidance_decoder}: cosine of its gradient with the full decoder's "
              f"{np.mean(cosines):.3f} (first step, mean of {len(cosines)} pictures)")


def layers_of(args):
    """[2, 4, ...] of --feats."""
    return [int(feat.removeprefix("g_")) for feat in args.feats]


def rows_at_once(pipe, scores, device, args):
    """Pictures per batch.

    On a CPU the last digits of a network's output depend on the number of rows that go through it together, not on
    which rows they are. So there it is always the same number, and what lacks at the end is filled up.
    """
    if device.type != "cpu":
        return args.batch_size
    return rows_on_cpu(pipe.latent_shape(args.resolution, scores["z"].shape[1:] if "z" in scores else None))


def out_of_memory(args):
    """What to do about a batch that does not fit."""
    if args.batch_size > 1:
        return f"--batch_size {args.batch_size}: does not fit the GPU; lower it (--batch_size {args.batch_size // 2})"
    return ("--batch_size 1: does not fit the GPU; use a lower --precision, --guidance_grad x0 or --guidance_decoder "
            "half")


def resolve(args, team):
    """Replace what the flags leave open (None, auto, none) by what will be used; wrong values raise UserError."""
    args.feats = sorted({feat for feat in args.feats if feat}, key=lambda feat: int(feat.removeprefix("g_")))
    if args.guidance_scale is None:
        args.guidance_scale = DEFAULT_SCALE[args.guidance_rule]
    if args.use_gnet:
        resolve_gnet(args)
    elif not args.feats:
        args.guidance_scale = 0.0
    if not args.guidance_scale * args.guidance_strength:
        args.feats = []  # nothing is guided: read no g, load no CLIP
    for name in ("strength", "guidance_strength"):
        if not 0 <= getattr(args, name) <= 1:
            raise utils.UserError(f"--{name} {getattr(args, name):g}: wanted a fraction from 0 to 1")
    for name in ("batch_size", "limit", "num_samples", "num_inference_steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise utils.UserError(f"--{name} {getattr(args, name)}: wanted at least 1")
    for name in ("sag_scale", "cfg_scale", "guidance_scale"):
        if not 0 <= getattr(args, name) < float("inf"):
            raise utils.UserError(f"--{name} {getattr(args, name):g}: wanted a number from 0")
    if args.guidance_rule == "norm" and args.guidance_scale > MAX_SHIFT:
        raise utils.UserError(f"--guidance_scale {args.guidance_scale:g}: with --guidance_rule norm wanted at most "
                              f"{MAX_SHIFT}, the share of the noise level by which a step moves its prediction")
    for name in ("sd_model", "clip_model"):  # a folder is the same however it is written
        if Path(getattr(args, name)).is_dir():
            setattr(args, name, str(Path(getattr(args, name)).resolve()))
    if args.z == "none":
        args.strength = 1.0  # all steps are run
    elif args.z != "scores" and not args.z.endswith(".npy"):
        raise utils.UserError(f"--z {args.z}: wanted scores, none, or an .npy file beside its image_ids.npy")
    if args.compile and args.sag_scale:
        raise utils.UserError("--compile: can not watch the UNet's attention for --sag_scale; give one of them")
    if team.device.type == "cpu" and args.offload:
        raise utils.UserError("--offload: there is no GPU to keep networks off; leave it out")
    args.device = team.device.type
    args.precision = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[team.precision]


def resolve_gnet(args):
    """Check the flags of guidance by the brain, against each other too."""
    if not 0 <= args.gnet_kappa < float("inf"):
        raise utils.UserError(f"--gnet_kappa {args.gnet_kappa:g}: wanted a number from 0")
    if not 0 <= args.gnet_alpha <= 1:
        raise utils.UserError(f"--gnet_alpha {args.gnet_alpha:g}: wanted a fraction from 0 to 1")
    if not args.guidance_scale * args.guidance_strength:
        raise utils.UserError(f"--use_gnet with --guidance_scale {args.guidance_scale:g} --guidance_strength "
                              f"{args.guidance_strength:g}: nothing would be guided; for the brain without CLIP give "
                              "--feats none and a scale")
    if not args.feats and not args.gnet_kappa:
        raise utils.UserError("--gnet_kappa 0 with --feats none: nothing would guide; give one of them")
    args.gnet_run = args.gnet_run or run_name("scratch", args.subj, "gnet", None)
    if args.target_fmri_npy:
        args.target_fmri_npy = str(Path(args.target_fmri_npy).resolve())


def read_scores(paths, args):
    """The decoded features, {feat: (N, ...)}, the ids (N,) they share, and a hash of each score file."""
    def folder_of(feat):
        return paths.scores(args.subj, scores_name(vars(args), feat), feat)

    files = {feat: folder_of(feat) / "nsdgeneral.npy" for feat in ("c", *args.feats)}
    if args.z != "none":
        files["z"] = folder_of("z") / "nsdgeneral.npy" if args.z == "scores" else Path(args.z)
    scores, image_ids = {}, None
    for feat, file in files.items():
        if feat == "z" and not file.exists():
            raise utils.UserError(f"{file}: no decoded latents; score z (bash scripts/score.sh), or start from noise: "
                                  "--z none")
        ids, scores[feat] = load_scores(file.parent, file.stem)
        image_ids = ids if image_ids is None else image_ids
        if not np.array_equal(ids, image_ids):
            raise utils.UserError(
                f"{file.parent}/image_ids.npy: {len(ids)} ids that are not the {len(image_ids)} of "
                f"{files['c'].parent}/image_ids.npy, wanted the same; score c and {feat} on the same test set again")
    if args.use_gnet:
        files["gnet"] = encoder_file(paths, args.gnet_run)
        if args.target_fmri_npy:
            files["target"] = utils.require(args.target_fmri_npy, "--target_fmri_npy", "give responses as .npy")
    hashes = {feat: file_hash(file) for feat, file in files.items()}
    hashes["image_ids"] = file_hash(files["c"].parent / "image_ids.npy")
    return scores, image_ids, hashes


def pick_rows(image_ids, args):
    """Rows that --ids and --limit ask for, ascending."""
    unknown = np.setdiff1d(args.ids or [], image_ids)
    if unknown.size:
        raise utils.UserError(f"--ids {unknown[0]:.0f}: not a test image of {args.subj}; wanted 0-based 73k ids out of "
                              f"its {len(image_ids)}, {image_ids[0]}..{image_ids[-1]}")
    rows = np.flatnonzero(np.isin(image_ids, args.ids)) if args.ids else np.arange(len(image_ids))
    return rows[:args.limit].tolist()


def config_of(args, hashes):
    """Everything that decides what the pictures look like, and the commit for the record."""
    decisive = {name: value for name, value in vars(args).items() if name not in FREE_OPTIONS}
    if not args.use_gnet:  # what does not guide does not matter
        decisive = {name: value for name, value in decisive.items() if name not in GNET_OPTIONS}
    if not args.feats and not args.use_gnet:
        decisive = {name: value for name, value in decisive.items() if not name.startswith("guidance_")}
    return {**decisive, "score_hashes": hashes, "commit": utils.git_commit()}


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
