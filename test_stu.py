"""What holds, by name: each test states an identity of one of the other files, and checks it."""

import codecs
import contextlib
import copy
import gzip
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

hf_home = tempfile.TemporaryDirectory()
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": hf_home.name}

import lds as lds_module
import prepare_data
import stu
from lds import LDS, MiniSTU, random_LDS, sample, train_stu_on_lds, unseen_error, white_filters
from stu import (
    STU,
    FilterBank,
    FlashSTU,
    FlashSTUBlock,
    FlashSTUConfig,
    SlidingWindowAttention,
    both_signs,
    get_spectral_filters,
    get_tensorized_spectral_filters,
    stu_formula,
    windowed_attention,
)

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    random.seed(0)


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


def value_and_gradients(module, x):
    """[y = module(x), and of Σ y² the gradient for each parameter]"""
    y = module(x)
    return [y, *torch.autograd.grad(y.square().sum(), list(module.parameters()))]


def in_pieces(module, x, cuts):
    """The output for x [B, T, ...] cut at these places, each piece with the state of the last; the state."""
    state, out = None, []
    for piece in x.tensor_split(list(cuts), dim=1):
        y, state = module(piece, state, use_cache=True)
        out.append(y)
    return torch.cat(out, dim=1), state


def random_cuts(T, n):
    return sorted(random.sample(range(1, T), n))


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns while this is active."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().nbytes() > 0:
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return out


# ------------------------------------------------------------------------------------------------------------
# stu.py: filters


def reference_filters(L, K, hankel_L):
    """Eigenvectors of Z in 60-digit arithmetic, scaled by λ^(1/4), positive at their first lag.

    Z = C Cᵀ + rest by pivoted Cholesky, which stops at a rest of trace 1e-40: too small for any digit of a
    float64 result. Where v is an eigenvector of the small matrix Cᵀ C, C v is one of C Cᵀ, of norm √λ."""
    import mpmath as mp

    def Z(i, j):
        n = mp.mpf(i + j + 2)
        return 16 / ((n + 3) * (n - 1) * (n + 1)) if hankel_L else 2 / (n**3 - n)

    found, parities = [], 2 if hankel_L else 1  # Hankel-L couples lags of one parity only
    with mp.workdps(60):
        for lags in (range(parity, L, parities) for parity in range(parities)):
            C, rest = [[] for _ in lags], [Z(i, i) for i in lags]  # of the rest, its diagonal
            while sum(rest) > 1e-40:
                pivot = rest.index(max(rest))
                column = [Z(i, lags[pivot]) - mp.fdot(row, C[pivot]) for i, row in zip(lags, C)]
                column = [c / mp.sqrt(rest[pivot]) for c in column]
                rest = [r - c**2 for r, c in zip(rest, column)]
                C = [[*row, c] for row, c in zip(C, column)]
            C = mp.matrix(C)
            values, vectors = mp.eigsy(C.T * C)
            for value, vector in zip(values, (C * vectors).T.tolist()):
                phi = np.zeros(L)
                phi[lags] = np.array(vector, dtype=float) * float(value) ** -0.25
                found.append((float(value), phi * np.sign(phi[lags[0]])))
    found.sort(key=lambda pair: -pair[0])
    return torch.from_numpy(np.stack([phi for _, phi in found[:K]], axis=1))


def get_hankel(L, hankel_L=False):
    """The matrix Z itself, [L, L] float64."""
    i_plus_j = torch.arange(1, L + 1, dtype=torch.float64)[:, None] + torch.arange(1, L + 1)
    if hankel_L:
        return ((-1) ** i_plus_j + 1) * 8 / ((i_plus_j + 3) * (i_plus_j - 1) * (i_plus_j + 1))
    return 2 / (i_plus_j**3 - i_plus_j)


@pytest.mark.parametrize("hankel_L", [False, True])
@pytest.mark.parametrize("L", [40, 96])
def test_filters_equal_their_60_digit_reference(L, hankel_L):
    phi = get_spectral_filters(L, 24, hankel_L, dtype=torch.float64)
    reference = reference_filters(L, 24, hankel_L)
    assert (phi - reference).abs().max() < 1e-6
    norms = reference.norm(dim=0)  # also each by its own size: no filter is noise
    assert ((phi - reference) / norms).abs().max() < (1e-4 if L == 40 else 1e-6)


@pytest.mark.parametrize("hankel_L", [False, True])
@pytest.mark.parametrize("L", [1, 2, 7, 100, 777])
def test_filters_are_eigenvectors_of_the_hankel_matrix(L, hankel_L):
    K = min(L, 12)
    phi, Z = get_spectral_filters(L, K, hankel_L, dtype=torch.float64), get_hankel(L, hankel_L)
    values = phi.norm(dim=0) ** 4
    assert (Z @ phi - phi * values).abs().max() < 1e-14
    assert (values[:-1] >= values[1:]).all()
    unit = phi / phi.norm(dim=0)
    assert (unit.T @ unit - torch.eye(K, dtype=torch.float64)).abs().max() < 1e-12
    first = torch.stack(
        [column[column.abs() > 1e-9][0] for column in phi.T]
    )  # of Hankel-L: lag 0 or 1
    assert (first > 0).all()


def test_tensorized_filters_are_kronecker_products():
    n, k = 150, 5
    s = math.ceil(math.sqrt(n - 2))
    small, bank = get_spectral_filters(s, k), get_tensorized_spectral_filters(n, k)
    assert bank.shape == (n, k * k)
    product = torch.outer(small[:, 1], small[:, 3]).flatten()
    assert torch.allclose(bank[:, 1 * k + 3], torch.cat([product, torch.zeros(n)])[:n], atol=1e-7)
    for n in (1, 2, 3, 12):  # shorter than their square, cut; longer, padded with zeros
        assert get_tensorized_spectral_filters(n, 24).shape[0] == n


@pytest.mark.parametrize("L, K, hankel_L", [
    (1, 1, False), (5, 3, True), (40, 24, False), (64, 24, False), (96, 24, True), (1000, 24, False),
    (2048, 32, True), (8192, 48, False),
])  # fmt: skip
def test_lds_impulse_response_equals_the_filters(L, K, hankel_L):
    phi = get_spectral_filters(L, K, hankel_L, dtype=torch.float64)
    bank = phi if hankel_L else both_signs(phi)
    lds = FilterBank(bank).lds
    A = lds.powers[1]
    n = len(lds.b)
    # orthonormal coordinates: what float32 states rely on
    assert (A @ A.T + torch.outer(lds.b, lds.b) - torch.eye(n).double()).abs().max() < 1e-13
    assert lds.C.abs().max() < 1.5
    s, worst = lds.b, 0.0
    for t in range(L):
        worst = max(worst, (lds.C @ s - bank[t]).abs().max().item())
        s = A @ s
    assert worst < 1e-7
    # past L the filters fade: the energy left in the tail, Σ_{t>=L} (C A^t b)² = |C A^L|², is small
    assert (lds.C @ torch.linalg.matrix_power(A, L)).norm(dim=1).max() < 0.05


def test_without_the_penalty_the_filters_grow_past_their_length():
    phi, tails = get_spectral_filters(128, 24, dtype=torch.float64), []
    for fade in (1e-5, 1e-8):
        lds = FilterBank(both_signs(phi), fade=fade, tolerance=math.inf, most_ringing=math.inf).lds
        tails.append((lds.C @ torch.linalg.matrix_power(lds.powers[1], 128)).norm(dim=1).max())
    assert tails[1] > 5 * tails[0]


# ------------------------------------------------------------------------------------------------
# stu.py: filters of a sector, for what rings


def sector_matrix(L, degrees):
    """Z_ts times the average of cos θ(t-s) over |θ| <= the angle, in closed form."""
    i = torch.arange(1, L + 1, dtype=torch.float64)
    total = i[:, None] + i
    lag = i[:, None] - i
    average = torch.sinc(degrees / 180 * lag)  # sin(aτ) / (aτ) at angle a and lag τ
    return 2 / (total**3 - total) * average


@pytest.mark.parametrize(
    "L, K, degrees", [(128, 12, 5), (128, 20, 20), (128, 64, 90), (600, 24, 20)]
)
def test_filters_of_a_sector_are_eigenvectors_of_the_integral_over_it(L, K, degrees):
    phi = get_spectral_filters(L, K, dtype=torch.float64, max_angle=degrees)
    sigma = phi.square().sum(dim=0)  # |φ|² = σ, and the eigenvalue is σ²
    unit = phi / sigma.sqrt()
    error = sector_matrix(L, degrees) @ unit - unit * sigma**2
    assert error.norm(dim=0).max() < 1e-14
    assert (unit.T @ unit - torch.eye(K, dtype=torch.float64)).abs().max() < 1e-12
    assert (phi[0] > 0).all()


def test_weak_filters_of_a_sector_are_right_too():
    # Their eigenvalues are far below 1e-16 of the first, so the closed form does not show them. The
    # reference has a column for every decay and angle, 4 times as dense in each, and no shortcut.
    L, K, degrees = 64, 20, 5
    log_rate = torch.arange(3.8, -16.2, -0.05, dtype=torch.float64)
    rate = log_rate.exp()
    weight = (0.05 * rate * (-rate).exp()).sqrt() * -torch.expm1(-rate)
    nodes, weights = np.polynomial.legendre.leggauss(40)
    angle = math.radians(degrees) * torch.from_numpy(nodes)
    t = torch.arange(L, dtype=torch.float64)[:, None, None]
    decay = weight[:, None] * (-rate[:, None] * t).exp() * torch.from_numpy(weights / 2).sqrt()
    G = torch.cat([decay * (angle * t).cos(), decay * (angle * t).sin()], dim=2).flatten(1)
    R = torch.linalg.qr(G.T).R
    U = torch.linalg.svd(R.T).U[:, :K]
    phi = get_spectral_filters(L, K, dtype=torch.float64, max_angle=degrees)
    unit = phi / phi.norm(dim=0)
    assert phi[:, -1].norm() < 1e-3 * phi[:, 0].norm()
    assert (unit - U @ (U.T @ unit)).norm(dim=0).max() < 1e-6
    assert ((U * unit).sum(dim=0).abs() - 1).abs().max() < 1e-9


def test_a_sector_of_no_angle_is_the_real_axis():
    real = get_spectral_filters(64, 12, dtype=torch.float64)
    assert torch.equal(get_spectral_filters(64, 12, dtype=torch.float64, max_angle=0), real)
    narrow = get_spectral_filters(64, 12, dtype=torch.float64, max_angle=1e-6)
    assert (narrow - real).abs().max() < 1e-9


@pytest.mark.parametrize(
    "L, K, degrees",
    [(1, 1, 20), (128, 24, 5), (128, 28, 20), (128, 45, 45), (512, 24, 10), (1024, 24, 45)],
)
def test_filters_of_a_sector_have_a_recurrence_in_orthonormal_coordinates(L, K, degrees):
    phi = get_spectral_filters(L, K, dtype=torch.float64, max_angle=degrees)
    bank = FilterBank(both_signs(phi), max_angle=degrees)
    A = bank.lds.powers[1]
    n = len(A)
    assert (A @ A.T + torch.outer(bank.lds.b, bank.lds.b) - torch.eye(n)).abs().max() < 1e-13
    assert torch.allclose(bank.lds.powers[3], A @ A @ A)
    psi = [bank.lds.b]
    for _ in range(L - 1):
        psi.append(A @ psi[-1])
    answer = torch.stack(psi) @ bank.lds.C.T
    assert (answer - bank.filters).abs().max() < 1e-6 * bank.filters.abs().max()
    assert bank.lds.C.abs().max() < 1.5


def test_the_sections_have_the_poles_that_were_picked():
    poles = np.array(stu.choose_decays(100, 1, 6, math.radians(30)))
    assert (poles.imag > 1e-3).any() and np.isclose(np.sort(poles.real), np.sort(-poles.real)).all()
    lds = stu.fit_recurrence(torch.ones(100, 1).double(), 6, tolerance=math.inf, max_angle=30)
    both = np.concatenate([poles, poles.conj()[poles.imag != 0]])
    found = np.linalg.eigvals(lds.powers[1].numpy())
    for p in both:
        assert abs(found - p).min() < 1e-6
    assert len(found) == len(both)


def test_a_sector_that_takes_too_many_states_has_no_recurrence_and_streams_all_the_same():
    layer = STU(4, 4, 256, 128, max_angle=90.0)
    assert layer.bank.lds is None
    x = torch.randn(1, 40, 4)
    first, state = layer(x[:, :25], use_cache=True)
    second, _ = layer(x[:, 25:], state, use_cache=True)
    assert (torch.cat([first, second], dim=1) - layer(x)).abs().max() < 1e-4


@pytest.mark.parametrize("approx", [True, False])
def test_a_layer_with_a_sector_equals_its_recurrence(approx):
    fft = STU(6, 6, 128, 24, max_angle=20.0, use_approx=approx)
    lds = STU(6, 6, 128, 24, max_angle=20.0, use_approx=approx, backend="lds")
    lds.load_state_dict(fft.state_dict())
    x = torch.randn(2, 128, 6)
    assert (fft(x) - lds(x)).norm() < 1e-4 * fft(x).norm()


def test_the_model_takes_a_sector_and_generates_with_it(tmp_path):
    c = FlashSTUConfig(
        n_embd=32, n_layers=2, n_heads=2, seq_len=64, window_size=16, vocab_size=50,
        torch_dtype="float32", max_angle=15.0,
    )  # fmt: skip
    model = FlashSTU(c)
    banks = [m.bank for m in model.modules() if isinstance(m, STU)]
    phi = get_spectral_filters(64, 24, dtype=torch.float64, max_angle=15.0)
    assert all(torch.equal(bank.filters, both_signs(phi)) for bank in banks)
    ids = torch.randint(50, (1, 30))
    whole = model(ids).logits
    state = model(ids[:, :20], use_cache=True).state
    piece = model(ids[:, 20:], state=state, use_cache=True).logits
    assert (piece - whole[:, 20:]).abs().max() < 1e-3


@pytest.mark.parametrize("angle", [-1, 91, math.nan, "20", True])
def test_an_angle_is_a_number_of_degrees_from_0_to_90(angle):
    with pytest.raises(ValueError, match="max_angle"):
        get_spectral_filters(16, 4, max_angle=angle)
    with pytest.raises(ValueError, match="max_angle"):
        FlashSTUConfig(max_angle=angle)
    with pytest.raises(ValueError, match="max_angle"):
        STU(4, 4, 16, use_tensorized=True, max_angle=5.0)


# ------------------------------------------------------------------------------------------------------------
# stu.py: the STU layer


def make_stu(L, d_in=6, d_out=6, **options):
    K = 4 if options.get("use_tensorized") else min(24, L)
    return STU(d_in, d_out, L, **({"num_eigh": K} | options))


def formula(layer, x):
    """stu_formula with this layer's filters and weights, float64."""
    if layer.use_approx:
        M = torch.einsum("io,fo->fio", layer.M_inputs, layer.M_filters)
    else:
        M = layer.M
    return stu_formula(x.double(), layer.bank.filters, M.double())


def usual_stu(x, phi, M):
    """The usual route: two branches stacked, channels last, torch's FFT. phi [T, K], M [2K, d(, d_out)]."""
    T, K = phi.shape
    n = 1 << (2 * T - 1).bit_length()
    sign = (-1.0) ** torch.arange(T, device=x.device)[:, None]
    x_f = torch.fft.rfft(torch.stack([x, x * sign], dim=-1), n=n, dim=1)  # [B, n/2 + 1, d, 2]
    if M.ndim == 2:
        h_f = torch.fft.rfft(
            torch.stack([phi @ M[:K], phi @ M[K:]], dim=-1), n=n, dim=0
        )  # [n/2 + 1, d, 2]
        plus, minus = torch.fft.irfft(x_f * h_f, n=n, dim=1)[:, :T].unbind(-1)
        return plus + sign * minus
    phi_f = torch.fft.rfft(phi, n=n, dim=0)  # [n/2 + 1, K]
    u = torch.fft.irfft(x_f[:, :, None] * phi_f[None, :, :, None, None], n=n, dim=1)[
        :, :T
    ]  # [B, T, K, d, 2]
    plus, minus = (
        torch.tensordot(u[..., i], M[i * K : (i + 1) * K], dims=([2, 3], [0, 1])) for i in (0, 1)
    )
    return plus + sign * minus


KINDS = [
    {},
    {"use_hankel_L": True},
    {"use_approx": False},
    {"use_approx": False, "use_hankel_L": True},
    {"use_tensorized": True},
    {"use_tensorized": True, "use_approx": False},
]
kinds = pytest.mark.parametrize("options", KINDS, ids=lambda o: "+".join(o) or "default")


@kinds
def test_stu_equals_its_formula(options):
    for L, T, B in ((1, 1, 1), (33, 33, 2), (50, 20, 1), (64, 64, 3)):
        layer, x = make_stu(L, 5, 7, **options), torch.randn(B, T, 5)
        expected = formula(layer, x)
        assert relative_error(layer(x).double(), expected) < 2e-6
        if T > 1 and not options.keys() - {
            "use_approx"
        }:  # and so does the usual route of the benchmark
            u, M = (x @ layer.M_inputs, layer.M_filters) if layer.use_approx else (x, layer.M)
            phi = layer.bank.filters[:T, : layer.bank.filters.shape[1] // 2]
            assert relative_error(usual_stu(u.double(), phi, M.double()), expected) < 2e-6


@kinds
def test_pieces_and_single_steps_equal_the_whole_sequence(options):
    """... within seq_len and past it, for sequences cut at random places."""
    for L, T, B in ((1, 3, 1), (40, 40, 2), (100, 100, 1), (64, 200, 2)):
        layer, x = make_stu(L, **options), torch.randn(B, T, 6)
        whole = layer(x)
        for cuts in (random_cuts(T, 2), range(1, T), []):
            assert relative_error(in_pieces(layer, x, cuts)[0], whole) < 1e-6


@pytest.mark.parametrize("L, K", [(128, 24), (2000, 24), (8192, 48)])
def test_a_float32_state_streams_long_sequences(L, K):
    layer, x = STU(4, 4, L, K), torch.randn(1, L, 4)
    y, state = in_pieces(layer, x, range(301, L, 301))
    assert relative_error(y, layer(x)) < 1e-5
    (S,) = state.memory
    assert S.dtype == torch.float32 and S.shape == (1, len(layer.bank.lds.b), 4)


def test_the_state_does_not_grow_and_outputs_stay_sane_past_seq_len():
    layer, x = STU(4, 4, 64), torch.randn(1, 64 * 50, 4)
    y, state = layer(x, use_cache=True)
    first, last = y[:, :64].std(), y[:, -640:].std()
    assert last < 2 * first
    assert state.memory[0].shape == (1, 112, 4)
    y, state = layer(
        torch.zeros(1, 64 * 50, 4), state, use_cache=True
    )  # and what was long ago is forgotten
    assert y[:, -64:].abs().max() < 1e-3 * first


@kinds
def test_stu_is_causal_and_sees_odd_lags(options):
    layer = make_stu(40, **options).double()
    x = torch.randn(1, 40, 6).double().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x)[0, 20].sum(), x)
    reach = gradient[0].abs().amax(-1)
    assert reach[21:].max() < 1e-12
    assert (reach[:21] > 1e-9).all()


