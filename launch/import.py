# ruff: noqa: N999 (the command's name is a keyword)
"""Import a Hugging Face folder: a Llama, or a relative of it, or a checkpoint of DashAttention's authors.

Llama, Mistral, Qwen2, Qwen3, SmolLM3, Granite and MiniCPM (docs/inference.md). All that config.json and the weights say
is checked, and nothing in the folder is executed. What is written can be given to every other command, as an export can
(`init.from` reads the folder as well as it is).

python launch/import.py FOLDER exports/llama [--max-seq 4096]
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from dash_train.command import command_parser, run_command
from dash_train.huggingface.export import import_folder


def build_parser() -> ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument("folder", type=Path, help="config.json, safetensors files and a tokenizer")
    parser.add_argument("out", type=Path, help="the folder to write; it must be new or empty")
    parser.add_argument(
        "--max-seq",
        type=int,
        help="tokens of the longest row that the model will see, where a sliding window allows no more (default: by "
        "its config.json)",
    )
    return parser


def main(args: Namespace) -> None:
    import_folder(args.folder, args.out, max_seq=args.max_seq)
    print(f"{args.out}: imported from {args.folder}")


if __name__ == "__main__":
    run_command(main, build_parser())
