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
validation images (--test_split val) <method>_val, single trials (--repeats single) <method>_single; unguided pictures
go to <method>/0/0.

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
import shlex
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import options
import utils
from disk.names import Paths, run_name, scores_name
from nsd import sources

DEFAULT_SCALE = {"raw": 300000.0, "norm": 0.3}
# what may differ between two runs that fill one folder: it does not change any picture (but on a GPU the last digits)
FREE_OPTIONS = ("root", "data_path", "batch_size", "limit", "ids", "num_samples", "outdir", "overwrite",
                "offload", "dry_run", "wandb_log", "wandb_project")
PATH_OPTIONS = ("sd_model", "clip_model", "guidance_decoder", "z", "target_fmri_npy")
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
    which.add_argument("--limit", type=options.whole, metavar="IMAGES", help="the first N test images")
    which.add_argument("--ids", type=options.whole, nargs="+", metavar="ID", help="only these 0-based 73k ids")
    which.add_argument("--num_samples", type=options.whole, default=1, metavar="SAMPLES", help="pictures per image")
    which.add_argument("--outdir", metavar="DIR", help="write here instead")
    which.add_argument("--overwrite", action="store_true", help="delete the folder's pictures and start again")

    group = parser.add_argument_group("sampling")
    group.add_argument("--sd_model", default=sources.SD_MODEL, metavar="NAME|DIR",
                       help="any Stable Diffusion 1.x")
    group.add_argument("--clip_model", default=sources.CLIP_MODEL, metavar="NAME|DIR",
                       help="the CLIP that g_k comes from")
    group.add_argument("--resolution", type=options.whole, metavar="PIXELS",
                       help="side of the picture (the model's own)")
    group.add_argument("--num_inference_steps", type=options.whole, default=50, metavar="STEPS", help="DDIM steps")
    group.add_argument("--cfg_scale", type=float, default=7.5, metavar="X", help="classifier-free guidance")
    group.add_argument("--strength", type=float, default=0.75, metavar="FRACTION",
                       help="with --z: fraction of the steps to run from there")
    group.add_argument("--sag_scale", type=float, default=0.0, metavar="X",
                       help="self-attention guidance; NeuralDiffuser's code runs 0.75 (default: off)")
    options.add_guidance_folder(parser)
    group.add_argument("--guidance_rule", choices=options.RULES, default="raw", help="use of the gradient (see above)")
    group.add_argument("--guidance_grad", choices=options.GRADS, default="xt",
                       help="differentiate through the UNet (xt) or only through the decoder (x0, cheaper)")
    group.add_argument("--guidance_x0", choices=options.X0S, default="cond",
                       help="the prediction the losses see: conditional, or with classifier-free guidance")
    group.add_argument("--guidance_decoder", default="full", metavar="full|half|DIR",
                       help="decoder for the losses: the model's own VAE, the same at half the resolution, or an "
                            "AutoencoderTiny (TAESD); how well the gradient of a cheaper one agrees is printed")
    brain = parser.add_argument_group("guidance by the brain")
    options.add_gnet(brain)
    brain.add_argument("--gnet_alpha", type=float, default=1.0, metavar="FRACTION",
                       help="share of the loss that is 1 - r across voxels, the rest being the squared error")
    brain.add_argument("--target_fmri_npy", metavar="FILE",
                       help="target responses (n, voxels), beside an image_ids.npy (default: the subject's own, "
                            "averaged over repeats, under the same --control)")
    options.add_precision(parser)
    group.add_argument("--batch_size", type=options.whole, default=4, metavar="PICTURES",
                       help="per batch on a GPU (on a CPU always as many as make up 4096 latent pixels)")
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
    args = get_parser().parse_args(argv, writes=lambda given: [resolve(given, Paths.from_args(given))])
    paths = Paths.from_args(args)
    folder = resolve(args, paths)

    from sampling import drawing, folders
    from sampling.inputs import pick_rows, read_scores
    from training.team import Team
    from training.tracking import Tracker, check_tracking

    check_tracking(args.wandb_log)
    utils.reproducible_products()
    team = Team.assemble(args.device, args.precision, timedelta(days=1))  # shares may take hours longer than others
    resolve_device(args, team)

    files = score_files(paths, args)
    scores, image_ids = read_scores(files)
    rows = pick_rows(image_ids, args.ids, args.limit, args.subj)
    jobs = [(row, sample) for row in rows for sample in range(args.num_samples)]
    files |= {**guide_files(paths, args), "image_ids": files["c"].parent / "image_ids.npy"}
    config = config_of(args, paths, files)

    name = f"recon_{args.subj}_{folders.name_of(folder)}".replace(" ", "_")
    tracker = partial(Tracker, folder, name, vars(args), args.wandb_log, args.wandb_project)
    with drawing.memory_advice(args.batch_size):
        drawing.fill(folder, jobs, config, partial(load_sampler, args, paths, scores, image_ids, team), tracker, team,
                     args.overwrite)
    if team.is_main:
        folders.write_index(folder, image_ids, args.seed)
        print(f"pictures       {folder}\n{how_to_evaluate(folder, args.control or args.run == 'ground_truth')}")


