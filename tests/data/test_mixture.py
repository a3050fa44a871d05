"""Rows of several sources in given shares."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dash_train.data.config import DataConfig
from dash_train.data.errors import DataError
from dash_train.data.loader import RowDataset, step_batches
from dash_train.data.mixture import STEP, WHOLE, Mixture, places_below, quotients
from dash_train.data.prepare import prepare
from dash_train.data.rows import by_source, training_rows, unique_names, validation_rows

Mixed = Callable[..., Mixture]


@pytest.fixture
def config(data_config: Callable[..., DataConfig], tmp_path: Path) -> Callable[..., DataConfig]:
    """Builds a configuration of three sources: long documents, short ones, and a few."""
    for name, count, words in (("long", 60, 400), ("short", 300, 20), ("few", 10, 60)):
        texts = [" ".join(f"{name}{number * word % 97}" for word in range(words)) for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def build(of_sources: dict[str, dict[str, Any]] | None = None, **changes: Any) -> DataConfig:
        sources = [
            {"type": "jsonl", "path": str(tmp_path / f"{name}.jsonl"), **(of_sources or {}).get(name, {})}
            for name in ("long", "short", "few")
        ]
        return data_config(sources=sources, **changes)

    return build


@pytest.fixture
def mixed(config: Callable[..., DataConfig]) -> Mixed:
    """Builds the training rows of a configuration, 8 to a step."""

    def build(*args: Any, **changes: Any) -> Any:
        made = config(*args, **changes)
        return training_rows(made, prepare(made), seq=256, chunk_size=16, global_batch_size=8)

    return build


def weighted(long: float, short: float, few: float, **of_few: Any) -> dict[str, dict[str, Any]]:
    return {"long": {"weight": long}, "short": {"weight": short}, "few": {"weight": few, **of_few}}


def tokens_of(rows: Mixture | RowDataset, first: int, last: int) -> np.ndarray:
    return np.sum([rows.source_tokens(index) for index in range(first, last)], axis=0)


def test_quotients_are_the_sum_of_quotients() -> None:
    for count, modulus, step, start in [(0, 5, 3, 1), (17, 7, 40, -31), (100, 64, 37, 0), (31, 1, 0, 5)]:
        assert quotients(count, modulus, step, start) == sum((start + i * step) // modulus for i in range(count))
    for bound in (0, 1, WHOLE // 3, WHOLE):
        assert places_below(bound, 5000) == sum(i * STEP % WHOLE < bound for i in range(5000))


def test_weights_are_shares_of_the_tokens(mixed: Mixed) -> None:
    rows = mixed(weighted(2, 1, 1), weight_by="tokens")
    for first in (0, 400, 1234):
        shares = tokens_of(rows, first, first + 400)
        assert shares / shares.sum() == pytest.approx([0.5, 0.25, 0.25], abs=0.02)


def test_weights_are_shares_of_the_documents(mixed: Mixed) -> None:
    rows = mixed(weighted(1, 3, 1), weight_by="documents")
    started: Counter[int] = Counter()
    for index in range(600):
        packing, pieces = rows.sources[rows._find(index)[0]].pieces(rows._find(index)[1])
        documents = packing.document[pieces][packing.start[pieces] == 0]
        started.update((np.searchsorted(rows.shards.source_starts, documents, side="right") - 1).tolist())
    shares = [started[source] / sum(started.values()) for source in range(3)]
    assert shares == pytest.approx([0.2, 0.6, 0.2], abs=0.03)


def test_every_row_of_a_source_comes_once_a_pass_and_in_its_own_order(mixed: Mixed) -> None:
    rows = mixed(weighted(2, 1, 1), weight_by="tokens")
    found = [rows._find(index) for index in range(1000)]
    for source in range(3):
        places = [place for number, place in found if number == source]
        assert places == list(range(len(places)))
    one = rows.row(5)
    source, place = rows._find(5)
    assert all(torch.equal(one[name], rows.sources[source].row(place)[name]) for name in one)
    assert len({rows.row_id(index) for index in range(1000)}) == 1000


def test_a_source_is_read_no_more_than_it_may_be(mixed: Mixed) -> None:
    rows = mixed(weighted(1, 1, 2, max_passes=2), weight_by="tokens")
    (limit,) = {source.total_rows() for source in rows.sources} - {None}
    used = [index for index in range(500) if rows._find(index)[0] == 2]
    assert len(used) == limit == 2 * rows.sources[2].rows(0)
    after = tokens_of(rows, used[-1] + 1, used[-1] + 301)
    assert after / after.sum() == pytest.approx([0.5, 0.5, 0.0], abs=0.02)
    assert "from row" in rows.summary()[2]


def test_rows_end_where_all_sources_do(mixed: Mixed) -> None:
    rows = mixed({name: {"max_passes": 1} for name in ("long", "short", "few")}, weight_by="tokens")
    assert rows.end == sum(source.rows(0) for source in rows.sources)
    rows.row(rows.end - 1)
    with pytest.raises(DataError, match=rf"all have been read max_passes times after {rows.end} rows of 256 tokens"):
        rows.row(rows.end)


def test_stages_change_the_shares_at_their_step(mixed: Mixed) -> None:
    stages = [{"from_step": 51, "weights": [0, 1, 1]}, {"from_step": 101, "weights": [1, 0, 0]}]
    rows = mixed(weighted(2, 1, 1), weight_by="tokens", stages=stages)
    expected = [[0.5, 0.25, 0.25], [0.0, 0.5, 0.5], [1.0, 0.0, 0.0]]
    for number, shares in enumerate(expected):
        found = tokens_of(rows, 400 * number, 400 * number + 400)
        assert found / found.sum() == pytest.approx(shares, abs=0.02)
    found_rows = [rows._find(index) for index in range(1200)]
    long = [place for source, place in found_rows if source == 0]
    assert long == list(range(len(long))), "a stage goes on where the one before left a source"


def test_stages_that_are_to_come_may_change(mixed: Mixed) -> None:
    def prints(rows: int, *weights: list[float]) -> dict[str, Any]:
        stages = [{"from_step": 10 * (number + 1) + 1, "weights": given} for number, given in enumerate(weights)]
        return mixed(weighted(2, 1, 1), weight_by="tokens", stages=stages).fingerprint(rows)

    assert prints(80, [1, 1, 1]) == prints(80, [5, 1, 1])
    assert prints(81, [1, 1, 1]) != prints(81, [5, 1, 1])
    assert prints(150, [1, 1, 1], [2, 2, 1]) == prints(150, [1, 1, 1])


def test_ranks_and_restarts_see_the_same_rows(mixed: Mixed) -> None:
    rows = mixed(weighted(2, 1, 1), weight_by="tokens")

    def take(rank: int, world: int, start: int = 0) -> list[tuple[list[int], list[int], list[Any]]]:
        batches = step_batches(rows, global_batch_size=8, micro_batch_size=2, rank=rank, world=world, start_step=start)
        taken = [next(batches) for _ in range(3)]
        batches.close()
        return [(b.rows, b.source_tokens, [m["tokens"] for m in b.micro_batches]) for b in taken]

    whole = take(0, 1)
    for world in (2, 4):
        ranks = [take(rank, world) for rank in range(world)]
        for step in range(3):
            assert {str(rank[step][:2]) for rank in ranks} == {str(whole[step][:2])}
            held = torch.cat([tokens for rank in ranks for tokens in rank[step][2]])
            assert sorted(held.tolist()) == sorted(torch.cat(whole[step][2]).tolist())
    assert [batch[:2] for batch in take(0, 1, start=1)[:2]] == [batch[:2] for batch in whole[1:]]
    assert whole[0][1] == tokens_of(rows, 0, 8).tolist()


def test_tokens_by_source_are_the_labels(mixed: Mixed) -> None:
    for rows in (mixed(), mixed(weight_by="tokens")):
        for index in range(30):
            assert rows.source_tokens(index).sum() == (rows.row(index)["labels"] != -100).sum()


def test_weights_by_passes_stay_one_pool(mixed: Mixed) -> None:
    rows = mixed(weighted(1, 1, 2))
    assert isinstance(rows, RowDataset)
    assert rows.fingerprint().keys() == {
        "shards", "tokenizer", "seq", "chunk_size", "weights", "seed", "packer_version"
    }  # fmt: skip


def test_validation_rows_of_each_source(config: Callable[..., DataConfig]) -> None:
    folder = prepare(config())
    rows = validation_rows(folder, seq=256, chunk_size=16, seed=0)
    alone = by_source(rows)
    assert [name.rpartition("/")[2] for name in alone] == ["long.jsonl", "short.jsonl", "few.jsonl"]
    for number, of_source in enumerate(alone.values()):
        counted = tokens_of(of_source, 0, of_source.rows(0))
        assert counted.nonzero()[0].tolist() == [number]
        held = rows.shards.source_tokens - np.diff(rows.shards.source_starts)
        assert counted[number] == held[number]
    assert unique_names(["a", "b", "a"]) == ["a", "b", "a (2)"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": [{"weight": 2}]}, "validation.0: no weights or passes; what is validated on is read once"),
        ({"stages": [{"from_step": 5, "weights": [1, 1, 1]}]}, "stages: they need weight_by: documents or tokens"),
        ({"weight_by": "tokens", "stages": [{"from_step": 5, "weights": [1]}]}, "stages.0.weights: 1 for 3 sources"),
        ({"weight_by": "tokens", "stages": [{"from_step": 5, "weights": [0, 0, 0]}]}, "stages.0.weights: all are 0"),
        (
            {"weight_by": "tokens", "stages": [{"from_step": n, "weights": [1, 1, 1]} for n in (5, 5)]},
            "stages.1.from_step: 5 does not follow",
        ),
    ],
)
def test_stages_that_do_not_fit_are_refused(
    config: Callable[..., DataConfig], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_a_source_without_a_document_is_named(mixed: Mixed, tmp_path: Path) -> None:
    (tmp_path / "few.jsonl").write_text("")
    with (tmp_path / "short.jsonl").open("a") as file:
        file.write(json.dumps({"text": " ".join(dir(str) + dir(dict) + dir(bytes))}))
    with pytest.raises(DataError, match=r"data.sources.2: holds no document to train on"):
        mixed(weight_by="tokens")
