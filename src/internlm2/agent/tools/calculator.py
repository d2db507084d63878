"""A calculator that models can trust: exact fractions where possible, sizes limited, nothing is evaluated as Python.

The text is parsed by Python's grammar, and a walk over the tree knows numbers, operators, a few functions and nothing
else. `^` is power. Before a large result is computed, its size is estimated.
"""

import ast
import math
from collections.abc import Callable, Mapping
from decimal import Context, Decimal
from fractions import Fraction
from typing import Annotated

from internlm2.agent.function.define import tool
from internlm2.agent.tool_type import Tool, ToolError

MAX_CHARS = 1000
MAX_BITS = 8192  # of a number, or of either half of a fraction: 2466 digits
_MAX_DEPTH = 60
_DIGITS = 15
_EXACT_CHARS = 60
_WIDE = {chr(0xFF01 + n): chr(0x21 + n) for n in range(94)}  # as Chinese input methods write digits and signs
_SIGNS = str.maketrans(
    {**_WIDE, "×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "^": "**", chr(0xFF3E): "**"}
)

Number = int | Fraction | float


def calculate(expression: str) -> str:
    """The value of an arithmetic expression as text. Raises ToolError for what it cannot or will not compute.

    >>> calculate("0.1 + 0.2"), calculate("2^10 / 3")
    ('0.3', '341.333333333333')
    """
    text = expression.strip().translate(_SIGNS)
    if not text or len(text) > MAX_CHARS:
        raise ToolError(f"An expression has 1 to {MAX_CHARS} characters, but this has {len(text)}.")
    if any(sign in text for sign in "'\"\\"):
        raise ToolError(f"{expression!r:.100} is no arithmetic expression: it holds a text.")
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        words = error.msg if isinstance(error, SyntaxError) else "it is nested too deeply, or no text"
        raise ToolError(f"{expression!r:.100} is no arithmetic expression: {words}.") from None
    try:
        return show(_value(tree.body, 0))
    except ZeroDivisionError:
        raise ToolError("Division by zero.") from None
    except OverflowError:
        raise ToolError("The result is too large.") from None
    except (ValueError, TypeError) as error:
        raise ToolError(f"Not defined: {error}.") from None


def show(number: Number) -> str:
    """A number for people: whole ones and short decimals exactly, others with 15 digits."""
    if isinstance(number, Fraction):
        if number.denominator == 1:
            return str(number.numerator)
        exact = _exact_decimal(number)
        if exact is not None:
            return exact
        context = Context(prec=_DIGITS)
        shown = context.divide(Decimal(number.numerator), Decimal(number.denominator))
        return f"{shown:g}" if -20 < shown.adjusted() < 20 else str(shown)
    if isinstance(number, float):
        if not math.isfinite(number):
            raise ToolError("The result is no finite number.")
        return str(int(number)) if abs(number) < 1e15 and int(number) == number else f"{number:.{_DIGITS}g}"
    return str(number)


def _exact_decimal(number: Fraction) -> str | None:
    """The decimal form, where it ends soon."""
    rest, places = number.denominator, 0
    for factor in (2, 5):
        count = 0
        while rest % factor == 0:
            rest, count = rest // factor, count + 1
        places = max(places, count)
    if rest != 1 or places > _EXACT_CHARS:
        return None
    digits = str(abs(number.numerator) * 10**places // number.denominator).rjust(places + 1, "0")
    shown = ("-" if number < 0 else "") + digits[:-places] + "." + digits[-places:]
    return shown if len(shown) <= _EXACT_CHARS else None


def _value(node: ast.expr, depth: int) -> Number:
    if depth > _MAX_DEPTH:
        raise ToolError(f"The expression is nested more than {_MAX_DEPTH} deep.")
    if isinstance(node, ast.Constant):
        return _constant(node.value)
    if isinstance(node, ast.Name) and node.id.lower() in _CONSTANTS:
        return _CONSTANTS[node.id.lower()]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand, depth + 1)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left, depth + 1), _value(node.right, depth + 1)
        return _checked(_OPERATORS[type(node.op)](left, right))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        function = _FUNCTIONS.get(node.func.id.lower())
        if function is not None:
            return _checked(function(*[_value(each, depth + 1) for each in node.args]))
    if isinstance(node, ast.Tuple):
        raise ToolError("Write numbers without separators between thousands: 1234567.")
    known = ", ".join([*sorted(_CONSTANTS), *sorted(_FUNCTIONS)])
    try:
        shown = ast.unparse(node)
    except RecursionError:
        shown = "This"
    raise ToolError(f"{shown!r:.60} is not known here. There are numbers, + - * / // % ^ ( ), and: {known}.")


