"""What torch says where it cannot do something: RuntimeErrors all, told apart by their texts, here alone.

Where a text changes, what is done in place of the failure is not done: the error reaches the user. Each is provoked by
a test.
"""


def says_no_second_derivative(text: str) -> bool:
    """Whether a backward formula cannot be differentiated, or is marked `once_differentiable`."""
    return "is not implemented" in text or "once_differentiable" in text


def says_vmap_cannot(text: str) -> bool:
    """Whether `torch.func.vmap` met an op that it cannot batch."""
    return text.startswith("vmap: ")


def says_no_real_zeros(text: str) -> bool:
    """Whether an op wrote into a tangent of zeros, which has no memory."""
    return "ZeroTensors are immutable" in text


def says_leaf_written(text: str) -> bool:
    """Whether an op wrote into a leaf that requires gradients."""
    return "leaf Variable that requires grad is being used in an in-place" in text


def says_no_gradient_required(text: str) -> bool:
    """Whether gradients were asked for by a tensor that requires none."""
    return "does not require grad" in text


def says_no_evaluation_backward(text: str) -> bool:
    """Whether cuDNN's recurrent layers were to go backward in evaluation mode."""
    return "cudnn RNN backward can only be called in training mode" in text
