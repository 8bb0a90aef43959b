"""What users of each client of decisions write, and what the client then hands them."""

from __future__ import annotations

import asyncio
from typing import Any

from clients.calls import CALLS, KEY, MODEL, REFUND, STATE, TEXT, TOPICS, URGENCIES, client
from clients.wire import Answers

__all__ = ["CALLS"]


def _answers(nouls: Any, choices: Any, scores: Any) -> Answers:
    """Of typesafe-sdk's and systemone-client's answers, whose attributes have the same names."""
    found: Answers = {name: ({"yes": x.noul, "no": 1 - x.noul}, None) for name, x in nouls.items()}
    for name, x in [*choices.items(), *scores.items()]:
        found[name] = ({str(k): p for k, p in x.probabilities.items()}, x.confidence)
    return found


@client("typesafe-sdk")
def typesafe(root: str) -> Answers:
    from typesafe_sdk import Choice, Noul, Score, TypeSafeClient

    with TypeSafeClient(api_key=KEY, base_url=root) as client:
        assert MODEL in [model.name for model in client.models.list().models]
        found = client.system_one(
            STATE,
            {
                "refund": Noul(instructions=REFUND, criteria={"true": "asks for money back"}),
                "topic": Choice(instructions="What is it about?", criteria=TOPICS),
                "urgency": Score(instructions="How urgent is it?", criteria=URGENCIES),
            },
        )
    return _answers(found.nouls, found.choices, found.scores)


@client("systemone-client")
def systemone(root: str) -> Answers:
    from systemone import Choice, Client, Noul, Score

    with Client(root, api_key=KEY) as client:
        found = client.system_one(
            STATE,
            {
                "refund": Noul(REFUND),
                "topic": Choice("What is it about?", TOPICS),
                "urgency": Score("How urgent is it?", URGENCIES),
            },
        )
    return _answers(found.nouls, found.choices, found.scores)


@client("pydantic-ai-slim")
def pydantic_ai(root: str) -> Answers:
    from typing import Literal

    from pydantic import BaseModel, Field
    from pydantic_ai import Agent
    from pydantic_ai.models.system_one import SystemOneModel
    from pydantic_ai.providers.system_one import SystemOneProvider

    class Handling(BaseModel):
        refund: bool = Field(description=REFUND)
        topic: Literal["shipping", "billing", "other"] = Field(description="What is it about?")

    provider = SystemOneProvider(base_url=root, api_key=KEY)
    agent = Agent(SystemOneModel(MODEL, provider=provider), output_type=Handling)
    result = agent.run_sync(TEXT)
    told = result.response.provider_details
    # of a yes or no it keeps the answer, and how far its probability is from one half, twice
    sure = told["confidence"]["refund"] * (1 if result.output.refund else -1)
    topic = told["probabilities"]["topic"]
    assert result.output.topic == max(topic, key=topic.get)
    return {
        "refund": ({"yes": (1 + sure) / 2, "no": (1 - sure) / 2}, None),
        "topic": (topic, told["confidence"]["topic"]),
    }


def _openai_answers(answers: Any) -> Answers:
    found: Answers = {}
    for answer in answers:
        if answer.type == "predicate":
            found[answer.name] = ({"yes": answer.probability, "no": 1 - answer.probability}, None)
        else:
            by_value = {str(x.value): x.probability for x in answer.probabilities}
            found[answer.name] = (by_value, answer.confidence)
    return found


OPENAI_QUESTIONS: list[dict[str, Any]] = [
    {"type": "predicate", "name": "refund", "instructions": REFUND},
    {
        "type": "choice",
        "name": "topic",
        "instructions": [{"type": "input_text", "text": "What is it about?"}],
        "choices": [{"value": "shipping", "description": "parcels"}, {"value": True}],
    },
    {
        "type": "score",
        "name": "urgency",
        "instructions": "How urgent is it?",
        "levels": [{"label": "can wait"}, {"label": "today", "description": "at once"}],
    },
]


@client("openai")
def openai_text(root: str) -> Answers:
    from openai import OpenAI

    client = OpenAI(api_key=KEY, base_url=f"{root}/v1")
    assert MODEL in [model.id for model in client.models.list()]
    found = client.decisions.create(model=MODEL, input=TEXT, questions=OPENAI_QUESTIONS)
    return _openai_answers(found.answers)


