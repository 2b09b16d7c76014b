"""
Train a Flash STU language model, on one CPU or GPU or on many, and let it write.

    python train.py                                a small model of Python's own source code
    torchrun --nproc_per_node=2 train.py           the same on two processes
    python train.py --preset 125M --data data/fineweb-edu --out_dir runs/125M
    python train.py --init_from runs/default --data data/mine --out_dir runs/tuned    fine-tune it
    python train.py --sample "def "                write with the last checkpoint of runs/default
    python train.py --eval_only                    its loss on the whole validation split

The folder of the run, --out_dir, receives config.json, log.jsonl and checkpoints, and at the end
loss.png and a folder with the model. Ctrl-C and SIGTERM save. The same command, or --out_dir alone,
continues a run that was interrupted. If the number of processes is the same, then so is the result,
bit for bit.
"""

import argparse
import difflib
import json
import math
import os
import signal
import sys
import time
import zipfile
import zlib
from collections import defaultdict
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor

from prepare_data import (
    get_tokenizer,
    lock,
    open_data,
    prepare_default,
    read_tokens,
    write_atomically,
)
from stu import FlashSTU, FlashSTUConfig

# -----------------------------------------------------------------------------
# Settings. Each is a flag, as in --n_embd 256, and has a line: its name, its default as JSON, its
# meaning. The lines are also what --help prints

# Of the model: fields of FlashSTUConfig. They stay as they are when a run is continued
MODEL_SETTINGS = """
n_embd             128             width of the model
n_layers           6               number of layers
n_heads            4               heads of an attention layer
seq_len            256             tokens in a training window, and length of the filters
window_size        64              how many tokens before itself a token attends to
num_eigh           24              number of spectral filters
mlp_scale          2.75            hidden width of the MLPs, in units of n_embd
bias               false           let the linear layers have a bias
dropout            0.0             share of activations that training sets to zero
softcap            0.0             bound of the attention logits; 0 is none
use_stu            true            layers 0, 2, 4, ... are STUs; false: every layer is attention
use_attn           true            layers 1, 3, 5, ... are attention; false: every layer is an STU
use_approx         true            true: STU-T, one filter a channel; false: the full STU
use_hankel_L       false           filters of the papers' other matrix, Hankel-L
use_tensorized     false           filters that are Kronecker products of short ones
max_angle          0.0             above 0: filters also for what turns by up to so many degrees
stu_enable_mlp_sandwich     false  put each STU between two linear layers
stu_mlp_hidden_size         null   width of the STU between them; null: that of the MLPs
"""

# Of the run. They, too, are kept when it is continued, but most of them can be changed
RUN_SETTINGS = """
data               "data/stdlib"   a folder of prepare_data.py; this one is made if it is not there
init_from          ""              start from the weights and sizes of another run or a saved model
seed               1               of the first weights, the order of the data, dropout and samples
optimizer          "muon"          muon (for matrices of layers, with adamw for the rest), or adamw
batch_size         8               windows in a step, of all processes together
micro_batch_size   0               windows that a process computes at once; 0: its whole share
steps              1200            length of the whole run
lr                 0.01            highest learning rate of AdamW
muon_lr            0.02            highest learning rate of Muon
min_lr             0.02            learning rate of the last step, in units of the highest
warmup_steps       20              steps in which the learning rates rise
weight_decay       0.1             decay of the matrices, in units of the learning rate
grad_clip          1.0             a gradient with a larger norm is scaled down to it
max_skipped        5               so many steps in a row without a finite gradient end the run
eval_interval      100             steps from one evaluation, checkpoint and sample to the next
eval_sequences     64              windows of the validation split in an evaluation
log_interval       10              steps from one line of the log to the next
prompt             "def"           beginning of the samples that are shown
use_gradient_checkpointing  false  compute the layers again going backward, to save memory
d_in_tile          null            input channels that a full STU takes at once, to save memory
d_out_tile         null            output channels that an STU takes at once, to save memory
use_flash_fft      true            use FlashFFTConv where it is installed
dtype              "auto"          float32, bfloat16 or float16; auto: 16 bits on CUDA, else 32
compile            "auto"          true or false: compile the layers; auto: on CUDA
engine             "ddp"           each process has the whole model (ddp) or a part of it (fsdp)
"""

