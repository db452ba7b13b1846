# SPDX-License-Identifier: Apache-2.0
"""ONNX networks to TensorRT engines, for the GPU of this machine. Neither torch nor TensorRT is imported here."""
