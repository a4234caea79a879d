"""
Text to token shards: fetch a corpus, tokenize it in parallel processes, write it to `data/NAME`.

    python prepare_data.py                                    # FineWeb-Edu, 10B tokens, and the evaluation sets
    python prepare_data.py --source demo                      # Python's own manual, without network: data/demo
    python prepare_data.py --input corpus.jsonl --out data/mine

The corpus is one stream of tokens, each document behind an `<|endoftext|>`: the first --val-tokens of it are the
validation split, the rest is for training, both cut into shards `val_000000.bin`, `train_000000.bin`, ... A shard is
llm.c's: 256 int32 of header (20240520, 1, the number of tokens, zeros), then uint16 tokens, all little endian.
`meta.json`, written last, holds the tokenizer and what each split contains. Until then `progress.json` holds how far
the whole shards reach, so that the same command continues a preparation that was interrupted, to the same bytes.

The evaluation sets, HellaSwag and LAMBADA, become `data/hellaswag/tasks.bin` and `data/lambada/tasks.bin`, in llm.c's
format for tasks: a header of 256 int32 (20240522, 1, the number of tasks, the bytes of the longest, zeros), and for
each task these uint16: 65535, its size in bytes, its number, the number of the right ending, how many endings it has,
the length of the context and its tokens, and for each ending the same.
"""

import argparse
import errno
import gzip
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import requests
import tiktoken

HUB_DATASETS = {"fineweb-edu": "HuggingFaceFW/fineweb-edu", "fineweb": "HuggingFaceFW/fineweb"}
SOURCES = (*HUB_DATASETS, "shakespeare", "demo", "hellaswag", "lambada")
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE = (1_115_394, "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")  # bytes, sha256
SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256
BLOCK_BYTES = 1 << 20  # of text for one worker at a time
DOWNLOAD_ATTEMPTS = 8  # in a row without a byte

# The tokenizers


@cache
def get_tokenizer(name: str) -> tiktoken.Encoding:
    """
    "gpt2": GPT-2's byte-pair encoding, 50,257 tokens; tiktoken fetches it once (TIKTOKEN_CACHE_DIR says to where).
    "byte": the 256 bytes of UTF-8 and <|endoftext|>, 257 tokens. Raises ValueError for another name, OSError when the
    encoding cannot be fetched.
    """
    if name == "byte":
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding(
            "byte", pat_str=r"(?s:.{1,512})", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256}
        )
    if name != "gpt2":
        raise ValueError(f"there is no tokenizer {name!r}; choose gpt2 or byte")
    try:
        return tiktoken.get_encoding("gpt2")
    except requests.RequestException as error:
        raise OSError(
            f"GPT-2's tokenizer could not be fetched ({_reason(error)}); without network, set TIKTOKEN_CACHE_DIR to a "
            "directory that tiktoken has filled, or use the byte tokenizer"
        ) from error


def token_bytes(tokenizer: tiktoken.Encoding) -> np.ndarray:
    """How many bytes of UTF-8 each token stands for: (vocab_size,) uint16, 0 for <|endoftext|>."""
    sizes = [len(tokenizer.decode_single_token_bytes(token)) for token in range(tokenizer.n_vocab)]
    sizes[tokenizer.eot_token] = 0
    return np.array(sizes, dtype=np.uint16)


# Raw files into units of work, and units into tokens


class Unit(NamedTuple):
    """What a worker tokenizes at a time: a Parquet row group, lines of JSON, or a piece of one long text."""

    kind: str  # "parquet", "jsonl" or "txt"
    path: str  # the file it is from
    start: int  # the row group; the number of the first line; the offset of the piece in bytes
    block: bytes  # the text itself, except for Parquet, which the workers read themselves


