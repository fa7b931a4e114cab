"""Language models: which documents taught a GPT-2 a sentence, and how far that can be trusted."""
