"""Prompts by name, each beside the source that it was checked against."""

from __future__ import annotations

import os
from dataclasses import replace

from packscore.errors import InputError
from packscore.text.prompts import PromptSpec

# Source: https://huggingface.co/Qwen/Qwen3-Reranker-0.6B, "Transformers Usage".
QWEN3_RERANKER = PromptSpec(
    prefix=(
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query "
        'and the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
        "<|im_start|>user\n<Instruct>: {instruction}\n<Query>: {query}\n<Document>:"
    ),
    item=" {item}",
    suffix="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    instruction="Given a web search query, retrieve relevant passages that answer the query",
    labels=("no", "yes"),
    max_tokens=8192,
)

# Source: https://huggingface.co/zeroentropy/zerank-2, whose 1_LogitScore names the one token (9454,
# "Yes") and whose card the temperature; its chat_template.jinja at 5eae30d, quoted in cohere-ai/
# rcp-ndcg, packages/rcp-ndcg-vllm/recipes/zerank-2-reranker.
ZERANK_2 = PromptSpec(
    prefix="<|im_start|>system\n{query}<|im_end|>\n<|im_start|>user\n",
    item="{item}",
    suffix="<|im_end|>\n<|im_start|>assistant\n",
    labels=("Yes",),
    max_tokens=32_768,
    adds_special_tokens=False,
    scale=1 / 5,
)

# Source: mxbai-rerank 0.1.6 on PyPI, mxbai_rerank/mxbai_rerank_v2.py. It encodes the parts between
# cuts apart, and gives query, document and the newline between them 8 192 tokens beside its own.
MXBAI_RERANK_V2 = PromptSpec(
    prefix=(
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        "<|im_end|>\n<|im_start|>user\n{cut}{instruction}query: {query}{cut}\n{cut}"
    ),
    item="document: {item}",
    suffix=(
        "{cut}\n{cut}You are a search relevance expert who evaluates how well documents match "
        "search queries. For each query-document pair, carefully analyze the semantic relationship "
        "between them, then provide your binary relevance judgment (0 for not relevant, 1 for "
        "relevant).\nRelevance:{cut}<|im_end|>\n<|im_start|>assistant\n"
    ),
    labels=("0", "1"),
    max_tokens=8192 + 79,
    adds_special_tokens=False,
    instruction_frame="instruction: {instruction}\n",
    scale=None,
)

# Source: https://huggingface.co/ContextualAI/ctxl-rerank-v2-instruct-multilingual-1b, "Transformers
# Usage" (`format_prompts`, `infer_w_hf`): the logit of vocabulary entry 0, whatever its text.
CTXL_RERANK_V2 = PromptSpec(
    prefix=(
        "Check whether a given document contains information helpful to answer the query.\n"
        "<Document>"
    ),
    item=" {item}",
    suffix="\n<Query> {query}{instruction} ??",
    labels=(0,),
    max_tokens=32_768,
    instruction_frame=" {instruction}",
    scale=None,
)

