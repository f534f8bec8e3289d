"""The accuracy rule that every op and implementation is held to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

AssertAccurate = Callable[[Tensor, Tensor, Tensor], None]


@pytest.fixture
def assert_accurate() -> AssertAccurate:
    """``(ours, torchs, exact)``: our error against the float64 result is at most twice that of torch's own op.

    The hair that is added is half a unit in the last place of the largest value: what rounding the exact result costs.
    """

    def check(ours: Tensor, torchs: Tensor, exact: Tensor) -> None:
        assert (ours.shape, ours.dtype) == (torchs.shape, torchs.dtype)
        assert exact.dtype == torch.float64
        if exact.numel() == 0:
            return
        error, torch_error = ((result.double() - exact).abs().max().item() for result in (ours, torchs))
        hair = torch.finfo(ours.dtype).eps / 2 * exact.abs().max().item()
        assert error <= 2 * torch_error + hair

    return check
