"""
Flash STU in one file: a language model of spectral transform units and sliding-window attention.

    from stu import STU, FlashSTU, FlashSTUConfig

It needs PyTorch and NumPy (to save and load a model also safetensors).

The idea. A linear dynamical system turns inputs x into outputs y through a hidden state h,
    h_t = A h_{t-1} + b x_t,    y_t = C h_t.
After an impulse the state is b, A b, A² b, ..., so along an eigenvector of A with eigenvalue α it
decays as 1, α, α², α³, ... A recurrent layer has to learn these α, which is hard when the memory is
long. A spectral transform unit (STU) does not learn them. It filters its input with a few fixed
signals, and what it learns is linear: how to mix its inputs, and how to weigh the filtered signals.
These signals are chosen so that each decay, for any α from 0 to 1, is very nearly a weighted sum of
them. Section 2 finds the best such signals: they are the top eigenvectors of one fixed matrix.

How to read this file. Sections 1 to 6 are a complete language model that trains: settings, filters,
convolution, the STU layer, attention, block and model. Sections 7 to 11 are what a user wants
besides: to go on from a state, to write text, variants, saving and loading, Hugging Face.

The letters:
    B  batch size
    T  length of the input at hand
    d  number of channels; a layer maps d_in channels to d_out
    L  length of the filters; as a setting it is called `seq_len`
    K  number of eigenvectors; the papers' code calls it `num_eigh`
    φ  the eigenvectors, signals of length L: phi [L, K]
    Φ  the filter bank [L, 2K]: each φ_k(t), for decays with α > 0, and its alternating twin
       (-1)^t φ_k(t), for α < 0
    M  the weights of an STU, a matrix for each filter: [2K, d_in, d_out]

Papers: "Spectral State Space Models" (arXiv 2312.06837), "Flash STU" (2409.10489), "SpectraLDS"
(2505.17868).
"""

import cmath
import json
import math
import shutil
import sys
import tempfile
from collections import namedtuple
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, lru_cache, partial
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.polynomial import legendre
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
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    return int(value)


def check_number(name, value, most=1e6):
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= most:
        raise ValueError(f"{name} must be a number from 0 to {most:g}, got {value!r}")
    return float(value)


def check_flag(name, value):
    if value is not True and value is not False:
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_window(value):
    """A window w, which may also be written as flash-attn does, (w, 0) -> w."""
    if isinstance(value, tuple | list) and len(value) == 2 and value[1] == 0:
        value = value[0]
    return check_integer("window_size", value, least=0)


def check_heads(d_model, n_heads):
    if d_model % (2 * n_heads) != 0:
        # (Even, because the rotary embedding turns pairs of channels.)
        raise ValueError(f"{n_heads = } does not cut {d_model} channels into heads of even size")


def check_floating(dtype):
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating-point, got {dtype}")


@dataclass
class FlashSTUConfig:
    n_embd: int = 1536  # width d of the model
    n_layers: int = 26  # layers 0, 2, 4, ... are STU, layers 1, 3, 5, ... attention
    n_heads: int = 8  # of an attention layer
    seq_len: int = 8192  # length of the filters; inputs may be longer
    window_size: int = 1024  # a token attends to itself and this many tokens before it
    num_eigh: int = 24  # number of eigenvectors
    vocab_size: int = 200064  # that of the tokenizer o200k_base, rounded up
    mlp_scale: float = 4.0  # hidden width of the MLP, as a multiple of n_embd
    bias: bool = False  # in the linear layers
    dropout: float = 0.0
    use_hankel_L: bool = False  # filters of another matrix, see section 2
    use_approx: bool = True  # True: STU-T, which has fewer weights; False: the full STU (section 4)
    use_tensorized: bool = False  # filters that are Kronecker products, see section 9
    use_flash_fft: bool = True  # FlashFFTConv, where it is installed
    use_stu: bool = True  # False: attention in every layer
    use_attn: bool = True  # False: STU in every layer
    softcap: float = 50.0  # bound on attention logits; 0 turns it off
    stu_enable_mlp_sandwich: bool = False  # put each STU between two linear layers
    stu_mlp_hidden_size: int | None = None  # width of the STU between them; None: that of the MLP
    # To save memory. STU-T convolves at most d_out_tile channels at a time. A full STU has a matrix
    # [d_in, d_out] for each frequency, and computes with 64 of them at a time; with tiles, with as
    # many as have 64 · d_in_tile · d_out_tile entries, but at least one. None: d_in and d_out.
    d_in_tile: int | None = None
    d_out_tile: int | None = None
    use_gradient_checkpointing: bool = False  # compute layers again in the backward pass
    torch_dtype: str = "bfloat16"  # of the weights, as published. To train, choose "float32"
    max_angle: float = 0.0  # the fastest oscillation that the filters span, in degrees a step

    def __post_init__(self):
        for name in ("n_embd", "n_layers", "n_heads", "seq_len", "num_eigh", "vocab_size"):
            setattr(self, name, check_integer(name, getattr(self, name)))
        for name in ("stu_mlp_hidden_size", "d_in_tile", "d_out_tile"):
            if getattr(self, name) is not None:
                setattr(self, name, check_integer(name, getattr(self, name)))
        self.mlp_scale = check_number("mlp_scale", self.mlp_scale)
        self.dropout = check_number("dropout", self.dropout, most=1.0)
        self.softcap = check_number("softcap", self.softcap)
        self.max_angle = check_number("max_angle", self.max_angle, most=90.0)
        for name in ("use_stu", "use_attn", "use_approx", "use_hankel_L", "use_tensorized"):
            check_flag(name, getattr(self, name))
        for name in ("use_flash_fft", "use_gradient_checkpointing", "stu_enable_mlp_sandwich"):
            check_flag(name, getattr(self, name))
        check_flag("bias", self.bias)
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


# ---- 2. The filters ------------------------------------------------------------------------------
#
# Which few signals does one need, so that weighted sums of them come close to every decay? Write
# the decay of α as a vector a = (1, α, α², ...). As in a principal component analysis, the best
# signals are the top eigenvectors of the integral of a aᵀ over all α. With the paper's weight
# (1-α)², under which slow decays do not outweigh the others, it has a closed form, the Hankel
# matrix
#     Z_ij = ∫ (1-α)² α^(i-1) α^(j-1) dα = 2 / ((i+j)³ - (i+j)),    α from 0 to 1, i, j = 1..L.
# The second Hankel matrix of the paper, "Hankel-L", has α from -1 to 1 and the weight (1-α²)². Its
# eigenvectors already contain decays of both signs, so no twins are added, and Φ [L, K] is φ.
#
# We never build Z. An integral is nearly a sum over many values of α, so Z = G Gᵀ, where G has a
# column for each of these α, with the entries √dα (1-α) α^(i-1). The left singular vectors of G are
# the eigenvectors of Z, and the squares of its singular values are the eigenvalues of Z.
#
# This is cheaper, and it is also what makes the filters right. In float64, what is less than 1e-16
# of the largest value is lost in rounding errors. At L = 64 only the first 18 eigenvalues of Z are
# above that. The singular values of G are their square roots, so of these about 36 are above it.


def both_signs(signals):
    """Signals [L, K], and after them their alternating twins: [L, 2K]."""
    sign = (-1) ** torch.arange(len(signals), device=signals.device)
    return torch.cat([signals, sign[:, None] * signals], dim=1)


def get_spectral_filters(
    seq_len, K, use_hankel_L=False, device=None, dtype=torch.float32, max_angle=0.0
):
    """The top K eigenvectors of the Hankel matrix, leading one first: phi [seq_len, K].

    As in the papers each is multiplied by the fourth root of its eigenvalue. With max_angle, in
    degrees, the integral is over decays r e^(iθ), |θ| <= max_angle, and systems that ring can be
    learned too. Measured, that takes about K = 20 + seq_len · max_angle / 180 filters.
    """
    L = check_integer("seq_len", seq_len)
    K = check_integer("num_eigh", K)
    max_angle = check_number("max_angle", max_angle, most=90.0)
    check_floating(dtype)
    # The integral becomes a sum over many decays α = exp(-rate), from those that forget at once to
    # those that remember all of L. The rates of these lie many powers of ten apart, so it is
    # log(rate) that is evenly spaced (the trapezoid rule). For smooth functions that go to zero at
    # both ends, as ours does, its error is tiny: with half the spacing no filter changes by over
    # 1e-12.
    spacing = 0.1
    log_fastest = 3.8  # this is rate 45, and α = exp(-45) is nothing after one step
    # The sum may end where either a decay is as good as constant over L lags (rate · L = exp(-12))
    # or its weight (1-α)² dα is next to nothing (less than 1e-27 at log(rate) = -21).
    log_slowest = max(-12 - math.log(L), -21)
    rate = np.exp(np.arange(log_fastest, log_slowest, -spacing))
    d_alpha = spacing * rate * np.exp(-rate)  # |dα| = α rate d(log rate)
    exponent = 2 if use_hankel_L else 1
    root_of_weight = -np.expm1(-exponent * rate)  # 1-α, or 1-α² for Hankel-L
    t = np.arange(L)
    G = np.sqrt(d_alpha) * root_of_weight * np.exp(-np.outer(t, rate))  # [L, number of decays]
    G = torch.from_numpy(G)
    if use_hankel_L:
        G = both_signs(G)
    # The SVD of G by way of a smaller matrix: G = Q R = Q (U diag(σ) Vᵀ).
    Q, R = torch.linalg.qr(G)
    U, sigma, _ = torch.linalg.svd(R)
    phi = Q @ U
    if max_angle > 0:
        # Instead of G we take the thinner matrix with the columns σ_k φ_k, which has the same
        # product Z. Columns that are no more than rounding errors are left out.
        visible = sigma > 1e-16 * sigma[0]
        thin_G = phi[:, visible] * sigma[visible]
        phi, sigma = filters_of_a_sector(thin_G, K, math.radians(max_angle))  # section 9
    if K > len(sigma):
        raise ValueError(f"num_eigh must be at most {len(sigma)} at length {L}, got {K}")
    phi = phi[:, :K]
    phi = phi * sigma[:K].sqrt()  # the eigenvalue is σ², its fourth root √σ
    # An eigenvector has no sign of its own. We make each positive at its first lag. (Those of
    # Hankel-L are zero at every second lag, so there we look at the first two.)
    first = phi[0]
    if use_hankel_L:
        first = phi[:2].sum(dim=0)
    phi = phi * first.sign()
    return phi.to(device=device, dtype=dtype)


