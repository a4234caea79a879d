"""
Download text and turn it into token shards in `data/NAME`; also download the evaluation sets.

    python prepare_data.py                                    # FineWeb-Edu, 10B tokens, and the evaluation sets
    python prepare_data.py --source demo                      # Python's own manual, offline: data/demo
    python prepare_data.py --input corpus.jsonl --out data/mine

The corpus is one stream of tokens, each document preceded by <|endoftext|>: the first --val-tokens for validation, the
rest for training, both cut into shards `val_000000.bin`, `train_000000.bin`, ... in llm.c's format: 256 int32
(20240520, 1, the number of tokens, zeros), then uint16 tokens, little-endian. `meta.json` says what each split contains
and where to continue; `SHA256SUMS` covers the shards and, once the directory is complete, meta.json.
"""

import argparse
import gzip
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import Field, dataclass, field, fields
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

try:
    import fcntl

    import numpy as np
    import requests
    import tiktoken
    from requests.adapters import Retry
    from tiktoken.load import read_file_cached
    from urllib3.exceptions import HTTPError
except ImportError as error:
    advice = "on Windows, use WSL" if error.name == "fcntl" else "pip install -r requirements.txt"
    sys.exit(f"{Path(sys.argv[0]).name}: error: {error}; {advice}")
except KeyboardInterrupt:
    sys.exit(130)

# Tokenizers

VOCAB_SIZES = {"gpt2": 50257, "byte": 257}
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")
END_OF_TEXT = "<|endoftext|>"
GPT2_ENCODING = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
# GPT-2's pattern with all but the lookahead in one group, which tiktoken matches much faster.
GPT2_PATTERN = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+$)|\s+(?!\S)|\s"


@cache
def get_tokenizer(name: str, thread: int = 0) -> tiktoken.Encoding:
    """The tokenizer "gpt2" or "byte" (the 256 byte values and <|endoftext|>); each thread asks for its own, or they
    would wait for each other. Raises OSError if it cannot be fetched."""
    pattern = r"(?s:.{1,512})"
    ranks = {bytes([byte]): byte for byte in range(256)}
    if name == "gpt2":
        with fetching("GPT-2's tokenizer", "go online, or set TIKTOKEN_CACHE_DIR to a cache with it"):
            # In a thread, since tiktoken has no timeout of its own.
            ranks = begin(tiktoken.get_encoding, name).result(timeout=120)._mergeable_ranks
        pattern = GPT2_PATTERN
    special = {END_OF_TEXT: len(ranks)}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


@cache
def token_bytes(tokenizer: tiktoken.Encoding) -> np.ndarray:
    """How many bytes of UTF-8 each token stands for: (vocab_size,) uint16, 0 for <|endoftext|>."""
    tokens = tokenizer.decode_tokens_bytes(range(tokenizer.eot_token))  # all but the last
    return np.array([*map(len, tokens), 0], dtype=np.uint16)


def tokenizer_files(name: str, block_size: int) -> dict:
    """The files of a tokenizer by name, as transformers reads them."""
    config = json.dumps({"tokenizer_class": "GPT2Tokenizer", "model_max_length": block_size}).encode()
    if name == "gpt2":
        # OpenAI's own files, which get_tokenizer() has put in tiktoken's cache.
        vocab = read_file_cached(f"{GPT2_ENCODING}/encoder.json")
        merges = read_file_cached(f"{GPT2_ENCODING}/vocab.bpe")
    else:
        # GPT-2 writes a byte as a character: printable ones as in Latin-1, others from chr(256) on.
        others = [*range(33), *range(127, 161), 173]
        names = [chr(256 + others.index(byte) if byte in others else byte) for byte in range(256)]
        vocab = json.dumps({name: i for i, name in enumerate([*names, END_OF_TEXT])}).encode()
        merges = b"#version: 0.2\n"
    return {"vocab.json": vocab, "merges.txt": merges, "tokenizer_config.json": config}


# Documents

BATCH_CHARACTERS = 1 << 18  # the position in meta.json counts batches of this size
MOST_BYTES = 1 << 30  # of a document, which is held in memory


def check_size(size: int) -> None:
    if size > MOST_BYTES:
        raise ValueError(f"a document may be at most {MOST_BYTES:,} bytes")


def read_txt(path: Path) -> Iterator:
    """The documents of a text file, separated by <|endoftext|> and, if there is one, the line break after it."""
    rest = "\n"  # as if a separator came before the first document; one is added after the last
    with open(path, encoding="utf-8-sig", newline="") as file:
        pieces = iter(lambda: file.read(1 << 24), "")
        for piece in itertools.chain(pieces, [END_OF_TEXT]):
            check_size(len(rest))
            *documents, rest = (rest + piece).split(END_OF_TEXT)
            for document in documents:
                yield document.removeprefix("\r").removeprefix("\n")


