"""What holds, by name: each test states an identity of one of the other files, and checks it."""

import argparse
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
with contextlib.suppress(ImportError):  # before stu, which then has the classes for it
    import transformers  # noqa: F401

import lds as lds_module
import prepare_data
import stu
from lds import (
    LDS,
    S4D,
    Mamba2,
    MiniSTU,
    convolve,
    descend,
    quiz,
    random_LDS,
    sample,
    stack,
    train_stu_on_lds,
    unseen_error,
    white_filters,
)
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
    first = torch.stack([column[column.abs() > 1e-9][0] for column in phi.T])  # of Hankel-L: lag 0 or 1
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
    lds = FilterBank(phi, hankel_L).lds
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
        lds = FilterBank(phi, fade=fade, tolerance=math.inf).lds
        tails.append((lds.C @ torch.linalg.matrix_power(lds.powers[1], 128)).norm(dim=1).max())
    assert tails[1] > 5 * tails[0]


# ------------------------------------------------------------------------------------------------------------
# stu.py: the STU layer


def make_stu(L, d_in=6, d_out=6, **options):
    K = 4 if options.get("use_tensorized") else min(24, L)
    return STU(d_in, d_out, L, **({"num_eigh": K} | options))


def formula(layer, x):
    """stu_formula with this layer's filters and weights, float64."""
    if layer.config.use_approx:
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
        h_f = torch.fft.rfft(torch.stack([phi @ M[:K], phi @ M[K:]], dim=-1), n=n, dim=0)  # [n/2 + 1, d, 2]
        plus, minus = torch.fft.irfft(x_f * h_f, n=n, dim=1)[:, :T].unbind(-1)
        return plus + sign * minus
    phi_f = torch.fft.rfft(phi, n=n, dim=0)  # [n/2 + 1, K]
    u = torch.fft.irfft(x_f[:, :, None] * phi_f[None, :, :, None, None], n=n, dim=1)[:, :T]  # [B, T, K, d, 2]
    plus, minus = (torch.tensordot(u[..., i], M[i * K : (i + 1) * K], dims=([2, 3], [0, 1])) for i in (0, 1))
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
        if T > 1 and not options.keys() - {"use_approx"}:  # and so does the usual route of the benchmark
            u, M = (x @ layer.M_inputs, layer.M_filters) if layer.config.use_approx else (x, layer.M)
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
    (S,) = state.tensors
    assert S.dtype == torch.float32 and S.shape == (1, len(layer.bank.lds.b), 4)


def test_the_state_does_not_grow_and_outputs_stay_sane_past_seq_len():
    layer, x = STU(4, 4, 64), torch.randn(1, 64 * 50, 4)
    y, state = layer(x, use_cache=True)
    first, last = y[:, :64].std(), y[:, -640:].std()
    assert last < 2 * first
    assert state.tensors[0].shape == (1, 112, 4)
    y, state = layer(torch.zeros(1, 64 * 50, 4), state, use_cache=True)  # and what was long ago is forgotten
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
    exact, _ = layer.bank.on(x)
    layer.to(torch.bfloat16)
    filters, _ = layer.bank.on(x.bfloat16())
    assert layer.M_inputs.dtype == torch.bfloat16 and torch.equal(filters, exact)
    y, state = in_pieces(layer, x.bfloat16(), [50])
    assert y.dtype == torch.bfloat16 and state.tensors[0].dtype == torch.float32
    assert relative_error(y.float(), layer(x.bfloat16()).float()) < 1e-2
    assert layer.bank.on(x.double())[0].dtype == torch.float64


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
    assert layer(x.to("meta")).is_meta and model(ids.to("meta")).logits.is_meta
    for empty, whole, inputs in ((layer, STU(4, 4, 50), x), (model, small_model(), ids)):
        empty.to_empty(device="cpu").load_state_dict(whole.state_dict())
        a, b = empty(inputs), whole(inputs)
        assert torch.equal(*(t if torch.is_tensor(t) else t.logits for t in (a, b)))


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1000.0])
def test_filters_of_any_scale_have_their_recurrence_and_noise_has_none(scale):
    assert FilterBank(scale * get_spectral_filters(200, 10), use_hankel_L=True).lds is not None
    assert FilterBank(scale * torch.randn(200, 10), use_hankel_L=True).lds is None


@pytest.mark.parametrize("make", [
    lambda: STU(4, 4, 67, use_tensorized=True), lambda: STU(4, 4, 64, precomputed_filters=torch.randn(64, 4)),
])  # fmt: skip
def test_a_recurrence_that_would_not_fade_is_not_taken(make):
    layer, x = make(), torch.randn(1, 640, 4)
    assert layer.bank.lds is None and layer(x)[:, 80:].std() < 2


def test_a_layer_first_used_in_inference_mode_or_in_a_dry_run_trains_afterwards():
    from torch._subclasses.fake_tensor import FakeTensorMode

    stu.standard_bank.cache_clear()
    with torch.inference_mode():
        STU(4, 4, 61).double()(torch.randn(1, 61, 4).double())
    with FakeTensorMode(allow_non_fake_inputs=True):
        STU(4, 4, 61)(torch.randn(1, 61, 4))
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
            torch.func.vmap(torch.func.grad(f), (0, None))(many, weights[name]) for f in (by_fft, recurring)
        ]
        assert relative_error(*rows) < 1e-9


def test_precomputed_filters_are_used():
    phi, x, own = get_spectral_filters(60, 10), torch.randn(1, 60, 4), STU(4, 4, 60, 10)
    for filters, expected in ((phi, own(x)), (-phi, -own(x)), (FilterBank(-phi), -own(x))):
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
        assert u.dtype == self.dtype and k.dtype == torch.float32 and u.is_contiguous() and k.is_contiguous()
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
    assert torch.equal(layer(x), exact) and FakeFlashFFTConv.runs == runs  # a float32 model stays in float32
    layer, x = layer.bfloat16(), x.bfloat16()
    for layer.config.use_flash_fft in (True, False):
        assert relative_error(layer(x).float(), exact) < 3e-2
        assert FakeFlashFFTConv.runs == runs + 1 and list(layer.state_dict()) == names