def units_of(path: Path) -> Iterator[Unit]:
    """Cut a raw file into units, in order and always at the same places. Raises ValueError for one that is damaged."""
    name = path.name.lower()
    if name.endswith(".parquet"):
        for row_group in range(_open_parquet(path).num_row_groups):
            yield Unit("parquet", str(path), row_group, b"")
    elif name.endswith((".jsonl", ".jsonl.gz")):
        line = 1
        with gzip.open(path) if name.endswith(".gz") else open(path, "rb") as file:
            for block in _blocks(file, path, lambda data: data.rfind(b"\n") + 1):
                yield Unit("jsonl", str(path), line, block)
                line += block.count(b"\n")
    elif name.endswith(".txt"):
        offset = 0
        with open(path, "rb") as file:
            for block in _blocks(file, path, _last_seam):
                yield Unit("txt", str(path), offset, block)
                offset += len(block)
    else:
        raise ValueError(f"{path}: the format is not known; give .txt, .jsonl, .jsonl.gz or .parquet")


def _last_seam(data: bytes) -> int:
    """The last place in a text where white space follows a visible character, 0 if there is none. GPT-2's tokenizer
    never joins the two, so a text cut there has the tokens of the whole."""
    seams = list(re.finditer(rb"[!-~](?=[ \t\r\n])", data[-4096:]))
    return len(data) - len(data[-4096:]) + seams[-1].end() if seams else 0


def _blocks(file: BinaryIO, path: Path, last_cut: Callable[[bytes], int]) -> Iterator[bytes]:
    """The content of a file in blocks of about BLOCK_BYTES that end where `last_cut` allows it."""
    rest = []
    try:
        while data := file.read(BLOCK_BYTES):
            cut = last_cut(data)
            if cut:
                yield b"".join([*rest, data[:cut]])
                rest = []
            rest.append(data[cut:])
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if any(rest):
        yield b"".join(rest)


def _open_parquet(path: str | Path):  # noqa: ANN202 (pyarrow.parquet.ParquetFile, imported only where it is needed)
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged or not a Parquet file: {error}") from error
    if "text" not in file.schema_arrow.names:
        raise ValueError(f"{path} has no column named text; it has {', '.join(file.schema_arrow.names)}")
    if str(file.schema_arrow.field("text").type) not in ("string", "large_string", "string_view"):
        raise ValueError(f"{path}: the column named text does not hold strings")
    return file


def read_unit(unit: Unit) -> tuple[list[str], int]:
    """The texts of a unit, without null and empty ones, and the number of places where invalid UTF-8 was replaced."""
    if unit.kind == "txt":
        text = unit.block.decode("utf-8", errors="replace")
        return [text], text.count("\ufffd") - unit.block.count("\ufffd".encode())
    if unit.kind == "parquet":
        try:
            column = (
                _open_parquet(unit.path)
                .read_row_group(unit.start, columns=["text"], use_threads=False)["text"]
                .to_pylist()
            )
        except (ValueError, OSError) as error:  # pyarrow's own exceptions are among them
            raise ValueError(f"{unit.path}, row group {unit.start}, is damaged: {error}") from error
        return [text for text in column if text], 0
    texts, replaced = [], 0
    for number, line in enumerate(unit.block.split(b"\n"), start=unit.start):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{unit.path}, line {number}: not a JSON object with a text: {error!r}") from error
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{unit.path}, line {number}: its text is not a string")
        if text:
            whole = text.encode("utf-16", "surrogatepass").decode("utf-16", errors="replace")  # JSON can spell half
            replaced += whole.count("\ufffd") - text.count("\ufffd")
            texts.append(whole)
    return texts, replaced


def tokenize_unit(unit: Unit, tokenizer_name: str) -> tuple[np.ndarray, int]:
    """The tokens of a unit, (n,) uint16, each document behind an <|endoftext|>; and the count of `read_unit`. The text
    `<|endoftext|>` inside a document is ordinary text."""
    tokenizer = get_tokenizer(tokenizer_name)
    texts, replaced = read_unit(unit)
    pieces = []
    for text in texts:
        if not (unit.kind == "txt" and unit.start > 0):  # only its first piece begins a document
            pieces.append(np.array([tokenizer.eot_token], dtype=np.uint32))
        pieces.append(tokenizer.encode_to_numpy(text, disallowed_special=()))  # (n,) uint32
    return np.concatenate(pieces or [[]], dtype=np.uint16, casting="unsafe"), replaced


Position = tuple[int, int]  # of a unit: its file, and its number in that file


