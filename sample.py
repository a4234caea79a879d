"""
Continue a prompt with a trained GPT-2; the text appears as it is generated.

    python sample.py                                                      # the newest checkpoint under out/
    python sample.py --model gpt2 --prompt "Hello, I'm a language model," # OpenAI's weights

Only the text goes to standard output; the model's name and its speed go to standard error.
"""

import argparse
import codecs
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

try:
    import tiktoken
    import torch

    import model as gpt
    import prepare_data as prep
except ImportError as error:
    sys.exit(f"sample.py: error: {error}; pip install -r requirements.txt")


def stream_decoder(tokenizer: tiktoken.Encoding) -> Callable[[int], str]:
    """Return a function that turns tokens into text one by one: a character spread over several tokens appears with the
    last of them, and <|endoftext|> is not shown."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def decode(token: int) -> str:
        end = token == tokenizer.eot_token
        return decoder.decode(b"" if end else tokenizer.decode_single_token_bytes(token), final=end)

    return decode


def read_prompts(args: argparse.Namespace) -> Iterator[str]:
    """The prompt of the command line or of standard input; with --interactive, each line of that."""
    if not args.interactive:
        yield sys.stdin.read().removesuffix("\n") if args.prompt == "-" else args.prompt
        return
    with suppress(ImportError):  # some builds of Python lack it
        import readline  # noqa: F401  (which gives input() arrow keys and a history)
    with suppress(EOFError):
        while True:
            yield input("> " if sys.stdout.isatty() else "")


def sample(args: argparse.Namespace) -> None:
    run = Path(args.model or gpt.newest_run(Path("out")))
    if not args.model and not gpt.checkpoints(run):
        raise FileNotFoundError(f"no checkpoint in {run.absolute()}; train a model first, or pass --model gpt2")
    directory = gpt.newest_checkpoint(run, prep.is_intact) or prep.model_directory(run)
    device, (config, name) = gpt.choose_device(args.device), gpt.read_config(directory)
    tokenizer = prep.get_tokenizer(name)
    if tokenizer.n_vocab != config.vocab_size:
        raise ValueError(f"{directory}: vocab_size is {config.vocab_size}, but {name} has {tokenizer.n_vocab} tokens")
    prep.status(f"reading {directory}")
    model = gpt.center_logits(gpt.load_model(directory)).to(device, gpt.choose_dtype(args.dtype, device))
    prep.say(f"{directory}: {gpt.parameter_count(model):,} parameters, {device}", sys.stderr)
    generator = torch.Generator(device).manual_seed(args.seed)
    for prompt in read_prompts(args):
        prompt.encode()  # raises ValueError for what was not valid UTF-8
        tokens = tokenizer.encode(prompt, allowed_special="all") or [tokenizer.eot_token]  # none: a new text
        if args.interactive and len(tokens) > config.block_size:
            print(f"that is {len(tokens)} tokens; use at most {config.block_size}", file=sys.stderr)
            continue
        prompts = torch.tensor([tokens] * args.num_samples, device=device)
        how = {"temperature": args.temperature, "top_k": args.top_k or None, "top_p": args.top_p}
        how |= {"generator": generator, "stop_token": tokenizer.eot_token, "compiled": args.compile}
        # The first sample is printed while it is generated; the others, each below a rule, at the end.
        decode, drawn, began = stream_decoder(tokenizer), [], time.perf_counter()
        for step in gpt.generate(model, prompts, args.max_new_tokens, **how):
            drawn.append(step.tolist())
            print(prompt * (len(drawn) == 1) + decode(drawn[-1][0]), end="", flush=True)
        print(decode(tokenizer.eot_token))
        for other in list(zip(*drawn, strict=True))[1:]:
            print("-" * 80, prompt + "".join(map(decode, (*other, tokenizer.eot_token))), sep="\n", flush=True)
        count = len(drawn) * args.num_samples
        print(f"{count} tokens, {count / (time.perf_counter() - began):.1f} tokens/s", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, allow_abbrev=False, description=__doc__.splitlines()[1])
    add, number = parser.add_argument, prep.number
    add("--model", help="a checkpoint, a run, or gpt2, gpt2-medium, ... (default: the newest under out/)")
    add("--prompt", default="", help="text to continue; - reads standard input (default: none)")
    add("--interactive", action="store_true", help="read prompts from standard input, one per line")
    add("--num-samples", type=number(int, 1, 4096), default=1, help="samples per prompt (default: 1)")
    add("--max-new-tokens", type=number(int, 1, 10**6), default=500, help="per sample (default: 500)")
    add("--temperature", type=number(float, 0, 10**6), default=0.8, help="0: the most likely token (default: 0.8)")
    add("--top-k", type=number(int, 0, 10**6), default=50, help="keep the k most likely tokens; 0: all (default: 50)")
    add("--top-p", type=number(float, 1e-6, 1), default=1.0, help="keep the fewest tokens that sum to p (default: 1)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=1337, help="seed of the random draws (default: 1337)")
    add("--device", default="auto", choices=gpt.DEVICES, help="device to run on (default: auto)")
    add("--dtype", default="auto", choices=gpt.DTYPES, help="precision of the model (default: auto)")
    add("--compile", action="store_true", help="torch.compile decoding; worthwhile for long texts")
    args = parser.parse_args(argv)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it re-plans for every length
    with prep.one_line_errors("sample.py", "use fewer --num-samples, or a smaller --model"):
        sample(args)


if __name__ == "__main__":
    main()
