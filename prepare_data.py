"""
Text in, token shards out: what train.py reads.

    python prepare_data.py                                   the source of Python's standard library, as bytes
    python prepare_data.py book.txt notes/ --out data/mine   files, folders: text, .jsonl, .jsonl.gz, .parquet
    python prepare_data.py fineweb-edu --tokenizer o200k_base     or tinystories, shakespeare: need a network

The folder --out receives train_00000.npy, val_00000.npy, ... (flat uint16 or uint32 token ids, an end-of-text
token after each document) and meta.json (tokenizer, vocabulary, counts). A shard appears under its name only
when it is whole, then meta.json lists it: an interrupted run continues after the last listed shard, given the
same arguments.
"""

import gzip
import importlib
import json
import os
import re
import sys
import sysconfig
import time
import urllib.request
import zlib
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count, islice
from pathlib import Path
from typing import BinaryIO, TextIO

import numpy as np

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

# name -> what `datasets.load_dataset` is called with, and the share of the validation split
HUB = {
    "fineweb-edu": ({"path": "HuggingFaceFW/fineweb-edu", "name": "sample-10BT", "split": "train"}, 0.0005),
    "tinystories": ({"path": "roneneldan/TinyStories", "split": "train"}, 0.01),
}
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


def need(module: str):
    """An optional module, or how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise SystemExit(f"this needs {package}: pip install {package}") from None


# ------------------------------------------------------------------------------------------------------------
# Folders: whole files, one owner, and shards that are what was written

LOCK = ".flash_stu.lock"  # in each folder that prepare_data.py or train.py writes to
BLOCK = 1 << 20


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """`write` to a temporary file, then rename it: `path` is never half written."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(tmp, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except (OSError, RuntimeError) as e:  # torch.save turns a full disk into a RuntimeError
        with suppress(OSError):
            tmp.unlink()
        raise SystemExit(f"cannot write {path}: {e}. What was written before is intact.") from None


