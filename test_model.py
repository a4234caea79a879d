"""
The project's promises, one test each. The eight laws:

1. Parity: on the same weights the logits are those of the reference GPT-2.
2. Split invariance: ranks, micro-batches and accumulation steps cut a batch, and change nothing else.
3. Exact resume: a run killed at any moment and resumed is the run that was never killed, bit for bit on a CPU.
4. Cache: greedy text with the KV cache is the greedy text without it.
5. Reproducible shards: the same text gives the same bytes with any number of workers, however often it was killed.
6. Loss sync: the logged loss is the mean over every token of the batch, on all ranks and micro-batches.
7. One writer: a second process in a directory is refused, and changes nothing.
8. Nothing damaged is believed: every file of a checkpoint and of prepared data has its sha256 checked.

    python -m pytest

Everything here is real: files in a temporary directory, processes that are killed, servers on localhost. No network, no
GPU.
"""

import contextlib
import gzip
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import re
import resource
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
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
import regex
import tiktoken
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file as save_numpy
from tiktoken_ext.openai_public import r50k_pat_str

import model as model_module
import prepare_data
import sample
import train
from model import GPT, MODEL_SIZES, GPTConfig, generate, load_model, save_model

Patch, Capture = pytest.MonkeyPatch, pytest.CaptureFixture
ROOT = Path(__file__).parent
TINY = GPTConfig(block_size=16, vocab_size=61, n_layer=2, n_head=2, n_embd=32)
CPU = torch.device("cpu")
TIMEOUT = 120  # seconds for any one process; none comes near


def random_model(config: GPTConfig = TINY, seed: int = 0) -> GPT:
    """A model whose every parameter matters: weights, biases and norms far from their initial values."""
    torch.manual_seed(seed)
    model = GPT(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if "ln_" in name else 0.3))
    return model.eval()


def start(*command: object, cwd: Path | None = None, output: Any = subprocess.DEVNULL, **env: str) -> subprocess.Popen:
    """A script, or torchrun, as a user starts it, in a process that a test can interrupt. One thread each, so that the
    rounding of sums does not depend on load."""
    name, *rest = (str(part) for part in command)
    begin = {"torchrun": ["-m", "torch.distributed.run"], "-c": ["-c"]}.get(name, [str(ROOT / name)]) + rest
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env}
    return subprocess.Popen([sys.executable, *begin], cwd=cwd, env=env, stdout=output, stderr=output, text=True)


def run(*command: object, status: int = 0, cwd: Path | None = None, **env: str) -> tuple[str, str]:
    """What a script that ends with `status` has written to its standard output and error."""
    process = start(*command, cwd=cwd, output=subprocess.PIPE, **env)
    said = process.communicate(timeout=TIMEOUT)
    assert process.returncode == status, f"{command} ended with {process.returncode}\n{said[0]}\n{said[1]}"
    return said


@contextlib.contextmanager
def limited(kind: int, most: int) -> Iterator[None]:
    """A limit of the operating system on this process, and those that it starts: the size of a file, or its memory."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def read_lines(process: subprocess.Popen, count: int, word: str) -> None:
    """Wait until a process started with output=PIPE has printed so many lines with a word in them."""
    while count:
        line = process.stdout.readline()
        assert line, f"{process.args} ended with {process.wait(timeout=TIMEOUT)}"
        count -= word in line


def contents(directory: Path) -> dict[Path, bytes]:
    """What is in a directory, but for the lock."""
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != ".lock"}


def refusal(main: Callable, capsys: Capture, *options: object, status: int = 1) -> str:
    """The one line with which a script, called in this process, ends on an error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ending:
        main([str(option) for option in options])
    assert status == ending.value.code
    *before, message = capsys.readouterr().err.strip().splitlines()
    assert "error: " in message and all(line.endswith(" parameters, cpu") for line in before), message
    return message


# The model


def numpy_gpt2(directory: Path, tokens: np.ndarray) -> np.ndarray:
    """GPT-2's forward pass in float64, from the published description and the published layout: (B, T) -> (B, T, V)."""
    weights = {name: array.astype(np.float64) for name, array in load_numpy(directory / "model.safetensors").items()}
    config = json.loads((directory / "config.json").read_text())
    B, T = tokens.shape
    C, heads = config["n_embd"], config["n_head"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def layer_norm(x: np.ndarray, name: str) -> np.ndarray:
        centered = x - x.mean(-1, keepdims=True)
        normal = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5)
        return normal * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = weights["transformer.wte.weight"][tokens] + weights["transformer.wpe.weight"][:T]
    future = np.triu(np.ones((T, T), dtype=bool), k=1)
    for layer in range(config["n_layer"]):
        name = f"transformer.h.{layer}"
        qkv = linear(layer_norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn")
        q, k, v = (part.reshape(B, T, heads, -1).swapaxes(1, 2) for part in np.split(qkv, 3, axis=-1))
        scores = np.where(future, -np.inf, q @ k.swapaxes(-1, -2) / np.sqrt(C // heads))
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (scores / scores.sum(-1, keepdims=True)) @ v
        x = x + linear(mixed.swapaxes(1, 2).reshape(B, T, C), f"{name}.attn.c_proj")
        h = linear(layer_norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, f"{name}.mlp.c_proj")
    return layer_norm(x, "transformer.ln_f") @ weights["transformer.wte.weight"].T


def test_law_1_parity_with_a_numpy_gpt2(tmp_path: Path) -> None:
    model = random_model()
    save_model(model, tmp_path)
    tokens = torch.randint(61, (3, 16))
    reference = numpy_gpt2(tmp_path, tokens.numpy())
    assert np.abs(reference).max() > 5  # far from what an untrained model says
    for candidate in (model, load_model(tmp_path)):
        np.testing.assert_allclose(candidate(tokens).detach().numpy(), reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "count"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_parameter_count_is_that_of_the_release(name: str, count: int) -> None:
    with torch.device("meta"):
        assert model_module.parameter_count(GPT(MODEL_SIZES[name])) == count


def test_flops_per_token_is_what_pytorch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = replace(TINY, block_size=16, vocab_size=128)  # no padding, which would be counted too
    tokens = torch.randint(128, (1, 17))
    plain = torch.autocast("cpu", dtype=torch.bfloat16)  # the counter cannot see into the loss by rows
    math_attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, math_attention, plain:
        GPT(config)(tokens[:, :-1], tokens[:, 1:]).backward()
    assert counter.get_total_flops() == pytest.approx(16 * model_module.flops_per_token(config), rel=1e-6)


def test_loss_ignores_padding_and_minus_one() -> None:
    model = random_model()
    with torch.no_grad():
        model.transformer.wte.weight[61:] = 100.0  # padding that would dominate any softmax it had a part in
    tokens, targets = torch.randint(61, (2, 16)), torch.randint(61, (2, 16))
    targets[0, 3:], targets[1, 0] = -1, -1
    assert model(tokens).shape == (2, 16, 61)
    logits = model(tokens).detach().double().numpy()
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    kept = targets.numpy() != -1
    picked = np.take_along_axis(log_probs, targets.numpy().clip(0)[..., None], -1)[..., 0]
    loss = model(tokens, targets)
    assert loss.shape == () and loss.item() == pytest.approx(-picked[kept].mean(), rel=1e-5)
    loss.backward()
    assert model.transformer.wte.weight.grad[61:].abs().max() == 0
    assert model.transformer.wte.weight.grad[:61].abs().max() > 0


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_loss_and_gradients_are_those_of_the_plain_formula(
    dtype: torch.dtype, tolerance: float, compiled: bool
) -> None:
    model = random_model(GPTConfig(256, 300, 2, 2, 32))
    tokens, targets = torch.randint(300, (5, 256)), torch.randint(300, (5, 256))  # more than one chunk of rows
    targets[1, 100:240:7] = -1
    parameters = [p for name, p in model.named_parameters() if "c_attn.bias" not in name]  # the keys' have gradient 0
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=-1)
    gradients = torch.autograd.grad(3 * expected, parameters)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        loss = (torch.compile(model) if compiled else model)(tokens, targets)
    assert loss.dtype == torch.float32 and abs(loss - expected) < (1e-5 if dtype == torch.float32 else 1e-3) * expected
    for one, other in zip(torch.autograd.grad(3 * loss, parameters), gradients, strict=True):
        assert one.dtype == torch.float32 and (one - other).norm() < tolerance * other.norm()


def test_weights_start_as_in_the_paper() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=300, n_layer=8, n_head=4, n_embd=128))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or ".ln_" in name:
            expected_std, expected_mean = 0.0, 0.0 if name.endswith("bias") else 1.0
        else:
            expected_std, expected_mean = 0.02 / (4 if name.endswith("c_proj.weight") else 1), 0.0  # sqrt(2 * 8) = 4
        values = parameter[:300] if "wte" in name else parameter
        assert values.std().item() == pytest.approx(expected_std, rel=0.05), name
        assert values.mean().item() == pytest.approx(expected_mean, abs=1e-3), name
    loss = model(torch.randint(300, (4, 64)), torch.randint(300, (4, 64)))
    assert loss.item() == pytest.approx(math.log(300), rel=0.02)


def test_dropout_is_on_in_training_only() -> None:
    model = GPT(replace(TINY, dropout=0.5))
    tokens = torch.randint(61, (1, 8))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_optimizer_decays_matrices_only_and_is_fused() -> None:
    model = GPT(TINY)
    optimizer = model_module.configure_optimizer(model, 1e-3, 0.1, (0.9, 0.95))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.1 if name.endswith("weight") and "ln_" not in name else 0.0), name
    assert all(group["fused"] and group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)


