"""Where kernels run in tests: on the GPU if there is one, else through Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from reference.interpreter import Counted, interpreted


@pytest.fixture
def flash_counted() -> Iterator[Counted | None]:
    """What the kernels of a test multiplied, so far; None on a GPU, where nobody counts."""
    if torch.cuda.is_available():
        yield None
        return
    pytest.importorskip("triton", reason="no GPU, and no Triton to interpret the kernels")
    with interpreted() as counted:
        yield counted


@pytest.fixture
def flash_device(flash_counted: Counted | None) -> torch.device:
    """The device of tensors that kernels are given."""
    return torch.device("cpu" if flash_counted is not None else "cuda")
