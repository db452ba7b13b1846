# SPDX-License-Identifier: Apache-2.0
"""What the clips of the tiny model show, question by question; ``bench_quality.py`` asks them all."""
