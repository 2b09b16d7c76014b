"""
Watch a spectral transform unit learn a linear dynamical system.

    python lds.py                an STU learns a system by gradient descent, then in closed form, then becomes a
                                 recurrence; under a minute on two cores, the picture goes to lds.png
    python lds.py --compare      the same task for S4D, a selective SSM, attention and the system itself
    python lds.py --backends     what the layer costs as a convolution and as a recurrence, and where they cross
    python lds.py --help         every dimension, the seed, the spectral radius, the number of steps

The task. A hidden state h of n numbers turns inputs u into outputs y, and only u and y are seen:
    h_t = A h_{t-1} + B u_t,    y_t = C h_t,    that is    y_t = Σ_s C A^s B u_{t-s}.
Learning A, B, C is hard: when the spectral radius of A (its largest |eigenvalue|) is near 1 the memory is long, and the
loss is anything but convex in A. An STU does not learn A. It filters u with the few fixed signals that span all decays
α^t (stu.py, section 1) and learns a linear map on top, so its loss is a parabola, with a bottom one can compute.

The letters, as in stu.py: B batch (and the input matrix), T time, L seq_len, K filters, Φ [L, F] the filter bank,
M [F, d_in, d_out] the learned map. Systems are written [in, out] in shapes: C A^t B for all t is [T, in, out].
"""

import argparse
import math
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

from stu import STU, SlidingWindowAttention, fft_size, full_conv, get_spectral_filters, make_bank, spectral_lds


def check_input(x, width: int, name: str = "input"):
    """Raise unless x is [batch, T >= 1, width] or [T, width] and finite; -> [batch, T, width]."""
    if x.ndim not in (2, 3) or x.shape[-1] != width or x.shape[-2] < 1:
        raise ValueError(f"{name} must be [batch, length >= 1, {width}] or [length, {width}], got {list(x.shape)}")
    if not x.isfinite().all():
        raise ValueError(f"{name} holds {(~x.isfinite()).sum()} NaN or infinite values of {x.numel()}")
    return x if x.ndim == 3 else x[None]


# ----------------------------------------------------------------------------------------------------------------------
# 1. The system to learn


def convolve(u, h):
    """y_t = Σ_s h_s u_{t-s} by FFT: u [B, T, in], h [T, in, out] -> [B, T, out]; h [T, d] acts channel by channel."""
    T = u.shape[1]
    n = fft_size(2 * T - 1)
    u_f, h_f = torch.fft.rfft(u, n=n, dim=1), torch.fft.rfft(h, n=n, dim=0)
    y_f = u_f * h_f if h.ndim == 2 else torch.einsum("bfi,fio->bfo", u_f, h_f)
    return torch.fft.irfft(y_f, n=n, dim=1)[:, :T]


class LDS(nn.Module):
    """h_t = A h_{t-1} + B u_t, y_t = C h_t from h = 0: u [batch, T, input_dim] -> y [batch, T, output_dim].

    A [n, n], with diagonal=True its diagonal [n]; B [n, input_dim], C [output_dim, n]. All three are learnable."""

    def __init__(
        self, state_dim: int, input_dim: int, output_dim: int, dtype=torch.float32, device=None, diagonal: bool = False
    ):  # fmt: skip
        super().__init__()
        if min(state_dim, input_dim, output_dim) < 1:
            raise ValueError(f"dimensions must be at least 1, got {state_dim}, {input_dim}, {output_dim}")
        self.state_dim, self.input_dim, self.output_dim = state_dim, input_dim, output_dim
        to = {"dtype": dtype, "device": device}
        if diagonal:
            self.A = nn.Parameter(2 * torch.rand(state_dim, **to) - 1)
        else:
            self.A = nn.Parameter(torch.randn(state_dim, state_dim, **to) * (0.9 / state_dim**0.5))  # radius about 0.9
        self.B = nn.Parameter(torch.randn(state_dim, input_dim, **to) / input_dim)
        self.C = nn.Parameter(torch.randn(output_dim, state_dim, **to) / state_dim)

    def impulse_response(self, T: int):
        """C A^t B for t < T: [T, in, out]. No loop over time: powers of the poles, or log2(T) doublings."""
        if self.A.ndim == 1:
            t = torch.arange(T, device=self.A.device)[:, None]
            rank_one = self.B[:, :, None] * self.C.T[:, None]  # [n, in, out]
            return torch.einsum("tn,nio->tio", self.A**t, rank_one)
        X, power = self.B[:, None], self.A  # [n, t, in]: A^s B for s < t
        while X.shape[1] < T:
            X, power = torch.cat([X, torch.einsum("mn,nti->mti", power, X)], dim=1), power @ power
        return torch.einsum("on,nti->tio", self.C, X[:, :T])

    def forward(self, u):
        x = check_input(u, self.input_dim).to(self.B)
        y = convolve(x, self.impulse_response(x.shape[1]))
        return y if u.ndim == 3 else y[0]


