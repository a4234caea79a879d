"""
Train a GPT-2 on token shards, on a CPU, on one GPU, or on many under torchrun.

    torchrun --standalone --nproc_per_node=8 train.py     # GPT-2 124M on FineWeb-Edu 10B tokens
    python train.py                                       # the same run on one GPU, by gradient accumulation
    python train.py --preset demo                         # two minutes on a CPU
    python train.py --eval-only --init-from gpt2          # OpenAI's model beside its published scores

Reads the shards that prepare_data.py wrote (or llm.c's). Writes to --out: `metrics.jsonl`, a line for each logged step
and each evaluation, and checkpoints `step_NNNNNN/`, the state after that many updates. The sequences of update s depend
on the seed and s alone, so a run can be resumed, or cut over another number of GPUs, and remains the same run.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the loop, Ctrl-C ends the process at once

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence

import model as gpt
import prepare_data as prep
from model import GPT, MODEL_SIZES
from prepare_data import Split, in_background, read_sequences, say, status

# The configuration


def option(
    default: Any, help: str, least: float = 0, most: float = 2**31 - 1, choices: Any = None, fixed: bool = False
) -> Any:
    """A field of TrainConfig, with its range or choices; `fixed` if it decides the result, and so cannot change when a
    run is resumed."""
    return field(default=default, metadata={"help": help, "range": (least, most), "choices": choices, "fixed": fixed})


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run; the defaults are GPT-2 124M on FineWeb-Edu 10B (19,073 updates of 2^19 tokens)."""

    data: str = option("data/fineweb-edu", "directory with the token shards")
    model: str = option("gpt2", "size of a new model", choices=MODEL_SIZES, fixed=True)
    out: str = option("out", "directory for metrics and checkpoints")
    resume: bool = option(False, "continue from the newest checkpoint in --out, if there is one, with its settings")
    init_from: str = option("", "start from these weights: a checkpoint, or gpt2, gpt2-medium, ...")
    eval_only: bool = option(False, "evaluate --init-from, or the newest checkpoint in --out, and stop")
    seed: int = option(1337, "random seed for initialization, data order and dropout", fixed=True)
    sequence_length: int = option(1024, "tokens in a sequence; also the context of a new model", 1, 2**20, fixed=True)
    micro_batch_size: int = option(0, "sequences per device per pass; 0: largest that fits")
    total_batch_tokens: int = option(2**19, "tokens in an update, over all devices and passes", 1, fixed=True)
    steps: int = option(19073, "number of updates", 1, fixed=True)
    warmup_steps: int = option(715, "warmup updates", fixed=True)
    max_lr: float = option(6e-4, "learning rate after the warmup", most=1e30, fixed=True)
    min_lr: float = option(6e-5, "learning rate at the end", most=1e30, fixed=True)
    beta2: float = option(0.95, "decay rate of AdamW's average of squared gradients", most=0.999999, fixed=True)
    weight_decay: float = option(0.1, "weight decay, on matrices", most=1e30, fixed=True)
    grad_clip: float = option(1.0, "largest norm of the gradient; 0: no clipping", most=1e30, fixed=True)
    dropout: float = option(0.0, "dropout of embeddings, attention and residual branches", most=0.999, fixed=True)
    dtype: str = option("auto", "precision of matrix products", choices=gpt.DTYPES)
    compile: bool | None = option(None, "torch.compile the model (default: on CUDA)")
    device: str = option("auto", "device to train on", choices=gpt.DEVICES)
    zero: bool = option(False, "divide the optimizer's state among the ranks (ZeRO stage 1)")
    eval_every: int = option(250, "updates between evaluations; 0: none")
    eval_tokens: int = option(10 * 2**20, "tokens of the validation split to evaluate on", 1)
    eval_tasks: int = option(100_000, "tasks of HellaSwag and of LAMBADA to evaluate on; 0: none")
    tensorboard: bool = option(False, "write the log for TensorBoard too, to --out (needs the package tensorboard)")
    sample_every: int = option(1000, "updates between samples of text; 0: none")
    checkpoint_every: int = option(4000, "updates between checkpoints; 0: one at the end only")
    keep_checkpoints: int = option(2, "how many checkpoints to keep; 0: all")
    log_every: int = option(1, "updates between lines of the log", 1)


