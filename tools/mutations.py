"""The mutants of a module: operators, constants, conditions, arguments and slices changed, and statements removed.

Docstrings, annotations, messages and other strings are not mutated, nor are decorators and assertions.
"""

import ast
import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

SWAPS: dict[type, Any] = {ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult}
for _one, _other in (
    *((ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot), (ast.In, ast.NotIn)),
    *((ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.BitAnd, ast.BitOr), (ast.And, ast.Or)),
):
    SWAPS |= {_one: _other, _other: _one}
NAMES = {"min": "max", "any": "all", "argmin": "argmax", "sum": "mean", "zeros": "ones"}
NAMES |= {other: one for one, other in NAMES.items()}
BLOCKS = {"body", "orelse", "handlers", "finalbody"}  # the fields of a statement that hold statements
LEFT = {"annotation", "returns", "decorator_list", "keywords of ClassDef"}  # the fields that are not mutated


@dataclass(frozen=True)
class Mutant:
    """A change of one statement."""

    key: str  # the function and the changed statement, so that it does not depend on the number of the line
    was: str
    line: int  # where the statement begins
    function: str  # empty outside of a function
    apply: Callable[[], None]


def variants(node: ast.AST) -> Iterator[ast.AST | None]:
    """Yield the nodes that may replace a node. None deletes a keyword argument."""
    match node:
        case ast.Compare(left, ops, rest):
            for i, op in enumerate(ops):
                yield ast.Compare(left, [*ops[:i], SWAPS[type(op)](), *ops[i + 1 :]], rest)
        case ast.BinOp(left, op, right) if type(op) in SWAPS:
            yield ast.BinOp(left, SWAPS[type(op)](), right)
        case ast.BoolOp(op, values):
            yield ast.BoolOp(SWAPS[type(op)](), values)
        case ast.UnaryOp(_, operand):
            yield operand
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value)):
            yield from map(ast.Constant, [0, 2] if value == 1 else [1, 3] if value == 2 else [value + 1])
        case ast.Constant(float(value)):
            yield ast.Constant(2 * value or 1.0)
        case ast.Constant(None):
            yield ast.Constant(0)
        case ast.Name(name, ctx=ast.Load()) if name in NAMES:
            yield ast.Name(NAMES[name], ast.Load())
        case ast.Attribute(value, name) if name in NAMES:
            yield ast.Attribute(value, NAMES[name], ast.Load())
        case ast.Call(function, args, keywords):
            for i, (a, b) in enumerate(itertools.pairwise(args)):
                if not any(isinstance(each, ast.Starred) or _is_text(each) for each in (a, b)):
                    yield ast.Call(function, [*args[:i], b, a, *args[i + 2 :]], keywords)
        case ast.keyword(str(), value) if not isinstance(value, ast.Constant):
            yield None
        case ast.Slice(lower, upper, step):
            for op in (ast.Add(), ast.Sub()):
                if lower and not isinstance(lower, ast.Constant | ast.UnaryOp):
                    yield ast.Slice(ast.BinOp(lower, op, ast.Constant(1)), upper, step)
                if upper and not isinstance(upper, ast.Constant | ast.UnaryOp):
                    yield ast.Slice(lower, ast.BinOp(upper, op, ast.Constant(1)), step)
        case ast.If(body=body) | ast.IfExp(body=body):
            for value in (True, False):
                if value or not isinstance(body, list) or not isinstance(body[0], ast.Raise):
                    changed = copy.copy(node)
                    changed.test = ast.Constant(value)
                    yield changed
        case ast.Raise() | ast.Expr(ast.Call()):
            yield ast.Pass()
        case ast.AugAssign(target, op, value):
            yield ast.Pass()
            if type(op) in SWAPS:
                yield ast.AugAssign(target, SWAPS[type(op)](), value)
        case ast.Assign([target], value) if {*_names(target)} & {*_names(value)}:
            yield ast.Pass()


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _names(node: ast.AST) -> Iterator[str]:
    return (each.id for each in ast.walk(node) if isinstance(each, ast.Name))


def _sites(node: ast.AST, scope: tuple[str, ...], statement: ast.stmt | None) -> Iterator[Any]:
    """Yield each node that may be mutated, with its parent, field and index, and its scope and statement."""
    for field, value in ast.iter_fields(node):
        if field in LEFT or f"{field} of {type(node).__name__}" in LEFT:
            continue
        for i, child in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr | ast.Assert):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in _names(child.test):
                continue
            if not (isinstance(node, ast.Compare) and isinstance(child, ast.Constant) and child.value is None):
                inner = child if isinstance(child, ast.stmt) else statement
                yield child, node, field, i if isinstance(value, list) else None, scope, inner
            if not isinstance(child, ast.Raise):
                is_scope = isinstance(child, ast.FunctionDef | ast.ClassDef)
                inside = isinstance(child, ast.stmt)
                yield from _sites(child, (*scope, child.name) if is_scope else scope, child if inside else statement)


def _text(statement: ast.stmt) -> str:
    """Return the source of a statement without the statements that it holds, annotations of parameters and messages."""
    shallow = copy.copy(statement)
    for field in BLOCKS & {*statement._fields}:
        setattr(shallow, field, [])
    shallow = copy.deepcopy(shallow)
    for node in ast.walk(shallow):
        match node:
            case ast.FunctionDef() | ast.arg():
                node.annotation = node.returns = None
                node.decorator_list = []
            case ast.JoinedStr():
                node.values = [ast.Constant("...")]
            case ast.Constant(str(value)) if " " in value:
                node.value = "..."
    return " ".join(ast.unparse(shallow).split())


def mutants(source: str, module: str) -> tuple[ast.Module, list[Mutant]]:
    """Return the tree of a module, and all of its mutants. Their method `apply` changes that tree."""
    tree, found = ast.parse(source), {}
    bodies = [n.body for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    inside = {id(each) for body in bodies for statement in body for each in ast.walk(statement)}
    for node, parent, field, i, scope, statement in [*_sites(tree, (), None)]:
        was = _text(statement)
        before = getattr(parent, field)
        for variant in variants(node):
            changed = variant if i is None else [*before[:i], *([variant] if variant else []), *before[i + 1 :]]
            setattr(parent, field, changed)
            now = variant if node is statement else statement
            became = f"without {was}" if isinstance(now, ast.Pass) else _text(now)
            setattr(parent, field, before)
            key = f"{'.'.join([module, *scope])}: {became}"
            if became != was and key not in found:
                function = ".".join(scope) if id(statement) in inside else ""
                found[key] = Mutant(
                    key, was, statement.lineno, function, functools.partial(setattr, parent, field, changed)
                )
    return tree, [*found.values()]


def marked(tree: ast.Module, name: str) -> ast.Module:
    """Return a copy of a tree in which every statement of a function first calls a function with its line."""
    tree = copy.deepcopy(tree)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    holders = {id(node): node for function in functions for node in ast.walk(function)}
    for node in holders.values():
        for field in BLOCKS & {*node._fields}:
            block = getattr(node, field)
            if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
                calls = [ast.Expr(ast.Call(ast.Name(name, ast.Load()), [ast.Constant(s.lineno)], [])) for s in block]
                pairs = [(ast.copy_location(call, s), s) for call, s in zip(calls, block, strict=True)]
                setattr(node, field, [each for pair in pairs for each in pair])
    return ast.fix_missing_locations(tree)
