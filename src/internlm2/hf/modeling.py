"""InternLM2 as transformers models. The network itself is `internlm2.model`; here it meets transformers.

Parameters carry the official names, so checkpoints need no map. Positions are counted over attended tokens,
rotary angles are computed in every call (no buffers that a loader could leave empty), attention goes through
transformers' functions and caches (see attend.py), and the rotary base follows limits.py.
"""

from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation import GenerationMode
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.utils import can_return_tuple

from internlm2.errors import RequestError
from internlm2.hf import limits
from internlm2.hf.attend import CachedAttend, InternLM2Attention, attention_function
from internlm2.hf.chat import ChatMixin
from internlm2.hf.configuration import InternLM2Config
from internlm2.model.attention import Attend
from internlm2.model.heads import at_last_attended, mask_of_padding
from internlm2.model.layers import DecoderLayer
from internlm2.model.rope import Rotary, rotary
from internlm2.model.transformer import Transformer, run_layers


class InternLM2DecoderLayer(GradientCheckpointingLayer, DecoderLayer):
    """Our decoder layer, which transformers may checkpoint and put on a device of its own."""

    attention_class = InternLM2Attention

    def forward(self, hidden: torch.Tensor, angles: Rotary, attend: Attend) -> torch.Tensor:
        """hidden: (B, T, C) -> (B, T, C)."""
        if angles.cos.device != hidden.device:
            angles = Rotary(angles.cos.to(hidden.device), angles.sin.to(hidden.device))
        return DecoderLayer.forward(self, hidden, angles, attend)


class InternLM2PreTrainedModel(PreTrainedModel):
    """What all InternLM2 models share: names, abilities, and that no code of the folder is ever run."""

    config_class = InternLM2Config
    config: InternLM2Config  # pyrefly: ignore[bad-override-mutable-attribute] - as every model of transformers
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _input_embed_layer = "tok_embeddings"
    _no_split_modules = ["InternLM2DecoderLayer"]  # noqa: RUF012 - read by transformers as class attributes
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]  # noqa: RUF012 - in very old .bin files
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "InternLM2PreTrainedModel":
        """As in transformers, but `trust_remote_code` is accepted and ignored: there is nothing to trust."""
        kwargs["trust_remote_code"] = False
        return super().from_pretrained(*args, **kwargs)


class InternLM2Model(InternLM2PreTrainedModel):
    """The trunk: ids in, hidden states after the final norm out."""

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        self.network_config = config.network()
        trunk = Transformer(self.network_config, layer_class=InternLM2DecoderLayer)
        self.tok_embeddings = trunk.tok_embeddings
        self.layers = trunk.layers
        self.norm = trunk.norm
        for attention in self._attentions():
            attention.config = config
        self.post_init()

    @can_return_tuple
    def forward(  # noqa: PLR0917 - the order of arguments in transformers
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        length_limits: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, T, C).

        input_ids: (B, T), or inputs_embeds: (B, T, C). attention_mask: (B, past + T), 0 at padding on either
        side. length_limits: (B,) int64, how long each sequence may become; only dynamic scaling reads it, see
        limits.py.
        Raises RequestError for contradicting arguments.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise RequestError("Give either input_ids or inputs_embeds, and not both.")
        embeddings = self.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, C)
        cache = self._cache(past_key_values, use_cache)
        if position_ids is None:
            position_ids = _positions(embeddings, attention_mask, cache)  # (B, T)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=embeddings,
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=position_ids,
        )
        length_limits = limits.of_forward(
            self.config, position_ids, given=length_limits, attention_mask=attention_mask, cache=cache
        )
        angles = rotary(self.network_config, position_ids, length_limits)
        attend = CachedAttend(
            modules=self._attentions(),
            function=attention_function(self.config._attn_implementation),
            mask=mask,
            cache=cache,
            options={"position_ids": position_ids, **kwargs},
            keep_weights=bool(
                self.config.output_attentions if output_attentions is None else output_attentions
            ),
        )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states: list[torch.Tensor] = []
        observe = states.append if output_hidden_states else None
        hidden = run_layers(self.layers, self.norm, embeddings, angles, attend, observe=observe)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=(*states, hidden) if output_hidden_states else None,
            attentions=attend.kept_weights(),
        )

    def _attentions(self) -> list[InternLM2Attention]:
        return [layer.get_submodule("attention") for layer in self.layers]  # pyrefly: ignore[bad-return]

    def _cache(self, given: Cache | None, use_cache: bool | None) -> Cache | None:
        if self.gradient_checkpointing_is_on:
            if given is not None:
                raise RequestError(
                    "past_key_values and gradient checkpointing exclude each other: the recomputed layers "
                    "would write to the cache twice. Call model.eval(), or "
                    "model.gradient_checkpointing_disable()."
                )
            return None
        if given is None and (self.config.use_cache if use_cache is None else use_cache):
            return DynamicCache(config=self.config)
        return given

    @property
    def gradient_checkpointing_is_on(self) -> bool:
        """Whether this call will recompute layers in the backward pass."""
        return self.training and any(layer.gradient_checkpointing for layer in self.layers)