SMALL = TrainConfig(
    data="data/mine",
    model="gpt2-tiny",
    out="out/mine",
    sequence_length=64,
    total_batch_tokens=12 * 64,
    steps=2200,
    warmup_steps=150,
    max_lr=1.5e-3,
    min_lr=1e-5,
    beta2=0.99,
    eval_every=1000,
    sample_every=500,
    checkpoint_every=1000,
    log_every=20,
)
PRESETS = {
    "gpt2": TrainConfig(),
    "small": SMALL,  # for a single book: a few minutes on a laptop
    "demo": replace(SMALL, data="data/demo", out="out/demo", steps=1400),
}
CHECKPOINT_FILES = ("config.json", "model.safetensors", "trainer.pt", *prep.TOKENIZER_FILES)
FLOAT16_SKIPS = 20  # consecutive updates that float16's scaler may skip while it looks for its scale


def parse_args(parser: argparse.ArgumentParser, argv: list[str] | None) -> tuple[TrainConfig, dict[str, Any]]:
    """The command line, with an option for each field of TrainConfig, and those that were given."""
    parser.add_argument("--preset", default="gpt2", choices=PRESETS, help="where to start from (default: gpt2)")
    for item in fields(TrainConfig):
        text, kwargs = item.metadata["help"], {}
        if item.type in (int, float, str):
            parse = str if item.type is str else prep.number(item.type, *item.metadata["range"])
            choices = item.metadata["choices"]
            kwargs |= {"type": parse} | ({"choices": choices} if choices else {"metavar": item.type.__name__.upper()})
            text += f" (default: {item.default})" if item.default != "" else ""
        else:
            kwargs["action"] = argparse.BooleanOptionalAction
        parser.add_argument("--" + item.name.replace("_", "-"), default=None, help=text, **kwargs)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    return replace(PRESETS[given.pop("preset")], **given), given


