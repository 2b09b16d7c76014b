"""Flash STU in one file: spectral transform units, sliding-window attention, from filters to language model.

    from stu import STU    one layer, [B, T, d_in] -> [B, T, d_out]; needs torch and numpy, nothing else

The idea. A linear dynamical system with state matrix eigenvalue α answers an impulse with 1, α, α², ... To
learn such systems without learning α, filter the input with the few signals that span all of these decays:
the top eigenvectors of the sum over α of their outer products, each weighted by (1-α)², which is a fixed
Hankel matrix. Only linear maps are learned; the memory (thousands of steps) is in the fixed filters.
Papers: "Spectral State Space Models" (arXiv 2312.06837), "Flash STU" (2409.10489), "SpectraLDS" (2505.17868).
The letters, everywhere in this file:
    B batch    T length of this input    L seq_len, the length of the filters    d, d_in, d_out channels
    K  number of eigenvectors φ_1..φ_K of the Hankel matrix Z (`num_eigh`), each a signal of length L
    Φ  the filter bank [L, F]: F = 2K filters φ_k(t), (-1)^t φ_k(t); Hankel-L has both signs inside: F = K
    M  what is learned, [F, d_in, d_out]: M_f takes the output of filter f to the layer's output
    A, b, C  the same bank as a linear dynamical system with n states: Φ[t, f] = C_f A^t b
    S  the state of that system, [B, n, d]: what an STU layer remembers (no system fits: its last L inputs)
    w  attention window: a token sees itself and the w tokens before it; [B, H, T, hd] are H heads of size hd
F is also torch.nn.functional; check(right, wanted, given) raises unless right. It and settings: section 7."""

import json
import shutil
import sys
from collections import namedtuple
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial
from math import ceil, inf, log, log2
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, arange, cat, einsum, nn
from torch.fft import irfft, rfft
from torch.utils.checkpoint import checkpoint

try:  # optional, CUDA only: plain PyTorch gives the same results. (transformers requires what has no `try`)
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None
try:
    from flashfftconv import FlashFFTConv
except ImportError:
    FlashFFTConv = None
on_cuda_16_bit = lambda t: t.is_cuda and t.element_size() == 2  # what these two take
# By length, not kept in a layer: its buffers would enter the state_dict
flash_fft = lru_cache(maxsize=16)(lambda n, dtype, device: FlashFFTConv(n, dtype=dtype).to(device))

SpectralLDS = namedtuple("SpectralLDS", "powers b C")  # A^0 .. A^chunk [chunk + 1, n, n], b [n], C [F, n]
LayerState = namedtuple("LayerState", "tensors owner seen")  # [B, ...] each; of which layer; inputs so far
Output = namedtuple("Output", "loss logits state")  # one of loss and logits [B, T, vocab_size]; see `hidden`


# ---- 1. The filters: eigenvectors of a Hankel matrix that is never built -----------------------------------
# Z_ij = 2 / ((i+j)^3 - (i+j)) = ∫_0^1 (1-α)² α^(i+j-2) dα, i, j = 1..L, is a sum over decays α of rank-one
# terms; Hankel-L is a sum over decays of both signs: Z_ij = ∫_-1^1 (1-α²)² α^(i+j-2) dα (2312.06837, app.).
# Substitute α = exp(-e^x), and the trapezoid rule over x converges exponentially: Z = G Gᵀ with one column of
# G for each decay, G[t, m] = √dα_m (1-α_m) α_m^t. The left singular vectors of G are the eigenvectors of Z.
# `eigh(Z)` would give noise after 16 filters (L = 40; 20 at 128), whose eigenvalues are 1e-16 of the largest.
# Singular values, their roots, fall half as fast: filters are right to 1e-5 up to K = 24 (L = 40), 26 (64).
def get_spectral_filters(seq_len, K, use_hankel_L=False, device=None, dtype=torch.float32):
    """The top K eigenvectors of Z, each times (its eigenvalue)^¼ (the papers' scale): [seq_len, K]."""
    c = FlashSTUConfig(seq_len=seq_len, num_eigh=K, use_hankel_L=use_hankel_L)  # checks them
    L, K, signs = c.seq_len, c.num_eigh, 2 if c.use_hankel_L else 1
    # e^x = -ln α, from where α = 0 (e^-45) to where α^L = 1 (1 - e^-12) or (1-α)² dα ~ (e^-21)³ is nothing
    rate = np.exp(np.arange(3.8, max(-12 - log(L), -21), -0.1))  # [m], in steps dx = 0.1
    d_alpha = 0.1 * rate * np.exp(-rate)  # |dα| = e^x α dx
    weight = -np.expm1(-signs * rate) * np.sqrt(d_alpha)  # √dα (1-α); Hankel-L: √dα (1-α²)
    G = torch.from_numpy(np.exp(-np.arange(L)[:, None] * rate) * weight)  # [L, m]
    Q, R = torch.linalg.qr(both_signs(G) if c.use_hankel_L else G)  # [L, m], [m, m], in O(L m²); 2m for both
    U, sigma, _ = torch.linalg.svd(R)  # [m, m]: G = (Q U) diag(σ) Vᵀ
    wanted = f"length {L} has {len(sigma)} filters, of floating-point dtype"
    check(len(sigma) >= K and dtype.is_floating_point, wanted, f"{K = }, {dtype}")
    phi = Q @ U[:, :K] * sigma[:K].sqrt()  # √σ = λ^¼
    phi = phi * phi[:signs].sum(0).sign()  # positive at the first lag; Hankel-L: the first two, one of them 0
    return phi.to(device=device, dtype=dtype)


def both_signs(phi):
    """φ [L, K] -> the bank Φ = [φ, (-1)^t φ], [L, 2K]."""
    sign = (-1) ** arange(len(phi), device=phi.device)[:, None]
    return cat([phi, sign * phi], dim=1)


