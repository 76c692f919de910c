"""Units against exact rational arithmetic, and names against spelled-out messages."""

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim.text.names import nearest_first, unknown_name
from kvsim.text.units import (
    format_bytes,
    format_count,
    format_rate,
    format_s,
    parse_bytes,
    parse_duration_s,
    parse_tokens,
)
from policies.shown import shown


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("50k", 50_000),
        ("50K", 50_000),
        ("128Ki", 131_072),
        ("1M", 1_000_000),
        ("1.5k", 1_500),
        (" 7 ", 7),
        ("0", 0),
        ("2B", 2_000_000_000),
        ("1Mi", 1_048_576),
        ("1e3", 1_000),
        ("0.001k", 1),
    ],
)
def test_token_counts(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    # An 80 GiB card has 85,899,345,920 bytes; TB and GB are decimal, as drives and datasheets count.
    [
        ("80GiB", 85_899_345_920),
        ("2TB", 2 * 10**12),
        ("512MiB", 536_870_912),
        ("1000", 1000),
        ("1 kB", 1000),
        ("1.5KiB", 1536),
        ("3B", 3),
        ("1PiB", 2**50),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize(
    ("text", "duration_s"),
    [
        ("100ms", 0.1),
        ("10s", 10.0),
        ("2h", 7200.0),
        ("5us", 5e-6),
        ("1m", 60.0),
        ("1.5min", 90.0),
        ("3", 3.0),
        ("1d", 86_400.0),
        ("250 ns", 2.5e-7),
    ],
)
def test_durations(text: str, duration_s: float) -> None:
    assert parse_duration_s(text) == duration_s


@given(st.integers(0, 10**18 - 1), st.sampled_from([("", 0), ("Ki", 10), ("Mi", 20), ("Gi", 30)]))
def test_whole_numbers_of_a_unit_are_exact(number: int, unit: tuple[str, int]) -> None:
    name, power = unit
    assert parse_tokens(f"{number}{name}") == number << power
    assert parse_bytes(f"{number}{name}B") == number << power


@given(st.integers(0, 10**15), st.sampled_from(["ns", "us", "ms", "s"]))
def test_a_duration_is_the_float_nearest_to_what_is_written(number: int, unit: str) -> None:
    scale = {"ns": 10**9, "us": 10**6, "ms": 10**3, "s": 1}[unit]
    assert parse_duration_s(f"{number}{unit}") == float(Fraction(number, scale))


@pytest.mark.parametrize("parse", [parse_tokens, parse_bytes, parse_duration_s])
@pytest.mark.parametrize(
    "text", ["-5", "-1k", "nan", "inf", "-inf", "", "k", "1,000", "1/3", "0x10", "1__0", "٣", "1e999999999", "9" * 400]
)
def test_what_is_no_finite_number_from_zero_on_is_refused(parse: Callable[[str], float], text: str) -> None:
    with pytest.raises(ValueError, match=r"write it as '") as error:
        parse(text)
    assert shown(text) in str(error.value)


def test_an_unknown_unit_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"size '80GX' has the unknown unit 'GX'; known: B, kB, .*GiB.*; write it as"):
        parse_bytes("80GX")
    with pytest.raises(ValueError, match=r"duration '1M' has the unknown unit 'M'; known: .*min"):
        parse_duration_s("1M")


def test_fractions_of_a_byte_or_token_are_refused() -> None:
    with pytest.raises(ValueError, match=r"size '1\.5' is 1\.5, which is not a whole number"):
        parse_bytes("1.5")
    with pytest.raises(ValueError, match=r"token count '0\.0001k' is 0\.1, which is not a whole number"):
        parse_tokens("0.0001k")


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        (format_bytes(85_899_345_920), "80 GiB"),
        (format_bytes(3 * 2**39), "1.5 TiB"),
        (format_bytes(1023), "1,023 B"),
        (format_bytes(0), "0 B"),
        (format_s(0.0034), "3.4 ms"),
        (format_s(90), "1.5 min"),
        (format_s(1e-10), "0.1 ns"),
        (format_s(0), "0 s"),
        (format_s(math.inf), "inf s"),
        (format_rate(2.039e12, "B/s"), "2.039 TB/s"),
        (format_rate(989e12, "FLOP/s"), "989 TFLOP/s"),
        (format_rate(0, "B/s"), "0 B/s"),
        (format_count(12_031), "12,031"),
        (format_count(8_030_261_248), "8.03B"),
        (format_count(144_793_823), "144.8M"),
    ],
)
def test_printed_quantities(printed: str, expected: str) -> None:
    assert printed == expected


@given(st.integers(0, 2**60))
def test_printed_sizes_are_right_to_four_digits(size_bytes: int) -> None:
    number, unit = format_bytes(size_bytes).replace(",", "").split()
    powers = {"B": 0, "KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40, "PiB": 50}
    assert abs(Fraction(number) * 2 ** powers[unit] - size_bytes) <= Fraction(size_bytes, 2000)


@given(st.floats(1e-9, 1e7))
def test_printed_durations_are_right_to_four_digits(duration_s: float) -> None:
    number, unit = format_s(duration_s).replace(",", "").split()
    assert math.isclose(parse_duration_s(number + unit), duration_s, rel_tol=5.1e-4)


def test_an_unknown_name_lists_all_known_ones_nearest_first() -> None:
    error = unknown_name("policy", "shadowvk", ["full", "snapkv", "shadowkv"])
    assert isinstance(error, ValueError)
    assert str(error) == "unknown policy 'shadowvk'; did you mean 'shadowkv'? known: shadowkv, snapkv, full"


def test_a_name_like_no_other_gets_no_suggestion() -> None:
    assert str(unknown_name("GPU", "xyzzy", ["t4", "l40s"])) == "unknown GPU 'xyzzy'; known: t4, l40s"
    assert str(unknown_name("GPU", "t4", [])) == "unknown GPU 't4'; none is known"


@given(st.lists(st.text("abcde", min_size=1), unique=True, min_size=1), st.data())
def test_a_known_name_is_nearest_to_itself(known: list[str], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(known))
    ranked = nearest_first(name, known)
    assert ranked[0] == name
    assert sorted(ranked) == sorted(known)