def stu_formula(x, bank, M):
    """The layer as the papers define it (2312.06837, section 2; 2409.10489, equation 1):

        y_t = Σ_k M⁺_k U⁺_tk + M⁻_k U⁻_tk
        U⁺_tk = Σ_i φ_k(i) x_{t-i},    U⁻_tk = Σ_i (-1)^i φ_k(i) x_{t-i}

    x [B, T, d_in] with T <= L, bank [L, 2K], M [2K, d_in, d_out] (all M⁺, then all M⁻)
    -> y [B, T, d_out].
    This function is here to be read, and for the tests. The layer below computes it faster.
    """
    outputs = []
    for t in range(x.shape[1]):
        past = x[:, : t + 1].flip(1)  # x_t, x_{t-1}, ..., x_0
        U = torch.einsum("ik,bid->bkd", bank[: t + 1], past)  # k over all 2K filters
        outputs.append(torch.einsum("bkd,kdo->bo", U, M))
    return torch.stack(outputs, dim=1)


def check_filters(filters):
    if not isinstance(filters, torch.Tensor) or filters.ndim != 2:
        raise ValueError("filters must be a tensor [seq_len, number of filters]")
    check_floating(filters.dtype)
    if not filters.isfinite().all() or not filters.any():
        raise ValueError("filters must be finite, and not all zero")


def copy_to(tensor, device, dtype):
    """A copy on this device and of this dtype.

    Tensors that are made under inference_mode could never be used in training. So the copy is made
    outside it, and always, because `to` alone may return the same tensor.
    """
    with torch.inference_mode(False):
        return tensor.to(device, dtype, copy=True)


class FilterBank:
    """The filters Φ [L, 2K] in float64, which all layers that use them share.

    A bank is not a buffer of a module, or model.to(torch.bfloat16) would round the filters.
    fit_options: how `lds` is looked for, see fit_recurrence.
    """

    def __init__(self, filters, standard_args=None, **fit_options):
        check_filters(filters)
        self.filters = filters.detach().double().cpu()
        self.standard_args = standard_args  # of standard_bank, if that made this bank
        self.fit_options = fit_options
        self.filters_copies = {}  # {(device, dtype): copy}
        self.lds_copies = {}

    def __reduce__(self):
        """What pickle and deepcopy keep: a function and its arguments, to make the bank again."""
        if self.standard_args is not None:
            return standard_bank, self.standard_args
        return partial(FilterBank, **self.fit_options), (self.filters,)

    # torch.compile may take the result as a constant: it is the same at every call.
    @torch.compiler.assume_constant_result
    def filters_on(self, device, dtype):
        """The filters for inputs on this device and of this dtype, but at least in float32."""
        dtype = torch.promote_types(dtype, torch.float32)
        if (device, dtype) not in self.filters_copies:
            self.filters_copies[device, dtype] = copy_to(self.filters, device, dtype)
        return self.filters_copies[device, dtype]

    # The rest is for section 7, and can be ignored until then.

    @cached_property
    def lds(self):
        """A recurrence whose answer to an impulse is Φ, or None if none was found."""
        return fit_recurrence(self.filters, **self.fit_options)

    @torch.compiler.assume_constant_result
    def lds_on(self, device, dtype):
        """The recurrence for inputs on this device and of this dtype, or None."""
        dtype = torch.promote_types(dtype, torch.float32)
        if (device, dtype) not in self.lds_copies:
            lds = self.lds
            if lds is not None:
                lds = SpectralLDS(*[copy_to(t, device, dtype) for t in lds])
            self.lds_copies[device, dtype] = lds
        return self.lds_copies[device, dtype]


@lru_cache(maxsize=32)
def standard_bank(seq_len, K, use_hankel_L=False, use_tensorized=False, max_angle=0.0):
    """The bank of eigenvectors; all layers with the same filters share it."""
    if use_tensorized and max_angle > 0:
        raise ValueError(f"with use_tensorized=True max_angle must be 0, got {max_angle}")
    if use_tensorized:
        phi = get_tensorized_spectral_filters(seq_len, K, use_hankel_L, dtype=torch.float64)
    else:
        phi = get_spectral_filters(
            seq_len, K, use_hankel_L, dtype=torch.float64, max_angle=max_angle
        )
    if not use_hankel_L:  # those filters have both signs already
        phi = both_signs(phi)
    args = (seq_len, K, use_hankel_L, use_tensorized, max_angle)
    return FilterBank(phi, args, max_angle=max_angle)  # the recurrence needs the angle, too


# ---- 3. The convolution --------------------------------------------------------------------------


def fft_size(n):
    """A length of at least n for which FFTs are fast: a power of two, or three quarters of one."""
    power = 2 ** math.ceil(math.log2(n))
    shorter = power * 3 // 4
    return shorter if shorter >= n else power


