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
same command again continues from the last checkpoint, whatever stopped it, and on as many processes bit for bit.
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
import warnings
import zipfile
from contextlib import nullcontext, suppress
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import distributed as dist
from torch.distributed.checkpoint import state_dict

from prepare_data import get_tokenizer, lock, need, open_data, prepare, write_atomically
from stu import FlashSTU, FlashSTUConfig, sample

# ------------------------------------------------------------------------------------------------------------
# Settings: each a flag, --name value. Here its default (of a tuple, the choices: the first), the range of its
# value or of its length, and its meaning

comments = dict(re.findall(r"(\w+): .*  # (.*)", inspect.getsource(FlashSTUConfig)))
model_fields = {f.name: f.default for f in fields(FlashSTUConfig) if f.name != "vocab_size"}
table = {name: (value, "", comments.get(name, "")) for name, value in model_fields.items()}
table |= {
    "softcap": (0.0, "", "of attention logits; 0 turns it off"),
    "torch_dtype": ("float32", "", "of the weights and the optimizer; dtype is what the layers compute in"),
    # run
    "out_dir": ("runs/default", "1", "the run folder"),
    "data": ("data/stdlib", "1", "a folder made by prepare_data.py; the default is made when it is missing"),
    "preset": (("small", "125M", "350M", "1B"), "", "sizes and schedule; named by the size with gpt2's vocabulary"),
    "init_from": (None, "1", "start from the weights and sizes of a run or of a saved model"),
    "fresh": (False, "", "start again; the run's checkpoints are replaced when the new ones are saved"),
    "seed": (1, "0 to 4294967295", "of the weights, the order of the data, dropout and sampling"),
    # instead of training, with the model of init_from or else of the run
    "sample": (None, "1", "continue this text; @FILE: the text of a file"),
    "chat": (False, "", "continue each line you type, from all that was before; an empty line goes on"),
    "eval_only": (False, "", "the loss, and by position, on the validation split of data, or on a text file"),
    "draw": (None, "1", "run folders, separated by commas: their losses in one picture"),
    "temperature": (0.8, "0", "of sampling; 0 takes the likeliest token"),
    "top_k": (50, "0", "sample from so many of the likeliest tokens; 0 from all"),
    "top_p": (1.0, "1e-9 to 1", "sample from the likeliest tokens that together have this probability"),
    "max_new_tokens": (500, "1", "of a sample or an answer"),
    "num_samples": (1, "1", "of one prompt"),
    # work
    "steps": (400, "1", "of the whole run"),
    "batch_size": (16, "1", "sequences a step, over all processes"),
    "micro_batch_size": (0, "0", "sequences a process holds at once; 0: its whole share"),
    "eval_interval": (100, "1", "steps from one evaluation to the next"),
    "eval_sequences": (64, "1", "of the validation split, in an evaluation"),
    "eval_length": (16, "1", "of the texts of eval_only, in units of seq_len"),
    "prompt": ("def ", "", "of the sample written at each evaluation"),
    "log_interval": (10, "1", "steps a line"),
    "checkpoint_interval": (100, "1", "steps from one checkpoint to the next"),
    # optimizer
    "optimizer": (("muon", "adamw"), "", "Muon for the layers' matrices, AdamW for the rest; or AdamW for all"),
    "muon_lr": (0.01, "1e-12", "Muon's learning rate"),
    "lr": (0.01, "1e-12", "AdamW's learning rate"),
    "weight_decay": (0.1, "0", "times the learning rate"),
    "warmup_steps": (20, "0", "in which the learning rates rise"),
    "decay": (("cosine", "linear", "none"), "", "of the learning rates, from the warmup to the last step"),
    "min_lr": (0.05, "0 to 1", "where the decay ends, times the learning rates"),
    "grad_clip": (1.0, "1e-12", "the norm that a longer gradient is cut to"),
    "max_skipped": (5, "1", "steps in a row whose loss or gradient is not finite; then the run ends"),
    # machine
    "device": (("auto", "cuda", "mps", "cpu", "meta"), "", "meta: a step without memory, to try a preset"),
    "dtype": (("auto", "float32", "bfloat16", "float16"), "", "of autocast; auto: 16 bits on CUDA, else 32"),
    "compile": (("auto", "true", "false"), "", "the layers; auto: on CUDA"),
    "engine": (("ddp", "fsdp"), "", "of several processes: each holds the model, or a part of it"),
    "wandb": ("", "", "a Weights & Biases project"),
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
# The command, what is said, the machine

rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
local_rank, main, parent = int(os.environ.get("LOCAL_RANK", "0")), rank == 0, os.getppid()


def say(text, end="\n", stream=None):
    """On the main process. Control characters, at which a terminal acts, are shown as \\x1b. What cannot be
    printed, for lack of a letter or of a reader, never ends the training."""
    text = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text) + end
    stream = stream or sys.stdout
    with suppress(OSError):
        if main and stream:
            os.write(stream.fileno(), text.encode(stream.encoding, "backslashreplace"))


