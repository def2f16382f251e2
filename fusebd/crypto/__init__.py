"""Encryption of whole disks: ciphers of sectors, and LUKS headers."""
