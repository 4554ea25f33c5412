"""Small faults to put into a Python module: `mutants` lists them, each by its source text.

What is changed: operators of arithmetic, comparison and logic; conditions; numbers (one more, one
less), True and False; dtypes and conversions; arguments (the last two swapped, a named one left
out); functions with a natural opposite (`SWAPS`); statements done for their effect, which are left
out. What is not: docstrings and other texts, annotations, decorators, imports, and whatever would
no longer compile.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

# fmt: off
_BINARY = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"), ast.Mod: ("%", "//"), ast.Pow: ("**", "*"),
    ast.LShift: ("<<", ">>"), ast.RShift: (">>", "<<"), ast.MatMult: ("@", "*"),
    ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"), ast.BitXor: ("^", "|"),
}
_COMPARE = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"),
}
SWAPS = {
    "min": "max", "max": "min", "any": "all", "all": "any",
    "minimum": "maximum", "maximum": "minimum", "zeros": "ones", "ones": "zeros",
    "zeros_like": "ones_like", "ones_like": "zeros_like", "isfinite": "isnan",
    "cumsum": "cumprod", "cummax": "cummin", "psum": "pmax", "pmax": "pmin",
    "square": "abs", "sqrt": "square", "popleft": "pop", "floor": "ceil", "ceil": "floor",
}
# fmt: on
_COMMUTE = {"min", "max", "minimum", "maximum", "promote_types", "isinstance"}  # order is nothing
_DTYPES = {"float32": "bfloat16", "bfloat16": "float32", "int32": "uint32", "uint32": "int32"}
_UNSEEN = {"annotation", "returns", "decorator_list", "type_comment"}


@dataclass(frozen=True)
class Mutant:
    """One fault. id: function, its lines as they are, and as they become. [start, end): bytes of
    the source that `text` takes the place of. line: from 1."""

    id: str
    start: int
    end: int
    text: str
    line: int

    def applied(self, source: str) -> str:
        data = source.encode()
        return (data[: self.start] + self.text.encode() + data[self.end :]).decode()


def mutants(source: str) -> list[Mutant]:
    """All mutants of a module's source, in its order. Equal ids get a number."""
    found, seen = [], Counter[str]()
    for start, end, text, scope in _Finder(source).edits():
        plain = Mutant("", start, end, text, source.encode()[:start].count(b"\n") + 1)
        try:
            ast.parse(plain.applied(source))
        except SyntaxError:
            continue
        name = f"{scope}: {_lines(source, start, end)} => {_lines(source, start, end, text)}"
        seen[name] += 1
        name += f" ({seen[name]})" if seen[name] > 1 else ""
        found.append(Mutant(name, start, end, text, plain.line))
    return found


def _lines(source: str, start: int, end: int, text: str | None = None) -> str:
    """The lines around a range in one, as they are or with `text` in the range's place."""
    data = source.encode()
    first, last = data.rfind(b"\n", 0, start) + 1, data.find(b"\n", end)
    inner = data[start:end] if text is None else text.encode()
    whole = data[first:start] + inner + (data[end:last] if last >= 0 else data[end:])
    return " ".join(whole.decode().split())


