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
validation images (--test_split val) <method>_val, single trials (--repeats single) <method>_single, regions alone or
left out (--voxels, --without) <method>_only_V1+V2, <method>_without_V4; unguided pictures go to <method>/0/0.

--guidance_rule posterior takes what was decoded as measurements of the picture, with the errors that they had on
validation images: guidance_scale (default 30) multiplies their log likelihood, of which each step follows the gradient
once; it has the same meaning for any model, resolution and number of steps. raw adds guidance_scale (300000) times the
gradient of a loss, as NeuralDiffuser does; with norm guidance_scale (0.3) is the share of the noise level by which a
step moves its predicted image against that gradient, at most 0.6.

--use_adapter lets the UNet draw from the decoded g_k and z as it does from c, by an adapter trained for it
(train_adapter.py), guided or not; folder <method>_adapter.

--use_gnet lets the measured response guide as well: a brain encoding model (train_gnet.py) predicts the response to the
picture being formed, and the picture is moved towards the subject's own response to that image, or towards any response
(--target_fmri_npy). These pictures get the folder <method>_gnet_<roi>_<kappa>. --select copies the best picture of each
image to <method>_select_<by>; index.csv there says which it is, and the misfits of all of them.

    python src/recon.py --subj 1
    python src/recon.py --subj 1 --limit 10 --num_samples 4 --guidance_rule norm --guidance_scale 0.2 --method norm
    python src/recon.py --subj 1 --feats none --control shuffle
    python src/recon.py --subj 1 --use_adapter
    python src/recon.py --subj 1 --use_gnet --gnet_roi V1 --gnet_kappa 1
    python src/recon.py --subj 1 --use_gnet --feats none --guidance_rule norm    # the brain alone
    python src/recon.py --subj 1 --num_samples 4 --select g     # the one of four that agrees best with the decoded g_k
    accelerate launch --num_processes 4 src/recon.py --subj 1      # four GPUs share the test images
