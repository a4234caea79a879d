"""
GPT-2 as a PyTorch module, its weights file, and text generation with a KV cache.

    model = load_model("out/step_019073")
    for tokens in generate(model, prompt, 100): ...   # (B,) new tokens at a time

After "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019), with the parameter names of OpenAI's
release. A model is a directory in the layout that the Hugging Face hub uses for GPT-2, `model.safetensors` and
`config.json`: `transformers.GPT2LMHeadModel.from_pretrained` opens ours, and `load_model` opens theirs.
"""

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

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
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")


MODEL_SIZES = {
    "gpt2": GPTConfig(n_layer=12, n_head=12, n_embd=768),  # 124M
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),  # 1558M
    "gpt2-tiny": GPTConfig(n_layer=2, n_head=4, n_embd=256),  # for a CPU; not one of OpenAI's
}

LAYER_NORM_EPS = 1e-5
KV = tuple[Tensor, Tensor]  # keys and values, (B, n_head, positions, head size) each
KVCache = list[KV]  # of each layer


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)  # defined below; it makes generation on a CPU faster


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)  # query, key and value of all heads in one product
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, cache: KV | None = None, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))
        if cache is not None:  # write the new keys and values to their positions, and attend to all of the cache
            k, v = cache[0].index_copy_(2, positions, k), cache[1].index_copy_(2, positions, v)
        dropout = self.dropout if self.training else 0.0
        causal = mask is None and T > 1
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, is_causal=causal)  # (B, nh, T, hs)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.resid_dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, *cached: Any) -> Tensor:
        x = x + self.attn(self.ln_1(x), *cached)
        return x + self.mlp(self.ln_2(x))


LOSS_BY_ROWS = nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=512)