def read_jsonl(path: Path) -> Iterator:
    """The field "text" of each line, None for a blank line. json.loads skips a byte-order mark."""
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rb") as file:
        for line in iter(lambda: file.readline(MOST_BYTES + 1), b""):
            check_size(len(line))
            yield read_object(line, "its JSON").get("text", 0) if line.strip() else None


def read_parquet(path: Path) -> Iterator:
    """The column "text" of a Parquet file."""
    import pyarrow.parquet  # slow to import, and only Parquet needs it

    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(16, columns=["text"]):
        yield from batch["text"].to_pylist()


READERS = {".txt": read_txt, ".jsonl": read_jsonl, ".gz": read_jsonl, ".parquet": read_parquet}


def read_batches(path: Path) -> Iterator:
    """The non-empty documents of a file, in batches of BATCH_CHARACTERS or more. Raises ValueError for a bad one."""
    batch = []
    length = 0
    line = 1
    marks = 0
    try:
        for text in READERS[path.suffix.lower()](path):
            if not isinstance(text, str | None):
                raise ValueError('each document needs a string in the field "text"')
            if text:
                check_size(len(text.encode()))  # fails for half a surrogate pair, as JSON can have
                batch.append(text)
                length += len(text)
                marks += text.count(END_OF_TEXT)
            if length >= BATCH_CHARACTERS:
                yield batch
                batch = []
                length = 0
            line += 1
    except Exception as error:  # of the file system, zlib, JSON, pyarrow, ...
        where = f"{path}, line {line:,}," if ".json" in path.name.lower() else path
        raise ValueError(f"{where} cannot be read: {str(error) or type(error).__name__}") from error
    if marks:
        say(f"warning: {path} has {marks:,} {END_OF_TEXT} in its texts, kept as text", sys.stderr)
    yield batch


def cut_white_space(text: str) -> Iterator:
    """Cut a text into parts that have the same tokens as the whole. tiktoken's regular expression overflows its stack
    on a few hundred thousand spaces in a row, so each long run is cut before its last character, where GPT-2's pattern
    splits anyway (but not at the end of a text)."""
    spaces = re.compile(r"[^\S\x1c-\x1f]*")  # \x1c to \x1f are white space in Python, not in Rust
    start = 0
    position = 0
    while position < len(text):  # looking once every 1,000 characters finds every run of 2,000
        end = spaces.match(text, position).end()
        if position + 1000 <= end < len(text):
            yield text[start : end - 1]
            start = end - 1
        position = end + 1000
    yield text[start:]


def tokenize(texts: list[str], tokenizer: tiktoken.Encoding) -> np.ndarray:
    """The tokens of documents, (n,) uint16. <|endoftext|> precedes each document; inside one it is ordinary text."""
    pieces = [[]]
    for text in texts:
        pieces.append([tokenizer.eot_token])
        for part in cut_white_space(text):
            pieces.append(tokenizer.encode_to_numpy(part, disallowed_special=()))
    return np.concatenate(pieces, dtype="<u2", casting="unsafe")


# Downloads


class RawFile(NamedTuple):
    """A local file or, if it has a `url`, one to download; a URL that begins with "/" is on the hub."""

    name: str
    size: int  # in bytes
    sha256: str = ""  # in hex, "" if unknown
    url: str = ""
    changed: int = 0  # a local file's ctime in nanoseconds, which no program can set


