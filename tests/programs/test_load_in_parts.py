"""A checkpoint that goes to the chips in parts, which eight devices of a CPU stand for."""

from __future__ import annotations

import copy
import functools
import gc
import io
import json
import pickle
import shutil
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from helpers import LABELS, one_by_one, random_classifier, random_decoder, random_ids
from packscore import (
    InputError,
    LoadError,
    MultiItemScorer,
    UnsupportedModelError,
    patch_model,
    patched,
    shipped_model_path,
    unpatch_model,
)
from packscore.calls import program_of
from packscore.loading import load_stored
from packscore.model.family import class_count, output_head
from packscore.model.sizes import ModelSizes
from packscore.model.stored import Stored
from packscore.programs.mesh import loading
from packscore.programs.mesh.chips import ChipGroup
from packscore.programs.mesh.cuts import Cuts, lead_of
from packscore.programs.mesh.loading import load_weights
from packscore.programs.weights import to_torch
from tolerances import PROBABILITY_MAX_FLOAT32, PROBABILITY_REORDERED

pytestmark = pytest.mark.usefixtures("quick_programs")

PREFIX = random_ids(30, seed=1)
ITEMS = [random_ids(n, seed=n) for n in (3, 17, 1)]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
WEIGHTS = "model.safetensors"
# rows of the embedding and the head that no number of chips divides
ODD: dict[str, Any] = {"vocab_size": 323}


