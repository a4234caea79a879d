"""
Train a GPT-2 on token shards: on a CPU, on one GPU, or on many under torchrun.

    torchrun --standalone --nproc_per_node=8 train.py     # GPT-2 124M on FineWeb-Edu 10B tokens
    python train.py                                       # the same run on one GPU, with more gradient accumulation
    python train.py --preset demo                         # two minutes on a CPU
    python train.py --eval-only --init-from gpt2          # evaluate OpenAI's model

Reads the shards that prepare_data.py or llm.c wrote. Writes to --out: `metrics.jsonl`, and checkpoints `step_NNNNNN/`.
The batch of an update depends on the seed and the step alone: resumed on a different number of GPUs, a run is still
(without dropout) the same run.
"""

import argparse
import itertools
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

try:
    import numpy as np
    import tiktoken
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from safetensors import SafetensorError
    from torch import Tensor

    import model as gpt
    import prepare_data as prep
    from model import GPT, MODEL_SIZES
    from prepare_data import Split, in_background, read_sequences, say, status
except ImportError as error:
    sys.exit(f"train.py: error: {error}; pip install -r requirements.txt")

# The configuration


def option(
    default: Any, help: str, least: float = 0, most: float = 2**31 - 1, choices: Any = None, fixed: bool = False
) -> Any:
    """A field of TrainConfig, with its range or choices; a `fixed` one cannot change when a run is resumed."""
    return field(default=default, metadata={"help": help, "range": (least, most), "choices": choices, "fixed": fixed})


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run; the defaults are GPT-2 124M on FineWeb-Edu 10B (19,073 updates of 2^19 tokens)."""

    data: str = option("data/fineweb-edu", "directory of token shards")
    model: str = option("gpt2", "size of a new model", choices=tuple(MODEL_SIZES), fixed=True)
    n_layer: int = option(0, "layers of a new model; 0: as in --model", fixed=True)
    n_head: int = option(0, "attention heads of a new model; 0: as in --model", fixed=True)
    n_embd: int = option(0, "width of a new model; 0: as in --model", fixed=True)
    out: str = option("", "directory for metrics and checkpoints (default: out/NAME for --data data/NAME)")
    resume: bool = option(False, "resume from the newest checkpoint in --out, if any, with its settings")
    init_from: str = option("", "start from these weights: a checkpoint, a run, or gpt2, gpt2-medium, ...")
    eval_only: bool = option(False, "only evaluate: --init-from, or the newest checkpoint in --out or under out/")
    seed: int = option(1337, "random seed for initialization, data order and dropout", fixed=True)
    sequence_length: int = option(1024, "tokens in a sequence; also the context of a new model", 1, 2**20, fixed=True)
    micro_batch_size: int = option(0, "sequences per device per pass; 0: as many as fit, or 4,096 tokens on a CPU")
    total_batch_tokens: int = option(2**19, "tokens in an update, over all devices and passes", 1, fixed=True)
    steps: int = option(19073, "number of updates", 1, fixed=True)
    warmup_steps: int = option(715, "warmup updates", fixed=True)
    max_lr: float = option(6e-4, "learning rate after the warmup", most=1e30, fixed=True)
    min_lr: float = option(6e-5, "learning rate at the end", most=1e30, fixed=True)
    beta2: float = option(0.95, "decay rate of AdamW's squared-gradient average", most=0.999999, fixed=True)
    weight_decay: float = option(0.1, "weight decay, on matrices", most=1e30, fixed=True)
    grad_clip: float = option(1.0, "clip the gradient to this norm; 0: no clipping", most=1e30, fixed=True)
    dropout: float = option(0.0, "dropout of embeddings, attention and residual branches", most=0.999, fixed=True)
    dtype: str = option("auto", "precision of matrix products", choices=gpt.DTYPES)
    compile: bool | None = option(None, "torch.compile the model (default: on CUDA)")
    device: str = option("auto", "device to train on", choices=gpt.DEVICES)
    zero: bool = option(False, "shard the optimizer state across ranks (ZeRO stage 1)")
    eval_every: int = option(250, "evaluate every N updates; 0: never")
    eval_tokens: int = option(10 * 2**20, "tokens of the validation split to evaluate on", 1)
    eval_tasks: int = option(100_000, "number of HellaSwag and of LAMBADA tasks to evaluate; 0: none")
    tensorboard: bool = option(False, "also write the log for TensorBoard, to --out (needs the package tensorboard)")
    sample_every: int = option(1000, "print a sample of text every N updates; 0: never")
    checkpoint_every: int = option(4000, "write a checkpoint every N updates; 0: only at the end")
    keep_checkpoints: int = option(2, "how many checkpoints to keep; 0: all")
    log_every: int = option(1, "log every N updates", 1)

    def __post_init__(self) -> None:
        for item in fields(self):  # the values may come from a checkpoint
            value, (least, most) = getattr(self, item.name), item.metadata["range"]
            known, number = value in (item.metadata["choices"] or [value]), item.type in (int, float)
            if not (known and isinstance(value, item.type) and (not number or least <= value <= most)):
                raise ValueError(f"{item.name} is {value!r}, which is out of range or of the wrong type")


BOOK = TrainConfig(  # for a single book: a few minutes on a laptop
    data="data/mine", model="gpt2-tiny", sequence_length=64, total_batch_tokens=12 * 64,
    steps=2200, warmup_steps=150, max_lr=1.5e-3, min_lr=1e-5, beta2=0.99,
    eval_every=1000, sample_every=500, checkpoint_every=1000, log_every=20,
)  # fmt: skip
PRESETS = {"gpt2": TrainConfig(), "book": BOOK, "demo": replace(BOOK, data="data/demo", steps=1400)}


def parse_args(parser: argparse.ArgumentParser, argv: list[str] | None) -> tuple[TrainConfig, dict[str, Any]]:
    """Parse the command line, an option for each field. Returns all settings, and the ones given explicitly."""
    parser.add_argument("--preset", default="gpt2", choices=PRESETS, help="set of defaults; other options override it")
    for item in fields(TrainConfig):
        text, how = item.metadata["help"], {"action": argparse.BooleanOptionalAction}
        if item.type in (int, float, str):
            parse = str if item.type is str else prep.number(item.type, *item.metadata["range"])
            how = {"type": parse, "choices": item.metadata["choices"]}
            text += f" (default: {item.default})" if item.default != "" else ""
        parser.add_argument("--" + item.name.replace("_", "-"), help=text, **how)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    config, runs = replace(PRESETS[given.pop("preset")], **given), Path("out")
    newest = config.eval_only and config.data == TrainConfig.data  # the run that sample.py would take
    out = gpt.newest_run(runs) if newest else runs / Path(config.data).resolve().name
    return replace(config, out=config.out or str(out)), given


def check_config(config: TrainConfig) -> None:
    """Raise ValueError for settings that contradict each other, or a batch that cannot be divided as asked."""
    if config.min_lr > config.max_lr:
        raise ValueError(f"--min-lr ({config.min_lr}) must not exceed --max-lr ({config.max_lr})")
    world_size = max(1, int(os.environ.get("WORLD_SIZE", "1")))
    T, B, total = config.sequence_length, max(1, config.micro_batch_size), config.total_batch_tokens
    if total % (T * B * world_size) and not config.eval_only:
        raise ValueError(f"--total-batch-tokens {total} must be a multiple of {T * B * world_size} (tokens per pass)")


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of update `step`, counted from 1: from 0 (at 0) linearly to max_lr at warmup_steps, then half a
    period of a cosine to min_lr at the last."""
    if step < config.warmup_steps:
        return config.max_lr * step / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.min_lr + (config.max_lr - config.min_lr) * (1 + math.cos(math.pi * min(1.0, done))) / 2


