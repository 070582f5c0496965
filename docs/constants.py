"""Shows values in the Python interface, in place of the names of piflux's own constants.

A signature with `drain_s=DRAIN_S`, `policy: Policy` and `memory: MemoryLimit` says less to its
reader than one with `30.0`, `Literal['gather', 'rotate', 'displaced']` and
`float | Literal['auto'] | None`.
"""

from typing import Any

from griffe import Attribute, Expr, ExprBinOp, ExprName, ExprSubscript, Extension, Module, Object


class Constants(Extension):
    """An extension of griffe, which reads the sources for mkdocstrings."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        _spell_out(pkg, pkg)


def _spell_out(of: Object, pkg: Module) -> None:
    for member in of.members.values():
        if member.is_alias:
            continue
        if isinstance(member, Attribute):
            member.annotation = _value(member.annotation, pkg)
            member.value = _value(member.value, pkg)
        elif member.is_function:
            for parameter in member.parameters:
                parameter.annotation = _value(parameter.annotation, pkg)
                parameter.default = _value(parameter.default, pkg)
        else:
            _spell_out(member, pkg)


def _value(expression: str | Expr | None, pkg: Module) -> str | Expr | None:
    """With each constant, each set of strings and each union of `pkg` by its value."""
    if isinstance(expression, ExprBinOp):  # of types: `Policy | str`
        left, right = _value(expression.left, pkg), _value(expression.right, pkg)
        assert left is not None and right is not None
        return ExprBinOp(left, expression.operator, right)
    if not isinstance(expression, ExprName):
        return expression
    start, _, path = expression.canonical_path.partition(".")
    if start != pkg.name or not path:
        return expression
    try:
        found = pkg[path]
    except KeyError:
        return expression  # a name inside of a function
    if not isinstance(found, Attribute):
        return expression
    strings = isinstance(found.value, ExprSubscript) and str(found.value.left) == "Literal"
    union = isinstance(found.value, ExprBinOp) and found.value.operator == "|"
    return found.value if strings or union or found.name.isupper() else expression
