"""Fixtures that several kinds of tests share."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fusebd.block.graph import Graph


@pytest.fixture
async def graph() -> AsyncIterator[Graph]:
    """An empty graph; whatever is in it at the end is closed."""
    graph = Graph()
    yield graph
    await graph.close()
    assert not graph.nodes
