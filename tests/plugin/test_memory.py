"""Peak memory of a long request: linear in tokens, never tokens x tokens."""

from __future__ import annotations

import subprocess
import sys
import textwrap

# A process of its own: peak memory only ever grows.
PROGRAM = """
import resource, sys
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from packscore import MultiItemScorer, patch_model

# two layers of the 0.6B's shape, with a small vocabulary
config = Qwen3Config(vocab_size=1000, hidden_size=1024, intermediate_size=3072, num_hidden_layers=2,
                     num_attention_heads=16, num_key_value_heads=8, head_dim=128)
model = patch_model(Qwen3ForCausalLM(config).to(torch.bfloat16).eval())
scorer = MultiItemScorer(model, label_token_ids=[1, 2])
scorer.score([3] * 20, [[4] * 5, [5] * 7])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
scores = scorer.score([3] * 2000, [[4] * 20 for _ in range(500)])
assert len(scores) == 500
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_500_items_behind_2000_tokens_take_under_a_gigabyte() -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    extra_bytes = int(done.stdout)
    print(f"peak extra memory: {extra_bytes / 2**20:.0f} MiB")
    assert extra_bytes < 2**30
