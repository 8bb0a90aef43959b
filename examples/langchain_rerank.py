"""Rerank what a LangChain retriever found.

    pip install '.[langchain]' && python examples/langchain_rerank.py

The retriever here is a list; any retriever's documents go the same way, and with `langchain`
installed `ContextualCompressionRetriever(base_compressor=reranker, base_retriever=...)` joins them.
"""

from __future__ import annotations

import asyncio

from langchain_core.documents import Document
from transformers.utils import logging

from packscore import shipped_model_path
from packscore.integrations.langchain import PackscoreReranker

FOUND = [
    Document("Rename a file or directory.", metadata={"source": "os"}),
    Document("Shuffle list x in place, and return None.", metadata={"source": "random"}),
    Document("Recursively delete a directory tree.", metadata={"source": "shutil"}),
    Document("Return the current time in seconds since the Epoch.", metadata={"source": "time"}),
]


def main() -> None:
    """Rerank two queries at the same time, and print."""
    logging.disable_progress_bar()
    reranker = PackscoreReranker.from_pretrained(str(shipped_model_path()), top_n=2)
    queries = ["delete a directory tree", "shuffle a list"]

    async def rerank_all() -> list[list[Document]]:
        calls = (reranker.acompress_documents(FOUND, query) for query in queries)
        return [list(documents) for documents in await asyncio.gather(*calls)]

    for query, documents in zip(queries, asyncio.run(rerank_all()), strict=True):
        print(query)
        for document in documents:
            source, score = document.metadata["source"], document.metadata["relevance_score"]
            print(f"  {score:.3f}  {source}: {document.page_content}")


if __name__ == "__main__":
    main()