def fft_conv(u, h, most_channels=None):
    """Causal convolution of each channel with a filter of its own: y_t = Σ_i h_i u_{t-i}.

    u [B, d, T], h [d, at most T] -> y [B, d, T]. At most most_channels are computed at a time.
    """
    B, _, T = u.shape
    n = fft_size(T + h.shape[1] - 1)  # on fewer points the end would wrap around to the beginning
    # A few channels at a time. Measured, this is fastest while their spectra fit into the cache.
    most_numbers = 2**24 if u.is_cuda else 2**19  # in a tile [B, channels, n]
    tile = max(1, most_numbers // (B * n))
    if most_channels is not None:
        tile = min(tile, most_channels)
    outputs = []
    for u_tile, h_tile in zip(u.split(tile, dim=1), h.split(tile, dim=0)):
        y_f = rfft(u_tile.to(h.dtype), n=n) * rfft(h_tile, n=n)
        outputs.append(irfft(y_f, n=n)[..., :T])
    return torch.cat(outputs, dim=1)


def recompute(function, *inputs):
    """function(*inputs). The backward pass computes its intermediate results again.

    So they need not be kept in memory until then.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False)


def full_stu_conv(x, filters, M, band):
    """The full STU, y = Σ_k (Φ_k convolved with x) M_k.

    x [B, T, d_in], filters [T or less, 2K], M [2K, d_in, d_out] -> y [B, T, d_out].
    In the frequency domain a convolution is a product. So at each frequency ω the whole layer is
    one matrix Σ_k Φ_k(ω) M_k, and the outputs of all filters, [B, T, 2K, d_in], are never formed.
    The matrices of `band` frequencies exist at a time.
    """
    T = x.shape[1]
    _, d_in, d_out = M.shape
    n = fft_size(T + len(filters) - 1)
    x_f = rfft(x.to(filters.dtype), n=n, dim=1).transpose(0, 1)  # [frequencies, B, d_in]
    filters_f = rfft(filters, n=n, dim=0)  # [frequencies, 2K]
    flat_M = M.flatten(1).to(filters_f.dtype)  # [2K, d_in · d_out]

    def multiply(x_band, filters_band):
        matrices = (filters_band @ flat_M).view(-1, d_in, d_out)  # [band, d_in, d_out]
        return x_band @ matrices  # [band, B, d_out]

    outputs = []
    for x_band, filters_band in zip(x_f.split(band), filters_f.split(band)):
        outputs.append(recompute(multiply, x_band, filters_band))
    y_f = torch.cat(outputs).transpose(0, 1)  # [B, frequencies, d_out]
    return irfft(y_f, n=n, dim=1)[:, :T]


# ---- 4. The STU layer ----------------------------------------------------------------------------


def check_input(x, channels):
    if x.ndim != 3 or x.shape[1] < 1 or x.shape[2] != channels or not x.is_floating_point():
        wanted = f"floating-point [batch, length >= 1, {channels} channels]"
        raise ValueError(f"input must be {wanted}, got {x.dtype} {list(x.shape)}")


def check_mask(mask, B, T):
    """attention_mask, 1 at tokens and 0 at padding, as booleans [B, T].

    When Hugging Face generates text, its mask is of all tokens so far. So it may be longer than the
    input at hand: only its last T columns count.
    """
    valid = mask.ndim == 2 and len(mask) == B and mask.shape[1] >= T
    # (A graph that is compiled cannot depend on the values of a tensor.)
    if valid and mask.dtype != torch.bool and not torch.compiler.is_compiling():
        valid = bool(((mask == 0) | (mask == 1)).all())
    if not valid:
        wanted = f"[{B}, at least {T}], 1 at tokens and 0 at padding"
        raise ValueError(f"attention_mask must be {wanted}, got {mask.dtype} {list(mask.shape)}")
    return mask[:, -T:].bool()


class STU(nn.Module):
    """Spectral transform unit: [B, T, d_in] -> [B, T, d_out] for any T >= 1, causal.

    The full STU (use_approx=False) has a matrix M [2K, d_in, d_out], a linear map for each filter.
    STU-T has fewer weights, M_k = M_inputs · diag(M_filters[k]). Then the layer is a projection
    x M_inputs, and a convolution of each channel with a filter of its own, a column of Φ M_filters.
    Each φ_k and its alternating twin have weights of their own. If they shared them, as they do in
    the published code, the layer would see only the sum φ_k(t) + (-1)^t φ_k(t), which is zero at
    every odd lag t.

    precomputed_filters: other filters than the eigenvectors, phi [seq_len, K], whose alternating
    twins are added unless use_hankel_L; or a whole bank.
    backend: "fft" convolves if the input comes in one piece and is not longer than seq_len, and
    otherwise takes the recurrence of section 7. "lds" always takes the recurrence.
    The options with other names are those of FlashSTUConfig.
    """

    def __init__(
        self,
        d_in,
        d_out,
        seq_len,
        num_eigh=24,
        *,
        use_approx=True,
        use_hankel_L=False,
        use_tensorized=False,
        max_angle=0.0,
        use_flash_fft=True,
        d_in_tile=None,
        d_out_tile=None,
        precomputed_filters=None,
        backend="fft",
    ):
        super().__init__()
        self.d_in = check_integer("d_in", d_in)
        self.d_out = check_integer("d_out", d_out)
        self.seq_len = check_integer("seq_len", seq_len)
        if d_in_tile is None:
            d_in_tile = d_in
        if d_out_tile is None:
            d_out_tile = d_out
        self.d_in_tile = check_integer("d_in_tile", d_in_tile)
        self.d_out_tile = check_integer("d_out_tile", d_out_tile)
        check_flag("use_approx", use_approx)
        check_flag("use_hankel_L", use_hankel_L)
        check_flag("use_tensorized", use_tensorized)
        self.use_approx = use_approx
        self.use_flash_fft = use_flash_fft
        self.backend = backend
        if backend not in ("fft", "lds"):
            raise ValueError(f'backend must be "fft" or "lds", got {backend!r}')

        self.has_own_filters = precomputed_filters is not None
        if precomputed_filters is None:
            self.bank = standard_bank(
                self.seq_len, num_eigh, use_hankel_L, use_tensorized, max_angle
            )
        elif isinstance(precomputed_filters, FilterBank):
            self.bank = precomputed_filters
        elif use_hankel_L:
            self.bank = FilterBank(precomputed_filters)
        else:
            check_filters(precomputed_filters)
            self.bank = FilterBank(both_signs(precomputed_filters))
        L, n_filters = self.bank.filters.shape
        if L != seq_len:
            raise ValueError(f"filters must have the length {seq_len = }, got {L}")
        # Own filters are saved beside the weights, and loaded with them (section 10).
        self.register_state_dict_post_hook(save_own_filters)
        self.register_load_state_dict_pre_hook(load_own_filters)

        if use_approx:
            self.M_inputs = nn.Parameter(torch.empty(d_in, d_out))
            self.M_filters = nn.Parameter(torch.empty(n_filters, d_out))
        else:
            self.M = nn.Parameter(torch.empty(n_filters, d_in, d_out))
        self.reset_parameters()

    def reset_parameters(self):
        """A single layer begins as zero, so at first it disturbs nothing that stands beside it.

        Measured on tasks of copying and looking up: beside an STU with random filters attention
        learns them later, or not at all. On text, with Muon, it is the other way round, so
        LanguageModel calls draw_random_filters. (M_filters and M have a gradient from the first
        step on, M_inputs from the second.)
        """
        if self.use_approx:
            nn.init.normal_(self.M_inputs, std=0.02)
            nn.init.zeros_(self.M_filters)
        else:
            nn.init.zeros_(self.M)

    def draw_random_filters(self):
        """Another start: white input of unit variance gives output of about unit variance.

        For u = x M_inputs this is so with weights of variance 1 / d_in. The filter of a channel,
        Σ_k Φ_k(t) M_filters[k], then has to have Σ_t of its squares 1, on average.
        """
        gain = self.bank.filters.norm().item()  # √(Σ_k |Φ_k|²)
        if self.use_approx:
            nn.init.normal_(self.M_inputs, std=self.d_in**-0.5)
            nn.init.normal_(self.M_filters, std=1 / gain)
        else:
            nn.init.normal_(self.M, std=self.d_in**-0.5 / gain)

    def forward(self, x, state=None, use_cache=False, attention_mask=None):
        """x [B, T, d_in] -> y [B, T, d_out], or with use_cache (y, state).

        An input may come in pieces of any size: begin with state None, then give the state that
        the last call returned. Use a state once: without gradients, a call writes the new state
        into the memory of the old one. To keep one, copy it with select_rows.
        An input may be longer than seq_len. What is further back than that counts less and less, or
        not at all.
        attention_mask [B, T] is 0 at padding, which then counts as an input of zeros.
        """
        check_input(x, self.d_in)
        B, T, _ = x.shape
        if attention_mask is not None:
            mask = check_mask(attention_mask, B, T)
            x = x.masked_fill(~mask[:, :, None], 0)
        in_pieces = use_cache or state is not None
        if in_pieces or T > self.seq_len or self.backend == "lds":
            y, state = self.run_recurrence(x, state)
        else:
            y = self.convolve(x)
        return (y, state) if use_cache else y

    def convolve(self, x):
        """The layer as one convolution over the whole sequence."""
        B, T, _ = x.shape
        if B == 0:  # FFTs refuse that
            return x.new_zeros(0, T, self.d_out)
        filters = self.bank.filters_on(x.device, x.dtype)
        filters = filters[:T]  # lags that the input does not reach are left out
        if not self.use_approx:
            most_entries = 64 * self.d_in_tile * self.d_out_tile
            band = max(1, most_entries // (self.d_in * self.d_out))
            return full_stu_conv(x, filters, self.M, band).to(x.dtype)
        # One matrix product for the whole batch, channels first, as the FFT wants them. (Measured:
        # to transpose x @ M_inputs takes longer.)
        u = self.M_inputs.T @ x.flatten(0, 1).T  # [d_out, B T]
        u = u.view(self.d_out, B, T).transpose(0, 1)  # [B, d_out, T]
        # What follows is in the precision of the filters, float32 or more, also under autocast.
        with torch.autocast(x.device.type, enabled=False):
            h = self.M_filters.T.to(filters.dtype) @ filters.T  # [d_out, T], one filter a channel
            if self.use_flash_fft and FlashFFTConv is not None and on_cuda_16_bit(u):
                y = flash_fft_conv(u, h)  # section 9
            else:
                y = fft_conv(u, h, self.d_out_tile)
        return y.transpose(1, 2).to(u.dtype)

    def run_recurrence(self, x, state):
        """The layer as a recurrence (section 7), from a state on -> y, the state after x."""
        lds = self.bank.lds_on(x.device, x.dtype)
        if lds is None:
            return self.convolve_again(x, state)
        if self.use_approx:
            u = x @ self.M_inputs
            M = self.M_filters
            recurrence = recur
        else:
            u = x
            M = self.M
            recurrence = recur_full_stu
        B, T, d = u.shape
        n = len(lds.b)  # number of states
        if state is None:
            state = STUState(lds.b.new_zeros(B, n, d), zero_count(x))
        S = state.S
        check_state(S, [B, n, d])
        if T == 1:
            recurrence = recur_one
        with torch.autocast(x.device.type, enabled=False):
            y, S = recurrence(u.to(S.dtype), S, lds, M.to(S.dtype))
        S = overwrite(state.S, S)  # in its place in memory, if no gradient is asked for
        n_read = overwrite(state.n_read, state.n_read + T)
        return y.to(u.dtype), STUState(S, n_read)

    def convolve_again(self, x, state):
        """If no recurrence fits the filters: convolve again with the last seq_len inputs."""
        B, T, _ = x.shape
        if state is None:
            state = InputState(x.new_zeros(B, 0, self.d_in), zero_count(x))
        n_before = state.inputs.shape[1]
        check_state(state.inputs, [B, n_before, self.d_in])
        inputs = torch.cat([state.inputs.to(x.dtype), x], dim=1)
        y = self.convolve(inputs)[:, -T:]
        inputs = inputs[:, -self.seq_len :].clone()  # a slice alone would keep all of it in memory
        return y, InputState(inputs, state.n_read + T)


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
    """Turn the pairs of channels (i, i + half) of x [B, H, T, head_size] by rotary_angles."""
    cos, sin = rotation
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1)


# The place of a token decides who sees whom. It is its position p, except that
#     padding is at p - FAR_AWAY, so tokens and padding do not see each other, but padding sees
#     padding (it must see something, because a softmax over nothing is NaN);
#     an empty slot of a state is at -2 · FAR_AWAY, so nothing sees it.
FAR_AWAY = 2**40  # more than any position


def attend(q, k, v, q_place, k_place, window, softcap):
    """softmax(q kᵀ / √head_size) v, where a query sees its own place and the `window` before it.

    q [B, H, queries, head_size], k and v [B, H, keys, head_size], places [B, queries or keys].
    With softcap > 0 the logits are bounded smoothly: softcap · tanh(logits / softcap).
    """
    lag = q_place[:, :, None] - k_place[:, None, :]
    visible = (lag >= 0) & (lag <= window)
    visible = visible[:, None]  # the same for every head
    if softcap == 0:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    # Both divisions, by √head_size and by softcap, are done on q: it has fewer numbers than logits.
    q = q * (q.shape[-1] ** -0.5 / softcap)
    logits = softcap * torch.tanh(q @ k.transpose(-2, -1))
    logits = logits.masked_fill(~visible, -math.inf)
    return logits.softmax(dim=-1) @ v


def windowed_attention(q, k, v, window, softcap=0.0, place=None):
    """`attend` in O(T · window) time: a tile of queries at a time, and the keys in its reach.

    q [B, H, T, head_size]; k and v [B, H, past + T, head_size], of which the last T belong to the
    queries. place [B or 1, past + T] of the keys, by default 0, 1, 2, ...
    """
    if place is None:
        place = torch.arange(k.shape[2], device=k.device)[None]
    tile = 512 if q.is_cuda else 128  # measured to be fast; with any other the result is the same
    q_tiles = q.split(tile, dim=2)
    # Keys are cut like the queries. Tile i of the keys belongs to tile i of the queries, i >= 1.
    # Tile 0 is the past: any number of keys, in any order (their places say which are seen).
    #     keys     | 0: past | 1 | 2 | 3 | ...
    #     queries            | 1 | 2 | 3 | ...
    # (All tiles are cut at once. If each tile of queries had its own slice of the keys, the
    # gradient of every slice would be as long as all keys.)
    sizes = [k.shape[2] - q.shape[2]]
    sizes += [q_tile.shape[2] for q_tile in q_tiles]
    k_tiles = k.split(sizes, dim=2)
    v_tiles = v.split(sizes, dim=2)
    place_tiles = place.split(sizes, dim=1)
    reach = math.ceil(window / tile)  # a query sees its own tile, and at most this many before it
    outputs = []
    for i, q_tile in enumerate(q_tiles, start=1):
        first = max(0, i - reach)
        k_near = torch.cat(k_tiles[first : i + 1], dim=2)
        v_near = torch.cat(v_tiles[first : i + 1], dim=2)
        k_place = torch.cat(place_tiles[first : i + 1], dim=1)
        y = attend(q_tile, k_near, v_near, place_tiles[i], k_place, window, softcap)
        outputs.append(y)
    return torch.cat(outputs, dim=2)


class SlidingWindowAttention(nn.Module):
    """Causal multi-head attention to oneself and the window before.

    state and use_cache are as in STU.forward. attention_mask [B, T] is 0 at padding, which tokens
    do not see.
    """

    def __init__(self, d_model, n_heads, window_size=1024, softcap=50.0, bias=False):
        super().__init__()
        self.d_model = check_integer("d_model", d_model)
        self.n_heads = check_integer("n_heads", n_heads)
        check_heads(d_model, n_heads)
        self.head_size = d_model // n_heads
        self.window = check_window(window_size)
        self.softcap = check_number("softcap", softcap)
        self.c_attn = nn.Linear(d_model, 3 * d_model, bias)
        self.c_proj = nn.Linear(d_model, d_model, bias)
        self.q_norm = nn.RMSNorm(self.head_size, eps=1e-6)
        self.k_norm = nn.RMSNorm(self.head_size, eps=1e-6)

    def forward(self, x, state=None, use_cache=False, attention_mask=None, rotation=None):
        """x [B, T, d_model] -> y, or with use_cache (y, state). rotation: from rotary_angles."""
        check_input(x, self.d_model)
        B, T, _ = x.shape
        position = torch.arange(T, device=x.device)
        if state is not None:
            position = state.n_read + position
        if rotation is None:
            rotation = rotary_angles(position, self.head_size)
        place = position[None]  # [1, T], the same in every row
        if attention_mask is not None:
            mask = check_mask(attention_mask, B, T)
            x = x.masked_fill(~mask[:, :, None], 0)  # (whatever it holds, NaN too)
            place = torch.where(mask, position, position - FAR_AWAY)  # [B, T]

        qkv = self.c_attn(x).view(B, T, 3, self.n_heads, self.head_size)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, head_size]
        q = rotate(self.q_norm(q), rotation).to(v.dtype)  # (the rotation is in float32)
        k = rotate(self.k_norm(k), rotation).to(v.dtype)
        is_first_piece = state is None
        if not is_first_piece:
            y, state = self.attend_from_state(q, k, v, place, state)
        elif flash_attn_func is not None and attention_mask is None and on_cuda_16_bit(q):
            y = flash_attention(q, k, v, self.window, self.softcap)  # section 9
        else:
            y = windowed_attention(q, k, v, self.window, self.softcap, place)
        if use_cache and is_first_piece:
            empty = start_ring(k, self.window)  # section 7
            state = write_to_ring(empty, k, v, place)
        y = self.c_proj(y.transpose(1, 2).flatten(2))
        return (y, state) if use_cache else y

    def attend_from_state(self, q, k, v, place, state):
        """Attention to what the state holds and to the new tokens -> y, the state after them."""
        B, _, T, _ = q.shape
        check_state(state.keys, [B, self.n_heads, self.window + 1, self.head_size])
        if T > 1:
            keys = torch.cat([state.keys, k], dim=2)
            values = torch.cat([state.values, v], dim=2)
            places = torch.cat([state.places, place.expand(B, T)], dim=1)
            y = windowed_attention(q, keys, values, self.window, self.softcap, places)
            return y, write_to_ring(state, k, v, place)
        # A single token is written over the one that leaves the window, and then attends to the
        # whole ring. No tensor changes its shape or its place in memory, so a CUDA graph can do it.
        state = write_to_ring(state, k, v, place)
        y = attend(q, state.keys, state.values, place, state.places, self.window, self.softcap)
        return y, state


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

    options: other fields of FlashSTUConfig, by name.
    In the sandwich the mixer is down(STU(silu(up(x)))), with an STU of another width.
    """

    def __init__(self, d_model, sequence_length, num_filters=24, use_attention=False, **options):
        super().__init__()
        options["use_attn"] = use_attention  # if False the config does not look at n_heads
        c = FlashSTUConfig(n_embd=d_model, seq_len=sequence_length, num_eigh=num_filters, **options)
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
            self.mixer = STU(
                stu_width,
                stu_width,
                c.seq_len,
                c.num_eigh,
                use_approx=c.use_approx,
                use_hankel_L=c.use_hankel_L,
                use_tensorized=c.use_tensorized,
                max_angle=c.max_angle,
                use_flash_fft=c.use_flash_fft,
                d_in_tile=c.d_in_tile,
                d_out_tile=c.d_out_tile,
            )
        self.mixer_norm = nn.RMSNorm(d, eps=1e-6)
        self.mlp_norm = nn.RMSNorm(d, eps=1e-6)
        self.mlp = MLP(d, mlp_width, c.bias)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x, state=None, use_cache=False, attention_mask=None, rotation=None):
        """x [B, T, d] -> x, or with use_cache (x, state)."""
        h = self.mixer_norm(x)
        if self.sandwich is not None:
            up, down = self.sandwich
            h = F.silu(up(h))
        if self.use_attention:
            output = self.mixer(h, state, use_cache, attention_mask, rotation)
        else:
            output = self.mixer(h, state, use_cache, attention_mask)
        if use_cache:
            h, state = output
        else:
            h = output
        if self.sandwich is not None:
            h = down(h)
        x = x + self.dropout(h)
        x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return (x, state) if use_cache else x


