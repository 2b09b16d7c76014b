"""
Flash STU in one file: a language model of spectral transform units and sliding-window attention.

    from stu import STU, FlashSTU, FlashSTUConfig  # needs PyTorch and NumPy, nothing else

The idea. A linear dynamical system turns inputs x into outputs y through a hidden state h,
    h_t = A h_{t-1} + B x_t,    y_t = C h_t.
To an impulse, each eigenvalue α of A answers with the decay 1, α, α², α³, ... A recurrent layer
has to learn these α, which is hard when the memory is long. A spectral transform unit (STU) does
not learn them. It filters its input with a few fixed signals, chosen so that their sums come close
to every decay at once, and it learns only linear maps around them. The best such signals are the
top eigenvectors of one fixed matrix: the sum, over all α, of the decay of α times its transpose.

How to read this file. Sections 1 to 6 are a complete language model that trains: settings, filters,
convolution, the STU layer, attention, block and model. Sections 7 to 11 are what a user wants
besides: to go on from a state, to write text, variants, saving and loading, Hugging Face.

The letters, everywhere in this file:
    B  batch size
    T  length of the input at hand
    d  number of channels; a layer maps d_in channels to d_out
    L  length of the filters, `seq_len`
    K  number of eigenvectors, `num_eigh`
    φ  the eigenvectors, signals of length L: phi [L, K]
    Φ  the filter bank [L, 2K]: each φ_k(t), and its alternating twin (-1)^t φ_k(t)
    M  the weights of an STU

Papers: "Spectral State Space Models" (arXiv 2312.06837), "Flash STU" (2409.10489), "SpectraLDS"
(2505.17868).
"""

import json
import math
import shutil
import sys
import tempfile
from collections import namedtuple
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.fft import irfft, rfft
from torch.utils.checkpoint import checkpoint

# Two optional libraries for CUDA. Plain PyTorch gives the same results without them.
try:
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None
try:
    from flashfftconv import FlashFFTConv
except ImportError:
    FlashFFTConv = None

# ---- 1. Settings ---------------------------------------------------------------------------------


def check_integer(name, value, least=1):
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        wanted = "a positive integer" if least == 1 else f"an integer >= {least}"
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    return int(value)


def check_number(name, value, most=1e6):
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= most:
        raise ValueError(f"{name} must be a number from 0 to {most:g}, got {value!r}")
    return float(value)


def check_floating(dtype):
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating-point, got {dtype}")


def check_heads(d_model, n_heads):
    if d_model % (2 * n_heads) != 0:
        raise ValueError(f"{n_heads = } does not divide {d_model} into heads of even size")


def check_window(value):
    """A window w, or flash-attn's way to write it, (w, 0) -> w."""
    if isinstance(value, tuple | list) and len(value) == 2 and value[1] == 0:
        value = value[0]
    return check_integer("window_size, w or (w, 0),", value, least=0)


@dataclass
class FlashSTUConfig:
    n_embd: int = 1536  # width d of the model
    n_layers: int = 26  # layers 0, 2, 4, ... are STU, layers 1, 3, 5, ... attention
    n_heads: int = 8  # of an attention layer
    seq_len: int = 8192  # length of the filters; inputs may be longer
    window_size: int = 1024  # a token attends to itself and to so many tokens before it
    num_eigh: int = 24  # number of eigenvectors
    vocab_size: int = 200064
    mlp_scale: float = 4.0  # hidden width of the MLP, as a multiple of n_embd
    bias: bool = False  # in the linear layers
    dropout: float = 0.0
    use_hankel_L: bool = False  # filters of the Hankel matrix that holds decays of both signs
    use_approx: bool = True  # STU-T, the factored layer; False: the full STU
    use_tensorized: bool = False  # filters that are Kronecker products of short ones
    use_flash_fft: bool = True  # FlashFFTConv, where it is installed
    use_stu: bool = True  # False: attention in every layer
    use_attn: bool = True  # False: STU in every layer
    softcap: float = 50.0  # bound on attention logits; 0 turns it off
    stu_enable_mlp_sandwich: bool = False  # put each STU between two linear layers, see the block
    stu_mlp_hidden_size: int | None = None  # its width there; None: that of the MLP
    d_in_tile: int | None = None  # the full STU computes so many input channels at a time
    d_out_tile: int | None = None  # and so many output channels: less memory, same results
    use_gradient_checkpointing: bool = False  # compute layers again in the backward pass
    torch_dtype: str = "bfloat16"  # of the weights; to train, choose "float32" and autocast

    def __post_init__(self):
        for name in ("n_embd", "n_layers", "n_heads", "seq_len", "num_eigh", "vocab_size"):
            setattr(self, name, check_integer(name, getattr(self, name)))
        for name in ("stu_mlp_hidden_size", "d_in_tile", "d_out_tile"):
            if getattr(self, name) is not None:
                setattr(self, name, check_integer(name, getattr(self, name)))
        for name in ("mlp_scale", "dropout", "softcap"):
            setattr(self, name, check_number(name, getattr(self, name)))
        flags = ["bias", "use_hankel_L", "use_approx", "use_tensorized", "use_flash_fft", "use_stu"]
        flags += ["use_attn", "stu_enable_mlp_sandwich", "use_gradient_checkpointing"]
        for name in flags:
            if not isinstance(getattr(self, name), bool | np.bool_):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
            setattr(self, name, bool(getattr(self, name)))
        self.window_size = check_window(self.window_size)
        self.torch_dtype = str(self.torch_dtype).removeprefix("torch.")  # text, as JSON wants it
        if self.torch_dtype not in ("float64", "float32", "bfloat16", "float16"):
            raise ValueError(f"torch_dtype must be a floating-point dtype, got {self.torch_dtype}")
        if not self.use_stu and not self.use_attn:
            raise ValueError("use_stu and use_attn are both False: no layer is left")
        if self.use_attn:
            check_heads(self.n_embd, self.n_heads)

    def to_dict(self):
        return asdict(self)

    def stu_options(self):
        return {
            "use_approx": self.use_approx,
            "use_hankel_L": self.use_hankel_L,
            "use_tensorized": self.use_tensorized,
            "use_flash_fft": self.use_flash_fft,
            "d_in_tile": self.d_in_tile,
            "d_out_tile": self.d_out_tile,
        }


# ---- 2. The filters ------------------------------------------------------------------------------
#
# The Hankel matrix of the paper is an integral over all decays α between 0 and 1,
#     Z_ij = 2 / ((i+j)^3 - (i+j)) = ∫ (1-α)² α^(i-1) α^(j-1) dα,    i, j = 1..L.
# (A matrix is called Hankel if an entry depends on i + j alone.) The second Hankel matrix of the
# paper, "Hankel-L", holds decays of both signs: its integral of (1-α²)² α^(i+j-2) is over -1..1.
#
# The integral is a sum over many values of α, so Z = G Gᵀ, where G has one column for each α:
#     G[t, α] = √dα (1-α) α^t.
# The left singular vectors of G are the eigenvectors of Z, and we never build Z. This is not only
# cheaper, it is what makes the filters right. The eigenvalues of Z fall so fast that from about the
# 16th on, at short lengths, an eigenvector of Z in float64 is nothing but rounding noise. The
# singular values of G are their square roots, which fall half as fast.