def tokenize_in_order(
    units: Iterator[tuple[Position, Unit | None]], tokenizer_name: str, workers: int
) -> Iterator[tuple[Position, np.ndarray, int]]:
    """`tokenize_unit` of every unit, in order, by `workers` processes that are at most two units each ahead. None among
    the units: those before it are finished before the next is asked for."""
    if workers == 1:
        yield from ((position, *tokenize_unit(unit, tokenizer_name)) for position, unit in units if unit)
        return
    context = multiprocessing.get_context("spawn")  # fork is not safe once a download thread runs
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    pending: deque[tuple[Position, Future]] = deque()
    try:
        for position, unit in units:
            if unit:
                pending.append((position, pool.submit(tokenize_unit, unit, tokenizer_name)))
            while len(pending) >= (2 * workers if unit else 1):
                position, future = pending.popleft()
                yield position, *future.result()
        for position, future in pending:
            yield position, *future.result()
    except BrokenProcessPool as error:
        raise OSError("a worker process was killed (out of memory?); start again with fewer --workers") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the main process, and end when that is killed rather than wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait_for_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait_for_parent, daemon=True).start()


# Shards


def write_atomically(path: Path, content: dict) -> None:
    """Write JSON so that a crash at any moment leaves the old file or the new one."""
    part = path.with_name(path.name + ".tmp")
    with open(part, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def next_shard(progress: dict, settings: dict) -> tuple[str, int]:
    """The split that the next token belongs to, and how many tokens the shard that begins there can hold."""
    val, train = (progress[split]["tokens"] for split in ("val", "train"))
    if val < settings["val_tokens"]:
        return "val", min(settings["shard_tokens"], settings["val_tokens"] - val)
    room = settings["max_tokens"] - val - train if settings["max_tokens"] else settings["shard_tokens"]
    return "train", min(settings["shard_tokens"], room)


def write_shard(path: Path, pieces: Iterator[np.ndarray]) -> int:
    """Write uint16 arrays as one shard, under a temporary name until it is whole; returns the number of tokens."""
    part = path.with_name(path.name + ".tmp")
    header = np.zeros(HEADER_INTS, dtype="<i4")
    with open(part, "wb") as file:
        file.write(header.tobytes())
        for piece in pieces:
            file.write(piece.astype("<u2", copy=False))
        tokens = (file.tell() - header.nbytes) // 2
        header[:3] = SHARD_MAGIC, SHARD_VERSION, tokens
        file.seek(0)
        file.write(header.tobytes())
        file.flush()
        os.fsync(file.fileno())
    if tokens:
        part.replace(path)
    else:
        part.unlink()
    return tokens


def write_shards(
    stream: Iterator[tuple[Position, np.ndarray]],
    out: Path,
    settings: dict,
    progress: dict,
    report: Callable[[int], None],
) -> None:
    """
    Write the tokens of `stream`, uint16 arrays with the positions of their units, from where `progress` stands.

    After each whole shard `progress` is brought up to date and saved: what the splits hold, and the first token that is
    in no shard yet, as [file, unit in that file, token in that unit].
    """
    tokenizer = get_tokenizer(settings["tokenizer"])
    sizes = token_bytes(tokenizer)
    reached, rest = progress["position"], np.empty(0, dtype=np.uint16)

    def take(capacity: int, counts: dict) -> Iterator[np.ndarray]:
        nonlocal reached, rest
        while capacity > 0:
            if not len(rest):
                position, tokens = next(stream, (None, None))
                if position is None:
                    return
                offset = reached[2] if list(position) == reached[:2] else 0
                reached, rest = [*position, offset], tokens[offset:]
                continue
            piece, rest = rest[:capacity], rest[capacity:]
            reached = [*reached[:2], reached[2] + len(piece)]
            capacity -= len(piece)
            counts["documents"] += int((piece == tokenizer.eot_token).sum())
            counts["tokens"] += len(piece)
            counts["bytes"] += int(sizes[piece].sum(dtype=np.int64))
            report(len(piece))
            yield piece

    while True:
        split, capacity = next_shard(progress, settings)
        counts = dict(progress[split])
        path = out / f"{split}_{counts['shards']:06d}.bin"
        if write_shard(path, take(capacity, counts)) == 0:
            return
        counts["shards"] += 1
        progress.update({split: counts, "position": reached})
        write_atomically(out / "progress.json", progress)


# Downloads


class RawFile(NamedTuple):
    """A file of a corpus: to be fetched if it has a `url`, else local. Size in bytes, sha256 in hex or empty."""

    name: str
    size: int
    sha256: str = ""
    url: str = ""


def hub_endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def request_headers(url: str) -> dict[str, str]:
    """HF_TOKEN for the hub, and for nobody else (requests drops it when a redirect leads to another host)."""
    token = os.environ.get("HF_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token and url.startswith(f"{hub_endpoint()}/") else {}


def list_hub_files(source: str, subset: str) -> list[RawFile]:
    """The Parquet files of `sample-10BT`, another sample, or a dump such as `CC-MAIN-2024-10`, as on the hub."""
    endpoint = hub_endpoint()
    folder = subset.replace("sample-", "sample/") if subset.startswith("sample-") else f"data/{subset}"
    url: str | None = f"{endpoint}/api/datasets/{HUB_DATASETS[source]}/tree/main/{folder}"
    files = []
    while url:
        response = _get_page(url)
        if response.status_code == 404:
            raise ValueError(f"the hub has no subset {subset} of {source}")
        response.raise_for_status()
        for entry in response.json():
            if entry["path"].endswith(".parquet"):
                location = f"{endpoint}/datasets/{HUB_DATASETS[source]}/resolve/main/{entry['path']}"
                files.append(RawFile(entry["path"], entry["size"], entry.get("lfs", {}).get("oid", ""), location))
        url = response.links.get("next", {}).get("url")
    if not files:
        raise ValueError(f"the hub lists no Parquet files for subset {subset} of {source}")
    return sorted(files)


def _get_page(url: str) -> requests.Response:
    """A small page, with three tries: whoever has no network should hear of it soon."""
    for failures in (1, 2, 3):
        try:
            response = requests.get(url, headers=request_headers(url), timeout=60)
        except requests.RequestException:
            if failures == 3:
                raise
            delay = None
        else:
            if not _busy(response) or failures == 3:
                return response
            delay = _retry_after(response)
        _pause(failures, delay)


def _busy(response: requests.Response) -> bool:
    return response.status_code == 429 or response.status_code >= 500


def _retry_after(response: requests.Response) -> float | None:
    after = response.headers.get("Retry-After", "")
    return float(after) if after.isdigit() else None


def _pause(failures: int, delay: float | None) -> None:
    """Wait as long as the server asks, else a second, two, four, ... up to a minute."""
    time.sleep(min(60, 2 ** (failures - 1)) if delay is None else delay)


def download(file: RawFile, path: Path, received: Callable[[int], None]) -> Path:
    """
    Fetch a file to `path`, going on from what an earlier try left in `path`.part, and check its size and sha256.

    Dropped connections, 5xx and 429 are tried again after growing waits or what Retry-After asks, a wrong sha256 once.
    `received` is told the bytes as they come. Raises OSError when it cannot be had.
    """
    if path.exists() and path.stat().st_size == file.size:
        return path  # it has this name only after its check
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    for second_time in (False, True):
        failures = 0
        while (have := part.stat().st_size if part.exists() else 0) < file.size:
            problem, delay = _download_rest(file, part, have, received)
            if part.exists() and part.stat().st_size > have:
                failures = 0
            elif (failures := failures + 1) >= DOWNLOAD_ATTEMPTS:
                raise OSError(f"{file.name} could not be fetched: {problem}; start again later and it will go on")
            if problem:
                print(f"\r{file.name}: {problem}; trying again", file=sys.stderr)
                _pause(max(1, failures), delay)
        digest = hashlib.sha256()
        with open(part, "rb") as content:
            while chunk := content.read(BLOCK_BYTES):
                digest.update(chunk)
        if part.stat().st_size == file.size and file.sha256 in ("", digest.hexdigest()):
            part.replace(path)
            return path
        part.unlink()
        if second_time:
            break
    raise OSError(f"{file.name} was fetched twice, and both times its size or sha256 was not what {file.url} promises")


def _download_rest(file: RawFile, part: Path, have: int, received: Callable[[int], None]) -> tuple[str, float | None]:
    """One request for what is missing. Returns what went wrong ("" if nothing did) and how long to wait, if it says."""
    headers = request_headers(file.url) | ({"Range": f"bytes={have}-"} if have else {})
    try:
        with requests.get(file.url, headers=headers, stream=True, timeout=60) as response:
            if _busy(response):
                return f"the server answers {response.status_code}", _retry_after(response)
            if response.status_code in (401, 403):
                raise PermissionError(f"{file.name}: access refused ({response.status_code}); set HF_TOKEN to a token")
            if response.status_code not in (200, 206):
                raise OSError(f"{file.name} could not be fetched: the server answers {response.status_code}")
            resumed = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            with open(part, "r+b" if have and resumed else "wb") as out:
                out.seek(have if resumed else 0)
                for chunk in response.iter_content(1 << 15):
                    out.write(chunk)
                    received(len(chunk))
    except requests.RequestException as error:
        return _reason(error), None
    return "", None


def _reason(error: BaseException) -> str:
    """The innermost cause of a network error, in a few words: requests wraps it three deep."""
    while isinstance(inner := getattr(error, "reason", None) or (error.args[0] if error.args else None), BaseException):
        error = inner
    return f"{type(error).__name__}: {error}"


# Evaluation sets

TASK_MAGIC, TASK_VERSION, START_OF_TASK = 20240522, 1, 2**16 - 1
TASK_FILES = {
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


def render_task(source: str, line: bytes, tokenizer: tiktoken.Encoding) -> tuple[list[list[int]], int]:
    """The tokens of a task's context and of each of its endings, and which ending is right. An ending's tokens are
    those of a space and its text; that of a LAMBADA passage is its last word."""
    task = json.loads(line)
    if source == "lambada":
        context, last_word = task["text"].rsplit(" ", 1)
        texts, label = [context, " " + last_word], 0
    else:
        texts, label = [task["ctx"], *(" " + ending for ending in task["endings"])], int(task["label"])
    if not 0 <= label < len(texts) - 1 or not texts[0]:
        raise ValueError("it has no context, or no right ending")
    return tokenizer.encode_ordinary_batch(texts, num_threads=1), label


def prepare_tasks(source: str, out: Path, tokenizer_name: str, inputs: list[str], keep_raw: bool) -> dict:
    """Write the tasks of an evaluation set, from `inputs` if there are any, to `out`; returns its meta.json."""
    files = [local_file(path) for path in inputs] or [TASK_FILES[source]]
    settings = {"source": source, "tokenizer": tokenizer_name, "files": [[Path(f.name).name, f.size] for f in files]}
    if meta := read_progress(out / "meta.json", settings):
        print(f"{out} is already prepared")
        return meta
    tokenizer = get_tokenizer(tokenizer_name)
    paths = [download(f, out / "raw" / f.name, lambda size: None) if f.url else Path(f.name) for f in files]
    tasks = []
    for path in paths:
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                (context, *endings), label = render_task(source, line, tokenizer)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}, line {number}: not a task of {source}: {error!r}") from error
            task = [START_OF_TASK, 0, len(tasks), label, len(endings)]
            for tokens in (context, *endings):
                task += [len(tokens), *tokens]
            task[1] = 2 * len(task)
            if task[1] >= START_OF_TASK or len(tasks) >= START_OF_TASK:
                raise ValueError(f"{path}, line {number}: the format has no room for so long a task, or so many")
            tasks.append(np.array(task, dtype="<u2"))
    if not tasks:
        raise ValueError(f"there are no tasks in {', '.join(map(str, paths))}")
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:4] = TASK_MAGIC, TASK_VERSION, len(tasks), max(task.nbytes for task in tasks)
    out.mkdir(parents=True, exist_ok=True)
    (out / "tasks.bin").write_bytes(header.tobytes() + np.concatenate(tasks).tobytes())
    meta = {"tokenizer": tokenizer_name, "vocab_size": tokenizer.n_vocab, "source": source, "tasks": len(tasks)}
    write_atomically(out / "meta.json", meta | {"settings": settings})
    if not keep_raw:
        shutil.rmtree(out / "raw", ignore_errors=True)
    return meta


# The whole path


def local_file(path: str) -> RawFile:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    return RawFile(path, Path(path).stat().st_size)


def demo_file(path: Path) -> RawFile:
    """The topics of Python's own manual, which every CPython carries, as one line of JSON each."""
    from pydoc_data.topics import topics

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics)), encoding="utf-8")
    return local_file(str(path))


