"""One sequence on its way through the engine: its tokens, how far it is computed, and which pages it holds."""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from enum import Enum

from internlm2.engine.schedule.pages import Pages
from internlm2.engine.schedule.prefix_tree import Node


class Status(Enum):
    """Where a sequence is."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Task(Enum):
    """What is wanted of a sequence: more tokens, or something read off the prompt."""

    GENERATE = "generate"
    SCORE = "score"
    EMBED = "embed"
    REWARD = "reward"


@dataclass(eq=False, kw_only=True)
class Sequence:
    """One prompt and its answer so far.

    tokens: prompt, then answer. max_total_tokens: how many tokens it may become; that fixes its rotary base unless
    length_limit does. priority: higher goes first. logits_from: the first position whose logits are wanted; what
    lies before may come from the cache. namespace: only sequences of one namespace share pages (adapter, rotary
    base). num_computed: tokens whose keys and values are in pages. trail: while it waits, what of its prompt the
    prefix tree is known to hold. alternatives: ids that may each stand behind the prompt; their log-probabilities are
    read off its last position, behind those of the prompt.
    """

    sequence_id: int
    tokens: list[int]
    max_total_tokens: int
    task: Task = Task.GENERATE
    priority: int = 0
    logits_from: int | None = None
    alternatives: tuple[int, ...] = ()
    length_limit: int | None = None
    adapter: str | None = None
    namespace: object = None
    num_prompt: int = field(init=False)
    arrival: int = field(init=False, default=0)
    status: Status = field(init=False, default=Status.WAITING)
    num_computed: int = field(init=False, default=0)
    num_cached: int = field(init=False, default=0)
    num_preemptions: int = field(init=False, default=0)
    pages: Pages | None = field(init=False, default=None)
    drafts: list[int] = field(init=False, default_factory=list)
    trail: list[Node] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        assert 0 < len(self.tokens) <= self.max_total_tokens
        self.num_prompt = len(self.tokens)

    @property
    def num_outputs(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_left(self) -> int:
        """Tokens that are known but not computed; 1 while it decodes."""
        return len(self.tokens) - self.num_computed

    @property
    def outputs(self) -> Items[int]:
        """The answer so far."""
        return self.tokens[self.num_prompt :]


@dataclass(frozen=True)
class Chunk:
    """Tokens of one sequence that one step computes: `num_tokens` from position `start`, then `drafts`."""

    sequence: Sequence
    start: int
    num_tokens: int
    drafts: tuple[int, ...] = ()

    @property
    def reaches_end(self) -> bool:
        """Whether all known tokens are computed with this chunk, so that the next one can be chosen."""
        return self.start + self.num_tokens == len(self.sequence.tokens)

    @property
    def token_ids(self) -> list[int]:
        """The tokens to run, drafts included."""
        return self.sequence.tokens[self.start : self.start + self.num_tokens] + list(self.drafts)
