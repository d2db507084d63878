r"""The value of a LaTeX formula, by a small parser: numbers, `\frac`, `\sqrt`, powers, products, sums, pi, i, letters.

It knows no functions with names and no algebra; what it does not know has no value.
"""

import cmath
import re

MAX_DEPTH = 40
_TOKEN = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+|\\[a-zA-Z]+|\\.|.)", re.DOTALL)
_TIMES = ("*", "\\cdot", "\\times")
_OVER = ("/", "\\div")
_CLOSING = {"(": ")", "[": "]", "{": "}"}


class _NoValueError(Exception):
    pass


def evaluate(text: str, *, letters_near: float) -> complex | None:
    """The value with every letter set to a number of its own near `letters_near`; None where there is none."""
    parser = _Parser(_TOKEN.findall(text.strip()), letters_near)
    try:
        value = parser.sum()
        return value if parser.is_done else None
    except (_NoValueError, ArithmeticError, ValueError):
        return None


class _Parser:
    def __init__(self, tokens: list[str], letters_near: float) -> None:
        self._tokens, self._place, self._depth = tokens, 0, 0
        self._letters_near = letters_near

    @property
    def is_done(self) -> bool:
        return self._place == len(self._tokens)

    def _peek(self) -> str:
        return "" if self.is_done else self._tokens[self._place]

    def _take(self, *wanted: str) -> str:
        token = self._peek()
        if wanted and token not in wanted:
            return ""
        self._place += 1
        return token

    def sum(self) -> complex:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _NoValueError
        value = self._product()
        while sign := self._take("+", "-"):
            part = self._product()
            value = value + part if sign == "+" else value - part
        self._depth -= 1
        return value

    def _product(self) -> complex:
        num_signs = 0
        while sign := self._take("+", "-"):
            num_signs += sign == "-"
        value = self._power()
        while not self.is_done:
            if self._take(*_TIMES):
                value *= self._signed()
            elif self._take(*_OVER):
                value /= self._signed()
            elif self._peek() == "\\frac" and self._is_whole_before():
                value += self._power()  # a mixed number, such as 3\frac{1}{2}
            elif self._is_atom():
                value *= self._power()
            else:
                break
        return -value if num_signs % 2 else value

    def _signed(self) -> complex:
        return -self._power() if self._take("-") else self._power()

    def _is_whole_before(self) -> bool:
        before = self._tokens[self._place - 1]
        rest = "".join(self._tokens[self._place : self._place + 7])
        return before.isdigit() and re.match(r"\\frac\{\d+\}\{\d+\}", rest) is not None

    def _is_atom(self) -> bool:
        token = self._peek()
        return (
            token in ("(", "[", "{", "\\frac", "\\sqrt", "\\pi") or token[:1].isalpha() or token[:1].isdigit()
        )

    def _power(self) -> complex:
        value = self._atom()
        if self._take("^"):
            exponent = self._argument()
            if abs(exponent) > 1000:
                raise _NoValueError
            value = value**exponent
        return value

    def _argument(self) -> complex:
        """A group in braces, or the next single sign: of `\\frac12` the 1."""
        if self._peek()[:1].isdigit():
            digits = self._take()
            if len(digits) > 1:
                self._place -= 1
                self._tokens[self._place] = digits[1:]
            return complex(float(digits[0]))
        return self._atom()

    def _atom(self) -> complex:
        token = self._take()
        if token[:1].isdigit() or token.startswith("."):
            return complex(float(token))
        if token in _CLOSING:
            value = self.sum()
            if not self._take(_CLOSING[token]):
                raise _NoValueError
            return value
        if token == "\\frac":
            above = self._argument()
            return above / self._argument()
        return self._root() if token == "\\sqrt" else self._constant(token)

    def _root(self) -> complex:
        degree: complex = 2
        if self._take("["):
            degree = self.sum()
            if not self._take("]"):
                raise _NoValueError
        return self._argument() ** (1 / degree)

    def _constant(self, token: str) -> complex:
        if token in ("\\pi", "π"):
            return complex(cmath.pi)
        if token == "i":
            return 1j
        if len(token) == 1 and token.isascii() and token.isalpha():
            return complex(self._letters_near + (ord(token) - ord("A")) / 89)
        raise _NoValueError
