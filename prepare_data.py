"""
Downloads, and the files made from them: text to token shards in `data/NAME`, evaluation sets, OpenAI's weights.

    python prepare_data.py                                    # FineWeb-Edu, 10B tokens, and the evaluation sets
    python prepare_data.py --source demo                      # Python's own manual, without network: data/demo
    python prepare_data.py --input corpus.jsonl --out data/mine

The corpus is one stream of tokens, each document preceded by an `<|endoftext|>`: the first --val-tokens of it are the
validation split, the rest is for training, both cut into shards `val_000000.bin`, `train_000000.bin`, ... A shard is
llm.c's: 256 int32 of header (20240520, 1, the number of tokens, zeros), then uint16 tokens, all little endian.
`meta.json` holds the tokenizer, what each split contains, with a sha256 of each shard, and how far the shards reach, so
that the same command continues an interrupted preparation and writes identical bytes. The evaluation sets, HellaSwag
and LAMBADA, stay as they are published.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the process at once, without a traceback

import argparse
import fcntl
import gzip
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import requests
import tiktoken

HUB_DATASETS = {"fineweb-edu": "HuggingFaceFW/fineweb-edu", "fineweb": "HuggingFaceFW/fineweb"}
OPENAI_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
VOCAB_SIZES = {"gpt2": 50257, "byte": 257}  # of the tokenizers
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")
FORMATS = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 1024
DOWNLOAD_ATTEMPTS = 8  # in a row without progress

# What the scripts have in common


def run(main: Callable[[], None]) -> None:
    """Run a script's main function, and end the process without waiting for its threads or for other ranks."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, and the next file to be opened would take its place
            setattr(sys, name, open(os.devnull, mode))
    sys.stdout.reconfigure(errors="replace")
    code = 0
    try:
        main()
    except SystemExit as ending:
        code = ending.code
    except Exception:
        traceback.print_exc()
        code = 1
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


@contextmanager
def one_line_errors(script: str, memory_advice: str) -> Iterator[None]:
    """Turn an error that the user can fix into one line on standard error, and exit status 1. `memory_advice` says how
    to use less memory."""
    try:
        yield
    except BrokenPipeError:  # the reader has closed the pipe
        sys.exit(0)
    except (ValueError, OSError, FloatingPointError, MemoryError, ModuleNotFoundError, RuntimeError) as error:
        problem = " ".join(str(error).split())
        if isinstance(error, ModuleNotFoundError):
            problem += f"; pip install {error.name}"
        elif isinstance(error, MemoryError) or "out of memory" in problem or "can't allocate memory" in problem:
            problem = f"out of memory; {memory_advice}"
        elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):  # no C compiler, for one
            problem = f"the model could not be compiled ({problem}); leave --compile out, or give --no-compile"
        elif isinstance(error, RuntimeError) and ("gloo" in problem or "NCCL" in problem):
            problem = f"the connection to another process of the run is lost ({problem})"
        elif isinstance(error, RuntimeError):
            raise
        status("")
        sys.stderr.write(f"{script}: error: {problem}\n")  # at once: other ranks may write too
        sys.exit(1)


def say(text: str) -> None:
    """Print a line on rank 0, in place of the status. If the reader has closed the pipe, the line is dropped, and the
    run continues."""
    status("")
    try:
        if os.environ.get("RANK", "0") == "0":
            print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def status(text: str) -> None:
    """Show `text` on the last line of a terminal until the next line or status replaces it."""
    if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
        print(f"\r{text[: shutil.get_terminal_size().columns - 1]}\x1b[K", end="", file=sys.stderr, flush=True)


def in_background(function: Callable, items: Iterable[Any], threads: int, ahead: int) -> Iterator[Any]:
    """function(item) for each item, in order, computed by `threads` threads up to `ahead` items in advance."""
    pool, pending, items = ThreadPoolExecutor(threads), deque(), iter(items)
    while True:
        future = Future()
        try:
            future = pool.submit(function, next(items))
        except StopIteration:
            break
        except Exception as error:  # to be raised in its turn, after the results before it
            future.set_exception(error)
        pending.append(future)
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def number(kind: type, least: float, most: float) -> Callable[[str], Any]:
    """A parser of command-line values, int or float, in a range: 1000000, 100_000, 500k, 100M or 10B."""

    def parse(text: str) -> Any:
        scale = {"k": 10**3, "m": 10**6, "b": 10**9}.get(text[-1:].lower())
        with suppress(ValueError, OverflowError):
            if least <= (value := kind(float(text[:-1]) * scale) if scale else kind(text)) <= most:
                return value
        raise argparse.ArgumentTypeError(f"must be a number from {least:,} to {most:,}, not {text[:40]}")

    return parse