def stu_formula(x, bank, M):
    """The papers' layer (2312.06837, section 2; 2409.10489, equation 1); all that follows is this, faster:
        y_t = Σ_k M⁺_k U⁺_tk + M⁻_k U⁻_tk,  U⁺_tk = Σ_i φ_k(i) x_{t-i},  U⁻_tk = Σ_i (-1)^i φ_k(i) x_{t-i}
    x [B, T, d_in], bank Φ [>= T, F], M [F, d_in, d_out] = M⁺_1..M⁺_K, M⁻_1..M⁻_K -> y [B, T, d_out]."""
    y = []
    for t in range(x.shape[1]):
        past = x[:, : t + 1].flip(1)  # x_t, x_{t-1}, ..., x_0: [B, t + 1, d_in]
        y.append(einsum("if,bid,fdo->bo", bank[: t + 1], past, M))
    return torch.stack(y, dim=1)


# ---- 2. The same as a convolution: FFT over the whole sequence, for training -------------------------------
def fft_size(n):
    """The smallest 2^a, 3·2^a, 5·2^a, 9·2^a or 15·2^a that is >= n: the lengths on which FFTs are fast."""
    return min(m << max(0, ceil(log2(n / m))) for m in (1, 3, 5, 9, 15))


class RealFFT(torch.autograd.Function):
    # apply(x, n, None): rfft of x on n points; apply(x_f, n, T): the first T values of the signal of x_f.
    # Each is the derivative of the other. (PyTorch's of rfft takes a complex FFT of full length.) The weights
    # per frequency that this leaves out, n and 1 or 2, cancel only when a signal goes there and back.
    generate_vmap_rule = True  # for torch.func

    @staticmethod
    def forward(x, n, T):
        return rfft(x, n=n) if T is None else irfft(x, n=n)[..., :T]

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.n, T = inputs
        ctx.T = x.shape[-1] if T is None else None

    @staticmethod
    def backward(ctx, grad):
        return RealFFT.apply(grad, ctx.n, ctx.T), None, None


