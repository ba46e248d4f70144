"""Lists mutants of a source file: small changes of its code that a test should notice.

Each is a replaced stretch of text, so that what stands above it keeps its line numbers. Left alone are docstrings,
annotations, decorators, imports, strings, assertions (by the rules of the house they never fire), and all that is
inside an error or a log line.
"""

import ast
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_COMPARISONS: dict[type[ast.cmpop], tuple[str, ...]] = {
    ast.Lt: ("<=", ">="),
    ast.LtE: ("<", ">"),
    ast.Gt: (">=", "<="),
    ast.GtE: (">", "<"),
    ast.Eq: ("!=",),
    ast.NotEq: ("==",),
    ast.In: ("not in",),
    ast.NotIn: ("in",),
    ast.Is: ("is not",),
    ast.IsNot: ("is",),
}
_ARITHMETIC: dict[type[ast.operator], ast.operator] = {
    ast.Add: ast.Sub(), ast.Sub: ast.Add(), ast.Mult: ast.Div(), ast.Div: ast.Mult(), ast.FloorDiv: ast.Div(),
    ast.Mod: ast.Mult(), ast.Pow: ast.Mult(), ast.BitAnd: ast.BitOr(), ast.BitOr: ast.BitAnd(),
    ast.LShift: ast.RShift(), ast.RShift: ast.LShift(),
}  # fmt: skip
_NAMES = {
    "min": "max", "any": "all", "mean": "sum", "amin": "amax", "argmin": "argmax", "floor": "ceil", "zeros": "ones",
    "zeros_like": "ones_like", "sin": "cos", "minimum": "maximum",
}  # fmt: skip
_SWAPPED = {**_NAMES, **{b: a for a, b in _NAMES.items() if b != "sum"}}
_LOGS = {"debug", "info", "warning", "error", "exception", "warn", "log", "print", "note"}
_SWAP_FAILS_AT_ONCE = {"isinstance", "issubclass", "hasattr", "getattr", "setattr", "cast", "TypeVar", "field"}


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    path: str
    """From the root of the tree."""
    line: int
    kind: str
    start: int
    end: int
    """Characters [start, end) of the file are replaced."""
    before: str
    after: str
    lines: tuple[int, int]
    """First and last line of what a test must reach."""
    in_function: bool
    """Whether a call reaches it, or the import of the file."""

    @property
    def name(self) -> str:
        """What is unique of a mutant in one version of the tree."""
        return f"{self.path}:{self.line}+{self.start}:{self.kind}:{self.after[:40]}"

    def apply(self, source: str) -> str:
        """Return the file's text with the change."""
        assert source[self.start : self.end] == self.before, f"{self.path} is another version"
        return source[: self.start] + self.after + source[self.end :]


def mutants_of(root: Path, path: str) -> list[Mutant]:
    """Return the mutants of a file; `is_another_program` has not yet been asked."""
    source = (root / path).read_text()
    return list(_Finder(source, path).find(ast.parse(source)))


def is_another_program(root: Path, mutant: Mutant) -> bool:
    """Return whether Python can compile it, and finds a difference."""
    source = (root / mutant.path).read_text()
    try:
        return ast.dump(ast.parse(mutant.apply(source))) != ast.dump(ast.parse(source))
    except SyntaxError:
        return False


def choose(root: Path, paths: list[str], count: int, seed: int) -> list[Mutant]:
    """Draw `count` mutants of different lines, each line as likely as any other, and on it each kind."""
    by_line: dict[tuple[str, int], list[Mutant]] = {}
    for path in paths:
        for mutant in mutants_of(root, path):
            by_line.setdefault((path, mutant.line), []).append(mutant)
    draw = random.Random(seed)
    lines = sorted(by_line)
    draw.shuffle(lines)
    chosen: list[Mutant] = []
    for line in lines:
        kinds = sorted({mutant.kind for mutant in by_line[line]})
        kind = draw.choice(kinds)
        mutant = draw.choice([mutant for mutant in by_line[line] if mutant.kind == kind])
        if len(chosen) < count and is_another_program(root, mutant):
            chosen.append(mutant)
    return chosen


