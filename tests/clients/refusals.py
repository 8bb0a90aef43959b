"""Requests that the server refuses, and what each client makes of the error that it gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from clients.calls import DOCUMENTS, KEY, MODEL, QUERY, REFUND, STATE, TEXT

# the client's distribution, and texts that its exception has: its class, then of its message
REFUSALS: dict[Callable[[str], Any], tuple[str, tuple[str, ...]]] = {}
LEVELS = [f"level {i}" for i in range(11)]
WRONG_KEY, UNSERVED = "API key is missing or wrong", "is not served here; there is 'shipped'"


def refused(distribution: str, *texts: str) -> Callable[[Any], Any]:
    """Enter a call into the table."""

    def enter(call: Callable[[str], Any]) -> Callable[[str], Any]:
        REFUSALS[call] = (distribution, texts)
        return call

    return enter


@refused("cohere", "UnauthorizedError", WRONG_KEY)
def cohere_wrong_key(root: str) -> Any:
    import cohere

    co = cohere.ClientV2(api_key="wrong", base_url=root)
    return co.rerank(model=MODEL, query=QUERY, documents=DOCUMENTS)


@refused("cohere", "NotFoundError", UNSERVED)
def cohere_other_model(root: str) -> Any:
    import cohere

    co = cohere.ClientV2(api_key=KEY, base_url=root)
    return co.rerank(model="rerank-v3.5", query=QUERY, documents=DOCUMENTS)


@refused("cohere", "UnprocessableEntityError", "documents")
def cohere_no_documents(root: str) -> Any:
    import cohere

    co = cohere.ClientV2(api_key=KEY, base_url=root)
    return co.rerank(model=MODEL, query=QUERY, documents=[])


@refused("langchain-community", "RuntimeError", WRONG_KEY)
def langchain_jina_wrong_key(root: str) -> Any:
    from langchain_community.document_compressors import JinaRerank, jina_rerank

    jina_rerank.JINA_API_URL = f"{root}/v1/rerank"
    return JinaRerank(model=MODEL, jina_api_key="wrong").rerank(DOCUMENTS, QUERY)


@refused("typesafe-sdk", "TypeSafeAuthenticationError", WRONG_KEY)
def typesafe_wrong_key(root: str) -> Any:
    from typesafe_sdk import Noul, TypeSafeClient

    with TypeSafeClient(api_key="wrong", base_url=root) as client:
        return client.system_one(STATE, {"refund": Noul(instructions=REFUND)})


@refused("typesafe-sdk", "TypeSafeUnprocessableEntityError", "questions.mood")
def typesafe_many_levels(root: str) -> Any:
    from typesafe_sdk import TypeSafeClient

    with TypeSafeClient(api_key=KEY, base_url=root) as client:
        return client.system_one(STATE, {"mood": {"type": "score", "criteria": LEVELS}})


@refused("systemone-client", "SystemOneError", "404", UNSERVED)
def systemone_other_model(root: str) -> Any:
    from systemone import Client, Noul

    with Client(root, api_key=KEY, model="kenning-large") as client:
        return client.system_one(STATE, {"refund": Noul(REFUND)})


@refused("openai", "BadRequestError", "questions[0].choices is empty")
def openai_no_choices(root: str) -> Any:
    from openai import OpenAI

    question: Any = {"type": "choice", "name": "a", "instructions": "Which?", "choices": []}
    client = OpenAI(api_key=KEY, base_url=f"{root}/v1", max_retries=0)
    return client.decisions.create(model=MODEL, input=TEXT, questions=[question])


@refused("openai", "AuthenticationError", WRONG_KEY)
def openai_wrong_key(root: str) -> Any:
    from openai import OpenAI

    return OpenAI(api_key="wrong", base_url=f"{root}/v1").models.list()


@refused("pydantic-ai-slim", "status_code: 404", UNSERVED)
def pydantic_ai_other_model(root: str) -> Any:
    from pydantic_ai import Agent
    from pydantic_ai.models.system_one import SystemOneModel
    from pydantic_ai.providers.system_one import SystemOneProvider

    provider = SystemOneProvider(base_url=root, api_key=KEY)
    agent = Agent(SystemOneModel("clm", provider=provider), output_type=bool, instructions=REFUND)
    return agent.run_sync(TEXT)
