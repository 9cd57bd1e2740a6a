"""What is expected of a codec, and which tensors are outliers."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.pages import KEPT, WINT4, data_of, folder_of, row

from ernie_quant import codecs, plugins
from ernie_quant.codecs import Codec, _feedback
from ernie_quant.codecs.keep import Keep
from ernie_quant.codecs.rtn import CHANNEL, SCALES, RoundToNearest
from ernie_quant.reporting import expected, page, saved, usual

spec = importlib.util.spec_from_file_location("gaussian_errors", Path(__file__).parents[2] / "benchmarks/gaussian_errors.py")
assert spec
assert spec.loader
gaussian_errors = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gaussian_errors)

WEIGHTS, WIDTH = 1 << 18, 2048
CODECS = [codec for module in plugins.modules(codecs) for codec in module.EXAMPLES if not isinstance(codec, Keep)]


def data_free() -> Iterator[Codec]:
    """Every plug-in, and integers in all their ways; none that asks a text."""
    yield from (codec for codec in CODECS if getattr(codec, "method", _feedback.NEAREST) == _feedback.NEAREST)
    for bits, group, scale, full_range in itertools.product((2, 4, 8), (16, 32, 64, 128, CHANNEL), SCALES, (True, False)):
        yield RoundToNearest(bits, group, scale, full_range)


@pytest.mark.parametrize("codec", {codec.describe(): codec for codec in data_free()}.values(), ids=lambda c: c.describe())
def test_the_table_says_what_the_codec_does_today(codec: Codec) -> None:
    """Where a codec has changed: python benchmarks/gaussian_errors.py."""
    known = expected.of(codec.describe(), (WEIGHTS // WIDTH, WIDTH))
    assert known is not None, "has no line in ernie_quant/reporting/expected.py"
    assert gaussian_errors.measured(codec, WIDTH, WEIGHTS) == pytest.approx(known, rel=0.02)


@pytest.mark.parametrize("width", [48, 576, 3584, 9728])
def test_widths_between_those_measured(width: int) -> None:
    for codec in (RoundToNearest(4, CHANNEL, "absmax"), RoundToNearest(8, CHANNEL, "mse", False)):
        known = expected.of(codec.describe(), (width, width))
        assert known == pytest.approx(gaussian_errors.measured(codec, width, WEIGHTS), rel=0.02)


def test_nothing_is_expected_of_what_nobody_measured() -> None:
    by_text = [codec.describe() for codec in CODECS if getattr(codec, "method", _feedback.NEAREST) != _feedback.NEAREST]
    for codec in (*by_text, KEPT, "kept, fitted", "int4", "int5, group 64, mse", "int4, group 999999, mse", "q4_k", ""):
        assert expected.of(codec, (64, 64)) is None
    for shape in ((), (64, 8), (8, 10**9)):
        assert expected.of("int4, per channel, mse", shape) is None
    assert expected.of("int4, per channel, mse", (3, 64)) == expected.of("int4, group 64, mse", (3, 128)) == 0.00822


# --- outliers --------------------------------------------------------------------------------------------------------


def test_outliers_by_hand() -> None:
    """Nine errors around .01, half of them within 1%: a quarter off is the least that counts."""
    found = usual.of([0.01, 0.0099, 0.0101, 0.01, 0.01, 0.0098, 0.0102, 0.01, 0.0129])
    assert found
    assert (found.tensors, found.median, found.least, found.largest) == (9, 0.01, 0.0098, 0.0129)
    assert (found.low, found.high) == (0.008, 0.0125)
    assert [found.mark(x) for x in (0.0129, 0.0125, 0.01, 0.008, 0.0079, 0.0)] == ["high", "", "", "", "low", ""]


def test_where_errors_are_far_apart_more_is_usual() -> None:
    """Powers of two: the median distance is a factor of 4, the bounds are 4 ** (3.5 * 1.4826)."""
    found = usual.of([0.001 * 2**n for n in range(9)])
    assert found
    assert found.median == 0.016
    assert found.high == pytest.approx(0.016 * 4 ** (3.5 * 1.4826), rel=1e-3)


@pytest.mark.parametrize("errors", [[], [0.0] * 20, [0.0]], ids=str)
def test_without_errors_nothing_is_usual(errors: list[float]) -> None:
    assert usual.of(errors) is None


def test_of_few_tensors_nothing_can_be_said() -> None:
    found = usual.of([0.01] * 6 + [9.0])
    assert found
    assert (found.low, found.high, found.mark(9.0)) == (None, None, "")


def test_what_is_meant_to_differ_is_no_outlier() -> None:
    rows = [row(str(i), "mlp", WINT4, (64, 64), 4, 0.01) for i in range(10)]
    fitted = [replace(r, rel_error=0.2, fitted=True) for r in rows]
    found = usual.by_codec([*rows, *fitted])
    assert (found[WINT4].median, found[WINT4].high) == (0.01, 0.0125)
    assert usual.mark(fitted[0], found) == ""
    assert usual.mark(replace(rows[0], rel_error=0.2), found) == "high"
    assert usual.by_codec([*rows, *fitted, fitted[0]])[WINT4].high is None


def test_errors_without_bounds_are_no_trouble() -> None:
    found = usual.of([5e-324, 1e-300, 1e100, 1e99] * 4)
    assert found
    assert found.mark(1e100) in ("", "high")


def test_what_aims_at_more_than_the_weight_has_no_expectation(tmp_path: Path) -> None:
    rows = [row(f"model.layers.{i}.mlp.up_proj.weight", "mlp", WINT4, (64, 64), 4, 0.01) for i in range(4)]
    rows[3] = replace(rows[3], fitted=True)
    data = data_of(page.render(saved.read(folder_of(tmp_path / "out", rows))).decode())
    assert [(s["n"], s.get("expected"), s.get("fitted")) for s in data["series"]] == [(3, 0.01, None), (1, None, True)]
