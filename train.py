"""Train a Flash STU language model, write with it, judge it: one CPU, one GPU, or many.

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
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import distributed as dist
from torch.distributed.checkpoint import state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lds import picture
from prepare_data import get_tokenizer, lock, open_data, prepare, told, write_atomically
from stu import STU, FlashSTU, FlashSTUConfig

# ---- Settings, each a flag: its default (of several the first), range (of a text: of its length), meaning
ANY, POSITIVE, AT_LEAST_0, AT_LEAST_1 = (-1e300, 1e300), (1e-12, 1e300), (0, 1e300), (1, 1e300)
comments = dict(re.findall(r"(\w+): .*  # (.*)", inspect.getsource(FlashSTUConfig)))
model_fields = FlashSTUConfig(torch_dtype="float32", softcap=0.0).to_dict()
model_fields.pop("vocab_size")
table = {name: (value, ANY, comments.get(name, "")) for name, value in model_fields.items()}
table |= {
    "out_dir": ("runs/default", AT_LEAST_1, "the run folder"),
    "data": ("data/stdlib", AT_LEAST_1, "a folder of prepare_data.py; the default makes itself"),
    "preset": (("small", "125M", "350M", "1B"), ANY, "sizes and schedule; with o200k_base 235M, 495M, 1.6B"),
    "init_from": ("", AT_LEAST_1, "start from the weights and sizes of a run or of a saved model"),
    "fresh": (False, ANY, "start again; the run's checkpoints are replaced when the new ones are saved"),
    "seed": (1, (0, 2**32 - 1), "of the weights, the order of the data, dropout and sampling"),
    "sample": ("", AT_LEAST_1, "instead of training, continue this text; @FILE: the text of a file"),
    "chat": (False, ANY, "continue each line you type, from all that was before; an empty line goes on"),
    "eval_only": (False, ANY, "instead: the loss, also by position, on the validation split or a text file"),
    "draw": ("", AT_LEAST_1, "run folders, separated by commas: their losses in one picture"),
    "temperature": (0.8, AT_LEAST_0, "of sampling; 0 takes the likeliest token"),
    "top_k": (50, AT_LEAST_0, "sample from so many of the likeliest tokens; 0 from all"),
    "top_p": (1.0, (1e-9, 1), "sample from the likeliest tokens that together have this probability"),
    "max_new_tokens": (500, AT_LEAST_1, "of a sample or an answer"),
    "num_samples": (1, AT_LEAST_1, "of one prompt"),
    "steps": (400, AT_LEAST_1, "of the whole run"),
    "batch_size": (16, AT_LEAST_1, "sequences a step, over all processes"),
    "micro_batch_size": (0, AT_LEAST_0, "sequences a process holds at once; 0: its whole share"),
    "eval_interval": (100, AT_LEAST_1, "steps from one evaluation to the next"),
    "eval_sequences": (64, AT_LEAST_1, "of the validation split, in an evaluation"),
    "eval_length": (16, AT_LEAST_1, "of the texts of eval_only, in units of seq_len"),
    "prompt": ("def ", ANY, "of the sample written at each evaluation"),
    "log_interval": (10, AT_LEAST_1, "steps a line"),
    "checkpoint_interval": (100, AT_LEAST_1, "steps from one checkpoint to the next"),
    "optimizer": (("muon", "adamw"), ANY, "Muon for the layers' matrices, AdamW for the rest, or for all"),
    "muon_lr": (0.01, POSITIVE, "Muon's learning rate"),
    "lr": (0.01, POSITIVE, "AdamW's learning rate"),
    "weight_decay": (0.1, AT_LEAST_0, "times the learning rate"),
    "warmup_steps": (20, AT_LEAST_0, "in which the learning rates rise"),
    "decay": (("cosine", "linear", "none"), ANY, "of the learning rates, from the warmup to the last step"),
    "min_lr": (0.05, (0, 1), "where the decay ends, times the learning rates"),
    "grad_clip": (1.0, POSITIVE, "the norm that a longer gradient is cut to"),
    "max_skipped": (5, AT_LEAST_1, "steps in a row without a finite loss and gradient end the run"),
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

# ---- The command, and the machine: processes, device, precision
rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
local_rank, main, parent = int(os.environ.get("LOCAL_RANK", "0")), rank == 0, os.getppid()
for stream in filter(None, (sys.stdin, sys.stdout)):
    stream.reconfigure(errors="backslashreplace")
sys.excepthook = lambda kind, error, trace: (
    print(f"stopped: {str(error) or 'as asked'}", file=sys.stderr)  # a file that cannot be read or written: its name, and why
    if issubclass(kind, (OSError, KeyboardInterrupt)) else sys.__excepthook__(kind, error, trace)
)  # fmt: skip
parser = argparse.ArgumentParser(usage="train.py [--name value ...]", description=__doc__, allow_abbrev=False)
parser.formatter_class, parser.argument_default = argparse.RawDescriptionHelpFormatter, argparse.SUPPRESS
defaults = {name: v[0] if isinstance(v, tuple) else v for name, (v, *_) in table.items()} | presets["small"]
switch = {"type": str.lower, "choices": ("true", "false", "1", "0"), "nargs": "?", "const": "true"}
for name, (value, _, meaning) in table.items():
    kind, meaning = int if value is None else type(value), f"{meaning} (default: {defaults[name]})"
    options = {bool: switch, tuple: {"choices": value}}.get(kind, {"type": kind})
    parser.add_argument(f"--{name}", help=meaning.replace("%", "%%"), **options)
given = vars(parser.parse_args())  # what the command says; the rest are defaults
for name, value in given.items():
    size, (low, high) = len(value) if isinstance(value, str) else value, table[name][1]
    if not low <= size <= high:  # nan lies nowhere
        wanted = "not be empty" if value == "" else f"lie between {low} and {high}, got {value}"
        parser.error(f"--{name} must {wanted}")
    if isinstance(table[name][0], bool):
        given[name] = value in ("true", "1")
s = argparse.Namespace(**(defaults | presets[given.get("preset", "small")] | given))
s.prompt = os.fsencode(s.prompt).decode(errors="replace")
run, log_path = Path(s.out_dir), Path(s.out_dir) / "log.jsonl"
reading = s.sample or s.chat or s.eval_only or s.draw
if reading and world > 1:
    parser.error("one process writes, judges or draws: start it without torchrun")
sharded = world > 1 and s.engine == "fsdp"
accelerator = torch.accelerator.current_accelerator(check_available=True) or "cpu"
device = torch.device({"auto": accelerator, "meta": "cpu"}.get(s.device, s.device))
with told(f"torch cannot use --device {device}", ". --device cpu would work"):
    if device.type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        if s.dtype == "auto":
            s.dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    torch.zeros(1, device=device)
if world > 1:
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
s.dtype = "float32" if s.dtype == "auto" else s.dtype
autocast = torch.autocast(device.type, getattr(torch, s.dtype), enabled=s.dtype != "float32")
generator = torch.Generator(device).manual_seed(s.seed)  # of sampling
scaler = torch.amp.GradScaler(device.type, init_scale=2.0**12, enabled=s.dtype == "float16")

# ---- What is done in several places: to print, write a text, keep a folder, read data, judge


def say(text, end="\n"):
    """Print, on the main process, control characters as \\x1b; that nobody reads it ends no training."""
    text = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text) + end
    with suppress(OSError):
        if main and sys.stdout:
            os.write(sys.stdout.fileno(), text.encode(sys.stdout.encoding, "backslashreplace"))


def write(model, text, max_new_tokens, state):
    """Print what follows the text, as it comes. The list `state` is where it begins, then where it ended."""
    tokens = tokenizer.encode(text).tolist() or ([] if state else [tokenizer.eot])  # of a document before
    ids, pending = torch.tensor([tokens], dtype=torch.long, device=device), []
    options = s.temperature, s.top_k, s.top_p, tokenizer.eot, generator, state
    try:
        for token in model.stream(ids, max_new_tokens, *options):
            pending += token.tolist()
            text = tokenizer.decode(pending)
            if not text.endswith("\ufffd") or len(pending) == 4:  # else the last character may be incomplete
                say(text, end="")
                pending = []
    except ValueError as e:  # weights that are not finite
        say(f"({e})", end="")
    say(tokenizer.decode(pending))


def checkpoints(folder):
    """{step: path} of each, oldest first. A file of another name is not ours."""
    names = os.listdir(folder) if folder.exists() else []
    ours = (re.fullmatch(r"checkpoint_(0|[1-9][0-9]*)\.pt", name) for name in names)
    return dict(sorted((int(name[1]), folder / name[0]) for name in ours if name))


def load_checkpoint(folder):
    """The newest whole checkpoint, and its model; or None. What cannot be read is not damaged."""
    for step, path in reversed(checkpoints(folder).items()):
        mapped = os.fsencode(path) == str(path).encode(errors="replace")  # torch maps files named in UTF-8
        try:
            damaged = zipfile.ZipFile(path).testzip()  # each part has a checksum
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            sizes = {k: v for k, v in saved["config"].items() if v or k in model_fields}  # older ones too
            with torch.device("meta"):
                whole = FlashSTU(FlashSTUConfig(**sizes))
            whole.load_state_dict(saved["model"], assign=True)
            right = not damaged and saved["step"] == step and {"scaler", "settings", "log"} <= saved.keys()
            if right and saved["optimizer"]["state"].keys() == saved["model"].keys():
                return saved | {"whole": whole}
            raise ValueError(f"a part is missing, or not what was written: {damaged}")
        except OSError:
            raise
        except Exception as e:  # noqa: BLE001
            say(f"{path} is damaged ({e!r}); trying the one before it")
    if checkpoints(folder):
        sys.exit(f"no checkpoint in {folder} is whole: restore one from a copy, or --fresh to start again")


def read_log(folder):
    """The records of log.jsonl; a line that is none, cut off or damaged, is skipped."""
    for line in (folder / "log.jsonl").read_text("utf-8", "replace").splitlines():
        with suppress(Exception):
            record = json.loads(line)
            if all(isinstance(value, (int, float)) for value in (record["step"], *record.values())):
                yield record


def log(step, **record):
    """Print it, and append it to log.jsonl."""
    say(f"step {step}: " + ", ".join(f"{name} {value:.6g}" for name, value in record.items()))
    if main:
        with open(log_path, "a") as f:
            f.write(json.dumps({"step": step, **record}) + "\n")


def draw(name, lines, **labels):  # lines: each its points and its style
    run.mkdir(parents=True, exist_ok=True)
    with picture(run / name, 8, 4) as figure:
        axis = figure.subplots()
        for points, style in lines:
            axis.plot(*zip(*points), **style)
        axis.set(**labels)
    say(f"the picture: {run / name}")


def draw_losses(folders):  # of each run, but for the first fifth
    lines = []
    for i, folder in enumerate(folders):
        records, dots = list(read_log(folder)), {"marker": ".", "label": ascii(folder.name)[1:-1]}
        records = [r for r in records if r["step"] >= records[-1]["step"] / 5]
        for key, n, style in (("loss", 1 + len(records) // 10, {"alpha": 0.4}), ("val_loss", 1, dots)):
            points = np.reshape([(r["step"], r[key]) for r in records if key in r], (-1, 2))
            points = points[: len(points) // n * n].reshape(-1, n, 2).mean(1)  # of n neighbours
            lines.append((points, {"color": f"C{i}", **style}))
    draw("loss.png", lines, title="Loss, nats per token: dots validation, pale training", xlabel="step")


def tile(split, T, most=2**62):
    """Shard and start [n, 2] of the windows of T + 1 tokens that tile a split, or of so many of them."""
    starts = [np.arange(0, len(shard) - T, T) for shard in shards[split]]
    number = np.repeat(np.arange(len(starts)), [len(a) for a in starts])
    n = min(len(number), most)
    if n == 0:
        sys.exit(f"no shard of the {split} split holds the {T + 1} tokens that seq_len {T} needs")
    return np.stack([number, np.concatenate(starts)], 1)[np.arange(n) * len(number) // n]


def read(split, places, T):
    """The windows that start there, or earlier where the shard ends too soon [rows, T + 1]."""
    starts = [(shards[split][i], min(start, len(shards[split][i]) - T - 1)) for i, start in places]
    rows = [shard[start : start + T + 1].astype(np.int64) for shard, start in starts]
    return torch.from_numpy(np.stack(rows)).to(device)


@torch.no_grad()
def evaluate(places):
    """Mean loss (nats a token) of these windows of the validation split."""
    total = torch.zeros((), device=device)
    model.eval()
    for i in range(0, len(places), world * micro):  # every process makes the same number of calls
        mine = places[i : i + world * micro][rank::world]
        x = read("val", mine if len(mine) else places[:1], T)
        with autocast:
            total += engine(x, labels=x).loss * (len(mine) / len(places))
    if world > 1:
        dist.all_reduce(total)
    model.train(not reading)
    return total.item()


@torch.no_grad()
def bits_by_position(texts, length, forgotten):
    """Bits per byte at each position of the texts; these layers' states are forgotten every T tokens."""
    total = torch.zeros(length)
    for rows in np.array_split(texts, math.ceil(len(texts) / micro)):
        x, state, losses = read("val", rows, length), None, []
        for inputs, targets in zip(x[:, :-1].split(T, dim=1), x[:, 1:].split(T, dim=1)):
            state = state and [None if i in forgotten else part for i, part in enumerate(state)]
            for part, labels in zip(inputs.split(256, dim=1), targets.split(256, dim=1)):  # few logits
                with autocast:
                    _, logits, state = model(part, state=state, use_cache=True)
                logits = logits.float().transpose(1, 2)  # [B, V, 256]
                losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none").sum(0))
        total += torch.cat(losses).cpu()
    return total / len(texts) * bits_per_byte


