"""
Watch a spectral transform unit learn a linear dynamical system.

    python lds.py               an STU learns a system in closed form and by gradient descent, then becomes a
                                recurrence; under a minute on two cores, the picture goes to lds.png
    python lds.py --compare     a larger one, for S4D, a selective SSM, attention and the system itself too
    python lds.py --backends    the cost of the layer as a convolution and as a recurrence, where they cross
    python lds.py --help        every dimension, the seed, the spectral radius, the number of steps

The task. A hidden state h of n numbers turns inputs u into outputs y, and only u and y are seen:
    h_t = A h_{t-1} + B u_t,    y_t = C h_t,    that is    y_t = Σ_s C A^s B u_{t-s}.
Learning A, B, C is hard: when the spectral radius of A (its largest |eigenvalue|) is near 1 the memory is
long, and the loss is anything but convex in A. An STU does not learn A. It filters u with the few fixed
signals that span all decays α^t (stu.py, section 1) and learns a linear map on top, so its loss is a
parabola, with a bottom one can compute.

The letters, as in stu.py: B batch (and the input matrix), T time, L seq_len, K base filters, Φ [L, F] the
filter bank, M [F, d_in, d_out] the learned map. Responses are written [in, out]: C A^t B for all t is
[T, in, out].
"""

import argparse
import functools
import math
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stu import STU, FilterBank, SlidingWindowAttention, get_spectral_filters

# ------------------------------------------------------------------------------------------------------------
# 1. The system to learn


def check_input(x: Tensor, width: int, name: str = "input", seq_len: float = math.inf) -> Tensor:
    """x [batch, T, width] or [T, width] -> [batch, T, width]; ValueError unless finite, 1 <= T <= seq_len."""
    if x.ndim not in (2, 3) or x.shape[-1] != width or x.shape[-2] < 1:
        raise ValueError(f"{name} must be [batch (optional), length >= 1, {width}], got {list(x.shape)}")
    if x.shape[-2] > seq_len:
        advice = "make a model with a longer one, or run this one as a recurrence: to_lds()"
        raise ValueError(f"{name} of length {x.shape[-2]} is longer than seq_len = {seq_len}: {advice}")
    if not x.isfinite().all():
        raise ValueError(f"{name} holds {(~x.isfinite()).sum()} NaN or infinite values of {x.numel()}")
    return x if x.ndim == 3 else x[None]


def convolve(u: Tensor, h: Tensor) -> Tensor:
    """y_t = Σ_s h_s u_{t-s}: u [B, T, in], h [T, in, out] -> [B, T, out]; h [T, d] is a filter a channel."""
    T = u.shape[1]
    n = 2 * T  # a shorter FFT would wrap the end around to the beginning
    u_f, h_f = torch.fft.rfft(u, n=n, dim=1), torch.fft.rfft(h, n=n, dim=0)
    y_f = u_f * h_f if h.ndim == 2 else torch.einsum("bfi,fio->bfo", u_f, h_f)
    return torch.fft.irfft(y_f, n=n, dim=1)[:, :T]


