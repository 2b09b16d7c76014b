import math

import numpy as np
import pytest
import torch

import lds as lds_module
from lds import (
    LDS,
    S4D,
    Attention,
    MiniSTU,
    SelectiveSSM,
    convolve,
    prefix_scan,
    random_LDS,
    sample,
    train,
    train_stu_on_lds,
    unseen_error,
    white_filters,
)
from stu import get_spectral_filters, make_bank

# -- lds.py: the system ------------------------------------------------------------------------------------------------


def simulate(system, u):
    """h_t = A h_{t-1} + B u_t, y_t = C h_t, one step after another, in float64."""
    A, B, C = (p.detach().double() for p in (system.A, system.B, system.C))
    A = torch.diag(A) if A.ndim == 1 else A
    h, y = torch.zeros(len(u), len(A), dtype=torch.float64), []
    for u_t in u.double().unbind(1):
        h = h @ A.T + u_t @ B.T
        y.append(h @ C.T)
    return torch.stack(y, dim=1)


@pytest.mark.parametrize("T", [1, 2, 37, 128])
@pytest.mark.parametrize("make", [random_LDS, LDS])
def test_a_system_equals_its_recurrence(make, T):
    system, u = make(12, 3, 2), torch.randn(4, T, 3)
    expected = simulate(system, u).float()
    assert (system(u) - expected).norm() / expected.norm() < 1e-5
    assert torch.allclose(system(u[0]), system(u)[0], atol=1e-6)  # unbatched


def test_every_part_of_a_dense_system_gets_its_gradient():
    system = LDS(5, 2, 3, dtype=torch.float64)
    u = torch.randn(2, 9, 2, dtype=torch.float64)
    torch.autograd.gradcheck(lambda *p: system(u), tuple(system.parameters()))


def test_random_lds_has_the_poles_it_was_asked_for():
    system = random_LDS(state_dim=400, input_dim=10, output_dim=5, lower_bound=0.3, spectral_radius=0.9)
    size = system.A.detach().abs()
    assert size.max() == pytest.approx(0.9) and 0.3 <= size.min() < 0.35
    assert 100 < (system.A < 0).sum() < 300
    assert (system.state_dim, system.input_dim, system.output_dim) == (400, 10, 5)


# -- lds.py: the learner -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "L, K, hankel_L", [(1, 1, False), (40, 40, False), (128, 24, False), (128, 24, True), (1024, 64, False)]
)
def test_white_filters_are_orthonormal_and_span_the_bank(L, K, hankel_L):
    phi = get_spectral_filters(L, K, hankel_L, dtype=torch.float64)
    white, bank = white_filters(phi, hankel_L), make_bank(phi, hankel_L)[0]
    w = 1 - torch.arange(L).double()[:, None] / L
    assert (white.T @ (w * white) - torch.eye(white.shape[1])).abs().max() < 1e-9
    rest = bank - white @ (white.T @ (w * bank))
    assert (w.sqrt() * rest).norm(dim=0).max() < 1e-4 * bank.norm(dim=0).max()


def test_white_input_gives_uncorrelated_features_of_unit_variance():
    white, x = white_filters(get_spectral_filters(64, 8)).float(), torch.randn(4000, 64, 1)
    features = convolve(x, white[:, None])  # [N, T, F]
    covariance = torch.einsum("ntf,ntg->fg", features, features) / features[..., 0].numel()
    assert (covariance - torch.eye(white.shape[1])).abs().max() < 0.05


@pytest.mark.parametrize("options", [dict(), dict(use_hankel_L=True), dict(backend="lds")], ids=str)
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
    assert (given.fit(*data)(x) - own.fit(*data)(x)).norm() < 1e-5 * own(x).norm()


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
def test_ministu_with_an_mlp(activation):
    model = MiniSTU(
        seq_len=128, num_filters=24, input_dim=10, output_dim=5, use_hankel_L=False, use_mlp=True, mlp_hidden_dim=20,
        mlp_num_layers=2, mlp_dropout=0.1, mlp_activation=activation, dtype=torch.float32, device=None,
        backend="spectral",
    )  # fmt: skip
    assert [tuple(p.shape) for p in model.mlp.parameters()] == [(20, 5), (20,), (5, 20), (5,)]
    x = torch.randn(2, 128, 10)
    assert model(x).shape == (2, 128, 5) and not torch.equal(model(x), model(x))  # dropout
    model.eval()
    with torch.no_grad():
        assert torch.allclose(model(x), model.mlp(model.stu(x)))


@pytest.mark.parametrize(
    "L, K, hankel_L", [(1024, 24, False), (128, 24, True), (1024, 64, False), (33, 33, False), (5, 2, False)]
)
def test_the_recurrent_backend_agrees_and_trains(L, K, hankel_L):
    fft = MiniSTU(L, K, 6, 4, hankel_L)
    lds = MiniSTU(seq_len=L, num_filters=K, input_dim=6, output_dim=4, use_hankel_L=hankel_L, backend="lds")
    lds.load_state_dict(fft.state_dict())
    x = torch.randn(2, L, 6)
    (a, grad_a), (b, grad_b) = [(y := m(x), *torch.autograd.grad(y.square().sum(), m.stu.M)) for m in (fft, lds)]
    assert (a - b).norm() < 1e-3 * a.norm() and (grad_a - grad_b).norm() < 1e-3 * grad_a.norm()


