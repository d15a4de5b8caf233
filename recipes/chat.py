"""Conversations and instructions as tokens, with what the assistant says as the only targets.

A chat template makes one text of the messages. What of it the assistant says, the template marks with
`{% generation %}`; where it does not, that is found by applying it to ever more of the messages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field

from launch.errors import ConfigError, DataError
from launch.recipe import RecipeArgs
from recipes.batches import IGNORED
from recipes.files import short
from recipes.rows import RowStream, Splits
from recipes.tables import StoredRows, list_lengths
from recipes.tokens import begins_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from recipes.packing import Tokens

Message = dict[str, Any]
Span = tuple[int, int]

DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}"
    "assistant:{% generation %} {{ message.content or '' }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message.role }}: {{ message.content or '' }}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""For tokenizers that bring none: who speaks, a colon, what is said; the assistant ends with the end-of-text token."""

ROLES = ("system", "developer", "user", "assistant", "tool")

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def _file_or_text(text: str) -> str:
    return text if "{" in text else str(Path(text).expanduser().absolute())


class ChatArgs(RecipeArgs):
    """The part of a recipe's arguments that says how rows are conversations."""

    messages_column: str = "messages"
    """Format chat: column that holds a list of messages, each {role, content}."""
    prompt_column: str = "prompt"
    """Format instruction: column that holds what is asked."""
    input_column: str | None = None
    """Format instruction: column with more of what is asked, put below the prompt where it is not empty."""
    completion_column: str = "completion"
    """Format instruction: column that holds the answer."""
    chat_template: Annotated[str, AfterValidator(_file_or_text)] | None = None
    """Chat template (Jinja), a file or the text itself; null: the tokenizer's own, or else a simple one."""
    pad_to_multiple_of: int | None = Field(None, ge=1)
    """Samples are padded to the longest in a batch, and from there to a multiple of this; null: of 8, on CPUs of 1."""


def chat_columns(args: ChatArgs, form: str) -> dict[str, str]:
    """The columns that the format needs: the key that names a column -> the column."""
    if form == "chat":
        return {"messages_column": args.messages_column}
    more = {"input_column": args.input_column} if args.input_column else {}
    return {"prompt_column": args.prompt_column, "completion_column": args.completion_column, **more}


def stated_template(args: ChatArgs) -> str | None:
    """The text of `recipe_args.chat_template`.

    Raises:
        ConfigError: its file cannot be read.
    """
    if args.chat_template is None or "{" in args.chat_template:
        return args.chat_template
    try:
        return Path(args.chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"recipe_args.chat_template = {args.chat_template}: is no template (it has no brace), and no file that can "
            f"be read: {short(error)}"
        ) from None


def set_template(tokenizer: PreTrainedTokenizerBase, stated: str | None) -> str:
    """Give the tokenizer the template it shall have (it is exported with it), and say in words which.

    Raises:
        ConfigError: the tokenizer cannot tell which characters became which token.
    """
    if not tokenizer.is_fast:
        raise ConfigError(
            f"recipe_args.format: {type(tokenizer).__name__} does not tell which characters became which token, so "
            "that answers cannot be found; use a tokenizer with a tokenizer.json"
        )
    if stated is not None:
        tokenizer.chat_template = stated
        return "recipe_args.chat_template"
    if tokenizer.chat_template:
        return "the tokenizer's own"
    begin = "{{ bos_token }}" if begins_texts(tokenizer) else ""
    tokenizer.chat_template = begin + DEFAULT_TEMPLATE
    return "the tokenizer has none; a line for each message, and the end-of-text token after answers"


# --- rows to tokens --------------------------------------------------------------------------------------


def conversations(columns: Mapping[str, Sequence[Any]]) -> list[list[Message]]:
    """The messages of each row of a batch, of either format.

    Raises:
        DataError: a row holds something else.
    """
    if "messages" in columns:
        return [[_message(message, row) for message in _list(row)] for row in columns["messages"]]
    inputs = columns.get("input") or [None] * len(columns["prompt"])
    return [
        [
            {"role": "user", "content": _text(prompt) + (f"\n\n{_text(more)}" if more and _text(more).strip() else "")},
            *([{"role": "assistant", "content": _text(answer)}] if answer and _text(answer).strip() else []),
        ]
        for prompt, more, answer in zip(columns["prompt"], inputs, columns["completion"], strict=True)
    ]


def _text(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"a prompt, input or completion must be text, but one is {type(value).__name__} ({value!r:.60})"
        )
    return value


def _list(row: Any) -> list[Any]:
    if row is None:
        return []
    if not isinstance(row, list):
        raise DataError(
            f"recipe_args.messages_column: a row must hold a list of messages such as "
            f'{{"role": "user", "content": "…"}}, but one holds {type(row).__name__} ({row!r:.60})'
        )
    return row


def _message(message: Any, row: list[Any]) -> Message:
    """A message without what it leaves empty: in parquet files all have the same keys, those of a tool call too."""
    where = f"recipe_args.messages_column: the conversation {_beginning(row)}"
    found = _without_empty(message) if isinstance(message, dict) else {}
    if found.get("role") not in ROLES:
        raise DataError(f"{where}: a message must have a role, one of {', '.join(ROLES)}; got {message!r:.60}")
    if not isinstance(found.get("content", ""), str):
        raise DataError(f"{where}: the content of a message must be text; got {found['content']!r:.60}")
    return found


def _without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_empty(each) for key, each in value.items() if each is not None}
    return [_without_empty(each) for each in value] if isinstance(value, list) else value


