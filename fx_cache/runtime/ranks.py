"""One decision for all ranks that work on a sample together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed
from torch.distributed import distributed_c10d

from fx_cache.errors import SessionError
from fx_cache.runtime.device import Readback, to_device
from fx_cache.runtime.policy import Verdict

ANOTHER = "another rank computes"


def agree(
    verdicts: Sequence[Verdict],
    samples: int,
    sums: torch.Tensor | None,
    groups: Sequence[str],
    device: torch.device,
) -> tuple[list[Verdict], list[float]]:
    """What all ranks of some groups decide, and the diff of all their parts of a probe; each of them has to call this.

    One reduction over each group and one copy to the host, at every step, whatever a rank has settled by itself: it
    cannot know what the others have.

    Args:
        verdicts: what this rank has settled: of each sample, or of all together.
        samples: their number.
        sums: of this rank's part of the probe, shape [2, samples] (`residual_sums`); None: it has not measured.
        groups: names of process groups.
        device: where the probe is.

    Returns:
        As many verdicts, and the diff of each sample; nan where a rank has not measured it.

    Raises:
        SessionError: there is no such group.
    """
    votes = [[float(v.reuse is False) for v in verdicts], [float(v.reuse is True) for v in verdicts]]
    voted = to_device(torch.tensor(votes, device="cpu").expand(2, samples), device)
    rows = torch.cat((torch.zeros(2, samples, device=device) if sums is None else sums, voted))
    for group in groups:
        distributed.all_reduce(rows, group=_resolve(group))
    numbers = Readback([rows]).take()
    moved, sizes, against, sure = (numbers[i : i + samples] for i in range(0, 4 * samples, samples))
    settled: list[Verdict] = []
    for verdict, no, yes in zip(verdicts, against, sure, strict=False):
        if no:
            settled.append(verdict if verdict.reuse is False else Verdict(False, ANOTHER))
        else:
            settled.append(Verdict(True) if yes else Verdict(None))
    return settled, [m / size if size else float("nan") for m, size in zip(moved, sizes, strict=True)]


def _resolve(name: Any) -> distributed.ProcessGroup:
    try:
        return distributed_c10d._resolve_process_group(name)
    except (RuntimeError, ValueError, KeyError) as error:
        raise SessionError(
            f"process group {name!r}: got {str(error) or 'none of this name'}; expected the group whose ranks work on "
            "a sample together, since they decide together; make it before the model runs, or compile the model again."
        ) from error
