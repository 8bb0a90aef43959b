"""`--dry-run`: what a run would compute, from the tokenizer and the model's configuration alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from packscore import InputError, InputTypeError
from packscore.cli.tasks import Task
from packscore.files.records import BadRecord, Entry


@dataclass
class Plan:
    """Totals over the records of an input; `counted` and `shared` as a `Task` has them."""

    counted: str
    shared: str
    records: int = 0
    bad_records: int = 0
    items: int = 0
    prefix_tokens: int = 0
    item_tokens: int = 0
    one_by_one_tokens: int = 0
    longest_request_tokens: int = 0
    truncated_items: int = 0

    @property
    def packed_tokens(self) -> int:
        """Tokens that packed scoring computes: every query once, every item once."""
        return self.prefix_tokens + self.item_tokens

    def text(self) -> str:
        """The plan as a table."""
        saved = self.one_by_one_tokens - self.packed_tokens
        share = saved / self.one_by_one_tokens if self.one_by_one_tokens else 0.0
        rows = [
            ("records", f"{self.records:,}"),
            ("bad records", f"{self.bad_records:,}"),
            (self.counted, f"{self.items:,}"),
            (f"tokens of {self.shared}", f"{self.prefix_tokens:,}"),
            (f"tokens of {self.counted}", f"{self.item_tokens:,}"),
            ("tokens one by one", f"{self.one_by_one_tokens:,}"),
            ("tokens packed", f"{self.packed_tokens:,}"),
            ("tokens saved", f"{saved:,} ({share:.0%})"),
            ("longest record", f"{self.longest_request_tokens:,} tokens"),
        ]
        if self.counted == "items":  # questions are never cut
            rows.append(("truncated items", f"{self.truncated_items:,}"))
        width = max(len(name) for name, _ in rows) + 1
        return "\n".join(f"{name:<{width}}{value}" for name, value in rows)


def make_plan(entries: Iterable[Entry], task: Task) -> Plan:
    """Encode every record and count."""
    plan = Plan(task.counted, task.shared)
    for entry in entries:
        if isinstance(entry, BadRecord):
            plan.bad_records += 1
            continue
        try:
            request = task.encode(entry)
        except (InputError, InputTypeError):
            plan.bad_records += 1
            continue
        prefix_tokens, num_items = len(request.prefix), len(request.items)
        item_tokens = sum(map(len, request.items))
        plan.records += 1
        plan.items += entry.size
        plan.prefix_tokens += prefix_tokens
        plan.item_tokens += item_tokens
        plan.one_by_one_tokens += prefix_tokens * num_items + item_tokens
        longest = max(plan.longest_request_tokens, prefix_tokens + item_tokens)
        plan.longest_request_tokens = longest
        plan.truncated_items += len(request.truncated_items)
    return plan
