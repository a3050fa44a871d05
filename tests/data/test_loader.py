import itertools
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dash_train.data.config import DataConfig
from dash_train.data.errors import DataError
from dash_train.data.loader import IGNORE, RowDataset, StepBatch, step_batches, validation_batches
from dash_train.data.prepare import prepare

SEQ, CHUNK = 128, 16


@pytest.fixture
def folder(data_config: Callable[..., DataConfig]) -> Path:
    return prepare(data_config())


@pytest.fixture
def dataset(folder: Path) -> RowDataset:
    return RowDataset(folder, "train", seq=SEQ, chunk_size=CHUNK, seed=5)


def take(
    dataset: RowDataset, steps: int, *, micro: int = 2, rank: int = 0, world: int = 1, start: int = 0
) -> list[StepBatch]:
    batches = step_batches(
        dataset, global_batch_size=8, micro_batch_size=micro, rank=rank, world=world, start_step=start
    )
    return list(itertools.islice(batches, steps))


def test_a_row_holds_its_pieces_their_labels_and_their_starts(dataset: RowDataset) -> None:
    shards, packing = dataset.shards, dataset.epochs.block(0, 0)
    split_documents = 0
    for index in range(dataset.rows(0)):
        row, number = dataset.row(index), packing.order[index]
        assert [row[name].dtype for name in row] == [torch.int64, torch.int64, torch.int32, torch.bool]
        assert (row["document_starts"] % CHUNK == 0).all()
        real = 0
        for piece in range(packing.row_starts[number], packing.row_starts[number + 1]):
            document, at, start, length = (
                int(values[piece]) for values in (packing.document, packing.position, packing.start, packing.length)
            )
            text = shards.tokens(document, 0, 10**9).tolist()
            here = slice(at, at + length)
            assert row["tokens"][here].tolist() == text[start : start + length]
            following = [*text[start + 1 : start + length + 1], IGNORE][:length]  # the next row's first token too
            assert row["labels"][here].tolist() == following
            split_documents += following[-1] != IGNORE
            stop = at + -(-length // CHUNK) * CHUNK
            assert (row["document_starts"][at:stop] == at).all()
            assert row["real"][here].all() and not row["real"][at + length : stop].any()
            real += length
        assert int(row["real"].sum()) == real
        assert (row["tokens"][~row["real"]] == shards.meta.pad_id).all()
        assert (row["labels"][~row["real"]] == IGNORE).all()
    assert split_documents > 10


def test_an_epoch_reads_every_token_once(dataset: RowDataset) -> None:
    rows = [dataset.row(index) for index in range(dataset.rows(0))]
    assert sum(int(row["real"].sum()) for row in rows) == dataset.shards.meta.tokens
    # Every token but each document's first is somebody's label.
    labels = sum(int((row["labels"] != IGNORE).sum()) for row in rows)
    assert labels == dataset.shards.meta.tokens - dataset.shards.meta.documents
    assert dataset.fill() == pytest.approx(dataset.shards.meta.tokens / (len(rows) * SEQ))
    assert dataset.fill() > 0.9


def test_indices_run_on_through_the_epochs_in_new_orders(dataset: RowDataset) -> None:
    rows = dataset.rows(0)
    assert dataset.locate(rows - 1) == (0, rows - 1)
    assert dataset.locate(2 * rows) == (2, 0)
    epochs = [[dataset.row_id(epoch * rows + place) for place in range(rows)] for epoch in range(2)]
    assert sorted(epochs[0] + epochs[1]) == list(range(2 * rows))
    assert [row - rows for row in epochs[1]] != epochs[0]


def test_fractional_weights_change_the_length_of_epochs(folder: Path) -> None:
    dataset = RowDataset(folder, "train", seq=SEQ, chunk_size=CHUNK, weights=[0.5])
    lengths = [dataset.rows(epoch) for epoch in range(4)]
    assert dataset.locate(sum(lengths[:3])) == (3, 0)
    assert dataset.locate(sum(lengths[:3]) - 1) == (2, lengths[2] - 1)


@pytest.mark.parametrize(("micro", "world"), [(8, 1), (1, 1), (2, 2), (1, 4), (1, 8)])
def test_a_step_holds_the_same_rows_however_it_is_divided(dataset: RowDataset, micro: int, world: int) -> None:
    expected = take(dataset, 3)
    ranks = [take(dataset, 3, micro=micro, rank=rank, world=world) for rank in range(world)]
    for step in range(3):
        assert all(rank[step].rows == expected[step].rows for rank in ranks)
        held = [batch["tokens"] for rank in ranks for batch in rank[step].micro_batches]
        assert all(batch.shape == (micro, SEQ) for batch in held)
        whole = [batch["tokens"] for batch in expected[step].micro_batches]
        assert sorted(torch.cat(held).tolist()) == sorted(torch.cat(whole).tolist())


def test_batches_of_one_document_a_row_have_no_starts(dataset: RowDataset) -> None:
    found = [micro for batch in take(dataset, 4, micro=1) for micro in batch.micro_batches]
    for index, micro in enumerate(found):
        starts = dataset.row(index)["document_starts"]
        assert torch.equal(micro.get("document_starts", torch.zeros(1, SEQ, dtype=torch.int32))[0], starts)
        assert ("document_starts" in micro) == bool(starts.any())
    assert 0 < sum("document_starts" in micro for micro in found) < len(found)


def test_starting_at_a_step_gives_what_an_unbroken_run_gives(dataset: RowDataset, folder: Path) -> None:
    steps = dataset.rows(0) // 8 + 3  # into the second epoch
    unbroken = take(dataset, steps)
    resumed = take(RowDataset(folder, "train", seq=SEQ, chunk_size=CHUNK, seed=5), 3, start=steps - 3)
    assert unbroken[-1].epoch == 1
    for old, new in zip(unbroken[-3:], resumed, strict=True):
        assert (old.step, old.epoch, old.rows) == (new.step, new.epoch, new.rows)
        for left, right in zip(old.micro_batches, new.micro_batches, strict=True):
            assert all(torch.equal(left[name], right[name]) for name in left)


def test_closing_the_iterator_ends_its_thread(dataset: RowDataset) -> None:
    before = threading.active_count()
    batches = step_batches(dataset, global_batch_size=2, micro_batch_size=1, rank=0, world=1)
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before


def test_an_error_in_the_thread_reaches_the_caller(dataset: RowDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr(dataset.shards, "read", fail)
    with pytest.raises(OSError, match="disk gone"):
        take(dataset, 1)


@pytest.mark.parametrize("limit", [None, 5])
def test_validation_gives_every_rank_the_same_number_of_batches(folder: Path, limit: int | None) -> None:
    dataset = RowDataset(folder, "validation", seq=SEQ, chunk_size=CHUNK)
    rows = limit or dataset.rows(0)
    ranks = [
        list(validation_batches(dataset, micro_batch_size=2, rank=rank, world=3, limit_rows=limit)) for rank in range(3)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    held = torch.cat([batch["tokens"] for batches in ranks for batch in batches])
    real = torch.cat([batch["real"] for batches in ranks for batch in batches])
    labels = torch.cat([batch["labels"] for batches in ranks for batch in batches])
    assert len(held) % 6 == 0
    assert sorted(held[real.any(1)].tolist()) == sorted(dataset.row(index)["tokens"].tolist() for index in range(rows))
    assert (labels[~real.any(1)] == IGNORE).all()


def test_the_fingerprint_names_what_changes_the_rows(dataset: RowDataset, folder: Path) -> None:
    def differing(**changes: object) -> set[str]:
        options: dict = {"seq": SEQ, "chunk_size": CHUNK, "seed": 5, **changes}
        other = RowDataset(folder, "train", **options).fingerprint()
        return {key for key, value in dataset.fingerprint().items() if other[key] != value}

    assert differing() == set()
    assert differing(seq=256) == {"seq"}
    assert differing(chunk_size=32) == {"chunk_size"}
    assert differing(seed=6) == {"seed"}
    assert differing(weights=[2.0]) == {"weights"}
    validation = RowDataset(folder, "validation", seq=SEQ, chunk_size=CHUNK, seed=5).fingerprint()
    assert {key for key, value in dataset.fingerprint().items() if validation[key] != value} == {"shards"}


def test_settings_that_do_not_fit_are_one_clear_line(dataset: RowDataset, folder: Path) -> None:
    with pytest.raises(DataError, match=r"train.seq: 100 is not a multiple of chunk_size 16"):
        RowDataset(folder, "train", seq=100, chunk_size=CHUNK)
    with pytest.raises(DataError, match="weights: 2 given for 1 sources"):
        RowDataset(folder, "train", seq=SEQ, chunk_size=CHUNK, weights=[1.0, 1.0])
    with pytest.raises(DataError, match=r"train.global_batch_size: 8 is not a multiple of micro_batch_size 3 times 1"):
        take(dataset, 1, micro=3)


def test_a_weight_without_a_document_is_named_and_epochs_without_rows_are_passed(folder: Path) -> None:
    with pytest.raises(DataError, match=r"data.sources.0.weight: 0.001 of \d+ documents is none in an epoch; expected"):
        RowDataset(folder, "train", seq=SEQ, chunk_size=CHUNK, weights=[0.001])
    documents = RowDataset(folder, "train", seq=SEQ, chunk_size=CHUNK).shards.meta.documents
    dataset = RowDataset(folder, "train", seq=SEQ, chunk_size=CHUNK, weights=[0.6 / documents])
    rows = [dataset.rows(epoch) for epoch in range(5)]
    assert rows[0] and not rows[1] and rows[2]
    assert dataset.locate(rows[0]) == (2, 0)


def test_the_summary_of_sources_counts_weights(folder: Path) -> None:
    dataset = RowDataset(folder, "train", seq=SEQ, chunk_size=CHUNK, weights=[2.0])
    meta = dataset.shards.meta
    (line,) = dataset.summary()
    holds, reads = line.split("; ")
    assert holds == f"{meta.sources[0]}: {meta.documents:,} documents, {meta.tokens:,} tokens"
    assert reads == f"weight 2: {2 * meta.tokens:,} tokens of the first epoch, 100.0%"
