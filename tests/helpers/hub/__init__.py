"""A hub for tests on 127.0.0.1 that the unmodified official client takes for the real one."""

from .loopback import LoopbackHub
from .process import HubProcess

__all__ = ["HubProcess", "LoopbackHub"]