class _Finder:
    def __init__(self, source: str, path: str) -> None:
        self._source, self._path = source, path
        self._starts = [0]
        for line in source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))

    def find(self, tree: ast.Module) -> Iterator[Mutant]:
        yield from self._body(tree.body, in_function=False)

    def _at(self, line: int, column: int) -> int:
        return self._starts[line - 1] + column

    def _mutant(
        self, node: ast.expr | ast.stmt, kind: str, after: str, statement: ast.stmt, in_function: bool
    ) -> Mutant:
        start = self._at(node.lineno, node.col_offset)
        end = self._at(node.end_lineno or 0, node.end_col_offset or 0)
        last = statement.end_lineno or statement.lineno
        if isinstance(statement, ast.If | ast.While | ast.For | ast.With):
            last = statement.body[0].lineno - 1 if statement.body[0].lineno > statement.lineno else statement.lineno
        reached = (statement.lineno, last)
        before = self._source[start:end]
        return Mutant(self._path, node.lineno, kind, start, end, before, after, reached, in_function)

    def _body(self, body: list[ast.stmt], in_function: bool) -> Iterator[Mutant]:
        for statement in body:
            yield from self._statement(statement, in_function)

    def _statement(self, statement: ast.stmt, in_function: bool) -> Iterator[Mutant]:
        if isinstance(statement, ast.Import | ast.ImportFrom | ast.Assert) or _is_text(statement):
            return
        for change, after in _statement_changes(statement):
            yield self._mutant(statement, change, after, statement, in_function)
        if isinstance(statement, ast.Raise):
            return
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            for default in (*statement.args.defaults, *filter(None, statement.args.kw_defaults)):
                yield from self._expression(default, statement, in_function)
            yield from self._body(statement.body, in_function=True)
            return
        for name, value in ast.iter_fields(statement):
            if name in ("annotation", "decorator_list", "targets", "target", "bases", "type_params"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.stmt):
                    yield from self._statement(child, in_function)
                elif isinstance(child, ast.ExceptHandler | ast.match_case):
                    yield from self._body(child.body, in_function)
                elif isinstance(child, ast.withitem):
                    yield from self._expression(child.context_expr, statement, in_function)
                elif isinstance(child, ast.expr):
                    yield from self._expression(child, statement, in_function)

    def _expression(self, node: ast.expr, statement: ast.stmt, in_function: bool) -> Iterator[Mutant]:
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Call) and _is_text(ast.Expr(node))):
            return
        for kind, after in _expression_changes(node):
            yield self._mutant(node, kind, f"({after})", statement, in_function)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.comprehension):
                parts: list[ast.expr] = [child.iter, *child.ifs]
            elif isinstance(child, ast.keyword):
                parts = [child.value]
            elif isinstance(child, ast.expr):
                parts = [child]
            else:
                parts = []
            for part in parts:
                yield from self._expression(part, statement, in_function)


def _called(node: ast.Call) -> str:
    function = node.func
    return (
        function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""
    )


def _is_text(statement: ast.stmt) -> bool:
    """Whether a statement is a docstring, a log line, or makes an error."""
    if not isinstance(statement, ast.Expr):
        return False
    if isinstance(statement.value, ast.Constant):
        return True
    called = _called(statement.value) if isinstance(statement.value, ast.Call) else ""
    return called in _LOGS or called.endswith(("Error", "Warning"))


