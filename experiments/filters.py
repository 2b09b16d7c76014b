"""The filters of an STU, and how close sums of them come to a decay.

    python experiments/filters.py      # seconds; draws filters.png

On the left the first six filters. On the right three decays α^t, and the weighted sums of 24
filters that come closest to them: the memories differ a thousandfold, the filters are the same.
"""

import argparse
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
from stu import get_spectral_filters


def main():
    parser = argparse.ArgumentParser(description="Draw the filters of an STU.")
    parser.add_argument("--seq_len", type=int, default=1024)
    parser.add_argument("--num_eigh", type=int, default=24)
    parser.add_argument("--out", type=Path, default="filters.png")
    args = parser.parse_args()
    if args.out.suffix not in (".png", ".svg", ".pdf") or not args.out.parent.is_dir():
        parser.error(f"--out must be a .png, .svg or .pdf in a folder that exists, got {args.out}")
    if not 1 <= args.num_eigh <= args.seq_len:
        parser.error("--num_eigh must be from 1 to --seq_len")
    phi = get_spectral_filters(args.seq_len, args.num_eigh, dtype=torch.float64)
    phi = phi / phi.norm(dim=0)
    t = torch.arange(args.seq_len, dtype=torch.float64)

    figure = Figure((10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for k in (1, 2, 4, 8, 16):  # later ones reach further back
        if k <= args.num_eigh:
            left.semilogx(t + 1, phi[:, k - 1], label=f"filter {k}")
    left.set(title="What is fixed: some of the filters", xlabel="lag + 1")
    left.legend(fontsize="small")
    for color, alpha in (("C0", 0.5), ("C1", 0.97), ("C2", 0.9995)):
        decay = alpha**t
        weights = torch.linalg.lstsq(phi, decay[:, None]).solution
        approximation = (phi @ weights)[:, 0]
        error = (approximation - decay).abs().max()
        print(f"the decay of {alpha}: largest error {error:.1e}")
        right.semilogx(t + 1, decay, color="0.8", linewidth=6)
        right.semilogx(t + 1, approximation, color=color, label=f"α = {alpha}")
    title = f"What sums of all {args.num_eigh} give: any decay (grey)"
    right.set(title=title, xlabel="lag + 1")
    right.legend(fontsize="small", loc="center right")
    figure.savefig(args.out, dpi=110)
    print(f"the picture: {args.out}")


if __name__ == "__main__":
    main()
