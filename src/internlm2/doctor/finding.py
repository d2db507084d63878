"""A finding, and the table of them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

Level = Literal["ok", "note", "wrong"]
_MARKS: dict[Level, str] = {"ok": "ok   ", "note": "note ", "wrong": "WRONG"}


@dataclass(frozen=True)
class Finding:
    """check: what was looked at. text: what was found. remedy: what to do, empty when there is nothing to do."""

    check: str
    level: Level
    text: str
    remedy: str = ""

    def as_json(self) -> dict[str, str]:
        """For programs."""
        return asdict(self)


def as_text(findings: Sequence[Finding]) -> str:
    """A table for people, with a last line that sums it up."""
    width = max(len(f.check) for f in findings)
    lines = []
    for finding in findings:
        lines.append(f"{_MARKS[finding.level]}  {finding.check:<{width}}  {finding.text}")
        if finding.remedy:
            lines.append(f"{'':<{width + 9}}-> {finding.remedy}")
    num_wrong = sum(f.level == "wrong" for f in findings)
    lines.append("")
    lines.append(f"{num_wrong} wrong." if num_wrong else "Nothing is wrong.")
    return "\n".join(lines)
