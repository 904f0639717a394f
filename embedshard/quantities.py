"""How quantities are written for people, four digits that mean something and units that fit, and sizes by them."""

from __future__ import annotations

__all__ = ["MISSING", "duration", "number", "parse_size", "share", "size"]

import math
import re
from typing import Final

MISSING = "—"
"""What stands where a quantity is not known."""

_UNITS: Final = {"": 1} | {
    f"{prefix}{binary}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for binary, base in (("", 10**3), ("I", 2**10))
}


def number(value: float | None) -> str:
    """Returns a number with four significant digits; whole numbers in full."""
    if value is None or not math.isfinite(value):
        return MISSING
    if isinstance(value, int) or not value:
        return f"{int(value):,}"
    magnitude = math.floor(math.log10(abs(value)))
    if not -5 < magnitude < 15:
        return f"{value:.3e}"
    return f"{value:,.{max(3 - magnitude, 0)}f}"


def share(value: float | None) -> str:
    """Returns a part of 1 as a percentage."""
    if value is None or not math.isfinite(value):
        return MISSING
    percent = 100 * value
    if not percent:
        return "0 %"
    return f"{percent:.2f} %" if abs(percent) >= 0.1 else f"{percent:.2g} %"


def size(count: float | None) -> str:
    """Returns a number of bytes in a unit that fits."""
    if count is None:
        return MISSING
    if count < 1024:
        return f"{count:,.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1024:
            return f"{count:,.1f} {unit}"
    return f"{count / 1024:,.1f} TiB"


def parse_size(text: str) -> int:
    """Returns the bytes of `2GB`, `512MiB`, `1.5 T` or a number.

    Raises:
        ValueError: if it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper().replace("_", ""))
    if found is None or found[2] not in _UNITS:
        raise ValueError("give a number of bytes, such as 2GB or 512MiB")
    return int(float(found[1]) * _UNITS[found[2]])


def duration(seconds: float | None) -> str:
    """Returns seconds as minutes and seconds, with hours where there are any."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
