"""The page at `/` is one file that asks this server and nobody else."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from importlib.resources import files

from fastapi.testclient import TestClient

from packscore import MultiItemScorer, shipped_model_path
from packscore.serve import create_app

PAGE = (files("packscore.serve") / "page.html").read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Every tag with its attributes, those of the template too."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def outside(page: str) -> list[str]:
    """What a page would fetch, or follow, beyond the server it came from."""
    links = [
        link
        for _, attributes in Tags(page).found
        for name in ("src", "href", "action", "data", "srcset", "poster")
        if (link := attributes.get(name)) and re.match(r"(?!data:)(\w+:|//|/)", link)
    ]
    return links + re.findall(r"@import[^;]*|url\([^)]*\)|\bimport\b[^;]*;", page)


def test_the_page_fetches_nothing_from_elsewhere() -> None:
    assert outside(PAGE) == []
    link = '<link href="https://fonts.example/a.css"><style>@import "b";</style>'
    assert outside(link) == ["https://fonts.example/a.css", '@import "b"']


def test_texts_are_put_in_as_texts() -> None:
    written = re.findall(r"\w+HTML\b|document\.write|\beval\b|Function\(", PAGE)
    assert written == []


def missing(page: str) -> set[str]:
    """Ids that the script, a label or an attribute names, and no tag has."""
    tags = [attributes for _, attributes in Tags(page).found]
    ids = [attributes["id"] for attributes in tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    asked = set(re.findall(r"""\$\("#([\w-]+)""", page))
    for name in ("for", "aria-controls", "aria-labelledby", "aria-describedby"):
        asked |= {attributes[name] or "" for attributes in tags if name in attributes}
    return asked - set(ids)


def test_what_the_script_looks_for_is_there() -> None:
    assert missing(PAGE) == set()
    assert missing('<label for="a">A</label><script>$("#b i")</script>') == {"a", "b"}


def test_the_page_is_served_and_its_endpoints_are_there() -> None:
    scorer = MultiItemScorer.from_pretrained(shipped_model_path(), device="cpu", dtype="float32")
    app = create_app(scorer, api_keys=["a-key"])
    asked = set(re.findall(r'"(v1/\w+)"', PAGE)) | set(re.findall(r'href="(\w+)"', PAGE))
    assert asked == {"v1/models", "v1/rerank", "v1/systemone", "docs"}
    with TestClient(app) as client:
        page = client.get("/")
        assert page.text == PAGE
        assert page.headers["content-type"].startswith("text/html")
        assert {f"/{path}" for path in asked} <= {getattr(r, "path", "") for r in app.routes}
