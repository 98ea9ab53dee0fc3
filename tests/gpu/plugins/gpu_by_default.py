"""A pytest plugin: torch makes tensors on the GPU, as JAX does, so that tests of the CPU run there."""

import torch

_OF_THE_CPU = {
    "test_another_process_with_more_threads_draws_the_same": "of threads of the CPU",
    "test_autocast": "autocast of the CPU",
    "in_jax[remat-torch-everything_saveable]": "no graph crosses a `remat` on a GPU",
    "test_devices": "moves between the CPU and others",
    "sort with ties": "takes NumPy arrays of tensors",
    "linalg_eig.default": "takes NumPy arrays of tensors",
    "test_gradients_have_the_bits_of_torch": "takes NumPy arrays of tensors",
    "test_leaves_outlive_the_torch_module": "takes NumPy arrays of tensors",
    "test_no_copy_on_the_way_in_or_out": "looks into how the CPU's memory is shared",
    "test_operands_on_two_devices": "of the CPU and another one",
    "test_parameters_and_residuals_are_viewed_once": "arrays of the CPU alone are kept",
    "test_packed_sequence_converts": "torch wants lengths on the CPU",
    "test_packed_sequences_of_other_lengths_are_other_signatures": "torch wants lengths on the CPU",
    "test_packing_inside_a_module": "torch wants lengths on the CPU",
    "test_recurrent_layer_on_packed_sequence": "torch wants lengths on the CPU",
    "test_threads_draw_while_torch_draws": "a default device is one thread's",
    "through_numpy": "takes NumPy arrays of tensors",
}
"""Parts of the names of tests, and why they are not for a GPU."""

if torch.cuda.is_available():
    torch.set_default_device("cuda")
    torch.backends.cudnn.allow_tf32 = False  # torch's default, for convolutions and recurrent layers


def pytest_configure(config):
    for message in (
        "RNN module weights are not part of single contiguous chunk",  # torch's own calls, of functions
        "TensorFloat32 tensor cores for float32 matrix multiplication available",  # torch.compile's advice
        "vmap of .*aten.._thnn_differentiable_",  # torch has no batching rule for these
    ):
        config.addinivalue_line("filterwarnings", f"ignore:{message}")


def pytest_collection_modifyitems(config, items):
    other = [item for item in items if any(part in item.name for part in _OF_THE_CPU)]
    config.hook.pytest_deselected(items=other)
    items[:] = [item for item in items if item not in other]
