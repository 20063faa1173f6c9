"""Work on all cores: for each a thread of Python, in which PyTorch keeps to one thread of its own.

What a trace does is many products of small matrices. Split among PyTorch's threads one product gains little, loses
much where other programs use the cores, and leaves them idle in between; whole pieces of work side by side do not.
What comes out does not depend on how many cores there are.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def each_on_a_core(work: Callable[[T], R], pieces: Iterable[T]) -> Iterator[R]:
    """What ``work`` makes of each piece, in order; at a time as many are in hand as PyTorch has threads, and one more.

    ``work`` records no gradients. What it raises is raised where its result would stand.
    """
    cores = torch.get_num_threads()
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for piece in pieces:
                waiting.append(pool.submit(torch.no_grad()(work), piece))
                if len(waiting) > cores:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for unfinished in waiting:
                unfinished.cancel()
            # The initializer changed what threads to come start with, not this one.
            torch.set_num_threads(cores)
