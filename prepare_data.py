"""
Text in, token shards out: what train.py reads.

    python prepare_data.py                                  the source code of Python's own standard library, as bytes
    python prepare_data.py book.txt notes/ --out data/mine  any files or folders: text, .jsonl, .jsonl.gz, .parquet
    python prepare_data.py fineweb-edu --tokenizer o200k_base     also: tinystories, shakespeare (need a network)

The folder --out receives train_00000.npy, val_00000.npy, ... (flat uint16 or uint32 token ids, an end-of-text token
after each document) and meta.json (tokenizer, vocabulary, counts). A shard appears under its name only when it is
whole, then meta.json lists it: an interrupted run continues after the last listed shard, given the same arguments.
"""

import argparse
import gzip
import json
import os
import re
import sys
import sysconfig
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Iterable, Iterator

import numpy as np

# name -> (what `datasets.load_dataset` is called with, validation fraction)
HUB = {
    "fineweb-edu": (dict(path="HuggingFaceFW/fineweb-edu", name="sample-10BT", split="train"), 0.0005),
    "tinystories": (dict(path="roneneldan/TinyStories", split="train"), 0.01),
}
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


# -- tokenizers --------------------------------------------------------------------------------------------------------


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
            import tiktoken
        except ImportError:
            raise SystemExit("this tokenizer needs tiktoken: pip install tiktoken") from None
        try:
            self.encoding = tiktoken.get_encoding(name)
        except Exception as e:
            raise SystemExit(f"tiktoken could not load {name!r} (no network, and not in TIKTOKEN_CACHE_DIR?): {e}")
        self.n_vocab, self.eot = self.encoding.n_vocab, self.encoding.eot_token

    def encode(self, text: str) -> np.ndarray:
        return self.encoding.encode_to_numpy(text, disallowed_special=())

    def decode(self, tokens: Iterable[int]) -> str:
        return self.encoding.decode([t for t in tokens if t < self.n_vocab])


def get_tokenizer(name: str) -> ByteTokenizer | TiktokenTokenizer:
    if name not in ("bytes", "gpt2", "o200k_base"):
        raise SystemExit(f"unknown tokenizer {name!r}: it is bytes, gpt2 or o200k_base")
    return ByteTokenizer() if name == "bytes" else TiktokenTokenizer(name)


def save_tokenizer(tokenizer: ByteTokenizer | TiktokenTokenizer, folder: str) -> None:
    """Write the tokenizer as transformers reads it, same token ids, into the folder of a saved model; its end of text
    ends the generation too."""
    try:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
        from transformers import GenerationConfig, PreTrainedTokenizerFast
        from transformers.convert_slow_tokenizer import bytes_to_unicode
    except ImportError:
        raise SystemExit("saving a tokenizer for transformers needs it: pip install transformers") from None
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    characters = bytes_to_unicode()  # its vocabularies write each byte as a printable character
    if isinstance(tokenizer, ByteTokenizer):
        eot, merges = "<|endoftext|>", []
        vocab = {character: byte for byte, character in characters.items() if byte} | {eot: 0}
    else:
        encoding, ranks = tokenizer.encoding, tokenizer.encoding._mergeable_ranks
        cuts = ((r, ranks.get(p[:i]), ranks.get(p[i:]), p, i) for p, r in ranks.items() for i in range(1, len(p)))
        cuts = sorted(cut for cut in cuts if None not in cut)  # a token of rank r is made at step r, of two tokens
        printable = {piece: "".join(characters[byte] for byte in piece) for piece in ranks}
        merges = [(printable[piece[:i]], printable[piece[i:]]) for *_, piece, i in cuts]
        vocab = {printable[piece]: rank for piece, rank in ranks.items()} | encoding._special_tokens
        eot = encoding.decode([tokenizer.eot])
        steps.insert(0, pre_tokenizers.Split(Regex(encoding._pat_str), "isolated"))
    fast = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=fast, eos_token=eot, pad_token=eot, padding_side="left", clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip
    GenerationConfig(eos_token_id=tokenizer.eot, pad_token_id=tokenizer.eot).save_pretrained(folder)


# -- documents ---------------------------------------------------------------------------------------------------------


def read_documents(path: Path, field: str) -> Iterator[tuple[str, int]]:
    """(text, bytes read for it) for each document of a file; UnicodeDecodeError and ValueError for what is not text."""
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                try:
                    text = json.loads(line)[field]
                    yield text.encode("utf-8", "replace").decode(), len(line)  # without lone surrogates
                except (ValueError, KeyError, TypeError, AttributeError) as e:
                    raise ValueError(f"line {number} is not a JSON object with a field {field!r} ({e!r})") from None
    elif path.suffix == ".parquet":
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise SystemExit("reading .parquet needs pyarrow: pip install pyarrow") from None
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1000, columns=[field]):
            yield from ((text, len(text)) for text in batch.column(0).to_pylist() if text)
    else:
        text = path.read_bytes().decode("utf-8")
        if "\0" in text:
            raise ValueError("it holds NUL bytes, so it is not a text file")
        yield text, len(text)


