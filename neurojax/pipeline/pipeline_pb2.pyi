from neurojax.wire import wire_pb2 as _wire_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_PROMPT: _ClassVar[Role]
    ROLE_DRAWN: _ClassVar[Role]
    ROLE_REPLAYED: _ClassVar[Role]
ROLE_PROMPT: Role
ROLE_DRAWN: Role
ROLE_REPLAYED: Role

class Identity(_message.Message):
    __slots__ = ("protocol", "package", "model_sha256", "num_layers", "dtype", "context_length", "programs")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    PACKAGE_FIELD_NUMBER: _ClassVar[int]
    MODEL_SHA256_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    PROGRAMS_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    package: str
    model_sha256: str
    num_layers: int
    dtype: str
    context_length: int
    programs: str
    def __init__(self, protocol: _Optional[int] = ..., package: _Optional[str] = ..., model_sha256: _Optional[str] = ..., num_layers: _Optional[int] = ..., dtype: _Optional[str] = ..., context_length: _Optional[int] = ..., programs: _Optional[str] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Description(_message.Message):
    __slots__ = ("name", "identity", "memory_bytes", "loaded", "first_layer", "last_layer", "weights", "weight_bytes", "cache_bytes", "max_sequences", "open_sequences", "clock_s", "device")
    NAME_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOADED_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    LAST_LAYER_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    OPEN_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    CLOCK_S_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    name: str
    identity: Identity
    memory_bytes: int
    loaded: bool
    first_layer: int
    last_layer: int
    weights: str
    weight_bytes: int
    cache_bytes: int
    max_sequences: int
    open_sequences: int
    clock_s: float
    device: str
    def __init__(self, name: _Optional[str] = ..., identity: _Optional[_Union[Identity, _Mapping]] = ..., memory_bytes: _Optional[int] = ..., loaded: bool = ..., first_layer: _Optional[int] = ..., last_layer: _Optional[int] = ..., weights: _Optional[str] = ..., weight_bytes: _Optional[int] = ..., cache_bytes: _Optional[int] = ..., max_sequences: _Optional[int] = ..., open_sequences: _Optional[int] = ..., clock_s: _Optional[float] = ..., device: _Optional[str] = ...) -> None: ...

class LoadRequest(_message.Message):
    __slots__ = ("identity", "first_layer", "last_layer", "weights", "max_sequences", "cache", "prefix", "quick")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    LAST_LAYER_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    QUICK_FIELD_NUMBER: _ClassVar[int]
    identity: Identity
    first_layer: int
    last_layer: int
    weights: str
    max_sequences: int
    cache: str
    prefix: int
    quick: bool
    def __init__(self, identity: _Optional[_Union[Identity, _Mapping]] = ..., first_layer: _Optional[int] = ..., last_layer: _Optional[int] = ..., weights: _Optional[str] = ..., max_sequences: _Optional[int] = ..., cache: _Optional[str] = ..., prefix: _Optional[int] = ..., quick: bool = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("identity", "name", "has_layers", "first_layer", "last_layer", "your_first_layer", "your_last_layer", "places", "block")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    HAS_LAYERS_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    LAST_LAYER_FIELD_NUMBER: _ClassVar[int]
    YOUR_FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    YOUR_LAST_LAYER_FIELD_NUMBER: _ClassVar[int]
    PLACES_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    identity: Identity
    name: str
    has_layers: bool
    first_layer: int
    last_layer: int
    your_first_layer: int
    your_last_layer: int
    places: int
    block: int
    def __init__(self, identity: _Optional[_Union[Identity, _Mapping]] = ..., name: _Optional[str] = ..., has_layers: bool = ..., first_layer: _Optional[int] = ..., last_layer: _Optional[int] = ..., your_first_layer: _Optional[int] = ..., your_last_layer: _Optional[int] = ..., places: _Optional[int] = ..., block: _Optional[int] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "bias_ids", "bias_values", "min_tokens")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    BIAS_IDS_FIELD_NUMBER: _ClassVar[int]
    BIAS_VALUES_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    bias_ids: _containers.RepeatedScalarFieldContainer[int]
    bias_values: _containers.RepeatedScalarFieldContainer[float]
    min_tokens: int
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., bias_ids: _Optional[_Iterable[int]] = ..., bias_values: _Optional[_Iterable[float]] = ..., min_tokens: _Optional[int] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("sequence", "sampling", "next_address", "next_first_layer", "next_last_layer", "stop_ids", "restore", "copy_sequence", "copy_positions")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    NEXT_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    NEXT_LAST_LAYER_FIELD_NUMBER: _ClassVar[int]
    STOP_IDS_FIELD_NUMBER: _ClassVar[int]
    RESTORE_FIELD_NUMBER: _ClassVar[int]
    COPY_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    COPY_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    sequence: str
    sampling: Sampling
    next_address: str
    next_first_layer: int
    next_last_layer: int
    stop_ids: _containers.RepeatedScalarFieldContainer[int]
    restore: _containers.RepeatedScalarFieldContainer[int]
    copy_sequence: str
    copy_positions: int
    def __init__(self, sequence: _Optional[str] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., next_address: _Optional[str] = ..., next_first_layer: _Optional[int] = ..., next_last_layer: _Optional[int] = ..., stop_ids: _Optional[_Iterable[int]] = ..., restore: _Optional[_Iterable[int]] = ..., copy_sequence: _Optional[str] = ..., copy_positions: _Optional[int] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("sequence",)
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    sequence: str
    def __init__(self, sequence: _Optional[str] = ...) -> None: ...

class Row(_message.Message):
    __slots__ = ("sequence", "index", "start", "tokens", "hidden", "role", "draws", "top", "targets", "keep", "seen", "allowed")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    DRAWS_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_FIELD_NUMBER: _ClassVar[int]
    sequence: str
    index: int
    start: int
    tokens: _wire_pb2.Tensor
    hidden: _wire_pb2.Tensor
    role: Role
    draws: int
    top: int
    targets: _wire_pb2.Tensor
    keep: _containers.RepeatedScalarFieldContainer[int]
    seen: _wire_pb2.Tensor
    allowed: _wire_pb2.Tensor
    def __init__(self, sequence: _Optional[str] = ..., index: _Optional[int] = ..., start: _Optional[int] = ..., tokens: _Optional[_Union[_wire_pb2.Tensor, _Mapping]] = ..., hidden: _Optional[_Union[_wire_pb2.Tensor, _Mapping]] = ..., role: _Optional[_Union[Role, str]] = ..., draws: _Optional[int] = ..., top: _Optional[int] = ..., targets: _Optional[_Union[_wire_pb2.Tensor, _Mapping]] = ..., keep: _Optional[_Iterable[int]] = ..., seen: _Optional[_Union[_wire_pb2.Tensor, _Mapping]] = ..., allowed: _Optional[_Union[_wire_pb2.Tensor, _Mapping]] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("rows",)
    ROWS_FIELD_NUMBER: _ClassVar[int]
    rows: _containers.RepeatedCompositeFieldContainer[Row]
    def __init__(self, rows: _Optional[_Iterable[_Union[Row, _Mapping]]] = ...) -> None: ...

class Tops(_message.Message):
    __slots__ = ("ids", "logprobs")
    IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ids: _wire_pb2.Tensor
    logprobs: _wire_pb2.Tensor
    def __init__(self, ids: _Optional[_Union[_wire_pb2.Tensor, _Mapping]] = ..., logprobs: _Optional[_Union[_wire_pb2.Tensor, _Mapping]] = ...) -> None: ...

class RowOutcome(_message.Message):
    __slots__ = ("sequence", "index", "tokens", "logprobs", "tops", "scores", "score_tops")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOPS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    SCORE_TOPS_FIELD_NUMBER: _ClassVar[int]
    sequence: str
    index: int
    tokens: _wire_pb2.Tensor
    logprobs: _wire_pb2.Tensor
    tops: Tops
    scores: _wire_pb2.Tensor
    score_tops: Tops
    def __init__(self, sequence: _Optional[str] = ..., index: _Optional[int] = ..., tokens: _Optional[_Union[_wire_pb2.Tensor, _Mapping]] = ..., logprobs: _Optional[_Union[_wire_pb2.Tensor, _Mapping]] = ..., tops: _Optional[_Union[Tops, _Mapping]] = ..., scores: _Optional[_Union[_wire_pb2.Tensor, _Mapping]] = ..., score_tops: _Optional[_Union[Tops, _Mapping]] = ...) -> None: ...

class Outcome(_message.Message):
    __slots__ = ("rows", "received_s", "finished_s", "compute_s")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_S_FIELD_NUMBER: _ClassVar[int]
    FINISHED_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    rows: _containers.RepeatedCompositeFieldContainer[RowOutcome]
    received_s: float
    finished_s: float
    compute_s: float
    def __init__(self, rows: _Optional[_Iterable[_Union[RowOutcome, _Mapping]]] = ..., received_s: _Optional[float] = ..., finished_s: _Optional[float] = ..., compute_s: _Optional[float] = ...) -> None: ...

class Close(_message.Message):
    __slots__ = ("sequence",)
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    sequence: str
    def __init__(self, sequence: _Optional[str] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("sequence", "stage", "kind", "message")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    sequence: str
    stage: str
    kind: str
    message: str
    def __init__(self, sequence: _Optional[str] = ..., stage: _Optional[str] = ..., kind: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("hello", "open", "opened", "step", "outcome", "close", "failure")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    open: Open
    opened: Opened
    step: Step
    outcome: Outcome
    close: Close
    failure: Failure
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., open: _Optional[_Union[Open, _Mapping]] = ..., opened: _Optional[_Union[Opened, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ..., outcome: _Optional[_Union[Outcome, _Mapping]] = ..., close: _Optional[_Union[Close, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ...) -> None: ...

class EchoRequest(_message.Message):
    __slots__ = ("payload",)
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    payload: bytes
    def __init__(self, payload: _Optional[bytes] = ...) -> None: ...

class EchoReply(_message.Message):
    __slots__ = ("payload",)
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    payload: bytes
    def __init__(self, payload: _Optional[bytes] = ...) -> None: ...