class Output(namedtuple("Output", "loss logits state")):
    """What a model returns; output.loss and output["loss"] are the same."""

    def __getitem__(self, key):
        return getattr(self, key) if isinstance(key, str) else super().__getitem__(key)


def check_ids(ids, vocab_size, ignored=None):
    """Token ids or labels [B, T] of any integer type -> int64."""
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.shape[1] < 1:
        got = list(ids.shape) if isinstance(ids, torch.Tensor) else ids
        raise ValueError(f"token ids must be a tensor [batch, length >= 1], got {got}")
    if ids.dtype.is_floating_point or ids.dtype == torch.bool:
        raise ValueError(f"token ids must be integers, got {ids.dtype}")
    # (On a GPU looking at the values would be slow. There a wrong id ends in an error of CUDA.)
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = (ids < 0) | (ids >= vocab_size)
        if ignored is not None:
            wrong = wrong & (ids != ignored)
        if wrong.any():
            raise ValueError(f"token id {ids[wrong][0]} is not in [0, {vocab_size})")
    return ids.long()


class TiedEmbedding(nn.Embedding):
    """Token ids [B, T] -> their rows [B, T, d], or vectors [..., d] -> logits [..., vocab_size].

    Both are done here, because libraries that move weights to the GPU only while they are used, as
    accelerate does, watch the calls of a module.
    """

    def forward(self, x):
        if x.is_floating_point():
            return F.linear(x, self.weight)
        return super().forward(x)


