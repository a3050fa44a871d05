import itertools

import torch
from context_cases import compare_with_whole_rows
from ranks import run_on_ranks

from dash_train.model.context import Context


def test_shares_are_early_and_late_pieces_that_make_up_the_row():
    row = torch.arange(64)[None]
    shares = [Context(rank, 4).share(row)[0].tolist() for rank in range(4)]
    assert shares[1] == [*range(8, 16), *range(48, 56)]
    assert sorted(itertools.chain(*shares)) == list(range(64))
    assert Context(1, 4).query_starts(64) == (8, 48)
    assert Context(1, 4, "ulysses").query_starts(64) == Context().query_starts(64) == (0,)


def test_ranks_that_share_rows_compute_what_one_does():
    run_on_ranks(4, compare_with_whole_rows, 4)
