"""numpy's bfloat16 against torch's."""

import numpy as np
import pytest
import torch

from fisherkit.floats import STORED, narrow, widen

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def bits(tensor: torch.Tensor) -> np.ndarray:
    """What torch stores."""
    return tensor.view(torch.uint8).numpy() if tensor.numel() else np.zeros(0, np.uint8)


@pytest.mark.parametrize("code", TORCH)
def test_rounding_is_torchs(code: str) -> None:
    random = np.random.default_rng(0)
    values = random.integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)  # every kind of float32
    values = np.concatenate([values, np.array([0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, 1e-45, 65520], np.float32)])
    ours = narrow(values, code)
    theirs = torch.from_numpy(values).to(TORCH[code])
    assert ours.dtype == STORED[code]
    number = ~np.isnan(values)
    assert (ours[number].view(np.uint8) == bits(theirs[torch.from_numpy(number)])).all()
    assert np.isnan(widen(ours, code)[~number]).all()


@pytest.mark.parametrize("code", ["BF16", "F16", "F32"])
def test_widening_is_exact(code: str) -> None:
    stored = np.arange(1 << 16, dtype=np.uint16) if code != "F32" else np.arange(1 << 16, dtype=np.uint32) * 65537
    theirs = torch.from_numpy(stored.view(np.int16 if code != "F32" else np.int32)).view(TORCH[code]).float().numpy()
    assert np.array_equal(widen(stored.view(STORED[code]), code), theirs, equal_nan=True)


def test_empty_and_scalar() -> None:
    assert narrow(np.zeros(0, np.float32), "BF16").shape == (0,)
    assert widen(narrow(np.float32(1.5).reshape(()), "BF16"), "BF16") == 1.5
