"""The weights of compiled programs: loaded once, shared with torch, and never stale."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from jax.experimental.compilation_cache import compilation_cache
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from helpers import LABELS, one_by_one, random_ids, random_qwen3
from packscore import (
    InputError,
    MultiItemScorer,
    UnexpectedCompileError,
    UnsupportedModelError,
    patch_model,
    program_of,
    unpatch_model,
)
from packscore.programs import weights as device_weights
from packscore.programs.weights import MappedFiles
from tolerances import PROBABILITY_MAX_BFLOAT16, PROBABILITY_MAX_FLOAT32

pytestmark = pytest.mark.usefixtures("quick_programs")

PREFIX, ITEMS = random_ids(20, seed=1), [random_ids(n, seed=n) for n in (3, 9)]
LORA = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)


def scores(model: Any) -> torch.Tensor:
    return torch.tensor(MultiItemScorer(model, label_token_ids=LABELS).score(PREFIX, ITEMS))


def assert_current(model: Any) -> None:
    """The programs score what torch computes with the model's weights of this moment."""
    found = scores(model)
    assert (found - torch_scores(model)).abs().max() <= PROBABILITY_MAX_FLOAT32


def torch_scores(model: Any) -> torch.Tensor:
    """The same one by one through torch's forward, which a cache asks for."""
    with torch.no_grad():
        rows = [
            model(torch.tensor([[*PREFIX, *item]]), use_cache=True).logits[0, -1].float()
            for item in ITEMS
        ]
    return torch.stack(rows).softmax(-1)[:, LABELS]


@pytest.fixture
def model() -> Any:
    return patch_model(random_qwen3(num_layers=2, tied=False), device="jax")


