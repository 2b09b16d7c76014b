"""
Watch a spectral transform unit learn: linear systems, a robot, recall.

    python lds.py              an STU learns a linear system in closed form and by descent; a picture, lds.png
    python lds.py --compare    a larger system, for S4D, Mamba-2, attention and the system itself too
    python lds.py --ant        each kind of layer predicts MuJoCo's Ant: pip install "gymnasium[mujoco]"
    python lds.py --recall     what needs attention: associative recall, induction, selective copying

In a linear system a hidden state h of n numbers turns inputs u into outputs y, and only u and y are seen,
    h_t = A h_{t-1} + B u_t,    y_t = C h_t,    that is    y_t = Σ_s C A^s B u_{t-s}.
When the spectral radius of A (its largest |eigenvalue|) is near 1 the memory is long, and the loss anything
but convex in A. An STU does not learn A: it filters u with the few fixed signals that span all decays α^t
(stu.py, section 1) and learns a linear map on top, so its loss is a parabola with a bottom one can compute.

What it can learn: real poles of both signs, as every symmetric A has: the Hankel integral runs over α in
[0, 1], the alternating filters add -α. What rings slowly, poles r e^(iθ) with r near 1 and θ away from 0° and
180°, is no mixture of decays: the demo shows the error by angle.

Letters as in stu.py, and B is the input matrix, too. Responses are written [in, out]: C A^t B is [T, in, out].
"""

import argparse
import contextlib
import functools
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prepare_data import need, told, write_atomically
from stu import STU, FilterBank, FlashSTU, FlashSTUBlock, FlashSTUConfig, get_spectral_filters

# ------------------------------------------------------------------------------------------------------------
# 1. The system to learn


def check_input(x: Tensor, width: int, name: str = "input", seq_len: float = math.inf) -> Tensor:
    """x [batch, T, width] or [T, width] -> [batch, T, width]; ValueError unless finite, 1 <= T <= seq_len."""
    if x.ndim not in (2, 3) or x.shape[-1] != width or x.shape[-2] < 1:
        raise ValueError(f"{name} must be [batch (optional), length >= 1, {width}], got {list(x.shape)}")
    if x.shape[-2] > seq_len:
        raise ValueError(f"{name} of length {x.shape[-2]} is longer than {seq_len = }: make it a to_lds()")
    if not x.isfinite().all():
        raise ValueError(f"{name} holds {(~x.isfinite()).sum()} NaN or infinite values of {x.numel()}")
    return x if x.ndim == 3 else x[None]


def convolve(u: Tensor, h: Tensor) -> Tensor:
    """y_t = Σ_s h_s u_{t-s}: u [B, T, in], h [T, in, out] -> [B, T, out]; h [T, d] is a filter a channel."""
    T, n = u.shape[1], 2 * u.shape[1]  # a shorter FFT would wrap the end around to the beginning
    u_f, h_f = torch.fft.rfft(u, n=n, dim=1), torch.fft.rfft(h, n=n, dim=0)
    y_f = u_f * h_f if h.ndim == 2 else torch.einsum("bfi,fio->bfo", u_f, h_f)
    return torch.fft.irfft(y_f, n=n, dim=1)[:, :T]


class LDS(nn.Module):
    """h_t = A h_{t-1} + B u_t, y_t = C h_t: [batch, T, input_dim] -> [batch, T, output_dim], or unbatched.
    A [n]: real poles, what an STU is for, or with diagonal=False [n, n], complex poles; B [n, input_dim],
    C [output_dim, n], first state h0 [n]. Pieces: lds(u, state, use_cache=True) -> (y, state [batch, n])."""

    def __init__(self, state_dim: int, input_dim: int, output_dim: int, dtype: torch.dtype = torch.float32,
                 device=None, *, diagonal: bool = True):  # fmt: skip
        super().__init__()
        if min(state_dim, input_dim, output_dim) < 1:
            raise ValueError(f"dimensions must be at least 1, got {state_dim}, {input_dim}, {output_dim}")
        self.state_dim, self.input_dim, self.output_dim = n, d_in, d_out = state_dim, input_dim, output_dim
        to = {"dtype": dtype, "device": device}
        A = 2 * torch.rand(n, **to) - 1 if diagonal else torch.randn(n, n, **to) * (0.9 / n**0.5)
        self.A = nn.Parameter(A)  # diagonal: uniform in [-1, 1]; dense: of spectral radius about 0.9
        self.B = nn.Parameter(torch.randn(n, d_in, **to) / d_in)
        self.C = nn.Parameter(torch.randn(d_out, n, **to) / n)
        self.h0 = nn.Parameter(torch.zeros(n, **to))

    dtype, device = property(lambda self: self.B.dtype), property(lambda self: self.B.device)

    def powers(self, V: Tensor, T: int) -> Tensor:
        """A^t V for t < T: V [n, k] -> [T, n, k], by powers of the poles or log2(T) doublings, no loop."""
        if self.A.ndim == 1:
            return (self.A ** torch.arange(T, device=V.device)[:, None])[..., None] * V
        X, power = V[None], self.A
        while len(X) < T:
            X, power = torch.cat([X, power @ X]), power @ power
        return X[:T]

    def forward(self, u: Tensor, state: Tensor | None = None, use_cache: bool = False):
        h, y = self.h0[:, None] if state is None else state.to(self.B).T, []  # h [n, 1 or batch]
        for x in check_input(u, self.input_dim).to(self.B).split(1024, dim=1):  # so that memory is bounded
            X = self.powers(torch.cat([self.B, h], dim=1), x.shape[1] + 1)  # inputs, and h, t steps later
            of_input, of_h = X[:-1, :, : self.input_dim], X[1:, :, self.input_dim :]
            y.append(convolve(x, (self.C @ of_input).transpose(1, 2)) + (self.C @ of_h).permute(2, 0, 1))
            h = of_h[-1] + torch.einsum("tni,bti->nb", of_input.flip(0), x)
        y = torch.cat(y, dim=1) if u.ndim == 3 else torch.cat(y, dim=1)[0]
        return (y, h.T) if use_cache else y