class _Finder:
    """Walks the syntax tree; every edit is (start, end, text, the function it is in)."""

    def __init__(self, source: str):
        self._data = source.encode()
        self._tree = ast.parse(source)
        self._starts = [0]
        for line in self._data.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))

    def edits(self) -> Iterator[tuple[int, int, str, str]]:
        for start, end, text, scope in self._walk(self._tree, (), None):
            yield start, end, text, ".".join(scope) or "module"

    def _span(self, node: ast.AST) -> tuple[int, int]:
        begin = self._starts[node.lineno - 1] + node.col_offset
        return begin, self._starts[node.end_lineno - 1] + node.end_col_offset

    def _text(self, node: ast.AST) -> str:
        start, end = self._span(node)
        return self._data[start:end].decode()

    def _walk(self, node: ast.AST, scope: tuple[str, ...], parent: ast.AST | None) -> Iterator:
        if isinstance(node, ast.JoinedStr | ast.Import | ast.ImportFrom):
            return  # a text; Python 3.11 does not tell where its parts are
        if isinstance(node, ast.Assign) and self._text(node).startswith("__"):
            return
        for edit in self._own(node, parent):
            yield *edit, scope
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            scope = (*scope, node.name)
        for field, value in ast.iter_fields(node):
            if field not in _UNSEEN:
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        yield from self._walk(child, scope, node)

    def _own(self, node: ast.AST, parent: ast.AST | None) -> Iterator[tuple[int, int, str]]:
        match node:
            case ast.BinOp():
                yield from self._between(node.left, node.right, _BINARY.get(type(node.op)))
            case ast.AugAssign():
                yield from self._between(node.target, node.value, _BINARY.get(type(node.op)))
                yield *self._span(node), "pass"
            case ast.Compare():
                sides = [node.left, *node.comparators]
                for left, right, op in zip(sides, sides[1:], node.ops, strict=False):
                    yield from self._between(left, right, _COMPARE.get(type(op)))
            case ast.BoolOp():
                swap = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
                for left, right in zip(node.values, node.values[1:], strict=False):
                    yield from self._between(left, right, swap)
            case ast.UnaryOp():
                yield *self._span(node), f"({self._text(node.operand)})"
            case ast.If() | ast.IfExp() if not isinstance(node.test, ast.UnaryOp):
                yield *self._span(node.test), f"(not ({self._text(node.test)}))"
            case ast.Constant(value=bool()):
                yield *self._span(node), str(not node.value)
            case ast.Constant(value=int() | float()):
                yield *self._span(node), str(node.value + 1)
                if node.value >= 1:
                    yield *self._span(node), str(node.value - 1)
            case ast.Attribute(value=ast.Name(id="jnp")) if node.attr in _DTYPES:
                yield *self._span(node), f"jnp.{_DTYPES[node.attr]}"
            case ast.Call():
                yield from self._call(node)
            case ast.Expr(value=ast.Call()) | ast.Raise() | ast.Break() | ast.Continue():
                yield *self._span(node), "pass"
            case ast.Return() if isinstance(parent, ast.If):
                yield *self._span(node), "pass"
            case ast.Assign() if not all(isinstance(t, ast.Name) for t in _flat(node.targets)):
                yield *self._span(node), "pass"

    def _between(
        self, left: ast.AST, right: ast.AST, swap: tuple[str, str] | None
    ) -> Iterator[tuple[int, int, str]]:
        """The operator that stands between two operands becomes its opposite."""
        start, end = self._span(left)[1], self._span(right)[0]
        if swap is not None and (at := self._data.find(swap[0].encode(), start, end)) >= 0:
            yield at, at + len(swap[0]), swap[1]

    def _call(self, node: ast.Call) -> Iterator[tuple[int, int, str]]:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else self._text(node.func)
        end = self._span(node.func)[1]
        swap = SWAPS.get(name)
        if isinstance(node.func, ast.Attribute) and self._text(node.func.value) == "jnp":
            swap = "mean" if name == "sum" else swap
        if name in ("add", "set") and ".at[" in self._text(node.func):
            swap = "set" if name == "add" else "add"
        if swap:
            yield end - len(name), end, swap
        if name == "astype":
            yield *self._span(node), f"({self._text(node.func.value)})"
        args = [self._text(a) for a in node.args]
        named = [f"{k.arg}={self._text(k.value)}" for k in node.keywords if k.arg]
        more = [f"**{self._text(k.value)}" for k in node.keywords if not k.arg]
        starred = any(isinstance(a, ast.Starred) for a in node.args)
        if len(args) > 1 and args[-1] != args[-2] and name not in _COMMUTE and not starred:
            swapped = [*args[:-2], args[-1], args[-2], *named, *more]
            yield end, self._span(node)[1], f"({', '.join(swapped)})"
        flags = [k for k in node.keywords if isinstance(k.value, ast.Constant)]
        flags = [f"{k.arg}={k.value.value}" for k in flags if isinstance(k.value.value, bool)]
        for one in named:
            if one in flags:
                continue  # turned over instead
            rest = [*args, *(k for k in named if k != one), *more]
            yield end, self._span(node)[1], f"({', '.join(rest)})"


def _flat(targets: list[ast.expr]) -> list[ast.expr]:
    inner = [t.elts if isinstance(t, ast.Tuple | ast.List) else [t] for t in targets]
    return [one for some in inner for one in some]