# Files that are written whole, by one process, and checked when they are read


@contextmanager
def locked(directory: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a directory, which is made if need be, so that only one process writes to it. The lock ends with
    its process, however that ends. If another has it, raises BlockingIOError, or with `wait` waits."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            holder = "another process (perhaps a worker that has outlived its torchrun)"
            raise BlockingIOError(f"{directory} is in use by {holder}; wait, or give another --out") from error
        except OSError as error:  # a network file system without locks
            print(f"warning: {directory} cannot be locked ({error}); let only one run write to it", file=sys.stderr)
        yield


def synchronize(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_atomically(path: Path, pieces: Iterable[Any]) -> None:
    """Write bytes or arrays so that a crash at any moment leaves the old file or the new one."""
    part = path.with_name(path.name + ".tmp")
    with open(part, "wb") as file:
        file.writelines(pieces)
    synchronize(part)
    part.replace(path)


def write_json(path: Path, content: dict) -> None:
    """Write an object with its own checksum, the sha256 of what json.dumps makes of the rest."""
    content = content | {"checksum": hashlib.sha256(json.dumps(content).encode()).hexdigest()}
    write_atomically(path, [json.dumps(content, indent=2).encode() + b"\n"])


def read_json(path: Path) -> dict:
    """What write_json wrote. Raises ValueError when it is damaged."""
    content = read_object(path.read_bytes(), path)
    checksum = content.pop("checksum", None)
    if checksum != hashlib.sha256(json.dumps(content).encode()).hexdigest():
        raise ValueError(f"{path} is damaged: its content is not that of its checksum")
    return content


def read_object(text: str | bytes, where: object) -> dict:
    """A JSON object. Raises ValueError, naming where the text is from, for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is damaged or not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} is damaged: it is not a JSON object")
    return value


def sha256_of(path: Path) -> str:
    status(f"sha256 of {path}")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(directory: Path) -> None:
    """Write `SHA256SUMS` over the files of a directory, as `sha256sum -c` reads it."""
    files = sorted(path for path in directory.iterdir() if path.name not in (".lock", "SHA256SUMS", "SHA256SUMS.tmp"))
    write_atomically(directory / "SHA256SUMS", [f"{sha256_of(path)}  {path.name}\n".encode() for path in files])


def check_checksums(directory: Path, names: Sequence[str]) -> None:
    """Compare files with `SHA256SUMS`. Raises ValueError or OSError naming what is damaged or missing."""
    lines = (directory / "SHA256SUMS").read_text(errors="replace").splitlines()
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name in names:
        if sha256_of(directory / name) != sums.get(name):
            raise ValueError(f"{directory / name} is damaged: its sha256 is not the one in SHA256SUMS")


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, `step_NNNNNN`, oldest first."""
    found = [path for path in out.glob("step_*") if path.name[5:].isdecimal()]  # a .tmp is not whole yet
    return sorted(found, key=lambda path: int(path.name[5:]))


# The tokenizers


@cache
def get_tokenizer(name: str) -> tiktoken.Encoding:
    """
    "gpt2": GPT-2's byte-pair encoding, 50,257 tokens; tiktoken fetches it once (TIKTOKEN_CACHE_DIR says where).
    "byte": the 256 bytes of UTF-8 and <|endoftext|>, 257 tokens. Raises OSError when an encoding cannot be fetched.
    """
    if name == "byte":
        ranks, special = {bytes([i]): i for i in range(256)}, {"<|endoftext|>": 256}
        return tiktoken.Encoding("byte", pat_str=r"(?s:.{1,512})", mergeable_ranks=ranks, special_tokens=special)
    status("loading GPT-2's tokenizer")
    try:
        return tiktoken.get_encoding(name)
    except requests.RequestException as error:
        problem = f"GPT-2's tokenizer could not be fetched ({type(error).__name__})"
        raise OSError(f"{problem}; use the byte tokenizer, or set TIKTOKEN_CACHE_DIR to a filled one") from error


@cache
def token_bytes(tokenizer: tiktoken.Encoding) -> np.ndarray:
    """How many bytes of UTF-8 each token stands for: (vocab_size,) uint16, 0 for <|endoftext|>."""
    sizes = [len(tokenizer.decode_single_token_bytes(token)) for token in range(tokenizer.n_vocab)]
    sizes[tokenizer.eot_token] = 0
    return np.array(sizes, dtype=np.uint16)


@cache
def tokenizer_files(tokenizer: tiktoken.Encoding) -> dict[str, str]:
    """
    The text of a tokenizer's files, by name, as OpenAI published GPT-2's and transformers reads them.

    Each byte is spelled as a character: 188 as the one they are in Latin-1, the others, in order, from chr(256) on. The
    two parts that a token was merged from are what byte-pair encoding reaches just before the last merge.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    ordered = printable + [byte for byte in range(256) if byte not in printable]
    spelling = {byte: chr(byte if i < 188 else 68 + i) for i, byte in enumerate(ordered)}
    ranks = {tokenizer.decode_single_token_bytes(token): token for token in range(tokenizer.eot_token)}
    parts_of = []
    for token in ranks:
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            merged = [ranks.get(a + b, math.inf) for a, b in itertools.pairwise(parts)]
            first = merged.index(min(merged))
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        parts_of.append(["".join(spelling[byte] for byte in part) for part in parts])
    vocab = {"".join(parts): token for token, parts in enumerate(parts_of)} | {"<|endoftext|>": tokenizer.eot_token}
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    merges = ["#version: 0.2", *(" ".join(parts) for parts in parts_of if len(parts) == 2)]
    config = json.dumps({"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False} | special)
    return dict(zip(TOKENIZER_FILES, (json.dumps(vocab), "\n".join(merges) + "\n", config), strict=True))


# Downloads


class RawFile(NamedTuple):
    """A file from outside: to be fetched if it has a `url`, else local. Size in bytes, sha256 in hex or empty."""

    name: str
    size: int
    sha256: str = ""
    url: str = ""


def hub_address() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def get(url: str, first: int = 0) -> requests.Response:
    """Ask for a page, or for a file from its byte `first` on. HF_TOKEN is for the hub, and for no other host (requests
    drops it when a redirect leads to another host). Raises requests.RequestException, for a 4xx or 5xx too."""
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={first}-"} if first else {})
    if (token := os.environ.get("HF_TOKEN", "").strip()) and url.startswith(hub_address() + "/"):
        headers["Authorization"] = f"Bearer {token}"
    response = requests.get(url, headers=headers, stream=True, timeout=(10, 30))
    response.raise_for_status()
    return response


def wait_or_raise(error: requests.RequestException, name: str, failures: int, most: int) -> None:
    """Sleep before the next try, after `failures` in a row without progress: as long as the server's Retry-After, else
    1, 2, 4, ... seconds, at most a minute. Raises OSError when another try is pointless or `most` have failed."""
    code = 0 if error.response is None else error.response.status_code
    problem = f"the server answers {code}" if code else type(error).__name__
    if failures >= most or (400 <= code < 500 and code not in (408, 416, 429)):
        advice = "set HF_TOKEN to a token with access" if code in (401, 403) else "the same command continues"
        raise OSError(f"{name} could not be fetched: {problem}; {advice}")
    status(f"{name}: {problem}; trying again")
    after = error.response.headers.get("Retry-After", "") if code else ""
    time.sleep(min(60.0, float(after) if after.isdecimal() else 2.0 ** (failures - 1)))


def list_hub(repository: str, folder: str = "") -> list[RawFile]:
    """The files of a folder of `datasets/OWNER/NAME` or `models/OWNER/NAME` on the hub. Raises OSError."""
    hub, name = hub_address(), f"list of {repository}{folder}"
    asked, files, failures = set(), [], 0
    url, base = f"{hub}/api/{repository}/tree/main{folder}", f"{hub}/{repository.removeprefix('models/')}/resolve/main"
    while url and url not in asked:
        try:
            with get(url) as response:
                for entry in response.json():
                    sha256 = str((entry.get("lfs") or {}).get("oid", ""))
                    files.append(RawFile(str(entry["path"]), int(entry["size"]), sha256, f"{base}/{entry['path']}"))
                asked.add(url)
                failures = 0
                url = response.links.get("next", {}).get("url")
        except (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, ValueError) as error:
            raise OSError(f"the {name} is not as the hub's are: {error!r}") from error
        except requests.RequestException as error:  # with few tries: whoever has no network should hear of it soon
            failures += 1
            wait_or_raise(error, name, failures, 3)
    return sorted(set(files))


def download(file: RawFile, path: Path, speaks: Callable[[], bool] = lambda: True) -> Path:
    """
    Fetch a file to `path`, continuing what an earlier try left in `path`.part; it gets its name when its size and
    sha256 are right. Tries again as long as new bytes arrive, and shows its progress while it `speaks`. A local file
    is returned as it is. Raises OSError when it cannot be had.
    """
    if not file.url:
        return Path(file.name)
    if path.exists() and path.stat().st_size == file.size and file.sha256 in ("", sha256_of(path)):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    failures = furthest = 0
    while (have := part.stat().st_size if part.exists() else 0) < file.size:
        furthest = max(furthest, have)
        try:
            with get(file.url, have) as response:
                resumes = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
                with open(part, "ab" if resumes else "wb") as out:
                    for chunk in response.iter_content(1 << 12):  # more would be lost when it breaks off
                        out.write(chunk)
                        have = out.tell()
                        if speaks():
                            status(f"fetching {path.name}: {have / 1e6:,.0f} of {file.size / 1e6:,.0f} MB")
                        if have >= file.size:
                            break
            if have < file.size:
                raise requests.ConnectionError("the connection was closed too early")
        except requests.RequestException as error:
            if error.response is not None and error.response.status_code == 416:
                part.unlink(missing_ok=True)  # it is no part of what the server has
            failures = 0 if have > furthest else failures + 1
            wait_or_raise(error, file.name, failures, DOWNLOAD_ATTEMPTS)
    if part.stat().st_size != file.size or file.sha256 not in ("", sha256_of(part)):
        part.unlink()
        raise OSError(f"{file.name} was fetched, but it is not what {file.url} promises; run the same command again")
    part.replace(path)
    return path


def model_directory(name_or_dir: str | Path) -> Path:
    """The directory of a model given by path or by name; OpenAI's models are fetched at their first use, by one process
    for all. Raises FileNotFoundError when there is no such model, ValueError when it is damaged, OSError when it cannot
    be fetched."""
    directory, names = Path(name_or_dir), ("model.safetensors", "config.json")
    if not all((directory / name).is_file() for name in names):
        if str(name_or_dir) not in OPENAI_MODELS:
            missing = f"it has no {' and '.join(names)}" if directory.is_dir() else "there is no such directory"
            known = ", ".join(OPENAI_MODELS)
            raise FileNotFoundError(f"{name_or_dir} is not a model: {missing}, nor is it one of {known}")
        directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt2" / name_or_dir
        if not (directory / "SHA256SUMS").exists():
            status(f"waiting for {directory}")
            with locked(directory, wait=True):
                for file in list_hub(f"models/openai-community/{name_or_dir}"):
                    if file.name in names:
                        download(file, directory / file.name)
                write_checksums(directory)
    if (directory / "SHA256SUMS").exists():
        check_checksums(directory, names)
    return directory


# Text into tokens

BATCH_CHARACTERS = 1 << 18  # the position in meta.json counts batches of this size


def read_texts(path: Path) -> Iterator[str]:
    """The documents of a file. Raises ValueError, with the place, for what is damaged or not valid Unicode."""
    name, line = path.name.lower(), 1
    try:
        if name.endswith(".parquet"):
            import pyarrow.parquet  # imported only where it is needed

            file = pyarrow.parquet.ParquetFile(path)
            texts = (text for rows in file.iter_batches(256, columns=["text"]) for text in rows["text"].to_pylist())
        elif name.endswith(".txt"):
            if path.stat().st_size > 1 << 30:
                raise ValueError("a .txt is one document, of at most 1 GiB; make it a .jsonl, a document a line")
            texts = [path.read_bytes().decode()]
        else:
            file = gzip.open(path) if name.endswith(".gz") else open(path, "rb")
            texts = (read_object(row, "it").get("text", 0) if row.strip() else None for row in file)
        for text in texts:
            if not isinstance(text, str | None):
                raise ValueError('it has no string under "text"')
            (text or "").encode()  # JSON can spell half a character
            yield text or ""
            line += 1
    except (ModuleNotFoundError, MemoryError):
        raise
    except Exception as error:  # of the file system, zlib, JSON, pyarrow, ...
        where = f", line {line:,}," if ".jsonl" in name else ""
        raise ValueError(f"{path}{where} cannot be read: {error}") from error


def read_batches(path: Path) -> Iterator[list[str]]:
    """The documents of a file that are neither empty nor null, at least BATCH_CHARACTERS at a time."""
    batch, length = [], 0
    for text in filter(None, read_texts(path)):
        batch.append(text)
        length += len(text)
        if length >= BATCH_CHARACTERS:
            yield batch
            batch, length = [], 0
    yield batch


def tokenize(texts: list[str], tokenizer: tiktoken.Encoding) -> np.ndarray:
    """
    The tokens of documents, (n,) uint16, each preceded by an <|endoftext|>; one within a text is ordinary text.

    White space of several 100,000 characters would overflow the stack of tiktoken's regular expressions, so long texts
    are cut before the last character of every long stretch of it. GPT-2's pattern takes all but that character as one
    match, and no token reaches over two matches: the tokens remain those of the whole.
    """
    space = r"[^\S\x1c-\x1f]{1000,}"  # \x1c to \x1f are white space for Python, and not for Rust
    pieces = [[]]
    for text in texts:
        pieces.append([tokenizer.eot_token])
        ends = [match.end() for match in re.finditer(space, text)] if len(text) > 100_000 else []
        cuts = [end - 1 for end in ends if end < len(text)]  # the white space that ends a text is one match in any case
        for start, end in itertools.pairwise([0, *cuts, len(text)]):
            pieces.append(tokenizer.encode_to_numpy(text[start:end], disallowed_special=()))
    return np.concatenate(pieces, dtype=np.uint16, casting="unsafe")


def tokenize_in_order(
    files: list[RawFile], place: list[int], work: Path, tokenizer: tiktoken.Encoding, workers: int
) -> Iterator[tuple[list[int], np.ndarray]]:
    """
    The tokens of files, a batch of documents at a time, in order, each with its place: [index of the file, index of the
    batch in it]. It begins at `place`. Threads tokenize a few batches ahead (tiktoken does its work outside of Python's
    lock), and one fetches the next file, to `work`.
    """
    waiting = threading.Event()  # for a file

    def fetch(file: RawFile) -> Path:
        return download(file, work / Path(file.name).name, waiting.is_set)

    def batches() -> Iterator[tuple[list[int], list[str]]]:
        paths = in_background(fetch, files[place[0] :], 1, 1)
        for index in range(place[0], len(files)):
            waiting.set()
            path = next(paths)
            waiting.clear()
            yield from (([index, i], texts) for i, texts in enumerate(read_batches(path)) if [index, i] >= place)

    yield from in_background(lambda batch: (batch[0], tokenize(batch[1], tokenizer)), batches(), workers, 2 * workers)


# Shards


def read_header(path: Path) -> int:
    """The number of tokens in a shard. Raises ValueError if it is not a whole one."""
    with open(path, "rb") as file:
        magic, version, tokens = np.frombuffer(file.read(12).ljust(12, b"\0"), dtype="<i4").tolist()
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
        raise ValueError(f"{path} is not a token shard (its header is not that of llm.c's version {SHARD_VERSION})")
    size, expected = path.stat().st_size, HEADER_BYTES + 2 * tokens
    if tokens < 1 or size != expected:
        raise ValueError(f"{path} is damaged: it has {size} bytes and should have {expected}")
    return tokens


class Split(NamedTuple):
    """The shards of a split, cut into sequences of T + 1 tokens, the last of which begins the next sequence. What is
    left at the end of a shard, less than a sequence, is not used."""

    paths: list[Path]
    tokens: list[int]  # in each shard
    sha256: list[str]  # of each shard
    first: np.ndarray  # (shards + 1,) int64: the index of each shard's first sequence, and the number of all
    sequence_length: int  # T
    vocab_size: int


def read_meta(directory: Path) -> dict:
    """What a data directory says of itself: at least "tokenizer" and "vocab_size". Shards without a meta.json are other
    programs', with GPT-2's tokens. Raises FileNotFoundError when it is not there, ValueError when it is not ready."""
    path = directory / "meta.json"
    if not directory.is_dir():
        source = f"--source {directory.name}" if directory.name in SOURCES else f"--input YOUR_TEXT --out {directory}"
        raise FileNotFoundError(f"there is no {directory}; make it with: python prepare_data.py {source}")
    if not path.exists():
        return {"tokenizer": "gpt2", "vocab_size": VOCAB_SIZES["gpt2"]}
    meta = read_json(path)
    if not meta["complete"]:
        raise ValueError(f"{directory} is only partly prepared; run the same prepare_data.py command again")
    if VOCAB_SIZES.get(str(meta.get("tokenizer"))) != meta.get("vocab_size"):
        raise ValueError(f"{path} is damaged: its tokenizer and vocab_size do not belong together")
    return meta


def find_shards(directory: Path, name: str) -> tuple[list[Path], list[str]]:
    """The shards `*name_*.bin`, or llm.c's `*_name.bin`, and the sha256 of each. Raises FileNotFoundError when there
    are none, ValueError when they are not those of meta.json."""
    promised = read_meta(directory).get(name, {}).get("sha256")
    paths = sorted(directory.glob(f"*{name}_*.bin")) or sorted(directory.glob(f"*_{name}.bin"))
    if not paths and not promised:
        raise FileNotFoundError(f"{directory} has no {name}_*.bin; run prepare_data.py, or give another --data")
    sha256 = [sha256_of(path) for path in paths]
    for path, one, other in itertools.zip_longest(paths, sha256, promised or sha256):
        if one != other:
            problem = "is damaged" if path else f"has lost a {name} shard"
            raise ValueError(f"{path or directory} {problem}: it is not what meta.json says; prepare it elsewhere")
    return paths, sha256


def open_split(directory: Path, name: str, sequence_length: int) -> Split:
    """Check the shards of a split, "train" or "val". Raises FileNotFoundError when there are none, ValueError when they
    are damaged or too small."""
    paths, sha256 = find_shards(directory, name)
    tokens = [read_header(path) for path in paths]
    first = np.cumsum([0] + [(count - 1) // sequence_length for count in tokens], dtype=np.int64)
    if first[-1] == 0:
        kind = {"val": "validation", "train": "training"}[name]
        raise ValueError(f"{directory} has too little {kind} data for {sequence_length:,}-token sequences")
    return Split(paths, tokens, sha256, first, sequence_length, read_meta(directory)["vocab_size"])


def read_sequences(split: Split, indices: np.ndarray) -> np.ndarray:
    """The sequences with these indices: (n, T + 1) int64. Raises ValueError for what cannot be in a whole shard of this
    vocabulary."""
    T = split.sequence_length
    sequences = np.empty((len(indices), T + 1), dtype=np.int64)
    for row, index in enumerate(indices):
        shard = int(np.searchsorted(split.first, index, side="right")) - 1
        # A plain read: pages of a memory map would count as memory of this process, and pile up over an epoch.
        with open(split.paths[shard], "rb", buffering=0) as file:
            file.seek(HEADER_BYTES + 2 * T * int(index - split.first[shard]))
            tokens = np.frombuffer(file.read(2 * (T + 1)), dtype="<u2")
        if len(tokens) <= T:
            raise ValueError(f"{split.paths[shard]} has become shorter while it was in use")
        if (largest := tokens.max()) >= split.vocab_size:
            raise ValueError(f"{split.paths[shard]} holds token {largest}; the vocabulary has {split.vocab_size}")
        sequences[row] = tokens
    return sequences


# Corpora and evaluation sets

FILES = {
    "shakespeare": RawFile(
        "shakespeare.txt",
        1_115_394,
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    ),
    "hellaswag": RawFile(
        "hellaswag_val.jsonl",
        12_246_618,
        "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
        "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
    ),
    "lambada": RawFile(
        "lambada_test.jsonl",
        1_819_752,
        "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
        "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
    ),
}
EVALUATION_SETS = ("hellaswag", "lambada")
SOURCES = (*HUB_DATASETS, "shakespeare", "demo", *EVALUATION_SETS)


def local_file(path: Path) -> RawFile:
    """A file of the user's. Raises FileNotFoundError or ValueError for one that cannot be read as text."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; of a directory, give the files: --input DIRECTORY/*")
    if not path.name.lower().endswith(FORMATS):
        raise ValueError(f"{path}: the format is not known; give {', '.join(FORMATS)}")
    return RawFile(str(path), path.stat().st_size, sha256_of(path))


def demo_file(path: Path) -> RawFile:
    """The topics of Python's own manual, which ships with CPython, one JSON line each."""
    from pydoc_data.topics import topics

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics)), encoding="utf-8")
    return local_file(path)


