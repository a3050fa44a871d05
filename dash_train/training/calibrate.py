"""Settling `routing_scale: auto` on a run's first rows."""

import logging
import math
from contextlib import closing
from itertools import islice

import torch

from dash_train.data.loader import RowDataset, step_batches
from dash_train.data.mixture import Mixture
from dash_train.model.calibration import calibrate_routing_scale
from dash_train.model.transformer import LanguageModel
from dash_train.training.step import to_device

AT_ONCE = 16384  # tokens that are looked at together

logger = logging.getLogger(__name__)


def calibration_rows(seq: int) -> int:
    """How many rows of `seq` tokens `routing_scale: auto` looks at: 8 or 64K tokens, whichever is more, and 32 where
    these are at most a million tokens: with few documents in a row, density differs by factors from row to row.
    """
    return max(8, math.ceil(2**16 / seq), min(32, 2**20 // seq))


def calibrate(model: LanguageModel, rows: RowDataset | Mixture, device: torch.device) -> None:
    """Find and freeze the scales. Every rank looks at the run's first rows, and so finds the same ones."""
    at_once = max(1, AT_ONCE // rows.seq)
    count = math.ceil(calibration_rows(rows.seq) / at_once)
    batches = step_batches(rows, global_batch_size=at_once, micro_batch_size=at_once, rank=0, world=1)
    with closing(batches):
        looked_at = [to_device(batch.micro_batches[0], device) for batch in islice(batches, count)]
    scales = calibrate_routing_scale(model, looked_at)
    logger.info("routing scales per layer: %s", ", ".join(f"{scale:.4g}" for scale in scales))
