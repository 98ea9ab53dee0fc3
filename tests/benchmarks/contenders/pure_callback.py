"""What one writes by hand: `jax.pure_callback` forward and backward, joined by `jax.custom_vjp`."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import jax_programs
import numpy as np
import torch
from cases import Case, Task
from steps import Step

warnings.filterwarnings("ignore", "The given NumPy array is not writable")


def build(case: Case, task: Task) -> Step:
    return jax_programs.step(case, task, _wrap)


def _wrap(case: Case, module: torch.nn.Module) -> jax_programs.Apply:
    def call(params: dict[str, torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return torch.func.functional_call(module, params, inputs)

    def forward_host(params: Any, inputs: Any) -> np.ndarray:
        with torch.no_grad():
            return call(*_tensors((params, inputs))).numpy()

    def backward_host(params: Any, inputs: Any, cotangent: Any) -> Any:
        params, inputs, cotangent = _tensors((params, inputs, cotangent))
        active = [*params.values(), *(inputs[i] for i in case.active_inputs)]
        for x in active:
            x.requires_grad_()
        grads = torch.autograd.grad(call(params, inputs), active, cotangent)
        return tuple(g.numpy() for g in grads)

    @jax.custom_vjp
    def apply(params: jax_programs.Params, *inputs: jax.Array) -> jax.Array:
        result = jax.ShapeDtypeStruct(case.output, jnp.float32)
        return jax.pure_callback(forward_host, result, params, inputs, vmap_method="sequential")

    def forward(params: jax_programs.Params, *inputs: jax.Array) -> Any:
        return apply(params, *inputs), (params, inputs)

    def backward(residuals: Any, cotangent: jax.Array) -> Any:
        params, inputs = residuals
        active = [*params.values(), *(inputs[i] for i in case.active_inputs)]
        shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in active)
        grads = jax.pure_callback(backward_host, shapes, params, inputs, cotangent, vmap_method="sequential")
        of_input = dict(zip(case.active_inputs, grads[len(params) :], strict=True))
        return dict(zip(params, grads, strict=False)), *(of_input.get(i) for i in range(len(inputs)))

    apply.defvjp(forward, backward)
    return apply


def _tensors(tree: Any) -> Any:
    return jax.tree.map(lambda x: torch.from_numpy(np.asarray(x)), tree)