# Processes


class Process(NamedTuple):
    """This process: its rank, how many there are, and its device."""

    rank: int
    world_size: int
    device: torch.device


def start_process(device: str) -> Process:
    """Choose the device and, under torchrun, join the other processes. Raises ValueError for a missing device."""
    chosen = gpt.choose_device(device)
    rank, local_rank, world_size = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    if chosen.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"there is no GPU for local rank {local_rank}; start fewer processes (--nproc_per_node)")
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    if world_size > 0:  # set by torchrun, even for a single process
        limit = timedelta(minutes=30)  # the others wait while rank 0 writes a checkpoint, 19 GB for gpt2-xl
        store, _, _ = next(dist.rendezvous("env://", timeout=limit))
        if world_size == int(os.environ.get("LOCAL_WORLD_SIZE", "0")):
            # Restarted workers would find the dead ones' addresses. Across machines, restarts are not counted alike.
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend, device_id = ("nccl", chosen) if chosen.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, None, limit, world_size, rank, store, device_id=device_id)
    return Process(rank, max(1, world_size), chosen)


def all_reduce(value: Tensor, how: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
    """Sum (or minimum) over all ranks, as float64 on the CPU. Waits for the device."""
    value = value.detach().double() if value.device.type == "cuda" else value.detach().cpu().double()
    if dist.is_initialized():
        dist.all_reduce(value, how)
    return value.cpu()


def catch_signals(stops: list[int]) -> None:
    """From now on, SIGTERM and SIGINT are added to `stops` instead of ending the process."""

    def catch(signum: int, frame: object) -> None:
        if not stops and prep.is_main_process():  # os.write, since a print may be in progress
            os.write(2, b"\nstopping, and writing a checkpoint\n")
        stops.append(signum)
        if not dist.is_initialized():  # torchrun repeats signals, and ends its processes itself after a while
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, catch)
    signal.signal(signal.SIGINT, catch)


