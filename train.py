"""
Train a Flash STU language model: one CPU, one GPU, or many.

    python train.py                              a small hybrid on Python's own source code, minutes on a CPU
    torchrun --nproc_per_node=2 train.py         the same on two processes; --engine fsdp shards the model
    python train.py --preset 125M --data data/fineweb-edu-o200k_base --out_dir runs/125M
    python train.py --sample "def "              write from the run's last checkpoint

Every setting below is a flag: --name value. The run folder holds config.json, log.jsonl, checkpoints and
loss.png, and is all that is needed to go on: the same command again continues where it stopped, bit for bit.
"""

import argparse
import difflib
import json
import math
import os
import signal
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from prepare_data import get_tokenizer, prepare, write_atomically
from stu import FlashSTU, FlashSTUConfig

# ------------------------------------------------------------------------------------------------------------
# Settings

settings = {
    # run
    "out_dir": "runs/default",  # the run folder
    "data": "data/stdlib",  # a folder made by prepare_data.py; the default is made when it is missing
    "preset": "small",
    "sample": "",  # a prompt: write from the run's last checkpoint instead of training
    "draw": "",  # run folders, separated by commas: draw their losses to out_dir/loss.png instead of training
    "seed": 1,
    "fresh": False,  # start again even where the run folder has a checkpoint
    # model: any field of FlashSTUConfig; these differ from its defaults
    "n_embd": 192,
    "n_layers": 6,
    "n_heads": 6,
    "seq_len": 256,
    "window_size": 64,
    "mlp_scale": 2.75,
    "softcap": 0.0,
    "torch_dtype": "float32",  # master weights; what is computed in is `dtype`
    # work
    "steps": 400,
    "batch_size": 16,  # sequences a step, over all processes
    "micro_batch_size": 0,  # sequences a process holds at once; 0: its whole share
    "eval_interval": 100,  # steps
    "eval_sequences": 64,
    "log_interval": 10,
    "prompt": "def ",  # of the samples written at each evaluation
    "checkpoint_interval": 100,
    # optimizer
    "optimizer": "muon",  # muon: for the matrices, AdamW for the rest; adamw: for all
    "muon_lr": 0.01,
    "lr": 0.01,  # AdamW's
    "weight_decay": 0.1,
    "warmup_steps": 20,
    "decay": "cosine",  # or linear, from the peak to min_lr times the peak; none
    "min_lr": 0.05,
    "grad_clip": 1.0,
    "max_skipped": 5,  # so many steps in a row with a loss or gradient that is not finite end the run
    # machine
    "device": "auto",  # cuda, mps or cpu; meta: run one step without memory, to try a preset's shapes
    "dtype": "auto",  # autocast: bfloat16 on CUDA (float16 with a scaler on old GPUs), float32 elsewhere
    "compile": "auto",  # on CUDA
    "engine": "ddp",  # or fsdp, with more than one process
    "wandb": "",  # a Weights & Biases project
}
presets = {
    "small": {},
    "125M": {"n_embd": 768, "n_layers": 12, "n_heads": 12, "seq_len": 2048, "num_eigh": 24, "mlp_scale": 3.0,
             "batch_size": 256, "micro_batch_size": 16, "steps": 20000, "warmup_steps": 500},
    "350M": {"n_embd": 1024, "n_layers": 24, "n_heads": 16, "seq_len": 4096, "num_eigh": 32, "mlp_scale": 3.0,
             "batch_size": 128, "micro_batch_size": 4, "steps": 30000, "warmup_steps": 1000},
    "1B": {"n_embd": 2048, "n_layers": 32, "n_heads": 32, "seq_len": 8192, "num_eigh": 48, "mlp_scale": 2.0,
           "batch_size": 128, "micro_batch_size": 1, "steps": 50000, "warmup_steps": 2000,
           "use_gradient_checkpointing": True, "engine": "fsdp"},
}  # fmt: skip
for preset in ("125M", "350M", "1B"):
    presets[preset] |= {"window_size": 1024, "eval_interval": 500, "checkpoint_interval": 500}

# every field of the model may be set too, with FlashSTUConfig's own default unless it is in the list above
model_fields = [f.name for f in fields(FlashSTUConfig) if f.name != "vocab_size"]
known = {f.name: f.default for f in fields(FlashSTUConfig) if f.name in model_fields} | settings
choices = {
    "preset": list(presets), "optimizer": ["muon", "adamw"], "decay": ["cosine", "linear", "none"],
    "engine": ["ddp", "fsdp"], "compile": ["auto", "true", "false"],
    "dtype": ["auto", "float32", "bfloat16", "float16"],
}  # fmt: skip


