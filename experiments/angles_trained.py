"""What does a sector of poles bring to a model? Its filters span poles up to a max_angle.

    python experiments/angles_trained.py robot --rate 0.01                         4 minutes
    python experiments/angles_trained.py text --steps 300 --data input.txt        10 minutes

The filters of max_angle = 0 span decays. A larger angle adds what rings, and angles.py says what it
costs. Here models are trained at each angle, with 24 filters and on the same data. `robot` predicts
MuJoCo's Ant, a body with four legs, and needs pip install "gymnasium[mujoco]". `text` is a language
model of bytes. A row of the table is an angle: the loss on data that was not trained on, its mean
over the seeds and that of each seed. The tables go to stdout, and the time left to stderr.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from stu import FlashSTU, FlashSTUBlock, FlashSTUConfig

N_TORQUES = 8
N_STATE = 27
N_POSITIONS = 13  # which come first in the state
N_TRAJECTORIES = 400
N_UNSEEN = 40  # trajectories that are not trained on
L_ROBOT = 128  # length of the trajectories and of the filters
L_TEXT = 256
WIDTH = 64  # of the robot's model


class Progress:
    """Says how much time is left, as if all steps were equally long."""

    def __init__(self, total):
        self.total = total
        self.done = 0
        self.start = time.perf_counter()

    def step(self, text):
        self.done += 1
        if self.done % 100 == 0 or self.done == self.total:
            minutes = (time.perf_counter() - self.start) / 60
            left = minutes / self.done * (self.total - self.done)
            print(f"{text}, {left:.1f} min left", file=sys.stderr, flush=True)


def train(model, loss_of_a_batch, steps, rate, label, progress):
    """Adam; the rate rises for a twentieth of the steps, then falls to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(1, steps + 1):
        rising = 20 * step / steps
        falling = 1 - step / (steps + 1)
        optimizer.param_groups[0]["lr"] = rate * min(rising, falling)
        loss = loss_of_a_batch(model)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress.step(f"{label}: step {step}/{steps}")


def compare(task, args, make_model, loss_of_a_batch, unseen_loss, progress):
    """Trains a model for each angle and seed, and prints a row for each angle."""
    for angle in args.angles:
        losses = []
        for seed in args.seeds:
            torch.manual_seed(seed)  # the same data in the same order at every angle
            model = make_model(angle)
            label = f"{task}, {angle:g}°, seed {seed}"
            train(model, loss_of_a_batch, args.steps, args.rate, label, progress)
            with torch.no_grad():
                losses.append(unseen_loss(model).item())
        mean = sum(losses) / len(losses)
        runs = " ".join(f"{loss:.4g}" for loss in losses)
        print(f"| {task}, {angle:g}° | {mean:.4g} | {runs} |", flush=True)


# ---- The robot


def ant_trajectories(number, length):
    """The Ant under smooth random torques: [number, length, N_STATE + N_TORQUES]."""
    try:
        import gymnasium
        import mujoco  # noqa: F401
    except ImportError:
        sys.exit('the robot needs pip install "gymnasium[mujoco]"')
    env = gymnasium.make("Ant-v5", terminate_when_unhealthy=False).unwrapped
    rows = torch.empty(number, length, N_STATE + N_TORQUES)
    progress = Progress(number)
    for i in range(number):
        env.reset(seed=i)
        torque = torch.zeros(N_TORQUES)
        for t in range(length):
            torque = 0.9 * torque + 0.19**0.5 * torch.randn(N_TORQUES)
            position = env.data.qpos[2:]  # without where it stands on the plane
            rows[i, t, :N_STATE] = torch.tensor([*position, *env.data.qvel])
            rows[i, t, N_STATE:] = torque.tanh()
            env.step(rows[i, t, N_STATE:].numpy())
        progress.step(f"simulated {i + 1}/{number} trajectories")
    return rows


def predict_robot(task, d, data, args, progress):
    """From the first d numbers of the state and the torques, of all steps so far, predict the next
    change of these numbers. The model has four STU-T blocks."""
    states = data[:, :, :d]
    torques = data[:, :, N_STATE:]
    inputs = torch.cat([states, torques], dim=2)[:, :-1]
    change = states.diff(dim=1)
    change = change / change.std()

    def make_model(angle):
        layers = [nn.Linear(d + N_TORQUES, WIDTH)]
        for _ in range(4):
            block = FlashSTUBlock(WIDTH, L_ROBOT, mlp_scale=2.0, max_angle=angle)
            layers.append(block)
        layers.append(nn.RMSNorm(WIDTH))
        layers.append(nn.Linear(WIDTH, d))
        return nn.Sequential(*layers)

    def loss_of_a_batch(model):
        rows = torch.randint(N_UNSEEN, len(data), (8,))
        return F.mse_loss(model(inputs[rows]), change[rows])

    def unseen_loss(model):
        return F.mse_loss(model(inputs[:N_UNSEEN]), change[:N_UNSEEN])

    compare(task, args, make_model, loss_of_a_batch, unseen_loss, progress)


def robot(args):
    torch.manual_seed(0)
    data = ant_trajectories(N_TRAJECTORIES, L_ROBOT + 1)
    data = data - data.mean(dim=(0, 1))
    data = data / data.std(dim=(0, 1))
    progress = Progress(2 * len(args.angles) * len(args.seeds) * args.steps)
    predict_robot("whole state", N_STATE, data, args, progress)
    predict_robot("positions only", N_POSITIONS, data, args, progress)


# ---- The text


def text(args):
    """A language model of four layers, STU-T and attention by turns; bits per byte."""
    ids = torch.tensor(list(args.data.read_bytes()))
    end_of_training = len(ids) * 9 // 10

    def make_model(angle):
        config = FlashSTUConfig(
            n_embd=128,
            n_layers=4,
            n_heads=4,
            seq_len=L_TEXT,
            window_size=64,
            vocab_size=256,
            max_angle=angle,
            torch_dtype="float32",
        )
        return FlashSTU(config)

    def loss(model, begin, end, n):
        """The mean loss on n random pieces of the text between begin and end."""
        starts = torch.randint(begin, end - L_TEXT, (n, 1))
        x = ids[starts + torch.arange(L_TEXT)]
        return model(x, labels=x).loss

    def loss_of_a_batch(model):
        return loss(model, 0, end_of_training, 8)

    def unseen_loss(model):
        torch.manual_seed(0)
        nats = loss(model, end_of_training, len(ids), 128)
        return nats / math.log(2)

    progress = Progress(len(args.angles) * len(args.seeds) * args.steps)
    compare("text", args, make_model, loss_of_a_batch, unseen_loss, progress)


def main():
    parser = argparse.ArgumentParser(description="What does a sector of poles bring?")
    parser.add_argument("what", choices=["robot", "text"])
    parser.add_argument("--angles", type=float, nargs="+", default=[0.0, 5.0, 20.0, 45.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--data", type=Path, default="input.txt", help="a text, read as bytes")
    args = parser.parse_args()
    if args.steps < 1 or not args.rate > 0:
        parser.error("--steps must be at least 1, and --rate above 0")
    if min(args.angles) < 0 or max(args.angles) > 90:
        parser.error("--angles must be from 0 to 90")
    if args.what == "robot":
        robot(args)
        return
    if not args.data.is_file() or args.data.stat().st_size < 12 * L_TEXT:
        parser.error(f"--data must be a text of at least {12 * L_TEXT} bytes, got {args.data}")
    text(args)


if __name__ == "__main__":
    main()