def get(url: str, first: int = 0) -> requests.Response:
    """Request a page, or a file from byte `first` on; HF_TOKEN is sent to the hub alone. Raises RequestException."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    if not re.fullmatch(r"https?://[^/@\s]+(/[^@\s]*)?", hub):
        raise requests.HTTPError("HF_ENDPOINT must be an address, without a password")
    if url.startswith("/"):
        url = hub + url
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={first}-" if first else None}
    token = os.environ.get("HF_TOKEN", "").strip()
    if token and url.startswith(hub + "/"):
        headers["Authorization"] = f"Bearer {token}"
    session = requests.Session()
    session.auth = lambda request: request  # or .netrc's password would replace the token
    wait = {"backoff_factor": 1, "backoff_max": 60, "retry_after_max": 60, "raise_on_status": False}
    retries = Retry(8, connect=2, read=2, status_forcelist=[408, 429, *range(500, 600)], **wait)
    for adapter in session.adapters.values():
        adapter.max_retries = retries
    response = session.get(url, headers=headers, stream=True, timeout=(10, 30))
    if not response.ok:
        raise requests.HTTPError(f"the server answered {response.status_code}")
    return response


@contextmanager
def fetching(name: str, advice: str = "check --subset, HF_ENDPOINT, HF_TOKEN, or run the command again") -> Iterator:
    """Turn any failure of a request into an OSError that says what to do."""
    try:
        yield
    except (requests.RequestException, HTTPError, TimeoutError, ValueError) as error:
        problem = error if isinstance(error, requests.HTTPError) else type(error).__name__
        raise OSError(f"{name} could not be fetched: {problem}; {advice}") from error


def list_hub(repository: str, folder: str = "") -> list:
    """List a folder of `datasets/OWNER/NAME` or `models/OWNER/NAME` on the hub. Raises OSError or ValueError."""
    name = f"the list of {repository}{folder}"
    base = f"/{repository.removeprefix('models/')}/resolve/main"
    url = f"/api/{repository}/tree/main{folder}"
    deadline = time.monotonic() + 600  # leaves time for waits that the hub asks for
    files = set()
    while url:
        status(f"fetching {name}")
        page = b""
        with fetching(name), get(url) as response:
            for piece in iter(lambda: response.raw.read1(1 << 16), b""):  # whatever has arrived
                page += piece
                if time.monotonic() > deadline:
                    raise TimeoutError
        with reading(name):
            for entry in json.loads(page):
                path = str(entry["path"])
                checksum = (entry.get("lfs") or {}).get("oid", "")
                files.add(RawFile(path, int(entry["size"]), checksum, f"{base}/{path}"))
        url = response.links.get("next", {}).get("url")
    return sorted(files)


def download(file: RawFile, path: Path) -> Path:
    """Fetch a file by way of `path`.part, unless `path` has its sha256 or it is local. Raises OSError."""
    if not file.url:
        return Path(file.name)
    if path.is_file() and sha256_of(path) == file.sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with fetching(file.name), writing(part), open(part, "ab") as out:
        furthest = out.tell()
        failures = 0  # one after another, without progress
        while out.tell() < file.size:
            if failures:
                say(f"fetching {file.name}: the connection broke; trying again", sys.stderr)
                time.sleep(min(60.0, 2.0**failures - 1))
            with suppress(requests.ConnectionError, HTTPError), get(file.url, out.tell()) as response:
                if response.status_code != 206:  # the server ignores ranges
                    out.truncate(0)
                    out.seek(0)
                for piece in iter(lambda: response.raw.read1(1 << 20), b""):
                    out.write(piece)
                    status(f"fetching {file.name}: {out.tell() >> 20:,} of {file.size >> 20:,} MiB")
                    if out.tell() > file.size:
                        break
            failures = 0 if out.tell() > furthest else failures + 1
            furthest = max(furthest, out.tell())
            if failures == 8:
                raise requests.ConnectionError
    if part.stat().st_size != file.size or file.sha256 not in ("", sha256_of(part)):
        part.unlink()
        raise OSError(f"{file.name} arrived with the wrong size or sha256; run the command again")
    part.replace(path)
    return path


def tokenize_in_order(files: list, paths: list, start: list, tokenizer_name: str, workers: int) -> Iterator:
    """(place, tokens) of each batch of documents, in order from `start` on: [file, batch within it], and (n,) uint16.
    Threads tokenize ahead (tiktoken releases the GIL) while another downloads the next file to its path."""

    def read() -> Iterator:
        indices = range(start[0], len(files))
        fetched = in_background(lambda i: download(files[i], paths[i]), indices, ahead=1)
        for index, path in enumerate(fetched, start[0]):
            for i, texts in enumerate(read_batches(path)):
                if [index, i] >= start:
                    yield [index, i], texts
            if [index, i] < start:
                raise ValueError(f"{path} ends before the position in meta.json; use another --out")

    def tokenize_batch(batch: tuple) -> tuple:
        place, texts = batch
        return place, tokenize(texts, get_tokenizer(tokenizer_name, threading.get_ident()))

    # Not a thread for each batch, since tiktoken would build its regex's tables again in each.
    return in_background(tokenize_batch, read(), 2 * workers, ThreadPoolExecutor(workers).submit)


# Shards

SHARD_MAGIC = (20240520, 1)  # and the version of the format
HEADER_BYTES = 1024


class Split(NamedTuple):
    """A split's shards, cut into sequences of T + 1 tokens. Neighbors share one token; a remainder is unused."""

    paths: list[Path]
    tokens: list[int]  # in each shard
    first: np.ndarray  # (shards + 1,) int64: each shard's first sequence, and the total
    sequences: int  # the total
    sequence_length: int  # T
    vocab_size: int


def read_tokenizer_name(directory: Path) -> str:
    """The name of a data directory's tokenizer: GPT-2's without meta.json, for shards of another program."""
    path = directory / "meta.json"
    if path.name not in read_checksums(directory):  # which list it once all is complete
        if path.exists():
            raise ValueError(f"{directory} is incomplete; run its prepare_data.py command again")
        return "gpt2"
    check_checksums(directory, [path.name])
    with reading(path):
        name = json.loads(path.read_bytes())["tokenizer"]
        if name not in VOCAB_SIZES:
            raise ValueError(f"its tokenizer, {name}, is unknown")
    return name


def is_of_split(file: str, split: str) -> bool:
    """Whether a shard's name is `SPLIT_000000.bin`, modded-nanogpt's `*_SPLIT_000000.bin` or llm.c's `*_SPLIT.bin`."""
    return re.search(rf"(^|_){split}(_\d+)?\.bin$", file) is not None