def add_in_place(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(0.1)


def load_state(model: Any) -> None:
    model.load_state_dict(random_qwen3(num_layers=2, tied=False, seed=9).state_dict())


def set_data(model: Any) -> None:
    model.model.norm.weight.data = torch.full((64,), 0.5)


def new_parameter(model: Any) -> None:
    model.lm_head.weight = torch.nn.Parameter(torch.randn(320, 64))


CHANGES = [add_in_place, load_state, set_data, new_parameter]


def name_of(change: Any) -> str:
    return str(change.__name__)


@pytest.mark.parametrize("change", CHANGES, ids=name_of)
def test_changed_weights_are_scored_without_a_compile(model: Any, change: Any) -> None:
    before = scores(model)
    program: Any = program_of(model)
    program.strict = True
    change(model)
    assert_current(model)
    assert (scores(model) - before).abs().max() > 1e-3


@pytest.mark.parametrize("change", CHANGES, ids=name_of)
def test_copied_weights_are_taken_again(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a TPU, which holds a copy."""

    def copied(tensor: torch.Tensor) -> jax.Array:
        return jnp.array(tensor.detach().numpy())

    monkeypatch.setattr(device_weights, "to_jax", copied)
    model = patch_model(random_qwen3(num_layers=2, tied=False), device="jax")
    before = scores(model)
    program: Any = program_of(model)
    weights = program._weights.arrays
    assert torch.equal(scores(model), before)
    assert program._weights.arrays is weights
    change(model)
    assert_current(model)
    assert program._weights.arrays is not weights
    assert program.compile_count == 1


def test_a_cast_model_gets_programs_of_its_new_dtype(model: Any) -> None:
    before = scores(model)
    program: Any = program_of(model)
    program.strict = True
    model.bfloat16()
    with pytest.raises(UnexpectedCompileError):
        scores(model)
    program.strict = False
    assert (scores(model) != before).any()
    assert (scores(model) - torch_scores(model)).abs().max() <= PROBABILITY_MAX_BFLOAT16
    model.half()
    with pytest.raises(UnsupportedModelError, match=r"is torch.float16; programs compute in bfloa"):
        scores(model)


def test_an_adapter_added_later_is_never_left_out(model: Any) -> None:
    before = scores(model)
    wrapped = get_peft_model(model, LORA).eval()
    with pytest.raises(UnsupportedModelError, match=r"q_proj.* is not one of a plain Qwen3ForCau"):
        scores(wrapped)
    ids = torch.tensor([PREFIX])
    with torch.no_grad():
        assert torch.equal(wrapped(ids).logits, wrapped(ids, use_cache=True).logits)
    merged = wrapped.merge_and_unload()
    assert (scores(merged) - before).abs().max() > 1e-3
    assert_current(merged)


def misaligned(folder: Path) -> None:
    """Shift the weights of a checkpoint by 8 bytes, as those of real checkpoints may lie."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip()
    header += b" " * ((48 - len(header)) % 64)  # 8 bytes of length and these: 56 modulo 64
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def test_weights_of_a_mapped_checkpoint_are_shared(tmp_path: Path) -> None:
    original = random_qwen3(num_layers=2, tied=False)
    original.save_pretrained(tmp_path)
    misaligned(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert model.model.embed_tokens.weight.data_ptr() % 64 == 56
    held = model.model.embed_tokens.weight.detach()
    with torch.no_grad():
        model.model.embed_tokens.weight[7].add_(1.0)  # written to the process's own page
    expected = held.clone()
    patch_model(model, device="jax")
    program: Any = program_of(model)
    pointers = {p.data_ptr() for p in model.parameters()}
    for name in ("embed_tokens", "norm", "head"):
        assert program._weights.arrays[name]["weight"].unsafe_buffer_pointer() in pointers
    for stack in program._weights.arrays["layers"].values():
        assert stack.unsafe_buffer_pointer() in pointers
    # giving pages back loses nothing that was written to them
    assert torch.equal(held, expected)
    assert torch.equal(model.model.embed_tokens.weight, expected)
    assert_current(model)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    for loaded, parameter in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(loaded, parameter)


def test_a_system_without_maps_is_copied_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("packscore.programs.weights.MAPS", tmp_path / "no-such-file")
    source = torch.arange(12.0).view(3, 4)
    target = torch.zeros(3, 4)
    assert torch.equal(MappedFiles().move(source, target), source)


# A process of its own, and a sparse file: zeros cost as much memory as other weights.
LOAD = """
import json, sys
from pathlib import Path

def resident(field):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if field in x)
    return int(line.split()[1]) * 1024

import jax, torch
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM
from packscore import patch_model, program_of
from packscore.programs.traced_ops import torchax_environment

torchax_environment(), jax.devices()
before = resident("VmRSS")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
patch_model(model, device="jax")
assert program_of(model) is not None
size = sum(p.nbytes for p in model.parameters())
print(json.dumps([size, resident("VmHWM") - before, resident("VmRSS") - before]))
"""


def write_sparse_checkpoint(folder: Path) -> None:
    """A checkpoint of Qwen3-0.6B's shape in bfloat16, all zeros."""
    with torch.device("meta"):
        model = random_qwen3_0_6b()
    model.config.save_pretrained(folder)
    header: dict[str, Any] = {}
    offset = 0
    for name, parameter in model.named_parameters():
        end = offset + parameter.numel() * 2
        header[name] = {
            "dtype": "BF16",
            "shape": list(parameter.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


def random_qwen3_0_6b() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    return Qwen3ForCausalLM(config)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's memory figures")
def test_loading_takes_little_more_than_the_checkpoint(tmp_path: Path) -> None:
    write_sparse_checkpoint(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOAD), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    size, peak, after = json.loads(done.stdout)
    print(f"{size / 1e9:.2f} GB: peak {peak / size:.2f} x its size, then {after / size:.2f} x")
    assert size > 1.19e9
    assert peak <= 1.3 * size
    assert after <= 1.1 * size


class CacheEvents:
    """How often jax found a compiled program on disk, and how often it did not."""

    def __init__(self) -> None:
        self.names: list[str] = []
        jax.monitoring.register_event_listener(lambda name, **_: self.names.append(name))

    def take(self) -> tuple[int, int]:
        """(hits, misses) since the last time."""
        found = [self.names.count(f"/jax/compilation_cache/cache_{x}") for x in ("hits", "misses")]
        self.names.clear()
        return found[0], found[1]


@pytest.fixture
def kept_by_nobody() -> Iterator[None]:
    """jax keeps no programs, as where nobody asks it to: the suite gives it a folder."""

    def enable(kept: bool) -> None:
        jax.config.update("jax_enable_compilation_cache", kept)
        compilation_cache.reset_cache()  # which looks once

    before = jax.config.jax_enable_compilation_cache
    enable(False)
    yield
    enable(before)


@pytest.mark.usefixtures("kept_by_nobody")
def test_programs_are_kept_on_disk(tmp_path: Path) -> None:
    events = CacheEvents()
    before = jax.config.jax_compilation_cache_dir
    folder = tmp_path / "not" / "there yet"
    found = []
    for kept, expected_events in ((folder, (0, 1)), (str(folder), (1, 0)), (None, (0, 0))):
        # each model is traced anew, as by another process
        model = patch_model(random_qwen3(num_layers=1), device="jax", compile_cache=kept)
        events.take()
        found.append(scores(model))
        assert program_of(model).compile_count == 1  # type: ignore[union-attr]
        assert events.take() == expected_events
    assert all(torch.equal(scores_, found[0]) for scores_ in found)
    assert jax.config.jax_compilation_cache_dir == before
    # a model that has programs gets the folder for its next ones
    program: Any = program_of(patch_model(model, device="jax", compile_cache=folder))
    program.warmup(max_tokens=256)
    assert events.take() == (0, 1)  # the larger one; the other is there
    expected = one_by_one(unpatch_model(model), PREFIX, ITEMS, LABELS)
    assert (found[0] - expected).abs().max() <= PROBABILITY_MAX_FLOAT32


def test_a_compile_cache_without_programs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"compile_cache='.*' keeps compiled programs, and device"):
        patch_model(random_qwen3(num_layers=1), compile_cache=tmp_path)