def fetch_in_order(
    files: list[RawFile],
    first: int,
    raw: Path,
    keep_raw: bool,
    wanted: Callable[[int], bool],
    received: Callable[[int], None],
) -> Iterator[tuple[int, Path]]:
    """
    The index and local path of each file from `first` on. While one is in use, the one after it is fetched to `raw`,
    if `wanted(its index)`; a fetched file is removed, unless `keep_raw`, once its successor is asked for.
    """
    no_longer = threading.Event()

    def count(size: int) -> None:
        if no_longer.is_set():
            raise InterruptedError("the rest of this file is not needed")
        received(size)

    def start(index: int) -> Future:
        return pool.submit(download, files[index], raw / Path(files[index].name).name, count)

    with ThreadPoolExecutor(1) as pool:
        ahead: Future | None = None
        try:
            for index in range(first, len(files)):
                if not files[index].url:
                    yield index, Path(files[index].name)
                    continue
                current = ahead or start(index)
                while not wait([current], timeout=0.5).done:
                    received(0)
                path = current.result()
                ahead = start(index + 1) if index + 1 < len(files) and wanted(index + 1) else None
                yield index, path
                if not keep_raw:
                    path.unlink()
        finally:
            no_longer.set()


def make_reporter(done: int, expected: int) -> tuple[Callable[[int], None], Callable[[int], None]]:
    """Two functions, to be told of new tokens and of new bytes received. They keep one status line on standard error,
    in place on a terminal and once a minute elsewhere."""
    terminal = sys.stderr.isatty()
    began = shown = time.monotonic()
    tokens = received = 0

    def show() -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown < (0.5 if terminal else 60):
            return
        shown = now
        rate = tokens / (now - began)
        line = f"{(done + tokens) / 1e6:,.1f}M of about {expected / 1e6:,.1f}M tokens | {rate:,.0f} tokens/s"
        if received:
            line += f" | {received / 1e6 / (now - began):.1f} MB/s down"
        if tokens:
            left = max(0, int((expected - done - tokens) / rate))
            line += f" | {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
        print(f"\r{line}\x1b[K" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)

    def add_tokens(count: int) -> None:
        nonlocal tokens
        tokens += count
        show()

    def add_received(count: int) -> None:
        nonlocal received
        received += count
        show()

    return add_tokens, add_received