def fft_conv(u, h, tile):
    """Causal convolution of each channel, u [B, d, T], h [d, <= T], as many at a time as the cache holds."""
    n, y = fft_size(u.shape[2] + h.shape[1] - 1), []  # on fewer points the end wraps around
    tile = max(1, min(tile, (2**24 if u.is_cuda else 2**19) // (len(u) * n)))
    for u_i, h_i in zip(u.split(tile, dim=1), h.split(tile)):
        y_f = RealFFT.apply(u_i, n, None) * RealFFT.apply(h_i, n, None)
        y.append(RealFFT.apply(y_f, n, u.shape[2]))
    return cat(y, dim=1)


# ---- 3. The STU layer --------------------------------------------------------------------------------------
# By `stu_formula` all branches are one sum over the bank Φ:  y = Σ_f (Φ_f * x) M_f.
# STU-T:  M_f = M_inputs · diag(M_filters[f]), hence y = (x M_inputs) * (Φ M_filters): one filter a channel.
# Each branch has its own rows of M_filters: with M⁺ = M⁻ the kernel is ∝ 1 + (-1)^t, blind to odd lags.
class Mixer(nn.Module):  # what the layers of both kinds share; each defines `mix`
    def forward(self, x, state=None, use_cache=False, attention_mask=None):
        """x [B, T, d_in] -> y, or (y, state) with use_cache. attention_mask [B, >= past + T], 0 at
        padding, the last columns count. `mix` gives y and the tensors to remember."""
        right = x.ndim == 3 and x.shape[1] >= 1 and x.shape[2] == self.d_in and x.is_floating_point()
        check(right, f"input must be floating-point [batch, length >= 1, {self.d_in} channels]", x)
        T, own = x.shape[1], f"{len(x)} sequences in a layer ({self.extra_repr()})"
        tensors, owner, seen = state or (None, own, 0)
        check(owner == own, f"this layer wants a state of {own}", f"one of {owner}")
        mask = check_mask(attention_mask, len(x), seen + T)
        if mask is not None:
            x = x.masked_fill(~mask[:, -T:, None], 0)  # whatever stood there
        y, tensors = self.mix(x, tensors, seen, mask, use_cache)
        if not use_cache:
            return y
        return y, LayerState(tuple(t.clone() for t in tensors), own, seen + T)  # a slice would hold all of x


class STU(Mixer):
    """Spectral transform unit: [B, T, d_in] -> [B, T, d_out] for any T >= 1, causal. `options` are fields of
    FlashSTUConfig; precomputed_filters: base filters of your own [seq_len, K], or a FilterBank. In pieces of
    any size: stu(x, state, use_cache=True) -> (y, state), from state None. Pieces, and T > seq_len, recur
    where a recurrence fits; for the rest, backend "fft" convolves, "lds" recurs, "auto" takes the faster."""

    def __init__(self, d_in, d_out, seq_len=None, num_eigh=24, *, precomputed_filters=None, backend="auto",
                 config=None, **options):  # fmt: skip
        super().__init__()
        c = config or FlashSTUConfig(seq_len=seq_len, num_eigh=num_eigh, use_attn=False, **options)
        self.d_in, self.d_out = setting("d_in", d_in, int), setting("d_out", d_out, int)
        self.config, self.backend, bank = c, backend, precomputed_filters
        if bank is None:
            bank = standard_bank(c.seq_len, c.num_eigh, c.use_hankel_L, c.use_tensorized)
        self.bank = bank if isinstance(bank, FilterBank) else FilterBank(bank, c.use_hankel_L)
        L, n_filters = self.bank.filters.shape
        check(L == c.seq_len, f"the filters must have length seq_len = {c.seq_len}", L)
        check(backend in ("auto", "fft", "lds"), 'backend must be "auto", "fft" or "lds"', repr(backend))
        if c.use_approx:
            self.M_inputs = nn.Parameter(torch.empty(d_in, d_out))
            self.M_filters = nn.Parameter(torch.empty(n_filters, d_out))
        else:
            self.M = nn.Parameter(torch.empty(n_filters, d_in, d_out))
        self.reset_parameters()

    def reset_parameters(self):
        """White input of unit variance gives output of about unit variance, whatever the filters' scales."""
        std, gain = self.d_in**-0.5, self.bank.gain
        for name, p in self.named_parameters():
            nn.init.normal_(p, std={"M_inputs": std, "M_filters": 1 / gain, "M": std / gain}[name])

    def extra_repr(self):
        kind, (L, n_filters) = "STU-T" if self.config.use_approx else "full STU", self.bank.filters.shape
        return f"{kind}, {self.d_in} -> {self.d_out}, {n_filters} filters of length {L}"

    def mix(self, x, state, seen, mask, use_cache):
        c, T, (S,) = self.config, x.shape[1], state or (None,)
        u, M = (x @ self.M_inputs, self.M_filters) if c.use_approx else (x, self.M)
        dtype, (filters, lds) = u.dtype, self.bank.on(u)  # [L, F]; [] where no recurrence fits (section 4)
        # For few sequences (measured) the full STU recurs: its convolution's matrices cost the same for any B
        few = self.backend == "auto" and not c.use_approx and 64 * len(x) <= self.d_out
        with torch.autocast("cpu" if u.is_meta else u.device.type, enabled=False):
            u, M = u.to(filters.dtype), M.to(filters.dtype)  # at least float32 (on CUDA in TF32, if allowed)
            if lds and (few or self.backend == "lds" or state or use_cache or T > c.seq_len):
                y, S = recur(u, S, lds, M)
            else:  # a convolution; where no recurrence fits, the state S is the inputs before
                u = u if S is None else cat([S, u], dim=1)
                y, S = self.convolve(u, filters[: u.shape[1]], M, dtype), u[:, -c.seq_len :]
        return y[:, -T:].to(dtype), (S,)

    def convolve(self, u, filters, M, dtype):
        """Σ_f (Φ_f * u) M_f, with M [F, d] for STU-T; dtype is what u had before."""
        c, tile = self.config, self.config.d_out_tile or self.d_out
        if len(u) == 0:  # FFTs refuse an empty batch
            return u @ u.new_zeros(u.shape[2], self.d_out)
        if not c.use_approx:
            return full_conv(u, filters, M, tile * (c.d_in_tile or self.d_in))
        u, h = u.transpose(1, 2), M.T @ filters.T  # [B, d, T], [d, <= T]
        if c.use_flash_fft and FlashFFTConv and on_cuda_16_bit(u.to(dtype)):
            return flash_fft_conv(u.to(dtype), h).transpose(1, 2)
        return fft_conv(u, h, tile).transpose(1, 2)


# ---- 4. The same filters as a linear dynamical system, for input in pieces and past seq_len ----------------
# A filter is a mixture of decays, so a bank of them is the impulse response of one system with poles ±α:
#     S_t = A S_{t-1} + b u_t,   y_t = C S_t,   that is   Φ[t] = C A^t b.
# With a diagonal A the states of slow poles are large, nearly equal, and cancel in y: float32 loses the
# weakest filters. So we take orthonormal coordinates (the Takenaka-Malmquist basis): a chain of all-pass
# sections, one for each pole p. Section i holds S_i; v_i enters it, v_{i+1} leaves for the next; v_1 is u:
#     S_i ← p_i S_i + g_i v_i,     v_{i+1} = g_i S_i - p_i v_i     (the old S_i in both), g_i = √(1-p_i²).
# Unrolled, with P_i = Π_{j<i} (-p_j):  A_ij = g_i P_i · g_j / P_{j+1} for j < i,  A_ii = p_i,  b_i = g_i P_i.
# The n states answer an impulse with signals ψ(t) = A^t b that are orthonormal on t = 0..∞: |C_f| is the norm
# of filter f, never large, and float32 is right to 1e-6. As Σ_{t<L} ψ(t)ψ(t)ᵀ = I - A^L A^Lᵀ, one linear
# solve gives the least-squares fit on t < L with a penalty of `fade`² on the energy past L (it may grow).
class FilterBank:
    """Base filters φ [L, K], with both signs unless Hankel-L, as bank Φ [L, F] and as recurrence, None where
    none fits: one object for all layers that use it, in float64 on the CPU; `on` hands out copies."""

    def __init__(self, phi, use_hankel_L=False, **fit):
        self.filters = (phi if use_hankel_L else both_signs(phi)).detach().double().cpu()
        self.gain = np.linalg.norm(self.filters)  # √ Σ_f |Φ_f|²
        self.lds, self.copies = fit_recurrence(self.filters, **fit), {}

    def on(self, u):
        """Filters and recurrence for an input u. Never below float32: poles near 1 would coincide."""
        key = u.device, torch.promote_types(u.dtype, torch.float32)
        if key in self.copies:
            return self.copies[key]
        with torch.inference_mode(False):  # wherever this is called first, one can train afterwards
            filters, *lds = (t.to(*key, copy=True) for t in (self.filters, *(self.lds or ())))
        if type(filters) is Tensor:  # not a fake one, of torch.compile or of a dry run
            self.copies[key] = filters, lds
        return filters, lds


@lru_cache(maxsize=32)
def standard_bank(seq_len, K, use_hankel_L, use_tensorized):
    make = get_tensorized_spectral_filters if use_tensorized else get_spectral_filters
    return FilterBank(make(seq_len, K, use_hankel_L, dtype=torch.float64), use_hankel_L)


def fit_recurrence(filters, n_pairs=0, chunk=64, fade=1e-5, tolerance=1e-6):
    """The system of n = 2 n_pairs states (0: enough for any K) that answers an impulse with `filters` [L, F];
    None where it errs by more than `tolerance` of the largest value or does not fade: Kronecker products."""
    phi, L = filters.numpy(), len(filters)
    n_pairs = n_pairs or max(56, round(5 * log(8 * L)))
    decay = np.exp(-np.exp(np.linspace(-log(L), log(8), n_pairs)))  # memories: L to 1/8 steps
    p = np.stack([decay, -decay], axis=1).ravel()
    g, P = np.sqrt((1 - p) * (1 + p)), np.cumprod([1, *-p])
    b = g * P[:-1]
    A, psi = np.diag(p) + np.tril(np.outer(b, g / P[1:]), -1), [b]
    while len(psi) < L:
        psi.append(A @ psi[-1])
    psi, A_L = np.stack(psi), np.linalg.matrix_power(A, L)  # [L, n], [n, n]
    C = np.linalg.solve(np.eye(len(A)) - (1 - fade**2) * A_L @ A_L.T, psi.T @ phi).T
    error = np.abs(psi @ C.T - phi).max() / np.abs(phi).max()
    past_L = np.linalg.norm(C @ A_L, axis=1).max() / np.linalg.norm(phi, axis=0).max()
    if error <= tolerance and past_L <= 5e4 * tolerance:
        powers = np.stack([np.linalg.matrix_power(A, i) for i in range(chunk + 1)])
        return SpectralLDS(*map(torch.from_numpy, (powers, b, C)))


def recur(u, S, lds, M):
    """Σ_f (Φ_f * u) M_f as a recurrence over chunks: u [B, T, d], S [B, n, d] (None: 0) -> y [B, T, d_out],
    S after the last input. M is [F, d] (STU-T: filter Σ_f M[f, c] Φ_f for channel c) or [F, d, d_out]."""
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
    toeplitz = F.pad(psi @ C.T, (0, 0, 0, size))[t[:, None] - t]  # [t, i, F]; lags < 0 find the zeros
    to_filters = cat([toeplitz.transpose(1, 2), C @ powers[1 : size + 1]], dim=2)  # [t, F, size + n]
    if M.ndim == 2:  # all chunks at once: [chunks, B, size, d]
        to_outputs = einsum("tfi,fd->tid", to_filters, M)
        y = einsum("tid,cbid->cbtd", to_outputs, torch.stack(chunks)).unbind()
    else:  # one by one, for the filter outputs of a chunk are large: [B, size, F·d] @ [F·d, d_out]
        mix = lambda v: einsum("tfi,bid->btfd", to_filters, v).flatten(2) @ M.flatten(0, 1)
        y = piece_by_piece(mix, chunks)
    return cat(y, dim=1)[:, :T], S


# ---- 5. Sliding-window attention ---------------------------------------------------------------------------
def rotary(x, start):
    """Rotate channels (i, i + hd/2) of x [B, H, T, hd] by angles proportional to the position start + t."""
    half = x.shape[-1] // 2
    exact = torch.float32 if x.device.type == "mps" else torch.float64  # float32 drifts past 10^5 tokens
    rate = 10000.0 ** (-arange(half, device=x.device, dtype=exact) / half)
    angle = arange(start, start + x.shape[2], device=x.device)[:, None] * rate  # [T, hd/2]
    cos, sin = angle.cos().float(), angle.sin().float()
    x1, x2 = x.split(half, dim=-1)
    return cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1)


def windowed_attention(q, k, v, window, softcap=0.0, attention_mask=None):
    """q [B, H, T, hd]; k, v [B, H, past + T, hd]: query i sees key past + i and the `window` keys before it.
    Logits q·k/√hd pass through softcap·tanh(·/softcap) if softcap > 0. attention_mask [B, >= past + T] is
    False at padding, which its own query alone sees (a softmax over nothing is NaN). O(T·w) in time."""
    tile = 512 if q.is_cuda else 128  # of queries
    q_tiles, y = q.split(tile, dim=2), []
    cuts = [k.shape[2] - q.shape[2], *(q_i.shape[2] for q_i in q_tiles)]  # the past, then as the queries
    k_tiles, v_tiles = k.split(cuts, dim=2), v.split(cuts, dim=2)  # once: a slice's gradient is as long
    for i, q_i in enumerate(q_tiles):
        near = slice(max(0, i + 1 - ceil(window / tile)), i + 2)  # of keys: 0 is the past, i + 1 is its own
        k_i, v_i = cat(k_tiles[near], dim=2), cat(v_tiles[near], dim=2)
        position = arange(k_i.shape[2], device=q.device)  # of the keys; the queries are the last of them
        lag = position[-q_i.shape[2] :, None] - position  # [queries, keys]
        visible = (lag >= 0) & (lag <= window)
        if attention_mask is not None:  # [B, 1, queries, keys]
            mask_tiles = attention_mask[:, None, None, -k.shape[2] :].split(cuts, dim=3)
            visible = visible & cat(mask_tiles[near], dim=3) | (lag == 0)
        if softcap == 0:
            y.append(F.scaled_dot_product_attention(q_i, k_i, v_i, attn_mask=visible))
        else:
            logits = softcap * torch.tanh(q_i @ k_i.transpose(-1, -2) * (q.shape[-1] ** -0.5 / softcap))
            y.append(logits.masked_fill(~visible, -inf).softmax(-1) @ v_i)
    return cat(y, dim=2)


class SlidingWindowAttention(Mixer):
    """Causal multi-head attention over oneself and the `window_size` tokens before, called as an STU is."""

    def __init__(self, d_model=None, n_heads=None, window_size=1024, softcap=50.0, config=None, **options):
        super().__init__()
        self.config = c = config or FlashSTUConfig(
            n_embd=d_model, n_heads=n_heads, window_size=window_size, softcap=softcap, **options
        )
        self.d_in = c.n_embd
        self.c_attn = nn.Linear(c.n_embd, 3 * c.n_embd, c.bias)
        self.c_proj = nn.Linear(c.n_embd, c.n_embd, c.bias)
        self.q_norm, self.k_norm = (nn.RMSNorm(c.n_embd // c.n_heads, eps=1e-6) for _ in "qk")

    def extra_repr(self):
        return f"{self.config.n_embd} channels, {self.config.n_heads} heads, window {self.config.window_size}"

    def mix(self, x, state, seen, mask, use_cache):
        c, w = self.config, self.config.window_size
        q, k, v = self.c_attn(x).unflatten(-1, (3, c.n_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, T, hd]
        q, k = (rotary(t, seen).to(v.dtype) for t in (self.q_norm(q), self.k_norm(k)))
        if state:
            k, v = (cat(pair, dim=2) for pair in zip(state, (k, v)))
        if flash_attn_func and on_cuda_16_bit(q) and mask is None:
            q_k_v = (t.transpose(1, 2) for t in (q, k, v))  # it wants [B, T, H, hd]
            y = flash_attn_func(*q_k_v, causal=True, window_size=(w, 0), softcap=c.softcap)
        else:
            y = windowed_attention(q, k, v, w, c.softcap, mask).transpose(1, 2)
        return self.c_proj(y.flatten(2)), [t[:, :, max(0, t.shape[2] - w) :] for t in (k, v)]


# ---- 6. Variants: the full STU as a convolution, Kronecker filters, FlashFFTConv ---------------------------
def piece_by_piece(function, *tensors):
    """[function(a_i, b_i, ...) for the pieces of `tensors`], each recomputed in backward, to save memory."""
    if len(tensors[0]) > 1 and torch.is_grad_enabled():
        function = partial(checkpoint, function, use_reentrant=False)
    return [function(*pieces) for pieces in zip(*tensors)]


def full_conv(x, filters, M, tile):
    """Σ_f (Φ_f * x) M_f for x [B, T, d_in], filters [<= T, F], M [F, d_in, d_out] -> [B, T, d_out]: at each
    frequency ω one matrix Σ_f Φ_f(ω) M_f, so the filter outputs [B, T, F, d_in] are never formed."""
    matrices = lambda filters_f: (filters_f @ M.flatten(1).to(filters_f.dtype)).unflatten(1, M.shape[1:])
    mix = lambda x_f, filters_f: x_f @ matrices(filters_f)  # [band, B, d_in], [band, F] -> [band, B, d_out]
    n, band = fft_size(x.shape[1] + len(filters) - 1), max(1, 64 * tile // M[0].numel())
    x_f, filters_f = rfft(x, n=n, dim=1).transpose(0, 1), rfft(filters, n=n, dim=0)
    y_f = cat(piece_by_piece(mix, x_f.split(band), filters_f.split(band)))
    return irfft(y_f.transpose(0, 1), n=n, dim=1)[:, : x.shape[1]]


def get_tensorized_spectral_filters(n, k, use_hankel_L=False, device=None, dtype=torch.float32):
    """φ_i ⊗ φ_j of k' = min(k, side) filters of length side = ⌈√(n-2)⌉ (as published: 0 past side²)."""
    side = ceil(max(n - 2, 1) ** 0.5)
    small = get_spectral_filters(side, min(k, side), use_hankel_L, device, torch.float64)
    bank = torch.kron(small, small)[:n]  # [min(side², n), k'²]
    return F.pad(bank, (0, 0, 0, n - len(bank))).to(dtype)  # [n, k'²]


def flash_fft_conv(u, h):
    """fft_conv by FlashFFTConv for u in 16 bits: n points, a power of two >= 256; channels in sixteens."""
    (_, d, T), n = u.shape, 2 ** max(8, (2 * u.shape[2] - 1).bit_length())
    u, h = (F.pad(t, (0, n // 2 - t.shape[-1], 0, -d % 16)).contiguous() for t in (u, h))
    return flash_fft(n, u.dtype, u.device)(u, h)[:, :d, :T]


# ---- 7. Settings, and the doors at which what is given is checked ------------------------------------------
SETTINGS = {  # annotation -> kinds of numpy's dtypes that may be given, least value, how that is called
    bool: ("b", False, "True or False"),
    int: ("iu", 1, "a positive integer"),
    int | tuple: ("iu", 0, "w or (w, 0), w >= 0 tokens before"),
    float: ("iuf", 0, "a finite number >= 0"),
}


def check(right, wanted, given):
    """Unless it is right, an error that says what was wanted and given (of a tensor, dtype and shape)."""
    if not right:
        got = f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else given
        raise ValueError(f"{wanted}, got {got}")


def setting(name, given, annotation):
    """The Python number or bool that was given, as such or as numpy's; an error if it is none of these."""
    value, (kinds, least, wanted) = np.asarray(given), SETTINGS[annotation]
    right = value.ndim == 0 and value.dtype.kind in kinds and least <= value < inf
    check(right, f"{name} must be {wanted}", repr(given))
    return value.item()


@dataclass
class FlashSTUConfig:
    n_embd: int = 1536  # width d
    n_layers: int = 26  # even layers are STU, odd layers attention
    n_heads: int = 8  # of the attention layers
    seq_len: int = 8192  # length of the filters; longer inputs are legal, the filters fade out past it
    window_size: int | tuple = 1024  # w, or flash-attn's (w, 0), kept as w
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
    stu_mlp_hidden_size: int = None  # the sandwich's width; None: n_embd · mlp_scale
    d_in_tile: int = None  # the full STU's convolution, so many channels at a time: less memory
    d_out_tile: int = None  # also STU-T's; results are the same
    use_gradient_checkpointing: bool = False  # layers are computed again in the backward pass
    torch_dtype: torch.dtype | str = "bfloat16"  # of the parameters; train with float32 and autocast
    to_dict = asdict  # as JSON has it

    def __post_init__(self):
        match self.window_size:
            case (w, 0):
                self.window_size = w
        for f in fields(self)[:-1]:  # all but torch_dtype
            if (given := getattr(self, f.name)) is not f.default:
                setattr(self, f.name, setting(f.name, given, f.type))
        self.torch_dtype = str(self.torch_dtype).removeprefix("torch.")
        kinds = "float64 float32 bfloat16 float16"
        check(self.torch_dtype in kinds.split(), f"torch_dtype must be of {kinds}", self.torch_dtype)
        even = not self.use_attn or self.n_embd % (2 * self.n_heads) == 0
        check(even, f"n_heads = {self.n_heads} does not divide n_embd into heads of even size", self.n_embd)
        check(self.use_stu or self.use_attn, "use_stu or use_attn must be True: no layer is left", "neither")


def check_ids(ids):
    """Token ids or labels [B, T] -> int64."""
    right = isinstance(ids, Tensor) and "int" in str(ids.dtype) and ids.ndim == 2
    check(right, "input_ids and labels must be tensors of integers, [batch, length]", ids)
    return ids.long()


def check_mask(mask, B, T):
    """attention_mask [B, >= T], 1 at tokens and 0 at padding -> True and False; None stays None."""
    if mask is not None:
        right = mask.ndim == 2 and len(mask) == B and mask.shape[1] >= T
        right = right and (mask.dtype == torch.bool or (mask == mask.bool()).all())
        check(right, f"attention_mask must be [{B}, at least {T}], 1 at tokens, 0 at padding", mask)
        return mask.bool()


# ---- 8. Block and model ------------------------------------------------------------------------------------
class FlashSTUBlock(nn.Module):
    """x + mixer(norm(x)), then x + SwiGLU(norm(x)), [B, T, d_model]; the mixer is an STU or attention."""

    def __init__(self, d_model=None, sequence_length=None, num_filters=24, use_attention=False, config=None,
                 **options):  # fmt: skip
        super().__init__()
        c = config or FlashSTUConfig(
            n_embd=d_model, seq_len=sequence_length, num_eigh=num_filters, use_attn=use_attention, **options
        )
        d, width, linear = c.n_embd, int(c.n_embd * c.mlp_scale), partial(nn.Linear, bias=c.bias)
        inner, self.sandwich = d, None
        if c.stu_enable_mlp_sandwich and not use_attention:
            inner = c.stu_mlp_hidden_size or width
            self.sandwich = nn.ModuleList([linear(d, inner), linear(inner, d)])
        self.mixer = SlidingWindowAttention(config=c) if use_attention else STU(inner, inner, config=c)
        self.mixer_norm, self.mlp_norm = nn.RMSNorm(d, eps=1e-6), nn.RMSNorm(d, eps=1e-6)
        mlp = linear(d, width), linear(d, width), linear(width, d)
        self.mlp = nn.ModuleDict(zip(("gate_proj", "up_proj", "down_proj"), mlp))
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x, state=None, use_cache=False, attention_mask=None):
        up, down = self.sandwich or (None, None)
        h = self.mixer_norm(x)
        h = self.mixer(F.silu(up(h)) if up else h, state, use_cache, attention_mask)
        if use_cache:
            h, state = h
        x = x + self.dropout(down(h) if down else h)
        h = self.mlp_norm(x)
        h = F.silu(self.mlp.gate_proj(h)) * self.mlp.up_proj(h)
        x = x + self.dropout(self.mlp.down_proj(h))
        return (x, state) if use_cache else x


class TiedEmbedding(nn.Embedding):  # the matrix is read nowhere else: whoever moves or shards it hooks this
    def forward(self, x):
        """Token ids [B, T] -> their rows [B, T, d]; hidden states [..., d] -> logits [..., vocab_size]."""
        if x.is_floating_point():
            return F.linear(x, self.weight)
        try:
            return super().forward(x)
        except IndexError:
            raise ValueError(f"token ids {x.min()} to {x.max()} are not in [0, {len(self.weight)})") from None


class FlashSTU(nn.Module):
    """The language model: embedding, n_layers blocks, norm, and the embedding again as output matrix."""

    def __init__(self, config):
        super().__init__()
        self.config = c = replace(config)  # checked again, whatever was assigned to it
        self.gradient_checkpointing = c.use_gradient_checkpointing  # transformers throws this switch
        self.tok_emb, self.dropout = TiedEmbedding(c.vocab_size, c.n_embd), nn.Dropout(c.dropout)
        attention = [c.use_attn and (i % 2 == 1 or not c.use_stu) for i in range(c.n_layers)]
        self.layers = nn.ModuleList(FlashSTUBlock(config=c, use_attention=a) for a in attention)
        self.norm = nn.RMSNorm(c.n_embd, eps=1e-6)
        nn.init.normal_(self.tok_emb.weight, std=0.02)
        for name, p in self.named_parameters():
            if name.endswith(("mixer.M", "M_filters", "c_proj.weight", "down_proj.weight")):
                p.data *= (2 * c.n_layers) ** -0.5  # so many branches add up in the residual stream
        self.to(getattr(torch, c.torch_dtype))

    def hidden(self, input_ids, state=None, use_cache=False, attention_mask=None):
        """Token ids [B, T] -> normalised output of the last layer [B, T, d] and, with use_cache, the state: a
        LayerState per layer, then the last output [B, 1, d]. attention_mask [B, past + T]: 0 at padding."""
        x, n, after = self.dropout(self.tok_emb(check_ids(input_ids))), len(self.layers), []
        before = state or [None] * (n + 1)
        check(len(before) == n + 1, f"this model wants a state of {n} layers", f"one of {len(before) - 1}")
        for layer, layer_state in zip(self.layers, before):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                layer = partial(checkpoint, layer, use_reentrant=False)
            x = layer(x, layer_state, use_cache, attention_mask)
            if use_cache:
                x, layer_state = x
                after.append(layer_state)
        x = self.norm(x)
        return x, [*after, x[:, -1:].clone()] if use_cache else None

    def forward(self, input_ids, labels=None, state=None, use_cache=False):
        """Ids [B, T] -> logits; with labels = input_ids, instead, the mean cross-entropy (nats) of predicting
        labels[:, t+1] at t, unless it is -100. The last token is not read: begin the next call with it."""
        if labels is None:
            x, state = self.hidden(input_ids, state, use_cache)
            return Output(None, self.tok_emb(x), state)
        ids, labels = check_ids(input_ids), check_ids(labels)
        right = labels.shape == ids.shape and ids.shape[1] > 1
        check(right, f"labels must be {list(ids.shape)} as input_ids, length > 1", labels)
        x, state = self.hidden(ids[:, :-1], state, use_cache)
        x, targets = x.flatten(0, 1), labels[:, 1:].flatten()
        sum_of = lambda x, y: F.cross_entropy(self.tok_emb(x).float(), y, reduction="sum")
        size = max(1, 2**26 // self.config.vocab_size)  # at most 2^26 logits exist at a time, 256 MB
        total = sum(piece_by_piece(sum_of, x.split(size), targets.split(size)))
        return Output(total / (targets != -100).sum().clamp(min=1), None, state)

    @torch.no_grad()
    def stream(self, input_ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_token=None,
               generator=None, state=None):  # fmt: skip
        """Yield the next token of every row, [B], one after another, each at the same cost; temperature 0 is
        greedy. Ends early when every row has produced stop_token (rows that have, repeat it). `state`: a
        list, empty or as an earlier call left it. A token is read into it before it is yielded: stop anywhere
        and go on with the list and the ids that are new, if any. A model with dropout wants eval() before."""
        check(max_new_tokens >= 0, "max_new_tokens must be >= 0", max_new_tokens)
        check(temperature >= 0, "temperature must be >= 0", temperature)
        check(top_p is None or 0 < top_p <= 1, "top_p must be > 0 and <= 1", top_p)
        known = stop_token is None or stop_token in range(self.config.vocab_size)
        check(known, "stop_token must be in the vocabulary", stop_token)
        input_ids, state = check_ids(input_ids), [] if state is None else state
        for piece in input_ids.split(self.config.seq_len, dim=1):
            if piece.shape[1] or not state:
                _, state[:] = self.hidden(piece, state, use_cache=True)
        done = input_ids.new_zeros(len(input_ids), dtype=torch.bool)
        for _ in range(max_new_tokens):
            token = sample(self.tok_emb(state[-1][:, 0]).float(), temperature, top_k, top_p, generator)
            if stop_token is not None:
                token = token.masked_fill(done, stop_token)
                done |= token == stop_token
            _, state[:] = self.hidden(token[:, None], state, use_cache=True)
            yield token
            if len(done) and done.all():
                return

    def generate(self, input_ids, max_length=None, max_new_tokens=None, **options):
        """Prompt [B, T] -> prompt and what follows; max_length is of both. Options: those of `stream`."""
        check((max_length is None) != (max_new_tokens is None), "give one of the two lengths", "both or none")
        n_new = max_new_tokens if max_length is None else max_length - input_ids.shape[1]
        return cat([input_ids, *(t[:, None] for t in self.stream(input_ids, n_new, **options))], dim=1)

    def save_pretrained(self, folder):
        """Write model.safetensors, config.json, a copy of this file; each replaces an old one when whole."""
        from safetensors.torch import save_file

        part = Path(folder) / "unfinished"
        shutil.rmtree(part, ignore_errors=True)  # of a save that was killed
        part.mkdir(parents=True)
        tensors = {name: t.contiguous() for name, t in self.state_dict().items()}
        save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
        config = replace(self.config, torch_dtype=self.tok_emb.weight.dtype).to_dict() | HF_CONFIG
        (part / "config.json").write_text(json.dumps(config, indent=2))
        shutil.copyfile(__file__, part / "stu.py")
        for file in part.iterdir():
            file.replace(part.parent / file.name)
        part.rmdir()

    @classmethod
    def from_pretrained(cls, folder, device="cpu"):
        """What save_pretrained wrote, ours or that of transformers, in eval mode. Runs no code from there."""
        from safetensors.torch import load_file

        folder, tensors = Path(folder), {}
        for path in list(folder.glob("model.safetensors")) or folder.glob("model-*-of-*.safetensors"):
            tensors |= {name.removeprefix("model."): t for name, t in load_file(path).items()}
        check("tok_emb.weight" in tensors, "need a folder with our model*.safetensors (RUN/model)", folder)
        values = json.loads((folder / "config.json").read_bytes())
        values["torch_dtype"] = tensors["tok_emb.weight"].dtype  # called dtype by transformers
        model = cls(FlashSTUConfig(**{f.name: values[f.name] for f in fields(FlashSTUConfig)}))
        model.load_state_dict(tensors)
        return model.to(device).eval()


def sample(logits, temperature, top_k=None, top_p=None, generator=None):
    """Logits [B, V] -> one token a row, [B]: of the top_k likeliest, of those that together reach top_p."""
    check(logits.amax(-1).isfinite().all(), "the logits must be finite", "others: do the weights hold NaN?")
    if temperature == 0:
        return logits.argmax(-1)
    tokens = None
    if top_k or top_p:
        logits, tokens = logits.topk(min(top_k or inf, logits.shape[1]))  # likeliest first
    probs = (logits.double() / temperature).softmax(-1)
    if top_p:
        probs = probs * (probs.cumsum(-1) - probs < top_p)
    choice = torch.multinomial(probs, 1, generator=generator)
    return (choice if tokens is None else tokens.gather(1, choice))[:, 0]


# ---- 9. Hugging Face: the same model as transformers wants to see it (nothing above needs this) ------------
# A saved folder holds a copy of this file, and its config.json names these classes. They exist where
# transformers was imported first, as it is when it loads a folder; by hand: `import transformers, stu`.
HF_CONFIG = {
    "model_type": "flash_stu", "architectures": ["FlashSTUForCausalLM"], "tie_word_embeddings": True,
    "auto_map": {"AutoConfig": "stu.FlashSTUPretrainedConfig", "AutoModel": "stu.FlashSTUModel",
                 "AutoModelForCausalLM": "stu.FlashSTUForCausalLM"},
}  # fmt: skip
if "transformers" in sys.modules:
    from torch.utils._pytree import tree_map_only
    from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
    from transformers.utils import can_return_tuple
    from transformers.utils.output_capturing import capture_outputs

    OPTIONS = FlashSTUConfig().to_dict()
    OPTIONS.pop("torch_dtype")  # which it keeps itself

    class FlashSTUPretrainedConfig(PretrainedConfig):
        model_type, _auto_class = HF_CONFIG["model_type"], "AutoConfig"
        attribute_map = {  # noqa: RUF012
            "hidden_size": "n_embd", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
            "max_position_embeddings": "seq_len",
        }  # fmt: skip

        def __init__(self, **options):
            super().__init__(**OPTIONS | HF_CONFIG | options)

    class FlashSTUCache(list):  # the state. A call leaves it as it is: several texts can share a prefix
        is_compileable = is_croppable = False
        is_linear = (False,)  # generate, given all ids again, leaves out those that have been read
        get_seq_length = lambda self, layer_idx=0: self[0].seen

        def reorder_cache(self, rows):  # beam search: row i goes on from row rows[i]
            self[:] = tree_map_only(Tensor, lambda t: t.index_select(0, rows.to(t.device)), list(self))

    class FlashSTUPreTrainedModel(PreTrainedModel):
        config_class, base_model_prefix, _input_embed_layer = FlashSTUPretrainedConfig, "model", "tok_emb"
        supports_gradient_checkpointing, _is_stateful = True, True  # stateful: it cannot take back a token
        _no_split_modules, _can_record_outputs = ("FlashSTUBlock",), {"hidden_states": FlashSTUBlock}
        _supports_default_dynamic_cache = classmethod(lambda cls: False)  # generate makes none for us
        init_weights = lambda self: self.tie_weights()  # FlashSTU has drawn them, in its own way

        def _init_weights(self, module):  # weights that a checkpoint lacks, embeddings that a resize adds
            module.reset_parameters() if isinstance(module, STU) else super()._init_weights(module)

    class FlashSTUModel(FlashSTUPreTrainedModel):
        _auto_class, hidden = "AutoModel", FlashSTU.hidden

        def __init__(self, config):
            super().__init__(config)
            ours = {name: getattr(config, name) for name in OPTIONS}
            model = FlashSTU(FlashSTUConfig(**ours, torch_dtype=torch.get_default_dtype()))
            # the same layers by the same names
            self.gradient_checkpointing, self._modules = model.gradient_checkpointing, model._modules
            self.post_init()

        # Taken, not used: position_ids and what else tells where documents begin. Positions are relative,
        # documents in a row see each other as in train.py. `cache`: past_key_values since transformers 5.24
        @capture_outputs
        def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, cache=None,
                    use_cache=False, output_hidden_states=None, inputs_embeds=None, output_attentions=None,
                    seq_idx=None, cu_seq_lens_q=None, cu_seq_lens_k=None, max_length_q=None,
                    max_length_k=None):  # fmt: skip
            past = past_key_values if cache is None else cache
            if not isinstance(past, FlashSTUCache | None) or inputs_embeds is not None or output_attentions:
                raise ValueError("FlashSTU takes input_ids, a cache of its own, and has no attention weights")
            use_cache = bool(use_cache or past)
            if attention_mask is not None:
                shape = len(input_ids), input_ids.shape[1] + (past.get_seq_length() if past else 0)
                mask = check_mask(attention_mask, *shape)
                check(mask.shape == shape, f"attention_mask must be {list(shape)}: old and new ids", mask)
                # padding matters only where a token comes after it, here or in what goes on from the cache
                after = F.pad(mask.int(), (0, use_cache), value=1).diff(dim=1) > 0
                attention_mask = mask if after.any() else None
            x, state = self.hidden(input_ids, past, use_cache, attention_mask)
            return BaseModelOutputWithPast(x, FlashSTUCache(state) if use_cache else None)

    class FlashSTUForCausalLM(FlashSTUPreTrainedModel, GenerationMixin):
        _auto_class, _tied_weights_keys = "AutoModelForCausalLM", {"lm_head.weight": "model.tok_emb.weight"}

        def __init__(self, config):
            super().__init__(config)
            self.model = FlashSTUModel(config)
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
            self.post_init()

        def prepare_inputs_for_generation(self, ids, next_sequence_length=None, tokenizer=None, **kwargs):
            new = next_sequence_length  # so many ids, None: all; where none is, transformers would read all
            check(new is None or new > 0, "give all ids: those that past_key_values has read, and more", new)
            return super().prepare_inputs_for_generation(ids, new, **kwargs)

        @can_return_tuple
        def forward(self, input_ids, attention_mask=None, past_key_values=None, cache=None, labels=None,
                    logits_to_keep=0, num_items_in_batch=None, **options):  # fmt: skip
            shifted = options.pop("shift_labels", None)  # as a parameter Trainer would always expect it
            past = past_key_values if cache is None else cache
            out = dict(self.model(input_ids, attention_mask, cache=past, return_dict=True, **options))
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits, loss = self.lm_head(out.pop("last_hidden_state")[:, keep]), None  # x[:, -0:] is all of x
            if labels is not None or shifted is not None:
                V = logits.shape[-1]
                loss = self.loss_function(logits, labels, V, num_items_in_batch, shift_labels=shifted)
            return CausalLMOutputWithPast(loss, logits, **out)
