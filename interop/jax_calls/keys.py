"""Keys for JAX functions that draw random numbers, from torch's generators.

So `torch.manual_seed` makes them repeatable, `torch.utils.checkpoint`, which restores the generator, runs the same
numbers again, and `torch.func.vmap(randomness="different")` has others for each example.
"""

from typing import Any

import jax
import torch

from ..process.once import Once


def _words() -> tuple[int, ...]:
    return jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape


shape_of_key = Once(_words)
"""How many words of 32 bits a key has, in JAX's default implementation."""


def key_aval() -> jax.ShapeDtypeStruct:
    """A key as an operand."""
    return jax.ShapeDtypeStruct(shape_of_key(), "int32")


def drawn_key(generator: torch.Generator | None, device: torch.device) -> torch.Tensor:
    """The words of a new key, as torch can draw them in any of its transforms."""
    words = torch.randint(
        -(2**31),
        2**31,
        shape_of_key(),
        generator=generator,
        dtype=torch.int32,
        device=device if generator is None else generator.device,
    )
    return words if words.device == device else words.to(device)


def as_key(words: Any) -> Any:
    """The key of drawn words."""
    return jax.random.wrap_key_data(jax.lax.bitcast_convert_type(words, "uint32"))
