"""How a training worker learns that its node goes: a SIGTERM to its process, or Ray's notice that the node is drained."""

from __future__ import annotations

import threading
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.v2._internal.execution.context import get_train_context

from jobs.network import use_node_interface
from jobs.stopping import take_sigterm

_told = threading.Event()


def should_stop() -> bool:
    """Whether this worker was told to stop; costs nothing, so each step may ask. On a worker of Ray Train only."""
    # The public `ray.train.get_preemption_info` is a barrier of all workers; the loop has an all-reduce of its own.
    return _told.is_set() or get_train_context().preemption_context.preemption_info is not None


class PreemptibleTorchConfig(TorchConfig):
    """PyTorch workers that meet on the network that Ray uses, and whose SIGTERM is a request: they note it, and the loop ends
    at the next step."""

    @property
    def backend_cls(self) -> type[Any]:
        return _Backend


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]  # a property that mypy takes for a value
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(use_node_interface)
        super().on_start(worker_group, backend_config)

    def on_training_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        super().on_training_start(worker_group, backend_config)
        # The main thread alone may set handlers, and Ray Train runs the training function in another.
        worker_group.execute(_note_sigterm)


def _note_sigterm() -> None:
    _told.clear()
    take_sigterm(_told.set)