def stop(message):
    say(message, stream=sys.stderr)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(1)


def in_a_sentence(kind, error, trace):
    """A file that cannot be read or written ends the run with its name and the reason."""
    known = issubclass(kind, (OSError, KeyboardInterrupt))
    say(f"stopped: {error or 'interrupted'}", stream=sys.stderr) if known else sys.__excepthook__(kind, error, trace)


sys.excepthook = in_a_sentence
if hasattr(signal, "SIGPIPE"):  # a closed pipe, `| head`, ends in silence all but the training
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
parser = argparse.ArgumentParser(usage="train.py [--name value ...]", description=__doc__, allow_abbrev=False)
parser.formatter_class, parser.argument_default = argparse.RawDescriptionHelpFormatter, argparse.SUPPRESS
for name, (value, _, meaning) in table.items():
    options = {"type": type(value) if value is not None else int if name in model_fields else str}
    if isinstance(value, bool):
        options = {"choices": ("true", "false", "1", "0"), "nargs": "?", "const": "true"}
    if isinstance(value, tuple):
        options, value = {"choices": value}, value[0]
    value = presets["small"].get(name, value)
    parser.add_argument(f"--{name}", help=f"{meaning} (default: {value})".replace("%", "%%"), **options)
given, unknown = parser.parse_known_args()
if unknown:
    near = difflib.get_close_matches(unknown[0].partition("=")[0], [f"--{name}" for name in table], 1)
    parser.error(f"unknown setting {unknown[0]}; " + (f"did you mean {near[0]}?" if near else "see --help"))
given = vars(given)  # what the command says; the rest are defaults
for name, value in given.items():
    low, _, high = table[name][1].partition(" to ")
    if isinstance(table[name][0], bool):
        given[name] = value in ("true", "1")
    elif isinstance(value, str) and low and not value:
        parser.error(f"--{name} must not be empty")
    elif not isinstance(value, str) and not float(low or -1e300) <= value <= float(high or 1e300):  # or nan
        words = f"between {low} and {high}" if high else f"at least {low}, and finite" if low else "finite"
        parser.error(f"--{name} must be {words}, got {value}")
defaults = {name: value[0] if isinstance(value, tuple) else value for name, (value, *_) in table.items()}
s = argparse.Namespace(**(defaults | presets["small"] | presets[given.get("preset", "small")] | given))
run, reading = Path(s.out_dir), s.sample or s.chat or s.eval_only or s.draw
if reading and not main:  # one process does it
    sys.exit()
if reading:
    world = 1
elif hasattr(signal, "SIGPIPE"):
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)

sharded, device = world > 1 and s.engine == "fsdp", s.device
if device == "auto":
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
if device == "cuda" and not torch.cuda.is_available():
    parser.error("--device cuda: torch finds no CUDA device here; --device cpu would work")
device = torch.device(f"cuda:{local_rank}" if device == "cuda" else device)
if device.type == "cuda":
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
# What a run's folder holds: checkpoints, a log


def checkpoints(folder):
    """(step, path) of each, oldest first."""
    names = os.listdir(folder) if folder.exists() else []
    found = (re.fullmatch(r"checkpoint_(0|[1-9][0-9]*)\.pt", name) for name in names)
    return sorted((int(match[1]), folder / match[0]) for match in found if match)