# ---- Instead of training: draw, write
if s.draw:
    draw_losses([Path(folder) for folder in s.draw.split(",")])
    sys.exit()
source, source_folder = None, Path(s.init_from or s.out_dir)
if s.init_from or reading:
    saved = load_checkpoint(source_folder)
    with told(f"{source_folder} holds no checkpoint and no model of ours"):
        source = saved["whole"] if saved else FlashSTU.from_pretrained(source_folder)
        sizes = {256: "bytes", 50304: "gpt2", 200064: "o200k_base"}
        vocabulary = sizes[math.ceil(source.config.vocab_size / 64) * 64]
    taken = {k: getattr(source.config, k) for k in model_fields if k not in ("torch_dtype", *given)}
    vars(s).update(taken)
if s.sample or s.chat:
    model, tokenizer, state = source.to(device).eval(), get_tokenizer(vocabulary), []
    text = Path(s.sample[1:]).read_bytes() if s.sample.startswith("@") else os.fsencode(s.sample)
    text = text.decode(errors="replace")
    for _ in range(s.num_samples if text else 0):
        say(text, end="")
        write(model, text, s.max_new_tokens, state := [])
    with suppress(EOFError, KeyboardInterrupt):
        while s.chat:
            write(model, input("> "), s.max_new_tokens, state)
    sys.exit()