@pytest.mark.parametrize("L", [64, 2048])
def test_stu_t_represents_a_delay_by_one(L):
    layer = STU(3, 3, L)
    delay = torch.zeros(L, 1).double()
    delay[1] = 1
    weights = torch.linalg.lstsq(layer.bank.filters, delay, driver="gelsd").solution
    with torch.no_grad():
        layer.M_inputs.copy_(torch.eye(3))
        layer.M_filters.copy_(weights.expand(-1, 3))
    x = torch.randn(2, L, 3)
    assert (layer(x)[:, 1:] - x[:, :-1]).abs().max() < 1e-3


@pytest.mark.parametrize("options", [{}, {"use_approx": False}, {"use_tensorized": True}])
def test_tiled_equals_untiled(options):
    whole, x, results = make_stu(30, 7, 5, **options), torch.randn(2, 30, 7), []
    for d_in_tile, d_out_tile in ((None, None), (3, None), (None, 2), (3, 2), (100, 100)):
        layer = make_stu(30, 7, 5, **options, d_in_tile=d_in_tile, d_out_tile=d_out_tile)
        layer.load_state_dict(whole.state_dict())
        results.append([*value_and_gradients(layer, x), in_pieces(layer, x, [11])[0]])
    for result in results[1:]:
        for a, b in zip(result, results[0]):
            assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("backend", ["fft", "lds"])
@pytest.mark.parametrize("approx", [True, False])
def test_gradients_equal_finite_differences(approx, backend):
    layer = make_stu(9, 2, 3, num_eigh=4, use_approx=approx, backend=backend).double()
    x = torch.randn(2, 7, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *p: layer(x), (x, *layer.parameters()), atol=1e-5)


@pytest.mark.parametrize("approx", [True, False])
def test_both_backends_agree_in_value_and_gradient(approx):
    fft, lds = (STU(8, 8, 300, use_approx=approx, backend=backend) for backend in ("fft", "lds"))
    lds.load_state_dict(fft.state_dict())
    x = torch.randn(2, 300, 8)
    for a, b in zip(value_and_gradients(lds, x), value_and_gradients(fft, x)):
        assert relative_error(a, b) < 1e-5


def test_full_stu_never_holds_all_filter_outputs():
    layer, x = STU(32, 32, 512, use_approx=False), torch.randn(2, 512, 32)
    layer(x)  # makes the copies of the filters
    with LargestTensor() as largest:
        layer(x).sum().backward()
    assert largest.numel < 2 * 512 * 48 * 32 / 4


def test_casting_to_bfloat16_leaves_the_filters_exact():
    layer, x = STU(8, 8, 100), torch.randn(2, 100, 8)
    exact, _ = layer.bank.on(x.device, x.dtype)
    layer.to(torch.bfloat16)
    filters, _ = layer.bank.on(x.device, torch.bfloat16)
    assert layer.M_inputs.dtype == torch.bfloat16 and torch.equal(filters, exact)
    y, state = in_pieces(layer, x.bfloat16(), [50])
    assert y.dtype == torch.bfloat16 and state.memory[0].dtype == torch.float32
    assert relative_error(y.float(), layer(x.bfloat16()).float()) < 1e-2
    assert layer.bank.on(x.device, torch.float64)[0].dtype == torch.float64


def test_a_bank_does_not_depend_on_the_default_dtype():
    expected = STU(4, 4, 600).bank
    stu.standard_bank.cache_clear()
    torch.set_default_dtype(torch.bfloat16)  # as transformers does while it makes a model
    try:
        made = STU(4, 4, 600).bank
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(made.filters, expected.filters) and torch.equal(made.lds.C, expected.lds.C)


def test_layers_share_one_bank_and_a_copy_or_a_pickle_computes_the_same():
    a, b, x = STU(4, 4, 50), STU(4, 8, 50), torch.randn(1, 50, 4)
    assert a.bank is b.bank
    layers = torch.nn.ModuleList([a, STU(4, 4, 50)])
    copied, loaded = copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))
    assert copied[0].bank is copied[1].bank and loaded[0].bank is loaded[1].bank
    for layer in (copied[0], loaded[0]):
        assert torch.equal(layer(x), a(x)) and torch.equal(
            layer(x, use_cache=True)[0], a(x, use_cache=True)[0]
        )


def test_a_replica_without_parameters_of_its_own_computes_the_same():
    """... as torch.nn.DataParallel makes them."""
    layer, x = STU(4, 4, 50), torch.randn(1, 50, 4)
    replica = layer._replicate_for_data_parallel()
    for name, p in layer.named_parameters():
        setattr(replica, name, p.detach().clone())
    assert not list(replica.parameters()) and torch.equal(replica(x), layer(x))


def test_a_model_made_on_the_meta_device_computes_when_it_gets_memory():
    with torch.device("meta"):
        layer, model = STU(4, 4, 50), small_model()
    x, ids = torch.randn(1, 50, 4), torch.randint(61, (1, 30))
    for empty, whole, inputs in ((layer, STU(4, 4, 50), x), (model, small_model(), ids)):
        empty.to_empty(device="cpu").load_state_dict(whole.state_dict())
        a, b = empty(inputs), whole(inputs)
        assert torch.equal(*(t if torch.is_tensor(t) else t.logits for t in (a, b)))


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1000.0])
def test_filters_of_any_scale_have_their_recurrence_and_noise_has_none(scale):
    assert FilterBank(scale * get_spectral_filters(200, 10)).lds is not None
    assert FilterBank(scale * torch.randn(200, 10)).lds is None


@pytest.mark.parametrize("make", [
    lambda: STU(4, 4, 67, use_tensorized=True), lambda: STU(4, 4, 64, precomputed_filters=torch.randn(64, 4)),
])  # fmt: skip
def test_a_recurrence_that_would_not_fade_is_not_taken(make):
    layer, x = make(), torch.randn(1, 640, 4)
    assert layer.bank.lds is None and layer(x)[:, 80:].std() < 2


def test_a_layer_first_used_in_inference_mode_trains_afterwards():
    stu.standard_bank.cache_clear()
    with torch.inference_mode():
        STU(4, 4, 61).double()(torch.randn(1, 61, 4).double())
    for dtype in (torch.float32, torch.float64):
        STU(4, 4, 61).to(dtype)(torch.randn(1, 61, 4, dtype=dtype)).sum().backward()


@pytest.mark.parametrize("approx", [True, False])
def test_derivatives_of_any_order_agree_with_the_recurrence(approx):
    layer, x = STU(3, 3, 24, 8, use_approx=approx).double(), torch.randn(1, 24, 3).double()
    weights = {name: p.detach() for name, p in layer.named_parameters()}
    name = "M_filters" if approx else "M"

    def loss(use_cache):
        def f(x, p):  # use_cache: by recurrence
            y = torch.func.functional_call(layer, weights | {name: p}, (x, None, use_cache))
            return ((y[0] if use_cache else y) ** 3).sum()

        return f  # fmt: skip

    by_fft, recurring, point = loss(False), loss(True), (x, weights[name])
    v = tuple(torch.randn_like(t) for t in point)
    functional = torch.autograd.functional
    for derivative in (functional.hvp, functional.vhp, functional.jvp):
        found = [derivative(f, point, v)[1] for f in (by_fft, recurring)]
        for a, b in zip(*(d if isinstance(d, tuple) else [d] for d in found)):
            assert relative_error(a, b) < 1e-9
    one = [functional.hessian(lambda p, f=f: f(x, p), weights[name]) for f in (by_fft, recurring)]
    assert relative_error(*one) < 1e-9
    if approx:  # torch.func knows no checkpoints
        for transform in (torch.func.grad, lambda f: torch.func.jacrev(torch.func.grad(f))):
            assert relative_error(*(transform(f)(*point) for f in (by_fft, recurring))) < 1e-9
        many = torch.randn(3, 1, 24, 3).double()
        rows = [
            torch.func.vmap(torch.func.grad(f), (0, None))(many, weights[name])
            for f in (by_fft, recurring)
        ]
        assert relative_error(*rows) < 1e-9


@pytest.mark.parametrize(
    "filters",
    [
        torch.zeros(8, 3),
        torch.full((8, 3), math.inf),
        torch.full((8, 3), math.nan),
        torch.ones(8, 3, dtype=torch.complex64),
        torch.ones(8, 3, dtype=torch.int64),
        torch.ones(8),
        [[1.0]],
    ],
)
@pytest.mark.parametrize("hankel_L", [False, True])
def test_filters_that_are_none_are_refused(filters, hankel_L):
    with pytest.raises(ValueError, match=r"filters must be|floating-point"):
        STU(4, 4, 8, precomputed_filters=filters, use_hankel_L=hankel_L)


def test_precomputed_filters_are_used():
    phi, x, own = get_spectral_filters(60, 10), torch.randn(1, 60, 4), STU(4, 4, 60, 10)
    for filters, expected in (
        (phi, own(x)),
        (-phi, -own(x)),
        (FilterBank(both_signs(-phi)), -own(x)),
    ):
        layer = STU(4, 4, 60, precomputed_filters=filters)
        layer.load_state_dict(own.state_dict())
        assert relative_error(layer(x), expected) < 1e-5


class FakeFlashFFTConv(torch.nn.Module):
    """FlashFFTConv's contract: u [B, H, L] 16-bit contiguous, k [H, L] float32, 2L at most its size."""

    runs = 0

    def __init__(self, seqlen, dtype):
        super().__init__()
        assert seqlen in {2**i for i in range(8, 23)} and dtype in (torch.bfloat16, torch.float16)
        self.seqlen, self.dtype = seqlen, dtype
        self.register_buffer("twiddle", torch.ones(3))

    def forward(self, u, k):
        assert (
            u.dtype == self.dtype
            and k.dtype == torch.float32
            and u.is_contiguous()
            and k.is_contiguous()
        )
        assert u.ndim == 3 and k.shape == u.shape[1:] and 2 * u.shape[2] <= self.seqlen
        assert self.seqlen <= 32768 or u.shape[1] % 16 == 0
        FakeFlashFFTConv.runs += 1
        n = self.seqlen  # a circular convolution of exactly this size
        y = torch.fft.irfft(torch.fft.rfft(u.float(), n) * torch.fft.rfft(k, n), n)
        return y[..., : u.shape[2]].to(u.dtype)


@pytest.mark.parametrize("L, T", [(100, 100), (128, 128), (300, 257), (64, 1), (20000, 20000)])
def test_flashfftconv_is_called_by_its_contract(monkeypatch, L, T):
    layer, x = STU(4, 4, L), torch.randn(2, T, 4)
    exact, names, runs = layer(x), list(layer.state_dict()), FakeFlashFFTConv.runs
    monkeypatch.setattr(stu, "FlashFFTConv", FakeFlashFFTConv)
    monkeypatch.setattr(stu, "on_cuda_16_bit", lambda t: t.element_size() == 2)
    assert (
        torch.equal(layer(x), exact) and FakeFlashFFTConv.runs == runs
    )  # a float32 model stays in float32
    layer, x = layer.bfloat16(), x.bfloat16()
    for layer.use_flash_fft in (True, False):
        assert relative_error(layer(x).float(), exact) < 3e-2
        assert FakeFlashFFTConv.runs == runs + 1 and list(layer.state_dict()) == names


@pytest.mark.parametrize("make, message", [
    (lambda: STU(4, 4, 8, num_eigh=9), "num_eigh must be at most 8"),
    (lambda: STU(4, 4, 8, num_eigh=0), "num_eigh must be an integer >= 1, got 0"),
    (lambda: STU(4, 4, 8, num_eigh=2.5), "num_eigh must be an integer >= 1, got 2.5"),
    (lambda: STU(4, 4, True, 1), "seq_len"),
    (lambda: STU(4, 4, 8, 4, use_approx="False"), "use_approx must be True or False, got 'False'"),
    (lambda: STU(4, 4, 8, 4, use_hankel_L=1), "use_hankel_L"),
    (lambda: get_spectral_filters(8, 4, dtype=torch.int32), "floating-point"),
    (lambda: STU(4, 4, 8, 4, use_approx=False)(torch.ones(1, 8, 4, dtype=torch.int64)), "floating-point"),
    (lambda: STU(4, 4, 400, num_eigh=400), "num_eigh must be at most 2.. at length 400"),
    (lambda: STU(0, 4, 8, 4), "d_in must be an integer >= 1, got 0"),
    (lambda: STU(4, True, 8, 4), "d_out must be an integer >= 1, got True"),
    (lambda: STU(4, "4", 8, 4), "d_out must be an integer >= 1, got '4'"),
    (lambda: STU(4, 4, 8, 4, backend="scan"), "backend"),
    (lambda: STU(4, 4, 8, 4, d_in_tile=0), "d_in_tile"),
    (lambda: STU(4, 4, 8, precomputed_filters=torch.ones(7, 3)), "seq_len = 8"),
    (lambda: STU(4, 4, 9, precomputed_filters=FilterBank(torch.ones(8, 3))), "seq_len = 9"),
    (lambda: STU(4, 4, 8, 4)(torch.ones(1, 8, 5)), "4 channels"),
    (lambda: STU(4, 4, 8, 4)(torch.ones(8, 4)), "batch"),
    (lambda: STU(4, 4, 8, 4)(torch.ones(1, 0, 4)), "length"),
])  # fmt: skip
def test_stu_says_what_is_wrong_with_its_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------------------------------------------------
# stu.py: attention