def lock(folder: str | Path, wait: bool = False) -> TextIO:
    """Own a folder for as long as the result is open: the operating system ends it with the process."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = open(Path(folder) / LOCK, "a+")  # noqa: SIM115 (the caller holds it)
    except OSError as e:
        raise SystemExit(f"cannot write to {folder}: {e}") from None
    file.seek(0)
    for attempt in count():
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:  # Windows; the byte that is locked must not be one of those that are read
                file.seek(1 << 30)
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            break
        except (BlockingIOError, PermissionError):
            file.seek(0)
            busy = f"{folder} is in use by process {file.read() or '?'}"
            if not wait:
                raise SystemExit(busy) from None
            if not attempt:
                print(f"{busy}: waiting for it", file=sys.stderr, flush=True)
            time.sleep(0.2)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def checksum(path: Path, full: bool) -> int:
    """CRC-32 of a file's size and all of its bytes, or of about 32 MiB spread over it."""
    size = path.stat().st_size
    crc, step = zlib.crc32(str(size).encode()), BLOCK if full else max(BLOCK, size // 32)
    with open(path, "rb") as f:
        for start in [*range(0, size, step), max(0, size - BLOCK)]:
            f.seek(start)
            crc = zlib.crc32(f.read(BLOCK), crc)
    return crc


def write_meta(folder: Path, meta: dict) -> None:
    """meta.json vouches for itself: with its checksum right, every entry is there and of its type."""
    whole = {"checksum": zlib.crc32(json.dumps(meta).encode())} | meta
    write_atomically(folder / "meta.json", lambda f: f.write(json.dumps(whole, indent=1).encode()))


def read_meta(folder: Path) -> dict | None:
    """What meta.json holds; None where there is none."""
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_bytes())
        whole = meta.pop("checksum") == zlib.crc32(json.dumps(meta).encode())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        raise SystemExit(f"cannot read {path}: {e}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        again = f"delete {folder} and prepare it again"
        raise SystemExit(f"{path} is damaged, edited or of an earlier version of prepare_data.py: {again}")
    return meta


def shard_path(folder: Path, split: str, index: int) -> Path:
    return folder / f"{split}_{index:05d}.npy"


def open_shards(folder: Path, meta: dict, full: bool) -> dict[str, list[np.memmap]]:
    """The shards that meta.json lists. The checksums hold for the header too: type, length, dimensions."""
    shards = {"train": [], "val": []}
    for split, opened in shards.items():
        for i, entry in enumerate(meta[split]["shards"]):
            path = shard_path(folder, split, i)
            try:
                if checksum(path, full) != entry["checksum" if full else "sample"]:
                    raise ValueError("it is not what prepare_data.py wrote")
                opened.append(np.lib.format.open_memmap(path, mode="r"))
            except (OSError, ValueError) as e:
                again = f"restore it, or delete {folder} and prepare it again"
                raise SystemExit(f"{path} cannot be used: {e}: {again}") from None
    return shards


def open_data(folder: str | Path, full: bool = False) -> tuple[dict, dict[str, list[np.memmap]]]:
    """meta.json and the shards of a prepared folder, checked: a sample of each shard, or every byte."""
    folder = Path(folder)
    meta = read_meta(folder)
    if meta is None:
        make = f"python prepare_data.py YOUR_FILES --out {folder}"
        raise SystemExit(f"{folder} holds no meta.json: make it with  {make}")
    if not meta["complete"]:
        raise SystemExit(
            f"{folder} is only half prepared: the same prepare_data.py command continues where it stopped"
        )
    return meta, open_shards(folder, meta, full)


# ------------------------------------------------------------------------------------------------------------
# Tokenizers


class ByteTokenizer:
    """A token is a byte of UTF-8. Byte 0 does not occur in text and ends a document."""

    n_vocab, eot = 256, 0

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(t for t in tokens if t).decode(errors="replace")


class TiktokenTokenizer:
    """One of OpenAI's encodings; tiktoken fetches its ranks once, or finds them in $TIKTOKEN_CACHE_DIR."""

    def __init__(self, name: str):
        try:
            self.encoding = need("tiktoken").get_encoding(name)
        except (OSError, ValueError) as e:
            raise SystemExit(f"no network, and no {name} in TIKTOKEN_CACHE_DIR? tiktoken: {e}") from None
        self.n_vocab, self.eot = self.encoding.n_vocab, self.encoding.eot_token

    def encode(self, text: str) -> np.ndarray:
        return self.encoding.encode_to_numpy(text, disallowed_special=())

    def decode(self, tokens: Iterable[int]) -> str:
        return self.encoding.decode([t for t in tokens if t < self.n_vocab])


def get_tokenizer(name: str) -> ByteTokenizer | TiktokenTokenizer:
    if name not in ("bytes", "gpt2", "o200k_base"):
        raise SystemExit(f"unknown tokenizer {name!r}: it is bytes, gpt2 or o200k_base")
    return ByteTokenizer() if name == "bytes" else TiktokenTokenizer(name)


def save_tokenizer(tokenizer: ByteTokenizer | TiktokenTokenizer, folder: str | Path) -> None:
    """Write it as transformers reads it, same token ids, into a saved model's folder; its end of text ends
    generation too."""
    transformers = need("transformers")
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    if isinstance(tokenizer, ByteTokenizer):
        ranks, special = {bytes([i]): i for i in range(1, 256)}, {"<|endoftext|>": 0}
    else:
        ranks, special = tokenizer.encoding._mergeable_ranks, tokenizer.encoding._special_tokens
        steps.insert(0, pre_tokenizers.Split(Regex(tokenizer.encoding._pat_str), "isolated"))
    eot = next(name for name, token in special.items() if token == tokenizer.eot)
    characters = bytes_to_unicode()  # its vocabularies write each byte as a printable character
    printable = {token: "".join(characters[byte] for byte in token) for token in ranks}
    vocab = {printable[token]: rank for token, rank in ranks.items()} | special
    cuts = ((token, token[:i], token[i:]) for token in ranks for i in range(1, len(token)))
    made = [cut for cut in cuts if cut[1] in ranks and cut[2] in ranks]  # (a token, the two it is made of)
    made.sort(key=lambda cut: [ranks[token] for token in cut])
    merges = [(printable[left], printable[right]) for _, left, right in made]
    fast = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, eos_token=eot, pad_token=eot, padding_side="left",
        clean_up_tokenization_spaces=False, model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip
    ends = {"eos_token_id": tokenizer.eot, "pad_token_id": tokenizer.eot}
    transformers.GenerationConfig(**ends).save_pretrained(folder)


# ------------------------------------------------------------------------------------------------------------
# Documents

RECORDS = (".jsonl", ".jsonl.gz", ".parquet")  # many documents a file; any other file is one text
SAFE_CUT = re.compile(r"(?<=\S)\n(?=[A-Za-z])")  # no token reaches across it


def find_files(source: str, folder: Path) -> list[Path]:
    """The files of a source, sorted; a download goes to the folder."""
    path = Path(source)
    if source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
        return [f for f in sorted(root.rglob("*.py")) if not skip & set(f.relative_to(root).parts)]
    if source == "shakespeare":
        path = folder / "input.txt"
        if not path.exists():
            try:
                text = urllib.request.urlopen(SHAKESPEARE, timeout=30).read()
            except OSError as e:
                raise SystemExit(f"cannot download {SHAKESPEARE}: {e}. Give the path of a copy") from None
            write_atomically(path, lambda f: f.write(text))
    if path.is_dir():
        return [f for f in sorted(path.rglob("*")) if f.is_file() and not f.name.startswith(".")]
    if not path.is_file():
        raise SystemExit(f"{path} is no file or folder, nor stdlib, shakespeare or, alone, {', '.join(HUB)}")
    return [path]


def read_documents(files: list[Path], sources: list[str], field: str) -> Iterator[tuple[str, int]]:
    """(text, bytes read so far) for each document. What a folder holds besides text is left out."""
    done, named, left_out = 0, set(map(Path, sources)), 0
    for path in files:
        where, size, records = path, path.stat().st_size, path.name.endswith(RECORDS)
        try:
            if path.suffix == ".parquet":
                table = need("pyarrow.parquet").ParquetFile(path)
                for i, batch in enumerate(table.iter_batches(1000, columns=[field])):
                    position = done + 1000 * i * size // table.metadata.num_rows
                    yield from ((text, position) for text in batch[field].to_pylist() if text)
            elif records:
                with open(path, "rb") as f:
                    for number, line in enumerate(gzip.GzipFile(fileobj=f) if path.suffix == ".gz" else f, 1):
                        where = f"{path}, line {number},"
                        if line.strip():
                            text = json.loads(line)[field].encode(errors="replace")  # no lone surrogates
                            yield text.decode(), done + f.tell()
            else:
                text = path.read_bytes().decode()
                if "\0" in text:
                    raise ValueError("NUL bytes")
                yield text, done + size
        except (ValueError, LookupError, TypeError, AttributeError, OSError, EOFError, zlib.error) as e:
            if records or path in named:
                wanted = f"records with a field {field!r}" if records else "UTF-8 text"
                raise SystemExit(f"cannot read {where} as {wanted}: {e!r}") from None
            left_out += 1
        done += size
    if left_out:
        print(f"\nleft out {left_out} files that are not UTF-8 text", file=sys.stderr)


def pieces(text: str, size: int = 1 << 17) -> Iterator[tuple[str, bool]]:
    """Cut a long text so that all cores share it and its tokens stay the same: (piece, is it the last)."""
    start = 0
    while cut := SAFE_CUT.search(text, start + size):
        yield text[start : cut.end()], False
        start = cut.end()
    yield text[start:], True


def split_pieces(documents, val_fraction: float, few: bool) -> Iterator[tuple[str, str, bool, int]]:
    """(split, piece, is it the last of its text, bytes read so far). Of a few texts the end of each is for
    validation, of many whole ones, chosen by their content: copies of a text are in the same split."""
    for text, read in documents:
        text = text.replace("\0", "")  # it would end the document of bytes
        if few:
            cut = int(len(text) * (1 - val_fraction))
            parts = {"train": text[:cut], "val": text[cut:]}
        else:
            parts = {"val" if zlib.crc32(text.encode()) < val_fraction * 2**32 else "train": text}
        read -= len(text)
        for split, part in parts.items():
            for piece, last in pieces(part) if part else ():
                read += len(piece)
                yield split, piece, last, read


# ------------------------------------------------------------------------------------------------------------
# Shards


def prepare(
    sources: list[str] | None = None, out: str | Path = "data/stdlib", tokenizer: str = "bytes",
    field: str = "text", val_fraction: float | None = None, shard_tokens: int = 100_000_000,
) -> dict:  # fmt: skip
    """Write the shards of the sources to `out` -> what meta.json holds. Safe to interrupt and to repeat."""
    sources, folder, tok = sources or ["stdlib"], Path(out), get_tokenizer(tokenizer)
    hub, default_fraction = HUB.get(" ".join(sources), (None, 0.1))
    val_fraction = default_fraction if val_fraction is None else val_fraction
    if shard_tokens < 1:
        raise SystemExit(f"--shard_tokens must be at least 1, got {shard_tokens}")
    if not 0 < val_fraction < 1:
        raise SystemExit(f"--val_fraction must lie between 0 and 1, got {val_fraction}")

    request = {"sources": sources, "tokenizer": tokenizer, "val_fraction": val_fraction, "field": field}
    meta = request | {"vocab_size": tok.n_vocab, "eot": tok.eot, "complete": False, "pieces": 0}
    meta |= {split: {"tokens": 0, "bytes": 0, "shards": []} for split in ("train", "val")}
    if old := read_meta(folder):
        meta = old
        changed = [f"{k} {meta.get(k)!r}, not {v!r}" for k, v in request.items() if meta.get(k) != v]
        if changed:
            raise SystemExit(f"{out} holds {'; '.join(changed)}: choose another --out, or delete that folder")
        if meta["complete"]:
            return meta
        print(f"continuing after {meta['train']['tokens'] + meta['val']['tokens']:,} tokens")

    files = [] if hub else [f for source in sources for f in find_files(source, folder)]
    documents, total = read_documents(files, sources, field), sum(f.stat().st_size for f in files)
    if hub:
        rows = need("datasets").load_dataset(streaming=True, **hub)
        documents = ((row[field], 0) for row in rows if row[field])
    few_texts = 0 < len(files) < 20 and not any(f.name.endswith(RECORDS) for f in files)
    work = split_pieces(documents, val_fraction, few_texts)
    pending = {"train": [], "val": []}  # arrays of tokens on their way to a shard

    def flush(**changes):
        for split, arrays in pending.items():
            if arrays:
                tokens, shards = np.concatenate(arrays), meta[split]["shards"]
                path = shard_path(folder, split, len(shards))
                write_atomically(path, lambda f, tokens=tokens: np.save(f, tokens))
                sums = {"sample": checksum(path, full=False), "checksum": checksum(path, full=True)}
                shards.append({"tokens": len(tokens)} | sums)
                arrays.clear()
        meta.update(changes)
        write_meta(folder, meta)

    eot = np.array([tok.eot], np.uint16 if tok.n_vocab <= 2**16 else np.uint32)
    new, done, before, shown = 0, meta["pieces"], 0, 0
    for *_, before in islice(work, done):  # the bytes that the shards hold already
        pass
    start = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # tiktoken works outside the interpreter lock
        while batch := list(islice(work, 256)):
            encoded = pool.map(tok.encode, [piece for _, piece, *_ in batch])
            for (split, piece, last, read), tokens in zip(batch, encoded):
                pending[split] += [tokens.astype(eot.dtype), eot] if last else [tokens.astype(eot.dtype)]
                meta[split]["tokens"] += len(tokens) + last
                meta[split]["bytes"] += len(piece.encode()) + last
                new += len(tokens)
            done, seconds = done + len(batch), time.perf_counter() - start
            if sum(map(len, pending["train"])) >= shard_tokens:
                flush(pieces=done)
            if seconds > shown + 1 or (total and read == total):
                shown, rate = seconds, max(1, read - before) / seconds  # bytes a second
                line = f"{new:,} tokens, {new / seconds:,.0f} tokens/s"
                if total:
                    bar = f"[{'#' * (30 * read // total):<30}]"
                    line = f"{bar} {line}, {rate / 1e6:.1f} MB/s, {(total - read) / rate:.0f} s left"
                print(f"\r{line} ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    if not meta["train"]["tokens"] or not meta["val"]["tokens"]:
        raise SystemExit(f"{', '.join(sources)}: not enough text for a training and a validation split")
    flush(pieces=done, complete=True)
    return meta


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", help="files, folders, or the name of a corpus above")
    parser.add_argument("--out", help="folder for the shards (default: data/<first source>)")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, gpt2 or o200k_base")
    parser.add_argument(
        "--field", default="text", help="holds the text in .jsonl, .parquet and Hugging Face data sets"
    )
    parser.add_argument("--val_fraction", type=float, help="share of the validation split (0.1)")
    parser.add_argument("--shard_tokens", type=int, default=100_000_000, help="tokens a shard")
    args = parser.parse_args()
    name = Path(args.sources[0]).resolve().stem if args.sources else "stdlib"
    args.out = args.out or f"data/{name}" + ("" if args.tokenizer == "bytes" else f"-{args.tokenizer}")
    meta = prepare(**vars(args))
    for split in ("train", "val"):
        print(f"{split}: {meta[split]['tokens']:,} tokens, {len(meta[split]['shards'])} shards")
    print(f"{args.out} is ready: python train.py --data {args.out}")


if __name__ == "__main__":
    main()
