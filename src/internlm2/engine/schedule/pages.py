"""Who owns which page of key/value memory, and which full pages may be shared: pure bookkeeping, no tensors.

A sequence holds pages. As soon as a page is full and computed it becomes a node of the prefix tree (the idea of
RadixAttention, arXiv 2312.07104), where later sequences with the same tokens find it. Nodes that nobody holds stay
as a cache; the least recently used ones give way, to host memory when there is some, otherwise for good.
A page is shared only when it is full, so nothing shared is ever written.
"""

import bisect
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from internlm2.engine.schedule.prefix_tree import LeaveQueue, Node, PrefixTree


class Direction(Enum):
    """Where a move goes."""

    TO_HOST = "to host"
    TO_DEVICE = "to device"


@dataclass(frozen=True)
class Move:
    """Copy one page between the device and host memory; a plan's moves are done in order, before the forward."""

    direction: Direction
    page: int
    host_page: int


@dataclass(eq=False)
class Pages:
    """What one sequence holds. ids: its pages in order. nodes: the tree's nodes of the first `len(nodes)` of them.

    The pages behind those are private. num_ready: nodes known to be computed. namespace: sequences share only
    within one (adapter, rotary base).
    """

    namespace: object
    ids: list[int] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    num_ready: int = 0


class PagePool:
    """All pages of one cache.

    num_pages: on the device. page_size: tokens a page. num_host_pages: where idle pages go when the device is full.
    shares_prefixes: False keeps every page private.
    """

    def __init__(
        self, num_pages: int, *, page_size: int, num_host_pages: int = 0, shares_prefixes: bool = True
    ) -> None:
        assert num_pages > 0
        assert page_size > 0
        self.num_pages = num_pages
        self.page_size = page_size
        self.shares_prefixes = shares_prefixes
        self._moves: list[Move] = []
        self._is_free = bytearray(b"\x01" * num_pages)  # searched for runs at the speed of C
        self._num_free = num_pages
        self._cursor = 0
        self._num_idle = 0  # nodes on the device that nobody holds
        self._free_host = list(range(num_host_pages - 1, -1, -1))
        self._num_host_pages = num_host_pages
        self._tree = PrefixTree(page_size)
        self._clock = itertools.count(1)
        self._leave_device = LeaveQueue(lambda node: node.may_leave_device)
        self._leave_host = LeaveQueue(lambda node: node.may_leave_host)

    # -- what there is ------------------------------------------------------------------------------------

    @property
    def num_available(self) -> int:
        """Pages that can be had now: free ones and idle ones."""
        return self._num_free + self._num_idle

    @property
    def num_held(self) -> int:
        """Pages that sequences hold."""
        return self.num_pages - self.num_available

    def pages_for(self, num_tokens: int) -> int:
        """How many pages `num_tokens` tokens take."""
        return -(-num_tokens // self.page_size)

    def take_moves(self) -> list[Move]:
        """The copies to be done before anything is computed, in order."""
        moves, self._moves = self._moves, []
        return moves

    # -- the life of a sequence's pages -------------------------------------------------------------------

    def upcoming(
        self, tokens: Sequence[int], namespace: object, *, limit: int, trail: list[Node] | None = None
    ) -> int | None:
        """Whether a running sequence is computing the first missing page of `tokens[:limit]`: its priority, or None.

        trail: what an earlier call found for these tokens. It is brought up to date, so that a sequence that waits
        is not compared from its first token at every step.
        """
        node = self._find(tokens, namespace, limit, [] if trail is None else trail)
        return None if node is None else node.priority

    def num_taken(self, num_pages: int, trail: Sequence[Node]) -> int:
        """How many available pages a sequence of `num_pages` takes if it begins with `trail`."""
        # What others hold of its prefix costs nothing; those nodes come first, as who holds a node holds its prefix.
        return num_pages - bisect.bisect_left(trail, True, key=lambda node: node.num_holders == 0)

    def begin(
        self, tokens: Sequence[int], namespace: object, *, limit: int, trail: list[Node] | None = None
    ) -> tuple[Pages, int]:
        """Hold the cached pages of the longest known prefix of `tokens`.

        limit: use no more than so many tokens of it. trail: as for `upcoming`. Returns the pages and how many tokens
        they hold.
        """
        pages = Pages(namespace)
        trail = [] if trail is None else trail
        self._find(tokens, namespace, limit, trail)
        path = trail[: limit // self.page_size]
        now = next(self._clock)
        for node in path:  # making room for the first ones must not drop the last ones
            if node.page is None:
                node.last_used = now
                self._offer(node)
        for node in path:
            if node.page is None and not self._load(node):
                break
            assert node.page is not None
            self._hold(node)
            pages.nodes.append(node)
            pages.ids.append(node.page)
        pages.num_ready = len(pages.nodes)
        return pages, len(pages.ids) * self.page_size

    def grow(self, pages: Pages, num_pages: int, *, slack: int = 0) -> bool:
        """Make `pages` hold `num_pages`; False, and nothing changed, when there are not enough.

        slack: how many pages the sequence may want later; they are left free behind it when possible, so that its
        memory stays in one piece.
        """
        missing = num_pages - len(pages.ids)
        if missing <= 0:
            return True
        if missing > self.num_available:
            return False
        while self._num_free < missing:
            self._evict()
        pages.ids += self._take(missing, after=pages.ids[-1] if pages.ids else None, slack=slack)
        return True

    def announce(self, pages: Pages, tokens: Sequence[int], *, limit: int, priority: int = 0) -> None:
        """Enter the full pages of `tokens[:limit]` that this sequence is about to compute: others wait for them."""
        if not self.shares_prefixes:
            return
        for index in range(len(pages.nodes), min(len(pages.ids), limit // self.page_size)):
            parent = self._last_node(pages)
            key = self._tree.key(tokens, index)
            if parent.child(key) is not None:  # another sequence is at it; this one keeps its pages to itself
                return
            node = self._insert(parent, key, pages.ids[index])
            node.priority = priority
            pages.nodes.append(node)

    def store(self, pages: Pages, tokens: Sequence[int], num_computed: int) -> None:
        """Share the pages of `tokens` that are full and computed by now. num_computed: tokens computed so far."""
        if not self.shares_prefixes:
            return
        num_full = num_computed // self.page_size
        for node in pages.nodes[pages.num_ready : num_full]:
            node.is_ready = True
        pages.num_ready = max(pages.num_ready, min(num_full, len(pages.nodes)))
        for index in range(len(pages.nodes), num_full):
            parent = self._last_node(pages)
            key = self._tree.key(tokens, index)
            known = parent.child(key)
            if known is None:
                known = self._insert(parent, key, pages.ids[index])
            elif not known.is_ready:
                return  # the one who announced it will share it
            elif known.page is None:  # it lies in host memory; our copy replaces that
                self._exit_host(known)
                self._enter_device(known, pages.ids[index])
                known.num_holders = 1
            else:  # computed twice, as when two greedy answers agree: one copy is enough
                self._free(pages.ids[index])
                pages.ids[index] = known.page
                self._hold(known)
            known.is_ready = True
            pages.nodes.append(known)
            pages.num_ready += 1

    def release(self, pages: Pages) -> None:
        """Give everything back. Computed full pages stay as a cache, the others become free."""
        for page in pages.ids[len(pages.nodes) :]:
            self._free(page)
        now = next(self._clock)
        for node in reversed(pages.nodes):  # leaves first: they are the first to go
            node.num_holders -= 1
            if not node.is_ready:
                assert node.num_holders == 0
                self._remove(node)
            elif node.num_holders == 0:
                node.last_used = now
                self._num_idle += 1
                self._offer(node)
        pages.ids.clear()
        pages.nodes.clear()
        pages.num_ready = 0

    def forget(self) -> None:
        """Drop every idle page from the cache, on the device and in host memory."""
        while self._num_idle:
            self._evict(spill=False)
        while (node := self._leave_host.first()) is not None:
            self._remove(node)

    # -- inside: the tree ---------------------------------------------------------------------------------

    def _find(self, tokens: Sequence[int], namespace: object, limit: int, trail: list[Node]) -> Node | None:
        return self._tree.find(tokens, namespace, limit, trail) if self.shares_prefixes else None

    def _last_node(self, pages: Pages) -> Node:
        return pages.nodes[-1] if pages.nodes else self._tree.root(pages.namespace)

    def _insert(self, parent: Node, key: object, page: int) -> Node:
        node = self._tree.insert(parent, key)
        node.num_holders = 1
        self._enter_device(node, page)
        return node

    def _hold(self, node: Node) -> None:
        if node.num_holders == 0:
            self._num_idle -= 1
        node.num_holders += 1

    def _remove(self, node: Node) -> None:
        """Take a leaf out of the tree and out of the memory it lies in."""
        assert node.parent is not None
        self._tree.remove(node)
        if node.page is not None:
            self._exit_device(node)
        if node.host_page is not None:
            self._exit_host(node)
        self._offer(node.parent)

    def _enter_device(self, node: Node, page: int) -> None:
        assert node.parent is not None
        node.page = page
        node.parent.num_children_here += 1

    def _exit_device(self, node: Node) -> None:
        assert node.parent is not None
        assert node.page is not None
        self._free(node.page)
        node.page = None
        node.parent.num_children_here -= 1

    def _exit_host(self, node: Node) -> None:
        assert node.host_page is not None
        self._free_host.append(node.host_page)
        node.host_page = None

    # -- inside: making room ------------------------------------------------------------------------------

    def _offer(self, node: Node) -> None:
        """Queue a node that may leave the memory it lies in."""
        if node.may_leave_device:
            self._leave_device.push(node)
        elif node.may_leave_host:
            self._leave_host.push(node)

    def _evict(self, *, spill: bool = True) -> None:
        """Free the device page that was idle for longest, keeping a copy in host memory when there is room."""
        node = self._leave_device.first()
        assert node is not None
        assert node.page is not None
        self._num_idle -= 1
        if spill and self._has_host_room(node):
            node.host_page = self._free_host.pop()
            self._moves.append(Move(Direction.TO_HOST, node.page, node.host_page))
            self._exit_device(node)
            self._offer(node)
            assert node.parent is not None
            self._offer(node.parent)
            return
        branch = [node]  # what hangs below it goes too, and all of that lies in host memory
        for member in branch:
            branch += member.children
        for member in reversed(branch):
            self._remove(member)

    def _has_host_room(self, node: Node) -> bool:
        """Whether a host page is free for `node`, after dropping an older one from host memory when need be."""
        if not self._free_host:
            oldest = self._leave_host.first()
            if oldest is not None and oldest.last_used <= node.last_used:
                self._remove(oldest)
        return bool(self._free_host)

    def _load(self, node: Node) -> bool:
        """Bring a node back from host memory; False when the device has no page for it."""
        if self.num_available == 0:
            return False
        assert node.host_page is not None
        host_page = node.host_page
        node.host_page = None  # so that making room cannot drop it
        while self._num_free == 0:
            self._evict()
        [page] = self._take(1, after=None, slack=0)
        self._enter_device(node, page)
        self._num_idle += 1
        self._moves.append(Move(Direction.TO_DEVICE, page, host_page))
        self._free_host.append(host_page)
        return True

    # -- inside: free pages -------------------------------------------------------------------------------

    def _free(self, page: int) -> None:
        assert not self._is_free[page]
        self._is_free[page] = 1
        self._num_free += 1

    def _take(self, count: int, *, after: int | None, slack: int) -> list[int]:
        """`count` free pages, in one run when possible: right behind `after`, else where `slack` fits too."""
        taken: list[int] = []
        if after is not None:
            end = min(after + 1 + count, self.num_pages)
            stop = self._is_free.find(b"\x00", after + 1, end)
            taken += range(after + 1, stop if stop >= 0 else end)
        if len(taken) < count:
            self._mark(taken)
            return taken + self._take_elsewhere(count - len(taken), slack)
        self._mark(taken)
        return taken

    def _take_elsewhere(self, count: int, slack: int) -> list[int]:
        for wanted in dict.fromkeys((count + slack, count)):
            run = b"\x01" * wanted
            start = self._is_free.find(run, self._cursor)
            if start < 0:
                start = self._is_free.find(run)
            if start >= 0:
                self._cursor = start + wanted
                return self._mark(range(start, start + count))
        free = (page for page, is_free in enumerate(self._is_free) if is_free)
        return self._mark(list(itertools.islice(free, count)))

    def _mark(self, taken: Sequence[int]) -> list[int]:
        for page in taken:
            assert self._is_free[page]
            self._is_free[page] = 0
        self._num_free -= len(taken)
        return list(taken)

    # -- proof --------------------------------------------------------------------------------------------

    def check_integrity(self, holders: Iterable[Pages]) -> None:
        """Raise AssertionError unless every page is free, held or idle, once, and every count is true."""
        num_holders: dict[Node, int] = {}
        owners = [page for page in range(self.num_pages) if self._is_free[page]]
        assert len(owners) == self._num_free, "the count of free pages is wrong"
        for pages in holders:
            assert pages.num_ready <= len(pages.nodes) <= len(pages.ids), "a sequence miscounts its pages"
            owners += pages.ids[len(pages.nodes) :]
            for index, node in enumerate(pages.nodes):
                num_holders[node] = num_holders.get(node, 0) + 1
                assert node.page == pages.ids[index], "a sequence uses another page than its node"
                assert node.is_ready or index >= pages.num_ready, "an unfinished page counts as ready"
        host_pages = list(self._free_host)
        nodes = list(self._tree)
        for node in nodes:
            parent = node.parent
            assert parent is not None
            assert parent.child(node.key) is node, "a node is not where its tokens say"
            assert node.num_holders == num_holders.pop(node, 0), "a node counts its holders wrongly"
            assert node.is_ready or node.num_holders == 1, "an unfinished page is shared"
            here = sum(child.page is not None for child in node.children)
            assert here == node.num_children_here, "a node counts its children on the device wrongly"
            assert (node.page is None) != (node.host_page is None), "a node lies nowhere, or twice"
            if node.page is not None:
                owners.append(node.page)
                assert parent.parent is None or parent.page is not None, "a page is here, its prefix is not"
            if node.host_page is not None:
                host_pages.append(node.host_page)
                assert node.num_holders == 0, "a page in host memory is in use"
        assert not num_holders, "a sequence holds a node outside the tree"
        assert sorted(owners) == list(range(self.num_pages)), "a page is lost or doubled"
        assert sorted(host_pages) == list(range(self._num_host_pages)), "a host page is lost or doubled"
        idle = [node for node in nodes if node.page is not None and node.num_holders == 0]
        assert len(idle) == self._num_idle, "the count of idle pages is wrong"
        assert set(self._leave_device) == {n for n in nodes if n.may_leave_device}, "an idle page is stuck"
        assert set(self._leave_host) == {n for n in nodes if n.may_leave_host}, "a host page is stuck"
