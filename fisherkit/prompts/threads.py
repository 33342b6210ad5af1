"""Conversations from tables whose rows are single messages that name their parent (OASST)."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from fisherkit.prompts.shapes import best_reply, without_open_question
from fisherkit.prompts.turns import Row

_COLUMNS = {"message_id", "parent_id", "text", "role"}


def is_message(row: Row) -> bool:
    """Tell a row that is one message of a thread from one that is a prompt."""
    return row.keys() >= _COLUMNS


def threads(rows: Iterable[Row]) -> Iterator[Row]:
    """Join messages to one conversation for each first message: always on with the best-ranked reply.

    All rows are read first, since nothing promises that a reply stands near its parent.

    Args:
        rows: of ``message_id``, ``parent_id`` (null for a first message), ``text``, ``role``, and perhaps ``rank``.
    """
    replies: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        replies[_key(row.get("parent_id"))].append(row)
    for first in (row for row in replies.get("", ()) if not row.get("deleted")):
        messages, seen = [], set()
        node: Any = first
        while node is not None and _key(node.get("message_id")) not in seen:  # a file may name circles
            seen.add(_key(node.get("message_id")))
            messages.append({"role": node.get("role"), "content": node.get("text")})
            node = best_reply(replies.get(_key(node.get("message_id")), ()))
        yield {"messages": without_open_question(messages)}


def _key(name: Any) -> str:
    """Make an id comparable; null, blank and absent are one."""
    return "" if name is None else str(name)
