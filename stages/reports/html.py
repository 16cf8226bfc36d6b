"""Pages of one file: everything a browser needs is in them, so they open from a disk, without a network, light or dark.

Templates lie in `templates/` and share `page.html`. What comes from a user (names, settings, instructions) is escaped
by the templates.
"""

from __future__ import annotations

import base64
import functools
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...common.figures import DARK, LIGHT, Style, png
from ...common.files import write_file
from ...errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

MARK = "<!-- made by dvla -->"  # the second line of every page: what may be made again in its place
TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".mp4": "video/mp4", ".gif": "image/gif"}


def require_page(path: Path) -> None:
    """`UserError` where no page can go: asked before the work. A page made by this package is replaced, nothing else
    is."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{path}: a page is written; give a name that ends in .html")
    if not path.exists():
        return
    try:
        with open(path, "rb") as file:
            mine = MARK.encode() in file.read(200)
    except OSError as error:
        raise UserError(f"{path} cannot be replaced ({error.strerror}); choose another name") from None
    if not mine:
        raise UserError(f"{path} exists and is no page of this command; choose another name")


def write_page(path: Path, template: str, **values: Any) -> int:
    """Fill `templates/<template>` and write it; returns its bytes. `UserError` as `require_page`, or where it cannot be
    written."""
    require_page(path)
    page = _environment().get_template(template).render(mark=MARK, **values).encode()
    try:
        write_file(path, page)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    return len(page)


@functools.cache
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "number": number,
        "lines": lambda value: json.dumps(value, indent=1, ensure_ascii=False, default=str),
    }
    return found


def number(value: Any, digits: int = 4) -> str:
    """A number for a table: at most so many significant digits; a dash for none."""
    if value is None or isinstance(value, float) and value != value:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}"


def data_uri(content: bytes, kind: str) -> str:
    """`content` as an address that needs no file; `kind`: its media type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def image_uri(image: Image.Image, kind: Literal["png", "jpeg"], **how: Any) -> str:
    """A picture as an address that needs no file; `how`: what Pillow's encoder is told."""
    out = io.BytesIO()
    image.save(out, kind, **how)
    return data_uri(out.getvalue(), f"image/{kind}")


def file_uri(path: Path) -> str:
    """A picture or film as an address that needs no file."""
    return data_uri(path.read_bytes(), TYPES[path.suffix.lower()])


def picture(draw: Callable[[Style], Figure]) -> dict[str, Any]:
    """A figure in both styles, for `page.html`'s macro of that name: addresses "light" and "dark", "finding" (its
    title), width and height."""
    figures = [draw(style) for style in (LIGHT, DARK)]
    light, dark = (data_uri(png(figure), "image/png") for figure in figures)
    width, height = (round(inches * figures[0].dpi) for inches in figures[0].get_size_inches())
    return {
        "light": light,
        "dark": dark,
        "finding": " ".join(figures[0].get_suptitle().split()),
        "width": width,
        "height": height,
    }
