"""`packscore serve` as a Ray Serve deployment: the same endpoints, by several replicas.

    python examples/ray_serve.py MODEL --replicas 2 --port 8000

Each replica loads the model once and merges its own callers' requests; which of them has a query's
pages is not known to Ray, which gives it to any.
"""

from __future__ import annotations

import argparse

from fastapi import FastAPI
from ray import serve

from packscore import MultiItemScorer
from packscore.serve.app import create_app


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="hub name or folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()

    def build() -> FastAPI:
        # called in each replica, where the model is loaded
        scorer = MultiItemScorer.from_pretrained(
            options.model, device=options.device, prompt="qwen3-reranker"
        )
        return create_app(scorer)

    replicas = serve.deployment(
        num_replicas=options.replicas,
        ray_actor_options={"num_cpus": 1},  # and "num_gpus": 1, or "resources": {"TPU": 4}
    )
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    serve.run(replicas(serve.ingress(build)()).bind(), blocking=True)


if __name__ == "__main__":
    main()
