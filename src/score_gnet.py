"""Predict the responses of a subject's voxels to images, by a brain encoding model (GNet).

images -> GNet of --gnet_run -> z-scored responses (N, V), voxels in the order of the betas

    python src/score_gnet.py --subj 1                                    # to the subject's test images
    python src/score_gnet.py --subj 1 --ids 0-99 512 --gnet_run gnet_published
    python src/score_gnet.py --subj 1 --images outputs_all/subj01/cp_4096_v1/300000/0.2
    python src/score_gnet.py --subj 1 --images ~/my_pictures --outdir scores_all/mine
    python src/score_gnet.py --subj 1 --gnet_run gnet_subj01_1sess --synthetic 1000        # to train decoders on

Of the test images it says how many the measured responses identify: whether the model knows the brain, and its voxels.
Writes scores_all/subj0X/<run>[_<which>]/voxels.npy, float32, beside image_ids.npy and config.json: recon.py takes it as
--target_fmri_npy. The images are stimuli, or the pictures of a folder: a recon's by the ids of its index.csv (each id's
first sample), any other's by name, numbered from 0 (images.csv lists them).
--synthetic writes single trials, three of each stimulus, with noise as it was measured; the stimuli are in no test set,
and the subject never saw them. scores_all/subj0X/gnet_<sessions>sess_synthetic/ is what train_*.py --synthetic reads.
"""

import argparse
import sys

import options
import utils
from disk.names import Paths


def get_parser():
    parser = options.Parser(__doc__)
    options.add_paths(parser)
    options.add_subject(parser)
    parser.add_argument("--gnet_run", type=options.tag, metavar="RUN",
                        help="the encoding model: a folder of train_logs (gnet_<subj>)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--ids", type=id_range, nargs="+", metavar="ID|FIRST-LAST",
                       help="0-based 73k ids of stimuli (the subject's test images)")
    which.add_argument("--images", metavar="DIR", help="a folder of pictures")
    which.add_argument("--synthetic", type=options.whole, metavar="N",
                       help="simulated trials of N stimuli outside the test sets and --subj's images")
    parser.add_argument("--outdir", metavar="DIR", help="write there instead")
    parser.add_argument("--batch_size", type=options.whole, default=50, metavar="IMAGES")
    parser.add_argument("--overwrite", action=argparse.BooleanOptionalAction, default=False)
    options.add_compute(parser)
    options.add_tracking(parser)
    return parser


def id_range(text):
    """'7' -> range(7, 8), '3-5' -> range(3, 6)."""
    first, _, last = text.partition("-")
    last = last or first
    if not (first.isdigit() and last.isdigit()) or int(first) > int(last):
        raise argparse.ArgumentTypeError(f"{text!r} is not an id or a range of ids; wanted 7 or 0-99")
    return range(int(first), int(last) + 1)


def main(argv=None):
    args = get_parser().parse_args(argv)
    if args.batch_size < 1:
        raise utils.UserError(f"--batch_size {args.batch_size}: wanted at least 1")

    import numpy as np

    from disk.files import archive_hash, file_hash, load_json, save_csv
    from disk.scores import load_scores, save_scores
    from encoding.encoder import load_encoder
    from encoding.guide import GOOD_R
    from evaluation.metrics import identified
    from nsd.repeats import responses_to
    from nsd.rows import open_stimuli, sample_hash
    from nsd.trials import load_trials
    from sampling import folders
    from training.settings import Wandb
    from training.tracking import Dashboard, check_tracking

    check_tracking(args.wandb_log)
    paths = Paths.from_args(args)
    encoder = load_encoder(paths, args.subj, args.gnet_run, args.seed, utils.pick_device(args.device))
    if args.synthetic is not None:
        return write_synthetic(args, paths, encoder)
    files, name = [], encoder.run
    if args.images:
        pictures = paths.find(args.images)
        image_ids, files = folders.list_pictures(pictures)
        batches = folders.in_batches(map(folders.read_png, files), args.batch_size)
        name += "_" + folders.name_of(pictures).replace(" ", "_")
        shown = folders.pictures_hash(files)
    else:
        stimuli = open_stimuli(paths)
        if args.ids:
            last = max(chosen[-1] for chosen in args.ids)
            if last >= len(stimuli):
                raise utils.UserError(f"--ids {last}: wanted 0..{len(stimuli) - 1}, the images of {stimuli.path}")
            image_ids = np.unique(np.concatenate(args.ids))
            name += f"_{args.ids[0][0]}-{args.ids[-1][-1]}"
        else:
            image_ids = np.unique(load_trials(paths, args.subj, "new_test")["image_id"])
        batches = stimuli.batches(image_ids, args.batch_size)
        shown = sample_hash(stimuli)

    folder = paths.find(args.outdir) if args.outdir else paths.scores_all / args.subj / name
    config = {"run": encoder.run, "feat": "voxels", "subj": args.subj, "images": args.images,
              "checkpoint_sha256": file_hash(encoder.file), "images_hash": shown}
    if (folder / "config.json").exists() and not args.overwrite:
        found, ids = load_json(folder / "config.json"), load_scores(folder, "voxels")[0]
        # a folder of an older version does not say images_hash
        if not np.array_equal(ids, image_ids) or any(found.get(key, value) != value for key, value in config.items()):
            raise utils.UserError(f"{folder}: holds responses to other images, or of another checkpoint; --overwrite "
                                  "them, or choose another --outdir")
        print(f"{folder}: already predicted with this checkpoint, kept")
        return
    responses = encoder.predict(batches, show=f"predict {encoder.run}")
    save_scores(folder, image_ids, {"voxels": responses}, config)
    if files:
        save_csv(folder / "images.csv", [{"row": row, "image_id": image_id, "file": file.name} for
                                         row, (image_id, file) in enumerate(zip(image_ids, files, strict=True))])
    board = Dashboard(folder, f"score_{args.subj}_{name}", config, Wandb.from_args(args).of("score", "gnet"))
    board.uses("checkpoint", encoder.file, archive_hash)
    board.makes("scores", folder / "voxels.npy", file_hash)
    board.finish()
    print(f"{folder}/voxels.npy: responses of {responses.shape[1]} voxels to {len(image_ids)} images")
    guiding = encoder.val_r > GOOD_R
    if not (args.ids or args.images) and guiding.sum() > 1:
        measured = responses_to(paths, args.subj, image_ids).betas
        found = identified(responses[:, guiding], measured[:, guiding])
        print(f"identification: of {len(found)} measured responses {found.sum()} correlate best with what is predicted "
              f"for their own image ({guiding.sum()} voxels of validation r over {GOOD_R:g})")