def list_corpus(settings: dict) -> list[RawFile]:
    """The Parquet files of `sample-10BT`, another sample, or a dump such as `CC-MAIN-2024-10`: those that are needed
    for max_tokens. Raises OSError."""
    subset, most = settings["subset"], settings["max_tokens"] or sys.maxsize
    folder = subset.replace("sample-", "/sample/") if subset.startswith("sample-") else f"/data/{subset}"
    files = [f for f in list_hub(f"datasets/{HUB_DATASETS[settings['source']]}", folder) if f.name.endswith(".parquet")]
    if not files:
        raise OSError(f"the hub lists no Parquet files for subset {subset} of {settings['source']}")
    before = itertools.accumulate((file.size for file in files), initial=0)
    return [file for file, size in zip(files, before, strict=False) if 0.2 * size < most]  # a byte has 0.3 tokens


def next_shard(meta: dict) -> tuple[str, int]:
    """The split that the next token belongs to, and the tokens that its next shard can hold: 0 for no more shards."""
    val, train, size = meta["val"]["tokens"], meta["train"]["tokens"], meta["shard_tokens"]
    if val < meta["val_tokens"]:
        return "val", min(size, meta["val_tokens"] - val)
    return "train", min(size, (meta["max_tokens"] or sys.maxsize) - val - train)


