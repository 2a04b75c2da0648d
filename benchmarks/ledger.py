"""Keep the ledger of reproductions, docs/ledger.md: what others published, subject by subject, and what was found here.

    python benchmarks/ledger.py                                     # write the page anew
    python benchmarks/ledger.py --add outputs_all/subj01/cp_4096_v1/30/0.8 --method ours --by "bash scripts/recon.sh"
    python benchmarks/ledger.py --add DIR --method "MindEye2 2024" --reproduces   # its pictures, measured again

--add takes what evaluate.py left in a folder of pictures (metrics.json, metrics_config.json) and keeps it in
docs/ledger.json, with the commit, the versions and the command (--by). With --reproduces it is held against the
published row of that method, subject and number of sessions: what is further off than the tolerance is said, exit 2.
"""

import importlib.metadata
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import options
import utils
from disk.files import load_json, save_json
from evaluation.metrics import is_rate
from evaluation.published import FURTHER, METRICS, NSD_IMAGES, PUBLISHED

DOCS = utils.REPOSITORY / "docs"
# how far a metric of the same pictures may be off: half the last printed digit, and what versions of the libraries and
# of the networks' weights differ by; of networks trained again, seeds add to it
TOLERANCE = {"pixcorr": 0.002, "ssim": 0.005, "effnet_distance": 0.005, "swav_distance": 0.005}
RATE_TOLERANCE = 0.5  # points
TITLES = ("PixCorr", "SSIM", "Alex(2)", "Alex(5)", "Incep", "CLIP", "Eff-B", "SwAV")
VERSIONS = ("torch", "diffusers", "transformers", "scikit-image", "torchvision")


def get_parser():
    parser = options.Parser(__doc__)
    parser.add_argument("--add", metavar="DIR", help="an evaluated folder of pictures")
    parser.add_argument("--method", metavar="NAME", help="what made them, as the page names it")
    parser.add_argument("--reproduces", action="store_true", help="hold it against the published row of that method")
    parser.add_argument("--by", default="", metavar="COMMAND", help="what draws these pictures again")
    parser.add_argument("--note", default="", metavar="TEXT", help="what a reader must know of it")
    parser.add_argument("--docs", default=str(DOCS), metavar="DIR", help="where ledger.json and ledger.md lie")
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    folder = Path(args.docs)
    found = load_json(folder / "ledger.json", kind=list) if (folder / "ledger.json").exists() else []
    off = []
    if args.add:
        if not args.method:
            raise utils.UserError("--add without --method: wanted the name of what made these pictures")
        entry = read_evaluation(Path(args.add), args.method) | {"by": args.by, "note": args.note}
        if args.reproduces:
            off = deviations(entry)
        known = [one for one in found if key_of(one) != key_of(entry)]
        found = sorted([*known, entry], key=key_of)
        save_json(folder / "ledger.json", found)
    (folder / "ledger.md").write_text(page_of(found))
    print(f"{folder / 'ledger.md'}: {len(PUBLISHED) + len(FURTHER)} published rows, {len(found)} found here")
    if off:
        raise utils.UserError(f"--reproduces: {args.add} is not as published: {'; '.join(off)}; see Tolerance there")


def read_evaluation(folder, method):
    """An entry of ledger.json from an evaluated folder."""
    hint = "evaluate it first (bash scripts/evaluate.sh)"
    metrics = load_json(folder / "metrics.json", "metrics", hint)
    config = load_json(folder / "metrics_config.json", "how it was measured", hint)
    drawn = {**config["options"], **(load_json(folder / "config.json") if (folder / "config.json").exists() else {})}
    return {"method": method, "subjects": str(int(drawn["subj"][-2:])), "sessions": drawn["num_sessions"],
            "images": metrics["pixcorr"]["n"], "stimuli": config["stimuli"],
            "values": [shown(name, metrics.get(name, {}).get("value")) for name in METRICS],
            "commit": str(config["git_commit"])[:12],
            "versions": {name: version for name in VERSIONS if (version := version_of(name))}}


