"""luks: a disk that is encrypted as a whole."""

from fusebd.drivers.luks.driver import Luks

__all__ = ["Luks"]
