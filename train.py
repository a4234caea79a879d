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
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
import torch.distributed as dist
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
        dist.init_process_group("nccl" if on_cuda else "gloo", device_id=chosen if on_cuda else None)
    return Job(rank, max(1, world_size), chosen)


def sum_over_ranks(value: torch.Tensor, job: Job) -> torch.Tensor:
    """The sum over all ranks of a scalar, on the CPU."""
    value = value.to(job.device, torch.float32 if job.device.type == "mps" else torch.float64)
    if dist.is_initialized():
        dist.all_reduce(value)
    return value.cpu()


# bfloat16 and float16 with float32 accumulation, dense. More special names come first.
PEAK_TFLOPS = {
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "A10": 125, "L40S": 362, "L4": 121,
    "V100": 125, "T4": 65, "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 3090": 71,
}  # fmt: skip


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The card's dense matrix rate in FLOP/s by its maker's data sheet, None where it is not known."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate * 1e12 for card, rate in PEAK_TFLOPS.items() if card in name), None)


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


# One update, and evaluation


def train_step(
    model: Callable,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batch: torch.Tensor,
    autocast: torch.autocast,
    grad_clip: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    One update from a (accumulation steps, B, T + 1) batch on the device. `model` is the GPT, compiled or wrapped in
    DistributedDataParallel or both. Returns this rank's mean loss and the norm of the whole gradient before clipping,
    as scalars on the device: nothing here waits for it (except float16's scaler).
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    total = torch.zeros((), device=batch.device)
    for i, sequences in enumerate(batch):
        # Gradients are exchanged in the last micro-step only. The forward is inside too: it is there that
        # DistributedDataParallel reads the flag.
        accumulating = isinstance(model, DistributedDataParallel) and i + 1 < len(batch)
        with model.no_sync() if accumulating else nullcontext():
            with autocast:
                loss = model(sequences[:, :-1], sequences[:, 1:]) / len(batch)
            scaler.scale(loss).backward()
        total += loss.detach()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total, norm


@torch.no_grad()
def evaluate(model: Callable, split: Split, config: TrainConfig, autocast: torch.autocast, job: Job) -> float:
    """
    The mean loss, in nats per token, over the first eval_tokens of a split, each scored once, on all ranks together.

    Every batch has the same shape, so that a compiled model is compiled once: rows that are missing at the end have -1
    for targets, which the loss leaves out.
    """
    B, T = config.micro_batch_size, split.sequence_length
    sequences = min(max(1, config.eval_tokens // T), int(split.first[-1]))
    losses, counts = [torch.zeros((), device=job.device)], [0]
    for start in range(job.rank * B, sequences, job.world_size * B):
        count = min(B, sequences - start)
        tokens, targets = torch.zeros(B, T, dtype=torch.int64), torch.full((B, T), -1)
        batch = torch.from_numpy(read_sequences(split, np.arange(start, start + count)))
        tokens[:count], targets[:count] = batch[:, :-1], batch[:, 1:]
        with autocast:
            losses.append(model(tokens.to(job.device), targets.to(job.device)).float())
        counts.append(count)
    total = (torch.stack(losses).cpu().double() * torch.tensor(counts)).sum()
    return float(sum_over_ranks(total, job)) / sequences


# Checkpoints and the log


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints in a directory, oldest first."""
    found = [path for path in out.glob("step_*") if re.fullmatch(r"step_\d{6,}", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def save_checkpoint(out: Path, step: int, model: GPT, tokenizer: str, trainer: dict, keep: int) -> Path:
    """Write `step_NNNNNN`, under another name until it is whole and on disk, then remove all but the newest `keep`."""
    final = out / f"step_{step:06d}"
    part = out / f"{final.name}.tmp"
    shutil.rmtree(part, ignore_errors=True)
    save_model(model, part, tokenizer)
    torch.save(trainer, part / "trainer.pt")
    for path in (*part.iterdir(), part):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    part.rename(final)
    for old in checkpoints(out)[:-keep] if keep else []:
        shutil.rmtree(old)
    return final


def load_trainer(checkpoint: Path, config: TrainConfig, data: list[int]) -> dict:
    """What save_checkpoint was given as `trainer`. Raises ValueError when it is damaged, or from a run with other
    settings or data."""
    try:
        trainer = torch.load(checkpoint / "trainer.pt", map_location="cpu", weights_only=True)
        before, data_before = trainer["config"], trainer["data"]
    except FileNotFoundError as error:
        raise ValueError(f"{checkpoint} cannot be resumed: it has no trainer.pt") from error
    except Exception as error:  # torch.load raises many kinds for a file that is not one of its own
        raise ValueError(f"{checkpoint}/trainer.pt is damaged ({type(error).__name__} on reading it)") from error
    now = asdict(config)
    differences = [
        f"--{name.replace('_', '-')} was {before.get(name)} and is now {now[name]}"
        for name in FIXED_OPTIONS
        if before.get(name) != now[name]
    ]
    if data_before != data:
        differences.append(f"the shards in {config.data} are not those of before")
    if differences:
        raise ValueError(f"{checkpoint} is from another run: {'; '.join(differences)}")
    return trainer


def open_log(path: Path, step: int) -> Callable[[dict], None]:
    """A function that appends a line of JSON to the log, from which all lines past `step` are removed first."""
    kept = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                if json.loads(line)["step"] <= step and line.endswith("\n"):
                    kept.append(line)
            except ValueError:
                break  # the line that was being written when the run was killed
    part = path.with_name(path.name + ".tmp")
    part.write_text("".join(kept), encoding="utf-8")
    part.replace(path)
    log = open(path, "a", encoding="utf-8", buffering=1)
    return lambda entry: print(json.dumps(entry), file=log)


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


def sample_text(model: GPT, tokenizer_name: str, seed: int, device: torch.device) -> str:
    """100 tokens of text that the model begins by itself."""
    tokenizer = get_tokenizer(tokenizer_name)
    generator = torch.Generator(device).manual_seed(seed)
    prompt = torch.tensor([[tokenizer.eot_token]], device=device)
    tokens = generate(model, prompt, 100, 0.8, top_k=50, generator=generator, stop_token=tokenizer.eot_token)
    return tokenizer.decode([int(token) for token in tokens]).removesuffix("<|endoftext|>")


# The run


def read_meta(directory: Path) -> tuple[str, int]:
    """The tokenizer of a data directory and its vocabulary size. Shards without a meta.json are other programs', which
    use GPT-2's. Raises FileNotFoundError when there is no such directory, ValueError when it is not ready."""
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no data directory {directory}; make it with prepare_data.py, or give --data")
    if (directory / "progress.json").exists() and not (directory / "meta.json").exists():
        raise ValueError(f"{directory} is not prepared to the end; start prepare_data.py again")
    if not (directory / "meta.json").exists():
        return "gpt2", MODEL_SIZES["gpt2"].vocab_size
    try:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        return meta["tokenizer"], meta["vocab_size"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{directory}/meta.json is damaged: {error!r}") from error


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


def find_source(config: TrainConfig, job: Job) -> tuple[str, bool]:
    """Where the weights come from ("" for a new model), and whether that is a checkpoint to go on from. Rank 0 looks,
    so that all ranks see the same."""
    out, found = Path(config.out), ["", False]
    if job.rank == 0:
        existing = checkpoints(out)
        if not config.resume and not config.eval_only and (existing or (out / "metrics.jsonl").exists()):
            raise FileExistsError(f"{out} already holds a run; give --resume to go on with it, or another --out")
        if config.resume and existing:
            found = [str(existing[-1]), True]
        elif config.eval_only and not config.init_from:
            if not existing:
                raise FileNotFoundError(f"there is nothing to evaluate: {out} has no checkpoint; give --init-from")
            found = [str(existing[-1]), False]
        else:
            found = [config.init_from, False]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    return found[0], found[1]


def train(config: TrainConfig) -> None:
    """Run a training, or the rest of one, from the data in config.data to the log and the checkpoints in config.out."""
    out, data = Path(config.out), Path(config.data)
    tokenizer, vocab_size = read_meta(data)
    val = open_split(data, "val", config.sequence_length, vocab_size) if config.eval_every or config.eval_only else None
    split = open_split(data, "train", config.sequence_length, vocab_size)
    if config.sample_every:
        get_tokenizer(tokenizer)  # one that cannot be fetched is noticed now
    job = start_job(config.device)
    dtype = choose_dtype(config.dtype, job.device)
    source, resuming = find_source(config, job)
    state = load_trainer(Path(source), config, split.tokens) if resuming else None

    torch.manual_seed(config.seed)
    model = build_model(config, source, tokenizer, vocab_size).to(job.device).train()
    optimizer = configure_optimizer(model, config.max_lr, config.weight_decay, BETAS)
    scaler = torch.amp.GradScaler(job.device.type, enabled=dtype == torch.float16)
    autocast = torch.autocast(job.device.type, dtype=dtype, enabled=dtype != torch.float32)
    if state:
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    # `compiled` shares the parameters of `model`, whose names stay plain and which still runs as it is for sampling.
    compile_it = job.device.type == "cuda" if config.compile is None else config.compile
    compiled = torch.compile(model) if compile_it else model
    parallel = compiled
    if dist.is_initialized():
        devices = [job.device] if job.device.type == "cuda" else None
        parallel = DistributedDataParallel(compiled, device_ids=devices, gradient_as_bucket_view=True)

    start = state["step"] if state else 0
    main_process = job.rank == 0
    if main_process:
        if not config.eval_only:
            out.mkdir(parents=True, exist_ok=True)
            write_log = open_log(out / "metrics.jsonl", start)
        how = f"{job.world_size} x {job.device.type}, {str(dtype).removeprefix('torch.')}{', compiled' * compile_it}"
        origin = f"going on from {source}" if state else f"starting from {source or 'scratch'}"
        say(f"{parameter_count(model):,} parameters | {sum(split.tokens):,} tokens | {how} | {origin}")
    peak = peak_flops(job.device, dtype)
    flops = flops_per_token(replace(model.config, block_size=config.sequence_length))

    def evaluation(step: int) -> None:
        model.eval()
        loss = evaluate(compiled, val, config, autocast, job)
        model.train()
        if main_process:
            if not config.eval_only:
                write_log({"step": step, "val_loss": loss})
            say(f"step {step} | val_loss {loss:.4f} | perplexity {math.exp(loss):.2f}")

    if config.eval_only or (config.eval_every and start == 0):
        evaluation(start)
    if config.eval_only:
        return
    with ThreadPoolExecutor(1) as loader:
        ahead = loader.submit(load_batch, split, config, start + 1, job)
        since, logged = time.perf_counter(), start
        for step in range(start + 1, config.steps + 1):
            batch = ahead.result().to(job.device, non_blocking=True)
            ahead = loader.submit(load_batch, split, config, step + 1, job)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            # Dropout draws from (seed, step, rank), not from what was drawn before: a resumed run draws the same.
            torch.manual_seed(int(np.random.SeedSequence([config.seed, step, job.rank]).generate_state(1)[0]))
            loss, norm = train_step(parallel, optimizer, scaler, batch, autocast, config.grad_clip)

            last = step == config.steps
            if step % config.log_every == 0 or last:
                mean_loss = float(sum_over_ranks(loss, job)) / job.world_size  # waits for the device
                seconds = (time.perf_counter() - since) / (step - logged)
                rate = config.total_batch_tokens / seconds
                entry = {
                    "step": step,
                    "train_loss": mean_loss,
                    "lr": learning_rate(step, config),
                    "grad_norm": float(norm),
                }
                entry["tokens_per_second"] = rate
                if peak:
                    entry["mfu"] = rate * flops / (peak * job.world_size)
                if main_process:
                    write_log(entry)
                    say(describe(entry, config, seconds))
                since, logged = time.perf_counter(), step
            pause = time.perf_counter()
            if config.eval_every and (step % config.eval_every == 0 or last):
                evaluation(step)
            if main_process and config.sample_every and (step % config.sample_every == 0 or last):
                say(sample_text(model, tokenizer, config.seed, job.device))
            if main_process and (last or (config.checkpoint_every and step % config.checkpoint_every == 0)):
                trainer = {
                    "step": step,
                    "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(),
                    "config": asdict(config),
                    "data": split.tokens,
                }
                path = save_checkpoint(out, step, model, tokenizer, trainer, config.keep_checkpoints)
                say(f"step {step} | checkpoint {path}")
            since += time.perf_counter() - pause  # what is not training is not in its rate
    if main_process:
        say(f"{config.steps} steps done; sample from the model with: python sample.py --model {checkpoints(out)[-1]}")


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
        train(config)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        fail(str(error), 1)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
