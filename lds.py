"""
Watch a spectral transform unit (STU) learn a linear dynamical system.

    python lds.py                  half a minute on a CPU; draws lds.png
    python lds.py --out lds.gif    draws the film of it

In a linear dynamical system (LDS) a hidden state h of n numbers turns inputs u into outputs y,
    h_t = A h_{t-1} + B u_t,    y_t = C h_t,    hence    y_t = Σ_s C A^s B u_{t-s}.
We see u and y, and want a model that gives the same y. If an eigenvalue of A is near 1, the memory
is long, and to find A itself by gradient descent is hard. An STU does not look for A. It filters u
with a few fixed signals whose sums come close to every decay α^s (stu.py, section 2), and learns
a linear map of what comes out. So its loss is a parabola, with a bottom that one can also compute.

What it can learn are real eigenvalues of both signs, such as every symmetric A has. What it misses
are systems that ring for long, with complex eigenvalues near the unit circle, far from 1 and -1
(experiments/ringing.py), unless max_angle adds filters for them.
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from stu import (
    STU,
    FilterBank,
    both_signs,
    check_flag,
    check_integer,
    check_number,
    fft_conv,
    get_spectral_filters,
)

# ---- 1. The system -------------------------------------------------------------------------------


def check_signal(name, x, channels):
    """A signal [batch, T, channels] or [T, channels] -> [batch, T, channels]."""
    if x.ndim not in (2, 3) or x.shape[-1] != channels or x.shape[-2] < 1 or x.is_complex():
        wanted = f"real [batch (optional), length >= 1, {channels}]"
        raise ValueError(f"{name} must be {wanted}, got {x.dtype} {list(x.shape)}")
    wrong = (~x.isfinite()).sum()
    if wrong > 0:
        raise ValueError(f"{name} holds {wrong} NaN or infinite values")
    return x if x.ndim == 3 else x[None]


class LDS(nn.Module):
    """h_t = A h_{t-1} + B u_t, y_t = C h_t: [batch, T, input_dim] -> [batch, T, output_dim].

    A is a vector [n], the diagonal of the matrix, or with diagonal=False a matrix [n, n]. Input
    without a batch, [T, input_dim], works too. Input may come in pieces: call
    y, state = lds(u, state, use_cache=True), and give the state [batch, n] to the next call.
    """

    def __init__(
        self,
        state_dim,
        input_dim,
        output_dim,
        dtype=torch.float32,
        device=None,
        *,
        diagonal=True,
    ):
        super().__init__()
        self.state_dim = n = check_integer("state_dim", state_dim)
        self.input_dim = check_integer("input_dim", input_dim)
        self.output_dim = check_integer("output_dim", output_dim)
        check_flag("diagonal", diagonal)
        if diagonal:
            A = 2 * torch.rand(n) - 1  # uniform in [-1, 1]
        else:
            A = 0.9 * torch.randn(n, n) / n**0.5  # its largest eigenvalue is about 0.9 in size
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(torch.randn(n, input_dim) / input_dim)
        self.C = nn.Parameter(torch.randn(output_dim, n) / n)
        self.h0 = nn.Parameter(torch.zeros(n))  # the first state
        self.to(dtype=dtype, device=device)

    @property
    def dtype(self):
        return self.B.dtype

    @property
    def device(self):
        return self.B.device

    def states_step_by_step(self, u, h):
        """The definition: inputs [batch, T, input_dim], first state [batch, n] -> [batch, T, n]."""
        states = []
        for u_t in u.unbind(dim=1):
            A_h = self.A * h if self.A.ndim == 1 else h @ self.A.T
            h = A_h + u_t @ self.B.T
            states.append(h)
        return torch.stack(states, dim=1)

    def states(self, u, h):
        """The same in log2(T) steps instead of T.

        The state at time t is what entered then, B u_t, and A times what entered just before, and
        A² times what entered before that, and so on. We sum the last 1, 2, 4, 8, ... of these
        terms: twice as many are the last `reach`, and A^reach times the sum `reach` steps before.
        """
        sums = torch.cat([h[:, None], u @ self.B.T], dim=1)  # [batch, 1 + T, n], h enters first
        power = self.A  # A^reach
        reach = 1
        while reach < sums.shape[1]:
            before = sums[:, :-reach]
            if self.A.ndim == 1:
                more = power * before
                power = power * power
            else:
                more = before @ power.T
                power = power @ power
            sums = torch.cat([sums[:, :reach], sums[:, reach:] + more], dim=1)
            reach = 2 * reach
        return sums[:, 1:]

    def forward(self, u, state=None, use_cache=False):
        x = check_signal("input", u, self.input_dim).to(self.B)
        batch = len(x)
        h = self.h0.expand(batch, -1) if state is None else state
        if h.shape != (batch, self.state_dim) or h.is_complex():
            got = f"{h.dtype} {list(h.shape)}"
            raise ValueError(f"the state must be real [{batch}, {self.state_dim}], got {got}")
        h = h.to(self.B)
        outputs = []
        for piece in x.split(256, dim=1):  # so that all the sums fit into memory
            states = self.states(piece, h)
            outputs.append(states @ self.C.T)
            h = states[:, -1]
        y = torch.cat(outputs, dim=1)
        if u.ndim == 2:
            y = y[0]
        return (y, h) if use_cache else y


@torch.no_grad()
def random_LDS(
    state_dim,
    input_dim,
    output_dim,
    lower_bound=0.1,
    device=None,
    *,
    spectral_radius=0.99,
):
    """A diagonal system with eigenvalues of both signs, uniform in [lower_bound, spectral_radius].

    The first one lies at the upper end, so that the memory is as long as asked for.
    """
    if not 0 <= lower_bound <= spectral_radius <= 1:
        raise ValueError(f"need 0 <= {lower_bound = } <= {spectral_radius = } <= 1")
    lds = LDS(state_dim, input_dim, output_dim, device=device)
    size = lower_bound + (spectral_radius - lower_bound) * lds.A.abs()
    size[0] = spectral_radius
    lds.A.copy_(lds.A.sign() * size)
    return lds


@torch.no_grad()
def sample(lds, batch_size, seq_len):
    """White noise [batch_size, seq_len, input_dim], and what the system makes of it."""
    x = torch.randn(batch_size, seq_len, lds.input_dim, dtype=lds.dtype, device=lds.device)
    return x, lds(x)


# ---- 2. The filters, in white coordinates --------------------------------------------------------
#
# Gradient descent is slow if a step in one direction changes the loss far more than in another. The
# filters as they are overlap, and differ in strength by many powers of ten. But only their sums
# matter, so we may choose other filters with the same sums: such that white noise as input gives
# uncorrelated outputs of variance 1. Then the loss curves equally in all directions.
#
# The outputs are averaged over the times t = 0..L-1 of a sequence, and time t sees only the lags
# 0..t. So lag s is seen a share w_s = 1 - s/L of the time, and the new filters are orthonormal
# with these weights: Σ_s w_s φ_f(s) φ_g(s) is 1 if f = g and else 0.


def white_filters(phi, use_hankel_L=False):
    """Spectral filters [L, K] -> filters [L, F] in white coordinates, of both signs, in float64."""
    bank = phi.detach().double().cpu()
    if not use_hankel_L:
        bank = both_signs(bank)
    L = len(bank)
    lag = torch.arange(L, dtype=torch.float64)
    root_w = (1 - lag / L).sqrt()[:, None]
    # √w times the new filters shall be orthonormal. The SVD finds such signals, strongest first.
    U, sigma, _ = torch.linalg.svd(root_w * bank, full_matrices=False)
    # The weak ones are left out. They are 1e-10 of the variance, and float32 would lose them.
    return U[:, sigma > 1e-5 * sigma[0]] / root_w


# ---- 3. The learner ------------------------------------------------------------------------------


class MiniSTU(nn.Module):
    """A full STU on white filters: [batch, T, input_dim] -> [batch, T, output_dim], T <= seq_len.

    It is y = Σ_f (Φ_f * x) M_f, and M [F, input_dim, output_dim] is learned, by descent or by fit.

    num_filters: the number K of spectral filters, each of which is used with both signs.
    max_angle, in degrees: with filters also for what rings, see get_spectral_filters in stu.py.
    precomputed_filters [seq_len, num_filters] are used instead of them.
    use_mlp: mlp_num_layers linear layers act on the outputs, with an activation between them.
    backend: "spectral" computes convolutions, "lds" a recurrence, with the same results.
    """

    def __init__(
        self,
        seq_len,
        num_filters,
        input_dim,
        output_dim,
        *,
        use_hankel_L=False,
        max_angle=0.0,
        use_mlp=False,
        mlp_hidden_dim=None,
        mlp_num_layers=2,
        mlp_dropout=0.0,
        mlp_activation="relu",
        dtype=torch.float32,
        device=None,
        precomputed_filters=None,
        backend="spectral",
    ):
        super().__init__()
        self.seq_len = seq_len
        self.num_filters = num_filters
        self.input_dim = check_integer("input_dim", input_dim)
        self.output_dim = check_integer("output_dim", output_dim)
        check_flag("use_hankel_L", use_hankel_L)
        check_flag("use_mlp", use_mlp)
        if backend not in ("spectral", "lds"):
            raise ValueError(f'backend must be "spectral" or "lds", got {backend!r}')
        phi = precomputed_filters
        if phi is None:
            phi = get_spectral_filters(
                seq_len, num_filters, use_hankel_L, dtype=torch.float64, max_angle=max_angle
            )
        if phi.shape != (seq_len, num_filters):
            raise ValueError(f"filters must be [{seq_len}, {num_filters}], got {list(phi.shape)}")
        # White coordinates magnify the weak filters, and with them the error of the recurrence
        # (stu.py, section 7), to about 1e-4. So we tolerate more than a bank does by default. What
        # comes after seq_len does not matter, because inputs are no longer than that.
        bank = FilterBank(
            white_filters(phi, use_hankel_L),
            fade=1e-6,
            tolerance=1e-2,
            most_after_L=math.inf,
            max_angle=max_angle,
        )
        self.stu = STU(
            input_dim,
            output_dim,
            seq_len,
            use_approx=False,
            precomputed_filters=bank,
            backend="lds" if backend == "lds" else "fft",
        )
        self.mlp = nn.Sequential()  # empty, it changes nothing
        if use_mlp:
            hidden = 2 * output_dim if mlp_hidden_dim is None else mlp_hidden_dim
            self.mlp = make_mlp(output_dim, hidden, mlp_num_layers, mlp_dropout, mlp_activation)
        self.to(device=device, dtype=dtype)

    def get_num_params(self):
        return sum(p.numel() for p in self.parameters())

    def forward(self, x):
        u = self.check_input("input", x).to(self.stu.M.dtype)
        y = self.mlp(self.stu(u))
        return y if x.ndim == 3 else y[0]

    def check_input(self, name, x):
        x = check_signal(name, x, self.input_dim)
        if x.shape[1] > self.seq_len:
            raise ValueError(f"{name} of length {x.shape[1]} is longer than {self.seq_len = }")
        return x

    def features(self, x):
        """What the filters make of x: [batch, T, input_dim] -> [batch, T, F · input_dim]."""
        filters = self.stu.bank.filters[: x.shape[1]].to(x)
        u = x.transpose(1, 2).repeat(1, filters.shape[1], 1)  # [batch, F · input_dim, T]
        h = filters.T.repeat_interleave(self.input_dim, dim=0)  # [F · input_dim, T]
        return fft_conv(u, h).transpose(1, 2)

    @torch.no_grad()
    def fit(self, inputs, targets):
        """Solve for M by least squares on [N, T, input_dim], [N, T, output_dim]; returns self."""
        if len(self.mlp) > 0:
            raise ValueError("fit solves a linear model; with use_mlp=True train it by descent")
        x = self.check_input("inputs", inputs).double()
        y = check_signal("targets", targets, self.output_dim).double()
        if x.shape[:2] != y.shape[:2]:
            got = f"{list(x.shape)} and {list(y.shape)}"
            raise ValueError(f"inputs and targets must be equally many and long, got {got}")
        # The normal equations. White coordinates make them as well conditioned as the inputs.
        gram = 0
        moment = 0
        for x_part, y_part in zip(x.split(16), y.split(16)):
            features = self.features(x_part).flatten(0, 1)  # [16 T, F · input_dim]
            gram = gram + features.T @ features
            moment = moment + features.T @ y_part.flatten(0, 1)
        M = torch.linalg.pinv(gram, rtol=1e-13, hermitian=True) @ moment
        self.stu.M.copy_(M.view_as(self.stu.M))  # [F, input_dim, output_dim]
        return self

    @torch.no_grad()
    def to_lds(self):
        """The same map as a diagonal LDS in float64, for input of any length.

        Its poles α_n are those of the filters' recurrence (stu.py, section 7). The residues
        R_n [input_dim, output_dim] are fitted so that Σ_n α_n^t R_n = Σ_f Φ_f(t) M_f at t < L.
        """
        bank = self.stu.bank
        if len(self.mlp) > 0 or bank.lds is None:
            raise ValueError("to_lds wants no use_mlp=True, and filters that are sums of decays")
        A = bank.lds.powers[1]
        if not torch.equal(A, A.tril()):  # decays that ring are blocks of 2 x 2
            raise ValueError("to_lds wants real decays, max_angle=0")
        L = self.seq_len
        d_in = self.input_dim
        response = bank.filters @ self.stu.M.double().cpu().flatten(1)  # [L, d_in · output_dim]
        poles = A.diagonal()  # A is triangular, so these are its eigenvalues
        # Past L the response is asked to fade, with little weight, at 300 lags between L and 40 L.
        far = (L * 40 ** torch.linspace(0, 1, 300)).round()
        lag = torch.cat([torch.arange(L), far])
        decays = poles ** lag[:, None]  # [L + 300, n]
        decays[L:] *= 1e-5
        target = F.pad(response, (0, 0, 0, 300))
        # rcond bounds the residues, which are large and cancel.
        residues = torch.linalg.lstsq(decays, target, rcond=1e-14, driver="gelsd").solution
        residues = residues.reshape(-1, self.output_dim)  # [n · d_in, output_dim]
        # There is one state for each pole and each input.
        lds = LDS(len(residues), d_in, self.output_dim, dtype=torch.float64)
        lds.A.copy_(poles.repeat_interleave(d_in))
        lds.B.copy_(torch.eye(d_in).repeat(len(poles), 1))
        lds.C.copy_(residues.T)
        return lds.to(self.stu.M.device)


def make_mlp(width, hidden, num_layers, dropout, activation):
    """Linear layers, width -> hidden -> ... -> width, with activation and dropout between."""
    check_integer("mlp_num_layers", num_layers)
    check_integer("mlp_hidden_dim", hidden)
    activations = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}
    if activation not in activations:
        raise ValueError(f"mlp_activation must be relu, gelu or tanh, got {activation!r}")
    layers = []
    width_so_far = width
    for _ in range(num_layers - 1):
        layers.append(nn.Linear(width_so_far, hidden))
        layers.append(activations[activation]())
        layers.append(nn.Dropout(dropout))
        width_so_far = hidden
    layers.append(nn.Linear(width_so_far, width))
    return nn.Sequential(*layers)


# ---- 4. Gradient descent -------------------------------------------------------------------------


def train_stu_on_lds(
    lds,
    seq_len,
    num_filters,
    *,
    num_steps=1000,
    batch_size=32,
    learning_rate=1e-3,
    verbose=True,
    watch=None,
    **options,
):
    """Train a MiniSTU(..., **options) to give the outputs of the system -> model, losses.

    After each step watch(model, losses) is called, if given.
    """
    check_integer("number of steps", num_steps, least=0)
    check_integer("batch_size", batch_size)
    check_number("learning_rate", learning_rate, most=1000)
    model = MiniSTU(
        seq_len,
        num_filters,
        lds.input_dim,
        lds.output_dim,
        dtype=lds.dtype,
        device=lds.device,
        **options,
    )
    optimizer = torch.optim.Adam(model.parameters())
    losses = []
    start = time.perf_counter()
    model.train()
    for step in range(num_steps):
        # For half of the steps the rate stays as it is, then it falls to zero.
        optimizer.param_groups[0]["lr"] = learning_rate * min(1, 2 - 2 * step / num_steps)
        x, y = sample(lds, batch_size, seq_len)
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]) or losses[-1] > 1e6 * losses[0]:
            trouble = f"training diverged, loss {losses[-1]:.3g}"
            raise FloatingPointError(f"{trouble}: lower {learning_rate = }")
        if verbose:
            show_progress(losses, num_steps, start)
        if watch is not None:
            watch(model, losses)
    model.eval()
    return model, losses


def show_progress(losses, num_steps, start):
    """A line with the loss, its curve and the time left. It moves on a terminal; else ten lines."""
    step = len(losses)
    on_terminal = sys.stdout.isatty()
    every = max(1, num_steps // (200 if on_terminal else 10))
    if step % every != 0 and step != num_steps:
        return
    seconds = (time.perf_counter() - start) / step * (num_steps - step)
    text = f"step {step:4}/{num_steps}  loss {losses[-1]:.1e}  {curve(losses, num_steps)}"
    end = "\r" if on_terminal and step < num_steps else "\n"
    print(f"{text} {seconds:4.0f} s left", end=end, flush=True)


def curve(values, final_length, columns=40):
    """A curve of the logarithms of the values, in a line of text: ▇▅▃▂▁···"""
    blocks = "▁▂▃▄▅▆▇█"
    logs = [math.log(max(value, 1e-30)) for value in values]
    highest = max(logs)
    height = max(1.0, highest - min(logs))
    text = ""
    for column in range(columns):
        i = column * final_length // columns
        if i < len(logs):
            text += blocks[round(7 - 7 * (highest - logs[i]) / height)]
        else:
            text += "·"
    return text


# ---- 5. The demo ---------------------------------------------------------------------------------


@torch.no_grad()
def unseen_error(model, lds, seq_len):
    """Mean squared error on 64 sequences that were not trained on."""
    x, y = sample(lds, 64, seq_len)
    return F.mse_loss(model(x), y).item()


@torch.no_grad()
def impulse_response(module, seq_len):
    """The first output after an impulse at the first input, [seq_len]."""
    x = torch.zeros(1, seq_len, module.input_dim)
    x[0, 0, 0] = 1.0
    return module(x)[0, :, 0].numpy(force=True)


def draw(figure, losses, num_steps, best, system, learned):
    """On the left the loss up to now, on the right how system and STU answer an impulse."""
    figure.clear()
    left, right = figure.subplots(1, 2)
    left.semilogy(losses, color="C3", label="gradient descent")
    left.axhline(best, color="C0", linestyle="--", label="least squares, at once")
    left.set(title="The loss falls to the rounding of float32", ylim=(best / 10, 100))
    left.set(xlabel="step", ylabel="mean squared error", xlim=(0, num_steps + 1))
    left.legend(loc="upper right")
    right.semilogy(abs(system), color="0.75", linewidth=6, label="the system")
    right.semilogy(abs(learned), color="C3", label="the STU")
    right.set(title="What it learns: the answer to an impulse", xlabel="time")
    right.set(ylabel="size of the output", ylim=(1e-6, 10))
    right.legend(loc="upper right")


def main():
    parser = argparse.ArgumentParser(description="Watch an STU learn a linear system.")
    add = parser.add_argument
    add("--state_dim", type=int, default=20, help="hidden numbers of the system")
    add("--input_dim", type=int, default=10, help="its inputs")
    add("--output_dim", type=int, default=5, help="its outputs")
    add("--lower_bound", type=float, default=0.1, help="of the eigenvalues' sizes")
    add("--spectral_radius", type=float, default=0.99, help="the largest of these")
    add("--seq_len", type=int, default=128, help="length of sequences and filters")
    add("--num_filters", type=int, default=24, help="each is used with both signs")
    add("--steps", type=int, default=1000, help="of gradient descent")
    add("--batch_size", type=int, default=32, help="sequences a step")
    add("--learning_rate", type=float, default=1e-3)
    add("--seed", type=int, default=0)
    add("--out", type=Path, default="lds.png", help=".png, .svg or .pdf; .gif: the film of it")
    args = parser.parse_args()
    if args.out.suffix not in (".png", ".svg", ".pdf", ".gif"):
        parser.error(f"--out must end in .png, .svg, .pdf or .gif, got {args.out}")
    no_file = args.out.exists() and not args.out.is_file()
    if no_file or not os.access(args.out.parent, os.W_OK):
        parser.error(f"--out {args.out}: cannot write a regular file there")
    try:
        from matplotlib.animation import PillowWriter
        from matplotlib.figure import Figure
    except ImportError:
        sys.exit("the picture needs matplotlib: pip install matplotlib")
    torch.manual_seed(args.seed)
    L = args.seq_len
    try:
        system = random_LDS(
            args.state_dim,
            args.input_dim,
            args.output_dim,
            args.lower_bound,
            spectral_radius=args.spectral_radius,
        )
        solved = MiniSTU(L, args.num_filters, args.input_dim, args.output_dim)
    except ValueError as error:
        parser.error(str(error))
    start = time.perf_counter()
    solved.fit(*sample(system, max(16, 2**14 // L), L))
    print(f"least squares took {time.perf_counter() - start:.2f} s")
    best = unseen_error(solved, system, L)
    print(f"loss on new sequences: {best:.1e}")
    converted = solved.to_lds()
    loss = unseen_error(converted, system, L)
    print(f"loss of the same as an LDS of {converted.state_dim} states: {loss:.1e}")

    print("gradient descent:")
    every = max(1, args.steps // 80)
    responses = {}  # step -> how the STU answered an impulse

    def watch(model, losses):
        if len(losses) % every == 0:
            responses[len(losses)] = impulse_response(model, L)

    try:
        model, losses = train_stu_on_lds(
            system,
            L,
            args.num_filters,
            num_steps=args.steps,
            batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            watch=watch,
        )
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"stopped: {error}")
    responses[args.steps] = impulse_response(model, L)

    figure = Figure((10, 4), layout="constrained")
    shown = impulse_response(system, L)
    if args.out.suffix == ".gif":
        film = PillowWriter(fps=10)
        with film.saving(figure, args.out, dpi=80):
            for step in [*responses, *[args.steps] * 20]:  # the last picture for two seconds more
                draw(figure, losses[:step], args.steps, best, shown, responses[step])
                film.grab_frame()
    else:
        draw(figure, losses, args.steps, best, shown, responses[args.steps])
        figure.savefig(args.out)
    print(f"the picture: {args.out}")


if __name__ == "__main__":
    main()
