"""torch's global random states, taken and put back around what is tried out on a model."""

import torch
from torch import Tensor


def random_states() -> list[Tensor]:
    """The CPU's, then each CUDA device's."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ())]


def set_random_states(states: list[Tensor]) -> None:
    """Puts back what ``random_states`` found."""
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state_all(states[1:])
