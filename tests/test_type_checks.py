"""The suite runs with the annotations of all of torchleaf checked, those with types of jaxtyping's and all others."""

import jaxtyping
import pytest
import torch
import torchleaf
from beartype.roar import BeartypeCallHintParamViolation, BeartypeCallHintReturnViolation
from torchleaf.interop.values import dtypes
from torchleaf.layers.module import gradient_hooks


class _Lying(torch.nn.Module):
    _torchleaf_gradient_hooks: object

    def __init__(self):
        super().__init__()
        self._torchleaf_gradient_hooks = 3


def test_an_argument():
    with pytest.raises(BeartypeCallHintParamViolation, match="canonical"):
        dtypes.canonical("float32")


def test_a_returned_value():
    with pytest.raises(BeartypeCallHintReturnViolation, match="hooks_of"):
        gradient_hooks.hooks_of(_Lying())


def test_a_function_with_types_of_jaxtypings():
    with pytest.raises(jaxtyping.TypeCheckError, match="to_jax"):
        torchleaf.to_jax({}, copy=3)


def test_a_name_that_is_imported_for_other_tools_alone_is_anything():
    gradient_hooks.copy_hooks([], torch.nn.ReLU(), copier=3)
    with pytest.raises(BeartypeCallHintParamViolation, match="weights"):
        gradient_hooks.copy_hooks(3, torch.nn.ReLU(), copier=3)


@pytest.mark.usefixtures("no_type_checks")
def test_as_users_run():
    assert gradient_hooks.hooks_of(_Lying()) == 3
    assert torchleaf.to_jax({}, copy=3) == {}
