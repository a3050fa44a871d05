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


@pytest.mark.parametrize("fraction", [1e-9, 0.49])
def test_copies_of_one_text_never_stand_on_both_sides(fraction: float) -> None:
    """Also in corpora so small that a single text is held out, whichever text it is that has copies."""
    for copied in range(8):
        texts = TEXTS[:8] + [TEXTS[copied]] * 3
        sides = [(document.text, document.split) for document in split_documents([(t, 0) for t in texts], 0, fraction)]
        assert len(sides) == 11
        assert not {t for t, side in sides if side == "train"} & {t for t, side in sides if side == "validation"}


def test_copies_of_a_lone_text_give_its_last_part_once() -> None:
    documents = list(split_documents([("abcdefghij", source) for source in range(3)], 0, 0.2))
    assert [document[:2] for document in documents if document.split == "train"] == [("abcdefgh", i) for i in range(3)]
    assert [document.text for document in documents if document.split == "validation"] == ["ij"]
    assert [document.text for document in split_documents([("abcd", 0)], 0, 1e-9)] == ["abc", "d"]
