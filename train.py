"""
Train a Flash STU language model: one CPU, one GPU, or many.

    python train.py                              a small hybrid on Python's own source code, minutes on a CPU
    torchrun --nproc_per_node=2 train.py         the same on two processes; --engine fsdp shards the model
    python train.py --preset 125M --data data/fineweb-edu-o200k_base --out_dir runs/125M
    python train.py --sample "def "              write from the run's last checkpoint; needs nothing else
    python train.py --draw runs/a,runs/b --out_dir runs    the losses of several runs in one picture

Every setting below is a flag: --name value. The run folder (--out_dir) receives config.json, log.jsonl,
loss.png, checkpoints and the finished model. The same command again continues from the last checkpoint,
whatever stopped it, and on as many processes bit for bit.
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
from torch.distributed.checkpoint import state_dict

from prepare_data import get_tokenizer, prepare, write_atomically
from stu import FlashSTU, FlashSTUConfig

# ------------------------------------------------------------------------------------------------------------
# Settings

defaults = {  # a tuple: the choices, the first is the default
    # run
    "out_dir": "runs/default",  # the run folder
    "data": "data/stdlib",  # a folder made by prepare_data.py; the default is made when it is missing
    "preset": ("small", "125M", "350M", "1B"),
    "sample": "",  # a prompt: write from the run's last checkpoint instead of training
    "draw": "",  # run folders, separated by commas: draw their losses to out_dir/loss.png instead of training
    "seed": 1,
    "fresh": False,  # start again; the folder's checkpoints are replaced when the new run saves its first
    # model: the sizes are the preset's; every other field of FlashSTUConfig is a setting too
    "softcap": 0.0,
    "torch_dtype": "float32",  # of the weights and the optimizer; `dtype` is what the layers compute in
    # work
    "steps": 400,
    "batch_size": 16,  # sequences a step, over all processes
    "micro_batch_size": 0,  # sequences a process holds at once; 0: its whole share
    "eval_interval": 100,  # steps from one evaluation to the next
    "eval_sequences": 64,  # of seq_len tokens of the validation split
    "prompt": "def ",  # of the sample written at each evaluation
    "log_interval": 10,  # steps a line
    "checkpoint_interval": 100,
    # optimizer
    "optimizer": ("muon", "adamw"),  # Muon for the layers' matrices, AdamW for the rest; or AdamW for all
    "muon_lr": 0.01,
    "lr": 0.01,  # AdamW's
    "weight_decay": 0.1,
    "warmup_steps": 20,
    "decay": ("cosine", "linear", "none"),  # from the warmup to the last step, down to min_lr
    "min_lr": 0.05,  # times the learning rates above
    "grad_clip": 1.0,  # the norm that a longer gradient is cut to
    "max_skipped": 5,  # steps in a row whose loss or gradient is not finite; then the run ends
    # machine
    "device": ("auto", "cuda", "mps", "cpu", "meta"),  # meta: a step without memory, to try a preset's shapes
    "dtype": ("auto", "float32", "bfloat16", "float16"),  # of autocast; auto: 16 bits on CUDA, else float32
    "compile": ("auto", "true", "false"),  # auto: on CUDA
    "engine": ("ddp", "fsdp"),  # of several processes: each holds the model, or a part of it
    "wandb": "",  # a Weights & Biases project
}
presets = {  # named by their parameters with the vocabulary of gpt2
    "small": {"n_embd": 192, "n_layers": 6, "n_heads": 6, "seq_len": 256, "window_size": 64,
              "mlp_scale": 2.75},
    "125M": {"n_embd": 768, "n_layers": 12, "n_heads": 12, "seq_len": 2048, "num_eigh": 24, "mlp_scale": 3.0,
             "batch_size": 256, "micro_batch_size": 16, "steps": 20000, "warmup_steps": 500},
    "350M": {"n_embd": 1024, "n_layers": 24, "n_heads": 16, "seq_len": 4096, "num_eigh": 32, "mlp_scale": 3.0,
             "batch_size": 128, "micro_batch_size": 4, "steps": 30000, "warmup_steps": 1000},
    "1B": {"n_embd": 2048, "n_layers": 32, "n_heads": 32, "seq_len": 8192, "num_eigh": 48, "mlp_scale": 2.0,
           "batch_size": 128, "micro_batch_size": 1, "steps": 50000, "warmup_steps": 2000,
           "use_gradient_checkpointing": True, "engine": "fsdp"},
}  # fmt: skip
for large in ("125M", "350M", "1B"):
    presets[large] |= {"window_size": 1024, "eval_interval": 500, "checkpoint_interval": 500}

model_fields = {f.name: f.default for f in fields(FlashSTUConfig) if f.name != "vocab_size"}


def boolean(text):
    return ("false", "0", "true", "1").index(text.lower()) > 1  # ValueError: argparse says what is wrong


parser = argparse.ArgumentParser(usage="train.py [--name value ...]", description=__doc__, allow_abbrev=False)
parser.formatter_class = argparse.RawDescriptionHelpFormatter
for name, value in (model_fields | defaults).items():
    kind = {bool: boolean, float: float, str: str, tuple: str}.get(type(value), int)
    options = {"nargs": "?", "const": True} if kind is boolean else {}
    if isinstance(value, tuple):
        options, value = {"choices": value}, value[0]
    parser.add_argument(f"--{name}", type=kind, default=value, help="default: %(default)s", **options)
parser.set_defaults(**presets["small"])
parser.set_defaults(**presets[parser.parse_known_args()[0].preset])
s, unknown = parser.parse_known_args()
if unknown:
    near = difflib.get_close_matches(unknown[0].partition("=")[0], [f"--{name}" for name in vars(s)], 1)
    parser.error(f"unknown setting {unknown[0]}; " + (f"did you mean {near[0]}?" if near else "see --help"))
intervals = ("eval_interval", "log_interval", "checkpoint_interval")
for name in ("seq_len", "steps", "batch_size", "eval_sequences", *intervals):
    if getattr(s, name) < 1:
        parser.error(f"--{name} must be at least 1, got {getattr(s, name)}")
for name in ("lr", "muon_lr"):
    if getattr(s, name) <= 0:
        parser.error(f"--{name} must be positive, got {getattr(s, name)}")
run = Path(s.out_dir)

# ------------------------------------------------------------------------------------------------------------
# Machine: processes, device, precision

rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
local_rank, main = int(os.environ.get("LOCAL_RANK", "0")), rank == 0
sharded = world > 1 and s.engine == "fsdp"
device = s.device
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


def say(*args, **kwargs):
    if main:
        print(*args, **kwargs, flush=True)


def stop(message):
    say(message, file=sys.stderr)
    if world > 1:
        dist.destroy_process_group()
    sys.exit(1)


# ------------------------------------------------------------------------------------------------------------
# What can be done with a run: draw its losses, write from its last checkpoint


def draw_losses(folders):
    """Each run's losses by step, training (pale) and validation, from its log.jsonl to out_dir/loss.png."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return say("no loss.png: pip install matplotlib")
    figure, late = Figure((7, 4), dpi=110, layout="constrained"), []
    axis = figure.subplots()
    for i, folder in enumerate(map(Path, folders)):
        if not (folder / "log.jsonl").exists():
            stop(f"{folder} holds no log.jsonl: it is not the folder of a run")
        lines = (folder / "log.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines if line.endswith("}")]  # the last may be cut off
        for key, style in (("loss", {"alpha": 0.2}), ("val_loss", {"label": folder.name, "marker": "."})):
            points = [(r["step"], r[key]) for r in records if math.isfinite(r.get(key, math.nan))]
            axis.plot(*zip(*points), color=f"C{i}", **style)
            late += [loss for step, loss in points if step >= records[-1]["step"] / 10]
    if len(set(late)) > 1:  # the first tenth, where they fall fastest, may be cut off
        axis.set_ylim(min(late), max(late))
    axis.set(xlabel="step", ylabel="loss (nats per token)", title="validation (dots) and training (pale)")
    axis.legend()
    axis.grid(alpha=0.3)
    run.mkdir(parents=True, exist_ok=True)
    figure.savefig(run / "loss.png")
    say(f"the picture: {run / 'loss.png'}")


