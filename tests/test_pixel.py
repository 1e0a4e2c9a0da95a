"""Pixel functions in Preprocess: against NumPy on the sampled values, in float32, on both devices."""

from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest
from nbvision_kernels import codes
from nbvision_kernels.catalog import preprocess_kernel
from PIL import Image
from reference import on, to_host

import nbvision as nbv
from nbvision.errors import CompileError, InputError
from nbvision.ops import adjust
from nbvision.ops._loops import plan_loop
from nbvision.runtime import compile as compiling
from nbvision.runtime.compile import compile_without_spills, linked_ptx

SLOPE = 1.5  # a number of the module
TABLE = np.arange(256)[::-1] / 2.0  # a float64 array of the module


def halved(value):
    return value / 2


@nbv.pixel
def mixed(r, g, b, amount=2):
    """An integer and a float constant, a module's number, a function, an array, a branch."""
    if r > 100:
        r = r * SLOPE
    return r + 1, halved(g) * amount, TABLE[int(b)]


@nbv.pixel
def ramp(r, g, b, x, y, slope=1.0):
    return r + x * slope, g + y * slope, b


@nbv.pixel
def rotated(r, g, b):
    return g, b, r


def mixed_by_numpy(rgb, amount=2):
    r, g, b = rgb
    return np.stack([np.where(r > 100, r * np.float32(SLOPE), r) + 1, g / 2 * amount, 255 / 2 - b / 2]).astype("f4")


def sampled(image, device, **options):
    """(3, H, W) float32 in the order of the output."""
    return to_host(nbv.Preprocess((48, 64), **options)(on(device, image))[0])[0]


@pytest.fixture
def image(rng):
    return rng.integers(0, 256, (97, 113, 3), np.uint8)


@pytest.mark.parametrize("color", ["rgb", "bgr"])
@pytest.mark.parametrize("source", ["rgb", "bgr"])
@pytest.mark.parametrize("interpolation", ["linear", "nearest"])
def test_red_is_red_whatever_the_orders(device, image, source, color, interpolation):
    options = {"color": color, "fill": (200, 10, 60), "interpolation": interpolation}
    batch = nbv.ImageBatch.from_arrays([on(device, image)], color=source)
    plain = to_host(nbv.Preprocess((48, 64), **options)(batch)[0])[0]
    got = to_host(nbv.Preprocess((48, 64), pixel=mixed.bind(amount=3), **options)(batch)[0])[0]
    to_rgb = slice(None, None, -1 if color == "bgr" else 1)
    np.testing.assert_array_equal(got[to_rgb], mixed_by_numpy(plain[to_rgb], 3))


@pytest.mark.parametrize("channels", [1, 4])
def test_gray_and_alpha_sources(device, rng, channels):
    image = rng.integers(0, 256, (40, 50, channels), np.uint8)
    batch = nbv.ImageBatch.from_arrays([on(device, image)], color="gray" if channels == 1 else "rgba")
    plain = to_host(nbv.Preprocess((48, 64), color="bgr")(batch)[0])[0]
    got = to_host(nbv.Preprocess((48, 64), color="bgr", pixel=mixed)(batch)[0])[0]
    np.testing.assert_array_equal(got[::-1], mixed_by_numpy(plain[::-1]))


def test_position_is_the_canvas(device, image):
    y, x = np.mgrid[:48, :64].astype(np.float32)
    plain = sampled(image, device)
    got = sampled(image, device, pixel=ramp.bind(slope=0.25))
    np.testing.assert_array_equal(got, plain + np.stack([x * 0.25, y * 0.25, 0 * x]))


def test_functions_are_called_in_order_before_the_gain(device, image):
    plain = sampled(image, device)
    expected = mixed_by_numpy(plain)[[1, 2, 0]] * np.float32(0.5)
    np.testing.assert_array_equal(sampled(image, device, pixel=[mixed, rotated], scale=0.5), expected)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", ["uint8", "int8", "float16", "float32"])
def test_every_store_rounds_what_the_function_gave(device, image, dtype, layout):
    options = {"dtype": dtype, "layout": layout, "scale": 0.3}
    got = sampled(image, device, pixel=mixed, **options)
    expected = mixed_by_numpy(sampled(image, device)) * np.float32(0.3)
    if dtype in ("uint8", "int8"):
        limits = np.iinfo(dtype)
        expected = np.rint(expected).clip(limits.min, limits.max)
    expected = expected.astype(dtype)
    np.testing.assert_array_equal(got, expected if layout == "NCHW" else expected.transpose(1, 2, 0))


