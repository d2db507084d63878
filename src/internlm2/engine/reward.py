"""Score conversations with a reward model, as the published InternLM2-Reward models are used.

A conversation is rendered with the chat template and no generation prompt, the reward token is appended, and
the value at it is the score (model card of InternLM2-Reward).
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from internlm2.checkpoint.load import require_head
from internlm2.engine.build import EngineOptions, load
from internlm2.engine.frontend import Job, Ticket
from internlm2.engine.schedule.request import Task
from internlm2.errors import RequestError
from internlm2.model.heads import RewardModel

Conversation = Sequence[Mapping[str, object]]


class RewardScorer:
    """A reward model and its tokenizer. path: folder or Hugging Face id of a reward checkpoint.

    Conversations that begin alike, such as several answers to one question, share the computation of that part.
    tensor_parallel: as in `LLM`.
    """

    def __init__(
        self, path: str | Path, *, dtype: str = "bfloat16", device: str = "cpu", tensor_parallel: int = 1
    ) -> None:
        options = EngineOptions(dtype=dtype, device=device, tensor_parallel=tensor_parallel)
        loaded = load(path, options, head=RewardModel, use="scoring conversations")
        self.model = require_head(loaded.model, RewardModel, use="scoring conversations")
        self.weights = loaded.weights
        self.tokenizer = loaded.tokenizer
        self.frontend = loaded.frontend
        self._close = loaded.close

    def close(self) -> None:
        """End its thread, and the other processes of a split model. A second call does nothing.

        A model that nobody uses any more ends by itself; `with RewardScorer(...) as scorer:` ends it for certain.
        """
        self.frontend.close()
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def encode(self, conversation: Conversation) -> list[int]:
        """Ids of a conversation as the reward model reads it, the reward token last."""
        ids = self.tokenizer.apply_chat(conversation, add_generation_prompt=False, whole_turns=True)
        reward_id = self.model.config.reward_token_id
        return ids if ids[-1] == reward_id else [*ids, reward_id]

    def scores(self, conversations: Sequence[Conversation]) -> list[float]:
        """A score for each conversation, higher is better. Raises RequestError when there are none."""
        if not conversations:
            raise RequestError("No conversations to score. Give at least one.")
        return self.frontend.finish(self.begin_scores([self.encode(each) for each in conversations]))

    def begin_scores(
        self, encoded: Sequence[Sequence[int]], *, on_mail: Callable[[], None] | None = None
    ) -> Job[list[float]]:
        """As `scores` for what `encode` has made, without waiting."""
        tickets = self.frontend.submit(
            self.frontend.prepare_task(ids, Task.REWARD, logits_from=len(ids) - 1, on_mail=on_mail)
            for ids in encoded
        )
        return Job(tickets, lambda: _rewards(tickets))

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


def _rewards(tickets: Sequence[Ticket]) -> list[float]:
    vectors = [ticket.last_updates[0].vector for ticket in tickets]
    return [vector.item() for vector in vectors if vector is not None]
