"""The templates of the report: a name that is missing stops the rendering, and all text is escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape

_NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+(e[-+]?\d+)?( ?(%|s|ms|us|µs|GB|GiB|MB|MiB|W))?")
"""A figure as the tables write it; a column of these and of dashes is set flush right."""


def template(name: str) -> Template:
    """The file `name` of `templates/`."""
    templates = Environment(
        loader=PackageLoader("moe_bench.report.html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"px": _pixels, "soft": _breakable, "number_class": _number_class}
    return templates.get_template(name)


def _pixels(value: float) -> str:
    """A length to a tenth of a pixel, without a trailing zero."""
    return f"{round(value, 1):g}"


def _breakable(name: str) -> Markup:
    """A long name that may be folded behind each slash, and elsewhere only where it would overflow."""
    return Markup(escape(name).replace("/", Markup("/<wbr>")))


def _number_class(cells: Iterable[str]) -> Markup:
    """The attribute of a column's cells where all that say something are figures, else nothing."""
    said = [cell for cell in cells if cell not in ("", "-")]
    is_number = bool(said) and all(_NUMBER.fullmatch(cell) for cell in said)
    return Markup(' class="number"') if is_number else Markup()
