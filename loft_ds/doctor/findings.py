"""A line of the doctor's table, and how it names the ranks and nodes that differ or failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

GB = 1e9


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        check: what was looked at.
        found: what was seen; where it is not well, on which node.
        well: False fails the doctor, None is a remark.
    """

    check: str
    found: str
    well: bool | None = True


def where(ranks: Sequence[int], nodes: Sequence[str]) -> str:
    """``node1 (rank 4, 5)``: a node with those of the given ranks that run on it."""
    on: dict[str, list[str]] = {}
    for rank in ranks:
        on.setdefault(nodes[rank], []).append(str(rank))
    return ", ".join(f"{node} (rank {', '.join(ranks)})" for node, ranks in on.items())


def compare(check: str, values: Mapping[int, str], nodes: Sequence[str]) -> Finding:
    """What all of these ranks have, or what most have and who differs."""
    usual = Counter(values.values()).most_common(1)[0][0]
    others = {rank: value for rank, value in values.items() if value != usual}
    differing = [f"{value} on {where([r for r, v in others.items() if v == value], nodes)}" for value in _once(others)]
    return Finding(check, "; ".join([usual, *differing]), not others)


def errors_of(errors: Sequence[str | None], nodes: Sequence[str]) -> str:
    """Each error of a rank once, with where it happened."""
    found = {rank: error for rank, error in enumerate(errors) if error}
    return "; ".join(f"{e}, on {where([r for r, f in found.items() if f == e], nodes)}" for e in _once(found))


def _once(values: Mapping[int, str]) -> list[str]:
    return list(dict.fromkeys(values.values()))


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