# Of this command alone
COMMAND_SETTINGS = """
out_dir            "runs/default"  folder of the run
preset             ""              a larger model and its schedule: 125M, 350M or 1B
fresh              false           start anew; the run in out_dir moves to a folder beside it
eval_only          false           only print the loss on the validation split
sample             ""              only write: continue this text
num_samples        1               how often to continue it
max_new_tokens     500             length of a sample
temperature        0.8             of sampling; 0 takes the most likely token
top_k              50              sample from so many of the most likely tokens; 0: from all
top_p              1.0             sample from the likely tokens that together have this probability
device             "auto"          cpu, cuda or mps; auto: a GPU where there is one
wandb              ""              also log to this project of Weights & Biases
"""

# A preset stands for these flags. Its name is its size with gpt2's vocabulary of 50k tokens
presets = {
    "125M": """--n_embd 768 --n_layers 12 --n_heads 12 --seq_len 2048 --window_size 1024
        --mlp_scale 3 --batch_size 256 --micro_batch_size 16 --steps 20000 --warmup_steps 500
        --eval_interval 500 --muon_lr 0.01 --min_lr 0.05""",
    "350M": """--n_embd 1024 --n_layers 24 --n_heads 16 --seq_len 4096 --window_size 1024
        --num_eigh 32 --mlp_scale 3 --batch_size 128 --micro_batch_size 4 --steps 30000
        --warmup_steps 1000 --eval_interval 500 --muon_lr 0.01 --min_lr 0.05""",
    "1B": """--n_embd 2048 --n_layers 32 --n_heads 32 --seq_len 8192 --window_size 1024
        --num_eigh 48 --mlp_scale 2 --batch_size 128 --micro_batch_size 1 --steps 50000
        --warmup_steps 2000 --eval_interval 500 --muon_lr 0.01 --min_lr 0.05
        --use_gradient_checkpointing --engine fsdp""",
}
choices = {
    "optimizer": ["muon", "adamw"],
    "preset": list(presets),
    "dtype": ["auto", "float32", "bfloat16", "float16"],
    "compile": ["auto", "true", "false"],
    "engine": ["ddp", "fsdp"],
}
# 0 is refused for these at once, before it makes trouble later
not_zero = """seq_len mlp_scale batch_size steps lr muon_lr grad_clip max_skipped eval_interval
    eval_sequences log_interval num_samples max_new_tokens top_p"""

# -----------------------------------------------------------------------------
# The command line


def read_defaults(table):
    """{name: default} of the lines of a table."""
    defaults = {}
    for line in table.strip().splitlines():
        name, default = line.split()[:2]
        defaults[name] = json.loads(default)
    return defaults


def true_or_false(text):
    if text.lower() not in ("true", "false"):
        raise ValueError  # argparse tells the user
    return text.lower() == "true"


model_settings = read_defaults(MODEL_SETTINGS)
kept_settings = model_settings | read_defaults(RUN_SETTINGS)
defaults = kept_settings | read_defaults(COMMAND_SETTINGS)
parser = argparse.ArgumentParser(
    usage="train.py [--name value ...]",
    description=__doc__ + MODEL_SETTINGS + RUN_SETTINGS + COMMAND_SETTINGS,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    argument_default=argparse.SUPPRESS,  # so the result holds only what is given
)
add = partial(parser.add_argument, help=argparse.SUPPRESS)  # the tables are the help
for name, default in defaults.items():
    if isinstance(default, bool):  # --fresh is the same as --fresh true
        add(f"--{name}", type=true_or_false, nargs="?", const=True)
    else:
        value_type = int if default is None else type(default)
        add(f"--{name}", type=value_type, choices=choices.get(name))

parsed, unknown = parser.parse_known_args()
if unknown:
    similar = difflib.get_close_matches(unknown[0].strip("-"), defaults)
    parser.error(f"there is no {unknown[0]}: see --help, or try {similar}")
