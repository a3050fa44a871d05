"""Continue prompts with an exported model, or any Llama or Qwen3 folder. One streams; several print when all are done.

python launch/generate.py exports/quickstart --prompt "def main(" [--max-new-tokens 256 --temperature 0.8 --top-p 0.95]
"""

from argparse import Namespace
from pathlib import Path

import torch

from dash_train.command import command_parser, run_command
from dash_train.conversion import load_model
from dash_train.data.tokenizer import load_tokenizer
from dash_train.generation import generate_text


def main(args: Namespace) -> None:
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    prompts = [args.prompt] if args.prompts_file is None else args.prompts_file.read_text().splitlines()
    pieces = generate_text(
        load_model(args.model, dtype, device),
        load_tokenizer(args.model),
        prompts,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
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


if __name__ == "__main__":
    parser = command_parser(__doc__)
    parser.add_argument(
        "model", type=Path, help="an exported folder, or a Hugging Face folder of a Llama or Qwen3 model"
    )
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="the text to continue; better without a space at its end, where words begin")
    prompt.add_argument("--prompts-file", type=Path, help="a file of prompts, one a line")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="(default: 128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample among the likeliest (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    run_command(main, parser)
