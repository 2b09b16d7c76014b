"""What holds, by name: each test states an identity of one of the other files, and checks it."""

import codecs
import contextlib
import copy
import gzip
import io
import itertools
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
import stat
import subprocess
import sys
import tempfile
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


def relative_error(found, expected):
    assert found.shape == expected.shape
    difference = (found - expected).norm() / expected.norm()
    return difference.item()


def largest_error(found, expected):
    """The largest relative error of the tensors of a list, and NaN if any is NaN."""
    errors = list(map(relative_error, found, expected))
    assert len(found) == len(expected)
    return np.max(errors)


def largest(x):
    return x.abs().max()


def gradients_of(loss, module):
    return torch.autograd.grad(loss, list(module.parameters()))


def value_and_gradients(module, x):
    """The output y for x, and the gradient of Σ y² with respect to each parameter."""
    y = module(x)
    gradients = gradients_of(y.square().sum(), module)
    return [y, *gradients]


def in_pieces(module, x, cuts):
    """The output for x [B, T, ...] in pieces, each from the state after the last; the state."""
    state = None
    outputs = []
    for piece in x.tensor_split(list(cuts), dim=1):
        y, state = module(piece, state, use_cache=True)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def random_cuts(T):
    """Two places, or fewer in a short sequence, that cut it in pieces."""
    places = list(range(1, T))
    return sorted(random.sample(places, min(T - 1, 2)))


def name_of(options):
    return "+".join(options) or "default"


class LargestTensor(TorchDispatchMode):
    """While this is active it notes how many elements the largest tensor holds that is made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                held = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.numel = max(self.numel, held)
        return result


# --------------------------------------------------------------------------------------------------
# stu.py: filters


def matrix_entry(i, j, sinc, use_hankel_L=False, max_angle=0):
    """Z_ij of the papers. For a sector, times the average of cos θ(i-j) over all its angles."""
    n = i + j
    if use_hankel_L:
        both_odd_or_even = ((-1) ** n + 1) / 2
        return both_odd_or_even * 16 / ((n + 3) * (n - 1) * (n + 1))
    average = sinc(max_angle * (i - j) / 180)
    return average * 2 / (n**3 - n)


def exact_filters(L, K, **options):
    """From the matrix itself in 60-digit arithmetic: filters whose signs are not determined."""
    import mpmath

    with mpmath.workdps(60):
        Z = mpmath.matrix(L)
        numbers = mpmath.arange(1, L + 1)
        for i, x in enumerate(numbers):
            for j, y in enumerate(numbers):
                Z[i, j] = matrix_entry(x, y, mpmath.sincpi, **options)
        values, vectors = mpmath.eigsy(Z)  # in ascending order
    values = torch.tensor(list(values), dtype=torch.float64)
    vectors = torch.tensor(vectors.tolist(), dtype=torch.float64)
    phi = vectors * values.clamp(min=0) ** 0.25
    return phi.flip(1)[:, :K]


EXACT = [
    (40, {}, 1e-4),
    (64, {}, 1e-6),
    (40, {"use_hankel_L": True}, 1e-9),
    (40, {"max_angle": 5}, 1e-5),
]


@pytest.mark.parametrize("L, options, tolerance", EXACT)
def test_filters_equal_those_of_60_digit_arithmetic(L, options, tolerance):
    phi = get_spectral_filters(L, 24, dtype=torch.float64, **options)
    exact = exact_filters(L, 24, **options)
    sign = (phi * exact).sum(dim=0).sign()
    error = phi - sign * exact
    assert largest(error) < 1e-9
    assert largest(error / exact.norm(dim=0)) < tolerance  # so no filter is noise


SETS = [{}, {"use_hankel_L": True}, {"max_angle": 5}, {"max_angle": 90}]


@pytest.mark.parametrize("options", SETS, ids=name_of)
@pytest.mark.parametrize("L", [1, 2, 7, 100, 777])
def test_filters_are_the_top_eigenvectors_of_their_matrix(L, options):
    K = min(L, 24)
    phi = get_spectral_filters(L, K, dtype=torch.float64, **options)
    norm = phi.norm(dim=0)
    eigenvalue = norm**4
    i = torch.arange(1, L + 1).double()
    Z = matrix_entry(i[:, None], i, torch.sinc, **options)
    assert largest(Z @ phi - phi * eigenvalue) < 1e-14
    assert largest(eigenvalue - torch.linalg.eigvalsh(Z).flip(0)[:K]) < 1e-14
    unit = phi / norm
    assert largest(unit.T @ unit - torch.eye(K)) < 1e-12
    first_lags = 2 if "use_hankel_L" in options else 1
    assert (phi[:first_lags].sum(dim=0) > 0).all()


def test_tensorized_filters_are_kronecker_products():
    short = get_spectral_filters(13, 5)  # 13² is the first square of 150 - 2 or more
    phi = get_tensorized_spectral_filters(150, 5)
    assert phi.shape == (150, 25)
    product = torch.kron(short[:, 1], short[:, 3])
    assert largest(phi[:, 1 * 5 + 3] - product[:150]) < 1e-7
    assert get_tensorized_spectral_filters(12, 24).shape == (12, 16)
    # What is longer than the square ends with zeros.
    padded = get_tensorized_spectral_filters(3, 24)
    assert padded.shape == (3, 1)
    assert padded.count_nonzero() == 1


@pytest.mark.parametrize("make", [get_spectral_filters, get_tensorized_spectral_filters])
def test_filters_have_a_floating_dtype(make):
    assert make(16, 3, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype must be floating-point, got torch.int32"):
        make(16, 3, dtype=torch.int32)


RECURRENCES = [
    (1, 1, {}),
    (5, 3, {"use_hankel_L": True}),
    (40, 24, {}),
    (1000, 24, {}),
    (2048, 32, {"use_hankel_L": True}),
    (8192, 48, {}),
]
RINGING_RECURRENCES = [
    (1, 1, {"max_angle": 20}),
    (128, 24, {"max_angle": 5}),
    (128, 45, {"max_angle": 45}),
    (1024, 24, {"max_angle": 45}),
]


@pytest.mark.parametrize("L, K, options", RECURRENCES + RINGING_RECURRENCES)
def test_the_recurrence_of_a_bank_answers_an_impulse_with_its_filters(L, K, options):
    bank = stu.standard_bank(L, K, **options)
    powers, b, C = bank.lds
    A = powers[1]
    assert torch.allclose(powers[3], A @ A @ A)
    # In orthonormal coordinates neither states nor weights are large, and float32 is enough.
    identity = A @ A.T + torch.outer(b, b)
    assert largest(identity - torch.eye(len(b))) < 1e-13
    assert largest(C) < 1.5
    answer = []
    S = b
    for _ in range(L):
        answer.append(C @ S)
        S = A @ S
    rings = "max_angle" in options
    assert largest(torch.stack(answer) - bank.filters) < (1e-6 if rings else 1e-7)
    # Past L the filters fade: the energy that is left, Σ_{t>=L} |C A^t b|², is |C A^L|².
    rest = C @ torch.linalg.matrix_power(A, L)
    assert rest.norm(dim=1).max() < (0.2 if rings else 0.05)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1000.0])
def test_filters_of_any_scale_have_their_recurrence_and_noise_has_none(scale):
    assert FilterBank(scale * get_spectral_filters(200, 10)).lds is not None
    assert FilterBank(scale * torch.randn(200, 10)).lds is None


# --------------------------------------------------------------------------------------------------
# stu.py: the STU layer

KINDS = [
    {},
    {"use_hankel_L": True},
    {"use_approx": False},
    {"use_approx": False, "use_hankel_L": True},
    {"use_tensorized": True},
    {"use_tensorized": True, "use_approx": False},
]
in_every_kind = pytest.mark.parametrize("options", KINDS, ids=name_of)
approx_or_full = pytest.mark.parametrize("approx", [True, False])


def make_stu(L, d_in=6, d_out=6, **options):
    K = 4 if "use_tensorized" in options else min(24, L)
    return STU(d_in, d_out, L, K, **options)


def formula(layer, x):
    """stu_formula with the filters and weights of this layer, in float64."""
    if layer.use_approx:
        M = layer.M_inputs * layer.M_filters[:, None, :]  # [2K, d_in, d_out]
    else:
        M = layer.M
    bank = layer.bank.filters
    return stu_formula(x.double(), bank, M.double())


WITHIN = [(1, 1, 1), (33, 33, 2), (50, 20, 1), (64, 64, 3)]
PAST = [(1, 3, 1), (64, 200, 2)]


@in_every_kind
@pytest.mark.parametrize("L, T, B", WITHIN)
def test_stu_equals_its_formula(L, T, B, options):
    layer = make_stu(L, 5, 7, **options)
    x = torch.randn(B, T, 5)
    expected = formula(layer, x)
    assert relative_error(layer(x), expected) < 2e-6


@in_every_kind
@pytest.mark.parametrize("L, T, B", WITHIN + PAST)
def test_pieces_and_single_steps_equal_the_whole_sequence(L, T, B, options):
    """... within seq_len and past it, for sequences cut at random places."""
    layer = make_stu(L, **options)
    x = torch.randn(B, T, 6)
    whole = layer(x)
    for cuts in (random_cuts(T), range(1, T), []):
        y, _ = in_pieces(layer, x, cuts)
        assert relative_error(y, whole) < 1e-6


@pytest.mark.parametrize("L, K", [(2000, 24), (8192, 48)])
def test_a_float32_state_streams_long_sequences(L, K):
    layer = STU(4, 4, L, K)
    x = torch.randn(1, L, 4)
    y, state = in_pieces(layer, x, range(301, L, 301))
    assert state.memory[0].dtype == torch.float32
    assert relative_error(y, layer(x)) < 1e-5


def test_past_seq_len_outputs_stay_sane_and_what_was_long_ago_is_forgotten():
    layer = STU(4, 4, 64)
    x = torch.randn(1, 64 * 50, 4)
    y, state = layer(x, use_cache=True)
    scale = y[:, :64].std()
    assert y[:, -640:].std() < 2 * scale
    assert state.memory[0].shape == (1, 112, 4)
    y, _ = layer(0 * x, state, use_cache=True)
    assert largest(y[:, -64:]) < 1e-3 * scale


NOISE = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
WITHOUT_RECURRENCE = [
    {"seq_len": 67, "use_tensorized": True},
    {"seq_len": 64, "precomputed_filters": NOISE},
    {"seq_len": 256, "num_eigh": 128, "max_angle": 90.0},
]


@pytest.mark.parametrize("options", WITHOUT_RECURRENCE, ids=name_of)
def test_a_layer_whose_recurrence_would_not_fade_or_be_too_large_streams_without(options):
    layer = STU(4, 4, **options)
    assert layer.bank.lds is None
    x = torch.randn(1, 640, 4)
    whole = layer(x)
    assert whole[:, 300:].std() < 2
    y, _ = in_pieces(layer, x, [25, 26, 300])
    assert relative_error(y, whole) < 1e-5


@in_every_kind
def test_stu_is_causal_and_sees_odd_lags(options):
    layer = make_stu(40, **options).double()
    x = torch.randn(1, 40, 6).double().requires_grad_()
    layer(x)[0, 20].sum().backward()
    reach = x.grad[0].abs().amax(dim=-1)
    assert reach[21:].max() < 1e-12
    assert reach[:21].min() > 1e-9


@pytest.mark.parametrize("L", [64, 2048])
def test_stu_t_represents_a_delay_by_one(L):
    layer = STU(3, 3, L)
    delay = torch.eye(L)[:, 1:2].double()
    fit = torch.linalg.lstsq(layer.bank.filters, delay, driver="gelsd")
    layer.M_inputs.data = torch.eye(3)
    layer.M_filters.data = fit.solution.float().repeat(1, 3)
    x = torch.randn(2, L, 3)
    y = layer(x)
    assert largest(y[:, 1:] - x[:, :-1]) < 1e-3


@pytest.mark.parametrize("d_in_tile, d_out_tile", [(3, None), (None, 2), (3, 2), (100, 100)])
@approx_or_full
def test_tiled_equals_untiled(approx, d_in_tile, d_out_tile):
    untiled = STU(7, 5, 30, use_approx=approx)
    tiles = {"d_in_tile": d_in_tile, "d_out_tile": d_out_tile}
    tiled = STU(7, 5, 30, use_approx=approx, **tiles)
    tiled.load_state_dict(untiled.state_dict())
    x = torch.randn(2, 30, 7)
    expected = value_and_gradients(untiled, x)
    assert largest_error(value_and_gradients(tiled, x), expected) < 1e-5


@in_every_kind
def test_a_batch_of_none_has_an_output_of_none(options):
    layer = make_stu(30, 5, 7, **options)
    x = torch.randn(0, 30, 5)
    y, _ = in_pieces(layer, x, [11])
    assert y.shape == layer(x).shape == (0, 30, 7)


@pytest.mark.parametrize("backend", ["fft", "lds"])
@approx_or_full
def test_first_and_second_gradients_equal_finite_differences(approx, backend):
    layer = STU(2, 3, 9, 4, use_approx=approx, backend=backend).double()
    x = torch.randn(2, 7, 2).double().requires_grad_()

    def function(x, *parameters):
        return layer(x)

    inputs = (x, *layer.parameters())
    assert torch.autograd.gradcheck(function, inputs, atol=1e-5)
    assert torch.autograd.gradgradcheck(function, inputs, atol=1e-5)


@pytest.mark.parametrize("max_angle", [0, 20])
@approx_or_full
def test_both_backends_agree_in_value_and_gradient(approx, max_angle):
    options = {"use_approx": approx, "max_angle": max_angle}
    fft = STU(8, 8, 300, **options)
    lds = STU(8, 8, 300, **options, backend="lds")
    lds.load_state_dict(fft.state_dict())
    x = torch.randn(2, 300, 8)
    expected = value_and_gradients(fft, x)
    assert largest_error(value_and_gradients(lds, x), expected) < 1e-5


def test_full_stu_never_holds_all_filter_outputs():
    layer = STU(32, 32, 512, use_approx=False)
    x = torch.randn(2, 512, 32)
    layer(x)  # makes the copies of the filters
    with LargestTensor() as largest_tensor:
        layer(x).sum().backward()
    assert largest_tensor.numel < 2 * 512 * 48 * 32 / 4


def test_casting_to_bfloat16_leaves_the_filters_exact():
    layer = STU(8, 8, 100)
    exact, _ = layer.bank.on("cpu", torch.float32)
    layer.to(torch.bfloat16)
    filters, _ = layer.bank.on("cpu", torch.bfloat16)
    assert torch.equal(filters, exact)
    x = torch.randn(2, 100, 8).bfloat16()
    whole = layer(x)
    y, state = in_pieces(layer, x, [50])
    assert y.dtype == whole.dtype == torch.bfloat16
    assert state.memory[0].dtype == torch.float32
    assert relative_error(y.float(), whole.float()) < 1e-2


def test_a_bank_does_not_depend_on_the_default_dtype():
    expected = STU(4, 4, 600).bank
    stu.standard_bank.cache_clear()
    torch.set_default_dtype(torch.bfloat16)  # as transformers does while it makes a model
    try:
        made = STU(4, 4, 600).bank
    finally:
        torch.set_default_dtype(torch.float32)
    assert made is not expected
    assert torch.equal(made.filters, expected.filters)
    assert torch.equal(made.lds.C, expected.lds.C)


def test_layers_share_one_bank_and_so_do_their_copies():
    layers = torch.nn.ModuleList([STU(4, 4, 50), STU(4, 8, 50)])
    x = torch.randn(1, 50, 4)
    expected = layers[0](x)
    pickled = pickle.dumps(layers)
    for a, b in (layers, copy.deepcopy(layers), pickle.loads(pickled)):
        assert a.bank is b.bank is layers[0].bank
        assert torch.equal(a(x), expected)
        y, _ = a(x, use_cache=True)
        assert relative_error(y, expected) < 1e-5


def test_a_replica_without_parameters_of_its_own_computes_the_same():
    """... as torch.nn.DataParallel makes them."""
    layer = STU(4, 4, 50)
    x = torch.randn(1, 50, 4)
    replica = layer._replicate_for_data_parallel()
    for name, p in layer.named_parameters():
        setattr(replica, name, p.detach())
    assert torch.equal(replica(x), layer(x))


def test_a_layer_first_used_in_inference_mode_trains_afterwards():
    stu.standard_bank.cache_clear()
    layer = STU(4, 4, 61)
    x = torch.randn(1, 61, 4)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()


def test_precomputed_filters_are_used():
    phi = get_spectral_filters(60, 10)
    own = STU(4, 4, 60, 10)
    x = torch.randn(1, 60, 4)
    for filters in (-phi, FilterBank(both_signs(-phi))):
        layer = STU(4, 4, 60, precomputed_filters=filters)
        layer.load_state_dict(own.state_dict())
        assert relative_error(layer(x), -own(x)) < 1e-5


class FakeFlashFFTConv(torch.nn.Module):
    """FlashFFTConv's contract: u [B, H, T] in 16 bits, k [H, T] in float32, both contiguous."""

    runs = 0

    def __init__(self, seqlen, dtype):
        super().__init__()
        assert seqlen in [2**i for i in range(8, 23)]
        self.seqlen = seqlen
        self.dtype = dtype
        self.register_buffer("twiddle", torch.ones(3))

    def forward(self, u, k):
        _, H, T = u.shape
        assert k.shape == (H, T)
        assert 2 * T <= self.seqlen
        assert H % 16 == 0
        assert u.dtype == self.dtype
        assert k.dtype == torch.float32
        assert u.is_contiguous() and k.is_contiguous()
        FakeFlashFFTConv.runs += 1
        # a circular convolution of exactly this size
        u_f = torch.fft.rfft(u.float(), n=self.seqlen)
        k_f = torch.fft.rfft(k, n=self.seqlen)
        y = torch.fft.irfft(u_f * k_f, n=self.seqlen)
        return y[..., :T].to(u.dtype)