def add_shard(out: Path, meta: dict, pieces: list[np.ndarray], split: str, position: list[int]) -> None:
    """Write a shard, then meta.json: what the split now holds, and `position`, the first token that is in no shard yet,
    as [file, batch in it, token in that]."""
    tokenizer, before, total = get_tokenizer(meta["tokenizer"]), meta[split], sum(map(len, pieces))
    path = out / f"{split}_{len(before['sha256']):06d}.bin"
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, total
    write_atomically(path, [header, *(np.ascontiguousarray(piece, dtype="<u2") for piece in pieces)])
    counts = sum(np.bincount(piece, minlength=tokenizer.n_vocab) for piece in pieces)  # of each token
    meta["position"] = position
    meta[split] = {
        "documents": before["documents"] + int(counts[tokenizer.eot_token]),
        "tokens": before["tokens"] + total,
        "bytes": before["bytes"] + int(counts @ token_bytes(tokenizer)),
        "sha256": [*before["sha256"], sha256_of(path)],
    }
    write_json(out / "meta.json", meta)
    say(f"{path}: {total:,} tokens")


def open_meta(settings: dict, files: list[RawFile], out: Path) -> dict:
    """The meta.json of an earlier run with these settings, or a new one. Raises ValueError or FileExistsError if the
    directory holds other shards."""
    path, start = out / "meta.json", [0, 0, 0]
    meta = read_json(path) if path.exists() else {}
    if meta and meta.get("position") != start:
        changed = [f"{name} was {meta.get(name)}, now {now}" for name, now in settings.items() if meta.get(name) != now]
        if changed:
            raise ValueError(f"{out} was prepared with other settings: {'; '.join(changed)}; give another --out")
        return meta
    if not meta and any(out.glob("*.bin")):
        raise FileExistsError(f"{out} holds shards that were not prepared by this script; give another --out")
    empty = {"documents": 0, "tokens": 0, "bytes": 0, "sha256": []}
    meta = settings | {"vocab_size": VOCAB_SIZES[settings["tokenizer"]], "train": empty, "val": empty}
    meta |= {"complete": False, "position": start, "files": files or list_corpus(settings)}  # a hub may change
    write_json(path, meta)
    return meta


