"""An HTTP server over scorers: `create_app` and `decision_app` for those who mount it themselves.

`packscore serve` runs the first. It needs more packages: `pip install 'packscore[serve]'`.
"""

from __future__ import annotations

from packscore.errors import MissingPackageError

try:
    import fastapi as _fastapi  # noqa: F401  # named here, before files that import more of them
    import prometheus_client as _prometheus_client  # noqa: F401
    import uvicorn as _uvicorn  # noqa: F401

    from packscore.serve import bodies as _bodies  # noqa: F401
except ImportError as error:
    raise MissingPackageError("packscore.serve", "serve") from error

from packscore.serve.app import create_app, decision_app
from packscore.serve.limits import Limits

__all__ = ["Limits", "create_app", "decision_app"]
