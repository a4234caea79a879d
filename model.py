"""
GPT-2 as a PyTorch module, its weights file, and text generation with a KV cache.

    model = load_model("out/step_019073")
    for tokens in generate(model, prompt, 100): ...   # (B,) new tokens at a time

After "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019), with the parameter names of OpenAI's
release. A model is a directory in the layout that the Hugging Face hub uses for GPT-2, `model.safetensors` and
`config.json`: `transformers.GPT2LMHeadModel.from_pretrained` opens ours, and `load_model` opens theirs.

In shape comments: B sequences of T tokens, C = n_embd channels, nh heads of size hs = C / nh.
"""

import functools
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence

if not hasattr(nn, "LinearCrossEntropyOptions"):
    raise ImportError(f"PyTorch 2.13 is needed; this is {torch.__version__}")

# The architecture

SHAPE = ("vocab_size", "n_layer", "n_head", "n_embd")  # named alike in config.json
LAYER_NORM_EPS = 1e-5


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
        """Raise ValueError for an impossible shape, which may come from a file or from the command line."""
        for name in ("block_size", *SHAPE):
            size = getattr(self, name)
            most = 1000 if name == "n_layer" else 2**24
            if type(size) is not int or not 1 <= size <= most:
                raise ValueError(f"{name} must be an integer from 1 to {most:,}, not {size!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")


MODEL_SIZES = {
    "gpt2": GPTConfig(n_layer=12, n_head=12, n_embd=768),  # 124M
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),  # 1558M
    "gpt2-tiny": GPTConfig(n_layer=2, n_head=4, n_embd=256),  # for a CPU; not one of OpenAI's
}


