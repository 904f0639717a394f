"""Numbers as a person reads them."""

from __future__ import annotations

__all__ = ["size_text"]


def size_text(size_bytes: float) -> str:
    """Returns bytes in the unit that suits them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:,.0f} {unit}" if unit == "B" else f"{size_bytes:,.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:,.1f} TiB"