def is_16_bit(tensor):
    return tensor.element_size() == 2


@pytest.mark.parametrize("T", [1, 100, 128, 257, 20000])
def test_flashfftconv_is_called_by_its_contract(monkeypatch, T):
    monkeypatch.setattr(FakeFlashFFTConv, "runs", 0)
    layer = STU(4, 4, T, min(T, 24))
    x = torch.randn(2, T, 4)
    exact = layer(x)
    names = list(layer.state_dict())
    monkeypatch.setattr(stu, "FlashFFTConv", FakeFlashFFTConv)
    monkeypatch.setattr(stu, "on_cuda_16_bit", is_16_bit)
    assert torch.equal(layer(x), exact)
    assert FakeFlashFFTConv.runs == 0  # a float32 model stays in float32
    layer = layer.bfloat16()
    for layer.use_flash_fft in (True, False):
        y = layer(x.bfloat16())
        assert relative_error(y.float(), exact) < 3e-2
        assert FakeFlashFFTConv.runs == 1
    assert list(layer.state_dict()) == names


WRONG_SETTINGS_OF_AN_STU = [
    ({"seq_len": 400, "num_eigh": 400}, "num_eigh must be at most 2.. at length 400"),
    ({"num_eigh": 0}, "num_eigh must be an integer >= 1, got 0"),
    ({"d_in": 0}, "d_in must be an integer >= 1, got 0"),
    ({"d_out": "4"}, "d_out must be an integer >= 1, got '4'"),
    ({"d_in_tile": 0}, "d_in_tile must be an integer >= 1, got 0"),
    ({"use_approx": "False"}, "use_approx must be True or False, got 'False'"),
    ({"use_hankel_L": 1}, "use_hankel_L must be True or False, got 1"),
    ({"backend": "scan"}, "backend must be"),
    ({"max_angle": 91}, "max_angle must be a number from 0 to 90, got 91"),
    ({"max_angle": 5.0, "use_tensorized": True}, "max_angle must be 0, got 5.0"),
    ({"precomputed_filters": torch.ones(7, 3)}, "the length seq_len = 8, got 7"),
    ({"precomputed_filters": [[1.0]]}, "filters must be a tensor"),
    ({"precomputed_filters": torch.zeros(8, 3)}, "filters must be finite, and not all zero"),
    ({"precomputed_filters": torch.ones(8, 3) / 0}, "filters must be finite"),
    ({"precomputed_filters": torch.ones(8, 3).int()}, "dtype must be floating-point"),
    ({"precomputed_filters": [[1.0]], "use_hankel_L": True}, "filters must be a tensor"),
]


@pytest.mark.parametrize("settings, message", WRONG_SETTINGS_OF_AN_STU)
def test_stu_says_what_is_wrong_with_its_settings(settings, message):
    sizes = {"d_in": 4, "d_out": 4, "seq_len": 8, "num_eigh": 4}
    with pytest.raises(ValueError, match=message):
        STU(**sizes | settings)


WRONG_INPUTS = [
    (torch.ones(1, 8, 5), "got torch.float32 [1, 8, 5]"),
    (torch.ones(8, 4), "got torch.float32 [8, 4]"),
    (torch.ones(1, 0, 4), "got torch.float32 [1, 0, 4]"),
    (torch.ones(1, 8, 4).int(), "got torch.int32 [1, 8, 4]"),
]


@pytest.mark.parametrize("x, got", WRONG_INPUTS)
def test_a_layer_says_what_is_wrong_with_its_input(x, got):
    wanted = "input must be floating-point [batch, length >= 1, 4 channels]"
    for layer in (STU(4, 4, 8, 4), SlidingWindowAttention(4, 1)):
        with pytest.raises(ValueError, match=re.escape(f"{wanted}, {got}")):
            layer(x)


# --------------------------------------------------------------------------------------------------
# stu.py: attention


def dense_attention(q, k, v, window, softcap):
    """The definition, with a matrix [queries, keys]."""
    past = k.shape[2] - q.shape[2]
    j = torch.arange(k.shape[2])
    i = j[past:, None]
    unseen = (j > i) | (i - j > window)
    logits = q @ k.mT / q.shape[3] ** 0.5
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(unseen, -math.inf)
    return logits.softmax(dim=-1) @ v


SPANS = [(1, 0, 0), (1, 9, 4), (7, 0, 100), (300, 0, 0), (300, 0, 37), (200, 50, 64)]


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("T, past, window", SPANS)
def test_windowed_attention_equals_dense_masked_attention(T, past, window, softcap):
    q = 3 * torch.randn(2, 3, T, 8)
    k = 3 * torch.randn(2, 3, past + T, 8)
    v = torch.randn(2, 3, past + T, 8)
    y = windowed_attention(q, k, v, window, softcap)
    assert relative_error(y, dense_attention(q, k, v, window, softcap)) < 1e-5


def test_windowed_attention_costs_length_times_window():
    attention = SlidingWindowAttention(16, 2, 32)
    x = torch.randn(1, 4096, 16)
    with LargestTensor() as largest_tensor:
        attention(x).sum().backward()
    assert largest_tensor.numel <= 4096 * 16 * 3  # the projection to q, k, v; not 4096 x 4096


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_flash_attn_is_called_by_its_contract(monkeypatch, softcap):
    windows = []

    def fake(q, k, v, *, causal, window_size, softcap):
        assert causal
        assert q.dtype == torch.bfloat16
        assert q.shape[2:] == (2, 16)  # [B, T, H, head_size]
        windows.append(window_size)
        heads_first = [tensor.float().transpose(1, 2) for tensor in (q, k, v)]
        y = dense_attention(*heads_first, window_size[0], softcap)
        return y.transpose(1, 2).bfloat16()

    attention = SlidingWindowAttention(32, 2, 20, softcap).bfloat16()
    x = torch.randn(2, 90, 32).bfloat16()
    expected = attention(x).float()
    monkeypatch.setattr(stu, "on_cuda_16_bit", is_16_bit)
    monkeypatch.setattr(stu, "flash_attn_func", fake)
    y = attention(x).float()
    assert relative_error(y, expected) < 2e-2
    y, _ = in_pieces(attention, x, [50])  # only the first piece: it knows no ring,
    assert relative_error(y.float(), expected) < 2e-2
    attention(x, attention_mask=torch.ones(2, 90))  # and no padding
    assert windows == [(20, 0), (20, 0)]


@pytest.mark.parametrize("window, T, B", [(0, 5, 1), (16, 100, 2), (200, 100, 1)])
def test_attention_in_pieces_equals_the_whole_sequence(window, T, B):
    attention = SlidingWindowAttention(32, 4, window)
    x = torch.randn(B, T, 32)
    whole = attention(x)
    for cuts in (random_cuts(T), range(1, T)):
        y, state = in_pieces(attention, x, cuts)
        assert relative_error(y, whole) < 1e-5
        keys, _, _ = state.memory
        assert keys.shape == (B, 4, window + 1, 8)


def test_attention_depends_on_distance_not_on_position():
    attention = SlidingWindowAttention(32, 4, window_size=8).double()
    x = torch.randn(1, 40, 32).double()
    y = attention(x)
    later = attention(x[:, 10:])
    assert relative_error(later[:, 8:], y[:, 18:]) < 1e-5
    empty = stu.start_ring(torch.zeros(1, 4, 1, 8).double(), window=8)
    far = empty._replace(position=torch.tensor(10**8))  # a stream after so many tokens
    later, _ = attention(x, far, use_cache=True)
    assert relative_error(later, y) < 1e-5


def test_attention_has_the_gradients_of_finite_differences():
    attention = SlidingWindowAttention(8, 2, 3).double()
    x = torch.randn(1, 6, 8).double().requires_grad_()
    assert torch.autograd.gradcheck(attention, x)


def test_the_state_of_a_long_piece_is_as_small_as_its_window():
    x = torch.randn(1, 2000, 8)
    for layer in (SlidingWindowAttention(8, 1, 4), STU(8, 8, 68, use_tensorized=True)):
        _, state = layer(x, use_cache=True)
        for tensor in state.memory:
            held = tensor.untyped_storage().nbytes() // tensor.element_size()
            assert held == tensor.numel() <= 68 * 8


@pytest.mark.parametrize("window", [-1, 2.5, (4, 1), (-1, -1), (4, 0, 0)])
def test_attention_refuses_windows_that_see_the_future_or_nothing(window):
    with pytest.raises(ValueError, match="window_size must be an integer >= 0, got"):
        SlidingWindowAttention(32, 4, window)


# --------------------------------------------------------------------------------------------------
# stu.py: block and model


def small_config(**changes):
    sizes = {"n_embd": 32, "n_layers": 4, "n_heads": 4, "vocab_size": 61}
    lengths = {"seq_len": 48, "window_size": 12}
    options = sizes | lengths | {"torch_dtype": "float32"} | changes
    return FlashSTUConfig(**options)


def small_model(**changes):
    return FlashSTU(small_config(**changes)).eval()


def random_ids(B, T):
    return torch.randint(61, (B, T))