class InternLM2ForCausalLM(InternLM2PreTrainedModel, ChatMixin, GenerationMixin):
    """The language model, with `generate`, `chat` and `stream_chat`."""

    _tied_weights_keys = {"output.weight": "model.tok_embeddings.weight"}  # noqa: RUF012 - as above

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        self.model = InternLM2Model(config)
        self.vocab_size = config.vocab_size
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The output projection, which the official checkpoints call `output`."""
        return self.output

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the output projection."""
        self.output = new_embeddings

    @can_return_tuple
    def forward(  # noqa: PLR0917 - the order of arguments in transformers
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        length_limits: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V) float32, as the official code; other arguments as in `InternLM2Model`.

        labels: (B, T) int64, not shifted, -100 where no loss is wanted. logits_to_keep: only so many last
        positions (0: all), or the indices of the positions.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            length_limits=length_limits,
            **_without_loss_options(kwargs),
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.output(outputs.last_hidden_state[:, kept]).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> bool:
        # NOTE: the one place in `generate` where max_length is final and the loop has not begun; a later
        # change of the limit would rotate new keys otherwise than those in the cache.
        result = super()._prepare_cache_for_generation(  # pyrefly: ignore[bad-argument-type]
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        is_open = model_kwargs.get("length_limits") is None and self.config.rope_mode == "stateless"
        if is_open and self.config.has_dynamic_rope:
            cache = model_kwargs.get("past_key_values")
            in_cache = limits.remembered(cache) if isinstance(cache, Cache) else None
            model_kwargs["length_limits"] = (
                limits.of_request(model_kwargs["position_ids"], max_length=max_cache_length + 1)
                if in_cache is None
                else in_cache
            )
        return result


class InternLM2ForSequenceClassification(InternLM2PreTrainedModel):
    """Class logits, read at the last token before the padding."""

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels or 2
        self.model = InternLM2Model(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Logits (B, num_labels) float32. Without a mask, the first pad token and what follows is padding."""
        if attention_mask is None and input_ids is not None and self.config.pad_token_id is not None:
            attention_mask = mask_of_padding(input_ids, self.config.pad_token_id)
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            use_cache=bool(use_cache),
            **_without_loss_options(kwargs),
        )
        logits = self.score(at_last_attended(outputs.last_hidden_state, attention_mask)).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _positions(
    embeddings: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache | None
) -> torch.Tensor:
    """(B, T) int64: counted over attended positions where a 2-d mask says which those are."""
    num_positions = embeddings.shape[1]
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -num_positions:]
    past = 0 if cache is None else cache.get_seq_length()
    positions = torch.arange(num_positions, device=embeddings.device) + past
    return positions[None].expand(embeddings.shape[0], -1)


def _without_loss_options(options: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in options.items() if key != "num_items_in_batch"}
