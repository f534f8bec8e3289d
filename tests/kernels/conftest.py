"""The accuracy rule as a fixture."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from catimage_accel.kernels.accuracy import allowed_error, largest_error

AssertAccurate = Callable[[Tensor, Tensor, Tensor], None]


@pytest.fixture
def assert_accurate() -> AssertAccurate:
    """``(ours, torchs, exact)``: our error against the float64 result is at most twice that of torch's own op."""

    def check(ours: Tensor, torchs: Tensor, exact: Tensor) -> None:
        assert (ours.shape, ours.dtype) == (torchs.shape, torchs.dtype)
        assert exact.dtype == torch.float64
        assert largest_error(ours, exact) <= allowed_error(torchs, exact)

    return check