MODELS = [
    {},
    {"use_attn": False, "max_angle": 15.0},
    {"use_stu": False},
    {"use_approx": False, "use_hankel_L": True, "softcap": 0.0},
    {"stu_enable_mlp_sandwich": True, "stu_mlp_hidden_size": 24, "bias": True},
    {"use_tensorized": True, "num_eigh": 3},
    {"d_in_tile": 10, "d_out_tile": 7, "window_size": (5, 0)},
]
in_every_variant = pytest.mark.parametrize("model", MODELS, ids=name_of, indirect=True)


@pytest.fixture
def model(request):
    """A small one, with the options of in_every_variant, where a test has that."""
    return small_model(**getattr(request, "param", {}))


@pytest.mark.skipif("not torch.cuda.is_available()", reason="there is no CUDA device")
@in_every_variant
def test_cuda_computes_what_the_cpu_does(model):
    """Loss, gradients, a piece from a state, padding, a text; the first four also in bfloat16."""

    def results(ids):
        first, second = ids.split(350, dim=1)
        _, state = model.hidden(first, use_cache=True)
        piece, _ = model.hidden(second, state)
        padded, _ = model.hidden(ids, attention_mask=ids > 5)
        loss = model(ids, labels=ids).loss
        tensors = [piece, padded, loss, *gradients_of(loss, model)]
        return [tensor.float().cpu() for tensor in tensors]

    greedy = {"max_new_tokens": 20, "temperature": 0}
    ids = random_ids(2, 700)
    expected = results(ids)
    text = model.generate(ids, **greedy)
    model.cuda()
    ids = ids.cuda()
    assert largest_error(results(ids), expected) < 1e-4
    assert torch.equal(model.generate(ids, **greedy).cpu(), text)
    model.bfloat16()
    assert largest_error(results(ids), expected) < 0.1


def test_the_documented_lines_run_as_they_stand(tmp_path):
    config = FlashSTUConfig(n_embd=512, n_layers=12, n_heads=8, seq_len=2048, vocab_size=50257)
    model = FlashSTU(config)
    input_ids = torch.randint(0, config.vocab_size, (2, 128))
    outputs = model(input_ids=input_ids)
    assert outputs.logits.shape == (2, 128, 50257)
    assert outputs[1] is outputs["logits"] is outputs.logits
    prompt = input_ids[:, :10]
    generated = model.generate(input_ids=prompt, max_length=14, temperature=0.8, top_k=40)
    assert torch.equal(generated[:, :10], prompt)
    model.save_pretrained(tmp_path / "my_flash_stu_model")
    loaded = FlashSTU.from_pretrained(tmp_path / "my_flash_stu_model")
    assert torch.equal(loaded(input_ids).logits, outputs.logits)
    loss = model(input_ids=input_ids, labels=input_ids.clone()).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    block = FlashSTUBlock(d_model=512, sequence_length=2048, num_filters=24, use_attention=False)
    x = torch.randn(2, 2048, 512)
    assert block(x, use_cache=False).shape == x.shape


def test_the_lines_of_the_readme_run_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (HERE / "README.md").read_text(encoding="utf-8")
    use, chat = re.findall(r"```python\n((?:import sys\n)?import torch\n.*?)```", text, re.DOTALL)
    Path("readme.py").write_text(use)
    names = runpy.run_path("readme.py")
    assert names["y"].shape == (2, 1948, 64)
    assert names["tokens"].shape == (2, 150)
    small_model(vocab_size=256).save_pretrained("runs/default/model")
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nand then?\n"))
    Path("chat.py").write_text(chat)
    runpy.run_path("chat.py")


@in_every_variant
def test_the_settings_of_a_model_reach_its_layers(model):
    c = model.config
    bank = stu.standard_bank(48, c.num_eigh, c.use_hankel_L, c.use_tensorized, c.max_angle)
    for layer in model.layers:
        mixer = layer.mixer
        if layer.use_attention:
            assert mixer.window == c.window_size
            assert mixer.softcap == c.softcap
        else:
            assert mixer.bank is bank
            assert mixer.use_approx == c.use_approx
            assert mixer.d_in == mixer.d_out == (c.stu_mlp_hidden_size or 32)
            assert mixer.d_in_tile == (c.d_in_tile or mixer.d_in)
            assert mixer.d_out_tile == (c.d_out_tile or mixer.d_out)


@in_every_variant
@pytest.mark.parametrize("T", [48, 120])
@torch.no_grad()
def test_model_in_pieces_and_token_by_token_equals_the_whole(T, model):
    ids = random_ids(2, T)
    whole, _ = model.hidden(ids)
    for cuts in (random_cuts(T), range(1, T)):
        y, _ = in_pieces(model.hidden, ids, cuts)
        assert relative_error(y, whole) < 1e-5


@in_every_variant
@pytest.mark.parametrize("B, T", [(1, 1), (3, 30), (1, 110)])
def test_cached_generation_equals_recomputation(B, T, model):
    prompt = random_ids(B, T)
    text = model.generate(prompt, max_new_tokens=25, temperature=0)
    assert text.shape == (B, T + 25)
    likeliest = model(text).logits.argmax(dim=-1)
    assert torch.equal(text[:, :T], prompt)
    assert torch.equal(text[:, T:], likeliest[:, T - 1 : -1])


def test_a_block_adds_a_mixer_and_an_mlp_to_its_input():
    block = FlashSTUBlock(16, 32, 8, stu_enable_mlp_sandwich=True)
    x = torch.randn(2, 32, 16)
    up, down = block.sandwich
    h = F.silu(up(block.mixer_norm(x)))
    y = x + down(block.mixer(h))
    mlp = block.mlp
    h = block.mlp_norm(y)
    h = F.silu(mlp.gate_proj(h)) * mlp.up_proj(h)
    assert torch.allclose(block(x), y + mlp.down_proj(h))


def test_blocks_stand_alone_and_in_a_module_list():
    sizes = {"d_model": 16, "sequence_length": 30, "num_filters": 8, "n_heads": 2}
    blocks = torch.nn.ModuleList()
    for use_attention in (False, True, False, True):
        blocks.append(FlashSTUBlock(**sizes, window_size=5, use_attention=use_attention))
    whole = torch.randn(2, 30, 16)
    steps = whole
    for block in blocks:
        whole = block(whole)
        steps, _ = in_pieces(block, steps, range(1, 30))
    assert relative_error(steps, whole) < 1e-5
    with pytest.raises(ValueError, match="either a config, or sizes"):
        FlashSTUBlock(**sizes, config=small_config())


@pytest.mark.parametrize("n_layers, T", [(2, 128), (48, 128), (12, 1024), (2, 8192)])
@torch.no_grad()
def test_activations_keep_their_scale_whatever_length_and_depth(n_layers, T):
    model = small_model(n_layers=n_layers, seq_len=T, window_size=64)
    x = model.tok_emb(random_ids(1, T))
    for layer in model.layers:
        x = layer(x)
        scale = x.square().mean().sqrt()
        assert scale < 0.8
    assert scale > 0.4


def test_loss_is_the_mean_cross_entropy_of_the_next_token(model):
    ids = random_ids(3, 40)
    labels = ids.clone()
    logits = model(ids[:, :-1]).logits.mT  # [B, vocab_size, T], as torch wants them
    expected = F.cross_entropy(logits, labels[:, 1:])
    assert torch.allclose(model(ids, labels=labels).loss, expected)
    labels[0, :20] = -100  # which do not count
    expected = F.cross_entropy(logits, labels[:, 1:])
    assert torch.allclose(model(ids, labels=labels).loss, expected)
    labels[:] = -100
    assert model(ids, labels=labels).loss == 0


def test_the_loss_of_a_text_in_windows_that_go_on_is_that_of_the_whole(model):
    ids = random_ids(2, 97)
    state = None
    total = 0
    for start in range(0, 96, 24):
        window = ids[:, start : start + 25]  # the last token of a window begins the next
        output = model(window, labels=window, state=state, use_cache=True)
        state = output.state
        total += output.loss
    assert torch.allclose(total / 4, model(ids, labels=ids).loss)


def test_chunked_loss_has_the_gradients_of_the_whole_and_never_holds_all_logits():
    model = small_model(vocab_size=200064, n_layers=1, n_embd=8, n_heads=1)
    ids = torch.randint(200064, (2, 201))
    with LargestTensor() as largest_tensor:
        gradients = gradients_of(model(ids, labels=ids).loss, model)
    assert largest_tensor.numel <= 2**26 < 2 * 200 * 200064
    logits = model(ids[:, :-1]).logits.mT
    expected = gradients_of(F.cross_entropy(logits, ids[:, 1:]), model)
    assert largest_error(gradients, expected) < 1e-5


@in_every_variant
def test_gradient_checkpointing_changes_no_gradient(model):
    ids = random_ids(2, 48)
    expected = gradients_of(model(ids, labels=ids).loss, model)
    model.gradient_checkpointing = True
    gradients = gradients_of(model(ids, labels=ids).loss, model)
    assert all(map(torch.equal, gradients, expected))


def test_generation_takes_the_likeliest_token_where_nothing_else_is_left(model):
    prompt = random_ids(2, 10)
    greedy = model.generate(prompt, max_length=18, temperature=0)
    for options in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-50}):
        text = model.generate(prompt, max_new_tokens=8, **options)
        assert torch.equal(text, greedy)
    assert torch.equal(model.generate(prompt, max_length=10), prompt)


def test_a_stream_yields_what_generation_appends(model):
    prompt = random_ids(2, 10)
    tokens = list(model.stream(prompt, 8, temperature=0))
    text = model.generate(prompt, max_new_tokens=8, temperature=0)
    assert torch.equal(torch.stack(tokens, dim=1), text[:, 10:])


def test_a_row_repeats_its_stop_token_until_all_rows_have_one(model):
    def write(prompt, **options):
        torch.manual_seed(0)
        text = model.generate(prompt, max_new_tokens=8, **options)
        return text[:, 10:].tolist()

    prompt = random_ids(2, 10)
    first, second = write(prompt)
    stopped = [*first[:3], *(5 * [first[2]])]
    assert write(prompt, stop_token=first[2]) == [stopped, second]
    (alone,) = write(prompt[:1])
    assert write(prompt[:1], stop_token=alone[2]) == [alone[:3]]


def test_generation_depends_on_its_generator_alone(model):
    prompt = random_ids(1, 1)
    texts = []
    for seed in (3, 3, 4):
        generator = torch.Generator().manual_seed(seed)
        text = model.generate(prompt, max_length=9, generator=generator)
        texts.append(text.tolist())
    assert texts[0] == texts[1] != texts[2]


CHOICES = [
    ({}, [0.5, 0.3, 0.15, 0.05]),
    ({"top_p": 0.6}, [5 / 8, 3 / 8, 0, 0]),
    ({"top_k": 3}, [10 / 19, 6 / 19, 3 / 19, 0]),
    ({"top_k": 3, "top_p": 0.4}, [1, 0, 0, 0]),
    ({"temperature": 0.5}, [0.685, 0.247, 0.062, 0.007]),
]


@pytest.mark.parametrize("options, expected", CHOICES)
def test_tokens_are_drawn_by_their_probability_from_the_likeliest(options, expected):
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    tokens = stu.sample(logits.expand(20000, 4), **options)
    found = tokens.bincount(minlength=4) / 20000
    expected = torch.tensor(expected)
    assert largest(found - expected) < 0.02
    assert not found[expected == 0].any()


WRONG_OPTIONS_OF_GENERATION = [
    ({}, "give one of the two lengths"),
    ({"max_length": 9, "max_new_tokens": 3}, "give one of the two lengths"),
    ({"max_length": 3}, "max_new_tokens must be an integer >= 0, got -1"),
    ({"max_new_tokens": -1}, "max_new_tokens must be an integer >= 0, got -1"),
    ({"max_new_tokens": 3, "temperature": -1}, "temperature must be .* got -1"),
    ({"max_new_tokens": 3, "temperature": math.nan}, "temperature must be .* got nan"),
    ({"max_new_tokens": 3, "top_k": 2.5}, "top_k must be an integer >= 0, got 2.5"),
    ({"max_new_tokens": 3, "top_p": 0.0}, "top_p must be more than 0"),
    ({"max_new_tokens": 3, "stop_token": 61}, "stop_token must be in the vocabulary, got 61"),
    ({"max_new_tokens": 3, "stop_token": -1}, "stop_token must be .* got -1"),
]


@pytest.mark.parametrize("options, message", WRONG_OPTIONS_OF_GENERATION)
def test_generation_says_what_is_wrong_with_its_options(options, message):
    with pytest.raises(ValueError, match=message):
        small_model().generate(random_ids(1, 4), **options)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_weights_that_are_not_finite_do_not_speak(model, temperature):
    model.layers[1].mixer.c_proj.weight.data *= math.nan
    with pytest.raises(ValueError, match="logits must be finite"):
        model.generate(random_ids(1, 4), max_length=5, temperature=temperature)


ONE_ID = torch.ones(1, 1).long()
FOUR_IDS = torch.ones(1, 4).long()
WRONG_IDS = [
    ([[1, 2]], None, r"token ids must be a tensor.*got \[\[1, 2\]\]"),
    (FOUR_IDS[0], None, r"length >= 1\], got \[4\]"),
    (FOUR_IDS[:, :0], None, r"length >= 1\], got \[1, 0\]"),
    (FOUR_IDS.float(), None, "token ids must be integers, got torch.float32"),
    (FOUR_IDS.bool(), None, "token ids must be integers, got torch.bool"),
    (61 * FOUR_IDS, None, r"token id 61 is not in \[0, 61\)"),
    (FOUR_IDS, FOUR_IDS[0], r"got \[4\]"),
    (ONE_ID, ONE_ID, r"shape of input_ids, length > 1, got \[1, 1\]"),
    (FOUR_IDS, FOUR_IDS[:, :3], r"shape of input_ids, length > 1, got \[1, 3\]"),
]


