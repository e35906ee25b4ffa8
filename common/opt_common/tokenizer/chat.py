"""Chat templates: a conversation to text, by a Jinja template."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

_MARK = "CONTINUE_FINAL_MESSAGE_TAG "  # a template that trims a message trims the space


def render(
    template: str, conversation: Sequence[Mapping[str, Any]], continue_final_message: bool | str, variables: Any
) -> str:
    """The text of a conversation. `continue_final_message` leaves out what the template puts after the last message;
    a str names the field of the message that is to be continued.

    Raises ImportError without jinja2, ValueError if the text does not hold the last message, and jinja2's errors.
    """
    messages: list[dict[str, Any]] = copy.deepcopy(list(map(dict, conversation)))
    if not continue_final_message:
        return _compiled(template).render(messages=messages, **variables)
    field = continue_final_message if isinstance(continue_final_message, str) else "content"
    last, final = messages[-1], messages[-1].get(field)
    if isinstance(final, list):  # blocks, of which the last text goes on
        last, field = next((block for block in reversed(final) if "text" in block), {}), "text"
        final = last.get(field)
    if not isinstance(final, str):
        raise ValueError(f"continue_final_message: found {final!r} as {field} of the last message, wanted a text")
    last[field] = final + _MARK
    text = _compiled(template).render(messages=messages, **variables)
    at = text.rfind(_MARK.strip())
    if at < 0 or final.strip() not in text:
        raise ValueError(f"continue_final_message: the template leaves out the last message, {final!r:.80}")
    return text[:at] if text.startswith(_MARK, at) else text[:at].rstrip()


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    try:
        from jinja2 import TemplateError, nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.parser import Parser
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ImportError(f"apply_chat_template needs jinja2: pip install jinja2: {error}") from error

    class Generation(Extension):
        """`{% generation %}` around what the assistant says, which only training masks look at."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def fail(message: str) -> None:
        raise TemplateError(message)

    # A template comes from a checkpoint: it must not reach into Python.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    # Jinja's own tojson escapes for HTML.
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals |= {"raise_exception": fail, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment.from_string(template)
