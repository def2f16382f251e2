from fusebd.block.debugevents import EVENTS
from fusebd.drivers.blkdebug.driver import Blkdebug, BlkdebugOptions
from fusebd.drivers.blkdebug.rules import IO_TYPES, InjectErrorOptions, SetStateOptions

__all__ = ["EVENTS", "IO_TYPES", "Blkdebug", "BlkdebugOptions", "InjectErrorOptions", "SetStateOptions"]
