"""What users of each client write, and what the client then hands them, in one form for all.

A call is a function of the server's root URL that builds the client as its own documentation does,
and reads what it says from the client's own objects.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from clients.wire import Answers, Ranks

MODEL, KEY = "shipped", "a-key-of-the-clients"
QUERY = "delete a directory tree"
DOCUMENTS = [
    "Return the size of a file.",
    "Recursively delete a directory tree.",
    "Copy data and mode bits, “quoted” and naïve.",
    "Remove a file.",
]
STATE = {"subject": "Parcel never came", "body": "I write for the third time. Refund me!"}
TEXT = "Parcel never came. I write for the third time. Refund me!"
REFUND = "Does the customer ask for money back?"
TOPICS = {"shipping": "parcels", "billing": "charges", "other": None}
URGENCIES = ["can wait", "this week", "today"]


@dataclass(frozen=True)
class Call:
    """A call of a client.

    Args:
      distribution: what pip calls its client.
      ask: the call.
      state: what is asked about, where the body has it in other words.
    """

    distribution: str
    ask: Callable[[str], Ranks | Answers]
    state: Any = None


CALLS: dict[str, Call] = {}


def client(distribution: str, state: Any = None) -> Callable[[Any], Any]:
    """Enter a call into the table, under its name."""

    def enter(ask: Callable[[str], Ranks | Answers]) -> Callable[[str], Ranks | Answers]:
        CALLS[ask.__name__] = Call(distribution, ask, state)
        return ask

    return enter


@client("cohere")
def cohere_v2(root: str) -> Ranks:
    import cohere

    co = cohere.ClientV2(api_key=KEY, base_url=root)
    found = co.rerank(model=MODEL, query=QUERY, documents=DOCUMENTS, top_n=3)
    return [(result.index, result.relevance_score) for result in found.results]


@client("cohere")
def cohere_v1(root: str) -> Ranks:
    import cohere

    co = cohere.Client(api_key=KEY, base_url=root)
    documents = [{"text": document} for document in DOCUMENTS]
    found = co.rerank(model=MODEL, query=QUERY, documents=documents, return_documents=True)
    for result in found.results:
        assert result.document.text == DOCUMENTS[result.index]
    return [(result.index, result.relevance_score) for result in found.results]


@client("cohere")
def cohere_async(root: str) -> Ranks:
    import cohere

    async def ask() -> Ranks:
        async with cohere.AsyncClientV2(api_key=KEY, base_url=root) as co:
            found = await co.rerank(model=MODEL, query=QUERY, documents=DOCUMENTS)
        return [(result.index, result.relevance_score) for result in found.results]

    return asyncio.run(ask())


@client("langchain-cohere")
def langchain_cohere(root: str) -> Ranks:
    from langchain_cohere import CohereRerank

    reranker = CohereRerank(model=MODEL, cohere_api_key=KEY, base_url=root, top_n=2)
    found = reranker.rerank(DOCUMENTS, QUERY)
    return [(result["index"], result["relevance_score"]) for result in found]


@client("langchain-community")
def langchain_jina(root: str) -> Ranks:
    from langchain_community.document_compressors import JinaRerank, jina_rerank
    from langchain_core.documents import Document

    jina_rerank.JINA_API_URL = f"{root}/v1/rerank"  # it has no argument for it
    reranker = JinaRerank(model=MODEL, jina_api_key=KEY, top_n=3)
    given = [Document(text) for text in DOCUMENTS]
    found = reranker.compress_documents(given, QUERY)
    return [
        (DOCUMENTS.index(document.page_content), document.metadata["relevance_score"])
        for document in found
    ]


def _nodes() -> list[Any]:
    from llama_index.core.schema import NodeWithScore, TextNode

    return [NodeWithScore(node=TextNode(text=text)) for text in DOCUMENTS]


@client("llama-index-postprocessor-tei-rerank")
def llama_index_tei(root: str) -> Ranks:
    from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

    reranker = TextEmbeddingInference(top_n=3, base_url=root, auth_token=f"Bearer {KEY}")
    found = reranker.postprocess_nodes(_nodes(), query_str=QUERY)
    return [(DOCUMENTS.index(node.text), node.score) for node in found]


@client("llama-index-postprocessor-jinaai-rerank")
def llama_index_jina(root: str) -> Ranks:
    from llama_index.postprocessor.jinaai_rerank import JinaRerank

    reranker = JinaRerank(top_n=3, model=MODEL, base_url=f"{root}/v1", api_key=KEY)
    found = reranker.postprocess_nodes(_nodes(), query_str=QUERY)
    return [(DOCUMENTS.index(node.text), node.score) for node in found]


def _rerankers(provider: str, url: str) -> Ranks:
    from rerankers import Reranker

    reranker = Reranker(MODEL, model_type="APIRanker", api_provider=provider, api_key=KEY, url=url)
    found = reranker.rank(QUERY, DOCUMENTS)
    return [(one.document.doc_id, one.score) for one in found.results]


@client("rerankers")
def rerankers_jina(root: str) -> Ranks:
    return _rerankers("jina", f"{root}/v1/rerank")


@client("rerankers")
def rerankers_tei(root: str) -> Ranks:
    return _rerankers("text-embeddings-inference", f"{root}/rerank")


def _litellm_rerank(provider: str, root: str) -> Ranks:
    import litellm

    found = litellm.rerank(
        f"{provider}/{MODEL}", QUERY, DOCUMENTS, top_n=3, api_key=KEY, api_base=root
    )
    return [(one["index"], one["relevance_score"]) for one in found.results]


@client("litellm")
def litellm_cohere(root: str) -> Ranks:
    return _litellm_rerank("cohere", root)


@client("litellm")
def litellm_jina(root: str) -> Ranks:
    return _litellm_rerank("jina_ai", f"{root}/v1/rerank")


@client("litellm")
def litellm_vllm(root: str) -> Ranks:
    return _litellm_rerank("hosted_vllm", root)


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
