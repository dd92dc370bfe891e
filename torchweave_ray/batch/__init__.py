"""Offline batches in OpenAI's file format: lines, the journal that survives a kill, the runner.

Knows no Ray: `deployments/batch/workers.py` spreads the same lines over a cluster.
"""