def open_split(directory: Path, name: str, sequence_length: int) -> Split:
    """Open the shards of "train" or "val". Raises ValueError if they are missing, damaged, unlisted or too short."""
    vocab_size = VOCAB_SIZES[read_tokenizer_name(directory)]
    found = {path.name for path in directory.glob("*.bin")}
    listed = read_checksums(directory) or found  # another program's shards have no checksums
    paths = [directory / file for file in sorted(found.union(listed)) if is_of_split(file, name)]
    tokens = []
    first = [0]
    for path in paths:
        if path.name not in listed or not path.is_file():
            raise ValueError(f"{path} is missing, or not in SHA256SUMS; restore it, or start over")
        size = path.stat().st_size
        header = np.fromfile(path, dtype="<i4", count=3).tolist()
        if header != [*SHARD_MAGIC, (size - HEADER_BYTES) / 2] or size <= HEADER_BYTES:
            raise ValueError(f"{path} is damaged, empty, or not a token shard: {size:,} bytes")
        tokens.append(header[2])
        first.append(first[-1] + (header[2] - 1) // sequence_length)
    if first[-1] == 0:
        problem = f"{directory} has no {name} shards of {sequence_length + 1} tokens or more"
        raise ValueError(f"{problem}; run prepare_data.py, or use a shorter --sequence-length")
    return Split(paths, tokens, np.array(first), first[-1], sequence_length, vocab_size)


def read_sequences(split: Split, indices: np.ndarray) -> np.ndarray:
    """The sequences with these indices: (n, T + 1) int64. Raises ValueError for a truncated or foreign shard."""
    T = split.sequence_length
    sequences = []
    for index in indices:
        shard = np.searchsorted(split.first, index, side="right") - 1
        path = split.paths[shard]
        start = HEADER_BYTES + 2 * T * int(index - split.first[shard])
        # Not a memory map, whose pages would pile up in this process over an epoch.
        tokens = np.fromfile(path, dtype="<u2", count=T + 1, offset=start)
        if len(tokens) <= T:
            raise ValueError(f"{path} was truncated while in use")
        if tokens.max() >= split.vocab_size:
            raise ValueError(f"{path} contains token {tokens.max()}, not in the vocabulary")
        sequences.append(tokens)
    return np.array(sequences, dtype=np.int64)


# Corpora and evaluation sets

HUB_DATASETS = {"fineweb-edu": "HuggingFaceFW/fineweb-edu", "fineweb": "HuggingFaceFW/fineweb"}
FILES = {  # by source: name, size, sha256, url
    "shakespeare": RawFile(
        "shakespeare.txt", 1_115_394, "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"),
    "hellaswag": RawFile(
        "hellaswag_val.jsonl", 12_246_618, "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
        "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"),
    "lambada": RawFile(
        "lambada_test.jsonl", 1_819_752, "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
        "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl"),
}  # fmt: skip
EVALUATION_SETS = ("hellaswag", "lambada")
SOURCES = (*HUB_DATASETS, "shakespeare", "demo", *EVALUATION_SETS)
COUNTS = ("shards", "documents", "tokens", "bytes")  # of each split, in meta.json
START = [0, 0, 0]  # a position in a corpus: a file, a batch of documents in it, a token in that
WORK = ".prepare_data"  # the directory of downloads, removed at the end


def local_file(path: Path) -> RawFile:
    """One of the user's own files. Raises FileNotFoundError if it is missing, ValueError for an unknown format."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, or is not a file")
    if path.suffix.lower() not in READERS:
        raise ValueError(f"{path} is in no known format (.txt, .jsonl, .jsonl.gz, .parquet)")
    stat = path.stat()
    return RawFile(str(path), stat.st_size, sha256_of(path), changed=stat.st_ctime_ns)


def write_demo(directory: Path) -> RawFile:
    """The topics of Python's own manual, which ships with CPython, as a local file."""
    from pydoc_data.topics import topics

    directory.mkdir(exist_ok=True)
    path = directory / "topics.txt"
    path.write_text(END_OF_TEXT.join(topics[name] for name in sorted(topics)), encoding="utf-8")
    return local_file(path)


def list_corpus(settings: dict) -> list:
    """The Parquet files of a sample or a dump of FineWeb, as many as max_tokens needs. Raises OSError."""
    subset = settings["subset"]
    folder = subset.replace("sample-", "/sample/") if subset.startswith("sample-") else f"/data/{subset}"
    needed = []
    tokens = 0
    for file in list_hub(f"datasets/{HUB_DATASETS[settings['source']]}", folder):
        if file.name.endswith(".parquet") and tokens < (settings["max_tokens"] or sys.maxsize):
            needed.append(file)
            tokens += 0.2 * file.size  # a low estimate: there are about 0.3 tokens per byte
    if not needed:
        raise OSError(f"the hub lists no Parquet files for {subset}; check --subset")
    return needed


def next_shard(meta: dict) -> tuple[str, int]:
    """The split of the next token, and how many tokens its next shard may hold: 0 once max_tokens is reached."""
    val = meta["val"]["tokens"]
    left = (meta["max_tokens"] or sys.maxsize) - val - meta["train"]["tokens"]
    room = min(meta["shard_tokens"], left)
    if val < meta["val_tokens"]:
        return "val", min(room, meta["val_tokens"] - val)
    return "train", room


def write_meta(out: Path, meta: dict) -> None:
    write_atomically(out / "meta.json", [json.dumps(meta, indent=2).encode() + b"\n"])


def add_shard(out: Path, meta: dict, pieces: list, split: str, position: list) -> None:
    """Write a shard, its checksum, then meta.json, with the `position` of the first token that is in no shard yet."""
    tokenizer = get_tokenizer(meta["tokenizer"])
    counts = meta[split]
    total = sum(map(len, pieces))
    path = out / f"{split}_{counts['shards']:06d}.bin"
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = (*SHARD_MAGIC, total)
    write_atomically(path, [header, *pieces])
    uses = sum(np.bincount(piece, minlength=tokenizer.n_vocab) for piece in pieces)  # of each token
    counts["shards"] += 1
    counts["documents"] += int(uses[tokenizer.eot_token])
    counts["tokens"] += total
    counts["bytes"] += int(uses @ token_bytes(tokenizer))
    meta["position"] = position
    add_checksums(out, [path.name])
    write_meta(out, meta)
    say(f"{path}: {total:,} tokens")


def open_meta(settings: dict, files: list, out: Path) -> dict:
    """The meta.json of an earlier run with these settings, or a new one. Raises ValueError or FileExistsError."""
    path = out / "meta.json"
    if path.exists():
        with reading(path):
            meta = json.loads(path.read_bytes())
            for split in ("train", "val"):
                meta[split] = {name: int(meta[split][name]) for name in COUNTS}
            meta["files"] = [RawFile(*file) for file in meta["files"]]
            meta["position"] = [int(meta["position"][i]) for i in range(3)]
            end = [len(files or meta["files"]), 0, 0]
            if min(meta["position"]) < 0 or meta["position"] > end:
                raise ValueError("its position is out of range")
        changed = [name for name, value in settings.items() if meta.get(name) != value]
        if not changed:
            return meta
        if meta["position"] != START:
            name = changed[0]
            difference = f"{name} was {meta.get(name)}, now {settings[name]}"
            raise ValueError(f"{out} was prepared differently: {difference}; use another --out")
    elif any(out.glob("*.bin")):
        raise FileExistsError(f"{out} has shards that this script did not write; use another --out")
    meta = settings | {
        "vocab_size": VOCAB_SIZES[settings["tokenizer"]],
        "train": dict.fromkeys(COUNTS, 0),
        "val": dict.fromkeys(COUNTS, 0),
        "position": START,
        "files": [] if files else list_corpus(settings),  # kept, since the hub's list may change
    }
    write_meta(out, meta)
    return meta


def check_unchanged(files: list) -> None:
    """Raise ValueError if one of the user's files has changed since its sha256 was taken."""
    for file in files:
        if file.changed and os.stat(file.name).st_ctime_ns != file.changed:
            raise ValueError(f"{file.name} has changed since the start; restore it, or use another --out")


def choose_val_tokens(batches: Iterator, meta: dict) -> Iterator:
    """Set meta["val_tokens"] to a tenth of the corpus, at most 1M. Returns the same batches, some read ahead."""
    most = min(meta["max_tokens"] or sys.maxsize, 10**7)
    sample = 0
    ahead = []
    for batch in batches:
        ahead.append(batch)
        sample += len(batch[1])
        if sample >= most:
            break
    meta["val_tokens"] = max(1, min(sample, most) // 10)
    return itertools.chain(ahead, batches)


def prepare(settings: dict, files: list, out: Path, workers: int) -> dict:
    """Prepare `out` according to `settings`, or continue an earlier run; return the content of its meta.json."""
    get_tokenizer(settings["tokenizer"])  # fail now if it cannot be fetched
    meta = open_meta(settings, files, out)
    written = set(read_checksums(out))
    for split in ("val", "train"):
        written |= {f"{split}_{i:06d}.bin" for i in range(meta[split]["shards"])}
    check_checksums(out, sorted(written))
    if "meta.json" in written:
        say(f"{out} is already prepared")
        return meta
    files = files or meta["files"]
    paths = [out / WORK / Path(file.name).name for file in files]
    *start, skip = meta["position"]
    batches = tokenize_in_order(files, paths, start, settings["tokenizer"], workers)
    if "val_tokens" not in meta:
        batches = choose_val_tokens(batches, meta)
    split, room = next_shard(meta)
    pieces = []  # of the next shard
    for place, tokens in batches:
        used = skip if place == start else 0  # tokens of this batch that are in shards
        if used > len(tokens):
            raise ValueError(f"{out / 'meta.json'} has an impossible position; use another --out")
        while used < len(tokens) and room:
            piece = tokens[used : used + room]
            pieces.append(piece)
            used += len(piece)
            room -= len(piece)
            if room == 0:
                check_unchanged(files)  # so that all shards are made from the same text
                add_shard(out, meta, pieces, split, [*place, used])
                split, room = next_shard(meta)
                pieces = []
                for path in paths[: place[0]]:  # all of whose tokens are in shards
                    path.unlink(missing_ok=True)
        status(f"file {place[0] + 1} of {len(files)}: {room:,} tokens to the next shard")
        if room == 0:
            break
    check_unchanged(files)
    if pieces:
        add_shard(out, meta, pieces, split, [len(files), 0, 0])
    if meta["val"]["shards"] == 0:
        raise ValueError(f"{', '.join(file.name for file in files)} has no text")
    add_checksums(out, ["meta.json"])
    return meta


# Models on disk

OPENAI_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
MODEL_FILES = ("model.safetensors", "config.json")
CHECKPOINT_FILES = (*MODEL_FILES, "trainer.pt", *TOKENIZER_FILES)


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, `step_NNNNNN`, oldest first, whole or damaged, but no renamed copy of one."""
    import torch  # slow to import, and not needed to prepare data

    found = []
    for directory in run.glob("step_*/"):
        if not re.fullmatch("step_([0-9]{6}|[1-9][0-9]{6,})", directory.name):
            continue
        path = directory / "trainer.pt"
        try:
            trainer = dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
            is_checkpoint = trainer.get("step") == int(directory.name[5:])
        except Exception:  # a damaged checkpoint is known by its SHA256SUMS
            is_checkpoint = path.name in read_checksums(directory)
        if is_checkpoint is True:  # the step of a foreign file may be anything
            found.append(directory)
    return sorted(found, key=lambda path: int(path.name[5:]))


def newest_checkpoint(run: Path) -> Path | None:
    """A run's newest intact checkpoint, or None if it has none at all. Raises FileNotFoundError if all are damaged."""
    found = checkpoints(run)
    for checkpoint in reversed(found):
        try:
            check_checksums(checkpoint, CHECKPOINT_FILES)
            return checkpoint
        except (ValueError, OSError) as error:
            say(f"warning: {error}; skipping {checkpoint.name}", sys.stderr)
    if found:
        raise FileNotFoundError(f"{run} has no intact checkpoint; restore one, or use another --out")
    return None


def model_directory(name_or_dir: str | Path) -> Path:
    """The directory of a model, given that directory, a run (its newest checkpoint), a directory of runs (the newest
    run's), or the name of one of OpenAI's models. Raises ValueError if it is damaged, OSError if there is none."""
    directory = Path(name_or_dir)
    if all((directory / name).exists() for name in MODEL_FILES):
        # Every checkpoint has checksums; a model from elsewhere need not.
        if any((directory / name).exists() for name in ("SHA256SUMS", "trainer.pt")):
            check_checksums(directory, MODEL_FILES)
        return directory
    runs = [run for run in (directory, *directory.glob("*/")) if checkpoints(run)]
    if runs:
        return newest_checkpoint(max(runs, key=lambda run: run.stat().st_mtime))
    if name_or_dir in OPENAI_MODELS:
        return fetch_model(name_or_dir)
    choices = f"a checkpoint, a run, or one of {', '.join(OPENAI_MODELS)}"
    raise FileNotFoundError(f"{directory.absolute()} is not a model; train one, or name {choices}")


def fetch_model(name: str) -> Path:
    """The directory of one of OpenAI's models; if missing or damaged, one process fetches it for all."""
    directory = Path("data/models") / name
    with suppress(OSError, ValueError):
        check_checksums(directory, MODEL_FILES)
        return directory
    with locked(directory, wait=True):  # download() skips what another process has fetched
        files = {file.name: file for file in list_hub(f"models/openai-community/{name}")}
        for file in MODEL_FILES:
            if file not in files:
                raise OSError(f"the hub lists no {file} for {name}; check HF_ENDPOINT")
            download(files[file], directory / file)
        add_checksums(directory, MODEL_FILES)
    return directory


# Shared by the scripts: the terminal and threads


@contextmanager
def one_line_errors(script: str, memory_advice: str) -> Iterator:
    """Turn an error that the user can fix into one line and exit status 1, and Ctrl-C into exit status 130."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed
            setattr(sys, name, open(os.devnull, "r+"))
    with suppress(AttributeError):  # of a stream that a caller has put in its place
        sys.stdout.reconfigure(errors="replace")
    try:
        yield
    except KeyboardInterrupt:
        status("")
        sys.stdout.flush()
        os._exit(130)  # at once: threads may be in the middle of something long
    except BrokenPipeError:  # the reader has closed the pipe
        sys.stdout = None  # or Python would flush it at exit, and fail again
        sys.exit(0)
    except Exception as error:
        problem = printable(" ".join(str(error).split())) or type(error).__name__
        if isinstance(error, ModuleNotFoundError):
            problem += f"; pip install {error.name}"
        elif isinstance(error, MemoryError) or re.search("out of memory|allocate memory|start new thread", problem):
            problem = f"out of memory, or of threads; {memory_advice}"
        elif not isinstance(error, ValueError | OSError | FloatingPointError):
            raise
        status("")
        sys.stderr.write(f"{script}: error: {problem}\n")  # in one write, as other ranks write too
        sys.exit(1)


def printable(text: str) -> str:
    """Replace what a terminal would not print but obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


def is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def say(text: str, file: Any = None) -> None:
    """Print a line on rank 0, in place of the status. A reader that has closed the pipe does not end the run."""
    status("")
    try:
        if is_main_process():
            print(printable(text), file=file, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), (file or sys.stdout).fileno())


def status(text: str) -> None:
    """Show `text` on the last line of a terminal until the next line or status replaces it."""
    if sys.stderr.isatty() and is_main_process():
        line = printable(text)[: shutil.get_terminal_size().columns - 1]
        print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)


