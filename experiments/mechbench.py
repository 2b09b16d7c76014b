"""Does an STU layer learn what a language model must do? A suite that others wrote asks it.

mechanistic-bench, of the lab that invented the STU, holds small tasks (copy this, find what
followed that, keep the longest run) with a model and a training loop of its own. This script runs
them as they are, and exchanges one thing: where that model builds an STU, it may get ours instead.

    git clone https://github.com/hazan-lab/mechanistic-bench
    python experiments/mechbench.py mechanistic-bench               all of it: an hour of one core
    python experiments/mechbench.py mechanistic-bench --tasks copy --seeds 1 --layers ours

The layers that are compared, in a model of STU blocks only ("pure") and alternating with attention:
    ours       the STU of stu.py, each branch with filter weights of its own
    theirs     the suite's STU, whose two branches share one matrix of filter weights
    attention  the suite's attention, in every block

Every run adds a line to --out, and a run that is already there is not done again. At the end, and
with --only_table at once, a table is printed: the share of right answers, its mean
over the seeds and (the worst of them).
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
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
BLOCKS = {
    "pure": ["stu"] * 4,
    "alternating": ["attn", "stu", "attn", "stu"],
    "only": ["attn"] * 4,
}


def read_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", help="the folder of mechanistic-bench")
    parser.add_argument("--tasks", default=",".join(TASKS), help="names, separated by commas")
    parser.add_argument("--layers", default="ours,theirs,attention")
    parser.add_argument("--forms", default="pure,alternating")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to this number")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--warmup_steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--out", default="runs/mechbench.jsonl", help="a line for every run")
    parser.add_argument("--only_table", action="store_true", help="train nothing")
    return parser.parse_args()


def with_our_layer(build_theirs):
    """The suite's function that builds the layers, with our STU in place of its own."""

    def build(block_type, config):
        if block_type != "stu":
            return build_theirs(block_type, config)
        return STU(
            config.d_model,
            config.d_model,
            config.max_seq_len,
            config.num_eigh,
            use_hankel_L=config.use_hankel_L,
        )

    return build


def train(task, blocks, seed, arguments):
    """One run of the suite's own training loop -> its last evaluation."""
    from mechbench.models import MechConfig
    from mechbench.training.trainer import TrainConfig, train_loop

    length, vocab_size = 64, 64
    model_config = MechConfig(
        vocab_size=vocab_size, d_model=64, n_heads=4, max_seq_len=length, block_types=blocks
    )
    with tempfile.TemporaryDirectory() as folder:
        train_config = TrainConfig(
            task=task,
            seq_len=length,
            vocab_size=vocab_size,
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


def settings_of(arguments):
    """What all runs of a table have in common."""
    return {name: getattr(arguments, name) for name in ("steps", "warmup_steps", "lr")}


def read_results(path, settings):
    """{(task, form, layer): {seed: share of right answers}} of earlier runs with these settings."""
    results = defaultdict(dict)
    if path.exists():
        for line in path.read_text().splitlines():
            run = json.loads(line)
            if settings.items() <= run.items():
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
    source = Path(arguments.checkout) / "src"
    if not (source / "mechbench").is_dir():
        raise SystemExit(f"{arguments.checkout} is not a checkout of mechanistic-bench")
    sys.path.insert(0, str(source))
    from mechbench.models import model as suite

    columns = []
    for layer in arguments.layers.split(","):
        forms = ["only"] if layer == "attention" else arguments.forms.split(",")
        columns += [(form, layer) for form in forms]

    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    settings = settings_of(arguments)
    results = read_results(out, settings)
    torch.set_num_threads(1)  # the matrices are small: more threads would wait for each other
    tasks = arguments.tasks.split(",")
    seeds = [] if arguments.only_table else range(1, arguments.seeds + 1)
    build_theirs = suite._build_mixer
    for seed, task, (form, layer) in product(seeds, tasks, columns):
        if seed in results[task, form, layer]:
            continue
        suite._build_mixer = with_our_layer(build_theirs) if layer == "ours" else build_theirs
        last = train(task, BLOCKS[form], seed, arguments)
        accuracy = last["tok_acc"]
        results[task, form, layer][seed] = accuracy
        run = {"task": task, "form": form, "layer": layer, "seed": seed, **settings}
        run |= {"accuracy": accuracy, "loss": last["eval_loss"]}
        with open(out, "a") as file:
            file.write(json.dumps(run) + "\n")
        print(f"{task}, {form} {layer}, seed {seed}: {accuracy:.3f}", flush=True)
    print_table(results, tasks, columns)


if __name__ == "__main__":
    main()