# ---- Data: the batch of step i is a pure function of the seed and i, whatever the number of processes.
# Windows do not end with a document, and the next one sees it
if s.data == "data/stdlib":
    prepare(out=s.data)  # by one process; the others wait
if s.eval_only and Path(s.data).is_file():
    text = Path(s.data).read_bytes()
    shards = {"val": [get_tokenizer(vocabulary).encode(text.decode(errors="replace"))]}
    meta = {"tokenizer": vocabulary, "val": {"tokens": len(shards["val"][0]), "bytes": len(text)}}
else:
    meta, shards = open_data(s.data)
if source and meta["tokenizer"] != vocabulary:
    sys.exit(
        f"{source_folder} reads {vocabulary}, {s.data} holds {meta['tokenizer']}: see prepare_data.py --help"
    )
tokenizer = get_tokenizer(meta["tokenizer"])
bits_per_byte = meta["val"]["tokens"] / max(1, meta["val"]["bytes"]) / math.log(2)  # times nats per token
longest = max(map(len, shards["val"])) - 1
T = max(1, min(s.seq_len, longest) if s.eval_only else s.seq_len)
windows = {split: tile(split, T) for split in shards}
batch_size, share = s.batch_size, s.batch_size // world  # of all processes, of this one
micro = s.micro_batch_size or share
if batch_size % world:
    sys.exit(f"--batch_size {batch_size} is not a multiple of the {world} processes")

