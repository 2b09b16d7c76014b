"""Does an STU layer learn what a language model must do? A suite that others wrote asks it.

mechanistic-bench, of the lab that invented the STU, holds small tasks (copy this, find what
followed that, keep the longest run) with a model and a training loop of its own. This script runs
them as they are, and exchanges one thing: where that model builds an STU, it may get ours instead.

    git clone https://github.com/hazan-lab/mechanistic-bench
    python experiments/mechbench.py mechanistic-bench              all of it: 45 minutes of one core
    python experiments/mechbench.py mechanistic-bench --tasks copy --seeds 1 --layers ours

The layers that are compared, in a model of STU blocks only ("pure") and alternating with attention:
    ours       the STU of stu.py, each branch with filter weights of its own
    theirs     the suite's STU, whose two branches share one matrix of filter weights
    attention  the suite's attention, in every block
    random     (only if asked for by --layers) ours, beginning with random filters, not with zero

Every run adds a line to --out, and a run that is already there is not done again. At the end, and
with --only_table at once, a table is printed: the share of right answers, its mean over the seeds
and (the worst of them).
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from collections import defaultdict
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from stu import STU

TASKS = [
    "copy",
    "reverse_copy",
    "selective_copy",
    "induction",
    "associative",
    "interleave",
    "delayed_echo",
    "longest_run",
    "running_max",
    "cumulative_sum",
]
LAYERS = ["ours", "theirs", "attention", "random"]
FORMS = ["pure", "alternating"]  # of a model with STU layers
BLOCKS = {  # the layers of each form, by the suite's names
    "pure": ["stu"] * 4,
    "alternating": ["attn", "stu", "attn", "stu"],
    "only": ["attn"] * 4,  # attention in every block
}
LENGTH = 64  # of the sequences
VOCAB_SIZE = 64


def read_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", help="the folder of mechanistic-bench")
    parser.add_argument("--tasks", default=",".join(TASKS), help="names, separated by commas")
    parser.add_argument("--layers", default="ours,theirs,attention")
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to this number")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--warmup_steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument(
        "--out", default="runs/mechbench.jsonl", type=Path, help="a line for every run"
    )
    parser.add_argument("--only_table", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    if not (Path(arguments.checkout) / "src" / "mechbench").is_dir():
        parser.error(f"{arguments.checkout} is not a checkout of mechanistic-bench")
    check_names(parser, "--tasks", arguments.tasks, TASKS)
    check_names(parser, "--layers", arguments.layers, LAYERS)
    check_names(parser, "--forms", arguments.forms, FORMS)
    if arguments.seeds < 1 or arguments.steps < 1 or arguments.warmup_steps < 0:
        parser.error("--seeds and --steps must be at least 1, and --warmup_steps at least 0")
    if not arguments.lr > 0:
        parser.error("--lr must be above 0")
    if arguments.out.is_dir():
        parser.error(f"--out must be a file, got the folder {arguments.out}")
    return arguments


def check_names(parser, option, text, known):
    for name in text.split(","):
        if name not in known:
            parser.error(f"{option}: there is no {name!r}, only {', '.join(known)}")


def with_our_layer(build_theirs, random):
    """The suite's function that builds the layers, with our STU in place of its own."""

    def build(block_type, config):
        if block_type != "stu":
            return build_theirs(block_type, config)
        layer = STU(
            config.d_model,
            config.d_model,
            config.max_seq_len,
            config.num_eigh,
            use_hankel_L=config.use_hankel_L,
        )
        if random:
            layer.draw_random_filters()
        return layer

    return build


def train(task, blocks, seed, arguments):
    """One run of the suite's own training loop -> its last evaluation."""
    from mechbench.models import MechConfig
    from mechbench.training.trainer import TrainConfig, train_loop

    model_config = MechConfig(
        vocab_size=VOCAB_SIZE, d_model=64, n_heads=4, max_seq_len=LENGTH, block_types=blocks
    )
    with tempfile.TemporaryDirectory() as folder:
        train_config = TrainConfig(
            task=task,
            seq_len=LENGTH,
            vocab_size=VOCAB_SIZE,
            batch_size=32,
            max_steps=arguments.steps,
            warmup_steps=arguments.warmup_steps,
            lr=arguments.lr,
            dtype="fp32",
            seed=seed,
            out_dir=folder,
            eval_every=arguments.steps,
            log_every=arguments.steps,
        )
        with contextlib.redirect_stdout(io.StringIO()):
            history = train_loop(train_config, model_config)
    return history[-1]


def read_results(path, settings):
    """{(task, form, layer): {seed: share of right answers}} of earlier runs with these settings."""
    results = defaultdict(dict)
    if path.exists():
        for line in path.read_text().splitlines():
            run = json.loads(line)
            if all(run[name] == value for name, value in settings.items()):
                results[run["task"], run["form"], run["layer"]][run["seed"]] = run["accuracy"]
    return results


def print_table(results, tasks, columns):
    titles = [f"{form} {layer}" for form, layer in columns]
    print("| task | " + " | ".join(titles) + " |")
    print("|---|" + "---|" * len(columns))
    for task in tasks:
        cells = []
        for form, layer in columns:
            accuracies = results[task, form, layer].values()
            if accuracies:
                mean = sum(accuracies) / len(accuracies)
                cells.append(f"{mean:.2f} ({min(accuracies):.2f})")
            else:
                cells.append("")
        print(f"| {task} | " + " | ".join(cells) + " |")


def main():
    arguments = read_arguments()
    sys.path.insert(0, str(Path(arguments.checkout) / "src"))
    from mechbench.models import model as suite

    columns = []  # of the table: what form of model, with what layer
    for layer in arguments.layers.split(","):
        if layer == "attention":
            columns.append(("only", layer))
        else:
            for form in arguments.forms.split(","):
                columns.append((form, layer))
    tasks = arguments.tasks.split(",")
    seeds = range(1, arguments.seeds + 1)
    settings = {  # what all runs of a table have in common
        "steps": arguments.steps,
        "warmup_steps": arguments.warmup_steps,
        "lr": arguments.lr,
    }
    results = read_results(arguments.out, settings)
    runs = []  # that are still to be done
    for seed, task, (form, layer) in product(seeds, tasks, columns):
        if seed not in results[task, form, layer] and not arguments.only_table:
            runs.append((seed, task, form, layer))

    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the matrices are small: more threads would wait for each other
    build_theirs = suite._build_mixer
    start = time.perf_counter()
    for done, (seed, task, form, layer) in enumerate(runs, start=1):
        suite._build_mixer = build_theirs
        if layer in ("ours", "random"):
            suite._build_mixer = with_our_layer(build_theirs, layer == "random")
        last = train(task, BLOCKS[form], seed, arguments)
        accuracy = last["tok_acc"]
        results[task, form, layer][seed] = accuracy
        run = {"task": task, "form": form, "layer": layer, "seed": seed, **settings}
        run |= {"accuracy": accuracy, "loss": last["eval_loss"]}
        with open(arguments.out, "a") as file:
            file.write(json.dumps(run) + "\n")
        minutes = (time.perf_counter() - start) / 60
        left = minutes / done * (len(runs) - done)
        text = f"{task}, {form} {layer}, seed {seed}: {accuracy:.3f}"
        print(f"{text:50} run {done}/{len(runs)}, {left:.1f} min left", flush=True)
    print_table(results, tasks, columns)


if __name__ == "__main__":
    main()
