"""`MultiItemScorer.from_pretrained`: the bits of loading by hand, the one place, errors."""

from __future__ import annotations

import ast
import functools
import itertools
import json
import shutil
import socket
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import packscore
from cli_helpers import RECORDS, Cli
from helpers import random_classifier
from packscore import (
    InputError,
    LoadError,
    MultiItemScorer,
    PackscoreError,
    is_patched,
    patch_model,
    program_of,
    shipped_model_path,
)
from packscore.integrations.langchain import PackscoreReranker
from packscore.integrations.llama_index import PackscoreRerank
from packscore.integrations.rerankers import PackscoreRanker
from packscore.loading import load_model

QUERY, TEXTS = "shuffle a list", ["Shuffle list x in place.", "Open a file.", ""]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of three classes, with the shipped model's tokenizer."""
    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = AutoTokenizer.from_pretrained(shipped_model_path())
    model = random_classifier(num_labels=3, vocab_size=len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the shipped model, to be damaged."""
    return Path(shutil.copytree(shipped_model_path(), tmp_path / "model"))


@pytest.mark.usefixtures("quick_programs")
@pytest.mark.parametrize(
    ("kind", "dtype", "device"),
    [
        *itertools.product(("reranker", "classifier"), DTYPES, ("cpu",)),
        *(("reranker", "float32", "jax"), ("classifier", "bfloat16", "jax")),
    ],
)
def test_scores_are_the_bits_of_loading_by_hand(
    classifier: Path, kind: str, dtype: str, device: str
) -> None:
    path = classifier if kind == "classifier" else shipped_model_path()
    auto: Any = AutoModelForSequenceClassification if kind == "classifier" else AutoModelForCausalLM
    model = auto.from_pretrained(path, dtype=DTYPES[dtype]).eval()
    patch_model(model, device=None if device == "cpu" else device)
    prompt = "yes-no"
    by_hand = MultiItemScorer(model, AutoTokenizer.from_pretrained(path), prompt=prompt)
    loaded: Any = MultiItemScorer.from_pretrained(path, prompt=prompt, device=device, dtype=dtype)
    assert type(loaded.model) is type(model)
    assert loaded.model.dtype == DTYPES[dtype]
    assert (program_of(loaded.model) is not None) == (device == "jax")
    scores = by_hand.score(QUERY, TEXTS, flow="packed")
    assert loaded.score(QUERY, TEXTS, flow="packed") == scores
    assert len(set(map(tuple, scores))) == len(TEXTS)


def test_options_reach_the_model_and_the_scorer(checkpoint: Path) -> None:
    given: Any = {"dtype": torch.float32, "device": torch.device("cpu"), "mask_impl": "dense"}
    scorer = MultiItemScorer.from_pretrained(
        checkpoint, label_token_ids=[5, 17], model_kwargs={"attn_implementation": "eager"}, **given
    )
    assert scorer.mask_impl == "dense"
    assert scorer.label_token_ids == [5, 17]
    assert "eager" in scorer.model.config._attn_implementation  # type: ignore[union-attr]
    assert isinstance(scorer.tokenizer, type(AutoTokenizer.from_pretrained(checkpoint)))
    by_map = MultiItemScorer.from_pretrained(checkpoint, model_kwargs={"device_map": "cpu"})
    assert is_patched(by_map.model)
    with pytest.raises(InputError, match=r"^device='cpu' and a device_map in model_kwargs"):
        MultiItemScorer.from_pretrained(
            checkpoint, device="cpu", model_kwargs={"device_map": "cpu"}
        )


def test_the_fastest_device_is_taken_unless_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rule as the command line's, whose doctor tells the reason."""
    found = packscore.loading
    for device in (None, "auto"):
        monkeypatch.setattr(found, "tpu_is_plugged_in", lambda: True)
        assert found.place_of(device) == found.Place("cpu", "tpu", "this machine has a TPU")
        monkeypatch.setattr(found, "tpu_is_plugged_in", lambda: False)
        assert found.place_of(device).programs is None
    assert found.place_of("cpu") == found.place_of(torch.device("cpu")) == found.Place("cpu")


def test_without_weights_it_encodes() -> None:
    scorer = MultiItemScorer.from_pretrained(shipped_model_path(), device="meta", prompt="yes-no")
    whole = MultiItemScorer.from_pretrained(shipped_model_path(), device="cpu", prompt="yes-no")
    assert all(p.is_meta for p in scorer.model.parameters())
    assert scorer.encode(QUERY, TEXTS).prompt_tokens == whole.encode(QUERY, TEXTS).prompt_tokens


def save_adapter(base: Any, folder: Path) -> Any:
    """LoRA over a model, as PEFT saves it with a tokenizer, and PEFT's model."""
    torch.manual_seed(0)
    wrapped = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False))
    wrapped.save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copy(shipped_model_path() / name, folder)
    return wrapped.eval()


