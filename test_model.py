"""
The project's promises, and a test for each. The eight laws:
1. Parity: on the same weights the logits are those of the reference GPT-2.
2. Split invariance: how ranks, micro-batches and accumulation steps divide a batch changes nothing (without dropout).
3. Exact resume: a run killed at any moment and resumed is the run that was never killed, bit for bit on a CPU.
4. Cache: greedy text is the same with the KV cache as without it.
5. Reproducible shards: the same text gives the same bytes with any number of workers and after any number of kills.
6. Loss sync: the logged loss is the mean over every token of the batch, over all ranks and micro-batches.
7. One writer: a second process in a directory is refused, and changes nothing.
8. Nothing damaged is believed: every file of a checkpoint and of prepared data has its sha256 checked.
Files, processes, signals and servers are real. The tests need no network; a few run only where there is a GPU.
"""

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
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE
from typing import Any

ROOT = Path(__file__).parent
# Before torch is imported, here and in all processes: the rounding of sums depends on the threads.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"

import numpy as np
import pyarrow.parquet
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import model as gpt
import prepare_data as prep
import sample
import train
from model import GPT, GPTConfig, generate, load_model, save_model

Patch = pytest.MonkeyPatch
TINY = GPTConfig(block_size=16, vocab_size=61, n_layer=2, n_head=2, n_embd=32)
TIMEOUT = 120  # seconds for any one process; none comes near
FORKS = multiprocessing.get_context("forkserver")  # of a process that has imported all this
FORKS.set_forkserver_preload([__name__, "torch._dynamo"])
cases = pytest.mark.parametrize
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
on_each_device = cases("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
PREPARE = "prepare_data.py --tokenizer=byte --input=a.jsonl --out=out"
CORPUS = f"{PREPARE} --val-tokens=3k --max-tokens=50k --shard-tokens=20k"
TRAIN = (
    "train.py --data=shards --out=out --n-layer=2 --n-head=2 --n-embd=32 --device=cpu --dtype=float32 --steps=6 "
    "--sequence-length=32 --micro-batch-size=4 --total-batch-tokens=512 --warmup-steps=2 --max-lr=1e-2 "
    "--min-lr=1e-3 --eval-every=3 --eval-tokens=2000 --sample-every=0 --checkpoint-every=3"
)
SAMPLE = "sample.py --model=start --max-new-tokens=50 --device=cpu"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, its shards (three for training and one for validation), the evaluation sets, and two models."""
    directory = tmp_path_factory.mktemp("corpus")
    with chdir(directory):
        for name, rows in tasks().items():
            os.mkdir(name)
            write_jsonl(f"{name}/{prep.FILES[name].name}", rows)
        write_jsonl("a.jsonl", documents(120))
        call(f"{CORPUS} --out=shards")
        save_model(random_model(), "tiny")
        save_random("start")
    return directory


@pytest.fixture(autouse=True)
def own_directory(corpus: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    """Each test works in a directory of its own, a copy of the corpus."""
    shutil.copytree(corpus, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def random_model(config: GPTConfig = TINY) -> GPT:
    """A model whose every parameter matters: weights, biases and norms far from their initial values."""
    torch.manual_seed(0)
    model = GPT(config).eval()
    for name, parameter in model.named_parameters():
        parameter.data += (0.1 if "ln_" in name else 0.3) * torch.randn_like(parameter)
    return model


def save_random(path: Path | str, block_size: int = 40, tokenizer: str = "byte", vocab_size: int = 257) -> None:
    save_model(random_model(GPTConfig(block_size, vocab_size, 2, 2, 32)), path, tokenizer)


def call(command: str, status: int = 0) -> tuple[str, str]:
    """What a script, called in this process, has printed and told when it ends with `status`."""
    name, *options = shlex.split(command)
    out = io.StringIO()
    err = io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ending:
        sys.exit(sys.modules[name.removesuffix(".py")].main(options))
    assert (ending.value.code or 0) == status, err.getvalue()
    return out.getvalue(), err.getvalue()


def refused(command: str, words: str, status: int = 1) -> str:
    """The one line, with these words in it, with which a script ends on an error."""
    *before, message = call(command, status)[1].strip().splitlines()
    assert all(line.startswith("warning: ") or " parameters, " in line for line in before)
    beginning = command.split()[0] if status == 1 else ".*"  # argparse has a name of its own
    assert re.match(f"{beginning}: error: .*{words}", message), message
    return message


def fails(error: type[Exception], words: str, function: Callable, *args: Any) -> None:
    with pytest.raises(error, match=words):
        function(*args)


def start(command: str) -> subprocess.Popen:
    """A script, or torchrun, as a user starts it, in a process that a test can interrupt."""
    name, *options = shlex.split(command)
    begin = ["-m", "torch.distributed.run"] if name == "torchrun" else [f"{ROOT}/{name}"]
    command = [sys.executable, *begin, *options]
    return subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True)


def run(command: str, status: int = 0) -> tuple[str, str]:
    """What a script that ends with `status` has written to its standard output and error."""
    process = start(command)
    said = process.communicate(timeout=TIMEOUT)
    assert process.returncode == status, "\n".join([command, *said])
    return said


@contextmanager
def running(command: str, lines: int, word: str) -> Iterator[None]:
    """Run a script, wait until it has printed so many lines with the word in them, and kill it when the block ends."""
    with start(command) as process:
        try:
            for _ in range(lines):
                next(line for line in process.stdout if word in line)
            yield
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL


@contextmanager
def limited(kind: int, most: int) -> Iterator[None]:
    """Have the operating system limit this process's file size or memory."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def memory_in_use(column: int) -> int:
    """The bytes of memory of this process: all (0), or those that are resident (1)."""
    return int(Path("/proc/self/statm").read_text().split()[column]) * os.sysconf("SC_PAGE_SIZE")


def free_port() -> int:
    """A port to listen on, reserved for as long as this process lives."""
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    _, port = reserved.getsockname()
    reserved.detach()  # and so never closed
    return port


def contents(directory: str) -> dict[str, bytes]:
    files = [path for path in Path(directory).rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def flip(path: Path | str) -> None:
    """Flip one bit of a file."""
    content = bytearray(Path(path).read_bytes())
    content[len(content) // 3] ^= 4
    Path(path).write_bytes(content)


def edit(path: Path | str, pattern: str, new: str = "") -> None:
    """Replace what a regular expression finds in a file."""
    Path(path).write_text(re.sub(pattern, new, Path(path).read_text(), flags=re.MULTILINE))


def plain_gpt2(directory: str, tokens: Tensor) -> Tensor:
    """The forward pass of a GPT-2 of two layers and two heads, in float64, from the published description and the
    published layout: (T,) -> (T, V)."""
    stored = load_file(f"{directory}/model.safetensors").items()
    weights = {name.removeprefix("transformer."): tensor.double() for name, tensor in stored}
    T = len(tokens)
    future = torch.ones(T, T).triu(1).bool()

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def layer_norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    x = weights["wte.weight"][tokens] + weights["wpe.weight"][:T]
    for block in ("h.0", "h.1"):
        qkv = linear(layer_norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn")
        q, k, v = qkv.view(T, 3, 2, -1).permute(1, 2, 0, 3)
        mixed = (q @ k.mT / math.sqrt(q.size(-1))).masked_fill(future, -math.inf).softmax(-1) @ v
        x = x + linear(mixed.transpose(0, 1).reshape(T, -1), f"{block}.attn.c_proj")
        h = linear(layer_norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        x = x + linear(F.gelu(h, approximate="tanh"), f"{block}.mlp.c_proj")
    return layer_norm(x, "ln_f") @ weights["wte.weight"].T


@on_each_device
def test_law_1_parity_with_a_plain_gpt2(device: str) -> None:
    tokens = torch.randint(61, (3, 16))
    reference = torch.stack([plain_gpt2("tiny", row) for row in tokens])
    assert reference.abs().max() > 5  # far from what an untrained model says
    logits = load_model("tiny").to(device)(tokens.to(device)).cpu().double()
    torch.testing.assert_close(logits, reference, rtol=1e-4, atol=1e-4)


def test_parameters_and_flops_are_counted_as_in_the_release_and_by_pytorch() -> None:
    counts = [124_439_808, 354_823_168, 774_030_080, 1_557_611_200]
    with torch.device("meta"):
        models = [GPT(gpt.MODEL_SIZES[name]) for name in prep.OPENAI_MODELS]
    assert [gpt.parameter_count(model) for model in models] == counts
    config = replace(TINY, vocab_size=128)  # no padding, which would be counted too
    math_attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, math_attention:
        GPT(config)(torch.randint(128, (1, 16)))
    assert 3 * counter.get_total_flops() == 16 * gpt.flops_per_token(config)  # a third is forward


@cases("half, compiled", [(False, False), (True, False), (True, True)])
def test_loss_and_gradients_are_those_of_the_formula(half: bool, compiled: bool) -> None:
    model = random_model(GPTConfig(256, 300, 1, 2, 32))
    model.transformer.wte.weight.data[300:] = 100.0  # padding, which would dominate
    tokens, targets = torch.randint(300, (2, 5, 256))  # more than one chunk of rows
    targets[1, 100:240:7] = -1  # not counted
    parameters = [*model.parameters()]
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=-1)
    gradients = torch.autograd.grad(expected, parameters)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        loss = (torch.compile(model) if compiled else model)(tokens, targets)
    tolerance = 3e-2 if half else 1e-5
    assert loss.dtype == torch.float32 and abs(loss - expected) < tolerance * expected / 30
    for one, other in zip(torch.autograd.grad(loss, parameters), gradients, strict=True):
        assert (one - other).norm() < tolerance * other.norm()


def test_the_residual_stream_is_in_half_precision_in_training_only() -> None:
    types = []
    model = GPT(TINY)
    model.transformer.h[1].register_forward_pre_hook(lambda _, inputs: types.append(inputs[0].dtype))
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
        mean = float(".ln_" in name and "weight" in name)
        std = 0.02 * (parameter.dim() == 2)
        if "c_proj" in name:
            std /= 4  # sqrt(2 * 8)
        assert parameter.std().item() == pytest.approx(std, rel=0.05), name
        assert parameter.mean().item() == pytest.approx(mean, abs=1e-3), name


def test_evaluation_mode_restores_what_it_found_after_an_error() -> None:
    model = GPT(TINY).train()
    torch.backends.cuda.enable_cudnn_sdp(False)
    with pytest.raises(KeyError), gpt.evaluation_mode(model):
        assert not model.training and not torch.is_grad_enabled()
        raise KeyError
    assert model.training and torch.is_grad_enabled()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)


def test_centered_logits_have_the_same_softmax_and_lose_less_in_bfloat16() -> None:
    tokens = torch.randint(61, (4, 16))
    models = [random_model(), random_model()]
    for model in models:  # a mean far from 0, as in gpt2
        model.transformer.wte.weight.data += torch.linspace(-9, 9, 32)
    exact = models[0](tokens).log_softmax(-1)
    gpt.center_logits(models[1])
    assert torch.allclose(models[1](tokens).log_softmax(-1), exact, atol=1e-3)
    errors = [(model.bfloat16()(tokens).float().log_softmax(-1) - exact).norm() for model in models]
    assert errors[1] < errors[0] / 2


def test_precision_is_chosen_by_device_and_use() -> None:
    cpu = torch.device("cpu")
    features = torch.cpu.get_capabilities()
    native = features.get("avx512_bf16") or features.get("amx_bf16")
    in_training = gpt.choose_dtype("auto", cpu, training=True)
    assert in_training == (torch.bfloat16 if native else torch.float32)
    assert gpt.choose_dtype("auto", cpu) == torch.float32
    assert gpt.choose_dtype("bfloat16", cpu) == torch.bfloat16
    fails(ValueError, "float16 needs a CUDA device", gpt.choose_dtype, "float16", cpu)


def test_saved_model_is_in_the_hubs_layout_and_loads_bit_for_bit() -> None:
    model = random_model()
    tokens = torch.randint(50, (2, 16))
    save_model(model, "ours", "byte")
    assert len({path.stat().st_mode for path in Path("ours").iterdir()}) == 1  # as umask says
    # The hub's gpt2 has no prefix, and attention masks; newer files repeat the shared matrix.
    stored = load_file("ours/model.safetensors")
    theirs = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    theirs["h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    theirs["lm_head.weight"] = theirs["wte.weight"].clone()
    save_file(theirs, "tiny/model.safetensors")
    edit("tiny/config.json", '"tokenizer"', '"unknown"')
    for directory, tokenizer in (("ours", "byte"), ("tiny", "gpt2")):
        loaded = load_model(directory)
        assert torch.equal(loaded(tokens), model(tokens)) and not loaded.training
        assert gpt.read_config(directory) == (TINY, tokenizer)
    cut = load_model("ours", vocab_size=50)  # as of a vocabulary that others have padded
    assert torch.equal(cut(tokens), model(tokens)[..., :50])


def test_transformers_opens_a_saved_model() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel.from_pretrained("./tiny").eval()
    tokens = torch.randint(61, (2, 16))
    assert torch.allclose(theirs(tokens).logits, load_model("tiny")(tokens), rtol=1e-4, atol=1e-4)


def test_damaged_and_foreign_models_are_refused() -> None:
    config = Path("tiny/config.json")
    weights = Path("tiny/model.safetensors")
    good = config.read_text()
    settings = ['"n_inner": 64', '"n_embd": 64', '"n_layer": 1', '"n_layer": 1001', '"n_head": 2.0']
    for wrong in [*settings, f'"n_positions": {10**30}', "["]:
        config.write_text(good.replace("}", f", {wrong}}}"))  # of two values, JSON takes the last
        fails(ValueError, r"config\.json", load_model, "tiny")
    config.write_text(good)
    for broken in (weights.read_bytes()[:-100], b"", b"x" * 5000):
        weights.write_bytes(broken)
        fails(ValueError, r"model\.safetensors is damaged", load_model, "tiny")
    weights.unlink()
    refused("sample.py --model=tiny", "tiny is not a model")


@on_each_device
@cases("block_size", [1, 15, 16])
def test_law_4_cache_changes_no_token(block_size: int, device: str) -> None:
    """Without it, the whole context is read for each token; one that is full continues from its last half."""
    model = random_model(replace(TINY, block_size=block_size)).to(device)
    for batch, prompt in ((1, 1), (1, block_size), (3, min(5, block_size))):
        tokens = torch.randint(61, (batch, prompt), device=device)
        for token in generate(model, tokens, 60, temperature=0):
            assert torch.equal(token, model(tokens)[:, -1].argmax(dim=1))
            if tokens.size(1) == block_size:
                tokens = tokens[:, block_size - block_size // 2 :]
            tokens = torch.cat([tokens, token[:, None]], dim=1)
        assert block_size == 1 or len(tokens.unique()) > 3


@cases("limits", [(1, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.6), (0.9, 8, 0.5), (1, 99, 1.0)])
def test_draws_follow_the_probabilities_of_the_definition(limits: tuple) -> None:
    temperature, top_k, top_p = limits
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(30, generator=generator)
    draws = gpt.sample_token(logits.expand(200_000, 30), *limits, generator)
    probs = (logits / temperature).softmax(-1)
    kept = probs.argsort(descending=True)[: top_k or 30]
    total = probs[kept].sum()
    while probs[kept[:-1]].sum() > top_p * total - 1e-6:
        kept = kept[:-1]  # until the fewest that reach top_p are left
    wanted = torch.zeros(30).scatter(0, kept, probs[kept] / probs[kept].sum())
    found = draws.bincount(minlength=30) / 200_000
    assert torch.allclose(found, wanted, rtol=0, atol=0.005)  # four standard errors
    assert not found[wanted == 0].any()


def test_generation_stops_when_every_row_has_drawn_the_stop_token() -> None:
    model = random_model()
    tokens = torch.randint(61, (2, 4))

    def greedy(stop_token: int | None = None) -> Tensor:
        return torch.stack([*generate(model, tokens, 60, 0, stop_token=stop_token)], dim=1)

    free = greedy()
    stop = next(int(token) for token in free[0] if token in free[1])
    ended = (free == stop).cumsum(dim=1) > 0
    expected = free.where(~ended, stop)  # a row that has ended repeats it
    assert torch.equal(greedy(stop), expected[:, : 1 + ended.all(dim=0).tolist().index(True)])
    for length in (0, 17):
        fails(ValueError, f"1 to 16 tokens.*not {length}", next, generate(model, tokens[:1, :1].expand(1, length), 1))


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        hub = self.server
        hub.requests.append((self.path, dict(self.headers)))
        fault = hub.faults.pop(0) if hub.faults else ""
        name, value = hub.headers.get(self.path, ("Retry-After", "99999999"))
        first = 0 if "ignore range" in fault else int(self.headers.get("Range", "bytes=0-")[6:-1])
        code = 206 if first else 200
        if name == "Location":
            code = 302
        elif fault.isdecimal():
            code = int(fault)
        body = hub.content[self.path][first:] if code < 300 else b""
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if "drop" in fault else body)

    log_message = "".format  # no log


@pytest.fixture
def hub(monkeypatch: Patch) -> Iterator[Any]:
    """A hub without waits: its content and headers by path, faults of the coming requests, and requests so far."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server, ThreadPoolExecutor() as threads:
        threads.submit(server.serve_forever, 0.01)
        server.url = f"http://127.0.0.1:{server.server_port}"
        vars(server).update(content={}, headers={}, faults=[], requests=[])
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield server
        server.shutdown()


def serve(hub: Any, page: str, base: str, files: dict[str, bytes]) -> None:
    """Put files on a hub under `base`, and their list at `page`."""
    entries = [{"path": "README.md", "size": 1}]
    for name, data in files.items():
        hub.content[f"{base}/{name}"] = data
        checksum = hashlib.sha256(data).hexdigest()
        entries.append({"path": name, "size": len(data), "lfs": {"oid": checksum}})
    hub.content[page] = json.dumps(entries).encode()


def test_openai_weights_are_fetched_once_and_checked(hub: Any, monkeypatch: Patch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret\n")
    files = contents("tiny")
    page = "/api/models/openai-community/gpt2/tree/main"
    serve(hub, page, "/cdn", files)
    for name in files:
        target = f"http://localhost:{hub.server_port}/cdn/{name}"
        hub.headers[f"/openai-community/gpt2/resolve/main/{name}"] = ("Location", target)
    hub.faults[:] = ["", "", "drop"]  # the third request is for the weights
    with ThreadPoolExecutor(4) as ranks:  # all want it at once, and one fetches it
        directory, *_ = ranks.map(prep.model_directory, ["gpt2"] * 4)
    assert contents(directory).items() > files.items()
    asked = [headers for path, headers in hub.requests if path == "/cdn/model.safetensors"]
    assert ["Range" in headers for headers in asked] == [False, True]
    trusted = [path for path, headers in hub.requests if "Bearer secret" in headers.values()]
    assert {path.split("/")[1] for path in trusted} == {"api", "openai-community"}
    hub.requests.clear()
    prep.model_directory("gpt2")
    assert not hub.requests  # it is there
    (directory / "config.json").unlink()  # what is missing or damaged is fetched again
    flip(directory / "model.safetensors")
    load_model(prep.model_directory("gpt2"))
    shutil.rmtree("data")
    hub.content["/cdn/model.safetensors"] = bytes(len(files["model.safetensors"]))
    fails(OSError, "wrong size or sha256", prep.model_directory, "gpt2")
    serve(hub, page, "/cdn", {"config.json": files["config.json"]})
    fails(OSError, r"lists no model\.safetensors", prep.model_directory, "gpt2")


def test_a_listing_has_a_deadline(hub: Any, monkeypatch: Patch) -> None:
    page = "/api/models/b/tree/main"
    hub.content[page] = b"[]"
    hub.headers[page] = ("Link", f'<{hub.url}{page}>; rel="next"')  # its next page is itself
    hub.faults[:] = [""] * 20 + ["404"]  # or it would never end
    clock = itertools.count(step=100)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    fails(OSError, "list of models/b could not be fetched: TimeoutError", prep.list_hub, "models/b")


@cases("fault", ["ignore range and drop", "429"])
def test_a_download_without_progress_gives_up(hub: Any, monkeypatch: Patch, fault: str) -> None:
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.content["/a"] = bytes(range(250)) * 1000
    file = prep.RawFile("a", 250_000, url=f"http://localhost:{hub.server_port}/a")  # not the hub
    hub.faults[:] = ["drop"] + [fault] * 50
    fails(OSError, "^a .*again", prep.download, file, Path("a"))
    assert 7 <= len(waits) <= 9 and max(waits) == 60
    hub.faults.clear()
    assert prep.download(file, Path("a")).read_bytes() == hub.content["/a"]
    assert not any("Authorization" in headers for _, headers in hub.requests)


@cases("target", ["/a", "file:///etc/hosts", "http://"])
def test_redirects_that_lead_nowhere_end_at_once(hub: Any, target: str) -> None:
    hub.headers["/a"] = ("Location", target)
    file = prep.RawFile("a", 10, url=f"{hub.url}/a")
    fails(OSError, "a could not be fetched: .*check --subset", prep.download, file, Path("a"))
    assert len(hub.requests) <= 31  # of one attempt, a loop


# Preparing data


def read_shards(directory: str, *splits: str) -> list[int]:
    """The tokens of some splits, or of both, by the format's description: 256 int32 of header, then uint16."""
    found = []
    for split in splits or ("val", "train"):
        for path in sorted(Path(directory).glob(f"{split}_*.bin")):
            tokens = np.fromfile(path, dtype="<u2", offset=1024).tolist()
            header = np.fromfile(path, dtype="<i4", count=256)
            assert [*header] == [20240520, 1, len(tokens)] + [0] * 253
            found += tokens
    return found


def documents(count: int = 400) -> list[str]:
    """Texts of many lengths, with everything in them that a tokenizer could stumble over."""
    rng = np.random.default_rng(0)
    words = ["<|endoftext|>", "the", "Ünïcödé", "日本語", "🙂", "\n\n", "  ", "a\r\nb", "don't", "1234", "\t"]
    return [" ".join(rng.choice(words[i % 3 > 0 :], size=rng.integers(1, 200))) for i in range(count)]


def write_jsonl(path: Path | str, rows: list[Any]) -> bytes:
    """Texts, or objects, one a line."""
    lines = [json.dumps(row if isinstance(row, dict) else {"text": row}) for row in rows]
    Path(path).write_text("\n".join(lines) + "\n")
    return Path(path).read_bytes()


def byte_tokens(texts: list[str]) -> list[int]:
    """What the byte tokenizer must make of documents: 256, then the bytes of the text."""
    return [token for text in texts for token in (256, *text.encode())]


def as_parquet(rows: int = 100, **columns: list) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file, row_group_size=rows)
    return file.getvalue()


def test_every_format_gives_the_tokens_of_its_texts() -> None:
    mark = "<|endoftext|>"
    texts = documents()
    text = "".join(texts)
    # In plain text it separates documents, and a line break behind it belongs to it.
    parts = [*filter(None, text.split(mark)), "one\n", "\ntwo\n"]
    bom = b"\xef\xbb\xbf"  # a byte-order mark is no text
    jsonl = bom + write_jsonl("a.jsonl", [*texts[:50], "", *texts[50:]])
    for name, content, expected in (
        ("a.jsonl", jsonl, texts),
        ("a.jsonl.gz", gzip.compress(jsonl + b'\n{"text": null}\n'), texts),
        ("a.parquet", as_parquet(30, id=[*range(401)], text=[*texts, None]), texts),
        ("a.txt", bom + f"{mark}{text}{mark}\none\n{mark}\r\n\ntwo\n{mark}\n".encode(), parts),
    ):
        Path(name).write_bytes(content)
        _, told = call(f"{PREPARE}/{name} --input={name} --shard-tokens=50k --val-tokens=10k")
        warning = f"{name} has {text.count(mark):,} {mark} in its texts"
        assert (warning in told) == (expected is texts)
        meta = json.loads(Path(f"out/{name}/meta.json").read_text())
        stream = byte_tokens(expected)
        for split, tokens in (("val", stream[:10_000]), ("train", stream[10_000:])):
            assert read_shards(f"out/{name}", split) == tokens
            begun = tokens.count(256)
            counts = {"documents": begun, "bytes": len(tokens) - begun, "tokens": len(tokens)}
            assert meta[split].items() >= counts.items()


def bpe_tokenizer(tokens: Iterable[bytes], pattern: str = r50k_pat_str) -> tiktoken.Encoding:
    """A tokenizer of the 256 bytes and these tokens."""
    ranks = {token: i for i, token in enumerate([*(bytes([i]) for i in range(256)), *tokens])}
    special = {"<|endoftext|>": len(ranks)}
    return tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def test_cutting_long_white_space_changes_no_token() -> None:
    """With GPT-2's own pattern, and every pair of the texts' bytes as a token, so that a wrong cut would show."""
    rng = np.random.default_rng(0)
    words = ["the", " ", "\n", "\u00a0", "\x1c", "\x85", "\u3000", "'s", "é", " " * 1500, "\n" * 1200, "\t \n" * 700]
    texts = ["".join(rng.choice(words, size=1000)), (" " * 999 + "a") * 1000]
    pairs = {bytes(pair) for text in texts for pair in itertools.pairwise(text.encode())}
    published = bpe_tokenizer(pairs)
    tokenizer = bpe_tokenizer(pairs, prep.GPT2_PATTERN)
    for text in texts + documents():
        assert prep.tokenize([text], tokenizer)[1:].tolist() == published.encode_ordinary(text)
    endless = "a" + " " * 1_000_000 + "b" + "\n" * 1_000_000  # too much for tiktoken
    assert tokenizer.decode(prep.tokenize([endless], tokenizer)[1:].tolist()) == endless


def test_the_byte_tokenizers_files_spell_bytes_as_gpt2s_do(monkeypatch: Patch) -> None:
    files = prep.tokenizer_files("byte", 1024)
    for name, content in files.items():
        Path(name).write_bytes(content)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    ranks = data_gym_to_mergeable_bpe_ranks("merges.txt", "vocab.json", clobber_one_byte_tokens=True)
    assert ranks == {bytes([i]): i for i in range(256)}
    assert json.loads(files["vocab.json"])["<|endoftext|>"] == 256
    assert json.loads(files["tokenizer_config.json"])["model_max_length"] == 1024


def serve_fineweb(hub: Any, texts: list[str]) -> None:
    """Three Parquet files of FineWeb-Edu's sample-10BT, two with the same base name, listed on two pages."""
    base = "/datasets/HuggingFaceFW/fineweb-edu"
    page = f"/api{base}/tree/main/sample/10BT"
    size = len(texts) // 3
    files = {}
    for i, name in enumerate(("000_00000", "a/001_00000", "b/001_00000")):
        files[f"sample/10BT/{name}.parquet"] = as_parquet(size // 7, text=texts[size * i : size * (i + 1)])
    serve(hub, f"{page}?2", f"{base}/resolve/main", dict([files.popitem()]))
    serve(hub, page, f"{base}/resolve/main", files)
    hub.headers[page] = ("Link", f'<{hub.url}{page}?2>; rel="next"')


def test_law_5_shards_do_not_depend_on_workers_faults_or_kills(hub: Any) -> None:
    serve_fineweb(hub, documents(3000))
    hub.faults[:] = ["503", "", "", "503", "429", "drop", "drop", "ignore range", "drop"]
    options = "prepare_data.py --tokenizer=byte --shard-tokens=16k --val-tokens=20k --out"
    for workers in (1, 2, 5):
        call(f"{options}=of{workers} --workers={workers}")
    assert not hub.faults and any("Range" in headers for _, headers in hub.requests)
    for shards in (1, 10, 11, 30):  # killed as soon as it has written so many
        hub.faults[:] = ["", "", "drop", "", "drop"]
        with running(f"{options}=killed", lines=shards, word=".bin: "):
            pass
    call(f"{options}=killed")
    edit("killed/SHA256SUMS", ".*meta.json\n")  # as if killed just before its end
    call(f"{options}=killed")
    assert contents("killed") == contents("of1") == contents("of2") == contents("of5")
    assert read_shards("killed") == byte_tokens(documents(3000))
    assert not os.path.exists("killed/.prepare_data")


def test_what_cannot_be_fetched_ends_in_one_line(hub: Any, monkeypatch: Patch) -> None:
    command = "prepare_data.py --tokenizer=byte --max-tokens=20k --out"
    serve_fineweb(hub, documents(3000))
    call(f"{command}=small")
    (path,) = [path for path, _ in hub.requests if path.endswith(".parquet")]
    assert "000_00000" in path  # it needs the first only
    hub.content[path] = bytes(len(hub.content[path]))
    refused(f"{command}=damaged", "000_00000.parquet.*sha256")
    hub.faults[:] = ["drop"]  # half of the listing
    refused(f"{command}=nothing", "the list of datasets/.* could not be fetched")
    for setting, words in (
        ("HF_ENDPOINT=http://user:SECRET@host", "HF_ENDPOINT must be"),
        ("HF_ENDPOINT=http://127.0.0.1:1", "ConnectionError"),
        ("HF_TOKEN=\ufeffSECRET", "UnicodeEncodeError"),  # as an editor saves a file
    ):
        set_environment(monkeypatch, setting)
        assert "SECRET" not in refused(f"{command}=nothing", words)


def test_memory_does_not_grow_with_the_corpus() -> None:
    """The largest size of a preparation, for one and for ten times a text, by the system's account; and reading."""
    tell = "import prepare_data; prepare_data.main(); print(*open('/proc/self/status'))"
    peaks = []
    for copies in (10, 100):
        write_jsonl("a.jsonl", documents() * copies)
        _, *options = f"{PREPARE}{copies} --shard-tokens=1M --val-tokens=1M --workers=2".split()
        said = subprocess.check_output([sys.executable, "-c", tell, *options], timeout=TIMEOUT)
        peaks.append(int(re.search(rb"VmHWM:\s+(\d+)", said)[1]))
    assert peaks[1] < 1.1 * peaks[0], peaks
    header = np.array([20240520, 1, 3 * 10**7], dtype="<i4").tobytes()
    Path("train_000000.bin").write_bytes(header + bytes(1012 + 6 * 10**7))
    split = prep.open_split(Path(), "train", 1024)
    before = memory_in_use(1)
    for index in range(split.sequences):
        prep.read_sequences(split, np.array([index]))
    assert memory_in_use(1) - before < 20e6  # of 60 MB


def test_what_is_finished_or_not_ours_is_left_alone() -> None:
    command = f"{PREPARE} --workers=8 --max-tokens=50k"
    call(command)
    before = contents("out")
    call(command)
    refused(f"{command} --max-tokens=60k", "max_tokens was 50000")
    assert contents("out") == before
    os.makedirs("demo/.work")
    mine = [Path("demo/.work/mine"), Path("start/train_000000.bin")]
    for path in mine:
        path.write_text("mine")
    call("prepare_data.py --source=demo --out=demo")
    refused(f"{command} --out=start", "this script did not write")
    Path("start/meta.json").write_text('{"tokenizer": "byte"}')  # of an older version, say
    refused(f"{command} --out=start", "meta.json")
    assert all(path.read_text() == "mine" for path in mine)


BAD_TEXTS = {
    "cut.parquet": (as_parquet(text=["a"])[:-20], "cannot be read"),
    "number.parquet": (as_parquet(text=[1, 2]), "text"),
    "large.parquet": (as_parquet(text=["a" * 10**6]), "200,000 bytes"),
    "line.jsonl": (b'{"text": "good"}\n\n{"text": "cut\n', "line 3"),
    "half.jsonl": (b'{"text": "good"}\n{"text": "half \\ud800"}\n', "line 2"),
    "large.jsonl": (b'{"text": "a"}\n{"text": "' + b"a" * 10**6 + b'"}', "line 2.*200,000 bytes"),
    "large.txt": (b"a" * 10**6, "200,000 bytes"),
    "bytes.txt": (b"good \xff", "cannot be read.*position 5"),
    "empty.txt": (b"", "has no text"),
    "text.doc": (b"?", "is in no known format"),
}


def test_bad_text_is_named(monkeypatch: Patch) -> None:
    monkeypatch.setattr(prep, "MOST_BYTES", 200_000)
    for name, (content, words) in BAD_TEXTS.items():
        Path(name).write_bytes(content)
        refused(f"{PREPARE} --input={name}", f"{name}.*{words}")


def test_validation_takes_a_tenth_unless_it_is_told() -> None:
    write_jsonl("b.jsonl", [{"url": "x" * 1000, "text": "few"}] * 100)  # whose size says little
    call(f"{PREPARE} --input=b.jsonl --out=tenth --shard-tokens=50 --max-tokens=300")
    assert len(read_shards("tenth", "val")) == 30 and len(read_shards("tenth", "train")) == 270
    said, _ = call(f"{PREPARE} --val-tokens=1M")
    assert read_shards("out", "val") == byte_tokens(documents(120))
    os.rename("start", "MODEL")
    run(said.split("python ")[1] + "--sequence-length=32")


@cases("finished", [True, False])
def test_law_8_damaged_data_is_named_and_left_alone(finished: bool) -> None:
    for name, damage in (
        ("train_000001.bin", flip),
        ("train_000001.bin", Path.unlink),
        ("SHA256SUMS", Path.unlink),
        ("SHA256SUMS", lambda path: edit(path, ".*train_000002.bin\n")),
    ):
        shutil.copytree("shards", "out")
        if not finished:
            edit("out/SHA256SUMS", ".*meta.json\n")
        damage(Path("out", name))
        before = contents("out")
        refused(CORPUS, f"{name}.*restore it, or use another directory")
        assert contents("out") == before
        shutil.rmtree("out")
    edit("shards/SHA256SUMS", "  ", " *")  # as sha256sum --binary writes it
    call(f"{CORPUS} --out=shards")
    flip("shards/meta.json")
    refused(TRAIN, "meta.json")


def test_what_has_changed_is_not_continued(monkeypatch: Patch) -> None:
    command = f"{PREPARE} --shard-tokens=1k --val-tokens=3k"
    add_shard = prep.add_shard

    def add_and_change(*args: Any) -> None:
        add_shard(*args)
        edit("a.jsonl", "the", "THE")

    monkeypatch.setattr(prep, "add_shard", add_and_change)
    refused(command, "a.jsonl has changed since the start; restore it")
    monkeypatch.setattr(prep, "add_shard", add_shard)
    assert len([*Path("out").glob("*.bin")]) == 1  # none was written after the change
    refused(command, "out was prepared differently: source was")
    edit("a.jsonl", "THE", "the")
    meta = Path("out/meta.json")
    good = meta.read_text()
    for position in ([0, 0, -5], [2, 0, 0], [0, 10**6, 0], [0, 0, 10**9], "x"):
        meta.write_text(json.dumps(json.loads(good) | {"position": position}))
        refused(command, "meta.json")
    meta.write_text(good)
    call(command)  # all is restored, and no shard is of the changed text
    assert read_shards("out") == byte_tokens(documents(120))


def test_ctrl_c_ends_a_preparation_at_once() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell may ignore
    Path("a.txt").write_bytes((b"a" * 10**8 + b"<|endoftext|>") * 2)
    process = start(f"{PREPARE} --input=a.txt")
    while not os.path.exists("out/meta.json"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=TIMEOUT) == ("", "") and process.returncode == 130


def tasks() -> dict[str, list[dict]]:
    """Twelve tasks of each set, as HellaSwag and LAMBADA publish theirs, of random short words."""
    rng = np.random.default_rng(1)
    words = ["".join(rng.choice([*"aeioübd"], size=3)) for _ in range(50)]
    rows = {"hellaswag": [], "lambada": []}
    for i in range(12):
        context, *endings, text = (" ".join(rng.choice(words, size=rng.integers(2, 8))) for _ in range(6))
        rows["hellaswag"].append({"ctx": context, "endings": endings, "label": i % 4})
        rows["lambada"].append({"text": text})
    return rows


def test_evaluation_sets_are_fetched_with_the_default_corpus(hub: Any, monkeypatch: Patch) -> None:
    for name in prep.EVALUATION_SETS:
        file = prep.FILES[name]
        data = Path(name, file.name).read_bytes()
        hub.content[f"/{name}"] = data
        checksum = hashlib.sha256(data).hexdigest()
        served = prep.RawFile(file.name, len(data), checksum, f"{hub.url}/{name}")
        monkeypatch.setitem(prep.FILES, name, served)
    serve_fineweb(hub, documents(300))
    call("prepare_data.py --tokenizer=byte --val-tokens=1k --workers=1")
    assert {*os.listdir("data")} == {"fineweb-edu", "hellaswag", "lambada"}
    hub.requests.clear()
    call("prepare_data.py --source=lambada")
    assert not hub.requests  # it is there
    flip("data/hellaswag/hellaswag_val.jsonl")
    refused(f"{TRAIN} --data=data/fineweb-edu", "hellaswag_val.jsonl is damaged")


# Training


def steps(out: str) -> list[int]:
    """The steps of which a run has checkpoints."""
    return [int(path.name[5:]) for path in prep.checkpoints(Path(out))]


def read_log(out: str) -> list[dict]:
    """The lines of metrics.jsonl after the settings, without what tells the time or the machine."""
    _, *lines = map(json.loads, Path(out, "metrics.jsonl").read_text().splitlines())
    varying = {"seconds", "tokens_per_second", "mfu", "memory_gb"}
    return [{name: line[name] for name in line.keys() - varying} for line in lines]


def logged(out: str, name: str = "train_loss") -> list[float]:
    return [line[name] for line in read_log(out) if name in line]


def assert_same_weights(first: str, second: str, tolerance: float = 0.0) -> None:
    both = [load_file(f"{path}/model.safetensors") for path in (first, second)]
    for name in both[0]:
        if tolerance and name.endswith("c_attn.bias"):
            # The gradient of the keys' bias is 0, but for rounding, which Adam blows up.
            for weights in both:
                weights[name][32:64] = 0
    torch.testing.assert_close(*both, rtol=0, atol=tolerance)


def assert_same_run(first: str, second: str, weights: float = 0.0, log: float = 0.0) -> None:
    """The same last checkpoint and log, to these tolerances or to the bit, the state of the optimizer included."""
    one, other = (f"{out}/step_{steps(out)[-1]:06d}" for out in (first, second))
    assert_same_weights(one, other, weights)
    for line, its in zip(read_log(first), read_log(second), strict=True):
        assert line == pytest.approx(its, rel=log, abs=0)
    if not weights:
        states = [torch.load(f"{path}/trainer.pt")["optimizer"] for path in (one, other)]
        torch.testing.assert_close(*states, rtol=0, atol=0)


def be_rank(place: dict[str, str], command: str, stop: tuple | None) -> None:
    """train.py in this process, which adds what it prints to "said", and sends itself a signal as `stop` says:
    (function, n, signal) is at the n-th call of a function; `learning_rate` is called once in each update."""
    os.environ |= place
    if stop:
        name, number, signum = stop
        function = getattr(train, name)
        calls = itertools.count(1)

        def stopping(*args: Any) -> Any:
            if next(calls) == number:
                os.kill(os.getpid(), signum)
            return function(*args)

        setattr(train, name, stopping)
    with open("said", "a") as file, redirect_stdout(file):
        train.main(command.split()[1:])


def start_ranks(ranks: int, command: str, stop: tuple | None = None) -> Callable:
    """Start train.py as torchrun does; the last rank may stop. Returns a function that waits for the statuses."""
    meeting = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = []
    for rank in range(ranks):
        place = meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        args = (place, command, stop if rank == ranks - 1 else None)
        started.append(FORKS.Process(target=be_rank, args=args, daemon=True))
        started[-1].start()
    return lambda: [process.join(TIMEOUT) or process.exitcode for process in started]


def test_each_sequence_is_used_once_an_epoch_and_the_step_decides_which() -> None:
    config = train.TrainConfig(sequence_length=32, total_batch_tokens=32 * 100)
    split = prep.open_split(Path("shards"), "train", 32)
    shards = [np.fromfile(path, dtype="<u2", offset=1024) for path in split.paths]
    sequences = np.concatenate([np.lib.stride_tricks.sliding_window_view(shard, 33)[::32] for shard in shards])
    total = len(sequences)
    assert np.array_equal(prep.read_sequences(split, np.arange(total)), sequences)
    batches = [train.batch_indices(split, config, step) for step in range(1, total // 50 + 2)]
    stream = np.concatenate(batches).tolist()
    first = stream[:total]
    second = stream[total : 2 * total]
    assert sorted(first) == sorted(second) == [*range(total)] and sorted(first) != first != second
    assert train.batch_indices(split, replace(config, seed=6), 1).tolist() != stream[:100]


@on_each_device
def test_law_2_how_a_batch_is_divided_changes_nothing(device: str) -> None:
    command = f"{TRAIN} --init-from=start --steps=4 --grad-clip=0.5 --device={device} --no-compile"
    tolerance = 5e-5 if device == "cpu" else 1e-3  # Adam magnifies what differs in small gradients
    ranks = start_ranks(2, f"{command} --out=ranks") if device == "cpu" else None
    call(f"{command} --out=whole --micro-batch-size=16")
    call(f"{command} --out=pieces --micro-batch-size=2")
    assert_same_run("whole", "pieces", weights=tolerance, log=tolerance / 5)
    if ranks:
        assert ranks() == [0, 0]
        assert_same_run("whole", "ranks", weights=tolerance, log=tolerance / 5)


def test_law_6_losses_and_updates_are_those_of_a_plain_loop() -> None:
    """Two ranks, two passes and dropout, against PyTorch's own AdamW and clipping on the whole batch."""
    changes = "--dropout=0.2 --grad-clip=0.5 --steps=5 --weight-decay=0.3 --beta2=0.9"
    ranks = start_ranks(2, f"{TRAIN} --init-from=start {changes}")
    model = load_model("start", dropout=0.2).train()
    groups = [{"params": [p], "weight_decay": 0.3 * (p.dim() == 2)} for p in model.parameters()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.9), eps=1e-8)
    config = train.TrainConfig(sequence_length=32, total_batch_tokens=512)
    split = prep.open_split(Path("shards"), "train", 32)
    assert ranks() == [0, 0]
    updates = [line for line in read_log("out") if "lr" in line]
    rates = [0.005, 0.01, 0.00775, 0.00325, 0.001]  # a line, a cosine
    for step, (update, lr) in enumerate(zip(updates, rates, strict=True), start=1):
        batch = prep.read_sequences(split, train.batch_indices(split, config, step))
        batch = torch.from_numpy(batch).view(2, 2, 4, 33)  # (passes, ranks, sequences, T + 1)
        loss = 0.0
        for rank in range(2):
            torch.manual_seed(int(np.random.SeedSequence([1337, step, rank]).generate_state(1)[0]))
            for sequences in batch[:, rank]:
                logits = model(sequences[:, :-1]).flatten(0, 1)
                loss += F.cross_entropy(logits, sequences[:, 1:].flatten()) / 4
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item()
        assert norm > 0.6  # each is clipped
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        expected = {"step": step, "train_loss": loss.item(), "lr": lr, "grad_norm": norm}
        assert update == pytest.approx(expected, rel=1e-4)
    save_model(model, "plain")
    assert_same_weights("plain", "out/step_000005", tolerance=1e-5)


@cases("ranks, dtype", [(1, "bfloat16"), (2, "float32")])
def test_law_3_interrupted_run_equals_uninterrupted(ranks: int, dtype: str) -> None:
    every = "--checkpoint-every=4 --eval-every=10 --log-every=3"
    command = f"{TRAIN} --steps=20 {every} --dropout=0.1 --dtype={dtype}"
    whole = start_ranks(ranks, f"{command} --out=whole")
    for function, number, signum, newest in (
        ("learning_rate", 7, signal.SIGTERM, 7),  # between two checkpoints, and two log entries
        ("score_rows", 3, signal.SIGINT, 10),  # in the evaluation after update 10
        ("learning_rate", 5, signal.SIGKILL, 12),  # in update 15
    ):
        *others, last = start_ranks(ranks, f"{command} --resume", (function, number, signum))()
        if signum != signal.SIGKILL:
            assert last == 128 + signum and others == [128 + signal.SIGTERM] * (ranks - 1)
        assert steps("out")[-1] == newest
    # It knows its settings.
    assert not any(start_ranks(ranks, "train.py --out=out --resume")() + whole())
    assert_same_run("out", "whole")


def test_law_3_torchrun_restarts_a_killed_worker() -> None:
    command = f"{TRAIN} --steps=10 --total-batch-tokens=256"
    whole = start_ranks(2, f"{command} --out=whole")
    Path("dies.py").write_text(f"""
import os, {__name__}
dies = (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0")
{__name__}.be_rank({{}}, "{command} --resume", ("learning_rate", 8, 9) if dies else None)
""")
    assert whole() == [0, 0]
    run("torchrun --standalone --nproc_per_node=2 --max-restarts=1 dies.py")
    assert Path("said").read_text().count("resumed from") == 1
    assert_same_run("out", "whole")


def set_environment(monkeypatch: Patch, settings: str) -> None:
    for setting in settings.split():
        monkeypatch.setenv(*setting.split("=", 1))


def test_restarted_workers_do_not_find_the_addresses_of_dead_ones(monkeypatch: Patch) -> None:
    """Each round has names of its own in torchrun's store, which outlives its workers."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = f"RANK=0 WORLD_SIZE=1 LOCAL_WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT={store.port}"
    set_environment(monkeypatch, f"{place} TORCHELASTIC_USE_AGENT_STORE=True")
    names = set()
    for count in ("0", "1"):
        set_environment(monkeypatch, f"TORCHELASTIC_RESTART_COUNT={count}")
        train.start_process(train.TrainConfig(device="cpu"))
        torch.distributed.destroy_process_group()
        new = {*store.list_keys()} - names
        assert new and all(f"{count}/" in name for name in new)
        names |= new


@needs_gpu
@cases("dtype", ["bfloat16", "float16"])
def test_law_3_on_a_gpu_a_resumed_run_is_the_same_to_rounding(dtype: str) -> None:
    command = f"{TRAIN} --device=cuda --dtype={dtype} --max-lr=1e-3"
    call(f"{command} --out=whole")
    call(command)
    shutil.rmtree("out/step_000006")
    call(f"{command} --resume")
    losses = logged("whole")
    assert logged("out") == pytest.approx(losses, abs=0.01) and losses[-1] < losses[0] - 0.1


def test_a_run_continues_on_other_ranks_and_with_a_divided_optimizer() -> None:
    command = f"{TRAIN} --checkpoint-every=2 --eval-every=2"
    assert start_ranks(1, command, ("learning_rate", 2, signal.SIGTERM))() == [128 + signal.SIGTERM]
    meeting = f"--rdzv_backend=c10d --rdzv_endpoint=127.0.0.1:{free_port()}"
    machine = f"torchrun --nnodes=2 --nproc_per_node=1 {meeting} {ROOT}/{command}"
    agents = [start(f"{machine} --micro-batch-size=2 --resume --zero") for _ in range(2)]
    call(f"{command} --out=whole")
    outputs = [agent.communicate(timeout=TIMEOUT)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert sum("6 steps done" in output for output in outputs) == 1  # rank 0 alone speaks
    assert_same_run("whole", "out", weights=1e-4, log=1e-4)
    shutil.rmtree("out/step_000006")  # of two ranks with half of the optimizer each; one resumes
    call(f"{command} --resume")
    assert_same_run("whole", "out", weights=1e-4, log=1e-4)


def test_evaluation_is_what_its_definition_says_on_any_ranks() -> None:
    """By the definitions: a row at a time, in float64."""
    command = f"{TRAIN} --eval-only --init-from=start --eval-tasks=10"
    ranks = start_ranks(3, f"{command} --total-batch-tokens=384")

    def score(tokens: Tensor, count: int) -> tuple[Tensor, bool]:
        """The losses of the last `count` tokens, and whether each was the most likely."""
        logits = plain_gpt2("start", tokens[:-1])[-count:]
        losses = F.cross_entropy(logits, tokens[-count:], reduction="none")
        return losses, torch.equal(logits.argmax(dim=1), tokens[-count:])

    def ending(context: str, text: str) -> tuple[Tensor, bool]:
        tokens = torch.tensor([*f"{context} {text}".encode()])[-41:]  # as much as fits
        return score(tokens, len(f" {text}".encode()))

    values = {"hellaswag_acc": [], "hellaswag_acc_norm": []}
    for task in tasks()["hellaswag"][:10]:
        nats = [ending(task["ctx"], text)[0] for text in task["endings"]]
        for name, how in (("hellaswag_acc", torch.sum), ("hellaswag_acc_norm", torch.mean)):
            values[name].append(np.argmin([*map(how, nats)]) == task["label"])
    words = [ending(*task["text"].rsplit(" ", 1)) for task in tasks()["lambada"][:10]]
    values["lambada_acc"] = [right for _, right in words]
    val = torch.tensor(read_shards("shards", "val")[: 62 * 32 + 1])  # 2000 tokens, in whole sequences
    values["val_loss"] = [score(row, 32)[0].mean() for row in val.unfold(0, 33, 32)]
    expected = {name: np.mean(each) for name, each in values.items()}
    for name, each in values.items():
        expected[f"{name}_se"] = np.std(each, ddof=1) / math.sqrt(len(each))
    bits = expected["val_loss"] * 62 * 32 / math.log(2)
    expected["val_bits_per_byte"] = bits / (val[1:] != 256).sum().item()
    expected["val_perplexity"] = math.exp(expected["val_loss"])
    expected["lambada_perplexity"] = math.exp(np.mean([nats.sum() for nats, _ in words]))
    assert 0 < expected["hellaswag_acc"] != expected["hellaswag_acc_norm"]
    said, _ = call(command)
    assert ranks() == [0, 0, 0]
    for output in (said, Path("said").read_text()):
        metrics = json.loads(output.splitlines()[-1])
        assert metrics.pop("evaluated") == "start" and metrics == pytest.approx(expected, rel=1e-5)
    save_random("short", block_size=8)
    _, told = call(f"{command} --init-from=short --sequence-length=8")
    assert "hellaswag is left out: an ending is longer" in told
    assert not os.path.exists("out")  # nothing is written


def test_a_run_stands_for_its_checkpoint() -> None:
    call(f"{TRAIN} --out=out/first --steps=1 --warmup-steps=0")
    tuned = "--out=out/second --init-from=out/first --sequence-length=16 --max-lr=0 --min-lr=0"
    call(f"{TRAIN} {tuned}")  # with no learning rate, on a part of their context
    assert_same_weights("out/first/step_000001", "out/second/step_000006")
    assert load_model("out/second/step_000006").config.block_size == 32
    said, _ = call("train.py --eval-only")  # of the run written last
    val_loss = json.loads(said.splitlines()[-1])["val_loss"]
    assert val_loss == pytest.approx(logged("out/second", "val_loss")[-1], rel=1e-6)
    _, told = call("sample.py --model=out/first --max-new-tokens=3")
    assert told.startswith("out/first/step_000001: ")


def test_a_compiled_run_is_the_same_and_one_in_bfloat16_is_close() -> None:
    command = f"{TRAIN} --n-layer=1 --checkpoint-every=0 --sample-every=3"
    call(command)
    call(f"{command} --out=compiled --compile")
    assert_same_run("out", "compiled", weights=1e-4, log=1e-3)
    call(f"{command} --out=half --dtype=bfloat16")
    assert logged("out") != logged("half") == pytest.approx(logged("out"), abs=0.05)


def test_a_micro_batch_is_found_and_one_too_large_ends_in_one_line() -> None:
    command = f"{TRAIN} --steps=1 --warmup-steps=0 --eval-every=0 --total-batch-tokens=32768"
    said, _ = call(f"{command} --micro-batch-size=0")
    assert "8 micro-batches x 1 ranks x 128 sequences" in said
    # The queries, keys and values alone are 200 MB, more than any heap has in reserve.
    much = f"{command} --out=much --micro-batch-size=1024 --n-embd=512"
    with limited(resource.RLIMIT_AS, memory_in_use(0) + 300_000_000):
        refused(much, "out of memory.*--micro-batch-size")


def test_what_diverges_is_neither_applied_nor_saved() -> None:
    rate = "--warmup-steps=0 --max-lr=1e9 --min-lr=1e9"
    message = refused(f"{TRAIN} {rate} --checkpoint-every=1 --eval-every=0", "step .*step")
    step, good = map(int, re.findall(r"step (\d)", message))
    assert steps("out")[-1] == good == step - 1
    assert len(logged("out")) == good and all(map(math.isfinite, logged("out")))
    model = random_model()
    model.transformer.wpe.weight.data[3, 3] = math.inf  # by the last update, which no loss follows
    last = (Path("last"), model, {"step": 1}, "byte", {})
    fails(FloatingPointError, "step_000001 is not written", train.save_checkpoint, *last)


def test_a_full_disk_ends_in_one_line_and_loses_nothing() -> None:
    prepare = f"{PREPARE} --out=text"
    command = f"{TRAIN} --steps=2 --warmup-steps=1 --checkpoint-every=1 --eval-every=2"
    with limited(resource.RLIMIT_FSIZE, 10_000):
        refused(prepare, "val_000000.bin: File too large")
        refused(command, "step_000001 could not be")
    assert {*os.listdir("out")} == {".lock", "metrics.jsonl"}
    call(prepare)
    assert read_shards("text") == byte_tokens(documents(120))
    call(f"{command} --resume")
    assert logged("out", "step") == [0, 1, 2, 2]  # from the beginning


def test_the_newest_checkpoints_and_the_best_are_kept() -> None:
    rate = "--max-lr=0.2 --min-lr=0.2 --warmup-steps=7"  # so large that it makes the model worse
    command = f"{TRAIN} --steps=8 --eval-every=1 --checkpoint-every=1 {rate}"
    said, _ = call(command)
    losses = logged("out", "val_loss")
    best = losses.index(min(losses[1:]))
    assert steps("out") == [best, 7, 8] and best < 7
    assert said.endswith(f"python sample.py --model=out/step_{best:06d}\n")
    shutil.rmtree("out/step_000008")
    call(f"{command} --eval-every=0 --resume")
    assert logged("out", "val_loss") == losses[:8]  # nothing logged is lost
    call(f"{command} --out=all --keep-checkpoints=0")
    assert steps("all") == [*range(1, 9)]
    train.prune(Path("all"), Path("all/step_000004"), keep=1)  # as if the later ones were damaged
    assert steps("all") == sorted({best, 4, 5, 6, 7, 8})


def test_what_is_not_a_checkpoint_is_left_alone() -> None:
    command = f"{TRAIN} --checkpoint-every=2 --eval-every=0"
    call(f"{command} --keep-checkpoints=0")
    os.rename("out/step_000006", "out/step_000050")  # not of step 50
    mine = ["step_7", "step_best.tmp", "step_000003", "step_000006"]
    for name in mine:
        Path("out", name).mkdir()
        Path("out", name, "SHA256SUMS").write_text("mine")
    torch.save({"epoch": 3}, "out/step_000003/trainer.pt")
    prep.add_checksums(Path("out/step_000003"), ["trainer.pt"])
    _, told = call("sample.py --model=out --max-new-tokens=1")
    assert told.startswith("out/step_000004: ")
    call(f"{command} --keep-checkpoints=1 --resume")
    (replaced,) = Path("out").glob("step_000006.replaced_*")
    others = [".lock", "metrics.jsonl", "step_000050", replaced.name]
    assert {*os.listdir("out")} == {*others, *mine}
    assert (replaced / "SHA256SUMS").read_text() == "mine"


def test_law_7_a_run_has_one_writer() -> None:
    command = f"{TRAIN} --steps=1000000 --checkpoint-every=0"
    with running(command, lines=3, word="tok/s"):
        before = contents("out")["metrics.jsonl"]
        refused(command, "in use by another process")
        assert contents("out")["metrics.jsonl"].startswith(before)


def test_law_8_a_damaged_checkpoint_is_skipped() -> None:
    call(TRAIN)
    log = read_log("out")
    newest = Path("out/step_000006")
    for name, damage in (
        ("model.safetensors", flip),
        ("trainer.pt", flip),
        ("trainer.pt", Path.unlink),
        ("vocab.json", lambda path: path.unlink() or os.mkfifo(path)),
        ("SHA256SUMS", lambda path: edit(path, "(?s).+")),
    ):
        damage(newest / name)
        if name == "model.safetensors":
            refused(f"sample.py --model={newest}", f"{name} is damaged")
        os.mkdir("out/step_000006.tmp")  # one that was being written when the machine died
        with open("out/metrics.jsonl", "ab") as file:
            file.write(b'{"step": "x"}\n{"step": 3.0, "val_loss": 1.0}\n{"step": 7, "train_l\xff')
        _, told = call(f"{TRAIN} --resume")
        assert "skipping step_000006" in told and read_log("out") == log
        sums = subprocess.check_output(["sha256sum", "-c", "SHA256SUMS"], cwd=newest)
        assert sums.count(b": OK") == len(prep.CHECKPOINT_FILES) == len(os.listdir(newest)) - 1
        assert not os.path.exists("out/step_000006.tmp")


def change_trainer(checkpoint: Path, **changes: Any) -> None:
    """Change a trainer.pt as another program might write it."""
    path = checkpoint / "trainer.pt"
    torch.save(torch.load(path) | changes, path)
    prep.add_checksums(checkpoint, [path.name])


def test_a_run_is_continued_only_as_it_was() -> None:
    call(TRAIN)
    before = contents("out")
    refused(TRAIN, "--resume")
    changes = "--max-lr was 0.01 and is now 0.02; --seed was 1337"
    assert "--steps" not in refused(f"{TRAIN} --max-lr=0.02 --seed=1 --resume", changes)
    call(f"{TRAIN} --resume")  # a finished run: nothing left to do
    assert contents("out") == before
    shutil.copytree("out", "whole")
    for change in ({"optimizer": {}}, {"config": {"dtype": "float99"}}):
        change_trainer(Path("out/step_000006"), **change)
        refused("train.py --out=out --resume", "trainer.pt")
        shutil.copytree("whole", "out", dirs_exist_ok=True)
    shutil.rmtree("out/step_000006")
    # As in a version before it had the one setting, and in one that has the other no more.
    config = torch.load("out/step_000003/trainer.pt")["config"] | {"label_smoothing": 0.1}
    config.pop("weight_decay")
    change_trainer(Path("out/step_000003"), config=config)
    _, told = call("train.py --out=out --resume")
    assert "an unknown setting, label_smoothing, which is ignored" in told
    assert_same_run("whole", "out")
    flip("shards/train_000001.bin")  # and described as it now is: other data
    prep.add_checksums(Path("shards"), ["train_000001.bin"])
    refused("train.py --out=out --resume", "train_000001.bin is not what the run was trained on")


def test_law_8_another_programs_data_is_recognized_by_name_and_size(monkeypatch: Patch) -> None:
    """Shards without meta.json have the tokens of GPT-2, whose tokenizer cannot be fetched here."""
    gpt2 = bpe_tokenizer(bytes(divmod(i, 256)) for i in range(50_000))
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "gpt2", gpt2)
    prep.get_tokenizer.cache_clear()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", os.getcwd())
    for name in ("encoder.json", "vocab.bpe"):
        address = f"{prep.GPT2_ENCODING}/{name}".encode()
        Path(hashlib.sha1(address).hexdigest()).write_text(name)
    os.mkdir("theirs")
    os.rename("shards/train_000000.bin", "theirs/fineweb_train_000001.bin")  # modded-nanogpt's name
    os.rename("shards/val_000000.bin", "theirs/tiny_shakespeare_val.bin")  # llm.c's
    save_random("start", 32, "gpt2", 50304)
    command = f"{TRAIN} --steps=3 --init-from=start --data=theirs"
    said, _ = call(command)
    assert "start has 50304 tokens, of which the first 50257 are used" in said
    assert gpt.read_config("out/step_000003")[0].vocab_size == 50257
    assert Path("out/step_000003/vocab.json").read_text() == "encoder.json"
    prep.add_checksums(Path("theirs"), os.listdir("theirs"))
    call(f"{command} --resume")  # checksums that came later change nothing
    os.remove("theirs/SHA256SUMS")
    os.replace("shards/train_000002.bin", "theirs/fineweb_train_000001.bin")
    refused(f"{command} --resume", "train_000001.bin is not what the run was trained on")
    prep.get_tokenizer.cache_clear()


def test_bad_shards_are_named() -> None:
    path = Path("shards/train_000001.bin")
    good = path.read_bytes()
    foreign = (b"?" + good[1:], good[:4] + b"?" + good[5:], good[:8] + bytes(1016))
    for bad in (b"", b"abc", good[:-2], *foreign):  # of another kind or version, or without tokens
        path.write_bytes(bad)
        refused(TRAIN, f"{path} is damaged")
    path.write_bytes(good[:1024] + b"\xff" * 40_000)
    refused(TRAIN, f"{path} contains token 65535")
    path.unlink()
    refused(TRAIN, f"{path} is missing")
    os.mkfifo(path)  # whoever opens it waits for a writer
    refused(TRAIN, f"{path} is missing")
    edit("shards/SHA256SUMS", ".*train_000000.bin\n")
    refused(TRAIN, "train_000000.bin is missing, or not in SHA256SUMS")


def test_a_mistake_is_named_in_one_line(monkeypatch: Patch) -> None:
    for command, options in (
        (TRAIN, "--min-lr=1 --warmup-steps=715 --total-batch-tokens=500 --max-lr=nan --stepz=1"),
        (PREPARE, f"--source=demo --max-tokens={9**400}"),
        (SAMPLE, "--top-p=1.5"),
    ):
        for option in options.split():
            refused(f"{command} {option}", option.split("=")[0], status=2)
    save_random("short", block_size=16)
    save_random("other", tokenizer="gpt2")
    save_random("small", vocab_size=256)
    os.mkdir("part")
    Path("part/meta.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for command, words in {
        f"{TRAIN} --init-from=short": "--sequence-length 32 exceeds",
        f"{TRAIN} --init-from=other": "--tokenizer gpt2",
        f"{TRAIN} --init-from=small": "256 tokens; 257",
        f"{TRAIN} --data=start": "no train shards",
        f"{TRAIN} --data=part": "incomplete",
        f"{TRAIN} --total-batch-tokens=65536": "only 46,912 usable tokens",
        f"{TRAIN} --device=mps": "mps is not available",
        f"{TRAIN} --tensorboard": "pip install tensorboard",
        f"{PREPARE} --input=none.txt": "none.txt does not exist, or is not a file",
        "sample.py": "out is not a model",
    }.items():
        refused(command, words)


def test_mistakes_in_torchruns_variables_are_named(monkeypatch: Patch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = f"RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT={taken.getsockname()[1]}"
        mistakes = {"WORLD_SIZE=two": 2, "WORLD_SIZE=0": 2, "MASTER_PORT=0": 1, "RANK=x": 1, "RANK=1": 1}
        for mistake, status in mistakes.items():
            set_environment(monkeypatch, f"{place} {mistake}")
            refused(TRAIN, mistake.split("=")[0], status)
        set_environment(monkeypatch, place)
        assert "cannot join the other processes" in run(TRAIN, status=1)[1]


def test_what_is_missing_is_named_in_one_line(monkeypatch: Patch) -> None:
    set_environment(monkeypatch, "CXX=/nonexistent/g++ TORCHINDUCTOR_CACHE_DIR=cache")
    _, error = run(f"{TRAIN} --compile", status=1)
    assert re.fullmatch(r"train.py: error: the model cannot be compiled here \(.*\); use --no-compile\n", error)
    set_environment(monkeypatch, f"PYTHONPATH={os.getcwd()}")
    for name, content, words in (  # found before the real one; as on Windows
        ("tiktoken.py", "import tiktokens", "No module named 'tiktokens'; pip install -r requirements.txt"),
        ("sitecustomize.py", "import sys; sys.modules['fcntl'] = None", ".*; on Windows, use WSL"),
    ):
        Path(name).write_text(content)
        for script in ("prepare_data.py", "train.py", "sample.py"):
            assert re.fullmatch(f"{script}: error: {words}\n", run(script, status=1)[1])
        os.remove(name)
    old = "import torch; del torch.nn.LinearCrossEntropyOptions; torch.__version__ = '2.12.0'"
    Path("sitecustomize.py").write_text(old)
    words = "PyTorch 2.13 is needed; this is 2.12.0; pip install -r requirements.txt"
    assert run("train.py", status=1)[1] == f"train.py: error: {words}\n"


def test_demo_from_nothing_to_text() -> None:
    run("prepare_data.py --source demo")
    options = "--steps=12 --warmup-steps=2 --sample-every=12 --log-every=1 --eval-tokens=5000"
    said, _ = run(f"train.py --preset demo --device=cpu {options}")
    assert said.endswith("python sample.py --model=out/demo\n")
    assert re.search(r"^step 12  loss [\d.]+  lr [\d.e-]+  norm [\d.]+  [\d,]+k? tok/s  0:00:00 left$", said, re.M)
    first, *_, last = logged("out/demo")
    assert last + 1 < first == pytest.approx(math.log(257), rel=0.03)
    _, told = run("sample.py --max-new-tokens=50 --device=cpu")
    assert re.fullmatch(r"out/demo/step_000012: [\d,]+ parameters, cpu\n\d+ tokens, [\d.]+ tokens/s\n", told)


def test_sample_continues_prompts(monkeypatch: Patch) -> None:
    def sampled(options: str, stdin: bytes = b"") -> str:
        standard_input = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8", newline="\n")
        monkeypatch.setattr("sys.stdin", standard_input)
        return call(f"{SAMPLE} {options}")[0]

    assert sampled("") == sampled("") != sampled("--seed=1")
    parts = sampled("--prompt=The --num-samples=3").split("-" * 80 + "\n")
    assert len({*parts}) == 3 and all(part.startswith("The") and part.endswith("\n") for part in parts)
    wanted = sampled("--prompt='of which'")
    for stdin in (b"of which\n", b"of which\r\n", b"\xef\xbb\xbfof which"):  # of any system
        assert sampled("--prompt=-", stdin) == wanted
    asked = sampled("--interactive", b"The\n\xff\nof which\n")  # a bad line does not end it
    assert asked.startswith(sampled("--prompt=The")) and "\nof which" in asked
    text, _ = call(f"{SAMPLE} --prompt={'a' * 40}")
    said, told = call(f"{SAMPLE} --prompt='{' ' * 400_000}{'a' * 40}'")
    assert said.strip() == text.strip()
    assert "the prompt has 400,040 tokens; the last 40 are used" in told
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    refused(f"{SAMPLE} --prompt=-", "the prompt is not UTF-8")


def test_characters_are_never_broken_in_the_stream() -> None:
    decode = sample.stream_decoder(prep.get_tokenizer("byte"))
    tokens = [*"aé🙂".encode(), 0xF0, 0x9F, 256, 97]
    assert [decode(token) for token in tokens] == ["a", "", "é", "", "", "", "🙂", "", "", "\ufffd", "a"]


def test_scripts_run_with_closed_standard_streams() -> None:
    for command in (f"{SAMPLE} --prompt=-", f"{TRAIN} --eval-only --init-from=start"):
        shell = f"{sys.executable} {ROOT}/{command} <&- 2>&-"
        done = subprocess.run(shell, shell=True, capture_output=True, timeout=TIMEOUT, check=True)
        assert done.stdout and not done.stderr
