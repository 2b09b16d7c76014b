"""
Train a Flash STU language model, write with it, judge it: one CPU, one GPU, or many.

    python train.py                              a small hybrid on Python's own source code, minutes on a CPU
    torchrun --nproc_per_node=2 train.py         the same on two processes; --engine fsdp shards the model
    python train.py --preset 125M --data data/fineweb-edu-o200k_base --out_dir runs/125M
    python train.py --init_from runs/default --data data/shakespeare --out_dir runs/bard      fine-tune it
    python train.py --sample "def " --chat       write from the last checkpoint, then from what you type
    python train.py --eval_only                  the loss on the validation split, and far past seq_len
    python train.py --draw runs/a,runs/b --out_dir runs    the losses of several runs in one picture

The run folder (--out_dir) receives config.json, log.jsonl, loss.png, checkpoints and the finished model. The
same command again continues from the last checkpoint, whatever stopped it; on as many processes, bit for bit.
"""

import argparse
import difflib
import inspect
import json
import math
import os
import re
import signal
import sys
import time
import zipfile
import zlib
from contextlib import nullcontext, suppress
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import distributed as dist
from torch.distributed.checkpoint import state_dict

from prepare_data import get_tokenizer, lock, need, open_data, prepare, told, write_atomically
from stu import STU, FlashSTU, FlashSTUConfig, sample

# ------------------------------------------------------------------------------------------------------------
# Settings, each a flag, --name value: the default (of several choices the first), the range of the number or
# of the text's length, and the meaning

ANY, POSITIVE, AT_LEAST_0, AT_LEAST_1 = (-1e300, 1e300), (1e-12, 1e300), (0, 1e300), (1, 1e300)
comments = dict(re.findall(r"(\w+): .*  # (.*)", inspect.getsource(FlashSTUConfig)))
model_fields = {f.name: f.default for f in fields(FlashSTUConfig) if f.name != "vocab_size"}
table = {name: (value, ANY, comments.get(name, "")) for name, value in model_fields.items()}
table |= {
    "softcap": (0.0, AT_LEAST_0, "of attention logits; 0 turns it off"),
    "torch_dtype": ("float32", ANY, "of the weights and the optimizer; dtype is what the layers compute in"),
    # run
    "out_dir": ("runs/default", AT_LEAST_1, "the run folder"),
    "data": ("data/stdlib", AT_LEAST_1, "a folder of prepare_data.py; the default makes itself"),
    "preset": (("small", "125M", "350M", "1B"), ANY, "sizes and schedule; with o200k_base 235M, 495M, 1.6B"),
    "init_from": ("", AT_LEAST_1, "start from the weights and sizes of a run or of a saved model"),
    "fresh": (False, ANY, "start again; the run's checkpoints are replaced when the new ones are saved"),
    "seed": (1, (0, 2**32 - 1), "of the weights, the order of the data, dropout and sampling"),
    # instead of training, with the model of init_from or else of the run
    "sample": ("", AT_LEAST_1, "continue this text; @FILE: the text of a file"),
    "chat": (False, ANY, "continue each line you type, from all that was before; an empty line goes on"),
    "eval_only": (False, ANY, "the loss, and by position, on the validation split or on a text file"),
    "draw": ("", AT_LEAST_1, "run folders, separated by commas: their losses in one picture"),
    "temperature": (0.8, AT_LEAST_0, "of sampling; 0 takes the likeliest token"),
    "top_k": (50, AT_LEAST_0, "sample from so many of the likeliest tokens; 0 from all"),
    "top_p": (1.0, (1e-9, 1), "sample from the likeliest tokens that together have this probability"),
    "max_new_tokens": (500, AT_LEAST_1, "of a sample or an answer"),
    "num_samples": (1, AT_LEAST_1, "of one prompt"),
    # work
    "steps": (400, AT_LEAST_1, "of the whole run"),
    "batch_size": (16, AT_LEAST_1, "sequences a step, over all processes"),
    "micro_batch_size": (0, AT_LEAST_0, "sequences a process holds at once; 0: its whole share"),
    "eval_interval": (100, AT_LEAST_1, "steps from one evaluation to the next"),
    "eval_sequences": (64, AT_LEAST_1, "of the validation split, in an evaluation"),
    "eval_length": (16, AT_LEAST_1, "of the texts of eval_only, in units of seq_len"),
    "prompt": ("def ", ANY, "of the sample written at each evaluation"),
    "log_interval": (10, AT_LEAST_1, "steps a line"),
    "checkpoint_interval": (100, AT_LEAST_1, "steps from one checkpoint to the next"),
    # optimizer
    "optimizer": (("muon", "adamw"), ANY, "Muon for the layers' matrices, AdamW for the rest, or for all"),
    "muon_lr": (0.01, POSITIVE, "Muon's learning rate"),
    "lr": (0.01, POSITIVE, "AdamW's learning rate"),
    "weight_decay": (0.1, AT_LEAST_0, "times the learning rate"),
    "warmup_steps": (20, AT_LEAST_0, "in which the learning rates rise"),
    "decay": (("cosine", "linear", "none"), ANY, "of the learning rates, from the warmup to the last step"),
    "min_lr": (0.05, (0, 1), "where the decay ends, times the learning rates"),
    "grad_clip": (1.0, POSITIVE, "the norm that a longer gradient is cut to"),
    "max_skipped": (5, AT_LEAST_1, "steps in a row without a finite loss and gradient end the run"),
    # machine
    "device": (("auto", "cuda", "mps", "cpu", "meta"), ANY, "meta: only say what the model would need"),
    "dtype": (("auto", "float32", "bfloat16", "float16"), ANY, "of autocast; auto: 16 bits on CUDA, else 32"),
    "compile": (("auto", "true", "false"), ANY, "the layers; auto: on CUDA"),
    "engine": (("ddp", "fsdp"), ANY, "of several processes: each holds the model, or a part of it"),
}  # fmt: skip
columns = ("n_embd", "n_layers", "n_heads", "seq_len", "window_size", "num_eigh", "mlp_scale", "batch_size",
           "micro_batch_size", "steps", "warmup_steps", "eval_interval", "checkpoint_interval")  # fmt: skip
