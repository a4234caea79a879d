"""
Train a GPT-2 on token shards, on a CPU, on one GPU, or on many under torchrun.

    torchrun --standalone --nproc_per_node=8 train.py     # GPT-2 124M on FineWeb-Edu 10B tokens
    python train.py                                       # the same run on one GPU, by gradient accumulation
    python train.py --preset demo                         # a minute or two on a CPU

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
from contextlib import contextmanager, nullcontext
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
    configure_optimizer,
    flops_per_token,
    generate,
    load_model,
    model_tokenizer,
    parameter_count,
    save_model,
)
from prepare_data import get_tokenizer

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
    micro_batch_size: int = option(16, "sequences on one device at a time")
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
POSITIVE = ["sequence_length", "micro_batch_size", "total_batch_tokens", "steps", "eval_tokens", "log_every"]
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
    piece = config.sequence_length * config.micro_batch_size * world_size
    if config.total_batch_tokens % piece:
        below, above = config.total_batch_tokens // piece * piece, -(-config.total_batch_tokens // piece) * piece
        raise ValueError(
            f"--total-batch-tokens {config.total_batch_tokens} cannot be cut into micro-batches of "
            f"{config.micro_batch_size} sequences of {config.sequence_length} tokens on {world_size} devices; "
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


# bfloat16 and float16 with float32 accumulation, dense. More special names come first.
PEAK_TFLOPS = {
    "B200": 2250, "H200 NVL": 835, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "A10": 125,
    "L40S": 362, "L4": 121, "V100": 125, "T4": 65, "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 3090": 71,
}  # fmt: skip


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The card's dense matrix rate in FLOP/s by its maker's data sheet, None where it is not known."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    cards = (card for card in PEAK_TFLOPS if re.search(rf"\b{card}\b(?! (Ti|D|Laptop|SUPER)\b)", name))
    return next((PEAK_TFLOPS[card] * 1e12 for card in cards), None)


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
        header = np.frombuffer(file.read(1024), dtype="<i4")
    if len(header) < 256 or header[0] != 20240520 or header[1] != 1:
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


def open_log(path: Path, step: int) -> TextIO:
    """metrics.jsonl, to append to; all lines past `step` are removed first, as is one that a crash cut short."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step and line.endswith("\n"):
                kept.append(line)
        except ValueError:
            break
    part = path.with_name(path.name + ".tmp")
    part.write_text("".join(kept), encoding="utf-8")
    part.replace(path)
    return open(path, "a", encoding="utf-8", buffering=1)


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


def describe_evaluation(entry: dict) -> str:
    """A line for the terminal about an evaluation."""
    at = f"step {entry['step']} | " if "step" in entry else ""
    return f"{at}val_loss {entry['val_loss']:.4f} | perplexity {math.exp(entry['val_loss']):.2f}"


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
        return {key: meta[key] for key in ("tokenizer", "vocab_size", "train", "val")}
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
        if not config.resume and not config.eval_only and (existing or (Path(config.out) / "metrics.jsonl").exists()):
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
    start: int  # the updates that were made before
    description: str


def set_up(config: TrainConfig) -> Run:
    """Check the data, join the other processes, and make the model and the optimizer or take them from a checkpoint."""
    meta = read_meta(Path(config.data))
    val_split = open_data(config, "val", meta) if config.eval_every or config.eval_only else None
    train_split = open_data(config, "train", meta)
    if config.sample_every:
        get_tokenizer(meta["tokenizer"])  # one that cannot be fetched is noticed now
    job = start_job(config.device)
    if "train" not in meta:  # other programs' shards
        check_tokens(train_split, job)
    dtype = choose_dtype(config.dtype, job.device)
    source, resuming = find_source(config, train_split.tokens, job)

    torch.manual_seed(config.seed)
    model = build_model(config, source, meta["tokenizer"], meta["vocab_size"]).to(job.device).train()
    optimizer = configure_optimizer(model, config.max_lr, config.weight_decay, BETAS)
    if config.zero and job.world_size > 1:
        optimizer = divide_optimizer(optimizer)
    scaler = torch.amp.GradScaler(job.device.type, enabled=dtype == torch.float16)
    start = 0
    if resuming:
        state = load_trainer(Path(source))
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        start = state["step"]
    compiles = job.device.type == "cuda" if config.compile is None else config.compile
    compiled = parallel = torch.compile(model) if compiles else model
    autocast = torch.autocast(job.device.type, dtype=dtype, enabled=dtype != torch.float32)
    if dist.is_initialized() and not config.eval_only:
        devices = [job.device] if job.device.type == "cuda" else None
        parallel = DistributedDataParallel(compiled, device_ids=devices, gradient_as_bucket_view=True)
        # After its first backward DistributedDataParallel cuts its buckets anew, and with them the order in which
        # gradients are summed over more than two ranks. It must not be that of the first update after a resumption.
        tokens = torch.zeros(config.micro_batch_size, config.sequence_length, dtype=torch.int64, device=job.device)
        with autocast:
            parallel(tokens, tokens).backward()
        optimizer.zero_grad(set_to_none=True)
    description = (
        f"{parameter_count(model):,} parameters | {sum(train_split.tokens):,} tokens | {job.world_size} x "
        f"{job.device.type}, {str(dtype).removeprefix('torch.')}{', compiled' if compiles else ''} | "
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
        start=start,
        description=description,
    )


