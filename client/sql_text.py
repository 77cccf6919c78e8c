"""What can be said about a query without a database: one SELECT, in a fixed order. Its text is never repeated."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

_DOLLAR = re.compile(r"\$(?:[A-Za-z_]\w*)?\$")
_WORD = re.compile(r"[A-Za-z_]\w*")
_LINE_COMMENT = re.compile(r"--[^\r\n]*")
_BLOCK = re.compile(r"/\*|\*/")
UNSTABLE = (
    "has no ORDER BY at its end, so the order of patients would not be fixed, and a study knows a patient by his place"
    " in it; order by a unique column, or name one as key in [site.sql]"
)


def query_problem(query: str, *, ordered: bool) -> str:
    """Why the query is not one SELECT (`ordered`: with an ORDER BY of its own), in words; "" if it is one."""
    try:
        words = list(_tokens(query))
    except ValueError as error:
        return str(error)
    while words and words[-1][0] == ";":
        words.pop()
    if not words:
        return "is empty"
    if any(word == ";" for word, _ in words):
        return "holds more than one statement; only one SELECT is read"
    if words[0][0] not in ("select", "with"):
        return "must begin with SELECT or WITH; nothing but reading is done"
    top = [word for word, depth in words if depth == 0]
    pairs = set(itertools.pairwise(top))
    if ordered and ("order", "by") not in pairs:
        return UNSTABLE
    return ""


def _tokens(query: str) -> Iterator[tuple[str, int]]:
    """Words in lower case, ";" and other marks, each with its depth in parentheses; no comments, no quoted text."""
    position = depth = 0
    while position < len(query):
        character = query[position]
        if character.isspace():
            position += 1
        elif query.startswith("--", position):
            found = _LINE_COMMENT.match(query, position)
            position = found.end() if found else len(query)
        elif query.startswith("/*", position):
            position = _after_block(query, position)
        elif found := _DOLLAR.match(query, position):
            end = query.find(found.group(), found.end())
            if end < 0:
                raise ValueError("holds a $ quote that does not end")
            position = end + len(found.group())
            yield "''", depth
        elif character in "'\"`" or (character in "eE" and query.startswith("'", position + 1)):
            position = _after_quote(query, position)
            yield "''", depth
        elif found := _WORD.match(query, position):
            position = found.end()
            yield found.group().lower(), depth
        else:
            position += 1
            depth += (character == "(") - (character == ")")
            if depth < 0:
                raise ValueError("closes a parenthesis that was not opened")
            yield character, depth
    if depth:
        raise ValueError("opens a parenthesis that is not closed")


def _after_quote(query: str, position: int) -> int:
    escapes = query[position] in "eE"
    position += escapes
    mark = query[position]
    position += 1
    while position < len(query):
        if escapes and query[position] == "\\":
            position += 2
        elif query[position] != mark:
            position += 1
        elif query.startswith(mark, position + 1):
            position += 2
        else:
            return position + 1
    raise ValueError("holds a quote that does not end")


def _after_block(query: str, position: int) -> int:
    depth = 0
    for found in _BLOCK.finditer(query, position):
        depth += 1 if found.group() == "/*" else -1
        if depth == 0:
            return found.end()
    raise ValueError("holds a comment that does not end")
