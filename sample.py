"""
Continue a prompt with a trained GPT-2; the text streams to standard output as it is made.

    python sample.py                                                    # the newest checkpoint under out/
    python sample.py --model gpt2 --prompt "Hello, I'm a language model," # OpenAI's weights
    echo "Once upon a time" | python sample.py --prompt -
    python sample.py --interactive

Standard output has the text and nothing else; the rate comes last, on standard error.
"""

import argparse
import codecs
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import tiktoken
import torch

from model import DEVICES, DTYPES, choose_device, choose_dtype, generate, load_model, model_tokenizer
from prepare_data import get_tokenizer


def newest_checkpoint(out: Path) -> Path:
    """The checkpoint written last in `out` or in a directory in it. Raises FileNotFoundError when there is none."""
    found = [path for path in (*out.glob("step_*"), *out.glob("*/step_*")) if (path / "config.json").exists()]
    found = [path for path in found if path.name[5:].isdigit()]  # not one that is still being written
    if not found:
        raise FileNotFoundError(f"there is no checkpoint under {out}/; train one with train.py, or give --model gpt2")
    return max(found, key=lambda path: (path.stat().st_mtime, path.name))


def make_decoder(tokenizer: tiktoken.Encoding) -> Callable[[int], str]:
    """A function from one token after the other to the text that each completes: a character whose bytes are spread
    over several tokens comes with the last of them."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def decode(token: int) -> str:
        if token == tokenizer.eot_token:
            return decoder.decode(b"", final=True)
        return decoder.decode(tokenizer.decode_single_token_bytes(token))

    return decode


def on_host(steps: Iterator[torch.Tensor], device: torch.device) -> Iterator[list[int]]:
    """The tokens of each step as numbers; on CUDA, one step behind, so that the device need not wait for the host."""
    if device.type != "cuda":
        yield from (tokens.tolist() for tokens in steps)
        return
    before = None
    for tokens in steps:
        copy, copied = tokens.to("cpu", non_blocking=True), torch.cuda.Event()
        copied.record()
        if before is not None:
            before[1].synchronize()
            yield before[0].tolist()
        before = copy, copied
    torch.cuda.synchronize()
    yield before[0].tolist()


def write_samples(steps: Iterator[list[int]], prompt: str, tokenizer: tiktoken.Encoding, num_samples: int) -> int:
    """Print the first sample of a batch while it is generated, and the others, each behind a rule, when it is done.
    Returns the number of steps."""
    decoders = [make_decoder(tokenizer) for _ in range(num_samples)]
    texts, count = [""] * num_samples, 0
    print(prompt, end="", flush=True)
    for tokens in steps:
        count += 1
        pieces = [decode(token) for decode, token in zip(decoders, tokens, strict=True)]
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        print(pieces[0], end="", flush=True)
    print(decoders[0](tokenizer.eot_token))
    for text, decode in zip(texts[1:], decoders[1:], strict=True):
        print(f"{'-' * 80}\n{prompt}{text}{decode(tokenizer.eot_token)}", flush=True)
    return count


def read_prompts(args: argparse.Namespace) -> Iterator[str]:
    """The prompt of the command line or of standard input; with --interactive, each line of that."""
    if not args.interactive:
        yield sys.stdin.read().removesuffix("\n") if args.prompt == "-" else args.prompt
        return
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        if not (line := sys.stdin.readline()):
            return
        yield line.removesuffix("\n")


def sample(args: argparse.Namespace) -> None:
    source = args.model or newest_checkpoint(Path("out"))
    device = choose_device(args.device)
    tokenizer = get_tokenizer(model_tokenizer(source))
    model = load_model(source).to(device, choose_dtype(args.dtype, device))
    generator = torch.Generator(device).manual_seed(args.seed)
    for prompt in read_prompts(args):
        tokens = tokenizer.encode_ordinary(prompt) or [tokenizer.eot_token]  # without a prompt, a new document
        if len(tokens) > model.config.block_size:
            problem = f"the prompt has {len(tokens)} tokens, more than the model's context of {model.config.block_size}"
            if not args.interactive:
                raise ValueError(problem)
            print(problem, file=sys.stderr)
            continue
        began = time.perf_counter()
        steps = generate(
            model,
            torch.tensor([tokens] * args.num_samples, device=device),
            args.max_new_tokens,
            args.temperature,
            args.top_k or None,
            args.top_p,
            generator,
            stop_token=tokenizer.eot_token,
            fixed=device.type == "cuda",
            compiled=args.compile,
        )
        count = write_samples(on_host(steps, device), prompt, tokenizer, args.num_samples) * args.num_samples
        seconds = time.perf_counter() - began
        print(f"{count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description="Generate text with a trained GPT-2.")
    parser.add_argument("--model", help="a checkpoint, or gpt2, gpt2-medium, ... (default: the newest under out/)")
    parser.add_argument("--prompt", default="", help="text to go on from; - reads standard input (default: none)")
    parser.add_argument("--interactive", action="store_true", help="ask for prompts, a line each, until end of input")
    parser.add_argument("--num-samples", type=int, default=1, help="(default: 1)")
    parser.add_argument("--max-new-tokens", type=int, default=500, help="per sample (default: 500)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    parser.add_argument("--top-k", type=int, default=50, help="draw from the k likeliest tokens, 0: all (default: 50)")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest that hold p (default: 1)")
    parser.add_argument("--seed", type=int, default=1337, help="the same seed gives the same text (default: 1337)")
    parser.add_argument("--device", default="auto", choices=DEVICES, help="(default: auto)")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="(default: auto)")
    parser.add_argument("--compile", action="store_true", help="compile the pass that makes a token: for long texts")
    args = parser.parse_args(argv)
    if (
        args.num_samples < 1
        or args.max_new_tokens < 1
        or args.temperature < 0
        or args.top_k < 0
        or not 0 < args.top_p <= 1
    ):
        parser.error(
            "--num-samples and --max-new-tokens must be at least 1, --temperature and --top-k at least 0, "
            "and --top-p above 0 and at most 1"
        )
    try:
        sample(args)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
