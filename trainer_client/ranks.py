"""The processes of one job: which of them this is, and how they agree.

Data-parallel training runs one process, a *rank*, for each device; every one takes its part of every step. The first
keeps the campaign's record and talks to the node. What it learns there the others are told (``by_first``), so that all
make the same decisions in the same order: whoever waits for another rank that went another way waits for ever.

Messages go over a gloo group of their own, whatever the gradients use, and may be waited for as long as a run may wait
for a grant. A rank that dies ends the others' waiting with an error.
"""

import pickle
from collections.abc import Callable, Hashable, Mapping, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from consensus.rejection import CountersignError

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

LONGEST_WAIT = timedelta(days=30)
"""For the first rank, which may have to wait for a grant."""


class RankFailed(CountersignError):
    """Another rank of the job failed where all had to succeed."""


class Ranks:
    """This process among those of its job; alone where there is no process group.

    Args:
        size: how many there are, numbered from 0; ``group`` connects them where there are several.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: dist.ProcessGroup | None = None) -> None:
        self.rank = rank
        self.size = size
        self._group = group

    @classmethod
    def of_job(cls) -> "Ranks":
        """Those of torch's default process group; every one of them must ask."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        group = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
        return cls(dist.get_rank(), dist.get_world_size(), group)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that keeps the record."""
        return self.rank == 0

    def by_first(self, call: Callable[[], T]) -> T:
        """What ``call`` gives on the first rank, or raises there, on every rank; it runs there alone.

        Whatever ``call`` does, it must not talk to other ranks itself.
        """
        if self.size == 1:
            return call()
        if not self.is_first:
            (told,) = self._broadcast([None])
            if isinstance(told, BaseException):
                raise told
            return told[0]  # type: ignore[no-any-return, index]
        try:
            result = call()
        except Exception as error:
            self._broadcast([_picklable(error)])
            raise
        self._broadcast([(result,)])
        return result

    def together(self, call: Callable[[], T]) -> T:
        """What ``call`` gives here, once it succeeded on every rank.

        Raises:
            RankFailed: it failed on another; where it failed here, what it raised.
        """
        if self.size == 1:
            return call()
        result: list[T] = []
        failure: Exception | None = None
        try:
            result.append(call())
        except Exception as error:
            failure = error
        failures = self.gathered(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, text in enumerate(failures):
            if text is not None:
                raise RankFailed(f"rank {rank}: {text}")
        return result[0]

    def gathered(self, own: T) -> list[T]:
        """What every rank gave, in order of rank."""
        if self.size == 1:
            return [own]
        held: list[T | None] = [None] * self.size
        dist.all_gather_object(held, own, group=self._group)
        return held  # type: ignore[return-value]

    def gathered_by_first(self, own: T) -> list[T]:
        """On the first rank what every rank gave, in order of rank; nothing elsewhere."""
        if self.size == 1:
            return [own]
        held: list[T | None] | None = [None] * self.size if self.is_first else None
        dist.gather_object(own, held, dst=0, group=self._group)
        return held or []  # type: ignore[return-value]

    def share_of(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part: neighbours, as many as the others have or one more or less."""
        first, end = (len(items) * number // self.size for number in (self.rank, self.rank + 1))
        return items[first:end]

    def largest_share(self, count: int) -> int:
        """How many of ``count`` items the rank with most of them has."""
        return -(-count // self.size)

    def micro_batches(self, items: Sequence[T], size: int) -> tuple[tuple[T, ...], ...]:
        """This rank's part of a step's items, ``size`` at a time; empty ones at the end where another rank has more."""
        own, count = self.share_of(items), -(-self.largest_share(len(items)) // size)
        return tuple(tuple(own[number * size : (number + 1) * size]) for number in range(count))

    def summed_by_first(self, tensors: Mapping[K, Tensor]) -> dict[K, Tensor]:
        """On the first rank the sums over all ranks of tensors in main memory, in order of rank; nothing elsewhere.

        A rank may lack some of them; those of one key have one shape and dtype.
        """
        if self.size == 1:
            return dict(tensors)
        kinds: dict[K, tuple[torch.Size, torch.dtype]] = {}
        for described in self.gathered({key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}):
            kinds |= described
        sums: dict[K, Tensor] = {}
        for key in sorted(kinds):  # type: ignore[type-var]
            shape, dtype = kinds[key]
            held = tensors[key].clone() if key in tensors else torch.zeros(shape, dtype=dtype)
            dist.reduce(held, dst=0, group=self._group)
            if self.is_first:
                sums[key] = held
        return sums

    def close(self) -> None:
        """Ends the group of messages; torch's own stays."""
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
            self._group = None

    def _broadcast(self, told: list[object]) -> list[object]:
        dist.broadcast_object_list(told, src=0, group=self._group)
        return told


ALONE = Ranks()
"""A job of one process."""


def _picklable(error: Exception) -> Exception:
    """The error itself, or what can be said of one that does not survive being sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RankFailed(f"the first rank: {type(error).__name__}: {error}")
    return error
