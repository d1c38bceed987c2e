"""Templates of what another package can add to flowlik; this file says where its suite lies."""

from pathlib import Path

SUITE = Path(__file__).with_name("suite.toml")
