"""What the inputs of a layer say about errors of its weights: the matrix H, damped, and its factors.

H = X^T W X / T, f32 [in, in], of T inputs with weights W on the diagonal; the loss of a row of errors e is e H e^T.
Error feedback (GPTQ: Frantar et al., arXiv 2210.17323) needs U, upper triangular with H^-1 = U^T U.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ernie_quant.errors import ErnieQuantError

DAMPED_DESCENT = True  # descent lowers the loss with damped H, which feedback lowers too; False: that with H itself


@dataclass(frozen=True)
class Inputs:
    """H of descent over its mean diagonal, in the order in which codes stand; U of damped H; that order (None: as they come)."""

    curvature: torch.Tensor
    upper: torch.Tensor
    order: torch.Tensor | None = None


def inputs(hessian: torch.Tensor, damping: float, order: torch.Tensor | None = None) -> Inputs:
    """Of H [in, in] in logical order; order int64 [in]: the logical input of each stored position."""
    curvature = _ordered(damped(hessian, damping), order)
    upper = inverse_factor(curvature)
    if not DAMPED_DESCENT:
        curvature = _ordered(damped(hessian, 0.0), order)
    return Inputs(curvature, upper, order)


def _ordered(square: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    return square if order is None else square[order][:, order].contiguous()


def damped(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """H / mu + damping * I, mu the mean of its diagonal over live inputs; dead ones (diagonal 0) have nothing else than 1.

    Over mu, so that float32 suffices for any scale of the inputs: codes do not depend on it. Raises ErnieQuantError.
    """
    result = hessian.float().clone()
    if not result.isfinite().all():
        raise ErnieQuantError("the inputs of a layer have sums of squares that are not finite: no feedback is possible with them")
    diagonal = result.diagonal()
    dead = diagonal <= 0
    # a layer without any input (an expert that no token chose) has the identity: feedback is then rounding
    result /= diagonal[~dead].double().mean().float() if not dead.all() else 1.0
    result[dead] = 0
    result[:, dead] = 0
    diagonal[dead] = 1
    diagonal += damping
    return result


def inverse_factor(curvature: torch.Tensor) -> torch.Tensor:
    """U, upper triangular, with H^-1 = U^T U: with J the reversal, U = J L^-1 J for J H J = L L^T. Raises ErnieQuantError."""
    reversed_ = curvature.flip(0, 1)
    lower, info = torch.linalg.cholesky_ex(reversed_)
    if info:  # rounding has made it indefinite
        lower, info = torch.linalg.cholesky_ex(reversed_.double())
    if info:
        raise ErnieQuantError("the sums of squares of a layer's inputs are not those of any inputs: they are not positive")
    return lower_inverse(lower).float().flip(0, 1).contiguous()


def lower_inverse(lower: torch.Tensor, leaf: int = 512) -> torch.Tensor:
    """L^-1 by halves: n^3 / 3 multiplications, a third of those of a triangular solve with the identity."""
    n = len(lower)
    if n <= leaf:
        solved: torch.Tensor = torch.linalg.solve_triangular(lower, torch.eye(n, dtype=lower.dtype), upper=False)
        return solved
    half = n // 2
    result = torch.zeros_like(lower)
    result[:half, :half] = lower_inverse(lower[:half, :half], leaf)
    result[half:, half:] = lower_inverse(lower[half:, half:], leaf)
    result[half:, :half] = -(result[half:, half:] @ lower[half:, :half]) @ result[:half, :half]
    return result