@pytest.mark.parametrize("ids, labels, message", WRONG_IDS)
def test_token_ids_and_labels_have_one_door(ids, labels, message):
    with pytest.raises(ValueError, match=message):
        small_model()(ids, labels)


def test_integers_of_any_width_and_a_batch_of_none_are_legal(model):
    ids = random_ids(2, 20)
    loss = model(ids, ids).loss
    assert torch.equal(model(ids.int(), ids.short()).loss, loss)
    none = ids[:0]
    assert model(none).logits.shape == (0, 20, 61)
    assert model(none, none).loss == 0
    assert model.generate(none, max_length=23).shape == (0, 23)


@pytest.mark.parametrize("n", [1, 5, 12])
def test_a_text_goes_on_from_the_state_that_a_stream_left(model, n):
    """... in its middle or at its end. Its last token begins what follows."""
    text = random_ids(2, 30)
    state = []
    stream = model.stream(text, 12, temperature=0, state=state)
    for token in itertools.islice(stream, n):
        text = torch.cat([text, token[:, None]], dim=1)
    text = torch.cat([text, random_ids(2, 4)], dim=1)
    not_read = text[:, -5:]
    found = list(model.stream(not_read, 6, temperature=0, state=state))
    expected = list(model.stream(text, 6, temperature=0))
    assert all(map(torch.equal, found, expected))


@in_every_variant
@torch.no_grad()
def test_a_state_is_repeated_for_several_rows_and_the_original_stays(model):
    prompt = random_ids(2, 30)
    more = random_ids(4, 7)
    rows = [1, 0, 1, 1]
    texts = torch.cat([prompt[rows], more], dim=1)
    expected, _ = model.hidden(texts)
    _, state = model.hidden(prompt, use_cache=True)
    for _ in range(2):
        copied = stu.select_rows(state, rows)
        found, _ = model.hidden(more, copied, use_cache=True)
        assert relative_error(found, expected[:, 30:]) < 1e-5


def addresses(state):
    return [tensor.data_ptr() for tensor in tree_leaves(state)]


@torch.no_grad()
def test_a_token_has_fixed_shapes_and_places_and_compiles_to_one_graph(model):
    prompt, *tokens = random_ids(2, 20).split([10] + 10 * [1], dim=1)
    _, state = model.hidden(prompt, use_cache=True)
    places = addresses(state)
    expected_state = stu.select_rows(state, [0, 1])
    compiled = torch.compile(model.hidden, fullgraph=True, backend="aot_eager")
    for i, token in enumerate(tokens):
        expected, expected_state = model.hidden(token, expected_state, use_cache=True)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            found, state = compiled(token, state, use_cache=True)
        assert relative_error(found, expected) < 1e-5
    assert addresses(state) == places


@pytest.mark.parametrize("layer", [STU(8, 8, 30), SlidingWindowAttention(8, 2, 5)])
def test_one_can_differentiate_through_the_pieces_of_a_sequence(layer):
    x = torch.randn(2, 24, 8)
    y, _ = in_pieces(layer, x, [7, 8, 9, 20])
    gradients = gradients_of(y.square().sum(), layer)
    assert largest_error([y, *gradients], value_and_gradients(layer, x)) < 1e-5


WRONG_STATES = [
    ({"n_layers": 2}, 2, "a state of 4 layers, but there are 2"),
    ({"window_size": 11}, 2, "wants a state"),
    ({"n_embd": 64}, 2, "wants a state"),
    ({"n_heads": 2}, 2, "wants a state"),
    ({}, 1, "this layer, with this batch, wants a state"),
]


@pytest.mark.parametrize("changes, rows, message", WRONG_STATES)
def test_a_state_of_another_model_or_batch_is_refused(model, changes, rows, message):
    state = model(random_ids(2, 4), use_cache=True).state
    with pytest.raises(ValueError, match=message):
        small_model(**changes)(random_ids(rows, 1), state=state)


@pytest.mark.parametrize("layer", [STU(6, 6, 30), SlidingWindowAttention(6, 1, 4)])
def test_a_mask_is_of_ones_and_zeros_and_hides_whatever_it_hides(layer):
    x = torch.randn(2, 9, 6)
    alone = layer(x[:1, 4:])
    mask = torch.ones(2, 9).int()
    mask[0, :4] = 0
    for hidden in (math.nan, math.inf, 1e30):
        x[0, :4] = hidden
        longer = torch.cat([1 - mask, mask], dim=1)  # its last columns count
        for same in (mask, mask.bool(), mask.float(), longer):
            y = layer(x, attention_mask=same)
            assert relative_error(y[:1, 4:], alone) < 1e-5
    for wrong in (mask - 1, mask * 0.5, mask[:, :1], mask[:1], mask[0]):
        with pytest.raises(ValueError, match="attention_mask must be"):
            layer(x, attention_mask=wrong)


WRONG_CONFIGS = [
    ({"n_embd": "32"}, "n_embd must be an integer >= 1, got '32'"),
    ({"n_layers": True}, "n_layers must be an integer >= 1, got True"),
    ({"seq_len": 4.5}, "seq_len must be an integer >= 1, got 4.5"),
    ({"stu_mlp_hidden_size": 2.5}, "stu_mlp_hidden_size must be an integer >= 1, got 2.5"),
    ({"window_size": 2.5}, "window_size must be an integer >= 0, got 2.5"),
    ({"window_size": (4, 4)}, r"window_size must be an integer >= 0, got \(4, 4\)"),
    ({"mlp_scale": -1.0}, "mlp_scale must be a number from 0 to .* got -1.0"),
    ({"dropout": 1.1}, "dropout must be a number from 0 to 1, got 1.1"),
    ({"softcap": math.nan}, "softcap must be a number from 0 to .* got nan"),
    ({"max_angle": -1}, "max_angle must be a number from 0 to 90, got -1"),
    ({"use_approx": "False"}, "use_approx must be True or False, got 'False'"),
    ({"torch_dtype": "int32"}, "torch_dtype must be a floating-point dtype, got int32"),
    ({"n_heads": 5}, "n_heads = 5 does not cut 32 channels"),
    ({"use_attn": False, "use_stu": False}, "no layer is left"),
]


@pytest.mark.parametrize("changes, message", WRONG_CONFIGS)
def test_config_says_what_is_inconsistent(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**changes)


def test_config_takes_numbers_of_numpy_and_no_unknown_fields():
    config = small_config(n_embd=np.int64(32), mlp_scale=np.float32(2))
    assert type(config.n_embd) is int
    assert type(config.mlp_scale) is float
    with pytest.raises(TypeError, match="n_embed"):
        FlashSTUConfig(n_embed=3)


def test_a_setting_assigned_later_is_checked_where_a_model_is_made():
    config = small_config()
    config.torch_dtype = torch.bfloat16
    assert FlashSTU(config).tok_emb.weight.dtype == torch.bfloat16
    config.use_approx = "False"
    with pytest.raises(ValueError, match="use_approx must be True or False"):
        FlashSTU(config)


def test_a_model_made_on_the_meta_device_computes_when_it_gets_memory(model):
    with torch.device("meta"):
        made = small_model()
    made.to_empty(device="cpu").load_state_dict(model.state_dict())
    ids = random_ids(1, 30)
    assert torch.equal(made(ids).logits, model(ids).logits)


# --------------------------------------------------------------------------------------------------
# stu.py: saving and loading


@pytest.fixture
def saved(model, tmp_path):
    """A folder in which the model of the test was saved."""
    model.save_pretrained(tmp_path)
    return tmp_path


def assert_comes_back(folder, model):
    """The model that is loaded from this folder computes the same, bit for bit."""
    loaded = FlashSTU.from_pretrained(folder)
    ids = random_ids(2, 20)
    assert loaded.config == model.config
    assert not loaded.training
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def assert_refused(folder, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        FlashSTU.from_pretrained(folder)


def edit_config(folder, old, new):
    text = (folder / "config.json").read_text()
    assert old in text
    (folder / "config.json").write_text(text.replace(old, new))


def edit_weights(folder, **tensors):
    """They have no copy of the config then, as if transformers had saved them."""
    file = folder / "model.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(file) | tensors, file)


@in_every_variant
def test_a_saved_model_comes_back_bit_equal(model, saved):
    assert sorted(os.listdir(saved)) == ["config.json", "model.safetensors", "stu.py"]
    assert_comes_back(saved, model)
    model.bfloat16().save_pretrained(saved)  # cast after it was made
    model.config.torch_dtype = "bfloat16"
    assert_comes_back(saved, model)
    assert '"torch_dtype": "bfloat16"' in (saved / "config.json").read_text()


def test_nothing_else_in_a_folder_is_taken_for_the_model(saved):
    (saved / "mine").mkdir()
    for name in ("model_old", "model2", "model-00001-of-00001"):
        shutil.copyfile(saved / "model.safetensors", saved / f"{name}.safetensors")
    (saved / "model.safetensors.index.json").write_text("{}")  # of a model in parts
    other = small_model(n_layers=6)
    other.save_pretrained(saved)
    assert_comes_back(saved, other)
    assert (saved / "mine").exists()


def test_weights_that_are_views_of_one_buffer_are_saved(model, tmp_path):
    parameters = list(model.parameters())
    buffer = torch.nn.utils.parameters_to_vector(parameters).detach()
    torch.nn.utils.vector_to_parameters(buffer, parameters)
    model.save_pretrained(tmp_path)
    assert_comes_back(tmp_path, model)


@pytest.mark.parametrize("K", [5, 24])
def test_filters_of_ones_own_are_saved_with_the_model(K, model, tmp_path):
    assert "layers.2.mixer.filters" not in model.state_dict()
    filters = torch.randn(48, K)
    model.layers[2].mixer = STU(32, 32, 48, precomputed_filters=filters)
    model.save_pretrained(tmp_path)
    assert_comes_back(tmp_path, model)
    with pytest.raises(ValueError, match="mixer.filters have length 48, not 40"):
        small_model(seq_len=40).load_state_dict(model.state_dict())


def test_an_output_matrix_that_fine_tuning_added_is_the_embedding(model, saved):
    embedding = model.tok_emb.weight.detach()
    edit_weights(saved, **{"lm_head.weight": embedding.clone()})
    assert_comes_back(saved, model)
    edit_weights(saved, **{"lm_head.weight": embedding + 1})
    assert_refused(saved, "lm_head.weight is not the embedding")


def test_a_folder_without_weights_or_with_two_kinds_of_them_is_refused(saved):
    assert_refused(saved / "none", f"has a model.safetensors; there is none in {saved}/none")
    (saved / "model.safetensors.index.json").write_text("{}")
    assert_refused(saved, "remove the one that is old")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("damaged", [b"", b"\xff\xfe", b'{"n_embd": 3'])
def test_a_damaged_file_is_named(name, damaged, saved):
    (saved / name).write_bytes(damaged)
    assert_refused(saved, f"{name} is damaged")


WRONG_CHANGES = [
    ('"n_embd": 32', '"n_embd": 64', "is not the one that the weights were saved with"),
    ('"softcap": 50', '"softcap": 40', "is not the one that the weights were saved with"),
    ('"n_layers": 4', '"n_layers": 10000000', "10000000 layers in config.json, weights of 4"),
    ('"n_embd"', '"n_embed"', "config.json lacks n_embd"),
    ('"bias": false', '"bias": 3', "bias must be True or False"),
]


@pytest.mark.parametrize("old, new, message", WRONG_CHANGES)
def test_a_config_that_is_not_of_its_weights_is_refused(old, new, message, saved):
    edit_config(saved, old, new)
    assert_refused(saved, message)


def test_weights_without_a_config_of_their_own_are_held_against_that_of_the_folder(model, saved):
    edit_weights(saved)
    assert_comes_back(saved, model)
    edit_config(saved, '"bias": false', '"bias": true')
    assert_refused(saved, "config.json and weights do not fit")


@pytest.mark.parametrize("n_steps", range(4))
def test_a_save_that_ends_anywhere_leaves_one_whole_model(n_steps, model, saved, monkeypatch):
    """... the old one or the new one: new weights never meet an old config."""
    new = small_model(window_size=3)
    replace = Path.replace
    done = []

    def replace_or_die(source, target):
        if len(done) == n_steps:
            raise KeyboardInterrupt
        done.append(target)
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", replace_or_die)
    with contextlib.suppress(KeyboardInterrupt):
        new.save_pretrained(saved)
    assert len(done) == n_steps
    if n_steps in (1, 2):
        assert_refused(saved, "delete config.json, and it is used")
        (saved / "config.json").unlink()
    assert_comes_back(saved, model if n_steps == 0 else new)


# --------------------------------------------------------------------------------------------------
# stu.py: compilers, and what an import needs


@pytest.mark.parametrize("use_attention", [False, True])
def test_a_block_compiles_without_graph_breaks(use_attention):
    block = FlashSTUBlock(16, 32, 8, use_attention, n_heads=2)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 32, 16)
    expected = value_and_gradients(block, x)
    assert largest_error(value_and_gradients(compiled, x), expected) < 1e-4


def test_a_compiled_model_trains_and_evaluates_like_the_plain_one():
    model = small_model(n_layers=2)
    compiled = torch.compile(model, backend="aot_eager")
    ids = random_ids(2, 40)
    with torch.no_grad():
        found = compiled(ids).logits
    assert relative_error(found, model(ids).logits) < 1e-5
    model.train()
    found = gradients_of(compiled(ids, ids).loss, model)
    expected = gradients_of(model(ids, ids).loss, model)
    assert largest_error(found, expected) < 1e-4


