"""What does a sector of poles cost? The filters of get_spectral_filters(..., max_angle).

    python experiments/angles.py filters          3 minutes on one CPU thread
    python experiments/angles.py recurrence       5 minutes

The filters of max_angle = 0 span decays. What rings, with poles r e^(±iθ), needs filters for a
sector |θ| <= max_angle. `filters` counts how many, so that the best linear map on their outputs
leaves 1e-6 of the variance of any system of the sector. (MiniSTU.fit finds this map on endless
data.) `recurrence` counts the states of the recurrence that answers an impulse with the filters,
and how far back they look: the number of lags in which each has 90% of its energy.
What the angle brings to a model is asked by angles_trained.py. The tables go to stdout, and the
time left to stderr.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from stu import FilterBank, both_signs, get_spectral_filters

ANGLES = (0, 5, 10, 20, 45, 90)


def impulse_responses(L, radius, max_angle):
    """What poles r e^(±iθ) can answer: r^t cos θt and r^t sin θt, for 25 angles: [25, L, 2]."""
    t = torch.arange(L, dtype=torch.float64)
    angles = torch.linspace(0, math.radians(max_angle), 25, dtype=torch.float64)
    turns = angles[:, None] * t
    waves = torch.stack([turns.cos(), turns.sin()], dim=2)
    decay = radius ** t[:, None]
    return waves * decay


def worst_error(bank, responses):
    """The largest error / variance of a system, by the best linear map on white input.

    bank [L, F] holds the filters, and responses [25, L, 2] what the systems can answer. The outputs
    of a system on white input are as far from those of the filters as their impulse responses are.
    But over a sequence of L tokens lag t is seen L - t times, so it counts with this weight.
    """
    L = len(bank)
    t = torch.arange(L, dtype=torch.float64)
    weight = (1 - t / L).sqrt()[:, None]
    U, sigma, _ = torch.linalg.svd(weight * bank, full_matrices=False)
    U = U[:, sigma > 1e-12 * sigma[0]]  # an orthonormal basis of what the filters can answer
    worst = 0.0
    for pair in responses:
        pair = pair[:, pair.norm(dim=0) > 0]  # at θ = 0 the sine is nothing
        Q = torch.linalg.qr(weight * pair).Q  # and one of what systems with these poles can answer
        missed = Q - U @ (U.T @ Q)
        error = torch.linalg.matrix_norm(missed, ord=2).item()
        worst = max(worst, error**2)
    return worst


def most_filters(L, max_angle):
    """More filters than are needed. L / 2 of both signs are everything."""
    return min(L // 2, round(L * max_angle / 180) + 40)


def filters_needed(L, max_angle, radius):
    """The smallest number of filters that leaves 1e-6, found by halving an interval."""
    enough = most_filters(L, max_angle)
    phi = get_spectral_filters(L, enough, dtype=torch.float64, max_angle=max_angle)
    phi = phi / phi.norm(dim=0)
    responses = impulse_responses(L, radius, max_angle)
    too_few = 0
    while enough - too_few > 1:
        K = (too_few + enough) // 2
        bank = both_signs(phi[:, :K])
        if worst_error(bank, responses) <= 1e-6:
            enough = K
        else:
            too_few = K
    return enough


def show_progress(text, start, share):
    """The time left, if what is left takes as long as the share that is done."""
    minutes = (time.perf_counter() - start) / 60
    left = minutes * (1 / share - 1)
    print(f"{text}: {left:.1f} min left", file=sys.stderr, flush=True)


def filters():
    rows = [(L, angle) for L in (128, 1024) for angle in ANGLES]
    work = [most_filters(L, angle) ** 3 for L, angle in rows]  # the time a row takes, about
    start = time.perf_counter()
    print("| L | angle | K for r = 0.9 | 0.99 | 0.999 |")
    for i, (L, angle) in enumerate(rows):
        K1 = filters_needed(L, angle, 0.9)
        K2 = filters_needed(L, angle, 0.99)
        K3 = filters_needed(L, angle, 0.999)
        print(f"| {L} | {angle}° | {K1} | {K2} | {K3} |", flush=True)
        done = sum(work[: i + 1])
        show_progress(f"row {i + 1}/{len(rows)}", start, done / sum(work))


def recurrence_row(L, angle, K):
    start = time.process_time()
    phi = get_spectral_filters(L, K, dtype=torch.float64, max_angle=angle)
    seconds = time.process_time() - start
    bank = FilterBank(both_signs(phi), max_angle=angle)
    energy = phi.square().cumsum(dim=0)
    far = (energy < 0.9 * energy[-1]).sum(dim=0).max() + 1
    row = f"| {L} | {angle}° | {K} | {seconds:.2f} | {far} |"
    if bank.lds is None:  # the layer remembers its last L inputs instead
        return f"{row} none |  |"
    step = bank.lds.powers[1]  # from a state to the next
    states = [bank.lds.b]
    for _ in range(L - 1):
        states.append(step @ states[-1])
    answer = torch.stack(states) @ bank.lds.C.T  # [L, F], to compare with the filters
    wrong = (answer - bank.filters).abs().max()
    error = wrong / bank.filters.abs().max()
    return f"{row} {len(bank.lds.b)} | {error:.0e} |"


def recurrence():
    rows = []
    for L in (128, 1024):
        for angle in ANGLES:
            K = round(L * angle / 180) + 16
            rows.append((L, angle, min(K, L // 2)))
    for L in (1024, 8192):
        for angle in ANGLES:
            rows.append((L, angle, 24))
    work = [L * (angle + 1) for L, angle, _ in rows]  # the time a row takes, about
    start = time.perf_counter()
    print("| L | angle | K | filters, s | lags | states | error |")
    for i, (L, angle, K) in enumerate(rows):
        print(recurrence_row(L, angle, K), flush=True)
        done = sum(work[: i + 1])
        show_progress(f"row {i + 1}/{len(rows)}", start, done / sum(work))


def main():
    parser = argparse.ArgumentParser(description="What does a sector of poles cost?")
    parser.add_argument("what", choices=["filters", "recurrence"])
    args = parser.parse_args()
    if args.what == "filters":
        filters()
    else:
        recurrence()


if __name__ == "__main__":
    main()
