"""Which fields the body of each inference route may have.

A field is *passed* to the engine as it came, or *refused* by name because what it asks for is not offered (but for the
values that ask for nothing), or unknown, which OpenAI and Anthropic refuse as well. Fields that only hint, such as
`prompt_cache_key` or `service_tier`, are passed too: an engine ignores what it does not know.

Fields of vLLM that reach beyond the tenant's own request are in no list, and so unknown:

* `priority` would jump the queue; `request_id` and `session_id` could meet another request's.
* `cache_salt`: the engine's door sets it, to the tenant, so that nobody can find out what others have asked.
* `kv_transfer_params`, `ec_transfer_params`, `vllm_xargs`, `mm_payload`, `return_mm_kwargs`, `media_io_kwargs`,
  `mm_processor_kwargs`, `routed_experts_prompt_start`: the affair of whoever runs the engine.
* `prompt_embeds`: tensors of a stranger, to be unpickled. `chat_template`: a program of a stranger, to be run.
* `use_beam_search`, `length_penalty`: one request that costs as much as many, and is counted as one.
* `stream_interval`, `watermarking`, `enable_response_messages`, `previous_input_messages`: they change the form of
  answers and of what is counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from river_gateway.errors import UnknownFieldError, UnsupportedFieldError

_NOTHING = frozenset({b"null"})
_NO = frozenset({b"null", b"false"})


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a field is refused; its value may be one of `harmless`, in JSON."""

    reason: str
    harmless: frozenset[bytes] = _NOTHING


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of one route's body."""

    passed: frozenset[str]
    refused: Mapping[str, Refusal]
    known: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        assert self.passed.isdisjoint(self.refused)
        object.__setattr__(self, "known", self.passed | self.refused.keys())

    def check(self, body: Mapping[str, msgspec.Raw]) -> None:
        """Refuses what is not to reach an engine.

        Raises:
            UnknownFieldError: a field is in no list.
            UnsupportedFieldError: a field asks for something that is not offered.
        """
        if not self.known.issuperset(body):
            unknown = next(name for name in body if name not in self.known)
            raise UnknownFieldError(unknown)
        if self.refused.keys().isdisjoint(body):
            return
        for name, refusal in self.refused.items():
            if name in body and bytes(body[name]) not in refusal.harmless:
                raise UnsupportedFieldError(refusal.reason, param=name)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SAMPLING = _names(
    "model temperature top_p seed stop stream stream_options user logit_bias n presence_penalty frequency_penalty"
    " response_format"
)
_HINTS = _names(
    "metadata service_tier prompt_cache_key prompt_cache_options prompt_cache_retention safety_identifier"
)
_ENGINE_EXTRAS = _names(
    "top_k min_p repetition_penalty stop_token_ids include_stop_str_in_output ignore_eos min_tokens"
    " skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens truncation_side prompt_logprobs"
    " logprob_token_ids allowed_token_ids bad_words add_special_tokens structured_outputs return_token_ids"
    " return_tokens_as_token_ids return_token_offsets repetition_detection thinking_token_budget"
)
_NO_MODERATION = Refusal("moderation of prompts and answers is not offered")

CHAT_COMPLETIONS = Fields(
    passed=_SAMPLING
    | _HINTS
    | _ENGINE_EXTRAS
    | _names(
        "messages logprobs top_logprobs max_tokens max_completion_tokens tools tool_choice parallel_tool_calls"
        " reasoning_effort prediction verbosity store echo add_generation_prompt continue_final_message documents"
        " chat_template_kwargs include_reasoning"
    ),
    refused={
        "audio": Refusal("answers are text: audio is not offered"),
        "modalities": Refusal(
            "answers are text: other modalities are not offered", _NOTHING | {b'["text"]'}
        ),
        "functions": Refusal("`functions` is deprecated and not offered: use `tools`"),
        "function_call": Refusal(
            "`function_call` is deprecated and not offered: use `tool_choice`"
        ),
        "web_search_options": Refusal("web search is not offered"),
        "moderation": _NO_MODERATION,
    },
)

COMPLETIONS = Fields(
    passed=_SAMPLING
    | _HINTS
    | _ENGINE_EXTRAS
    | _names("prompt max_tokens logprobs echo suffix store"),
    refused={
        "best_of": Refusal(
            "choosing the best of several is not offered: leave `best_of` out or set it to 1",
            _NOTHING | {b"1"},
        ),
    },
)

_STATELESS = "answers are not stored here"
RESPONSES = Fields(
    passed=(_SAMPLING - {"n", "response_format"})
    | _HINTS
    | _names(
        "input instructions include max_output_tokens max_tool_calls parallel_tool_calls reasoning text tool_choice"
        " tools top_logprobs truncation top_k min_p repetition_penalty stop_token_ids include_stop_str_in_output"
        " ignore_eos skip_special_tokens structured_outputs include_reasoning chat_template_kwargs"
    ),
    refused={
        "store": Refusal(f"{_STATELESS}: leave `store` out or set it to false", _NO),
        "background": Refusal(f"{_STATELESS}, so none can be made in the background", _NO),
        "background_options": Refusal(f"{_STATELESS}, so none can be made in the background"),
        "previous_response_id": Refusal(f"{_STATELESS}: send the whole conversation as `input`"),
        "conversation": Refusal(f"{_STATELESS}: send the whole conversation as `input`"),
        "prompt": Refusal("stored prompts are not offered: send `input` and `instructions`"),
        "context_management": Refusal("context is not compacted here"),
        "moderation": _NO_MODERATION,
        "image": Refusal("options for images are not offered"),
        "access_programs": Refusal("access programs are not offered"),
    },
)

_MESSAGE = _names(
    "model messages system tools tool_choice thinking output_config cache_control context_management"
    " chat_template_kwargs"
)
MESSAGES = Fields(
    passed=_MESSAGE
    | _names("max_tokens metadata stop_sequences stream temperature top_k top_p service_tier"),
    refused={
        "container": Refusal("containers are not offered"),
        "mcp_servers": Refusal("MCP servers are not asked from here", _NOTHING | {b"[]"}),
        "inference_geo": Refusal("choosing a region is not offered"),
    },
)
COUNT_TOKENS = Fields(
    passed=_MESSAGE,
    refused={"mcp_servers": Refusal("MCP servers are not asked from here", _NOTHING | {b"[]"})},
)