class LanguageModel(nn.Module):
    """Embedding, n_layers blocks, norm, and the embedding again as output matrix.

    This is all of the model that training needs. FlashSTU, in section 8, adds what comes after.
    """

    def __init__(self, config):
        super().__init__()
        c = replace(config)  # a copy, for which __post_init__ checks the values again
        self.config = c
        self.gradient_checkpointing = c.use_gradient_checkpointing  # transformers sets it, too
        self.tok_emb = TiedEmbedding(c.vocab_size, c.n_embd)
        self.dropout = nn.Dropout(c.dropout)
        options = c.to_dict()
        for name in ("n_embd", "seq_len", "num_eigh"):  # a block calls these by other names
            del options[name]
        self.layers = nn.ModuleList()
        for i in range(c.n_layers):
            use_attention = not c.use_stu or (c.use_attn and i % 2 == 1)
            block = FlashSTUBlock(c.n_embd, c.seq_len, c.num_eigh, use_attention, **options)
            self.layers.append(block)
        self.norm = nn.RMSNorm(c.n_embd, eps=1e-6)
        nn.init.normal_(self.tok_emb.weight, std=0.02)
        # With Muon, a model of text learns faster if its STUs begin with random filters, not as
        # zero (measured, at every seed).
        for module in self.layers.modules():
            if isinstance(module, STU):
                module.draw_random_filters()
        # The residual stream is the sum of 2 n_layers branches, a mixer and an MLP in each block.
        # As in GPT-2, the last matrix of each is scaled by 1/√(number of branches), so that the sum
        # has the same size at any depth. (In a sandwich the STU is scaled: what follows is linear.)
        scaled_down = (
            "mixer.M",
            "mixer.M_filters",
            "mixer.c_proj.weight",
            "mlp.down_proj.weight",
        )
        with torch.no_grad():
            for name, p in self.layers.named_parameters():
                if name.endswith(scaled_down):
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
        if state is not None and len(state) != len(self.layers):
            raise ValueError(f"a state of {len(state)} layers, but there are {len(self.layers)}")
        position = torch.arange(T, device=ids.device)
        if state is None:
            state = [None] * len(self.layers)
        else:
            position = state[0].n_read + position  # (all layers have read as many tokens)
        # The angles are computed once, and handed to all layers.
        rotation = rotary_angles(position, self.config.n_embd // self.config.n_heads)
        x = self.dropout(self.tok_emb(ids))
        state_after = []
        for layer, layer_state in zip(self.layers, state):
            inputs = (x, layer_state, use_cache, attention_mask, rotation)
            if self.gradient_checkpointing:
                output = recompute(layer, *inputs)
            else:
                output = layer(*inputs)
            if use_cache:
                x, layer_state = output
                state_after.append(layer_state)
            else:
                x = output
        x = self.norm(x)
        return (x, state_after) if use_cache else (x, None)

    def logits(self, x):
        """Output of the last layer [..., d] -> logits [..., vocab_size]."""
        return self.tok_emb(x)

    def forward(self, input_ids, labels=None, state=None, use_cache=False):
        """Ids [B, T] -> Output(loss, logits [B, T, vocab_size], state).

        With labels, usually the input_ids themselves, there is a loss and no logits: the mean
        cross-entropy, in nats, of predicting labels[:, t + 1] at position t. Labels of -100 do not
        count. What follows the last token is not known, so the model reads input_ids[:, :-1] only.
        To go on from the state, begin the next call with the last token.
        """
        if labels is None:
            x, state = self.hidden(input_ids, state, use_cache)
            return Output(None, self.logits(x), state)
        labels = check_ids(labels, self.config.vocab_size, ignored=-100)
        if labels.shape != input_ids.shape or labels.shape[1] < 2:
            got = f"{list(labels.shape)} for input_ids {list(input_ids.shape)}"
            raise ValueError(f"labels must have the shape of input_ids, length > 1, got {got}")
        x, state = self.hidden(input_ids[:, :-1], state, use_cache)
        targets = labels[:, 1:]
        loss = self.loss(x.flatten(0, 1), targets.flatten())
        return Output(loss, None, state)

    def loss(self, x, targets):
        """Mean cross-entropy of x [N, d] against targets [N]."""

        def summed_loss(x, targets):
            return F.cross_entropy(self.logits(x).float(), targets, reduction="sum")

        # The logits of all rows would need much memory. So at most 2^26 are computed at a time, in
        # the backward pass again.
        rows = max(1, 2**26 // self.config.vocab_size)
        total = 0.0
        for x_part, targets_part in zip(x.split(rows), targets.split(rows)):
            total = total + recompute(summed_loss, x_part, targets_part)
        return total / (targets != -100).sum().clamp(min=1)


# ---- 7. Going on from a state --------------------------------------------------------------------
#
# Here the second half of the file begins. To read an input in pieces a layer has to remember
# something of the pieces before: attention its last keys and values, an STU the state S of
#     S_t = A S_{t-1} + b u_t,    the outputs of the filters = C S_t,
# a linear dynamical system whose answer to an impulse, C A^t b, is the filters Φ[t]. (This is for
# one channel, where u_t is a number and S_t has n of them. The code has d channels: S [B, n, d].)
#
# Such a system exists because each filter is a weighted sum of decays. One could take these decays
# for a diagonal A. But slow decays are nearly the same signal. To tell them apart, the weights C
# become large, with both signs, and in float32 the weakest filters are lost. So we use a chain of
# sections instead, one for each decay p:
#     u = v_1 → [S_1] → v_2 → [S_2] → v_3 → ... → [S_n] → v_{n+1}
# Section i holds a number S_i. In each step it takes in v_i, gives v_{i+1} to the next section, and
# then holds another number S'_i:
#     S'_i    = p S_i - g v_i
#     v_{i+1} = g S_i + p v_i,    g = √(1-p²).
# Two things are true of this chain.
# (a) It has the decays that we want. S'_i depends on S_1, ..., S_i only. So A is triangular, and
#     its eigenvalues are the numbers on its diagonal, the p of each section.
# (b) Its answers to an impulse are orthonormal signals. A section turns the pair (S_i, v_i) by an
#     angle, the one with cosine p, and this does not change S_i² + v_i². So a step of the whole
#     chain, from (S, u) to (S', v_{n+1}), does not change the sum of all squares: its matrix is
#     orthogonal. All but its last row is [A b]. These rows, too, are orthonormal, which means
#         I = A Aᵀ + b bᵀ.
#     Between A and Aᵀ there is an I. We put this sum in its place,
#         I = A² (A²)ᵀ + A b (A b)ᵀ + b bᵀ,
#     and so on. What is left of the first term goes to zero, so
#         I = Σ_t ψ(t) ψ(t)ᵀ,    ψ(t) = A^t b.
#     Entry i, j says that Σ_t ψ_i(t) ψ_j(t) is 1 if i = j, and else 0.
# These signals are the Takenaka-Malmquist basis. The weights C of orthonormal signals are about as
# large as the filters, not larger, and float32 is right to 1e-6.

# What a layer returns as its state. `n_read`, a tensor without dimensions, is the number of tokens
# that were read.
STUState = namedtuple("STUState", "S n_read")  # S [B, n, d]
InputState = namedtuple("InputState", "inputs n_read")  # of an STU whose filters have no recurrence
RingState = namedtuple("RingState", "keys values places n_read")  # of attention, see start_ring

# powers [CHUNK + 1, n, n] = A^0, A^1, ..., A^CHUNK; b [n]; C [2K, n]
SpectralLDS = namedtuple("SpectralLDS", "powers b C")
CHUNK = 64  # the most tokens that `recur` reads at once
MOST_STATES = 512  # if a recurrence needed more, a layer would keep its last inputs instead


def real_decays(L):
    """Decays α = exp(-1/steps), from steps = L, a long memory, to 1/8, which is almost none."""
    n_decays = max(56, round(5 * math.log(8 * L)))  # measured: enough for any number of filters
    steps = np.geomspace(L, 1 / 8, n_decays)  # each is the one before times the same number
    return list(np.exp(-1 / steps))


def turn(x, y, cosine):
    """Turn the pair (x, y) by an angle."""
    sine = math.sqrt((1 - cosine) * (1 + cosine))
    return cosine * x - sine * y, sine * x + cosine * y


def chain_step(S, u, decays):
    """One step of the chain described above: it holds S, and u enters -> S'."""
    new = []  # S'
    v = u
    for p in decays:
        i = len(new)
        if p.imag == 0:
            new_i, v = turn(S[i], v, p.real)
            new.append(new_i)
        else:  # a pair of decays that oscillate, see section 9
            new_i, new_j, v = oscillating_step(S[i], S[i + 1], v, p)
            new += [new_i, new_j]
    return np.stack(new)


def fit_recurrence(filters, max_angle=0.0, fade=1e-5, tolerance=1e-6, most_after_L=0.5):
    """The system that answers an impulse with the filters [L, 2K], a SpectralLDS, or None.

    Its decays are real, in pairs α and -α; with max_angle, in degrees, others are added.
    fade: how strongly the answer after lag L is pulled to zero.
    The result is None
      - if an error is more than `tolerance` of the largest value of all filters;
      - if after lag L some answer still has a norm of more than `most_after_L` of the largest norm
        of a filter, as it does for filters that are no sums of decays;
      - if more than MOST_STATES states would be needed.
    """
    Phi = filters.numpy()
    L = len(Phi)
    decays = real_decays(L)
    if max_angle > 0:
        decays += decays_of_a_sector(L, Phi.shape[1], math.radians(max_angle))  # section 9
    # For each p we add -p, for the twins. A complex p stands for itself and its conjugate, so we
    # add its mirror image -p.conjugate(), which again has a positive imaginary part.
    with_mirror_images = []
    for p in decays:
        with_mirror_images += [p, -p.conjugate()]
    n = sum(1 if p.imag == 0 else 2 for p in with_mirror_images)  # a complex one needs two numbers
    if n > MOST_STATES:
        return None
    # A step is linear. So A is what it makes of the unit vectors, and b what it makes of u = 1.
    A = chain_step(np.eye(n), np.zeros(n), with_mirror_images)
    b = chain_step(np.zeros(n), 1.0, with_mirror_images)

    psi = [b]
    for _ in range(L - 1):
        psi.append(A @ psi[-1])
    psi = np.stack(psi)  # [L, n], ψ(t) = A^t b
    # C shall make this small:
    #     Σ_{t<L} |C ψ(t) - Φ(t)|² + fade² Σ_{t>=L} |C ψ(t)|².
    # The first sum is the error. The second is the answer after lag L, where the filters say
    # nothing. It could grow otherwise. The derivative is zero where
    #     (before + fade² · after) Cᵀ = Σ_{t<L} ψ(t) Φ(t)ᵀ,
    #     before = Σ_{t<L} ψ(t) ψ(t)ᵀ,    after = Σ_{t>=L} ψ(t) ψ(t)ᵀ.
    # Since ψ(t + L) = A^L ψ(t), and the sum over all t is I, after = A^L (A^L)ᵀ.
    A_L = np.linalg.matrix_power(A, L)
    after = A_L @ A_L.T
    before = np.eye(n) - after
    C = np.linalg.solve(before + fade**2 * after, psi.T @ Phi).T
    error = np.abs(psi @ C.T - Phi).max()
    # Of filter k the answer after L has the sum of squares C_k · after · C_kᵀ = |C_k A^L|².
    norm_after_L = np.linalg.norm(C @ A_L, axis=1).max()
    if error > tolerance * np.abs(Phi).max():
        return None
    if norm_after_L > most_after_L * np.linalg.norm(Phi, axis=0).max():
        return None
    powers = [np.eye(n)]
    for _ in range(CHUNK):
        powers.append(A @ powers[-1])
    powers = np.stack(powers)
    return SpectralLDS(torch.from_numpy(powers), torch.from_numpy(b), torch.from_numpy(C))


def recur_one(u, S, lds, M):
    """One token, by the definition: u [B, 1, d], S [B, n, d] -> y [B, 1, d_out], S after it.

    M is [2K, d] for STU-T, where d_out = d, or [2K, d, d_out] for the full STU.
    """
    A = lds.powers[1]
    S = A @ S + lds.b[:, None] * u
    filtered = lds.C @ S  # [B, 2K, d], the outputs of the filters
    if M.ndim == 2:
        y = (filtered * M).sum(dim=1)
    else:
        y = filtered.flatten(1) @ M.flatten(0, 1)  # [B, 2K · d] @ [2K · d, d_out]
    return y[:, None], S


def cut_into_chunks(u, S, lds):
    """The inputs [chunks, B, size, d], the states before them [chunks, B, n, d], the last state."""
    size = min(u.shape[1], CHUNK)
    psi = lds.powers[:size] @ lds.b  # [size, n]
    chunks = []
    states = []
    for chunk in u.split(size, dim=1):
        states.append(S)
        r = chunk.shape[1]  # in the last one there may be fewer tokens
        # S after it is A^r S + Σ_i ψ(r-1-i) u_i.
        psi_reversed = psi[:r].flip(0)
        S = lds.powers[r] @ S + psi_reversed.T @ chunk
        chunks.append(F.pad(chunk, (0, 0, 0, size - r)))  # with zeros, up to `size` tokens
    return torch.stack(chunks), torch.stack(states), S


def toeplitz(h):
    """Filters [size, ...] -> matrices [size, size, ...] with h[t-i] in row t, column i."""
    t = torch.arange(len(h), device=h.device)
    lag = t[:, None] - t
    is_yet_to_come = (lag < 0)[:, :, None]
    return h[lag.clamp(min=0)].masked_fill(is_yet_to_come, 0)


def recur(u, S, lds, M):
    """STU-T on many tokens, a chunk at a time: u [B, T, d] -> y [B, T, d], S after the last.

    For token t of a chunk that begins with the state S, the outputs of the filters are
        Σ_{i<=t} C A^(t-i) b u_i + C A^(t+1) S,
    the answer to the inputs of the chunk, and the answer to the state before it. y_t is their sum,
    with the weights M.
    """
    chunks, states, S = cut_into_chunks(u, S, lds)
    size = chunks.shape[2]
    h = lds.powers[:size] @ lds.b @ lds.C.T @ M  # [size, d], the filter of each channel
    state_response = lds.C @ lds.powers[1 : size + 1]  # [t, 2K, n]
    state_response = torch.einsum("tkn,kd->tnd", state_response, M)
    y = torch.einsum("tid,cbid->cbtd", toeplitz(h), chunks)  # c is the chunk
    y = y + torch.einsum("tnd,cbnd->cbtd", state_response, states)
    y = y.transpose(0, 1).flatten(1, 2)  # [B, chunks · size, d]
    return y[:, : u.shape[1]], S


def recur_full_stu(u, S, lds, M):
    """The same for the full STU: u [B, T, d_in], M [2K, d_in, d_out] -> y [B, T, d_out], S."""
    chunks, states, S = cut_into_chunks(u, S, lds)
    size = chunks.shape[2]
    input_response = toeplitz(lds.powers[:size] @ lds.b @ lds.C.T)  # [t, i, 2K]
    state_response = lds.C @ lds.powers[1 : size + 1]  # [t, 2K, n]

    def outputs_of_chunk(chunk, S_before):
        filtered = torch.einsum("tik,bid->btkd", input_response, chunk)
        filtered = filtered + torch.einsum("tkn,bnd->btkd", state_response, S_before)
        return filtered.flatten(2) @ M.flatten(0, 1)

    # One chunk at a time, because the outputs of all filters are large.
    y = [recompute(outputs_of_chunk, *pair) for pair in zip(chunks, states)]
    y = torch.cat(y, dim=1)
    return y[:, : u.shape[1]], S


def zero_count(x):
    return torch.zeros((), dtype=torch.long, device=x.device)


def check_state(tensor, shape):
    if list(tensor.shape) != shape:
        got = list(tensor.shape)
        raise ValueError(f"this layer, with this batch, wants a state {shape}, got {got}")


def overwrite(old, new):
    """With gradients, which need the old: new. Without: old, into whose memory new is copied.

    So the state of a stream of tokens stays where it is in memory, as a CUDA graph wants it.
    """
    if torch.is_grad_enabled():
        return new
    return old.copy_(new)


def start_ring(k, window):
    """The empty state of attention for keys like k [B, H, T, head_size]: window + 1 slots.

    Token t goes to slot t mod (window + 1), where it replaces the one that just left the window.
    A slot knows the place of its token, so the ring need not be put in order.
    """
    B, H, _, head_size = k.shape
    keys = k.new_zeros(B, H, window + 1, head_size)
    values = torch.zeros_like(keys)
    places = torch.full((B, window + 1), -2 * FAR_AWAY, device=k.device)
    return RingState(keys, values, places, zero_count(k))


def write_to_ring(state, k, v, place):
    """The state after tokens with keys and values [B, H, T, head_size] at places [B or 1, T]."""
    keys, values, places, n_read = state
    if torch.is_grad_enabled():  # gradients need the old ones
        keys = keys.clone()
        values = values.clone()
        places = places.clone()
    B, _, T, _ = k.shape
    n_slots = keys.shape[2]
    n_new = min(T, n_slots)  # of a piece that is longer than the ring only the end is kept
    index = n_read + torch.arange(T - n_new, T, device=k.device)  # of the tokens in the whole text
    slot = index % n_slots
    keys.index_copy_(2, slot, k[:, :, -n_new:])
    values.index_copy_(2, slot, v[:, :, -n_new:])
    places.index_copy_(1, slot, place[:, -n_new:].expand(B, n_new))
    return RingState(keys, values, places, overwrite(n_read, n_read + T))


def select_rows(state, rows):
    """A copy of a model's state in which row i is row rows[i] of `state`.

    Copy the state of a prompt with rows [0, 0, 0] to write three answers to it.
    """
    copies = []
    for layer_state in state:
        index = torch.as_tensor(rows, device=layer_state.n_read.device)
        rows_of = {}
        for name, t in layer_state._asdict().items():
            rows_of[name] = t.clone() if name == "n_read" else t.index_select(0, index)
        copies.append(layer_state._replace(**rows_of))
    return copies


# ---- 8. Writing text -----------------------------------------------------------------------------


class FlashSTU(LanguageModel):
    """The language model of section 6, with what one does with it: write text, save, load."""

    def generate(self, input_ids, max_length=None, max_new_tokens=None, **options):
        """Prompt [B, T] -> prompt and what follows. max_length counts both. Options: see stream."""
        if (max_length is None) == (max_new_tokens is None):  # both or neither
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
        top_k=0,
        top_p=1.0,
        stop_token=None,
        generator=None,
        state=None,
    ):
        """Yield the next token of every row, [B], one after another, each at the same cost.

        temperature 0 takes the likeliest token. For top_k and top_p see sample. The stream ends
        early when every row has produced stop_token; a row that has it repeats it.
        state: to go on later, give an empty list. The stream fills it, and changes it with every
        token. Give it to the next call, with input_ids that begin with the last token that was
        yielded: all but that one have been read.
        A model with dropout must be in eval mode.
        """
        ids = check_ids(input_ids, self.config.vocab_size)
        check_integer("max_new_tokens", max_new_tokens, least=0)
        check_number("temperature", temperature)
        check_integer("top_k", top_k, least=0)
        if check_number("top_p", top_p, most=1.0) == 0:
            raise ValueError("top_p must be more than 0")
        if stop_token is not None:
            check_integer("stop_token", stop_token, least=0)
            if stop_token >= self.config.vocab_size:
                raise ValueError(f"stop_token must be in the vocabulary, got {stop_token}")
        if state is None:
            state = []

        # The checks above are made at once. A function with a yield begins only when the first
        # token is asked for.
        @torch.no_grad()
        def tokens(new_ids):
            stopped = torch.zeros(len(new_ids), dtype=torch.bool, device=new_ids.device)
            for _ in range(max_new_tokens):
                x = self.read(new_ids, state)  # at first the prompt, later one token
                logits = self.logits(x).float()
                token = sample(logits, temperature, top_k, top_p, generator)
                if stop_token is not None:
                    token = token.masked_fill(stopped, stop_token)
                    stopped = stopped | (token == stop_token)
                yield token
                if stop_token is not None and len(token) > 0 and stopped.all():
                    return
                new_ids = token[:, None]

        return tokens(ids)

    def read(self, ids, state):
        """Ids [B, T] -> output of the last layer for the last token, [B, d].

        state: a list, which at first is empty. This function leaves in it the state after the ids,
        and the next call goes on from there.
        """
        for piece in ids.split(self.config.seq_len, dim=1):  # to save memory
            before = state if len(state) > 0 else None
            x, after = self.hidden(piece, before, use_cache=True)
            state[:] = after
        return x[:, -1]

    def save_pretrained(self, folder):
        """Write model.safetensors, config.json and a copy of this file into the folder."""
        write_folder(self, Path(folder))  # section 10

    @classmethod
    def from_pretrained(cls, folder, device="cpu"):
        """The model in a folder that save_pretrained wrote, ours or that of transformers.

        It is in eval mode. No code from the folder is run. A ValueError says what is wrong there.
        """
        config, tensors = read_folder(Path(folder))
        with torch.device("meta"):  # this makes no weights, only their names and shapes
            model = cls(config)  # (and the filters, which come from NumPy)
        try:
            model.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            raise ValueError(f"{folder}: config.json and weights do not fit: {error}") from error
        return model.to(device).eval()


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Logits [B, vocab_size] -> a token for each row, [B].

    Only the top_k likeliest tokens are considered (0: all), and of these only the likeliest that
    together have the probability top_p.
    """
    best = logits.max(dim=-1, keepdim=True).values
    if not best.isfinite().all():
        raise ValueError("the logits must be finite; do the weights hold NaN?")
    if temperature == 0:
        return logits.argmax(dim=-1)
    # The best becomes 0 and all others negative, so a tiny temperature makes no infinity of them.
    logits = (logits - best) / max(temperature, 1e-30)
    if top_k == 0 and top_p == 1:
        choice = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
        return choice[:, 0]
    vocab_size = logits.shape[1]
    count = vocab_size if top_k == 0 else min(top_k, vocab_size)
    logits, tokens = logits.topk(count)  # likeliest first
    probs = logits.softmax(dim=-1)
    of_likelier = probs.cumsum(dim=-1) - probs  # the probability of all tokens before it
    probs = probs.masked_fill(of_likelier >= top_p, 0)
    choice = torch.multinomial(probs, 1, generator=generator)
    return tokens.gather(1, choice)[:, 0]


# ---- 9. Variants ---------------------------------------------------------------------------------


def filters_of_a_sector(G, K, max_radians):
    """The filters for decays r e^(iθ), |θ| <= max_radians, from the matrix G of the real decays.

    They are the top eigenvectors of the integral Z' of a aᵀ over the signals r^t cos θt and
    r^t sin θt, for all r and θ. Since cos θt cos θs + sin θt sin θs = cos θ(t-s),
        Z'_ts = Z_ts · (the mean of cos θ(t-s) over the angles θ).
    -> eigenvectors of Z' [L, K or more], leading ones first, and the square roots of their
    eigenvalues
    """
    # Z is G Gᵀ. The mean is E Eᵀ, where E has a column for the cosine and one for the sine of each
    # of many angles.
    L = len(G)
    angles, weights = angles_and_weights(L, max_radians)
    turns = np.outer(np.arange(L), angles)
    E = np.concatenate([np.cos(turns), np.sin(turns)], axis=1)
    E = torch.from_numpy(E * np.sqrt(np.tile(weights, 2)))  # [L, 2 n_angles]

    # The entrywise product of G Gᵀ and E Eᵀ is H Hᵀ, where H has a column for each pair of a column
    # e of E and a column g of G: H[t, (e, g)] = E[t, e] G[t, g]. H is too large to write down, but
    # a product with it is two small ones.
    def multiply_by_H_transposed(v):
        """Σ_t E[t, e] G[t, g] v[t], for all pairs: [columns of E, columns of G]."""
        return E.T @ (v[:, None] * G)

    def multiply_by_H(w):
        """Σ_eg E[t, e] G[t, g] w[e, g]: [L]."""
        return ((E @ w) * G).sum(dim=1)

    # Lanczos' method. A vector that is multiplied by Z' again and again turns towards the top
    # eigenvectors. They lie in the span of all vectors on its way, of which we keep a basis.
    steps = min(L, 2 * K + 32)  # measured: enough for 1e-12
    basis = G.new_zeros(L, steps)
    images = []  # Hᵀ times each vector of the basis
    v = torch.from_numpy(np.random.default_rng(0).standard_normal(L))
    for i in range(steps):
        for _ in range(3):  # what is left of v may be tiny, and then once is not enough
            v = v - basis @ (basis.T @ v)
            v = v / v.norm()
        basis[:, i] = v
        image = multiply_by_H_transposed(v)
        images.append(image.flatten())
        v = multiply_by_H(image)
    # With W = Hᵀ · basis, Z' in terms of the basis is Wᵀ W. That is Rᵀ R, where W = Q R, so its
    # eigenvectors are the right singular vectors of the small matrix R.
    W = torch.stack(images, dim=1)
    R = torch.linalg.qr(W).R
    _, sigma, Vh = torch.linalg.svd(R)
    return basis @ Vh.T, sigma


def decays_of_a_sector(L, n_filters, max_radians):
    """Decays exp(-1/steps) e^(iθ), 0 < θ <= max_radians, for a recurrence with such filters.

    Those with the same `steps` are an arc. All constants here were found by trial, for an error of
    1e-6.
    """
    decays = []
    # The first arc has the longest memory. A few filters for a wide sector do not reach back as far
    # as L, so then it is shorter.
    steps = min(L / 3, (0.6 * n_filters + 60) / max_radians)
    while steps * max_radians > 1.5:  # what forgets sooner cannot be told from a real decay
        n_angles = round(steps * max_radians / 3)
        for i in range(n_angles):
            angle = max_radians * (i + 1) / n_angles
            decays.append(cmath.rect(math.exp(-1 / steps), angle))
        steps = steps / 1.65  # of the next arc
    return decays


def oscillating_step(S_i, S_j, v, p):
    """One step of a section with the pair of decays r e^(iθ) and r e^(-iθ), of which p is one.

    It holds two numbers, S_i and S_j, and v enters it -> S'_i, S'_j, and what leaves it. There are
    two turns, with c = 2r cos θ / (1 + r²) and s = √(1-c²):
        inner = r² S_j - √(1-r⁴) v,    what leaves = √(1-r⁴) S_j + r² v
        S'_i = c S_i - s inner,        S'_j = s S_i + c inner.
    Turns do not change the sum of squares, so what section 7 says is true of these, too. From
    (S_i, S_j) to (S'_i, S'_j) the matrix is [c, -s r²; s, c r²]. Its trace is 2r cos θ and its
    determinant r², so its eigenvalues are r e^(±iθ). (This is Kautz' basis.)
    """
    r = abs(p)
    inner, v = turn(S_j, v, r**2)
    S_i, S_j = turn(S_i, inner, 2 * p.real / (1 + r**2))  # p.real is r cos θ
    return S_i, S_j, v


def angles_and_weights(L, max_radians):
    """Angles such that Σ_i weights[i] f(angles[i]) is the mean of f from 0 to max_radians.

    This is Gauss-Legendre quadrature. For cos θt, t < L, it is exact from a few more than
    L · max_radians / 4 angles on.
    """
    n = math.ceil(L * max_radians / 4 + math.sqrt(L * max_radians)) + 40
    nodes, _ = legendre.leggauss(n)  # from -1 to 1
    # NumPy's own weights have errors of 1e-14, which is too much for the weak filters. Those of
    # Christoffel's formula, 2 / Σ_j (2j + 1) P_j(x)² at the node x, are right to 1e-16. Their sum
    # is 2, the length from -1 to 1. For a mean it must be 1, so we take half of them.
    polynomials = legendre.legvander(nodes, n - 1)  # P_j(x), [n nodes, n degrees]
    degree = np.arange(n)
    weights = 1 / (polynomials**2 @ (2 * degree + 1))
    return max_radians * (1 + nodes) / 2, weights


def get_tensorized_spectral_filters(n, k, use_hankel_L=False, device=None, dtype=torch.float32):
    """Kronecker products φ_i ⊗ φ_j of k short filters, of length n: [n, k²].

    The short ones have length ⌈√(n-2)⌉, as published, so k is at most that.
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
    n = 2 ** math.ceil(math.log2(2 * T))
    n = max(n, 256)
    new_channels = -d % 16  # up to the next multiple
    u = F.pad(u, (0, n // 2 - T, 0, new_channels)).contiguous()
    h = F.pad(h, (0, n // 2 - h.shape[1], 0, new_channels)).contiguous()
    convolution = flash_fft(n, u.dtype, u.device)
    return convolution(u, h)[:, :d, :T]


@lru_cache(maxsize=16)
def flash_fft(n, dtype, device):
    """The convolution on n points. It is kept here: in a layer its tables would be saved."""
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
    """PyTorch calls this at the end of STU.state_dict().

    Filters that a layer was given are saved with its weights. The standard ones are made anew.
    """
    if stu.has_own_filters:
        state_dict[prefix + "filters"] = stu.bank.filters.clone()  # layers may share a bank


def load_own_filters(stu, state_dict, prefix, *_):
    """PyTorch calls this before STU.load_state_dict(). It may exchange the bank and resize M."""
    filters = state_dict.pop(prefix + "filters", None)
    if filters is None or torch.equal(filters.cpu(), stu.bank.filters):
        return
    if len(filters) != stu.seq_len:
        raise ValueError(f"{prefix}filters have length {len(filters)}, not {stu.seq_len}")
    stu.bank = FilterBank(filters)
    stu.has_own_filters = True
    # There may be more filters than before, or fewer, so there are as many more or fewer weights.
    name = "M_filters" if stu.use_approx else "M"
    M = getattr(stu, name)
    if len(M) != filters.shape[1]:
        setattr(stu, name, nn.Parameter(M.new_empty(filters.shape[1], *M.shape[1:])))


WEIGHTS = "model.safetensors"
SHARDS = "model.safetensors.index.json"  # transformers cuts large models, and lists the parts here
CONFIG = "config.json"


def write_folder(model, folder):
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = replace(model.config, torch_dtype=model.tok_emb.weight.dtype)
    text = json.dumps(config.to_dict() | HF_CONFIG, indent=2)
    tensors = {name: t.contiguous() for name, t in model.state_dict().items()}
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as new:
        new = Path(new)
        save_file(tensors, new / WEIGHTS, metadata={"format": "pt", "config": text})
        (new / CONFIG).write_text(text)
        shutil.copyfile(__file__, new / "stu.py")
        # Three files cannot be replaced at once. If this is killed after the first, new weights lie
        # beside an old config. The weights hold a copy of theirs, so read_folder notices.
        for name in (WEIGHTS, "stu.py", CONFIG):
            (new / name).replace(folder / name)
        (folder / SHARDS).unlink(missing_ok=True)  # of the model that was here before


def read_folder(folder):
    """Config and tensors of a saved model."""
    from safetensors import SafetensorError, safe_open

    files = [WEIGHTS]
    if (folder / SHARDS).exists():
        if (folder / WEIGHTS).exists():
            raise ValueError(f"{folder} holds {WEIGHTS} and {SHARDS}: remove the one that is old")
        files = sorted(set(read_json(folder / SHARDS)["weight_map"].values()))
    tensors = {}
    own_config = None  # the copy that the weights carry, if we saved them
    for file in files:
        if not (folder / file).is_file():
            raise ValueError(f"a saved model has a {file}; there is none in {folder}")
        try:
            with safe_open(folder / file, framework="pt") as part:
                metadata = part.metadata() or {}
                own_config = metadata.get("config")
                for name in part.keys():  # noqa: SIM118 (it is no dict)
                    # transformers saves the names of its own model, which holds ours as `model`
                    tensors[name.removeprefix("model.")] = part.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{folder / file} is damaged: {error}") from error
    if "tok_emb.weight" not in tensors:
        raise ValueError(f"{folder} holds another kind of model: it has no tok_emb.weight")
    # Fine-tuning may have saved an output matrix too. Ours is always the embedding.
    embedding = tensors["tok_emb.weight"]
    output_matrix = tensors.pop("lm_head.weight", embedding)
    if not torch.equal(output_matrix, embedding):
        raise ValueError(
            f"{folder}: lm_head.weight is not the embedding, and FlashSTU has one matrix for both. "
            "Load it with transformers, or fine-tune with ensure_weight_tying=True."
        )

    if own_config is None:
        return read_config(folder, read_json(folder / CONFIG), tensors), tensors
    config = read_config(folder, json.loads(own_config), tensors)
    if (folder / CONFIG).exists():
        beside_it = read_config(folder, read_json(folder / CONFIG), tensors)
        if beside_it != config:
            raise ValueError(
                f"{folder / CONFIG} is not the one that the weights were saved with. The weights "
                f"hold a copy of that: delete {CONFIG} to use it."
            )
    return config, tensors


def read_config(folder, values, tensors):
    # The dtype is that of the weights. (In config.json its name depends on transformers' release.)
    values["torch_dtype"] = tensors["tok_emb.weight"].dtype
    values.setdefault("max_angle", 0.0)  # in folders from before there was this option
    names = [field.name for field in fields(FlashSTUConfig)]
    missing = [name for name in names if name not in values]
    if missing:
        raise ValueError(f"{folder / CONFIG} lacks {', '.join(missing)}")
    config = FlashSTUConfig(**{name: values[name] for name in names})
    # The number of layers is checked here, before a wrong one makes us build very many.
    saved = {name.split(".")[1] for name in tensors if name.startswith("layers.")}
    if len(saved) != config.n_layers:
        raise ValueError(f"{folder}: {config.n_layers} layers in {CONFIG}, weights of {len(saved)}")
    return config


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


def transformers_is_here():
    """Was transformers imported before this file, in a release that has what is used here?"""
    module = sys.modules.get("transformers")
    if module is None:
        return False
    major, minor = module.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (4, 57)


def __getattr__(name):  # asked by Python for what this file does not define
    if f"stu.{name}" in HF_CONFIG["auto_map"].values():
        raise ImportError(f"stu.{name} needs transformers 4.57 or later, imported before stu")
    raise AttributeError(f"stu.py has no {name}")


if transformers_is_here():
    from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.utils import can_return_tuple

    try:
        from transformers.utils.output_capturing import capture_outputs
    except ImportError:  # as it was called before
        from transformers.utils.generic import check_model_inputs as capture_outputs

    # A table of transformers lists the language models. For those Trainer shifts the labels when it
    # smooths them, so we add ours.
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[HF_CONFIG["model_type"]] = "FlashSTUForCausalLM"

    # Arguments that say where texts begin. They are accepted and ignored: positions are relative,
    # and texts that are packed into one row see each other, as in train.py.
    NOT_USED = (
        "position_ids",
        "cache_position",
        "seq_idx",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
    )

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
            # While transformers makes a model, it sets torch's default dtype to the one it wants.
            return FlashSTUConfig(**options, torch_dtype=torch.get_default_dtype())

    class FlashSTUCache:
        """The state after `length` tokens. A call that is given it brings it up to date."""

        # What transformers asks of a cache.
        is_compileable = False
        is_croppable = False  # it cannot take back a token
        # `generate` reads is_linear. If it is True for all layers, it gives us all ids at every
        # step. We want only the new ones.
        is_linear = (False,)

        def __init__(self):
            self.state = None
            self.length = 0

        def get_seq_length(self, layer_idx=0):
            return self.length

        def batch_select_indices(self, indices):
            self.state = select_rows(self.state, indices)

        reorder_cache = batch_select_indices  # as beam search calls it

        def batch_repeat_interleave(self, repeats):
            first_layer = self.state[0]
            batch_size = len(first_layer[0])
            self.batch_select_indices(torch.arange(batch_size).repeat_interleave(repeats))

    class FlashSTUDecoder(FlashSTU):
        """FlashSTU, with the arguments and the output of a transformers model without a head."""

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
                kind = type(cache).__name__
                raise ValueError(f"FlashSTU takes a cache of its own, got {kind}")  # noqa: TRY004
            if attention_mask is not None:
                B, T = input_ids.shape
                mask = check_mask(attention_mask, B, T)
                # Padding matters only to the tokens after it. Without a mask it is faster.
                if use_cache:  # tokens may come in the next call
                    padding_matters = not mask.all()
                else:
                    padding_matters = (~mask[:, :-1] & mask[:, 1:]).any()
                if not padding_matters:
                    attention_mask = None
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
        _is_stateful = True  # its cache takes back no token, so no assisted generation
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
            self.tie_weights()  # (the weights themselves were drawn by FlashSTU)

        def _init_weights(self, module):  # weights that a folder lacks
            if isinstance(module, STU):
                module.draw_random_filters()
            else:
                super()._init_weights(module)

        @capture_outputs
        def forward(self, input_ids, output_hidden_states=None, **options):
            return self.model(input_ids, **options)  # the decorator adds hidden states if wanted

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
            logits_to_keep=0,  # how many at the end, or 0 for all; or a tensor of positions
            num_items_in_batch=None,
            **options,
        ):
            # shift_labels is not named above, because Trainer would take it for a column of the
            # data: it does so with each named argument that has "label" in its name.
            shift_labels = options.pop("shift_labels", None)
            # (return_dict is for the decorator of the method that is called, which takes it out.)
            options |= {"past_key_values": past_key_values, "cache": cache, "return_dict": True}
            output = dict(super().forward(input_ids, attention_mask=attention_mask, **options))
            x = output.pop("last_hidden_state")
            if isinstance(logits_to_keep, int):
                logits_to_keep = slice(-logits_to_keep, None)  # (slice(-0, None) is all of x)
            logits = self.lm_head(x[:, logits_to_keep])
            loss = None
            if labels is not None or shift_labels is not None:
                loss = self.loss_function(
                    logits,
                    labels,
                    logits.shape[-1],
                    num_items_in_batch,
                    shift_labels=shift_labels,
                )
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
