"""Is training fed fast enough, with how little memory, and how long does it take? At NSD's real sizes.

    python benchmarks/bench_train.py                          # pretraining of c, z, g on 7 subjects: 14 GB of files
    python benchmarks/bench_train.py --subjects 2 3           # on two of them: 4 GB
    python benchmarks/bench_train.py --stage finetune --steps 20          # subject 1's voxel encoder: 3 GB
    python benchmarks/bench_train.py --model mindeye2 --feats c g_2       # the published networks, on whole rows

Makes files in NSD's formats, filled (noise that repeats every 32 MB), then trains through the real code. Before every
block of steps the system is told to drop the files from its cache, so that each row is read from the disk; as with
any file that has just been opened, it may keep some. Prints for each training: samples/s; the share of the time the
loop waited for data; the speed relative to the same loop fed from tensors in memory, the two taking turns in one
process; the time of a step times the steps of the whole schedule, validation and saving left out; the peak of anonymous
memory (heap, not the page cache) beyond network, gradients and optimizer, of which activations are told apart by a step
on one batch in memory; the seconds from the start of the process to the first step. Timings of a single run are noisy;
the ratio is measured in pairs.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import h5py
import numpy as np
import torch
import webdataset
from tqdm import tqdm

import options
import train_c
import train_g
import train_z
import utils
from disk.names import Paths
from features.components import Fit, create_file
from models import BrainModel, Decoder, freeze_trunk
from nsd import sources
from training.loop import make_loader, math_attention, parameter_groups, to_device
from training.objectives import BrainObjective, ComponentObjective
from training.runs import open_component_run, open_run
from training.settings import Plan

SHAPES = {"c": (77, 768), "z": (4, 64, 64)} | dict.fromkeys(options.VISION_LAYERS, (50, 768))
N_IMAGES, TRIALS, K = 73000, 750, 1024  # trials per session
BLOCK = 2**25  # bytes of noise that fill a file, again and again


def get_parser():
    parser = options.Parser(__doc__)
    parser.add_argument("--model", choices=["components", "mindeye2"], default="components")
    parser.add_argument("--stage", choices=["pretrain", "finetune"], default="pretrain")
    parser.add_argument("--feats", nargs="+", choices=["c", "z", "g", "g_2"], default=["c", "z", "g"])
    parser.add_argument("--steps", type=options.whole, default=5, metavar="N",
                        help="in a block; two blocks from files, two from memory")
    parser.add_argument("--batch_size", type=options.whole, metavar="TRIALS", help="(the model's own)")
    parser.add_argument("--num_workers", type=options.whole, default=2, metavar="N")
    parser.add_argument("--subjects", type=options.whole, nargs="+", metavar="1..8",
                        help="whose files (pretrain: 2 to 8, finetune: 1)")
    parser.add_argument("--share", type=float, default=1.0, metavar="FRACTION", help="of images, trials and voxels")
    parser.add_argument("--folder", metavar="DIR", help="where the files are made, and kept (a temporary folder)")
    options.add_compute(parser)
    options.add_precision(parser)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    args.subjects = args.subjects or ([1] if args.stage == "finetune" else list(range(2, 9)))
    if args.model == "mindeye2" and not {"c", "g_2"}.issuperset(args.feats):
        raise utils.UserError(f"--feats {' '.join(args.feats)}: wanted c or g_2 with --model mindeye2")
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(args.folder or temporary)
        paths = Paths(root, root / "MindEyeV2/mindeyev2")
        imports = age_of_process()
        make_files(paths, args)
        if len(args.feats) == 1:
            return measure(args, paths, args.feats[0], imports)
        words = sys.argv[1:] if argv is None else argv
        for feat in args.feats:  # a process each: memory is the process's
            subprocess.run([sys.executable, __file__, *words, "--folder", str(root), "--feats", feat], check=True)


def make_files(paths, args):
    """Betas and targets, filled; real shards, which only name images."""
    paths.data_path.mkdir(parents=True, exist_ok=True)
    paths.stimuli.mkdir(parents=True, exist_ok=True)
    for feat in features_of(args.feats):
        if args.model == "mindeye2":
            fill(paths.feature(feat), "data", (int(N_IMAGES * args.share), int(np.prod(SHAPES[feat]))), "f2")
        elif not paths.components(feat).exists():
            write_coefficients(paths, feat, int(N_IMAGES * args.share))
    rng, n_images, per_session = np.random.default_rng(0), int(N_IMAGES * args.share), int(TRIALS * args.share)
    for subj in tqdm(args.subjects, desc="betas and shards", unit="subject"):
        name = f"subj{subj:02d}"
        n_trials, n_voxels = options.SESSIONS[name] * per_session, int(sources.PUBLISHED[name][1] * args.share)
        fill(paths.betas(name), "betas", (n_trials, n_voxels), "f4")
        images = np.repeat(rng.choice(n_images, -(-n_trials // 3), replace=False), 3)
        trials = rng.permutation(images)[:n_trials].reshape(-1, per_session)  # of each session
        for session, shown in enumerate(trials):
            write_shard(paths.data_path / f"wds/{name}/train/{session}.tar", subj, session, shown)


def features_of(feats):
    """List the features of trainings: those of g are all layers."""
    return [feat for name in feats for feat in (options.VISION_LAYERS if name == "g" else [name])]


def fill(path, key, shape, dtype):
    """Write a contiguous HDF5 data set of normal noise that repeats every BLOCK bytes; it stays in no cache."""
    if path.exists():
        return
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset(key, shape, dtype)
        dataset[-1] = 1  # allocates it
        offset, left = dataset.id.get_offset(), dataset.size * dataset.dtype.itemsize
    block = np.random.default_rng(0).standard_normal(BLOCK // 4, np.float32).astype(dtype).tobytes()
    with open(path, "r+b") as file:
        file.seek(offset)
        while left > 0:
            left -= file.write(block[:left])
    drop_from_cache(path)


def drop_from_cache(path):
    """Let the system forget a file's content: the next who reads it waits for the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_coefficients(paths, feat, n_images):
    """Write components of a feature: coefficients of every image, as noise; the basis, which no training reads, is 0.
    """
    width, variances = int(np.prod(SHAPES[feat])), (1 / np.arange(1, K + 1)).astype(np.float32)
    fit = Fit(np.zeros(width, np.float32), np.zeros((K, width), np.float32), variances, float(variances.sum()), 20000)
    create_file(paths, feat, fit, n_images, SHAPES[feat], {"source": "noise", "seed": 0, "wanted": K})
    with h5py.File(paths.components(feat), "r+") as file:
        file["data"][:] = np.random.default_rng(0).standard_normal((n_images, K), np.float32) * variances**0.5
        file["written"][:] = 1


