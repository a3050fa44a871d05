"""Loss and bits per byte by position in the context, on the longest documents.

Positions fall into ranges that double in length. With `full` and `dash` a document goes through the model as a prompt,
and every token counts; with `vattention`, or with --steps, the last tokens of each range are decoded one by one after a
prompt of all that came before them, and only they count.
"""

import argparse
import math
from typing import Any

import torch
from torch import Tensor

from dash_train.errors import UserError
from dash_train.evaluation.forced import decode_along
from dash_train.evaluation.subject import Subject, summary
from dash_train.inference.decode_report import DecodeReport

STEPS = 64
FIRST_RANGE = 128

Range = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The task's options."""
    parser.add_argument(
        "--length", type=int, help="longest context, in tokens (default: the one that the model was trained on)"
    )
    parser.add_argument(
        "--documents", type=int, default=16, help="how many documents to read, the longest first (default: %(default)s)"
    )
    parser.add_argument(
        "--batch", type=int, default=4, help="documents that are decoded together (default: %(default)s)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        help=f"decode the last so many tokens of each range, in place of reading all as a prompt (vattention: {STEPS})",
    )


def run(subject: Subject, args: argparse.Namespace) -> dict[str, Any]:
    """Loss (nats per token) and bits per byte of each range, with the density and half-width they were made at."""
    length = subject.trained.seq if args.length is None else args.length
    if min(length, args.documents, args.batch) < 1 or (args.steps or 0) < 0:
        raise UserError(
            "expected --length, --documents and --batch of at least 1 and --steps of at least 0; found "
            f"{length}, {args.documents}, {args.batch}, {args.steps}"
        )
    documents = [document[: length + 1] for document in subject.documents[: args.documents]]
    steps = STEPS if args.steps is None and subject.decoding.mode == "vattention" else args.steps or 0
    ranges = _ranges(min(length, len(documents[0]) - 1))
    if steps:
        rows = [row for r in ranges if (row := _decoded(subject, documents, *r, steps, args.batch))]
    else:
        rows = _read(subject, documents, ranges)
    if not rows:
        raise UserError(f"--steps: no range of positions holds {steps} tokens to decode and one before; give fewer")
    return {"length": length, "documents": len(documents), "steps": steps, **subject.describe(), "ranges": rows}


def _ranges(length: int) -> list[tuple[int, int]]:
    """[0, 128), [128, 256), [256, 512), ... up to the length."""
    ends = [FIRST_RANGE * 2**i for i in range(32) if FIRST_RANGE * 2**i < length] + [length]
    return list(zip([0, *ends], ends, strict=False))


@torch.no_grad()
def _read(subject: Subject, documents: list[list[int]], ranges: list[tuple[int, int]]) -> list[Range]:
    """Every token's loss in one forward pass a document."""
    losses, labels, report = [], [], DecodeReport()
    for document in documents:
        cache = subject.new_cache(1, len(document))
        tokens = torch.tensor([document], device=subject.trained.device)
        outputs = subject.trained.model(tokens[:, :-1], labels=tokens[:, 1:], cache=cache)
        losses.append(outputs["token_losses"][0].cpu())
        labels.append(torch.tensor(document[1:]))
        report.count(cache)
    rows = []
    for low, high in ranges:
        parts = [(loss[low:high], label[low:high]) for loss, label in zip(losses, labels, strict=True)]
        rows.append(
            _row(subject, low, high, torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), report)
        )
    return rows


def _decoded(subject: Subject, documents: list[list[int]], low: int, high: int, steps: int, batch: int) -> Range | None:
    """The last tokens of a range, decoded; None where the range has too few."""
    start = high - steps
    long_enough = [document for document in documents if len(document) > high]
    if start < max(low, 1) or not long_enough:
        return None
    losses, labels, report = [], [], DecodeReport()
    for first in range(0, len(long_enough), batch):
        rows = long_enough[first : first + batch]
        forced = decode_along(subject, [row[:start] for row in rows], [row[start : high + 1] for row in rows], report)
        losses.append(forced.losses.flatten())
        labels.append(torch.tensor([row[start + 1 : high + 1] for row in rows]).flatten())
    return _row(subject, start, high, torch.cat(losses), torch.cat(labels), report)


def _row(subject: Subject, low: int, high: int, losses: Tensor, labels: Tensor, report: DecodeReport) -> Range:
    text_bytes = int(torch.from_numpy(subject.trained.tokenizer.token_bytes)[labels].sum())
    return {
        "from": low,
        "to": high,
        "tokens": len(losses),
        "loss": losses.mean().item(),
        "bits_per_byte": losses.sum().item() / max(text_bytes, 1) / math.log(2),
        **summary(report),
    }


def table(result: dict[str, Any]) -> Any:
    """One line a range."""
    from rich.table import Table

    read = f"last {result['steps']} tokens of each range decoded" if result["steps"] else "read as prompts"
    lines = Table(title=f"Loss by position, {result['decode']}, {result['documents']} documents, {read}")
    for name in ("positions", "tokens", "loss", "bits/byte", "density", "half-width", "fallbacks"):
        lines.add_column(name, justify="right")
    for r in result["ranges"]:
        made_at = ["" if r[name] is None else f"{r[name]:.3f}" for name in ("density", "half_width", "fallbacks")]
        lines.add_row(
            f"{r['from']}-{r['to']}", str(r["tokens"]), f"{r['loss']:.4f}", f"{r['bits_per_byte']:.4f}", *made_at
        )
    return lines


def draw(result: dict[str, Any], figure: Any) -> None:
    """Loss over position, with the density and half-width below it where there are any."""
    ranges = result["ranges"]
    panels = ["loss", "bits_per_byte"] + [n for n in ("density", "half_width") if ranges[0][n] is not None]
    for axis, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axis.plot([r["to"] for r in ranges], [r[name] for r in ranges], "o-")
        axis.set_xscale("log", base=2)
        axis.set(title=name.replace("_", " "), xlabel="position in the context")
        axis.grid(alpha=0.3)
