"""The reward model: one score per conversation, read at the reward token that ends it.

Source: the reward models of the InternLM team (report section 4.2.1); signatures as in their class.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import BatchEncoding, Cache, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils import can_return_tuple

from internlm2.hf.configuration import InternLM2Config
from internlm2.hf.modeling import InternLM2Model, InternLM2PreTrainedModel, at_last_attended
from internlm2.hf.prompts import Conversation
from internlm2.hf.tokenization import InternLM2Tokenizer
from internlm2.model.config import REWARD_TOKEN_ID


class InternLM2ForRewardModel(InternLM2PreTrainedModel):
    """Scores conversations; higher is better."""

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        self.model = InternLM2Model(config)
        self.v_head = nn.Linear(config.hidden_size, 1, bias=False)
        self.reward_token_id: int = config.__dict__.get("reward_token_id", REWARD_TOKEN_ID)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Scores as logits (B, 1) float32, read at the last attended position.

        input_ids: (B, T), each row ending with the reward token, padded on either side.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=bool(use_cache),
            **kwargs,
        )
        return SequenceClassifierOutputWithPast(
            logits=self.v_head(at_last_attended(outputs.last_hidden_state, attention_mask)).float(),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def get_score(
        self, tokenizer: PreTrainedTokenizerBase, conversation: Conversation, **kwargs: Any
    ) -> float:
        """The score of one conversation: a list of {"role", "content"}."""
        return self.get_scores(tokenizer, [conversation], **kwargs)[0]

    @torch.no_grad()
    def get_scores(
        self, tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], **kwargs: Any
    ) -> list[float]:
        """The score of each conversation, computed in one batch padded right."""
        rows = [self._ids(tokenizer, conversation) for conversation in conversations]
        lengths = torch.tensor([len(row) for row in rows])
        input_ids = torch.full((len(rows), int(lengths.max())), self.config.pad_token_id or 0)
        for i, row in enumerate(rows):
            input_ids[i, : len(row)] = torch.tensor(row)
        attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
        outputs = self(
            input_ids=input_ids.to(self.device),
            attention_mask=attention_mask.to(self.device),
            **kwargs | {"return_dict": True},
        )
        return outputs.logits[:, 0].tolist()

    def compare(
        self,
        tokenizer: PreTrainedTokenizerBase,
        conversation1: Conversation,
        conversation2: Conversation,
        return_logits: bool = False,
        **kwargs: Any,
    ) -> bool | tuple[bool, list[float]]:
        """Whether the first conversation scores higher; with return_logits also the two scores."""
        scores = self.get_scores(tokenizer, [conversation1, conversation2], **kwargs)
        is_better = scores[0] > scores[1]
        return (is_better, scores) if return_logits else is_better

    def rank(
        self,
        tokenizer: PreTrainedTokenizerBase,
        conversations: Sequence[Conversation],
        return_logits: bool = False,
        **kwargs: Any,
    ) -> list[int] | tuple[list[int], list[float]]:
        """Indices of the conversations, best first; with return_logits also the scores in the order given.

        NOTE: not the rank of each conversation, whatever the name says: [1, 2, 0] means that conversation 1
        is the best and conversation 0 the worst. The official code returns the same.
        """
        scores = self.get_scores(tokenizer, conversations, **kwargs)
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        return (order, scores) if return_logits else order

    def _ids(self, tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> list[int]:
        messages = [{key: str(value) for key, value in message.items()} for message in conversation]
        if isinstance(tokenizer, InternLM2Tokenizer):
            ids = tokenizer.internlm2.apply_chat(messages, add_generation_prompt=False, whole_turns=True)
        else:
            encoding = tokenizer.apply_chat_template(messages, add_generation_prompt=False, return_dict=True)
            assert isinstance(encoding, BatchEncoding)
            ids = encoding["input_ids"]
        return ids if ids[-1] == self.reward_token_id else [*ids, self.reward_token_id]
