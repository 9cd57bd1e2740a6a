"""What to add to a weight so that its layer's output comes nearer to a target: ridge regression, judged by other tokens.

For inputs z [n, in], residuals r [n, out] and token weights w [n], with H = z' W z and C = r' W z, the change that
minimizes sum w |r - z D'|^2 + strength * mu |D|^2 (mu the mean of H's diagonal) is D = C (H + strength mu I)^-1. The strength
is chosen by tokens that took no part in the fit, "no change" among the choices: judged by the tokens it was fitted to, a fit
always helps, and may do harm elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
ROWS_JUDGED = 256  # outputs that strengths are judged on; every so many-th where there are more


@dataclass
class Sample:
    """Tokens to judge by: inputs [n, in], residuals [n, out], weights [n]."""

    inputs: torch.Tensor
    residual: torch.Tensor
    weight: torch.Tensor

    def loss(self, change: torch.Tensor | None = None, rows: slice = slice(None)) -> float:
        """sum w |r - z D'|^2 over some of the outputs."""
        left = self.residual[:, rows]
        if change is not None:
            left = left - self.inputs @ change.T
        return float((left.pow(2).sum(1) * self.weight).sum())


@dataclass
class Seen:
    """What a projection was seen to be given, and what its output lacks: sums over tokens to fit to, and tokens to judge by."""

    hessian: torch.Tensor  # H [in, in], a sum over `tokens`
    cross: torch.Tensor | None  # C [out, in]; None where nothing is to be corrected
    tokens: int = 0
    judged: list[Sample] = field(default_factory=list)

    @staticmethod
    def nothing(width: int, out: int = 0) -> Seen:
        """Of no tokens; `out` 0 where nothing is to be corrected."""
        import torch

        return Seen(torch.zeros(width, width), torch.zeros(out, width) if out else None)

    def add(self, inputs: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, fit: int) -> None:
        """More tokens: inputs [n, in], residuals [n, out], weights [n]. The first `fit` are to fit to, the others to judge by."""
        import torch

        heavy = inputs[:fit] * weight[:fit, None]
        self.hessian.addmm_(inputs[:fit].T, heavy)
        if self.cross is not None and residual is not None:
            self.cross.addmm_(residual[:fit].T, heavy)
        self.tokens += fit
        if fit < len(inputs):
            left = torch.zeros(len(inputs) - fit, 0) if residual is None else residual[fit:]
            self.judged.append(Sample(inputs[fit:].clone(), left, weight[fit:]))

    @property
    def sample(self) -> Sample:
        """All tokens for judging."""
        import torch

        if not self.judged:
            return Sample(torch.zeros(0, len(self.hessian)), torch.zeros(0, 0), torch.zeros(0))
        if len(self.judged) > 1:
            fields = ("inputs", "residual", "weight")
            self.judged = [Sample(*(torch.cat([getattr(part, key) for part in self.judged]) for key in fields))]
        return self.judged[0]


def fitted(seen: Seen) -> torch.Tensor | None:
    """The change [out, in] whose strength does best on the tokens for judging; None where no change does better."""
    import torch

    assert seen.cross is not None
    mu, sample = float(seen.hessian.diagonal().mean()), seen.sample
    if not mu > 0 or not len(sample.weight):
        return None
    rows = slice(None, None, -(-len(seen.cross) // ROWS_JUDGED))
    best, chosen = sample.loss(rows=rows), None
    for strength in STRENGTHS:
        damped = seen.hessian.clone()
        damped.diagonal().add_(strength * mu)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        change = torch.cholesky_solve(seen.cross[rows].T, factor).T
        if (loss := sample.loss(change, rows)) < best:
            best, chosen = loss, factor
    return None if chosen is None else torch.cholesky_solve(seen.cross.T, chosen).T.contiguous()