def boolean(text):
    return {"true": True, "1": True, "false": False, "0": False}[text.lower()]


as_written = argparse.RawDescriptionHelpFormatter
parser = argparse.ArgumentParser(
    usage="train.py [--name value ...]", description=__doc__, formatter_class=as_written, allow_abbrev=False
)
for name, value in known.items():
    kind = {bool: boolean, float: float, str: str}.get(type(value), int)
    flag = {"nargs": "?", "const": True} if kind is boolean else {"choices": choices.get(name)}
    parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=f"default: {value!r}", **flag)
given, unknown = parser.parse_known_args()
given = vars(given)
if unknown:
    near = difflib.get_close_matches(unknown[0].strip("-").partition("=")[0].replace("-", "_"), known, 1)
    advice = f"did you mean --{near[0]}?" if near else "--help lists them"
    parser.error(f"unknown setting {unknown[0]}; {advice}")
preset = given.get("preset", settings["preset"])
s = {**settings, **presets[preset], **given}
for name in ("steps", "batch_size", "eval_interval", "eval_sequences", "log_interval", "checkpoint_interval"):
    if s[name] < 1:
        parser.error(f"--{name} must be at least 1, got {s[name]}")
run = Path(s["out_dir"])
if s["sample"]:  # the run folder is all that is needed
    if not (run / "config.json").exists():
        parser.error(f"{run} holds no run to write from: train first, or give --out_dir")
    found = json.loads((run / "config.json").read_text())["settings"]
    s = {**found, "dtype": "auto", "device": "auto", **given}
model_settings = {k: v for k, v in s.items() if k in model_fields}


