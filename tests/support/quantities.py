"""Kubernetes' resource quantities, such as `500m` and `1.5Gi`."""

from __future__ import annotations

import re
from decimal import Decimal

_QUANTITY = re.compile(r"([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))(n|u|m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei|[eE][+-]?[0-9]+)?")
_DECIMAL = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_BINARY: dict[str, int] = {
    unit: 2 ** (10 * (power + 1)) for power, unit in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"))
}


def parse_quantity(value: object) -> Decimal:
    """A resource quantity as a number.

    Raises:
        ValueError: it is none.
    """
    match = _QUANTITY.fullmatch(str(value))
    if match is None or isinstance(value, bool):
        raise ValueError(f"{value!r} is no quantity")
    number, unit = Decimal(match[1]), match[2] or ""
    if unit in _BINARY:
        return number * _BINARY[unit]
    return number.scaleb(_DECIMAL[unit] if unit in _DECIMAL else int(unit[1:]))
