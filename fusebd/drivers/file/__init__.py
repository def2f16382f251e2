"""file and host_device: the host's regular files and block devices."""

from fusebd.drivers.file.driver import File, HostDevice

__all__ = ["File", "HostDevice"]
