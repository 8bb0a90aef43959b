"""The frame is the chat template's own with thinking off; templates that hide an answer's place are
refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from packscore.decisions.frames import PLAIN_FRAME, Frame, frame_of
from packscore.errors import UnsupportedModelError

TURNS = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# the last turn's reply behind an empty block of thoughts, as Qwen3's template has it
QWEN3 = TURNS.replace(
    "m.role + '\n' + m.content",
    "m.role + '\n' + ('<think>\n\n</think>\n\n' if m.role == 'assistant' else '') + m.content",
)
OFF = "{%- if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
EMPTY = OFF + "{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
OPENED = "{%- if add_generation_prompt %}{{- '<think>\n' }}{%- endif %}"


def marked(*parts: str) -> str:
    """A template of (before the user, behind it, before the reply, behind it, at the end)."""
    user, user_end, reply, reply_end, prompt = parts
    return (
        "{%- for m in messages %}{%- if m.role == 'user' %}"
        f"{{{{- '{user}' + m.content|trim + '{user_end}' }}}}{{%- else %}}"
        f"{{{{- '{reply}' + m.content + '{reply_end}' }}}}{{%- endif %}}{{%- endfor %}}"
        f"{{%- if add_generation_prompt %}}{{{{- '{prompt}' }}}}{{%- endif %}}"
    )


HEAD, TURN = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
SILENT = f"{TURN}<think>\n\n</think>\n\n"
GOOD = {
    "chatml": (TURNS, Frame(HEAD, TURN, "<|im_end|>", False)),
    "qwen3": (QWEN3 + EMPTY, Frame(HEAD, SILENT, "<|im_end|>", False)),
    "thoughts-of-the-prompt-alone": (TURNS + EMPTY, Frame(HEAD, SILENT, "<|im_end|>", False)),
    # the reply stands on a line of its own, which the generation prompt leaves to the model
    "glm-4.5": (
        marked(
            "<|user|>\n",
            "",
            "<|assistant|>\n<think></think>\n",
            "",
            "<|assistant|>\n<think></think>",
        ),
        Frame("<|user|>\n", "<|assistant|>\n<think></think>\n", "\n", False),
    ),
    "deepseek-v3.1": (
        marked("<U>", "", "<A></think>", "<|endoftext|>", "<A></think>"),
        Frame("<U>", "<A></think>", "<|endoftext|>", False),
    ),
    "gemma-4": (
        marked(
            "<|turn>user\n",
            "<turn|>\n",
            "<|turn>model\n",
            "<turn|>\n",
            "<|turn>model\n<|channel>thought\n<channel|>",
        ),
        Frame("<|turn>user\n", "<turn|>\n<|turn>model\n<|channel>thought\n<channel|>", "\n", False),
    ),
    "mistral": (
        marked("[INST]", "[/INST]", " ", "<|endoftext|>", ""),
        Frame("[INST]", "[/INST]", "<|endoftext|>", False),
    ),
}
BAD = {
    "opens": (TURNS + OPENED, r"leaves <think> open with enable_thinking=False"),
    "opens-seed": (TURNS + OPENED.replace("<think>", "<seed:think>"), r"leaves <seed:think> open"),
    "opens-upper": (TURNS + OPENED.replace("<think>", "[THINK]"), r"leaves \[THINK\] open"),
    "opens-cohere": (
        TURNS + OPENED.replace("<think>", "<|START_THINKING|>"),
        r"leaves <\|START_THINKING\|> open .*; give the tokenizer a chat_template that does not",
    ),
    "opens-again": (TURNS + EMPTY + OPENED, r"leaves <think> open"),
    "opens-channel": (
        TURNS + OPENED.replace("<think>", "<|channel>thought"),
        r"leaves <\|channel>",
    ),
    # harmony: a reply is in a channel that the generation prompt does not name
    "channels": (
        marked("<U>", "<E>", "<A><|channel|>final<|message|>", "<E>", "<A>"),
        r"puts a reply behind .*final<\|message\|>' and its generation prompt ends with '<E><A>'",
    ),
    "thinks": (
        marked("<U>", "<E>", "<A>", "<E>", "<A><think>I must be brief.</think>"),
        "so that an answer is not what follows",
    ),
    "no-prompt": (marked("<U>", "<E>", "<A>", "<E>", ""), "so that an answer is not what follows"),
    "drops": ("{{ messages[0].role }}", "writes the user's message 0 times and it must be once"),
    "repeats": (TURNS + "{{ messages[0].content }}", "writes the user's message 2 times"),
    "escapes": (
        TURNS.replace("m.content", "m.content|e"),
        "changes what it frames, such as 'a <b>",
    ),
    "joins": (
        TURNS.replace("m.content", "m.content.replace('\n', ' ')"),
        "changes what it frames, such as 'a",
    ),
    "fails": (
        "{{ raise_exception('a system turn first') }}",
        "fails on a user's message .a system",
    ),
    "no-replies": (
        TURNS + "{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}",
        r"fails on a reply \(one turn\)",
    ),
}


def with_template(tokenizer: Any, template: str | None) -> Any:
    found = copy.copy(tokenizer)
    found.chat_template = template
    return found


@pytest.mark.parametrize("name", GOOD)
def test_the_frame_is_the_templates_own(tokenizer: Any, name: str) -> None:
    template, expected = GOOD[name]
    found = with_template(tokenizer, template)
    assert frame_of(found) == expected
    message = "a\n  b\nc."
    text = found.apply_chat_template(
        [{"role": "user", "content": message}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    assert expected.head + message + expected.tail == text + "\n" * (name == "glm-4.5")


@pytest.mark.parametrize("name", BAD)
def test_a_template_that_hides_the_answers_place_is_refused(tokenizer: Any, name: str) -> None:
    template, message = BAD[name]
    with pytest.raises(UnsupportedModelError, match=f"chat_template .*{message}"):
        frame_of(with_template(tokenizer, template))


def test_without_a_template_there_is_a_plain_frame(tokenizer: Any) -> None:
    before = tokenizer.chat_template
    assert frame_of(with_template(tokenizer, None)) == PLAIN_FRAME
    assert tokenizer.chat_template == before
    assert frame_of(tokenizer) == Frame(HEAD, SILENT, "<|im_end|>", False)