def option(default: Any, help: str, least: float = 0, most: float = 2**31 - 1, choices: Any = None) -> Any:
    """A field of a dataclass of settings, with its range or choices."""
    if default:
        help += f" (default: {default})"
    return field(default=default, metadata={"help": help, "range": (least, most), "choices": choices})


def new_parser(doc: str, settings: type) -> argparse.ArgumentParser:
    """A parser with an option for each field of a dataclass; it returns only those that are given."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[1], allow_abbrev=False)
    parser.usage = argparse.SUPPRESS
    parser.argument_default = argparse.SUPPRESS
    for item in fields(settings):
        how = {"action": argparse.BooleanOptionalAction}
        if item.type is str:
            how = {"choices": item.metadata["choices"]}
        elif item.type is tuple:
            how = {"nargs": "+"}
        elif item.type in (int, float):
            how = {"type": partial(number, item)}
        parser.add_argument(f"--{item.name}".replace("_", "-"), help=item.metadata["help"], **how)
    return parser


def number(item: Field, text: str) -> float:
    """The value of an option in its range, from 1000000, 100_000, 500k, 100M or 10B."""
    least, most = item.metadata["range"]
    scale = {"k": 10**3, "m": 10**6, "b": 10**9}.get(text[-1:].lower())
    with suppress(ValueError, OverflowError):
        value = item.type(float(text[:-1]) * scale) if scale else item.type(text)
        if least <= value <= most:
            return value
    kind = item.type.__name__
    raise argparse.ArgumentTypeError(f"must be a number ({kind}) from {least:,} to {most:,}, not {text[:40]}")


def begin(function: Callable, *args: Any) -> Future:
    """Call a function in a daemon thread, which does not keep the process alive."""
    future = Future()

    def call() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:  # raised by future.result()
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


def in_background(function: Callable, items: Iterable, ahead: int, submit: Callable = begin) -> Iterator:
    """function(item) for each item, in order, `ahead` of them at a time, by default each in a thread of its own."""
    futures = (submit(function, item) for item in items)
    pending = [*itertools.islice(futures, ahead)]
    while pending:
        result = pending.pop(0).result()
        pending += itertools.islice(futures, 1)
        yield result


# Shared by the scripts: locks, atomic writes and checksums


@contextmanager
def locked(directory: Path, wait: bool = False) -> Iterator:
    """Hold the lock of a directory, created if need be, which also ends with its process. If another process holds
    it, wait for it or raise BlockingIOError."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(f"{directory} is in use by another process; use another --out") from error
        except OSError as error:  # a network file system without locks
            say(f"warning: {directory} cannot be locked ({error}); let only one run write to it", sys.stderr)
        yield


