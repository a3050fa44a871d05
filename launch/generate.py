"""Continue prompts with a trained model: an export, a run, or a Llama, Mistral or Qwen3 folder.

One prompt streams; several print when all are done. The last line says how fast it was, how much of the cache was read,
and how sure it is.

python launch/generate.py exports/quickstart --prompt "def main(" [--max-new-tokens 256 --temperature 0.8 --top-p 0.95]
    [--decode vattention --epsilon 0.05 --delta 0.05] [--routing-every 1]
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from dash_train.command import command_parser, run_command
from dash_train.inference.decode_report import DecodeReport
from dash_train.inference.generation import generate_text, read_prompts_file
from dash_train.inference.options import add_decode_options, decoding_of
from dash_train.inference.trained import load_trained


def build_parser() -> ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument(
        "model", type=Path, help="an exported folder, a run, or a folder of a Llama, Mistral or Qwen3 model"
    )
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="the text to continue; better without a space at its end, where words begin")
    prompt.add_argument("--prompts-file", type=Path, help='a file of prompts, one a line; .jsonl: of {"prompt": ...}')
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, help="most tokens to add to a prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="temperature of the samples; 0 takes the likeliest token (default: %(default)s)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="sample among the likeliest tokens that together have this probability (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default: %(default)s)")
    add_decode_options(parser)
    return parser


def main(args: Namespace) -> None:
    trained, report = load_trained(args.model), DecodeReport()
    prompts = [args.prompt] if args.prompts_file is None else read_prompts_file(args.prompts_file)
    pieces = generate_text(
        trained.model,
        trained.tokenizer,
        prompts,
        eos_ids=trained.eos_ids,
        trained_seq=trained.seq,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        decoding=decoding_of(args, trained.model.config),
        piece_size=args.piece_size,
        report=report,
    )
    if len(prompts) == 1:
        print(prompts[0], end="", flush=True)
        for _, text in pieces:
            print(text, end="", flush=True)
        print()
    else:
        texts = list(prompts)
        for row, text in pieces:
            texts[row] += text
        for row, text in enumerate(texts):
            print(f"[{row}] {text}")
    print(report)


if __name__ == "__main__":
    run_command(main, build_parser())
