"""What has been generated for each prompt, on the host's side."""

from typing import Literal, NamedTuple

from jpt.generation.sampling import SamplingConfig
from jpt.generation.text import StopScanner

FinishReason = Literal['eos', 'stop', 'length']


class GenerationResult(NamedTuple):
    """One continued prompt.

    text: what follows the prompt, without special tokens and without the stop string; '' where the model has no
        tokenizer.
    token_ids: the new ids, with the one that ended the text: the end token, or the last one of the stop string.
    logprobs: of each new id, the model's own log_softmax at temperature 1; None unless asked for.
    sampled_logprobs: the same of the distribution drawn from, after penalty, temperature and cuts (0 where greedy).
    finish_reason: 'eos', 'stop' (a stop string) or 'length' (max_new_tokens).
    """

    text: str
    token_ids: list[int]
    logprobs: list[float] | None
    sampled_logprobs: list[float] | None
    finish_reason: FinishReason
    prompt_ids: list[int]


class Continuation:
    """One prompt while its text grows."""

    def __init__(
        self, index: int, prompt: list[int], budget: int, sampling: SamplingConfig, scanner: StopScanner | None
    ):
        self.index, self.prompt, self.budget, self.sampling, self.scanner = index, prompt, budget, sampling, scanner
        self.ids: list[int] = []
        self.logps: tuple[list[float], list[float]] = ([], [])
        self.text = ''
        self.finish: FinishReason | None = None

    def take(self, ids: list[int], logps: list[list[float]], eos: frozenset[int]) -> str:
        """Adds the tokens of a chunk, up to where the row ends; returns the text that can be shown now."""
        if self.finish is not None:
            return ''
        ended = bool(ids) and ids[-1] in eos
        shown, used = '', len(ids)
        if self.scanner is not None:
            piece = self.scanner.push(ids[:-1] if ended else ids)
            shown = piece.text
            if piece.stopped:
                used, self.finish = piece.used, 'stop'
        self.ids += ids[:used]
        for have, new in zip(self.logps, logps, strict=False):
            have += new[:used]
        if self.finish is None and ended:
            self.finish = 'eos'
        elif self.finish is None and len(self.ids) >= self.budget:
            self.finish = 'length'
        if self.finish is not None and self.scanner is not None:
            last = self.scanner.flush()
            shown += last.text
            if last.stopped:
                self.finish = 'stop'
        self.text += shown
        return shown

    def result(self, with_logps: bool) -> GenerationResult:
        """The finished text."""
        assert self.finish is not None
        model, sampled = self.logps if with_logps else (None, None)
        return GenerationResult(self.text, self.ids, model, sampled, self.finish, self.prompt)
