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
import safetensors.torch
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

hf_home = tempfile.TemporaryDirectory()
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": hf_home.name}
# The tensors here are small, so more threads gain little. And on a machine that does other work as
# well they wait for each other: then the suite takes several times as long.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

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


@pytest.fixture(autouse=True)
def random_stu(monkeypatch):
    """A new STU answers with zero, and then most of what is compared here would be zero as well."""
    monkeypatch.setattr(STU, "reset_parameters", STU.draw_random_filters)


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
@pytest.mark.parametrize("L, T", [(1, 1), (50, 33), (64, 64)])
def test_a_new_stu_answers_with_zero_and_its_first_step_changes_that(L, T, options, monkeypatch):
    monkeypatch.undo()  # weights as a user finds them, not as random_stu draws them
    layer = make_stu(L, **options)
    x = torch.randn(2, T, 6)
    y = layer(x)
    assert y.count_nonzero() == 0
    (y - x).square().sum().backward()
    weights = layer.M_filters if layer.use_approx else layer.M
    reached = layer.bank.filters[:T].any(dim=0)  # the filters that such an input meets
    assert torch.equal(weights.grad.flatten(1).any(dim=1), reached)
    with torch.no_grad():
        weights -= 1e-4 * weights.grad / weights.grad.norm()
    assert (layer(x) - x).norm() < (y - x).norm()


@pytest.mark.parametrize("sandwich", [False, True])
def test_a_new_block_learns_all_its_weights_from_the_second_step_on(sandwich, monkeypatch):
    monkeypatch.undo()
    block = FlashSTUBlock(8, 20, 4, stu_enable_mlp_sandwich=sandwich)
    x = torch.randn(2, 20, 8)
    optimizer = torch.optim.AdamW(block.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        block(x).square().sum().backward()
        optimizer.step()
    for name, p in block.named_parameters():
        assert p.grad.any(), name


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
    assert state[0].dtype == torch.float32
    assert relative_error(y, layer(x)) < 1e-5


def test_past_seq_len_outputs_stay_sane_and_what_was_long_ago_is_forgotten():
    layer = STU(4, 4, 64)
    x = torch.randn(1, 64 * 50, 4)
    y, state = layer(x, use_cache=True)
    scale = y[:, :64].std()
    assert y[:, -640:].std() < 2 * scale
    assert state[0].shape == (1, 112, 4)
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
    exact = layer.bank.filters_on("cpu", torch.float32)
    layer.to(torch.bfloat16)
    filters = layer.bank.filters_on("cpu", torch.bfloat16)
    assert torch.equal(filters, exact)
    x = torch.randn(2, 100, 8).bfloat16()
    whole = layer(x)
    y, state = in_pieces(layer, x, [50])
    assert y.dtype == whole.dtype == torch.bfloat16
    assert state[0].dtype == torch.float32
    assert relative_error(y.float(), whole.float()) < 1e-2


def test_a_bank_does_not_depend_on_the_default_dtype():
    expected = STU(4, 4, 600).bank
    stu.standard_bank.cache_clear()
    torch.set_default_dtype(torch.bfloat16)  # as transformers does while it makes a model
    try:
        made = STU(4, 4, 600).bank
        recurrence = made.lds
    finally:
        torch.set_default_dtype(torch.float32)
    assert made is not expected
    assert torch.equal(made.filters, expected.filters)
    assert torch.equal(recurrence.C, expected.lds.C)


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
        keys = state.keys
        assert keys.shape == (B, 4, window + 1, 8)


def test_attention_depends_on_distance_not_on_position():
    attention = SlidingWindowAttention(32, 4, window_size=8).double()
    x = torch.randn(1, 40, 32).double()
    y = attention(x)
    later = attention(x[:, 10:])
    assert relative_error(later[:, 8:], y[:, 18:]) < 1e-5
    empty = stu.start_ring(torch.zeros(1, 4, 1, 8).double(), window=8)
    far = empty._replace(n_read=torch.tensor(10**8))  # a stream after so many tokens
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
        for tensor in state:
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
    assert names["tokens"].shape == (2, 178)
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


@pytest.mark.parametrize("kind, sizes", [(STU, [8, 8, 30]), (SlidingWindowAttention, [8, 2, 5])])
def test_one_can_differentiate_through_the_pieces_of_a_sequence(kind, sizes):
    layer = kind(*sizes)
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


@pytest.mark.parametrize("kind, sizes", [(STU, [6, 6, 30]), (SlidingWindowAttention, [6, 1, 4])])
def test_a_mask_is_of_ones_and_zeros_and_hides_whatever_it_hides(kind, sizes):
    layer = kind(*sizes)
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
        assert_refused(saved, "delete config.json to use it")
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


# --------------------------------------------------------------------------------------------------
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


# --------------------------------------------------------------------------------------------------
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


# --------------------------------------------------------------------------------------------------
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
    build = experiment("mechbench")["with_our_layer"](build_theirs=None, random=False)
    sizes = types.SimpleNamespace(d_model=8, max_seq_len=32, num_eigh=4, use_hankel_L=False)
    x = torch.randn(2, 32, 8)
    assert build("stu", sizes)(x).shape == x.shape
    mixer = experiment("mqar")["SpectralMixer"](d_model=8, seq_len=32)
    assert mixer(x).shape == x.shape


STANDS_IN_FOR_NANOGPT = """
from types import SimpleNamespace
from torch import nn

GPTConfig = SimpleNamespace

class GPT:
    def __init__(self, config):
        self.transformer = SimpleNamespace(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([nn.Linear(config.n_embd, config.n_embd)] * config.n_layer),
            ln_f=nn.LayerNorm(config.n_embd),
        )
"""


def test_the_model_of_nanogpt_is_trained_and_evaluated_as_ours_is(
    data, folder, monkeypatch, run_here
):
    monkeypatch.setattr(stu, "FlashSTU", FlashSTU)  # which the script exchanges, is put back
    monkeypatch.setattr(signal, "signal", lambda signum, handler: None)  # pytest's stay
    Path("model.py").write_text(STANDS_IN_FOR_NANOGPT)
    nanogpt = experiment("nanogpt")
    config = small_config(seq_len=8, vocab_size=256)
    model = nanogpt["with_blocks_of"](nanogpt["load_nanogpt"]("."))(config)
    ids = torch.randint(256, (2, 9))
    x = model.tok_emb(ids[:, :8]) + model.positions.weight
    for layer in model.layers:
        x = layer(x)
    logits = model.norm(x) @ model.tok_emb.weight.T
    assert relative_error(model(ids[:, :8]).logits, logits) < 1e-6
    expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert torch.allclose(model(ids, labels=ids).loss, expected)
    assert model.generate(ids, max_new_tokens=3, temperature=0).shape == (2, 12)
    flags = f"--data {data} --n_embd 8 --n_layers 1 --seq_len 16 --batch_size 2 --steps 1"
    with pytest.raises(SystemExit) as end:
        run_here("experiments/nanogpt.py", f". --device cpu {flags} --out_dir run")
    assert not end.value.code
    assert len(logged(Path("run"), "val_loss")) == 2


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
        ("nanogpt.py", "nowhere", "is not a checkout"),
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


# --------------------------------------------------------------------------------------------------
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


# --------------------------------------------------------------------------------------------------
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


def test_a_run_that_continues_keeps_its_precision(run):
    assert "in bfloat16\n" in continued(run, "--steps 5 --dtype bfloat16").finish()
    assert "in bfloat16\n" in continued(run, "--steps 6").finish()


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
            assert (p - q).norm() < 0.03 * (q - old).norm()
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