def check_config(config: TrainConfig) -> None:
    """Raise ValueError for an impossible setting, or a batch that cannot be cut as asked."""
    if not config.data or not config.out:
        raise ValueError("--data and --out must name a directory")
    if config.min_lr > config.max_lr:
        raise ValueError(f"--min-lr ({config.min_lr}) must not be more than --max-lr ({config.max_lr})")
    world_size = max(1, int(os.environ.get("WORLD_SIZE", "1")))
    T, B, total = config.sequence_length, max(1, config.micro_batch_size), config.total_batch_tokens
    if total % (T * B * world_size) and not config.eval_only:
        parts = f"{world_size} devices x micro-batches of {B} x sequences of {T} tokens"
        raise ValueError(f"--total-batch-tokens {total} must be a multiple of {T * B * world_size}: {parts}")


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of update `step`, counted from 1: from 0 (at 0) linearly to max_lr at warmup_steps, then half a
    period of a cosine to min_lr at the last."""
    if step < config.warmup_steps:
        return config.max_lr * step / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.min_lr + (config.max_lr - config.min_lr) * (1 + math.cos(math.pi * min(1.0, done))) / 2


# Processes


class Job(NamedTuple):
    """This process among the others of the run, and its device."""

    rank: int
    world_size: int
    device: torch.device


def start_job(device: str) -> Job:
    """Choose the device and, under torchrun, join the other processes. Raises ValueError for one that is not here."""
    chosen = gpt.choose_device(device)
    rank, local_rank, world_size = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    if rank >= max(1, world_size):
        raise ValueError(f"RANK is {rank}, and WORLD_SIZE {world_size}; start several processes with torchrun")
    if chosen.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"{local_rank + 1} processes were started for {torch.cuda.device_count()} GPUs")
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it re-plans for every new shape: tasks have hundreds
    if world_size > 0:  # torchrun says so, for a single process too
        store, _, _ = next(dist.rendezvous("env://"))
        if world_size == int(os.environ.get("LOCAL_WORLD_SIZE", "0")):
            # Workers that torchrun has restarted would find the addresses of the dead ones in its store. On several
            # machines the count of restarts is not common to all, and cannot tell them apart.
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend, device_id = ("nccl", chosen) if chosen.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, device_id=device_id)
    return Job(rank, max(1, world_size), chosen)


def all_reduce(value: Tensor, how: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
    """The sum of a tensor over all ranks, or its minimum, float64 on the CPU; waits for the device that it is on."""
    value = value.detach().double() if value.device.type == "cuda" else value.detach().cpu().double()
    if dist.is_initialized():
        dist.all_reduce(value, how)
    return value.cpu()


def note_signals() -> list[int]:
    """A list that SIGTERM and SIGINT are added to from now on, instead of ending the process. A second signal more than
    a second later ends it at once; within that second, torchrun and a scheduler may both send the first."""
    noted, times = [], []

    def note(signum: int, frame: object) -> None:
        noted.append(signum)
        times.append(time.monotonic())
        if times[-1] > times[0] + 1:
            os._exit(128 + signum)
        if len(noted) == 1 and os.environ.get("RANK", "0") == "0":  # by os.write: a print may be under way
            os.write(2, b"\nfinishing this update and writing a checkpoint; Ctrl-C again stops at once\n")

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)
    return noted


# The data and its order


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


def load_batch(split: Split, config: TrainConfig, step: int, job: Job) -> Tensor:
    """This rank's part of the batch of update `step`: (accumulation steps, micro_batch_size, T + 1) int64, on the CPU,
    in pinned memory where the device is a GPU."""
    indices = batch_indices(split, config, step).reshape(-1, job.world_size, config.micro_batch_size)[:, job.rank]
    batch = torch.from_numpy(read_sequences(split, indices.ravel()).reshape(*indices.shape, -1))
    if job.device.type == "cuda":
        torch.cuda.set_device(job.device)  # of this thread: pinning would otherwise open a context on the first GPU
        batch = batch.pin_memory()
    return batch


# Checkpoints and the log


def save_checkpoint(out: Path, step: int, model: GPT, trainer: dict, tokenizer: str, keep: int) -> None:
    """Write `step_NNNNNN`, under another name until it is whole and on disk, then remove all but the newest `keep`.
    Raises OSError when it cannot be written."""
    final = out / f"step_{step:06d}"
    part = out / f"{final.name}.tmp"
    shutil.rmtree(part, ignore_errors=True)
    try:
        gpt.save_model(model, part, tokenizer)
        for name, text in prep.tokenizer_files(prep.get_tokenizer(tokenizer)).items():
            (part / name).write_text(text, encoding="utf-8")
        torch.save(trainer, part / "trainer.pt")
        prep.write_checksums(part)
        for path in (out / "metrics.jsonl", *part.iterdir(), part):  # the log first: it is never behind a checkpoint
            prep.synchronize(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"{final} could not be written ({error}); make room, then continue with --resume") from error
    shutil.rmtree(final, ignore_errors=True)  # a damaged one that was passed over
    part.rename(final)
    prep.synchronize(out)
    found = prep.checkpoints(out)
    until_now = found[: found.index(final) + 1]  # a later one is damaged and was passed over
    for old in until_now[:-keep] if keep else []:
        shutil.rmtree(old)


def find_source(config: TrainConfig) -> tuple[Path | None, bool]:
    """Where the weights come from (None: a new model), and whether the run resumes there. Damaged checkpoints are named
    and passed over. Raises FileExistsError for a run that is there and not to be resumed, FileNotFoundError for weights
    that are not there, ValueError for damaged ones."""
    out, found = Path(config.out), prep.checkpoints(Path(config.out))
    log = out / "metrics.jsonl"
    begun = found or (log.exists() and b"train_loss" in log.read_bytes())
    if begun and not config.resume and not config.eval_only:
        raise FileExistsError(f"{out} already holds a run; continue it with --resume, or give another --out")
    if config.resume or (config.eval_only and not config.init_from):
        for checkpoint in reversed(found):
            try:
                prep.check_checksums(checkpoint, CHECKPOINT_FILES)
                return checkpoint, not config.eval_only
            except (ValueError, OSError) as error:
                say(f"warning: {error}; passing over {checkpoint.name}")
        if found or config.eval_only:
            raise ValueError(f"{out} has no whole checkpoint; give another --out to begin anew, or --init-from")
    return (prep.model_directory(config.init_from), False) if config.init_from else (None, False)


def load_trainer(config: TrainConfig, given: dict[str, Any], checkpoint: Path) -> tuple[TrainConfig, dict]:
    """A checkpoint's settings, with those `given` that may change, and what save_checkpoint was given as `trainer`.
    Raises ValueError when that is damaged, or when others were given."""
    try:
        trainer = torch.load(checkpoint / "trainer.pt", map_location="cpu", weights_only=True, mmap=True)
        saved = {item.name: trainer["config"][item.name] for item in fields(config)}
    except Exception as error:  # torch.load raises many kinds for a file that is not one of its own
        raise ValueError(f"{checkpoint}/trainer.pt is damaged ({type(error).__name__})") from error
    fixed = [item.name for item in fields(config) if item.metadata["fixed"] and item.name in given]
    changed = [f"--{n.replace('_', '-')} was {saved[n]} and is now {given[n]}" for n in fixed if given[n] != saved[n]]
    if changed:
        raise ValueError(f"{checkpoint} is from another run: {'; '.join(changed)}")
    always = {"out": config.out, "resume": True, "micro_batch_size": config.micro_batch_size}
    return TrainConfig(**(saved | given | always)), trainer


def open_log(path: Path, step: int) -> TextIO:
    """Open metrics.jsonl for appending, after dropping lines past `step` and lines that a crash has cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        with suppress(ValueError):
            past = prep.read_object(line, path).get("step")
            kept += [line] if not isinstance(past, int) or past <= step else []
    prep.write_atomically(path, kept)
    return open(path, "a", encoding="utf-8", buffering=1)