def checkpoints():
    """(step, path) of each, oldest first."""
    return sorted((int(path.stem.split("_")[1]), path) for path in run.glob("checkpoint_*.pt"))


def load_checkpoint():
    """The newest checkpoint that is whole, or None."""
    for _, path in reversed(checkpoints()):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as e:  # noqa: BLE001
            say(f"{path} is damaged ({type(e).__name__}); trying the one before it", file=sys.stderr)


def write(model, tokenizer, prompt, max_new_tokens):
    """Print the prompt and a continuation."""
    tokens = torch.tensor([tokenizer.encode(prompt).tolist() or [tokenizer.eot]], device=device)
    generator = torch.Generator(device).manual_seed(s.seed)
    options = {"temperature": 0.8, "top_k": 50, "stop_token": tokenizer.eot, "generator": generator}
    with torch.compiler.set_stance("force_eager"):  # each length would be one more graph
        tokens = model.generate(tokens, max_new_tokens=max_new_tokens, **options)[0].tolist()
    print(tokenizer.decode(t for t in tokens if t != tokenizer.eot), flush=True)


if s.draw:
    draw_losses(s.draw.split(","))
    sys.exit()
if s.sample:
    saved = load_checkpoint()
    if not saved:
        stop(f"{run} holds no checkpoint, no run to write from: train first, or give --out_dir")
    model = FlashSTU(FlashSTUConfig(**saved["config"])).to(device)
    model.load_state_dict(saved["model"])
    if main:
        write(model, get_tokenizer(saved["data"]["tokenizer"]), s.sample, 500)
    sys.exit()

