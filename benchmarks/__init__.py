"""fusebd measured beside qemu-storage-daemon: see README.rst in this directory."""
