"""
GPT-2 as a PyTorch module, its weights in and out, and text generation with a KV cache.

    model = load_model("gpt2")                        # OpenAI's weights, fetched once from the Hugging Face hub
    model = load_model("out/step_019073")             # our own
    for tokens in generate(model, prompt, 100): ...   # (B,) new tokens at a time

After "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019). Parameter names are those of
OpenAI's release, so that weights map one to one. Reads and writes `model.safetensors` and `config.json` in the layout
that the hub uses for GPT-2; a directory that `save_model` wrote can be opened with
`transformers.GPT2LMHeadModel.from_pretrained`.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import requests
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

# The architecture


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2. `block_size` is the longest context in tokens; the defaults are those of the 124M model."""

    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")


MODEL_SIZES = {
    "gpt2": GPTConfig(n_layer=12, n_head=12, n_embd=768),  # 124M
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),  # 1558M
    "gpt2-tiny": GPTConfig(n_layer=2, n_head=4, n_embd=256),  # for a CPU; not one of OpenAI's
}

LAYER_NORM_EPS = 1e-5
KVCache = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values of each layer, (B, n_head, block_size, head size)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """
    `F.linear`, (..., in) to (..., out). A few rows on a CPU, as generation has them, are multiplied as the columns of
    W x^T, and one row as two of them: BLAS may read the weights of a product with a single vector in one thread only.
    """
    rows = x.numel() // x.size(-1)
    if torch.is_grad_enabled() or rows > 8 or x.device.type != "cpu" or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    x_rows = x.reshape(rows, -1)
    columns = (x_rows if rows > 1 else torch.cat((x_rows, x_rows))).t()
    y = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)  # (out, columns)
    return y[:, :rows].t().contiguous().view(*x.shape[:-1], -1)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value of all heads in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor] | None,
        start: int | torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        B, T, C = x.shape
        qkv = linear(x, self.c_attn.weight, self.c_attn.bias).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, nh, T, hs) each
        if cache is not None:
            cached_k, cached_v = cache
            if mask is None:
                cached_k[:, :, start : start + T] = k
                cached_v[:, :, start : start + T] = v
                k, v = cached_k[:, :, : start + T], cached_v[:, :, : start + T]
            else:
                k, v = cached_k.index_copy_(2, start, k), cached_v.index_copy_(2, start, v)
        # A single token at the end of the cache sees all of it; any other call starts at 0, where "causal" is a square.
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, is_causal=T > 1)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(linear(y, self.c_proj.weight, self.c_proj.bias))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(linear(x, self.c_fc.weight, self.c_fc.bias), approximate="tanh")
        return self.resid_dropout(linear(x, self.c_proj.weight, self.c_proj.bias))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        self.mlp = MLP(config)

    def forward(
        self,
        x: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor] | None,
        start: int | torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), cache, start, mask)
        return x + self.mlp(self.ln_2(x))


