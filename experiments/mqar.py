"""Can an STU layer recall? Zoology's task of many associations, with Zoology's model and training.

A sequence lists pairs of a key and a value; later keys come back, and the model must say each one's
value (multi-query associative recall, arXiv 2312.04927). The values are new in every sequence, so
nothing can be known by heart. Fixed filters cannot look anything up; attention can. The question is
what a layer of each does for the other.

    git clone https://github.com/HazyResearch/zoology
    pip install einops pandas pydantic rich tqdm torchvision wandb     what Zoology imports
    python experiments/mqar.py zoology        ten minutes of one core; a line for each model

The models have two layers: "attention" twice, "stu" twice, or "hybrid", an STU and then attention.
The accuracies of the seeds are printed, one after the other, and the time left goes to stderr.
"""

import argparse
import contextlib
import io
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from stu import STU

MODELS = ["attention", "stu", "hybrid"]


class SpectralMixer(nn.Module):
    """The STU as Zoology's ModuleConfig builds a mixer: by name, with d_model and layer_idx."""

    def __init__(self, d_model, seq_len, layer_idx=None):
        super().__init__()
        self.stu = STU(d_model, d_model, seq_len)

    def forward(self, x):
        return self.stu(x)

    def state_size(self, sequence_length):
        """Numbers to remember of a sequence: all inputs, as a convolution does."""
        return sequence_length * self.stu.d_in


def read_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", help="the folder of zoology")
    parser.add_argument("--models", default=",".join(MODELS), help="separated by commas")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to this number")
    parser.add_argument("--seq_len", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=8, help="of key and value, in a sequence")
    parser.add_argument("--vocab_size", type=int, default=256)
    parser.add_argument("--d_model", type=int, default=64)
    parser.add_argument("--examples", type=int, default=10_000, help="sequences to train on")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    arguments = parser.parse_args()
    if not (Path(arguments.checkout) / "zoology").is_dir():
        parser.error(f"{arguments.checkout} is not a checkout of zoology")
    for name in arguments.models.split(","):
        if name not in MODELS:
            parser.error(f"--models: there is no {name!r}, only {', '.join(MODELS)}")
    if min(arguments.seeds, arguments.examples, arguments.epochs, arguments.batch_size) < 1:
        parser.error("--seeds, --examples, --epochs and --batch_size must be at least 1")
    if arguments.d_model < 1 or arguments.pairs < 1 or not arguments.lr > 0:
        parser.error("--d_model and --pairs must be at least 1, and --lr above 0")
    if arguments.seq_len % 2 == 1 or arguments.seq_len < 4 * arguments.pairs:
        parser.error("--seq_len must be even, and at least four times --pairs")
    if arguments.vocab_size <= arguments.seq_len:
        parser.error("--vocab_size must be larger than --seq_len")
    return arguments


def sequence_mixer(name, seq_len):
    """The mixer of both layers, as Zoology's configuration names it."""
    from zoology.config import ModuleConfig

    attention = {"name": "zoology.mixers.attention.MHA", "kwargs": {"num_heads": 1}}
    spectral = {"name": "__main__.SpectralMixer", "kwargs": {"seq_len": seq_len}}
    layers = {
        "attention": [attention],
        "stu": [spectral],
        "hybrid": [spectral, attention],
    }
    return ModuleConfig(name="zoology.mixers.hybrid.Hybrid", kwargs={"configs": layers[name]})


def train(name, seed, arguments):
    """Train one model on one seed -> (share of right values, parameters)."""
    from zoology.config import DataConfig, LoggerConfig, ModelConfig, TrainConfig
    from zoology.data.multiquery_ar import MQARConfig
    from zoology.data.utils import prepare_data
    from zoology.logger import WandbLogger
    from zoology.model import LanguageModel
    from zoology.train import Trainer
    from zoology.utils import set_determinism

    task = partial(
        MQARConfig,
        vocab_size=arguments.vocab_size,
        input_seq_len=arguments.seq_len,
        num_kv_pairs=arguments.pairs,
    )
    data_config = DataConfig(
        train_configs=[task(num_examples=arguments.examples)],
        test_configs=[task(num_examples=1000)],
        batch_size=arguments.batch_size,
        seed=seed,
    )
    model_config = ModelConfig(
        d_model=arguments.d_model,
        n_layers=2,
        vocab_size=arguments.vocab_size,
        max_position_embeddings=arguments.seq_len,
        sequence_mixer=sequence_mixer(name, arguments.seq_len),
    )
    config = TrainConfig(data=data_config, model=model_config, logger=LoggerConfig())
    set_determinism(seed)
    model = LanguageModel(model_config)
    # Since its last commit the model returns hidden states unless it is told otherwise, and its
    # trainer, which needs logits, does not tell it
    model.forward = partial(model.forward, return_embeddings=False)
    train_loader, test_loader = prepare_data(data_config)
    trainer = Trainer(
        model,
        train_loader,
        test_loader,
        max_epochs=arguments.epochs,
        learning_rate=arguments.lr,
        device="cpu",
        logger=WandbLogger(config),
    )
    trainer.fit()
    metrics = trainer.test(arguments.epochs)
    n_params = sum(p.numel() for p in model.parameters())
    return metrics["valid/accuracy"], n_params


def main():
    arguments = read_arguments()
    sys.path.insert(0, arguments.checkout)
    import zoology.model

    # Zoology's embeddings ask for a CUDA device unless they are told of another one
    zoology.model.TokenEmbeddings = partial(zoology.model.TokenEmbeddings, device="cpu")
    torch.set_num_threads(1)
    names = arguments.models.split(",")
    n_runs = len(names) * arguments.seeds
    done = 0
    start = time.perf_counter()
    for name in names:
        accuracies = []
        for seed in range(1, arguments.seeds + 1):
            log = io.StringIO()
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                accuracy, n_params = train(name, seed, arguments)
            accuracies.append(accuracy)
            done += 1
            minutes = (time.perf_counter() - start) / 60
            left = minutes / done * (n_runs - done)
            print(f"run {done}/{n_runs}, {left:.1f} min left", file=sys.stderr, flush=True)
        each = ", ".join(f"{accuracy:.3f}" for accuracy in accuracies)
        print(f"{name}, {n_params} parameters: {each}", flush=True)


if __name__ == "__main__":
    main()
