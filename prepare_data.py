"""
Download text and turn it into token shards in `data/NAME`; also fetch evaluation sets and OpenAI's weights.

    python prepare_data.py                                    # FineWeb-Edu, 10B tokens, and the evaluation sets
    python prepare_data.py --source demo                      # Python's own manual, without network: data/demo
    python prepare_data.py --input corpus.jsonl --out data/mine

The corpus is one stream of tokens, each document preceded by <|endoftext|>: the first --val-tokens for validation, the
rest for training, both cut into shards `val_000000.bin`, `train_000000.bin`, ... A shard is llm.c's: 256 int32 as its
header (20240520, 1, the number of tokens, zeros), then uint16 tokens, little endian. `meta.json` says what each split
contains and how far the shards reach; `SHA256SUMS` covers the shards, and meta.json once the directory is complete.
"""

import argparse
import fcntl
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
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any, NamedTuple

try:
    import numpy as np
    import requests
    import tiktoken
    from urllib3.exceptions import HTTPError
    from urllib3.util import Retry
except ImportError as error:
    sys.exit(f"prepare_data.py: error: {error}; pip install -r requirements.txt")

HUB_DATASETS = {"fineweb-edu": "HuggingFaceFW/fineweb-edu", "fineweb": "HuggingFaceFW/fineweb"}
OPENAI_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
MODEL_FILES = ("model.safetensors", "config.json")
VOCAB_SIZES = {"gpt2": 50257, "byte": 257}  # of the tokenizers
FORMATS = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 1024
COUNTS = ("shards", "documents", "tokens", "bytes")  # of each split, in meta.json

# Tokenizers


# GPT-2's pattern with all but the lookahead in one group, which tiktoken's regular expressions match much faster.
GPT2_PATTERN = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+$)|\s+(?!\S)|\s"


@cache
def get_tokenizer(name: str, thread: int = 0) -> tiktoken.Encoding:
    """The tokenizer "gpt2", fetched once, or "byte": the 256 bytes of UTF-8, and <|endoftext|>. Threads that shared one
    would wait for its scratch memory, so each asks for its own. Raises OSError."""
    if name == "byte":
        pattern, ranks, special = r"(?s:.{1,512})", {bytes([i]): i for i in range(256)}, {"<|endoftext|>": 256}
    else:
        status("loading GPT-2's tokenizer")
        with fetching(
            "GPT-2's tokenizer", "connect to the Internet, or set TIKTOKEN_CACHE_DIR to a cache that contains it"
        ):
            published = begin(tiktoken.get_encoding, name).result(timeout=120)  # tiktoken has no timeout of its own
        pattern, ranks, special = GPT2_PATTERN, published._mergeable_ranks, published._special_tokens
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


@cache
def token_bytes(tokenizer: tiktoken.Encoding) -> np.ndarray:
    """How many bytes of UTF-8 each token stands for: (vocab_size,) uint16, 0 for <|endoftext|>."""
    sizes = [len(tokenizer.decode_single_token_bytes(token)) for token in range(tokenizer.n_vocab)]
    sizes[tokenizer.eot_token] = 0
    return np.array(sizes, dtype=np.uint16)


# Documents

BATCH_CHARACTERS = 1 << 18  # the position in meta.json counts batches of this size
MOST_BYTES = 1 << 30  # of a document, which is held in memory


def read_parquet(path: Path) -> Iterator[Any]:
    """The column "text" of a Parquet file."""
    import pyarrow.parquet  # imported only where it is needed

    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(16, columns=["text"]):
        yield from batch["text"].to_pylist()


