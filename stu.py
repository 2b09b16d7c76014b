"""
Flash STU in one file: spectral transform units and sliding-window attention, from filters to language model.

    from stu import STU    one layer, [B, T, d_in] -> [B, T, d_out]; needs torch and numpy, nothing else
    python stu.py          times this file against the usual route on your machine, with the errors of both

The idea. A linear dynamical system with state matrix eigenvalue α answers an impulse with 1, α, α², ... To
learn such systems without learning α, filter the input with the few signals that span all of these decays at
once: the top eigenvectors of the sum over α of their outer products, each weighted by (1-α)², which is a
fixed Hankel matrix. Only linear maps are learned; the memory (thousands of steps) is in the fixed filters.
Papers: "Spectral State Space Models" (arXiv 2312.06837), "Flash STU" (2409.10489), and for the recurrent form
"SpectraLDS" (2505.17868).

The letters, everywhere in this file:
    B batch    T length of this input    L seq_len, the length of the filters    d, d_in, d_out channels
    K  number of eigenvectors φ_1..φ_K of the Hankel matrix Z (`num_eigh`), each a signal of length L
    Φ  the filter bank [L, F]: F = 2K filters φ_k(t), (-1)^t φ_k(t); Hankel-L has both signs inside: F = K
    A, b, C  the same bank as a linear dynamical system with n states: Φ[t, f] = C_f A^t b
    S  the state of that system, [B, n, d]: everything that an STU layer remembers of its past
    M  what is learned, [F, d_in, d_out]: the matrix M_f takes the output of filter f to the layer's output;
       in STU-T  M_f = M_inputs · diag(M_filters[f])
    w  attention window: a token sees itself and the w tokens before it; [B, H, T, hd] are H heads of size hd
F is also torch.nn.functional, as everywhere.
"""

import argparse
import functools
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

try:  # optional, CUDA only; every use below has a plain PyTorch form that gives the same result
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None
try:
    from flashfftconv import FlashFFTConv
except ImportError:
    FlashFFTConv = None


HALF = (torch.float16, torch.bfloat16)


def on_cuda(t: Tensor) -> bool:  # the one switch to the CUDA routes, so that a test can throw it on a CPU
    return t.is_cuda


# ------------------------------------------------------------------------------------------------------------
# 1. The filters: eigenvectors of a Hankel matrix that is never built
#
# Z_ij = 2 / ((i+j)^3 - (i+j)) = ∫_0^1 (1-α)^2 α^(i+j-2) dα is a sum over decays α of rank-one terms.
# Substitute α = exp(-e^x), and the trapezoid rule over x converges exponentially: Z = G Gᵀ with one column of
# G for each decay, G[t, m] = √w_m (1-α_m) α_m^t. The left singular vectors of G are the eigenvectors of Z.
# This matters: the eigenvalues of Z fall below 1e-16 of the largest after 16 filters (L = 40) to 20 (128),
# where `eigh(Z)` returns noise. The singular values of G are their square roots, and fall half as fast: a
# filter of norm 1 is right to 1e-5 for K up to 24 at L = 40, up to 27 at L = 64. Later ones are noise too.


def get_hankel(seq_len: int, use_hankel_L: bool = False) -> Tensor:
    """The matrix Z itself, [L, L] float64, to check with (2312.06837; Hankel-L: its appendix)."""
    i_plus_j = torch.arange(1, seq_len + 1, dtype=torch.float64)[:, None] + torch.arange(1, seq_len + 1)
    if use_hankel_L:  # ∫_-1^1 (1-α²)² α^(i+j-2) dα: decays of both signs
        return ((-1) ** i_plus_j + 1) * 8 / ((i_plus_j + 3) * (i_plus_j - 1) * (i_plus_j + 1))
    return 2 / (i_plus_j**3 - i_plus_j)


