"""At which rank a campaign sketches each tensor: its ``sketch_rank``, or more where it says so for a parameter block.

A hyperparameter ``sketch_rank.BLOCK`` says so. A lower one than the campaign's does not count: ``sketch_rank`` is the
least there is of any block, and what a policy's ``least_sketch_rank`` is held to (``admission.py``). Whoever writes
sketches, replays them or reads them takes ranks from here.
"""

import re
from typing import Final

from consensus import portions as p
from consensus.rejection import Reason, Rejected

SKETCH_RANK_OF: Final = "sketch_rank."

_RANK: Final = re.compile("[1-9][0-9]?", re.ASCII)


def sketch_ranks(campaign: p.Campaign) -> dict[str, int]:
    """Ranks by tensor, or piece, of the parameter table; empty where the campaign keeps no sketches.

    Raises:
        Rejected: ``BAD_FIELD`` for a hyperparameter that is no rank from 1 to 64.
    """
    if not campaign.sketch_rank:
        return {}
    stated: dict[str, int] = {}
    for setting in campaign.hyperparameters:
        block = setting.name.removeprefix(SKETCH_RANK_OF)
        if block == setting.name:
            continue
        if not _RANK.fullmatch(setting.value) or int(setting.value) > p.MAX_SKETCH_RANK:
            raise Rejected(
                Reason.BAD_FIELD,
                f"{setting.name!a}: expected a rank from 1 to {p.MAX_SKETCH_RANK}, found {setting.value!a:.20}",
            )
        stated[block] = int(setting.value)
    return {
        tensor.name: max(campaign.sketch_rank, stated.get(block.name, 0))
        for block in campaign.parameter_blocks
        for tensor in block.tensors
    }