def synchronize(path: Path) -> None:
    """Wait until a file's content, or a directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator:
    """Add the file's name to an error that comes without one, such as a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename:
            raise
        raise OSError(f"{path}: {error.strerror}") from error


def write_atomically(path: Path, pieces: Iterable) -> None:
    """Write bytes or arrays so that a crash at any moment leaves the old file or the new one."""
    part = path.with_name(path.name + ".tmp")
    with writing(path):
        with open(part, "wb") as file:
            file.writelines(pieces)
        synchronize(part)
    part.replace(path)


@contextmanager
def reading(what: object) -> Iterator:
    """Turn anything that goes wrong with a foreign file into a ValueError that names it."""
    try:
        yield
    except Exception as error:
        problem = str(error) or type(error).__name__
        if isinstance(error, KeyError):
            problem = f"it has no {error}"
        raise ValueError(f"{what} cannot be used: {problem}") from error


def read_object(text: str | bytes, where: object) -> dict:
    """A JSON object. Raises ValueError, naming where the text is from, for anything else."""
    with reading(where):
        value = json.loads(text)
        if not isinstance(value, dict):
            raise TypeError("it is not a JSON object")
        return value


def sha256_of(path: Path) -> str:
    status(f"sha256 of {path}")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_checksums(directory: Path) -> dict:
    """The sha256 of each file that `SHA256SUMS` lists, by its name, as `sha256sum` writes it; {} without the file."""
    path = directory / "SHA256SUMS"
    if not path.is_file():
        return {}
    listed = re.findall(r"^([0-9a-f]{64}) [ *](.+)$", path.read_text(errors="replace"), re.MULTILINE)
    return {name: checksum for checksum, name in listed}


