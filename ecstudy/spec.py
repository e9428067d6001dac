"""Spec strings: ``"compo"``, ``"robe(block=16, sign=True)"``, ``"compo|int8"``; values are literals only."""
from __future__ import annotations

import ast
from dataclasses import dataclass, field


class SpecError(ValueError):
    """A spec string that cannot be read; the message shows it and an example."""


@dataclass(frozen=True)
class Part:
    """One name with its options, written ``name(key=literal, ...)``."""

    name: str
    options: dict = field(default_factory=dict)

    def __str__(self) -> str:
        inner = ", ".join(f"{key}={self.options[key]!r}" for key in sorted(self.options))
        return f"{self.name}({inner})" if inner else self.name


@dataclass(frozen=True)
class Spec:
    """A method and the wrappers around it, inner first."""

    method: Part
    wrappers: tuple[Part, ...] = ()

    name = property(lambda self: self.method.name)
    options = property(lambda self: self.method.options)

    @property
    def canonical(self) -> str:
        """The same spec however it was written: options sorted, one spelling of spaces and quotes."""
        return "|".join(map(str, (self.method, *self.wrappers)))

    def __str__(self) -> str:
        return self.canonical


def _part(text: str, whole: str) -> Part:
    remedy = f"in spec {whole!r}: expected a name with literal options, like 'robe(block=16)' or 'compo|int8'"
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise SpecError(f"cannot read {text!r} {remedy}") from None
    if isinstance(node, ast.Name):
        return Part(node.id)
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)) or node.args:
        raise SpecError(f"cannot read {text!r} {remedy}")
    try:
        return Part(node.func.id, {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords})
    except ValueError:
        raise SpecError(f"an option of {text!r} is not a literal {remedy}") from None


def _split(text: str) -> list[str]:
    """Cut at ``|`` outside parentheses and quotes."""
    parts, depth, quote = [""], 0, None
    for char in text:
        if quote:
            quote = None if char == quote else quote
        elif char in "'\"":
            quote = char
        depth += (char in "([{") - (char in ")]}") if not quote else 0
        if char == "|" and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def parse(text: str | Spec) -> Spec:
    """Read a spec string; a :class:`Spec` passes through. Names are checked where they are looked up."""
    if isinstance(text, Spec):
        return text
    if not isinstance(text, str) or not text.strip():
        raise SpecError(f"spec {text!r}: expected text like 'compo' or 'compo|int8'")
    method, *wrappers = (_part(part, text) for part in _split(text))
    return Spec(method, tuple(wrappers))
