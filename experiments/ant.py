"""Who predicts a robot? MuJoCo's Ant, a body with four legs, under random torques.

    python experiments/ant.py       # a quarter of an hour; needs pip install "gymnasium[mujoco]"

Models of four layers predict the next state of the robot from its states and torques so far: 27
numbers, or in a second task the 13 positions alone, so that they have to remember. They have about
equally many parameters, and train for the same CPU time (--seconds) at the best of three learning
rates, each tried for a quarter of that time. It is simulated once, into the folder data.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from stu import FlashSTUBlock

N_STATE = 27
N_TORQUES = 8
N_ALONE = 50  # steps that a model predicts on its own predictions
SHOWN = (1, 5, 10, 25, 50)  # of these, in the table
WIDTH = 64
L = 128  # length of the trajectories and of the filters
RATES = (1e-2, 2e-2, 4e-2)
TASKS = {"The whole state": N_STATE, "Positions only": 13}
KINDS = {  # layers (T: STU-T, S: full STU, A: attention, M: Mamba-2), filters, width of the MLPs
    "STU-T": ("TTTT", 24, 2.8),
    "full STU": ("SSSS", 4, 0.7),
    "hybrid": ("TATA", 24, 2.4),
    "attention": ("AAAA", 24, 2.0),
    "Mamba-2": ("MMMM", 24, 2.1),
}


def simulate(number):
    """States and torques [number, L + 1, N_STATE + N_TORQUES]."""
    try:
        import gymnasium
        import mujoco  # noqa: F401
    except ImportError:
        sys.exit('the robot needs pip install "gymnasium[mujoco]"')
    env = gymnasium.make("Ant-v5", terminate_when_unhealthy=False).unwrapped
    torch.manual_seed(0)
    torques = torch.randn(number, L + 1, N_TORQUES)
    for t in range(1, L + 1):  # smooth, with a memory of ten steps
        torques[:, t] = 0.9 * torques[:, t - 1] + 0.19**0.5 * torques[:, t]
    torques = torques.tanh()
    states = torch.empty(number, L + 1, N_STATE)
    start = time.perf_counter()
    for i in range(number):
        observed, _ = env.reset(seed=i)
        for t in range(L + 1):
            states[i, t] = torch.tensor(observed[:N_STATE])  # then come the forces on it
            observed, *_ = env.step(torques[i, t].numpy())
        if (i + 1) % 100 == 0:
            left = (time.perf_counter() - start) * (number / (i + 1) - 1)
            print(f"simulated {i + 1}/{number} trajectories, {left:.0f} s left", flush=True)
    return torch.cat([states, torques], dim=2)


class Mamba2(nn.Module):
    """The layer of Mamba-2 (arXiv 2405.21060), without a loop; linear_systems.py explains it."""

    def __init__(self, N=16, heads=2):
        super().__init__()
        self.heads = heads
        self.encoded = [WIDTH, WIDTH + 2 * N, heads]  # channels of the gate, of u, B, C, and of Δ
        self.convolved = [WIDTH, N, N]  # channels of u, B and C
        self.encode = nn.Linear(WIDTH, sum(self.encoded))
        self.decode = nn.Linear(WIDTH, WIDTH)
        n_conv = sum(self.convolved)
        self.conv = nn.Conv1d(n_conv, n_conv, 4, padding=3, groups=n_conv)
        self.log_dt = nn.Parameter(torch.empty(heads).uniform_(-6.9, -2.3))
        self.log_A = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x, *_):  # a block also gives its mixer a state and a flag, not used here
        batch, T, _ = x.shape
        gate, uBC, dt = self.encode(x).split(self.encoded, dim=-1)
        uBC = self.conv(uBC.mT)  # of each input and the three before it
        uBC = F.silu(uBC[:, :, :T]).mT
        u, B, C = uBC.split(self.convolved, -1)
        dt = F.softplus(dt + self.log_dt).mT  # [batch, heads, T]
        log_a = -(dt * self.log_A.exp()[:, None]).cumsum(dim=-1)
        log_decay = log_a.unsqueeze(3) - log_a.unsqueeze(2)  # [batch, heads, t, s]
        future = torch.ones(T, T).triu(1) > 0
        decay = log_decay.masked_fill(future, -math.inf).exp()
        scores = (C @ B.mT).unsqueeze(1) * decay * dt.unsqueeze(2)
        y = scores @ u.view(batch, T, self.heads, -1).transpose(1, 2)
        y = y.transpose(1, 2).flatten(2)
        return self.decode((y + self.D * u) * F.silu(gate))


def make_model(kind, d):
    layers, num_filters, mlp_scale = KINDS[kind]
    options = {"n_heads": 4, "window_size": L, "softcap": 0.0, "mlp_scale": mlp_scale}
    modules = [nn.Linear(d + N_TORQUES, WIDTH)]
    for layer in layers:
        options["use_approx"] = layer != "S"
        block = FlashSTUBlock(WIDTH, L, num_filters, layer == "A", **options)
        if layer == "M":
            block.mixer = Mamba2()
        modules.append(block)
    return nn.Sequential(*modules, nn.RMSNorm(WIDTH), nn.Linear(WIDTH, d))


class Task:
    """From inputs [number, L, d + N_TORQUES] predict the change [number, L, d] of the state."""

    def __init__(self, data, d):
        self.d = d
        self.n_train = len(data) * 9 // 10
        train_data = data[: self.n_train]
        data = data - train_data.mean(dim=(0, 1))
        data = data / train_data.std(dim=(0, 1))
        states = data[:, :, :d]
        self.inputs = torch.cat([states, data[:, :, N_STATE:]], dim=2)[:, :-1]
        self.change = states.diff(dim=1)
        self.unit = self.change[: self.n_train].std()  # in which models predict

    def train(self, kind, seconds, rate, finish):
        """The rate falls to zero in the second half of the time -> model, mean of last losses."""
        torch.manual_seed(0)  # the same weights and data at every rate
        model = make_model(kind, self.d)
        # Muon for the matrices of the blocks, Adam for the rest; scaled so that one rate suits
        named = model[1:-2].named_parameters()
        matrices = [p for name, p in named if p.ndim == 2 and "M_filters" not in name]
        rest = set(model.parameters()) - set(matrices)
        muon = torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        optimizers = [muon, torch.optim.Adam(rest)]
        losses = []
        start = time.process_time()
        share = 0.0  # of the time
        while share < 1:
            rows = torch.randint(self.n_train, (8,))
            prediction = self.unit * model(self.inputs[rows])
            loss = F.mse_loss(prediction, self.change[rows])
            loss.backward()
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = rate * min(1, 2 - 2 * share)
                optimizer.step()
            model.zero_grad()
            losses.append(loss.item())
            share = (time.process_time() - start) / seconds
            if len(losses) % 200 == 0:
                left = max(0.0, finish - time.process_time()) / 60
                print(f"{kind}, rate {rate}: loss {loss:.2g}, {left:.1f} min left", flush=True)
        return model, sum(losses[-10:]) / len(losses[-10:])

    @torch.no_grad()
    def judge(self, model):
        """The error of one step, and those of N_ALONE steps on its own predictions."""
        x = self.inputs[self.n_train :].clone()
        change = self.change[self.n_train :]
        one_step = F.mse_loss(self.unit * model(x), change)
        true = x[:, :, : self.d] + change
        alone = []
        for t in range(L - N_ALONE, L):
            prediction = self.unit * model(x[:, : t + 1])
            state = x[:, t, : self.d] + prediction[:, -1]
            alone.append(F.mse_loss(state, true[:, t]).item())
            if t + 1 < L:
                x[:, t + 1, : self.d] = state
        return one_step.item(), alone


def main():
    parser = argparse.ArgumentParser(description="Who predicts a robot?")
    parser.add_argument("--trajectories", type=int, default=1000, help="at least 10")
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--out", type=Path, default="ant.png")
    args = parser.parse_args()
    if args.trajectories < 10 or not 0 < args.seconds < math.inf:
        parser.error("--trajectories must be at least 10, and --seconds above 0")
    if args.out.suffix not in (".png", ".svg", ".pdf") or not args.out.parent.is_dir():
        parser.error(f"--out must be a .png, .svg or .pdf in a folder that exists, got {args.out}")
    path = Path(f"data/ant-{args.trajectories}.pt")
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        torch.save(simulate(args.trajectories), path)
    data = torch.load(path)
    figure = Figure((13, 4.5), layout="constrained")
    axes = figure.subplots(1, 2)
    seconds_a_kind = args.seconds * (1 + len(RATES) / 4)
    finish = time.process_time() + len(TASKS) * len(KINDS) * seconds_a_kind
    for axis, (title, d) in zip(axes, TASKS.items()):
        task = Task(data, d)
        models = {"no change": lambda x: torch.zeros_like(x[:, :, :-N_TORQUES])}
        for kind in KINDS:
            losses = {}
            for rate in RATES:
                _, losses[rate] = task.train(kind, args.seconds / 4, rate, finish)
            rate = min(losses, key=losses.get)
            model, loss = task.train(kind, args.seconds, rate, finish)
            models[kind] = model
            n_params = sum(p.numel() for p in model.parameters())
            print(
                f"{title}, {kind}, {n_params} parameters, rate {rate}: loss {loss:.2g}", flush=True
            )
        print(f"\n{title:15}   one step", *(f"{n:4} alone" for n in SHOWN))
        for kind, model in models.items():
            one_step, alone = task.judge(model)
            print(f"{kind:15} {one_step:10.2g}", *(f"{alone[n - 1]:10.2g}" for n in SHOWN))
            axis.semilogy(range(1, N_ALONE + 1), alone, label=kind)
        axis.set(title=f"{title}: the error on one's own predictions")
        axis.set(xlabel="steps alone", ylabel="mean squared error")
    axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(args.out)
    print(f"the picture: {args.out}")


if __name__ == "__main__":
    main()