def test_saved_model_is_in_the_hubs_layout_and_loads_bit_for_bit(tmp_path: Path) -> None:
    model = random_model()
    save_model(model, tmp_path / "ours", "byte")
    stored = load_numpy(tmp_path / "ours" / "model.safetensors")
    assert stored["transformer.wte.weight"].shape == (61, 32)  # no padding
    assert stored["transformer.h.0.mlp.c_fc.weight"].shape == (32, 128)  # (in, out), as OpenAI has it
    assert not [name for name in stored if "_orig_mod" in name or "lm_head" in name]
    assert model_module.read_config(tmp_path / "ours") == (TINY, "byte")
    # The hub's gpt2 has no prefix and carries attention masks; newer files repeat the shared matrix.
    (tmp_path / "hub").mkdir()
    hub = {name.removeprefix("transformer."): array for name, array in stored.items()}
    hub["h.0.attn.bias"] = np.tril(np.ones((1, 1, 16, 16), dtype=np.float32))
    hub["lm_head.weight"] = stored["transformer.wte.weight"].copy()
    save_numpy(hub, tmp_path / "hub" / "model.safetensors")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    del config["tokenizer"]
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    for directory, tokenizer in (("ours", "byte"), ("hub", "gpt2")):
        loaded = load_model(tmp_path / directory)
        assert loaded.config == TINY and model_module.read_config(tmp_path / directory) == (TINY, tokenizer)
        assert not loaded.training and all(p.requires_grad for p in loaded.parameters())
        for name, parameter in model.state_dict().items():
            rows = 61 if "wte" in name else None
            assert torch.equal(loaded.state_dict()[name][:rows], parameter[:rows]), name


def test_model_that_is_not_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not a model: there is no such directory"):
        prepare_data.model_directory("nowhere")
    save_model(random_model(), tmp_path)
    weights, config = (tmp_path / "model.safetensors").read_bytes(), json.loads((tmp_path / "config.json").read_text())
    for broken in (weights[:-100], b"", b"x" * 5000):
        (tmp_path / "model.safetensors").write_bytes(broken)
        with pytest.raises(ValueError, match="damaged or not a safetensors file"):
            load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    for change, message in [
        ({"activation_function": "relu"}, "activation_function relu, where GPT-2 has gelu_new"),
        ({"model_type": "gpt_neo"}, "model_type"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"n_inner": 64}, "n_inner"),
        ({"n_embd": 64}, "not as in config.json"),
        ({"n_layer": 1}, "has 2 layers, and config.json says 1"),
        ({"n_layer": 10**6}, "has 2 layers"),
        ({"n_layer": 2.0}, "n_layer must be a whole number"),
        ({"n_positions": 10**30}, "block_size must be a whole number"),
        ({"n_head": None}, "n_head"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path)
    for broken in ("[]", "{", '{"model_type": "gpt2"}', "[" * 100_000):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(ValueError, match="does not describe a GPT-2"):
            load_model(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="it has no model"):
        prepare_data.model_directory(tmp_path)


# Generation


def greedy_without_cache(model: GPT, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """The definition: read the whole context for each token, and continue from its last half when it is full."""
    context, new = tokens, []
    for _ in range(count):
        new.append(model(context)[:, -1].argmax(-1))
        if context.size(1) == model.config.block_size:
            context = context[:, -(model.config.block_size // 2) :]
        context = torch.cat([context, new[-1][:, None]], dim=1)
    return torch.stack(new, dim=1)


@pytest.mark.parametrize(
    ("batch", "prompt", "how"),
    [(1, 1, {}), (1, 16, {}), (3, 5, {}), (1, 16, {"compiled": True}), (3, 1, {"compiled": True})],
)
def test_law_4_cache_changes_no_token(batch: int, prompt: int, how: dict[str, bool]) -> None:
    model = random_model()
    tokens = torch.randint(61, (batch, prompt))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    cached = torch.stack(list(generate(model, tokens, 60, temperature=0, **how)), dim=1)  # three times past the context
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(how)  # one for all positions
    assert torch.equal(cached, greedy_without_cache(model, tokens, 60))
    assert len(cached.unique()) > 5


def test_generation_depends_on_the_seed_alone() -> None:
    model, tokens = random_model(), torch.tensor([[1, 2], [1, 2]])

    def text(seed: int) -> torch.Tensor:
        return torch.stack(list(generate(model, tokens, 30, generator=torch.Generator().manual_seed(seed))))

    assert torch.equal(text(1), text(1)) and not torch.equal(text(1), text(2))
    assert not torch.equal(text(1)[:, 0], text(1)[:, 1])  # the rows of a batch are independent draws


def test_probabilities_are_those_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    for temperature, top_k, top_p in [
        (1.0, None, None),
        (0.7, 5, None),
        (1.3, None, 0.6),
        (0.9, 8, 0.5),
        (1.0, 99, 1.0),
    ]:
        logits = rng.normal(size=(20, 30)) * 2
        wanted = np.exp(logits / temperature)
        for row in wanted:
            order = np.argsort(-row)
            row[order[top_k or 30 :]] = 0
            row /= row.sum()
            if top_p is not None:
                size = 1 + int(np.argmax(np.cumsum(row[order]) >= top_p - 1e-12))  # the smallest set that reaches top_p
                row[order[size:]] = 0
                row /= row.sum()
        probs, tokens = model_module.probabilities(torch.from_numpy(logits), temperature, top_k, top_p)
        got = torch.zeros(20, 30).scatter(1, tokens, probs)
        np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-4, atol=1e-7)


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0]).expand(200_000, 4)
    draws = model_module.sample_token(logits, 1.0, None, None, torch.Generator().manual_seed(0))
    frequency = torch.bincount(draws, minlength=4) / len(draws)
    assert torch.allclose(frequency, logits[0].softmax(-1), atol=0.005)  # four standard errors
    assert torch.equal(model_module.sample_token(logits[:3], 0, None, None, None), torch.tensor([3, 3, 3]))


def test_generation_stops_when_every_row_has_drawn_the_stop_token() -> None:
    model, tokens = random_model(), torch.randint(61, (2, 4), generator=torch.Generator().manual_seed(3))
    free = torch.stack(list(generate(model, tokens, 15, temperature=0)), dim=1)
    stop = int(free[0, 3])
    rows = torch.stack(list(generate(model, tokens, 15, temperature=0, stop_token=stop)), dim=1)
    for row, expected in zip(rows, free, strict=True):
        seen = (expected == stop).nonzero().flatten()
        end = int(seen[0]) if len(seen) else 14
        assert torch.equal(row[: end + 1], expected[: rows.size(1)][: end + 1]) and (row[end + 1 :] == stop).all()
    for bad in ({"temperature": -1}, {"top_k": 0}, {"top_p": 0.0}):
        with pytest.raises(ValueError, match="temperature must be"):
            next(generate(model, tokens, 1, **bad))
    for length in (0, 17):
        with pytest.raises(ValueError, match=f"1 to 16 tokens.*not {length}"):
            next(generate(model, torch.zeros(1, length, dtype=torch.int64), 1))


# A server on localhost that behaves as it is told


class Site(NamedTuple):
    """What a test server serves (path -> content), its faults, one word for each request to come, and its log."""

    url: str
    content: dict[str, bytes]
    faults: list[str]
    requests: list[tuple[str, dict[str, str]]]