presets = {
    "small": (192, 6, 6, 256, 64, 24, 2.75, 16, 0, 400, 20, 100, 100),
    "125M": (768, 12, 12, 2048, 1024, 24, 3.0, 256, 16, 20000, 500, 500, 500),
    "350M": (1024, 24, 16, 4096, 1024, 32, 3.0, 128, 4, 30000, 1000, 500, 500),
    "1B": (2048, 32, 32, 8192, 1024, 48, 2.0, 128, 1, 50000, 2000, 500, 500),
}
presets = {name: dict(zip(columns, values)) for name, values in presets.items()}
presets["1B"] |= {"use_gradient_checkpointing": True, "engine": "fsdp"}

# ------------------------------------------------------------------------------------------------------------
# The command, and the machine: processes, device, precision

rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
local_rank, main, parent = int(os.environ.get("LOCAL_RANK", "0")), rank == 0, os.getppid()


def say(text, end="\n", stream=sys.stdout):
    """Print, on the main process. Control characters, at which a terminal acts, are shown as \\x1b; and what
    cannot be printed, for lack of a letter, a reader or space, does not end the training."""
    if main and stream:
        text = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text) + end
        with suppress(OSError):
            os.write(stream.fileno(), text.encode(stream.encoding, stream.errors))


for stream in filter(None, (sys.stdin, sys.stdout, sys.stderr)):
    stream.reconfigure(errors="backslashreplace")
sys.excepthook = lambda kind, error, trace: (
    print(f"stopped: {error}", file=sys.stderr)  # a file that cannot be read or written: its name, and why
    if issubclass(kind, (OSError, KeyboardInterrupt))
    else sys.__excepthook__(kind, error, trace)
)
parser = argparse.ArgumentParser(usage="train.py [--name value ...]", description=__doc__, allow_abbrev=False)
parser.formatter_class, parser.argument_default = argparse.RawDescriptionHelpFormatter, argparse.SUPPRESS
defaults = {name: value[0] if isinstance(value, tuple) else value for name, (value, *_) in table.items()}
defaults |= presets["small"]
for name, (value, _, meaning) in table.items():
    kind, meaning = int if value is None else type(value), f"{meaning} (default: {defaults[name]})"
    switch = {"type": str.lower, "choices": ("true", "false", "1", "0"), "nargs": "?", "const": "true"}
    options = {bool: switch, tuple: {"choices": value}}.get(kind, {"type": kind})
    parser.add_argument(f"--{name}", help=meaning.replace("%", "%%"), **options)
