"""A whole Transformers model under edits, by tests/reference.py, without TransformerLens.

Transformers lets a function of one's own stand in for the attention of every layer. It gets
queries and keys after RoPE; they are un-rotated with the frequencies of the model's own rotary
module, and the reference does the rest.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from . import reference

NAME = "by_reference"


class ReferenceModel:
    """A model of Transformers whose attention is the reference's.

    `run` gives logits under edits; `outputs` gives each layer's z. One prompt at a time, whole.
    After a run, `vectors` has each layer's q and k before RoPE and before edits.
    """

    _running: "ReferenceModel | None" = None

    def __init__(self, model: Any, pairing: str) -> None:
        """Take over a model of Transformers; `pairing` is that of its rotated layers."""
        AttentionInterface.register(NAME, _attention)
        self.model, self.pairing = model.eval(), pairing
        model.config._attn_implementation = NAME
        model.config._experts_implementation = "eager"  # the others lack float64
        self.n_layers = model.config.num_hidden_layers
        self.modules = {
            module.layer_idx: module
            for name, module in model.named_modules()
            if name.rsplit(".", 1)[-1] in ("self_attn", "attn", "attention")
        }
        self.short = {index: self.theta(index) for index in range(self.n_layers)}
        self.edits: list[Any] = []
        self.replacements: dict[int, Any] = {}
        self.z: dict[int, Tensor] = {}
        self.vectors: dict[int, tuple[Tensor, Tensor]] = {}
        # Arguments of the layers' attention in the run under way, to call it on another input.
        self.called: dict[int, tuple[Any, dict[str, Any]]] = {}
        self.projecting: tuple[Tensor, Tensor] | bool = False
        for index, module in self.modules.items():
            module.register_forward_pre_hook(functools.partial(self._note, index), with_kwargs=True)

    def run(
        self, tokens: Tensor, edits: Any = (), replacements: dict[int, Any] | None = None
    ) -> Tensor:
        """Logits [pos, vocabulary] of one prompt [pos] under edits.

        `replacements` has, by the index of an AblateHeads with mode mean or resample, z of every
        layer [pos, head, d_head] to put in its place.
        """
        self.edits, self.replacements, self.z = list(edits), replacements or {}, {}
        ReferenceModel._running = self
        try:
            with torch.no_grad():
                return self.model(tokens[None], use_cache=False).logits[0]
        finally:
            ReferenceModel._running = None

    def outputs(
        self, tokens: Tensor, edits: Any = (), replacements: dict[int, Any] | None = None
    ) -> dict[int, Tensor]:
        """Each layer's z [pos, head, d_head] in such a run."""
        self.run(tokens, edits, replacements)
        return self.z

    def _note(self, index: int, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if not self.projecting:
            self.called[index] = args, dict(kwargs)

    def input(self, index: int) -> Tensor:
        """A layer's attention input [pos, d_model] in the run under way."""
        args, kwargs = self.called[index]
        return (args[0] if args else kwargs["hidden_states"])[0]

    def project(self, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """What q and k before RoPE become if the attention of a layer gets the input x."""
        args, kwargs = self.called[index]
        self.projecting = True
        if args:
            self.modules[index](x[None], *args[1:], **kwargs)
        else:
            self.modules[index](**{**kwargs, "hidden_states": x[None]})
        found, self.projecting = self.projecting, False
        return found

    def theta(self, index: int) -> Tensor:
        """θ [pair] of a layer, as the model's rotary module has it now; [0] without RoPE."""
        if not self.rotates(index):
            return torch.empty(0, dtype=torch.float64)
        rotary, prefix = self._rotary(index)
        return getattr(rotary, f"{prefix}inv_freq").detach().double().clone()

    def rotates(self, index: int) -> bool:
        """Whether a layer has RoPE."""
        module, kind = self.modules[index], self.model.config.model_type
        if kind == "gpt2":
            return False
        if kind == "smollm3":
            return bool(module.use_rope)
        if kind == "cohere2":
            return module.sliding_window is not None
        return bool(module.is_sliding) if kind == "exaone4" else True

    def layer(self, index: int, scaling: float, kwargs: dict[str, Any]) -> reference.Layer:
        """What the reference needs to know of a layer in the run under way."""
        module, gain = self.modules[index], 1.0
        if self.rotates(index):
            rotary, prefix = self._rotary(index)
            gain = float(getattr(rotary, f"{prefix}attention_scaling"))
        weights = None
        if self.normed_late:
            weights = module.query_layernorm.weight, module.key_layernorm.weight
        return reference.Layer(
            index=index,
            scale=float(scaling),
            theta=self.theta(index),
            band_theta=self.short[index],
            pairing=self.pairing,
            gain=gain,
            window=kwargs.get("sliding_window"),
            softcap=kwargs.get("softcap"),
            sinks=kwargs.get("s_aux"),
            weights=weights,
        )

    @property
    def normed_late(self) -> bool:
        """Whether queries and keys are normed after RoPE."""
        return self.model.config.model_type == "hunyuan_v1_dense"

    def _rotary(self, index: int) -> tuple[Any, str]:
        """The rotary module of a layer, and what the names of its values begin with."""
        for module in self.model.modules():
            if hasattr(module, "inv_freq"):
                return module, ""
            kind = (getattr(self.model.config, "layer_types", None) or [""] * self.n_layers)[index]
            if hasattr(module, f"{kind}_inv_freq"):
                return module, f"{kind}_"
        raise AssertionError("the model has no rotary module")


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """z [1, pos, head, d_head], as Transformers asks for it; tensors are [1, head, pos, d_head]."""
    model = ReferenceModel._running
    assert model is not None, "outside `run`"
    assert len(query) == 1, "one prompt at a time"
    assert query.shape[2] == key.shape[2], "without a KV cache"
    assert attention_mask is None, "the reference has a mask of its own"
    layer = model.layer(module.layer_idx, scaling, kwargs)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if layer.weights is not None:
        q, k = q / layer.weights[0], k / layer.weights[1]
    q, k = (
        torch.stack([reference.unrotated(layer, x[:, head]) for head in range(x.shape[1])], dim=1)
        for x in (q, k)
    )
    if model.projecting:
        model.projecting = q, k
        return torch.zeros_like(query).transpose(1, 2), None
    model.vectors[layer.index] = q, k
    x = model.input(layer.index)
    z = reference.attention(
        layer,
        q,
        k,
        v,
        model.edits,
        {index: model.theta(index) for index in range(model.n_layers)},
        {number: found[layer.index] for number, found in model.replacements.items()},
        x,
        lambda other: model.project(layer.index, other),
    )
    model.z[layer.index] = z
    return z[None], None
