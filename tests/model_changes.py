"""What happens to a model between two calls: every change by its name, and who follows it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Change:
    """Something that happens to a model, and what programs say of it; None: they follow."""

    make: Callable[[Any], None]
    refused: str | None = None

    @property
    def name(self) -> str:
        return self.make.__name__.strip("_")


CHANGES: list[Change] = []


def change(refused: str | None = None) -> Callable[[Any], Any]:
    def add(make: Callable[[Any], None]) -> Callable[[Any], None]:
        CHANGES.append(Change(make, refused))
        return make

    return add


def step(model: Any, **options: Any) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, **options)
    ids = torch.tensor([[1, 2, 3]])
    labels = ids[:, 0] % 2 if hasattr(model, "score") else ids
    model(input_ids=ids, labels=labels)[0].backward()
    optimizer.step()
    model.eval()


@change()
def fused_step(model: Any) -> None:
    step(model, fused=True)


@change()
def foreach_step(model: Any) -> None:
    step(model, foreach=True)


@change()
def written_through_data(model: Any) -> None:
    model.model.layers[0].self_attn.v_proj.weight.data.mul_(1.5)


@change()
def one_value_through_numpy(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.detach().numpy()[3, 5] += 9.0


@change()
def vector_to_parameters(model: Any) -> None:
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector * 1.1, model.parameters())


@change()
def state_assigned(model: Any) -> None:
    model.load_state_dict({k: 1.1 * v for k, v in model.state_dict().items()}, assign=True)


@change()
def state_loaded(model: Any) -> None:
    model.load_state_dict({k: 1.1 * v for k, v in model.state_dict().items()})


@change()
def rotary_buffer(model: Any) -> None:
    model.model.rotary_emb.inv_freq.data.mul_(0.5)


@change()
def bfloat16(model: Any) -> None:
    model.to(torch.bfloat16)


@change("is torch.float16")
def float16(model: Any) -> None:
    model.half()


@change("is torch.float64")
def float64(model: Any) -> None:
    model.double()


@change()
def under_inference_mode(model: Any) -> None:
    with torch.inference_mode():
        model.load_state_dict({k: 1.1 * v for k, v in model.state_dict().items()}, assign=True)


@change()
def layer_replaced(model: Any) -> None:
    model.model.layers[-1] = copy.deepcopy(model.model.layers[0])


@change("input_layernorm.weight' is not one of a plain")
def layer_in_two_places(model: Any) -> None:
    model.model.layers[-1] = model.model.layers[0]


@change()
def layer_appended(model: Any) -> None:
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))
    model.config.num_hidden_layers += 1
    model.config.layer_types = model.config.num_hidden_layers * ["full_attention"]


@change()
def layer_removed(model: Any) -> None:
    del model.model.layers[-1]
    model.config.num_hidden_layers -= 1


@change("a forward hook of the Qwen3ForCausalLM")
def hook_on_the_model(model: Any) -> None:
    def double(_: Any, __: Any, output: Any) -> Any:
        output.logits = 2 * output.logits
        return output

    model.register_forward_hook(double)


@change("a forward hook of the Qwen3Model 'model'")
def hook_on_the_decoder(model: Any) -> None:
    def double(_: Any, __: Any, output: Any) -> Any:
        output.last_hidden_state = 2 * output.last_hidden_state
        return output

    model.model.register_forward_hook(double)


@change("a forward hook of the Qwen3DecoderLayer 'model.layers.0'")
def pre_hook_on_a_layer(model: Any) -> None:
    model.model.layers[0].register_forward_pre_hook(lambda _, given: (1.5 * given[0], *given[1:]))


@change("a forward hook of the Qwen3MLP")
def hook_that_steers(model: Any) -> None:
    vector = torch.linspace(-1, 1, 64)
    model.model.layers[0].mlp.register_forward_hook(lambda _, __, out: out + vector.to(out.dtype))


@change("a forward hook of the Qwen3MLP")
def hook_that_mixes_tokens(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda _, __, out: out + out.mean(1, True))


@change("a forward hook of the Qwen3DecoderLayer")
def hook_that_writes_in_place(model: Any) -> None:
    def last(_: Any, __: Any, out: torch.Tensor) -> None:
        out[:, -1] *= 1.5

    model.model.layers[0].register_forward_hook(last)


@change("is not one of a plain")
def fewer_layers_by_the_configuration(model: Any) -> None:
    model.config.num_hidden_layers -= 1


@change("a forward hook of the Linear 'lm_head'")
def hook_on_the_head(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda _, __, out: 3 * out)


@change("lm_head.bias")
def head_with_a_bias(model: Any) -> None:
    model.lm_head = nn.Linear(64, 320, dtype=model.dtype)


@change()
def head_replaced(model: Any) -> None:
    model.lm_head = nn.Linear(64, 320, bias=False, dtype=model.dtype)


@change("lm_head.0.weight")
def head_of_two(model: Any) -> None:
    first = nn.Linear(64, 64, bias=False, dtype=model.dtype)
    model.lm_head = nn.Sequential(first, model.lm_head)


@change("a forward put on the Qwen3ForCausalLM")
def forward_of_the_model(model: Any) -> None:
    forward = model.forward

    @functools.wraps(forward)  # which says that it is transformers'
    def halved(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits / 2
        return output

    model.forward = halved


@change("a forward put on the Qwen3MLP")
def forward_of_a_module(model: Any) -> None:
    forward = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: 2 * forward(x)


class OtherNorm(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = 2 * self.norm(x)
        return found


@change("is not one of a plain")
def module_wrapped(model: Any) -> None:
    model.model.layers[0].input_layernorm = OtherNorm(model.model.layers[0].input_layernorm)


@change("is_causal")
def not_causal(model: Any) -> None:
    model.model.layers[0].self_attn.is_causal = False


@change("variance_epsilon is 0.5 and by the model's configuration 1e-06")
def epsilon(model: Any) -> None:
    model.model.layers[0].input_layernorm.variance_epsilon = 0.5


@change("is not one of a plain")
def parametrized(model: Any) -> None:
    up = model.model.layers[0].mlp.up_proj
    nn.utils.parametrizations.weight_norm(up)
    up.parametrizations.weight.original0.data.mul_(2)