class LDS(nn.Module):
    """h_t = A h_{t-1} + B u_t, y_t = C h_t from h = 0: u [batch, T, input_dim] -> y [batch, T, output_dim].

    A [n, n], with diagonal=True its diagonal [n]; B [n, input_dim], C [output_dim, n]; all are learnable.
    Unbatched u [T, input_dim] gives [T, output_dim]. ValueError if u is misshapen or not finite."""

    def __init__(
        self, state_dim: int, input_dim: int, output_dim: int, dtype: torch.dtype = torch.float32,
        device=None, diagonal: bool = False,
    ):  # fmt: skip
        super().__init__()
        if min(state_dim, input_dim, output_dim) < 1:
            raise ValueError(f"dimensions must be at least 1, got {state_dim}, {input_dim}, {output_dim}")
        self.state_dim, self.input_dim, self.output_dim = n, d_in, d_out = state_dim, input_dim, output_dim
        to = {"dtype": dtype, "device": device}
        A = 2 * torch.rand(n, **to) - 1 if diagonal else torch.randn(n, n, **to) * (0.9 / n**0.5)
        self.A = nn.Parameter(A)  # diagonal: uniform in [-1, 1]; dense: of spectral radius about 0.9
        self.B = nn.Parameter(torch.randn(n, d_in, **to) / d_in)
        self.C = nn.Parameter(torch.randn(d_out, n, **to) / n)

    def impulse_response(self, T: int) -> Tensor:
        """C A^t B for t < T: [T, in, out]. No loop over time: powers of the poles, or log2(T) doublings."""
        if self.A.ndim == 1:
            powers = self.A ** torch.arange(T, device=self.A.device)[:, None]
            return torch.einsum("tn,ni,on->tio", powers, self.B, self.C)
        X, power = self.B[:, None], self.A  # [n, t, in]: A^s B for s < t
        while X.shape[1] < T:
            X, power = torch.cat([X, torch.einsum("mn,nti->mti", power, X)], dim=1), power @ power
        return torch.einsum("on,nti->tio", self.C, X[:, :T])

    def forward(self, u: Tensor) -> Tensor:
        x = check_input(u, self.input_dim).to(self.B)
        y = convolve(x, self.impulse_response(x.shape[1]))
        return y if u.ndim == 3 else y[0]


def random_LDS(
    state_dim: int, input_dim: int, output_dim: int, lower_bound: float = 0.1, device=None,
    spectral_radius: float = 0.99,
) -> LDS:  # fmt: skip
    """A diagonal system, poles ±α: α uniform in [lower_bound, spectral_radius], one at the upper end."""
    if not 0 <= lower_bound <= spectral_radius <= 1:
        raise ValueError(f"need 0 <= {lower_bound = } <= {spectral_radius = } <= 1")
    lds = LDS(state_dim, input_dim, output_dim, device=device, diagonal=True)
    with torch.no_grad():
        lds.A.copy_(lds.A.sign() * (lower_bound + (spectral_radius - lower_bound) * lds.A.abs()))
        lds.A[0] = spectral_radius * lds.A[0].sign()
    return lds


# ------------------------------------------------------------------------------------------------------------
# 2. The learner: an STU in white coordinates
#
# What limits gradient descent here is scale. get_spectral_filters scales φ_k by λ_k^(1/4), and φ_k overlaps
# with the alternating filters: the curvature of the loss differs between directions by more than 1e12, and no
# number of steps reaches the flat ones. But only the span of the filters matters, so choose coordinates in
# which white input (independent, of unit variance) gives uncorrelated features of equal size. At time t a
# filter has seen lags 0..t only; averaged over the sequence, lag s counts with weight w_s = (L - s)/L, and
# the features of white input have covariance Φᵀ diag(w) Φ. Gram-Schmidt under that product turns Φ into white
# filters: the curvature is about 1 in every direction, and plain Adam converges. Directions 1e-5 below the
# first are dropped: they carry 1e-13 of the variance of a stable system's outputs, and float32 and the
# recurrent form have no digits there.


def white_filters(phi: Tensor, use_hankel_L: bool = False) -> Tensor:
    """Base filters [L, K] -> float64 [L, F], orthonormal under w, of the same span (± branches included)."""
    bank, t = phi.detach().double().cpu(), torch.arange(len(phi), dtype=torch.float64)[:, None]
    if not use_hankel_L:  # φ_1, ±φ_1, φ_2, ±φ_2, ...: strongest first
        bank = torch.stack([bank, (-1) ** t * bank], dim=2).flatten(1)
    root_w = (1 - t / len(t)).sqrt()
    added = torch.linalg.qr(root_w * bank).R.diagonal().abs()  # what each filter adds to those before it
    Q, R = torch.linalg.qr(root_w * bank[:, : len(added)][:, added > 1e-5 * added[0]])
    return Q * R.diagonal().sign() / root_w


