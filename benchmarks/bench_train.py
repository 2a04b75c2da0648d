"""Is training fed fast enough, and with how little memory? At NSD's real sizes, on sparse files of zeros.

    python benchmarks/bench_train.py                        # c and g_2, 7 subjects, 73,000-row targets, on this machine
    python benchmarks/bench_train.py --feats c --steps 30

Makes files in NSD's formats (sparse: gigabytes that take no space), then trains through the real code. Prints for
each feature: samples/s; the share of the time the loop waited for data; the speed relative to the same loop fed from
tensors in memory, the two taking turns in one process; the peak of anonymous memory (heap, not the page cache) beyond
network, gradients and optimizer, of which activations are told apart by a step on one batch in memory; the seconds from
the start of the process to the first step. Timings of a single run are noisy; the ratio is measured in pairs.
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
import utils
from disk.names import Paths
from models import BrainModel
from nsd import sources
from training.loop import make_loader, math_attention, to_device, weight_decay_groups
from training.objectives import BrainObjective
from training.runs import open_run
from training.settings import Plan

WIDTHS = {"c": (77, 768), "g_2": (50, 768)}
N_IMAGES, TRIALS = 73000, 750  # trials per session


def get_parser():
    parser = options.Parser(__doc__)
    parser.add_argument("--feats", nargs="+", choices=list(WIDTHS), default=list(WIDTHS))
    parser.add_argument("--steps", type=options.whole, default=5, metavar="N",
                        help="in a block; two blocks from files, two from memory")
    parser.add_argument("--batch_size", type=options.whole, default=42, metavar="TRIALS")
    parser.add_argument("--num_workers", type=options.whole, default=2, metavar="N")
    parser.add_argument("--subjects", type=options.whole, nargs="+", default=list(range(2, 9)), metavar="2..8")
    parser.add_argument("--folder", metavar="DIR", help="where the files are made, and kept (a temporary folder)")
    options.add_compute(parser)
    options.add_precision(parser)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
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
    """Sparse betas and targets; real shards, which only name images."""
    paths.data_path.mkdir(parents=True, exist_ok=True)
    paths.stimuli.mkdir(parents=True, exist_ok=True)
    for feat in args.feats:
        sparse(paths.feature(feat), "data", (N_IMAGES, int(np.prod(WIDTHS[feat]))), "f2")
    rng = np.random.default_rng(0)
    for subj in tqdm(args.subjects, desc="shards", unit="subject"):
        name = f"subj{subj:02d}"
        n_trials, n_voxels, *_ = sources.PUBLISHED[name]
        sparse(paths.betas(name), "betas", (n_trials, n_voxels), "f4")
        images = rng.permutation(np.repeat(rng.choice(N_IMAGES, n_trials // 3, replace=False), 3))
        for session in range(options.SESSIONS[name]):
            write_shard(paths.data_path / f"wds/{name}/train/{session}.tar", subj, session, images)


def sparse(path, key, shape, dtype):
    """A contiguous HDF5 data set that has its size and no content on disk."""
    if not path.exists():
        with h5py.File(path, "w") as file:
            dataset = file.create_dataset(key, shape, dtype)
            dataset[-1] = 1  # allocates it; what lies before stays a hole


def write_shard(path, subj, session, images):
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    trials = np.arange(session * TRIALS, (session + 1) * TRIALS)
    with webdataset.TarWriter(str(path)) as sink:
        for trial in trials:
            behav = np.full((1, 17), -1.0)
            behav[0, [0, 1, 2, 5, 16]] = images[trial], subj, session + 1, trial, 0
            sink.write({"__key__": f"sample{trial:09d}", "behav.npy": behav})


def age_of_process():
    """Seconds since this process was started: the imports."""
    started = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def measure(args, paths, feat, imports):
    """Print the figures of one feature; imports: seconds they took."""
    script = train_c if feat == "c" else train_g
    flags = ["--model", "mindeye2", "--root", str(paths.root), "--subj", "1", "--multi_subject", "--overwrite",
             "--batch_size", str(args.batch_size), "--num_workers", str(args.num_workers), "--device", args.device,
             "--precision", args.precision]
    seconds_of, mark = {"imports": imports}, time.perf_counter()

    def lap(name):
        nonlocal mark
        seconds_of[name], mark = time.perf_counter() - mark, time.perf_counter()

    plan = Plan.from_args(script.get_parser().parse_args(flags))
    anonymous_before = anonymous()
    for file in paths.data_path.glob("wds/*/*/.behaviour.npz"):
        file.unlink()
    run = open_run(plan, feat)
    lap("shards, first start")
    run = open_run(plan, feat)
    lap("shards, later")
    model = BrainModel(run.n_voxels, plan.hidden_dim, *run.shapes["target"])
    model.standardise(run.target_statistics[0], 1.0)  # the files' zeros do not vary
    team, objective = run.team, BrainObjective()
    optimizer = torch.optim.AdamW(weight_decay_groups(model, 1e-2), 3e-4, fused=True)
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
    kept = sum(p.numel() * 4 * 4 for p in model.parameters())  # weights, gradients, two moments: float32
    kept = kept if team.device.type == "cpu" else 0
    resident = anonymous()
    reset_peak()
    step(in_memory(item))
    activations = peak_anonymous() - resident
    reset_peak()
    seconds, counts, peak = {"files": 0.0, "memory": 0.0, "waiting": 0.0}, {"files": 0, "memory": 0}, 0

    def block(source, batches):
        """Train on `steps` batches, from the files (and return them) or from memory."""
        nonlocal peak
        if source == "files":
            for _ in range(4 * args.num_workers):
                next(steps)  # what was read ahead in the other block's time
        reset_peak()
        done = []
        for i in tqdm(range(args.steps), desc=f"{feat} from {source}", unit="step"):
            start = time.perf_counter()
            item = next(steps) if source == "files" else batches[i]
            if source == "files":
                seconds["waiting"] += time.perf_counter() - start
            step(item)
            synchronise(team.device)
            seconds[source] += time.perf_counter() - start
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
    print(f"""
{feat}: {parameters / 1e6:.0f} M parameters, batch {args.batch_size}, {team.device}, {team.precision}
  samples/s                        {speed["files"]:10.1f}
  waiting for data                 {100 * seconds["waiting"] / seconds["files"]:10.2f} %      (wanted <= 3)
  speed / fed from memory          {speed["files"] / speed["memory"]:10.3f}        (wanted >= .97)
  memory beyond network+optimizer  {peak / 1e9:10.2f} GB     of which activations of a step {activations / 1e9:.2f} GB
  without activations              {(peak - activations) / 1e9:10.2f} GB     (wanted <= 1.5)
  to the first step                {sum(seconds_of.values()):10.1f} s      (wanted <= 20): """
          + ", ".join(f"{name} {value:.1f}" for name, value in seconds_of.items()) + f"; the step {first_step:.1f} s"
          + f"\n  the first start on a data set    {first_start - seconds_of['shards, later']:10.1f} s more: every "
          "shard is unpacked once")


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
