"""Networks as ONNX files, in float32 or in int8, kept only where onnxruntime computes what PyTorch computes."""

from genas_plugins.exporting.network import TOLERANCE, Exported, ExportError, check_target, export_onnx

__all__ = ["TOLERANCE", "ExportError", "Exported", "check_target", "export_onnx"]
