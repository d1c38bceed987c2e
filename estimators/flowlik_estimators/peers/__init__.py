"""The likelihood routes of public libraries on the suite's models: docs/peers.md."""

from flowlik_estimators.peers.peer import Peer
from flowlik_estimators.peers.peer_diffrax import Diffrax
from flowlik_estimators.peers.torch_libraries import FlowMatching, Torchode, Zuko

__all__ = ["Diffrax", "FlowMatching", "Peer", "Torchode", "Zuko"]
