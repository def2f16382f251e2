"""fusebd: a graph of virtual block devices, mounted as a directory."""

__version__ = "0.1.0"
