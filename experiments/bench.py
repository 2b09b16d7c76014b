"""How fast are the layers of stu.py, and how exact its filters? Against the usual way.

    python experiments/bench.py             # two minutes on a CPU
    python experiments/bench.py --full      # also eigh at length 8192, minutes more

The usual way makes the filters by eigh of the Hankel matrix, and convolves two stacked branches
with the channels last. On a machine with a GPU the layers are larger, and run there. The table goes
to stdout, and the time left to stderr.
"""

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path

import mpmath
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from stu import STU, get_spectral_filters

ON_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if ON_CUDA else "cpu"
K = 24  # filters

# ---- To measure


def timed(runs, repeats=6):
    """Median seconds of each run. They take turns, so that all see the same load of the machine."""
    rounds = []
    for _ in range(repeats):
        times = []
        for run in runs:
            start = time.perf_counter()
            run()
            if ON_CUDA:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        rounds.append(times)
    return np.median(rounds[1:], axis=0)  # the first round is a warm-up


def peak_mebibytes(run):
    """The most memory that run() holds at once, beyond what was held before."""
    if ON_CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    stderr = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)  # the profiler writes to stderr when it starts
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    os.dup2(stderr, 2)
    os.close(stderr)
    os.close(nowhere)
    changes = []  # of the memory that is held: when, and by how many bytes
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            changes.append((event.start_ns(), event.nbytes()))
    held = 0
    most = 0
    for _, change in sorted(changes):
        held += change
        most = max(most, held)
    return most / 2**20


def print_row(what, seconds, note=""):
    """The milliseconds of stu.py and of the usual way, and how many times faster stu.py is."""
    ours, usual = seconds
    times = f"{ours * 1e3:9.1f} ms {usual * 1e3:9.1f} ms {usual / ours:7.1f}"
    print(f"{what:42} {times}   {note}", flush=True)


# ---- The usual way


def hankel_matrix(L):
    """Z [L, L], with 2 / (n³ - n) where row and column, counted from 1, add up to n."""
    i = torch.arange(1, L + 1, dtype=torch.float64)
    n = i[:, None] + i
    return 2 / (n**3 - n)


def usual_filters(L):
    """Eigenvectors of the Hankel matrix by eigh, leading one first: [L, K]."""
    vectors = torch.linalg.eigh(hankel_matrix(L)).eigenvectors  # in ascending order
    return vectors[:, -K:].flip(1)


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
    """x [B, T, d], phi [T, K], M [2K, d] or [2K, d, d_out]: filters as they are, then with signs.

    The filters with signs (-1)^t are applied as the others are, to inputs and outputs with signs.
    """
    T = len(phi)
    n = 1 << (2 * T - 1).bit_length()  # length of the transforms
    t = torch.arange(T, device=x.device)
    sign = (-1.0) ** t[:, None]
    both = torch.stack([x, x * sign], dim=-1)
    x_f = torch.fft.rfft(both, n, dim=1)  # [B, frequencies, d, 2]
    M_plus = M[:K]
    M_minus = M[K:]
    if M.ndim == 2:  # STU-T: x is projected already
        h = torch.stack([phi @ M_plus, phi @ M_minus], dim=-1)
        h_f = torch.fft.rfft(h, n, dim=0)
        y = torch.fft.irfft(x_f * h_f, n, dim=1)[:, :T]
        return y[..., 0] + sign * y[..., 1]
    phi_f = torch.fft.rfft(phi, n, dim=0)
    u_f = x_f[:, :, None] * phi_f[None, :, :, None, None]  # [B, frequencies, K, d, 2]
    u = torch.fft.irfft(u_f, n, dim=1)[:, :T]
    plus = torch.tensordot(u[..., 0], M_plus, dims=([2, 3], [0, 1]))
    minus = torch.tensordot(u[..., 1], M_minus, dims=([2, 3], [0, 1]))
    return plus + sign * minus


# ---- What is measured


def compare_filters(L):
    """At length 64 the note is the worst error of a filter of norm 1, of both ways."""
    ours = partial(get_spectral_filters, L, K, dtype=torch.float64)
    usual = partial(usual_filters, L)
    note = ""
    if L == 64:
        exact = exact_filters(L)
        errors = []
        for phi in (ours(), usual()):
            phi = phi / phi.norm(dim=0)
            sign = (phi * exact).sum(dim=0).sign()
            difference = sign * phi - exact
            errors.append(difference.abs().max().item())
        note = "errors {:.0e}, {:.0e}".format(*errors)
    repeats = 6 if L < 8192 else 2
    seconds = timed([ours, usual], repeats)
    print_row(f"{K} filters of length {L}", seconds, note)


def compare_layers(B, T, d, use_approx):
    """A layer forward and backward, from the same weights."""
    layer = STU(d, d, T, K, use_approx=use_approx).to(DEVICE)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.02)  # M_filters, and M, begin as zero
    phi = get_spectral_filters(T, K, device=DEVICE)
    x = torch.randn(B, T, d, device=DEVICE, requires_grad=True)
    grad = torch.randn(B, T, d, device=DEVICE)

    def usual_layer(x):
        if use_approx:
            return usual_stu(x @ layer.M_inputs, phi, layer.M_filters)
        return usual_stu(x, phi, layer.M)

    def step(route):
        torch.autograd.grad(route(x), [x, *layer.parameters()], grad)

    y = usual_layer(x).detach()
    difference = (layer(x).detach() - y).norm() / y.norm()
    runs = [partial(step, layer), partial(step, usual_layer)]
    seconds = timed(runs)
    memory = [round(peak_mebibytes(run)) for run in runs]
    name = "STU-T" if use_approx else "full STU"
    note = f"{memory} MiB, differ by {difference:.0e}"
    print_row(f"{name} {B} x {T} x {d}, with backward", seconds, note)


def show_progress(start, done, total):
    """The time left, as if all rows took equally long."""
    left = (time.perf_counter() - start) / done * (total - done)
    print(f"row {done}/{total}, about {left:.0f} s left", file=sys.stderr, flush=True)


def main():
    parser = argparse.ArgumentParser(description="How fast is stu.py?")
    parser.add_argument("--full", action="store_true", help="also eigh at length 8192")
    parser.add_argument("--tiny", action="store_true", help="only to see that it runs")
    args = parser.parse_args()
    lengths = [64, 2048]  # of filters
    layers = [(2, 4096, 512, True), (8, 512, 256, True), (8, 1024, 128, False)]  # B, T, d, STU-T?
    if ON_CUDA:
        layers = [(8, 8192, 1024, True), (32, 2048, 768, True), (1, 65536, 1024, True)]
    if args.full:
        lengths.append(8192)
    if args.tiny:
        lengths = [64]
        layers = [(2, 60, 8, True), (2, 60, 8, False)]
    where = torch.cuda.get_device_name() if ON_CUDA else f"CPU, {torch.get_num_threads()} threads"
    n_rows = len(lengths) + len(layers)
    print(f"{where}, torch {torch.__version__}; {n_rows} rows")
    print(f"{'':42} {'stu.py':>12} {'usual way':>12} {'ratio':>7}")
    start = time.perf_counter()
    for done, L in enumerate(lengths, start=1):
        compare_filters(L)
        show_progress(start, done, n_rows)
    for done, layer in enumerate(layers, start=len(lengths) + 1):
        compare_layers(*layer)
        show_progress(start, done, n_rows)


if __name__ == "__main__":
    main()
