"""Examples and a model -> an adapter: one SFTTrainer run."""