class LinearCrossEntropy(torch.autograd.Function):
    """
    The mean cross-entropy of the logits x W^T over the targets that are not -1, a float32 scalar. Logits are made for a
    chunk of rows at a time, and their gradient is used as soon as it is known, so that never more than a chunk of them
    is kept: for a micro-batch they would be the largest thing in memory.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: torch.Tensor,  # (N, C)
        weight: torch.Tensor,  # (V, C), of which the first vocab_size rows count
        targets: torch.Tensor,  # (N,) int64
        vocab_size: int,
        dtype: torch.dtype,  # of the matrix products
    ) -> torch.Tensor:
        w, total = weight.to(dtype), torch.zeros((), device=x.device)
        x_grad, weight_grad = torch.empty_like(x), torch.zeros_like(weight)
        pieces = chunks(x, on_cpu=256)
        # Float32 products go straight to where they are needed: on a CPU, new memory costs as much as the softmax.
        direct = dtype == x.dtype == weight.dtype
        buffer = x.new_empty(pieces[0].stop, len(w)) if direct else None
        for rows in pieces:
            x_rows = x[rows].to(dtype)
            logits = torch.mm(x_rows, w.t(), out=buffer[: len(x_rows)]) if direct else (x_rows @ w.t()).float()
            logits[:, vocab_size:] = -math.inf
            scored = (targets[rows] >= 0)[:, None]
            index = targets[rows].clamp(min=0)[:, None]
            picked, top = logits.gather(1, index), logits.amax(dim=-1, keepdim=True)
            probs = torch.softmax(logits, dim=-1, out=logits) if direct else logits.softmax(dim=-1)
            log_sum = top - probs.amax(dim=-1, keepdim=True).log()  # of the exponentials of the logits
            total += ((log_sum - picked) * scored).sum()
            grad = probs.scatter_add_(1, index, torch.full_like(picked, -1)).mul_(scored)
            if direct:
                torch.mm(grad, w, out=x_grad[rows])
                torch.addmm(weight_grad, grad.t(), x_rows, out=weight_grad)
            else:
                grad = grad.to(dtype)
                x_grad[rows] = grad @ w
                weight_grad += grad.t() @ x_rows
        count = (targets >= 0).sum()
        ctx.save_for_backward(x_grad, weight_grad, count)
        return total / count

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:  # noqa: ANN401
        x_grad, weight_grad, count = ctx.saved_tensors
        return x_grad.mul_(grad / count), weight_grad.mul_(grad / count), None, None, None


def chunks(x: torch.Tensor, on_cpu: int = 128) -> list[slice]:
    """The rows of x in pieces, large enough for fast products, and on a CPU so small that the logits of one lie in
    memory that is used again, not fetched anew; at most 16 in compiled code, which writes a loop out."""
    size = 8192 if x.device.type == "cuda" else on_cpu
    if torch.compiler.is_compiling():
        size = max(size, math.ceil(len(x) / 16))
    return [slice(start, min(start + size, len(x))) for start in range(0, len(x), size)]


class GPT(nn.Module):
    """
    GPT-2: `model(tokens)` gives logits, `model(tokens, targets)` the mean loss alone.

    One matrix, `transformer.wte.weight`, is both the token embedding and the output projection. It has a multiple of
    128 rows, since matrix products of odd sizes are slow on GPUs; the rows past `vocab_size` are no part of the
    softmax, are not saved and not counted.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        padded_vocab_size = math.ceil(config.vocab_size / 128) * 128
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(padded_vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS),
            }
        )
        self.apply(self._init_weights)
        with torch.no_grad():
            self.transformer.wte.weight[config.vocab_size :] = 0  # the padding rows get no gradient and stay 0

    def _init_weights(self, module: nn.Module) -> None:
        """Normal(0, 0.02); the two projections of a block that end in the residual stream, which sums 2 * n_layer of
        them, are scaled so that its variance does not grow with depth (section 2.3 of the paper)."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, Block):  # reached after the linear layers inside it
            for projection in (module.attn.c_proj, module.mlp.c_proj):
                nn.init.normal_(projection.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def hidden(self, tokens: torch.Tensor, cache: KVCache | None = None, start: int | torch.Tensor = 0) -> torch.Tensor:
        """
        The trunk: (B, T) tokens at positions start, ..., start + T - 1 to (B, T, C), normalized for the output matrix.

        With a `cache`, keys and values are written there at the same positions, and those before `start` are read
        from it; then either `start` is 0 or T is 1. As a tensor, (1,) int64, `start` can change while the kernels and
        their sizes remain, which are then those of the whole cache. Raises ValueError when an int runs past the block
        size.
        """
        T, block_size = tokens.size(1), self.config.block_size
        if isinstance(start, torch.Tensor):
            positions = self.transformer.wpe(start)
            mask = (torch.arange(block_size, device=tokens.device) <= start)[None]  # (1, block_size)
        else:
            if start + T > block_size:
                raise ValueError(f"{start + T} tokens are more than the model's context of {block_size}")
            positions, mask = self.transformer.wpe.weight[start : start + T], None
        x = self.transformer.drop(self.transformer.wte(tokens) + positions)  # (B, T, C)
        for i, block in enumerate(self.transformer.h):
            x = block(x, None if cache is None else cache[i], start, mask)
        return self.transformer.ln_f(x)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) from `hidden` to (..., vocab_size)."""
        return linear(x, self.transformer.wte.weight)[..., : self.config.vocab_size]

    def forward(
        self, tokens: torch.Tensor, targets: torch.Tensor | None = None, reduction: str = "mean"
    ) -> torch.Tensor:
        """
        tokens (B, T), integer -> logits (B, T, vocab_size); with targets (B, T), int64 -> the mean cross-entropy, a
        float32 scalar in nats, over the positions whose target is not -1. With reduction "none", the cross-entropy of
        each position, (B, T) float32, 0 where the target is -1. Raises ValueError when T is past block_size.
        """
        x = self.hidden(tokens)
        if targets is None:
            return self.logits(x)
        x, flat_targets = x.flatten(0, 1), targets.flatten()
        if reduction == "mean":
            kind = x.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
            weight = self.transformer.wte.weight
            loss = LinearCrossEntropy.apply
            if torch.compiler.is_compiling() and kind != "cuda":  # on a CPU, compiled code is slower here
                loss = torch.compiler.disable(loss)
            return loss(x, weight, flat_targets, self.config.vocab_size, dtype)
        losses = [
            F.cross_entropy(self.logits(x[rows]).float(), flat_targets[rows], ignore_index=-1, reduction="none")
            for rows in chunks(x)
        ]
        return torch.cat(losses).view_as(targets)