# ---- Model, engine, optimizer
vocab_size = source.config.vocab_size if source else math.ceil(meta["vocab_size"] / 64) * 64  # faster
with told("there is no such model"):
    config = FlashSTUConfig(vocab_size=vocab_size, **{name: getattr(s, name) for name in model_fields})
    if s.window_size > s.seq_len:
        raise ValueError(f"window_size {s.window_size} is larger than seq_len {s.seq_len}")
    with torch.device("meta"):  # without memory; later it shows what was trained
        whole = FlashSTU(config)

# Memory, about: weights, gradients, moments; and what the layers keep of a token for the backward pass
n_params, d = sum(p.numel() for p in whole.parameters()), config.n_embd
kept = d * (20 + 4 * config.mlp_scale) / (config.n_layers if config.use_gradient_checkpointing else 1) + 2 * d
needed = int(16 * n_params / (world if sharded else 1) + 4 * micro * T * config.n_layers * kept)
say(f"{n_params / 1e6:.2f}M parameters, {vocab_size * d / 1e6:.2f}M of them the embedding of "
    f"{meta['tokenizer']}, about {needed / 2**30:.1f} GiB; {world} x {device.type}, {s.dtype}")  # fmt: skip
if s.device == "meta":
    sys.exit()
with told(f"{micro} sequences do not fit into memory: give a smaller --micro_batch_size"):
    torch.empty(needed, dtype=torch.uint8, device=device)
