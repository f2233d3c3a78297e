"""lm-evaluation-harness (the extra ``[lm-eval]``): its tasks on this engine.

The harness finds models in a registry that a module adds itself to when it is imported. In Python, import this one:

>>> import lm_eval, qwen_sparse.lm_eval
>>> lm_eval.simple_evaluate("qwen_sparse", {"pretrained": "path/to/model", "attention": "sparse"}, tasks=["hellaswag"])

On the command line, ``python -m qwen_sparse.lm_eval`` is ``lm_eval`` with this module imported.

A context is prefilled as a prompt and its continuation is an output behind it: sparse attention, index sets and
temperature are those that a served prompt would get, and all continuations of one context share its prefill.
``loglikelihood_rolling`` scores a text as one prompt.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    import lm_eval.models  # noqa: F401  the harness fills its registry only while it is empty
except ImportError as error:
    message = f"qwen_sparse.lm_eval needs the extra [lm-eval]: pip install 'lm-eval>=0.4.13,<0.5' ({error})"
    if __name__ == "__main__":
        print(message, file=sys.stderr)
        raise SystemExit(2) from error
    raise ImportError(message, name=error.name) from error
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows
from torch import Tensor
from tqdm import tqdm

from .engine.generate import generate_text, truncate_prompt
from .engine.likelihood import likelihoods, of_logits
from .engine.prefill import prefill
from .model.decoder import AttentionMode
from .model.kv_cache import PagedKVCache
from .model.loader import load_model

__all__ = ["QwenSparseLM", "main"]

_Request = tuple[tuple[str, str], list[int], list[int]]
"""(context, continuation) and the tokens of both."""
_logger = logging.getLogger(__name__)
_SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")


@register_model("qwen_sparse")
class QwenSparseLM(TemplateLM):
    """A checkpoint as the harness sees it.

    Args:
        pretrained: directory or hub id.
        device, dtype, kv_cache_dtype, max_seq_len, attention, coverage, config: see
            :func:`qwen_sparse.load_model`. Longer contexts lose their beginning, with a warning, as in the harness's
            other models.
        chunk_tokens: rows per prefill chunk; None: the device's default.
        max_gen_toks: most tokens of an answer, where a task does not say.
        prefix_token_id: what stands for an empty context and before a text's first token; None: the tokenizer's BOS or,
            without one, EOS token.
        batch_size, max_batch_size: from the harness's command line; one sequence runs at a time.

    Raises:
        ValueError, OSError: as :func:`qwen_sparse.load_model`; a batch size above 1; no token for ``prefix_token_id``.
    """

    def __init__(
        self,
        pretrained: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        kv_cache_dtype: str = "auto",
        max_seq_len: int | None = None,
        attention: AttentionMode = "auto",
        coverage: float | None = None,
        config: str | None = None,
        chunk_tokens: int | None = None,
        max_gen_toks: int = 256,
        prefix_token_id: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if str(batch_size) not in ("1", "auto"):
            raise ValueError(f"batch_size must be 1 or 'auto' (which is 1), got {batch_size!r}")
        self.model = load_model(
            pretrained,
            device=device,
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            max_seq_len=max_seq_len,
            attention=attention,
            coverage=coverage,
            config=config,
        )
        self.tokenizer = self.model.tokenizer
        self._device = self.model.device
        self._name = str(pretrained)
        self._chunk_tokens = chunk_tokens
        self._max_gen_toks = max_gen_toks
        self._prefix_token_id = self._default_prefix() if prefix_token_id is None else prefix_token_id

    def _default_prefix(self) -> int:
        for name in ("bos_token", "eos_token"):
            token = self.tokenizer.special_tokens.get(name)
            number = None if token is None else self.tokenizer.backend.token_to_id(token)
            if number is not None:
                return int(number)
        if self.model.config.eos_token_ids:
            return self.model.config.eos_token_ids[0]
        raise ValueError("prefix_token_id must be given: this tokenizer has no BOS and no EOS token")

    @property
    def prefix_token_id(self) -> int:
        """See the class."""
        return self._prefix_token_id

    @property
    def eot_token_id(self) -> int:
        """The first of the model's end tokens."""
        return next(iter(self.model.config.eos_token_ids), self._prefix_token_id)

    @property
    def max_length(self) -> int | None:
        """Most tokens of a sequence; None: limited by memory only."""
        return self.model.max_seq_len

    @property
    def tokenizer_name(self) -> str:
        """For the names of request caches."""
        return self._name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text; special ones only where they are asked for."""
        return self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens))

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; without the opening of a new turn, one that the last message's continuation follows.

        Raises:
            ValueError: there is no chat template, or it does not render the last message.
        """
        text = self.tokenizer.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        before, found, _ = text.rpartition(last)
        if not found:
            raise ValueError(f"the chat template must render the last message, {last!r}, to be continued")
        return before + found

    def _loglikelihood_tokens(
        self, requests: Sequence[_Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Of each continuation: its log-probability (nats), and whether greedy generation would give it."""
        by_context: dict[tuple[int, ...], list[int]] = {}
        for number, (texts, context, continuation) in enumerate(requests):
            if not context or not continuation:
                raise ValueError(f"context and continuation must have tokens, got {texts}")
            kept = self._fitting(context, len(continuation) - 1)  # the last token is predicted, never read
            by_context.setdefault(tuple(kept), []).append(number)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm) as bar:
            for prompt, numbers in by_context.items():
                result = prefill(self.model, prompt, chunk_tokens=self._chunk_tokens)
                for number in numbers:
                    texts, continuation = requests[number][0], requests[number][2]
                    result.cache.truncate(len(prompt))
                    results[number] = self._score(result.logits, continuation, result.cache)
                    self.cache_hook.add_partial("loglikelihood", texts, results[number])
                    bar.update()
        return results

    def _score(self, logits: Tensor, continuation: Sequence[int], cache: PagedKVCache) -> tuple[float, bool]:
        """Of a continuation behind a cache, whose last position's logits are float32 ``[vocab]``."""
        parts = [of_logits(logits[None], torch.tensor(continuation[:1], device=logits.device))]
        if len(continuation) > 1:
            parts.append(likelihoods(self.model, continuation[:-1], continuation[1:], cache=cache))
        return (
            float(sum(part.log_probability.double().sum() for part in parts)),
            all(bool(part.greedy.all()) for part in parts),
        )

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text (nats), in as few windows as ``max_seq_len`` allows."""
        results = []
        for request in tqdm(requests, desc="loglikelihood_rolling", disable=disable_tqdm):
            tokens = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(
                tokens, self.prefix_token_id, max_seq_len=self.max_length or max(len(tokens), 1), context_len=1
            )
            found = [likelihoods(self.model, *window, chunk_tokens=self._chunk_tokens) for window in windows]
            results.append(float(sum(part.log_probability.double().sum() for part in found)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, results[-1])
        return results

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each context: greedy unless its ``gen_kwargs`` sample, up to a string of ``until``.

        Raises:
            ValueError: ``gen_kwargs`` that this engine does not have.
        """
        results = []
        for request in tqdm(requests, desc="generate_until", disable=disable_tqdm):
            context, given = request.args
            options: dict[str, Any] = dict(normalize_gen_kwargs(given, self._max_gen_toks))
            stop = [text for text in options.pop("until") if text]
            most, sample = options.pop("max_gen_toks"), options.pop("do_sample")
            unknown = sorted(options.keys() - set(_SAMPLING))
            if unknown:
                raise ValueError(
                    f"gen_kwargs must be of until, max_gen_toks, do_sample, {', '.join(_SAMPLING)}, got {unknown}"
                )
            options["temperature"] = options.get("temperature", 1.0) if sample else 0.0
            pieces = generate_text(
                self.model,
                self._fitting(self.tok_encode(context) or [self.prefix_token_id], most),
                max_new_tokens=most,
                stop=stop,
                chunk_tokens=self._chunk_tokens,
                **options,
            )
            results.append("".join(pieces))
            self.cache_hook.add_partial("generate_until", request.args, results[-1])
        return results

    def _fitting(self, context: Sequence[int], behind: int) -> Sequence[int]:
        """The end of a context that leaves room for ``behind`` more tokens.

        Raises:
            ValueError: not even one token of the context does.
        """
        if self.max_length is None or len(context) + behind <= self.max_length:
            return context
        room = self.max_length - behind
        if room < 1:
            raise ValueError(f"max_seq_len must be above {behind}, the tokens behind a context, got {self.max_length}")
        _logger.warning("a context of %d tokens is cut to its last %d: max_seq_len", len(context), room)
        return truncate_prompt(context, room, keep="tail")


def main() -> None:
    """The harness's command line, which knows ``--model qwen_sparse`` then."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
