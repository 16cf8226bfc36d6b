"""What an HTML page points at."""

from __future__ import annotations

from html.parser import HTMLParser


class Links(HTMLParser):
    """Every address in a page, its tags, and what is between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [
            value or "" for name, value in attributes if name in ("src", "href", "srcset", "poster", "action", "data")
        ]

    def handle_data(self, data: str) -> None:
        self.text += data