def describe(entry: dict, seconds_left: float = 0) -> str:
    """An entry of the log for the terminal, within 80 columns: an update on one line; an evaluation as a table."""
    if "train_loss" in entry:
        rate, norm = entry["tokens_per_second"], math.inf if entry["grad_norm"] is None else entry["grad_norm"]
        speed = f"{rate / 1000:,.0f}k tok/s" if rate >= 1e5 else f"{rate:,.0f} tok/s"
        speed += f"  mfu {entry['mfu']:.0%}" if "mfu" in entry else ""
        update = f"step {entry['step']}  loss {entry['train_loss']:.4f}  lr {entry['lr']:.1e}  norm {norm:.2f}"
        return f"{update}  {speed}  {timedelta(seconds=int(seconds_left))}"
    lines = [f"step {entry['step']}  evaluation" if "step" in entry else f"evaluation of {entry['evaluated']}"]
    for name, value in entry.items():
        if isinstance(value, float) and not name.endswith("_se"):
            error = f" ± {entry[f'{name}_se']:.4f}" if entry.get(f"{name}_se") else ""
            lines.append(f"  {name:20} {value:10.4f}{error}")
    return "\n".join(lines)


def sample_text(model: GPT, tokenizer_name: str, seed: int, device: torch.device) -> str:
    """100 tokens of unconditional text."""
    tokenizer = prep.get_tokenizer(tokenizer_name)
    generator = torch.Generator(device).manual_seed(seed)
    prompt = torch.tensor([[tokenizer.eot_token]], device=device)
    model.eval()
    tokens = gpt.generate(model, prompt, 100, 0.8, top_k=50, generator=generator, stop_token=tokenizer.eot_token)
    text = tokenizer.decode([int(token) for token in tokens]).removesuffix("<|endoftext|>")
    model.train()
    return text


# Evaluation

# Of OpenAI's weights, by the notebooks of build-nanogpt (play.ipynb) and llm.c (vislog.ipynb), which do not name their
# precision; build-nanogpt's hellaswag.py says 0.2955 and 0.4893. The losses are on those projects' validation shards.
PUBLISHED = {
    "gpt2": "hellaswag_acc_norm 0.2945; val_loss 3.2924 on fineweb-edu, 3.4250 on fineweb",
    "gpt2-medium": "hellaswag_acc_norm 0.3752",
    "gpt2-large": "hellaswag_acc_norm 0.4320",
    "gpt2-xl": "hellaswag_acc_norm 0.4889",
}


class EvalSet(NamedTuple):
    """Rows of tokens of which the last ones are scored: a sequence, or a context and one of a task's endings, the rows
    of a task one after the other."""

    rows: Sequence[np.ndarray]  # of uint16
    scored: np.ndarray  # (rows,) int64: how many tokens at the end of each
    labels: np.ndarray | None = None  # (tasks,) int64: the right ending
    text_bytes: int = 0  # of the scored tokens of sequences


def read_tasks(name: str, path: Path, tokenizer: tiktoken.Encoding, most: int) -> EvalSet:
    """The first `most` tasks of a set in its published form. An ending's tokens are those of a space and its text; that
    of a LAMBADA passage is its last word. Raises ValueError, with the line, for what is not a task."""
    if (path.parent / "SHA256SUMS").exists():
        prep.check_checksums(path.parent, [path.name])
    rows, scored, labels = [], [], []
    for number, line in enumerate(path.read_bytes().splitlines()[:most], start=1):
        try:
            task = prep.read_object(line, "it")
            if name == "lambada":
                context, last_word = task["text"].rsplit(" ", 1)
                endings, label = [last_word], 0
            else:
                context, endings, label = task["ctx"], task["endings"], int(task["label"])
            if not context or not 0 <= label < len(endings) == (1 if name == "lambada" else 4):
                raise ValueError("it has no context, or no right ending")
            texts = [context, *(" " + ending for ending in endings)]
            begin, *ends = tokenizer.encode_ordinary_batch(texts, num_threads=1)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: not a task of {name}: {error!r}") from error
        rows += [np.array(begin + end, dtype=np.uint16) for end in ends]
        scored += [len(end) for end in ends]
        labels.append(label)
    if not labels:
        raise ValueError(f"there are no tasks in {path}")
    return EvalSet(rows, np.array(scored), np.array(labels))