given = vars(parsed)  # what this command says, and nothing else
if "preset" in given:  # its flags come first, so those of the command overrule them
    flags = presets[given["preset"]].split()
    given = vars(parser.parse_args(flags + sys.argv[1:]))
for name, value in given.items():
    if isinstance(value, int | float) and not 0 <= value < math.inf:
        parser.error(f"--{name} is {value}, but must be finite and not negative")
    if name == "top_p" and value > 1:
        parser.error(f"--top_p is a probability, at most 1, not {value}")
    if value == 0 and name in not_zero.split():
        parser.error(f"--{name} must not be 0")
args = argparse.Namespace(**defaults | given)  # all settings, where `given` overrules

# -----------------------------------------------------------------------------
# Processes and device

rank = int(os.environ.get("RANK", "0"))  # torchrun sets it, and the number of processes
world_size = int(os.environ.get("WORLD_SIZE", "1"))
is_main = rank == 0

accelerator = torch.accelerator.current_accelerator(check_available=True)
found = accelerator.type if accelerator else "cpu"
if args.device not in ("auto", "cpu", found):
    parser.error(f"--device {args.device}: torch finds no such device here")
device = torch.device(found if args.device == "auto" else args.device)
on_cuda = device.type == "cuda"
if on_cuda:
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.set_float32_matmul_precision("high")
if world_size > 1:
    dist.init_process_group("nccl" if on_cuda else "gloo")


def mean_over_processes(number):
    """The mean over all processes. It is the same on each, so they can decide by it together."""
    number = torch.as_tensor(number, dtype=torch.float32, device=device)
    if world_size > 1:
        dist.all_reduce(number)
    return number.item() / world_size


def any_process(flag):
    return mean_over_processes(flag) > 0


def say(text, end="\n"):
    """Print on the main process. Control characters, which a model may write, are made visible."""
    visible = ""
    for c in text:
        visible += c if c.isprintable() or c in "\n\t" else repr(c)[1:-1]
    try:
        if is_main:
            print(visible, end=end, flush=True)
    except OSError:  # nobody reads it any more, but training goes on
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack some letters

# -----------------------------------------------------------------------------
# Checkpoints, and models that were saved


def checkpoints(folder):
    """{step: path} of the checkpoints in a folder, the oldest first."""
    found = {}
    for path in folder.glob("checkpoint_*.pt"):
        step = path.stem.removeprefix("checkpoint_")
        if step.isdecimal():  # a file of another name is not ours
            found[int(step)] = path
    return dict(sorted(found.items()))


def load_checkpoint(folder):
    """The newest checkpoint of a run that is not damaged, or None where there is none at all."""
    found = checkpoints(folder)
    for path in reversed(found.values()):
        try:  # it is a zip file, in which every part has a checksum
            is_whole = zipfile.ZipFile(path).testzip() is None
        except zipfile.BadZipFile:
            is_whole = False
        if is_whole:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        say(f"{path} is damaged, so the one before it is taken")
    if not found:
        return None
    sys.exit(f"no checkpoint in {folder} is whole: restore one, or --fresh to start anew")


def load_run_or_model(folder):
    """The last checkpoint of a run, or a dict with the same entries of a model that was saved.
    save_checkpoint, below, lists the entries."""
    checkpoint = load_checkpoint(folder)
    if checkpoint:
        return checkpoint
    if not list(folder.glob("model*.safetensors")):
        sys.exit(f"{folder} holds no checkpoint and no model")
    model = FlashSTU.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    return {
        "model": model.state_dict(),
        "config": model.config.to_dict(),
        "settings": model.config.to_dict(),  # all that is known of them
        "tokenizer": config.get("tokenizer_name"),
    }


