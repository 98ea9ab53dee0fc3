"""What torch asks about sizes that are not known, answered for all of them, or refused.

JAX's rules answer, by the bounds and constraints of `jax.export.symbolic_shape`. Two sizes that need not be equal are
taken for different ones, as JAX does, unless the code itself asks.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sympy
from torch.fx.experimental.symbolic_shapes import ShapeEnv, statically_known_true

from ..errors import TorchCallError
from .expressions import constant_of, truth_of
from .lines import asking, is_users, line_here


class Decisions(ShapeEnv):
    """The symbols of one trace, and what is said of them.

    **Arguments:**

    - `name`: the callable's.
    - `dims`: JAX's dimensions by the names of torch's symbols.
    """

    def __init__(self, name: str, dims: Mapping[str, Any]):
        super().__init__(
            specialize_zero_one=False,
            duck_shape=False,
            allow_scalar_outputs=False,
            allow_dynamic_output_shape_ops=False,
        )
        self._name, self._dims = name, dims
        self.refusal: TorchCallError | None = None
        """The first question without an answer: torch may catch what is raised."""

    def evaluate_expr(
        self,
        orig_expr: Any,
        hint: Any = None,
        fx_node: Any = None,
        size_oblivious: bool = False,
        fallback_value: bool | None = None,
        **options: Any,
    ) -> Any:
        """The value of an expression, which is a statement or a number."""
        is_statement = orig_expr.is_Boolean or orig_expr.is_Relational
        answer = self._settled(orig_expr) if is_statement else constant_of(orig_expr, self._dims)
        if answer is None:
            answer = fallback_value
        if answer is None and is_statement:
            answer = self._assumed(type(orig_expr).__name__)
        if answer is None:
            self.refusal = self.refusal or TorchCallError(self._refused(orig_expr, is_statement))
            raise self.refusal
        return answer

    def _settled(self, statement: Any) -> bool | None:
        """Whether a statement holds for all sizes, by torch's rules or JAX's."""
        claims: list[tuple[bool, Any]] = [(True, statement), (False, sympy.Not(statement))]
        for answer, claim in claims:
            if statically_known_true(self.create_symboolnode(claim)):
                return answer
        return truth_of(statement, self._dims)

    def _assumed(self, kind: str) -> bool | None:
        """What is assumed of a statement that holds for some sizes; None if that would be wrong for others."""
        frame, by_itself = asking()
        code = None if frame is None else frame.f_code
        if code is None or (by_itself and is_users(code.co_filename)):
            return None
        if code.co_name == "conv" and code.co_filename.endswith("fake_impls.py"):  # which kernel is the fastest
            return False
        return kind == "Unequality" if kind in ("Equality", "Unequality") else None

    def _refused(self, expr: Any, is_statement: bool) -> str:
        where, wants = line_here(_OUTERMOST), "decides by" if is_statement else "needs the number"
        return (
            f"{self._name} {wants} {self._shown(expr)}, which is symbolic{f', in {where}' if where else ''}. One "
            "program for all sizes cannot do that. Give jax.export.symbolic_shape constraints that settle it (such as "
            "constraints=['b >= 4']), or export with sizes that are known, once for each size."
        )

    def _shown(self, expr: Any) -> str:
        """An expression in the names that the user gave the sizes."""
        names = {symbol: str(dim) for symbol, dim in self._dims.items()}
        sign = {"Equality": "==", "Unequality": "!="}.get(type(expr).__name__)
        text = str(expr) if sign is None else f"{expr.args[0]} {sign} {expr.args[1]}"
        return re.sub(r"\w+", lambda m: names.get(m[0], m[0]), text)


_OUTERMOST = str(Path(__file__).with_name("specialize.py"))
"""Where traces begin."""
