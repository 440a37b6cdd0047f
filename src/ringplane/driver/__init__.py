"""The other end of vhost-user-blk: a front end, a virtio-blk driver over it, and a compiled load generator."""

from ringplane.driver.content import Model
from ringplane.driver.driver import Driver, Unsupported
from ringplane.driver.frontend import RingBroken
from ringplane.driver.load import Load, Result, check, fill, run_load

__all__ = ["Driver", "Load", "Model", "Result", "RingBroken", "Unsupported", "check", "fill", "run_load"]
