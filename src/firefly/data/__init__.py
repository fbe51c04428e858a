"""Instruction data: importers, tasks, cleaning, chat format, tokens directories, batches. No torch here."""