def read_texts(path: Path) -> Iterator[str]:
    """The documents of a file. Raises ValueError, naming the line, for a damaged, non-Unicode or oversized one."""
    name, line, too_large = path.name.lower(), 1, f"a document may be at most {MOST_BYTES:,} bytes"

    def parse(row: bytes) -> Any:
        if len(row) > MOST_BYTES:
            raise ValueError(too_large)
        if name.endswith(".txt"):
            return row.decode()
        return read_object(row, "it").get("text", 0) if row.strip() else None  # a blank line is no document

    try:
        if name.endswith(".parquet"):
            texts = read_parquet(path)
        else:
            file = gzip.open(path) if name.endswith(".gz") else open(path, "rb")
            read = file.read if name.endswith(".txt") else file.readline
            texts = map(parse, iter(lambda: read(MOST_BYTES + 1), b""))
        for text in texts:
            if not isinstance(text, str | None):
                raise ValueError('each document must have a string called "text"')
            if len((text or "").encode()) > MOST_BYTES:  # or this fails: JSON can spell half a character
                raise ValueError(too_large)
            yield text or ""
            line += 1
    except Exception as error:  # of the file system, zlib, JSON, pyarrow, ...
        where = f", line {line:,}," if ".jsonl" in name else ""
        raise ValueError(f"{path}{where} cannot be read: {str(error) or type(error).__name__}") from error


def read_batches(path: Path) -> Iterator[list[str]]:
    """The documents of a file that are neither empty nor null, in batches of at least BATCH_CHARACTERS."""
    batch, length = [], 0
    for text in filter(None, read_texts(path)):
        batch.append(text)
        length += len(text)
        if length >= BATCH_CHARACTERS:
            yield batch
            batch, length = [], 0
    yield batch


def tokenize(texts: list[str], tokenizer: tiktoken.Encoding) -> np.ndarray:
    """The tokens of documents, (n,) uint16, each preceded by <|endoftext|>; within a document that is ordinary text.
    tiktoken's regular expression overflows its stack on a few hundred thousand spaces in a row, so long texts are cut
    before the last character of each long run. GPT-2's pattern splits there anyway: the tokens stay the same."""
    space = r"[^\S\x1c-\x1f]"  # \x1c to \x1f are white space for Python, and not for Rust
    run = rf"(?<!{space}){space}{{1000,}}+(?=.)"  # but not at the end of a text
    pieces = [[]]
    for text in texts:
        cuts = [match.end() - 1 for match in re.finditer(run, text, re.DOTALL)] if len(text) > 100_000 else []
        pieces.append([tokenizer.eot_token])
        for start, end in itertools.pairwise([0, *cuts, len(text)]):
            pieces.append(tokenizer.encode_to_numpy(text[start:end], disallowed_special=()))
    return np.concatenate(pieces, dtype=np.uint16, casting="unsafe")


# Downloads


class RawFile(NamedTuple):
    """A file to read: downloaded from `url`, or local if that is empty. Size in bytes; sha256 in hex, "" if unknown."""

    name: str
    size: int
    sha256: str = ""
    url: str = ""


def hub_address() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def get(url: str, first: int = 0) -> requests.Response:
    """Request a page, or a file from byte `first` on, with HF_TOKEN for the hub alone. Raises RequestException."""
    on_status = {"status_forcelist": (408, 429, 500, 502, 503, 504), "raise_on_status": False}
    retries = Retry(8, connect=2, read=2, backoff_factor=1, backoff_max=60, retry_after_max=60, **on_status)
    session = requests.Session()
    session.mount("http://", requests.adapters.HTTPAdapter(max_retries=retries))
    session.mount("https://", requests.adapters.HTTPAdapter(max_retries=retries))
    session.auth = lambda request: request  # or requests would replace the token with .netrc's
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={first}-"} if first else {})
    token = os.environ.get("HF_TOKEN", "").strip()
    if token and url.startswith(hub_address() + "/"):
        if not re.fullmatch("[!-~]+", token):
            raise ValueError("HF_TOKEN contains characters that no token has; copy it again")
        headers["Authorization"] = f"Bearer {token}"
    response = session.get(url, headers=headers, stream=True, timeout=(10, 30))
    if response.status_code not in (200, 206):
        raise requests.HTTPError(response=response)
    return response


@contextmanager
def fetching(name: str, advice: str = "run the same command again to continue") -> Iterator[None]:
    """Turn any failure of a request into an OSError that says what to do."""
    try:
        yield
    except (requests.RequestException, HTTPError, TimeoutError) as error:
        code = error.response.status_code if isinstance(error, requests.HTTPError) else 0
        if code in (401, 403):
            advice = "set HF_TOKEN to a token with access"
        elif 400 <= code < 500 and code not in (408, 429):
            advice = "check --subset and HF_ENDPOINT, if you set them"
        problem = f"the server answered {code}" if code else type(error).__name__
        raise OSError(f"{name} could not be fetched: {problem}; {advice}") from error