"""

import argparse
import hashlib
import shlex
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import options
import utils
from disk.names import Paths, run_name, scores_name
from nsd import sources

PUBLISHED = {"guidance_strength": 0.2, "guidance_draws": 0, "num_inference_steps": 50, "guidance_decoder": "full",
             "gnet_from": 0.0}
DEFAULTS = {  # of flags that depend on --guidance_rule
    "posterior": {"guidance_scale": 30.0, "guidance_strength": 0.8, "guidance_draws": 3, "num_inference_steps": 14,
                  "guidance_decoder": sources.TAESD, "gnet_from": 0.5},
    "raw": {"guidance_scale": 300000.0, **PUBLISHED},
    "norm": {"guidance_scale": 0.3, **PUBLISHED},
}
# what may differ between two runs that fill one folder: it does not change any picture (but on a GPU the last digits)
FREE_OPTIONS = ("root", "data_path", "batch_size", "limit", "ids", "num_samples", "outdir", "overwrite",
                "offload", "dry_run", "wandb_log", "wandb_project", "wandb_group", "wandb_upload", "select",
                "select_feats")
PATH_OPTIONS = ("sd_model", "clip_model", "guidance_decoder", "z", "target_fmri_npy")
SHOWN = 8  # images whose pictures W&B shows
ADAPTER_OPTIONS = ("use_adapter", "adapter_run")
GNET_OPTIONS = ("use_gnet", "gnet_roi", "gnet_kappa", "gnet_alpha", "gnet_from", "gnet_run", "target_fmri_npy")


def get_parser():
    parser = options.Parser(__doc__)
    options.add_paths(parser)
    options.add_subject(parser)
    options.add_run(parser)
    options.add_scored_run(parser)
    options.add_control(parser)
    options.add_lesion(parser)
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
    group.add_argument("--num_inference_steps", type=options.whole, metavar="STEPS",
                       help="of a path from pure noise, of which --strength runs a part (by the rule: 14, 50 with raw "
                            "and norm)")
    group.add_argument("--solver", choices=options.SOLVERS, default="ddim",
                       help="DDIM, or DPM-Solver++ (2M), of second order")
    group.add_argument("--cfg_scale", type=float, default=7.5, metavar="X", help="classifier-free guidance")
    group.add_argument("--strength", type=float, default=0.75, metavar="FRACTION",
                       help="with --z: fraction of the steps to run from there")
    group.add_argument("--sag_scale", type=float, default=0.0, metavar="X",
                       help="self-attention guidance; NeuralDiffuser's code runs 0.75 (default: off)")
    options.add_guidance_folder(parser)
    group.add_argument("--guidance_rule", choices=options.RULES, default="posterior",
                       help="use of the gradient (see above)")
    group.add_argument("--guidance_repeats", type=options.whole, default=1, metavar="N",
                       help="take each guided step N times, noised back in between (time travel): nearer to what g "
                            "says, at N times the cost")
    group.add_argument("--guidance_draws", type=options.whole, metavar="N",
                       help="N noised versions of the prediction, at whose mean gradient g pulls; 0: the prediction "
                            "itself (by the rule: 3, 0 with raw and norm)")
    group.add_argument("--guidance_grad", choices=options.GRADS, default="xt",
                       help="differentiate through the UNet (xt) or only through the decoder (x0, cheaper)")
    group.add_argument("--guidance_x0", choices=options.X0S, default="cond",
                       help="the prediction the losses see: conditional, or with classifier-free guidance")
    group.add_argument("--guidance_decoder", metavar="full|half|NAME|DIR",
                       help="decoder for the losses: the model's own VAE, the same at half the resolution, or an "
                            f"AutoencoderTiny; how well the gradient of a cheaper one agrees is printed (by the rule: "
                            f"{sources.TAESD}, full with raw and norm)")
    parser.add_argument("--adapter_run", type=options.tag, metavar="RUN",
                        help="the adapter: a folder of train_logs (adapter_<subj>)")
    brain = parser.add_argument_group("guidance by the brain")
    options.add_gnet(brain)
    brain.add_argument("--gnet_alpha", type=float, default=1.0, metavar="FRACTION",
                       help="raw and norm: share of the loss that is 1 - r across voxels, the rest being the "
                            "squared error")
    brain.add_argument("--gnet_from", type=float, metavar="FRACTION",
                       help="of the guided steps, which are left to g: from there on the brain pulls, too (by the "
                            "rule: 0.5, 0 with raw and norm)")
    brain.add_argument("--target_fmri_npy", metavar="FILE",
                       help="target responses (n, voxels), beside an image_ids.npy (default: the subject's own, "
                            "averaged over repeats, under the same --control)")
    options.add_precision(parser, "fp16 on a GPU")
    group.add_argument("--batch_size", type=whole_or_auto, default="auto", metavar="PICTURES|auto",
                       help="per batch on a GPU; auto: as many as fit, counted before anything is drawn (on a CPU "
                            "always as many as make up 5120 latent pixels)")
    group.add_argument("--offload", action=argparse.BooleanOptionalAction, default=False,
                       help="keep networks in main memory between batches, and the text encoder after its one pass; a "
                            "guided step needs UNet and VAE together")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                       help="torch.compile the UNet; with gradient, if that proves right: slower start, faster steps")
    options.add_compute(parser)
    options.add_tracking(parser)
    return parser


def layer_or_none(text):
    return None if text in ("", "none") else options.vision_layer(text)


def whole_or_auto(text):
    return None if text == "auto" else options.whole(text)


def main(argv=None):
    args = get_parser().parse_args(argv, writes=lambda given: [resolve(given, Paths.from_args(given))])
    paths = Paths.from_args(args)
    folder = resolve(args, paths)

    from sampling import drawing, folders
    from sampling.inputs import pick_rows, read_scores
    from sampling.selection import select
    from training.settings import Wandb
    from training.team import Team
    from training.tracking import Dashboard, check_tracking

    check_tracking(args.wandb_log)
    utils.reproducible_products()
    # a process may take hours longer than others
    team = Team.assemble(args.device, drawing_precision(args), timedelta(days=1))
    resolve_device(args, team)

    adapted = adapted_feats(paths, args) if args.use_adapter else []
    feats = dict.fromkeys(["c", *args.feats, *adapted, *(["z"] if args.z == "scores" else [])])
    files = score_files(paths, args, feats)
    if args.z not in ("scores", "none"):
        files["start"] = utils.require(args.z, "--z: latents", "give scores, none, or an .npy beside its image_ids.npy")
    scores, image_ids = read_scores(files)
    rows = pick_rows(image_ids, args.ids, args.limit, args.subj)
    jobs = [(row, sample) for row in rows for sample in range(args.num_samples)]
    files |= {"adapter": adapter_file(paths, args)} if args.use_adapter else {}
    files |= {**(guide_files(paths, args) if args.use_gnet else {}), "image_ids": files["c"].parent / "image_ids.npy"}
    config = config_of(args, paths, files)

    if args.select:  # before hours of drawing
        selection = config | selection_of(args, paths)
        folders.check_folder(folder, selection, args.overwrite)
    drawn = samples_folder(args, paths, folder)
    name = f"recon_{args.subj}_{folders.name_of(folder)}".replace(" ", "_")
    asked = Wandb.from_args(args).of("recon", args.method, args.run, args.guidance_rule, args.control)
    with drawing.memory_advice(args.batch_size):
        board = drawing.fill(drawn, jobs, config, partial(load_sampler, args, paths, scores, image_ids, team),
                             partial(Dashboard, drawn, name, vars(args), asked), team, args.overwrite)
    if team.is_main:
        folders.write_index(drawn, image_ids, args.seed)
        if args.select:
            misfit = selector(args, paths, image_ids, team)
            select(drawn, folder, args.num_samples, misfit, args.select, selection, args.overwrite)
        show(board, folder, image_ids, rows, files, config["score_hashes"])
        print(f"pictures       {folder}\n{how_to_evaluate(folder, is_variant(args))}")


def show(board, folder, image_ids, rows, files, hashes):
    """Show W&B a few of the pictures, of the same images whatever the settings, and what they were drawn from.

    image_ids (N,): of the scores; rows: those that were asked for; files, hashes: {name: ...} of what was read.
    """
    from disk.files import archive_hash
    from sampling import folders

    pictures = {rows[at]: folder / folders.file_name(rows[at], 0) for at in utils.evenly(len(rows), SHOWN)}
    pictures = {row: file for row, file in pictures.items() if file.exists()}
    board.log_images("recon/images", map(folders.read_png, pictures.values()),
                     [f"id {image_ids[row]}" for row in pictures])
    for name, file in files.items():
        if name in ("gnet", "adapter"):
            board.uses("checkpoint", file, archive_hash)
        elif name != "image_ids":
            board.uses("scores", Path(file), hashes[name])
    board.makes("pictures", folder / "index.csv", lambda index: folders.set_hash(folder),
                [folder / "index.csv", folder / "config.json", *sorted(folders.pictures_in(folder))])
    board.finish()


def is_variant(args):
    """Say whether these pictures are a control, a lesion or the ceiling, to be compared with the reconstructions."""
    return bool(args.control or args.voxels or args.without) or args.run == "ground_truth"


def how_to_evaluate(folder, is_compared):
    """Say what evaluates the pictures; those to be compared are rows beside the reconstructions."""
    if is_compared:
        return "evaluate with  bash scripts/evaluate.sh  # of the reconstructions: these are then a row of their table"
    return f"evaluate with  bash scripts/evaluate.sh --images {shlex.quote(str(folder))}  # contact sheet, report"


# --- what is drawn from -----------------------------------------------------------------------------------------------


def score_files(paths, args, feats):
    """{feature: file} of the scores of these features.

    Raises UserError for scores that are not there, which names those that are.
    """
    from disk.hints import how_to_score, scores_like

    files = {feat: paths.scores(args.subj, scores_name(vars(args), feat), feat) / "nsdgeneral.npy" for feat in feats}
    without = dict.fromkeys(feats, ", or leave it out of --feats") | {
        "c": "", "z": ", or draw without --use_adapter" if args.use_adapter else ", or start from noise (--z none)"}
    for feat, file in files.items():
        there = scores_like(paths, vars(args), feat) if not file.exists() else ""
        utils.require(file, f"scores of {feat}", (f"{there}: give the flags of one, or " if there else "")
                      + how_to_score(paths, vars(args), feat) + without[feat])
    return files


def guide_files(paths, args):
    """{name: file} of the brain as guide or judge; UserError for one that is not there."""
    from encoding.encoder import encoder_file

    files = {"gnet": encoder_file(paths, args.gnet_run)}
    if args.target_fmri_npy:
        files["target"] = utils.require(args.target_fmri_npy, "--target_fmri_npy", "give responses as .npy")
    return files


def adapter_file(paths, args):
    """The checkpoint of the adapter; UserError when there is none."""
    return utils.require(paths.run(args.adapter_run) / "best.pth", f"--use_adapter: the adapter {args.adapter_run}",
                         f"train one (STAGES=adapter SUBJ={int(args.subj[-2:])} bash scripts/train.sh), name another "
                         "(--adapter_run), or draw without")


def adapted_feats(paths, args):
    """Names of the features that the adapter takes."""
    from sampling.adapter import feats_of  # loads what trains, which others do without

    return feats_of(adapter_file(paths, args), args.adapter_run)


def error_files(paths, args, feats):
    """{g_k: file} of the scores' errors on validation images, which make measurements of them.

    True features have no errors: they count as the fine-tuned run's do. UserError for a file that is not there.
    """
    from disk.hints import how_to_score

    flags = vars(args) | ({"run": "finetune"} if args.run == "ground_truth" else {})
    return {feat: utils.require(
        paths.scores(args.subj, scores_name(flags, feat), feat) / "errors.npy",
        f"errors of {feat} on validation images",
        f"{how_to_score(paths, flags, feat)}, with --overwrite if it was scored, or use --guidance_rule raw")
        for feat in feats}


def load_sampler(args, paths, scores, image_ids, team):
    """The pipeline, what it draws from, and what guides it: CLIP with --feats, the brain with --use_gnet."""
    from disk.hub import find_model

    find_model(args.sd_model, paths, "--sd_model", sources.how_to_fetch(args.sd_model), "model_index.json")
    if args.feats:
        find_clip(args, paths)
    from sampling.adapter import check_scores, load_adapter
    from sampling.decoders import load_guidance_decoder
    from sampling.drawing import Sampler, Settings
    from sampling.pipeline import load_pipeline  # takes seconds

    brain = []
    if args.use_gnet:  # first: it checks what the user gave
        brain.append(brain_guide(args, paths, image_ids, team, args.guidance_rule == "posterior"))
    pipe = load_pipeline(args.sd_model, team.device, team.precision, args.offload, args.compile)
    adapter = None
    if args.use_adapter:
        adapter = load_adapter(adapter_file(paths, args), pipe.unet, team.device)
        check_scores(adapter, scores, args.adapter_run)
    pipe.set_progress_bar_config(desc="steps", leave=False, disable=not team.is_main)
    guided = args.feats or args.use_gnet
    if guided and args.guidance_decoder not in ("full", "half"):
        how = sources.how_to_fetch(args.guidance_decoder)
        find_model(args.guidance_decoder, paths, "--guidance_decoder", f"full or half{how and ', or ' + how}")
    decoder = load_guidance_decoder(args.guidance_decoder, pipe) if guided else None
    clip = [clip_guide(args, paths, scores, team.device)] if args.feats else []
    starts = {"none": None, "scores": scores.get("z")}.get(args.z, scores.get("start"))
    return Sampler(pipe, scores, image_ids, [*clip, *brain], decoder, Settings.of(vars(args)), team.device, starts,
                   adapter)


def find_clip(args, paths):
    """Raise UserError unless --clip_model is there, or can be fetched."""
    from disk.hub import find_model

    find_model(args.clip_model, paths, "--clip_model", sources.how_to_fetch(args.clip_model))


def clip_guide(args, paths, scores, device):
    """What pulls the CLIP features of the pictures towards the decoded g_k of --feats."""
    from sampling.guidance import ClipGuide

    if args.guidance_rule == "posterior":
        return clip_measurements(args, paths, {feat: scores[feat] for feat in args.feats}, device)
    return ClipGuide(*clip_layers(args, {feat: scores[feat] for feat in args.feats}, device))


def clip_layers(args, by_layer, device):
    """The CLIP of --clip_model as models.ClipFeatures, and values {g_k: ...} by the number of their layer, {k: ...}."""
    from models import ClipFeatures

    by_layer = {int(feat.removeprefix("g_")): value for feat, value in by_layer.items()}
    return ClipFeatures.from_pretrained(args.clip_model, list(by_layer)).float().to(device), by_layer


def clip_measurements(args, paths, scores, device):
    """Scores {g_k: (N, T, D)} as measurements of the pictures: sampling.measurements.ClipMeasurements."""
    from disk.files import load_json, load_npy
    from nsd.components import open_components
    from sampling.measurements import ClipMeasurements, Measurement

    shrunk, measured = args.run != "ground_truth", {}  # a regression's predictions are, true features are not
    for feat, file in error_files(paths, args, scores).items():
        components, errors = open_components(paths, feat), load_npy(file, f"errors of {feat}", "score it again")
        made_from = load_json(file.parent / "config.json").get("components", components.digest)
        if len(errors) > components.k + 1 or made_from != components.digest:
            raise utils.UserError(f"{file}: errors of other components than those in {components.path}; score {feat} "
                                  "again with --overwrite")
        measured[feat] = Measurement.of(components, scores[feat], errors, shrunk, device)
    return ClipMeasurements(*clip_layers(args, measured, device))


def selection_of(args, paths):
    """{name: value} of all that decides --select's choice; UserError, before anything is drawn, for what it lacks."""
    from disk.files import file_hash

    decisive = {"select": args.select, "num_samples": args.num_samples}
    if args.select == "g":
        find_clip(args, paths)
        files = score_files(paths, args, args.select_feats)
        decisive |= {"select_feats": args.select_feats,
                     "select_errors": measurements_hash(args, paths, args.select_feats)}
    else:
        files = guide_files(paths, args)
        decisive |= {name: getattr(args, name) for name in GNET_OPTIONS if name not in ("use_gnet", "gnet_from")}
    return decisive | {"select_hashes": {name: file_hash(file) for name, file in files.items()}}


