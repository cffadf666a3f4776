"""The k largest logits of each row, ties to the lower id: a sorted list that merges tile by tile."""

from __future__ import annotations

import torch
from torch import Tensor

NOTHING = -2139095041 << 32  # the key of -inf at the highest id


class TopList:
    """The k largest entries of R rows seen so far, with what another matrix holds at the same places.

    Entries are ordered by one int64 key, the value's bits above the inverted id, so that no two are equal and the
    result does not depend on how a library breaks ties.
    """

    def __init__(self, n_rows: int, k: int, device: torch.device) -> None:
        self.k = k
        self.keys = torch.empty(n_rows, 0, dtype=torch.int64, device=device)
        self.payload = torch.empty(n_rows, 0, device=device)

    def update(self, x: Tensor, payload: Tensor | None, v0: int) -> None:
        """Takes in columns v0 onwards of the rows: x (R, C) fp32, payload likewise or None."""
        bits = (x + 0.0).view(torch.int32)  # + 0.0: -0 and 0 are one value
        ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        ids = torch.arange(v0, v0 + x.shape[1], device=x.device)
        keys = (ordered.to(torch.int64) << 32) | (0xFFFFFFFF - ids)
        keys, places = keys.topk(min(self.k, x.shape[1]), dim=1)
        self.keys, order = torch.cat([self.keys, keys], 1).sort(1, descending=True)
        self.keys = self.keys[:, : self.k]
        if payload is not None:
            both = torch.cat([self.payload, payload.gather(1, places)], 1)
            self.payload = both.gather(1, order[:, : self.k])

    def state(self) -> dict[str, Tensor]:
        """Keys and payload in exactly k columns, so that states have the same shape whatever was taken in."""
        room = (0, self.k - self.keys.shape[1])
        state = {"keys": torch.nn.functional.pad(self.keys, room, value=NOTHING)}
        return state | ({"payload": torch.nn.functional.pad(self.payload, room)} if self.payload.shape[1] else {})

    def merge(self, states: list[dict[str, Tensor]]) -> None:
        """Becomes the list of what all the states have taken in, which had different ids."""
        self.keys, order = torch.cat([state["keys"] for state in states], 1).sort(1, descending=True)
        self.keys = self.keys[:, : self.k]
        if "payload" in states[0]:
            self.payload = torch.cat([state["payload"] for state in states], 1).gather(1, order[:, : self.k])

    @property
    def ids(self) -> Tensor:
        """(R, at most k) int64, best first."""
        return 0xFFFFFFFF - (self.keys & 0xFFFFFFFF)

    @property
    def values(self) -> Tensor:
        """(R, at most k) fp32, descending."""
        ordered = (self.keys >> 32).to(torch.int32)
        return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
