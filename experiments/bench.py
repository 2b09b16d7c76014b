"""
How fast are the layers of stu.py, and how exact its filters? Against the usual way.

    python experiments/bench.py             # two minutes on a CPU
    python experiments/bench.py --full      # also eigh at length 8192, minutes more

The usual way makes the filters by eigh of the Hankel matrix, and convolves two stacked branches
with the channels last. On a machine with a GPU the layers are larger, and run there.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import mpmath
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from stu import STU, get_spectral_filters

ON_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if ON_CUDA else "cpu"
K = 24

# ---- To measure


def timed(runs, repeats=6):
    """Median seconds of each run. They take turns, so that both see the same load of the machine."""
    times = []
    for _ in range(repeats):
        times.append([])
        for run in runs:
            start = time.perf_counter()
            run()
            if ON_CUDA:
                torch.cuda.synchronize()
            times[-1].append(time.perf_counter() - start)
    return np.median(times[1:], axis=0)  # the first turn is a warm-up


def peak_mebibytes(run):
    """The most memory that run() holds at once, beyond what was held before."""
    if ON_CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    stderr = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the profiler writes there when it starts
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    os.dup2(stderr, 2)
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = 0
    most = 0
    for _, change in sorted(changes):
        held += change
        most = max(most, held)
    return most / 2**20


def print_row(what, seconds, note=""):
    ours, usual = seconds
    times = f"{ours * 1e3:9.1f} ms {usual * 1e3:9.1f} ms {usual / ours:7.1f}"
    print(f"{what:42} {times}   {note}", flush=True)


# ---- The usual way


def hankel_matrix(L):
    i = torch.arange(1, L + 1, dtype=torch.float64)
    n = i[:, None] + i
    return 2 / (n**3 - n)


def exact_filters(L):
    """Eigenvectors of the Hankel matrix in 60-digit arithmetic, leading one first: [L, K]."""
    with mpmath.workdps(60):
        Z = mpmath.matrix(L)
        for i in range(L):
            for j in range(L):
                n = mpmath.mpf(i + j + 2)
                Z[i, j] = 2 / (n**3 - n)
        _, vectors = mpmath.eigsy(Z)  # in ascending order
    phi = torch.tensor(vectors.tolist(), dtype=torch.float64)
    return phi.flip(1)[:, :K]


def usual_stu(x, phi, M):
    """Two stacked branches. x [B, T, d], phi [T, K], M [2K, d] or [2K, d, d_out]."""
    T = len(phi)
    n = 1 << (2 * T - 1).bit_length()
    sign = (-1.0) ** torch.arange(T, device=x.device)[:, None]
    both = torch.stack([x, x * sign], dim=-1)
    x_f = torch.fft.rfft(both, n=n, dim=1)  # [B, frequencies, d, 2]
    if M.ndim == 2:  # STU-T: x is projected already
        h = torch.stack([phi @ M[:K], phi @ M[K:]], dim=-1)
        h_f = torch.fft.rfft(h, n=n, dim=0)
        y = torch.fft.irfft(x_f * h_f, n=n, dim=1)[:, :T]
        return y[..., 0] + sign * y[..., 1]
    phi_f = torch.fft.rfft(phi, n=n, dim=0)
    u_f = x_f[:, :, None] * phi_f[None, :, :, None, None]  # [B, frequencies, K, d, 2]
    u = torch.fft.irfft(u_f, n=n, dim=1)[:, :T]
    plus = torch.tensordot(u[..., 0], M[:K], dims=([2, 3], [0, 1]))
    minus = torch.tensordot(u[..., 1], M[K:], dims=([2, 3], [0, 1]))
    return plus + sign * minus


# ---- What is measured


def compare_filters(L):
    """At length 64 the note is the worst error of a filter of norm 1, of both ways."""

    def ours():
        return get_spectral_filters(L, K, dtype=torch.float64)

    def usual():
        return torch.linalg.eigh(hankel_matrix(L)).eigenvectors[:, -K:].flip(1)

    note = ""
    if L == 64:
        exact = exact_filters(L)
        errors = []
        for phi in (ours(), usual()):
            unit = phi / phi.norm(dim=0)
            sign = (unit * exact).sum(dim=0).sign()
            errors.append((sign * unit - exact).abs().max().item())
        note = "errors {:.0e}, {:.0e}".format(*errors)
    seconds = timed([ours, usual], repeats=6 if L < 8192 else 2)
    print_row(f"{K} filters of length {L}", seconds, note)


def compare_layers(B, T, d, use_approx):
    """A layer forward and backward, from the same weights."""
    layer = STU(d, d, T, K, use_approx=use_approx).to(DEVICE)
    phi = get_spectral_filters(T, K, device=DEVICE)
    x = torch.randn(B, T, d, device=DEVICE, requires_grad=True)
    grad = torch.randn(B, T, d, device=DEVICE)

    def usual(x):
        if use_approx:
            return usual_stu(x @ layer.M_inputs, phi, layer.M_filters)
        return usual_stu(x, phi, layer.M)

    def step(route):
        torch.autograd.grad(route(x), [x, *layer.parameters()], grad)

    difference = (layer(x) - usual(x)).norm() / usual(x).norm()
    seconds = timed([lambda: step(layer), lambda: step(usual)])
    our_memory = peak_mebibytes(lambda: step(layer))
    their_memory = peak_mebibytes(lambda: step(usual))
    name = "STU-T" if use_approx else "full STU"
    note = f"{our_memory:.0f}, {their_memory:.0f} MiB, differ by {difference:.0e}"
    print_row(f"{name} {B} x {T} x {d}, with backward", seconds, note)


def main():
    parser = argparse.ArgumentParser(description="How fast is stu.py?")
    parser.add_argument("--full", action="store_true", help="also eigh at length 8192")
    parser.add_argument("--tiny", action="store_true", help="only to see that it runs")
    args = parser.parse_args()
    lengths = [64, 2048]
    layers = [(2, 4096, 512, True), (8, 512, 256, True), (8, 1024, 128, False)]
    if ON_CUDA:
        layers = [(8, 8192, 1024, True), (32, 2048, 768, True), (1, 65536, 1024, True)]
    if args.full:
        lengths.append(8192)
    if args.tiny:
        lengths = [64]
        layers = [(2, 60, 8, True), (2, 60, 8, False)]
    where = torch.cuda.get_device_name() if ON_CUDA else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}; {len(lengths) + len(layers)} rows")
    print(f"{'':42} {'stu.py':>12} {'usual way':>12} {'ratio':>7}")
    for L in lengths:
        compare_filters(L)
    for layer in layers:
        compare_layers(*layer)


if __name__ == "__main__":
    main()