@functools.cache
def is_intel_cpu() -> bool:
    return "Intel" in torch.cpu.get_capabilities().get("cpu_name", "")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, (..., in) to (..., out), but up to twice as fast for the few rows of text generation in float32 on a
    CPU. A single row on an Intel CPU is left to MKL, which multiplies it as fast as memory allows."""
    flat = x.flatten(0, -2)
    rows = len(flat)
    float32_on_cpu = x.is_cpu and x.dtype == torch.float32
    if torch.is_grad_enabled() or rows > 8 or not float32_on_cpu or (rows == 1 and is_intel_cpu()):
        return F.linear(x, weight, bias)
    # W x^T reads the weights in memory's order. BLAS may use one thread for a single row, but not for two.
    if rows == 1:
        flat = flat.repeat(2, 1)
    y = weight @ flat.t() if bias is None else torch.addmm(bias[:, None], weight, flat.t())  # (out, rows)
    return y[:, :rows].t().contiguous().view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)  # query, key and value of all heads in one product
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: Tensor | None = None, start: int = 0) -> Tensor:
        """(B, T, C) to (B, T, C). With a `cache` of keys and values, (2, B, nh, block_size, hs), x begins at position
        `start`, and the cache holds all before it."""
        B, T, C = x.shape
        nh = self.n_head
        hs = C // nh
        qkv = self.c_attn(x).view(B, T, 3 * nh, hs).transpose(1, 2)
        q, k, v = qkv.split(nh, dim=1)  # (B, nh, T, hs) each
        if cache is not None:
            end = start + T
            cache[..., start:end, :] = torch.stack((k, v))
            k, v = cache[..., :end, :]
        dropout = self.dropout if self.training else 0.0
        # Flash attention where the device has it. A single new token attends to everything cached, without a mask.
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.c_fc(x), approximate="tanh")
        return self.resid_dropout(self.c_proj(x))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: Tensor | None = None, start: int = 0) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, start)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """`model(tokens)` gives logits, `model(tokens, targets)` the mean loss alone. One matrix, `transformer.wte.weight`,
    is both the token embedding and the output projection. It has a multiple of 128 rows, since GPUs multiply odd sizes
    slowly; the rows past `vocab_size` take no part in the softmax, have no gradient, and are not saved or counted."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        padded_vocab_size = math.ceil(config.vocab_size / 128) * 128
        layers = {
            "wte": nn.Embedding(padded_vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.block_size, config.n_embd),
            "drop": nn.Dropout(config.dropout),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS),
        }
        self.transformer = nn.ModuleDict(layers)
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        """Normal(0, 0.02). Each block adds two projections to the residual stream; those are scaled by
        1 / sqrt(2 * n_layer), so that its variance does not grow with depth (section 2.3 of the paper)."""
        if isinstance(module, nn.Embedding | nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, Block):  # reached after the linear layers inside it
            for projection in (module.attn.c_proj, module.mlp.c_proj):
                nn.init.normal_(projection.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def hidden(self, tokens: Tensor, cache: Tensor | None = None, start: int = 0) -> Tensor:
        """(B, T) tokens to (B, T, C), after the final LayerNorm. With a `cache`, (n_layer, 2, B, nh, block_size, hs),
        the tokens begin at position `start`; unless that is 0, T must be 1. Raises ValueError past the context."""
        end = start + tokens.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens exceed the model's context of {self.config.block_size}")
        x = self.transformer.wte(tokens) + self.transformer.wpe.weight[start:end]
        x = self.transformer.drop(x)
        device = x.device.type
        if self.training and torch.is_autocast_enabled(device):
            # As in llm.c: half the memory traffic of float32, with no measurable difference in the loss.
            x = x.to(torch.get_autocast_dtype(device))
        for i, block in enumerate(self.transformer.h):
            x = block(x, None if cache is None else cache[i], start)
        return self.transformer.ln_f(x)

    def logits(self, x: Tensor) -> Tensor:
        """(..., C) from `hidden` to (..., vocab_size)."""
        return linear(x, self.transformer.wte.weight)[..., : self.config.vocab_size]

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """(B, T) tokens -> (B, T, vocab_size) logits; with (B, T) int64 targets -> the mean cross-entropy, a float32
        scalar in nats, over the positions whose target is not -1. Raises ValueError when T exceeds block_size."""
        x = self.hidden(tokens)
        if targets is None:
            return self.logits(x)
        weight = self.transformer.wte.weight
        bias = torch.zeros(len(weight), device=x.device)
        bias[self.config.vocab_size :] = -math.inf  # keeps the padding rows out of the softmax
        # Logits are the largest tensor of all, so eager float32 on a CPU computes those of 512 tokens at a time.
        # Compiled, the plain form is fused and needs no chunks; in half precision, chunks would round the loss.
        options = None
        if x.is_cpu and not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu"):
            options = nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=512)
        return F.linear_cross_entropy(
            x.flatten(0, 1), weight, targets.flatten(), linear_bias=bias, ignore_index=-1, options=options
        )

    def score(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """(B, T) tokens and int64 targets (-1: not scored) -> (2, B) float32: per row, the summed loss in nats and how
        many of the targets were the most likely token."""
        scored = targets >= 0
        # Centered logits have the same softmax, and are smaller, so that bfloat16 loses less of them.
        weight = self.transformer.wte.weight - mean_embedding(self)
        logits = F.linear(self.hidden(tokens)[scored], weight)
        logits = logits[:, : self.config.vocab_size].float()  # (targets scored, vocab_size)
        scores = torch.zeros(2, *targets.shape, device=tokens.device)
        scores[0, scored] = F.cross_entropy(logits, targets[scored], reduction="none")
        scores[1, scored] = (logits.argmax(dim=1) == targets[scored]).float()
        return scores.sum(dim=2)


def pad(rows: list[Tensor], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Pad int64 rows, whose last `counts` tokens are to be scored, to the (B, T) tokens and targets for `GPT.score`."""
    tokens = pad_sequence([row[:-1] for row in rows], batch_first=True)
    targets = pad_sequence([row[1:] for row in rows], batch_first=True, padding_value=-1)
    for i, count in enumerate(counts):
        targets[i, : len(rows[i]) - 1 - count] = -1  # the context
    return tokens, targets


def mean_embedding(model: GPT) -> Tensor:
    """The mean token embedding, (C,). Subtracted from every embedding, it shifts all logits of a position alike."""
    return model.transformer.wte.weight[: model.config.vocab_size].mean(dim=0)


@torch.no_grad()
def center_logits(model: GPT) -> GPT:
    """Move the mean token embedding into the position embeddings, before a cast to bfloat16. Their sum stays the same,
    but the logits of OpenAI's weights move from around -100, where bfloat16 has steps of 0.5, to around 0."""
    mean = mean_embedding(model)
    model.transformer.wte.weight[: model.config.vocab_size] -= mean
    model.transformer.wpe.weight += mean
    return model


@contextmanager
def evaluation_mode(model: GPT) -> Iterator[None]:
    """Evaluation mode, without gradients, and without cuDNN's attention, which builds a new plan for every shape."""
    was_training = model.training
    cudnn_attention = torch.backends.cuda.cudnn_sdp_enabled()
    model.eval()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        torch.backends.cuda.enable_cudnn_sdp(cudnn_attention)


def parameter_count(model: GPT) -> int:
    """The number of trained and saved parameters: the shared matrix counts once, its padding rows not at all."""
    padding = model.transformer.wte.num_embeddings - model.config.vocab_size
    return sum(p.numel() for p in model.parameters()) - padding * model.config.n_embd


def flops_per_token(config: GPTConfig) -> int:
    """Floating-point operations of a training step per token, as in appendix B of the PaLM paper (Chowdhery et al.,
    2022): 6 per weight of a matrix product, plus attention over the full context, including the masked half."""
    weights = 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd
    return 6 * weights + 12 * config.n_layer * config.n_embd * config.block_size


def configure_optimizer(
    model: GPT, learning_rate: float, weight_decay: float, betas: tuple[float, float], zero: bool = False
) -> torch.optim.Optimizer:
    """Fused AdamW, with weight decay on matrices only; `zero` shards its state (ZeRO-1, Rajbhandari et al., 2020)."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    settings = {"lr": learning_rate, "betas": betas, "eps": 1e-8, "fused": True}
    if not zero:
        return torch.optim.AdamW(groups, **settings)
    from torch.distributed.optim import ZeroRedundancyOptimizer  # slow to import

    return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **settings)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Restore the state of an optimizer from `configure_optimizer`."""
    optimizer.load_state_dict(state)
    local = getattr(optimizer, "optim", None)  # this rank's part of a ZeroRedundancyOptimizer
    if local:
        optimizer.state.clear()  # a second copy
        for parameter, values in local.state.items():
            values["step"] = values["step"].to(parameter.device)  # loading left it on the CPU


# Devices

DEVICES = ("auto", "cuda", "mps", "cpu")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def choose_device(name: str) -> torch.device:
    """The device for one of DEVICES; "auto" takes the first available. Raises ValueError if it is not available."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in available if available[kind])
    if not available[name]:
        raise ValueError(f"--device {name} is not available here, or not in this build of PyTorch; use --device auto")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device, training: bool = False) -> torch.dtype:
    """One of DTYPES for matrix products. "auto" is bfloat16 on CUDA (float16 on cards too old for it) and, in training,
    on x86 CPUs with instructions for it; else float32. Raises ValueError for float16 anywhere but on CUDA."""
    if name == "float16" and device.type != "cuda":
        raise ValueError("--dtype float16 needs a CUDA device; choose float32 or bfloat16")
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu" and training:
        features = torch.cpu.get_capabilities()
        if features.get("avx512_bf16") or features.get("amx_bf16"):
            return torch.bfloat16
    return torch.float32


# Peak FLOP/s in bfloat16 and float16 (dense, from the data sheets), by CUDA's name for the card
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
}

# Model directories

TRANSPOSED = ("c_attn.weight", "c_fc.weight", "c_proj.weight")  # (in, out) in files
# What a config.json may say besides the sizes. Any other value would mean a computation other than GPT-2's.
GPT2_SETTINGS = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": LAYER_NORM_EPS,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "n_inner": None,
    "tie_word_embeddings": True,
}


def save_model(model: GPT, directory: str | Path, tokenizer: str = "gpt2") -> None:
    """Write `model.safetensors` (float32, linear weights as (in, out) like OpenAI's release, no padding rows) and
    `config.json` to `directory`, which is created if missing. `tokenizer` is the name that `read_config` returns."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = model.config
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "transformer.wte.weight":
            tensor = tensor[: config.vocab_size]
        if name.endswith(TRANSPOSED):
            tensor = tensor.t()
        tensors[name] = tensor.to("cpu", torch.float32).contiguous()
    # transformers reads the metadata's "format" and refuses a file without it.
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    settings = GPT2_SETTINGS | {
        "architectures": ["GPT2LMHeadModel"],
        "tokenizer": tokenizer,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,  # for llama.cpp
        "bos_token_id": config.vocab_size - 1,  # <|endoftext|>, the last token
        "eos_token_id": config.vocab_size - 1,
    }
    settings |= {name: getattr(config, name) for name in SHAPE}
    settings |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout)
    (directory / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    shutil.copymode(directory / "config.json", directory / "model.safetensors")  # safetensors makes its file private


def read_config(directory: str | Path) -> tuple[GPTConfig, str]:
    """The shape of the model in a directory, and the name of its tokenizer ("gpt2" where the file does not say). Raises
    ValueError when config.json is damaged or asks for a computation other than GPT-2's."""
    path = Path(directory) / "config.json"
    try:
        # Unlike the other settings, the model type has no default.
        settings = {"model_type": None} | json.loads(path.read_text(encoding="utf-8"))
        shape = {name: settings[name] for name in SHAPE}
        config = GPTConfig(settings["n_positions"], **shape)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} does not describe a GPT-2: {error!r}") from error
    for name, wanted in GPT2_SETTINGS.items():
        if settings.get(name, wanted) != wanted:
            raise ValueError(f"{path} sets {name} to {settings[name]}, where GPT-2 has {wanted}")
    return config, str(settings.get("tokenizer", "gpt2"))


def load_model(directory: str | Path, dropout: float = 0.0, vocab_size: int | None = None) -> GPT:
    """The model in a directory of the hub's layout, in float32 on the CPU and in eval mode; of its vocabulary the first
    `vocab_size` tokens, if given. Raises FileNotFoundError when there is none, ValueError when it cannot be used."""
    path = Path(directory) / "model.safetensors"
    config, _ = read_config(directory)
    vocab_size = vocab_size or config.vocab_size
    if vocab_size > config.vocab_size:
        raise ValueError(f"{directory} has a vocabulary of {config.vocab_size} tokens; {vocab_size} are needed")
    state = {}
    try:
        for key, tensor in load_file(path).items():
            if key.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight")):
                continue  # the attention mask, and a second copy of the shared matrix
            name = "transformer." + key.removeprefix("transformer.")  # the hub's gpt2 has no prefix
            if not tensor.is_floating_point() or not tensor.float().isfinite().all():
                raise ValueError(f"{key} must hold only finite floating-point numbers")
            if name == "transformer.wte.weight":
                if len(tensor) != config.vocab_size:
                    raise ValueError(f"{key} has {len(tensor)} rows")
                tensor = F.pad(tensor[:vocab_size], (0, 0, 0, -vocab_size % 128))
            if name.endswith(TRANSPOSED):
                tensor = tensor.t()
            state[name] = tensor.float().contiguous()
        with torch.device("meta"):  # skips an initialization that the file would overwrite
            model = GPT(replace(config, dropout=dropout, vocab_size=vocab_size))
        model.load_state_dict(state, assign=True)
    except (SafetensorError, RuntimeError, ValueError) as error:
        problem = str(error)[:300]  # PyTorch may list every tensor
        raise ValueError(f"{path} is damaged, or does not match config.json: {problem}") from error
    return model.requires_grad_(True).eval()


# Generation


def probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """(B, V) logits to (B, K) float32 probabilities of the next token, in descending order, and their (B, K) int64
    tokens: the `top_k` most likely (all if 0), and of these the fewest that reach `top_p` (all if 1)."""
    vocab_size = logits.size(-1)
    logits = logits.float() / temperature
    logits, tokens = logits.topk(min(top_k or vocab_size, vocab_size))  # the most likely first
    probs = logits.softmax(dim=-1)
    if top_p < 1:
        before = probs.cumsum(dim=-1) - probs  # the probability of all more likely tokens
        probs = probs.masked_fill(before >= top_p, 0.0)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    return probs, tokens


def sample_token(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: Generator | None) -> Tensor:
    """(B, V) logits to (B,) int64 tokens: the most likely ones if the temperature is below 1e-6."""
    if temperature < 1e-6:
        return logits.argmax(dim=-1)
    probs, tokens = probabilities(logits, temperature, top_k, top_p)
    # argmax(p / Exponential(1)) is a draw from p, and unlike torch.multinomial it never waits for the GPU.
    noise = torch.empty_like(probs).exponential_(generator=generator)
    drawn = (probs / noise).argmax(dim=-1, keepdim=True)
    return tokens.gather(-1, drawn).squeeze(-1)


@torch.inference_mode()
def generate(
    model: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: Generator | None = None,
    stop_token: int | None = None,
) -> Iterator[Tensor]:
    """Continue (B, T) prompts: yield the next (B,) int64 tokens up to `max_new_tokens` times, with a model in eval mode
    and a `generator` on its device. When the context is full, its second half stays. A row that has drawn `stop_token`
    repeats it until every row has. Raises ValueError for an empty prompt, or one longer than the context."""
    B, T = tokens.shape
    config = model.config
    block_size = config.block_size
    if not 1 <= T <= block_size:
        raise ValueError(f"a prompt must have 1 to {block_size} tokens (the context), not {T}")
    # Room for the keys and values of a whole context, in each layer
    shape = (config.n_layer, 2, B, config.n_head, block_size, config.n_embd // config.n_head)
    cache = model.transformer.wte.weight.new_zeros(shape)
    finished = torch.zeros(B, dtype=torch.bool, device=tokens.device)
    context = tokens
    start = 0  # how many tokens of the context are cached
    for _ in range(max_new_tokens):
        x = model.hidden(context[:, start:], cache, start)
        logits = model.logits(x[:, -1])
        token = sample_token(logits, temperature, top_k, top_p, generator)
        if stop_token is not None:
            token = token.masked_fill(finished, stop_token)
            finished |= token == stop_token
        yield token
        # Without a stop token, nothing here waits for the GPU.
        if stop_token is not None and finished.all():
            return
        start = context.size(1)
        if start == block_size:  # full: keep its second half, and read that again from position 0
            context = context[:, block_size - block_size // 2 :]
            start = 0
        context = torch.cat((context, token[:, None]), dim=1)
