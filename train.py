"""
Train a GPT-2 on token shards, on a CPU, on one GPU, or on many under torchrun.

    torchrun --standalone --nproc_per_node=8 train.py     # GPT-2 124M on FineWeb-Edu 10B tokens
    python train.py                                       # the same run on one GPU, by gradient accumulation
    python train.py --preset demo                         # a minute or two on a CPU
    python train.py --eval-only --init-from gpt2          # how good OpenAI's model is, beside what was published

Reads the shards that prepare_data.py wrote (or llm.c's). Writes to --out: `metrics.jsonl`, a line for each logged step
and each evaluation, and checkpoints `step_NNNNNN/`, the state after that many updates. The sequences of update s depend
on the seed and s alone, so a run can be resumed, or cut over another number of GPUs, and remains the same run.
"""

import argparse
import json
import math
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.nn.parallel import DistributedDataParallel

from model import (
    DEVICES,
    DTYPES,
    GPT,
    MODEL_SIZES,
    choose_device,
    choose_dtype,
    chunks,
    configure_optimizer,
    flops_per_token,
    generate,
    load_model,
    model_tokenizer,
    parameter_count,
    save_model,
)
from prepare_data import get_tokenizer, token_bytes

# The configuration


def option(default: Any, help: str) -> Any:  # noqa: ANN401 (a field of any type)
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run; the defaults are GPT-2 124M on FineWeb-Edu 10B (once over 19,073 * 2^19 tokens)."""

    data: str = option("data/fineweb-edu", "directory with the token shards")
    model: str = option("gpt2", "size of a new model: " + ", ".join(MODEL_SIZES))
    out: str = option("out", "directory for metrics and checkpoints")
    resume: bool = option(False, "go on from the newest checkpoint in --out, if there is one")
    init_from: str = option("", "start from these weights: a checkpoint, or gpt2, gpt2-medium, ...")
    extend: bool = option(False, "with --resume: let --steps differ from the run's so far, on purpose")
    eval_only: bool = option(False, "evaluate --init-from, or the newest checkpoint in --out, and stop")
    seed: int = option(1337, "of the initialization, the order of the data, and dropout")
    sequence_length: int = option(1024, "tokens in a sequence; of a new model also its context")
    micro_batch_size: int = option(0, "sequences on one device at a time, 0 for the most that fit")
    total_batch_tokens: int = option(2**19, "tokens in an update, over all devices and accumulation steps")
    steps: int = option(19073, "updates")
    warmup_steps: int = option(715, "updates until --max-lr")
    max_lr: float = option(6e-4, "learning rate after the warmup")
    min_lr: float = option(6e-5, "learning rate at the end")
    weight_decay: float = option(0.1, "of the matrices")
    grad_clip: float = option(1.0, "largest norm of the gradient; 0 does not clip")
    dropout: float = option(0.0, "of embeddings, attention and residual branches")
    dtype: str = option("auto", "of the matrix products: auto, float32, bfloat16, float16 (auto: float32 on a CPU)")
    compile: bool | None = option(None, "torch.compile the model (default: on CUDA)")
    device: str = option("auto", "auto, cuda, mps or cpu")
    zero: bool = option(False, "divide the optimizer's state among the ranks (ZeRO stage 1)")
    eval_every: int = option(250, "updates between evaluations, 0 for none")
    eval_tokens: int = option(10 * 2**20, "tokens of the validation split to evaluate on")
    eval_tasks: int = option(100_000, "tasks of HellaSwag and of LAMBADA to evaluate on, 0 for none")
    tensorboard: bool = option(False, "write the log for TensorBoard too, to --out (needs the package tensorboard)")
    sample_every: int = option(1000, "updates between samples of text, 0 for none")
    checkpoint_every: int = option(500, "updates between checkpoints, 0 for one at the end only")
    keep_checkpoints: int = option(2, "how many checkpoints to keep, 0 for all")
    log_every: int = option(1, "updates between lines of the log")


PRESETS = {
    "gpt2": TrainConfig(),
    "demo": TrainConfig(
        data="data/demo",
        model="gpt2-tiny",
        out="out/demo",
        sequence_length=96,
        micro_batch_size=8,
        total_batch_tokens=8 * 96,
        steps=1100,
        warmup_steps=100,
        max_lr=1.5e-3,
        min_lr=1e-5,
        eval_every=250,
        eval_tokens=45_000,
        sample_every=250,
        checkpoint_every=500,
        log_every=20,
    ),
}
BETAS = (0.9, 0.95)
FLOAT16_SKIPS = 20  # updates in a row that float16's scaler may skip, while it finds its scale
POSITIVE = ["sequence_length", "total_batch_tokens", "steps", "eval_tokens", "log_every"]
# What a checkpoint and the command line must agree on, since it decides what is computed.
FIXED_OPTIONS = [
    "model",
    "seed",
    "sequence_length",
    "total_batch_tokens",
    "steps",
    "warmup_steps",
    "max_lr",
    "min_lr",
    "weight_decay",
    "grad_clip",
    "dropout",
]


def parse_args(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> TrainConfig:
    """The command line: a preset, and an option for each field of TrainConfig."""
    parser.add_argument("--preset", default="gpt2", choices=PRESETS, help="where the defaults are from (default: gpt2)")
    for item in fields(TrainConfig):
        text, kind = item.metadata["help"], {}
        if item.type is bool:
            kind["action"] = "store_true"
        elif item.type in (int, float, str):
            kind |= {"type": item.type, "metavar": item.type.__name__.upper()}
            text += f" (default: {item.default})" if item.default != "" else ""
        else:
            kind["action"] = argparse.BooleanOptionalAction
        parser.add_argument("--" + item.name.replace("_", "-"), default=None, help=text, **kind)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    return replace(PRESETS[given.pop("preset")], **given)


def check_config(config: TrainConfig, world_size: int) -> None:
    """Raise ValueError for a setting out of range, or a batch that cannot be cut as asked."""
    for item in fields(config):
        value, least = getattr(config, item.name), 1 if item.name in POSITIVE else 0
        if item.type in (int, float) and not least <= value < math.inf:
            raise ValueError(f"--{item.name.replace('_', '-')} must be at least {least}, not {value}")
    if config.model not in MODEL_SIZES:
        raise ValueError(f"there is no model size {config.model}; choose one of {', '.join(MODEL_SIZES)}")
    if config.dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, not {config.dtype}")
    if config.device not in DEVICES:
        raise ValueError(f"--device must be one of {', '.join(DEVICES)}, not {config.device}")
    if config.seed >= 2**32:
        raise ValueError(f"--seed must be below 2^32, not {config.seed}")
    if config.dropout >= 1:
        raise ValueError(f"--dropout must be below 1, not {config.dropout}")
    if config.min_lr > config.max_lr:
        raise ValueError(f"--min-lr ({config.min_lr}) must not be more than --max-lr ({config.max_lr})")
    size = max(1, config.micro_batch_size)
    piece = config.sequence_length * size * world_size
    if config.total_batch_tokens % piece:
        below, above = config.total_batch_tokens // piece * piece, -(-config.total_batch_tokens // piece) * piece
        raise ValueError(
            f"--total-batch-tokens {config.total_batch_tokens} cannot be cut into micro-batches of "
            f"{size} sequences of {config.sequence_length} tokens on {world_size} devices; "
            f"the nearest that can: {f'{below} or ' if below else ''}{above}"
        )


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of update `step`, counted from 1: from 0 (at 0) linearly to max_lr at warmup_steps, then half a
    period of a cosine to min_lr at the last."""
    if step < config.warmup_steps:
        return config.max_lr * step / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.min_lr + (config.max_lr - config.min_lr) * (1 + math.cos(math.pi * min(1.0, done))) / 2


