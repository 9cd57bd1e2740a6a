"""Ridge regression from moments: what to add to a weight so that its layer's output comes nearer to a target.

For inputs z [n, in], residuals r [n, out] and token weights w [n], with H = z' W z and C = r' W z, the change that
minimizes sum w |r - z D'|^2 + strength * mu |D|^2 (mu the mean of H's diagonal) is D = C (H + strength mu I)^-1. The strength
is chosen by tokens that took no part in the fit, "no change" among the choices: judged by the tokens it was fitted to, a fit
always helps, and may do harm elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
ROWS_JUDGED = 1024  # outputs that strengths are judged on; every so many-th where there are more


@dataclass
class Moments:
    """Sums over tokens, to which more tokens are added."""

    inputs: torch.Tensor  # H [in, in]
    cross: torch.Tensor  # C [out, in]

    @staticmethod
    def zero(out: int, width: int) -> Moments:
        """Of no tokens."""
        import torch

        return Moments(torch.zeros(width, width), torch.zeros(out, width))

    def add(self, inputs: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> None:
        """Of inputs [n, in], residuals [n, out] and weights [n]."""
        heavy = inputs * weight[:, None]
        self.inputs.addmm_(inputs.T, heavy)
        self.cross.addmm_(residual.T, heavy)


def loss_change(change: torch.Tensor, judge: Moments, rows: slice = slice(None)) -> float:
    """How a change D [out, in] alters sum w |r - z D'|^2: tr(D H D') - 2 tr(D C')."""
    d = change[rows].double()
    return float((((d @ judge.inputs.double()) - 2 * judge.cross[rows].double()) * d).sum())


def fitted(fit: Moments, judge: Moments) -> torch.Tensor | None:
    """The change [out, in] whose strength does best on `judge`; None where no change does better."""
    import torch

    diagonal = fit.inputs.diagonal()
    mu = float(diagonal.mean())
    if not mu > 0:
        return None
    step = -(-len(fit.cross) // ROWS_JUDGED)
    rows = slice(None, None, step)
    best, chosen = 0.0, None
    for strength in STRENGTHS:
        damped = fit.inputs + torch.eye(len(diagonal)) * (strength * mu)
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info):
            continue
        change = torch.cholesky_solve(fit.cross[rows].T, factor).T
        if (loss := loss_change(change, Moments(judge.inputs, judge.cross[rows]))) < best:
            best, chosen = loss, factor
    return None if chosen is None else torch.cholesky_solve(fit.cross.T, chosen).T.contiguous()