@pytest.mark.needs_cuda
@pytest.mark.parametrize("function", [mixed, ramp, rotated, adjust.hue, adjust.saturation, adjust.contrast])
def test_both_devices_give_the_same_bits(image, function):
    numbers = dict.fromkeys(function.numbers, 0.37)
    on_cpu, on_cuda = (sampled(image, device, pixel=function.bind(**numbers)) for device in ("cpu", "cuda"))
    np.testing.assert_array_equal(on_cpu, on_cuda)


# --- what compiles, and when -----------------------------------------------------------------------------------------


def test_another_number_compiles_nothing(device, image):
    sampled(image, device, pixel=mixed)
    compiled = compiling.load_kernel, plan_loop
    before = [function.cache_info().misses for function in compiled]
    for amount in (0.5, 7, -1e6):
        sampled(image, device, pixel=mixed.bind(amount=amount))
    assert [function.cache_info().misses for function in compiled] == before


def digest_of(function):
    return nbv.Preprocess((4, 4), pixel=function)._chain.digest


def made(constant, array=None):
    @nbv.pixel
    def function(r, g, b):
        return r * constant, g, b if array is None else array[0]

    return function


def test_equal_functions_share_their_code_on_disk():
    assert digest_of(made(2)) == digest_of(made(2))
    assert len({digest_of(made(2)), digest_of(made(3)), digest_of(made(2.0)), digest_of([made(2)] * 2)}) == 4
    assert digest_of(made(2, np.ones(3))) != digest_of(made(2, np.zeros(3)))
    assert digest_of(mixed) == digest_of(mixed.bind(amount=9))


def test_a_number_of_the_module_is_part_of_the_code(monkeypatch):
    before = digest_of(mixed)
    monkeypatch.setitem(globals(), "SLOPE", 2.5)
    assert digest_of(mixed) != before


@pytest.mark.slow
@pytest.mark.parametrize("cc", [(7, 5), (8, 6), (9, 0), (12, 0)])
def test_a_chain_is_float32_and_spills_nothing(cc):
    chain = nbv.Preprocess((4, 4), pixel=[mixed, ramp, adjust.hue, adjust.saturation])._chain
    kernel = preprocess_kernel(codes.LINEAR_EXACT, codes.NCHW, codes.STORE_F16, chain=chain)
    compiled = compile_without_spills(kernel, cc)
    assert compiled.spill_bytes == 0
    assert compiled.registers <= 128
    assert ".f64" not in linked_ptx(kernel, cc)


@pytest.mark.slow
def test_explain_says_what_runs(image):
    pre = nbv.Preprocess((48, 64), pixel=[ramp.bind(slope=0.5), rotated], dtype="float16")
    text = pre.explain(image, cc=(9, 0))
    assert "letterbox to 48 x 64" in text
    assert "ramp(slope=0.5)" in text
    assert "r, g, b = link_0(r, g, b, x, y, numbers[0])" in text
    assert "registers, 0 bytes spilled on sm_90" in text
    # 113 columns, and 2 of 97 lines for each of 48; 48 x 64 halves in three planes
    assert f"{96 * 113 * 3 / 1e6:.1f} MB read, {48 * 64 * 3 * 2 / 1e6:.1f} MB written, 1 images" in text


# --- functions that come along ---------------------------------------------------------------------------------------


def test_hue_is_colorsys(device, image):
    def turned(pixel):
        h, s, v = colorsys.rgb_to_hsv(*(pixel / 255.0))
        return np.array(colorsys.hsv_to_rgb((h + 0.3) % 1, s, v)) * 255

    plain = sampled(image, device)[:, ::4, ::4]
    got = sampled(image, device, pixel=adjust.hue.bind(shift=0.3))[:, ::4, ::4]
    np.testing.assert_allclose(got, np.apply_along_axis(turned, 0, plain), atol=1e-3)