def list_hub(repository: str, folder: str = "") -> list[RawFile]:
    """List a folder of `datasets/OWNER/NAME` or `models/OWNER/NAME` on the hub. Raises OSError or ValueError."""
    name, pages, files = f"list of {repository}{folder}", [], []
    url = f"{hub_address()}/api/{repository}/tree/main{folder}"
    base = f"{hub_address()}/{repository.removeprefix('models/')}/resolve/main"
    status(f"fetching the {name}")
    while url:
        if len(pages) == 100:
            raise OSError(f"the {name} never ends; does HF_ENDPOINT point to a hub?")
        with fetching(f"the {name}"), get(url) as response:
            pages.append(begin(response.raw.read, 1 << 22).result(timeout=60))
            url = response.links.get("next", {}).get("url")
    with reading(name):
        for entry in itertools.chain(*map(json.loads, pages)):
            path, sha256 = str(entry["path"]), str((entry.get("lfs") or {}).get("oid", ""))
            files.append(RawFile(path, int(entry["size"]), sha256, f"{base}/{path}"))
    return sorted(set(files))


def receive(file: RawFile, out: IO[bytes]) -> None:
    """Append what `out` lacks; a server that ignores ranges sends the whole file again."""
    with get(file.url, out.tell()) as response:
        if response.status_code != 206:
            out.truncate(0)
        while (have := out.seek(0, os.SEEK_END)) < file.size and (piece := response.raw.read1(1 << 20)):
            out.write(piece)  # whatever has arrived
            status(f"fetching {file.name}: {have / 1e6:,.0f} of {file.size / 1e6:,.0f} MB")
    if have < file.size:
        raise requests.ConnectionError("the server closed the connection early")