def _beginning(row: Sequence[Any]) -> str:
    return f"that begins {json.dumps(row[0], ensure_ascii=False, default=str)[:80]}" if row else "without a message"


def encoder(tokenizer: PreTrainedTokenizerBase, block_size: int) -> Callable[[dict[str, list[Any]]], Any]:
    """Of rows the features `input_ids`, `answer` (whether the assistant says it) and `tokens` (before cutting).

    Longer conversations are cut at the end, and those that then have no target are left out.
    """

    def encode(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rendered = [render(tokenizer, messages) for messages in conversations(columns) if messages]
        features: dict[str, list[Any]] = {"input_ids": [], "answer": [], "tokens": []}
        if not rendered:
            return features
        encoded = tokenizer(
            [text for text, _ in rendered],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        for ids, offsets, (_, spans) in zip(encoded["input_ids"], encoded["offset_mapping"], rendered, strict=True):
            answer = _marked(offsets, spans)[:block_size]
            if any(answer[1:]):
                features["input_ids"].append(ids[:block_size])
                features["answer"].append(answer)
                features["tokens"].append(len(ids))
        return features

    return encode


def _marked(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Which tokens have a character in one of the spans; both in order. Some tokens have no character of their own."""
    found = []
    left = list(reversed(spans))
    for start, end in offsets:
        while left and left[-1][1] <= start:
            left.pop()
        found.append(bool(left) and max(end, start + 1) > left[-1][0])
    return found


# --- templates -------------------------------------------------------------------------------------------


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> tuple[str, list[Span]]:
    """A conversation as text, and where in it the assistant speaks: start and end in characters, in order.

    Raises:
        DataError: the template refuses the conversation, or does not let its answers be found; both name it.
    """
    if GENERATION.search(tokenizer.get_chat_template()):
        return _apply(tokenizer, messages)
    whole, _ = _apply(tokenizer, messages)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before, _ = _apply(tokenizer, messages[:number], prompts=True)
            after, _ = _apply(tokenizer, messages[: number + 1])
            if not (after.startswith(before) and whole.startswith(after)):
                raise DataError(
                    f"the chat template writes the conversation {_beginning(messages)} in another way when it goes on, "
                    "so that it cannot be seen what the assistant says; mark that with {% generation %} in a template "
                    "of your own (recipe_args.chat_template)"
                )
            spans.append((len(before), len(after.rstrip())))  # a line's end behind the end token is not said
    return whole, spans


def prompt_of(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str | None:
    """A conversation up to where the assistant speaks first; None: it never does."""
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and number:
            return _apply(tokenizer, messages[:number], prompts=True)[0]
    return None


def _apply(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], *, prompts: bool = False
) -> tuple[str, list[Span]]:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    template = tokenizer.get_chat_template()
    try:
        rendered: Any = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            return_assistant_tokens_mask=bool(GENERATION.search(template)),
            add_generation_prompt=prompts,
            **tokenizer.special_tokens_map,
        )
    except (TemplateError, TypeError) as error:
        raise DataError(
            f"the chat template does not take the conversation {_beginning(messages)}: {short(error)}"
        ) from error
    texts, spans = rendered
    return texts[0], spans[0] if spans else []


# --- samples ---------------------------------------------------------------------------------------------


def as_sample(features: Mapping[str, Any]) -> Tokens:
    """Ids and labels of a conversation, shape `(2, seq)`."""
    import numpy as np

    ids = np.array(features["input_ids"], dtype=np.int32)
    labels = np.where(features["answer"], ids, IGNORED)
    labels[0] = IGNORED
    return np.stack([ids, labels]).astype(np.int32)


class Conversations:
    """Encoded conversations as samples by index."""

    def __init__(self, rows: StoredRows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        """Number of conversations."""
        return len(self._rows)

    @property
    def lengths(self) -> Any:
        """Tokens of each conversation, shape `(samples,)`."""
        return list_lengths(self._rows)

    @property
    def uncut_lengths(self) -> Any:
        """The same before they were cut."""
        return self._rows.numbers("tokens")

    def __getitem__(self, index: int) -> Tokens:
        """Ids and labels of one, shape `(2, seq)`."""
        return as_sample(self._rows[index])

    def read(self, document: int, start: int, end: int) -> Tokens:
        """Ids and labels of a part of one."""
        return self[document][:, start:end]


class ConversationStream:
    """Encoded conversations of a stream as samples, in its order."""

    def __init__(self, rows: RowStream) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[Tokens]:
        """Ids and labels of each, shape `(2, seq)`, from the first on."""
        return map(as_sample, self._rows)


def facts_of(read: Splits, encoded: Splits, block_size: int, template: str) -> dict[str, Any]:
    """What was counted of conversations: in each split the rows, those left out, and those cut short."""
    found: dict[str, Any] = {"chat_template": template}
    for split, rows in read.facts.items():
        tokens = Conversations(getattr(encoded, split)).uncut_lengths
        found[f"{split}_conversations"] = {
            "rows": rows["rows"],
            "without_answer": rows["rows"] - len(tokens),
            "cut_short": int((tokens > block_size).sum()),
        }
    return found


def check_answers(samples: Conversations, facts: dict[str, Any]) -> None:
    """See that there is something to learn or to evaluate.

    Raises:
        DataError: no conversation has a target.
    """
    if not len(samples):
        raise DataError(
            "no row has an answer within recipe_args.block_size tokens, so nothing is a target: "
            f"{json.dumps({name: fact for name, fact in facts.items() if isinstance(fact, dict)})}; see that messages "
            "of the role assistant (or completions) are there, or use a larger recipe_args.block_size"
        )
