"""Bisection in Triton."""

import triton
import triton.language as tl


@triton.jit
def first_at_least(numbers_ptr, count, value, steps):
    """The first place of ascending numbers that holds at least `value`; `count` where none does. int32 [WIDTH].

    Every lane searches for itself: numbers_ptr and value are one for all or [WIDTH], count is [WIDTH]. 2^steps is more
    than any count.
    """
    low = tl.zeros(count.shape, tl.int32)
    high = count
    for _ in range(steps):
        middle = (low + high) // 2
        is_open = low < high
        is_before = tl.load(numbers_ptr + middle, mask=is_open, other=0) < value
        low = tl.where(is_open & is_before, middle + 1, low)
        high = tl.where(is_open & (is_before == 0), middle, high)
    return low
