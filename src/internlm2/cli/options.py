"""Flags that several commands share, and how a TOML file and the command line become one configuration.

The file is read first, a flag on the command line wins, and what neither says keeps its default.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

if TYPE_CHECKING:
    from internlm2.engine.llm import LLM
    from internlm2.engine.sampling.params import SamplingParams

MAX_THREADS = 256
ADAPTER = "adapter"  # what the one adapter of a command is called


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What `generate` and `chat` need to know; the keys of a `--config` file."""

    dtype: str = "auto"
    device: str = "auto"
    threads: int = 0
    max_model_len: int | Literal["auto"] | None = None
    kv_dtype: str | None = None
    memory_gib: float | None = None
    speculative: str | None = None
    adapter: str | None = None
    deterministic: bool = False
    tensor_parallel: int = 1
    quantization: str = "auto"
    max_tokens: int = 1024
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.8
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """The same, as flags; None means: not given."""

    config: Annotated[Path | None, Parameter(help="TOML file with any of these options.")] = None
    dtype: Annotated[
        str | None, Parameter(help="float32, bfloat16, float16; auto: bfloat16, or float32 on old CPUs.")
    ] = None
    device: Annotated[str | None, Parameter(help="cpu, cuda, cuda:N; auto: a GPU when there is one.")] = None
    threads: Annotated[int | None, Parameter(help="CPU threads; 0: as torch chooses.")] = None
    max_model_len: Annotated[
        int | Literal["auto"] | None,
        Parameter(help="Longest prompt plus answer, in tokens; auto: what the memory allows."),
    ] = None
    kv_dtype: Annotated[
        str | None, Parameter(help="int8 halves the memory of keys and values; default: as the model.")
    ] = None
    memory_gib: Annotated[
        float | None,
        Parameter(help="Memory for keys and values, in GiB; default: 4, or one longest sequence."),
    ] = None
    speculative: Annotated[
        str | None,
        Parameter(
            help="Guess tokens and check them: lookup copies from the text, a path is a smaller model."
        ),
    ] = None
    adapter: Annotated[str | None, Parameter(help="LoRA folder in the PEFT format.")] = None
    deterministic: Annotated[
        bool | None, Parameter(help="Bitwise the same answer in any company; slower.", negative=())
    ] = None
    tensor_parallel: Annotated[
        int | None, Parameter(help="Split the model over so many GPUs or CPU processes [1].")
    ] = None
    quantization: Annotated[
        str | None,
        Parameter(
            help="Weights in int8, int4 or int4-symmetric, or bfloat16 unchanged, for the fast CPU kernels; auto: "
            "bfloat16 where it is faster; none: as they are. On a GPU: int8, int4 or fp8."
        ),
    ] = None
    max_tokens: Annotated[int | None, Parameter(help="Longest answer, in tokens [1024].")] = None
    temperature: Annotated[
        float | None, Parameter(help="Randomness; 0 always takes the best token [0.8].")
    ] = None
    top_k: Annotated[int | None, Parameter(help="Choose among so many best tokens; 0: all.")] = None
    top_p: Annotated[float | None, Parameter(help="Choose within this probability mass [0.8].")] = None
    min_p: Annotated[float | None, Parameter(help="Drop tokens less likely than this share of the best.")] = (
        None
    )
    repetition_penalty: Annotated[float | None, Parameter(help="Above 1: repeat less.")] = None
    seed: Annotated[int | None, Parameter(help="Same seed, same answer.")] = None
    stop: Annotated[
        tuple[str, ...] | None,
        Parameter(help="End the answer at this text; may be given several times.", negative=()),
    ] = None


def resolve(flags: RunFlags | None) -> RunConfig:
    """One configuration from file and flags. Raises ConfigError for unknown keys and wrong types."""
    from internlm2.config import from_dict, load_toml

    flags = flags or RunFlags()
    given = {k: v for k, v in asdict(flags).items() if v is not None and k != "config"}
    if flags.config is not None:
        return load_toml(RunConfig, flags.config, overrides=given)
    return from_dict(RunConfig, given, where="command line")


def sampling(config: RunConfig) -> "SamplingParams":
    """The sampling part. Raises RequestError for values outside their range."""
    from internlm2.engine.sampling.params import SamplingParams

    return SamplingParams(
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        seed=config.seed,
        stop=config.stop,
    )


def load_llm(
    model: str, config: RunConfig, *, max_num_seqs: int = 64, adapters: Mapping[str, str] | None = None
) -> "LLM":
    """Load the model on the device and in the dtype that the configuration asks for. adapters: more, by name."""
    import torch

    from internlm2.engine.llm import LLM
    from internlm2.errors import RequestError

    if not 0 <= config.threads <= MAX_THREADS:
        raise RequestError(
            f"threads is {config.threads}, but must be from 0 (as torch chooses) to {MAX_THREADS}."
        )
    if config.threads:
        torch.set_num_threads(config.threads)
    device, dtype = device_of(config), config.dtype
    if dtype == "auto":
        # NOTE: without AVX512-BF16 or AMX, torch converts bfloat16 on the fly and float32 is faster.
        is_old_cpu = device == "cpu" and not torch.cpu._is_avx512_bf16_supported()
        dtype = "float32" if is_old_cpu else "bfloat16"
    return LLM(
        model,
        dtype=dtype,
        device=device,
        max_model_len=config.max_model_len,
        kv_dtype=config.kv_dtype,
        memory_gib=config.memory_gib,
        max_num_seqs=max_num_seqs,
        speculative=config.speculative,
        adapters=({} if config.adapter is None else {ADAPTER: config.adapter}) | dict(adapters or {}) or None,
        deterministic=config.deterministic,
        tensor_parallel=config.tensor_parallel,
        quantization=config.quantization,
    )


def device_of(config: RunConfig) -> str:
    """The device that was asked for; for auto, a GPU when there is one."""
    import torch

    if config.device != "auto":
        return config.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def adapter_name(config: RunConfig) -> str | None:
    """The adapter that requests are to name."""
    return None if config.adapter is None else ADAPTER
