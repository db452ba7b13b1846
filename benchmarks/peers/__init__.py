# SPDX-License-Identifier: Apache-2.0
"""The same work by others, timed in the same run: what the diffusers classes in torch take."""
