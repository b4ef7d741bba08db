"""A module in the place of `tensorrt`: the names of the real one that our code uses, over ONNX Runtime on the CPU.

Its engine is the ONNX file itself; running it reads and writes the raw addresses it was given, as TensorRT does. It
refuses what TensorRT refuses: unknown names (there are no others), shapes outside of the profile, caches of another
device. `public_names` lists what has to exist in the real bindings.
"""

import ctypes
import json
from enum import Enum, IntEnum
from typing import Any

import numpy as np
import onnxruntime

__version__ = "11.4.0.106"

CACHE_HEADER = b"cache of the stand-in device"
_SEPARATOR = b"\0profiles\0"


class ILogger:
    class Severity(Enum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2

    def log(self, severity: "ILogger.Severity", msg: str) -> None:
        raise NotImplementedError


class NetworkDefinitionCreationFlag(IntEnum):
    STRONGLY_TYPED = 1


class BuilderFlag(Enum):
    TF32 = 0


class MemoryPoolType(Enum):
    WORKSPACE = 0


class IHostMemory(bytes):
    pass


class INetworkDefinition:
    onnx_file: bytes


class ParserError:
    def __init__(self, text: str) -> None:
        self._text = text

    def desc(self) -> str:
        return self._text


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network = network
        self._errors: list[str] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def parse(self, model: bytes, path: str | None = None) -> bool:
        try:
            onnxruntime.InferenceSession(model)
        except Exception as error:
            self._errors.append(str(error))
            return False
        self._network.onnx_file = model
        return True

    def get_error(self, index: int) -> ParserError:
        return ParserError(self._errors[index])


class IOptimizationProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:  # the names of the real one
        assert all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True))
        self.shapes[input] = [list(min), list(opt), list(max)]


class ITimingCache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> IHostMemory:
        return IHostMemory(self.data or CACHE_HEADER)


class IBuilderConfig:
    def __init__(self) -> None:
        self.profiles: list[IOptimizationProfile] = []
        self.flags = {BuilderFlag.TF32}
        self.workspace: int | None = None
        self.builder_optimization_level = 3
        self._cache = ITimingCache(b"")

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags.remove(flag)

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        assert pool is MemoryPoolType.WORKSPACE
        self.workspace = pool_size

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self._cache = cache
        return ignore_mismatch or cache.data in (b"", CACHE_HEADER)

    def get_timing_cache(self) -> ITimingCache:
        return self._cache


class Builder:
    #: Every configuration that an engine was built with, for the tests.
    seen: list[IBuilderConfig] = []  # noqa: RUF012
    fails_with: str | None = None

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        assert flags == 1 << int(NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None:
        self.seen.append(config)
        if self.fails_with is not None:
            self._logger.log(ILogger.Severity.WARNING, "a warning that is no reason")
            self._logger.log(ILogger.Severity.ERROR, self.fails_with)
            return None
        shapes = [profile.shapes for profile in config.profiles]
        return IHostMemory(network.onnx_file + _SEPARATOR + json.dumps(shapes).encode())


class IExecutionContext:
    def __init__(self, session: onnxruntime.InferenceSession, profiles: list[dict[str, list[list[int]]]]) -> None:
        self._session = session
        self._profiles = profiles
        self._profile = 0
        self._shape: tuple[int, ...] = ()
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._profile = profile_index
        return profile_index < len(self._profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        smallest, _, largest = self._profiles[self._profile][name]
        self._shape = shape
        return all(a <= b <= c for a, b, c in zip(smallest, shape, largest, strict=True))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        source = self._session.get_inputs()[0]
        dtype = np.uint8 if "uint8" in source.type else np.float32
        size = int(np.prod(self._shape)) * np.dtype(dtype).itemsize
        raw = ctypes.string_at(self._addresses[source.name], size)
        names = [output.name for output in self._session.get_outputs()]
        results = self._session.run(names, {source.name: np.frombuffer(raw, dtype).reshape(self._shape)})
        for name, values in zip(names, results, strict=True):
            data = np.ascontiguousarray(values, np.float32)
            ctypes.memmove(self._addresses[name], data.ctypes.data, data.nbytes)
        return True


class ICudaEngine:
    def __init__(self, plan: bytes) -> None:
        model, _, profiles = bytes(plan).partition(_SEPARATOR)
        self._session = onnxruntime.InferenceSession(model)
        self._profiles = json.loads(profiles)

    def create_execution_context(self) -> IExecutionContext:
        return IExecutionContext(self._session, self._profiles)


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        if _SEPARATOR not in serialized_engine:
            self._logger.log(ILogger.Severity.ERROR, "magic tag does not match")
            return None
        return ICudaEngine(serialized_engine)


class Stream:
    """In the place of a CUDA stream."""

    handle = 0
    device = "cpu"

    def synchronize(self) -> None:
        pass

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *error: object) -> None:
        pass


#: Fields and classes of the stand-in alone.
_OWN = {"Stream", "IBuilderConfig.profiles", "IBuilderConfig.flags", "IBuilderConfig.workspace", "Builder.seen"}
_OWN |= {"Builder.fails_with", "IOptimizationProfile.shapes", "INetworkDefinition.onnx_file", "ITimingCache.data"}
_CLASSES = (
    ILogger,
    NetworkDefinitionCreationFlag,
    BuilderFlag,
    MemoryPoolType,
    IHostMemory,
    INetworkDefinition,
    ParserError,
    OnnxParser,
    IOptimizationProfile,
    ITimingCache,
    IBuilderConfig,
    Builder,
    IExecutionContext,
    ICudaEngine,
    Runtime,
)


def public_names() -> list[str]:
    """`Class` and `Class.member` of all that stands in for TensorRT."""
    names = ["__version__", "ILogger.Severity.ERROR", "ILogger.Severity.INTERNAL_ERROR"]
    names.append("IBuilderConfig.builder_optimization_level")  # set on instances, so the class does not show it
    names += [f"{kind.__name__}.__init__" for kind in (Builder, OnnxParser, Runtime)]
    for kind in _CLASSES:
        names.append(kind.__name__)
        names += [f"{kind.__name__}.{name}" for name in vars(kind) if not name.startswith("_")]
    return sorted(set(names) - _OWN)