def load_adapter(folder: Path) -> MultiItemScorer:
    return MultiItemScorer.from_pretrained(
        folder, device="cpu", dtype="float32", label_token_ids=[5, 17]
    )


def test_an_adapter_brings_its_model(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(shipped_model_path(), dtype=torch.float32).eval()
    before = MultiItemScorer(patch_model(base), label_token_ids=[5, 17]).score([1, 2], [[3]])
    wrapped = save_adapter(base, tmp_path)
    expected = MultiItemScorer(wrapped, label_token_ids=[5, 17]).score([1, 2], [[3]])
    if tells_of_adapters():
        assert load_adapter(tmp_path).score([1, 2], [[3]]) == expected != before
    else:
        with pytest.raises(LoadError, match="does not say which weights of an adapter it found"):
            load_adapter(tmp_path)


def test_of_an_adapter_the_configuration_alone_is_its_models(tmp_path: Path) -> None:
    save_adapter(AutoModelForCausalLM.from_pretrained(shipped_model_path()), tmp_path)
    assert load_model(tmp_path, device="meta").config.model_type == "qwen3"


def tells_of_adapters() -> bool:
    """Transformers 5.7 and newer say what of an adapter they found."""
    return tuple(map(int, version("transformers").split(".")[:2])) >= (5, 7)


def lose_a_weight(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    weights.pop(min(weights))
    save_file(weights, file, {"format": "pt"})


ADAPTERS: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "its model lacks a weight": (
        lambda base, _: without_head(base),
        r"the checkpoint has no lm_head\.weight, so they would be random",
    ),
    "it lacks a weight": (
        lambda _, adapter: lose_a_weight(adapter),
        r"the checkpoint has no .*lora_A\.default\.weight, so they would be random",
    ),
    "it is a model too": (
        lambda base, adapter: shutil.copy(base / "config.json", adapter),
        "it is a model and an adapter in one",
    ),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_that_is_not_whole_is_refused_by_name(
    checkpoint: Path, tmp_path: Path, case: str
) -> None:
    damage, message = ADAPTERS[case]
    if case == "it lacks a weight" and not tells_of_adapters():
        message = "does not say which weights of an adapter it found"
    adapter = tmp_path / "adapter"
    save_adapter(AutoModelForCausalLM.from_pretrained(checkpoint), adapter)
    damage(checkpoint, adapter)
    with pytest.raises(LoadError, match=message):
        load_adapter(adapter)


def test_families_whose_own_attention_is_needed_get_it(tmp_path: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 3200}
    Gemma2ForCausalLM(Gemma2Config(**sizes, **heads)).save_pretrained(tmp_path)
    for name in TOKENIZER:
        shutil.copy(shipped_model_path() / name, tmp_path)
    scorer = MultiItemScorer.from_pretrained(tmp_path, device="cpu", label_token_ids=[5, 17])
    assert len(scorer.score([1, 2], [[3], [4]])) == 2


# the one place


def test_nothing_else_loads() -> None:
    home = Path(packscore.__file__).parent
    calls = (
        (str(path.relative_to(home)), ast.unparse(node.func))
        for path in home.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    )
    loading = {
        path
        for path, called in calls
        if called.endswith(".from_pretrained") and called != "MultiItemScorer.from_pretrained"
    }
    assert loading == {"loading.py"}


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `from_pretrained` was asked for since."""
    asked: list[Any] = []
    own: Any = MultiItemScorer.from_pretrained.__func__  # type: ignore[attr-defined]

    @functools.wraps(own)
    def seen(cls: Any, name_or_path: Any, **options: Any) -> MultiItemScorer:
        asked.append((str(name_or_path), options))
        scorer: MultiItemScorer = own(cls, name_or_path, **options)
        return scorer

    monkeypatch.setattr(MultiItemScorer, "from_pretrained", classmethod(seen))
    return asked


def test_the_command_line_goes_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loads: list[Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    cli, path = Cli(tmp_path), str(shipped_model_path())
    cli.write("in.jsonl", RECORDS)
    model = ("-m", path, "--dtype", "float32", "--max-tokens", "200")
    assert cli("score", "in.jsonl", "-o", "a.jsonl", *model, "--device", "cpu").code == 0
    assert cli("rank", "in.jsonl", "-o", "b.jsonl", *model, "--dry-run").code == 0
    assert cli("verify", "in.jsonl", *model, "--device", "cpu", "--limit", "1").code == 0
    assert [(name, told["device"], told["max_tokens"]) for name, told in loads] == [
        (path, device, 200) for device in ("cpu", "meta", "cpu")
    ]
    assert {told["dtype"] for _, told in loads} == {"float32"}


def test_the_command_line_scores_classes(classifier: Path, tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    cli.write("in.jsonl", RECORDS)
    read, model = str(tmp_path / "in.jsonl"), ("-m", str(classifier), "--device", "cpu")
    done = cli("score", read, "-o", str(tmp_path / "out.csv"), *model)
    assert done.code == 0, done.err
    assert "score_LABEL_0,score_LABEL_1,score_LABEL_2" in (tmp_path / "out.csv").read_text()
    assert "rank compares two labels" in cli("rank", read, "-o", "never.jsonl", *model).err


@pytest.mark.parametrize(
    "make",
    [PackscoreReranker.from_pretrained, PackscoreRerank.from_pretrained, PackscoreRanker],
    ids=["langchain", "llama-index", "rerankers"],
)
def test_adapters_go_through_it(make: Callable[..., Any], loads: list[Any]) -> None:
    make(shipped_model_path(), device="cpu", max_tokens=200, attn_implementation="eager")
    ((name, told),) = loads
    assert name == str(shipped_model_path())
    assert told == {
        "prompt": "qwen3-reranker",
        "device": "cpu",
        "max_tokens": 200,
        "model_kwargs": {"attn_implementation": "eager"},
    }


def test_a_folder_is_read_without_a_look_at_the_network(
    classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def refused(*args: Any, **_: Any) -> None:
        asked.append(args)
        raise OSError("there is no network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "create_connection", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between attempts
    for path in (shipped_model_path(), str(classifier)):
        assert MultiItemScorer.from_pretrained(path, device="cpu", prompt="yes-no").score(
            "a", ["b"]
        )
        assert not asked
    with pytest.raises(LoadError):
        MultiItemScorer.from_pretrained("nobody/nothing", device="cpu")
    assert asked  # the control: a name on the hub is looked for


# errors


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def without_tokenizer(folder: Path) -> None:
    for name in TOKENIZER:
        (folder / name).unlink()


def without_head(folder: Path) -> None:
    """An untied model of which nobody saved the head."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))


def without_class_head(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["Qwen3ForSequenceClassification"], "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))


def of_other_sizes(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def cut(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)


DAMAGES: dict[Callable[[Path], Any], str] = {
    without_tokenizer: "it has no tokenizer; put one beside the model",
    without_head: r"the checkpoint has no lm_head\.weight, so they would be random",
    without_class_head: r"the checkpoint has no score\.weight, so they would be random",
    without("model.safetensors"): "no file named model.safetensors",
    without("config.json"): "Unrecognized model|config.json",
    of_other_sizes: r"model\.norm\.weight of another shape than the configuration",
    cut: "deserializing header",
    lambda folder: shutil.rmtree(folder): "there is no such folder",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=[*map(str, range(len(DAMAGES)))])
def test_a_checkpoint_that_is_not_whole_is_refused_by_name(
    checkpoint: Path, damage: Callable[[Path], Any]
) -> None:
    damage(checkpoint)
    with pytest.raises(LoadError, match=DAMAGES[damage]) as info:
        MultiItemScorer.from_pretrained(checkpoint, device="cpu")
    told = str(info.value)
    assert told.startswith(f"name_or_path={str(checkpoint)!r} cannot be loaded: ")
    assert "\n" not in told
    assert isinstance(info.value, OSError | PackscoreError)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "device": ({"device": "gpu"}, "^device='gpu' cannot be used: .*it must be 'auto', 'cpu'"),
    "its number": ({"device": "cuda:99"}, "^device='cuda:99' cannot be used"),
    "dtype": ({"dtype": "int8"}, "^dtype='int8' must be 'auto', or a floating dtype"),
    "prompt": ({"prompt": "qwen"}, "^prompt='qwen' must be a PromptSpec or one of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_are_refused_before_anything_is_read(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        MultiItemScorer.from_pretrained("/nowhere", **options)


def test_an_unknown_argument_of_the_model_is_told() -> None:
    with pytest.raises(LoadError, match="unexpected keyword argument 'attn'"):
        MultiItemScorer.from_pretrained(
            shipped_model_path(), device="cpu", model_kwargs={"attn": "eager"}
        )
