"""Gradients on several ranks equal those of one process in float32, whatever the mix of ZeRO, context and accumulation.

`make test` runs a subset that covers every value of every dimension, `make test-parallel` the whole product.
"""

import pytest
from gradient_cases import WHOLE_PRODUCT, Case, worst_errors

TOLERANCE = 1e-5
COVERING = {
    2: [
        Case(3, context=2, accumulation=2, savings="chunked"),
        Case(2, context=2, accumulation=1, attention="full"),
        Case(1, context=2, accumulation=2, method="ulysses", savings="chunked", attention="full"),
        Case(0, context=1, accumulation=2),
        Case(2, context=2, accumulation=2, method="ulysses", attention="blocks"),
    ],
    4: [
        Case(1, context=4, accumulation=1),
        Case(1, context=4, accumulation=2, attention="blocks"),
        Case(3, context=2, accumulation=1, savings="chunked", attention="blocks", routing_scale="auto"),
        Case(3, context=4, accumulation=2, savings="chunked", attention="full"),
        Case(0, context=4, accumulation=1, method="ulysses", savings="chunked"),
        Case(2, context=2, accumulation=2, savings="chunked", routing_scale="auto"),  # and two data-parallel ranks
        Case(3, context=1, accumulation=1, attention="full"),
    ],
}


def assert_equal_to_one_process(ranks, cases, corpus, folder):
    results = worst_errors(ranks, cases, corpus, folder)
    assert len(results) == len(cases)
    wrong = [result for result in results if not max(result["errors"].values()) < TOLERANCE]
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("ranks", [2, 4])
def test_gradients_equal_those_of_one_process(tmp_path, corpus, ranks):
    assert_equal_to_one_process(ranks, COVERING[ranks], corpus, tmp_path)


@pytest.mark.product
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("ranks", [2, 4])
def test_whole_product(tmp_path, corpus, ranks):
    assert_equal_to_one_process(ranks, WHOLE_PRODUCT[ranks], corpus, tmp_path)
