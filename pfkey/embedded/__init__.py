"""A kernel in the process: the SAD and SPD of Linux, a BSD or macOS behind a Channel, in real PF_KEY bytes."""

from .channel import EmbeddedChannel
from .kernel import EmbeddedKernel
from .probe import Probe
from .profiles import Profile
from .traffic import Passage, Verdict

__all__ = ["EmbeddedChannel", "EmbeddedKernel", "Passage", "Probe", "Profile", "Verdict"]
