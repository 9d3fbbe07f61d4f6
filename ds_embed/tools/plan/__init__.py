"""What a job will take, before anything is loaded: memory by part and stage, bytes between ranks, time."""
