"""A page of results: one HTML file that needs nothing but itself, styled like page.html."""

import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from evaluation.drawing import AnnotatedStrip
from kernel.contact_sheet import COLOURS


def figure(value: float, spec: str = ".3f") -> str:
    """Format a figure; a mean of nothing, NaN, is a dash."""
    return "–" if math.isnan(value) else format(value, spec)


def render_page(template: Path, pictures: list[AnnotatedStrip], **values: Any) -> str:
    """Fill in a template that extends page.html: one HTML page that needs nothing but itself."""
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"zip": zip, "figure": figure}
    return environment.get_template(template.name).render(
        pictures=pictures,
        colours=[f"rgb({red}, {green}, {blue})" for blue, green, red in COLOURS],
        **values,
    )