def dense_attention(q, k, v, window, softcap):
    past = k.shape[2] - q.shape[2]
    i, j = torch.arange(q.shape[2])[:, None] + past, torch.arange(k.shape[2])
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.masked_fill((j > i) | (i - j > window), -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("T, past, window", [
    (1, 0, 0), (1, 9, 4), (7, 0, 100), (300, 0, 0), (300, 0, 37), (200, 50, 64),
])  # fmt: skip
def test_windowed_attention_equals_dense_masked_attention(T, past, window, softcap):
    q, k, v = (3 * torch.randn(2, 3, length, 8) for length in (T, past + T, past + T))
    expected = dense_attention(q, k, v, window, softcap)
    assert relative_error(windowed_attention(q, k, v, window, softcap), expected) < 1e-5


def test_windowed_attention_costs_length_times_window():
    attention = SlidingWindowAttention(16, 2, 32)
    with LargestTensor() as largest:
        attention(torch.randn(1, 4096, 16)).sum().backward()
    assert largest.numel <= 4096 * 16 * 3  # the projection to q, k, v; never 4096 x 4096


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_flash_attn_is_called_by_its_contract(monkeypatch, softcap):
    ran = []

    def fake(q, k, v, *, causal, window_size, softcap):
        ran.append(1)
        assert causal and window_size[1] == 0 and q.dtype == torch.bfloat16
        q, k, v = (t.float().transpose(1, 2) for t in (q, k, v))  # its layout is [B, T, H, hd]
        assert q.shape[1] == 2 and q.shape[3] == 16
        return dense_attention(q, k, v, window_size[0], softcap).transpose(1, 2).bfloat16()

    attention = SlidingWindowAttention(32, 2, (20, 0), softcap).bfloat16()
    x = torch.randn(2, 90, 32).bfloat16()
    expected = attention(x).float()
    monkeypatch.setattr(stu, "on_cuda_16_bit", lambda t: t.element_size() == 2)
    monkeypatch.setattr(stu, "flash_attn_func", fake)
    assert relative_error(attention(x).float(), expected) < 2e-2
    y, _ = in_pieces(attention, x, [50])  # its causal mask aligns the last query with the last key
    assert relative_error(y.float(), expected) < 2e-2 and len(ran) == 2
    mask = torch.arange(90).expand(2, -1) >= 10
    assert (
        attention(x, attention_mask=mask).isfinite().all() and len(ran) == 2
    )  # it knows no padding


def test_attention_in_pieces_equals_the_whole_sequence():
    for window, T, B in ((0, 5, 1), (16, 100, 2), (200, 100, 1)):
        attention, x = SlidingWindowAttention(32, 4, window), torch.randn(B, T, 32)
        whole = attention(x)
        for cuts in (random_cuts(T, 3), range(1, T)):
            y, state = in_pieces(attention, x, cuts)
            assert relative_error(y, whole) < 1e-5 and state.memory[0].shape[2] == window + 1


def test_attention_depends_on_distance_not_on_position():
    attention, x = SlidingWindowAttention(32, 4, 8).double(), torch.randn(1, 40, 32).double()
    assert relative_error(attention(x[:, 10:])[:, 8:], attention(x)[:, 18:]) < 1e-5
    empty = stu.start_ring(torch.zeros(1, 4, 1, 8).double(), window=8)
    state = empty._replace(
        position=torch.tensor(10**8)
    )  # a stream that begins after so many tokens
    assert relative_error(attention(x, state, use_cache=True)[0], attention(x)) < 1e-5


def test_attention_has_the_gradients_of_finite_differences():
    x = torch.randn(1, 6, 8, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(SlidingWindowAttention(8, 2, 3).double(), x)


def test_the_state_of_a_long_piece_is_as_small_as_its_window():
    for layer in (SlidingWindowAttention(8, 1, 4), STU(8, 8, 68, use_tensorized=True)):
        _, state = layer(torch.randn(1, 2000, 8), use_cache=True)
        assert all(
            t.untyped_storage().nbytes() == t.element_size() * t.numel() for t in state.memory
        )


@pytest.mark.parametrize("window", [-1, 2.5, (4, 1), (-1, -1), (4, 0, 0)])
def test_attention_refuses_windows_that_see_the_future_or_nothing(window):
    with pytest.raises(ValueError, match="window_size"):
        SlidingWindowAttention(32, 4, window)


# ------------------------------------------------------------------------------------------------------------
# stu.py: block and model


def small_config(**changes):
    sizes = {
        "n_embd": 32,
        "n_layers": 4,
        "n_heads": 4,
        "seq_len": 48,
        "window_size": 12,
        "vocab_size": 61,
    }
    return FlashSTUConfig(**(sizes | {"torch_dtype": "float32"} | changes))


def small_model(**changes):
    return FlashSTU(small_config(**changes)).eval()


MODELS = [
    {},
    {"use_attn": False},
    {"use_stu": False},
    {"use_approx": False, "use_hankel_L": True, "softcap": 0.0},
    {"stu_enable_mlp_sandwich": True, "stu_mlp_hidden_size": 24, "bias": True},
    {"use_tensorized": True, "num_eigh": 3},
    {"d_in_tile": 10, "d_out_tile": 7, "window_size": (5, 0)},
]
models = pytest.mark.parametrize("options", MODELS, ids=lambda o: "+".join(o) or "default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("options", [*MODELS, {"use_gradient_checkpointing": True}])
def test_cuda_computes_what_the_cpu_does(options):
    """Loss, gradients, a piece from a state, padding; in float32, and as well as it can in bfloat16."""
    model, ids = small_model(**options), torch.randint(61, (2, 700))

    def results(model, ids):
        mask = torch.ones_like(ids)
        mask[0, :20] = 0
        _, state = model.hidden(ids[:, :90], use_cache=True)
        found = [model.hidden(ids[:, 90:120], state)[0], model.hidden(ids, attention_mask=mask)[0]]
        model.zero_grad()
        found.append(model(ids, labels=ids).loss)
        found[-1].backward()
        found += [p.grad for p in model.parameters()]
        return [t.detach().float().cpu() for t in found]

    expected = results(model, ids)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        found = results(copy.deepcopy(model).to("cuda", dtype), ids.cuda())
        assert max(map(relative_error, found, expected)) < tolerance
    greedy = model.generate(ids[:, :30], max_new_tokens=20, temperature=0)
    found = model.cuda().generate(ids[:, :30].cuda(), max_new_tokens=20, temperature=0)
    assert torch.equal(found.cpu(), greedy)


def test_the_documented_lines_run_as_they_stand(tmp_path):
    config = FlashSTUConfig(n_embd=512, n_layers=12, n_heads=8, seq_len=2048, vocab_size=50257)
    model = FlashSTU(config)
    input_ids = torch.randint(0, config.vocab_size, (2, 128))
    outputs = model(input_ids=input_ids)
    assert outputs.logits.shape == (2, 128, 50257) and outputs[1] is outputs.logits
    generated = model.generate(
        input_ids=input_ids[:, :10], max_length=14, temperature=0.8, top_k=40
    )
    assert generated.shape == (2, 14) and torch.equal(generated[:, :10], input_ids[:, :10])
    model.save_pretrained(tmp_path / "my_flash_stu_model")
    loaded = FlashSTU.from_pretrained(tmp_path / "my_flash_stu_model")
    assert torch.equal(loaded(input_ids).logits, outputs.logits)
    loss = model(input_ids=input_ids, labels=input_ids.clone()).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    block = FlashSTUBlock(d_model=512, sequence_length=2048, num_filters=24, use_attention=False)
    y = block(torch.randn(2, 2048, 512))
    y = block(y, use_cache=False)
    assert y.shape == (2, 2048, 512)


def test_the_lines_of_the_readme_run_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (HERE / "README.md").read_text(encoding="utf-8")
    use, chat = re.findall(r"```python\n((?:import sys\n)?import torch\n.*?)```", text, re.DOTALL)
    Path("readme.py").write_text(use)
    names = runpy.run_path("readme.py")
    assert names["y"].shape == (2, 1948, 64) and names["tokens"].shape == (2, 150)
    small_model(vocab_size=256).save_pretrained("runs/default/model")
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nand then?\n"))
    Path("chat.py").write_text(chat)
    runpy.run_path("chat.py")


@models
@torch.no_grad()
def test_model_in_pieces_and_token_by_token_equals_the_whole(options):
    model, ids = small_model(**options), torch.randint(61, (2, 120))  # 2.5 times seq_len
    step = lambda ids, state, use_cache: model(ids, state=state, use_cache=use_cache)[1:]
    for length in (48, 120):
        whole = model(ids[:, :length]).logits
        for cuts in ([1, *(1 + cut for cut in random_cuts(length - 1, 2))], range(1, length)):
            assert relative_error(in_pieces(step, ids[:, :length], cuts)[0], whole) < 1e-5


@models
def test_cached_generation_equals_recomputation(options):
    model = small_model(**options)
    for prompt in (
        torch.randint(61, (1, 1)),
        torch.randint(61, (3, 30)),
        torch.randint(61, (1, 110)),
    ):
        ids = prompt
        for _ in range(25):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(model.generate(prompt, max_new_tokens=25, temperature=0), ids)


def test_blocks_stand_alone_and_in_a_module_list():
    sizes = {"d_model": 16, "sequence_length": 30, "num_filters": 8, "n_heads": 2, "window_size": 5}
    blocks = torch.nn.ModuleList(FlashSTUBlock(use_attention=i % 2 == 1, **sizes) for i in range(4))
    x = whole = steps = torch.randn(2, 30, 16)
    for block in blocks:
        whole = block(whole)
        steps, _ = in_pieces(block, steps, range(1, 30))
    assert whole.shape == x.shape and relative_error(steps, whole) < 1e-5


@pytest.mark.parametrize("layers, T", [(2, 128), (48, 128), (12, 1024), (2, 8192)])
def test_activations_keep_their_scale_whatever_length_and_depth(layers, T):
    config = small_config(n_embd=64, n_layers=layers, seq_len=T, num_eigh=24, window_size=64)
    model, scales = FlashSTU(config), []
    for layer in model.layers:
        layer.register_forward_hook(
            lambda _, x, y: scales.extend([x[0].square().mean(), y.square().mean()])
        )
    with torch.no_grad():
        model.hidden(torch.randint(61, (1, T)))
    assert (
        len(scales) == 2 * layers
        and 0.4 < scales[-1].sqrt()
        and all(s.sqrt() < 0.8 for s in scales)
    )


def test_loss_is_the_mean_cross_entropy_of_the_next_token():
    model, ids = small_model(), torch.randint(61, (3, 40))
    logits, labels = model(ids).logits[:, :-1].flatten(0, 1), ids.clone()
    expected = F.cross_entropy(logits, ids[:, 1:].flatten())
    assert torch.allclose(model(ids, labels=labels).loss, expected)
    labels[0, :20] = -100
    expected = F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)
    assert torch.allclose(model(ids, labels=labels).loss, expected)
    labels[:] = -100
    assert model(ids, labels=labels).loss == 0


def test_the_loss_of_a_text_in_windows_that_go_on_is_that_of_the_whole():
    model, ids, state, losses = small_model(), torch.randint(61, (2, 97)), None, []
    for start in range(0, 96, 24):  # the last token of a window begins the next
        window = ids[:, start : start + 25]
        loss, _, state = model(window, labels=window, state=state, use_cache=True)
        losses.append(loss)
    assert torch.allclose(torch.stack(losses).mean(), model(ids, labels=ids).loss)


def test_chunked_loss_has_the_gradients_of_the_whole_and_never_holds_all_logits():
    model, ids = small_model(vocab_size=200064, n_layers=1), torch.randint(200064, (2, 201))
    with LargestTensor() as largest:
        model(ids, labels=ids).loss.backward()
    assert largest.numel <= 2**26 < 2 * 200 * 200064
    gradient = model.tok_emb.weight.grad.clone()
    model.zero_grad()
    F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    assert relative_error(gradient, model.tok_emb.weight.grad) < 1e-5


@models
def test_gradient_checkpointing_changes_no_gradient(options):
    model, ids = small_model(**options).train(), torch.randint(61, (2, 48))
    gradients = []
    for model.gradient_checkpointing in (False, True):
        loss = model(ids, labels=ids).loss
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for a, b in zip(*gradients):
        assert torch.equal(a, b)


def test_every_row_of_a_batch_is_on_its_own():
    model, ids = small_model(), torch.randint(61, (4, 30))
    assert relative_error(model(ids).logits[2:3], model(ids[2:3]).logits) < 1e-5


def test_each_generation_option_does_what_it_says():
    model, prompt = small_model(), torch.randint(61, (2, 10))
    greedy = model.generate(prompt, max_new_tokens=8, temperature=0)
    for same in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-50}):
        assert torch.equal(greedy, model.generate(prompt, max_new_tokens=8, **same))
    assert torch.equal(greedy, model.generate(prompt, max_length=18, temperature=0))
    assert torch.equal(greedy[:, 10:], torch.stack(list(model.stream(prompt, 8, temperature=0)), 1))
    assert torch.equal(model.generate(prompt, max_length=10), prompt)
    stop = greedy[0, 12]
    stopped = model.generate(prompt[:1], max_new_tokens=8, temperature=0, stop_token=int(stop))
    assert stopped.shape[1] <= 13 and stopped[0, -1] == stop
    rngs = (torch.Generator().manual_seed(3) for _ in range(2))
    assert torch.equal(*(model.generate(prompt, max_new_tokens=8, generator=rng) for rng in rngs))
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert {int(stu.sample(logits, 1.0, top_p=0.6)) for _ in range(200)} == {0, 1}
    assert {int(stu.sample(logits, 1.0, top_k=3)) for _ in range(300)} == {0, 1, 2}


@pytest.mark.parametrize("options, message", [
    ({}, "give one of the two lengths"), ({"max_length": 9, "max_new_tokens": 3}, "give one of the two lengths"),
    ({"max_length": 3}, "max_new_tokens .* got -1"), ({"max_new_tokens": -1}, "max_new_tokens .* got -1"),
    ({"max_new_tokens": 3, "temperature": -1}, "temperature .* got -1"),
    ({"max_new_tokens": 3, "temperature": math.nan}, "temperature .* got nan"),
    ({"max_new_tokens": 3, "top_p": 0.0}, "top_p must be more than 0"),
    ({"max_new_tokens": 3, "stop_token": 61}, "stop_token .* got 61"),
    ({"max_new_tokens": 3, "stop_token": -1}, "stop_token .* got -1"),
    ({"max_new_tokens": 3, "stop_token": 5.5}, "stop_token .* got 5.5"),
])  # fmt: skip
def test_generation_says_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        small_model().generate(torch.randint(61, (1, 4)), **options)


def test_weights_that_are_not_finite_do_not_speak():
    model = small_model()
    with torch.no_grad():
        model.layers[1].mixer.c_proj.weight[0, 0] = math.nan
    for temperature in (0, 1.0):
        with pytest.raises(ValueError, match="logits must be finite"):
            model.generate(torch.randint(61, (1, 4)), max_new_tokens=1, temperature=temperature)


@pytest.mark.parametrize("ids, labels, message", [
    ([[1, 2]], None, r"token ids must be a tensor.*got \[\[1, 2\]\]"),
    (torch.ones(1, 4), None, "got torch.float32"), (torch.ones(1, 4).bool(), None, "got torch.bool"),
    (torch.ones(4).long(), None, r"got \[4\]"), (torch.ones(1, 0).long(), None, "length >= 1"),
    (torch.ones(1, 4).long(), torch.ones(4).long(), r"got \[4\]"),
    (torch.ones(1, 4).long(), torch.ones(1, 3).long(), r"labels must have the shape"),
    (torch.ones(1, 1).long(), torch.ones(1, 1).long(), "length > 1"),
    (torch.full((1, 4), 61), None, r"token id 61 is not in \[0, 61\)"),
])  # fmt: skip
def test_token_ids_and_labels_have_one_door(ids, labels, message):
    with pytest.raises(ValueError, match=message):
        small_model()(ids, labels)


def test_integers_of_any_width_and_a_batch_of_none_are_legal():
    model, ids = small_model(), torch.randint(61, (2, 20))
    loss = model(ids, labels=ids).loss
    assert torch.equal(model(ids.int(), labels=ids.to(torch.int16)).loss, loss)
    assert model(ids[:0]).logits.shape == (0, 20, 61) and model(ids[:0], labels=ids[:0]).loss == 0
    assert model.generate(ids[:0], max_new_tokens=3).shape == (0, 23)
    for options in KINDS:
        layer = make_stu(30, 5, 7, **options)
        y, _ = in_pieces(layer, torch.randn(0, 30, 5), [11])
        assert y.shape == layer(torch.randn(0, 30, 5)).shape == (0, 30, 7)
    sizes = {
        "n_embd": np.int64(32),
        "seq_len": np.int32(48),
        "mlp_scale": np.float32(2),
    }
    config = small_config(**sizes)
    assert {name: type(getattr(config, name)) for name in sizes} == dict(
        zip(sizes, (int, int, float))
    )


def test_a_text_goes_on_from_the_state_of_the_last():
    """... whether it was left in the middle of a stream or after it: the last token begins what follows."""
    model, ids, greedy = small_model(), torch.randint(61, (2, 30)), {"temperature": 0}
    whole = model.generate(ids, max_new_tokens=12, **greedy)
    for n in (1, 5, 12):
        state = []
        for i, token in enumerate(model.stream(ids, 12, state=state, **greedy), 1):
            if i == n:
                break
        copied = stu.select_rows(state, [0, 1])
        rest = model.generate(token[:, None], max_new_tokens=12 - n, state=copied, **greedy)
        assert torch.equal(rest, whole[:, 30 + n - 1 :])
        more = torch.cat([token[:, None], torch.randint(61, (2, 4))], dim=1)
        a = model.generate(more, max_new_tokens=6, state=state, **greedy)
        b = model.generate(torch.cat([whole[:, : 30 + n - 1], more], 1), max_new_tokens=6, **greedy)
        assert torch.equal(a, b[:, 30 + n - 1 :])


@models
@torch.no_grad()
def test_a_state_is_repeated_for_several_rows_and_the_original_stays(options):
    model, prompt = small_model(**options), torch.randint(61, (2, 30))
    rows, more = [1, 0, 1, 1], torch.randint(61, (4, 7))
    _, state = model.hidden(prompt, use_cache=True)
    for _ in range(2):  # the copies do not touch what they were made from
        x, _ = model.hidden(more, stu.select_rows(state, rows), use_cache=True)
        whole, _ = model.hidden(torch.cat([prompt[rows], more], dim=1))
        assert relative_error(x, whole[:, 30:]) < 1e-5


@torch.no_grad()
def test_a_token_has_fixed_shapes_and_places_and_compiles_to_one_graph():
    model, ids = small_model(), torch.randint(61, (2, 20))
    _, state = model.hidden(ids[:, :10], use_cache=True)
    compiled = torch.compile(model.hidden, fullgraph=True, backend="aot_eager")
    places = [
        t.data_ptr() for layer_state in state for t in (*layer_state.memory, layer_state.position)
    ]
    for t in range(10, 20):
        with torch._dynamo.config.patch(error_on_recompile=t > 10):
            x, state = compiled(ids[:, t : t + 1], state, use_cache=True)
    assert relative_error(x, model.hidden(ids)[0][:, -1:]) < 1e-5
    after = [
        t.data_ptr() for layer_state in state for t in (*layer_state.memory, layer_state.position)
    ]
    assert after == places


def test_with_gradients_a_state_is_not_overwritten():
    """... so one can differentiate through the pieces of a sequence."""
    for layer in (STU(8, 8, 30), SlidingWindowAttention(8, 2, 5)):
        x = torch.randn(2, 24, 8)
        whole = value_and_gradients(layer, x)
        y, _ = in_pieces(layer, x, [7, 8, 9, 20])
        pieces = [y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))]
        assert max(map(relative_error, pieces, whole)) < 1e-5


def test_a_state_of_another_model_is_refused():
    ids = torch.zeros(2, 4, dtype=torch.long)
    for changes, rows, message in (
        ({"n_layers": 2}, 2, "a state of 4 layers, but there are 2"), ({}, 1, "wants a state"),
        ({"window_size": 11}, 2, "wants a state"), ({"n_embd": 64}, 2, "wants a state"),
        ({"n_heads": 2}, 2, "wants a state"),
    ):  # fmt: skip
        _, _, state = small_model()(ids, use_cache=True)
        with pytest.raises(ValueError, match=message):
            small_model(**changes)(ids[:rows, :1], state=state)


@pytest.mark.parametrize("make", [lambda: STU(6, 6, 30), lambda: SlidingWindowAttention(6, 1, 4)])
def test_a_mask_is_of_ones_and_zeros_and_hides_whatever_it_hides(make):
    layer, x, mask = make(), torch.randn(2, 9, 6), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    expected = layer(x, attention_mask=mask)[0, 4:]
    for hidden in (math.nan, math.inf, 1e30):
        x[0, :4] = hidden
        for same in (mask, mask.bool(), mask.float()):
            assert torch.equal(layer(x, attention_mask=same)[0, 4:], expected)
    for wrong in ((mask - 1) * 1e9, mask * 0.5, mask * 2, mask[:, :1], mask[:1], mask[0]):
        with pytest.raises(ValueError, match="attention_mask must be"):
            layer(x, attention_mask=wrong)


