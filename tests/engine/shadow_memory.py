"""What the pages of a cache would hold: an oracle for the pool and the scheduler that knows neither.

A slot of a page holds (namespace, all tokens up to and including it, how it was computed), which is all that its keys
and values depend on. `how` is None where it does not matter.
"""

from array import array
from collections.abc import Callable, Iterable, Sequence

from internlm2.engine.schedule.pages import Direction, Move, PagePool, Pages
from internlm2.engine.schedule.prefix_tree import Node

How = tuple[int, int] | None
HowOf = Callable[[int], How]


class ShadowMemory:
    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.device: dict[int, dict[int, object]] = {}
        self.host: dict[int, dict[int, object]] = {}

    def copy(self) -> "ShadowMemory":
        other = ShadowMemory(self.page_size)
        other.device = {page: dict(slots) for page, slots in self.device.items()}
        other.host = {page: dict(slots) for page, slots in self.host.items()}
        return other

    def clear(self) -> None:
        self.device.clear()
        self.host.clear()

    def move(self, moves: Iterable[Move]) -> None:
        for move in moves:
            if move.direction is Direction.TO_HOST:
                self.host[move.host_page] = dict(self.device[move.page])
            else:
                self.device[move.page] = dict(self.host[move.host_page])

    def write(self, pages: Pages, tokens: Sequence[int], first: int, *, how: How = None) -> None:
        """Compute tokens[first:]."""
        for position in range(first, len(tokens)):
            page = pages.ids[position // self.page_size]
            slots = self.device.setdefault(page, {})
            slots[position % self.page_size] = (pages.namespace, tuple(tokens[: position + 1]), how)

    def check(self, pages: Pages, tokens: Sequence[int], *, how: HowOf = lambda _: None) -> None:
        """Every one of `tokens` lies in the sequence's pages, computed after the same prefix."""
        for position in range(len(tokens)):
            slots = self.device[pages.ids[position // self.page_size]]
            expected = (pages.namespace, tuple(tokens[: position + 1]), how(position))
            assert slots[position % self.page_size] == expected, "a sequence reads what is not its own"

    def check_cache(self, pool: PagePool, *, how: HowOf = lambda _: None) -> None:
        """Every ready node lies where the tree says, in either memory."""
        prefixes: dict[Node, tuple[object, tuple[int, ...]]] = {}
        for node in pool._tree:
            assert node.parent is not None
            namespace, prefix = prefixes.get(node.parent, (node.parent.key, ()))
            assert isinstance(node.key, bytes)
            prefixes[node] = namespace, prefix + tuple(array("i", node.key))
            if not node.is_ready:
                continue
            assert node.parent.parent is None or node.parent.is_ready
            slots = self.host[node.host_page] if node.page is None else self.device[node.page]
            for offset in range(self.page_size):
                position = len(prefix) + offset
                expected = (namespace, prefixes[node][1][: position + 1], how(position))
                assert slots[offset] == expected, "the cache lies about a page"


def shared_pages(pool: PagePool) -> set[int]:
    """Pages on the device that others may find; nobody may write them."""
    return {node.page for node in pool._tree if node.is_ready and node.page is not None}