def random_LDS(
    state_dim: int, input_dim: int, output_dim: int, lower_bound: float = 0.1, device=None,
    spectral_radius: float = 0.99,
) -> LDS:  # fmt: skip
    """A diagonal system, real poles of either sign, |α| uniform in [lower_bound, spectral_radius], one at its end."""
    if not 0 <= lower_bound <= spectral_radius <= 1:
        bounds = f"lower_bound = {lower_bound}, spectral_radius = {spectral_radius}"
        raise ValueError(f"need 0 <= lower_bound <= spectral_radius <= 1, got {bounds}")
    lds = LDS(state_dim, input_dim, output_dim, device=device, diagonal=True)
    with torch.no_grad():  # its poles are uniform in [-1, 1]
        lds.A.copy_(lds.A.sign() * (lower_bound + (spectral_radius - lower_bound) * lds.A.abs()))
        lds.A[0] = spectral_radius * lds.A[0].sign()
    return lds


# ----------------------------------------------------------------------------------------------------------------------
# 2. The learner: an STU in white coordinates
#
# What limits gradient descent here is scale. get_spectral_filters scales φ_k by λ_k^(1/4), and φ_k overlaps with the
# alternating filters: the curvature of the loss differs between directions by more than 1e12, and no number of steps
# reaches the flat ones. But only the span of the filters matters, so choose coordinates in which white input gives
# uncorrelated features of equal size. At time t a filter has seen lags 0..t only; averaged over the sequence, lag s
# counts with weight w_s = (L - s)/L, and the features of white input have covariance Φᵀ diag(w) Φ. Gram-Schmidt under
# that product turns Φ into white filters: the curvature is about 1 in every direction, and plain Adam converges.
# Directions 1e-5 below the first are dropped: they carry 1e-13 of the variance of a stable system's outputs, and in
# them float32 and the recurrent form would lose their digits.


def white_filters(phi, use_hankel_L: bool = False) -> torch.Tensor:
    """Base filters [L, K] -> filters [L, F] of the same span (± branches included), orthonormal under w; float64."""
    bank, _ = make_bank(phi, use_hankel_L)
    if not use_hankel_L:
        bank = bank.unflatten(1, (2, -1)).transpose(1, 2).flatten(1)  # φ_1, ±φ_1, φ_2, ±φ_2, ...: strongest first
    root_w = (1 - torch.arange(len(bank), dtype=torch.float64)[:, None] / len(bank)).sqrt()
    added = torch.linalg.qr(root_w * bank).R.diagonal().abs()  # what each filter adds to those before it
    Q, R = torch.linalg.qr(root_w * bank[:, : len(added)][:, added > 1e-5 * added[0]])
    return Q * R.diagonal().sign() / root_w


