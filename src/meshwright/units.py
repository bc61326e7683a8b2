"""Numbers as people read them. Memory is in binary units (GiB), rates are in decimal ones (GB/s)."""

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
KB, MB, GB, TB = 10**3, 10**6, 10**9, 10**12

_BINARY = ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB"))
_DECIMAL = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_COUNT = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))


def format_bytes(num_bytes: float) -> str:
    """Memory or payload: `512 B`, `1.50 GiB`."""
    return _scaled(num_bytes, _BINARY, "B")


def format_bandwidth(bytes_per_second: float) -> str:
    """A rate of bytes, decimal as vendors print it: `450 GB/s`."""
    return _scaled(bytes_per_second, tuple((size, f"{prefix}B/s") for size, prefix in _DECIMAL), "B/s")


def format_flops(flops_per_second: float) -> str:
    """A rate of arithmetic: `989 TFLOP/s`."""
    return _scaled(flops_per_second, tuple((size, f"{prefix}FLOP/s") for size, prefix in _DECIMAL), "FLOP/s")


def format_count(number: float) -> str:
    """Parameters or tokens: `8.03 B`, `768`."""
    return _scaled(number, _COUNT, "")


def format_seconds(seconds: float) -> str:
    """A duration: `12.3 ms`, `3 min 20 s`, `2 h 05 min`."""
    if seconds >= 3600:
        minutes = round(seconds / 60)
        return f"{minutes // 60} h {minutes % 60:02d} min"
    if round(seconds) >= 60:
        return f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"
    if seconds == 0:
        return "0 s"
    return _scaled(seconds, _SECONDS, "ns", smallest=1e-9)


def _scaled(value: float, units: tuple[tuple[float, str], ...], plain: str, smallest: float = 1.0) -> str:
    """Three significant digits in the largest unit that leaves at least 1 before the point."""
    for index, (size, unit) in enumerate(units):
        if abs(value) >= size:
            digits = _three_digits(value / size)
            step = units[index - 1][0] / size if index else float("inf")
            if abs(float(digits)) >= step:  # 999.9 rounds up into the next unit
                return f"{_three_digits(value / units[index - 1][0])} {units[index - 1][1]}"
            return f"{digits} {unit}"
    return f"{_three_digits(value / smallest)} {plain}".rstrip()


def _three_digits(value: float) -> str:
    """`1.50`, `15.0`, `150`, `1024`; whole numbers without a point."""
    if value == int(value):
        return str(int(value))
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f}"
