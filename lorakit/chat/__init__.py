"""A conversation with models: prompts as in the training, answers as they come, commands, and what is saved of it."""
