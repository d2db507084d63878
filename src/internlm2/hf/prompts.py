"""Conversations as rows of ids, through `internlm2.tokenizer`: what users write stays text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from internlm2.tokenizer import Tokenizer

Conversation = Sequence[Mapping[str, object]]
Rows = dict[str, list[list[int]]]


def as_batch(conversation: Conversation | Sequence[Conversation]) -> tuple[list[Conversation], bool]:
    """The conversations, and whether there were several (or a list of one) rather than one alone."""
    is_batch = bool(conversation) and not isinstance(conversation[0], Mapping)
    return cast(list[Conversation], list(conversation) if is_batch else [conversation]), is_batch


@dataclass(frozen=True)
class Prompts:
    """How conversations become prompts. tools, add_generation_prompt, continue_final: see `apply_chat`."""

    tokenizer: Tokenizer
    tools: Sequence[Mapping[str, object]] | None
    add_generation_prompt: bool
    continue_final: bool

    def text(self, conversation: Conversation) -> str:
        """The prompt for people to read."""
        return self.tokenizer.render_chat(
            conversation, self.tools, self.add_generation_prompt, continue_final=self.continue_final
        )

    def rows(self, conversations: Sequence[Conversation], *, cut: slice, with_masks: bool) -> Rows:
        """input_ids and attention_mask of each conversation, not padded. Raises ChatError.

        cut: which part of a row is kept. with_masks: also assistant_masks, 1 where the assistant speaks.
        """
        rows: Rows = {"input_ids": [], "attention_mask": []}
        for conversation in conversations:
            ids = self.tokenizer.apply_chat(
                conversation, self.tools, self.add_generation_prompt, continue_final=self.continue_final
            )
            rows["input_ids"].append(ids[cut])
            rows["attention_mask"].append([1] * len(ids[cut]))
            if with_masks:
                learned = self.tokenizer.apply_chat_with_mask(conversation, self.tools).loss_mask
                mask = [int(is_learned) for is_learned in learned[: len(ids)]]
                rows.setdefault("assistant_masks", []).append((mask + [0] * (len(ids) - len(mask)))[cut])
        return rows


def pad_masks(masks: list[list[int]], rows: list[list[int]], *, side: str) -> list[list[int]]:
    """Zeros on `side`, so that each mask is as long as its row."""
    padded: list[list[int]] = []
    for mask, row in zip(masks, rows, strict=True):
        missing = [0] * (len(row) - len(mask))
        padded.append(missing + mask if side == "left" else mask + missing)
    return padded