class MiniSTU(nn.Module):
    """One full STU, and an optional MLP on its outputs: [batch, T <= seq_len, input_dim] -> [batch, T, output_dim].

    Unbatched input [T, input_dim] gives [T, output_dim]. precomputed_filters [seq_len, num_filters]: base filters
    instead of the Hankel matrix's. backend: "spectral" (FFT) or "lds" (recurrence over blocks), the same function."""

    def __init__(
        self, seq_len: int, num_filters: int, input_dim: int, output_dim: int, use_hankel_L: bool = False,
        use_mlp: bool = False, mlp_hidden_dim: int | None = None, mlp_num_layers: int = 2, mlp_dropout: float = 0.0,
        mlp_activation: str = "relu", dtype=torch.float32, device=None,
        precomputed_filters: torch.Tensor | None = None, backend: str = "spectral",
    ):  # fmt: skip
        super().__init__()
        activations = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}
        if backend not in ("spectral", "lds"):
            raise ValueError(f'backend must be "spectral" or "lds", got {backend!r}')
        if mlp_activation not in activations:
            raise ValueError(f"mlp_activation must be one of {', '.join(activations)}, got {mlp_activation!r}")
        if mlp_num_layers < 1:
            raise ValueError(f"mlp_num_layers must be at least 1, got {mlp_num_layers}")
        phi = precomputed_filters
        if phi is None:
            if not 1 <= num_filters <= seq_len:
                raise ValueError(f"need 1 <= num_filters <= seq_len, got {num_filters} filters for length {seq_len}")
            phi = get_spectral_filters(seq_len, num_filters, use_hankel_L, dtype=torch.float64)
        elif phi.shape != (seq_len, num_filters):
            expected = f"[seq_len, num_filters] = [{seq_len}, {num_filters}]"
            raise ValueError(f"precomputed_filters must be {expected}, got {list(phi.shape)}")
        self.seq_len, self.num_filters, self.input_dim, self.output_dim = seq_len, num_filters, input_dim, output_dim
        self.bank = white_filters(phi, use_hankel_L)  # [L, F] float64
        self.lds = spectral_lds(self.bank, n_pairs=40, block=32, fade=1e-6)  # 80 states give 1e-4, and speed
        self.stu = STU(
            input_dim, output_dim, seq_len, use_approx=False, precomputed_filters=(self.bank, self.lds),
            backend="lds" if backend == "lds" else "fft",
        )  # fmt: skip
        self.mlp = None
        if use_mlp:
            hidden = [mlp_hidden_dim or 2 * output_dim] * (mlp_num_layers - 1)
            widths = [output_dim, *hidden, output_dim]
            self.mlp = nn.Sequential(nn.Linear(widths[0], widths[1]))
            for a, b in zip(widths[1:], widths[2:]):
                self.mlp.extend([activations[mlp_activation](), nn.Dropout(mlp_dropout), nn.Linear(a, b)])
        self.to(device=device, dtype=dtype)

    def forward(self, x):
        u = check_input(x, self.input_dim)
        if u.shape[1] > self.seq_len:
            advice = "make one with a longer seq_len, or run this one as a recurrence: to_lds()"
            raise ValueError(f"input of length {u.shape[1]} is longer than seq_len = {self.seq_len}: {advice}")
        y = self.stu(u.to(self.stu.M.dtype))
        y = y if self.mlp is None else self.mlp(y)
        return y if x.ndim == 3 else y[0]

    @torch.no_grad()
    def fit(self, inputs, targets) -> "MiniSTU":
        """Set M to the least-squares solution on inputs [N, T, input_dim], targets [N, T, output_dim]; returns self.

        The model is linear in M: this is a regression on the F · input_dim filter outputs, done in float64. In white
        coordinates the normal equations are as well conditioned as the inputs are, so they lose no digits."""
        if self.mlp is not None:
            raise ValueError("fit solves a linear model; with use_mlp=True train by gradient descent")
        x, y = check_input(inputs, self.input_dim, "inputs"), check_input(targets, self.output_dim, "targets")
        if x.shape[:2] != y.shape[:2] or x.shape[1] > self.seq_len:
            shapes = f"{list(x.shape)} and {list(y.shape)}"
            raise ValueError(f"inputs and targets must be equally many and long, at most {self.seq_len}, got {shapes}")
        bank = self.bank[: x.shape[1]].to(x.device)
        apart = torch.eye(bank.shape[1], dtype=bank.dtype, device=x.device)[:, None]  # M [F, 1, F]: one output each
        gram, moment = 0, 0
        for x, y in zip(x.double().split(16), y.double().split(16)):
            f = full_conv(x.transpose(1, 2).flatten(0, 1)[..., None], bank, apart)  # [16 · in, T, F]
            f = f.unflatten(0, (len(x), -1)).permute(0, 2, 3, 1).flatten(2).flatten(0, 1)  # [16 T, F · in]
            gram, moment = gram + f.T @ f, moment + f.T @ y.flatten(0, 1)
        M = torch.linalg.pinv(gram, rtol=1e-13, hermitian=True) @ moment  # [F · in, out]
        self.stu.M.copy_(M.view_as(self.stu.M))
        return self

    @torch.no_grad()
    def to_lds(self) -> LDS:
        """The same map as an explicit diagonal system (poles A, B, C), float64: one copy of the poles for each input.

        Solves Σ_n α_n^t R_n = Σ_f Φ[t, f] M_f for the residues R [n, in, out] on t < L. The coefficients are large and
        cancel, which float64 affords. Past L, 300 lags out to 40 L ask the response to fade instead of growing."""
        if self.mlp is not None:
            raise ValueError("to_lds converts the linear model; one with use_mlp=True is no linear system")
        L, M = self.seq_len, self.stu.M.double().cpu()
        poles = self.lds.powers[1].diagonal()
        far = torch.logspace(math.log10(L), math.log10(40 * L), 301, dtype=torch.float64)
        weight = torch.cat([torch.ones(L), 1e-6 * far.diff().sqrt()])[:, None].double()
        powers = weight * poles ** torch.cat([torch.arange(L), far[:-1].round()])[:, None]  # [L + 300, n]
        kernel = F.pad(torch.einsum("tf,fio->tio", self.bank, M).flatten(1), (0, 0, 0, 300))
        scale = powers.norm(dim=0)
        residues = torch.linalg.lstsq(powers / scale, kernel, rcond=1e-14, driver="gelsd").solution / scale[:, None]
        n, d_in, d_out = len(poles), self.input_dim, self.output_dim
        lds = LDS(n * d_in, d_in, d_out, dtype=torch.float64, diagonal=True)
        lds.A.copy_(poles.repeat_interleave(d_in))  # state (pole, input)
        lds.B.copy_(torch.eye(d_in).repeat(n, 1))
        lds.C.copy_(residues.reshape(n * d_in, d_out).T)
        return lds.to(self.stu.M.device)


