"""Bytes as people read them: binary units, always named, three significant digits."""

GIB = 2**30


def readable_bytes(count: int | None) -> str:
    """Write a number of bytes as in "3.12 GiB" (GiB = 2**30), "unknown" for None."""
    if count is None:
        return "unknown"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            value = count / size
            return f"{value:,.0f} {unit}" if value >= 99.95 else f"{value:#.3g} {unit}".replace(". ", " ")
    return f"{count} bytes"
