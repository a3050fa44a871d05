import pytest

from dash_train.data.split import split_documents

TEXTS = [f"document {number}" for number in range(200)]


def held_out(texts: list[str], seed: int = 0, fraction: float = 0.2) -> list[str]:
    documents = split_documents([(text, 0) for text in texts], seed, fraction)
    return [document.text for document in documents if document.split == "validation"]


def test_the_fraction_is_held_out_and_order_is_kept() -> None:
    documents = list(split_documents([(text, 3) for text in TEXTS], 0, 0.2))
    assert [document.text for document in documents] == TEXTS
    assert {document.source for document in documents} == {3}
    assert 25 <= len(held_out(TEXTS)) <= 55


def test_a_document_keeps_its_split_whatever_stands_around_it() -> None:
    assert held_out(TEXTS[:100]) == [text for text in held_out(TEXTS) if text in TEXTS[:100]]
    assert sorted(held_out(TEXTS[::-1])) == sorted(held_out(TEXTS))
    assert held_out(TEXTS, seed=1) != held_out(TEXTS)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("fraction", [1e-9, 0.49])
def test_small_corpora_have_both_splits(count: int, fraction: float) -> None:
    for seed in range(10):
        assert 1 <= len(held_out(TEXTS[:count], seed, fraction)) < count
        assert len(held_out(["same"] * count, seed, fraction)) == 1


def test_a_lone_document_gives_its_last_part() -> None:
    first, last = split_documents([("abcdefghij", 0)], 0, 0.2)
    assert (first.text, first.split) == ("abcdefgh", "train")
    assert (last.text, last.split) == ("ij", "validation")