def get_spectral_filters(seq_len, K, use_hankel_L=False, device=None, dtype=torch.float32):
    """The top K eigenvectors of the Hankel matrix, leading one first: phi [seq_len, K].

    As in the papers each is multiplied by the fourth root of its eigenvalue.
    """
    L = check_integer("seq_len", seq_len)
    K = check_integer("num_eigh", K)
    check_floating(dtype)
    # We place the decays as α = exp(-rate), with log(rate) evenly spaced: in this variable the
    # plain sum converges exponentially fast. The fastest decay forgets in one step. The slowest is
    # constant over L lags, or so slow that its weight (1-α)² dα is nothing in float64.
    spacing = 0.1
    slowest = max(-12 - math.log(L), -21)
    rate = np.exp(np.arange(3.8, slowest, -spacing))
    d_alpha = spacing * rate * np.exp(-rate)
    exponent = 2 if use_hankel_L else 1
    weight = np.sqrt(d_alpha) * -np.expm1(-exponent * rate)  # √dα (1-α) or √dα (1-α²)
    t = np.arange(L)
    G = torch.from_numpy(np.exp(-np.outer(t, rate)) * weight)  # [L, number of decays]
    if use_hankel_L:
        G = both_signs(G)
    # The SVD of the tall G, by way of the small R: G = Q R = Q (U diag(σ) Vᵀ).
    Q, R = torch.linalg.qr(G)
    U, sigma, _ = torch.linalg.svd(R)
    if K > len(sigma):
        raise ValueError(f"length {L} has {len(sigma)} filters, got num_eigh = {K}")
    phi = Q @ U[:, :K] * sigma[:K].sqrt()  # the eigenvalue is σ², its fourth root √σ
    # An eigenvector has no sign of its own. We make each positive at its first lag. (Those of
    # Hankel-L are zero at every second lag, so there we look at the first two.)
    first = phi[:2].sum(dim=0) if use_hankel_L else phi[0]
    phi = phi * first.sign()
    return phi.to(device=device, dtype=dtype)


def both_signs(phi):
    """Decays α^t become decays of both signs, α^t and (-α)^t: [L, K] -> [L, 2K]."""
    sign = (-1) ** torch.arange(len(phi), device=phi.device)
    return torch.cat([phi, sign[:, None] * phi], dim=1)


def stu_formula(x, bank, M):
    """The layer as the papers define it (2312.06837, section 2; 2409.10489, equation 1):

        y_t = Σ_k M⁺_k U⁺_tk + M⁻_k U⁻_tk
        U⁺_tk = Σ_i φ_k(i) x_{t-i},    U⁻_tk = Σ_i (-1)^i φ_k(i) x_{t-i}

    x [B, T, d_in], bank [L, 2K], M [2K, d_in, d_out] (all M⁺, then all M⁻) -> y [B, T, d_out].
    This function is here to be read, and for the tests. The layer below computes it faster.
    """
    outputs = []
    for t in range(x.shape[1]):
        past = x[:, : t + 1].flip(1)  # x_t, x_{t-1}, ..., x_0
        U = torch.einsum("ik,bid->bkd", bank[: t + 1], past)
        outputs.append(torch.einsum("bkd,kdo->bo", U, M))
    return torch.stack(outputs, dim=1)


class FilterBank:
    """The filters Φ [L, 2K] of a layer in float64, and the same as a recurrence (section 7).

    phi [L, K] are base filters or, with use_hankel_L=True, the whole bank. It is no part of a
    module, because a module that is cast to 16 bits must keep its filters.
    """

    def __init__(self, phi, use_hankel_L=False, **fit):
        if not phi.is_floating_point() or not phi.isfinite().all() or not phi.any():
            raise ValueError(f"filters must be finite floating-point numbers, got {phi}")
        phi = phi.detach().double().cpu()
        self.filters = phi if use_hankel_L else both_signs(phi)
        self.lds = fit_recurrence(self.filters, **fit)
        self.made_by = partial(FilterBank, **fit), (phi, use_hankel_L)
        self.copies = {}

    def __reduce__(self):  # a pickle, or a copy, holds only what the bank was made from
        return self.made_by

    @torch.compiler.assume_constant_result
    def on(self, device, dtype):
        """Filters and recurrence there, for an input of this dtype, at least in float32."""
        dtype = torch.promote_types(dtype, torch.float32)
        if (device, dtype) not in self.copies:
            with torch.inference_mode(False):  # a later call may train with them
                filters = self.filters.to(device, dtype, copy=True)
                lds = self.lds and SpectralLDS(*(t.to(device, dtype, copy=True) for t in self.lds))
            self.copies[device, dtype] = filters, lds
        return self.copies[device, dtype]


@lru_cache(maxsize=32)
def standard_bank(seq_len, K, use_hankel_L=False, use_tensorized=False):
    if use_tensorized:
        make = get_tensorized_spectral_filters
    else:
        make = get_spectral_filters
    bank = FilterBank(make(seq_len, K, use_hankel_L, dtype=torch.float64), use_hankel_L)
    bank.made_by = standard_bank, (seq_len, K, use_hankel_L, use_tensorized)
    return bank


# ---- 3. The convolution --------------------------------------------------------------------------


def fft_size(n):
    """A length of at least n for which FFTs are fast: a power of two, or three quarters of one."""
    power = 2 ** math.ceil(math.log2(n))
    return power * 3 // 4 if power * 3 // 4 >= n else power


