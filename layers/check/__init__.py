"""`check`: a torch module or function run through all that JAX does with it, each time compared with torch itself.

`given.py` has what the user gave, `kinds.py` and `wrapped.py` what frameworks make of it; `torch_side.py` and
`jax_side.py` compute the same with either; `checks.py` and `higher.py` compare; `outcomes.py`, `remarks.py` and
`report.py` say how it went. It may import the rest of `layers`, which knows nothing of it. Start at `checks.py`.
"""

from typing import Any

import equinox as eqx

from .bench import Bench
from .given import Given
from .kinds import kind_of
from .outcomes import outcomes_of
from .report import Report
from .untouched import untouched


def check(module_or_fn: Any, *args: Any, key: Any = None) -> Report:
    """Whether a torch module or function does in JAX what it does in torch: what `jax.test_util.check_grads` is, for a
    whole module.

    ```python
    report = torchleaf.check(torch.nn.Linear(3, 4), jnp.ones((2, 3)))
    print(report)
    assert report.ok
    ```

    It runs on these arguments, and on others close by, eagerly and compiled, in first and in later runs: outputs;
    gradients; forward mode; `vmap` and `vmap` of gradients; Hessian-vector products; state; random numbers by key.
    Each is compared with torch, or with finite differences in float64. This takes seconds to minutes, most of it to
    trace and compile. Nothing of yours changes: neither the module nor its weights or mode, generators or settings.

    **Arguments:**

    - `module_or_fn`: a `torch.nn.Module`, which is checked as an Equinox module; a torch function; a `TorchModule` of
      Equinox, Linen or NNX; or what `torchleaf.torch_function` returned. With its mode and options.
    - `args`: the positional arguments of one call: arrays or tensors in any pytree, and static values. If `eqx.nn.
      make_with_state` made the model, the `eqx.nn.State` is the last one, as in a call.
    - `key`: a JAX PRNG key, for what draws random numbers; without one, `jax.random.key(0)`.

    **Returns:** a report to print, with `ok`: whether nothing is wrong, and nothing that torch can do is refused; and
    `outcomes`: each has a `name`, a `status` (`"ok"`; `"slow"`, right, and slower than it could be; `"refused"`, an
    error of torchleaf's; `"wrong"`, numbers that are not torch's; `"error"`, another exception; `"n/a"`, there is
    nothing to check, or torch cannot do it), a `text` (why, where, by how much, and the remedy), the largest relative
    `error` and the `seconds` it took. `report["vmap"]` is the outcome of that name.

    **Raises:** `TypeError` for what is none of these, for lazy modules and those that cannot be copied; `ValueError`
    if torch itself fails on the arguments, with torch's message.

    Source: [`jax.test_util.check_grads`](https://docs.jax.dev/en/latest/_autosummary/jax.test_util.check_grads.html),
    [`torch.autograd.gradcheck`](https://docs.pytorch.org/docs/stable/generated/torch.autograd.gradcheck.gradcheck.html).
    """
    state = args[-1] if args and isinstance(args[-1], eqx.nn.State) else None
    with untouched():
        subject = Given(kind_of(module_or_fn, state), args if state is None else args[:-1], key)
        return Report(subject.name, tuple(outcomes_of(Bench(subject))), tuple(subject.notes))