@pytest.mark.parametrize("changes, message", [
    ({"n_heads": 5}, "n_heads = 5 does not cut 32"), ({"use_approx": "False"}, "use_approx must be True or False"),
    ({"softcap": math.inf}, "softcap"), ({"softcap": math.nan}, "softcap"), ({"n_layers": True}, "n_layers"),
    ({"torch_dtype": "int32"}, "torch_dtype .* int32"), ({"torch_dtype": "flot"}, "torch_dtype .* flot"),
    ({"n_embd": "32"}, "n_embd"), ({"window_size": 2.5}, "window_size"), ({"mlp_scale": -1.0}, "mlp_scale"),
    ({"dropout": -0.1}, "dropout"), ({"softcap": -1.0}, "softcap"), ({"window_size": (4, 4)}, "window_size"),
    ({"n_layers": 0}, "n_layers"), ({"seq_len": 4.5}, "seq_len"),
    ({"use_attn": False, "use_stu": False}, "no layer"),
    ({"stu_mlp_hidden_size": 2.5}, "stu_mlp_hidden_size"),
])  # fmt: skip
def test_config_says_what_is_inconsistent(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**changes)


def test_config_refuses_unknown_fields():
    with pytest.raises(TypeError, match="n_embed"):
        FlashSTUConfig(n_embed=3)


@models
def test_a_saved_model_comes_back_bit_equal(options, tmp_path):
    model, ids = small_model(**options, dropout=0.1), torch.randint(61, (2, 20))
    model.save_pretrained(tmp_path)
    again = FlashSTU.from_pretrained(tmp_path).eval()
    assert again.config == model.config and torch.equal(again(ids).logits, model(ids).logits)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors", "stu.py"]
    model.to(torch.bfloat16).save_pretrained(tmp_path)  # cast after it was made
    assert torch.equal(FlashSTU.from_pretrained(tmp_path).eval()(ids).logits, model(ids).logits)


