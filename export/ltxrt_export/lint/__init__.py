# SPDX-License-Identifier: Apache-2.0
"""Static checks of exported graphs against the rules of TensorRT's parser; neither TensorRT nor a GPU is needed."""