def test_import_needs_only_torch_and_numpy():
    code = """
import sys, stu
optional = {"datasets", "matplotlib", "safetensors", "tiktoken", "tokenizers", "transformers"}
print(*optional & set(sys.modules), "FlashSTUForCausalLM" in vars(stu))
"""
    output = subprocess.check_output([sys.executable, "-c", code], cwd=HERE, text=True)
    assert output == "False\n"


# --------------------------------------------------------------------------------------------------
# stu.py: it learns


def experiment(name):
    """The functions of a script in experiments/, by name."""
    return runpy.run_path(str(HERE / "experiments" / f"{name}.py"))


def learn(ask, num_steps, rate, **options):
    """Share of right answers of a two-layer model after some steps; ask(model) -> loss, share."""
    torch.manual_seed(0)
    model = small_model(n_layers=2, n_heads=2, vocab_size=64, softcap=0.0, **options)
    optimizers = experiment("recall")["make_optimizers"](model)
    for step in range(num_steps):
        loss, _ = ask(model)
        loss.backward()
        falling = 2 - 2 * step / num_steps
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate * min(1, falling)
            optimizer.step()
        model.zero_grad()
    _, share = ask(model)
    return share.item()


def test_the_hybrid_recalls_what_neither_kind_of_layer_recalls_alone():
    """The STU hands each value its key, the token before it, and attention finds it."""
    recall = experiment("recall")

    def ask(model):
        return recall["ask"](model, recall["associative_recall"], 64)

    options = {"n_embd": 64, "mlp_scale": 1, "num_eigh": 16}
    options |= {"seq_len": 32, "window_size": 32}
    assert learn(ask, 100, 1e-2, **options) > 0.99
    assert learn(ask, 100, 1e-2, **options, use_stu=False) < 0.5
    assert learn(ask, 100, 1e-2, **options, use_attn=False) < 0.5


OCTILES = torch.tensor([-1.15, -0.67, -0.32, 0, 0.32, 0.67, 1.15])


def remember(model):
    """Random signs; the label is the octile of their exponential average, a memory of 300 steps."""
    bits = torch.randint(2, (8, 512))
    decay = 0.99 ** torch.arange(512)
    weights = decay / decay.norm()
    average = stu.fft_conv(2.0 * bits[:, None] - 1, weights[None])
    labels = torch.bucketize(average[:, 0, 100:].contiguous(), OCTILES)
    logits = model(bits).logits[:, 100:]
    loss = F.cross_entropy(logits.mT, labels)
    right = logits.argmax(dim=-1) == labels
    return loss, right.float().mean()


def test_the_hybrid_remembers_beyond_the_attention_window():
    options = {"mlp_scale": 2, "seq_len": 512, "window_size": 64}
    assert learn(remember, 150, 2e-2, **options) > 0.85
    assert learn(remember, 150, 2e-2, **options, use_stu=False) < 0.65


def follower(row, t, back):
    """What came after the last time that the `back` tokens up to t were there; 0 if never."""
    asked = row[t + 1 - back : t + 1]
    for end in range(t, back - 1, -1):
        if row[end - back : end] == asked:
            return row[end]
    return 0


@pytest.mark.parametrize("task", ["associative recall", "induction", "selective copying"])
def test_what_the_tasks_ask_for_stands_in_what_the_model_has_read(task):
    recall = experiment("recall")
    questions, _ = recall["TASKS"][task]
    back = 2 if task == "induction" else 1

    def oracle(ids):
        answers = torch.zeros_like(ids)
        for row, row_of_answers in zip(ids.tolist(), answers):
            for t in range(len(row)):
                row_of_answers[t] = follower(row, t, back)
        if task == "selective copying":
            letters = ids[ids < 62]
            answers[:, 48:] = letters.view(-1, 8)
        logits = 100.0 * F.one_hot(answers, 64)
        return stu.Output(None, logits, None)

    _, right = recall["ask"](oracle, questions, 50)
    assert right > 0.9


# --------------------------------------------------------------------------------------------------
# lds.py: the system


diagonal_or_dense = pytest.mark.parametrize("diagonal", [True, False])


@pytest.mark.parametrize("T", [1, 2, 37, 1500])
@diagonal_or_dense
def test_a_system_equals_its_definition_whole_and_in_pieces(diagonal, T):
    system = LDS(12, 3, 2, diagonal=diagonal).double()
    torch.nn.init.normal_(system.h0)
    u = torch.randn(4, T, 3).double()
    h0 = system.h0.expand(4, 12)
    states = system.states_step_by_step(u, h0)
    expected = states @ system.C.T
    assert relative_error(system(u), expected) < 1e-12
    assert relative_error(system(u[0]), expected[0]) < 1e-12  # without a batch
    y, state = in_pieces(system, u, random_cuts(T))
    assert relative_error(y, expected) < 1e-12
    assert relative_error(state, states[:, -1]) < 1e-12
    assert relative_error(system.float()(u), expected) < 1e-5


@diagonal_or_dense
def test_every_part_of_a_system_gets_its_gradient(diagonal):
    system = LDS(5, 2, 3, diagonal=diagonal).double()
    u = torch.randn(2, 9, 2).double()

    def function(*parameters):
        return system(u)

    parameters = tuple(system.parameters())
    assert torch.autograd.gradcheck(function, parameters)


def test_random_lds_has_the_poles_it_was_asked_for():
    system = random_LDS(400, 10, 5, lower_bound=0.3, spectral_radius=0.9)
    size = system.A.detach().abs()
    assert size.max() == size[0] == pytest.approx(0.9)
    assert 0.3 <= size.min() < 0.35
    assert 100 < (system.A < 0).sum() < 300


# --------------------------------------------------------------------------------------------------
# lds.py: the learner

BANKS = [
    (1, 1, False),
    (33, 33, False),
    (128, 24, False),
    (128, 24, True),
    (1024, 64, False),
]
in_every_length = pytest.mark.parametrize("L, K, use_hankel_L", BANKS)
in_both_backends = pytest.mark.parametrize("backend", ["spectral", "lds"])


@in_every_length
def test_white_filters_are_orthonormal_and_span_the_bank(L, K, use_hankel_L):
    phi = get_spectral_filters(L, K, use_hankel_L, dtype=torch.float64)
    bank = phi if use_hankel_L else both_signs(phi)
    # √(1 - lag / L) is the weight of a lag; with it the white filters are orthonormal.
    lag = torch.arange(L).double()[:, None]
    weight = (1 - lag / L).sqrt()
    white = weight * white_filters(phi, use_hankel_L)
    products = white.T @ white
    assert largest(products - torch.eye(len(products))) < 1e-9
    bank = weight * bank
    rest = bank - white @ (white.T @ bank)
    assert largest(rest.norm(dim=0)) < 1e-4 * largest(bank.norm(dim=0))


def test_white_input_gives_uncorrelated_features_of_unit_variance():
    model = MiniSTU(64, 8, 1, 1)
    x = torch.randn(4000, 64, 1)
    features = model.features(x).flatten(0, 1)
    covariance = features.T @ features / len(features)
    assert largest(covariance - torch.eye(len(covariance))) < 0.05


@pytest.mark.parametrize("use_hankel_L", [True, False])
@in_both_backends
def test_ministu_equals_the_papers_formula(backend, use_hankel_L):
    model = MiniSTU(50, 10, 3, 2, backend=backend, use_hankel_L=use_hankel_L)
    x = torch.randn(2, 50, 3)
    expected = formula(model.stu, x)
    assert relative_error(model(x), expected) < 1e-4
    assert relative_error(model(x[0]), expected[0]) < 1e-4  # without a batch
    assert relative_error(model(x[:, :20]), expected[:, :20]) < 1e-4


@in_every_length
def test_both_backends_of_ministu_agree_in_value_and_gradient(L, K, use_hankel_L):
    options = {"use_hankel_L": use_hankel_L}
    convolved = MiniSTU(L, K, 6, 4, **options)
    recurrent = MiniSTU(L, K, 6, 4, **options, backend="lds")
    assert recurrent.stu.backend == "lds"
    recurrent.load_state_dict(convolved.state_dict())
    x = torch.randn(2, L, 6)
    expected = value_and_gradients(convolved, x)
    assert largest_error(value_and_gradients(recurrent, x), expected) < 1e-3


def ringing(degrees, radius=0.99):
    """A system of one input and one output, with the poles radius · e^(±iθ)."""
    system = LDS(2, 1, 1, diagonal=False)
    c = radius * math.cos(math.radians(degrees))
    s = radius * math.sin(math.radians(degrees))
    system.A.data = torch.tensor([[c, -s], [s, c]])
    return system


def unlearned(system, K=24, **options):
    """The share of the outputs' variance that least squares leaves, at length 128."""
    model = MiniSTU(128, K, 1, 1, **options)
    x, y = sample(system, 64, 128)
    model.fit(x, y)
    return unseen_error(model, system, 128) / y.var()


def test_decays_of_both_signs_are_learned_and_slow_ringing_is_not():
    assert unlearned(ringing(0)) < 1e-11
    assert unlearned(ringing(180)) < 1e-11
    assert unlearned(ringing(1)) < 1e-7
    assert 1e-8 < unlearned(ringing(5)) < 1e-4
    assert unlearned(ringing(20)) > 1e-2
    assert unlearned(ringing(90)) > 0.3
    assert unlearned(ringing(20, radius=0.5)) < 1e-11  # what has died away soon may ring


@in_both_backends
def test_filters_of_a_sector_learn_what_rings_in_it(backend):
    options = {"max_angle": 20, "backend": backend}
    assert unlearned(ringing(20), K=36, **options) < 1e-10
    with pytest.raises(ValueError, match="real decays, max_angle=0"):
        MiniSTU(128, 36, 1, 1, **options).to_lds()


def test_filters_of_a_sector_that_is_not_told_have_no_recurrence_of_real_decays():
    phi = get_spectral_filters(128, 40, dtype=torch.float64, max_angle=20)
    options = {"precomputed_filters": phi, "backend": "lds"}
    assert unlearned(ringing(20), K=40, **options) < 1e-10
    with pytest.raises(ValueError, match="filters that are sums of decays"):
        MiniSTU(128, 40, 1, 1, **options).to_lds()


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
def test_the_mlp_acts_on_the_outputs_of_the_stu(activation):
    options = {"mlp_hidden_dim": 20, "mlp_dropout": 0.1, "mlp_activation": activation}
    model = MiniSTU(128, 24, 10, 5, use_mlp=True, **options)
    x = torch.randn(2, 128, 10)
    assert not torch.equal(model(x), model(x))  # dropout
    model.eval()
    first, _, _, last = model.mlp
    assert first.weight.shape == (20, 5)
    hidden = first(model.stu(x))
    hidden = getattr(F, activation)(hidden)
    assert torch.allclose(model(x), last(hidden))


def test_a_batch_of_none_has_an_answer_of_none():
    x = torch.randn(0, 20, 3)
    for backend in ("spectral", "lds"):
        model = MiniSTU(32, 8, 3, 2, backend=backend)
        assert model(x).shape == (0, 20, 2)
    for diagonal in (True, False):
        y, state = LDS(4, 3, 2, diagonal=diagonal)(x, use_cache=True)
        assert y.shape == (0, 20, 2)
        assert state.shape == (0, 4)


@pytest.mark.parametrize("state_dim, L, sequences", [(20, 128, 128), (256, 1024, 16)])
def test_least_squares_finds_the_system(state_dim, L, sequences):
    system = random_LDS(state_dim, 10, 5)
    model = MiniSTU(L, 24, 10, 5)
    x, y = sample(system, sequences, L)
    model.fit(x, y)
    error = unseen_error(model, system, L)
    assert error < 1e-12
    assert error < 1e-10 * y.var()


def test_least_squares_survives_inputs_that_do_not_vary():
    system = random_LDS(8, 3, 2)
    x = torch.randn(50, 64, 3)
    x[..., 1] = 0  # a channel never seen
    y = system(x)
    model = MiniSTU(64, 16, 3, 2).fit(x, y)
    assert relative_error(model(x), y) < 1e-4


def test_gradient_descent_finds_the_system():
    system = random_LDS(20, 10, 5)
    options = {"num_steps": 400, "batch_size": 16, "learning_rate": 2e-3}
    model, losses = train_stu_on_lds(system, 128, 24, verbose=False, **options)
    assert len(losses) == 400
    assert not model.training
    assert unseen_error(model, system, 128) < 1e-9


def test_gradient_descent_with_an_mlp_lowers_the_loss():
    system = random_LDS(8, 4, 2)
    mlp = {"use_mlp": True, "mlp_num_layers": 3, "mlp_activation": "tanh"}
    _, losses = train_stu_on_lds(system, 32, 8, num_steps=60, learning_rate=1e-2, **mlp)
    assert losses[-1] < 0.5 * losses[0]


def test_the_calls_of_the_published_package_work_as_they_are(capsys):
    """Its example script and its README, with only the import changed."""
    device = torch.device("cpu")
    system = random_LDS(state_dim=20, input_dim=10, output_dim=5, lower_bound=0.1, device=device)
    assert system.device == device
    model, losses = train_stu_on_lds(
        lds=system,
        seq_len=32,
        num_filters=8,
        num_steps=20,
        batch_size=8,
        learning_rate=1e-2,
        verbose=True,
    )
    assert losses[-1] < losses[0]
    assert "20/20" in capsys.readouterr().out
    n_params = sum(p.numel() for p in model.parameters())
    assert model.get_num_params() == n_params
    x = torch.randn(10, 32, 10, device=device, dtype=torch.float32)
    assert model(x).shape == (10, 32, 5)
    assert system(x).shape == (10, 32, 5)
    plain = LDS(state_dim=20, input_dim=10, output_dim=5, dtype=torch.float64, device=None)
    assert plain(x).dtype == plain.dtype == torch.float64
    assert plain.h0.tolist() == [0.0] * 20


