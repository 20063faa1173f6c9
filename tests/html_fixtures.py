"""Whether a page is well formed."""

from html.parser import HTMLParser

VOID_TAGS = {"meta", "br", "rect", "line", "path", "circle"}


class _Balance(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID_TAGS:
            return
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def tags_left(page: str) -> list[str]:
    """Tags that are closed in the wrong order, and those that stay open."""
    balance = _Balance()
    balance.feed(page)
    return balance.wrong + balance.open
