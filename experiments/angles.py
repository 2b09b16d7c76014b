"""What a sector of poles costs, and what it brings: get_spectral_filters(..., max_angle).

    python experiments/angles.py filters                                   3 minutes
    python experiments/angles.py recurrence                                5 minutes
    python experiments/angles.py robot --rate 0.01                         5 minutes
    python experiments/angles.py text --steps 300 --data input.txt        15 minutes

The filters of max_angle = 0 span decays. What rings, with poles r e^(±iθ), needs filters for a
sector |θ| <= max_angle. `filters`: how many, so that the best linear map on their outputs (that is,
MiniSTU.fit on endless data) leaves 1e-6 of the variance of any system of the sector? `recurrence`:
how many states answer an impulse with them? `robot` (which needs pip install "gymnasium[mujoco]")
and `text` train a model at each angle, with 24 filters and on the same data. On one CPU thread.
"""

import argparse
import math
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from stu import FilterBank, FlashSTU, FlashSTUBlock, FlashSTUConfig  # noqa: I001
from stu import both_signs, get_spectral_filters

ANGLES = (0, 5, 10, 20, 45, 90)


def impulse_responses(L, radius, max_angle):
    """What poles r e^(±iθ) can answer: r^t cos θt and r^t sin θt, for 25 angles: [25, L, 2]."""
    t = torch.arange(L, dtype=torch.float64)
    angles = torch.linspace(0, math.radians(max_angle), 25, dtype=torch.float64)
    turns = angles[:, None] * t
    return torch.stack([turns.cos(), turns.sin()], dim=2) * radius ** t[:, None]


def worst_error(bank, responses):
    """The largest error / variance of a system, by the best linear map on white input.

    Over a sequence of L tokens lag t is seen L - t times, so it counts with this weight.
    """
    L = len(bank)
    weight = (1 - torch.arange(L, dtype=torch.float64) / L).sqrt()[:, None]
    U, sigma, _ = torch.linalg.svd(weight * bank, full_matrices=False)
    U = U[:, sigma > 1e-12 * sigma[0]]
    worst = 0.0
    for pair in responses:
        pair = pair[:, pair.norm(dim=0) > 0]  # at θ = 0 the sine is nothing
        Q = torch.linalg.qr(weight * pair).Q  # every system of these poles is in its span
        missed = Q - U @ (U.T @ Q)
        worst = max(worst, torch.linalg.matrix_norm(missed, ord=2).item() ** 2)
    return worst