given, unknown = parser.parse_known_args()
if unknown:
    near = difflib.get_close_matches(unknown[0].partition("=")[0], [f"--{name}" for name in table], 1)
    parser.error(f"unknown setting {unknown[0]}; " + (f"did you mean {near[0]}?" if near else "see --help"))
given = vars(given)  # what the command says; the rest are defaults
for name, value in given.items():
    size, (low, high) = len(value) if isinstance(value, str) else value, table[name][1]
    if not low <= size <= high:  # nan lies nowhere
        verb = "lie" if size is value else "have a length"
        parser.error(f"--{name} must {verb} between {low} and {high}, got {value!r}")
    if isinstance(table[name][0], bool):
        given[name] = value in ("true", "1")
s = argparse.Namespace(**(defaults | presets[given.get("preset", "small")] | given))
run, reading = Path(s.out_dir), s.sample or s.chat or s.eval_only or s.draw
if reading:  # one process does it
    world = 1
    if not main:
        sys.exit()

sharded = world > 1 and s.engine == "fsdp"
device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
device = torch.device(device if s.device == "auto" else s.device)
if device.type == "cuda":
    if not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here; --device cpu would work")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
if world > 1:
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
if s.dtype == "auto":
    s.dtype = "float32"
    if device.type == "cuda":
        s.dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
autocast = nullcontext()
if s.dtype != "float32" and device.type != "meta":
    autocast = torch.autocast(device.type, dtype=getattr(torch, s.dtype))
scaler = torch.amp.GradScaler(device.type, init_scale=2.0**12, enabled=s.dtype == "float16")

# ------------------------------------------------------------------------------------------------------------
# What a run's folder holds: checkpoints, a log, pictures


def checkpoints(folder):
    """(step, path) of each, oldest first."""
    names = os.listdir(folder) if folder.exists() else []
    found = (re.fullmatch(r"checkpoint_(0|[1-9][0-9]*)\.pt", name) for name in names)
    return sorted((int(match[1]), folder / match[0]) for match in found if match)


def load_checkpoint(folder):
    """The newest whole checkpoint, or None where there is none. What cannot be read is not damaged."""
    for step, path in reversed(checkpoints(folder)):
        mapped = os.fsencode(path) == str(path).encode(errors="replace")  # torch maps files named in UTF-8
        try:
            with open(path, "rb") as f:
                if damaged := zipfile.ZipFile(f).testzip():  # each part has a checksum
                    raise ValueError(f"in {damaged}")
                f.seek(0)
                saved = torch.load(path if mapped else f, map_location="cpu", weights_only=True, mmap=mapped)
            with torch.device("meta"):
                FlashSTU(FlashSTUConfig(**saved["config"])).load_state_dict(saved["model"], assign=True)
            whole = {"scaler", "data", "settings"} <= saved.keys() and saved["step"] == step
            if whole and saved["optimizer"]["state"].keys() == saved["model"].keys():
                return saved
            raise ValueError("parts are missing")
        except OSError:
            raise
        except Exception as e:  # noqa: BLE001
            say(f"{path} is damaged ({e!r}); trying the one before it", stream=sys.stderr)
    if checkpoints(folder):
        sys.exit(f"no checkpoint in {folder} is whole: restore one from a copy, or --fresh to start again")


def read_log(folder):
    """The records of log.jsonl; a line that is none, cut off or damaged, is skipped."""
    records = []
    for line in (folder / "log.jsonl").read_text("utf-8", "replace").splitlines():
        with suppress(Exception):
            record = json.loads(line)
            if all(isinstance(value, (int, float)) for value in (record["step"], *record.values())):
                records.append(record)
    return records


def draw(name, lines, **labels):
    """Lines, each its points and its style, to out_dir/name."""
    figure = need("matplotlib.figure").Figure((7, 4), dpi=110, layout="constrained")
    axis = figure.subplots()
    for points, style in lines:
        axis.plot(*zip(*points), **style)
    axis.set(**labels)
    axis.legend()
    axis.grid(alpha=0.3)
    run.mkdir(parents=True, exist_ok=True)
    write_atomically(run / name, figure.savefig)
    say(f"the picture: {run / name}")