def load_checkpoint(folder):
    """The newest checkpoint that is whole, or None where there is none."""
    for step, path in reversed(checkpoints(folder)):
        mapped = os.fsencode(path) == str(path).encode(errors="replace")  # torch maps files named in UTF-8
        try:
            with open(path, "rb") as f:
                if damaged := zipfile.ZipFile(f).testzip():  # each part has a checksum
                    raise ValueError(f"in {damaged}")
                saved = torch.load(path if mapped else f, map_location="cpu", weights_only=True, mmap=mapped)
            with torch.device("meta"):
                FlashSTU(FlashSTUConfig(**saved["config"])).load_state_dict(saved["model"], assign=True)
            whole = {"scaler", "data", "settings"} <= saved.keys() and saved["step"] == step
            if not whole or saved["optimizer"]["state"].keys() != saved["model"].keys():
                raise ValueError("parts are missing")
            return saved
        except OSError:  # what cannot be read is not damaged
            raise
        except Exception as e:  # noqa: BLE001
            say(f"{path} is damaged ({e!r}); trying the one before it", stream=sys.stderr)
    if checkpoints(folder):
        stop(f"no checkpoint in {folder} is whole: restore one from a copy, or --fresh to start again")


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
    write_atomically(run / name, figure.savefig)
    say(f"the picture: {run / name}")


def draw_losses(folders):
    """Each run's losses by step, training (pale) and validation, from its log.jsonl to out_dir/loss.png."""
    lines, late = [], []
    for i, folder in enumerate(folders):
        records, label = read_log(folder), ascii(folder.name)[1:-1]
        for key, style in (("loss", {"alpha": 0.2}), ("val_loss", {"marker": ".", "label": label})):
            points = [(r["step"], r[key]) for r in records if math.isfinite(r.get(key, math.nan))]
            lines += [(points or [(0, math.nan)], {"color": f"C{i}", **style})]
            late += [loss for step, loss in points if step >= records[-1]["step"] / 10]
    limits = {"ylim": (min(late), max(late))} if len(set(late)) > 1 else {}  # the first tenth may be cut off
    title = "validation (dots) and training (pale)"
    draw("loss.png", lines, xlabel="step", ylabel="loss (nats per token)", title=title, **limits)


# ------------------------------------------------------------------------------------------------------------
# Instead of training: draw, write


@torch.no_grad()
def write(model, text, max_new_tokens, generator, state=None, tokens=()):
    """Print what follows the text, as it comes -> the state and the tokens to go on from."""
    tokens = [*tokens, *tokenizer.encode(os.fsencode(text).decode(errors="replace")).tolist()] or [
        tokenizer.eot
    ]
    was_training, pending = model.training, []
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
    folders = [Path(folder) for folder in s.draw.split(",")]
    if strange := [folder for folder in folders if not (folder / "log.jsonl").exists()]:
        stop(f"{strange[0]} holds no log.jsonl: it is not the folder of a run")
    draw_losses(folders)
    sys.exit()
source, source_folder = None, Path(s.init_from or s.out_dir)
if s.init_from or reading:
    saved = load_checkpoint(source_folder)
    try:  # a run's checkpoint, or what save_pretrained wrote
        folder = source_folder / "model" if (source_folder / "model").is_dir() else source_folder
        source = FlashSTU(FlashSTUConfig(**saved["config"])) if saved else FlashSTU.from_pretrained(folder)
    except (OSError, ValueError) as e:
        stop(f"{source_folder} holds no checkpoint, no run to write from, and no saved model: {e}")
    source.load_state_dict(saved["model"] if saved else source.state_dict())
    size = source.config.vocab_size
    vocabulary = {256: "bytes", 50304: "gpt2", 200064: "o200k_base"}.get(math.ceil(size / 64) * 64)
    if vocabulary is None:
        stop(f"{source_folder} has a vocabulary of {size}, which is that of no tokenizer here")
    taken = {k: v for k, v in source.config.to_dict().items() if k in model_fields and k not in given}
    vars(s).update(taken | {"torch_dtype": s.torch_dtype})  # settings, unless the command says otherwise
if s.sample or s.chat:
    model, tokenizer = source.to(device), get_tokenizer(vocabulary)
    generator = torch.Generator(device).manual_seed(s.seed)
    state, tokens, text = None, [tokenizer.eot], s.sample
    if text and text.startswith("@"):
        text = Path(text[1:]).read_bytes().decode(errors="replace")
    for _ in range(s.num_samples if text else 0):
        say(text, end="")
        state, tokens = write(model, text, s.max_new_tokens, generator)
    while s.chat:
        try:
            state, tokens = write(model, input("> "), s.max_new_tokens, generator, state, tokens)
        except (EOFError, KeyboardInterrupt):
            break
    sys.exit()

