"""
Train a GPT-2 on token shards: on a CPU, on one GPU, or on many under torchrun.

    torchrun --standalone --nproc_per_node=8 train.py     # GPT-2 124M on FineWeb-Edu 10B tokens
    python train.py                                       # the same run on one GPU, with more gradient accumulation
    python train.py --preset demo                         # two minutes on a CPU
    python train.py --eval-only --init-from gpt2          # evaluate OpenAI's model

Reads token shards from prepare_data.py or llm.c; writes `metrics.jsonl` and checkpoints `step_NNNNNN/` to --out. The
batch of an update depends only on the seed and the step, so that any number of GPUs can resume a run.
"""

import json
import math
import os
import shlex
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

try:
    import numpy as np
    import tiktoken
    import torch
    import torch.distributed as dist
    from safetensors import SafetensorError
    from torch import Tensor
    from torch.utils._triton import has_triton

    import model as gpt
    import prepare_data as prep
    from model import GPT, MODEL_SIZES
    from prepare_data import Split, option, say, status
except ImportError as error:
    sys.exit(f"train.py: error: {error}; pip install -r requirements.txt")
except KeyboardInterrupt:
    sys.exit(130)


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run; the defaults are GPT-2 124M on FineWeb-Edu 10B (19,073 updates of 2^19 tokens)."""

    data: str = option("data/fineweb-edu", "directory of token shards")
    model: str = option("gpt2", "size of a new model", choices=tuple(MODEL_SIZES))
    n_layer: int = option(0, "layers of a new model (default: as in --model)")
    n_head: int = option(0, "attention heads of a new model (default: as in --model)")
    n_embd: int = option(0, "width of a new model (default: as in --model)")
    out: str = option("", "directory to write to (default: out/NAME for --data data/NAME)")
    resume: bool = option(False, "resume from the newest checkpoint in --out, if any")
    init_from: str = option("", "start from a checkpoint, a run, or gpt2, gpt2-medium, ...")
    eval_only: bool = option(False, "evaluate --init-from, or the newest checkpoint, and exit")
    seed: int = option(1337, "random seed for initialization, data order and dropout")
    sequence_length: int = option(1024, "tokens in a sequence, and a new model's context", 1, 2**20)
    micro_batch_size: int = option(0, "sequences in a micro-batch (default: as many as fit)")
    total_batch_tokens: int = option(2**19, "tokens in an update, over all devices", 1)
    steps: int = option(19073, "number of updates", 1)
    warmup_steps: int = option(715, "warmup updates")
    max_lr: float = option(6e-4, "learning rate after the warmup")
    min_lr: float = option(6e-5, "learning rate at the end")
    beta2: float = option(0.95, "decay rate of AdamW's squared-gradient average", most=0.999999)
    weight_decay: float = option(0.1, "weight decay, on matrices")
    grad_clip: float = option(1.0, "clip the gradient to this norm; 0: no clipping")
    dropout: float = option(0.0, "dropout of embeddings, attention and residual branches (default: 0)", most=0.999)
    dtype: str = option("auto", "precision of matrix products", choices=gpt.DTYPES)
    compile: bool | None = option(None, "torch.compile the model (default: on CUDA)")
    device: str = option("auto", "device to train on", choices=gpt.DEVICES)
    zero: bool = option(False, "shard the optimizer state across ranks (ZeRO stage 1)")
    eval_every: int = option(250, "evaluate every N updates; 0: never")
    eval_tokens: int = option(10 * 2**20, "tokens of the validation split to evaluate on", 1)
    eval_tasks: int = option(100_000, "at most N tasks of each evaluation set; 0: none")
    tensorboard: bool = option(False, "also log for TensorBoard (pip install tensorboard)")
    sample_every: int = option(1000, "print a sample of text every N updates; 0: never")
    checkpoint_every: int = option(4000, "write a checkpoint every N updates; 0: only at the end")
    keep_checkpoints: int = option(2, "newest checkpoints to keep, besides the best; 0: all")
    log_every: int = option(1, "log every N updates", 1)

    def __post_init__(self) -> None:
        """Raise ValueError for a value out of range; it may come from a checkpoint."""
        for item in fields(self):
            value = getattr(self, item.name)
            least, most = item.metadata["range"]
            valid = isinstance(value, item.type) and value in (item.metadata["choices"] or [value])
            if valid and item.type in (int, float):
                valid = least <= value <= most
            if not valid:
                raise ValueError(f"{item.name} is {value!r}: out of range, or of the wrong type")


# What a resumed run may change. A change of any other setting would make it another run.
MAY_CHANGE = {
    "data", "out", "resume", "init_from", "eval_only", "micro_batch_size", "dtype", "compile", "device",
    "zero", "eval_every", "eval_tokens", "eval_tasks", "sample_every", "log_every", "tensorboard",
    "checkpoint_every", "keep_checkpoints",
}  # fmt: skip

BOOK = TrainConfig(  # for a single book: a few minutes on a laptop
    data="data/mine", model="gpt2-tiny", sequence_length=64, total_batch_tokens=12 * 64,
    steps=2200, warmup_steps=150, max_lr=1.5e-3, min_lr=1e-5, beta2=0.99,
    eval_every=1000, sample_every=500, checkpoint_every=1000, log_every=20,
)  # fmt: skip
PRESETS = {"gpt2": TrainConfig(), "book": BOOK, "demo": replace(BOOK, data="data/demo", steps=1400)}


def check_config(config: TrainConfig) -> None:
    """Raise ValueError for settings that contradict each other, or a batch that cannot be divided as asked."""
    if config.min_lr > config.max_lr:
        raise ValueError(f"--min-lr {config.min_lr} must not exceed --max-lr {config.max_lr}")
    if config.warmup_steps >= config.steps:
        raise ValueError(f"--warmup-steps {config.warmup_steps} must be below --steps {config.steps}")
    pass_tokens = config.sequence_length * max(1, config.micro_batch_size) * read_environment("WORLD_SIZE", 1, 1)
    if config.total_batch_tokens % pass_tokens:
        raise ValueError(f"--total-batch-tokens must be a multiple of {pass_tokens}, a micro-batch per device")


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of update 1, 2, ...: a line up to max_lr at warmup_steps, then half a cosine down to min_lr."""
    if step < config.warmup_steps:
        return config.max_lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    return config.min_lr + (config.max_lr - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2


# Processes


def read_environment(name: str, default: int, least: int = 0, most: int = 2**31 - 1) -> int:
    """A number that torchrun sets, from `least` to `most`. Raises ValueError if it is not one."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or not least <= int(text) <= most:
        raise ValueError(f"{name} is {text!r}, not {least} to {most}; unset it, or use torchrun, one rank per GPU")
    return int(text)


class Process(NamedTuple):
    """This process: its rank, the number of ranks, its device, and its precision for matrix products."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    autocast: torch.autocast
    stops: list[int]  # the signals that have asked it to stop


def start_process(config: TrainConfig) -> Process:
    """Choose the device and, under torchrun, join the other processes. Raises ValueError, OSError."""
    world_size = read_environment("WORLD_SIZE", 1, 1)
    rank = read_environment("RANK", 0, 0, world_size - 1)
    device = gpt.choose_device(config.device)
    if device.type == "cuda":
        local_rank = read_environment("LOCAL_RANK", 0, 0, torch.cuda.device_count() - 1)
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ:  # set by torchrun, even for a single process
        join_processes(rank, world_size, device)
    dtype = gpt.choose_dtype(config.dtype, device, training=True)
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    return Process(rank, world_size, device, dtype, autocast, stops=[])


def join_processes(rank: int, world_size: int, device: torch.device) -> None:
    """Join the process group that torchrun has started. Raises OSError when it cannot be reached."""
    status("waiting for the other processes")
    # The store in which the processes meet is in torchrun, or else in rank 0.
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    host = "localhost" if serves else os.environ.get("MASTER_ADDR", "")
    port = read_environment("MASTER_PORT", 0, 1, 2**16 - 1)
    deadline = time.monotonic() + 300
    try:
        # Wait for the store to listen, since PyTorch would log a stack trace for every attempt.
        while not serves:
            try:
                socket.create_connection((host, port), timeout=10).close()
                break
            except (ConnectionError, TimeoutError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(1)
        # In a thread, so that Ctrl-C ends the wait.
        store = prep.begin(dist.TCPStore, host, port, world_size, serves).result(600)
        # Each restart has its own prefix in the store, or workers would find the addresses of dead
        # ones. On a single machine only, since several may count restarts differently.
        if world_size == read_environment("LOCAL_WORLD_SIZE", 0):
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        device_id = device if device.type == "cuda" else None
        backend = "nccl" if device_id else "gloo"
        limit = timedelta(minutes=30)  # for rank 0 to write gpt2-xl's checkpoint of 19 GB
        dist.init_process_group(backend, None, limit, world_size, rank, store, device_id=device_id)
    except (RuntimeError, ValueError, OSError) as error:
        problem = str(error).split("\n")[0]
        raise OSError(f"cannot join the other processes at MASTER_ADDR {host}:{port}: {problem}") from error


def all_reduce(value: Tensor) -> Tensor:
    """The sum over all ranks, as float64 on the CPU. Waits for the device."""
    # On MPS there is no float64, and gloo supports only the CPU.
    value = value.double() if value.is_cuda else value.cpu().double()
    if dist.is_initialized():
        dist.all_reduce(value)
    return value.cpu()


def gather(value: Any) -> list:
    """What each rank has, by rank. Waits for all ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def catch_signals(stops: list[int]) -> None:
    """From now on, append SIGTERM and SIGINT to `stops` instead of letting them end the process."""

    def catch(signum: int, frame: object) -> None:
        if not stops and prep.is_main_process():
            os.write(2, b"\nstopping after a last checkpoint\n")  # it may have interrupted print()
        stops.append(signum)
        # A second Ctrl-C ends the process, but not under torchrun, which itself repeats signals.
        if not dist.is_initialized():
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, catch)
    signal.signal(signal.SIGINT, catch)


# The data and its order


@lru_cache(maxsize=2)  # a batch can span two epochs
def epoch_order(sequences: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: a permutation of range(sequences). NumPy guarantees RandomState's streams."""
    return np.random.RandomState([seed, epoch]).permutation(sequences)


def batch_indices(split: Split, config: TrainConfig, step: int) -> np.ndarray:
    """The indices of update `step`'s sequences: (total_batch_tokens / T,) int64, whatever the number of devices."""
    batch_size = config.total_batch_tokens // config.sequence_length
    indices = []
    for position in range((step - 1) * batch_size, step * batch_size):  # counted over all epochs
        epoch, place = divmod(position, split.sequences)
        indices.append(epoch_order(split.sequences, config.seed, epoch)[place])
    return np.array(indices)


def identify_shards(data: Path, splits: list[Split | None], saved: dict) -> dict:
    """What identifies each shard, by its name: its sha256 in SHA256SUMS or, without one, its number of tokens. Raises
    ValueError unless these are the shards that the run was begun with, `saved` in its checkpoint ({} for a new run)."""
    checksums = prep.read_checksums(data)
    shards = {}
    changed = set()
    for split in filter(None, splits):
        for path, tokens in zip(split.paths, split.tokens, strict=True):
            count = f"{tokens} tokens"
            shards[path.name] = checksums.get(path.name, count)
            then = saved.get(path.name, count)
            # A shard is identified in the other way if SHA256SUMS has been added or removed since.
            if then not in (shards[path.name], count) and then != prep.sha256_of(path):
                changed.add(path.name)
    if saved:
        # Validation shards may come and go: a resumed run may begin to evaluate, or stop.
        changed |= {name for name in shards.keys() ^ saved.keys() if prep.is_of_split(name, "train")}
    if changed:
        raise ValueError(f"{data / min(changed)} is not what the run was trained on; restore the data")
    return shards


# Checkpoints and the log


def save_checkpoint(out: Path, model: GPT, trainer: dict, tokenizer: str, files: dict) -> Path:
    """Write `step_NNNNNN`, under a temporary name until it is complete and on disk: the model, the tokenizer, by name,
    with its `files`, and the `trainer`. Raises FloatingPointError for weights that are not finite, OSError."""
    final = out / f"step_{trainer['step']:06d}"
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise FloatingPointError(f"{final} is not written: weights are not finite; lower --max-lr")
    part = final.with_suffix(".tmp")
    try:
        for left in out.glob(f"step_{'[0-9]' * 6}.tmp"):  # left by a crash
            shutil.rmtree(left)
        gpt.save_model(model, part, tokenizer)
        for name, content in files.items():
            (part / name).write_bytes(content)
        torch.save(trainer, part / "trainer.pt")
        prep.add_checksums(part, prep.CHECKPOINT_FILES)
        # The log is never behind a checkpoint.
        for path in (*out.glob("metrics.jsonl"), *part.iterdir(), part):
            prep.synchronize(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"{final} could not be written: {error}; fix that, then --resume") from error
    if final in prep.checkpoints(out):  # a damaged one that was skipped
        shutil.rmtree(final)
    elif os.path.lexists(final):  # something else with its name
        final.rename(f"{final}.replaced_{time.time_ns()}")
    part.rename(final)
    prep.synchronize(out)
    return final


def find_best(out: Path) -> Path | None:
    """The checkpoint with the lowest validation loss in the log, if any."""
    losses = {}
    for entry in read_log(out):
        if isinstance(entry.get("val_loss"), float):
            losses[out / f"step_{entry.get('step', 0):06d}"] = entry["val_loss"]
    evaluated = [path for path in prep.checkpoints(out) if path in losses]
    return min(evaluated, key=losses.get, default=None)


def prune(out: Path, newest: Path, keep: int) -> None:
    """Remove all checkpoints but the `keep` newest and the best; 0 keeps all."""
    found = prep.checkpoints(out)
    past = found[: found.index(newest) + 1]  # a later one is damaged and was skipped
    best = find_best(out)
    for old in past[:-keep]:  # none if `keep` is 0
        if old != best and not old.is_symlink():
            # Renamed first, so that a crash cannot leave half a checkpoint under its name.
            shutil.rmtree(old.rename(old.with_suffix(".tmp")))


def load_trainer(checkpoint: Path, given: dict) -> dict:
    """A checkpoint's config (with defaults for what it lacks, overridden by `given`), step, seconds, shards, optimizer
    and scaler. Raises ValueError for a foreign file, and for a resumed run that would compute something else."""
    path = checkpoint / "trainer.pt"
    with prep.reading(path):
        trainer = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        saved = trainer["config"]
        known = saved.keys() & vars(TrainConfig())
        config = TrainConfig(**{name: saved[name] for name in known})
        trainer["config"] = replace(config, **given)
        trainer["seconds"] = float(trainer["seconds"])
        trainer["shards"] = dict(trainer["shards"])
    for name in saved.keys() - known:
        say(f"warning: {path} has an unknown setting, {name}, which is ignored", sys.stderr)
    then = vars(config)
    changed = [name for name in sorted(given.keys() - MAY_CHANGE) if given[name] != then[name]]
    changes = [f"--{name.replace('_', '-')} was {then[name]} and is now {given[name]}" for name in changed]
    if changes and not trainer["config"].eval_only:
        raise ValueError(f"cannot resume {checkpoint}: {'; '.join(changes)}; use --init-from and another --out")
    return trainer


def read_log(out: Path) -> list[dict]:
    """The entries of metrics.jsonl, the settings first; [] without one. A line cut off by a crash is skipped."""
    entries = []
    with suppress(FileNotFoundError):
        for line in (out / "metrics.jsonl").read_bytes().splitlines():
            with suppress(ValueError):
                entry = prep.read_object(line, "a line of the log")
                if isinstance(entry.get("step", 0), int):
                    entries.append(entry)
    return entries


def open_log(out: Path, config: TrainConfig, step: int, evaluates: bool) -> Callable[[dict], None]:
    """Return a function that appends an entry to metrics.jsonl, which it recreates if it has been deleted. First drop
    the entries after `step` and, if the run `evaluates` it again, the evaluation of `step`."""
    path = out / "metrics.jsonl"
    kept = []
    for entry in read_log(out):
        # The settings have no step, and the evaluation of a step follows its update.
        if (entry.get("step", 0), "train_loss" not in entry) <= (step, not evaluates):
            kept.append(entry)
    kept = kept or [{"config": vars(config)}]
    prep.write_atomically(path, [json.dumps(entry).encode() + b"\n" for entry in kept])
    board = None
    if config.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(out, purge_step=step + 1)

    def record(entry: dict) -> None:
        if torch.cuda.is_initialized():
            entry = entry | {"memory_gb": torch.cuda.max_memory_allocated() / 1e9}
        out.mkdir(exist_ok=True)
        with prep.writing(path), open(path, "a") as log:
            log.write(json.dumps(entry) + "\n")
        if board:
            for name, value in entry.items():
                board.add_scalar(name, math.nan if value is None else value, entry["step"])
            board.flush()

    return record


# Evaluation


class EvalSet(NamedTuple):
    """Rows of tokens, of which the last few are scored: sequences, or a task's context with each of its endings."""

    name: str
    rows: Sequence[Tensor]  # of int64
    counts: list[int]  # how many tokens at the end of each row are scored
    text_bytes: int = 0  # of the scored tokens, in UTF-8; 0 for tasks


def read_tasks(name: str, path: Path, tokenizer: tiktoken.Encoding, most: int) -> EvalSet:
    """The first `most` tasks of a set as it is published. Raises ValueError, naming the line, for a malformed one."""
    if (path.parent / "SHA256SUMS").exists():
        prep.check_checksums(path.parent, [path.name])
    rows = []
    counts = []
    for number, line in enumerate(path.read_bytes().splitlines()[:most], start=1):
        with prep.reading(f"{path}, line {number},"):
            task = prep.read_object(line, "its JSON")
            if name == "lambada":  # the last word is the only ending
                context, *endings = task["text"].rsplit(" ", 1)
            else:
                context = task["ctx"]
                endings = task["endings"]
                label = int(task["label"])
                if len(endings) != 4 or not 0 <= label < 4:
                    raise ValueError("it needs four endings and the number of the right one")
                endings.append(endings.pop(label))  # the right one comes last
            # The first token is <|endoftext|>, which is not part of a task.
            context_tokens = prep.tokenize([context], tokenizer)[1:].tolist()
            if not (context_tokens and endings):
                raise ValueError("its context is empty, or it has no ending")
            for ending in endings:
                ending_tokens = prep.tokenize([" " + ending], tokenizer)[1:].tolist()
                rows.append(torch.tensor(context_tokens + ending_tokens))
                counts.append(len(ending_tokens))
    if not rows:
        raise ValueError(f"{path} contains no tasks")
    return EvalSet(name, rows, counts)


def open_evaluation(config: TrainConfig, split: Split, tokenizer: tiktoken.Encoding, block_size: int) -> list[EvalSet]:
    """What an evaluation scores: the first eval_tokens of the validation split, and the sets beside its directory."""
    T = split.sequence_length
    count = min(max(1, config.eval_tokens // T), split.sequences)
    rows = prep.read_sequences(split, np.arange(count))
    text_bytes = int(prep.token_bytes(tokenizer)[rows[:, 1:]].sum())
    sets = [EvalSet("val", torch.from_numpy(rows), [T] * count, text_bytes)]
    for name in prep.EVALUATION_SETS:
        path = Path(config.data).parent / name / prep.FILES[name].name
        if config.eval_tasks and path.exists():
            tasks = read_tasks(name, path, tokenizer, config.eval_tasks)
            if max(tasks.counts) <= block_size:
                sets.append(tasks)
            else:
                say(f"{name} is left out: an ending is longer than the model's context", sys.stderr)
    return sets


def score_rows(model: GPT, data: EvalSet, process: Process) -> Tensor | None:
    """`GPT.score` of all rows, (2, rows) float64, on all ranks; None once any rank has caught a signal."""
    device = process.device
    rows = [row[-model.config.block_size - 1 :] for row in data.rows]  # as much as fits
    # Longest first, so that the rows of a batch are of similar length and need little padding.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    batch_tokens = 8192 if device.type == "cuda" else 2048
    scores = torch.zeros(2, len(rows), device=device)
    done = 0
    while done < len(order):
        status(f"evaluating: {done / len(order):.0%}")
        if all_reduce(torch.tensor(len(process.stops), device=device)) > 0:  # waits for all ranks
            return None
        size = max(1, batch_tokens // (len(rows[order[done]]) - 1))
        start = done + process.rank * size  # the ranks take turns
        share = order[start : start + size]
        if share:
            tokens, targets = gpt.pad([rows[i] for i in share], [data.counts[i] for i in share])
            with gpt.evaluation_mode(model), process.autocast:  # not compiled, since lengths vary
                scores[:, share] = model.score(tokens.to(device), targets.to(device))
        done += process.world_size * size
    return all_reduce(scores)


def measure(data: EvalSet, nats: Tensor, hits: Tensor) -> dict[str, Tensor]:
    """A set's metrics, a value for each sequence or task where there is one, from each row's summed loss and how many
    of its targets were the most likely token. LAMBADA counts the words of which all were, with a perplexity per word;
    HellaSwag counts the right endings with the lowest summed loss or, as "norm", the lowest loss per token."""
    counts = torch.tensor(data.counts)
    losses = nats / counts
    if data.name == "val":
        bits_per_byte = nats.sum() / math.log(2) / data.text_bytes
        return {"val_loss": losses, "val_perplexity": losses.mean().exp(), "val_bits_per_byte": bits_per_byte}
    if data.name == "lambada":
        return {"lambada_acc": hits == counts, "lambada_perplexity": nats.mean().exp()}
    lowest = nats.view(-1, 4).argmin(dim=1)
    lowest_norm = losses.view(-1, 4).argmin(dim=1)
    return {"hellaswag_acc": lowest == 3, "hellaswag_acc_norm": lowest_norm == 3}


def evaluate(model: GPT, sets: list[EvalSet], process: Process) -> dict:
    """Print and return the metrics of all sets, the same on all ranks; {} once any rank has caught a signal."""
    metrics = {}
    for data in sets:
        scores = score_rows(model, data, process)
        if scores is None:
            return {}
        for name, values in measure(data, *scores).items():
            values = values.double()
            metrics[name] = values.mean()
            line = f"  {name:20} {metrics[name]:10.4f}"
            if values.dim() > 0:
                # The standard error; var(correction=1) would warn of a single value.
                error = (values.var(correction=0) / (len(values) - 1)).sqrt()
                metrics[f"{name}_se"] = error
                line += f" ± {error:.4f}"
            say(line)
    return {name: value.item() if value.isfinite() else None for name, value in metrics.items()}


# The run


def build_model(config: TrainConfig, source: Path | None) -> tuple[GPT, tiktoken.Encoding]:
    """The model in `source`, else a new one, and the data's tokenizer. Raises ValueError when they do not fit."""
    status(f"reading {source or config.data}")
    T = config.sequence_length
    tokenizer = prep.get_tokenizer(prep.read_tokenizer_name(Path(config.data)))
    used = tokenizer.n_vocab
    if source is None:
        size = MODEL_SIZES[config.model]
        n_layer = config.n_layer or size.n_layer
        n_head = config.n_head or size.n_head
        n_embd = config.n_embd or size.n_embd
        return GPT(gpt.GPTConfig(T, used, n_layer, n_head, n_embd, config.dropout)), tokenizer
    shape, tokenizer_name = gpt.read_config(source)
    if tokenizer_name != tokenizer.name:
        raise ValueError(f"{source} needs data prepared with --tokenizer {tokenizer_name}; {config.data} is not")
    if shape.block_size < T:
        raise ValueError(f"--sequence-length {T} exceeds {source}'s context of {shape.block_size}")
    if shape.vocab_size > used:
        say(f"{source} has {shape.vocab_size} tokens, of which the first {used} are used")
    return gpt.load_model(source, config.dropout, used), tokenizer


def pass_over_zeros(runner: Any, size: int, T: int, process: Process, sync: bool) -> None:
    """A forward and a backward pass, which compiles the model and, with `sync`, exchanges gradients. Raises OSError."""
    status(f"compiling or connecting, with micro-batches of {size}")
    if process.world_size > 1:
        runner.require_backward_grad_sync = sync
    zeros = torch.zeros(size, T, dtype=torch.int64, device=process.device)
    try:
        with process.autocast:
            # Two tensors, as in an update; otherwise it would compile again.
            runner(zeros, zeros.clone()).backward()
    except torch._dynamo.exc.TorchDynamoException as error:
        raise OSError(f"the model cannot be compiled here ({type(error).__name__}); use --no-compile") from error
    finally:
        runner.zero_grad()


def find_micro_batch_size(config: TrainConfig, model: GPT, runner: Any, process: Process) -> int:
    """The micro-batch size, in sequences: the largest of up to 2^17 tokens that fits on every rank's GPU."""
    T = config.sequence_length
    parameters = gpt.parameter_count(model)
    on_gpu = process.device.type == "cuda"
    most = 4096  # tokens; on a CPU, more is no faster
    if on_gpu:
        # A parameter needs a gradient, another to add to it, and two moments. A compiled pass keeps
        # a token's logits and about 16 n_embd numbers per layer (measured on an H100).
        free = torch.cuda.mem_get_info()[0] - 16 * parameters
        shape = model.config
        kept = process.dtype.itemsize * (shape.vocab_size + 16 * shape.n_embd * shape.n_layer)
        most = min(2**17, int(0.9 * free / kept))

    def fits(size: int) -> bool:
        """Whether a pass leaves room for the optimizer's two moments, accumulated gradients, and a tenth to spare."""
        torch.cuda.set_per_process_memory_fraction(0.9)
        try:
            reserved = torch.empty(3 * parameters, device=process.device)
            pass_over_zeros(runner, size, T, process, sync=False)
            del reserved
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.0)
            torch.cuda.reset_peak_memory_stats()  # so that the log shows the peak of training

    share = config.total_batch_tokens // T // process.world_size  # this rank's, in sequences
    size = min(share, max(1, most // T))
    while size > 1 and (share % size or (on_gpu and not fits(size))):
        size -= 1
    return min(gather(size))


def evaluate_only(config: TrainConfig, given: dict) -> None:
    """Evaluate --init-from or the newest checkpoint; print the metrics as a table and, last, as a line of JSON."""
    source = prep.model_directory(config.init_from or config.out)
    if (source / "trainer.pt").exists():
        prep.check_checksums(source, ["trainer.pt"])
        config = load_trainer(source, given)["config"]
    split = prep.open_split(Path(config.data), "val", config.sequence_length)
    model, tokenizer = build_model(config, source)
    process = start_process(config)
    model.to(process.device)
    sets = open_evaluation(config, split, tokenizer, model.config.block_size)
    say(f"evaluation of {source}")
    metrics = evaluate(model, sets, process)
    say(json.dumps({"evaluated": str(source)} | metrics))


def train(config: TrainConfig, given: dict) -> int:
    """Train, or resume with the checkpoint's settings, overridden by those in `given`. Returns the exit status: 0, or
    128 + the signal that interrupted the run. Raises FloatingPointError when it diverges, ValueError and OSError."""
    # Where it starts: a checkpoint, given weights, or scratch
    out = Path(config.out)
    begun = prep.checkpoints(out) or any("train_loss" in entry for entry in read_log(out))
    if begun and not config.resume:
        raise FileExistsError(f"{out} already contains a run; add --resume, or use another --out")
    checkpoint = prep.newest_checkpoint(out)
    source = checkpoint
    trainer = {"step": 0, "seconds": 0.0, "shards": {}}  # of a new run
    if checkpoint:
        trainer = load_trainer(checkpoint, given)
        config = trainer["config"]
    elif config.init_from:
        source = prep.model_directory(config.init_from)
    check_config(config)
    step = trainer["step"]
    seconds = trainer["seconds"]  # of training so far

    # The data
    data = Path(config.data)
    T = config.sequence_length
    batch_tokens = config.total_batch_tokens
    split = prep.open_split(data, "train", T)
    usable = T * split.sequences
    if batch_tokens > usable:
        raise ValueError(f"{data} has only {usable:,} usable tokens; lower --total-batch-tokens, or use --preset book")
    val_split = prep.open_split(data, "val", T) if config.eval_every else None
    shards = identify_shards(data, [split, val_split], trainer["shards"])

    # The model, the processes, and the device of each
    torch.manual_seed(config.seed)
    model, tokenizer = build_model(config, source)
    process = start_process(config)
    rank, world_size, device, dtype, autocast, stops = process
    if any(seen != (step, shards) for seen in gather((step, shards))):
        raise FileNotFoundError(f"the ranks see different files in {out} or {data}; let all machines see the same")
    model.to(device).train()
    by_default = config.compile is None and device.type == "cuda" and has_triton()
    compiled = config.compile or by_default
    # With dynamic shapes, a second micro-batch size would be compiled for all, and run slower.
    runner = torch.compile(model, dynamic=False) if compiled else model
    if world_size > 1:
        runner = torch.nn.parallel.DistributedDataParallel(runner, gradient_as_bucket_view=True)
    size = config.micro_batch_size or find_micro_batch_size(config, model, runner, process)
    if runner is not model:
        # Compile now, untimed, and settle the order in which DDP sums: a resumed run has the same.
        pass_over_zeros(runner, size, T, process, sync=True)

    # The optimizer
    zero = config.zero and world_size > 1
    optimizer = gpt.configure_optimizer(model, config.max_lr, config.weight_decay, (0.9, config.beta2), zero)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if checkpoint:
        with prep.reading(checkpoint / "trainer.pt"):
            gpt.load_optimizer(optimizer, trainer["optimizer"])
            if trainer["scaler"]:
                scaler.load_state_dict(trainer["scaler"])

    # What the loop does, now and then or in the background
    passes = batch_tokens // (size * T * world_size)
    sets = open_evaluation(config, val_split, tokenizer, model.config.block_size) if val_split else []
    card = torch.cuda.get_device_name() if device.type == "cuda" else ""
    peak_flops = gpt.PEAK_FLOPS.get(card) if dtype != torch.float32 else None
    flops_per_token = gpt.flops_per_token(replace(model.config, block_size=T))
    tokenizer_files = prep.tokenizer_files(tokenizer.name, model.config.block_size)

    def due(every: int) -> bool:
        """Whether to act at this step: at each multiple of `every` and at the last; never if `every` is 0."""
        return every > 0 and (step % every == 0 or step == config.steps)

    record = open_log(out, config, step, due(config.eval_every)) if rank == 0 else lambda entry: None

    def load(step: int) -> Tensor:
        """This rank's part of a batch: (micro-batches, micro-batch size, T + 1) int64 on the CPU."""
        indices = batch_indices(split, config, step).reshape(passes, world_size, size)
        sequences = prep.read_sequences(split, indices[:, rank].ravel())
        return torch.from_numpy(sequences).view(passes, size, T + 1)

    def log_update(loss: float, lr: float, norm: float, dt: float) -> None:
        rate = batch_tokens / dt
        entry = {"step": step, "seconds": seconds, "train_loss": loss, "lr": lr}
        entry |= {"grad_norm": norm if math.isfinite(norm) else None, "tokens_per_second": rate}
        line = f"step {step}  loss {loss:.4f}  lr {lr:.1e}  norm {norm:.2f}  {rate:,.0f} tok/s"
        if peak_flops:
            entry["mfu"] = rate * flops_per_token / (peak_flops * world_size)
            line += f"  mfu {entry['mfu']:.0%}"
        record(entry)
        left = timedelta(seconds=int((config.steps - step) * dt))
        say(f"{line}  {left} left")

    def print_sample() -> None:
        torch.manual_seed(config.seed)
        prompt = torch.tensor([[tokenizer.eot_token]], device=device)
        with gpt.evaluation_mode(model):
            steps = gpt.generate(model, prompt, 100, temperature=0.8, top_k=50, stop_token=tokenizer.eot_token)
            tokens = torch.cat(list(steps)).tolist()
        say(f"sample:\n{tokenizer.decode(tokens)}")

    def log_evaluation() -> bool:
        """Evaluate on all ranks, and log. Returns True, and logs nothing, if a signal on any rank ended it."""
        say(f"step {step}  evaluation")
        metrics = evaluate(model, sets, process)
        if metrics:
            record({"step": step, "seconds": seconds} | metrics)
        return not metrics

    def save() -> int:
        """Write a checkpoint, with the help of all ranks, and return its step."""
        if zero:
            optimizer.consolidate_state_dict(to=0)
        if rank == 0:
            trainer = {"config": vars(config), "step": step, "seconds": seconds, "shards": shards}
            trainer |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
            path = save_checkpoint(out, model, trainer, tokenizer.name, tokenizer_files)
            prune(out, path, config.keep_checkpoints)
            say(f"step {step}  checkpoint {path}")
        return step

    # The loop
    epochs = config.steps * batch_tokens / sum(split.tokens)
    say(f"{'resumed' if checkpoint else 'started'} from {source or 'scratch'}")
    say(f"{gpt.parameter_count(model):,} parameters, {device.type}, {dtype}{', compiled' if compiled else ''}")
    say(f"{config.steps:,} updates of {batch_tokens:,} tokens, or {epochs:,.2f} epochs of {data}")
    say(f"an update: {passes} micro-batches x {world_size} ranks x {size} sequences x {T} tokens")
    remaining = range(step + 1, config.steps + 1)
    batches = prep.in_background(load, remaining, ahead=1)
    catch_signals(stops)
    saved = step
    stop = due(config.eval_every) and log_evaluation()
    for step in remaining:
        if stop:
            break
        began = time.perf_counter()
        batch = next(batches).to(device)  # (micro-batches, sequences, T + 1)
        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # Dropout does not depend on what was drawn before, so that a resumed run draws the same.
        seed = np.random.SeedSequence([config.seed, step, rank]).generate_state(1)
        torch.manual_seed(seed.item())
        loss = torch.zeros((), device=device)
        for i, sequences in enumerate(batch):
            status(f"step {step} of {config.steps}, {i / passes:.0%}")
            if world_size > 1:  # exchange gradients after the last micro-batch only, as no_sync() does
                runner.require_backward_grad_sync = i + 1 == passes
            tokens = sequences[:, :-1].contiguous()
            targets = sequences[:, 1:].contiguous()
            with autocast:
                micro_loss = runner(tokens, targets) / passes
            scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)

        # The one wait for the device, and for all ranks
        stopping = torch.tensor(float(len(stops)), device=device)
        sums = all_reduce(torch.stack([loss, norm, stopping]))
        mean_loss, mean_norm, stopping = (sums / world_size).tolist()
        # A gradient that overflows float16 is left to the scaler, until its scale is down to 1.
        if not math.isfinite(mean_loss) or not (math.isfinite(mean_norm) or scaler.get_scale() > 1):
            problem = f"step {step}: loss {mean_loss}, gradient norm {mean_norm}"
            raise FloatingPointError(f"{problem}; start again from step {saved}, with a lower --max-lr")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        dt = time.perf_counter() - began
        seconds += dt
        stop = stopping > 0
        if due(config.log_every):
            log_update(mean_loss, lr, mean_norm, dt)
        if due(config.sample_every) and rank == 0:
            print_sample()
        if due(config.eval_every):
            stop = log_evaluation() or stop
        if stop or step == config.steps or due(config.checkpoint_every):
            saved = save()

    if stop:
        say(f"interrupted after step {saved}; to continue, run the same command with --resume")
        return 128 + (stops[0] if stops else signal.SIGTERM)
    command = "sample from it with:\n  python sample.py --model="
    say(f"{config.steps} steps done; {command}{shlex.quote(str(out))}")
    best = find_best(out)
    if best and best.name != f"step_{saved:06d}":
        say(f"an earlier checkpoint has the lowest validation loss; {command}{shlex.quote(str(best))}")
    return 0


def main(argv: list[str] | None = None) -> None:
    parser = prep.new_parser(__doc__, TrainConfig)
    parser.add_argument("--preset", default="gpt2", choices=PRESETS, help="settings to start from")
    given = vars(parser.parse_args(argv))
    config = replace(PRESETS[given.pop("preset")], **given)
    newest = config.eval_only and "data" not in given  # of all runs, as in sample.py
    name = "" if newest else Path(config.data).resolve().name
    given["out"] = config.out or f"out/{name}"
    config = replace(config, **given)
    try:
        if not (config.resume or config.eval_only):  # else the checkpoint has most of the settings
            check_config(config)
    except ValueError as error:
        parser.error(str(error))

    run = evaluate_only if config.eval_only else train
    advice = "leave --micro-batch-size out, or choose a smaller --model or --sequence-length"
    writes = prep.is_main_process() and not config.eval_only
    lock = prep.locked(Path(config.out)) if writes else nullcontext()
    with prep.one_line_errors("train.py", advice), lock:
        code = run(config, given)  # None from evaluate_only, which exits with 0
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    main()
