"""Masks against their formulas, bin for bin, and what responses are as objects."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch

import freemerge as fm
from cases import RESPONSES
from freemerge import responses
from freemerge.responses import Response, base, from_config, to_config
from freemerge.responses.base import signed_frequencies
from freemerge.responses.radial import Radial

OFFICIAL_SHAPES = [(768, 768), (2304, 768), (3072, 768), (51, 33), (1, 768)]


def signed(k: int, n: int) -> int:
    return k if k <= n // 2 else k - n


def official_from_the_formula(height: int, width: int, ratio: float) -> np.ndarray:
    """1[dist <= ratio * min(H, W)] + 1[dist == min(H, W) // 10] around (H//2, W//2), unshifted, symmetrised."""
    y, x = torch.arange(height)[:, None], torch.arange(width)[None, :]
    distance = torch.sqrt((y - height // 2) ** 2 + (x - width // 2) ** 2)
    assert distance.dtype == torch.float32
    mask = ((distance <= ratio * min(height, width)).double() + (distance == min(height, width) // 10).double()).numpy()
    mirrored = mask[(-np.arange(height)) % height][:, (-np.arange(width)) % width]
    return (mask + mirrored) / 2


@pytest.mark.parametrize("shape", OFFICIAL_SHAPES)
@pytest.mark.parametrize("ratio", [0.7, 0.9, 0.6])
def test_official_mask_bin_for_bin(shape: tuple[int, int], ratio: float) -> None:
    assert np.array_equal(fm.Official(ratio).mask(shape), official_from_the_formula(*shape, ratio))


@pytest.mark.parametrize(
    ("shape", "removed"),
    [((768, 768), 113 / 589_824), ((2304, 768), 0.577), ((3072, 768), 0.683), ((50265, 768), 0.981)],
)
def test_official_mask_removes_what_was_published(shape: tuple[int, int], removed: float) -> None:
    assert fm.Official(0.7).removed_fraction(shape) == pytest.approx(removed, rel=1e-12 if shape[0] == 768 else 1e-3)


def test_official_ratio_9_removes_nothing_of_a_square() -> None:
    assert fm.Official(0.9).removed_fraction((768, 768)) == 0.0


@pytest.mark.parametrize("shape", [(12, 9), (7, 16), (1, 11), (5, 1)])
def test_high_pass_is_the_papers_formula(shape: tuple[int, int]) -> None:
    height, width = shape
    mask = fm.HighPass(0.3).mask(shape)
    for k in range(height):
        for l in range(width):  # noqa: E741
            radius = math.sqrt(signed(k, height) ** 2 + signed(l, width) ** 2)
            assert mask[k, l] == (radius >= round(0.3 * min(shape), 9))


def test_complements() -> None:
    for shape in ((31, 20), (8, 8), (1, 9)):
        assert np.array_equal(fm.LowPass(0.2).mask(shape), 1 - fm.HighPass(0.2).mask(shape))
        assert np.array_equal(fm.BandStop(0.1, 0.3).mask(shape), 1 - fm.BandPass(0.1, 0.3).mask(shape))
        assert np.array_equal(
            fm.BandPass(0.1, 0.3).mask(shape), fm.HighPass(0.1).mask(shape) - fm.HighPass(0.3).mask(shape)
        )
        assert np.array_equal(fm.BandGain(0.2, 0.5, 2).mask(shape), np.where(fm.HighPass(0.2).mask(shape) == 1, 2, 0.5))


def test_smooth_responses() -> None:
    shape = (40, 40)
    butterworth, gaussian = fm.Butterworth(0.25, 3).mask(shape), fm.Gaussian(0.25).mask(shape)
    assert butterworth[0, 0] == gaussian[0, 0] == 0
    assert butterworth[10, 0] == pytest.approx(0.5)
    assert butterworth[0, 20] == pytest.approx(1 / (1 + 0.5**6))
    assert gaussian[10, 0] == pytest.approx(1 - math.exp(-0.5))


def test_units_and_metrics() -> None:
    assert np.array_equal(fm.HighPass(8, unit="bins").mask((40, 20)), fm.HighPass(0.4).mask((40, 20)))
    wide = fm.HighPass(0.25, metric="normalized").mask((40, 20))
    assert wide[10, 0] == wide[0, 5] == 1
    assert wide[9, 0] == wide[0, 4] == 0


def test_a_cutoff_at_a_whole_radius_keeps_it() -> None:
    assert 0.55 * 100 > 55
    assert fm.HighPass(0.55).mask((200, 100))[55, 0] == 1


@pytest.mark.parametrize("cutoff", ["0.05", "0.1", "0.15", "0.3", "0.35", "0.45"])
def test_a_normalized_cutoff_at_a_radius_keeps_it(cutoff: str) -> None:
    """Against whole numbers: along an axis of any length, and anywhere in a few matrices."""
    exact, number = Fraction(cutoff), float(cutoff)
    axes = [(1, n) for n in (*range(4, 3000, 7), *range(20, 3000, 20))]
    for shape in [*axes, (140, 140), (51, 85), (60, 300)]:
        height, width = shape
        ky, kx = signed_frequencies(height)[:, None], np.arange(width // 2 + 1)
        distance = ((ky * width) ** 2 + (kx * height) ** 2) * exact.denominator**2  # exact below 2^53
        beyond = distance >= (height * width * exact.numerator) ** 2
        for response, gains in (
            (fm.HighPass(number, metric="normalized"), beyond),
            (fm.LowPass(number, metric="normalized"), ~beyond),
            (fm.BandPass(number, 9, metric="normalized"), beyond),
            (fm.BandPass(0, number, metric="normalized"), ~beyond),
            (fm.BandStop(number, 9, metric="normalized"), ~beyond),
            (fm.BandGain(number, 0, 1, metric="normalized"), beyond),
        ):
            assert np.array_equal(response.half_mask(shape), gains), (response, shape)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("ratio", [1e300, 1e307])
def test_the_official_mask_of_any_ratio(ratio: float) -> None:
    x = torch.randn(40, 60)
    assert torch.equal(fm.filtered(x, fm.Official(ratio)), fm.filtered(x, fm.Official(9.0)))


def test_gains_beyond_float32_are_refused() -> None:
    for gains in ({"low": 1e39, "high": 1.0}, {"low": 1.0, "high": -1e39}):
        with pytest.raises(fm.ArgumentError, match=r"must be a finite number of a size up to 3\.40282e\+38, got"):
            fm.BandGain(0.3, **gains)
    with pytest.raises(fm.ArgumentError, match="in float32, too"):
        fm.Custom([[1e39]])
    with pytest.raises(fm.ArgumentError, match="in float32, too"):
        fm.filtered(torch.randn(4, 6), fm.Custom(lambda ky, kx, shape: 1e39 + 0 * ky * kx))


@pytest.mark.parametrize("axis", [-1, -2])
def test_center_removes_means(axis: int) -> None:
    x = torch.randn(6, 9, dtype=torch.float64)
    expected = x - x.mean(axis, keepdim=True)
    torch.testing.assert_close(fm.filtered(x, fm.Center(axis), backend="torch"), expected, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("error")
def test_a_callable_may_return_float16_if_it_is_finite() -> None:
    def mask(gain: float) -> fm.Custom:
        return fm.Custom(lambda ky, kx, shape: np.full((ky * kx).shape, gain, np.float16))

    assert (mask(0.5).mask((4, 6)) == 0.5).all()
    with pytest.raises(fm.ArgumentError, match="mask callable must return finite real"):
        mask(float("inf")).mask((4, 6))


def test_custom_masks() -> None:
    shape = (6, 8)
    array = np.random.default_rng(0).normal(size=shape)
    symmetrised = fm.Custom(array).mask(shape)
    mirrored = array[(-np.arange(6)) % 6][:, (-np.arange(8)) % 8]
    assert np.allclose(symmetrised, (array + mirrored) / 2)
    assert fm.Custom(array) == fm.Custom(array.copy())
    assert hash(fm.Custom(array)) == hash(fm.Custom(array.copy()))
    assert fm.Custom(array) != fm.Custom(array + 1)
    with pytest.raises(fm.ArgumentError, match=r"mask has shape"):
        fm.Custom(array).mask((8, 6))
    with pytest.raises(fm.ArgumentError, match="must be a finite"):
        fm.Custom([[float("nan")]])
    with pytest.raises(fm.ArgumentError, match="callable returned shape"):
        fm.Custom(lambda ky, kx, shape: np.zeros(3)).mask(shape)
    masked = np.ma.masked_array(array, array > 0)
    with pytest.raises(fm.ArgumentError, match="mask must be a callable or an array of real numbers, got masked_array"):
        fm.Custom(masked)
    with pytest.raises(fm.ArgumentError, match="the mask callable must return finite real numbers, got masked_array"):
        fm.Custom(lambda ky, kx, shape: masked).mask(shape)
    for value in ([[1], [1, 2]], torch.ones(1, requires_grad=True), torch.ones(1, dtype=torch.bfloat16)):
        with pytest.raises(fm.ArgumentError, match="mask callable must return finite real"):
            fm.Custom(lambda ky, kx, shape, gain=value: gain).mask(shape)
    for wrong in (1 + 2j, float("nan"), "one"):
        with pytest.raises(fm.ArgumentError, match="mask callable must return finite real"):
            fm.Custom(lambda ky, kx, shape, gain=wrong: np.full((ky * kx).shape, gain)).mask(shape)


@pytest.mark.filterwarnings("error")
def test_a_mask_may_be_a_tensor_and_is_copied() -> None:
    tensor = torch.rand(4, 6, dtype=torch.float64)
    mask = fm.Custom(tensor)
    assert mask == fm.Custom(tensor.tolist())
    tensor.zero_()
    assert mask.mask((4, 6)).any()


def test_a_large_mask_is_written_in_few_words() -> None:
    mask = fm.Custom(np.ones((200, 300)))
    assert "(200, 300)" in repr(mask)
    assert len(str(fm.explain((200, 300), mask))) < 1000


@pytest.mark.parametrize("response", RESPONSES, ids=str)
@pytest.mark.parametrize("shape", [(12, 30), (7, 9), (1, 10), (9, 1), (33, 8)])
def test_derived_facts_agree_with_the_mask(response: Response, shape: tuple[int, int]) -> None:
    mask = response.mask(shape)
    half = response.half_mask(shape)
    assert np.array_equal(half, mask[:, : shape[1] // 2 + 1])
    mirrored = mask[(-np.arange(shape[0])) % shape[0]][:, (-np.arange(shape[1])) % shape[1]]
    assert np.allclose(mask, mirrored, atol=1e-15), "symmetrised"
    assert response.removed_fraction(shape) == pytest.approx(np.mean(1 - np.minimum(np.abs(mask), 1)))
    for column, gain in enumerate(response.column_gains(shape)):
        if not math.isnan(gain):
            assert np.all(half[:, column] == gain)
    for tolerance in (1e-3, 5e-8, 1e-13):
        box = response.box(shape, tolerance)
        if box is None:
            continue
        assert box.tail <= tolerance
        offset = [np.abs(np.array([signed(k, n) for k in range(n)])) for n in shape]
        offset = [n / 2 - o if at else o for o, n, at in zip(offset, shape, box.nyquist, strict=True)]
        outside = (offset[0][:, None] >= box.bands[0]) | (offset[1][None, :] >= box.bands[1])
        assert np.all(np.abs(mask[outside] - box.background) <= box.tail + 1e-15)


@pytest.mark.parametrize("response", [r for r in RESPONSES if not isinstance(r, fm.Custom)], ids=str)
def test_repr_is_code_and_config_goes_there_and_back(response: Response) -> None:
    assert eval(repr(response), {**vars(responses)}) == response
    assert from_config(to_config(response)) == response
    assert hash(from_config(to_config(response))) == hash(response)


def test_subclasses_are_registered_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "RESPONSES", dict(responses.RESPONSES))

    class Unfinished(Radial):
        pass

    @dataclass(frozen=True)
    class _Hidden(fm.Center):
        pass

    @dataclass(frozen=True)
    class Steeper(fm.Butterworth):
        order: float = 4

    assert {*base.RESPONSES} - {*responses.RESPONSES} == {"Steeper"}
    assert base.RESPONSES["Steeper"] is Steeper
    assert "Custom" not in base.RESPONSES, "a user's mask cannot be written down"


def test_the_package_exports_every_response() -> None:
    assert {*responses.RESPONSES} <= {*responses.__all__}
    for name, response in responses.RESPONSES.items():
        assert getattr(responses, name) is response


@pytest.mark.parametrize(
    "config", [None, "HighPass", {"cutoff": 0.4}, {"type": "Custom"}, {"type": ["HighPass"]}, {"type": "Radial"}]
)
def test_configs_of_no_response_are_refused(config: object) -> None:
    with pytest.raises(fm.ArgumentError, match=r"type one of BandGain, BandPass, .*, Official, got"):
        from_config(config)


def test_configs_with_wrong_options_are_refused() -> None:
    with pytest.raises(
        fm.ArgumentError, match="response HighPass has no option 'order', it takes cutoff, unit, metric"
    ):
        from_config({"type": "HighPass", "cutoff": 0.4, "order": 2})
    with pytest.raises(fm.ArgumentError, match=r"response HighPass: .*cutoff"):
        from_config({"type": "HighPass"})
    with pytest.raises(fm.ArgumentError, match="response Custom cannot be serialised"):
        to_config(fm.Custom([[1.0]]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fm.HighPass(-0.1), "cutoff must be"),
        (lambda: fm.HighPass(float("nan")), "cutoff must be"),
        (lambda: fm.HighPass("0.4"), "cutoff must be"),
        (lambda: fm.HighPass(0.1, unit="hertz"), "unit must be"),
        (lambda: fm.HighPass(0.1, metric="l1"), "metric must be"),
        (lambda: fm.HighPass(3, unit="bins", metric="normalized"), "cannot be combined"),
        (lambda: fm.BandPass(0.3, 0.1), "low must not exceed high"),
        (lambda: fm.Butterworth(0.1, 0), "order must be"),
        (lambda: fm.Gaussian(0), "cutoff must be"),
        (lambda: fm.BandGain(0.1, float("inf"), 1), "low must be"),
        (lambda: fm.BandGain(0.1, "a", 1), "low must be"),
        (lambda: fm.HighPass(10**400), "cutoff must be"),
        (lambda: fm.HighPass(True), "cutoff must be"),
        (lambda: fm.Custom("mask"), "mask must be a callable or an array of real numbers"),
        (lambda: fm.Custom(torch.ones(3, 3, requires_grad=True)), "mask must be a callable or an array of real"),
        (lambda: fm.Custom([[1j]]), "mask must be a callable or an array of real numbers"),
        (lambda: fm.Center(0), "axis must be"),
        (lambda: fm.Official(relative_to="mean"), "relative_to must be"),
    ],
)
def test_bad_parameters_are_named(make: object, message: str) -> None:
    with pytest.raises(fm.ArgumentError, match=message):
        make()  # type: ignore[operator]