def add_checksums(directory: Path, names: Iterable) -> None:
    """Add files to `SHA256SUMS`, which `sha256sum -c` reads."""
    checksums = read_checksums(directory) | {name: sha256_of(directory / name) for name in names}
    lines = [f"{checksums[name]}  {name}\n".encode() for name in sorted(checksums)]
    write_atomically(directory / "SHA256SUMS", lines)


def check_checksums(directory: Path, names: Iterable) -> None:
    """Raise ValueError for a file that is missing, or not as `SHA256SUMS` says."""
    checksums = read_checksums(directory)
    for name in names:
        path = directory / name
        if not path.is_file() or sha256_of(path) != checksums.get(name):
            raise ValueError(f"{path} is damaged, missing, or not in SHA256SUMS; restore it, or use another directory")


# The command line


@dataclass(frozen=True)
class Options:
    """The options of prepare_data.py."""

    source: str = option("", "what to prepare (default: fineweb-edu, evaluation sets)", choices=SOURCES)
    input: tuple = option((), "your own text: .txt, .jsonl, .jsonl.gz, .parquet")
    subset: str = option("sample-10BT", "sample or dump of FineWeb")
    out: str = option("", "directory to write to (default: data/NAME); without --source, FineWeb-Edu alone")
    tokenizer: str = option("", "tokenizer (default: gpt2; byte for the demo)", choices=VOCAB_SIZES)
    shard_tokens: int = option(10**8, "tokens in a shard", 1)
    val_tokens: int = option(0, "validation tokens (default: a tenth, at most 1M; FineWeb: 100M)", 1, 10**15)
    max_tokens: int = option(0, "tokens in both splits together (default: all)", 1, 10**15)
    workers: int = option(0, "threads (default: one per core)", 1, 1024)