def _statement_changes(statement: ast.stmt) -> Iterator[tuple[str, str]]:
    stores = isinstance(statement, ast.Assign) and not isinstance(statement.targets[0], ast.Name | ast.Tuple)
    calls = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
    if stores or calls or isinstance(statement, ast.AugAssign | ast.Raise | ast.Continue | ast.Break):
        yield "statement dropped", "pass"
    if isinstance(statement, ast.Return) and not (
        statement.value is None or (isinstance(statement.value, ast.Constant) and statement.value.value is None)
    ):
        yield "return value", "return None"
    if isinstance(statement, ast.AugAssign) and type(statement.op) in _ARITHMETIC:
        changed = ast.AugAssign(statement.target, _ARITHMETIC[type(statement.op)], statement.value)
        yield "arithmetic", ast.unparse(changed)


def _expression_changes(node: ast.expr) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Compare):
        yield from _comparison(node)
    elif isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC and not _of_texts(node):
        yield "arithmetic", ast.unparse(ast.BinOp(node.left, _ARITHMETIC[type(node.op)], node.right))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield "negation", ast.unparse(node.operand)
    elif isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield "and/or", ast.unparse(ast.BoolOp(other, node.values))
        yield "negation", f"not ({ast.unparse(node)})"
    elif isinstance(node, ast.IfExp):
        yield "negation", ast.unparse(ast.IfExp(node.test, node.orelse, node.body))
    elif isinstance(node, ast.Constant):
        yield from _constant(node.value)
    elif isinstance(node, ast.Call):
        yield from _call(node)
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice):
        for part in ("lower", "upper", "step"):
            if getattr(node.slice, part) is not None:
                parts = {name: getattr(node.slice, name) for name in ("lower", "upper", "step") if name != part}
                yield "slice", ast.unparse(ast.Subscript(node.value, ast.Slice(**parts), node.ctx))


def _comparison(node: ast.Compare) -> Iterator[tuple[str, str]]:
    sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
    for index, operator in enumerate(node.ops):
        for other in _COMPARISONS[type(operator)]:
            left = (
                ast.unparse(ast.Compare(node.left, node.ops[:index], node.comparators[:index])) if index else sides[0]
            )
            rest = node.ops[index + 1 :], node.comparators[index + 1 :]
            right = ast.unparse(ast.Compare(node.comparators[index], *rest)) if rest[0] else sides[index + 1]
            yield "comparison", f"{left} {other} {right}"


def _of_texts(node: ast.BinOp) -> bool:
    """Whether it joins texts, lists or paths, where another operator fails at once."""
    for side in (node.left, node.right):
        if isinstance(side, ast.JoinedStr | ast.List | ast.ListComp | ast.Tuple):
            return True
        if isinstance(side, ast.Constant) and isinstance(side.value, str | bytes):
            return True
        if isinstance(side, ast.BinOp) and _of_texts(side):
            return True
    return False


def _constant(value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, bool):
        yield "constant", str(not value)
    elif isinstance(value, int):
        yield "constant", str(value + 1)
        if value > 0:
            yield "constant", str(value - 1)
    elif isinstance(value, float):
        yield "constant", repr(value * 2 if value else 1.0)


def _call(node: ast.Call) -> Iterator[tuple[str, str]]:
    for index, keyword in enumerate(node.keywords):
        if keyword.arg is not None:
            others = node.keywords[:index] + node.keywords[index + 1 :]
            yield f"keyword {keyword.arg} dropped", ast.unparse(ast.Call(node.func, node.args, others))
    name = _called(node)
    fixed = name in _SWAP_FAILS_AT_ONCE or any(isinstance(argument, ast.Starred) for argument in node.args)
    for index in range(0 if fixed else len(node.args) - 1):
        swapped = [*node.args[:index], node.args[index + 1], node.args[index], *node.args[index + 2 :]]
        yield "arguments swapped", ast.unparse(ast.Call(node.func, swapped, node.keywords))
    if name in _SWAPPED:
        other: ast.expr = ast.Name(_SWAPPED[name])
        if isinstance(node.func, ast.Attribute):
            other = ast.Attribute(node.func.value, _SWAPPED[name])
        yield "other function", ast.unparse(ast.Call(other, node.args, node.keywords))
