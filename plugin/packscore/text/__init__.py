"""Texts to token ids: prompts, the tokenizer, encoding, labels."""