def draw_losses(folders):
    """Each run's losses by step, training (pale) and validation, from its log.jsonl to out_dir/loss.png."""
    lines, late = [], []
    for i, folder in enumerate(folders):
        records, label = read_log(folder), ascii(folder.name)[1:-1]
        for key, style in (("loss", {"alpha": 0.2}), ("val_loss", {"marker": ".", "label": label})):
            points = [(r["step"], r[key]) for r in records if math.isfinite(r.get(key, math.nan))] or [(0, 0)]
            lines.append((points, {"color": f"C{i}", **style}))
            late += [loss for step, loss in points if step >= points[-1][0] / 10]
    limits = {"ylim": (min(late), max(late) + 0.01)}  # the first tenth may be cut off
    title = "validation (dots) and training (pale)"
    draw("loss.png", lines, xlabel="step", ylabel="loss (nats per token)", title=title, **limits)


# ------------------------------------------------------------------------------------------------------------
# Instead of training: draw, write


@torch.no_grad()
def write(model, text, max_new_tokens, generator, state=None, tokens=()):
    """Print what follows the text, as it comes -> the state and the tokens to go on from."""
    was_training, pending, text = model.training, [], os.fsencode(text).decode(errors="replace")
    tokens = [*tokens, *tokenizer.encode(text).tolist()] or [tokenizer.eot]
    model.eval()
    for _ in range(max_new_tokens):
        for piece in torch.tensor([tokens], device=device).split(256, dim=1):
            _, logits, state = model(piece, state=state, use_cache=True)
        logits = logits[:, -1, : tokenizer.n_vocab].float()
        if not logits.isfinite().all():
            say("(the model's output is not finite)", end="")
            break
        tokens = sample(logits, s.temperature, s.top_k or None, s.top_p, generator).tolist()
        if tokens == [tokenizer.eot]:
            break
        pending += tokens
        text = tokenizer.decode(pending)
        if not text.endswith("\ufffd") or len(pending) == 4:  # else the last character may be incomplete
            say(text, end="")
            pending = []
    say(tokenizer.decode(pending))
    model.train(was_training)
    return state, tokens


if s.draw:
    draw_losses([Path(folder) for folder in s.draw.split(",")])
    sys.exit()
source, source_folder = None, Path(s.init_from or s.out_dir)
if s.init_from or reading:
    saved, folder = load_checkpoint(source_folder), source_folder
    with told(f"{source_folder} holds no checkpoint and no model of ours"):
        if saved:
            source = FlashSTU(FlashSTUConfig(**saved["config"]))
            source.load_state_dict(saved["model"])
        else:  # what save_pretrained wrote
            folder = folder / "model" if (folder / "model").is_dir() else folder
            source = FlashSTU.from_pretrained(folder)
        sizes = {256: "bytes", 50304: "gpt2", 200064: "o200k_base"}
        vocabulary = sizes[math.ceil(source.config.vocab_size / 64) * 64]
    taken = model_fields.keys() - {"torch_dtype", *given}  # the rest is what the command says
    vars(s).update({name: value for name, value in source.config.to_dict().items() if name in taken})
if s.sample or s.chat:
    model, tokenizer = source.to(device), get_tokenizer(vocabulary)
    generator = torch.Generator(device).manual_seed(s.seed)
    state, tokens, text = None, [tokenizer.eot], s.sample
    if text.startswith("@"):
        text = Path(text[1:]).read_bytes().decode(errors="replace")
    for _ in range(s.num_samples if s.sample else 0):
        say(text, end="")
        state, tokens = write(model, text, s.max_new_tokens, generator)
    with suppress(EOFError, KeyboardInterrupt):
        while s.chat:
            state, tokens = write(model, input("> "), s.max_new_tokens, generator, state, tokens)
    sys.exit()

# ------------------------------------------------------------------------------------------------------------
# Data: the batch of step i is a pure function of the seed and i, whatever the number of processes. Windows do
# not end with a document, and the next one sees it

if s.data == "data/stdlib" and main:
    prepare(out=s.data)
if world > 1:
    dist.barrier()
if s.eval_only and Path(s.data).is_file():
    text = Path(s.data).read_bytes()
    shards = {"val": [get_tokenizer(vocabulary).encode(text.decode(errors="replace"))]}
    meta = {"tokenizer": vocabulary, "val": {"tokens": len(shards["val"][0]), "bytes": len(text)}}
else:
    meta, shards = open_data(s.data)
