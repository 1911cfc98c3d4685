"""The templates of the report: a name that is missing stops the rendering, and all text is escaped."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape


def template(name: str) -> Template:
    """The file `name` of `templates/`."""
    templates = Environment(
        loader=PackageLoader("moe_bench.report.html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"px": _pixels, "soft": _breakable}
    return templates.get_template(name)


def _pixels(value: float) -> str:
    """A length to a tenth of a pixel, without a trailing zero."""
    return f"{round(value, 1):g}"


def _breakable(name: str) -> Markup:
    """A long name that may be folded behind each slash and underscore."""
    return Markup(escape(name).replace("/", Markup("/<wbr>")).replace("_", Markup("_<wbr>")))
