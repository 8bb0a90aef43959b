"""The page at `/` in headless Chromium: it ranks and answers, at desk and phone width.

    python tests/clients/page.py http://127.0.0.1:8000 --key KEY --pictures /tmp/pictures

Needs a chromium on PATH; `check.py` calls it where there is one.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

SIZES = {"desk": (1440, 900), "phone": (390, 844)}


def look(root: str, key: str, pictures: Path | None) -> None:
    """Use the page as a visitor does, in every size and colour scheme.

    Raises:
      AssertionError: something is not there, a script failed, or the page is wider than the screen.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for name, (width, height) in SIZES.items():
            for scheme in ("light", "dark"):
                context: Any = browser.new_context(
                    viewport={"width": width, "height": height},
                    color_scheme=scheme,
                    device_scale_factor=1,
                )
                _visit(context.new_page(), root, key, f"{name}-{scheme}", pictures)
                context.close()
        browser.close()


def _visit(page: Any, root: str, key: str, name: str, pictures: Path | None) -> None:
    from playwright.sync_api import expect

    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{root}/")
    shot = Shots(page, name, pictures)
    if key:
        # without a key the page says so, and looks at the field
        page.wait_for_selector("#rank .bad:not([hidden])")
        shot("0-no-key")
        page.fill("#key", key)
        page.press("#key", "Tab")
    page.wait_for_selector("#model option", state="attached")
    shot("1-rank")
    page.press("#query", "Control+Enter")
    page.wait_for_selector("#rank .found li")
    first = page.text_content("#rank .found li:first-child span")
    assert first == "Recursively delete a directory tree.", first
    assert "tokens computed" in page.text_content("#rank .spent")
    shot("2-ranked")

    # what a document says is text
    page.fill("#documents", "<img src=x onerror=alert(1)>\nDelete a tree.\n\n")
    assert page.text_content("#documents-note") == "2 documents"
    page.click("#rank .go")
    expect(page.locator("#rank .found li")).to_have_count(2)
    assert page.locator("#rank .found img").count() == 0

    page.fill("#documents", " ")
    page.click("#rank .go")
    assert "no documents" in page.text_content("#rank .bad")

    page.focus("#tab-rank")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-ask"
    assert page.is_hidden("#rank")
    shot("3-ask")
    page.click("#ask .go")
    page.wait_for_selector("#ask .answer")
    assert page.locator("#ask .answer").count() == 3
    shot("4-answered")

    page.click("#view")
    assert '"refund"' in page.input_value("#questions-json")
    shot("5-json")
    page.fill(
        "#questions-json", '{"only": {"type": "noul", "instructions": {"ask": "Is it late?"}}}'
    )
    page.click("#view")
    assert "cannot show" in page.text_content("#questions-bad")
    page.click("#ask .go")
    expect(page.locator("#ask .answer")).to_have_count(1)
    page.fill("#questions-json", '{"two": {"type": "choice", "criteria": {"b": null, "a": "one"}}}')
    page.click("#view")
    assert page.is_visible("#add")
    page.click("#add button[value=score]")
    page.fill("#questions fieldset:last-child .instructions", "How late?")
    page.click("#ask .go")  # no levels: the server names what is missing
    page.wait_for_selector("#ask section .bad:not([hidden])")
    assert "question 2" in page.text_content("#ask section .bad"), page.text_content(
        "#ask section .bad"
    )
    shot("6-error")
    assert problems == []
    assert all(url.startswith((root, "data:")) for url in asked), asked
    wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert wide <= 0, f"{name} is {wide} px too wide"


class Shots:
    """Pictures of a page, of its whole length."""

    def __init__(self, page: Any, name: str, folder: Path | None) -> None:
        self.page, self.name, self.folder = page, name, folder

    def __call__(self, step: str) -> None:
        if self.folder is not None:
            path = self.folder / f"{self.name}-{step}.png"
            self.page.screenshot(path=path, full_page=True, animations="disabled")


def main() -> None:
    """Look at the page of a server that runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("root")
    parser.add_argument("--key", default="")
    parser.add_argument("--pictures", type=Path)
    options = parser.parse_args()
    if options.pictures:
        options.pictures.mkdir(parents=True, exist_ok=True)
    look(options.root.rstrip("/"), options.key, options.pictures)
    print("the page ranks and answers, at desk and phone width, light and dark")


if __name__ == "__main__":
    main()