# ------------------------------------------------------------------------------------------------------------
# Data: the batch of step i is a pure function of the seed and i, whatever the number of processes

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
if source and meta["tokenizer"] != vocabulary:
    stop(f"{source_folder} reads tokens of {vocabulary}, {s.data} holds those of {meta['tokenizer']}: "
         f"prepare the text again with --tokenizer {vocabulary}")  # fmt: skip
tokenizer, T, batch_size = get_tokenizer(meta["tokenizer"]), s.seq_len, s.batch_size
bits_per_byte = meta["val"]["tokens"] / max(1, meta["val"]["bytes"]) / math.log(2)  # times nats per token


class Windows:
    """The n windows of T + 1 tokens that tile a split."""

    def __init__(self, split, T):
        self.shards, self.T = shards[split], T
        self.counts = [(len(shard) - 1) // T for shard in self.shards]
        self.n, self.epoch = sum(self.counts), -1
        if self.n < 1:
            longest = max(map(len, self.shards))
            stop(f"the {split} split holds {longest} tokens in its largest shard: seq_len {T} needs {T + 1}")

    def window(self, index, phase=0):
        """Window `index`, shifted by `phase` tokens where the shard has room."""
        for shard, count in zip(self.shards, self.counts):
            if index < count:
                start = min(index * self.T + phase, len(shard) - self.T - 1)
                return torch.from_numpy(shard[start : start + self.T + 1].astype(np.int64))
            index -= count

    def batch(self, step, rows):
        """Rows of the batch of `step`: each epoch visits every window once, in new order, at a new phase."""
        out = []
        for row in rows:
            epoch, i = divmod(step * batch_size + row, self.n)
            if epoch != self.epoch:
                rng = np.random.default_rng([s.seed, epoch])
                self.epoch, self.order, self.phase = epoch, rng.permutation(self.n), int(rng.integers(self.T))
            out.append(self.window(int(self.order[i]), self.phase))
        return torch.stack(out).to(device)  # [rows, T + 1]


share = batch_size // world  # sequences of this process
micro = s.micro_batch_size or max(1, share)
if batch_size % (world * micro):
    fitting = max(1, batch_size // (world * micro)) * world * micro
    needed = f"{world} processes x {micro} sequences at once"
    stop(f"batch_size {batch_size} is no multiple of {needed}; {fitting} would be")

# ------------------------------------------------------------------------------------------------------------
# Model

vocab_size = source.config.vocab_size if source else math.ceil(meta["vocab_size"] / 64) * 64  # faster
try:
    config = FlashSTUConfig(vocab_size=vocab_size, **{name: getattr(s, name) for name in model_fields})
    with torch.device("meta"):  # without memory, to see what it will need
        model = FlashSTU(config)
except (ValueError, RuntimeError) as e:
    stop(str(e))
if s.window_size > T:
    stop(f"window_size {s.window_size} is larger than seq_len {T}; give --window_size {T} or less")
n_params, d = sum(p.numel() for p in model.parameters()), config.n_embd

# Training FLOPs a token: 6 for each weight of a matrix, and attention over the window (the FFTs: below 1%)
flops = 6 * sum(p.numel() for p in model.parameters() if p.ndim >= 2)
windows = [layer.mixer.window for layer in model.layers if hasattr(layer.mixer, "window")]
flops += sum(12 * d * min(window, T / 2) for window in windows)

# Memory, about: weights, gradients, optimizer state and logits; and of a sequence what the layers keep for the
# backward pass, with gradient checkpointing one layer at a time, and the input of each
size, kept = 4 if s.dtype == "float32" else 2, 1 if config.use_gradient_checkpointing else config.n_layers
layer = d * (14 * size + 24) + 4 * size * int(d * config.mlp_scale)  # a token
sequence = T * (kept * layer + 2 * size * d * config.n_layers) / 2**30
fixed = (16 * n_params / (world if sharded else 1) + 8 * min(2**26, micro * T * vocab_size)) / 2**30
available = math.inf
if device.type == "cuda":
    available = torch.cuda.mem_get_info(device)[0] / 2**30
elif device.type == "cpu" and hasattr(os, "sysconf"):  # not on Windows
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
say(f"{n_params / 1e6:.2f}M parameters, {vocab_size * d / 1e6:.2f}M of them the embedding of {meta['tokenizer']}; "
    f"{config.n_layers} layers, {flops / 1e6:.1f} MFLOP a token, about {fixed + micro * sequence:.1f} GiB; "
    f"{world} x {device.type}, {s.dtype}")  # fmt: skip
if fixed + micro * sequence > available:
    fits = [m for m in range(1, min(micro, 4096)) if share % m == 0 and fixed + m * sequence <= available]
    advice = f"--micro_batch_size {max(fits)} would" if fits else "a smaller model is needed"
    stop(f"{micro} sequences at once do not fit into {available:.1f} GiB; {advice}")
if device.type == "meta":
    tokens = torch.zeros(micro, T + 1, dtype=torch.long, device=device)
    model(tokens, labels=tokens).loss.backward()
    sys.exit()
torch.manual_seed(s.seed)
engine = model = FlashSTU(config)  # on the CPU: the same weights whatever the device
if source:
    try:
        model.load_state_dict(source.state_dict())
    except RuntimeError:
        sizes = " ".join(f"--{name} {given[name]}" for name in given if name in model_fields)
        stop(f"the weights of {source_folder} do not fit {sizes}: leave the sizes to it")
    words = ", ".join(f"{name} {taken[name]}" for name in taken if taken[name] != defaults[name])
    say(f"from {source_folder}: the weights, {words}; from the command: {', '.join(given)}")
model.to(device)


def evaluate(n):
    """Mean loss (nats a token) on n windows spread evenly over the validation split."""
    total, mine = torch.zeros(2, device=device), range(n)[rank::world]  # of losses, of windows
    model.eval()
    for i in range(0, math.ceil(n / world), micro):  # every process makes the same number of calls
        rows = mine[i : i + micro]
        x = torch.stack([val_windows.window(r * val_windows.n // n) for r in rows or [0]]).to(device)
        with torch.no_grad(), autocast:
            loss = engine(x, labels=x).loss
        total += torch.stack([loss * len(rows), torch.tensor(len(rows), device=device)])
    if world > 1:
        dist.all_reduce(total)
    model.train()
    return (total[0] / total[1]).item()


# ------------------------------------------------------------------------------------------------------------
# Instead of training: judge. Texts far longer than seq_len are read with the state carried on, and with parts
# of it forgotten each seq_len tokens: the difference is what that memory is worth


@torch.no_grad()
def losses_by_position(x, forget):
    """Texts x [B, n + 1] -> the loss of each position, summed over texts [n]."""
    state, losses = None, []
    for inputs, targets in zip(x[:, :-1].split(T, dim=1), x[:, 1:].split(T, dim=1)):
        state = state and forget(state)
        for part, labels in zip(inputs.split(256, dim=1), targets.split(256, dim=1)):  # few logits at once
            _, logits, state = model(part, state=state, use_cache=True)
            logits = logits.float().transpose(1, 2)
            losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none").sum(0))
    return torch.cat(losses).double().cpu()


if s.eval_only:
    val_windows = Windows("val", min(T, max(map(len, shards["val"])) - 1))
    loss = evaluate(val_windows.n)
    say(
        f"{s.data}: loss {loss:.4f}, {loss * bits_per_byte:.4f} bits per byte; in {val_windows.n} windows of {val_windows.T}"
    )
    texts = Windows("val", min(s.eval_length * T, max(map(len, shards["val"])) - 1))
    n = min(s.eval_sequences, texts.n)
    forget = {
        "state carried": lambda state: state,
        "all reset": lambda state: None,
        "STU reset": lambda state: [part if isinstance(part, tuple) else None for part in state],
    }
    losses = dict.fromkeys(forget, 0)
    model.eval()
    for i in range(0, n, micro):
        x = torch.stack([texts.window(r * texts.n // n) for r in range(n)[i : i + micro]]).to(device)
        with autocast:
            losses = {name: losses[name] + losses_by_position(x, forget[name]) for name in forget}
    edges = [0, *(64 * 2**i for i in range(30) if 64 * 2**i < texts.T), texts.T]
    say(
        f"bits per byte by position in {n} texts of {texts.T} tokens"
        + "".join(f"{name:>16}" for name in forget)
    )
    lines = {name: [] for name in forget}
    for a, b in pairwise(edges):
        for name in forget:
            lines[name].append((f"{a}-{b}", losses[name][a:b].mean().item() / n * bits_per_byte))
        say(f"{f'{a}-{b}':<51}" + "".join(f"{line[-1][1]:>16.4f}" for line in lines.values()))
    lines = [(line, {"label": name, "marker": "."}) for name, line in lines.items()]
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
    warnings.filterwarnings("ignore", message="Torchinductor does not support code generation for complex")
    for layer in model.layers:
        layer.compile()

# Muon orthogonalises each step of a matrix; embeddings, norms and the filter weights are no such matrices
named = model.layers.named_parameters() if s.optimizer == "muon" else ()
matrices = [p for n, p in named if p.ndim == 2 and "M_filters" not in n]
rest = [p for p in model.parameters() if p not in set(matrices)]
groups = [
    {"params": [p for p in rest if p.ndim >= 2], "weight_decay": s.weight_decay},
    {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
]
optimizers = [torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.95), fused=device.type != "mps")]
if matrices:
    optimizers.append(torch.optim.Muon(matrices, lr=s.muon_lr, weight_decay=s.weight_decay))
peaks = [(group["lr"], group["weight_decay"]) for o in optimizers for group in o.param_groups]
full = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)  # whole, on the main process's CPU


# ------------------------------------------------------------------------------------------------------------
# Go on from the last checkpoint. It is one file whatever the engine: a run of N processes resumes on M

owner = lock(run) if main else None  # as long as this process lives
start_step, saved = 0, None if s.fresh else load_checkpoint(run)
fingerprint = {key: meta[key] for key in ("sources", "tokenizer", "train", "val")}
if saved:
    now = config.to_dict() | {name: getattr(s, name) for name in ("optimizer", "seed", "batch_size")}
    before, same = (
        saved["settings"] | saved["config"],
        ("use_gradient_checkpointing", "d_in_tile", "d_out_tile"),
    )
    changed = [
        f"{k}: {before.get(k)!r}, now {now[k]!r}" for k in now if before.get(k) != now[k] and k not in same
    ]
    if saved["data"] != fingerprint:
        changed.append(f"other data: {before.get('data')}, now {s.data}, or what it holds")
    if changed:
        stop(
            f"{run} was trained with {'; '.join(changed)}: choose another --out_dir, or --fresh to start again"
        )
    start_step = saved["step"]
    if start_step > s.steps:
        stop(f"{run} is already at step {start_step}: give more --steps, or --fresh to start again")
    states = {"model_state_dict": saved["model"], "optim_state_dict": saved["optimizer"]}
    state_dict.set_state_dict(model, optimizers, **states, options=full)
    if saved["scaler"]:  # empty unless the run was in float16
        scaler.load_state_dict(saved["scaler"])
    say(f"continuing {run} after step {start_step}")
if world > 1:
    found = [None] * world
    dist.all_gather_object(found, start_step)
    if len(set(found)) > 1:
        stop(f"the processes found different checkpoints, {found}: is {run} on a file system they share?")

wandb = need("wandb") if s.wandb and main else None
if wandb:
    wandb.init(project=s.wandb, id=run.name, config=vars(s), resume="allow")
log_path = run / "log.jsonl"
if main:
    text = json.dumps({"settings": vars(s), "model": config.to_dict()}, indent=1)
    write_atomically(run / "config.json", lambda f: f.write(text.encode()))
    records = read_log(run) if saved and log_path.exists() else []
    records = [
        r for r in records if r["step"] <= start_step - ("val_loss" in r)
    ]  # what was after comes again
    lines = "".join(json.dumps(record) + "\n" for record in records)
    write_atomically(log_path, lambda f: f.write(lines.encode()))


def log(step, **record):
    if main:
        try:
            with open(log_path, "a") as f:
                f.write(json.dumps({"step": step, **record}) + "\n")
        except OSError as e:
            stop(f"cannot write {log_path}: {e.strerror}. The last checkpoint is intact")
    if wandb:
        wandb.log(record, step=step)


# ------------------------------------------------------------------------------------------------------------
# Training

asked_to_stop = []
for signum in (signal.SIGTERM, signal.SIGINT):
    signal.signal(signum, lambda *_: asked_to_stop.append(1))
gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
speeds = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12, "L40S": 362e12, "B200": 2250e12}
gpu_flops = next((v for k, v in speeds.items() if k in gpu), None)  # a second, dense 16-bit
train_windows, val_windows = Windows("train", T), Windows("val", T)
skipped, skipped_in_row, save_due, t_log, tokens_log = 0, 0, False, time.time(), 0
model.train()

for step in range(start_step, s.steps + 1):
    last = step == s.steps
    evaluating = last or step % s.eval_interval == 0
    if evaluating:
        t_eval = time.time()
        loss, norm, stopping = evaluate(min(s.eval_sequences, val_windows.n)), 0.0, False
        say(f"step {step}: validation loss {loss:.4f}, {loss * bits_per_byte:.4f} bits per byte")
        log(step, val_loss=loss, val_bits_per_byte=loss * bits_per_byte)
        t_log += time.time() - t_eval

    if not last:  # the gradient
        torch.manual_seed(s.seed + 1000003 * step + rank)  # dropout too is a function of the step
        rows = train_windows.batch(step, range(rank * share, (rank + 1) * share))
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
    finite = math.isfinite(loss) and math.isfinite(norm)

    # Save, then show. Only weights that gave a finite loss and gradient are saved
    save_due = step > start_step and (save_due or last or stopping or step % s.checkpoint_interval == 0)
    if finite and save_due:
        save_due = False
        weights, moments = state_dict.get_state_dict(
            model, optimizers, options=full
        )  # all processes together
        if main:
            state = {
                "step": step, "model": weights, "optimizer": moments, "scaler": scaler.state_dict(),
                "config": config.to_dict(), "data": fingerprint, "settings": vars(s),
            }  # fmt: skip
            write_atomically(run / f"checkpoint_{step}.pt", lambda f, state=state: torch.save(state, f))
            kept = [n for n, _ in checkpoints(run) if n <= step][-2:]
            for n, path in checkpoints(run):
                try:
                    if n not in kept:
                        path.unlink()  # older; or beyond this step: damaged, or of a run that --fresh replaced
                except OSError as e:
                    say(f"cannot delete {path}: {e.strerror}", stream=sys.stderr)
        if world > 1:
            dist.barrier()
    if evaluating:
        t_show, whole = time.time(), model
        if sharded:
            weights = state_dict.get_model_state_dict(model, options=full)  # all processes together
            whole = FlashSTU(config).to(device)
            if main:
                whole.load_state_dict(weights)
        say(s.prompt, end="")
        if main:
            generator = torch.Generator(device).manual_seed(s.seed)
            with torch.compiler.set_stance("force_eager"):  # each length would be one more graph
                write(whole, s.prompt, 400 if last else 80, generator)
        t_log += time.time() - t_show
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
    skipped_in_row = 0 if finite else skipped_in_row + 1
    if finite:
        for optimizer in optimizers:
            scaler.step(optimizer)
    else:
        skipped += 1
        say(f"step {step + 1}: loss {loss}, gradient norm {norm}: step skipped ({skipped} so far)")
        if skipped_in_row >= s.max_skipped:
            break
    scaler.update()
    for optimizer in optimizers:
        optimizer.zero_grad()
    tokens_log += batch_size * T

    if (step + 1) % s.log_interval == 0:
        lr, rate = s.lr * factor, tokens_log / (time.time() - t_log)
        left = (s.steps - step - 1) * batch_size * T / rate
        mfu = f", MFU {flops * rate / gpu_flops / world:.1%}" if gpu_flops else ""
        say(f"step {step + 1}/{s.steps}: loss {loss:.4f}, lr {lr:.1e}, grad norm {norm:.2f}, "
            f"{rate:,.0f} tokens/s{mfu}, {left / 60:.1f} min left")  # fmt: skip
        log(step + 1, loss=loss, lr=lr, grad_norm=norm, tokens_per_second=rate, skipped=skipped)
        t_log, tokens_log = time.time(), 0

if not finite:
    good = checkpoints(run)[-1][1] if checkpoints(run) else "none"
    stop(f"the loss or its gradient is not finite. Last good checkpoint: {good}; a lower --lr may help")
if last and main:  # a folder for from_pretrained, and for transformers
    try:
        whole.save_pretrained(run / "model")
    except Exception as e:  # noqa: BLE001
        stop(f"cannot write {run / 'model'}: {e}. The checkpoint is intact")
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
