"""Who learns a linear system with a long memory?

    python experiments/linear_systems.py    # four minutes; draws linear_systems.png

A random system of 256 states, with real eigenvalues up to 0.99 in size, is learned from its inputs
and outputs by models of about the same size. Adam trains each at the best of five learning rates,
which are tried for a quarter of the steps first. The error is the mean squared error on new
sequences, over the variance of the outputs.
"""

import argparse
import math
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from lds import LDS, MiniSTU, random_LDS, sample
from stu import STU, FlashSTUBlock, fft_conv

D_IN = 10
D_OUT = 5
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
LOG_DT = (math.log(1e-3), math.log(1e-1))  # S4D and Mamba-2 draw log(Δ) from this range


class S4D(nn.Module):
    """Each channel has a filter of its own, with N poles A_n (arXiv 2206.11893, S4D-Lin).

    At lag t it is 2 Re Σ_n C_n (exp(Δ A_n) - 1) / A_n · exp(Δ A_n t). A_n begins as -1/2 + iπn.
    """

    def __init__(self, width=24, N=16):
        super().__init__()
        self.encode = nn.Linear(D_IN, width)
        self.decode = nn.Linear(width, D_OUT)
        self.log_dt = nn.Parameter(torch.empty(width).uniform_(*LOG_DT))
        self.log_decay = nn.Parameter(torch.full((width, N), math.log(0.5)))
        frequency = math.pi * torch.arange(N)
        self.frequency = nn.Parameter(frequency.repeat(width, 1))
        self.C = nn.Parameter(torch.randn(width, N, 2) / N**0.5)  # real and imaginary parts
        self.D = nn.Parameter(torch.ones(width))

    def forward(self, x):
        u = self.encode(x)  # [B, T, width]
        A = torch.complex(-self.log_decay.exp(), self.frequency)  # [width, N]
        dtA = A * self.log_dt.exp()[:, None]
        t = torch.arange(x.shape[1])
        powers = torch.exp(dtA[:, :, None] * t)  # [width, N, T]
        weight = torch.view_as_complex(self.C) * (dtA.exp() - 1) / A
        terms = weight[:, :, None] * powers
        filters = 2 * terms.sum(dim=1).real  # [width, T]
        y = fft_conv(u.mT, filters).mT
        return self.decode(y + self.D * u)


class Mamba2(nn.Module):
    """The layer of Mamba-2 (arXiv 2405.21060), with heads that have one decay a_t each:

        h_t = a_t h_{t-1} + Δ_t B_t u_tᵀ,    y_t = C_tᵀ h_t + D u_t,    a_t = exp(-Δ_t A).

    Δ, B and C depend on the input, and the output is gated. We compute it without a loop:
    y_t = Σ_{s <= t} (C_t · B_s) (a_{s+1} ··· a_t) Δ_s u_s + D u_t.
    """

    def __init__(self, width=44, N=16, heads=2):
        super().__init__()
        self.heads = heads
        n_conv = width + 2 * N
        self.encoded = [width, n_conv, heads]  # channels of the gate, of u, B and C, and of Δ
        self.convolved = [width, N, N]  # channels of u, B and C
        self.encode = nn.Linear(D_IN, sum(self.encoded))
        self.decode = nn.Linear(width, D_OUT)
        self.conv = nn.Conv1d(n_conv, n_conv, 4, padding=3, groups=n_conv)
        self.log_dt = nn.Parameter(torch.empty(heads).uniform_(*LOG_DT))
        self.log_A = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(width))

    def forward(self, x):
        batch, T, _ = x.shape
        gate, uBC, dt = self.encode(x).split(self.encoded, dim=-1)
        uBC = self.conv(uBC.mT)  # of each input and the three before it
        uBC = F.silu(uBC[:, :, :T]).mT
        u, B, C = uBC.split(self.convolved, dim=-1)
        dt = F.softplus(dt + self.log_dt).mT  # [batch, heads, T]
        A = self.log_A.exp()[:, None]
        log_a = -(dt * A).cumsum(dim=-1)  # log(a_1 ··· a_t)
        log_decay = log_a.unsqueeze(3) - log_a.unsqueeze(2)  # [batch, heads, t, s], from s to t
        future = torch.ones(T, T).triu(1) > 0
        decay = log_decay.masked_fill(future, -math.inf).exp()
        scores = C @ B.mT  # [batch, t, s]
        scores = scores.unsqueeze(1) * decay * dt.unsqueeze(2)
        u_heads = u.view(batch, T, self.heads, -1)
        y = scores @ u_heads.transpose(1, 2)  # [batch, heads, T, width / heads]
        y = y.transpose(1, 2).flatten(2)
        return self.decode((y + self.D * u) * F.silu(gate))


