"""Encryption of whole disks: ciphers of sectors, and LUKS headers."""

#: what is encrypted by itself, in bytes
SECTOR = 512