def fft_conv(u, h, channels=None):
    """Causal convolution of each channel with a filter of its own: y_t = Σ_i h_i u_{t-i}.

    u [B, d, T], h [d, at most T] -> y [B, d, T]. At most so many `channels` are computed at a time.
    """
    B, d, T = u.shape
    n = fft_size(T + h.shape[1] - 1)  # on fewer points the end would wrap around to the beginning
    points = 2**24 if u.is_cuda else 2**19  # measured: with more, the cache does not hold them
    channels = max(1, min(channels or d, points // (B * n)))
    outputs = []
    for u_tile, h_tile in zip(u.split(channels, dim=1), h.split(channels, dim=0)):
        y_f = rfft(u_tile.to(h.dtype), n=n) * rfft(h_tile, n=n)
        outputs.append(irfft(y_f, n=n)[..., :T])
    return torch.cat(outputs, dim=1)


def full_stu_conv(x, filters, M, channels):
    """Σ_k (Φ_k * x) M_k: x [B, T, d_in], filters [at most T, 2K], M [2K, d_in, d_out] -> [B, T, d_out].

    In the frequency domain a convolution is a product. So at each frequency ω the whole layer is
    one matrix Σ_k Φ_k(ω) M_k, and the filters' outputs [B, T, 2K, d_in] are never formed.
    """
    T = x.shape[1]
    _, d_in, d_out = M.shape
    n = fft_size(T + len(filters) - 1)
    x_f = rfft(x.to(filters.dtype), n=n, dim=1).transpose(0, 1)  # [frequencies, B, d_in]
    filters_f = rfft(filters, n=n, dim=0)  # [frequencies, 2K]

    def mix(x_f, filters_f):
        matrices = filters_f @ M.flatten(1).to(filters_f.dtype)
        return x_f @ matrices.view(-1, d_in, d_out)

    # A band of frequencies at a time, so that only 64 matrices exist, also in the backward pass.
    band = max(1, 64 * channels // (d_in * d_out))
    outputs = []
    for x_band, filters_band in zip(x_f.split(band), filters_f.split(band)):
        outputs.append(recompute(mix, x_band, filters_band))
    y_f = torch.cat(outputs).transpose(0, 1)  # [B, frequencies, d_out]
    return irfft(y_f, n=n, dim=1)[:, :T]


def recompute(function, *inputs):
    """function(*inputs), of which the backward pass computes the intermediate results again."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False)


# ---- 4. The STU layer ----------------------------------------------------------------------------


def check_input(x, channels, attention_mask=None):
    """Input [B, T, channels] and mask [B, T or more] -> x, 0 at padding; the last T of the mask."""
    if x.ndim != 3 or x.shape[1] < 1 or x.shape[2] != channels or not x.is_floating_point():
        wanted = f"floating-point [batch, length >= 1, {channels} channels]"
        raise ValueError(f"input must be {wanted}, got {x.dtype} {list(x.shape)}")
    if attention_mask is None:
        return x, None
    mask = check_mask(attention_mask, *x.shape[:2])
    return x.masked_fill(~mask[:, :, None], 0), mask


def check_mask(mask, B, T):
    """attention_mask [B, T or more], 1 at tokens, 0 at padding -> its last T columns as booleans."""
    right = mask.ndim == 2 and len(mask) == B and mask.shape[1] >= T
    if right and mask.dtype != torch.bool and not torch.compiler.is_compiling():
        right = ((mask == 0) | (mask == 1)).all()
    if not right:
        wanted = f"[{B}, at least {T}], 1 at tokens and 0 at padding"
        raise ValueError(f"attention_mask must be {wanted}, got {mask.dtype} {list(mask.shape)}")
    return mask[:, -T:].bool()


class STU(nn.Module):
    """Spectral transform unit: [B, T, d_in] -> [B, T, d_out] for any T >= 1, causal.

    The full STU (use_approx=False) has a matrix M [2K, d_in, d_out], a linear map for each filter.
    STU-T factors it, M_k = M_inputs · diag(M_filters[k]). Then y = (x M_inputs) * (Φ M_filters): a
    projection, and a convolution of each channel with one filter that is learned in the span of Φ.
    Each branch, φ and its alternating twin, has its own rows of M_filters. Were they shared, as in
    the published code, every odd lag would cancel.

    options: use_approx and others of FlashSTUConfig. precomputed_filters: a FilterBank, or base
    filters [seq_len, K]. backend: "fft" convolves an input that fits into seq_len, "lds" recurs.
    """

    def __init__(
        self,
        d_in,
        d_out,
        seq_len,
        num_eigh=24,
        *,
        precomputed_filters=None,
        backend="fft",
        **options,
    ):
        super().__init__()
        c = FlashSTUConfig(seq_len=seq_len, num_eigh=num_eigh, **options)
        self.config = c
        self.d_in = check_integer("d_in", d_in)
        self.d_out = check_integer("d_out", d_out)
        if backend not in ("fft", "lds"):
            raise ValueError(f'backend must be "fft" or "lds", got {backend!r}')
        self.backend = backend
        self.bank = precomputed_filters
        self.has_own_filters = self.bank is not None
        if self.bank is None:
            self.bank = standard_bank(c.seq_len, c.num_eigh, c.use_hankel_L, c.use_tensorized)
        elif not isinstance(self.bank, FilterBank):
            self.bank = FilterBank(self.bank, c.use_hankel_L)
        L, n_filters = self.bank.filters.shape
        if L != c.seq_len:
            raise ValueError(f"filters must have length seq_len = {c.seq_len}, got {L}")
        if c.use_approx:
            self.M_inputs = nn.Parameter(torch.empty(d_in, d_out))
            self.M_filters = nn.Parameter(torch.empty(n_filters, d_out))
        else:
            self.M = nn.Parameter(torch.empty(n_filters, d_in, d_out))
        self.reset_parameters()
        # Filters that were given are saved and loaded with the weights (section 10).
        self.register_state_dict_post_hook(save_own_filters)
        self.register_load_state_dict_pre_hook(load_own_filters)

    def reset_parameters(self):
        """White input of unit variance gives output of about unit variance."""
        gain = self.bank.filters.norm().item()  # √(Σ_k |Φ_k|²)
        if self.config.use_approx:
            nn.init.normal_(self.M_inputs, std=self.d_in**-0.5)
            nn.init.normal_(self.M_filters, std=1 / gain)
        else:
            nn.init.normal_(self.M, std=self.d_in**-0.5 / gain)

    def forward(self, x, state=None, use_cache=False, attention_mask=None):
        """x [B, T, d_in] -> y [B, T, d_out], or with use_cache (y, state).

        An input may come in pieces of any size: begin with state None, then give the state that
        the last call returned. A call uses the state up that it is given.
        attention_mask [B, T] is 0 at padding, which leaves no trace.
        """
        x, _ = check_input(x, self.d_in, attention_mask)
        in_pieces = use_cache or state is not None or x.shape[1] > self.config.seq_len
        if in_pieces or self.backend == "lds":
            y, state = self.go_on(x, state)  # section 7
        else:
            y = self.convolve(x)
        return (y, state) if use_cache else y

    def convolve(self, x):
        """The layer as one convolution over the whole sequence."""
        B, T, _ = x.shape
        c = self.config
        if B == 0:  # which FFTs refuse
            return x.new_zeros(0, T, self.d_out)
        filters, _ = self.bank.on(x.device, x.dtype)
        filters = filters[:T]
        if not c.use_approx:
            channels = (c.d_in_tile or self.d_in) * (c.d_out_tile or self.d_out)
            return full_stu_conv(x, filters, self.M, channels).to(x.dtype)
        # One matrix product for the whole batch, channels first, as the FFT wants them.
        u = self.M_inputs.T @ x.flatten(0, 1).T  # [d_out, B T]
        u = u.view(self.d_out, B, T).transpose(0, 1)  # [B, d_out, T]
        with torch.autocast(x.device.type, enabled=False):
            h = self.M_filters.T.to(filters.dtype) @ filters.T  # [d_out, T], one filter a channel
            if c.use_flash_fft and FlashFFTConv is not None and on_cuda_16_bit(u):
                y = flash_fft_conv(u, h)  # section 9
            else:
                y = fft_conv(u, h, c.d_out_tile)
        return y.transpose(1, 2).to(u.dtype)

    def go_on(self, x, state):
        """The layer as a recurrence that begins at a state -> y, the state after x."""
        _, lds = self.bank.on(x.device, x.dtype)
        if lds is None:
            return self.go_on_from_inputs(x, state)
        if self.config.use_approx:
            u = x @ self.M_inputs
            M = self.M_filters
        else:
            u = x
            M = self.M
        B, T, d = u.shape
        n = len(lds.b)
        if state is None:
            state = start_state(lds.b.new_zeros(B, n, d))
        (S,) = state.memory
        check_state(S, [B, n, d])
        with torch.autocast(x.device.type, enabled=False):
            recurrence = recur_one if T == 1 else recur
            y, S_after = recurrence(u.to(S.dtype), S, lds, M.to(S.dtype))
        position = keep(state.position, state.position + T)
        return y.to(u.dtype), LayerState((keep(S, S_after),), position)

    def go_on_from_inputs(self, x, state):
        """Where no recurrence fits the filters, what is remembered is the last seq_len inputs."""
        if state is None:
            state = start_state(x[:, :0])
        (past,) = state.memory
        check_state(past, [len(x), past.shape[1], self.d_in])
        inputs = torch.cat([past.to(x.dtype), x], dim=1)
        y = self.convolve(inputs)[:, -x.shape[1] :]
        past = inputs[:, -self.config.seq_len :].clone()  # a slice would hold on to all of it
        return y, LayerState((past,), state.position + x.shape[1])


# ---- 5. Sliding-window attention -----------------------------------------------------------------


def rotary_angles(position, head_size):
    """cos and sin [T, head_size / 2] of the angles by which tokens at these positions [T] turn."""
    # In float32 the angles would be wrong after 10^5 tokens. (Apple's GPUs have no float64.)
    dtype = torch.float32 if position.device.type == "mps" else torch.float64
    half = head_size // 2
    rate = 10000.0 ** (-torch.arange(half, device=position.device, dtype=dtype) / half)
    angle = position[:, None] * rate
    return angle.cos().float(), angle.sin().float()


def rotate(x, rotation):
    """Turn each pair of channels (i, i + half) of x [B, H, T, head_size] by the angle of its token."""
    cos, sin = rotation
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1)


def attend(q, k, v, q_position, k_position, window, softcap):
    """softmax(q kᵀ / √head_size) v, where a query sees its own position and the `window` before.

    q [B, H, queries, head_size], k and v [B, H, keys, head_size], positions [B, queries or keys].
    With softcap > 0 the logits are bounded smoothly: softcap · tanh(logits / softcap).
    """
    lag = q_position[:, :, None] - k_position[:, None, :]
    visible = (lag >= 0) & (lag <= window)
    visible = visible[:, None]  # the same for every head
    if softcap == 0:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    q = q * (q.shape[-1] ** -0.5 / softcap)  # q is smaller than the logits
    logits = softcap * torch.tanh(q @ k.transpose(-2, -1))
    logits = logits.masked_fill(~visible, -math.inf)
    return logits.softmax(dim=-1) @ v


def windowed_attention(q, k, v, window, softcap=0.0, position=None):
    """`attend` in O(T · window) time: a tile of queries at a time, and the keys in its reach.

    q [B, H, T, head_size]; k and v [B, H, past + T, head_size], of which the last T belong to the
    queries. position [B, past + T] of the keys, by default 0, 1, 2, ...
    """
    if position is None:
        position = torch.arange(k.shape[2], device=k.device)[None]
    tile = 512 if q.is_cuda else 128
    q_tiles = q.split(tile, dim=2)
    # Keys are cut as the queries are, behind a tile 0 that holds the past. They are cut once, by
    # `split`, because the gradient of each slice would be as long as the whole.
    sizes = [k.shape[2] - q.shape[2]]
    sizes += [q_tile.shape[2] for q_tile in q_tiles]
    k_tiles = k.split(sizes, dim=2)
    v_tiles = v.split(sizes, dim=2)
    position_tiles = position.split(sizes, dim=1)
    reach = math.ceil(window / tile)  # in tiles
    outputs = []
    for i, q_tile in enumerate(q_tiles, start=1):
        near = slice(max(0, i - reach), i + 1)
        k_near = torch.cat(k_tiles[near], dim=2)
        v_near = torch.cat(v_tiles[near], dim=2)
        k_position = torch.cat(position_tiles[near], dim=1)
        y = attend(q_tile, k_near, v_near, position_tiles[i], k_position, window, softcap)
        outputs.append(y)
    return torch.cat(outputs, dim=2)


FAR_AWAY = 2**40  # further than any window reaches


class SlidingWindowAttention(nn.Module):
    """Causal multi-head attention to oneself and the window before, called as an STU is."""

    def __init__(self, d_model, n_heads, window_size=1024, softcap=50.0, bias=False):
        super().__init__()
        check_heads(d_model, n_heads)
        self.d_model = d_model
        self.n_heads = n_heads
        self.head_size = d_model // n_heads
        self.window = check_window(window_size)
        self.softcap = check_number("softcap", softcap)
        self.c_attn = nn.Linear(d_model, 3 * d_model, bias)
        self.c_proj = nn.Linear(d_model, d_model, bias)
        self.q_norm = nn.RMSNorm(self.head_size, eps=1e-6)
        self.k_norm = nn.RMSNorm(self.head_size, eps=1e-6)

    def forward(self, x, state=None, use_cache=False, attention_mask=None, rotation=None):
        """x [B, T, d_model] -> y, or with use_cache (y, state). rotation: from rotary_angles."""
        x, mask = check_input(x, self.d_model, attention_mask)
        B, T, _ = x.shape
        start = 0 if state is None else state.position
        position = start + torch.arange(T, device=x.device)
        if rotation is None:
            rotation = rotary_angles(position, self.head_size)
        qkv = self.c_attn(x).view(B, T, 3, self.n_heads, self.head_size)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, head_size]
        q = rotate(self.q_norm(q), rotation).to(v.dtype)
        k = rotate(self.k_norm(k), rotation).to(v.dtype)
        position = position[None]  # [1, T], or with a mask [B, T]
        if mask is not None:
            # Padding is where no token looks. (Among itself it may look: a softmax over nothing
            # would be NaN.)
            position = torch.where(mask, position, position - FAR_AWAY)
        if state is not None:
            y, state = self.go_on(q, k, v, position, state)
        else:
            if flash_attn_func is not None and mask is None and on_cuda_16_bit(q):
                y = flash_attention(q, k, v, self.window, self.softcap)  # section 9
            else:
                y = windowed_attention(q, k, v, self.window, self.softcap, position)
            if use_cache:
                state = write_to_ring(start_ring(k, self.window), k, v, position)  # section 7
        y = self.c_proj(y.transpose(1, 2).flatten(2))
        return (y, state) if use_cache else y

    def go_on(self, q, k, v, position, state):
        """Attention to what the state holds and to the new tokens -> y, the state after them."""
        keys, values, positions = state.memory
        check_state(keys, [len(k), k.shape[1], self.window + 1, self.head_size])
        if q.shape[2] == 1:
            state = write_to_ring(state, k, v, position)
            keys, values, positions = state.memory
            y = attend(q, keys, values, position, positions, self.window, self.softcap)
            return y, state
        keys = torch.cat([keys, k], dim=2)
        values = torch.cat([values, v], dim=2)
        positions = torch.cat([positions, position.expand(len(k), -1)], dim=1)
        y = windowed_attention(q, keys, values, self.window, self.softcap, positions)
        return y, write_to_ring(state, k, v, position)


# ---- 6. Block and model --------------------------------------------------------------------------


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, d_model, width, bias):
        super().__init__()
        self.gate_proj = nn.Linear(d_model, width, bias)
        self.up_proj = nn.Linear(d_model, width, bias)
        self.down_proj = nn.Linear(width, d_model, bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class FlashSTUBlock(nn.Module):
    """x + mixer(norm(x)), then x + MLP(norm(x)). The mixer is an STU, or attention.

    Give a config, or the sizes and any other field of FlashSTUConfig by name.
    """

    def __init__(
        self,
        d_model=None,
        sequence_length=None,
        num_filters=24,
        use_attention=False,
        *,
        config=None,
        **options,
    ):
        super().__init__()
        if config is not None and (d_model or sequence_length or options):
            raise ValueError("give a block either a config, or sizes and options")
        c = config
        if c is None:
            options["use_attn"] = use_attention
            c = FlashSTUConfig(d_model, seq_len=sequence_length, num_eigh=num_filters, **options)
        d = c.n_embd
        mlp_width = int(d * c.mlp_scale)
        stu_width = d
        self.use_attention = use_attention
        self.sandwich = None
        if c.stu_enable_mlp_sandwich and not use_attention:
            stu_width = c.stu_mlp_hidden_size or mlp_width
            up = nn.Linear(d, stu_width, c.bias)
            down = nn.Linear(stu_width, d, c.bias)
            self.sandwich = nn.ModuleList([up, down])
        if use_attention:
            self.mixer = SlidingWindowAttention(d, c.n_heads, c.window_size, c.softcap, c.bias)
        else:
            self.mixer = STU(stu_width, stu_width, c.seq_len, c.num_eigh, **c.stu_options())
        self.mixer_norm = nn.RMSNorm(d, eps=1e-6)
        self.mlp_norm = nn.RMSNorm(d, eps=1e-6)
        self.mlp = MLP(d, mlp_width, c.bias)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x, state=None, use_cache=False, attention_mask=None, rotation=None):
        """x [B, T, d] -> x, or with use_cache (x, state)."""
        h = self.mixer_norm(x)
        if self.sandwich is not None:
            h = F.silu(self.sandwich[0](h))
        if self.use_attention:
            h = self.mixer(h, state, use_cache, attention_mask, rotation)
        else:
            h = self.mixer(h, state, use_cache, attention_mask)
        if use_cache:
            h, state = h
        if self.sandwich is not None:
            h = self.sandwich[1](h)
        x = x + self.dropout(h)
        x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return (x, state) if use_cache else x


class Output(namedtuple("Output", "loss logits state")):
    """What a model returns; output.loss and output["loss"] are the same."""

    def __getitem__(self, key):
        return getattr(self, key) if isinstance(key, str) else super().__getitem__(key)


def check_ids(ids, vocab_size, least=0):
    """Token ids or labels [B, T] of any integer type -> int64."""
    right = isinstance(ids, torch.Tensor) and ids.ndim == 2 and ids.shape[1] >= 1
    if not right or "int" not in str(ids.dtype):
        got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, torch.Tensor) else ids
        raise ValueError(f"input_ids and labels must be integers [batch, length >= 1], got {got}")
    # On a GPU, which stops at a wrong id by itself, looking at the values would make it wait.
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = ids[(ids < least) | (ids >= vocab_size)]
        if len(wrong) > 0:
            raise ValueError(f"token id {wrong[0]} is not in [0, {vocab_size})")
    return ids.long()


class LanguageModel(nn.Module):
    """Embedding, n_layers blocks, norm, and the embedding again as output matrix: the part of
    FlashSTU (section 8) that trains."""

    def __init__(self, config):
        super().__init__()
        self.config = c = replace(config)  # a copy, of which every setting is checked again
        self.gradient_checkpointing = c.use_gradient_checkpointing
        self.tok_emb = nn.Embedding(c.vocab_size, c.n_embd)
        self.dropout = nn.Dropout(c.dropout)
        self.layers = nn.ModuleList()
        for i in range(c.n_layers):
            use_attention = not c.use_stu or (c.use_attn and i % 2 == 1)
            self.layers.append(FlashSTUBlock(config=c, use_attention=use_attention))
        self.norm = nn.RMSNorm(c.n_embd, eps=1e-6)
        nn.init.normal_(self.tok_emb.weight, std=0.02)
        # 2 n_layers branches add up in the residual stream. The last matrix of each is scaled
        # down, so that the sum has the same size at any depth.
        last_matrices = (
            "mixer.M",
            "mixer.M_filters",
            "mixer.c_proj.weight",
            "mlp.down_proj.weight",
        )
        with torch.no_grad():
            for name, p in self.layers.named_parameters():
                if name.endswith(last_matrices):
                    p *= (2 * c.n_layers) ** -0.5
        self.to(getattr(torch, c.torch_dtype))

    def hidden(self, input_ids, state=None, use_cache=False, attention_mask=None):
        """Token ids [B, T] -> normalised output of the last layer [B, T, d], and a state.

        The state is a list with one entry a layer, or None without use_cache; see STU.forward.
        attention_mask [B, T or more] is 0 at padding; its last T columns count.
        """
        ids = check_ids(input_ids, self.config.vocab_size)
        B, T = ids.shape
        if attention_mask is not None:
            attention_mask = check_mask(attention_mask, B, T)
        position = torch.arange(T, device=ids.device)
        if state is None:
            state = [None] * len(self.layers)
        elif len(state) != len(self.layers):
            raise ValueError(f"a state of {len(state)} layers, but there are {len(self.layers)}")
        else:
            position = position + state[0].position
        # The angles are computed once, and handed to all layers.
        rotation = rotary_angles(position, self.config.n_embd // self.config.n_heads)
        x = self.dropout(self.tok_emb(ids))
        state_after = []
        for layer, layer_state in zip(self.layers, state):
            inputs = x, layer_state, use_cache, attention_mask, rotation
            x = recompute(layer, *inputs) if self.gradient_checkpointing else layer(*inputs)
            if use_cache:
                x, layer_state = x
                state_after.append(layer_state)
        return self.norm(x), state_after if use_cache else None

    def logits(self, x):
        """Output of the last layer [..., d] -> logits [..., vocab_size]."""
        return F.linear(x, self.tok_emb.weight)

    def forward(self, input_ids, labels=None, state=None, use_cache=False):
        """Ids [B, T] -> Output(loss, logits [B, T, vocab_size], state).

        With labels, usually the input_ids themselves, there is a loss and no logits: the mean
        cross-entropy, in nats, of predicting labels[:, t + 1] at position t. Labels of -100 do not
        count. The last token predicts nothing, so it is not read: begin the next call with it.
        """
        if labels is None:
            x, state = self.hidden(input_ids, state, use_cache)
            return Output(None, self.logits(x), state)
        labels = check_ids(labels, self.config.vocab_size, least=-100)
        if labels.shape != input_ids.shape or labels.shape[1] < 2:
            got = f"{list(labels.shape)} for input_ids {list(input_ids.shape)}"
            raise ValueError(f"labels must have the shape of input_ids, length > 1, got {got}")
        x, state = self.hidden(input_ids[:, :-1], state, use_cache)
        return Output(self.loss(x.flatten(0, 1), labels[:, 1:].flatten()), None, state)

    def loss(self, x, targets):
        """Mean cross-entropy of x [N, d] against targets [N]."""

        def summed_loss(x, targets):
            return F.cross_entropy(self.logits(x).float(), targets, reduction="sum")

        # At most 2^26 logits exist at a time (256 MB), also in the backward pass.
        rows = max(1, 2**26 // self.config.vocab_size)
        total = 0.0
        for x_part, targets_part in zip(x.split(rows), targets.split(rows)):
            total = total + recompute(summed_loss, x_part, targets_part)
        return total / (targets != -100).sum().clamp(min=1)


# ---- 7. Going on from a state --------------------------------------------------------------------
#
# Here the second half of the file begins. A layer reads an input in pieces if it remembers what it
# needs of the pieces before: attention its last keys and values, an STU the state of a linear
# dynamical system that has the filters as its answer to an impulse.
#
# Such a system exists because the filters are mixtures of decays, Φ(t) = Σ_α c_α α^t. One could use
# these decays themselves as a diagonal A. But slow decays resemble each other, their coefficients
# are huge and cancel, and in float32 the weakest filters would be lost. So we use a chain of
# sections, one for each pole p. Section i holds one number S_i. What enters it is v_i, what leaves
# it enters the next section, and the input u enters the first:
#     S_i  ←  p S_i + g v_i,      v_{i+1} = g S_i - p v_i,      g = √(1-p²)    (S_i as it was before)
# The matrix [p g; g -p] is a reflection, so S_i² + v_{i+1}² after the step is S_i² + v_i² before
# it: no section adds or loses energy. Hence the answers of the n sections to an impulse,
# ψ(t) = A^t b, are orthonormal signals. All states have a like size, the coefficients C of a filter
# are no larger than its norm, and float32 is right to 1e-6. (This is the Takenaka-Malmquist basis.)

# A^0, A^1, ..., A^chunk [chunk + 1, n, n], b [n], C [2K, n]
SpectralLDS = namedtuple("SpectralLDS", "powers b C")
# What a layer remembers, tensors [B, ...], and how many tokens it has read, a tensor [].
LayerState = namedtuple("LayerState", "memory position")


def fit_recurrence(filters, n_pairs=None, chunk=64, fade=1e-5, tolerance=1e-6):
    """The system S_t = A S_{t-1} + b u_t, y_t = C S_t that answers an impulse with the filters [L, 2K].

    It has 2 n_pairs poles, by default as many as any K needs. The result is None if its error is
    more than `tolerance` of the largest filter value: Kronecker products are no such mixture.
    """
    phi = filters.numpy()
    L = len(phi)
    if n_pairs is None:
        n_pairs = max(56, round(5 * math.log(8 * L)))
    # Poles ±α, with memories from 1/8 of a step to L steps.
    alpha = np.exp(-np.exp(np.linspace(-math.log(L), math.log(8), n_pairs)))
    poles = np.stack([alpha, -alpha], axis=1).flatten()
    n = len(poles)
    # Every signal is written as a row of numbers: how much of S_1, ..., S_n and of u it holds.
    A = np.zeros((n, n))
    b = np.zeros(n)
    enters = np.zeros(n + 1)
    enters[n] = 1.0  # u enters the first section
    for i, p in enumerate(poles):
        g = math.sqrt((1 - p) * (1 + p))
        S_i = np.zeros(n + 1)
        S_i[i] = 1.0
        becomes = p * S_i + g * enters
        A[i] = becomes[:n]
        b[i] = becomes[n]
        enters = g * S_i - p * enters
    psi = [b]
    for _ in range(L - 1):
        psi.append(A @ psi[-1])
    psi = np.stack(psi)  # [L, n], ψ(t) = A^t b
    # Least squares for the lags t < L. The filters are undefined past L, where the fit may grow, so
    # fade² times its energy there is added. Since ψ is orthonormal over all t, and the energy past
    # L is that of C A^L, the matrix of the normal equations is I - (1 - fade²) A^L (A^L)ᵀ.
    A_L = np.linalg.matrix_power(A, L)
    gram = np.eye(n) - (1 - fade**2) * A_L @ A_L.T
    C = np.linalg.solve(gram, psi.T @ phi).T
    error = np.abs(psi @ C.T - phi).max() / np.abs(phi).max()
    norm_past_L = np.linalg.norm(C @ A_L, axis=1).max() / np.linalg.norm(phi, axis=0).max()
    if error > tolerance or norm_past_L > 5e4 * tolerance:
        return None
    powers = np.stack([np.linalg.matrix_power(A, i) for i in range(chunk + 1)])
    return SpectralLDS(torch.from_numpy(powers), torch.from_numpy(b), torch.from_numpy(C))


def recur_one(u, S, lds, M):
    """One token by the definition: u [B, 1, d], S [B, n, d] -> y [B, 1, d_out], S after it.

    M is [2K, d] for STU-T, where d_out = d, or [2K, d, d_out] for the full STU.
    """
    A = lds.powers[1]
    S = A @ S + lds.b[:, None] * u
    filtered = lds.C @ S  # [B, 2K, d], what the filters give
    if M.ndim == 2:
        y = (filtered * M).sum(dim=1)
    else:
        y = filtered.flatten(1) @ M.flatten(0, 1)
    return y[:, None], S


def recur(u, S, lds, M):
    """The same for u [B, T, d] -> y [B, T, d_out], S after the last token: chunk by chunk.

    Within a chunk, y is the answer to the inputs of the chunk, y_t = Σ_i C A^(t-i) b u_i, and the
    answer to the state before the chunk, y_t = C A^(t+1) S.
    """
    powers, b, C = lds
    B, T, d = u.shape
    size = min(T, len(powers) - 1)  # of a chunk
    psi = powers[:size] @ b  # [size, n]
    states = []  # before each chunk
    for chunk in u.split(size, dim=1):
        states.append(S)
        r = chunk.shape[1]
        S = powers[r] @ S + psi[:r].flip(0).T @ chunk  # A^r S + Σ_i A^(r-1-i) b u_i
    states = torch.stack(states)  # [chunks, B, n, d]
    chunks = F.pad(u, (0, 0, 0, len(states) * size - T))  # zeros after the end
    chunks = chunks.view(B, len(states), size, d).transpose(0, 1)  # [chunks, B, size, d]

    t = torch.arange(size, device=u.device)
    lag = t[:, None] - t
    to_inputs = (psi @ C.T)[lag.clamp(min=0)] * (lag >= 0)[:, :, None]  # [t, i, 2K], filter values
    to_states = C @ powers[1 : size + 1]  # [t, 2K, n]
    if M.ndim == 2:  # STU-T: one filter a channel, for all chunks at once
        to_inputs = torch.einsum("tik,kd->tid", to_inputs, M)
        to_states = torch.einsum("tkn,kd->tnd", to_states, M)
        y = torch.einsum("tid,cbid->cbtd", to_inputs, chunks)
        y = y + torch.einsum("tnd,cbnd->cbtd", to_states, states)
    else:  # chunk by chunk, because the filters' outputs are large

        def mix(chunk, S):
            filtered = torch.einsum("tik,bid->btkd", to_inputs, chunk)
            filtered = filtered + torch.einsum("tkn,bnd->btkd", to_states, S)
            return filtered.flatten(2) @ M.flatten(0, 1)

        y = torch.stack([recompute(mix, chunk, S) for chunk, S in zip(chunks, states)])
    y = y.transpose(0, 1).flatten(1, 2)  # [B, chunks * size, d_out]
    return y[:, :T], S


def start_state(*memory):
    position = torch.zeros((), dtype=torch.long, device=memory[0].device)
    return LayerState(memory, position)


def check_state(memory, shape):
    if list(memory.shape) != shape:
        got = list(memory.shape)
        raise ValueError(f"this layer, with this batch, wants a state {shape}, got {got}")


def keep(old, new):
    """`new`; in the memory of `old`, unless gradients are asked for.

    So a stream of tokens allocates nothing, and a CUDA graph finds each state where it was.
    """
    return new if torch.is_grad_enabled() else old.copy_(new)


def start_ring(k, window):
    """The empty state of attention for keys like k [B, H, T, head_size]: a ring of window + 1 slots.

    Token t goes to slot t mod (window + 1), where it replaces the one that just left the window.
    A slot knows the position of its token, so the ring need not be put in order.
    """
    B, H, _, head_size = k.shape
    keys = k.new_zeros(B, H, window + 1, head_size)
    positions = torch.full((B, window + 1), -2 * FAR_AWAY, device=k.device)  # of an empty slot
    return start_state(keys, keys.clone(), positions)


def write_to_ring(state, k, v, position):
    """The state after tokens with keys and values [B, H, T, head_size] at positions [B or 1, T]."""
    keys, values, positions = state.memory
    if torch.is_grad_enabled():
        keys, values, positions = keys.clone(), values.clone(), positions.clone()
    T = k.shape[2]
    n_slots = keys.shape[2]
    n_new = min(T, n_slots)  # of a longer piece only the end stays
    slot = (state.position + torch.arange(T - n_new, T, device=k.device)) % n_slots
    keys.index_copy_(2, slot, k[:, :, -n_new:])
    values.index_copy_(2, slot, v[:, :, -n_new:])
    positions.index_copy_(1, slot, position[:, -n_new:].expand(len(k), -1))
    return LayerState((keys, values, positions), keep(state.position, state.position + T))


def select_rows(state, rows):
    """A new state of a model, whose row i goes on from row rows[i] of `state`, which stays as it is.

    So one repeats a prompt for several answers, rows = [0, 0, 0], or shares a prefix by a copy.
    """
    selected = []
    for layer_state in state:
        memory = []
        for t in layer_state.memory:
            memory.append(t[torch.as_tensor(rows, device=t.device)])
        selected.append(LayerState(tuple(memory), layer_state.position.clone()))
    return selected


# ---- 8. Writing text -----------------------------------------------------------------------------


class FlashSTU(LanguageModel):
    """The language model of section 6, with what one does with it: write text, save, load."""

    def generate(self, input_ids, max_length=None, max_new_tokens=None, **options):
        """Prompt [B, T] -> prompt and what follows. max_length counts both. Options: see stream."""
        if (max_length is None) == (max_new_tokens is None):
            raise ValueError("give one of the two lengths, max_length or max_new_tokens")
        ids = check_ids(input_ids, self.config.vocab_size)
        if max_new_tokens is None:
            max_new_tokens = check_integer("max_length", max_length) - ids.shape[1]
        new = [token[:, None] for token in self.stream(ids, max_new_tokens, **options)]
        return torch.cat([ids, *new], dim=1)

    def stream(
        self,
        input_ids,
        max_new_tokens,
        temperature=1.0,
        top_k=None,
        top_p=None,
        stop_token=None,
        generator=None,
        state=None,
    ):
        """Yield the next token of every row, [B], one after another, each at the same cost.

        temperature 0 takes the likeliest token. top_k, top_p: see sample. Ends early when every
        row has produced stop_token; rows that have, repeat it.
        state: a list, empty or as an earlier call left it, which is kept up to date. It has read
        all but the last token that was yielded, so the next call's input_ids begin with that one.
        A model with dropout wants eval() before.
        """
        ids = check_ids(input_ids, self.config.vocab_size)
        check_integer("max_new_tokens", max_new_tokens, least=0)
        check_number("temperature", temperature)
        if top_k is not None:
            check_integer("top_k", top_k, least=0)
        if top_p is not None and check_number("top_p", top_p, most=1.0) == 0:
            raise ValueError("top_p must be > 0, got 0")
        if stop_token is not None:
            check_integer("stop_token", stop_token, least=0)
            if stop_token >= self.config.vocab_size:
                raise ValueError(f"stop_token must be in the vocabulary, got {stop_token}")
        if state is None:
            state = []
        choose = partial(
            sample, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
        )
        return self.tokens(ids, max_new_tokens, choose, stop_token, state)

    @torch.no_grad()
    def tokens(self, ids, max_new_tokens, choose, stop_token, state):
        """The generator behind `stream`."""
        stopped = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for _ in range(max_new_tokens):
            # The prompt in pieces, so that memory is bounded; then one token at a time.
            for piece in ids.split(self.config.seq_len, dim=1):
                x, state[:] = self.hidden(piece, state or None, use_cache=True)
            token = choose(self.logits(x[:, -1]).float())
            if stop_token is not None:
                token = token.masked_fill(stopped, stop_token)
                stopped = stopped | (token == stop_token)
            yield token
            if len(ids) > 0 and stopped.all():
                return
            ids = token[:, None]

    def save_pretrained(self, folder):
        """Write model.safetensors, config.json and a copy of this file into the folder."""
        write_folder(self, Path(folder))  # section 10

    @classmethod
    def from_pretrained(cls, folder, device="cpu"):
        """The model in a folder that save_pretrained wrote, ours or that of transformers.

        It is in eval mode. No code from the folder is run. A ValueError says what is wrong there.
        """
        config, tensors = read_folder(Path(folder))
        with torch.device("meta"):  # without memory: the tensors that were read take the place
            model = cls(config)
        try:
            model.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            raise ValueError(f"{folder}: config.json and weights do not fit: {error}") from error
        return model.to(device).eval()


def sample(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Logits [B, vocab_size] -> a token for each row, [B].

    Only the top_k likeliest tokens are considered (None or 0: all), and of these only the likeliest
    that together have the probability top_p.
    """
    best = logits.max(dim=-1, keepdim=True).values
    if not best.isfinite().all():
        raise ValueError("the logits must be finite; do the weights hold NaN?")
    if temperature == 0:
        return logits.argmax(dim=-1)
    tokens = None
    if top_k or top_p:
        count = min(top_k or logits.shape[1], logits.shape[1])
        logits, tokens = logits.topk(count)  # likeliest first
    probs = ((logits - best).double() / temperature).softmax(dim=-1)
    if top_p:
        reached_before = probs.cumsum(dim=-1) - probs
        probs = probs * (reached_before < top_p)
    choice = torch.multinomial(probs, 1, generator=generator)
    if tokens is not None:
        choice = tokens.gather(1, choice)
    return choice[:, 0]


# ---- 9. Variants ---------------------------------------------------------------------------------


def get_tensorized_spectral_filters(n, k, use_hankel_L=False, device=None, dtype=torch.float32):
    """Kronecker products φ_i ⊗ φ_j of short filters, as published: [n, k'²] from 2 k' short ones.

    The short ones have length side = ⌈√(n-2)⌉, and there are k' = min(k, side) of them.
    """
    check_floating(dtype)
    side = math.ceil(max(n - 2, 1) ** 0.5)
    short = get_spectral_filters(side, min(k, side), use_hankel_L, dtype=torch.float64)
    phi = torch.kron(short, short)[:n]
    phi = F.pad(phi, (0, 0, 0, n - len(phi)))  # zeros where side² < n
    return phi.to(device=device, dtype=dtype)


def on_cuda_16_bit(x):
    """What flash-attn and FlashFFTConv take."""
    return x.is_cuda and x.element_size() == 2


def flash_attention(q, k, v, window, softcap):
    """windowed_attention by flash-attn, whose layout is [B, T, H, head_size]."""
    q = q.transpose(1, 2)
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    y = flash_attn_func(q, k, v, causal=True, window_size=(window, 0), softcap=softcap)
    return y.transpose(1, 2)


def flash_fft_conv(u, h):
    """fft_conv by FlashFFTConv: u [B, d, T] in 16 bits, h [d, T] in float32.

    It computes on a power of two of points, at least 256, and takes channels by sixteens.
    """
    _, d, T = u.shape
    n = 2 ** max(8, (2 * T - 1).bit_length())
    more_time = n // 2 - T
    more_channels = -d % 16
    u = F.pad(u, (0, more_time, 0, more_channels)).contiguous()
    h = F.pad(h, (0, n // 2 - h.shape[1], 0, more_channels)).contiguous()
    return flash_fft(n, u.dtype, u.device)(u, h)[:, :d, :T]


@lru_cache(maxsize=16)
def flash_fft(n, dtype, device):
    # Not kept in a layer, where its tables would become part of the state_dict.
    return FlashFFTConv(n, dtype=dtype).to(device)


# ---- 10. Saving and loading ----------------------------------------------------------------------

HF_CONFIG = {  # what transformers looks for in a config.json, to find the classes of section 11
    "model_type": "flash_stu",
    "architectures": ["FlashSTUForCausalLM"],
    "tie_word_embeddings": True,
    "auto_map": {
        "AutoConfig": "stu.FlashSTUPretrainedConfig",
        "AutoModel": "stu.FlashSTUModel",
        "AutoModelForCausalLM": "stu.FlashSTUForCausalLM",
    },
}


def save_own_filters(stu, state_dict, prefix, _):
    """A hook of STU.state_dict: filters that the layer was given are saved, the standard ones not."""
    if stu.has_own_filters:
        state_dict[prefix + "filters"] = stu.bank.filters


def load_own_filters(stu, state_dict, prefix, *_):
    """A hook of STU.load_state_dict."""
    filters = state_dict.pop(prefix + "filters", None)
    if filters is None:
        return
    stu.bank = FilterBank(filters, use_hankel_L=True)  # the whole bank
    stu.has_own_filters = True
    name = "M_filters" if stu.config.use_approx else "M"
    M = getattr(stu, name)
    if len(M) != filters.shape[1]:  # there may be more or fewer of them
        setattr(stu, name, nn.Parameter(M.new_empty(filters.shape[1], *M.shape[1:])))


WEIGHTS = "model.safetensors"
SHARDS = "model.safetensors.index.json"  # transformers cuts large models, and lists the parts here
CONFIG = "config.json"


def write_folder(model, folder):
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = replace(model.config, torch_dtype=model.tok_emb.weight.dtype).to_dict() | HF_CONFIG
    text = json.dumps(config, indent=2)
    tensors = {name: t.contiguous() for name, t in model.state_dict().items()}
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as part:
        part = Path(part)
        save_file(tensors, part / WEIGHTS, metadata={"format": "pt", "config": text})
        (part / CONFIG).write_text(text)
        shutil.copyfile(__file__, part / "stu.py")
        # Wherever this is killed, one whole model is there: without config.json, the config that
        # the weights carry counts. So new weights never meet an old config.
        (folder / CONFIG).unlink(missing_ok=True)
        (folder / SHARDS).unlink(missing_ok=True)
        for name in (WEIGHTS, "stu.py", CONFIG):
            (part / name).replace(folder / name)


def read_folder(folder):
    """Config and tensors of a saved model."""
    from safetensors import SafetensorError, safe_open

    files = [WEIGHTS]
    if (folder / SHARDS).exists():
        if (folder / WEIGHTS).exists():
            raise ValueError(f"{folder} holds {WEIGHTS} and {SHARDS}: remove the one that is old")
        files = sorted(set(read_json(folder / SHARDS)["weight_map"].values()))
    tensors = {}
    for file in files:
        if not (folder / file).is_file():
            raise ValueError(f"a saved model (RUN/model) has a {file}; there is none in {folder}")
        try:
            with safe_open(folder / file, framework="pt") as part:
                metadata = part.metadata() or {}
                for name in part.keys():  # noqa: SIM118 (it is no dict)
                    tensors[name.removeprefix("model.")] = part.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{folder / file} is damaged: {error}") from error
    # Fine-tuning may add an output matrix, which for us is the embedding.
    embedding = tensors.get("tok_emb.weight")
    output = tensors.pop("lm_head.weight", embedding)
    if embedding is None or not torch.equal(output, embedding):
        raise ValueError(f"{folder}: no tok_emb.weight, or an lm_head.weight that is not the same")
    if "config" in metadata and not (folder / CONFIG).exists():
        values = json.loads(metadata["config"])
    else:
        values = read_json(folder / CONFIG)
    values["torch_dtype"] = embedding.dtype  # transformers calls it dtype
    names = [field.name for field in fields(FlashSTUConfig)]
    missing = [name for name in names if name not in values]
    if missing:
        raise ValueError(f"{folder / CONFIG} lacks {', '.join(missing)}")
    config = FlashSTUConfig(**{name: values[name] for name in names})
    n_layers = len({name.split(".")[1] for name in tensors if name.startswith("layers.")})
    if n_layers != config.n_layers:  # before so many are made
        raise ValueError(f"{folder}: {CONFIG} has {config.n_layers} layers, the weights {n_layers}")
    return config, tensors


def read_json(path):
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


# ---- 11. Hugging Face ----------------------------------------------------------------------------
#
# The same model as transformers wants it. A saved folder holds a copy of this file, and its
# config.json names the classes below. They exist if transformers was imported before this file,
# as it is when transformers itself loads a folder; by hand, write `import transformers, stu`.


release = getattr(sys.modules.get("transformers"), "__version__", "0.0")  # 0.0: not imported
major, minor = release.split(".")[:2]


def __getattr__(name):  # asked by Python for what this file does not define
    if f"stu.{name}" in HF_CONFIG["auto_map"].values():
        raise ImportError(f"stu.{name} needs transformers 4.57 or later, imported before stu")
    raise AttributeError(f"stu.py has no {name}")


if (int(major), int(minor)) >= (4, 57):
    from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.utils import can_return_tuple

    try:
        from transformers.utils.output_capturing import capture_outputs
    except ImportError:  # as it was called before
        from transformers.utils.generic import check_model_inputs as capture_outputs

    # Trainer, for one, shifts the labels that it smooths only for models in this table.
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[HF_CONFIG["model_type"]] = "FlashSTUForCausalLM"

    # Arguments that say where texts begin are taken and not used: positions are relative, and
    # texts packed into one row see each other, as in train.py.
    NOT_USED = ["position_ids", "cache_position", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k"]
    NOT_USED += ["max_length_q", "max_length_k"]

    class FlashSTUPretrainedConfig(PretrainedConfig):
        model_type = HF_CONFIG["model_type"]
        _auto_class = "AutoConfig"
        attribute_map = {  # noqa: RUF012
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "max_position_embeddings": "seq_len",
        }

        def __init__(self, **options):
            defaults = FlashSTUConfig().to_dict()
            del defaults["torch_dtype"]  # transformers keeps it itself
            super().__init__(**defaults | HF_CONFIG | options)

        def to_flash_stu(self):
            names = [field.name for field in fields(FlashSTUConfig) if field.name != "torch_dtype"]
            options = {name: getattr(self, name) for name in names}
            # Where transformers makes a model, the dtype it wants is the default of torch.
            return FlashSTUConfig(**options, torch_dtype=torch.get_default_dtype())

    class FlashSTUCache:
        """The state after `length` tokens. A call that is given it brings it up to date."""

        is_compileable = False
        is_croppable = False
        is_linear = (False,)  # `generate`, given all ids again, leaves out those it has read

        def __init__(self):
            self.state = None
            self.length = 0

        def get_seq_length(self, layer_idx=0):
            return self.length

        def batch_select_indices(self, indices):
            self.state = select_rows(self.state, indices)

        reorder_cache = batch_select_indices  # as beam search calls it

        def batch_repeat_interleave(self, repeats):
            batch_size = len(self.state[0].memory[0])
            self.batch_select_indices(torch.arange(batch_size).repeat_interleave(repeats))

    class FlashSTUDecoder(FlashSTU):
        """FlashSTU, called and answering as transformers wants it of a model without a head."""

        def forward(
            self,
            input_ids,
            attention_mask=None,
            past_key_values=None,
            cache=None,  # the new name of past_key_values
            use_cache=False,
            **others,
        ):
            for name, value in others.items():
                if name not in NOT_USED and value is not None and value is not False:
                    raise ValueError(f"FlashSTU takes no {name}")
            if cache is None:
                cache = past_key_values
            use_cache = use_cache or cache is not None
            if cache is None:
                cache = FlashSTUCache()
            if not isinstance(cache, FlashSTUCache):
                raise ValueError(f"FlashSTU takes a cache of its own, got {type(cache).__name__}")
            if attention_mask is not None:
                mask = check_mask(attention_mask, *input_ids.shape)
                # Padding matters to tokens that come after it: here, or in a later call.
                before_token = ~mask[:, :-1] & mask[:, 1:]
                matters = not mask.all() if use_cache else before_token.any()
                attention_mask = mask if matters else None
            x, cache.state = self.hidden(input_ids, cache.state, use_cache, attention_mask)
            cache.length += input_ids.shape[1]
            return BaseModelOutputWithPast(x, cache if use_cache else None)

    class FlashSTUModel(PreTrainedModel):
        """Ids [B, T] -> normalised output of the last layer [B, T, d]."""

        config_class = FlashSTUPretrainedConfig
        base_model_prefix = "model"
        supports_gradient_checkpointing = True
        _no_split_modules = ("FlashSTUBlock",)
        _can_record_outputs = {"hidden_states": FlashSTUBlock}  # noqa: RUF012
        _is_stateful = True  # it cannot take back a token
        _supports_sdpa = True  # one may ask for "sdpa" or "eager": it is the same

        def __init__(self, config):
            super().__init__(config)
            self.model = FlashSTUDecoder(config.to_flash_stu())
            self.add_head()
            self.post_init()

        def add_head(self):
            pass

        def get_input_embeddings(self):
            return self.model.tok_emb

        def set_input_embeddings(self, embedding):
            self.model.tok_emb = embedding
            self.model.config.vocab_size = len(embedding.weight)

        def init_weights(self):
            self.tie_weights()  # FlashSTU has drawn them

        def _init_weights(self, module):  # weights that a folder lacks
            if isinstance(module, STU):
                module.reset_parameters()
            else:
                super()._init_weights(module)

        @capture_outputs
        def forward(self, input_ids, output_hidden_states=None, **options):
            return self.model(input_ids, **options)  # the decorator adds the hidden states

    class FlashSTUForCausalLM(FlashSTUModel, GenerationMixin):
        """Ids [B, T] -> logits [B, T, vocab_size], and with labels their loss."""

        _tied_weights_keys = {"lm_head.weight": "model.tok_emb.weight"}  # noqa: RUF012

        def add_head(self):
            self.lm_head = nn.Linear(self.config.n_embd, self.config.vocab_size, bias=False)

        @can_return_tuple
        def forward(
            self,
            input_ids,
            attention_mask=None,
            past_key_values=None,
            cache=None,
            labels=None,
            logits_to_keep=0,  # so many at the end, 0: all; or a tensor of positions
            num_items_in_batch=None,
            **options,
        ):
            # As a parameter it would be one that Trainer expects in every data set.
            shift_labels = options.pop("shift_labels", None)
            options |= {"past_key_values": past_key_values, "cache": cache, "return_dict": True}
            output = dict(super().forward(input_ids, attention_mask=attention_mask, **options))
            x = output.pop("last_hidden_state")
            if isinstance(logits_to_keep, int):
                logits_to_keep = slice(-logits_to_keep, None)  # x[:, -0:] is all of x
            logits = self.lm_head(x[:, logits_to_keep])
            loss = None
            if labels is not None or shift_labels is not None:
                vocab_size = logits.shape[-1]
                options = {"shift_labels": shift_labels}
                loss = self.loss_function(logits, labels, vocab_size, num_items_in_batch, **options)
            return CausalLMOutputWithPast(loss, logits, **output)

        def prepare_inputs_for_generation(
            self, input_ids, next_sequence_length=None, tokenizer=None, **kwargs
        ):
            n_new = next_sequence_length  # of the ids; None: all of them are new
            if n_new is not None and n_new < 1:  # transformers would read all of them once more
                raise ValueError("give all ids: those that the cache has read, and more")
            return super().prepare_inputs_for_generation(
                input_ids, next_sequence_length=n_new, **kwargs
            )

        @classmethod
        def _supports_default_dynamic_cache(cls):
            return False  # the first call makes a FlashSTUCache
