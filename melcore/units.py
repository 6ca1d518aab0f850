"""Sizes of memory as people type and read them: ``12GiB``, ``512 MiB``."""

import re

from melcore.errors import ConfigError

_PREFIXES = "kmgtp"
_PATTERN = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(?:([kmgtp])(i?)b?|b)?\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Read a number of bytes.

    Parameters
    ----------
    text
        A number with an optional unit: ``GiB`` and plain ``G`` count in powers of 1024, as ``free`` and job schedulers
        do, ``GB`` in powers of 1000.

    Raises
    ------
    ConfigError
        If `text` is no size.

    Examples
    --------
    >>> parse_bytes("12GiB"), parse_bytes("1.5 MB"), parse_bytes("4096")
    (12884901888, 1500000, 4096)
    """
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise ConfigError(f"expected a size such as 12GiB, 512MiB or 4096 (bytes), but got {text!r}.")
    number, prefix, binary = match.groups()
    if prefix is None:
        return round(float(number))
    decimal = not binary and match.group(0).strip().lower().endswith("b")
    return round(float(number) * (1000 if decimal else 1024) ** (_PREFIXES.index(prefix.lower()) + 1))


def format_bytes(count: float) -> str:
    """Write a number of bytes with three significant figures in powers of 1024.

    Examples
    --------
    >>> format_bytes(12884901888), format_bytes(1500000), format_bytes(12)
    ('12.0 GiB', '1.43 MiB', '12 B')
    """
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1000 or unit == "TiB":
            break
        size /= 1024
    if unit == "B":
        return f"{size:.0f} B"
    decimals = 2 if abs(size) < 9.995 else 1 if abs(size) < 99.95 else 0
    return f"{size:.{decimals}f} {unit}"
