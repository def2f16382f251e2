from fusebd.drivers.fault.driver import Fault
from fusebd.drivers.fault.options import FaultOptions, FaultRule

__all__ = ["Fault", "FaultOptions", "FaultRule"]