def divide_optimizer(optimizer: torch.optim.AdamW) -> torch.optim.Optimizer:
    """The same optimizer with its state divided among the ranks, before it has any."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # slow to import

    groups = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in optimizer.param_groups]
    settings = {name: optimizer.defaults[name] for name in ("lr", "betas", "eps", "fused")}
    return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **settings)


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


@torch.no_grad()
def evaluate(run: Run, config: TrainConfig) -> dict[str, float]:
    """
    "val_loss": the mean loss, in nats per token, over the first eval_tokens of the validation split, each scored once,
    on all ranks together.

    Every batch has the same shape, so that a compiled model is compiled once: rows that are missing at the end have -1
    for targets, which the loss leaves out.
    """
    job, split, B, T = run.job, run.val_split, config.micro_batch_size, config.sequence_length
    sequences = min(max(1, config.eval_tokens // T), int(split.first[-1]))
    losses, counts = [torch.zeros((), device=job.device)], [0]
    run.model.eval()
    for start in range(job.rank * B, sequences, job.world_size * B):
        count = min(B, sequences - start)
        tokens, targets = torch.zeros(B, T, dtype=torch.int64), torch.full((B, T), -1)
        batch = torch.from_numpy(read_sequences(split, np.arange(start, start + count)))
        tokens[:count], targets[:count] = batch[:, :-1], batch[:, 1:]
        with run.autocast:
            losses.append(run.compiled(tokens.to(job.device), targets.to(job.device)).float())
        counts.append(count)
    run.model.train()
    total = torch.stack(losses).cpu().double() @ torch.tensor(counts, dtype=torch.float64)
    return {"val_loss": float(sum_over_ranks(total, job)) / sequences}


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
    Returns the exit status: 0, or 128 + the signal that interrupted it. Raises FloatingPointError when it diverges."""
    run = set_up(config)
    job, out, main_process = run.job, Path(config.out), run.job.rank == 0
    if main_process:
        say(run.description)
    if config.eval_only:
        evaluation = evaluate(run, config)
        if main_process:
            say(describe_evaluation(evaluation))
        return 0
    if main_process:
        out.mkdir(parents=True, exist_ok=True)
        log = open_log(out / "metrics.jsonl", run.start or -1)  # from scratch, step 0 is evaluated again

    def record(entry: dict, text: str) -> None:
        if main_process:
            print(json.dumps(entry), file=log)
            say(text)

    if config.eval_every and run.start == 0:
        evaluation = {"step": 0} | evaluate(run, config)
        record(evaluation, describe_evaluation(evaluation))
    peak = peak_flops(job.device, run.dtype)
    flops = flops_per_token(replace(run.model.config, block_size=config.sequence_length))
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
    if interrupted and step < config.steps:
        if main_process:
            say(f"interrupted after step {step}; go on with the same command and --resume")
        return 128 + (signals[0] if signals else signal.SIGTERM)
    if main_process:
        say(f"{config.steps} steps done; sample from the model with: python sample.py --model {checkpoints(out)[-1]}")
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
    sys.exit(status)


if __name__ == "__main__":
    main()
