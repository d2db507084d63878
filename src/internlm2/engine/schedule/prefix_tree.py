"""The tree of full pages that sequences may share, and which of them is the next to leave a memory."""

import heapq
import itertools
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(eq=False, slots=True)
class Node:
    """A full page in the prefix tree. Its place in the tree is its prefix; `key` holds its own tokens.

    A root has no parent and no page; its key is a namespace. page: where the node lies on the device, or None; then
    host_page is where it lies in host memory. The parent of what lies on the device lies there too. num_holders:
    sequences that use it now. num_children_here: children on the device. is_ready: its keys and values are computed;
    until then one sequence alone holds it, whose priority is noted here.

    A context of 200,000 tokens has 12,500 nodes, nearly all with one child; so that child needs no dictionary.
    """

    parent: "Node | None"
    key: object
    page: int | None = None
    host_page: int | None = None
    _children: "Node | dict[object, Node] | None" = None
    num_holders: int = 0
    num_children_here: int = 0
    is_ready: bool = False
    priority: int = 0
    last_used: int = 0

    @property
    def children(self) -> "list[Node]":
        """The nodes that go on from here."""
        if isinstance(self._children, dict):
            return list(self._children.values())
        return [] if self._children is None else [self._children]

    def child(self, key: object) -> "Node | None":
        """The node that goes on with `key`."""
        if isinstance(self._children, dict):
            return self._children.get(key)
        return self._children if self._children is not None and self._children.key == key else None

    def add_child(self, node: "Node") -> None:
        """Enter a node whose key is new here."""
        if isinstance(self._children, dict):
            self._children[node.key] = node
        elif self._children is None:
            self._children = node
        else:
            self._children = {self._children.key: self._children, node.key: node}

    def remove_child(self, node: "Node") -> None:
        """Take out a node that was entered."""
        if isinstance(self._children, dict):
            del self._children[node.key]
        else:
            assert self._children is node
        if not isinstance(self._children, dict) or not self._children:
            self._children = None

    @property
    def is_gone(self) -> bool:
        """Whether it was taken out of the tree."""
        return self.page is None and self.host_page is None

    @property
    def may_leave_device(self) -> bool:
        """Whether it lies on the device, nobody holds it and nothing there depends on it."""
        return self.page is not None and self.num_holders == 0 and self.num_children_here == 0

    @property
    def may_leave_host(self) -> bool:
        """Whether it lies in host memory and nothing depends on it."""
        return self.host_page is not None and self._children is None


class PrefixTree:
    """All nodes by namespace and tokens. It knows nothing of memory."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self._roots: dict[object, Node] = {}

    def key(self, tokens: Sequence[int], index: int) -> bytes:
        """The tokens of page `index`, packed: half the memory of a tuple."""
        return array("i", tokens[index * self.page_size : (index + 1) * self.page_size]).tobytes()

    def root(self, namespace: object) -> Node:
        """Where a namespace begins. A new one must be given a child at once."""
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = Node(None, namespace)
        return root

    def find(self, tokens: Sequence[int], namespace: object, limit: int, trail: list[Node]) -> Node | None:
        """Make `trail` the ready nodes along `tokens[:limit]`; returns the next node if it is still being computed.

        trail: empty, or what an earlier call left for the same tokens.
        """
        while trail and trail[-1].is_gone:
            trail.pop()
        node = trail[-1] if trail else self._roots.get(namespace)
        for index in range(len(trail), limit // self.page_size):
            node = None if node is None else node.child(self.key(tokens, index))
            if node is None:
                break
            if not node.is_ready:
                return node
            trail.append(node)
        return None

    def insert(self, parent: Node, key: object) -> Node:
        """A new leaf."""
        node = Node(parent, key)
        parent.add_child(node)
        return node

    def remove(self, node: Node) -> None:
        """Take a leaf out."""
        assert not node.children
        assert node.parent is not None
        node.parent.remove_child(node)
        if node.parent.parent is None and not node.parent.children:
            del self._roots[node.parent.key]

    def __iter__(self) -> Iterator[Node]:
        """Every node but the roots, parents before children."""
        nodes = [child for root in self._roots.values() for child in root.children]
        for node in nodes:
            nodes += node.children
            yield node


class LeaveQueue:
    """Nodes that may leave a memory, least recently used first.

    may_leave: says so of a node. Who becomes one of them is pushed; who no longer is one is found out when its turn
    comes, so holding a node again costs nothing.
    """

    def __init__(self, may_leave: Callable[[Node], bool]) -> None:
        self._may_leave = may_leave
        self._heap: list[tuple[int, int, Node]] = []
        self._pushes = itertools.count()  # so that nodes are never compared; equally old ones go in order
        self._tidy_at = 1000

    def push(self, node: Node) -> None:
        """Enter a node that may leave."""
        heapq.heappush(self._heap, (node.last_used, next(self._pushes), node))
        if len(self._heap) > self._tidy_at:
            self._tidy()

    def first(self) -> Node | None:
        """The one to leave next; it stays in the queue until it may no longer leave."""
        while self._heap:
            if self._is_valid(self._heap[0]):
                return self._heap[0][2]
            heapq.heappop(self._heap)
        return None

    def __iter__(self) -> Iterator[Node]:
        """Every node that may leave, in no order."""
        return iter({id(entry[2]): entry[2] for entry in self._heap if self._is_valid(entry)}.values())

    def __len__(self) -> int:
        """Entries, outdated ones included."""
        return len(self._heap)

    def _is_valid(self, entry: tuple[int, int, Node]) -> bool:
        return entry[2].last_used == entry[0] and self._may_leave(entry[2])

    def _tidy(self) -> None:
        """Drop outdated entries, and wait until there may be as many again."""
        last = {id(entry[2]): entry for entry in self._heap if self._is_valid(entry)}
        self._heap = sorted(last.values())
        self._tidy_at = 2 * len(self._heap) + 1000
