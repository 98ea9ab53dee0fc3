"""`to_jax` and `to_torch`: arrays of one framework as views in the other, over any pytree."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.core import Tracer
from jaxtyping import PyTree

from ..internals.fake import FakeTensor
from . import dtypes
from .gpu_memory import is_as_xlas
from .trees import flatten_registering


def to_jax(tree: PyTree, *, copy: bool = False) -> PyTree:
    """View every `torch.Tensor` in a pytree as a `jax.Array`, through DLPack.

    The array shares the tensor's memory (CPU and CUDA) when the tensor's strides are a
    permutation of a dense layout and its dtype exists in JAX: transposed and channels_last
    tensors are viewed as they are. Other layouts (stride 0, gaps, conjugate or negative
    views, memory that XLA finds misaligned) are copied. While memory is shared, an in-place
    torch operation shows through the array.

    Without `jax_enable_x64`, 64-bit dtypes become 32-bit ones, as everywhere in JAX; integers
    that do not fit raise instead of wrapping.

    **Arguments:**

    - `tree`: any pytree; leaves that are not tensors are returned as they are. Gradients are not
      tracked across: a tensor with `requires_grad` gives its values.
    - `copy`: never share memory.

    **Returns:** the same pytree with `jax.Array` leaves.

    **Raises:** `TypeError` for tensors without dense memory (sparse, quantized, meta, fake) or without
    a JAX dtype; `OverflowError` for integers outside the 32-bit range.

    Source: [DLPack](https://dmlc.github.io/dlpack/latest/python_spec.html),
    [`jax.dlpack`](https://docs.jax.dev/en/latest/jax.dlpack.html).
    """
    leaves, treedef = flatten_registering(tree)
    converted = [
        tensor_to_jax(leaf, copy=copy, name=f"leaf {i}") if isinstance(leaf, torch.Tensor) else leaf
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, converted)


def to_torch(tree: PyTree, *, copy: bool = False) -> PyTree:
    """View every `jax.Array` in a pytree as a `torch.Tensor`, through DLPack.

    The tensor shares the array's memory (CPU and CUDA). JAX arrays are immutable and torch
    cannot know: pass `copy=True` if anything will write into the tensor in place.

    **Arguments:**

    - `tree`: any pytree; leaves that are not `jax.Array` are returned as they are.
    - `copy`: never share memory.

    **Returns:** the same pytree with `torch.Tensor` leaves of the same dtype bits.

    **Raises:** `TypeError` for traced arrays, arrays without a torch dtype, and deleted arrays;
    `ValueError` for arrays spread over several devices.
    """
    leaves, treedef = flatten_registering(tree)
    converted = [
        array_to_torch(leaf, copy=copy, name=f"leaf {i}") if isinstance(leaf, jax.Array) else leaf
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, converted)


def tensor_to_jax(tensor: torch.Tensor, *, copy: bool = False, name: str = "the tensor") -> jax.Array:
    """`to_jax` of one tensor; `name` is how errors call it."""
    return jax.dlpack.from_dlpack(as_jax_has_it(tensor, copy=copy, name=name))


def leaves_to_jax(tensors: Mapping[str, torch.Tensor], *, copy: bool = False) -> dict[str, jax.Array]:
    """`to_jax` of the tensors of a model, by name, as an initialiser's arrays are.

    DLPack commits an array to the tensor's device. Wherever that does not cost the sharing of memory, these are not:
    on JAX's default device, and free to follow what they are computed with. On a GPU memory is shared if it is of the
    kind of XLA's (`gpu_memory.py`). With several CPU devices only memory in JAX's own layout is: XLA reads arrays in
    another one wrongly once they were put on other devices.
    """
    dense = {name: as_jax_has_it(tensor, copy=copy, name=name) for name, tensor in tensors.items()}
    on_cpu = {name: tensor for name, tensor in dense.items() if tensor.is_cpu}
    with jax.ensure_compile_time_eval():
        arrays = jax.device_put({name: _as_numpy(tensor) for name, tensor in on_cpu.items()})
        for name, tensor in dense.items():
            shares = name in on_cpu and (not tensor.numel() or _shares(arrays[name], tensor))
            if name not in on_cpu or not (shares or jax.default_backend() != "cpu" or jax.device_count() > 1):
                view = jax.dlpack.from_dlpack(tensor)
                if tensor.is_cuda and not is_as_xlas(view):
                    view = jax.device_put(view, may_alias=False)
                arrays[name] = view if name not in on_cpu or _shares(view, tensor) else arrays[name]
    return {name: arrays[name] for name in dense}


def as_jax_has_it(tensor: torch.Tensor, *, copy: bool, name: str) -> torch.Tensor:
    """The tensor in a dtype and layout that JAX can view."""
    check_dense(tensor, f"to_jax: {name}", may_be_fake=False)
    wanted = dtypes.canonical(tensor.dtype)
    # torch warns when `detach` meets a subclass that forbids it; views keep pointer and strides.
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if dtypes.to_jax_dtype(tensor.dtype) != wanted:
        if tensor.dtype in _WIDE_INTEGERS and tensor.numel():
            check_range(tensor.cpu().numpy(), wanted, f"to_jax: {name}")
        tensor, copy = tensor.to(dtypes.to_torch_dtype(wanted)), False
    if copy or not (_is_dense(tensor) and is_aligned(tensor)):
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def check_dense(tensor: torch.Tensor, name: str, *, may_be_fake: bool) -> None:
    """`TypeError` for a tensor without memory, or one whose memory is no dense array."""
    is_meta = tensor.device.type == "meta"
    if is_meta or (isinstance(tensor, FakeTensor) and not may_be_fake):
        raise TypeError(
            f"{name} is a {'meta' if is_meta else 'fake'} tensor of shape {tuple(tensor.shape)}: it has no data. "
            "Materialise it first, e.g. with `torch.empty_like(x, device='cpu')` or `module.to_empty(device='cpu')`."
        )
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        kind = f"{'nested ' if tensor.is_nested else ''}of layout {tensor.layout} and dtype {tensor.dtype}"
        raise TypeError(
            f"{name} is {kind}; JAX needs one dense array. Convert it first, with `.to_dense()`, "
            "`.dequantize()` or `.to_padded_tensor(0.)`."
        )


def _as_numpy(tensor: torch.Tensor) -> np.ndarray:
    is_native = tensor.dtype == torch.bool or tensor.is_complex()  # NumPy has these, and no bfloat16
    bits = tensor if is_native else tensor.view(getattr(torch, f"uint{8 * tensor.itemsize}"))
    return bits.numpy().view(dtypes.to_jax_dtype(tensor.dtype))


def _shares(array: jax.Array, tensor: torch.Tensor) -> bool:
    return jax.default_backend() == "cpu" and array.unsafe_buffer_pointer() == tensor.data_ptr()


def array_to_torch(array: jax.Array, *, copy: bool = False, name: str = "the array") -> torch.Tensor:
    """`to_torch` of one array; `name` is how errors call it."""
    if isinstance(array, Tracer):
        raise TypeError(
            f"to_torch: {name} is a traced array of type {jax.typeof(array)}: it has no data while JAX traces "
            "(jit, grad, vmap). Call torch code on it through `torchleaf.torch_function`."
        )
    try:
        dtype = dtypes.to_torch_dtype(array.dtype)
    except TypeError as exc:
        raise TypeError(f"to_torch: {name} of shape {array.shape}: {exc}") from None
    if array.is_deleted():
        raise TypeError(f"to_torch: {name} was deleted, most likely donated to a jitted function.")
    if len(array.sharding.device_set) > 1:
        raise ValueError(
            f"to_torch: {name} of shape {array.shape} lies on {len(array.sharding.device_set)} devices "
            f"({array.sharding}). Gather it first with `jax.device_put(x, device)`, or convert its "
            "`addressable_shards` one by one."
        )
    try:
        tensor = torch.from_dlpack(array)
    except BufferError:  # a dtype both frameworks have but DLPack between them has not
        bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
        tensor = torch.from_dlpack(bits).view(dtype)
    return tensor.clone() if copy else tensor


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the strides are a permutation of a contiguous layout: the ones XLA can view."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def is_aligned(tensor: torch.Tensor) -> bool:
    """Whether XLA's programs take a tensor where it is: those for GPUs refuse other addresses, which JAX does not look
    at; weights of cuDNN's have them, and parts of tensors.
    """
    return not tensor.is_cuda or tensor.data_ptr() % _GPU_ALIGNMENT == 0


_WIDE_INTEGERS = (torch.int64, torch.uint64)
_GPU_ALIGNMENT = 16  # bytes


def check_range(values: np.ndarray, wanted: np.dtype, name: str) -> None:
    """`OverflowError` if integers do not fit the dtype JAX gives them: JAX itself would wrap them."""
    info, low, high = np.iinfo(wanted), int(values.min()), int(values.max())
    if low < info.min or high > info.max:
        raise OverflowError(
            f"{name} ({values.dtype}, values {low} to {high}) does not fit {wanted}, the widest "
            "integer JAX has here. Enable 64-bit types with `jax.config.update('jax_enable_x64', True)`."
        )
