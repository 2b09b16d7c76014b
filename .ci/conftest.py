"""What the tests in this folder share: a small model, and the same as transformers loads it."""

import os
import tempfile
from pathlib import Path

import pytest
import torch

hf_home = tempfile.TemporaryDirectory()
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": hf_home.name}
transformers = pytest.importorskip("transformers")  # before stu, which then has the classes

import prepare_data
from stu import FlashSTU, FlashSTUConfig

REPOSITORY = Path(__file__).parent.parent
VARIANTS = [
    {},
    {"use_attn": False},
    {"use_stu": False, "bias": True},
    {"use_approx": False, "use_hankel_L": True, "softcap": 0.0},
    {"stu_enable_mlp_sandwich": True},
    {"use_tensorized": True, "num_eigh": 3},
]


def name_of(options):
    return "+".join(options) or "default"


in_all_variants = pytest.mark.parametrize("pair", VARIANTS, ids=name_of, indirect=True)


def make_model(**options):
    """Not trained, but its greedy text is no repetition of one token. The vocabulary is bytes."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layers": 4, "n_heads": 4, "seq_len": 48, "window_size": 12}
    sizes |= {"vocab_size": 256, "torch_dtype": "float32"}
    model = FlashSTU(FlashSTUConfig(**sizes | options)).eval()
    with torch.no_grad():
        for p in model.layers.parameters():
            p.mul_(2)
    return model


def load(folder, auto_class=transformers.AutoModelForCausalLM, **options):
    return auto_class.from_pretrained(folder, trust_remote_code=True, **options).eval()


def load_tokenizer(folder, **options):
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True, **options)


@pytest.fixture
def pair(request, tmp_path):
    """A model, and the same as transformers loads it from the folder tmp_path/model."""
    model = make_model(**getattr(request, "param", {}))
    model.save_pretrained(tmp_path / "model")
    prepare_data.save_tokenizer(prepare_data.get_tokenizer("bytes"), tmp_path / "model")
    return model, load(tmp_path / "model")


def random_ids(batch_size, length):
    return torch.randint(1, 256, (batch_size, length))


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()
