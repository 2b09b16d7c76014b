"""
Text in, token shards out: what train.py reads.

    python prepare_data.py                                   Python's standard library, as bytes
    python prepare_data.py book.txt notes/ --out data/mine   files, and folders of files
    python prepare_data.py tinystories --val_fraction 0.01   or fineweb-edu, from the Hub

A file is one text. But .json, .jsonl, .ndjson and .parquet files hold records, each with a text in
the field that --field names. What ends in .gz is unpacked. The Hub is that of Hugging Face.

The folder --out receives train_00000.npy, val_00000.npy, ... and meta.json. A shard is a flat array
of token ids, uint16 or uint32, with an end-of-text token after each text. meta.json holds what was
asked for, the files that were read, and the size and checksums of every shard that is complete. So
the same command continues after an interruption, and checks a folder that is finished.
"""

import gzip
import json
import os
import re
import secrets
import sys
import sysconfig
import zlib
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

# A corpus -> its repository on the Hugging Face Hub, and which files of that
HUB = {
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample/10BT/*.parquet"),
    "tinystories": ("roneneldan/TinyStories", "data/train-*.parquet"),
}
SPLITS = ("train", "val")
END_OF_TEXT = "<|endoftext|>"

# ------------------------------------------------------------------------------------------------
# Files and folders that survive an interruption

LOCK = ".flash_stu.lock"  # is in each folder that prepare_data.py or train.py writes to
TEMPORARY = ".flash_stu.tmp"  # ends the name of a file that is not yet complete


def write_atomically(path, write):
    """Let `write(file)` fill a temporary file, then rename it: `path` is never half written."""
    path = Path(path)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise SystemExit(f"cannot write {path}: a link, a folder or a device has this name")
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        with open(temporary, "xb") as file:  # x: only if there is nothing of this name
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        trouble = f"cannot write {path}: {error}. What was written before is intact."
        raise SystemExit(trouble) from error
    finally:
        with suppress(OSError):
            temporary.unlink()  # it is still there only if something failed


def lock(folder, wait=False):
    """Own a folder while the returned file is open: until the process ends, in whatever way."""
    path = Path(folder) / LOCK
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")  # noqa: SIM115 (the caller holds it)
        if fcntl:
            kind = fcntl.LOCK_EX  # only one process can have it
            if not wait:
                kind |= fcntl.LOCK_NB  # if another has it: raise BlockingIOError
            fcntl.flock(file, kind)
            for leftover in path.parent.glob("*" + TEMPORARY):  # of a process that was killed
                leftover.unlink()
        path.write_text(str(os.getpid()))  # for the message below
    except BlockingIOError:
        raise SystemExit(f"{folder} is in use by process {path.read_text()}") from None
    except OSError as error:
        raise SystemExit(f"cannot write to {folder}: {error}") from None
    return file


# ------------------------------------------------------------------------------------------------
# Tokenizers. encode(text) gives ids as int32; decode(ids) the text, without end-of-text tokens


class ByteTokenizer:
    """A token is a byte of UTF-8. Byte 0 ends a text, and texts that hold one are left out."""

    name = "bytes"
    n_vocab = 256
    eot = 0

    def encode(self, text):
        text = text.encode(errors="replace")  # half of a surrogate pair becomes a question mark
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def decode(self, tokens):
        # A model may have more outputs than there are tokens.
        text = bytes(token for token in tokens if 0 < token < 256)
        return text.decode(errors="replace")


class TiktokenTokenizer:
    """gpt2 or o200k_base, which tiktoken downloads, or finds in the folder TIKTOKEN_CACHE_DIR."""

    def __init__(self, name):
        import tiktoken

        try:
            self.encoding = tiktoken.get_encoding(name)
        except OSError as error:
            trouble = (
                f"no network, and no {name} in TIKTOKEN_CACHE_DIR? tiktoken: {str(error)[:200]}"
            )
            raise SystemExit(trouble) from None
        self.name = name
        self.n_vocab = self.encoding.n_vocab
        self.eot = self.encoding.eot_token

    def encode(self, text):
        text = text.encode(errors="replace").decode()  # as above
        # disallowed_special=(): a text may say "<|endoftext|>", which is then no special token
        return self.encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int32)

    def decode(self, tokens):
        parts = []
        for token in tokens:
            if token != self.eot:
                with suppress(KeyError):  # not every id below n_vocab is a token
                    parts.append(self.encoding.decode_single_token_bytes(token))
        return b"".join(parts).decode(errors="replace")


def get_tokenizer(name):
    if name == "bytes":
        return ByteTokenizer()
    if name in ("gpt2", "o200k_base"):
        return TiktokenTokenizer(name)
    raise SystemExit(f"unknown tokenizer {name!r}: it is bytes, gpt2 or o200k_base")


def save_tokenizer(tokenizer, folder):
    """Write a tokenizer, with the same ids, into the folder of a saved model for transformers.

    It pads on the right, for training; to generate from a batch set padding_side="left".
    """
    import transformers
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    # The pattern cuts a text into words; no token reaches from one into another.
    if isinstance(tokenizer, ByteTokenizer):
        pattern = r"[\s\S]{1,64}"  # any cut will do
        ids = {bytes([i]): i for i in range(1, 256)}
        special_ids = {END_OF_TEXT: 0}
    else:
        pattern = tokenizer.encoding._pat_str
        ids = dict(tokenizer.encoding._mergeable_ranks)
        special_ids = dict(tokenizer.encoding._special_tokens)
    padding = ids.pop(b"\xff")  # no text in UTF-8 has this byte, so its id is free
    special_ids["<|padding|>"] = padding

    # A tokenizer.json holds no bytes. There is an agreed letter for each of the 256.
    letter_of = bytes_to_unicode()

    def as_letters(token):
        return "".join(letter_of[byte] for byte in token)

    # Of all neighbours that can be merged, those of the pair that stands first in a list are. So we
    # list, in the order of the ids, each token as all the pairs of tokens that it can be made of.
    merges = []
    for token in sorted(ids, key=ids.get):
        for cut in range(1, len(token)):
            left = token[:cut]
            right = token[cut:]
            if left in ids and right in ids:
                merges.append((as_letters(left), as_letters(right)))
    vocab = {as_letters(token): i for token, i in ids.items()}
    for token, i in special_ids.items():
        vocab[as_letters(token.encode())] = i
    # ignore_merges: a word that is a token is not merged from its parts
    converted = Tokenizer(BPE(vocab, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    bytes_as_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    converted.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_as_letters])
    converted.decoder = decoders.ByteLevel()
    # Of ByteTokenizer byte 0 is not in `vocab`. As an unknown token it has the id 0, as in encode.
    converted.model.unk_token = END_OF_TEXT
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=converted,
        eos_token=END_OF_TEXT,
        pad_token="<|padding|>",
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
    settings = transformers.GenerationConfig(eos_token_id=tokenizer.eot, pad_token_id=padding)
    settings.save_pretrained(folder)


# ------------------------------------------------------------------------------------------------
# From here on in the order of the work: sources -> files -> texts -> pieces -> tokens -> shards.
#
# Sources -> files. `left_out` collects what is not read: {reason: [names of files or records]}


def standard_library():
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    paths = sorted(root.rglob("*.py"))
    return [path for path in paths if not skipped & set(path.relative_to(root).parts)]


def download(name):
    from huggingface_hub import snapshot_download

    repository, pattern = HUB[name]
    folder = snapshot_download(repository, repo_type="dataset", allow_patterns=pattern)
    return sorted(Path(folder).glob(pattern))


def walk(folder, left_out):
    """The files in a folder and in those below it, in the order of their names."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            left_out["hidden"].append(path)
        elif os.path.isfile(path):  # path.is_file() fails in a folder that one may not enter
            yield path
        elif path.is_symlink() or not os.path.isdir(path) or (path / LOCK).exists():
            left_out["linked folders, pipes, outputs of prepare_data.py"].append(path)
        else:
            yield from walk(path, left_out)


def files_of(source, left_out):
    path = Path(source)
    if source == "stdlib":
        return standard_library()
    if source in HUB:
        return download(source)
    is_empty = source == ""  # which Path takes for the folder we are in
    if path.is_file():
        return [path]
    if path.is_dir() and not (path / LOCK).exists() and not is_empty:
        return walk(path, left_out)
    raise SystemExit(f"{source!r} is no file or folder of texts, nor stdlib, {', '.join(HUB)}")


def size_and_time(path):
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]


def find_files(sources, left_out):
    """{path: its size and time} of all files, in the order in which they are read."""
    files = {}
    known = set()
    for source in sources:
        for path in files_of(source, left_out):
            status = path.stat()
            identity = (status.st_dev, status.st_ino)  # the same under each name that a file has
            if identity in known:
                left_out["named before, maybe under another name"].append(path)
            else:
                known.add(identity)
                files[str(path)] = size_and_time(path)
    return files


# Files -> records -> texts

PACKED = (".zip", ".tar", ".tgz", ".7z", ".bz2", ".xz", ".zst", ".lz4")
NOT_IN_TEXTS = re.compile("[\0\ud800-\udfff]")  # byte 0, which ends texts, and surrogates


def parse_json(data):
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):  # no JSON, or too many brackets in each other
        return None


def json_lines(file):
    for line in file:
        if line.strip():
            yield parse_json(line)


def json_list(file):
    """A .json file is a list of records, or a record, or holds one a line as .jsonl does."""
    whole = parse_json(file.read())
    if isinstance(whole, list):
        return whole
    if isinstance(whole, dict):
        return [whole]
    file.seek(0)
    return json_lines(file)


def read_parquet(file, path, field):
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(file)
        fields = table.schema_arrow.names
        if field not in fields:
            raise SystemExit(f"{path!r} has no field {field!r}: give --field one of {fields}")
        for batch in table.iter_batches(1000, columns=[field]):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise SystemExit(f"cannot read {path!r}: {error}") from None


def read_records(path, field):
    """What a file holds as records {field: text}; the text of a plain file is still bytes."""
    name = path.lower()
    open_file = gzip.open if name.endswith(".gz") else open
    name = name.removesuffix(".gz")
    with open_file(path, "rb") as file:
        if name.endswith(".parquet"):
            yield from read_parquet(file, path, field)
        elif name.endswith((".jsonl", ".ndjson")):
            yield from json_lines(file)
        elif name.endswith(".json"):
            yield from json_list(file)
        else:
            yield {field: file.read()}


def texts_of(path, field, left_out):
    for number, record in enumerate(read_records(path, field), 1):
        if not isinstance(record, dict):  # a number, a list, a line that is no JSON
            record = {}
        text = record.get(field)
        if isinstance(text, bytes):
            # Here bytes that are no UTF-8 become surrogates, and those are found below.
            text = text.decode("utf-8-sig", errors="surrogateescape")
        if isinstance(text, str) and not NOT_IN_TEXTS.search(text):
            yield text
        else:
            name = f"{path}, record {number}"
            if field not in record:
                name += f" with the fields {list(record)}"
            left_out[f"no UTF-8 text, or none in the field {field!r}"].append(name)


def read_texts(files, field, left_out):
    """The text of each file, or of each record of a file."""
    for path, listed in files.items():
        if path.lower().removesuffix(".gz").endswith(PACKED):
            left_out["packed in another way than .gz: unpack it first"].append(path)
            continue
        try:
            yield from texts_of(path, field, left_out)
        except (OSError, EOFError, zlib.error) as error:  # the last two: of gzip
            raise SystemExit(f"cannot read {path!r}: {error}") from None
        if size_and_time(path) != listed:
            raise SystemExit(f"{path!r} changed while it was read: start again")


# Texts -> pieces. A long text is cut into pieces, so that all cores can share it. This must not
# change its tokens, so it is cut where no token reaches across: before a space, or after a newline.
# A piece ends at the first such place after 2^14 characters, or at the end of the text. If there is
# none within 2^17 characters it ends there, because tiktoken fails on a million spaces.

Piece = namedtuple("Piece", "split text ends_text")
BEFORE_SPACE = r"(?<=\S)(?= )"
AFTER_NEWLINE = r"(?<=\S)\n(?=\w)"  # a single one: several may be one token
# {{ in such a string is {, and \Z is the end of the text
UP_TO_A_PLACE = rf".{{16384,131072}}?(?:{BEFORE_SPACE}|{AFTER_NEWLINE}|\Z)"
WITHOUT_A_PLACE = r".{1,131072}"
PIECE = re.compile(f"{UP_TO_A_PLACE}|{WITHOUT_A_PLACE}", re.DOTALL)


def are_few(texts, val_fraction):
    """Are the texts too few to give about twenty different ones to the smaller split?"""
    smaller_share = min(val_fraction, 1 - val_fraction)
    enough = min(int(20 / smaller_share), 1_000_000)  # so many are kept in memory here
    first_texts = islice(texts, 2 * enough)  # twice as many, since some may be copies of others
    different = {hash(text) for text in first_texts}
    return len(different) < enough


def split_text(text, val_fraction, few):
    """If there are few texts, the end of each is for validation.

    If there are many, whole texts are. They are chosen by their content, so that copies of a text
    go to the same split.
    """
    if few:
        cut = int(len(text) * (1 - val_fraction))
        return [("train", text[:cut]), ("val", text[cut:])]  # both parts end as a text does
    place = zlib.crc32(text.encode()) / 2**32  # from 0 to 1, by chance, but the same for a copy
    return [("val" if place < val_fraction else "train", text)]


def make_pieces(texts, val_fraction, few):
    for text in texts:
        for split, part in split_text(text, val_fraction, few):
            pieces = PIECE.findall(part)
            for number, piece in enumerate(pieces, 1):
                yield Piece(split, piece, ends_text=number == len(pieces))


# Pieces -> tokens


def encode_pieces(pieces, tokenizer):
    """Each piece with its tokens, in order. tiktoken works outside the interpreter's lock."""
    dtype = np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while batch := list(islice(pieces, 256)):
            encoded = pool.map(tokenizer.encode, [piece.text for piece in batch])
            for piece, tokens in zip(batch, encoded):
                if piece.ends_text:
                    tokens = np.append(tokens, tokenizer.eot)
                yield piece, tokens.astype(dtype)


# Tokens -> shards, and meta.json, which lists them

BLOCK = 2**20  # bytes of a shard that share a checksum


def shard_path(folder, split, number):
    return folder / f"{split}_{number:05d}.npy"


def checksums(path, step=1):
    """[size of the file, CRC-32 of its first block, ...]: of every block, or of every `step`th."""
    size = path.stat().st_size
    sums = [size]
    with open(path, "rb") as file:
        for start in range(0, size, BLOCK * step):
            file.seek(start)
            sums.append(zlib.crc32(file.read(BLOCK)))
    return sums


def checksum_of(meta):
    return zlib.crc32(json.dumps(meta).encode())  # JSON keeps the order of the entries


def read_meta(folder):
    """What meta.json holds, or None where there is none."""
    path = folder / "meta.json"
    if not path.is_file():
        return None
    meta = parse_json(path.read_bytes())
    checksum = meta.pop("checksum", None) if isinstance(meta, dict) else None
    if checksum is None or checksum != checksum_of(meta):
        trouble = f"cannot use {path}: damaged, edited, or of an early version of prepare_data.py"
        raise SystemExit(f"{trouble}: delete {folder} and prepare it again")
    return meta


def write_meta(folder, meta):
    text = json.dumps({"checksum": checksum_of(meta)} | meta)
    write_atomically(folder / "meta.json", lambda file: file.write(text.encode()))


def write_shards(folder, meta, waiting):
    """Write the tokens that wait, {split: [arrays]}, as a shard for each split, then meta.json.

    If this is killed before meta.json is written, the same shards are made once more.
    """
    for split, arrays in waiting.items():
        if arrays:
            shards = meta[split]["shards"]
            path = shard_path(folder, split, len(shards))
            tokens = np.concatenate(arrays)
            write_atomically(path, partial(np.save, arr=tokens))
            shards.append(checksums(path))
            arrays.clear()
    write_meta(folder, meta)


def show_progress(meta):
    """On one line, again and again; `prepare` ends that line."""
    print(f"\r{meta['train']['tokens']:,} tokens to train", end="", file=sys.stderr, flush=True)


def write_tokens(folder, meta, encoded, shard_tokens):
    """Collect the tokens of the two splits, and write both when together they have shard_tokens."""
    waiting = {split: [] for split in SPLITS}
    n_waiting = 0
    for piece, tokens in encoded:
        waiting[piece.split].append(tokens)
        n_waiting += len(tokens)
        counts = meta[piece.split]
        counts["tokens"] += len(tokens)
        counts["bytes"] += len(piece.text.encode())
        if piece.ends_text:
            counts["bytes"] += 1  # the end-of-text token counts as one byte
        meta["pieces"] += 1
        if meta["pieces"] % 256 == 0:
            show_progress(meta)
        if n_waiting >= shard_tokens:
            write_shards(folder, meta, waiting)
            n_waiting = 0
    show_progress(meta)
    meta["complete"] = all(meta[split]["tokens"] for split in SPLITS)
    if meta["complete"]:
        write_shards(folder, meta, waiting)


# ------------------------------------------------------------------------------------------------
# The whole way


def start_or_continue(folder, request):
    """The contents of the meta.json that is there, or those to begin with.

    They are the request and the progress. An old meta.json must have the same request.
    """
    progress = {
        "train": {"tokens": 0, "bytes": 0, "shards": []},  # of each shard its `checksums`
        "val": {"tokens": 0, "bytes": 0, "shards": []},
        "complete": False,
        "pieces": 0,  # how many are in the shards
    }
    meta = read_meta(folder)
    if not meta:
        return request | progress
    before = {name: value for name, value in meta.items() if name not in progress}
    for name in sorted(before.keys() | request.keys()):
        was = before.get(name, "absent")
        now = request.get(name, "absent")
        if was != now:
            trouble = f"{folder} was made with {name!r}: {was}, now {now}"
            raise SystemExit(f"{trouble}: choose another --out")
    return meta


def prepare_default(folder="data/stdlib"):
    """What train.py reads by default, Python's standard library.

    If it is there it is taken, whichever Python it comes from. If another process is making it we
    wait.
    """
    meta = read_meta(Path(folder))
    if meta and meta["complete"]:
        return meta
    return prepare(["stdlib"], folder, wait=True)


def prepare(
    sources,
    out,
    tokenizer="bytes",
    field="text",
    val_fraction=0.1,
    shard_tokens=100_000_000,
    wait=False,
):
    """Write the shards of the sources to the folder `out`, and return what its meta.json holds.

    wait: until the process that now writes there is done. Otherwise that is an error.
    """
    folder = Path(out)
    if shard_tokens < 1:
        raise SystemExit(f"shard_tokens is {shard_tokens}, but must be at least 1")
    if not 0 < val_fraction < 1:
        raise SystemExit(f"val_fraction is {val_fraction}, but must be between 0 and 1")
    if folder.resolve() in [Path(source).resolve() for source in sources]:
        raise SystemExit(f"{folder} is to be written, it cannot be a source")
    encoder = get_tokenizer(tokenizer)
    left_out = defaultdict(list)
    with lock(folder, wait):
        try:
            files = find_files(sources, left_out)
        except OSError as error:
            raise SystemExit(f"cannot read {sources}: {str(error)[:300]}") from None
        request = {
            "sources": sources,
            "tokenizer": tokenizer,
            "val_fraction": val_fraction,
            "field": field,
            "vocab_size": encoder.n_vocab,
            "eot": encoder.eot,
        }
        for path, stamp in files.items():
            request[f"file {path}"] = stamp
        meta = start_or_continue(folder, request)
        if meta["complete"]:
            return meta
        ignored = defaultdict(
            list
        )  # all is read once more below, and then we tell what is left out
        few = are_few(read_texts(files, field, ignored), val_fraction)
        pieces = make_pieces(read_texts(files, field, left_out), val_fraction, few)
        missing = islice(pieces, meta["pieces"], None)  # those that no shard holds yet
        try:
            write_tokens(folder, meta, encode_pieces(missing, encoder), shard_tokens)
        finally:
            print(file=sys.stderr)  # ends the line of the progress, whatever comes next
        for reason, names in left_out.items():
            first = repr(str(names[0]))  # control characters in a name are made visible
            print(f"left out {len(names)}: {reason} ({first})", file=sys.stderr)
    if not meta["complete"]:
        raise SystemExit(f"{sources}: not enough text for two splits, train and val")
    return meta


# ------------------------------------------------------------------------------------------------
# The way back: what train.py reads


def open_data(folder, full=False):
    """What meta.json holds, and {split: [its shards]}.

    They are checked: if `full` every byte, else some 32 MiB of a shard, so that it opens fast.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    if not meta or not meta["complete"]:
        command = f"python prepare_data.py YOUR_FILES --out {folder}"
        raise SystemExit(f"{folder} is not complete:  {command}")
    opened = {split: [] for split in SPLITS}
    for split, shards in opened.items():
        for number, right in enumerate(meta[split]["shards"]):
            path = shard_path(folder, split, number)
            step = 1
            if not full:
                step = max(1, len(right) // 32)  # about 32 blocks, spread over the shard
            expected = right[:1] + right[1::step]  # the size, and the checksums of these blocks
            if not path.is_file() or checksums(path, step) != expected:
                trouble = f"cannot use {path}: it is not what prepare_data.py wrote"
                raise SystemExit(f"{trouble}: delete {folder} and prepare it again")
            shards.append(np.load(path, mmap_mode="r"))
    return meta, opened


def read_tokens(shards, start, stop):
    """Tokens `start` to `stop` of a split, as if its shards were one long array."""
    parts = []
    first = 0  # number of the first token of the shard
    for shard in shards:
        if start < first + len(shard) and stop > first:
            parts.append(shard[max(0, start - first) : stop - first])
        first += len(shard)
    return np.concatenate(parts)


# ------------------------------------------------------------------------------------------------
# The command


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("sources", nargs="*", default=["stdlib"], help="files, folders, or a name from above")
    add("--out", help="folder for the shards (default: data/<first source>)")
    add("--tokenizer", default="bytes", help="bytes, gpt2 or o200k_base")
    add("--field", default="text", help="holds the text in records of JSON, .parquet and the Hub")
    add("--val_fraction", type=float, default=0.1, help="share of the validation split")
    add("--shard_tokens", type=int, default=100_000_000, help="write whenever so many are ready")
    args = parser.parse_args()
    if not args.out:
        name = Path(args.sources[0]).resolve().stem
        args.out = "data/" + re.sub(r"[^\w.-]", "_", name)  # so that it needs no quotes
        if args.tokenizer != "bytes":
            args.out += f"-{args.tokenizer}"
    try:
        meta = prepare(**vars(args))
        open_data(args.out, full=True)  # read every byte back, also of a folder made long ago
    except KeyboardInterrupt:
        raise SystemExit("interrupted: the same command continues") from None
    except ModuleNotFoundError as error:
        raise SystemExit(f"this needs:  pip install {error.name}") from None
    shortest = min(meta[split]["tokens"] for split in SPLITS)
    if shortest <= 256:  # train.py reads 256 tokens at once, unless told otherwise
        print(f"a short text: --seq_len can be at most {shortest - 1}", file=sys.stderr)
    print(f"{args.out} is ready: python train.py --data {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