def download(file: RawFile, path: Path) -> Path:
    """Fetch a file to `path` by way of `path`.part, which an earlier attempt may have left; give up after 8 attempts
    without progress. A local file, or one already there with the right sha256, is not fetched. Raises OSError."""
    if not file.url:
        return Path(file.name)
    if file.sha256 and path.is_file() and sha256_of(path) == file.sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    descriptor = os.open(part, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    with fetching(file.name), open(descriptor, "ab") as out:
        furthest, failures = out.tell(), 0
        while out.tell() < file.size:
            try:
                receive(file, out)
            except (requests.RequestException, HTTPError) as error:
                failures = 0 if out.tell() > furthest else failures + 1
                furthest = max(furthest, out.tell())
                if failures == 8 or isinstance(error, requests.HTTPError):  # the server refuses
                    raise
                status(f"fetching {file.name}: {type(error).__name__}; trying again")
                time.sleep(min(60.0, 2.0**failures - 1))
    if part.stat().st_size != file.size or file.sha256 not in ("", sha256_of(part)):
        part.unlink()
        raise OSError(f"{file.name}: the download has the wrong size or sha256; run the same command again")
    part.replace(path)
    return path


def model_directory(name_or_dir: str | Path) -> Path:
    """The directory of a model, given by path or by OpenAI's name; a name is fetched on first use, by one process for
    all. Raises FileNotFoundError if there is no such model, ValueError if damaged, OSError if not fetched."""
    directory = Path(name_or_dir)
    if all((directory / name).exists() for name in MODEL_FILES):
        if any((directory / name).exists() for name in ("SHA256SUMS", "trainer.pt")):  # a checkpoint has checksums
            check_checksums(directory, MODEL_FILES)
        return directory
    if str(name_or_dir) not in OPENAI_MODELS:
        neither = f"neither a directory with {' and '.join(MODEL_FILES)} nor one of {', '.join(OPENAI_MODELS)}"
        raise FileNotFoundError(f"{name_or_dir} is not a model: {neither}")
    directory = Path("data/models") / name_or_dir
    with suppress(OSError, ValueError):
        check_checksums(directory, MODEL_FILES)
        return directory
    with locked(directory, wait=True):  # download() skips what another process has fetched meanwhile
        files = {file.name: file for file in list_hub(f"models/openai-community/{name_or_dir}")}
        if not files.keys() >= set(MODEL_FILES):
            raise OSError(f"the hub lists no {' and '.join(MODEL_FILES)} for {name_or_dir}; check HF_ENDPOINT")
        for name in MODEL_FILES:
            download(files[name], directory / name)
        add_checksums(directory, MODEL_FILES)
    return directory


def tokenize_in_order(
    files: list[RawFile], paths: list[Path], place: list[int], tokenizer: str, workers: int
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield (place, tokens) for each batch of documents, in order, from `place` = [file, batch] on. Threads tokenize
    ahead (tiktoken releases the GIL) while one downloads the next file, to its path."""

    def fetch(index: int) -> Future | None:
        return begin(download, files[index], paths[index]) if index < len(files) else None

    def batches() -> Iterator[tuple[list[int], list[str]]]:
        ahead = fetch(place[0])
        for index in range(place[0], len(files)):
            path, ahead = ahead.result(), fetch(index + 1)
            yield from (([index, i], texts) for i, texts in enumerate(read_batches(path)) if [index, i] >= place)

    def tokenize_batch(batch: tuple[list[int], list[str]]) -> tuple[list[int], np.ndarray]:
        return batch[0], tokenize(batch[1], get_tokenizer(tokenizer, threading.get_ident()))

    yield from in_background(tokenize_batch, batches(), workers, 2 * workers)


# Shards


def read_header(path: Path) -> int:
    """The number of tokens in a shard. Raises ValueError if it is not a whole one."""
    if not path.is_file():
        raise ValueError(f"{path} is missing, or not a regular file")
    with open(path, "rb") as file:
        magic, version, tokens = np.frombuffer(file.read(12).ljust(12, b"\0"), dtype="<i4").tolist()
    size = path.stat().st_size
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION) or tokens < 1 or size != HEADER_BYTES + 2 * tokens:
        raise ValueError(
            f"{path} is damaged, empty, or no token shard: {tokens:,} tokens by its header, {size:,} bytes"
        )
    return tokens


class Split(NamedTuple):
    """A split's shards, cut into sequences of T + 1 tokens, of which neighbors share one; what is left is not used."""

    paths: list[Path]
    tokens: list[int]  # in each shard
    first: np.ndarray  # (shards + 1,) int64: the index of each shard's first sequence, and the number of all
    sequence_length: int  # T
    vocab_size: int

    @property
    def sequences(self) -> int:
        return int(self.first[-1])


def read_meta(directory: Path) -> dict:
    """A data directory's meta.json, with at least "tokenizer" and "vocab_size". Shards without one are taken to be
    another program's, with GPT-2's tokens. Raises ValueError for incomplete or damaged data."""
    path = directory / "meta.json"
    listed = path.name in read_checksums(directory)  # only once the directory is complete
    if not listed and not path.exists():
        return {"tokenizer": "gpt2", "vocab_size": VOCAB_SIZES["gpt2"]}
    if not listed:
        older = "or, if an older version has finished it, sha256sum meta.json *.bin > SHA256SUMS there"
        raise ValueError(f"{directory} is incomplete; run the same prepare_data.py command again, {older}")
    check_checksums(directory, [path.name])
    meta = read_object(path.read_bytes(), path)
    with reading(path):
        return meta | {"vocab_size": VOCAB_SIZES[meta["tokenizer"]]}


def open_split(directory: Path, name: str, sequence_length: int) -> Split:
    """Read the headers of a split's shards, `*name_*.bin` or llm.c's `*_name.bin`; the split is "train" or "val".
    Raises ValueError."""
    paths = sorted(directory.glob(f"*{name}_*.bin")) or sorted(directory.glob(f"*_{name}.bin"))
    listed, found = read_checksums(directory), {path.name for path in paths}
    if listed and (odd := found - listed.keys() | {file for file in listed if file.startswith(f"{name}_")} - found):
        raise ValueError(f"{directory / min(odd)} is missing, or not in SHA256SUMS; prepare the data again elsewhere")
    tokens = [read_header(path) for path in paths]
    first = np.cumsum([0] + [(count - 1) // sequence_length for count in tokens], dtype=np.int64)
    if first[-1] == 0:
        advice = "run prepare_data.py, choose another --data, or use a shorter --sequence-length"
        raise ValueError(f"{directory} has no {name} shards, or too few tokens in them; {advice}")
    return Split(paths, tokens, first, sequence_length, read_meta(directory)["vocab_size"])


def read_sequences(split: Split, indices: np.ndarray) -> np.ndarray:
    """The sequences with these indices: (n, T + 1) int64. Raises ValueError for a truncated or foreign shard."""
    T = split.sequence_length
    sequences = np.empty((len(indices), T + 1), dtype=np.int64)
    for row, index in enumerate(indices):
        shard = int(np.searchsorted(split.first, index, side="right")) - 1
        path, start = split.paths[shard], HEADER_BYTES + 2 * T * int(index - split.first[shard])
        # Not a memory map, whose pages would count as memory of this process and pile up over an epoch.
        tokens = np.fromfile(path, dtype="<u2", count=T + 1, offset=start)
        if len(tokens) <= T:
            raise ValueError(f"{path} was truncated while in use")
        if (largest := tokens.max()) >= split.vocab_size:
            raise ValueError(f"{path} contains token {largest}, but the vocabulary has {split.vocab_size} tokens")
        sequences[row] = tokens
    return sequences


# Corpora and evaluation sets

FILES = {  # name, size in bytes, sha256, address
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


def local_file(path: Path) -> RawFile:
    """A file of the user's. Raises FileNotFoundError or ValueError for one that cannot be read as text."""
    if not path.is_file() or not path.name.lower().endswith(FORMATS):
        raise FileNotFoundError(f"{path} is not a file of a known format ({', '.join(FORMATS)})")
    return RawFile(str(path), path.stat().st_size, sha256_of(path))


def list_corpus(settings: dict) -> list[RawFile]:
    """The Parquet files of a sample or a dump of FineWeb, as many as max_tokens needs. Raises OSError."""
    subset, most = settings["subset"], settings["max_tokens"] or sys.maxsize
    folder = subset.replace("sample-", "/sample/") if subset.startswith("sample-") else f"/data/{subset}"
    files = [f for f in list_hub(f"datasets/{HUB_DATASETS[settings['source']]}", folder) if f.name.endswith(".parquet")]
    if not files:
        raise OSError(f"the hub lists no Parquet files for {settings['source']}'s {subset}; check --subset")
    before = itertools.accumulate((file.size for file in files), initial=0)
    # A byte of Parquet holds about 0.3 tokens; 0.2 leaves a margin.
    return [file for file, size in zip(files, before, strict=False) if 0.2 * size < most]


def next_shard(meta: dict) -> tuple[str, int]:
    """The split that the next token belongs to, and how many tokens its next shard may hold, 0 at max_tokens."""
    val, train, size = meta["val"]["tokens"], meta["train"]["tokens"], meta["shard_tokens"]
    if val < meta["val_tokens"]:
        return "val", min(size, meta["val_tokens"] - val)
    return "train", min(size, (meta["max_tokens"] or sys.maxsize) - val - train)


def add_shard(out: Path, meta: dict, pieces: list[np.ndarray], split: str, position: list[int]) -> None:
    """Write a shard, its checksum, then meta.json: what the split now holds, and `position`, the first token that is in
    no shard yet, as [file, batch in it, token in that]."""
    tokenizer, before, total = get_tokenizer(meta["tokenizer"]), meta[split], sum(map(len, pieces))
    path = out / f"{split}_{before['shards']:06d}.bin"
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, total
    write_atomically(path, [header, *(np.ascontiguousarray(piece, dtype="<u2") for piece in pieces)])
    uses = sum(np.bincount(piece, minlength=tokenizer.n_vocab) for piece in pieces)  # of each token
    new = (1, int(uses[tokenizer.eot_token]), total, int(uses @ token_bytes(tokenizer)))
    meta["position"] = position
    meta[split] = {name: before[name] + count for name, count in zip(COUNTS, new, strict=True)}
    add_checksums(out, [path.name])
    write_atomically(out / "meta.json", [json.dumps(meta, indent=2).encode() + b"\n"])
    say(f"{path}: {total:,} tokens")


def open_meta(settings: dict, files: list[RawFile], out: Path) -> dict:
    """The meta.json of an earlier run with these settings, or a new one. Raises ValueError or FileExistsError."""
    path, start = out / "meta.json", [0, 0, 0]
    if path.exists():
        check_checksums(out, read_checksums(out).keys() & {path.name})  # listed once the directory is complete
        meta = read_object(path.read_bytes(), path)
        with reading(f"{path}, perhaps from another version,"):
            for split in ("train", "val"):
                meta[split] = {name: int(meta[split][name]) for name in COUNTS}
            meta["files"] = [RawFile(str(n), int(size), str(sha), str(url)) for n, size, sha, url in meta["files"]]
            meta["position"] = [int(meta["position"][i]) for i in range(3)]
        changed = [f"{name} was {meta.get(name)}, now {now}" for name, now in settings.items() if meta.get(name) != now]
        if meta["position"] != start and changed:
            raise ValueError(f"{out} was prepared with different settings: {'; '.join(changed)}; choose another --out")
        if meta["position"] != start:
            return meta | settings
    elif any(out.glob("*.bin")):
        raise FileExistsError(f"{out} contains shards that this script did not write; choose another --out")
    meta = settings | {"vocab_size": VOCAB_SIZES[settings["tokenizer"]]}
    meta |= {split: dict.fromkeys(COUNTS, 0) for split in ("train", "val")}
    meta |= {"position": start, "files": files or list_corpus(settings)}  # kept, since the hub's listing may change
    write_atomically(out / "meta.json", [json.dumps(meta, indent=2).encode() + b"\n"])
    return meta


def prepare(settings: dict, files: list[RawFile], out: Path, workers: int) -> dict:
    """Prepare `out` according to `settings`, or continue an earlier run; return the content of its meta.json."""
    get_tokenizer(settings["tokenizer"])  # fail now if it cannot be fetched
    work, meta = out / ".work", open_meta(settings, files, out)
    if "meta.json" in read_checksums(out):  # added last: the preparation is complete
        discard(work)
        check_checksums(out, sorted(read_checksums(out).keys() | {path.name for path in out.glob("*.bin")}))
        say(f"{out} is already prepared")
        return meta
    if work.is_symlink():
        work.unlink()
    files = files or meta["files"]
    paths = [work / f"{i:06d}-{Path(file.name).name}" for i, file in enumerate(files)]  # base names may repeat
    *start, skip = meta["position"]
    pieces, (split, room), done, began = [], next_shard(meta), 0, time.time()
    for place, tokens in tokenize_in_order(files, paths, start, settings["tokenizer"], workers):
        used = skip if place == start else 0
        while used < len(tokens) and room:
            pieces.append(tokens[used : used + room])
            used, room = used + len(pieces[-1]), room - len(pieces[-1])
            if room == 0:
                add_shard(out, meta, pieces, split, [*place, used])
                pieces, (split, room) = [], next_shard(meta)
                for path in paths[: place[0]]:  # all of whose tokens are in shards
                    path.unlink(missing_ok=True)
        done += len(tokens)
        status(f"file {place[0] + 1} of {len(files)}: {done / 1e6:,.1f}M tokens, {done / (time.time() - began):,.0f}/s")
        if room == 0:
            break
    if pieces:
        add_shard(out, meta, pieces, split, [len(files), 0, 0])
    if meta["train"]["tokens"] == 0:
        advice = "choose a smaller --val-tokens and another --out"
        raise ValueError(f"{out} has no tokens to train on: all {meta['val']['tokens']:,} are for validation; {advice}")
    if changed := [file.name for file in files if not file.url and sha256_of(Path(file.name)) != file.sha256]:
        raise ValueError(f"{changed[0]} changed while it was being read; prepare it again with another --out")
    add_checksums(out, ["meta.json"])
    discard(work)
    return meta


# Shared by the scripts: the terminal and threads


@contextmanager
def one_line_errors(script: str, memory_advice: str) -> Iterator[None]:
    """Turn an error that the user can fix into one line and exit status 1, and Ctrl-C into exit status 130."""
    with suppress(AttributeError):  # a closed standard output, or a test's replacement
        sys.stdout.reconfigure(errors="replace")
    try:
        yield
    except KeyboardInterrupt:
        status("")
        sys.exit(130)
    except BrokenPipeError:  # the reader has closed the pipe
        sys.stdout = None  # or Python would flush it at exit, and fail again
        sys.exit(0)
    except (ValueError, OSError, FloatingPointError, MemoryError, ModuleNotFoundError, RuntimeError) as error:
        problem = printable(" ".join(str(error).split())) or type(error).__name__
        if isinstance(error, ModuleNotFoundError):
            problem += f"; pip install {error.name}"
        elif any(words in problem for words in ("MemoryError", "out of memory", "allocate memory", "start new thread")):
            problem = f"out of memory, or of threads; {memory_advice}"
        elif isinstance(error, RuntimeError):
            raise
        status("")
        sys.stderr.write(f"{script}: error: {problem}\n")  # in one write: other ranks may be writing too
        sys.exit(1)


def printable(text: str) -> str:
    """Escape control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


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


def number(kind: type, least: float, most: float) -> Callable[[str], Any]:
    """A parser of command-line values, int or float, in a range: 1000000, 100_000, 500k, 100M or 10B."""

    def parse(text: str) -> Any:
        scale = {"k": 10**3, "m": 10**6, "b": 10**9}.get(text[-1:].lower())
        with suppress(ValueError, OverflowError):
            if least <= (value := kind(float(text[:-1]) * scale) if scale else kind(text)) <= most:
                return value
        wanted = "an integer" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"must be {wanted} from {least:,} to {most:,}, not {text[:40]}")

    return parse


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


def in_background(function: Callable, items: Iterable[Any], threads: int, ahead: int) -> Iterator[Any]:
    """function(item) for each item, in order, computed by `threads` threads up to `ahead` items in advance."""
    pool, pending = ThreadPoolExecutor(threads), deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


# Shared by the scripts: files that are written whole, by one process, and checked when they are read


@contextmanager
def locked(directory: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a directory, created if need be, so that only one process writes to it. The lock ends with its
    process, however that ends. Raises BlockingIOError if another process holds it; with `wait`, waits for it."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise BlockingIOError(f"{directory} is in use by another process; wait, or choose another --out") from error
        except OSError as error:  # a network file system without locks
            say(f"warning: {directory} cannot be locked ({error}); make sure only one run writes to it", sys.stderr)
        yield


def discard(path: Path) -> None:
    """Remove whatever is at `path`, if anything; a link is removed, not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def synchronize(path: Path) -> None:
    """Wait until a file's content, or a directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_atomically(path: Path, pieces: Iterable[Any]) -> None:
    """Write bytes or arrays so that a crash at any moment leaves the old file or the new one."""
    part = path.with_name(path.name + ".tmp")
    discard(part)
    with open(part, "xb") as file:
        file.writelines(pieces)
    synchronize(part)
    part.replace(path)


@contextmanager
def reading(what: object) -> Iterator[None]:
    """Turn anything that goes wrong with a foreign file into a ValueError that names it."""
    try:
        yield
    except Exception as error:
        problem = f"it has no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise ValueError(f"{what} cannot be used: {problem}") from error


def read_object(text: str | bytes, where: object) -> dict:
    """A JSON object. Raises ValueError, naming where the text is from, for anything else."""
    with reading(where):
        if not isinstance(value := json.loads(text), dict):
            raise TypeError("it is not a JSON object")
        return value


def sha256_of(path: Path) -> str:
    status(f"sha256 of {path}")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_checksums(directory: Path) -> dict[str, str]:
    """The sha256 of each file that `SHA256SUMS` lists, by its name; {} without the file."""
    path = directory / "SHA256SUMS"
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines) if name}


def add_checksums(directory: Path, names: Iterable[str]) -> None:
    """Add files to `SHA256SUMS`, which `sha256sum -c` reads."""
    sums = read_checksums(directory) | {name: sha256_of(directory / name) for name in names}
    write_atomically(directory / "SHA256SUMS", [f"{sums[name]}  {name}\n".encode() for name in sorted(sums)])


def check_checksums(directory: Path, names: Iterable[str], sums: dict[str, str] | None = None) -> dict[str, str]:
    """The files' sha256, checked against `sums` ("" accepts any) or SHA256SUMS. Raises ValueError or OSError."""
    sums, found = read_checksums(directory) if sums is None else sums, {}
    for name in names:
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory / name} is missing")
        found[name] = sha256_of(directory / name)
        if sums.get(name) not in ("", found[name]):
            raise ValueError(f"{directory / name} is damaged: its sha256 does not match; restore or recreate it")
    return found


def is_intact(directory: Path, names: Iterable[str] = MODEL_FILES) -> bool:
    """Whether the files of a checkpoint are as `SHA256SUMS` says; if not, a warning says what is wrong."""
    try:
        return bool(check_checksums(directory, names))
    except (ValueError, FileNotFoundError) as error:
        say(f"warning: {error}; skipping {directory.name}", sys.stderr)
        return False


# The command line


def prepare_source(source: str | None, args: argparse.Namespace) -> None:
    """Prepare one source in a directory of its own; None means the files of --input."""
    out = Path(args.out or f"data/{source or Path(args.input[0]).name.split('.')[0] or 'text'}")
    files = [FILES[source]] if source == "shakespeare" else [local_file(Path(path)) for path in args.input or []]
    with locked(out):
        if source in EVALUATION_SETS:
            say(f"{source}: {download(FILES[source], out / FILES[source].name)}")
            return add_checksums(out, [FILES[source].name])
        if source == "demo":  # the topics of Python's own manual, which ships with CPython
            from pydoc_data.topics import topics

            lines = [json.dumps({"text": topics[name]}).encode() + b"\n" for name in sorted(topics)]
            write_atomically(out / ".demo.jsonl", lines)
            files = [local_file(out / ".demo.jsonl")]
        tokenizer, most = args.tokenizer or ("byte" if source == "demo" else "gpt2"), args.max_tokens or sys.maxsize
        size = sum(file.size for file in files) or sys.maxsize  # of the hub's corpora, which are larger than needed
        val_tokens = args.val_tokens or max(1, min(10**8, most // 10, size // (10 if tokenizer == "byte" else 40)))
        if val_tokens >= most:
            raise ValueError(f"--val-tokens {val_tokens:,} must be less than --max-tokens {most:,}")
        # Together, these determine every byte of the result.
        given = [[Path(file.name).name, file.size, file.sha256] for file in files] if args.input else source
        settings = {"source": given, "subset": args.subset if source in HUB_DATASETS else None, "tokenizer": tokenizer}
        settings |= {"shard_tokens": args.shard_tokens, "val_tokens": val_tokens, "max_tokens": args.max_tokens}
        meta = prepare(settings, files, out, min(args.workers, os.cpu_count() or 1))
        discard(out / ".demo.jsonl")
    say(f"{out}: {meta['train']['tokens']:,} tokens for training, {meta['val']['tokens']:,} for validation")
    preset = "demo" if source == "demo" else "book" if meta["train"]["tokens"] < 10**7 else "gpt2"
    say(f"train with: python train.py --preset {preset} --data={shlex.quote(str(out))}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, allow_abbrev=False, description=__doc__.splitlines()[1])
    add, origin, amount = parser.add_argument, parser.add_mutually_exclusive_group(), number(int, 1, 10**15)
    origin.add_argument("--source", choices=SOURCES, help="what to prepare (default: fineweb-edu, hellaswag, lambada)")
    origin.add_argument("--input", nargs="+", metavar="FILE", help="your own text: " + ", ".join(FORMATS))
    add("--subset", default="sample-10BT", help="of FineWeb: sample-100BT, ..., or a dump (default: sample-10BT)")
    add("--out", help="output directory (default: data/NAME); without --source or --input, FineWeb-Edu only")
    add("--tokenizer", choices=VOCAB_SIZES, help="tokenizer (default: gpt2; byte for the demo)")
    add("--shard-tokens", type=number(int, 1, 2**31 - 1), default=10**8, help="tokens in a shard (default: 100M)")
    add("--val-tokens", type=amount, help="tokens for validation (default: about a tenth of all, at most 100M)")
    add("--max-tokens", type=amount, help="stop after this many tokens, including validation (default: all)")
    add("--workers", type=number(int, 1, 1024), default=1024, help="threads (default and at most: one per core)")
    args = parser.parse_args(argv)
    sources = [args.source] if args.input or args.source else [*EVALUATION_SETS, "fineweb-edu"]
    with one_line_errors("prepare_data.py", "use fewer --workers"):
        for source in sources[-1:] if args.out else sources:
            prepare_source(source, args)


if __name__ == "__main__":
    main()
