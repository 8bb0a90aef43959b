"""What /openapi.json says: the bodies of every endpoint, each with an example that can be sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from packscore.serve.endpoints import Endpoint

REF = "#/components/schemas/{model}"
RESPONSES = {
    "4XX": "The body cannot be answered, or the client may not ask; the message names the field.",
    "503": "The server stops, or the launch failed; try again after `retry-after` seconds.",
    "504": "There was no answer in time.",
}


def describe(app: FastAPI, endpoints: Sequence[Endpoint]) -> None:
    """Make an app's schema say what its endpoints take, which they read by themselves."""
    bodies = {kind.body for endpoint in endpoints for kind in endpoint.kinds}
    ordered = sorted(bodies, key=lambda body: body.__name__)
    references, defined = models_json_schema(
        [(body, "validation") for body in ordered], ref_template=REF
    )

    def schema() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, routes=app.routes)
            components = found.setdefault("components", {}).setdefault("schemas", {})
            components |= defined["$defs"]
            for endpoint in endpoints:
                operation = found["paths"][endpoint.path]["post"]
                operation["requestBody"] = _body(endpoint, references)
                operation["responses"] = {"200": operation["responses"]["200"]} | {
                    status: {"description": told, "content": {"application/json": {}}}
                    for status, told in RESPONSES.items()
                }
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = schema  # type: ignore[method-assign]  # as FastAPI documents it


def _body(endpoint: Endpoint, references: Any) -> dict[str, Any]:
    each = [references[kind.body, "validation"] for kind in endpoint.kinds]
    return {
        "required": True,
        "content": {
            "application/json": {
                "schema": each[0] if len(each) == 1 else {"anyOf": each},
                "examples": {
                    kind.name: {"summary": kind.name, "value": kind.example}
                    for kind in endpoint.kinds
                },
            }
        },
    }