def test_arguments_that_other_packages_order_otherwise_are_refused_by_position():
    with pytest.raises(TypeError, match="positional"):
        MiniSTU(32, 8, 4, 2, False)
    with pytest.raises(TypeError, match="positional"):
        train_stu_on_lds(LDS(4, 3, 2), 32, 8, 10)


@pytest.mark.parametrize("L, use_hankel_L", [(128, False), (512, False), (64, True)])
def test_a_fitted_stu_is_a_linear_dynamical_system(L, use_hankel_L):
    model = MiniSTU(L, 20, 4, 3, use_hankel_L=use_hankel_L)
    x, y = sample(random_LDS(20, 4, 3), 64, L)
    system = model.fit(x, y).to_lds()
    assert system.A.ndim == 1
    assert largest(system.A) < 1
    few = x[:2]
    assert largest(system(few) - model(few)) < 1e-3 * y.std()
    long_after = system(few.repeat(1, 20, 1))[:, -L:]
    assert long_after.std() < 3 * y.std()


# ------------------------------------------------------------------------------------------------------------
# lds.py: the demo

SMALL_DEMO = "--state_dim 6 --input_dim 3 --output_dim 2 --seq_len 24 --num_filters 6"


def run_as_main(monkeypatch, script, flags):
    monkeypatch.setattr("sys.argv", [script, *flags.split()])
    runpy.run_path(str(HERE / script), run_name="__main__")


@pytest.mark.parametrize("steps", [0, 1, 12])
@pytest.mark.parametrize(
    "name, begins", [("a.png", b"\x89PNG"), ("a.gif", b"GIF8"), ("a.pdf", b"%PDF")]
)
def test_the_demo_prints_and_draws_in_the_format_of_the_name(
    tmp_path, monkeypatch, capsys, name, begins, steps
):
    run_as_main(monkeypatch, "lds.py", f"{SMALL_DEMO} --steps {steps} --out {tmp_path}/{name}")
    assert (tmp_path / name).read_bytes().startswith(begins)
    printed = capsys.readouterr().out
    assert "least squares" in printed
    assert ("left" in printed) == (steps > 0)
    assert "\r" not in printed


def test_on_a_terminal_the_line_moves_and_elsewhere_there_are_ten(monkeypatch, capsys):
    options = {"num_steps": 100, "batch_size": 2}
    train_stu_on_lds(random_LDS(4, 3, 2), 16, 4, **options)
    assert len(capsys.readouterr().out.splitlines()) == 10
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    train_stu_on_lds(random_LDS(4, 3, 2), 16, 4, **options)
    printed = capsys.readouterr().out
    assert printed.count("\r") == 99
    assert printed.count("\n") == 1


def test_the_curve_falls_as_the_losses_fall():
    text = lds_module.curve([10.0**-i for i in range(50)], final_length=100)
    assert len(text) == 40
    assert text[0] == "█"
    assert text[:20] == "".join(sorted(text[:20], reverse=True))
    assert text[20:] == 20 * "·"


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--out lds.txt", "must end in .png"),
        ("--out nowhere/lds.png", "cannot write a regular file"),
        ("--out folder.png", "cannot write a regular file"),
        ("--steps -1", "number of steps must be an integer >= 0, got -1"),
        ("--batch_size 0", "batch_size must be an integer >= 1, got 0"),
        ("--state_dim 0", "state_dim must be an integer >= 1, got 0"),
        ("--num_filters 25", "num_eigh must be at most 24"),
        ("--learning_rate nan", "learning_rate must be a number"),
        ("--learning_rate 1e300", "learning_rate must be a number"),
        ("--learning_rate 900", "training diverged"),
        ("--lower_bound 2", "lower_bound = 2.0"),
        ("--spectral_radius nan", "spectral_radius = nan"),
    ],
)
def test_the_demo_says_what_it_cannot_do(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(SystemExit) as end:
        run_as_main(monkeypatch, "lds.py", f"{SMALL_DEMO} {flags}")
    assert message in f"{end.value}{capsys.readouterr().err}"


# ------------------------------------------------------------------------------------------------------------
# lds.py: bad input


def not_a_number(*shape):
    x = torch.zeros(shape)
    x[..., 0] = math.nan
    return x


def ministu(**options):
    return MiniSTU(8, 4, 3, 2, **options)


ONES = torch.ones(2, 8, 3)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MiniSTU(8, 9, 3, 2), "num_eigh must be at most 8 at length 8, got 9"),
        (lambda: MiniSTU(8, 0, 3, 2), "num_eigh"),
        (lambda: MiniSTU(8.5, 4, 3, 2), "seq_len must be an integer >= 1, got 8.5"),
        (lambda: MiniSTU(8, 4, 2.5, 2), "input_dim must be an integer >= 1, got 2.5"),
        (lambda: MiniSTU(8, 4, 3, True), "output_dim must be an integer >= 1, got True"),
        (lambda: ministu(backend="scan"), "backend"),
        (lambda: ministu(use_mlp="false"), "use_mlp must be True or False, got 'false'"),
        (lambda: ministu(use_hankel_L="no"), "use_hankel_L must be True or False, got 'no'"),
        (lambda: ministu(use_mlp=True, mlp_activation="swish"), "relu, gelu or tanh"),
        (lambda: ministu(use_mlp=True, mlp_num_layers=0), "mlp_num_layers"),
        (lambda: ministu(use_mlp=True, mlp_hidden_dim=2.5), "mlp_hidden_dim"),
        (lambda: ministu(precomputed_filters=torch.ones(7, 4)), r"\[8, 4\]"),
        (lambda: ministu()(torch.ones(1, 8, 4)), "length >= 1, 3"),
        (lambda: ministu()(torch.ones(1, 9, 3)), "longer than self.seq_len = 8"),
        (lambda: ministu()(ONES + 1j), "real"),
        (lambda: ministu()(not_a_number(1, 8, 3)), "8 NaN"),
        (lambda: ministu().fit(ONES, not_a_number(2, 8, 2)), "targets holds 16 NaN"),
        (lambda: ministu().fit(ONES, torch.ones(2, 7, 2)), "equally many"),
        (lambda: ministu(use_mlp=True).fit(ONES, ONES[..., :2]), "descent"),
        (lambda: ministu(use_mlp=True).to_lds(), "use_mlp"),
        (lambda: LDS(0, 3, 2), "state_dim must be an integer >= 1, got 0"),
        (lambda: LDS(4, 3, 2.5), "output_dim must be an integer >= 1, got 2.5"),
        (lambda: LDS(4, 3, 2, diagonal="false"), "diagonal must be True or False, got 'false'"),
        (lambda: LDS(4, 3, 2)(torch.ones(1, 8, 4)), "length >= 1, 3"),
        (lambda: LDS(4, 3, 2)(ONES + 1j), "real"),
        (lambda: LDS(4, 3, 2)(ONES[:1], torch.ones(3, 4)), r"\[1, 4\], got torch.float32 \[3, 4\]"),
        (lambda: LDS(4, 3, 2)(ONES, torch.ones(2, 4) + 1j), "state must be real"),
        (lambda: random_LDS(4, 3, 2, lower_bound=2.0), "lower_bound = 2.0"),
        (lambda: random_LDS(4, 3, 2, spectral_radius=1.5), "spectral_radius = 1.5"),
        (lambda: train_stu_on_lds(LDS(4, 3, 2), 8, 4, learning_rate=-1), "learning_rate"),
        (lambda: train_stu_on_lds(LDS(4, 3, 2), 8, 4, learning_rate=math.nan), "learning_rate"),
        (lambda: train_stu_on_lds(LDS(4, 3, 2), 8, 4, num_steps=-1), "number of steps"),
        (lambda: train_stu_on_lds(LDS(4, 3, 2), 8, 4, batch_size=0), "batch_size"),
    ],
)
def test_lds_says_what_is_wrong_with_its_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_training_that_diverges_says_so():
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        train_stu_on_lds(
            random_LDS(4, 3, 2), 32, 8, num_steps=20, learning_rate=900.0, verbose=False
        )


# ------------------------------------------------------------------------------------------------------------
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
def test_an_experiment_prints_and_draws(tmp_path, monkeypatch, capsys, script, flags, said):
    monkeypatch.chdir(tmp_path)
    run_as_main(monkeypatch, f"experiments/{script}", f"{flags} --out picture.png")
    assert Path("picture.png").read_bytes().startswith(b"\x89PNG")
    assert said in capsys.readouterr().out


def test_the_benchmark_prints_a_row_for_each_comparison(monkeypatch, capsys):
    run_as_main(monkeypatch, "experiments/bench.py", "--tiny")
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 5
    ours, theirs = re.findall(r"[0-9.]+e-[0-9]+|0\.[0-9]+", rows[2].split("errors")[1])[:2]
    assert float(ours) < 1e-6
    assert float(theirs) > 1e-2  # of eigh
    assert "differ by" in rows[3]
    assert "differ by" in rows[4]