def random_LDS(state_dim: int, input_dim: int, output_dim: int, lower_bound: float = 0.1, device=None, *,
               spectral_radius: float = 0.99) -> LDS:  # fmt: skip
    """A diagonal system, poles ±α: α uniform in [lower_bound, spectral_radius], one at the upper end."""
    if not 0 <= lower_bound <= spectral_radius <= 1:
        raise ValueError(f"need 0 <= {lower_bound = } <= {spectral_radius = } <= 1")
    lds = LDS(state_dim, input_dim, output_dim, device=device)
    lds.A.data = lds.A.data.sign() * (lower_bound + (spectral_radius - lower_bound) * lds.A.data.abs())
    lds.A.data[0] = spectral_radius * lds.A[0].sign()
    return lds


# ------------------------------------------------------------------------------------------------------------
# 2. The learner: an STU in white coordinates
#
# What limits gradient descent is scale: the filters, scaled by λ_k^(1/4), overlap, and the curvature of the
# loss differs between directions by more than 1e12. Only their span matters, so choose coordinates in which
# white input gives uncorrelated features of variance 1. Time t sees lags 0..t only, so over a sequence lag s
# counts with weight w_s = (L - s)/L; Gram-Schmidt under that weight gives white filters, and Adam converges.
# Directions 1e-5 below the first are dropped: they carry 1e-13 of a stable system's variance.


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
    """A full STU, and an MLP on its outputs: [batch, T <= seq_len, input_dim] -> [batch, T, output_dim].

    num_filters: K, for each sign; K = 24 at L = 128 keeps 34 of 48 white directions, all but 7e-5 of a map
    with random weights. precomputed_filters [seq_len, num_filters]: other base filters. backend: "spectral"
    (FFT) or "lds" (recurrence), the same function. Unbatched input works, too."""

    def __init__(self, seq_len: int, num_filters: int, input_dim: int, output_dim: int, *,
                 use_hankel_L: bool = False, use_mlp: bool = False, mlp_hidden_dim: int | None = None,
                 mlp_num_layers: int = 2, mlp_dropout: float = 0.0, mlp_activation: str = "relu",
                 dtype: torch.dtype = torch.float32, device=None, precomputed_filters: Tensor | None = None,
                 backend: str = "spectral"):  # fmt: skip
        super().__init__()
        routes, units = {"spectral": "fft", "lds": "lds"}, {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}
        for name, value, known in (("backend", backend, routes), ("mlp_activation", mlp_activation, units)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if not 1 <= num_filters <= seq_len or mlp_num_layers < 1:
            got = f"{num_filters} filters for length {seq_len}, {mlp_num_layers} layers"
            raise ValueError(f"need 1 <= num_filters <= seq_len and mlp_num_layers >= 1, got {got}")
        if (phi := precomputed_filters) is None:
            phi = get_spectral_filters(seq_len, num_filters, use_hankel_L, dtype=torch.float64)
        if phi.shape != (seq_len, num_filters):
            raise ValueError(f"precomputed_filters must be [{seq_len}, {num_filters}], got {list(phi.shape)}")
        self.seq_len, self.num_filters = seq_len, num_filters
        self.input_dim, self.output_dim = input_dim, output_dim
        self.bank = white_filters(phi, use_hankel_L)  # [L, F] float64
        bank = FilterBank(self.bank, n_pairs=40, chunk=32, fade=1e-6, tolerance=1e-2)  # 80 states: 1e-4
        options = {"precomputed_filters": bank, "backend": routes[backend]}
        self.stu = STU(input_dim, output_dim, seq_len, use_approx=False, **options)
        hidden = [mlp_hidden_dim or 2 * output_dim] * (mlp_num_layers - 1)
        widths, layers = [output_dim, *hidden, output_dim], []
        for i in range(mlp_num_layers if use_mlp else 0):
            layers += [units[mlp_activation](), nn.Dropout(mlp_dropout), nn.Linear(*widths[i : i + 2])]
        self.mlp = nn.Sequential(*layers[2:])  # a linear layer comes first; empty, it is the identity
        self.to(device=device, dtype=dtype)

    get_num_params = lambda self: sum(p.numel() for p in self.parameters())

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.stu(check_input(x, self.input_dim, seq_len=self.seq_len).to(self.stu.M.dtype)))
        return y if x.ndim == 3 else y[0]

    @torch.no_grad()
    def fit(self, inputs: Tensor, targets: Tensor) -> "MiniSTU":
        """Set M by least squares on inputs [N, T, input_dim], targets [N, T, output_dim]; returns self."""
        if len(self.mlp):
            raise ValueError("fit solves a linear model; with use_mlp=True train by gradient descent")
        x = check_input(inputs, self.input_dim, "inputs", self.seq_len).double()
        y = check_input(targets, self.output_dim, "targets").double()
        if x.shape[:2] != y.shape[:2]:
            raise ValueError(f"inputs {list(x.shape)}, targets {list(y.shape)}: not equally many and long")
        gram, moment = 0, 0  # normal equations: in white coordinates as well conditioned as the inputs
        for u, target in zip(x.split(16), y.split(16)):
            f = [convolve(u, phi[: u.shape[1], None].to(u)) for phi in self.bank.T]  # F times [16, T, in]
            f = torch.stack(f, dim=2).flatten(2).flatten(0, 1)  # [16 T, F · in]
            gram, moment = gram + f.T @ f, moment + f.T @ target.flatten(0, 1)
        M = torch.linalg.pinv(gram, rtol=1e-13, hermitian=True) @ moment  # [F · in, out]
        self.stu.M.copy_(M.view_as(self.stu.M))
        return self

    @torch.no_grad()
    def to_lds(self) -> LDS:
        """The same map as a diagonal LDS in float64, for any length: Σ_n α_n^t R_n = Σ_f Φ[t, f] M_f, t < L,
        with residues R [n, in, out], large and cancelling; 300 lags out to 40 L ask the response to fade."""
        if len(self.mlp) or self.stu.bank.lds is None:
            raise ValueError("to_lds converts a mixture of decays: no use_mlp=True, and no filters that ring")
        L, M = self.seq_len, self.stu.M.double().cpu()
        poles = self.stu.bank.lds.powers[1].diagonal()
        far = L * 40 ** torch.linspace(0, 1, 301, dtype=torch.float64)
        t, weight = torch.cat([torch.arange(L), far[:-1].round()]), 1e-6 * far.diff().sqrt()
        powers = torch.cat([torch.ones(L), weight])[:, None] * poles ** t[:, None]  # [L + 300, n]
        kernel = F.pad(torch.einsum("tf,fio->tio", self.bank, M).flatten(1), (0, 0, 0, 300))
        residues = torch.linalg.lstsq(powers, kernel, rcond=1e-14, driver="gelsd").solution  # [n, in · out]
        lds = LDS(len(poles) * self.input_dim, self.input_dim, self.output_dim, dtype=torch.float64)
        lds.A.copy_(poles.repeat_interleave(self.input_dim))  # state (pole, input)
        lds.B.copy_(torch.eye(self.input_dim).repeat(len(poles), 1))
        lds.C.copy_(residues.reshape(lds.state_dim, self.output_dim).T)
        return lds.to(self.stu.M.device)


