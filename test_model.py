"""
The project's promises, and a test for each. The eight laws:

1. Parity: on the same weights the logits are those of the reference GPT-2.
2. Split invariance: how ranks, micro-batches and accumulation steps divide a batch changes nothing (without dropout).
3. Exact resume: a run killed at any moment and resumed is the run that was never killed, bit for bit on a CPU.
4. Cache: greedy text is the same with the KV cache as without it.
5. Reproducible shards: the same text gives the same bytes with any number of workers and after any number of kills.
6. Loss sync: the logged loss is the mean over every token of the batch, over all ranks and micro-batches.
7. One writer: a second process in a directory is refused, and changes nothing.
8. Nothing damaged is trusted: every file of a checkpoint and of prepared data has its sha256 checked.

Files, processes, signals and servers are real. The tests need no network; a few run only where there is a GPU.
"""

import contextlib
import gzip
import hashlib
import http.server
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE
from types import SimpleNamespace as Site
from typing import Any

ROOT = Path(__file__).parent
# For this process, before it imports torch, and all that it starts: sums round differently with other thread counts.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file as save_numpy
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str
from torch.utils.flop_counter import FlopCounterMode

import model as model_module
import prepare_data
import sample
import train
from model import GPT, MODEL_SIZES, GPTConfig, generate, load_model, save_model
from prepare_data import checkpoints

Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture
TINY = GPTConfig(block_size=16, vocab_size=61, n_layer=2, n_head=2, n_embd=32)
TIMEOUT = 120  # seconds for any one process; none comes near
PORTS: list[socket.socket] = []
FORKS = multiprocessing.get_context("forkserver")  # whose processes are copies of one that has imported all this
FORKS.set_forkserver_preload(["test_model", "torch._dynamo"])
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def random_model(config: GPTConfig = TINY) -> GPT:
    """A model whose every parameter matters: weights, biases and norms far from their initial values."""
    torch.manual_seed(0)
    model = GPT(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            size = 0.1 if "ln_" in name else 0.3
            parameter.add_(size * torch.randn_like(parameter))
    return model.eval()


def save_random(directory: Path, block_size: int = 32, tokenizer: str = "byte", vocab_size: int = 257) -> Path:
    save_model(random_model(GPTConfig(block_size, vocab_size, 2, 2, 32)), directory, tokenizer)
    return directory


def start(*command: object, cwd: Path | None = None) -> subprocess.Popen:
    """A script, or torchrun, as a user starts it, in a process that a test can interrupt."""
    name, *rest = (str(part) for part in command)
    begin = ["-m", "torch.distributed.run"] if name == "torchrun" else [str(ROOT / name)]
    return subprocess.Popen([sys.executable, *begin, *rest], cwd=cwd, stdout=PIPE, stderr=PIPE, text=True)


def run(*command: object, status: int = 0, cwd: Path | None = None) -> tuple[str, str]:
    """The standard output and error of a script, which must end with `status`."""
    process = start(*command, cwd=cwd)
    said = process.communicate(timeout=TIMEOUT)
    assert process.returncode == status, f"{command} ended with {process.returncode}\n{said[0]}\n{said[1]}"
    return said


@contextlib.contextmanager
def running(*command: object, lines: int, word: str) -> Iterator[None]:
    """Run a script, wait until it has printed so many lines with the word in them, and kill it when the block ends."""
    process = start(*command)
    try:
        found = itertools.islice((line for line in process.stdout if word in line), lines)
        assert len(list(found)) == lines, f"{command} ended"
        yield
    finally:
        process.kill()
        process.communicate(timeout=TIMEOUT)
    assert process.returncode == -signal.SIGKILL


def refusal(main: Callable, capsys: Capture, *options: object, status: int = 1) -> str:
    """The one line with which a script, called in this process, ends on an error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ending:
        main([str(option) for option in options])
    assert ending.value.code == status
    *before, message = capsys.readouterr().err.strip().splitlines()
    assert "error: " in message
    assert all(line.startswith("warning: ") or " parameters, " in line for line in before)
    return message


@contextlib.contextmanager
def limited(kind: int, most: int) -> Iterator[None]:
    """Have the operating system limit this process's file size or memory."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def free_port() -> int:
    """A port to listen on, reserved for as long as this process lives."""
    PORTS.append(socket.socket())
    PORTS[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    PORTS[-1].bind(("127.0.0.1", 0))
    return PORTS[-1].getsockname()[1]


def contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != ".lock"}


# The model


def numpy_gpt2(directory: Path, tokens: np.ndarray) -> np.ndarray:
    """GPT-2's forward pass in float64, from the published description and the published layout: (B, T) -> (B, T, V)."""
    weights = {name: array.astype(np.float64) for name, array in load_numpy(directory / "model.safetensors").items()}
    config = json.loads((directory / "config.json").read_text())
    B, T = tokens.shape
    C = config["n_embd"]
    nh = config["n_head"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def layer_norm(x: np.ndarray, name: str) -> np.ndarray:
        normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return normal * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = weights["transformer.wte.weight"][tokens] + weights["transformer.wpe.weight"][:T]
    future = np.triu(np.ones((T, T), dtype=bool), k=1)
    for layer in range(config["n_layer"]):
        name = f"transformer.h.{layer}"
        qkv = linear(layer_norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn")
        q, k, v = (part.reshape(B, T, nh, -1).swapaxes(1, 2) for part in np.split(qkv, 3, axis=-1))
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(C // nh)
        scores = np.where(future, -np.inf, scores)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (scores / scores.sum(-1, keepdims=True)) @ v
        x = x + linear(mixed.swapaxes(1, 2).reshape(B, T, C), f"{name}.attn.c_proj")
        h = linear(layer_norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, f"{name}.mlp.c_proj")
    return layer_norm(x, "transformer.ln_f") @ weights["transformer.wte.weight"].T


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_law_1_parity_with_a_numpy_gpt2(device: str, tmp_path: Path) -> None:
    model = random_model()
    save_model(model, tmp_path)
    tokens = torch.randint(61, (3, 16))
    reference = numpy_gpt2(tmp_path, tokens.numpy())
    assert np.abs(reference).max() > 5  # far from what an untrained model says
    for candidate in (model, load_model(tmp_path)):
        logits = candidate.to(device)(tokens.to(device)).detach().cpu()
        np.testing.assert_allclose(logits, reference, rtol=1e-4, atol=1e-4)


def test_parameter_counts_are_those_of_the_release() -> None:
    counts = [124_439_808, 354_823_168, 774_030_080, 1_557_611_200]
    for name, count in zip(prepare_data.OPENAI_MODELS, counts, strict=True):
        with torch.device("meta"):
            assert model_module.parameter_count(GPT(MODEL_SIZES[name])) == count


def test_flops_per_token_are_what_pytorch_counts() -> None:
    config = replace(TINY, vocab_size=128)  # no padding, which would be counted too
    tokens = torch.randint(128, (1, 17))
    plain = torch.autocast("cpu", dtype=torch.bfloat16)  # the counter cannot see into the chunked loss
    math_attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, math_attention, plain:
        GPT(config)(tokens[:, :-1], tokens[:, 1:]).backward()
    assert counter.get_total_flops() == pytest.approx(16 * model_module.flops_per_token(config), rel=1e-6)


@pytest.mark.parametrize(("dtype", "compiled"), [("float32", False), ("bfloat16", False), ("bfloat16", True)])
def test_loss_and_gradients_are_those_of_the_formula(dtype: str, compiled: bool) -> None:
    model = random_model(GPTConfig(256, 300, 1, 2, 32))
    tolerance = 1e-5 if dtype == "float32" else 3e-2
    with torch.no_grad():
        model.transformer.wte.weight[300:] = 100.0  # padding that would dominate any softmax it had a part in
    tokens = torch.randint(300, (5, 256))  # more than one chunk of rows
    targets = torch.randint(300, (5, 256))
    targets[1, 100:240:7] = -1  # not counted
    parameters = [p for name, p in model.named_parameters() if "c_attn.bias" not in name]  # the keys' have gradient 0
    logits = model(tokens)
    assert logits.shape == (5, 256, 300)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    gradients = torch.autograd.grad(3 * expected, parameters)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = (torch.compile(model) if compiled else model)(tokens, targets)
    assert loss.dtype == torch.float32
    assert abs(loss - expected) < tolerance * expected / 30
    for one, other in zip(torch.autograd.grad(3 * loss, parameters), gradients, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < tolerance * other.norm()


def test_the_residual_stream_is_in_half_precision_in_training_only() -> None:
    model = GPT(TINY)
    types = []
    model.transformer.h[1].register_forward_pre_hook(lambda block, inputs: types.append(inputs[0].dtype))
    tokens = torch.randint(61, (1, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.train()(tokens)
        model.eval()(tokens)
    model.train()(tokens)
    assert types == [torch.bfloat16, torch.float32, torch.float32]


def test_weights_start_as_in_the_paper() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=300, n_layer=8, n_head=4, n_embd=128))
    for name, parameter in model.named_parameters():
        values = parameter[:300] if "wte" in name else parameter
        mean = 0.0
        std = 0.02
        if name.endswith("c_proj.weight"):
            std = 0.02 / 4  # sqrt(2 * 8)
        if name.endswith("bias") or ".ln_" in name:
            std = 0.0
            mean = float(name.endswith("weight"))
        assert values.std().item() == pytest.approx(std, rel=0.05), name
        assert values.mean().item() == pytest.approx(mean, abs=1e-3), name


def test_evaluation_mode_restores_what_it_found() -> None:
    for training, cudnn in ((True, True), (False, False)):
        model = GPT(TINY).train(training)
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        with pytest.raises(KeyError), model_module.evaluation_mode(model):
            assert not model.training and not torch.is_grad_enabled()
            raise KeyError
        assert model.training == training and torch.backends.cuda.cudnn_sdp_enabled() == cudnn
        assert torch.is_grad_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)


def test_centered_logits_have_the_same_softmax_and_lose_less_in_bfloat16() -> None:
    model = random_model()
    with torch.no_grad():
        model.transformer.wte.weight += 5 * torch.randn(32)  # a mean far from 0, as OpenAI's weights have
    tokens = torch.randint(61, (4, 16))
    exact = model(tokens).log_softmax(-1)
    rounded = load_copy(model).bfloat16()(tokens).float().log_softmax(-1)
    centered = model_module.center_logits(load_copy(model))
    assert torch.allclose(centered(tokens).log_softmax(-1), exact, atol=1e-3)
    assert centered(tokens).abs().max() < model(tokens).abs().max() / 2
    errors = [(found - exact).abs().mean() for found in (centered.bfloat16()(tokens).float().log_softmax(-1), rounded)]
    assert errors[0] < errors[1] / 2


def load_copy(model: GPT) -> GPT:
    copy = GPT(model.config).eval()
    copy.load_state_dict(model.state_dict())
    return copy


def test_precision_is_chosen_by_device_and_use() -> None:
    cpu = torch.device("cpu")
    features = torch.cpu.get_capabilities()
    native = features.get("avx512_bf16") or features.get("amx_bf16")
    assert model_module.choose_dtype("auto", cpu) == torch.float32
    assert model_module.choose_dtype("auto", cpu, training=True) == (torch.bfloat16 if native else torch.float32)
    assert model_module.choose_dtype("bfloat16", cpu) == torch.bfloat16
    with pytest.raises(ValueError, match="float16 needs a CUDA device"):
        model_module.choose_dtype("float16", cpu)
    if not torch.cuda.is_available():
        assert model_module.choose_device("auto").type in ("cpu", "mps")
        with pytest.raises(ValueError, match="cuda is not available"):
            model_module.choose_device("cuda")


def test_saved_model_is_in_the_hubs_layout_and_loads_bit_for_bit(tmp_path: Path) -> None:
    model = random_model()
    ours = tmp_path / "ours"
    save_model(model, ours, "byte")
    assert len({path.stat().st_mode for path in ours.iterdir()}) == 1  # as umask says
    stored = load_numpy(ours / "model.safetensors")
    assert stored["transformer.wte.weight"].shape == (61, 32)  # no padding
    assert stored["transformer.h.0.mlp.c_fc.weight"].shape == (32, 128)  # (in, out), as OpenAI has it
    # The hub's gpt2 has no prefix and carries attention masks; newer files repeat the shared matrix.
    hub = tmp_path / "hub"
    hub.mkdir()
    theirs = {name.removeprefix("transformer."): array for name, array in stored.items()}
    theirs["h.0.attn.bias"] = np.tril(np.ones((1, 1, 16, 16), dtype=np.float32))
    theirs["lm_head.weight"] = stored["transformer.wte.weight"].copy()
    save_numpy(theirs, hub / "model.safetensors")
    (hub / "config.json").write_text((ours / "config.json").read_text().replace('"tokenizer"', '"unknown"'))
    for directory, tokenizer in ((ours, "byte"), (hub, "gpt2")):
        loaded = load_model(directory)
        assert loaded.config == TINY and model_module.read_config(directory) == (TINY, tokenizer)
        assert not loaded.training and all(p.requires_grad for p in loaded.parameters())
        for name, parameter in model.state_dict().items():
            rows = 61 if "wte" in name else None
            assert torch.equal(loaded.state_dict()[name][:rows], parameter[:rows]), name


def test_transformers_opens_a_saved_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    save_model(random_model(), tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    tokens = torch.randint(61, (2, 16))
    assert torch.allclose(theirs(tokens).logits, load_model(tmp_path)(tokens), rtol=1e-4, atol=1e-4)


def test_a_vocabulary_can_be_cut_but_not_extended(tmp_path: Path) -> None:
    """Of a vocabulary that others have padded, only the tokenizer's tokens count."""
    save_random(tmp_path, vocab_size=300)
    tokens = torch.randint(257, (1, 8))
    cut = load_model(tmp_path, vocab_size=257)
    assert torch.equal(cut(tokens), load_model(tmp_path)(tokens)[..., :257])
    with pytest.raises(ValueError, match="300 tokens; 301"):
        load_model(tmp_path, vocab_size=301)


def test_damaged_and_foreign_models_are_refused(tmp_path: Path, capsys: Capture) -> None:
    save_model(random_model(), tmp_path)
    weights = tmp_path / "model.safetensors"
    config = tmp_path / "config.json"
    good = weights.read_bytes()
    settings = json.loads(config.read_text())
    for wrong in (
        {"n_inner": 64},
        {"n_embd": 64},
        {"n_layer": 1},
        {"n_layer": 1001},
        {"n_head": 2.0},
        {"n_positions": 10**30},
    ):
        config.write_text(json.dumps(settings | wrong))
        with pytest.raises(ValueError, match=r"config\.json"):
            load_model(tmp_path)
    config.write_text("[")
    with pytest.raises(ValueError, match=r"config\.json"):
        load_model(tmp_path)
    config.write_text(json.dumps(settings))
    for broken in (good[:-100], b"", b"x" * 5000):
        weights.write_bytes(broken)
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
            load_model(tmp_path)
    weights.unlink()
    for name in (tmp_path, "nothing"):
        assert "is not a model" in refusal(sample.main, capsys, "--model", name)


# Generation


def greedy_without_cache(model: GPT, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """The definition: read the whole context for each token, and continue from its last half when it is full."""
    context = tokens
    new = []
    for _ in range(count):
        new.append(model(context)[:, -1].argmax(-1))
        if context.size(1) == model.config.block_size:
            context = context[:, model.config.block_size - model.config.block_size // 2 :]
        context = torch.cat([context, new[-1][:, None]], dim=1)
    return torch.stack(new, dim=1)


@pytest.mark.parametrize("block_size", [1, 15, 16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_law_4_cache_changes_no_token(block_size: int, device: str) -> None:
    model = random_model(replace(TINY, block_size=block_size)).to(device)
    for batch, prompt in ((1, 1), (1, block_size), (3, min(5, block_size))):
        tokens = torch.randint(61, (batch, prompt), device=device)
        cached = torch.stack(list(generate(model, tokens, 60, temperature=0)), dim=1)  # far past the context
        assert torch.equal(cached, greedy_without_cache(model, tokens, 60))
        assert block_size == 1 or len(cached.unique()) > 5


@pytest.mark.parametrize("how", [(1.0, None, None), (0.7, 5, None), (1.3, None, 0.6), (0.9, 8, 0.5), (1.0, 99, 1.0)])
def test_probabilities_are_those_of_the_definition(how: tuple[float, int | None, float | None]) -> None:
    logits = np.random.default_rng(0).normal(size=(20, 30)) * 2
    temperature, top_k, top_p = how
    wanted = np.exp(logits / temperature)
    for row in wanted:
        order = np.argsort(-row)
        row[order[top_k or 30 :]] = 0
        row /= row.sum()
        if top_p is not None:
            size = 1 + int(np.argmax(np.cumsum(row[order]) >= top_p - 1e-12))  # the smallest set that reaches top_p
            row[order[size:]] = 0
            row /= row.sum()
    probs, tokens = model_module.probabilities(torch.from_numpy(logits), *how)
    np.testing.assert_allclose(torch.zeros(20, 30).scatter(1, tokens, probs), wanted, rtol=1e-4, atol=1e-7)


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0]).expand(200_000, 4)
    draws = model_module.sample_token(logits, 1.0, None, None, torch.Generator().manual_seed(0))
    frequency = torch.bincount(draws, minlength=4) / len(draws)
    assert torch.allclose(frequency, logits[0].softmax(-1), atol=0.005)  # four standard errors


def test_generation_stops_when_every_row_has_drawn_the_stop_token() -> None:
    model = random_model()
    tokens = torch.randint(61, (2, 4), generator=torch.Generator().manual_seed(3))
    free = torch.stack(list(generate(model, tokens, 60, temperature=0)), dim=1)
    stop = next(token for token in free[0] if token in free[1])
    ended = (free == stop).cumsum(dim=1) > 0
    expected = free.clone()
    expected[:, 1:][ended[:, :-1]] = stop  # a row that has ended repeats it
    rows = torch.stack(list(generate(model, tokens, 60, temperature=0, stop_token=int(stop))), dim=1)
    assert torch.equal(rows, expected[:, : int(ended.all(dim=0).int().argmax()) + 1])
    for length in (0, 17):
        with pytest.raises(ValueError, match="must"):
            next(generate(model, torch.zeros(1, length, dtype=torch.int64), 1))


# A server on localhost that behaves as it is told


@pytest.fixture
def site(monkeypatch: Patch) -> Iterator[Site]:
    """A server in place of the hub, without waits between attempts: its url, its content (path -> bytes), its faults (a
    word for each coming request), and the requests so far, as (path, headers)."""
    content = {}
    faults = []
    log = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            log.append((self.path, dict(self.headers)))
            fault = faults.pop(0) if faults else ""
            body = content.get(self.path, b"")
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            first = int(asked[1]) if asked and "ignore range" not in fault else 0
            code = 206 if first else 200
            if self.path not in content:
                code = 404
            if fault in ("503", "429", "busy"):
                code = int(fault.replace("busy", "429"))
            part = body[first:] if code < 400 else b""
            headers = {"Content-Length": len(part)}
            if fault == "busy":
                headers["Retry-After"] = 99999999
            if self.path + " moved" in content:
                code = 302
                headers["Location"] = content[self.path + " moved"].decode()
            if self.path + " next" in content:
                headers["Link"] = f'<{url}{content[self.path + " next"].decode()}>; rel="next"'
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, str(value))
            self.end_headers()
            if fault == "lie":
                part = bytes(len(part))
            if "drop" in fault:
                part = part[: len(part) // 2]
            self.wfile.write(part)
            self.close_connection = True

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    yield Site(url=url, content=content, faults=faults, requests=log)
    server.shutdown()
    thread.join()
    server.server_close()


def test_openai_weights_are_fetched_once_and_checked(site: Site, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret\n")
    monkeypatch.chdir(tmp_path)
    model, listing, page = random_model(), [], "/api/models/openai-community/gpt2/tree/main"
    save_model(model, tmp_path / "hub")
    for path in (tmp_path / "hub").iterdir():
        site.content[f"/cdn/{path.name}"] = data = path.read_bytes()
        moved = f"/openai-community/gpt2/resolve/main/{path.name} moved"
        site.content[moved] = f"{site.url.replace('127.0.0.1', 'localhost')}/cdn/{path.name}".encode()
        lfs = {"oid": hashlib.sha256(data).hexdigest()} if path.name == "model.safetensors" else None
        listing.append({"path": path.name, "size": len(data), "lfs": lfs})
    site.content[page] = json.dumps(listing).encode()
    site.faults[:] = ["", "", "drop"]
    with ThreadPoolExecutor(4) as ranks:  # all want it at once, and one fetches it
        directory = list(ranks.map(prepare_data.model_directory, ["gpt2"] * 4))[3]
    assert torch.equal(load_model(directory)(torch.arange(16)[None]), model(torch.arange(16)[None]))
    assert ["Range" in headers for path, headers in site.requests if path == "/cdn/model.safetensors"] == [False, True]
    assert {p.split("/")[1] for p, h in site.requests if "Bearer secret" in h.values()} == {"api", "openai-community"}
    site.requests.clear()
    prepare_data.model_directory("gpt2")
    assert not site.requests  # it is there
    (directory / "config.json").unlink()  # what is missing or damaged is fetched again
    (directory / "model.safetensors").write_bytes(b"damaged")
    load_model(prepare_data.model_directory("gpt2"))
    shutil.rmtree("data")
    site.faults[:] = ["", "", "lie"]
    with pytest.raises(OSError, match="size or sha256"):
        prepare_data.model_directory("gpt2")
    site.content[page] = json.dumps(listing[:1]).encode()
    with pytest.raises(OSError, match="list"):
        prepare_data.model_directory("gpt2")


@pytest.mark.parametrize("fault", ["ignore range and drop", "busy"])
def test_a_download_without_progress_gives_up(site: Site, tmp_path: Path, monkeypatch: Patch, fault: str) -> None:
    waits, content = [], bytes(range(256)) * 1000
    monkeypatch.setattr(time, "sleep", waits.append)
    site.content["/a"] = content
    file = prepare_data.RawFile("a", len(content), hashlib.sha256(content).hexdigest(), f"{site.url}/a")
    site.faults[:] = ["drop", *[fault] * 50]
    with pytest.raises(OSError, match=r"^a .*again"):
        prepare_data.download(file, tmp_path / "a")
    assert 7 <= len(waits) <= 9 and max(waits) == 60
    assert (tmp_path / "a.part").read_bytes() in (content[: len(content) // 2], content)
    site.faults.clear()
    assert prepare_data.download(file, tmp_path / "a").read_bytes() == content


def test_a_listing_has_a_deadline(site: Site, monkeypatch: Patch) -> None:
    """Endless pages, each of which arrives in time."""
    listing = "/api/models/b/tree/main"
    site.content[listing] = b"[]"
    site.content[f"{listing} next"] = listing.encode()  # its next page is itself
    clock = itertools.count(step=10)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with pytest.raises(OSError, match="list of models/b could not be fetched: TimeoutError"):
        prepare_data.list_hub("models/b")
    assert len(site.requests) < 10


@pytest.mark.parametrize("target", ["/a", "file:///etc/hosts", "http://"])
def test_redirects_that_lead_nowhere_end_at_once(site: Site, tmp_path: Path, target: str) -> None:
    site.content["/a moved"] = target.encode()
    with pytest.raises(OSError, match=r"a could not be fetched: .*check --subset, HF_ENDPOINT and your proxy"):
        prepare_data.download(prepare_data.RawFile("a", 10, "", f"{site.url}/a"), tmp_path / "a")
    assert len(site.requests) <= 31  # requests' limit on redirects, in a single attempt


@pytest.mark.parametrize("address", ["http://user:SECRET@host", "host:SECRET@", "huggingface.co", "http://"])
def test_an_invalid_hub_address_is_refused_and_not_shown(address: str, monkeypatch: Patch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    with pytest.raises(OSError, match="HF_ENDPOINT must be") as problem:
        prepare_data.list_hub("models/b")
    assert "SECRET" not in str(problem.value)


@pytest.mark.parametrize("token", ["\ufeffsecret", "sec\nret"])  # as editors save a file
def test_an_invalid_token_is_refused_and_not_shown(site: Site, token: str, monkeypatch: Patch) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(OSError, match="HF_TOKEN") as problem:
        prepare_data.list_hub("models/b")
    assert "cret" not in str(problem.value) and not site.requests


# Preparing data


def prepare(out: Path, *options: object) -> Path:
    prepare_data.main(["--out", str(out), "--tokenizer", "byte", *(str(option) for option in options)])
    return out


def read_shards(directory: Path, *splits: str) -> np.ndarray:
    """The tokens of some splits, or of both, by the format's description: 256 int32 of header, then uint16."""
    pieces = []
    for path in (path for split in splits or ("val", "train") for path in sorted(directory.glob(f"{split}_*.bin"))):
        header = np.fromfile(path, dtype="<i4", count=256)
        assert (header[:2] == [20240520, 1]).all() and not header[3:].any()
        pieces.append(np.fromfile(path, dtype="<u2", offset=1024))
        assert len(pieces[-1]) == header[2]
    return np.concatenate(pieces)


def documents(count: int = 400) -> list[str]:
    """Texts of many lengths, with everything in them that a tokenizer could stumble over."""
    rng = np.random.default_rng(0)
    words = ["<|endoftext|>", "the", "Ünïcödé", "日本語", "🙂", "\n\n", "  ", "a\r\nb", "don't", "1234", "\t"]
    return [" ".join(rng.choice(words[i % 3 > 0 :], size=int(rng.integers(1, 200)))) for i in range(count)]


def as_jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_bytes(as_jsonl([{"text": text} for text in texts]))
    return path


def byte_tokens(texts: list[str]) -> np.ndarray:
    """What the byte tokenizer must make of documents: 256, then the bytes of the text."""
    return np.concatenate([np.array([256, *text.encode()], dtype=np.uint16) for text in texts])


def as_parquet(rows: int = 100, **columns: list) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), file, row_group_size=rows)
    return file.getvalue()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.txt"])
def test_every_format_gives_the_tokens_of_its_texts(name: str, tmp_path: Path, capsys: Capture) -> None:
    texts = documents()
    jsonl = write_jsonl(tmp_path / "a.jsonl", [*texts[:50], "", *texts[50:]]).read_bytes()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl)  # a byte-order mark is no text
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + jsonl + b'\n{"text": null}\n'))
    (tmp_path / "a.parquet").write_bytes(as_parquet(30, id=[*range(401)], text=[*texts, None]))
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + "".join(texts).encode())
    out = prepare(tmp_path / "out", "--input", tmp_path / name, "--shard-tokens", "50k", "--val-tokens", "10k")
    marks = "".join(texts).count("<|endoftext|>")
    if name == "a.txt":  # there it separates documents
        texts = list(filter(None, "".join(texts).split("<|endoftext|>")))
    else:
        assert f"{name} has {marks:,} <|endoftext|> in its texts" in capsys.readouterr().err
    assert marks > 50
    assert len(read_shards(out, "val")) == 10_000
    assert np.array_equal(read_shards(out), byte_tokens(texts))
    meta = json.loads((out / "meta.json").read_text())
    assert (meta["tokenizer"], meta["vocab_size"]) == ("byte", 257)
    for split in ("val", "train"):
        tokens = read_shards(out, split)
        counted = meta[split]
        assert counted["tokens"] == len(tokens) == counted["documents"] + counted["bytes"]
        assert counted["documents"] == (tokens == 256).sum()
    assert sorted(path.name for path in out.iterdir() if path.suffix != ".bin") == [".lock", "SHA256SUMS", "meta.json"]


def test_end_of_text_separates_the_documents_of_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(
        b"one\n<|endoftext|>\ntwo\n<|endoftext|>\r\n\nthree<|endoftext|>four<|endoftext|>\n"
    )
    texts = ["one\n", "two\n", "\nthree", "four"]
    assert list(filter(None, prepare_data.read_texts(tmp_path / "a.txt"))) == texts


def test_cutting_long_white_space_changes_no_token() -> None:
    """With GPT-2's own pattern, and every pair of the texts' bytes as a token, so that a wrong cut would show."""
    rng = np.random.default_rng(0)
    words = ["the", " ", "\n", "\u00a0", "\x1c", "\x85", "\u3000", "'s", "é", " " * 1500, "\n" * 1200, "\t \n" * 700]
    texts = ["".join(rng.choice(words, size=1000)), (" " * 999 + "a") * 1000]
    pairs = {bytes(pair) for text in texts for pair in itertools.pairwise(text.encode())}
    ranks = {token: i for i, token in enumerate([bytes([i]) for i in range(256)] + sorted(pairs))}
    special = {"<|endoftext|>": len(ranks)}
    published, tokenizer = (
        tiktoken.Encoding("pairs", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        for pattern in (r50k_pat_str, prepare_data.GPT2_PATTERN)
    )
    for text in (*texts, *documents()):
        assert prepare_data.tokenize([text], tokenizer)[1:].tolist() == published.encode_ordinary(text)
    endless = "a" + " " * 1_000_000 + "b" + "\n" * 1_000_000  # too much for tiktoken at once, except at the end
    assert tokenizer.decode(prepare_data.tokenize([endless], tokenizer)[1:].tolist()) == endless


def fill_tokenizer_cache(directory: Path, monkeypatch: Patch) -> None:
    """Files in place of OpenAI's where tiktoken looks for them."""
    for name in ("encoder.json", "vocab.bpe"):
        address = f"{prepare_data.GPT2_ENCODING}/{name}"
        (directory / hashlib.sha1(address.encode()).hexdigest()).write_text(f"this is {name}")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(directory))


def test_tokenizer_files_are_those_of_openai_or_spell_bytes_as_they_do(tmp_path: Path, monkeypatch: Patch) -> None:
    for name, content in prepare_data.tokenizer_files("byte", 1024).items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    files = (str(tmp_path / "merges.txt"), str(tmp_path / "vocab.json"))
    ranks = data_gym_to_mergeable_bpe_ranks(*files, clobber_one_byte_tokens=True)
    assert ranks == {bytes([i]): i for i in range(256)}
    assert json.loads((tmp_path / "vocab.json").read_text())["<|endoftext|>"] == 256
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 1024
    fill_tokenizer_cache(tmp_path, monkeypatch)
    gpt2 = prepare_data.tokenizer_files("gpt2", 1024)
    assert gpt2["vocab.json"] == b"this is encoder.json" and gpt2["merges.txt"] == b"this is vocab.bpe"


def serve_hub(site: Site, texts: list[str]) -> list[str]:
    """Put texts on a server as the hub serves them: three Parquet files of FineWeb-Edu's sample-10BT, two of which have
    the same base name, listed on two pages. Returns their addresses."""
    fineweb, entries, size = "/datasets/HuggingFaceFW/fineweb-edu", [], len(texts) // 3
    for i, name in enumerate(("000_00000", "a/001_00000", "b/001_00000")):
        data = as_parquet(size // 7, text=texts[size * i : size * (i + 1)])
        path, lfs = f"sample/10BT/{name}.parquet", {"oid": hashlib.sha256(data).hexdigest()}
        site.content[f"{fineweb}/resolve/main/{path}"] = data
        entries.append({"path": path, "size": len(data), "lfs": lfs})
    listing = f"/api{fineweb}/tree/main/sample/10BT"
    site.content[listing] = json.dumps(entries[:2]).encode()
    site.content[f"{listing} next"] = f"{listing}?cursor=2".encode()
    site.content[f"{listing}?cursor=2"] = json.dumps([*entries[2:], {"path": "README.md", "size": 1}]).encode()
    return [f"{fineweb}/resolve/main/{entry['path']}" for entry in entries]


def test_law_5_shards_do_not_depend_on_workers_or_on_kills(site: Site, tmp_path: Path) -> None:
    texts, killed = documents(3000), tmp_path / "killed"
    serve_hub(site, texts)
    options = ["--shard-tokens", "16k", "--val-tokens", "20k"]
    one, *others = [prepare(tmp_path / str(workers), *options, "--workers", workers) for workers in (1, 2, 5)]
    names = {path.name for path in one.iterdir()}
    assert len(names) > 50
    for shards in (1, 10, 11, 30):  # killed as soon as it has written so many
        site.faults[:] = ["", "", "drop", "", "drop"]
        with running("prepare_data.py", "--out", killed, "--tokenizer", "byte", *options, lines=shards, word=".bin: "):
            pass
    sums = prepare(killed, *options) / "SHA256SUMS"  # as if killed just before its end
    sums.write_text("".join(line for line in sums.read_text().splitlines(True) if "meta.json" not in line))
    for other in (*others, prepare(killed, *options)):
        assert {path.name for path in other.iterdir()} == names
        assert all((other / name).read_bytes() == (one / name).read_bytes() for name in names)
    assert np.array_equal(read_shards(killed), byte_tokens(texts))


def test_fineweb_is_fetched_through_faults(site: Site, tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    texts = documents(3000)
    addresses = serve_hub(site, texts)
    site.faults[:] = ["503", "", "", "503", "429", "drop", "drop", "ignore range", "drop"]  # the first page, the next
    out = prepare(tmp_path / "out", "--shard-tokens", "50k", "--val-tokens", "10k")
    assert np.array_equal(read_shards(out), byte_tokens(texts)) and not (out / ".prepare_data").exists()
    assert not site.faults and any("Range" in headers for _, headers in site.requests)
    site.requests.clear()
    prepare(tmp_path / "small", "--max-tokens", "20k")  # which needs the first file only
    assert [path for path, _ in site.requests if path.endswith(".parquet")] == addresses[:1]
    site.faults[:] = ["", "", "lie"]
    options = "--tokenizer", "byte", "--out"
    assert re.search("000_00000.parquet.*sha256", refusal(prepare_data.main, capsys, *options, tmp_path / "lied"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert "ConnectionError" in refusal(prepare_data.main, capsys, *options, tmp_path / "nothing")


def test_a_full_disk_ends_in_one_line_and_loses_nothing(tmp_path: Path, capsys: Capture) -> None:
    options = ["--input", write_jsonl(tmp_path / "a.jsonl", documents()), "--shard-tokens", "50k"]
    with limited(resource.RLIMIT_FSIZE, 60_000):
        message = refusal(prepare_data.main, capsys, "--out", tmp_path / "out", "--tokenizer", "byte", *options)
    assert "000000.bin: File too large" in message
    assert np.array_equal(read_shards(prepare(tmp_path / "out", *options)), byte_tokens(documents()))


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """Peak memory, as the operating system reports it, of preparing a text and ten times as much text."""
    prepare_and_tell, peaks = "import prepare_data; prepare_data.main(); print(*open('/proc/self/status'))", []
    for copies in (10, 100):
        source = write_jsonl(tmp_path / f"{copies}.jsonl", documents() * copies)
        options = ["--input", source, "--tokenizer", "byte", "--out", tmp_path / str(copies)]
        options += ["--shard-tokens", "1M", "--val-tokens", "1M"]
        command = [sys.executable, "-c", prepare_and_tell, *options, "--workers", "2"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=True)
        peaks.append(int(re.search(r"VmHWM:\s+(\d+)", done.stdout)[1]))
    assert peaks[1] < 1.1 * peaks[0], peaks


def test_a_directory_that_is_finished_or_not_ours_is_left_alone(tmp_path: Path, capsys: Capture) -> None:
    out, foreign, source = tmp_path / "out", tmp_path / "foreign", write_jsonl(tmp_path / "a.jsonl", documents() * 5)
    same = ["--tokenizer", "byte", "--input", source, "--workers", 8, "--max-tokens"]

    def refused(directory: Path, most: str) -> str:
        return refusal(prepare_data.main, capsys, "--out", directory, *same, most)

    prepare(out, *same, "50k")
    assert (len(read_shards(out, "val")), len(read_shards(out, "train"))) == (5_000, 45_000)
    before = contents(out)
    prepare(out, *same, "50k")
    assert "max_tokens was 50000" in refused(out, "60k")
    assert contents(out) == before
    (out / "train_000000.bin").unlink()
    assert "train_000000.bin" in refused(out, "50k")
    foreign.mkdir()
    (foreign / "train_000000.bin").write_bytes(b"not ours")
    assert "this script did not write" in refused(foreign, "50k")
    (foreign / "meta.json").write_text('{"tokenizer": "byte"}')  # of an older version, say
    assert "meta.json" in refused(foreign, "50k")
    assert (foreign / "train_000000.bin").read_bytes() == b"not ours"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("cut.parquet", as_parquet(text=["a"])[:-20], ""),
        ("body.parquet", as_parquet(body=["a"]), "text"),
        ("number.parquet", as_parquet(text=[1, 2]), "text"),
        ("large.parquet", as_parquet(text=["a" * 10**6]), "200,000 bytes"),
        ("line.jsonl", b'{"text": "good"}\n\n{"text": "cut\n', "line 3"),
        ("deep.jsonl", b"[" * 10**5, "line 1"),
        ("half.jsonl", b'{"text": "good"}\n{"text": "half \\ud800"}\n', "line 2"),
        ("large.jsonl", b'{"text": "a"}\n{"text": "' + b"a" * 10**6 + b'"}', "line 2.*200,000 bytes"),
        ("large.jsonl.gz", gzip.compress(b'{"text": "' + b"a" * 10**6 + b'"}'), "line 1.*200,000 bytes"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 100)[:-10], "line 94"),
        ("large.txt", b"a" * 10**6, "200,000 bytes"),
        ("bytes.txt", b"good \xff", "position 5"),
    ],
)
def test_bad_text_is_named(name: str, content: bytes, said: str, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(prepare_data, "MOST_BYTES", 200_000)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*{said}"):
        list(prepare_data.read_texts(tmp_path / name))


def test_what_cannot_be_prepared_ends_in_one_line(tmp_path: Path, capsys: Capture) -> None:
    for name, content, said in (
        ("bytes.txt", b"\xff", "cannot be read"),
        ("empty.txt", b"", "has no text"),
        ("blank.jsonl", b"\n", "has no text"),
        ("text.doc", b"?", "is not a file of a known format"),
    ):
        (tmp_path / name).write_bytes(content)
        command = ["--input", tmp_path / name, "--out", tmp_path / f"of {name}", "--tokenizer", "byte"]
        assert f"{name} {said}" in refusal(prepare_data.main, capsys, *command)
    for options in ("--max-tokens many", f"--max-tokens {9**400}", "--workers 0", "--source demo --input a", "a.txt"):
        refusal(prepare_data.main, capsys, *options.split(), status=2)
    _, error = run("prepare_data.py", "--input", tmp_path / "none.txt", status=1, cwd=tmp_path)
    assert error == f"prepare_data.py: error: {tmp_path / 'none.txt'} does not exist, or is not a file\n"
    assert not (tmp_path / "data").exists()


def test_a_tenth_is_for_validation_by_default(tmp_path: Path) -> None:
    rows = [{"url": "x" * 1000, "text": "few"} for _ in range(100)]  # the size of the file says little
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(rows))
    out = prepare(tmp_path / "out", "--input", tmp_path / "a.jsonl", "--shard-tokens", "50")
    assert len(read_shards(out, "val")) == 40
    assert len(read_shards(out, "train")) == 360


def test_a_corpus_may_be_all_validation_if_asked_for(tmp_path: Path, capsys: Capture) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", documents(20))
    out = prepare(tmp_path / "out", "--input", source, "--val-tokens", "1M")
    assert np.array_equal(read_shards(out, "val"), byte_tokens(documents(20)))
    command = capsys.readouterr().out.strip().split("python train.py ")[1].replace("MODEL", str(tmp_path / "model"))
    save_random(tmp_path / "model")
    run("train.py", *command.split(), "--sequence-length", 32)


def test_continuing_checks_what_is_there(tmp_path: Path, capsys: Capture) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", documents())
    options = ["--tokenizer", "byte", "--input", source, "--shard-tokens", "10k", "--val-tokens", "20k"]
    whole = prepare(tmp_path / "whole", *options)
    sums = (whole / "SHA256SUMS").read_text()
    unfinished = "".join(line for line in sums.splitlines(True) if "meta.json" not in line)
    for finished in (True, False):
        for name, damage in (
            ("train_000001.bin", flip),
            ("train_000001.bin", Path.unlink),
            ("val_000000.bin", lambda path: os.truncate(path, 5000)),
            ("SHA256SUMS", Path.unlink),
            ("SHA256SUMS", lambda path: os.truncate(path, 0)),
            ("SHA256SUMS", lambda path: path.write_text(path.read_text().replace("\n", "\n  "))),
            ("SHA256SUMS", lambda path: path.write_text("\n".join(path.read_text().splitlines()[:-1]))),
        ):
            out = shutil.copytree(whole, tmp_path / "out")
            (out / "SHA256SUMS").write_text(sums if finished else unfinished)
            damage(out / name)
            before = contents(out)
            assert "prepare it again" in refusal(prepare_data.main, capsys, "--out", out, *options)
            assert contents(out) == before
            shutil.rmtree(out)
    (whole / "SHA256SUMS").write_text(sums.replace("  ", " *"))  # as sha256sum --binary writes it
    prepare(whole, *options)


def test_an_impossible_position_is_refused(tmp_path: Path, capsys: Capture) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", documents())
    options = ["--out", tmp_path / "out", "--tokenizer", "byte", "--input", source, "--shard-tokens", "10k"]
    with running("prepare_data.py", *options, lines=1, word=".bin: "):
        pass
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    for position in ([0, 0, -5], [-1, 0, 0], [2, 0, 0], [0, 10**6, 0], [0, 0, 10**9], [0, 0], "x"):
        (tmp_path / "out" / "meta.json").write_text(json.dumps(meta | {"position": position}))
        assert "meta.json" in refusal(prepare_data.main, capsys, *options)


def test_an_input_that_changes_is_not_continued(tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", documents())
    options = ["--tokenizer", "byte", "--input", source, "--shard-tokens", "10k", "--out"]
    changed = "a.jsonl has changed since its preparation began; restore it"

    def write_and_change(*args: Any) -> None:
        original(*args)
        source.write_bytes(source.read_bytes().replace(b"the", b"THE"))

    original = prepare_data.add_shard
    with monkeypatch.context() as patched:
        patched.setattr(prepare_data, "add_shard", write_and_change)
        assert changed in refusal(prepare_data.main, capsys, *options, tmp_path / "out")
    assert "source was" in refusal(prepare_data.main, capsys, *options, tmp_path / "out")
    write_jsonl(source, documents())  # restored, and no shard is of the changed text
    prepare_data.main([str(option) for option in (*options, tmp_path / "out")])
    assert np.array_equal(read_shards(tmp_path / "out"), byte_tokens(documents()))


def test_the_users_own_files_survive(tmp_path: Path) -> None:
    mine = tmp_path / ".work" / "mine", tmp_path / ".demo.jsonl"
    mine[0].parent.mkdir()
    for path in mine:
        path.write_text("mine")
    prepare(tmp_path, "--source", "demo")
    assert [path.read_text() for path in mine] == ["mine", "mine"]
    assert [path.name for path in mine[0].parent.iterdir()] == ["mine"]


def test_ctrl_c_ends_a_preparation_at_once(tmp_path: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell may ignore it
    (tmp_path / "a.txt").write_bytes(b"a" * 100_000_000 + b"<|endoftext|>" + b"b" * 100_000_000)
    process = start("prepare_data.py", "--tokenizer", "byte", "--input", tmp_path / "a.txt", "--out", tmp_path / "out")
    while not (tmp_path / "out" / "meta.json").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=10) == ("", "")
    assert process.returncode == 130


def task_lines(count: int) -> dict[str, list[dict]]:
    """Tasks as HellaSwag and LAMBADA publish theirs, of random short words."""
    rng = np.random.default_rng(1)

    def words(least: int, most: int) -> str:
        return " ".join("".join(rng.choice([*"aeioübd"], size=3)) for _ in range(rng.integers(least, most)))

    hellaswag = [{"ctx": words(1, 9), "endings": [words(1, 5) for _ in range(4)], "label": i % 4} for i in range(count)]
    return {"hellaswag": hellaswag, "lambada": [{"text": words(2, 12)} for _ in range(count)]}


def test_evaluation_sets_are_fetched_with_the_default_corpus(site: Site, tmp_path: Path, monkeypatch: Patch) -> None:
    for name, rows in task_lines(30).items():
        site.content[f"/{name}"] = data = as_jsonl(rows)
        sha256, url = hashlib.sha256(data).hexdigest(), f"{site.url}/{name}"
        served = prepare_data.FILES[name]._replace(size=len(data), sha256=sha256, url=url)
        monkeypatch.setitem(prepare_data.FILES, name, served)
    serve_hub(site, documents(300))
    monkeypatch.chdir(tmp_path)
    prepare_data.main(["--tokenizer", "byte", "--val-tokens", "1k", "--workers", "1"])
    assert {path.name for path in Path("data").iterdir()} == {"fineweb-edu", "hellaswag", "lambada"}
    site.requests.clear()
    prepare_data.main(["--source", "lambada"])
    assert not site.requests  # it is there
    path, tokenizer = Path("data/hellaswag/hellaswag_val.jsonl"), prepare_data.get_tokenizer("byte")
    assert len(train.read_tasks("hellaswag", path, tokenizer, 7).rows) == 4 * 7
    flip(path)
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        train.read_tasks("hellaswag", path, tokenizer, 7)


# Training

SETTINGS = {
    "n_layer": 2, "n_head": 2, "n_embd": 32, "device": "cpu", "dtype": "float32", "sequence_length": 32,
    "micro_batch_size": 4, "total_batch_tokens": 512, "steps": 6, "warmup_steps": 2, "max_lr": 1e-2, "min_lr": 1e-3,
    "eval_every": 3, "eval_tokens": 2000, "sample_every": 0, "checkpoint_every": 3,
}  # fmt: skip


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the byte tokenizer, three for training and one for validation, and beside them the evaluation sets."""
    directory = tmp_path_factory.mktemp("data")
    for name, rows in task_lines(12).items():
        (directory / name).mkdir()
        (directory / name / prepare_data.FILES[name].name).write_bytes(as_jsonl(rows))
    source = write_jsonl(directory / "a.jsonl", documents(120))
    amounts = ["--val-tokens", "3k", "--max-tokens", "50k", "--shard-tokens", "20k"]
    return prepare(directory / "shards", "--input", source, *amounts)


def flags(shards: Path, out: Path, **changes: object) -> list[str]:
    """The command line of a run."""
    settings = SETTINGS | {"data": shards, "out": out} | changes
    return [f"--{name.replace('_', '-')}{'' if v is True else f'={v}'}" for name, v in settings.items()]


def run_main(*options: object) -> None:
    """train.py in this process, which must succeed."""
    with pytest.raises(SystemExit) as ending:
        train.main([str(option) for option in options])
    assert ending.value.code == 0


def run_train(shards: Path, out: Path, **changes: object) -> Path:
    """A run in this process; its last checkpoint."""
    run_main(*flags(shards, out, **changes))
    return checkpoints(out)[-1]


def read_log(out: Path) -> list[dict]:
    """The lines of metrics.jsonl after the settings, without what depends on time or the machine."""
    first, *lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert first["config"]["seed"] == 1337
    assert all(line["seconds"] >= 0 for line in lines)
    varying = ("tokens_per_second", "seconds", "mfu", "memory_gb")
    return [{name: line[name] for name in line if name not in varying} for line in lines]


def losses(out: Path) -> list[float]:
    return [line["train_loss"] for line in read_log(out) if "train_loss" in line]


def assert_same_log(first: Path, second: Path, tolerance: float) -> None:
    for one, two in zip(read_log(first), read_log(second), strict=True):
        assert one == pytest.approx(two, rel=tolerance)


def assert_same_weights(first: Path, second: Path, tolerance: float = 0.0) -> None:
    one, other = (load_numpy(checkpoint / "model.safetensors") for checkpoint in (first, second))
    assert one.keys() == other.keys()
    for name in one:
        if tolerance and name.endswith("c_attn.bias"):
            # The bias of the keys moves all scores of a query alike: its gradient is rounding, which Adam blows up.
            one[name], other[name] = (np.split(w[name], 3)[::2] for w in (one, other))
        np.testing.assert_allclose(one[name], other[name], rtol=0, atol=tolerance, err_msg=name)


def assert_same_run(first: Path, second: Path) -> None:
    """Weights, optimizer state and log are the same, bit for bit."""
    assert_same_weights(first, second)
    states = [torch.load(path / "trainer.pt", weights_only=True)["optimizer"] for path in (first, second)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    one, other = (state["state"] for state in states)
    assert one.keys() == other.keys() and len(one) > 10
    assert all(torch.equal(one[i][part], other[i][part]) for i in one for part in ("exp_avg", "exp_avg_sq", "step"))
    assert read_log(first.parent) == read_log(second.parent)


def when_called(name: str, call: int, action: Callable) -> None:
    """Do something when a function of train.py is called for the n-th time in this process. The loop asks for the
    `learning_rate` once in each update."""
    function = getattr(train, name)
    calls = itertools.count(1)

    def called(*args: Any) -> Any:
        if next(calls) == call:
            action()
        return function(*args)

    setattr(train, name, called)


def be_rank(place: dict[str, str], options: list[str], stop: tuple | None, output: Path | str) -> None:
    os.environ |= place
    if stop:
        when_called(*stop[:2], lambda: os.kill(os.getpid(), stop[2]))
    with open(output, "w") as file, contextlib.redirect_stdout(file):
        train.main(options)


def start_ranks(ranks: int, *options: object, output: Path | str = os.devnull, **stops: tuple) -> list[Any]:
    """train.py in processes that find each other as torchrun's do. `rank0` and so on are (function, n, signal): that
    rank sends itself the signal when the function is called for the n-th time."""
    meeting = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = []
    for rank in range(ranks):
        place = meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        args = place, [str(option) for option in options], stops.get(f"rank{rank}"), output
        started.append(FORKS.Process(target=be_rank, args=args, daemon=True))
        started[-1].start()
    return started


def statuses(processes: list[Any]) -> list[int]:
    return [process.join(TIMEOUT) or process.exitcode for process in processes]


def test_learning_rate_rises_from_zero_and_falls_as_a_cosine() -> None:
    config = replace(train.TrainConfig(), steps=110, warmup_steps=10, max_lr=1.0, min_lr=0.1)
    rates = [train.learning_rate(step, config) for step in range(111)]
    assert rates[0] == 0
    assert rates[5] == pytest.approx(0.5)
    assert rates[10] == 1
    assert rates[35] == pytest.approx(0.55 + 0.45 * math.sqrt(0.5))
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_each_sequence_is_used_once_an_epoch_and_the_step_decides_which(data: Path) -> None:
    config = replace(train.TrainConfig(), sequence_length=32, total_batch_tokens=32 * 100, seed=5)
    split = prepare_data.open_split(data, "train", 32)
    shards = [np.fromfile(path, dtype="<u2", offset=1024) for path in split.paths]
    cut = [shard[i * 32 : i * 32 + 33] for shard in shards for i in range((len(shard) - 1) // 32)]
    total = split.sequences
    assert len(shards) == 3
    assert np.array_equal(prepare_data.read_sequences(split, np.arange(total)), np.stack(cut))
    stream = np.concatenate([train.batch_indices(split, config, step) for step in range(1, 2 * total // 100 + 2)])
    first = stream[:total]
    second = stream[total : 2 * total]
    assert sorted(first) == sorted(second) == list(range(total))
    assert not np.array_equal(first, second) and not np.array_equal(first, np.sort(first))
    assert np.array_equal(train.batch_indices(split, config, 7), stream[600:700])
    assert not np.array_equal(train.batch_indices(split, replace(config, seed=6), 7), stream[600:700])
    whole = replace(config, total_batch_tokens=32 * 3 * total)  # a batch of three epochs
    assert (np.bincount(train.batch_indices(split, whole, 1)) == 3).all()
    for ranks, size in [(1, 100), (2, 10), (4, 5), (20, 5)]:
        places = [train.Process(rank, ranks, torch.device("cpu"), None, None) for rank in range(ranks)]
        parts = torch.stack([train.load_batch(split, config, size, place, 7) for place in places], dim=1)
        assert parts.shape == (100 // ranks // size, ranks, size, 33)
        assert np.array_equal(parts.reshape(100, 33).numpy(), np.stack([cut[i] for i in stream[600:700]]))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_law_2_how_a_batch_is_divided_changes_nothing(device: str, data: Path, tmp_path: Path) -> None:
    changes = {"init_from": save_random(tmp_path / "start"), "steps": 4, "eval_every": 2, "grad_clip": 0.5}
    changes |= {"device": device, "no_compile": True}
    tolerance = 5e-5 if device == "cpu" else 1e-3  # Adam blows up what differs in small gradients
    ranks = start_ranks(2 if device == "cpu" else 1, *flags(data, tmp_path / "ranks", **changes))
    whole = run_train(data, tmp_path / "whole", **changes | {"micro_batch_size": 16})
    run_train(data, tmp_path / "pieces", **changes | {"micro_batch_size": 2})
    assert not any(statuses(ranks))
    for other in ("pieces", "ranks"):
        assert_same_weights(whole, tmp_path / other / whole.name, tolerance)
        assert_same_log(tmp_path / "whole", tmp_path / other, tolerance / 5)


def test_law_6_losses_and_updates_are_those_of_a_plain_loop(data: Path, tmp_path: Path) -> None:
    """Two ranks, two passes and dropout, against PyTorch's own AdamW and clipping on the whole batch."""
    changes = {"dropout": 0.2, "grad_clip": 0.5, "steps": 4, "weight_decay": 0.3, "beta2": 0.9}
    ranks = start_ranks(2, *flags(data, tmp_path / "out", init_from=save_random(tmp_path / "start"), **changes))
    model = load_model(tmp_path / "start", dropout=0.2).train()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.9), eps=1e-8)
    config = replace(train.TrainConfig(), **SETTINGS | changes)
    split = prepare_data.open_split(data, "train", 32)
    logged = []
    for step in range(1, 5):
        batch = prepare_data.read_sequences(split, train.batch_indices(split, config, step))
        batch = torch.from_numpy(batch).view(2, 2, 4, 33)  # (passes, ranks, sequences, T + 1)
        loss = torch.zeros(())
        for rank in range(2):
            torch.manual_seed(int(np.random.SeedSequence([1337, step, rank]).generate_state(1)[0]))
            for sequences in batch[:, rank]:
                logits = model(sequences[:, :-1])
                part = F.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten()) / 4
                part.backward()
                loss += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        lr = {1: 0.005, 2: 0.01, 3: 0.0055, 4: 0.001}[step]
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        logged.append({"step": step, "train_loss": loss.item(), "lr": lr, "grad_norm": norm.item()})
    assert statuses(ranks) == [0, 0]
    updates = [line for line in read_log(tmp_path / "out") if "train_loss" in line]
    assert [pytest.approx(line, rel=1e-4) for line in logged] == updates
    assert all(line["grad_norm"] > 0.6 for line in logged)  # each was clipped
    save_model(model, tmp_path / "plain", "byte")
    assert_same_weights(tmp_path / "plain", tmp_path / "out" / "step_000004", tolerance=1e-5)


@pytest.mark.parametrize(("ranks", "dtype"), [(1, "bfloat16"), (2, "float32")])
def test_law_3_interrupted_run_equals_uninterrupted(ranks: int, dtype: str, data: Path, tmp_path: Path) -> None:
    changes = {"steps": 20, "checkpoint_every": 4, "eval_every": 10, "dropout": 0.1, "log_every": 3, "dtype": dtype}
    out = tmp_path / "killed"
    whole = start_ranks(ranks, *flags(data, tmp_path / "whole", **changes))
    for name, call, signum, status, newest in (
        ("learning_rate", 7, signal.SIGTERM, 128 + signal.SIGTERM, 7),  # between two checkpoints, and two log entries
        ("score_rows", 3, signal.SIGINT, 128 + signal.SIGINT, 10),  # in the evaluation after update 10
        ("learning_rate", 5, signal.SIGKILL, -signal.SIGKILL, 12),  # in update 15
    ):
        stop = {f"rank{ranks - 1}": (name, call, signum)}
        processes = start_ranks(ranks, *flags(data, out, **changes, resume=True), **stop)
        last, *others = reversed(statuses(processes))
        assert last == status
        assert signum == signal.SIGKILL or others == [128 + signal.SIGTERM] * (ranks - 1)
        assert checkpoints(out)[-1].name == f"step_{newest:06d}"
    assert not any(statuses(start_ranks(ranks, "--out", out, "--resume") + whole))  # it knows its settings
    assert checkpoints(out)[-2:] == [out / "step_000016", out / "step_000020"]
    assert_same_run(out / "step_000020", tmp_path / "whole" / "step_000020")


def test_law_3_torchrun_restarts_a_killed_worker(data: Path, tmp_path: Path) -> None:
    changes = {"steps": 10, "checkpoint_every": 3, "total_batch_tokens": 256}
    whole = start_ranks(2, *flags(data, tmp_path / "whole", **changes))
    dies = tmp_path / "dies.py"
    dies.write_text("""
import os, sys, test_model, train
if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
    test_model.when_called("learning_rate", 8, lambda: os.kill(os.getpid(), 9))
train.main(sys.argv[1:])
""")
    torchrun = ["torchrun", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    said, _ = run(*torchrun, dies, *flags(data, tmp_path / "healed", **changes, resume=True))
    assert said.count("resumed from") == 1
    assert statuses(whole) == [0, 0]
    assert_same_run(tmp_path / "healed" / "step_000010", tmp_path / "whole" / "step_000010")


def test_restarted_workers_do_not_find_the_addresses_of_dead_ones(monkeypatch: Patch) -> None:
    """Each round has names of its own in torchrun's store, which outlives its workers."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {
        "WORLD_SIZE": 1,
        "LOCAL_WORLD_SIZE": 1,
        "RANK": 0,
        "TORCHELASTIC_USE_AGENT_STORE": True,
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    names = set()
    for count in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        train.start_process(replace(train.TrainConfig(), device="cpu"))
        torch.distributed.destroy_process_group()
        new = set(store.list_keys()) - names
        assert new and all(f"{count}/" in name for name in new)
        names |= new


@needs_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_law_3_on_a_gpu_a_resumed_run_is_the_same_to_rounding(dtype: str, data: Path, tmp_path: Path) -> None:
    changes = {"device": "cuda", "dtype": dtype, "checkpoint_every": 3, "max_lr": 1e-3}
    run_train(data, tmp_path / "whole", **changes)
    run_train(data, tmp_path / "half", **changes)
    shutil.rmtree(tmp_path / "half" / "step_000006")
    run_train(data, tmp_path / "half", **changes, resume=True)
    assert losses(tmp_path / "half") == pytest.approx(losses(tmp_path / "whole"), abs=0.01)
    assert losses(tmp_path / "whole")[-1] < losses(tmp_path / "whole")[0] - 0.1


def test_a_run_resumes_on_more_ranks_and_with_a_sharded_optimizer(data: Path, tmp_path: Path) -> None:
    changes = {"checkpoint_every": 2, "eval_every": 2}
    moved = tmp_path / "moved"
    stop = "learning_rate", 2, signal.SIGTERM
    assert statuses(start_ranks(1, *flags(data, moved, **changes), rank0=stop)) == [128 + signal.SIGTERM]
    machine = ["torchrun", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d"]
    machine += [f"--rdzv_endpoint=127.0.0.1:{free_port()}", ROOT / "train.py"]
    machine += flags(data, moved, **changes | {"micro_batch_size": 2}, resume=True, zero=True)
    agents = [start(*machine) for _ in range(2)]
    whole = run_train(data, tmp_path / "whole", **changes)
    outputs = [agent.communicate(timeout=TIMEOUT)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert sum("6 steps done" in output for output in outputs) == 1  # rank 0 alone speaks
    assert_same_weights(whole, moved / "step_000006", tolerance=1e-4)
    shutil.rmtree(moved / "step_000006")  # written by two ranks with half of the optimizer each, and resumed by one
    assert_same_weights(whole, run_train(data, moved, **changes, resume=True), tolerance=1e-4)
    assert_same_log(tmp_path / "whole", moved, tolerance=1e-4)


def definition(model: Path, data: Path) -> dict[str, float]:
    """The metrics of an evaluation by their definitions: a row at a time, in float64."""

    def score(tokens: np.ndarray, count: int) -> tuple[np.ndarray, bool]:
        """The losses of the last `count` tokens, and whether each was the most likely."""
        logits = numpy_gpt2(model, tokens[None, :-1])[0, -count:]
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        hits = logits.argmax(-1) == tokens[-count:]
        return -log_probs[np.arange(count), tokens[-count:]], hits.all()

    def ending(context: str, text: str) -> tuple[np.ndarray, bool]:
        tokens = np.array([*f"{context} {text}".encode()])[-41:]  # as much as fits
        return score(tokens, len(f" {text}".encode()))

    tasks = task_lines(12)
    scores = [[ending(task["ctx"], text)[0] for text in task["endings"]] for task in tasks["hellaswag"]]
    words = [ending(*task["text"].rsplit(" ", 1)) for task in tasks["lambada"]]
    labels = [task["label"] for task in tasks["hellaswag"]]
    val = read_shards(data, "val").astype(np.int64)[: 62 * 32 + 1]  # 2000 tokens, in whole sequences
    values = {
        "val_loss": [score(val[i * 32 : i * 32 + 33], 32)[0].mean() for i in range(62)],
        "hellaswag_acc": np.array([np.argmin([nats.sum() for nats in task]) for task in scores]) == labels,
        "hellaswag_acc_norm": np.array([np.argmin([nats.mean() for nats in task]) for task in scores]) == labels,
        "lambada_acc": [right for _, right in words],
    }
    metrics = {name: np.mean(each) for name, each in values.items()}
    metrics |= {f"{name}_se": np.std(each, ddof=1) / math.sqrt(len(each)) for name, each in values.items()}
    return metrics | {
        "val_perplexity": math.exp(metrics["val_loss"]),
        "val_bits_per_byte": metrics["val_loss"] * 62 * 32 / math.log(2) / (val[1:] != 256).sum(),
        "lambada_perplexity": math.exp(np.mean([nats.sum() for nats, _ in words])),
    }


def test_evaluation_is_what_its_definition_says_on_any_ranks(data: Path, tmp_path: Path, capsys: Capture) -> None:
    model = save_random(tmp_path / "start", 40)
    expected = definition(model, data)
    assert 0 < expected["hellaswag_acc"] != expected["hellaswag_acc_norm"]
    options = ["--eval-only", *flags(data, tmp_path / "out", init_from=model, total_batch_tokens=384)]
    ranks = start_ranks(3, *options, output=tmp_path / "said")
    run_main(*options)
    assert statuses(ranks) == [0, 0, 0]
    for said in (capsys.readouterr().out, (tmp_path / "said").read_text()):
        metrics = json.loads(said.splitlines()[-1])
        assert metrics.pop("evaluated") == str(model)
        assert metrics == pytest.approx(expected, rel=1e-5)
    assert not (tmp_path / "out").exists()  # nothing is written
    save_random(tmp_path / "short", 8)
    run_main("--eval-only", *flags(data, tmp_path / "out", init_from=tmp_path / "short", sequence_length=8))
    assert "hellaswag is left out: an ending is longer" in capsys.readouterr().err


def test_a_run_stands_for_its_checkpoint(data: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.chdir(tmp_path)
    one = {"steps": 1, "warmup_steps": 0}
    first = run_train(data, Path("out/first"), **one)
    second = run_train(data, Path("out/second"), sequence_length=16, init_from="out/first", max_lr=0, min_lr=0)
    assert_same_weights(first, second)  # fine-tuned, with no learning rate, on a part of their context
    assert load_model(second).config.block_size == 32
    run_main("--eval-only")  # of the run written last
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert metrics["val_loss"] == pytest.approx(read_log(Path("out/second"))[-1]["val_loss"], rel=1e-6)
    sample.main(["--model", "out/first", "--max-new-tokens", "3"])
    assert capsys.readouterr().err.startswith("out/first/step_000001: ")


def test_a_compiled_run_is_the_same_and_one_in_bfloat16_is_close(data: Path, tmp_path: Path) -> None:
    changes = {"n_layer": 1, "checkpoint_every": 0, "sample_every": 3}
    plain = run_train(data, tmp_path / "plain", **changes)
    compiled = run_train(data, tmp_path / "compiled", **changes, compile=True)
    assert_same_weights(plain, compiled, tolerance=1e-4)
    assert_same_log(tmp_path / "plain", tmp_path / "compiled", tolerance=1e-3)
    half = run_train(data, tmp_path / "half", **changes, dtype="bfloat16")
    assert {array.dtype for array in load_numpy(half / "model.safetensors").values()} == {np.dtype(np.float32)}
    assert losses(tmp_path / "plain") != losses(tmp_path / "half")
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "half"), abs=0.05)


def test_where_nothing_can_be_compiled_one_line_says_so(data: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    _, error = run("train.py", *flags(data, tmp_path / "out", compile=True), status=1)
    assert re.fullmatch(r"train.py: error: the model cannot be compiled here \(.*\); use --no-compile\n", error)


def test_a_micro_batch_is_found_and_one_too_large_ends_in_one_line(data: Path, tmp_path: Path, capsys: Capture) -> None:
    changes = {"steps": 1, "warmup_steps": 0, "eval_every": 0, "total_batch_tokens": 2**15}
    run_train(data, tmp_path / "found", **changes, micro_batch_size=0)
    assert "8 micro-batches x 1 ranks x 128 sequences" in capsys.readouterr().out  # 4,096 tokens
    # The queries, keys and values of 32,768 tokens alone are 200 MB, more than any heap has in reserve.
    options = flags(data, tmp_path / "much", **changes | {"micro_batch_size": 2**10, "n_embd": 512})
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    with limited(resource.RLIMIT_AS, in_use + 300_000_000):
        assert re.search("out of memory.*--micro-batch-size", refusal(train.main, capsys, *options))


def test_divergence_stops_the_run_before_the_update(data: Path, tmp_path: Path, capsys: Capture) -> None:
    changes = {"steps": 9, "warmup_steps": 0, "max_lr": 1e9, "min_lr": 1e9, "checkpoint_every": 1, "eval_every": 0}
    said = re.search(r"step (\d).*step (\d)", refusal(train.main, capsys, *flags(data, tmp_path, **changes)))
    step, good = map(int, said.groups())
    assert good == step - 1
    assert checkpoints(tmp_path)[-1].name == f"step_{good:06d}"
    assert len(losses(tmp_path)) == good and all(map(math.isfinite, losses(tmp_path)))


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    """The last update is not followed by a loss that would show it."""
    model = random_model()
    with torch.no_grad():
        model.transformer.wpe.weight[3, 3] = math.inf
    with pytest.raises(FloatingPointError, match="step_000001 is not written"):
        train.save_checkpoint(tmp_path, model, {"step": 1}, "byte", {})
    assert not list(tmp_path.iterdir())


def test_full_disk_loses_no_checkpoint(data: Path, tmp_path: Path, capsys: Capture) -> None:
    changes = {"steps": 2, "warmup_steps": 1, "checkpoint_every": 1, "eval_every": 2}
    with limited(resource.RLIMIT_FSIZE, 100_000):
        assert "step_000001 could not be" in refusal(train.main, capsys, *flags(data, tmp_path, **changes))
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "metrics.jsonl"}
    run_train(data, tmp_path, **changes, resume=True)
    assert [line["step"] for line in read_log(tmp_path)] == [0, 1, 2, 2]  # from the beginning


def test_the_newest_checkpoints_and_the_best_are_kept(data: Path, tmp_path: Path, capsys: Capture) -> None:
    changes = {"steps": 8, "eval_every": 1, "checkpoint_every": 1, "max_lr": 0.2, "min_lr": 0.2, "warmup_steps": 7}
    out = tmp_path / "out"
    run_train(data, out, **changes)
    val = {line["step"]: line["val_loss"] for line in read_log(out) if "val_loss" in line and line["step"] > 0}
    best = min(val, key=val.get)
    assert best < 7  # so large a learning rate makes it worse
    assert [path.name for path in checkpoints(out)] == [f"step_{step:06d}" for step in (best, 7, 8)]
    assert capsys.readouterr().out.endswith(f"python sample.py --model={out}/step_{best:06d}\n")
    shutil.rmtree(out / "step_000008")
    run_train(data, out, **changes | {"eval_every": 0}, resume=True)
    assert [line["step"] for line in read_log(out) if "val_loss" in line] == [*range(8)]  # nothing logged is lost
    run_train(data, tmp_path / "all", **changes, keep_checkpoints=0)
    assert len(checkpoints(tmp_path / "all")) == 8
    train.prune(tmp_path / "all", tmp_path / "all" / "step_000004", keep=1)  # as if the later ones were damaged
    assert {int(path.name[5:]) for path in checkpoints(tmp_path / "all")} == {best, 4, 5, 6, 7, 8}


def test_what_is_not_a_checkpoint_is_left_alone(data: Path, tmp_path: Path) -> None:
    changes = {"checkpoint_every": 2, "keep_checkpoints": 0, "eval_every": 0}
    run_train(data, tmp_path, **changes)
    shutil.rmtree(tmp_path / "step_000006")
    fourth = tmp_path / "step_000004"
    shutil.copytree(fourth, tmp_path / "step_000001")  # not of step 1
    shutil.copytree(fourth, tmp_path / "step_000050")
    mine = [tmp_path / name for name in ("step_7", "step_best.tmp", "step_000003", "step_000006")]
    for directory in mine:
        directory.mkdir()
        (directory / "notes.txt").write_text("mine")
    torch.save({"epoch": 3}, mine[2] / "trainer.pt")
    linked = tmp_path / "step_000002"
    linked.rename(tmp_path / "elsewhere")
    linked.symlink_to(tmp_path / "elsewhere")
    assert prepare_data.model_directory(tmp_path) == fourth
    run_train(data, tmp_path, **changes | {"keep_checkpoints": 1}, resume=True)
    left = {path.name for path in tmp_path.glob("step_*")}
    (replaced,) = tmp_path.glob("step_000006.replaced_*")
    others = {"step_000001", "step_000002", "step_000050", replaced.name}
    assert left == others | {directory.name for directory in mine}
    assert (replaced / "notes.txt").read_text() == "mine"


def test_law_7_a_run_has_one_writer(data: Path, tmp_path: Path, capsys: Capture) -> None:
    options = flags(data, tmp_path, steps=10**6, checkpoint_every=0)
    log = tmp_path / "metrics.jsonl"
    with running("train.py", *options, lines=3, word="tok/s"):
        before = log.read_bytes()
        assert "in use by another process" in refusal(train.main, capsys, *options, "--resume")
        assert log.read_bytes().startswith(before)


def flip(path: Path) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


def sums_checked(directory: Path) -> int:
    """How many files `sha256sum -c` finds intact."""
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=directory, capture_output=True, text=True, check=True)
    return done.stdout.count(": OK\n")


def blank_digest(path: Path) -> None:
    """Take the digest from a line of SHA256SUMS."""
    path.write_text(re.sub(r"^\w+(?=  model.safetensors)", "", path.read_text(), flags=re.M))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", flip),
        ("trainer.pt", flip),
        ("trainer.pt", Path.unlink),
        ("config.json", flip),
        ("vocab.json", lambda path: path.unlink() or os.mkfifo(path)),
        ("SHA256SUMS", lambda path: os.truncate(path, 0)),
        ("SHA256SUMS", blank_digest),
    ],
)
def test_law_8_a_damaged_checkpoint_is_skipped(
    name: str, damage: Callable, data: Path, tmp_path: Path, capsys: Capture
) -> None:
    whole = run_train(data, tmp_path)
    log = read_log(tmp_path)
    assert sums_checked(whole) == len(list(whole.iterdir())) - 1
    damage(whole / name)
    if name in prepare_data.MODEL_FILES:
        assert f"{name} is damaged" in refusal(sample.main, capsys, "--model", whole)
    (tmp_path / "step_000006.tmp").mkdir()  # one that was being written when the machine died
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 7, "train_l\xff')
    resumed = run_train(data, tmp_path, resume=True)
    assert "skipping step_000006" in capsys.readouterr().err
    assert sums_checked(resumed) == len(prepare_data.CHECKPOINT_FILES)
    assert read_log(tmp_path) == log
    assert not list(tmp_path.glob("*.tmp"))


def test_a_checkpoint_outlives_the_settings_of_the_code(data: Path, tmp_path: Path, capsys: Capture) -> None:
    whole = run_train(data, tmp_path / "whole")
    run_train(data, tmp_path / "old")
    shutil.rmtree(tmp_path / "old" / "step_000006")
    path = tmp_path / "old" / "step_000003" / "trainer.pt"
    state = torch.load(path)
    del state["config"]["weight_decay"]  # as saved by a version without this setting
    state["config"]["label_smoothing"] = 0.1  # and by one with a setting that is gone
    torch.save(state, path)
    prepare_data.add_checksums(path.parent, [path.name])
    run_main("--out", tmp_path / "old", "--resume")
    assert "an unknown setting, label_smoothing, which is ignored" in capsys.readouterr().err
    assert_same_run(whole, tmp_path / "old" / "step_000006")


def test_law_8_a_foreign_trainer_state_is_refused(data: Path, tmp_path: Path, capsys: Capture) -> None:
    path = run_train(data, tmp_path) / "trainer.pt"
    state = torch.load(path)
    for change in (
        {"optimizer": {}},
        {"shards": None},
        {"seconds": "x"},
        {"config": state["config"] | {"dtype": "float99"}},
    ):
        torch.save(state | change, path)
        prepare_data.add_checksums(path.parent, [path.name])  # as another program might write it
        assert path.name in refusal(train.main, capsys, "--out", tmp_path, "--resume")


def test_law_8_damaged_data_is_named(data: Path, tmp_path: Path, capsys: Capture) -> None:
    assert sums_checked(data) == len(list(data.glob("*.bin"))) + 1

    def refused(**changes: object) -> str:
        return refusal(train.main, capsys, *flags(tmp_path / "shards", tmp_path / "out", **changes))

    def restore() -> Path:
        shutil.rmtree(tmp_path / "shards", ignore_errors=True)
        return shutil.copytree(data, tmp_path / "shards")

    shards = restore()
    flip(shards / "meta.json")
    assert "meta.json" in refused()
    shards = restore()
    os.truncate(shards / "train_000001.bin", 2000)
    assert "train_000001.bin" in refused()
    shards = restore()
    (shards / "train_000001.bin").unlink()
    assert "train_000001.bin" in refused()
    shards = restore()
    lines = (shards / "SHA256SUMS").read_text().splitlines(keepends=True)
    (shards / "SHA256SUMS").write_text("".join(line for line in lines if "train_000002" not in line))
    assert "train_000002.bin" in refused()
    (shards / "SHA256SUMS").unlink()
    assert "prepare_data.py" in refused()
    shards = restore()
    run_train(shards, tmp_path / "out", steps=3)
    flip(shards / "train_000001.bin")  # and described as it now is: other data
    prepare_data.add_checksums(shards, ["train_000001.bin"])
    assert "train_000001.bin is not what the run was trained on" in refused(steps=3, resume=True)


def test_law_8_another_programs_data_is_recognized_by_name_and_size(
    data: Path, tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    """Shards without meta.json have the tokens of GPT-2, whose tokenizer cannot be fetched here."""
    tokens = [bytes([i]) for i in range(256)] + [bytes([i // 256, i % 256]) for i in range(50_000)]
    ranks = {token: i for i, token in enumerate(tokens)}
    special = {"<|endoftext|>": 50256}
    gpt2 = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "gpt2", gpt2)
    prepare_data.get_tokenizer.cache_clear()
    fill_tokenizer_cache(tmp_path, monkeypatch)
    shards = shutil.copytree(data, tmp_path / "shards")
    (shards / "meta.json").unlink()
    (shards / "SHA256SUMS").unlink()
    changes = {"steps": 3, "init_from": save_random(tmp_path / "start", 32, "gpt2", 50304)}
    checkpoint = run_train(shards, tmp_path / "out", **changes)
    assert "a vocabulary of 50304; the 50257 tokens of gpt2 are used" in capsys.readouterr().out
    assert model_module.read_config(checkpoint)[0].vocab_size == 50257
    state = torch.load(checkpoint / "trainer.pt")
    assert state["shards"]["train_000000.bin"] == "20000 tokens"
    state["shards"] = {path.name: prepare_data.sha256_of(path) for path in shards.glob("*.bin")}  # as before
    torch.save(state, checkpoint / "trainer.pt")
    prepare_data.add_checksums(checkpoint, ["trainer.pt"])
    run_train(shards, tmp_path / "out", **changes, resume=True)
    (shards / "train_000000.bin").write_bytes(shard(count=100, tokens=range(100)))
    message = refusal(train.main, capsys, *flags(shards, tmp_path / "out", **changes, resume=True))
    assert "train_000000.bin is not what the run was trained on" in message
    prepare_data.get_tokenizer.cache_clear()


def shard(magic: int = 20240520, version: int = 1, count: int = 3, tokens: Any = range(3)) -> bytes:
    header = np.array([magic, version, count, *[0] * 253], dtype="<i4")
    return header.tobytes() + np.array(tokens, dtype="<u2").tobytes()


def test_reading_data_does_not_fill_memory(tmp_path: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    (tmp_path / "train_000000.bin").write_bytes(shard(count=3 * 10**7, tokens=np.zeros(3 * 10**7)))
    split = prepare_data.open_split(tmp_path, "train", 1024)
    before = resident()
    for first in range(0, split.sequences - 500, 500):
        prepare_data.read_sequences(split, np.arange(first, first + 500))
    assert resident() - before < 20e6  # of 60 MB


def test_shards_of_other_programs_are_read_and_bad_ones_named(tmp_path: Path) -> None:
    modded = tmp_path / "fineweb_train_000001.bin"  # modded-nanogpt's name
    modded.write_bytes(shard(count=51, tokens=[*range(50), 50256]))
    (tmp_path / "tiny_shakespeare_val.bin").write_bytes(shard(count=50, tokens=range(50)))  # llm.c's
    assert prepare_data.read_meta(tmp_path) == {"tokenizer": "gpt2", "vocab_size": 50257}
    assert prepare_data.open_split(tmp_path, "val", 10).tokens == [50]
    split = prepare_data.open_split(tmp_path, "train", 10)
    assert prepare_data.read_sequences(split, np.array([4]))[0].tolist() == [*range(40, 50), 50256]
    with pytest.raises(ValueError, match=f"{modded.name} contains token 50256"):
        prepare_data.read_sequences(split._replace(vocab_size=257), np.array([4]))
    for bad in (shard(magic=20240521), shard(version=2), shard(count=4), shard(count=0, tokens=[]), b"", b"abc"):
        modded.write_bytes(bad)
        with pytest.raises(ValueError, match=modded.name):
            prepare_data.open_split(tmp_path, "train", 1)
    modded.unlink()
    os.mkfifo(modded)  # opening it would wait for a writer
    with pytest.raises(ValueError, match=modded.name):
        prepare_data.open_split(tmp_path, "train", 1)


def test_train_says_what_is_wrong_in_one_line(data: Path, tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    out = tmp_path / "part" / "out"
    part = tmp_path / "part"
    part.mkdir()

    def refused(status: int = 1, **changes: object) -> str:
        return refusal(train.main, capsys, *flags(data, out, **changes), status=status)

    assert "--total-batch-tokens" in refused(2, total_batch_tokens=500)
    assert "--steps" in refused(2, steps=0)
    assert "--max-lr" in refused(2, max_lr="nan")
    assert "--min-lr 1.0 must not exceed" in refused(2, min_lr=1)
    assert "--warmup-steps 715 must be less than --steps 20" in refused(2, steps=20, warmup_steps=715)
    assert "--stepz" in refused(2, stepz=1)
    assert "n_layer must be an integer from 1 to 1,000" in refused(n_layer=1001)
    assert "--sequence-length 32 exceeds" in refused(init_from=save_random(tmp_path / "short", 16))
    assert "--tokenizer gpt2" in refused(init_from=save_random(tmp_path / "other", 32, "gpt2"))
    assert "256 tokens; 257" in refused(init_from=save_random(tmp_path / "small", vocab_size=256))
    assert "nothing is not a model" in refused(init_from="nothing")
    assert "none" in refused(data=tmp_path / "none")
    assert "no train shards" in refused(data=part)
    (part / "meta.json").write_text("{}")
    assert "incomplete" in refused(data=part)
    assert "only 46,912 usable tokens" in refused(total_batch_tokens=2**16)
    assert "is not a model" in refused(eval_only=True)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert "pip install tensorboard" in refused(tensorboard=True)
    run_train(data, out)
    before = contents(out)
    assert "--resume" in refused()
    message = refused(max_lr=0.02, seed=1, resume=True)
    assert "--max-lr was 0.01 and is now 0.02" in message
    assert "--seed was 1337" in message
    assert "--steps" not in message
    run_train(data, out, resume=True)  # a finished run: nothing left to do
    assert contents(out) == before


def test_mistakes_in_torchruns_variables_are_named(
    data: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    options = flags(data, tmp_path / "out")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        good = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": taken.getsockname()[1]}
        for name, value, status in (
            ("WORLD_SIZE", "two", 2),
            ("WORLD_SIZE", 0, 2),
            ("MASTER_PORT", "x", 1),
            ("RANK", "x", 1),
            ("RANK", 1, 1),
            ("MASTER_PORT", None, 1),
        ):
            for variable, text in (good | {name: value}).items():
                monkeypatch.setenv(variable, str(text))
            if value is None:
                monkeypatch.delenv(name)
            assert name in refusal(train.main, capsys, *options, status=status)
        monkeypatch.setenv("MASTER_PORT", str(good["MASTER_PORT"]))
        assert "cannot join the other processes" in run("train.py", *options, status=1)[1]


# The commands, as a user gives them


def test_what_is_missing_is_named_in_one_line(tmp_path: Path, monkeypatch: Patch) -> None:
    def errors() -> set[str]:
        scripts = ("prepare_data.py", "train.py", "sample.py")
        return {run(script, status=1)[1].replace(script, "SCRIPT") for script in scripts}

    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "tiktoken.py").write_text("import tiktokens")  # found before the real one
    assert errors() == {"SCRIPT: error: No module named 'tiktokens'; pip install -r requirements.txt\n"}
    (tmp_path / "tiktoken.py").unlink()
    (tmp_path / "fcntl.py").write_text("raise ModuleNotFoundError('no fcntl', name='fcntl')")  # as on Windows
    custom = tmp_path / "sitecustomize.py"
    custom.write_text("import sys; sys.modules['fcntl'] = None")
    (tmp_path / "fcntl.py").unlink()
    (said,) = errors()
    assert "use WSL" in said and said.count("\n") == 1
    custom.write_text("import torch; del torch.nn.LinearCrossEntropyOptions; torch.__version__ = '2.12.0'")
    _, error = run("train.py", status=1)
    assert error == "train.py: error: PyTorch 2.13 is needed; this is 2.12.0; pip install -r requirements.txt\n"


def test_demo_from_nothing_to_text(tmp_path: Path) -> None:
    run("prepare_data.py", "--source", "demo", cwd=tmp_path)
    options = ["--device", "cpu", "--steps", 12, "--warmup-steps", 2, "--sample-every", 12, "--log-every", 1]
    trained, _ = run("train.py", "--preset", "demo", *options, "--eval-tokens", 5000, cwd=tmp_path)
    found = losses(tmp_path / "out" / "demo")
    assert trained.endswith("python sample.py --model=out/demo\n")
    assert len(found) == 12 and found[0] == pytest.approx(math.log(257), rel=0.03) and found[-1] < found[0] - 1
    line = re.search(r"^step 12  loss [\d.]+  lr [\d.e-]+  norm [\d.]+  [\d,]+k? tok/s  0:00:00$", trained, re.M)
    assert line and len(line[0]) < 80
    text, told = run("sample.py", "--max-new-tokens", 50, "--device", "cpu", cwd=tmp_path)
    assert re.fullmatch(r"out/demo/step_000012: [\d,]+ parameters, cpu\n\d+ tokens, [\d.]+ tokens/s\n", told) and text


def test_sample_continues_prompts(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    model = save_random(tmp_path / "model", 64)

    def sampled(*options: object, stdin: bytes = b"") -> str:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8", newline="\n"))
        capsys.readouterr()
        command = ["--model", model, "--max-new-tokens", 50, "--device", "cpu", *options]
        sample.main([str(option) for option in command])
        return capsys.readouterr().out

    assert sampled() == sampled() != sampled("--seed", 1)
    parts = sampled("--prompt", "The", "--num-samples", 3).split("-" * 80 + "\n")
    assert len(set(parts)) == 3
    assert all(part.startswith("The") and part.endswith("\n") for part in parts)
    wanted = sampled("--prompt", "of which")
    for stdin in (b"of which\n", b"of which\r\n", b"\xef\xbb\xbfof which"):  # as editors and other systems write it
        assert sampled("--prompt", "-", stdin=stdin) == wanted
    asked = sampled("--interactive", stdin=b"The\n\xff\nof which\n")  # a bad line does not end the session
    assert asked.startswith(sampled("--prompt", "The"))
    assert "\nof which" in asked
    assert "--top-p" in refusal(sample.main, capsys, "--top-p", 1.5, status=2)
    monkeypatch.chdir(tmp_path)
    assert "out is not a model" in refusal(sample.main, capsys)


def test_a_prompt_longer_than_the_context_keeps_its_end(tmp_path: Path, capsys: Capture) -> None:
    command = ["--model", str(save_random(tmp_path, 64)), "--max-new-tokens", "20", "--device", "cpu", "--prompt"]
    sample.main([*command, "a" * 64])
    text = capsys.readouterr().out
    sample.main([*command, " " * 1_000_000 + "a" * 64])
    said = capsys.readouterr()
    assert said.out.strip() == text.strip()
    assert "the prompt has 1,000,064 tokens; the last 64 are used" in said.err


def test_scripts_run_with_closed_standard_streams(data: Path, tmp_path: Path) -> None:
    model = save_random(tmp_path / "model")
    for command in (
        ["sample.py", "--model", model, "--prompt", "-", "--max-new-tokens", 3],
        ["train.py", "--eval-only", *flags(data, tmp_path / "out", init_from=model)],
    ):
        shell = shlex.join([sys.executable, str(ROOT / command[0]), *map(str, command[1:])])
        done = subprocess.run(f"{shell} <&- 2>&-", shell=True, capture_output=True, timeout=TIMEOUT)
        assert done.returncode == 0 and done.stdout and not done.stderr


def test_characters_are_never_broken_in_the_stream() -> None:
    decode = sample.stream_decoder(prepare_data.get_tokenizer("byte"))
    assert [decode(byte) for byte in "aé🙂".encode()] == ["a", "", "é", "", "", "", "🙂"]
    assert [decode(0xF0), decode(0x9F), decode(256), decode(97)] == ["", "", "\ufffd", "a"]
