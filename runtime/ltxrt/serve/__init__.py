# SPDX-License-Identifier: Apache-2.0
"""The HTTP server: jobs in a durable store, one worker process per slot, thin adapters for three known APIs."""