def test_the_robot_is_simulated_once_and_predicted(tmp_path, monkeypatch, capsys):
    reason = 'needs pip install "gymnasium[mujoco]"'
    gymnasium = pytest.importorskip("gymnasium", reason=reason)
    pytest.importorskip("mujoco", reason=reason)
    monkeypatch.chdir(tmp_path)
    flags = "--trajectories 10 --seconds 0.01 --out picture.png"
    run_as_main(monkeypatch, "experiments/ant.py", flags)
    data = torch.load("data/ant-10.pt")
    assert data.shape == (10, 129, 35)
    assert data.isfinite().all()
    assert data[..., 27:].abs().max() <= 1
    assert Path("picture.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(gymnasium, "make", None)  # what is there is not simulated again
    run_as_main(monkeypatch, "experiments/ant.py", flags)
    printed = capsys.readouterr().out
    for name in ("STU-T", "full STU", "hybrid", "attention", "Mamba-2", "no change", "50 alone"):
        assert name in printed


def test_the_robot_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gymnasium", None)  # as if it were not installed
    with pytest.raises(SystemExit, match="pip install"):
        run_as_main(monkeypatch, "experiments/ant.py", "")


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A small model of bytes, saved, and a text for it."""
    monkeypatch.chdir(tmp_path)
    config = small_config(seq_len=16, window_size=4, num_eigh=8, vocab_size=256)
    model = FlashSTU(config).eval()
    model.save_pretrained("model")
    Path("book.txt").write_text("All that is read is remembered. " * 20)
    return model


def test_loss_by_position_reads_a_model_or_a_run(reader, monkeypatch, capsys):
    Path("run").mkdir()
    config = reader.config.to_dict()
    checkpoint = {"model": reader.state_dict(), "config": config, "tokenizer": "bytes"}
    torch.save(checkpoint, "run/checkpoint_2.pt")
    torch.save({}, "run/checkpoint_1.pt")
    flags = "--data book.txt --texts 2"
    run_as_main(monkeypatch, "experiments/loss_by_position.py", f"--model model {flags}")
    of_model = capsys.readouterr().out
    run_as_main(monkeypatch, "experiments/loss_by_position.py", f"--model run {flags}")
    of_run = capsys.readouterr().out
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
    windows = [reader(x[:, i : i + 17], labels=x[:, i : i + 17]).loss for i in (0, 16, 32)]
    assert torch.allclose(forgotten.view(3, 16).mean(dim=1), 2 * torch.stack(windows), atol=1e-3)
    for other in (forgotten, half):
        assert torch.allclose(other[:16], carried[:16], atol=1e-4)
        assert not torch.allclose(other[16:], carried[16:], atol=1e-4)
    assert not torch.allclose(half[16:], forgotten[16:], atol=1e-4)


def test_loss_by_position_says_what_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="holds no checkpoint and no model"):
        run_as_main(monkeypatch, "experiments/loss_by_position.py", "--model .")


def test_the_baselines_are_causal_and_learn():
    linear_systems = experiment("linear_systems")
    system = random_LDS(4, 10, 5, spectral_radius=0.8)
    system.C.data *= 4
    progress = linear_systems["Progress"](10**9)
    for name, make in linear_systems["MAKERS"].items():
        x = torch.randn(1, 30, 10, requires_grad=True)
        output = make(30)(x)[0, 12].sum()
        reach = torch.autograd.grad(output, x)[0][0].abs().amax(dim=-1)
        assert reach[13:].max() < 1e-5 * reach.max(), name
        assert (reach[:13] > 0).all(), name
        _, losses = linear_systems["train"](name, system, 30, 1e-2, 80, 0, progress)
        assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10]), name


def test_the_robots_models_are_causal():
    ant = experiment("ant")
    for kind in ant["KINDS"]:
        model = ant["make_model"](kind, 27)
        x = torch.randn(1, 30, 35, requires_grad=True)
        reach = torch.autograd.grad(model(x)[0, 12].sum(), x)[0][0].abs().amax(dim=-1)
        assert reach[13:].max() < 1e-5 * reach.max(), kind
        assert (reach[:13] > 0).all(), kind


def test_mamba_2_equals_its_recurrence():
    linear_systems = experiment("linear_systems")
    layer = linear_systems["Mamba2"](width=8, N=4, heads=2).double()
    x = torch.randn(2, 20, 10, dtype=torch.float64)
    gate, v, dt = layer.encode(x).split(layer.encoded, dim=-1)
    padded = F.pad(v, (0, 0, 3, 0)).unfold(1, 4, 1)  # [B, T, channels, 4]
    v = F.silu((padded * layer.conv.weight[:, 0]).sum(dim=-1) + layer.conv.bias)
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


# ------------------------------------------------------------------------------------------------------------
# prepare_data.py


def read_split(folder, split):
    meta, opened = prepare_data.open_data(folder, full=True)
    tokens = np.concatenate(opened[split])
    assert len(tokens) == meta[split]["tokens"]
    return tokens


def same_splits(a, b):
    return all(
        np.array_equal(read_split(a, split), read_split(b, split)) for split in ("train", "val")
    )


def documents_in(folder, split):
    """The texts of a split of bytes."""
    data = read_split(folder, split).astype(np.uint8).tobytes()
    assert data.endswith(b"\0")
    return data[:-1].decode().split("\0")


def all_documents_in(folder):
    return sorted(documents_in(folder, "train") + documents_in(folder, "val"))


def write_documents(folder, n, words):
    """n files of so many words -> their texts."""
    rng = random.Random(1)
    folder.mkdir()
    texts = []
    for i in range(n):
        words_of_text = rng.choices(["alpha", "beta", "γ", "def f(x):", "\n", "1234"], k=words)
        text = " ".join(words_of_text) + f" {i}"
        (folder / f"{i:03}.txt").write_text(text, encoding="utf-8")
        texts.append(text)
    return texts


def as_lines(texts, field="text"):
    return "".join(json.dumps({field: text}) + "\n" for text in texts)


def write_parquet(path, **columns):
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(sys.modules["pyarrow"].table(columns), path)


def test_the_default_data_is_the_standard_library(tmp_path):
    meta = prepare_data.prepare(out=tmp_path)
    assert meta["vocab_size"] == 256
    assert meta["train"]["tokens"] > 3e6
    assert b"def " in read_split(tmp_path, "val")[:100000].astype(np.uint8).tobytes()


def test_bytes_need_no_tiktoken(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    tokenizer = prepare_data.get_tokenizer("bytes")
    text = "héllo\n日本 \x7f"
    tokens = tokenizer.encode(text)
    assert bytes(tokens.tolist()) == text.encode()
    assert tokenizer.decode([0, *tokens, 0, 256, 319]) == text  # an end of text, and ids of no byte
    assert tokenizer.name == "bytes"


def test_shards_hold_every_document_once_and_the_splits_share_none(tmp_path):
    docs = tmp_path / "docs"
    out = tmp_path / "out"
    texts = write_documents(docs, 600, 10)
    (docs / "copy.txt").write_text(texts[0], encoding="utf-8")  # falls on its twin's side
    (docs / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    meta = prepare_data.prepare([str(docs)], out, val_fraction=0.3, shard_tokens=5000)
    assert all_documents_in(out) == sorted(texts + texts[:1])
    assert not set(documents_in(out, "train")) & set(documents_in(out, "val"))
    assert len(meta["train"]["shards"]) > 1


def test_short_shards_read_as_one_long_array(tmp_path):
    docs = tmp_path / "docs"
    write_documents(docs, 300, 10)
    prepare_data.prepare([str(docs)], tmp_path / "out", shard_tokens=400)
    shards = prepare_data.open_data(tmp_path / "out")[1]["val"]
    whole = np.concatenate(shards)
    assert len(shards) > 10
    assert max(map(len, shards)) < 200
    for start, stop in ((0, 1), (0, len(whole)), (150, 700), (len(whole) - 300, len(whole))):
        tokens = prepare_data.read_tokens(shards, start, stop)
        assert np.array_equal(tokens, whole[start:stop])


def test_one_long_text_is_cut_at_nine_tenths(tmp_path, capsys):
    (tmp_path / "book.txt").write_text("abcdefghij" * 1000)
    prepare_data.prepare([str(tmp_path / "book.txt")], tmp_path)
    assert capsys.readouterr().err.endswith("9,001 tokens to train\n")
    assert len(read_split(tmp_path, "train")) == 9001
    assert len(read_split(tmp_path, "val")) == 1001


@pytest.mark.parametrize(
    "name",
    ["a.ndjson", "a.json", "list.json", "a.jsonl.gz", "a.json.GZ", "a.parquet", "bytes.parquet"],
)
def test_records_give_the_same_shards_whatever_file_holds_them(tmp_path, name):
    texts = [f"document {i} é\n" * 5 for i in range(50)]
    lines = as_lines(texts)
    (tmp_path / "plain.jsonl").write_text(lines)
    if name == "bytes.parquet":
        write_parquet(tmp_path / name, text=[text.encode() for text in texts])
    elif name == "a.parquet":
        write_parquet(tmp_path / name, text=texts)
    elif name.lower().endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress(lines.encode()))
    elif name == "list.json":
        (tmp_path / name).write_text(json.dumps([{"text": text} for text in texts], indent=1))
    else:
        (tmp_path / name).write_text(lines)
    for source, out in (("plain.jsonl", "plain"), (name, "other")):
        prepare_data.prepare([str(tmp_path / source)], tmp_path / out, val_fraction=0.3)
    assert same_splits(tmp_path / "plain", tmp_path / "other")


def test_a_json_file_may_be_one_record_and_a_text_may_be_compressed(tmp_path):
    (tmp_path / "record.json").write_text(json.dumps({"text": "a story " * 20}, indent=1))
    (tmp_path / "book.txt.gz").write_bytes(gzip.compress(b"a book " * 20))
    sources = [str(tmp_path / "record.json"), str(tmp_path / "book.txt.gz")]
    prepare_data.prepare(sources, tmp_path / "out")
    parts = documents_in(tmp_path / "out", "train") + documents_in(tmp_path / "out", "val")
    assert parts[0] + parts[2] == "a story " * 20
    assert parts[1] + parts[3] == "a book " * 20


@pytest.mark.parametrize("name", ["texts.jsonl", "texts.parquet"])
def test_a_wrong_field_names_the_fields_that_exist(tmp_path, capsys, name):
    if name.endswith("parquet"):
        write_parquet(tmp_path / name, title=["a"], body=["a long text"])
    else:
        (tmp_path / name).write_text('{"title": "a", "body": "a long text"}\n')
    with pytest.raises(SystemExit) as error:
        prepare_data.prepare([str(tmp_path / name)], tmp_path / "out")
    told = capsys.readouterr().err + str(error.value)
    assert "field 'text'" in told
    assert "['title', 'body']" in told
    prepare_data.prepare([str(tmp_path / name)], tmp_path / "out", field="body")


@pytest.mark.parametrize("name", ["texts.zip", "texts.tar.gz", "texts.jsonl.zst"])
def test_what_is_packed_otherwise_is_left_out_for_that_reason(tmp_path, capsys, name):
    (tmp_path / name).write_bytes(b"\x28\xb5\x2f\xfd")
    (tmp_path / "a.txt").write_text("hello world\n" * 1000)
    prepare_data.prepare([str(tmp_path / "a.txt"), str(tmp_path / name)], tmp_path / "out")
    told = capsys.readouterr().err
    assert "left out 1: packed in another way than .gz" in told
    assert name in told


def interrupt(write, monkeypatch, **options):
    """A preparation that dies before it writes its file number `write`, half of which is there."""
    real = prepare_data.write_atomically
    written = []

    def dying(path, content):
        written.append(path)
        if len(written) == write:
            half = path.with_name(path.name + ".1234" + prepare_data.TEMPORARY)
            half.write_bytes(b"half a file")
            raise KeyboardInterrupt
        real(path, content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_data, "write_atomically", dying)
        prepare_data.prepare(**options)


@pytest.mark.parametrize("write", [1, 3, 8])
def test_an_interrupted_preparation_continues_to_the_same_shards(tmp_path, monkeypatch, write):
    docs = tmp_path / "docs"
    whole = tmp_path / "whole"
    broken = tmp_path / "broken"
    write_documents(docs, 700, 20)
    options = {"sources": [str(docs)], "val_fraction": 0.3, "shard_tokens": 10000}
    prepare_data.prepare(out=whole, **options)
    assert max(map(len, prepare_data.open_data(whole)[1]["train"])) < 10500
    interrupt(write, monkeypatch, out=broken, **options)
    if write > 3:  # a shard of each split, then meta.json
        with pytest.raises(SystemExit, match="not complete:  python prepare_data.py"):
            prepare_data.open_data(broken)
        assert json.loads((broken / "meta.json").read_text())["train"]["tokens"] > 5000
    prepare_data.prepare(out=broken, **options)
    for path in whole.glob("[!.]*"):  # the shards, and meta.json
        assert (broken / path.name).read_bytes() == path.read_bytes()
    assert len(list(broken.iterdir())) == len(list(whole.iterdir()))


@pytest.mark.parametrize(
    "change, name",
    [
        (lambda docs: (docs / "000a.txt").write_text("new"), "000a.txt"),
        (lambda docs: (docs / "001.txt").unlink(), "001.txt"),
        (lambda docs: (docs / "002.txt").open("a").write("more"), "002.txt"),
        (lambda docs: (docs / "003.txt").rename(docs / "last.txt"), "003.txt"),
        (lambda docs: os.utime(docs / "699.txt", (1, 1)), "699.txt"),
    ],
)
def test_a_source_that_has_changed_is_refused_by_name(tmp_path, monkeypatch, change, name):
    docs = tmp_path / "docs"
    write_documents(docs, 700, 20)
    options = {"sources": [str(docs)], "shard_tokens": 10000}
    interrupt(8, monkeypatch, out=tmp_path / "half", **options)
    prepare_data.prepare(out=tmp_path / "whole", **options)
    change(docs)
    for out in (tmp_path / "half", tmp_path / "whole"):
        before = (out / "meta.json").read_bytes()
        with pytest.raises(SystemExit, match=name):
            prepare_data.prepare(out=out, **options)
        assert (out / "meta.json").read_bytes() == before


def test_a_source_that_changes_while_it_is_read_is_refused_by_name(tmp_path, monkeypatch):
    docs = tmp_path / "docs"
    write_documents(docs, 700, 20)
    real = prepare_data.read_records

    def appended_to(path, field):
        yield from real(path, field)
        if path.endswith("500.txt"):
            with open(path, "a") as file:
                file.write("more")

    monkeypatch.setattr(prepare_data, "read_records", appended_to)
    with pytest.raises(SystemExit, match="500.txt' changed while it was read"):
        prepare_data.prepare([str(docs)], tmp_path / "out")
    with pytest.raises(SystemExit, match="not complete"):
        prepare_data.open_data(tmp_path / "out")


def test_a_folder_gives_its_visible_text_and_says_what_is_left_out(tmp_path, capsys):
    docs = tmp_path / "docs"
    out = docs / "out"
    texts = write_documents(docs, 200, 10)
    (docs / "bom.TXT").write_bytes(codecs.BOM_UTF8 + b"bom")
    (docs / "a.JSONL").write_bytes(b'\xef\xbb\xbf{"text": "capitals"}\n\n')
    (docs / "utf16.txt").write_bytes("é".encode("utf-16"))
    (docs / "picture").write_bytes(b"\xff\xfe\xff\xd8")
    (docs / "zeros").write_bytes(b"a\0b")
    (docs / "x.jsonl").mkdir()
    (docs / "x.jsonl" / "file").write_text("in a folder")
    for hidden in (".git", ".ipynb_checkpoints"):
        (docs / hidden).mkdir()
        (docs / hidden / "config").write_text("hidden")
    for link, target in (
        ("loop", "."),
        ("dead", "nowhere"),
        ("self", "self"),
        ("link", tmp_path / "a"),
    ):
        (docs / link).symlink_to(target)
    (tmp_path / "a").write_text("a link to a file is a file")
    texts += ["bom", "capitals", "in a folder", "a link to a file is a file"]
    for again in ("first", "second"):  # the second finds the first one's output in the source
        prepare_data.prepare([str(docs)], out / again)
        assert all_documents_in(out / again) == sorted(texts)
    told = capsys.readouterr().err
    for line in ("2: hidden", "4: linked folders", "5: linked folders", "3: no UTF-8 text"):
        assert f"\nleft out {line}" in told, told
    with pytest.raises(SystemExit, match="cannot be a source"):
        prepare_data.prepare([str(docs)], docs)


def test_one_file_under_several_names_is_read_once(tmp_path, capsys):
    docs = tmp_path / "docs"
    texts = write_documents(docs, 200, 10)
    (docs / "symbolic").symlink_to("000.txt")
    os.link(docs / "000.txt", docs / "hard")
    sources = [str(docs), str(docs / "001.txt"), f"{docs}/../docs/002.txt"]
    prepare_data.prepare(sources, tmp_path / "out")
    assert all_documents_in(tmp_path / "out") == sorted(texts)
    assert "left out 4: named before, maybe under another name" in capsys.readouterr().err


def test_control_characters_of_a_file_name_are_shown_not_obeyed(tmp_path, capsys):
    docs = tmp_path / "docs"
    write_documents(docs, 200, 10)
    (docs / "red\x1b[31m\r.bin").write_bytes(b"\xff")
    prepare_data.prepare([str(docs)], tmp_path / "out")
    told = capsys.readouterr().err
    assert r"red\x1b[31m\r.bin" in told
    assert "\x1b" not in told
    (docs / "\x1b[31m.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(SystemExit, match=r"cannot read .*\\x1b\[31m.jsonl.gz"):
        prepare_data.prepare([str(docs)], tmp_path / "out2")


def test_the_last_line_is_a_command_that_can_be_pasted(tmp_path):
    (tmp_path / "my \x1b[31mbook.txt").write_text("hello " * 2000)
    command = [sys.executable, HERE / "prepare_data.py", "my \x1b[31mbook.txt"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stderr.decode()
    assert told.endswith("python train.py --data data/my___31mbook\n")
    assert len(read_split(tmp_path / "data" / "my___31mbook", "train")) == 10801


def test_a_parquet_file_whose_text_is_no_utf_8_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    bad = pyarrow.array([b"\xff"]).view(pyarrow.string())
    write_parquet(tmp_path / "a.parquet", text=bad)
    with pytest.raises(SystemExit, match="cannot read .*a.parquet"):
        prepare_data.prepare([str(tmp_path / "a.parquet")], tmp_path / "out")


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_one_bad_record_does_not_end_a_corpus(tmp_path, capsys, kind):
    texts = [f"document {i}\n" * 5 for i in range(300)]
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        left_out = 2
        write_parquet(path, text=[None, *(text.encode() for text in texts), b"\xff"])
    elif kind == "json":
        left_out = 4
        path.write_text(
            json.dumps([None, 5, {}, {"text": None}, *({"text": text} for text in texts)])
        )
    else:
        left_out = 8
        bad = ['{"text": null}', '{"text": 5}', "{}", "[" * 10**5, '{"text": "cut', "\udcff", "[1]"]
        lines = "\n".join(bad) + "\n" + as_lines(texts) + '{"text": "a\\ud800\\u0000b"}'
        path.write_bytes(lines.encode(errors="surrogateescape"))
    prepare_data.prepare([str(path)], tmp_path / "out")
    assert all_documents_in(tmp_path / "out") == sorted(texts)
    reason = "no UTF-8 text, or none in the field 'text'"
    told = capsys.readouterr().err
    assert re.search(f"\nleft out {left_out}: {reason} .*{path}, record 1", told), told


def test_few_texts_always_give_a_validation_split(tmp_path):
    for n in (1, 2, 20, 150):
        for seed in range(10):
            texts = [f"{seed} {i} " * 90 for i in range(n)]
            (tmp_path / "texts.jsonl").write_text(as_lines(texts))
            meta = prepare_data.prepare([str(tmp_path / "texts.jsonl")], tmp_path / f"{n}_{seed}")
            share = meta["val"]["tokens"] / (meta["train"]["tokens"] + meta["val"]["tokens"])
            assert 0.09 < share < 0.11


@pytest.mark.parametrize(
    "words, says", [(200, "--seq_len can be at most 120"), (2000, "tokens to train")]
)
def test_a_text_shorter_than_a_window_says_so_when_it_is_prepared(tmp_path, words, says):
    (tmp_path / "a.txt").write_text("hello " * words)
    command = [sys.executable, "prepare_data.py", tmp_path / "a.txt", "--out", tmp_path / "out"]
    told = subprocess.run(command, cwd=HERE, capture_output=True, check=True).stderr.decode()
    lines = told.splitlines()
    assert says in lines[-2]
    assert lines[-1] == f"{tmp_path}/out is ready: python train.py --data {tmp_path}/out"


def damage_shard(change):
    def damage(folder):
        path = folder / "train_00000.npy"
        np.save(path, change(np.load(path)))

    return damage, "train_00000.npy"


def damage_meta(**changes):
    def damage(folder):
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps(meta | changes))

    return damage, "meta.json"


@pytest.mark.parametrize(
    "damage, name",
    [
        damage_shard(lambda a: a.astype("f8")),
        damage_shard(lambda a: a.astype(">u2")),
        damage_shard(lambda a: a[::-1].copy()),
        damage_shard(lambda a: a[:-1]),
        damage_shard(lambda a: a[None]),
        damage_shard(lambda a: a + np.uint16(300)),
        (lambda out: (out / "val_00000.npy").unlink(), "val_00000"),
        (lambda out: os.truncate(out / "val_00000.npy", 500), "val_00000"),
        (lambda out: os.truncate(out / "val_00000.npy", 0), "val_00000"),
        (lambda out: (out / "val_00000.npy").open("a").write("x"), "val_00000"),
        damage_meta(vocab_size=100),
        damage_meta(train={}),
        (lambda out: (out / "meta.json").write_text('{"sources": '), "meta.json"),
        (lambda out: (out / "meta.json").write_text("[" * 10**5), "meta.json"),
        (lambda out: (out / "meta.json").write_bytes(b"\xff"), "meta.json"),
        (lambda out: (out / "meta.json").write_bytes(b""), "meta.json"),
        (lambda out: (out / "meta.json").unlink(), "not complete"),
    ],
)
def test_a_damaged_data_folder_is_named_with_the_remedy(tmp_path, damage, name):
    (tmp_path / "a.txt").write_text("hello world\n" * 1000)
    prepare_data.prepare([str(tmp_path / "a.txt")], tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(SystemExit, match=f"{name}.*(prepare it again|prepare_data.py)"):
        prepare_data.open_data(tmp_path / "out")


def test_a_sample_of_a_large_shard_is_checked_at_every_start_and_all_of_it_on_request(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(prepare_data, "BLOCK", 16)
    (tmp_path / "a.txt").write_text("hello world\n" * 1000)
    prepare_data.prepare([str(tmp_path / "a.txt")], tmp_path / "out")
    path = tmp_path / "out" / "train_00000.npy"
    good = path.read_bytes()
    refused = 0
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
    text = tmp_path / "a.txt"
    code = f"import prepare_data; owner = prepare_data.lock({str(out)!r})"
    code += "; print('owned', flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=HERE, **pipes)
    assert owner.stdout.readline() == b"owned\n"
    text.write_text("hello world\n" * 1000)
    with pytest.raises(SystemExit, match=f"{out} is in use by process {owner.pid}"):
        prepare_data.prepare([str(text)], out)
    threading.Timer(0.5, owner.kill).start()
    monkeypatch.setattr(prepare_data, "standard_library", lambda: [text])
    meta = prepare_data.prepare(out=out)  # the default data is waited for
    monkeypatch.undo()
    assert (
        prepare_data.prepare(out=out) == meta
    )  # what is ready is good, whatever Python is there today
    with pytest.raises(SystemExit, match="was made with 'file"):
        prepare_data.prepare(["stdlib"], out)


@pytest.mark.parametrize(
    "obstacle, out",
    [
        ("a file", "a file/out"),
        ("a file", "a file"),
        ("out/meta.json/", "out"),
        ("out/train_00000.npy/", "out"),
        ("out/.flash_stu.lock/", "out"),
        ("a file", "/proc/nothing"),
    ],
)
def test_an_output_that_cannot_be_written_is_a_sentence(tmp_path, obstacle, out):
    path = tmp_path / obstacle
    path.mkdir(parents=True) if obstacle.endswith("/") else path.write_text("x")
    (tmp_path / "a.txt").write_text("hello world\n" * 1000)
    with pytest.raises(SystemExit, match="cannot write"):
        prepare_data.prepare([str(tmp_path / "a.txt")], tmp_path / out)


@pytest.mark.parametrize("error", [OSError("No space left"), RuntimeError("No space left")])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, error):
    def full_disk(file):
        file.write(b"half")
        raise error

    (tmp_path / "file").write_text("old")
    with pytest.raises(SystemExit, match="cannot write .*file: No space left.* is intact"):
        prepare_data.write_atomically(tmp_path / "file", full_disk)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("kind", ["a link", "a dead link", "a folder", "a pipe", "a device"])
def test_only_a_plain_file_is_replaced(tmp_path, kind):
    path = tmp_path / "out.png"
    (tmp_path / "target").write_text("old")
    if kind == "a link":
        path.symlink_to("target")
    elif kind == "a dead link":
        path.symlink_to("nowhere")
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    else:
        try:
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))  # as /dev/null
        except PermissionError:
            pytest.skip("only root makes devices")
    before = os.lstat(path)
    with pytest.raises(SystemExit, match="cannot write .*out.png"):
        prepare_data.write_atomically(path, lambda file: file.write(b"new"))
    after = os.lstat(path)
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert (tmp_path / "target").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.png", "target"]


def test_the_temporary_files_of_others_stay_and_those_of_dead_owners_go(tmp_path):
    ours = tmp_path / f"meta.json.0123{prepare_data.TEMPORARY}"
    for path in (tmp_path / "meta.json.tmp", ours):
        path.write_text("half")
    prepare_data.write_atomically(tmp_path / "meta.json", lambda file: file.write(b"new"))
    assert ours.exists()  # it could be of a process that is writing now
    prepare_data.lock(tmp_path).close()
    assert not ours.exists()
    assert (tmp_path / "meta.json.tmp").read_text() == "half"


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


def test_a_long_document_in_pieces_has_the_tokens_of_the_whole():
    tokenizer = o200k_base()
    text = random_text()
    tokens = tokenizer.encode(text)
    pieces = [tokenizer.encode(piece) for piece in prepare_data.PIECE.findall(text)]
    assert np.array_equal(np.concatenate(pieces), tokens)
    assert tokenizer.decode(tokens.tolist()) == text
    spaces = f"x{' ' * 10**6}y"  # on which tiktoken gives up
    pieces = [tokenizer.encode(piece) for piece in prepare_data.PIECE.findall(spaces)]
    assert tokenizer.decode(np.concatenate(pieces).tolist()) == spaces


def test_ids_of_no_token_decode_to_nothing():
    tokenizer = o200k_base()
    tokens = tokenizer.encode("a text")
    assert tokenizer.decode([199_998, *tokens, tokenizer.eot, 10**6]) == "a text"
    assert "<|endofprompt|>" in tokenizer.decode(range(199_990, tokenizer.n_vocab))
    assert tokenizer.name == "o200k_base"


@pytest.mark.parametrize("text", ["x\0y", "\0", "a \0\0\0 b", "é\0日本\n"])
def test_a_saved_tokenizer_keeps_zero_bytes(tmp_path, text):
    transformers = pytest.importorskip("transformers")
    ours = prepare_data.get_tokenizer("bytes")
    prepare_data.save_tokenizer(ours, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "again")
    for tokenizer in (theirs, transformers.AutoTokenizer.from_pretrained(tmp_path / "again")):
        assert tokenizer(text).input_ids == ours.encode(text).tolist() == list(text.encode())


def test_a_folder_with_other_data_is_left_alone(tmp_path):
    (tmp_path / "a.txt").write_text("hello world " * 100)
    prepare_data.prepare([str(tmp_path / "a.txt")], tmp_path)
    before = read_split(tmp_path, "train")
    with pytest.raises(SystemExit, match="was made with 'val_fraction': 0.1.*choose another --out"):
        prepare_data.prepare([str(tmp_path / "a.txt")], tmp_path, val_fraction=0.5)
    assert np.array_equal(read_split(tmp_path, "train"), before)


def test_hub_corpora_are_files_that_their_library_fetches(tmp_path, monkeypatch):
    texts = [f"story {i}\n" * 9 for i in range(300)]
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.jsonl").write_text(as_lines(texts))
    (tmp_path / "files" / "README.md").write_text("not asked for")
    fetched = []

    def snapshot_download(*args, **options):
        fetched.append((args, options))
        return tmp_path

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(prepare_data.HUB, "tinystories", ("owner/name", "files/*.jsonl"))
    prepare_data.prepare(["tinystories"], tmp_path / "out")
    options = {"repo_type": "dataset", "allow_patterns": "files/*.jsonl"}
    assert fetched == [(("owner/name",), options)]
    assert all_documents_in(tmp_path / "out") == sorted(texts)
    assert 10 < len(documents_in(tmp_path / "out", "val")) < 60


@pytest.mark.parametrize(
    "content, name, message",
    [
        (b"caf\xe9 " * 10**6, "a.txt", "no UTF-8 text.*a.txt.*not enough text"),
        (b"", "a.txt", "not enough text"),
        (b'{"txt": "x"}\n{"text": ', "a.jsonl", "left out 2: .*a.jsonl, record 1.*not enough text"),
        (b"not gzip", "a.jsonl.gz", "a.jsonl.gz.*Not a gzipped file"),
        (gzip.compress(b"{}", mtime=0)[:-9], "a.jsonl.GZ", "a.jsonl.GZ.*end-of-stream"),
        (gzip.compress(b"{}" * 99)[:20] + b"xxxxx", "a.json.gz", "cannot read .*a.json.gz"),
        (b"PAR1", "a.parquet", "cannot read .*a.parquet"),
        (None, "missing.txt", "no file or folder"),
        (None, "", "no file or"),
    ],
)
def test_preparation_says_what_is_wrong_and_writes_nothing(
    tmp_path, capsys, content, name, message
):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as error:
        prepare_data.prepare([str(tmp_path / name) if name else ""], tmp_path / "out")
    told = capsys.readouterr().err + str(error.value)
    assert re.search(message, told, re.DOTALL) and len(told) < 700, told[:2000]
    assert not list((tmp_path / "out").glob("[!.]*"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"val_fraction": 1.0}, "val_fraction is 1.0"),
        ({"val_fraction": float("nan")}, "val_fraction is nan"),
        ({"shard_tokens": 0}, "shard_tokens is 0"),
        ({"tokenizer": "bpe"}, "'bpe': it is bytes, gpt2 or o200k_base"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        prepare_data.prepare(["stdlib"], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_library_that_is_missing_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    code = "import sys; sys.modules['pyarrow'] = None; import prepare_data; prepare_data.main()"
    command = [sys.executable, "-c", code, tmp_path / "a.parquet", "--out", tmp_path / "out"]
    told = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False).stderr
    assert told.splitlines()[-1] == "this needs:  pip install pyarrow"


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
    paths = [
        path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock"
    ]
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
    printed = re.search(r"([0-9.]+) bits per byte", output4)
    assert abs(float(printed[1]) - bits) < 2e-4, output4


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
        "--n_heads 5": "heads",
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
