"""torch's wording, provoked: a text that changes shows here, and not as a user's error."""

import pytest
import torch
from torchleaf.interop import wording


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, ct):
        return 2 * ctx.saved_tensors[0] * ct


def leaf():
    return torch.ones(3, requires_grad=True)


def marked_once_differentiable():
    x, ct = leaf(), leaf()
    (gradient,) = torch.autograd.grad(_Once.apply(x), x, ct, create_graph=True)
    gradient.sum().backward()


def without_second_derivative():
    logs = torch.randn(5, 1, 4).log_softmax(-1).requires_grad_()
    loss = torch.nn.functional.ctc_loss(logs, torch.tensor([[1, 2]]), torch.tensor([5]), torch.tensor([2]))
    (gradient,) = torch.autograd.grad(loss, logs, create_graph=True)
    gradient.sum().backward()


def batched_read():
    torch.func.vmap(lambda x: x * x.item())(torch.ones(3))


def write_into_zeros():
    torch._efficientzerotensor(3).add_(1)


def write_into_a_leaf():
    leaf().add_(1)


def backward_of_a_constant():
    torch.ones(3).sum().backward()


@pytest.mark.parametrize(
    ("provoke", "predicate"),
    [
        (marked_once_differentiable, wording.says_no_second_derivative),
        (without_second_derivative, wording.says_no_second_derivative),
        (batched_read, wording.says_vmap_cannot),
        (write_into_zeros, wording.says_no_real_zeros),
        (write_into_a_leaf, wording.says_leaf_written),
        (backward_of_a_constant, wording.says_no_gradient_required),
    ],
    ids=lambda f: f.__name__,
)
@pytest.mark.all_cases
def test_wording(provoke, predicate):
    with pytest.raises(RuntimeError) as failure:
        provoke()
    assert predicate(str(failure.value))
    others = {value for name, value in vars(wording).items() if name.startswith("says_")} - {predicate}
    assert not any(other(str(failure.value)) for other in others)


@pytest.mark.gpu
def test_wording_of_cudnn():
    layer, x = torch.nn.GRU(3, 3).cuda().eval(), torch.ones(4, 3, device="cuda", requires_grad=True)
    with pytest.raises(RuntimeError) as failure:
        layer(x)[0].sum().backward()
    assert wording.says_no_evaluation_backward(str(failure.value))
