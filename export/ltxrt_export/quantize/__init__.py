# SPDX-License-Identifier: Apache-2.0
"""Precision variants of finished graphs (FP16, BF16, FP8) and what decides them; on ONNX graphs, without torch."""