def test_ministu_with_64_channels_runs_as_a_recurrence():
    model = MiniSTU(seq_len=1024, num_filters=24, input_dim=64, output_dim=64, backend="lds", dtype=torch.float32)
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
    assert (model(x) - system(x)).norm() < 1e-4 * system(x).norm()


def test_gradient_descent_finds_the_system():
    lds = random_LDS(state_dim=20, input_dim=10, output_dim=5)
    stu, losses = train_stu_on_lds(
        lds, seq_len=128, num_filters=24, num_steps=400, batch_size=16, learning_rate=2e-3, verbose=False
    )
    y = stu(torch.randn(1, 128, 10))
    assert y.shape == (1, 128, 5) and len(losses) == 400 and not stu.training
    assert unseen_error(stu, lds, 128)[0] < 1e-9  # far below 4.5e-4


def test_training_with_an_mlp_lowers_the_loss(capsys):
    stu, losses = train_stu_on_lds(
        random_LDS(8, 4, 2), 32, 8, num_steps=60, batch_size=8, learning_rate=1e-2, verbose=True, use_mlp=True,
        mlp_hidden_dim=16, mlp_num_layers=3, mlp_dropout=0.0, mlp_activation="tanh",
    )  # fmt: skip
    assert np.mean(losses[-10:]) < 0.5 * losses[0]
    assert "60/60" in capsys.readouterr().out


@pytest.mark.parametrize("L, K, hankel_L", [(128, 24, False), (64, 20, True), (512, 32, False)])
def test_a_fitted_stu_is_a_linear_dynamical_system(L, K, hankel_L):
    model = MiniSTU(L, K, 4, 3, hankel_L).fit(*sample(random_LDS(20, 4, 3), 64, L))
    system, x = model.to_lds(), torch.randn(2, L, 4)
    assert system.A.ndim == 1 and system.A.abs().max() < 1
    assert system.B.shape == (len(system.A), 4) and system.C.shape == (3, len(system.A))
    scale = model(x).std()
    assert (system(x) - model(x)).abs().max() < 1e-3 * scale
    assert (simulate(system, x) - model(x)).abs().max() < 1e-3 * scale  # one step after another, too
    assert simulate(system, torch.randn(1, 20 * L, 4))[:, -L:].std() < 3 * scale  # and it stays sane past seq_len


# -- lds.py: what it compares with -------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 2, 7, 16, 33])
def test_prefix_scan_equals_the_loop(T):
    a, x = torch.rand(2, T, 3), torch.randn(2, T, 3)
    h, expected = torch.zeros(2, 3), []
    for t in range(T):
        h = a[:, t] * h + x[:, t]
        expected.append(h)
    assert torch.allclose(prefix_scan(a, x), torch.stack(expected, dim=1), atol=1e-5)


@pytest.mark.parametrize("make", [lambda: S4D(3, 2), lambda: SelectiveSSM(3, 2), lambda: Attention(3, 2, 30)])
def test_baselines_are_causal_and_learn(make):
    model, x = make(), torch.randn(1, 30, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x)[0, 12].sum(), x)
    reach = gradient[0].abs().amax(-1)
    assert reach[13:].max() < 1e-5 * reach.max() and (reach[:13] > 0).all()
    system = random_LDS(4, 3, 2, spectral_radius=0.8)
    system.C.data *= 4
    losses = train(model, system, 30, 80, 16, 1e-2)
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


@pytest.mark.parametrize("flags", ["--steps 0", "--steps 12", "--compare --steps 2 --batch-size 2"])
def test_the_demo_prints_and_draws(tmp_path, monkeypatch, capsys, flags):
    picture = tmp_path / "picture.png"
    sizes = ["--state-dim", "6", "--input-dim", "3", "--output-dim", "2", "--seq-len", "24", "--num-filters", "6"]
    monkeypatch.setattr("sys.argv", ["lds.py", *flags.split(), *sizes, "--out", str(picture)])
    lds_module.main()
    assert picture.read_bytes().startswith(b"\x89PNG") and "STU" in capsys.readouterr().out


# -- lds.py: bad input -------------------------------------------------------------------------------------------------


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
    (lambda: MiniSTU(8, 4, 3, 2, use_mlp=True).fit(torch.ones(2, 8, 3), torch.ones(2, 8, 2)), "gradient descent"),
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
    system = LDS(4, 3, 2)
    with torch.no_grad():
        system.A.copy_(10 * torch.eye(4))
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        train(system, random_LDS(4, 3, 2), 200, 3, 2, 1e-3)
