"""The test run checks types and shapes at every call of the packages."""

import pytest
import torch
from beartype.roar import BeartypeCallHintParamViolation
from jaxtyping import TypeCheckError

from analyses.records import number
from ntk.metrics import cka


def test_a_wrong_shape_is_found():
    with pytest.raises(TypeCheckError, match=r"parameters of ntk\.metrics\.cka"):
        cka(torch.zeros(2, 2, 2), torch.zeros(2))


def test_a_wrong_type_is_found_where_there_are_no_shapes():
    with pytest.raises(BeartypeCallHintParamViolation, match="violates type hint"):
        number(["1"])
