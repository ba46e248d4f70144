"""Merges a LoRA adapter into its LLM, in bounded memory."""