def _constant(value: object) -> Number:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ToolError(f"{value!r:.60} is no number.")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise OverflowError
        return Fraction(repr(value))  # 0.1 is a tenth, as it is written
    return _checked(value)


def _checked(value: object) -> Number:
    """A result within its limits; a fraction that is whole becomes a whole number."""
    if isinstance(value, Fraction) and value.denominator == 1:
        value = value.numerator
    if isinstance(value, Fraction):
        too_large = max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS
    elif isinstance(value, int):
        too_large = value.bit_length() > MAX_BITS
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise OverflowError
        too_large = False
    else:
        raise ToolError("The result is no real number.")
    if too_large:
        raise OverflowError
    return value


def _divide(left: Number, right: Number) -> Number:
    if isinstance(left, float) or isinstance(right, float):
        return left / right
    return Fraction(left) / Fraction(right)


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(exponent, int) and not isinstance(base, float):
        exact = Fraction(base)
        bits = max(exact.numerator.bit_length(), exact.denominator.bit_length())
        if exact not in (-1, 0, 1) and (bits - 1) * abs(exponent) > MAX_BITS:
            raise OverflowError
        if exact in (-1, 1):
            exponent %= 2
        elif exact == 0:
            exponent = (exponent > 0) - (exponent < 0)
        return exact**exponent
    result = float(base) ** float(exponent)
    if isinstance(result, complex):
        raise ToolError("The result is no real number.")
    return result


def _factorial(value: Number) -> Number:
    if not isinstance(value, int) or value < 0:
        raise ToolError("The factorial is defined for whole numbers from 0 on.")
    if value > MAX_BITS // 8:
        raise OverflowError
    return math.factorial(value)


def _comb(count: Number, chosen: Number) -> Number:
    if not isinstance(count, int) or not isinstance(chosen, int):
        raise ToolError("comb takes two whole numbers.")
    if count.bit_length() * min(chosen, abs(count - chosen)) > 4 * MAX_BITS:
        raise OverflowError
    return math.comb(count, chosen)


def _round(value: Number, places: Number = 0) -> Number:
    if not isinstance(places, int) or abs(places) > 300:
        raise ToolError("round takes a number and how many places, a whole number.")
    return round(value, places) if places else round(value)


def _sqrt(value: Number) -> Number:
    if not isinstance(value, float) and value >= 0:
        exact = Fraction(value)
        parts = math.isqrt(exact.numerator), math.isqrt(exact.denominator)
        if parts[0] ** 2 == exact.numerator and parts[1] ** 2 == exact.denominator:
            return Fraction(*parts)
    return math.sqrt(value)


def _whole(function: Callable[..., int]) -> Callable[..., Number]:
    def of(*values: Number) -> Number:
        if not values or not all(isinstance(value, int) for value in values):
            raise ToolError(f"{function.__name__} takes whole numbers.")
        return function(*values)

    return of


_CONSTANTS: Mapping[str, Number] = {"pi": math.pi, "e": math.e, "tau": math.tau}
_OPERATORS: Mapping[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: lambda left, right: left + right,
    ast.Sub: lambda left, right: left - right,
    ast.Mult: lambda left, right: left * right,
    ast.Div: _divide,
    ast.FloorDiv: lambda left, right: left // right,
    ast.Mod: lambda left, right: left % right,
    ast.Pow: _power,
}
_FUNCTIONS: Mapping[str, Callable[..., Number]] = {
    "abs": abs,
    "round": _round,
    "floor": math.floor,
    "ceil": math.ceil,
    "min": lambda *values: min(values),
    "max": lambda *values: max(values),
    "sum": lambda *values: sum(values),
    "sqrt": _sqrt,
    "exp": math.exp,
    "ln": math.log,
    "log": math.log,
    "log2": math.log2,
    "log10": math.log10,
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
    "asin": math.asin,
    "acos": math.acos,
    "atan": math.atan,
    "sinh": math.sinh,
    "cosh": math.cosh,
    "tanh": math.tanh,
    "degrees": math.degrees,
    "radians": math.radians,
    "factorial": _factorial,
    "comb": _comb,
    "gcd": _whole(math.gcd),
    "lcm": _whole(math.lcm),
}


def calculator() -> Tool:
    """The calculator as a tool."""

    def calculator(
        expression: Annotated[str, "such as (3 + 4) * 2^10 / sqrt(2)"],
    ) -> str:
        """Work out an arithmetic expression. Knows + - * / // % ^, brackets, pi, e, sqrt, log, sin and the like."""
        return calculate(expression)

    return tool(calculator)
