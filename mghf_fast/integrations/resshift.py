"""ResShift (zsyOAOA/ResShift), whose diffusion SinSR distils.

Its trainer ``TrainerDifIRLPIPS`` makes ``lpips.LPIPS(net="vgg")``: import :class:`LPIPS` from here
and pass ``net="mghf-c"``. To distil it as HF-Diff does, pass its diffusion to :func:`student`.
"""

from .lpips import LPIPS
from .sinsr import final_timestep, student

__all__ = ["LPIPS", "final_timestep", "student"]