# ------------------------------------------------------------------------------------------------------------
# 3. Gradient descent


@torch.no_grad()
def sample(lds: LDS, batch_size: int, seq_len: int) -> tuple[Tensor, Tensor]:
    """White inputs [batch_size, seq_len, in], and what the system answers [batch_size, seq_len, out]."""
    x = torch.randn(batch_size, seq_len, lds.input_dim).to(lds.B)
    return x, lds(x)


def unseen_error(model: nn.Module, lds: LDS, seq_len: int, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Mean squared error on new sequences, and the same over the variance of their outputs."""
    x, y = sample(lds, batch_size, seq_len)
    mse = F.mse_loss(model(x), y)
    return mse, mse.detach() / y.var()


def descend(model: nn.Module, measure, num_steps: int, rate: float, label="", after=0.0) -> list:
    """Minimise the loss in measure(model) -> (loss, number to watch), on new data each step -> all of these.
    Muon for matrices in blocks, Adam for the rest; the rate is constant for half of the steps, then falls to
    zero. With a label, a live line: time left, `after` seconds more. A loss that is not finite ends it."""
    blocks = [m for m in model.modules() if isinstance(m, FlashSTUBlock)]
    inner = [p for m in blocks for name, p in m.named_parameters() if p.ndim == 2 and "filters" not in name]
    optimizers = [torch.optim.Adam([p for p in model.parameters() if all(p is not q for q in inner)])]
    if inner:  # scaled so that one rate suits both
        optimizers.append(torch.optim.Muon(inner, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    terminal, start, watched = sys.stdout.isatty(), time.perf_counter(), []
    model.train()
    for step in range(1, num_steps + 1):
        loss, number = measure(model)
        watched.append((loss.item(), number.item()) if loss.isfinite() else (math.inf, math.inf))
        if not loss.isfinite():
            break
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate * min(1, 2 - 2 * (step - 1) / num_steps)
            optimizer.step()
        if label and 20 * step // num_steps > 20 * (step - 1) // num_steps:
            s = round((time.perf_counter() - start) * (num_steps / step - 1) + after)
            bar = f"{'█' * (20 * step // num_steps):·<20} {s // 60}:{s % 60:02} left"
            end = "\r" if terminal and step < num_steps else "\n"
            print(f"{label:<26} step {step}/{num_steps} {number:8.2g} {bar}", end=end, flush=True)
    model.eval()
    return watched


def train_stu_on_lds(lds: LDS, seq_len: int, num_filters: int, *, num_steps: int = 1000, batch_size: int = 32,
                     learning_rate: float = 1e-3, verbose: bool = True, **options) -> tuple:  # fmt: skip
    """A MiniSTU(..., **options) trained to imitate lds -> (model, list of the losses)."""
    if num_steps < 0 or batch_size < 1 or learning_rate <= 0:
        raise ValueError(f"need {num_steps = } >= 0, {batch_size = } >= 1, {learning_rate = } > 0")
    options |= {"dtype": lds.dtype, "device": lds.device}
    stu = MiniSTU(seq_len, num_filters, lds.input_dim, lds.output_dim, **options)
    measure = functools.partial(unseen_error, lds=lds, seq_len=seq_len, batch_size=batch_size)
    losses = [loss for loss, _ in descend(stu, measure, num_steps, learning_rate, "STU" if verbose else "")]
    if not math.isfinite(sum(losses)):
        raise FloatingPointError(f"the loss is {losses[-1]} at step {len(losses)}: lower {learning_rate = }")
    return stu, losses


def race(makers: dict, measure, judge, steps: int, rates: tuple, seed: int, same_time=False) -> dict:
    """Train each model for a quarter of the steps at each of the rates, then for all of them at the best one.

    makers: name -> a function that makes the model; judge(model) -> {column: number}. same_time gives all the
    time of the first one's steps. Says first what it costs, last a table -> name -> the numbers watched."""

    def attempt(name, rate, steps, label="", after=0.0):
        torch.manual_seed(seed + 1)  # the same weights and the same data at every rate
        model, start = makers[name](), time.process_time()  # of all threads, and of no other program
        return model, rate, descend(model, measure, steps, rate, label, after), time.process_time() - start

    cost, runs, scores, final, rows = {}, [], {}, {}, {}
    for name in makers:
        cost[name] = min(attempt(name, rates[0], 1)[-1] for _ in range(5))  # seconds of a step
        full = round(steps * cost[next(iter(makers))] / cost[name]) if same_time else steps
        runs += [(name, rate, full // 4 + 1) for rate in rates if len(rates) > 1] + [(name, None, full)]
    due = [cost[name] * steps / torch.get_num_threads() for name, _, steps in runs]
    print(f"{len(runs)} runs on {torch.get_num_threads()} CPU threads: about {sum(due) / 60:.1f} minutes")
    for i, (name, rate, n) in enumerate(runs):
        rate = rate or min(rates, key=lambda r: scores.get((name, r), 0))
        final[name] = attempt(name, rate, n, f"{name}, rate {rate}", sum(due[i + 1 :]))
        scores[name, rate] = sum(loss for loss, _ in final[name][2][-10:])
    for name, (model, rate, watched, seconds) in final.items():
        torch.manual_seed(seed + 2)  # the same data for every model
        row = {"params": sum(p.numel() for p in model.parameters()), "rate": rate, "steps": len(watched)}
        rows[name] = row | {"CPU s": seconds} | torch.no_grad()(judge)(model)
    table(rows)
    return {name: [number for _, number in watched] for name, (_, _, watched, _) in final.items()}


def table(rows: dict) -> None:  # name -> {column: number}
    print(f"\n{'':<16}", *(f"{column:>8}" for column in next(iter(rows.values()))))
    for name, row in rows.items():
        print(f"{name:<16}", *(f"{float(value):>8.{6 if value > 99 else 2}g}" for value in row.values()))


# ------------------------------------------------------------------------------------------------------------
# 4. What the papers compare with (S4D is S4 without a low-rank term), and the experiments


class S4D(nn.Module):
    """d channels, each filtered by N complex exponentials: S4D-Lin (arXiv 2206.11893)."""

    def __init__(self, d_in: int, d_out: int, d: int = 24, N: int = 16):
        super().__init__()
        self.encode, self.decode = nn.Linear(d_in, d), nn.Linear(d, d_out)
        self.log_dt = nn.Parameter(torch.empty(d).uniform_(math.log(1e-3), math.log(1e-1)))
        self.log_decay = nn.Parameter(torch.full((d, N), math.log(0.5)))
        self.frequency = nn.Parameter(math.pi * torch.arange(N).repeat(d, 1).float())
        self.C, self.D = nn.Parameter(torch.randn(d, N, 2) / N**0.5), nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        u = self.encode(x)
        A = torch.complex(-self.log_decay.exp(), self.frequency)  # [d, N]
        dtA = A * self.log_dt.exp()[:, None]
        powers = torch.exp(dtA * torch.arange(x.shape[1])[:, None, None])  # [T, d, N]
        kernel = 2 * (powers * torch.view_as_complex(self.C) * (dtA.exp() - 1) / A).sum(-1).real  # [T, d]
        return self.decode(convolve(u, kernel) + self.D * u)


class Mamba2(nn.Module):
    """Mamba-2's layer (arXiv 2405.21060): each of H heads has a state [N, d / H] and a scalar decay a_t, with
    h_t = a_t h_{t-1} + Δ_t B_t u_tᵀ, a_t = exp(-Δ_t A), y_t = C_tᵀ h_t + D u_t, gated; Δ, B, C depend on the
    input. Without a loop, in quadratic form: y_t = Σ_{s<=t} (C_t · B_s) (a_{s+1} ··· a_t) Δ_s u_s + D u_t."""

    def __init__(self, d_in: int, d_out: int, d: int = 24, N: int = 16, H: int = 2):
        super().__init__()
        self.sizes, self.N = (d, d + 2 * N, H), N
        self.encode, self.decode = nn.Linear(d_in, sum(self.sizes)), nn.Linear(d, d_out)
        self.conv = nn.Conv1d(d + 2 * N, d + 2 * N, 4, padding=3, groups=d + 2 * N)
        self.dt = nn.Parameter(torch.empty(H).uniform_(math.log(1e-3), math.log(1e-1)))  # softplus: about exp
        self.log_A, self.D = nn.Parameter(torch.empty(H).uniform_(1, 16).log()), nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor, *_) -> Tensor:
        T, (d, _, H) = x.shape[1], self.sizes
        gate, v, dt = self.encode(x).split(self.sizes, dim=-1)
        v = F.silu(self.conv(v.transpose(1, 2))[..., :T].transpose(1, 2))  # of the last 4 inputs
        u, B, C = v.split([d, self.N, self.N], dim=-1)
        dt = F.softplus(dt + self.dt).transpose(1, 2)  # [B, H, T]
        log_a = -(dt * self.log_A.exp()[:, None]).cumsum(-1)  # of the product a_1 ··· a_t
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        decay = (log_a[..., None] - log_a[..., None, :]).masked_fill(future, -torch.inf).exp()  # [B, H, t, s]
        scores = (C @ B.transpose(1, 2))[:, None] * decay * dt[..., None, :]
        y = (scores @ u.unflatten(-1, (H, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)  # [B, T, d]
        return self.decode((y + self.D * u) * F.silu(gate))


def stack(kinds: str, K: int, mlp_scale: float, d_in: int, d_out: int, d: int, L: int) -> nn.Module:
    """Blocks between linear maps. kinds: a letter a block, T STU-T, S full STU, A attention, M Mamba-2."""
    options = {"n_heads": 4, "window_size": L, "softcap": 0.0, "mlp_scale": mlp_scale}
    blocks = [FlashSTUBlock(d, L, K, kind == "A", use_approx=kind != "S", **options) for kind in kinds]
    for kind, block in zip(kinds, blocks):
        block.mixer = Mamba2(d, d, d) if kind == "M" else block.mixer
    return nn.Sequential(nn.Linear(d_in, d), *blocks, nn.RMSNorm(d), nn.Linear(d, d_out))


def linear(args: argparse.Namespace, figure) -> None:
    """An STU learns a linear system, in closed form and by descent; with --compare others of its size try."""
    L, K, sizes = args.seq_len, args.num_filters, (args.input_dim, args.output_dim)
    lds = random_LDS(args.state_dim, *sizes, args.lower_bound, spectral_radius=args.spectral_radius)
    makers, rates = {"STU": lambda: MiniSTU(L, K, *sizes)}, (args.learning_rate,)
    if args.compare:
        rates = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
        lds.C.data /= sample(lds, 64, L)[1].std()  # no model has to find the scale of the outputs
        makers["S4D"] = lambda: S4D(*sizes, 24)
        makers["Mamba-2"] = lambda: Mamba2(*sizes, 44)
        makers["attention"] = lambda: stack("A", 1, 1.0, *sizes, 16, L)
        makers["dense system"] = lambda: LDS(38, *sizes, diagonal=False)
        makers["diagonal system"] = lambda: random_LDS(118, *sizes)
    else:  # the same functions, in the coordinates of the language model
        makers["scaled filters"] = lambda: STU(*sizes, L, K, use_approx=False)
    measure = functools.partial(unseen_error, lds=lds, seq_len=L, batch_size=args.batch_size)
    judge = lambda model: dict(zip(("MSE", "/ var(y)"), unseen_error(model, lds, L)))
    start, solved = time.perf_counter(), MiniSTU(L, K, *sizes).fit(*sample(lds, max(16, 2**14 // L), L))
    print(f"least squares: {time.perf_counter() - start:.2f} s, MSE {judge(solved)['MSE']:.1e}")
    axes = figure.subplot_mosaic([["loss"]] if args.compare else [["filters", "loss", "angle"], ["path"] * 3])
    for name, curve in race(makers, measure, judge, args.steps, rates, args.seed).items():
        axes["loss"].semilogy(curve, label=name)
    axes["loss"].set(title="What is learned: a linear map", xlabel="step", ylabel="error / variance")
    if args.compare:
        return
    (x, y), system, filters = sample(lds, 1, L), solved.to_lds(), get_spectral_filters(L, min(6, K))
    print(f"as a recurrence of {len(system.A)} states: differs by {(system(x) - solved(x)).abs().max():.1e}")
    axes["path"].plot(y[0, :, 0], color="0.7", linewidth=5, label="system")
    axes["path"].plot(system(x)[0, :, 0].detach(), color="C3", label="STU")
    for k, phi in enumerate((filters / filters.norm(dim=0)).T, 1):  # single points at the first lags
        axes["filters"].semilogx(range(1, L + 1), phi, ".-", markevery=range(min(8, L)), label=f"$\\phi_{k}$")
    ringing, stu, errors = LDS(2, 1, 1, diagonal=False), MiniSTU(L, K, 1, 1), {}
    for degrees in (0, 1, 2, 5, 10, 20, 45, 90, 135, 160, 170, 175, 178, 179, 180):  # of poles 0.99 e^(±iθ)
        ringing.A.data = 0.99 * torch.matrix_exp(math.radians(degrees) * torch.tensor([[0.0, -1], [1, 0]]))
        errors[degrees] = unseen_error(stu.fit(*sample(ringing, 128, L)), ringing, L)[1].item()
    table({"error by angle": {f"{degrees}°": errors[degrees] for degrees in (0, 1, 2, 5, 10, 20, 90)}})
    axes["angle"].semilogy(errors.keys(), errors.values(), label="STU")
    axes["filters"].set(title="What is fixed: the filters", xlabel="lag + 1")
    axes["angle"].set(title="What it misses: slow ringing", xlabel="θ of poles 0.99 e^(±iθ)")
    axes["path"].set(title="On input never seen, one output", xlabel="time")


def ant_trajectories(number: int, length: int, seed: int) -> Tensor:
    """MuJoCo's Ant under smooth random torques, [number, length, 27 + 8 torques]; simulated but once."""
    path = Path(f"data/ant-{number}x{length}-{seed}.pt")
    if not path.exists():
        with told('the robot needs pip install "gymnasium[mujoco]"'):
            import gymnasium
            import mujoco  # noqa: F401
        print(f"simulating {number} trajectories of {length} steps, to {path}")
        env = gymnasium.make("Ant-v5", terminate_when_unhealthy=False).unwrapped
        torch.manual_seed(seed)
        smooth, rows = 0.19**0.5 * 0.9 ** torch.arange(length), torch.empty(number, length, 35)
        rows[..., 27:] = convolve(torch.randn(number, length, 8), smooth[:, None].expand(-1, 8)).tanh()
        for i, row in enumerate(rows):
            env.reset(seed=seed * number + i)
            for step in row:
                step[:27] = torch.tensor([*env.data.qpos[2:], *env.data.qvel])
                env.step(step[27:].numpy())
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, lambda f: torch.save(rows, f))
    return torch.load(path)


def ant(args: argparse.Namespace, figure) -> None:
    """Four blocks of a kind predict the robot's next state, at equal size and time, then 50 on their own."""
    L, K, n = args.seq_len, args.num_filters, args.trajectories * 9 // 10  # n of them to train on
    data = ant_trajectories(args.trajectories, L + 1, args.seed)
    data = (data - data[:n].mean((0, 1))) / data[:n].std((0, 1))
    kinds = {"STU-T": ("TTTT", K, 2.8), "full STU": ("SSSS", 4, 0.7), "hybrid": ("TATA", K, 2.4)}
    kinds |= {"attention": ("AAAA", K, 2.0), "Mamba-2": ("MMMM", K, 2.1)}  # filters, size of the MLP

    def predict(task, d, axes):  # the first d numbers of the state
        state, change = data[..., :d], data[..., :d].diff(dim=1)
        inputs, unit = torch.cat([state, data[..., 27:]], dim=2)[:, :-1], change[:n].std()
        alone, rollouts = state[n:, -51:], []
        error = lambda model, rows: F.mse_loss(unit * model(inputs[rows]), change[rows])
        measure = lambda model: [error(model, torch.randint(n, (args.batch_size,)))] * 2

        def judge(model):  # on the other trajectories: the last 50 states from those before, and the torques
            x, path = inputs[n:].clone(), [alone[:, 0]]
            for t in range(L - 50, L):
                x[:, t, :d] = path[-1]
                path.append(path[-1] + unit * model(x[:, : t + 1])[:, -1])
            rollouts.append(torch.stack(path, dim=1))
            mse = (rollouts[-1] - alone).square().mean((0, 2))
            errors = {f"{k} alone": mse[k] for k in (1, 5, 10, 25, 50)}
            return {"one step": error(model, slice(n, None))} | errors

        print(f"\n{task}")
        makers = {name: functools.partial(stack, *kind, d + 8, d, 64, L) for name, kind in kinds.items()}
        race(makers, measure, judge, args.steps, (1e-2, 2e-2, 4e-2), args.seed, same_time=True)
        table({"no change": judge(lambda x: torch.zeros(*x.shape[:2], d))})
        for name, path in zip((*kinds, "no change"), rollouts):
            axes[0].plot(path[0, :, 5], label=name)
            axes[1].semilogy(range(1, 51), (path - alone).square().mean((0, 2))[1:], label=name)
        axes[0].plot(alone[0, :, 5], "k", label="true")
        axes[0].set(title=f"{task.capitalize()}: one joint", xlabel="steps on their own predictions")
        axes[1].set(title=f"{task.capitalize()}: mean squared error", xlabel="steps on their own predictions")

    for task, d, axes in zip(("the whole state", "positions only"), (27, 13), figure.subplots(2, 2)):
        predict(task, d, axes)


def quiz(model: nn.Module, task: str, n: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy and accuracy of a language model on n new questions: ids [n, T], labels where >= 0."""
    if task == "associative recall":  # k v k v ..., then the keys in another order: each asks for its value
        keys, order = (torch.rand(n, m).argsort(1)[:, :8, None] for m in (32, 8))
        pairs = torch.cat([keys, torch.randint(32, 64, (n, 8, 1))], dim=2)
        ids = torch.cat([pairs, pairs.gather(1, order.expand_as(pairs))], dim=1).flatten(1)  # [n, 32]
        ids, labels = ids[:, :-1], ids[:, 1:].where((torch.arange(31) > 15) & (torch.arange(31) % 2 == 0), -1)
    elif task == "induction":  # random tokens, repeated with a random period: what followed the last time?
        at, period = torch.arange(49), torch.randint(8, 24, (n, 1))
        ids = torch.randint(64, (n, 24)).gather(1, at % period)
        ids, labels = ids[:, :-1], ids[:, 1:].masked_fill(at[:-1] < period, -1)
    else:  # selective copying: 8 tokens among 40 of noise (62), to be said in order at blanks (63)
        tokens, places = torch.randint(62, (n, 8)), torch.rand(n, 48).argsort(1)[:, :8].sort(1).values
        ids = F.pad(torch.full((n, 48), 62).scatter(1, places, tokens), (0, 8), value=63)
        labels = F.pad(tokens, (48, 0), value=-1)
    logits, labels = model(ids).logits[labels >= 0], labels[labels >= 0]
    return F.cross_entropy(logits, labels), (logits.argmax(-1) == labels).float().mean()


def recall(args: argparse.Namespace, figure) -> None:
    """Language models of two layers, of one kind or one of each; each task with its share of the steps."""
    options = {"n_layers": 2, "n_heads": 2, "window_size": 64, "vocab_size": 64, "mlp_scale": 1.0}
    options |= {"n_embd": 64, "seq_len": 64, "softcap": 0.0, "torch_dtype": "float32"}
    make = lambda **kind: FlashSTU(FlashSTUConfig(**options, **kind))
    makers = {"hybrid": make, "STU": lambda: make(use_attn=False), "attention": lambda: make(use_stu=False)}
    tasks = {"associative recall": 0.2, "induction": 0.2, "selective copying": 1.0}
    for (task, share), axis in zip(tasks.items(), figure.subplots(1, 3)):
        print(f"\n{task}")
        measure = functools.partial(quiz, task=task, n=args.batch_size)
        judge = lambda model, task=task: {"right": quiz(model, task, 512)[1]}
        curves = race(makers, measure, judge, round(share * args.steps), (1e-2,), args.seed)
        for name, curve in curves.items():
            axis.plot(curve, label=name)
        axis.set(title=task, xlabel="step", ylabel="right answers")


@contextlib.contextmanager
def picture(path: str | Path, width: float, height: float):
    """A figure to draw on, then written: every line's name at its right end, in its colour, none over another."""
    open(path, "ab").close()  # fails before the work, not after it
    style = {"grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False, "lines.markersize": 4}
    with need("matplotlib").rc_context(style | {"axes.grid": True, "axes.titlelocation": "left"}):
        figure = need("matplotlib.figure").Figure((width, height), dpi=110, layout="constrained")
        yield figure
        for axis in figure.axes:
            axis.autoscale_view()
            top, place = -1.0, (axis.transData + axis.transAxes.inverted()).transform
            named = [line for line in axis.lines if line.get_label()[0] != "_" and len(line.get_xydata())]
            ends = [(place(line.get_xydata()[-1])[1], line.get_label(), line.get_color()) for line in named]
            for above, (y, name, color) in enumerate(sorted(ends), 1 - len(ends)):
                top = max(min(y, 1 + 0.08 * above), top + 0.08)
                axis.text(1.02, top, name, color=color, transform=axis.transAxes, va="center")
        write_atomically(Path(path), figure.savefig)


def main() -> None:
    parser = argparse.ArgumentParser(description="Watch an STU learn a linear system, or with a flag:")
    for mode, text in ("compare", "other models, too"), ("ant", "a robot"), ("recall", "recall and copying"):
        parser.add_argument(f"--{mode}", action="store_true", help=text)
    for flag, value, text in (
        ("--state-dim", 20, "hidden numbers of the system"), ("--input-dim", 10, "its inputs"),
        ("--output-dim", 5, "its outputs"), ("--seq-len", 128, "length of the sequences and the filters"),
        ("--num-filters", 24, "K, for each sign"), ("--steps", 1000, "of gradient descent"),
        ("--batch-size", 32, "sequences a step"), ("--learning-rate", 1e-3, "Adam's, of the demo"),
        ("--lower-bound", 0.1, "of |poles|"), ("--spectral-radius", 0.99, "the largest |pole|"),
        ("--trajectories", 1000, "of the robot"), ("--seed", 0, "of chance"), ("--out", "lds.png", "picture"),
    ):  # fmt: skip
        parser.add_argument(flag, type=type(value), default=value, help=f"{text} (default: %(default)s)")
    if (mode := parser.parse_known_args()[0]).compare:
        parser.set_defaults(state_dim=256, seq_len=256, batch_size=16, steps=600, out="compare.png")
    elif mode.ant or mode.recall:
        parser.set_defaults(batch_size=8 if mode.ant else 64, out="ant.png" if mode.ant else "recall.png")
    args = parser.parse_args()
    if args.batch_size < 1 or args.ant and (args.seq_len < 51 or args.trajectories < 2):
        parser.error("need --batch-size >= 1, and for the robot --seq-len >= 51, --trajectories >= 2")
    torch.manual_seed(args.seed)
    with picture(args.out, 11, 6.6) as figure:
        (ant if args.ant else recall if args.recall else linear)(args, figure)
    print(f"\nthe picture: {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, KeyboardInterrupt) as error:
        sys.exit(f"stopped: {error or 'asked to'}")
