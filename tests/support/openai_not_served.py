"""What River does not serve of what the `openai` package's own tests ask for: each test by name, and why.

Every other test of the package passes, and every one that is named here fails: a name that is here for nothing fails
the suite as well.
"""

from __future__ import annotations


def _names(file: str, reason: str, *functions: str) -> dict[str, str]:
    return {f"{file}::{function}": reason for function in functions}


def _all_forms(*methods: str) -> list[str]:
    forms = ("method", "raw_response", "streaming_response")
    return [f"test_{form}_{method}" for method in methods for form in forms]


_CHAT, _STORED_MESSAGES = "chat/test_completions.py", "chat/completions/test_messages.py"
_STORED = "asks for a stored completion that nobody has made, or for a page of none (`limit=0`)"
_IMPOSSIBLE = "asks for audio, web search and moderation, and for no tokens at all (`max_completion_tokens=0`)"
_STATELESS = "responses are not stored: there is none to find by its id"
_NO_MODEL = "names no model"

NOT_SERVED: dict[str, str] = {
    **_names(
        _CHAT,
        _IMPOSSIBLE,
        "test_method_create_with_all_params_overload_1",
        "test_method_create_with_all_params_overload_2",
    ),
    **_names(
        _CHAT,
        _STORED,
        *_all_forms("retrieve", "update", "delete"),
        "test_method_list_with_all_params",
    ),
    **_names(_STORED_MESSAGES, _STORED, *_all_forms("list"), "test_method_list_with_all_params"),
    **_names(
        "test_completions.py",
        "asks for the best of none (`best_of=0`), and for a bias on a token that is no number",
        "test_method_create_with_all_params_overload_1",
        "test_method_create_with_all_params_overload_2",
    ),
    **_names(
        "test_models.py",
        "models are deleted as what they are: checkpoints and aliases of /river/v1",
        *_all_forms("delete"),
    ),
    **_names(
        "test_responses.py",
        _NO_MODEL,
        *_all_forms("create_overload_1", "create_overload_2"),
    ),
    **_names(
        "test_responses.py",
        "asks for a response in the background, of a stored conversation, from a stored prompt",
        "test_method_create_with_all_params_overload_1",
        "test_method_create_with_all_params_overload_2",
    ),
    **_names(
        "test_responses.py",
        _STATELESS,
        *_all_forms("retrieve_overload_1", "retrieve_overload_2", "delete", "cancel"),
        "test_method_retrieve_with_all_params_overload_1",
        "test_method_retrieve_with_all_params_overload_2",
    ),
    **_names(
        "test_responses.py",
        "conversations are not compacted: what a client leaves out is left out",
        *_all_forms("compact"),
        "test_method_compact_with_all_params",
    ),
    **_names(
        "responses/test_input_items.py",
        _STATELESS,
        *_all_forms("list"),
        "test_method_list_with_all_params",
    ),
    **_names(
        "responses/test_input_tokens.py",
        _NO_MODEL,
        *_all_forms("count"),
        "test_method_count_with_all_params",
    ),
}
