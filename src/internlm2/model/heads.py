"""What is read off the trunk: next-token logits, a reward, a value per token, or class logits.

Each head is a whole model: ids in, float32 out. `ROPE_MODES` says whose length fixes the rotary base.
"""

from typing import Literal, get_args

import torch
from torch import nn

from internlm2.errors import RequestError
from internlm2.model.attention import Attend, MaskedAttend, causal_attend, padding_mask
from internlm2.model.config import ModelConfig
from internlm2.model.rope import rotary
from internlm2.model.transformer import Transformer, init_weights

RopeMode = Literal["stateless", "reference"]
ROPE_MODES: tuple[str, ...] = get_args(RopeMode)


class Model(nn.Module):
    """A trunk (`model.` in checkpoint names) and the forward pass that every head shares.

    rope_mode: "stateless" takes the rotary base of a sequence from its own length limit; "reference" from the
    length of the whole padded batch so far, as the official code does in a full prefill. They differ only with
    dynamic scaling beyond max_position_embeddings, for padded batches and for decoding with a cache.
    """

    def __init__(self, config: ModelConfig, *, rope_mode: RopeMode = "stateless") -> None:
        super().__init__()
        if rope_mode not in ROPE_MODES:
            raise RequestError(f"rope_mode is {rope_mode!r}, but must be one of {', '.join(ROPE_MODES)}.")
        self.config = config
        self.rope_mode = rope_mode
        self.model = Transformer(config)

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        length_limits: torch.Tensor | None = None,
        attend: Attend | None = None,
    ) -> torch.Tensor:
        """Final-norm hidden states.

        input_ids: (B, T) int64. attention_mask: (B, T), 0 at padding, on either side; without `attend` only.
        position_ids: (B, T) int64; default: counted over attended positions. length_limits: (B,) int64, how
        long each sequence may become (prompt + answer); default: how long it is. attend: where attention finds
        keys and values; default: this batch alone. Returns (B, T, C) in the dtype of the weights.
        """
        num_positions = input_ids.shape[1]
        if position_ids is None:
            position_ids = self._positions(input_ids, attention_mask)
        if length_limits is None:
            if attention_mask is None or self.rope_mode == "reference":
                # A column of ones, so that a symbolic T stays symbolic under torch.compile.
                length_limits = torch.ones_like(input_ids[:, 0]) * num_positions
            else:
                length_limits = attention_mask.long().sum(-1)
        if attend is None:
            attend = causal_attend if attention_mask is None else MaskedAttend(padding_mask(attention_mask))
        angles = rotary(self.config, position_ids, length_limits)
        return self.model(self.model.tok_embeddings(input_ids), angles, attend)

    @staticmethod
    def _positions(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        if attention_mask is None:
            return torch.arange(input_ids.shape[1], device=input_ids.device)[None].expand_as(input_ids)
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)

    def parameters_by_checkpoint_name(self) -> dict[str, nn.Parameter]:
        """The official names, such as `model.layers.0.attention.wqkv.weight`, and the live parameters."""
        return dict(self.named_parameters())

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights: normal(0, initializer_range), norms one, biases zero."""
        init_weights(self, self.config.initializer_range, generator)


def mask_of_padding(input_ids: torch.Tensor, pad_token_id: int) -> torch.Tensor:
    """1 before the first pad token of each row, (B, T); a row that begins with padding is padded left."""
    is_pad = input_ids == pad_token_id
    before = is_pad.long().cumsum(-1) == 0
    left_padding = (~is_pad).long().cumsum(-1) == 0
    return torch.where(is_pad[:, :1], ~left_padding, before).long()


def at_last_attended(hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """hidden: (B, T, C) -> (B, C), at the last attended position of each row."""
    if attention_mask is None:
        return hidden[:, -1]
    last = attention_mask.long().cumsum(-1).argmax(-1)  # (B,)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), last.to(hidden.device)]


class CausalLM(Model):
    """Language model: logits of the next token."""

    def __init__(self, config: ModelConfig, *, rope_mode: RopeMode = "stateless") -> None:
        super().__init__(config, rope_mode=rope_mode)
        # A tied output has no tensor of its own in the checkpoint, so it has no module here. Under tensor
        # parallelism it is a module that joins the logits of all processes.
        self.output: nn.Module | None = (
            None
            if config.tie_word_embeddings
            else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )

    def forward(
        self,
        input_ids: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        length_limits: torch.Tensor | None = None,
        attend: Attend | None = None,
        logits_to_keep: int = 0,
    ) -> torch.Tensor:
        """Logits (B, T, V) float32. logits_to_keep: only the last so many positions (0: all)."""
        hidden = self.hidden_states(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            length_limits=length_limits,
            attend=attend,
        )
        return self.logits(hidden[:, -logits_to_keep:])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: (B, T, C) from `hidden_states` -> (B, T, V) float32."""
        if self.output is None:
            return nn.functional.linear(hidden, self.model.tok_embeddings.weight).float()
        return self.output(hidden).float()


class ValueModel(Model):
    """A number for every position: the critic of PPO."""

    def __init__(self, config: ModelConfig, *, rope_mode: RopeMode = "stateless") -> None:
        super().__init__(config, rope_mode=rope_mode)
        self.v_head = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, input_ids: torch.Tensor, *, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Values (B, T) float32."""
        return self.v_head(self.hidden_states(input_ids, attention_mask=attention_mask))[..., 0].float()


class RewardModel(ValueModel):
    """A score for every sequence, read at its last attended position, where the reward token stands."""

    def forward(self, input_ids: torch.Tensor, *, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Scores (B,) float32. input_ids: (B, T), each ending with `config.reward_token_id`, padded right."""
        values = super().forward(input_ids, attention_mask=attention_mask)  # (B, T)
        return at_last_attended(values[..., None], attention_mask)[:, 0]


class SequenceClassifier(Model):
    """Class logits, read at the last token before the first padding token."""

    def __init__(self, config: ModelConfig, *, rope_mode: RopeMode = "stateless") -> None:
        super().__init__(config, rope_mode=rope_mode)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)

    def forward(self, input_ids: torch.Tensor, *, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B, num_labels) float32. Without a mask, everything from the first pad token on is padding."""
        if attention_mask is None:
            pad_id = self.config.pad_token_id
            attention_mask = mask_of_padding(input_ids, -1 if pad_id is None else pad_id)
        hidden = self.hidden_states(input_ids, attention_mask=attention_mask)
        return self.score(at_last_attended(hidden, attention_mask)).float()


HEADS: dict[str, type[Model]] = {
    "language": CausalLM,
    "reward": RewardModel,
    "value": ValueModel,
    "classification": SequenceClassifier,
}


def build_model(config: ModelConfig, *, rope_mode: RopeMode = "stateless") -> Model:
    """The model with the head that `config.head` names; weights as torch makes them (see `init_weights`)."""
    return HEADS[config.head](config, rope_mode=rope_mode)
