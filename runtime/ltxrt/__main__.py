# SPDX-License-Identifier: Apache-2.0
"""``python -m ltxrt`` is ``ltxrt``."""

from .cli import main

main()
