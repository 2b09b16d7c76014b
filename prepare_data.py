"""
Text in, token shards out: what train.py reads.

    python prepare_data.py                                   the source of Python's standard library, as bytes
    python prepare_data.py book.txt notes/ --out data/mine   files, folders: text, .jsonl, .jsonl.gz, .parquet
    python prepare_data.py fineweb-edu --tokenizer o200k_base     or tinystories, shakespeare: need a network

The folder --out receives train_00000.npy, val_00000.npy, ... (flat uint16 or uint32 token ids, an end-of-text
token after each document) and meta.json (tokenizer, counts, checksums, the files that were read), which lists
a shard when it is whole: the same command continues an interrupted run, and checks a finished one.
"""

import gzip
import importlib
import json
import os
import re
import signal
import sys
import sysconfig
import time
import urllib.request
import zlib
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import BinaryIO, TextIO

import numpy as np

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
# Folders: files that are whole, one owner, and shards that are what was written

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
    """Own a folder while the result is open; the operating system ends it with the process."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = open(Path(folder) / LOCK, "a+")  # noqa: SIM115 (the caller holds it)
        try:
            take(file)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            busy = f"{folder} is in use by process {file.read()}"
            if not wait:
                raise SystemExit(busy) from None
            print(f"{busy}: waiting for its end", file=sys.stderr, flush=True)
            take(file, wait=True)
        file.truncate(0)
        print(os.getpid(), end="", file=file, flush=True)
    except OSError as e:
        raise SystemExit(f"cannot write to {folder}: {e}") from None
    return file


def take(file: TextIO, wait: bool = False) -> None:
    if os.name == "nt":
        msvcrt = need("msvcrt")
        file.seek(BLOCK)  # what is locked cannot be read
        msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
    else:
        fcntl = need("fcntl")
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def checksum(path: Path, full: bool) -> int:
    """CRC-32 of a file's size and of all its bytes, or of some 32 MiB spread over it."""
    size = path.stat().st_size
    crc, step = zlib.crc32(b"%d" % size), BLOCK if full else max(BLOCK, size // 32)
    with open(path, "rb") as f:
        for start in [*range(0, size, step), max(0, size - BLOCK)]:
            f.seek(start)
            crc = zlib.crc32(f.read(BLOCK), crc)
    return crc


def read_meta(folder: Path) -> dict | None:
    """meta.json vouches for itself: with its checksum right, every entry is there and of its type."""
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_bytes())
        if meta.pop("checksum", None) != zlib.crc32(json.dumps(meta).encode()):
            raise ValueError("damaged, edited, or of an earlier version of prepare_data.py")
        return meta
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as e:
        raise SystemExit(f"cannot use {path}: {e}: delete {folder} and prepare it again") from None


def open_data(folder: str | Path, full: bool = False) -> tuple[dict, dict[str, list[np.memmap]]]:
    """meta.json and the shards of a prepared folder, checked: a sample of each shard, or every byte."""
    folder, shards = Path(folder), {"train": [], "val": []}
    meta = read_meta(folder)
    if not meta:
        make = f"python prepare_data.py YOUR_FILES --out {folder}"
        raise SystemExit(f"{folder} holds no meta.json: make it with  {make}")
    if not meta["complete"]:
        raise SystemExit(f"{folder} is only half prepared: the same prepare_data.py command continues")
    for split, opened in shards.items():
        for i, entry in enumerate(meta[split]["shards"]):
            path = folder / f"{split}_{i:05d}.npy"
            try:  # the checksum is of the header too: token type, length, one dimension
                if checksum(path, full) != entry["crc32" if full else "sample_crc32"]:
                    raise ValueError("it is not what prepare_data.py wrote")
                opened.append(np.lib.format.open_memmap(path, mode="r"))
            except (OSError, ValueError) as e:
                raise SystemExit(f"cannot use {path}: {e}: delete {folder} and prepare it again") from None
    return meta, shards


# ------------------------------------------------------------------------------------------------------------
# Tokenizers


