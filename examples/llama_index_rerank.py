"""Rerank what a LlamaIndex retriever found.

    pip install '.[llama-index]' && python examples/llama_index_rerank.py

The nodes here are a list; a query engine takes the reranker as `node_postprocessors=[reranker]`.
"""

from __future__ import annotations

from llama_index.core.schema import NodeWithScore, TextNode
from transformers.utils import logging

from packscore import shipped_model_path
from packscore.integrations.llama_index import PackscoreRerank

FOUND = [
    TextNode(text="Rename a file or directory.", metadata={"module": "os"}),
    TextNode(text="Shuffle list x in place, and return None.", metadata={"module": "random"}),
    TextNode(text="Recursively delete a directory tree.", metadata={"module": "shutil"}),
]


def main() -> None:
    """Rerank and print."""
    logging.disable_progress_bar()
    reranker = PackscoreRerank.from_pretrained(str(shipped_model_path()), top_n=2)
    nodes = [NodeWithScore(node=node, score=0.5) for node in FOUND]  # the retriever's scores
    for found in reranker.postprocess_nodes(nodes, query_str="delete a directory tree"):
        print(f"{found.score:.3f}  {found.node.metadata['module']}: {found.node.get_content()}")


if __name__ == "__main__":
    main()