def parameter_count(model: GPT) -> int:
    """Parameters that are trained and saved: the shared matrix once, its padding rows not at all."""
    padding = model.transformer.wte.num_embeddings - model.config.vocab_size
    return sum(p.numel() for p in model.parameters()) - padding * model.config.n_embd


def flops_per_token(config: GPTConfig) -> float:
    """
    Floating-point operations per trained token, forward and backward, at the full context: 6 for each weight of a
    matrix product (the output matrix included, position embeddings and the like not) and 12 * n_layer * n_embd *
    block_size for attention, of which the causal half is counted too, as is the custom (appendix B of PaLM, Chowdhery
    et al., 2022).
    """
    weights = 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd
    return 6 * weights + 12 * config.n_layer * config.n_embd * config.block_size


def configure_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices and none on biases and LayerNorms; fused wherever the device can."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cuda", "cpu", "mps") for p in parameters)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=1e-8, fused=fused)


# Devices

DEVICES = ("auto", "cuda", "mps", "cpu")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def choose_device(name: str) -> torch.device:
    """One of DEVICES; "auto" is the first of them that is there. Raises ValueError for one that is not."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(kind for kind, there in available.items() if there) if name == "auto" else name
    if not available[kind]:
        raise ValueError(f"--device {kind}: this machine, or this build of PyTorch, has none")
    return torch.device(kind)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """One of DTYPES for matrix products; "auto" is bfloat16 on CUDA, float16 on cards too old for it, else float32.
    Raises ValueError for float16 where nothing computes in it."""
    if name == "auto" and device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if name == "float16" and device.type != "cuda":
        raise ValueError("--dtype float16 needs a CUDA device; choose float32 or bfloat16")
    return torch.float32 if name == "auto" else getattr(torch, name)


# Weights in and out

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # (in, out) in files


def save_model(model: GPT, directory: str | Path, tokenizer: str = "gpt2") -> None:
    """
    Write `model.safetensors` (float32, linear weights as (in, out) like OpenAI's release, no padding rows) and
    `config.json` to `directory`, which is made if need be. `tokenizer` is the name to be found by `model_tokenizer`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = model.config
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "transformer.wte.weight":
            tensor = tensor[: config.vocab_size]
        tensor = tensor.t() if name.endswith(TRANSPOSED) else tensor
        tensors[name] = tensor.to("cpu", torch.float32).contiguous()
    # transformers reads the metadata's "format" and refuses a file without it.
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    described = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "layer_norm_epsilon": LAYER_NORM_EPS,
        "initializer_range": 0.02,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "bos_token_id": config.vocab_size - 1,  # <|endoftext|> is the last token of both tokenizers
        "eos_token_id": config.vocab_size - 1,
        "tie_word_embeddings": True,
        "tokenizer": tokenizer,
    }
    (directory / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def load_model(name_or_dir: str | Path, dropout: float = 0.0) -> GPT:
    """
    The model in a directory of the hub's layout, or one of OpenAI's four by name ("gpt2", ..., fetched once), in
    float32 on the CPU and in eval mode. Raises FileNotFoundError when there is no such model, ValueError when what is
    there is not a whole GPT-2, and OSError when a download fails.
    """
    directory = model_directory(name_or_dir)
    described = _read_config(directory)
    keys = {"block_size": "n_positions", "vocab_size": "vocab_size", "n_layer": "n_layer", "n_head": "n_head"}
    try:
        config = GPTConfig(n_embd=described["n_embd"], **{ours: described[key] for ours, key in keys.items()})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{directory}/config.json does not describe a GPT-2: {error} is missing or wrong") from error
    for key, wanted in {"activation_function": "gelu_new", "layer_norm_epsilon": LAYER_NORM_EPS}.items():
        if described.get(key, wanted) != wanted:
            raise ValueError(f"{directory}/config.json has {key} {described[key]}, where GPT-2 has {wanted}")
    try:
        stored = load_file(directory / "model.safetensors")
    except SafetensorError as error:
        raise ValueError(f"{directory}/model.safetensors is damaged or not a safetensors file: {error}") from error

    with torch.device("meta"):  # no time spent on an initialization that the file replaces
        model = GPT(replace(config, dropout=dropout))
    state = {}
    for name, parameter in model.state_dict().items():
        tensor = stored.get(name, stored.get(name.removeprefix("transformer.")))  # the hub's gpt2 has no prefix
        if tensor is None:
            raise ValueError(f"{directory}/model.safetensors has no {name}")
        tensor = tensor.t() if name.endswith(TRANSPOSED) else tensor
        if name == "transformer.wte.weight" and tensor.shape == (config.vocab_size, config.n_embd):
            tensor = F.pad(tensor, (0, 0, 0, parameter.size(0) - config.vocab_size))
        if tensor.shape != parameter.shape:
            raise ValueError(f"{directory}/model.safetensors: {name} is {tuple(tensor.shape)}, not as in config.json")
        state[name] = tensor.to(torch.float32).contiguous()
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True).eval()