def how_to_evaluate(folder, is_control):
    """Say what evaluates the pictures; a control and the ceiling are rows beside the reconstructions."""
    if is_control:
        return "evaluate with  bash scripts/evaluate.sh  # of the reconstructions: these are then a row of their table"
    return f"evaluate with  bash scripts/evaluate.sh --images {shlex.quote(str(folder))}  # contact sheet, report"


# --- what is drawn from -----------------------------------------------------------------------------------------------


def score_files(paths, args):
    """{feature: file} of the scores that are drawn from: c, the g_k that guide, and z unless paths start from noise.

    Raises UserError for scores that are not there, which names those that are.
    """
    from disk.hints import how_to_score, scores_like

    feats = ["c", *args.feats, *(["z"] if args.z == "scores" else [])]
    files = {feat: paths.scores(args.subj, scores_name(vars(args), feat), feat) / "nsdgeneral.npy" for feat in feats}
    without = {"z": ", or start from noise (--z none)"} | dict.fromkeys(args.feats, ", or leave it out of --feats")
    for feat, file in files.items():
        there = scores_like(paths, vars(args), feat) if not file.exists() else ""
        utils.require(file, f"scores of {feat}", (f"{there}: give the flags of one, or " if there else "")
                      + how_to_score(paths, vars(args), feat) + without.get(feat, ""))
    if args.z not in ("scores", "none"):
        files["z"] = utils.require(args.z, "--z: latents", "give scores, none, or an .npy beside its image_ids.npy")
    return files


def guide_files(paths, args):
    """{name: file} of what guides beside the scores; UserError for one that is not there."""
    if not args.use_gnet:
        return {}
    from encoding.encoder import encoder_file

    files = {"gnet": encoder_file(paths, args.gnet_run)}
    if args.target_fmri_npy:
        files["target"] = utils.require(args.target_fmri_npy, "--target_fmri_npy", "give responses as .npy")
    return files


def load_sampler(args, paths, scores, image_ids, team):
    """The pipeline, what it draws from, and what guides it: CLIP with --feats, the brain with --use_gnet."""
    from disk.hub import find_model

    find_model(args.sd_model, paths, "--sd_model", sources.how_to_fetch(args.sd_model), "model_index.json")
    if args.feats:
        find_model(args.clip_model, paths, "--clip_model", sources.how_to_fetch(args.clip_model))
    from sampling.decoders import load_guidance_decoder
    from sampling.drawing import Sampler, Settings
    from sampling.pipeline import load_pipeline  # takes seconds

    brain = [brain_guide(args, paths, image_ids, team)] if args.use_gnet else []  # first: it checks what the user gave
    pipe = load_pipeline(args.sd_model, team.device, team.precision, args.offload, args.compile)
    pipe.set_progress_bar_config(desc="steps", leave=False, disable=not team.is_main)
    guided = args.feats or args.use_gnet
    if guided and args.guidance_decoder not in ("full", "half"):
        find_model(args.guidance_decoder, paths, "--guidance_decoder", "full or half")
    decoder = load_guidance_decoder(args.guidance_decoder, pipe) if guided else None
    clip = [clip_guide(args, scores, team.device)] if args.feats else []
    return Sampler(pipe, scores, image_ids, [*clip, *brain], decoder, Settings.of(vars(args)), team.device)


