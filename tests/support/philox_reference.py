"""Philox 4x32-10 in NumPy, as the Triton kernel computes it."""

import numpy as np
import torch

_FACTORS, _STEPS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
_LOW_32 = np.uint64(2**32 - 1)


def philox(keys, n, index):
    """Random bits of the draw `index` of each key: int32[rows, n]."""
    rows = [_row([int(word) for word in key], n, index) for key in keys.cpu().numpy()]
    return torch.from_numpy(np.stack(rows).reshape(len(keys), n))


def _row(key, n, index):
    groups = np.arange((n + 3) // 4, dtype=np.uint64)
    words = (index, *(key[2:] if len(key) == 4 else (0, 0)))
    counter = [groups, *(np.full_like(groups, word) for word in words)]
    k = key[:2]
    for _ in range(10):
        a, b = (np.uint64(f) * c for f, c in zip(_FACTORS, counter[::2], strict=True))
        high_a, high_b = a >> np.uint64(32), b >> np.uint64(32)
        counter = [
            high_b ^ counter[1] ^ np.uint64(k[0]),
            b & _LOW_32,
            high_a ^ counter[3] ^ np.uint64(k[1]),
            a & _LOW_32,
        ]
        k = [(word + step) % 2**32 for word, step in zip(k, _STEPS, strict=True)]
    return np.stack(counter, 1).ravel()[:n].astype(np.uint32).view(np.int32)
