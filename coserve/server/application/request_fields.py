"""What a request to generate may say, field by field: the list that routes check names against and that
docs/api.md is made from.

A field is honoured, accepted without effect (its effect says so), or refused by name: what would change the
output and can't be honoured is never dropped silently. Names that stand nowhere are let pass, as servers of
this API do.
"""

from __future__ import annotations

from typing import NamedTuple


class RequestField(NamedTuple):
    """`values` is the range, the default in brackets; `effect` one line on what is done with it."""

    name: str
    values: str
    effect: str


_NO_EFFECT = "accepted, no effect"

# What is accepted without effect: its type, and why where that isn't plain.
WITHOUT_EFFECT: dict[str, tuple[str, str]] = {
    "user": ("string", ""),
    "metadata": ("object", ""),
    "store": ("boolean", "only /v1/responses are kept"),
    "safety_identifier": ("string", ""),
    "prompt_cache_key": ("string", "the prefix of every prompt is looked for"),
    "prompt_cache_options": ("object", ""),
    "prompt_cache_retention": ("string", ""),
    "verbosity": ("string", ""),
    "spaces_between_special_tokens": ("boolean", "decoders of tokenizer.json files put none there"),
}

SHARED: tuple[RequestField, ...] = (
    # OpenAI's
    RequestField(
        "model", "name (the base)", "the base, an adapter, `name@version`, a checkpoint, `JOB:live`"
    ),
    RequestField(
        "max_tokens",
        ">= 1 (see the route)",
        "ends an answer with `length`; with the prompt within the context",
    ),
    RequestField("max_completion_tokens", ">= 1", "the same; goes before `max_tokens`"),
    RequestField("temperature", "0-2 (the model's, else 1)", "0 takes the likeliest token"),
    RequestField("top_p", "0-1, not 0 (the model's, else 1)", "the likeliest tokens that together reach it"),
    RequestField("frequency_penalty", "-2-2 (0)", "times the number of a token's uses in the answer"),
    RequestField("presence_penalty", "-2-2 (0)", "once for each token that the answer has used"),
    RequestField("n", "1-128 (1)", "answers to each prompt; the seed counts on from one to the next"),
    RequestField("stop", "string or up to 16", "ends an answer before the first of them"),
    RequestField("seed", "integer of 64 bits (drawn)", "same seed, same answer, whatever shares the batch"),
    RequestField("logit_bias", "up to 1024 token ids: -100-100", "added to the logits"),
    RequestField(
        "response_format",
        "`text`, `json_object`, `json_schema`, `structural_tag`",
        "the answer is JSON, of a schema (docs/structured-output.md)",
    ),
    RequestField("stream", "boolean (false)", "answers by server-sent events"),
    RequestField(
        "stream_options",
        "`include_usage`, `continuous_usage_stats`, `include_obfuscation`",
        "with `stream`: usage in a last chunk, in every chunk too; padding that hides lengths",
    ),
    RequestField("service_tier", "`auto` or a class", "the latency class; the answer echoes the one used"),
    # vLLM's
    RequestField("top_k", ">= -1 (the model's, else 0: all)", "the likeliest k"),
    RequestField("min_p", "0-1 (the model's, else 0)", "tokens at least so likely as this part of the best"),
    RequestField("repetition_penalty", "0-10, not 0 (the model's, else 1)", "of tokens of prompt and answer"),
    RequestField("length_penalty", "1", "other values are refused: there is no beam search"),
    RequestField("min_tokens", ">= 0 (0)", "no end token, no token of `stop_token_ids` before so many"),
    RequestField("stop_token_ids", "token ids", "end an answer; not part of its text"),
    RequestField("ignore_eos", "boolean (false)", "goes on after the model's end tokens"),
    RequestField("include_stop_str_in_output", "boolean (false)", "keeps the text that ended the answer"),
    RequestField("skip_special_tokens", "boolean (true)", "leaves special tokens out of the text"),
    RequestField("allowed_token_ids", "token ids", "nothing else is chosen"),
    RequestField(
        "prompt_logprobs",
        "0-`--max-logprobs`",
        "log-probabilities of the prompt's own tokens; not with `stream`",
    ),
    RequestField(
        "echo", "boolean (false)", "the prompt (chat: the message that is continued) before the answer"
    ),
    RequestField("add_special_tokens", "boolean (chat: false, else true)", "bos before the prompt"),
    RequestField("priority", "integer (0)", "lower goes first"),
    RequestField("best_of", "`n`", "refused beyond `n`"),
    RequestField("return_token_ids", "boolean (false)", "`token_ids` of answers, `prompt_token_ids`"),
    RequestField("return_tokens_as_token_ids", "boolean (false)", "tokens in logprobs read `token_id:ID`"),
    RequestField(
        "logprob_token_ids", "up to 128 token ids", "the alternatives that logprobs have, in this order"
    ),
    RequestField(
        "structured_outputs",
        "one of `json`, `regex`, `choice`, `grammar`, `json_object`, `structural_tag`",
        "what the answer has to match",
    ),
    RequestField("bad_words", "up to 256 strings of 128 characters", "never part of the answer"),
    RequestField(
        "truncate_prompt_tokens", ">= -1", "cuts a long prompt to so many; -1: to what fits beside the answer"
    ),
    RequestField("truncation_side", "`left`, `right` (left)", "where it is cut"),
    RequestField("cache_salt", "1-128 characters", "cached prefixes are shared with the same salt only"),
    RequestField("request_id", "string", "the answer's id where no X-Request-Id header gives one"),
    RequestField(
        "stream_interval", ">= 1 (`--stream-interval`)", "tokens of a chunk; first and last go at once"
    ),
    RequestField("vllm_xargs", "{}", "names in it are refused: there are no extensions"),
    *(
        RequestField(name, kind, f"{_NO_EFFECT}{': ' * bool(why)}{why}")
        for name, (kind, why) in WITHOUT_EFFECT.items()
    ),
)