def saved(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    for name in TOKENIZER:
        shutil.copy(shipped_model_path() / name, folder)
    return folder


def rewritten(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    weights = change(load_file(folder / WEIGHTS))
    save_file({n: x.contiguous() for n, x in weights.items()}, folder / WEIGHTS, {"format": "pt"})
    return folder


def in_files(model: Any, folder: Path) -> Path:
    """As transformers saves it: in several files, experts each by itself."""
    saved(model, folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def in_one_file(model: Any, folder: Path) -> Path:
    """As the model has it: experts merged; of what is tied all names."""
    saved(model, folder)
    return rewritten(folder, lambda _: {n: x.clone() for n, x in model.state_dict().items()})


def of_the_decoder(model: Any, folder: Path) -> Path:
    """With the names that the decoder has for itself, as embedding models are on the hub."""
    saved(model, folder)
    return rewritten(folder, lambda old: {n.removeprefix("model."): x for n, x in old.items()})


Save = Callable[[Any, Path], Path]
Make = Callable[[], Any]
moe = functools.partial(random_decoder, "qwen3_moe", num_experts=8)
KINDS: dict[str, tuple[Make, Save]] = {
    "qwen3 tied": (lambda: random_decoder("qwen3"), in_files),
    "qwen3 tied, both names": (lambda: random_decoder("qwen3"), in_one_file),
    "qwen3 tied, of the decoder": (lambda: random_decoder("qwen3"), of_the_decoder),
    "llama untied": (lambda: random_decoder("llama", **ODD), in_files),
    "qwen2 tied, odd": (
        lambda: random_decoder("qwen2", tie_word_embeddings=True, **ODD),
        in_files,
    ),
    "experts apart": (moe, in_files),
    "experts merged": (moe, in_one_file),
    "classes": (lambda: random_classifier("qwen3", num_labels=3), in_files),
    "classes, old": (lambda: random_classifier("llama", num_labels=2, **ODD), in_one_file),
}


def groups(data: int, chips: int) -> list[ChipGroup]:
    devices = jax.devices()
    return [ChipGroup(tuple(devices[at : at + chips])) for at in range(0, data * chips, chips)]


def cuts_of(model: Any, chips: int) -> Cuts:
    return Cuts(ModelSizes.of(model.config), chips, class_count(model))


def whole_weights(model: Any) -> dict[str, dict[str, np.ndarray]]:
    """The weights of a model by group, as numpy arrays."""
    decoder, head = model.get_decoder(), output_head(model)
    layers = [dict(layer.named_parameters()) for layer in decoder.layers]
    found = {"layers": {n: torch.stack([layer[n] for layer in layers]) for n in layers[0]}}
    for group, module in (
        ("norm", decoder.norm),
        ("embed_tokens", decoder.embed_tokens),
        ("rotary", decoder.rotary_emb),
    ):
        found[group] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if head.weight is not decoder.embed_tokens.weight:
        found["head"] = {"weight": head.weight}
    return {
        group: {name: x.detach().numpy() for name, x in named.items()}
        for group, named in found.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_chip_has_its_part_of_every_weight(kind: str, tmp_path: Path) -> None:
    make, save = KINDS[kind]
    model = make()
    copies, chips = groups(2 if kind == "classes, old" else 1, 4), 4
    loaded = load_stored(save(model, tmp_path))
    cuts = cuts_of(loaded, chips)
    found = load_weights(loaded, copies, cuts)
    wanted = whole_weights(model)
    for weights, copy_chips in zip(found, copies, strict=True):
        assert {g: named.keys() for g, named in weights.items()} == {
            g: named.keys() for g, named in wanted.items()
        }
        for group, named in wanted.items():
            for name, want in named.items():
                cut, lead = cuts.of(group, name), lead_of(group)
                array: Any = weights[group][name]
                assert array.shape == cut.whole(want.shape, lead)
                assert array.sharding.is_equivalent_to(
                    copy_chips.sharding(cut.spec(lead)), want.ndim
                )
                parts = {shard.device: np.asarray(shard.data) for shard in array.addressable_shards}
                for chip, device in enumerate(copy_chips.devices):
                    own = np.zeros(cut.local(want.shape, lead), want.dtype)
                    if cut.axis is None:
                        own[...] = want
                    else:
                        size = want.shape[lead + cut.axis]
                        rows = range(*cut.part(size, chip).indices(size))
                        part = np.take(want, rows, axis=lead + cut.axis)
                        own[tuple(map(slice, part.shape))] = part
                    np.testing.assert_array_equal(parts[device], own, err_msg=f"{group} {name}")


# (kind, copies, chips of each); what other files and tests here score on a mesh too are long
SCORED = [("qwen3 tied", 1, 4), ("experts apart", 1, 4), ("classes", 1, 2)]
MORE = [
    *(("qwen3 tied", 2, 4), ("llama untied", 2, 2), ("qwen2 tied, odd", 1, 1)),
    *(("experts merged", 2, 2), ("classes, old", 1, 4)),
]


@pytest.mark.parametrize(
    ("kind", "data", "chips"),
    [*SCORED, *(pytest.param(*case, marks=pytest.mark.long) for case in MORE)],
)
def test_scores_equal_one_by_one(kind: str, data: int, chips: int, tmp_path: Path) -> None:
    make, save = KINDS[kind]
    model = make()
    is_classifier = bool(class_count(model))
    scorer = MultiItemScorer.from_pretrained(
        save(model, tmp_path),
        device="jax",
        mesh={"data": data, "model": chips},
        label_token_ids=None if is_classifier else LABELS,
    )
    program = program_of(scorer.model)
    assert program is not None
    assert [len(copy) for copy in program.copies] == [chips] * data
    wanted = classes_of(model) if is_classifier else one_by_one(model, PREFIX, ITEMS, LABELS)
    for _ in range(2):  # cold, and from pages
        got = torch.tensor(scorer.score(PREFIX, ITEMS))
        assert (got - wanted).abs().max() <= PROBABILITY_MAX_FLOAT32


@torch.no_grad()
def classes_of(model: Any) -> torch.Tensor:
    rows = [model(input_ids=torch.tensor([[*PREFIX, *item]])).logits[0] for item in ITEMS]
    return torch.stack(rows).softmax(-1)


def test_each_part_is_cast_to_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    model = random_decoder("llama")
    saved(copy.deepcopy(model).half(), tmp_path)
    loaded = load_stored(tmp_path, dtype="bfloat16")
    assert loaded.dtype == torch.bfloat16
    (weights,) = load_weights(loaded, groups(1, 2), cuts_of(loaded, 2))
    own = model.model.layers[1].mlp.up_proj.weight.detach().half().bfloat16()
    assert torch.equal(to_torch(weights["layers"]["mlp.up_proj.weight"][1]), own)
    assert weights["rotary"]["inv_freq"].dtype == np.float32
    assert load_stored(tmp_path, dtype=torch.float32).dtype == torch.float32
    assert load_stored(tmp_path).dtype == torch.float16  # the checkpoint's, which programs refuse
    with pytest.raises(UnsupportedModelError, match="float16; programs compute in bfloat16"):
        patch_model(load_stored(tmp_path), device="jax", mesh={"model": 2})


# what is held


class Ledger:
    """What the host held while weights were loaded, and whether stacks gave their memory on."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.read: list[int] = []
        self.alive = self.most_alive = 0
        self.given_on: list[bool] = []
        read, to_numpy, put = Stored.read, loading._to_numpy, loading._Stacks.put

        def reads(stored: Stored, *args: Any) -> torch.Tensor:
            values = read(stored, *args)
            self.read.append(values.untyped_storage().nbytes())
            return values

        def converts(tensor: torch.Tensor) -> Any:
            array = to_numpy(tensor)
            self.alive += array.nbytes
            self.most_alive = max(self.most_alive, self.alive)
            weakref.finalize(array, self._gone, array.nbytes)
            return array

        def puts(stacks: Any, *args: Any) -> None:
            before = list(stacks.arrays.values())
            put(stacks, *args)
            self.given_on += [array.is_deleted() for array in before]

        patch.setattr(Stored, "read", reads)
        patch.setattr(loading, "_to_numpy", converts)
        patch.setattr(loading._Stacks, "put", puts)

    def is_empty_soon(self) -> bool:
        until = time.monotonic() + 10
        while self.alive and time.monotonic() < until:
            time.sleep(0.01)
            gc.collect(0)
        return not self.alive

    def _gone(self, nbytes: int) -> None:
        self.alive -= nbytes


@pytest.mark.parametrize(("data", "chips"), [(1, 4), (2, 2)])
def test_the_host_holds_one_part_and_a_chip_its_own(
    data: int, chips: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_decoder("llama", num_hidden_layers=6, num_key_value_heads=4)
    loaded = load_stored(in_files(model, tmp_path))
    ledger = Ledger(monkeypatch)
    copies, cuts = groups(data, chips), cuts_of(loaded, chips)
    layers = [dict(layer.named_parameters()) for layer in loaded.model.layers]
    stacks = loading._stacked(layers, copies, lambda name: cuts.of("layers", name))
    of_layer = [np.prod(x.shape) * 4 for x in layers[0].values()]
    # each tensor was read once, whatever chips have parts of it, and for all copies
    assert sum(ledger.read) == 6 * sum(of_layer)
    # a part at a time; jax on a CPU reads it in place until its layer is put, and lets go of it
    # when a thread of its own is done
    assert max(ledger.read) == max(of_layer) // chips
    assert ledger.most_alive <= 2 * sum(of_layer)
    assert ledger.is_empty_soon()
    assert all(ledger.given_on)
    assert len(ledger.given_on) == 5 * len(of_layer) * data
    weights = load_weights(loaded, copies, cuts)
    parts = [s for array in jax.tree.leaves(weights) for s in array.addressable_shards]
    assert len({shard.device for shard in parts}) == data * chips
    whole = sum(p.numel() * 4 for p in model.parameters())
    everywhere = sum(p.numel() * 4 for n, p in model.named_parameters() if "norm" in n)
    for device in (chip for copy_chips in copies for chip in copy_chips.devices):
        held = sum(x.data.nbytes for x in parts if x.device == device)
        angles = 2 * 4 * len(model.model.rotary_emb.inv_freq)
        assert held == (whole - everywhere) // chips + everywhere + angles
    assert stacks[0].keys() == layers[0].keys()


# what is refused before a chip is asked


def changed_config(**options: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **options}))

    return change


def changed(**weights: Any) -> Callable[[Path], None]:
    """Weights by the ends of their names: None takes one away, a function makes another of it."""

    def change(folder: Path) -> None:
        def of(old: dict[str, Any]) -> dict[str, Any]:
            for end, make in weights.items():
                name = next((n for n in old if n.endswith(end)), end)
                old = {n: x for n, x in old.items() if n != name} | (
                    {} if make is None else {name: make(old.get(name))}
                )
            return old

        rewritten(folder, of)

    return change


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def as_adapter(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "x/y"}))


def without_a_file(folder: Path) -> None:
    in_files(random_decoder("llama"), folder)
    (folder / WEIGHTS).unlink()
    next(folder.glob("model-*.safetensors")).unlink()


def cut_off(folder: Path) -> None:
    with (folder / WEIGHTS).open("r+b") as file:
        file.truncate(file.seek(0, 2) - 1)


UP, EMBEDDED = "layers.1.mlp.up_proj.weight", "embed_tokens.weight"
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weight": (changed(**{UP: None}), rf"has no model\.{UP}, so they would be random"),
    "no head": (changed(**{"lm_head.weight": None}), r"has no lm_head\.weight, so"),
    "no class head": (
        changed_config(architectures=["LlamaForSequenceClassification"], pad_token_id=0),
        r"has no score\.weight, so they would be random",
    ),
    "another shape": (
        changed(**{UP: lambda x: x[:-1]}),
        rf"has model\.{UP} of another shape than the configuration",
    ),
    "other axes": (changed(**{UP: lambda x: x[0]}), "of another shape than the configuration"),
    "a bias more": (
        changed(**{"model.layers.0.self_attn.q_proj.bias": lambda _: torch.ones(64)}),
        r"has model\.layers\.0\.self_attn\.q_proj\.bias, which the model of its configuration has",
    ),
    "layers more": (
        changed_config(num_hidden_layers=1),
        r"has model\.layers\.1\.input_layernorm\.weight, .* and 6 more, which the model of its",
    ),
    "int8": (
        changed(**{UP: lambda x: x.to(torch.int8)}),
        rf"has model\.{UP} \(I8\), which are quantised",
    ),
    "a quantised configuration": (
        changed_config(quantization_config={"quant_method": "fp8"}),
        "its configuration has a quantization_config",
    ),
    "tied, and two heads": (
        changed_config(tie_word_embeddings=True),
        r"has lm_head\.weight, model\.embed_tokens\.weight of different values, which its",
    ),
    "pickled": (as_pickle, r"it has neither model\.safetensors nor model\.safetensors\.index"),
    "an adapter": (as_adapter, "it is an adapter, and mesh=.* merge it"),
    "a file is gone": (without_a_file, r"names model-0.*\.safetensors, which is not there"),
    "cut off": (cut_off, "cannot be loaded"),
    "another family": (changed_config(model_type="gpt2"), "cannot be loaded|is not supported"),
}


@pytest.fixture(scope="module")
def llama() -> Any:
    return random_decoder("llama")


@pytest.mark.parametrize("case", BROKEN)
def test_a_checkpoint_that_cannot_go_in_parts_is_refused_by_name(
    case: str, llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, message = BROKEN[case]
    damage(saved(llama, tmp_path))
    monkeypatch.setattr("jax.device_put", lambda *_: pytest.fail("weights were put on a device"))
    with pytest.raises((LoadError, UnsupportedModelError), match=message) as info:
        MultiItemScorer.from_pretrained(tmp_path, device="jax", mesh={"model": 2})
    assert "\n" not in str(info.value)


def test_what_belongs_to_no_module_is_left_out(llama: Any, tmp_path: Path) -> None:
    """As transformers does: angles of old checkpoints, and heads of other models."""
    more = ("model.layers.0.self_attn.rotary_emb.inv_freq", "score.weight", "mtp.layers.0.weight")
    changed(**{name: lambda _: torch.ones(3) for name in more})(saved(llama, tmp_path))
    assert load_stored(tmp_path).num_parameters() == llama.num_parameters()


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "a device of torch": ({"device": "cpu"}, "^device='cpu' is one of torch's, and mesh="),
    "a map": ({"model_kwargs": {"device_map": "auto"}}, r"^model_kwargs=\{'device_map': 'auto'\}"),
    "an unknown one": ({"model_kwargs": {"attn": "eager"}}, r"^model_kwargs=\{'attn': 'eager'\}"),
    "too many chips": ({"mesh": {"model": 16}}, "needs 16 chips, and this process has 8"),
    "chips that divide no heads": ({"mesh": {"model": 8}}, r"8 chips .* n one of \[1, 2, 4\]"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_cannot_be_heeded_are_refused(
    case: str, llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, message = OPTIONS[case]
    monkeypatch.setattr("jax.device_put", lambda *_: pytest.fail("weights were put on a device"))
    with pytest.raises(InputError, match=message):
        MultiItemScorer.from_pretrained(saved(llama, tmp_path), **{"mesh": {"model": 2}, **options})


def test_rows_of_a_head_that_nothing_trained_are_refused(llama: Any, tmp_path: Path) -> None:
    def same(head: torch.Tensor) -> torch.Tensor:
        head[17] = head[5]
        return head

    changed(**{"lm_head.weight": same})(saved(llama, tmp_path))
    with pytest.raises(UnsupportedModelError, match=r"rows of tokens \[5, 17\] are not all differ"):
        MultiItemScorer.from_pretrained(
            tmp_path, device="jax", mesh={"model": 2}, label_token_ids=[5, 17]
        )


# what a model without weights in torch refuses


@pytest.fixture(scope="module")
def scorer(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> MultiItemScorer:
    folder = saved(llama, tmp_path_factory.mktemp("llama"))
    options: dict[str, Any] = {"mesh": {"model": 2}, "label_token_ids": LABELS}
    return MultiItemScorer.from_pretrained(folder, device="jax", **options)


IDS = torch.tensor([PREFIX])
ASKED: dict[str, Callable[[Any], Any]] = {
    "call": lambda model: model(input_ids=IDS),
    "generate": lambda model: model.generate(IDS, max_new_tokens=1),
    "a part of it": lambda model: model.lm_head(torch.ones(1, 64)),
    "unpatch": unpatch_model,
    "on a list of devices": lambda model: patch_model(model, device=["cpu", "cpu"]),
    "to": lambda model: model.to("cpu"),
    "half": lambda model: model.half(),
    "save": lambda model: model.save_pretrained("/nowhere"),
    "state_dict": lambda model: model.state_dict(),
    "load_state_dict": lambda model: model.load_state_dict({}, strict=False),
    "assign": lambda model: model.model.load_state_dict({}, strict=False, assign=True),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "torch.save": lambda model: torch.save(model, io.BytesIO()),
    "fill": lambda model: model.model.norm.weight.fill_(0),
    "data": lambda model: model.model.norm.weight.data.fill_(0),
    "set data": lambda model: setattr(model.model.norm.weight, "data", torch.ones(64)),
    "read": lambda model: model.model.norm.weight.tolist(),
    "numpy": lambda model: np.asarray(model.model.norm.weight),
    "a buffer": lambda model: model.model.rotary_emb.inv_freq.mul_(2),
    "resize": lambda model: model.resize_token_embeddings(400, mean_resizing=False),
    "init": lambda model: model.init_weights(),
}


@pytest.mark.parametrize("asked", ASKED)
def test_what_needs_weights_in_torch_is_refused_by_name(
    asked: str, scorer: MultiItemScorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model: Any = scorer.model
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match=r"load it without mesh to"):
        ASKED[asked](model) if asked != "save" else model.save_pretrained(tmp_path / "out")
    assert all(isinstance(x, Stored) for x in (*model.parameters(), *model.buffers()))


def test_after_all_that_it_scores_as_before(scorer: MultiItemScorer, llama: Any) -> None:
    wanted = one_by_one(llama, PREFIX, ITEMS, LABELS)
    with patched(scorer.model), patched(scorer.model):  # twice changes nothing
        got = torch.tensor(scorer.score(PREFIX, ITEMS))
    assert (got - wanted).abs().max() <= PROBABILITY_MAX_FLOAT32
    assert "loaded in parts, float32, in programs on" in repr(scorer)


def test_changes_that_touch_no_weight_are_followed_and_others_refused(
    scorer: MultiItemScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = scorer.model
    before = np.array(scorer.score(PREFIX, ITEMS))

    def scores_as_before() -> bool:
        return bool(np.abs(scorer.score(PREFIX, ITEMS) - before).max() <= PROBABILITY_REORDERED)

    monkeypatch.setattr(loading, "load_weights", lambda *_: pytest.fail("it loads again"))
    monkeypatch.setattr(model.config, "use_cache", not model.config.use_cache)
    assert scores_as_before()
    norm = model.model.norm.weight
    hook = model.model.layers[0].register_forward_hook(lambda *_: None)
    changes: list[tuple[Callable[[], Any], Callable[[], Any]]] = [
        (lambda: None, hook.remove),
        (
            lambda: setattr(model.model.norm, "weight", nn.Parameter(torch.ones(64))),
            lambda: setattr(model.model.norm, "weight", norm),
        ),
        (
            lambda: setattr(model.config, "num_hidden_layers", 1),
            lambda: setattr(model.config, "num_hidden_layers", 2),
        ),
    ]
    for change, undo in changes:
        change()
        with pytest.raises(UnsupportedModelError, match="undo that, change the checkpoint"):
            scorer.score(PREFIX, ITEMS)
        undo()
        assert scores_as_before()