# ----------------------------------------------------------------------------------------------------------------------
# 3. Gradient descent


def live_line(label, step, steps, loss, width=30):
    """One line that redraws itself on a terminal; elsewhere (a file, a log) every tenth of the way."""
    last = step == steps
    if not sys.stdout.isatty() and not last and step % max(1, steps // 10):
        return
    done = width * step // steps
    line = f"{label:<22} step {step:5d}/{steps}  loss {loss:.2e}  [{'█' * done}{'·' * (width - done)}]"
    print(line, end="\r" if sys.stdout.isatty() and not last else "\n", flush=True)


def train(model, lds, seq_len, num_steps, batch_size, learning_rate, label=None) -> list[float]:
    """Adam on the mean squared error against lds, new white inputs at every step -> the loss at each step.

    The learning rate is constant for half of the steps, then falls linearly to zero."""
    if num_steps < 0 or batch_size < 1 or learning_rate <= 0:
        given = f"{num_steps}, {batch_size}, {learning_rate}"
        raise ValueError(f"need num_steps >= 0, batch_size >= 1, learning_rate > 0, got {given}")
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, 2 - 2 * step / max(1, num_steps)))
    losses = []
    model.train()
    for step in range(1, num_steps + 1):
        x, y = sample(lds, batch_size, seq_len)
        loss = F.mse_loss(model(x), y)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss is {losses[-1]} at step {step}: lower learning_rate = {learning_rate}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if label and (step % 10 == 0 or step == num_steps):
            live_line(label, step, num_steps, losses[-1])
    model.eval()
    return losses


@torch.no_grad()
def sample(lds, batch_size, seq_len):
    """White inputs [batch_size, seq_len, in], and what the system answers [batch_size, seq_len, out]."""
    x = torch.randn(batch_size, seq_len, lds.input_dim, device=lds.B.device, dtype=lds.B.dtype)
    return x, lds(x)


def train_stu_on_lds(
    lds: LDS, seq_len: int, num_filters: int, num_steps: int = 1000, batch_size: int = 32, learning_rate: float = 1e-3,
    verbose: bool = True, use_mlp: bool = False, mlp_hidden_dim: int | None = None, mlp_num_layers: int = 2,
    mlp_dropout: float = 0.0, mlp_activation: str = "relu",
) -> tuple[MiniSTU, list[float]]:  # fmt: skip
    """A MiniSTU trained to imitate lds -> (the model, the loss at each step). verbose draws a line as it goes."""
    stu = MiniSTU(
        seq_len, num_filters, lds.input_dim, lds.output_dim, False, use_mlp, mlp_hidden_dim, mlp_num_layers,
        mlp_dropout, mlp_activation, lds.B.dtype, lds.B.device,
    )  # fmt: skip
    return stu, train(stu, lds, seq_len, num_steps, batch_size, learning_rate, "STU" if verbose else None)