CHAT: tuple[RequestField, ...] = (
    RequestField("messages", "array", "roles system, developer, user, assistant, tool; text parts only"),
    RequestField("logprobs", "boolean (false)", "log-probability of each token"),
    RequestField("top_logprobs", "0-`--max-logprobs` (0)", "and of the likeliest, with `logprobs`"),
    RequestField("tools", "array of functions", "shown to the model by its template; docs/tools.md"),
    RequestField(
        "tool_choice",
        "`none`, `auto`, `required`, a function, `allowed_tools` (`auto`)",
        "whether it calls one, and which",
    ),
    RequestField("parallel_tool_calls", "boolean (true)", "false: at most one call"),
    RequestField("include_reasoning", "boolean (true)", "false leaves what the model thought out"),
    RequestField(
        "reasoning_effort",
        "`none` to `max`",
        "variable of the template; `none` also sets its `enable_thinking` to false",
    ),
    RequestField("documents", "objects", "variable of the template; refused where it knows none"),
    RequestField(
        "chat_template", "Jinja source", "in place of the model's, with `--trust-request-chat-template`"
    ),
    RequestField("modalities", '["text"]', "others are refused: text only"),
    RequestField("add_generation_prompt", "boolean (true)", "opens the assistant's turn"),
    RequestField("continue_final_message", "boolean (false)", "the last message is gone on with"),
    RequestField("chat_template_kwargs", "object", "variables of the template"),
)

COMPLETIONS: tuple[RequestField, ...] = (
    RequestField("prompt", "string, strings, token ids, or lists of them", "up to 1024 prompts"),
    RequestField(
        "logprobs", "0-`--max-logprobs`", "log-probabilities: of each token, and of so many likeliest"
    ),
)

