"""
What does length cost? The next token after a long context, and training on long sequences.

    python experiments/cost.py --out assets/cost.png    # some minutes

The next token of a model (4 layers of width 256) is computed from its state, or by reading the
whole context again. And models of 2.5 million parameters, of four kinds, train on one sequence,
without an optimizer. On a machine with a GPU all runs there.
"""

import argparse
import sys
import time
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


def timed(run, repeats=6):
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
def times_of_a_token(contexts):
    """Milliseconds for the next token: from the state, and by reading the context again.

    -> two dicts {context: milliseconds}
    """
    sizes = {"n_embd": 256, "n_layers": 4, "n_heads": 4, "seq_len": 2048, "window_size": 256}
    model = FlashSTU(FlashSTUConfig(**sizes, vocab_size=256, torch_dtype=DTYPE)).to(DEVICE)
    from_state = {}
    by_reading = {}
    for context in contexts:
        ids = torch.randint(256, (1, context), device=DEVICE)
        reading, (_, state) = timed(lambda ids=ids: model.hidden(ids, use_cache=True), 1)
        tokens = model.stream(ids[:, -1:], 33, state=state)
        token, _ = timed(lambda tokens=tokens: next(tokens), 32)
        from_state[context] = token * 1e3
        by_reading[context] = reading * 1e3
        what = f"the next token after {context}"
        print(f"{what:30} {token * 1e3:8.2f} ms, reading again {reading * 1e3:9.1f} ms", flush=True)
    return from_state, by_reading


def full_attention(q, k, v, *_):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def training_speeds(lengths):
    """Tokens a second of training on one sequence -> {kind of model: {length: tokens a second}}."""
    no_stu = {"use_stu": False, "mlp_scale": 2.25}  # for as many parameters
    kinds = {"hybrid": {}, "STU only": {"use_attn": False}}
    kinds |= {"window attention": no_stu, "full attention": no_stu}
    windowed_attention = stu.windowed_attention
    speeds = {}
    for kind, options in kinds.items():
        if kind == "full attention":
            stu.windowed_attention = full_attention  # PyTorch's own
        speeds[kind] = {}
        for T in lengths:
            if kind == "full attention" and T > 2**14 and not ON_CUDA:
                continue  # it would take minutes
            sizes = {"n_embd": 192, "n_layers": 6, "n_heads": 6, "window_size": 128, "softcap": 0.0}
            sizes |= {"mlp_scale": 2.75, "seq_len": T, "vocab_size": 256, "torch_dtype": DTYPE}
            model = FlashSTU(FlashSTUConfig(**(sizes | options))).to(DEVICE)
            ids = torch.randint(256, (1, T + 1), device=DEVICE)

            def step(model=model, ids=ids):
                model(ids, labels=ids).loss.backward()

            seconds, _ = timed(step, 4 if T < 2**14 else 2)
            speeds[kind][T] = T / seconds
            print(f"training, {kind:17} length {T:6}: {T / seconds:9,.0f} tokens/s", flush=True)
    stu.windowed_attention = windowed_attention
    return speeds


def main():
    parser = argparse.ArgumentParser(description="What does length cost?")
    parser.add_argument("--out", default="cost.png")
    parser.add_argument("--tiny", action="store_true", help="only to see that it runs")
    args = parser.parse_args()
    contexts = [512, 2048, 8192, 32768, 131072]
    lengths = [1024, 2048, 4096, 8192, 16384, 32768]
    if args.tiny:
        contexts = [20, 90]
        lengths = [64, 130]
    where = torch.cuda.get_device_name() if ON_CUDA else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}")
    from_state, by_reading = times_of_a_token(contexts)
    speeds = training_speeds(lengths)

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