def prepare(settings: dict, files: list[RawFile], out: Path, workers: int) -> dict:
    """Prepare `out` as `settings` say, or continue that; returns the content of its meta.json."""
    tokenizer, work = get_tokenizer(settings["tokenizer"]), out / ".work"
    meta = open_meta(settings, files, out)
    if meta["complete"]:
        shutil.rmtree(work, ignore_errors=True)
        for name in ("val", "train"):
            find_shards(out, name)
        say(f"{out} is already prepared")
        return meta
    files = files or [RawFile(*file) for file in meta["files"]]
    *start, skip = meta["position"]
    pieces, (split, room), done, began = [], next_shard(meta), 0, time.monotonic()
    for place, tokens in tokenize_in_order(files, start, work, tokenizer, workers):
        used = skip if place == start else 0
        while used < len(tokens) and room:
            pieces.append(tokens[used : used + room])
            used, room, done = used + len(pieces[-1]), room - len(pieces[-1]), done + len(pieces[-1])
            if room == 0:
                add_shard(out, meta, pieces, split, [*place, used])
                pieces, (split, room) = [], next_shard(meta)
                for file in files[: place[0]]:  # all of whose tokens are in shards
                    (work / Path(file.name).name).unlink(missing_ok=True)
        rate = done / (time.monotonic() - began)
        status(f"file {place[0] + 1} of {len(files)}: {done / 1e6:,.1f}M tokens, {rate:,.0f} tokens/s")
        if room == 0:
            break
    if pieces:
        add_shard(out, meta, pieces, split, [len(files), 0, 0])
    if meta["train"]["tokens"] == 0:
        names, total = ", ".join(file.name for file in files), meta["val"]["tokens"]
        advice = f"all {total:,} tokens are for validation; give a lower --val-tokens and another --out"
        raise ValueError(f"there is no text to train on in {names}: {advice if total else 'it is empty'}")
    if changed := [file.name for file in files if not file.url and sha256_of(Path(file.name)) != file.sha256]:
        raise ValueError(f"{changed[0]} has changed while it was being read; prepare it again, to another --out")
    meta["complete"] = True
    write_json(out / "meta.json", meta)
    shutil.rmtree(work, ignore_errors=True)
    return meta