# Of /v1/responses; what it doesn't have of its own goes on to chat: temperature, top_k, cache_salt ...
RESPONSES: tuple[RequestField, ...] = (
    RequestField("input", "string or items", "messages of text, function calls and their outputs"),
    RequestField("instructions", "string", "a system message, for this response alone"),
    RequestField("previous_response_id", "id of a kept response", "goes on from its conversation"),
    RequestField("max_output_tokens", ">= 1 (the context)", "ends a response as `incomplete`"),
    RequestField("store", "boolean (true)", "kept in memory, the newest 4096 or 64 MiB"),
    RequestField("stream", "boolean (false)", "named events, numbered, the last of them response.completed"),
    RequestField("stream_options", "`include_obfuscation`", "with `stream`: padding that hides lengths"),
    RequestField("tools", "functions", "other kinds are refused"),
    RequestField("tool_choice", "none, auto, required, a function, allowed_tools", "as in chat"),
    RequestField("text", "`format`, `verbosity`", "`format`: text, json_object or json_schema"),
    RequestField("reasoning", "`effort`, `summary`", "`effort` goes to the model's template"),
    RequestField("include", "`message.output_text.logprobs`", "log-probabilities of the text's tokens"),
    RequestField("top_logprobs", "0-`--max-logprobs` (0)", "and of the likeliest"),
    RequestField(
        "truncation", "`disabled`, `auto` (`disabled`)", "auto drops the oldest messages of a long chat"
    ),
    RequestField(
        "max_tool_calls", "integer", "accepted, no effect: it bounds tools that this server has not"
    ),
    RequestField("metadata", "up to 16 pairs of strings", "echoed"),
    RequestField("background", "false", "true is refused"),
)
OWN_RESPONSES = frozenset(field.name for field in RESPONSES)

_IS_IN_CHAT = "is a field of chat completions"
REFUSED_RESPONSES: dict[str, str] = {
    "background": "is not supported: nothing runs in the background",
    "conversation": "is not supported; use previous_response_id",
    "prompt": "is not supported: this server keeps no prompts",
    "context_management": "is not supported",
    "moderation": "is not supported",
    "messages": f"{_IS_IN_CHAT}; use input",
    "response_format": f"{_IS_IN_CHAT}; use text.format",
    "max_tokens": f"{_IS_IN_CHAT}; use max_output_tokens",
    "max_completion_tokens": f"{_IS_IN_CHAT}; use max_output_tokens",
    "logprobs": f"{_IS_IN_CHAT}; use include",
    "n": f"{_IS_IN_CHAT}: a response has one answer",
    "best_of": f"{_IS_IN_CHAT}: a response has one answer",
    "echo": _IS_IN_CHAT,
    "continue_final_message": _IS_IN_CHAT,
    "prompt_logprobs": _IS_IN_CHAT,
    "return_token_ids": _IS_IN_CHAT,
}

REFUSED: dict[str, str] = {
    "suffix": "needs a fill-in-the-middle model, which this server has none of",
    "functions": "is replaced by tools",
    "function_call": "is replaced by tool_choice",
    "audio": "is not supported: this server makes text only",
    "prediction": "is not supported",
    "web_search_options": "is not supported",
    "moderation": "is not supported",
    "use_beam_search": "is not supported; ask for n answers, with cumulated logprobs to choose by",
    "prompt_embeds": "is not supported",
    "stop_regex": "is not supported; use stop",
    "regex": "is not supported; use structured_outputs.regex",
    "ebnf": "is not supported; use structured_outputs.grammar",
    "lora_path": "is not supported; name the adapter as model",
    "kv_transfer_params": "is not supported: prompts are computed here",
    "ec_transfer_params": "is not supported: prompts are computed here",
    "mm_processor_kwargs": "is not supported: this server reads text only",
    "media_io_kwargs": "is not supported: this server reads text only",
    "logits_processors": "is not supported",
    "custom_logit_processor": "is not supported",
    "repetition_detection": "is not supported; use frequency_penalty",
    "thinking_token_budget": "is not supported; use max_tokens",
    "return_hidden_states": "is not supported",
}  # a value of null or false, which is how these are left out, is let pass
REFUSED_PREFIX = "guided_"  # vLLM's older names, which it takes and drops

KNOWN_CHAT = frozenset(field.name for field in SHARED + CHAT)
KNOWN_COMPLETIONS = frozenset(field.name for field in SHARED + COMPLETIONS)