@pytest.mark.parametrize("make, message", [
    (lambda: STU(4, 4, 8, num_eigh=9), "K = 9"),
    (lambda: STU(4, 4, 8, num_eigh=0), "num_eigh must be a positive integer, got 0"),
    (lambda: STU(4, 4, 8, num_eigh=2.5), "num_eigh must be a positive integer, got 2.5"),
    (lambda: STU(4, 4, True, 1), "seq_len"),
    (lambda: STU(4, 4, 8, 4, use_approx="False"), "use_approx must be True or False, got 'False'"),
    (lambda: STU(4, 4, 8, 4, use_hankel_L=1), "use_hankel_L"),
    (lambda: get_spectral_filters(8, 4, dtype=torch.int32), "floating-point"),
    (lambda: STU(4, 4, 8, 4, use_approx=False)(torch.ones(1, 8, 4, dtype=torch.int64)), "floating-point"),
    (lambda: STU(4, 4, 400, num_eigh=400), "length 400 has 2.. filters"),
    (lambda: STU(0, 4, 8, 4), "d_in must be a positive integer, got 0"),
    (lambda: STU(4, True, 8, 4), "d_out must be a positive integer, got True"),
    (lambda: STU(4, "4", 8, 4), "d_out must be a positive integer, got '4'"),
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
    assert relative_error(y.float(), expected) < 2e-2 and len(ran) == 3


def test_attention_in_pieces_equals_the_whole_sequence():
    for window, T, B in ((0, 5, 1), (16, 100, 2), (200, 100, 1)):
        attention, x = SlidingWindowAttention(32, 4, window), torch.randn(B, T, 32)
        whole = attention(x)
        for cuts in (random_cuts(T, 3), range(1, T)):
            y, state = in_pieces(attention, x, cuts)
            assert relative_error(y, whole) < 1e-5 and state.tensors[0].shape[2] <= window


def test_attention_depends_on_distance_not_on_position():
    attention, x = SlidingWindowAttention(32, 4, 8).double(), torch.randn(1, 40, 32).double()
    assert relative_error(attention(x[:, 10:])[:, 8:], attention(x)[:, 18:]) < 1e-5
    _, state = attention(x[:, :1], use_cache=True)
    empty = torch.zeros(1, 4, 0, 8).double()  # no keys: a stream that begins after so many tokens
    state = state._replace(tensors=(empty, empty), seen=10**8)
    assert relative_error(attention(x, state, use_cache=True)[0], attention(x)) < 1e-5


def test_attention_has_the_gradients_of_finite_differences():
    x = torch.randn(1, 6, 8, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(SlidingWindowAttention(8, 2, 3).double(), x)


def test_the_state_of_a_long_piece_is_as_small_as_its_window():
    for layer in (SlidingWindowAttention(8, 1, 4), STU(8, 8, 68, use_tensorized=True)):
        _, state = layer(torch.randn(1, 2000, 8), use_cache=True)
        assert all(t.untyped_storage().nbytes() == 4 * t.numel() for t in state.tensors)


@pytest.mark.parametrize("window", [-1, 2.5, (4, 1), (-1, -1), (4, 0, 0)])
def test_attention_refuses_windows_that_see_the_future_or_nothing(window):
    with pytest.raises(ValueError, match="window_size"):
        SlidingWindowAttention(32, 4, window)


# ------------------------------------------------------------------------------------------------------------
# stu.py: block and model


def small_config(**changes):
    sizes = {"n_embd": 32, "n_layers": 4, "n_heads": 4, "seq_len": 48, "window_size": 12, "vocab_size": 61}
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
    generated = model.generate(input_ids=input_ids[:, :10], max_length=14, temperature=0.8, top_k=40)
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
    assert runpy.run_path("chat.py")["state"][1].seen == len("hello\nand then?\n") + 400  # it read all of it


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
    for prompt in (torch.randint(61, (1, 1)), torch.randint(61, (3, 30)), torch.randint(61, (1, 110))):
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
        layer.register_forward_hook(lambda _, x, y: scales.extend([x[0].square().mean(), y.square().mean()]))
    with torch.no_grad():
        model.hidden(torch.randint(61, (1, T)))
    assert len(scales) == 2 * layers and 0.4 < scales[-1].sqrt() and all(s.sqrt() < 0.8 for s in scales)


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
    ({"max_new_tokens": 3, "top_p": 0.0}, "top_p .* got 0.0"),
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
    ([[1, 2]], None, r"input_ids and labels must be tensors of integers.*got \[\[1, 2\]\]"),
    (torch.ones(1, 4), None, "got torch.float32"), (torch.ones(1, 4).bool(), None, "got torch.bool"),
    (torch.ones(4).long(), None, r"got torch.int64 \[4\]"), (torch.ones(1, 0).long(), None, "length >= 1"),
    (torch.ones(1, 4).long(), torch.ones(4).long(), r"labels must be.*got torch.int64 \[4\]"),
    (torch.ones(1, 4).long(), torch.ones(1, 3).long(), r"labels must be \[1, 4\]"),
    (torch.ones(1, 1).long(), torch.ones(1, 1).long(), "length > 1"),
    (torch.full((1, 4), 61), None, r"token ids 61 to 61 are not in \[0, 61\)"),
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
        "bias": np.bool_(True),
    }
    config = small_config(**sizes)
    assert {name: type(getattr(config, name)) for name in sizes} == dict(zip(sizes, (int, int, float, bool)))


def test_a_text_goes_on_from_the_state_of_the_last():
    """... whether the state was left in the middle of a stream or after it, with new tokens or without."""
    model, ids, greedy = small_model(), torch.randint(61, (2, 30)), {"temperature": 0}
    whole = model.generate(ids, max_new_tokens=12, **greedy)
    for n in (0, 1, 5):
        state = []
        for i, _ in enumerate(model.stream(ids, 100, state=state, **greedy), 1):
            if i >= n:
                break
        n = max(n, 1)
        rest = model.generate(ids[:, :0], max_new_tokens=12 - n, state=list(state), **greedy)
        assert torch.equal(rest, whole[:, 30 + n :])
        more = torch.randint(61, (2, 4))
        a = model.generate(more, max_new_tokens=6, state=state, **greedy)
        b = model.generate(torch.cat([whole[:, : 30 + n], more], 1), max_new_tokens=6, **greedy)
        assert torch.equal(a, b[:, 30 + n :])


def test_a_state_of_another_model_is_refused():
    ids = torch.zeros(2, 4, dtype=torch.long)
    _, _, state = small_model()(ids, use_cache=True)
    for changes, rows, message in (
        ({"n_layers": 2}, 2, "of 2 layers, got one of 4"), ({}, 1, "2 sequences"), ({"seq_len": 49}, 2, "length 48"),
        ({"window_size": 11}, 2, "window 12"), ({"use_approx": False}, 2, "STU-T"), ({"num_eigh": 20}, 2, "48 filters"),
    ):  # fmt: skip
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
    ({"n_heads": 5}, "n_heads = 5 does not divide"), ({"use_approx": "False"}, "use_approx must be True or False"),
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
    """Other weights beside it, shards of a larger model, what a killed save left."""
    model, other, ids = small_model(), small_model(n_layers=6), torch.randint(61, (1, 9))
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "model-00001-of-00002.safetensors").write_bytes(b"cut")
    other.save_pretrained(tmp_path / "other")
    for name in ("model_old", "model2", "model-old", "model-00001-of-00001"):
        shutil.copyfile(tmp_path / "other" / "model.safetensors", tmp_path / f"{name}.safetensors")
    model.save_pretrained(tmp_path)
    assert torch.equal(FlashSTU.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    assert not (tmp_path / "unfinished").exists()


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
        with pytest.raises(ValueError, match=r"model\*.safetensors .* got .*" + re.escape(str(folder))):
            FlashSTU.from_pretrained(folder)
    small_model().save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    for file, damage, message in (
        (weights, lambda b: b[: len(b) // 2], "incomplete"),
        (config, lambda b: b.replace(b'"n_embd": 32', b'"n_embd": 64'), "size mismatch"),
        (config, lambda b: b.replace(b'"n_layers": 4', b'"n_layers": 5'), "Missing key"),
        (config, lambda b: b.replace(b'"n_embd"', b'"n_embed"'), "n_embd"),
        (config, lambda b: b[:20], "line 3"),
    ):
        whole = file.read_bytes()
        file.write_bytes(damage(whole))
        with pytest.raises(Exception, match=message):  # as the library that reads it says
            FlashSTU.from_pretrained(tmp_path)
        file.write_bytes(whole)
    FlashSTU.from_pretrained(tmp_path)
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
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
print(*optional & set(sys.modules), hasattr(stu, "FlashSTUForCausalLM"))
"""
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, cwd=HERE, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert output == "False\n"


# ------------------------------------------------------------------------------------------------------------
# stu.py: it learns


def learn(measure, steps, rate, **options):
    """Accuracy of a two-layer model on unseen questions after some steps; measure(model) -> loss, accuracy."""
    torch.manual_seed(0)
    model = FlashSTU(small_config(n_layers=2, n_heads=2, vocab_size=64, softcap=0.0, **options))
    descend(model, measure, steps, rate)
    with torch.no_grad():
        return measure(model)[1].item()


def test_the_hybrid_recalls_what_neither_kind_of_layer_recalls_alone():
    """The STU hands each value its key (the token before), attention finds it: two layers and 100 steps are
    enough."""
    options = {"n_embd": 64, "seq_len": 32, "window_size": 32, "num_eigh": 16, "mlp_scale": 1}
    measure = lambda model: quiz(model, "associative recall", 64)
    kinds = ({}, {"use_stu": False}, {"use_attn": False})
    hybrid, attention, spectral = (learn(measure, 100, 1e-2, **options, **kind) for kind in kinds)
    assert hybrid > 0.99 and attention < 0.5 and spectral < 0.5, (hybrid, attention, spectral)


@pytest.mark.parametrize("task", ["associative recall", "induction", "selective copying"])
def test_what_the_tasks_ask_for_stands_in_what_the_model_has_read(task):
    back = 2 if task == "induction" else 1

    def follower(row, t):  # what came after the last time that the `back` tokens up to t were there
        seen = (
            s for s in range(t - 1, back - 2, -1) if row[s + 1 - back : s + 1] == row[t + 1 - back : t + 1]
        )
        return next((row[s + 1] for s in seen), 0)

    def oracle(ids):
        answers = torch.tensor([[follower(row, t) for t in range(len(row))] for row in ids.tolist()])
        if task == "selective copying":
            answers[:, 48:] = ids[ids < 62].view(-1, 8)
        return stu.Output(None, 100.0 * F.one_hot(answers, 64), None)

    assert quiz(oracle, task, 50)[1] > 0.9


def memory(model, n=8, T=512, decay=0.99):
    """Random signs; the label is the octile of their exponential average, a memory of some 300 steps."""
    signs = 2 * torch.randint(2, (n, T)) - 1
    weights = (1 - decay**2) ** 0.5 * decay ** torch.arange(T)
    average = convolve(signs[..., None].float(), weights[:, None])[:, 100:, 0].contiguous()
    labels = torch.bucketize(average, torch.tensor([-1.15, -0.67, -0.32, 0, 0.32, 0.67, 1.15]))
    logits = model((signs + 1) // 2).logits[:, 100:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), (
        logits.argmax(-1) == labels
    ).float().mean()


def test_the_hybrid_remembers_beyond_the_attention_window():
    options = {"n_embd": 32, "seq_len": 512, "window_size": 64, "num_eigh": 24, "mlp_scale": 2}
    hybrid = learn(memory, 150, 2e-2, **options)
    attention = learn(memory, 150, 2e-2, **options, use_stu=False)
    assert hybrid > 0.85 and attention < 0.65, (hybrid, attention)


# ------------------------------------------------------------------------------------------------------------
# stu.py: Hugging Face


@pytest.fixture(scope="module")
def hf():
    return pytest.importorskip("transformers")


def lively_model(**options):
    """Not trained, but its greedy text is no repetition of one token."""
    model = small_model(**options)
    with torch.no_grad():
        for p in model.layers.parameters():
            p.mul_(2)
    return model


def load(hf, folder, **options):
    return hf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def in_transformers(config):
    """The model of a FlashSTUConfig as transformers would make it, from the classes of this process."""
    return stu.FlashSTUForCausalLM(stu.FlashSTUPretrainedConfig(**config.to_dict())).eval()


@pytest.fixture(scope="module")
def saved(hf, tmp_path_factory):
    """The same model twice, ours and that of transformers, and its folder; vocabulary: bytes."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    model = lively_model(vocab_size=256, dropout=0.1)
    model.save_pretrained(folder)
    prepare_data.save_tokenizer(prepare_data.get_tokenizer("bytes"), folder)
    return model, load(hf, folder), folder


def padded(ids, lengths, pad=0):
    """Rows ids[i, -lengths[i]:] behind padding, and their attention_mask."""
    mask = torch.arange(ids.shape[1]) >= ids.shape[1] - torch.tensor(lengths)[:, None]
    return torch.where(mask, ids, pad), mask.long()


@models
def test_transformers_computes_what_we_compute(hf, options, tmp_path):
    model, ids = lively_model(**options), torch.randint(61, (2, 60))
    model.save_pretrained(tmp_path)
    theirs = load(hf, tmp_path)
    assert isinstance(theirs, hf.PreTrainedModel)
    assert type(theirs).__module__.startswith("transformers_modules")
    assert torch.equal(theirs(ids).logits, model(ids).logits)
    greedy = theirs.generate(ids, max_new_tokens=20, do_sample=False)
    assert torch.equal(greedy, model.generate(ids, max_new_tokens=20, temperature=0))
    assert len(greedy[0, 60:].unique()) > 3
    theirs.save_pretrained(tmp_path / "theirs")
    again = FlashSTU.from_pretrained(tmp_path / "theirs")
    assert again.config == model.config and torch.equal(again(ids).logits, model(ids).logits)


@models
@torch.no_grad()
def test_left_padding_reaches_neither_state_nor_attention(hf, options):
    """... whatever stands there, in one piece and in two, and over the generation that follows."""
    model, ids, lengths = lively_model(**options), torch.randint(1, 61, (3, 40)), [40, 7, 25]
    theirs = in_transformers(model.config)
    theirs.model.load_state_dict(model.state_dict())
    x, mask = padded(ids, lengths)
    logits = theirs(x, attention_mask=mask).logits
    noise = torch.where(mask == 1, x, torch.randint(61, x.shape))
    assert torch.equal(theirs(noise, attention_mask=mask).logits * mask[..., None], logits * mask[..., None])
    first = theirs(x[:, :20], attention_mask=mask[:, :20], use_cache=True)
    second = theirs(x[:, 20:], attention_mask=mask, past_key_values=first.past_key_values)
    in_two = torch.cat([first.logits, second.logits], 1)
    assert relative_error(in_two * mask[..., None], logits * mask[..., None]) < 1e-5
    text = theirs.generate(x, attention_mask=mask, max_new_tokens=15, do_sample=False, pad_token_id=0)
    for row, n in enumerate(lengths):
        alone = ids[row : row + 1, -n:]
        assert relative_error(logits[row, -n:], model(alone).logits[0]) < 1e-5
        assert torch.equal(text[row, 40 - n :], model.generate(alone, max_new_tokens=15, temperature=0)[0])


def test_only_padding_that_is_seen_costs_the_fast_route(hf, saved, monkeypatch):
    masks = []

    def hidden(self, ids, state, use_cache, mask):
        masks.append(mask)
        return torch.zeros(*ids.shape, 32), []

    monkeypatch.setattr(stu.FlashSTUModel, "hidden", hidden)
    model, ids = in_transformers(small_config()), torch.ones(2, 6, dtype=torch.long)
    left = padded(ids, [6, 3])[1]
    right, none = left.flip(1), torch.ones_like(left)
    for mask, cached in ((none, True), (right, False), (right, True), (left, False)):
        model(ids, attention_mask=mask, use_cache=cached)
    assert [mask is not None for mask in masks] == [False, False, True, True]
    attention, x = stu.SlidingWindowAttention(32, 2, 4).bfloat16(), torch.randn(2, 6, 32).bfloat16()
    expected = attention(x, attention_mask=left)
    monkeypatch.setattr(stu, "on_cuda_16_bit", lambda t: t.element_size() == 2)
    monkeypatch.setattr(stu, "flash_attn_func", lambda *_, **__: pytest.fail("flash-attn knows no padding"))
    assert torch.equal(attention(x, attention_mask=left), expected)
    for wrong, got in (
        (left[:, 1:], r"int64 \[2, 5\]"), (F.pad(left, (1, 0)), r"bool \[2, 7\]"), (none * 0.5, "float32"),
        (none * 2, "int64"), (none * math.nan, "float32"), ((none - 1) * 1e9 - 1, "float32"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"attention_mask must be .* got torch.{got}"):
            model(ids, attention_mask=wrong)


def test_transformers_generates_from_our_state(hf, saved):
    _, theirs, folder = saved
    tokenizer = hf.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    prompt = tokenizer(["def f(x):", "import"], padding=True, padding_side="left", return_tensors="pt")
    greedy = {"max_new_tokens": 24, "do_sample": False}
    text = theirs.generate(**prompt, **greedy)
    assert torch.equal(theirs.generate(**prompt, max_new_tokens=24, do_sample=True, top_k=1), text)
    assert torch.equal(theirs.generate(**prompt, **greedy, use_cache=False), text)
    beams = theirs.generate(**prompt, max_new_tokens=12, num_beams=3)  # the state is reordered as they are
    again = theirs.generate(**prompt, max_new_tokens=12, num_beams=3, use_cache=False)
    assert torch.equal(beams, again) and beams.shape[1] > 10
    hf.set_seed(1)
    samples = theirs.generate(**prompt, max_new_tokens=12, do_sample=True, num_return_sequences=3)
    assert samples.shape[0] == 6 and len({tuple(row) for row in samples.tolist()}) == 6
    one = tokenizer("def f(x):", return_tensors="pt")
    text, shown, streamer = theirs.generate(**one, **greedy), [], hf.TextStreamer(tokenizer)
    streamer.on_finalized_text = lambda piece, stream_end=False: shown.append(piece)
    theirs.generate(**one, **greedy, streamer=streamer)
    assert len(shown) > 1 and "".join(shown) == tokenizer.decode(text[0])
    new = text[0, 9:].tolist()
    stop = next(bytes([b]).decode("ascii") for b in new[4:] if 32 < b < 127)
    stopped = theirs.generate(**one, **greedy, stop_strings=[stop], tokenizer=tokenizer)
    assert stopped[0, -1] == ord(stop) and stopped.shape[1] == 9 + new.index(ord(stop)) + 1


def test_texts_go_on_from_a_cache_and_leave_it_as_it_was(hf, saved):
    """Two turns of a chat, the second one twice; and a prefix with two continuations, padded and not."""
    model, theirs, _ = saved
    ids, mask = torch.randint(1, 256, (2, 30)), torch.ones(2, 30, dtype=torch.long)
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    first = theirs.generate(ids, **greedy, return_dict_in_generate=True)
    chat, cache = torch.cat([first.sequences, torch.randint(1, 256, (2, 5))], 1), first.past_key_values
    for given in (chat, chat[:, cache.get_seq_length() :]):  # all ids, or the new ones and a mask of all
        full = {"attention_mask": torch.ones_like(chat), "past_key_values": cache}
        answer = theirs.generate(given, **full, **greedy)[:, -8:]
        assert torch.equal(answer, model.generate(chat, max_new_tokens=8, temperature=0)[:, -8:])
    mask[0, :11] = 0
    prefix = theirs(ids[:, :20], attention_mask=mask[:, :20], use_cache=True).past_key_values
    for length in (21, 30):
        x = {"input_ids": ids[:, :length], "attention_mask": mask[:, :length]}
        assert torch.equal(
            theirs.generate(**x, **greedy, past_key_values=prefix), theirs.generate(**x, **greedy)
        )
    for read in (20, 15, 3):  # nothing new: transformers would read them all once more
        with pytest.raises(ValueError, match="give all ids"):
            theirs.generate(ids[:, :read], **greedy, past_key_values=prefix)
    with pytest.raises(ValueError, match=r"must be \[2, at least 40\].* got torch.int64 \[2, 20\]"):
        theirs(ids[:, :20], attention_mask=mask[:, :20], past_key_values=prefix)


def test_documents_packed_into_a_row_see_each_other(hf, saved):
    """As in train.py: where they begin is taken, in every form, and not used. Positions are relative."""
    model, theirs, _ = saved
    rows, starts = torch.randint(256, (2, 15)), torch.tensor([0, 9, 15], dtype=torch.int32)
    packing = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 9, "max_length_k": 9}
    packing |= {"position_ids": torch.arange(15)[None] % 9, "seq_idx": torch.arange(15)[None] // 9}
    assert torch.equal(theirs(rows, **packing).logits, model(rows).logits)


def test_what_transformers_cannot_have_is_refused_in_words(hf, saved):
    _, theirs, _ = saved
    ids, embeds = torch.randint(256, (1, 8)), torch.zeros(1, 8, 32)
    llama = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    other = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=256, **llama))
    for call, message in (
        (lambda: theirs(inputs_embeds=embeds), "missing .* 'input_ids'"),
        (lambda: theirs(ids, inputs_embeds=embeds), "takes input_ids"),
        (lambda: theirs.generate(inputs_embeds=embeds), "inputs_embeds"),
        (lambda: theirs(ids, output_attentions=True), "no attention weights"),
        (lambda: theirs(ids, past_key_values=hf.DynamicCache()), "a cache of its own"),
        (lambda: theirs.generate(ids, assistant_model=other), "stateful"),
        (lambda: other.generate(ids, assistant_model=theirs), "no attribute 'crop'"),
        (lambda: theirs(ids, colour=1), "colour"),
        (lambda: theirs.generate(ids, colour=1), "colour"),
    ):
        with pytest.raises((ValueError, TypeError, AttributeError), match=message):
            call()


def test_the_transformers_class_returns_what_is_asked_for(hf, saved):
    model, theirs, _ = saved
    ids = torch.randint(256, (2, 30))
    labels = ids.clone()
    labels[0, :10] = -100
    out = theirs(ids, labels=labels, output_hidden_states=True, use_cache=True)
    assert torch.allclose(out.loss, model(ids, labels=labels).loss)
    assert torch.allclose(out.logits, model(ids).logits, atol=1e-5)
    first, *_, last = out.hidden_states
    assert len(out.hidden_states) == 5 and torch.equal(first, theirs.get_input_embeddings()(ids))
    assert torch.equal(model.tok_emb(last), out.logits)
    assert theirs(ids).past_key_values is None and out.past_key_values.get_seq_length() == 30
    tuples = theirs(ids, labels=labels, return_dict=False)
    assert isinstance(tuples, tuple) and len(tuples) == 2 and torch.equal(tuples[1], theirs(ids).logits)
    token = torch.randint(256, (2, 1))
    step = theirs(token, past_key_values=out.past_key_values).logits[:, -1]
    assert relative_error(step, model(torch.cat([ids, token], 1)).logits[:, -1]) < 1e-5
    last = torch.tensor([3, 29])
    assert torch.equal(theirs(ids, logits_to_keep=last).logits, theirs(ids).logits[:, last])
    assert torch.allclose(theirs(ids, logits_to_keep=2).logits, out.logits[:, -2:], atol=1e-6)
    shifted = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], 1)  # what the loss makes of labels
    assert torch.equal(theirs(ids, labels=ids, shift_labels=shifted).loss, out.loss)
    assert torch.equal(theirs(ids, shift_labels=shifted).loss, out.loss)
    half = theirs(ids, labels=labels, num_items_in_batch=2 * (shifted != -100).sum()).loss
    assert torch.allclose(2 * half, out.loss)
    base = hf.AutoModel.from_pretrained(saved[2], trust_remote_code=True).eval()
    assert torch.equal(base(ids, return_dict=False)[0], theirs.model(ids).last_hidden_state)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_dtype_is_that_of_the_checkpoint_or_the_one_asked_for(hf, saved, dtype):
    model, theirs, folder = saved
    assert theirs.dtype == torch.float32
    ids, dtype = torch.randint(256, (1, 20)), getattr(torch, dtype)
    other = load(hf, folder, dtype=dtype)
    assert other.dtype == dtype and torch.equal(other(ids).logits, copy.deepcopy(model).to(dtype)(ids).logits)
    made = hf.AutoModelForCausalLM.from_config(theirs.config, trust_remote_code=True, dtype=dtype)
    spread, expected = (m.layers[0].mixer.M_filters.std() for m in (made.model, FlashSTU(model.config)))
    assert made.dtype == dtype and 0.8 < spread / expected < 1.25  # initialised as FlashSTU does


def test_resized_embeddings_come_back_from_shards(hf, saved, tmp_path):
    model, ids = copy.deepcopy(saved[1]), torch.randint(256, (2, 20))
    before = model(ids).logits
    model.resize_token_embeddings(300)
    assert torch.equal(model(ids).logits[..., :256], before)
    assert model(ids + 44, labels=ids + 44).logits.shape[-1] == 300
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    for again in (load(hf, tmp_path), FlashSTU.from_pretrained(tmp_path).eval()):
        assert torch.equal(again(ids).logits, model(ids).logits)
    saved[0].save_pretrained(tmp_path)  # a whole file counts, whatever shards are still there
    for again in (load(hf, tmp_path), FlashSTU.from_pretrained(tmp_path).eval()):
        assert torch.equal(again(ids).logits, saved[0](ids).logits)
    (tmp_path / "model.safetensors").unlink()
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(RuntimeError, match="size mismatch|Missing key"):
        FlashSTU.from_pretrained(tmp_path)


@models
@torch.no_grad()
def test_offloaded_weights_give_the_same_logits(hf, options, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, ids = lively_model(**options), torch.randint(61, (2, 30))
    model.save_pretrained(tmp_path / "model")
    expected = model(ids).logits
    on_disk = dict.fromkeys(("model.tok_emb", "model.layers.1", "lm_head"), "disk")
    rest = ("model.layers.0", "model.layers.2", "model.layers.3", "model.norm", "model.dropout")
    device_map = on_disk | dict.fromkeys(rest, "cpu")
    theirs = load(hf, tmp_path / "model", device_map=device_map, offload_folder=str(tmp_path / "map"))
    assert theirs.model.tok_emb.weight.is_meta and torch.equal(theirs(ids).logits, expected)
    for ours in (model, load(hf, tmp_path / "model")):
        accelerate.cpu_offload(ours, execution_device=torch.device("cpu"))
        assert next(ours.parameters()).is_meta and torch.equal(ours(ids).logits, expected)


def test_a_saved_folder_is_ready_for_the_hub(hf, saved, tmp_path):
    folder = saved[2]
    in_transformers(small_config()).save_pretrained(tmp_path)
    for place in (folder, tmp_path):
        config = json.loads((place / "config.json").read_text())
        assert config["auto_map"] == stu.HF_CONFIG["auto_map"]
        assert config["architectures"] == ["FlashSTUForCausalLM"]
        assert (place / "stu.py").read_bytes() == (HERE / "stu.py").read_bytes()
        assert hf.GenerationConfig.from_pretrained(place).eos_token_id == (0 if place == folder else None)
        config = hf.AutoConfig.from_pretrained(place, trust_remote_code=True)
        assert config.hidden_size == 32 and config.num_hidden_layers == 4
    with pytest.raises(ValueError, match="n_heads = 5 does not divide"):
        stu.FlashSTUForCausalLM(stu.FlashSTUPretrainedConfig(n_embd=32, n_heads=5))


def test_gradient_checkpointing_through_their_switch_changes_no_gradient(hf, saved):
    model, ids = copy.deepcopy(saved[1]).train(), torch.randint(256, (2, 40))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ran, gradients = [], []
    model.model.layers[1].register_forward_pre_hook(lambda *_: ran.append(1))
    enable, disable = model.activation_checkpointing_enable, model.activation_checkpointing_disable
    for switch in (lambda: None, enable, disable):
        switch()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        ran.append(0)
    assert ran == [1, 0, 1, 1, 0, 1, 0]  # computed a second time only between the two
    for one in gradients[1:]:
        assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(one, gradients[0]))


def text_rows(n=24, length=40):
    line = torch.tensor(list(b"the quick brown fox jumps over the lazy dog. " * 40))
    return [{"input_ids": (row := line[i : i + length]), "labels": row} for i in range(n)]


def test_their_trainer_trains_it_and_we_load_the_result(hf, saved, tmp_path):
    pytest.importorskip("accelerate")
    model = copy.deepcopy(saved[1])
    args = hf.TrainingArguments(
        tmp_path, max_steps=12, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=1e-2, logging_steps=1, report_to="none", use_cpu=True, gradient_checkpointing=True,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = hf.Trainer(model, args, train_dataset=text_rows(), eval_dataset=text_rows())
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    curve = [step["loss"] for step in trainer.state.log_history if "loss" in step]
    assert curve[-1] < 0.7 * curve[0]
    trainer.save_model(tmp_path / "trained")
    ids = text_rows(1)[0]["input_ids"][None]
    ours = FlashSTU.from_pretrained(tmp_path / "trained").eval()
    assert torch.equal(ours(ids).logits, model.eval()(ids).logits)


def lora(peft):
    """The STU's matrices are parameters, not linear layers."""
    targets = {"target_modules": "all-linear", "target_parameters": ["mixer.M_inputs", "mixer.M_filters"]}
    return peft.LoraConfig(r=4, task_type="CAUSAL_LM", **targets)


def test_lora_reaches_every_matrix_and_merges(hf, saved):
    peft = pytest.importorskip("peft")
    base, ids = copy.deepcopy(saved[1]), text_rows(1)[0]["input_ids"][None]
    model = peft.get_peft_model(base, lora(peft))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 4 * 3 + 2 * 2 + 2 * 2
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        text = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
        merged = model.merge_and_unload()
        assert relative_error(merged(ids).logits, expected) < 1e-5
        assert torch.equal(merged.generate(ids, max_new_tokens=5, do_sample=False), text)


@pytest.mark.parametrize("kind", ["SFT", "packed SFT", "LoRA SFT", "DPO", "GRPO"])
def test_trl_trains_it(hf, saved, tmp_path, kind):
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
    from datasets import Dataset

    model = load(hf, saved[2])
    kind, trainer_class = kind.removesuffix(" SFT"), getattr(trl, f"{kind.split()[-1]}Trainer")
    arguments = {
        "max_steps": 5, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1,
        "report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True,
        "trust_remote_code": True,
    }  # fmt: skip
    text = ["the quick brown fox jumps over the lazy dog. " * n for n in (1, 2, 1, 1)] * 6
    rows, options = [{"text": t} for t in text], {}
    if kind == "packed":
        arguments |= {"packing": True, "max_length": 100}
    if kind == "LoRA":
        options = {"peft_config": lora(peft)}
    if kind == "DPO":
        rows = [{"prompt": "the quick ", "chosen": "brown fox", "rejected": "zzz"}] * 24
    if kind == "GRPO":
        rows, arguments = [{"prompt": t} for t in text], arguments | {"max_steps": 2, "num_generations": 4}
        arguments |= {"max_completion_length": 8}
        options = {"reward_funcs": lambda completions, **_: [float(len(set(text))) for text in completions]}
    config = getattr(trl, trainer_class.__name__.replace("Trainer", "Config"))(str(tmp_path), **arguments)
    trainer = trainer_class(model, args=config, train_dataset=Dataset.from_list(rows), **options)
    trained = [(p, p.detach().clone()) for p in trainer.model.parameters() if p.requires_grad]
    trainer.train()
    curve = [step["loss"] for step in trainer.state.log_history if "loss" in step]
    if kind != "GRPO":  # whose loss does not fall
        assert curve[-1] < 0.99 * curve[0]
    assert not any(torch.equal(*pair) for pair in trained)


def test_a_saved_tokenizer_has_our_tokens_and_the_pipeline_writes(hf, saved, tmp_path):
    model, _, folder = saved
    text = "héllo  wörld's\n\tdef f(x):  1234 日本 \x7f"
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([i]): i for i in range(256)}
    for piece in (b"th", b"he", b"the", b" t", b" the", b"in", b"ing", b"  ", b"12"):
        ranks[piece] = len(ranks)
    # as in o200k_base, the end of text does not directly follow the ranks
    tiny = prepare_data.TiktokenTokenizer.__new__(prepare_data.TiktokenTokenizer)
    pattern = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    special = {"<|endoftext|>": 280}
    tiny.encoding = tiktoken.Encoding("tiny", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    tiny.eot = 280
    prepare_data.save_tokenizer(tiny, tmp_path)
    for ours, place in ((tiny, tmp_path), (prepare_data.get_tokenizer("bytes"), folder)):
        theirs = hf.AutoTokenizer.from_pretrained(place, trust_remote_code=place == folder)
        for t in (text, "the thing in the  thesis 12345", ""):
            assert theirs(t).input_ids == ours.encode(t).tolist() and theirs.decode(theirs(t).input_ids) == t
        # special tokens are read in a text, as trl wants it, unless one asks for their letters
        assert theirs.eos_token_id == ours.eot and theirs("a<|endoftext|>").input_ids[-1] == ours.eot
        letters = theirs("a<|endoftext|>", split_special_tokens=True).input_ids
        assert letters == ours.encode("a<|endoftext|>").tolist()
        # padding is on the right and no end of text, so that a model learns the first token and the end
        assert theirs.pad_token_id not in (ours.eot, *ours.encode("".join(map(chr, range(1, 0xD800)))))
        batch = theirs(["a", "bc <|endoftext|>"], padding=True, return_tensors="pt")
        assert batch.attention_mask.tolist()[0][:2] == [1, 0]
        collate = hf.DataCollatorForLanguageModeling(theirs, mlm=False)
        assert collate([{"input_ids": batch.input_ids[1]}])["labels"][0, -1] == ours.eot
    pipe = hf.pipeline("text-generation", model=str(folder), trust_remote_code=True)
    prompts = ["def f", "import torch"]  # two lengths in one batch
    answers = pipe(prompts, batch_size=2, max_new_tokens=12, do_sample=False)
    for prompt, (answer,) in zip(prompts, answers, strict=True):
        ids = torch.tensor([list(prompt.encode())])
        expected = model.generate(ids, max_new_tokens=12, temperature=0, stop_token=0)[0].tolist()
        expected = bytes(b for b in expected if b).decode(errors="replace")
        # how many marks stand for bytes that are no letter differs between decoders
        assert re.sub("\ufffd+", "?", answer["generated_text"]) == re.sub("\ufffd+", "?", expected)


def test_lm_eval_measures_our_likelihoods(hf, saved, tmp_path):
    pytest.importorskip("lm_eval")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, _, folder = saved
    asked = ["Is 1 odd?", "Is 2?", "Is the sky green?"]
    questions = [{"q": q, "choices": ["yes", "no!"], "label": i % 2} for i, q in enumerate(asked)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (tmp_path / "t.yaml").write_text(f"""
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/q.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}} Answer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc}}]
""")
    lm = HFLM(pretrained=str(folder), trust_remote_code=True, device="cpu", batch_size=2, dtype="float32")
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    options = {"task_manager": tasks, "bootstrap_iters": 0, "log_samples": True}
    results, correct = lm_eval.simple_evaluate(lm, tasks=["tiny"], **options), 0
    for q, answer in zip(questions, sorted(results["samples"]["tiny"], key=lambda s: s["doc_id"])):
        scores = []
        for choice in q["choices"]:
            prompt = f"{q['q']} Answer:"
            ids = torch.tensor([list(f"{prompt} {choice}".encode())])
            log_p = model(ids[:, :-1]).logits.log_softmax(-1).gather(2, ids[:, 1:, None])
            scores.append(log_p[0, len(prompt) - 1 :].sum().item())
        assert [r[0][0] for r in answer["resps"]] == pytest.approx(scores, rel=1e-4)
        correct += scores.index(max(scores)) == q["label"]
    assert results["results"]["tiny"]["acc,none"] == pytest.approx(correct / 3)


# ------------------------------------------------------------------------------------------------------------
# lds.py: the system


def simulate(system, u):
    """h_t = A h_{t-1} + B u_t, y_t = C h_t, one step after another, in float64."""
    A, B, C, h0 = (p.detach().double() for p in (system.A, system.B, system.C, system.h0))
    A = torch.diag(A) if A.ndim == 1 else A
    h, y = h0.expand(len(u), -1), []
    for u_t in u.double().unbind(1):
        h = h @ A.T + u_t @ B.T
        y.append(h @ C.T)
    return torch.stack(y, dim=1)


@pytest.mark.parametrize("T", [1, 2, 37, 1500])
@pytest.mark.parametrize("diagonal", [True, False])
def test_a_system_equals_its_recurrence_whole_and_in_pieces(diagonal, T):
    system, u = LDS(12, 3, 2, diagonal=diagonal), torch.randn(4, T, 3)
    torch.nn.init.normal_(system.h0)
    y = simulate(system, u).float()
    assert relative_error(system(u), y) < 1e-5
    assert torch.allclose(system(u[0]), system(u)[0], atol=1e-6)  # unbatched
    assert relative_error(in_pieces(system, u, [T // 3, T // 2] if T > 5 else [])[0], y) < 1e-5


def test_every_part_of_a_dense_system_gets_its_gradient():
    system = LDS(5, 2, 3, dtype=torch.float64, diagonal=False)
    u = torch.randn(2, 9, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *p: system(u), tuple(system.parameters()))


def test_random_lds_has_the_poles_it_was_asked_for():
    sizes = {"state_dim": 400, "input_dim": 10, "output_dim": 5}
    system = random_LDS(**sizes, lower_bound=0.3, spectral_radius=0.9)
    size = system.A.detach().abs()
    assert size.max() == pytest.approx(0.9) and 0.3 <= size.min() < 0.35
    assert 100 < (system.A < 0).sum() < 300
    assert {name: getattr(system, name) for name in sizes} == sizes


# ------------------------------------------------------------------------------------------------------------
# lds.py: the learner


@pytest.mark.parametrize("L, K, hankel_L", [
    (1, 1, False), (40, 40, False), (128, 24, False), (128, 24, True), (1024, 64, False),
])  # fmt: skip
def test_white_filters_are_orthonormal_and_span_the_bank(L, K, hankel_L):
    phi = get_spectral_filters(L, K, hankel_L, dtype=torch.float64)
    white, bank = white_filters(phi, hankel_L), phi if hankel_L else both_signs(phi)
    w = 1 - torch.arange(L).double()[:, None] / L
    assert (white.T @ (w * white) - torch.eye(white.shape[1])).abs().max() < 1e-9
    rest = bank - white @ (white.T @ (w * bank))
    assert (w.sqrt() * rest).norm(dim=0).max() < 1e-4 * bank.norm(dim=0).max()


def test_white_input_gives_uncorrelated_features_of_unit_variance():
    white, x = white_filters(get_spectral_filters(64, 8)).float(), torch.randn(4000, 64, 1)
    features = convolve(x, white[:, None])  # [N, T, F]
    covariance = torch.einsum("ntf,ntg->fg", features, features) / features[..., 0].numel()
    assert (covariance - torch.eye(white.shape[1])).abs().max() < 0.05


@pytest.mark.parametrize("options", [{}, {"use_hankel_L": True}, {"backend": "lds"}], ids=str)
def test_ministu_equals_the_sum_of_its_filter_outputs(options):
    model = MiniSTU(seq_len=50, num_filters=10, input_dim=3, output_dim=2, **options)
    x = torch.randn(2, 50, 3)
    expected = convolve(x.double(), torch.einsum("tf,fio->tio", model.bank, model.stu.M.detach().double()))
    assert model(x).shape == (2, 50, 2) and (model(x) - expected).abs().max() < 1e-4
    assert torch.allclose(model(x[0]), model(x)[0], atol=1e-5)  # unbatched
    assert (model(x[:, :20]) - expected[:, :20]).abs().max() < 1e-4  # shorter than seq_len


def test_precomputed_filters_give_the_same_model():
    phi = get_spectral_filters(seq_len=128, K=24)
    given, own = MiniSTU(128, 24, 10, 5, precomputed_filters=phi), MiniSTU(128, 24, 10, 5)
    data = sample(random_LDS(20, 10, 5), 64, 128)
    x = torch.randn(2, 128, 10)
    assert relative_error(given.fit(*data)(x), own.fit(*data)(x)) < 1e-5


def ringing(degrees, radius=0.99):
    """A system of one input and one output, with the poles radius · e^(±iθ)."""
    system, (c, s) = LDS(2, 1, 1, diagonal=False), (f(math.radians(degrees)) for f in (math.cos, math.sin))
    system.A.data = radius * torch.tensor([[c, -s], [s, c]])
    return system


def test_decays_of_both_signs_are_learned_and_slow_ringing_is_not():
    def error(degrees, radius=0.99):
        system = ringing(degrees, radius)
        return unseen_error(MiniSTU(128, 24, 1, 1).fit(*sample(system, 64, 128)), system, 128)[1].item()

    assert error(0) < 1e-11 and error(180) < 1e-11
    assert error(1) < 1e-7 < error(5) < 1e-2 < error(20) and error(90) > 0.3
    assert error(20, radius=0.5) < 1e-11  # what has died away after a few steps may ring


def test_filters_of_a_sector_learn_what_rings_in_it_and_are_no_recurrence_of_decays():
    t = torch.arange(128, dtype=torch.float64)[:, None, None]
    gap = torch.logspace(-3, 0, 60, dtype=torch.float64)[:, None]  # 1 - α, against angles up to 20°
    angles = torch.linspace(0, math.radians(20), 16, dtype=torch.float64)
    G = torch.cat([gap * (1 - gap) ** t * wave(t * angles) for wave in (torch.cos, torch.sin)], dim=2)
    U, sigma, _ = torch.linalg.svd(G.flatten(1), full_matrices=False)
    options = {"precomputed_filters": U[:, :40] * sigma[:40].sqrt()}
    system, model = ringing(20), MiniSTU(128, 40, 1, 1, **options)
    data = sample(system, 64, 128)
    assert unseen_error(model.fit(*data), system, 128)[1] < 1e-10
    recurrent = MiniSTU(128, 40, 1, 1, backend="lds", **options).fit(*data)
    assert relative_error(recurrent(data[0]), model(data[0])) < 1e-5
    with pytest.raises(ValueError, match="filters that ring"):
        model.to_lds()


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
def test_the_mlp_acts_on_the_outputs_of_the_stu(activation):
    model = MiniSTU(
        seq_len=128, num_filters=24, input_dim=10, output_dim=5, use_hankel_L=False, use_mlp=True,
        mlp_hidden_dim=20, mlp_num_layers=2, mlp_dropout=0.1, mlp_activation=activation, dtype=torch.float32,
        device=None, backend="spectral",
    )  # fmt: skip
    assert [tuple(p.shape) for p in model.mlp.parameters()] == [(20, 5), (20,), (5, 20), (5,)]
    x = torch.randn(2, 128, 10)
    assert model(x).shape == (2, 128, 5) and not torch.equal(model(x), model(x))  # dropout
    model.eval()
    with torch.no_grad():
        assert torch.allclose(model(x), model.mlp(model.stu(x)))


@pytest.mark.parametrize("L, K, hankel_L", [
    (1024, 24, False), (128, 24, True), (1024, 64, False), (33, 33, False), (5, 2, False),
])  # fmt: skip
def test_the_recurrent_backend_agrees_and_trains(L, K, hankel_L):
    fft, lds = (
        MiniSTU(L, K, 6, 4, use_hankel_L=hankel_L, backend=backend) for backend in ("spectral", "lds")
    )
    lds.load_state_dict(fft.state_dict())
    x = torch.randn(2, L, 6)
    for a, b in zip(value_and_gradients(lds, x), value_and_gradients(fft, x)):
        assert relative_error(a, b) < 1e-3


def test_ministu_with_64_channels_runs_as_a_recurrence():
    sizes = {"seq_len": 1024, "num_filters": 24, "input_dim": 64, "output_dim": 64}
    model = MiniSTU(**sizes, backend="lds", dtype=torch.float32)
    assert model(torch.randn(1, 1024, 64)).shape == (1, 1024, 64)


@pytest.mark.parametrize("state_dim, L, sequences", [(20, 128, 128), (256, 1024, 16)])
def test_least_squares_finds_the_system(state_dim, L, sequences):
    system = random_LDS(state_dim, 10, 5)
    model = MiniSTU(L, 24, 10, 5).fit(*sample(system, sequences, L))
    mse, over_variance = unseen_error(model, system, L)
    assert mse < 1e-12 and over_variance < 1e-10


def test_least_squares_survives_inputs_that_do_not_vary():
    system, x = random_LDS(8, 3, 2), torch.randn(50, 64, 3)
    x[..., 1] = 0  # a channel never seen
    model = MiniSTU(64, 16, 3, 2).fit(x, system(x).detach())
    assert relative_error(model(x), system(x)) < 1e-4


def test_gradient_descent_finds_the_system():
    system = random_LDS(state_dim=20, input_dim=10, output_dim=5)
    options = {"num_steps": 400, "batch_size": 16, "learning_rate": 2e-3, "verbose": False}
    model, losses = train_stu_on_lds(system, seq_len=128, num_filters=24, **options)
    y = model(torch.randn(1, 128, 10))
    assert y.shape == (1, 128, 5) and len(losses) == 400 and not model.training
    assert unseen_error(model, system, 128)[0] < 1e-9  # far below 4.5e-4


def test_the_calls_of_the_published_package_work_as_they_are(tmp_path, capsys):
    """Its example script and its README, with only the import changed."""
    device = torch.device("cpu")
    system = random_LDS(state_dim=20, input_dim=10, output_dim=5, lower_bound=0.1, device=device)
    assert (system.dtype, system.device) == (torch.float32, device) and system.A.shape == (20,)
    model, losses = train_stu_on_lds(
        lds=system, seq_len=32, num_filters=8, num_steps=20, batch_size=8, learning_rate=1e-2, verbose=True
    )
    assert isinstance(losses, list) and losses[-1] < losses[0] and "20/20" in capsys.readouterr().out
    assert model.get_num_params() == sum(p.numel() for p in model.parameters())
    inputs = torch.randn(10, 32, 10, device=device, dtype=torch.float32)
    with torch.no_grad():
        for length in (16, 32):
            x = inputs[:, :length, :]
            assert model(x).shape == system(x).shape == (10, length, 5)
    plain = LDS(state_dim=20, input_dim=10, output_dim=5, dtype=torch.float64, device=None)
    assert plain(inputs).dtype == torch.float64 and plain.h0.shape == (20,) and not plain.h0.any()
    for module in (model, system):
        torch.save(module.state_dict(), tmp_path / "saved.pt")
        copy.deepcopy(module).load_state_dict(torch.load(tmp_path / "saved.pt"))


def test_arguments_that_other_packages_order_otherwise_are_refused_by_position():
    for call in (
        lambda: MiniSTU(32, 8, 4, 2, False),
        lambda: MiniSTU(32, 8, 4, 2, False, True),
        lambda: train_stu_on_lds(LDS(4, 3, 2), 32, 8, 10),
    ):
        with pytest.raises(TypeError, match="positional"):
            call()


def test_training_with_an_mlp_lowers_the_loss(capsys):
    _, losses = train_stu_on_lds(
        random_LDS(8, 4, 2), 32, 8, num_steps=60, batch_size=8, learning_rate=1e-2, verbose=True,
        use_mlp=True, mlp_hidden_dim=16, mlp_num_layers=3, mlp_dropout=0.0, mlp_activation="tanh",
    )  # fmt: skip
    assert np.mean(losses[-10:]) < 0.5 * losses[0]
    assert "60/60" in capsys.readouterr().out


@pytest.mark.parametrize("L, K, hankel_L", [(128, 24, False), (64, 20, True), (512, 32, False)])
def test_a_fitted_stu_is_a_linear_dynamical_system(L, K, hankel_L):
    model = MiniSTU(L, K, 4, 3, use_hankel_L=hankel_L).fit(*sample(random_LDS(20, 4, 3), 64, L))
    system, x = model.to_lds(), torch.randn(2, L, 4)
    assert system.A.ndim == 1 and system.A.abs().max() < 1
    assert system.B.shape == (len(system.A), 4) and system.C.shape == (3, len(system.A))
    scale = model(x).std()
    assert (system(x) - model(x)).abs().max() < 1e-3 * scale
    assert (simulate(system, x) - model(x)).abs().max() < 1e-3 * scale  # one step after another, too
    past = simulate(system, torch.randn(1, 20 * L, 4))[:, -L:]
    assert past.std() < 3 * scale  # and it stays sane past seq_len


# ------------------------------------------------------------------------------------------------------------
# lds.py: what it compares with


@pytest.mark.parametrize("make", [
    lambda: S4D(3, 2), lambda: Mamba2(3, 2), *(lambda k=k: stack(k, 4, 1.0, 3, 2, 16, 30) for k in "STAM"),
])  # fmt: skip
def test_baselines_are_causal_and_learn(make):
    model, x = make(), torch.randn(1, 30, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x)[0, 12].sum(), x)
    reach = gradient[0].abs().amax(-1)
    assert reach[13:].max() < 1e-5 * reach.max() and (reach[:13] > 0).all()
    system = random_LDS(4, 3, 2, spectral_radius=0.8)
    system.C.data *= 4
    losses = [loss for loss, _ in descend(model, lambda m: unseen_error(m, system, 30, 16), 80, 1e-2)]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


def test_mamba_2_equals_its_recurrence():
    layer, x = Mamba2(3, 2, d=8, N=4, H=2).double(), torch.randn(2, 20, 3, dtype=torch.float64)
    gate, v, dt = layer.encode(x).split(layer.sizes, dim=-1)
    padded = F.pad(v, (0, 0, 3, 0)).unfold(1, 4, 1)  # [B, T, channels, 4]
    v = F.silu((padded * layer.conv.weight[:, 0]).sum(-1) + layer.conv.bias)
    u, B, C = v.split([8, 4, 4], dim=-1)
    dt, h, y = F.softplus(dt + layer.dt), torch.zeros(2, 2, 4, 4, dtype=torch.float64), []
    for t in range(20):  # h [B, H, N, d / H]
        update = torch.einsum("bh,bn,bhd->bhnd", dt[:, t], B[:, t], u[:, t].unflatten(-1, (2, 4)))
        h = torch.exp(-dt[:, t] * layer.log_A.exp())[..., None, None] * h + update
        y.append(torch.einsum("bn,bhnd->bhd", C[:, t], h).flatten(1))
    expected = layer.decode((torch.stack(y, dim=1) + layer.D * u) * F.silu(gate))
    assert relative_error(layer(x), expected) < 1e-12


# ------------------------------------------------------------------------------------------------------------
# lds.py: the experiments


def run_lds(monkeypatch, flags):
    monkeypatch.setattr("sys.argv", ["lds.py", *flags.split()])
    lds_module.main()


@pytest.mark.parametrize("flags", ["--steps 0", "--steps 12", "--compare --steps 2 --batch-size 2"])
def test_the_demo_prints_and_draws(tmp_path, monkeypatch, capsys, flags):
    sizes = "--state-dim 6 --input-dim 3 --output-dim 2 --seq-len 24 --num-filters 6"
    run_lds(monkeypatch, f"{flags} {sizes} --out {tmp_path}/picture.png")
    printed = capsys.readouterr().out
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert "STU" in printed and "minutes" in printed.partition("step ")[0]  # the cost, before it starts
    assert ("Mamba-2" in printed) == ("--compare" in flags) and ("left" in printed) == (
        "--steps 0" not in flags
    )


def test_recall_prints_and_draws(tmp_path, monkeypatch, capsys):
    run_lds(monkeypatch, f"--recall --steps 5 --batch-size 4 --out {tmp_path}/picture.png")
    printed = capsys.readouterr().out
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert all(printed.count(name) >= 3 for name in ("hybrid", "STU", "attention", "right"))


def test_the_robot_is_simulated_once_and_predicted(tmp_path, monkeypatch, capsys):
    reason = 'needs pip install "gymnasium[mujoco]"'
    gymnasium = pytest.importorskip("gymnasium", reason=reason)
    pytest.importorskip("mujoco", reason=reason)
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as disk_full:
        disk_full.setattr(torch, "save", lambda rows, f: f.write(b"half") and 1 / 0)
        with pytest.raises(SystemExit, match="cannot write data/ant"):
            lds_module.ant_trajectories(3, 53, 0)
    states = lds_module.ant_trajectories(3, 53, 0)  # the half file is none
    assert states.shape == (3, 53, 35) and states.isfinite().all() and states[..., 27:].abs().max() <= 1
    monkeypatch.setattr(gymnasium, "make", None)
    run_lds(monkeypatch, "--ant --trajectories 3 --seq-len 52 --steps 2 --batch-size 2")
    printed = capsys.readouterr().out
    assert Path("ant.png").read_bytes().startswith(b"\x89PNG")
    assert all(
        name in printed for name in ("STU-T", "hybrid", "attention", "Mamba-2", "no change", "50 alone")
    )


@pytest.mark.parametrize("flags, message", [
    ("--ant", 'pip install "gymnasium[mujoco]"'),
    ("--ant --seq-len 50", "--seq-len >= 51"),
    ("--batch-size 0", "--batch-size >= 1"),
    ("--lower-bound 2", "lower_bound = 2.0"),
    ("--out nowhere/lds.png", "nowhere"),
])  # fmt: skip
def test_the_experiments_say_what_they_lack(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gymnasium", None)  # as if it were not installed
    monkeypatch.setattr("sys.argv", ["lds.py", *flags.split()])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(HERE / "lds.py"), run_name="__main__")
    assert message in f"{end.value}{capsys.readouterr().err}"


# ------------------------------------------------------------------------------------------------------------
# lds.py: bad input


def not_a_number(*shape):
    x = torch.zeros(shape)
    x[..., 0] = math.nan
    return x


@pytest.mark.parametrize("make, message", [
    (lambda: MiniSTU(8, 9, 3, 2), "9 filters for length 8"),
    (lambda: MiniSTU(8, 0, 3, 2), "num_filters"),
    (lambda: MiniSTU(8, 4, 3, 2, backend="scan"), "backend"),
    (lambda: MiniSTU(8, 4, 3, 2, use_mlp=True, mlp_activation="swish"), "relu, gelu, tanh"),
    (lambda: MiniSTU(8, 4, 3, 2, use_mlp=True, mlp_num_layers=0), "mlp_num_layers"),
    (lambda: MiniSTU(8, 4, 3, 2, precomputed_filters=torch.ones(7, 4)), r"\[8, 4\]"),
    (lambda: MiniSTU(8, 4, 3, 2)(torch.ones(1, 8, 4)), "length >= 1, 3"),
    (lambda: MiniSTU(8, 4, 3, 2)(torch.ones(1, 9, 3)), "longer than seq_len = 8"),
    (lambda: MiniSTU(8, 4, 3, 2)(not_a_number(1, 8, 3)), "8 NaN"),
    (lambda: MiniSTU(8, 4, 3, 2).fit(torch.ones(2, 8, 3), not_a_number(2, 8, 2)), "targets holds 16 NaN"),
    (lambda: MiniSTU(8, 4, 3, 2).fit(torch.ones(2, 8, 3), torch.ones(2, 7, 2)), "equally many"),
    (lambda: MiniSTU(8, 4, 3, 2, use_mlp=True).fit(torch.ones(2, 8, 3), torch.ones(2, 8, 2)), "descent"),
    (lambda: MiniSTU(8, 4, 3, 2, use_mlp=True).to_lds(), "use_mlp"),
    (lambda: LDS(0, 3, 2), "at least 1"),
    (lambda: LDS(4, 3, 2)(torch.ones(1, 8, 4)), "length >= 1, 3"),
    (lambda: random_LDS(4, 3, 2, lower_bound=2.0), "lower_bound = 2.0"),
    (lambda: random_LDS(4, 3, 2, spectral_radius=1.5), "spectral_radius = 1.5"),
    (lambda: train_stu_on_lds(random_LDS(4, 3, 2), 8, 4, learning_rate=-1), "learning_rate"),
])  # fmt: skip
def test_lds_says_what_is_wrong_with_its_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_training_that_diverges_says_so():
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        train_stu_on_lds(random_LDS(4, 3, 2), 32, 8, num_steps=20, learning_rate=1e30, verbose=False)


# ------------------------------------------------------------------------------------------------------------
# prepare_data.py


def read_split(folder, split):
    meta, opened = prepare_data.open_data(folder, full=True)
    shards = opened[split]
    assert sum(map(len, shards)) == meta[split]["tokens"]
    return np.concatenate(shards)


def same_splits(a, b):
    return all(np.array_equal(read_split(a, split), read_split(b, split)) for split in ("train", "val"))


def documents_in(folder, split):
    """The texts of a split of bytes."""
    data = read_split(folder, split).astype(np.uint8).tobytes()
    assert data.endswith(b"\0")
    return data[:-1].decode().split("\0")


def write_documents(folder, n, words):
    rng = random.Random(1)
    folder.mkdir()
    for i in range(n):
        text = " ".join(rng.choices(["alpha", "beta", "γ", "def f(x):", "\n", "1234"], k=words)) + f" {i}"
        (folder / f"{i:03}.txt").write_text(text, encoding="utf-8")
        yield text


def test_the_default_data_is_the_standard_library(tmp_path):
    meta = prepare_data.prepare(out=tmp_path)
    assert meta["vocab_size"] == 256 and meta["train"]["tokens"] > 3e6
    assert b"def " in read_split(tmp_path, "val")[:100000].astype(np.uint8).tobytes()


def test_shards_hold_every_document_once_and_the_splits_share_none(tmp_path):
    docs, out = tmp_path / "docs", tmp_path / "out"
    texts = list(write_documents(docs, 600, 10))
    (docs / "copy.txt").write_text(texts[0], encoding="utf-8")  # a duplicate falls on its twin's side
    (docs / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    meta = prepare_data.prepare([str(docs)], out, val_fraction=0.3, shard_tokens=5000)
    train, val = (documents_in(out, split) for split in ("train", "val"))
    assert sorted(train + val) == sorted(texts + texts[:1]) and not set(train) & set(val) and val
    assert len(meta["train"]["shards"]) > 1


def test_one_long_text_is_cut_at_nine_tenths(tmp_path, capsys):
    (tmp_path / "book.txt").write_text("abcdefghij" * 1000)
    prepare_data.prepare([str(tmp_path / "book.txt")], tmp_path)
    assert "9,001 tokens to train" in capsys.readouterr().err
    assert len(read_split(tmp_path, "train")) == 9001 and len(read_split(tmp_path, "val")) == 1001


@pytest.mark.parametrize("name", ["texts.jsonl.gz", "texts.parquet"])
def test_compressed_records_give_the_same_shards_as_jsonl(tmp_path, name):
    texts = [f"document {i}\n" * 5 for i in range(50)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "texts.jsonl").write_text(lines)
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress(lines.encode()))
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(sys.modules["pyarrow"].table({"text": texts}), tmp_path / name)
    for source, out in (("texts.jsonl", "plain"), (name, "compressed")):
        prepare_data.prepare([str(tmp_path / source)], tmp_path / out, val_fraction=0.3)
    assert same_splits(tmp_path / "plain", tmp_path / "compressed")


def interrupt(write, monkeypatch, **options):
    """A preparation that dies before it writes its file number `write`, half of which is there."""
    real, written = prepare_data.write_atomically, []

    def dying(path, content):
        written.append(path)
        if len(written) == write:
            path.with_name(path.name + ".tmp").write_bytes(b"half a file")
            raise KeyboardInterrupt
        real(path, content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_data, "write_atomically", dying)
        prepare_data.prepare(**options)


@pytest.mark.parametrize("write", [1, 3, 8])
def test_an_interrupted_preparation_continues_to_the_same_shards(tmp_path, monkeypatch, write):
    docs, whole, broken = tmp_path / "docs", tmp_path / "whole", tmp_path / "broken"
    assert len(list(write_documents(docs, 700, 20))) == 700
    options = {"sources": [str(docs)], "val_fraction": 0.3, "shard_tokens": 10000}
    prepare_data.prepare(out=whole, **options)
    assert max(map(len, prepare_data.open_data(whole)[1]["train"])) < 10500
    interrupt(write, monkeypatch, out=broken, **options)
    if write > 3:  # a shard of each split, then meta.json
        with pytest.raises(SystemExit, match="not complete:  python prepare_data.py"):
            prepare_data.open_data(broken)
        assert json.loads((broken / "meta.json").read_text())["train"]["tokens"] > 5000
    prepare_data.prepare(out=broken, **options)
    assert same_splits(broken, whole)


@pytest.mark.parametrize("change, name", [
    (lambda docs: (docs / "000a.txt").write_text("new"), "000a.txt"),
    (lambda docs: (docs / "001.txt").unlink(), "001.txt"),
    (lambda docs: (docs / "002.txt").open("a").write("more"), "002.txt"),
    (lambda docs: (docs / "003.txt").rename(docs / "last.txt"), "003.txt"),
    (lambda docs: os.utime(docs / "699.txt", (1, 1)), "699.txt"),
])  # fmt: skip
def test_a_source_that_has_changed_is_refused_by_name(tmp_path, monkeypatch, change, name):
    docs = tmp_path / "docs"
    assert len(list(write_documents(docs, 700, 20))) == 700
    options = {"sources": [str(docs)], "shard_tokens": 10000}
    interrupt(8, monkeypatch, out=tmp_path / "half", **options)
    prepare_data.prepare(out=tmp_path / "whole", **options)
    change(docs)
    for out in tmp_path.glob("[hw]*"):
        before = (out / "meta.json").read_bytes()
        with pytest.raises(SystemExit, match=name):
            prepare_data.prepare(out=out, **options)
        assert (out / "meta.json").read_bytes() == before


def test_a_folder_gives_its_visible_text_once_and_says_what_is_left_out(tmp_path, capsys):
    docs, out = tmp_path / "docs", tmp_path / "docs" / "out"
    texts = list(write_documents(docs, 200, 10))
    records = b'\xef\xbb\xbf{"text": "capitals"}\n\n'
    for text, name in ((codecs.BOM_UTF8 + b"bom", "bom.TXT"), ("é".encode("utf-16"), "utf16.txt"),
                       (records, "a.JSONL"), (b"\xff\xfe\xff\xd8", "picture"), (b"a\0b", "zeros")):  # fmt: skip
        (docs / name).write_bytes(text)
    (docs / "x.jsonl").mkdir()
    (docs / "x.jsonl" / "file").write_text("in a folder")
    for hidden in (".git", ".ipynb_checkpoints"):
        (docs / hidden).mkdir()
        (docs / hidden / "config").write_text("hidden")
    for link, target in (("loop", "."), ("dead", "nowhere"), ("self", "self"), ("again", "000.txt")):
        (docs / link).symlink_to(target)
    texts += ["bom", texts[0], "capitals", "in a folder"]  # a link to a file is a file
    for again in ("first", "second"):  # the second finds the first one's output folder in the source
        prepare_data.prepare([str(docs), str(docs / "001.txt")], out / again)
        found = documents_in(out / again, "train") + documents_in(out / again, "val")
        assert sorted(found) == sorted(texts)
    told = capsys.readouterr().err
    for line in ("2: hidden", "4: linked folders", "5: linked folders", "3: no UTF-8 text"):
        assert f"left out {line}" in told, told
    with pytest.raises(SystemExit, match="cannot be a source"):
        prepare_data.prepare([str(docs)], docs)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_one_bad_record_does_not_end_a_corpus(tmp_path, capsys, kind):
    texts = [f"document {i}\n" * 5 for i in range(300)]
    if kind == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(sys.modules["pyarrow"].table({"text": [None, *texts]}), tmp_path / "a.parquet")
    else:
        bad = ['{"text": null}', '{"text": 5}', "{}", "[" * 10**5, '{"text": "cut', "\udcff", "[1]"]
        lines = [json.dumps({"text": text}) for text in texts]
        whole = "\n".join([*bad, *lines, '{"text": "a\\ud800\\u0000b"}'])
        (tmp_path / "a.jsonl").write_bytes(whole.encode(errors="surrogateescape"))
    prepare_data.prepare([str(tmp_path / f"a.{kind}")], tmp_path / "out")
    found = documents_in(tmp_path / "out", "train") + documents_in(tmp_path / "out", "val")
    assert sorted(found) == sorted(texts)
    n = 8 if kind == "jsonl" else 1
    told = f"left out {n}: no UTF-8 text, or none in the field 'text' ({tmp_path}/a.{kind}, record "
    assert told in capsys.readouterr().err


def test_few_texts_always_give_a_validation_split(tmp_path):
    for n in (1, 2, 20, 150):
        for seed in range(10):
            texts = [f"{seed} {i} " * 90 for i in range(n)]
            (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
            meta = prepare_data.prepare([str(tmp_path / "texts.jsonl")], tmp_path / f"{n}_{seed}")
            share = meta["val"]["tokens"] / (meta["train"]["tokens"] + meta["val"]["tokens"])
            assert 0.09 < share < 0.11


def damage_shard(change):
    def damage(folder):
        path = folder / "train_00000.npy"
        np.save(path, change(np.load(path)))

    return damage, "train_00000.npy"


def damage_meta(**changes):
    def damage(folder):
        meta = json.loads((folder / "meta.json").read_text()) | changes
        (folder / "meta.json").write_text(json.dumps(meta))

    return damage, "meta.json"


@pytest.mark.parametrize("damage, name", [
    *(damage_shard(lambda a, kind=kind: a.astype(kind)) for kind in ("f8", ">u2")),
    damage_shard(lambda a: a[::-1].copy()), damage_shard(lambda a: a[:-1]), damage_shard(lambda a: a[None]),
    damage_shard(lambda a: a + np.uint16(300)), (lambda out: (out / "val_00000.npy").unlink(), "val_00000"),
    (lambda out: os.truncate(out / "val_00000.npy", 500), "val_00000"),
    (lambda out: (out / "val_00000.npy").open("a").write("x"), "val_00000"),
    damage_meta(vocab_size=100), damage_meta(train={}),
    (lambda out: (out / "meta.json").write_text('{"sources": '), "meta.json"),
    (lambda out: (out / "meta.json").write_text("[" * 10**5), "meta.json"),
    (lambda out: (out / "meta.json").write_bytes(b"\xff"), "meta.json"),
    (lambda out: (out / "meta.json").unlink(), "not complete"),
])  # fmt: skip
def test_a_damaged_data_folder_is_named_with_the_remedy(tmp_path, damage, name):
    (tmp_path / "a.txt").write_text("hello world\n" * 1000)
    prepare_data.prepare([str(tmp_path / "a.txt")], tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(SystemExit, match=f"{name}.*(prepare it again|prepare_data.py)"):
        prepare_data.open_data(tmp_path / "out")


def test_a_sample_of_a_large_shard_is_checked_at_every_start_and_all_of_it_on_request(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "BLOCK", 16)
    (tmp_path / "a.txt").write_text("hello world\n" * 1000)
    prepare_data.prepare([str(tmp_path / "a.txt")], tmp_path / "out")
    path, refused = tmp_path / "out" / "train_00000.npy", 0
    good = path.read_bytes()
    for place in random.sample(range(len(good)), 40) + [0, len(good) - 1]:
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(SystemExit, match="train_00000"):
            prepare_data.open_data(tmp_path / "out", full=True)
        try:
            prepare_data.open_data(tmp_path / "out")
        except SystemExit:
            refused += 1
    assert 1 <= refused < 42


def test_a_folder_has_one_owner_until_its_process_ends(tmp_path, monkeypatch):
    out = tmp_path / "out"
    hold = f"import prepare_data as p; owner = p.lock({str(out)!r}); print('owned', flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    owner = subprocess.Popen([sys.executable, "-c", hold], cwd=HERE, **pipes)
    assert owner.stdout.readline() == b"owned\n"
    (tmp_path / "a.txt").write_text("hello world\n" * 1000)
    with pytest.raises(SystemExit, match=f"{out} is in use by process {owner.pid}"):
        prepare_data.prepare([str(tmp_path / "a.txt")], out)
    threading.Timer(0.5, owner.kill).start()
    monkeypatch.setattr(prepare_data, "find_files", lambda *_: {str(tmp_path / "a.txt"): [1, 1]})
    meta = prepare_data.prepare(out=out)  # the default data is waited for
    monkeypatch.undo()
    assert prepare_data.prepare(out=out) == meta  # and what is ready is good, whatever Python is there today
    with pytest.raises(SystemExit, match="was made with file"):
        prepare_data.prepare(["stdlib"], out)


@pytest.mark.parametrize("obstacle, out", [
    ("a file", "a file/out"), ("a file", "a file"), ("out/meta.json/", "out"),
    ("out/train_00000.npy/", "out"),
    ("out/train_00000.npy.tmp/", "out"), ("out/.flash_stu.lock/", "out"), ("a file", "/proc/nothing"),
])  # fmt: skip
def test_an_output_that_cannot_be_written_is_a_sentence(tmp_path, obstacle, out):
    path = tmp_path / obstacle
    path.mkdir(parents=True) if obstacle.endswith("/") else path.write_text("x")
    (tmp_path / "a.txt").write_text("hello world\n" * 1000)
    with pytest.raises(SystemExit, match="cannot (write|use)"):
        prepare_data.prepare([str(tmp_path / "a.txt")], tmp_path / out)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    def full_disk(f):
        f.write(b"half")
        raise OSError("No space left on device")

    (tmp_path / "file").write_text("old")
    with pytest.raises(SystemExit, match="cannot write .*file: No space left .* is intact"):
        prepare_data.write_atomically(tmp_path / "file", full_disk)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_long_document_in_pieces_has_the_tokens_of_the_whole():
    words = ["word ", "x\n", "\n\n  y", "if a:\n", "\ndef", ";\n//c", "é\r\n", " 12"]
    text = "".join(random.choices(words, k=60000))
    pieces = prepare_data.PIECE.findall(text)
    assert len(pieces) > 10 and "".join(pieces) == text
    try:
        tokenizer = prepare_data.get_tokenizer("o200k_base")
    except SystemExit:
        pytest.skip("the o200k_base ranks are not on this machine (no network, no TIKTOKEN_CACHE_DIR)")
    tokens = tokenizer.encode(text)
    assert np.array_equal(np.concatenate([tokenizer.encode(piece) for piece in pieces]), tokens)
    assert tokenizer.decode(tokens.tolist()) == text
    spaces = f"x{' ' * 10**6}y"  # on which tiktoken gives up
    pieces = prepare_data.PIECE.findall(spaces)
    assert tokenizer.decode(np.concatenate([tokenizer.encode(piece) for piece in pieces]).tolist()) == spaces
    some = tokenizer.decode(range(199_990, tokenizer.n_vocab))  # 199998, and others, are no token's
    assert "<|endofprompt|>" in some and tokenizer.decode([199_998, *tokens.tolist()]) == text


def test_a_folder_with_other_data_is_left_alone(tmp_path):
    (tmp_path / "a.txt").write_text("hello world " * 100)
    prepare_data.prepare([str(tmp_path / "a.txt")], tmp_path)
    before = read_split(tmp_path, "train")
    with pytest.raises(SystemExit, match="choose another --out"):
        prepare_data.prepare([str(tmp_path / "a.txt")], tmp_path, val_fraction=0.5)
    assert np.array_equal(read_split(tmp_path, "train"), before)


def test_hub_corpora_are_files_that_their_library_fetches(tmp_path, monkeypatch):
    texts = [f"story {i}\n" * 9 for i in range(300)]
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (tmp_path / "files" / "README.md").write_text("not asked for")
    fetched = []
    hub = types.SimpleNamespace(snapshot_download=lambda *a, **k: fetched.append((a, k)) or tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(prepare_data.HUB, "tinystories", ("owner/name", "files/*.jsonl"))
    prepare_data.prepare(["tinystories"], tmp_path / "out")
    assert fetched == [(("owner/name",), {"repo_type": "dataset", "allow_patterns": "files/*.jsonl"})]
    train, val = (documents_in(tmp_path / "out", split) for split in ("train", "val"))
    assert sorted(train + val) == sorted(texts) and 10 < len(val) < 60


@pytest.mark.parametrize("content, name, message", [
    (b"caf\xe9 " * 10**6, "a.txt", "no UTF-8 text.*a.txt.*not enough text"), (b"", "a.txt", "not enough text"),
    (b'{"txt": "x"}\n{"text": ', "a.jsonl", "left out 2: .*a.jsonl, record 1.*not enough text"),
    (b"not gzip", "a.jsonl.gz", "a.jsonl.gz"), (gzip.compress(b"{}", mtime=0)[:-9], "a.jsonl.GZ", "end-of-stream"),
    (b"PAR1", "a.parquet", "a.parquet"), (None, "missing.txt", "no file or folder"), (None, "", "no file or"),
])  # fmt: skip
def test_preparation_says_what_is_wrong_and_writes_nothing(tmp_path, capsys, content, name, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as error:
        prepare_data.prepare([str(tmp_path / name) if name else ""], tmp_path / "out")
    told = capsys.readouterr().err + str(error.value)
    assert re.search(message, told, re.DOTALL) and len(told) < 700, told[:2000]
    assert not list((tmp_path / "out").glob("[!.]*"))


def test_unknown_tokenizers_are_refused():
    with pytest.raises(SystemExit, match="bytes, gpt2 or o200k_base"):
        prepare_data.get_tokenizer("bpe")


# ------------------------------------------------------------------------------------------------------------
# train.py
#
# A run is `python train.py`, or torchrun, in a process of its own. Most of its time would go into
# imports: a server makes them once, and each run is forked from there.

TINY = """--n_embd 32 --n_layers 2 --n_heads 2 --seq_len 32 --window_size 16 --num_eigh 8
    --batch_size 8 --eval_sequences 8 --log_interval 1"""
fork = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
preload = ["torch._dynamo", "torch.distributed.checkpoint", "matplotlib.figure", __name__]
fork.set_forkserver_preload(preload)
outputs = tempfile.TemporaryDirectory()  # what the runs print


def run_script(
    argv,
    output,
    environment,
    max_file_size=None,
    encoding="utf-8",
    closed_pipe=False,
    clock_stands_still=False,
    extra_modules=None,
):
    """In the new process: what `python argv...` does. It prints to the file `output`, or to a pipe
    that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(output, "w") as file:
        for stream in 1, 2:
            os.dup2(writer if closed_pipe else file.fileno(), stream)
    sys.stdout = open(1, "w", encoding=encoding)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding=encoding)  # noqa: SIM115
    os.chdir(HERE)
    os.environ.update(environment)
    torch.set_num_threads(1)
    if max_file_size is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_size, max_file_size))
    if clock_stands_still:
        time.perf_counter = float
    if extra_modules:
        sys.path.insert(0, str(extra_modules))
    sys.argv = argv
    try:
        if argv[0] == "train.py":
            runpy.run_path("train.py", run_name="__main__")
        else:
            runpy.run_module("torch.distributed.run", run_name="__main__")
    except Exception:  # noqa: BLE001
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    lines = [f"line {i}: the quick brown fox\n" for i in range(3000)]
    (folder / "text.txt").write_text("".join(lines))
    prepare_data.prepare([str(folder / "text.txt")], folder / "tokens")
    return folder / "tokens"


def start(data, out, flags, processes=1, torchrun=0, sizes=TINY, **limits):
    """Start a run, of several processes as torchrun starts them or by it; `finish` waits for it.
    Without `data` the command does not name any."""
    argv = ["train.py", "--device", "cpu", "--out_dir", str(out)]  # bit for bit: on the CPU
    if data:
        argv += ["--data", str(data)]
    argv += sizes.split()
    argv += flags.split() if isinstance(flags, str) else flags
    if torchrun:
        argv = ["torchrun", "--standalone", f"--nproc_per_node={torchrun}", *argv]
    with socket.create_server(("localhost", 0)) as server:
        network = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(server.getsockname()[1])}
    output = f"{outputs.name}/{time.monotonic_ns()}"
    runs = []
    for rank in range(processes):
        environment = {}
        if processes > 1:
            environment = {"RANK": str(rank), "WORLD_SIZE": str(processes), **network}
        args = (argv, f"{output}_{rank}", environment)
        runs.append(fork.Process(target=run_script, args=args, kwargs=limits, daemon=True))
        runs[-1].start()
    runs[0].output = Path(f"{output}_0")
    runs[0].others = runs[1:]
    return runs[0]


def finish(run):
    """-> exit code, everything that the main process printed"""
    for process in (run, *run.others):
        process.join(timeout=300)
    codes = {process.exitcode for process in (run, *run.others)}
    return codes.pop() if len(codes) == 1 else codes, run.output.read_text(errors="replace")


def run_train(*args, **kwargs):
    return finish(start(*args, **kwargs))


def logged(out, key="loss"):
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [record[key] for record in records if key in record]


def checkpoints(out):
    """The steps of the checkpoints, ascending."""
    names = [re.fullmatch(r"checkpoint_([1-9]\d*)\.pt", path.name) for path in out.iterdir()]
    return sorted(int(name[1]) for name in names if name)


def load_step(out, step):
    return torch.load(out / f"checkpoint_{step}.pt", weights_only=True)


def weights_are_equal(one, other):
    return all(torch.equal(one["model"][name], other["model"][name]) for name in other["model"])


def files_of(folder):
    """{name: content} of all files below a folder, but for its lock."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def trained(data):
    """A run of 4 steps, with checkpoints of steps 2 and 4."""
    code, output = run_train(data, data.parent / "trained", "--steps 4 --eval_interval 2")
    assert code == 0, output
    return data.parent / "trained"


def test_every_engine_and_accumulation_give_one_loss_curve(data, tmp_path):
    flags = "--steps 6 --eval_interval 3"
    several = f"{flags} --micro_batch_size 3"
    runs = {
        "one": start(data, tmp_path / "one", flags),
        "ddp": start(data, tmp_path / "ddp", several, processes=2),
        "fsdp": start(data, tmp_path / "fsdp", f"{several} --engine fsdp", processes=2),
        "less memory": start(
            data, tmp_path / "less memory", f"{several} --use_gradient_checkpointing"
        ),
    }
    for run in runs.values():
        code, output = finish(run)
        assert code == 0, output
    curves = {name: logged(tmp_path / name) + logged(tmp_path / name, "val_loss") for name in runs}
    for name, curve in curves.items():
        assert curve == pytest.approx(curves["one"], rel=1e-5), name
    assert curves["one"][-1] < curves["one"][0]


def test_a_checkpoint_of_several_processes_goes_on_as_one_process_would(data, tmp_path):
    whole = start(data, tmp_path / "one", "--steps 6 --eval_interval 3 --min_lr 1")
    engines = {"ddp": 2, "fsdp": 2}
    for engine, processes in engines.items():
        flags = f"--steps 3 --eval_interval 3 --min_lr 1 --engine {engine}"
        code, output = run_train(data, tmp_path / engine, flags, processes)
        assert code == 0, output
    assert finish(whole)[0] == 0
    for engine in engines:
        code, output = run_train(None, tmp_path / engine, "--steps 6", sizes="")
        assert code == 0 and "after step 3" in output, output
        curve = logged(tmp_path / "one")
        assert logged(tmp_path / engine) == pytest.approx(curve, rel=1e-5), engine


def test_muon_is_that_of_torch_up_to_its_rounding_to_16_bits(data, tmp_path, monkeypatch):
    flags = f"--data {data} --out_dir {tmp_path / 'run'} --steps 1 --device cpu {TINY}"
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    for signum in (signal.SIGTERM, signal.SIGINT):
        monkeypatch.setattr(signal, "signal", lambda *_: None)
    Muon = runpy.run_path("train.py")["Muon"]
    shapes = [(24, 8), (8, 24), (24, 8), (16, 16)]
    ours = [torch.randn(shape, requires_grad=True) for shape in shapes]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    options = {"lr": 0.02, "weight_decay": 0.1}
    groups = [{"params": [ours[0], ours[2]]}, {"params": [ours[1]]}, {"params": [ours[3]]}]
    optimizers = [Muon(groups, options), torch.optim.Muon(theirs, **options)]
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        before = [q.detach().clone() for q in theirs]
        for optimizer in optimizers:
            optimizer.step()
        for p, q, b in zip(ours, theirs, before):
            assert (p - q).norm() < 0.02 * (q - b).norm()
            p.data.copy_(q.data)


def test_a_run_from_before_muon_had_groups_goes_on(data, trained, tmp_path):
    """torch.optim.Muon kept all matrices in one group, with settings of its own."""
    old = tmp_path / "old"
    shutil.copytree(trained, old)
    saved = load_step(old, 4)
    groups = saved["optimizer"]["param_groups"]
    adamw = [group for group in groups if "betas" in group]
    muon = [group for group in groups if "betas" not in group]
    names = [name for group in muon for name in group["params"]]
    one = {"params": names, "lr": 0.1, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True}
    saved["optimizer"]["param_groups"] = [*adamw, one]
    del saved["tokenizer"], saved["data_checksum"]
    torch.save(saved, old / "checkpoint_4.pt")
    new = tmp_path / "new"
    shutil.copytree(trained, new)
    runs = [start(None, out, "--steps 6", sizes="") for out in (old, new)]
    for run in runs:
        code, output = finish(run)
        assert code == 0 and "after step 4" in output, output
    assert weights_are_equal(load_step(old, 6), load_step(new, 6))


def test_a_run_killed_anywhere_ends_bit_equal_to_one_that_was_not(data, tmp_path):
    flags = "--steps 60 --eval_interval 5 --dropout 0.1"
    out = tmp_path / "killed"
    whole = start(data, tmp_path / "whole", flags)

    def steps():
        return len(logged(out)) if (out / "log.jsonl").exists() else 0

    def is_writing():
        return steps() >= 24 and any(out.glob("*.tmp"))

    for is_due in (lambda: steps() >= 13, is_writing, lambda: steps() >= 41):
        run = start(data, out, flags)
        while run.exitcode is None and not is_due():
            time.sleep(0.0005)
        run.kill()
        assert finish(run)[0] == -signal.SIGKILL
    code, output = run_train(None, out, "", sizes="")  # the folder is enough
    assert code == 0 and "continuing" in output and finish(whole)[0] == 0, output
    assert weights_are_equal(load_step(out, 60), load_step(tmp_path / "whole", 60))
    for key in ("step", "loss", "val_loss"):
        assert logged(out, key) == logged(tmp_path / "whole", key) and logged(out, key)


def test_sigterm_saves_and_a_run_folder_has_one_owner(data, tmp_path):
    forever = "--steps 100000 --eval_interval 10"
    out = tmp_path / "run"
    run = start(data, out, forever)
    while not (out.exists() and checkpoints(out)):
        assert run.exitcode is None
        time.sleep(0.01)
    code, output = run_train(data, out, forever)
    assert code == 1 and f"{out} is in use by process {run.pid}\n" in output, output
    run.terminate()
    code, output = finish(run)
    assert code == 0 and "stopped after step" in output, output
    saved = checkpoints(out)[-1]
    code, output = run_train(None, out, f"--steps {saved + 3}", sizes="")
    assert code == 0 and f"after step {saved}\n" in output, output


def test_processes_whose_torchrun_is_dead_save_and_end(data, tmp_path):
    out = tmp_path / "run"
    run = start(data, out, "--steps 100000 --eval_interval 10", torchrun=2)
    while not (out.exists() and checkpoints(out)):
        assert run.exitcode is None
        time.sleep(0.01)
    run.kill()
    finish(run)
    for _ in range(600):  # until they let the folder go
        try:
            return prepare_data.lock(out).close()
        except SystemExit:
            time.sleep(0.1)
    raise AssertionError("they go on for ever")


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(data, trained, tmp_path):
    good = (trained / "checkpoint_4.pt").read_bytes()
    middle = len(good) // 2
    damaged = {
        "cut_off": good[:2000],
        "empty": b"",
        "zeros": good[:middle] + bytes(4096) + good[middle + 4096 :],
    }
    runs = {}
    for name, content in damaged.items():
        out = tmp_path / name
        shutil.copytree(trained, out)
        (out / "checkpoint_4.pt").write_bytes(content)
        runs[out] = start(None, out, "--steps 5", sizes="")
    for out, run in runs.items():
        code, output = finish(run)
        assert code == 0 and f"{out / 'checkpoint_4.pt'} is damaged" in output, output
        assert "after step 2\n" in output and logged(out, "step")[-2:] == [5, 5]


def test_what_cannot_be_read_or_is_not_ours_is_never_replaced(data, trained, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    for name in ("checkpoint_best.pt", "checkpoint_2_keep.pt"):
        (out / name).write_text("mine")
    (out / "checkpoint_9.pt").symlink_to("checkpoint_9.pt")  # a loop: no system can read it
    before = files_of(out)
    code, output = run_train(data, out, "--steps 10")
    assert code == 1 and "checkpoint_9.pt" in output, output
    (out / "checkpoint_9.pt").unlink()
    for step in 2, 4:
        (out / f"checkpoint_{step}.pt").write_bytes(b"damaged")
    code, output = run_train(data, out, "--steps 10")
    assert code == 1 and "no checkpoint in" in output and "--fresh" in output, output
    after = files_of(out)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"checkpoint_2.pt", "checkpoint_4.pt"}


def test_a_fresh_run_leaves_the_old_one_whole(data, trained, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    before = files_of(out)
    run = start(data, out, "--fresh --steps 100000 --eval_interval 100000 --n_layers 1")
    while not (run.output.exists() and "step 3/" in run.output.read_text()):
        assert run.exitcode is None
        time.sleep(0.01)
    run.kill()
    finish(run)
    (old,) = tmp_path.glob("run.*")
    assert files_of(old) == before
    code, output = run_train(data, out, "--steps 3 --n_layers 1 --eval_interval 3")
    assert code == 0 and checkpoints(out) == [3] and logged(out, "step") == [0, 1, 2, 3, 3], output
    code, output = run_train(None, old, "--steps 6", sizes="")
    assert code == 0 and "after step 4" in output, output


def test_what_cannot_be_written_leaves_what_was(data, trained, tmp_path):
    disk, log = tmp_path / "disk", tmp_path / "log"
    for out in (disk, log):
        shutil.copytree(trained, out)
    good = (disk / "checkpoint_4.pt").read_bytes()
    forever = start(None, log, "--steps 100000 --eval_interval 100000", sizes="")
    while len(logged(log)) < 20:
        assert forever.exitcode is None
        time.sleep(0.01)
    (tmp_path / "full").symlink_to("/dev/full")
    os.replace(tmp_path / "full", log / "log.jsonl")
    runs = {
        "cannot write": start(None, disk, "--steps 6", sizes="", max_file_size=50000),
        "No space left": forever,
        "cannot write to": start(data, trained / "log.jsonl" / "run", "--steps 6"),
    }
    for message, run in runs.items():
        code, output = finish(run)
        assert code == 1 and message in output, output
    assert (disk / "checkpoint_4.pt").read_bytes() == good and checkpoints(disk) == [2, 4]
    assert run_train(None, disk, "--steps 6", sizes="")[0] == 0


def test_nothing_that_is_printed_ends_a_run(data, tmp_path):
    """A reader who has gone, letters that the encoding lacks, control characters, a clock that
    stands still."""
    flags = ["--steps", "6", "--eval_interval", "3", "--prompt", "\x1b[31mé\udcff\u4e2d\u202e"]
    runs = {
        "ascii": start(data, tmp_path / "ascii", flags, encoding="ascii"),
        "nobody é": start(data, tmp_path / "nobody é", flags, closed_pipe=True),
        "clock": start(data, tmp_path / "clock", flags, clock_stands_still=True),
    }
    outputs = {}
    for name, run in runs.items():
        code, outputs[name] = finish(run)
        assert code == 0 and checkpoints(tmp_path / name) == [3, 6], outputs[name]
    assert "\\x1b[31m\\xe9" in outputs["ascii"]
    shown = runs["ascii"].output.read_bytes()
    assert all(c in b"\n\t" or 32 <= c < 127 for c in shown)
    assert "step 1/6: loss" in outputs["clock"] and "step 0/6: validation loss" in outputs["clock"]


def test_what_continues_is_the_same_run(data, trained, tmp_path):
    (tmp_path / "other.txt").write_text("something else\n" * 500)
    other = tmp_path / "other"
    prepare_data.prepare([str(tmp_path / "other.txt")], other)
    changes = {
        "--n_layers 3": "has --n_layers 2, not 3",
        "--optimizer adamw": "has --optimizer 'muon', not 'adamw'",
        "--batch_size 4": "has --batch_size 8, not 4",
        "--seed 2": "has --seed 1, not 2",
        "--steps 1": "already at step 4",
        f"--data {other}": "other data",
        f"--init_from {trained}": "has --init_from ",
    }
    before = files_of(trained)
    runs = {flags: start(None, trained, flags, sizes="") for flags in changes}
    for flags, run in runs.items():
        code, output = finish(run)
        assert code == 1 and changes[flags] in output and "Traceback" not in output, output
    assert files_of(trained) == before


def test_a_run_continues_from_its_folder_alone_and_says_what_changed(data, trained, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    code, output = run_train(None, out, "--steps 6 --lr 0.005", sizes="")
    assert code == 0 and "--steps was 4 until here, and now is 6\n" in output, output
    assert "--lr was 0.01 until here" in output and output.count("until here") == 2
    assert json.loads((out / "config.json").read_text())["settings"]["lr"] == 0.005
    assert logged(out, "step")[-1] == 6


def test_a_run_starts_from_the_weights_of_another_and_leaves_that_alone(data, trained, tmp_path):
    (tmp_path / "other.txt").write_text("something else\n" * 500)
    other = tmp_path / "other"
    prepare_data.prepare([str(tmp_path / "other.txt")], other)
    gpt2 = tmp_path / "gpt2"
    shutil.copytree(trained / "model", gpt2)
    config = json.loads((gpt2 / "config.json").read_text())
    (gpt2 / "config.json").write_text(json.dumps(config | {"tokenizer_name": "gpt2"}))
    before = files_of(trained)
    flags = "--steps 1 --eval_interval 1 --init_from"
    runs = [
        start(other, tmp_path / "tuned", f"{flags} {trained} --dropout 0.1", sizes=""),
        start(other, tmp_path / "again", f"{flags} {trained / 'model'}", sizes=""),
        start(other, tmp_path / "gpt2 run", f"{flags} {gpt2}", sizes=""),
        start(None, tmp_path / "read", f"--eval_only --init_from {trained}", sizes=""),
    ]
    (code, output), (code2, _), (code3, output3), (code4, output4) = map(finish, runs)
    assert code == code2 == code4 == 0, output
    assert code3 == 1 and "reads gpt2" in output3 and "holds bytes" in output3, output3
    assert not (tmp_path / "gpt2 run").exists() and not (tmp_path / "read").exists()
    assert files_of(trained) == before
    model = FlashSTU.from_pretrained(trained / "model")
    x = windows_of(other, 32)
    starts = [i * len(x) // 64 for i in range(64)] if len(x) > 64 else range(len(x))
    loss = model(x[list(starts)], labels=x[list(starts)]).loss.item()
    losses = [logged(tmp_path / name, "val_loss")[0] for name in ("tuned", "again")]
    assert losses == pytest.approx([loss] * 2, rel=1e-5)
    settings = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert settings["model"]["dropout"] == 0.1 and settings["model"]["n_embd"] == 32
    # the loss of the whole split, on the data that the other run was trained on
    x = windows_of(data, 32)
    bits = model(x, labels=x).loss.item() / math.log(2)
    assert f"{bits:.3f}" in output4 and "bits per byte" in output4, output4


def windows_of(folder, T):
    """All windows of the validation split [n, T + 1]."""
    _, shards = prepare_data.open_data(folder)
    tokens = torch.from_numpy(np.concatenate(shards["val"]).astype(np.int64))
    return tokens.unfold(0, T + 1, T)


def test_short_shards_are_one_long_split(data, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(300):
        (texts / f"{i}.txt").write_text(f"text {i}: " + "a quick fox\n" * (i % 9))
    prepare_data.prepare([str(texts)], tmp_path / "tokens")
    prepare_data.prepare([str(texts)], tmp_path / "shards", shard_tokens=200)
    _, shards = prepare_data.open_data(tmp_path / "shards")
    assert max(len(shard) for shard in shards["val"]) < 256 and len(shards["val"]) > 5
    flags = "--steps 3 --eval_interval 3"
    runs = [
        start(tmp_path / "tokens", tmp_path / "one", flags),
        start(tmp_path / "shards", tmp_path / "many", flags),
    ]
    for run in runs:
        code, output = finish(run)
        assert code == 0, output
    assert weights_are_equal(load_step(tmp_path / "one", 3), load_step(tmp_path / "many", 3))
    assert logged(tmp_path / "one", "val_loss") == logged(tmp_path / "many", "val_loss")


def test_samples_are_what_the_model_generates(data, trained, tmp_path):
    model = FlashSTU.from_pretrained(trained / "model")
    tokenizer = prepare_data.get_tokenizer("bytes")

    def answer(prompt):
        ids = torch.tensor([list(prompt.encode())])
        new = model.generate(ids, max_new_tokens=7, temperature=0, stop_token=tokenizer.eot)
        text = tokenizer.decode(new[0, ids.shape[1] :].tolist())
        shown = [c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text]
        return prompt + "".join(shown) + "\n"

    flags = ["--temperature", "0", "--max_new_tokens", "7", "--sample"]
    runs = [
        start(None, trained, [*flags, "line 1: the é", "--num_samples", "2"], sizes=""),
        start(None, trained / "model", [*flags, "line"], sizes=""),
        start(None, trained, [*flags, ""], sizes=""),
    ]
    (_, two), (_, one), (code, _) = map(finish, runs)
    assert two == answer("line 1: the é") * 2 and one == answer("line") and code == 0


def test_steps_without_a_finite_gradient_are_skipped_and_end_the_run(data, trained, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    high = "--lr 1e30 --muon_lr 1e30 --warmup_steps 0 --max_skipped 3"
    code, output = run_train(None, out, f"{high} --steps 50 --eval_interval 100", sizes="")
    assert code == 1 and output.count("is skipped") == 3, output
    assert "Checkpoints: [2, 4]" in output and "Traceback" not in output, output
    code, output = run_train(None, out, "--steps 5", sizes="")
    assert code == 0 and "after step 4" in output and "skipped" not in output, output


def test_weights_without_a_finite_validation_loss_are_not_saved(data, trained, tmp_path):
    broken = tmp_path / "broken"
    model = FlashSTU.from_pretrained(trained / "model")
    model.norm.weight.data.fill_(math.nan)
    model.save_pretrained(broken)
    code, output = run_train(data, tmp_path / "run", f"--init_from {broken}")
    assert code == 1 and "not saved" in output and not checkpoints(tmp_path / "run"), output


NOT_ZERO = """steps batch_size eval_interval eval_sequences log_interval max_skipped num_samples
    max_new_tokens lr muon_lr grad_clip top_p mlp_scale seq_len"""
NOT_NEGATIVE = "seed warmup_steps micro_batch_size top_k temperature weight_decay min_lr dropout"
FINITE = "lr min_lr grad_clip temperature softcap weight_decay"


def test_training_says_at_the_start_what_would_work(data, tmp_path):
    text = data.parent / "text.txt"
    mistakes = {
        "--n_embed 32": "there is no --n_embed: see --help, or try ['n_embd'",
        "--seq_len 1000000": "too short",
        "--n_heads 5": "n_heads",
        "--use_attn no": "--use_attn",
        "--preset 7B": "350M",
        "--steps many": "--steps",
        "--data nowhere": "prepare_data.py",
        f"--data {text}": f"{text} is a text. Prepare it first:  python prepare_data.py {text}",
        "--sample line": "holds no checkpoint and no model",
        "--eval_only --init_from nowhere": "nowhere holds no checkpoint and no model",
        "--device mps": "--device mps: torch finds no such device here",
    }
    mistakes |= {f"--{name} 0": f"--{name} must not be 0" for name in NOT_ZERO.split()}
    mistakes |= {f"--{name} -1": f"--{name} is -1" for name in NOT_NEGATIVE.split()}
    mistakes |= {f"--{name} nan": f"--{name} is nan" for name in FINITE.split()}
    mistakes |= {f"--{name} inf": f"--{name} is inf" for name in FINITE.split()}
    out = tmp_path / "run"
    for flags, message in mistakes.items():
        code, output = run_train(data, out, flags)
        assert code != 0 and message in output and "Traceback" not in output, (flags, output)
    assert not out.exists()


def test_a_bug_shows_its_traceback(data, tmp_path):
    (tmp_path / "wandb.py").write_text("def init(**options):\n    raise AttributeError('ours')\n")
    code, output = run_train(data, tmp_path / "run", "--wandb w", extra_modules=tmp_path)
    assert code == 1 and "Traceback" in output and "AttributeError: ours" in output, output


def test_wandb_receives_what_the_log_receives(data, tmp_path):
    path = tmp_path / "seen.jsonl"
    module = f"""
import json

def init(project, config):
    assert project == "mine" and config["n_embd"] == 32

def log(values, step):
    with open({str(path)!r}, "a") as file:
        file.write(json.dumps({{"step": step, **values}}) + "\\n")
"""
    (tmp_path / "wandb.py").write_text(module)
    flags = "--wandb mine --steps 2"
    code, output = run_train(data, tmp_path / "run", flags, extra_modules=tmp_path)
    assert code == 0, output
    assert path.read_text() == (tmp_path / "run" / "log.jsonl").read_text()


def test_presets_have_the_sizes_in_their_names(data, tmp_path, monkeypatch):
    flags = f"--data {data} --out_dir {tmp_path / 'run'} --steps 1 --device cpu {TINY}"
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    script = runpy.run_path("train.py")
    for name, millions in {"125M": 125, "350M": 350, "1B": 1000}.items():
        given = vars(script["parser"].parse_args(script["presets"][name].split()))
        sizes = {key: value for key, value in given.items() if key in script["fields"]}
        with torch.device("meta"):
            model = FlashSTU(FlashSTUConfig(vocab_size=50304, torch_dtype="float32", **sizes))
        n = sum(p.numel() for p in model.parameters()) / 1e6
        assert 0.9 * millions < n < 1.3 * millions, name


def test_autocast_trains_to_about_the_same_losses(data, tmp_path):
    flags = "--steps 5 --eval_interval 100"
    dtypes = ("float32", "bfloat16", "float16")
    runs = [start(data, tmp_path / dtype, f"{flags} --dtype {dtype}") for dtype in dtypes]
    for dtype, run in zip(dtypes, runs):
        code, output = finish(run)
        assert code == 0, output
        assert logged(tmp_path / dtype) == pytest.approx(logged(tmp_path / "float32"), rel=1e-2)


def test_the_benchmark_prints_and_draws(tmp_path, capsys):
    benchmark_filters(64)
    for approx in (True, False):
        benchmark_filtering(2, 60, 8, approx, "cpu")
    seconds, speeds = (
        benchmark_generation([20, 90], "cpu", torch.float32),
        benchmark_length([64, 130], "cpu", "float32"),
    )
    draw_costs(tmp_path / "cost.png", [20, 90], seconds, [64, 130], speeds)
    assert (tmp_path / "cost.png").stat().st_size > 5000 and len(speeds) == 4
    assert capsys.readouterr().out.count("\n") == 11 and stu.windowed_attention is windowed_attention


# ------------------------------------------------------------------------------------------------------------
# python test_stu.py: stu.py against the usual route, on this machine


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
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as p:
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
    ours, filters = timed(lambda: get_spectral_filters(L, K, dtype=torch.float64))
    eigh = lambda: torch.linalg.eigh(get_hankel(L)).eigenvectors[:, -K:].flip(1)
    usual, usual_filters = timed(eigh, 2 if L < 8192 else 1)
    unit = [phi / phi.norm(dim=0) * phi[0].sign() for phi in (filters, usual_filters)]
    notes = [f"differ by {(unit[0] - unit[1]).abs().max():.0e}"]
    if L == 64:
        exact = reference_filters(L, K, False)
        notes = [f"{(phi - exact / exact.norm(dim=0)).abs().max():.0e}" for phi in unit]
    row(f"{K} filters, L = {L}", ours, usual, *notes)


def benchmark_filtering(B, T, d, approx, device):
    """Forward and backward of a layer's convolution on the same weights; the error is relative to float64."""
    layer = STU(d, d, T, use_approx=approx).to(device)
    x, grad = torch.randn(2, B, T, d, device=device)
    x.requires_grad_()
    M, (filters, _) = (layer.M_filters if approx else layer.M), layer.bank.on(x)
    phi = filters[:, :24]
    exact = usual_stu(x[:1].detach().double(), phi.double(), M.detach().double())
    routes = (lambda: layer.convolve(x, filters, M, x.dtype)), (lambda: usual_stu(x, phi, M))
    notes = [f"{((run()[:1] - exact).norm() / exact.norm()).item():.0e}" for run in routes]
    steps = [lambda run=run: torch.autograd.grad(run(), (x, M), grad) for run in routes]
    notes.append("peak memory {:.0f} and {:.0f} MiB".format(*(peak_bytes(step) / 2**20 for step in steps)))
    ours, usual = (timed(step)[0] for step in steps)
    moved = 4 * x.numel() * x.element_size()  # the least: input and output, and the gradient of each
    notes.append(f"{moved / ours / 1e9:.1f} GB/s of the least traffic")
    row(f"{'STU-T' if approx else 'full STU'} {(B, T, d)}, fwd + bwd", ours, usual, *notes)


KINDS_OF_MODEL = {  # of about the same size
    "hybrid": {}, "STU only": {"use_attn": False}, "window attention": {"use_stu": False, "mlp_scale": 2.25},
    "full attention": {"use_stu": False, "mlp_scale": 2.25},
}  # fmt: skip


def benchmark_length(lengths, device, dtype):
    """Tokens a second of training steps on one sequence of each length -> for each kind of model."""
    sizes = {
        "n_embd": 192,
        "n_layers": 6,
        "n_heads": 6,
        "window_size": 128,
        "vocab_size": 256,
        "softcap": 0.0,
    }
    windowed, speeds = stu.windowed_attention, {name: [] for name in KINDS_OF_MODEL}
    print(f"\n{'tokens/s of a training step at length':<44}", *(f"{T:>9,}" for T in lengths))
    for name, options in KINDS_OF_MODEL.items():
        if name == "full attention":  # torch's own
            stu.windowed_attention = lambda q, k, v, *_: F.scaled_dot_product_attention(
                q, k, v, is_causal=True
            )
        for T in lengths:
            if name == "full attention" and T > 2**14 and device == "cpu":
                break  # minutes
            config = FlashSTUConfig(
                **(sizes | {"seq_len": T, "mlp_scale": 2.75, "torch_dtype": dtype} | options)
            )
            model, ids = FlashSTU(config).to(device), torch.randint(256, (1, T + 1), device=device)
            seconds, _ = timed(
                lambda m=model, ids=ids: m(ids, labels=ids).loss.backward(), 4 if T < 2**14 else 2
            )
            speeds[name].append(T / seconds)
        size = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{f'{name}, {size:.1f}M parameters':<44}", *(f"{s:>9,.0f}" for s in speeds[name]), flush=True)
    stu.windowed_attention = windowed
    return speeds


def benchmark_generation(contexts, device, dtype):
    """One token from the state, against reading the context again -> seconds of both for each context."""
    config = FlashSTUConfig(
        n_embd=256, n_layers=4, n_heads=4, seq_len=2048, window_size=256, vocab_size=256, torch_dtype=dtype
    )
    model, seconds = FlashSTU(config).to(device), []
    for context in contexts:
        ids, state = torch.randint(256, (1, context), device=device), []
        reading, _ = timed(lambda ids=ids, state=state: model.generate(ids, max_new_tokens=0, state=state), 1)
        tokens = model.stream(ids[:, :0], 33, state=state)
        seconds.append((timed(lambda tokens=tokens: next(tokens), 32)[0], reading))
        row(f"next token at context {context}", *seconds[-1])
    return seconds


def draw_costs(path, contexts, seconds, lengths, speeds):
    with lds_module.picture(path, 10, 4) as figure:
        left, right = figure.subplots(1, 2)
        for times, label in zip(zip(*seconds), ("from the state", "reading it again")):
            left.loglog(contexts, np.array(times) * 1e3, marker="o", label=label)
        for name, values in speeds.items():
            right.semilogx(lengths[: len(values)], values, marker="o", label=name)
        left.set(title="A token costs the same at any context", ylim=(1, None))
        left.set(xlabel="context (tokens)", ylabel="milliseconds per token")
        right.set(title="Training: nearly the same cost a token at any length", ylim=(0, None))
        right.set(xlabel="length (tokens)", ylabel="tokens per second")


def main():
    parser = argparse.ArgumentParser(description="Time stu.py against the usual route, two minutes on a CPU.")
    parser.add_argument("--full", action="store_true", help="with eigh at L = 8192 and lengths to 32,768")
    parser.add_argument("--draw", metavar="FILE", help="only the costs of context and length, drawn to FILE")
    args = parser.parse_args()
    if args.draw:
        open(args.draw, "ab").close()  # fails before the work, not after it
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    where = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}")
    print(f"\n{'':<44} {'stu.py':>12} {'usual route':>12} {'ratio':>7}   error: ours, usual")
    if not args.draw:
        for L in (64, 2048, 8192) if args.full else (64, 2048):
            benchmark_filters(L)
        small, large = [(2, 4096, 512), (8, 512, 256)], [(8, 8192, 1024), (32, 2048, 768), (1, 65536, 1024)]
        for shape in large if cuda else small:
            benchmark_filtering(*shape, True, device)
        benchmark_filtering(8, 1024, 128, False, device)
    contexts = [512, 2048, 8192, 32768, 131072]
    lengths = [2**i for i in range(10, 16 if args.full or args.draw or cuda else 14)]
    seconds, speeds = benchmark_generation(contexts, device, dtype), benchmark_length(lengths, device, dtype)
    if args.draw:
        draw_costs(args.draw, contexts, seconds, lengths, speeds)


if __name__ == "__main__":
    main()
