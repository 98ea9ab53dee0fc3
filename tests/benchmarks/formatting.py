"""Numbers and errors as text for tables and charts."""

import re

_UNITS = (("s", 1), ("ms", 1e3), ("µs", 1e6))


def duration(seconds: float) -> str:
    """In a unit that leaves three significant digits."""
    unit, scale = next(((u, s) for u, s in _UNITS if seconds * s >= 0.9995), _UNITS[-1])
    value = seconds * scale
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"


def factor(ratio: float) -> str:
    """A ratio with as many digits as mean something."""
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def short(error: str, length: int = 160) -> str:
    """An error on one line, without the machine's paths: of a traceback passed on as text, its last error."""
    raised = re.findall(r"^(?:[\w.]+: )*?[\w.]*(?:Error|Exception|Unsupported): .*", error, re.MULTILINE)
    line = " ".join((raised[-1] if raised else error).split())
    line = re.sub(r"(/[\w.+-]+)+/", "", re.sub(r"0x[0-9a-f]+", "0x...", line))
    return line if len(line) <= length else line[: length - 3] + "..."
