"""The driver volatile-cache."""

from fusebd.drivers.volatilecache.driver import VolatileCache

__all__ = ["VolatileCache"]
