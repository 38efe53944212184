"""ResShift (zsyOAOA/ResShift), whose diffusion SinSR distils.

Its trainer ``TrainerDifIRLPIPS`` makes ``lpips.LPIPS(net="vgg")``: import :class:`LPIPS` from here
and say ``net="mghf-c"``. To distil it as HF-Diff does, :func:`student` takes its diffusion too.
"""

from .lpips import LPIPS
from .sinsr import final_timestep, student

__all__ = ["LPIPS", "final_timestep", "student"]
