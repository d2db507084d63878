"""Score conversations with a reward model, as the published InternLM2-Reward models are used.

A conversation is rendered with the chat template and no generation prompt, the reward token is appended, and
the value at it is the score (model card of InternLM2-Reward).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from internlm2.checkpoint.load import load_checkpoint, require_head
from internlm2.checkpoint.open import open_checkpoint
from internlm2.checkpoint.resolve import resolve_model
from internlm2.engine.llm import check_vocabulary
from internlm2.errors import CheckpointError, RequestError
from internlm2.model.heads import RewardModel
from internlm2.tokenizer import Tokenizer

Conversation = Sequence[Mapping[str, object]]


class RewardScorer:
    """A reward model and its tokenizer. path: folder or Hugging Face id of a reward checkpoint."""

    def __init__(self, path: str | Path, *, dtype: str = "bfloat16", device: str = "cpu") -> None:
        checkpoint = open_checkpoint(resolve_model(path))
        if checkpoint.tokenizer_folder is None:
            raise CheckpointError(
                f"{checkpoint.path} has no tokenizer. Copy tokenizer.model into the folder."
            )
        self.tokenizer = Tokenizer.from_pretrained(checkpoint.tokenizer_folder)
        check_vocabulary(self.tokenizer, checkpoint.config.vocab_size, where=str(checkpoint.path))
        model = load_checkpoint(checkpoint, dtype=dtype, device=device)
        self.model = require_head(model, RewardModel, use="scoring conversations")

    def encode(self, conversation: Conversation) -> list[int]:
        """Ids of a conversation as the reward model reads it, the reward token last."""
        ids = self.tokenizer.apply_chat(conversation, add_generation_prompt=False, whole_turns=True)
        reward_id = self.model.config.reward_token_id
        return ids if ids[-1] == reward_id else [*ids, reward_id]

    @torch.inference_mode()
    def scores(self, conversations: Sequence[Conversation]) -> list[float]:
        """A score for each conversation, higher is better. Raises RequestError when there are none."""
        if not conversations:
            raise RequestError("No conversations to score. Give at least one.")
        rows = [self.encode(conversation) for conversation in conversations]
        width = max(len(row) for row in rows)
        device = self.model.v_head.weight.device
        # The padding id is never attended, so any row of the embedding will do.
        input_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        return self.model(input_ids, attention_mask=mask).tolist()

    def compare(self, first: Conversation, second: Conversation) -> bool:
        """Whether `first` scores higher than `second`."""
        first_score, second_score = self.scores([first, second])
        return first_score > second_score

    def rank(self, conversations: Sequence[Conversation]) -> list[int]:
        """Indices of the conversations, best first.

        NOTE: the official `rank` returns the same order, though its text says "ranking index of each chat".
        """
        scores = self.scores(conversations)
        return sorted(range(len(scores)), key=lambda i: -scores[i])