torch.manual_seed(s.seed)
engine = model = FlashSTU(config)  # on the CPU: the same weights whatever the device
if source:
    with told(f"the weights of {source_folder} do not fit the settings {given}"):
        model.load_state_dict(source.state_dict())
    say(f"from {source_folder}: the weights, {taken}; from the command: {', '.join(given)}")
model.to(device)
if sharded:
    policy = MixedPrecisionPolicy(torch.bfloat16 if s.dtype == "bfloat16" else None, torch.float32)
    mesh = dist.device_mesh.init_device_mesh(device.type, (world,))
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
elif world > 1:
    engine = torch.nn.parallel.DistributedDataParallel(model)
if s.compile == "true" or (s.compile == "auto" and device.type == "cuda"):
    for layer in model.layers:
        layer.compile()
# Muon orthogonalises each step of a matrix; embeddings, norms and the filter weights are no such matrices
named = model.layers.named_parameters() if s.optimizer == "muon" else ()
matrices = [p for n, p in named if p.ndim == 2 and "M_filters" not in n]
rest = [p for p in model.parameters() if p not in set(matrices)]
groups = [{"params": [p for p in rest if p.ndim >= 2], "weight_decay": s.weight_decay}]
groups += [{"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}]
optimizers = [torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.95), fused=device.type != "mps")]
if matrices:
    optimizers.append(torch.optim.Muon(matrices, lr=s.muon_lr, weight_decay=s.weight_decay))
