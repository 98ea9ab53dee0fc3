"""`to_jax` and `to_torch` of one array: dtypes, layouts, shared memory, and what cannot cross."""

import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from fresh_process import run_python
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import ALL, NARROW, WIDE, dtype_id, raw_bytes, sample
from torch._subclasses.fake_tensor import FakeTensorMode
from torchleaf import to_jax, to_torch


def _jax_dtype(dtype: torch.dtype) -> np.dtype:
    name = dtype_id(dtype)
    return np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)


def _shares_memory(array: jax.Array, tensor: torch.Tensor) -> bool:
    return array.unsafe_buffer_pointer() == tensor.data_ptr()


# --- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3), (), (0,), (3, 0, 2), (1, 1)])
@pytest.mark.parametrize("dtype", NARROW, ids=dtype_id)
def test_dtype_round_trip(dtype, shape):
    tensor = sample(dtype, shape)
    array = to_jax(tensor)
    assert (array.dtype, array.shape) == (_jax_dtype(dtype), shape)
    assert raw_bytes(array) == raw_bytes(tensor)
    back = to_torch(array)
    assert (back.dtype, back.shape) == (dtype, shape)
    assert raw_bytes(back) == raw_bytes(tensor)


@pytest.mark.parametrize("dtype", ALL, ids=dtype_id)
def test_dtype_is_shared_under_x64(dtype, x64):
    tensor = sample(dtype)
    array = to_jax(tensor)
    assert array.dtype == _jax_dtype(dtype)
    assert raw_bytes(array) == raw_bytes(tensor)
    assert _shares_memory(array, tensor)
    back = to_torch(array)
    assert back.dtype == dtype
    assert _shares_memory(array, back)


@pytest.mark.parametrize("shape", [(2, 3), (), (0, 2)])
@pytest.mark.parametrize(("wide", "narrow"), WIDE.items(), ids=dtype_id)
def test_wide_dtypes_become_narrow_ones_without_x64(wide, narrow, shape):
    tensor = sample(wide, shape)
    array = to_jax(tensor)
    assert array.dtype == _jax_dtype(narrow)
    assert raw_bytes(array) == raw_bytes(tensor.to(narrow))
    assert to_torch(array).dtype == narrow


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.int64, 2**31), (torch.int64, -(2**31) - 1), (torch.uint64, 2**32), (torch.uint64, 2**63)],
)
def test_integers_outside_the_32_bit_range_raise(dtype, value):
    with pytest.raises(OverflowError, match=rf"leaf 0.*{value}.*jax_enable_x64"):
        to_jax(torch.tensor([1, value], dtype=dtype))


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.int64, 2**31 - 1), (torch.int64, -(2**31)), (torch.uint64, 2**32 - 1)]
)
def test_integers_at_the_ends_of_the_32_bit_range_pass(dtype, value):
    assert to_jax(torch.tensor([value], dtype=dtype)).item() == value


def test_wide_integers_pass_under_x64(x64):
    assert to_jax(torch.tensor([2**62])).item() == 2**62
    assert to_jax(torch.tensor([2**63], dtype=torch.uint64)).item() == 2**63


def test_special_floats_keep_their_bits():
    tensor = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45])
    assert raw_bytes(to_torch(to_jax(tensor))) == raw_bytes(tensor)


# --- layouts -------------------------------------------------------------------------------------

_X = torch.arange(120.0).reshape(2, 3, 4, 5)
_C = torch.complex(torch.arange(6.0), torch.arange(6.0) - 9).reshape(2, 3)

DENSE = {
    "contiguous": _X,
    "transposed": _X.transpose(0, 3),
    "permuted": _X.permute(2, 0, 3, 1),
    "channels_last": _X.to(memory_format=torch.channels_last),
    "channels_last_3d": torch.arange(240.0).reshape(1, 2, 3, 8, 5).to(memory_format=torch.channels_last_3d),
    "singleton of odd stride": torch.empty_strided((1, 3), (77, 1)).copy_(torch.arange(3.0)),
    "leading rows": _X[:1],
    "unsqueezed": torch.arange(3.0)[:, None, None],
    "requires_grad": _X.clone().requires_grad_(),
    "parameter": torch.nn.Parameter(_X.transpose(0, 1)),
    "result of a graph": torch.ones(3, requires_grad=True) * 2,
    "flipped": _X.flip(0, 2),
    "conj of conj": _C.conj().conj(),
}
COPIED = {
    "gap": _X[:, ::2],
    "column": _X[..., 0],
    "stride 0": _X[:1].expand(7, 3, 4, 5),
    "all stride 0": torch.tensor(3.0).expand(2, 3),
    "overlapping": torch.arange(10.0).unfold(0, 3, 1),
    "misaligned": torch.arange(10.0)[1:],
    "misaligned bytes": torch.arange(10, dtype=torch.uint8)[3:],
    "misaligned transposed": torch.arange(13.0)[1:].view(3, 4).T,
    "conj": _C.conj(),
    "transposed conj": _C.mH,
    "neg": _C.conj().imag,
    "real part": _C.real,
    "diagonal": _X[0, 0, :, :4].diagonal(),
}
LAYOUTS = {**DENSE, **COPIED}


