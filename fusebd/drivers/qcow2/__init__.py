"""qcow2, versions 2 and 3."""

from fusebd.drivers.qcow2.driver import Qcow2

__all__ = ["Qcow2"]
