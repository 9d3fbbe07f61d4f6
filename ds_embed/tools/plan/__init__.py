"""Estimates what a job needs before anything is loaded: memory by part and stage, bytes between ranks, time."""
