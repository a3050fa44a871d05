"""What an epoch reads, in one block and in several."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dash_train.benchmark.load import write_split
from dash_train.data import epochs as epochs_module
from dash_train.data.epochs import Epochs, Reading
from dash_train.data.errors import DataError
from dash_train.data.loader import RowDataset
from dash_train.data.packing import Packing
from dash_train.data.shards import TokenShards

Make = Callable[..., Epochs]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Builds the epochs of documents of given lengths, the sources of which are given, too."""

    def build(lengths: list[int], sources: list[int] | None = None, **changes: Any) -> Epochs:
        folder = tmp_path / "made" / str(len(list(tmp_path.rglob("*"))))
        given = iter(lengths)
        of = np.array(sources or [0] * len(lengths))
        write_split(folder, len(lengths), lambda count: np.array([next(given) for _ in range(count)]), lambda i: of[i])
        options = {"seq": 64, "chunk_size": 8, "seed": 0, "weights": [1.0] * (int(of[-1]) + 1), **changes}
        reading = Reading(**{name: options.pop(name) for name in list(options) if "weights" in name or "max" in name})
        return Epochs(TokenShards(folder), reading, **options)

    return build


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of some 1000 documents, and no larger ones."""
    monkeypatch.setattr(epochs_module, "ONE_BLOCK", 0)
    monkeypatch.setattr(epochs_module, "BLOCK", 1000)


def blocks(epochs: Epochs, epoch: int) -> list[Packing]:
    return [epochs.block(epoch, number) for number in range(len(epochs.row_starts(epoch)) - 1)]


def documents(epochs: Epochs, epoch: int = 0) -> np.ndarray:
    """How often an epoch reads each document."""
    firsts = np.concatenate([block.document[block.start == 0] for block in blocks(epochs, epoch)])
    return np.bincount(firsts, minlength=epochs.shards.meta.documents)


def drawn(count: int) -> list[int]:
    return np.random.default_rng(0).integers(2, 200, count).tolist()


def test_weights_are_passes_over_a_source(make: Make) -> None:
    lengths, sources = [10] * 20, [0] * 10 + [1] * 10
    for epoch in range(2):
        times = documents(make(lengths, sources, weights=[1.0, 2.0]), epoch)
        assert times.tolist() == [1] * 10 + [2] * 10
    halves = [documents(make(lengths, sources, weights=[0.5, 1.0]), epoch)[:10] for epoch in range(4)]
    for first, second in ((0, 1), (2, 3)):
        assert (halves[first] + halves[second] == 1).all()  # two halves are one pass, each document once
    assert (halves[0] != halves[2]).any()


def test_epochs_and_seeds_differ_and_repeat(make: Make) -> None:
    lengths = list(range(1, 100))
    orders = [make(lengths, seed=seed).block(epoch, 0).order.tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert make(lengths).block(0, 0).order.tolist() == orders[0]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_weights_that_give_no_document_in_some_epochs_add_up(make: Make) -> None:
    epochs = make([10] * 3, weights=[0.2])
    assert [epochs.row_starts(epoch)[-1] for epoch in range(10)].count(0) == 4
    assert sum(documents(epochs, epoch) for epoch in range(10)).tolist() == [2, 2, 2]


@pytest.mark.usefixtures("small_blocks")
def test_blocks_read_every_document_once_and_have_the_rows_that_were_counted(make: Make) -> None:
    lengths = drawn(5000)
    epochs = make(lengths, [0] * 300 + [1] * 4700, weights=[1.0, 1.0])
    for epoch in range(2):
        packed = blocks(epochs, epoch)
        assert len(packed) == 5
        assert np.diff(epochs.row_starts(epoch)).tolist() == [block.rows for block in packed]
        assert (documents(epochs, epoch) == 1).all()
        assert epochs.tokens(epoch).tolist() == [sum(lengths[:300]), sum(lengths[300:])]
        assert sum(int(block.length.sum()) for block in packed) == sum(lengths)
        for block in packed:
            assert (block.place == epochs.shards.lengths.cumsum()[block.document] - epochs.shards.lengths[
                block.document] + block.start).all()  # fmt: skip
            mixed = np.abs(np.diff(block.document[block.start == 0]))
            assert np.median(mixed) > 200  # neighbours are torn apart
    first, second = (blocks(epochs, epoch)[0].document.tolist() for epoch in range(2))
    assert first != second and blocks(make(lengths, [0] * 300 + [1] * 4700), 0)[0].document.tolist() == first


@pytest.mark.usefixtures("small_blocks")
def test_weights_of_blocks_are_passes_in_runs_of_documents(make: Make) -> None:
    epochs = make(drawn(10_240), weights=[0.5])
    halves = [documents(epochs, epoch) for epoch in range(2)]
    assert [half.sum() for half in halves] == [5120, 5120]
    assert (halves[0] + halves[1] == 1).all()
    twice = make(drawn(3000), [0] * 1000 + [1] * 2000, weights=[2.0, 1.0])
    assert documents(twice).tolist() == [2] * 1000 + [1] * 2000


@pytest.mark.usefixtures("small_blocks")
def test_epochs_without_a_run_are_empty(make: Make) -> None:
    epochs = make(drawn(300), weights=[0.2])  # two runs
    read = [documents(epochs, epoch).sum() for epoch in range(10)]
    assert read.count(0) == 6 and sum(read) == 600
    assert [len(blocks(epochs, epoch)) for epoch in range(10)] == [1] * 10
    assert [int(epochs.row_starts(epoch)[-1]) > 0 for epoch in range(10)] == [count > 0 for count in read]


@pytest.mark.parametrize("one_block", [True, False])
def test_the_order_of_rows_is_frozen(make: Make, one_block: bool, request: pytest.FixtureRequest) -> None:
    """Another order would change what resumed runs read: the version has to rise with it."""
    if not one_block:
        request.getfixturevalue("small_blocks")
    epochs = make(drawn(3000), [0] * 1200 + [1] * 1800, weights=[1.0, 1.5])
    starts = epochs.row_starts(1)
    found = []
    for place in (0, 1, int(starts[-1]) - 1):
        block, row = epochs.find(1, place)
        found.append(block.document[slice(*block.row_starts[row : row + 2])].tolist())
    frozen = {  # by version
        1: [[221], [659], [2224, 881]],
        2: [[1438], [2569, 1499], [374]],
    }
    assert found == frozen[epochs.version]


def test_no_source_is_read_more_often_than_it_may_be(make: Make) -> None:
    epochs = make([10] * 20, [0] * 10 + [1] * 10, weights=[1.0, 2.0], max_passes=[None, 3.0])
    assert [documents(epochs, epoch)[10:].sum() for epoch in range(4)] == [20, 10, 0, 0]
    assert [documents(epochs, epoch)[:10].sum() for epoch in range(4)] == [10, 10, 10, 10]
    assert not epochs.ended(100)


def test_data_that_end_are_one_clear_line(make: Make, tmp_path: Path) -> None:
    folder = make([64] * 10).shards.folder
    dataset = RowDataset(folder.parent, folder.name, seq=64, chunk_size=8, max_passes=[1.5])
    assert dataset.locate(14) == (1, 4)
    with pytest.raises(DataError, match=r"data.sources: all have been read max_passes times after 15 rows of 64 tok"):
        dataset.locate(15)


@pytest.mark.parametrize("one_block", [True, False])
def test_long_documents_are_read_more_often(make: Make, one_block: bool, request: pytest.FixtureRequest) -> None:
    if not one_block:
        request.getfixturevalue("small_blocks")
    lengths = [10, 100, 150] * 1000
    sources = [0] * 1500 + [1] * 1500
    epochs = make(lengths, sources, length_weights=[{100: 2.0, 150: 1.5}, {}])
    for epoch in range(2):
        times = documents(epochs, epoch)
        assert (times[:1500:3] == 1).all() and (times[1:1500:3] == 2).all() and (times[1500:] == 1).all()
        assert set(times[2:1500:3].tolist()) == {1, 2} and 0.4 < times[2:1500:3].mean() - 1 < 0.6
        assert [block.rows for block in blocks(epochs, epoch)] == np.diff(epochs.row_starts(epoch)).tolist()
        assert epochs.tokens(epoch).sum() == (times * lengths).sum()
    both = documents(epochs, 0) + documents(epochs, 1)
    assert (both[2:1500:3] == 3).all()


def test_what_is_counted_is_remembered(
    make: Make, small_blocks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs = make(drawn(3000))
    starts = epochs.row_starts(0).tolist()
    monkeypatch.setattr(Epochs, "_scan", pytest.fail)
    again = Epochs(epochs.shards, epochs.reading, seq=64, chunk_size=8, seed=0)
    assert again.row_starts(0).tolist() == starts
    (record,) = (tmp_path / "machine" / "dash_train" / "rows").iterdir()
    assert json.loads(record.read_text())[1] == starts


def test_an_index_out_of_order_is_refused_by_name(make: Make) -> None:
    with pytest.raises(DataError, match=r"documents.bin: not in the order of its sources; prepare again"):
        make([10, 10, 10], [0, 1, 0])
