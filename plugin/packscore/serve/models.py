"""The models of a server by their names."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from packscore.errors import InputError, InputTypeError
from packscore.inputs import short
from packscore.scoring import MultiItemScorer
from packscore.serve.refusals import RefusedError

# what clients of System One ask for when nobody named a model
ALIAS = "jev-latest"


class Models:
    """Scorers by name; the first is the default.

    Args:
      scorers: one, which goes by its checkpoint's name, or several by name.

    Raises:
      InputError, InputTypeError: there is none, or one is no scorer.
    """

    def __init__(self, scorers: MultiItemScorer | Mapping[str, MultiItemScorer]) -> None:
        if isinstance(scorers, MultiItemScorer):
            scorers = {name_of(scorers): scorers}
        if not isinstance(scorers, Mapping):
            raise InputTypeError(
                f"scorers={short(scorers)} is a {type(scorers).__name__}; pass a MultiItemScorer, "
                "or a dict of name to MultiItemScorer"
            )
        if not scorers:
            raise InputError("scorers={} is empty; pass at least one MultiItemScorer")
        for name, scorer in scorers.items():
            if not isinstance(name, str) or not name:
                raise InputTypeError(f"scorers has the name {short(name)}; names are strings")
            if not isinstance(scorer, MultiItemScorer):
                raise InputTypeError(
                    f"scorers[{name!r}] is a {type(scorer).__name__}; it must be a MultiItemScorer"
                )
        self.scorers = dict(scorers)
        self.default = next(iter(self.scorers))
        # what clients of other servers call a model: what it was loaded by
        self._others = {ALIAS: self.default}
        for name, scorer in self.scorers.items():
            self._others.setdefault(loaded_by(scorer), name)
        self._since = int(time.time())

    def find(self, name: str | None) -> str:
        """The name under which a request's model is served.

        Raises:
          RefusedError: there is no such model.
        """
        if name is None:
            return self.default
        if name in self.scorers:
            return name
        if name in self._others:
            return self._others[name]
        known = ", ".join(map(repr, self.scorers))
        raise RefusedError(
            f"model={short(name)} is not served here; there is {known}", 404, "model"
        )

    def listed(self) -> dict[str, Any]:
        """The list as clients of OpenAI (`data`) and of System One (`models`) read it."""
        return {
            "object": "list",
            "data": [
                {"id": name, "object": "model", "created": self._since, "owned_by": "packscore"}
                for name in self.scorers
            ],
            "models": [
                {"name": name, "description": repr(scorer), "release_date": ""}
                for name, scorer in self.scorers.items()
            ],
        }


def name_of(scorer: MultiItemScorer) -> str:
    """The last part of the name or path that the model was loaded by; else its class."""
    name = loaded_by(scorer).rstrip("/\\")
    return name.replace("\\", "/").rpartition("/")[2] or type(scorer.model).__name__


def loaded_by(scorer: MultiItemScorer) -> str:
    """The name or path that the model was loaded by; "" where it was made."""
    # Any: only models of transformers have a configuration
    config: Any = getattr(scorer.model, "config", None)
    return str(getattr(config, "name_or_path", "") or "")
