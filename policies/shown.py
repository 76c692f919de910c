"""How an error shows a value that somebody gave: escaped, on one line, and never longer than a glance takes."""

from reprlib import Repr

MOST_SHOWN = 80

# Bounded at every level, so that a value of many megabytes is not written out first.
_BRIEF = Repr()
_BRIEF.maxlevel, _BRIEF.maxdict, _BRIEF.maxlist, _BRIEF.maxtuple, _BRIEF.maxset = 4, 8, 16, 16, 16
_BRIEF.maxstring = _BRIEF.maxother = MOST_SHOWN + 2  # the quotes


def shown(value: object) -> str:
    """The value as Python writes it, at most `MOST_SHOWN` characters of it; what was cut is three dots."""
    if type(value) is int and value.bit_length() > 4 * MOST_SHOWN:  # Python refuses to write out very long ones
        return f"a whole number of {value.bit_length():,} bits"
    text = _BRIEF.repr(value)
    return text if len(text) <= MOST_SHOWN + 2 else f"{text[: MOST_SHOWN - 3]}..."