peaks = [(group["lr"], group["weight_decay"]) for o in optimizers for group in o.param_groups]

# ---- Judge. Instead of training, texts far longer than seq_len are read with the state carried on, and with
# parts of it forgotten every seq_len tokens: the difference is what that memory is worth
if s.eval_only:
    say(f"{s.data}: {len(windows['val'])} windows of {T} tokens")
    loss, length = evaluate(windows["val"]), min(s.eval_length * T, longest)
    say(f"loss {loss:.4f}, {loss * bits_per_byte:.4f} bits per byte. By position:")
    spectral = [i for i, layer in enumerate(model.layers) if isinstance(layer.mixer, STU)]
    ways = {"state carried": (), "all reset": range(config.n_layers), "STU reset": spectral}
    edges, lines = [0, *(64 * 2**i for i in range(24) if 64 * 2**i < length), length], []
    for name, forgotten in ways.items():
        bits = bits_by_position(tile("val", length, s.eval_sequences), length, forgotten)
        means = [(f"{a}-{b}", bits[a:b].mean().item()) for a, b in pairwise(edges)]
        say(f"{name}: " + ", ".join(f"{span} {mean:.4f}" for span, mean in means))
        lines.append((means, {"label": name, "marker": "."}))
    title, where = "What a memory is worth, far past seq_len", f"position in the text (seq_len {T})"
    draw("context.png", lines, title=title, xlabel=where, ylabel="bits per byte")
    sys.exit()

# ---- Go on from the last checkpoint. It is one file whatever the engine: a run of N processes resumes on M
owner = lock(run) if main else None  # as long as this process lives
saved, start_step = None if s.fresh else load_checkpoint(run), 0
full = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)  # whole, on the main process's CPU
s.text = f"{meta['sources']} ({zlib.crc32(json.dumps([meta['train'], meta['val']]).encode()):08x})"
if saved:
    before, start_step = saved["settings"], saved["step"]
    free = {"use_gradient_checkpointing", "d_in_tile", "d_out_tile"}  # the results are the same
    for name in [*(model_fields.keys() - free), "text", "optimizer", "seed", "batch_size"]:
        if before.get(name) != (value := getattr(s, name)):
            sys.exit(f"{run} had {name}: {before.get(name)!r}, now {value!r}; choose another --out_dir")
    if start_step > s.steps:
        sys.exit(f"{run} is already at step {start_step}: give more --steps, or --fresh to start again")
    states = {"model_state_dict": saved["model"], "optim_state_dict": saved["optimizer"]}
    state_dict.set_state_dict(model, optimizers, **states, options=full)
    scaler.load_state_dict(saved["scaler"] or scaler.state_dict())  # empty unless it was in float16
    say(f"continuing {run} after step {start_step}")
if main:
    text = json.dumps({"settings": vars(s), "model": config.to_dict()}, indent=1)
    write_atomically(run / "config.json", lambda f: f.write(text.encode()))
    with open(log_path, "a") as f:  # what came after the checkpoint comes again
        f.truncate(min(saved["log"], f.tell()) if saved else 0)

# ---- Training
asked_to_stop = []
for signum in (signal.SIGTERM, signal.SIGINT):
    signal.signal(signum, lambda *_: asked_to_stop.append(1))