def restore_model(checkpoint):
    model = FlashSTU(FlashSTUConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    return model.to(device).eval()


# What this command starts from. `start` has the weights, or is None. `before` are the settings that
# count where this command gives none: all of them if an old run is read or goes on, those of the
# model if its weights begin a new run
out_dir = Path(args.out_dir)
only_reads = args.eval_only or "sample" in given
resumed = None if only_reads or args.fresh else load_checkpoint(out_dir)
if only_reads:
    start = load_run_or_model(Path(args.init_from or args.out_dir))
    before = start["settings"]
elif resumed:  # the run in out_dir goes on
    start = resumed
    before = start["settings"]
elif args.init_from:
    start = load_run_or_model(Path(args.init_from))
    before = start["config"]
else:
    start = None
    before = {}
must_stay = ["init_from", "seed", "optimizer", "batch_size", *model_settings]
for name, default in kept_settings.items():
    was = before.get(name, default)
    now = given.get(name, was)
    setattr(args, name, now)
    if resumed and now != was:
        if name in must_stay:
            sys.exit(f"{out_dir} has --{name} {was!r}, not {now!r}: give another --out_dir")
        say(f"--{name} was {was!r} until here, and now is {now!r}")

# Here the settings are final. What follows from them:
sharded = world_size > 1 and args.engine == "fsdp"  # else every process has the whole model
dtype = args.dtype
if dtype == "auto":
    dtype = "float32"
    if on_cuda:
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if has_bfloat16 else "float16"
autocast = torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")
# In float16 small gradients would be rounded to zero. So the scaler multiplies the loss by a large
# number and later divides the gradients by it. It adapts this number, from 4096 on: with torch's
# 65536 the first steps would overflow
scaler = torch.amp.GradScaler(device.type, init_scale=4096.0, enabled=dtype == "float16")
torch.manual_seed(args.seed)

# -----------------------------------------------------------------------------
# Samples


def continue_text(model, tokenizer, prompt, length):
    """Yield the text that a model writes after the prompt, in pieces of whole characters."""
    # Without a prompt it begins after the end of another text
    tokens = tokenizer.encode(prompt).tolist() or [tokenizer.eot]
    ids = torch.tensor([tokens], device=device)
    sampling = [args.temperature, args.top_k, args.top_p]
    pending = []
    for token in model.stream(ids, length, *sampling, stop_token=tokenizer.eot):
        pending.append(token.item())
        text = tokenizer.decode(pending)
        # A character has up to four bytes. While some are missing it is decoded as \ufffd, so we
        # wait for them. More than four tokens it cannot be
        if not text.endswith("\ufffd") or len(pending) == 4:
            yield text
            pending = []
    yield tokenizer.decode(pending)


if "sample" in given:
    model = restore_model(start)
    tokenizer_name = start.get("tokenizer")
    if tokenizer_name is None:  # in an early checkpoint; but its data names it
        meta, _ = open_data(args.data)
        tokenizer_name = meta["tokenizer"]
    tokenizer = get_tokenizer(tokenizer_name)
    for _ in range(args.num_samples):
        say(args.sample, end="")
        for text in continue_text(model, tokenizer, args.sample, args.max_new_tokens):
            say(text, end="")
        say("")
    sys.exit()

# -----------------------------------------------------------------------------
# Data. A split is one long row of tokens. It is cut into windows of T tokens, side by side

if args.data == defaults["data"]:
    prepare_default(args.data)  # this is done only if it is not there; other processes wait
if Path(args.data).is_file():
    sys.exit(f"{args.data} is a text. Prepare it first:  python prepare_data.py {args.data}")
meta, shards = open_data(args.data)
tokenizer = get_tokenizer(meta["tokenizer"])
if start and start.get("tokenizer") not in (None, tokenizer.name):
    sys.exit(f"the model reads {start['tokenizer']}, but {args.data} holds {tokenizer.name}")
T = args.seq_len
n_windows = {split: (meta[split]["tokens"] - 1) // T for split in shards}
if 0 in n_windows.values():
    sys.exit(f"{args.data} is too short for windows of {T + 1} tokens: give a smaller --seq_len")
if args.batch_size % world_size:
    sys.exit(f"--batch_size {args.batch_size} is not a multiple of the {world_size} processes")
share = args.batch_size // world_size  # windows of this process in a step
micro = args.micro_batch_size or share  # how many of them at once


def read_windows(split, starts):
    """Yield the windows that begin at these tokens, a few at once: [micro, T + 1]. They are both
    the ids and the labels of a model, which predicts token t + 1 from the tokens up to t."""
    for i in range(0, len(starts), micro):
        windows = [read_tokens(shards[split], a, a + T + 1) for a in starts[i : i + micro]]
        yield torch.from_numpy(np.stack(windows).astype(np.int64)).to(device)


@lru_cache(maxsize=2)  # one step may reach from an epoch into the next
def order_of_epoch(epoch):
    """Where the windows of an epoch begin, in random order. They lie side by side; where the first
    of them begins is random, too, so that each epoch cuts the text elsewhere."""
    rng = np.random.default_rng([args.seed, epoch])
    starts = rng.permutation(n_windows["train"]) * T + rng.integers(T)
    return np.minimum(starts, meta["train"]["tokens"] - T - 1)  # the last one must fit, too


def micro_batches(step):
    """The windows of this process in a step. They depend on the seed and the step alone, so a run
    that is continued sees what it would have seen, and so does one on more processes."""
    first = step * args.batch_size + rank * share
    starts = []
    for i in range(first, first + share):
        epoch, number = divmod(i, n_windows["train"])
        starts.append(order_of_epoch(epoch)[number])
    return list(read_windows("train", starts))


# -----------------------------------------------------------------------------
# Model

# Weights are float32; autocast rounds them where that does no harm
fields = FlashSTUConfig(torch_dtype="float32").to_dict()
for name in fields:
    if name in kept_settings:
        fields[name] = getattr(args, name)
fields["vocab_size"] = math.ceil(meta["vocab_size"] / 64) * 64  # round products are faster
if start:
    fields["vocab_size"] = start["config"]["vocab_size"]
try:
    config = FlashSTUConfig(**fields)
except ValueError as error:
    parser.error(str(error))
model = FlashSTU(config)  # on the CPU first: the same weights whatever the device
if start:
    model.load_state_dict(start["model"])
model.to(device)
n_parameters = sum(p.numel() for p in model.parameters())
say(f"{n_parameters:,} parameters, {model.tok_emb.weight.numel():,} of them embeddings, in {dtype}")
say(f"{meta['train']['tokens']:,} tokens ({tokenizer.name}) to train, from {args.data}")

# Training calls `parallel_model`. It is the model, which under FSDP is cut into parts in place, or
# under DDP a module around it that takes the mean of the gradients of all processes
parallel_model = model
uses_ddp = world_size > 1 and not sharded
if sharded:
    mesh = dist.device_mesh.init_device_mesh(device.type, (world_size,))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if dtype == "bfloat16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the angles of the rotary embedding stay in float32
    )
    for module in [*model.layers, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
elif uses_ddp:
    parallel_model = torch.nn.parallel.DistributedDataParallel(model)
if args.compile == "true" or (args.compile == "auto" and on_cuda):
    for layer in model.layers:
        layer.compile()


@torch.no_grad()
def evaluate(n):
    """The mean loss, in nats per token, of n windows spread evenly over the validation split."""
    n = min(n, n_windows["val"])
    # Rounded up, so that each process has equally many. Then a few windows may count twice
    n = math.ceil(n / world_size) * world_size
    mine = np.arange(rank, n, world_size)  # of 0, 1, ..., n-1, dealt out like cards
    windows = mine * n_windows["val"] // n  # and spread over the split
    total = 0.0
    model.eval()
    for x in read_windows("val", windows * T):
        with autocast:
            total += parallel_model(x, labels=x).loss * len(x)
    model.train()
    return mean_over_processes(total) / len(mine)


def bits_per_byte(loss):
    """From nats per token, with as many tokens per byte as the validation split has."""
    return loss / math.log(2) * meta["val"]["tokens"] / meta["val"]["bytes"]


if args.eval_only:
    loss = evaluate(n_windows["val"])
    say(f"loss {loss:.4f}, {bits_per_byte(loss):.4f} bits per byte, on the whole validation split")
    sys.exit()

# -----------------------------------------------------------------------------
# Optimizers


def orthogonalize(matrices):
    """Bring the singular values of each matrix [n, rows, columns] to about 1.

    A step of this iteration (Newton-Schulz) is X <- a X + b (X Xᵀ) X + c (X Xᵀ)² X. It changes each
    singular value σ of X by itself, to a σ + b σ³ + c σ⁵, and keeps the singular vectors. K. Jordan
    chose a, b, c so that five steps are enough: σ between 0.005 and 1 then ends near 1."""
    X = matrices.bfloat16() if on_cuda else matrices  # most CPUs are slow in 16 bits
    is_tall = X.shape[1] > X.shape[2]
    if is_tall:
        X = X.mT  # X Xᵀ is then the smaller one of two possible products
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)  # no singular value is above 1
    for _ in range(5):
        gram = X @ X.mT
        X = 3.4445 * X + (-4.775 * gram + 2.0315 * gram @ gram) @ X
    return X.mT if is_tall else X


class Muon(torch.optim.Optimizer):
    """Gradient descent with momentum, where the step of a matrix is made orthogonal: it moves
    equally far in all directions. The steps are those of torch.optim.Muon. But here a group holds
    the matrices of one shape, which are multiplied as one batch, and that is faster."""

    @torch.no_grad()
    def step(self, closure=None):  # torch.distributed calls step(closure=None) once, for FSDP
        momentum = 0.95
        for group in self.param_groups:
            directions = []
            for matrix in group["params"]:
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                # Nesterov's momentum: a running mean of the gradients, mixed with the newest once
                # more
                mean = state["momentum_buffer"]
                mean.lerp_(matrix.grad, 1 - momentum)
                direction = torch.lerp(matrix.grad, mean, momentum)
                directions.append(direction.full_tensor() if sharded else direction)
            updates = orthogonalize(torch.stack(directions))  # [n, rows, columns]
            rows, columns = updates.shape[1:]
            # An orthogonal matrix with more rows than columns has smaller entries
            lr = group["lr"] * max(1, rows / columns) ** 0.5
            for matrix, update in zip(group["params"], updates):
                if sharded:  # every process has the whole update, and takes its own part of it
                    update = distribute_tensor(
                        update, matrix.device_mesh, matrix.placements, src_data_rank=None
                    )
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.sub_(update, alpha=lr)


# Muon is for the matrices of the layers, AdamW for the rest. M_filters is no matrix that is
# multiplied with vectors, but holds a filter for each channel. Like norms and biases it is not
# pulled towards zero
of_muon = defaultdict(list)  # {shape: its matrices}
decayed = []
not_decayed = []
for name, p in model.named_parameters():
    if p.ndim < 2 or name.endswith("M_filters"):
        not_decayed.append(p)
    elif p.ndim == 2 and name.startswith("layers") and args.optimizer == "muon":
        of_muon[p.shape].append(p)
    else:
        decayed.append(p)
groups = [{"params": decayed}, {"params": not_decayed, "weight_decay": 0.0}]
adamw = torch.optim.AdamW(groups, weight_decay=args.weight_decay, betas=(0.9, 0.95), fused=True)
optimizers = [adamw]
if of_muon:
    groups = [{"params": matrices} for matrices in of_muon.values()]
    optimizers.append(Muon(groups, {"lr": 0.0, "weight_decay": args.weight_decay}))


def set_rates(step):
    """Set the learning rates, which rise, and then fall as a cosine does."""
    if step < args.warmup_steps:
        factor = (step + 1) / args.warmup_steps
    else:
        done = (step - args.warmup_steps) / (args.steps - args.warmup_steps)
        factor = args.min_lr + (1 - args.min_lr) * (1 + math.cos(math.pi * done)) / 2
    for optimizer, highest in zip(optimizers, [args.lr, args.muon_lr]):
        for group in optimizer.param_groups:
            group["lr"] = highest * factor


# -----------------------------------------------------------------------------
# The run's folder: what is resumed there, and how checkpoints and the log are written

in_one_piece = StateDictOptions(full_state_dict=True, cpu_offload=True)  # on the main process
settings = {name: getattr(args, name) for name in kept_settings}
shards_of_data = json.dumps([meta["train"], meta["val"]])  # with the checksums of their contents
data_checksum = zlib.crc32(shards_of_data.encode())
start_step = resumed["step"] if resumed else 0
mean_step = mean_over_processes(start_step)
if any_process(start_step != mean_step):
    sys.exit(f"the processes found different checkpoints in {out_dir}: do they share this folder?")
if resumed:
    if resumed.get("data_checksum", data_checksum) != data_checksum:
        sys.exit(f"{out_dir} was trained on other data than {args.data}: give another --out_dir")
    if start_step > args.steps:
        sys.exit(f"{out_dir} is already at step {start_step}: give more --steps")
    moments = {"state": resumed["optimizer"]["state"], "param_groups": []}  # rates are set anew
    set_optimizer_state_dict(model, optimizers, moments, options=in_one_piece)
    if resumed["scaler"]:
        scaler.load_state_dict(resumed["scaler"])
    say(f"continuing {out_dir} after step {start_step}")

log_path = out_dir / "log.jsonl"
if is_main:
    owner = lock(out_dir)  # as long as this process lives and holds the variable
    if args.fresh and checkpoints(out_dir):
        beside = f"{out_dir}.{time.strftime('%Y-%m-%d_%H-%M-%S')}"
        out_dir.rename(beside)
        say(f"the run that was in {out_dir} is now in {beside}")
        owner = lock(out_dir)
    about = {"settings": settings, "model": config.to_dict()}
    (out_dir / "config.json").write_text(json.dumps(about, indent=1))
    # Cut the log back to its length at the checkpoint: the steps after it are logged again
    with open(log_path, "ab") as file:
        length = file.tell()  # a file that is opened to append begins at its end
        file.truncate(min(resumed["log"], length) if resumed else 0)
    if args.wandb:
        import wandb

        wandb.init(project=args.wandb, config=settings)


def log(step, text, **values):
    """Print the text, and append the values to the log."""
    say(f"step {step}/{args.steps}: {text}")
    if is_main:
        with open(log_path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if args.wandb:
            wandb.log(values, step=step)


def validate(step):
    """Log the loss on the validation split; weights for which it is not finite are not saved."""
    loss = evaluate(args.eval_sequences)
    bits = bits_per_byte(loss)
    text = f"validation loss {loss:.4f}, {bits:.4f} bits per byte"
    log(step, text, val_loss=loss, val_bits_per_byte=bits)
    if not math.isfinite(loss):
        sys.exit(f"not saved. A lower --lr may help. Checkpoints: {list(checkpoints(out_dir))}")


def save_checkpoint(step):
    """Write all that the run needs to go on into one file, which is the same for each engine."""
    weights, moments = get_state_dict(model, optimizers, options=in_one_piece)
    if not is_main:
        return
    checkpoint = {
        "step": step,
        "model": weights,
        "optimizer": moments,
        "scaler": scaler.state_dict(),
        "config": config.to_dict(),
        "settings": settings,
        "tokenizer": tokenizer.name,
        "data_checksum": data_checksum,
        "log": log_path.stat().st_size,
    }
    path = out_dir / f"checkpoint_{step}.pt"
    write_atomically(path, lambda file: torch.save(checkpoint, file))
    found = list(checkpoints(out_dir).values())
    for old in found[:-2]:  # the one before is kept, for the case that the new one gets damaged
        old.unlink()


def show_sample():
    """Let the model that was just saved write. It is read back, because under FSDP no process has
    all of the model in memory."""
    if is_main:
        saved = restore_model(load_checkpoint(out_dir))
        text = args.prompt + "".join(continue_text(saved, tokenizer, args.prompt, length=200))
        say("\n    " + text.replace("\n", "\n    ") + "\n")


def report(step, loss, norm, seconds):
    """Log what a step gave, every log_interval steps. On a terminal, show it at every step.

    seconds: time that all steps of this command have taken."""
    seconds = max(seconds, 1e-9)  # a clock that is set back may say 0 or less
    done = step - start_step
    speed = round(args.batch_size * T * done / seconds)
    minutes = seconds / done * (args.steps - step) / 60
    text = f"loss {loss:.4f}, {speed:,} tokens/s, {minutes:.1f} minutes left"
    if done == 1 or step % args.log_interval == 0:
        lr = optimizers[0].param_groups[0]["lr"]
        log(step, text, loss=loss, lr=lr, grad_norm=norm, tokens_per_second=speed)
    elif sys.stdout.isatty():
        say(f"step {step}/{args.steps}: {text}", end="\r")


def draw_losses():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    records = [json.loads(line) for line in log_path.read_text().splitlines()]
    for name in ["loss", "val_loss"]:
        points = [[record["step"], record[name]] for record in records if name in record]
        axes.plot(*np.transpose(points), label=name)
    axes.legend()
    axes.figure.savefig(out_dir / "loss.png")


# -----------------------------------------------------------------------------
# Training

stop_requested = False


def request_stop(signum, frame):
    global stop_requested
    stop_requested = True


signal.signal(signal.SIGTERM, request_stop)
signal.signal(signal.SIGINT, request_stop)
launcher = os.getppid()  # torchrun, if there are several processes
skipped = 0  # steps in a row
seconds = 0.0  # that the steps of this command took

for step in range(start_step, args.steps + 1):
    # Evaluate, save, show a sample
    launcher_died = world_size > 1 and os.getppid() != launcher
    finished = step == args.steps
    stop = finished or any_process(stop_requested or launcher_died)
    is_saved_already = resumed and step == start_step
    if (stop or step % args.eval_interval == 0) and not is_saved_already:
        validate(step)
        if step > 0:
            save_checkpoint(step)
            show_sample()
    if stop:
        break

    # The gradient of the batch, in micro-batches
    began = time.perf_counter()
    set_rates(step)
    torch.manual_seed(args.seed + step * world_size + rank)  # dropout is the same after a resume
    batches = micro_batches(step)
    loss = 0.0
    for x in batches:
        if uses_ddp:  # the gradients are exchanged with the last of them
            parallel_model.require_backward_grad_sync = x is batches[-1]
        with autocast:
            part = parallel_model(x, labels=x).loss * len(x) / share
        scaler.scale(part).backward()
        loss += part.detach()
    loss = mean_over_processes(loss)
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
    norm = float(norm.full_tensor() if sharded else norm)

    # The step, unless the gradient is not finite
    if math.isfinite(loss) and math.isfinite(norm):
        skipped = 0
        for optimizer in optimizers:
            scaler.step(optimizer)
    else:
        skipped += 1
        say(f"step {step + 1} is skipped: loss {loss}, norm of the gradient {norm}")
        if skipped == args.max_skipped:
            sys.exit(f"a lower --lr may help. Checkpoints: {list(checkpoints(out_dir))}")
    scaler.update()  # in float16 the scale becomes smaller after a step that was skipped
    model.zero_grad()
    seconds += time.perf_counter() - began
    report(step + 1, loss, norm, seconds)

# -----------------------------------------------------------------------------
# The end: a folder for FlashSTU.from_pretrained and for transformers, and a picture of the losses

if not finished:
    say(f"stopped after step {step}; the same command continues from the last checkpoint")
elif is_main:
    restore_model(load_checkpoint(out_dir)).save_pretrained(out_dir / "model")
    config_path = out_dir / "model" / "config.json"
    values = json.loads(config_path.read_text()) | {"tokenizer_name": tokenizer.name}
    config_path.write_text(json.dumps(values, indent=2))
    say(f'{out_dir / "model"} is ready: python train.py --out_dir {out_dir} --sample "def "')
    draw_losses()
if world_size > 1:
    dist.destroy_process_group()
