"""
Text in, token shards out: what train.py reads.

    python prepare_data.py                                   the source of Python's standard library, as bytes
    python prepare_data.py book.txt notes/ --out data/mine   files, folders: text, .jsonl, .jsonl.gz, .parquet
    python prepare_data.py tinystories --val_fraction 0.01     or fineweb-edu, from the Hugging Face Hub

The folder --out receives train_00000.npy, val_00000.npy, ... (flat uint16 or uint32 token ids, an end-of-text
token after each document) and meta.json (the request, the files read, counts, checksums), which lists a shard
when it is whole: the same command continues an interrupted run, and checks a finished one.
"""

import gzip
import importlib
import json
import os
import re
import sys
import sysconfig
import zlib
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path

import numpy as np

HUB = {  # name -> a repository of the Hugging Face Hub, and which of its files
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample/10BT/*.parquet"),
    "tinystories": ("roneneldan/TinyStories", "data/train-*.parquet"),
}
LOCK = ".flash_stu.lock"  # in each folder that prepare_data.py or train.py writes to
BLOCK = 1 << 20  # bytes of a shard that have one checksum
SPLITS, END = ("train", "val"), "<|endoftext|>"


@contextmanager
def told(trouble: str, remedy: str = ""):
    """What goes wrong with a user's files is one sentence."""
    try:
        yield
    except Exception as e:  # noqa: BLE001 (libraries have many)
        raise SystemExit(f"{trouble}: {e!s:.200}{remedy}") from None


def need(module: str):
    with told(f"an optional module is needed:  pip install {module.partition('.')[0]}"):
        return importlib.import_module(module)


def write_atomically(path: Path, write: Callable) -> None:
    """`write` to a temporary file, then rename it: `path` is never half written."""
    tmp = path.with_name(path.name + ".tmp")
    with told(f"cannot write {path}", ". What was written before is intact."), ExitStack() as at_the_end:
        at_the_end.callback(tmp.unlink, missing_ok=True)  # a full disk needs its space
        with open(tmp, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)


def lock(folder: str | Path, wait: bool = False):
    """Own a folder while the result is open; the operating system ends it with the process."""
    path = Path(folder) / LOCK
    with told(f"cannot write to {folder}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")  # noqa: SIM115 (the caller holds it)
        with suppress(ImportError):  # Windows has no such lock
            fcntl = importlib.import_module("fcntl")
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SystemExit(f"{folder} is in use by process {path.read_text()}") from None
        path.write_text(str(os.getpid()))
        return file


# ------------------------------------------------------------------------------------------------------------
# Tokenizers


class TiktokenTokenizer:
    """bytes (of UTF-8; 0 ends a document), or an encoding that tiktoken fetches or has in TIKTOKEN_CACHE_DIR."""

    def __init__(self, name: str):
        if name not in ("bytes", "gpt2", "o200k_base"):
            raise SystemExit(f"unknown tokenizer {name!r}: it is bytes, gpt2 or o200k_base")
        ranks, tiktoken = {bytes([i]): i for i in range(256)}, need("tiktoken")
        ours = {"pat_str": r"[\s\S]{1,64}", "mergeable_ranks": ranks, "special_tokens": {END: 0}}
        with told(f"no network, and no {name} in TIKTOKEN_CACHE_DIR? tiktoken"):
            encoding = tiktoken.Encoding(name, **ours) if name == "bytes" else tiktoken.get_encoding(name)
        self.encoding, self.n_vocab, self.eot = encoding, encoding.n_vocab, encoding.eot_token

    def encode(self, text: str) -> np.ndarray:
        return self.encoding.encode_to_numpy(text.encode(errors="replace").decode(), disallowed_special=())

    def decode(self, tokens: Iterable[int]) -> str:
        ranks = len(self.encoding._mergeable_ranks)  # not every id above is a token's
        special = self.encoding.is_special_token
        return self.encoding.decode([t for t in tokens if t != self.eot and (t < ranks or special(t))])


get_tokenizer = TiktokenTokenizer  # by name


def save_tokenizer(tokenizer: TiktokenTokenizer, folder: str | Path) -> None:
    """Write it as transformers reads it, with the same ids, into a saved model's folder. Padding is byte FF,
    which no text holds, on the right, to train; batches to generate from want padding_side="left"."""
    transformers = need("transformers")
    special, eot = dict(tokenizer.encoding._special_tokens), tokenizer.eot
    ranks = {token: i for token, i in tokenizer.encoding._mergeable_ranks.items() if i != eot}
    pad = special["<|padding|>"] = ranks.pop(b"\xff")
    make = need("transformers.convert_slow_tokenizer").TikTokenConverter(pattern=tokenizer.encoding._pat_str)
    make.load_tiktoken_bpe = lambda _: ranks | {name.encode(): i for name, i in special.items()}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=make.converted(), eos_token=END, pad_token="<|padding|>", padding_side="right",
        clean_up_tokenization_spaces=False, model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip
    transformers.GenerationConfig(eos_token_id=eot, pad_token_id=pad).save_pretrained(folder)


# ------------------------------------------------------------------------------------------------------------
# Sources -> files -> texts -> pieces -> tokens -> shards
#
# A piece ends before a space or behind a newline, where no token reaches across. Where 2^17 characters hold
# no such place it ends all the same: tiktoken gives up on a million spaces.
PIECE = re.compile(r".{16384,131072}?(?:(?<=\S)(?= )|(?<=\S)\n(?=\w)|\Z)|.{1,131072}", re.DOTALL)
NO_TEXT = re.compile("[\0\ud800-\udfff]")  # what UTF-8 has no byte for, and the end of a document of bytes


def walk(folder: Path, left_out: dict) -> Iterator[Path]:
    """The files below a folder, in an order that stays."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            left_out.setdefault("hidden", []).append(path)
        elif os.path.isfile(path):
            yield path
        elif path.is_symlink() or not os.path.isdir(path) or (path / LOCK).exists():
            left_out.setdefault("linked folders, pipes, outputs of prepare_data.py", []).append(path)
        else:
            yield from walk(path, left_out)


def find_files(sources: list[str], left_out: dict) -> dict[str, list[int]]:
    """{path: size and time} of each file, in the order in which they are read."""
    files = {}
    for source in sources:
        path = Path(source)
        if source == "stdlib":
            root = Path(sysconfig.get_paths()["stdlib"])
            skip = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
            found = [f for f in sorted(root.rglob("*.py")) if not skip & set(f.relative_to(root).parts)]
        elif source in HUB:
            fetch, (repo, pattern) = need("huggingface_hub").snapshot_download, HUB[source]
            found = sorted(Path(fetch(repo, repo_type="dataset", allow_patterns=pattern)).glob(pattern))
        elif source and path.is_file():
            found = [path]
        elif source and path.is_dir() and not (path / LOCK).exists():
            found = walk(path, left_out)
        else:
            raise SystemExit(f"{source!r} is no file or folder of texts, nor stdlib, {', '.join(HUB)}")
        files |= {str(f): [f.stat().st_size, f.stat().st_mtime_ns] for f in found}
    return files


def read_texts(files: Iterable[str], field: str, left_out: dict) -> Iterator[str]:
    """The text of each file, or of each record of a file."""
    for path in files:
        with told(f"cannot read {path}"), open(path, "rb") as f:
            if path.lower().endswith(".parquet"):
                batches = need("pyarrow.parquet").ParquetFile(f).iter_batches(1000, columns=[field])
                texts = (text for batch in batches for text in batch[field].to_pylist())
            elif path.lower().endswith((".jsonl", ".jsonl.gz")):
                texts = filter(bytes.strip, gzip.GzipFile(fileobj=f) if path.lower().endswith(".gz") else f)
            else:
                texts = [f.read().decode("utf-8-sig", "surrogateescape")]
            for number, text in enumerate(texts, 1):
                if isinstance(text, bytes):  # a line of .jsonl
                    with suppress(ValueError, LookupError, TypeError, RecursionError):
                        text = json.loads(text.decode("utf-8-sig"))[field]
                if isinstance(text, str) and not NO_TEXT.search(text):
                    yield text
                else:
                    why = f"no UTF-8 text, or none in the field {field!r}"
                    left_out.setdefault(why, []).append(f"{path}, record {number}")


def split_pieces(texts: Iterable[str], val_fraction: float, few: bool) -> Iterator[tuple[str, str, bool]]:
    """(split, piece, is it the last of its text): all cores share a long text. Of a few texts the end of each
    is for validation, of many whole ones, chosen by their content: copies of a text are in one split."""
    for text in texts:
        train = 1 - val_fraction if few else zlib.crc32(text.encode()) >= val_fraction * 2**32
        cut = int(len(text) * train)
        for split, part in zip(SPLITS, (text[:cut], text[cut:])):
            pieces = PIECE.findall(part)
            yield from ((split, piece, i == len(pieces)) for i, piece in enumerate(pieces, 1))


def read_meta(folder: Path) -> dict | None:
    """meta.json vouches for itself: with its checksum right, every entry is there and of its type."""
    path = folder / "meta.json"
    with told(f"cannot use {path}", f": delete {folder} and prepare it again"):
        if path.exists():
            meta = json.loads(path.read_bytes())
            if meta.pop("checksum", None) != zlib.crc32(json.dumps(meta).encode()):
                raise ValueError("damaged, edited, or of an earlier version of prepare_data.py")
            return meta


def checksums(path: Path, step: int = 1) -> list[int]:
    """The size of a file, and the CRC-32 of every block, or of every `step`th."""
    data = np.memmap(path, np.uint8, mode="r")
    return [len(data), *(zlib.crc32(data[i : i + BLOCK]) for i in range(0, len(data), BLOCK * step))]


def open_data(folder: str | Path, full: bool = False) -> tuple[dict, dict[str, list[np.memmap]]]:
    """meta.json and the shards of a prepared folder, checked: some 32 MiB of each shard, or all of it."""
    folder, opened = Path(folder), {split: [] for split in SPLITS}
    meta = read_meta(folder)
    if not meta or not meta["complete"]:
        raise SystemExit(f"{folder} is not complete:  python prepare_data.py YOUR_FILES --out {folder}")
    for split, shards in opened.items():
        for i, sums in enumerate(meta[split]["shards"]):
            path, step = folder / f"{split}_{i:05d}.npy", 1 if full else max(1, len(sums) // 32)
            with told(f"cannot use {path}", f": delete {folder} and prepare it again"):
                if checksums(path, step) != sums[:1] + sums[1::step]:
                    raise ValueError("it is not what prepare_data.py wrote")
                shards.append(np.load(path, mmap_mode="r"))
    return meta, opened


def write_shards(folder: Path, meta: dict, waiting: dict[str, list]) -> None:
    """All tokens that wait, a shard for each split; then meta.json, which lists them."""
    for split, arrays in waiting.items():
        if arrays:
            path = folder / f"{split}_{len(meta[split]['shards']):05d}.npy"
            write_atomically(path, lambda f, arrays=arrays: np.save(f, np.concatenate(arrays)))
            meta[split]["shards"].append(checksums(path))
            arrays.clear()
    whole = {"checksum": zlib.crc32(json.dumps(meta).encode())} | meta
    write_atomically(folder / "meta.json", lambda f: f.write(json.dumps(whole).encode()))


def prepare(
    sources: list[str] | None = None, out: str | Path = "data/stdlib", tokenizer: str = "bytes",
    field: str = "text", val_fraction: float = 0.1, shard_tokens: int = 100_000_000,
) -> dict:  # fmt: skip
    """Write the shards of the sources to `out` -> what meta.json holds. Safe to interrupt and to repeat.
    No sources: the default data; once complete it is good; another process that makes it is waited for."""
    folder, tok, left_out, default = Path(out), get_tokenizer(tokenizer), {}, sources is None
    if default and (meta := read_meta(folder)) and meta["complete"]:
        return meta
    sources = sources or ["stdlib"]
    if shard_tokens < 1 or not 0 < val_fraction < 1:
        raise SystemExit(f"need {shard_tokens = } of at least 1, {val_fraction = } between 0 and 1")
    if folder.resolve() in [Path(source).resolve() for source in sources]:
        raise SystemExit(f"{folder} is to be written, it cannot be a source")
    with lock(folder, wait=default):
        files = find_files(sources, left_out)
        request = {"sources": sources, "tokenizer": tokenizer, "val_fraction": val_fraction, "field": field}
        request |= {"vocab_size": tok.n_vocab, "eot": tok.eot} | {f"file {f}": s for f, s in files.items()}
        new = {s: {"tokens": 0, "bytes": 0, "shards": []} for s in SPLITS} | {"complete": False, "pieces": 0}
        meta = read_meta(folder) or request | new
        for name in sorted((request | meta).keys() - new):
            if (was := meta.get(name, "absent")) != (now := request.get(name, "absent")):
                raise SystemExit(f"{out} was made with {name}: {was}, now {now}: choose another --out")
        if meta["complete"]:
            return meta
        n = int(min(20 / min(val_fraction, 1 - val_fraction), 1e6))  # texts give about 20 to a split
        few = len(set(map(hash, islice(read_texts(files, field, {}), 2 * n)))) < n
        pieces = split_pieces(read_texts(files, field, left_out), val_fraction, few)
        todo = islice(pieces, meta["pieces"], None)  # what no shard holds yet
        waiting, waits = {split: [] for split in SPLITS}, 0
        eot = np.array([tok.eot], np.uint16 if tok.n_vocab <= 2**16 else np.uint32)
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # tiktoken works outside the interpreter lock
            while batch := list(islice(todo, 256)):
                encoded = pool.map(tok.encode, [piece for _, piece, _ in batch])
                for (split, piece, last), ids in zip(batch, encoded):
                    waiting[split] += [ids.astype(eot.dtype), eot[:last]]
                    waits += len(ids) + last
                    meta[split]["tokens"] += len(ids) + last
                    meta[split]["bytes"] += len(piece.encode()) + last
                    meta["pieces"] += 1
                    if waits >= shard_tokens:
                        write_shards(folder, meta, waiting)
                        waits = 0
                print(f"\r{meta['train']['tokens']:,} tokens to train", end="", file=sys.stderr, flush=True)
        for reason, names in left_out.items():
            print(f"\nleft out {len(names)}: {reason} ({names[0]})", end="", file=sys.stderr)
        meta["complete"] = all(meta[split]["tokens"] for split in SPLITS)
        if not meta["complete"]:
            raise SystemExit(f"\n{', '.join(sources)}: not enough text for two splits, train and val")
        write_shards(folder, meta, waiting)
        return meta


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", default=["stdlib"], help="files, folders, or a name from above")
    parser.add_argument("--out", help="folder for the shards (default: data/<first source>)")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, gpt2 or o200k_base")
    parser.add_argument("--field", default="text", help="holds the text in .jsonl, .parquet and Hub data")
    parser.add_argument("--val_fraction", type=float, default=0.1, help="share of the validation split")
    parser.add_argument("--shard_tokens", type=int, default=100_000_000, help="tokens a shard")
    args = parser.parse_args()
    coding = "" if args.tokenizer == "bytes" else f"-{args.tokenizer}"
    args.out = args.out or f"data/{Path(args.sources[0]).resolve().stem}{coding}"
    try:
        prepare(**vars(args))
        open_data(args.out, full=True)
    except (OSError, KeyboardInterrupt) as e:
        raise SystemExit(str(e) or "interrupted: the same command continues") from None
    print(f"\n{args.out} is ready: python train.py --data {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
