"""How fast are rows read that no cache holds? As nsd.rows reads them, and in other ways, from a file with content.

    python benchmarks/bench_rows.py                         # 10,000 trials of 15,724 voxels: 0.6 GB in /tmp
    python benchmarks/bench_rows.py --width 29568 --folder /data    # rows of c in float16; a disk of your own

Rows are drawn at random, a batch at a time, each once. The cache is emptied before (posix_fadvise), and the ways take
turns; a row that is warm is the same batch read again.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import h5py
import numpy as np

import options
import utils
from nsd.rows import Rows


def get_parser():
    parser = options.Parser(__doc__)
    parser.add_argument("--rows", type=options.whole, default=10_000, metavar="N")
    parser.add_argument("--width", type=options.whole, default=15_724, metavar="NUMBERS", help="float32 of a row")
    parser.add_argument("--batch_size", type=options.whole, default=42, metavar="ROWS")
    parser.add_argument("--batches", type=options.whole, default=40, metavar="N")
    parser.add_argument("--turns", type=options.whole, default=3, metavar="N", help="the fastest counts")
    parser.add_argument("--folder", metavar="DIR", help="where the file is made (a temporary folder)")
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        file = Path(folder) / "rows.hdf5"
        write(file, args.rows, args.width)
        rng, ways = np.random.default_rng(1), {"nsd.rows": Rows, "page faults": Mapped, "pread": Pread}
        seconds = {way: [] for way in ways}
        for _ in range(args.turns):
            for name, way in ways.items():
                ids = rng.permutation(args.rows)[:args.batches * args.batch_size].reshape(args.batches, -1)
                seconds[name].append(measure(file, way(file, "data", "rows", "write them"), ids))
    print(f"{'':<12} {'cold, us a row':>14} {'warm':>6}")
    for name, found in seconds.items():
        cold, warm = (1e6 * min(column) / ids.size for column in zip(*found, strict=True))
        print(f"{name:<12} {cold:>14.0f} {warm:>6.0f}")
    slow, fast = (min(cold for cold, _ in seconds[name]) for name in ("page faults", "nsd.rows"))
    print(f"nsd.rows reads a cold row {slow / fast:.1f} times as fast as page faults do")


def write(file, n, width):
    rng = np.random.default_rng(0)
    with h5py.File(file, "w") as opened:
        rows = opened.create_dataset("data", (n, width), np.float32)
        for start in range(0, n, 500):
            rows[start:start + 500] = rng.standard_normal((min(500, n - start), width), dtype=np.float32)


def measure(file, rows, ids):
    """Seconds for batches ids (n, b) from the disk, and once more from the cache."""
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    rows[ids[0][:1]]  # opened
    found = []
    for _ in range(2):
        start = time.perf_counter()
        for batch in ids:
            rows[batch]
        found.append(time.perf_counter() - start)
    return found


class Mapped(Rows):
    """A memory map whose pages are read one by one, each when it is touched."""

    def _ask_for(self, source, ids):
        pass


class Pread(Rows):
    """A system call for each row."""

    def _copy(self, source, ids):
        rows = np.empty((len(ids), *source.shape[1:]), self.dtype)
        with open(self.path, "rb", buffering=0) as file:
            for row, i in zip(rows, ids.tolist(), strict=True):
                os.preadv(file.fileno(), [row], self._offset + i * row.nbytes)
        return rows


if __name__ == "__main__":
    sys.exit(utils.run_cli(main))
