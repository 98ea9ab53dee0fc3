"""Random bits on a GPU from keys that lie in its memory, by Triton: nothing waits for them to reach the host.

Element `i` of draw `index` is word `i % 4` of Philox 4x32-10 with the first two words of the key, at the counter
`(i // 4, index, further words)`.

Source: [Philox](https://www.thesalmons.org/john/random123/papers/random123sc11.pdf),
[Triton](https://triton-lang.org/main/python-api/triton.language.html#random-number-generation).
"""

from typing import no_type_check

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

_BLOCK = 1024


@triton.jit(do_not_specialize=["n", "index"])  # else 1 would not be a number of Triton's
@no_type_check
def _fill(keys, out, n, index, HAS_FOUR_WORDS: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(1)
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = keys + row * WORDS
    low = tl.load(key).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(key + 1).to(tl.uint32, bitcast=True).to(tl.uint64)
    counter = group.to(tl.uint32)
    third, fourth = counter * 0, counter * 0
    if HAS_FOUR_WORDS:
        third += tl.load(key + 2).to(tl.uint32, bitcast=True)
        fourth += tl.load(key + 3).to(tl.uint32, bitcast=True)
    a, b, c, d = tl.philox(low | (high << 32), counter, counter * 0 + index.to(tl.uint32), third, fourth)
    first = out + row.to(tl.int64) * n
    element = group.to(tl.int64) * 4
    tl.store(first + element, a.to(tl.int32, bitcast=True), mask=element < n)
    tl.store(first + element + 1, b.to(tl.int32, bitcast=True), mask=element + 1 < n)
    tl.store(first + element + 2, c.to(tl.int32, bitcast=True), mask=element + 2 < n)
    tl.store(first + element + 3, d.to(tl.int32, bitcast=True), mask=element + 3 < n)


def bits(keys: torch.Tensor, n: int, index: int) -> torch.Tensor:
    """Random bits of the draw `index` of each key: int32[rows, n], from uint32[rows, 2 or 4], of any strides."""
    rows, words = keys.shape
    out = torch.empty((rows, n), dtype=torch.int32, device=keys.device)
    if out.numel():
        grid = (triton.cdiv(triton.cdiv(n, 4), _BLOCK), rows)
        launch = _fill[grid]  # pyright: ignore[reportIndexIssue]
        launch(keys.contiguous().view(torch.int32), out, n, index, HAS_FOUR_WORDS=words == 4, WORDS=words, BLOCK=_BLOCK)
    return out
