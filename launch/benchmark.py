"""Time DashAttention against full attention on one GPU, on inputs of a wanted density and union factor.

python launch/benchmark.py attention --seq 32768 --heads 32 --kv-heads 2 --density 0.25 --union 1.12
    [--backward] [--json row.json]
"""

import json
from argparse import Namespace
from pathlib import Path

from dash_train.benchmark import AttentionCase, run, run_backward
from dash_train.command import command_parser, run_command

FIELDS = ("seq", "batch", "heads", "kv_heads", "head_dim", "chunk_size", "density", "union")


def main(args: Namespace) -> None:
    case = AttentionCase(**{name: getattr(args, name) for name in FIELDS})
    row = run_backward(case) if args.backward else run(case)
    for name, value in row.items():
        print(f"{name:28}{value:.3f}" if isinstance(value, float) else f"{name:28}{value}")
    if args.json:
        args.json.write_text(json.dumps({"arguments": {name: getattr(args, name) for name in FIELDS}, **row}, indent=2))


if __name__ == "__main__":
    parser = command_parser(__doc__)
    parser.add_argument("what", choices=["attention"])
    parser.add_argument("--seq", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--chunk-size", type=int, default=64)
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--union", type=float, help="wanted union factor (default: queries without any locality)")
    parser.add_argument("--backward", action="store_true", help="time forward and backward pass together")
    parser.add_argument("--json", type=Path, help="also write the row to this file")
    run_command(main, parser)