def local_files(paths: list[str]) -> list[tuple[Path, bool]]:
    """Every file below the paths, sorted, and whether it was named itself (then it must be readable text)."""
    files = []
    for p in map(Path, paths):
        if p.is_dir():
            files += [(f, False) for f in sorted(p.rglob("*")) if f.is_file() and not f.name.startswith(".")]
        elif p.is_file():
            files.append((p, True))
        else:
            known = ", ".join(["stdlib", "shakespeare", *HUB])
            raise SystemExit(f"{p} is no file or folder, and none of the named corpora: {known}")
    return files


def stdlib_files() -> list[tuple[Path, bool]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return [(f, False) for f in sorted(root.rglob("*.py")) if not skip & set(f.relative_to(root).parts)]


def documents_of(files: list[tuple[Path, bool]], field: str) -> Iterator[tuple[str, int]]:
    skipped = 0
    for path, named in files:
        try:
            yield from read_documents(path, field)
        except (UnicodeDecodeError, ValueError, OSError) as e:
            if named or path.name.endswith((".jsonl", ".jsonl.gz", ".parquet")):
                raise SystemExit(f"cannot read {path} as UTF-8 text: {e}") from None
            skipped += 1
    if skipped:
        print(f"\nskipped {skipped} files that are not UTF-8 text", file=sys.stderr)


def hub_documents(load_args: dict, field: str) -> Iterator[tuple[str, int]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise SystemExit("this corpus needs the datasets package: pip install datasets") from None
    for row in load_dataset(streaming=True, **load_args):
        if row[field]:
            yield row[field], len(row[field])


def pieces(text: str, size: int = 1 << 20) -> Iterator[tuple[str, bool]]:
    """Cut a long document where no pre-tokenizer looks across, after a lone newline before a letter: all cores share
    one file and the tokens are those of the whole. Yields (piece, it ends the document)."""
    start = 0
    while cut := SAFE_CUT.search(text, start + size):
        yield text[start : cut.end()], False
        start = cut.end()
    yield text[start:], True


SAFE_CUT = re.compile(r"(?<=\S)\n(?=[A-Za-z])")


# -- shards ------------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, write) -> None:
    """`write(file)`, and only when that is done and on disk, the name."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        with open(tmp, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except (OSError, RuntimeError) as e:  # torch.save turns a full disk into a RuntimeError
        tmp.unlink(missing_ok=True)
        raise SystemExit(f"cannot write {path}: {e}. What was written before is intact.") from None


def prepare(
    sources: list[str] | None = None, out: str = "data/stdlib", tokenizer: str = "bytes", field: str = "text",
    val_fraction: float | None = None, shard_tokens: int = 100_000_000,
) -> dict:  # fmt: skip
    """Write the shards of the sources below `out`; returns meta.json's content. Safe to interrupt and to repeat."""
    sources = sources or ["stdlib"]
    tok, folder, meta_path = get_tokenizer(tokenizer), Path(out), Path(out) / "meta.json"
    total, tail_split, files = None, False, None
    if sources[0] in HUB and len(sources) == 1:
        load_args, default_fraction = HUB[sources[0]]
    else:
        default_fraction = 0.1
        if sources == ["shakespeare"]:
            sources = [fetch_shakespeare(folder)]
        files = stdlib_files() if sources == ["stdlib"] else local_files(sources)
        total = sum(f.stat().st_size for f, _ in files)
        # A few long texts: the last tenth of each is for validation. Else whole documents, chosen by their content
        tail_split = len(files) < 20 and not any(f.name.endswith((".jsonl", ".gz", ".parquet")) for f, _ in files)
    val_fraction = default_fraction if val_fraction is None else val_fraction
    if not 0 < val_fraction < 1:
        raise SystemExit(f"--val_fraction must lie between 0 and 1, got {val_fraction}")

    request = {"sources": sources, "tokenizer": tokenizer, "val_fraction": val_fraction, "field": field}
    meta = request | {"vocab_size": tok.n_vocab, "eot": tok.eot, "complete": False, "documents": 0,
                      "train": {"tokens": 0, "bytes": 0, "shards": []}, "val": {"tokens": 0, "bytes": 0, "shards": []}}  # fmt: skip
    if meta_path.exists():
        found = json.loads(meta_path.read_text())
        changed = [f"{k} {found.get(k)!r}, not {v!r}" for k, v in request.items() if found.get(k) != v]
        if changed:
            raise SystemExit(f"{out} holds data of {'; '.join(changed)}: choose another --out, or delete that folder")
        if found["complete"]:
            return found
        meta = found
        print(f"continuing after document {meta['documents']:,}")
    folder.mkdir(parents=True, exist_ok=True)

    dtype = np.uint16 if tok.n_vocab <= 2**16 else np.uint32
    pending = {"train": [], "val": []}
    eot, shown, start, read, new_tokens = np.array([tok.eot], dtype), 0.0, time.time(), 0, 0

    def flush(**changes):
        for split, arrays in pending.items():
            if arrays:
                name, tokens = f"{split}_{len(meta[split]['shards']):05d}.npy", np.concatenate(arrays)
                write_atomically(folder / name, lambda f: np.save(f, tokens))
                meta[split]["shards"].append({"file": name, "tokens": len(tokens)})
                arrays.clear()
        meta.update(changes)
        write_atomically(meta_path, lambda f: f.write(json.dumps(meta, indent=1).encode()))

    documents = documents_of(files, field) if files is not None else hub_documents(load_args, field)
    documents = islice(documents, meta["documents"], None)
    n_docs = meta["documents"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # tiktoken works outside the interpreter lock
        while batch := list(islice(documents, 256)):
            n_docs += len(batch)
            parts = []  # (split, text)
            for text, size in batch:
                read += size
                if tail_split:
                    cut = int(len(text) * (1 - val_fraction))
                    parts += [("train", text[:cut]), ("val", text[cut:])]
                else:  # the same text is always on the same side
                    parts.append(("val" if zlib.crc32(text.encode()) < val_fraction * 2**32 else "train", text))
            work = [(split, *piece) for split, text in parts if text for piece in pieces(text)]
            for (split, text, ends), tokens in zip(work, pool.map(lambda w: tok.encode(w[1]), work)):
                pending[split] += [tokens.astype(dtype), eot] if ends else [tokens.astype(dtype)]
                meta[split]["tokens"] += len(tokens) + ends
                meta[split]["bytes"] += len(text.encode()) + ends
                new_tokens += len(tokens)
            if sum(map(len, pending["train"])) >= shard_tokens:
                flush(documents=n_docs)
            if time.time() - shown > 1 or (total and read >= total):
                shown = time.time()
                progress(read, total, new_tokens, shown - start)
    if not meta["train"]["tokens"] or not meta["val"]["tokens"]:
        raise SystemExit(f"{', '.join(sources)}: not enough text for a training and a validation split; nothing written")
    flush(documents=n_docs, complete=True)
    print(file=sys.stderr)
    return meta


def progress(read: int, total: int | None, tokens: int, seconds: float) -> None:
    rate, line = tokens / max(seconds, 1e-9), f"{read / 1e6:,.1f} MB"
    if total:
        done = min(read / total, 1.0)
        left = seconds * (1 - done) / max(done, 1e-9)
        line = f"[{'#' * int(30 * done):<30}] {line} of {total / 1e6:,.1f}, {left:.0f} s left"
    print(f"\r{line}, {tokens:,} tokens, {rate:,.0f} tokens/s, {read / 1e6 / max(seconds, 1e-9):.1f} MB/s ", end="",
          file=sys.stderr, flush=True)  # fmt: skip


def fetch_shakespeare(folder: Path) -> str:
    import urllib.request

    path = folder / "input.txt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            text = urllib.request.urlopen(SHAKESPEARE, timeout=30).read()
        except OSError as e:
            raise SystemExit(f"could not download {SHAKESPEARE}: {e}. Download it yourself and give its path") from None
        write_atomically(path, lambda f: f.write(text))
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", help="files, folders, or stdlib, shakespeare, tinystories, fineweb-edu")
    parser.add_argument("--out", help="folder for the shards (default: data/<first source>)")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, gpt2 or o200k_base")
    parser.add_argument("--field", default="text", help="the text's field in .jsonl, .parquet and hub corpora")
    parser.add_argument("--val_fraction", type=float, help="share of the validation split")
    parser.add_argument("--shard_tokens", type=int, default=100_000_000)
    args = parser.parse_args()
    sources = args.sources or ["stdlib"]
    out = args.out or f"data/{Path(sources[0]).stem}" + ("" if args.tokenizer == "bytes" else f"-{args.tokenizer}")
    start = time.time()
    meta = prepare(sources, out, args.tokenizer, args.field, args.val_fraction, args.shard_tokens)
    for split in ("train", "val"):
        print(f"{split}: {meta[split]['tokens']:,} tokens, {meta[split]['bytes']:,} bytes, {len(meta[split]['shards'])} shards")
    print(f"{out} is ready ({time.time() - start:.1f} s): python train.py --data {out}")


if __name__ == "__main__":
    main()