class MiniSTU(nn.Module):
    """A full STU, and an optional MLP on its outputs: [batch, T, input_dim] -> [batch, T, output_dim].

    T is at most seq_len. Unbatched input [T, input_dim] gives [T, output_dim]. precomputed_filters [seq_len,
    num_filters]: base filters instead of the Hankel matrix's. backend: "spectral" (FFT) or "lds" (recurrence
    over blocks), the same function. ValueError if an argument or an input does not fit."""

    def __init__(
        self, seq_len: int, num_filters: int, input_dim: int, output_dim: int, use_hankel_L: bool = False,
        use_mlp: bool = False, mlp_hidden_dim: int | None = None, mlp_num_layers: int = 2,
        mlp_dropout: float = 0.0, mlp_activation: str = "relu", dtype: torch.dtype = torch.float32,
        device=None, precomputed_filters: Tensor | None = None, backend: str = "spectral",
    ):  # fmt: skip
        super().__init__()
        routes, units = {"spectral": "fft", "lds": "lds"}, {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}
        for name, value, known in (("backend", backend, routes), ("mlp_activation", mlp_activation, units)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if not 1 <= num_filters <= seq_len or mlp_num_layers < 1:
            got = f"{num_filters} filters for length {seq_len}, {mlp_num_layers} layers"
            raise ValueError(f"need 1 <= num_filters <= seq_len and mlp_num_layers >= 1, got {got}")
        phi = precomputed_filters
        if phi is None:
            phi = get_spectral_filters(seq_len, num_filters, use_hankel_L, dtype=torch.float64)
        if phi.shape != (seq_len, num_filters):
            raise ValueError(f"precomputed_filters must be [{seq_len}, {num_filters}], got {list(phi.shape)}")
        self.seq_len, self.num_filters = seq_len, num_filters
        self.input_dim, self.output_dim = input_dim, output_dim
        self.bank = white_filters(phi, use_hankel_L)  # [L, F] float64
        bank = FilterBank(
            self.bank, n_pairs=40, chunk=32, fade=1e-6, tolerance=math.inf
        )  # 80 states give 1e-4, and speed
        options = {"precomputed_filters": bank, "backend": routes[backend]}
        self.stu = STU(input_dim, output_dim, seq_len, use_approx=False, **options)
        hidden = [mlp_hidden_dim or 2 * output_dim] * (mlp_num_layers - 1)
        widths, layers = [output_dim, *hidden, output_dim], []
        for i in range(mlp_num_layers if use_mlp else 0):
            layers += [units[mlp_activation](), nn.Dropout(mlp_dropout), nn.Linear(*widths[i : i + 2])]
        self.mlp = nn.Sequential(*layers[2:])  # a linear layer comes first; empty, it is the identity
        self.to(device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        u = check_input(x, self.input_dim, seq_len=self.seq_len)
        y = self.mlp(self.stu(u.to(self.stu.M.dtype)))
        return y if x.ndim == 3 else y[0]

    @torch.no_grad()
    def fit(self, inputs: Tensor, targets: Tensor) -> "MiniSTU":
        """Set M by least squares on inputs [N, T, input_dim], targets [N, T, output_dim]; returns self.

        The model is linear in M: this is a regression on the F · input_dim filter outputs, in float64. In
        white coordinates the normal equations are as well conditioned as the inputs are, so they lose no
        digits. ValueError with use_mlp=True, or if inputs and targets differ in number or length."""
        if len(self.mlp):
            raise ValueError("fit solves a linear model; with use_mlp=True train by gradient descent")
        x = check_input(inputs, self.input_dim, "inputs", self.seq_len)
        y = check_input(targets, self.output_dim, "targets")
        if x.shape[:2] != y.shape[:2]:
            raise ValueError(f"inputs {list(x.shape)}, targets {list(y.shape)}: not equally many and long")
        bank = self.bank[: x.shape[1], None].to(x.device)  # [T, 1, F]: one channel to F filter outputs
        gram, moment = 0, 0
        for u, target in zip(x.double().split(16), y.double().split(16)):
            f = convolve(u.transpose(1, 2).flatten(0, 1)[..., None], bank)  # [16 · in, T, F]
            f = f.unflatten(0, (len(u), -1)).permute(0, 2, 3, 1).flatten(2).flatten(0, 1)  # [16 T, F · in]
            gram, moment = gram + f.T @ f, moment + f.T @ target.flatten(0, 1)
        M = torch.linalg.pinv(gram, rtol=1e-13, hermitian=True) @ moment  # [F · in, out]
        self.stu.M.copy_(M.view_as(self.stu.M))
        return self

    @torch.no_grad()
    def to_lds(self) -> LDS:
        """The same map as a diagonal LDS in float64, for inputs of any length; each input has its own poles.

        Solves Σ_n α_n^t R_n = Σ_f Φ[t, f] M_f for the residues R [n, in, out] on t < L. They are large and
        cancel, which float64 affords. Past L, 300 lags out to 40 L ask the response to fade instead of
        growing. ValueError with use_mlp=True."""
        if len(self.mlp):
            raise ValueError("to_lds converts the linear model; one with use_mlp=True is no linear system")
        L, M = self.seq_len, self.stu.M.double().cpu()
        poles = self.stu.bank.lds.powers[1].diagonal()
        far = L * 40 ** torch.linspace(0, 1, 301, dtype=torch.float64)
        t = torch.cat([torch.arange(L), far[:-1].round()])
        weight = torch.cat([torch.ones(L), 1e-6 * far.diff().sqrt()])
        powers = weight[:, None] * poles ** t[:, None]  # [L + 300, n]
        kernel = F.pad(torch.einsum("tf,fio->tio", self.bank, M).flatten(1), (0, 0, 0, 300))
        residues = torch.linalg.lstsq(powers, kernel, rcond=1e-14, driver="gelsd").solution  # [n, in · out]
        n, d_in, d_out = len(poles), self.input_dim, self.output_dim
        lds = LDS(n * d_in, d_in, d_out, dtype=torch.float64, diagonal=True)
        lds.A.copy_(poles.repeat_interleave(d_in))  # state (pole, input)
        lds.B.copy_(torch.eye(d_in).repeat(n, 1))
        lds.C.copy_(residues.reshape(n * d_in, d_out).T)
        return lds.to(self.stu.M.device)


# ------------------------------------------------------------------------------------------------------------
# 3. Gradient descent


@torch.no_grad()
def sample(lds: LDS, batch_size: int, seq_len: int) -> tuple[Tensor, Tensor]:
    """White inputs [batch_size, seq_len, in], and what the system answers [batch_size, seq_len, out]."""
    x = torch.randn(batch_size, seq_len, lds.input_dim).to(lds.B)
    return x, lds(x)


@torch.no_grad()
def unseen_error(model: nn.Module, lds: LDS, seq_len: int) -> tuple[float, float]:
    """Mean squared error on 64 unseen sequences, and the same over the variance of their outputs."""
    x, y = sample(lds, 64, seq_len)
    mse = F.mse_loss(model(x), y).item()
    return mse, mse / y.var().item()


def train(
    model: nn.Module, lds: LDS, seq_len: int, num_steps: int, batch_size: int, learning_rate: float, label=""
) -> list[float]:
    """Adam on the mean squared error against lds, new white inputs at every step -> the loss at each step.

    The learning rate is constant for half of the steps, then falls linearly to zero. With a label, a live
    line. ValueError for numbers that are too small, FloatingPointError when the loss is no longer finite."""
    if num_steps < 0 or batch_size < 1 or learning_rate <= 0:
        raise ValueError(f"need {num_steps = } >= 0, {batch_size = } >= 1, {learning_rate = } > 0")
    optimizer, losses = torch.optim.Adam(model.parameters()), []
    terminal = sys.stdout.isatty()  # there the line redraws itself; a file or a log gets ten of them
    interval = max(1, num_steps // (100 if terminal else 10))
    model.train()
    for step in range(1, num_steps + 1):
        optimizer.param_groups[0]["lr"] = learning_rate * min(1, 2 - 2 * (step - 1) / num_steps)
        x, y = sample(lds, batch_size, seq_len)
        loss = F.mse_loss(model(x), y)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss is {losses[-1]} at step {step}: lower {learning_rate = }")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if label and (step % interval == 0 or step == num_steps):
            line = f"{label:<22} step {step:5d}/{num_steps}  loss {losses[-1]:.2e}"
            end = "\r" if terminal and step < num_steps else "\n"
            print(f"{line}  [{'█' * (30 * step // num_steps):·<30}]", end=end, flush=True)
    model.eval()
    return losses


def train_stu_on_lds(
    lds: LDS, seq_len: int, num_filters: int, num_steps: int = 1000, batch_size: int = 32,
    learning_rate: float = 1e-3, verbose: bool = True, use_mlp: bool = False,
    mlp_hidden_dim: int | None = None, mlp_num_layers: int = 2, mlp_dropout: float = 0.0,
    mlp_activation: str = "relu",
) -> tuple[MiniSTU, list[float]]:  # fmt: skip
    """A MiniSTU trained to imitate lds -> (model, the loss at each step); errors as in MiniSTU and train."""
    sizes = (seq_len, num_filters, lds.input_dim, lds.output_dim)
    mlp = (use_mlp, mlp_hidden_dim, mlp_num_layers, mlp_dropout, mlp_activation)
    stu = MiniSTU(*sizes, False, *mlp, lds.B.dtype, lds.B.device)
    return stu, train(stu, lds, seq_len, num_steps, batch_size, learning_rate, "STU" if verbose else "")


# ------------------------------------------------------------------------------------------------------------
# 4. What the papers compare with
#
# Each maps [B, T, d_in] to [B, T, d_out] and is as small as its idea allows: the task is linear, so whatever
# is not part of the idea (MLPs, norms) is left out; it would only stand in the way.


class S4D(nn.Module):
    """d channels, each filtered by its own N complex exponentials (S4D-Lin of arXiv 2206.11893)."""

    def __init__(self, d_in: int, d_out: int, d: int = 24, N: int = 16):
        super().__init__()
        self.encode, self.decode = nn.Linear(d_in, d), nn.Linear(d, d_out)
        self.log_dt = nn.Parameter(torch.empty(d).uniform_(math.log(1e-3), math.log(1e-1)))
        self.log_decay = nn.Parameter(torch.full((d, N), math.log(0.5)))
        self.frequency = nn.Parameter(math.pi * torch.arange(N).repeat(d, 1).float())
        self.C = nn.Parameter(torch.randn(d, N, 2) / N**0.5)
        self.D = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        u = self.encode(x)
        A = torch.complex(-self.log_decay.exp(), self.frequency)  # [d, N]
        dtA = A * self.log_dt.exp()[:, None]
        powers = torch.exp(dtA * torch.arange(x.shape[1])[:, None, None])  # [T, d, N]
        kernel = 2 * (powers * torch.view_as_complex(self.C) * (dtA.exp() - 1) / A).sum(-1).real  # [T, d]
        return self.decode(convolve(u, kernel) + self.D * u)


class SelectiveSSM(nn.Module):
    """Mamba's layer (arXiv 2312.00752): short convolution, h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t,
    y_t = C_t h_t + D u_t, gate. Δ, B and C are functions of the input."""

    def __init__(self, d_in: int, d_out: int, d: int = 24, N: int = 8):
        super().__init__()
        self.encode, self.decode = nn.Linear(d_in, 2 * d), nn.Linear(d, d_out)
        self.conv = nn.Conv1d(d, d, 4, padding=3, groups=d)
        self.select = nn.Linear(d, 2 * N + 1, bias=False)  # B, C and one Δ, scaled and shifted by channel
        self.dt = nn.Linear(1, d)
        nn.init.uniform_(self.dt.bias, math.log(1e-3), math.log(1e-1))  # its softplus: about 1e-3 to 1e-1
        self.log_A = nn.Parameter(torch.arange(1, N + 1).float().log().repeat(d, 1))
        self.D = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        u, gate = self.encode(x).chunk(2, dim=-1)  # [B, T, d]
        u = F.silu(self.conv(u.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        B, C, dt = self.select(u).split([self.log_A.shape[1]] * 2 + [1], dim=-1)
        dt = F.softplus(self.dt(dt))  # [B, T, d]
        a = torch.exp(-dt[..., None] * self.log_A.exp())  # [B, T, d, N]
        h, states = torch.zeros_like(a[:, 0]), []
        for a_t, v_t in zip(a.unbind(1), ((dt * u)[..., None] * B[:, :, None]).unbind(1)):
            h = torch.addcmul(v_t, a_t, h)  # v_t + a_t h
            states.append(h)
        y = (torch.stack(states, dim=1) * C[:, :, None]).sum(-1) + self.D * u
        return self.decode(y * F.silu(gate))


class Attention(nn.Module):
    """Causal attention over the whole sequence, two heads, rotary positions; the input also passes by it."""

    def __init__(self, d_in: int, d_out: int, seq_len: int, d: int = 24):
        super().__init__()
        self.encode, self.decode = nn.Linear(d_in, d), nn.Linear(d, d_out)
        self.attention = SlidingWindowAttention(d, 2, seq_len, softcap=0.0)

    def forward(self, x: Tensor) -> Tensor:
        u = self.encode(x)
        return self.decode(u + self.attention(u))


# ------------------------------------------------------------------------------------------------------------
# 5. What one watches: python lds.py, --compare, --backends


def timed(call, *args):
    """call(*args), and the seconds it took."""
    start = time.perf_counter()
    return call(*args), time.perf_counter() - start


def count(model: nn.Module) -> int:
    """The number of its parameters."""
    return sum(p.numel() for p in model.parameters())


def terminal_plot(title: str, curves: dict[str, list], rows: int = 12, columns: int = 72) -> None:
    """Curves as characters, where there is no display."""
    curves = {name: curve for name, curve in curves.items() if curve and math.isfinite(sum(curve))}
    low, high = (end((v for c in curves.values() for v in c), default=0) for end in (min, max))
    grid = [[" "] * columns for _ in range(rows)]
    for mark, curve in zip("o.x+*#", curves.values()):
        for column in range(columns):
            value = curve[column * (len(curve) - 1) // (columns - 1)]
            grid[round((rows - 1) * (high - value) / max(high - low, 1e-30))][column] = mark
    print(f"\n{title}:", *(f" {mark} {name}" for mark, name in zip("o.x+*#", curves)))
    for i, line in enumerate(grid):
        print(f"{high - (high - low) * i / (rows - 1):8.2f} │{''.join(line)}")


def race(models: dict, rates: tuple, lds: LDS, args: argparse.Namespace, axis) -> MiniSTU:
    """Solve an STU by least squares, train each model at its best rate; print the errors, draw the losses.

    models: name -> a function that makes the model. Returns the solved STU."""
    L = args.seq_len

    def attempt(name, steps, rate, label=""):
        torch.manual_seed(args.seed + 1)  # a model starts from the same weights at every rate
        model = models[name]()
        try:
            return model, train(model, lds, L, steps, args.batch_size, rate, label)
        except FloatingPointError as error:
            print(f"{name}: {error}")
            return model, [math.inf]

    solved = MiniSTU(L, args.num_filters, lds.input_dim, lds.output_dim)
    data = sample(lds, max(16, 2**14 // L), L)
    rows, curves = [("STU, least squares", solved, "-", timed(solved.fit, *data)[1])], {}
    for name in models:
        rate = rates[0]
        if len(rates) > 1:  # a quarter of the steps at each of them, then all of the steps at the best
            rate = min(rates, key=lambda r: sum(attempt(name, 1 + args.steps // 4, r)[1][-10:]))
        (model, losses), seconds = timed(attempt, name, args.steps, rate, name)
        axis.semilogy(losses, label=name)
        curves[name] = [math.log10(max(loss, 1e-30)) for loss in losses]
        rows.append((name, model, rate, seconds))
    print(f"\n{'on unseen input':<20} {'params':>6} {'rate':>6} {'time':>9} {'MSE':>8} {'MSE/var(y)':>10}")
    for name, model, rate, seconds in rows:
        torch.manual_seed(args.seed + 2)  # the same sequences for every model
        mse, relative = unseen_error(model, lds, L)
        print(f"{name:<20} {count(model):>6} {rate:>6} {seconds:>7.2f} s {mse:>8.1e} {relative:>10.1e}")
        if model is solved:
            axis.axhline(mse, color="black", linestyle="--", label=name)
    print(f"{args.steps} steps of {args.batch_size} sequences; least squares: {len(data[0])} sequences")
    print(f"time: without the search for the rate, {torch.get_num_threads()} CPU threads; rates:", *rates)
    terminal_plot("log10 of the loss, step by step", curves)
    axis.set(xlabel="step", ylabel="mean squared error")
    axis.legend()
    return solved


def demo(lds: LDS, args: argparse.Namespace, figure) -> None:
    """An STU learns lds by descent, in two systems of coordinates, then in closed form, and recurs."""
    L, K, sizes = args.seq_len, args.num_filters, (lds.input_dim, lds.output_dim)
    axes = figure.subplot_mosaic([["filters", "loss"], ["path", "path"]])
    models = {  # the same functions in different coordinates
        "STU, white filters": lambda: MiniSTU(L, K, *sizes),
        "STU, scaled filters": lambda: STU(*sizes, L, K, use_approx=False),
    }
    solved = race(models, (args.learning_rate,), lds, args, axes["loss"])
    (x, y), system = sample(lds, 1, L), solved.to_lds()
    with torch.no_grad():
        stu, recurrence = solved(x), system(x)
    states, ends = f"{len(system.A)} states", f"{system.A.min():.4f} to {system.A.max():.4f}"
    print(f"\nas a recurrence: {states}, {len(system.A) // sizes[0]} for each input, poles {ends}")
    print(f"largest difference between STU and recurrence: {(recurrence - stu).abs().max():.1e}")
    terminal_plot("unseen input", {"the system": y[0, :, 0].tolist(), "the STU": stu[0, :, 0].tolist()})
    phi = get_spectral_filters(L, min(6, K))
    names = [f"$\\phi_{k + 1}$" for k in range(phi.shape[1])]
    axes["filters"].semilogx(range(1, L + 1), phi / phi.norm(dim=0), label=names)
    axes["filters"].set(title="What is fixed: the filters (each of norm 1)", xlabel="lag + 1")
    axes["loss"].set_title("What is learned: a linear map")
    axes["path"].plot(y[0, :, 0], color="0.75", linewidth=6, label="the system's output")
    axes["path"].plot(stu[0, :, 0], color="C3", linewidth=2, label="the STU's prediction")
    axes["path"].plot(recurrence[0, :, 0], color="black", linestyle=":", label="the same STU as a recurrence")
    axes["path"].set(title="On input never seen, one output", xlabel="time", xlim=(0, L - 1))
    axes["filters"].legend(ncols=2)
    axes["path"].legend(ncols=3)


def compare(lds: LDS, args: argparse.Namespace, figure) -> None:
    """Every kind of model on the same task, each at its best rate and with about as many parameters."""
    L, K, sizes = args.seq_len, args.num_filters, (lds.input_dim, lds.output_dim)
    with torch.no_grad():
        lds.C /= sample(lds, 64, L)[1].std()  # outputs of unit variance: no model has to find their scale
    budget = count(MiniSTU(L, K, *sizes))

    models = {"STU": lambda: MiniSTU(L, K, *sizes)}
    for name, make in {
        "S4D": lambda n: S4D(*sizes, n),
        "selective SSM": lambda n: SelectiveSSM(*sizes, n),
        "attention": lambda n: Attention(*sizes, L, n),
        "LDS, dense A": lambda n: LDS(n, *sizes),
        "LDS, diagonal A": lambda n: random_LDS(n, *sizes),
    }.items():
        width = min(range(4, 260, 4), key=lambda n: abs(count(make(n)) - budget))  # nearest to the STU's size
        models[name] = functools.partial(make, width)
    axis = figure.subplots()
    race(models, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), lds, args, axis)
    what = f"state {lds.state_dim}, spectral radius {lds.A.abs().max():.2f}, length {L}"
    axis.set_title(f"Learning a linear dynamical system: {what}")


def backends(args: argparse.Namespace) -> None:
    """Time the two backends, forward and training step, over lengths, widths and batches."""

    def step(model, x):
        model(x).square().mean().backward()

    def milliseconds(call, models, x):
        rounds = [[timed(call, m, x)[1] for m in models] for _ in range(8)]  # in turn: load slows both
        return [1e3 * min(times) for times in zip(*rounds)]

    gains = {}
    print(f"{args.num_filters} filters, {torch.get_num_threads()} CPU threads, times in ms, best of 8")
    print(f"{'':>20} |{'forward':^23} |{'training step':^23} |")
    print("length  width  batch |spectral    lds  ratio |spectral    lds  ratio | disagree")
    sizes = [(L, 64, 1) for L in (128, 256, 512, 1024, 2048, 4096)]
    sizes += [(1024, d, 1) for d in (16, 32, 128, 256)] + [(1024, 64, batch) for batch in (2, 4, 8)]
    for L, d, batch in sizes:
        x = torch.randn(batch, L, d)
        fft, lds = models = [MiniSTU(L, args.num_filters, d, d, backend=b) for b in ("spectral", "lds")]
        lds.load_state_dict(fft.state_dict())
        with torch.no_grad():
            forward = milliseconds(MiniSTU.forward, models, x)
            error = (lds(x) - fft(x)).norm() / fft(x).norm()
        training = milliseconds(step, models, x)
        columns = [f"{a:8.1f} {b:6.1f} {a / b:5.1f}x" for a, b in (forward, training)]
        print(f"{L:6d} {d:6d} {batch:6d} |{columns[0]} |{columns[1]} | {error:.0e}", flush=True)
        gains[L, d, batch] = min(forward[0] / forward[1], training[0] / training[1])
    print("crossover, the (length, width, batch) where forward and training are faster by recurrence:")
    for factor in (1, 2):
        print(f"  at least {factor}x:", *(size for size, gain in gains.items() if gain >= factor))


def main() -> None:
    parser = argparse.ArgumentParser(description="Watch an STU learn a linear dynamical system.")
    parser.add_argument("--compare", action="store_true", help="train other models on the same system")
    parser.add_argument("--backends", action="store_true", help="time convolution against recurrence")
    for flag, value, text in (
        ("--state-dim", 20, "hidden numbers of the system"), ("--input-dim", 10, "its inputs"),
        ("--output-dim", 5, "its outputs"), ("--seq-len", 128, "length of the sequences and the filters"),
        ("--num-filters", 24, "K, for each sign"), ("--steps", 1000, "of gradient descent"),
        ("--batch-size", 32, "sequences a step"), ("--learning-rate", 1e-3, "Adam's; --compare finds it"),
        ("--lower-bound", 0.1, "of |poles|"), ("--spectral-radius", 0.99, "the largest |pole|"),
        ("--seed", 0, "of everything random"), ("--out", "lds.png", "the picture"),
    ):  # fmt: skip
        parser.add_argument(flag, type=type(value), default=value, help=f"{text} (default: %(default)s)")
    if parser.parse_known_args()[0].compare:
        parser.set_defaults(state_dim=256, seq_len=256, batch_size=16, steps=600, out="compare.png")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    if args.backends:
        return backends(args)
    from matplotlib import rcParams  # fails before the work, not after it
    from matplotlib.figure import Figure

    open(args.out, "ab").close()  # so does this
    no_frame = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    rcParams.update({"axes.grid": True, "grid.alpha": 0.25, "axes.titlelocation": "left", **no_frame})
    figure = Figure((11, 6.6), dpi=110, layout="constrained")  # draws to a file, needs no display
    n, d_in, d_out = args.state_dim, args.input_dim, args.output_dim
    lds = random_LDS(n, d_in, d_out, args.lower_bound, spectral_radius=args.spectral_radius)
    print(f"system: state {n}, {d_in} inputs, {d_out} outputs, spectral radius {lds.A.abs().max():.3f}")
    (compare if args.compare else demo)(lds, args, figure)
    figure.savefig(args.out)
    print(f"\nthe picture: {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FloatingPointError, ImportError, OSError) as error:
        sys.exit(f"error: {error}")