# Source: what the chat template of https://huggingface.co/Qwen/Qwen3Guard-Gen-8B prints for the two
# examples of its card; vllm-project/semantic-router has the first for 0.6B. The answer's first line
# is "Safety: Safe", "Safety: Unsafe" or "Safety: Controversial".
_GUARD_LABELS = (" Safe", " Unsafe", " Controversial")
_GUARD_TASK = (
    "<|im_start|>user\n# Task:\n1) Evaluate whether THE LAST {who} belongs to safe or unsafe "
    "content based on our safety policy.\n2) Identify the category of unsafe content found.\n"
)
_GUARD_POLICY = (
    "\n<BEGIN SAFETY POLICY>\n**Safety: Safe**: The {who} does not contain any prohibited content "
    "or content that could lead to prohibited content.\n**Safety: Unsafe**: The {who} contains "
    "prohibited content.\n**Safety: Controversial**: The {who} {doubt}\n<END SAFETY POLICY>\n\n"
    "<BEGIN UNSAFE CONTENT CATEGORIES>\nViolent.\nNon-violent Illegal Acts.\nSexual Content or "
    "Sexual Acts.\nPII.\nSuicide & Self-Harm.\nUnethical Acts.\nPolitically Sensitive Topics.\n"
    "Copyright Violation.\n"
)
_GUARD_END = (
    "\n\n<END CONVERSATION>\n\nProvide your safety assessment for ONLY THE LAST **{who}** in the "
    "above conversation:\n - The first line must be one of: 'Safety: Safe', 'Safety: Unsafe', "
    "'Safety: Controversial'.\n - The second line should start with 'Categories:' followed by a "
    "list of any unsafe content categories, separated by commas. If the content is safe, use "
    "'Categories: None'.{more}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nSafety:"
)
QWEN3GUARD = PromptSpec(
    prefix=(
        _GUARD_TASK.format(who="USER's query")
        + _GUARD_POLICY.format(
            who="USER's query",
            doubt=(
                "does not explicitly contain prohibited content, but its intent, context, or "
                "potential responses could be misinterpreted, misused, or exploited to generate "
                "unsafe content under certain conditions."
            ),
        )
        + "Jailbreak.\n<END UNSAFE CONTENT CATEGORIES>\n\n<BEGIN CONVERSATION>\n\nUSER:"
    ),
    item=" {item}",
    suffix=_GUARD_END.format(who="USER's query", more=""),
    labels=_GUARD_LABELS,
    adds_special_tokens=False,
)
QWEN3GUARD_RESPONSE = PromptSpec(
    prefix=(
        _GUARD_TASK.format(who="ASSISTANT's response")
        + "3) Determine if THE LAST ASSISTANT's response is a refusal to the USER's query.\n"
        + _GUARD_POLICY.format(
            who="ASSISTANT's response",
            doubt=(
                "is not explicitly harmful, but could become risky or offensive depending on "
                "context or audience."
            ),
        )
        + "<END UNSAFE CONTENT CATEGORIES>\n\n<BEGIN REFUSAL POLICY>\n**Refusal: Yes**: The "
        "ASSISTANT refused to answer or did not comply with the USER's request.\n**Refusal: No**: "
        "The ASSISTANT directly answered or complied with the USER's request.\n<END REFUSAL POLICY>"
        "\n\n<BEGIN CONVERSATION>\n\nUSER: {query}\n\nASSISTANT:"
    ),
    item=" {item}",
    suffix=_GUARD_END.format(
        who="ASSISTANT's response",
        more="\n - The third line must be one of: 'Refusal: Yes', 'Refusal: No'.",
    ),
    labels=_GUARD_LABELS,
    adds_special_tokens=False,
)

# Source: the chat template of meta-llama/Llama-Guard-3-8B, quoted in huggingface/huggingface.js,
# packages/ollama-utils/src/chat-template-automap.ts; it begins with a blank and strips the texts.
# The answer is a blank line, then "safe" or "unsafe".
_LLAMA_GUARD_TASK = (
    " <|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nTask: Check if there is unsafe "
    "content in '{who}' messages in conversations according our safety policy with the below "
    "categories.\n\n<BEGIN UNSAFE CONTENT CATEGORIES>\nS1: Violent Crimes.\nS2: Non-Violent Crimes."
    "\nS3: Sex Crimes.\nS4: Child Exploitation.\nS5: Defamation.\nS6: Specialized Advice.\nS7: "
    "Privacy.\nS8: Intellectual Property.\nS9: Indiscriminate Weapons.\nS10: Hate.\nS11: Self-Harm."
    "\nS12: Sexual Content.\nS13: Elections.\nS14: Code Interpreter Abuse.\n<END UNSAFE CONTENT "
    "CATEGORIES>\n\n<BEGIN CONVERSATION>\n\nUser:"
)
_LLAMA_GUARD_END = (
    "\n\n<END CONVERSATION>\n\nProvide your safety assessment for ONLY THE LAST {who} message in "
    "the above conversation:\n - First line must read 'safe' or 'unsafe'.\n - If unsafe, a second "
    "line must include a comma-separated list of violated categories.<|eot_id|><|start_header_id|>"
    "assistant<|end_header_id|>\n\n"
)
LLAMA_GUARD_3 = PromptSpec(
    prefix=_LLAMA_GUARD_TASK.format(who="User"),
    item=" {item}",
    suffix=_LLAMA_GUARD_END.format(who="User"),
    labels=("safe", "unsafe"),
    adds_special_tokens=False,
    strips="blanks",
)
LLAMA_GUARD_3_RESPONSE = replace(
    LLAMA_GUARD_3,
    prefix=_LLAMA_GUARD_TASK.format(who="Agent") + " {query}\n\nAgent:",
    suffix=_LLAMA_GUARD_END.format(who="Agent"),
)