longest = max(map(len, shards["val"])) - 1
if source and meta["tokenizer"] != vocabulary:
    sys.exit(f"{source_folder} reads {vocabulary}, {s.data} holds {meta['tokenizer']}: prepare the text with "
             f"--tokenizer {vocabulary}")  # fmt: skip
tokenizer, T, batch_size = get_tokenizer(meta["tokenizer"]), s.seq_len, s.batch_size
if s.eval_only:
    T = max(1, min(T, longest))
bits_per_byte = meta["val"]["tokens"] / max(1, meta["val"]["bytes"]) / math.log(2)  # times nats per token


class Windows:
    """The n windows of T + 1 tokens that tile a split."""

    def __init__(self, split, T):
        self.shards, self.T, self.epoch = shards[split], T, -1
        self.n = sum((len(shard) - 1) // T for shard in self.shards)
        if max(map(len, self.shards)) <= T:
            sys.exit(f"no shard of the {split} split holds the {T + 1} tokens that seq_len {T} needs")

    def window(self, index, phase=0):
        """Window `index`, shifted by `phase` tokens where the shard has room."""
        for shard in self.shards:
            count = (len(shard) - 1) // self.T
            if index < count:
                start = min(index * self.T + phase, len(shard) - self.T - 1)
                return torch.from_numpy(shard[start : start + self.T + 1].astype(np.int64))
            index -= count

    def spread(self, n, rows):
        """Of n windows spread evenly over the split, those of `rows` [rows, T + 1]."""
        return torch.stack([self.window(row * self.n // n) for row in rows]).to(device)

    def batch(self, rows):
        """Rows of training, counted from its start: each epoch visits every window once, in new order, at a
        new phase [rows, T + 1]."""
        out = []
        for row in rows:
            epoch, i = divmod(row, self.n)
            if epoch != self.epoch:
                rng = np.random.default_rng([s.seed, epoch])
                self.epoch, self.order, self.phase = epoch, rng.permutation(self.n), int(rng.integers(self.T))
            out.append(self.window(int(self.order[i]), self.phase))
        return torch.stack(out).to(device)


share = batch_size // world  # sequences of this process
micro = s.micro_batch_size or max(1, share)
if batch_size % (world * micro):
    fitting = max(1, batch_size // (world * micro)) * world * micro
    sys.exit(f"batch_size {batch_size} is not a multiple of {world} x {micro} sequences; {fitting} would be")

# ------------------------------------------------------------------------------------------------------------
# Model

vocab_size = source.config.vocab_size if source else math.ceil(meta["vocab_size"] / 64) * 64  # faster
with told("there is no such model"):
    config = FlashSTUConfig(vocab_size=vocab_size, **{name: getattr(s, name) for name in model_fields})
    windows = {split: Windows(split, T) for split in shards}
    if s.window_size > s.seq_len:
        raise ValueError(f"window_size {s.window_size} is larger than seq_len {s.seq_len}")
    with torch.device("meta"):  # without memory, to see what it will need
        model = FlashSTU(config)

# Memory, about: weights, gradients, moments; and what the layers keep of a token for the backward pass
n_params, d = sum(p.numel() for p in model.parameters()), config.n_embd
kept = d * (20 + 4 * config.mlp_scale) / (config.n_layers if config.use_gradient_checkpointing else 1) + 2 * d
needed = (16 * n_params / (world if sharded else 1) + 4 * micro * T * config.n_layers * kept) / 2**30
pages = getattr(os, "sysconf", lambda _: 2**20)  # Windows does not say
available = pages("SC_PHYS_PAGES") * pages("SC_PAGE_SIZE") / 2**30
if device.type == "cuda":
    available = torch.cuda.mem_get_info(device)[0] / 2**30
say(f"{n_params / 1e6:.2f}M parameters, {vocab_size * d / 1e6:.2f}M of them the embedding of "
    f"{meta['tokenizer']}, about {needed:.1f} GiB; {world} x {device.type}, {s.dtype}")  # fmt: skip
if needed > available and device.type != "meta":
    sys.exit(f"{micro} sequences do not fit into {available:.1f} GiB: give a smaller --micro_batch_size")
if device.type == "meta":
    sys.exit()
torch.manual_seed(s.seed)
engine = model = FlashSTU(config)  # on the CPU: the same weights whatever the device
if source:
    with told(
        f"the weights of {source_folder} do not fit {' '.join(f'--{k} {v}' for k, v in given.items())}"
    ):
        model.load_state_dict(source.state_dict())
    words = ", ".join(f"{name} {getattr(s, name)}" for name in presets["small"] if name in taken)
    say(f"from {source_folder}: the weights, {words}; from the command: {', '.join(given)}")
model.to(device)


def evaluate(n):
    """Mean loss (nats a token) on at most n windows spread evenly over the validation split."""
    n = min(n, windows["val"].n)
    total, mine = torch.zeros(2, device=device), range(n)[rank::world]  # of losses, of windows
    model.eval()
    for i in range(0, math.ceil(n / world), micro):  # every process makes the same number of calls
        rows = mine[i : i + micro]
        x = windows["val"].spread(n, rows or [0])
        with torch.no_grad(), autocast:
            loss = engine(x, labels=x).loss
        total += torch.stack([loss * len(rows), torch.tensor(len(rows), device=device)])
    if world > 1:
        dist.all_reduce(total)
    model.train()
    return (total[0] / total[1]).item()


# ------------------------------------------------------------------------------------------------------------
# Instead of training: judge. Texts far longer than seq_len are read with the state carried on, and with parts
# of it forgotten every seq_len tokens: the difference is what that memory is worth


@torch.no_grad()
def bits_by_position(texts, n, forget):
    """Bits per byte at each position of n texts; `forget` is done to the state every T tokens."""
    total = torch.zeros(texts.T)
    for i in range(0, n, micro):
        x, state, losses = texts.spread(n, range(n)[i : i + micro]), None, []
        for inputs, targets in zip(x[:, :-1].split(T, dim=1), x[:, 1:].split(T, dim=1)):
            state = state and forget(state)
            for part, labels in zip(inputs.split(256, dim=1), targets.split(256, dim=1)):  # few logits
                with autocast:
                    _, logits, state = model(part, state=state, use_cache=True)
                logits = logits.float().transpose(1, 2)  # [B, V, 256]
                losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none").sum(0))
        total += torch.cat(losses).cpu()
    return total / n * bits_per_byte


if s.eval_only:
    loss, texts = evaluate(windows["val"].n), Windows("val", min(s.eval_length * T, longest))
    n, words = min(s.eval_sequences, texts.n), f"{windows['val'].n} windows of {T}"
    say(f"{s.data}: loss {loss:.4f}, {loss * bits_per_byte:.4f} bits per byte in {words}")
    spectral = [i for i, layer in enumerate(model.layers) if isinstance(layer.mixer, STU)]
    ways = {
        "state carried": lambda state: state,
        "all reset": lambda state: None,
        "STU reset": lambda state: [None if i in spectral else part for i, part in enumerate(state)],
    }
    say(f"{f'{n} texts of {texts.T}':<24}" + "".join(f"{name:>16}" for name in ways))
    model.eval()
    bits = [bits_by_position(texts, n, forget) for forget in ways.values()]
    edges, points = [0, *(64 * 2**i for i in range(24) if 64 * 2**i < texts.T), texts.T], []
    for a, b in pairwise(edges):
        points.append([(f"{a}-{b}", way[a:b].mean().item()) for way in bits])
        say(f"{f'{a}-{b}':<24}" + "".join(f"{value:>16.4f}" for _, value in points[-1]))
    lines = [(line, {"label": name, "marker": "."}) for name, line in zip(ways, zip(*points))]
    draw("context.png", lines, xlabel=f"position in the text (seq_len {T})", ylabel="bits per byte")
    sys.exit()

# ------------------------------------------------------------------------------------------------------------
# Engine and optimizer

if sharded:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(torch.bfloat16 if s.dtype == "bfloat16" else None, torch.float32)
    mesh = dist.device_mesh.init_device_mesh(device.type, (world,))
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
elif world > 1:
    ids = [local_rank] if device.type == "cuda" else None
    engine = torch.nn.parallel.DistributedDataParallel(model, device_ids=ids)
if s.compile == "true" or (s.compile == "auto" and device.type == "cuda"):
    for layer in model.layers:
        layer.compile()

# Muon orthogonalises each step of a matrix; embeddings, norms and the filter weights are no such matrices
named = model.layers.named_parameters() if s.optimizer == "muon" else ()
matrices = [p for n, p in named if p.ndim == 2 and "M_filters" not in n]
rest = [p for p in model.parameters() if p not in set(matrices)]
decayed, others = [p for p in rest if p.ndim >= 2], [p for p in rest if p.ndim < 2]
groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
options = {"betas": (0.9, 0.95), "weight_decay": s.weight_decay, "fused": device.type != "mps"}
optimizers = [torch.optim.AdamW(groups, lr=s.lr, **options)]
if matrices:
    optimizers.append(torch.optim.Muon(matrices, lr=s.muon_lr, weight_decay=s.weight_decay))
peaks = [(group["lr"], group["weight_decay"]) for o in optimizers for group in o.param_groups]

# ------------------------------------------------------------------------------------------------------------
# Go on from the last checkpoint. It is one file whatever the engine: a run of N processes resumes on M

owner = lock(run) if main else None  # as long as this process lives
start_step, saved = 0, None if s.fresh else load_checkpoint(run)
full = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)  # whole, on the main process's CPU
contents = f"{meta['sources']} ({zlib.crc32(json.dumps([meta['train'], meta['val']]).encode()):08x})"
if saved:
    before = saved["settings"] | saved["config"] | {"data": saved["data"]}
    now = config.to_dict() | {name: getattr(s, name) for name in ("optimizer", "seed", "batch_size")}
    free = {"use_gradient_checkpointing", "d_in_tile", "d_out_tile"}  # the results are the same
    for name, value in (now | {"data": contents}).items():
        if before.get(name) != value and name not in free:
            sys.exit(f"{run} was trained with another {name}: {before.get(name)!r}, now {value!r}; "
                     "choose another --out_dir, or --fresh to start again")  # fmt: skip
    start_step = saved["step"]
    if start_step > s.steps:
        sys.exit(f"{run} is already at step {start_step}: give more --steps, or --fresh to start again")
    states = {"model_state_dict": saved["model"], "optim_state_dict": saved["optimizer"]}
    state_dict.set_state_dict(model, optimizers, **states, options=full)
    if saved["scaler"]:  # empty unless the run was in float16
        scaler.load_state_dict(saved["scaler"])
    say(f"continuing {run} after step {start_step}")
if world > 1:
    found = [None] * world
    dist.all_gather_object(found, start_step)
    if len(set(found)) > 1:
        sys.exit(f"the processes found different checkpoints, {found}: is {run} on a file system they share?")

log_path = run / "log.jsonl"
if main:
    text = json.dumps({"settings": vars(s), "model": config.to_dict()}, indent=1)
    write_atomically(run / "config.json", lambda f: f.write(text.encode()))
    records = read_log(run) if saved and log_path.exists() else []
    records = [r for r in records if r["step"] <= start_step - ("val_loss" in r)]  # the others come again
    lines = "".join(json.dumps(record) + "\n" for record in records)
    write_atomically(log_path, lambda f: f.write(lines.encode()))


def log(step, **record):
    if main:
        with open(log_path, "a") as f:
            f.write(json.dumps({"step": step, **record}) + "\n")


# ------------------------------------------------------------------------------------------------------------
# Training

asked_to_stop = []
for signum in (signal.SIGTERM, signal.SIGINT):
    signal.signal(signum, lambda *_: asked_to_stop.append(1))
skipped, in_a_row, save_due, rate, t_log, tokens_log = 0, 0, False, 1.0, time.time(), 0
model.train()

for step in range(start_step, s.steps + 1):
    last = step == s.steps
    evaluating = last or step % s.eval_interval == 0
    if evaluating:
        loss, norm, stopping = evaluate(s.eval_sequences), 0.0, False
        say(f"step {step}: validation loss {loss:.4f}, {loss * bits_per_byte:.4f} bits per byte")
        log(step, val_loss=loss, val_bits_per_byte=loss * bits_per_byte)

    if not last:  # the gradient
        torch.manual_seed(s.seed + 1000003 * step + rank)  # dropout too is a function of the step
        first = step * batch_size + rank * share
        rows = windows["train"].batch(range(first, first + share))
        stopping = asked_to_stop or (world > 1 and os.getppid() != parent)  # torchrun is dead
        status = torch.tensor([0.0, bool(stopping)], device=device)  # loss; is any process to stop?
        for i, x in enumerate(rows.split(micro)):
            sync = (i + 1) * micro == share  # accumulate locally, exchange gradients once
            if sharded:
                model.set_requires_gradient_sync(sync)
            engine.require_backward_grad_sync = sync  # what DDP's no_sync() sets
            with autocast:
                loss = engine(x, labels=x).loss * (micro / share)
            scaler.scale(loss).backward()
            status[0] += loss.detach() / world
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip)
        norm = (norm.full_tensor() if sharded else norm).item()
        if world > 1:
            dist.all_reduce(status)
        loss, stopping = status.tolist()
        tokens_log += batch_size * T
    finite = math.isfinite(loss) and math.isfinite(norm)

    # Save, then show. Only weights that gave a finite loss and gradient are saved
    save_due = step > start_step and (save_due or last or stopping or step % s.checkpoint_interval == 0)
    if finite and save_due:
        save_due = False
        weights, moments = state_dict.get_state_dict(model, optimizers, options=full)  # by all together
        state = {
            "step": step, "model": weights, "optimizer": moments, "scaler": scaler.state_dict(),
            "config": config.to_dict(), "data": contents, "settings": vars(s),
        }  # fmt: skip
        if main:
            write_atomically(run / f"checkpoint_{step}.pt", lambda f, state=state: torch.save(state, f))
            kept = [n for n, _ in checkpoints(run) if n <= step][-2:]
            for path in (path for n, path in checkpoints(run) if n not in kept):
                try:
                    path.unlink()  # older; or beyond this step: damaged, or of a run that --fresh replaced
                except OSError as e:
                    say(f"cannot delete it: {e}", stream=sys.stderr)
    if evaluating:
        whole = model
        if sharded:
            weights = state_dict.get_model_state_dict(model, options=full)
            whole = FlashSTU(config).to(device)
            if main:
                whole.load_state_dict(weights)
        say(s.prompt, end="")
        if main:
            generator = torch.Generator(device).manual_seed(s.seed)
            with torch.compiler.set_stance("force_eager"):  # each length would be one more graph
                write(whole, s.prompt, 400 if last else 80, generator)
        t_log, tokens_log = time.time(), 0
    if last or (stopping and finite):
        break

    factor = min(1, (step + 1) / max(1, s.warmup_steps))
    if step >= s.warmup_steps:
        done = (step - s.warmup_steps) / max(1, s.steps - s.warmup_steps)
        shape = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "none": 1}[s.decay]
        factor = s.min_lr + (1 - s.min_lr) * shape
    param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group, (lr, weight_decay) in zip(param_groups, peaks):  # of this command, not of the checkpoint
        group["lr"], group["weight_decay"] = lr * factor, weight_decay
    skipped, in_a_row = skipped + (not finite), 0 if finite else in_a_row + 1
    if finite:
        for optimizer in optimizers:
            scaler.step(optimizer)
    else:
        say(f"step {step + 1}: loss {loss}, gradient norm {norm}: step skipped ({skipped} so far)")
        if in_a_row >= s.max_skipped:
            break
    scaler.update()
    for optimizer in optimizers:
        optimizer.zero_grad()

    if (step + 1) % s.log_interval == 0:
        lr, rate = s.lr * factor, tokens_log / (time.time() - t_log) or rate
        left = (s.steps - step - 1) * batch_size * T / rate
        say(f"step {step + 1}/{s.steps}: loss {loss:.4f}, lr {lr:.1e}, grad norm {norm:.2f}, "
            f"{rate:,.0f} tokens/s, {left / 60:.1f} min left")  # fmt: skip
        log(step + 1, loss=loss, lr=lr, grad_norm=norm, tokens_per_second=rate, skipped=skipped)
        t_log, tokens_log = time.time(), 0

if not finite:
    good = checkpoints(run)[-1][1] if checkpoints(run) else "none"
    sys.exit(f"the loss or its gradient is not finite. Last good checkpoint: {good}; a lower --lr may help")
if last and main:  # a folder for from_pretrained, and for transformers
    with told(f"cannot write {run / 'model'}", ". The checkpoint is intact"):
        whole.save_pretrained(run / "model")
    say(f"{run / 'model'} is ready for FlashSTU.from_pretrained")
if not last:
    say(f"asked to stop: saved after step {step}; the same command continues")
if main:
    draw_losses([run])
if world > 1:
    dist.destroy_process_group()
    if not main:  # its work is done; gloo's threads, still closing connections, can abort a normal exit
        sys.stdout.flush()
        os._exit(0)
