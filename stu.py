"""
Flash STU in one file: spectral transform units and sliding-window attention, from filters to language model.

    from stu import STU    one layer, [B, T, d_in] -> [B, T, d_out]; needs torch and numpy, nothing else
    python test_stu.py     times this file against the usual route on your machine, with the errors of both

The idea. A linear dynamical system with state matrix eigenvalue α answers an impulse with 1, α, α², ... To
learn such systems without learning α, filter the input with the few signals that span all of these decays at
once: the top eigenvectors of the sum over α of their outer products, each weighted by (1-α)², which is a
fixed Hankel matrix. Only linear maps are learned; the memory (thousands of steps) is in the fixed filters.
Papers: "Spectral State Space Models" (arXiv 2312.06837), "Flash STU" (2409.10489), "SpectraLDS" (2505.17868).

The letters, everywhere in this file:
    B batch    T length of this input    L seq_len, the length of the filters    d, d_in, d_out channels
    K  number of eigenvectors φ_1..φ_K of the Hankel matrix Z (`num_eigh`), each a signal of length L
    Φ  the filter bank [L, F]: F = 2K filters φ_k(t), (-1)^t φ_k(t); Hankel-L has both signs inside: F = K
    M  what is learned, [F, d_in, d_out]: the matrix M_f takes the output of filter f to the layer's output;
       in STU-T  M_f = M_inputs · diag(M_filters[f])
    A, b, C  the same bank as a linear dynamical system with n states: Φ[t, f] = C_f A^t b
    S  the state of that system, [B, n, d]: everything that an STU layer remembers of its past
    w  attention window: a token sees itself and the w tokens before it; [B, H, T, hd] are H heads of size hd
F is also torch.nn.functional, as everywhere.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass, fields
from functools import lru_cache, partial
from math import ceil, inf, log, log2
from numbers import Integral, Real
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, arange, cat, einsum, nn
from torch.fft import irfft, rfft
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


def on_cuda(t):  # the one switch to the CUDA libraries, so that a test can throw it on a CPU
    return t.is_cuda


# ------------------------------------------------------------------------------------------------------------
# 1. The filters: eigenvectors of a Hankel matrix that is never built
#
# Z_ij = 2 / ((i+j)^3 - (i+j)) = ∫_0^1 (1-α)² α^(i+j-2) dα, i, j = 1..L, is a sum over decays α of rank-one
# terms; Hankel-L is that over decays of both signs, Z_ij = ∫_-1^1 (1-α²)² α^(i+j-2) dα (2312.06837, appendix).
# Substitute α = exp(-e^x), and the trapezoid rule over x converges exponentially: Z = G Gᵀ with one column of
# G for each decay, G[t, m] = √w_m (1-α_m) α_m^t. The left singular vectors of G are the eigenvectors of Z.
# This matters: the eigenvalues of Z fall below 1e-16 of the largest after 16 filters (L = 40) to 20 (128),
# where `eigh(Z)` returns noise. The singular values of G are their square roots, and fall half as fast: a
# filter of norm 1 is right to 1e-5 for K up to 24 at L = 40, up to 27 at L = 64. Later ones are noise too.


def get_spectral_filters(seq_len, K, use_hankel_L=False, device=None, dtype=torch.float32):
    """The top K eigenvectors of Z, leading one first, each times (its eigenvalue)^¼ (the papers' scale):
    [seq_len, K]. Computed in float64 from G, in O(seq_len) memory: 4 GB at 2^20."""
    c = FlashSTUConfig(
        seq_len=seq_len, num_eigh=K, use_hankel_L=use_hankel_L
    )  # says what is wrong with these
    L, K, step = c.seq_len, c.num_eigh, 2 if c.use_hankel_L else 1
    # -ln α = e^x at nodes x. The slowest: over L steps nothing of α^t is lost (1 - e^-12), or so near to 1
    # that (1-α)² w, of order (e^-21)³, is nothing in float64
    rate = np.exp(np.arange(3.8, max(-12 - log(L), -21), -0.1))  # [m]
    w = 0.1 * rate * np.exp(-rate)  # |dα| = e^x α dx, in steps dx = 0.1
    weight = -np.expm1(-step * rate) * np.sqrt(step * w)  # √w (1-α); Hankel-L, a column for ±α: √(2w) (1-α²)
    found = []  # (eigenvalue^½, filter)
    for first in range(min(step, L)):  # Hankel-L: a filter lives on the even lags or on the odd ones
        lags = np.arange(first, L, step)
        Q, R = torch.linalg.qr(torch.from_numpy(np.exp(-lags[:, None] * rate) * weight))  # of G, O(L m²)
        U, sigma, _ = torch.linalg.svd(R)  # [m, m]: G = (Q U) diag(σ) Vᵀ
        phi = torch.zeros(L, len(sigma[:K])).to(Q)
        phi[lags] = Q @ U[:, :K] * sigma[:K].sqrt()  # √σ = λ^¼
        found += zip(sigma, (phi * phi[first].sign()).T)  # positive at the first lag
    found = sorted(found, key=lambda pair: -pair[0])[:K]
    if len(found) < K or not dtype.is_floating_point:
        raise ValueError(f"length {L} has {len(found)} filters, of floating-point dtype; got {K = }, {dtype}")
    return torch.stack([phi for _, phi in found], dim=1).to(device=device, dtype=dtype)


def both_signs(phi):
    """φ [L, K] -> the bank Φ = [φ, (-1)^t φ], [L, 2K]."""
    return cat([phi, (-1.0) ** arange(len(phi), device=phi.device)[:, None] * phi], dim=1)


def stu_formula(x, phi, M):
    """The layer as the papers define it (2312.06837, section 2; 2409.10489, equation 1), slow and obvious.

    x [B, T, d_in], filters phi [>= T, K], M [2K, d_in, d_out] = M⁺_1..M⁺_K, M⁻_1..M⁻_K -> y [B, T, d_out]:
        y_t = Σ_k M⁺_k U⁺_tk + M⁻_k U⁻_tk,  U⁺_tk = Σ_i φ_k(i) x_{t-i},  U⁻_tk = Σ_i (-1)^i φ_k(i) x_{t-i}
    All that follows computes the same, faster. Hankel-L has no second branch: give M [K, d_in, d_out]."""
    bank, y = both_signs(phi)[:, : len(M)], []  # [L, F]
    for t in range(x.shape[1]):
        past = x[:, : t + 1].flip(1)  # x_t, x_{t-1}, ..., x_0: [B, t + 1, d_in]
        U = einsum("if,bid->bfd", bank[: t + 1], past)
        y.append(einsum("bfd,fdo->bo", U, M))
    return torch.stack(y, dim=1)


# ------------------------------------------------------------------------------------------------------------
# 2. The same as a convolution: FFT over the whole sequence, for training
#
# y_t = Σ_i h_i u_{t-i} for t < T needs an FFT of at least 2T - 1 points, or its end wraps around.


def fft_size(n):
    """The smallest 2^a, 3·2^a, 5·2^a, 9·2^a or 15·2^a that is >= n: the lengths on which FFTs are fast."""
    return min(m << max(0, ceil(log2(n / m))) for m in (1, 3, 5, 9, 15))


class Spectrum(torch.autograd.Function):
    """u [..., T] -> its spectrum at n points, conjugated. As torch.fft.rfft, without keeping u padded."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u, n):
        return rfft(u, n=n).conj_physical_()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.T, ctx.n = inputs[0].shape[-1], inputs[1]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad):
        if grad is None:  # as always in a first backward
            return None, None
        return torch.fft.ifft(grad.conj(), n=ctx.n, norm="forward").real[..., : ctx.T], None