def choose_settings(source: str, args: argparse.Namespace) -> tuple[dict, Path]:
    """What decides every byte of the result, and the directory it goes to, with defaults that fit the source."""
    tokenizer = args.tokenizer or ("byte" if source == "demo" and not args.input else "gpt2")
    described: str | list = source
    if args.input:
        files = [local_file(path) for path in args.input]
        described = [[Path(file.name).name, file.size] for file in files]
        name, size = Path(args.input[0]).name.split(".")[0], sum(file.size for file in files)
    else:
        name, size = source, {"demo": 450_000, "shakespeare": SHAKESPEARE[0]}.get(source)
    if args.val_tokens is not None:
        val_tokens = args.val_tokens
    elif size is None:
        val_tokens = 100_000_000
    else:
        val_tokens = min(10_000_000, 1 + size // (10 if tokenizer == "byte" else 40))  # about a tenth of a small text
    if args.max_tokens is not None and args.val_tokens is None:
        val_tokens = min(val_tokens, args.max_tokens // 10)
    if args.max_tokens is not None and val_tokens >= args.max_tokens:
        raise ValueError(f"of --max-tokens {args.max_tokens:,}, --val-tokens {val_tokens:,} leave none for training")
    settings = {
        "source": described,
        "subset": args.subset if source in HUB_DATASETS and not args.input else None,
        "tokenizer": tokenizer,
        "shard_tokens": args.shard_tokens,
        "val_tokens": val_tokens,
        "max_tokens": args.max_tokens,
    }
    return settings, Path(args.out or f"data/{name}")


def expected_tokens(settings: dict, files: list[RawFile]) -> int:
    """About how many tokens there will be, for the status line and for the room on disk."""
    sample = re.fullmatch(r"sample-(\d+)BT", settings["subset"] or "")
    size = sum(file.size for file in files)
    guess = int(sample[1]) * 10**9 if sample else int(size * (1 if settings["tokenizer"] == "byte" else 0.5))
    return min(guess, settings["max_tokens"] or guess)


def read_progress(path: Path, settings: dict) -> dict | None:
    """What meta.json or progress.json holds, None where there is no such file. Raises ValueError if it was written with
    other settings."""
    if not path.exists():
        return None
    try:
        progress = json.loads(path.read_text(encoding="utf-8"))
        before = progress["settings"]
        differences = [
            f"{key} was {before[key]} and is now {settings[key]}" for key in settings if before[key] != settings[key]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); remove its directory to begin anew") from error
    if differences:
        raise ValueError(
            f"{path.parent} was prepared with other settings: {'; '.join(differences)}; give another --out"
        )
    return progress


def prepare(settings: dict, out: Path, inputs: list[str], workers: int, keep_raw: bool) -> dict:
    """Prepare `out` as `settings` say, or go on with it; returns the content of its meta.json."""
    if meta := read_progress(out / "meta.json", settings):
        print(f"{out} is already prepared")
        return meta
    progress = read_progress(out / "progress.json", settings)
    if progress is None and any(out.glob("*.bin")):
        raise FileExistsError(f"{out} holds shards that were not prepared by this script; give another --out")
    tokenizer = get_tokenizer(settings["tokenizer"])  # a missing one is noticed here, not in every worker
    out.mkdir(parents=True, exist_ok=True)
    raw = out / "raw"
    if inputs:
        files = [local_file(path) for path in inputs]
    elif settings["source"] == "demo":
        files = [demo_file(raw / "demo.jsonl")]
    elif settings["source"] == "shakespeare":
        files = [RawFile("shakespeare.txt", *SHAKESPEARE, SHAKESPEARE_URL)]
    else:
        files = list_hub_files(settings["source"], settings["subset"])
    listed = [[Path(file.name).name, file.size, file.sha256] for file in files]
    if progress is None:
        nothing = {"shards": 0, "documents": 0, "tokens": 0, "bytes": 0}
        progress = {"settings": settings, "files": listed, "position": [0, 0, 0], "train": nothing, "val": nothing}
    elif progress["files"] != listed:
        raise ValueError(f"the files of the corpus are not those that {out} was begun with; give another --out")

    first_file, first_unit, _ = progress["position"]
    done = progress["train"]["tokens"] + progress["val"]["tokens"]
    expected = expected_tokens(settings, files)
    needed = 2 * (expected - done) + sum(sorted(file.size for file in files if file.url)[-2:])
    if (free := shutil.disk_usage(out).free) < needed:
        raise OSError(f"{out} needs {needed / 1e9:.1f} GB and has {free / 1e9:.1f}; make room or lower --max-tokens")
    write_atomically(out / "progress.json", progress)
    report, received = make_reporter(done, expected)
    replaced = 0

    def wanted(index: int) -> bool:  # a byte of FineWeb's Parquet holds at least 0.3 tokens
        return 0.3 * sum(file.size for file in files[:index]) < (settings["max_tokens"] or sys.maxsize)

    def units() -> Iterator[tuple[Position, Unit | None]]:
        for index, path in fetch_in_order(files, first_file, raw, keep_raw, wanted, received):
            for number, unit in enumerate(units_of(path)):
                if (index, number) >= (first_file, first_unit):
                    yield (index, number), unit
            if files[index].url:  # it will be removed now
                yield (index, number), None

    def stream() -> Iterator[tuple[Position, np.ndarray]]:
        nonlocal replaced
        with closing(units()) as work:
            for position, tokens, errors in tokenize_in_order(work, settings["tokenizer"], workers):
                replaced += errors
                yield position, tokens

    with closing(stream()) as tokens:
        write_shards(tokens, out, settings, progress, report)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)  # the status line has said its last
    if progress["train"]["tokens"] == 0:
        raise ValueError(f"all {progress['val']['tokens']:,} tokens went to the validation split; lower --val-tokens")
    if replaced:
        print(f"warning: {replaced:,} places with invalid UTF-8 were replaced by U+FFFD", file=sys.stderr)
    meta = {
        "tokenizer": settings["tokenizer"],
        "vocab_size": tokenizer.n_vocab,
        "source": settings["source"],
        "train": progress["train"],
        "val": progress["val"],
        "settings": settings,
    }
    write_atomically(out / "meta.json", meta)
    (out / "progress.json").unlink()
    if not keep_raw:
        shutil.rmtree(raw, ignore_errors=True)
    return meta


def count(text: str) -> int:
    """A number of tokens: 1000000, 100_000, 500k, 100M or 10B."""
    match = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?)([kKmMbB]?)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text} is not a number such as 1000000, 500k, 100M or 10B")
    return int(float(match[1]) * {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}[match[2].lower()])


