"""What runs in a worker: one scorer, made once, over batches of a Ray dataset.

All take and give `pyarrow.Table`, the batch format "pyarrow": the columns of a batch come back as
they are, and one more with what was scored. A record is scored by itself, so that its scores are
the same bits in any batch, of any worker.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from packscore.errors import InputError, InputTypeError
from packscore.results import Flow

# By name, so that scores do not depend on what was scored before.
FLOW: Flow = "packed"


class Stage:
    """A scorer in a worker.

    Args:
      model: hub name or folder, which every machine can read.
      warmup_tokens: compile the programs of requests of up to so many tokens before the first
        batch; None compiles what is met. For `device="tpu"` and "jax".
      **loading: what `MultiItemScorer.from_pretrained` takes: `device`, `dtype`, `prompt`,
        `labels`, ...

    Raises:
      LoadError: as `from_pretrained` raises it: the run ends with it.
      InputError: an argument does not fit.
    """

    def __init__(self, model: str, *, warmup_tokens: int | None = None, **loading: Any) -> None:
        # imported here, in the worker: it brings torch
        from packscore import MultiItemScorer, program_of

        self._scorer = MultiItemScorer.from_pretrained(model, **loading)
        if warmup_tokens is not None:
            program = program_of(self._scorer.model)
            if program is None:
                raise InputError(
                    f"{warmup_tokens=}: torch compiles nothing; leave it out, or pass device='tpu'"
                )
            num_labels = len(self._scorer.label_token_ids or ()) or 2
            program.warmup(max_tokens=warmup_tokens, num_labels=num_labels)

    @classmethod
    def check_arguments(cls, given: Mapping[str, Any]) -> None:
        """Refuse arguments that nothing takes.

        Raises:
          InputError: naming one.
        """
        from packscore import MultiItemScorer

        own = inspect.signature(cls).parameters
        known = {*own, *inspect.signature(MultiItemScorer.from_pretrained).parameters}
        for name in given:
            if name not in known:
                raise InputError(
                    f"{name}={given[name]!r}: neither {cls.__name__} nor "
                    "MultiItemScorer.from_pretrained has such an argument"
                )


class ScoreStage(Stage):
    """P(label) for every item: adds `scores`, list<list<double>>, [num_items, num_labels].

    Args:
      model, **loading: as in `Stage`.
      query: column of the query, text.
      items: column of the items, lists of text.
      apply_softmax: over the labels alone, as `MultiItemScorer.score` takes it.

    Raises:
      InputTypeError: a batch is no `pyarrow.Table`.
      InputError: a batch has no such column, or a row cannot be scored: the run ends with it.
    """

    def __init__(
        self,
        model: str,
        *,
        query: str = "query",
        items: str = "items",
        apply_softmax: bool = False,
        **loading: Any,
    ) -> None:
        super().__init__(model, **loading)
        self._columns, self._apply_softmax = (query, items), apply_softmax

    def __call__(self, batch: Any) -> Any:
        """Score a batch."""
        import pyarrow as pa

        scores = [
            self._scorer.score(query, items, apply_softmax=self._apply_softmax, flow=FLOW)
            for query, items in rows_of(batch, *self._columns)
        ]
        return with_column(batch, "scores", scores, pa.list_(pa.list_(pa.float64())))


class RankStage(Stage):
    """Items by their score: adds `ranking`, list<struct<corpus_id, score>>, best first.

    Args:
      model, **loading: as in `Stage`.
      query, items: as in `ScoreStage`.
      top_k: keep so many; None keeps all.

    Raises:
      InputTypeError, InputError: as `ScoreStage` raises them.
    """

    def __init__(
        self,
        model: str,
        *,
        query: str = "query",
        items: str = "items",
        top_k: int | None = None,
        **loading: Any,
    ) -> None:
        super().__init__(model, **loading)
        self._columns, self._top_k = (query, items), top_k

    def __call__(self, batch: Any) -> Any:
        """Rank a batch."""
        import pyarrow as pa

        ranked = [
            self._scorer.rank(query, items, top_k=self._top_k, flow=FLOW)
            for query, items in rows_of(batch, *self._columns)
        ]
        entry = pa.struct([("corpus_id", pa.int64()), ("score", pa.float64())])
        return with_column(batch, "ranking", ranked, pa.list_(entry))


class PairStage(Stage):
    """One score for every row of (query, item): adds `score`, float, as `predict` gives it.

    Rows of a query that follow each other in a batch are scored together: give it groups
    (`run_groups`), or batches that do not cut them.

    Args:
      model, **loading: as in `Stage`.
      query, item: columns of text.

    Raises:
      InputTypeError, InputError: as `ScoreStage` raises them.
    """

    def __init__(
        self, model: str, *, query: str = "query", item: str = "item", **loading: Any
    ) -> None:
        super().__init__(model, **loading)
        self._columns = query, item

    def __call__(self, batch: Any) -> Any:
        """Score a batch."""
        import pyarrow as pa

        scores: list[float] = []
        for _, pairs in groupby(rows_of(batch, *self._columns), key=lambda pair: pair[0]):
            scores += self._scorer.predict(list(pairs), flow=FLOW).tolist()
        return with_column(batch, "score", scores, pa.float32())


class DecideStage(Stage):
    """Typed answers about every state: adds `answers`, System One's body as JSON text.

    Args:
      model, **loading: as in `Stage`.
      state: column of the states: text, or anything that JSON has.
      questions: what is asked of every state, or the name of a column with JSON text of each one's.
      permutations: as `MultiItemScorer.decide` takes it.

    Raises:
      InputTypeError, InputError: as `ScoreStage` raises them.
    """

    def __init__(
        self,
        model: str,
        *,
        state: str = "state",
        questions: Mapping[str, Any] | list[Any] | str = "questions",
        permutations: int = 1,
        **loading: Any,
    ) -> None:
        super().__init__(model, **loading)
        self._state, self._questions, self._permutations = state, questions, permutations

    def __call__(self, batch: Any) -> Any:
        """Decide a batch."""
        import pyarrow as pa

        answers = []
        for state, questions in self._asked(batch):
            found = self._scorer.decide(
                state, questions, permutations=self._permutations, flow=FLOW
            )
            answers.append(json.dumps(found.to_systemone(), ensure_ascii=False))
        return with_column(batch, "answers", answers, pa.string())

    def _asked(self, batch: Any) -> Iterator[tuple[Any, Any]]:
        if isinstance(self._questions, str):
            for state, questions in rows_of(batch, self._state, self._questions):
                yield state, json.loads(questions) if isinstance(questions, str) else questions
        else:
            for (state,) in rows_of(batch, self._state):
                yield state, self._questions


def rows_of(batch: Any, *names: str) -> Iterator[tuple[Any, ...]]:
    """The values of some columns, row by row.

    Raises:
      InputTypeError: the batch is no table.
      InputError: it has no such column.
    """
    import pyarrow as pa

    if not isinstance(batch, pa.Table):
        raise InputTypeError(
            f"a batch is a {type(batch).__name__}; pass batch_format='pyarrow' to map_batches"
        )
    for name in names:
        if name not in batch.column_names:
            raise InputError(f"column {name!r} is missing; the batch has {batch.column_names}")
    return zip(*(batch[name].to_pylist() for name in names), strict=True)


def with_column(batch: Any, name: str, values: list[Any], type_: Any) -> Any:
    """A table with one column more.

    Raises:
      InputError: it has one of that name.
    """
    import pyarrow as pa

    if name in batch.column_names:
        raise InputError(f"column {name!r} is there already; rename it before the stage")
    return batch.append_column(name, pa.array(values, type_))