class ByteTokenizer:
    """A token is a byte of UTF-8. Byte 0 does not occur in text and ends a document."""

    n_vocab, eot = 256, 0

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(errors="replace"), dtype=np.uint8)

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
        text = text.encode(errors="replace").decode()  # no lone surrogates
        return self.encoding.encode_to_numpy(text, disallowed_special=())

    def decode(self, tokens: Iterable[int]) -> str:
        """Some ids below n_vocab are no token's; a model can choose them all the same."""
        ranks, special = len(self.encoding._mergeable_ranks), self.encoding._special_tokens.values()
        token_bytes = self.encoding.decode_single_token_bytes
        known = (token_bytes(t) if t < ranks or t in special else "\ufffd".encode() for t in tokens)
        return b"".join(known).decode(errors="replace")


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
SAFE_CUT = re.compile(r"(?<=\S)(?:(?= )|\n(?=\w))")  # no token reaches across it


def walk(folder: Path, out: Path, left_out: dict[str, list]) -> Iterator[Path]:
    """The files below a folder, in an order that stays."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            left_out["hidden"].append(path)
        elif os.path.isfile(path):
            yield path
        elif not os.path.isdir(path):
            left_out["broken links, pipes and the like"].append(path)
        elif path.is_symlink():
            left_out["links to folders, which can be named as sources"].append(path)
        elif is_output(path, out):
            left_out["folders that prepare_data.py or train.py writes to"].append(path)
        else:
            yield from walk(path, out, left_out)


def is_output(path: Path, out: Path) -> bool:
    return os.path.exists(path / LOCK) or path.resolve() == out.resolve()


def find_files(sources: list[str], out: Path, left_out: dict[str, list]) -> list[Path]:
    files = {}
    for source in sources:
        path = Path(source)
        if source == "stdlib":
            root = Path(sysconfig.get_paths()["stdlib"])
            skip = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
            found = [f for f in sorted(root.rglob("*.py")) if not skip & set(f.relative_to(root).parts)]
        elif source == "shakespeare":
            found = [out / "input.txt"]  # not yet there before `download`
        elif source and path.is_dir():
            if is_output(path, out):
                raise SystemExit(f"prepare_data.py or train.py writes to {path}: it cannot be a source")
            found = walk(path, out, left_out)
        elif source and path.is_file():
            found = [path]
        else:
            names = f"nor stdlib, shakespeare or, alone, {', '.join(HUB)}"
            raise SystemExit(f"{source!r} is no file or folder, {names}")
        for file in found:
            if files.setdefault(file.resolve(), file) is not file:
                left_out["the same file again"].append(file)
    return list(files.values())


def download(path: Path) -> None:
    try:
        text = urllib.request.urlopen(SHAKESPEARE, timeout=30).read()
    except OSError as e:
        raise SystemExit(f"cannot download {SHAKESPEARE}: {e}: give the path of a copy") from None
    write_atomically(path, lambda f: f.write(text))


def read_records(source: str | Path, field: str) -> Iterator[tuple[object, int]]:
    """(text, bytes read so far) for each record of a file or of a name in HUB; the text may be no string."""
    if source in HUB:
        for row in need("datasets").load_dataset(streaming=True, **HUB[source][0]):
            yield row.get(field), 0
        return
    with open(source, "rb") as f:
        kind = source.name.lower()
        if kind.endswith(".parquet"):
            for batch in need("pyarrow.parquet").ParquetFile(f).iter_batches(1000, columns=[field]):
                yield from ((row.get(field), f.tell()) for row in batch.to_pylist())
        elif kind.endswith((".jsonl", ".jsonl.gz")):
            for line in gzip.GzipFile(fileobj=f) if kind.endswith(".gz") else f:
                try:
                    text = json.loads(line.decode("utf-8-sig"))[field] if line.strip() else ""
                except (ValueError, LookupError, TypeError, RecursionError):
                    text = None
                yield text, f.tell()
        else:
            data = f.read()
            text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
            if "\0" in text:
                raise ValueError("NUL bytes")
            yield text, len(data)


def read_documents(sources: list, named: list[str], field: str, left_out: dict[str, list]):
    """(text, bytes read so far) for each document. A file that is no text is left out, unless it is named."""
    done, read, good, empty = 0, 0, False, f"no text in the field {field!r} of a record"
    for source in sources:
        try:
            for number, (text, read) in enumerate(read_records(source, field), 1):
                if isinstance(text, str):
                    good = True
                    yield text.encode(errors="replace").decode(), done + read  # no lone surrogates
                elif number == 1000 and not good:
                    raise SystemExit(f"{source}: {empty}, nor of the first 1,000")
                else:
                    left_out[empty].append(f"{source}, record {number}")
        except (ValueError, LookupError, TypeError, RuntimeError, OSError, EOFError, zlib.error) as e:
            kind = "records" if source in HUB or source.name.lower().endswith(RECORDS) else "UTF-8 text"
            if kind == "records" or source in map(Path, named):
                raise SystemExit(f"cannot read {source} as {kind}: {e!s:.200}") from None
            left_out["no UTF-8 text" if isinstance(e, ValueError) else e.strerror].append(source)
        done += read


def pieces(text: str, size: int = 1 << 14, limit: int = 1 << 17) -> Iterator[tuple[str, bool]]:
    """Cut a long text so that all cores share it and its tokens stay the same: (piece, is it the last). Where
    `limit` characters hold no safe cut, it is cut there: tiktoken gives up on a million spaces."""
    start = 0
    while len(text) - start > size:
        cut = SAFE_CUT.search(text, start + size, start + limit)
        end = cut.end() if cut else start + limit
        if end >= len(text):
            break
        yield text[start:end], False
        start = end
    yield text[start:], True


def split_pieces(documents, val_fraction: float, few: bool) -> Iterator[tuple[str, str, bool, int, int]]:
    """(split, piece, is it the last of its text, bytes read so far, checksum so far). Of a few texts the end
    of each is for validation, of many whole ones, chosen by content: copies of a text are in one split."""
    crc = 0
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
                crc = zlib.crc32(f"{split} {last} {piece}".encode(), crc)
                yield split, piece, last, read, crc


# ------------------------------------------------------------------------------------------------------------
# Shards


def write_shards(folder: Path, meta: dict, work, tok, shard_tokens: int, total: int) -> None:
    """Go on in `work` where `meta` says, to its end."""
    waiting = {"train": [], "val": []}  # arrays of tokens on their way to a shard
    eot = np.array([tok.eot], np.uint16 if tok.n_vocab <= 2**16 else np.uint32)
    new = tokens = before = crc = 0

    def flush() -> None:
        for split, arrays in waiting.items():
            if arrays:
                shard, shards = np.concatenate(arrays), meta[split]["shards"]
                path = folder / f"{split}_{len(shards):05d}.npy"
                write_atomically(path, lambda f, shard=shard: np.save(f, shard))
                sums = {"crc32": checksum(path, full=True), "sample_crc32": checksum(path, full=False)}
                shards.append({"tokens": len(shard)} | sums)
                arrays.clear()
        whole = {"checksum": zlib.crc32(json.dumps(meta).encode())} | meta
        write_atomically(folder / "meta.json", lambda f: f.write(json.dumps(whole, indent=1).encode()))

    for *_, before, crc in islice(work, meta["pieces"]):  # what the shards hold already
        pass
    if crc != meta["crc32"]:
        raise SystemExit(f"the sources do not begin with the text that {folder} holds: choose another --out")
    start = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # tiktoken works outside the interpreter lock
        while batch := list(islice(work, 256)):
            encoded = pool.map(tok.encode, [piece for _, piece, *_ in batch])
            for (split, piece, last, read, crc), ids in zip(batch, encoded):
                waiting[split] += [ids.astype(eot.dtype), eot] if last else [ids.astype(eot.dtype)]
                meta[split]["tokens"] += len(ids) + last
                meta[split]["bytes"] += len(piece.encode()) + last
                meta |= {"pieces": meta["pieces"] + 1, "crc32": crc}
                new, tokens = new + len(ids), tokens + len(ids) + last
                if tokens >= shard_tokens:
                    flush()
                    tokens = 0
            seconds = time.perf_counter() - start
            line = f"\r{new:,} tokens, {new / seconds:,.0f} tokens/s"
            if total:
                left = max(0, total - read) * seconds / max(1, read - before)
                line += f", {read / total:.0%}, {left:.0f} s left "
            print(line, end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    if meta["train"]["tokens"] and meta["val"]["tokens"]:
        meta["complete"] = True
        flush()


def prepare(
    sources: list[str] | None = None, out: str | Path = "data/stdlib", tokenizer: str = "bytes",
    field: str = "text", val_fraction: float | None = None, shard_tokens: int = 100_000_000,
) -> dict:  # fmt: skip
    """Write the shards of the sources to `out` -> what meta.json holds. Safe to interrupt and to repeat.
    No sources: the default data; once complete it is good; another process that makes it is waited for."""
    folder, tok, left_out, default = Path(out), get_tokenizer(tokenizer), defaultdict(list), sources is None
    if default and (meta := read_meta(folder)) and meta["complete"]:
        return meta
    sources = sources or ["stdlib"]
    hub, default_fraction = HUB.get(" ".join(sources), (None, 0.1))
    val_fraction = default_fraction if val_fraction is None else val_fraction
    if shard_tokens < 1:
        raise SystemExit(f"--shard_tokens must be at least 1, got {shard_tokens}")
    if not 0 < val_fraction < 1:
        raise SystemExit(f"--val_fraction must lie between 0 and 1, got {val_fraction}")
    found = sources if hub else find_files(sources, folder, left_out)
    with lock(folder, wait=default):
        if "shakespeare" in sources and not (folder / "input.txt").exists():
            download(folder / "input.txt")
        states = {} if hub else {path: path.stat() for path in found}
        progress = {"complete": False, "pieces": 0, "crc32": 0}
        progress |= {split: {"tokens": 0, "bytes": 0, "shards": []} for split in ("train", "val")}
        request = {"sources": sources, "tokenizer": tokenizer, "val_fraction": val_fraction, "field": field}
        request |= {"vocab_size": tok.n_vocab, "eot": tok.eot}
        request |= {f"file {path}": f"{s.st_size} bytes, time {s.st_mtime_ns}" for path, s in states.items()}
        meta = read_meta(folder) or request | progress
        for name in sorted((request | meta).keys() - progress):
            if (was := meta.get(name)) != (now := request.get(name)):
                made = f"{out} was made with {name}: {was or 'absent'}, now {now or 'absent'}"
                raise SystemExit(f"{made}: choose another --out, or delete that folder")
        if not meta["complete"]:
            share = min(val_fraction, 1 - val_fraction)
            first = read_documents(found, sources, field, defaultdict(list))
            first = islice(first, int(min(40 / share, 1e6)))
            few = not hub and len({hash(text) for text, _ in first}) < 20 / share
            documents = read_documents(found, sources, field, left_out)
            work = split_pieces(documents, val_fraction, few)
            write_shards(folder, meta, work, tok, shard_tokens, sum(s.st_size for s in states.values()))
            for reason, names in left_out.items():
                print(f"left out {len(names)}: {reason} ({names[0]})", file=sys.stderr)
            if not meta["complete"]:
                raise SystemExit(f"{', '.join(sources)}: not enough text for two splits, train and val")
        return meta


def main() -> None:
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    sys.stdout.reconfigure(errors="backslashreplace")  # names that are not UTF-8
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", default=["stdlib"], help="files, folders, or a name from above")
    parser.add_argument("--out", help="folder for the shards (default: data/<first source>)")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, gpt2 or o200k_base")
    parser.add_argument("--field", default="text", help="holds the text in .jsonl, .parquet and Hub data")
    parser.add_argument("--val_fraction", type=float, help="share of the validation split (0.1)")
    parser.add_argument("--shard_tokens", type=int, default=100_000_000, help="tokens a shard")
    args = parser.parse_args()
    coding = "" if args.tokenizer == "bytes" else f"-{args.tokenizer}"
    args.out = args.out or f"data/{Path(args.sources[0]).resolve().stem}{coding}"
    try:
        prepare(**vars(args))
        meta, shards = open_data(args.out, full=True)
    except (OSError, KeyboardInterrupt) as e:
        raise SystemExit(str(e) or "interrupted: the same command continues") from None
    for split in ("train", "val"):
        print(f"{split}: {meta[split]['tokens']:,} tokens, {len(shards[split])} shards")
    print(f"{args.out} is ready: python train.py --data {args.out}")


if __name__ == "__main__":
    main()