@pytest.mark.parametrize("tensor", LAYOUTS.values(), ids=LAYOUTS)
def test_layout_keeps_values(tensor):
    array = to_jax(tensor)
    assert raw_bytes(array) == raw_bytes(tensor)
    assert raw_bytes(to_torch(array)) == raw_bytes(tensor)


@pytest.mark.parametrize("tensor", LAYOUTS.values(), ids=LAYOUTS)
def test_layout_computes_correctly_under_jit(tensor):
    array = to_jax(tensor)

    @jax.jit
    def compute(x):
        return x * 2, jnp.moveaxis(x, 0, -1).reshape(-1), x.sum(0), x[-1]

    expected = tensor.detach().resolve_conj().resolve_neg().numpy().copy()
    for got, wanted in zip(compute(array), compute(jnp.array(expected)), strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("tensor", DENSE.values(), ids=DENSE)
def test_dense_layout_is_viewed(tensor):
    array = to_jax(tensor)
    assert _shares_memory(array, tensor)
    back = to_torch(array)
    assert _shares_memory(array, back)
    several = [i for i, size in enumerate(tensor.shape) if size > 1]  # other strides mean nothing
    assert [back.stride(i) for i in several] == [tensor.stride(i) for i in several]


@pytest.mark.parametrize("tensor", COPIED.values(), ids=COPIED)
def test_other_layout_is_copied(tensor):
    assert not _shares_memory(to_jax(tensor), tensor)


@pytest.mark.parametrize("tensor", LAYOUTS.values(), ids=LAYOUTS)
def test_copy_shares_nothing(tensor):
    array = to_jax(tensor, copy=True)
    assert not _shares_memory(array, tensor)
    assert raw_bytes(array) == raw_bytes(tensor)
    back = to_torch(array, copy=True)
    assert not _shares_memory(array, back)
    assert raw_bytes(back) == raw_bytes(tensor)


@pytest.mark.parametrize("dtype", ALL, ids=dtype_id)
@pytest.mark.parametrize("enabled", [False, True], ids=["x32", "x64"])
def test_copy_is_a_copy_for_every_dtype(dtype, enabled):
    with jax.enable_x64(enabled):
        tensor = sample(dtype)
        array = to_jax(tensor, copy=True)
        before = raw_bytes(array)
        tensor.zero_() if dtype != torch.float8_e8m0fnu else tensor.fill_(1)
        assert raw_bytes(array) == before
        assert not _shares_memory(array, to_torch(array, copy=True))


def test_torch_writes_show_through_a_view():
    tensor = torch.zeros(4)
    array = to_jax(tensor)
    tensor.add_(3)
    np.testing.assert_array_equal(array, np.full(4, 3.0, np.float32))


def test_view_keeps_the_memory_alive():
    array = to_jax(torch.arange(1000.0))
    tensor = to_torch(jnp.arange(1000.0))
    _ = [torch.zeros(1000) for _ in range(10)], [jnp.zeros(1000) for _ in range(10)]
    np.testing.assert_array_equal(array, np.arange(1000, dtype=np.float32))
    assert torch.equal(tensor, torch.arange(1000.0))


def test_result_needs_no_gradient():
    assert not to_torch(to_jax(torch.nn.Parameter(torch.ones(3)))).requires_grad


def test_donating_a_view_leaves_torch_memory_alone():
    tensor = torch.arange(16.0)
    array = to_jax(tensor)
    result = jax.jit(lambda x: x * 3, donate_argnums=0)(array)
    assert array.is_deleted()
    np.testing.assert_array_equal(result, 3 * np.arange(16, dtype=np.float32))
    assert torch.equal(tensor, torch.arange(16.0))


# --- what cannot cross ---------------------------------------------------------------------------


def _quietly(make):
    """Torch warns that these tensors are experimental or deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def _fake():
    with FakeTensorMode():
        return torch.ones(3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.eye(3).to_sparse(), r"sparse_coo.*to_dense"),
        (lambda: torch.eye(3).to_sparse_csr(), r"sparse_csr.*to_dense"),
        (lambda: torch.eye(3).to_mkldnn(), r"_mkldnn.*to_dense"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), r"jagged"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), r"nested"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), r"qint8.*dequantize"),
        (lambda: torch.ones(3, device="meta"), r"meta tensor of shape \(3,\).*to_empty"),
        (_fake, r"fake tensor of shape \(3,\)"),
        (lambda: torch.ones(3, dtype=torch.complex32), r"torch\.complex32 has no JAX counterpart"),
    ],
    ids=["sparse", "csr", "mkldnn", "jagged", "nested", "quantized", "meta", "fake", "complex32"],
)
def test_tensor_without_a_dense_array_behind_it(make, message):
    tensor = _quietly(make)
    with pytest.raises(TypeError, match=message):
        _quietly(lambda: to_jax({"w": tensor}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jnp.ones(3, jnp.int4), r"to_torch: leaf 0.*int4.*astype"),
        (lambda: jax.random.key(0), r"to_torch: leaf 0.*key<fry>.*jax\.random\.key_data"),
        (lambda: _deleted(jnp.ones(3)), r"to_torch: leaf 0.*deleted.*donated"),
    ],
    ids=["int4", "PRNG key", "deleted"],
)
def test_array_without_a_tensor_counterpart(make, message):
    with pytest.raises(TypeError, match=message):
        to_torch([make()])


def _deleted(array):
    array.delete()
    return array


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.grad], ids=["jit", "vmap", "grad"])
def test_traced_array_raises(transform):
    with pytest.raises(TypeError, match=r"to_torch: leaf 1 is a traced array.*torch_function"):
        transform(lambda x: to_torch((np.ones(2), x)))(jnp.ones(()) if transform is jax.grad else jnp.ones(3))


@pytest.mark.long
def test_arrays_on_several_devices():
    """A sharded and a replicated array raise; one device of several, and the shards, convert."""
    script = """
        import jax, jax.numpy as jnp, numpy as np, torch
        from jax.sharding import NamedSharding, PartitionSpec
        from torchleaf import to_torch
        mesh = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
        x = jnp.arange(8.0)
        for spec in (PartitionSpec("i"), PartitionSpec()):
            spread = jax.device_put(x, NamedSharding(mesh, spec))
            try:
                to_torch({"a": spread})
            except ValueError as exc:
                for word in ("leaf 0", "4 devices", "device_put", "addressable_shards"):
                    assert word in str(exc), exc
            else:
                raise AssertionError("no error")
        spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("i")))
        parts = [to_torch(shard.data) for shard in spread.addressable_shards]
        assert torch.equal(torch.cat(parts), torch.arange(8.0))
        assert torch.equal(to_torch(jax.device_put(x, jax.devices()[3])), torch.arange(8.0))
    """
    run_python(script, XLA_FLAGS="--xla_force_host_platform_device_count=4")


# --- properties ----------------------------------------------------------------------------------

properties = settings(derandomize=True, deadline=None, database=None)
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@st.composite
def tensors(draw):
    """Any dtype and layout: a permuted, strided, shifted or broadcast window of a larger tensor."""
    dtype = draw(st.sampled_from(NARROW))
    shape = draw(shapes)
    steps = tuple(draw(st.integers(1, 3)) for _ in shape)
    shift = draw(st.integers(0, 2))
    tensor = sample(dtype, tuple(n * s + shift for n, s in zip(shape, steps, strict=True)))
    tensor = tensor[tuple(slice(shift, None, s) for s in steps)]
    if draw(st.booleans()):
        tensor = tensor.unsqueeze(0).expand(draw(st.integers(1, 3)), *tensor.shape)
    return tensor.permute(draw(st.permutations(range(tensor.ndim))))


@pytest.mark.long
@properties
@given(tensor=tensors(), copy=st.booleans())
def test_round_trip_is_exact(tensor, copy):
    array = to_jax(tensor, copy=copy)
    back = to_torch(array, copy=copy)
    assert tuple(array.shape) == tuple(back.shape) == tuple(tensor.shape)
    assert back.dtype == tensor.dtype
    assert raw_bytes(array) == raw_bytes(back) == raw_bytes(tensor)


@pytest.mark.long
@properties
@given(dtype=st.sampled_from(NARROW), shape=shapes, data=st.data())
def test_permuted_array_round_trips_from_jax(dtype, shape, data):
    """Arrays JAX made, and views of permuted tensors it then computes with."""
    order = data.draw(st.permutations(range(len(shape))))
    array = to_jax(sample(dtype, shape).permute(order))
    transposed = np.asarray(array).T
    assert raw_bytes(jax.jit(lambda x: x.T)(array)) == raw_bytes(transposed)
    assert raw_bytes(to_torch(jnp.array(transposed))) == raw_bytes(transposed)
    assert raw_bytes(to_torch(array)) == raw_bytes(array)