def attention(L, width=16):
    options = {"n_heads": 4, "window_size": L, "softcap": 0.0, "mlp_scale": 1.0}
    block = FlashSTUBlock(width, L, use_attention=True, **options)
    return nn.Sequential(nn.Linear(D_IN, width), block, nn.RMSNorm(width), nn.Linear(width, D_OUT))


def linear_system(L, diagonal):
    if diagonal:
        return random_LDS(118, D_IN, D_OUT)
    return LDS(38, D_IN, D_OUT, diagonal=False)


MAKERS = {  # called with the length L of the sequences they make models of about 2,000 parameters
    "STU": partial(MiniSTU, num_filters=24, input_dim=D_IN, output_dim=D_OUT),
    "STU, filters as they are": partial(STU, D_IN, D_OUT, use_approx=False),
    "S4D": lambda L: S4D(),
    "Mamba-2": lambda L: Mamba2(),
    "attention": attention,
    "dense system": partial(linear_system, diagonal=False),
    "diagonal system": partial(linear_system, diagonal=True),
}


def error(model, system, L):
    x, y = sample(system, 64, L)
    with torch.no_grad():
        return (F.mse_loss(model(x), y) / y.var()).item()


class Progress:
    """Says how much time is left, as if all steps were equally long."""

    def __init__(self, total):
        self.total = total
        self.done = 0
        self.start = time.perf_counter()

    def step(self, text):
        self.done += 1
        if self.done % 50 == 0 or self.done == self.total:
            minutes = (time.perf_counter() - self.start) / 60
            left = minutes / self.done * (self.total - self.done)
            print(f"{text:50} {left:5.1f} min left", flush=True)


def train(name, system, L, rate, num_steps, seed, progress):
    """Adam at this rate, which falls to zero in the second half -> model, the loss of each step."""
    torch.manual_seed(seed + 1)  # the same weights and data at every rate
    model = MAKERS[name](L)
    optimizer = torch.optim.Adam(model.parameters())
    losses = []
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = rate * min(1, 2 - 2 * step / num_steps)
        x, y = sample(system, 16, L)
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item() if loss.isfinite() else math.inf)
        progress.step(f"{name} at rate {rate:g}: loss {losses[-1]:.1e}")
    return model, losses


def compare(system, L, num_steps, seed):
    """Trains all models, and prints a line for each -> {name: losses}."""
    num_trial_steps = num_steps // 4 + 1
    steps_a_model = len(RATES) * num_trial_steps + num_steps
    progress = Progress(len(MAKERS) * steps_a_model)
    curves = {}
    for name in MAKERS:
        last_losses = {}
        for rate in RATES:
            _, losses = train(name, system, L, rate, num_trial_steps, seed, progress)
            last_losses[rate] = sum(losses[-10:])
        rate = min(last_losses, key=last_losses.get)
        model, curves[name] = train(name, system, L, rate, num_steps, seed, progress)
        n_params = sum(p.numel() for p in model.parameters())
        torch.manual_seed(seed + 2)  # the same data for every model
        what = f"{name}, {n_params} parameters, rate {rate:g}"
        print(f"== {what}: error / variance {error(model, system, L):.1e}", flush=True)
    return curves


def main():
    parser = argparse.ArgumentParser(description="Who learns a linear system?")
    parser.add_argument("--state_dim", type=int, default=256)
    parser.add_argument("--seq_len", type=int, default=256, help="at least 24")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default="linear_systems.png")
    args = parser.parse_args()
    if args.state_dim < 1 or args.steps < 1 or args.seq_len < 24:
        parser.error("--state_dim and --steps must be at least 1, and --seq_len at least 24")
    if args.out.suffix not in (".png", ".svg", ".pdf") or not args.out.parent.is_dir():
        parser.error(f"--out must be a .png, .svg or .pdf in a folder that exists, got {args.out}")
    torch.manual_seed(args.seed)
    L = args.seq_len
    system = random_LDS(args.state_dim, D_IN, D_OUT)
    _, y = sample(system, 64, L)
    system.C.data /= y.std()  # so that no model has to find the scale of the outputs
    solved = MAKERS["STU"](L).fit(*sample(system, 64, L))
    print(f"least squares: error / variance {error(solved, system, L):.1e}")
    curves = compare(system, L, args.steps, args.seed)
    figure = Figure((8, 4.5), layout="constrained")
    axis = figure.subplots()
    for name, losses in curves.items():
        axis.semilogy(losses, label=name)
    axis.set(title=f"Learning a linear system of {args.state_dim} states")
    axis.set(xlabel="step", ylabel="squared error / variance")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(args.out)
    print(f"the picture: {args.out}")


if __name__ == "__main__":
    main()
