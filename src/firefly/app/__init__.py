"""What a user runs: the pipeline, the demo, the chat."""