def get_spectral_filters(
    seq_len: int, K: int, use_hankel_L: bool = False, device=None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The top K eigenvectors of Z, leading one first, each times (its eigenvalue)^¼ (the papers' scale):
    [seq_len, K]. Computed in float64 from G, in O(seq_len) memory: 4 GB at 2^20."""
    if not (isinstance(seq_len, int) and isinstance(K, int) and 1 <= K <= seq_len):
        raise ValueError(f"need integers 1 <= K <= seq_len, got K = {K} filters for seq_len = {seq_len}")
    slowest = max(-12 - math.log(seq_len), -21)
    rate = np.exp(np.arange(3.8, slowest, -0.1))  # [m]: -ln α = e^x at m nodes x, from 45 to 6e-6 / L
    root_w = np.sqrt(0.1 * rate * np.exp(-rate))  # w = |dα| = e^x α dx, in steps dx = 0.1
    if use_hankel_L:  # entries of odd i+j vanish: an eigenvector lives on the even lags or on the odd lags
        step, weight = (
            2,
            -math.sqrt(2) * root_w * np.expm1(-2 * rate),
        )  # one column for α and -α: √(2w) (1-α²)
    else:
        step, weight = 1, -root_w * np.expm1(-rate)  # √w (1-α)
    filters, sigmas = [], []
    for first in range(min(step, seq_len)):
        lags = np.arange(first, seq_len, step)
        Q, R = torch.linalg.qr(torch.from_numpy(np.exp(-lags[:, None] * rate) * weight))  # of G, O(L m²)
        U, sigma, _ = np.linalg.svd(R.numpy())  # [m, m]: G = (Q U) diag(σ) Vᵀ
        phi = np.zeros((seq_len, len(sigma[:K])))
        phi[lags] = Q.numpy() @ U[:, :K] * sigma[:K] ** 0.5  # √σ = λ^¼
        filters.append(phi * np.where(phi[first] < 0, -1.0, 1.0))  # positive at the first lag
        sigmas.append(sigma[:K])
    order = np.argsort(-np.concatenate(sigmas), kind="stable")[:K]
    if len(order) < K:
        raise ValueError(f"length {seq_len} has only {len(order)} filters that can be found, got K = {K}")
    return torch.from_numpy(np.concatenate(filters, axis=1)[:, order]).to(device=device, dtype=dtype)


def get_tensorized_spectral_filters(
    n: int, k: int, use_hankel_L: bool = False, device=None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Kronecker products φ_i ⊗ φ_j of k' = min(k, s) filters of length s = ⌈√(n-2)⌉ (as published:
    rows past s² are zero): [n, k'^2]."""
    if n < 1 or k < 1:
        raise ValueError(f"need at least one filter of length at least 1, got k = {k}, n = {n}")
    s = max(1, math.ceil(math.sqrt(max(n - 2, 0))))
    small = get_spectral_filters(s, min(k, s), use_hankel_L, dtype=torch.float64)
    bank = torch.kron(small, small)[:n]  # [min(s², n), k'²]
    return F.pad(bank, (0, 0, 0, n - len(bank))).to(device=device, dtype=dtype)


# ------------------------------------------------------------------------------------------------------------
# 2. The same filters as a linear dynamical system
#
# Every filter is a mixture of decays, so a bank of them is the impulse response of one system with poles ±α:
#     S_t = A S_{t-1} + b u_t,   y_t = C S_t,   that is   Φ[t] = C A^t b.
# With the textbooks' diagonal A the states of slow poles are large, nearly equal, and cancel in y: in float32
# the weakest filters are lost. We keep the poles and take orthonormal coordinates (the Takenaka-Malmquist
# basis): a chain of all-pass sections, one for each pole p. A section holds one number s of the state; a
# signal v enters it and a signal z leaves for the next section, the first v being the input u:
#     s ← p s + √(1-p²) v,     z = √(1-p²) s - p v     (the old s in both).
# The n states answer an impulse with orthonormal signals ψ(t) = A^t b on t = 0..∞, so |C_f| is the norm of
# filter f over all t, never large, and a float32 state reproduces the layer's convolution to 1e-6.
# Orthonormality also gives the energy beyond lag L in closed form, Σ_{t>=L} ψ(t) ψ(t)ᵀ = A^L A^Lᵀ. So the
# least-squares fit of the filters on t < L, with a penalty `fade`² on the energy past L (where the filters
# are undefined, and their natural continuation grows), is one small linear solve.


class SpectralLDS(NamedTuple):
    powers: Tensor  # A^0 .. A^block: [block + 1, n, n]
    b: Tensor  # [n]
    C: Tensor  # [F, n]
    error: float  # max |Φ[t, f] - C_f A^t b| over t < L


def spectral_lds(filters: Tensor, n_pairs: int = 0, block: int = 64, fade: float = 1e-5) -> SpectralLDS:
    """The system (A, b, C) of n = 2 n_pairs states that answers an impulse with `filters` [L, F], then fades.

    0 pairs: as many as fit spectral filters of any K to 1e-7 (tried: 128 at L = 8192, 48 at 2^19). block: how
    many powers of A to make for lds_scan. Float64; diag(A) are the poles."""
    L = len(filters)
    n = 2 * (n_pairs or max(56, round(5 * math.log(8 * L))))
    rate = np.exp(np.linspace(-math.log(L), math.log(8), n // 2))  # memories from L steps to 1/8 step
    A, b = np.zeros((n, n)), np.zeros(n)
    v_state, v_input = np.zeros(n), 1.0  # v = v_state · S + v_input u: what enters section i
    for i, p in enumerate(np.stack([np.exp(-rate), -np.exp(-rate)], axis=1).ravel()):
        gain = math.sqrt((1 - p) * (1 + p))
        A[i], b[i] = gain * v_state, gain * v_input
        A[i, i] = p
        v_state, v_input = -p * v_state, -p * v_input  # z, the v of section i + 1
        v_state[i] = gain
    psi, power = b[:, None], A  # [n, 1]: ψ(0)
    while psi.shape[1] < L:  # ψ(t + s) = A^s ψ(t), doubling s
        psi, power = np.concatenate([psi, power @ psi], axis=1), power @ power
    psi, A_L = psi[:, :L], np.linalg.matrix_power(A, L)  # [n, L], [n, n]
    filters = filters.double().cpu().numpy()
    C = np.linalg.solve(np.eye(n) - (1 - fade**2) * A_L @ A_L.T, psi @ filters).T
    powers = np.stack([np.linalg.matrix_power(A, i) for i in range(block + 1)])
    error = np.abs(psi.T @ C.T - filters).max().item()
    return SpectralLDS(*(torch.from_numpy(a) for a in (powers, b, C)), error)


def lds_scan(u: Tensor, S: Tensor, lds: SpectralLDS, M: Tensor) -> tuple[Tensor, Tensor]:
    """The convolution as a recurrence over blocks, from state S: for input in pieces and past seq_len.

    u [B, T, d], S [B, n, d] -> y [B, T, d_out], S after the last input. With M [F, d] (STU-T) channel c is
    filtered by Σ_f M[f, c] Φ_f and d_out = d; with M [F, d, d_out] (full STU) every filter output has its own
    matrix."""
    powers, b, C, _ = lds
    block = min(u.shape[1], len(powers) - 1)
    psi = powers[:block] @ b  # [block, n], ψ(t) = A^t b
    blocks = []  # of each, its inputs (zeros after the last) and the state S before it: [B, block + n, d]
    for piece in u.split(block, dim=1):
        r = piece.shape[1]
        blocks.append(torch.cat([F.pad(piece, (0, 0, 0, block - r)), S], dim=1))
        S = powers[r] @ S + psi[:r].flip(0).T @ piece  # A^r S + Σ_i A^(r-1-i) b u_i: [n, r] @ [B, r, d]
    # Within a block y_t = Σ_{s<=t} C A^(t-s) b u_s + C A^(t+1) S: one matrix for inputs and state
    lag = torch.arange(block, device=u.device)[:, None] - torch.arange(block, device=u.device)
    toeplitz = (psi @ C.T)[lag.clamp(min=0)] * (lag >= 0)[..., None]  # [t, s, F]
    to_filters = torch.cat([toeplitz.transpose(1, 2), C @ powers[1 : block + 1]], dim=2)  # [t, F, block + n]
    if M.ndim == 2:  # all blocks at once: [blocks, B, block, d]
        to_outputs = torch.einsum("tfs,fd->tsd", to_filters, M)
        y = torch.einsum("tsd,jbsd->jbtd", to_outputs, torch.stack(blocks)).unbind()
    else:  # one by one, for the filter outputs of a block are large: [B, block, F·d] @ [F·d, d_out]
        y = [torch.einsum("tfs,bsd->btfd", to_filters, v).flatten(2) @ M.flatten(0, 1) for v in blocks]
    return torch.cat(y, dim=1)[:, : u.shape[1]], S


def make_bank(phi: Tensor, use_hankel_L: bool = False) -> tuple[Tensor, SpectralLDS | None]:
    """Base filters φ [L, K] -> the bank Φ [L, F] and its recurrent form, or None where none fits to 1e-6 and
    fades past L (Kronecker products)."""
    bank = phi.detach().double().cpu()
    if not use_hankel_L:
        alternating = bank.clone()
        alternating[1::2] *= -1
        bank = torch.cat([bank, alternating], dim=1)
    lds = spectral_lds(bank)
    past_L = (lds.C @ torch.linalg.matrix_power(lds.powers[1], len(bank))).norm(dim=1).max()
    fits = lds.error < 1e-6 * bank.abs().max() and past_L < 0.05 * bank.norm(dim=0).max()
    return bank, lds if fits else None


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def _standard_bank(seq_len, K, use_hankel_L, use_tensorized):
    make = get_tensorized_spectral_filters if use_tensorized else get_spectral_filters
    return make_bank(make(seq_len, K, use_hankel_L, dtype=torch.float64), use_hankel_L)


# ------------------------------------------------------------------------------------------------------------
# 3. The same filters as a convolution: FFT over the whole sequence, for training
#
# y_t = Σ_{s<=t} h_{t-s} u_s for t < T needs an FFT of at least 2T - 1 points, or its end wraps around.


def fft_size(n: int) -> int:
    """The smallest 2^a, 3·2^a, 5·2^a, 9·2^a or 15·2^a that is >= n: the lengths on which FFTs are fast."""
    return min(m << max(0, math.ceil(math.log2(n / m))) for m in (1, 3, 5, 9, 15))


class _FFTConv(torch.autograd.Function):
    """Causal convolution of each channel: u [B, d, T], h [d, <= T] -> [B, d, T]. The backward is one more
    rfft and two irffts (PyTorch's own derivative of rfft runs a full complex FFT of twice the work)."""

    @staticmethod
    def forward(ctx, u, h, n):
        ctx.n, ctx.lengths = n, (u.shape[-1], h.shape[-1])
        u_f, h_f = torch.fft.rfft(u, n=n), torch.fft.rfft(h, n=n)
        y = torch.fft.irfft(u_f * h_f, n=n)[..., : u.shape[-1]]
        ctx.save_for_backward(u_f.conj_physical_(), h_f.conj_physical_())  # in place: no second spectrum
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        u_conj, h_conj = ctx.saved_tensors
        grad_f = torch.fft.rfft(grad, n=ctx.n)
        grad_u = torch.fft.irfft(grad_f * h_conj, n=ctx.n)[..., : ctx.lengths[0]]
        grad_h = torch.fft.irfft(grad_f.mul_(u_conj).sum(0), n=ctx.n)[..., : ctx.lengths[1]]
        return grad_u, grad_h, None


def fft_conv(u: Tensor, h: Tensor, tile: int | None = None) -> Tensor:
    """The same, at most `tile` channels at a time, and so few that the CPU's cache holds their spectra: up to
    1.7 times faster."""
    n = fft_size(u.shape[-1] + h.shape[-1] - 1)
    size = max(1, min(tile or u.shape[1], (2**24 if u.is_cuda else 2**20) // max(1, len(u) * n)))
    pieces = zip(u.split(size, dim=1), h.split(size))
    return torch.cat([_FFTConv.apply(*piece, n) for piece in pieces], dim=1)


def full_conv(x: Tensor, filters: Tensor, M: Tensor, block: int = 64) -> Tensor:
    """Σ_f (Φ_f * x) M_f for x [B, T, d_in], filters [<= T, F], M [F, d_in, d_out] -> [B, T, d_out].

    At each frequency ω the layer is one small matrix Σ_f Φ_f(ω) M_f, so the filter outputs [B, T, F, d_in]
    are never formed. The matrices are made for `block` frequencies at a time, and again for the backward
    pass. Real and imaginary parts (index c) are kept apart: M is real, and complex products would cost twice
    as much."""

    def mix(x_f, filters_f):  # [block, 2, B, d_in], [block, 2, F] -> [block, B, d_out, 2]
        matrices = torch.einsum("kcf,fio->kcio", filters_f, M)
        by_re, by_im = (x_f.flatten(1, 2)[:, None] @ matrices).unflatten(2, x_f.shape[1:3]).unbind(1)
        return torch.stack([by_re[:, 0] - by_im[:, 1], by_re[:, 1] + by_im[:, 0]], dim=-1)

    n = fft_size(x.shape[1] + len(filters) - 1)
    x_f = torch.view_as_real(torch.fft.rfft(x, n=n, dim=1)).permute(1, 3, 0, 2)  # [n/2 + 1, 2, B, d_in]
    filters_f = torch.view_as_real(torch.fft.rfft(filters, n=n, dim=0)).transpose(1, 2)  # [n/2 + 1, 2, F]
    run = functools.partial(checkpoint, mix, use_reentrant=False) if torch.is_grad_enabled() else mix
    y_f = torch.cat([run(*chunk) for chunk in zip(x_f.split(block), filters_f.split(block))])
    y_f = torch.view_as_complex(y_f).transpose(0, 1)  # [B, n/2 + 1, d_out]
    return torch.fft.irfft(y_f, n=n, dim=1)[:, : x.shape[1]]


# ------------------------------------------------------------------------------------------------------------
# 4. The STU layer
#
# STU:    y = Σ_k (φ_k * x) M⁺_k + Σ_k s·(φ_k * (s·x)) M⁻_k with s_t = (-1)^t
# Since s·(φ * (s·x)) = (s·φ) * x exactly, the second branch is a convolution with the alternating filter s·φ,
# and both are one sum over the bank Φ = [φ, s·φ]: y = Σ_f (Φ_f * x) M_f.
# STU-T:  M_f = M_inputs · diag(M_filters[f]), hence y = (x M_inputs) * (Φ M_filters): one filter a channel.
# Each branch has its own rows of M_filters: with shared rows the kernel would be ∝ 1 + (-1)^t, blind to odd
# lags.


class STU(nn.Module):
    """Spectral transform unit: [B, T, d_in] -> [B, T, d_out] for any T >= 1, causal. seq_len: filter length.

    use_approx=True is STU-T (one filter per channel), False the full STU. use_tensorized takes Kronecker
    filters, precomputed_filters base filters of your own, [seq_len, K], or a bank and its recurrent form, as
    make_bank gives them. d_out_tile bounds the channels of one FFT (STU-T), d_in_tile · d_out_tile the
    matrices made at once (full STU): less memory, same result. A call without a state and with T <= seq_len
    takes the route `backend`, "fft" (a convolution) or "lds" (a recurrence over blocks); all others recur.

    stu(x) -> y;  stu(x, state, use_cache=True) -> (y, state): the input may arrive in pieces of any size,
    with state=None first. The state is S [B, n, d_out] (full STU: d_in), or the last seq_len - 1 inputs where
    no recurrence fits. attention_mask [B, >= T] is 0 where an input is padding, its last column is for the
    last input."""

    def __init__(
        self, d_in: int, d_out: int, seq_len: int, num_eigh: int = 24, use_hankel_L: bool = False,
        use_approx: bool = True, use_tensorized: bool = False,
        precomputed_filters: Tensor | tuple[Tensor, SpectralLDS | None] | None = None,
        d_in_tile: int | None = None, d_out_tile: int | None = None,
        use_flash_fft: bool = True, backend: str = "fft",
    ):  # fmt: skip
        super().__init__()
        if backend not in ("fft", "lds"):
            raise ValueError(f'backend must be "fft" or "lds", got {backend!r}')
        if any(size is not None and size < 1 for size in (d_in, d_out, d_in_tile, d_out_tile)):
            got = f"{d_in}, {d_out}, {d_in_tile}, {d_out_tile}"
            raise ValueError(f"d_in, d_out, d_in_tile, d_out_tile must be at least 1, got {got}")
        self.d_in, self.d_out, self.seq_len, self.use_approx = d_in, d_out, seq_len, use_approx
        self.d_in_tile, self.d_out_tile = d_in_tile, d_out_tile
        self.use_flash_fft, self.backend = use_flash_fft, backend
        bank = precomputed_filters
        if bank is None:
            bank = _standard_bank(seq_len, num_eigh, use_hankel_L, use_tensorized)
        elif torch.is_tensor(bank):
            if bank.ndim != 2 or len(bank) != seq_len:
                expected = f"[seq_len, K] with seq_len = {seq_len}"
                raise ValueError(f"precomputed_filters must be {expected}, got {list(bank.shape)}")
            bank = make_bank(bank, use_hankel_L)
        if len(bank[0]) != seq_len:
            raise ValueError(f"precomputed_filters are of length {len(bank[0])}, seq_len is {seq_len}")
        self._bank = bank  # (Φ [L, F], its recurrent form or None), float64 on the CPU
        n_filters = bank[0].shape[1]
        if use_approx:
            self.M_inputs = nn.Parameter(torch.empty(d_in, d_out))
            self.M_filters = nn.Parameter(torch.empty(n_filters, d_out))
        else:
            self.M = nn.Parameter(torch.empty(n_filters, d_in, d_out))
        self.reset_parameters()
        self._place_filters()

    def reset_parameters(self):
        """White input of unit variance gives output of about unit variance, whatever the filters' scales."""
        energy = self._bank[0].square().sum().item()  # Σ_f |Φ_f|²
        if self.use_approx:
            nn.init.normal_(self.M_inputs, std=self.d_in**-0.5)
            nn.init.normal_(self.M_filters, std=energy**-0.5)
        else:
            nn.init.normal_(self.M, std=(self.d_in * energy) ** -0.5)

    def _apply(self, fn, recurse=True):  # what .to, .cuda, .double, ... call
        super()._apply(fn, recurse)
        self._place_filters()
        return self

    @torch.inference_mode(False)  # wherever this is called first, one can train afterwards
    def _place_filters(self):
        """The bank goes where the weights are, but never below float32: poles near 1 would coincide."""
        p = next(self.parameters())
        to = {"device": p.device, "dtype": torch.promote_types(p.dtype, torch.float32)}
        filters, lds = self._bank
        self.filters = filters.to(**to)
        self.lds = lds and SpectralLDS(*(t.to(**to) for t in lds[:3]), lds.error)

    def forward(self, x: Tensor, state: Tensor | None = None, use_cache: bool = False, attention_mask=None):
        if x.ndim != 3 or x.shape[1] < 1 or x.shape[2] != self.d_in:
            raise ValueError(f"input must be [batch, length >= 1, {self.d_in} channels], got {list(x.shape)}")
        if self.filters.device != x.device:  # weights were placed one by one, not by .to: FSDP, transformers
            self._place_filters()
        if attention_mask is not None:  # a zero input leaves the zero state as it is: no trace of padding
            x = x * attention_mask[:, -x.shape[1] :, None].to(x.dtype)
        u, M = (x @ self.M_inputs, self.M_filters) if self.use_approx else (x, self.M)
        # From here in float32 at least (on CUDA in TF32 if torch.set_float32_matmul_precision says so)
        dtype, (B, T, d) = u.dtype, u.shape
        u, M = u.to(self.filters.dtype), M.to(self.filters.dtype)
        with torch.autocast("cpu" if u.is_meta else u.device.type, enabled=False):
            if self.lds is None:
                past = u if state is None else torch.cat([state, u], dim=1)
                y = self._convolve(past, M, dtype)[:, -T:]
                state = past[:, max(0, past.shape[1] - self.seq_len + 1) :].clone()  # not a view of it all
            elif state is None and not use_cache and self.backend == "fft" and T <= self.seq_len:
                y = self._convolve(u, M, dtype)
            else:
                state = u.new_zeros(B, len(self.lds.b), d) if state is None else state
                y, state = lds_scan(u, state, self.lds, M)
        return (y.to(dtype), state) if use_cache else y.to(dtype)

    def _convolve(self, u, M, dtype):
        """Σ_f (Φ_f * u) M_f, with M [F, d] for STU-T; dtype is that of the layer's input."""
        filters = self.filters[: u.shape[1]]  # [T, F]
        if M.ndim == 3:
            share = min(1, (self.d_in_tile or self.d_in) * (self.d_out_tile or self.d_out) / M[0].numel())
            return full_conv(u, filters, M, block=max(1, int(64 * share)))
        u, h = u.transpose(1, 2), M.T @ filters.T  # [B, d, T], [d, T]
        if self.use_flash_fft and FlashFFTConv is not None and on_cuda(u) and dtype in HALF:
            T = u.shape[-1]
            padded = 1 << max(7, (T - 1).bit_length())  # its FFT has 2 · padded points, a power of two >= 256
            u, h = (F.pad(t, (0, padded - t.shape[-1])).contiguous() for t in (u.to(dtype), h))
            return _flash_fft_conv(2 * padded, dtype, u.device)(u, h)[..., :T].transpose(1, 2)
        return fft_conv(u, h, self.d_out_tile).transpose(1, 2)


@functools.lru_cache(maxsize=16)
def _flash_fft_conv(size, dtype, device):  # not kept in the layer: its buffers would enter the state_dict
    return FlashFFTConv(size, dtype=dtype).to(device)


# ------------------------------------------------------------------------------------------------------------
# 5. Sliding-window attention
#
# Query i sees keys i-w..i. Three routes, one result: flash-attn where installed (16-bit on CUDA),
# flex_attention in a compiled model on CUDA, else query blocks that look only at the keys they can see:
# O(T·w), never O(T²).


def rotary(x: Tensor, start: int) -> Tensor:
    """Rotate channels (i, i + hd/2) of x [B, H, T, hd] by angles proportional to the position start + t."""
    half = x.shape[-1] // 2
    exact = torch.float32 if x.device.type == "mps" else torch.float64  # float32 drifts past 10^5 tokens
    inv_freq = 10000.0 ** (-torch.arange(half, device=x.device, dtype=exact) / half)
    angle = torch.arange(start, start + x.shape[2], device=x.device)[:, None] * inv_freq  # [T, hd/2]
    cos, sin = (t.to(torch.promote_types(x.dtype, torch.float32)) for t in (angle.cos(), angle.sin()))
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1)


def windowed_attention(q, k, v, window: int, softcap: float = 0.0, attention_mask=None, block: int = 128):
    """q [B, H, T, hd]; k, v [B, H, past + T, hd]: query i sees key past + i and the `window` keys before it.

    Logits q·k/√hd pass through softcap·tanh(·/softcap) if softcap > 0. attention_mask [B, >= past + T], its
    last column for the last key, is 0 at padding: such a key is seen by its own query only (a softmax over
    nothing is NaN)."""
    if attention_mask is not None:
        attention_mask = attention_mask[:, None, None, -k.shape[2] :].bool()  # [B, 1, 1, past + T]
    past, outs = k.shape[2] - q.shape[2], []
    block = q.shape[2] if q.is_meta else block  # one block where there is no data: faster
    for start in range(0, q.shape[2], block):
        q_i = q[:, :, start : start + block]
        first, end = max(0, past + start - window), past + start + q_i.shape[2]
        k_i, v_i = k[:, :, first:end], v[:, :, first:end]
        at = torch.arange(first, end, device=q.device)
        distance = at[past + start - first :, None] - at  # [rows, keys]
        visible = (distance >= 0) & (distance <= window)
        if attention_mask is not None:
            visible = visible & (attention_mask[..., first:end] | (distance == 0))  # [B, 1, rows, keys]
        if softcap:
            logits = softcap * torch.tanh(q_i @ k_i.transpose(-1, -2) * (q.shape[-1] ** -0.5 / softcap))
            logits = logits.masked_fill(~visible, -torch.inf)
            weights = logits.softmax(-1, dtype=torch.promote_types(v.dtype, torch.float32))
            outs.append(weights.to(v.dtype) @ v_i)
        else:
            outs.append(F.scaled_dot_product_attention(q_i, k_i, v_i, attn_mask=visible))
    return torch.cat(outs, dim=2)


WINDOWS = {}  # w -> mask of flex_attention, one object each: torch 2.9 cannot compile one made in forward


def add_window(w: int) -> None:
    WINDOWS.setdefault(w, lambda b, h, i, j: (i >= j) & (i - j <= w))


def windowed_flex_attention(q, k, v, window: int, softcap: float):
    """The same for whole sequences: torch.compile makes window and softcap part of one fused kernel."""
    # imported here, because that takes seconds
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def cap(logit, b, h, i, j):
        return softcap * torch.tanh(logit / softcap)

    mask = create_block_mask(WINDOWS[window], None, None, q.shape[2], q.shape[2], device=q.device)
    return flex_attention(q, k, v, block_mask=mask, score_mod=cap if softcap else None)


def check_heads(d_model: int, n_heads: int) -> None:
    if n_heads < 1 or d_model % (2 * n_heads):
        fitting = [h for h in range(1, n_heads) if d_model % (2 * h) == 0]
        advice = f"; {fitting[-1]} would" if fitting else ""
        raise ValueError(f"n_heads = {n_heads} does not divide width {d_model} into even heads{advice}")


def parse_window(window_size: int | tuple[int, int]) -> int:
    """An int w, or flash-attn's (w, 0), -> w."""
    left, *right = window_size if isinstance(window_size, (tuple, list)) else (window_size, 0)
    if not isinstance(left, int) or left < 0 or right != [0]:
        raise ValueError(f"window_size must be w >= 0 or (w, 0), w tokens before: got {window_size!r}")
    return left


class SlidingWindowAttention(nn.Module):
    """Causal multi-head attention over the last `window_size` tokens and oneself, [B, T, d] -> [B, T, d].

    Rotary positions, RMS-normalised q and k. attn(x, state, use_cache=True) -> (y, state); the state is (k,
    v) [B, H, <= w, hd] of the last w tokens and the number of tokens seen. attention_mask [B, >= keys] is 0
    at padding, its last column is for the last key. Positions count padding too: they are relative, so a
    shift changes nothing."""

    def __init__(self, d_model: int, n_heads: int, window_size=1024, softcap=50.0, bias: bool = False):
        super().__init__()
        check_heads(d_model, n_heads)
        self.n_heads, self.window, self.softcap = n_heads, (w := parse_window(window_size)), softcap
        add_window(w)
        self.c_attn = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.c_proj = nn.Linear(d_model, d_model, bias=bias)
        self.q_norm = nn.RMSNorm(d_model // n_heads, eps=1e-6)
        self.k_norm = nn.RMSNorm(d_model // n_heads, eps=1e-6)

    def forward(self, x: Tensor, state: tuple | None = None, use_cache: bool = False, attention_mask=None):
        T, w = x.shape[1], self.window
        past_k, past_v, seen = state or (None, None, 0)
        qkv = self.c_attn(x).unflatten(-1, (3, self.n_heads, -1))  # [B, T, 3, H, hd]
        q, k, v = qkv.transpose(1, 3).unbind(2)  # [B, H, T, hd]
        q, k = (rotary(norm(t), seen).to(v.dtype) for norm, t in ((self.q_norm, q), (self.k_norm, k)))
        if state:
            k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
        fast = on_cuda(q) and attention_mask is None  # padding differs from row to row
        if fast and flash_attn_func is not None and q.dtype in HALF:
            q_k_v = (t.transpose(1, 2) for t in (q, k, v))  # it wants [B, T, H, hd]
            y = flash_attn_func(*q_k_v, causal=True, window_size=(w, 0), softcap=self.softcap).transpose(1, 2)
        elif fast and torch.compiler.is_compiling() and not (use_cache or state) and q.shape[-1] >= 16:
            y = windowed_flex_attention(q, k, v, w, self.softcap)  # its heads are at least 16 wide
        else:
            y = windowed_attention(q, k, v, w, self.softcap, attention_mask)
        y = self.c_proj(y.transpose(1, 2).flatten(2))
        if not use_cache:
            return y
        k, v = (t[:, :, max(0, t.shape[2] - w) :] for t in (k, v))
        if T > 1:  # let go of the rest of a long piece
            k, v = k.clone(), v.clone()
        return y, (k, v, seen + T)

    def __setstate__(self, state):  # unpickled in another process
        super().__setstate__(state)
        add_window(self.window)


# ------------------------------------------------------------------------------------------------------------
# 6. Block and model


@dataclass
class FlashSTUConfig:
    n_embd: int = 1536  # width d
    n_layers: int = 26  # even layers are STU, odd layers attention
    n_heads: int = 8  # of the attention layers
    seq_len: int = 8192  # length of the filters; longer inputs are legal, the filters fade out past it
    window_size: int | tuple[int, int] = 1024  # w, or flash-attn's (w, 0)
    num_eigh: int = 24  # K
    vocab_size: int = 200064
    mlp_scale: float = 4.0  # SwiGLU's hidden width over n_embd
    bias: bool = False  # of the linear layers
    dropout: float = 0.0  # after the embedding and on both branches of a block
    use_hankel_L: bool = False  # the Hankel matrix of decays of both signs
    use_approx: bool = True  # STU-T; False: the full STU
    use_tensorized: bool = False  # Kronecker filters, min(K, √seq_len)² of them
    use_flash_fft: bool = True  # FlashFFTConv where installed
    use_stu: bool = True  # False: attention in every layer
    use_attn: bool = True  # False: STU in every layer
    softcap: float = 50.0  # of attention logits; 0 turns it off
    stu_enable_mlp_sandwich: bool = False  # up-project, SiLU, STU at that width, down-project
    stu_mlp_hidden_size: int | None = None  # the sandwich's width; None: n_embd · mlp_scale
    d_in_tile: int | None = None  # less memory, same result: see STU
    d_out_tile: int | None = None
    use_gradient_checkpointing: bool = False  # layers are computed again in the backward pass
    torch_dtype: torch.dtype | str = torch.bfloat16  # of the parameters; train with float32 and autocast

    def __post_init__(self):
        if isinstance(self.torch_dtype, str):
            self.torch_dtype = getattr(torch, self.torch_dtype.removeprefix("torch."), self.torch_dtype)
        if isinstance(self.window_size, list):  # JSON has no tuples
            self.window_size = tuple(self.window_size)
        optional = [] if self.stu_mlp_hidden_size is None else ["stu_mlp_hidden_size"]
        for name in ("n_embd", "n_layers", "n_heads", "seq_len", "num_eigh", "vocab_size", *optional):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"FlashSTUConfig: {name} must be a positive integer, got {value!r}")
        floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        L = self.seq_len
        for name, right, wanted in (
            ("torch_dtype", self.torch_dtype in floats, "a floating-point dtype"),
            ("use_attn", self.use_stu or self.use_attn, "True where use_stu is False: no layer is left"),
            ("num_eigh", not self.use_stu or self.use_tensorized or self.num_eigh <= L, f"<= seq_len = {L}"),
            ("dropout", 0 <= self.dropout < 1, "in [0, 1)"),
            ("softcap", self.softcap >= 0, "at least 0, which turns it off"),
            ("mlp_scale", self.mlp_scale > 0, "positive"),
        ):
            if not right:
                raise ValueError(f"FlashSTUConfig: {name} must be {wanted}, got {getattr(self, name)!r}")
        parse_window(self.window_size)
        if self.use_attn:
            check_heads(self.n_embd, self.n_heads)

    def to_dict(self) -> dict:
        return asdict(self) | {"torch_dtype": str(self.torch_dtype).removeprefix("torch.")}


class SwiGLU(nn.Module):
    def __init__(self, d_model: int, d_hidden: int, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_hidden, bias=bias)
        self.up_proj = nn.Linear(d_model, d_hidden, bias=bias)
        self.down_proj = nn.Linear(d_hidden, d_model, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class FlashSTUBlock(nn.Module):
    """x + mixer(norm(x)), then x + SwiGLU(norm(x)), of [B, T, d_model]; the mixer is an STU or attention.

    Stands alone: FlashSTUBlock(d_model=512, sequence_length=2048); `options` are the fields of FlashSTUConfig
    that concern one layer (the others change nothing here)."""

    def __init__(self, d_model: int, sequence_length: int, num_filters=24, use_attention=False, **options):
        super().__init__()
        options |= {"use_attn": use_attention, "use_stu": not use_attention}
        c = FlashSTUConfig(n_embd=d_model, seq_len=sequence_length, num_eigh=num_filters, **options)
        d_hidden, self.sandwich = int(d_model * c.mlp_scale), None
        if use_attention:
            self.mixer = SlidingWindowAttention(d_model, c.n_heads, c.window_size, c.softcap, c.bias)
        else:
            d = d_model
            if c.stu_enable_mlp_sandwich:
                d = c.stu_mlp_hidden_size or d_hidden
                self.sandwich = nn.ModuleList([nn.Linear(d_model, d, c.bias), nn.Linear(d, d_model, c.bias)])
            self.mixer = STU(
                d, d, c.seq_len, c.num_eigh, c.use_hankel_L, c.use_approx, c.use_tensorized,
                d_in_tile=c.d_in_tile, d_out_tile=c.d_out_tile, use_flash_fft=c.use_flash_fft,
            )  # fmt: skip
        self.mixer_norm, self.mlp_norm = nn.RMSNorm(d_model, eps=1e-6), nn.RMSNorm(d_model, eps=1e-6)
        self.mlp = SwiGLU(d_model, d_hidden, c.bias)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, state=None, use_cache=False, attention_mask: Tensor | None = None):
        h = self.mixer_norm(x)
        if self.sandwich:
            h = F.silu(self.sandwich[0](h))
        h = self.mixer(h, state, use_cache, attention_mask)
        h, state = h if use_cache else (h, None)
        if self.sandwich:
            h = self.sandwich[1](h)
        x = x + self.dropout(h)
        x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return (x, state) if use_cache else x


class TiedEmbedding(nn.Embedding):
    """The one matrix [vocab_size, d] of both ends: token ids -> its rows, hidden states -> their logits. Both
    in its own forward, so that whoever brings weights just in time (offloading, FSDP) is told of both."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) if x.is_floating_point() else super().forward(x)


class Output(NamedTuple):
    """outputs.loss, outputs["loss"] and loss, logits, state = outputs all work."""

    loss: Tensor | None = None
    logits: Tensor | None = None  # [B, T, vocab_size]; None when labels are given
    state: list | None = None  # one entry a layer; None unless use_cache

    def __getitem__(self, key):
        return getattr(self, key) if isinstance(key, str) else tuple.__getitem__(self, key)


# What config.json says to transformers (section 7)
HF_CONFIG = {"model_type": "flash_stu", "architectures": ["FlashSTUForCausalLM"]}
HF_CONFIG["auto_map"] = {
    "AutoConfig": "stu.FlashSTUPretrainedConfig",
    "AutoModel": "stu.FlashSTUModel",
    "AutoModelForCausalLM": "stu.FlashSTUForCausalLM",
}


class FlashSTU(nn.Module):
    """The language model: embedding, n_layers blocks, norm, and the embedding again as output matrix."""

    def __init__(self, config: FlashSTUConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = config.use_gradient_checkpointing  # transformers throws this switch
        options = config.to_dict()
        d, L, K = (options.pop(name) for name in ("n_embd", "seq_len", "num_eigh"))
        self.tok_emb = TiedEmbedding(config.vocab_size, d)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            FlashSTUBlock(d, L, K, config.use_attn and (i % 2 == 1 or not config.use_stu), **options)
            for i in range(config.n_layers)
        )
        self.norm = nn.RMSNorm(d, eps=1e-6)
        nn.init.normal_(self.tok_emb.weight, std=0.02)
        last = ("sandwich.1.weight",) if config.stu_enable_mlp_sandwich else ("M_filters", "mixer.M")
        for name, p in self.named_parameters():
            if name.endswith(("c_proj.weight", "down_proj.weight", *last)):
                p.data *= (2 * config.n_layers) ** -0.5  # so many branches add up in the residual stream
        self.to(config.torch_dtype)

    def hidden(self, input_ids: Tensor, state=None, use_cache=False, attention_mask=None, trace=None):
        """Token ids [B, T] -> normalised output of the last layer [B, T, d] and, with use_cache, the state to
        go on from. attention_mask [B, past + T] is 0 at padding; `trace`: a list, for every layer's input."""
        if input_ids.ndim != 2 or 0 in input_ids.shape:
            raise ValueError(f"input_ids must be [batch >= 1, length >= 1], got {list(input_ids.shape)}")
        if state and len(state) != len(self.layers):
            raise ValueError(f"state is of a model with {len(state)} layers, this one has {len(self.layers)}")
        x, new_state = self.dropout(self.tok_emb(input_ids)), []
        for layer, s in zip(self.layers, state or [None] * len(self.layers)):
            if trace is not None:
                trace.append(x)
            if use_cache:
                x, s = layer(x, s, True, attention_mask)
                new_state.append(s)
            elif self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(layer, x, s, False, attention_mask, use_reentrant=False)
            else:
                x = layer(x, s, False, attention_mask)
        return self.norm(x), new_state if use_cache else None

    def head(self, x: Tensor) -> Tensor:
        return self.tok_emb(x)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, state=None, use_cache=False) -> Output:
        """input_ids [B, T] -> logits [B, T, vocab_size]. With labels [B, T] -> instead, the mean
        cross-entropy (nats) of predicting labels[:, t+1] at t: pass labels = input_ids, the shift is made
        here; -100 is ignored."""
        if labels is None:
            x, state = self.hidden(input_ids, state, use_cache)
            return Output(logits=self.head(x), state=state)
        if labels.shape != input_ids.shape or labels.shape[1] < 2:
            shapes = f"{list(labels.shape)} and {list(input_ids.shape)}"
            raise ValueError(f"labels must have the shape of input_ids and at least 2 tokens, got {shapes}")
        # the last token has no label: leave it out, so that seq_len + 1 tokens train seq_len positions
        x, state = self.hidden(input_ids if use_cache else input_ids[:, :-1], state, use_cache)
        x = x[:, : labels.shape[1] - 1]
        return Output(loss=self.loss(x.flatten(0, 1), labels[:, 1:].flatten()), state=state)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of x [N, d] against targets [N], over chunks of tokens: N x vocab_size logits never
        exist in one piece; a chunk's are made again in the backward pass."""

        def chunk_loss(x, targets):
            return F.cross_entropy(self.head(x).float(), targets, ignore_index=-100, reduction="sum")

        size = max(1, 2**26 // self.config.vocab_size)  # at most 2^26 logits at a time, 256 MB
        run = chunk_loss if len(x) <= size else functools.partial(checkpoint, chunk_loss, use_reentrant=False)
        total = sum(run(*chunk) for chunk in zip(x.split(size), targets.split(size)))
        return total / (targets != -100).sum().clamp(min=1)

    @torch.no_grad()
    def stream(
        self, input_ids: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
        top_p: float | None = None, stop_token: int | None = None, use_cache: bool = True, generator=None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """Yield the next token of every row, [B], one after another; temperature 0 is greedy. With use_cache
        each token costs the same however long the context; without, the whole sequence is computed again.
        Ends early when every row has produced stop_token (rows that have, repeat it)."""
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids must be [batch, length >= 1], got {list(input_ids.shape)}")
        fits = (top_k is None or top_k >= 1) and (top_p is None or 0 < top_p <= 1)
        if max_new_tokens < 0 or temperature < 0 or not fits:
            need = "max_new_tokens >= 0, temperature >= 0, top_k >= 1, 0 < top_p <= 1"
            raise ValueError(f"need {need}; got {max_new_tokens}, {temperature}, {top_k}, {top_p}")
        was_training, state, unread = self.training, None, input_ids
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        self.eval()
        try:
            for _ in range(max_new_tokens):
                # With a state, long prompts are read in pieces: memory does not grow with the prompt
                for piece in unread.split(self.config.seq_len, dim=1) if use_cache else [unread]:
                    x, state = self.hidden(piece, state, use_cache)
                token = sample(self.head(x[:, -1]).float(), temperature, top_k, top_p, generator)  # [B]
                if stop_token is not None:
                    token = token.masked_fill(done, stop_token)
                    done |= token == stop_token
                yield token
                if done.all():
                    return
                unread = token[:, None] if use_cache else torch.cat([unread, token[:, None]], dim=1)
        finally:
            self.train(was_training)

    def generate(
        self, input_ids: Tensor, max_length: int | None = None, max_new_tokens: int | None = None, **options
    ) -> Tensor:
        """Prompt [B, T] -> prompt and continuation, at most max_length tokens in all or max_new_tokens new
        ones. Options: see `stream`."""
        if (max_length is None) == (max_new_tokens is None):
            raise ValueError("give max_length (prompt included) or max_new_tokens, one of the two")
        if max_length is not None:
            max_new_tokens = max_length - input_ids.shape[-1]
            if max_new_tokens < 0:
                raise ValueError(f"max_length = {max_length} is below the prompt by {-max_new_tokens} tokens")
        new = [token[:, None] for token in self.stream(input_ids, max_new_tokens, **options)]
        return torch.cat([input_ids, *new], dim=1)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write model.safetensors, config.json and, for transformers (section 7), generation_config.json and
        a copy of this file. Each replaces its predecessor only when it is whole."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.detach().contiguous() for name, t in self.state_dict().items()}
        dtype = {"torch_dtype": str(self.tok_emb.weight.dtype).removeprefix("torch.")}  # after any .to(dtype)
        texts = {"config.json": json.dumps(self.config.to_dict() | HF_CONFIG | dtype, indent=2) + "\n"}
        texts["stu.py"] = Path(__file__).read_text(encoding="utf-8")
        if not (folder / "generation_config.json").exists():  # else it may know the end-of-text token
            texts["generation_config.json"] = "{}\n"
        _safetensors().save_file(tensors, folder / "model.safetensors.tmp", metadata={"format": "pt"})
        for name, text in texts.items():
            (folder / f"{name}.tmp").write_text(text, encoding="utf-8")
        for name in ("model.safetensors", *texts):
            os.replace(folder / f"{name}.tmp", folder / name)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, device: str | torch.device = "cpu") -> "FlashSTU":
        """Read what save_pretrained wrote, ours or that of transformers. Runs no code from the folder."""
        config, weights = Path(folder) / "config.json", Path(folder) / "model.safetensors"
        shards = [] if weights.is_file() else sorted(Path(folder).glob("model-*-of-*.safetensors"))
        for path in (*(shards or [weights]), config):
            if not path.is_file():
                raise FileNotFoundError(f"{path} does not exist: {folder} was not made by save_pretrained")
        load_file, tensors = _safetensors().load_file, {}
        try:  # whatever goes wrong, `path` is the file that is being read
            values = json.loads(path.read_text(encoding="utf-8"))
            dtype = {"torch_dtype": values.get("dtype", values.get("torch_dtype", "float32"))}
            known = {f.name for f in fields(FlashSTUConfig)}
            theirs = "transformers_version" in values  # they write fields of their own
            ours = {k: v for k, v in values.items() if k in known or not (theirs or k in HF_CONFIG)}
            model = cls(FlashSTUConfig(**(ours | dtype)))
            for path in shards or [weights]:
                tensors |= load_file(path)
            model.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items()})
        except Exception as e:  # noqa: BLE001
            raise ValueError(f"{path} is damaged, or of another model: {e}. Restore it from a copy") from None
        return model.to(device)


def _safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("saving and loading models needs safetensors: pip install safetensors") from None
    return safetensors.torch


def sample(logits: Tensor, temperature: float, top_k=None, top_p=None, generator=None) -> Tensor:
    """Logits [B, V] -> one token a row, [B]. top_p keeps the likeliest tokens that together reach top_p."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:
        probs, order = logits.softmax(-1).sort(-1, descending=True)
        beyond = probs.cumsum(-1) - probs >= top_p  # the likelier tokens already hold top_p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)


# ------------------------------------------------------------------------------------------------------------
# 7. Hugging Face: the same model as transformers wants to see it. Nothing above needs this; skip it freely
#
# A saved folder holds a copy of this file, and its config.json names these classes. They exist where
# transformers was imported first, as it is when it loads a folder; by hand: `import transformers, stu`.

if "transformers" in sys.modules:
    from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
    from transformers.utils import can_return_tuple

    OPTIONS = [f.name for f in fields(FlashSTUConfig) if f.name != "torch_dtype"]  # the dtype it keeps itself

    class FlashSTUPretrainedConfig(PretrainedConfig):
        model_type, _auto_class = HF_CONFIG["model_type"], "AutoConfig"
        attribute_map = {  # noqa: RUF012
            "hidden_size": "n_embd", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
            "max_position_embeddings": "seq_len",
        }  # fmt: skip

        def __init__(self, tie_word_embeddings=True, auto_map=HF_CONFIG["auto_map"], **options):
            options = {self.attribute_map.get(name, name): value for name, value in options.items()}
            ours = FlashSTUConfig(**{name: options.pop(name) for name in OPTIONS if name in options})
            options |= {name: getattr(ours, name) for name in OPTIONS}
            super().__init__(tie_word_embeddings=tie_word_embeddings, auto_map=auto_map, **options)

    @dataclass
    class FlashSTUCache:  # a call goes on from it and leaves it as it is: several texts can share a prefix
        state: list
        length: int  # tokens read, padding included
        is_compileable = is_croppable = False
        is_linear = (False,)  # generate, given all ids again, leaves out those that have been read
        get_seq_length = lambda self, layer_idx=0: self.length

        def reorder_cache(self, rows):  # beam search: row i goes on from row rows[i]
            self.state = tree_map_only(Tensor, lambda t: t.index_select(0, rows.to(t.device)), self.state)

        def crop(self, *_):
            raise ValueError("FlashSTU cannot take back a token: no assisted decoding, as model or assistant")

    class FlashSTUPreTrainedModel(PreTrainedModel):
        config_class, base_model_prefix = FlashSTUPretrainedConfig, "model"
        supports_gradient_checkpointing, _is_stateful = True, True  # stateful: it cannot take back a token
        _supports_default_dynamic_cache, _input_embed_layer = (lambda self: False), "tok_emb"
        _no_split_modules, _skip_keys_device_placement = ("FlashSTUBlock",), ("past_key_values", "cache")

        def _init_weights(self, module):  # weights that a checkpoint lacks, embeddings that a resize adds
            module.reset_parameters() if isinstance(module, STU) else super()._init_weights(module)

    def unpack(ids, position_ids):
        """Rows of documents, each from where position_ids start again -> a row for each document, padded on
        the right, so that none sees another; and what brings outputs back into rows [B, T, d]."""
        starts = F.pad(position_ids.diff(dim=1) != 1, (1, 0), value=True).expand_as(ids)
        starts = starts.flatten().nonzero().flatten()
        lengths = starts.diff(append=starts.new_tensor([ids.numel()])).tolist()
        rows = nn.utils.rnn.pad_sequence(ids.flatten().split(lengths), batch_first=True)
        return rows, lambda h: torch.cat([row[:n] for row, n in zip(h, lengths)]).unflatten(0, ids.shape)

    class FlashSTUModel(FlashSTUPreTrainedModel):
        _auto_class, hidden = "AutoModel", FlashSTU.hidden

        def __init__(self, config):
            super().__init__(config)
            ours = {name: getattr(config, name) for name in OPTIONS}
            model = FlashSTU(FlashSTUConfig(**ours, torch_dtype=torch.get_default_dtype()))
            self.gradient_checkpointing = model.gradient_checkpointing
            for name, child in model.named_children():
                self.add_module(name, child)
            for module in self.modules():  # the weights are there already, unless they are about to be loaded
                module._is_hf_initialized = not self.tok_emb.weight.is_meta
            self.post_init()

        @can_return_tuple
        def forward(
            self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
            use_cache=None, output_hidden_states=None, cache=None, inputs_embeds=None, output_attentions=None,
            seq_idx=None, cu_seq_lens_q=None, cu_seq_lens_k=None, max_length_q=None, max_length_k=None,
        ):  # fmt: skip
            if input_ids is None or inputs_embeds is not None or output_attentions:
                raise ValueError("FlashSTU takes input_ids, no inputs_embeds, and has no attention weights")
            past = past_key_values if cache is None else cache  # its name since transformers 5.24
            if not isinstance(past, FlashSTUCache | None):
                raise ValueError("past_key_values must be FlashSTU's own, or None at first")  # noqa: TRY004
            use_cache = past is not None if use_cache is None else use_cache
            state, seen = (past.state, past.length) if past else (None, 0)
            (B, T), rows, pack = input_ids.shape, input_ids, lambda h: h
            if attention_mask is not None:
                if (got := list(attention_mask.shape)) != [B, seen + T]:
                    raise ValueError(f"attention_mask must be {[B, seen + T]}, past and new, got {got}")
                # nobody sees padding on the right, unless the state goes on from there
                padding = attention_mask == 0 if use_cache else attention_mask.int().diff(dim=1) > 0
                attention_mask = attention_mask if padding.any() else None
            elif position_ids is not None and not use_cache:  # positions are relative: only new starts matter
                rows, pack = unpack(input_ids, position_ids)
            elif seq_idx is not None or cu_seq_lens_q is not None:
                raise ValueError("documents packed into rows want position_ids, and no cache")
            trace = [] if output_hidden_states or self.config.output_hidden_states else None
            x, state = self.hidden(rows, state, use_cache, attention_mask, trace)
            new = FlashSTUCache(state, seen + T) if use_cache else None
            return BaseModelOutputWithPast(pack(x), new, trace and tuple(map(pack, [*trace, x])))

    class FlashSTUForCausalLM(FlashSTUPreTrainedModel, GenerationMixin):
        _auto_class, _tied_weights_keys = "AutoModelForCausalLM", {"lm_head.weight": "model.tok_emb.weight"}

        def __init__(self, config):
            super().__init__(config)
            self.model = FlashSTUModel(config)
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
            self.post_init()

        def prepare_inputs_for_generation(self, ids, next_sequence_length=None, tokenizer=None, **kwargs):
            if next_sequence_length is not None and next_sequence_length < 1:  # so many ids are new
                raise ValueError("give all ids: those that past_key_values has read, and at least one more")
            return super().prepare_inputs_for_generation(ids, next_sequence_length, **kwargs)

        @can_return_tuple
        def forward(
            self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, labels=None,
            use_cache=None, output_hidden_states=None, logits_to_keep=0, shift_labels=None,
            num_items_in_batch=None, cache=None, **options,
        ):  # fmt: skip
            inputs = (input_ids, attention_mask, position_ids, past_key_values, use_cache)
            out = self.model(*inputs, output_hidden_states, cache, return_dict=True, **options)
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits, loss = self.lm_head(out.last_hidden_state[:, keep]), None  # x[:, -0:] is all of x
            if labels is not None or shift_labels is not None:
                counts = {"num_items_in_batch": num_items_in_batch, "shift_labels": shift_labels}
                loss = self.loss_function(logits, labels, logits.shape[-1], **counts)
            new = out.get("cache", out.get("past_key_values"))
            return CausalLMOutputWithPast(loss, logits, new, out.hidden_states)


# ------------------------------------------------------------------------------------------------------------
# 8. python stu.py: this file against the usual route, on this machine


def usual_stu(x, phi, M):
    """The paper's formula: two branches stacked, channels last, torch FFT. phi [T, K], M [2K, d(, d_out)]."""
    T, K = phi.shape
    n = 1 << (2 * T - 1).bit_length()
    sign = (-1.0) ** torch.arange(T, device=x.device)[:, None]
    x_f = torch.fft.rfft(torch.stack([x, x * sign], dim=-1), n=n, dim=1)  # [B, n/2 + 1, d, 2]
    if M.ndim == 2:
        h_f = torch.fft.rfft(torch.stack([phi @ M[:K], phi @ M[K:]], dim=-1), n=n, dim=0)  # [n/2 + 1, d, 2]
        plus, minus = torch.fft.irfft(x_f * h_f, n=n, dim=1)[:, :T].unbind(-1)
        return plus + sign * minus
    phi_f = torch.fft.rfft(phi, n=n, dim=0)  # [n/2 + 1, K]
    u = torch.fft.irfft(x_f[:, :, None] * phi_f[None, :, :, None, None], n=n, dim=1)[:, :T]  # [B, T, K, d, 2]
    plus, minus = (torch.tensordot(u[..., i], M[i * K : (i + 1) * K], dims=([2, 3], [0, 1])) for i in (0, 1))
    return plus + sign * minus


def timed(run, repeats=6):
    """Median seconds of run(), and what it returns; of several runs the first is a warm-up."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return np.median(times[1:] or times).item(), result


def peak_bytes(run):
    """The most memory that run() holds at once, beyond what was held before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with open(os.devnull) as nowhere, os.fdopen(os.dup(2)) as stderr:
        os.dup2(nowhere.fileno(), 2)  # the profiler logs its start and stop there
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as p:
            run()
        os.dup2(stderr.fileno(), 2)
    events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    return np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max()


def row(what, ours, usual, *notes):
    """A line of the table: what, the seconds of both routes, notes."""
    times = f"{ours * 1e3:>9.1f} ms {usual * 1e3:>9.1f} ms {usual / ours:>6.1f}x"
    print(f"{what:<44} {times}   {', '.join(notes)}", flush=True)


def benchmark_filters(L, K=24):
    """Against `eigh` of the Hankel matrix; the error is that of the worst filter, each scaled to norm 1."""
    import mpmath  # comes with torch

    ours, filters = timed(lambda: get_spectral_filters(L, K, dtype=torch.float64))
    eigh = lambda: torch.linalg.eigh(get_hankel(L)).eigenvectors[:, -K:].flip(1)
    usual, usual_filters = timed(eigh, 2 if L < 8192 else 1)
    unit = [phi / phi.norm(dim=0) * phi[0].sign() for phi in (filters, usual_filters)]
    notes = [f"differ by {(unit[0] - unit[1]).abs().max():.0e}"]
    if L == 64:
        with mpmath.workdps(50):
            Z = [[mpmath.mpf(2) / (n**3 - n) for n in range(i + 2, i + L + 2)] for i in range(L)]
            vectors = mpmath.eigsy(mpmath.matrix(Z))[1]
        exact = torch.tensor(vectors.tolist(), dtype=torch.float64).flip(1)[:, :K]
        notes = [f"{(phi - exact * exact[0].sign()).abs().max():.0e}" for phi in unit]
    row(f"{K} filters, L = {L}", ours, usual, *notes)


def benchmark_filtering(B, T, d, approx, device):
    """Forward and backward of a layer's convolution on the same weights; the error is relative to float64."""
    layer = STU(d, d, T, use_approx=approx).to(device)
    x, grad = torch.randn(2, B, T, d, device=device)
    x.requires_grad_()
    M, phi = (layer.M_filters if approx else layer.M), layer.filters[:, :24]
    exact = usual_stu(x[:1].detach().double(), phi.double(), M.detach().double())
    routes = (lambda: layer._convolve(x, M, x.dtype)), (lambda: usual_stu(x, phi, M))
    notes = [f"{((run()[:1] - exact).norm() / exact.norm()).item():.0e}" for run in routes]
    steps = [lambda run=run: torch.autograd.grad(run(), (x, M), grad) for run in routes]
    notes.append("peak memory {:.0f} and {:.0f} MiB".format(*(peak_bytes(step) / 2**20 for step in steps)))
    ours, usual = (timed(step)[0] for step in steps)
    n = fft_size(2 * T - 1)
    flops = (4 * B + 2) * 2.5 * d * n * math.log2(n)  # a real FFT of n points: 5/2 n log2 n; 4 of x, 2 of h
    if not approx:  # and the matrices of n/2 frequencies: made twice, and their gradient back to M
        flops += 3 * 2 * n * M.numel()
    moved = 4 * x.numel() * x.element_size()  # the least: input and output, and the gradient of each
    notes.append(f"{moved / ours / 1e9:.1f} GB/s of the least traffic, {flops / ours / 1e9:.0f} GFLOP/s")
    row(f"{'STU-T' if approx else 'full STU'} {(B, T, d)}, fwd + bwd", ours, usual, *notes)


def benchmark_training(B, T, device, dtype):
    """A training step: the hybrid, and attention in every layer at the same width and about the same size."""
    seconds, ids = [], torch.randint(8192, (B, T + 1), device=device)
    for name, options in ("hybrid", {}), ("attention only", {"use_stu": False, "mlp_scale": 3.5}):
        config = FlashSTUConfig(
            n_embd=384, n_layers=12, n_heads=6, seq_len=T, window_size=T // 4, vocab_size=8192, softcap=0.0,
            torch_dtype=dtype, **options,
        )  # fmt: skip
        model = FlashSTU(config).to(device)
        seconds.append(timed(lambda model=model: model(ids, labels=ids).loss.backward(), 4)[0])
        size = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"   {name}: {size:.1f}M parameters, {B * T / seconds[-1]:,.0f} tokens/s")
    row(f"training step, T = {T}, against attention only", *seconds)


def benchmark_generation(contexts, device, dtype):
    """One token from the state, against reading the context again -> seconds of both for each context."""
    config = FlashSTUConfig(
        n_embd=256, n_layers=4, n_heads=4, seq_len=2048, window_size=256, vocab_size=256, torch_dtype=dtype
    )
    model, seconds = FlashSTU(config).to(device), []
    for context in contexts:
        tokens = model.stream(torch.randint(256, (1, context), device=device), 33)
        reading, _ = timed(lambda tokens=tokens: next(tokens), 1)  # the first token is due after the context
        seconds.append((timed(lambda tokens=tokens: next(tokens), 32)[0], reading))
        row(f"next token at context {context}", *seconds[-1])
    return seconds


def draw(path, contexts, seconds, where):
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise SystemExit("drawing needs matplotlib: pip install matplotlib") from None
    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for times, label in zip(zip(*seconds), ("from the state", "reading the context again")):
        axis.loglog(contexts, np.array(times) * 1e3, marker="o", label=label)
    axis.set(xlabel="context (tokens)", ylabel="milliseconds per token", title=where)
    axis.grid(alpha=0.25), axis.legend(), figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description="Time this file against the usual route, 80 s on a CPU.")
    parser.add_argument("--full", action="store_true", help="with eigh at L = 8192, a minute more on a CPU")
    parser.add_argument("--draw", metavar="FILE", help="only draw the time per token against the context")
    args = parser.parse_args()
    if args.draw:
        open(args.draw, "ab").close()  # fails before the work, not after it
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    where = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}")
    print(f"\n{'':<44} {'this file':>12} {'usual route':>12} {'ratio':>7}   error: ours, usual")
    contexts = [512, 2048, 8192, 32768, 131072]
    if not args.draw:
        for L in (64, 2048, 8192) if args.full else (64, 2048):
            benchmark_filters(L)
        small, large = [(2, 4096, 512), (8, 512, 256)], [(8, 8192, 1024), (32, 2048, 768), (1, 65536, 1024)]
        for shape in large if cuda else small:
            benchmark_filtering(*shape, True, device)
        benchmark_filtering(8, 1024, 128, False, device)
        benchmark_training(16 if cuda else 2, 1024, device, dtype)
    seconds = benchmark_generation(contexts, device, dtype)
    if args.draw:
        draw(args.draw, contexts, seconds, where)


if __name__ == "__main__":
    main()
