"""What needs attention? Recall and copying, by models with one kind of layer or with both.

    python experiments/recall.py            # three minutes; draws recall.png

Three tasks, each with new questions at every step, and the share of right answers:
- associative recall: pairs of a key and a value, then the keys again in another order;
- induction: random tokens that repeat with a random period: what comes next?
- selective copying: eight tokens among 40 of noise, to be said in their order.
The language models have two layers: an STU and attention, two STUs, or twice attention.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
from stu import FlashSTU, FlashSTUConfig

VOCAB_SIZE = 64
NOISE = 62  # these two tokens mean something in selective copying only
BLANK = 63
IGNORED = -100  # the label where no answer is asked for


# Each task makes n questions: ids [n, T] to read, and at each the label that a model must say next


def associative_recall(n):
    """Ids [n, 31]: 8 pairs, then the same in another order, of which the values are asked for."""
    keys = torch.rand(n, 32).argsort(dim=1)  # all different
    values = torch.randint(32, 64, (n, 8))
    pairs = torch.stack([keys[:, :8], values], dim=2)  # [n, 8, 2]
    order = torch.rand(n, 8).argsort(dim=1)
    order = order[:, :, None].expand(n, 8, 2)
    again = pairs.gather(1, order)
    ids = torch.cat([pairs, again], dim=1)
    ids = ids.flatten(1)  # [n, 32]
    position = torch.arange(31)
    is_asked = (position >= 16) & (position % 2 == 0)  # at a key of the second half
    labels = ids[:, 1:].masked_fill(~is_asked, IGNORED)
    return ids[:, :-1], labels


def induction(n):
    """Ids [n, 48] with a period of 8 to 23 tokens, which are asked for from the second time on."""
    position = torch.arange(49)
    period = torch.randint(8, 24, (n, 1))
    tokens = torch.randint(VOCAB_SIZE, (n, 24))
    ids = tokens.gather(1, position % period)
    is_new = position[:-1] < period  # what follows is seen for the first time
    labels = ids[:, 1:].masked_fill(is_new, IGNORED)
    return ids[:, :-1], labels


def selective_copying(n):
    """Ids [n, 56]: 8 tokens among 40 of noise, then 8 blanks at which they are asked for."""
    tokens = torch.randint(NOISE, (n, 8))
    places = torch.rand(n, 48).argsort(dim=1)[:, :8]
    places = places.sort(dim=1).values
    ids = torch.full((n, 48), NOISE)
    ids = ids.scatter(1, places, tokens)
    ids = F.pad(ids, (0, 8), value=BLANK)
    labels = F.pad(tokens, (48, 0), value=IGNORED)
    return ids, labels


TASKS = {  # and the share of --steps that each gets
    "associative recall": (associative_recall, 0.2),
    "induction": (induction, 0.2),
    "selective copying": (selective_copying, 1.0),
}
KINDS = {  # of models, by options of FlashSTUConfig
    "hybrid": {},
    "STU": {"use_attn": False},
    "attention": {"use_stu": False},
}


def make_model(**options):
    config = FlashSTUConfig(
        n_embd=64,
        n_layers=2,
        n_heads=2,
        seq_len=64,
        window_size=64,
        vocab_size=VOCAB_SIZE,
        mlp_scale=1.0,
        softcap=0.0,
        torch_dtype="float32",
        **options,
    )
    return FlashSTU(config)


def ask(model, questions, n):
    """Loss and share of right answers on n new questions."""
    ids, labels = questions(n)
    asked = labels != IGNORED
    logits = model(ids).logits[asked]
    answers = labels[asked]
    right = logits.argmax(dim=-1) == answers
    return F.cross_entropy(logits, answers), right.float().mean()


def make_optimizers(model):
    """Muon for the matrices of the layers, Adam for the rest; scaled so that one rate suits."""
    matrices = []
    rest = []
    for name, p in model.named_parameters():
        if p.ndim == 2 and "tok_emb" not in name and "M_filters" not in name:
            matrices.append(p)
        else:
            rest.append(p)
    muon = torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.Adam(rest)]


class Progress:
    """Says how much time is left, as if all steps were equally long."""

    def __init__(self, total):
        self.total = total
        self.done = 0
        self.start = time.perf_counter()

    def step(self, text):
        self.done += 1
        if self.done % 50 == 0 or self.done == self.total:
            minutes = (time.perf_counter() - self.start) / 60
            left = minutes / self.done * (self.total - self.done)
            print(f"{text:50} {left:5.1f} min left", flush=True)


def train(name, model, questions, batch_size, num_steps, progress, rate=1e-2):
    """The rate falls to zero in the second half -> the share of right answers at each step."""
    optimizers = make_optimizers(model)
    shares = []
    for step in range(num_steps):
        loss, right = ask(model, questions, batch_size)
        loss.backward()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate * min(1, 2 - 2 * step / num_steps)
            optimizer.step()
        model.zero_grad()
        shares.append(right.item())
        progress.step(f"{name}, step {step + 1}/{num_steps}: {right:.2f} right")
    return shares


def main():
    parser = argparse.ArgumentParser(description="What needs attention?")
    parser.add_argument("--steps", type=int, default=1000, help="of selective copying, at least 5")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default="recall.png")
    args = parser.parse_args()
    if args.steps < 5 or args.batch_size < 1:
        parser.error("--steps must be at least 5, and --batch_size at least 1")
    if args.out.suffix not in (".png", ".svg", ".pdf") or not args.out.parent.is_dir():
        parser.error(f"--out must be a .png, .svg or .pdf in a folder that exists, got {args.out}")
    num_steps = {}
    for task, (_, share) in TASKS.items():
        num_steps[task] = round(share * args.steps)
    progress = Progress(len(KINDS) * sum(num_steps.values()))
    figure = Figure((13, 4), layout="constrained")
    figure.suptitle("Share of right answers while learning")
    axes = figure.subplots(1, len(TASKS))
    for axis, (task, (questions, _)) in zip(axes, TASKS.items()):
        for kind, options in KINDS.items():
            torch.manual_seed(args.seed)
            model = make_model(**options)
            name = f"{task}, {kind}"
            shares = train(name, model, questions, args.batch_size, num_steps[task], progress)
            axis.plot(shares, label=kind)
            with torch.no_grad():
                _, right = ask(model, questions, 512)
            print(f"== {name}: {right:.2f} of 512 new questions are answered right", flush=True)
        axis.set(title=task.capitalize(), xlabel="step", ylim=(0, 1.02))
    axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(args.out)
    print(f"the picture: {args.out}")


if __name__ == "__main__":
    main()
