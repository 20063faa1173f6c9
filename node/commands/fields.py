"""Values as people type them."""

import math
import re

import click

_DIGEST = re.compile(r"[0-9a-f]{64}")


def digest_argument(context: click.Context, parameter: click.Parameter, value: str | None) -> bytes | None:
    """A digest or id: 64 lower-case hexadecimal digits. A click callback."""
    if value is None:
        return None
    if not _DIGEST.fullmatch(value):
        raise click.BadParameter(f"expected 64 lower-case hexadecimal digits, found {value!r}", context, parameter)
    return bytes.fromhex(value)


def hex_argument(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """As ``digest_argument``, kept as text."""
    digest_argument(context, parameter, value)
    return value


def number_argument(context: click.Context, parameter: click.Parameter, value: float) -> float:
    """A number: click's ranges let ``nan`` through. A click callback."""
    if math.isnan(value):
        raise click.BadParameter("expected a number, found nan", context, parameter)
    return value
