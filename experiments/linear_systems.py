"""
Who learns a linear system with a long memory? And which systems does an STU miss?

    python experiments/linear_systems.py        ... minutes on one CPU thread; draws linear_systems.png

A random system of 256 states, with real eigenvalues up to 0.99 in size, is learned from its inputs
and outputs by models of about the same size, with Adam at the best of five learning rates, each
tried for a quarter of the steps. The error is the mean squared error on new sequences, over the
variance of the outputs. Then an STU is fitted to systems that ring: with eigenvalues
0.99 exp(±iθ), for many angles θ.
"""

import argparse
import math
import sys
import time
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


class S4D(nn.Module):
    """Each channel is filtered by a sum of N complex exponentials (arXiv 2206.11893, S4D-Lin)."""

    def __init__(self, width=24, N=16):
        super().__init__()
        self.encode = nn.Linear(D_IN, width)
        self.decode = nn.Linear(width, D_OUT)
        self.log_dt = nn.Parameter(torch.empty(width).uniform_(math.log(1e-3), math.log(1e-1)))
        self.log_decay = nn.Parameter(torch.full((width, N), math.log(0.5)))
        self.frequency = nn.Parameter(math.pi * torch.arange(N).repeat(width, 1).float())
        self.C = nn.Parameter(torch.randn(width, N, 2) / N**0.5)
        self.D = nn.Parameter(torch.ones(width))

    def forward(self, x):
        u = self.encode(x)  # [B, T, width]
        A = torch.complex(-self.log_decay.exp(), self.frequency)  # [width, N]
        dtA = A * self.log_dt.exp()[:, None]
        t = torch.arange(x.shape[1])
        powers = torch.exp(dtA[:, :, None] * t)  # [width, N, T]
        weight = torch.view_as_complex(self.C) * (dtA.exp() - 1) / A
        kernel = 2 * (weight[:, :, None] * powers).sum(dim=1).real  # [width, T]
        y = fft_conv(u.transpose(1, 2), kernel).transpose(1, 2)
        return self.decode(y + self.D * u)


class Mamba2(nn.Module):
    """The layer of Mamba-2 (arXiv 2405.21060), with heads that have one decay a_t each:

        h_t = a_t h_{t-1} + Δ_t B_t u_tᵀ,    y_t = C_tᵀ h_t + D u_t,    a_t = exp(-Δ_t A)

    Δ, B and C depend on the input, and the output is gated. We compute it without a loop:
    y_t = Σ_{s <= t} (C_t · B_s) (a_{s+1} ··· a_t) Δ_s u_s + D u_t.
    """

    def __init__(self, width=44, N=16, heads=2):
        super().__init__()
        self.width = width
        self.N = N
        self.heads = heads
        n_conv = width + 2 * N
        self.encode = nn.Linear(D_IN, width + n_conv + heads)
        self.decode = nn.Linear(width, D_OUT)
        self.conv = nn.Conv1d(n_conv, n_conv, kernel_size=4, padding=3, groups=n_conv)
        # At the beginning Δ lies between 0.001 and 0.1. (softplus is exp for small results.)
        self.log_dt = nn.Parameter(torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)))
        self.log_A = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(width))

    def forward(self, x):
        batch, T, _ = x.shape
        n_conv = self.width + 2 * self.N
        gate, v, dt = self.encode(x).split([self.width, n_conv, self.heads], dim=-1)
        v = self.conv(v.transpose(1, 2))[..., :T].transpose(1, 2)  # of the last 4 inputs
        u, B, C = F.silu(v).split([self.width, self.N, self.N], dim=-1)
        dt = F.softplus(dt + self.log_dt).transpose(1, 2)  # [batch, heads, T]
        log_a = -(dt * self.log_A.exp()[:, None]).cumsum(-1)  # log(a_1 ··· a_t)
        log_decay = log_a[:, :, :, None] - log_a[:, :, None, :]  # from s to t, [batch, heads, t, s]
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        decay = log_decay.masked_fill(future, -math.inf).exp()
        scores = (C @ B.transpose(1, 2))[:, None] * decay * dt[:, :, None, :]
        u_heads = u.view(batch, T, self.heads, -1).transpose(1, 2)
        y = (scores @ u_heads).transpose(1, 2).flatten(2)  # [batch, T, width]
        return self.decode((y + self.D * u) * F.silu(gate))


def attention(L, width=16):
    options = {"n_heads": 4, "window_size": L, "softcap": 0.0, "mlp_scale": 1.0}
    block = FlashSTUBlock(width, L, use_attention=True, **options)
    return nn.Sequential(nn.Linear(D_IN, width), block, nn.RMSNorm(width), nn.Linear(width, D_OUT))


def makers(L):
    """Functions that make the models, of about 1,800 parameters each."""
    return {
        "STU": lambda: MiniSTU(L, 24, D_IN, D_OUT),
        "STU, filters as they are": lambda: STU(D_IN, D_OUT, L, use_approx=False),
        "S4D": S4D,
        "Mamba-2": Mamba2,
        "attention": lambda: attention(L),
        "dense system": lambda: LDS(38, D_IN, D_OUT, diagonal=False),
        "diagonal system": lambda: random_LDS(118, D_IN, D_OUT),
    }
