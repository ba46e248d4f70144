"""Plans what a run takes before it is started: memory, network and arithmetic, from the LLM's dimensions alone."""
