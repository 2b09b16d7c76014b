"""What does length cost? The next token after a long context, and training on long sequences.

    python experiments/cost.py --out assets/cost.png    # six minutes

The next token of a model (4 layers of width 256) is computed from its state, or by reading the
whole context again. And models of 2.5 million parameters, of four kinds, train on one sequence,
without an optimizer. On a machine with a GPU all runs there.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
import stu
from stu import FlashSTU, FlashSTUConfig

ON_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if ON_CUDA else "cpu"
DTYPE = "bfloat16" if ON_CUDA else "float32"
NO_STU = {"use_stu": False, "mlp_scale": 2.25}  # for as many parameters
KINDS = {
    "hybrid": {},
    "STU only": {"use_attn": False},
    "window attention": NO_STU,
    "full attention": NO_STU,
}


class Progress:
    """Says how much time is left, as if all tokens took equally long."""

    def __init__(self, total):
        self.total = total
        self.done = 0
        self.start = time.perf_counter()

    def add(self, tokens, text):
        self.done += tokens
        minutes = (time.perf_counter() - self.start) / 60
        left = minutes / self.done * (self.total - self.done)
        print(f"{text:74} about {left:4.1f} min left", flush=True)


def timed(run, repeats):
    """Median seconds of run(), and what it returns; of several runs the first is a warm-up."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        if ON_CUDA:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    if repeats > 1:
        times = times[1:]
    return np.median(times).item(), result


@torch.no_grad()
def times_of_a_token(contexts, progress):
    """Milliseconds for the next token: from the state, and by reading the context again.

    -> two dicts {context: milliseconds}
    """
    sizes = {"n_embd": 256, "n_layers": 4, "n_heads": 4, "seq_len": 2048, "window_size": 256}
    model = FlashSTU(FlashSTUConfig(**sizes, vocab_size=256, torch_dtype=DTYPE)).to(DEVICE)
    from_state = {}
    by_reading = {}
    for context in contexts:
        ids = torch.randint(256, (1, context), device=DEVICE)
        seconds, (_, state) = timed(partial(model.hidden, ids, use_cache=True), 1)
        by_reading[context] = seconds * 1e3
        tokens = model.stream(ids[:, -1:], 33, state=state)
        seconds, _ = timed(partial(next, tokens), 32)
        from_state[context] = seconds * 1e3
        text = f"the next token after {context:6} {from_state[context]:9.2f} ms"
        progress.add(context, f"{text}, reading again {by_reading[context]:9.1f} ms")
    return from_state, by_reading


def full_attention(q, k, v, *_):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def lengths_of(kind, lengths):
    """The lengths at which this kind of model trains."""
    if kind == "full attention" and not ON_CUDA:
        return [T for T in lengths if T <= 2**14]  # more would take minutes
    return lengths


def num_steps(T):
    return 4 if T < 2**14 else 2


def training_speeds(lengths, progress):
    """Tokens a second of training on one sequence -> {kind of model: {length: tokens a second}}."""
    windowed_attention = stu.windowed_attention
    speeds = {}
    for kind, options in KINDS.items():
        if kind == "full attention":
            stu.windowed_attention = full_attention  # PyTorch's own
        speeds[kind] = {}
        for T in lengths_of(kind, lengths):
            sizes = {"n_embd": 192, "n_layers": 6, "n_heads": 6, "window_size": 128, "softcap": 0.0}
            sizes |= {"mlp_scale": 2.75, "seq_len": T, "vocab_size": 256, "torch_dtype": DTYPE}
            sizes |= options
            model = FlashSTU(FlashSTUConfig(**sizes)).to(DEVICE)
            ids = torch.randint(256, (1, T + 1), device=DEVICE)

            def step(model=model, ids=ids):
                model(ids, labels=ids).loss.backward()

            seconds, _ = timed(step, num_steps(T))
            speeds[kind][T] = T / seconds
            text = f"training, {kind:17} length {T:6}: {T / seconds:9,.0f} tokens/s"
            progress.add(num_steps(T) * T, text)
    stu.windowed_attention = windowed_attention
    return speeds


def main():
    parser = argparse.ArgumentParser(description="What does length cost?")
    parser.add_argument("--out", type=Path, default="cost.png")
    parser.add_argument("--tiny", action="store_true", help="only to see that it runs")
    args = parser.parse_args()
    if args.out.suffix not in (".png", ".svg", ".pdf") or not args.out.parent.is_dir():
        parser.error(f"--out must be a .png, .svg or .pdf in a folder that exists, got {args.out}")
    contexts = [512, 2048, 8192, 32768, 131072]
    lengths = [1024, 2048, 4096, 8192, 16384, 32768]
    if args.tiny:
        contexts = [20, 90]
        lengths = [64, 130]
    where = torch.cuda.get_device_name() if ON_CUDA else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}")
    total = sum(contexts)
    for kind in KINDS:
        for T in lengths_of(kind, lengths):
            total += num_steps(T) * T
    progress = Progress(total)
    from_state, by_reading = times_of_a_token(contexts, progress)
    speeds = training_speeds(lengths, progress)

    figure = Figure((12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.loglog(contexts, from_state.values(), marker="o", label="from the state")
    left.loglog(contexts, by_reading.values(), marker="o", label="reading all again")
    left.set(title="The next token costs the same after any context", ylim=(1, None))
    left.set(xlabel="tokens before it", ylabel="milliseconds")
    left.legend(loc="upper left")
    for kind, values in speeds.items():
        right.semilogx(values.keys(), values.values(), marker="o", label=kind)
    right.set(title="Speed of training, by the length of a sequence", ylim=(0, None))
    right.set(xlabel="tokens in a sequence", ylabel="tokens per second")
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(args.out)
    print(f"the picture: {args.out}")


if __name__ == "__main__":
    main()