def selector(args, paths, image_ids, team):
    """What --select compares: (rows (B,), images (B, 3, H, W)) -> (B,)."""
    from sampling.inputs import read_scores

    if args.select == "g":
        scores, _ = read_scores(score_files(paths, args, args.select_feats))
        guide = clip_measurements(args, paths, scores, team.device)
    else:
        guide = brain_guide(args, paths, image_ids, team, posterior=True)
    return lambda rows, images: guide.term(rows)(images.to(team.device))


def brain_guide(args, paths, image_ids, team, posterior):
    """What pulls the pictures of these images (N,) towards responses of --subj, or of --target_fmri_npy."""
    from encoding.encoder import load_encoder
    from encoding.guide import BrainGuide, read_target
    from nsd.repeats import responses_to
    from training.bottleneck import numbers_left

    if numbers_left(args.control) or args.voxels or args.without:
        given = next(f"--{name} {getattr(args, name)}" for name in ("voxels", "without", "control")
                     if getattr(args, name))
        raise utils.UserError(f"{given} with --use_gnet or --select gnet: the encoding model would read the whole "
                              "response; leave one of them out")
    encoder = load_encoder(paths, args.subj, args.gnet_run, args.seed, team.device)
    if args.target_fmri_npy:
        targets = read_target(Path(args.target_fmri_npy), image_ids, len(encoder.val_r))
    else:
        targets = responses_to(paths, args.subj, image_ids, args.num_sessions, args.control, args.seed,
                               args.repeats).betas
    return BrainGuide(encoder, paths, targets, args.gnet_roi, args.gnet_kappa, args.gnet_alpha,
                      args.gnet_from, posterior, team.print)


