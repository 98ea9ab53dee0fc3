"""An op that JAX has no function for: computed by torch, within the same program."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..errors import TorchCallError
from ..internals.ops import torch_pytree
from ..modes.aten import tensors_in
from .graph import Ref, Value
from .names import targets

Function = Callable[..., Any]
Make = Callable[[Function, str], Function]
"""Makes a JAX function of a torch function, with a name: `torchleaf.torch_function`."""


class Carrier:
    """Makes JAX functions of single ops.

    **Arguments:**

    - `make`: what makes a JAX function of a torch function.
    - `name`: the callable that the ops are of.
    - `strict`: whether no op may be carried.
    - `has_sizes`: whether there are sizes that are not known, which torch could not compute with.
    """

    def __init__(self, make: Make, name: str, *, strict: bool, has_sizes: bool = False):
        self._make, self._name, self._strict, self._has_sizes = make, name, strict, has_sizes

    def __call__(
        self, func: Any, args: Any, kwargs: Mapping[str, Any], n_fresh: int, values: Sequence[Value]
    ) -> Function:
        """A function of the op's arguments: its results, and new values of what it writes into."""
        if self._strict:
            raise TorchCallError(
                f"{self._name} uses {op_name(func)}, for which engine='xla' has no JAX function, and with strict=True "
                "torch computes none. Leave out strict=True to have torch compute this op, or use engine='torch'."
            )
        if self._has_sizes:
            raise TorchCallError(
                f"{self._name} uses {op_name(func)}, for which engine='xla' has no JAX function, and torch computes "
                "with sizes that are known only. Export with sizes that are known, once for each size."
            )
        leaves, treedef = torch_pytree.tree_flatten((args, dict(kwargs)), is_leaf=lambda x: isinstance(x, Ref))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Ref)]
        wanted = [values[leaves[i].number].dtype for i in places]

        def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            given = list(leaves)
            for i, x, dtype in zip(places, tensors, wanted, strict=True):
                given[i] = x.to(dtype)
            given_args, given_kwargs = torch_pytree.tree_unflatten(given, treedef)
            into = targets(func, given_args, given_kwargs) if hasattr(func, "_schema") else []
            result = func(*given_args, **given_kwargs)
            outs = [result] if isinstance(result, torch.Tensor) else list(tensors_in(result))
            return *outs[: n_fresh if into else None], *(x.clone() for x in into)

        computed = self._make(run, op_name(func))

        def function(*args: Any, **kwargs: Any) -> Any:
            given, _ = torch_pytree.tree_flatten((args, kwargs))
            return computed(*(given[i] for i in places))

        return function


def op_name(func: Any) -> str:
    """An op as errors call it."""
    name = getattr(func, "_name", None)
    return name.replace("::", ".") if name else f"torch.autograd.Function {func.__name__}"