def prepare_source(source: str, args: Options) -> None:
    """Prepare one source in a directory of its own; "" means the files of --input."""
    name = source or Path(args.input[0]).name.split(".")[0] or "text"
    out = Path(args.out or f"data/{name}")
    files = [local_file(Path(path)) for path in args.input]
    if source in FILES:
        files = [FILES[source]]
    with locked(out):
        if source in EVALUATION_SETS:
            path = download(files[0], out / files[0].name)
            add_checksums(out, [path.name])
            say(f"{source}: {path}")
            return
        if source == "demo":
            files = [write_demo(out / WORK)]
        settings = {  # together, these determine every byte of the result
            "source": source or [[Path(file.name).name, file.size, file.sha256] for file in files],
            "subset": args.subset if source in HUB_DATASETS else None,
            "tokenizer": args.tokenizer or ("byte" if source == "demo" else "gpt2"),
            "shard_tokens": args.shard_tokens,
            "max_tokens": args.max_tokens or None,
        }
        if args.val_tokens:
            settings["val_tokens"] = args.val_tokens
        elif source in HUB_DATASETS:
            settings["val_tokens"] = max(1, min(args.max_tokens or sys.maxsize, 10**9) // 10)
        # At most one per core: each has a tokenizer of its own, of 10 MB.
        workers = min(args.workers or 1024, os.cpu_count())
        meta = prepare(settings, files, out, workers)
        shutil.rmtree(out / WORK, ignore_errors=True)
    train_tokens = meta["train"]["tokens"]
    say(f"{out}: {train_tokens:,} tokens for training, {meta['val']['tokens']:,} for validation")
    preset = "gpt2" if train_tokens >= 10**7 else "book"
    if source == "demo":
        preset = "demo"
    command = f"--preset {preset}" if train_tokens else "--eval-only --init-from MODEL"
    say(f"now run: python train.py {command} --data={shlex.quote(str(out))}")


def main(argv: list | None = None) -> None:
    parser = new_parser(__doc__, Options)
    args = Options(**vars(parser.parse_args(argv)))
    if args.source and args.input:
        parser.error("--source and --input exclude each other")
    sources = [*EVALUATION_SETS, "fineweb-edu"]
    if args.input or args.source:
        sources = [args.source]
    elif args.out:
        sources = ["fineweb-edu"]  # each set would need a directory of its own
    with one_line_errors("prepare_data.py", "use fewer --workers"):
        for source in sources:
            prepare_source(source, args)


if __name__ == "__main__":
    main()