# The data and its order


@lru_cache(maxsize=2)  # a batch can span two epochs
def epoch_order(sequences: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: a permutation of range(sequences). RandomState, since NumPy never changes its streams."""
    return np.random.RandomState([seed, epoch]).permutation(sequences)


def batch_indices(split: Split, config: TrainConfig, step: int) -> np.ndarray:
    """The sequences of update `step`, in order: (total_batch_tokens / T,) int64, however many devices there are."""
    size, total = config.total_batch_tokens // config.sequence_length, split.sequences
    epochs, places = np.divmod(np.arange((step - 1) * size, step * size), total)
    return np.concatenate([epoch_order(total, config.seed, int(e))[places[epochs == e]] for e in np.unique(epochs)])


def load_batch(split: Split, config: TrainConfig, size: int, process: Process, step: int) -> Tensor:
    """This rank's part of a batch: (accumulation steps, micro-batch size, T + 1) int64 on the CPU, pinned for a GPU."""
    indices = batch_indices(split, config, step).reshape(-1, process.world_size, size)[:, process.rank]
    batch = torch.from_numpy(read_sequences(split, indices.ravel()).reshape(*indices.shape, -1))
    if process.device.type == "cuda":
        torch.cuda.set_device(process.device)  # of this thread: pinning would otherwise open a context on the first GPU
        batch = batch.pin_memory()
    return batch


# Checkpoints

TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")
CHECKPOINT_FILES = ("config.json", "model.safetensors", "trainer.pt", *TOKENIZER_FILES)


@lru_cache
def tokenizer_files(tokenizer: tiktoken.Encoding) -> dict[str, str]:
    """The tokenizer's files by name, as GPT-2 has them. Bytes are spelled as characters: 188 as in Latin-1, the others
    from chr(256) on. The merge of a token joins the last two parts that byte-pair encoding leaves of it."""
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


def save_checkpoint(out: Path, model: GPT, trainer: dict, tokenizer: tiktoken.Encoding, keep: int) -> None:
    """Write `step_NNNNNN`, under another name until it is whole and on disk, then remove all but the newest `keep`.
    `trainer` is as from `load_trainer`. Raises OSError when it cannot be written."""
    final = out / f"step_{trainer['step']:06d}"
    part = final.with_suffix(".tmp")
    for stale in out.glob("step_*.tmp"):
        prep.discard(stale)
    try:
        part.mkdir(parents=True)
        gpt.save_model(model, part, tokenizer.name)
        for name, text in tokenizer_files(tokenizer).items():
            (part / name).write_text(text, encoding="utf-8")
        torch.save(trainer, part / "trainer.pt")
        prep.add_checksums(part, CHECKPOINT_FILES)
        for path in (*out.glob("metrics.jsonl"), *part.iterdir(), part):  # the log is never behind a checkpoint
            prep.synchronize(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        prep.discard(part)
        raise OSError(f"{final} could not be written: {error}; fix that and continue with --resume") from error
    prep.discard(final)  # a damaged one that was skipped
    part.rename(final)
    prep.synchronize(out)
    found = gpt.checkpoints(out)
    for old in found[: found.index(final) + 1][:-keep] if keep else []:  # a later one is damaged and was skipped
        prep.discard(old.rename(old.with_suffix(".tmp")))  # a crash leaves no half of a checkpoint under its name


def load_trainer(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's config, step, seconds (of training until then), shards (the sha256 of each, by its name), and the
    states of optimizer and scaler. Raises ValueError when they are damaged, or another version's."""
    path = checkpoint / "trainer.pt"
    prep.check_checksums(checkpoint, [path.name])
    with prep.reading(path):
        trainer = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if trainer["config"].keys() != asdict(TrainConfig()).keys():
            raise ValueError("its settings are from another version of train.py; start a new run with --init-from")
        steps = TrainConfig(**trainer["config"]).steps  # which checks the settings' types and ranges
        step, seconds, shards = int(trainer["step"]), float(trainer["seconds"]), trainer["shards"]
        if not (0 < step == trainer["step"] <= steps and seconds >= 0):
            raise ValueError(f"it claims to be at step {trainer['step']} after {seconds} seconds")
        return trainer | {"step": step, "seconds": seconds, "shards": {str(n): str(sha) for n, sha in shards.items()}}


def load_optimizer(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, trainer: dict, source: Path) -> None:
    """Restore the optimizer, and float16's scaler, from a checkpoint. Raises ValueError when that does not fit."""
    with prep.reading(source / "trainer.pt"):
        optimizer.load_state_dict(trainer["optimizer"])
        local = getattr(optimizer, "optim", optimizer)  # this rank's part of a ZeroRedundancyOptimizer
        if local is not optimizer:
            optimizer.state.clear()  # a second copy of it
        for parameter in itertools.chain(*(group["params"] for group in local.param_groups)):
            values = local.state[parameter]
            values["step"] = values["step"].to(parameter.device)  # ZeroRedundancyOptimizer puts it on the CPU
            if any(values[name].shape != parameter.shape for name in ("exp_avg", "exp_avg_sq")):
                raise ValueError("the optimizer's state does not fit the model")
        if scaler.is_enabled() and trainer["scaler"]:
            scaler.load_state_dict(trainer["scaler"])


def find_source(config: TrainConfig) -> tuple[Path | None, bool]:
    """The directory to load weights from (None: new model) and whether to resume from it; damaged checkpoints are
    skipped. Raises FileExistsError for a run that is not to be resumed, FileNotFoundError or ValueError for weights."""
    out, log, found = Path(config.out), Path(config.out) / "metrics.jsonl", gpt.checkpoints(Path(config.out))
    begun = found or (log.is_file() and b"train_loss" in log.read_bytes())
    if begun and not config.resume and not config.eval_only:
        raise FileExistsError(f"{out} already contains a run; add --resume to continue it, or choose another --out")
    if config.resume or (config.eval_only and not config.init_from):
        if checkpoint := gpt.newest_checkpoint(out, partial(prep.is_intact, names=CHECKPOINT_FILES)):
            return checkpoint, not config.eval_only
        if found or config.eval_only:
            raise FileNotFoundError(f"{out} has no intact checkpoint; restore one, or use another --out or --init-from")
    if not config.init_from:
        return None, False
    name = Path(config.init_from)
    return gpt.newest_checkpoint(name, prep.is_intact) or prep.model_directory(name), False


def saved_config(config: TrainConfig, given: dict[str, Any], saved: dict[str, Any], source: Path) -> TrainConfig:
    """A checkpoint's settings, overridden by those `given`. Raises ValueError for one fixed in a resumed run."""
    fixed = [item.name for item in fields(config) if item.metadata["fixed"] and item.name in given]
    changed = [f"--{n.replace('_', '-')} was {saved[n]} and is now {given[n]}" for n in fixed if given[n] != saved[n]]
    if changed and config.resume:
        advice = f"start a new run with --init-from {source} and another --out"
        raise ValueError(f"cannot resume {source} with different settings: {'; '.join(changed)}; {advice}")
    return TrainConfig(**saved | given | {"out": config.out, "resume": config.resume})


# The log


def open_log(path: Path, config: TrainConfig, step: int) -> Callable[[dict], None]:
    """Return a function that appends an entry to metrics.jsonl, recreated if it has been deleted, and prints it. First
    drop lines after `step`, the evaluation at `step` (it will be repeated), and lines cut off by a crash."""
    if config.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(path.parent, purge_step=step + 1)
    kept = []
    for line in path.read_bytes().splitlines(keepends=True) if step > 0 and path.is_file() else []:
        try:
            at = prep.read_object(line, path).get("step", 0)  # the settings have none
            kept += [line] if at < step or (at == step and b"train_loss" in line) else []
        except (ValueError, TypeError):
            say(f"warning: dropped a damaged line of {path}: {line[:60]!r}", sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    prep.write_atomically(path, kept or [json.dumps({"config": asdict(config)}).encode() + b"\n"])

    def record(entry: dict) -> None:
        if torch.cuda.is_initialized():
            entry |= {"memory_gb": torch.cuda.max_memory_allocated() / 1e9}
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")
        say(describe(entry, config))
        if config.tensorboard:
            for name in entry.keys() - {"step"}:
                board.add_scalar(name, math.nan if entry[name] is None else entry[name], entry["step"])
            board.flush()

    return record


def describe(entry: dict, config: TrainConfig) -> str:
    """An entry of the log for the terminal, within 80 columns: an update on one line; an evaluation as a table."""
    if "train_loss" in entry:
        rate, norm = entry["tokens_per_second"], math.inf if entry["grad_norm"] is None else entry["grad_norm"]
        speed = f"{rate:,.0f} tok/s" + (f"  mfu {entry['mfu']:.0%}" if "mfu" in entry else "")
        update = f"step {entry['step']}  loss {entry['train_loss']:.4f}  lr {entry['lr']:.1e}  norm {norm:.2f}"
        left = int((config.steps - entry["step"]) * config.total_batch_tokens / rate)
        return f"{update}  {speed}  {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
    lines = [f"step {entry['step']}  evaluation" if "step" in entry else f"evaluation of {entry['evaluated']}"]
    for name, value in entry.items():
        if isinstance(value, float) and not name.endswith("_se") and name != "seconds":
            error = f" ± {entry[f'{name}_se']:.4f}" if entry.get(f"{name}_se") else ""
            lines.append(f"  {name:20} {value:10.4f}{error}")
    return "\n".join(lines)


# Evaluation


class EvalSet(NamedTuple):
    """Rows of tokens, the last few of each scored: sequences, or a task's context with each of its endings in turn."""

    rows: Sequence[np.ndarray]  # of uint16
    scored: np.ndarray  # (rows,) int64: how many tokens at the end of each
    labels: np.ndarray | None = None  # (tasks,) int64: the right ending
    text_bytes: int = 0  # of the scored tokens of sequences


def read_tasks(name: str, path: Path, tokenizer: tiktoken.Encoding, most: int) -> EvalSet:
    """The first `most` tasks of a set in its published form. An ending is tokenized with a leading space; LAMBADA's is
    the passage's last word. Raises ValueError, naming the line, for a malformed task."""
    if (path.parent / "SHA256SUMS").exists():
        prep.check_checksums(path.parent, [path.name])
    rows, scored, labels = [], [], []
    for number, line in enumerate(path.read_bytes().splitlines()[:most], start=1):
        with prep.reading(f"{path}, line {number},"):
            task = prep.read_object(line, "it")
            if name == "lambada":
                (context, *endings), label = task["text"].rsplit(" ", 1), 0
            else:
                context, endings, label = task["ctx"], task["endings"], int(task["label"])
            texts = [context, *(" " + ending for ending in endings)]
            begin, *ends = (prep.tokenize([text], tokenizer)[1:] for text in texts)
            count = 1 if name == "lambada" else 4
            if not len(begin) or len(ends) != count or not 0 <= label < count:
                raise ValueError(f"it needs a context, {count} endings and the number of the right one")
        rows += [np.concatenate([begin, end]) for end in ends]
        scored += [len(end) for end in ends]
        labels.append(label)
    if not labels:
        raise ValueError(f"{path} contains no tasks")
    return EvalSet(rows, np.array(scored), np.array(labels))


def open_evaluation(config: TrainConfig, split: Split, tokenizer: tiktoken.Encoding, most: int) -> dict[str, EvalSet]:
    """What an evaluation scores: the first eval_tokens of the validation split, and the sets next to the data."""
    T = config.sequence_length
    count = min(max(1, config.eval_tokens // T), split.sequences)
    rows = read_sequences(split, np.arange(count)).astype(np.uint16)
    text_bytes = int(prep.token_bytes(tokenizer)[rows[:, 1:]].sum(dtype=np.int64))
    sets = {"val": EvalSet(rows, np.full(count, T), text_bytes=text_bytes)}
    for name in prep.EVALUATION_SETS:
        path = Path(config.data).parent / name / prep.FILES[name].name
        if config.eval_tasks and path.exists():
            tasks = read_tasks(name, path, tokenizer, config.eval_tasks)
            if tasks.scored.max() <= most:  # else an ending alone is more than the model's context
                sets[name] = tasks
    return sets


def score_rows(model: GPT, process: Process, autocast: torch.autocast, stopped: Callable, data: EvalSet) -> np.ndarray:
    """`GPT.score` of all rows, (2, rows) float64, in batches of similar length; rows longer than the context lose their
    beginning. The model must not be compiled, since lengths vary. Raises InterruptedError once `stopped()`."""
    longest, most = model.config.block_size + 1, 8192 if process.device.type == "cuda" else 2048
    rows = [torch.from_numpy(row[-longest:].astype(np.int64)) for row in data.rows]
    order, batches = sorted(range(len(rows)), key=lambda i: -len(rows[i])), []
    while order:
        size = max(1, most // (len(rows[order[0]]) - 1))
        batches.append(order[:size])
        order = order[size:]
    scores, scored = torch.zeros(2, len(rows), device=process.device), data.scored.tolist()
    for turn in range(0, len(batches), process.world_size):
        status(f"evaluating: {turn / len(batches):.0%}")
        if stopped():
            raise InterruptedError
        for batch in batches[turn + process.rank : turn + process.rank + 1]:  # this rank's, if one is left
            tokens = torch.nn.utils.rnn.pad_sequence([rows[i][:-1] for i in batch], batch_first=True)
            ends = [F.pad(rows[i][-scored[i] :], (len(rows[i]) - 1 - scored[i], 0), value=-1) for i in batch]
            targets = torch.nn.utils.rnn.pad_sequence(ends, batch_first=True, padding_value=-1)
            with gpt.evaluation_mode(model), autocast:
                scores[:, batch] = model.score(tokens.to(process.device), targets.to(process.device))
    return all_reduce(scores).numpy()


def evaluate(sets: dict[str, EvalSet], score: Callable) -> dict[str, float | None]:
    """The metrics of the sets; `..._se` is a standard error over sequences or tasks. "val_loss" is in nats per token.
    "hellaswag_acc" is how often the right ending has the smallest summed loss, "hellaswag_acc_norm" the smallest per
    token. "lambada_acc" is how often all tokens of the last word are the most likely; its perplexity is per word."""
    metrics = {}

    def mean(name: str, values: np.ndarray) -> None:
        metrics[name] = values.mean()
        metrics[f"{name}_se"] = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan

    for name, data in sets.items():
        nats, top = score(data)
        if name == "val":
            mean("val_loss", nats / data.scored)
            metrics["val_perplexity"] = np.exp(metrics["val_loss"])
            metrics["val_bits_per_byte"] = nats.sum() / math.log(2) / max(1, data.text_bytes)
        elif name == "lambada":
            mean("lambada_acc", top == data.scored)
            metrics["lambada_perplexity"] = np.exp(nats.mean())
        else:
            by_task = (len(data.labels), -1)
            mean("hellaswag_acc", nats.reshape(by_task).argmin(axis=1) == data.labels)
            mean("hellaswag_acc_norm", (nats / data.scored).reshape(by_task).argmin(axis=1) == data.labels)
    return {name: float(value) if np.isfinite(value) else None for name, value in metrics.items()}


def sample_text(model: GPT, tokenizer: tiktoken.Encoding, seed: int, device: torch.device) -> str:
    """Up to 100 tokens of unconditional text, at most ten lines of it."""
    generator = torch.Generator(device).manual_seed(seed)
    prompt = torch.tensor([[tokenizer.eot_token]], device=device)
    how = {"temperature": 0.8, "top_k": 50, "generator": generator, "stop_token": tokenizer.eot_token}
    with gpt.evaluation_mode(model):
        tokens = [int(token) for token in gpt.generate(model, prompt, 100, **how)]
    text = tokenizer.decode(tokens).removesuffix("<|endoftext|>")
    return "\n".join(["sample:", *(f"  {line}" for line in text.strip("\n").split("\n")[:10])])


# The run


def build_model(config: TrainConfig, source: Path | None, meta: dict) -> GPT:
    """The model in the directory `source`, else a new one. Raises ValueError when it does not fit the data."""
    T, vocab_size = config.sequence_length, meta["vocab_size"]
    if source is None:
        shape = {name: value for name in ("n_layer", "n_head", "n_embd") if (value := getattr(config, name))}
        shape |= {"block_size": T, "vocab_size": vocab_size, "dropout": config.dropout}
        return GPT(replace(MODEL_SIZES[config.model], **shape))
    shape, tokenizer = gpt.read_config(source)
    if (tokenizer, shape.vocab_size) != (meta["tokenizer"], vocab_size):
        raise ValueError(f"{source} needs data prepared with --tokenizer {tokenizer}, unlike that in {config.data}")
    if shape.block_size < T:
        raise ValueError(f"--sequence-length {T} exceeds {source}'s context of {shape.block_size}")
    return gpt.load_model(source, config.dropout)


def check_shards(
    data: Path, splits: list[Split], process: Process, stops: list[int], known: dict[str, str]
) -> Callable[[], dict[str, str]]:
    """Hash the shards in the background, each rank of a machine its share; a damaged one stops the run. Returns a
    function that waits for all ranks, then raises that ValueError or gives the sums. Raises ValueError at once for
    shards other than those `known` from the run that is resumed."""
    names = sorted({path.name for split in splits for path in split.paths} | known.keys())
    listed = prep.read_checksums(data)
    for name in known and {*known, *(path.name for path in splits[0].paths)}:
        if name not in known or listed.get(name, known[name]) != known[name]:
            raise ValueError(f"{data / name} is not what the run was trained on; resume with the original data")
    sums = dict.fromkeys(names, "") | listed | known
    local_rank, local_ranks = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    share = prep.begin(prep.check_checksums, data, names[local_rank::local_ranks], sums)
    share.add_done_callback(lambda done: stops.append(signal.SIGTERM) if done.exception() else None)

    def wait() -> dict[str, str]:
        status("waiting for the check of the shards")
        parts = [share.exception() or share.result()] * process.world_size
        if dist.is_initialized():
            dist.all_gather_object(parts, parts[0])
        found = {}
        for part in parts:
            if isinstance(part, Exception):
                raise part
            for name, digest in part.items():
                if found.setdefault(name, digest) != digest:
                    raise ValueError(f"{data / name} is not the same on all machines; copy it from one to the others")
        return found

    return wait


def find_micro_batch_size(config: TrainConfig, model: GPT, process: Process, autocast: torch.autocast) -> int:
    """The largest micro-batch of up to 2^17 tokens that fits on every rank's GPU, even uncompiled, in sequences; on a
    CPU 4,096 tokens, since more are no faster."""
    T, device = config.sequence_length, process.device
    share = config.total_batch_tokens // T // process.world_size
    most = min(share, max(1, (2**17 if device.type == "cuda" else 4096) // T))
    sizes = (size for size in range(most, 0, -1) if share % size == 0)
    size = next(s for s in sizes if s == 1 or device.type != "cuda" or fits(model, s, T, device, autocast))
    return int(all_reduce(torch.full((), size, device=device), dist.ReduceOp.MIN))


def fits(model: GPT, size: int, T: int, device: torch.device, autocast: torch.autocast) -> bool:
    """Whether a GPU has room for a forward and a backward pass of `size` sequences, beside the two moments of the
    optimizer, the gradients accumulated before, and DistributedDataParallel's buckets."""
    status(f"trying micro-batches of {size}")
    torch.cuda.set_per_process_memory_fraction(0.9, device)  # the rest is for evaluation, samples and gaps
    try:
        reserved = torch.empty((3 + dist.is_initialized()) * gpt.parameter_count(model), device=device)
        tokens = torch.zeros(size, T, dtype=torch.int64, device=device)
        with autocast:
            model(tokens, tokens).backward()
        del reserved
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def check_finite(step: int, loss: float, norm: float, scaler: torch.amp.GradScaler, saved: int) -> None:
    """Raise FloatingPointError when an update must not be applied. A gradient that overflows float16 is left to the
    scaler, which skips the update, until its scale is down to 1."""
    if not math.isfinite(loss) or (not math.isfinite(norm) and scaler.get_scale() <= 1):
        good = f"restart from the checkpoint of step {saved} (--init-from) with" if saved else "start over with"
        raise FloatingPointError(f"step {step}: loss {loss}, norm {norm}, update not applied; {good} a lower --max-lr")


def train(config: TrainConfig, given: dict[str, Any] | None = None) -> int:
    """Train, resume or only evaluate, as `config` says. In a resumed run the checkpoint's settings hold, except for
    those in `given` (None: all of `config`). Returns the exit status: 0, or 128 + the signal that interrupted the run.
    Raises FloatingPointError when it diverges, and ValueError or OSError with a sentence for the user."""
    # The starting weights and the data
    source, resuming = find_source(config)
    trainer = load_trainer(source) if resuming or (config.eval_only and (source / "trainer.pt").exists()) else None
    if trainer:
        config = saved_config(config, asdict(config) if given is None else given, trainer["config"], source)
    check_config(config)
    status(f"reading {source or config.data}")
    out, data, T = Path(config.out), Path(config.data), config.sequence_length
    meta = prep.read_meta(data)
    val_split = prep.open_split(data, "val", T) if config.eval_every or config.eval_only else None
    split = val_split if config.eval_only else prep.open_split(data, "train", T)
    if config.total_batch_tokens > (usable := T * split.sequences) and not config.eval_only:
        raise ValueError(f"{data} has only {usable:,} usable tokens; use --preset book, or fewer --total-batch-tokens")
    tokenizer = prep.get_tokenizer(meta["tokenizer"])
    torch.manual_seed(config.seed)
    model = build_model(config, source, meta)

    # The processes, and the device of each
    process = start_process(config.device)
    device, main_process = process.device, process.rank == 0
    step, seconds = (trainer["step"], trainer["seconds"]) if resuming else (0, 0.0)
    for here, where in ((step, out), (split.sequences, data)):
        if all_reduce(torch.full((), here, device=device)) != here * process.world_size:
            raise FileNotFoundError(f"ranks see different files in {where}; put it on a shared disk, or copy it")
    model.to(device).train()
    dtype = gpt.choose_dtype(config.dtype, device, training=True)
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    compiles = config.compile if config.compile is not None else device.type == "cuda" and bool(find_spec("triton"))
    stops = []  # signals that ask the run to stop

    def stopped() -> bool:
        return all_reduce(torch.full((), len(stops), device=device)).item() > 0

    if val_split:
        sets = open_evaluation(config, val_split, tokenizer, model.config.block_size)
        measure = partial(evaluate, sets, partial(score_rows, model, process, autocast, stopped))
    shard_sums = check_shards(data, [split, val_split or split], process, stops, trainer["shards"] if resuming else {})
    if config.eval_only:
        with suppress(InterruptedError):  # by a damaged shard, which shard_sums names
            metrics = measure()
        shard_sums()
        entry = {"evaluated": str(source)} | metrics
        status("")
        if main_process:
            print(describe(entry, config), json.dumps(entry), sep="\n", flush=True)
        return 0

    # The optimizer
    zero = config.zero and process.world_size > 1
    optimizer = gpt.configure_optimizer(model, config.max_lr, config.weight_decay, (0.9, config.beta2), zero)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if resuming:
        load_optimizer(optimizer, scaler, trainer, source)
    size = config.micro_batch_size or find_micro_batch_size(config, model, process, autocast)

    # Compiled, and wrapped for several ranks; `model` stays the plain one, with the same parameters
    runner = torch.compile(model) if compiles else model
    if dist.is_initialized():
        runner = torch.nn.parallel.DistributedDataParallel(runner, gradient_as_bucket_view=True)
    if runner is not model:
        # Warm-up pass: keeps compilation out of the first timing, and makes DDP settle its reduction order, so that a
        # resumed run adds gradients in the same order.
        status("compiling" if compiles else "connecting")
        zeros = torch.zeros(size, T, dtype=torch.int64, device=device)
        with autocast:
            runner(zeros, zeros.clone()).backward()  # two tensors, as in an update; otherwise it would compile again
        optimizer.zero_grad(set_to_none=True)

    # The log, the batches, and the loop's helpers
    record = open_log(out / "metrics.jsonl", config, step) if main_process else lambda entry: None
    n, tokens = config.total_batch_tokens, sum(split.tokens)
    kind = f"{gpt.parameter_count(model):,} parameters, {device.type}, {str(dtype)[6:]}{', compiled' * compiles}"
    say(f"{'resumed' if resuming else 'started'} from {source or 'scratch'}: {kind}")
    say(f"{tokens:,} training tokens; {config.steps:,} updates x {n:,} = {config.steps * n / tokens:,.2f} epochs")
    passes = n // (size * T * process.world_size)
    say(f"each update: {passes} accumulation steps x {process.world_size} ranks x {size} sequences x {T} tokens")
    peaks = gpt.PEAK_TFLOPS.get(torch.cuda.get_device_name()) if device.type == "cuda" else None
    flops = gpt.flops_per_token(replace(model.config, block_size=T)) / process.world_size
    peak = peaks[dtype == torch.float32] * 1e12 / flops if peaks else None  # in tokens per second
    load = partial(load_batch, split, config, size, process)
    batches = in_background(load, range(step + 1, config.steps + 1), 1, 1)

    def due(every: int) -> bool:
        return every > 0 and (step % every == 0 or step == config.steps)

    def save() -> int:
        shards = shard_sums()
        if zero:
            optimizer.consolidate_state_dict(to=0)
        if main_process:
            state = {"config": asdict(config), "step": step, "seconds": seconds, "shards": shards}
            state |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
            save_checkpoint(out, model, state, tokenizer, config.keep_checkpoints)
            say(f"step {step}  checkpoint {out}/step_{step:06d}")
        return step

    # The loop: each turn evaluates the step it has reached, if due, then makes the next update
    catch_signals(stops)
    saved, stop = step, False
    while True:
        try:
            if due(config.eval_every):
                record({"step": step, "seconds": seconds} | measure())
        except InterruptedError:
            stop = True
        if stop or step == config.steps:
            break
        step, began = step + 1, time.perf_counter()
        batch = next(batches).to(device, non_blocking=True)
        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # Dropout draws from (seed, step, rank), not from what was drawn before: a resumed run draws the same.
        torch.manual_seed(int(np.random.SeedSequence([config.seed, step, process.rank]).generate_state(1)[0]))
        loss = torch.zeros((), device=device)
        for i, sequences in enumerate(batch):
            status(f"step {step} of {config.steps}, {i / len(batch):.0%}")
            # Gradients are exchanged in the last micro-step only. no_sync() sets the same flag; the forward reads it.
            if dist.is_initialized():
                runner.require_backward_grad_sync = i + 1 == len(batch)
            with autocast:
                micro_loss = runner(sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous()) / len(batch)
            scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)

        # The one wait for the device, and for the other ranks: an update that is not finite is never applied.
        sums = all_reduce(torch.stack([loss, norm, torch.full((), float(len(stops)), device=device)]))
        loss, norm, stop = (sums / process.world_size).tolist()
        check_finite(step, loss, norm, scaler, saved)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        rate = n / (time.perf_counter() - began)
        seconds += n / rate
        if due(config.log_every):
            entry = {"step": step, "seconds": seconds, "train_loss": loss, "lr": lr, "tokens_per_second": rate}
            entry |= {"grad_norm": norm if math.isfinite(norm) else None} | ({"mfu": rate / peak} if peak else {})
            record(entry)
        if due(config.sample_every) and main_process:
            say(sample_text(model, tokenizer, config.seed, device))
        if due(config.checkpoint_every) or step == config.steps:
            saved = save()
    shard_sums()
    if saved != step:
        save()
    if stop:
        say(f"interrupted after step {step}; to continue, run the same command with --resume")
        return 128 + (stops[0] if stops else signal.SIGTERM)
    say(f"{config.steps} steps done; sample from the result with:\n  python sample.py --model={shlex.quote(str(out))}")
    return 0


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, allow_abbrev=False, description=__doc__.splitlines()[1])
    config, given = parse_args(parser, argv)
    try:
        if not config.resume:
            check_config(config)
    except ValueError as error:
        parser.error(str(error))

    advice = "leave --micro-batch-size out, or choose a smaller --model or --sequence-length"
    writes = not config.eval_only and prep.is_main_process()  # the first process, for all
    with prep.one_line_errors("train.py", advice), prep.locked(Path(config.out)) if writes else nullcontext():
        code = train(config, given)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    main()
