"""QEMU enhanced disks (QED).  All numbers are little-endian.

An L1 table of L2 tables' offsets, and L2 tables of clusters' offsets; both have as many entries.

Specification: QEMU docs/interop/qed_spec.rst.
"""

from __future__ import annotations

import construct as cs

MAGIC = b"QED\0"
BACKING_FILE, NEED_CHECK, BACKING_FORMAT_NO_PROBE = 1, 2, 4
FEATURES_KNOWN = 7
MIN_CLUSTER_SIZE, MAX_CLUSTER_SIZE = 1 << 12, 1 << 26
MIN_TABLE_SIZE, MAX_TABLE_SIZE = 1, 16
#: in place of a cluster's offset: it reads as zeroes
ZERO_CLUSTER = 1
SECTOR_SIZE = 512
MAX_BACKING_NAME = 1023

HEADER = cs.Struct(
    "magic" / cs.Bytes(4),
    "cluster_size" / cs.Int32ul,
    "table_size" / cs.Int32ul,
    "header_size" / cs.Int32ul,
    "features" / cs.Int64ul,
    "compat_features" / cs.Int64ul,
    "autoclear_features" / cs.Int64ul,
    "l1_table_offset" / cs.Int64ul,
    "image_size" / cs.Int64ul,
    "backing_filename_offset" / cs.Int32ul,
    "backing_filename_size" / cs.Int32ul,
)
HEADER_LENGTH = 64
