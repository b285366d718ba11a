"""The reference engine: the same answers as any other, by the most obvious computation on plain torch.

Every tensor below is of the full vocabulary; nothing is fused, chunked or approximated.

Legend: N tokens, S scored positions, K top-k entries, C candidates per position, V vocabulary rows.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from protos.arrays import Float32Array, Int32Array, ScoreArrays
from teacher_service.engine import model_files, pricing
from teacher_service.engine.death import Death
from teacher_service.engine.numerics import clip_rounding
from teacher_service.errors import EngineDeadError, EngineError, EngineStartError
from teacher_service.types import Capability, EngineInfo, Price, ScoreJob

SCORED_LOGIT_BYTES = 28
"""Of each logit of a scored position: seven float32 copies, the entropy's among them."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Loaded:
    model: nn.Module
    device: torch.device
    info: EngineInfo
    logit_bytes: int


class TransformersEngine:
    """`AutoModelForCausalLM` on one device, one sequence at a time, in one worker thread. All capabilities."""

    def __init__(
        self,
        *,
        model: str,
        dtype: str = "auto",
        device: str = "auto",
        max_model_len: int | None = None,
        max_num_logprobs: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """An engine that loads nothing yet.

        Args:
            model: folder of a checkpoint, or a hub id.
            dtype: `float32`, `bfloat16`, `float16`, or `auto`: the checkpoint's.
            device: `cpu`, `cuda`, `cuda:1` …, or `auto`: cuda where there is one.
            max_model_len: longest sequence in tokens; None: what the model was built for.
            max_num_logprobs: largest K; None: V.
            trust_remote_code: whether Python code that lies in the checkpoint may run.
        """
        self._model_path = model
        self._dtype = dtype
        self._device = device
        self._max_model_len = max_model_len
        self._max_num_logprobs = max_num_logprobs
        self._trust_remote_code = trust_remote_code
        self._loaded: _Loaded | None = None
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="transformers-engine")
        self._death = Death()

    async def start(self) -> EngineInfo:
        """See `Engine.start`."""
        self._loaded = await asyncio.get_running_loop().run_in_executor(self._worker, self._load)
        return self._loaded.info

    def price(self, job: ScoreJob) -> Price:
        """See `Engine.price`. All logits of a sequence are there at once, and several float32 copies of the scored."""
        if self._loaded is None:
            return Price(held_bytes=0)
        vocab_rows, logit_bytes = self._loaded.info.vocab_rows, self._loaded.logit_bytes
        return Price(
            held_bytes=pricing.answer_bytes(job),
            peak_bytes=vocab_rows * (job.num_tokens * logit_bytes + job.num_scored * SCORED_LOGIT_BYTES),
        )

    async def score(self, job: ScoreJob) -> ScoreArrays:
        """See `Engine.score`. A job that waits for the worker is dropped when cancelled; a running one is discarded."""
        if self._loaded is None:
            raise EngineDeadError("the engine holds no model: it is not started, or closed")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._worker, _score, self._loaded, job)
        except torch.AcceleratorError as exc:  # the device's context is lost: every later call fails as well
            self._death.declare(exc)
            raise EngineDeadError(f"the device failed: {exc}; restart the service") from exc
        except (RuntimeError, IndexError) as exc:
            raise EngineError(f"{job.num_tokens} tokens could not be scored: {exc}") from exc

    async def wait_dead(self) -> BaseException:
        """See `Engine.wait_dead`. Only a lost device kills this engine."""
        return await self._death.wait()

    async def close(self) -> None:
        """See `Engine.close`. Waits for the running job, drops the queued ones."""
        await asyncio.to_thread(self._worker.shutdown, wait=True, cancel_futures=True)
        self._loaded = None

    def _load(self) -> _Loaded:
        directory = model_files.locate_model(self._model_path)
        model_files.check_remote_code(directory, is_trusted=self._trust_remote_code)
        dtype = _dtype(self._dtype)
        transformers.utils.logging.disable_progress_bar()  # the log is the service's
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                directory, dtype=dtype, local_files_only=True, trust_remote_code=self._trust_remote_code
            )
            device = torch.device(self._device if self._device != "auto" else _best_device())
            model = model.to(device).eval()
        except Exception as exc:
            raise EngineStartError(
                f"model {self._model_path!r} can't be loaded from {directory} to device {self._device!r}: {exc}; is it "
                f"a causal language model that transformers {transformers.__version__} knows, and does it fit?"
            ) from exc
        vocab_rows = int(model.get_output_embeddings().weight.shape[0])
        max_len = _max_model_len(self._max_model_len, model.config, self._model_path)
        max_num_logprobs = vocab_rows if self._max_num_logprobs is None else min(self._max_num_logprobs, vocab_rows)
        info = EngineInfo(
            name="transformers",
            version=str(transformers.__version__),
            model_name=model_files.model_name(self._model_path),
            weights_digest=model_files.weights_digest(directory),
            tokenizer=model_files.tokenizer_manifest(directory, trust_remote_code=self._trust_remote_code),
            vocab_rows=vocab_rows,
            dtype=str(model.dtype).removeprefix("torch."),
            max_model_len=max_len,
            max_request_tokens=max_len,
            max_num_logprobs=max_num_logprobs,
            device_free_bytes=torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None,
            capabilities=frozenset(
                {Capability.TEMPERATURE, Capability.CANDIDATES, Capability.ENTROPY, Capability.EXACT_TAIL_MASS}
            ),
        )
        return _Loaded(model=model, device=device, info=info, logit_bytes=model.dtype.itemsize)


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _dtype(name: str) -> torch.dtype | str:
    if name == "auto":
        return "auto"
    if name not in DTYPES:
        raise EngineStartError(f"dtype {name!r} is unknown; give auto or one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _max_model_len(asked: int | None, config: transformers.PretrainedConfig, model: str) -> int:
    built_for = int(config.get_text_config().max_position_embeddings)
    if asked is not None and asked > built_for:
        raise EngineStartError(
            f"max_model_len {asked} is above the {built_for} tokens that {model!r} was built for; lower or omit it"
        )
    return built_for if asked is None else asked


@torch.inference_mode()
def _score(loaded: _Loaded, job: ScoreJob) -> ScoreArrays:
    input_ids_1N = torch.from_numpy(job.token_ids.astype(np.int64))[None].to(loaded.device)
    logits_NV = loaded.model(input_ids=input_ids_1N, use_cache=False).logits[0]
    # The logits that predict token i stand at i - 1.
    logits_SV = logits_NV[job.score_start - 1 : job.num_tokens - 1].float() / job.temperature
    logprobs_SV = torch.log_softmax(logits_SV, dim=-1)
    topk_ids_SK: Int32Array | None = None
    topk_logprobs_SK: Float32Array | None = None
    log_tail_S: Float32Array | None = None
    if job.num_logprobs:
        topk = logprobs_SV.topk(job.num_logprobs, dim=-1)
        topk_ids_SK, topk_logprobs_SK = topk.indices.to(torch.int32).cpu().numpy(), _to_numpy(topk.values)
        rest_SV = logprobs_SV.scatter(-1, topk.indices, -torch.inf)
        log_tail_S = _to_numpy(torch.logsumexp(rest_SV, dim=-1))
    candidates = job.candidate_token_ids
    return ScoreArrays(
        sampled_logprobs=_gather(logprobs_SV, job.token_ids[job.score_start :, None])[:, 0],
        topk_token_ids=topk_ids_SK,
        topk_logprobs=topk_logprobs_SK,
        log_tail_mass=log_tail_S,
        entropy=torch.special.entr(logprobs_SV.exp()).sum(dim=-1).cpu().numpy() if job.return_entropy else None,
        candidate_logprobs=None if candidates is None else _gather(logprobs_SV, candidates),
    )


def _gather(logprobs_SV: Tensor, token_ids: Int32Array) -> Float32Array:
    indices = torch.from_numpy(token_ids.astype(np.int64)).to(logprobs_SV.device)
    return _to_numpy(logprobs_SV.gather(-1, indices))


def _to_numpy(logprobs: Tensor) -> Float32Array:
    return clip_rounding(logprobs.cpu().numpy())