def clip_guide(args, scores, device):
    """What pulls the CLIP features of the pictures towards the decoded g_k of --feats."""
    from models import ClipFeatures
    from sampling.guidance import ClipGuide

    layers = {int(feat.removeprefix("g_")): scores[feat] for feat in args.feats}
    clip_features = ClipFeatures.from_pretrained(args.clip_model, list(layers))
    return ClipGuide(clip_features.float().to(device), layers)


def brain_guide(args, paths, image_ids, team):
    """What pulls the pictures of these images (N,) towards responses of --subj, or of --target_fmri_npy."""
    from encoding.encoder import load_encoder
    from encoding.guide import BrainGuide, read_target
    from nsd.repeats import responses_to

    encoder = load_encoder(paths, args.subj, args.gnet_run, args.seed, team.device)
    if args.target_fmri_npy:
        targets = read_target(Path(args.target_fmri_npy), image_ids, len(encoder.val_r))
    else:
        targets = responses_to(paths, args.subj, image_ids, args.num_sessions, args.control, args.seed,
                               args.repeats).betas
    return BrainGuide(encoder, paths, targets, args.gnet_roi, args.gnet_kappa, args.gnet_alpha, team.print)


# --- flags ----------------------------------------------------------------------------------------------------------


def resolve(args, paths):
    """Replace what the flags leave open (None, none) by what will be used; wrong values raise UserError.

    Returns the folder that the pictures go to.
    """
    args.feats = sorted({feat for feat in args.feats if feat}, key=lambda feat: int(feat.removeprefix("g_")))
    if args.guidance_scale is None:
        args.guidance_scale = DEFAULT_SCALE[args.guidance_rule]
    if args.use_gnet:
        resolve_gnet(args, paths)
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
    if args.guidance_rule == "norm" and args.guidance_scale > options.MAX_SHIFT:
        raise utils.UserError(f"--guidance_scale {args.guidance_scale:g}: with --guidance_rule norm wanted at most "
                              f"{options.MAX_SHIFT}, the share of the noise level by which a step moves its prediction")
    args.sd_model, args.clip_model = map(paths.model, (args.sd_model, args.clip_model))
    if args.guidance_decoder not in ("full", "half"):
        args.guidance_decoder = paths.model(args.guidance_decoder)
    if args.z == "none":
        args.strength = 1.0  # all steps are run
    elif args.z != "scores":
        if not args.z.endswith(".npy"):
            raise utils.UserError(f"--z {args.z}: wanted scores, none, or an .npy file beside its image_ids.npy")
        args.z = str(paths.find(args.z))
    if args.compile and args.sag_scale:
        raise utils.UserError("--compile: cannot watch the UNet's attention for --sag_scale; give one of them")
    return paths.find(args.outdir) if args.outdir else paths.images_of(vars(args))


def resolve_gnet(args, paths):
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
        raise utils.UserError("--gnet_kappa 0 with --feats none: nothing would guide; change one of them")
    args.gnet_run = args.gnet_run or run_name("scratch", args.subj, "gnet", None)
    if args.target_fmri_npy:
        args.target_fmri_npy = str(paths.find(args.target_fmri_npy))


def resolve_device(args, team):
    """Replace --device and --precision by what the team computes with; UserError for flags that do not suit it."""
    from training.team import pick_precision

    if team.device.type == "cpu" and args.offload:
        raise utils.UserError("--offload: there is no GPU; leave it out")
    names = {pick_precision(name, team.device): name for name in ("fp32", "bf16", "fp16")}
    args.device, args.precision = team.device.type, names[team.precision]


def config_of(args, paths, files):
    """Everything that decides what the pictures look like, hashes of `files` too, and the commit for the record."""
    from disk.files import file_hash

    decisive = {name: paths.as_recorded(value) if name in PATH_OPTIONS and value else value
                for name, value in vars(args).items() if name not in FREE_OPTIONS}
    if not args.use_gnet:  # what does not guide does not matter
        decisive = {name: value for name, value in decisive.items() if name not in GNET_OPTIONS}
    if not args.feats and not args.use_gnet:
        decisive = {name: value for name, value in decisive.items() if not name.startswith("guidance_")}
    hashes = {name: file_hash(file) for name, file in files.items()}
    return {**decisive, "score_hashes": hashes, "commit": utils.git_commit()}


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
