"""What does an STU miss? Systems that ring for long.

    python experiments/ringing.py           # five seconds; draws ringing.png

The spectral filters are made for real eigenvalues of both signs. Here an STU is fitted, by least
squares, to systems with two eigenvalues r exp(±iθ): an oscillation of θ degrees a step that decays
at rate r. The error is the mean squared error on new sequences, over the variance of the outputs.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
from lds import LDS, MiniSTU, sample

RADII = (0.99, 0.9, 0.7, 0.5)
ANGLES = (0, 1, 2, 5, 10, 20, 45, 90, 135, 160, 170, 175, 178, 179, 180)


def ringing_system(radius, degrees):
    """One input, one output, and two states that turn by so many degrees a step."""
    angle = math.radians(degrees)
    c = radius * math.cos(angle)
    s = radius * math.sin(angle)
    system = LDS(2, 1, 1, diagonal=False)
    system.A.data = torch.tensor([[c, -s], [s, c]])  # has the eigenvalues c ± is
    return system


def error_of_fit(model, system):
    x, y = sample(system, 128, model.seq_len)
    model.fit(x, y)
    x, y = sample(system, 128, model.seq_len)
    with torch.no_grad():
        error = F.mse_loss(model(x), y) / y.var()
    return error.item()


def main():
    parser = argparse.ArgumentParser(description="What does an STU miss?")
    parser.add_argument("--seq_len", type=int, default=128)
    parser.add_argument("--num_filters", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default="ringing.png")
    args = parser.parse_args()
    if args.out.suffix not in (".png", ".svg", ".pdf") or not args.out.parent.is_dir():
        parser.error(f"--out must be a .png, .svg or .pdf in a folder that exists, got {args.out}")
    if not 1 <= args.num_filters <= args.seq_len:
        parser.error("--num_filters must be from 1 to --seq_len")
    torch.manual_seed(args.seed)
    model = MiniSTU(args.seq_len, args.num_filters, 1, 1)
    figure = Figure((7, 4.5), layout="constrained")
    axis = figure.subplots()
    start = time.perf_counter()
    for done, radius in enumerate(RADII, start=1):
        errors = []
        for degrees in ANGLES:
            system = ringing_system(radius, degrees)
            errors.append(error_of_fit(model, system))
        axis.semilogy(ANGLES, errors, marker=".", label=f"r = {radius}")
        pairs = zip(ANGLES, errors)
        text = ", ".join(f"{degrees}°: {error:.0e}" for degrees, error in pairs)
        left = (time.perf_counter() - start) / done * (len(RADII) - done)
        print(f"r = {radius}  {text}   ({left:.0f} s left)", flush=True)
    axis.set(title="What an STU misses: eigenvalues r exp(±iθ)", xticks=range(0, 181, 30))
    axis.set(xlabel="θ in degrees", ylabel="squared error / variance")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(args.out)
    print(f"the picture: {args.out}")


if __name__ == "__main__":
    main()
