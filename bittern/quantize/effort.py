"""How hard to try: each effort is a short list of stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bittern.errors import BitternError
from bittern.model import Matrix
from bittern.weight import QuantSpec


@dataclass(frozen=True)
class Effort:
    """The stages of quantizing.

    Attributes:
        search: grids are searched; else they cover the whole range of their group.
        act_order: columns are solved by falling activity (inside the solver alone).
        polish: scales and codes are fitted to each other afterwards, see :mod:`bittern.quantize.polish`.
        exact_share: of the calibration windows, walked through the unquantized blocks too (see :meth:`at`). Where it is
            not 0, blocks are solved stage by stage, and towards what the full-precision model computes.
        balance: channels are evened out first, see :mod:`bittern.quantize.balance`; needs an exact share.
        shape: errors are shaped by what outputs do to the predictions, see :mod:`bittern.quantize.guide` and
            :mod:`bittern.quantize.shape`; needs an exact share.
        weigh: and tokens count by that.
        tune: tokens that scales and norms are trained on at the end, unless a user says how many; 0 trains nothing (see
            :mod:`bittern.quantize.tune`).
        damp_percent: unless a user says another, see :func:`bittern.quantize.gptq.factorize`.
    """

    search: bool = True
    act_order: bool = True
    polish: bool = True
    exact_share: float = 0.0
    balance: bool = False
    shape: bool = False
    weigh: bool = False
    tune: int = 0
    damp_percent: float = 0.01

    def shaped(self, block: Sequence[tuple[Matrix, QuantSpec]]) -> list[Matrix]:
        """The matrices of a planned block whose errors are shaped; blocks of experts are not walked in stages.

        Where tokens are not weighed, none with more outputs than inputs: the moments of its outputs would take more
        than those of its inputs, for the least of what there is to gain (docs/log.md).
        """
        members = [matrix for matrix, _ in block]
        if not self.shape or any(matrix.expert is not None for matrix in members):
            return []
        return [matrix for matrix in members if self.weigh or matrix.out_features <= matrix.in_features]

    def exact_windows(self, windows: int) -> int:
        """How many of the calibration windows, the first ones, are walked through the unquantized blocks.

        Two at least, where there are two: one to learn from, and one to see whether it holds.
        """
        return min(windows, max(2, -int(-self.exact_share * windows // 1))) if self.exact_share else 0

    def at(self, bits: float) -> Effort:
        """As it is for layers of so many bits, or an average: with few, exact windows are worth more."""
        return replace(self, exact_share=COARSE_SHARE) if self.exact_share and bits < COARSE else self


COARSE, COARSE_SHARE = 3, 0.45
"""Below so many bits, so many of the windows are walked in full precision: blocks drift further (docs/log.md)."""


DAMP_PERCENT = 0.2
"""Layer losses are least at .01, what is lost of the predictions is not (docs/log.md)."""

EFFORTS = {
    "plain": Effort(search=False, act_order=False, polish=False),
    "fast": Effort(exact_share=0.2, balance=True, shape=True, damp_percent=DAMP_PERCENT),
    "best": Effort(exact_share=0.2, balance=True, shape=True, weigh=True, tune=256_000, damp_percent=DAMP_PERCENT),
}


def pick_effort(name: str) -> Effort:
    """The effort of a name.

    Raises:
        BitternError: for another name.
    """
    if name not in EFFORTS:
        raise BitternError(f"effort: expected one of {', '.join(EFFORTS)}, found {name!r}")
    return EFFORTS[name]