@client(
    "openai",
    [
        {"role": "developer", "content": "You sort letters."},
        {"role": "user", "content": [TEXT, STATE]},
    ],
)
def openai_messages(root: str) -> Answers:
    from openai import OpenAI

    found = OpenAI(api_key=KEY, base_url=f"{root}/v1").decisions.create(
        model=MODEL,
        input=[
            {"role": "developer", "content": "You sort letters."},
            {
                "role": "user",
                "content": [
                    {"type": "input_text", "text": TEXT},
                    {"type": "input_json", "data": STATE},
                ],
            },
        ],
        questions=OPENAI_QUESTIONS,
        prompt_cache_key="letters",
        safety_identifier="a-user",
    )
    return _openai_answers(found.answers)


@client("openai")
def openai_async(root: str) -> Answers:
    from openai import AsyncOpenAI

    async def ask() -> Answers:
        async with AsyncOpenAI(api_key=KEY, base_url=f"{root}/v1") as client:
            found = await client.decisions.create(
                model=MODEL, input=TEXT, questions=OPENAI_QUESTIONS[:1]
            )
        return _openai_answers(found.answers)

    return asyncio.run(ask())


def _langchain(root: str, state: Any) -> Answers:
    from langchain_openai.decisions import Choice, OpenAIDecisions, Predicate, Score

    decisions = OpenAIDecisions(model=MODEL, api_key=KEY, base_url=f"{root}/v1")
    found = decisions.invoke(
        {
            "input": state,
            "questions": {
                "refund": Predicate(instructions=REFUND),
                "topic": Choice(instructions="What is it about?", choices=TOPICS),
                "urgency": Score(instructions="How urgent is it?", levels=URGENCIES),
            },
        }
    )
    refund = found.predicates["refund"].probability
    answers: Answers = {"refund": ({"yes": refund, "no": 1 - refund}, None)}
    return answers | _answers({}, found.choices, found.scores)


@client("langchain-openai")
def langchain_openai_text(root: str) -> Answers:
    return _langchain(root, TEXT)


@client("langchain-openai", STATE)
def langchain_openai_json(root: str) -> Answers:
    return _langchain(root, STATE)


@client("jevbench")
def jevbench(root: str) -> Answers:
    import jevbench

    backend = jevbench.systemone(f"{root}/v1/systemone", MODEL, api_key=KEY)
    told = backend.ask(
        STATE,
        {
            "refund": {"type": "noul", "instructions": REFUND, "criteria": None},
            "topic": {"type": "choice", "instructions": "What is it about?", "criteria": TOPICS},
        },
    )
    topic = told["topic"]
    return {
        "refund": ({"yes": told["refund"]["noul"], "no": 1 - told["refund"]["noul"]}, None),
        "topic": (topic["probabilities"], topic["confidence"]),
    }


@client("typesafe-sdk")
def typesafe_large(root: str) -> Answers:
    from typesafe_sdk import Noul, TypeSafeClient

    # from 1 KiB on its body is compressed, here and in a Python 3.14 without being asked for it
    with TypeSafeClient(api_key=KEY, base_url=root, model=MODEL, compression="zstd") as client:
        found = client.system_one({"letters": [TEXT] * 30}, {"refund": Noul(instructions=REFUND)})
    return _answers(found.nouls, found.choices, found.scores)


@client("litellm")
def litellm_systemone(root: str) -> Answers:
    import litellm

    asked: Any = {
        "refund": {"type": "noul", "instructions": REFUND},
        "topic": {"type": "choice", "instructions": "What is it about?", "criteria": TOPICS},
    }
    found = litellm.systemone(f"typesafe/{MODEL}", STATE, asked, api_key=KEY, api_base=root)
    refund, topic = found.answers["refund"], found.answers["topic"]
    return {
        "refund": ({"yes": refund.noul, "no": 1 - refund.noul}, None),
        "topic": (topic.probabilities, topic.confidence),
    }


@client("litellm")
def litellm_decisions(root: str) -> Answers:
    import litellm

    asked: Any = OPENAI_QUESTIONS[::2]  # it takes no parts for instructions
    found: Any = litellm.decisions(
        f"openai/{MODEL}", TEXT, asked, api_key=KEY, api_base=f"{root}/v1"
    )
    return _openai_answers(found.answers)