# The command line


def prepare_source(source: str | None, args: argparse.Namespace) -> None:
    """Prepare one source in a directory of its own; None means the files of --input."""
    out = Path(args.out or f"data/{source or Path(args.input[0]).name.split('.')[0] or 'text'}")
    with locked(out):
        if source in EVALUATION_SETS:
            say(f"{source}: {download(FILES[source], out / FILES[source].name)}")
            return write_checksums(out)
        files = [local_file(Path(path)) for path in args.input or []]
        if source == "demo":
            files = [demo_file(out / ".work" / "demo.jsonl")]
        elif source == "shakespeare":
            files = [FILES[source]]
        tokenizer, most = args.tokenizer or ("byte" if source == "demo" else "gpt2"), args.max_tokens or sys.maxsize
        size = sum(file.size for file in files) or sys.maxsize  # of the hub's corpora, which are larger than needed
        expected = min(most, size // (1 if tokenizer == "byte" else 4))
        val_tokens = args.val_tokens or max(1, min(10**8, expected // 10))
        if val_tokens >= most:
            raise ValueError(f"--val-tokens {val_tokens:,} must be less than --max-tokens {most:,}")
        settings = {
            "source": [[Path(file.name).name, file.size, file.sha256] for file in files] if args.input else source,
            "subset": args.subset if source in HUB_DATASETS else None,
            "tokenizer": tokenizer,
            "shard_tokens": args.shard_tokens,
            "val_tokens": val_tokens,
            "max_tokens": args.max_tokens,
        }  # which decide every byte of the result
        meta = prepare(settings, files, out, args.workers)
    for split in ("val", "train"):
        say(f"{split}: {meta[split]['tokens']:,} tokens in {out}/{split}_*.bin")
    preset = "demo" if source == "demo" else "small" if meta["train"]["tokens"] < 10**7 else "gpt2"
    say(f"train on it with: python train.py --preset {preset} --data {shlex.quote(str(out))}")


def main(argv: list[str] | None = None) -> None:
    about = "Prepare token shards for train.py. With no options: FineWeb-Edu 10B, HellaSwag and LAMBADA."
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, allow_abbrev=False, description=about)
    amount, shard = number(int, 1, 10**15), number(int, 1, 2**31 - 1)
    subset = "of FineWeb: sample-10BT, sample-100BT, sample-350BT, or a dump (default: sample-10BT)"
    origin = parser.add_mutually_exclusive_group()
    origin.add_argument("--source", choices=SOURCES, help="(default: fineweb-edu)")
    origin.add_argument("--input", nargs="+", metavar="FILE", help="your own text: " + ", ".join(FORMATS))
    parser.add_argument("--subset", default="sample-10BT", help=subset)
    parser.add_argument("--out", help="directory for the shards (default: data/NAME, after the source)")
    parser.add_argument("--tokenizer", choices=VOCAB_SIZES, help="(default: gpt2; byte for the demo)")
    parser.add_argument("--shard-tokens", type=shard, default=10**8, help="tokens in a shard (default: 100M)")
    parser.add_argument("--val-tokens", type=amount, help="for validation (default: 100M; a tenth of a smaller text)")
    parser.add_argument("--max-tokens", type=amount, help="stop after this many, validation included (default: all)")
    parser.add_argument("--workers", type=number(int, 1, 1024), default=os.cpu_count(), help="(default: one per core)")
    args = parser.parse_args(argv)
    sources = [args.source] if args.input or args.source else [*EVALUATION_SETS, "fineweb-edu"]
    if args.out == "":
        parser.error("--out must name a directory")
    with one_line_errors("prepare_data.py", "take fewer --workers"):
        for source in sources[-1:] if args.out else sources:
            prepare_source(source, args)


if __name__ == "__main__":
    run(main)