def test_nothing_else_in_a_folder_is_taken_for_the_model(tmp_path):
    """Other weights beside it, shards of a larger model."""
    model, other, ids = small_model(), small_model(n_layers=6), torch.randint(61, (1, 9))
    (tmp_path / "unfinished").mkdir()  # a folder of the user's
    other.save_pretrained(tmp_path / "other")
    for name in ("model_old", "model2", "model-old", "model-00001-of-00001"):
        shutil.copyfile(tmp_path / "other" / "model.safetensors", tmp_path / f"{name}.safetensors")
    model.save_pretrained(tmp_path)
    assert torch.equal(FlashSTU.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    assert (tmp_path / "unfinished").exists()


def test_weights_that_are_views_of_one_buffer_are_saved(tmp_path):
    model, ids = small_model(), torch.randint(61, (1, 9))
    parameters = list(model.parameters())
    buffer = torch.nn.utils.parameters_to_vector(parameters).detach()
    torch.nn.utils.vector_to_parameters(buffer, parameters)
    model.save_pretrained(tmp_path)
    assert torch.equal(FlashSTU.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_a_setting_assigned_later_is_checked_where_a_model_is_made():
    config = small_config()
    config.torch_dtype = torch.bfloat16
    assert FlashSTU(config).tok_emb.weight.dtype == torch.bfloat16
    config.use_approx = "False"
    with pytest.raises(ValueError, match="use_approx must be True or False"):
        FlashSTU(config)


def test_a_folder_that_holds_no_whole_model_is_refused(tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(
            ValueError, match=r"has a model.safetensors; .*" + re.escape(str(folder))
        ):
            FlashSTU.from_pretrained(folder)
    small_model().save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    for file, damage, message in (
        (weights, lambda b: b[: len(b) // 2], "model.safetensors is damaged"),
        (weights, lambda b: b"", "model.safetensors is damaged"),
        (
            config,
            lambda b: b.replace(b'"n_embd": 32', b'"n_embd": 64'),
            "is not the one that the weights were saved with",
        ),
        (config, lambda b: b.replace(b'"n_layers": 4', b'"n_layers": 10000000'), "10000000 layers"),
        (
            config,
            lambda b: b.replace(b'"softcap": 50', b'"softcap": 40'),
            "is not the one that the weights",
        ),
        (config, lambda b: b.replace(b'"n_embd"', b'"n_embed"'), "config.json lacks n_embd"),
        (config, lambda b: b.replace(b'"bias": false', b'"bias": 3'), "bias must be True or False"),
        (config, lambda b: b[:20], "config.json is damaged"),
        (config, lambda b: b"\xff\xfe", "config.json is damaged"),
    ):
        whole = file.read_bytes()
        file.write_bytes(damage(whole))
        with pytest.raises(ValueError, match=message):
            FlashSTU.from_pretrained(tmp_path)
        file.write_bytes(whole)
    from safetensors.torch import load_file, save_file

    save_file(load_file(weights), weights)  # as transformers does, without our copy of the config
    whole = config.read_bytes()
    for old, new in ((b'"n_embd": 32', b'"n_embd": 64'), (b'"bias": false', b'"bias": true')):
        config.write_bytes(whole.replace(old, new))
        with pytest.raises(ValueError, match="config.json and weights do not fit"):
            FlashSTU.from_pretrained(tmp_path)
    config.write_bytes(whole)
    shards = tmp_path / "model.safetensors.index.json"
    shards.write_text("{}")
    with pytest.raises(ValueError, match="remove the one that is old"):
        FlashSTU.from_pretrained(tmp_path)
    shards.unlink()
    FlashSTU.from_pretrained(tmp_path)


def test_a_save_killed_anywhere_leaves_one_whole_model(tmp_path, monkeypatch):
    """... the old one or the new one: new weights never meet an old config."""
    ids, old, new = torch.randint(61, (1, 20)), small_model(), small_model(window_size=3)
    expected = [model(ids).logits for model in (old, new)]
    for deaths_at in range(5):
        steps = iter(range(99))

        def dies(method, steps=steps, at=deaths_at):
            def step(*args, **kwargs):
                if next(steps) == at:
                    raise KeyboardInterrupt
                return method(*args, **kwargs)

            return step

        folder = tmp_path / str(deaths_at)
        old.save_pretrained(folder)
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(Path, "replace", dies(Path.replace))
            patch.setattr(Path, "unlink", dies(Path.unlink))
            new.save_pretrained(folder)
        try:
            logits = FlashSTU.from_pretrained(folder)(ids).logits
        except ValueError as error:
            assert "delete config.json" in str(error)
            (folder / "config.json").unlink()
            logits = FlashSTU.from_pretrained(folder)(ids).logits
        assert any(torch.equal(logits, one) for one in expected)


def test_filters_of_ones_own_are_saved_with_the_model(tmp_path):
    model, ids = small_model(), torch.randint(61, (1, 20))
    model.layers[2].mixer = STU(32, 32, 48, precomputed_filters=torch.randn(48, 5))
    model.save_pretrained(tmp_path)
    assert torch.equal(FlashSTU.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    other = small_model()
    other.layers[2].mixer = STU(32, 32, 48, num_eigh=5)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids).logits, model(ids).logits)
    assert not any(
        name.endswith("filters") and "M_" not in name for name in small_model().state_dict()
    )


def test_an_output_matrix_that_fine_tuning_added_is_the_embedding(tmp_path):
    from safetensors.torch import load_file, save_file

    model, ids = small_model(), torch.randint(61, (1, 20))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": tensors["tok_emb.weight"].clone()},
        tmp_path / "model.safetensors",
    )
    assert torch.equal(FlashSTU.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    save_file(
        tensors | {"lm_head.weight": tensors["tok_emb.weight"] + 1}, tmp_path / "model.safetensors"
    )
    with pytest.raises(ValueError, match="lm_head.weight is not the embedding"):
        FlashSTU.from_pretrained(tmp_path)


def test_a_failed_save_leaves_the_old_model_whole(tmp_path, monkeypatch):
    import safetensors.torch

    model, ids = small_model(), torch.randint(61, (2, 20))
    model.save_pretrained(tmp_path)
    expected = model(ids).logits

    def half(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with torch.no_grad():
        model.tok_emb.weight.add_(1)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(tmp_path)
    assert torch.equal(FlashSTU.from_pretrained(tmp_path)(ids).logits, expected)


@pytest.mark.parametrize("attention", [False, True])
def test_a_block_compiles_without_graph_breaks(attention):
    sizes = {"d_model": 16, "sequence_length": 32, "num_filters": 8, "n_heads": 2}
    block, x = FlashSTUBlock(use_attention=attention, **sizes), torch.randn(2, 32, 16)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    y, *gradients = value_and_gradients(block, x)
    z, *compiled_gradients = value_and_gradients(compiled, x)
    assert relative_error(z, y) < 1e-5
    for a, b in zip(compiled_gradients, gradients):
        assert relative_error(a, b) < 1e-4


def test_a_compiled_model_trains_and_evaluates_like_the_plain_one():
    model, ids = small_model(), torch.randint(61, (2, 40))
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        assert relative_error(compiled(ids).logits, model(ids).logits) < 1e-5
    model.train()
    losses = [m(ids, labels=ids).loss for m in (compiled, model)]
    for a, b in zip(*(torch.autograd.grad(loss, list(model.parameters())) for loss in losses)):
        assert relative_error(a, b) < 1e-4


def test_import_needs_only_torch_and_numpy():
    code = """
import sys, stu
optional = {"datasets", "matplotlib", "safetensors", "tiktoken", "tokenizers", "transformers"}
print(*optional & set(sys.modules), "FlashSTUForCausalLM" in vars(stu))
"""
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, cwd=HERE, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert output == "False\n"


# ------------------------------------------------------------------------------------------------------------
# stu.py: it learns


def experiment(name):
    """The functions of a script in experiments/, by name."""
    return runpy.run_path(str(HERE / "experiments" / f"{name}.py"))


def learn(ask, num_steps, rate, **options):
    """Share of right answers of a two-layer model after some steps; ask(model) -> loss, share."""
    torch.manual_seed(0)
    model = FlashSTU(small_config(n_layers=2, n_heads=2, vocab_size=64, softcap=0.0, **options))
    optimizers = experiment("recall")["make_optimizers"](model)
    for step in range(num_steps):
        loss, _ = ask(model)
        loss.backward()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate * min(1, 2 - 2 * step / num_steps)
            optimizer.step()
        model.zero_grad()
    with torch.no_grad():
        return ask(model)[1].item()


def test_the_hybrid_recalls_what_neither_kind_of_layer_recalls_alone():
    """The STU hands each value its key (the token before), attention finds it: two layers and 100
    steps are enough."""
    recall = experiment("recall")

    def ask(model):
        return recall["ask"](model, recall["associative_recall"], 64)

    options = {"n_embd": 64, "seq_len": 32, "window_size": 32, "num_eigh": 16, "mlp_scale": 1}
    assert learn(ask, 100, 1e-2, **options) > 0.99
    assert learn(ask, 100, 1e-2, **options, use_stu=False) < 0.5
    assert learn(ask, 100, 1e-2, **options, use_attn=False) < 0.5


def follower(row, t, back):
    """What came after the last time that the `back` tokens up to t were there; 0 if never."""
    for s in range(t - 1, back - 2, -1):
        if row[s + 1 - back : s + 1] == row[t + 1 - back : t + 1]:
            return row[s + 1]
    return 0


@pytest.mark.parametrize("task", ["associative recall", "induction", "selective copying"])
def test_what_the_tasks_ask_for_stands_in_what_the_model_has_read(task):
    recall = experiment("recall")
    questions, _ = recall["TASKS"][task]
    back = 2 if task == "induction" else 1

    def oracle(ids):
        rows = [[follower(row, t, back) for t in range(len(row))] for row in ids.tolist()]
        answers = torch.tensor(rows)
        if task == "selective copying":
            answers[:, 48:] = ids[ids < 62].view(-1, 8)
        return stu.Output(None, 100.0 * F.one_hot(answers, 64), None)

    _, right = recall["ask"](oracle, questions, 50)
    assert right > 0.9


def remember(model):
    """Random signs; the label is the octile of their exponential average, a memory of 300 steps."""
    decay = 0.99
    signs = 2 * torch.randint(2, (8, 512)) - 1
    weights = math.sqrt(1 - decay**2) * decay ** torch.arange(512)
    average = stu.fft_conv(signs[:, None].float(), weights[None])[:, 0, 100:].contiguous()
    labels = torch.bucketize(average, torch.tensor([-1.15, -0.67, -0.32, 0, 0.32, 0.67, 1.15]))
    logits = model((signs + 1) // 2).logits[:, 100:]
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    return loss, (logits.argmax(dim=-1) == labels).float().mean()


def test_the_hybrid_remembers_beyond_the_attention_window():
    options = {"n_embd": 32, "seq_len": 512, "window_size": 64, "num_eigh": 24, "mlp_scale": 2}
    assert learn(remember, 150, 2e-2, **options) > 0.85
    assert learn(remember, 150, 2e-2, **options, use_stu=False) < 0.65


# ------------------------------------------------------------------------------------------------------------
# lds.py: the system


@pytest.mark.parametrize("T", [1, 2, 37, 1500])
@pytest.mark.parametrize("diagonal", [True, False])
def test_the_fast_states_equal_the_definition(diagonal, T):
    system = LDS(12, 3, 2, dtype=torch.float64, diagonal=diagonal)
    u = torch.randn(4, T, 3, dtype=torch.float64)
    h = torch.randn(4, 12, dtype=torch.float64)
    assert relative_error(system.states(u, h), system.states_step_by_step(u, h)) < 1e-12


@pytest.mark.parametrize("T", [1, 2, 37, 1500])
@pytest.mark.parametrize("diagonal", [True, False])
def test_a_system_equals_its_recurrence_whole_and_in_pieces(diagonal, T):
    system = LDS(12, 3, 2, diagonal=diagonal)
    torch.nn.init.normal_(system.h0)
    u = torch.randn(4, T, 3)
    y = system.states_step_by_step(u, system.h0.expand(4, -1)) @ system.C.T
    assert relative_error(system(u), y) < 1e-5
    assert torch.allclose(system(u[0]), system(u)[0], atol=1e-6)  # without a batch
    cuts = [T // 3, T // 2] if T > 5 else []
    assert relative_error(in_pieces(system, u, cuts)[0], y) < 1e-5


def test_every_part_of_a_dense_system_gets_its_gradient():
    system = LDS(5, 2, 3, dtype=torch.float64, diagonal=False)
    u = torch.randn(2, 9, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *p: system(u), tuple(system.parameters()))


def test_random_lds_has_the_poles_it_was_asked_for():
    sizes = {"state_dim": 400, "input_dim": 10, "output_dim": 5}
    system = random_LDS(**sizes, lower_bound=0.3, spectral_radius=0.9)
    size = system.A.detach().abs()
    assert size.max() == pytest.approx(0.9)
    assert 0.3 <= size.min() < 0.35
    assert 100 < (system.A < 0).sum() < 300
    for name, value in sizes.items():
        assert getattr(system, name) == value


# ------------------------------------------------------------------------------------------------------------
# lds.py: the learner

LENGTHS = [(1, 1, False), (40, 40, False), (128, 24, False), (128, 24, True), (1024, 64, False)]


@pytest.mark.parametrize("L, K, hankel_L", LENGTHS)
def test_white_filters_are_orthonormal_and_span_the_bank(L, K, hankel_L):
    phi = get_spectral_filters(L, K, hankel_L, dtype=torch.float64)
    white = white_filters(phi, hankel_L)
    bank = phi if hankel_L else both_signs(phi)
    w = 1 - torch.arange(L).double()[:, None] / L
    assert (white.T @ (w * white) - torch.eye(white.shape[1])).abs().max() < 1e-9
    rest = bank - white @ (white.T @ (w * bank))
    assert (w.sqrt() * rest).norm(dim=0).max() < 1e-4 * bank.norm(dim=0).max()


def test_white_input_gives_uncorrelated_features_of_unit_variance():
    model = MiniSTU(64, 8, 1, 1)
    features = model.features(torch.randn(4000, 64, 1))  # [N, T, F]
    covariance = torch.einsum("ntf,ntg->fg", features, features) / features[..., 0].numel()
    assert (covariance - torch.eye(len(covariance))).abs().max() < 0.05


@pytest.mark.parametrize(
    "options", [{}, {"use_hankel_L": True}, {"backend": "lds"}, {"dtype": torch.float64}], ids=str
)
def test_ministu_equals_the_papers_formula(options):
    model = MiniSTU(seq_len=50, num_filters=10, input_dim=3, output_dim=2, **options)
    x = torch.randn(2, 50, 3)
    expected = stu_formula(x.double(), model.stu.bank.filters, model.stu.M.detach().double())
    assert model(x).shape == (2, 50, 2)
    assert (model(x) - expected).abs().max() < 1e-4
    assert torch.allclose(model(x[0]), model(x)[0], atol=1e-5)  # without a batch
    assert (model(x[:, :20]) - expected[:, :20]).abs().max() < 1e-4  # shorter than seq_len


def test_precomputed_filters_give_the_same_model():
    phi = get_spectral_filters(seq_len=128, K=24)
    given = MiniSTU(128, 24, 10, 5, precomputed_filters=phi)
    own = MiniSTU(128, 24, 10, 5)
    x, y = sample(random_LDS(20, 10, 5), 64, 128)
    assert relative_error(given.fit(x, y)(x), own.fit(x, y)(x)) < 1e-5


def ringing(degrees, radius=0.99):
    """A system of one input and one output, with the poles radius · e^(±iθ)."""
    system = LDS(2, 1, 1, diagonal=False)
    c = math.cos(math.radians(degrees))
    s = math.sin(math.radians(degrees))
    system.A.data = radius * torch.tensor([[c, -s], [s, c]])
    return system


def test_decays_of_both_signs_are_learned_and_slow_ringing_is_not():
    def error(degrees, radius=0.99):
        system = ringing(degrees, radius)
        x, y = sample(system, 64, 128)
        model = MiniSTU(128, 24, 1, 1).fit(x, y)
        return unseen_error(model, system, 128) / y.var().item()

    assert error(0) < 1e-11
    assert error(180) < 1e-11
    assert error(1) < 1e-7
    assert 1e-8 < error(5) < 1e-4
    assert error(20) > 1e-2
    assert error(90) > 0.3
    assert error(20, radius=0.5) < 1e-11  # what has died away after a few steps may ring


def test_filters_of_a_sector_learn_what_rings_in_it_and_are_no_recurrence_of_decays():
    t = torch.arange(128, dtype=torch.float64)[:, None, None]
    gap = torch.logspace(-3, 0, 60, dtype=torch.float64)[:, None]  # 1 - α, against angles up to 20°
    angles = torch.linspace(0, math.radians(20), 16, dtype=torch.float64)
    size = gap * (1 - gap) ** t
    G = torch.cat([size * torch.cos(t * angles), size * torch.sin(t * angles)], dim=2)
    U, sigma, _ = torch.linalg.svd(G.flatten(1), full_matrices=False)
    phi = U[:, :40] * sigma[:40].sqrt()
    system = ringing(20)
    x, y = sample(system, 64, 128)
    model = MiniSTU(128, 40, 1, 1, precomputed_filters=phi).fit(x, y)
    assert unseen_error(model, system, 128) < 1e-10 * y.var()
    recurrent = MiniSTU(128, 40, 1, 1, precomputed_filters=phi, backend="lds").fit(x, y)
    assert relative_error(recurrent(x), model(x)) < 1e-5
    with pytest.raises(ValueError, match="sums of decays"):
        model.to_lds()


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
def test_the_mlp_acts_on_the_outputs_of_the_stu(activation):
    model = MiniSTU(
        seq_len=128,
        num_filters=24,
        input_dim=10,
        output_dim=5,
        use_hankel_L=False,
        use_mlp=True,
        mlp_hidden_dim=20,
        mlp_num_layers=2,
        mlp_dropout=0.1,
        mlp_activation=activation,
        dtype=torch.float32,
        device=None,
        backend="spectral",
    )
    assert [tuple(p.shape) for p in model.mlp.parameters()] == [(20, 5), (20,), (5, 20), (5,)]
    x = torch.randn(2, 128, 10)
    assert model(x).shape == (2, 128, 5)
    assert not torch.equal(model(x), model(x))  # dropout
    model.eval()
    assert torch.allclose(model(x), model.mlp(model.stu(x)))


RECURRENT = [(1024, 24, False), (128, 24, True), (1024, 64, False), (33, 33, False), (5, 2, False)]


@pytest.mark.parametrize("L, K, hankel_L", RECURRENT)
def test_the_recurrent_backend_agrees_and_trains(L, K, hankel_L):
    convolved = MiniSTU(L, K, 6, 4, use_hankel_L=hankel_L)
    recurrent = MiniSTU(L, K, 6, 4, use_hankel_L=hankel_L, backend="lds")
    recurrent.load_state_dict(convolved.state_dict())
    x = torch.randn(2, L, 6)
    for a, b in zip(value_and_gradients(recurrent, x), value_and_gradients(convolved, x)):
        assert relative_error(a, b) < 1e-3


def test_ministu_with_64_channels_runs_as_a_recurrence():
    sizes = {"seq_len": 1024, "num_filters": 24, "input_dim": 64, "output_dim": 64}
    model = MiniSTU(**sizes, backend="lds", dtype=torch.float32)
    assert model(torch.randn(1, 1024, 64)).shape == (1, 1024, 64)


@pytest.mark.parametrize("backend", ["spectral", "lds"])
def test_a_batch_of_none_has_an_answer_of_none(backend):
    x = torch.randn(0, 20, 3)
    assert MiniSTU(32, 8, 3, 2, backend=backend)(x).shape == (0, 20, 2)
    for diagonal in (True, False):
        y, state = LDS(4, 3, 2, diagonal=diagonal)(x, use_cache=True)
        assert y.shape == (0, 20, 2)
        assert state.shape == (0, 4)


@pytest.mark.parametrize("state_dim, L, sequences", [(20, 128, 128), (256, 1024, 16)])
def test_least_squares_finds_the_system(state_dim, L, sequences):
    system = random_LDS(state_dim, 10, 5)
    x, y = sample(system, sequences, L)
    loss = unseen_error(MiniSTU(L, 24, 10, 5).fit(x, y), system, L)
    assert loss < 1e-12
    assert loss < 1e-10 * y.var()


def test_least_squares_survives_inputs_that_do_not_vary():
    system = random_LDS(8, 3, 2)
    x = torch.randn(50, 64, 3)
    x[..., 1] = 0  # a channel never seen
    model = MiniSTU(64, 16, 3, 2).fit(x, system(x))
    assert relative_error(model(x), system(x)) < 1e-4


def test_gradient_descent_finds_the_system():
    system = random_LDS(state_dim=20, input_dim=10, output_dim=5)
    options = {"num_steps": 400, "batch_size": 16, "learning_rate": 2e-3, "verbose": False}
    model, losses = train_stu_on_lds(system, seq_len=128, num_filters=24, **options)
    y = model(torch.randn(1, 128, 10))
    assert y.shape == (1, 128, 5)
    assert len(losses) == 400
    assert not model.training
    assert unseen_error(model, system, 128) < 1e-9  # far below 4.5e-4


def test_the_calls_of_the_published_package_work_as_they_are(tmp_path, capsys):
    """Its example script and its README, with only the import changed."""
    device = torch.device("cpu")
    system = random_LDS(state_dim=20, input_dim=10, output_dim=5, lower_bound=0.1, device=device)
    assert (system.dtype, system.device) == (torch.float32, device)
    assert system.A.shape == (20,)
    model, losses = train_stu_on_lds(
        lds=system,
        seq_len=32,
        num_filters=8,
        num_steps=20,
        batch_size=8,
        learning_rate=1e-2,
        verbose=True,
    )
    assert isinstance(losses, list)
    assert losses[-1] < losses[0]
    assert "20/20" in capsys.readouterr().out
    assert model.get_num_params() == sum(p.numel() for p in model.parameters())
    inputs = torch.randn(10, 32, 10, device=device, dtype=torch.float32)
    with torch.no_grad():
        for length in (16, 32):
            x = inputs[:, :length, :]
            assert model(x).shape == (10, length, 5)
            assert system(x).shape == (10, length, 5)
    plain = LDS(state_dim=20, input_dim=10, output_dim=5, dtype=torch.float64, device=None)
    assert plain(inputs).dtype == torch.float64
    assert plain.h0.shape == (20,)
    assert not plain.h0.any()
    for module in (model, system):
        torch.save(module.state_dict(), tmp_path / "saved.pt")
        copy.deepcopy(module).load_state_dict(torch.load(tmp_path / "saved.pt"))


def test_arguments_that_other_packages_order_otherwise_are_refused_by_position():
    with pytest.raises(TypeError, match="positional"):
        MiniSTU(32, 8, 4, 2, False)
    with pytest.raises(TypeError, match="positional"):
        MiniSTU(32, 8, 4, 2, False, True)
    with pytest.raises(TypeError, match="positional"):
        train_stu_on_lds(LDS(4, 3, 2), 32, 8, 10)


def test_training_with_an_mlp_lowers_the_loss(capsys):
    _, losses = train_stu_on_lds(
        random_LDS(8, 4, 2),
        32,
        8,
        num_steps=60,
        batch_size=8,
        learning_rate=1e-2,
        verbose=True,
        use_mlp=True,
        mlp_hidden_dim=16,
        mlp_num_layers=3,
        mlp_dropout=0.0,
        mlp_activation="tanh",
    )
    assert np.mean(losses[-10:]) < 0.5 * losses[0]
    assert "60/60" in capsys.readouterr().out


@pytest.mark.parametrize("L, K, hankel_L", [(128, 24, False), (64, 20, True), (512, 32, False)])
def test_a_fitted_stu_is_a_linear_dynamical_system(L, K, hankel_L):
    model = MiniSTU(L, K, 4, 3, use_hankel_L=hankel_L)
    model.fit(*sample(random_LDS(20, 4, 3), 64, L))
    system = model.to_lds()
    n = len(system.A)
    assert system.A.ndim == 1
    assert system.A.abs().max() < 1
    assert system.B.shape == (n, 4)
    assert system.C.shape == (3, n)
    x = torch.randn(2, L, 4)
    scale = model(x).std()
    assert (system(x) - model(x)).abs().max() < 1e-3 * scale
    start = torch.zeros(2, n, dtype=torch.float64)
    one_by_one = system.states_step_by_step(x.double(), start) @ system.C.T
    assert (one_by_one - model(x)).abs().max() < 1e-3 * scale
    long_after = system(torch.randn(1, 20 * L, 4))[:, -L:]
    assert long_after.std() < 3 * scale  # it stays sane past seq_len


# ------------------------------------------------------------------------------------------------------------
# lds.py: the demo


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, in which the test stands."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run_here(monkeypatch, capsys):
    """run_here(script, flags): what `python script flags` prints, run in this process."""

    def run(script, flags):
        monkeypatch.setattr("sys.argv", [script, *shlex.split(flags)])
        runpy.run_path(str(HERE / script), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def refusal(run_here, capsys):
    """refusal(script, flags): what the script says when it ends with an error."""

    def run(script, flags):
        with pytest.raises(SystemExit) as end:
            run_here(script, flags)
        assert end.value.code not in (None, 0)
        return f"{capsys.readouterr().err} {end.value}"

    return run


SMALL_DEMO = "--state_dim 6 --input_dim 3 --output_dim 2 --seq_len 24 --num_filters 6"


@pytest.mark.parametrize(
    "name, steps, begins",
    [("a.png", 0, b"\x89PNG"), ("a.gif", 1, b"GIF8"), ("a.pdf", 12, b"%PDF")],
)
def test_the_demo_prints_and_draws_in_the_format_of_the_name(
    tmp_path, run_here, name, steps, begins
):
    printed = run_here("lds.py", f"{SMALL_DEMO} --steps {steps} --out {tmp_path}/{name}")
    assert (tmp_path / name).read_bytes().startswith(begins)
    assert "least squares" in printed
    assert ("left" in printed) == (steps > 0)
    assert "\r" not in printed


def test_on_a_terminal_the_line_moves_and_elsewhere_there_are_ten(monkeypatch, capsys):
    train_stu_on_lds(random_LDS(4, 3, 2), 16, 4, num_steps=100, batch_size=2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    train_stu_on_lds(random_LDS(4, 3, 2), 16, 4, num_steps=100, batch_size=2)
    printed = capsys.readouterr().out
    assert printed.count("\r") == 99
    assert printed.count("\n") == 1


def test_the_curve_falls_as_the_losses_fall():
    losses = [10.0**-i for i in range(50)]
    curve = lds_module.curve(losses, final_length=100)
    assert curve[0] == "█"
    assert list(curve[:20]) == sorted(curve[:20], reverse=True)
    assert curve[20:] == 20 * "·"


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--out lds.txt", "must end in .png"),
        ("--out nowhere/lds.png", "cannot write a regular file"),
        ("--out folder.png", "cannot write a regular file"),
        ("--steps -1", "number of steps must be an integer >= 0, got -1"),
        ("--num_filters 25", "num_eigh must be at most 24"),
        ("--learning_rate 900", "training diverged"),
        ("--lower_bound 2", "lower_bound = 2.0"),
        ("--spectral_radius nan", "spectral_radius = nan"),
    ],
)
def test_the_demo_says_what_it_cannot_do(folder, refusal, flags, message):
    Path("folder.png").mkdir()
    assert message in refusal("lds.py", f"{SMALL_DEMO} {flags}")


# ------------------------------------------------------------------------------------------------
# lds.py: bad input

LDS_SIZES = {"state_dim": 4, "input_dim": 3, "output_dim": 2}
MINISTU_SIZES = {"seq_len": 8, "num_filters": 4, "input_dim": 3, "output_dim": 2}
ACCEPTED = {
    LDS: LDS_SIZES,
    random_LDS: LDS_SIZES,
    MiniSTU: MINISTU_SIZES,
    train_stu_on_lds: {"lds": LDS(4, 3, 2), "seq_len": 8, "num_filters": 4},
}


@pytest.mark.parametrize(
    "make, wrong, message",
    [
        (LDS, {"state_dim": 0}, "state_dim must be an integer >= 1, got 0"),
        (LDS, {"output_dim": 2.5}, "output_dim must be an integer >= 1, got 2.5"),
        (LDS, {"diagonal": "false"}, "diagonal must be True or False, got 'false'"),
        (random_LDS, {"lower_bound": 2.0}, "lower_bound = 2.0"),
        (random_LDS, {"spectral_radius": 1.5}, "spectral_radius = 1.5"),
        (MiniSTU, {"num_filters": 9}, "num_eigh must be at most 8 at length 8, got 9"),
        (MiniSTU, {"num_filters": 0}, "num_eigh"),
        (MiniSTU, {"seq_len": 8.5}, "seq_len must be an integer >= 1, got 8.5"),
        (MiniSTU, {"input_dim": 2.5}, "input_dim must be an integer >= 1, got 2.5"),
        (MiniSTU, {"output_dim": True}, "output_dim must be an integer >= 1, got True"),
        (MiniSTU, {"backend": "scan"}, "backend"),
        (MiniSTU, {"use_mlp": "false"}, "use_mlp must be True or False, got 'false'"),
        (MiniSTU, {"use_hankel_L": "no"}, "use_hankel_L must be True or False, got 'no'"),
        (MiniSTU, {"use_mlp": True, "mlp_activation": "swish"}, "relu, gelu or tanh"),
        (MiniSTU, {"use_mlp": True, "mlp_num_layers": 0}, "mlp_num_layers"),
        (MiniSTU, {"use_mlp": True, "mlp_hidden_dim": 2.5}, "mlp_hidden_dim"),
        (MiniSTU, {"precomputed_filters": torch.ones(7, 4)}, r"\[8, 4\]"),
        (train_stu_on_lds, {"learning_rate": -1}, "learning_rate"),
        (train_stu_on_lds, {"learning_rate": math.nan}, "learning_rate"),
        (train_stu_on_lds, {"learning_rate": 1e300}, "learning_rate"),
        (train_stu_on_lds, {"num_steps": -1}, "number of steps"),
        (train_stu_on_lds, {"batch_size": 0}, "batch_size"),
    ],
)
def test_an_argument_that_is_wrong_is_named(make, wrong, message):
    arguments = ACCEPTED[make] | wrong
    with pytest.raises(ValueError, match=message):
        make(**arguments)


ONES = torch.ones(2, 8, 3)
WITH_NAN = ONES.clone()
WITH_NAN[..., 0] = math.nan


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.ones(1, 8, 4), "length >= 1, 3"),
        (torch.ones(1, 0, 3), "length >= 1, 3"),
        (ONES + 1j, "real"),
        (WITH_NAN, "input holds 16 NaN"),
    ],
)
def test_a_signal_that_is_none_is_refused_by_system_and_learner(x, message):
    for module in (LDS(**LDS_SIZES), MiniSTU(**MINISTU_SIZES)):
        with pytest.raises(ValueError, match=message):
            module(x)


def test_what_does_not_fit_together_is_said():
    system = LDS(**LDS_SIZES)
    with pytest.raises(ValueError, match=r"\[2, 4\], got torch.float32 \[3, 4\]"):
        system(ONES, torch.ones(3, 4))
    with pytest.raises(ValueError, match="state must be real"):
        system(ONES, torch.ones(2, 4) + 1j)
    linear = MiniSTU(**MINISTU_SIZES)
    with pytest.raises(ValueError, match="longer than self.seq_len = 8"):
        linear(torch.ones(1, 9, 3))
    with pytest.raises(ValueError, match="targets holds 16 NaN"):
        linear.fit(ONES, WITH_NAN[..., :2])
    with pytest.raises(ValueError, match="equally many"):
        linear.fit(ONES, torch.ones(2, 7, 2))
    with_mlp = MiniSTU(**MINISTU_SIZES, use_mlp=True)
    with pytest.raises(ValueError, match="descent"):
        with_mlp.fit(ONES, ONES[..., :2])
    with pytest.raises(ValueError, match="use_mlp"):
        with_mlp.to_lds()
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        train_stu_on_lds(random_LDS(4, 3, 2), 32, 8, num_steps=20, learning_rate=900.0)


# ------------------------------------------------------------------------------------------------
# experiments


@pytest.mark.parametrize(
    "script, flags, said",
    [
        ("filters.py", "--seq_len 64", "largest error"),
        ("ringing.py", "--seq_len 16 --num_filters 4", "r = 0.5"),
        ("linear_systems.py", "--state_dim 6 --seq_len 32 --steps 4", "diagonal system"),
        ("recall.py", "--steps 5 --batch_size 4", "== selective copying, attention"),
        ("cost.py", "--tiny", "full attention"),
    ],
)
def test_an_experiment_prints_and_draws(folder, run_here, script, flags, said):
    printed = run_here(f"experiments/{script}", f"{flags} --out picture.png")
    assert Path("picture.png").read_bytes().startswith(b"\x89PNG")
    assert said in printed


def test_the_benchmark_prints_a_row_for_each_comparison(run_here):
    rows = run_here("experiments/bench.py", "--tiny").splitlines()
    assert len(rows) == 5
    errors = rows[2].split("errors")[1]
    ours, of_eigh = re.findall(r"[0-9.]+e-[0-9]+|0\.[0-9]+", errors)[:2]
    assert float(ours) < 1e-6
    assert float(of_eigh) > 1e-2
    assert "differ by" in rows[3]
    assert "differ by" in rows[4]


def test_a_wider_sector_of_poles_needs_more_filters_and_a_text_is_learned(tmp_path, run_here):
    filters_needed = experiment("angles")["filters_needed"]
    assert filters_needed(32, 0, radius=0.9) < filters_needed(32, 90, radius=0.9)
    (tmp_path / "book.txt").write_text("All that is read is remembered. " * 200)
    flags = f"text --steps 2 --seeds 1 --angles 20 --data {tmp_path}/book.txt"
    assert "| text, 20° |" in run_here("experiments/angles_trained.py", flags)


def test_the_suites_of_others_get_our_layer():
    build = experiment("mechbench")["with_our_layer"](build_theirs=None)
    sizes = types.SimpleNamespace(d_model=8, max_seq_len=32, num_eigh=4, use_hankel_L=False)
    x = torch.randn(2, 32, 8)
    assert build("stu", sizes)(x).shape == x.shape
    mixer = experiment("mqar")["SpectralMixer"](d_model=8, seq_len=32)
    assert mixer(x).shape == x.shape


def test_the_robot_is_simulated_once_and_predicted(folder, monkeypatch, run_here):
    reason = 'needs pip install "gymnasium[mujoco]"'
    gymnasium = pytest.importorskip("gymnasium", reason=reason)
    pytest.importorskip("mujoco", reason=reason)
    flags = "--trajectories 10 --seconds 0.01 --out picture.png"
    run_here("experiments/ant.py", flags)
    data = torch.load("data/ant-10.pt")
    assert data.shape == (10, 129, 35)
    assert data.isfinite().all()
    assert data[..., 27:].abs().max() <= 1
    assert Path("picture.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(gymnasium, "make", None)  # what is there is not simulated again
    printed = run_here("experiments/ant.py", flags)
    for name in ("STU-T", "full STU", "hybrid", "attention", "Mamba-2", "no change", "50 alone"):
        assert name in printed


@pytest.mark.parametrize(
    "script, flags, says",
    [
        ("ant.py", "", "pip install"),
        ("ant.py", "--trajectories 0", "--trajectories must be"),
        ("angles_trained.py", "text --data nowhere", "--data must be a text"),
        ("filters.py", "--seq_len 0", "must be from 1 to --seq_len"),
        ("linear_systems.py", "--steps 0", "--steps must be"),
        ("loss_by_position.py", "--model .", "holds no checkpoint and no model"),
        ("loss_by_position.py", "--texts 0", "--texts and --batch_size must be"),
        ("mechbench.py", "nowhere", "is not a checkout"),
        ("mqar.py", "nowhere", "is not a checkout"),
        ("recall.py", "--steps 0", "--steps must be"),
        ("ringing.py", "--num_filters 0", "--num_filters must be"),
    ],
)
def test_an_experiment_says_at_once_what_it_needs(
    folder, monkeypatch, refusal, script, flags, says
):
    monkeypatch.setitem(sys.modules, "gymnasium", None)  # as if it were not installed
    assert says in refusal(f"experiments/{script}", flags)


@pytest.fixture
def reader(folder):
    """A small model of bytes, saved, and a text for it."""
    config = small_config(seq_len=16, window_size=4, num_eigh=8, vocab_size=256)
    model = FlashSTU(config).eval()
    model.save_pretrained("model")
    Path("book.txt").write_text("All that is read is remembered. " * 20)
    return model


def test_loss_by_position_reads_a_model_or_the_newest_checkpoint_of_a_run(reader, run_here):
    Path("run").mkdir()
    config = reader.config.to_dict()
    checkpoint = {"model": reader.state_dict(), "config": config, "tokenizer": "bytes"}
    torch.save({}, "run/checkpoint_1.pt")
    torch.save(checkpoint, "run/checkpoint_2.pt")
    script = "experiments/loss_by_position.py"
    of_model = run_here(script, "--data book.txt --texts 2 --model model")
    of_run = run_here(script, "--data book.txt --texts 2 --model run")
    assert of_run == of_model.replace("read by model", "read by run")
    assert of_run.count("128-256") == 3
    assert Path("context.png").read_bytes().startswith(b"\x89PNG")


def test_loss_by_position_forgets_what_it_says(reader):
    losses_by_position = experiment("loss_by_position")["losses_by_position"]
    x = torch.randint(1, 256, (2, 49))
    carried = losses_by_position(reader, x, "state carried on")
    forgotten = losses_by_position(reader, x, "all forgotten")
    half = losses_by_position(reader, x, "STU's state forgotten")
    with torch.no_grad():
        logits = reader(x[:, :-1]).logits
    whole = F.cross_entropy(logits.transpose(1, 2), x[:, 1:], reduction="none").sum(dim=0)
    assert torch.allclose(carried, whole, atol=1e-3)
    for i in (0, 16, 32):
        window = x[:, i : i + 17]
        of_window = reader(window, labels=window).loss.item()  # the mean over two texts
        assert forgotten[i : i + 16].mean().item() == pytest.approx(2 * of_window, abs=1e-3)
    for other in (forgotten, half):
        assert torch.allclose(other[:16], carried[:16], atol=1e-4)
        assert not torch.allclose(other[16:], carried[16:], atol=1e-4)
    assert not torch.allclose(half[16:], forgotten[16:], atol=1e-4)


def assert_causal(model, x, t):
    """Output t depends on all inputs up to t, and on none that comes later."""
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(model(x)[0, t].sum(), x)
    reach = gradient[0].abs().amax(dim=-1)
    assert reach[t + 1 :].max() < 1e-5 * reach.max()
    assert (reach[: t + 1] > 0).all()


def test_what_the_stu_is_compared_with_is_causal_and_learns():
    ant = experiment("ant")
    for kind in ant["KINDS"]:
        assert_causal(ant["make_model"](kind, 27), torch.randn(1, 30, 35), 12)
    linear_systems = experiment("linear_systems")
    system = random_LDS(4, 10, 5, spectral_radius=0.8)
    system.C.data *= 4
    progress = linear_systems["Progress"](10**9)
    for name, make in linear_systems["MAKERS"].items():
        assert_causal(make(30), torch.randn(1, 30, 10), 12)
        _, losses = linear_systems["train"](name, system, 30, 1e-2, 80, 0, progress)
        assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10]), name


def test_mamba_2_equals_its_recurrence():
    layer = experiment("linear_systems")["Mamba2"](width=8, N=4, heads=2).double()
    x = torch.randn(2, 20, 10, dtype=torch.float64)
    gate, v, dt = layer.encode(x).split(layer.encoded, dim=-1)
    last_four = F.pad(v, (0, 0, 3, 0)).unfold(1, 4, 1)  # [B, T, channels, 4]
    v = F.silu((last_four * layer.conv.weight[:, 0]).sum(dim=-1) + layer.conv.bias)
    u, B, C = v.split([8, 4, 4], dim=-1)
    dt = F.softplus(dt + layer.log_dt)
    A = layer.log_A.exp()
    h = torch.zeros(2, 2, 4, 4, dtype=torch.float64)  # [B, heads, N, width / heads]
    outputs = []
    for t in range(20):
        u_t = u[:, t].view(2, 2, 4)
        update = torch.einsum("bh,bn,bhd->bhnd", dt[:, t], B[:, t], u_t)
        decay = torch.exp(-dt[:, t] * A)
        h = decay[:, :, None, None] * h + update
        outputs.append(torch.einsum("bn,bhnd->bhd", C[:, t], h).flatten(1))
    y = torch.stack(outputs, dim=1)
    expected = layer.decode((y + layer.D * u) * F.silu(gate))
    assert relative_error(layer(x), expected) < 1e-12


# ------------------------------------------------------------------------------------------------
# prepare_data.py


def write_new(file):
    file.write(b"new")


@pytest.mark.parametrize("error", [OSError("No space left"), RuntimeError("No space left")])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(folder, error):
    def full_disk(file):
        file.write(b"half")
        raise error

    Path("file").write_text("old")
    with pytest.raises(SystemExit, match="cannot write file: No space left.* is intact"):
        prepare_data.write_atomically("file", full_disk)
    assert os.listdir() == ["file"]
    assert Path("file").read_text() == "old"


def test_a_file_is_on_the_disk_before_it_gets_its_name(folder, monkeypatch):
    on_disk = []

    def fsync(descriptor):
        assert not Path("file").exists()
        on_disk.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    prepare_data.write_atomically("file", write_new)
    assert on_disk == [3]
    assert Path("file").read_text() == "new"


@pytest.mark.parametrize(
    "make",
    ["ln -s target a", "ln -s nowhere a", "mkdir a", "mkfifo a", "mknod a c 1 3"],
    ids=["a link", "a dead link", "a folder", "a pipe", "a device"],
)
def test_only_a_plain_file_is_replaced(folder, make):
    Path("target").write_text("old")
    if subprocess.run(make, shell=True, check=False).returncode != 0:
        pytest.skip("only root makes devices")
    before = os.lstat("a")
    with pytest.raises(SystemExit, match="cannot write a"):
        prepare_data.write_atomically("a", write_new)
    after = os.lstat("a")
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert Path("target").read_text() == "old"
    assert sorted(os.listdir()) == ["a", "target"]


def test_the_temporary_files_of_others_stay_and_those_of_dead_owners_go(folder):
    of_others = Path("meta.json.tmp")
    ours = Path(f"meta.json.0123{prepare_data.TEMPORARY}")
    of_others.write_text("half")
    ours.write_text("half")
    prepare_data.write_atomically("meta.json", write_new)
    assert ours.exists()  # it could be of a process that is writing now
    prepare_data.lock(folder).close()
    assert not ours.exists()
    assert of_others.read_text() == "half"


def test_a_folder_has_one_owner_until_its_process_ends(folder, monkeypatch):
    code = "import prepare_data; owner = prepare_data.lock('out'); print('owned', flush=True)"
    command = [sys.executable, "-c", f"{code}; input()"]
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    pipe = subprocess.PIPE
    owner = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment)
    assert owner.stdout.readline() == b"owned\n"
    text = folder / "a.txt"
    text.write_text("hello world\n" * 1000)
    with pytest.raises(SystemExit, match=f"out is in use by process {owner.pid}"):
        prepare_data.prepare(["a.txt"], "out")
    threading.Timer(0.5, owner.kill).start()
    with monkeypatch.context() as another_python:
        another_python.setattr(prepare_data, "standard_library", lambda: [text])
        meta = prepare_data.prepare_default("out")  # the default data is waited for
    assert owner.wait() != 0
    # What is ready is good, whatever Python made it
    assert prepare_data.prepare_default("out") == meta
    with pytest.raises(SystemExit, match="was made with 'file"):
        prepare_data.prepare(["stdlib"], "out")


def test_bytes_need_no_tiktoken(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    tokenizer = prepare_data.get_tokenizer("bytes")
    text = "héllo\n日本 \x7f"
    tokens = tokenizer.encode(text)
    assert bytes(tokens.tolist()) == text.encode()
    assert tokenizer.decode([0, *tokens, 0, 256, 319]) == text  # ends of text, and ids of no byte
    assert tokenizer.name == "bytes"


def test_a_saved_tokenizer_has_the_same_ids_and_keeps_zero_bytes(folder):
    transformers = pytest.importorskip("transformers")
    ours = prepare_data.get_tokenizer("bytes")
    prepare_data.save_tokenizer(ours, "saved")
    transformers.AutoTokenizer.from_pretrained("saved").save_pretrained("again")
    for name in ("saved", "again"):
        theirs = transformers.AutoTokenizer.from_pretrained(name)
        for text in ("x\0y", "\0", "a \0\0\0 b", "é\0日本\n"):
            assert theirs(text).input_ids == ours.encode(text).tolist() == list(text.encode())


def read_split(folder, split):
    meta, opened = prepare_data.open_data(folder, full=True)
    tokens = np.concatenate(opened[split])
    assert len(tokens) == meta[split]["tokens"]
    return tokens


def documents_in(folder, split):
    """The texts of a split of bytes."""
    data = read_split(folder, split).astype(np.uint8).tobytes()
    assert data.endswith(b"\0")
    return data[:-1].decode().split("\0")


def all_documents_in(folder):
    return sorted(documents_in(folder, "train") + documents_in(folder, "val"))


def write_documents(n, lines):
    """A folder docs of n texts of so many lines, which are returned."""
    Path("docs").mkdir()
    texts = [f"document {i}: é\n" * lines for i in range(n)]
    for i, text in enumerate(texts):
        Path(f"docs/{i:03}.txt").write_text(text, encoding="utf-8")
    return texts


def write_records(name, records):
    """A file of these records, in the form that its name says."""
    if name.endswith(".parquet"):
        parquet = pytest.importorskip("pyarrow.parquet")
        table = sys.modules["pyarrow"].Table.from_pylist(records)
        parquet.write_table(table, name)
        return
    if name == "list.json":
        content = json.dumps(records, indent=1).encode()
    else:
        lines = [json.dumps(record) + "\n" for record in records]
        content = "".join(lines).encode()
    if name.lower().endswith(".gz"):
        content = gzip.compress(content)
    Path(name).write_bytes(content)


def shell(command, folder):
    subprocess.run(command, shell=True, cwd=folder, check=True)


def test_the_default_data_is_the_standard_library(folder):
    meta = prepare_data.prepare_default("out")
    assert meta["vocab_size"] == 256
    assert meta["train"]["tokens"] > 3e6
    assert b"def " in read_split("out", "val")[:100000].astype(np.uint8).tobytes()


def test_hub_corpora_are_files_that_their_library_fetches(folder, monkeypatch):
    texts = [f"story {i}\n" * 9 for i in range(300)]
    Path("files").mkdir()
    write_records("files/a.jsonl", [{"text": text} for text in texts])
    Path("files/README.md").write_text("not asked for")

    def snapshot_download(repository, repo_type, allow_patterns):
        assert [repository, repo_type, allow_patterns] == ["owner/name", "dataset", "files/*.jsonl"]
        return folder

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(prepare_data.HUB, "tinystories", ("owner/name", "files/*.jsonl"))
    prepare_data.prepare(["tinystories"], "out")
    assert all_documents_in("out") == sorted(texts)
    assert 10 < len(documents_in("out", "val")) < 60


def test_a_folder_gives_its_visible_text_once_and_says_what_is_left_out(folder, capsys):
    texts = write_documents(200, 3)
    shell("ln -s 000.txt symbolic; ln 000.txt hard", "docs")
    sources = ["docs", "docs/001.txt", f"{folder}/docs/../docs/002.txt"]
    Path("docs/bom.TXT").write_bytes(codecs.BOM_UTF8 + b"bom")
    Path("docs/a.JSONL").write_bytes(codecs.BOM_UTF8 + b'{"text": "capitals"}\n\n')
    Path("docs/utf16.txt").write_bytes("é".encode("utf-16"))
    Path("docs/picture").write_bytes(b"\xff\xfe\xff\xd8")
    Path("docs/zeros").write_bytes(b"a\0b")
    for packed in ("texts.zip", "texts.tar.gz", "texts.jsonl.ZST"):
        Path("docs", packed).write_bytes(b"\x28\xb5\x2f\xfd")
    Path("docs/x.jsonl").mkdir()
    Path("docs/x.jsonl/file").write_text("in a folder")
    for hidden in (".git", ".ipynb_checkpoints"):
        Path("docs", hidden).mkdir()
        Path("docs", hidden, "config").write_text("hidden")
    Path("a").write_text("a link to a file is a file")
    shell("ln -s ../a link; ln -s . loop; ln -s nowhere dead; ln -s self self", "docs")
    texts += ["bom", "capitals", "in a folder", "a link to a file is a file"]
    for out in ("docs/out/1", "docs/out/2"):  # the second finds the first one's in the source
        prepare_data.prepare(sources, out)
        assert all_documents_in(out) == sorted(texts)
    told = capsys.readouterr().err
    for line in (
        "4: named before, maybe under another name",
        "2: hidden",
        "4: linked folders",
        "5: linked folders",
        "3: no UTF-8 text",
        "3: packed in another way than .gz",
    ):
        assert f"\nleft out {line}" in told, told


@pytest.fixture
def prepared(folder):
    """The folder with a text, a.txt, and its shards in `out`."""
    Path("a.txt").write_text("hello world\n" * 1000)
    prepare_data.prepare(["a.txt"], "out")
    return folder


def test_control_characters_of_a_file_name_are_shown_not_obeyed(prepared, capsys):
    Path("red\x1b[31m\r.bin").write_bytes(b"\xff")
    prepare_data.prepare(["a.txt", "red\x1b[31m\r.bin"], "out2")
    told = capsys.readouterr().err
    assert r"red\x1b[31m\r.bin" in told
    assert "\x1b" not in told
    Path("\x1b[31m.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(SystemExit, match=r"cannot read .*\\x1b\[31m.jsonl.gz"):
        prepare_data.prepare(["\x1b[31m.jsonl.gz"], "out3")


@pytest.mark.parametrize(
    "name",
    ["a.ndjson", "a.json", "list.json", "a.jsonl.gz", "a.json.GZ", "a.parquet", "bytes.parquet"],
)
def test_records_give_the_same_shards_whatever_file_holds_them(folder, name):
    records = [{"title": "a", "body": f"document {i} é\n" * 5} for i in range(50)]
    write_records("plain.jsonl", records)
    if name == "bytes.parquet":
        records = [{"body": record["body"].encode()} for record in records]
    write_records(name, records)
    prepare_data.prepare(["plain.jsonl"], "plain", field="body", val_fraction=0.3)
    prepare_data.prepare([name], "other", field="body", val_fraction=0.3)
    for split in ("train", "val"):
        assert np.array_equal(read_split("plain", split), read_split("other", split))


def test_a_json_file_may_be_one_record_and_a_text_may_be_compressed(folder):
    Path("record.json").write_text(json.dumps({"text": "a story " * 20}, indent=1))
    Path("book.txt.gz").write_bytes(gzip.compress(b"a book " * 20))
    prepare_data.prepare(["record.json", "book.txt.gz"], "out")
    parts = zip(documents_in("out", "train"), documents_in("out", "val"))
    assert [begin + end for begin, end in parts] == ["a story " * 20, "a book " * 20]


BAD_LINES = [
    b'{"text": null}',
    b'{"text": 5}',
    b'{"text": "half a surrogate \\ud800"}',
    b'{"text": "a zero byte \\u0000"}',
    b'{"text": "cut',
    b"{}",
    b"[1]",
    b"[" * 10**5,
    b"\xff",
]


@pytest.mark.parametrize(
    "name, bad",
    [
        ("a.jsonl", BAD_LINES),
        ("list.json", [None, 5, {}, {"text": None}]),
        ("a.parquet", [{"text": None}, {"text": b"\xff"}]),
    ],
)
def test_a_bad_record_does_not_end_a_corpus_and_is_counted(folder, capsys, name, bad):
    texts = [f"document {i}\n" * 5 for i in range(300)]
    good = [{"text": text} for text in texts]
    if name == "a.jsonl":
        lines = [json.dumps(record).encode() for record in good]
        Path(name).write_bytes(b"\n".join(bad + lines))
    elif name == "a.parquet":
        write_records(name, bad + [{"text": text.encode()} for text in texts])
    else:
        write_records(name, bad + good)
    prepare_data.prepare([name], "out")
    assert all_documents_in("out") == sorted(texts)
    reason = "no UTF-8 text, or none in the field 'text'"
    told = capsys.readouterr().err
    assert re.search(f"\nleft out {len(bad)}: {reason} .*{name}, record 1", told), told


def test_one_long_text_is_cut_at_nine_tenths(folder, capsys):
    Path("book.txt").write_text("abcdefghij" * 1000)
    prepare_data.prepare(["book.txt"], "out")
    assert capsys.readouterr().err.endswith("9,001 tokens to train\n")
    assert documents_in("out", "train") == ["abcdefghij" * 900]
    assert documents_in("out", "val") == ["abcdefghij" * 100]


def test_few_texts_always_give_a_validation_split(folder):
    for n in (1, 2, 20, 150):
        for seed in range(10):
            write_records("a.jsonl", [{"text": f"{seed} {i} " * 90} for i in range(n)])
            meta = prepare_data.prepare(["a.jsonl"], f"{n}_{seed}")
            share = meta["val"]["tokens"] / (meta["train"]["tokens"] + meta["val"]["tokens"])
            assert 0.09 < share < 0.11


def random_text():
    words = ["word ", "x\n", "\n\n  y", "if a:\n", "\ndef", ";\n//c", "é\r\n", " 12"]
    return "".join(random.choices(words, k=60000))


def o200k_base():
    try:
        return prepare_data.get_tokenizer("o200k_base")
    except SystemExit:
        pytest.skip("the ranks are not on this machine (no network, no TIKTOKEN_CACHE_DIR)")


def test_the_pieces_of_a_text_are_the_text():
    for text in (random_text(), "", "x", f"x{' ' * 10**6}y", "a" * 10**6):
        pieces = prepare_data.PIECE.findall(text)
        assert "".join(pieces) == text
        assert max(map(len, pieces), default=0) <= 2**17
    assert len(prepare_data.PIECE.findall(random_text())) > 10


def test_a_long_document_in_pieces_has_the_tokens_of_the_whole_and_ids_of_no_token_no_text():
    tokenizer = o200k_base()
    assert tokenizer.name == "o200k_base"
    text = random_text()
    tokens = tokenizer.encode(text)
    pieces = [tokenizer.encode(piece) for piece in prepare_data.PIECE.findall(text)]
    assert np.array_equal(np.concatenate(pieces), tokens)
    assert tokenizer.decode(tokens.tolist()) == text
    spaces = f"x{' ' * 10**6}y"  # on which tiktoken gives up
    pieces = [tokenizer.encode(piece) for piece in prepare_data.PIECE.findall(spaces)]
    assert tokenizer.decode(np.concatenate(pieces).tolist()) == spaces
    tokens = tokenizer.encode("a text")
    assert tokenizer.decode([199_998, *tokens, tokenizer.eot, 10**6]) == "a text"
    assert "<|endofprompt|>" in tokenizer.decode(range(199_990, tokenizer.n_vocab))


def test_shards_hold_every_document_once_and_the_splits_share_none(folder):
    texts = write_documents(600, 3)
    Path("docs/copy.txt").write_text(texts[0], encoding="utf-8")  # goes where its twin goes
    meta = prepare_data.prepare(["docs"], "out", val_fraction=0.3, shard_tokens=5000)
    assert all_documents_in("out") == sorted([*texts, texts[0]])
    assert not set(documents_in("out", "train")) & set(documents_in("out", "val"))
    assert len(meta["train"]["shards"]) > 1


def interrupt(write, monkeypatch, **options):
    """A preparation that dies in its write number `write`, when half of the file is there."""
    write_atomically = prepare_data.write_atomically
    written = []

    def dying(path, content):
        written.append(path)
        if len(written) == write:
            half = path.with_name(f"{path.name}.1234{prepare_data.TEMPORARY}")
            half.write_bytes(b"half a file")
            raise KeyboardInterrupt
        write_atomically(path, content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_data, "write_atomically", dying)
        prepare_data.prepare(**options)


@pytest.mark.parametrize("write", [1, 3, 8])
def test_an_interrupted_preparation_continues_to_the_same_bytes(folder, monkeypatch, write):
    write_documents(700, 6)
    options = {"sources": ["docs"], "val_fraction": 0.3, "shard_tokens": 10000}
    prepare_data.prepare(out="whole", **options)
    assert max(map(len, prepare_data.open_data("whole")[1]["train"])) < 10500
    interrupt(write, monkeypatch, out="broken", **options)
    if write > 3:  # a shard of each split, then meta.json
        with pytest.raises(SystemExit, match="not complete:  python prepare_data.py"):
            prepare_data.open_data("broken")
        assert json.loads(Path("broken/meta.json").read_text())["train"]["tokens"] > 5000
    prepare_data.prepare(out="broken", **options)
    for path in Path("whole").glob("[!.]*"):  # the shards, and meta.json
        assert Path("broken", path.name).read_bytes() == path.read_bytes()
    assert sorted(os.listdir("broken")) == sorted(os.listdir("whole"))


@pytest.mark.parametrize(
    "change, name",
    [
        ("echo new > 000a.txt", "000a.txt"),
        ("rm 001.txt", "001.txt"),
        ("echo more >> 002.txt", "002.txt"),
        ("mv 003.txt last.txt", "003.txt"),
        ("touch -t 200001010000 699.txt", "699.txt"),
    ],
)
def test_a_source_that_has_changed_is_refused_by_name(folder, monkeypatch, change, name):
    write_documents(700, 6)
    options = {"sources": ["docs"], "shard_tokens": 10000}
    interrupt(8, monkeypatch, out="half", **options)
    prepare_data.prepare(out="whole", **options)
    shell(change, "docs")
    for out in ("half", "whole"):
        before = Path(out, "meta.json").read_bytes()
        with pytest.raises(SystemExit, match=name):
            prepare_data.prepare(out=out, **options)
        assert Path(out, "meta.json").read_bytes() == before


def test_a_source_that_changes_while_it_is_read_is_refused_by_name(folder, monkeypatch):
    write_documents(700, 6)
    read_records = prepare_data.read_records

    def appended_to(path, field):
        yield from read_records(path, field)
        if path.endswith("500.txt"):
            shell(f"echo more >> {path}", folder)

    monkeypatch.setattr(prepare_data, "read_records", appended_to)
    with pytest.raises(SystemExit, match="500.txt' changed while it was read"):
        prepare_data.prepare(["docs"], "out")
    with pytest.raises(SystemExit, match="not complete"):
        prepare_data.open_data("out")


def test_a_folder_with_other_data_is_left_alone(prepared):
    before = read_split("out", "train")
    with pytest.raises(SystemExit, match="was made with 'val_fraction': 0.1.*choose another --out"):
        prepare_data.prepare(["a.txt"], "out", val_fraction=0.5)
    assert np.array_equal(read_split("out", "train"), before)


@pytest.mark.parametrize(
    "damage, name",
    [
        ("rm val_00000.npy", "val_00000"),
        (": > val_00000.npy", "val_00000"),
        ("echo x >> val_00000.npy", "val_00000"),
        ("head -c 500 val_00000.npy > cut; mv cut val_00000.npy", "val_00000"),
        ("tr w W < train_00000.npy > other; mv other train_00000.npy", "train_00000"),
        ("sed s/256/100/ meta.json > edited; mv edited meta.json", "meta.json"),
        ("echo '{\"sources\": ' > meta.json", "meta.json"),
        ("printf '%100000s' | tr ' ' '[' > meta.json", "meta.json"),
        (r"printf '\377' > meta.json", "meta.json"),
        (": > meta.json", "meta.json"),
        ("rm meta.json", "not complete"),
    ],
)
def test_a_damaged_data_folder_is_named_with_the_remedy(prepared, damage, name):
    shell(damage, "out")
    with pytest.raises(SystemExit, match=f"{name}.*(prepare it again|prepare_data.py)"):
        prepare_data.open_data("out")


def test_some_of_a_large_shard_is_checked_at_every_start_and_all_of_it_on_request(
    folder, monkeypatch
):
    monkeypatch.setattr(prepare_data, "BLOCK", 16)
    Path("a.txt").write_text("hello world\n" * 1000)
    prepare_data.prepare(["a.txt"], "out")
    shard = Path("out/train_00000.npy")
    good = shard.read_bytes()
    refused = 0
    for place in [0, *random.sample(range(1, len(good)), 40)]:
        bad = bytearray(good)
        bad[place] ^= 1
        shard.write_bytes(bad)
        with pytest.raises(SystemExit, match="train_00000"):
            prepare_data.open_data("out", full=True)
        try:
            prepare_data.open_data("out")
        except SystemExit:
            refused += 1
    assert 1 <= refused < 41


@pytest.mark.parametrize(
    "words, says", [(200, "--seq_len can be at most 120"), (2000, "10,801 tokens to train")]
)
def test_the_last_line_is_a_command_that_can_be_pasted_the_one_before_says_how_much(
    folder, words, says
):
    Path("my \x1b[31mbook.txt").write_text("hello " * words)
    command = [sys.executable, HERE / "prepare_data.py", "my \x1b[31mbook.txt"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    before_last, last = run.stderr.splitlines()[-2:]
    assert says in before_last
    assert last.endswith("python train.py --data data/my___31mbook")
    assert len(read_split("data/my___31mbook", "train")) == 5.4 * words + 1


BAD_FILES = {
    "latin.txt": b"caf\xe9 " * 10**6,
    "empty.txt": b"",
    "fields.jsonl": b'{"title": "x", "body": "y"}\n{"text": ',
    "none.jsonl.gz": b"not gzip",
    "cut.jsonl.GZ": gzip.compress(b"{}")[:-9],
    "bad.json.gz": gzip.compress(b"{}" * 99)[:20] + b"xxxxx",
    "bad.parquet": b"PAR1",
    "file": b"",
}


@pytest.mark.parametrize(
    "command, message",
    [
        ("latin.txt", "left out 1: no UTF-8 text.*latin.txt.*not enough text"),
        ("empty.txt", "not enough text"),
        (
            "fields.jsonl",
            r"left out 2: .*'text'.*, record 1 .*\['title', 'body'\].*not enough text",
        ),
        ("fields.parquet", r"no field 'text': give --field one of \['title', 'body'\]"),
        ("none.jsonl.gz", "cannot read .*none.jsonl.gz"),
        ("cut.jsonl.GZ", "cannot read .*cut.jsonl.GZ"),
        ("bad.json.gz", "cannot read .*bad.json.gz"),
        ("bad.parquet", "cannot read .*bad.parquet"),
        ("utf8.parquet --field title", "cannot read .*utf8.parquet"),
        ("missing.txt", "no file or folder"),
        ("''", "no file or folder"),
        (". --out .", "cannot be a source"),
        ("stdlib --val_fraction 1", "val_fraction is 1.0"),
        ("stdlib --val_fraction nan", "val_fraction is nan"),
        ("stdlib --shard_tokens 0", "shard_tokens is 0"),
        ("stdlib --tokenizer bpe", "'bpe': it is bytes, gpt2 or o200k_base"),
        ("a.txt --out file", "cannot write"),
        ("a.txt --out file/out", "cannot write"),
        ("a.txt --out /proc/nothing", "cannot write"),
        ("a.txt --out 1", "cannot write .*meta.json"),
        ("a.txt --out 2", "cannot write .*train_00000.npy"),
        ("a.txt --out 3", "cannot write to 3"),
    ],
)
def test_preparation_says_what_is_wrong_and_writes_nothing(folder, refusal, command, message):
    for name, content in BAD_FILES.items():
        Path(name).write_bytes(content)
    Path("a.txt").write_text("hello world\n" * 1000)
    for name in ("1/meta.json", "2/train_00000.npy", f"3/{prepare_data.LOCK}"):
        Path(name).mkdir(parents=True)
    if "parquet" in command:
        pyarrow = pytest.importorskip("pyarrow")
        write_records("fields.parquet", [{"title": "x", "body": "y"}])
        parquet = pytest.importorskip("pyarrow.parquet")
        no_utf_8 = pyarrow.array([b"\xff"]).view(pyarrow.string())
        parquet.write_table(pyarrow.table({"title": no_utf_8}), "utf8.parquet")
    told = refusal("prepare_data.py", f"--out out {command}")
    assert re.search(message, told, re.DOTALL), told[:2000]
    assert len(told) < 700
    assert not list(Path("out").glob("[!.]*"))


def test_a_library_that_is_missing_is_named(folder, monkeypatch, refusal):
    Path("a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if it were not installed
    assert "this needs:  pip install pyarrow" in refusal("prepare_data.py", "a.parquet --out out")


# ------------------------------------------------------------------------------------------------
# train.py
#
# What ends before it trains is run in this process; a run is `python train.py` in a process of its
# own. Most of its time would go into imports: a server makes them once, and is forked for each run.

TINY = """--device cpu --n_embd 32 --n_layers 2 --n_heads 2 --seq_len 32 --window_size 16
    --num_eigh 8 --batch_size 8 --eval_sequences 8 --log_interval 1"""
fork = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
preload = ["torch._dynamo", "torch.distributed.checkpoint", "matplotlib.figure", __name__]
fork.set_forkserver_preload(preload)
outputs = tempfile.TemporaryDirectory()  # what the runs print


def run_script(argv, output, environment, before):
    """In the new process: do what `python argv...` does, and print to the file `output`."""
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(encoding="utf-8")
    os.chdir(HERE)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = argv
    if before:
        before()
    runpy.run_path("train.py", run_name="__main__")


class Run:
    """train.py at work, in one process or in several as torchrun starts them.

    `before` is called in each of them before the script starts.
    """

    def __init__(self, flags, processes=1, before=None):
        with socket.create_server(("localhost", 0)) as server:
            port = server.getsockname()[1]
        environment = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        environment["WORLD_SIZE"] = str(processes)
        argv = ["train.py", *shlex.split(flags)]
        folder = Path(tempfile.mkdtemp(dir=outputs.name))
        self.output = folder / "0"
        self.processes = []
        for rank in range(processes):
            args = (argv, folder / str(rank), environment | {"RANK": str(rank)}, before)
            process = fork.Process(target=run_script, args=args, daemon=True)
            process.start()
            self.processes.append(process)

    def printed(self):
        """What the main process has printed up to now."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def goes_on(self):
        return self.processes[0].exitcode is None

    def wait_for(self, words):
        while words not in self.printed():
            assert self.goes_on(), self.printed()
            time.sleep(0.005)

    def finish(self, code=0):
        """Wait until it ends, which it must do with this exit code; returns what it printed."""
        for process in self.processes:
            process.join(timeout=300)
            assert process.exitcode == code, self.printed()
        return self.printed()

    def kill(self):
        self.processes[0].kill()
        self.finish(-signal.SIGKILL)


def new_run(data, out, flags, **how):
    return Run(f"{TINY} --data {data} --out_dir {out} {flags}", **how)


def continued(out, flags="", **how):
    """The command names nothing but the folder of the run, and what is new."""
    return Run(f"--device cpu --out_dir {out} {flags}", **how)


def logged(out, key="loss"):
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [record[key] for record in records if key in record]


def checkpoints(out):
    """The steps of the checkpoints, ascending."""
    return sorted(int(path.stem.split("_")[1]) for path in out.glob("checkpoint_*.pt"))


def load_step(out, step):
    return torch.load(out / f"checkpoint_{step}.pt", weights_only=True)


def weights_are_equal(one, other, step):
    weights = load_step(one, step)["model"]
    others = load_step(other, step)["model"]
    return all(torch.equal(weights[name], others[name]) for name in others)


def files_of(folder):
    """{name: content} of all files below a folder, but for its lock."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def prepare_lines(folder, line, n):
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_text("".join(line.format(i) for i in range(n)))
    prepare_data.prepare([str(folder / "text.txt")], folder / "tokens")
    return folder / "tokens"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return prepare_lines(folder, "line {}: the quick brown fox\n", 3000)


@pytest.fixture
def other_data(tmp_path):
    return prepare_lines(tmp_path / "other", "something else\n", 500)


@pytest.fixture(scope="module")
def trained(data):
    """A run of 4 steps, with checkpoints of steps 2 and 4. No test changes it."""
    new_run(data, data.parent / "trained", "--steps 4 --eval_interval 2").finish()
    return data.parent / "trained"


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def train_here(data, tmp_path, monkeypatch):
    """train_here(flags): train in this process; returns what train.py defines."""

    def train(flags):
        flags = f"{TINY} --data {data} --out_dir {tmp_path}/run {flags}"
        monkeypatch.setattr("sys.argv", ["train.py", *flags.split()])
        monkeypatch.setattr(signal, "signal", lambda signum, handler: None)  # pytest's stay
        return runpy.run_path(str(HERE / "train.py"), run_name="__main__")

    return train


NOT_ZERO = """steps batch_size eval_interval eval_sequences log_interval max_skipped num_samples
    max_new_tokens lr muon_lr grad_clip top_p mlp_scale seq_len"""
NOT_NEGATIVE = "seed warmup_steps micro_batch_size top_k temperature weight_decay min_lr dropout"
FINITE = "lr min_lr grad_clip temperature softcap weight_decay"


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--n_embed 32", "there is no --n_embed: see --help, or try ['n_embd'"),
        ("--seq_len 1000000", "too short"),
        ("--n_heads 5", "heads"),
        ("--use_attn no", "--use_attn"),
        ("--preset 7B", "350M"),
        ("--steps many", "--steps"),
        ("--top_p 1.5", "at most 1, not 1.5"),
        ("--data nowhere", "prepare_data.py"),
        ("--data text.txt", "text.txt is a text. Prepare it first:  python prepare_data.py text"),
        ("--sample line", "run holds no checkpoint and no model"),
        ("--eval_only --init_from nowhere", "nowhere holds no checkpoint and no model"),
        ("--device mps", "--device mps: torch finds no such device here"),
        ("--out_dir text.txt/run", "cannot write to text.txt/run"),
        *[(f"--{name} 0", f"--{name} must not be 0") for name in NOT_ZERO.split()],
        *[(f"--{name} -1", f"--{name} is -1") for name in NOT_NEGATIVE.split()],
        *[(f"--{name} nan", f"--{name} is nan") for name in FINITE.split()],
        *[(f"--{name} inf", f"--{name} is inf") for name in FINITE.split()],
    ],
)
def test_training_says_at_the_start_what_would_work(data, monkeypatch, refusal, flags, words):
    monkeypatch.chdir(data.parent)
    assert words in refusal("train.py", f"{TINY} --data tokens --out_dir run {flags}")
    assert not Path("run").exists()


class Built(Exception):
    """The model would be built now, with this configuration."""


def do_not_build(config):
    raise Built(config)


@pytest.mark.parametrize("name, millions", [("125M", 125), ("350M", 350), ("1B", 1000)])
def test_presets_have_the_sizes_in_their_names(
    data, tmp_path, monkeypatch, run_here, name, millions
):
    flags = f"--device cpu --data {data} --out_dir {tmp_path} --preset {name}"
    monkeypatch.setattr(stu, "FlashSTU", do_not_build)
    with pytest.raises(Built) as built:
        run_here("train.py", flags)
    (config,) = built.value.args
    config.vocab_size = 50304
    with torch.device("meta"):
        model = FlashSTU(config)
    n = sum(p.numel() for p in model.parameters()) / 1e6
    assert 0.9 * millions < n < 1.3 * millions


@pytest.mark.parametrize("damage", ["cut off", "empty", "zeros"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(run, damage):
    path = run / "checkpoint_4.pt"
    good = path.read_bytes()
    middle = len(good) // 2
    contents = {
        "cut off": good[:2000],
        "empty": b"",
        "zeros": good[:middle] + bytes(4096) + good[middle + 4096 :],
    }
    path.write_bytes(contents[damage])
    printed = continued(run, "--steps 5").finish()
    assert f"{path} is damaged" in printed
    assert "after step 2\n" in printed
    assert logged(run, "step")[-2:] == [5, 5]


def test_what_cannot_be_read_is_never_replaced(run, run_here, refusal):
    before = files_of(run)
    (run / "checkpoint_9.pt").symlink_to("checkpoint_9.pt")  # a loop: no system can read it
    with pytest.raises(OSError, match="checkpoint_9.pt"):
        run_here("train.py", f"--out_dir {run}")
    (run / "checkpoint_9.pt").unlink()
    assert files_of(run) == before
    for step in (2, 4):
        (run / f"checkpoint_{step}.pt").write_bytes(b"damaged")
    before = files_of(run)
    told = refusal("train.py", f"--out_dir {run}")
    assert "no checkpoint in" in told
    assert "--fresh" in told
    assert files_of(run) == before


def test_what_continues_is_the_same_run(trained, other_data, refusal):
    before = files_of(trained)
    for flags, words in {
        "--n_layers 3": "has --n_layers 2, not 3",
        "--optimizer adamw": "has --optimizer 'muon', not 'adamw'",
        "--batch_size 4": "has --batch_size 8, not 4",
        "--seed 2": "has --seed 1, not 2",
        "--steps 1": "already at step 4",
        f"--data {other_data}": "other data",
        f"--init_from {trained}": "has --init_from ",
    }.items():
        assert words in refusal("train.py", f"--out_dir {trained} {flags}")
    assert files_of(trained) == before


def test_a_run_continues_from_its_folder_alone_and_says_what_changed(run):
    printed = continued(run, "--steps 6 --lr 0.005").finish()
    assert "--steps was 4 until here, and now is 6\n" in printed
    assert "--lr was 0.01 until here" in printed
    assert printed.count("until here") == 2
    assert json.loads((run / "config.json").read_text())["settings"]["lr"] == 0.005
    assert logged(run, "step")[-1] == 6


def validation_loss(model, folder):
    """The mean loss over all windows of 32 tokens of the validation split."""
    _, shards = prepare_data.open_data(folder)
    tokens = torch.from_numpy(np.concatenate(shards["val"]).astype(np.int64))
    windows = tokens.unfold(0, 33, 32)  # [n, 33]
    return model(windows, labels=windows).loss.item()


def test_a_run_starts_from_the_weights_of_another_and_leaves_that_alone(
    trained, other_data, tmp_path
):
    before = files_of(trained)
    expected = validation_loss(FlashSTU.from_pretrained(trained / "model"), other_data)
    for start in (trained, trained / "model"):
        out = tmp_path / f"from_{start.name}"
        flags = f"--steps 1 --init_from {start} --data {other_data} --dropout 0.1"
        continued(out, flags).finish()
        assert logged(out, "val_loss")[0] == pytest.approx(expected, rel=1e-5)
        model = json.loads((out / "config.json").read_text())["model"]
        assert [model["dropout"], model["n_embd"]] == [0.1, 32]
    assert files_of(trained) == before


def test_a_model_of_another_tokenizer_is_refused(data, trained, tmp_path, refusal):
    model = shutil.copytree(trained / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tokenizer_name": "gpt2"}))
    told = refusal("train.py", f"--init_from {model} --data {data} --out_dir {tmp_path}/run")
    assert "reads gpt2" in told
    assert "holds bytes" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("prompt", ["line 1: the é", ""])
def test_samples_are_what_the_model_generates(trained, run_here, capsys, prompt):
    model = FlashSTU.from_pretrained(trained / "model")
    tokenizer = prepare_data.get_tokenizer("bytes")
    ids = torch.tensor([list(prompt.encode()) or [tokenizer.eot]])
    new = model.generate(ids, max_new_tokens=7, temperature=0, stop_token=tokenizer.eot)
    text = tokenizer.decode(new[0, ids.shape[1] :].tolist())
    shown = [c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text]
    answer = f"{prompt}{''.join(shown)}\n"
    flags = f"--temperature 0 --max_new_tokens 7 --num_samples 2 --sample '{prompt}'"
    for folder in (trained, trained / "model"):
        with pytest.raises(SystemExit):
            run_here("train.py", f"--device cpu --out_dir {folder} {flags}")
        assert capsys.readouterr().out == answer * 2


def test_short_shards_are_one_long_split(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(100):
        (texts / f"{i}.txt").write_text(f"text {i}: " + "a quick fox\n" * (i % 3))
    prepare_data.prepare([str(texts)], tmp_path / "long")
    prepare_data.prepare([str(texts)], tmp_path / "short", shard_tokens=60)
    _, shards = prepare_data.open_data(tmp_path / "short")
    assert np.median([len(shard) for shard in shards["val"]]) < 30  # a window has parts of several
    for name in ("long", "short"):
        flags = "--steps 3 --eval_interval 3"
        new_run(tmp_path / name, tmp_path / f"{name}_run", flags).finish()
    assert weights_are_equal(tmp_path / "long_run", tmp_path / "short_run", 3)
    assert logged(tmp_path / "long_run", "val_loss") == logged(tmp_path / "short_run", "val_loss")


def test_evaluation_gives_the_loss_of_the_whole_split_and_only_reads(
    data, trained, tmp_path, run_here, capsys
):
    before = files_of(trained)
    nats = validation_loss(FlashSTU.from_pretrained(trained / "model"), data)
    flags = f"--device cpu --eval_only --init_from {trained} --out_dir {tmp_path}/run"
    with pytest.raises(SystemExit):
        run_here("train.py", flags)
    printed = re.search(r"([0-9.]+) bits per byte", capsys.readouterr().out)
    assert float(printed[1]) == pytest.approx(nats / math.log(2), abs=2e-4)
    assert not (tmp_path / "run").exists()
    assert files_of(trained) == before


def test_muon_is_that_of_torch_up_to_its_rounding_to_16_bits(train_here):
    Muon = train_here("--steps 1")["Muon"]
    shapes = [(24, 8), (8, 24), (24, 8), (16, 16)]
    ours = [torch.randn(shape, requires_grad=True) for shape in shapes]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    options = {"lr": 0.02, "weight_decay": 0.1}
    groups = [{"params": [ours[0], ours[2]]}, {"params": [ours[1]]}, {"params": [ours[3]]}]
    our_muon = Muon(groups, options)
    their_muon = torch.optim.Muon(theirs, **options)
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        before = [q.detach().clone() for q in theirs]
        our_muon.step()
        their_muon.step()
        for p, q, old in zip(ours, theirs, before):
            assert (p - q).norm() < 0.02 * (q - old).norm()
            p.data.copy_(q.data)


def test_a_run_from_before_muon_had_groups_goes_on(run, tmp_path):
    """torch.optim.Muon kept all matrices in one group, with settings of its own."""
    old = shutil.copytree(run, tmp_path / "old")
    saved = load_step(old, 4)
    groups = saved["optimizer"]["param_groups"]
    adamw = [group for group in groups if "betas" in group]
    names = [name for group in groups if "betas" not in group for name in group["params"]]
    muon = {"params": names, "lr": 0.1, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True}
    saved["optimizer"]["param_groups"] = [*adamw, muon]
    del saved["tokenizer"], saved["data_checksum"]  # nor were these there
    torch.save(saved, old / "checkpoint_4.pt")
    for out in (old, run):
        assert "after step 4" in continued(out, "--steps 6").finish()
    assert weights_are_equal(old, run, 6)


def test_a_fresh_run_leaves_the_old_one_whole(data, run):
    before = files_of(run)
    fresh = new_run(data, run, "--fresh --steps 100000 --eval_interval 100000 --n_layers 1")
    fresh.wait_for("step 3/")
    fresh.kill()
    (old,) = run.parent.glob("run.*")
    assert files_of(old) == before
    new_run(data, run, "--steps 3 --n_layers 1 --eval_interval 3").finish()
    assert checkpoints(run) == [3]
    assert logged(run, "step") == [0, 1, 2, 3, 3]
    assert "after step 4" in continued(old, "--steps 6").finish()


def limit_file_size():
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000))


def test_what_cannot_be_written_leaves_what_was(run):
    good = (run / "checkpoint_4.pt").read_bytes()
    printed = continued(run, "--steps 6", before=limit_file_size).finish(1)
    assert "cannot write" in printed
    assert (run / "checkpoint_4.pt").read_bytes() == good
    assert checkpoints(run) == [2, 4]
    forever = continued(run, "--steps 100000 --eval_interval 100000")
    forever.wait_for("step 8/")
    (run / "full").symlink_to("/dev/full")
    os.replace(run / "full", run / "log.jsonl")
    assert "No space left" in forever.finish(1)
    (run / "log.jsonl").unlink()
    continued(run, "--steps 6").finish()


def test_wandb_receives_what_the_log_receives(train_here, tmp_path, monkeypatch):
    received = []

    def init(project, config):
        assert project == "mine"
        assert config["n_embd"] == 32

    def log(values, step):
        received.append({"step": step, **values})

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, log=log))
    train_here("--wandb mine --steps 2")
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert received == [json.loads(line) for line in lines]
    assert received[-1]["step"] == 2


def test_a_bug_shows_its_traceback(train_here, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace())
    with pytest.raises(AttributeError, match="init"):
        train_here("--wandb w")


def test_weights_without_a_finite_validation_loss_are_not_saved(data, trained, tmp_path):
    model = FlashSTU.from_pretrained(trained / "model")
    model.norm.weight.data.fill_(math.nan)
    model.save_pretrained(tmp_path / "broken")
    run = new_run(data, tmp_path / "run", f"--init_from {tmp_path}/broken")
    assert "not saved" in run.finish(1)
    assert not checkpoints(tmp_path / "run")


def test_a_run_keeps_its_last_two_checkpoints_and_what_is_not_ours(run):
    for name in ("checkpoint_best.pt", "checkpoint_2_keep.pt"):
        (run / name).write_text("mine")
    continued(run, "--steps 7 --eval_interval 1").finish()
    names = sorted(path.name for path in run.glob("*.pt"))
    assert names == [
        "checkpoint_2_keep.pt",
        "checkpoint_6.pt",
        "checkpoint_7.pt",
        "checkpoint_best.pt",
    ]
    assert (run / "checkpoint_best.pt").read_text() == "mine"


def print_ascii():
    sys.stdout.reconfigure(encoding="ascii")


def print_to_nobody():
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    sys.stdout = open(1, "w")  # noqa: SIM115 (unlike the file before, a pipe has no position)


def stop_the_clock():
    time.perf_counter = float


@pytest.mark.parametrize("before", [print_ascii, print_to_nobody, stop_the_clock])
def test_nothing_that_is_printed_ends_a_run(data, tmp_path, before):
    flags = "--steps 6 --eval_interval 3 --prompt '\x1b[31mé\udcff\u4e2d\u202e'"
    run = new_run(data, tmp_path / "é", flags, before=before)
    printed = run.finish()
    assert checkpoints(tmp_path / "é") == [3, 6]
    if before != print_to_nobody:
        assert "step 0/6: validation loss" in printed
        assert "step 1/6: loss" in printed
    if before == print_ascii:
        assert "\\x1b[31m\\xe9" in printed
        assert all(c in b"\n\t" or 32 <= c < 127 for c in run.output.read_bytes())


def test_every_engine_and_accumulation_give_one_loss_curve(data, tmp_path):
    flags = "--steps 6 --eval_interval 3"
    in_parts = f"{flags} --micro_batch_size 3"
    new_run(data, tmp_path / "one", flags).finish()
    new_run(data, tmp_path / "parts", f"{in_parts} --use_gradient_checkpointing").finish()
    new_run(data, tmp_path / "ddp", in_parts, processes=2).finish()
    new_run(data, tmp_path / "fsdp", f"{in_parts} --engine fsdp", processes=2).finish()
    for key in ("loss", "val_loss"):
        curve = logged(tmp_path / "one", key)
        assert curve[-1] < curve[0]
        for name in ("parts", "ddp", "fsdp"):
            assert logged(tmp_path / name, key) == pytest.approx(curve, rel=1e-5), name


def test_autocast_trains_to_about_the_same_losses(data, tmp_path):
    for dtype in ("float32", "bfloat16", "float16"):
        new_run(data, tmp_path / dtype, f"--steps 5 --eval_interval 100 --dtype {dtype}").finish()
        curve = logged(tmp_path / "float32")
        assert logged(tmp_path / dtype) == pytest.approx(curve, rel=1e-2), dtype


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_checkpoint_of_several_processes_goes_on_as_one_process_would(data, tmp_path, engine):
    flags = "--eval_interval 3 --min_lr 1"
    whole = new_run(data, tmp_path / "one", f"{flags} --steps 6")
    several = tmp_path / "several"
    new_run(data, several, f"{flags} --steps 3 --engine {engine}", processes=2).finish()
    assert "after step 3" in continued(several, "--steps 6").finish()
    whole.finish()
    assert logged(several) == pytest.approx(logged(tmp_path / "one"), rel=1e-5)


def test_a_run_killed_anywhere_ends_bit_equal_to_one_that_was_not(data, tmp_path):
    flags = "--steps 60 --eval_interval 5 --dropout 0.1"
    whole = new_run(data, tmp_path / "whole", flags)
    out = tmp_path / "killed"
    run = new_run(data, out, flags)
    run.wait_for("step 13/")
    run.kill()
    run = new_run(data, out, flags)
    run.wait_for("step 24/")
    while not any(out.glob(f"*{prepare_data.TEMPORARY}")):  # until it writes a checkpoint
        assert run.goes_on()
    run.kill()
    run = new_run(data, out, flags)
    run.wait_for("step 41/")
    run.kill()
    assert "continuing" in continued(out).finish()  # the folder is enough
    whole.finish()
    assert weights_are_equal(out, tmp_path / "whole", 60)
    for key in ("step", "loss", "val_loss"):
        assert len(logged(out, key)) > 10
        assert logged(out, key) == logged(tmp_path / "whole", key)


def test_sigterm_saves_and_a_run_folder_has_one_owner(data, tmp_path):
    out = tmp_path / "run"
    forever = "--steps 100000 --eval_interval 10"
    run = new_run(data, out, forever)
    run.wait_for("step 11/")
    owner = run.processes[0]
    assert f"{out} is in use by process {owner.pid}\n" in new_run(data, out, forever).finish(1)
    owner.terminate()
    assert "stopped after step" in run.finish()
    saved = checkpoints(out)[-1]
    assert saved == logged(out, "step")[-1] > 10
    assert f"after step {saved}\n" in continued(out, f"--steps {saved + 3}").finish()


def is_in_use(folder):
    try:
        prepare_data.lock(folder).close()
    except SystemExit:
        return True
    return False


def test_processes_whose_torchrun_is_dead_save_and_end(data, tmp_path):
    out = tmp_path / "run"
    flags = f"{TINY} --data {data} --out_dir {out} --steps 20000 --eval_interval 10"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    torchrun = subprocess.Popen([*command, "train.py", *flags.split()], cwd=HERE)
    while not checkpoints(out):
        assert torchrun.poll() is None
        time.sleep(0.01)
    torchrun.kill()
    torchrun.wait()
    deadline = time.monotonic() + 100
    while is_in_use(out):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert checkpoints(out)[-1] == logged(out, "step")[-1]


def test_steps_without_a_finite_gradient_are_skipped_and_end_the_run(run):
    high = "--lr 1e30 --muon_lr 1e30 --warmup_steps 0 --max_skipped 3"
    printed = continued(run, f"{high} --steps 50 --eval_interval 100").finish(1)
    assert printed.count("is skipped") == 3
    assert "Checkpoints: [2, 4]" in printed
    assert "Traceback" not in printed
    printed = continued(run, "--steps 5").finish()
    assert "after step 4" in printed
    assert "skipped" not in printed
