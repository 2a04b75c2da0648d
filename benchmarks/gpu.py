"""What does this card do? Runs the benchmarks one after the other, within a given time, and writes what they print.

    bash benchmarks/gpu.sh 10                    # -> benchmarks/gpu-<card>.md
    python benchmarks/gpu.py --only recon agreement
    python benchmarks/gpu.py --tiny --device cpu --out /tmp/tiny.md          # the demo's models, minutes on a CPU

Sizes are those of NSD, Stable Diffusion 1.4 and CLIP ViT-B/32, weights and data are random. The page is written anew
after every stage, so that nothing is lost where the time ends; a stage that fails or runs out of time says so.

  agreement  gradients and pictures in bf16 and fp16 against float32, on the demo's trained models
  recon      pictures: recon.py's default beside the published procedure, and the batches that fit
  compile    the same default with --compile
  rules      other rules, gradients and decoders
  train      c, z and g fine-tuned on subject 1: samples/s, share of the time that waits for data
  gnet       the brain encoding model's training step, and its part of a guided step
  features   c, z and g of stimuli
  demo       the whole pipeline on the demo's world, its training under `accelerate launch` with one process
"""

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch

import options
import utils
from disk.files import atomic_path

REPO = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "numpy")
SHARE = 0.9  # of the time given, after which nothing is started or left running
REAL = ["--sd_model", "random"]
TINY = {  # flags that make each stage small
    "agreement": ["--images", "2", "--num_inference_steps", "4"],
    "recon": ["--images", "2", "--reference_images", "1", "--rounds", "1", "--published_steps", "4",
                               "--num_inference_steps", "4"],
    "train": ["--share", "0.05", "--steps", "2"], "features": ["--images", "6", "--single_images", "2"],
    "gnet": ["--voxels", "30", "--train_batch", "5"],
}


def get_parser():
    parser = options.Parser(__doc__)
    parser.add_argument("--minutes", type=float, default=10, metavar="MINUTES", help="all of it ends within")
    parser.add_argument("--only", nargs="+", choices=list(stages(False)), metavar="STAGE", help="(all)")
    parser.add_argument("--out", metavar="FILE", help="the page (benchmarks/gpu-<card>.md)")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try this script itself")
    parser.add_argument("--device", default="auto", metavar="NAME", help="cuda, cpu, auto")
    return parser


def stages(tiny):
    """{stage: list of (script, its flags)}."""
    recon = TINY["recon"] if tiny else [*REAL, "--images", "16", "--reference_images", "1", "--rounds", "1",
                                        "--batch_size", "8"]
    few = recon if tiny else [*REAL, "--images", "8", "--reference_images", "1", "--rounds", "1", "--batch_size", "4"]
    gnet = [*recon, *TINY["gnet"]] if tiny else [*few, "--images", "4"]
    rules = [["--guidance_decoder", "full"], ["--guidance_grad", "x0"], ["--guidance_rule", "raw"],
             ["--guidance_rule", "norm"]]
    return {
        "agreement": [("bench_precision.py", TINY["agreement"] if tiny else [])],
        "recon": [("bench_recon.py", recon)],
        "train": [("bench_train.py", ["--stage", "finetune", "--num_workers", "8", "--steps", "30"] if not tiny else
                   ["--stage", "finetune", "--num_workers", "0", *TINY["train"]])],
        "features": [("bench_features.py", ["--rounds", "1", *(TINY["features"] if tiny else
                      [*REAL, "--images", "256", "--single_images", "16", "--num_workers", "8"])])],
        "gnet": [("bench_gnet.py", gnet)],
        "rules": [("bench_recon.py", [*few, *flags]) for flags in rules],
        "compile": [("bench_recon.py", [*few, "--compile"])],
        "demo": [("demo", [])],
    }


def main(argv=None):
    args = get_parser().parse_args(argv)
    device = utils.pick_device(args.device)
    end = time.monotonic() + SHARE * 60 * args.minutes
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    card = "-".join(word for word in name.lower().split() if word not in ("nvidia", "geforce"))
    page = Page(Path(args.out) if args.out else REPO / "benchmarks" / f"gpu-{card}.md", name, device)
    for stage, calls in stages(args.tiny).items():
        if args.only and stage not in args.only:
            continue
        for script, flags in calls:
            left = end - time.monotonic()
            if left < 20:
                page.add(stage, script, flags, "not run: no time left")
                continue
            print(f"[{stage}] {script} {' '.join(flags)}, {left:.0f} s left", flush=True)
            page.add(stage, script, flags, call(script, [*flags, "--device", str(device)], left))
    print(page.file)


def call(script, flags, seconds):
    """What a benchmark prints, of which `seconds` at most are waited for."""
    command = ([sys.executable, str(REPO / "benchmarks" / script), *flags] if script.endswith(".py") else
               ["bash", "-c", DEMO])
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=REPO,
                               start_new_session=True, env={**os.environ, "PYTHON": sys.executable})
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # and what it started
        output = process.communicate()[0] + "\nstopped: no time left"
    return output if not process.returncode else f"{output}\nended with {process.returncode}"


DEMO = """
set -euo pipefail
root=$(mktemp -d) && trap 'rm -rf "$root"' EXIT
cp -r demo "$root/demo" && source demo/settings.sh && export ROOT=$root/demo
"$PYTHON" demo/make_mini_nsd.py --root "$ROOT"
for feat in c z g; do FEATS=$feat bash scripts/features.sh; done
LAUNCH="$PYTHON -m accelerate.commands.launch --num_processes 1 --num_machines 1 --mixed_precision no"
for stage in pretrain finetune; do STAGES=$stage LAUNCH=$LAUNCH bash scripts/train.sh; done
bash scripts/score.sh
time bash scripts/recon.sh
bash scripts/evaluate.sh
"""


class Page:
    """The markdown page: what was run where, written anew with each stage."""

    def __init__(self, file, name, device):
        self.file = file
        on_gpu = device.type == "cuda"
        memory = f", {torch.cuda.get_device_properties(device).total_memory / 1e9:.0f} GB" if on_gpu else ""
        versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
        self.parts = [f"# {name}\n",
                      f"Written by `bash benchmarks/gpu.sh` on {time.strftime('%Y-%m-%d')}: {name}{memory}, "
                      f"{os.cpu_count()} CPU cores; {versions}, CUDA {torch.version.cuda}, Python "
                      f"{platform.python_version()}. Random weights of the real sizes.\n"]

    def add(self, stage, script, flags, output):
        lines = [line for line in output.replace("\r", "\n").splitlines() if line.strip()]
        self.parts.append(f"## {stage}: `{' '.join([script, *flags])}`\n\n```\n" + "\n".join(lines[-60:]) + "\n```\n")
        with atomic_path(self.file) as temporary:
            temporary.write_text("\n".join(self.parts))


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(none)"


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
