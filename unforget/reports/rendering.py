"""Jinja2 templates that escape by themselves."""

from collections.abc import Callable

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from unforget.reports import charts, tables, words


def template(name: str, escape: Callable[[str], str], room: str = "reports") -> Template:
    """A template of a room. Everything that it prints goes through `escape`, except what its own macros wrote."""

    def finalize(value: object) -> Markup:
        return value if isinstance(value, Markup) else Markup(escape(str(value)))

    environment = Environment(
        loader=PackageLoader(f"unforget.{room}"), autoescape=True, finalize=finalize, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.globals |= {"charts": charts, "tables": tables, "words": words}
    return environment.get_template(name)
