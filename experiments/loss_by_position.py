"""What is a memory worth? The loss of a language model by position in a text, far past seq_len.

    python train.py                             # makes a model in runs/default, some minutes
    python experiments/loss_by_position.py      # two minutes; draws context.png
    python experiments/loss_by_position.py --model my_model --data book.txt

A model was trained on windows of seq_len tokens, and reads texts 16 times as long, in three ways:
with its state carried on to the end; with all of the state forgotten every seq_len tokens; and with
only the state of the STU layers forgotten then. The differences are what the memory is worth.
(Compare the ways at one position. Different positions are different text.)
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
from prepare_data import get_tokenizer, open_data, read_tokens
from stu import STU, FlashSTU, FlashSTUConfig

PIECE = 256  # tokens whose logits exist at once
WAYS = ("state carried on", "all forgotten", "STU's state forgotten")


def load(folder):
    """A model, and the name of its tokenizer, from the folder of a run or of a saved model."""
    checkpoints = list(folder.glob("checkpoint_*.pt"))
    if checkpoints:
        steps = [int(path.stem.removeprefix("checkpoint_")) for path in checkpoints]
        newest = folder / f"checkpoint_{max(steps)}.pt"
        checkpoint = torch.load(newest, map_location="cpu", weights_only=True)
        model = FlashSTU(FlashSTUConfig(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
        return model.eval(), checkpoint.get("tokenizer") or "bytes"
    if not (folder / "config.json").exists():
        sys.exit(f"{folder} holds no checkpoint and no model: python train.py makes one")
    try:
        model = FlashSTU.from_pretrained(folder)
    except ValueError as error:
        sys.exit(str(error))
    config = json.loads((folder / "config.json").read_text())
    return model, config.get("tokenizer_name", "bytes")


def load_tokens(path, tokenizer):
    """The tokens of a text, or of the validation split in a folder of prepare_data.py.

    -> shards (a list of arrays), the number of tokens, the number of bytes of the text.
    """
    if path.is_file():
        text = path.read_bytes()
        tokens = get_tokenizer(tokenizer).encode(text.decode(errors="replace"))
        return [tokens], len(tokens), len(text)
    meta, shards = open_data(path)
    if meta["tokenizer"] != tokenizer:
        sys.exit(f"the model reads {tokenizer}, but {path} holds {meta['tokenizer']}")
    return shards["val"], meta["val"]["tokens"], meta["val"]["bytes"]


def forget_stu(model, state):
    """The state with nothing in the memory of the STU layers."""
    state_after = []
    for layer, layer_state in zip(model.layers, state):
        if isinstance(layer.mixer, STU):
            layer_state = layer_state._replace(S=torch.zeros_like(layer_state.S))
        state_after.append(layer_state)
    return state_after


@torch.no_grad()
def losses_by_position(model, x, way):
    """Texts x [B, length + 1] -> the loss of each position, in nats, summed over texts [length]."""
    seq_len = model.config.seq_len
    state = None
    losses = []
    windows = x[:, :-1].split(seq_len, dim=1)
    next_tokens = x[:, 1:].split(seq_len, dim=1)
    for window, targets in zip(windows, next_tokens):
        if way == "all forgotten":
            state = None
        elif way == "STU's state forgotten" and state is not None:
            state = forget_stu(model, state)
        pieces = window.split(PIECE, dim=1)
        for piece, labels in zip(pieces, targets.split(PIECE, dim=1)):
            hidden, state = model.hidden(piece, state, use_cache=True)
            logits = model.logits(hidden).float().transpose(1, 2)  # [B, vocab_size, PIECE]
            loss = F.cross_entropy(logits, labels, reduction="none")
            losses.append(loss.sum(dim=0))
    return torch.cat(losses)


def spans(length):
    """From 0 to 64, from there to 128, to 256, ... to length."""
    found = []
    first = 0
    last = 64
    while last < length:
        found.append((first, last))
        first = last
        last = 2 * last
    return [*found, (first, length)]


def main():
    parser = argparse.ArgumentParser(description="What is a memory worth?")
    parser.add_argument("--model", type=Path, default="runs/default", help="a run, or a model")
    parser.add_argument("--data", type=Path, default="data/stdlib", help="or a text")
    parser.add_argument("--length", type=int, default=0, help="0: 16 times seq_len")
    parser.add_argument("--texts", type=int, default=64, help="as many as this, and as fit")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--out", type=Path, default="context.png")
    args = parser.parse_args()
    if args.length < 0 or args.texts < 1 or args.batch_size < 1:
        parser.error("--texts and --batch_size must be at least 1, and --length not negative")
    if args.out.suffix not in (".png", ".svg", ".pdf") or not args.out.parent.is_dir():
        parser.error(f"--out must be a .png, .svg or .pdf in a folder that exists, got {args.out}")
    model, tokenizer = load(args.model)
    if not args.data.exists():
        parser.error(f"--data: there is no file or folder {args.data}")
    shards, n_tokens, n_bytes = load_tokens(args.data, tokenizer)
    if n_tokens < 2:
        parser.error(f"--data: {args.data} is too short")
    seq_len = model.config.seq_len
    length = min(args.length or 16 * seq_len, n_tokens - 1)
    n_texts = max(1, min(args.texts, n_tokens // (length + 1)))
    starts = np.linspace(0, n_tokens - length - 1, n_texts).astype(int)
    print(f"{n_texts} texts of {length} tokens from {args.data}, read by {args.model}")
    texts = [read_tokens(shards, start, start + length + 1) for start in starts]
    batches = torch.from_numpy(np.stack(texts).astype(np.int64)).split(args.batch_size)
    # Losses in nats a token, summed over the texts, become the mean of the texts in bits a byte
    tokens_per_byte = n_tokens / n_bytes
    bits_per_nat = tokens_per_byte / math.log(2) / n_texts

    figure = Figure((8, 4.5), layout="constrained")
    axis = figure.subplots()
    carried_on = None  # the means of the first way, with which the others are compared
    total = len(WAYS) * len(batches)
    done = 0
    start = time.perf_counter()
    for way in WAYS:
        bits = torch.zeros(length)
        for x in batches:
            bits += losses_by_position(model, x, way) * bits_per_nat
            done += 1
            left = (time.perf_counter() - start) / done * (total - done)
            print(f"batch {done}/{total}, {left:.0f} s left", file=sys.stderr, flush=True)
        names = []
        means = []
        for first, last in spans(length):
            names.append(f"{first}-{last}")
            means.append(bits[first:last].mean().item())
        text = ", ".join(f"{name} {mean:.4f}" for name, mean in zip(names, means))
        print(f"{way}, bits per byte: {text}", flush=True)
        if carried_on is None:
            carried_on = means
        more = np.subtract(means, carried_on)
        axis.plot(names, more, marker=".", label=way)
    axis.set(title=f"What forgetting costs a model that was trained on windows of {seq_len} tokens")
    axis.set(xlabel="position in the text", ylabel="bits per byte more than with all memory")
    axis.legend()
    figure.savefig(args.out)
    print(f"the picture: {args.out}")


if __name__ == "__main__":
    main()