def draw_losses(folders):
    """Each run's losses by step, training (pale) and validation, from its log.jsonl to out_dir/loss.png."""
    try:
        import matplotlib
    except ImportError:
        return print("no loss.png: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    (figure, axis), late = plt.subplots(figsize=(7, 4), layout="constrained"), []
    for i, folder in enumerate(map(Path, folders)):
        if not (folder / "log.jsonl").exists():
            sys.exit(f"{folder} holds no log.jsonl: it is not the folder of a run")
        records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for key, style in (("loss", {"alpha": 0.2}), ("val_loss", {"label": folder.name, "marker": "."})):
            points = [(r["step"], r[key]) for r in records if key in r]
            axis.plot(*zip(*points), color=f"C{i}", **style) if points else None
            late += [loss for step, loss in points if step >= records[-1]["step"] / 10]
    axis.set_ylim(min(late), max(late)) if len(set(late)) > 1 else None  # where they fall fastest is cut off
    axis.set(xlabel="step", ylabel="loss (nats per token)", title="validation (dots) and training (pale)")
    axis.legend(), axis.grid(alpha=0.3)
    run.mkdir(parents=True, exist_ok=True)
    figure.savefig(run / "loss.png", dpi=110), plt.close(figure)


if s["draw"]:
    draw_losses(s["draw"].split(","))
    sys.exit()

# ------------------------------------------------------------------------------------------------------------
# Machine: processes, device, precision

rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
local_rank, main = int(os.environ.get("LOCAL_RANK", "0")), rank == 0
device = s["device"]
if device == "auto":
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
if device == "cuda":
    if not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here; --device cpu would work")
    device = f"cuda:{local_rank}"
device = torch.device(device)
if device.type == "cuda":
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
if world > 1:
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
if s["dtype"] == "auto":
    s["dtype"] = "float32"
    if device.type == "cuda":
        s["dtype"] = "bfloat16" if torch.cuda.is_bf16_supported(False) else "float16"
autocast = nullcontext()
if s["dtype"] != "float32":
    autocast = torch.autocast(device.type, dtype=getattr(torch, s["dtype"]))
scaler = torch.amp.GradScaler(device.type, init_scale=2.0**12, enabled=s["dtype"] == "float16")


def say(*args, **kwargs):
    if main:
        print(*args, **kwargs, flush=True)


def stop(message):
    if main:
        print(message, file=sys.stderr, flush=True)
    if world > 1:
        dist.destroy_process_group()
    sys.exit(1)


# ------------------------------------------------------------------------------------------------------------
# Data: the batch of step i is a pure function of the seed and i, whatever the number of processes

if s["data"] == settings["data"] and main and not s["sample"]:
    prepare(out=s["data"])
if world > 1:
    dist.barrier()
data = Path(s["data"])
if not (data / "meta.json").exists():
    stop(f"{data} holds no meta.json: make it with  python prepare_data.py YOUR_FILES --out {data}")
meta = json.loads((data / "meta.json").read_text())
if not meta["complete"]:
    stop(f"{data} is only half prepared: the same prepare_data.py command continues where it stopped")
tokenizer = get_tokenizer(meta["tokenizer"])
fingerprint = {k: meta[k] for k in ("sources", "tokenizer", "vocab_size", "train", "val")}
T, batch_size = s["seq_len"], s["batch_size"]


class Windows:
    """All windows of T + 1 tokens of a split, addressed by position; the shards stay on disk."""

    def __init__(self, split):
        self.shards = [np.load(data / shard["file"], mmap_mode="r") for shard in meta[split]["shards"]]
        self.counts = [(len(shard) - 1) // T for shard in self.shards]
        self.n = sum(self.counts)
        if not self.n:
            tokens = max(map(len, self.shards))
            stop(f"the {split} split holds {tokens} tokens in its largest shard: seq_len {T} needs {T + 1}")
        self.epoch = -1

    def window(self, index, phase=0):
        """Window `index` of the n that tile the split, shifted by `phase` tokens where the shard has room."""
        for shard, count in zip(self.shards, self.counts):
            if index < count:
                start = min(index * T + phase, len(shard) - T - 1)
                return torch.from_numpy(shard[start : start + T + 1].astype(np.int64))
            index -= count

    def batch(self, step, rows):
        """Rows of the batch of `step`: each epoch visits every window once, in new order, at a new phase."""
        out = []
        for row in rows:
            epoch, i = divmod(step * batch_size + row, self.n)
            if epoch != self.epoch:
                rng = np.random.default_rng([s["seed"], epoch])
                self.epoch, self.order, self.phase = epoch, rng.permutation(self.n), int(rng.integers(T))
            out.append(self.window(int(self.order[i]), self.phase))
        return torch.stack(out)  # [rows, T + 1]


if batch_size % world:
    fitting = max(1, batch_size // world) * world
    stop(f"batch_size {batch_size} does not divide over {world} processes; {fitting} would")
share = batch_size // world
micro = s["micro_batch_size"] or share
if micro > share or share % micro:
    fitting = max(m for m in range(1, min(micro, share) + 1) if share % m == 0)
    stop(f"micro_batch_size {micro} does not divide a process's {share} sequences a step; {fitting} would")
train_windows, val_windows = Windows("train"), Windows("val")

# ------------------------------------------------------------------------------------------------------------
# Model, engine, optimizer

vocab_size = meta["vocab_size"] if meta["vocab_size"] <= 256 else -(-meta["vocab_size"] // 64) * 64
if isinstance(s["window_size"], int) and s["window_size"] > T:
    stop(f"window_size {s['window_size']} is larger than seq_len {T}; give --window_size {T} or less")
try:
    config = FlashSTUConfig(vocab_size=vocab_size, **model_settings)
except ValueError as e:
    stop(str(e))
torch.manual_seed(s["seed"])
with torch.device(device if device.type == "meta" else "cpu"):  # the same weights whatever the device
    model = FlashSTU(config).to(device)
n_params = sum(p.numel() for p in model.parameters())


def flops_per_token():
    """Training FLOPs a token, forward and backward: 6 for each weight of a matrix, attention over the window,
    and the three FFTs of each STU channel (5/2 n log2 n for a real FFT of n = 2T points), counted from the
    modules."""
    total = 6 * sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    for layer in model.layers:
        if hasattr(layer.mixer, "window"):
            total += 12 * config.n_embd * min(layer.mixer.window, T / 2)
        else:
            total += 3 * 3 * 2.5 * 2 * math.log2(2 * T) * layer.mixer.d_out
    return total


def memory_estimate(micro):
    """Bytes in training: weights, gradients, optimizer state, and what a micro-batch keeps to go back."""
    size = 4 if s["dtype"] == "float32" else 2
    d, hidden = config.n_embd, int(config.n_embd * config.mlp_scale)
    per_layer = d * (2 * size if config.use_gradient_checkpointing else 14 * size + 24) + 4 * hidden * size
    activations = micro * T * (per_layer * config.n_layers + 8 * d)
    logits = 8 * min(2**26, micro * T * vocab_size)
    return 16 * n_params / (world if s["engine"] == "fsdp" else 1) + activations + logits


available = math.inf
if device.type == "cuda":
    available = torch.cuda.mem_get_info(device)[0]
elif device.type == "cpu" and hasattr(os, "sysconf"):  # not on Windows
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
size, gib = f"{n_params / 1e6:.2f}M parameters, {config.n_layers} layers", memory_estimate(micro) / 2**30
machine = f"{world} x {device.type}, {s['dtype']}"
say(f"{size}, {flops_per_token() / 1e6:.1f} MFLOP a token, about {gib:.1f} GiB; {machine}")
if memory_estimate(micro) > available:
    fits = [m for m in range(1, min(micro, 4096)) if share % m == 0 and memory_estimate(m) <= available]
    advice = f"--micro_batch_size {max(fits)} would" if fits else "a smaller model is needed"
    stop(f"{micro} sequences at once do not fit into {available / 2**30:.1f} GiB; {advice}")

if device.type == "meta":
    tokens = torch.zeros(micro, T + 1, dtype=torch.long, device=device)
    model(tokens, labels=tokens).loss.backward()
    sys.exit()
engine = model
if world > 1 and s["engine"] == "fsdp":
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy()
    if s["dtype"] == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = dist.device_mesh.init_device_mesh(device.type, (world,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
elif world > 1:
    ids = [local_rank] if device.type == "cuda" else None
    engine = torch.nn.parallel.DistributedDataParallel(model, device_ids=ids)
if s["compile"] == "true" or (s["compile"] == "auto" and device.type == "cuda"):
    warnings.filterwarnings("ignore", message="Torchinductor does not support code generation for complex")
    for layer in model.layers:
        layer.compile()

# Muon orthogonalises each step of a matrix; embeddings, norms and the filter weights are no such matrices
matrices = [p for n, p in model.layers.named_parameters() if p.ndim == 2 and "M_filters" not in n]
if s["optimizer"] == "adamw":
    matrices = []
chosen = set(map(id, matrices))
rest = [p for p in model.parameters() if id(p) not in chosen]
groups = [
    {"params": [p for p in rest if p.ndim >= 2], "weight_decay": s["weight_decay"]},
    {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
]
optimizers = [torch.optim.AdamW(groups, lr=s["lr"], betas=(0.9, 0.95), fused=device.type != "mps")]
if matrices:
    optimizers.append(torch.optim.Muon(matrices, lr=s["muon_lr"], weight_decay=s["weight_decay"]))
peaks = [(group["lr"], group["weight_decay"]) for o in optimizers for group in o.param_groups]


def lr_factor(step):
    if step < s["warmup_steps"]:
        return (step + 1) / s["warmup_steps"]
    done = (step - s["warmup_steps"]) / max(1, s["steps"] - s["warmup_steps"])
    shape = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "none": 1}[s["decay"]]
    return s["min_lr"] + (1 - s["min_lr"]) * shape


# ------------------------------------------------------------------------------------------------------------
# Checkpoints: whole or not there. One file whatever the engine, so that of N processes resumes on M. The last
# two are kept

log_path, full = run / "log.jsonl", StateDictOptions(full_state_dict=True, cpu_offload=True)


def step_of(checkpoint):
    return int(checkpoint.stem.split("_")[1])


def checkpoints():
    return sorted(run.glob("checkpoint_*.pt"), key=step_of)


def save_checkpoint(step):
    model_state, optimizer_state = get_state_dict(model, optimizers, options=full)  # all processes together
    if main:
        run.mkdir(parents=True, exist_ok=True)
        state = {
            "step": step, "model": model_state, "optimizer": optimizer_state, "scaler": scaler.state_dict(),
            "config": config.to_dict(), "data": fingerprint, "settings": s,
        }  # fmt: skip
        write_atomically(run / f"checkpoint_{step}.pt", lambda f: torch.save(state, f))
        kept = [p for p in checkpoints() if step_of(p) <= step][-2:]
        for other in set(checkpoints()) - set(kept):
            other.unlink()  # one beyond this step is damaged, or of a run that --fresh has replaced
    if world > 1:
        dist.barrier()


def load_checkpoint():
    """The newest checkpoint that is whole, or None."""
    for path in reversed(checkpoints()):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as e:  # noqa: BLE001
            say(f"{path} is damaged ({type(e).__name__}); trying the one before it", file=sys.stderr)


start_step, indifferent = 0, ("use_gradient_checkpointing", "d_in_tile", "d_out_tile")
saved = None if s["fresh"] else load_checkpoint()
if saved:
    for what, now in (("model", config.to_dict()), ("data", fingerprint)):
        before = saved["config" if what == "model" else "data"]
        for key in now:
            if before.get(key) != now[key] and key not in indifferent:
                stop(f"{run} was trained with another {what} ({key}: {before.get(key)!r}, now {now[key]!r}): "
                     f"choose another --out_dir, or --fresh to start again")  # fmt: skip
    states = {"model_state_dict": saved["model"], "optim_state_dict": saved["optimizer"]}
    set_state_dict(model, optimizers, **states, options=StateDictOptions(full_state_dict=True))
    scaler.load_state_dict(saved["scaler"])
    start_step = saved["step"]
    if not s["sample"]:
        say(f"continuing {run} after step {start_step}")
    if start_step > s["steps"]:
        stop(f"{run} is already at step {start_step}: give more --steps, or --fresh to start again")
if world > 1:
    found = [None] * world
    dist.all_gather_object(found, start_step)
    if len(set(found)) > 1:
        stop(f"the processes found different checkpoints, {found}: is {run} on a file system they share?")


# ------------------------------------------------------------------------------------------------------------
# Sampling and evaluation


def write(prompt, max_new_tokens, temperature=0.8, top_k=50):
    """Print the prompt and its continuation as it is generated; a sharded model is gathered first."""
    writer = model
    if engine is model and world > 1:
        weights, _ = get_state_dict(model, [], options=full)
        if main:
            writer = FlashSTU(config).to(device)
            writer.load_state_dict(weights)
    if not main:
        return
    tokens = tokenizer.encode(prompt).astype(np.int64).tolist() or [meta["eot"]]
    ids = torch.tensor([tokens], device=next(writer.parameters()).device)
    generator = torch.Generator(ids.device).manual_seed(s["seed"])
    print(prompt, end="")
    shown, new = "", []
    options = {"temperature": temperature, "top_k": top_k, "stop_token": meta["eot"], "generator": generator}
    with torch.compiler.set_stance("force_eager"):  # each length would be one more graph
        for token in writer.stream(ids, max_new_tokens, **options):
            new.append(int(token))
            text = tokenizer.decode(t for t in new if t != meta["eot"])
            if not text.endswith("\ufffd"):  # a character may take several tokens
                print(text[len(shown) :], end="", flush=True)
                shown = text
    print("\n")


@torch.no_grad()
def evaluate():
    """Mean loss (nats a token) on eval_sequences windows spread evenly over the validation split."""
    model.eval()
    n = min(s["eval_sequences"], val_windows.n)
    mine = list(range(n))[rank::world]
    total = torch.zeros(2, dtype=torch.float64)
    for i in range(0, -(-n // world), micro):  # every process makes the same number of calls
        rows = mine[i : i + micro] or [0]
        x = torch.stack([val_windows.window(r * val_windows.n // n) for r in rows]).to(device)
        with autocast:
            loss = engine(x, labels=x).loss.item()
        if mine[i : i + micro]:
            total += torch.tensor([loss * len(rows), len(rows)])
    if world > 1:
        total = total.to(device) if device.type == "cuda" else total
        dist.all_reduce(total)
    model.train()
    return (total[0] / total[1]).item()


def bits_per_byte(loss):
    return loss / math.log(2) * meta["val"]["tokens"] / meta["val"]["bytes"]


if s["sample"]:
    if not saved:
        stop(f"{run} holds no checkpoint to write from: train first, or give --out_dir")
    write(s["sample"], 500)
    sys.exit()

# ------------------------------------------------------------------------------------------------------------
# Training

run.mkdir(parents=True, exist_ok=True)
if main:
    text = json.dumps({"settings": s, "model": config.to_dict()}, indent=1)
    write_atomically(run / "config.json", lambda f: f.write(text.encode()))
    if log_path.exists():  # forget what came after the checkpoint, and a line that was cut off
        lines = [line for line in log_path.read_text().splitlines(True) if line.endswith("}\n")]
        lines = [line for line in lines if json.loads(line)["step"] <= start_step - ("val_loss" in line)]
        write_atomically(log_path, lambda f: f.write("".join(lines if saved else []).encode()))
wandb = None
if s["wandb"] and main:
    import wandb

    wandb.init(project=s["wandb"], name=run.name, config=s, resume="allow")


def log(step, **record):
    if main:
        with open(log_path, "a") as f:
            f.write(json.dumps({"step": step, **record}) + "\n")
    if wandb:
        wandb.log(record, step=step)


asked_to_stop = []
for signum in (signal.SIGTERM, signal.SIGINT):
    signal.signal(signum, lambda *_: asked_to_stop.append(1))
peak = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12, "L40": 181e12, "B200": 2250e12}
name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
peak_flops = next((v for k, v in peak.items() if k in name), None)  # dense 16-bit
flops, skipped, skipped_in_row, t_log, tokens_log = flops_per_token(), 0, 0, time.time(), 0
model.train()

for step in range(start_step, s["steps"] + 1):
    last = step == s["steps"]
    if step % s["eval_interval"] == 0 or last:
        loss = evaluate()
        say(f"step {step}: validation loss {loss:.4f}, {bits_per_byte(loss):.4f} bits per byte")
        log(step, val_loss=loss, val_bits_per_byte=bits_per_byte(loss))
        write(s["prompt"], 400 if last else 80)
        t_log, tokens_log = time.time(), 0
    if (step % s["checkpoint_interval"] == 0 and step > start_step) or last:
        save_checkpoint(step)
    if last:
        break

    factor = lr_factor(step)
    param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group, (lr, weight_decay) in zip(param_groups, peaks):  # of this command, not of the checkpoint
        group["lr"], group["weight_decay"] = lr * factor, weight_decay
    torch.manual_seed(s["seed"] + 1000003 * step + rank)  # dropout too is a function of the step
    rows = train_windows.batch(step, range(rank * share, (rank + 1) * share)).to(device)
    loss = torch.zeros((), device=device)
    for i, x in enumerate(rows.split(micro)):
        sync = i == share // micro - 1  # accumulate locally, exchange gradients once
        if world > 1 and s["engine"] == "fsdp":
            model.set_requires_gradient_sync(sync)
        with engine.no_sync() if world > 1 and s["engine"] == "ddp" and not sync else nullcontext(), autocast:
            micro_loss = engine(x, labels=x).loss * (micro / share)
            scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s["grad_clip"])
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    status = torch.stack([loss / world, torch.tensor(float(bool(asked_to_stop)), device=device)])
    if world > 1:
        dist.all_reduce(status)
    loss, stopping, norm = status[0].item(), bool(status[1] > 0), norm.item()
    if math.isfinite(loss) and math.isfinite(norm):
        for optimizer in optimizers:
            scaler.step(optimizer)
        skipped_in_row = 0
    else:
        skipped, skipped_in_row = skipped + 1, skipped_in_row + 1
        say(f"step {step + 1}: loss {loss}, gradient norm {norm}: step skipped ({skipped} so far)")
        if skipped_in_row >= s["max_skipped"]:
            good = checkpoints()[-1] if checkpoints() else "none"
            stop(f"{skipped_in_row} such steps in a row. Last good checkpoint: {good}; a lower --lr may help")
    scaler.update()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    tokens_log += batch_size * T

    if (step + 1) % s["log_interval"] == 0 or stopping:
        rate = tokens_log / (time.time() - t_log)
        left = (s["steps"] - step - 1) * batch_size * T / rate
        lr = s["lr"] * factor
        mfu = f", MFU {flops * rate / peak_flops / world:.1%}" if peak_flops else ""
        rest = f"{rate:,.0f} tokens/s{mfu}, {left / 60:.1f} min left" + f", {skipped} skipped" * bool(skipped)
        say(f"step {step + 1}/{s['steps']}: loss {loss:.4f}, lr {lr:.1e}, grad norm {norm:.2f}, {rest}")
        log(step + 1, loss=loss, lr=lr, grad_norm=norm, tokens_per_second=rate, skipped=skipped)
        t_log, tokens_log = time.time(), 0
    if stopping:
        save_checkpoint(step + 1)
        say(f"asked to stop: saved after step {step + 1}; the same command continues")
        break

if not asked_to_stop:  # a folder for from_pretrained, and for transformers
    weights, _ = get_state_dict(model, [], options=full)
    if main:
        finished = FlashSTU(config)
        finished.load_state_dict(weights)
        finished.save_pretrained(run / "model")
        say(f"{run / 'model'} is ready for FlashSTU.from_pretrained")
if main:
    draw_losses([run])
if world > 1:
    dist.destroy_process_group()
    if not main:  # its work is done; gloo's threads, still closing connections, can abort a normal exit
        sys.stdout.flush(), os._exit(0)
