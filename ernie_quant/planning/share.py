"""Which files of a plan are whose, where several processes write it that know nothing of each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ernie_quant.errors import PlanError
from ernie_quant.planning.steps import Plan, Shard


@dataclass(frozen=True)
class Share:
    """Share `index`, from 0 on, of `of`."""

    index: int
    of: int

    def __str__(self) -> str:
        return f"share {self.index} of {self.of}"

    def files(self, plan: Plan) -> list[Shard]:
        """Those that this share writes."""
        return shares(plan.shards, self.of)[self.index]


def shares(shards: Sequence[Shard], of: int) -> list[list[Shard]]:
    """Files that follow each other stay together, as they are often made from the same file of the source; the largest
    share, in bytes of the source, is as small as it can be then."""
    least, most = max((shard.nbytes_in for shard in shards), default=0), sum(shard.nbytes_in for shard in shards)
    while least < most:
        middle = (least + most) // 2
        least, most = (least, middle) if len(_filled(shards, middle)) <= of else (middle + 1, most)
    found = _filled(shards, least)
    return [*found, *([] for _ in range(of - len(found)))]


def _filled(shards: Sequence[Shard], room: int) -> list[list[Shard]]:
    """As few shares as there can be with so many bytes in each."""
    found: list[list[Shard]] = []
    left = 0
    for shard in shards:
        if not found or shard.nbytes_in > left:
            found.append([])
            left = room
        found[-1].append(shard)
        left -= shard.nbytes_in
    return found


def check_sharing(plan: Plan, tp: int = 1) -> None:
    """Can its files be written by processes that do not wait for each other? Raises PlanError."""
    if plan.calibration is not None:
        why = "a calibrated model is made layer after layer by one process; leave --shard-index out"
    elif tp > 1:
        why = f"--tp {tp} quantizes once for all ranks; write it without --tp, merge, then reshard --tp {tp}"
    elif any(shard.after for shard in plan.shards):
        why = "its files are written one after the other; leave --shard-index out"
    else:
        return
    raise PlanError(f"{plan.origin.folder}: cannot be written in shares: {why}", [])