def model_tokenizer(name_or_dir: str | Path) -> str:
    """The name of the tokenizer that a model was trained with ("gpt2" where its config.json does not say)."""
    return _read_config(model_directory(name_or_dir)).get("tokenizer", "gpt2")


def model_directory(name_or_dir: str | Path) -> Path:
    """The directory of a model given by path or by name; OpenAI's models are fetched at their first use."""
    directory = Path(name_or_dir)
    if (directory / "config.json").is_file() and (directory / "model.safetensors").is_file():
        return directory
    if str(name_or_dir) in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        return _fetch_from_hub(str(name_or_dir))
    missing = "it has no model.safetensors and config.json" if directory.is_dir() else "there is no such directory"
    raise FileNotFoundError(f"{name_or_dir} is not a model: {missing}, nor is it one of gpt2, gpt2-medium, -large, -xl")


def _read_config(directory: Path) -> dict:
    try:
        described = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{directory}/config.json is damaged: {error}") from error
    if not isinstance(described, dict) or described.get("model_type") != "gpt2":
        raise ValueError(f"{directory}/config.json does not describe a GPT-2 (model_type is not gpt2)")
    return described


def _fetch_from_hub(name: str) -> Path:
    """The directory of a model of OpenAI's in the cache, where it is fetched to if need be. Raises OSError."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt2" / name
    missing = [file for file in ("config.json", "model.safetensors") if not (cache / file).is_file()]
    if not missing:
        return cache
    cache.mkdir(parents=True, exist_ok=True)
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    token = os.environ.get("HF_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}  # requests drops it when another host takes over
    try:
        listing = requests.get(f"{endpoint}/api/models/openai-community/{name}/tree/main", headers=headers, timeout=60)
        listing.raise_for_status()
        entries = {entry["path"]: entry for entry in listing.json()}
        for file in missing:
            url = f"{endpoint}/openai-community/{name}/resolve/main/{file}"
            entry = entries[file]
            _fetch_file(url, cache / file, entry["size"], entry.get("lfs", {}).get("oid"), headers)
    except (requests.RequestException, KeyError) as error:
        raise OSError(
            f"{name} could not be fetched from {endpoint}: {error!r}; start again and it will go on"
        ) from error
    return cache


def _fetch_file(url: str, path: Path, size: int, sha256: str | None, headers: dict[str, str]) -> None:
    """Fetch a file, going on from what an interrupted try left; it gets its name when size and sha256 are right."""
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    if have < size:
        wanted = {**headers, "Range": f"bytes={have}-"} if have else headers
        print(f"fetching {url} ({size / 1e6:.0f} MB)", file=sys.stderr)
        with requests.get(url, headers=wanted, stream=True, timeout=60) as response:
            response.raise_for_status()
            have = have if response.status_code == 206 else 0
            with open(part, "r+b" if have else "wb") as out:
                out.seek(have)
                for chunk in response.iter_content(1 << 15):
                    have += out.write(chunk)
                    if sys.stderr.isatty():
                        print(f"\r{path.name}: {have / 1e6:.0f} of {size / 1e6:.0f} MB", end="", file=sys.stderr)
        if sys.stderr.isatty():
            print(file=sys.stderr)
    digest = hashlib.sha256()
    with open(part, "rb") as downloaded:
        while chunk := downloaded.read(1 << 20):
            digest.update(chunk)
    if have != size or sha256 not in (None, digest.hexdigest()):
        part.unlink()
        raise OSError(f"the size or sha256 of {url} is not what the hub announces; start again to fetch it anew")
    part.replace(path)


# Generation


def probabilities(
    logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    (B, V) logits to the distribution that the next token is drawn from: (B, K) float32 probabilities and their (B, K)
    int64 tokens. The logits are divided by `temperature`, cut to the `top_k` most likely tokens, then to the smallest
    set whose probability reaches `top_p`, and normalized again. None leaves a cut out; what is cut has no place in the
    result, or probability 0.
    """
    logits, vocab_size = logits.float() / temperature, logits.size(-1)
    if top_k is None and top_p in (None, 1):
        return logits.softmax(dim=-1), torch.arange(vocab_size, device=logits.device).expand_as(logits)
    logits, tokens = logits.topk(min(top_k or vocab_size, vocab_size))  # the most likely first
    probs = logits.softmax(dim=-1)
    if top_p is not None:
        before = probs.cumsum(dim=-1) - probs  # what the more likely tokens already hold
        probs = probs.masked_fill(before >= top_p, 0.0)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    return probs, tokens


