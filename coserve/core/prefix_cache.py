"""Blocks known by what they hold.

A full block's key is a hash of (its parent's key, its tokens), and the chain starts from the digest of the
adapter that computed it: the same text under another adapter, or another version of it, never matches (I3).
Blake2b keeps keys from being forged by crafted prompts.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b


def root_key(adapter: str | None, salt: str = "") -> bytes:
    """Where a chain of block keys starts: the adapter's digest, or the base, and a request's own salt, which
    keeps its blocks to those who know it."""
    root = (adapter or "base").encode()
    return blake2b(root + b"\0" + salt.encode() if salt else root, digest_size=16).digest()


def block_key(parent: bytes, token_ids: list[int]) -> bytes:
    """Key of a full block after `parent` holding `token_ids`."""
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()


class PrefixCache:
    """Two-way map between block keys and block ids. Who may be evicted is the block pool's business."""

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._block_of)

    def lookup(self, key: bytes) -> int | None:
        """The block with this content, if any holds it."""
        return self._block_of.get(key)

    def holds(self, block: int) -> bool:
        """Whether the cache knows what is in this block."""
        return block in self._key_of

    def insert(self, key: bytes, block: int) -> bool:
        """Remember a computed block; False when another block already has this content."""
        if key in self._block_of:
            return False
        self._block_of[key] = block
        self._key_of[block] = key
        return True

    def remove(self, block: int) -> None:
        """Forget a block whose memory is given to another owner."""
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]
