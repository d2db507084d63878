"""The tokenizer as transformers sees it: sentencepiece's ids, offsets from the Rust library.

`internlm2.tokenizer` reads the folder and writes a tokenizer.json that is proven equal to sentencepiece;
transformers' fast tokenizer runs on that. Conversations and decoding stay with `internlm2.tokenizer`: what
users write never becomes a control token in a chat, and decoding loses nothing.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import tokenizers
from transformers import AddedToken, BatchEncoding, PreTrainedTokenizerFast
from transformers.utils import get_json_schema

from internlm2 import files
from internlm2.errors import ExportError
from internlm2.hf.prompts import Conversation, Prompts, as_batch, pad_masks
from internlm2.tokenizer import Tokenizer, export
from internlm2.tokenizer.sentencepiece_backend import SentencePieceBackend
from internlm2.tokenizer.special import OLD_SPELLINGS

MODEL_FILE, JSON_FILE, CONFIG_FILE = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
_FILES = (MODEL_FILE, JSON_FILE, CONFIG_FILE, "chat_template.jinja")
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
# What AutoTokenizer and old scripts pass that has no meaning here.
_IGNORED = (
    "trust_remote_code",
    "use_fast",
    "config",
    "code_revision",
    "proxies",
    "_from_auto",
    "_commit_hash",
)
# The settings of tokenizer_config.json that are taken over; ids and special tokens come from the vocabulary.
_KEPT_SETTINGS = ("add_bos_token", "add_eos_token", "chat_template", "model_max_length", "padding_side",
                  "truncation_side")  # fmt: skip
_PROBE = (
    {"role": "system", "content": "s"},
    {"role": "user", "content": "a b"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
)


class InternLM2Tokenizer(PreTrainedTokenizerFast):
    """InternLM2's tokenizer in transformers. BOS is added, EOS is not; padding is left, for generation."""

    vocab_files_names = {"vocab_file": MODEL_FILE, "tokenizer_file": JSON_FILE}  # noqa: RUF012 - as transformers reads it
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 - as transformers reads it

    def __init__(
        self,
        vocab_file: str | Path | None = None,
        tokenizer_file: str | Path | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        **kwargs: Any,
    ) -> None:
        """vocab_file or tokenizer_file: a file in the folder to read; or the tokenizer itself.

        kwargs: as for any transformers tokenizer. Raises TokenizerError when the folder cannot be read.
        """
        if tokenizer is None:
            given = vocab_file or tokenizer_file
            tokenizer = Tokenizer.from_pretrained(Path(given).parent if given is not None else Path())
        self.internlm2 = tokenizer
        self._tokenizer = tokenizers.Tokenizer.from_str(export.tokenizer_json(tokenizer))
        for role, token_id in (
            ("bos_token", tokenizer.bos_id),
            ("eos_token", tokenizer.eos_id),
            ("pad_token", tokenizer.pad_id),
        ):
            if token_id is not None:
                kwargs.setdefault(role, tokenizer.id_to_token(token_id))
        if isinstance(tokenizer.backend, SentencePieceBackend):
            kwargs.setdefault("unk_token", tokenizer.id_to_token(0))
        if tokenizer.bos_id is not None:
            kwargs.setdefault("add_bos_token", True)
        markers = [marker for marker in OLD_SPELLINGS.values() if marker in tokenizer.specials.ids]
        kwargs.setdefault("extra_special_tokens", markers)
        kwargs.setdefault("padding_side", "left")
        kwargs["clean_up_tokenization_spaces"] = False  # it would eat spaces before punctuation
        self._own_template = export.chat_template(tokenizer)
        kwargs.setdefault("chat_template", self._own_template)
        super().__init__(**kwargs)
        self._add_tokens_beyond_the_vocabulary()
        self._num_tokens_read = len(self)
        if self.chat_template != self._own_template and self._says_the_same(self.chat_template):
            self.chat_template = self._own_template

    def _add_tokens_beyond_the_vocabulary(self) -> None:
        # Models built on InternLM2 put markers of their own behind the vocabulary, such as `<img>`.
        for token_id, name in sorted(self.internlm2.specials.names.items()):
            if token_id == len(self):
                self.add_tokens([AddedToken(name, special=True, normalized=False)])

    def _says_the_same(self, template: object) -> bool:
        """Whether a folder's template is InternLM2's own, in an older spelling or without BOS."""
        if not isinstance(template, str) or self._own_template is None:
            return False
        texts = []
        for candidate in (template, self._own_template):
            text = super().apply_chat_template(
                [dict(message) for message in _PROBE],
                chat_template=candidate,
                tokenize=False,
                add_generation_prompt=True,
            )
            assert isinstance(text, str)
            for old, new in OLD_SPELLINGS.items():
                text = text.replace(old, new)
            texts.append(text.removeprefix(self.bos_token or ""))
        return texts[0] == texts[1]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *_: object, **kwargs: Any
    ) -> "InternLM2Tokenizer":
        """Read the tokenizer of a folder or Hub id; no code in it is run, whatever `trust_remote_code` says.

        kwargs: Hub options (revision, cache_dir, token, local_files_only, force_download, subfolder), and
        settings that win over the folder's. Raises TokenizerError when there are no tokenizer files.
        """
        hub = {key: kwargs.pop(key) for key in _HUB_OPTIONS if key in kwargs}
        subfolder = str(kwargs.pop("subfolder", None) or "")
        for key in _IGNORED:
            kwargs.pop(key, None)
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            patterns = [f"{subfolder}/{name}" if subfolder else name for name in _FILES]
            folder = Path(
                huggingface_hub.snapshot_download(
                    str(pretrained_model_name_or_path), allow_patterns=patterns, **hub
                )
            )
        folder = folder / subfolder
        tokenizer = Tokenizer.from_pretrained(folder)
        settings: dict[str, Any] = {k: v for k, v in _settings(folder).items() if k in _KEPT_SETTINGS}
        template = folder / "chat_template.jinja"
        if template.exists():
            settings["chat_template"] = template.read_text(encoding="utf-8")
        options = {key: value for key, value in settings.items() if value is not None} | kwargs
        return cls(tokenizer=tokenizer, name_or_path=str(pretrained_model_name_or_path), **options)

    def save_pretrained(  # pyrefly: ignore[bad-override] - transformers' options pass through kwargs
        self, save_directory: str | Path, **kwargs: Any
    ) -> tuple[str, ...]:
        """Write tokenizer.json, settings, and tokenizer.model as long as it says the same.

        Raises ExportError when tokens were added and an older tokenizer.model lies in the folder.
        """
        target = Path(save_directory) / MODEL_FILE
        has_own_tokens = len(self) != self._num_tokens_read
        if has_own_tokens and target.exists():
            raise ExportError(
                f"{target} does not know the tokens that were added to this tokenizer, and would be read "
                "first. Save to another folder."
            )
        written = super().save_pretrained(save_directory, **kwargs)
        backend = self.internlm2.backend
        if isinstance(backend, SentencePieceBackend) and not has_own_tokens:
            files.write_bytes(target, backend.content)
            written = (*written, str(target))
        return written

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int]:
        """Ids of token names; the markers also in their old spelling, `[UNUSED_TOKEN_146]`."""
        if isinstance(tokens, str):
            return super().convert_tokens_to_ids(OLD_SPELLINGS.get(tokens, tokens))
        return super().convert_tokens_to_ids([OLD_SPELLINGS.get(token, token) for token in tokens])

    def _decode(  # pyrefly: ignore[bad-override] - options that BPE does not have pass through kwargs
        self, token_ids: int | Sequence[int], skip_special_tokens: bool = False, **kwargs: Any
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        is_known = len(self) == self._num_tokens_read and all(0 <= i < self.internlm2.vocab_size for i in ids)
        if is_known:
            return self.internlm2.decode(ids, skip_special=skip_special_tokens)
        return super()._decode(ids, skip_special_tokens=skip_special_tokens, **kwargs)

    def apply_chat_template(  # pyrefly: ignore[bad-override] - more general types, the rest by keyword
        self,
        conversation: Conversation | Sequence[Conversation],
        tools: Sequence[Mapping[str, object] | Callable[..., object]] | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        **kwargs: Any,
    ) -> str | list[str] | list[int] | list[list[int]] | BatchEncoding:
        """A conversation, or several, as text, ids or tensors; arguments and results as in transformers 5.

        With InternLM2's own template, control tokens spelled in messages stay text and tools are shown to the
        model. Another `chat_template` goes through transformers. Raises ChatError for what is none.
        """
        is_own = bool(self._own_template) and self.chat_template == self._own_template
        if chat_template is not None or not is_own:
            return super().apply_chat_template(
                conversation,  # pyrefly: ignore[bad-argument-type] - lists there, sequences here
                tools=tools,  # pyrefly: ignore[bad-argument-type]
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=tokenize,
                padding=padding,
                truncation=truncation,
                max_length=max_length,
                return_tensors=return_tensors,
                return_dict=return_dict,
                return_assistant_tokens_mask=return_assistant_tokens_mask,
                **kwargs,
            )
        conversations, is_batch = as_batch(conversation)
        prompts = Prompts(
            tokenizer=self.internlm2,
            tools=[get_json_schema(tool) if callable(tool) else tool for tool in tools or ()] or None,
            add_generation_prompt=add_generation_prompt,
            continue_final=continue_final_message,
        )
        if not tokenize:
            texts = [prompts.text(one) for one in conversations]
            return texts if is_batch else texts[0]
        rows = prompts.rows(
            conversations,
            cut=self._cut(max_length) if truncation else slice(None),
            with_masks=return_assistant_tokens_mask,
        )
        if padding:
            rows = self._padded(rows, padding=padding, max_length=max_length)
        if not is_batch and not return_tensors:
            rows = {key: value[0] for key, value in rows.items()}
        encoding = BatchEncoding(rows, tensor_type=return_tensors)
        return encoding if return_dict else encoding["input_ids"]

    def _padded(self, rows: dict[str, Any], *, padding: bool | str, max_length: int | None) -> dict[str, Any]:
        masks = rows.pop("assistant_masks", None)
        rows = dict(self.pad(rows, padding=padding, max_length=max_length))
        if masks is not None:
            rows["assistant_masks"] = pad_masks(masks, rows["input_ids"], side=self.padding_side)
        return rows

    def _cut(self, max_length: int | None) -> slice:
        if max_length is None or self.truncation_side == "right":
            return slice(None, max_length)
        return slice(-max_length, None)


InternLM2TokenizerFast = InternLM2Tokenizer


def _settings(folder: Path) -> dict[str, object]:
    path = folder / CONFIG_FILE
    # A damaged file was already refused by `Tokenizer.from_pretrained`.
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
