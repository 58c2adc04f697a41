"""Formatting of sizes and tables as text."""

from collections.abc import Sequence


def human(size: float) -> str:
    """Format a number of bytes with a unit: "512 B", "1.5 KiB", "2.00 GiB"."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def columns(rows: Sequence[Sequence[object]], right: int = 0) -> str:
    """Format rows of equal length as aligned columns; the last `right` columns are right-aligned."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    count = len(widths)

    def cell(text: str, i: int) -> str:
        return f"{text:>{widths[i]}}" if i >= count - right else f"{text:<{widths[i]}}"

    return "\n".join("  ".join(cell(str(value), i) for i, value in enumerate(row)).rstrip() for row in rows)
