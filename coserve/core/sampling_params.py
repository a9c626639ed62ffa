"""How one request wants its tokens chosen. Plain data: it crosses the process boundary as it is."""

from __future__ import annotations

import msgspec


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling settings of a request, already validated by the server.

    temperature 0 is greedy. `top_k` 0 and `top_p` 1 switch those filters off. `seed` is always set by the
    server (drawn when the client gave none): the number used for the token at `position` is a hash of
    (seed, position), so preemption and batching change nothing. `logprobs` is the number of alternatives
    wanted beside the sampled token (None: no log-probabilities at all); `logprob_token_ids` are the
    alternatives in their stead. `prompt_logprobs` likewise for the prompt's own tokens. The output never
    has one of `bad_words`, each given by its ids. `stop_token_ids` end the output and are part of the token
    ids reported; stop *strings* are the server's business, where text exists. `max_tokens` 0 only scores the
    prompt. `grammar` is what the output has to match, in the form that llguidance's matcher takes: a Lark
    grammar, or the JSON of a list of grammars, as its `grammar_from_json_schema` writes it. "": anything.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    bad_words: tuple[tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] = ()
    prompt_logprobs: int | None = None
    grammar: str = ""

    @property
    def greedy(self) -> bool:
        """The most likely token is taken, without a random number."""
        return self.temperature == 0.0
