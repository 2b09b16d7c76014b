"""Is it the layers, or the optimizer? nanoGPT's model, trained exactly as ours is.

    git clone https://github.com/karpathy/nanoGPT
    python experiments/nanogpt.py nanoGPT --n_layers 5 --n_embd 192 --n_heads 6

The first argument is the folder of the checkout, and all others are those of train.py, which this
script runs with one thing exchanged: the model is nanoGPT's. Data, windows, Muon, schedule and
evaluation are the same. Of the settings of a model those count which nanoGPT has too: vocab_size,
seq_len, n_layers, n_heads, n_embd and dropout. It takes as long as train.py does.

The run ends after its last step. No folder with the model is written, because stu.py could not read
that.
"""

import importlib.util
import runpy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

TOP = Path(__file__).parent.parent
sys.path.insert(0, str(TOP))
import stu


def load_nanogpt(checkout):
    """The file model.py of the checkout, as a module."""
    path = Path(checkout) / "model.py"
    if not path.is_file():
        sys.exit(f"{checkout} is not a checkout of nanoGPT: it holds no model.py")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_blocks_of(nanogpt):
    """A class that train.py takes for FlashSTU, and that computes what nanoGPT's GPT does."""

    class NanoGPT(stu.FlashSTU):
        def __init__(self, config):
            nn.Module.__init__(self)
            self.config = config
            sizes = nanogpt.GPTConfig(
                block_size=config.seq_len,
                vocab_size=config.vocab_size,
                n_layer=config.n_layers,
                n_head=config.n_heads,
                n_embd=config.n_embd,
                dropout=config.dropout,
                bias=False,
            )
            gpt = nanogpt.GPT(sizes)  # with its weights drawn as nanoGPT does
            # The parts get the names that train.py looks for.
            self.tok_emb = gpt.transformer.wte
            self.positions = gpt.transformer.wpe
            self.dropout = gpt.transformer.drop
            self.layers = gpt.transformer.h
            self.norm = gpt.transformer.ln_f

        def hidden(self, input_ids, state=None, use_cache=False, attention_mask=None):
            """As in FlashSTU, but the state is the text so far: it is read again at each token."""
            text = input_ids
            if state is not None:
                text = torch.cat([state[0], input_ids], dim=1)
            text = text[:, -self.config.seq_len :]
            position = torch.arange(text.shape[1], device=text.device)
            x = self.dropout(self.tok_emb(text) + self.positions(position))
            for layer in self.layers:
                x = layer(x)
            x = self.norm(x)[:, -input_ids.shape[1] :]
            return x, ([text] if use_cache else None)

        def logits(self, x):
            return F.linear(x, self.tok_emb.weight)

        def save_pretrained(self, folder):
            sys.exit()

    return NanoGPT


def main():
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if len(sys.argv) == 2 else 2)
    _, checkout, *flags = sys.argv
    stu.FlashSTU = with_blocks_of(load_nanogpt(checkout))
    sys.argv = ["train.py", *flags]
    runpy.run_path(str(TOP / "train.py"), run_name="__main__")


if __name__ == "__main__":
    main()