# ------------------------------------------------------------------------------------------------------------
# Data: the batch of step i is a pure function of the seed and i, whatever the number of processes

if s.data == "data/stdlib" and main:
    prepare(out=s.data)
if world > 1:
    dist.barrier()
data = Path(s.data)
if not (data / "meta.json").exists():
    stop(f"{data} holds no meta.json: make it with  python prepare_data.py YOUR_FILES --out {data}")
meta = json.loads((data / "meta.json").read_text())
if not meta["complete"]:
    stop(f"{data} is only half prepared: the same prepare_data.py command continues where it stopped")
tokenizer = get_tokenizer(meta["tokenizer"])
fingerprint = {k: meta[k] for k in ("sources", "tokenizer", "vocab_size", "train", "val")}
T, batch_size = s.seq_len, s.batch_size


class Windows:
    """The n windows of T + 1 tokens that tile a split; the shards stay on disk."""

    def __init__(self, split):
        self.shards = [np.load(data / shard["file"], mmap_mode="r") for shard in meta[split]["shards"]]
        self.counts = [(len(shard) - 1) // T for shard in self.shards]
        self.n, self.epoch = sum(self.counts), -1
        if not self.n:
            tokens = max(map(len, self.shards))
            stop(f"the {split} split holds {tokens} tokens in its largest shard: seq_len {T} needs {T + 1}")

    def window(self, index, phase=0):
        """Window `index`, shifted by `phase` tokens where the shard has room."""
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
                rng = np.random.default_rng([s.seed, epoch])
                self.epoch, self.order, self.phase = epoch, rng.permutation(self.n), int(rng.integers(T))
            out.append(self.window(int(self.order[i]), self.phase))
        return torch.stack(out)  # [rows, T + 1]


share = batch_size // world  # sequences of this process
micro = s.micro_batch_size if s.micro_batch_size > 0 else max(1, share)
if batch_size % (world * micro):
    fitting = max(1, batch_size // (world * micro)) * world * micro
    needed = f"{world} processes x {micro} sequences at once"
    stop(f"batch_size {batch_size} is no multiple of {needed}; {fitting} would be")
train_windows, val_windows = Windows("train"), Windows("val")

# ------------------------------------------------------------------------------------------------------------
# Model

if s.window_size > T:
    stop(f"window_size {s.window_size} is larger than seq_len {T}; give --window_size {T} or less")
vocab_size = -(-meta["vocab_size"] // 64) * 64  # a multiple of 64 is faster
try:
    config = FlashSTUConfig(vocab_size=vocab_size, **{name: getattr(s, name) for name in model_fields})
except ValueError as e:
    stop(str(e))
torch.manual_seed(s.seed)
with torch.device("meta" if device.type == "meta" else "cpu"):  # the same weights whatever the device
    model = FlashSTU(config).to(device)
n_params = sum(p.numel() for p in model.parameters())

# Training FLOPs a token: 6 for each weight of a matrix, and attention over the window (the FFTs: below 1%)
flops = 6 * sum(p.numel() for p in model.parameters() if p.ndim >= 2)
windows = [layer.mixer.window for layer in model.layers if hasattr(layer.mixer, "window")]
flops += sum(12 * config.n_embd * min(window, T / 2) for window in windows)


def gibibytes(micro):
    """In training, about: weights, gradients, optimizer state, what a micro-batch keeps for the backward."""
    size, d = 4 if s.dtype == "float32" else 2, config.n_embd
    layers = d * (14 * size + 24) + 4 * size * int(d * config.mlp_scale)  # of one, for one token
    if config.use_gradient_checkpointing:  # one at a time, and the input of each
        layers += 2 * size * d * config.n_layers
    else:
        layers *= config.n_layers
    logits = 8 * min(2**26, micro * T * vocab_size)
    return (16 * n_params / (world if sharded else 1) + micro * T * (layers + 8 * d) + logits) / 2**30


available = math.inf
if device.type == "cuda":
    available = torch.cuda.mem_get_info(device)[0] / 2**30
elif device.type == "cpu" and hasattr(os, "sysconf"):  # not on Windows
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
say(f"{n_params / 1e6:.2f}M parameters, {config.n_layers} layers, {flops / 1e6:.1f} MFLOP a token, "
    f"about {gibibytes(micro):.1f} GiB; {world} x {device.type}, {s.dtype}")  # fmt: skip
if gibibytes(micro) > available:
    fits = [m for m in range(1, min(micro, 4096)) if share % m == 0 and gibibytes(m) <= available]
    advice = f"--micro_batch_size {max(fits)} would" if fits else "a smaller model is needed"
    stop(f"{micro} sequences at once do not fit into {available:.1f} GiB; {advice}")
if device.type == "meta":
    tokens = torch.zeros(micro, T + 1, dtype=torch.long, device=device)
    model(tokens, labels=tokens).loss.backward()
    sys.exit()

# ------------------------------------------------------------------------------------------------------------
# Engine and optimizer

engine = model  # what is called in training
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


def lr_factor(step):
    if step < s.warmup_steps:
        return (step + 1) / s.warmup_steps
    done = (step - s.warmup_steps) / max(1, s.steps - s.warmup_steps)
    shape = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "none": 1}[s.decay]
    return s.min_lr + (1 - s.min_lr) * shape


# ------------------------------------------------------------------------------------------------------------
# Checkpoints: whole or not there. One file whatever the engine, so that of N processes resumes on M. The last
# two are kept

full = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)


def save_checkpoint(step):
    weights, moments = state_dict.get_state_dict(model, optimizers, options=full)  # all processes together
    if main:
        state = {
            "step": step, "model": weights, "optimizer": moments, "scaler": scaler.state_dict(),
            "config": config.to_dict(), "data": fingerprint, "settings": vars(s),
        }  # fmt: skip
        write_atomically(run / f"checkpoint_{step}.pt", lambda f: torch.save(state, f))
        kept = [n for n, _ in checkpoints() if n <= step][-2:]
        for n, path in checkpoints():
            if n not in kept:
                path.unlink()  # older; or beyond this step: damaged, or of a run that --fresh replaced
    if world > 1:
        dist.barrier()


def whole_model():
    """The model in one piece on the main process's CPU. All processes call it together."""
    weights, _ = state_dict.get_state_dict(model, [], options=full)
    if main:
        whole = FlashSTU(config)
        whole.load_state_dict(weights)
        return whole


start_step, saved = 0, None if s.fresh else load_checkpoint()
if saved:
    no_matter = ("use_gradient_checkpointing", "d_in_tile", "d_out_tile")  # the results are the same
    for what, before, now in (
        ("model settings", saved["config"], config.to_dict()), ("data", saved["data"], fingerprint),
        ("settings", saved["settings"], {"optimizer": s.optimizer}),
    ):  # fmt: skip
        for key in now:
            if before.get(key) != now[key] and key not in no_matter:
                stop(f"{run} was trained with other {what} ({key}: {before.get(key)!r}, now {now[key]!r}): "
                     f"choose another --out_dir, or --fresh to start again")  # fmt: skip
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

# ------------------------------------------------------------------------------------------------------------
# Training


@torch.no_grad()
def evaluate():
    """Mean loss (nats a token) on eval_sequences windows spread evenly over the validation split."""
    model.eval()
    n = min(s.eval_sequences, val_windows.n)
    mine = list(range(n))[rank::world]
    total = torch.zeros(2, device=device)  # of losses, of windows
    for i in range(0, -(-n // world), micro):  # every process makes the same number of calls
        rows = mine[i : i + micro]
        x = torch.stack([val_windows.window(r * val_windows.n // n) for r in rows or [0]]).to(device)
        with autocast:
            loss = engine(x, labels=x).loss
        total += torch.stack([loss * len(rows), torch.tensor(len(rows), device=device)])
    if world > 1:
        dist.all_reduce(total)
    model.train()
    return (total[0] / total[1]).item()


log_path = run / "log.jsonl"
if main:
    text = json.dumps({"settings": vars(s), "model": config.to_dict()}, indent=1)
    write_atomically(run / "config.json", lambda f: f.write(text.encode()))
    if log_path.exists():  # forget what came after the checkpoint, and a line that was cut off
        lines = [line for line in log_path.read_text().splitlines(True) if line.endswith("}\n")]
        lines = [line for line in lines if json.loads(line)["step"] <= start_step - ("val_loss" in line)]
        write_atomically(log_path, lambda f: f.write("".join(lines if saved else []).encode()))
wandb = None
if s.wandb and main:
    try:
        import wandb
    except ImportError:
        stop("--wandb needs Weights & Biases: pip install wandb")
    wandb.init(project=s.wandb, id=run.name, config=vars(s), resume="allow")


def log(step, **record):
    if main:
        with open(log_path, "a") as f:
            f.write(json.dumps({"step": step, **record}) + "\n")
    if wandb:
        wandb.log(record, step=step)


asked_to_stop = []
for signum in (signal.SIGTERM, signal.SIGINT):
    signal.signal(signum, lambda *_: asked_to_stop.append(1))
gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
speeds = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12, "L40S": 362e12, "B200": 2250e12}
gpu_flops = next((v for k, v in speeds.items() if k in gpu), None)  # a second, dense 16-bit
skipped, skipped_in_row, t_log, tokens_log = 0, 0, time.time(), 0
model.train()

for step in range(start_step, s.steps + 1):
    last = step == s.steps
    if step % s.eval_interval == 0 or last:
        loss = evaluate()
        bits_per_byte = loss / math.log(2) * meta["val"]["tokens"] / meta["val"]["bytes"]
        say(f"step {step}: validation loss {loss:.4f}, {bits_per_byte:.4f} bits per byte")
        log(step, val_loss=loss, val_bits_per_byte=bits_per_byte)
        writer = whole_model() if sharded else model
        if main:
            write(writer.to(device), tokenizer, s.prompt, 400 if last else 80)
        t_log, tokens_log = time.time(), 0
    if (step % s.checkpoint_interval == 0 and step > start_step) or last:
        save_checkpoint(step)
    if last:
        break

    factor = lr_factor(step)
    param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group, (lr, weight_decay) in zip(param_groups, peaks):  # of this command, not of the checkpoint
        group["lr"], group["weight_decay"] = lr * factor, weight_decay
    torch.manual_seed(s.seed + 1000003 * step + rank)  # dropout too is a function of the step
    rows = train_windows.batch(step, range(rank * share, (rank + 1) * share)).to(device)
    status = torch.tensor([0.0, len(asked_to_stop)], device=device)  # loss; was any process asked?
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
    if math.isfinite(loss) and math.isfinite(norm):
        for optimizer in optimizers:
            scaler.step(optimizer)
        skipped_in_row = 0
    else:
        skipped, skipped_in_row = skipped + 1, skipped_in_row + 1
        say(f"step {step + 1}: loss {loss}, gradient norm {norm}: step skipped ({skipped} so far)")
        if skipped_in_row >= s.max_skipped:
            good = checkpoints()[-1][1] if checkpoints() else "none"
            stop(f"{skipped_in_row} such steps in a row. Last good checkpoint: {good}; a lower --lr may help")
    scaler.update()
    for optimizer in optimizers:
        optimizer.zero_grad()
    tokens_log += batch_size * T

    if (step + 1) % s.log_interval == 0 or stopping:
        lr, rate = s.lr * factor, tokens_log / (time.time() - t_log)
        left = (s.steps - step - 1) * batch_size * T / rate
        mfu = f", MFU {flops * rate / gpu_flops / world:.1%}" if gpu_flops else ""
        say(f"step {step + 1}/{s.steps}: loss {loss:.4f}, lr {lr:.1e}, grad norm {norm:.2f}, "
            f"{rate:,.0f} tokens/s{mfu}, {left / 60:.1f} min left")  # fmt: skip
        log(step + 1, loss=loss, lr=lr, grad_norm=norm, tokens_per_second=rate, skipped=skipped)
        t_log, tokens_log = time.time(), 0
    if stopping:
        save_checkpoint(step + 1)
        say(f"asked to stop: saved after step {step + 1}; the same command continues")
        break

finished = whole_model() if last else None  # a folder for from_pretrained, and for transformers
if finished:
    finished.save_pretrained(run / "model")
    say(f"{run / 'model'} is ready for FlashSTU.from_pretrained")
if main:
    draw_losses([run])
if world > 1:
    dist.destroy_process_group()
    if not main:  # its work is done; gloo's threads, still closing connections, can abort a normal exit
        sys.stdout.flush()
        os._exit(0)
