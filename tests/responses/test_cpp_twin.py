"""Every response that numbers describe has one kind in csrc/common/mask.h, with the same gains."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import cases
from freemerge import _core, filtered
from freemerge.responses import (
    RESPONSES,
    Butterworth,
    Gaussian,
    MaskParams,
    Response,
    has_closed_form,
    transposed,
)

CLOSED_FORMS = [response for response in cases.RESPONSES if has_closed_form(response)]
SHAPES = sorted({shape[-2:] for shape in cases.SHAPES} | {(12, 30), (64, 64), (1, 40), (40, 1), (96, 24), (140, 140)})
COMPARED_BIT_BY_BIT = ("steps", "official", "center")  # the others round in different places


def test_the_case_list_has_every_response() -> None:
    listed = {type(response) for response in CLOSED_FORMS}
    assert listed == {*RESPONSES.values()}, "tests/cases.py needs an example of each response"


def test_every_kind_has_its_response() -> None:
    kinds = {response.params((8, 8)).kind for response in CLOSED_FORMS}
    assert kinds == {*_core.MASK_KINDS} - {"table"}


@pytest.mark.parametrize("response", CLOSED_FORMS, ids=str)
def test_gains_agree_on_every_bin(response: Response) -> None:
    for shape in SHAPES:
        turned = (transposed(response),) if len(shape) == 2 else ()
        for described in (response, *turned):
            params = described.params(shape)
            allowed = 0 if params.kind in COMPARED_BIT_BY_BIT else 1e-14
            gains = described.half_mask(shape)
            np.testing.assert_allclose(_core.mask_gains(params), gains, rtol=0, atol=allowed, err_msg=str(shape))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("options", [{}, {"unit": "bins"}, {"metric": "normalized"}], ids=str)
@pytest.mark.parametrize("cutoff", [1e-12, 1e-200, 5e-324])
def test_cutoffs_next_to_zero_remove_the_mean_alone(cutoff: float, options: dict[str, Any]) -> None:
    for response in (Gaussian(cutoff, **options), Butterworth(cutoff, **options)):
        for shape in ((6, 8), (7,), (1, 1)):
            gains = response.half_mask(shape)
            np.testing.assert_array_equal(_core.mask_gains(response.params(shape)), gains)
            assert (gains.flat[0], gains.sum()) == (0, gains.size - 1)
            box = response.box(shape, 1e-8)
            assert box is not None
            assert min(box.bands) >= 1, "the mean is in the box"
        assert float(filtered(torch.ones(64, 48), response).abs().max()) < 1e-6


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("cutoff", [5e-324, 1e-200, 1e-160, 1e-90, 1e90, 1e160, 1e200, 1e308])
@pytest.mark.parametrize("order", [1e-4, 1e-3, 0.01, 0.2, 1, 1.5])
def test_cutoffs_whose_square_is_no_number_count_with_a_small_order(cutoff: float, order: float) -> None:
    response = Butterworth(cutoff, order, unit="bins")
    for shape in ((6, 8), (7,)):
        gains = response.half_mask(shape)
        np.testing.assert_allclose(_core.mask_gains(response.params(shape)), gains, rtol=0, atol=1e-14)
        exponent = 2 * order * (math.log(cutoff) - 0.5 * math.log(2.0 if len(shape) == 2 else 1.0))
        at_one = gains[1, 1] if len(shape) == 2 else gains[0, 1]
        assert at_one == pytest.approx(1 / (1 + math.exp(min(exponent, 700.0))), rel=1e-11, abs=1e-300)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown mask kind 'other'"):
        _core.mask_gains(MaskParams("other", 4, 4))