def shown(name, value):
    """A value as tables print it: rates in %."""
    return None if value is None else round(100 * value, 1) if is_rate(name) else round(value, 3)


def version_of(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def key_of(entry):
    return entry["method"], entry["subjects"], entry["sessions"], entry["stimuli"]


def deviations(entry):
    """A line for each value that is further from the published row than the tolerance.

    Raises UserError where no row was published for that method, subject and number of sessions, and for another world.
    """
    if entry["stimuli"] != NSD_IMAGES:
        raise utils.UserError(f"--reproduces: measured in a world of {entry['stimuli']} stimuli, wanted NSD's "
                              f"{NSD_IMAGES}; leave it out")
    rows = [row for row in (*PUBLISHED, *FURTHER)
            if (row.method, row.subjects, row.sessions) == (entry["method"], entry["subjects"], entry["sessions"])]
    if not rows:
        raise utils.UserError(f"--reproduces: nothing was published of {entry['method']!r}, subject "
                              f"{entry['subjects']}, {entry['sessions']} sessions (src/evaluation/published.py)")
    said = []
    for name, wanted, value in zip(METRICS, rows[0].values, entry["values"], strict=True):
        tolerance = TOLERANCE.get(name, RATE_TOLERANCE)
        if None not in (wanted, value) and abs(value - wanted) > tolerance:
            said.append(f"{name}: {value}, published {wanted}, wanted within {tolerance}")
    return said


PAGE = """# Ledger of reproductions

What was published on NSD under the protocol `mindeye2` ([evaluation.md](evaluation.md)), and what was found with this
repository. Written by `benchmarks/ledger.py`, which adds an evaluated folder, too (`--add DIR --method NAME`).
Published rows stand in `src/evaluation/published.py`. Two-way rates in %; Eff-B and SwAV: lower is better; –: not said,
or not measured.

## Published

{published}

## Found here

{found}

{on_nsd}

## Tolerance

The same pictures, measured again, must come within {tolerances}, and two-way rates within {rates} points: half the last
printed digit, and what versions of scikit-image, torchvision and its weights differ by. `--reproduces` checks it.
"""
NOBODY = "On NSD nobody has run this repository yet: its rows are empty until somebody does."


def page_of(found):
    """docs/ledger.md."""
    on_nsd = [one for one in found if one["stimuli"] == NSD_IMAGES]
    published = [head("method", "subjects", "sessions", *TITLES, "found here", "source")]
    for row in (*PUBLISHED, *FURTHER):
        again = [one["commit"] for one in on_nsd if row[:3] == (one["method"], one["subjects"], one["sessions"])]
        published.append(line(row.method, row.subjects, row.sessions, *map(cell, row.values),
                              ", ".join(f"commit {commit}" for commit in again) or "nobody ran it yet", row.source))
    rows = [head("method", "subject", "sessions", "images", "world", *TITLES, "by", "commit", "versions", "note")]
    for one in found:
        world = "NSD" if one in on_nsd else f"{one['stimuli']} stimuli: not comparable"
        versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
        rows.append(line(one["method"], one["subjects"], one["sessions"], one["images"], world,
                         *map(cell, one["values"]), f"`{one['by']}`" if one["by"] else "–", one["commit"], versions,
                         one["note"] or "–"))
    tolerances = ", ".join(f"{value} ({TITLES[METRICS.index(name)]})" for name, value in TOLERANCE.items())
    return PAGE.format(published="\n".join(published), found="\n".join(rows), on_nsd="" if on_nsd else NOBODY,
                       tolerances=tolerances, rates=RATE_TOLERANCE)


def head(*titles):
    return line(*titles) + "\n|" + "---|" * len(titles)


def line(*cells):
    return "| " + " | ".join(map(str, cells)) + " |"


def cell(value):
    return "–" if value is None else f"{value:g}"


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