# --- flags ----------------------------------------------------------------------------------------------------------


def resolve(args, paths):
    """Replace what the flags leave open (None, none) by what will be used; wrong values raise UserError.

    Returns the folder that the pictures go to.
    """
    args.feats = sorted({feat for feat in args.feats if feat}, key=lambda feat: int(feat.removeprefix("g_")))
    with_defaults(args)
    if args.hold_out and (args.use_gnet or args.select == "gnet"):
        raise utils.UserError(f"--hold_out {args.hold_out} with --use_gnet or --select gnet: the encoding model has "
                              "seen responses to the images that were held out; leave one of them out")
    if args.use_adapter:
        resolve_adapter(args)
    if args.use_gnet:
        resolve_gnet(args, paths)
    elif not args.feats:
        args.guidance_scale = 0.0
    resolve_selection(args)
    if not args.guidance_scale * args.guidance_strength:
        args.feats = []  # nothing is guided: read no g, load no CLIP
    for name in ("strength", "guidance_strength"):
        if not 0 <= getattr(args, name) <= 1:
            raise utils.UserError(f"--{name} {getattr(args, name):g}: wanted a fraction from 0 to 1")
    for name in ("batch_size", "limit", "num_samples", "num_inference_steps", "guidance_repeats"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise utils.UserError(f"--{name} {getattr(args, name)}: wanted at least 1")
    for name in ("sag_scale", "cfg_scale", "guidance_scale", "guidance_draws"):
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
    if args.guidance_repeats > 1 and args.solver != "ddim":
        raise utils.UserError(f"--guidance_repeats {args.guidance_repeats} with --solver {args.solver}: its steps go "
                              "on from those before, and can not be taken again; use --solver ddim")
    if args.compile and args.sag_scale:
        raise utils.UserError("--compile: cannot watch the UNet's attention for --sag_scale; give one of them")
    return paths.find(args.outdir) if args.outdir else paths.images_of(vars(args))


def with_defaults(args):
    """The flags, with those that depend on --guidance_rule filled in where they were not given."""
    for name, default in DEFAULTS[args.guidance_rule].items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    return args


def resolve_selection(args):
    """Check the flags of a selection, and keep what selects: the g_k of --feats, whether they guide or not."""
    args.select_feats = args.feats if args.select == "g" else []
    if args.select and args.num_samples < 2:
        raise utils.UserError(f"--select {args.select} with --num_samples {args.num_samples}: nothing to choose from; "
                              "give --num_samples 2 or more")
    if args.select == "g" and not args.feats:
        raise utils.UserError("--select g with --feats none: no g to select by; name layers, and give --guidance_scale "
                              "0 if they are not to guide")
    if args.select == "gnet":
        args.gnet_run = args.gnet_run or run_name("scratch", args.subj, "gnet", None)


def samples_folder(args, paths, folder):
    """The folder of all pictures: where `folder` gets a selection of them, the one of the same flags without it."""
    if not args.select:
        return folder
    return folder / "samples" if args.outdir else paths.images_of({**vars(args), "select": None})


def resolve_adapter(args):
    """Name the adapter, and check what it does not go with."""
    args.adapter_run = args.adapter_run or run_name("scratch", args.subj, "adapter", None)
    if args.hold_out:
        raise utils.UserError(f"--hold_out {args.hold_out} with --use_adapter: the adapter was trained on the "
                              "images that were held out; leave one of them out")


def resolve_gnet(args, paths):
    """Check the flags of guidance by the brain, against each other too."""
    if not 0 <= args.gnet_kappa < float("inf"):
        raise utils.UserError(f"--gnet_kappa {args.gnet_kappa:g}: wanted a number from 0")
    for name in ("gnet_alpha", "gnet_from"):
        if not 0 <= getattr(args, name) <= 1:
            raise utils.UserError(f"--{name} {getattr(args, name):g}: wanted a fraction from 0 to 1")
    if not args.feats:
        args.gnet_from = 0.0  # there is nobody to wait for
    if not args.guidance_scale * args.guidance_strength:
        raise utils.UserError(f"--use_gnet with --guidance_scale {args.guidance_scale:g} --guidance_strength "
                              f"{args.guidance_strength:g}: nothing would be guided; for the brain without CLIP give "
                              "--feats none and a scale")
    if not args.feats and not args.gnet_kappa:
        raise utils.UserError("--gnet_kappa 0 with --feats none: nothing would guide; change one of them")
    args.gnet_run = args.gnet_run or run_name("scratch", args.subj, "gnet", None)
    if args.target_fmri_npy:
        args.target_fmri_npy = str(paths.find(args.target_fmri_npy))


def drawing_precision(args):
    """--precision, where auto on a GPU is fp16: what is drawn in it is nearer to float32 than in bf16, by far."""
    on_gpu = utils.pick_device(args.device).type == "cuda"
    return "fp16" if args.precision == "auto" and on_gpu else args.precision


def resolve_device(args, team):
    """Replace --device and --precision by what the team computes with; UserError for flags that do not suit it."""
    from training.team import pick_precision

    if team.device.type == "cpu" and args.offload:
        raise utils.UserError("--offload: there is no GPU; leave it out")
    names = {pick_precision(name, team.device): name for name in ("fp32", "bf16", "fp16")}
    args.device, args.precision = team.device.type, names[team.precision]


def measurements_hash(args, paths, feats):
    """A short hash of what makes measurements of the scores of these features."""
    from disk.files import file_hash
    from nsd.components import open_components

    parts = [part for feat, errors in error_files(paths, args, feats).items()
             for part in (file_hash(errors), open_components(paths, feat).digest)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:12]


def config_of(args, paths, files):
    """Everything that decides what the pictures look like, hashes of `files` too, and the commit for the record."""
    from disk.files import file_hash

    decisive = {name: paths.as_recorded(value) if name in PATH_OPTIONS and value else value
                for name, value in vars(args).items() if name not in FREE_OPTIONS}
    if not args.use_adapter:  # as before there was one
        decisive = {name: value for name, value in decisive.items() if name not in ADAPTER_OPTIONS}
    if not args.use_gnet:  # what does not guide does not matter
        decisive = {name: value for name, value in decisive.items() if name not in GNET_OPTIONS}
    if not args.feats and not args.use_gnet:
        decisive = {name: value for name, value in decisive.items() if not name.startswith("guidance_")}
    hashes = {name: file_hash(file) for name, file in files.items()}
    if args.feats and args.guidance_rule == "posterior":
        hashes["measurements"] = measurements_hash(args, paths, args.feats)
    return {**decisive, "score_hashes": hashes, "commit": utils.git_commit()}


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