ADJUSTED = {
    "brightness": (adjust.brightness.bind(factor=1.4), lambda v, luma: v * 1.4),
    "contrast": (adjust.contrast.bind(factor=0.3, center=90), lambda v, luma: v * 0.3 + 90 * 0.7),
    "saturation": (adjust.saturation.bind(factor=2), lambda v, luma: v * 2 - luma),
    "gamma": (adjust.gamma.bind(gamma=2.2, gain=1.1), lambda v, luma: 255 * 1.1 * (v / 255) ** 2.2),
    "grayscale": (adjust.grayscale, lambda v, luma: 0 * v + luma),
    "invert": (adjust.invert, lambda v, luma: 255 - v),
}


@pytest.mark.parametrize("name", ADJUSTED)
def test_adjustments_are_torchvisions_formulas(device, image, name):
    function, formula = ADJUSTED[name]
    plain = sampled(image, device).astype(np.float64)
    luma = 0.2989 * plain[0] + 0.587 * plain[1] + 0.114 * plain[2]
    got = sampled(image, device, pixel=function)
    np.testing.assert_allclose(got, np.clip(formula(plain, luma), 0, 255), atol=2e-3)


@pytest.mark.parametrize(("function", "mode"), [(adjust.to_hsv, "HSV"), (adjust.to_ycbcr, "YCbCr")])
def test_color_spaces_are_pillows(device, image, function, mode):
    """Within the level that Pillow's integers cost; a hue next to a whole turn may be at either end."""
    plain = sampled(image, device)
    expected = np.asarray(Image.fromarray(plain.astype(np.uint8).transpose(1, 2, 0)).convert(mode)).transpose(2, 0, 1)
    difference = np.abs(sampled(image, device, pixel=function) - expected)
    if mode == "HSV":
        difference[0] = np.minimum(difference[0], 255 - difference[0])
    assert difference.max() <= 1.01


# --- arguments -------------------------------------------------------------------------------------------------------


def test_it_stays_a_function():
    assert mixed(10.0, 4.0, 3, 3) == (11.0, 6.0, 126.0)
    assert mixed.bind(amount=5)(10.0, 4.0, 3) == (11.0, 10.0, 126.0)
    assert ramp(1.0, 2.0, 3.0, 10, 20) == (11.0, 22.0, 3.0)
    assert repr(ramp.bind(slope=0.5)) == "ramp(slope=0.5)"


def no_position(r, g, b, y, x):
    return r, g, b


def no_default(r, g, b, amount):
    return r, g, b


def itself(r, g, b):
    return itself(r, g, b)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda red, green, blue: (red, green, blue), r"takes \['red', 'green', 'blue'\]"),
        (lambda r, g, b, *rest: (r, g, b), "expected r, g, b"),
        (no_position, "'y' of no_position has no default"),
        (no_default, "'amount' of no_default has no default"),
        (lambda r, g, b, amount=math.nan: (r, g, b), "amount of <lambda> is nan"),
        (math.sin, "expected r, g, b"),
        (17, "is no Python function"),
    ],
)
def test_parameters_that_do_not_fit(function, message):
    with pytest.raises(InputError, match=message):
        nbv.pixel(function)


@pytest.mark.parametrize("given", [halved, 17, [mixed, halved], "mixed"])
def test_what_is_no_pixel_function(given):
    with pytest.raises(InputError, match="pixel"):
        nbv.Preprocess((4, 4), pixel=given)


def test_numbers_that_do_not_fit():
    with pytest.raises(InputError, match=r"no parameter 'amuont'; it has \['amount'\]"):
        mixed.bind(amuont=1)
    with pytest.raises(InputError, match="amount of mixed is inf"):
        mixed.bind(amount=math.inf)


def test_a_function_that_calls_itself():
    with pytest.raises(InputError, match="itself calls itself"):
        nbv.Preprocess((4, 4), pixel=nbv.pixel(itself))


SETTINGS = {"amount": 2}


def test_a_module_value_that_no_kernel_can_hold():
    @nbv.pixel
    def reads_settings(r, g, b):
        return r * SETTINGS["amount"], g, b

    with pytest.raises(InputError, match=r"uses \{'amount': 2\}"):
        nbv.Preprocess((4, 4), pixel=reads_settings)


def test_what_cannot_be_compiled_shows_the_line(device, image):
    @nbv.pixel
    def misspelt(r, g, b):
        return r, g.magnitude, b

    with pytest.raises(CompileError, match=r"(?s)magnitude.*test_pixel\.py.*return r, g\.magnitude, b"):
        sampled(image, device, pixel=misspelt)
