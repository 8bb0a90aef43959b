"""`/docs`: every endpoint with commands that can be run as they are, and nothing from elsewhere."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .75rem; border: 1px solid #8888 }
h2 { margin-top: 2.5rem }
"""


def docs_page(schema: Mapping[str, Any], address: str) -> str:
    """The page.

    Args:
      schema: of the app.
      address: of the app, as its client knows it; ends without a slash.
    """
    body = "\n".join(_lines(schema, address))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>packscore: endpoints</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{STYLE}</style>\n{body}\n</html>"
    )


def _lines(schema: Mapping[str, Any], address: str) -> Iterator[str]:
    yield "<h1>Endpoints</h1>"
    yield '<p>The same for programs: <a href="openapi.json">openapi.json</a>. Where the server'
    yield "asks for a key, add <code>-H 'authorization: Bearer KEY'</code>.</p>"
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            yield f"<h2><code>{method.upper()} {escape(path)}</code></h2>"
            yield f"<p>{escape(operation['summary'])}</p>"
            url = shlex.quote(address + path)
            content = operation.get("requestBody", {}).get("content", {})
            examples = content.get("application/json", {}).get("examples", {})
            if not examples:
                yield f"<pre>curl {escape(url)}</pre>"
            for name, example in examples.items():
                data = shlex.quote(json.dumps(example["value"], ensure_ascii=False))
                command = f"curl {url} -H 'content-type: application/json' -d {data}"
                yield f"<p>{escape(name)}</p><pre>{escape(command)}</pre>"