class FFTConv(torch.autograd.Function):
    """u [B, d, T], h [d, <= T] -> y [B, d, T], y_f = u_f · h_f; the spectra at n points are given conjugated.

    PyTorch's derivative of rfft is a complex FFT; the backward here is one rfft and two irffts. The spectra
    are arguments, so that the derivative of this derivative (of any order) finds its way through them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u, h, u_conj, h_conj, n):
        return irfft((u_conj * h_conj).conj_physical_(), n=n)[..., : u.shape[-1]]

    @staticmethod
    def setup_context(ctx, inputs, output):
        u, h, u_conj, h_conj, n = inputs
        ctx.sizes = u.shape[-1], h.shape[-1], n
        ctx.save_for_backward(u_conj, h_conj)

    @staticmethod
    def backward(ctx, grad):
        (u_conj, h_conj), (T, T_h, n) = ctx.saved_tensors, ctx.sizes
        grad_f = rfft(grad, n=n)
        grad_u = irfft(grad_f * h_conj, n=n)[..., :T]
        grad_h = irfft((grad_f * u_conj).sum(0), n=n)[..., :T_h]
        return grad_u, grad_h, None, None, None


def fft_conv(u, h, tile):
    """Causal convolution of each channel: u [B, d, T], h [d, <= T] -> [B, d, T]; at most `tile` channels at a
    time, and so few that the CPU's cache holds their spectra: up to 1.7 times faster."""
    n, y = fft_size(u.shape[2] + h.shape[1] - 1), []
    tile = max(1, min(tile, (2**24 if u.is_cuda else 2**20) // (len(u) * n)))
    for u_i, h_i in zip(u.split(tile, dim=1), h.split(tile)):
        spectra = (Spectrum.apply(t, n) for t in (u_i, h_i))
        y.append(FFTConv.apply(u_i, h_i, *spectra, n))
    return cat(y, dim=1)


# ------------------------------------------------------------------------------------------------------------
# 3. The STU layer
#
# By the formula above both branches are one sum over the bank Φ = [φ, (-1)^t φ]:  y = Σ_f (Φ_f * x) M_f.
# STU-T:  M_f = M_inputs · diag(M_filters[f]), hence y = (x M_inputs) * (Φ M_filters): one filter a channel.
# Each branch has its own rows of M_filters: with shared rows the kernel would be ∝ 1 + (-1)^t, blind to odd
# lags.


class STU(nn.Module):
    """Spectral transform unit: [B, T, d_in] -> [B, T, d_out] for any T >= 1, causal. seq_len: filter length.

    `options` are the fields of FlashSTUConfig that concern it: use_approx=True is STU-T (one filter per
    channel), False the full STU. precomputed_filters: base filters of your own [seq_len, K], or a FilterBank.
    stu(x) -> y;  stu(x, state, use_cache=True) -> (y, state): the input may arrive in pieces of any size,
    with state=None first. The state holds S [B, n, d_out] (full STU: d_in), or the last seq_len inputs where
    no recurrence fits. A call without a state and with T <= seq_len takes the route `backend`, "fft" (a
    convolution), "lds" (a recurrence over chunks) or "auto" (the faster one); all others recur.
    attention_mask [B, >= T] is 0 where an input is padding, its last column is for the last input."""

    def __init__(self, d_in, d_out, seq_len=None, num_eigh=24, *, precomputed_filters=None, backend="auto",
                 config=None, **options):  # fmt: skip
        super().__init__()
        self.d_in, self.d_out, self.backend = (
            setting("d_in", d_in, int),
            setting("d_out", d_out, int),
            backend,
        )
        options |= {"seq_len": seq_len, "num_eigh": num_eigh, "use_attn": False}
        self.config = c = config or FlashSTUConfig(**options)
        self.bank = make_bank(c, precomputed_filters)
        L, n_filters = self.bank.filters.shape
        if L != c.seq_len or backend not in ("auto", "fft", "lds"):
            needed = f'filters of length seq_len = {c.seq_len} and backend "auto", "fft" or "lds"'
            raise ValueError(f"need {needed}, got length {L} and {backend!r}")
        if c.use_approx:
            self.M_inputs = nn.Parameter(torch.empty(d_in, d_out))
            self.M_filters = nn.Parameter(torch.empty(n_filters, d_out))
        else:
            self.M = nn.Parameter(torch.empty(n_filters, d_in, d_out))
        self.reset_parameters()

    def reset_parameters(self):
        """White input of unit variance gives output of about unit variance, whatever the filters' scales."""
        gain = self.bank.filters.norm().item()  # √ Σ_f |Φ_f|²
        if self.config.use_approx:
            nn.init.normal_(self.M_inputs, std=self.d_in**-0.5)
            nn.init.normal_(self.M_filters, std=1 / gain)
        else:
            nn.init.normal_(self.M, std=self.d_in**-0.5 / gain)

    def extra_repr(self):
        kind, (L, n_filters) = "STU-T" if self.config.use_approx else "full STU", self.bank.filters.shape
        return f"{kind}, {self.d_in} -> {self.d_out}, {n_filters} filters of length {L}"

    def forward(self, x, state=None, use_cache=False, attention_mask=None):
        x = check_input(self, x, self.d_in, state, attention_mask)
        c, T, S = self.config, x.shape[1], state.tensors[0] if state else None
        u, M = (x @ self.M_inputs, self.M_filters) if c.use_approx else (x, self.M)
        filters, lds = self.bank.on(u)
        # Operations for a weight of the full STU: 2 d_out by FFT, whatever B; B (n + chunk + d_out) by
        # recurrence, at 2 to 3 times the speed
        few = self.backend == "auto" and not c.use_approx and 64 * len(x) <= self.d_out
        with torch.autocast("cpu" if u.is_meta else u.device.type, enabled=False):
            u, M = u.to(filters.dtype), M.to(filters.dtype)  # at least float32 (on CUDA in TF32, if allowed)
            if lds is None:
                u = u if S is None else cat([S, u], dim=1)
                y, S = self.convolve(u, filters, M, x.dtype)[:, -T:], u[:, -c.seq_len :].clone()
            elif few or self.backend == "lds" or state or use_cache or T > c.seq_len:
                y, S = recur(u, S, lds, M)
            else:
                y = self.convolve(u, filters, M, x.dtype)
        return (y.to(x.dtype), LayerState((S,), self.extra_repr())) if use_cache else y.to(x.dtype)

    def convolve(self, u, filters, M, dtype):
        """Σ_f (Φ_f * u) M_f, with M [F, d] for STU-T; dtype is that of the layer's input."""
        c, filters, tile = self.config, filters[: u.shape[1]], self.config.d_out_tile or self.d_out  # [T, F]
        if len(u) == 0:  # FFTs refuse an empty batch
            return u @ u.new_zeros(u.shape[2], self.d_out)
        if not c.use_approx:
            return full_conv(u, filters, M, tile * (c.d_in_tile or self.d_in))
        u, h = u.transpose(1, 2), M.T @ filters.T  # [B, d, T], [d, <= T]
        flash = c.use_flash_fft and FlashFFTConv is not None and on_cuda(u) and dtype in HALF
        return (flash_fft_conv(u.to(dtype), h) if flash else fft_conv(u, h, tile)).transpose(1, 2)


# ------------------------------------------------------------------------------------------------------------
# 4. The same filters as a linear dynamical system, for input in pieces and past seq_len
#
# Every filter is a mixture of decays, so a bank of them is the impulse response of one system with poles ±α:
#     S_t = A S_{t-1} + b u_t,   y_t = C S_t,   that is   Φ[t] = C A^t b.
# With the textbooks' diagonal A the states of slow poles are large, nearly equal, and cancel in y: in float32
# the weakest filters are lost. We keep the poles and take orthonormal coordinates (the Takenaka-Malmquist
# basis): a chain of all-pass sections, one for each pole p. Section i holds one number S_i of the state; a
# signal v_i enters it and v_{i+1} leaves for the next section, the first being the input u:
#     S_i ← p_i S_i + g_i v_i,     v_{i+1} = g_i S_i - p_i v_i     (the old S_i in both), g_i = √(1-p_i²).
# Unrolled over the sections, with P_i = Π_{j<i} (-p_j):  A_ij = g_i P_i · g_j / P_{j+1} for j < i,  A_ii = p_i,
# b_i = g_i P_i. The n states answer an impulse with signals ψ(t) = A^t b that are orthonormal on t = 0..∞, so
# |C_f| is the norm of filter f over all t, never large, and a float32 state reproduces the layer's
# convolution to 1e-6. Σ_t ψ(t) ψ(t)ᵀ is I, its part from lag L on A^L A^Lᵀ, the part before it I - A^L A^Lᵀ.
# So the least-squares fit of the filters on t < L, with a penalty `fade`² on the energy past L (where the
# filters are undefined, and their natural continuation grows), is one small linear solve.


class FilterBank:
    """A bank Φ [L, F] and its form as a recurrence (section 4), None where none fits: one object for all the
    layers that use it. Kept in float64 on the CPU, never changed; `on` hands out copies."""

    def __init__(self, filters, **fit):
        self.filters, self.copies = filters.detach().double().cpu(), {}
        self.lds = fit_recurrence(self.filters, **fit)

    def __getstate__(self):  # for copy.deepcopy and pickle
        return self.__dict__ | {"copies": {}}

    def on(self, u):
        """Filters and recurrence for an input u. Never below float32: poles near 1 would coincide."""
        key = u.device, torch.promote_types(u.dtype, torch.float32)
        if key in self.copies:
            return self.copies[key]
        with torch.inference_mode(False):  # wherever this is called first, one can train afterwards
            copy = self.filters.to(*key), self.lds and SpectralLDS(*(t.to(*key) for t in self.lds))
        if type(copy[0]) is Tensor:  # not a fake one, of torch.compile or of a dry run
            self.copies[key] = copy
        return copy


@lru_cache(maxsize=32)
def standard_bank(seq_len, K, use_hankel_L, use_tensorized):
    make = get_tensorized_spectral_filters if use_tensorized else get_spectral_filters
    with torch.inference_mode(False), torch.device("cpu"):
        phi = make(seq_len, K, use_hankel_L, dtype=torch.float64)
        return FilterBank(phi if use_hankel_L else both_signs(phi))


def make_bank(c, phi):
    if phi is None:
        return standard_bank(c.seq_len, c.num_eigh, c.use_hankel_L, c.use_tensorized)
    return phi if isinstance(phi, FilterBank) else FilterBank(phi if c.use_hankel_L else both_signs(phi))


class LayerState(NamedTuple):
    """What a layer remembers between two pieces of a sequence."""

    tensors: tuple  # [B, ...] each
    layer: str  # its description: no other layer takes this state
    seen: int = 0  # attention: inputs so far, padding included


class SpectralLDS(NamedTuple):
    powers: Tensor  # A^0 .. A^chunk: [chunk + 1, n, n]
    b: Tensor  # [n]
    C: Tensor  # [F, n]


def fit_recurrence(filters, n_pairs=0, chunk=64, fade=1e-5, tolerance=1e-6):
    """The system (A, b, C) of n = 2 n_pairs states that answers an impulse with `filters` [L, F], then fades;
    None where it is wrong by more than `tolerance`, relative to the largest value, or does not fade (5% of
    the norm at a tolerance of 1e-6), as for Kronecker products. diag(A) are the poles.

    0 pairs: as many as fit spectral filters of any K to 1e-7 (tried: 128 at L = 8192, 48 at 2^19)."""
    phi, L = filters.numpy(), len(filters)
    n_pairs = n_pairs or max(56, round(5 * log(8 * L)))
    decay = np.exp(-np.exp(np.linspace(-log(L), log(8), n_pairs)))  # memories: L to 1/8 steps
    p = np.stack([decay, -decay], axis=1).ravel()
    g, P = np.sqrt((1 - p) * (1 + p)), np.cumprod([1, *-p])
    A, b = np.diag(p) + np.tril(np.outer(g * P[:-1], g / P[1:]), -1), g * P[:-1]
    powers = np.stack([np.linalg.matrix_power(A, i) for i in range(chunk + 1)])
    psi = [powers[:-1] @ b]  # [chunk, n]: ψ(t) = A^t b, and then ψ(t + chunk) = A^chunk ψ(t)
    while len(psi) * chunk < L:
        psi.append(psi[-1] @ powers[-1].T)
    psi, A_L = np.concatenate(psi)[:L], np.linalg.matrix_power(A, L)  # [L, n], [n, n]
    C = np.linalg.solve(np.eye(len(A)) - (1 - fade**2) * A_L @ A_L.T, psi.T @ phi).T
    error = np.abs(psi @ C.T - phi).max() / np.abs(phi).max()
    past_L = np.linalg.norm(C @ A_L, axis=1).max() / np.linalg.norm(phi, axis=0).max()
    if max(error, 2e-5 * past_L) <= tolerance:
        return SpectralLDS(*map(torch.from_numpy, (powers, b, C)))


def recur(u, S, lds, M):
    """Σ_f (Φ_f * u) M_f as a recurrence over chunks, from state S (None: zero).

    u [B, T, d], S [B, n, d] -> y [B, T, d_out], S after the last input. With M [F, d] (STU-T) channel c is
    filtered by Σ_f M[f, c] Φ_f and d_out = d; with M [F, d, d_out] (full STU) every filter output has its own
    matrix."""
    (powers, b, C), T = lds, u.shape[1]
    size = min(T, len(powers) - 1)  # of a chunk
    psi = powers[:size] @ b  # [size, n], ψ(t) = A^t b
    S = u.new_zeros(len(u), len(b), u.shape[2]) if S is None else S
    chunks = []  # of each, its inputs (zeros after the last) and the state S before it: [B, size + n, d]
    for piece in u.split(size, dim=1):
        r = piece.shape[1]
        chunks.append(cat([F.pad(piece, (0, 0, 0, size - r)), S], dim=1))
        S = powers[r] @ S + psi[:r].flip(0).T @ piece  # A^r S + Σ_i A^(r-1-i) b u_i: [n, r] @ [B, r, d]
    # Within a chunk y_t = Σ_{i<=t} C A^(t-i) b u_i + C A^(t+1) S: one matrix for inputs and state
    t = arange(size, device=u.device)
    lag = t[:, None] - t
    toeplitz = (C @ psi.T)[:, lag.clamp(min=0)] * (lag >= 0)  # [F, t, i]
    to_filters = cat([toeplitz.transpose(0, 1), C @ powers[1 : size + 1]], dim=2)  # [t, F, size + n]
    if M.ndim == 2:  # all chunks at once: [chunks, B, size, d]
        to_outputs = einsum("tfi,fd->tid", to_filters, M)
        y = einsum("tid,cbid->cbtd", to_outputs, torch.stack(chunks)).unbind()
    else:  # one by one, for the filter outputs of a chunk are large: [B, size, F·d] @ [F·d, d_out]
        mix = lambda v: einsum("tfi,bid->btfd", to_filters, v).flatten(2) @ M.flatten(0, 1)
        y = piece_by_piece(mix, chunks)
    return cat(y, dim=1)[:, :T], S


# ------------------------------------------------------------------------------------------------------------
# 5. Sliding-window attention
#
# Query i sees keys i-w..i. Two routes, one result: flash-attn where installed (16-bit on CUDA), else tiles of
# queries that look only at the keys they can see.


def rotary(x, start):
    """Rotate channels (i, i + hd/2) of x [B, H, T, hd] by angles proportional to the position start + t."""
    half = x.shape[-1] // 2
    exact = torch.float32 if x.device.type == "mps" else torch.float64  # float32 drifts past 10^5 tokens
    rate = 10000.0 ** (-arange(half, device=x.device, dtype=exact) / half)
    angle = arange(start, start + x.shape[2], device=x.device)[:, None] * rate  # [T, hd/2]
    cos, sin = (t.to(torch.promote_types(x.dtype, torch.float32)) for t in (angle.cos(), angle.sin()))
    x1, x2 = x.split(half, dim=-1)
    return cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1)


def windowed_attention(q, k, v, window, softcap=0.0, attention_mask=None, tile=128):
    """q [B, H, T, hd]; k, v [B, H, past + T, hd]: query i sees key past + i and the `window` keys before it.

    Logits q·k/√hd pass through softcap·tanh(·/softcap) if softcap > 0. attention_mask [B, past + T] is False
    at padding: such a key is seen by its own query only (a softmax over nothing is NaN). O(T·w) in time, and
    backward too: k and v are cut into tiles once, for the gradient of a slice is as long as what it is of."""
    q_tiles, y = q.split(tile, dim=2), []
    cuts = [k.shape[2] - q.shape[2], *(q_i.shape[2] for q_i in q_tiles)]  # the past, then as the queries
    k_tiles, v_tiles = k.split(cuts, dim=2), v.split(cuts, dim=2)
    if attention_mask is not None:
        mask_tiles = attention_mask[:, None, None].split(cuts, dim=3)
    for i, q_i in enumerate(q_tiles):
        near = slice(max(0, i + 1 - ceil(window / tile)), i + 2)  # the tiles that it can see
        k_i, v_i = cat(k_tiles[near], dim=2), cat(v_tiles[near], dim=2)
        T, keys = q_i.shape[2], k_i.shape[2]
        causal = torch.ones(T, keys, dtype=torch.bool, device=q.device).tril(keys - T)
        visible = causal.triu(keys - T - window)
        if attention_mask is not None:  # [B, 1, T, keys]
            visible = visible & cat(mask_tiles[near], dim=3) | causal.triu(keys - T)
        if softcap:
            logits = softcap * torch.tanh(q_i @ k_i.transpose(-1, -2) * (q.shape[-1] ** -0.5 / softcap))
            logits = logits.masked_fill(~visible, -torch.inf)
            y.append(logits.softmax(-1) @ v_i)
        else:
            y.append(F.scaled_dot_product_attention(q_i, k_i, v_i, attn_mask=visible))
    return cat(y, dim=2)


class SlidingWindowAttention(nn.Module):
    """Causal multi-head attention over the last `window_size` tokens and oneself, [B, T, d] -> [B, T, d].

    Rotary positions, RMS-normalised q and k. attn(x, state, use_cache=True) -> (y, state); the state holds k
    and v [B, H, <= w, hd] of the last w tokens. attention_mask [B, >= keys] is 0 at padding, its last column
    is for the last key. Positions count padding too: they are relative, so a shift changes nothing."""

    def __init__(self, d_model=None, n_heads=None, window_size=1024, softcap=50.0, bias=False, config=None):
        super().__init__()
        options = {"window_size": window_size, "softcap": softcap, "bias": bias}
        self.config = c = config or FlashSTUConfig(n_embd=d_model, n_heads=n_heads, **options)
        self.c_attn = nn.Linear(c.n_embd, 3 * c.n_embd, c.bias)
        self.c_proj = nn.Linear(c.n_embd, c.n_embd, c.bias)
        self.q_norm, self.k_norm = (nn.RMSNorm(c.n_embd // c.n_heads, eps=1e-6) for _ in "qk")

    def extra_repr(self):
        return f"{self.config.n_embd} channels, {self.config.n_heads} heads, window {self.config.window_size}"

    def forward(self, x, state=None, use_cache=False, attention_mask=None):
        c, w, seen = self.config, self.config.window_size, state.seen if state else 0
        x = check_input(self, x, c.n_embd, state, attention_mask)
        q, k, v = self.c_attn(x).unflatten(-1, (3, c.n_heads, -1)).unbind(2)  # [B, T, H, hd]
        q, k, v = (t.transpose(1, 2) for t in (self.q_norm(q), self.k_norm(k), v))  # [B, H, T, hd]
        q, k = rotary(q, seen).to(v.dtype), rotary(k, seen).to(v.dtype)
        if state:
            k, v = (cat(pair, dim=2) for pair in zip(state.tensors, (k, v)))
        if attention_mask is not None:
            attention_mask = check_mask(attention_mask, len(x), k.shape[2])[:, -k.shape[2] :]
        if flash_attn_func is not None and on_cuda(q) and q.dtype in HALF and attention_mask is None:
            q_k_v = (t.transpose(1, 2) for t in (q, k, v))  # it wants [B, T, H, hd]
            y = flash_attn_func(*q_k_v, causal=True, window_size=(w, 0), softcap=c.softcap)
        else:
            y = windowed_attention(q, k, v, w, c.softcap, attention_mask).transpose(1, 2)
        y = self.c_proj(y.flatten(2))
        if not use_cache:
            return y
        last = tuple(t[:, :, max(0, t.shape[2] - w) :].clone() for t in (k, v))  # let go of the rest
        return y, LayerState(last, self.extra_repr(), seen + x.shape[1])


# ------------------------------------------------------------------------------------------------------------
# 6. Variants: the full STU as a convolution, Kronecker filters, FlashFFTConv


def piece_by_piece(function, *tensors):
    """[function(a_i, b_i, ...) for the pieces a_i, b_i, ... of `tensors`]; where there are several, each is
    computed again in the backward pass, so that what it makes on the way exists for one piece at a time."""
    if len(tensors[0]) > 1 and torch.is_grad_enabled():
        function = partial(checkpoint, function, use_reentrant=False)
    return [function(*pieces) for pieces in zip(*tensors)]


def full_conv(x, filters, M, tile):
    """Σ_f (Φ_f * x) M_f for x [B, T, d_in], filters [<= T, F], M [F, d_in, d_out] -> [B, T, d_out].

    At each frequency ω the layer is one small matrix Σ_f Φ_f(ω) M_f, so the filter outputs [B, T, F, d_in]
    are never formed. Of these matrices 64 are made at a time, or 64 · tile / (d_in · d_out)."""

    def mix(x_f, filters_f):  # [band, B, d_in], [2, band, F] -> [band, B, d_out]
        matrices = torch.complex(*(filters_f @ M.flatten(1)))  # M is real: real and imaginary part apart
        return x_f @ matrices.unflatten(1, M.shape[1:])

    n, band = fft_size(x.shape[1] + len(filters) - 1), max(1, 64 * tile // M[0].numel())
    x_f = rfft(x, n=n, dim=1).transpose(0, 1)  # [n/2 + 1, B, d_in]
    filters_f = torch.view_as_real(rfft(filters, n=n, dim=0)).movedim(2, 0)  # [2, n/2 + 1, F]
    y_f = cat(piece_by_piece(mix, x_f.split(band), filters_f.split(band, dim=1)))
    return irfft(y_f.transpose(0, 1), n=n, dim=1)[:, : x.shape[1]]


def get_tensorized_spectral_filters(n, k, use_hankel_L=False, device=None, dtype=torch.float32):
    """Kronecker products φ_i ⊗ φ_j of k' = min(k, side) filters of length side = ⌈√(n-2)⌉ (as published:
    rows past side² are zero): [n, k'^2]."""
    side = max(1, ceil(max(n - 2, 0) ** 0.5))
    small = get_spectral_filters(side, min(k, side), use_hankel_L, device, torch.float64)
    bank = torch.kron(small, small)[:n]  # [min(side², n), k'²]
    return F.pad(bank, (0, 0, 0, n - len(bank))).to(dtype)


@lru_cache(maxsize=16)
def flash_fft(n, dtype, device):  # not kept in a layer: its buffers would enter the state_dict
    return FlashFFTConv(n, dtype=dtype).to(device)


def flash_fft_conv(u, h):
    """fft_conv by FlashFFTConv for u in 16 bits: n points, a power of two >= 256."""
    T, n = u.shape[2], 2 ** max(8, (2 * u.shape[2] - 1).bit_length())
    u, h = (F.pad(t, (0, n // 2 - t.shape[-1])).contiguous() for t in (u, h))
    return flash_fft(n, u.dtype, u.device)(u, h)[..., :T]


# ------------------------------------------------------------------------------------------------------------
# 7. Settings, and the doors at which what is given is checked


SETTINGS = {  # annotation -> what may be given for it, the least value, how that is called
    bool: ((bool, np.bool_), False, "True or False"),
    int: (Integral, 1, "a positive integer"),
    float: (Real, 0, "a finite number >= 0"),
}


def setting(name, value, annotation):
    """The one door: a bool, int or float as exactly that (numpy's numbers too), or None where it may be."""
    kind, *none = get_args(annotation) or [annotation]
    if kind not in SETTINGS or (none and value is None):
        return value
    types, least, wanted = SETTINGS[kind]
    number = isinstance(value, types) and (kind is bool or not isinstance(value, bool))
    if not number or not least <= value < inf:
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    return kind(value)


@dataclass
class FlashSTUConfig:
    n_embd: int = 1536  # width d
    n_layers: int = 26  # even layers are STU, odd layers attention
    n_heads: int = 8  # of the attention layers
    seq_len: int = 8192  # length of the filters; longer inputs are legal, the filters fade out past it
    window_size: tuple[int, int] | int = 1024  # w, or flash-attn's (w, 0), kept as w
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
        for f in fields(self):
            setattr(self, f.name, setting(f.name, getattr(self, f.name), f.type))
        dtype = getattr(torch, str(self.torch_dtype).removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"torch_dtype must be a floating-point dtype, got {self.torch_dtype!r}")
        w, *right = self.window_size if isinstance(self.window_size, (tuple, list)) else (self.window_size, 0)
        if right != [0] or not isinstance(w, Integral) or isinstance(w, bool) or w < 0:
            raise ValueError(
                f"window_size must be w >= 0 or (w, 0), w tokens before: got {self.window_size!r}"
            )
        if self.use_attn and self.n_embd % (2 * self.n_heads):
            raise ValueError(
                f"n_heads = {self.n_heads} does not divide {self.n_embd} into heads of even width"
            )
        if not (self.use_stu or self.use_attn) or self.dropout >= 1:
            raise ValueError(
                "use_stu and use_attn are both False, no layer is left; or dropout is not below 1"
            )
        self.torch_dtype, self.window_size = dtype, int(w)

    def to_dict(self):
        return asdict(self) | {"torch_dtype": str(self.torch_dtype).removeprefix("torch.")}


def check_mask(mask, B, T):
    """attention_mask [B, >= T], 1 at tokens and 0 at padding -> True and False."""
    right = mask.ndim == 2 and len(mask) == B and mask.shape[1] >= T
    if not right or not (mask.dtype == torch.bool or ((mask == 0) | (mask == 1)).all()):
        got = f"{mask.dtype} {list(mask.shape)}"
        raise ValueError(f"attention_mask must be [{B}, at least {T}], 1 at tokens, 0 at padding, got {got}")
    return mask.bool()


def check_input(layer, x, width, state, mask):
    """The door of both kinds of layers: x [B, T, width] -> x, zero at padding whatever stood there."""
    if x.ndim != 3 or x.shape[1] < 1 or x.shape[2] != width or not x.is_floating_point():
        got = f"{x.dtype} {list(x.shape)}"
        raise ValueError(f"input must be floating-point [batch, length >= 1, {width} channels], got {got}")
    if state and (state.layer != layer.extra_repr() or len(state.tensors[0]) != len(x)):
        whose = f"{len(state.tensors[0])} sequences in a layer ({state.layer})"
        raise ValueError(f"the state of {whose} does not fit {len(x)} in one ({layer.extra_repr()})")
    return x if mask is None else x.masked_fill(~check_mask(mask, *x.shape[:2])[:, -x.shape[1] :, None], 0)


def check_ids(ids, name="input_ids", shortest=1):
    """The door of token ids and labels [B, T] -> int64."""
    got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else f"a {type(ids).__name__}"
    if "int" not in got or ids.ndim != 2 or ids.shape[1] < shortest:
        raise ValueError(f"{name} must be a tensor of integers, [batch, length >= {shortest}], got {got}")
    return ids.long()


# ------------------------------------------------------------------------------------------------------------
# 8. Block and model


class SwiGLU(nn.Module):
    def __init__(self, d_model, d_hidden, bias=False):
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_hidden, bias=bias)
        self.up_proj = nn.Linear(d_model, d_hidden, bias=bias)
        self.down_proj = nn.Linear(d_hidden, d_model, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class FlashSTUBlock(nn.Module):
    """x + mixer(norm(x)), then x + SwiGLU(norm(x)), of [B, T, d_model]; the mixer is an STU or attention.

    FlashSTUBlock(d_model=512, sequence_length=2048) stands alone; `options` are the fields of FlashSTUConfig
    that concern one layer (the others change nothing here). A model gives its config instead."""

    def __init__(
        self, d_model=None, sequence_length=None, num_filters=24, use_attention=False, config=None, **options
    ):  # fmt: skip
        super().__init__()
        c = config or FlashSTUConfig(
            n_embd=d_model, seq_len=sequence_length, num_eigh=num_filters, use_attn=use_attention,
            use_stu=not use_attention, **options,
        )  # fmt: skip
        d, width, self.sandwich = c.n_embd, int(c.n_embd * c.mlp_scale), None
        if use_attention:
            self.mixer = SlidingWindowAttention(config=c)
        elif c.stu_enable_mlp_sandwich:
            inner = c.stu_mlp_hidden_size or width
            self.mixer = STU(inner, inner, config=c)
            self.sandwich = nn.ModuleList([nn.Linear(d, inner, c.bias), nn.Linear(inner, d, c.bias)])
        else:
            self.mixer = STU(d, d, config=c)
        self.mixer_norm, self.mlp_norm = nn.RMSNorm(d, eps=1e-6), nn.RMSNorm(d, eps=1e-6)
        self.mlp, self.dropout = SwiGLU(d, width, c.bias), nn.Dropout(c.dropout)

    def forward(self, x, state=None, use_cache=False, attention_mask=None):
        up, down = self.sandwich or (None, None)
        h = self.mixer_norm(x)
        h = self.mixer(F.silu(up(h)) if up else h, state, use_cache, attention_mask)
        h, state = h if use_cache else (h, None)
        x = x + self.dropout(down(h) if down else h)
        x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return (x, state) if use_cache else x


class TiedEmbedding(nn.Embedding):
    """Token ids [B, T] -> their rows [B, T, d]; hidden states [..., d] -> logits [..., vocab_size]. Input and
    output share the matrix, and it is read nowhere but here: whoever moves or shards it hooks this module."""

    def forward(self, x):
        if x.is_floating_point():
            return F.linear(x, self.weight)
        try:
            return super().forward(x)
        except IndexError:
            raise ValueError(
                f"token ids {x.min()} to {x.max()} do not lie in [0, {len(self.weight)})"
            ) from None


class Output(NamedTuple):
    """outputs.loss, outputs["loss"] and loss, logits, state = outputs all work."""

    loss: Tensor | None = None
    logits: Tensor | None = None  # [B, T, vocab_size]; None when labels are given
    state: list | None = None  # with use_cache: a LayerState for each layer, and the last output [B, 1, d]

    def __getitem__(self, key):
        return getattr(self, key) if isinstance(key, str) else tuple.__getitem__(self, key)


# What config.json says to transformers (section 9)
HF_CONFIG = {"model_type": "flash_stu", "architectures": ["FlashSTUForCausalLM"], "auto_map": {
    "AutoConfig": "stu.FlashSTUPretrainedConfig", "AutoModel": "stu.FlashSTUModel",
    "AutoModelForCausalLM": "stu.FlashSTUForCausalLM",
}}  # fmt: skip


class FlashSTU(nn.Module):
    """The language model: embedding, n_layers blocks, norm, and the embedding again as output matrix."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.gradient_checkpointing = c.use_gradient_checkpointing  # transformers throws this switch
        self.tok_emb, self.dropout = TiedEmbedding(c.vocab_size, c.n_embd), nn.Dropout(c.dropout)
        attention = [c.use_attn and (i % 2 == 1 or not c.use_stu) for i in range(c.n_layers)]
        self.layers = nn.ModuleList(FlashSTUBlock(config=c, use_attention=a) for a in attention)
        self.norm = nn.RMSNorm(c.n_embd, eps=1e-6)
        nn.init.normal_(self.tok_emb.weight, std=0.02)
        last = ("sandwich.1.weight",) if c.stu_enable_mlp_sandwich else ("M_filters", "mixer.M")
        for name, p in self.named_parameters():
            if name.endswith(("c_proj.weight", "down_proj.weight", *last)):
                p.data *= (2 * c.n_layers) ** -0.5  # so many branches add up in the residual stream
        self.to(c.torch_dtype)

    def hidden(self, input_ids, state=None, use_cache=False, attention_mask=None, trace=None):
        """Token ids [B, T] -> normalised output of the last layer [B, T, d] and, with use_cache, the state to
        go on from. attention_mask [B, past + T] is 0 at padding; `trace`: a list, for every layer's input."""
        x, n, states = self.dropout(self.tok_emb(check_ids(input_ids))), len(self.layers), []
        if state and len(state) != n + 1:
            raise ValueError(f"state is of a model with {len(state) - 1} layers, this one has {n}")
        if attention_mask is not None:
            attention_mask = check_mask(attention_mask, *input_ids.shape)
        for layer, layer_state in zip(self.layers, state or [None] * n):
            if trace is not None:
                trace.append(x)
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                layer = partial(checkpoint, layer, use_reentrant=False)
            x = layer(x, layer_state, use_cache, attention_mask)
            if use_cache:
                x, layer_state = x
                states.append(layer_state)
        x = self.norm(x)
        return x, [*states, x[:, -1:].clone()] if use_cache else None

    def head(self, x):
        """Hidden states [..., d] -> logits [..., vocab_size]."""
        return self.tok_emb(x)

    def forward(self, input_ids, labels=None, state=None, use_cache=False):
        """input_ids [B, T] -> logits [B, T, vocab_size]. With labels [B, T] -> instead, the mean
        cross-entropy (nats) of predicting labels[:, t+1] at t: pass labels = input_ids, the shift is made
        here; -100 is ignored."""
        if labels is None:
            x, state = self.hidden(input_ids, state, use_cache)
            return Output(None, self.head(x), state)
        ids, labels = check_ids(input_ids), check_ids(labels, "labels", shortest=2)
        if labels.shape != ids.shape:
            raise ValueError(
                f"labels {list(labels.shape)} are not of the shape of input_ids {list(ids.shape)}"
            )
        # the last token has no label: leave it out, so that seq_len + 1 tokens train seq_len positions
        x, state = self.hidden(ids if use_cache else ids[:, :-1], state, use_cache)
        targets = labels[:, 1:]
        return Output(self.loss(x[:, : targets.shape[1]].flatten(0, 1), targets.flatten()), None, state)

    def loss(self, x, targets):
        """Mean cross-entropy of x [N, d] against targets [N], over chunks of tokens: N x vocab_size logits
        never exist in one piece."""

        def chunk_loss(x, targets):
            return F.cross_entropy(self.head(x).float(), targets, ignore_index=-100, reduction="sum")

        size = max(1, 2**26 // self.config.vocab_size)  # at most 2^26 logits at a time, 256 MB
        total = sum(piece_by_piece(chunk_loss, x.split(size), targets.split(size)))
        return total / (targets != -100).sum().clamp(min=1)

    def read(self, input_ids, state):
        """Logits [B, vocab_size] of the token after input_ids (of none: after the state), in eval mode. A
        long prompt is read in pieces. `state`, a list, is where reading starts; it is updated in place."""
        training, now = self.training, state
        if training:
            self.eval()
        try:
            for piece in (
                input_ids.split(self.config.seq_len, dim=1) if input_ids.shape[1] or not state else ()
            ):
                _, now = self.hidden(piece, now, use_cache=True)
            state[:] = now
            return self.head(state[-1][:, 0]).float()
        finally:
            if training:
                self.train()

    @torch.no_grad()
    def stream(
        self, input_ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_token=None,
        use_cache=True, generator=None, state=None,
    ):  # fmt: skip
        """Yield the next token of every row, [B], one after another; temperature 0 is greedy. With use_cache
        each token costs the same however long the context; without, the whole sequence is read again.
        Ends early when every row has produced stop_token (rows that have, repeat it).

        state: a list, empty or as an earlier call left it. The text goes on from there, and whenever a token
        is yielded the list has been updated in place, that token read: stop anywhere, and give it to the next
        call, with what is new (ids of length 0 if nothing is)."""
        asked = f"{max_new_tokens = }, {temperature = }, {top_k = }, {top_p = }, {stop_token = }"
        right = max_new_tokens >= 0 and 0 <= temperature < inf and (top_k is None or top_k >= 1)
        right = right and (top_p is None or 0 < top_p <= 1)
        if not right or not (stop_token is None or 0 <= stop_token < self.config.vocab_size):
            needed = "max_new_tokens >= 0, temperature >= 0, top_k >= 1, 0 < top_p <= 1, stop_token in the vocabulary"
            raise ValueError(f"need {needed}; got {asked}")
        state = [] if state is None else state
        unread, done = input_ids, torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        logits = self.read(input_ids, state)
        for _ in range(max_new_tokens):
            token = sample(logits, temperature, top_k, top_p, generator)  # [B]
            if stop_token is not None:
                token = token.masked_fill(done, stop_token)
                done |= token == stop_token
            unread = token[:, None]
            if not use_cache:
                state, input_ids = [], cat([input_ids, unread], dim=1)
                unread = input_ids
            logits = self.read(unread, state)
            yield token
            if stop_token is not None and done.all():
                return

    def generate(self, input_ids, max_length=None, max_new_tokens=None, **options):
        """Prompt [B, T] -> prompt and continuation, at most max_length tokens in all or max_new_tokens new
        ones. Options: see `stream`."""
        if (max_length is None) == (max_new_tokens is None):
            raise ValueError("give max_length (prompt included) or max_new_tokens, one of the two")
        if max_length is not None:
            max_new_tokens = max_length - input_ids.shape[1]
        new = [token[:, None] for token in self.stream(input_ids, max_new_tokens, **options)]
        return cat([input_ids, *new], dim=1)

    def save_pretrained(self, folder):
        """Write model.safetensors, config.json and, for transformers (section 9), generation_config.json and
        a copy of this file. Each replaces its predecessor only when it is whole."""
        from safetensors.torch import save_file

        folder, dtype = Path(folder), str(self.tok_emb.weight.dtype).removeprefix("torch.")
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config.to_dict() | HF_CONFIG | {"torch_dtype": dtype}
        texts = {"config.json": json.dumps(config, indent=2), "stu.py": Path(__file__).read_text("utf-8")}
        if not (folder / "generation_config.json").exists():  # else it may know the end-of-text token
            texts["generation_config.json"] = "{}"
        tensors = {name: t.detach().contiguous() for name, t in self.state_dict().items()}
        save_file(tensors, folder / "model.safetensors.tmp", metadata={"format": "pt"})
        for name, text in texts.items():
            (folder / f"{name}.tmp").write_text(text, "utf-8")
        for name in ("model.safetensors", *texts):
            os.replace(folder / f"{name}.tmp", folder / name)

    @classmethod
    def from_pretrained(cls, folder, device="cpu"):
        """Read what save_pretrained wrote, ours or that of transformers. Runs no code from the folder."""
        from safetensors.torch import load_file

        path, weights, tensors = Path(folder) / "config.json", Path(folder) / "model.safetensors", {}
        try:  # whatever goes wrong, `path` is the file that is being read
            values = json.loads(path.read_text("utf-8"))
            settings = {f.name: values[f.name] for f in fields(FlashSTUConfig) if f.name != "torch_dtype"}
            dtype = values.get("dtype") or values["torch_dtype"]  # transformers' name, ours
            model = cls(FlashSTUConfig(**settings, torch_dtype=dtype))
            shards = sorted(path.parent.glob("model-*-of-*.safetensors"))  # of a large model of transformers
            for path in shards if shards and not weights.is_file() else [weights]:
                tensors |= load_file(path)
            model.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items()})
        except OSError:  # it cannot be read, which says nothing about what it holds
            raise
        except Exception as e:  # noqa: BLE001
            raise ValueError(
                f"{path} is damaged, or of another model: {e!r}. Restore it from a copy"
            ) from None
        return model.to(device)


def sample(logits, temperature, top_k=None, top_p=None, generator=None):
    """Logits [B, V] -> one token a row, [B]. top_p keeps the likeliest tokens that together reach top_p."""
    best = logits.amax(-1, keepdim=True)
    if not best.isfinite().all():
        raise ValueError("the logits are not finite: do the weights hold NaN or infinite values?")
    if temperature == 0:
        return logits.argmax(-1)
    probs = ((logits - best) / temperature).softmax(-1)
    if top_k is None and top_p is None:
        return torch.multinomial(probs, 1, generator=generator)[:, 0]
    probs, tokens = probs.topk(min(top_k or probs.shape[1], probs.shape[1]))  # likeliest first
    before = (probs.cumsum(-1) - probs) / probs.sum(-1, keepdim=True)
    probs = probs * (before < (top_p or 1))
    return tokens.gather(1, torch.multinomial(probs, 1, generator=generator))[:, 0]


# ------------------------------------------------------------------------------------------------------------
# 9. Hugging Face: the same model as transformers wants to see it. Nothing above needs this; skip it freely
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