def open_evaluation(config: TrainConfig, split: Split, tokenizer_name: str, block_size: int) -> dict[str, EvalSet]:
    """What an evaluation scores: the first eval_tokens of the validation split, and of the sets beside the data."""
    T, tokenizer = config.sequence_length, prep.get_tokenizer(tokenizer_name)
    count = min(max(1, config.eval_tokens // T), int(split.first[-1]))
    rows = read_sequences(split, np.arange(count)).astype(np.uint16)
    text_bytes = int(prep.token_bytes(tokenizer)[rows[:, 1:]].sum(dtype=np.int64))
    sets = {"val": EvalSet(rows, np.full(count, T), text_bytes=text_bytes)}
    for name in prep.EVALUATION_SETS:
        path = Path(config.data).parent / name / prep.FILES[name].name
        if config.eval_tasks and path.exists():
            tasks = read_tasks(name, path, tokenizer, config.eval_tasks)
            if tasks.scored.max() <= block_size:  # else an ending alone is more than the model's context
                sets[name] = tasks
    return sets


def score_rows(
    model: GPT, scorer: Callable | None, name: str, data: EvalSet, job: Job, autocast: torch.autocast
) -> np.ndarray:
    """
    For each row, the loss of its scored tokens, summed in nats, and how many of them are the most likely: (2, rows)
    float64, over all ranks. Rows too long for the model lose their beginning.

    Rows of about the same length share a batch. Batches depend on the rows alone, so the scores are the same on any
    number of ranks. Those of whole sequences have one shape and go to `scorer`, the compiled model.score; the others
    have too many to compile.
    """
    longest, most = model.config.block_size + 1, 32768 if job.device.type == "cuda" else 2048
    rows = [torch.from_numpy(row[-longest:].astype(np.int64)) for row in data.rows]
    order, batches = sorted(range(len(rows)), key=lambda i: -len(rows[i])), []
    while order:
        size = max(1, most // (len(rows[order[0]]) - 1))
        batches.append(order[:size])
        order = order[size:]
    mine, began = batches[job.rank :: job.world_size], time.monotonic()
    scores = torch.zeros(2, len(rows), dtype=torch.float64, device="cuda" if job.device.type == "cuda" else "cpu")
    for done, batch in enumerate(mine):
        left = timedelta(seconds=int((time.monotonic() - began) * (len(mine) - done) / max(1, done)))
        status(f"evaluating {name}: {done / len(mine):.0%}{f', {left} left' if done else ''}")
        tokens = pad_sequence([rows[i][:-1] for i in batch], batch_first=True)
        targets = torch.full_like(tokens, -1)
        for target, i in zip(targets, batch, strict=True):
            end, count = len(rows[i]) - 1, data.scored[i]
            target[end - count : end] = rows[i][-count:]
        places = (targets.ravel() >= 0).nonzero().squeeze(1)
        whole = len(places) == targets.numel() and len(batch) == len(batches[0])
        inputs = (tensor.to(job.device) for tensor in (tokens, places, targets.ravel()[places]))
        with autocast:
            result = (scorer if scorer and whole else model.score)(*inputs)
        index = torch.tensor(batch)[places // tokens.size(1)]
        scores.index_add_(1, index.to(scores.device), result.to(scores.device).double())
    return all_reduce(scores).numpy()


@torch.no_grad()
def evaluate(
    model: GPT, scorer: Callable | None, sets: dict[str, EvalSet], job: Job, autocast: torch.autocast
) -> dict[str, float | None]:
    """
    The metrics of the sets, the same on all ranks; `..._se` is the standard error of a mean over sequences or tasks.

    "val_loss" is in nats per token, "val_bits_per_byte" per byte of text. "hellaswag_acc" is how often the right ending
    has the smallest summed loss, "hellaswag_acc_norm" the smallest per token. "lambada_acc" is how often all tokens of
    the last word are the most likely, "lambada_perplexity" the exponential of the mean loss of a word.
    """
    model.eval()
    per_row, others, metrics = {}, {}, {}
    for name, data in sets.items():
        nats, top = score_rows(model, scorer, name, data, job, autocast)
        if name == "val":
            per_row["val_loss"] = nats / data.scored
            others["val_perplexity"] = np.exp(per_row["val_loss"].mean())
            others["val_bits_per_byte"] = nats.sum() / math.log(2) / max(1, data.text_bytes)
        elif name == "lambada":
            per_row["lambada_acc"] = top == data.scored
            others["lambada_perplexity"] = np.exp(nats.mean())
        else:
            by_task = (len(data.labels), -1)
            per_row["hellaswag_acc"] = nats.reshape(by_task).argmin(axis=1) == data.labels
            per_row["hellaswag_acc_norm"] = (nats / data.scored).reshape(by_task).argmin(axis=1) == data.labels
    for name, values in per_row.items():
        metrics[name] = values.mean()
        metrics[f"{name}_se"] = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    model.train()
    return {name: float(value) if np.isfinite(value) else None for name, value in (metrics | others).items()}


# The run


def build_model(config: TrainConfig, source: Path | None, meta: dict) -> GPT:
    """The model in the directory `source`, else a new one. Raises ValueError when it does not fit the data."""
    T, vocab_size = config.sequence_length, meta["vocab_size"]
    if source is None:
        return GPT(replace(MODEL_SIZES[config.model], block_size=T, vocab_size=vocab_size, dropout=config.dropout))
    shape, tokenizer = gpt.read_config(source)
    if (tokenizer, shape.vocab_size) != (meta["tokenizer"], vocab_size):
        theirs, ours = f"{tokenizer} tokenizer ({shape.vocab_size})", f"{meta['tokenizer']} tokenizer ({vocab_size})"
        raise ValueError(f"{source} uses the {theirs}, and {config.data} the {ours}")
    if shape.block_size < T:
        raise ValueError(f"--sequence-length {T} is more than {source}'s context of {shape.block_size}")
    return gpt.load_model(source, config.dropout)


def fits(size: int, config: TrainConfig, model: GPT, job: Job, autocast: torch.autocast) -> bool:
    """Whether a GPU has room for a forward and a backward pass of so many sequences, beside the two averages of the
    optimizer, the gradients accumulated before, and DistributedDataParallel's buckets."""
    status(f"trying micro-batches of {size}")
    torch.cuda.set_per_process_memory_fraction(0.9, job.device)  # the rest is for evaluation, samples and gaps
    try:
        reserved = torch.empty((3 + dist.is_initialized()) * gpt.parameter_count(model), device=job.device)
        tokens = torch.zeros(size, config.sequence_length, dtype=torch.int64, device=job.device)
        with autocast:
            model(tokens, tokens).backward()
        del reserved
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0, job.device)


def find_micro_batch_size(config: TrainConfig, model: GPT, job: Job, autocast: torch.autocast) -> int:
    """The largest micro-batch that the GPUs of all ranks have room for, by trying, uncompiled; 2^17 tokens are enough.
    Elsewhere 4,096 are: a CPU is no faster with more, and has no memory of its own that could be filled."""
    on_cuda, share = job.device.type == "cuda", config.total_batch_tokens // config.sequence_length // job.world_size
    most = min(share, max(1, (2**17 if on_cuda else 4096) // config.sequence_length))
    sizes = (size for size in range(most, 0, -1) if share % size == 0)
    size = next((s for s in sizes if not on_cuda or fits(s, config, model, job, autocast)), 1)
    return int(all_reduce(torch.tensor(size, device=job.device), dist.ReduceOp.MIN))


def train(config: TrainConfig, given: dict[str, Any] | None = None) -> int:
    """
    Run a training, or the rest of one, from the shards in config.data to the log and the checkpoints in config.out; or
    evaluate alone. A resumed run keeps its saved settings but for those in `given` (None: all of `config`). Returns the
    exit status: 0, or 128 + the signal that interrupted it. Raises FloatingPointError when it diverges, and ValueError
    or OSError with a sentence for the user.
    """
    # The starting weights, the data, the model
    out, (source, resuming) = Path(config.out), find_source(config)
    if resuming:
        config, state = load_trainer(config, asdict(config) if given is None else given, source)
    check_config(config)
    status(f"reading {source or config.data}")
    data, T, evaluates = Path(config.data), config.sequence_length, config.eval_every > 0 or config.eval_only
    meta, val_split = prep.read_meta(data), prep.open_split(data, "val", T) if evaluates else None
    split = val_split if config.eval_only else prep.open_split(data, "train", T)
    tokens, whole = sum(split.tokens), T * int(split.first[-1])
    if config.total_batch_tokens > whole and not config.eval_only:
        problem = f"an update of {config.total_batch_tokens:,} tokens is more than all {whole:,} of {data}"
        raise ValueError(f"{problem}; take a smaller --total-batch-tokens, or --preset small")
    if resuming and state["data"] != split.sha256:
        raise ValueError(f"the shards in {data} are not those that {source} was trained on")
    prep.get_tokenizer(meta["tokenizer"])  # one that cannot be fetched is noticed now
    torch.manual_seed(config.seed)
    model = build_model(config, source, meta)
    if config.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

    # The processes, and the device of each
    job = start_job(config.device)
    device, main_process = job.device, job.rank == 0
    step = state["step"] if resuming else 0
    if all_reduce(torch.tensor(step, device=device)) != step * job.world_size:
        raise FileNotFoundError(f"the ranks see different files in {out}; it must be on a disk that all machines share")
    model.to(device).train()
    dtype = gpt.choose_dtype(config.dtype, device)
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    compiles = config.compile if config.compile is not None else device.type == "cuda" and bool(find_spec("triton"))
    if evaluates:
        sets = open_evaluation(config, val_split, meta["tokenizer"], model.config.block_size)
        measure = partial(evaluate, model, torch.compile(model.score) if compiles else None, sets, job, autocast)
    if config.eval_only:
        entry = {"evaluated": str(source)} | measure()
        same = [size for size in PUBLISHED if MODEL_SIZES[size] == replace(model.config, dropout=0.0)]
        lines = [describe(entry), *(f"published for {size}: {PUBLISHED[size]}" for size in same), json.dumps(entry)]
        status("")
        if main_process:
            print("\n".join(lines), flush=True)  # the result, which say() would drop when it cannot be written
        return 0

    # The optimizer, and what a checkpoint says of it
    zero = config.zero and job.world_size > 1
    optimizer = gpt.configure_optimizer(model, config.max_lr, config.weight_decay, (0.9, config.beta2), zero)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    losses, size = [], config.micro_batch_size
    if resuming:
        optimizer.load_state_dict(state["optimizer"])
        for parameter, values in (optimizer.optim if zero else optimizer).state.items():
            values["step"] = values["step"].to(parameter.device)  # ZeroRedundancyOptimizer puts it on the CPU
        scaler.load_state_dict(state["scaler"] or scaler.state_dict())
        losses = state["losses"]
        size = size or state["config"]["micro_batch_size"]  # found once, kept: the sums are then of the same parts
        size = 0 if config.total_batch_tokens % (size * T * job.world_size) else size
    config = replace(config, micro_batch_size=size or find_micro_batch_size(config, model, job, autocast))

    # Compiled, and wrapped for several ranks; `model` stays the plain one, with the same parameters
    runner = torch.compile(model) if compiles else model
    if dist.is_initialized():
        ids = [device] if device.type == "cuda" else None
        runner = DistributedDataParallel(runner, device_ids=ids, gradient_as_bucket_view=True)
    if runner is not model:
        # A warm-up pass: the first update's rate then leaves compiling out, and DistributedDataParallel, which reorders
        # its sums after its first backward, has already done so when a run resumes.
        status("compiling" if compiles else "connecting")
        zeros = torch.zeros(config.micro_batch_size, T, dtype=torch.int64, device=device)
        with autocast:
            runner(zeros, zeros.clone()).backward()  # two tensors, as in an update: else it is compiled again
        optimizer.zero_grad(set_to_none=True)

    # The log
    log = open_log(out / "metrics.jsonl", step or -1) if main_process else None  # a new run evaluates step 0 again
    board = SummaryWriter(out, purge_step=step + 1) if config.tensorboard and main_process else None
    peak = gpt.peak_flops(torch.cuda.get_device_name(), dtype) if device.type == "cuda" else None
    flops = gpt.flops_per_token(replace(model.config, block_size=T))

    def record(entry: dict, seconds_left: float = 0) -> None:
        if log:
            print(json.dumps(entry), file=log)
        say(describe(entry, seconds_left))
        for name in entry.keys() - {"step"} if board else ():
            if entry[name] is not None:
                board.add_scalar(name, entry[name], entry["step"])
        if board:
            board.flush()

    def due(every: int) -> bool:
        return step == config.steps or (every > 0 and step % every == 0)

    shape, passes = model.config, config.total_batch_tokens // (T * config.micro_batch_size * job.world_size)
    begins = f"{'resumed' if resuming else 'started'} from {source or 'scratch'}"
    epochs = config.steps * config.total_batch_tokens / tokens
    say(f"{shape.n_layer} layers of {shape.n_embd}, {gpt.parameter_count(model):,} parameters, {begins}")
    say(f"{tokens:,} tokens; {config.steps:,} updates of {config.total_batch_tokens:,} are {epochs:.3g} epochs")
    how = f"{device.type}, {str(dtype)[6:]}, {'compiled' if compiles else 'not compiled'}"
    say(f"an update is {passes} x {job.world_size} micro-batches of {config.micro_batch_size} x {T}; {how}")
    if evaluates and step == 0:
        record({"step": 0} | measure())

    # The loop: each update trains on total_batch_tokens, of which this rank has its share, in micro-batches
    saved, bad_norms, stop, times = step, 0, 0, []
    signals, steps_left = note_signals(), range(step + 1, config.steps + 1)
    batches = in_background(lambda step: load_batch(split, config, step, job), steps_left, 1, 1)
    while step < config.steps and not stop:
        step, began = step + 1, time.perf_counter()
        batch = next(batches).to(device, non_blocking=True)
        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # Dropout draws from (seed, step, rank), not from what was drawn before: a resumed run draws the same.
        torch.manual_seed(int(np.random.SeedSequence([config.seed, step, job.rank]).generate_state(1)[0]))
        loss = torch.zeros((), device=device)
        for i, sequences in enumerate(batch):
            status(f"step {step} of {config.steps}: micro-batch {i + 1} of {len(batch)}")
            # Gradients are exchanged in the last micro-step only. no_sync() sets the same flag; the forward reads it.
            if dist.is_initialized():
                runner.require_backward_grad_sync = i + 1 == len(batch)
            with autocast:
                part = runner(sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous()) / len(batch)
            scaler.scale(part).backward()
            loss += part.detach()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)

        # The one wait for the device, and for the other ranks: an update that is not finite is never applied.
        sums = all_reduce(torch.stack([loss, norm, torch.tensor(float(len(signals)), device=device)]))
        loss, norm, stop = (sums / job.world_size).tolist()
        bad_norms = 0 if math.isfinite(norm) else bad_norms + 1
        if not math.isfinite(loss) or bad_norms > (FLOAT16_SKIPS if scaler.is_enabled() else 0):
            good = f"the last good checkpoint in {out} is of step {saved}" if saved else "there is no checkpoint"
            problem = f"the loss is {loss} and the norm of the gradient {norm}"
            raise FloatingPointError(f"at step {step} {problem}; the update is not applied, and {good}")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        losses.append(loss)
        times.append(time.perf_counter() - began)
        if due(config.log_every):
            seconds = sum(times) / len(times)
            rate = config.total_batch_tokens / seconds
            entry = {"step": step, "train_loss": math.fsum(losses) / len(losses), "lr": lr}
            entry |= {"grad_norm": norm if math.isfinite(norm) else None}  # while float16's scaler looks for its scale
            entry |= {"tokens_per_second": rate} | ({"mfu": rate * flops / (peak * job.world_size)} if peak else {})
            record(entry, (config.steps - step) * seconds)
            losses, times = [], []
        if evaluates and due(config.eval_every):
            record({"step": step} | measure())
        if main_process and config.sample_every and due(config.sample_every):
            say(sample_text(model, meta["tokenizer"], config.seed, device))
        if due(config.checkpoint_every) or stop:
            status("writing a checkpoint")
            if zero:
                optimizer.consolidate_state_dict(to=0)
            if main_process:
                state = {"step": step, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
                state |= {"config": asdict(config), "data": split.sha256, "losses": losses}
                save_checkpoint(out, step, model, state, meta["tokenizer"], config.keep_checkpoints)
                say(f"step {step}  checkpoint {out}/step_{step:06d}")
            saved = step
    if step < config.steps:
        say(f"interrupted after step {step}; continue with the same command and --resume")
        return 128 + (signals[0] if signals else signal.SIGTERM)
    say(f"{config.steps} steps done; sample from the result with: python sample.py --model {out}/step_{step:06d}")
    return 0


def main(argv: list[str] | None = None) -> None:
    about = "Train a GPT-2. With no options: 124M on FineWeb-Edu."
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, allow_abbrev=False, description=about)
    config, given = parse_args(parser, argv)
    try:
        if not config.resume:
            check_config(config)
    except ValueError as error:
        parser.error(str(error))

    advice = "leave --micro-batch-size out, or take a smaller --model or --sequence-length"
    # The first process writes for all; an evaluation alone writes nothing.
    writes = not config.eval_only and os.environ.get("RANK", "0") == "0"
    with prep.one_line_errors("train.py", advice), prep.locked(Path(config.out)) if writes else nullcontext():
        code = train(config, given)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    prep.run(main)