# Devices and processes


class Job(NamedTuple):
    """This process among the others of the run, and its device."""

    rank: int
    world_size: int
    device: torch.device


def start_job(device: str) -> Job:
    """Choose the device and, under torchrun, join the other processes. Raises ValueError for one that is not here."""
    chosen = choose_device(device)
    rank, local_rank, world_size = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    on_cuda = chosen.type == "cuda"
    if on_cuda:
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"{local_rank + 1} processes were started for {torch.cuda.device_count()} GPUs")
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    if world_size > 0:  # torchrun says so, for a single process too
        store, _, _ = next(dist.rendezvous("env://"))
        if world_size == int(os.environ.get("LOCAL_WORLD_SIZE", "0")):
            # Workers that torchrun has restarted would find the addresses of the dead ones in its store. On several
            # machines the count of restarts is not common to all, and cannot tell them apart.
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend, device_id = ("nccl", chosen) if on_cuda else ("gloo", None)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, device_id=device_id)
    return Job(rank, max(1, world_size), chosen)


def sum_over_ranks(value: torch.Tensor, job: Job) -> torch.Tensor:
    """The sum of a tensor over all ranks, float64 on the CPU; waits for the device."""
    if not dist.is_initialized():
        return value.cpu().double()
    value = value.to(job.device, torch.float64)
    dist.all_reduce(value)
    return value.cpu()


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """A list to which SIGTERM and SIGINT are added instead of ending the process. A second one ends it at once, unless
    it comes within a second: a scheduler and torchrun may both have sent the first."""
    noted: list[int] = []
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> (
        None
    ):  # in a thread: Python runs handlers only between the main thread's operations, which may be long
        since = math.inf
        with reader:
            while number := reader.recv(1):
                if time.monotonic() - since > 1:
                    os._exit(128 + number[0])
                since = min(since, time.monotonic())
                noted.append(number[0])

    threading.Thread(target=watch, daemon=True).start()
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    wakeup = signal.set_wakeup_fd(writer.fileno())
    try:
        yield noted
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.close()


# TFLOP/s in bfloat16 and float16 (dense, accumulated in float32), and in float32. More special names come first.
PEAK_TFLOPS = {
    "B200": (2250, 75), "H200 NVL": (835, 60), "H200": (989, 67), "H100 PCIe": (756, 51), "H100 NVL": (835, 60),
    "H100": (989, 67), "A100": (312, 19.5), "A10": (125, 31.2), "L40S": (362, 91.6), "L4": (121, 30.3),
    "V100": (125, 15.7), "T4": (65, 8.1), "RTX 5090": (209.5, 104.8), "RTX 4090": (165.2, 82.6), "RTX 3090": (71, 35.6),
}  # fmt: skip
WITHOUT_BFLOAT16 = ("V100", "T4")


def peak_flops(name: str, dtype: torch.dtype) -> float | None:
    """The rate of a card, by its name, in FLOP/s by its maker's data sheet; None where it is not known."""
    cards = (card for card in PEAK_TFLOPS if re.search(rf"\b{card}\b(?! (Ti|D|Laptop|SUPER)\b)", name))
    card = next(cards, None)
    if card is None or (card in WITHOUT_BFLOAT16 and dtype == torch.bfloat16):
        return None
    return PEAK_TFLOPS[card][dtype == torch.float32] * 1e12


# The data and its order


class Split(NamedTuple):
    """The shards of a split, cut into sequences of T + 1 tokens, the last of which begins the next sequence."""

    paths: list[Path]
    tokens: list[int]  # in each shard
    first: np.ndarray  # (shards + 1,) int64: the index of each shard's first sequence, and the number of all
    sequence_length: int  # T
    vocab_size: int