def filters_needed(L, max_angle, radius):
    most = min(L // 2, round(L * max_angle / 180) + 40)  # L / 2 of both signs are everything
    phi = get_spectral_filters(L, most, dtype=torch.float64, max_angle=max_angle)
    phi = phi / phi.norm(dim=0)
    responses = impulse_responses(L, radius, max_angle)
    too_few = 0
    enough = most
    while enough - too_few > 1:
        K = (too_few + enough) // 2
        if worst_error(both_signs(phi[:, :K]), responses) <= 1e-6:
            enough = K
        else:
            too_few = K
    return enough


def filters(args):
    print("| L | angle | K for r = 0.9 | 0.99 | 0.999 |")
    for L in (128, 1024):
        for angle in ANGLES:
            K1, K2, K3 = [filters_needed(L, angle, r) for r in (0.9, 0.99, 0.999)]
            print(f"| {L} | {angle}° | {K1} | {K2} | {K3} |", flush=True)


def recurrence(args):
    print("| L | angle | K | filters, s | states | error |")
    for L, fixed_K in ((128, None), (1024, None), (1024, 24), (8192, 24)):
        for angle in ANGLES:
            K = fixed_K or min(L // 2, 16 + round(L * angle / 180))
            start = time.process_time()
            phi = get_spectral_filters(L, K, dtype=torch.float64, max_angle=angle)
            seconds = time.process_time() - start
            bank = FilterBank(both_signs(phi), max_angle=angle)
            row = f"| {L} | {angle}° | {K} | {seconds:.2f} |"
            if bank.lds is None:  # the layer remembers its last L inputs instead
                print(f"{row} none |  |")
                continue
            answer = [bank.lds.b]
            for _ in range(L - 1):
                answer.append(bank.lds.powers[1] @ answer[-1])
            wrong = torch.stack(answer) @ bank.lds.C.T - bank.filters
            error = wrong.abs().max() / bank.filters.abs().max()
            print(f"{row} {len(bank.lds.b)} | {error:.0e} |", flush=True)


def train(model, loss_of_a_batch, steps, rate, label):
    """Adam; the rate rises for a twentieth of the steps, then falls to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = rate * min(20 * step / steps, 1 - step / (steps + 1))
        loss = loss_of_a_batch(model)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        left = (time.perf_counter() - start) / step * (steps - step) / 60
        print(f"\r{label}: step {step}/{steps}, {left:.1f} min left ", end="", file=sys.stderr)


def compare(task, args, make_model, loss_of_a_batch, unseen_loss):
    """A row for each angle: the loss on what was not trained on, the mean and each seed's."""
    for angle in args.angles:
        losses = []
        for seed in args.seeds:
            torch.manual_seed(seed)  # the same data in the same order at every angle
            model = make_model(angle)
            label = f"{task}, {angle:g}°, seed {seed}"
            train(model, loss_of_a_batch, args.steps, args.rate, label)
            with torch.no_grad():
                losses.append(unseen_loss(model).item())
        runs = " ".join(f"{loss:.4g}" for loss in losses)
        print(f"\n| {task}, {angle:g}° | {sum(losses) / len(losses):.4g} | {runs} |", flush=True)


def ant_trajectories(number, length):
    """MuJoCo's Ant under smooth random torques: [number, length, 27 of the state + 8 torques]."""
    import gymnasium

    env = gymnasium.make("Ant-v5", terminate_when_unhealthy=False).unwrapped
    rows = torch.empty(number, length, 35)
    for i in range(number):
        env.reset(seed=i)
        torque = torch.zeros(8)
        for t in range(length):
            torque = 0.9 * torque + 0.19**0.5 * torch.randn(8)
            rows[i, t, :27] = torch.tensor([*env.data.qpos[2:], *env.data.qvel])
            rows[i, t, 27:] = torque.tanh()
            env.step(rows[i, t, 27:].numpy())
        print(f"\rsimulating {i + 1}/{number}", end="", file=sys.stderr)
    return rows


def robot(args):
    """Four STU-T blocks predict the next change of the state, from all before and the torques."""
    torch.manual_seed(0)
    L = 128
    n_unseen = 40
    width = 64
    data = ant_trajectories(400, L + 1)
    data = data - data.mean(dim=(0, 1))
    data = data / data.std(dim=(0, 1))
    for task, d in (("whole state", 27), ("positions only", 13)):
        inputs = torch.cat([data[..., :d], data[..., 27:]], dim=2)[:, :-1]
        change = data[..., :d].diff(dim=1)
        change = change / change.std()

        def make_model(angle, d=d):
            layers = [nn.Linear(d + 8, width)]
            for _ in range(4):
                layers.append(FlashSTUBlock(width, L, mlp_scale=2.0, max_angle=angle))
            return nn.Sequential(*layers, nn.RMSNorm(width), nn.Linear(width, d))

        def loss(model, rows=None, inputs=inputs, change=change):
            if rows is None:  # a batch to train on
                rows = torch.randint(n_unseen, len(data), (8,))
            return F.mse_loss(model(inputs[rows]), change[rows])

        compare(task, args, make_model, loss, partial(loss, rows=slice(0, n_unseen)))


def text(args):
    """A language model of four layers, STU-T and attention by turns; bits per byte."""
    ids = torch.tensor(list(Path(args.data).read_bytes()))
    L = 256
    cut = len(ids) * 9 // 10
    sizes = {"n_embd": 128, "n_layers": 4, "n_heads": 4, "seq_len": L, "window_size": 64}
    sizes |= {"vocab_size": 256, "torch_dtype": "float32"}

    def make_model(angle):
        return FlashSTU(FlashSTUConfig(**sizes, max_angle=angle))

    def loss(model, begin=0, end=cut, n=8):
        starts = torch.randint(begin, end - L, (n, 1))
        x = ids[starts + torch.arange(L)]
        return model(x, labels=x).loss

    def unseen_loss(model):
        torch.manual_seed(0)
        return loss(model, cut, len(ids), 128) / math.log(2)

    compare("text", args, make_model, loss, unseen_loss)


def main():
    parser = argparse.ArgumentParser(description="What a sector of poles costs and brings.")
    experiments = {"filters": filters, "recurrence": recurrence, "robot": robot, "text": text}
    parser.add_argument("what", choices=experiments)
    parser.add_argument("--angles", type=float, nargs="+", default=[0.0, 5.0, 20.0, 45.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--data", default="input.txt", help="a text, read as bytes")
    args = parser.parse_args()
    experiments[args.what](args)


if __name__ == "__main__":
    main()
