"""What a wire format is: the body it takes, the answer it gives, and the shape of its errors."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel, ConfigDict

from packscore.inputs import short
from packscore.serve.call import Call
from packscore.serve.refusals import RefusedError


class Body(BaseModel):
    """A request's body; fields that it does not name are let be, as the original does."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    model: str | None = None


@dataclass(frozen=True)
class Family:
    """Clients that read the same errors.

    Args:
      name: for people.
      status: of a body that cannot be answered.
      error: (refusal, status, id of the request) to the body of an error.
    """

    name: str
    status: int
    error: Callable[[RefusedError, int, str], dict[str, Any]]


@dataclass(frozen=True)
class Kind:
    """One shape of body.

    Args:
      name: for the documentation.
      family: whose clients send it.
      body: its fields.
      needs: by these fields it is told from others on the same path.
      answer: awaited, it gives what makes the JSON that is sent back, beside the event loop.
      example: one that can be sent as it is.
      unserved: fields that ask for what is not done: values that ask for nothing, and the remedy.
    """

    name: str
    family: Family
    body: type[Body]
    needs: tuple[str, ...]
    answer: Callable[[Call, Any], Coroutine[Any, Any, Callable[[], Any]]]
    example: dict[str, Any]
    unserved: Mapping[str, tuple[tuple[Any, ...], str]] = field(default_factory=dict)

    def check_served(self, raw: Mapping[str, Any]) -> None:
        """Refuse a body that asks for what this server does not do.

        Raises:
          RefusedError: it does; the message names the field and the remedy.
        """
        for name, (idle, remedy) in self.unserved.items():
            value = raw.get(name)
            if value is not None and not any(value is x or value == x for x in idle):
                raise RefusedError(f"{name}={short(value)} is not served; {remedy}", None, name)


# What changes scores elsewhere and is not done here, whoever asks for it.
NOT_SERVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "truncate_prompt_tokens": ((-1,), "shorten the texts, or leave it out"),
    "truncation_side": (("right",), "a text that is too long loses its end; leave it out"),
    "max_tokens_per_doc": ((0,), "shorten the documents, or leave it out"),
    "max_tokens_per_query": ((0,), "shorten the query, or leave it out"),
    "priority": ((0,), "all requests have one priority; leave it out"),
    "mm_processor_kwargs": (({},), "only text is scored; leave it out"),
    "cache_salt": ((), "requests share prefixes; leave it out, or run a server for each tenant"),
    "instruction": ((), "the server has one; start another with --instruction"),
    "chat_template": ((), "the server has a prompt; start another with --prompt"),
    "chat_template_kwargs": (({},), "the server's prompt takes none; leave it out"),
}


def error_type(status: int) -> str:
    """BadRequestError, NotFoundError: a status as SGLang and vLLM spell it."""
    phrase = HTTPStatus(status).phrase.title()
    return "".join(letter for letter in phrase if letter.isalpha()) + "Error"
