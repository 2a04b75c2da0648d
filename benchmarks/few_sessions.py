"""What do pretraining and the network add when a subject was scanned for one hour? Fine-tuned, from scratch, ridge.

    python benchmarks/few_sessions.py --root demo                       # mini-NSD, subject 1, c; about five minutes
    python benchmarks/few_sessions.py --root demo --feats c g_2 --seeds 3

Pretrains where there is no pretrained run of this size yet, trains each way on --num_sessions sessions with several
seeds (runs are tagged few0, few1, ...), scores the test images and prints retrieval among all of them: top-1 share and
mean rank (1 = best), brain -> image and image -> brain, mean over seeds with the range.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import numpy as np

import options
import score_c
import score_g
import train_c
import train_g
import utils
from disk.names import Paths, run_name
from disk.scores import load_scores
from nsd.rows import open_feature

PRETRAINING = ["--num_epochs", "5", "--max_lr", "1.5e-3", "--batch_size", "70"]
FEW = ["--num_epochs", "150", "--max_lr", "1e-3", "--batch_size", "20"]
MANY = ["--num_epochs", "30", "--max_lr", "1e-3", "--batch_size", "70"]


def get_parser():
    parser = options.Parser(__doc__)
    options.add_paths(parser)
    options.add_subject(parser)
    parser.add_argument("--feats", type=options.feature, nargs="+", default=["c"], metavar="FEAT", help="c, g_k")
    parser.add_argument("--num_sessions", type=options.whole, nargs="+", default=[1, 40], metavar="SESSIONS")
    parser.add_argument("--seeds", type=options.whole, default=3, metavar="N")
    parser.add_argument("--hidden_dim", type=options.whole, default=384, metavar="UNITS")
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    paths = Paths.from_args(args)
    lines = []
    for feat in args.feats:
        train, score, which = (train_c, score_c, []) if feat == "c" else (train_g, score_g, ["--feat", feat])
        size = ["--root", args.root, "--subj", args.subj, "--hidden_dim", str(args.hidden_dim), *which]
        network = [*size, "--model", "mindeye2", "--n_blocks", "2", "--prior_depth", "2", "--num_workers", "0",
                   "--resume"]
        train.main([*network, "--multi_subject", *PRETRAINING])
        for sessions in args.num_sessions:
            epochs = FEW if sessions < 5 else MANY
            for stage, flags in (("finetune", ["--multisubject_ckpt", "auto", *epochs]), ("scratch", epochs),
                                 ("ridge", ["--model", "ridge"])):
                found = []
                for seed in range(args.seeds if stage != "ridge" else 1):
                    named = ["--num_sessions", str(sessions), "--tag", f"few{seed}", "--seed", str(seed)]
                    train.main([*network, *flags, *named])
                    score.main([*size, *named, "--run", stage, "--prior_steps", "1"])
                    name = run_name(stage, args.subj, feat, args.hidden_dim, sessions, f"few{seed}")
                    found.append(retrieval(paths, args.subj, name, feat))
                lines.append(f"{feat:5}{sessions:9}  {stage:10}" + "".join(map(spread, zip(*found, strict=True))))
    print("\nfeat  sessions  trained   brain->image top-1     mean rank     image->brain top-1     mean rank")
    print("\n".join(lines))


def retrieval(paths, subj, name, feat):
    """(brain -> image top-1, mean rank, image -> brain top-1, mean rank) among all test images."""
    ids, brain = load_scores(paths.scores(subj, name, feat), "retrieval")
    rows = [array.reshape(len(ids), -1).astype(np.float64) for array in (brain, open_feature(paths, feat)[ids])]
    brain, image = (array / np.linalg.norm(array, axis=1, keepdims=True) for array in rows)
    similarity = brain @ image.T
    own = np.diag(similarity)
    ranks = [1 + (similarity > own[:, None]).sum(axis=1), 1 + (similarity > own).sum(axis=0)]
    return [value for rank in ranks for value in (np.mean(rank == 1), rank.mean())]


def spread(values):
    return f"{np.mean(values):9.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