def write_synthetic(args, paths, encoder):
    """Write simulated trials of args.synthetic stimuli, drawn at random."""
    import numpy as np

    from disk.files import archive_hash, file_hash, load_json, save_together, write_json
    from encoding.simulation import noise_of, simulate
    from nsd.rows import open_betas, open_stimuli, sample_hash
    from nsd.simulated import FILE, TRIALS, stimuli_to_simulate, write_simulated
    from training.settings import Wandb
    from training.tracking import Dashboard

    num_sessions, val_fraction, seed = encoder.held_out
    if num_sessions is None:
        raise utils.UserError(f"--gnet_run {encoder.run}: is not of sessions of {args.subj} alone, and may know images "
                              "that validate or test; train one (train_gnet.py --num_sessions)")
    if args.outdir:
        raise utils.UserError("--outdir: simulated trials lie where training looks for them; leave it out")
    stimuli = open_stimuli(paths)
    candidates = stimuli_to_simulate(paths, args.subj, len(stimuli))
    if not 1 <= args.synthetic <= len(candidates):
        raise utils.UserError(f"--synthetic {args.synthetic}: wanted 1..{len(candidates)}, the stimuli outside the "
                              f"test sets that {args.subj} never saw")
    folder = paths.simulated(args.subj, num_sessions)
    config = {"run": encoder.run, "subj": args.subj, "num_sessions": num_sessions, "val_fraction": val_fraction,
              "seed": seed, "synthetic": args.synthetic, "checkpoint_sha256": file_hash(encoder.file),
              "images_hash": sample_hash(stimuli), "betas_hash": sample_hash(open_betas(paths, args.subj))}
    if (folder / "config.json").exists() and not args.overwrite:
        if load_json(folder / "config.json") != config:
            raise utils.UserError(f"{folder}: holds other trials, or of another checkpoint; --overwrite them")
        print(f"{folder}: already simulated with this checkpoint, kept")
        return
    rng = np.random.default_rng(seed)
    image_ids = rng.permutation(candidates)[:args.synthetic]
    batches, noise = stimuli.batches(image_ids, args.batch_size), noise_of(encoder, paths)
    blocks = simulate(encoder, utils.progress(batches, desc=f"simulate {encoder.run}", unit="batch"), noise, rng)
    save_together({folder / "config.json": write_json(config),  # in place last
                   folder / FILE: lambda file: write_simulated(file, image_ids, blocks, noise.shape[1])})
    board = Dashboard(folder, f"score_{args.subj}_{folder.name}", config, Wandb.from_args(args).of("score", "gnet"))
    board.uses("checkpoint", encoder.file, archive_hash)
    board.makes("scores", folder / FILE, file_hash)
    board.finish()
    print(f"{folder}/{FILE}: {TRIALS} simulated trials each of {len(image_ids)} stimuli; train with "
          f"STAGES=\"synthetic finetune\" bash scripts/train.sh --num_sessions {num_sessions}")


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