def sample_token(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """(B, V) logits to (B,) int64 tokens; temperature 0 takes the most likely one."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs, tokens = probabilities(logits, temperature, top_k, top_p)
    # argmax(p / Exponential(1)) is a draw from p, and unlike torch.multinomial it never waits for the GPU.
    drawn = (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(dim=-1, keepdim=True)
    return tokens.gather(-1, drawn).squeeze(-1)


def next_logits(model: GPT, token: torch.Tensor, cache: KVCache, position: int | torch.Tensor) -> torch.Tensor:
    """The logits (B, V) after `token` (B,) at `position`, with what is before it in the cache."""
    return model.logits(model.hidden(token[:, None], cache, position)[:, -1])


def fixed_decoder(model: GPT, B: int, cache: KVCache, compiled: bool) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """
    `next_logits` as a function of a token and its position that runs the same kernels on the same memory each time: on
    CUDA they are captured as one graph, which costs the host one launch. What is in the cache is lost.
    """
    device = cache[0][0].device
    token, position = (torch.zeros(size, dtype=torch.int64, device=device) for size in (B, 1))
    step = torch.compile(next_logits) if compiled else next_logits
    graph = torch.cuda.CUDAGraph() if device.type == "cuda" else None
    if graph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what only the first calls do, as compiling, is no part of the graph
            for _ in range(3):
                step(model, token, cache, position)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            captured = step(model, token, cache, position)

    def decode(new_token: torch.Tensor, new_position: int) -> torch.Tensor:
        token.copy_(new_token)
        position.fill_(new_position)
        if graph is None:
            return step(model, token, cache, position)
        graph.replay()
        return captured

    return decode


@torch.inference_mode()
def generate(
    model: GPT,
    tokens: torch.Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    stop_token: int | None = None,
    fixed: bool = False,
    compiled: bool = False,
) -> Iterator[torch.Tensor]:
    """
    Continue a batch of prompts of one length: from (B, T) tokens, yield `max_new_tokens` times the next (B,) int64.

    The keys and values of all that was read are kept in a preallocated cache, so that a token costs one pass over the
    weights. When the context is full, the last half of it becomes the new context. A row that has drawn `stop_token`
    goes on with `stop_token`; when all rows have, the generation ends (on CUDA, where asking means waiting, within 16
    tokens). `generator` (on the model's device) makes the draws reproducible. With `fixed`, a token's pass is the same
    for every position, over the whole cache, and on CUDA captured as a graph; `compiled` compiles that pass. Raises
    ValueError for an empty prompt, one longer than the context, or a setting out of range.
    """
    config, device = model.config, tokens.device
    B, T = tokens.shape
    if not 1 <= T <= config.block_size:
        raise ValueError(f"a prompt must have 1 to {config.block_size} tokens (the model's context), not {T}")
    if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError("temperature must be at least 0, top_k at least 1, and top_p above 0 and at most 1")
    weight = model.transformer.wte.weight
    shape = (B, config.n_head, config.block_size, config.n_embd // config.n_head)
    # Where the whole cache is read and masked, what is not yet written there must be finite.
    allocate = weight.new_zeros if fixed or compiled else weight.new_empty
    cache = [(allocate(shape), allocate(shape)) for _ in range(config.n_layer)]
    context = tokens.new_empty(B, config.block_size)  # the tokens behind the cache's entries
    context[:, :T] = tokens
    start, end = 0, T  # context[:, start:end] is still to be read into the cache
    finished = torch.zeros(B, dtype=torch.bool, device=device)
    ask_every = 16 if device.type == "cuda" else 1
    was_training = model.training
    model.eval()
    try:
        decode = fixed_decoder(model, B, cache, compiled) if fixed or compiled else None
        for i in range(1, max_new_tokens + 1):
            if decode and start > 0:
                logits = decode(context[:, start], start)
            else:
                logits = model.logits(model.hidden(context[:, start:end], cache, start)[:, -1])
            token = sample_token(logits, temperature, top_k, top_p, generator)
            if stop_token is not None:
                token = token.masked_fill(finished, stop_token)
                finished |= token == stop_token
            yield token
            if stop_token is not None and i % ask_every == 0 and finished.all():
                return
            start = end
            if end == config.block_size:
                kept = config.block_size // 2
                context[:, :kept] = context[:, config.block_size - kept :].clone()
                start, end = 0, kept
            context[:, end] = token
            end += 1
    finally:
        model.train(was_training)