def prepare_source(source: str, args: argparse.Namespace) -> None:
    if source in TASK_FILES:
        out = Path(args.out or f"data/{source}")
        meta = prepare_tasks(source, out, args.tokenizer or "gpt2", args.input or [], args.keep_raw)
        print(f"{source}: {meta['tasks']:,} tasks, {out}/tasks.bin")
        return
    settings, out = choose_settings(source, args)
    meta = prepare(settings, out, args.input or [], args.workers, args.keep_raw)
    for split in ("train", "val"):
        print(f"{split}: {meta[split]['tokens']:,} tokens in {meta[split]['shards']} shards, {out}/{split}_*.bin")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description="Prepare token shards for train.py. With no options: FineWeb-Edu 10B."
    )
    parser.add_argument("--source", choices=SOURCES, help="(default: fineweb-edu, hellaswag and lambada)")
    parser.add_argument(
        "--subset",
        default="sample-10BT",
        help="of FineWeb: sample-10BT, sample-100BT, sample-350BT, or a dump (default: sample-10BT)",
    )
    parser.add_argument("--input", nargs="+", metavar="FILE", help="own text: .txt, .jsonl, .jsonl.gz, .parquet")
    parser.add_argument("--out", help="directory for the shards (default: data/NAME, after the source)")
    parser.add_argument("--tokenizer", choices=["gpt2", "byte"], help="(default: gpt2, for the demo byte)")
    parser.add_argument("--shard-tokens", type=count, default=100_000_000, help="tokens in a shard (default: 100M)")
    parser.add_argument("--val-tokens", type=count, help="tokens for validation (default: 100M, of own text a tenth)")
    parser.add_argument("--max-tokens", type=count, help="prepare just so many, validation included (default: all)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--keep-raw", action="store_true", help="keep the fetched files, in the directory's raw/")
    args = parser.parse_args(argv)
    if args.workers < 1 or not 1 <= args.shard_tokens < 2**31:
        parser.error("--workers must be at least 1, and --shard-tokens from 1 to 2^31 - 1")
    named = args.source or args.input or args.out
    sources = [args.source or "fineweb-edu"] if named else [*TASK_FILES, "fineweb-edu"]
    try:
        for source in sources:
            prepare_source(source, args)
    except KeyboardInterrupt:
        sys.exit("\nprepare_data.py: interrupted; the same command goes on after the last whole shard")
    except (ValueError, OSError) as error:
        reason = _reason(error) if isinstance(error, requests.RequestException) else str(error)
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            reason = "the disk is full; make room, and the same command goes on after the last whole shard"
        sys.exit(f"prepare_data.py: error: {' '.join(reason.split())}")


if __name__ == "__main__":
    main()
