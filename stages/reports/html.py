"""Self-contained HTML pages that open from disk, without a network, light or dark.

Templates are in `templates/` and share `page.html`. They escape what comes from a user: names, settings, instructions.
"""

from __future__ import annotations

import base64
import functools
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...common.documents import open_regular, read_file
from ...common.figures import DARK, LIGHT, Style, png
from ...common.files import write_output
from ...errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

MARK = "<!-- made by dvla -->"  # second line of every page, which may then be replaced
TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".mp4": "video/mp4", ".gif": "image/gif"}


def require_page(path: Path) -> None:
    """`UserError` where no page can be written; pages of this package are replaced, other files are not."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{path}: give a name that ends in .html")
    try:
        with open(open_regular(path), "rb") as file:
            mine = MARK.encode() in file.read(200)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be replaced ({reason}); choose another name") from None
    if not mine:
        raise UserError(f"{path} exists and was not written by dvla; choose another name")


def write_page(path: Path, template: str, **values: Any) -> int:
    """Fill `templates/<template>` and write it; returns its bytes. `UserError` where that is impossible."""
    require_page(path)
    page = _environment().get_template(template).render(mark=MARK, **values).encode()
    write_output(path, page)
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
    """`content` as a data URI of a media type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def image_uri(image: Image.Image, kind: Literal["png", "jpeg"], **how: Any) -> str:
    """An image as a data URI; `how`: options of Pillow's encoder."""
    out = io.BytesIO()
    image.save(out, kind, **how)
    return data_uri(out.getvalue(), f"image/{kind}")


def file_uri(path: Path) -> str:
    """An image or video file as a data URI."""
    return data_uri(read_file(path), TYPES[path.suffix.lower()])


def picture(draw: Callable[[Style], Figure]) -> dict[str, Any]:
    """A figure in both styles for the macro `picture`: data URIs "light" and "dark", "finding" (its title), size."""
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
