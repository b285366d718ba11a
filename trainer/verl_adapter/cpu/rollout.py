"""vLLM rollouts on a CPU: verl's replica with a worker that can load weights more than once.

vLLM on a CPU repacks linear layers after loading and drops their weight loaders, so verl's in-place load of a second
set of weights fails. vLLM's own layerwise reload works, except that a tied LM head keeps its old packed copy: the
rollout would go on with stale weights, and nothing would say so.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import torch
from verl.workers.rollout.vllm_rollout import ServerAdapter
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.models.utils import WeightsMapper


def reload_weights(model_runner: Any, weights: Sequence[tuple[str, torch.Tensor]]) -> None:  # vLLM's, untyped
    """Load a whole set of weights into a running vLLM model, tied LM head included."""
    is_tied = getattr(model_runner.model_config.hf_text_config, "tie_word_embeddings", False)
    with _quiet_about(("RotaryEmbedding", "ParallelLMHead") if is_tied else ("RotaryEmbedding",)):
        model_runner.reload_weights(weights_iterator=iter(weights))
    if not is_tied:
        return
    modules = list(model_runner.get_model().modules())
    embedding = next(
        one for one in modules if isinstance(one, VocabParallelEmbedding) and not isinstance(one, ParallelLMHead)
    )
    for head in modules:
        if isinstance(head, ParallelLMHead):
            head.weight = embedding.weight
            head.quant_method.process_weights_after_loading(head)  # packs the new weights


def name_unstacked_mapper() -> None:
    """Give vLLM's mapper of weight names the method by which verl 0.9.1 loads an adapter.

    vLLM has renamed it, for all users that name modules instead of loading them, as an adapter's do.
    """
    if not hasattr(WeightsMapper, "get_unstacked_mapper"):
        WeightsMapper.get_unstacked_mapper = WeightsMapper.get_rename_mapper


@contextmanager
def _quiet_about(layers: tuple[str, ...]) -> Iterator[None]:
    """Drop vLLM's warning that nothing was loaded into layers for which no checkpoint holds anything.

    Args:
        layers: ends of their class names.
    """

    def is_news(record: logging.LogRecord) -> bool:
        return not (isinstance(record.args, tuple) and record.args and str(record.args[0]).endswith(layers))

    layerwise.logger.addFilter(is_news)
    try:
        yield
    finally:
        layerwise.logger.removeFilter(is_news)


def own_handle(zmq_handle: str) -> str:
    """verl's weight-transfer socket, in this run's folder for temporary files.

    verl tells the sockets of two runs on one machine apart by Ray's job id, which is 01000000 in every local Ray: a run
    would take another's weights, or wait for ever.
    """
    return zmq_handle.replace("ipc:///tmp/", f"ipc://{tempfile.gettempdir()}/", 1)


class CPUWorkerExtension(vLLMColocateWorkerExtension):  # type: ignore[misc]  # verl carries no types
    """Receives weights from the trainer and reloads them as vLLM on a CPU allows."""

    def _get_zmq_handle(self) -> str:
        return own_handle(super()._get_zmq_handle())

    def update_weights_from_ipc(
        self, peft_config: dict[str, Any] | None = None, base_sync_done: bool = False, use_shm: bool = False
    ) -> None:
        """Take one full set of weights. LoRA adapters after the first sync go verl's own way."""
        if peft_config and base_sync_done:
            name_unstacked_mapper()
            super().update_weights_from_ipc(peft_config, base_sync_done, use_shm)
            return
        received: list[tuple[str, torch.Tensor]] = []

        def keep(bucket: Sequence[tuple[str, torch.Tensor]], is_last: bool) -> None:
            # a view would keep the shared-memory segment from being closed
            received.extend((name, tensor.clone()) for name, tensor in bucket)

        BucketedWeightReceiver(
            zmq_handle=self._get_zmq_handle(), device=torch.device("cpu"), use_shm=use_shm
        ).receive_weights(keep)
        reload_weights(self.model_runner, received)


class CPUServerAdapter(ServerAdapter):  # type: ignore[misc]
    """verl's sender of weights, on the socket of `own_handle`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # verl's signature, passed on whole
        super().__init__(*args, **kwargs)
        self.zmq_handle: str = own_handle(self.zmq_handle)


class CPUHttpServer(vLLMHttpServer):  # type: ignore[misc]
    """verl's vLLM server with the worker extension above."""

    def _get_worker_extension_cls(self) -> str:
        return f"{CPUWorkerExtension.__module__}.{CPUWorkerExtension.__name__}"


class CPUReplica(vLLMReplica):  # type: ignore[misc]
    """verl's vLLM replica with the server above."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # verl's signature, passed on whole
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(CPUHttpServer)
