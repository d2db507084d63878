"""What the endpoints share: the loaded model, who may ask, and what is counted."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from internlm2.engine.async_llm import AsyncLLM
from internlm2.engine.frontend import Frontend
from internlm2.engine.llm import LLM
from internlm2.engine.reward import RewardScorer
from internlm2.serve import errors
from internlm2.serve.errors import BAD_REQUEST, ApiError
from internlm2.serve.gate import Gate
from internlm2.serve.metrics import Metrics
from internlm2.serve.settings import ServeSettings
from internlm2.tokenizer import Tokenizer


@dataclass
class Service:
    """One model and its server. llm: a language model; scorer: a reward model; exactly one of them is there.

    adapter: the one that requests get when they name the model itself.
    """

    settings: ServeSettings
    llm: AsyncLLM | None = None
    scorer: RewardScorer | None = None
    adapter: str | None = None
    gate: Gate = field(init=False)
    metrics: Metrics = field(init=False)
    created: int = field(init=False)  # seconds since 1970

    def __post_init__(self) -> None:
        assert (self.llm is None) != (self.scorer is None)
        self.gate = Gate(self.settings)
        self.created = int(time.time())
        self.metrics = Metrics(self.frontend, self.gate)

    @classmethod
    def of(
        cls, model: LLM | RewardScorer, settings: ServeSettings, *, adapter: str | None = None
    ) -> "Service":
        """Around a loaded model."""
        if isinstance(model, RewardScorer):
            return cls(settings, scorer=model)
        return cls(settings, llm=AsyncLLM.of(model), adapter=adapter)

    @property
    def frontend(self) -> Frontend:
        """The engine's."""
        return self.scorer.frontend if self.scorer is not None else self.language_model.llm.frontend

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        return self.frontend.tokenizer

    @property
    def language_model(self) -> AsyncLLM:
        """The model for text. Raises ApiError when a reward model is served."""
        if self.llm is None:
            raise ApiError(
                BAD_REQUEST,
                "This server has a reward model, which writes no text. Use /v1/score or /v1/rank here.",
                code="wrong_kind_of_model",
                param="model",
            )
        return self.llm

    @property
    def reward_model(self) -> RewardScorer:
        """The model for scores. Raises ApiError when a language model is served."""
        if self.scorer is None:
            raise ApiError(
                BAD_REQUEST,
                "This server has a language model, which gives no rewards. Serve a reward model's folder.",
                code="wrong_kind_of_model",
                param="model",
            )
        return self.scorer

    @property
    def models(self) -> Sequence[str]:
        """What clients may put into `model`: the served name, and each adapter."""
        adapters = () if self.llm is None or self.llm.llm.adapters is None else self.llm.llm.adapters.names
        return [self.settings.model_name, *(name for name in adapters if name != self.adapter)]

    def adapter_of(self, model: str | None) -> str | None:
        """The adapter that a request means; a request that names no model gets the served one. Raises ApiError."""
        if model is None or model == self.settings.model_name:
            return self.adapter
        if model not in self.models:
            raise errors.not_found(model, self.models)
        return model