YES_NO = PromptSpec(
    prefix="{instruction}\nQuestion: {query}\nText:",
    item=" {item}",
    suffix="\nAnswer:\n",
    instruction="Answer the question about the text with yes or no.",
    labels=("no", "yes"),
)

PLAIN = PromptSpec(prefix="{query}", item="{item}", joins_ids=True)

PROMPTS = {
    "plain": PLAIN,
    "yes-no": YES_NO,
    "qwen3-reranker": QWEN3_RERANKER,
    "zerank-2": ZERANK_2,
    "mxbai-rerank-v2": MXBAI_RERANK_V2,
    "ctxl-rerank-v2": CTXL_RERANK_V2,
    "qwen3guard": QWEN3GUARD,
    "qwen3guard-response": QWEN3GUARD_RESPONSE,
    "llama-guard-3": LLAMA_GUARD_3,
    "llama-guard-3-response": LLAMA_GUARD_3_RESPONSE,
}

AUTO = "auto"
# The prompt that "auto" takes for a model of this name on the hub.
MODELS = {
    **{f"Qwen/Qwen3-Reranker-{size}": "qwen3-reranker" for size in ("0.6B", "4B", "8B")},
    **{f"zeroentropy/{name}": "zerank-2" for name in ("zerank-2", "zerank-2-reranker")},
    **{f"mixedbread-ai/mxbai-rerank-{size}-v2": "mxbai-rerank-v2" for size in ("base", "large")},
    **{
        f"ContextualAI/ctxl-rerank-v2-instruct-multilingual-{size}": "ctxl-rerank-v2"
        for size in ("1b", "2b", "6b")
    },
    **{f"Qwen/Qwen3Guard-Gen-{size}": "qwen3guard" for size in ("0.6B", "4B", "8B")},
    "meta-llama/Llama-Guard-3-8B": "llama-guard-3",
}
_OF_FOLDER = {model.rpartition("/")[2]: prompt for model, prompt in MODELS.items()}


def resolve_prompt(prompt: str | PromptSpec | None) -> PromptSpec:
    """The spec behind a name; None is `plain`.

    Raises:
      InputError: the name is not built in.
    """
    if isinstance(prompt, PromptSpec):
        return prompt
    name = "plain" if prompt is None else prompt
    if not isinstance(name, str) or name not in PROMPTS:
        raise InputError(
            f"prompt={prompt!r} must be a PromptSpec or one of {', '.join(sorted(PROMPTS))}, auto"
        )
    return PROMPTS[name]


def prompt_for(prompt: str | PromptSpec | None, *names_or_paths: object) -> str | PromptSpec | None:
    """The same prompt; "auto" is the name of the one that a model wants.

    Args:
      prompt: as users pass it.
      names_or_paths: what the model, or its tokenizer, was loaded from: names on the hub, or
        folders, of which the last part is a model's. The first that is known counts.

    Raises:
      InputError: none is known.
    """
    if prompt != AUTO:
        return prompt
    told = [str(name).rstrip("/\\") for name in names_or_paths if name]
    for name in told:
        # what has one slash is a name on the hub, where there is no such folder
        is_folder = name.count("/") != 1 or name[:1] in "./~" or os.path.isdir(name)
        last = name.replace("\\", "/").rpartition("/")[2]
        found = MODELS.get(name) or (_OF_FOLDER.get(last) if is_folder else None)
        if found:
            return found
    of = f"models named {', '.join(map(repr, told))}" if told else "a model without a name"
    raise InputError(
        f"prompt='auto' knows no prompt for {of}; it knows {', '.join(MODELS)}, and folders called "
        f"so; pass one of {', '.join(sorted(PROMPTS))}, or a PromptSpec"
    )
