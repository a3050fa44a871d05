from dash_train.distributed.slow_ranks import Report, SlowRanks, slow
from dash_train.distributed.world import init_world


def test_a_rank_that_holds_the_others_up_is_named():
    reports = [Report(f"node{rank}", 0.0010 + rank * 1e-5, 0.01) for rank in range(4)]
    assert list(slow(reports)) == []
    reports[2] = Report("node2", 0.0016, 0.01, "88 degrees, 1200 MHz")
    (line,) = slow(reports)
    assert line.startswith("rank 2 (on node2, 88 degrees, 1200 MHz) is slow: a product takes 1.57 times as long")
    reports[2] = Report("node2", 0.0010, 0.4)
    (line,) = slow(reports)
    assert line == "rank 2 (on node2) waits for data for 40% of the time; all ranks wait for it"


def test_where_all_wait_none_is_slow():
    assert list(slow([Report("node", 0.0, 0.5)] * 4)) == []


def test_one_rank_is_compared_with_nobody():
    ranks = SlowRanks(init_world(), every=1)
    ranks.step(1.0)
