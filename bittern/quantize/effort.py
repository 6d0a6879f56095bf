"""How hard to try: each effort is a short list of stages."""

from __future__ import annotations

from dataclasses import dataclass

from bittern.errors import BitternError


@dataclass(frozen=True)
class Effort:
    """The stages of quantizing.

    Attributes:
        search: grids are searched; else they cover the whole range of their group.
        act_order: columns are solved by falling activity (inside the solver alone).
        polish: scales and codes are fitted to each other afterwards, see :mod:`bittern.quantize.polish`.
        exact_share: of the calibration windows, walked through the unquantized blocks too. Where it is not 0, blocks
            are solved stage by stage, and towards what the full-precision model computes.
        balance: channels are evened out first, see :mod:`bittern.quantize.balance`; needs an exact share.
        guide: tokens and outputs count by what they do to the predictions, see :mod:`bittern.quantize.guide`, and
            errors are shaped by that, see :mod:`bittern.quantize.shape`; needs an exact share.
        tune: scales and norms are trained at the end, see :mod:`bittern.quantize.tune`.
    """

    search: bool = True
    act_order: bool = True
    polish: bool = True
    exact_share: float = 0.0
    balance: bool = False
    guide: bool = False
    tune: bool = False

    def exact_windows(self, windows: int) -> int:
        """How many of the calibration windows, the first ones, are walked through the unquantized blocks."""
        return min(windows, -int(-self.exact_share * windows // 1))


EFFORTS = {
    "plain": Effort(search=False, act_order=False, polish=False),
    "fast": Effort(exact_share=0.25, balance=True),
    "best": Effort(exact_share=0.25, balance=True, guide=True, tune=True),
}


def pick_effort(name: str) -> Effort:
    """The effort of a name.

    Raises:
        BitternError: for another name.
    """
    if name not in EFFORTS:
        raise BitternError(f"effort: expected one of {', '.join(EFFORTS)}, found {name!r}")
    return EFFORTS[name]