def open_split(directory: Path, name: str, sequence_length: int, vocab_size: int) -> Split:
    """Find and check the shards `name`_*.bin. Raises FileNotFoundError when there are none, ValueError when one is not
    a whole shard or when together they do not hold a single sequence."""
    paths = sorted(directory.glob(f"*{name}_*.bin"))
    if not paths:
        raise FileNotFoundError(
            f"{directory} has no {name}_*.bin; make it with prepare_data.py, or give another --data"
        )
    tokens = [read_header(path) for path in paths]
    first = np.cumsum([0] + [max(0, count - 1) // sequence_length for count in tokens], dtype=np.int64)
    if first[-1] == 0:
        raise ValueError(
            f"{directory}: no {name} shard holds a sequence of {sequence_length} tokens and the one after it"
        )
    return Split(paths, tokens, first, sequence_length, vocab_size)


def read_header(path: Path) -> int:
    """The number of tokens in a shard in llm.c's format. Raises ValueError if it is not a whole one."""
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(1024).ljust(1024, b"\0"), dtype="<i4")
    if header[0] != 20240520 or header[1] != 1:
        raise ValueError(f"{path} is not a token shard (its header is not that of llm.c's version 1)")
    tokens = int(header[2])
    if tokens < 1 or path.stat().st_size != 1024 + 2 * tokens:
        raise ValueError(f"{path} is damaged: it has {path.stat().st_size} bytes and should have {1024 + 2 * tokens}")
    return tokens


def check_tokens(split: Split, job: Job) -> None:
    """Read this rank's share of the shards through. Raises ValueError for a token outside the vocabulary."""
    for path in split.paths[job.rank :: job.world_size]:
        with open(path, "rb") as file:
            file.seek(1024)
            while data := file.read(1 << 24):
                if (largest := int(np.frombuffer(data, dtype="<u2").max())) >= split.vocab_size:
                    raise ValueError(f"{path} holds token {largest}, outside the vocabulary of {split.vocab_size}")


def read_sequences(split: Split, indices: np.ndarray) -> np.ndarray:
    """The sequences with these indices: (n, T + 1) int64. Raises ValueError for a token outside the vocabulary."""
    T = split.sequence_length
    sequences = np.empty((len(indices), T + 1), dtype=np.int64)
    for row, index in enumerate(indices):
        shard = int(np.searchsorted(split.first, index, side="right")) - 1
        # A plain read: pages of a memory map would count as memory of this process, and pile up over an epoch.
        with open(split.paths[shard], "rb", buffering=0) as file:
            file.seek(1024 + 2 * T * int(index - split.first[shard]))
            sequences[row] = np.frombuffer(file.read(2 * (T + 1)), dtype="<u2")
        if sequences[row].max() >= split.vocab_size:
            raise ValueError(
                f"{split.paths[shard]} holds token {sequences[row].max()}, outside the vocabulary of {split.vocab_size}"
            )
    return sequences


@lru_cache(maxsize=2)  # a batch can reach from one epoch into the next
def epoch_order(sequences: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: a permutation of range(sequences). RandomState, since NumPy has frozen its streams."""
    return np.random.RandomState([seed, epoch]).permutation(sequences)


def batch_indices(split: Split, config: TrainConfig, step: int) -> np.ndarray:
    """Which sequences update `step` uses, in order: (total_batch_tokens / T,) int64. This alone decides the data of a
    run; how many devices there are does not."""
    size, total = config.total_batch_tokens // config.sequence_length, int(split.first[-1])
    positions = np.arange((step - 1) * size, step * size)
    epochs = positions // total
    return np.concatenate(
        [epoch_order(total, config.seed, int(e))[positions[epochs == e] % total] for e in np.unique(epochs)]
    )


def load_batch(split: Split, config: TrainConfig, step: int, job: Job) -> torch.Tensor:
    """This rank's part of the batch of update `step`: (accumulation steps, micro_batch_size, T + 1) int64, on the CPU,
    in pinned memory where the device is a GPU."""
    indices = batch_indices(split, config, step).reshape(-1, job.world_size, config.micro_batch_size)[:, job.rank]
    sequences = read_sequences(split, indices.ravel())
    batch = torch.from_numpy(sequences.reshape(*indices.shape, -1))
    return batch.pin_memory() if job.device.type == "cuda" else batch


class Tasks(NamedTuple):
    """An evaluation set. A row is a context and one of its endings; the rows of a task follow each other."""

    rows: list[np.ndarray]  # of uint16
    scored: np.ndarray  # (rows,) int64: how many tokens the ending has
    labels: np.ndarray  # (tasks,) int64: which ending is right


def read_tasks(path: Path, vocab_size: int) -> Tasks:
    """The tasks in a file of llm.c's format. Raises ValueError if it is not a whole one, or a token is outside the
    vocabulary."""
    data = path.read_bytes()
    header = np.frombuffer(data[:1024].ljust(1024, b"\0"), dtype="<i4")
    if header[0] != 20240522 or header[1] != 1:
        raise ValueError(f"{path} does not hold tasks (its header is not that of llm.c's version 1)")
    rows, scored, labels, at = [], [], [], 0
    try:
        stream = np.frombuffer(data[1024:], dtype="<u2").tolist()
        for _ in range(header[2]):
            begin, _, _, label, endings = stream[at : at + 5]
            at, pieces = at + 5, []
            for _ in range(1 + endings):
                pieces.append(stream[at + 1 : at + 1 + stream[at]])
                at += 1 + stream[at]
            if begin != 2**16 - 1 or not all(pieces) or label >= endings:
                raise ValueError("a task is not as it should be")
            rows += [np.array(pieces[0] + ending, dtype=np.uint16) for ending in pieces[1:]]
            scored += [len(ending) for ending in pieces[1:]]
            labels.append(label)
        if not labels or at != len(stream) or len(rows) != endings * len(labels):
            raise ValueError("it is too long, or its tasks differ in the number of endings")
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if (largest := max(int(row.max()) for row in rows)) >= vocab_size:
        raise ValueError(f"{path} holds token {largest}, outside the vocabulary of {vocab_size}")
    return Tasks(rows, np.array(scored), np.array(labels))


# Checkpoints and the log


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints in a directory, oldest first."""
    found = [path for path in out.glob("step_*") if re.fullmatch(r"step_\d{6,}", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def copy_to_host(value: Any) -> Any:  # noqa: ANN401 (tensors in dicts and lists)
    """A copy that further training does not touch, of a tensor or a structure of them, on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copy_to_host(item) for key, item in value.items()}
    return [copy_to_host(item) for item in value] if isinstance(value, list) else value


def save_checkpoint(out: Path, step: int, model: GPT, trainer: dict, tokenizer: str, keep: int) -> None:
    """Write `step_NNNNNN`, under another name until it is whole and on disk, then remove all but the newest `keep`.
    Raises OSError when it cannot be written."""
    final = out / f"step_{step:06d}"
    part = out / f"{final.name}.tmp"
    shutil.rmtree(part, ignore_errors=True)
    try:
        save_model(model, part, tokenizer)
        torch.save(trainer, part / "trainer.pt")
        for path in (*part.iterdir(), part):
            synchronize(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"{final} could not be written ({error}); make room, and --resume goes on") from error
    shutil.rmtree(final, ignore_errors=True)  # a damaged one that was passed over
    part.rename(final)
    synchronize(out)
    for old in checkpoints(out)[:-keep] if keep else []:
        shutil.rmtree(old)


def synchronize(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def load_trainer(checkpoint: Path) -> dict:
    """What save_checkpoint was given as `trainer`. Raises ValueError when it is not there or damaged."""
    try:
        trainer = torch.load(checkpoint / "trainer.pt", map_location="cpu", weights_only=True, mmap=True)
        if trainer.keys() >= {"step", "optimizer", "scaler", "config", "data"}:
            return trainer
        raise KeyError("a part of it is missing")
    except FileNotFoundError as error:
        raise ValueError(f"{checkpoint} cannot be resumed: it has no trainer.pt") from error
    except Exception as error:  # torch.load raises many kinds for a file that is not one of its own
        raise ValueError(f"{checkpoint}/trainer.pt is damaged ({type(error).__name__} on reading it)") from error


def check_same_run(checkpoint: Path, trainer: dict, config: TrainConfig, data: list[int]) -> None:
    """Raise ValueError, naming each difference, when a checkpoint is from a run that computes something else."""
    before, now = trainer["config"], asdict(config)
    differences = [
        f"--{name.replace('_', '-')} was {before.get(name)} and is now {now[name]}"
        for name in FIXED_OPTIONS
        if before.get(name) != now[name] and not (name == "steps" and config.extend)
    ]
    if trainer["data"] != data:
        differences.append(f"the shards in {config.data} are not those of before")
    if differences:
        hint = "; --extend allows another --steps" if any(text.startswith("--steps") for text in differences) else ""
        raise ValueError(f"{checkpoint} is from another run: {'; '.join(differences)}{hint}")


def newest_whole_checkpoint(config: TrainConfig, data: list[int]) -> str:
    """The checkpoint in config.out to go on from, "" when there is none. Damaged ones are named and passed over. Raises
    ValueError when all are damaged, or it is of another run."""
    existing = checkpoints(Path(config.out))
    for checkpoint in reversed(existing):
        try:
            load_model(checkpoint)
            trainer = load_trainer(checkpoint)
        except (ValueError, OSError) as error:
            say(f"warning: {error}; passing over it")
            continue
        check_same_run(checkpoint, trainer, config, data)
        return str(checkpoint)
    if existing:
        raise ValueError(f"{config.out} has no checkpoint that is whole; give another --out to begin anew")
    return ""


def read_log(path: Path) -> list[dict]:
    """The lines of metrics.jsonl, without one that a crash cut short; none where there is no such file."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(ValueError):
            entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict)]


def open_log(path: Path, step: int) -> TextIO:
    """metrics.jsonl, to append to; all lines about updates past `step` are removed first."""
    kept = [json.dumps(entry) + "\n" for entry in read_log(path) if entry.get("step", -1) <= step]
    part = path.with_name(path.name + ".tmp")
    part.write_text("".join(kept), encoding="utf-8")
    part.replace(path)
    return open(path, "a", encoding="utf-8", buffering=1)


def import_summary_writer() -> type:
    """TensorBoard's, an optional package. Raises ValueError when it is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("--tensorboard needs a package that is not here: pip install tensorboard") from error
    return SummaryWriter


TITLES = {
    "val_loss": "validation loss, nats per token",
    "val_perplexity": "perplexity",
    "val_bits_per_byte": "bits per byte of UTF-8",
    "hellaswag_acc_norm": "HellaSwag, normalized by length",
    "hellaswag_acc": "HellaSwag, summed",
    "lambada_acc": "LAMBADA, last word",
    "lambada_perplexity": "LAMBADA, perplexity of the word",
}
SHOWN_TASKS = {"hellaswag": "hellaswag_acc_norm", "lambada": "lambada_acc"}


def describe(entry: dict, config: TrainConfig, seconds: float) -> str:
    """A line for the terminal about one update that took so many seconds."""
    left = int((config.steps - entry["step"]) * seconds)
    parts = [
        f"step {entry['step']:>{len(str(config.steps))}}/{config.steps}",
        f"loss {entry['train_loss']:.4f}",
        f"lr {entry['lr']:.2e}",
        f"norm {entry['grad_norm']:.2f}",
        f"{seconds * 1000:.0f} ms",
        f"{entry['tokens_per_second']:,.0f} tok/s",
        *([f"mfu {entry['mfu']:.1%}"] if "mfu" in entry else []),
        f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left",
    ]
    return " | ".join(parts)


def with_error(metrics: dict, name: str) -> str:
    """A metric and its standard error, where it has one."""
    error = metrics.get(f"{name}_se")
    return f"{metrics[name]:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def describe_evaluation(entry: dict) -> str:
    """A line for the terminal about an evaluation."""
    parts = [
        f"step {entry['step']}",
        f"val_loss {with_error(entry, 'val_loss')}",
        f"perplexity {entry['val_perplexity']:.2f}",
        f"{entry['val_bits_per_byte']:.4f} bits/byte",
        *(f"{name} {with_error(entry, key)}" for name, key in SHOWN_TASKS.items() if key in entry),
    ]
    return " | ".join(parts)


def evaluation_table(metrics: dict, name: str, published: dict[str, float]) -> str:
    """An evaluation as a table, beside the published figures of the same model where there are any."""
    head = f"{'':32} {name:>24}" + (f" {'GPT-2, published':>24}" if published else "")
    lines = [head]
    for key, title in TITLES.items():
        if key in metrics:
            beside = f" {published[key]:>24.4f}" if key in published else ""
            lines.append(f"{title:32} {with_error(metrics, key):>24}{beside}")
    return "\n".join(lines)


def summarize(entries: list[dict], config: TrainConfig, updates: int, seconds: float, checkpoint: Path) -> str:
    """What a finished run amounts to: `entries` are its log, `updates` and `seconds` those of this process."""
    hours = f"{seconds // 3600:.0f}:{seconds // 60 % 60:02.0f}:{seconds % 60:02.0f}"
    tokens, rate = updates * config.total_batch_tokens, updates * config.total_batch_tokens / seconds
    lines = [f"{config.steps} steps done, {config.steps * config.total_batch_tokens:,} tokens"]
    if updates:
        lines[0] += f"; here {tokens:,} in {hours}, evaluation and all, {rate:,.0f} tok/s"
    evaluations = [entry for entry in entries if "val_loss" in entry and "step" in entry]
    if evaluations:
        best, last = min(evaluations, key=lambda entry: entry["val_loss"]), evaluations[-1]
        lines.append(
            f"validation loss {with_error(last, 'val_loss')}, best {best['val_loss']:.4f} at step {best['step']}"
        )
        lines += [f"{TITLES[key]} {with_error(last, key)}" for key in SHOWN_TASKS.values() if key in last]
    lines.append(f"checkpoint {checkpoint}; sample from it with: python sample.py --model {checkpoint}")
    return "\n".join(lines)


def sample_text(model: GPT, tokenizer_name: str, seed: int, device: torch.device) -> str:
    """100 tokens of text that the model begins by itself."""
    tokenizer = get_tokenizer(tokenizer_name)
    generator = torch.Generator(device).manual_seed(seed)
    prompt = torch.tensor([[tokenizer.eot_token]], device=device)
    tokens = generate(model, prompt, 100, 0.8, top_k=50, generator=generator, stop_token=tokenizer.eot_token)
    return tokenizer.decode([int(token) for token in tokens]).removesuffix("<|endoftext|>")


# The run


def read_meta(directory: Path) -> dict:
    """What a data directory says of itself: at least "tokenizer" and "vocab_size". Shards without a meta.json are other
    programs', with GPT-2's tokens. Raises FileNotFoundError when it is not there, ValueError when it is not ready."""
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no data directory {directory}; make it with prepare_data.py, or give --data")
    if (directory / "progress.json").exists() and not (directory / "meta.json").exists():
        raise ValueError(f"{directory} is not prepared to the end; start prepare_data.py again")
    if not (directory / "meta.json").exists():
        return {"tokenizer": "gpt2", "vocab_size": MODEL_SIZES["gpt2"].vocab_size}
    try:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        return meta | {key: meta[key] for key in ("tokenizer", "vocab_size", "source")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{directory}/meta.json is damaged: {error!r}") from error


def open_data(config: TrainConfig, name: str, meta: dict) -> Split:
    """A split of the data, which must hold what meta.json says of it. Raises as open_split does."""
    split = open_split(Path(config.data), name, config.sequence_length, meta["vocab_size"])
    if name in meta and sum(split.tokens) != meta[name]["tokens"]:
        raise ValueError(
            f"{config.data}: the {name} shards hold {sum(split.tokens)} tokens, meta.json says {meta[name]['tokens']}"
        )
    return split


def open_tasks(config: TrainConfig, tokenizer: str, model: GPT, job: Job) -> dict[str, Tasks]:
    """The evaluation sets that are there beside the data, by name: eval_tasks of each. Rank 0 reads for all."""
    found = {}
    for name in SHOWN_TASKS if job.rank == 0 and config.eval_tasks else []:
        directory = Path(config.data).parent / name
        if not (directory / "tasks.bin").exists():
            continue
        if (theirs := read_meta(directory)["tokenizer"]) != tokenizer:
            say(f"{directory} is left out: its tokens are the {theirs} tokenizer's, and not {tokenizer}'s")
            continue
        tasks = read_tasks(directory / "tasks.bin", model.config.vocab_size)
        if tasks.scored.max() > model.config.block_size:
            say(f"{directory} is left out: a context of {model.config.block_size} is too short for it")
            continue
        count = min(config.eval_tasks, len(tasks.labels))
        rows = count * len(tasks.rows) // len(tasks.labels)
        found[name] = Tasks(tasks.rows[:rows], tasks.scored[:rows], tasks.labels[:count])
    sent = [found]
    if dist.is_initialized():
        dist.broadcast_object_list(sent)
    return sent[0]


def build_model(config: TrainConfig, source: str, tokenizer: str, vocab_size: int) -> GPT:
    """The model of a checkpoint or of OpenAI's where `source` names one, else a new one. Raises ValueError when it does
    not fit the data."""
    if not source:
        size = MODEL_SIZES[config.model]
        return GPT(replace(size, block_size=config.sequence_length, vocab_size=vocab_size, dropout=config.dropout))
    model = load_model(source, config.dropout)
    if (trained := model_tokenizer(source)) != tokenizer or model.config.vocab_size != vocab_size:
        raise ValueError(f"{source} was trained with the {trained} tokenizer, and the data has {tokenizer}'s tokens")
    if config.sequence_length > model.config.block_size:
        raise ValueError(
            f"--sequence-length {config.sequence_length} is more than {source}'s context of {model.config.block_size}"
        )
    return model


def find_source(config: TrainConfig, data: list[int], job: Job) -> tuple[str, bool]:
    """Where the weights come from ("" for a new model), and whether that is a checkpoint to go on from. Rank 0 looks,
    so that all ranks see the same."""
    found = [config.init_from, False]
    if job.rank == 0:
        existing = checkpoints(Path(config.out))
        begun = existing or any("step" in entry for entry in read_log(Path(config.out) / "metrics.jsonl"))
        if begun and not config.resume and not config.eval_only:
            raise FileExistsError(f"{config.out} already holds a run; give --resume to go on with it, or another --out")
        if config.eval_only and not config.init_from:
            if not existing:
                raise FileNotFoundError(
                    f"there is nothing to evaluate: {config.out} has no checkpoint; give --init-from"
                )
            found = [str(existing[-1]), False]
        elif config.resume and (newest := newest_whole_checkpoint(config, data)):
            found = [newest, True]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    if found[1] and not Path(found[0]).is_dir():
        raise FileNotFoundError(
            f"rank {job.rank} cannot see {found[0]}; --out must be on a disk that all machines share"
        )
    return found[0], found[1]


def micro_batch_sizes(config: TrainConfig, job: Job) -> list[int]:
    """How many sequences at a time a rank's part of a batch can be cut into, the most first."""
    share = config.total_batch_tokens // config.sequence_length // job.world_size
    return [size for size in range(share, 0, -1) if share % size == 0]


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)  # the latter on a CPU


def fits(size: int, config: TrainConfig, model: GPT, job: Job, autocast: torch.autocast) -> bool:
    """Whether there is room for a forward and a backward pass of so many sequences, and the optimizer's state."""
    try:
        optimizer_state = torch.empty(2 * parameter_count(model), device=job.device)
        tokens = torch.zeros(size, config.sequence_length, dtype=torch.int64, device=job.device)
        with autocast:
            model(tokens, tokens).backward()
        del optimizer_state
        return True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        model.zero_grad(set_to_none=True)
        if job.device.type == "cuda":
            torch.cuda.empty_cache()


def find_micro_batch_size(config: TrainConfig, model: GPT, job: Job, autocast: torch.autocast) -> int:
    """The largest micro-batch that the GPUs of all ranks have room for, by trying, uncompiled. Elsewhere at most 4,096
    tokens: a CPU is no faster with more, and has no memory of its own that could be filled."""
    sizes = micro_batch_sizes(config, job)
    if job.device.type == "cuda" and not config.eval_only:
        torch.cuda.set_per_process_memory_fraction(0.9, job.device)  # the rest is for evaluation, samples and gaps
        size = next((size for size in sizes if fits(size, config, model, job, autocast)), 1)
        torch.cuda.set_per_process_memory_fraction(1.0, job.device)
    else:
        size = next((size for size in sizes if size * config.sequence_length <= 4096), 1)
    if dist.is_initialized():
        smallest = torch.tensor(size, device=job.device)
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        size = int(smallest)
    return size


class Run(NamedTuple):
    """What a run consists of when it is set up. `compiled` and `parallel` run `model`, the one compiled (or not), the
    other wrapped for training on several ranks (or not); the parameters and their plain names are those of `model`."""

    job: Job
    model: GPT
    compiled: Callable
    parallel: Callable
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    dtype: torch.dtype
    autocast: torch.autocast
    tokenizer: str
    train_split: Split
    val_split: Split | None
    token_bytes: np.ndarray | None  # of each token of the vocabulary, how many bytes of text it stands for
    tasks: dict[str, Tasks]
    source: str  # where the weights are from, "" for new ones
    start: int  # the updates that were made before
    micro_batch_size: int
    description: str


def set_up(config: TrainConfig) -> Run:
    """Check the data, join the other processes, and make the model and the optimizer or take them from a checkpoint."""
    if config.tensorboard:
        import_summary_writer()
    meta = read_meta(Path(config.data))
    evaluates = config.eval_every > 0 or config.eval_only
    val_split = open_data(config, "val", meta) if evaluates else None
    train_split = open_data(config, "train", meta)
    # One that cannot be fetched is noticed now.
    tokenizer = get_tokenizer(meta["tokenizer"]) if evaluates or config.sample_every else None
    job = start_job(config.device)
    if "train" not in meta:  # other programs' shards
        check_tokens(train_split, job)
    dtype = choose_dtype(config.dtype, job.device)
    source, resuming = find_source(config, train_split.tokens, job)

    torch.manual_seed(config.seed)
    model = build_model(config, source, meta["tokenizer"], meta["vocab_size"]).to(job.device).train()
    tasks = open_tasks(config, meta["tokenizer"], model, job) if evaluates else {}
    optimizer = configure_optimizer(model, config.max_lr, config.weight_decay, BETAS)
    if config.zero and job.world_size > 1:
        optimizer = divide_optimizer(optimizer)
    scaler = torch.amp.GradScaler(job.device.type, enabled=dtype == torch.float16)
    autocast = torch.autocast(job.device.type, dtype=dtype, enabled=dtype != torch.float32)
    start, micro_batch_size = 0, config.micro_batch_size
    if resuming:
        state = load_trainer(Path(source))
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        start = state["step"]
        # What was found once is kept, so that the sums are of the same parts.
        micro_batch_size = micro_batch_size or state["config"]["micro_batch_size"]
        if micro_batch_size not in micro_batch_sizes(config, job):
            micro_batch_size = 0
    micro_batch_size = micro_batch_size or find_micro_batch_size(config, model, job, autocast)
    compiles = job.device.type == "cuda" if config.compile is None else config.compile
    compiled = parallel = torch.compile(model) if compiles else model
    if dist.is_initialized() and not config.eval_only:
        devices = [job.device] if job.device.type == "cuda" else None
        parallel = DistributedDataParallel(compiled, device_ids=devices, gradient_as_bucket_view=True)
    description = (
        f"{parameter_count(model):,} parameters | {sum(train_split.tokens):,} tokens | {job.world_size} x "
        f"{job.device.type}, {str(dtype).removeprefix('torch.')}{', compiled' if compiles else ''}, micro-batches of "
        f"{micro_batch_size} | "
        f"{'going on' if resuming else 'starting'} from {source or 'scratch'}"
    )
    return Run(
        job=job,
        model=model,
        compiled=compiled,
        parallel=parallel,
        optimizer=optimizer,
        scaler=scaler,
        dtype=dtype,
        autocast=autocast,
        tokenizer=meta["tokenizer"],
        train_split=train_split,
        val_split=val_split,
        token_bytes=token_bytes(tokenizer) if evaluates else None,
        tasks=tasks,
        source=source,
        start=start,
        micro_batch_size=micro_batch_size,
        description=description,
    )


def divide_optimizer(optimizer: torch.optim.AdamW) -> torch.optim.Optimizer:
    """The same optimizer with its state divided among the ranks, before it has any."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # slow to import

    groups = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in optimizer.param_groups]
    settings = {name: optimizer.defaults[name] for name in ("lr", "betas", "eps", "fused")}
    return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **settings)


# Evaluation

# HellaSwag as rendered here; the loss of the released 124M on the first 100M tokens of these corpora.
PUBLISHED_HELLASWAG = {"gpt2": 0.2945, "gpt2-medium": 0.3752, "gpt2-large": 0.4320, "gpt2-xl": 0.4889}
PUBLISHED_LOSS = {("gpt2", "fineweb-edu"): 3.2924, ("gpt2", "fineweb"): 3.4250}


def score_validation(run: Run, config: TrainConfig) -> tuple[np.ndarray, np.ndarray]:
    """
    For each sequence in the first eval_tokens of the validation split, its loss summed over its tokens in nats and the
    bytes of text that they stand for, (sequences,) float64, on all ranks together.

    Every batch has the same shape, so that a compiled model is compiled once: rows that are missing at the end have -1
    for targets, which the loss leaves out.
    """
    job, split, B, T = run.job, run.val_split, config.micro_batch_size, config.sequence_length
    sequences = min(max(1, config.eval_tokens // T), int(split.first[-1]))
    scores, losses = torch.zeros(2, sequences, dtype=torch.float64), []
    starts = range(job.rank * B, sequences, job.world_size * B)
    for start in starts:
        count = min(B, sequences - start)
        tokens, targets = torch.zeros(B, T, dtype=torch.int64), torch.full((B, T), -1)
        batch = read_sequences(split, np.arange(start, start + count))
        scores[1, start : start + count] = torch.from_numpy(run.token_bytes[batch[:, 1:]].sum(axis=1))
        tokens[:count], targets[:count] = torch.from_numpy(batch[:, :-1]), torch.from_numpy(batch[:, 1:])
        with run.autocast:
            losses.append(run.compiled(tokens.to(job.device), targets.to(job.device), reduction="none").sum(dim=1))
    for start, sums in zip(starts, losses, strict=True):
        scores[0, start : start + B] = sums[: sequences - start].cpu()
    nats, sizes = sum_over_ranks(scores, job).numpy()
    return nats, sizes


def score_tasks(run: Run, tasks: Tasks) -> tuple[np.ndarray, np.ndarray]:
    """
    For each row, (rows,) float64, the loss of its ending, summed over its tokens in nats, and how many of them are the
    likeliest; on all ranks together. Of a row that is too long for the model the beginning is left out.

    Rows of about the same length share a batch. The batches have many shapes, too many to compile each, and are the
    same for any number of ranks and any micro-batch size. Logits are computed only where they are scored.
    """
    job, longest = run.job, run.model.config.block_size + 1
    rows = [row[-longest:].astype(np.int64) for row in tasks.rows]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
    batches, most = [], 8192 if job.device.type == "cuda" else 2048  # tokens with padding
    while order:
        size = max(1, most // len(rows[order[0]]))
        batches.append(order[:size])
        order = order[size:]
    scores, results = torch.zeros(2, len(rows), dtype=torch.float64), []
    for batch in batches[job.rank :: job.world_size]:
        T = len(rows[batch[0]]) - 1
        tokens, targets = np.zeros((len(batch), T), dtype=np.int64), np.full((len(batch), T), -1)
        for i, row in enumerate(batch):
            end, begin = len(rows[row]) - 1, len(rows[row]) - 1 - tasks.scored[row]
            tokens[i, :end], targets[i, begin:end] = rows[row][:-1], rows[row][begin + 1 :]
        places = torch.from_numpy(np.flatnonzero(targets >= 0))
        wanted = torch.from_numpy(targets.ravel())[places].to(job.device)
        with run.autocast:
            x = run.model.hidden(torch.from_numpy(tokens).to(job.device)).flatten(0, 1)[places.to(job.device)]
            for part in chunks(x):
                logits = run.model.logits(x[part]).float()
                losses = torch.nn.functional.cross_entropy(logits, wanted[part], reduction="none")
                likeliest = logits.argmax(dim=-1) == wanted[part]
                results.append((torch.tensor(batch)[places[part] // T], losses, likeliest))
    for indices, *values in results:
        for score, value in zip(scores, values, strict=True):
            score.index_add_(0, indices, value.cpu().double())
    nats, likeliest = sum_over_ranks(scores, job).numpy()
    return nats, likeliest


def standard_error(values: np.ndarray) -> float | None:
    """Of the mean of independent values; None for a single one."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


@torch.no_grad()
def evaluate(run: Run, config: TrainConfig) -> dict[str, float | None]:
    """
    The metrics of the validation split and of the evaluation sets that are there, the same on all ranks.

    "val_loss" in nats per token, with its perplexity, the bits per byte of text, and the standard error by taking the
    sequences as independent. "hellaswag_acc" is how often the right ending has the smallest summed loss,
    "hellaswag_acc_norm" the smallest per token. "lambada_acc" is how often all tokens of the last word are the
    likeliest, "lambada_perplexity" the exponential of the mean loss of a word.
    """
    run.model.eval()
    nats, sizes = score_validation(run, config)
    tokens = len(nats) * config.sequence_length
    metrics = {
        "val_loss": nats.sum() / tokens,
        "val_loss_se": standard_error(nats / config.sequence_length),
        "val_perplexity": math.exp(nats.sum() / tokens),
        "val_bits_per_byte": nats.sum() / math.log(2) / max(1, sizes.sum()),
    }
    for name, tasks in run.tasks.items():
        nats, likeliest = score_tasks(run, tasks)
        if name == "lambada":
            metrics["lambada_perplexity"] = math.exp(nats.mean())
            right = {"lambada_acc": likeliest == tasks.scored}
        else:
            shape = (len(tasks.labels), -1)
            right = {
                "hellaswag_acc": nats.reshape(shape).argmin(axis=1) == tasks.labels,
                "hellaswag_acc_norm": (nats / tasks.scored).reshape(shape).argmin(axis=1) == tasks.labels,
            }
        for metric, hits in right.items():
            metrics |= {metric: hits.mean(), f"{metric}_se": standard_error(hits)}
    run.model.train()
    return {name: None if value is None else float(value) for name, value in metrics.items()}


def published_figures(model: GPT, source: str) -> dict[str, float]:
    """What is published of OpenAI's model of this shape, by metric; nothing for another shape."""
    shape = replace(model.config, dropout=0.0)
    size = next((size for size in PUBLISHED_HELLASWAG if MODEL_SIZES[size] == shape), None)
    figures = {"hellaswag_acc_norm": PUBLISHED_HELLASWAG.get(size), "val_loss": PUBLISHED_LOSS.get((size, source))}
    return {metric: figure for metric, figure in figures.items() if figure is not None}


# The loop


def compute_gradients(run: Run, batch: torch.Tensor, grad_clip: float) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The clipped gradients of this rank's part of a batch, (accumulation steps, B, T + 1) on the device. Returns this
    rank's mean loss and the norm of the whole gradient before clipping, as scalars on the device: nothing here waits
    for it.
    """
    total = torch.zeros((), device=batch.device)
    for i, sequences in enumerate(batch):
        # Gradients are exchanged in the last micro-step only. The forward is inside too: it is there that
        # DistributedDataParallel reads the flag.
        accumulating = run.parallel is not run.compiled and i + 1 < len(batch)
        with run.parallel.no_sync() if accumulating else nullcontext():
            with run.autocast:
                loss = run.parallel(sequences[:, :-1], sequences[:, 1:]) / len(batch)
            run.scaler.scale(loss).backward()
        total += loss.detach()
    run.scaler.unscale_(run.optimizer)
    return total, torch.nn.utils.clip_grad_norm_(run.model.parameters(), grad_clip or math.inf)


def checkpoint_contents(run: Run, config: TrainConfig, step: int) -> tuple[GPT, dict] | None:
    """A copy on the host of what a checkpoint holds, so that training need not wait for the writing; on rank 0 only,
    though all ranks must ask."""
    if hasattr(run.optimizer, "consolidate_state_dict"):  # divided among the ranks
        run.optimizer.consolidate_state_dict(to=0)
    if run.job.rank > 0:
        return None
    with torch.device("meta"):
        model = GPT(run.model.config)
    model.load_state_dict(copy_to_host(dict(run.model.state_dict())), assign=True)
    state = {"step": step, "optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict()}
    return model, copy_to_host(state) | {"config": asdict(config), "data": run.train_split.tokens}


def train(config: TrainConfig) -> int:
    """Run a training, or the rest of one, from the data in config.data to the log and the checkpoints in config.out.
    Returns the exit status: 0, or 128 + the signal that interrupted it. Raises FloatingPointError when it diverges, and
    ValueError or OSError with a sentence for the user."""
    run = set_up(config)
    config = replace(config, micro_batch_size=run.micro_batch_size)
    try:
        return train_or_evaluate(run, config)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # Here the error is gone, and with it what the pass that failed had in memory.
    smaller = [size for size in micro_batch_sizes(config, run.job) if size < config.micro_batch_size]
    fitting = next((size for size in smaller if fits(size, config, run.model, run.job, run.autocast)), None)
    advice = f"--micro-batch-size {fitting} fits" if fitting else "a smaller --model or --sequence-length may fit"
    raise ValueError(f"--micro-batch-size {config.micro_batch_size} does not fit in memory; {advice}")


def train_or_evaluate(run: Run, config: TrainConfig) -> int:
    job, out, main_process = run.job, Path(config.out), run.job.rank == 0
    if main_process:
        say(run.description)
        out.mkdir(parents=True, exist_ok=True)
        if config.eval_only:  # the run whose log it is may be going on
            log = open(out / "metrics.jsonl", "a", encoding="utf-8", buffering=1)
        else:
            log = open_log(out / "metrics.jsonl", run.start or -1)  # from scratch, step 0 is evaluated again
        # What an interrupted run wrote past the start is not to be shown.
        board = import_summary_writer()(out, purge_step=run.start + 1) if config.tensorboard else None
    if config.eval_only:
        metrics = evaluate(run, config)
        if main_process:
            print(json.dumps({"evaluated": run.source} | metrics), file=log)
            corpus = str(read_meta(Path(config.data)).get("source"))
            say(evaluation_table(metrics, run.source, published_figures(run.model, corpus)))
        return 0

    def record(entry: dict, text: str) -> None:
        if main_process:
            print(json.dumps(entry), file=log)
            say(text)
            for name in entry.keys() - {"step"} if board else ():
                if entry[name] is not None:
                    board.add_scalar(name, entry[name], entry["step"])

    if run.parallel is not run.compiled:
        # After its first backward DistributedDataParallel cuts its buckets anew, and with them the order in which
        # gradients are summed over more than two ranks. It must not be that of the first update after a resumption.
        tokens = torch.zeros(config.micro_batch_size, config.sequence_length, dtype=torch.int64, device=job.device)
        with run.autocast:
            run.parallel(tokens, tokens).backward()
        run.optimizer.zero_grad(set_to_none=True)
    if config.eval_every and run.start == 0:
        evaluation = {"step": 0} | evaluate(run, config)
        record(evaluation, describe_evaluation(evaluation))
    peak = peak_flops(torch.cuda.get_device_name(), run.dtype) if job.device.type == "cuda" else None
    flops = flops_per_token(replace(run.model.config, block_size=config.sequence_length))
    began = time.perf_counter()
    with ThreadPoolExecutor(1) as loader, ThreadPoolExecutor(1) as writer, noted_signals() as signals:
        ahead = loader.submit(load_batch, run.train_split, config, run.start + 1, job)
        step = logged = saved = run.start
        writing, interrupted, bad_norms, since = None, 0, 0, time.perf_counter()
        while step < config.steps and not interrupted:
            step += 1
            batch = ahead.result().to(job.device, non_blocking=True)
            ahead = loader.submit(load_batch, run.train_split, config, step + 1, job)
            lr = learning_rate(step, config)
            for group in run.optimizer.param_groups:
                group["lr"] = lr
            # Dropout draws from (seed, step, rank), not from what was drawn before: a resumed run draws the same.
            torch.manual_seed(int(np.random.SeedSequence([config.seed, step, job.rank]).generate_state(1)[0]))
            loss, norm = compute_gradients(run, batch, config.grad_clip)

            logs, evaluates, samples, saves = (
                step == config.steps or (every > 0 and step % every == 0)
                for every in (config.log_every, config.eval_every, config.sample_every, config.checkpoint_every)
            )
            if logs or saves or (signals and job.world_size == 1):  # only then is the device waited for
                loss, interrupted = sum_over_ranks(torch.stack([loss, loss.new_tensor(len(signals))]), job).tolist()
                loss, norm = loss / job.world_size, float(norm)
                bad_norms = 0 if math.isfinite(norm) else bad_norms + 1
                if not math.isfinite(loss) or bad_norms > (FLOAT16_SKIPS if run.scaler.is_enabled() else 0):
                    raise FloatingPointError(
                        f"at step {step} the loss is {loss} and the norm of the gradient {norm}; the update is not "
                        f"applied, and the last good checkpoint in {out} is {f'of step {saved}' if saved else 'none'}"
                    )
            run.scaler.step(run.optimizer)
            run.scaler.update()
            run.optimizer.zero_grad(set_to_none=True)

            if logs:
                seconds = (time.perf_counter() - since) / (step - logged)
                rate = config.total_batch_tokens / seconds
                entry = {"step": step, "train_loss": loss, "lr": lr, "grad_norm": norm, "tokens_per_second": rate}
                if peak:
                    entry["mfu"] = rate * flops / (peak * job.world_size)
                record(entry, describe(entry, config, seconds))
                since, logged = time.perf_counter(), step
            pause = time.perf_counter()
            if evaluates and config.eval_every:
                evaluation = {"step": step} | evaluate(run, config)
                record(evaluation, describe_evaluation(evaluation))
            if samples and config.sample_every and main_process:
                say(sample_text(run.model, run.tokenizer, config.seed, job.device))
            if saves or interrupted:
                contents, saved = checkpoint_contents(run, config, step), step
                if contents:
                    if writing:
                        writing.result()
                    synchronize(out / "metrics.jsonl")  # the log is never behind a checkpoint
                    arguments = (out, step, *contents, run.tokenizer, config.keep_checkpoints)
                    writing = writer.submit(save_checkpoint, *arguments)
                    say(f"step {step} | checkpoint {out / f'step_{step:06d}'}")
            since += time.perf_counter() - pause  # what is not training is not in its rate
        if writing:
            writing.result()
    if main_process and board:
        board.close()
    if interrupted and step < config.steps:
        if main_process:
            say(f"interrupted after step {step}; go on with the same command and --resume")
        return 128 + (signals[0] if signals else signal.SIGTERM)
    if main_process:
        seconds, log = time.perf_counter() - began, read_log(out / "metrics.jsonl")
        say(summarize(log, config, config.steps - run.start, seconds, checkpoints(out)[-1]))
    return 0


def say(text: str) -> None:
    print(text, flush=True)


def fail(message: str, status: int) -> NoReturn:
    """End with one line. What goes wrong before the processes have met does so in all of them; one a machine tells."""
    if dist.is_initialized() or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"train.py: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, allow_abbrev=False, description="Train a GPT-2. With no options: 124M on FineWeb-Edu."
    )
    config = parse_args(parser, argv)
    try:
        check_config(config, int(os.environ.get("WORLD_SIZE", "1")))
    except ValueError as error:
        fail(str(error), 2)
    try:
        status = train(config)
    except KeyboardInterrupt:
        sys.exit(130)
    except FloatingPointError as error:  # all ranks see it
        fail(str(error), 1) if os.environ.get("RANK", "0") == "0" else sys.exit(1)
    except (ValueError, OSError) as error:
        fail(str(error), 1)
    if dist.is_initialized():
        dist.destroy_process_group()
        # Gloo's threads may still hold tensors, and abort the process if they let go of them while Python shuts down.
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