skipped, in_a_row, epoch, n_windows = 0, 0, -1, len(windows["train"])
for step in range(start_step, s.steps + 1):
    last, began = step == s.steps, time.time()
    torch.manual_seed(s.seed + 1000003 * step + rank)  # dropout too is a function of the step
    stopping = asked_to_stop or (world > 1 and os.getppid() != parent)  # torchrun is dead
    status = torch.tensor([0.0, bool(stopping), start_step / world], device=device)  # summed over processes
    places = []
    for row in range(step * batch_size + rank * share, step * batch_size + (rank + 1) * share):
        if row // n_windows != epoch:  # each visits every window once, in new order, shifted by a new phase
            epoch = row // n_windows
            rng = np.random.default_rng([s.seed, epoch])
            order = rng.permutation(windows["train"]) + [0, rng.integers(T)]
        places.append(order[row % n_windows])
    pieces = read("train", places, T).split(micro)
    for i, x in enumerate(pieces):
        engine.require_backward_grad_sync = i == len(pieces) - 1  # DDP exchanges the sum of the gradients
        with autocast:
            loss = engine(x, labels=x).loss * (len(x) / share)
        scaler.scale(loss).backward()
        status[0] += loss.detach() / world
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip)
    norm = (norm.full_tensor() if sharded else norm).item()
    if world > 1:
        dist.all_reduce(status)
    loss, stopping, start = status.tolist()
    if abs(start - start_step) > 0.1:
        sys.exit(f"the processes found different checkpoints in {run}: is it on a file system they share?")
    finite = math.isfinite(loss) and math.isfinite(norm)

    # Save, then show. Only weights that gave a finite loss and gradient are saved
    if finite and step > start_step and (last or stopping or step % s.checkpoint_interval == 0):
        weights, moments = state_dict.get_state_dict(model, optimizers, options=full)  # by all together
        if main:
            state = {"step": step, "model": weights, "optimizer": moments, "scaler": scaler.state_dict(),
                "config": config.to_dict(), "settings": vars(s), "log": log_path.stat().st_size}  # fmt: skip
            write_atomically(run / f"checkpoint_{step}.pt", lambda f, state=state: torch.save(state, f))
            kept = [n for n in checkpoints(run) if n <= step][-2:]
            for path in (path for n, path in checkpoints(run).items() if n not in kept):
                try:
                    path.unlink()  # older; or beyond this step: damaged, or of a run that --fresh replaced
                except OSError as e:
                    say(f"cannot delete it: {e}")
    if last or step % s.eval_interval == 0:
        val_loss = evaluate(tile("val", T, s.eval_sequences))
        log(step, val_loss=val_loss, val_bits_per_byte=val_loss * bits_per_byte)
        weights = state_dict.get_model_state_dict(model, options=full)
        if main:
            whole.load_state_dict(weights, assign=True)
            say(s.prompt, end="")
            write(whole.to(device).eval(), s.prompt, 400 if last else 80, [])
    if last or (stopping and finite):
        break

    rise = min(1, (step + 1) / max(1, s.warmup_steps))
    done = max(0, step - s.warmup_steps) / max(1, s.steps - s.warmup_steps)
    shape = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "none": 1}[s.decay]
    factor = rise * (s.min_lr + (1 - s.min_lr) * shape)
    param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group, (lr, weight_decay) in zip(param_groups, peaks):  # of this command, not of the checkpoint
        group["lr"], group["weight_decay"] = lr * factor, weight_decay
    skipped, in_a_row = skipped + (not finite), 0 if finite else in_a_row + 1
    if not finite:
        say(f"step {step + 1}: loss {loss}, gradient norm {norm}: step skipped ({skipped} so far)")
        if in_a_row >= s.max_skipped:
            break
        model.zero_grad()  # what has no gradient takes no step
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    model.zero_grad()
    if (step + 1) % s.log_interval == 0:
        lr, rate = s.lr * factor, round(batch_size * T / (time.time() - began))
        log(step + 1, loss=loss, lr=lr, grad_norm=norm, tokens_per_second=rate, skipped=skipped)

if not finite:
    sys.exit(f"loss or gradient not finite. Good checkpoints: {[*checkpoints(run)]}; a lower --lr may help")
if last and main:  # a folder for from_pretrained, and for transformers
    with told(f"cannot write {run / 'model'}", ". The checkpoint is intact"):
        whole.save_pretrained(run / "model")
say(f"{run / 'model'} is ready" if last else f"asked to stop: saved after step {step}; start again to go on")
if main:
    draw_losses([run])
if world > 1:
    dist.destroy_process_group()
if not main:  # its work is done; gloo's threads, still closing connections, can abort a normal exit
    os._exit(0)
