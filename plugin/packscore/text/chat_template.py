"""What a chat template puts around the texts that it frames, found by rendering it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from packscore.errors import UnsupportedModelError

Strip = Callable[[str], str]
# What templates take off the texts: (of the query, of the item) by a name.
STRIPS: dict[str, tuple[Strip, Strip]] = {
    "": (str, str),
    "blanks": (str.strip, str.strip),
    "item newlines": (str, lambda item: item.lstrip("\n")),
}
# Pairs on which the frame must give what the template gives: blanks at either end, which a template
# may strip, quotes and angle brackets, which it may escape, and nothing.
PROBES = (("a", ""), ("", "b"), (" a\n", "\n b "), ("<a>'\"&", "{b}<|im_end|>"), ("A", "9" * 50))
SOME_INSTRUCTION = "Find <b>\n'it'"


@dataclass(frozen=True)
class Frame:
    """What stands around the texts.

    Args:
      names: of the texts, in their order.
      literals: what is before each of them, and behind the last.
      strips: what is taken off them first, a key of `STRIPS`.
    """

    names: tuple[str, ...]
    literals: tuple[str, ...]
    strips: str = ""

    def text(self, values: dict[str, str]) -> str:
        """The whole text for the values of its fields."""
        of_query, of_item = STRIPS[self.strips]
        changes = {"query": of_query, "item": of_item}
        texts = [changes.get(name, str)(values[name]) for name in self.names]
        return self.literals[0] + "".join(map("".join, zip(texts, self.literals[1:], strict=True)))


def frame_of(render: Callable[..., str], names: tuple[str, ...]) -> Frame:
    """What a template puts around texts.

    Args:
      render: the template's whole text for the values of its fields, which are keywords.
      names: those fields: "item", and perhaps "query" and "instruction".

    Raises:
      UnsupportedModelError: the template drops, repeats or changes the texts.
    """
    # private-use characters, which no template contains
    marks = {name: f"\ue000{name}\ue000" for name in names}
    whole = render(**marks)
    for name, mark in marks.items():
        if whole.count(mark) != 1:
            raise UnsupportedModelError(
                f"chat_template puts the {name} in {whole.count(mark)} times and it must be once; "
                "pass a PromptSpec(...) that spells the frame"
            )
    order = tuple(sorted(names, key=lambda name: whole.index(marks[name])))
    literals = [whole]
    for name in order:
        literals += literals.pop().split(marks[name])
    probes = [{"query": q, "item": i, "instruction": SOME_INSTRUCTION} for q, i in PROBES]
    given = [{name: probe[name] for name in names} for probe in probes]
    rendered = [render(**values) for values in given]
    wrong = dict[str, object]()
    for strips in STRIPS:
        frame = Frame(order, tuple(literals), strips)
        texts = map(frame.text, given)
        bad = [v for v, text, want in zip(given, texts, rendered, strict=True) if text != want]
        if not bad:
            return frame
        wrong = wrong or dict(bad[0])
    raise UnsupportedModelError(
        f"chat_template changes what it frames, such as {wrong}; "
        "pass a PromptSpec(...), and texts as they should be"
    )
