from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Capability(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CAPABILITY_UNSPECIFIED: _ClassVar[Capability]
    CAPABILITY_TEMPERATURE: _ClassVar[Capability]
    CAPABILITY_CANDIDATES: _ClassVar[Capability]
    CAPABILITY_ENTROPY: _ClassVar[Capability]
    CAPABILITY_EXACT_TAIL_MASS: _ClassVar[Capability]
    CAPABILITY_WIRE_FLOAT16: _ClassVar[Capability]
    CAPABILITY_WIRE_BFLOAT16: _ClassVar[Capability]
    CAPABILITY_IDEMPOTENCY: _ClassVar[Capability]

class WireDtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WIRE_DTYPE_UNSPECIFIED: _ClassVar[WireDtype]
    WIRE_DTYPE_FLOAT32: _ClassVar[WireDtype]
    WIRE_DTYPE_FLOAT16: _ClassVar[WireDtype]
    WIRE_DTYPE_BFLOAT16: _ClassVar[WireDtype]
CAPABILITY_UNSPECIFIED: Capability
CAPABILITY_TEMPERATURE: Capability
CAPABILITY_CANDIDATES: Capability
CAPABILITY_ENTROPY: Capability
CAPABILITY_EXACT_TAIL_MASS: Capability
CAPABILITY_WIRE_FLOAT16: Capability
CAPABILITY_WIRE_BFLOAT16: Capability
CAPABILITY_IDEMPOTENCY: Capability
WIRE_DTYPE_UNSPECIFIED: WireDtype
WIRE_DTYPE_FLOAT32: WireDtype
WIRE_DTYPE_FLOAT16: WireDtype
WIRE_DTYPE_BFLOAT16: WireDtype

class GetManifestRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetManifestResponse(_message.Message):
    __slots__ = ("manifest",)
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    manifest: Manifest
    def __init__(self, manifest: _Optional[_Union[Manifest, _Mapping]] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("digest", "model_name", "weights_digest", "tokenizer", "vocab_rows", "dtype", "max_model_len", "max_num_logprobs", "max_request_tokens", "max_request_bytes", "capabilities", "engine", "engine_version", "service_version", "route", "route_reason")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    VOCAB_ROWS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_VERSION_FIELD_NUMBER: _ClassVar[int]
    SERVICE_VERSION_FIELD_NUMBER: _ClassVar[int]
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    ROUTE_REASON_FIELD_NUMBER: _ClassVar[int]
    digest: str
    model_name: str
    weights_digest: str
    tokenizer: TokenizerManifest
    vocab_rows: int
    dtype: str
    max_model_len: int
    max_num_logprobs: int
    max_request_tokens: int
    max_request_bytes: int
    capabilities: _containers.RepeatedScalarFieldContainer[Capability]
    engine: str
    engine_version: str
    service_version: str
    route: str
    route_reason: str
    def __init__(self, digest: _Optional[str] = ..., model_name: _Optional[str] = ..., weights_digest: _Optional[str] = ..., tokenizer: _Optional[_Union[TokenizerManifest, _Mapping]] = ..., vocab_rows: _Optional[int] = ..., dtype: _Optional[str] = ..., max_model_len: _Optional[int] = ..., max_num_logprobs: _Optional[int] = ..., max_request_tokens: _Optional[int] = ..., max_request_bytes: _Optional[int] = ..., capabilities: _Optional[_Iterable[_Union[Capability, str]]] = ..., engine: _Optional[str] = ..., engine_version: _Optional[str] = ..., service_version: _Optional[str] = ..., route: _Optional[str] = ..., route_reason: _Optional[str] = ...) -> None: ...

class TokenizerManifest(_message.Message):
    __slots__ = ("digest", "token_count", "range_size", "range_digests", "special_token_ids")
    class SpecialTokenIdsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    RANGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    RANGE_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    SPECIAL_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    digest: str
    token_count: int
    range_size: int
    range_digests: bytes
    special_token_ids: _containers.ScalarMap[str, int]
    def __init__(self, digest: _Optional[str] = ..., token_count: _Optional[int] = ..., range_size: _Optional[int] = ..., range_digests: _Optional[bytes] = ..., special_token_ids: _Optional[_Mapping[str, int]] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("token_ids", "score_start", "num_logprobs", "temperature", "candidates", "wire_dtype", "idempotency_key", "return_entropy")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SCORE_START_FIELD_NUMBER: _ClassVar[int]
    NUM_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    WIRE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    RETURN_ENTROPY_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    score_start: int
    num_logprobs: int
    temperature: float
    candidates: Candidates
    wire_dtype: WireDtype
    idempotency_key: str
    return_entropy: bool
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., score_start: _Optional[int] = ..., num_logprobs: _Optional[int] = ..., temperature: _Optional[float] = ..., candidates: _Optional[_Union[Candidates, _Mapping]] = ..., wire_dtype: _Optional[_Union[WireDtype, str]] = ..., idempotency_key: _Optional[str] = ..., return_entropy: bool = ...) -> None: ...

class Candidates(_message.Message):
    __slots__ = ("count", "token_ids")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    count: int
    token_ids: bytes
    def __init__(self, count: _Optional[int] = ..., token_ids: _Optional[bytes] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("scored_count", "num_logprobs", "wire_dtype", "topk_token_ids", "topk_logprobs", "sampled_logprobs", "log_tail_mass", "entropy", "candidate_logprobs", "manifest_digest", "timings", "payload_crc32")
    SCORED_COUNT_FIELD_NUMBER: _ClassVar[int]
    NUM_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    WIRE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    TOPK_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOPK_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    LOG_TAIL_MASS_FIELD_NUMBER: _ClassVar[int]
    ENTROPY_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_CRC32_FIELD_NUMBER: _ClassVar[int]
    scored_count: int
    num_logprobs: int
    wire_dtype: WireDtype
    topk_token_ids: bytes
    topk_logprobs: bytes
    sampled_logprobs: bytes
    log_tail_mass: bytes
    entropy: bytes
    candidate_logprobs: bytes
    manifest_digest: str
    timings: Timings
    payload_crc32: int
    def __init__(self, scored_count: _Optional[int] = ..., num_logprobs: _Optional[int] = ..., wire_dtype: _Optional[_Union[WireDtype, str]] = ..., topk_token_ids: _Optional[bytes] = ..., topk_logprobs: _Optional[bytes] = ..., sampled_logprobs: _Optional[bytes] = ..., log_tail_mass: _Optional[bytes] = ..., entropy: _Optional[bytes] = ..., candidate_logprobs: _Optional[bytes] = ..., manifest_digest: _Optional[str] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., payload_crc32: _Optional[int] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("queue_s", "engine_s", "encode_s")
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    ENGINE_S_FIELD_NUMBER: _ClassVar[int]
    ENCODE_S_FIELD_NUMBER: _ClassVar[int]
    queue_s: float
    engine_s: float
    encode_s: float
    def __init__(self, queue_s: _Optional[float] = ..., engine_s: _Optional[float] = ..., encode_s: _Optional[float] = ...) -> None: ...

class ScoreStreamRequest(_message.Message):
    __slots__ = ("id", "request", "timeout_s")
    ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    id: str
    request: ScoreRequest
    timeout_s: float
    def __init__(self, id: _Optional[str] = ..., request: _Optional[_Union[ScoreRequest, _Mapping]] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class ScoreStreamResponse(_message.Message):
    __slots__ = ("id", "response", "error")
    ID_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    id: str
    response: ScoreResponse
    error: ScoreError
    def __init__(self, id: _Optional[str] = ..., response: _Optional[_Union[ScoreResponse, _Mapping]] = ..., error: _Optional[_Union[ScoreError, _Mapping]] = ...) -> None: ...

class ScoreError(_message.Message):
    __slots__ = ("code", "message", "reason", "metadata", "retry_delay_s")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    RETRY_DELAY_S_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    reason: str
    metadata: _containers.ScalarMap[str, str]
    retry_delay_s: float
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., reason: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ..., retry_delay_s: _Optional[float] = ...) -> None: ...