@torch.no_grad()
def unseen_error(model, lds, seq_len) -> tuple[float, float]:
    """Mean squared error on 64 unseen sequences, and the same over the variance of their outputs."""
    x, y = sample(lds, 64, seq_len)
    mse = F.mse_loss(model(x), y).item()
    return mse, mse / y.var().item()


# ----------------------------------------------------------------------------------------------------------------------
# 4. What the paper compares with. Each maps [B, T, d_in] to [B, T, d_out] and is as small as its idea allows: the task
# is linear, so whatever is not part of the idea (MLPs, norms) is left out; it would only stand in the way.


class S4D(nn.Module):
    """d channels, each filtered by its own N complex exponentials (S4D-Lin initialisation, zero-order hold)."""

    def __init__(self, d_in, d_out, d=24, N=16):
        super().__init__()
        self.encode, self.decode = nn.Linear(d_in, d), nn.Linear(d, d_out)
        self.log_dt = nn.Parameter(torch.empty(d).uniform_(math.log(1e-3), math.log(1e-1)))
        self.log_decay = nn.Parameter(torch.full((d, N), math.log(0.5)))
        self.frequency = nn.Parameter(math.pi * torch.arange(N).repeat(d, 1).float())
        self.C = nn.Parameter(torch.randn(d, N, 2) / N**0.5)
        self.D = nn.Parameter(torch.ones(d))

    def forward(self, x):
        u = self.encode(x)
        A = torch.complex(-self.log_decay.exp(), self.frequency)  # [d, N]
        dtA = A * self.log_dt.exp()[:, None]
        powers = torch.exp(dtA * torch.arange(x.shape[1])[:, None, None])  # [T, d, N]
        kernel = 2 * (powers * torch.view_as_complex(self.C) * (dtA.exp() - 1) / A).sum(-1).real  # [T, d]
        return self.decode(convolve(u, kernel) + self.D * u)