def write_shard(path, subj, session, images):
    """The shard of a session, whose trials showed these images."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as sink:
        for trial, image in enumerate(images, session * len(images)):
            behav = np.full((1, 17), -1.0)
            behav[0, [0, 1, 2, 5, 16]] = image, subj, session + 1, trial, 0
            sink.write({"__key__": f"sample{trial:09d}", "behav.npy": behav})


def age_of_process():
    """Seconds since this process was started: the imports."""
    started = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def measure(args, paths, feat, imports):
    """Print the figures of one feature; imports: seconds they took."""
    script = {"c": train_c, "z": train_z}.get(feat, train_g)
    words = ["--model", args.model, "--root", str(paths.root), "--subj", "1", "--overwrite", "--num_workers",
             str(args.num_workers), "--device", args.device, "--precision", args.precision]
    words += ["--multi_subject"] if args.stage == "pretrain" else []
    words += ["--batch_size", str(args.batch_size)] if args.batch_size else []
    words += ["--feat", feat] if feat == "g_2" else []
    flags = script.get_parser().parse_args(words)
    seconds_of, mark = {"imports": imports}, time.perf_counter()

    def lap(name):
        nonlocal mark
        seconds_of[name], mark = time.perf_counter() - mark, time.perf_counter()

    plan = Plan.from_args(flags)
    anonymous_before = anonymous()
    for file in paths.data_path.glob("wds/*/*/.behaviour.npz"):
        file.unlink()
    open_training(plan, flags, feat)
    lap("shards, first start")
    run, make_network, objective = open_training(plan, flags, feat)
    lap("shards, later")
    model, team = make_network(), run.team
    if args.stage == "finetune" and args.model == "components":
        freeze_trunk(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, flags.weight_decay), flags.max_lr, fused=True)
    net = team.prepare(model, optimizer, plan.loop.batch_size)
    lap("network")
    loader = make_loader(run.train, args.num_workers, team)
    steps = iter(loader)
    item = next(steps)
    lap("first batch")
    generator = torch.Generator(team.device)

    def step(item):
        batch = to_device(item, team.device)
        with math_attention(team.device), team.autocast():
            loss, _ = objective(net, batch, 0.1, generator, team)
        team.step(loss, optimizer.param_groups)

    step(item)
    synchronise(team.device)
    lap("that step itself")
    first_start = seconds_of.pop("shards, first start")
    first_step = seconds_of.pop("that step itself")
    # float32 weights and, of what is trained, gradients and two moments
    kept = sum(p.numel() * 4 * (4 if p.requires_grad else 1) for p in model.parameters())
    kept = kept if team.device.type == "cpu" else 0
    resident = anonymous()
    reset_peak()
    step(in_memory(item))
    activations = peak_anonymous() - resident
    reset_peak()
    seconds, counts, peak = {"files": 0.0, "memory": 0.0, "waiting": 0.0, "cpu": 0.0}, {"files": 0, "memory": 0}, 0

    # coefficients are in memory
    read = [rows.path for rows in (*run.train.betas.values(), *run.train.targets.values()) if hasattr(rows, "_ask_for")]

    def block(source, batches):
        """Train on `steps` batches, from the files (and return them) or from memory."""
        nonlocal peak
        if source == "files":
            for file in read:
                drop_from_cache(file)
            for _ in range(4 * args.num_workers):
                next(steps)  # what was read ahead in the other block's time
        reset_peak()
        done = []
        for i in tqdm(range(args.steps), desc=f"{feat} from {source}", unit="step"):
            start, started = time.perf_counter(), time.process_time()
            item = next(steps) if source == "files" else batches[i]
            if source == "files":
                seconds["waiting"] += time.perf_counter() - start
            step(item)
            synchronise(team.device)
            seconds[source] += time.perf_counter() - start
            seconds["cpu"] += time.process_time() - started
            counts[source] += len(item["image_ids"])
            done.append(item)
        if source == "files":
            peak = max(peak, peak_anonymous() - kept - anonymous_before)
        return list(map(in_memory, done))

    batches = block("files", None)  # A B B A: a machine that slows down in the meantime slows both
    block("memory", batches)
    block("memory", batches)
    block("files", None)
    speed = {source: counts[source] / seconds[source] for source in counts}
    parameters = sum(p.numel() for p in model.parameters())
    n_steps = len(run.train) * plan.loop.num_epochs
    hours = n_steps * seconds["files"] / (2 * args.steps) / 3600
    core_hours = n_steps * seconds["cpu"] / (4 * args.steps) / 3600  # which a busy machine hardly lengthens
    print(f"""
{feat}, {args.model}, {args.stage}: {parameters / 1e6:.0f} M parameters, batch {plan.loop.batch_size} of \
{len(run.n_voxels)} subjects, {team.device}, {team.precision}, {torch.get_num_threads()} threads
  samples/s                        {speed["files"]:10.1f}
  waiting for data                 {100 * seconds["waiting"] / seconds["files"]:10.2f} %      (wanted <= 3)
  {plan.loop.num_epochs} epochs, {n_steps:6} steps          {hours:10.2f} h    {core_hours:.2f} core-hours, no loader's
  speed / fed from memory          {speed["files"] / speed["memory"]:10.3f}        (wanted >= .97)
  memory beyond network+optimizer  {peak / 1e9:10.2f} GB     of which activations of a step {activations / 1e9:.2f} GB
  without activations              {(peak - activations) / 1e9:10.2f} GB     (wanted <= 1.5)
  to the first step                {sum(seconds_of.values()):10.1f} s      (wanted <= 20): """
          + ", ".join(f"{name} {value:.1f}" for name, value in seconds_of.items()) + f"; the step {first_step:.1f} s"
          + f"\n  the first start on a data set    {first_start - seconds_of['shards, later']:10.1f} s more: every "
          "shard is unpacked once")


def open_training(plan, flags, feat):
    """Open a training as its script does: the Run, a function that makes the network, the objective."""
    sizes = {"hidden_dim": flags.hidden_dim, "n_blocks": flags.n_blocks, "dropout": flags.dropout}
    if flags.model == "components":
        run, known = open_component_run(plan, feat, features_of([feat]))
        counts = {name: components.k for name, components in known.items()}
        objective = ComponentObjective(known, mixup_pct=flags.mixup_pct)
        return run, lambda: Decoder(run.n_voxels, components=counts, **sizes), objective
    run = open_run(plan, feat)

    def make():
        tokens, width = run.shapes["target"]
        model = BrainModel(run.n_voxels, tokens=tokens, width=width, prior_depth=flags.prior_depth, **sizes)
        model.standardise(*run.target_statistics)
        return model

    return run, make, BrainObjective(flags.clip_scale, flags.prior_scale, flags.mixup_pct)


def in_memory(item):
    """A batch that no loader's worker shares."""
    def copy(rows):
        return rows.clone().pin_memory() if torch.cuda.is_available() else rows.clone()

    return {**item, **{key: {name: copy(rows) for name, rows in item[key].items()} for key in ("voxels", "targets")}}


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def anonymous():
    """Bytes of this process's memory that no file backs."""
    return status("RssAnon")


def peak_anonymous():
    """The most since `reset_peak`; pages of mapped files, which the system can drop at any time, are left out."""
    return status("VmHWM") - status("RssFile") - status("RssShmem")


def reset_peak():
    Path("/proc/self/clear_refs").write_text("5")


def status(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
