"""
Continue a prompt with a trained GPT-2; the text appears as it is generated.

    python sample.py                                                      # the newest checkpoint under out/
    python sample.py --model gpt2 --prompt "Hello, I'm a language model," # OpenAI's weights

Only the text goes to standard output; the model's name and its speed go to standard error.
"""

import codecs
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

try:
    import tiktoken
    import torch

    import model as gpt
    import prepare_data as prep
    from prepare_data import option
except ImportError as error:
    sys.exit(f"sample.py: error: {error}; pip install -r requirements.txt")
except KeyboardInterrupt:
    sys.exit(130)


@dataclass(frozen=True)
class Options:
    """The options of sample.py."""

    model: str = option("out", "a checkpoint, a run, a directory of runs (the newest), or gpt2, gpt2-medium, ...")
    prompt: str = option("", "text to continue; - reads standard input (default: none)")
    interactive: bool = option(False, "read prompts from standard input, one per line")
    num_samples: int = option(1, "samples per prompt", 1, 4096)
    max_new_tokens: int = option(500, "tokens per sample", 1, 10**6)
    temperature: float = option(0.8, "0 is greedy, higher is wilder", 0, 10**6)
    top_k: int = option(50, "keep the k most likely tokens; 0: all", 0, 10**6)
    top_p: float = option(1.0, "keep the fewest tokens that sum to p", 1e-6, 1)
    seed: int = option(1337, "seed of the random draws", 0, 2**63 - 1)
    device: str = option("auto", "device to run on", choices=gpt.DEVICES)
    dtype: str = option("auto", "precision of the model", choices=gpt.DTYPES)


def stream_decoder(tokenizer: tiktoken.Encoding) -> Callable:
    """Return a function that turns tokens into text one by one: a character spread over several tokens appears with the
    last of them, and <|endoftext|> is not shown."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def decode(token: int) -> str:
        if token == tokenizer.eot_token:
            return decoder.decode(b"", final=True)
        return decoder.decode(tokenizer.decode_single_token_bytes(token))

    return decode


def read_prompts(args: Options) -> Iterator:
    """The prompt, from the command line or standard input; with --interactive, each line of standard input."""
    if args.interactive or args.prompt == "-":
        # Skip a byte-order mark, read every line ending as \n, and let no bad byte end an interactive session.
        errors = "replace" if args.interactive else "strict"
        sys.stdin.reconfigure(encoding="utf-8-sig", errors=errors, newline=None)
    if args.interactive:
        with suppress(ImportError):  # some builds of Python lack it
            import readline  # noqa: F401  (which gives input() arrow keys and a history)
        with suppress(EOFError):
            while True:
                yield input("> " if sys.stdout.isatty() else "")
    elif args.prompt == "-":
        yield sys.stdin.read().removesuffix("\n")
    else:
        yield args.prompt


def encode_prompt(prompt: str, tokenizer: tiktoken.Encoding, block_size: int) -> list[int]:
    """The last `block_size` tokens of a prompt. <|endoftext|> in it becomes that token, and so does an empty prompt."""
    tokens = prep.tokenize(prompt.split(prep.END_OF_TEXT), tokenizer).tolist()
    tokens = tokens[1:] or tokens  # tokenize() puts <|endoftext|> before each part
    if len(tokens) > block_size:
        prep.say(f"the prompt has {len(tokens):,} tokens; the last {block_size:,} are used", sys.stderr)
    return tokens[-block_size:]


def print_samples(
    model: gpt.GPT, tokenizer: tiktoken.Encoding, prompt: str, args: Options, generator: torch.Generator
) -> None:
    """Print the first sample as it is generated, then the others, each below a line of dashes."""
    prompt_tokens = encode_prompt(prompt, tokenizer, model.config.block_size)
    began = time.perf_counter()
    prompts = torch.tensor([prompt_tokens] * args.num_samples, device=generator.device)
    choice = (args.temperature, args.top_k, args.top_p, generator)
    generated = gpt.generate(model, prompts, args.max_new_tokens, *choice, stop_token=tokenizer.eot_token)
    columns = []  # per step, the next token of every sample
    decode = stream_decoder(tokenizer)
    print(prompt, end="", flush=True)
    for tokens in generated:
        columns.append(tokens.tolist())
        print(decode(columns[-1][0]), end="", flush=True)
    print(decode(tokenizer.eot_token))
    seconds = time.perf_counter() - began
    _, *others = zip(*columns, strict=True)
    for other in others:
        text = "".join(map(decode, (*other, tokenizer.eot_token)))
        print("-" * 80, prompt + text, sep="\n")
    count = len(columns) * args.num_samples
    print(f"{count} tokens, {count / seconds:.1f} tokens/s", file=sys.stderr)


def sample(args: Options) -> None:
    directory = prep.model_directory(args.model)
    device = gpt.choose_device(args.device)
    _, tokenizer_name = gpt.read_config(directory)
    tokenizer = prep.get_tokenizer(tokenizer_name)
    prep.status(f"reading {directory}")
    model = gpt.load_model(directory, vocab_size=tokenizer.n_vocab)
    model = gpt.center_logits(model).to(device, gpt.choose_dtype(args.dtype, device))
    prep.say(f"{directory}: {gpt.parameter_count(model):,} parameters, {device}", sys.stderr)
    generator = torch.Generator(device).manual_seed(args.seed)
    try:
        with gpt.evaluation_mode(model):
            for prompt in read_prompts(args):
                print_samples(model, tokenizer, prompt, args, generator)
    except UnicodeError as error:
        raise ValueError("the prompt is not UTF-8") from error


def main(argv: list | None = None) -> None:
    parser = prep.new_parser(__doc__, Options)
    args = Options(**vars(parser.parse_args(argv)))
    with prep.one_line_errors("sample.py", "use fewer --num-samples, or a smaller --model"):
        sample(args)


if __name__ == "__main__":
    main()
