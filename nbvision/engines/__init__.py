"""Models: one :class:`Engine` for the user; behind it an executor for TensorRT, and one for ONNX Runtime."""

from nbvision.engines.engine import Engine
from nbvision.engines.profile import EngineProfile, profile_engine
from nbvision.engines.quantize import QuantizationReport, quantize
from nbvision.engines.spec import BatchRange, TensorSpec

__all__ = ["BatchRange", "Engine", "EngineProfile", "QuantizationReport", "TensorSpec", "profile_engine", "quantize"]
