"""The store of a node, in memory: the same families and keys, and a ledger block all written or not at all."""

from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

from node.store import Store, _check_order
from node.store_layout import _FAMILIES, BlockWrite, Head, fill_batch


class _Batch:
    """Takes what ``fill_batch`` puts; a family's handle is the family."""

    def put(self, key: bytes, value: bytes, handle: dict[bytes, bytes]) -> None:
        handle[key] = value

    def delete(self, key: bytes, handle: dict[bytes, bytes]) -> None:
        handle.pop(key, None)


class MemoryStore(Store):
    """What survives a crash of its host."""

    def __init__(self) -> None:
        self._directory = Path("memory")
        self._families: dict[str, dict[bytes, bytes]] = {name: {} for name in _FAMILIES}
        self._head: Head | None = None
        self._history = None
        self._failure = None

    def commit(self, blocks: Sequence[BlockWrite]) -> None:
        head = self._head
        for block in blocks:
            _check_order(head, block)
            head = Head(block.height, block.digest, block.log_size, block.frontier)
        for block in blocks:
            fill_batch(_Batch(), block, self._families)
        self._head = head

    def _get(self, family: str, key: bytes) -> bytes | None:
        return self._families[family].get(key)

    def _page(self, family: str, start: bytes, prefix: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        held = self._families[family]
        keys = sorted(held)
        at = bisect_left(keys, start)
        return [(key, held[key]) for key in keys[at : at + limit] if key.startswith(prefix)]
