"""How a model says that it wants a tool: the ways of InternLM2's chat format, of ReAct, and of fenced code."""
