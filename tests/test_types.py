"""Types reach the user: a right program passes mypy --strict, and a wrong one does not."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import packscore
import packscore_kernels

ROOT = Path(__file__).resolve().parents[1]
RIGHT = """
    from typing import Any

    import numpy as np
    import numpy.typing as npt
    from transformers import AutoTokenizer, PreTrainedModel

    from packscore import (
        EncodedRequest,
        Explanation,
        InputError,
        ModelProgram,
        MultiItemScorer,
        ParityReport,
        Prefix,
        PromptSpec,
        RankedDocument,
        ScoreResult,
        ScoringError,
        patch_model,
        patched,
        program_of,
        register_pipelines,
        unpatch_model,
        verify_parity,
    )


    def rerank(model: PreTrainedModel, path: str, query: str, documents: list[str]) -> list[str]:
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
        scorer = MultiItemScorer(patch_model(model), tokenizer, prompt="qwen3-reranker")
        scorer = MultiItemScorer.from_pretrained(path, device="cpu", prompt="qwen3-reranker")
        ranked: list[RankedDocument] = scorer.rank(query, documents, top_k=3)
        scores: list[list[float]] = scorer.score(query, documents, labels=["no", "yes"])
        result: ScoreResult[list[list[float]]] = scorer.score(query, documents, return_usage=True)
        saved: int = result.usage.prefix_tokens_saved
        pairs: npt.NDArray[np.float32] = scorer.predict([(query, text) for text in documents])
        many = scorer.score_many([(query, documents)], show_progress_bar=True)
        first: list[float] = many[0][0]
        each = scorer.score_many([(query, documents)], return_usage=True)
        first = each[0].scores[0]
        for row in scorer.score_stream(query, iter(documents)):
            first = row
        with hold(scorer, query) as held:
            first = held.score(documents)[0]
            saved = held.score(documents, return_usage=True).usage.prefix_tokens_saved
        explanation: Explanation = scorer.explain(query, documents)
        request: EncodedRequest = scorer.encode(query, documents)
        print(saved, pairs.mean(), scores, first, explanation.chosen.flow, len(request.prefix))
        return [documents[entry["corpus_id"]] for entry in ranked if entry["score"] > 0.5]


    def hold(scorer: MultiItemScorer, query: str) -> Prefix:
        return scorer.prefix(query)


    def warm(model: PreTrainedModel) -> int:
        program: ModelProgram | None = program_of(model)
        return 0 if program is None else program.warmup(max_tokens=1024)


    def check(model: PreTrainedModel) -> ParityReport:
        spec = PromptSpec(prefix="{query}", item=" {item}", suffix="?", labels=("no", "yes"))
        register_pipelines()
        try:
            with patched(model):
                return verify_parity(model, None, prompt=spec, show=False)
        except (InputError, ScoringError):
            unpatch_model(model)
            raise
"""
WRONG = """
    from packscore import MultiItemScorer


    def wrong(scorer: MultiItemScorer) -> None:
        scorer.rank("query", ["text"], topk=3)
        score: str = scorer.score("query", ["text"])[0][0]
        scorer.score("query", ["text"], return_usage=True).usage.tokens_saved
"""


PROGRAMS = {"right.py": RIGHT, "wrong.py": WRONG}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What mypy says of programs that stand outside this repository, line by line."""
    folder = tmp_path_factory.mktemp("user")
    for name, program in PROGRAMS.items():
        (folder / name).write_text(textwrap.dedent(program))
    # an editable install is found by an import hook, which mypy does not run
    homes = {Path(str(module.__file__)).parents[1] for module in (packscore, packscore_kernels)}
    outside = [str(home) for home in sorted(homes) if home.name != "site-packages"]
    environment = {**os.environ, "MYPYPATH": os.pathsep.join(outside)}
    # the options and the cache of the repository's own check, which has read torch already
    command = [sys.executable, "-m", "mypy", "--strict", *PROGRAMS]
    command += ["--config-file", str(ROOT / "pyproject.toml")]
    command += ["--cache-dir", str(ROOT / ".mypy_cache")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=folder, env=environment
    )
    assert done.returncode in (0, 1), done.stderr
    return done.stdout.splitlines()


def test_a_users_program_is_typed(said: list[str]) -> None:
    assert [line for line in said if line.startswith("right.py")] == []


@pytest.mark.parametrize(
    "expected",
    [
        'No overload variant of "rank" of "MultiItemScorer"',
        'has type "float", variable has type "str"',
        '"Usage" has no attribute "tokens_saved"',
    ],
)
def test_a_wrong_one_is_not(expected: str, said: list[str]) -> None:
    assert any(expected in line for line in said if line.startswith("wrong.py"))