class GPT(nn.Module):
    """`model(tokens)` gives logits, `model(tokens, targets)` the mean loss alone. One matrix, `transformer.wte.weight`,
    is both the token embedding and the output projection. It has a multiple of 128 rows, since GPUs multiply odd sizes
    slowly; the rows past `vocab_size` take no part in the softmax, have no gradient, and are not saved or counted."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        padded_vocab_size = math.ceil(config.vocab_size / 128) * 128
        self.transformer = nn.ModuleDict()
        self.transformer["wte"] = nn.Embedding(padded_vocab_size, config.n_embd)
        self.transformer["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        self.transformer["drop"] = nn.Dropout(config.dropout)
        self.transformer["h"] = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.transformer["ln_f"] = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        """Normal(0, 0.02). Each block adds two projections to the residual stream; those are scaled by
        1 / sqrt(2 * n_layer), so that its variance does not grow with depth (section 2.3 of the paper)."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, Block):  # reached after the linear layers inside it
            for projection in (module.attn.c_proj, module.mlp.c_proj):
                nn.init.normal_(projection.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def hidden(
        self, tokens: Tensor, cache: KVCache | None = None, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """(B, T) tokens to (B, T, C), after the final LayerNorm. Raises ValueError when T exceeds block_size. With a
        `cache`, keys and values are written at `positions` (T,), int64, and a token attends to the entries where `mask`
        (T, cache length) is true; without a mask, T is the length of the cache (prefill) or 1 (decode)."""
        T, block_size = tokens.size(1), self.config.block_size
        if block_size < T:
            raise ValueError(f"{T} tokens are more than the model's context of {block_size}")
        position = self.transformer.wpe.weight[:T] if positions is None else self.transformer.wpe(positions)
        x = self.transformer.drop(self.transformer.wte(tokens) + position)  # (B, T, C)
        for i, block in enumerate(self.transformer.h):
            x = block(x) if cache is None else block(x, cache[i], positions, mask)
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
        weight, device = self.transformer.wte.weight, x.device.type
        bias = torch.zeros(len(weight), device=x.device)
        bias[self.config.vocab_size :] = -math.inf  # keeps the padding rows out of the softmax
        # A micro-batch's logits would be the largest tensor of all; by rows, only 512 tokens' logits exist at a time.
        # Compiled, the plain form is fused and as good; in half precision, rows would round the loss itself.
        plain = device != "cpu" or torch.compiler.is_compiling() or torch.is_autocast_enabled(device)
        options = None if plain else LOSS_BY_ROWS
        return F.linear_cross_entropy(
            x.flatten(0, 1), weight, targets.flatten(), linear_bias=bias, ignore_index=-1, options=options
        )

    def score(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """(B, T) tokens and int64 targets (-1: not scored) -> (2, B) float32: per row, the summed loss in nats and how
        many of the targets were the most likely token."""
        scored, weight, vocab_size = targets >= 0, self.transformer.wte.weight, self.config.vocab_size
        # Subtracting the mean does not change the softmax, and smaller logits lose less in bfloat16.
        logits = F.linear(self.hidden(tokens)[scored], weight - weight[:vocab_size].mean(dim=0))
        logits = logits[:, :vocab_size].float()  # (targets scored, vocab_size)
        scores = torch.zeros(2, *targets.shape, device=tokens.device)
        scores[0, scored] = F.cross_entropy(logits, targets[scored], reduction="none")
        scores[1, scored] = (logits.argmax(dim=1) == targets[scored]).float()
        return scores.sum(dim=2)


@torch.no_grad()
def center_logits(model: GPT) -> GPT:
    """Move the mean token embedding to the position embeddings, before a cast to bfloat16: the sum of both is the same,
    and the logits of OpenAI's weights, near -100, are then near 0, where they are not rounded to steps of 0.5."""
    token, position = model.transformer.wte.weight, model.transformer.wpe.weight
    mean = token[: model.config.vocab_size].mean(dim=0)
    token[: model.config.vocab_size] -= mean
    position += mean
    return model


@contextmanager
def evaluation_mode(model: GPT) -> Iterator[None]:
    """Evaluation mode, without gradients, and without cuDNN's attention, which re-plans for every shape."""
    model.eval()
    torch.backends.cuda.enable_cudnn_sdp(False)
    with torch.no_grad():
        yield
    model.train()
    torch.backends.cuda.enable_cudnn_sdp(True)


def parameter_count(model: GPT) -> int:
    """Parameters that are trained and saved: the shared matrix once, its padding rows not at all."""
    padding = model.transformer.wte.num_embeddings - model.config.vocab_size
    return sum(p.numel() for p in model.parameters()) - padding * model.config.n_embd


def flops_per_token(config: GPTConfig) -> float:
    """Floating-point operations of a training step per token, as appendix B of PaLM counts them (Chowdhery et al.,
    2022): 6 per weight of a matrix product, and attention over the full context, the masked half included."""
    weights = 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd
    return 6 * weights + 12 * config.n_layer * config.n_embd * config.block_size


def configure_optimizer(
    model: GPT, learning_rate: float, weight_decay: float, betas: tuple[float, float], zero: bool = False
) -> torch.optim.Optimizer:
    """Fused AdamW, with weight decay on the matrices and none on biases and LayerNorms; with `zero`, its state is
    sharded across the ranks (ZeRO stage 1, Rajbhandari et al., 2020)."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    settings = {"lr": learning_rate, "betas": betas, "eps": 1e-8, "fused": True}
    if not zero:
        return torch.optim.AdamW(groups, **settings)
    from torch.distributed.optim import ZeroRedundancyOptimizer  # slow to import

    return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **settings)


# Devices

DEVICES = ("auto", "cuda", "mps", "cpu")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def choose_device(name: str) -> torch.device:
    """The device for one of DEVICES; "auto" takes the first available. Raises ValueError if it is not available."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(kind for kind in available if available[kind]) if name == "auto" else name
    if not available[kind]:
        raise ValueError(f"--device {kind} is not available here, or not in this build of PyTorch; use --device auto")
    return torch.device(kind)


def choose_dtype(name: str, device: torch.device, training: bool = False) -> torch.dtype:
    """One of DTYPES for matrix products. "auto" is bfloat16 on CUDA (float16 on cards too old for it) and, in training,
    on x86 CPUs with instructions for it; else float32. Raises ValueError for float16 anywhere but on CUDA."""
    if name == "float16" and device.type != "cuda":
        raise ValueError("--dtype float16 needs a CUDA device; choose float32 or bfloat16")
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    features = torch.cpu.get_capabilities() if training and device.type == "cpu" else {}
    return torch.bfloat16 if features.get("avx512_bf16") or features.get("amx_bf16") else torch.float32


# Peak TFLOP/s by CUDA's name for the card, from the data sheets: bfloat16 and float16 (dense), float32
PEAK_TFLOPS = {
    "NVIDIA A100-SXM4-40GB": (312, 19.5), "NVIDIA A100-SXM4-80GB": (312, 19.5), "NVIDIA A100-PCIE-40GB": (312, 19.5),
    "NVIDIA H100 80GB HBM3": (989, 67), "NVIDIA H100 PCIe": (756, 51), "NVIDIA H200": (989, 67),
    "NVIDIA B200": (2250, 75), "NVIDIA L40S": (362, 91.6), "NVIDIA GeForce RTX 4090": (165.2, 82.6),
}  # fmt: skip


# A model is a directory

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # (in, out) in files
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


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, `step_NNNNNN`, oldest first."""
    found = [path for path in out.glob("step_*") if path.name[5:].isdecimal()]  # one ending in .tmp is incomplete
    return sorted(found, key=lambda path: int(path.name[5:]))


def newest_checkpoint(out: Path, intact: Callable[[Path], bool]) -> Path | None:
    """A run's newest `intact` checkpoint, or None."""
    return next(filter(intact, reversed(checkpoints(out))), None)


def newest_run(directory: Path) -> Path:
    """The run written to most recently: `directory` itself or one directly below it; `directory` if there is none."""
    runs = [run for run in (directory, *directory.glob("*/")) if checkpoints(run)]
    return max(runs, key=lambda run: run.stat().st_mtime, default=directory)


def save_model(model: GPT, directory: str | Path, tokenizer: str = "gpt2") -> None:
    """Write `model.safetensors` (float32, linear weights as (in, out) like OpenAI's release, no padding rows) and
    `config.json` to `directory`, which is created if missing. `tokenizer` is the name that `read_config` returns."""
    directory, config, tensors = Path(directory), model.config, {}
    directory.mkdir(parents=True, exist_ok=True)
    for name, tensor in model.state_dict().items():
        if name == "transformer.wte.weight":
            tensor = tensor[: config.vocab_size]
        tensor = tensor.t() if name.endswith(TRANSPOSED) else tensor
        tensors[name] = tensor.to("cpu", torch.float32).contiguous()
    described = GPT2_SETTINGS | {
        "architectures": ["GPT2LMHeadModel"],
        "tokenizer": tokenizer,
        **dict.fromkeys(("n_positions", "n_ctx"), config.block_size),  # the second is for llama.cpp
        **{name: getattr(config, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")},
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), config.vocab_size - 1),  # <|endoftext|>, the last token
    }
    # transformers reads the metadata's "format" and refuses a file without it.
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    shutil.copymode(directory / "config.json", directory / "model.safetensors")  # safetensors makes its file private


def read_config(directory: str | Path) -> tuple[GPTConfig, str]:
    """The shape of the model in a directory, and the name of its tokenizer ("gpt2" where the file does not say). Raises
    ValueError when config.json is damaged or asks for a computation other than GPT-2's."""
    path = Path(directory) / "config.json"
    try:
        settings = {"model_type": None} | json.loads(path.read_text(encoding="utf-8"))
        sizes = [settings[name] for name in ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")]
        if not all(type(size) is int and 1 <= size < 2**24 for size in sizes) or settings["n_layer"] > 1000:
            raise ValueError(f"its sizes are {sizes}")
        config = GPTConfig(*sizes)  # the same five, in this order
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} does not describe a GPT-2: {error!r}") from error
    for name, wanted in GPT2_SETTINGS.items():
        if settings.get(name, wanted) != wanted:
            raise ValueError(f"{path} sets {name} to {settings[name]}, where GPT-2 has {wanted}")
    return config, str(settings.get("tokenizer", "gpt2"))


def load_model(directory: str | Path, dropout: float = 0.0) -> GPT:
    """The model in a directory of the hub's layout, in float32 on the CPU and in eval mode. Raises FileNotFoundError
    when there is none, ValueError when the files are damaged or not a GPT-2's."""
    path, state = Path(directory) / "model.safetensors", {}
    config, _ = read_config(directory)
    try:
        for key, tensor in load_file(path).items():
            if key.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight")):
                continue  # the attention mask, and a second copy of the shared matrix
            name = "transformer." + key.removeprefix("transformer.")  # the hub's gpt2 has no prefix
            if name in state or not tensor.is_floating_point() or not (values := tensor.float()).isfinite().all():
                raise ValueError(f"{key} must occur exactly once and hold only finite floating-point numbers")
            if name == "transformer.wte.weight":
                values = F.pad(values, (0, 0, 0, -config.vocab_size % 128))
            state[name] = (values.t() if name.endswith(TRANSPOSED) else values).contiguous()
        with torch.device("meta"):  # skips an initialization that the file would overwrite
            model = GPT(replace(config, dropout=dropout))
        model.load_state_dict(state, assign=True)
    except (SafetensorError, RuntimeError, ValueError) as error:
        problem = " ".join(str(error).split())[:300]  # PyTorch may list every tensor
        raise ValueError(f"{path} is damaged, or does not match config.json: {problem}") from error
    return model.requires_grad_(True).eval()


# Generation


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, (..., in) to (..., out), faster for the few rows of CPU generation: W x^T, with a single row
    repeated, since BLAS may run a matrix-vector product on one thread."""
    rows = x.numel() // x.size(-1)
    if torch.is_grad_enabled() or rows > 8 or x.device.type != "cpu" or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    columns = x.reshape(rows, -1).repeat(2 if rows == 1 else 1, 1).t()  # (in, columns)
    y = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)  # (out, columns)
    return y[:, :rows].t().contiguous().view(*x.shape[:-1], -1)


def probabilities(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> tuple[Tensor, Tensor]:
    """(B, V) logits to (B, K) float32 probabilities of the next token, in descending order, and their (B, K) int64
    tokens: the `top_k` most likely, and of these the fewest that reach `top_p`. None: no limit."""
    logits, vocab_size = logits.float() / temperature, logits.size(-1)
    logits, tokens = logits.topk(min(top_k or vocab_size, vocab_size))  # the most likely first
    probs = logits.softmax(dim=-1)
    if top_p is not None and top_p < 1:
        before = probs.cumsum(dim=-1) - probs  # the probability of all more likely tokens
        probs = probs.masked_fill(before >= top_p, 0.0)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    return probs, tokens


def sample_token(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """(B, V) logits to (B,) int64 tokens; below a temperature of 1e-6 the most likely one."""
    if temperature < 1e-6:
        return logits.argmax(dim=-1)
    probs, tokens = probabilities(logits, temperature, top_k, top_p)
    # argmax(p / Exponential(1)) is a draw from p, and unlike torch.multinomial it never waits for the GPU.
    drawn = (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(dim=-1, keepdim=True)
    return tokens.gather(-1, drawn).squeeze(-1)


def next_logits(model: GPT, tokens: Tensor, positions: Tensor, cache: KVCache, mask: Tensor | None = None) -> Tensor:
    """The logits (B, V) of the token after (B, T) tokens at `positions` (T,), given the cached ones before them."""
    return model.logits(model.hidden(tokens, cache, positions, mask)[:, -1])


@torch.inference_mode()
def generate(
    model: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    stop_token: int | None = None,
    compiled: bool = False,
) -> Iterator[Tensor]:
    """Continue prompts of equal length: from (B, T) tokens, yield the next (B,) int64 up to `max_new_tokens` times.
    When the context is full, its second half becomes the new context. A row that has drawn `stop_token` repeats it, and
    generation ends when every row has. `generator` must be on the model's device; `compiled` compiles the decoding
    step. The model should be in eval mode. Raises ValueError for an empty prompt, or one longer than the context."""
    config, weight = model.config, model.transformer.wte.weight
    if not 1 <= tokens.size(1) <= config.block_size:
        raise ValueError(f"a prompt must have 1 to {config.block_size} tokens (the context), not {tokens.size(1)}")
    shape = (len(tokens), config.n_head, config.block_size, config.n_embd // config.n_head)
    cache = [(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in range(config.n_layer)]
    positions = torch.arange(config.block_size, device=tokens.device)
    decode = next_logits
    if compiled:
        decode = torch.compile(next_logits, mode="reduce-overhead" if tokens.device.type == "cuda" else None)
        for stored in itertools.chain(*cache):
            torch._dynamo.mark_static_address(stored)  # so that CUDA graphs may write to it

    window, cached, token = tokens, False, tokens[:, -1]  # the context, and whether all but its last token are cached
    finished = torch.zeros_like(token, dtype=torch.bool)
    for _ in range(max_new_tokens):
        T = window.size(1)
        filled = [(k[:, :, :T], v[:, :, :T]) for k, v in cache]
        if not cached:  # prefill: read the whole window
            logits = next_logits(model, window, positions[:T], filled)
        elif compiled:  # decode the newest token; all sizes stay the same
            logits = decode(model, token[:, None], positions[T - 1 : T], cache, (positions < T)[None])
        else:
            logits = decode(model, token[:, None], positions[T - 1 : T], filled)
        token = sample_token(logits, temperature, top_k, top_p, generator)
        if stop_token is not None:
            token = token.masked_fill(finished, stop_token)
            finished |= token == stop_token
        yield token
        if stop_token is not None and finished.all():
            return
        cached = config.block_size > T
        window = torch.cat((window if cached else window[:, T - T // 2 :], token[:, None]), dim=1)