def prefix_scan(a, x):
    """h_t = a_t h_{t-1} + x_t along dim 1: two steps at a time are a step of a sequence of half the length."""
    half = x.shape[1] // 2
    if half == 0:
        return x
    first, second = slice(0, 2 * half, 2), slice(1, None, 2)
    odd = prefix_scan(a[:, second] * a[:, first], x[:, second] + a[:, second] * x[:, first])  # h_1, h_3, ...
    even = torch.cat([x[:, :1], x[:, 2::2] + a[:, 2::2] * odd[:, : (x.shape[1] - 1) // 2]], dim=1)  # h_0, h_2, ...
    return torch.cat([torch.stack([even[:, :half], odd], dim=2).flatten(1, 2), even[:, half:]], dim=1)


class SelectiveSSM(nn.Module):
    """Mamba's layer: a short convolution, h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t, y_t = C_t h_t + D u_t, a gate.

    Δ, B and C are functions of the input. h is [B, T, d, N]."""

    def __init__(self, d_in, d_out, d=24, N=8):
        super().__init__()
        self.encode, self.decode = nn.Linear(d_in, 2 * d), nn.Linear(d, d_out)
        self.conv = nn.Conv1d(d, d, 4, padding=3, groups=d)
        self.select = nn.Linear(d, 2 * N + 1, bias=False)  # B, C and a Δ that the channels share up to scale and bias
        self.dt_scale = nn.Parameter(torch.randn(d))
        dt = torch.empty(d).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus(bias) = dt
        self.log_A = nn.Parameter(torch.arange(1, N + 1).float().log().repeat(d, 1))
        self.D = nn.Parameter(torch.ones(d))

    def forward(self, x):
        u, gate = self.encode(x).chunk(2, dim=-1)  # [B, T, d]
        u = F.silu(self.conv(u.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        B, C, dt = self.select(u).split([self.log_A.shape[1]] * 2 + [1], dim=-1)
        dt = F.softplus(dt * self.dt_scale + self.dt_bias)  # [B, T, d]
        a = torch.exp(-dt[..., None] * self.log_A.exp())  # [B, T, d, N]
        h = prefix_scan(a, (dt * u)[..., None] * B[:, :, None])
        y = (h * C[:, :, None]).sum(-1) + self.D * u
        return self.decode(y * F.silu(gate))


class Attention(nn.Module):
    """Causal attention over the whole sequence, two heads, rotary positions; the input also passes by it."""

    def __init__(self, d_in, d_out, seq_len, d=24):
        super().__init__()
        self.encode, self.decode = nn.Linear(d_in, d), nn.Linear(d, d_out)
        self.attention = SlidingWindowAttention(d, 2, seq_len, softcap=0.0)

    def forward(self, x):
        u = self.encode(x)
        return self.decode(u + self.attention(u))


def compare(lds, args):
    """Train every model on the same data at its best rate, print the table, draw the losses."""
    d_in, d_out, L, K = args.input_dim, args.output_dim, args.seq_len, args.num_filters
    with torch.no_grad():
        lds.C /= sample(lds, 64, L)[1].std()  # outputs of unit variance: no model has to find their scale first
    solved = MiniSTU(L, K, d_in, d_out)
    budget = solved.stu.M.numel()

    def near_budget(make):
        """make at the width, a multiple of 4, that comes nearest to the STU's number of parameters."""
        width = min(range(4, 260, 4), key=lambda n: abs(count(make(n)) - budget))
        return lambda: make(width)

    models = {
        "STU": lambda: MiniSTU(L, K, d_in, d_out),
        "S4D": near_budget(lambda n: S4D(d_in, d_out, n)),
        "selective SSM": near_budget(lambda n: SelectiveSSM(d_in, d_out, n)),
        "attention": near_budget(lambda n: Attention(d_in, d_out, L, n)),
        "LDS, dense A": near_budget(lambda n: LDS(n, d_in, d_out)),
        "LDS, diagonal A": near_budget(lambda n: random_LDS(n, d_in, d_out)),
    }
    curves, table = {}, []

    def attempt(make, steps, rate, label=None):
        torch.manual_seed(args.seed + 1)  # the same data for every model and rate
        model = make()
        try:
            return model, train(model, lds, L, steps, args.batch_size, rate, label)
        except FloatingPointError:
            return model, [math.inf]

    def report(name, model, rate, seconds):
        torch.manual_seed(args.seed + 2)
        error = unseen_error(model, lds, L)[1]
        table.append(f"{name:<20} {count(model):>6} {rate:>6} {seconds:>7.1f} s {error:>10.1e}")

    data = sample(lds, 4 * args.batch_size, L)
    start = time.perf_counter()
    report("STU, least squares", solved.fit(*data), "-", time.perf_counter() - start)
    rates = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    for name, make in models.items():  # each rate gets a quarter of the steps; the best one then gets all of them
        final = {rate: sum(attempt(make, 1 + args.steps // 4, rate)[1][-10:]) for rate in rates}
        rate, start = min(final, key=final.get), time.perf_counter()
        model, curves[name] = attempt(make, args.steps, rate, name)
        report(name, model, f"{rate:g}", time.perf_counter() - start)
    print(f"\n{'':<20} {'params':>6} {'rate':>6} {'time':>9} {'MSE/var(y)':>10}", *table, sep="\n")
    print(f"{args.steps} steps of {args.batch_size} sequences each; least squares: {4 * args.batch_size} sequences")
    print(f"rates tried: {', '.join(f'{r:g}' for r in rates)}; time: last run, {torch.get_num_threads()} CPU threads")
    draw_comparison(args.out, curves, unseen_error(solved, lds, L)[1], lds, L)


def count(model):
    return sum(p.numel() for p in model.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# 5. What one watches


def demo(lds, args):
    L, K, sizes = args.seq_len, args.num_filters, (lds.input_dim, lds.output_dim)
    radius = lds.A.abs().max()
    print(f"system: state {lds.state_dim}, {sizes[0]} inputs, {sizes[1]} outputs, spectral radius {radius:.3f}")
    start = time.perf_counter()
    learned, losses = train_stu_on_lds(lds, L, K, args.steps, args.batch_size, args.learning_rate)
    spent = [time.perf_counter() - start]
    raw = STU(*sizes, L, K, use_approx=False)  # the same functions, in the coordinates of the scaled filters
    raw_losses = train(raw, lds, L, args.steps, args.batch_size, args.learning_rate, "STU, scaled filters")
    solved, data = MiniSTU(L, K, *sizes), sample(lds, max(16, 2**14 // L), L)
    spent.append(time.perf_counter() - start - sum(spent))
    start = time.perf_counter()
    solved.fit(*data)
    spent.append(time.perf_counter() - start)
    print(f"\non unseen input, {torch.get_num_threads()} CPU threads:")
    names = ("gradient descent", "  scaled filters", "least squares")
    for name, model, seconds in zip(names, (learned, raw, solved), spent):
        mse, relative = unseen_error(model, lds, L)
        print(f"  {name:<17} MSE {mse:.1e} = {relative:.1e} var(y)   {seconds:5.2f} s")
    (x, y), system = sample(lds, 1, L), solved.to_lds()
    with torch.no_grad():
        stu, recurrence = solved(x), system(x)
    poles = f"{len(system.A)} states, poles from {system.A.min():.4f} to {system.A.max():.4f}"
    print(f"\nthe solved STU as a recurrence, {poles}:\n    t       true        STU recurrence")
    for t in range(0, L, max(1, L // 6)):
        print(f"{t:5d} {y[0, t, 0]:10.6f} {stu[0, t, 0]:10.6f} {recurrence[0, t, 0]:10.6f}")
    print(f"largest difference between STU and recurrence: {(recurrence - stu).abs().max():.1e}")
    curves = {"white filters": losses, "scaled filters": raw_losses}
    if losses:
        terminal_plot("loss, log scale", curves, log=True)
    terminal_plot("unseen input, the last steps", {"true": y[0, -72:, 0].tolist(), "STU": stu[0, -72:, 0].tolist()})
    draw_demo(args.out, solved, curves, unseen_error(solved, lds, L)[0], y[0, :, 0], stu[0, :, 0])


def terminal_plot(title: str, curves: dict[str, list[float]], log: bool = False, rows: int = 12, columns: int = 72):
    """Curves as characters: for terminals, and for machines with no display."""
    scale = (lambda v: math.log10(max(v, 1e-30))) if log else (lambda v: v)
    values = [scale(v) for curve in curves.values() for v in curve]
    low, high = min(values), max(values)
    grid = [[" "] * columns for _ in range(rows)]
    for mark, curve in zip(".o", curves.values()):
        for c in range(columns):
            v = scale(curve[round(c * (len(curve) - 1) / (columns - 1))])
            grid[round((rows - 1) * (high - v) / max(high - low, 1e-30))][c] = mark
    print(f"\n{title}   " + "   ".join(f"{mark} {name}" for mark, name in zip(".o", curves)))
    labels = {0: high, rows - 1: low}
    for i, line in enumerate(grid):
        label = f"{10 ** labels[i] if log else labels[i]:.1e}" if i in labels else ""
        print(f"{label:>9} │{''.join(line)}")


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise ImportError("the picture needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({
        "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "axes.titlesize": 11,
        "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False, "font.size": 9, "savefig.dpi": 110,
    })  # fmt: skip
    return plt


def draw_demo(path, model, curves, solved_mse, true, predicted):
    plt = pyplot()
    figure, axes = plt.subplot_mosaic([["filters", "loss"], ["path", "path"]], figsize=(11, 6.6), layout="constrained")
    L, K = model.seq_len, min(6, model.num_filters)
    phi = get_spectral_filters(L, K, dtype=torch.float64)
    for k in range(K):
        color = plt.cm.viridis(k / K)
        axes["filters"].plot(range(1, L + 1), phi[:, k] / phi[:, k].norm(), color=color, label=f"$\\phi_{{{k + 1}}}$")
    axes["filters"].set(title="What is fixed: the filters (each of norm 1)", xlabel="lag + 1", xscale="log")
    axes["filters"].legend(ncols=2)
    for (name, losses), color in zip(curves.items(), ("C0", "C1")):
        axes["loss"].semilogy(losses, color=color, label=f"gradient descent, {name}")
    axes["loss"].axhline(solved_mse, color="black", linestyle="--", label="least squares, no steps")
    axes["loss"].set(title="What is learned: a linear map (mean squared error)", xlabel="step")
    axes["loss"].legend()
    axes["path"].plot(true, color="0.75", linewidth=5, label="the system's output")
    axes["path"].plot(predicted, color="C3", linewidth=1.2, label="the STU's prediction")
    axes["path"].set(title="On input never seen, one output", xlabel="time", xlim=(0, len(true) - 1))
    axes["path"].legend(ncols=2)
    figure.savefig(path)
    print(f"\n{path}: filters, losses, trajectory")


def draw_comparison(path, curves, solved_error, lds, seq_len):
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    for name, losses in curves.items():
        smooth = torch.tensor(losses).unfold(0, min(10, len(losses)), 1).mean(-1)
        axis.semilogy(smooth, label=name)
    axis.axhline(solved_error, color="black", linestyle="--", label="STU, least squares (test)")
    what = f"state {lds.state_dim}, spectral radius {lds.A.abs().max():.2f}, length {seq_len}"
    axis.set(title=f"Learning a linear dynamical system: {what}", xlabel="step", ylabel="mean squared error / var(y)")
    axis.legend(ncols=2)
    figure.savefig(path)
    print(f"{path}: losses (mean of 10 steps)")


def backends(args):
    """Time the two backends, forward and training step, over lengths, widths and batches."""

    def milliseconds(*calls):  # in turn, so that a busy machine slows all of them
        times = []
        for _ in range(8):
            for call in calls:
                start = time.perf_counter()
                call()
                times.append(1e3 * (time.perf_counter() - start))
        return [min(times[i :: len(calls)]) for i in range(len(calls))]

    K = args.num_filters
    print(f"{K} filters, {torch.get_num_threads()} CPU threads, times in ms, best of 8")
    print(f"{'':>20} |{'forward':^23} |{'training step':^23} |")
    print("length  width  batch |spectral    lds  ratio |spectral    lds  ratio | disagree")
    wins = {1: [], 2: []}
    sizes = [(L, 64, 1) for L in (128, 256, 512, 1024, 2048, 4096)]
    sizes += [(1024, d, 1) for d in (16, 32, 128, 256)] + [(1024, 64, batch) for batch in (2, 4, 8)]
    for L, d, batch in sizes:
        x, (fft, lds) = torch.randn(batch, L, d), [MiniSTU(L, K, d, d, backend=b) for b in ("spectral", "lds")]
        lds.load_state_dict(fft.state_dict())
        with torch.no_grad():
            forward = milliseconds(lambda: fft(x), lambda: lds(x))
            error = (lds(x) - fft(x)).norm() / fft(x).norm()
        step = milliseconds(lambda: fft(x).square().mean().backward(), lambda: lds(x).square().mean().backward())
        columns = [f"{a:8.1f} {b:6.1f} {a / b:5.1f}x" for a, b in (forward, step)]
        print(f"{L:6d} {d:6d} {batch:6d} |{columns[0]} |{columns[1]} | {error:.0e}", flush=True)
        for factor in wins:
            wins[factor] += [(L, d, batch)] * (min(forward[0] / forward[1], step[0] / step[1]) >= factor)
    print("crossover, as (length, width, batch):")
    for factor, where in wins.items():
        print(f"  the recurrence is {factor}x as fast or better, forward and training, at", *where)


def main():
    parser = argparse.ArgumentParser(description="Watch a spectral transform unit learn a linear dynamical system.")
    parser.add_argument("--compare", action="store_true", help="train other models on the same system")
    parser.add_argument("--backends", action="store_true", help="time convolution against recurrence")
    for name, value, text in (
        ("state-dim", 20, "hidden numbers of the system"), ("input-dim", 10, "its inputs"),
        ("output-dim", 5, "its outputs"), ("seq-len", 128, "length of the sequences and the filters"),
        ("num-filters", 24, "K, for each sign"), ("steps", 1000, "of gradient descent"),
        ("batch-size", 32, "sequences a step"), ("learning-rate", 1e-3, "of Adam; --compare finds its own"),
        ("lower-bound", 0.1, "of |poles|"), ("spectral-radius", 0.99, "the largest |pole|"),
        ("seed", 0, "of everything random"), ("out", "lds.png", "the picture"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"{text} (default: %(default)s)")
    if parser.parse_known_args()[0].compare:
        parser.set_defaults(state_dim=256, seq_len=256, batch_size=16, steps=600, out="compare.png")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    if args.backends:
        return backends(args)
    bounds = {"lower_bound": args.lower_bound, "spectral_radius": args.spectral_radius}
    lds = random_LDS(args.state_dim, args.input_dim, args.output_dim, **bounds)
    (compare if args.compare else demo)(lds, args)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FloatingPointError, ImportError) as error:
        sys.exit(f"error: {error}")