@pytest.fixture
def site() -> Iterator[Site]:
    content, faults, log = {}, [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            log.append((self.path, dict(self.headers)))
            fault = faults.pop(0) if faults else ""
            body = content.get(self.path)
            if body is None or fault in ("503", "429", "busy"):
                self.send_response(404 if body is None else int(fault.replace("busy", "429")))
                self.send_header("Retry-After", "99999999" if fault == "busy" else "0")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            first = int(start[1]) if start and "ignore range" not in fault else 0
            self.send_response(206 if first else 200)
            if first and fault != "bare 206":
                self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
            if next_page := content.get(self.path + " next"):
                self.send_header("Link", f'<{next_page.decode()}>; rel="next"')
            self.send_header("Content-Length", str(len(body) - first))
            self.end_headers()
            part = body[first:] if fault != "lie" else bytes(len(body) - first)
            self.wfile.write(part[: len(part) // 2] if "drop" in fault else part)
            self.close_connection = True

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Site(f"http://127.0.0.1:{server.server_port}", content, faults, log)
    server.shutdown()
    thread.join()
    server.server_close()


def test_openai_weights_are_fetched_once_and_checked(site: Site, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    monkeypatch.setenv("HF_TOKEN", "secret\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = random_model()
    save_model(model, tmp_path / "hub")
    listing = []
    for name in ("config.json", "model.safetensors"):
        data = (tmp_path / "hub" / name).read_bytes()
        lfs = {"oid": hashlib.sha256(data).hexdigest()} if name == "model.safetensors" else None
        listing.append({"path": name, "size": len(data), "lfs": lfs})
        site.content[f"/openai-community/gpt2/resolve/main/{name}"] = data
    site.content["/api/models/openai-community/gpt2/tree/main"] = json.dumps(listing).encode()

    site.faults[:] = ["", "drop"]
    with ThreadPoolExecutor(4) as ranks:  # all want it at once, and one fetches it
        directories = list(ranks.map(prepare_data.model_directory, ["gpt2"] * 4))
    loaded = load_model(directories[3])
    assert torch.equal(loaded(torch.arange(16)[None]), model(torch.arange(16)[None]))
    fetched = [headers for path, headers in site.requests if path.endswith("model.safetensors")]
    assert len(fetched) == 2 and int(fetched[1]["Range"].removeprefix("bytes=").rstrip("-")) > 0
    assert all(headers["Authorization"] == "Bearer secret" for _, headers in site.requests)
    site.requests.clear()
    prepare_data.model_directory("gpt2")
    assert not site.requests  # from the cache

    shutil.rmtree(tmp_path / "cache")
    site.faults[:] = ["", "lie"]
    with pytest.raises(OSError, match="wrong size or sha256"):
        prepare_data.model_directory("gpt2")
    load_model(prepare_data.model_directory("gpt2"))  # what was wrong is not kept
    (directories[0] / "config.json").unlink()  # what is missing or damaged is fetched again
    (directories[0] / "model.safetensors").write_bytes(b"damaged")
    load_model(prepare_data.model_directory("gpt2"))
    shutil.rmtree(tmp_path / "cache")
    site.content["/api/models/openai-community/gpt2/tree/main"] = json.dumps(listing[:1]).encode()
    with pytest.raises(OSError, match="does not list"):
        prepare_data.model_directory("gpt2")
    site.content["/api/models/openai-community/gpt2/tree/main"] = json.dumps(listing).encode()
    load_model(prepare_data.model_directory("gpt2"))


# Preparing data


def read_shards(directory: Path, split: str) -> np.ndarray:
    """All tokens of a split, read by the format's description: 256 int32 of header, then uint16."""
    pieces = []
    for path in sorted(directory.glob(f"{split}_*.bin")):
        header = np.fromfile(path, dtype="<i4", count=256)
        assert (header[:2] == [20240520, 1]).all() and not header[3:].any()
        pieces.append(np.fromfile(path, dtype="<u2", offset=1024))
        assert len(pieces[-1]) == header[2]
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.uint16)


def all_tokens(directory: Path) -> np.ndarray:
    return np.concatenate([read_shards(directory, split) for split in ("val", "train")])


def documents(count: int = 400) -> list[str]:
    """Texts of many lengths, with everything in them that a tokenizer could stumble over."""
    rng = np.random.default_rng(0)
    words = ["the", "Ünïcödé", "日本語", "🙂", "\n\n", "  ", "<|endoftext|>", "a\r\nb", "don't", "1234", "\t"]
    return [" ".join(rng.choice(words, size=int(rng.integers(1, 200)))) for _ in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def prepare(out: Path, *options: object, **settings: Any) -> tuple[str, str]:
    return run("prepare_data.py", "--out", out, "--tokenizer", "byte", *options, **settings)


def byte_tokens(texts: list[str]) -> np.ndarray:
    """What the byte tokenizer must make of documents: 256, then the bytes of the text."""
    return np.concatenate([np.array([256, *text.encode()], dtype=np.uint16) for text in texts])


def test_every_format_gives_the_tokens_of_its_texts(tmp_path: Path) -> None:
    texts = documents()
    write_jsonl(tmp_path / "a.jsonl", [*texts[:50], "", *texts[50:]])
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as file:
        file.write((tmp_path / "a.jsonl").read_bytes() + b'\n{"text": null}\n')
    table = pyarrow.table({"id": range(401), "text": [*texts, None]})
    parquet.write_table(table, tmp_path / "c.parquet", row_group_size=30)
    (tmp_path / "d.txt").write_bytes("".join(texts).encode())
    expected = byte_tokens(texts)
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.txt"):
        out = tmp_path / name.split(".")[0]
        prepare(out, "--input", tmp_path / name, "--shard-tokens", "50k", "--val-tokens", "10k", "--workers", 2)
        if name == "d.txt":
            expected = byte_tokens(["".join(texts)])
        val, training = read_shards(out, "val"), read_shards(out, "train")
        assert len(val) == 10_000 and np.array_equal(np.concatenate([val, training]), expected)
        meta = json.loads((out / "meta.json").read_text())
        assert (meta["tokenizer"], meta["vocab_size"]) == ("byte", 257)
        for split, tokens in (("val", val), ("train", training)):
            assert meta[split]["tokens"] == len(tokens)
            assert meta[split]["documents"] == (tokens == 256).sum()
            assert meta[split]["bytes"] == (tokens != 256).sum()
        assert sorted(path.name for path in out.iterdir())[:3] == [".lock", "SHA256SUMS", "meta.json"]


def test_endless_white_space_has_the_tokens_of_the_whole() -> None:
    """With GPT-2's own pattern, and every pair of the text's bytes as a token so that a wrong cut would show."""
    rng = np.random.default_rng(0)
    words = ["the", " ", "\n", "\u00a0", "\x1c", "\x85", "\u3000", "'s", "é", " " * 1500, "\n" * 1200, "\t \n" * 700]
    text = "".join(rng.choice(words, size=1000))
    encoded = text.encode()
    pairs = sorted({encoded[i : i + 2] for i in range(len(encoded) - 1)})
    ranks = {bytes([i]): i for i in range(256)} | {pair: 256 + i for i, pair in enumerate(pairs) if len(pair) == 2}
    end = {"<|endoftext|>": len(ranks)}
    tokenizer = tiktoken.Encoding("pairs", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=end)
    assert prepare_data.tokenize([text], tokenizer)[1:].tolist() == tokenizer.encode_ordinary(text)
    endless = "a" + " " * 1_000_000 + "b" + "\n" * 1_000_000  # more than tiktoken can take as one, but at the end
    assert tokenizer.decode(prepare_data.tokenize([endless], tokenizer)[1:].tolist()) == endless


def test_tokenizer_files_describe_the_same_tokenizer() -> None:
    """Byte-pair encoding by vocab.json and merges.txt, as GPT-2's own code does it, gives tiktoken's tokens."""
    tokens = [bytes([i]) for i in range(256)]
    tokens += [
        t.encode() for t in ("th", "he", " t", "the", " the", "ni", "on", "don", "\n\n", "12", "34", "1234", "語")
    ]
    tokens.insert(-1, "語".encode()[:2])
    ranks, special = {token: i for i, token in enumerate(tokens)}, {"<|endoftext|>": len(tokens)}
    tokenizer = tiktoken.Encoding("few", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)
    written = train.tokenizer_files(tokenizer)
    vocab, lines = json.loads(written["vocab.json"]), written["merges.txt"].splitlines()
    assert len(vocab) == tokenizer.n_vocab and lines[1:4] == ["t h", "h e", "Ġ t"] and "th e" in lines
    merges = {tuple(line.split()): i for i, line in enumerate(lines[1:])}
    letters = {i: letter for letter, i in vocab.items() if i < 256}
    for word in regex.findall(r50k_pat_str, " ".join(documents(60))):
        parts = [letters[byte] for byte in word.encode()]
        while pairs := [pair for pair in itertools.pairwise(parts) if pair in merges]:
            first = list(itertools.pairwise(parts)).index(min(pairs, key=merges.__getitem__))
            parts[first : first + 2] = ["".join(parts[first : first + 2])]
        assert [vocab[part] for part in parts] == tokenizer.encode_ordinary(word)


def serve_hub(site: Site, directory: Path, texts: list[str], files: int) -> None:
    """Put texts on a server as the hub shows them: Parquet files of FineWeb-Edu's sample-10BT, listed on two pages."""
    entries, size = [], len(texts) // files
    for i in range(files):
        path, name = directory / f"{i}.parquet", f"sample/10BT/{i:03d}_00000.parquet"
        table = pyarrow.table({"text": texts[size * i : size * (i + 1)]})
        parquet.write_table(table, path, row_group_size=size // 7)
        site.content[f"{FINEWEB}/resolve/main/{name}"] = data = path.read_bytes()
        entries.append({"path": name, "size": len(data), "lfs": {"oid": hashlib.sha256(data).hexdigest()}})
    listing = f"/api{FINEWEB}/tree/main/sample/10BT"
    site.content[listing] = json.dumps(entries[:2]).encode()
    site.content[f"{listing} next"] = f"{site.url}{listing}?cursor=2".encode()
    site.content[f"{listing}?cursor=2"] = json.dumps([*entries[2:], {"path": "README.md", "size": 1}]).encode()


FINEWEB = "/datasets/HuggingFaceFW/fineweb-edu"


def test_law_5_shards_do_not_depend_on_workers_or_on_kills(site: Site, tmp_path: Path) -> None:
    texts = documents(3000)
    serve_hub(site, tmp_path, texts, files=3)
    options = ["--shard-tokens", "16k", "--val-tokens", "20k"]
    for workers in (1, 2, 5):
        prepare(tmp_path / str(workers), *options, "--workers", workers, HF_ENDPOINT=site.url)
    names = {path.name for path in (tmp_path / "1").iterdir()}
    assert len(names) > 50
    for shards in (1, 10, 11, 30):  # killed as soon as it has written so many
        site.faults[:] = ["", "drop", "", "drop", ""]
        command = ["prepare_data.py", "--out", tmp_path / "killed", "--tokenizer", "byte", *options, "--workers", 2]
        process = start(*command, HF_ENDPOINT=site.url, output=subprocess.PIPE)
        read_lines(process, shards, ".bin: ")
        process.kill()
        assert process.wait(timeout=TIMEOUT) == -signal.SIGKILL
    prepare(tmp_path / "killed", *options, HF_ENDPOINT=site.url)
    for other in ("2", "5", "killed"):
        assert {path.name for path in (tmp_path / other).iterdir()} == names
        for name in names - {".lock"}:
            assert (tmp_path / other / name).read_bytes() == (tmp_path / "1" / name).read_bytes(), (other, name)
    assert np.array_equal(all_tokens(tmp_path / "killed"), byte_tokens(texts))


@pytest.mark.parametrize("fault", ["bare 206", "ignore range and drop", "busy"])
def test_a_download_that_brings_nothing_new_ends(site: Site, tmp_path: Path, monkeypatch: Patch, fault: str) -> None:
    waits, content = [], bytes(range(256)) * 1000
    monkeypatch.setattr(time, "sleep", waits.append)
    site.content["/a"] = content
    file = prepare_data.RawFile("a", len(content), hashlib.sha256(content).hexdigest(), f"{site.url}/a")
    site.faults[:] = ["drop", *[fault] * 50]
    with pytest.raises(OSError, match=r"a: .*run the same command again"):
        prepare_data.download(file, tmp_path / "a")
    assert 7 <= len(waits) <= 9 and max(waits) == 60
    assert (tmp_path / "a.part").read_bytes() in (content[: len(content) // 2], content[: len(content)])
    site.faults.clear()
    assert prepare_data.download(file, tmp_path / "a").read_bytes() == content


def test_listings_are_bounded_and_checked(site: Site, monkeypatch: Patch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    listing = "/api/models/b/tree/main"
    for entries in (b"null", b"[1]", b'[{"path": "a"}]', b'[{"path": "a", "size": "b", "lfs": null}]', b"<html>"):
        site.content[listing] = entries
        with pytest.raises(ValueError, match="list of models/b cannot be used"):
            prepare_data.list_hub("models/b")
    site.content[listing] = b"[]"
    site.content[f"{listing} next"] = f"{site.url}{listing}".encode()  # its next page is itself
    with pytest.raises(OSError, match="does not end"):
        prepare_data.list_hub("models/b")
    for token in ("\ufeffsecret", "sec\nret", "sécret"):  # as editors save a file
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(ValueError, match="HF_TOKEN") as problem:
            prepare_data.list_hub("models/b")
        assert "cret" not in str(problem.value)


def test_full_disk_ends_in_one_line_and_can_go_on(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", documents())
    options = ["--input", source, "--shard-tokens", "50k", "--val-tokens", "10k"]
    with limited(resource.RLIMIT_FSIZE, 60_000):
        _, error = prepare(tmp_path / "out", *options, status=1)
    assert re.fullmatch(r"prepare_data.py: error: .*File too large.*\n", error)
    prepare(tmp_path / "out", *options)
    assert np.array_equal(all_tokens(tmp_path / "out"), byte_tokens(documents()))


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """The largest process of a preparation, by the operating system's account, for one and for ten times a text."""
    # By a small process in between: a child inherits the peak of the one that starts it.
    measure = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
    measure += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    peaks = []
    for copies in (20, 200):
        source = write_jsonl(tmp_path / f"{copies}.jsonl", documents() * copies)
        command = [ROOT / "prepare_data.py", "--input", source, "--tokenizer", "byte", "--out", tmp_path / str(copies)]
        command += ["--shard-tokens", "1M", "--workers", 2]
        process = [sys.executable, "-c", measure, sys.executable, *map(str, command)]
        done = subprocess.run(process, capture_output=True, text=True, timeout=TIMEOUT, check=True)
        peaks.append(int(done.stdout.splitlines()[-1]))
    assert peaks[1] < 1.1 * peaks[0], peaks


def test_a_finished_directory_is_left_alone_and_other_settings_are_refused(tmp_path: Path, capsys: Capture) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", documents())
    prepare(tmp_path / "out", "--input", source, "--max-tokens", "50k")
    assert len(read_shards(tmp_path / "out", "train")) == 45_000 and len(read_shards(tmp_path / "out", "val")) == 5_000
    before = contents(tmp_path / "out")
    assert "already prepared" in prepare(tmp_path / "out", "--input", source, "--max-tokens", "50k")[0]
    same = ["--tokenizer", "byte", "--input", source]
    message = refusal(prepare_data.main, capsys, "--out", tmp_path / "out", *same, "--max-tokens", "60k")
    assert "max_tokens was 50000, now 60000" in message
    assert contents(tmp_path / "out") == before
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "train_000000.bin").write_bytes(b"not ours")
    message = refusal(prepare_data.main, capsys, "--out", tmp_path / "foreign", *same)
    assert "not prepared by this script" in message
    (tmp_path / "foreign" / "meta.json").write_text('{"tokenizer": "byte"}')  # of an older version, say
    message = refusal(prepare_data.main, capsys, "--out", tmp_path / "foreign", *same)
    assert "meta.json" in message
    assert (tmp_path / "foreign" / "train_000000.bin").read_bytes() == b"not ours"
    (tmp_path / "out" / "train_000000.bin").unlink()
    message = refusal(prepare_data.main, capsys, "--out", tmp_path / "out", *same, "--max-tokens", "50k")
    assert "train_000000.bin is missing" in message
    # A bad line after all that is needed is not met, however far the threads read ahead.
    (tmp_path / "late.jsonl").write_bytes(source.read_bytes() * 5 + b"{")
    prepare(tmp_path / "late", "--input", tmp_path / "late.jsonl", "--max-tokens", "50k", "--workers", 8)


def test_bad_text_is_named_in_one_line(tmp_path: Path, capsys: Capture) -> None:
    for columns, names, said in [
        ([["a"]], ["body"], 'Field "text" does not exist'),
        ([["a"], ["b"]], ["text", "text"], 'Field "text" exists 2 times'),
        ([[1, 2]], ["text"], 'it has no string under "text"'),
        ([[["a"]]], ["text"], 'it has no string under "text"'),
    ]:
        parquet.write_table(pyarrow.table([pyarrow.array(c) for c in columns], names=names), tmp_path / "a.parquet")
        with pytest.raises(ValueError, match=f"a.parquet cannot be read: .*{said}"):
            list(prepare_data.read_texts(tmp_path / "a.parquet"))
    for name, content, said in [
        ("none.parquet", b"", "cannot be read"),
        ("cut.parquet", (tmp_path / "a.parquet").read_bytes()[:-20], "cannot be read"),
        ("line.jsonl", b'{"text": "good"}\n\n{"text": "cut\n', "line 3, cannot be read"),
        ("number.jsonl", b'{"text": 7}\n', "line 1, cannot be read: it has no string under"),
        ("deep.jsonl", b"[" * 100_000, "line 1, cannot be read"),
        ("half.jsonl", b'{"text": "good"}\n{"text": "half \\ud800"}\n', "line 2, cannot be read"),
        ("bytes.jsonl", b'{"text": "\xff"}\n', "line 1, cannot be read"),
        ("bytes.txt", b"good \xff", "cannot be read: 'utf-8' codec can't decode byte 0xff in position 5"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 100)[:-10], "line 94, cannot be read"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.* {said}"):
            list(prepare_data.read_texts(tmp_path / name))
    for name, content, said in [
        ("bytes.txt", b"good \xff", "bytes.txt cannot be read"),
        ("empty.txt", b"", "empty"),
        ("short.txt", b"a", "choose a smaller --val-tokens"),
        ("text.doc", b"?", "text.doc: unknown format"),
        ("none.txt", None, "none.txt is not a file"),
        ("", None, "is not a file; for a directory"),
    ]:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        options = ["--out", tmp_path / f"out-{name}", "--tokenizer", "byte", "--input", tmp_path / name]
        message = refusal(prepare_data.main, capsys, *options, "--val-tokens", 5)
        assert said in message and message.startswith("prepare_data.py: error: "), message
    for options in (
        "--max-tokens many", f"--max-tokens {9**400}", "--workers 0", "--workers 999999999999", "--shard-tokens 0",
        "--source books", "--source demo --input a.txt", "book.txt",
    ):  # fmt: skip
        refusal(prepare_data.main, capsys, *options.split(), status=2)


def test_fineweb_is_fetched_from_the_hub_through_every_fault(
    site: Site, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    texts = documents(3000)
    serve_hub(site, tmp_path, texts, files=3)
    # The first two while it asks for the first page of the listing:
    site.faults[:] = ["503", "drop", "", "", "503", "429", "drop", "drop", "ignore range", "drop"]
    prepare(tmp_path / "out", "--shard-tokens", "50k", "--val-tokens", "10k", HF_ENDPOINT=site.url, HF_TOKEN="secret")
    assert np.array_equal(all_tokens(tmp_path / "out"), byte_tokens(texts))
    assert not site.faults and all(headers.get("Authorization") == "Bearer secret" for _, headers in site.requests)
    assert any("Range" in headers for _, headers in site.requests)
    assert not (tmp_path / "out" / ".work").exists()

    site.requests.clear()  # a small amount needs the first file only
    prepare(tmp_path / "small", "--max-tokens", "20k", HF_ENDPOINT=site.url)
    assert [path for path, _ in site.requests if path.endswith(".parquet")] == [
        f"{FINEWEB}/resolve/main/sample/10BT/000_00000.parquet"
    ]

    site.faults[:] = ["", "", "lie"]
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    message = refusal(prepare_data.main, capsys, "--tokenizer", "byte", "--out", tmp_path / "lied to")
    assert "000_00000.parquet: the download has the wrong size or sha256" in message
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    message = refusal(prepare_data.main, capsys, "--tokenizer", "byte", "--out", tmp_path / "nothing")
    assert "sample/10BT: ConnectionError" in message


def task_lines(count: int) -> dict[str, list[dict]]:
    """Tasks as HellaSwag and LAMBADA publish theirs, of random short words."""
    rng = np.random.default_rng(1)

    def words(least: int, most: int) -> str:
        return " ".join("".join(rng.choice([*"aeioübd"], size=3)) for _ in range(rng.integers(least, most)))

    hellaswag = [
        {"ind": i, "ctx": words(1, 9), "endings": [words(1, 5) for _ in range(4)], "label": i % 4} for i in range(count)
    ]
    return {"hellaswag": hellaswag, "lambada": [{"text": words(2, 12)} for _ in range(count)]}


def as_jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_evaluation_sets_are_fetched_with_the_default_corpus(
    site: Site, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    for name, rows in task_lines(30).items():
        content, file = as_jsonl(rows), prepare_data.FILES[name]
        site.content[f"/{name}"] = content
        served = file._replace(size=len(content), sha256=hashlib.sha256(content).hexdigest(), url=f"{site.url}/{name}")
        monkeypatch.setitem(prepare_data.FILES, name, served)
    serve_hub(site, tmp_path, documents(300), files=3)
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    monkeypatch.chdir(tmp_path)
    prepare_data.main(["--tokenizer", "byte", "--val-tokens", "1k", "--workers", "1"])
    assert {path.name for path in Path("data").iterdir()} == {"fineweb-edu", "hellaswag", "lambada"}
    assert Path("data/hellaswag/hellaswag_val.jsonl").read_bytes() == site.content["/hellaswag"]
    assert Path("data/lambada/lambada_test.jsonl").read_bytes() == site.content["/lambada"]
    site.requests.clear()
    prepare_data.main(["--source", "lambada"])
    assert not site.requests  # it is there
    path, tokenizer = Path("data/hellaswag/hellaswag_val.jsonl"), prepare_data.get_tokenizer("byte")
    tasks = train.read_tasks("hellaswag", path, tokenizer, 7)
    assert len(tasks.rows) == 4 * len(tasks.labels) == 28
    path.write_bytes(path.read_bytes().replace(b"a", b"b", 1))
    with pytest.raises(ValueError, match=r"hellaswag_val.jsonl is damaged"):
        train.read_tasks("hellaswag", path, tokenizer, 7)


def test_a_malformed_task_is_named(tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "mine.jsonl", prepare_data.get_tokenizer("byte")
    good = as_jsonl(task_lines(1)["hellaswag"])
    path.write_bytes(good)
    assert len(train.read_tasks("hellaswag", path, tokenizer, 7).rows) == 4
    for wrong in (
        "{}", "[" * 10**5, "7", '{"ctx": "a", "endings": ["b"], "label": 1}', '{"ctx": "a", "endings": 3, "label": 0}',
        '{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 1e400}', '{"ctx": 1, "endings": ["b"], "label": "x"}',
    ):  # fmt: skip
        path.write_bytes(good + wrong.encode())
        with pytest.raises(ValueError, match="line 2"):
            train.read_tasks("hellaswag", path, tokenizer, 7)


def write_tasks(directory: Path, sets: dict[str, list[dict]]) -> None:
    for name, rows in sets.items():
        (directory / name).mkdir()
        (directory / name / prepare_data.FILES[name].name).write_bytes(as_jsonl(rows))


# Training


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the byte tokenizer, three for training and one for validation, and beside them the evaluation sets."""
    directory = tmp_path_factory.mktemp("data")
    source = write_jsonl(directory / "a.jsonl", documents(120))
    prepare(
        directory / "shards", "--input", source, "--shard-tokens", "20k", "--val-tokens", "3k", "--max-tokens", "50k"
    )
    assert len(list((directory / "shards").glob("train_*.bin"))) == 3
    write_tasks(directory, task_lines(12))
    return directory / "shards"


SETTINGS = {
    "n_layer": 2, "n_head": 2, "n_embd": 32, "device": "cpu", "dtype": "float32", "sequence_length": 32,
    "micro_batch_size": 4, "total_batch_tokens": 512, "steps": 6, "warmup_steps": 2, "max_lr": 1e-2, "min_lr": 1e-3,
    "eval_every": 3, "eval_tokens": 2000, "sample_every": 0, "checkpoint_every": 3,
}  # fmt: skip


def run_train(shards: Path, out: Path, **changes: object) -> Path:
    """A run in this process; its last checkpoint."""
    assert (
        train.train(replace(train.TrainConfig(), **(SETTINGS | {"data": str(shards), "out": str(out)} | changes))) == 0
    )
    return model_module.checkpoints(out)[-1]


def flags(shards: Path, out: Path, **changes: object) -> list[str]:
    """The command line of the same run."""
    settings = SETTINGS | {"data": shards, "out": out} | changes
    given = []
    for name, value in settings.items():
        given += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
    return given


def read_log(out: Path) -> list[dict]:
    """The lines of metrics.jsonl after the settings, without what tells the time."""
    first, *lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert first["config"]["seed"] == 1337
    timed = ("tokens_per_second", "mfu", "seconds")
    assert all(line["seconds"] >= 0 for line in lines)
    return [{name: line[name] for name in line if name not in timed} for line in lines]


def weights(checkpoint: Path) -> dict[str, np.ndarray]:
    return load_numpy(checkpoint / "model.safetensors")


def assert_same_weights(first: Path, second: Path, tolerance: float = 0.0) -> None:
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    for name in one:
        if tolerance and name.endswith("c_attn.bias"):
            # The bias of the keys moves all scores of a query alike: its gradient is rounding, which Adam blows up.
            one[name], other[name] = (
                np.delete(w[name], np.s_[len(w[name]) // 3 : len(w[name]) * 2 // 3]) for w in (one, other)
            )
        np.testing.assert_allclose(one[name], other[name], rtol=0, atol=tolerance, err_msg=name)


def test_learning_rate_rises_from_zero_and_falls_as_a_cosine() -> None:
    config = replace(train.TrainConfig(), steps=110, warmup_steps=10, max_lr=1.0, min_lr=0.1)
    rates = [train.learning_rate(step, config) for step in range(111)]
    assert rates[0] == 0 and rates[5] == pytest.approx(0.5) and rates[10] == 1 and rates[110] == pytest.approx(0.1)
    assert rates[60] == pytest.approx(0.55) and rates[35] == pytest.approx(0.55 + 0.45 * math.sqrt(0.5))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_each_sequence_is_used_once_an_epoch_and_the_step_decides_which(data: Path) -> None:
    config = replace(train.TrainConfig(), sequence_length=32, total_batch_tokens=32 * 100, seed=5)
    split = prepare_data.open_split(data, "train", 32)
    shards = [np.fromfile(path, dtype="<u2", offset=1024) for path in split.paths]
    cut = [shard[i * 32 : i * 32 + 33] for shard in shards for i in range((len(shard) - 1) // 32)]
    total = split.sequences
    assert len(cut) == total and np.array_equal(prepare_data.read_sequences(split, np.arange(total)), np.stack(cut))
    stream = np.concatenate([train.batch_indices(split, config, step) for step in range(1, 2 * total // 100 + 2)])
    first, second = stream[:total], stream[total : 2 * total]
    assert sorted(first) == sorted(second) == list(range(total))
    assert not np.array_equal(first, second) and not np.array_equal(first, np.sort(first))
    assert np.array_equal(train.batch_indices(split, config, 7), stream[600:700])
    assert not np.array_equal(train.batch_indices(split, replace(config, seed=6), 7), stream[600:700])
    for ranks, micro_batch_size in [(1, 100), (2, 10), (4, 5), (20, 5)]:
        parts = [
            train.load_batch(split, config, micro_batch_size, 7, train.Process(rank, ranks, CPU))
            for rank in range(ranks)
        ]
        assert {part.shape for part in parts} == {(100 // ranks // micro_batch_size, micro_batch_size, 33)}
        together = torch.stack(parts, dim=1).reshape(100, 33)
        assert np.array_equal(together.numpy(), np.stack([cut[i] for i in stream[600:700]]))


def test_law_2_and_6_on_one_process_and_on_two(data: Path, tmp_path: Path) -> None:
    """However a batch is cut, the same weights come out, and the logged losses are those of the whole batch."""
    start = tmp_path / "start"
    save_model(random_model(GPTConfig(32, 257, 2, 2, 32)), start, "byte")
    changes = {"init_from": str(start), "steps": 4, "eval_every": 2, "grad_clip": 0.5}
    whole = run_train(data, tmp_path / "whole", **changes | {"micro_batch_size": 16})
    pieces = run_train(data, tmp_path / "pieces", **changes | {"micro_batch_size": 2})
    command = ["--standalone", "--nproc_per_node=2", ROOT / "train.py"]
    run("torchrun", *command, *flags(data, tmp_path / "ranks", **changes))
    for other in (pieces, tmp_path / "ranks" / "step_000004"):
        assert_same_weights(whole, other, tolerance=5e-5)
        for one, two in zip(read_log(tmp_path / "whole"), read_log(other.parent), strict=True):
            assert one.keys() == two.keys() and one == pytest.approx(two, rel=1e-5)
    # The losses, from their definition
    split, model = prepare_data.open_split(data, "train", 32), load_model(start)
    config = replace(train.TrainConfig(), **SETTINGS)
    sequences = torch.from_numpy(prepare_data.read_sequences(split, train.batch_indices(split, config, 1)))
    log = read_log(tmp_path / "ranks")
    assert [line["step"] for line in log] == [0, 1, 2, 2, 3, 4, 4]
    assert log[1]["train_loss"] == pytest.approx(model(sequences[:, :-1], sequences[:, 1:]).item(), rel=1e-5)
    sequences = torch.from_numpy(read_shards(data, "val")[: 62 * 32 + 1].astype(np.int64))  # 62: 2000 tokens, all whole
    loss = F.cross_entropy(model(sequences[:-1].view(62, 32)).flatten(0, 1), sequences[1:])
    assert log[0]["val_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_evaluation_is_what_its_definition_says_on_any_ranks(data: Path, tmp_path: Path, capsys: Capture) -> None:
    start = tmp_path / "start"
    save_model(random_model(GPTConfig(40, 257, 2, 2, 32)), start, "byte")

    def losses(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each token but the first, in float64; and whether it is the most likely."""
        logits = numpy_gpt2(start, tokens[None, :-1])[0]
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return -log_probs[np.arange(len(tokens) - 1), tokens[1:]], logits.argmax(-1) == tokens[1:]

    val = read_shards(data, "val").astype(np.int64)[: 62 * 32 + 1]  # 2000 tokens, in whole sequences
    nats = np.array([losses(val[i * 32 : i * 32 + 33])[0].sum() for i in range(62)])
    summed, normalized, words = [], [], []
    for lines in ("hellaswag", "lambada"):
        for line in (data.parent / lines / prepare_data.FILES[lines].name).read_text().splitlines():
            task = json.loads(line)
            context, word = task.get("text", "").rpartition(" ")[::2]
            scores = []
            for ending in task.get("endings", [word]):
                count = len(f" {ending}".encode())
                text = np.array([*f"{task.get('ctx', context)} {ending}".encode()])[-41:]  # as much as fits
                loss, top = losses(text)
                scores.append((loss[-count:].sum(), loss[-count:].mean()))
                words += [(scores[-1][0], top[-count:].all())] if word else []
            if lines == "hellaswag":
                sums, means = zip(*scores, strict=True)
                summed.append(np.argmin(sums) == task["label"])
                normalized.append(np.argmin(means) == task["label"])
    assert sum(summed) > 0 and sum(normalized) > 0 and summed != normalized
    word_nats, word_right = zip(*words, strict=True)
    expected = {
        "val_loss": nats.sum() / 62 / 32,
        "val_loss_se": (nats / 32).std(ddof=1) / math.sqrt(62),
        "val_perplexity": math.exp(nats.sum() / 62 / 32),
        "val_bits_per_byte": nats.sum() / math.log(2) / (val[1:] != 256).sum(),
        "lambada_perplexity": math.exp(np.mean(word_nats)),
    }
    for name, right in (("hellaswag_acc", summed), ("hellaswag_acc_norm", normalized), ("lambada_acc", word_right)):
        expected |= {name: np.mean(right), f"{name}_se": np.std(right, ddof=1) / math.sqrt(12)}

    one, many, options = tmp_path / "one", tmp_path / "many", {"init_from": start, "eval_only": True}
    settings = SETTINGS | {"data": str(data), "out": str(one)} | options | {"init_from": str(start)}
    assert train.train(replace(train.TrainConfig(), **settings)) == 0
    said = capsys.readouterr().out
    ranks = ["--standalone", "--nproc_per_node=3", ROOT / "train.py"]
    for output in (said, run("torchrun", *ranks, *flags(data, many, **options, total_batch_tokens=384))[0]):
        line = json.loads(output.splitlines()[-1])
        assert line.pop("evaluated") == str(start) and line == pytest.approx(expected, rel=1e-5)
    assert f"{expected['val_loss']:.4f} ± {expected['val_loss_se']:.4f}\n" in said and "published" not in said
    assert not one.exists() and not many.exists()  # nothing is written


def test_tasks_whose_answers_are_known(tmp_path: Path, data: Path, capsys: Capture) -> None:
    """A model without blocks, whose embeddings are all at right angles, expects every token to come again."""
    model = random_model(GPTConfig(32, 257, 1, 1, 512))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.wte.weight[:257, :257] = torch.eye(257)
        model.transformer.ln_f.weight.fill_(0.2)
    save_model(model, tmp_path / "repeats", "byte")
    shutil.copytree(data, tmp_path / "shards")
    # After a space, the first has the least sum and the second the least mean.
    endings = ["a", "aaaaaaaa", "abcdefg", "bb"]
    hellaswag = [{"ctx": "b", "endings": endings, "label": label} for label in (0, 1, 1, 2)]
    lambada = [{"text": text} for text in ("a   ", "a b", "b a", "a a", "aaa  ")]  # two end in one more space
    write_tasks(tmp_path, {"hellaswag": hellaswag, "lambada": lambada})
    settings = SETTINGS | {"data": str(tmp_path / "shards"), "out": str(tmp_path / "out"), "eval_only": True}
    assert train.train(replace(train.TrainConfig(), **settings, init_from=str(tmp_path / "repeats"))) == 0
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (metrics["hellaswag_acc"], metrics["hellaswag_acc_norm"], metrics["lambada_acc"]) == (0.25, 0.5, 0.4)


STOP = """
import os, sys, train
step, signum, rank = map(int, sys.argv[1:4])
rate = train.learning_rate
def learning_rate(at, config):  # which the loop asks for once in each update
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if at == step and not again and rank in (-1, int(os.environ.get("RANK", 0))):
        os.kill(os.getpid(), signum)
    return rate(at, config)
train.learning_rate = learning_rate
train.main(sys.argv[4:])
"""  # train.py, which sends itself a signal in an update


def start_ranks(ranks: int, *options: object, stop: tuple[int, int] | None = None) -> list[subprocess.Popen]:
    """train.py in processes that find each other as torchrun's do. With `stop` they send themselves a signal in a
    step."""
    meeting = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    places = [meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    begin = ["-c", STOP, *stop, -1] if stop else ["train.py"]
    return [start(*begin, *options, **(place if ranks > 1 else {})) for place in places]


def assert_same_run(first: Path, second: Path, checkpoint: str) -> None:
    """Weights, optimizer state and log are the same to the bit."""
    assert_same_weights(first / checkpoint, second / checkpoint)
    states = [torch.load(out / checkpoint / "trainer.pt", weights_only=True)["optimizer"] for out in (first, second)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    one, other = (state["state"] for state in states)
    assert one.keys() == other.keys() and len(one) > 10
    assert all(torch.equal(one[i][part], other[i][part]) for i in one for part in ("exp_avg", "exp_avg_sq", "step"))
    assert read_log(first) == read_log(second)


@pytest.mark.parametrize(("ranks", "dtype"), [(1, "bfloat16"), (2, "float32")])
def test_law_3_interrupted_run_equals_uninterrupted(ranks: int, dtype: str, data: Path, tmp_path: Path) -> None:
    changes = {"steps": 20, "checkpoint_every": 4, "eval_every": 10, "dropout": 0.1, "log_every": 3, "dtype": dtype}
    out = tmp_path / "killed"

    def statuses(processes: list[subprocess.Popen]) -> list[int]:
        return [process.wait(timeout=TIMEOUT) for process in processes]

    processes = start_ranks(ranks, *flags(data, out, **changes), stop=(7, signal.SIGTERM))
    assert statuses(processes) == [128 + signal.SIGTERM] * ranks
    # It saved what it had, between two lines of the log too.
    assert [path.name for path in model_module.checkpoints(out)] == ["step_000004", "step_000007"]
    processes = start_ranks(ranks, *flags(data, out, **changes, resume=True), stop=(15, signal.SIGKILL))
    assert -signal.SIGKILL in statuses(processes)
    assert model_module.checkpoints(out)[-1].name == "step_000012"
    processes = start_ranks(ranks, "--out", out, "--resume")  # it knows its settings
    processes += start_ranks(ranks, *flags(data, tmp_path / "whole", **changes))
    assert statuses(processes) == [0] * 2 * ranks
    assert [path.name for path in model_module.checkpoints(out)] == ["step_000016", "step_000020"]
    assert_same_run(out, tmp_path / "whole", "step_000020")


def test_torchrun_restarts_a_killed_worker(data: Path, tmp_path: Path) -> None:
    changes = {"steps": 10, "checkpoint_every": 3, "total_batch_tokens": 256}
    (tmp_path / "dies.py").write_text(STOP)
    torchrun = ["torchrun", "--standalone", "--nproc_per_node=2", "--max-restarts=1", tmp_path / "dies.py"]
    dies = [8, int(signal.SIGKILL), 1]  # rank 1 in step 8, the first time
    said, _ = run(*torchrun, *dies, *flags(data, tmp_path / "healed", **changes, resume=True))
    assert said.count("resumed from") == 1
    whole = start_ranks(2, *flags(data, tmp_path / "whole", **changes))
    assert [process.wait(timeout=TIMEOUT) for process in whole] == [0, 0]
    assert_same_run(tmp_path / "healed", tmp_path / "whole", "step_000010")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_in_an_evaluation_loses_nothing(ranks: int, data: Path, tmp_path: Path) -> None:
    """The second evaluation is left at its first batch, and the checkpoint of its step is written."""
    changes = {"steps": 6, "checkpoint_every": 0, "eval_every": 3}
    stop = STOP.replace(
        "train.learning_rate = learning_rate",
        """
score, calls = train.score_rows, []
def score_rows(*args):
    calls.append(args)
    if len(calls) == 4 and rank in (-1, int(os.environ.get("RANK", 0))):  # the first set of the second evaluation
        os.kill(os.getpid(), signum)
    return score(*args)
train.score_rows = score_rows
""",
    )
    meeting = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    places = [meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {} for rank in range(ranks)]
    options = flags(data, tmp_path / "left", **changes)
    left = [start("-c", stop, 0, int(signal.SIGINT), ranks - 1, *options, **place) for place in places]
    expected = [128 + signal.SIGTERM] * (ranks - 1) + [128 + signal.SIGINT]  # of the rank that had the signal
    assert [process.wait(timeout=TIMEOUT) for process in left] == expected
    assert [path.name for path in model_module.checkpoints(tmp_path / "left")] == ["step_000003"]
    assert [line["step"] for line in read_log(tmp_path / "left")] == [0, 1, 2, 3]
    both = start_ranks(ranks, "--out", tmp_path / "left", "--resume")
    both += start_ranks(ranks, *flags(data, tmp_path / "whole", **changes))
    assert [process.wait(timeout=TIMEOUT) for process in both] == [0] * 2 * ranks
    assert_same_run(tmp_path / "left", tmp_path / "whole", "step_000006")


def test_the_log_is_made_anew_when_it_is_gone(data: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    rate = train.learning_rate

    def learning_rate(step: int, config: train.TrainConfig) -> float:
        if step == 3:
            shutil.rmtree(tmp_path / "out")
        return rate(step, config)

    monkeypatch.setattr(train, "learning_rate", learning_rate)
    assert run_train(data, tmp_path / "out").name == "step_000006"
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 3, 4, 5, 6, 6]


def test_run_goes_on_with_other_ranks_and_divided_optimizer(data: Path, tmp_path: Path) -> None:
    changes = {"checkpoint_every": 2, "keep_checkpoints": 0, "eval_every": 2}
    whole = run_train(data, tmp_path / "whole", **changes)
    shutil.copytree(tmp_path / "whole", tmp_path / "moved")

    def cut_back(step: int) -> None:
        for checkpoint in model_module.checkpoints(tmp_path / "moved"):
            if int(checkpoint.name[5:]) > step:
                shutil.rmtree(checkpoint)

    cut_back(2)
    two_machines = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d"]
    two_machines += [f"--rdzv_endpoint=127.0.0.1:{free_port()}", ROOT / "train.py"]
    options = flags(data, tmp_path / "moved", **changes | {"micro_batch_size": 2}, resume=True, zero=True)
    agents = [start("torchrun", *two_machines, *options, output=subprocess.PIPE) for _ in range(2)]
    outputs = [agent.communicate(timeout=TIMEOUT)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert sum("6 steps done" in output for output in outputs) == 1  # rank 0 alone speaks
    assert_same_weights(whole, tmp_path / "moved" / "step_000006", tolerance=1e-4)

    cut_back(4)  # written by two ranks with half of the optimizer each, and resumed by one
    again = run_train(data, tmp_path / "moved", **changes, resume=True)
    assert_same_weights(whole, again, tolerance=1e-4)
    for one, two in zip(read_log(tmp_path / "whole"), read_log(tmp_path / "moved"), strict=True):
        assert one == pytest.approx(two, rel=1e-4)


def test_divergence_stops_the_run_before_the_update(data: Path, tmp_path: Path, capsys: Capture) -> None:
    changes = {"steps": 9, "warmup_steps": 0, "max_lr": 1e30, "min_lr": 1e30, "checkpoint_every": 1, "eval_every": 0}
    message = refusal(train.main, capsys, *flags(data, tmp_path, **changes))
    said = re.fullmatch(r"train.py: error: step (\d): loss .*not applied.*of step (\d)", message)
    step, good = int(said[1]), int(said[2])
    assert good == step - 1 and model_module.checkpoints(tmp_path)[-1].name == f"step_{good:06d}"
    assert all(math.isfinite(line["train_loss"]) for line in read_log(tmp_path)) and len(read_log(tmp_path)) == good


def test_full_disk_loses_no_checkpoint(data: Path, tmp_path: Path) -> None:
    changes = {"steps": 2, "checkpoint_every": 1, "eval_every": 2}
    with limited(resource.RLIMIT_FSIZE, 100_000):
        _, error = run("train.py", *flags(data, tmp_path / "out", **changes), status=1)
    assert re.fullmatch(r"train.py: error: \S*step_000001 could not be written: .*\n", error)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".lock", "metrics.jsonl"}
    run_train(data, tmp_path / "out", **changes, resume=True)
    assert [line["step"] for line in read_log(tmp_path / "out")] == [0, 1, 2, 2]  # from the beginning


def test_law_7_a_directory_has_one_writer(data: Path, tmp_path: Path, capsys: Capture) -> None:
    run_flags = flags(data, tmp_path / "run", steps=10**6, checkpoint_every=0)
    training = start("train.py", *run_flags, output=subprocess.PIPE)
    read_lines(training, 3, "tok/s")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for options in ([], ["--resume"]):
        assert "run is in use by another process" in refusal(train.main, capsys, *run_flags, *options)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes().startswith(before)
    training.kill()
    training.wait(timeout=TIMEOUT)
    assert all("step" in line for line in read_log(tmp_path / "run")[:3])

    source = write_jsonl(tmp_path / "a.jsonl", documents() * 100)
    options = ["--out", tmp_path / "data", "--tokenizer", "byte", "--input", source, "--shard-tokens", "100k"]
    preparing = start("prepare_data.py", *options, output=subprocess.PIPE)
    read_lines(preparing, 1, ".bin: ")
    assert "data is in use by another process" in refusal(prepare_data.main, capsys, *options)
    preparing.kill()
    preparing.wait(timeout=TIMEOUT)
    run("prepare_data.py", *options)  # the lock ended with its process
    assert np.array_equal(all_tokens(tmp_path / "data"), byte_tokens(documents() * 100))


def flip(path: Path, rng: np.random.Generator, first: int = 0) -> None:
    """Turn one bit of a file over."""
    content = bytearray(path.read_bytes())
    content[rng.integers(first, len(content))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.pt", "config.json", "vocab.json", "SHA256SUMS"])
def test_law_8_a_damaged_checkpoint_is_skipped(name: str, data: Path, tmp_path: Path, capsys: Capture) -> None:
    whole, rng = run_train(data, tmp_path / "run"), np.random.default_rng(0)
    log = read_log(tmp_path / "run")
    sums = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=whole, capture_output=True, text=True, check=True)
    assert sums.stdout.count(": OK\n") == len(list(whole.iterdir())) - 1
    if name == "SHA256SUMS":
        (whole / name).write_bytes(b"")
    else:
        flip(whole / name, rng)
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            prepare_data.check_checksums(whole, [name])
    if name in ("model.safetensors", "config.json"):
        assert f"{name} is damaged" in refusal(sample.main, capsys, "--model", whole)
    (whole.parent / "step_000009.tmp").mkdir()  # one that was being written when the machine died
    with open(whole.parent / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 7, "train_l\xff')
    resumed = run_train(data, tmp_path / "run", resume=True)
    said = capsys.readouterr().err
    assert "is damaged" in said and "skipping step_000006" in said and "metrics.jsonl has a damaged line" in said
    prepare_data.check_checksums(resumed, train.CHECKPOINT_FILES)
    assert read_log(tmp_path / "run") == log and not list(whole.parent.glob("*.tmp"))


def test_law_8_damaged_data_is_named(data: Path, tmp_path: Path, capsys: Capture) -> None:
    rng, shards = np.random.default_rng(0), tmp_path / "shards"
    sums = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=data, capture_output=True, text=True, check=True)
    assert sums.stdout.count(": OK\n") == len(list(data.glob("*.bin"))) + 1
    for name, first in (
        ("meta.json", 0),
        ("train_000001.bin", 1024),
        ("val_000000.bin", 1024),
        ("train_000000.bin", 0),
    ):
        shutil.copytree(data, shards)
        flip(shards / name, rng, first)
        message = refusal(train.main, capsys, *flags(shards, tmp_path / "out", steps=3))
        assert f"{name} is" in message and not model_module.checkpoints(tmp_path / "out")
        shutil.rmtree(shards)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    shutil.copytree(data, shards)
    (shards / "train_000001.bin").unlink()
    assert "train_000001.bin is missing" in refusal(train.main, capsys, *flags(shards, tmp_path / "out"))
    (shards / "SHA256SUMS").unlink()
    assert "sha256sum meta.json" in refusal(train.main, capsys, *flags(shards, tmp_path / "out"))


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("name", ["train_000001.bin", "val_000000.bin"])
def test_law_8_exchanged_data_is_refused(
    name: str, foreign: bool, data: Path, tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    shards, out = tmp_path / "shards", tmp_path / "out"
    tokens = [bytes([i]) for i in range(256)] + [bytes([i // 256, i % 256]) for i in range(50_000)]
    ranks, special = {token: i for i, token in enumerate(tokens)}, {"<|endoftext|>": 50256}
    gpt2 = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "gpt2", gpt2)  # which cannot be fetched here
    shutil.copytree(data, shards)
    model = "--init-from", save(tmp_path / "start", 32, "gpt2" if foreign else "byte", 50257 if foreign else 257)
    if foreign:  # no meta.json, as of another program
        (shards / "meta.json").unlink()
        (shards / "SHA256SUMS").unlink()
    train_flags = [*flags(shards, out, steps=3), *model]
    with pytest.raises(SystemExit) as ending:
        train.main([str(option) for option in train_flags])
    assert ending.value.code == 0
    content = (shards / name).read_bytes()
    (shards / name).write_bytes(content[:1024].ljust(len(content), b"\0"))  # another, of the same size
    if not foreign:
        prepare_data.add_checksums(shards, [name])
    assert name in refusal(train.main, capsys, *train_flags, "--resume")


def test_reading_data_does_not_fill_the_memory(tmp_path: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    tokens = 30_000_000
    with open(tmp_path / "train_000000.bin", "wb") as file:
        file.write(np.array([20240520, 1, tokens, *[0] * 253], dtype="<i4").tobytes() + bytes(2 * tokens))
    split = prepare_data.open_split(tmp_path, "train", 1024)
    prepare_data.read_sequences(split, np.arange(100))
    before = resident()
    for start in range(0, split.sequences, 500):
        prepare_data.read_sequences(split, np.arange(start, min(start + 500, split.sequences)))
    assert resident() - before < 20e6  # of 60 MB


def test_compiled_run_evaluates_samples_and_trains_the_same(data: Path, tmp_path: Path) -> None:
    changes = {"sample_every": 3, "checkpoint_every": 0, "eval_tokens": 1990}
    eager = run_train(data, tmp_path / "eager", **changes)
    compiled = run_train(data, tmp_path / "compiled", **changes, compile=True)
    assert_same_weights(eager, compiled, tolerance=1e-4)
    for one, two in zip(read_log(tmp_path / "eager"), read_log(tmp_path / "compiled"), strict=True):
        assert one == pytest.approx(two, rel=1e-3)


def test_micro_batch_is_found_and_one_too_large_ends_in_one_line(
    data: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    changes = {"steps": 1, "eval_every": 0, "checkpoint_every": 0, "total_batch_tokens": 2**15}
    found = run_train(data, tmp_path / "found", **changes, micro_batch_size=0)
    assert "8 accumulation steps x 1 ranks x 128 sequences" in capsys.readouterr().out  # 4,096 tokens
    assert_same_weights(found, run_train(data, tmp_path / "given", **changes, micro_batch_size=64), tolerance=2e-5)
    # Of this size the queries, keys and values of 32,768 tokens alone are 200 MB, more than any heap has in reserve.
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    with limited(resource.RLIMIT_AS, in_use + 300_000_000):
        message = refusal(
            train.main, capsys, *flags(data, tmp_path / "much", **changes, micro_batch_size=2**10, n_embd=512)
        )
    assert "out of memory; leave --micro-batch-size out" in message


def test_mfu_is_told_for_known_cards_only() -> None:
    for name, in_bfloat16, in_float32 in [
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
    ]:
        assert model_module.peak_flops(name, torch.bfloat16) == model_module.peak_flops(name, torch.float16)
        assert model_module.peak_flops(name, torch.bfloat16) == in_bfloat16
        assert model_module.peak_flops(name, torch.float32) == in_float32


def test_bfloat16_run_is_close_to_float32(data: Path, tmp_path: Path) -> None:
    run_train(data, tmp_path / "float32")
    checkpoint = run_train(data, tmp_path / "bfloat16", dtype="bfloat16")
    assert all(array.dtype == np.float32 for array in weights(checkpoint).values())
    losses = [[line.get("train_loss", 0) for line in read_log(tmp_path / name)] for name in ("float32", "bfloat16")]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], abs=0.05)


def test_fine_tuning_uses_the_given_weights_and_a_part_of_their_context(data: Path, tmp_path: Path) -> None:
    save_model(random_model(GPTConfig(64, 257, 2, 2, 32)), tmp_path / "start", "byte")
    checkpoint = run_train(data, tmp_path / "out", init_from=str(tmp_path / "start"), steps=2, max_lr=0.0, min_lr=0.0)
    assert_same_weights(checkpoint, tmp_path / "start")
    assert load_model(checkpoint).config.block_size == 64


def test_shards_of_other_programs_are_read_and_bad_ones_are_named(data: Path, tmp_path: Path) -> None:
    def shard(name: str, tokens: list[int], header: tuple[int, int] = (20240520, 1), count: int | None = None) -> None:
        first = np.zeros(256, dtype="<i4")
        first[:3] = *header, len(tokens) if count is None else count
        (tmp_path / name).write_bytes(first.tobytes() + np.array(tokens, dtype="<u2").tobytes())

    shard("fineweb_train_000001.bin", [*range(50), 50256])  # modded-nanogpt's name, no meta.json
    assert prepare_data.read_meta(tmp_path) == {"tokenizer": "gpt2", "vocab_size": 50257}
    split = prepare_data.open_split(tmp_path, "train", 10)
    assert prepare_data.read_sequences(split, np.array([4]))[0].tolist() == [*range(40, 50), 50256]
    with pytest.raises(ValueError, match=r"fineweb_train_000001.bin holds token 50256; the vocabulary has 257"):
        prepare_data.read_sequences(split._replace(vocab_size=257), np.array([4]))
    with pytest.raises(ValueError, match="too little training data for 51-token sequences"):
        prepare_data.open_split(tmp_path, "train", 51)
    shard("tiny_shakespeare_val.bin", [*range(50)])  # llm.c's names
    assert prepare_data.open_split(tmp_path, "val", 10).tokens == [50]
    for bad, message in [
        ({"header": (20240521, 1)}, "not a token shard"),
        ({"header": (20240520, 2)}, "not a token shard"),
        ({"count": 4}, "is damaged: it has 1030 bytes and should have 1032"),
        ({"tokens": []}, "is damaged"),
    ]:
        shard("train_000002.bin", **{"tokens": [1, 2, 3], **bad})
        with pytest.raises(ValueError, match=f"train_000002.bin.*{message}"):
            prepare_data.open_split(tmp_path, "train", 10)
    for content in (b"", b"abc"):
        (tmp_path / "train_000002.bin").write_bytes(content)
        with pytest.raises(ValueError, match=r"train_000002.bin is not a token shard"):
            prepare_data.open_split(tmp_path, "train", 10)


def test_train_says_what_is_wrong_in_one_line(data: Path, tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    out = tmp_path / "out"
    for changes, said in [
        ({"total_batch_tokens": 500}, "--total-batch-tokens 500 must be a multiple of 128: 1 devices"),
        ({"model": "gpt3"}, "--model: invalid choice: 'gpt3'"),
        ({"steps": 0}, "--steps: must be a number from 1"),
        ({"steps": "9" * 400}, "--steps: must be a number from 1"),
        ({"total_batch_tokens": 768_000_000_000_000}, "--total-batch-tokens: must be a number from 1"),
        ({"max_lr": "nan"}, "--max-lr: must be a number from 0"),
        ({"min_lr": 1}, "--min-lr (1.0) must not be more than --max-lr (0.01)"),
        ({"dtype": "int8"}, "--dtype: invalid choice: 'int8'"),
    ]:
        assert said in refusal(train.main, capsys, *flags(data, **{"out": out} | changes), status=2)
    assert "unrecognized arguments: --stepz" in refusal(train.main, capsys, "--stepz", 3, status=2)

    def refused(**changes: object) -> str:
        return refusal(train.main, capsys, *flags(data, out, **changes))

    save_model(random_model(GPTConfig(16, 300, 2, 2, 32)), tmp_path / "other", "gpt2")
    assert "--sequence-length 32 is more than" in refused(init_from=str(save(tmp_path / "short", 16, "byte")))
    assert "uses the gpt2 tokenizer (257), and" in refused(init_from=str(save(tmp_path / "other", 32, "gpt2")))
    assert "is not a model" in refused(init_from="nothing")
    assert "create it with: python prepare_data.py --input YOUR_TEXT --out" in refused(data=str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    assert "has no val_*.bin" in refused(data=str(tmp_path / "empty"))
    (tmp_path / "empty" / "meta.json").write_text('{"complete": false}')
    prepare_data.add_checksums(tmp_path / "empty", ["meta.json"])
    assert "is incomplete" in refused(data=str(tmp_path / "empty"))
    assert "only 46,912 usable tokens" in refused(total_batch_tokens=2**16)
    assert "has no checkpoint" in refused(eval_only=True)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert "pip install tensorboard" in refused(tensorboard=True)
    assert not contents(out)  # nothing of all this left anything behind

    run_train(data, out)
    before = contents(out)
    assert "already contains a run" in refused()
    assert "--max-lr was 0.01 and is now 0.02; --seed" not in refused(resume=True, max_lr=0.02)
    message = refused(resume=True, max_lr=0.02, seed=1)
    assert "--seed was 1337 and is now 1" in message and "--max-lr was 0.01 and is now 0.02" in message
    assert contents(out) == before
    run_train(data, out, resume=True)  # a finished run: nothing left to do
    assert contents(out) == before
    _, error = run("train.py", *flags(tmp_path / "none", tmp_path / "new"), status=1)
    assert re.fullmatch("train.py: error: .* does not exist.*\n", error)


def save(directory: Path, block_size: int, tokenizer: str, vocab_size: int = 257) -> Path:
    save_model(random_model(GPTConfig(block_size, vocab_size, 2, 2, 32)), directory, tokenizer)
    return directory


# The commands, as a user gives them


def test_characters_are_never_broken_in_the_stream() -> None:
    decode = sample.stream_decoder(prepare_data.get_tokenizer("byte"))
    assert [decode(byte) for byte in "aé🙂".encode()] == ["a", "", "é", "", "", "", "🙂"]
    assert [decode(0xF0), decode(0x9F), decode(256), decode(97)] == ["", "", "\ufffd", "a"]


def test_demo_from_nothing_to_text(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    options = ["--steps", 12, "--sample-every", 12, "--eval-tokens", 5000]
    run("prepare_data.py", "--source", "demo", cwd=tmp_path)
    trained, _ = run("train.py", "--preset", "demo", *options, "--log-every", 1, cwd=tmp_path)
    losses = [line["train_loss"] for line in read_log(tmp_path / "out" / "demo") if "train_loss" in line]
    assert trained.endswith("python sample.py --model=out/demo\n")
    assert len(losses) == 12 and losses[0] == pytest.approx(math.log(257), rel=0.03) and losses[-1] < losses[0] - 1
    line = re.search(r"^step 12  loss [\d.]+  lr [\d.e-]+  norm [\d.]+  [\d,]+k? tok/s  0:00:00$", trained, re.M)
    assert line and len(line[0]) < 80

    text, told = run("sample.py", "--max-new-tokens", 50, cwd=tmp_path)
    assert re.fullmatch(r"out/demo/step_000012: [\d,]+ parameters, cpu\n\d+ tokens, [\d.]+ tokens/s\n", told) and text
    monkeypatch.chdir(tmp_path)

    def sampled(*options: object) -> str:
        capsys.readouterr()
        sample.main(["--max-new-tokens", "50", *(str(option) for option in options)])
        return capsys.readouterr().out

    assert sampled() == text and sampled("--seed", 1) != text
    assert len(parts := sampled("--prompt", "The", "--num-samples", 3).split("-" * 80 + "\n")) == 3
    assert all(part.startswith("The") and part.endswith("\n") for part in parts)
    monkeypatch.setattr("sys.stdin", io.StringIO("of which\n"))  # as echo writes it: the end of the line is not meant
    assert sampled("--prompt", "-") == sampled("--prompt", "of which")
    monkeypatch.setattr("sys.stdin", io.StringIO("The\n" + "x" * 2000 + "\nof which\n"))
    asked = sampled("--interactive")
    assert asked.startswith(sampled("--prompt", "The")) and "\nof which" in asked and "xx" not in asked
    assert "the prompt has 2000 tokens" in refusal(sample.main, capsys, "--prompt", "x" * 2000)
    assert "is not a model" in refusal(sample.main, capsys, "--model", "nothing")
    assert "--top-p: must be a number" in refusal(sample.main, capsys, "--top-p", 1.5, status=2)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "no checkpoint in " in refusal(sample.main, capsys)
